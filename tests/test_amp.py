"""Hyper-parameters as tensors, steps that a device skips, and ``fused_opt.GradScaler``.

The oracle is a twin: an optimizer that gets the same numbers as Python floats, or that never sees a
skipped step. It is itself tested against the equations elsewhere.
"""

from __future__ import annotations

import copy
import io
import math
import pickle
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reference import (
    all_params,
    assert_all_same_bits,
    assert_same_bits,
    everything,
    make_params,
    momentum_of,
    random_tensor,
    set_gradients,
)
from torch import Tensor

import fused_opt
from fused_opt import EMA, SGD
from fused_opt.functional import ema_update_, sgd_step_

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
INF, NAN = math.inf, math.nan
SHAPES = [(), (7,), (65, 3), (8193,)]


def snapshot(optimizer: SGD) -> list[Tensor]:
    return [t.detach().clone() for t in everything(optimizer)]


# --- hyper-parameters as tensors -----------------------------------------------------------------

#: Each with numbers for four steps.
HYPERS = {
    "lr": (0.1, 0.05, 0.3, 0.0),
    "momentum": (0.9, 0.5, 0.0, 0.99),
    "dampening": (0.5, 0.25, 0.0, 0.9),
    "weight_decay": (0.1, 0.0, 0.01, 0.3),
    "max_grad_norm": (0.5, 1.0, 1e-3, 1e9),
    "decay": (0.9, 0.0, 0.25, 1.0),
    "grad_scale": (1024.0, 3.0, 1.0, 65536.0),
}


def build(device: torch.device, options: dict[str, Any], dtype: torch.dtype = F32) -> SGD:
    """An optimizer of two groups with an EMA, of which "decay" is the decay."""
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "max_grad_norm": 1.0, **options}
    params = make_params(SHAPES, dtype, device)
    tracked = params + make_params([(5,)], dtype, device, seed=9)
    ema = EMA(tracked, decay=options.pop("decay", 0.8))
    groups = [{"params": params[:2]}, {"params": params[2:], "nesterov": False}]
    return SGD(groups, ema=ema, **options)


@pytest.mark.parametrize("dtype", [F32, F64, F16])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("name", HYPERS)
def test_a_tensor_is_the_number_that_it_holds(name, shape, dtype, device):
    numbers = HYPERS[name]
    tensor = torch.empty(shape, dtype=dtype, device=device)
    tensor.fill_(numbers[0])
    options = {} if name == "grad_scale" else {name: tensor}
    twin_options = {} if name == "grad_scale" else {name: float(tensor)}
    optimizer, twin = build(device, options), build(device, twin_options)
    for step, number in enumerate(numbers):
        tensor.fill_(number)
        set_gradients(all_params(optimizer), step)
        set_gradients(all_params(twin), step)
        if name == "grad_scale":
            optimizer.grad_scale, twin.grad_scale = tensor, float(tensor)
        elif name == "decay":
            twin.ema.decay = float(tensor)
        else:
            for group in twin.param_groups:
                group[name] = float(tensor)
        optimizer.step()
        if name == "momentum" and float(tensor) == 0:
            # A number 0 would leave the momentum alone, a tensor goes on with it.
            for group in twin.param_groups:
                group["momentum"] = 1e-300
        twin.step()
        assert_all_same_bits(everything(optimizer), everything(twin))
        assert_same_bits(optimizer.grad_norm, twin.grad_norm)


@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("formulation", ["torch", "sutskever"])
@pytest.mark.parametrize("decoupled", [False, True])
def test_all_hyper_parameters_may_be_tensors_at_once(decoupled, formulation, dtype, device):
    flags = {"formulation": formulation, "decoupled_weight_decay": decoupled}
    names = [name for name in HYPERS if name != "grad_scale"]
    tensors = {name: torch.tensor(HYPERS[name][0], device=device) for name in names}
    optimizer = build(device, {**tensors, **flags}, dtype)
    twin = build(device, {**{n: float(t) for n, t in tensors.items()}, **flags}, dtype)
    scale = torch.tensor(512.0, device=device)
    for step in range(3):
        set_gradients(all_params(optimizer), step)
        set_gradients(all_params(twin), step)
        optimizer.grad_scale, twin.grad_scale = scale, 512.0
        optimizer.step()
        twin.step()
        assert_all_same_bits(everything(optimizer), everything(twin))


