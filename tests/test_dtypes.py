"""Every dtype of every stream: the README's table against the module, and `state_dtype`."""

from __future__ import annotations

import copy
import io
import itertools
import re
import shutil
from pathlib import Path
from typing import Any

import emulated
import native_variants
import pytest
import torch
from reference import (
    DTYPES,
    HALF_DTYPES,
    Rule,
    assert_ema_update,
    assert_same_bits,
    assert_sgd_step,
    checked_step,
    make_params,
    momentum_of,
    random_tensor,
    set_gradients,
    trajectory,
)
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

import fused_opt
from fused_opt import _C, EMA, SGD
from fused_opt.functional import sgd_step_

README = Path(fused_opt.__file__).resolve().parent.parent / "README.md"

#: Below and above the tiles of the CPU and the vectors and blocks of CUDA.
SHAPES = [(1,), (7,), (63,), (65,), (3, 43), (8193,)]

RULE = Rule(lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True)


def readme_table() -> set[tuple[torch.dtype, ...]]:
    """Every (parameter, gradient, momentum, shadow) that the README says runs."""
    _, _, section = README.read_text(encoding="utf-8").partition("## Dtypes")
    lines = re.findall(r"^\|(.*)\|$", section.partition("\n## ")[0], re.MULTILINE)
    assert [name.strip() for name in lines[0].split("|")] == [
        "parameter",
        "gradient",
        "momentum",
        "shadow",
    ]
    table: set[tuple[torch.dtype, ...]] = set()
    for line in lines[2:]:
        cells = [[getattr(torch, n.strip()) for n in cell.split(",")] for cell in line.split("|")]
        table.update(itertools.product(*cells))
    return table


TABLE = readme_table()
ALL = list(itertools.product(DTYPES, repeat=4))


def short(dtypes: Any) -> str:
    return "-".join(str(d).removeprefix("torch.") for d in dtypes)


def test_the_readme_lists_every_mixture_of_float_types() -> None:
    narrow = [d for d in DTYPES if d != torch.float64]
    double = torch.float64
    assert {
        *itertools.product(narrow, repeat=4),
        (double, double, double, double),
        (double, double, double, torch.float32),
    } == TABLE


@pytest.mark.parametrize("dtypes", ALL, ids=short)
def test_a_mixture_runs_as_the_readme_says_or_is_refused_by_name(
    dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    streams = [
        [random_tensor(shape, dtype, device, seed=100 * s + i) for i, shape in enumerate(SHAPES)]
        for s, dtype in enumerate(dtypes)
    ]
    params, grads, momentums, shadows = streams
    before = [[t.clone() for t in stream] for stream in streams]
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}

    def step() -> None:
        sgd_step_(params, grads, momentums, shadows=shadows, decay=0.75, **options)

    if dtypes not in TABLE:
        wrong = next(d for d in dtypes[1:] if (*dtypes[:1], d, d, d) not in TABLE)
        with pytest.raises(ValueError, match=f"{short([wrong])}.*{short(dtypes[:1])}"):
            step()
        for stream, old in zip(streams, before, strict=True):
            for tensor, old_tensor in zip(stream, old, strict=True):
                assert_same_bits(tensor, old_tensor)
        return

    for _ in range(3):
        before = [[t.clone() for t in stream] for stream in streams]
        step()
        for i in range(len(SHAPES)):
            p, g, v, s = (stream[i] for stream in before)
            assert_sgd_step(RULE, (p, g, v), params[i], momentums[i], f"{SHAPES[i]}")
            assert_ema_update(0.75, s, params[i], shadows[i])
            assert_same_bits(grads[i], g)


# --- state_dtype


NARROW = (torch.float32, *HALF_DTYPES)
state_dtypes = pytest.mark.parametrize("state_dtype", NARROW, ids=str)


def momentums(optimizer: SGD) -> list[Tensor]:
    buffers = [momentum_of(optimizer, p) for g in optimizer.param_groups for p in g["params"]]
    return [buffer for buffer in buffers if buffer is not None]


def assert_steps_follow_the_equations(optimizer: SGD, params: list[Any], steps: int = 5) -> None:
    """Like `trajectory`, whose checked step asks for momentum in the parameter's dtype."""
    for step in range(steps):
        set_gradients(params, seed=step)
        before = [(p.detach().clone(), p.grad.clone(), momentum_of(optimizer, p)) for p in params]
        before = [(p, g, None if v is None else v.clone()) for p, g, v in before]
        optimizer.step()
        for p, old in zip(params, before, strict=True):
            rule = Rule.of(optimizer.param_groups[0])
            assert_sgd_step(rule, old, p, momentum_of(optimizer, p), f"step {step}")


