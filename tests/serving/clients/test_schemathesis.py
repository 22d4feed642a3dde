"""The OpenAPI description, and what the server does, do not disagree: schemathesis looks for requests on which they do.

All its checks run: defects, statuses, content types and replies that are not described, bodies that are wrong and
accepted, bodies that are right and refused, methods that are not there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from xpert.experts.mixture import Mixture

FULL = os.environ.get("XPERT_RELIABILITY") == "full"
SEED = os.environ.get("XPERT_SEED", "1")
MOST = 12  # replies of a request
MODELS = ["pair", "me/casing", "base"]

pytestmark = pytest.mark.skipif(find_spec("schemathesis") is None, reason="schemathesis is not installed")


def with_models(document: dict[str, Any]) -> dict[str, Any]:
    """The description, with the models that there are: what is wrong otherwise must not pass for an unknown model."""
    for path, body in bodies(document):
        names = ["base"] if path == "/v1/embeddings" else MODELS
        body["properties"]["model"] = {"enum": names if "model" in body["required"] else [*names, None]}
    return document


def narrowed(document: dict[str, Any]) -> dict[str, Any]:
    """The description, with what JSON Schema cannot say: what fits into a context of 512 tokens, which vectors there
    are, how many replies several prompts may have, what is a regular expression and a schema. Replies are short, for
    the sake of time."""
    schemas = document["components"]["schemas"]
    an_object = {"enum": [{"type": "object"}, {"type": "integer"}]}
    schemas["ChatMessage"]["properties"]["content"] = {"type": "string", "maxLength": 20}
    schemas["JsonSchema"]["properties"]["schema"] = an_object
    outputs = schemas["StructuredOutputs"]["properties"]
    outputs["json"] = {"anyOf": [an_object, {"type": "null"}]}
    outputs["regex"] = {"enum": ["[0-9]+", "a|b", None]}
    outputs["choice"] = {"enum": [["yes", "no"], ["x"], None]}
    ids = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 300}, "minItems": 1, "maxItems": 9}
    text = {"type": "string", "minLength": 1, "maxLength": 20}
    lists = [{"type": "array", "items": one, "minItems": 1, "maxItems": 3} for one in (text, ids)]
    for _, body in bodies(document):
        properties = body["properties"]
        for name in properties.keys() & {"max_tokens", "max_completion_tokens"}:
            properties[name]["anyOf"][0]["maximum"] = 3
        if "n" in properties:
            assert properties["n"]["anyOf"][0]["maximum"] == MOST
            properties["n"]["anyOf"][0]["maximum"] = MOST // 3
        if "messages" in properties:
            properties["messages"]["maxItems"] = 2
        for name in properties.keys() & {"prompt", "input"}:
            properties[name] = {"anyOf": [text, ids, *lists]}
        if "dimensions" in properties:
            properties["dimensions"] = {"enum": [64, None]}
    return document


def bodies(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        if "post" in item:
            yield path, item["post"]["requestBody"]["content"]["application/json"]["schema"]


@pytest.fixture(scope="module")
def limited(pair: Mixture, serve: Callable[..., Any]) -> Any:
    return serve(pair, embedder="base", max_n=MOST, max_batch=8, max_queue=64)


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_nothing_is_found(limited: Any, mode: str, tmp_path: Path) -> None:
    document = with_models(httpx.get(f"{limited.url}/openapi.json").json())
    described = tmp_path / "openapi.json"
    described.write_text(json.dumps(narrowed(document) if mode == "positive" else document))
    command = [sys.executable, "-m", "schemathesis.cli", "run", str(described), "--url", limited.url, "--mode", mode]
    command += ["--phases", "examples,coverage,fuzzing" if FULL else "fuzzing", "--continue-on-failure"]
    command += ["--max-examples", "300" if FULL else "6", "--seed", SEED, "--suppress-health-check", "all"]
    command += ["--no-color", "--warnings", "off"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
