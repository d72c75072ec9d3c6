"""``SGD(capturable=True)``, and steps inside CUDA graphs.

On the CPU a capturable step runs the same code, found_inf and counters left to the native module;
the marked tests capture and replay, with the CPU as the oracle.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
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
import fused_opt._counter
import fused_opt._plan
import fused_opt.ema
import fused_opt.sgd
from fused_opt import EMA, SGD, schedules
from fused_opt._counter import Counter
from fused_opt.functional import sgd_step_

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
INF, NAN = math.inf, math.nan
SHAPES = [(), (7,), (65, 3), (8193,)]
MASTERS = [(F32, None), (F64, None), (F16, None), (F16, "fp32"), (F16, "kahan")]
MASTERS += [(BF16, mode) for mode in (None, "fp32", "split", "kahan")]


def build(device: torch.device | str, dtype: torch.dtype = F32, **options: Any) -> SGD:
    params = make_params(SHAPES, dtype, device)
    ema = EMA(params, decay=options.pop("decay", 0.75))
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.2}]
    return SGD(groups, ema=ema, **{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, **options})


# --- state from the start ------------------------------------------------------------------------


def assert_prepared(optimizer: SGD, params: list[Tensor], key: str = "momentum_buffer") -> None:
    for p in params:
        momentum = optimizer.state[p][key]
        assert momentum.shape == p.shape
        assert momentum.device == p.device
        assert not momentum.requires_grad
        assert not momentum.any()
        assert momentum.signbit().all()


@pytest.mark.parametrize(("dtype", "master"), MASTERS)
@pytest.mark.parametrize("formulation", ["torch", "sutskever"])
def test_all_state_exists_before_the_first_step(formulation, dtype, master, device):
    options = {"formulation": formulation, "master_weights": master, "capturable": True}
    optimizer = build(device, dtype, **options)
    keys = {"torch": "momentum_buffer", "sutskever": "velocity"}
    assert_prepared(optimizer, all_params(optimizer), keys[formulation])
    before = [set(optimizer.state[p]) for p in all_params(optimizer)]
    tensors = [t.data_ptr() for t in everything(optimizer)]
    set_gradients(all_params(optimizer), seed=0)
    optimizer.step()
    assert [set(optimizer.state[p]) for p in all_params(optimizer)] == before
    assert [t.data_ptr() for t in everything(optimizer)] == tensors
    expected = {keys[formulation]}
    if master is not None:
        expected.add({"fp32": "master", "split": "residual", "kahan": "compensation"}[master])
    assert before == [expected] * len(before)


def test_the_momentums_dtype_is_that_of_a_first_step(device):
    for options in ({"master_weights": "fp32"}, {"state_dtype": F16}, {}):
        first, prepared = (build(device, BF16, capturable=c, **options) for c in (False, True))
        set_gradients(all_params(first), seed=0)
        first.step()
        for p, q in zip(all_params(first), all_params(prepared), strict=True):
            assert momentum_of(prepared, q).dtype == momentum_of(first, p).dtype


def test_without_momentum_there_is_no_state(device):
    assert not build(device, momentum=0, capturable=True).state
    assert not build(device, momentum=0, master_weights="fp32", capturable=True).state


def test_a_group_of_its_own_is_prepared_too(device):
    params = make_params([(3,), (4,)], device=device)
    optimizer = SGD([{"params": params[:1], "capturable": True}, {"params": params[1:]}], lr=0.1)
    assert [g["capturable"] for g in optimizer.param_groups] == [True, False]
    optimizer = SGD(
        [{"params": params[:1], "capturable": True}, {"params": params[1:]}], lr=0.1, momentum=0.9
    )
    assert params[0] in optimizer.state
    assert params[1] not in optimizer.state
    late = make_params([(5,)], device=device)
    optimizer.add_param_group({"params": late, "capturable": True})
    assert_prepared(optimizer, late)
    assert params[1] not in optimizer.state


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "load_state_dict", "of torch"])
def test_copies_and_checkpoints_are_prepared(way, device):
    optimizer = build(device, capturable=True)
    if way == "deepcopy":
        twin = copy.deepcopy(optimizer)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(optimizer))
    elif way == "of torch":
        stock = torch.optim.SGD(
            [{"params": make_params(SHAPES[:2])}, {"params": make_params(SHAPES[2:])}], lr=0.1
        )
        twin = build(device, capturable=True)
        state = stock.state_dict()
        for group in state["param_groups"]:
            group["momentum"] = 0.9
        twin.load_state_dict(state)
        assert all(group["capturable"] for group in twin.param_groups)
    else:
        twin = build(device)
        twin.load_state_dict(optimizer.state_dict())
        assert all(group["capturable"] for group in twin.param_groups)
    assert_prepared(twin, all_params(twin))


def test_state_that_exists_is_left_as_it_is(device):
    optimizer = build(device, BF16, master_weights="split", capturable=True)
    set_gradients(all_params(optimizer), seed=0)
    optimizer.step()
    held = {p: dict(optimizer.state[p]) for p in all_params(optimizer)}
    values = [t.detach().clone() for t in everything(optimizer)]
    optimizer.add_param_group({"params": make_params([(5,)], BF16, device), "capturable": True})
    for p, state in held.items():
        assert optimizer.state[p].keys() == state.keys()
        assert all(optimizer.state[p][key] is value for key, value in state.items())
    optimizer.param_groups.pop()
    assert_all_same_bits(everything(optimizer), values)


@pytest.mark.parametrize("wrong", [1, None, "yes"])
def test_what_is_no_bool_is_refused(wrong):
    with pytest.raises(ValueError, match="Invalid capturable"):
        build("cpu", capturable=wrong)


@pytest.mark.parametrize("dampening", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_dampening_is_refused(dampening):
    with pytest.raises(ValueError, match=r"capturable.*dampening"):
        build("cpu", dampening=dampening, capturable=True)
    optimizer = build("cpu", capturable=True)
    group = {"params": make_params([(3,)]), "dampening": dampening}
    with pytest.raises(ValueError, match=r"capturable.*dampening"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 2
    optimizer.param_groups[1]["dampening"] = dampening
    set_gradients(all_params(optimizer), seed=0)
    before = [t.detach().clone() for t in everything(optimizer)]
    with pytest.raises(ValueError, match=r"capturable.*dampening"):
        optimizer.step()
    assert_all_same_bits(everything(optimizer), before)
    build("cpu", dampening=torch.tensor(0.0), capturable=True)


def test_a_checkpoint_with_dampening_is_refused_and_nothing_changes():
    stock = torch.optim.SGD(make_params(SHAPES), lr=0.3, momentum=0.9, dampening=0.5)
    optimizer = SGD(make_params(SHAPES), lr=0.1, momentum=0.9, capturable=True)
    before = [t.clone() for t in everything(optimizer)]
    with pytest.raises(ValueError, match=r"capturable.*dampening"):
        optimizer.load_state_dict(stock.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert_all_same_bits(everything(optimizer), before)


def test_a_group_that_cannot_be_prepared_is_not_added():
    optimizer = build("cpu", BF16, master_weights="split", capturable=True)
    groups, state = list(optimizer.param_groups), set(optimizer.state)
    late = [*make_params([(3,)], BF16), *make_params([(3,)], F16)]
    with pytest.raises(ValueError, match=r"parameter 1 in group 2.*float16"):
        optimizer.add_param_group({"params": late})
    assert optimizer.param_groups == groups
    assert set(optimizer.state) == state


@pytest.mark.parametrize("place", ["constructor", "group"])
def test_a_differentiable_step_is_refused(place):
    params = make_params([(3,)])
    option = {"capturable": True}
    groups = params if place == "constructor" else [{"params": params, **option}]
    with pytest.raises(ValueError, match=r"capturable.*differentiable"):
        SGD(groups, lr=0.1, differentiable=True, **(option if place == "constructor" else {}))


# --- the same steps ------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.0},
    {"nesterov": True, "maximize": True},
    {"formulation": "sutskever", "decoupled_weight_decay": True},
    {"max_grad_norm": 0.5, "reset_grads": True},
    {"weight_decay": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "master"), MASTERS)
def test_a_capturable_step_has_the_bits_of_another(dtype, master, options, device):
    options = {**options, "master_weights": master}
    optimizer, twin = (build(device, dtype, capturable=c, **options) for c in (True, False))
    for step in range(3):
        for each in (optimizer, twin):
            set_gradients(all_params(each)[: 3 + step % 2], step)  # one of them is late
            each.step()
        assert_all_same_bits(all_params(optimizer), all_params(twin))
        assert_all_same_bits(list(optimizer.ema.shadows.values()), list(twin.ema.shadows.values()))
        assert optimizer.ema.num_updates == twin.ema.num_updates == step + 1
    assert_all_same_bits(everything(optimizer), everything(twin))
    if "max_grad_norm" in options:
        assert_same_bits(optimizer.grad_norm, twin.grad_norm)


def test_rows_that_torch_runs_are_capturable_steps_too(device):
    results = []
    for capturable in (True, False):
        weight = torch.nn.Parameter(torch.ones(4, 2, device=device))
        phase = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64, device=device))
        ema = EMA([weight, phase], decay=0.5)
        optimizer = SGD([weight, phase], lr=0.1, momentum=0.9, ema=ema, capturable=capturable)
        for step in range(3):
            values = torch.full((2, 2), 1.0 + step, device=device)
            index = torch.tensor([[1, 3]], device=device)
            weight.grad = torch.sparse_coo_tensor(index, values, (4, 2), check_invariants=True)
            phase.grad = phase.detach() * 1j
            optimizer.step()
        assert ema.num_updates == 3
        results.append([t.detach() for t in (weight, phase, *ema.shadows.values())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_step_of_nothing_that_kernels_reach_counts_too(device):
    phase = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64, device=device))
    empty = torch.nn.Parameter(torch.ones(0, device=device))
    for param in (phase, empty):
        optimizer = SGD([param], lr=0.1, ema=EMA([param], decay=0.5), capturable=True)
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert optimizer.ema.num_updates == 1


# --- counts --------------------------------------------------------------------------------------


def counted(device: torch.device, steps: int) -> SGD:
    """Steps of which every second is skipped, on the device."""
    optimizer = build(device, capturable=True)
    for step in range(2 * steps):
        set_gradients(all_params(optimizer), step)
        optimizer.found_inf = torch.tensor(float(step % 2), device=device)
        optimizer.step()
    del optimizer.found_inf
    return optimizer


def test_counts_are_plain_ints_everywhere(device):
    optimizer = counted(device, steps=3)
    ema = optimizer.ema
    states = [ema.state_dict(), pickle.loads(pickle.dumps(ema)).state_dict()]
    states += [copy.deepcopy(ema).state_dict(), copy.deepcopy(optimizer).ema.state_dict()]
    states += [pickle.loads(pickle.dumps(optimizer)).ema.state_dict()]
    for state in states:
        assert type(state["num_steps"]) is int
        assert state["num_steps"] == 3
    assert type(ema.num_updates) is int


def test_a_copy_counts_for_itself(device):
    optimizer = counted(device, steps=2)
    twin = copy.deepcopy(optimizer)
    set_gradients(all_params(twin), seed=0)
    twin.step()
    assert (optimizer.ema.num_updates, twin.ema.num_updates) == (2, 3)


def test_counts_can_be_set_and_start_over(device):
    optimizer = counted(device, steps=2)
    ema = optimizer.ema
    ema.num_updates = 10
    optimizer.step()
    assert ema.num_updates == 11
    state = ema.state_dict()
    ema.register()
    assert ema.num_updates == 0
    optimizer.step()
    assert ema.num_updates == 1
    ema.load_state_dict(state)
    assert ema.num_updates == 11


def test_counts_of_host_and_device_add_up(device):
    optimizer = counted(device, steps=2)
    for group in optimizer.param_groups:
        group["capturable"] = False
    optimizer.step()
    ema, optimizer.ema = optimizer.ema, None
    ema.update()
    assert ema.num_updates == 4
    other = SGD(all_params(optimizer), lr=0.1, ema=ema, capturable=True)
    other.step()
    assert ema.num_updates == 5


def test_once_a_device_counts_the_host_keeps_its_part(device):
    """Which captured graphs have as a number."""
    counter = Counter("a counter", 3)
    counter.on(device)  # made, and not used yet
    counter.next()()
    counter.set(5)
    count = counter.counted_on(device)
    assert (int(count), int(counter)) == (0, 5)
    count += 2  # as replays do
    counter.next()()
    assert (int(count), int(counter)) == (3, 8)
    for value in (100, 0):
        counter.set(value)
        assert (int(count), int(counter)) == (value - 5, value)
    assert counter.counted_on(device) is counter.on(device) is count


def test_a_count_follows_to_another_home():
    home, other = (torch.device(name) for name in ("cpu", "meta"))
    counter = Counter("a counter", 3)
    counter.counted_on(home)
    counter.next()()
    counter.move_to(home)
    assert counter.counts_on == home
    counter.move_to(other)
    assert counter.counts_on is None
    assert (counter.on_host, int(counter), int(counter.on(home))) == (4, 4, 0)


def test_steps_that_round_stochastically_go_on_counting_where_the_device_does(device):
    optimizer = build(device, BF16, stochastic_rounding=True, capturable=True)
    for capturable in (True, False, False):
        for group in optimizer.param_groups:
            group["capturable"] = capturable
        set_gradients(all_params(optimizer), seed=0)
        optimizer.step()
    assert [group["rounding_steps"] for group in optimizer.param_groups] == [0, 0]
    assert [g["rounding_steps"] for g in optimizer.state_dict()["param_groups"]] == [3, 3]
    assert optimizer.ema.num_steps == 3


# --- what a capture finds missing ----------------------------------------------------------------


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Says whether a graph is being captured, to all who ask."""

    def pretend(value: bool) -> None:
        for module in (fused_opt._counter, fused_opt._plan, fused_opt.sgd, fused_opt.ema):
            monkeypatch.setattr(module, "is_capturing", lambda _: value)

    return pretend


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "momentum_buffers of parameter 0 in group 0"),
        ({"momentum": 0.0, "master_weights": "split"}, "refinements of parameter 0 in group 0"),
        ({"formulation": "sutskever"}, "momentum_buffers of parameter 0 in group 0"),
    ],
)
def test_a_capture_without_state_raises_and_changes_nothing(options, word, capturing):
    optimizer = build("cpu", BF16, **options)
    set_gradients(all_params(optimizer), seed=0)
    before = [t.detach().clone() for t in everything(optimizer)]
    versions = [p._version for p in all_params(optimizer)]
    capturing(True)
    with pytest.raises(RuntimeError, match=f"{word}.*capturable=True"):
        optimizer.step()
    assert_all_same_bits(everything(optimizer), before)
    assert [p._version for p in all_params(optimizer)] == versions
    assert not optimizer.state
    assert optimizer.ema.num_updates == 0
    capturing(False)
    optimizer.step()
    capturing(True)
    optimizer.step()  # what a step has made is found


