"""`xpert methods`: the plug-ins of each seam, and what each one is, costs and takes."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import click

from xpert import plugins
from xpert.commands.options import Session, common_options
from xpert.config import Config, field_type
from xpert.errors import Unavailable, unknown

__all__ = ["command", "describe"]

_HEADS = {"scorer": "scorers (each is a method too, which takes the best rows)"}


@click.command("methods")
@click.argument("name", required=False)
@click.option("--kind", metavar="|".join(plugins.KINDS), help="Only this seam.  [default: all]")
@common_options
def command(session: Session, name: str | None, kind: str | None) -> None:
    """List the plug-ins of every seam, or of one; with NAME, explain one: parameters, cost, source."""
    if kind is not None and kind not in plugins.KINDS:
        raise unknown("kind", kind, plugins.KINDS)
    seams = [kind] if kind is not None else list(plugins.KINDS)
    if name is not None:
        first, *others = _seams_of(name, seams)
        found = describe(first, name)
        also = [f"\nalso {_a(other)}: xpert methods {name} --kind {other}" for other in others]
        session.result(found, "\n".join([_explanation(found), *also]))
        return
    members = {seam: [_summary(seam, member) for member in plugins.names(seam)] for seam in seams}
    # Every scorer is a selector too; where both seams are listed it stands under its own.
    shown = dict(members)
    if "scorer" in shown and "selector" in shown:
        scorers = {member["name"]: member["summary"] for member in shown["scorer"]}
        # A selector that bears a scorer's name and is more than its ranking says something of its own.
        shown["selector"] = [m for m in shown["selector"] if scorers.get(m["name"]) != m["summary"]]
    text = [_listing(seam, shown[seam], headed=kind is None) for seam in seams]
    session.result({"kind": kind, "members": [member for seam in seams for member in members[seam]]}, "\n\n".join(text))


def _seams_of(name: str, seams: list[str]) -> list[str]:
    """The seams that have a plug-in of that name; where none has, raises with the nearest name of them all."""
    known = {seam: plugins.names(seam) for seam in seams}
    found = [seam for seam in seams if name.replace("_", "-") in known[seam]]
    if not found:
        raise unknown(seams[0] if len(seams) == 1 else "plug-in", name, {n for names in known.values() for n in names})
    return found


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _listing(kind: str, members: list[dict[str, str]], *, headed: bool) -> str:
    width = max((len(member["name"]) for member in members), default=0)
    lines = [f"{member['name']:<{width}}  {member['summary']}" for member in members] or [f"no {kind} is installed"]
    return "\n".join([_HEADS.get(kind, f"{kind}s"), *(f"  {line}" for line in lines)] if headed else lines)


def describe(kind: str, name: str) -> dict[str, Any]:
    """What a plug-in says of itself: summary, text, needs, cost, source and parameters."""
    plugin = plugins.load(kind, name)
    text = inspect.getdoc(plugin) or ""
    options = getattr(plugin, "Options", None)
    return {
        "name": name,
        "kind": kind,
        "summary": _title(plugin),
        "text": text,
        "needs": sorted(getattr(plugin, "needs", ())),
        "cost": getattr(plugin, "cost", None),
        "source": getattr(plugin, "source", None),
        "parameters": _parameters(options) if isinstance(options, type) and issubclass(options, Config) else [],
    }


def _summary(kind: str, name: str) -> dict[str, str]:
    """One line of the list; a member whose packages are missing stands there, and says so."""
    try:
        return {"name": name, "kind": kind, "summary": _title(plugins.load(kind, name))}
    except (ImportError, Unavailable) as error:
        return {"name": name, "kind": kind, "summary": f"(not usable here: {error})"}


def _title(plugin: Any) -> str:
    """The first sentence of the member's module, or of its class where the module says nothing."""
    text = inspect.getdoc(inspect.getmodule(plugin)) or inspect.getdoc(plugin) or ""
    return " ".join(text.split("\n\n")[0].split())


def _parameters(options: type[Config]) -> list[dict[str, Any]]:
    found = []
    for field in dataclasses.fields(options):
        kind, optional, many = field_type(options, field.name)
        default = None if field.default is dataclasses.MISSING else field.default
        found.append(
            {
                "name": field.name.replace("_", "-"),
                "type": kind.__name__ + (" list" if many else "") + (" or none" if optional else ""),
                "default": list(default) if isinstance(default, tuple) else default,
                "choices": list(field.metadata.get("choices") or ()),
                "minimum": field.metadata.get("minimum"),
                "maximum": field.metadata.get("maximum"),
                "help": field.metadata.get("help"),
            }
        )
    return found


def _how_given(kind: str) -> str:
    """How a parameter of a plug-in of this kind is given."""
    if kind == "decoder":
        return "`Contrast.params` in Python"
    option = {"gate": "gate-param", "engine": "engine-param", "aggregator": "aggregator-param"}.get(kind, "param")
    return f"--{option} KEY=VALUE, or `{option.replace('-', '_')}s:` in a --config file"


def _explanation(found: dict[str, Any]) -> str:
    lines = [f"{found['name']} ({found['kind']})", "", found["text"], ""]
    if found["needs"]:
        lines.append(f"needs:  {', '.join(found['needs'])}")
    lines += [f"{name + ':':<7} {found[name]}" for name in ("cost", "source") if found[name]]
    if not found["parameters"]:
        return "\n".join([*lines, "", "no parameters"]).replace("\n\n\n", "\n\n")
    lines += ["", f"parameters ({_how_given(found['kind'])}):"]
    for parameter in found["parameters"]:
        limits = _limits(parameter)
        default = parameter["default"]
        shown = str(default).lower() if default is None or isinstance(default, bool) else default
        lines.append(f"  {parameter['name']} = {shown}{limits}")
        lines.append(f"      {parameter['help']}")
    return "\n".join(lines).replace("\n\n\n", "\n\n")


def _limits(parameter: dict[str, Any]) -> str:
    if parameter["choices"]:
        return f"  ({' | '.join(parameter['choices'])})"
    least, most = parameter["minimum"], parameter["maximum"]
    if least is None and most is None:
        return ""
    if most is None:
        return f"  (from {least:g})"
    return f"  (up to {most:g})" if least is None else f"  ({least:g} to {most:g})"
