"""fused_opt.functional.sgd_step and ema_update: steps that autograd looks through."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from reference import assert_same_bits, random_tensor
from torch import Tensor

from fused_opt.functional import ema_update, sgd_step

SHAPES = [(5,), (2, 3), (), (0,), (1, 2, 2)]
HYPERS = ("lr", "momentum", "weight_decay", "dampening")
VALUES = {"lr": 0.3, "momentum": 0.7, "weight_decay": 0.2, "dampening": 0.4}


def tensors(
    shapes: Any = SHAPES,
    dtype: torch.dtype = torch.float64,
    device: Any = "cpu",
    seed: int = 0,
    requires_grad: bool = True,
) -> list[Tensor]:
    made = [random_tensor(s, dtype, device, seed=100 * seed + i) for i, s in enumerate(shapes)]
    return [t.requires_grad_(requires_grad) for t in made]


def plain_step(
    params, grads, buffers, *, lr, momentum=0, weight_decay=0, dampening=0, **flags
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The equations as they stand, with numbers in fp64."""

    def number(value: Any, i: int) -> Any:
        value = value[i] if isinstance(value, list) else value
        return value.reshape(()).double() if isinstance(value, Tensor) else value

    new_params, new_buffers = [], []
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        v = None if buffers is None else buffers[i]
        if g is None:
            new_params.append(p)
            new_buffers.append(v)
            continue
        eta, mu, lam, tau = (number(h, i) for h in (lr, momentum, weight_decay, dampening))
        kept = isinstance(mu, Tensor) or mu != 0
        p64, g64 = p.double(), g.double()
        d = -g64 if flags.get("maximize") else g64
        if isinstance(lam, Tensor) or lam != 0:
            d = d + lam * p64
        new = d if v is None or not kept else mu * v.double() + (1 - tau) * d
        u = d + mu * new if flags.get("nesterov") else new
        new_params.append(p64 - eta * u)
        new_buffers.append(new if kept else None)
    return new_params, new_buffers


def plain_update(shadows, params, *, decay) -> list[Tensor]:
    if isinstance(decay, Tensor):
        decay = decay.reshape(()).double()
    return [
        decay * s.double() + (1 - decay) * p.double() for s, p in zip(shadows, params, strict=True)
    ]


class Case(NamedTuple):
    """The options of a step, and which of its hyper-parameters are tensors."""

    nesterov: bool
    dampened: bool
    first: bool
    maximize: bool
    decays: bool
    learned: tuple[str, ...]
    zero: bool = False

    def hypers(self, dtype: torch.dtype = torch.float64, device: Any = "cpu") -> dict[str, Any]:
        values = dict(VALUES)
        if not self.dampened:
            values["dampening"] = 0
        if not self.decays:
            values["weight_decay"] = 0
        found: dict[str, Any] = {}
        for k, (name, value) in enumerate(values.items()):
            shape = (1,) if k % 2 else ()
            if name in self.learned:
                value = 0.0 if self.zero else value
                value = torch.full(shape, value, dtype=dtype, device=device, requires_grad=True)
            found[name] = value
        return found

    @property
    def flags(self) -> dict[str, bool]:
        return {"nesterov": self.nesterov, "maximize": self.maximize}

    def __str__(self) -> str:
        words = [
            name
            for name in ("nesterov", "dampened", "first", "maximize", "decays", "zero")
            if getattr(self, name)
        ]
        return "-".join([*words, *self.learned]) or "plain"


LEARNED = [(), *((name,) for name in HYPERS), HYPERS]
CASES = [
    case
    for options in itertools.product((False, True), repeat=5)
    for learned in LEARNED
    for zero in ((False, True) if learned else (False,))
    # With a number, torch has no Nesterov momentum beside dampening.
    if not (
        (case := Case(*options, learned, zero)).nesterov
        and case.dampened
        and "dampening" not in learned
    )
]


def outputs(result: tuple[list[Tensor], list[Tensor | None]]) -> list[Tensor]:
    return [t for t in (*result[0], *result[1]) if t is not None and t.requires_grad]


def derivatives(found: list[Tensor], inputs: list[Tensor], seed: int = 7) -> list[Tensor | None]:
    """Of a sum in which every element of every output has a weight of its own."""
    total = sum(
        (random_tensor(tuple(t.shape), torch.float64, t.device, seed=seed + i) * t.double()).sum()
        for i, t in enumerate(found)
    )
    return list(torch.autograd.grad(total, inputs, allow_unused=True))


def assert_derivatives(found, expected, tolerance: float) -> None:
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        if b is None or a is None:
            for each in (a, b):
                assert each is None or not each.any(), f"input {k}"
            continue
        torch.testing.assert_close(
            a.double(), b.double(), rtol=tolerance, atol=tolerance, msg=lambda m, k=k: f"{k}: {m}"
        )


