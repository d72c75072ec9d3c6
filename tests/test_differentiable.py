"""fused_opt.functional.sgd_step and ema_update: steps that autograd looks through."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from reference import assert_same_bits, random_tensor
from torch import Tensor

from fused_opt import _C, _differentiable
from fused_opt._differentiable import SgdHypers
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


@pytest.fixture(params=["kernels", "torch"])
def path(request, monkeypatch) -> str:
    """Where a step runs: in our kernels, or in the torch operations that stand for them."""
    if request.param == "torch":
        monkeypatch.setattr(_differentiable, "_are_values_real", lambda: False)
    return request.param


def is_one_node(found: list[Tensor]) -> bool:
    """Whether all of them come from one node of the graph, which is ours."""
    nodes = {id(t.grad_fn) for t in found if t.grad_fn is not None}
    names = {type(t.grad_fn).__name__ for t in found if t.grad_fn is not None}
    return len(nodes) == 1 and names <= {"_SgdStepBackward", "_EmaUpdateBackward"}


def plain_step(
    params, grads, buffers=None, *, lr, momentum=0, weight_decay=0, dampening=0, **flags
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
def test_step_and_its_gradients_follow_the_equations(case, path, device):
    params, grads = (tensors(device=device, seed=seed) for seed in (1, 2))
    buffers = None if case.first else tensors(device=device, seed=3)
    hypers = case.hypers(device=device)
    result = sgd_step(params, grads, buffers, **hypers, **case.flags)
    expected = plain_step(params, grads, buffers, **hypers, **case.flags)
    assert is_one_node(outputs(result)) == (path == "kernels")
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
def test_gradcheck_and_gradgradcheck_of_a_step(case, path):
    function, inputs = checked_function(case)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("value", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("learned", [False, True])
def test_update_and_its_gradients_follow_the_equation(value, learned, path, device):
    shadows, params = (tensors(device=device, seed=seed) for seed in (1, 2))
    decay = torch.tensor(value, dtype=torch.float64, device=device, requires_grad=True)
    decay = decay if learned else value
    result, expected = (call(shadows, params, decay=decay) for call in (ema_update, plain_update))
    assert is_one_node(result) == (path == "kernels")
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
    inputs = [*shadows, *params, *([decay] if learned else [])]
    found, wanted = (derivatives(each, inputs) for each in (result, expected))
    assert_derivatives(found, wanted, 1e-13)


@pytest.mark.parametrize("value", [0.0, 0.3, 0.9, 1.0])
def test_gradcheck_and_gradgradcheck_of_an_update(value, path):
    inputs = [*tensors([(3,)], seed=1), *tensors([(3,)], seed=2)]
    decay = torch.tensor([value], dtype=torch.float64, requires_grad=True)

    def learned(s: Tensor, p: Tensor, decay: Tensor) -> Tensor:
        return ema_update([s], [p], decay=decay)[0]

    def fixed(s: Tensor, p: Tensor) -> Tensor:
        return ema_update([s], [p], decay=value)[0]

    for function, own in ((learned, [*inputs, decay]), (fixed, inputs)):
        assert torch.autograd.gradcheck(function, own)
        assert torch.autograd.gradgradcheck(function, own)


# --- sizes, dtypes, orders

CHUNK = _C.norm_chunk_elements
LANES = _C.norm_lanes // 2
#: On both sides of a vector, a tile, all lanes of a sum, a thread's share and a chunk.
SIZES = [
    1,
    3,
    4,
    5,
    15,
    17,
    63,
    64,
    65,
    LANES - 1,
    LANES,
    LANES + 1,
    2 * LANES + 3,
    CHUNK - 1,
    CHUNK,
    CHUNK + 1,
    2 * CHUNK + 77,
]

#: Of single sums and products in float32, and of sums of as many as there are in SIZES.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
def test_all_sizes_follow_the_equations(dtype, nesterov, device):
    shapes = [(n,) for n in SIZES]
    params, grads, buffers = (tensors(shapes, dtype, device, seed) for seed in (1, 2, 3))
    hypers = Case(nesterov, True, False, False, True, HYPERS).hypers(dtype, device)
    result, expected = (
        call(params, grads, buffers, **hypers, nesterov=nesterov) for call in (sgd_step, plain_step)
    )
    assert is_one_node(outputs(result))
    tolerance = TOLERANCE[dtype]
    for a, b in zip(result[0] + result[1], expected[0] + expected[1], strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    found, wanted = (
        derivatives(outputs(each), [*params, *grads, *buffers]) for each in (result, expected)
    )
    assert_derivatives(found, wanted, 4 * tolerance)

    # By a hyper-parameter it is a sum with terms of either sign: the error is relative to all.
    for k, name in enumerate(HYPERS):
        result, expected = (
            call(params, grads, buffers, **hypers, nesterov=nesterov)
            for call in (sgd_step, plain_step)
        )
        (a,), (b,) = (derivatives(outputs(each), [hypers[name]]) for each in (result, expected))
        scale = sum(SIZES) ** 0.5
        assert (a.dtype, a.shape) == (dtype, hypers[name].shape)
        assert (a.double() - b).abs().item() <= 10 * tolerance * scale, (k, name)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_update_of_all_sizes_follows_the_equation(dtype, device):
    shapes = [(n,) for n in SIZES]
    shadows, params = (tensors(shapes, dtype, device, seed) for seed in (1, 2))
    decay = torch.tensor(0.7, dtype=dtype, device=device, requires_grad=True)
    found, wanted = (
        derivatives(call(shadows, params, decay=decay), [*shadows, *params, decay])
        for call in (ema_update, plain_update)
    )
    assert_derivatives(found[:-1], wanted[:-1], 4 * TOLERANCE[dtype])
    scale = sum(SIZES) ** 0.5
    assert (found[-1].double() - wanted[-1]).abs().item() <= 10 * TOLERANCE[dtype] * scale


def test_float32_numbers_beside_float64_parameters_are_used_as_they_are(path):
    params, grads, buffers = (tensors(seed=seed) for seed in (1, 2, 3))
    hypers = Case(False, True, False, False, True, HYPERS).hypers(torch.float32)
    result, expected = (call(params, grads, buffers, **hypers) for call in (sgd_step, plain_step))
    for a, b in zip(result[0] + result[1], expected[0] + expected[1], strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)
    numbers = list(hypers.values())
    found, wanted = (derivatives(outputs(each), numbers) for each in (result, expected))
    for a, b, number in zip(found, wanted, numbers, strict=True):
        assert (a.dtype, a.shape) == (torch.float32, number.shape)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64], ids=str
)
def test_hyper_parameters_of_every_dtype(dtype, device):
    params, grads = (tensors(device=device, seed=seed, dtype=torch.float32) for seed in (1, 2))
    lr = torch.tensor([3], dtype=dtype, device=device)
    learned = dtype.is_floating_point
    lr.requires_grad_(learned)
    result, expected = (call(params, grads, lr=lr) for call in (sgd_step, plain_step))
    for a, b in zip(result[0], expected[0], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6)
    if learned:
        (a,), (b,) = (derivatives(each[0], [lr]) for each in (result, expected))
        assert a.dtype == dtype
        torch.testing.assert_close(a, b)


KINDS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand_as(t),
    "negated": torch._neg_view,
    "offset": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view_as(t),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["params", "grads", "buffers", "derivatives"])
def test_any_strides(kind, which, device):
    lists = {
        name: [random_tensor((6, 7), torch.float64, device, seed=k)]
        for k, name in enumerate(("params", "grads", "buffers", "derivatives"))
    }
    lists[which] = [KINDS[kind](lists[which][0])]
    for name in ("params", "grads", "buffers"):
        lists[name] = [t.detach().requires_grad_() for t in lists[name]]
    *inputs, incoming = lists.values()
    hypers = Case(True, False, False, False, True, HYPERS[:3]).hypers(device=device)
    every = [t for some in inputs for t in some] + [hypers[name] for name in HYPERS[:3]]
    for flags in ({"nesterov": True}, {"maximize": True}):
        result, expected = (call(*inputs, **hypers, **flags) for call in (sgd_step, plain_step))
        torch.testing.assert_close(result, expected, rtol=1e-14, atol=1e-14)
        found, wanted = (
            torch.autograd.grad([each[0][0], each[1][0]], every, [incoming[0], incoming[0]])
            for each in (result, expected)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_results_keep_the_memory_format_of_parameters(device):
    image = random_tensor((2, 3, 4, 5), device=device)
    for fmt in (torch.channels_last, torch.contiguous_format):
        param = image.to(memory_format=fmt).requires_grad_()
        grad = random_tensor((2, 3, 4, 5), device=device, seed=1)
        (p,), (v,) = sgd_step([param], [grad], lr=0.1, momentum=0.9)
        (s,) = ema_update([param], [grad], decay=0.9)
        for t in (p, v, s):
            assert t.is_contiguous(memory_format=fmt)


def test_one_tensor_may_be_several_parameters():
    param, grad = (t[0] for t in (tensors([(5,)], seed=1), tensors([(5,)], seed=2)))
    found, expected = (
        call([param, param], [grad, grad], lr=0.1, momentum=0.9) for call in (sgd_step, plain_step)
    )
    a, b = (derivatives(outputs(each), [param, grad]) for each in (found, expected))
    assert_derivatives(a, b, 1e-14)


# --- groups


def test_entries_of_a_list_are_the_hyper_parameters_of_their_parameters(path, device):
    shapes = [(5,), (3,), (4,), (2,), (6,), (7,)]
    params, grads, buffers = (tensors(shapes, device=device, seed=seed) for seed in (1, 2, 3))
    buffers[3] = None  # of the same group as the second, but for that; the last is of the first's
    lrs = tensors([(), (1,), ()], device=device, seed=4)
    decay = torch.tensor(0.1, dtype=torch.float64, device=device, requires_grad=True)
    hypers: dict[str, Any] = {
        "lr": [lrs[0], lrs[1], lrs[0], lrs[1], 0.3, lrs[0]],
        "momentum": [0.9, lrs[2], 0, lrs[2], 0.9, 0.9],
        "weight_decay": [0.0, decay, decay, decay, 0.1, 0.0],
        "dampening": 0.3,
    }
    result, expected = (call(params, grads, buffers, **hypers) for call in (sgd_step, plain_step))
    assert [v is None for v in result[1]] == [False, False, True, False, False, False]
    assert is_one_node(outputs(result)) == (path == "kernels")
    inputs = [*params, *grads, *(b for b in buffers if b is not None), *lrs, decay]
    found, wanted = (derivatives(outputs(each), inputs) for each in (result, expected))
    assert_derivatives(found, wanted, 1e-13)


def test_every_parameter_may_have_hyper_parameters_of_its_own(device):
    shapes = [(k % 7 + 1,) for k in range(150)]  # more than a launch has place for
    params, grads = (tensors(shapes, device=device, seed=seed) for seed in (1, 2))
    lrs = tensors([()] * len(shapes), device=device, seed=3)
    result, expected = (call(params, grads, lr=lrs) for call in (sgd_step, plain_step))
    assert is_one_node(outputs(result))
    found, wanted = (derivatives(outputs(each), [*lrs, *grads]) for each in (result, expected))
    assert_derivatives(found, wanted, 1e-13)
    found, wanted = (
        derivatives(call(params, grads, decay=d), lrs)
        for call, d in (
            (ema_update, lrs),
            (
                lambda *a, decay: [d * s + (1 - d) * p for s, p, d in zip(*a, decay, strict=True)],
                lrs,
            ),
        )
    )
    assert_derivatives(found, wanted, 1e-13)


def test_number_zero_and_tensor_zero_differ():
    # A number has no term, and a tensor that holds 0 has one, and its gradient.
    params, grads = (tensors(seed=seed) for seed in (1, 2))
    zero = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for name in ("momentum", "weight_decay", "lr"):
        found = sgd_step(params, grads, grads, **{"lr": 0.1, "momentum": 0.9, name: zero})
        assert derivatives(outputs(found), [zero])[0].abs() > 1e-3


# --- which derivatives are asked for


@pytest.mark.parametrize("asked", [("params",), ("grads",), ("buffers",), ("lr",), ()])
def test_only_some_inputs_require_gradients(asked, path):
    params, grads, buffers = (
        tensors(seed=k, requires_grad=name in asked)
        for k, name in enumerate(("params", "grads", "buffers"))
    )
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad="lr" in asked)
    every = {"params": params, "grads": grads, "buffers": buffers, "lr": [lr]}
    inputs = [t for name in asked for t in every[name]]
    result, expected = (
        call(params, grads, buffers, lr=lr, momentum=0.9, weight_decay=0.1)
        for call in (sgd_step, plain_step)
    )
    if not asked:
        assert not outputs(result)
        return
    found, wanted = (derivatives(outputs(each), inputs) for each in (result, expected))
    assert_derivatives(found, wanted, 1e-13)


@pytest.mark.parametrize("flags", [{"momentum": 0.9}, {"momentum": 0.9, "weight_decay": 0.1}, {}])
@pytest.mark.parametrize("asked", ["param", "grad", "buffer"])
def test_what_depends_on_nothing_learned_is_a_constant(asked, flags, path):
    # The second row has the input that is asked for; a frozen parameter is the first.
    params, grads, buffers = (tensors(seed=seed, requires_grad=False) for seed in (1, 2, 3))
    {"param": params, "grad": grads, "buffer": buffers}[asked][1].requires_grad_()
    found, expected = (
        call(params, grads, buffers, lr=0.1, **flags) for call in (sgd_step, plain_step)
    )
    for of_found, of_expected in zip(found, expected, strict=True):
        for i, (t, e) in enumerate(zip(of_found, of_expected, strict=True)):
            assert (t is None) == (e is None)
            assert t is None or t.requires_grad == e.requires_grad, (i, t.requires_grad)
    assert not found[0][0].requires_grad
    assert found[0][1].requires_grad == (asked != "buffer" or bool(flags))


def test_what_no_learned_rate_reaches_is_a_constant(path):
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    params, grads, buffers = (tensors(seed=seed, requires_grad=False) for seed in (1, 2, 3))
    new_params, new_buffers = sgd_step(params, grads, buffers, lr=lr, momentum=0.9)
    assert all(p.requires_grad for p in new_params)
    assert not any(v.requires_grad for v in new_buffers)


def test_an_average_of_constants_is_a_constant(path):
    shadows, params = (tensors(seed=seed, requires_grad=False) for seed in (1, 2))
    params[1].requires_grad_()
    new = ema_update(shadows, params, decay=0.9)
    assert [s.requires_grad for s in new[:2]] == [False, True]


USES = {
    "parameters": lambda p, v: p,
    "buffers": lambda p, v: v,
    "one parameter": lambda p, v: p[1:2],
    "one buffer": lambda p, v: v[:1],
    "one of each": lambda p, v: [p[0], v[1]],
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("weight_decay", [0, 0.1])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_results_of_which_only_some_are_used(use, weight_decay, first, nesterov, path, device):
    shapes = [(5,), (2, 3), (4,)]
    params, grads, buffers = (tensors(shapes, device=device, seed=seed) for seed in (1, 2, 3))
    hypers = Case(nesterov, False, first, False, False, HYPERS).hypers(device=device)
    hypers["weight_decay"] = weight_decay
    inputs = [*params, *grads, *([] if first else buffers), hypers["lr"], hypers["momentum"]]
    found, wanted = (
        derivatives(
            USES[use](
                *call(params, grads, None if first else buffers, **hypers, nesterov=nesterov)
            ),
            inputs,
        )
        for call in (sgd_step, plain_step)
    )
    assert_derivatives(found, wanted, 1e-13)


def test_rows_that_nothing_depends_on_add_nothing(device):
    # Not even NaN, which 0 times their infinite values would be.
    params, grads, buffers = (tensors([(3,), (3,)], device=device, seed=s) for s in (1, 2, 3))
    with torch.no_grad():
        for t in (params[1], grads[1], buffers[1]):
            t.fill_(float("inf"))
    hypers = Case(False, True, False, False, True, HYPERS).hypers(device=device)
    numbers = list(hypers.values())
    new_params, new_buffers = sgd_step(params, grads, buffers, **hypers)
    for each in derivatives([new_params[0], new_buffers[0]], numbers):
        assert each.isfinite()


def saved_tensors(call: Any) -> list[Tensor]:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return saved


@pytest.mark.parametrize(
    ("learned", "nesterov", "expected"),
    [
        ((), False, ""),
        (("lr",), False, "v'"),
        (("lr",), True, "pgv'"),
        (("momentum",), False, "v"),
        (("momentum",), True, "vv'"),
        (("weight_decay",), False, "p"),
        (("dampening",), False, "pg"),
        (HYPERS, True, "pgvv'"),
    ],
)
def test_only_what_the_asked_for_gradients_need_is_saved(learned, nesterov, expected):
    (p,), (g,), (v,) = (tensors([(99,)], seed=seed) for seed in (1, 2, 3))
    hypers = Case(nesterov, False, False, False, True, learned).hypers()
    found = []
    saved = saved_tensors(
        lambda: found.extend(sgd_step([p], [g], [v], **hypers, nesterov=nesterov))
    )
    own = {t.data_ptr(): name for name, t in (("p", p), ("g", g), ("v", v), ("v'", found[1][0]))}
    names = [own[t.data_ptr()] for t in saved if t.numel() > 1]
    assert "".join(names) == expected


def test_without_momentum_only_the_learning_rate_needs_the_gradient():
    (p,), (g,) = (tensors([(99,)], seed=seed) for seed in (1, 2))
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    for value, decay, expected in ((0.1, 0.1, []), (lr, 0, [g]), (lr, 0.1, [p, g])):
        saved = saved_tensors(
            lambda value=value, decay=decay: sgd_step([p], [g], lr=value, weight_decay=decay)
        )
        pointers = [t.data_ptr() for t in saved if t.numel() > 1]
        assert pointers == [t.data_ptr() for t in expected]


def test_an_update_saves_only_what_a_learned_decay_needs():
    (s,), (p,) = (tensors([(99,)], seed=seed) for seed in (1, 2))
    assert not saved_tensors(lambda: ema_update([s], [p], decay=0.9))
    learned = torch.tensor(0.9, requires_grad=True)
    saved = saved_tensors(lambda: ema_update([s], [p], decay=learned))
    assert sum(t.numel() > 1 for t in saved) == 2


def test_nothing_is_recorded_without_a_need():
    params, grads, buffers = (tensors(seed=seed) for seed in (1, 2, 3))
    with torch.no_grad():
        found = sgd_step(params, grads, buffers, lr=0.1, momentum=0.9)
    plain = [[t.detach() for t in some] for some in (params, grads, buffers)]
    for new_params, new_buffers in (found, sgd_step(*plain, lr=0.1, momentum=0.9)):
        assert all(t.grad_fn is None for t in (*new_params, *new_buffers))


@pytest.mark.parametrize("stale", ["p", "g", "v", "v'", "lr"])
def test_what_has_changed_since_the_step_is_refused(stale):
    (p,), (g,), (v,) = (tensors([(9,)], seed=seed) for seed in (1, 2, 3))
    hypers = Case(True, False, False, False, True, HYPERS).hypers()
    found, buffers = sgd_step([p], [g], [v], **hypers, nesterov=True)
    changed = {"p": p, "g": g, "v": v, "v'": buffers[0], "lr": hypers["lr"]}[stale]
    with torch.no_grad():
        changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found[0].sum().backward()


def test_backward_twice_and_through_many_steps(path):
    # Five steps whose gradients come from the model, as in MAML.
    def loss(params: list[Tensor]) -> Tensor:
        return sum((p**3).sum() for p in params)

    params, buffers = tensors([(3,), (2, 2)], seed=1), None
    hypers = Case(True, False, False, False, True, HYPERS[:3]).hypers()
    inputs = [*params, *(hypers[name] for name in HYPERS[:3])]
    found = []
    for call in (sgd_step, plain_step):
        now, buffers = list(params), None
        for _ in range(5):
            grads = torch.autograd.grad(loss(now), now, create_graph=True)
            now, buffers = call(now, [0.01 * g for g in grads], buffers, **hypers, nesterov=True)
        for retain in (True, False):
            found.append(torch.autograd.grad(loss(now), inputs, retain_graph=retain))
    for each in found[:3]:
        assert_derivatives(each, found[3], 1e-11)


# --- transforms, modes, and tensors of other kinds


def test_vmap_over_tasks_matches_a_loop():
    shapes = [(4, 3), (4, 2, 2)]
    params, grads, buffers = (tensors(shapes, seed=s, requires_grad=False) for s in (1, 2, 3))
    lr = torch.rand(4, dtype=torch.float64)

    def step(params, grads, buffers, lr):
        return sgd_step(params, grads, buffers, lr=lr, momentum=0.9, weight_decay=lr)

    found = torch.vmap(step)(params, grads, buffers, lr)
    for k in range(4):
        lists = ([t[k] for t in some] for some in (params, grads, buffers))
        expected = step(*lists, lr[k])
        torch.testing.assert_close([[t[k] for t in some] for some in found], list(expected))


def test_step_inside_vmap_of_tensors_outside():
    (p,), (g,) = (tensors([(3,)], seed=seed) for seed in (1, 2))
    found = torch.vmap(lambda x: x * sgd_step([p], [g], lr=0.1)[0][0])(torch.arange(2.0))
    torch.testing.assert_close(found[1], (p - 0.1 * g))
    shadows = torch.vmap(lambda x: x * ema_update([p], [g], decay=0.5)[0])(torch.arange(2.0))
    torch.testing.assert_close(shadows[1], (p + g) / 2)


def meta_loss(param: Tensor, lr: Tensor) -> Tensor:
    grad = torch.func.grad(lambda p: (p**3).sum())(param)
    (new,), _ = sgd_step([param], [grad], lr=lr, momentum=0.9)
    (shadow,) = ema_update([param], [new], decay=lr)
    return (new**2).sum() + (shadow**3).sum()


def plain_meta_loss(param: Tensor, lr: Tensor) -> Tensor:
    new = param - lr * 3 * param**2
    shadow = lr * param + (1 - lr) * new
    return (new**2).sum() + (shadow**3).sum()


def test_transforms_compose():
    (params,), lr = tensors([(4, 3)], requires_grad=False), torch.rand(4, dtype=torch.float64)
    for transform in (
        lambda f: torch.vmap(torch.func.grad(f, argnums=(0, 1))),
        lambda f: torch.vmap(torch.func.jacrev(f, argnums=(0, 1))),
        lambda f: torch.vmap(torch.func.jacfwd(f, argnums=(0, 1))),
        lambda f: torch.vmap(torch.func.hessian(f)),
        lambda f: lambda p, x: torch.func.jvp(f, (p, x[0]), (p, x[1])),
    ):
        found, expected = (transform(f)(params, lr) for f in (meta_loss, plain_meta_loss))
        torch.testing.assert_close(found, expected)


def test_forward_mode():
    (p,), (g,) = (tensors([(3,)], seed=seed, requires_grad=False) for seed in (1, 2))
    with torch.autograd.forward_ad.dual_level():
        lr = torch.autograd.forward_ad.make_dual(torch.tensor(0.1), torch.tensor(1.0))
        (new,), _ = sgd_step([p], [g], lr=lr)
        tangent = torch.autograd.forward_ad.unpack_dual(new).tangent
    torch.testing.assert_close(tangent, -g)


def test_batched_backward():
    (p,), (g,), (v,) = (tensors([(3,)], seed=seed) for seed in (1, 2, 3))
    hypers = Case(True, False, False, False, True, HYPERS[:3]).hypers()
    inputs = [p, g, v, *(hypers[name] for name in HYPERS[:3])]
    eye = torch.eye(3, dtype=torch.float64)
    (new,), _ = sgd_step([p], [g], [v], **hypers, nesterov=True)
    found = torch.autograd.grad(new, inputs, eye, is_grads_batched=True, retain_graph=True)
    for k in range(3):
        expected = torch.autograd.grad(new, inputs, eye[k], retain_graph=True)
        torch.testing.assert_close(tuple(t[k] for t in found), expected)


def test_compiles_whole():
    (p,), (g,), (v,) = (tensors([(3,)], seed=seed) for seed in (1, 2, 3))
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def run(p, g, v, lr):
        params, buffers = sgd_step([p, g], [g, None], [v, None], lr=lr, momentum=0.9, dampening=0.1)
        return params[0] + buffers[0] + ema_update([p], [v], decay=lr)[0]

    inputs = (p, g, v, lr)
    found, expected = (
        f(*inputs) for f in (torch.compile(run, fullgraph=True, backend="aot_eager"), run)
    )
    torch.testing.assert_close(found, expected)
    a, b = (torch.autograd.grad(each.sum(), inputs) for each in (found, expected))
    torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.*jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traces_hold_torch_operations():
    step = torch.jit.trace(
        lambda p, g: sgd_step([p], [g], lr=0.5, momentum=0.9)[0][0], (P.detach(), G.detach())
    )
    p, g = torch.full_like(P, 5).detach(), torch.full_like(G, 2).detach()
    torch.testing.assert_close(step(p, g), sgd_step([p], [g], lr=0.5)[0][0])


def test_dispatch_modes_see_torch_operations():
    from torch.utils._python_dispatch import TorchDispatchMode

    names = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watch():
        sgd_step([P], [G], lr=0.1)
    assert "aten::mul.Tensor" in names


class Marked(torch.Tensor):
    """A subclass whose dispatcher sees every operation."""

    seen: list[str] = []  # noqa: RUF012

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    def __init__(self, data):
        self.data_inside = data

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func.name())
        args, kwargs = torch.utils._pytree.tree_map(
            lambda t: t.data_inside if isinstance(t, cls) else t, (args, kwargs or {})
        )
        found = func(*args, **kwargs)
        return cls(found) if isinstance(found, Tensor) else found


def test_subclasses_go_through_their_dispatcher():
    (p,), _ = sgd_step([Marked(torch.ones(3))], [Marked(torch.ones(3))], lr=0.1, momentum=0.9)
    assert isinstance(p, Marked)
    torch.testing.assert_close(p.data_inside, torch.full((3,), 0.9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_compute_in_float32(dtype, device):
    params, grads, buffers = (tensors(dtype=dtype, device=device, seed=seed) for seed in (1, 2, 3))
    lr = torch.tensor(0.1, device=device, requires_grad=True)
    options = {"lr": lr, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
    found = sgd_step(params, grads, buffers, **options)
    wide = [[t.detach().float() for t in some] for some in (params, grads, buffers)]
    expected = sgd_step(*wide, **options)
    for a, b in zip(found[0] + found[1], expected[0] + expected[1], strict=True):
        torch.testing.assert_close(a, b.to(dtype), rtol=0, atol=0)
    for each in derivatives(outputs(found), [*params, lr]):
        assert each.isfinite().all()


def test_complex_and_sparse_and_mixed_tensors():
    weight = random_tensor((4, 2), torch.float64)
    phase = torch.complex(weight, weight.flip(0)).requires_grad_()
    lr = torch.tensor(0.1, requires_grad=True)
    params = [weight.requires_grad_(), phase, weight.float()]
    grads = [torch.ones_like(weight).to_sparse(), torch.ones_like(phase) * (1 + 2j), weight]
    new, buffers = sgd_step(params, grads, lr=lr, momentum=0.9)
    assert [t.dtype for t in new] == [t.dtype for t in params]
    torch.testing.assert_close(new[0], weight - lr)
    torch.testing.assert_close(new[1], phase - lr.double() * (1 + 2j))
    torch.testing.assert_close(new[2], (0.9 * weight).float())
    sum(t.abs().sum() for t in new).backward()
    assert lr.grad is not None
    assert weight.grad is not None
    assert all(v.layout == torch.strided for v in buffers)


def test_sparse_derivatives_of_results():
    table = random_tensor((5, 2), torch.float64).requires_grad_()
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    found = []
    for sparse in (True, False):
        (new,), _ = sgd_step([table], [table], lr=lr, weight_decay=0.1)
        rows = torch.nn.functional.embedding(torch.tensor([1, 3]), new, sparse=sparse)
        found.append(torch.autograd.grad((rows**2).sum(), [table, lr]))
    torch.testing.assert_close(*found)


# --- the same bits


@pytest.fixture
def original_isa():
    before = _C.cpu_isa()
    yield
    _C.set_cpu_isa(before)


def all_bits(device: Any, dtype: torch.dtype) -> list[Tensor]:
    """What steps of all kinds and their derivatives are."""
    shapes = [(n,) for n in (1, 77, 5000, 3 * CHUNK + 5, 100_003)]
    made = [tensors(shapes, dtype, "cpu", seed, requires_grad=False) for seed in (1, 2, 3)]
    params, grads, buffers = ([t.to(device).requires_grad_() for t in some] for some in made)
    buffers[1] = None
    found: list[Tensor] = []
    for nesterov, maximize in itertools.product((False, True), repeat=2):
        hypers = Case(nesterov, True, False, maximize, True, HYPERS).hypers(dtype, device)
        result = sgd_step(params, grads, buffers, **hypers, nesterov=nesterov, maximize=maximize)
        inputs = [*params, *grads, *(b for b in buffers if b is not None), *hypers.values()]
        found += [*result[0], *result[1], *derivatives(outputs(result), inputs)]
    decay = torch.tensor(0.7, dtype=dtype, device=device, requires_grad=True)
    shadows = ema_update(params, grads, decay=decay)
    found += [*shadows, *derivatives(shadows, [*params, *grads, decay])]
    return [t.detach().cpu() for t in found]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_threads_and_isa_levels_change_no_bit(dtype, original_isa):
    torch.set_num_threads(1)
    expected = all_bits("cpu", dtype)
    for isa in _C.cpu_isas():
        _C.set_cpu_isa(isa)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for k, (a, b) in enumerate(zip(all_bits("cpu", dtype), expected, strict=True)):
                assert_same_bits(a, b, f"{isa}, {threads} threads, tensor {k}")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_gpu_has_the_bits_of_the_cpu(dtype):
    # The incoming derivatives are numbers, the same on both.
    for k, (a, b) in enumerate(zip(all_bits("cuda", dtype), all_bits("cpu", dtype), strict=True)):
        assert_same_bits(a, b, f"tensor {k}")


@pytest.mark.cuda
def test_a_step_and_its_backward_do_not_wait_for_the_gpu():
    params, grads, buffers = (tensors(device="cuda", seed=seed) for seed in (1, 2, 3))
    hypers = Case(True, True, False, False, True, HYPERS).hypers(device="cuda")
    decay = torch.tensor(0.5, device="cuda", requires_grad=True)
    incoming = [torch.ones_like(p) for p in params]

    def run() -> None:
        new_params, _ = sgd_step(params, grads, buffers, **hypers, nesterov=True)
        shadows = ema_update(new_params, params, decay=decay)
        torch.autograd.grad(shadows, [*params, *grads, *hypers.values(), decay], incoming)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_numbers_on_the_cpu_serve_parameters_on_the_gpu_and_the_other_way():
    for of_params, of_number in (("cuda", "cpu"), ("cpu", "cuda")):
        params, grads = (tensors(device=of_params, seed=seed) for seed in (1, 2))
        lr = torch.tensor([0.1], device=of_number, requires_grad=True)
        found = sgd_step(params, grads, lr=lr)
        (by_lr,) = derivatives(outputs(found), [lr])
        expected = sgd_step([p.cpu() for p in params], [g.cpu() for g in grads], lr=lr.cpu())
        for a, b in zip(found[0], expected[0], strict=True):
            torch.testing.assert_close(a.cpu(), b)
        assert by_lr.device == lr.device


# --- writing to given tensors


def into(params, grads, buffers, out, **hypers):
    return _differentiable.step(params, grads, buffers, SgdHypers(**hypers), False, False, out)


def test_results_are_written_to_given_tensors(path, device):
    params, grads, buffers = (
        tensors(device=device, seed=s, requires_grad=False) for s in (1, 2, 3)
    )
    out = tuple(tensors(device=device, seed=s, requires_grad=False) for s in (4, 5))
    grads[2] = None
    expected = sgd_step(params, grads, buffers, lr=0.1, momentum=0.9)
    versions = [t._version for t in out[0]]
    found = into(params, grads, buffers, out, lr=0.1, momentum=0.9)
    for some, given, wanted, old in zip(found, out, expected, (params, buffers), strict=True):
        for i, (a, b, c) in enumerate(zip(some, given, wanted, strict=True)):
            assert a is (old[i] if i == 2 else b)
            assert_same_bits(a, c)
    assert all(
        t._version > v for i, (t, v) in enumerate(zip(out[0], versions, strict=True)) if i != 2
    )

    shadows = _differentiable.update(params, buffers, 0.9, out[0])
    for a, b, c in zip(shadows, out[0], ema_update(params, buffers, decay=0.9), strict=True):
        assert a is b
        assert_same_bits(a, c)


def test_given_tensors_of_another_order_or_none_are_no_fault():
    params, grads = (tensors([(4, 3)] * 2, seed=s, requires_grad=False) for s in (1, 2))
    other = torch.zeros(3, 4, dtype=torch.float64).t()
    found, buffers = into(params, grads, None, ([other, None], [None, None]), lr=0.1, momentum=0.9)
    expected, _ = sgd_step(params, grads, lr=0.1, momentum=0.9)
    assert found[0] is other
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(buffers, grads)


def test_tensors_to_write_to_are_refused_where_autograd_has_a_part(path):
    params, grads = (tensors(seed=s) for s in (1, 2))
    with pytest.raises(ValueError, match="out: expected no input that requires a gradient"):
        into(params, grads, None, (params, [None] * len(params)), lr=0.1)
    with pytest.raises(ValueError, match="out: expected"):
        _differentiable.update(params, grads, 0.5, params)


# --- what is returned


def test_parameter_without_a_gradient_comes_back_as_it_is(path, device):
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
def test_buffers_exist_where_there_is_momentum(momentum, path):
    params, grads, buffers = (tensors(seed=seed) for seed in (1, 2, 3))
    kept = isinstance(momentum, Tensor) or momentum != 0
    for given in (None, buffers, [None, *buffers[1:]]):
        found = sgd_step(params, grads, given, lr=0.1, momentum=momentum)[1]
        assert all((each is not None) == kept for each in found)


@pytest.mark.parametrize("grad_mode", [True, False])
def test_inputs_are_not_written_and_results_are_new_memory(grad_mode, path, device):
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
