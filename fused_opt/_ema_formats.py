"""The states of other packages' averages, read and written; used by ``EMA``.

A format is known by its keys. Where it counts updates, those are the steps that were due: only
ema_pytorch counts the others too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fused_opt._decay_rules import DecayRule
from fused_opt._ema_names import add_once, check_match, fitted, named_as
from fused_opt._ema_state import (
    Held,
    Origin,
    Progress,
    Saved,
    State,
    check_keys,
    integer,
    is_own,
    read_own,
)
from fused_opt._hyper import check_decay
from fused_opt.schedules import constant, half_life, inverse_power, tf_warmup

Format = Literal["torch_ema", "diffusers", "averaged_model", "timm", "ema_pytorch"]


def read(state: State, held: Held) -> Saved:
    """Reads a state, our own or another's, without changing anything.

    Raises:
        TypeError: it is no dict.
        ValueError: it is in no format that is known, or does not fit; lists what does not.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state_dict: expected a dict, got {type(state).__name__}")
    if is_own(state):
        return read_own(state, held)
    reader = _reader_of(state)
    if len(held.averages) != 1:
        raise ValueError(
            f"state_dict: expected the {len(held.averages)} averages of this EMA's own format; "
            "another package's state has one"
        )
    return reader(state, held)


def write(name: Format, held: Held, average: int) -> dict[str, Any]:
    """Writes an average as a package does.

    Raises:
        ValueError: there is no such format, or it cannot say what the decay is.
    """
    if name not in _WRITERS:
        raise ValueError(f"format: expected one of {', '.join(_WRITERS)}, got {name!r}")
    return _WRITERS[name](held, average)


def _reader_of(state: State) -> Callable[[State, Held], Saved]:
    keys = set(state)
    if {"shadow_params", "num_updates"} <= keys:
        return _read_torch_ema
    if keys and keys <= {*_DIFFUSERS, "optimization_step", "shadow_params"}:
        return _read_diffusers
    if "n_averaged" in keys:
        return _read_averaged_model
    if {"initted", "step"} <= keys:
        return _read_ema_pytorch
    if "state_dict_ema" in keys or (keys and all(isinstance(t, Tensor) for t in state.values())):
        return _read_timm
    raise ValueError(
        "state_dict: expected the keys of fused_opt, torch_ema, diffusers, AveragedModel, timm or "
        f"ema_pytorch, got {sorted(map(str, keys))}"
    )


# --- lists of parameters: torch_ema and diffusers -------------------------------------------------

_TORCH_EMA = ["decay", "num_updates", "shadow_params", "collected_params"]


def _read_torch_ema(state: State, held: Held) -> Saved:
    """With a count of updates the decay warms up; it averages from the first step on."""
    check_keys(state, _TORCH_EMA)
    check_decay(state["decay"])
    rule: DecayRule = float(state["decay"])
    progress = held.progress._replace(update_after_step=0)
    if state["num_updates"] is not None:
        rule = _torch_ema_rule(state["decay"])
        progress = progress.after_updates(integer(state, "num_updates"))
    average = _listed("shadow_params", state, held)
    collected = {}
    if state["collected_params"] is not None:
        collected = _listed("collected_params", state, held)
    origin = Origin(_dtypes(average), has_collected=bool(collected))
    return Saved([average], [rule], progress, collected=collected, origin=origin)


def _write_torch_ema(held: Held, average: int) -> dict[str, Any]:
    rule, progress = held.decays[average], held.progress
    if progress.num_steps < progress.update_after_step:
        raise ValueError(
            "export_state_dict: torch_ema has no steps that copy, and those that update_after_step "
            "asks for are not over"
        )
    decay, count = _constant(rule), None
    if isinstance(rule, tf_warmup) and rule == _torch_ema_rule(rule.decay):
        decay, count = rule.decay, progress.num_updates
    if decay is None:
        raise _no_words("torch_ema", rule)
    has_collected = held.applied is not None or (held.origin.has_collected and held.collected)
    return {
        "decay": decay,
        "num_updates": count,
        "shadow_params": _list_of(held.averages[average], held),
        "collected_params": _list_of(held.collected, held) if has_collected else None,
    }


def _torch_ema_rule(decay: float) -> tf_warmup:
    """Its count has the update in it that is being done."""
    return tf_warmup(decay, offset=1)


#: What diffusers says of its decay, and what it takes where nothing is said.
_DIFFUSERS: dict[str, Any] = {
    "decay": 0.9999,
    "min_decay": 0.0,
    "update_after_step": 0,
    "use_ema_warmup": False,
    "inv_gamma": 1.0,
    "power": 2 / 3,
}


