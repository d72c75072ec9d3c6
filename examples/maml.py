"""MAML learns to fit a sine wave from ten points, and with which learning rates to do it.

Every task is a sine wave of its own amplitude and phase. The inner loop takes a few steps of SGD on
ten of its points, and the outer loop moves the start of the inner one, and a learning rate for each
layer, so that the error on other points of the wave falls (Finn et al., "Model-agnostic
meta-learning", ICML 2017; Li et al., "Meta-SGD", 2017). Both gradients come from one backward pass
through the steps. What comes out is compared with the start that nothing was learned for.

    python examples/maml.py
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fused_opt
import fused_opt.higher as higher

SHOTS = 10  # points of a task that the inner loop sees, and that the outer loop compares
HIDDEN = 40  # units of each of two layers, as in the paper
FIRST_LR = 0.01  # of every layer before it is learned
META_LR = 2e-3  # Adam's, for the weights; learned learning rates move ten times as fast
TEST_TASKS = 100
TEST_STEPS = 10
GRID = (0.001, 0.003, 0.01, 0.03, 0.1)  # learning rates, of which the unlearned start gets its best
EDGE = 5.0  # waves are drawn from -5 to 5


# ---- Tasks ---------------------------------------------------------------------------------------


class Wave(NamedTuple):
    """The task to find y = amplitude sin(x - phase)."""

    amplitude: Tensor
    phase: Tensor

    @classmethod
    def draw(cls, random: torch.Generator) -> Wave:
        """Draws amplitude and phase as the paper does."""
        amplitude, phase = torch.rand(2, generator=random)
        return cls(0.1 + 4.9 * amplitude, math.pi * phase)

    def at(self, x: Tensor) -> Tensor:
        """The wave itself."""
        return self.amplitude * torch.sin(x - self.phase)

    def points(self, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draws points on it."""
        x = EDGE * (2 * torch.rand(SHOTS, 1, generator=random) - 1)
        return x, self.at(x)


# ---- Learning ------------------------------------------------------------------------------------


class Learner:
    """A start for the inner loop, and a learning rate for each layer."""

    def __init__(self) -> None:
        sizes = [(1, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 1)]
        self.layers = [nn.Linear(inputs, outputs) for inputs, outputs in sizes]
        first, second, last = self.layers
        self.model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)
        self.inner = fused_opt.SGD([{"params": layer.parameters()} for layer in self.layers])
        # Logarithms, so that any step leaves the learning rates positive.
        self.log_lrs = [torch.tensor(math.log(FIRST_LR), requires_grad=True) for _ in self.layers]

    @property
    def lrs(self) -> list[Tensor]:
        """The learning rate of each layer."""
        return [log_lr.exp() for log_lr in self.log_lrs]

    def adapted_error(self, wave: Wave, steps: int, random: torch.Generator) -> Tensor:
        """The error on new points after steps on others; its gradient passes through the steps."""
        x, y = wave.points(random)
        with higher.innerloop_ctx(
            self.model, self.inner, copy_initial_weights=False, override={"lr": self.lrs}
        ) as (fmodel, diffopt):
            for _ in range(steps):
                diffopt.step(mse_loss(fmodel(x), y))
            x, y = wave.points(random)
            return mse_loss(fmodel(x), y)

    def curve(self, x: Tensor, points: tuple[Tensor, Tensor], lrs: list[float]) -> Tensor:
        """What the model says at ``x`` at first and after each step on the points."""
        said = []
        with higher.innerloop_ctx(
            self.model, self.inner, override={"lr": lrs}, track_higher_grads=False
        ) as (fmodel, diffopt):
            for step in range(TEST_STEPS + 1):
                said.append(fmodel(x).detach())
                if step < TEST_STEPS:
                    diffopt.step(mse_loss(fmodel(points[0]), points[1]))
        return torch.stack(said)


@dataclass
class Run:
    """The course of the meta-training."""

    errors: list[float] = field(default_factory=list)  # of each outer step, after the inner ones
    lrs: list[list[float]] = field(default_factory=list)  # before each outer step
    seconds: float = 0.0


