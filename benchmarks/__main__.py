"""The command `python -m benchmarks`: measures, prints tables, and appends rows to a CSV file."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from .machine import provenance
from .providers import OPS
from .reference import WrongResultError
from .report import DTYPE_NAMES, append_csv, bandwidth_report, host_report, rows
from .shapes import SHAPES, load
from .suite import Case, Table, measure, measure_host

RESULTS = Path(__file__).parent / "results"
DEFAULT_SHAPES = ["resnet50", "gpt2", "small"]
QUICK_SHAPES = ["resnet50", "small"]
ROUNDS, QUICK_ROUNDS = 31, 5

LEGEND = """
ms        median over the rounds
spread    width of the middle half of the samples, relative to the median
GB/s      bytes that one pass must move, the same for every provider, per time
roof      share of the best bandwidth among the probes
vs torch  time of torch's fastest over this one: above 1 is faster than torch"""


class Dtype(str, Enum):
    """The dtypes of the command line."""

    FP32, BF16, FP16 = "fp32", "bf16", "fp16"


class Device(str, Enum):
    """The devices of the command line."""

    CPU, CUDA = "cpu", "cuda"


def shape_names(values: list[str], quick: bool) -> list[str]:
    """Returns the names of the shape lists that were asked for, comma lists taken apart."""
    names = [name.strip() for value in values for name in value.split(",")]
    unknown = sorted(set(names) - set(SHAPES))
    if unknown:
        raise typer.BadParameter(f"unknown shapes {unknown}; known are {list(SHAPES)}")
    return names or (QUICK_SHAPES if quick else DEFAULT_SHAPES)


def main(
    shapes: Annotated[
        list[str] | None, typer.Option(help=f"Lists to run, of {', '.join(SHAPES)}.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of parameters, gradients, momentum.")] = Dtype.FP32,
    device: Annotated[Device, typer.Option()] = Device.CPU,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    rounds: Annotated[int | None, typer.Option(min=1, help="Samples per median.")] = None,
    host: Annotated[bool, typer.Option(help="Also measure the host time per tensor.")] = True,
    csv: Annotated[Path | None, typer.Option(help="Append rows to this file.")] = None,
    record: Annotated[
        bool, typer.Option(help="Append to benchmarks/results/<device>.csv.")
    ] = False,
    quick: Annotated[bool, typer.Option(help="Few rounds, small lists: a smoke test.")] = False,
) -> None:
    """Compares fused_opt with torch's optimizers on one machine, in one run."""
    if device is Device.CUDA and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device here", param_hint="--device")
    torch.set_num_threads(threads)
    element = DTYPE_NAMES[dtype.value]
    console, where = Console(), torch.device(device.value)
    origin = provenance(where)
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    targets = [csv] if csv else []
    targets += [RESULTS / f"{where.type}.csv"] if record else []

    def keep(table: Table) -> None:
        for path in targets:  # at once, so that an interrupted run keeps what it measured
            append_csv(path, rows(table, origin))

    console.print(" · ".join(f"{name} {value}" for name, value in origin.items() if value))
    console.print(LEGEND)
    try:
        for name in shape_names(shapes or [], quick):
            for op in (each for each in OPS if each.suits(element)):
                case = Case(op, name, load(name), element, where, threads)
                table = measure(case, rounds)
                console.print(bandwidth_report(table))
                keep(table)
        for op in (each for each in OPS if host and each.suits(torch.float32)):
            table = measure_host(op, where, threads, rounds)
            console.print(host_report(table))
            keep(table)
    except WrongResultError as error:
        console.print(f"[bold red]{error}[/]\nNothing is timed on a wrong result.")
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
