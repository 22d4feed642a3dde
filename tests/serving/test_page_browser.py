"""The page at `/` in a headless Chromium, before the real server with the tiny model; skipped where there is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.chromium import Browser
from tests.chromium import browser as browser
from tests.chromium import chromium as chromium
from tests.serving.page_front import PREFIX, Front, ServedPage, sse
from xpert.experts.mixture import Mixture
from xpert.experts.server.app import create_app
from xpert.experts.server.generations import Generations
from xpert.experts.server.options import ServeOptions
from xpert.experts.serving import MixtureRunner

CASING = "Write the word in capitals.\n\nbaba (case 3 tite)"
SUM = "Add the two numbers.\n\n3 + 4"
EVIL = "</b><script>document.title='owned'</script><img src=x onerror=document.title='owned'>"
SCORES: dict[str, dict[str, Any]] = {
    "me/casing": {"scores": {"casing": {"expert": 0.9, "base": 0.25}, "sums": {"expert": 0.1, "base": 0.2}}},
    "me/sums": {"scores": {"sums": {"expert": 0.755, "base": 0.2, "metric": "exact"}}, "ref": "me/sums@3"},
}
LOAD: dict[str, Any] = {
    "running": 1,
    "waiting": 2,
    "max_batch": 4,
    "max_queue": 64,
    "requests": 1204,
    "tokens_per_second": 41.26,
    "generations": 1,
    "generation": 1,
    "experts": {"me/sums": 1, "me/casing": 0},
    "started": 1_700_000_000,
}


@pytest.fixture(scope="module")
def served(pair: Mixture) -> Iterator[ServedPage]:
    runner = MixtureRunner.open(pair, max_batch=4)
    served = ServedPage(create_app(Generations(pair, runner.lm, runner.engine), ServeOptions(max_batch=4)))
    yield served
    served.close()


@pytest.fixture
def front(served: ServedPage) -> Front:
    served.front.reset()
    return served.front


@pytest.fixture
def page(browser: Browser, served: ServedPage, front: Front) -> Iterator[Browser]:
    """The page, opened and ready. A test that wants the front to do something before opens it again."""
    browser.open(served.url)
    browser.wait("document.body.classList.contains('ready')")
    browser.js("sessionStorage.clear()")
    yield browser
    # A server without /v1/load answers 404, and a refused request its status; all else would be a defect.
    assert [one for one in browser.complaints if "Failed to load resource" not in one] == []


@pytest.fixture
def hurried(browser: Browser) -> Iterator[None]:
    """Pauses of the pages opened from now on take a twentieth of their time."""
    hurry = "{ const wait = setTimeout; window.setTimeout = (what, time, ...rest) => wait(what, time / 20, ...rest); }"
    added = browser.ask("Page.addScriptToEvaluateOnNewDocument", source=hurry)
    yield
    browser.ask("Page.removeScriptToEvaluateOnNewDocument", **added)


def reopened(page: Browser, served: ServedPage) -> None:
    page.open(served.url)
    page.wait("document.body.classList.contains('ready')")


def text(page: Browser, selector: str) -> str:
    return str(page.js(f"document.querySelector({selector!r})?.textContent ?? ''"))


def fill(page: Browser, **values: object) -> None:
    """Sets controls by their ids as a user would, with the event that follows."""
    for name, value in values.items():
        kind = "checked" if isinstance(value, bool) else "value"
        page.js(
            f"(c => {{ c.{kind} = {json.dumps(value)}; c.dispatchEvent(new Event('input', {{bubbles: true}}));"
            f" c.dispatchEvent(new Event('change', {{bubbles: true}})); }})(document.getElementById({name!r}))"
        )


def send(page: Browser, prompt: str) -> None:
    """Types a prompt and sends it by the keyboard, without waiting for the answer."""
    page.js("document.querySelector('#prompt').focus()")
    page.type(prompt)
    page.key("Enter", control=True)


def talk(page: Browser, prompt: str) -> None:
    before = page.js("document.querySelectorAll('.facts button').length")
    send(page, prompt)
    page.wait(f"document.querySelectorAll('.facts button').length > {before}")


def test_a_conversation_by_keyboard(page: Browser, served: ServedPage, front: Front) -> None:
    assert page.js("document.activeElement.id") == "prompt"
    assert page.js("document.title") == "pair · xpert" and text(page, "#name") == "pair"
    fill(page, max_tokens="8")
    talk(page, CASING)
    body = front.bodies("/v1/chat/completions")[0]
    assert body == {
        "model": "pair",
        "messages": [{"role": "user", "content": CASING}],
        "max_tokens": 8,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "xpert": {"explain": True},
    }
    first = text(page, ".turn .reply")
    facts = page.js("[...document.querySelectorAll('.facts span')].map(s => s.textContent)")
    assert facts[0] == "me/casing" and any(fact.startswith("first token after") for fact in facts)
    assert any("token" in fact and "+" in fact for fact in facts)
    page.wait("document.querySelector('#reason').textContent.includes('nearest skill')")
    assert text(page, "#route-of") == "Answer 1, asked of pair"
    assert "me/casing" in text(page, ".candidates tr.chosen") and "1.00" in text(page, ".candidates tr.chosen")
    assert text(page, "#route-facts code") == "x-xpert-experts: me/casing=1"
    assert text(page, "#status").startswith("Answered") and "me/casing" in text(page, "#status")

    fill(page, system="Be brief.")
    talk(page, SUM)
    said = front.bodies("/v1/chat/completions")[1]["messages"]
    history = [{"role": "user", "content": CASING}, {"role": "assistant", "content": first}] if first else []
    assert said == [{"role": "system", "content": "Be brief."}, *history, {"role": "user", "content": SUM}]
    page.js("document.querySelectorAll('.facts button')[0].click()")
    assert text(page, "#route-of") == "Answer 1, asked of pair"
    page.js("document.querySelector('#clear').click()")
    assert page.js("document.querySelectorAll('.turn').length") == 0
    assert page.js("document.querySelector('#nothing').hidden") is False
    talk(page, SUM)
    assert len(front.bodies("/v1/chat/completions")[2]["messages"]) == 2  # the system prompt and this one


def test_the_page_shows_what_the_server_answers(page: Browser, served: ServedPage) -> None:
    import httpx

    fill(page, model="base", max_tokens="12")
    talk(page, SUM)
    body = {"model": "base", "messages": [{"role": "user", "content": SUM}], "max_tokens": 12, "temperature": 0}
    answer = httpx.post(f"{served.url}v1/chat/completions", json=body).json()
    assert text(page, ".turn .reply") == answer["choices"][0]["message"]["content"]
    usage = answer["usage"]
    counts = f"{usage['prompt_tokens']} + {usage['completion_tokens']} token"
    assert counts in text(page, ".facts") and text(page, "#chosen") == "the base alone"
    if answer["choices"][0]["finish_reason"] == "length":
        assert "cut at the most tokens" in text(page, ".facts")


def test_json_mode_and_another_router_are_understood_by_the_server(page: Browser) -> None:
    fill(page, options="router=fixed", json=True, max_tokens="16")
    talk(page, SUM)
    assert text(page, ".turn .bad") == "" and text(page, ".turn .reply").lstrip().startswith("{")
    assert text(page, "#asked") == "pair:router=fixed" and text(page, "#reason") != ""
    assert page.js("document.querySelectorAll('#chosen b').length") == 2  # router fixed: both experts


def test_the_route_shows_while_one_types(page: Browser, front: Front) -> None:
    for part in ("Write the word ", "in capitals.", "\n\nbaba (case 3 tite)"):
        page.type(part)
    page.wait("document.querySelectorAll('.candidates tbody tr').length === 2")
    assert front.asked == [("/v1/route", {"model": "pair", "messages": [{"role": "user", "content": CASING}]})]
    assert "would go" in text(page, "#route-of") and "me/casing" in text(page, "#chosen")
    page.key("Enter", control=True)
    page.wait("document.querySelector('.facts button')")
    assert len(front.bodies("/v1/route")) == 1  # the answer itself tells of its route


def test_the_route_is_shown_when_asked_for_alone(
    page: Browser, served: ServedPage, front: Front, hurried: None
) -> None:
    reopened(page, served)
    fill(page, preview=False)
    page.type(SUM)
    page.js("new Promise(done => setTimeout(done, 2000))")
    assert front.asked == []
    page.js("document.querySelector('#route-only').click()")
    page.wait("document.querySelector('#route-of').textContent.includes('would go')")
    assert [path for path, _ in front.asked] == ["/v1/route"]


def test_escape_stops_an_answer_and_the_server_hears_it(page: Browser, served: ServedPage, front: Front) -> None:
    front.pace = 0.02
    fill(page, model="base", max_tokens="400", temperature="1", seed="1")
    send(page, SUM)
    page.wait("document.querySelector('.turn .reply')?.textContent.length > 3")
    assert page.js("[document.querySelector('#send').disabled, document.querySelector('#stop').disabled]") == [
        True,
        False,
    ]
    page.key("Enter", control=True)  # nothing to send, and one answer at a time
    page.key("Escape")
    page.wait("!document.querySelector('#send').disabled")
    assert "stopped" in text(page, ".facts") and text(page, "#status").startswith("stopped")
    page.wait("fetch('healthz').then(r => r.json()).then(h => window.active = h.active) && window.active === 0")
    assert served.active() == 0
    kept = text(page, ".turn .reply")
    front.pace = 0.0
    fill(page, max_tokens="4")
    talk(page, "And?")
    assert front.bodies("/v1/chat/completions")[1]["messages"][1] == {"role": "assistant", "content": kept}


def test_clearing_ends_what_is_on_its_way(page: Browser, served: ServedPage, front: Front) -> None:
    front.pace = 0.02
    fill(page, model="base", max_tokens="400", temperature="1", seed="1")
    send(page, SUM)
    page.wait("document.querySelector('.turn .reply')?.textContent.length > 3")
    page.js("document.querySelector('#clear').click()")
    page.wait("!document.querySelector('#send').disabled")
    front.pace = 0.0
    fill(page, max_tokens="4")
    talk(page, "And?")
    assert page.js("document.querySelectorAll('.turn').length") == 1
    assert front.bodies("/v1/chat/completions")[1]["messages"] == [{"role": "user", "content": "And?"}]


def test_it_works_behind_a_prefix(page: Browser, served: ServedPage, front: Front) -> None:
    page.open(f"{served.url}{PREFIX[1:]}/")
    page.wait("document.body.classList.contains('ready')")
    fill(page, model="base", max_tokens="4")
    talk(page, SUM)
    assert text(page, "#url") == f"{served.url}{PREFIX[1:]}/v1"
    assert page.js("fetch(document.querySelector('.top a[href^=registry]').href).then(r => r.status)") == 200


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"options": "router=nonsense"}, "unknown router 'nonsense'"),
        ({"model": "base", "stop_texts": "\n".join("abcdefghijklmnopq")}, "at most 16 items"),
    ],
)
def test_what_the_server_refuses_is_said_in_its_words(page: Browser, settings: dict[str, str], words: str) -> None:
    fill(page, preview=False, **settings)
    send(page, SUM)
    page.wait("document.querySelector('.turn .bad')")
    assert words in text(page, ".turn .bad")
    assert page.js("document.querySelector('#prompt').value") == SUM  # to be mended and sent again
    fill(page, model="base", max_tokens="4", stop_texts="")
    page.key("Enter", control=True)
    page.wait("document.querySelector('.facts button')")
    assert page.js("document.querySelectorAll('.turn').length") == 1


def test_an_answer_that_breaks_off(page: Browser, front: Front) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "half an "}, "finish_reason": None}]}
    header = {"content-type": "text/event-stream", "x-xpert-experts": "me/sums=1"}
    error = {"error": {"message": "the engine fell over", "code": None}}
    cases = {
        sse(chunk, error, done=False): "the engine fell over",
        sse(chunk, done=False): "the connection ended before the answer was whole",
    }
    for stream, words in cases.items():
        front.answers["/v1/chat/completions"] = (stream, header)
        send(page, SUM)
        page.wait(f"document.querySelector('.turn:last-child .bad')?.textContent === {words!r}")
        assert text(page, ".turn:last-child .reply") == "half an "
        assert "failed" in text(page, ".turn:last-child .facts")
    # Signs of life, other line ends and several events in one part are no trouble.
    odd = b": hello\r\n\r\nevent: x\r\ndata:" + json.dumps(chunk).encode() + b"\r\n\r\n: hello\n\n" + sse(chunk)
    front.answers["/v1/chat/completions"] = (odd, header)
    send(page, SUM)
    page.wait("document.querySelectorAll('.facts button').length === 3")
    assert text(page, ".turn:last-child .reply") == "half an half an "


def test_options_and_settings_are_sent_as_they_stand(page: Browser, front: Front) -> None:
    front.answers["/v1/chat/completions"] = (sse(), {"x-xpert-experts": "base"})
    fill(page, preview=False, options=" router=fixed,k=3", temperature="0.7", top_p="0.9", top_k="40", min_p="0.05")
    fill(page, repetition_penalty="1.1", seed="7", max_tokens="", stop_texts="END\n\n##", json=True)
    assert text(page, "#asked") == "pair:router=fixed,k=3"
    talk(page, SUM)
    body = front.bodies("/v1/chat/completions")[0]
    assert {name: value for name, value in body.items() if name != "messages"} == {
        "model": "pair:router=fixed,k=3",
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "seed": 7,
        "stop": ["END", "##"],
        "response_format": {"type": "json_object"},
        "stream": True,
        "stream_options": {"include_usage": True},
        "xpert": {"explain": True},
    }
    assert "an empty answer" in text(page, ".facts")
    fill(page, model="me/sums")
    assert text(page, "#asked") == "me/sums" and page.js("document.querySelector('#options').disabled")
    fill(page, top_p="7")
    send(page, SUM)
    assert len(front.bodies("/v1/chat/completions")) == 1  # the browser says what is wrong, where one can see it
    assert page.js("document.querySelector('#settings').open && document.activeElement.id") == "top_p"


def test_everything_a_route_can_say(page: Browser, front: Front) -> None:
    route = {
        "id": "route-1",
        "experts": [{"expert": "me/sums", "weight": 0.75}, {"expert": "me/casing", "weight": 0.25}],
        "candidates": [
            {"expert": "me/sums", "score": 1.0},
            *({"expert": f"other/{i:02}", "score": -0.1 * i} for i in range(1, 21)),
            {"expert": "me/casing", "score": -3.0},
        ],
        "reason": "likely",
        "chance": 0.625,
        "escalation": {"experts": [], "below": 0.4},
    }
    front.answers["/v1/route"] = (route, {})
    page.type("x")
    page.wait("document.querySelector('#reason').textContent === 'likely'")
    facts = page.js(
        "[...document.querySelectorAll('#route-facts div')].map(d => [...d.children].map(c => c.textContent))"
    )
    assert facts == [["Chance", "63 %"], ["If unsure", "under a confidence of 0.4, the base answers"]]
    assert text(page, "#chosen") == "me/sums0.75me/casing0.25"
    assert page.js("document.querySelectorAll('.candidates tbody tr').length") == 12
    page.js("document.querySelector('#candidates button').click()")
    rows = page.js(
        """[...document.querySelectorAll('.candidates tbody tr')].map(row => {
          const [bar, zero, track] = ['i', '.track b', '.track'].map(e => row.querySelector(e).getBoundingClientRect());
          const side = Math.abs(bar.left - zero.left) < 2 ? 1 : Math.abs(bar.right - zero.left) < 2 ? -1 : 0;
          const [name, , score, weight] = [...row.cells].map(cell => cell.textContent);
          return {name, score, weight, side, width: bar.width / track.width};
        })"""
    )
    assert [row["name"] for row in rows] == [c["expert"] for c in route["candidates"]]
    by_name = {row["name"]: row for row in rows}
    assert by_name["me/sums"]["side"] == 1 and by_name["me/sums"]["width"] == pytest.approx(1 / 4, abs=0.02)
    assert by_name["me/casing"]["side"] == -1 and by_name["me/casing"]["width"] == pytest.approx(3 / 4, abs=0.02)
    assert by_name["me/casing"]["score"] == "−3.000" and by_name["me/casing"]["weight"] == "0.25"
    assert page.js("document.activeElement.textContent") == "The first 12 only"

    votes = [
        {"experts": ["me/sums"], "weight": 2.0, "answer": "7", "text": "It is 7."},
        {"experts": [], "weight": 1.0, "answer": "", "text": EVIL},
    ]
    told: dict[str, Any] = {
        **route,
        "answered_by": [{"expert": "me/sums", "weight": 1}],
        "reason": "likely; 1 of 2 replies agree",
        "stage": 1,
        "aggregated": {"share": 2 / 3, "votes": votes},
    }
    header = {"x-xpert-experts": "me/sums=0.75,me/casing=0.25"}
    front.answers["/v1/chat/completions"] = (sse({"choices": [], "xpert": told}), header)
    talk(page, "y")
    page.wait("document.querySelectorAll('.votes tbody tr').length === 2")
    rows = page.js("[...document.querySelectorAll('.votes tr')].map(r => [...r.cells].map(c => c.textContent))")
    assert rows == [["Of", "Weight", "Reply"], ["me/sums", "2.000", "7 It is 7."], ["the base", "1.000", EVIL]]
    assert text(page, ".votes caption") == "2 votes" and text(page, "#chosen") == "me/sums1.00"
    assert "67 % of the votes" in text(page, "#route-facts") and "1 of 2 replies" in text(page, "#reason")
    assert page.js("document.querySelectorAll('.candidates .chosen').length") == 2  # those that were asked
    assert text(page, ".turn:last-child .facts span") == "me/sums"

    replies = [{"expert": "me/sums", "text": "seven", "mean_logprob": -0.5}]
    told = {"stage": 2, "confidence": 0.31, "aggregated": {"replies": replies}}
    front.answers["/v1/chat/completions"] = (sse({"choices": [], "xpert": told}), header)
    talk(page, "z")
    page.wait("document.querySelector('.votes caption')?.textContent === '1 reply'")
    assert text(page, ".votes tbody tr") == "me/sums−0.500seven"
    assert "0.31, so it was answered anew" in text(page, "#route-facts")


def test_the_key_is_asked_for_and_kept_in_this_tab_alone(page: Browser, served: ServedPage, front: Front) -> None:
    front.key = "xp-secret"
    reopened(page, served)
    assert text(page, "#key-words") == "the API key is missing or unknown"
    assert page.js("document.activeElement.id") == "key"
    for key in ("wrong", "xp-secret"):
        page.type(key)
        page.key("Enter")
        page.wait(
            "document.querySelector('#model').options.length"
            if key == front.key
            else "document.activeElement.id === 'key'"
        )
    assert page.js("document.querySelector('#key-form').hidden && document.querySelector('#trouble').hidden")
    assert page.js("Object.values(sessionStorage)") == ["xp-secret"] and page.js("localStorage.length") == 0
    assert page.js("document.cookie") == "" and page.js("document.querySelector('#key').value") == ""
    fill(page, model="base", max_tokens="4")
    talk(page, SUM)
    reopened(page, served)
    assert page.js("document.querySelector('#model').options.length") == 4  # it is still known in this tab
    page.js("document.querySelector('#forget').click()")
    assert page.js("sessionStorage.length") == 0
    send(page, SUM)
    page.wait("!document.querySelector('#key-form').hidden")
    assert page.js("document.querySelector('#prompt').value") == SUM
    page.js("sessionStorage.clear()")


def test_the_heat_map(page: Browser, served: ServedPage, front: Front) -> None:
    front.told = SCORES
    reopened(page, served)
    table = (
        "[...document.querySelectorAll('.heat tr')].map(r => [...r.cells].map(c => c.firstChild.textContent.trim()))"
    )
    assert page.js(table) == [
        ["Expert", "casing", "sums"],
        ["baseUse", "25", "20"],
        ["me/casingUse", "90", "10"],
        ["me/sums @3Use", "not scored", "76"],
    ]
    assert page.js("[...document.querySelectorAll('.heat td')].map(c => c.className)") == [
        *("s2", "s1"),
        *("s8", "s0"),
        *("none", "s6"),
    ]
    spoken = page.js('document.querySelector(\'td[data-r="1"][data-c="1"]\').textContent')
    assert spoken == "10, base 0.200, gain −10.0 hundredths"
    page.js("document.querySelector('.heat td[tabindex=\"0\"]').focus()")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowDown"):
        page.key(key)
    assert page.js("[document.activeElement.dataset.r, document.activeElement.dataset.c]") == ["2", "1"]
    tip = text(page, "#tip.on")
    assert "me/sums" in tip and "0.755" in tip and "+55.5 hundredths" in tip
    page.key("Home")
    assert page.js("document.activeElement.className") == "none" and text(page, "#tip.on") == ""
    assert page.js("document.querySelectorAll('.heat td[tabindex=\"0\"]').length") == 1
    page.key("End")
    page.key("Escape")
    assert text(page, "#tip.on") == ""
    page.js("document.querySelector('[data-model=\"me/sums\"]').click()")
    assert page.js("document.querySelector('#model').value") == "me/sums"
    pressed = page.js("[...document.querySelectorAll('.use[aria-pressed=true]')].map(b => b.dataset.model)")
    assert pressed == ["me/sums"]
    links = page.js(
        "Promise.all([...document.querySelectorAll('.heat a')].map(a => fetch(a.href).then(r => r.status)))"
    )
    assert links == [200, 200]


def test_experts_without_scores_are_listed(page: Browser) -> None:
    rows = page.js("[...document.querySelectorAll('.heat tbody tr')].map(r => r.textContent)")
    assert len(rows) == 3 and "for sums" in rows[2]
    page.js("document.querySelectorAll('.use')[0].click()")
    assert page.js("document.querySelector('#model').value") == "base"


def test_the_load_is_watched_only_while_it_is_seen(
    page: Browser, served: ServedPage, front: Front, hurried: None
) -> None:
    front.answers["/v1/load"] = (LOAD, {})
    front.looked = 0
    reopened(page, served)
    figures = page.js("[...document.querySelectorAll('#figures dd')].map(d => d.textContent)")
    assert figures == ["1 of 4", "2 of 64", "41.3", "1,204", "1"]
    assert text(page, "#busy") == "me/sums 1" and text(page, "#load-since").startswith("up ")
    front.told = SCORES
    front.answers["/v1/load"] = (LOAD | {"running": 3, "generation": 2}, {})
    page.wait("document.querySelector('#figures dd').textContent === '3 of 4'")
    page.wait("document.querySelectorAll('.heat td').length === 6")  # a new generation: the experts are asked for anew
    length = "document.querySelector('#spark .running').getAttribute('points').split(' ').length"
    points = page.js(length)
    assert 2 <= points <= front.looked
    page.js(
        "Object.defineProperty(document, 'hidden', {get: () => window.away, configurable: true});"
        "window.away = true; document.dispatchEvent(new Event('visibilitychange'))"
    )
    page.js("new Promise(done => setTimeout(done, 2000))")
    before = front.looked
    page.js("new Promise(done => setTimeout(done, 3000))")
    assert front.looked == before
    page.js("window.away = false; document.dispatchEvent(new Event('visibilitychange'))")
    page.wait(f"{length} > {points}")


@pytest.mark.parametrize("missing", [True, False])
def test_a_server_that_does_not_tell_its_load_is_asked_once(
    page: Browser, served: ServedPage, front: Front, hurried: None, missing: bool
) -> None:
    front.answers["/v1/load"] = ({"something": "else"}, {})
    front.missing |= {"/v1/load"} if missing else set()
    front.looked = 0
    reopened(page, served)
    page.js("new Promise(done => setTimeout(done, 12_000))")
    assert page.js("document.querySelector('#load').hidden") and front.looked == 1


def test_what_strangers_wrote_does_nothing(page: Browser, served: ServedPage, front: Front) -> None:
    front.told = {
        "me/sums": {"about": EVIL, "ref": EVIL, "scores": {EVIL: {"expert": 0.5, "base": 0.1}}, "skills": [EVIL]},
        "pair": {"router": EVIL},
        "base": {"ref": EVIL},
    }
    route = {
        "experts": [{"expert": EVIL, "weight": 1}],
        "candidates": [{"expert": EVIL, "score": 1}],
        "reason": EVIL,
    }
    answer = {"choices": [{"delta": {"content": EVIL}}], "xpert": route}
    front.answers = {
        "/v1/route": (route, {}),
        "/v1/load": (LOAD | {"experts": {EVIL: 1}}, {}),
        "/v1/chat/completions": (sse(answer, {"error": {"message": EVIL}}), {"x-xpert-experts": "%3Cimg%3E=1"}),
    }
    reopened(page, served)
    send(page, EVIL)
    page.wait("document.querySelector('.turn .bad') && document.querySelector('#reason').textContent")
    page.js("document.querySelector('.heat td:not(.none)').focus()")
    assert text(page, ".turn .reply") == EVIL and text(page, "#reason") == EVIL and EVIL in text(page, "#tip.on")
    assert (
        page.js("document.title") == "pair · xpert"
        and page.js("document.querySelectorAll('img, b script').length") == 0
    )
    refused = page.js("(() => { try { document.body.innerHTML = '<b>'; return ''; } catch (e) { return e.name; } })()")
    assert refused == "TypeError"  # the policy: no text becomes markup, not even by a defect
    page.complaints[:] = [one for one in page.complaints if "TrustedHTML" not in one]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 700, 1280])
def test_it_fits_every_width(page: Browser, served: ServedPage, front: Front, width: int, dark: bool) -> None:
    long = "W" * 200
    scores = {f"skill {i} {long if i == 3 else ''}": {"expert": i / 15, "base": 0.1} for i in range(15)}
    front.told = {"me/sums": {"scores": scores, "about": long}, "pair": {"router": long}}
    front.answers["/v1/load"] = (LOAD | {"experts": {long: 1}}, {})
    page.size(width, 800)
    page.dark(dark)
    reopened(page, served)
    fill(page, max_tokens="6", options="router=" + long)
    send(page, long)
    page.wait("document.querySelector('.turn .bad')")
    page.js("document.querySelector('#settings').open = true")
    assert page.js("document.documentElement.scrollWidth") <= width
    out = page.js(
        "[...document.querySelectorAll('main :is(button, input, select, textarea)')].filter(c => !c.closest('.scroll'))"
        ".map(c => [c.id, c.getBoundingClientRect()])"
        ".filter(([, box]) => box.width && (box.left < 0 || box.right > innerWidth)).map(([id]) => id)"
    )
    assert out == []


def test_nothing_moves_while_one_types_and_is_answered(page: Browser, front: Front) -> None:
    page.js(
        "window.moved = 0; new PerformanceObserver(list => { for (const entry of list.getEntries())"
        " window.moved += entry.value; }).observe({type: 'layout-shift', buffered: true})"
    )
    candidates = [{"expert": f"me/{i}", "score": 1 / (1 + i)} for i in range(60)]
    route = {"experts": [{"expert": "me/0", "weight": 1}], "candidates": candidates, "reason": "long " * 100}
    front.answers["/v1/route"] = (route, {})
    fill(page, max_tokens="8")
    page.type(CASING)
    page.wait("document.querySelectorAll('.candidates tbody tr').length === 12")
    page.js("document.querySelector('#candidates button').click()")
    page.js("document.querySelector('#prompt').focus()")
    page.key("Enter", control=True)
    page.wait("document.querySelector('.facts button')")
    page.js("new Promise(done => requestAnimationFrame(() => setTimeout(done, 100)))")
    assert page.js("window.moved") < 0.1  # what Core Web Vitals calls good


def test_keys_and_landmarks(page: Browser) -> None:
    page.js("document.activeElement.blur()")
    page.key("/")
    assert page.js("document.activeElement.id") == "prompt" and page.js("document.activeElement.value") == ""
    page.key("/")
    assert page.js("document.activeElement.value") == "/"  # inside a text it is a letter
    page.js("document.activeElement.value = ''; document.querySelector('.skip').focus()")
    assert page.js("document.activeElement.getBoundingClientRect().left") > 0  # seen once it has the focus
    seen = []
    for _ in range(11):
        page.key("Tab")
        seen.append(page.js("document.activeElement.id || document.activeElement.textContent"))
    assert seen[:4] == ["Playground", "Experts", "Registry", "clear"]
    assert seen[4:] == ["log", "model", "options", "prompt", "send", "route-only", "json"]
    outline = page.js("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    found = page.js(
        """({
          h1: document.querySelectorAll("h1").length,
          landmarks: ["header", "nav", "main", "footer"].filter(tag => !document.querySelector(tag)),
          unlabelled: [...document.querySelectorAll("input, select, textarea")].filter(c => !c.labels.length).length,
          nameless: [...document.querySelectorAll("button, a")].filter(b => !b.textContent.trim()).length,
          live: [...document.querySelectorAll("[aria-live], [role=status], [role=alert]")].map(e => e.id),
        })"""
    )
    assert found == {"h1": 1, "landmarks": [], "unlabelled": 0, "nameless": 0, "live": ["trouble", "status"]}
