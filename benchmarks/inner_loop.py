"""The command `python -m benchmarks.inner_loop`: meta-gradients through five steps of momentum SGD.

All contestants run the same model on the same batch, five inner steps with a learned learning rate
and momentum, and one backward pass of the meta-loss to both and to the initial weights. The floor
does the same with a step that computes nothing: one node of the graph, which passes weights through
and gives the gradient of the weights to theirs. What a contestant takes beyond it is its own.
"""

from __future__ import annotations

import csv
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import higher as original
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

import fused_opt.higher

from .machine import provenance
from .reference import WrongResultError
from .report import cell
from .timing import Repeated, Rounds, Run, Timing, interleave, wall_clock

RESULTS = "inner_loop.csv"
STEPS = 5
LR, MOMENTUM = 0.1, 0.9
FLOOR = "floor: no update"
TOLERANCE = 1e-4  # of float32 results, relative to the largest of a tensor


# ---- What is run ---------------------------------------------------------------------------------


def toy() -> nn.Module:
    """One weight."""
    return nn.Linear(1, 1, bias=False)


def mlp() -> nn.Module:
    """0.94 million parameters in ten tensors."""
    sizes = [(144, 512), (512, 512), (512, 512), (512, 512), (512, 144)]
    layers = [layer for size in sizes for layer in (nn.Linear(*size), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def small() -> nn.Module:
    """200 tensors of 16 to 256 elements."""
    layers = [layer for _ in range(100) for layer in (nn.Linear(16, 16), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


MODELS: dict[str, Callable[[], nn.Module]] = {"toy": toy, "mlp": mlp, "small": small}


class Task:
    """A model, its data, and the hyper-parameters that are learned."""

    def __init__(self, name: str, batch: int = 16) -> None:
        torch.manual_seed(0)
        self.model = MODELS[name]()
        inputs = next(iter(self.model.parameters())).shape[1]
        self.x, self.y = torch.randn(batch, inputs), torch.randn(batch, inputs)
        self.lr = torch.tensor([LR], requires_grad=True)
        self.momentum = torch.tensor([MOMENTUM], requires_grad=True)
        self.opt = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=MOMENTUM)
        self.names = [name for name, _ in self.model.named_parameters()]

    @property
    def learned(self) -> list[Tensor]:
        """What the meta-gradient is by."""
        return [self.lr, self.momentum, *self.model.parameters()]

    def loss(self, output: Tensor) -> Tensor:
        """Of either loop."""
        return mse_loss(output, self.y)

    def run(self, params: Sequence[Tensor]) -> Tensor:
        """The model's output with these weights, as a hand-written loop has it."""
        return functional_call(self.model, dict(zip(self.names, params, strict=True)), (self.x,))


Inner = Callable[[Task], Tensor]  # the meta-loss after the inner steps


def with_package(task: Task, package: Any) -> Tensor:
    """As `higher` has it."""
    options = {
        "copy_initial_weights": False,
        "override": {"lr": [task.lr], "momentum": [task.momentum]},
    }
    with package.innerloop_ctx(task.model, task.opt, **options) as (fmodel, diffopt):
        for _ in range(STEPS):
            diffopt.step(task.loss(fmodel(task.x)))
        return task.loss(fmodel(task.x))


Tensors = list[Tensor]
Update = Callable[[Task, Tensors, Sequence[Tensor], Tensors | None], tuple[Tensors, Tensors]]


def by_hand(task: Task, update: Update) -> Tensor:
    """As one writes it without a package."""
    params, momentum = [param.clone() for param in task.model.parameters()], None
    for _ in range(STEPS):
        grads = torch.autograd.grad(task.loss(task.run(params)), params, create_graph=True)
        params, momentum = update(task, params, grads, momentum)
    return task.loss(task.run(params))


def update_in_a_loop(
    task: Task, params: Tensors, grads: Sequence[Tensor], momentum: Tensors | None
) -> tuple[Tensors, Tensors]:
    """One operation after the other."""
    new = list(grads)
    if momentum is not None:
        new = [task.momentum * v + g for v, g in zip(momentum, grads, strict=True)]
    return [p - task.lr * v for p, v in zip(params, new, strict=True)], new


def update_by_foreach(
    task: Task, params: Tensors, grads: Sequence[Tensor], momentum: Tensors | None
) -> tuple[Tensors, Tensors]:
    """In multi-tensor calls of lists: those of a list and one tensor have no second derivative."""
    new, count = list(grads), len(params)
    if momentum is not None:
        new = list(torch._foreach_mul(momentum, [task.momentum] * count))
        new = list(torch._foreach_add(new, list(grads)))
    steps = torch._foreach_mul(new, [task.lr] * count)
    return list(torch._foreach_sub(params, steps)), new


def in_one_vector(task: Task) -> Tensor:
    """By hand, with all weights in one vector, whose parts the model sees."""
    vector = torch.cat([param.flatten() for param in task.model.parameters()])
    shapes = [param.shape for param in task.model.parameters()]
    sizes = [shape.numel() for shape in shapes]
    momentum = None
    for step in range(STEPS + 1):
        parts = zip(vector.split(sizes), shapes, strict=True)
        loss = task.loss(task.run([part.view(shape) for part, shape in parts]))
        if step == STEPS:
            return loss
        (grad,) = torch.autograd.grad(loss, vector, create_graph=True)
        momentum = grad if momentum is None else task.momentum * momentum + grad
        vector = vector - task.lr * momentum
    raise AssertionError


class Pass(torch.autograd.Function):
    """The same graph without arithmetic."""

    @staticmethod
    def forward(_: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, *grads, *grads


def no_update(
    _: Task, params: Tensors, grads: Sequence[Tensor], __: Tensors | None
) -> tuple[Tensors, Tensors]:
    """The floor."""
    return list(Pass.apply(len(params), *params, *grads)), []


CONTESTANTS: dict[str, Inner] = {
    "fused_opt.higher": partial(with_package, package=fused_opt.higher),
    "higher": partial(with_package, package=original),
    "torch": partial(by_hand, update=update_in_a_loop),
    "torch foreach": partial(by_hand, update=update_by_foreach),
    "torch, one vector": in_one_vector,
    FLOOR: partial(by_hand, update=no_update),
}


# ---- Measuring -----------------------------------------------------------------------------------


def meta_gradients(task: Task, inner: Inner) -> tuple[Tensor, ...]:
    """Both loops once."""
    return torch.autograd.grad(inner(task), task.learned, allow_unused=True)


def check(name: str, task: Task) -> None:
    """Raises unless all contestants give the same meta-gradients."""
    expected = meta_gradients(task, CONTESTANTS["torch"])
    for contestant, inner in CONTESTANTS.items():
        if contestant == FLOOR:
            continue
        for found, wanted in zip(meta_gradients(task, inner), expected, strict=True):
            error = (found - wanted).abs().max() / wanted.abs().max()
            if not error < TOLERANCE:
                raise WrongResultError(f"{contestant} on {name}: meta-gradient off by {error:.1e}")


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of tensors on the CPU that a run has at one time, beyond those at first."""
    run()
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


@contextmanager
def collected() -> Iterator[None]:
    """Leaves no garbage: modules of `higher` refer to each other in circles."""
    gc.collect()
    yield
    gc.collect()


@dataclass(frozen=True)
class Result:
    """Of a contestant on a model: a fifth of both loops, and the memory of both."""

    name: str
    timing: Timing
    peak: int

    @property
    def ms(self) -> float:
        """Milliseconds per inner step, the meta-gradient's share among them."""
        return self.timing.seconds * 1e3 / STEPS


def measure(name: str, rounds: int) -> list[Result]:
    """Checks and times all contestants on a model."""
    task = Task(name)
    check(name, task)
    runs = {each: partial(meta_gradients, task, inner) for each, inner in CONTESTANTS.items()}

    def clock(run: Run) -> float:
        with collected():
            return repeated(run)

    repeated = Repeated(wall_clock)
    timings = interleave(runs, Rounds.exactly(rounds), clock)
    return [Result(each, timings[each], peak_bytes(run)) for each, run in runs.items()]


def over_floor(result: Result, results: list[Result]) -> float:
    """Milliseconds per inner step beyond the floor."""
    return result.ms - next(each.ms for each in results if each.name == FLOOR)


def ratio(result: Result, results: list[Result], to: str) -> float:
    """The time of another contestant over this one's."""
    return next(each.ms for each in results if each.name == to) / result.ms


def grid(*columns: str) -> Table:
    """Returns an empty table: names to the left, numbers to the right."""
    shown = Table(box=box.SIMPLE)
    shown.add_column("provider", no_wrap=True)
    for name in columns:
        shown.add_column(name, justify="right", no_wrap=True)
    return shown


def save(rows: list[dict[str, str]], folder: Path) -> None:
    """Writes the rows of a run."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / RESULTS).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(
    models: Annotated[str, typer.Option(help="To run, separated by commas.")] = ",".join(MODELS),
    rounds: Annotated[int, typer.Option(min=1, help="Samples per median.")] = 31,
    out: Annotated[Path | None, typer.Option(help=f"Folder for {RESULTS}, replaced there.")] = None,
) -> None:
    """Times meta-gradients through five inner steps, on one thread."""
    torch.set_num_threads(1)
    console, origin = Console(), provenance(torch.device("cpu"))
    console.print(" · ".join(f"{name} {value}" for name, value in origin.items() if value))
    kept: list[dict[str, str]] = []
    for name in models.split(","):
        results = measure(name, rounds)
        shown = grid("ms per step", "spread", "over floor", "vs higher", "vs torch", "peak MB")
        for each in results:
            numbers = {
                "ms": cell(each.ms, ".5g"),
                "spread": cell(each.timing.spread, ".4f"),
                "over_floor_ms": cell(over_floor(each, results), ".5g"),
                "vs_higher": cell(ratio(each, results, "higher"), ".4f"),
                "vs_torch": cell(ratio(each, results, "torch"), ".4f"),
                "peak_mb": cell(each.peak / 1e6, ".5g"),
            }
            shown.add_row(each.name, *(f"{float(number):.4g}" for number in numbers.values()))
            kept.append(
                {**origin, "rounds": str(rounds), "model": name, "provider": each.name, **numbers}
            )
        console.print(f"\n[bold]{STEPS} inner steps · {name}[/]", shown)
    if out:
        save(kept, out)


if __name__ == "__main__":
    typer.run(main)
