"""What a step of an optimizer and its average must make of everything that a run holds.

A `Snapshot` is all that can be observed of a training run, by key. The functions here predict what
the next one holds, from the equations of reference.py in fp64 and the snapshot before: a value
where it is exact, and a function that checks it where it was rounded. Every step starts from what
was stored before, so that no tolerance grows with the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from reference import (
    HALF_DTYPES,
    MOMENTUM_KEYS,
    ROUNDINGS_OF_A_MOMENTUM,
    ROUNDINGS_OF_A_PARAM,
    ROUNDINGS_OF_A_RETAINED_PARAM,
    ROUNDINGS_OF_A_SHADOW,
    ROUNDINGS_OF_AN_UPDATE,
    TOLERANCES,
    Rule,
    assert_near,
    assert_same_bits,
    ema,
    sgd,
    sgd_sizes,
)
from torch import Tensor

Key = tuple[Any, ...]
Snapshot = dict[Key, Any]
#: Checks one value of the snapshot after a step, which it gets whole.
Check = Callable[[Snapshot], None]

#: What must not be there afterwards.
GONE = object()

REFINEMENT_KEYS = {"fp32": "master", "split": "residual", "kahan": "compensation"}
BF16, F16 = HALF_DTYPES

# Tolerances, in roundings of the dtype that a step computes in (see reference.TOLERANCES), beyond
# those of reference.py. A norm of float32 gradients is within 11 roundings of float32 (test_clip.py
# has the proof), one of float64 gradients alone within 28 of float64, and the product of a gradient
# with the coefficient that comes from it rounds 3 times more.
NORM_ROUNDINGS = {torch.float32: 11, torch.float64: 28}
ROUNDINGS_OF_A_CLIP = 3


def assert_snapshots_agree(expected: Snapshot, now: Snapshot) -> None:
    """Asserts that everything is as expected, to the bit where no function says otherwise."""
    expected = {key: value for key, value in expected.items() if value is not GONE}
    missing, unknown = expected.keys() - now.keys(), now.keys() - expected.keys()
    assert not missing, f"gone: {sorted(map(str, missing))}"
    assert not unknown, f"appeared: {sorted(map(str, unknown))}"
    for key, value in expected.items():
        if callable(value):
            value(now)
        elif isinstance(value, Tensor):
            assert isinstance(now[key], Tensor), f"{key}: {now[key]!r} is no tensor"
            assert_same_bits(now[key], value, str(key))
        else:
            assert now[key] == value, f"{key}: expected {value!r}, got {now[key]!r}"


class Clipping(NamedTuple):
    """What multiplies all gradients, and its largest relative error."""

    coefficient: float = 1.0
    error: float = 0.0
    norm: float | None = None


class Averaging(NamedTuple):
    """What the next update of an average is made with, apart from its count of steps."""

    decays: Sequence[Callable[[int], float]]
    every: int = 1
    after: int = 0
    frozen: frozenset[str] = frozenset()  # that did not train when they were registered


# --- the whole step -------------------------------------------------------------------------------


def after_step(
    known: Snapshot, averaging: Averaging | None, *, scale: float = 1.0, skipped: bool = False
) -> Snapshot:
    """What a step changes. ``scale`` is what the gradients were multiplied by."""
    changes: Snapshot = {}
    clipping = clipping_of(known, scale)
    for group, name in members(known):
        grad = known["grad", name]
        if grad is None:
            continue
        if group["reset_grads"]:
            changes["grad", name] = torch.zeros_like(grad)
        if not skipped:
            changes |= _stepped(known, name, group, grad.double() / scale, clipping)
    changes["grad_norm",] = None if clipping.norm is None else _near_norm(clipping)
    if skipped:
        return changes
    if any(group["stochastic_rounding"] for group in groups(known)):
        for i, group in enumerate(groups(known)):
            changes["group", i, "rounding_steps"] = group["rounding_steps"] + 1
    if averaging is not None:
        changes |= after_update(known, averaging, in_step=True)
    return changes


def groups(known: Snapshot) -> list[dict[str, Any]]:
    """The options of every param group."""
    found: list[dict[str, Any]] = [{} for _ in known["members",]]
    for key, value in known.items():
        if key[0] == "group":
            found[key[1]][key[2]] = value
    return found


def members(known: Snapshot) -> Iterator[tuple[dict[str, Any], str]]:
    """The parameters of the optimizer, each with the options of its group."""
    for group, names in zip(groups(known), known["members",], strict=True):
        for name in names:
            yield group, name


def clipping_of(known: Snapshot, scale: float) -> Clipping:
    """The norm of the gradients without their scale, and how they are clipped by it."""
    max_norm = known["group", 0, "max_grad_norm"]
    if max_norm is None:
        return Clipping()
    grads = [known["grad", name] for _, name in members(known)]
    grads = [grad for grad in grads if grad is not None]
    flat = [grad.double().flatten() / scale for grad in grads]
    norm = float(torch.cat([torch.zeros(1, dtype=torch.float64), *flat]).norm())
    wide = all(grad.dtype == torch.float64 for grad in grads)
    dtype = torch.float64 if wide else torch.float32
    error = NORM_ROUNDINGS[dtype] * TOLERANCES[dtype].unit
    return Clipping(min(1.0, max_norm / (norm + 1e-6)), error, norm)


def _near_norm(clipping: Clipping) -> Check:
    def check(now: Snapshot) -> None:
        assert clipping.norm is not None
        error = (clipping.error + 2.0**-24) * clipping.norm + 1e-40
        found = float(now["grad_norm",])
        if not math.isfinite(clipping.norm):
            assert repr(found) == repr(clipping.norm)
            return
        assert abs(found - clipping.norm) <= error, f"norm {found}, expected {clipping.norm}"

    return check


def _stepped(
    known: Snapshot, name: str, group: dict[str, Any], grad: Tensor, clipping: Clipping
) -> Snapshot:
    """The parameter, its momentum and its refinement after a step."""
    rule, param = Rule.of(group), known["param", name]
    mode = group["master_weights"] if param.dtype in HALF_DTYPES else None
    start = exact_before(known, name, mode)
    momentum = momentum_before(known, name, group) if rule.momentum else None
    before = (start, grad * clipping.coefficient, momentum)
    expected, sizes = sgd(rule, *before), sgd_sizes(rule, *before)
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    clip = clipping.error / TOLERANCES[dtype].unit + ROUNDINGS_OF_A_CLIP
    clip = 0.0 if clipping.norm is None else clip
    kept = ROUNDINGS_OF_A_RETAINED_PARAM if rule.decoupled_weight_decay else ROUNDINGS_OF_A_PARAM
    size = kept * start.double().abs() + (ROUNDINGS_OF_AN_UPDATE + clip) * sizes.update
    stochastic = group["stochastic_rounding"]
    found: Snapshot = refined(name, mode, param.dtype, expected.param, size, stochastic)
    if mode is not None:
        for other in set(REFINEMENT_KEYS.values()) - {REFINEMENT_KEYS[mode]}:
            if (other, name) in known:
                found[other, name] = GONE
    if expected.momentum is not None:
        key, other = MOMENTUM_KEYS[rule.formulation], other_key(rule.formulation)
        dtype = momentum_dtype(known, name, group) if momentum is None else None
        size = (ROUNDINGS_OF_A_MOMENTUM + clip) * sizes.momentum
        found[key, name] = stored((key, name), expected.momentum, size, stochastic, dtype)
        if (other, name) in known:
            found[other, name] = GONE
    return found


# --- what a step starts from ----------------------------------------------------------------------


def exact_before(known: Snapshot, name: str, mode: str | None) -> Tensor:
    """The value that a parameter stands for, with what refines it."""
    param = known["param", name]
    if mode is None:
        return param
    held = {key: known[key, name] for key in REFINEMENT_KEYS.values() if (key, name) in known}
    if mode == "kahan":
        return param.float() + held["compensation"].float() if held else param.float()
    return exact_value(param, held)


def exact_value(param: Tensor, held: dict[str, Tensor]) -> Tensor:
    """The master, whole or in two halves; the parameter itself where there is none."""
    if "master" in held:
        return held["master"]
    if "residual" in held:
        upper = param.contiguous().view(torch.int16).to(torch.int32) << 16
        return (upper + held["residual"].to(torch.int32)).view(torch.float32)
    return param.float()


def momentum_before(known: Snapshot, name: str, group: dict[str, Any]) -> Tensor | None:
    """The momentum, converted by today's learning rate if it is that of the other formulation."""
    own, other = MOMENTUM_KEYS[group["formulation"]], other_key(group["formulation"])
    if known.get((own, name)) is not None:
        return known[own, name]  # type: ignore[no-any-return]
    held = known.get((other, name))
    if held is None:
        return None
    return held * -group["lr"] if own == "velocity" else held / -group["lr"]