def test_a_capture_that_rounds_stochastically_wants_to_be_capturable(capturing):
    optimizer = build("cpu", BF16, stochastic_rounding=True)
    set_gradients(all_params(optimizer), seed=0)
    optimizer.step()
    before = [t.detach().clone() for t in everything(optimizer)]
    capturing(True)
    with pytest.raises(RuntimeError, match=r"stochastic_rounding.*capturable=True"):
        optimizer.step()
    assert_all_same_bits(everything(optimizer), before)
    assert optimizer.ema.num_updates == 1
    capturing(False)
    optimizer = build("cpu", BF16, stochastic_rounding=True, capturable=True)
    set_gradients(all_params(optimizer), seed=0)
    capturing(True)
    optimizer.step()


def test_a_capture_of_the_functional_form_wants_its_buffers(capturing):
    params, grads = ([random_tensor((3,), seed=i)] for i in range(2))
    before = params[0].clone()
    capturing(True)
    with pytest.raises(RuntimeError, match=r"momentum_buffers\[0\].*captured"):
        sgd_step_(params, grads, [None], lr=0.1, momentum=0.9)
    assert_same_bits(params[0], before)
    sgd_step_(params, grads, [torch.zeros(3)], lr=0.1, momentum=0.9)
    sgd_step_(params, grads, None, lr=0.1)