def _read_diffusers(state: State, held: Held) -> Saved:
    """Any key may be absent, and then what it would say stays as it is."""
    said = {key: state[key] for key in _DIFFUSERS if key in state}
    rule, progress, origin = held.decays[0], held.progress, held.origin
    if said:
        own = {} if progress.num_copies == 0 else {"update_after_step": progress.num_copies - 1}
        options = {**_DIFFUSERS, **(_diffusers_options(held, 0) or own), **said}
        rule, copies = _diffusers_rule(options)
        progress = progress._replace(update_after_step=copies * progress.update_every)
        origin = origin._replace(diffusers=options)
    if "optimization_step" in state:
        progress = progress.after_due(integer(state, "optimization_step"))
    average = {}
    if "shadow_params" in state:
        average = _listed("shadow_params", state, held)
        origin = origin._replace(dtypes=_dtypes(average))
    return Saved([average], [rule], progress, origin=origin)


def _diffusers_rule(options: State) -> tuple[DecayRule, int]:
    """The decay, and how many updates copy: as many as come before k = 0.

    What copies at k = 0 by itself, as ``inverse_power`` does, is not counted among them.
    """
    for key in ("decay", "min_decay"):
        check_decay(options[key])
    at_least = 0 if options["use_ema_warmup"] else -1  # where -1 would average from k = 1 on
    lowest, after = options["min_decay"], integer(options, "update_after_step", at_least)
    highest = max(options["decay"], lowest)
    if not options["use_ema_warmup"]:
        return tf_warmup(highest, lowest, offset=1), after + 1
    return inverse_power(highest, options["inv_gamma"], options["power"], lowest), after


def _diffusers_options(held: Held, average: int) -> dict[str, Any] | None:
    """What diffusers would say of an average's decay; None if it has no words for it."""
    rule, copies, known = held.decays[average], held.progress.num_copies, held.origin.diffusers
    if known and _diffusers_rule(known) == (rule, copies):
        return dict(known)
    if isinstance(rule, inverse_power):
        return {
            "decay": rule.decay,
            "min_decay": rule.min_decay,
            "update_after_step": copies,
            "use_ema_warmup": True,
            "inv_gamma": rule.gamma,
            "power": rule.power,
        }
    highest = lowest = _constant(rule)
    if isinstance(rule, tf_warmup) and rule.offset == 1:
        highest, lowest = rule.decay, rule.min_decay
    if highest is None:
        return None
    found = {"decay": highest, "min_decay": lowest, "update_after_step": copies - 1}
    return {**_DIFFUSERS, **found}


def _write_diffusers(held: Held, average: int) -> dict[str, Any]:
    options = _diffusers_options(held, average)
    if options is None:
        raise _no_words("diffusers", held.decays[average])
    return {
        "decay": options["decay"],
        "min_decay": options["min_decay"],
        "optimization_step": held.progress.num_due,
        **{key: options[key] for key in list(_DIFFUSERS)[2:]},
        "shadow_params": _list_of(held.averages[average], held),
    }


def _constant(rule: DecayRule) -> float | None:
    """The decay that is the same at every update, if it is."""
    if isinstance(rule, (constant, half_life)):
        return rule(0)
    return None if callable(rule) else float(rule)


def _no_words(package: str, rule: DecayRule) -> ValueError:
    return ValueError(f"export_state_dict: {package} cannot keep the decay {rule}")


def _listed(key: str, state: State, held: Held) -> dict[str, Tensor]:
    """The tensors of a list by name, each as often in it as in ``parameters()``."""
    argument, tensors, names = f"state_dict[{key!r}]", state[key], _positions(held)
    if not isinstance(tensors, (list, tuple)) or len(tensors) != len(names):
        found = len(tensors) if isinstance(tensors, (list, tuple)) else type(tensors).__name__
        raise ValueError(
            f"{argument}: expected {len(names)} tensors, those of {names}, got {found}"
        )
    by_name: dict[str, Tensor] = {}
    for name, tensor in zip(names, tensors, strict=True):
        add_once(argument, by_name, name, tensor)
    check_match(argument, by_name, {name: held.averages[0][name] for name in by_name})
    return by_name


def _list_of(tensors: Mapping[str, Tensor], held: Held) -> list[Tensor]:
    return [_as_exported(name, tensors[name], held) for name in _positions(held)]


def _positions(held: Held) -> list[str]:
    """The names of tracked parameters, in the order of ``parameters()``."""
    firsts = map(held.names.first, held.names.positions)
    return [name for name in firsts if name in held.averages[0]]


