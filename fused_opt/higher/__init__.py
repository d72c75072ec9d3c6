"""Inner loops that autograd looks through: a drop-in for the package ``higher`` 0.2.1.

``import fused_opt.higher as higher`` is what changes in a script. :func:`innerloop_ctx` gives a
model with fast weights and an optimizer that steps them out of place, by
``fused_opt.functional.sgd_step``; ``patch``, ``optim`` and ``utils`` have the parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fused_opt.higher import optim, patch, utils
from fused_opt.higher._structure import Structure
from fused_opt.higher.optim import (
    DifferentiableOptimizer,
    Override,
    create_diff_optim,
    get_diff_optim,
    register_optim,
)
from fused_opt.higher.patch import FunctionalModule, make_functional, monkeypatch
from fused_opt.higher.utils import Device

__all__ = [
    "DifferentiableOptimizer",
    "FunctionalModule",
    "create_diff_optim",
    "get_diff_optim",
    "innerloop_ctx",
    "make_functional",
    "monkeypatch",
    "optim",
    "patch",
    "register_optim",
    "utils",
]


@contextmanager
def innerloop_ctx(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    device: Device = None,
    copy_initial_weights: bool = True,
    override: Override | None = None,
    track_higher_grads: bool = True,
    *,
    first_order: bool = False,
    truncate: int | None = None,
    keep_history: bool = True,
) -> Iterator[tuple[FunctionalModule, DifferentiableOptimizer]]:
    """An inner loop: the model with fast weights of its own, and the optimizer's steps on them.

    Neither the model nor the optimizer changes. The fast weights start as the model's parameters,
    the steps with the optimizer's options and momentum.

    Args:
        model: the model.
        opt: a ``fused_opt.SGD`` or ``torch.optim.SGD`` of all or some of its parameters.
        device: where fast weights, buffers and momentum go; None leaves them where they are.
        copy_initial_weights: True starts with copies, so that nothing reaches the parameters of
            the model; False lets gradients through to them, as MAML needs it.
        override: options of ``opt`` to replace, by tensors that require gradients for example: a
            value for all param groups, bare or as a list of one, or a list of one for each.
        track_higher_grads: False runs in test mode: no graph of the steps, weights that are leaves.
        first_order: takes gradients for constants (first-order MAML, Finn et al., 2017).
        truncate: lets derivatives reach back through at most so many steps.
        keep_history: False keeps only the latest fast weights, for the graph to decide on the
            memory of the others, and in test mode writes to that of two steps ago.

    Yields:
        The model with fast weights and the optimizer: see :class:`FunctionalModule` and
        :class:`DifferentiableOptimizer`.

    Raises:
        TypeError: an optimizer of another class; a model of ``torch.jit`` or
            ``DistributedDataParallel``.
        ValueError: an option of the optimizer that differentiable steps do not have; an override
            that does not fit; parameters in ``opt`` that are not the model's.

    Example:
        >>> import torch
        >>> import fused_opt, fused_opt.higher as higher
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> opt = fused_opt.SGD(model.parameters(), lr=0.1)
        >>> x, y, lr = torch.ones(4, 1), torch.ones(4, 1), torch.tensor(0.1, requires_grad=True)
        >>> with higher.innerloop_ctx(model, opt, override={"lr": lr}) as (fmodel, diffopt):
        ...     for _ in range(3):
        ...         _ = diffopt.step(torch.nn.functional.mse_loss(fmodel(x), y))
        ...     torch.nn.functional.mse_loss(fmodel(x), y).backward()
        >>> bool(lr.grad < 0)  # a larger learning rate would do better
        True
    """
    structure = Structure(model, device)
    fmodel = FunctionalModule(
        structure,
        device,
        copy_initial_weights=copy_initial_weights,
        track_higher_grads=track_higher_grads,
        keep_history=keep_history,
    )
    diffopt = get_diff_optim(
        opt,
        structure.weights,
        fmodel,
        device,
        override,
        track_higher_grads,
        first_order=first_order,
        truncate=truncate,
        keep_history=keep_history,
    )
    yield fmodel, diffopt
