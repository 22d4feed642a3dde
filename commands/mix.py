"""`xpert mix`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from xpert.commands.options import Session, aggregator_options, common_options, config_options, pairs, take
from xpert.errors import BadInput
from xpert.experts.recruiting.options import RecruitOptions

__all__ = ["command"]


@click.command("mix")
@click.option("--registry", "location", metavar="R", help="The registry. [default: $XPERT_REGISTRY or the user's]")
@click.option(
    "--shots",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Recruit the group of experts that does best on these.",
)
@click.option(
    "--experts",
    metavar="A,B@2,...",
    help="OWNER/NAME[@VERSION] or expert folders. [default: all experts of the base, latest versions]",
)
@click.option("--base", metavar="MODEL", help="The base model; experts of others stay out, and named ones are refused.")
@click.option(
    "--router", default="centroid", show_default=True, metavar="NAME", help="See `xpert methods --kind router`."
)
@click.option(
    "--param", "params", multiple=True, metavar="KEY=VALUE", help="A parameter of the router; may be repeated."
)
@click.option(
    "--gate",
    metavar="NAME",
    help="Weighs the experts token by token (`xpert methods --kind gate`); some need `xpert gate` first.",
)
@click.option(
    "--gate-param", "gate_params", multiple=True, metavar="KEY=VALUE", help="A parameter of the gate; may be repeated."
)
@aggregator_options
@click.option(
    "-o", "--output", "out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="mixture.json"
)
@config_options(RecruitOptions)
@common_options
def command(
    session: Session,
    location: str | None,
    shots: Path | None,
    experts: str | None,
    base: str | None,
    router: str,
    params: tuple[str, ...],
    gate: str | None,
    gate_params: tuple[str, ...],
    aggregator: str | None,
    aggregator_params: tuple[str, ...],
    out: Path,
    **options: Any,
) -> None:
    """Assemble a mixture: experts of one base model behind a router.

    Takes the experts named, or all of the registry that belong to the base. With --shots it recruits a group of them:
    experts that answer the shots better than the base model, or find the answers likelier (and the explanations, where
    shots have a column `rationale`), and that are not all alike. The output says why each is in or out.

    With --gate, the router says which experts a prompt may use, and the gate weighs those at every token and module;
    `--router fixed` lets it choose among them all. With --aggregator, each expert of a route answers by itself, and
    one reply is made of the several; a router that names one expert only is refused where that leaves nothing to do.
    """
    from xpert.data import read_shots
    from xpert.experts.aggregated import chosen_aggregator
    from xpert.experts.mixing import mix
    from xpert.experts.mixture_file import write_mixture
    from xpert.registry.opening import open_registry

    if out.is_dir():
        raise BadInput("is a folder; a mixture is a file", where=str(out), hint="write -o FOLDER/mixture.json")
    mixture = mix(
        open_registry(location),
        router=router,
        router_params=pairs(params, option="--param"),
        experts=[ref.strip() for ref in experts.split(",") if ref.strip()] if experts is not None else None,
        shots=read_shots(shots) if shots is not None else None,
        recruiting=_recruiting(options, shots),
        gate=_gate(gate, gate_params),
        aggregator=chosen_aggregator(aggregator, pairs(aggregator_params, option="--aggregator-param")),
        base=base,
        name=out.stem,
        device=session.device,
        progress=session.progress,
    )
    write_mixture(out, mixture)
    session.result(
        {"mixture": str(out), **mixture.to_dict(anchor=out.resolve().parent)},
        _text(out, mixture),
    )


def _recruiting(options: dict[str, Any], shots: Path | None) -> RecruitOptions | None:
    """Raises BadInput for an option of recruiting on a command line without --shots: it would do nothing."""
    context = click.get_current_context()
    for name in options:
        if shots is None and context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            flag = next(p.opts[0] for p in context.command.params if p.name == name)
            raise BadInput(f"{flag} is about recruiting, which needs shots", hint="give --shots FILE")
    found: RecruitOptions = take(RecruitOptions, options)
    return found if shots is not None else None


def _gate(name: str | None, params: tuple[str, ...]) -> Any:
    """Raises BadInput for a gate whose router has to be trained for a mixture first."""
    from xpert import plugins
    from xpert.experts.mixture import GateChoice, gate_options

    if name is None:
        if params:
            raise BadInput("--gate-param needs a gate", hint="give --gate NAME")
        return None
    if plugins.load("gate", name).learned == "mixture":
        raise BadInput(
            f"gate {name} has a router that is trained for a mixture",
            hint=f"mix without it first, then `xpert train ROWS --mixture MIXTURE --gate {name}`",
        )
    given = pairs(params, option="--gate-param")
    typed = gate_options(name, given).to_dict()
    return GateChoice(name, {key.replace("-", "_"): typed[key.replace("-", "_")] for key in given})


def _text(out: Path, mixture: Any) -> str:
    from xpert.experts.router_learning.cross_fitting import learns

    behind = f"router {mixture.router}" + (f" and gate {mixture.gate.name}" if mixture.gate else "")
    behind += f", with aggregator {mixture.aggregator.name}" if mixture.aggregator else ""
    lines = [f"{out}: {len(mixture.experts)} experts of {mixture.base.ref} behind {behind}"]
    if mixture.recruited:
        lines += [f"  {'in ' if r['chosen'] else 'out'}  {r['expert']}  {r['reason']}" for r in mixture.recruited]
    else:
        lines += [f"  {expert.key}  {expert.ref}" for expert in mixture.experts]
    if learns(mixture.router, mixture.router_params):
        told = f"xpert router train {out} --on SUITE --router {mixture.router} -o FILE"
        lines.append(f"router {mixture.router} has to be trained before it routes: {told}")
    return "\n".join(lines)
