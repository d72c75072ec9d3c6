"""What ``higher.utils`` has for users: nested structures, and copies of a model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Device: TypeAlias = torch.device | str | int | None


def flatten(x: Any) -> list[Any]:
    """The leaves of nested dicts, lists, tuples and sets, as a list."""
    if isinstance(x, dict):
        x = x.values()
    elif not isinstance(x, (list, tuple, set)):
        return [x]
    return [leaf for each in x for leaf in flatten(each)]


def get_func_params(
    module: nn.Module, device: Device = None, safe_copy: bool = True
) -> list[Tensor]:
    """Copies of a module's parameters, leaves that require gradients where those do.

    Args:
        module: the model.
        device: where the copies go; None leaves them where the parameters are.
        safe_copy: False shares the elements instead, on the same device.
    """
    if safe_copy:
        return cloned(module.parameters(), device, attached=False)
    shared = [detached(each) for each in module.parameters()]
    return shared if device is None else [detached(each.to(device)) for each in shared]


def cloned(tensors: Iterable[Tensor], device: Device, attached: bool) -> list[Tensor]:
    """Copies that require gradients where the originals do: part of their graph, or leaves."""
    if attached:
        return [each.clone() if device is None else each.to(device, copy=True) for each in tensors]
    tensors = list(tensors)
    with torch.no_grad():
        copies = cloned(tensors, device, attached=True)
    pairs = zip(copies, tensors, strict=True)
    return [copy.requires_grad_() if each.requires_grad else copy for copy, each in pairs]


def detached(tensor: Tensor) -> Tensor:
    """The same elements as a leaf of the graph."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def mapped(function: Callable[[Any], Any], x: Any) -> Any:
    """Nested dicts, lists and tuples with the function applied to what they hold."""
    if isinstance(x, dict):
        return {key: mapped(function, each) for key, each in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)([mapped(function, each) for each in x])
    return function(x)
