"""BYOL learns handwritten digits without their labels, from a target network that averages it.

Two random views of an image go through two networks. The online network is trained to predict what
the target makes of the other view, and the target is an average of the online network, updated in
the optimizer's own pass (Grill et al., "Bootstrap Your Own Latent", NeurIPS 2020). After each epoch
a linear probe, fitted to the features of a few labelled images, shows what the features are worth.

    python examples/byol.py
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cosine_similarity, grid_sample, one_hot

from fused_opt import SGD, TargetNetwork, schedules

FEATURES = 128
PROJECTION = 64
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
WARMUP_SHARE = 0.1  # of all steps
TEST_SHARE = 0.3
PROBES = 20  # each fitted to other labels, so that their mean hardly depends on the draw
RIDGE = 1e-2  # of the probes, relative to the mean square of a feature


# ---- Data ----------------------------------------------------------------------------------------


class Digits(NamedTuple):
    """Images of 8 x 8 pixels in [0, 1], and the digits they show."""

    images: Tensor
    labels: Tensor


def split_digits(seed: int) -> tuple[Digits, Digits]:
    """Returns scikit-learn's bundled digits as a training and a test set."""
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16  # grey levels are 0 to 16
    labels = torch.from_numpy(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order.tensor_split([round(len(order) * TEST_SHARE)])
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


def random_view(images: Tensor, random: torch.Generator) -> Tensor:
    """Turns, scales, shifts and brightens each image by chance, and adds noise."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(len(images)).uniform_(low, high, generator=random)

    angle, zoom = uniform(-0.4, 0.4), uniform(0.75, 1.25)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    shift_x, shift_y = uniform(-0.25, 0.25), uniform(-0.25, 0.25)  # a pixel is a quarter wide
    rows = (torch.stack([cos, -sin, shift_x], dim=1), torch.stack([sin, cos, shift_y], dim=1))
    grid = affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    view = grid_sample(images, grid, align_corners=False) * uniform(0.6, 1.4).view(-1, 1, 1, 1)
    return view + 0.1 * torch.randn(view.shape, generator=random)


# ---- The networks --------------------------------------------------------------------------------


def make_encoder() -> nn.Sequential:
    """Returns a small net whose output are the features."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(64, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU()),
        *(nn.Linear(256, FEATURES, bias=False), nn.BatchNorm1d(FEATURES), nn.ReLU()),
    )


def make_head(inputs: int) -> nn.Sequential:
    """Returns an MLP: the projector, and the predictor that only the online side has."""
    return nn.Sequential(
        *(nn.Linear(inputs, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU()),
        nn.Linear(256, PROJECTION),
    )


class Byol:
    """The networks, and the step that trains them."""

    def __init__(self, steps: int, lr: float, base_decay: float) -> None:
        self.encoder = make_encoder()
        self.online = nn.Sequential(self.encoder, make_head(FEATURES))
        self.predictor = make_head(PROJECTION)
        self.decay = schedules.cosine(base_decay, steps)
        # In training mode the target normalizes by its own batches, and needs no statistics.
        self.target = TargetNetwork(self.online, self.decay, buffers="ignore")
        self.optimizer = SGD(
            [*self.online.parameters(), *self.predictor.parameters()],
            lr,
            MOMENTUM,
            weight_decay=WEIGHT_DECAY,
            ema=self.target,
        )
        warmup = round(WARMUP_SHARE * steps)
        self.scheduler = schedules.CosineWarmup(steps, lr, warmup_steps=warmup).scheduler(
            self.optimizer
        )

    def step(self, one: Tensor, other: Tensor) -> float:
        """Takes a step on two views of the same images, and returns the loss."""
        self.optimizer.zero_grad()
        loss = (self.distance(one, other) + self.distance(other, one)) / 2
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()  # and the target's
        self.scheduler.step()
        return loss.item()

    def distance(self, one: Tensor, other: Tensor) -> Tensor:
        """How far the prediction from one view is from the target of the other, from 0 to 4."""
        predicted = self.predictor(self.online(one))
        return 2 - 2 * cosine_similarity(predicted, self.target(other)).mean()


# ---- What the features are worth -----------------------------------------------------------------


@torch.no_grad()
def features_of(encoder: nn.Module, images: Tensor) -> Tensor:
    """Returns the features of images, in eval mode."""
    encoder.eval()
    features: Tensor = encoder(images)
    encoder.train()
    return features


def probe_accuracy(train: Digits, test: Digits, per_digit: int, seed: int) -> float:
    """Returns the mean test accuracy of linear probes, in percent.

    Each is fitted by ridge regression to the features of so many random images of each digit.
    """
    random = torch.Generator().manual_seed(seed)
    return sum(_one_probe(train, test, per_digit, random) for _ in range(PROBES)) / PROBES


def _one_probe(train: Digits, test: Digits, per_digit: int, random: torch.Generator) -> float:
    shuffled = torch.randperm(len(train.labels), generator=random)
    labels = train.labels[shuffled]
    chosen = torch.cat([shuffled[labels == digit][:per_digit] for digit in range(10)])
    known, targets = train.images[chosen].double(), one_hot(train.labels[chosen], 10).double()
    mean, spread = known.mean(dim=0), known.std(dim=0) + 1e-6

    def standardized(features: Tensor) -> Tensor:
        scaled = (features.double() - mean) / spread
        return torch.cat([scaled, torch.ones(len(scaled), 1, dtype=torch.float64)], dim=1)

    inputs = standardized(train.images[chosen])
    penalty = RIDGE * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ targets)
    hits = (standardized(test.images) @ weights).argmax(dim=1) == test.labels
    return 100 * float(hits.double().mean())