# --- the equations


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_and_its_gradients_follow_the_equations(case, device):
    params, grads = (tensors(device=device, seed=seed) for seed in (1, 2))
    buffers = None if case.first else tensors(device=device, seed=3)
    hypers = case.hypers(device=device)
    result = sgd_step(params, grads, buffers, **hypers, **case.flags)
    expected = plain_step(params, grads, buffers, **hypers, **case.flags)
    for a, b in zip(result[0] + result[1], expected[0] + expected[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
    inputs = [*params, *grads, *(buffers or []), *(hypers[name] for name in case.learned)]
    found, wanted = (derivatives(outputs(each), inputs) for each in (result, expected))
    assert_derivatives(found, wanted, 1e-13)


def checked_function(case: Case) -> tuple[Any, list[Tensor]]:
    """The step as a function of all that requires a gradient, for gradcheck."""
    shapes = [(3,), (1, 2)]
    params, grads = (tensors(shapes, seed=seed) for seed in (1, 2))
    buffers = [] if case.first else tensors(shapes, seed=3)
    hypers = case.hypers()
    inputs = [*params, *grads, *buffers, *(hypers[name] for name in case.learned)]

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        left = list(inputs)
        params, grads = ([left.pop(0) for _ in shapes] for _ in range(2))
        buffers = None if case.first else [left.pop(0) for _ in shapes]
        own = {**hypers, **dict(zip(case.learned, left, strict=True))}
        return tuple(outputs(sgd_step(params, grads, buffers, **own, **case.flags)))

    return function, inputs


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck_and_gradgradcheck_of_a_step(case):
    function, inputs = checked_function(case)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("value", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("learned", [False, True])
def test_update_and_its_gradients_follow_the_equation(value, learned, device):
    shadows, params = (tensors(device=device, seed=seed) for seed in (1, 2))
    decay = torch.tensor(value, dtype=torch.float64, device=device, requires_grad=True)
    decay = decay if learned else value
    result, expected = (call(shadows, params, decay=decay) for call in (ema_update, plain_update))
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
    inputs = [*shadows, *params, *([decay] if learned else [])]
    found, wanted = (derivatives(each, inputs) for each in (result, expected))
    assert_derivatives(found, wanted, 1e-13)


@pytest.mark.parametrize("value", [0.0, 0.3, 0.9, 1.0])
def test_gradcheck_and_gradgradcheck_of_an_update(value):
    inputs = [*tensors([(3,)], seed=1), *tensors([(3,)], seed=2)]
    decay = torch.tensor([value], dtype=torch.float64, requires_grad=True)

    def learned(s: Tensor, p: Tensor, decay: Tensor) -> Tensor:
        return ema_update([s], [p], decay=decay)[0]

    def fixed(s: Tensor, p: Tensor) -> Tensor:
        return ema_update([s], [p], decay=value)[0]

    for function, own in ((learned, [*inputs, decay]), (fixed, inputs)):
        assert torch.autograd.gradcheck(function, own)
        assert torch.autograd.gradgradcheck(function, own)


# --- what is returned


def test_parameter_without_a_gradient_comes_back_as_it_is(device):
    params, grads, buffers = (tensors(device=device, seed=seed) for seed in (1, 2, 3))
    grads[1] = grads[3] = None
    new_params, new_buffers = sgd_step(params, grads, buffers, lr=0.1, momentum=0.9)
    for i in range(len(params)):
        same = i in (1, 3)
        assert (new_params[i] is params[i]) == same
        assert (new_buffers[i] is buffers[i]) == same


def test_nothing_to_step_is_no_fault():
    assert sgd_step([], [], lr=0.1, momentum=0.9) == ([], [])
    assert ema_update([], [], decay=0.9) == []
    p = torch.ones(2)
    assert sgd_step([p], [None], lr=0.1) == ([p], [None])


@pytest.mark.parametrize("momentum", [0, 0.9, torch.tensor(0.0)], ids=str)
def test_buffers_exist_where_there_is_momentum(momentum):
    params, grads, buffers = (tensors(seed=seed) for seed in (1, 2, 3))
    kept = isinstance(momentum, Tensor) or momentum != 0
    for given in (None, buffers, [None, *buffers[1:]]):
        found = sgd_step(params, grads, given, lr=0.1, momentum=momentum)[1]
        assert all((each is not None) == kept for each in found)


@pytest.mark.parametrize("grad_mode", [True, False])
def test_inputs_are_not_written_and_results_are_new_memory(grad_mode, device):
    params, grads, buffers = (tensors(device=device, seed=seed) for seed in (1, 2, 3))
    before = [t.detach().clone() for t in params + grads + buffers]
    versions = [t._version for t in params + grads + buffers]
    with torch.set_grad_enabled(grad_mode):
        for flags in ({}, {"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.1}):
            for given in (None, buffers):
                new_params, new_buffers = sgd_step(params, grads, given, lr=0.1, **flags)
                for t in (*new_params, *new_buffers):
                    assert t is None or t.requires_grad == grad_mode
                    if t is not None:
                        t.data.fill_(7)
        for t in ema_update(params, grads, decay=0.0):
            t.data.fill_(7)
    for t, old, version in zip(params + grads + buffers, before, versions, strict=True):
        assert_same_bits(t.detach(), old)
        assert t._version == version


# --- arguments at fault

P, G = torch.ones(2), torch.ones(2)
FAULTS: dict[str, tuple[type[Exception], str, Any]] = {
    "length of grads": (
        ValueError,
        "grads: expected 1 entries.* got 2",
        lambda: sgd_step([P], [G, G], lr=1),
    ),
    "length of buffers": (
        ValueError,
        "momentum_buffers: expected 1 entries.* got 0",
        lambda: sgd_step([P], [G], [], lr=1),
    ),
    "length of lr": (
        ValueError,
        "lr: expected 1 entries.* got 2",
        lambda: sgd_step([P], [G], lr=[1, 1]),
    ),
    "elements of lr": (ValueError, "lr must be 1-element", lambda: sgd_step([P], [G], lr=P)),
    "complex momentum": (
        ValueError,
        "momentum must be a real number",
        lambda: sgd_step([P], [G], lr=1, momentum=torch.tensor(1j)),
    ),
    "word for lr": (
        TypeError,
        "lr: expected a number.* got str",
        lambda: sgd_step([P], [G], lr="0.1"),
    ),
    "word in a list": (
        TypeError,
        r"momentum\[0\]: expected a number.* got str",
        lambda: sgd_step([P], [G], lr=1, momentum=["0.1"]),
    ),
    "shape of a gradient": (
        ValueError,
        r"grads\[1\]: expected shape \(2,\) like params\[1\].*3",
        lambda: sgd_step([P, P], [G, torch.ones(3)], lr=1),
    ),
    "shape of a buffer": (
        ValueError,
        r"momentum_buffers\[0\]: expected shape",
        lambda: sgd_step([P], [G], [torch.ones(1)], lr=1, momentum=0.9),
    ),
    "device of a gradient": (
        ValueError,
        r"grads\[0\]: expected device cpu like params\[0\].*meta",
        lambda: sgd_step([P], [G.to("meta")], lr=1),
    ),
    "no parameter": (
        TypeError,
        r"params\[0\]: expected a torch.Tensor, got float",
        lambda: sgd_step([1.0], [G], lr=1),
    ),
    "no gradient": (
        TypeError,
        r"grads\[0\]: expected a torch.Tensor, got int",
        lambda: sgd_step([P], [1], lr=1),
    ),
    "no buffer": (
        TypeError,
        r"momentum_buffers\[0\]: expected a torch.Tensor, got int",
        lambda: sgd_step([P], [G], [1], lr=1, momentum=0.9),
    ),
    "integers": (
        ValueError,
        r"params\[0\]: expected a floating-point or complex dtype",
        lambda: sgd_step([torch.ones(2, dtype=torch.int64)], [G], lr=1),
    ),
    "nesterov without momentum": (
        ValueError,
        "Nesterov momentum requires",
        lambda: sgd_step([P], [G], lr=1, nesterov=True),
    ),
    "nesterov with dampening": (
        ValueError,
        "Nesterov momentum requires",
        lambda: sgd_step([P], [G], lr=1, momentum=0.9, dampening=0.1, nesterov=True),
    ),
    "length of params": (
        ValueError,
        "params: expected 1 entries",
        lambda: ema_update([P], [P, P], decay=0.5),
    ),
    "shape of a parameter": (
        ValueError,
        r"params\[0\]: expected shape.* like shadows\[0\]",
        lambda: ema_update([P], [torch.ones(3)], decay=0.5),
    ),
    "decay out of range": (
        ValueError,
        "Invalid decay: 1.5",
        lambda: ema_update([P], [P], decay=1.5),
    ),
    "elements of decay": (
        ValueError,
        "decay must be 1-element",
        lambda: ema_update([P], [P], decay=torch.ones(2)),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_names_the_argument(fault):
    kind, message, call = FAULTS[fault]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("momentum", [0.0, -0.5])
def test_nesterov_does_not_look_at_tensors(momentum):
    zero = torch.tensor(momentum, requires_grad=True)
    (p,), (v,) = sgd_step([P], [G], [P], lr=1, momentum=zero, dampening=zero + 0.5, nesterov=True)
    (p.sum() + v.sum()).backward()
    assert zero.grad is not None