def test_groups_mix_tensors_and_numbers(device):
    def start(as_tensor: bool) -> SGD:
        params = make_params([(3 + i,) for i in range(40)], device=device)
        groups = []
        for i in range(20):
            lr: Any = torch.tensor(0.1 / (1 + i), dtype=F64, device=device)
            lr = lr if as_tensor and i % 2 else float(lr)
            groups.append({"params": params[2 * i : 2 * i + 2], "lr": lr})
        return SGD(groups, lr=1.0, momentum=0.9)

    optimizer, twin = start(as_tensor=True), start(as_tensor=False)
    for step in range(3):
        for each in (optimizer, twin):
            set_gradients(all_params(each), step)
            each.step()
    assert_all_same_bits(everything(optimizer), everything(twin))


def test_one_tensor_may_be_lr_of_groups_that_lie_scattered(device):
    """Rows with gaps are updated through copies, and read the same numbers."""
    lr = torch.tensor([0.0, 0.125], device=device)[1]
    memory = random_tensor((9, 14), device=device)
    param = torch.nn.Parameter(memory[:, ::2])
    twin = torch.nn.Parameter(memory.clone()[:, ::2])
    for p, rate in ((param, lr), (twin, 0.125)):
        optimizer = SGD([p], lr=rate, momentum=0.9)
        for step in range(2):
            set_gradients([p], step)
            optimizer.step()
    assert_same_bits(param, twin)


@pytest.mark.parametrize("name", ["lr", "momentum", "dampening", "weight_decay", "decay"])
def test_the_functional_forms_take_tensors(name, device):
    number = 0.625
    results = []
    for value in (number, torch.tensor(number, device=device)):
        options = {"lr": 0.1, "momentum": 0.9, "decay": 0.75, name: value}
        params, grads, shadows = (
            [random_tensor(s, device=device, seed=10 * k + i) for i, s in enumerate(SHAPES)]
            for k in range(3)
        )
        buffers: list[Tensor | None] = [None] * len(SHAPES)
        for _ in range(2):
            sgd_step_(params, grads, buffers, shadows=shadows, **options)
        ema_update_(shadows, params, decay=options["decay"])
        results.append([*params, *buffers, *shadows])
    assert_all_same_bits(*results)


@pytest.mark.parametrize("formulation", ["torch", "sutskever"])
def test_momentum_that_is_a_tensor_of_0_is_kept_and_changes_nothing(formulation, device):
    optimizer, twin = (
        SGD(make_params(SHAPES, device=device), lr=0.1, momentum=m, formulation=formulation)
        for m in (torch.tensor(0.0, device=device), 0.0)
    )
    for step in range(3):
        for each in (optimizer, twin):
            set_gradients(all_params(each), step)
            each.step()
    assert all(momentum_of(optimizer, p) is not None for p in all_params(optimizer))
    assert_all_same_bits(all_params(optimizer), all_params(twin))


def test_hyper_parameters_on_the_cpu_serve_sparse_gradients_too():
    weight, twin = (torch.nn.Parameter(torch.ones(4, 2)) for _ in range(2))
    rate = torch.tensor(0.5)
    for p, lr, momentum in ((weight, rate, torch.tensor(0.5)), (twin, 0.5, 0.5)):
        optimizer = SGD([p], lr=lr, momentum=momentum)
        for _ in range(2):
            p.grad = sparse_grad(p.device, 3.0)
            optimizer.step()
    assert_same_bits(weight, twin)


@pytest.mark.parametrize("name", ["lr", "momentum", "dampening", "weight_decay", "max_grad_norm"])
@pytest.mark.parametrize("wrong", [torch.ones(2), torch.ones(0), torch.ones((), dtype=torch.bool)])
def test_tensors_that_are_not_one_number_are_refused_by_name(name, wrong):
    if name != "lr":  # whose check is torch's
        with pytest.raises(ValueError, match=name):
            SGD(make_params([(3,)]), **{"lr": 0.1, name: wrong})
    params = make_params([(3,)])
    optimizer = SGD(params, lr=0.1, momentum=0.9)
    set_gradients(params, seed=0)
    optimizer.param_groups[0][name] = wrong
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=name):
        optimizer.step()
    assert_all_same_bits(everything(optimizer), before)


