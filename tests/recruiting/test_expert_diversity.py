"""The cosine of what experts add: against the updates formed in full, and in the cases at its borders."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xpert.errors import BadInput
from xpert.experts.adapters import Adapter, LowRank, read_adapter
from xpert.experts.recruiting.diversity import cosines
from xpert.language_model import load_model

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def adapter(key: str, modules: Factors) -> Adapter:
    return Adapter(key, key, {name: LowRank(a, b) for name, (a, b) in modules.items()})


def drawn(key: str, ranks: dict[str, int], seed: int, *, inputs: int = 12, outputs: int = 9) -> Adapter:
    r = torch.Generator().manual_seed(seed)
    return adapter(
        key,
        {
            name: (torch.randn(rank, inputs, generator=r), torch.randn(outputs, rank, generator=r))
            for name, rank in ranks.items()
        },
    )


def plain_products(one: Adapter, other: Adapter) -> float:
    """B A formed, flattened, cosine; averaged over the modules of either."""
    found = []
    for name in sorted({*one.modules, *other.modules}):
        deltas = [(a.modules[name].b @ a.modules[name].a).flatten() for a in (one, other) if name in a.modules]
        if any(delta.norm() > 0 for delta in deltas):
            there = len(deltas) == 2 and all(delta.norm() > 0 for delta in deltas)
            found.append(float(torch.nn.functional.cosine_similarity(*deltas, dim=0)) if there else 0.0)
    return sum(found) / len(found) if found else 1.0


def plain_whole(one: Adapter, other: Adapter) -> float:
    names = sorted({*one.modules, *other.modules})

    def flat(a: Adapter) -> torch.Tensor:
        return torch.cat(
            [(a.modules[n].b @ a.modules[n].a).flatten() if n in a.modules else torch.zeros(9 * 12) for n in names]
        )

    return float(torch.nn.functional.cosine_similarity(flat(one), flat(other), dim=0))


def plain_factors(one: Adapter, other: Adapter) -> float:
    found = []
    for name in sorted({*one.modules, *other.modules}):
        for side in "ab":
            both = [getattr(a.modules[name], side).flatten() for a in (one, other) if name in a.modules]
            found.append(float(torch.nn.functional.cosine_similarity(*both, dim=0)) if len(both) == 2 else 0.0)
    return sum(found) / len(found)


RANKS = st.dictionaries(st.sampled_from("pqr"), st.integers(1, 4), min_size=1)


@settings(max_examples=40, deadline=None)
@given(st.lists(RANKS, min_size=1, max_size=4), st.integers(0, 2**20))
def test_products_are_those_of_the_formed_updates(ranks: list[dict[str, int]], seed: int) -> None:
    adapters = [drawn(str(index), one, seed + index) for index, one in enumerate(ranks)]
    for form, plain in (("products", plain_products), ("whole", plain_whole)):
        found = cosines(adapters, form)
        assert (np.diag(found) == 1).all() and np.allclose(found, found.T)
        for i, j in itertools.combinations(range(len(adapters)), 2):
            assert found[i, j] == pytest.approx(plain(adapters[i], adapters[j]), abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sets(st.sampled_from("pqr"), min_size=1), min_size=2, max_size=4), st.integers(0, 2**20))
def test_factors_are_the_papers(names: list[set[str]], seed: int) -> None:
    adapters = [drawn(str(i), dict.fromkeys(sorted(one), 3), seed + i) for i, one in enumerate(names)]
    found = cosines(adapters, "factors")
    for i, j in itertools.combinations(range(len(adapters)), 2):
        assert found[i, j] == pytest.approx(plain_factors(adapters[i], adapters[j]), abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 4))
def test_the_same_update_in_another_form_is_the_same(seed: int, rank: int) -> None:
    """M A and B M^-1 add what A and B add: the products see no difference, the raw factors do."""
    one = drawn("one", {"p": rank}, seed)
    turned = torch.linalg.qr(torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed)))[0] * -2.0
    part = one.modules["p"]
    other = adapter("other", {"p": (turned @ part.a, part.b @ torch.linalg.inv(turned))})
    assert cosines([one, other])[0, 1] == pytest.approx(1, abs=1e-5)
    if rank == 1:
        assert abs(cosines([one, other], "factors")[0, 1]) == pytest.approx(1, abs=1e-5)


def test_raw_factors_depend_on_the_form() -> None:
    one = drawn("one", {"p": 2}, 0)
    flipped = adapter("flipped", {"p": (one.modules["p"].a.flip(0), one.modules["p"].b.flip(1))})
    assert cosines([one, flipped])[0, 1] == pytest.approx(1, abs=1e-5)
    assert cosines([one, flipped], "factors")[0, 1] < 0.9


def test_borders() -> None:
    eye = torch.eye(12)
    right, up = torch.eye(9)[:, :1], torch.eye(9)[:, 1:2]
    along = adapter("along", {"p": (eye[:1], right)})
    across = adapter("across", {"p": (eye[1:2], right)})
    against = adapter("against", {"p": (3 * eye[:1], -right)})
    turned = adapter("turned", {"p": (eye[:1], up)})
    elsewhere = adapter("elsewhere", {"q": (eye[:1], right)})
    nothing = adapter("nothing", {"p": (eye[:1], torch.zeros(9, 1))})
    for form in ("products", "whole"):
        found = cosines([along, along, across, against, turned, elsewhere, nothing, nothing], form)
        assert found[0].tolist() == [1, 1, 0, -1, 0, 0, 0, 0]
        assert found[6, 7] == 1, "two that change nothing are alike"
    assert cosines([along]).tolist() == [[1]]


def test_each_module_weighs_the_same_unless_the_whole_is_asked_for() -> None:
    eye, column = torch.eye(12), torch.eye(9)[:, :1]
    one = adapter("one", {"p": (eye[:1], 10 * column), "q": (eye[:1], column)})
    other = adapter("other", {"p": (eye[:1], 10 * column), "q": (eye[1:2], column)})
    assert cosines([one, other])[0, 1] == pytest.approx(0.5)
    assert cosines([one, other], "whole")[0, 1] == pytest.approx(100 / 101)


def test_factors_of_unequal_ranks_are_refused() -> None:
    with pytest.raises(BadInput, match=r"'one' \(rank 2\) and 'other' \(rank 3\) at p have no cosine.*products"):
        cosines([drawn("one", {"p": 2}, 0), drawn("other", {"p": 3}, 1)], "factors")


def test_scales_of_adapters_count(tiny_base: Path, make_adapter: Callable[..., Path]) -> None:
    """rsLoRA, unequal ranks and few modules, as read from their folders and as peft forms them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lm = load_model(str(tiny_base), device="cpu")
    folders = [
        make_adapter(seed=1, r=4, alpha_pattern={"layers.0.self_attn.q_proj": 64}),
        make_adapter(seed=2, r=2, use_rslora=True, target_modules=["q_proj", "v_proj"]),
        make_adapter(seed=3, r=6, target_modules=["q_proj", "up_proj"]),
    ]
    deltas = []
    for folder in folders:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), folder)
        deltas.append(
            {n: m.get_delta_weight("default").flatten() for n, m in model.named_modules() if hasattr(m, "lora_A")}
        )
    found = cosines([read_adapter(str(i), folder, lm) for i, folder in enumerate(folders)], "whole")
    for i, j in itertools.combinations(range(3), 2):
        shared = deltas[i].keys() & deltas[j].keys()
        inner = sum(float(deltas[i][name] @ deltas[j][name]) for name in shared)
        norms = [math.sqrt(sum(float(delta @ delta) for delta in deltas[k].values())) for k in (i, j)]
        assert found[i, j] == pytest.approx(inner / (norms[0] * norms[1]), abs=1e-5)
