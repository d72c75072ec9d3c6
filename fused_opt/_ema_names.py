"""Which tensors an EMA tracks and what they are called; used by ``EMA`` and the state formats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

ModelOrParams = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]
Filter = Callable[[str, Tensor], bool]
_T = TypeVar("_T")

#: What torch calls a module inside its wrappers: those of torch.compile, activation checkpointing
#: and FSDP by a name that nobody else uses, those of data parallelism by an ordinary one.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_PARALLEL = (DistributedDataParallel, DataParallel)


class Slot(NamedTuple):
    """Where a tensor or a module is held; in a module, assignment and ``Module.to`` replace it."""

    holder: dict[str, Any]
    key: str


class Names(NamedTuple):
    """The tensors of a model, each once, under names without torch's wrappers.

    ``aliases`` gives each further name of a tensor its first. ``layout`` holds all names as they
    follow each other in the model's ``state_dict()``, and ``positions`` those of its parameters as
    in ``parameters()``, which tells tensors that share their elements apart. ``modules`` is where
    the modules are held that hold all this, None in an iterable, where nothing is replaced.
    """

    params: dict[str, Slot]
    buffers: dict[str, Slot]
    aliases: dict[str, str]
    layout: list[str]
    positions: list[str]
    modules: list[Slot] | None = None

    @property
    def slots(self) -> dict[str, Slot]:
        """Where parameters and buffers are held."""
        return {**self.params, **self.buffers}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers as they are now, but for those that are no longer there."""
        found = {name: holder.get(key) for name, (holder, key) in self.slots.items()}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def first(self, name: str) -> str:
        """The first name of what has this one."""
        return self.aliases.get(name, name)

    def under_every_name(self, found: Mapping[str, _T]) -> dict[str, _T]:
        """Adds the aliases to a mapping by first names."""
        further = {alias: found[name] for alias, name in self.aliases.items() if name in found}
        return {**found, **further}


def named(model_or_params: ModelOrParams) -> Names:
    """Everything that a module holds, or the tensors of an iterable."""
    names = Names({}, {}, {}, [], [])
    first_name: dict[Any, str] = {}
    parameters: set[int] = set()

    def is_new(name: str, tensor: Tensor) -> bool:
        first = first_name.setdefault(_elements(tensor), name)
        if first != name:
            names.aliases[name] = first
        return first == name

    def add_param(name: str, param: Tensor, slot: Slot) -> None:
        names.layout.append(name)
        if id(param) not in parameters:
            parameters.add(id(param))
            names.positions.append(name)
        if is_new(name, param):
            names.params[name] = slot

    if not isinstance(model_or_params, nn.Module):
        held = dict(pairs(model_or_params))
        for name, tensor in held.items():
            add_param(name, tensor, Slot(held, name))
        return names
    modules: list[Slot] = []
    for prefix, module in _modules(model_or_params):
        modules.extend(Slot(module._modules, key) for key in module._modules)
        for key, param in module._parameters.items():
            if param is not None:
                add_param(prefix + key, param, Slot(module._parameters, key))
        for key, buffer in module._buffers.items():
            if buffer is None:
                continue
            if key not in module._non_persistent_buffers_set:
                names.layout.append(prefix + key)
            if is_new(prefix + key, buffer):
                names.buffers[prefix + key] = Slot(module._buffers, key)
    return names._replace(modules=modules)