def test_max_grad_norm_is_one_tensor_in_all_groups(device):
    bound = torch.tensor(0.5, device=device)
    optimizer = build(device, {"max_grad_norm": bound})
    optimizer.param_groups[1]["max_grad_norm"] = bound.clone()
    with pytest.raises(ValueError, match="same value in each"):
        optimizer.step()
    optimizer.param_groups[1]["max_grad_norm"] = bound
    optimizer.add_param_group({"params": make_params([(3,)], device=device, seed=5)})
    assert optimizer.param_groups[2]["max_grad_norm"] is bound


def saved(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "load_state_dict"])
def test_max_grad_norm_stays_one_tensor_in_copies(way, device):
    optimizer = build(device, {"max_grad_norm": torch.tensor(0.5, device=device)})
    if way == "deepcopy":
        twin = copy.deepcopy(optimizer)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(optimizer))
    else:
        twin = build(device, {"max_grad_norm": 7.0})
        twin.load_state_dict(saved(optimizer.state_dict()))
    for each in (optimizer, twin):
        set_gradients(all_params(each), seed=1)
        each.step()
    assert_all_same_bits(everything(optimizer), everything(twin))


def test_a_step_lets_go_of_its_tensors(device):
    params = make_params([(3,)], device=device)
    optimizer = SGD(params, lr=torch.tensor(0.1, device=device))
    set_gradients(params, seed=0)
    optimizer.step()
    rate = weakref.ref(optimizer.param_groups[0]["lr"])
    optimizer.defaults["lr"] = optimizer.param_groups[0]["lr"] = 0.2
    optimizer.step()
    assert rate() is None


# --- the decay of an EMA -------------------------------------------------------------------------


def test_an_ema_reads_its_decay_at_each_update(device):
    decay = torch.tensor(0.5, device=device)
    params = make_params(SHAPES, device=device)
    ema, twin = EMA(params, decay=decay), EMA(params, decay=0.5)
    assert ema.decay is decay
    for step, number in enumerate(HYPERS["decay"]):
        decay.fill_(number)
        twin.decay = float(decay)
        with torch.no_grad():
            for i, p in enumerate(params):
                p.copy_(random_tensor(p.shape, device=device, seed=30 * step + i))
        ema.update()
        twin.update()
        assert_all_same_bits(list(ema.shadows.values()), list(twin.shadows.values()))


def test_a_decay_is_saved_as_a_number_and_loaded_into_its_tensor(device):
    decay = torch.tensor(0.5, dtype=F64, device=device)
    params = make_params([(3,)], device=device)
    ema = EMA(params, decay=decay)
    state = ema.state_dict()
    assert type(state["decay"][0]) is float
    assert state["decay"] == [0.5]
    ema.load_state_dict({**state, "decay": [0.25]})
    assert ema.decay is decay
    assert float(decay) == 0.25
    plain = EMA(params, decay=0.9)
    plain.load_state_dict(state)
    assert plain.decay == 0.5
    assert type(plain.decay) is float


@pytest.mark.parametrize("wrong", [-0.1, 1.5, NAN])
def test_a_decay_that_leaves_its_range_is_refused_and_nothing_changes(wrong):
    decay = torch.tensor(0.5)
    params = make_params([(3,)])
    ema = EMA(params, decay=decay)
    optimizer = SGD(params, lr=0.1, momentum=0.9, ema=ema)
    set_gradients(params, seed=0)
    decay.fill_(wrong)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="decay"):
        optimizer.step()
    optimizer.ema = None
    with pytest.raises(ValueError, match="decay"):
        ema.update()
    with pytest.raises(ValueError, match="decay"):
        EMA(params, decay=decay)
    with pytest.raises(ValueError, match="decay"):
        ema_update_(list(ema.shadows.values()), params, decay=decay)
    optimizer.ema = ema
    assert_all_same_bits(everything(optimizer), before)
    assert ema.num_updates == 0


# --- steps that are skipped ----------------------------------------------------------------------

FOUND = [1.0, 2.0, 0.5, -1.0, 1e-40, INF, NAN]

