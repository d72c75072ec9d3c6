"""What becomes of small steps in bfloat16: draws docs/low_precision.png.

A thousand parameters start at 1 and are pulled toward targets between 1 and 2 by the gradient of
half the squared distance, with lr 1e-4 and momentum 0.9. In bfloat16 the spacing between 1 and 2 is
2^-7, so that a step below 2^-8 is rounded away unless something keeps it.

    python examples/low_precision.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from rich.progress import track

from fused_opt import SGD

RUNS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    'bfloat16, master_weights="fp32"': (torch.bfloat16, {"master_weights": "fp32"}),
    'bfloat16, master_weights="split"': (torch.bfloat16, {"master_weights": "split"}),
    'bfloat16, master_weights="kahan"': (torch.bfloat16, {"master_weights": "kahan"}),
    "bfloat16, stochastic_rounding=True": (torch.bfloat16, {"stochastic_rounding": True}),
}
EVERY = 100  # steps between two points of a curve


def distances(dtype: torch.dtype, options: dict[str, Any], steps: int) -> list[float]:
    """Returns the mean distance to the targets, every so many steps."""
    targets = torch.linspace(1.0, 2.0, 1000)
    param = torch.nn.Parameter(torch.ones(1000, dtype=dtype))
    optimizer = SGD([param], lr=1e-4, momentum=0.9, **options)
    curve = []
    for step in range(steps + 1):
        distance = param.detach().float() - targets
        if step % EVERY == 0:
            curve.append(float(distance.abs().mean()))
        param.grad = distance.to(dtype)
        optimizer.step()
    return curve


def main(
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 10_000,
    plot: Annotated[Path, typer.Option(help="Where the plot goes.")] = Path(
        "docs/low_precision.png"
    ),
) -> None:
    """Draws the distance to the targets for every way to keep bfloat16 parameters."""
    torch.set_num_threads(1)
    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    styles = ["-", "-", "-", "--", ":", "-"]
    for (name, (dtype, options)), style in zip(
        track(RUNS.items(), description="Training"), styles, strict=True
    ):
        curve = distances(dtype, options, steps)
        label = f"{name}: {curve[-1]:.2g} at the end"
        axes.plot(range(0, steps + 1, EVERY), curve, style, label=label, linewidth=2)
    axes.set(xlabel="step", ylabel="mean distance to the targets", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(plot, dpi=120)
    print(plot)


if __name__ == "__main__":
    typer.run(main)