def pairs(params: Iterable[Tensor] | Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Gives parameters without a name their place as one.

    Raises:
        TypeError: this is no iterable of tensors.
        ValueError: a name occurs twice.
    """
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(
            "model_or_params: expected a module or an iterable of parameters, got "
            f"{type(params).__name__}"
        )
    found: dict[str, Tensor] = {}
    for i, item in enumerate(params):
        name, tensor = item if isinstance(item, tuple) else (str(i), item)
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"model_or_params: expected tensors, got {type(tensor).__name__} as {name!r}"
            )
        name = _without(_WRAPPED, name)
        if name in found:
            raise ValueError(f"model_or_params: the name {name!r} occurs twice")
        found[name] = tensor
    return list(found.items())


def named_as(found: Mapping[str, _T], known: Iterable[str]) -> dict[str, _T]:
    """Renames what was saved from inside a wrapper, or is held by one, as the model has it.

    A name that is known stays. Another is compared without the wrappers' components, which may
    stand anywhere in it, if that leaves no choice. What fits nothing keeps its name.
    """
    known = set(known)
    bare: dict[str, list[str]] = {}
    for name in known:
        bare.setdefault(_without((*_WRAPPED, "module"), name), []).append(name)

    def as_known(name: str) -> str:
        fitting = bare.get(_without((*_WRAPPED, "module"), name), [])
        return fitting[0] if name not in known and len(fitting) == 1 else name

    renamed = {as_known(name): value for name, value in found.items()}
    return renamed if len(renamed) == len(found) else dict(found)


def fitted(
    argument: str, found: Mapping[str, Any], expected: Mapping[str, Tensor], names: Names
) -> dict[str, Tensor]:
    """What was found for each of the names expected, under that or another of its names.

    Raises:
        ValueError: something is missing, unknown or no tensor, or its shape or kind is another;
            lists all of them.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"{argument}: expected tensors by name, got {type(found).__name__}")
    by_name: dict[str, Tensor] = {}
    for name, tensor in named_as(found, names.under_every_name(expected)).items():
        add_once(argument, by_name, names.first(name), tensor)
    check_match(argument, by_name, expected)
    return by_name


def add_once(argument: str, by_name: dict[str, Tensor], name: str, tensor: Any) -> None:
    """Adds a tensor; raises ValueError if another is there, for weights that the model ties."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{argument}: expected tensors, got {type(tensor).__name__} as {name!r}")
    known = by_name.setdefault(name, tensor)
    if known is tensor:
        return
    is_same = known.shape == tensor.shape
    if not (is_same and bool(((known == tensor) | (known.isnan() & tensor.isnan())).all())):
        raise ValueError(f"{argument}: the model ties the weights of {name!r}, which differ")


def check_match(argument: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError, listing them, unless names, shapes and kinds of number are the same."""
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        raise ValueError(
            f"{argument}: expected the names that the EMA tracks; missing {missing}, unknown "
            f"{unknown}"
        )
    wrong = [
        f"{_described(expected[name])} for {name!r}, got {_described(tensor)}"
        for name, tensor in found.items()
        if _described(tensor) != _described(expected[name])
    ]
    if wrong:
        raise ValueError(f"{argument}: expected {'; '.join(wrong)}")


def _described(tensor: Tensor) -> str:
    """What has to be the same for one tensor to be copied into another."""
    kinds = ("real" if tensor.is_floating_point() else str(tensor.dtype), "complex")
    layout = "" if tensor.layout == torch.strided else f" as {tensor.layout}"
    where = " on the meta device" if tensor.is_meta else ""
    return f"shape {tuple(tensor.shape)} of {kinds[tensor.is_complex()]} numbers{layout}{where}"


def _modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module at each of its places, in the order of ``state_dict()``."""
    yield prefix, module
    for key, child in module._modules.items():
        if child is None:
            continue
        is_wrapper = key in _WRAPPED or (key == "module" and isinstance(module, _PARALLEL))
        yield from _modules(child, prefix if is_wrapper else f"{prefix}{key}.")


def _elements(tensor: Tensor) -> Any:
    """The same for tensors that are the same, or share their elements."""
    is_plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    if not is_plain or tensor.layout != torch.strided or not tensor.data_ptr():
        return id(tensor)
    return tensor.data_ptr(), tensor.device, tensor.shape, tensor.stride()


def _without(components: tuple[str, ...], name: str) -> str:
    """A dotted name without some of its components; the last one stays."""
    *path, last = name.split(".")
    return ".".join([*(part for part in path if part not in components), last])