# --- whole modules: AveragedModel, timm and ema_pytorch -------------------------------------------


def _read_averaged_model(state: State, held: Held) -> Saved:
    """Its first update copies, of whatever decay; some schedules do so by themselves."""
    rule = held.decays[0]
    copies = 0 if callable(rule) and rule(0) == 0 else 1
    progress = held.progress._replace(update_after_step=copies)
    progress = progress.after_due(integer(state, "n_averaged"))
    return _read_module(_inside(state, "module.", ("n_averaged",)), held, progress)


def _write_averaged_model(held: Held, average: int) -> dict[str, Any]:
    count = torch.tensor(held.progress.num_due)
    return {"n_averaged": count, **_module(held, average, "module.")}


def _read_timm(state: State, held: Held) -> Saved:
    """It has no counter: what was averaged is not to be overwritten by steps that copy."""
    progress = held.progress
    if progress.num_updates == 0:
        progress = progress.after_updates(0)
    return _read_module(state.get("state_dict_ema", state), held, progress)


def _write_timm(held: Held, average: int) -> dict[str, Any]:
    return _module(held, average, "module.")


def _read_ema_pytorch(state: State, held: Held) -> Saved:
    """The weights of ``online_model`` are left to the model's own checkpoint."""
    has_online = any(name.startswith("online_model.") for name in state)
    averaged = {name: t for name, t in state.items() if not name.startswith("online_model.")}
    progress = held.progress._replace(num_steps=integer(state, "step"))
    saved = _read_module(_inside(averaged, "ema_model.", ("initted", "step")), held, progress)
    return saved._replace(origin=saved.origin._replace(has_online=has_online))


def _write_ema_pytorch(held: Held, average: int) -> dict[str, Any]:
    steps = held.progress.num_steps
    state: dict[str, Any] = {"initted": torch.tensor(steps > 0), "step": torch.tensor(steps)}
    if held.origin.has_online:
        weights = held.names.under_every_name(held.weights)
        state |= {f"online_model.{name}": weights[name] for name in held.names.layout}
    return {**state, **_module(held, average, "ema_model.")}


def _inside(state: State, prefix: str, counters: tuple[str, ...]) -> dict[str, Any]:
    """What is under a prefix, without it."""
    unknown = [name for name in state if name not in counters and not name.startswith(prefix)]
    if unknown:
        raise ValueError(f"state_dict: expected names that begin with {prefix!r}, got {unknown}")
    return {name[len(prefix) :]: t for name, t in state.items() if name not in counters}


def _read_module(found: State, held: Held, progress: Progress) -> Saved:
    """A module's ``state_dict()``; what the EMA does not track in it is passed over."""
    if not isinstance(found, Mapping):
        raise ValueError(f"state_dict: expected tensors by name, got {type(found).__name__}")
    first = held.names.first
    kept, persistent = {**held.averages[0], **held.copied}, set(map(first, held.names.layout))
    tensors = {name: t for name, t in found.items() if not name.endswith("_extra_state")}
    tracked = {
        name: tensor
        for name, tensor in named_as(tensors, held.names.layout).items()
        if first(name) in kept or first(name) not in persistent
    }
    expected = {name: tensor for name, tensor in kept.items() if name in persistent}
    found = fitted("state_dict", tracked, expected, held.names)
    return Saved(
        averages=[{name: t for name, t in found.items() if name in held.averages[0]}],
        decays=[None],
        progress=progress,
        copied={name: t for name, t in found.items() if name in held.copied},
        origin=Origin(_dtypes(found)),
    )


def _module(held: Held, average: int, prefix: str) -> dict[str, Tensor]:
    """The ``state_dict()`` of a copy of the module that holds an average."""
    tensors = {**held.weights, **held.averages[average], **held.copied}
    names = [(name, held.names.first(name)) for name in held.names.layout]
    return {prefix + name: _as_exported(first, tensors[first], held) for name, first in names}


def _as_exported(name: str, tensor: Tensor, held: Held) -> Tensor:
    return tensor.detach().to(held.origin.dtypes.get(name, held.weights[name].dtype))


def _dtypes(tensors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in tensors.items()}


_WRITERS: dict[str, Callable[[Held, int], dict[str, Any]]] = {
    "torch_ema": _write_torch_ema,
    "diffusers": _write_diffusers,
    "averaged_model": _write_averaged_model,
    "timm": _write_timm,
    "ema_pytorch": _write_ema_pytorch,
}
