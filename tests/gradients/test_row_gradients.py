"""Gradients of a whole batch equal a loop of single-example backward passes through a real peft model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xpert.data import pool_from_rows
from xpert.errors import BadInput
from xpert.features import Features
from xpert.gradients import ExactScores, GradientNorms, GradientOptions, GradientPass
from xpert.language_model import load_model
from xpert.linear_capture import encode_rows, linear_layers, make_batch, row_losses
from xpert.lora_gradients import (
    AdamForm,
    Factors,
    LayerStream,
    merged,
    place_factors,
    row_examples,
    stream_gradients,
    weight_norms,
)
from xpert.lora_training import AdapterState, Checkpoint
from xpert.records import Message, Row

SHAPES = [
    {"rank": 4, "alpha": 8, "rslora": False, "layers": ("attention",)},
    {"rank": 3, "alpha": 12, "rslora": True, "layers": ("all",)},
    {"rank": 8, "alpha": 16, "rslora": False, "layers": ("q_proj", "down_proj")},
]


def random_state(base: Path, *, rank: int, alpha: int, rslora: bool, layers: tuple[str, ...], seed: int = 0) -> Any:
    """An adapter as after some training: nothing of it is zero; moments of a plausible size."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for name, layer in linear_layers(load_model(str(base), device="cpu").model, layers).items():
        weights[f"{name}.lora_A"] = torch.randn(rank, layer.in_features, generator=generator) * 0.1
        weights[f"{name}.lora_B"] = torch.randn(layer.out_features, rank, generator=generator) * 0.1
    first = {name: torch.randn(value.shape, generator=generator) * 1e-2 for name, value in weights.items()}
    second = {name: torch.rand(value.shape, generator=generator) * 1e-4 for name, value in weights.items()}
    return AdapterState(weights, rank, alpha, rslora, first, second, 1e-4, 10)


