"""The demo: a small CNN learns handwritten digits twice, from the same seed.

The first run takes its steps with ``torch.optim.SGD`` and keeps an exponential moving average (EMA)
of the weights by hand; the second hands both jobs to ``fused_opt.SGD``. A table and a plot then
compare what they learned and what their steps cost. ``make demo`` runs this file.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple, Protocol

import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fused_opt

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
EMA_DECAY = 0.99  # an average over about 100 steps, two epochs
TEST_SHARE = 0.5  # few training images leave something to generalize to


# ---- The two ways to take a step -----------------------------------------------------------------


class Stepper(Protocol):
    """Advances a model and the average of its weights."""

    @property
    def sgd(self) -> torch.optim.SGD:
        """The optimizer."""

    def step(self) -> None:
        """Updates the weights from their gradients, then the averages from the weights."""

    def average_parameters(self) -> AbstractContextManager[None]:
        """Lets the model hold the averaged weights inside a ``with`` block."""


class TorchStepper:
    """torch's fastest path: its fused SGD, and one multi-tensor lerp for the EMA."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.params: list[Tensor] = list(model.parameters())
        self.shadows = [param.detach().clone() for param in self.params]
        self.sgd = torch.optim.SGD(
            self.params, lr, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True, fused=True
        )

    def step(self) -> None:
        """Sweeps over the weights twice."""
        self.sgd.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.shadows, self.params, 1 - EMA_DECAY)

    @contextmanager
    @torch.no_grad()
    def average_parameters(self) -> Iterator[None]:
        """Swaps the averages in, and the weights back."""
        weights = [param.clone() for param in self.params]
        torch._foreach_copy_(self.params, self.shadows)
        try:
            yield
        finally:
            torch._foreach_copy_(self.params, weights)


class FusedStepper:
    """fused_opt: the optimizer updates the averages in its own pass."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.ema = fused_opt.EMA(model, EMA_DECAY)
        self.sgd = fused_opt.SGD(
            model.parameters(), lr, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True, ema=self.ema
        )

    def step(self) -> None:
        """Sweeps over the weights once."""
        self.sgd.step()

    def average_parameters(self) -> AbstractContextManager[None]:
        """Swaps the averages in, and the weights back."""
        return self.ema.average_parameters()


STEPPERS: dict[str, Callable[[nn.Module, float], Stepper]] = {
    "torch, EMA by hand": TorchStepper,
    "fused_opt": FusedStepper,
}


# ---- Data, model, training -----------------------------------------------------------------------


class Digits(NamedTuple):
    """Images of 8 x 8 pixels in [0, 1], and the digits they show."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    epochs: int
    batch_size: int
    lr: float
    target_error: float | None
    seed: int


@dataclass
class Run:
    """The course of one training."""

    name: str

    # One entry per step; the seconds are those of the optimizer and the EMA only.
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)

    # One entry before the first epoch and one after each; errors and accuracies in percent.
    train_errors: list[float] = field(default_factory=list)
    raw_accuracies: list[float] = field(default_factory=list)
    ema_accuracies: list[float] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)  # all of them in one vector

    @property
    def epochs(self) -> int:
        """The number of epochs done."""
        return len(self.weights) - 1

    @property
    def step_microseconds(self) -> float:
        """The median time that the optimizer and the EMA take per step."""
        return statistics.median(self.step_seconds) * 1e6


def split_digits(seed: int) -> tuple[Digits, Digits]:
    """Returns scikit-learn's bundled digits as a training and a test set."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16  # grey levels are 0 to 16
    labels = torch.from_numpy(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order.tensor_split([round(len(order) * TEST_SHARE)])
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


def make_model(seed: int) -> nn.Module:
    """Returns a CNN of 549,000 parameters, the same one for the same seed.

    It is smooth (GELU, average pooling). A ReLU can flip on a difference in the last bit and send
    two trainings apart; here they stay together as far as rounding lets them.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.GELU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.GELU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(64 * 4 * 4, 512), nn.GELU(), nn.Linear(512, 10)),
    )
    for param in model.parameters():
        if param.dim() > 1:
            nn.init.kaiming_normal_(param)
        else:
            nn.init.zeros_(param)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, digits: Digits) -> float:
    """Returns the share of digits that the model names correctly, in percent."""
    hits = model(digits.images).argmax(dim=1) == digits.labels
    return 100 * float(hits.double().mean())


def train(run: Run, options: Options, progress: Progress) -> None:
    """Trains a fresh model, records its course in `run` and shows it as a progress bar."""
    train_set, test_set = split_digits(options.seed)
    model = make_model(options.seed)
    stepper = STEPPERS[run.name](model, options.lr)
    shuffle = torch.Generator().manual_seed(options.seed)
    steps = options.epochs * math.ceil(len(train_set.labels) / options.batch_size)
    bar = progress.add_task(run.name, total=steps, loss="")
    record(run, model, stepper, train_set, test_set)
    for _ in range(options.epochs):
        order = torch.randperm(len(train_set.labels), generator=shuffle)
        for batch in order.split(options.batch_size):
            loss = train_step(run, model, stepper, Digits(*(part[batch] for part in train_set)))
            progress.update(bar, advance=1, loss=f"{loss:.4f}")
        record(run, model, stepper, train_set, test_set)
        if options.target_error is not None and run.train_errors[-1] <= options.target_error:
            progress.update(bar, total=len(run.losses))
            break


