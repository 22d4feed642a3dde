"""What many tests need: a tiny model and tokenizer made on the spot, adapters for it, and rows of a few skills."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch is imported: idle OpenMP threads that spin make small steps crawl when the cores are busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from click.testing import CliRunner, Result

from xpert.records import Message, Row

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SKILLS: dict[str, tuple[str, Callable[[random.Random], tuple[str, str]]]] = {
    "arithmetic": (
        "Add the two numbers.",
        lambda r: (lambda a, b: (f"{a} + {b}", str(a + b)))(r.randint(1, 99), r.randint(1, 99)),
    ),
    "casing": ("Write the word in capitals.", lambda r: (lambda w: (w, w.upper()))(_word(r))),
    "reversal": ("Spell the word backwards.", lambda r: (lambda w: (w, w[::-1]))(_word(r))),
    "colour": (
        "Name the colour of the thing.",
        lambda r: r.choice([("grass", "green"), ("snow", "white"), ("coal", "black"), ("blood", "red")]),
    ),
    "city": (
        "Which country is the city in?",
        lambda r: r.choice([("Paris", "France"), ("Rome", "Italy"), ("Oslo", "Norway"), ("Cairo", "Egypt")]),
    ),
}


def _word(r: random.Random) -> str:
    return "".join(r.choice("bcdfglmnprst") + r.choice("aeiou") for _ in range(r.randint(2, 4)))


def make_columns(count: int, *, seed: int = 0, skills: tuple[str, ...] = tuple(SKILLS)) -> list[dict[str, Any]]:
    """Alpaca-form rows, skills in turn; prompts are made unique by a short scene."""
    r = random.Random(seed)
    rows = []
    for index in range(count):
        skill = skills[index % len(skills)]
        instruction, make = SKILLS[skill]
        given, answer = make(r)
        rows.append(
            {
                "id": f"r{index:05d}",
                "instruction": instruction,
                "input": f"{given} (case {index} {_word(r)})",
                "output": answer,
                "skill": skill,
                "licence": "CC0-1.0" if index % 2 else "MIT",
            }
        )
    return rows


def to_row(columns: dict[str, Any]) -> Row:
    prompt = f"{columns['instruction']}\n\n{columns['input']}"
    return Row(columns["id"], (Message("user", prompt),), columns["output"], columns.get("skill"), columns)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache, registry or settings."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("XPERT_CACHE", str(home / "cache"))
    monkeypatch.setenv("XPERT_REGISTRY", str(home / "registry"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    for name in ("XPERT_TRUST", "XPERT_SIGNING_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def rows() -> list[Row]:
    """200 rows of five skills."""
    return [to_row(columns) for columns in make_columns(200)]


@pytest.fixture
def columns() -> Callable[..., list[dict[str, Any]]]:
    """`make_columns`: Alpaca-form rows of five skills."""
    return make_columns


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, rows: list[dict[str, Any]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def xpert() -> Callable[..., Result]:
    """Runs the command line in this process: `xpert("select", pool, "--budget", 5)`; stdout and stderr apart."""
    from xpert.commands.main import cli

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments])

    return run


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama (d=64, grouped-query attention) and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-base")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = [f"{c['instruction']} {c['input']} {c['output']}" for c in make_columns(300)]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.2,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a LoRA folder on `tiny_base`, A and B random and not zero: `make_adapter(seed=1, r=4, **LoraConfig)`."""

    def make(*, seed: int = 0, scale: float = 0.3, **settings: Any) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | settings
        folder = tmp_path_factory.mktemp(f"adapter-{seed}-")
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), LoraConfig(**settings))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=scale)
        model.save_pretrained(folder)
        return folder

    return make
