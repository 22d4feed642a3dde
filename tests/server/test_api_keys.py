"""API keys: their file, the check of a request's key, and the mistakes of who looks after them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from xpert.errors import BadInput, Corrupt, NotFound
from xpert.experts.server import api_keys
from xpert.experts.server.api_keys import ApiKeys, bearer
from xpert.experts.server.failures import Denied
from xpert.experts.server.key_file import KeyHolder, add_key, digest, read_keys, remove_key

Run = Callable[..., Result]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_key_that_was_made_is_known_and_no_other(file: Path) -> None:
    ada, key = add_key(file, "ada", requests_per_minute=5, models=("me/dates", "base"))
    bob, other = add_key(file, "bob")
    keys = ApiKeys.read(file)
    assert keys.check(key) == ada and keys.check(other) == bob
    assert ada.requests_per_minute == 5 and ada.tokens_per_minute is None
    assert ada.allows("base") and not ada.allows("me/sums") and bob.allows("me/sums")
    assert key.startswith("xp-") and len(key) == 3 + 43 and key != other
    for wrong in (None, "", "xp-", key[:-1], key + "x", key.upper(), ada.sha256, "ключ", "\udc80"):
        with pytest.raises(Denied) as refused:
            keys.check(wrong)
        assert refused.value.http_status == 401
        assert not wrong or wrong not in str(refused.value)


def test_the_file_holds_digests_and_only_its_owner_reads_it(file: Path) -> None:
    _, key = add_key(file, "ada", concurrent=2)
    assert key not in file.read_text() and key[3:] not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert json.loads(file.read_text())["keys"][0]["sha256"] == digest(key)
    assert set(json.loads(file.read_text())["keys"][0]) == {"name", "sha256", "created", "concurrent"}


def test_every_key_is_compared_with_whichever_fits(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [add_key(file, f"k{n}")[1] for n in range(4)]
    keys, compared = ApiKeys.read(file), []

    def count(left: str, right: str) -> bool:
        compared.append(left)
        return left == right

    monkeypatch.setattr(api_keys.hmac, "compare_digest", count)
    for key in (made[0], made[3]):
        compared.clear()
        keys.check(key)
        assert compared == [digest(key) for key in made]


def test_a_changed_file_counts_from_the_next_request_on(file: Path) -> None:
    _, first = add_key(file, "ada")
    keys = ApiKeys.read(file)
    _, second = add_key(file, "bob")
    assert keys.check(second).name == "bob"
    remove_key(file, "ada")
    with pytest.raises(Denied):
        keys.check(first)
    assert [holder.name for holder in keys.holders] == ["bob"]


@pytest.mark.parametrize("broken", ["{", '{"keys": 3}', '{"keys": [{"name": "ada"}]}', None])
def test_a_broken_file_leaves_the_keys_and_is_complained_of_once(
    broken: str | None, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, key = add_key(file, "ada")
    keys, whole = ApiKeys.read(file), file.read_text()
    if broken is None:
        file.unlink()
    else:
        file.write_text(broken)
    with caplog.at_level(logging.ERROR, "xpert.server"):
        for _ in range(3):
            assert keys.check(key).name == "ada"
    assert len(caplog.records) == 1 and str(file) in caplog.text
    file.write_text(whole.replace('"ada"', '"ada.l"'))
    assert keys.check(key).name == "ada.l"


def test_a_file_that_others_may_read_is_told_of(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_key(file, "ada")
    ApiKeys.read(file)
    assert "chmod" not in caplog.text
    file.chmod(0o644)
    ApiKeys.read(file)
    assert f"chmod 600 {file}" in caplog.text


def test_a_file_without_keys_lets_nobody_in(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.write_text('{"keys": []}')
    with pytest.raises(Denied):
        ApiKeys.read(file).check("xp-x")
    assert "every request will be refused" in caplog.text


def test_mode_link_and_neighbours_survive_a_change(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    add_key(real, "ada")
    real.chmod(0o640)
    link.symlink_to(real)
    add_key(link, "bob")
    assert link.is_symlink() and real.stat().st_mode & 0o777 == 0o640
    assert [holder.name for holder in read_keys(real)] == ["ada", "bob"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".real.json.lock", "link.json", "real.json"]


def _add_some(file: Path, start: int) -> None:
    for number in range(start, start + 5):
        add_key(file, f"k{number}")


def test_no_key_is_lost_where_many_add_at_once(file: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda start: _add_some(file, start), (0, 10, 20)))
    assert {holder.name for holder in read_keys(file)} == {f"k{10 * n + m}" for n in range(3) for m in range(5)}


GOOD: dict[str, Any] = {"name": "ada", "sha256": "0" * 64, "created": "2026-01-31T12:00:00Z"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"request_per_minute": 5}, "ada: unknown field 'request_per_minute'. Did you mean 'requests_per_minute'?"),
        ({"requests_per_minute": 0}, "at least 1, not 0"),
        ({"tokens_per_minute": "9"}, "tokens_per_minute must be a whole number of at least 1, not '9'"),
        ({"concurrent": True}, "not True"),
        ({"sha256": "0" * 63}, "64 hexadecimal digits"),
        ({"sha256": 5}, "64 hexadecimal digits"),
        ({"name": "a b"}, "'a b' is no name for a key"),
        ({"name": None}, "None is no name for a key"),
        ({"created": 5}, "created must be a text"),
        ({"models": []}, "models must name at least one"),
        ({"models": "base"}, "models must be a list"),
        ({"models": [3]}, "models must name at least one"),
    ],
)
def test_an_entry_that_could_be_misread_is_refused(change: dict[str, Any], said: str, file: Path) -> None:
    file.write_text(json.dumps({"keys": [GOOD | change]}))
    with pytest.raises(Corrupt) as refused:
        read_keys(file)
    assert said in str(refused.value) and str(refused.value).startswith(str(file))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "not a file of API keys"),
        ({"keys": [], "key": 1}, "not a file of API keys"),
        ({"keys": [5]}, "must be a JSON object"),
        ({"keys": [{"name": "ada"}]}, "ada: sha256 is missing"),
        ({"keys": [GOOD, GOOD | {"sha256": "1" * 64}]}, "the same name"),
        ({"keys": [GOOD, GOOD | {"name": "bob"}]}, "the same sha256"),
    ],
)
def test_a_file_of_another_form_is_refused(value: Any, said: str, file: Path) -> None:
    file.write_text(json.dumps(value))
    with pytest.raises(Corrupt, match=said):
        ApiKeys.read(file)


def test_what_is_written_is_what_is_read(file: Path) -> None:
    whole = KeyHolder("ada", "0" * 64, "now", 1, 2, 3, ("a", "b"))
    assert KeyHolder(**{**whole.to_dict(), "models": tuple(whole.to_dict()["models"])}) == whole
    file.write_text(json.dumps({"keys": [whole.to_dict(), GOOD | {"name": "bob", "sha256": "1" * 64}]}))
    assert read_keys(file)[0] == whole and read_keys(file)[1].models is None
    with pytest.raises(NotFound):
        ApiKeys.read(file.with_name("none.json"))


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("Bearer xp-1", "xp-1"),
        ("bearer   xp-1 ", "xp-1"),
        ("Basic xp-1", None),
        ("Bearer", None),
        ("Bearer ", None),
        ("xp-1", None),
        ("", None),
        (None, None),
    ],
)
def test_the_key_of_an_authorization(header: str | None, key: str | None) -> None:
    assert bearer(header) == key


# ── xpert keys ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_commands(file: Path, xpert: Run) -> None:
    made = xpert("keys", "add", file, "ada", "--requests-per-minute", 1200, "--models", "me/dates, base")
    assert made.exit_code == 0 and "this once" in made.stderr
    key = made.stdout.strip()
    assert ApiKeys.read(file).check(key).models == ("me/dates", "base")
    listed = xpert("keys", "list", file)
    assert key not in listed.stdout
    assert [word for word in ("ada", "1,200", "me/dates,base") if word not in listed.stdout] == []
    told = json.loads(xpert("keys", "add", file, "bob", "--json", "--quiet").stdout)
    assert (told["name"], told["file"]) == ("bob", str(file)) and ApiKeys.read(file).check(told["key"]).name == "bob"
    assert xpert("keys", "remove", file, "ada").stdout == "removed ada's key\n"
    assert [entry["name"] for entry in json.loads(xpert("keys", "list", file, "--json").stdout)["keys"]] == ["bob"]
    xpert("keys", "remove", file, "bob")
    assert xpert("keys", "list", file).stdout == f"{file} holds no keys\n"


MISTAKES = {
    "add {d}/new.json": "Missing argument 'NAME'",
    "add {d}/new.json a/b": "'a/b' is no name for a key. Letters",
    "add {d}/new.json ada --concurrent 0": "0 is not in the range x>=1",
    "add {d}/new.json ada --tokens-per-minute many": "'many' is not a valid integer",
    "add {d}/new.json ada --models ,": "ada: models must name at least one",
    "add {d}/new.json ada --request-per-minute 5": "No such option '--request-per-minute'",
    "add {keys} ada": "there is a key named 'ada'. Remove that one first",
    "add {keys}/under/x.json ada": "a part of the path is a file",
    "add {d} ada": "is a directory",
    "add {other} ada": "other.json: not a file of API keys",
    "list {d}/none.json": "none.json: no such file",
    "list {other}": "other.json: not a file of API keys",
    "remove {d}/none.json ada": "none.json: no such file. `xpert keys add` makes one",
    "remove {keys} adda": "keys.json: unknown key 'adda'. Did you mean 'ada'?",
    "remov {keys} ada": "Did you mean 'remove'?",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(command: str, file: Path, xpert: Run) -> None:
    add_key(file, "ada")
    other = file.with_name("other.json")
    other.write_text("[]")
    before = file.read_bytes(), sorted(path.name for path in file.parent.iterdir() if path.suffix != ".lock")
    result = xpert("keys", *command.format(d=file.parent, keys=file, other=other).split())
    assert result.exit_code == 2, (result.exception, result.stderr)
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("xpert: "), result.stderr
    assert MISTAKES[command] in result.stderr
    assert result.stdout == ""
    assert before == (
        file.read_bytes(),
        sorted(path.name for path in file.parent.iterdir() if path.suffix != ".lock"),
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(BadInput, match="may not be written"):
        add_key(tmp_path / "keys.json", "ada")
    tmp_path.chmod(0o700)