def meta_train(
    learner: Learner, outer_steps: int, tasks: int, inner_steps: int, seed: int, progress: Progress
) -> Run:
    """Learns start and learning rates, a few tasks at a time."""
    random = torch.Generator().manual_seed(seed)
    outer = torch.optim.Adam(
        [
            {"params": learner.model.parameters(), "lr": META_LR},
            {"params": learner.log_lrs, "lr": 10 * META_LR},
        ]
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(outer, outer_steps)
    run, start = Run(), time.perf_counter()
    bar = progress.add_task("MAML", total=outer_steps, error="")
    for _ in range(outer_steps):
        run.lrs.append([float(lr.detach()) for lr in learner.lrs])
        outer.zero_grad()
        total = 0.0
        for _ in range(tasks):
            error = learner.adapted_error(Wave.draw(random), inner_steps, random) / tasks
            error.backward()
            total += float(error.detach())
        outer.step()
        schedule.step()
        run.errors.append(total)
        progress.update(bar, advance=1, error=f"{sum(run.errors[-100:]) / 100:.2f}")
    run.seconds = time.perf_counter() - start
    return run


# ---- What it shows -------------------------------------------------------------------------------


def test_errors(learner: Learner, lrs: list[float], seed: int) -> Tensor:
    """The mean square error of the whole wave after each step, mean of new tasks."""
    random = torch.Generator().manual_seed(seed)
    x = torch.linspace(-EDGE, EDGE, 100).unsqueeze(1)
    total = torch.zeros(TEST_STEPS + 1)
    for _ in range(TEST_TASKS):
        wave = Wave.draw(random)
        said = learner.curve(x, wave.points(random), lrs)
        total += (said - wave.at(x)).square().mean(dim=(1, 2))
    return total / TEST_TASKS


@dataclass(frozen=True)
class Contestant:
    """A learner with its learning rates, and how it does on new tasks."""

    name: str
    color: str
    learner: Learner
    lrs: list[float]
    errors: Tensor


def compete(learned: Learner, unlearned: Learner, seed: int) -> list[Contestant]:
    """Tests both, the unlearned start with the constant learning rate that suits it best."""
    trials = {lr: test_errors(unlearned, [lr] * 3, seed) for lr in GRID}
    best = min(GRID, key=lambda lr: float(trials[lr][-1].nan_to_num(math.inf)))
    lrs = [float(lr.detach()) for lr in learned.lrs]
    return [
        Contestant("learned", "#00518f", learned, lrs, test_errors(learned, lrs, seed)),
        Contestant(f"not learned, lr {best}", "#b03a00", unlearned, [best] * 3, trials[best]),
    ]


def summary(contestants: list[Contestant]) -> Table:
    """Returns the table of results."""
    table = Table(title=f"Mean square error after steps on {SHOTS} points, of {TEST_TASKS} waves")
    table.add_column("Start")
    for step in (0, 1, 3, TEST_STEPS):
        table.add_column(f"{step} steps", justify="right")
    for each in contestants:
        errors = (f"{float(each.errors[step]):.3f}" for step in (0, 1, 3, TEST_STEPS))
        table.add_row(each.name, *errors)
    return table


def plot_task(axes: Axes, contestants: list[Contestant]) -> None:
    """Draws what both make of one wave."""
    wave = Wave(torch.tensor(4.0), torch.tensor(1.0))
    points = wave.points(torch.Generator().manual_seed(3))
    x = torch.linspace(-EDGE, EDGE, 200).unsqueeze(1)
    axes.plot(x, wave.at(x), color="0.6", lw=4, label="wave")
    for each in contestants:
        said = each.learner.curve(x, points, each.lrs)
        axes.plot(x, said[0], color=each.color, ls=":", label=f"{each.name}: start")
        axes.plot(x, said[3], color=each.color, lw=2, label=f"{each.name}: 3 steps")
    axes.plot(*points, "ko", label="points")
    axes.set(title="A new wave", xlabel="x", ylim=(-6.5, 6.5))
    axes.legend(frameon=False, fontsize="small", ncols=2, loc="lower center")


def plot(run: Run, contestants: list[Contestant], path: Path) -> None:
    """Draws errors on new tasks, one of these, and the learning rates, into a PNG."""
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    errors, task, rates = figure.subplots(1, 3)
    for each in contestants:
        errors.plot(each.errors, "o-", color=each.color, lw=2, label=each.name)
    errors.set(title="Mean square error on new waves", xlabel="steps on ten points", yscale="log")
    errors.legend(frameon=False)
    plot_task(task, contestants)
    for layer, color in enumerate(("#00518f", "#3a8fb7", "#9cc4d9")):
        rates.plot([lrs[layer] for lrs in run.lrs], color=color, lw=2, label=f"layer {layer + 1}")
    rates.set(title="Learned learning rates", xlabel="outer steps", yscale="log")
    rates.legend(frameon=False)
    for axes in (errors, task, rates):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main(
    outer_steps: Annotated[int, typer.Option(min=1, help="Steps of the outer loop.")] = 1500,
    tasks: Annotated[int, typer.Option(min=1, help="Waves per outer step.")] = 8,
    inner_steps: Annotated[int, typer.Option(min=1, help="Steps of the inner loop.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the start and the waves.")] = 0,
    output: Annotated[Path, typer.Option(help="Where the plot goes, a PNG.")] = Path("maml.png"),
) -> None:
    """Meta-learns to fit sine waves, and compares with a start that is not learned."""
    torch.set_num_threads(1)  # More gain nothing on a net this small.
    console = Console()
    torch.manual_seed(seed)
    learned, unlearned = Learner(), Learner()
    unlearned.model.load_state_dict(learned.model.state_dict())
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("error {task.fields[error]}"),
        console=console,
    ) as progress:
        run = meta_train(learned, outer_steps, tasks, inner_steps, seed, progress)
    contestants = compete(learned, unlearned, seed + 1)
    console.print(summary(contestants))
    shown = ", ".join(f"{lr:.3f}" for lr in contestants[0].lrs)
    console.print(f"Learned learning rates: {shown}. Trained in {run.seconds:.0f} s")
    output.parent.mkdir(parents=True, exist_ok=True)
    plot(run, contestants, output)
    print(output.resolve())


if __name__ == "__main__":
    typer.run(main)
