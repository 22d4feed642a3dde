"""Licences as the Hugging Face Hub names them."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["HUB_LICENCES", "UNKNOWN", "hub_licence"]

UNKNOWN = "unknown"

# Source: https://huggingface.co/docs/hub/repositories-licenses
HUB_LICENCES = frozenset(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 gemma grok2-community unknown
    other
    """.split()  # noqa: SIM905  # as a list it would fill three screens
)
_OTHER_NAMES = {
    "apache": "apache-2.0",
    "apache-2": "apache-2.0",
    "apache2": "apache-2.0",
    "apache-license-2.0": "apache-2.0",
    "mit-license": "mit",
    "cc0": "cc0-1.0",
    "odc-by-1.0": "odc-by",
    "odbl-1.0": "odbl",
    "pddl-1.0": "pddl",
    "agpl-3.0-only": "agpl-3.0",
    "agpl-3.0-or-later": "agpl-3.0",
    "gpl-2.0-only": "gpl-2.0",
    "gpl-2.0-or-later": "gpl-2.0",
    "gpl-3.0-only": "gpl-3.0",
    "gpl-3.0-or-later": "gpl-3.0",
    "lgpl-2.1-only": "lgpl-2.1",
    "lgpl-2.1-or-later": "lgpl-2.1",
    "lgpl-3.0-only": "lgpl-3.0",
    "lgpl-3.0-or-later": "lgpl-3.0",
}


def hub_licence(licences: Mapping[str, int]) -> dict[str, str]:
    """The Hub's `license` fields for rows under these licences (name -> rows).

    One licence that all rows state gives `license`, as `other` with `license_name` where the Hub has no name for it.
    Rows of several licences, or of unknown ones, give nothing: which of them binds the adapter is not ours to say.
    """
    stated = [name for name, rows in licences.items() if rows]
    names = {_plain(name) for name in stated}
    if len(names) != 1 or names == {UNKNOWN}:
        return {}
    (name,) = names
    if name in HUB_LICENCES and name != "other":
        return {"license": name}
    return {"license": "other", "license_name": name} if name else {}


def _plain(name: str) -> str:
    """`Apache 2.0` -> `apache-2.0`."""
    folded = re.sub(r"[^a-z0-9.+]+", "-", name.strip().lower()).strip("-.")[:128]
    return _OTHER_NAMES.get(folded, folded)
