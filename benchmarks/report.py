"""How rows are shown on the terminal, and as the Markdown table of the README."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .ops import DTYPES, OPS
from .providers import OURS
from .roof import ROOF
from .rows import Row

STYLES = {OURS: "bold green", ROOF: "dim"}
WIDTH = 100  # of the tables, where the terminal does not say

LEGEND = """\
median, p20, p80  milliseconds over the rounds, the caches cold before each sample
GB/s              bytes that one pass must move, the same for everyone, per time (GB = 10^9 bytes)
roof              share of the best bandwidth that a plain loop reaches, measured in the same rounds
ratio             time of the best peer over this one: above 1 is faster than every peer
host              microseconds on the host, caches warm: until a step on a GPU returns; on the
                  CPU, of a step on as many tensors of one element
"""


def cell(value: float | None, form: str) -> str:
    """Returns a formatted number, or nothing."""
    return "" if value is None else format(value, form)


def significant(value: float | None) -> str:
    """Returns a number with four digits, and no exponent."""
    if value is None:
        return ""
    whole = len(str(int(abs(value))))
    return f"{value:.{max(0, 4 - whole)}f}"


def grid(*columns: str) -> Table:
    """Returns an empty table: names to the left, numbers to the right."""
    shown = Table(box=box.SIMPLE)
    shown.add_column("provider", overflow="fold")
    for name in columns:
        shown.add_column(name, justify="right", no_wrap=True)
    return shown


def by_case(rows: Iterable[Row]) -> list[list[Row]]:
    """Returns the rows of each table, in the order in which they were measured."""
    tables: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        tables.setdefault(row.case, []).append(row)
    return list(tables.values())


def heading(row: Row) -> str:
    """Says what a table is about."""
    each = OPS[row.op].moved_bytes(DTYPES[row.dtype])
    return (
        f"{row.op} · {row.shapes} · {row.dtype} · {row.tensors:,} tensors, "
        f"{row.params:,} parameters x {each} B"
    )


def case_report(rows: list[Row]) -> Group:
    """Shows the rows of one case; says what is missing and why."""
    measured = [row for row in rows if row.median_ms is not None]
    shown = grid("median", "p20", "p80", "GB/s", "roof", "ratio", "launches", "host µs")
    for row in measured:
        shown.add_row(
            row.provider,
            *(significant(value) for value in (row.median_ms, row.p20_ms, row.p80_ms)),
            cell(row.gbps, ".1f"),
            cell(row.roof_share, ".1%"),
            cell(row.ratio, ".2f"),
            cell(row.launches, "d"),
            significant(row.host_us),
            style=STYLES.get(row.peer, ""),
        )
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            notes.setdefault(row.note, []).append(row.provider)
    lines = [Text(f"  {', '.join(names)}: {note}", style="dim") for note, names in notes.items()]
    title = Text(f"\n{heading(rows[0])}", style="bold")
    return Group(title, *([shown] if measured else []), *lines)


def summary(rows: list[Row]) -> Table:
    """Shows fused_opt beside its best peer, one line for each case."""
    shown = Table(box=box.SIMPLE, title="Summary")
    for name in ("shapes", "op", "dtype"):
        shown.add_column(name)
    for name in ("best peer", "ms", "fused_opt ms", "ratio", "roof", "host µs", "ratio of host"):
        shown.add_column(name, justify="right")
    for table in by_case(rows):
        line = summary_line(table)
        if line is not None:
            shown.add_row(*line)
    return shown


def fastest(rows: list[Row], what: str) -> Row | None:
    """Returns the peer that has the least of a column."""
    found = [row for row in rows if row.peer not in (OURS, ROOF) and getattr(row, what) is not None]
    return min(found, key=lambda row: float(getattr(row, what)), default=None)


def ours_in(rows: list[Row]) -> Row | None:
    """Returns the row of fused_opt, where it was measured."""
    return next((row for row in rows if row.peer == OURS and row.median_ms is not None), None)


def host_ratio(rows: list[Row]) -> float | None:
    """Returns the host time of the best peer over that of fused_opt."""
    ours, best = ours_in(rows), fastest(rows, "host_us")
    if ours is None or best is None or not ours.host_us or not best.host_us:
        return None
    return best.host_us / ours.host_us


def summary_line(rows: list[Row]) -> list[str] | None:
    """Returns the cells of a case, or None where fused_opt was not measured."""
    ours, best = ours_in(rows), fastest(rows, "median_ms")
    if ours is None:
        return None
    return [
        ours.shapes,
        ours.op,
        ours.dtype,
        best.provider if best else "",
        significant(best.median_ms) if best else "",
        significant(ours.median_ms),
        cell(ours.ratio, ".2f"),
        cell(ours.roof_share, ".0%"),
        significant(ours.host_us),
        cell(host_ratio(rows), ".2f"),
    ]


def markdown(rows: list[Row]) -> str:
    """Returns the table of the README: milliseconds per step, the best peer beside fused_opt."""
    lines = [
        "| step | parameters | best peer | ms | fused_opt, ms | faster | of the roof | host µs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for table in by_case(rows):
        line = summary_line(table)
        if line is None or line[0].startswith(("size-", "count-")):
            continue
        shapes, op, dtype, best, theirs, ours, ratio, roof, host, _ = line
        cells = (op, f"{shapes}, {dtype}", best, theirs, f"**{ours}**", f"{ratio}x", roof, host)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