def test_a_capture_with_state_of_another_form_raises(capturing):
    optimizer = build("cpu", capturable=True)
    optimizer.param_groups[1]["formulation"] = "sutskever"
    set_gradients(all_params(optimizer), seed=0)
    capturing(True)
    with pytest.raises(RuntimeError, match="momentum_buffers of parameter 0 in group 1"):
        optimizer.step()


def test_a_capturable_optimizer_lacks_nothing(capturing):
    capturing(True)
    with pytest.raises(RuntimeError, match=r"rounding_steps.*capturable=True"):
        build("cpu", capturable=True)  # made too late
    capturing(False)
    optimizer = build("cpu", capturable=True)
    set_gradients(all_params(optimizer), seed=0)
    capturing(True)
    optimizer.step()
    assert optimizer.ema.num_updates == 1


def test_an_ema_that_is_attached_later_is_prepared(capturing):
    optimizer = build("cpu", capturable=True)
    optimizer.ema = None
    optimizer.ema = EMA(all_params(optimizer))
    set_gradients(all_params(optimizer), seed=0)
    capturing(True)
    optimizer.step()
    assert optimizer.ema.num_updates == 1


def test_momentum_of_another_formulation_is_converted_when_it_is_loaded(capturing):
    params, twins = (make_params([(17,)]) for _ in range(2))
    torchs = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    ours = SGD(twins, lr=0.1, momentum=0.9, formulation="sutskever", capturable=True)
    for step in range(4):
        set_gradients(params, seed=step)
        set_gradients(twins, seed=step)
        torchs.step()
        if step == 1:
            ours.load_state_dict(torchs.state_dict())
            twins[0].data.copy_(params[0])
            capturing(True)
        if step > 1:
            ours.step()
    torch.testing.assert_close(twins[0], params[0], rtol=1e-6, atol=1e-7)


