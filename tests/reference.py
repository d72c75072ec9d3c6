"""The oracle: momentum SGD and EMA in fp64, straight from their equations, and the tolerances.

A test hands the oracle the state in which a step started, exactly as it was stored, so that every
step is judged by itself and no tolerance has to grow along a trajectory. `checked_step` runs one
step of an optimizer and asserts all that a step promises.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_opt import SGD

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALF_DTYPES = (torch.bfloat16, torch.float16)
FULL_DTYPES = (torch.float32, torch.float64)

#: The key of a parameter's momentum in `optimizer.state[p]`, by formulation.
MOMENTUM_KEYS = {"torch": "momentum_buffer", "sutskever": "velocity"}

# --- equations


@dataclass(frozen=True)
class Rule:
    """The hyper-parameters of one step."""

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    formulation: str = "torch"
    decoupled_weight_decay: bool = False

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Rule:
        """Reads the rule from a param group; a hyper-parameter may be a tensor of one element."""
        return cls(
            lr=float(group["lr"]),
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            weight_decay=float(group["weight_decay"]),
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            formulation=group.get("formulation", "torch"),
            decoupled_weight_decay=group.get("decoupled_weight_decay", False),
        )


class Step(NamedTuple):
    """A step's result in fp64. `momentum` is None when the rule has none."""

    param: Tensor
    momentum: Tensor | None


def sgd(rule: Rule, param: Tensor, grad: Tensor, momentum: Tensor | None) -> Step:
    """One step from the given state; `momentum` is None at a parameter's first, undamped step."""
    p, g = param.double(), grad.double()
    v = None if momentum is None else momentum.double()
    lr, mu, kept = rule.lr, rule.momentum, 1.0 - rule.dampening

    d = -g if rule.maximize else g
    if rule.decoupled_weight_decay:
        p = p - lr * rule.weight_decay * p
    elif rule.weight_decay != 0:  # as in torch: without it, a non-finite parameter stays out of d
        d = d + rule.weight_decay * p
    if mu == 0:
        return Step(p - lr * d, None)
    if rule.formulation == "torch":
        v = d if v is None else mu * v + kept * d
        return Step(p - lr * (d + mu * v if rule.nesterov else v), v)
    v = -lr * d if v is None else mu * v - lr * kept * d
    return Step(p + (mu * v - lr * d if rule.nesterov else v), v)


def ema(decay: float, shadow: Tensor, param: Tensor) -> Tensor:
    """The shadow after one update: s + (1 - decay)(p - s), in its form without cancellation."""
    s, p = shadow.double(), param.double()
    return s + (1.0 - decay) * (p - s) if decay > 0.5 else p - decay * (p - s)


# --- tolerances


@dataclass(frozen=True)
class Tolerance:
    """How far a stored value may be from the oracle."""

    #: The dtype in which a step computes.
    compute: torch.dtype
    #: Largest relative error of one rounding in that dtype.
    unit: float
    #: Largest error of rounding a result that underflows in that dtype.
    tiny: float
    #: The number of results that round: ours, and the oracle's where it computes in the same dtype.
    rounding_sides: int
    #: Whether storing the result rounds once more, to the nearest.
    narrows: bool


# The promise for one step in fp32, u being the update direction, is
#     |x - oracle| <= 2 * 2^-24 * (|p| + |lr * u|).
# `assert_within_the_promise` checks it as it stands, on data where u is computed without
# cancellation. In general the terms of u may cancel and p may be small, so the bound used elsewhere
# takes each term of u positive and counts the roundings on the longest path through the
# equations (12 on lr * u, 2 on p):
#     |x - oracle| <= 2^-24 * (2 * |p| + 12 * |lr| * (sum of the magnitudes of u's terms)).
# No order of evaluation exceeds it, and no wrong formula stays within it.
# fp64 is alike with 2^-53, twice: the oracle rounds as often as the step.
# Half types compute in fp32 and round the result once: x lies between the roundings of both ends of
# the interval that fp32 allows, that is |x - oracle| <= half an ulp of x + the bound of fp32.
TOLERANCES = {
    torch.float32: Tolerance(torch.float32, 2.0**-24, 2.0**-149, 1, narrows=False),
    torch.float64: Tolerance(torch.float64, 2.0**-53, 2.0**-1074, 2, narrows=False),
    torch.bfloat16: Tolerance(torch.float32, 2.0**-24, 2.0**-149, 1, narrows=True),
    torch.float16: Tolerance(torch.float32, 2.0**-24, 2.0**-149, 1, narrows=True),
}
ROUNDINGS_OF_A_PARAM = 2
ROUNDINGS_OF_A_RETAINED_PARAM = 5  # 1 - lr * weight_decay rounds twice, and its product with p once
ROUNDINGS_OF_AN_UPDATE = 12
ROUNDINGS_OF_A_MOMENTUM = 6
ROUNDINGS_OF_A_SHADOW = 4


