"""Sharing out a budget of any kind among the layers of a network."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from sbf_dist.compression.cost import Cost
from sbf_dist.compression.planning.knapsack import Option, allocate
from sbf_dist.compression.planning.latency_budget import TimedChoice, allocate_time
from sbf_dist.compression.planning.latency_table import Timing
from sbf_dist.compression.planning.option_table import OptionTable
from sbf_dist.compression.planning.options import Search


@dataclass(frozen=True)
class Allocation:
    """The options of each layer, priced in the budget's unit, and the one that was chosen.

    timed: what was measured, where time is the budget.
    """

    options: dict[str, list[Option]]
    chosen: dict[str, Option]
    timed: TimedChoice | None = None


def share_out(
    network: nn.Module,
    found: OptionTable,
    now: Cost,
    dense: Cost,
    search: Search,
    image: Tensor,
    timing: Timing,
    report: Callable[[int, int], None],
) -> Allocation:
    """Choose an option for each layer of `network` so that the whole costs what the budget says.

    `now` is the cost of `network`, `dense` that of the dense network, of which the budget is meant.
    Raises UserError, naming the smallest budget that works, if there is no such choice; see
    `allocate_time` for the other arguments, which concern budgets of time.
    """
    options, budget = found.rows, search.settings.budget
    if budget.unit == "ms":
        timed = allocate_time(network, options, image, budget, timing, report)
        return Allocation(timed.priced, timed.options, timed)
    cost, whole = now.macs, dense.macs
    if budget.kind == "params":
        cost, whole = now.params, dense.params
        options = {
            name: found.shapes[name].in_parameters(row, between=search.has_between)
            for name, row in options.items()
        }
    fixed = cost - sum(row[0].cost for row in options.values())
    return Allocation(options, allocate(options, fixed=fixed, dense=whole, budget=budget))