#: What a step may have to leave alone. On the CPU the device decides only with capturable.
SKIPPED: dict[str, dict[str, Any]] = {
    "plain": {"momentum": 0.0},
    "momentum": {},
    "sutskever": {"formulation": "sutskever", "nesterov": True},
    "damped": {"dampening": 0.5},
    "reset_grads": {"reset_grads": True},
    "clipped": {"max_grad_norm": 0.5, "reset_grads": True},
    "capturable": {"capturable": True},
    "capturable, reset_grads": {"capturable": True, "reset_grads": True},
    "capturable, clipped": {"capturable": True, "max_grad_norm": 0.5, "reset_grads": True},
    "capturable, sutskever": {"capturable": True, "formulation": "sutskever"},
    "capturable, plain": {"capturable": True, "momentum": 0.0, "decoupled_weight_decay": True},
}
MASTERS = [(F32, None), (F64, None), (F16, None), (F16, "fp32"), (F16, "kahan")]
MASTERS += [(BF16, mode) for mode in ("fp32", "split", "kahan")]


class Run:
    """Trained, frozen, gradient-less and foreign parameters under one EMA, in two groups."""

    def __init__(self, device: torch.device, options: dict[str, Any], dtype: torch.dtype) -> None:
        params = make_params(SHAPES, dtype, device)
        scattered = torch.nn.Parameter(random_tensor((9, 14), dtype, device)[:, ::2])
        self.trained = [*params[:3], scattered]
        self.idle = params[3]
        with torch.no_grad():
            foreign = make_params([(11,)], dtype, device, seed=3)
            self.ema = EMA([*params, scattered, *foreign], decay=0.75)
            for p in [self.idle, *foreign]:  # so that every update moves their shadows
                p.add_(1.0)
        groups = [{"params": params[:2]}, {"params": [*params[2:], scattered], "lr": 0.2}]
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, **options}
        self.optimizer = SGD(groups, ema=self.ema, **options)

    def step(self, seed: int, found: float | None) -> None:
        set_gradients(self.trained, seed)
        device = self.trained[0].device
        optimizer: Any = self.optimizer
        optimizer.grad_scale = torch.tensor(8.0, device=device)
        if found is not None:
            optimizer.found_inf = torch.tensor(found, device=device)
            if found:
                self.trained[1].grad[3] = INF
        optimizer.step()
        del optimizer.grad_scale
        if found is not None:
            del optimizer.found_inf


@pytest.mark.parametrize("first", [True, False], ids=["first step", "later"])
@pytest.mark.parametrize(("dtype", "master"), MASTERS)
@pytest.mark.parametrize("name", SKIPPED)
def test_a_skipped_step_changes_nothing_but_gradients_to_reset(name, dtype, master, first, device):
    options = {**SKIPPED[name], "master_weights": master}
    run, twin = Run(device, options, dtype), Run(device, options, dtype)
    steps = 0
    if not first:
        for each in (run, twin):
            each.step(seed=0, found=0.0)
        steps = 1
    before = [t.detach().clone() for t in [*all_params(run.optimizer), *run.ema.shadows.values()]]
    norm = run.optimizer.grad_norm
    for i, found in enumerate(FOUND):
        run.step(seed=10 + i, found=found)
        after = [*all_params(run.optimizer), *run.ema.shadows.values()]
        assert_all_same_bits(after, before)
        assert run.ema.num_updates == steps
        if options.get("reset_grads"):
            assert not any(p.grad.any() for p in run.trained)
        else:
            assert run.trained[1].grad[3] == INF
        if "max_grad_norm" in options:
            assert run.optimizer.grad_norm.isinf()
        else:
            assert run.optimizer.grad_norm is norm is None
    # It goes on as if nothing had been.
    for step in range(2):
        run.step(seed=50 + step, found=0.0)
        twin.step(seed=50 + step, found=None)
    assert_all_same_bits(everything(run.optimizer), everything(twin.optimizer))
    assert run.ema.num_updates == twin.ema.num_updates == steps + 2
    assert type(run.ema.num_updates) is int


def test_a_step_without_a_scaler_knows_nothing_of_the_last(device):
    params = make_params(SHAPES, device=device)
    optimizer = SGD(params, lr=0.1, capturable=True)
    set_gradients(params, seed=0)
    before = [p.detach().clone() for p in params]
    optimizer.found_inf = torch.tensor(1.0, device=device)
    optimizer.step()
    assert_all_same_bits([p.detach() for p in params], before)
    del optimizer.found_inf
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * p.grad)


