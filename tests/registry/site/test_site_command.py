"""`xpert registry site`, as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from xpert.registry.card import ExpertCard
from xpert.registry.signing.keys import SigningKey
from xpert.registry.signing.signatures import fingerprint
from xpert.registry.site.data import gather, sound_card
from xpert.registry.site.pages import Site
from xpert.registry.store import Registry

Run = Callable[..., Result]
Maker = Callable[..., Path]


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def store(xpert: Run, expert: Maker, tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    for seed, skill in enumerate(("sums", "dates")):
        made = expert(skill, seed=seed, skills=(skill,), scores={skill: 0.75}, description=f"does {skill}")
        assert xpert("registry", "publish", made, "--name", f"acme/{skill}", "--registry", folder).exit_code == 0
    mixture = {
        "kind": "mixture",
        "schema": 1,
        "base": {"ref": "tiny", "fingerprint": "tiny-fingerprint"},
        "experts": [{"key": "s", "ref": "acme/sums@1", "fingerprint": "", "weight": 2.0}],
        "router": "fixed",
    }
    (tmp_path / "mixture.json").write_text(json.dumps(mixture))
    done = xpert("registry", "publish", tmp_path / "mixture.json", "--name", "acme/all", "--registry", folder)
    assert done.exit_code == 0, done.stderr
    return folder


def test_a_site_is_written_and_written_again(xpert: Run, store: Path, tmp_path: Path) -> None:
    out = tmp_path / "site"
    done = xpert("registry", "site", "-o", out, "--registry", store, "--title", "Ours", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    first = tree(out)
    assert told["names"] == 3 and told["files"] == len(first) and told["problems"] == []
    assert "Ours" in first["index.html"].decode() and "acme/all@1" in first["names/acme/sums.html"].decode()
    assert str(tmp_path) not in "".join(content.decode() for content in first.values())
    again = xpert("registry", "site", "-o", out, "--registry", store, "--title", "Ours")
    assert again.exit_code == 0 and again.stdout.startswith(f"{out / 'index.html'}: 3 names") and tree(out) == first
    assert xpert("registry", "remove", "acme/dates", "--registry", store).exit_code == 0
    assert xpert("registry", "site", "-o", out, "--registry", store).exit_code == 0
    assert "names/acme/dates.html" not in tree(out)


def test_a_damaged_card_is_told_and_shown(xpert: Run, store: Path, tmp_path: Path) -> None:
    card = next(file for file in Registry(store).show("acme/sums").files if file.path == "expert.json")
    blob = store / "blobs" / card.sha256[:2] / card.sha256[2:]
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-3])
    done = xpert("registry", "site", "-o", tmp_path / "site", "--registry", store)
    assert done.exit_code == 0 and "acme/sums@1 is shown without its card" in done.stderr
    assert "cannot be shown whole" in (tmp_path / "site/index.html").read_text()
    assert "cannot be shown whole" in (tmp_path / "site/names/acme/sums.html").read_text()


def test_tags_and_signers_are_shown(store: Path, tmp_path: Path) -> None:
    registry, key = Registry(store), SigningKey.generate(tmp_path / "key", comment="ann")
    registry.tag("acme/sums@1", "stable")
    registry.sign("acme/sums@1", key)
    sums = next(name for name in gather(registry).names if name.name == "acme/sums")
    assert sums.latest.tags == ("latest", "stable") and sums.latest.signers == (fingerprint(key.public.key),)
    assert fingerprint(key.public.key) in (Site(gather(registry)).render("names/acme/sums.html") or b"").decode()


@pytest.mark.parametrize("change", [{"low": "0"}, {"n": None}, {"high": float("nan")}])
def test_a_card_of_odd_numbers_is_not_drawn(change: dict[str, object], expert: Maker) -> None:
    card = json.loads((expert(scores={"sums": 0.5}) / "expert.json").read_text())
    assert sound_card(ExpertCard.from_dict(card, where="here"))
    card["profile"]["skills"]["sums"]["expert"] |= change
    with pytest.raises(ValueError, match="'sums' are not numbers"):
        sound_card(ExpertCard.from_dict(card, where="here"))


MISTAKES = {
    "no place": ([], "--out"),
    "a folder of other things": (["-o", "{tmp}/taken"], "exists already"),
    "a file": (["-o", "{tmp}/taken/x.txt"], "exists already"),
    "a site with a stranger in it": (["-o", "{tmp}/old"], "'mine.txt', which would be lost"),
    "no registry": (["-o", "{tmp}/s", "--registry", "{tmp}/none"], "there is no registry"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, xpert: Run, store: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/x.txt").write_text("x")
    xpert("registry", "site", "-o", tmp_path / "old", "--registry", store)
    (tmp_path / "old/mine.txt").write_text("mine")
    arguments, said = MISTAKES[mistake]
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    result = xpert("registry", "site", *([] if "--registry" in given else ["--registry", store]), *given)
    assert result.exit_code == 2 and said in result.stderr, result.stderr
    assert (tmp_path / "taken/x.txt").read_text() == "x" and (tmp_path / "old/mine.txt").read_text() == "mine"