def other_key(formulation: str) -> str:
    return MOMENTUM_KEYS["sutskever" if formulation == "torch" else "torch"]


def momentum_dtype(known: Snapshot, name: str, group: dict[str, Any]) -> torch.dtype:
    """That of a first momentum."""
    dtype: torch.dtype = known["param", name].dtype
    has_master = group["master_weights"] in ("fp32", "split") and dtype in HALF_DTYPES
    return group["state_dtype"] or (torch.float32 if has_master else dtype)


# --- what a step stores ---------------------------------------------------------------------------


def refined(
    name: str, mode: str | None, dtype: torch.dtype, value: Tensor, size: Tensor, stochastic: bool
) -> Snapshot:
    """How a parameter and its refinement store a value."""
    if mode is None:
        return {("param", name): stored(("param", name), value, size, stochastic)}
    if mode == "kahan":
        return _compensated(name, value, size)
    key = REFINEMENT_KEYS[mode]

    def check(now: Snapshot) -> None:
        held = {key: now[key, name]}
        assert held[key].dtype == (torch.int16 if mode == "split" else torch.float32), key
        exact = exact_value(now["param", name], held)
        assert_near(exact, value, size, f"the master of {name}")
        rounded = ties_away(exact) if dtype == BF16 else exact.to(F16)
        assert_same_bits(now["param", name], rounded, f"{name} beside its master")

    return {("param", name): check, (key, name): check}


