"""Losses of answers equal a plain loop over single rows; what one pass over a batch leaves behind is exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from xpert.answer_losses import AnswerLosses, UnpromptedLosses
from xpert.errors import BadInput
from xpert.language_model import encode_example, load_model
from xpert.records import Message, Row


def plain(lm: object, ids: tuple[int, ...], start: int) -> dict[str, float]:
    """Of one row, by the whole logits."""
    import torch

    with torch.no_grad():
        logits = lm.model(torch.tensor([ids])).logits[0, start - 1 : -1].double()
    targets = torch.tensor(ids[start:])
    p = logits.softmax(-1)
    true = p.gather(1, targets[:, None])[:, 0]
    onehot = torch.zeros_like(p).scatter(1, targets[:, None], 1)
    return {
        "nll": float(-true.log().mean()),
        "entropy": float(torch.distributions.Categorical(logits=logits).entropy().mean()),
        "el2n": float((p - onehot).norm(dim=1).mean()),
    }


def test_losses_equal_a_loop_over_single_rows(rows: list[Row], tiny_base: Path) -> None:
    lm = load_model(str(tiny_base), device="cpu")
    limit = sorted(len(encode_example(lm.tokenizer, row)[0]) for row in rows[:30])[25]
    found = AnswerLosses(str(tiny_base), max_length=limit).open("cpu")(rows[:30])
    for index, row in enumerate(rows[:30]):
        ids, start = encode_example(lm.tokenizer, row, limit)
        for name, value in plain(lm, ids, start).items():
            assert found[name][index] == pytest.approx(value, rel=1e-4), (row.id, name)
        assert found["tokens"][index] == len(ids) - start
        assert found["cut"][index] == (len(encode_example(lm.tokenizer, row)[0]) > limit)
    assert found["cut"].any()


def test_an_answer_alone_is_the_same_tokens_without_its_prompt(rows: list[Row], tiny_base: Path) -> None:
    lm = load_model(str(tiny_base), device="cpu")
    found = UnpromptedLosses(str(tiny_base), max_length=70).open("cpu")(rows[:10])
    prompted = AnswerLosses(str(tiny_base), max_length=70).open("cpu")(rows[:10])
    assert found["tokens"].tolist() == prompted["tokens"].tolist()
    prefix = tuple(lm.tokenizer("### Response:")["input_ids"])
    for index, row in enumerate(rows[:10]):
        ids, start = encode_example(lm.tokenizer, row, 70)
        assert found["nll"][index] == pytest.approx(plain(lm, (*prefix, *ids[start:]), len(prefix))["nll"], rel=1e-4)


def test_a_prompt_that_leaves_no_room_is_not_scored(rows: list[Row], tiny_base: Path) -> None:
    long = Row("long", (Message("user", "word " * 400),), "yes")
    found = AnswerLosses(str(tiny_base), max_length=64).open("cpu")([rows[0], long])
    assert np.isfinite(found["nll"]).tolist() == [True, False]
    assert found["tokens"].tolist()[1] == 0
    assert found["cut"].tolist() == [False, True]


def test_a_loss_that_is_no_number_names_its_row(rows: list[Row], tiny_base: Path, tmp_path: Path) -> None:
    import torch

    lm = load_model(str(tiny_base), device="cpu")
    with torch.no_grad():
        lm.model.model.norm.weight.fill_(float("nan"))
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=r"not a number \(rows r00000, r00001"):
        AnswerLosses(str(tmp_path)).open("cpu")(rows[:2])


def test_one_pass_over_a_batch_holds_every_row_s_own_gradient(rows: list[Row], tiny_base: Path) -> None:
    import torch

    from xpert.linear_capture import LinearCapture, encode_rows, gradient_flow, linear_layers, make_batch, row_losses

    lm = load_model(str(tiny_base), device="cpu")
    layers = linear_layers(lm.model, "all")
    examples = encode_rows(lm.tokenizer, rows[:5], 128)
    batch = make_batch(examples, lm.device)
    with LinearCapture(layers) as seen, gradient_flow(lm.model):
        row_losses(lm.model, batch).sum().backward()
    for index, example in enumerate(examples):
        lm.model.zero_grad()
        row_losses(lm.model, make_batch([example], lm.device)).sum().backward()
        for name, layer in layers.items():
            mine = seen.output_gradients[name][index].T @ seen.inputs[name][index]
            torch.testing.assert_close(mine, layer.weight.grad, rtol=1e-4, atol=1e-6)
    assert not any(layer._forward_hooks for layer in layers.values())
    assert all(parameter.requires_grad for parameter in lm.model.parameters())


def test_hooks_are_gone_after_an_exception(tiny_base: Path) -> None:
    from xpert.linear_capture import LinearCapture, gradient_flow, linear_layers

    lm = load_model(str(tiny_base), device="cpu")
    layers = linear_layers(lm.model, "attention")
    with pytest.raises(RuntimeError, match="stop"), LinearCapture(layers), gradient_flow(lm.model):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in lm.model.modules())
    assert all(parameter.requires_grad for parameter in lm.model.parameters())


def test_layers_are_named_and_those_that_are_not_there_refused(tiny_base: Path) -> None:
    from xpert.linear_capture import linear_layers

    model = load_model(str(tiny_base), device="cpu").model
    names = {kind: {name.rsplit(".", 1)[-1] for name in linear_layers(model, kind)} for kind in ("attention", "mlp")}
    assert names == {
        "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
        "mlp": {"gate_proj", "up_proj", "down_proj"},
    }
    assert not any("lm_head" in name for name in linear_layers(model, "all"))
    with pytest.raises(BadInput, match=r"unknown layer 'q_prj'\. Did you mean 'q_proj'"):
        linear_layers(model, ("q_prj",))
