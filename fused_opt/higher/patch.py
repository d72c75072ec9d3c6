"""Modules that run with weights from outside, as ``higher.patch`` has them, without patching any.

``monkeypatch`` makes the ``fmodel`` of an inner loop.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fused_opt.higher._structure import Structure
from fused_opt.higher.utils import Device, cloned, detached


class FunctionalModule(nn.Module):
    """A model with fast weights: tensors of any history in the places of its parameters.

    It has the structure of a model, buffers of its own, and shares nothing with it that a forward
    pass writes. Every assignment of :attr:`fast_params` puts the new tensors into their places, so
    that calls of the whole, of a submodule or of a method all run with the latest ones, forward
    hooks included. Attributes are the model's, and so are submodules, whose copies they are.

    Calls take the weights as ``params=`` too, a list in the order of ``parameters()``, which become
    the fast weights; under ``torch.func`` transforms they are used for that call and not kept.

    A buffer that a forward pass has changed is copied before the next one, since the graph of the
    first may need it.

    Args:
        module: the model, which may be one of these itself; or the structure of it.
        device: where buffers and initial weights go; None leaves them where they are.
        copy_initial_weights: True makes the first fast weights copies, leaves of the graph; False
            clones, through which gradients reach the model; None makes none.
        track_higher_grads: whether steps of an optimizer are to be differentiated.
        keep_history: whether the fast weights of earlier steps are kept, if they are.

    Raises:
        TypeError: a module of ``torch.jit`` or ``DistributedDataParallel``.
        ValueError: a lazy module that has not run yet.
    """

    _name_of_wrapped = "_root"  # for Structure
    _root: Any
    _places: list[tuple[Any, Any, int]]
    _buffer_registries: list[dict[str, Tensor | None]]
    _count: int
    _history: list[list[Tensor]]
    _track_higher_grads: bool
    _keep_history: bool

    def __init__(
        self,
        module: nn.Module | Structure,
        device: Device = None,
        *,
        copy_initial_weights: bool | None = None,
        track_higher_grads: bool = True,
        keep_history: bool = True,
    ) -> None:
        super().__init__()
        structure = module if isinstance(module, Structure) else Structure(module, device)
        own, root = self.__dict__, structure.root
        for registry in ("_parameters", "_buffers", "_modules"):
            own[registry] = root.__dict__[registry]
        del own["training"]  # the model's, as every other attribute
        own["_root"] = root
        own["_places"] = structure.places
        own["_buffer_registries"] = structure.buffers
        own["_count"] = len(structure.weights)
        own["_history"] = []
        own["_track_higher_grads"] = track_higher_grads
        own["_keep_history"] = keep_history
        if copy_initial_weights is not None:
            self.fast_params = cloned(structure.weights, device, attached=not copy_initial_weights)

    # --- Running

    def forward(self, *args: Any, params: Iterable[Tensor] | None = None, **kwargs: Any) -> Any:
        """Runs the model with its fast weights, or with ``params``.

        Raises:
            ValueError: there are neither; or of another number than the model has.
        """
        self._renew_buffers()
        if params is not None:
            params = list(params)
            if any(map(torch._C._functorch.is_functorch_wrapped_tensor, params)):
                return self._run_once(params, args, kwargs)
            self.fast_params = params
        elif not self._history:
            raise ValueError("params: expected the weights to run with, as there are no fast ones")
        return self._root(*args, **kwargs)

    def _run_once(self, params: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs with weights that nothing holds afterwards."""
        self._check_count(params)
        # What torch.func.functional_call leaves as it is: weights held by lists, for example.
        before = [holder[key] for holder, key, _ in self._places]
        names = [name for name, _ in self._root.named_parameters()]
        self._install(params)
        try:
            return torch.func.functional_call(
                self._root, dict(zip(names, params, strict=True)), args, kwargs
            )
        finally:
            for (holder, key, _), weight in zip(self._places, before, strict=True):
                holder[key] = weight

    def _renew_buffers(self) -> None:
        """Copies the buffers that have changed; one that modules share stays one."""
        if torch.is_inference_mode_enabled():  # whose copies have no versions
            return
        renewed: dict[int, tuple[Tensor, Tensor]] = {}  # by id, with the old, whose id is taken so
        for registry in self._buffer_registries:
            for name, each in registry.items():
                if each is not None and not each.is_inference() and each._version:
                    if id(each) not in renewed:
                        renewed[id(each)] = each, each.clone()
                    registry[name] = renewed[id(each)][1]

    def train(self, mode: bool = True) -> FunctionalModule:
        """As the model's."""
        self._root.train(mode)
        return self

    # --- Fast weights

    @property
    def fast_params(self) -> list[Tensor] | None:
        """The latest fast weights; None if there are none. Assigning a list makes a new step."""
        return self._history[-1] if self._history else None

    @fast_params.setter
    def fast_params(self, params: Iterable[Tensor]) -> None:
        params = list(params)
        self._check_count(params)
        if not self._keeps_history:
            self._history.clear()
        self._history.append(params)
        self._install(params)

    def _check_count(self, params: list[Tensor]) -> None:
        if len(params) != self._count:
            raise ValueError(
                f"params: expected {self._count} tensors, one for each parameter of the model, got "
                f"{len(params)}"
            )

    def _install(self, params: list[Tensor]) -> None:
        for holder, key, index in self._places:
            holder[key] = params[index]

    def update_params(self, params: Iterable[Tensor]) -> None:
        """Assigns :attr:`fast_params`."""
        self.fast_params = params

    @property
    def init_fast_params(self) -> list[Tensor]:
        """The first fast weights; they are kept with the history."""
        return self._at(0)

    def parameters(self, recurse: bool = True, time: int | None = None) -> Iterator[Tensor]:  # type: ignore[override]
        """The fast weights.

        Args:
            recurse: False leaves out those of submodules.
            time: after how many steps, 0 for the first; None and -1 for the latest.

        Raises:
            RuntimeError: there are no fast weights.
            ValueError: those of that time are not kept.
        """
        params = self._at(-1 if time is None else time)
        if recurse:
            return iter(params)
        own = {index for holder, _, index in self._places if holder is self._parameters}
        return (params[index] for index in sorted(own))

    def _at(self, time: int) -> list[Tensor]:
        if not self._history:
            raise RuntimeError("there are no fast weights yet: assign fast_params, or pass params")
        if time != -1 and not self._keeps_history:
            raise ValueError(
                f"time: only the latest fast weights are kept without track_higher_grads and "
                f"keep_history, got {time}"
            )
        return self._history[time]

    @property
    def track_higher_grads(self) -> bool:
        """Whether the fast weights carry the history of the steps that made them."""
        return self._track_higher_grads

    @track_higher_grads.setter
    def track_higher_grads(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"track_higher_grads: expected a bool, got {type(value).__name__}")
        self.__dict__["_track_higher_grads"] = value

    @property
    def _keeps_history(self) -> bool:
        return self._track_higher_grads and self._keep_history

    def detach_(self) -> None:
        """Cuts the fast weights, those of earlier steps too, from the steps that made them."""
        self._history[:] = [list(map(detached, params)) for params in self._history]
        if self._history:
            self._install(self._history[-1])

    def copy_to(self, model: nn.Module) -> None:
        """Copies the latest fast weights and the buffers into a model, in place.

        Raises:
            ValueError: names or shapes differ. Nothing has changed.
        """
        model = getattr(model, "_orig_mod", model)
        ours, theirs = (
            {**dict(each.named_parameters()), **dict(each.named_buffers())}
            for each in (self._root, model)
        )
        shapes, expected = ({name: tuple(t.shape) for name, t in d.items()} for d in (theirs, ours))
        if shapes != expected:
            name = next(n for n in {**expected, **shapes} if shapes.get(n) != expected.get(n))
            raise ValueError(
                f"model: expected {name} of shape {expected.get(name)}, got {shapes.get(name)}"
            )
        with torch.no_grad():
            for name, tensor in theirs.items():
                tensor.copy_(ours[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FunctionalModule:  # noqa: ARG002
        """What ``to``, ``double`` and ``cuda`` do: to the latest fast weights, differentiably."""
        for registry in self._buffer_registries:
            for name, buffer in registry.items():
                registry[name] = None if buffer is None else fn(buffer)
        if self._history:
            self._history[-1] = list(map(fn, self._history[-1]))
            self._install(self._history[-1])
        return self

    # --- Everything else is the model's

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's, with the fast weights."""
        return self._root.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's: writes into the fast weights."""
        return self._root.load_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        root = self.__dict__.get("_root")
        if root is None:  # while it is being unpickled
            raise AttributeError(name)
        return getattr(root, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__ or hasattr(type(self), name):
            object.__setattr__(self, name, value)
        elif name in self._parameters and isinstance(value, Tensor) and self._history:
            (index,) = (
                index
                for holder, key, index in self._places
                if holder is self._parameters and key == name
            )
            params = self._history[-1].copy()
            params[index] = value
            self.fast_params = params
        else:
            setattr(self._root, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._root[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._root)

    def __len__(self) -> int:
        return len(self._root)

    def __bool__(self) -> bool:
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> FunctionalModule:
        """A copy with leaves, buffers and steps of its own; it shares what the graph has made."""
        for params in self._history:
            for param in params:
                if param.grad_fn is not None:
                    memo[id(param)] = param
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


def monkeypatch(
    module: nn.Module,
    device: Device = None,
    copy_initial_weights: bool = True,
    track_higher_grads: bool = True,
    *,
    keep_history: bool = True,
) -> FunctionalModule:
    """The model with fast weights, which start as its own; see :class:`FunctionalModule`."""
    return FunctionalModule(
        module,
        device,
        copy_initial_weights=copy_initial_weights,
        track_higher_grads=track_higher_grads,
        keep_history=keep_history,
    )


def make_functional(
    module: nn.Module,
    encapsulator: Callable[[FunctionalModule, nn.Module], None] | None = None,
) -> FunctionalModule:
    """The model without fast weights, which every call brings along as ``params=``.

    Args:
        module: the model.
        encapsulator: is given the result and the model, and may assign fast weights.
    """
    fmodel = FunctionalModule(module)
    if encapsulator is not None:
        encapsulator(fmodel, module)
    return fmodel