@state_dtypes
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("formulation", ["torch", "sutskever"])
def test_momentum_is_stored_in_the_dtype_that_is_asked_for(
    dtype: torch.dtype, state_dtype: torch.dtype, formulation: Any, device: torch.device
) -> None:
    params = make_params(SHAPES, dtype, device)
    optimizer = SGD(params, lr=0.1, momentum=0.9, formulation=formulation, state_dtype=state_dtype)
    assert_steps_follow_the_equations(optimizer, params)
    assert {v.dtype for v in momentums(optimizer)} == {state_dtype}
    assert {p.dtype for p in params} == {dtype}


def test_each_group_has_a_state_dtype_of_its_own(device: torch.device) -> None:
    first, second, third = (make_params([(9,)], torch.bfloat16, device, seed) for seed in range(3))
    groups = [
        {"params": first},
        {"params": second, "state_dtype": torch.float16},
        {"params": third, "state_dtype": None},
    ]
    optimizer = SGD(groups, lr=0.1, momentum=0.9, state_dtype=torch.float32)
    set_gradients([*first, *second, *third], seed=0)
    optimizer.step()
    expected = [torch.float32, torch.float16, torch.bfloat16]
    assert [v.dtype for v in momentums(optimizer)] == expected


def test_double_parameters_keep_double_momentum(device: torch.device) -> None:
    params = make_params(SHAPES, torch.float64, device)
    optimizer = SGD(params, lr=0.1, momentum=0.9, state_dtype=torch.float64)
    trajectory(optimizer)
    optimizer = SGD(params, lr=0.1, momentum=0.9, state_dtype=torch.float32)
    set_gradients(params, seed=0)
    with pytest.raises(ValueError, match="float32 momentum buffer beside a float64 parameter"):
        optimizer.step()


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_checkpoint_keeps_the_momentum_to_the_bit(
    decay: float | None, device: torch.device
) -> None:
    def make() -> tuple[list[Any], SGD]:
        params = make_params(SHAPES, torch.bfloat16, device)
        ema = None if decay is None else EMA(params, decay)
        return params, SGD(params, lr=0.1, momentum=0.9, state_dtype=torch.float32, ema=ema)

    params, optimizer = make()
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    saved = through_a_file(optimizer.state_dict())

    resumed_params, resumed = make()
    for p, q in zip(resumed_params, params, strict=True):
        p.data.copy_(q.data)
    resumed.load_state_dict(saved)
    for ours, theirs in zip(momentums(resumed), momentums(optimizer), strict=True):
        assert_same_bits(ours, theirs)
    for step in range(3, 5):
        for some, one in ((params, optimizer), (resumed_params, resumed)):
            set_gradients(some, step)
            one.step()
    for p, q in zip(resumed_params, params, strict=True):
        assert_same_bits(p, q)


def test_the_checkpoints_state_dtype_wins_like_its_lr(device: torch.device) -> None:
    params = make_params([(9,)], torch.bfloat16, device)
    optimizer = SGD(params, lr=0.1, momentum=0.9, state_dtype=torch.float32)
    set_gradients(params, 0)
    optimizer.step()
    other = SGD(params, lr=0.2, momentum=0.9)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["state_dtype"] == torch.float32
    assert_same_bits(momentums(other)[0], momentums(optimizer)[0])


def test_momentum_of_a_torch_checkpoint_is_converted(device: torch.device) -> None:
    params = make_params(SHAPES, torch.float32, device)
    theirs = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    set_gradients(params, 0)
    theirs.step()
    halves = [torch.nn.Parameter(p.detach().bfloat16()) for p in params]
    ours = SGD(halves, lr=0.1, momentum=0.9, state_dtype=torch.float32)
    ours.load_state_dict(theirs.state_dict())
    for p, v in zip(params, momentums(ours), strict=True):
        assert_same_bits(v, theirs.state[p]["momentum_buffer"])


def test_an_optimizer_pickled_before_there_was_a_state_dtype_has_none() -> None:
    params = make_params([(3,)])
    optimizer = SGD(params, lr=0.1, momentum=0.9)
    state = optimizer.__getstate__()
    state["param_groups"] = [
        {k: v for k, v in g.items() if k != "state_dtype"} for g in state["param_groups"]
    ]
    state["defaults"] = {k: v for k, v in state["defaults"].items() if k != "state_dtype"}
    old = SGD.__new__(SGD)
    old.__setstate__(state)
    assert old.param_groups[0]["state_dtype"] is None
    set_gradients(params, 0)
    checked_step(old)