def test_parameters_on_the_cpu_are_refused_in_a_capture(monkeypatch):
    optimizer = build("cpu", capturable=True)
    set_gradients(all_params(optimizer), seed=0)
    before = [t.detach().clone() for t in everything(optimizer)]
    versions = [p._version for p in all_params(optimizer)]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for call in (optimizer.step, EMA(make_params([(3,)])).update):
        with pytest.raises(RuntimeError, match="expected all parameters on CUDA"):
            call()
    assert_all_same_bits(everything(optimizer), before)
    assert [p._version for p in all_params(optimizer)] == versions
    assert optimizer.ema.num_updates == 0


def test_a_checkpoint_that_cannot_be_prepared_is_refused_and_nothing_changes():
    source = SGD(make_params([(3,)], BF16), lr=0.5, master_weights="split", capturable=True)
    optimizer = SGD(make_params([(3,)], torch.float16), lr=0.1)
    with pytest.raises(ValueError, match=r"params of parameter 0 in group 0.*bfloat16"):
        optimizer.load_state_dict(source.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not optimizer.state


def test_a_constructor_that_raises_leaves_the_average_free():
    params = make_params([(4,)], torch.float16)
    ema = EMA(params)
    options = {"lr": 0.1, "momentum": 0.9, "ema": ema, "capturable": True}
    with pytest.raises(ValueError, match="split") as raised:
        SGD(params, **options, master_weights="split")
    assert raised.tb is not None  # which keeps the optimizer that there is not alive
    assert ema.optimizer is None
    optimizer = SGD(params, **options, master_weights="fp32")
    assert ema.optimizer is optimizer


# --- on CUDA -------------------------------------------------------------------------------------

cuda = pytest.mark.cuda


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@cuda
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "master"), MASTERS)
def test_the_first_step_may_be_captured(dtype, master, options):
    options = {**options, "master_weights": master}
    optimizer = build("cuda", dtype, capturable=True, **options)
    twin = build("cpu", dtype, **options)
    set_gradients(all_params(optimizer), seed=0)
    graph = captured(optimizer.step)
    for step in range(4):
        set_gradients(all_params(optimizer), step)
        set_gradients(all_params(twin), step)
        graph.replay()
        twin.step()
        if "max_grad_norm" in options:
            assert_same_bits(optimizer.grad_norm, twin.grad_norm)
    assert_all_same_bits(everything(optimizer), everything(twin))
    assert optimizer.ema.num_updates == 4
    optimizer.step()  # eager steps go on counting
    assert optimizer.ema.num_updates == 5


