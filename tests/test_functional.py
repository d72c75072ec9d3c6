"""fused_opt.functional: the same steps on lists of tensors, without an optimizer."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from reference import (
    DTYPES,
    HALF_DTYPES,
    Rule,
    assert_ema_update,
    assert_same_bits,
    assert_sgd_step,
    flag_id,
    legal_flags,
    make_params,
    random_tensor,
)
from torch import Tensor

from fused_opt import _C, SGD
from fused_opt.functional import ema_update_, sgd_step_

SHAPES = [(17,), (3, 5), (), (0,), (2, 3, 4)]
FORMULATIONS = ("torch", "sutskever")
DECAYS = (0.0, 0.25, 0.5, 0.999, 1.0)
#: Parameter and gradient dtypes that a step combines.
DTYPE_PAIRS = [
    *((p, g) for p in (torch.float32, *HALF_DTYPES) for g in (torch.float32, *HALF_DTYPES)),
    (torch.float64, torch.float64),
]


def tensors(
    dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0, shapes: Any = SHAPES
) -> list[Tensor]:
    """Random tensors of assorted shapes."""
    return [random_tensor(s, dtype, device, seed=100 * seed + i) for i, s in enumerate(shapes)]


def copies(items: list[Tensor | None] | None) -> list[Tensor | None]:
    """What the list holds now; an absent list holds nothing."""
    return [None if t is None else t.detach().clone() for t in items or []]


def checked_sgd_step(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor | None] | None,
    *,
    shadows: list[Tensor] | None = None,
    decay: float | None = None,
    reset_grads: bool = False,
    **flags: Any,
) -> None:
    """One functional step, compared with the oracle."""
    rule = Rule(**flags)
    old_params, old_grads, old_buffers = copies(params), copies(grads), copies(buffers)
    old_shadows, versions = copies(shadows), [p._version for p in params]
    if not old_buffers:
        old_buffers = [None] * len(params)
    options = {} if shadows is None else {"shadows": shadows, "decay": decay}

    result = sgd_step_(params, grads, buffers, reset_grads=reset_grads, **flags, **options)

    assert result is None
    for i, before in enumerate(zip(old_params, old_grads, old_buffers, strict=True)):
        assert_sgd_step(rule, before, params[i], buffers[i] if buffers else None, f"tensor {i}:")
        kept = torch.zeros_like(before[1]) if reset_grads else before[1]
        assert_same_bits(grads[i], kept, f"gradient {i}")
        assert params[i]._version > versions[i] or not params[i].numel()
    for p, shadow, old in zip(params, shadows or [], old_shadows, strict=shadows is not None):
        assert_ema_update(decay, old, p, shadow)


# --- sgd_step_


@pytest.mark.parametrize(
    "flags", legal_flags(formulation=FORMULATIONS, reset_grads=(False, True)), ids=flag_id
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_follows_the_equations(flags, dtype, device):
    params = tensors(dtype, device)
    buffers: list[Tensor | None] = [None] * len(params)
    for step in range(5):
        checked_sgd_step(params, tensors(dtype, device, 1 + step), buffers, lr=0.1, **flags)


@pytest.mark.parametrize("shadow_dtype", ["fp32", "the parameter's"])
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_step_with_shadows_takes_every_mix_of_dtypes(pair, shadow_dtype, formulation, device):
    dtype, grad_dtype = pair
    narrow = shadow_dtype == "the parameter's" or dtype == torch.float64
    params = tensors(dtype, device)
    shadows = tensors(dtype if narrow else torch.float32, device, 50)
    buffers: list[Tensor | None] = [None] * len(params)
    for step in range(5):
        checked_sgd_step(
            params,
            tensors(grad_dtype, device, 1 + step),
            buffers,
            lr=0.1,
            momentum=0.9,
            nesterov=True,
            weight_decay=0.1,
            formulation=formulation,
            shadows=shadows,
            decay=0.9,
        )


def test_lists_may_mix_all_dtypes(device):
    shapes = [(5,)] * len(DTYPE_PAIRS)
    params, grads, shadows = (
        [t.to(d) for t, d in zip(tensors(torch.float64, device, seed, shapes), dtypes, strict=True)]
        for seed, dtypes in enumerate(
            (
                [p for p, _ in DTYPE_PAIRS],
                [g for _, g in DTYPE_PAIRS],
                [torch.float64 if p == torch.float64 else torch.float32 for p, _ in DTYPE_PAIRS],
            )
        )
    )
    buffers: list[Tensor | None] = [None] * len(params)
    for _ in range(3):
        checked_sgd_step(params, grads, buffers, lr=0.1, momentum=0.9, shadows=shadows, decay=0.9)


@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_missing_buffers_are_filled_in_place_and_their_first_step_is_undamped(formulation, device):
    params = tensors(torch.float32, device)
    kept = random_tensor((3, 5), device=device, seed=9)
    buffers: list[Tensor | None] = [None, kept, None, None, None]
    flags = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "formulation": formulation}
    checked_sgd_step(params, tensors(torch.float32, device, 1), buffers, **flags)
    assert buffers[1] is kept
    filled = list(buffers)
    assert all(b.dtype == p.dtype for b, p in zip(filled, params, strict=True))
    checked_sgd_step(params, tensors(torch.float32, device, 2), buffers, **flags)
    assert all(a is b for a, b in zip(buffers, filled, strict=True))


@pytest.mark.parametrize("buffers", [None, []])
def test_no_buffers_are_needed_without_momentum(buffers, device):
    params, grads = tensors(torch.float32, device), tensors(torch.float32, device, 1)
    checked_sgd_step(params, grads, buffers, lr=0.1, weight_decay=0.1)
    assert buffers is None or buffers == []


def test_empty_lists_are_a_step_of_nothing():
    sgd_step_([], [], [], lr=0.1, momentum=0.9)
    sgd_step_([], [], None, lr=0.1)
    ema_update_([], [], decay=0.9)


def test_leaves_that_require_gradients_are_stepped_outside_no_grad(device):
    params = make_params(SHAPES, device=device)
    checked_sgd_step(params, tensors(torch.float32, device, 1), None, lr=0.1)
    assert all(p.is_leaf and p.requires_grad for p in params)


@pytest.mark.parametrize("flags", legal_flags(formulation=FORMULATIONS), ids=flag_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_has_the_bits_of_the_optimizer(flags, dtype, device):
    params = tensors(dtype, device)
    buffers: list[Tensor | None] = [None] * len(params)
    twins = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = SGD(twins, lr=0.1, **flags)
    for step in range(3):
        grads = tensors(dtype, device, 1 + step)
        sgd_step_(params, grads, buffers, lr=0.1, **flags)
        for q, g in zip(twins, grads, strict=True):
            q.grad = g.clone()
        optimizer.step()
        for p, q in zip(params, twins, strict=True):
            assert_same_bits(p, q)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shadows_in_the_step_have_the_bits_of_a_separate_update(decay, dtype, device):
    params, twins = (tensors(dtype, device) for _ in range(2))
    shadow_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    shadows, apart = (tensors(shadow_dtype, device, 50) for _ in range(2))
    buffers: list[Tensor | None] = [None] * len(params)
    other: list[Tensor | None] = [None] * len(params)
    for step in range(3):
        grads = tensors(dtype, device, 1 + step)
        sgd_step_(params, grads, buffers, lr=0.1, momentum=0.9, shadows=shadows, decay=decay)
        sgd_step_(twins, grads, other, lr=0.1, momentum=0.9)
        ema_update_(apart, twins, decay=decay)
    for a, b in zip(params + shadows, twins + apart, strict=True):
        assert_same_bits(a, b)


def test_complex_and_sparse_tensors_are_stepped(device):
    weight = random_tensor((4, 2), device=device)
    phase = torch.complex(weight, weight.flip(0)).contiguous()
    grads = [torch.ones_like(weight).to_sparse(), torch.ones_like(phase) * (1 + 2j)]
    expected = [weight - 0.1, phase - 0.1 * (1 + 2j)]
    buffers: list[Tensor | None] = [None, None]
    sgd_step_([weight, phase], grads, buffers, lr=0.1, momentum=0.9)
    torch.testing.assert_close([weight, phase], expected)
    assert all(b is not None for b in buffers)


WRONG_LENGTHS = {
    "grads": {"grads": 1},
    "momentum_buffers": {"momentum_buffers": 1},
    "momentum_buffers (too many)": {"momentum_buffers": 3},
    "shadows": {"shadows": 1},
}


@pytest.mark.parametrize("name", WRONG_LENGTHS)
def test_lists_of_unequal_lengths_raise_before_anything_is_written(name, device):
    lengths = {"params": 2, "grads": 2, "momentum_buffers": 2, "shadows": 2, **WRONG_LENGTHS[name]}
    lists = {
        key: [random_tensor((4,), device=device, seed=i) for i in range(length)]
        for key, length in lengths.items()
    }
    before = {key: copies(items) for key, items in lists.items()}
    shadows = lists.pop("shadows")
    with pytest.raises(ValueError, match=name.split()[0]):
        sgd_step_(
            *lists.values(), lr=0.1, momentum=0.9, shadows=shadows, decay=0.9, reset_grads=True
        )
    for key, items in {**lists, "shadows": shadows}.items():
        for a, b in zip(items, before[key], strict=True):
            assert_same_bits(a, b, key)


# --- ema_update_


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shadow_dtype", ["fp32", "the parameter's"])
def test_update_follows_the_equation(decay, dtype, shadow_dtype, device):
    narrow = shadow_dtype == "the parameter's" or dtype == torch.float64
    shapes = [*SHAPES, (1001,), (_C.chunk_elements + 1,)]
    shadows = tensors(dtype if narrow else torch.float32, device, 1, shapes)
    for step in range(3):
        params = tensors(dtype, device, 2 + step, shapes)
        before, kept = copies(shadows), copies(params)
        versions = [s._version for s in shadows]
        assert ema_update_(shadows, params, decay=decay) is None
        for i, p in enumerate(params):
            assert_ema_update(decay, before[i], p, shadows[i])
            assert_same_bits(p, kept[i], "a parameter")
            assert shadows[i]._version > versions[i] or not p.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decay_of_zero_copies_and_of_one_keeps(dtype, device):
    # To the last bit, and whatever infinity or NaN stands on the other side.
    special = torch.tensor([0.0, -0.0, 1.0, -3.0, float("inf"), float("-inf"), float("nan")])
    grid = torch.meshgrid(special, special, indexing="ij")
    a, b = (t.to(device, dtype).contiguous() for t in grid)
    shadows, params = [*tensors(dtype, device, 1), a], [*tensors(dtype, device, 2), b]
    before = copies(shadows)
    ema_update_(shadows, params, decay=1.0)
    for s, old in zip(shadows, before, strict=True):
        assert_same_bits(s, old)
    ema_update_(shadows, params, decay=0.0)
    for s, p in zip(shadows, params, strict=True):
        assert_same_bits(s, p)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_wide_shadow_of_a_half_parameter_arrives(dtype, device):
    # In half storage the increments of decay .999 are lost and the shadow stops on its way.
    shadow = torch.zeros(8, device=device)
    param = torch.ones(8, dtype=dtype, device=device)
    for _ in range(10_000):
        ema_update_([shadow], [param], decay=0.999)
    expected = 1.0 - 0.999**10_000
    torch.testing.assert_close(shadow, torch.full_like(shadow, expected), rtol=1e-4, atol=0)


def test_update_takes_any_strides(device):
    wide = random_tensor((6, 8), device=device)
    shadows = [wide[:, 3], wide[::2, 4:].t()]
    params = [random_tensor((6,), device=device, seed=1), random_tensor((4, 3), device=device)]
    before, outside = copies(shadows), wide[:, :3].clone()
    ema_update_(shadows, params, decay=0.75)
    for s, old, p in zip(shadows, before, params, strict=True):
        assert_ema_update(0.75, old, p, s)
    assert_same_bits(wide[:, :3], outside)


def test_update_of_lists_of_unequal_lengths_raises(device):
    shadows, params = tensors(torch.float32, device, 1), tensors(torch.float32, device, 2)
    before = copies(shadows)
    with pytest.raises(ValueError, match=r"shadows|params"):
        ema_update_(shadows, params[1:], decay=0.5)
    for s, old in zip(shadows, before, strict=True):
        assert_same_bits(s, old)


# ---- what a graph of torch.compile holds ---------------------------------------------------------


def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next function called believes that it is traced, and runs what it puts in the graph."""
    answers = iter([True])

    def is_compiling() -> bool:
        caller = sys._getframe(1).f_globals["__name__"]
        return caller == "fused_opt.functional" and next(answers, False)

    monkeypatch.setattr(torch.compiler, "is_compiling", is_compiling)


