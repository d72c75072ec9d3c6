"""A copy of a module's structure that shares its weights; ``patch`` runs it with others."""

from __future__ import annotations

from collections import OrderedDict
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fused_opt.higher.utils import Device, cloned

#: What a structure shares with the original without a further look.
_ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes, type, torch.dtype})
_UNINITIALIZED = frozenset({UninitializedBuffer, UninitializedParameter})
_CONTAINERS = frozenset({dict, OrderedDict, list, tuple, set})

#: What a module shares with the original while it is empty, which spares a third of the time. Hooks
#: have numbers that no other has: an entry in the first three means nothing to another module.
_SHARED_IF_EMPTY = frozenset(
    {
        *("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
        *("_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks"),
        *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    }
)


class Structure:
    """The modules of a model once more, with containers, hooks and buffers of their own.

    As ``copy.deepcopy`` would have it, except that whatever is no module, buffer or container is
    shared: parameters, settings, functions. A list of submodules holds the copies, a tuple of
    weights has become a list, and a bound method of a module is bound to its copy. What
    ``torch.compile`` has wrapped is taken out: a compiled function cannot be differentiated twice.
    So is what a ``FunctionalModule`` runs, whose weights are its fast ones.

    Args:
        module: the model.
        device: where the buffers go; None leaves them where they are.

    Attributes:
        root: the copy of the model.
        weights: its parameters, each once, in the order of ``parameters()``.
        places: where they are held: a dict or list, the key in it, and the index of the weight. A
            tied weight has several.
        buffers: what holds the buffers of each module that has some.

    Raises:
        TypeError: a module that cannot be run with other weights.
        ValueError: a parameter or buffer that a lazy module has not made yet.
    """

    def __init__(self, module: nn.Module, device: Device = None) -> None:
        self.weights: list[Tensor] = []
        self.places: list[tuple[Any, Any, int]] = []
        # By id, which means nothing once the originals are gone: the numbers of weights, and the
        # copies of modules, buffers and containers.
        self._indices: dict[int, int] = {}
        self._copies: dict[int, Any] = {}
        self._device = device
        self._left: list[tuple[dict[str, Any], str, Any]] = []  # attributes that may hold a copy
        self._with_buffers: list[dict[str, Any]] = []
        found = modules = _modules(module)
        if any(_wrapped_name(kind) for kind in set(map(type, found))):
            modules = list({id(own): own for own in map(_unwrapped, found)}.values())
        for kind in set(map(type, modules)):
            _check(kind)
        for each in modules:
            self._add(each)
        for each in found if modules is not found else ():
            self._copies[id(each)] = self._copies[id(_unwrapped(each))]
        for state, key, value in self._left:
            state[key] = self._copy(value, state, key)
        self.root: nn.Module = self._copies[id(module)]
        self.buffers = [state["_buffers"] for state in self._with_buffers]
        del self._indices, self._copies, self._left, self._with_buffers

    def _add(self, module: nn.Module) -> None:
        """Copies a module, its buffers and empty containers, and numbers its weights."""
        copy: Any = object.__new__(type(module))
        state = module.__dict__.copy()
        state.pop("_compiled_call_impl", None)  # of Module.compile, which would run the original
        object.__setattr__(copy, "__dict__", state)
        self._copies[id(module)] = copy
        for key, value in state.items():
            kind = type(value)
            if kind in _ATOMS:
                continue
            if kind not in _CONTAINERS or value:
                self._left.append((state, key, value))
            elif key not in _SHARED_IF_EMPTY:
                state[key] = kind()
        for name, weight in state["_parameters"].items():
            if weight is not None and id(weight) not in self._indices:
                if type(weight) in _UNINITIALIZED:
                    raise _no_shape(module, name)
                self._indices[id(weight)] = len(self.weights)
                self.weights.append(weight)
        if state["_buffers"]:
            self._with_buffers.append(state)
            self._copy_buffers(module)

    def _copy_buffers(self, module: nn.Module) -> None:
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in self._copies:
                if type(buffer) in _UNINITIALIZED:
                    raise _no_shape(module, name)
                (self._copies[id(buffer)],) = cloned([buffer], self._device, attached=False)

    def _copy(self, value: Any, holder: Any, key: Any) -> Any:
        """What stands in the structure for a value that is held there, under that key."""
        index = self._indices.get(id(value))
        if index is not None:
            self.places.append((holder, key, index))
            return value
        known = self._copies.get(id(value))
        if known is not None:
            return known
        kind = type(value)
        if kind in _CONTAINERS:
            return self._copy_container(value)
        if kind is MethodType and id(value.__self__) in self._copies:
            return MethodType(value.__func__, self._copies[id(value.__self__)])
        return value

    def _copy_container(self, value: Any) -> Any:
        # No place in a tuple or set can be filled later: weights in a tuple come into a list.
        has_places = isinstance(value, tuple) and any(id(each) in self._indices for each in value)
        if isinstance(value, (tuple, set)) and not has_places:
            return type(value)(
                each if type(each) in _ATOMS else self._copy(each, {}, None) for each in value
            )
        new = list(value) if has_places else value.copy()
        self._copies[id(value)] = new  # before its entries, which may hold the container itself
        for key, each in new.items() if isinstance(new, dict) else enumerate(new):
            if type(each) not in _ATOMS:
                new[key] = self._copy(each, new, key)
        return new


def _check(kind: type) -> None:
    """Raises for classes of modules that do not run with whatever weights they are given."""
    if issubclass(kind, torch.jit.ScriptModule):
        raise TypeError(
            f"model: got a {kind.__name__} of torch.jit, whose weights cannot be replaced; pass "
            "the module that it was made from"
        )
    if issubclass(kind, DistributedDataParallel):
        raise TypeError(
            "model: got a DistributedDataParallel, which knows nothing of fast weights; pass "
            "model.module, and average the meta-gradients over the processes"
        )


def _no_shape(module: nn.Module, name: str) -> ValueError:
    kind = type(module).__name__
    return ValueError(f"model: {name} of {kind} has no shape yet; run the model once before")


def _wrapped_name(kind: type) -> str | None:
    """Under which name modules of a class hold the module that they run, if they only wrap it."""
    name: str | None = getattr(kind, "_name_of_wrapped", None)
    return "_orig_mod" if kind.__name__ == "OptimizedModule" else name


def _unwrapped(module: nn.Module) -> nn.Module:
    while (name := _wrapped_name(type(module))) is not None:
        module = getattr(module, name)
    return module


def _modules(module: nn.Module) -> list[nn.Module]:
    """What ``module.modules()`` gives, in half the time."""
    found, left = {}, [module]
    while left:
        each = left.pop()
        if id(each) not in found:
            found[id(each)] = each
            children = each._modules
            if children:
                left += [child for child in reversed(children.values()) if child is not None]
    return list(found.values())
