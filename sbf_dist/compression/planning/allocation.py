"""Sharing out a budget of any kind among the layers of a network."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from sbf_dist.budget import Budget
from sbf_dist.compression.cost import Cost
from sbf_dist.compression.planning.knapsack import Option, allocate
from sbf_dist.compression.planning.latency_budget import TimedChoice, allocate_time
from sbf_dist.compression.planning.latency_table import LatencyTable
from sbf_dist.compression.planning.options import Shape


@dataclass(frozen=True)
class Allocation:
    """The options of each layer, priced in the budget's unit, and the one that was chosen.

    timed: what was measured, where time is the budget.
    """

    options: dict[str, list[Option]]
    chosen: dict[str, Option]
    timed: TimedChoice | None = None


def share_out(
    dense: nn.Module,
    options: dict[str, list[Option]],
    shapes: dict[str, Shape],
    cost: Cost,
    budget: Budget,
    image: Tensor,
    table: LatencyTable,
    for_inference: Callable[[nn.Module], nn.Module],
    tell: Callable[[int, int], None],
    *,
    between: bool = False,
) -> Allocation:
    """Choose an option for each layer of `dense` so that the network costs what `budget` says.

    The options come with multiply-adds as their costs; `shapes` are the layers', `cost` is that of
    `dense`. Raises UserError, naming the smallest budget that works, if there is no such choice;
    see `allocate_time` for the other arguments, which concern budgets of time.
    """
    if budget.unit == "ms":
        timed = allocate_time(dense, options, image, budget, table, for_inference, tell)
        return Allocation(timed.priced, timed.options, timed)
    whole = cost.macs
    if budget.kind == "params":
        whole = cost.params
        options = {
            name: shapes[name].in_parameters(row, between=between) for name, row in options.items()
        }
    fixed = whole - sum(row[0].cost for row in options.values())
    return Allocation(options, allocate(options, fixed=fixed, dense=whole, budget=budget))