@pytest.mark.parametrize("shadowed", [(), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("refined", [(), (1,), (0, 1, 2)])
@pytest.mark.parametrize(
    ("options", "has_momentum"),
    [
        ({"lr": 0.1}, False),
        ({"lr": torch.tensor(0.1), "momentum": 0.9, "weight_decay": 0.1}, True),
        ({"lr": 0.1, "momentum": torch.tensor(0.9), "reset_grads": True}, True),
        ({"lr": 0.1, "momentum": 0.5, "rounding": (2**64 - 3, 2**63)}, True),
    ],
)
def test_the_operator_of_a_graph_takes_the_same_step(
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    has_momentum: bool,
    refined: tuple[int, ...],
    shadowed: tuple[int, ...],
) -> None:
    def step(*, traced: bool) -> list[Tensor | None]:
        params, grads, averages, masters = (
            tensors(torch.bfloat16, seed=seed, shapes=SHAPES[:3]) for seed in range(4)
        )
        velocities: list[Tensor | None] | None = None
        if has_momentum:
            velocities = [None, *tensors(torch.bfloat16, seed=5, shapes=SHAPES[1:3])]
        shadows = [tensor if i in shadowed else None for i, tensor in enumerate(averages)]
        refinements = [tensor.float() if i in refined else None for i, tensor in enumerate(masters)]
        own = dict(options)
        if shadowed:
            own.update(shadows=shadows, decay=0.75)
        if refined:
            own.update(refinements=refinements)
        if traced:
            traced_once(monkeypatch)
        sgd_step_(params, grads, velocities, **own)
        return [*params, *grads, *(velocities or ()), *shadows, *refinements]

    for expected, found in zip(step(traced=False), step(traced=True), strict=True):
        assert (expected is None) == (found is None)
        if expected is not None and found is not None:
            assert_same_bits(found, expected)


@pytest.mark.parametrize("decay", [0.75, torch.tensor(0.75)])
def test_the_operator_of_a_graph_makes_the_same_average(
    monkeypatch: pytest.MonkeyPatch, decay: float | Tensor
) -> None:
    params, shadows = tensors(torch.float32), tensors(torch.float32, seed=1)
    expected = copies(shadows)
    ema_update_([t for t in expected if t is not None], params, decay=decay)
    traced_once(monkeypatch)
    ema_update_(shadows, params, decay=decay)
    for shadow, other in zip(shadows, expected, strict=True):
        assert other is not None
        assert_same_bits(shadow, other)