@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_a_skipped_step_resets_large_gradients_to_the_last_element(dtype, device):
    """More than one thread has a part in them, and more than one block."""
    params = make_params([(200_003,), (8191,)], dtype, device)
    memory = torch.ones(300_000, dtype=dtype, device=device)
    params[0].grad, params[1].grad = memory[7:200_010], memory[200_100:208_291]
    before = [p.detach().clone() for p in params]
    optimizer = SGD(params, lr=0.1, reset_grads=True, capturable=True)
    optimizer.found_inf = torch.tensor(1.0, device=device)
    optimizer.step()
    assert_all_same_bits([p.detach() for p in params], before)
    assert not any(p.grad.any() for p in params)
    assert int(memory.count_nonzero()) == 300_000 - 200_003 - 8191


@pytest.mark.parametrize("dtype", [F64, torch.int32, torch.bool, F16])
def test_found_inf_may_be_of_any_dtype(dtype, device):
    for number in (0, 1):
        run = Run(device, {"capturable": True}, F32)
        before = snapshot(run.optimizer)
        run.optimizer.found_inf = torch.tensor(number, device=device).to(dtype)
        set_gradients(run.trained, seed=0)
        run.optimizer.step()
        assert run.ema.num_updates == 1 - number
        same = [
            bool((a == b).all()) for a, b in zip(everything(run.optimizer), before, strict=True)
        ]
        assert all(same) == bool(number)
    tiny = Run(device, {"capturable": True}, F32)
    tiny.optimizer.found_inf = torch.tensor(1e-300, dtype=F64, device=device)
    tiny.step(seed=0, found=None)
    assert tiny.ema.num_updates == 0


@pytest.mark.parametrize("capturable", [False, True])
def test_found_inf_may_be_a_number(capturable, device):
    run = Run(device, {"capturable": capturable}, F32)
    for found, updates in ((1.0, 0), (0.0, 1), (2, 1)):
        run.optimizer.found_inf = found
        run.step(seed=0, found=None)
        assert run.ema.num_updates == updates


@pytest.mark.parametrize("capturable", [False, True])
def test_momentum_is_not_converted_by_a_skipped_step(capturable, device):
    """The conversion uses the learning rate of the step that is taken."""
    run, twin = (Run(device, {"capturable": capturable}, F32) for _ in range(2))
    for each in (run, twin):
        each.step(seed=0, found=None)
        for group in each.optimizer.param_groups:
            group["formulation"] = "sutskever"
    run.step(seed=1, found=1.0)
    assert all("momentum_buffer" in run.optimizer.state[p] for p in run.trained)
    for each in (run, twin):
        for group in each.optimizer.param_groups:
            group["lr"] = 0.7
        each.step(seed=2, found=0.0)
    assert_all_same_bits(everything(run.optimizer), everything(twin.optimizer))


def sparse_grad(device: torch.device, value: float) -> Tensor:
    values = torch.tensor([[value] * 2, [1.0] * 2], device=device)
    index = torch.tensor([[1, 3]], device=device)
    return torch.sparse_coo_tensor(index, values, (4, 2), check_invariants=True)


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("kind", ["sparse", "complex"])
def test_rows_that_torch_runs_skip_with_the_others(kind, max_norm, capturable, device):
    dense = torch.nn.Parameter(torch.ones(5, device=device))
    dtype = torch.complex64 if kind == "complex" else F32
    other = torch.nn.Parameter(torch.ones(4, 2, device=device, dtype=dtype))
    ema = EMA([dense, other], decay=0.5)
    options = {"max_grad_norm": max_norm, "capturable": capturable, "momentum": 0.5}
    optimizer = SGD([dense, other], lr=0.5, ema=ema, **options)
    for step, found in enumerate((1.0, 0.0, NAN, 0.0)):
        value = 2.0 if found == 0 else INF
        dense.grad = torch.ones_like(dense)
        other.grad = sparse_grad(device, value) if kind == "sparse" else value * other.detach()
        optimizer.found_inf = torch.tensor(found, device=device)
        before = [t.detach().clone() for t in (dense, other, *ema.shadows.values())]
        optimizer.step()
        after = [t.detach() for t in (dense, other, *ema.shadows.values())]
        same = [torch.equal(a, b) for a, b in zip(after, before, strict=True)]
        assert all(same) if found else not any(same), step
        if max_norm is not None:
            assert optimizer.grad_norm.isfinite() == (found == 0)
    assert ema.num_updates == 2


