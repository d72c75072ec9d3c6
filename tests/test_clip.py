"""Clipping: `clip_grad_norm_` against torch's, `SGD(max_grad_norm=)` against clip, then step.

The oracles are plain torch in fp64, and `ordered_norm`, which sums in the order that the docs give
and so has the very bits of both backends.
"""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from reference import (
    DTYPES,
    FULL_DTYPES,
    HALF_DTYPES,
    ROUNDINGS_OF_A_PARAM,
    ROUNDINGS_OF_A_RETAINED_PARAM,
    ROUNDINGS_OF_AN_UPDATE,
    Rule,
    assert_ema_update,
    assert_near,
    assert_same_bits,
    flag_id,
    legal_flags,
    make_params,
    momentum_of,
    random_tensor,
    set_gradients,
    sgd,
    sgd_sizes,
)
from torch import Tensor, nn

from fused_opt import _C, EMA, SGD, clip_grad_norm_
from fused_opt.functional import sgd_step_

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
INF = float("inf")
LANES, CHUNK = _C.norm_lanes, _C.norm_chunk_elements

#: Around a tile of the CPU, the lanes of float64 and float32, a chunk, and the threads' shares.
STRADDLING = [1, 2, 3, 7, 8, 9, 63, 64, 65, LANES // 2 - 1, LANES // 2 + 1, LANES - 1, LANES]
STRADDLING += [LANES + 1, LANES + 65, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 77, 20 * CHUNK + 5]
SHAPES = [(n,) for n in STRADDLING] + [(), (3, 5, 7), (64, 65)]

#: Largest relative error of a norm. A chunk's sum of squares goes through 8 additions in a lane, 11
#: in the tree and one product, so it is within 20 roundings of float32 (27 of float64, and as many
#: for the sum over chunks), a root halves that, and the result is rounded once.
NORM_ERROR = {F32: 11 * 2.0**-24, F64: 28 * 2.0**-53, BF16: 11 * 2.0**-24, F16: 11 * 2.0**-24}
#: torch's norm has the dtype of the gradients, and sums float32 one after the other.
TORCH_NORM_ERROR = {F32: 1e-5, F64: 1e-14, BF16: 2.0**-8, F16: 2.0**-10}
#: Roundings between a gradient and its product with the coefficient, beyond the norm's own.
ROUNDINGS_OF_A_CLIP = 3


def with_gradients(grads: Iterable[Tensor]) -> list[nn.Parameter]:
    """Parameters with these very gradients."""
    params = []
    for grad in grads:
        shape, device = grad.shape, grad.device
        params.append(nn.Parameter(torch.zeros(shape, dtype=grad.dtype, device=device)))
        params[-1].grad = grad
    return params


def gradients(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: Any = "cpu", scale: float = 1.0
) -> list[Tensor]:
    tensors = [random_tensor(shape, F64, seed=i) * scale for i, shape in enumerate(shapes)]
    return [t.to(dtype).to(device) for t in tensors]


def exact_norm(grads: Iterable[Tensor], order: float = 2.0) -> float:
    flat = torch.cat([g.detach().double().flatten().cpu() for g in grads])
    return float(torch.linalg.vector_norm(flat, order))


def ordered_norm(grads: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """The norm in fp64, summed in the order of csrc/rules/sums.h."""

    def join(a: Tensor, b: Tensor) -> Tensor:
        return torch.maximum(a, b) if order == INF else a + b

    def fold(lanes: Tensor) -> Tensor:
        while lanes.numel() > 1:
            lanes = join(*lanes.view(2, -1))
        return lanes[0]

    def reduced(values: Tensor) -> Tensor:
        count = LANES * 4 // values.element_size()
        padded = torch.zeros(-(-values.numel() // count) * count, dtype=values.dtype)
        padded[: values.numel()] = values
        stripes = padded.view(-1, count)
        lanes = torch.zeros(count, dtype=values.dtype)
        for stripe in stripes:
            lanes = join(lanes, stripe)
        return fold(lanes)

    sums = []
    for grad in grads:
        wide = grad.detach().cpu().flatten().to(F64 if grad.dtype == F64 else F32)
        parts = wide.abs() if order == INF else wide * wide
        sums += [reduced(chunk).double() for chunk in parts.split(CHUNK)]
    total = reduced(torch.stack(sums))
    return total if order == INF else total.sqrt()


def coefficient(norm: Tensor, max_norm: float) -> float:
    return min(1.0, max_norm / (float(norm) + 1e-6))


@contextmanager
def isa_level(name: str) -> Iterator[None]:
    before = _C.cpu_isa()
    _C.set_cpu_isa(name)
    try:
        yield
    finally:
        _C.set_cpu_isa(before)


# --- clip_grad_norm_: values ---------------------------------------------------------------------


def test_the_signature_is_torchs():
    ours, torchs = map(inspect.signature, (clip_grad_norm_, torch.nn.utils.clip_grad_norm_))
    assert list(ours.parameters) == list(torchs.parameters)
    for name, parameter in torchs.parameters.items():
        assert ours.parameters[name].default == parameter.default


@pytest.mark.parametrize("order", [2, 2.0, INF, "inf"], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_scaled_to_the_norm(device, dtype, order):
    grads = gradients(SHAPES, dtype, device)
    before = [g.clone() for g in grads]
    norm = clip_grad_norm_(with_gradients(grads), 0.5, order)
    exact = exact_norm(before, float(order))
    assert (norm.shape, norm.device) == ((), grads[0].device)
    assert norm.dtype == (F64 if dtype == F64 else F32)
    error = NORM_ERROR[dtype] if float(order) == 2 else 2.0**-24  # the largest is exact
    assert abs(float(norm) - exact) <= error * exact
    for i, (grad, old) in enumerate(zip(grads, before, strict=True)):
        expected = old.double().cpu() * coefficient(norm, 0.5)
        assert_near(grad.cpu(), expected, ROUNDINGS_OF_A_CLIP * expected.abs(), f"gradient {i}")


@pytest.mark.parametrize("order", [2.0, INF, 1.0, 3.0, 0.5, 0.0, -1.0, -INF], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_torchs(device, dtype, order):
    ours = gradients([(100,), (64, 65), (CHUNK + 3,)], dtype, device)
    torchs = [g.clone() for g in ours]
    norm = clip_grad_norm_(with_gradients(ours), 2.0, order)
    expected = torch.nn.utils.clip_grad_norm_(with_gradients(torchs), 2.0, order)
    tolerance = {"rtol": 4 * TORCH_NORM_ERROR[dtype], "atol": 0}
    torch.testing.assert_close(norm.double(), expected.double(), **tolerance)
    smallest = torch.finfo(dtype).smallest_normal  # where a product underflows, either may round
    tolerance = {"rtol": 4 * TORCH_NORM_ERROR[dtype], "atol": 4 * smallest}
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_the_documented_order_keeps_its_sizes():
    """Others would change the bits of every norm."""
    assert (LANES, CHUNK) == (2048, 16384)


@pytest.mark.parametrize("order", [2.0, INF], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", STRADDLING)
def test_a_norm_is_summed_in_the_documented_order(device, size, dtype, order):
    grads = gradients([(size,)], dtype, device)
    expected = ordered_norm(grads, order)
    norm = clip_grad_norm_(with_gradients(grads), INF, order)
    assert_same_bits(norm, expected.to(norm.dtype))


@pytest.mark.parametrize("order", [2.0, INF], ids=str)
@pytest.mark.parametrize("count", [2, LANES // 2 - 1, LANES // 2 + 1, LANES + 100])
def test_chunks_of_many_tensors_are_summed_in_the_documented_order(device, count, order):
    """Beyond one stripe of lanes of float64, and one launch on CUDA."""
    grads = gradients([(1 + i % 5,) for i in range(count)], F32, device)
    expected = ordered_norm(grads, order)
    norm = clip_grad_norm_(with_gradients(grads), INF, order)
    assert_same_bits(norm, expected.to(F32))


@pytest.mark.parametrize("order", [2.0, INF], ids=str)
def test_dtypes_are_mixed_in_one_norm(device, order):
    """Which is float64 if one of them is, as torch promotes."""
    grads = [t for dtype in DTYPES for t in gradients([(70,), (CHUNK + 9,)], dtype, device)]
    expected = ordered_norm(grads, order)
    norm = clip_grad_norm_(with_gradients(grads), INF, order)
    assert_same_bits(norm, expected)


@pytest.mark.parametrize("order", [2.0, INF], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bits_depend_on_neither_threads_nor_level(dtype, order):
    results = []
    for level in _C.cpu_isas():
        for threads in (1, 2):
            torch.set_num_threads(threads)
            grads = gradients([*SHAPES, (40 * CHUNK + 1,)], dtype)
            with isa_level(level):
                norm = clip_grad_norm_(with_gradients(grads), 1.0, order)
            results.append([norm, *grads])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 3, 5])
def test_the_bits_do_not_depend_on_alignment(device, offset, dtype):
    """The lane of an element is its place in the tensor, not in memory."""
    (aligned,) = gradients([(2 * CHUNK + 13,)], dtype, device)
    room = torch.zeros(aligned.numel() + 8, dtype=dtype, device=device)
    shifted = room[offset : offset + aligned.numel()]
    shifted.copy_(aligned)
    norm = clip_grad_norm_(with_gradients([aligned]), 1.0)
    assert_same_bits(clip_grad_norm_(with_gradients([shifted]), 1.0), norm)
    assert_same_bits(shifted, aligned)
    assert not room[:offset].any()
    assert not room[offset + aligned.numel() :].any()


@pytest.mark.parametrize("order", [2.0, INF], ids=str)
@pytest.mark.parametrize(
    "strided",
    [
        lambda t: t.t(),
        lambda t: t[:, ::2],
        lambda t: t[1:, 1:],
        lambda t: t.view(8, 9, 10).permute(2, 0, 1),
        lambda t: t[::3, ::7],
        lambda t: t.as_strided((4, 5), (1, 4), 7),
    ],
    ids=["transposed", "columns", "inside", "permuted", "sparse grid", "other order"],
)
def test_gradients_of_any_strides_are_clipped_in_place(device, strided, order):
    base = random_tensor((8, 90), F32, device)
    grad, rest = strided(base), base.clone()
    strided(rest).zero_()
    before = grad.clone()
    norm = clip_grad_norm_(with_gradients([grad]), 0.25, order)
    exact = exact_norm([before], order)
    assert abs(float(norm) - exact) <= NORM_ERROR[F32] * exact
    expected = before.double() * coefficient(norm, 0.25)
    assert_near(grad, expected, ROUNDINGS_OF_A_CLIP * expected.abs(), "gradient")
    grad.zero_()
    assert_same_bits(base, rest)  # what lies between was not touched


def test_short_gradients_are_not_written(device):
    grads = gradients([(100,), (CHUNK + 1,)], F32, device)
    before = [g.clone() for g in grads]
    for max_norm in (1e4, INF):
        clip_grad_norm_(with_gradients(grads), max_norm)
    for a, b in zip(grads, before, strict=True):
        assert_same_bits(a, b)


def test_a_max_norm_of_0_clears_the_gradients(device):
    (grad,) = gradients([(100,)], F32, device)
    assert clip_grad_norm_(with_gradients([grad]), 0.0) > 0
    assert not grad.any()


def test_a_norm_is_taken_as_1e_6_longer_as_in_torch(device):
    ours, torchs = (torch.tensor([1e-6, 0.0], device=device) for _ in range(2))
    clip_grad_norm_(with_gradients([ours]), 1e-6)
    torch.nn.utils.clip_grad_norm_(with_gradients([torchs]), 1e-6)
    torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=0)
    torch.testing.assert_close(float(ours[0]), 0.5e-6, rtol=1e-6, atol=0)


def test_gradients_of_0_stay(device):
    grad = torch.zeros(100, device=device)
    assert clip_grad_norm_(with_gradients([grad]), 1.0) == 0
    assert_same_bits(grad, torch.zeros(100))


@pytest.mark.parametrize("order", [2.0, INF], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [INF, -INF, math.nan])
@pytest.mark.parametrize("place", [0, 77, LANES, CHUNK + 1])
def test_a_value_that_is_not_finite_spreads_as_in_torch(device, place, value, dtype, order):
    """inf leaves zeros and NaN, and NaN leaves NaN."""
    ours = gradients([(CHUNK + 3,), (5,)], dtype, device)
    ours[0][place] = value
    torchs = [g.clone() for g in ours]
    norm = clip_grad_norm_(with_gradients(ours), 1.0, order)
    expected = torch.nn.utils.clip_grad_norm_(with_gradients(torchs), 1.0, order)
    assert torch.equal(norm.isnan(), expected.isnan())
    assert torch.equal(norm.isinf(), expected.isinf())
    for a, b in zip(ours, torchs, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("value", [INF, math.nan])
def test_a_norm_that_is_not_finite_raises_if_asked_and_changes_nothing(device, value):
    grads = gradients([(100,), (50,)], F32, device)
    grads[1][3] = value
    before, version = [g.clone() for g in grads], grads[0]._version
    raised = []
    for clip in (clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        with pytest.raises(RuntimeError, match="non-finite") as caught:
            clip(with_gradients(grads), 1.0, error_if_nonfinite=True)
        raised.append(str(caught.value))
    assert raised[0] == raised[1]
    assert grads[0]._version == version
    for a, b in zip(grads, before, strict=True):
        assert_same_bits(a, b)
    del grads[1:]
    clip_grad_norm_(with_gradients(grads), 1.0, error_if_nonfinite=True)


def test_squares_overflow_in_float32_as_in_torch(device):
    """Which ends in zeros: the norm is inf. float64, and half types within their range, do not."""
    (grad,) = with_gradients([torch.full((100,), 1e20, device=device)])
    assert clip_grad_norm_(grad, 1.0) == INF
    assert not grad.grad.any()
    (grad,) = with_gradients([torch.full((100,), 1e20, dtype=F64, device=device)])
    torch.testing.assert_close(float(clip_grad_norm_(grad, 1.0)), 1e21, rtol=1e-15, atol=0)
    (grad,) = with_gradients([torch.full((10_000,), 60_000, dtype=F16, device=device)])
    torch.testing.assert_close(float(clip_grad_norm_(grad, 1.0)), 6e6, rtol=1e-3, atol=0)


def test_squares_underflow_in_float32_as_in_torch(device):
    grad = torch.full((100,), 1e-30, device=device)
    assert clip_grad_norm_(with_gradients([grad]), 1e-31) == 0
    assert clip_grad_norm_(with_gradients([grad]), 1.0, INF) == grad[0]
    grad = torch.full((100,), 1e-15, device=device)
    norm = clip_grad_norm_(with_gradients([grad]), 1.0)
    torch.testing.assert_close(float(norm), 1e-14, rtol=1e-6, atol=0)


def test_a_long_sum_stays_accurate():
    """10^7 equal squares, where adding one after the other in float32 is 1e-3 off."""
    (grad,) = with_gradients([torch.full((10_000_000,), 0.1)])
    exact = float(torch.tensor(0.1).double()) * 10_000_000**0.5
    assert abs(float(clip_grad_norm_(grad, INF)) - exact) <= NORM_ERROR[F32] * exact


# --- clip_grad_norm_: what it is given -----------------------------------------------------------


def test_a_single_tensor_and_generators_are_taken():
    for give in (lambda p: p, lambda p: [p], lambda p: (q for q in [p]), lambda p: {p: 0}):
        (param,) = with_gradients([torch.tensor([3.0, 4.0])])
        assert clip_grad_norm_(give(param), 1.0) == 5
        torch.testing.assert_close(param.grad, torch.tensor([0.6, 0.8]))


def test_without_gradients_the_norm_is_0():
    for nothing in ([], [nn.Parameter(torch.ones(3))]):
        norm = clip_grad_norm_(nothing, 1.0)
        assert_same_bits(norm, torch.tensor(0.0))
    with pytest.warns(UserWarning, match="empty generator") as warned:
        assert clip_grad_norm_((p for p in []), 1.0) == 0
    assert warned[0].filename == __file__


def test_empty_gradients_count_nothing(device):
    empty, some = torch.zeros(0, device=device), torch.tensor([3.0, 4.0], device=device)
    assert clip_grad_norm_(with_gradients([empty]), 1.0) == 0
    assert clip_grad_norm_(with_gradients([empty, some, empty.clone()]), 1.0) == 5


def test_what_has_no_gradient_raises_as_in_torch():
    with pytest.raises(AttributeError, match="grad"):
        clip_grad_norm_([1], 1.0)


def test_version_counters_are_bumped():
    grads = [torch.ones(3), torch.ones(4, 4)[:, ::2]]
    versions = [g._version for g in grads]
    clip_grad_norm_(with_gradients(grads), 1.0)
    assert all(g._version > v for g, v in zip(grads, versions, strict=True))


def test_a_parameter_that_is_there_twice_is_clipped_as_in_torch():
    ours, torchs = (with_gradients([torch.tensor([3.0, 4.0])]) for _ in range(2))
    norm = clip_grad_norm_(ours * 2, 1.0)
    expected = torch.nn.utils.clip_grad_norm_(torchs * 2, 1.0)
    assert_same_bits(norm, expected)
    assert_same_bits(ours[0].grad, torchs[0].grad)


@pytest.mark.parametrize(
    "grads",
    [
        lambda: (lambda t: [t[:6], t[4:]])(torch.ones(10)),
        lambda: [torch.ones(5), torch.ones(1).expand(7)],
    ],
    ids=["overlapping", "expanded"],
)
def test_gradients_that_share_memory_are_refused_and_nothing_changes(grads):
    tensors = grads()
    with pytest.raises(ValueError, match=r"grads\[1\].*memory"):
        clip_grad_norm_(with_gradients(tensors), 1.0)
    assert all(bool((t == 1).all()) for t in tensors)


class Wrapped(torch.Tensor):
    """A tensor with a dispatcher of its own, whose memory is another tensor's."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrap(x: Any) -> Any:
            if isinstance(x, (list, tuple)):
                return type(x)(unwrap(item) for item in x)
            return x.inner if isinstance(x, Wrapped) else x

        out = func(*unwrap(args), **{k: unwrap(v) for k, v in (kwargs or {}).items()})
        return args[0] if func._schema.is_mutable else out


def odd_gradients() -> dict[str, tuple[Tensor, Tensor]]:
    """Gradients beyond the kernels' reach, and dense ones with the same norm."""
    sparse = torch.sparse_coo_tensor(
        [[0, 0, 2]], torch.tensor([1.0, 2.0, -4.0]), (4,), check_invariants=True
    )
    wave = torch.tensor([3 + 4j, 1j])
    return {
        "sparse": (sparse, sparse.to_dense()),
        "coalesced": (sparse.coalesce(), sparse.to_dense()),
        "empty sparse": (torch.zeros(4).to_sparse(), torch.zeros(4)),
        "complex": (wave.clone(), wave.abs()),
        "complex double": (wave.to(torch.complex128), wave.abs()),
        "negative view": (wave.clone().conj().imag, wave.imag),
        "wrapped": (Wrapped(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 4.0])),
    }


def dense(tensor: Tensor) -> Tensor:
    tensor = tensor.inner if isinstance(tensor, Wrapped) else tensor
    return (tensor.to_dense() if tensor.is_sparse else tensor).resolve_neg().clone()


@pytest.mark.parametrize("order", [2.0, INF], ids=str)
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside others"])
@pytest.mark.parametrize("kind", list(odd_gradients()))
def test_gradients_of_every_kind_take_part(kind, alone, order):
    odd, plain = odd_gradients()[kind]
    others = [] if alone else gradients([(70,), (CHUNK + 1,)], F32)
    before = [dense(odd), *(g.clone() for g in others)]
    param = nn.Parameter(torch.zeros(odd.shape, dtype=odd.dtype))
    param.grad = odd
    norm = clip_grad_norm_([param, *with_gradients(others)], 0.5, order)
    exact = exact_norm([plain, *before[1:]], order)
    torch.testing.assert_close(float(norm), exact, rtol=1e-6, atol=0)
    c = coefficient(norm, 0.5)
    for grad, old in zip([odd, *others], before, strict=True):
        torch.testing.assert_close(dense(grad), old * c, rtol=1e-6, atol=0)


# --- SGD(max_grad_norm=) -------------------------------------------------------------------------

STEP_SHAPES = [(), (1,), (7,), (65, 3), (LANES + 5,), (CHUNK + 17,)]
MAX_NORM = 0.3


def assert_clipped_step(
    optimizer: SGD, tracked: Sequence[Tensor] = (), grad_scale: float = 1.0
) -> None:
    """Runs a step and asserts that it is one of the clipped gradients, which are not written."""
    max_norm = optimizer.param_groups[0]["max_grad_norm"]
    members = [(g, p) for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    momenta = [momentum_of(optimizer, p) for _, p in members]
    before = [
        (p.detach().clone(), p.grad.detach().clone(), None if v is None else v.clone())
        for (_, p), v in zip(members, momenta, strict=True)
    ]
    versions = [p.grad._version for _, p in members]
    shadows = list(optimizer.ema.shadows.values()) if optimizer.ema is not None else []
    old_shadows = [s.clone() for s in shadows]

    optimizer.step()

    norm = optimizer.grad_norm
    assert norm is not None
    exact = exact_norm([g for _, g, _ in before]) / grad_scale
    dtype = F64 if any(g.dtype == F64 for _, g, _ in before) else F32
    assert (norm.shape, norm.dtype, norm.device) == ((), dtype, members[0][1].device)
    assert abs(float(norm) - exact) <= NORM_ERROR[before[0][1].dtype] * exact
    scale = coefficient(norm, max_norm) / grad_scale
    for i, ((group, p), old, version) in enumerate(zip(members, before, versions, strict=True)):
        rule, clipped = Rule.of(group), (old[0], old[1].double() * scale, old[2])
        expected, sizes = sgd(rule, *clipped), sgd_sizes(rule, *clipped)
        of_param = (
            ROUNDINGS_OF_A_RETAINED_PARAM if rule.decoupled_weight_decay else ROUNDINGS_OF_A_PARAM
        )
        of_update = ROUNDINGS_OF_AN_UPDATE + ROUNDINGS_OF_A_CLIP
        size = of_param * old[0].double().abs() + of_update * sizes.update
        assert_near(p, expected.param, size, f"parameter {i}")
        if expected.momentum is not None:
            momentum = momentum_of(optimizer, p)
            assert_near(momentum, expected.momentum, of_update * sizes.momentum, f"momentum {i}")
        if group["reset_grads"]:
            assert not p.grad.any()
        else:
            assert_same_bits(p.grad, old[1], "a gradient is written")
            assert p.grad._version == version
    for old_shadow, shadow, p in zip(old_shadows, shadows, tracked, strict=True):
        assert_ema_update(optimizer.ema.decay, old_shadow, p, shadow)


def clipped_trajectory(optimizer: SGD, steps: int = 4, tracked: Sequence[Tensor] = ()) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        set_gradients(params, seed=step)
        assert_clipped_step(optimizer, tracked)


@pytest.mark.parametrize(
    "flags",
    legal_flags(formulation=("torch", "sutskever"), decoupled_weight_decay=(False, True)),
    ids=flag_id,
)
def test_every_rule_steps_along_clipped_gradients(flags):
    params = make_params(STEP_SHAPES)
    clipped_trajectory(SGD(params, lr=0.1, max_grad_norm=MAX_NORM, **flags))


@pytest.mark.parametrize("reset_grads", [False, True])
@pytest.mark.parametrize("with_ema", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_steps_along_clipped_gradients(device, dtype, with_ema, reset_grads):
    params = make_params(STEP_SHAPES, dtype, device)
    ema = EMA(params, decay=0.9) if with_ema else None
    optimizer = SGD(
        params, lr=0.1, momentum=0.9, max_grad_norm=MAX_NORM, ema=ema, reset_grads=reset_grads
    )
    clipped_trajectory(optimizer, tracked=params if with_ema else ())


@pytest.mark.parametrize("dtype", FULL_DTYPES, ids=str)
def test_the_step_is_clip_grad_norm_and_then_step(device, dtype):
    """The norms have the same bits; parameters differ by the rounding of stored gradients."""
    params, twins = (make_params(STEP_SHAPES, dtype, device) for _ in range(2))
    ours = SGD(params, lr=0.1, momentum=0.9, max_grad_norm=MAX_NORM)
    plain = SGD(twins, lr=0.1, momentum=0.9)
    for step in range(5):
        set_gradients(params, step)
        set_gradients(twins, step)
        norm = clip_grad_norm_(twins, MAX_NORM)
        ours.step()
        plain.step()
        assert_same_bits(ours.grad_norm, norm)
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=10 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("max_norm", [1e4, INF])
def test_gradients_that_are_short_enough_step_with_the_same_bits(device, max_norm):
    params, twins = (make_params(STEP_SHAPES, device=device) for _ in range(2))
    ours = SGD(params, lr=0.1, momentum=0.9, max_grad_norm=max_norm)
    plain = SGD(twins, lr=0.1, momentum=0.9)
    for step in range(3):
        for optimizer, members in ((ours, params), (plain, twins)):
            set_gradients(members, step)
            optimizer.step()
        for p, q in zip(params, twins, strict=True):
            assert_same_bits(p, q)


def test_one_norm_spans_all_groups(device):
    params = make_params(STEP_SHAPES, device=device)
    groups = [
        {"params": params[:2], "lr": 0.1, "momentum": 0.9},
        {"params": params[2:4], "lr": 0.2, "maximize": True, "formulation": "sutskever"},
        {"params": params[4:], "lr": 0.3, "momentum": 0.5, "reset_grads": True},
    ]
    clipped_trajectory(SGD(groups, max_grad_norm=MAX_NORM))


def test_parameters_without_gradient_take_no_part(device):
    params = make_params(STEP_SHAPES, device=device)
    ema = EMA(params, decay=0.5)
    optimizer = SGD(params, lr=0.1, momentum=0.9, max_grad_norm=MAX_NORM, ema=ema)
    set_gradients(params[:4], seed=0)
    for i in range(3):
        params[1].grad = None if i % 2 else torch.ones_like(params[1])
        assert_clipped_step(optimizer, params)
        assert all(p not in optimizer.state for p in params[4:])


def test_without_gradients_a_step_has_a_norm_of_0():
    optimizer = SGD(make_params([(3,)]), lr=0.1, max_grad_norm=1.0)
    optimizer.step()
    assert_same_bits(optimizer.grad_norm, torch.tensor(0.0))


def test_the_norm_is_none_until_a_step_takes_it():
    params = make_params([(3,)])
    set_gradients(params, seed=0)
    optimizer = SGD(params, lr=0.1, max_grad_norm=1.0)
    assert optimizer.grad_norm is None
    optimizer.step()
    assert optimizer.grad_norm is not None
    optimizer.param_groups[0]["max_grad_norm"] = None
    optimizer.step()
    assert optimizer.grad_norm is None


def test_a_norm_that_was_read_outlives_the_next_step(device):
    params = make_params([(3,)], F64, device)
    optimizer = SGD(params, lr=0.1, max_grad_norm=1.0)
    norms = []
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
        norms.append((optimizer.grad_norm, exact_norm([params[0].grad])))
    for norm, expected in norms:
        torch.testing.assert_close(float(norm), expected, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_gradients_of_another_dtype_are_clipped(device, dtype):
    params = make_params(STEP_SHAPES, F32, device)
    for p in params:
        p.grad_dtype = dtype
        p.grad = random_tensor(p.shape, dtype, device)
    assert_clipped_step(SGD(params, lr=0.1, momentum=0.9, max_grad_norm=MAX_NORM))


def test_the_bits_of_a_step_depend_on_neither_threads_nor_level():
    results = []
    for level in _C.cpu_isas():
        for threads in (1, 2):
            torch.set_num_threads(threads)
            params = make_params([*STEP_SHAPES, (5 * CHUNK + 3,)])
            optimizer = SGD(params, lr=0.1, momentum=0.9, max_grad_norm=MAX_NORM)
            with isa_level(level):
                for step in range(2):
                    set_gradients(params, step)
                    optimizer.step()
            results.append([optimizer.grad_norm, *params])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("order", ["gradient", "parameter"])
def test_tensors_with_gaps_are_clipped(order):
    """Which are updated through dense copies, of the gradient too."""
    base, grads = random_tensor((8, 90)), random_tensor((8, 90), seed=1)
    columns = slice(None, None, 2)
    param = nn.Parameter(base[:, columns] if order == "parameter" else base[:, :45].clone())
    param.grad = grads[:, columns]
    optimizer = SGD([param, *make_params([(5,)])], lr=0.1, momentum=0.9, max_grad_norm=MAX_NORM)
    for _ in range(2):
        assert_clipped_step(optimizer)


@pytest.mark.parametrize("kind", [k for k in odd_gradients() if k != "negative view"])
@pytest.mark.parametrize("formulation", ["torch", "sutskever"])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside others"])
def test_gradients_of_every_kind_are_clipped_in_a_step(kind, formulation, alone):
    odd, plain = odd_gradients()[kind]
    start = random_tensor(odd.shape).to(odd.dtype)
    param = nn.Parameter(start.clone())
    param.grad = odd
    others = [] if alone else make_params([(70,), (CHUNK + 1,)])
    set_gradients(others, seed=0)
    optimizer = SGD([param, *others], lr=0.5, formulation=formulation, max_grad_norm=MAX_NORM)
    before = dense(odd)
    optimizer.step()
    exact = exact_norm([plain, *(p.grad for p in others)])
    torch.testing.assert_close(float(optimizer.grad_norm), exact, rtol=1e-6, atol=0)
    c = coefficient(optimizer.grad_norm, MAX_NORM)
    torch.testing.assert_close(param.detach(), start - 0.5 * c * before, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dense(odd), before, rtol=0, atol=0)


@contextmanager
def process_group() -> Iterator[None]:
    """Of this process alone."""
    distributed = pytest.importorskip("torch.distributed")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside others"])
def test_distributed_tensors_are_clipped(alone):
    """Alone, the norm is a DTensor as in torch; beside others, and in a step, a plain tensor."""
    with process_group():
        from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh

        mesh = init_device_mesh("cpu", (1,))

        def start() -> list[nn.Parameter]:
            param = nn.Parameter(distribute_tensor(torch.zeros(2), mesh))
            param.grad = distribute_tensor(torch.tensor([3.0, 4.0]), mesh)
            return [param, *with_gradients([] if alone else [torch.tensor([12.0])])]

        exact = 5.0 if alone else 13.0
        clipped = torch.tensor([3.0, 4.0]) / exact
        params = start()
        norm = clip_grad_norm_(params, 1.0)
        assert isinstance(norm, DTensor) == alone
        assert (norm.full_tensor() if alone else norm) == exact
        torch.testing.assert_close(params[0].grad.to_local(), clipped)
        params = start()
        optimizer = SGD(params, lr=0.5, max_grad_norm=1.0)
        optimizer.step()
        assert optimizer.grad_norm == exact
        torch.testing.assert_close(params[0].to_local().detach(), -0.5 * clipped)


def test_tensors_without_data_are_clipped():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        (param,) = with_gradients([torch.ones(3)])
        assert isinstance(clip_grad_norm_(param, 1.0), FakeTensor)
        optimizer = SGD([param], lr=0.1, max_grad_norm=1.0)
        optimizer.step()
        assert isinstance(optimizer.grad_norm, FakeTensor)
    (param,) = with_gradients([torch.ones(3, device="meta")])
    assert clip_grad_norm_(param, 1.0).is_meta
    optimizer = SGD([param], lr=0.1, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm.is_meta


def test_closures_and_hooks_run_before_the_norm_is_taken():
    params = make_params([(5,), (6,)])
    optimizer = SGD(params, lr=0.1, max_grad_norm=MAX_NORM)
    optimizer.register_step_pre_hook(lambda *_: set_gradients(params, seed=3))
    seen = []
    optimizer.register_step_post_hook(lambda opt, *_: seen.append(float(opt.grad_norm)))

    def closure() -> float:
        for p in params:
            p.grad.mul_(2.0)
        return 1.25

    assert optimizer.step(closure) == 1.25
    torch.testing.assert_close(seen, [exact_norm([p.grad for p in params])], rtol=1e-6, atol=0)


def test_accumulated_gradients_are_clipped_as_one():
    params = make_params(STEP_SHAPES)
    optimizer = SGD(params, lr=0.1, max_grad_norm=MAX_NORM, reset_grads=True)
    set_gradients(params, seed=0)
    for p in params:
        p.grad += torch.ones_like(p)
    assert_clipped_step(optimizer)


# --- gradient scalers ----------------------------------------------------------------------------


def scaled_step(
    optimizer: SGD, scaler: torch.amp.GradScaler, device: torch.device, spoil: float | None = None
) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    scaler.scale(torch.ones((), device=device))  # a scaler is lazy until its first loss
    for p in params:
        p.grad.mul_(scaler.get_scale())
    if spoil is not None:
        params[0].grad.view(-1)[0] = spoil
    scaler.step(optimizer)
    scaler.update()


def test_the_norm_under_a_scaler_is_of_the_unscaled_gradients(device):
    params, twins = (make_params(STEP_SHAPES, device=device) for _ in range(2))
    optimizer = SGD(params, lr=0.1, momentum=0.9, max_grad_norm=MAX_NORM)
    plain = SGD(twins, lr=0.1, momentum=0.9, max_grad_norm=MAX_NORM)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for step in range(3):
        set_gradients(params, step)
        set_gradients(twins, step)
        scaled_step(optimizer, scaler, device)
        plain.step()
        assert_same_bits(optimizer.grad_norm, plain.grad_norm)
        for p, q in zip(params, twins, strict=True):
            assert_same_bits(p, q)


@pytest.mark.parametrize("grad_scale", [1024.0, 3.0])
def test_a_scale_on_the_gradients_is_divided_out(grad_scale):
    params = make_params(STEP_SHAPES)
    optimizer = SGD(params, lr=0.1, momentum=0.9, max_grad_norm=MAX_NORM)
    optimizer.grad_scale = torch.tensor(grad_scale)
    for step in range(2):
        set_gradients(params, step)
        assert_clipped_step(optimizer, grad_scale=grad_scale)


@pytest.mark.parametrize("value", [INF, math.nan])
def test_a_skipped_step_leaves_the_norm_that_is_not_finite(device, value):
    params = make_params(STEP_SHAPES, device=device)
    optimizer = SGD(params, lr=0.1, momentum=0.9, max_grad_norm=MAX_NORM, reset_grads=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    set_gradients(params, seed=0)
    scaled_step(optimizer, scaler, device)
    set_gradients(params, seed=1)
    before = [p.detach().clone() for p in params]
    scaled_step(optimizer, scaler, device, spoil=value)
    assert math.isnan(value) == bool(optimizer.grad_norm.isnan())
    assert not optimizer.grad_norm.isfinite()
    for p, q in zip(params, before, strict=True):
        assert_same_bits(p, q)
        assert not p.grad.any()


# --- the option ----------------------------------------------------------------------------------

WRONG = [0, 0.0, -1.0, math.nan, True, False, "1", torch.tensor(-1.0), [1.0]]


def optimizer_with(max_norm: Any, count: int = 2, **options: Any) -> SGD:
    groups = [{"params": make_params([(3,)], seed=i)} for i in range(count)]
    return SGD(groups, lr=0.1, momentum=0.9, max_grad_norm=max_norm, **options)


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_is_no_positive_number_is_refused(wrong):
    with pytest.raises(ValueError, match="Invalid max_grad_norm"):
        optimizer_with(wrong)
    optimizer = optimizer_with(1.0)
    with pytest.raises(ValueError, match="Invalid max_grad_norm"):
        optimizer.add_param_group({"params": make_params([(3,)]), "max_grad_norm": wrong})
    assert len(optimizer.param_groups) == 2
    for group in optimizer.param_groups:
        group["max_grad_norm"] = wrong
    with pytest.raises(ValueError, match="Invalid max_grad_norm"):
        optimizer.step()


@pytest.mark.parametrize("max_norm", [None, 1, 0.5, INF, 1e-300])
def test_positive_numbers_are_taken(max_norm):
    optimizer = optimizer_with(max_norm)
    assert [g["max_grad_norm"] for g in optimizer.param_groups] == [max_norm, max_norm]
    optimizer.step()


def test_groups_that_disagree_are_refused():
    with pytest.raises(ValueError, match="all param groups"):
        SGD(
            [{"params": make_params([(3,)])}, {"params": make_params([(3,)]), "max_grad_norm": 2}],
            lr=0.1,
            max_grad_norm=1,
        )
    optimizer = optimizer_with(1.0)
    with pytest.raises(ValueError, match="all param groups"):
        optimizer.add_param_group({"params": make_params([(3,)]), "max_grad_norm": None})
    assert len(optimizer.param_groups) == 2
    params = [p for group in optimizer.param_groups for p in group["params"]]
    set_gradients(params, seed=0)
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[1]["max_grad_norm"] = 3.0
    with pytest.raises(ValueError, match=r"all param groups.*\[1\.0, 3\.0\]"):
        optimizer.step()
    state = optimizer.state_dict()
    fresh = optimizer_with(5.0)
    with pytest.raises(ValueError, match="all param groups"):
        fresh.load_state_dict(state)
    assert [g["max_grad_norm"] for g in fresh.param_groups] == [5.0, 5.0]
    assert not optimizer.state
    for p, q in zip(params, before, strict=True):
        assert_same_bits(p, q)


def test_a_group_that_is_added_takes_what_the_others_have():
    optimizer = optimizer_with(1.0)
    for group in optimizer.param_groups:
        group["max_grad_norm"] = 0.25
    optimizer.add_param_group({"params": make_params([(3,)])})
    assert optimizer.param_groups[2]["max_grad_norm"] == 0.25


def test_checkpoints_carry_the_option():
    state = optimizer_with(0.25).state_dict()
    assert [g["max_grad_norm"] for g in state["param_groups"]] == [0.25, 0.25]
    optimizer = optimizer_with(None)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["max_grad_norm"] == 0.25


def test_a_checkpoint_without_the_option_keeps_the_constructors():
    stock = torch.optim.SGD([{"params": make_params([(3,)])} for _ in range(2)], lr=0.1)
    optimizer = optimizer_with(0.25)
    optimizer.load_state_dict(stock.state_dict())
    assert [g["max_grad_norm"] for g in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_clip_too(duplicate):
    optimizer = optimizer_with(MAX_NORM)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    set_gradients(params, seed=0)
    optimizer.step()
    twin = duplicate(optimizer)
    assert twin.grad_norm is None  # of the last step, and the copy has done none
    twins = [p for group in twin.param_groups for p in group["params"]]
    for members, each in ((params, optimizer), (twins, twin)):
        set_gradients(members, seed=1)
        assert_clipped_step(each)
    for p, q in zip(params, twins, strict=True):
        assert_same_bits(p, q)


def test_a_pickle_from_before_the_option_does_not_clip():
    optimizer = optimizer_with(None)
    state = optimizer.__getstate__()
    for holder in (state["defaults"], *state["param_groups"]):
        del holder["max_grad_norm"]
    old = SGD.__new__(SGD)
    old.__setstate__(state)
    assert old.param_groups[0]["max_grad_norm"] is None


def test_differentiable_steps_are_not_clipped():
    with pytest.raises(ValueError, match=r"max_grad_norm.*differentiable"):
        optimizer_with(1.0, differentiable=True)
    optimizer = optimizer_with(None, differentiable=True)
    for group in optimizer.param_groups:
        group["max_grad_norm"] = 1.0
    with pytest.raises(ValueError, match=r"max_grad_norm.*differentiable"):
        optimizer.step()


def test_a_step_that_raises_has_changed_nothing():
    optimizer = optimizer_with(MAX_NORM, reset_grads=True)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    set_gradients(params, seed=0)
    optimizer.step()
    norm = optimizer.grad_norm
    set_gradients(params, seed=1)
    optimizer.state[params[1]]["momentum_buffer"] = torch.zeros(4)
    before = [(p.detach().clone(), p.grad.clone(), p._version, p.grad._version) for p in params]
    with pytest.raises(ValueError, match="momentum"):
        optimizer.step()
    assert_same_bits(optimizer.grad_norm, norm)
    for p, (value, grad, version, grad_version) in zip(params, before, strict=True):
        assert_same_bits(p, value)
        assert_same_bits(p.grad, grad)
        assert (p._version, p.grad._version) == (version, grad_version)


# --- on CUDA -------------------------------------------------------------------------------------


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("order", [2.0, INF], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 40])
def test_cpu_and_cuda_clip_to_the_same_bits(count, dtype, order):
    on_cpu = gradients(SHAPES * count, dtype)
    on_cuda = [g.to("cuda") for g in on_cpu]
    norms = [clip_grad_norm_(with_gradients(g), 1.0, order) for g in (on_cpu, on_cuda)]
    for a, b in zip([norms[0], *on_cpu], [norms[1], *on_cuda], strict=True):
        assert_same_bits(b, a)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("max_norm", [MAX_NORM, 1e6])
def test_cpu_and_cuda_step_to_the_same_bits(max_norm, dtype):
    histories = []
    for device in ("cpu", "cuda"):
        params = make_params(STEP_SHAPES, dtype, device)
        ema = EMA(params, decay=0.9)
        options = {"nesterov": True, "reset_grads": True, "weight_decay": 0.1}
        optimizer = SGD(params, 0.1, 0.9, max_grad_norm=max_norm, ema=ema, **options)
        history = []
        for step in range(4):
            set_gradients(params, step)
            optimizer.step()
            written = [optimizer.grad_norm, *params, *ema.shadows.values()]
            history += [t.detach().cpu().clone() for t in written]
        histories.append(history)
    for a, b in zip(*histories, strict=True):
        assert_same_bits(b, a)


@pytest.mark.cuda
def test_clipping_never_waits_for_the_device():
    params = make_params(STEP_SHAPES, device="cuda")
    ema = EMA(params, decay=0.9)
    optimizer = SGD(params, lr=0.1, momentum=0.9, max_grad_norm=MAX_NORM, ema=ema)
    set_gradients(params, seed=0)
    with no_synchronisation():
        for _ in range(2):
            optimizer.step()
            assert optimizer.grad_norm.is_cuda
            clip_grad_norm_(params, 1.0)
            clip_grad_norm_(params, 1.0, INF)


@pytest.mark.cuda
def test_a_captured_step_clips_at_each_replay():
    params, twins = make_params(STEP_SHAPES, device="cuda"), make_params(STEP_SHAPES)
    optimizer = SGD(params, lr=0.1, momentum=0.9, max_grad_norm=MAX_NORM)
    twin = SGD(twins, lr=0.1, momentum=0.9, max_grad_norm=MAX_NORM)
    set_gradients(params, seed=0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(4):
        set_gradients(twins, step)
        for q in twins:
            q.grad.mul_(10.0**-step)  # the last is short enough
        twin.step()
        if step == 0:
            continue
        for p, q in zip(params, twins, strict=True):
            p.grad.copy_(q.grad)
        graph.replay()
        assert_same_bits(optimizer.grad_norm, twin.grad_norm)
        for p, q in zip(params, twins, strict=True):
            assert_same_bits(p, q)


@pytest.mark.cuda
def test_a_captured_clip_replays():
    params = make_params(STEP_SHAPES, device="cuda")
    set_gradients(params, seed=0)
    clip_grad_norm_(params, MAX_NORM)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = clip_grad_norm_(params, MAX_NORM)
    twins = make_params(STEP_SHAPES)
    for step in range(3):
        set_gradients(params, step)
        set_gradients(twins, step)
        graph.replay()
        assert_same_bits(norm, clip_grad_norm_(twins, MAX_NORM))
        for p, q in zip(params, twins, strict=True):
            assert_same_bits(p.grad, q.grad)


@pytest.mark.cuda
def test_a_warm_step_that_clips_allocates_nothing():
    params = make_params([(1 + i,) for i in range(2000)], device="cuda")
    ema = EMA(params, decay=0.9)
    optimizer = SGD(params, lr=0.1, momentum=0.9, max_grad_norm=1.0, ema=ema)
    set_gradients(params, seed=0)
    optimizer.step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    optimizer.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.cuda
@pytest.mark.parametrize("first", ["cpu", "cuda"])
def test_one_norm_spans_devices(first):
    second = "cuda" if first == "cpu" else "cpu"
    for clip in ("alone", "in a step"):
        params = make_params(STEP_SHAPES[:3], device=first) + make_params(
            STEP_SHAPES[3:], device=second
        )
        set_gradients(params, seed=0)
        exact = exact_norm([p.grad for p in params])
        before = [(p.detach().cpu().clone(), p.grad.cpu().clone()) for p in params]
        if clip == "alone":
            norm = clip_grad_norm_(params, MAX_NORM)
        else:
            optimizer = SGD(params, lr=0.5, max_grad_norm=MAX_NORM)
            optimizer.step()
            norm = optimizer.grad_norm
        assert norm.device.type == first
        torch.testing.assert_close(float(norm), exact, rtol=1e-6, atol=0)
        c = coefficient(norm, MAX_NORM)
        for p, (value, grad) in zip(params, before, strict=True):
            new, expected = (
                (p.grad, grad * c) if clip == "alone" else (p.detach(), value - 0.5 * c * grad)
            )
            torch.testing.assert_close(new.cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.cuda
def test_a_clip_runs_on_the_current_stream():
    """The gradient arrives late on a side stream: a clip on another stream would miss it."""
    (pinned,) = [g.pin_memory() for g in gradients([(3 * CHUNK,)], F32)]
    grad = torch.zeros(3 * CHUNK, device="cuda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        grad.copy_(pinned, non_blocking=True)
        norm = clip_grad_norm_(with_gradients([grad]), 1.0)
    stream.synchronize()
    assert_same_bits(norm, clip_grad_norm_(with_gradients([pinned]), 1.0))


# --- beside the rest -----------------------------------------------------------------------------


def test_a_compiled_function_clips():
    params, twins = (make_params([(5,), (6, 7)]) for _ in range(2))

    @torch.compile(backend="eager")
    def train(members: list[nn.Parameter]) -> Tensor:
        torch.stack([p.pow(2).sum() for p in members]).sum().backward()
        return clip_grad_norm_(members, MAX_NORM)

    norm = train(params)
    torch.stack([p.pow(2).sum() for p in twins]).sum().backward()
    assert_same_bits(norm, clip_grad_norm_(twins, MAX_NORM))
    for p, q in zip(params, twins, strict=True):
        assert_same_bits(p.grad, q.grad)


def test_functional_steps_between_clips_see_their_own_tensors():
    """Both use the thread's plan, which must keep nothing of either."""
    (param,) = with_gradients([torch.tensor([3.0, 4.0])])
    for _ in range(3):
        param.grad = torch.tensor([3.0, 4.0])
        assert clip_grad_norm_(param, 1.0) == 5
        sgd_step_([param.detach()], [param.grad], None, lr=1.0)
    torch.testing.assert_close(param.detach(), -3 * torch.tensor([0.6, 0.8]))


def test_a_skipped_step_forgets_the_norm_of_one_that_clipped():
    params = with_gradients(gradients([(3,)], F32))
    optimizer = SGD(params, lr=0.1, max_grad_norm=1.0)
    optimizer.step()
    optimizer.param_groups[0]["max_grad_norm"] = None
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert optimizer.grad_norm is None