def train_step(run: Run, model: nn.Module, stepper: Stepper, batch: Digits) -> float:
    """Takes one step on a mini-batch and returns its loss; only the optimizer's part is timed."""
    stepper.sgd.zero_grad()
    loss = cross_entropy(model(batch.images), batch.labels)
    loss.backward()  # type: ignore[no-untyped-call]
    start = time.perf_counter()
    stepper.step()
    run.step_seconds.append(time.perf_counter() - start)
    run.losses.append(loss.item())
    return run.losses[-1]


def record(
    run: Run, model: nn.Module, stepper: Stepper, train_set: Digits, test_set: Digits
) -> None:
    """Measures the model with its raw and its averaged weights, and copies the raw ones."""
    run.train_errors.append(100 - accuracy(model, train_set))
    run.raw_accuracies.append(accuracy(model, test_set))
    with stepper.average_parameters():
        run.ema_accuracies.append(accuracy(model, test_set))
    run.weights.append(torch.cat([param.detach().flatten() for param in model.parameters()]))


# ---- What the two runs show ----------------------------------------------------------------------


def comparison(torch_run: Run, fused_run: Run) -> Table:
    """Returns the table of results."""
    runs = torch_run, fused_run
    table = Table(title="Handwritten digits, trained twice from the same seed")
    table.add_column()
    for run in runs:
        table.add_column(run.name, justify="right")

    table.add_row("Steps (epochs)", *(f"{len(run.losses):,} ({run.epochs})" for run in runs))
    table.add_row("Training error", *(f"{run.train_errors[-1]:.2f} %" for run in runs))
    table.add_row(
        "Test accuracy, raw weights", *(f"{run.raw_accuracies[-1]:.2f} %" for run in runs)
    )
    table.add_row(
        "Test accuracy, EMA weights", *(f"{run.ema_accuracies[-1]:.2f} %" for run in runs)
    )
    table.add_section()
    for epoch in sorted({1, min(run.epochs for run in runs)}):
        difference = (torch_run.weights[epoch] - fused_run.weights[epoch]).abs().max()
        table.add_row(f"Largest weight difference, epoch {epoch}", "", f"{difference:.1e}")
    table.add_section()
    times = [run.step_microseconds for run in runs]
    table.add_row("Optimizer + EMA, median per step", *(f"{time:.0f} µs" for time in times))
    table.add_row("Speed against torch", *(f"{times[0] / time:.2f}x" for time in times))
    return table


def plot(torch_run: Run, fused_run: Run, path: Path) -> None:
    """Draws both runs into a PNG: the loss over time, and the test accuracy after each epoch."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    # The curves coincide, so the first is a broad pale band and the second a thin dark line on it.
    plot_run(losses, accuracies, torch_run, ("#f5b78a", "#9ccbea"), width=6.0)
    plot_run(losses, accuracies, fused_run, ("#b03a00", "#00518f"), width=1.4)

    losses.set(
        title="Training loss, mean over the last epoch of steps", xlabel="epoch", yscale="log"
    )
    # The steep start may leave the picture: the differences between the curves come later.
    lowest = min(torch_run.ema_accuracies[2:] + fused_run.ema_accuracies[2:], default=0.0)
    accuracies.set(title="Test accuracy (%)", xlabel="epoch", ylim=(max(0.0, lowest - 5), 100.4))
    for axes in (losses, accuracies):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.02)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def plot_run(
    losses: Axes, accuracies: Axes, run: Run, colors: tuple[str, str], width: float
) -> None:
    """Adds the three curves of a run, in a color for the raw and one for the averaged weights."""
    raw_color, ema_color = colors
    window = len(run.losses) // run.epochs  # the steps of an epoch
    position = [step / window for step in range(len(run.losses))]
    means = trailing_mean(run.losses, window)
    losses.plot(position, means, color=raw_color, lw=width, label=run.name)
    accuracies.plot(run.raw_accuracies, color=raw_color, lw=width, label=f"{run.name}: raw weights")
    accuracies.plot(run.ema_accuracies, color=ema_color, lw=width, label=f"{run.name}: EMA weights")


def trailing_mean(values: list[float], window: int) -> list[float]:
    """Returns, for each value, the mean of it and of up to `window` - 1 values before it."""
    return [
        statistics.fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)
    ]


def progress_bar(console: Console) -> Progress:
    """Returns the bar that shows a run's steps, time and last loss."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("loss {task.fields[loss]}"),
        console=console,
    )


def main(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training set.")] = 20,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = 16,
    lr: Annotated[float, typer.Option(min=0.0, help="Learning rate.")] = 0.03,
    target_error: Annotated[
        float | None,
        typer.Option(min=0.0, max=100.0, help="Stop at this training error, in percent."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the split, the weights and the batches.")] = 0,
    output: Annotated[Path, typer.Option(help="Where the plot goes, a PNG.")] = Path("digits.png"),
) -> None:
    """Trains a small CNN on handwritten digits with torch.optim.SGD, then with fused_opt.SGD."""
    torch.set_num_threads(1)  # More gain nothing on a net this small, and would only add noise.
    options = Options(epochs, batch_size, lr, target_error, seed)
    console = Console()
    torch_run, fused_run = runs = [Run(name) for name in STEPPERS]
    with progress_bar(console) as progress:
        for run in runs:
            train(run, options, progress)
    console.print(comparison(torch_run, fused_run))
    output.parent.mkdir(parents=True, exist_ok=True)
    plot(torch_run, fused_run, output)
    print(output.resolve())


if __name__ == "__main__":
    typer.run(main)