def test_a_step_that_raises_under_a_scaler_has_changed_nothing(device):
    run = Run(device, {"capturable": True}, F32)
    run.step(seed=0, found=0.0)
    state = run.optimizer.state[run.trained[2]]
    kept, state["momentum_buffer"] = state["momentum_buffer"], torch.zeros(2, device=device)
    before = snapshot(run.optimizer)
    with pytest.raises(ValueError, match="momentum"):
        run.step(seed=1, found=0.0)
    assert_all_same_bits(everything(run.optimizer), before)
    assert run.ema.num_updates == 1
    del run.optimizer.grad_scale, run.optimizer.found_inf
    state["momentum_buffer"] = kept
    run.step(seed=1, found=0.0)
    assert run.ema.num_updates == 2


def test_a_skipped_step_of_differentiable_sgd_does_not_count():
    param = torch.ones(3)
    ema = EMA([param], decay=0.5)
    optimizer = SGD([param], lr=0.1, differentiable=True, ema=ema)
    for found, updates in ((1.0, 0), (0.0, 1)):
        param.grad = torch.ones(3)
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()
        assert ema.num_updates == updates


# --- fused_opt.GradScaler ------------------------------------------------------------------------


def scalers(device: torch.device, **options: Any) -> tuple[fused_opt.GradScaler, Any]:
    options = {"init_scale": 1024.0, "growth_interval": 3, **options}
    return (
        fused_opt.GradScaler(device.type, **options),
        torch.amp.GradScaler(device.type, **options),
    )


def scaled_step(
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    seed: int,
    spoil: float | None,
    update: bool = True,
) -> None:
    """Gradients as a backward pass of the scaled loss would leave them."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    device = params[0].device
    scale = scaler.scale(torch.ones((), device=device))  # a scaler is lazy until its first loss
    set_gradients(params, seed)
    for p in params:
        p.grad.mul_(scale)
    if spoil is not None:
        params[-1].grad.view(-1)[-1] = spoil
    scaler.step(optimizer)
    if update:
        scaler.update()


SPOILED = [INF, None, None, NAN, -INF, None, None, None, None, None, INF, None]


@pytest.mark.parametrize("dtype", [F32, F64, F16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 0.5},
        {"capturable": True},
        {"capturable": True, "max_grad_norm": 0.5, "reset_grads": True},
        {"dampening": 0.5},
        {"reset_grads": True},
        {"max_grad_norm": INF},
    ],
    ids=str,
)
def test_our_scaler_does_what_torchs_does(options, dtype, device):
    one, two = scalers(device)
    optimizers = []
    for _ in range(2):
        params = make_params(SHAPES, dtype, device)
        ema = EMA(params, decay=0.75)
        optimizers.append(SGD(params, lr=0.1, momentum=0.9, ema=ema, **options))
    for step, spoil in enumerate(SPOILED):
        for optimizer, scaler in zip(optimizers, (one, two), strict=True):
            scaled_step(optimizer, scaler, step, spoil)
        assert one.state_dict() == two.state_dict(), step
        assert_all_same_bits(everything(optimizers[0]), everything(optimizers[1]))
        assert_all_same_bits(*([p.grad for p in all_params(optimizer)] for optimizer in optimizers))
        if "max_grad_norm" in options:
            assert_same_bits(optimizers[0].grad_norm, optimizers[1].grad_norm)
        else:
            assert optimizers[0].grad_norm is None
        assert optimizers[0].ema.num_updates == optimizers[1].ema.num_updates
    assert optimizers[0].ema.num_updates == SPOILED.count(None)
    assert not hasattr(optimizers[0], "found_inf")
    assert not hasattr(optimizers[0], "grad_scale")


@pytest.fixture
def no_sweep(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch's own pass over the gradients raises."""

    def refuse(*_: Any) -> None:
        raise AssertionError("torch's sweep over the gradients")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_amp_foreach_non_finite_check_and_unscale_", refuse)
        yield


