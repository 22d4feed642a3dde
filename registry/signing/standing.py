"""How versions stand with a trust list: who signed one, and which of a registry may not be used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from xpert.errors import Corrupt, Unavailable, XpertError
from xpert.registry.record_folder import RecordFolder
from xpert.registry.signing.signatures import Signature, fingerprint
from xpert.registry.signing.trust import TrustList
from xpert.registry.soundness import Problem
from xpert.registry.versions import Record

__all__ = ["Signer", "Standing", "refusals", "standing"]


@dataclass(frozen=True)
class Signer:
    """One who signed a version: the key's fingerprint, what the trust list calls it, and whether it speaks for it."""

    fingerprint: str
    comment: str
    trusted: bool
    signed: str


@dataclass(frozen=True)
class Standing:
    """Who signed a version, whether it may be used (None where that cannot be told), and why."""

    signers: tuple[Signer, ...]
    ok: bool | None
    reason: str


def standing(record: Record, signatures: Sequence[Signature], known: TrustList) -> Standing:
    """How a version stands with a trust list, as `registry show` tells it; raises nothing."""
    _, keys = known.speakers(record.version.name)
    signers = tuple(Signer(fingerprint(s.key), known.named(s.key), s.key in keys, s.signed) for s in signatures)
    try:
        verdict = known.judge(record, signatures)
    except Corrupt as error:
        return Standing(signers, False, error.what)
    except Unavailable as error:
        return Standing(signers, None, error.what)
    return Standing(signers, verdict.ok, verdict.reason)


def refusals(records: RecordFolder, known: TrustList) -> list[Problem]:
    """The versions of a registry that may not be used, for their signatures or for lack of them, and why.

    Damaged records are passed over: they are `verify`'s to tell.
    """
    found = []
    for (name, number), removed in sorted(records.listing().items()):
        if removed:
            continue
        try:
            record = records.read(name, number)
        except XpertError:
            continue
        try:
            verdict = known.judge(record, records.read_signatures(name, number).signatures)
        except XpertError as error:
            found.append(Problem(record.version.ref, error.what))
            continue
        if not verdict.ok:
            found.append(Problem(record.version.ref, verdict.reason))
    return found
