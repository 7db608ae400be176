"""A plan as a table: one row for each convolution, totals, and why it is as it is."""

import io

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from sbf_dist.compression.plan import Layer, Plan, SBFLayer

MIN_COLUMNS_FOR_REASONS = 110  # columns from which on there is room for reasons
DASH = "-"


def show_plan(plan: Plan, console: Console) -> None:
    """Print a plan and its explanation as wide as `console` is, with reasons if there is room."""
    console.print(_page(plan, reasons=console.width >= MIN_COLUMNS_FOR_REASONS))


def plan_text(plan: Plan, width: int = 120) -> str:
    """Return what `show_plan` prints as plain text of at most `width` columns."""
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=False,
        color_system=None,
        force_jupyter=False,  # in a notebook rich would show the table instead of writing it
    )
    show_plan(plan, console)
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def plan_table(plan: Plan, *, reasons: bool = True) -> Table:
    """Lay out a plan: a row for each convolution in forward order, totals in the footer.

    Multiply-adds are in millions, `left` is their share that is left, `error` the share of the
    output's variance that is lost. `reasons` adds a clause of each layer's reason.
    """
    converted = [layer for layer in plan.layers.values() if isinstance(layer, SBFLayer)]
    removed = sum(_removed(plan, name) for name in plan.layers)
    columns = [
        Column("layer", f"{len(plan.layers)} convolutions", overflow="fold", min_width=14),
        _number("channels", str(sum(layer.channels for layer in converted))),
        _number("kept", str(sum(len(layer.kept) for layer in converted))),
        _number("S"),
        _number("m"),
        _number("cut", str(removed) if removed else ""),
        _number("M MACs", f"{plan.macs_before / 1e6:.2f}"),
        _number("after", f"{plan.macs_after / 1e6:.2f}"),
        _number("left", _percent(plan.macs_after, plan.macs_before)),
        _number("error"),
    ]
    if reasons:
        columns.append(Column("reason", overflow="fold", ratio=1))
    table = Table(*columns, box=None, pad_edge=False, show_footer=True, footer_style="bold")
    for name, layer in plan.layers.items():
        row: list[RenderableType] = [Text(name), *_cells(layer, _removed(plan, name))]
        if reasons:
            row.append(Text(_short(layer)))
        table.add_row(*row, style=None if isinstance(layer, SBFLayer) else "dim")
    return table


def _page(plan: Plan, *, reasons: bool) -> Group:
    parts: list[RenderableType] = [Text(plan.summary(), style="bold"), Text("")]
    parts.append(plan_table(plan, reasons=reasons))
    if plan.explanation:
        parts.append(Text(""))
    for sentence in plan.explanation:
        # A hanging indent: the first line starts where the others do not.
        bullet = Table.grid(padding=(0, 1, 0, 0))
        bullet.add_row(Text("-"), Text(sentence))
        parts.append(Padding(bullet, 0))
    return Group(*parts)


def _cells(layer: Layer, removed: int) -> list[str]:
    cut = str(removed) if removed else ""
    if not isinstance(layer, SBFLayer):
        macs = f"{layer.macs / 1e6:.2f}"
        return [
            DASH,
            DASH,
            DASH,
            DASH,
            cut,
            macs,
            macs,
            _percent(layer.macs, layer.macs),
            DASH,
        ]
    return [
        str(layer.channels),
        str(len(layer.kept)),
        str(len(layer.sources[0])) if layer.sources else DASH,
        str(layer.transform_size),
        cut,
        f"{layer.macs_before / 1e6:.2f}",
        f"{layer.macs_after / 1e6:.2f}",
        _percent(layer.macs_after, layer.macs_before),
        f"{layer.error:.4f}",
    ]


def _short(layer: Layer) -> str:
    """Choose the clause of a layer's reason that the other columns do not show."""
    clauses = layer.reason.split("; ")
    losses = [clause for clause in clauses if clause.startswith("adds about")]
    return losses[0] if losses and isinstance(layer, SBFLayer) else clauses[0]


def _number(title: str, footer: str = "") -> Column:
    return Column(title, footer, justify="right", no_wrap=True)


def _removed(plan: Plan, name: str) -> int:
    return len(plan.removed[name].out) if name in plan.removed else 0


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else DASH
