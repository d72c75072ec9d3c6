"""How a table of results is shown on the terminal and kept as CSV rows."""

from __future__ import annotations

import csv
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich import box
from rich.console import Group
from rich.table import Table as RichTable

from .shapes import count
from .suite import Kind, Table

DTYPE_NAMES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STYLES: dict[Kind, str] = {"ours": "bold green", "torch": "", "roof": "dim"}
COLUMNS = (
    *("date", "commit", "dirty", "machine", "device", "torch", "fused_opt", "cuda", "cpu_isa"),
    *("threads", "rounds", "shapes", "dtype", "op", "provider"),
    *("ms", "spread", "gbps", "roof_gbps", "share", "ratio"),
)


def dtype_name(dtype: torch.dtype) -> str:
    """Returns the short name of a dtype."""
    return next(name for name, each in DTYPE_NAMES.items() if each == dtype)


def cell(value: float | None, form: str) -> str:
    """Returns a formatted number, or nothing."""
    return "" if value is None else format(value, form)


def grid(*columns: str) -> RichTable:
    """Returns an empty table: names to the left, numbers to the right."""
    shown = RichTable(box=box.SIMPLE)  # fits into 80 columns
    shown.add_column("provider", no_wrap=True)
    for name in columns:
        shown.add_column(name, justify="right", no_wrap=True)
    return shown


def bandwidth_report(table: Table) -> Group:
    """Shows times, bandwidth, share of the roof, ratio; says what is missing and why."""
    case, shown = table.case, grid("ms", "spread", "GB/s", "roof", "vs torch")
    for each in table.results:
        share, ratio = cell(table.share(each), ".1%"), cell(table.ratio(each), ".2f")
        time, spread = cell(each.seconds * 1e3, ".3f"), cell(each.timing.spread, ".1%")
        numbers = time, spread, cell(each.gbps, ".1f"), share, ratio
        shown.add_row(each.name, *numbers, style=STYLES[each.kind])
    heading = (
        f"\n[bold]{case.op.name} · {case.shapes_name} · {dtype_name(case.dtype)}[/]   "
        f"{len(case.shapes)} tensors, {count(case.shapes):,} parameters x "
        f"{case.op.moved_bytes(case.dtype)} B"
    )
    return Group(heading, *([shown] if table.results else []), *table.notes)


def host_report(table: Table) -> Group:
    """Shows host time per tensor."""
    tensors, shown = len(table.case.shapes), grid("µs per tensor", "spread", "vs torch")
    for each in table.results:
        microseconds = cell(each.seconds * 1e6 / tensors, ".3f")
        spread, ratio = cell(each.timing.spread, ".1%"), cell(table.ratio(each), ".2f")
        shown.add_row(each.name, microseconds, spread, ratio, style=STYLES[each.kind])
    heading = (
        f"\n[bold]{table.case.op.name} · host time · {dtype_name(table.case.dtype)}[/]   "
        f"{tensors} tensors of 1 element, gradients kept"
    )
    return Group(heading, shown)


def rows(table: Table, provenance: dict[str, str]) -> list[dict[str, str]]:
    """Returns the CSV rows of a table, the probes of the roof among them."""
    case, roof = table.case, table.roof_gbps
    shared = provenance | {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "threads": str(case.threads),
        "rounds": str(table.rounds),
        "shapes": case.shapes_name,
        "dtype": dtype_name(case.dtype),
        "op": case.op.name,
    }
    return [
        shared
        | {
            "provider": each.name,
            "ms": cell(each.seconds * 1e3, ".5g"),
            "spread": cell(each.timing.spread, ".4f"),
            "gbps": cell(each.gbps if roof else None, ".5g"),  # means nothing for host time
            "roof_gbps": cell(roof, ".5g"),
            "share": cell(table.share(each), ".4f"),
            "ratio": cell(table.ratio(each), ".4f"),
        }
        for each in table.results
    ]


def append_csv(path: Path, new_rows: list[dict[str, str]]) -> None:
    """Appends rows to a CSV file, made with its header if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(new_rows[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(new_rows)
