from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Run = Callable[..., Result]
Maker = Callable[..., Path]


def test_the_whole_round(xpert: Run, expert: Maker, tmp_path: Path) -> None:
    store = f"file://{tmp_path}/a%20store"
    folder = expert(description="adds numbers", skills=("sums", "carry"), scores={"sums": 0.75})
    made = xpert("registry", "publish", folder, "--name", "acme/sums", "--registry", store, "--json")
    assert made.exit_code == 0, made.stderr
    assert json.loads(made.stdout)["ref"] == "acme/sums@1"
    again = xpert("registry", "publish", folder, "--name", "acme/sums", "--registry", store)
    assert again.stdout == "already published acme/sums@1\n" and "published already" in again.stderr
    listed = json.loads(xpert("registry", "list", "--registry", tmp_path / "a store", "--json").stdout)
    (entry,) = listed["entries"]
    assert (entry["name"], entry["versions"], entry["kind"], entry["base"]) == ("acme/sums", [1], "expert", "tiny")
    assert entry["skills"] == ["sums", "carry"] and entry["size"] > 0 and entry["created"].endswith("Z")
    assert "acme/sums" in xpert("registry", "list", "--registry", store).stdout
    shown = xpert("registry", "show", "acme/sums", "--registry", store).stdout
    assert "0.750 [0.700, 0.800]" in shown and "+0.650" in shown and "adapter_model.safetensors" in shown
    card = json.loads(xpert("registry", "show", "acme/sums@1", "--registry", store, "--json").stdout)["card"]
    assert card["description"] == "adds numbers"
    found = json.loads(xpert("registry", "search", "sum", "--min-score", "0.7", "--registry", store, "--json").stdout)
    assert [(hit["ref"], hit["skill"], hit["score"]) for hit in found["hits"]] == [("acme/sums@1", "sums", 0.75)]
    assert xpert("registry", "search", "poetry", "--registry", store).stdout == "nothing found\n"
    out = tmp_path / "out"
    assert xpert("registry", "pull", "acme/sums@latest", "-o", out, "--registry", store).stdout == f"{out}\n"
    assert xpert("registry", "pull", "acme/sums", "-o", out, "--registry", store).exit_code == 2
    assert xpert("registry", "verify", "--registry", store).exit_code == 0
    assert "acme/sums@1" in xpert("registry", "remove", "acme/sums@1", "--registry", store).stdout
    assert "would remove 6 files" in xpert("registry", "gc", "--dry-run", "--registry", store).stdout
    assert json.loads(xpert("registry", "gc", "--registry", store, "--json").stdout)["files"] == 6


def test_a_search_that_cannot_find_says_why(xpert: Run, expert: Maker) -> None:
    xpert("registry", "publish", expert(), "--name", "acme/sums")
    assert xpert("registry", "search", "--base", "tiny").stdout.count("acme/sums@1") == 1
    assert xpert("registry", "search", "poetry", "--base", "tiny").stdout == "nothing found\n"
    of_no_base = xpert("registry", "search", "--base", "tinny").stdout
    assert of_no_base == "nothing found: no expert is of the base 'tinny'. There are those of tiny (tiny-fingerp)\n"
    none = xpert("registry", "search", "--min-score", "nan")
    assert none.exit_code == 2 and "min-score is not a number" in none.stderr
    hundredths = xpert("registry", "search", "--min-score", "50")
    assert hundredths.exit_code == 2 and "50.0 is not in the range 0<=x<=1" in hundredths.stderr


def test_verify_and_pull_tell_of_damage(xpert: Run, expert: Maker) -> None:
    xpert("registry", "publish", expert(), "--name", "acme/a")
    folder = Path(json.loads(xpert("registry", "list", "--json").stdout)["registry"])
    blob = max((folder / "blobs").glob("??/*"), key=lambda p: p.stat().st_size)
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    result = xpert("registry", "verify", "--json")
    assert result.exit_code == 2 and "1 problem" in result.stderr
    told = json.loads(result.stdout)
    assert told["sound"] is False and len(told["problems"]) == 1 and "damaged" in told["problems"][0]["what"]
    assert xpert("registry", "pull", "acme/a").exit_code == 2


MISTAKES: dict[str, tuple[list[str], int, str]] = {
    "no such folder": (["publish", "nowhere", "--name", "a/b"], 2, "no such expert folder"),
    "no name": (["publish", "{expert}"], 2, "--name"),
    "bad name": (["publish", "{expert}", "--name", "justone"], 2, "OWNER/NAME"),
    "no mixture": (["publish", "{expert}/adapter_config.json", "--name", "a/b"], 2, "not a mixture"),
    "misspelt name": (["show", "acme/sms"], 2, "Did you mean 'acme/sums'?"),
    "no such version": (["pull", "acme/sums@7"], 2, "no version 7"),
    "odd version": (["pull", "acme/sums@V1"], 2, "not a version"),
    "no such tag": (["pull", "acme/sums@stable"], 2, "no tag 'stable'. It has latest (1)"),
    "no tag": (["tag", "acme/sums", "3"], 2, "is not a tag"),
    "a tag of nothing": (["tag", "acme/sums@7", "stable"], 2, "has no version 7"),
    "no tag to take away": (["untag", "acme/sums", "stable"], 2, "has no tag 'stable'"),
    "latest is what no-latest is not": (
        ["publish", "{expert}", "--name", "a/b", "--tag", "latest", "--no-latest"],
        2,
        "--tag latest",
    ),
    "unknown place": (["list", "--registry", "gopher://x/y"], 2, "no registries are known"),
    "half an address of the Hub": (["list", "--registry", "hf:lab"], 2, "Write hf://lab, or ./hf:lab for a folder"),
    "half an address": (["publish", "{expert}", "--name", "a/b", "--registry", "s3:/x/y"], 2, "Write s3://x/y"),
    "no registry": (["list", "--registry", "{expert}/none"], 2, "there is no registry"),
    "other folder": (["list", "--registry", "{expert}"], 2, "not a registry folder"),
    "misspelt command": (["publsh"], 2, "publish"),
    "misspelt option": (["list", "--registri", "x"], 2, "--registry"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, xpert: Run, expert: Maker) -> None:
    folder = expert()
    assert xpert("registry", "publish", folder, "--name", "acme/sums").exit_code == 0
    arguments, status, said = MISTAKES[mistake]
    result = xpert("registry", *(argument.format(expert=folder) for argument in arguments))
    assert result.exit_code == status and said in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stdout == ""


def test_an_absent_default_registry_is_empty(xpert: Run) -> None:
    assert xpert("registry", "list").stdout.startswith("nothing is published")
    assert xpert("registry", "verify").stdout == "all is sound\n"


def test_nothing_heavy_is_imported(expert: Maker, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom xpert.registry.store import Registry\nimport xpert.commands.registry\n"
        f"r = Registry({str(tmp_path / 'registry')!r}); r.publish({str(expert())!r}, 'acme/a'); r.list(); r.verify()\n"
        "r.pull('acme/a'); print(sorted({'torch', 'numpy', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
