"""How the result of a training depends on its settings: derivatives through five steps of SGD.

The steps fit the slope of y = 3.5 x. How far it then is from 3.5 depends on the learning rate, the
momentum and the slope at first, and one backward pass through the steps gives the derivative by
each. Beside them stands what two more trainings say, with one setting a little larger and smaller.

    python examples/meta_learning_toy.py
"""

from __future__ import annotations

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fused_opt
import fused_opt.higher as higher

SLOPE = 3.5
STEPS = 5
DIFFERENCE = 2.0**-12  # a power of 2, which float32 adds to the settings almost exactly


class Toy:
    """The data, a model of double precision, and settings of single precision."""

    def __init__(self) -> None:
        np.random.seed(1)
        torch.manual_seed(3)
        self.x = torch.from_numpy(np.random.random((100, 1)))
        self.y = SLOPE * self.x
        self.model = nn.Linear(1, 1, bias=False).double()
        self.opt = fused_opt.SGD(self.model.parameters(), lr=0.3, momentum=0.5)
        self.lr = torch.tensor([0.3], requires_grad=True)
        self.momentum = torch.tensor([0.5], requires_grad=True)

    @property
    def settings(self) -> dict[str, Tensor]:
        """What the derivatives are by."""
        return {
            "learning rate": self.lr,
            "momentum": self.momentum,
            "slope at first": self.model.weight,
        }

    def meta_loss(self) -> Tensor:
        """Trains, and returns the squared error of the slope."""
        with higher.innerloop_ctx(
            self.model,
            self.opt,
            copy_initial_weights=False,
            override={"lr": self.lr, "momentum": self.momentum},
        ) as (fmodel, diffopt):
            for _ in range(STEPS):
                diffopt.step((fmodel(self.x) - self.y).square().mean())
            return (fmodel.weight - SLOPE).square().sum()


def difference_quotient(name: str) -> float:
    """The derivative by a setting from two trainings."""
    losses, values = [], []
    for change in (DIFFERENCE, -DIFFERENCE):
        toy = Toy()
        setting = toy.settings[name].data.add_(change)
        losses.append(float(toy.meta_loss().detach()))
        values.append(float(setting))
    return (losses[0] - losses[1]) / (values[0] - values[1])


def main() -> None:
    """Prints the derivatives of the error after training, each beside its difference quotient."""
    toy = Toy()
    loss = toy.meta_loss()
    derivatives = torch.autograd.grad(loss, list(toy.settings.values()))
    table = Table(title=f"Squared error of the slope after {STEPS} steps: {float(loss.detach())}")
    for column in ("Setting", "Value", "Derivative", "Difference quotient"):
        table.add_column(column, justify="left" if column == "Setting" else "right")
    for (name, setting), derivative in zip(toy.settings.items(), derivatives, strict=True):
        numbers = float(setting.detach()), float(derivative), difference_quotient(name)
        table.add_row(name, *(f"{number:.7f}" for number in numbers))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