def _compensated(name: str, value: Tensor, size: Tensor) -> Snapshot:
    def check(now: Snapshot) -> None:
        param, lost = now["param", name], now["compensation", name]
        assert lost.dtype == param.dtype
        assert_near(param, value, size, name)
        finfo = torch.finfo(param.dtype)
        error = 2.0**-24 * size + finfo.eps / 2 * lost.double().abs()
        error += finfo.smallest_normal * finfo.eps
        total = param.double() + lost.double()
        assert ((total - value).abs() <= error).all(), f"{name} with its compensation"

    return {("param", name): check, ("compensation", name): check}


def ties_away(exact: Tensor) -> Tensor:
    """Float32 rounded to bfloat16, ties away from zero."""
    bits = exact.contiguous().view(torch.int32)
    return ((bits + 0x8000) >> 16).to(torch.int16).view(BF16)


def stored(
    key: Key, value: Tensor, size: Tensor, stochastic: bool, dtype: torch.dtype | None = None
) -> Check:
    """Checks a tensor that was rounded where it was stored, to the nearest or to a neighbour."""

    def check(now: Snapshot) -> None:
        found = now[key]
        assert dtype is None or found.dtype == dtype, f"{key}: {found.dtype} is not {dtype}"
        if not (stochastic and found.dtype in HALF_DTYPES):
            assert_near(found, value, size, str(key))
            return
        error = 2.0**-24 * size
        low = neighbour(value - error, found.dtype, -1)
        high = neighbour(value + error, found.dtype, 1)
        assert ((low <= found.double()) & (found.double() <= high)).all(), f"{key}: not beside it"

    return check


def neighbour(values: Tensor, dtype: torch.dtype, side: int) -> Tensor:
    """The largest number of the dtype that is not above each value, or the smallest not below."""
    numbers, values = _numbers(dtype), values.contiguous()
    if side > 0:
        return numbers[torch.searchsorted(numbers, values).clamp(max=len(numbers) - 1)]
    return numbers[(torch.searchsorted(numbers, values, right=True) - 1).clamp(min=0)]


@cache
def _numbers(dtype: torch.dtype) -> Tensor:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).double()
    return every[~every.isnan()].unique()


# --- the average ----------------------------------------------------------------------------------


