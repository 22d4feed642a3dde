from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from xpert.errors import BadInput
from xpert.registry.credentials import find_credentials
from xpert.registry.store import Registry

Run = Callable[..., Result]
Maker = Callable[..., Path]


def drawn(count: int, alphabet: str = string.ascii_letters + string.digits, seed: float = 1) -> str:
    return "".join(random.Random(seed).choices(alphabet, k=count))


BASE32 = string.ascii_uppercase + "234567"
PEM = f"-----BEGIN RSA {'PRIVATE'} KEY-----"
# Put together here, so that no scanner of repositories takes them for real ones.
SECRETS: dict[str, tuple[str, str]] = {
    "hf": ("hf" + "_" + drawn(34, string.ascii_letters), "a Hugging Face token"),
    "aws id": ("AKIA" + drawn(16, BASE32), "an AWS access key"),
    "aws session id": ("ASIA" + drawn(16, BASE32, 4), "an AWS access key"),
    "aws secret": (f'aws_secret_access_key = "{drawn(40)}"', "an AWS secret key"),
    "aws secret in JSON": (f'{{"SecretAccessKey": "{drawn(38)}/+"}}', "an AWS secret key"),
    "github": ("ghp" + "_" + drawn(36), "a GitHub token"),
    "github app": ("ghs" + "_" + drawn(36, seed=2), "a GitHub token"),
    "github fine": ("github" + "_pat_" + drawn(22) + "_" + drawn(59), "a GitHub token"),
    "gitlab": ("glpat" + "-" + drawn(20), "a GitLab token"),
    "openai": ("sk" + "-" + drawn(48), "an API key (sk-)"),
    "openai project": ("sk" + "-proj-" + drawn(40) + "_" + drawn(20), "an API key (sk-)"),
    "slack": ("xox" + "b-" + "123456123456-" + drawn(24), "a Slack token"),
    "google": ("AIza" + drawn(35), "a Google API key"),
    "pem": (f"{PEM}\n{drawn(64)}\n{drawn(64)}\n", "a private key"),
    "pem with headers": (
        f"{PEM}\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,{drawn(32)}\n\n{drawn(64)}\n",
        "a private key",
    ),
    "pem in JSON": (json.dumps({"key": f"{PEM}\n{drawn(64)}\n"}), "a private key"),
    "address": ("clone https://bob:" + "Tr0ub4dor&3" + "@git.acme.org/x.git now", "an address with a password"),
    "database": ("postgresql://svc:" + "q9!kd72" + "@db.internal:5432/x", "an address with a password"),
}

HARMLESS = {
    "hash": drawn(64, "0123456789abcdef"),
    "words": "An AKIA number is a key id; hf_hub_download fetches files; sk-learn is a library; ghp_ begins a token.",
    "placeholder": "hf_" + "x" * 34,
    "placeholder in capitals": "export HF_TOKEN=hf_YOURTOKENyourtokenYOURTOKENyourtoke",
    "documented AWS example": "AKIAIOSFODNN7EXAMPLE and aws_secret_access_key=wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "longer name": "my_hf_" + drawn(34, string.ascii_letters),
    "longer token": "AKIA" + drawn(30, BASE32),
    "sha after secret": "the secret key idea: " + drawn(10),
    "lesson on keys": f"A key file begins with {PEM} and ends with -----END RSA PRIVATE KEY-----.",
    "public key": f"-----BEGIN PUBLIC KEY-----\n{drawn(64)}\n",
    "documented address": "postgresql://user:password@localhost/db or http://me:<password>@host, https://u:$PASS@h",
    "same word twice": "amqp://guest:guest@localhost:5672 and postgresql://postgres:postgres@localhost/x",
    "words for one": "smb://myuser:mypassword@server/share and https://a:very%20secret@host",
    "masked address": "https://bob:***@git.acme.org",
    "address with a port": "http://localhost:8000/a@b and https://acme.org:443/c?d=e@f",
    "time and mail": "see https://acme.org at 12:30, or write to bob@acme.org",
    "class names": "class sk-button sk-button--primary sk-estimator-doc-link-with-a-very-long-name-of-words",
    "base64": drawn(200) + "==",
}