@cuda
def test_a_replayed_step_reads_every_hyper_parameter():
    numbers = {
        "lr": (0.1, 0.05, 0.3, 0.0),
        "momentum": (0.9, 0.5, 0.25, 0.99),
        "weight_decay": (0.1, 0.0, 0.01, 0.3),
        "max_grad_norm": (0.5, 1.0, 1e-3, 1e9),
        "decay": (0.9, 0.0, 0.25, 1.0),
        "grad_scale": (1024.0, 3.0, 1.0, 65536.0),
    }
    tensors = {name: torch.tensor(v[0], device="cuda") for name, v in numbers.items()}
    twins = {name: torch.tensor(v[0]) for name, v in numbers.items()}

    def start(values: dict[str, Tensor], device: str) -> SGD:
        options = {name: v for name, v in values.items() if name not in ("grad_scale", "lr")}
        optimizer = build(device, capturable=True, **options)
        for group in optimizer.param_groups:
            group["lr"] = values["lr"]
        optimizer.grad_scale = values["grad_scale"]
        return optimizer

    optimizer, twin = start(tensors, "cuda"), start(twins, "cpu")
    set_gradients(all_params(optimizer), seed=0)
    graph = captured(optimizer.step)
    for step in range(4):
        for name, values in numbers.items():
            tensors[name].fill_(values[step])
            twins[name].fill_(values[step])
        set_gradients(all_params(optimizer), step)
        set_gradients(all_params(twin), step)
        graph.replay()
        twin.step()
        assert_all_same_bits(everything(optimizer), everything(twin))