@pytest.mark.parametrize("formulation", ["torch", "sutskever"])
def test_tensors_that_torch_steps_have_the_state_dtype_too(formulation: Any) -> None:
    inner = random_tensor((5,), torch.bfloat16)
    param = torch.nn.Parameter(TwoTensor(inner.clone(), inner.clone()))
    plain = torch.nn.Parameter(inner.clone())
    options: dict[str, Any] = {"lr": 0.5, "momentum": 0.5, "formulation": formulation}
    optimizer = SGD([param, plain], state_dtype=torch.float32, **options)
    for step in range(3):
        grad = random_tensor((5,), torch.bfloat16, seed=step)
        param.grad, plain.grad = TwoTensor(grad.clone(), grad.clone()), grad.clone()
        optimizer.step()
    wrapped, direct = momentums(optimizer)
    assert wrapped.dtype == direct.dtype == torch.float32
    torch.testing.assert_close(wrapped.a, direct)
    torch.testing.assert_close(param.a.detach(), plain.detach())


@pytest.mark.parametrize("wrong", [torch.int32, torch.complex64, "float32", 32])
def test_what_is_no_state_dtype_is_refused(wrong: Any) -> None:
    params = make_params([(3,)])
    with pytest.raises(ValueError, match=r"Invalid state_dtype: .*expected None or one of"):
        SGD(params, lr=0.1, state_dtype=wrong)
    optimizer = SGD(params, lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="Invalid state_dtype"):
        optimizer.add_param_group({"params": make_params([(3,)]), "state_dtype": wrong})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0]["state_dtype"] = wrong
    set_gradients(params, 0)
    with pytest.raises(ValueError, match="Invalid state_dtype"):
        optimizer.step()
    with pytest.raises(ValueError, match="Invalid state_dtype"):
        sgd_step_([torch.ones(2)], [torch.ones(2)], [None], lr=1, momentum=0.5, state_dtype=wrong)


def test_complex_parameters_refuse_a_real_state_dtype() -> None:
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    param.grad = torch.ones_like(param)
    optimizer = SGD([param], lr=0.1, momentum=0.9, state_dtype=torch.float32)
    with pytest.raises(ValueError, match="expected state_dtype None with a complex parameter"):
        optimizer.step()
    assert torch.equal(param.detach(), torch.ones(3, dtype=torch.complex64))


def test_a_differentiable_step_refuses_a_state_dtype() -> None:
    with pytest.raises(ValueError, match="state_dtype would round the momentum"):
        SGD(make_params([(3,)]), lr=0.1, differentiable=True, state_dtype=torch.float32)


def test_new_buffers_of_the_functional_form_have_the_state_dtype(device: torch.device) -> None:
    p, g = torch.ones(3, device=device).bfloat16(), torch.full((3,), 1.0 / 3, device=device)
    buffers: list[Tensor | None] = [None]
    sgd_step_([p], [g], buffers, lr=0.5, momentum=0.9, state_dtype=torch.float32)
    assert buffers[0] is not None
    assert_same_bits(buffers[0], g)


@pytest.fixture
def by_attributes(tmp_path, monkeypatch):
    """The module as it reads tensors where torch's table for DLPack is of another version."""
    path = Path(shutil.copy(_C.__file__, tmp_path))
    module = native_variants.load(path, "by_attributes._C")
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    with emulated.in_place(module):
        module.Plan().add_grads([torch.ones(1)], False)  # when it looks for the table
        monkeypatch.undo()
        yield


def odd_history(dtype: torch.dtype) -> list[Tensor]:
    """What becomes of transposed, misaligned, scattered, empty and other parameters."""
    layouts = [
        random_tensor((3, 43), dtype, seed=1).t(),
        random_tensor((130,), dtype, seed=2)[1:],
        random_tensor((7, 2), dtype, seed=3)[:, 0],
        random_tensor((), dtype, seed=4),
        torch.empty(0, 3, dtype=dtype),
    ]
    params = [torch.nn.Parameter(values) for values in layouts]
    split = dtype == torch.bfloat16
    ema = EMA(params, 0.9)
    optimizer = SGD(
        params, 0.1, 0.9, ema=ema, max_grad_norm=1.0, master_weights="split" if split else None
    )
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    return [*params, *ema.shadows.values(), *(momentum_of(optimizer, p) for p in params)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_read_by_their_attributes_alike(dtype, request):
    expected = odd_history(dtype)
    request.getfixturevalue("by_attributes")
    for e, found in zip(expected, odd_history(dtype), strict=True):
        assert_same_bits(found, e)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_dtypes_without_kernels_have_one_name(dtype, request):
    def message() -> str:
        with pytest.raises(ValueError, match=f"{dtype}".split(".")[1][:3]) as caught:
            sgd_step_([torch.ones(3)], [torch.ones(3, dtype=dtype)], [None], lr=0.1)
        return str(caught.value)

    expected = message()
    request.getfixturevalue("by_attributes")
    assert message() == expected