# ---- Training ------------------------------------------------------------------------------------


@dataclass
class Run:
    """The course of the training."""

    pixel_accuracy: float  # of probes on the images themselves
    accuracies: list[float] = field(default_factory=list)  # at first, and after each epoch
    losses: list[float] = field(default_factory=list)  # the mean of each epoch
    decays: list[float] = field(default_factory=list)  # the target's, at the end of each epoch
    seconds: float = 0.0


def train(
    epochs: int,
    batch_size: int,
    lr: float,
    base_decay: float,
    labels: int,
    seed: int,
    progress: Progress,
) -> Run:
    """Trains without labels, and probes after each epoch."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    train_set, test_set = split_digits(seed)
    # In batches that are equally large, so that none is of one image, of which BatchNorm has no
    # statistics.
    per_epoch = min(math.ceil(len(train_set.images) / batch_size), len(train_set.images) // 2)
    byol = Byol(epochs * per_epoch, lr, base_decay)

    def probe() -> float:
        sets = [
            Digits(features_of(byol.encoder, digits.images), digits.labels)
            for digits in (train_set, test_set)
        ]
        return probe_accuracy(sets[0], sets[1], labels, seed)

    flat = [Digits(digits.images.flatten(1), digits.labels) for digits in (train_set, test_set)]
    run = Run(pixel_accuracy=probe_accuracy(flat[0], flat[1], labels, seed))
    run.accuracies.append(probe())
    start = time.perf_counter()
    bar = progress.add_task("BYOL", total=epochs, probe=f"{run.accuracies[0]:.1f} %")
    for _ in range(epochs):
        losses = []
        order = torch.randperm(len(train_set.images), generator=random)
        for batch in order.tensor_split(per_epoch):
            images = train_set.images[batch]
            losses.append(byol.step(random_view(images, random), random_view(images, random)))
        run.decays.append(byol.decay(byol.target.ema.num_updates))
        run.losses.append(sum(losses) / len(losses))
        run.accuracies.append(probe())
        progress.update(bar, advance=1, probe=f"{run.accuracies[-1]:.1f} %")
    run.seconds = time.perf_counter() - start
    return run


# ---- What it shows -------------------------------------------------------------------------------


def summary(run: Run, labels: int) -> Table:
    """Returns the table of results."""
    table = Table(title=f"Linear probes on {labels} labelled images of each digit")
    for column in ("Epoch", "Test accuracy", "BYOL loss", "Target decay"):
        table.add_column(column, justify="right")
    table.add_row("pixels", f"{run.pixel_accuracy:.2f} %", "", "")
    table.add_row("0", f"{run.accuracies[0]:.2f} %", "", "")
    last = len(run.losses)
    for epoch in sorted({1, last} | {round(share * last / 4) for share in (1, 2, 3)} - {0}):
        table.add_row(
            str(epoch),
            f"{run.accuracies[epoch]:.2f} %",
            f"{run.losses[epoch - 1]:.4f}",
            f"{run.decays[epoch - 1]:.5f}",
        )
    return table


def plot(run: Run, path: Path) -> None:
    """Draws the probes' accuracy and the loss after each epoch into a PNG."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    accuracies, losses = figure.subplots(1, 2)
    accuracies.plot(run.accuracies, color="#00518f", lw=2, label="features")
    accuracies.axhline(run.pixel_accuracy, color="#b03a00", ls="--", label="pixels")
    accuracies.set(title="Test accuracy of linear probes (%)", xlabel="epoch")
    accuracies.legend(frameon=False)
    losses.plot(range(1, len(run.losses) + 1), run.losses, color="#00518f", lw=2)
    losses.set(title="BYOL loss, mean of the epoch", xlabel="epoch")
    for axes in (accuracies, losses):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training set.")] = 100,
    batch_size: Annotated[int, typer.Option(min=2, help="Images per step.")] = 128,
    lr: Annotated[float, typer.Option(min=1e-6, help="Highest learning rate.")] = 0.3,
    base_decay: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The target's decay at first; it rises to 1.")
    ] = 0.97,
    labels: Annotated[int, typer.Option(min=1, help="Of each digit, for a probe.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the split, the weights and the batches.")] = 0,
    output: Annotated[Path, typer.Option(help="Where the plot goes, a PNG.")] = Path("byol.png"),
) -> None:
    """Trains BYOL on handwritten digits, and probes its features after each epoch."""
    torch.set_num_threads(1)  # More gain nothing on a net this small.
    console = Console()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("probes {task.fields[probe]}"),
        console=console,
    ) as progress:
        run = train(epochs, batch_size, lr, base_decay, labels, seed, progress)
    console.print(summary(run, labels))
    console.print(f"Trained in {run.seconds:.0f} s")
    output.parent.mkdir(parents=True, exist_ok=True)
    plot(run, output)
    print(output.resolve())


if __name__ == "__main__":
    typer.run(main)