def after_update(known: Snapshot, averaging: Averaging, *, in_step: bool) -> Snapshot:
    """What an update of the average changes; in a step, after it has changed the parameters."""
    t, every, after = known["ema", "num_steps"], averaging.every, averaging.after
    changes: Snapshot = {("ema", "num_steps"): t + 1}
    if t % every:
        return changes
    modes = {name: group["master_weights"] for group, name in members(known)} if in_step else {}
    stochastic = in_step and any(group["stochastic_rounding"] for group in groups(known))
    copies = t < after
    k = -(-t // every) - -(-after // every)
    for key in known:
        if key[0] == "shadow":
            _, average, name = key
            is_frozen = name in averaging.frozen and not known["trains", name]
            decay = 0.0 if copies or is_frozen else averaging.decays[average](k)
            changes[key] = _averaged(known, key, decay, modes.get(name), stochastic)
        elif key[0] == "copy":
            changes[key] = known["buffer", key[1]]
    return changes


def _averaged(known: Snapshot, key: Key, decay: float, mode: str | None, stochastic: bool) -> Check:
    shadow, name = known[key].double(), key[2]

    def check(now: Snapshot) -> None:
        assert now[key].dtype == known[key].dtype
        value = now["param", name].double()
        held = {k: now[k, name] for k in ("master", "residual") if (k, name) in now}
        if mode is not None and held:
            value = exact_value(now["param", name], held).double()
        expected = ema(decay, shadow, value)
        step = min(decay, 1.0 - decay) * (shadow.abs() + value.abs())
        size = ROUNDINGS_OF_A_SHADOW * (expected.abs() + step)
        stored(key, expected, size, stochastic)(now)

    return check


# --- what a step refuses --------------------------------------------------------------------------


def refusal(known: Snapshot, averaging: Averaging | None, *, in_step: bool = True) -> str | None:
    """Why a step must raise ValueError, from the table of dtypes in README.md; None if it is fine.

    What does not fit comes about when a model is converted and the optimizer's state is not.
    """
    stepped = list(members(known)) if in_step else []
    faults = [_row_refusal(known, group, name) for group, name in stepped]
    if averaging is not None and known["ema", "num_steps"] % averaging.every == 0:
        modes = {name: group["master_weights"] for group, name in stepped}
        faults += [
            _shadow_refusal(known, key, modes.get(key[2])) for key in known if key[0] == "shadow"
        ]
    return next((fault for fault in faults if fault is not None), None)


def _row_refusal(known: Snapshot, group: dict[str, Any], name: str) -> str | None:
    param, mode, wrong = known["param", name], group["master_weights"], None
    if known["grad", name] is None:
        return None
    if mode is not None:
        wrong = _refinement_refusal(known, name, mode)
    if group["momentum"]:
        own, other = MOMENTUM_KEYS[group["formulation"]], other_key(group["formulation"])
        held = known.get((own, name))
        if held is None and known.get((other, name)) is not None:
            held = known[other, name]
            if own == "momentum_buffer" and group["lr"] == 0:
                wrong = f"{name}: a velocity cannot be divided by 0"
        dtype = momentum_dtype(known, name, group) if held is None else held.dtype
        if not _fits(param.dtype, dtype):
            wrong = f"{name}: {dtype} momentum beside {param.dtype}"
    return wrong


def _refinement_refusal(known: Snapshot, name: str, mode: str) -> str | None:
    """The refinement that is held must be the mode's, or one that becomes it exactly."""
    dtype = known["param", name].dtype
    held = [key for key in REFINEMENT_KEYS.values() if (key, name) in known]
    if dtype not in HALF_DTYPES:
        return f"{name}: {dtype} is refined" if REFINEMENT_KEYS[mode] in held else None
    if mode == "split" and dtype != BF16:
        return f"{name}: {dtype} cannot be split"
    if "residual" in held and dtype != BF16:
        return f"{name}: a residual beside {dtype}"
    if "compensation" in held and known["compensation", name].dtype != dtype:
        return f"{name}: the compensation of another dtype"
    if held and ("compensation" in held) != (mode == "kahan"):
        return f"{name}: {held} cannot become {mode}"
    return None


def _shadow_refusal(known: Snapshot, key: Key, mode: str | None) -> str | None:
    dtype, name = known["param", key[2]].dtype, key[2]
    if not _fits(dtype, known[key].dtype, shadow=True):
        return f"{name}: a {known[key].dtype} shadow beside {dtype}"
    held = [k for k in REFINEMENT_KEYS.values() if (k, name) in known]
    if mode is None or not held:
        return None
    if dtype not in HALF_DTYPES or ("residual" in held and dtype != BF16):
        return f"{name}: {held} beside {dtype}"
    if "compensation" in held and known["compensation", name].dtype != dtype:
        return f"{name}: the compensation of another dtype"
    return None


def _fits(param: torch.dtype, other: torch.dtype, *, shadow: bool = False) -> bool:
    if param == torch.float64:
        return other == torch.float64 or (shadow and other == torch.float32)
    return other != torch.float64