def loop(base: Path, folder: Path, rows: list[Row], max_length: int = 512) -> dict[str, list[torch.Tensor]]:
    """Batch-1 backward passes through peft: parameter name -> a gradient per row."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokenizer = load_model(str(base), device="cpu").tokenizer
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder, is_trainable=True).eval()
    parameters = {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    found: dict[str, list[torch.Tensor]] = {name: [] for name in parameters}
    for ids, start in encode_rows(tokenizer, rows, max_length):
        model.zero_grad()
        logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
        torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:])).backward()
        for name, parameter in parameters.items():
            found[name].append(parameter.grad.clone())
    return found


@pytest.fixture
def uneven(rows: list[Row]) -> list[Row]:
    """Rows of different lengths, so that batches are padded."""
    longer = [
        Row(f"long{n}", (Message("user", "tell me more " * (3 * n)),), "and so on " * (7 - n)) for n in range(1, 6)
    ]
    return [*rows[:5], *longer]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_equals_a_loop_of_single_examples(
    shape: dict[str, Any], uneven: list[Row], tiny_base: Path, tmp_path: Path
) -> None:
    state = random_state(tiny_base, **shape)
    state.save(tmp_path)
    expected = loop(tiny_base, tmp_path, uneven)
    lm = load_model(str(tiny_base), device="cpu")
    layers, factors = linear_layers(lm.model, "all"), place_factors(lm.model, state, lm.device)
    before = {name: layer.weight for name, layer in layers.items()}
    contents = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    batch = make_batch(encode_rows(lm.tokenizer, uneven, 512), lm.device)
    assert int(batch.attention_mask.sum(1).min()) < batch.input_ids.shape[1]
    found: dict[str, torch.Tensor] = {}
    with merged(layers, factors):
        stream_gradients(lm, batch, layers, factors, found.__setitem__)
    assert set(found) == set(expected)
    for name, gradients in expected.items():
        whole = torch.stack(gradients).flatten(1)
        assert float((found[name] - whole).norm() / whole.norm()) < 1e-4, name
        torch.testing.assert_close(found[name], whole, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
    for name, layer in layers.items():
        assert layer.weight is before[name]
        assert torch.equal(layer.weight, contents[name])


def test_the_weights_come_back_after_an_exception(tiny_base: Path) -> None:
    lm = load_model(str(tiny_base), device="cpu")
    state = random_state(tiny_base, **SHAPES[1])
    layers, factors = linear_layers(lm.model, "all"), place_factors(lm.model, state, lm.device)
    contents = {name: value.clone() for name, value in lm.model.state_dict().items()}
    with pytest.raises(RuntimeError, match="stop"), merged(layers, factors):
        name = next(iter(layers))
        assert not torch.equal(layers[name].weight, contents[f"{name}.weight"])
        raise RuntimeError("stop")
    after = lm.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in contents.items())
    assert all(parameter.requires_grad for parameter in lm.model.parameters())


def test_layers_that_mix_rows_are_refused() -> None:
    layer = torch.nn.Linear(4, 4)
    with pytest.raises(BadInput, match="layer expert does not read rows apart"), LayerStream({"expert": layer}, print):
        layer(torch.zeros(6, 4))


def test_adam_form_of_two_numbers_by_hand() -> None:
    """g = 2: m' = .9 * .5 + .1 * 2 = .65, v' = .999 * .04 + .001 * 4 = .04396, .65 / sqrt(.04396 + 1e-8) = 3.10016.

    g = 0 with no history: m' = 0. g = -1e-3 with no history: -1e-4 / sqrt(1e-9 + 1e-8), where eps inside the root
    tells: outside it would be -3.16.
    """
    state = AdapterState(
        {"p": torch.zeros(3)},
        rank=1,
        alpha=1,
        first={"p": torch.tensor([0.5, 0.0, 0.0])},
        second={"p": torch.tensor([0.04, 0.0, 0.0])},
    )
    found = AdamForm(state, torch.device("cpu"))("p", torch.tensor([[2.0, 0.0, -1e-3]]))
    assert found[0].tolist() == pytest.approx([3.100156, 0.0, -0.953463], rel=1e-5)


def test_moments_are_found_by_name(tiny_base: Path) -> None:
    state = random_state(tiny_base, **SHAPES[0])
    turned = AdapterState(
        state.weights, 4, 8, False, dict(reversed(state.first.items())), dict(reversed(state.second.items()))
    )
    gradient = {name: torch.ones(2, value.numel()) for name, value in state.weights.items()}
    for name, value in gradient.items():
        assert torch.equal(
            AdamForm(state, torch.device("cpu"))(name, value), AdamForm(turned, torch.device("cpu"))(name, value)
        )
    with pytest.raises(ValueError, match="no moments for"):
        AdamForm(AdapterState(state.weights, 4, 8), torch.device("cpu"))


@pytest.fixture
def checkpoint(tiny_base: Path, tmp_path: Path) -> Callable[..., Checkpoint]:
    def make(number: int = 0, **changes: Any) -> Checkpoint:
        state: AdapterState = random_state(tiny_base, **(SHAPES[0] | changes), seed=number)
        return state.save(tmp_path / f"adapter-{number}")

    return make


def exact(base: Path, checkpoint: Checkpoint, rows: list[Row], form: str, max_length: int = 512) -> np.ndarray:
    """Whole gradients [m, P] by the loop, in Adam's form where wanted."""
    each = loop(base, checkpoint.folder, rows, max_length)
    state = checkpoint.load()
    parts = []
    for name in sorted(each):
        gradient = torch.stack(each[name]).flatten(1).double()
        if form == "adam":
            first = 0.9 * state.first[name].double().flatten() + 0.1 * gradient
            second = 0.999 * state.second[name].double().flatten() + 0.001 * gradient**2
            gradient = first / (second + 1e-8).sqrt()
        parts.append(gradient)
    return torch.cat(parts, 1).numpy()


@pytest.mark.parametrize("form", ["plain", "adam"])
def test_sketched_cosines_and_norms_follow_the_exact_ones(
    form: str, uneven: list[Row], tiny_base: Path, checkpoint: Callable[..., Checkpoint]
) -> None:
    one = checkpoint(layers=("all",), rank=16, alpha=16)
    whole = exact(tiny_base, one, uneven, form)
    assert whole.shape[1] > 3 * 8192
    found = GradientPass(str(tiny_base), (one,), GradientOptions(8192), form).open("cpu")(uneven)
    np.testing.assert_allclose(found["norm"][:, 0], np.linalg.norm(whole, axis=1), rtol=1e-4)
    kept = found["gradient"][:, 0].astype(np.float32)
    np.testing.assert_allclose(np.linalg.norm(kept, axis=1), 1, atol=1e-3)
    unit = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    upper = np.triu_indices(len(uneven), 1)
    assert np.corrcoef((kept @ kept.T)[upper], (unit @ unit.T)[upper])[0, 1] >= 0.99


