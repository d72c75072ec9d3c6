"""The commands of `python -m benchmarks`: run, which is meant where none is named, and others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from typer.core import TyperGroup

from . import plan
from .compare import compare, comparison_table
from .machine import provenance
from .ops import DTYPES, OPS
from .providers import PEERS
from .reference import WrongResultError
from .report import LEGEND, WIDTH, case_report, markdown, summary
from .rows import BadResultsError, Row, find, load, save
from .shapes import SHAPES, SWEEPS
from .shapes import load as load_shapes
from .suite import Case, How, measure
from .timing import Rounds

FULL_ROUNDS = Rounds(least=11, most=101, seconds=3.0)
QUICK_ROUNDS = Rounds(least=5, most=51, seconds=0.4)


class RunByDefault(TyperGroup):
    """A group whose first command is meant where an argument list names none."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Puts `run` in front."""
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=RunByDefault,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Measures fused_opt against other optimizers. Without a command name: `run`.",
)


class Device(str, Enum):
    """The devices of the command line."""

    CPU, CUDA = "cpu", "cuda"


def terminal() -> Console:
    """Returns the console; where no terminal says how wide it is, tables get the room they need."""
    console = Console()
    return console if console.is_terminal else Console(width=max(WIDTH, console.width))


@contextmanager
def progress(console: Console, total: int) -> Iterator[tuple[Progress, TaskID]]:
    """Shows a bar over the cases, and what is being done."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield bar, bar.add_task("starting", total=total)


@app.command()
def run(
    device: Annotated[Device, typer.Option(help="Where to measure.")] = Device.CPU,
    dtype: Annotated[
        str | None, typer.Option(help=f"Of parameters and gradients: {', '.join(DTYPES)}.")
    ] = None,
    shapes: Annotated[
        str | None, typer.Option(help=f"Lists of tensors: {', '.join([*SHAPES, *SWEEPS])}.")
    ] = None,
    ops: Annotated[str | None, typer.Option(help=f"What to time: {', '.join(OPS)}.")] = None,
    against: Annotated[str | None, typer.Option(help=f"Peers: {', '.join(PEERS)}.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    repeat: Annotated[
        int | None, typer.Option(min=1, help="Rounds; else as many as time allows.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Few cases and rounds: under a minute.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for DEVICE.csv and DEVICE.json, replaced there.")
    ] = None,
) -> None:
    """Measures, prints tables, and writes rows. Options take lists separated by commas.

    What is not said is chosen: models, steps and sweeps that take about eight minutes on a CPU, or
    less than one with --quick. Every result is checked before it is timed.
    """
    if device is Device.CUDA and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device here", param_hint="--device")
    try:
        wanted = plan.cases(shapes, ops, dtype, quick=quick, device=device.value)
        peers = plan.peers(against)
    except plan.UnknownNameError as error:
        raise typer.BadParameter(str(error)) from None
    torch.set_num_threads(threads)
    where, console = torch.device(device.value), terminal()
    rounds = QUICK_ROUNDS if quick else FULL_ROUNDS
    how = How(Rounds.exactly(repeat) if repeat else rounds, peers, compiles=not quick)
    cases = [
        Case(OPS[op], name, load_shapes(name), DTYPES[dtype_name], where, threads)
        for name, op, dtype_name in wanted
    ]
    folder = out or Path("benchmark-results", f"{datetime.now(timezone.utc):%Y-%m-%dT%H-%M-%S}")
    try:
        rows = measure_all(console, cases, how, folder)
    except WrongResultError as error:
        console.print(f"[bold red]{error}[/]\nNothing is timed on a wrong result.")
        raise typer.Exit(1) from None
    console.print(summary(rows))


def measure_all(console: Console, cases: list[Case], how: How, folder: Path) -> list[Row]:
    """Measures the cases, shows each, and keeps the rows of those that are done at any time."""
    device = cases[0].device
    origin = provenance(device)
    console.print(" · ".join(f"{name} {value}" for name, value in origin.items() if value))
    console.print(LEGEND, highlight=False)
    rows: list[Row] = []
    with progress(console, len(cases)) as (bar, task):
        for case in cases:
            name = f"{case.op.name} · {case.shapes_name}"

            def tell(what: str, name: str = name) -> None:
                bar.update(task, description=f"{name}: {what}")

            found = measure(case, how, origin, tell)
            console.print(case_report(found))
            rows += found
            files = save(rows, folder, device.type)
            bar.advance(task)
    console.print(f"\nRows: {', '.join(map(str, files))}", highlight=False, soft_wrap=True)
    return rows


Files = Annotated[list[Path], typer.Argument(help="CSV or JSON files of runs, or their folders.")]


@app.command()
def table(files: Files) -> None:
    """Prints the Markdown table of a run, as the README has it."""
    for path in known(files):
        print(markdown(rows_of(path)))


@app.command()
def plot(
    files: Files, out: Annotated[Path, typer.Option(help="Folder for the plots.")] = Path()
) -> None:
    """Draws bandwidth, ratios and host times of runs, as PNG and SVG named after each file."""
    from .plot import draw  # needs matplotlib, which measuring does not

    for path in known(files):
        for written in draw(rows_of(path), out, path.stem):
            print(written)


def known(paths: list[Path]) -> list[Path]:
    """Returns the files that are meant, or says what is wrong with them."""
    try:
        return find(paths)
    except BadResultsError as error:
        raise typer.BadParameter(str(error)) from None


def rows_of(path: Path) -> list[Row]:
    """Returns the rows of a file, or says what is wrong with it."""
    try:
        return load(path)
    except BadResultsError as error:
        raise typer.BadParameter(str(error)) from None


@app.command("compare")
def compare_runs(
    before: Annotated[Path, typer.Argument(help="A file or folder of a run: A.")],
    after: Annotated[Path, typer.Argument(help="Of a later run: B.")],
) -> None:
    """Says where fused_opt became slower from A to B, beyond the noise; then exits with 1."""
    runs = [[row for path in known([each]) for row in rows_of(path)] for each in (before, after)]
    comparison, console = compare(*runs), terminal()
    for warning in comparison.warnings:
        console.print(f"[yellow]Warning:[/] {warning}", highlight=False)
    if not comparison.changes:
        raise typer.BadParameter("the runs have no case in common")
    console.print(comparison_table(comparison))
    found = len(comparison.regressions)
    console.print(f"{found} of {len(comparison.changes)} times are slower beyond their noise.")
    raise typer.Exit(1 if found else 0)
