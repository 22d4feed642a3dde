"""MC-SMoE's merge of like experts: a smaller pool, each group of alike experts one adapter, weighed by their use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from xpert.config import Config, option
from xpert.errors import BadInput
from xpert.protocols import Merged, MergeTask

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["PLUGIN", "Grouped"]


@dataclass(frozen=True)
class GroupedOptions(Config):
    """How experts are found alike."""

    groups: int | None = option(None, "how many adapters are left; none: half as many, rounded up", minimum=1)
    by: str = option(
        "delta",
        "what makes experts alike: their changes B A, or which prompts ask for them (needs a routing)",
        choices=("delta", "routing"),
    )
    how: str = option(
        "dominant",
        "dominant: the most used experts lead, each other joins the leader most like it; linkage: average linkage",
        choices=("dominant", "linkage"),
    )


class Grouped:
    """Groups by cosine, of the changes (r x r traces) or of the routing columns, and merges each group.

    A group's adapter is the mean of its members weighed by usage (their share of a routing's draws, or their weights
    where no routing is given); exact, or the nearest of a rank. MC-SMoE's alignment of hidden units is not needed:
    changes B A are merged, not factors. `how=linkage` with `by=routing` groups by router scores on a task's prompts,
    as UNCURL does, which clusters spectrally.
    """

    Options = GroupedOptions
    needs = frozenset({"usage"})
    cost = "time O(d R^2) for the cosines, R the sum of all ranks; then as concat, with a rank as svd"
    source = "MC-SMoE, arXiv:2310.01334; UNCURL, arXiv:2409.01483"

    def __init__(self, options: GroupedOptions) -> None:
        self.options = options

    def merge(self, task: MergeTask) -> list[Merged]:
        from xpert.experts.mergers._truncating import kept_or_truncated

        usage = task.usage if task.usage is not None else task.weights
        used = [index for index, share in enumerate(usage) if share and task.weights[index]]
        if any(share < 0 for share in usage):
            raise BadInput("grouped weighs experts by how much they are used; a weight may not be negative")
        wanted = self.options.groups or (len(used) + 1) // 2
        if wanted > len(used):
            raise BadInput(f"groups is {wanted}, but {len(used)} experts are in use", hint="ask for fewer groups")
        cosines = self._cosines(task)[used][:, used]
        shares = [usage[index] for index in used]
        found = _linked(cosines, wanted) if self.options.how == "linkage" else _led(cosines, shares, wanted)
        merged = []
        for members in found:
            own = [shares[member] / sum(shares[member] for member in members) for member in members]
            chosen = tuple(used[member] for member in members)
            one = kept_or_truncated([task.experts[index] for index in chosen], own, task.rank, chosen)
            merged.append(
                Merged(one.members, one.weights, one.modules, {**one.log, "cosine": _least(cosines, members)})
            )
        return merged

    def _cosines(self, task: MergeTask) -> NDArray[np.float64]:
        import numpy as np

        if self.options.by == "delta":
            from xpert.experts.low_rank import inner_products

            products = inner_products(task.experts).numpy()
        elif task.routing is None:
            raise BadInput(
                "by=routing needs to know how prompts were routed", hint="give --prompts FILE or --usage FILE"
            )
        else:
            products = task.routing.T @ task.routing
        lengths = np.sqrt(np.diag(products))
        cosines: NDArray[np.float64] = products / np.maximum(np.outer(lengths, lengths), np.finfo(float).tiny)
        return cosines


def _led(cosines: NDArray[np.float64], shares: list[float], wanted: int) -> list[list[int]]:
    """The `wanted` most used lead; each other joins the leader with the greatest cosine. Ties to the lowest index."""
    leaders = sorted(sorted(range(len(shares)), key=lambda index: (-shares[index], index))[:wanted])
    groups = {leader: [leader] for leader in leaders}
    for index in set(range(len(shares))) - set(leaders):
        groups[max(leaders, key=lambda leader: (cosines[index, leader], -leader))].append(index)
    return [sorted(members) for members in groups.values()]


def _linked(cosines: NDArray[np.float64], wanted: int) -> list[list[int]]:
    """Average linkage of the cosine distances, cut into exactly `wanted` groups.

    The two groups with the greatest mean cosine between their members join, ties to the lowest indices. Time O(n^3):
    scipy's cut can give fewer groups than asked for where distances are equal.
    """
    groups = [[index] for index in range(len(cosines))]
    while len(groups) > wanted:
        pairs = [(i, j) for j in range(len(groups)) for i in range(j)]
        i, j = max(pairs, key=lambda pair: (cosines[groups[pair[0]]][:, groups[pair[1]]].mean(), -pair[0], -pair[1]))
        groups[i] = sorted([*groups[i], *groups.pop(j)])
    return groups


def _least(cosines: NDArray[np.float64], members: list[int]) -> float:
    """The least cosine between two members of a group; 1 for one alone."""
    return float(min((cosines[i, j] for i in members for j in members if i < j), default=1.0))


PLUGIN = Grouped
