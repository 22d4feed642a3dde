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


@click.command("methods")
@click.argument("name", required=False)
@click.option("--kind", default="selector", show_default=True, metavar="|".join(plugins.KINDS), help="Which seam.")
@common_options
def command(session: Session, name: str | None, kind: str) -> None:
    """Lists the selectors, or the members of another seam; with NAME, explains one: parameters, cost, source."""
    if kind not in plugins.KINDS:
        raise unknown("kind", kind, plugins.KINDS)
    if name is not None:
        found = describe(kind, name)
        session.result(found, _explanation(found))
        return
    members = [_summary(kind, member) for member in plugins.names(kind)]
    width = max((len(member["name"]) for member in members), default=0)
    text = "\n".join(f"{member['name']:<{width}}  {member['summary']}" for member in members)
    session.result({"kind": kind, "members": members}, text or f"no {kind} is installed")


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
        return {"name": name, "summary": _title(plugins.load(kind, name))}
    except (ImportError, Unavailable) as error:
        return {"name": name, "summary": f"(not usable here: {error})"}


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


def _explanation(found: dict[str, Any]) -> str:
    lines = [f"{found['name']} ({found['kind']})", "", found["text"], ""]
    if found["needs"]:
        lines.append(f"needs:  {', '.join(found['needs'])}")
    lines += [f"{name + ':':<7} {found[name]}" for name in ("cost", "source") if found[name]]
    if not found["parameters"]:
        return "\n".join([*lines, "", "no parameters"]).replace("\n\n\n", "\n\n")
    lines += ["", "parameters (--param KEY=VALUE, or `params:` in a --config file):"]
    for parameter in found["parameters"]:
        limits = _limits(parameter)
        default = parameter["default"]
        shown = str(default).lower() if default is None or isinstance(default, bool) else default
        lines.append(f"  {parameter['name']} = {shown}{limits}")
        lines.append(f"      {parameter['help']}")
    return "\n".join(lines)


def _limits(parameter: dict[str, Any]) -> str:
    if parameter["choices"]:
        return f"  ({' | '.join(parameter['choices'])})"
    least, most = parameter["minimum"], parameter["maximum"]
    if least is None and most is None:
        return ""
    if most is None:
        return f"  (from {least:g})"
    return f"  (up to {most:g})" if least is None else f"  ({least:g} to {most:g})"