class Sizes(NamedTuple):
    """What a step's errors are relative to: the sizes of the update `lr * u` and the momentum."""

    update: Tensor
    momentum: Tensor


def sgd_sizes(rule: Rule, param: Tensor, grad: Tensor, momentum: Tensor | None) -> Sizes:
    """The equations of `sgd` with every term positive."""
    p, g = param.double().abs(), grad.double().abs()
    v = None if momentum is None else momentum.double().abs()
    mu, kept = rule.momentum, abs(1.0 - rule.dampening)
    scale_outside, scale_inside = (rule.lr, 1.0) if rule.formulation == "torch" else (1.0, rule.lr)

    decay = 0.0 if rule.decoupled_weight_decay else rule.weight_decay
    d = scale_inside * (g + decay * p)
    if mu == 0:
        return Sizes(scale_outside * d, d)
    v = d if v is None else mu * v + kept * d
    return Sizes(scale_outside * (d + mu * v if rule.nesterov else v), v)


def assert_near(actual: Tensor, expected: Tensor, size: Tensor, what: str) -> None:
    """Asserts that `actual` is `expected`, up to the rounding of `size` and its own narrowing.

    Args:
        actual: The stored result.
        expected: The oracle's, in fp64.
        size: The sum of the magnitudes that were rounded on the way, in fp64.
        what: What is compared, for the message.
    """
    table = TOLERANCES[actual.dtype]
    bound = table.rounding_sides * (table.unit * size + table.tiny * ROUNDINGS_OF_AN_UPDATE)
    low, high = expected - bound, expected + bound
    if table.narrows:
        low, high = (end.to(table.compute).to(actual.dtype).double() for end in (low, high))
    got = actual.detach().double()
    wrong = ~((low <= got) & (got <= high)) & ~(got.isnan() & expected.isnan())
    if not wrong.any():
        return
    index = tuple(int(i) for i in wrong.nonzero()[0]) if wrong.dim() else ()
    raise AssertionError(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} elements ({actual.dtype}) are off; at "
        f"{index} got {got[index].item()!r}, expected {expected[index].item()!r}, allowed "
        f"[{low[index].item()!r}, {high[index].item()!r}]"
    )


def assert_sgd_step(
    rule: Rule,
    before: tuple[Tensor, Tensor, Tensor | None],
    param: Tensor,
    momentum: Tensor | None,
    what: str = "",
) -> None:
    """Asserts one step from `before`, a (parameter, gradient, momentum) triple."""
    expected, sizes = sgd(rule, *before), sgd_sizes(rule, *before)
    of_param = (
        ROUNDINGS_OF_A_RETAINED_PARAM if rule.decoupled_weight_decay else ROUNDINGS_OF_A_PARAM
    )
    size = of_param * before[0].double().abs() + ROUNDINGS_OF_AN_UPDATE * sizes.update
    assert_near(param, expected.param, size, f"{what} parameter")
    if expected.momentum is not None:
        assert momentum is not None, f"{what} has no momentum buffer"
        assert_near(
            momentum,
            expected.momentum,
            ROUNDINGS_OF_A_MOMENTUM * sizes.momentum,
            f"{what} momentum",
        )


def assert_ema_update(
    decay: float, before: Tensor, param: Tensor, shadow: Tensor, what: str = ""
) -> None:
    """Asserts one update of the shadow from `before` towards `param`, which is given as stored."""
    expected = ema(decay, before, param)
    step = min(decay, 1.0 - decay) * (before.double().abs() + param.detach().double().abs())
    assert_near(shadow, expected, ROUNDINGS_OF_A_SHADOW * (expected.abs() + step), f"{what} shadow")


