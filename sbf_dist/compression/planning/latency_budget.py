"""Meeting a budget of time: options priced in measured milliseconds, the whole measured as well."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from sbf_dist.budget import Budget
from sbf_dist.compression.fitting.statistics import run_until
from sbf_dist.compression.planning.knapsack import Option, allocate
from sbf_dist.compression.planning.latency import Form, build_form, latencies
from sbf_dist.compression.planning.latency_table import LatencyTable, Timing
from sbf_dist.surgery import become, deep_copy

ROUNDS = 4  # of choosing and measuring
TOLERANCE = 0.02  # of the budget: about what a measurement of a whole network repeats to


@dataclass(frozen=True)
class TimedChoice:
    """The options chosen, one per layer, with the layer's own milliseconds as cost.

    priced: what each layer could have been, with the layer's own milliseconds as cost; dense_ms:
    milliseconds of each layer as it is; never_faster: the layers of which no SBF form was
    measured faster.
    """

    options: dict[str, Option]
    priced: dict[str, list[Option]]
    dense_ms: dict[str, float]
    never_faster: frozenset[str]


def price(
    dense: nn.Module,
    options: dict[str, list[Option]],
    image: Tensor,
    table: LatencyTable,
    report: Callable[[int, int], None],
) -> dict[str, list[Option]]:
    """Give options their milliseconds as cost, and leave out those not faster than dense.

    The first option of a layer is the dense one, `image` is (1, C, H, W). Of the numbers of
    sources only powers of two and the largest are timed, and so kept; `report` is called with
    (done, of).
    """
    priced = {}
    for index, (name, row) in enumerate(options.items(), 1):
        conv = dense.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        most = max(option.sources for option in row if not option.whole_basis)
        timed = [o for o in row if o.sources & (o.sources - 1) == 0 or o.sources == most]
        forms = [Form(o.kept, o.sources, o.size) if o.sources else Form(o.kept) for o in timed]
        height, width = run_until(dense, name, image, output=False).shape[2:]
        measured = table.estimate(conv, (height, width), forms)
        priced[name] = [
            dataclasses.replace(option, cost=ms)
            for option, ms in zip(timed, measured, strict=True)
            if option.sources == 0 or ms < measured[0]
        ]
        report(index, len(options))
    return priced


def allocate_time(
    dense: nn.Module,
    options: dict[str, list[Option]],
    image: Tensor,
    budget: Budget,
    timing: Timing,
    report: Callable[[int, int], None],
) -> TimedChoice:
    """Choose one option per layer so that the whole network, as measured, meets a latency budget.

    The sum of layers timed alone is not the network's time (in the network, weights come from
    memory where a layer alone finds them in a cache). So the dense network and the cheapest one
    are measured, and what a layer saves is scaled to what the whole saves; then the network that
    was chosen is measured, and what it differs by corrects the next choice, until the budget is
    met within TOLERANCE. The other arguments are those of `price`. Raises UserError, naming the
    smallest budget that works, if no choice meets the budget, or if the dense network meets it as
    it is.
    """
    priced = price(dense, options, image, timing.table, report)
    shape = tuple(image.shape[1:])
    ready = timing.prepare(dense)

    def measure(chosen: dict[str, Option]) -> tuple[float, float]:
        trial = timing.prepare(_build(dense, chosen))
        before, after = latencies([ready, trial], shape, batch=timing.table.batch)
        return before, after

    cheapest = {name: min(row, key=lambda option: option.cost) for name, row in priced.items()}
    whole, least = measure(cheapest)
    alone = sum(row[0].cost for row in priced.values())
    saved = alone - sum(option.cost for option in cheapest.values())
    least = min(least, whole) if saved > 0 else whole
    limit = budget.limit(whole, slack=TOLERANCE)
    if least > limit * (1 + TOLERANCE):
        raise budget.refusal(least, whole)
    scale = (whole - least) / saved if saved > 0 else 1.0
    scaled = {
        name: [dataclasses.replace(option, cost=scale * option.cost) for option in row]
        for name, row in priced.items()
    }
    # What is left for the rest of the network if all layers are as cheap as they can be.
    most = limit - scale * (alone - saved)
    rest = whole - scale * alone
    tried: list[tuple[float, float, dict[str, Option]]] = []
    for _ in range(ROUNDS):
        chosen = allocate(scaled, fixed=min(rest, most), dense=whole, budget=budget)
        if any(chosen == before for *_, before in tried):
            break
        before, after = measure(chosen)
        after *= whole / before  # as on a machine that is as fast as it was at first
        excess = max(0.0, after / limit - 1 - TOLERANCE)
        tried.append((excess, sum(option.loss for option in chosen.values()), chosen))
        if abs(after / limit - 1) <= TOLERANCE:
            break
        rest = after - sum(option.cost for option in chosen.values())
    *_, best = min(tried, key=lambda entry: entry[:2])
    return TimedChoice(
        options={name: priced[name][scaled[name].index(best[name])] for name in priced},
        priced=priced,
        dense_ms={name: row[0].cost for name, row in priced.items()},
        never_faster=frozenset(name for name, row in priced.items() if len(row) == 1),
    )


def _build(dense: nn.Module, chosen: dict[str, Option]) -> nn.Module:
    """Return a network of the chosen structure, to be timed only."""
    network = deep_copy(dense)
    for name, option in chosen.items():
        if option.sources == 0:
            continue
        conv = network.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        form = Form(option.kept, option.sources, option.size)
        become(conv, build_form(conv, form))
    return network