@cuda
@pytest.mark.parametrize("make", [torch.amp.GradScaler, fused_opt.GradScaler])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_a_scalers_step_is_captured_and_replayed(max_norm, make):
    """Overflow at the first step and later; scale, skipping and counting stay on the device."""
    spoiled = [INF, None, None, NAN, None, None]
    options = {"max_grad_norm": max_norm, "reset_grads": True}
    optimizer = build("cuda", capturable=True, **options)
    twin = build("cpu", **options)
    scaler, twin_scaler = (make(d, init_scale=1024.0, growth_interval=2) for d in ("cuda", "cpu"))
    one = torch.ones((), device="cuda")
    scaled = scaler.scale(one).clone()

    def step() -> None:
        scaled.copy_(scaler.scale(one))
        for p in all_params(optimizer):
            p.grad.mul_(scaled)
        scaler.step(optimizer)
        scaler.update()

    set_gradients(all_params(optimizer), seed=0)
    graph = captured(step)
    for i, spoil in enumerate(spoiled):
        set_gradients(all_params(optimizer), i)
        set_gradients(all_params(twin), i)
        if spoil is not None:
            all_params(optimizer)[1].grad[0] = spoil
            all_params(twin)[1].grad[0] = spoil
        graph.replay()
        scale = twin_scaler.scale(torch.ones(()))
        for p in all_params(twin):
            p.grad.mul_(scale)
        twin_scaler.step(twin)
        twin_scaler.update()
        assert scaler.get_scale() == twin_scaler.get_scale()
        assert_all_same_bits(all_params(optimizer), all_params(twin))
        assert not any(p.grad.any() for p in all_params(optimizer))
    assert_all_same_bits(everything(optimizer), everything(twin))
    assert optimizer.ema.num_updates == 4