@pytest.mark.usefixtures("no_sweep")
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_our_scaler_neither_sweeps_nor_writes_the_gradients(max_norm, device):
    scaler, theirs = scalers(device)
    params = make_params(SHAPES, device=device)
    optimizer = SGD(params, lr=0.1, max_grad_norm=max_norm)
    set_gradients(params, seed=0)
    scaler.scale(torch.ones((), device=device))
    before = [(p.grad.clone(), p.grad._version) for p in params]
    scaler.step(optimizer)
    scaler.update()
    for p, (grad, version) in zip(params, before, strict=True):
        assert_same_bits(p.grad, grad)
        assert p.grad._version == version
    with pytest.raises(AssertionError, match="sweep"):  # that the fixture would tell
        scaled_step(optimizer, theirs, 1, None)


def test_gradients_that_a_hook_writes_are_looked_at(device):
    """A pre-hook runs after the scaler has asked, and before the step looks."""
    scaler, _ = scalers(device)
    params = make_params([(5,)], device=device)
    optimizer = SGD(params, lr=0.1, momentum=0.9)

    def spoil(*_: Any) -> None:
        params[0].grad.fill_(INF)

    optimizer.register_step_pre_hook(spoil)
    before = params[0].detach().clone()
    scaled_step(optimizer, scaler, 0, None)
    assert scaler.get_scale() == 512.0
    assert_same_bits(params[0], before)


@pytest.mark.parametrize(("max_norm", "skips"), [(None, False), (1.0, True)])
def test_finite_gradients_beyond_the_roots_of_the_dtype_skip_only_where_their_norm_overflows(
    max_norm, skips, device
):
    scaler, _ = scalers(device, init_scale=1.0)
    params = make_params([(5,)], device=device)
    before = params[0].detach().clone()
    scaled_step(SGD(params, lr=0.1, max_grad_norm=max_norm), scaler, 0, 1e30)
    assert (scaler.get_scale() == 0.5) == skips
    assert torch.equal(params[0], before) == skips


def test_explicit_unscaling_takes_torchs_way(device):
    one, two = scalers(device)
    results = []
    for scaler in (one, two):
        params = make_params(SHAPES, device=device)
        optimizer = SGD(params, lr=0.1, momentum=0.9, max_grad_norm=0.5)
        for step, spoil in enumerate((None, INF, None)):
            scaler.scale(torch.ones((), device=device))
            set_gradients(params, step)
            for p in params:
                p.grad.mul_(scaler.get_scale())
            if spoil is not None:
                params[0].grad.fill_(spoil)
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        results.append([*everything(optimizer), *(p.grad for p in params)])
    assert one.state_dict() == two.state_dict()
    assert_all_same_bits(*results)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_other_optimizers_take_torchs_way(make, device):
    one, two = scalers(device)
    results = []
    for scaler in (one, two):
        params, others = make_params(SHAPES, device=device), make_params([(6,)], device=device)
        ours, theirs = SGD(params, lr=0.1, momentum=0.9), make(others, lr=0.1)
        for step, (mine, other) in enumerate(
            [(None, None), (INF, None), (None, NAN), (None, None)]
        ):
            scaled_step(ours, scaler, step, mine, update=False)
            scaled_step(theirs, scaler, step, other)
        results.append([*params, *others])
    assert one.state_dict() == two.state_dict()
    assert one.get_scale() == 256.0
    assert_all_same_bits(*results)


def test_a_differentiable_step_takes_torchs_way(device):
    scaler, _ = scalers(device)
    params = [random_tensor((5,), device=device)]
    optimizer = SGD(params, lr=0.1, differentiable=True)
    before = params[0].detach().clone()
    scaled_step(optimizer, scaler, 0, INF)
    assert scaler.get_scale() == 512.0
    assert_same_bits(params[0], before)
    scaled_step(optimizer, scaler, 1, None)
    assert not torch.equal(params[0], before)


def test_sparse_gradients_are_looked_at_too(device):
    scaler, _ = scalers(device, init_scale=8.0)
    weight = torch.nn.Parameter(torch.ones(4, 2, device=device))
    optimizer = SGD([weight], lr=0.5)
    scaler.scale(torch.ones((), device=device))
    for value, scale in ((8.0, 8.0), (INF, 4.0), (NAN, 2.0)):
        weight.grad = sparse_grad(device, value)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale
    expected = [1.0, 0.5, 1.0, 1.0 - 0.5 / 8]
    assert weight[:, 0].tolist() == expected