@pytest.mark.parametrize("secret", SECRETS)
def test_what_is_found(secret: str) -> None:
    text, kind = SECRETS[secret]
    found = list(find_credentials(f"first line\n{text} and more"))
    assert [(finding.line, finding.kind) for finding in found] == [(2, kind)]


@pytest.mark.parametrize("harmless", HARMLESS)
def test_what_is_no_secret(harmless: str) -> None:
    assert list(find_credentials(HARMLESS[harmless])) == []


def test_random_text_holds_none() -> None:
    """20,000 words, hashes and addresses drawn at random: no false alarm."""
    r = random.Random(3)
    kinds: list[Callable[[], str]] = [
        lambda: drawn(r.randint(2, 12), string.ascii_lowercase, r.random()),
        lambda: drawn(r.choice((32, 40, 64)), "0123456789abcdef", r.random()),
        lambda: drawn(r.randint(20, 80), seed=r.random()),
        lambda: f"https://acme.org:{r.randint(1, 9999)}/{drawn(12, seed=r.random())}",
    ]
    text = " ".join(r.choice(kinds)() for _ in range(20_000))
    assert list(find_credentials(text)) == []


def test_a_hostile_text_takes_no_longer() -> None:
    """Beginnings of keys over and over would make a careless pattern try every split of them."""
    text = f"{PEM}\n" + "x: yz: " * 50_000 + "\n" + "://a:" * 50_000 + f"{PEM}\\n" * 5_000 + "secret_key " * 50_000
    assert list(find_credentials(text)) == []


def test_publishing_refuses_and_never_shows_it(xpert: Run, registry: Registry, expert: Maker) -> None:
    folder = expert()
    secret, kind = SECRETS["hf"]
    (folder / "notes.md").write_text(f"# Notes\n\nlog in with {secret}\n")
    result = xpert("registry", "publish", folder, "--name", "acme/a", "--registry", registry.folder)
    assert result.exit_code == 2 and "notes.md: line 3 holds what looks like " + kind in result.stderr
    assert secret not in result.output and "--allow-secret-like" in result.stderr
    assert not registry.folder.exists()
    allowed = xpert(
        "registry", "publish", folder, "--name", "acme/a", "--registry", registry.folder, "--allow-secret-like"
    )
    assert allowed.stdout == "published acme/a@1\n" and secret not in allowed.output
    copying = ("registry", "copy", "acme/a", "--registry", registry.folder, "--to", registry.folder.with_name("other"))
    refused = xpert(*copying)
    assert refused.exit_code == 2 and kind in refused.stderr and secret not in refused.output
    assert xpert(*copying, "--allow-secret-like").stdout == "copied acme/a@1\n"


@pytest.mark.parametrize("place", ["expert.json", "exemplars.jsonl"])
def test_cards_and_rows_are_looked_through(place: str, registry: Registry, expert: Maker) -> None:
    folder = expert()
    secret = SECRETS["github"][0]
    path = folder / place
    if place == "expert.json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"description": f"with {secret}"}))
    else:
        path.write_text(path.read_text() + json.dumps({"prompt": f"use {secret}"}) + "\n")
        card = json.loads((folder / "expert.json").read_text())
        del card["files"]["exemplars.jsonl"]
        (folder / "expert.json").write_text(json.dumps(card))
    with pytest.raises(BadInput, match="a GitHub token") as caught:
        registry.publish(folder, "acme/a")
    assert secret not in str(caught.value) and caught.value.where == str(path)


def test_mixtures_too(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "mixture.json"
    path.write_text(json.dumps({"kind": "mixture", "name": SECRETS["address"][0]}))
    with pytest.raises(BadInput, match="an address with a password"):
        registry.publish(path, "acme/m")