@cuda
@pytest.mark.parametrize("warm", [False, True])
def test_an_average_counts_its_replayed_updates(warm):
    params = make_params(SHAPES, device="cuda")
    ema = EMA(params, decay=0.5)
    if not warm:
        with pytest.raises(RuntimeError, match="num_updates"):
            captured(ema.update)
        return
    ema.update()
    graph = captured(ema.update)
    for _ in range(3):
        graph.replay()
    assert ema.num_updates == 4


SCHEDULED: dict[str, Any] = {
    "decay": [schedules.tf_warmup(0.999), schedules.inverse_power(0.99)],
    "update_every": 2,
    "update_after_step": 1,
}


def buffered(device: torch.device | str) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7)).to(device)


def change(model: torch.nn.Module, step: int) -> None:
    with torch.no_grad():
        for i, t in enumerate([*model.parameters(), *model.buffers()]):
            t.copy_(random_tensor(t.shape, F32, t.device, seed=100 * step + i).to(t.dtype))


CALLS = ["replay", "eager", "replay", "replay", "set", "replay", "eager", "register", "replay"]
CALLS += ["eager", "replay", "load", "replay", "eager", "replay"]


@cuda
def test_replays_go_on_from_whatever_has_counted_in_between():
    """Eager updates, and counts that are set, loaded or started over."""
    model, twin = buffered("cuda"), buffered("cpu")
    ema, other = EMA(model, **SCHEDULED), EMA(twin, **SCHEDULED)
    for each in (ema, other):
        each.update()
        each.update()
    graph = captured(ema.update)
    state = copy.deepcopy(ema.state_dict())
    for step, call in enumerate(CALLS):
        change(model, step)
        change(twin, step)
        for each, replay in ((ema, graph.replay), (other, other.update)):
            if call == "set":
                each.num_steps = 11
            elif call == "register":
                each.register()
            elif call == "load":
                each.load_state_dict(state)
            else:
                (replay if call == "replay" else each.update)()
        assert ema.num_steps == other.num_steps, call
        for a, b in zip(ema._kept.tensors, other._kept.tensors, strict=True):
            assert_same_bits(a, b, f"call {step}, {call}")


@cuda
@pytest.mark.parametrize("capturable", [True, False])
def test_steps_between_replays_round_and_average_by_the_same_count(capturable):
    options = {"decay": SCHEDULED["decay"][0], "lr": 1e-3}
    optimizer, twin = (
        build(d, BF16, stochastic_rounding=True, capturable=True, **options)
        for d in ("cuda", "cpu")
    )
    set_gradients(all_params(optimizer), seed=0)
    graph = captured(optimizer.step)
    for group in optimizer.param_groups:
        group["capturable"] = capturable
    for step in range(8):
        for each in (optimizer, twin):
            set_gradients(all_params(each), step)
        (graph.replay if step % 3 else optimizer.step)()
        twin.step()
        assert_all_same_bits(everything(optimizer), everything(twin))
    assert optimizer.ema.num_steps == 8
    assert optimizer.state_dict()["param_groups"][0]["rounding_steps"] == 8


@cuda
def test_a_capture_of_a_cold_optimizer_raises_and_changes_nothing():
    optimizer = build("cuda")
    set_gradients(all_params(optimizer), seed=0)
    before = [t.detach().clone() for t in everything(optimizer)]
    with pytest.raises(RuntimeError, match="momentum_buffers of parameter 0 in group 0"):
        captured(optimizer.step)
    torch.cuda.synchronize()
    assert_all_same_bits(everything(optimizer), before)
    assert not optimizer.state


@cuda
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_a_step_under_a_scaler_never_waits_for_the_device(max_norm, capturable, first):
    optimizer = build("cuda", capturable=capturable, max_grad_norm=max_norm)
    tensors = [torch.tensor(0.9, device="cuda") for _ in range(2)]
    for group in optimizer.param_groups:
        group["lr"], group["momentum"] = tensors
    scaler = fused_opt.GradScaler("cuda", init_scale=8.0)
    scaler.scale(torch.ones((), device="cuda"))
    set_gradients(all_params(optimizer), seed=0)
    if not first:
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scaler.step(optimizer)
        scaler.update()
        optimizer.found_inf = torch.ones((), device="cuda")
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.ema.num_updates == (1 if first else 2)