def assert_within_the_promise(
    rule: Rule, before: tuple[Tensor, Tensor, Tensor | None], param: Tensor
) -> None:
    """Asserts |x - oracle| <= 2 * unit * (|p| + |lr * u|), for data without cancellation."""
    p, expected = before[0].double(), sgd(rule, *before).param
    unit = TOLERANCES[param.dtype].unit
    excess = (param.detach().double() - expected).abs() / (p.abs() + (p - expected).abs())
    assert excess.max() <= 2 * unit, f"{excess.max() / unit} units"


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Asserts equal dtype, shape and bits; NaNs are equal, for their payloads are not promised."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} is not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    a, b = (t.detach().cpu().contiguous().resolve_neg() for t in (actual, expected))
    differ = (a.view(integer) != b.view(integer)) & ~(a.isnan() & b.isnan())
    assert not differ.any(), (
        f"{what}: {int(differ.sum())} of {differ.numel()} elements differ, "
        f"first {a[differ][0].item()!r} against {b[differ][0].item()!r}"
    )


# --- building blocks


def random_tensor(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(device, dtype)


def make_params(
    shapes: Iterable[Sequence[int]],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> list[torch.nn.Parameter]:
    """Parameters of the given shapes with random values."""
    return [
        torch.nn.Parameter(random_tensor(shape, dtype, device, seed=1000 * seed + i))
        for i, shape in enumerate(shapes)
    ]


def set_gradients(params: Iterable[Tensor], seed: int) -> None:
    """Gives every parameter a random gradient, fresh or written into the one it has."""
    for i, p in enumerate(params):
        values = random_tensor(p.shape, p.dtype, p.device, seed=77_000 + 1000 * seed + i)
        if p.grad is None:
            p.grad = values
        else:
            p.grad.copy_(values)


def legal_flags(**axes: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of constructor flags that torch accepts, crossed with further `axes`."""
    names = ("momentum", "dampening", "weight_decay", "nesterov", "maximize", *axes)
    values = ((0, 0.9), (0, 0.5), (0, 0.1), (False, True), (False, True), *axes.values())
    combinations = [dict(zip(names, c, strict=True)) for c in itertools.product(*values)]
    return [
        flags
        for flags in combinations
        if not flags["nesterov"] or (flags["momentum"] != 0 and flags["dampening"] == 0)
    ]


def flag_id(flags: Any) -> str:
    """A readable test id: the flags that are on."""
    on = [k if v is True else f"{k}={v}" for k, v in flags.items() if v not in (0, False, None)]
    return ",".join(on) or "plain"


def momentum_of(optimizer: torch.optim.Optimizer, param: Tensor) -> Tensor | None:
    """The parameter's momentum as the optimizer stores it, or None before its first step."""
    group = next(g for g in optimizer.param_groups if any(q is param for q in g["params"]))
    # `state` is a defaultdict: a look-up must not create what the test is about.
    state = optimizer.state.get(param, {})
    return state.get(MOMENTUM_KEYS[group.get("formulation", "torch")])


# --- one checked step


class _Before(NamedTuple):
    """What a parameter, its gradient and its momentum were before a step."""

    param: Tensor
    pointer: int
    version: int
    grad: Tensor | None
    grad_object: Tensor | None
    grad_pointer: int | None
    grad_version: int | None
    momentum: Tensor | None


def _snapshot(optimizer: torch.optim.Optimizer, p: Tensor) -> _Before:
    momentum, grad = momentum_of(optimizer, p), p.grad
    return _Before(
        param=p.detach().clone(),
        pointer=p.data_ptr(),
        version=p._version,
        grad=None if grad is None else grad.detach().clone(),
        grad_object=grad,
        grad_pointer=None if grad is None else grad.data_ptr(),
        grad_version=None if grad is None else grad._version,
        momentum=None if momentum is None else momentum.detach().clone(),
    )


def checked_step(
    optimizer: torch.optim.Optimizer,
    tracked: Sequence[Tensor] = (),
    *,
    grad_scale: float = 1.0,
) -> None:
    """Runs `optimizer.step()` and asserts all that a step promises, against the oracle.

    Parameters, momentum and shadows are one step on. What has no gradient is untouched and gets no
    state. Gradients keep their storage and their bits, or are zero where the group asks for that.
    Parameters keep their storage, and whatever is written counts one more version.

    Args:
        optimizer: The optimizer.
        tracked: The parameters that `optimizer.ema` tracks, in the order of its shadows.
        grad_scale: What the gradients are to be divided by.
    """
    average = getattr(optimizer, "ema", None)
    shadows = list(average.shadows.values()) if average is not None else []
    assert len(shadows) == len(tracked)
    before = [
        [(p, _snapshot(optimizer, p)) for p in group["params"]] for group in optimizer.param_groups
    ]
    shadows_before = [(s.detach().clone(), s._version) for s in shadows]

    optimizer.step()

    for i, (group, members) in enumerate(zip(optimizer.param_groups, before, strict=True)):
        for j, (p, old) in enumerate(members):
            _assert_stepped(optimizer, group, p, old, grad_scale, f"group {i}, parameter {j}:")
    for (old_shadow, version), shadow, p in zip(shadows_before, shadows, tracked, strict=True):
        is_frozen = isinstance(p, torch.nn.Parameter) and not p.requires_grad
        assert_ema_update(0.0 if is_frozen else average.decay, old_shadow, p, shadow)
        assert shadow._version > version or not shadow.numel(), "a shadow's version is not bumped"


def _assert_stepped(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    p: Tensor,
    old: _Before,
    grad_scale: float,
    what: str,
) -> None:
    assert p.data_ptr() == old.pointer, f"{what} the storage changed"
    assert p.grad is old.grad_object, f"{what} the gradient was replaced"
    momentum = momentum_of(optimizer, p)
    if old.grad is None:
        assert_same_bits(p, old.param, f"{what} a parameter without gradient")
        assert (momentum is None) == (old.momentum is None), f"{what} state without a gradient"
        if momentum is not None:
            assert_same_bits(momentum, old.momentum, f"{what} momentum without gradient")
        return
    rule = Rule.of(group)
    grad = old.grad.double() / grad_scale
    assert_sgd_step(rule, (old.param, grad, old.momentum), p, momentum, what)
    assert p._version > old.version or not p.numel(), f"{what} its version is not bumped"
    if rule.momentum == 0:
        assert (momentum is None) == (old.momentum is None), f"{what} momentum without momentum"
    else:
        assert (momentum.dtype, momentum.shape) == (p.dtype, p.shape), f"{what} a wrong momentum"
    expected = old.grad
    if group.get("reset_grads"):
        expected = torch.zeros_like(old.grad)
        assert p.grad._version > old.grad_version or not p.numel(), f"{what} a reset is not counted"
    assert p.grad.data_ptr() == old.grad_pointer, f"{what} the gradient's storage changed"
    assert_same_bits(p.grad, expected, f"{what} gradient")


def trajectory(
    optimizer: torch.optim.Optimizer, steps: int = 5, tracked: Sequence[Tensor] = ()
) -> None:
    """Checked steps on fresh random gradients."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        set_gradients(params, seed=step)
        checked_step(optimizer, tracked)


def all_params(optimizer: SGD) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def everything(optimizer: SGD) -> list[Tensor]:
    """All that a step may change, except the gradients."""
    state = [
        value
        for p in all_params(optimizer)
        for _, value in sorted(optimizer.state.get(p, {}).items())
    ]
    shadows = [] if optimizer.ema is None else list(optimizer.ema.shadows.values())
    return [*all_params(optimizer), *state, *shadows]


def assert_all_same_bits(one: list[Tensor], two: list[Tensor]) -> None:
    assert len(one) == len(two)
    for i, (a, b) in enumerate(zip(one, two, strict=True)):
        assert_same_bits(a, b, f"tensor {i}")


class AveragedNet(torch.nn.Module):
    """What averages trip over: BatchNorm, tied weights, a frozen layer, a layer of bfloat16."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Linear(6, 4, bias=False)
        self.norm = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(6, 4, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)
        self.low = torch.nn.Linear(4, 3).to(torch.bfloat16)
        self.register_buffer("cache", torch.zeros(2), persistent=False)
