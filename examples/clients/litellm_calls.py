"""LiteLLM with a running server: the provider is `openai/`, the rest of the name is the server's model.

pip install litellm
xpert serve me/desk --embedder base
XPERT_URL=http://127.0.0.1:8000/v1 XPERT_MODEL=desk python examples/clients/litellm_calls.py
"""

from __future__ import annotations

import asyncio
import os
from typing import Any, Literal

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it downloads a price list as it is imported

import litellm
from pydantic import BaseModel

MODEL = os.environ["XPERT_MODEL"]
SERVER: dict[str, Any] = {
    "api_base": os.environ.get("XPERT_URL", "http://127.0.0.1:8000/v1"),
    "api_key": os.environ.get("XPERT_KEY", "none"),
}
ASK: dict[str, Any] = {
    **SERVER,
    "model": f"openai/{MODEL}",
    "messages": [{"role": "user", "content": "Add the two numbers.\n\n3 + 4"}],
    "max_tokens": 16,
}


class Opinion(BaseModel):
    kind: Literal["good", "bad"]
    sure: bool


async def asynchronous() -> str:
    return str((await litellm.acompletion(**ASK)).choices[0].message.content)


def main() -> None:
    litellm.suppress_debug_info = True
    whole = litellm.completion(**ASK)
    print("whole", repr(whole.choices[0].message.content), whole.usage.total_tokens, "tokens")
    chunks = litellm.completion(**ASK, stream=True)
    print("stream", repr("".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)))
    print("async", repr(asyncio.run(asynchronous())))
    formed = litellm.completion(**{**ASK, "max_tokens": 64}, response_format=Opinion)
    print("form", Opinion.model_validate_json(formed.choices[0].message.content))
    print("vectors", len(litellm.embedding(model="openai/base", input=["one word", "another"], **SERVER).data))
    try:
        litellm.completion(**{**ASK, "model": "openai/nobody"})
    except litellm.NotFoundError as error:
        print("error", type(error).__name__, error.status_code)


if __name__ == "__main__":
    main()