def test_a_step_without_gradients_is_judged_by_torch(device):
    for scaler in scalers(device):
        optimizer = SGD(make_params([(3,)], device=device), lr=0.1)
        scaler.scale(torch.ones((), device=device))
        scaler.step(optimizer)
        with pytest.raises(AssertionError, match="No inf checks"):
            scaler.update()


def test_a_second_step_before_the_update_raises_as_torchs(device):
    scaler, _ = scalers(device)
    optimizer = SGD(make_params([(3,)], device=device), lr=0.1)
    scaled_step(optimizer, scaler, 0, None, update=False)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)


def test_a_disabled_scaler_only_steps(device):
    scaler = fused_opt.GradScaler(device.type, enabled=False)
    params = make_params([(3,)], device=device)
    before = params[0].detach().clone()
    optimizer = SGD(params, lr=0.1)
    set_gradients(params, seed=0)
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(params[0], before)
    assert scaler.state_dict() == {}


def test_a_scaler_is_pickled_and_goes_on(device):
    scaler, _ = scalers(device)
    optimizer = SGD(make_params([(3,)], device=device), lr=0.1)
    scaled_step(optimizer, scaler, 0, INF)
    twin = pickle.loads(pickle.dumps(scaler))
    assert type(twin) is fused_opt.GradScaler
    assert twin.state_dict() == scaler.state_dict()
    scaled_step(optimizer, twin, 1, NAN)
    assert twin.get_scale() == 256.0


def test_an_optimizer_that_does_not_look_is_told_of(device):
    class Blind(SGD):
        def step(self, closure=None):
            return None

    scaler, _ = scalers(device)
    optimizer = Blind(make_params([(3,)], device=device), lr=0.1)
    with pytest.raises(RuntimeError, match=r"Blind\.step has not looked"):
        scaled_step(optimizer, scaler, 0, None)


def test_a_step_that_raises_leaves_nothing_to_look_for(device):
    scaler, _ = scalers(device)
    params = make_params([(3,)], device=device)
    ema = EMA(params, decay=0.5)
    optimizer = SGD(params, lr=0.1, ema=ema)
    ema.apply_shadow()
    with pytest.raises(RuntimeError, match="shadows are applied"):
        scaled_step(optimizer, scaler, 0, None)
    ema.restore()
    params[0].grad.fill_(INF)
    optimizer.step()  # for which nobody has asked to skip
    assert params[0].isinf().all()


def test_a_step_that_raises_may_be_taken_again(device):
    scaler = fused_opt.GradScaler(device.type, init_scale=1024.0)
    params = make_params([(3,)], device=device)
    start = params[0].detach().clone()
    optimizer = SGD(params, lr=1.0)
    optimizer.grad_scale = torch.tensor(2.0, device=device)  # the user's own stays
    scaler.scale(torch.zeros((), device=device))
    params[0].grad = torch.full_like(start, 2048.0)
    group = optimizer.param_groups[0]
    group["formulation"] = "wrong"
    with pytest.raises(ValueError, match="formulation"):
        scaler.step(optimizer)
    group["formulation"] = "torch"
    scaler.step(optimizer)
    torch.testing.assert_close(params[0].detach(), start - 1)


def test_a_torch_without_the_hook_is_refused_by_name(monkeypatch):
    monkeypatch.delattr(torch.amp.GradScaler, "_check_inf_per_device")
    with pytest.raises(RuntimeError, match="_check_inf_per_device"):
        fused_opt.GradScaler("cpu")


def test_a_users_scale_multiplies_in(device):
    """As torch's scaler has it: a grad_scale that is already there is part of the product."""
    results = []
    for scaler in scalers(device):
        params = make_params(SHAPES, device=device)
        optimizer = SGD(params, lr=0.1, max_grad_norm=0.5)
        optimizer.grad_scale = torch.tensor(4.0, device=device)
        scaled_step(optimizer, scaler, 0, None)
        results.append([*params, optimizer.grad_norm])
    assert_all_same_bits(*results)
    plain = make_params(SHAPES, device=device)
    twin = SGD(plain, lr=0.1, max_grad_norm=0.5)
    set_gradients(plain, seed=0)
    for p in plain:
        p.grad.div_(4.0)
    twin.step()
    assert_all_same_bits(results[0], [*plain, twin.grad_norm])