@pytest.mark.parametrize("form", ["plain", "adam"])
def test_exact_scores_are_the_mean_cosines_by_group(
    form: str, uneven: list[Row], tiny_base: Path, checkpoint: Callable[..., Checkpoint]
) -> None:
    both = (checkpoint(0), checkpoint(1))
    targets, groups = (uneven[8], uneven[1], uneven[9]), (0, 1, 0)
    found = ExactScores(str(tiny_base), both, targets, groups, form).open("cpu")(uneven)["scores"]
    assert found.shape == (10, 2, 2)
    for number, one in enumerate(both):
        rows, anchors = exact(tiny_base, one, uneven, form), exact(tiny_base, one, list(targets), "plain")
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        anchors /= np.linalg.norm(anchors, axis=1, keepdims=True)
        means = np.stack([anchors[[0, 2]].mean(axis=0), anchors[1]])
        np.testing.assert_allclose(found[:, number], rows @ means.T, atol=1e-4)


def test_batches_make_no_difference(
    uneven: list[Row], tiny_base: Path, checkpoint: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = GradientPass(str(tiny_base), (checkpoint(),), GradientOptions(1024), "adam")
    together = one.open("cpu")(uneven)
    monkeypatch.setitem(__import__("xpert.gradients").gradients._BATCH_TOKENS, "cpu", 1)
    alone = one.open("cpu")(uneven)
    np.testing.assert_allclose(together["gradient"].astype(float), alone["gradient"].astype(float), atol=2e-4)
    np.testing.assert_allclose(together["norm"], alone["norm"], rtol=1e-4)


def test_a_stopped_pass_goes_on_to_the_same_bits(
    rows: list[Row], tiny_base: Path, checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    one = GradientPass(str(tiny_base), (checkpoint(),), GradientOptions(512))
    pool, everything = pool_from_rows(rows[:150]), np.arange(150)
    in_one_go = Features(pool, cache=None, device="cpu").compute(one, everything)
    Features(pool, cache=tmp_path / "cache", device="cpu").compute(one, everything[:64])  # stopped after one shard
    features = Features(pool, cache=tmp_path / "cache", device="cpu")
    assert features.computed(one) == 64
    resumed = features.compute(one, everything)
    for name, values in in_one_go.items():
        assert resumed[name].tobytes() == values.tobytes(), name


def test_long_rows_are_cut_by_rule_and_said(
    rows: list[Row], tiny_base: Path, checkpoint: Callable[..., Checkpoint]
) -> None:
    cut = Row("cut", (Message("user", "one"),), "two three " * 60)
    no_room = Row("no-room", (Message("user", "one two three " * 60),), "four")
    one = checkpoint()
    given = [rows[0], cut, no_room]
    found = GradientPass(str(tiny_base), (one,), GradientOptions(256, max_length=64)).open("cpu")(given)
    assert found["cut"].tolist() == [False, True, True]
    assert np.isnan(found["norm"][:, 0]).tolist() == [False, False, True]
    assert np.isnan(found["gradient"]).all(axis=(1, 2)).tolist() == [False, False, True]
    short = np.linalg.norm(exact(tiny_base, one, [cut], "plain", 64), axis=1)
    assert found["norm"][1, 0] == pytest.approx(short[0], rel=1e-4)
    scores = ExactScores(str(tiny_base), (one,), (rows[3],), (0,), max_length=64).open("cpu")(given)["scores"]
    assert np.isnan(scores[:, 0, 0]).tolist() == [False, False, True]
    with pytest.raises(BadInput, match="no target of group 1 has room for its answer in 64 tokens"):
        ExactScores(str(tiny_base), (one,), (no_room,), (0,), max_length=64).open("cpu")


@pytest.fixture
def broken_base(tiny_base: Path, tmp_path: Path) -> Path:
    lm = load_model(str(tiny_base), device="cpu")
    with torch.no_grad():
        lm.model.model.norm.weight.fill_(float("nan"))
    lm.model.save_pretrained(tmp_path / "broken")
    lm.tokenizer.save_pretrained(tmp_path / "broken")
    return tmp_path / "broken"


def test_a_loss_that_is_no_number_names_its_row(
    rows: list[Row], broken_base: Path, checkpoint: Callable[..., Checkpoint]
) -> None:
    with pytest.raises(BadInput, match=r"the loss is not a number \(rows r00000, r00001"):
        GradientPass(str(broken_base), (checkpoint(),)).open("cpu")(rows[:2])
    with pytest.raises(BadInput, match=r"the loss is not a number \(rows r00000"):
        GradientNorms(str(broken_base)).open("cpu")(rows[:1])


def test_an_adapter_of_another_base_is_refused(tiny_base: Path) -> None:
    state = random_state(tiny_base, **SHAPES[0])
    model = load_model(str(tiny_base), device="cpu").model
    foreign = AdapterState({name.replace("q_proj", "q_prj"): w for name, w in state.weights.items()}, 4, 8)
    with pytest.raises(BadInput, match=r"layer model\.layers\.0\.self_attn\.q_prj does not fit the base model"):
        place_factors(model, foreign, torch.device("cpu"))
    wider = AdapterState(
        {name: torch.zeros(w.shape[0], 80) if name.endswith("A") else w for name, w in state.weights.items()}, 4, 8
    )
    with pytest.raises(BadInput, match="does not fit the base model"):
        place_factors(model, wider, torch.device("cpu"))


@pytest.mark.parametrize("tokens", [1, 100_000])
def test_weight_norms_equal_the_norms_of_formed_gradients(tokens: int, uneven: list[Row], tiny_base: Path) -> None:
    """Both ways of taking them: rows of up to 150 tokens in layers 32 to 128 wide need now one, now the other."""
    lm = load_model(str(tiny_base), device="cpu")
    layers = linear_layers(lm.model, "all")
    found = np.zeros(len(uneven))
    for indices, batch in row_examples(lm, uneven, 512, tokens).batches():
        found[indices] = weight_norms(lm, layers, batch)[1].numpy()
    for index, example in enumerate(encode_rows(lm.tokenizer, uneven, 512)):
        lm.model.zero_grad()
        row_losses(lm.model, make_batch([example], lm.device)).sum().backward()
        squares = sum(float(layer.weight.grad.double().square().sum()) for layer in layers.values())
        assert found[index] == pytest.approx(squares**0.5, rel=1e-4)


def test_rounding_to_bfloat16_keeps_a_small_adapter() -> None:
    """Updates of a twentieth of the last bit would vanish if rounded to the nearest; on average they stay."""
    layer = torch.nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    a, b = torch.full((1, 256), 0.02), torch.full((256, 1), 0.02)
    with merged({"x": layer}, {"x": Factors(a, b, 1.0)}):
        assert float(layer.weight.float().mean()) == pytest.approx(1.0004, abs=5e-5)
        again = layer.weight.clone()
    with merged({"x": layer}, {"x": Factors(a, b, 1.0)}):
        assert torch.equal(layer.weight, again)
    assert (layer.weight == 1).all()
    with merged({"x": layer}, {"x": Factors(a * 0, b, 1.0)}):
        assert (layer.weight == 1).all()


def test_bfloat16_agrees_with_float32(
    uneven: list[Row], tiny_base: Path, checkpoint: Callable[..., Checkpoint]
) -> None:
    one = (checkpoint(),)
    exactly, roughly = (
        GradientPass(str(tiny_base), one, GradientOptions(8192, dtype=dtype)).open("cpu")(uneven)["gradient"][:, 0]
        for dtype in ("float32", "bfloat16")
    )
    cosines = (exactly.astype(np.float32) * roughly.astype(np.float32)).sum(axis=1)
    assert cosines.min() > 0.95


def test_what_the_key_tells_apart(tiny_base: Path, checkpoint: Callable[..., Checkpoint], rows: list[Row]) -> None:
    base, one, two = str(tiny_base), checkpoint(0), checkpoint(1)
    keys = [
        GradientPass(base, (one,)).key,
        GradientPass(base, (two,)).key,
        GradientPass(base, (one, two)).key,
        GradientPass(base, (one,), form="adam").key,
        GradientPass(base, (one,), GradientOptions(seed=1)).key,
        GradientPass(base, (one,), GradientOptions(sketch="countsketch")).key,
        ExactScores(base, (one,), tuple(rows[:2]), (0, 1)).key,
        ExactScores(base, (one,), tuple(rows[:2]), (0, 0)).key,
        ExactScores(base, (one,), tuple(rows[1:3]), (0, 1)).key,
    ]
    assert len({repr(key) for key in keys}) == len(keys)
