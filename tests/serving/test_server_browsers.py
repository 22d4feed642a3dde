"""What browsers, health checks and caches ask beside GET and POST."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from xpert.experts.mixture import Mixture
from xpert.experts.server.key_file import add_key

ORIGIN = "https://chat.example.org"
PREFLIGHT = {
    "origin": ORIGIN,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-os",
}


@pytest.mark.parametrize(
    "path", ["/", "/healthz", "/readyz", "/metrics", "/v1/models", "/v1/models/me/sums", "/nothing"]
)
def test_head_tells_what_get_would(served: Any, path: str) -> None:
    found, asked = (httpx.request(method, f"{served.url}{path}") for method in ("GET", "HEAD"))
    assert asked.status_code == found.status_code
    assert asked.content == b""
    changing = ("date", "x-request-id", *(["content-length"] if path == "/metrics" else []))
    assert {k: v for k, v in asked.headers.items() if k not in changing} == {
        k: v for k, v in found.headers.items() if k not in changing
    }


def test_a_connection_goes_on_after_head_and_the_route_is_known(served: Any) -> None:
    with httpx.Client(base_url=served.url) as client:
        client.head("/v1/models/me/sums")
        metrics = client.get("/metrics").text
    assert 'xpert_requests_total{model_kind="none",route="/v1/models/{model:path}",status="200"}' in metrics


def test_head_of_what_is_posted_is_refused(served: Any) -> None:
    refused = httpx.head(f"{served.url}/v1/chat/completions")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")


def test_pages_of_other_origins_may_not_ask(served: Any) -> None:
    assert httpx.options(f"{served.url}/v1/chat/completions", headers=PREFLIGHT).status_code == 405
    reply = httpx.get(f"{served.url}/v1/models", headers={"origin": ORIGIN})
    assert "access-control-allow-origin" not in reply.headers


def test_pages_of_a_named_origin_may_ask(pair: Mixture, serve: Callable[..., Any], tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.json", "page")[1]
    served = serve(pair, cors=(ORIGIN,), api_keys=tmp_path / "keys.json")
    url = f"{served.url}/v1/chat/completions"
    allowed = httpx.options(url, headers=PREFLIGHT)  # browsers send no key with it
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    assert httpx.options(url, headers={**PREFLIGHT, "origin": "https://other.example.org"}).status_code == 400
    body = {"model": "me/sums", "messages": [{"role": "user", "content": "3 + 4"}], "max_tokens": 1, "stream": True}
    reply = httpx.post(url, json=body, headers={"origin": ORIGIN, "authorization": f"Bearer {key}"})
    assert (reply.status_code, reply.headers["access-control-allow-origin"]) == (200, ORIGIN)
    assert {"x-xpert-experts", "x-request-id", "retry-after"} <= set(
        reply.headers["access-control-expose-headers"].split(", ")
    )
    refused = httpx.post(url, json=body, headers={"origin": ORIGIN})  # its page must be able to read why
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)


@pytest.mark.parametrize("model", ["pair:router=nope", "pair:k=0", "pair:aggregator=nope,k=2", "pair:router=oracle"])
def test_a_way_that_cannot_be_taken_is_no_model(served: Any, model: str) -> None:
    listed = httpx.get(f"{served.url}/v1/models/{model}")
    body = {"model": model, "messages": [{"role": "user", "content": "3 + 4"}]}
    asked = httpx.post(f"{served.url}/v1/chat/completions", json=body)
    assert listed.status_code == asked.status_code == 400
    assert listed.json()["error"] == asked.json()["error"]
    assert asked.json()["error"]["param"] == "model"
