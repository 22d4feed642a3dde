"""LangChain with a running server: answers, streams, batches, a reply in a given form, and vectors.

pip install langchain-openai
xpert serve me/desk --embedder base
XPERT_URL=http://127.0.0.1:8000/v1 XPERT_MODEL=desk python examples/clients/langchain_chat.py
"""

from __future__ import annotations

import asyncio
import os
from typing import Literal

from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

URL = os.environ.get("XPERT_URL", "http://127.0.0.1:8000/v1")
KEY = os.environ.get("XPERT_KEY", "none")
MODEL = os.environ["XPERT_MODEL"]
PROMPT = "Add the two numbers.\n\n3 + 4"


class Opinion(BaseModel):
    kind: Literal["good", "bad"]
    sure: bool


async def streamed(chat: ChatOpenAI) -> str:
    return "".join([str(chunk.content) async for chunk in chat.astream(PROMPT)])


def main() -> None:
    chat = ChatOpenAI(model=MODEL, base_url=URL, api_key=KEY, max_tokens=16, temperature=0)
    reply = chat.invoke(PROMPT)
    print("whole", repr(reply.content), reply.usage_metadata["total_tokens"], "tokens")
    print("stream", repr("".join(str(chunk.content) for chunk in chat.stream(PROMPT))))
    print("async", repr(asyncio.run(streamed(chat))))
    print("batch", [message.content == reply.content for message in chat.batch([PROMPT, PROMPT])])
    # The server has no tools, so the form of a reply is asked for as a JSON schema, LangChain's default.
    longer = ChatOpenAI(model=MODEL, base_url=URL, api_key=KEY, max_tokens=64, temperature=0)
    print("form", longer.with_structured_output(Opinion, method="json_schema").invoke("Is tea good?"))
    # Without the last option LangChain cuts texts by a tokenizer of OpenAI's, which it would download.
    vectors = OpenAIEmbeddings(model="base", base_url=URL, api_key=KEY, check_embedding_ctx_length=False)
    print("vectors", [len(vector) for vector in vectors.embed_documents(["one word", "another"])])


if __name__ == "__main__":
    main()
