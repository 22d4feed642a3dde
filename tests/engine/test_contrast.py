"""Contrastive decoding: the formulas (invariant P12), and two lanes a request in a batch of others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from xpert import plugins
from xpert.errors import BadInput, NotFound
from xpert.experts.engines.torch_lora import TorchEngine
from xpert.language_model import LanguageModel
from xpert.protocols import Contrast, Decoder, EngineRequest

Ask = Callable[..., EngineRequest]
Replies = Callable[..., dict[str, str]]
CONTEXT, QUESTION = "The dog is called Rex and the cat is called Tom.\n\nWho is it?", "Who is it?"


def decoder(name: str, **params: Any) -> Decoder:
    plugin = plugins.load("decoder", name)
    made: Decoder = plugin(plugin.Options(**params))
    return made


# ── formulas ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_context_contrast_by_hand() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.6])
    mean = (p + q) / 2
    divergence = ((p * (p / mean).log()).sum() + (q * (q / mean).log()).sum()) / 2
    expected = (1 + divergence) * p.log() - divergence * q.log()
    found = decoder("context-contrast").combine(p.log()[None], q.log()[None])
    assert torch.allclose(found[0], expected, atol=1e-6)
    floored = decoder("context-contrast", floor=0.9).combine(p.log()[None], q.log()[None])
    assert torch.allclose(floored[0], 1.9 * p.log() - 0.9 * q.log(), atol=1e-6)
    assert 0 < divergence < math.log(2)


def test_context_contrast_leaves_equal_logits_unchanged() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(decoder("context-contrast").combine(logits, logits.clone()), logits)
    assert torch.equal(decoder("context-contrast", floor=0.3).combine(logits, logits.clone()), logits)


def test_context_contrast_of_disjoint_distributions_is_bounded() -> None:
    """The divergence is ln 2 at most, also where one side rules tokens out."""
    main = torch.tensor([[0.0, -math.inf, -math.inf]])
    other = torch.tensor([[-math.inf, 0.0, 0.0]])
    found = decoder("context-contrast").combine(main, other)
    assert found.argmax() == 0 and found[0, 1] == -math.inf and not found.isnan().any()


def test_self_contrast_by_hand() -> None:
    strong = torch.tensor([[2.0, 1.5, 0.0, -9.0]])
    weak = torch.tensor([[2.0, -1.0, 0.0, -20.0]])
    found = decoder("self-contrast", beta=0.5, alpha=0.1).combine(strong, weak)
    kept = strong >= 2.0 + math.log(0.1)
    assert kept.tolist() == [[True, True, True, False]]
    assert torch.allclose(found[kept], (1.5 * strong - 0.5 * weak)[kept])
    assert found.argmax() == 1 and found[0, 3] == -math.inf


def test_self_contrast_without_beta_is_masked_greedy() -> None:
    strong, weak = torch.randn(2, 6, 50, generator=torch.Generator().manual_seed(1))
    found = decoder("self-contrast", beta=0.0, alpha=0.3).combine(strong, weak)
    mask = strong >= strong.amax(-1, keepdim=True) + math.log(0.3)
    assert torch.equal(found, strong.masked_fill(~mask, -math.inf))
    assert torch.equal(found.argmax(-1), strong.argmax(-1))


@pytest.mark.parametrize("name", plugins.names("decoder"))
def test_rows_are_decided_alone_and_no_number_stays_none(name: str) -> None:
    main, other = torch.randn(2, 4, 30, generator=torch.Generator().manual_seed(2))
    main[2, 5] = math.nan
    found = decoder(name).combine(main, other)
    for row in (0, 1, 3):
        assert torch.allclose(found[row], decoder(name).combine(main[row : row + 1], other[row : row + 1])[0])
    assert found[2].isnan().any()


# ── in the engine ────────────────────────────────────────────────────────────────────────────────────────────────


def plain_reply(
    request: EngineRequest, plain: Callable[..., Any], lm: LanguageModel, keys: tuple[str | None, str | None]
) -> list[int]:
    """Greedy tokens by two whole forward passes of plain peft a token."""
    assert request.contrast is not None
    combine = decoder(request.contrast.decoder, **request.contrast.params).combine
    prompts = [list(request.prompt_ids), list(request.contrast.prompt_ids or request.prompt_ids)]
    made: list[int] = []
    with torch.inference_mode():
        while len(made) < request.sampling.max_tokens:
            sides = [
                plain(key)(torch.tensor([prompt + made])).logits[:, -1]
                for key, prompt in zip(keys, prompts, strict=True)
            ]
            made.append(int(combine(sides[0], sides[1]).argmax()))
            if made[-1] in lm.stop_ids:
                break
    return made


@pytest.mark.parametrize("max_batch", [2, 5, 16])
def test_replies_equal_two_plain_passes_a_token(
    lm: LanguageModel,
    engine: TorchEngine,
    ask: Ask,
    plain: Callable[..., Any],
    folders: Any,
    replies: Replies,
    max_batch: int,
) -> None:
    """Both contrasts among plain requests, with prompts of unlike lengths."""
    crowd = TorchEngine(lm, max_batch=max_batch)
    for key, folder in folders.items():
        crowd.add_expert(key, folder)
    bare = tuple(lm.tokenizer(QUESTION)["input_ids"])
    cases: list[tuple[EngineRequest, tuple[str | None, str | None]]] = []
    for number, key in enumerate("abcd"):
        strong = ask(f"s{key}", QUESTION, ((key, 1.0),), max_tokens=4 + number)
        weak = None if number % 2 else "a" if key != "a" else "b"
        experts = ((weak, 1.0),) if weak else ()
        cases.append((replace(strong, contrast=Contrast("self-contrast", {"beta": 2.0}, experts=experts)), (key, weak)))
        context = ask(f"c{key}", CONTEXT, ((key, 1.0),), max_tokens=4 + number)
        contrast = Contrast("context-contrast", {"floor": 0.8}, prompt_ids=bare)
        cases.append((replace(context, contrast=contrast), (key, key)))
    plains = [ask(f"p{key}", QUESTION, ((key, 1.0),), max_tokens=5) for key in "abcd"]
    requests = [request for request, _ in cases]
    found = replies([r for pair in zip(requests[:4], plains, strict=True) for r in pair] + requests[4:], crowd)
    for request, keys in cases:
        ids = plain_reply(request, plain, lm, keys)
        text = lm.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert found[request.id] == text.rstrip("\ufffd")
    alone = replies(plains, engine)
    assert {key: found[key] for key in alone} == alone
    assert len({found["sa"], found["pa"], found["ca"]}) > 1


def test_both_lanes_leave_together(engine: TorchEngine, ask: Ask) -> None:
    contrasted = replace(ask("c", QUESTION, (("a", 1.0),), max_tokens=50), contrast=Contrast("self-contrast", {}, ()))
    session = engine.session()
    session.submit(contrasted)
    session.submit(ask("p", QUESTION, max_tokens=50, stop=("never",)))
    session.step()
    assert len(session._batch.lanes) == 3
    session.cancel("c")
    session.step()
    assert [lane.of.id for lane in session._batch.lanes] == ["p"]


def test_a_contrast_waits_for_two_places_and_is_not_overtaken_for_ever(lm: LanguageModel, ask: Ask) -> None:
    engine = TorchEngine(lm, max_batch=3)
    session = engine.session()
    for number in range(2):
        session.submit(ask(f"first{number}", "x", max_tokens=3, stop=("never",)))
    session.step()
    contrast = Contrast("context-contrast", {}, prompt_ids=(5, 6))
    session.submit(replace(ask("c", "one two three four", max_tokens=2), contrast=contrast))
    for number in range(8):
        session.submit(ask(f"late{number}", "x", max_tokens=3))
    order = []
    while not session.idle:
        order += [piece.request_id for piece in session.step() if piece.finished]
    assert order.index("c") < order.index("late1")


@pytest.mark.parametrize(
    ("contrast", "error", "message"),
    [
        (Contrast("selfcontrast", {}, ()), NotFound, r"unknown decoder 'selfcontrast'\. Did you mean 'self-contrast'"),
        (Contrast("self-contrast"), BadInput, "request q: decoder self-contrast needs the experts to contrast with"),
        (Contrast("context-contrast"), BadInput, "needs the prompt to contrast with"),
        (Contrast("context-contrast", {}, prompt_ids=()), BadInput, "request q: the prompt is empty"),
        (Contrast("self-contrast", {"alpha": 0}, ()), BadInput, "alpha is 0"),
        (Contrast("self-contrast", {"gamma": 1}, ()), BadInput, "gamma"),
        (Contrast("self-contrast", {}, (("z", 1.0),)), NotFound, "unknown expert 'z'"),
    ],
)
def test_contrasts_that_are_refused(
    engine: TorchEngine, ask: Ask, contrast: Contrast, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        list(engine.generate([replace(ask("q", QUESTION), contrast=contrast)]))


def test_no_room_for_two_lanes(lm: LanguageModel, ask: Ask) -> None:
    with pytest.raises(BadInput, match="a contrast takes 2 rows of the batch, which has 1"):
        list(
            TorchEngine(lm, max_batch=1).generate([replace(ask("q", "x"), contrast=Contrast("self-contrast", {}, ()))])
        )


def test_a_contrast_has_no_scores(engine: TorchEngine, ask: Ask) -> None:
    with pytest.raises(BadInput, match="request q: a contrast cannot be scored"):
        engine.continuation_logprobs([replace(ask("q", "x"), contrast=Contrast("self-contrast", {}, ()))], [(1,)])