@cuda
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_capturable_step_allocates_nothing_from_the_first_on(options):
    lr = torch.tensor(0.1, device="cuda")
    optimizer = build("cuda", capturable=True, **options)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.found_inf = torch.zeros((), device="cuda")
    set_gradients(all_params(optimizer), seed=0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    optimizer.step()
    optimizer.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@cuda
def test_a_graph_outlives_steps_that_need_more_memory():
    """A group is added, with more gradients than before; the graph goes on with its own memory."""
    optimizer = build("cuda", max_grad_norm=0.5, capturable=True)
    twin = build("cpu", max_grad_norm=0.5)
    params = all_params(optimizer)
    set_gradients(params, seed=0)
    graph = captured(optimizer.step)
    late = [torch.nn.Parameter(random_tensor((400_000,), device="cuda")) for _ in range(9)]
    for p in late:
        optimizer.add_param_group({"params": [p], "capturable": True})
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.cuda.synchronize()
    junk = [torch.full((n,), NAN, device="cuda") for n in range(1, 4000, 7)]
    for step in range(2):
        set_gradients(all_params(twin), seed=step)
        twin.step()
    set_gradients(params, seed=1)
    graph.replay()
    assert_all_same_bits(params, all_params(twin))
    assert all(t.isnan().all() for t in junk)


@cuda
@pytest.mark.parametrize("count", [1, 18, 19, 40])
def test_many_groups_read_their_own_numbers(count):
    """More groups than a launch of the kernel of hyper-parameters carries."""

    def start(device: str) -> SGD:
        params = make_params([(1 + i,) for i in range(count)], device=device)
        rates = [torch.tensor(0.1 / (1 + i), device=device, dtype=F64) for i in range(count)]
        groups = [{"params": [p], "lr": r} for p, r in zip(params, rates, strict=True)]
        return SGD(groups, lr=0.1, momentum=0.9, ema=EMA(params, decay=0.5), capturable=True)

    optimizer, twin = start("cuda"), start("cpu")
    for step in range(2):
        for each in (optimizer, twin):
            set_gradients(all_params(each), step)
            each.step()
    assert_all_same_bits(everything(optimizer), everything(twin))
    assert optimizer.ema.num_updates == 2


@cuda
def test_two_devices_share_numbers_and_a_verdict():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    params = [
        torch.nn.Parameter(random_tensor((100 + i,), device=f"cuda:{i % 2}")) for i in range(4)
    ]
    twins = [torch.nn.Parameter(p.detach().cpu().clone()) for p in params]
    lr = torch.tensor(0.1, device="cuda:1")
    optimizer = SGD(params, lr=lr, momentum=0.9, max_grad_norm=0.5, ema=EMA(params, decay=0.5))
    twin = SGD(twins, lr=float(lr), momentum=0.9, max_grad_norm=0.5, ema=EMA(twins, decay=0.5))
    for step, found in enumerate((0.0, 1.0, 0.0)):
        for each, device in ((optimizer, "cuda:0"), (twin, "cpu")):
            set_gradients(all_params(each), step)
            each.found_inf = torch.tensor(found, device=device)
            each.step()
    for a, b in zip(params, twins, strict=True):
        torch.testing.assert_close(a.cpu(), b)
    assert optimizer.ema.num_updates == 2


@cuda
def test_plain_numbers_launch_nothing_more():
    optimizer = build("cuda")
    set_gradients(all_params(optimizer), seed=0)
    optimizer.step()
    for tensors, kernels in ((False, 0), (True, 1)):
        if tensors:
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(0.1, device="cuda")
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            optimizer.step()
            torch.cuda.synchronize()
        names = [e.name for e in profile.events() if "_kernel" in e.name]
        if not names:
            pytest.skip("the profiler sees no kernels on this machine")
        assert sum("hyper_kernel" in name for name in names) == kernels
        assert sum("step_kernel" in name for name in names) == 1
