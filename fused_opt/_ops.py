"""The functions of ``functional`` as operators, which a graph of ``torch.compile`` holds whole.

``functional`` calls ``trace_sgd_step_`` and ``trace_ema_update_`` where it is traced. They put an
operator into the graph, and when the graph runs, that calls the function of ``functional`` again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from fused_opt._hyper import SgdHyper

# A number that is a tensor has an argument of its own, which takes the other's place.
#: The fields of :class:`SgdHyper` that may be one.
_NUMBERS = ("lr", "momentum", "dampening", "weight_decay")
_KEPT = "momentum_tensor"
#: Its other fields that matter to a step.
_FLAGS = ("nesterov", "maximize", "formulation", "decoupled_weight_decay", "state_dtype")

# What an operator is called with; a letter marks what it writes. torch loses track of lists with
# None in them that are written to, so that shadows and refinements are those that exist, and beside
# them the places in `params` that they belong to; no places stand for all.
_TENSORS = (
    "Tensor(a!)[] params, {grads} grads, Tensor(b!)[] momentum_buffers, "
    "Tensor(c!)[] shadows, Tensor(d!)[] refinements"
)
_OPTIONS = (
    "float lr, Tensor? lr_tensor=None, float momentum=0, Tensor? momentum_tensor=None, "
    "float dampening=0, Tensor? dampening_tensor=None, "
    "float weight_decay=0, Tensor? weight_decay_tensor=None, "
    "bool nesterov=False, bool maximize=False, str formulation='torch', "
    "bool decoupled_weight_decay=False, ScalarType? state_dtype=None, "
    "float? decay=None, Tensor? decay_tensor=None, "
    "int[] first=[], int[] shadow_places=[], int[] refinement_places=[], SymInt[] rounding=[]"
)
_SCHEMAS = {
    "sgd_step_": f"({_TENSORS.format(grads='Tensor[]')}, *, {_OPTIONS}) -> ()",
    # Gradients that are only read must not be declared as written: autograd would take them for
    # changed, and expanded ones, like that of `p.sum()`, cannot be written to.
    "sgd_step_.reset_grads": (
        f"({_TENSORS.format(grads='Tensor(e!)[]')}, *, {_OPTIONS}, bool reset_grads) -> ()"
    ),
    "ema_update_": (
        "(Tensor(a!)[] shadows, Tensor[] params, *, float decay, Tensor? decay_tensor=None) -> ()"
    ),
}
# Any strides will do. Told to keep them, Inductor 2.10 to 2.13 passes a copy of what it computes,
# and may compute the original after the operator has written to what that is computed from.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

_library: Library | None = None


def trace_sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: list[Tensor | None] | None,
    shadows: Sequence[Tensor | None] | None,
    refinements: Sequence[Tensor | None] | None,
    hyper: SgdHyper,
    decay: float | Tensor | None,
    rounding: tuple[int, int] | None,
) -> None:
    """Puts a step into the graph that is being traced. The lists have been checked."""
    options: dict[str, Any] = {name: getattr(hyper, name) for name in _FLAGS}
    for name in _NUMBERS:
        options.update(_number(name, getattr(hyper, name)))
    if decay is not None:
        options.update(_number("decay", decay))
    if hyper.reset_grads:
        options.update(reset_grads=True)
    buffers = list(momentum_buffers or ()) if hyper.has_momentum() else []
    first = [i for i, buffer in enumerate(buffers) if buffer is None]
    for i in first:
        dtype = hyper.momentum_dtype(params[i])
        buffers[i] = torch.empty_like(params[i], dtype=dtype, requires_grad=False)
    present_shadows, shadow_places = _present(shadows)
    present_refinements, refinement_places = _present(refinements)
    torch.ops.fused_opt.sgd_step_(
        list(params),
        list(grads),
        buffers,
        present_shadows,
        present_refinements,
        first=first,
        shadow_places=shadow_places,
        refinement_places=refinement_places,
        rounding=[_signed(number) for number in rounding or ()],
        **options,
    )
    if momentum_buffers is not None:
        for i in first:
            momentum_buffers[i] = buffers[i]


def trace_ema_update_(
    shadows: Sequence[Tensor], params: Sequence[Tensor], decay: float | Tensor
) -> None:
    """Puts an update into the graph that is being traced."""
    torch.ops.fused_opt.ema_update_(list(shadows), list(params), **_number("decay", decay))


def register(sgd_step_: Callable[..., None], ema_update_: Callable[..., None]) -> None:
    """Defines ``torch.ops.fused_opt.sgd_step_`` and ``ema_update_``, which call these functions."""
    global _library  # whose operators exist as long as it does: those of a reload replace them
    _library = Library("fused_opt", "FRAGMENT")  # type: ignore[no-untyped-call]
    step, update = _kernels(sgd_step_, ema_update_)
    kernels = {"sgd_step_": step, "sgd_step_.reset_grads": step, "ema_update_": update}
    for name, schema in _SCHEMAS.items():
        _library.define(name + schema, tags=_TAGS)  # type: ignore[no-untyped-call]
        # On every device: where the kernels do not reach, torch's own operations run.
        _library.impl(name, kernels[name], "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        _library.impl(name, _fake, "Meta")  # type: ignore[no-untyped-call]


def _kernels(
    sgd_step_: Callable[..., None], ema_update_: Callable[..., None]
) -> tuple[Callable[..., None], Callable[..., None]]:
    """The functions with the arguments of their operators."""

    def step(
        params: list[Tensor],
        grads: list[Tensor],
        momentum_buffers: list[Tensor],
        shadows: list[Tensor],
        refinements: list[Tensor],
        *,
        first: Sequence[int] = (),
        shadow_places: Sequence[int] = (),
        refinement_places: Sequence[int] = (),
        rounding: Sequence[int] = (),
        **options: Any,
    ) -> None:
        options = _joined(options)
        length, has_shadows = len(params), bool(shadows) or options.get("decay") is not None
        buffers: list[Tensor | None] = list(momentum_buffers)
        for i in first:  # they hold nothing yet
            buffers[i] = None
        sgd_step_(
            params,
            grads,
            buffers,
            shadows=_placed("shadow", shadows, shadow_places, length) if has_shadows else None,
            refinements=(
                _placed("refinement", refinements, refinement_places, length)
                if refinements
                else None
            ),
            rounding=tuple(number % 2**64 for number in rounding) if rounding else None,
            **options,
        )
        for i in first:
            new = buffers[i]
            if new is not None:
                momentum_buffers[i].copy_(new.to_dense())

    def update(shadows: list[Tensor], params: list[Tensor], **options: Any) -> None:
        ema_update_(shadows, params, **_joined(options))

    return step, update


def _fake(*_: Any, **__: Any) -> None:
    """Stands for every operator where tensors have no values: each returns nothing."""


def _number(name: str, value: float | Tensor) -> dict[str, Any]:
    """The arguments that stand for a hyper-parameter, whether a number or a tensor."""
    if isinstance(value, Tensor):
        return {name: 0.0, f"{name}_tensor": value}
    # A number that has changed between calls is an input of the graph, as which only a tensor can
    # go on to an operator; passed as a number it would be compiled in, again at each change.
    from torch.fx.experimental.symbolic_shapes import has_static_value  # whoever traces has it

    if not has_static_value(value):
        return {name: 0.0, f"{name}_tensor": value * torch.ones((), dtype=torch.float64)}
    return {name: value}


def _signed(number: int) -> int:
    """An integer of 64 bits without a sign as one with, which is what operators take."""
    return number - 2**64 if number >= 2**63 else number


def _joined(options: dict[str, Any]) -> dict[str, Any]:
    """The opposite of :func:`_number`, for all that are there.

    The momentum stays a tensor where it is one: as a number it could be 0, which keeps no buffers,
    and those that the graph has made would stay empty.
    """
    joined = {name: value for name, value in options.items() if not name.endswith("_tensor")}
    for name, value in options.items():
        if name.endswith("_tensor") and value is not None:
            is_number = value.device.type == "cpu" and value.dim() == 0 and name != _KEPT
            joined[name.removesuffix("_tensor")] = value.item() if is_number else value
    return joined


def _present(tensors: Sequence[Tensor | None] | None) -> tuple[list[Tensor], list[int]]:
    """The tensors of a list that may hold None, and their places, if it does."""
    tensors = tensors or ()
    places = [i for i, tensor in enumerate(tensors) if tensor is not None]
    present = [tensor for tensor in tensors if tensor is not None]
    return present, places if len(places) < len(tensors) else []


def _placed(
    name: str, present: list[Tensor], places: Sequence[int], length: int
) -> list[Tensor | None]:
    """The opposite of :func:`_present`."""
    if present and not places:
        return list(present)
    if len(set(places) & set(range(length))) != len(present):
        raise ValueError(
            f"{name}_places: expected {len(present)} different indices below {length}, one for "
            f"each {name}, got {list(places)}"
        )
    tensors: list[Tensor | None] = [None] * length
    for i, tensor in zip(places, present, strict=True):
        tensors[i] = tensor
    return tensors
