"""`fused_opt.higher`: inner loops against the same loops written by hand in torch."""

from __future__ import annotations

import copy
import gc
import io
import operator
import pickle
import time
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import fused_opt
import fused_opt.higher as higher

#: Agreement to the rounding of fp64 over ten steps; both sides round at each operation.
EXACT = {"rtol": 1e-11, "atol": 1e-13}

OPTIMIZERS = [torch.optim.SGD, fused_opt.SGD]


# --- The toy, whose numbers were computed with higher 0.2.1


class Toy:
    """Learns the slope of y = 3.5 x in five steps; the meta-loss is the error of the slope."""

    def __init__(self) -> None:
        np.random.seed(1)
        torch.manual_seed(3)
        self.x = torch.from_numpy(np.random.random((100, 1)))
        self.model = nn.Linear(1, 1, bias=False).double()
        self.opt = torch.optim.SGD(self.model.parameters(), lr=0.3, momentum=0.5)

    def meta_loss(self, hypers: dict[str, Tensor], **options: Any) -> Tensor:
        with higher.innerloop_ctx(self.model, self.opt, override=hypers, **options) as (f, diffopt):
            for _ in range(5):
                diffopt.step(((f(self.x) - 3.5 * self.x) ** 2).mean())
            (weight,) = f.parameters()
            return ((weight - 3.5) ** 2).sum()


def toy_hypers() -> dict[str, Tensor]:
    return {
        "lr": torch.tensor([0.3], requires_grad=True),
        "momentum": torch.tensor([0.5], requires_grad=True),
    }


@pytest.mark.parametrize("wrapped", [False, True])
def test_toy_has_the_numbers_of_higher(wrapped):
    toy, hypers = Toy(), toy_hypers()
    loss = toy.meta_loss({k: [v] for k, v in hypers.items()} if wrapped else hypers)
    loss.backward()
    assert abs(float(loss.detach()) - 0.011927987982895929) < 1e-15
    assert abs(float(hypers["lr"].grad) + 1.6294974) < 1e-6
    assert abs(float(hypers["momentum"].grad) + 0.9496140) < 1e-6
    assert hypers["lr"].grad.dtype == torch.float32
    assert hypers["lr"].grad.shape == (1,)
    assert toy.model.weight.grad is None


def test_toy_reaches_the_initial_weight_where_that_is_not_copied():
    toy = Toy()
    toy.meta_loss(toy_hypers(), copy_initial_weights=False).backward()
    assert abs(float(toy.model.weight.grad) + 0.0053113925) < 1e-9


@pytest.mark.parametrize("name", ["lr", "momentum", "weight"])
def test_toy_agrees_with_three_runs(name):
    def run(change: float) -> tuple[float, float]:
        toy = Toy()
        hypers = {
            "lr": torch.tensor(0.3, dtype=torch.float64),
            "momentum": torch.tensor(0.5, dtype=torch.float64),
        }
        moved = toy.model.weight if name == "weight" else hypers[name]
        moved.data += change
        moved.requires_grad_()
        loss = toy.meta_loss(hypers, copy_initial_weights=False)
        (grad,) = torch.autograd.grad(loss, moved)
        return float(loss.detach()), float(grad)

    step = 1e-5
    slope = (run(step)[0] - run(-step)[0]) / (2 * step)
    assert run(0.0)[1] == pytest.approx(slope, rel=1e-4)


# --- Ten steps against torch, written by hand


class Tied(nn.Module):
    """Its first and last layer share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 5)
        self.decoder = nn.Linear(5, 5, bias=False)
        self.decoder.weight = self.encoder.weight
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.decoder(torch.tanh(self.encoder(x))))


class Switching(nn.Module):
    """Uses its second layer on every third call only, from the first on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.head = nn.Linear(5, 2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        self.calls += 1
        if self.calls % 3 == 1:
            hidden = hidden + torch.tanh(self.second(x))
        return self.head(hidden)


class Convolutional(nn.Module):
    """A net with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3)
        self.head = nn.Linear(48, 2)

    def forward(self, x: Tensor) -> Tensor:
        images = F.pad(x, (0, 20)).reshape(-1, 1, 5, 5)
        return self.head(torch.tanh(self.norm(self.conv(images))).flatten(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "batchnorm": Convolutional,
    "tied": Tied,
    "unused": Switching,
}


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().double()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    double = {"dtype": torch.float64}
    return [(torch.randn(6, 5, **double), torch.randn(6, 2, **double)) for _ in range(count)]


def error(output: Tensor, target: Tensor) -> Tensor:
    return ((output - target) ** 2).mean()


HYPERS = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.01, "dampening": 0.3}


def hyper_tensors(**changes: float) -> dict[str, Tensor]:
    values = {**HYPERS, **changes}
    return {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in values.items()}


class ByHand:
    """The same inner loop from torch's own operations alone."""

    def __init__(self, model: nn.Module, hypers: dict[str, Any], **flags: bool) -> None:
        self.model = model
        self.names = [name for name, _ in self.model.named_parameters()]
        self.initial = [p.detach().clone().requires_grad_() for p in self.model.parameters()]
        self.params = list(self.initial)
        self.buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        self.momentum: list[Tensor | None] = [None] * len(self.params)
        self.hypers, self.flags = hypers, flags

    def __call__(self, x: Tensor) -> Tensor:
        weights = dict(zip(self.names, self.params, strict=True))
        self.buffers = {name: b.clone() for name, b in self.buffers.items()}
        return functional_call(self.model, {**weights, **self.buffers}, (x,))

    def step(self, loss: Tensor, first_order: bool = False) -> None:
        h = self.hypers
        grads = torch.autograd.grad(
            loss, self.params, create_graph=not first_order, allow_unused=True
        )
        for i, (p, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is None:
                continue
            d = -g if self.flags.get("maximize") else g
            d = d + h["weight_decay"] * p
            v = self.momentum[i]
            v = d if v is None else h["momentum"] * v + (1 - h["dampening"]) * d
            self.momentum[i] = v
            u = d + h["momentum"] * v if self.flags.get("nesterov") else v
            self.params[i] = p - h["lr"] * u

    def cut(self) -> None:
        self.params = [p.detach().requires_grad_() for p in self.params]
        self.momentum = [None if v is None else v.detach() for v in self.momentum]


def assert_same(found: list[Any], expected: list[Any]) -> None:
    for f, e in zip(found, expected, strict=True):
        if e is None:
            assert f is None
        else:
            torch.testing.assert_close(f, e, **EXACT)


def gradients(loss: Tensor, of: list[Tensor]) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, of, allow_unused=True, retain_graph=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "flags", [{}, {"maximize": True}, {"nesterov": True}], ids=["plain", "maximize", "nesterov"]
)
def test_ten_steps_agree_with_torch(name, flags):
    model, data = made(MODELS[name]), batches(11)
    changes = {"dampening": 0.0} if flags.get("nesterov") else {}
    if flags.get("maximize"):
        changes["lr"] = 0.01
    ours, theirs = hyper_tensors(**changes), hyper_tensors(**changes)
    by_hand = ByHand(model, theirs, **flags)
    before = copy.deepcopy(model.state_dict())
    opt = fused_opt.SGD(model.parameters(), lr=1.0, **flags, momentum=0.5)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, override=ours) as (f, d):
        for x, y in data[:10]:
            d.step(error(f(x), y))
            by_hand.step(error(by_hand(x), y))
        assert_same(list(f.parameters()), by_hand.params)
        loss, expected = (
            error(f(data[10][0]), data[10][1]),
            error(by_hand(data[10][0]), data[10][1]),
        )
    assert_same([loss], [expected])
    of = [*ours.values(), *model.parameters()]
    assert_same(gradients(loss, of), gradients(expected, [*theirs.values(), *by_hand.initial]))
    assert_same(list(f.buffers()), list(by_hand.buffers.values()))
    assert_same(list(model.state_dict().values()), list(before.values()))


def test_unused_parameter_and_its_momentum_are_the_same_objects():
    model, ((x, y), *_) = made(Switching), batches(1)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with higher.innerloop_ctx(model, opt) as (f, d):
        d.step(error(f(x), y))
        weight, momentum = f.second.weight, d.state[0][2]["momentum_buffer"]
        d.step(error(f(x), y))
        assert f.second.weight is weight
        assert d.state[0][2]["momentum_buffer"] is momentum
        assert f.first.weight.grad_fn is not None


def test_param_groups_have_their_own_options_in_any_order():
    model, data = made(lambda: nn.Sequential(mlp(), nn.Tanh(), nn.Linear(2, 2))), batches(4)
    first, second = list(model[0].parameters()), [model[2].bias, model[2].weight]
    lr = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.1, 0.3)]
    groups = [
        {"params": second, "momentum": 0.5},
        {"params": first[1:3], "nesterov": True, "momentum": 0.9},
    ]
    opt = fused_opt.SGD(groups, lr=0.1, momentum=0.0)
    with higher.innerloop_ctx(model, opt, override={"lr": lr}) as (f, d):
        initial = f.init_fast_params
        for x, y in data[:3]:
            d.step(error(f(x), y))
        loss = error(f(data[3][0]), data[3][1])
        found = list(f.parameters())
        rest = gradients(loss, [*lr, *initial])

    names = [name for name, _ in model.named_parameters()]
    params = [p.detach().clone().requires_grad_() for p in model.parameters()]
    start = list(params)
    hypers = {4: (0, 0.5, False), 5: (0, 0.5, False), 1: (1, 0.9, True), 2: (1, 0.9, True)}
    momentum: dict[int, Tensor] = {}
    for x, y in data[:3]:
        out = functional_call(model, dict(zip(names, params, strict=True)), (x,))
        grads = torch.autograd.grad(error(out, y), params, create_graph=True)
        for i, (group, mu, nesterov) in hypers.items():
            momentum[i] = grads[i] if i not in momentum else mu * momentum[i] + grads[i]
            update = grads[i] + mu * momentum[i] if nesterov else momentum[i]
            params[i] = params[i] - lr[group] * update
    assert_same(found, params)
    assert found[0] is initial[0]  # in no group
    out = functional_call(model, dict(zip(names, params, strict=True)), (data[3][0],))
    assert_same(rest, gradients(error(out, data[3][1]), [*lr, *start]))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("formulation", ["torch", "sutskever"])
@pytest.mark.parametrize("maximize", [False, True])
def test_steps_are_those_of_the_optimizer(formulation, decoupled, nesterov, maximize):
    model, data = made(mlp), batches(6)
    twin = copy.deepcopy(model)
    options: dict[str, Any] = {
        "lr": 0.05,
        "momentum": 0.9,
        "weight_decay": 0.1,
        "nesterov": nesterov,
        "maximize": maximize,
        "formulation": formulation,
        "decoupled_weight_decay": decoupled,
    }
    opt, real = (fused_opt.SGD(each.parameters(), **options) for each in (model, twin))
    for each, its in ((model, opt), (twin, real)):  # momentum from two steps, as they run on
        for x, y in data[:2]:
            its.zero_grad()
            error(each(x), y).backward()
            its.step()
    with higher.innerloop_ctx(model, opt) as (f, d):
        for x, y in data[2:]:
            d.step(error(f(x), y))
            real.zero_grad()
            error(twin(x), y).backward()
            real.step()
            assert_same(list(f.parameters()), list(twin.parameters()))
    for name in ("lr", "weight_decay"):
        hyper = torch.tensor(options[name], dtype=torch.float64, requires_grad=True)

        def run(value: Tensor, name: str = name) -> Tensor:
            with higher.innerloop_ctx(model, opt, override={name: value}) as (f, d):
                for x, y in data[:3]:
                    d.step(error(f(x), y))
                return error(f(data[5][0]), data[5][1])

        assert torch.autograd.gradcheck(run, (hyper,))


def test_steps_of_the_optimizer_do_not_reach_the_inner_loop():
    model, data = made(mlp), batches(2)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    error(model(data[0][0]), data[0][1]).backward()
    opt.step()
    f, d = higher.monkeypatch(model), higher.get_diff_optim(opt, model.parameters())
    momentum = copy.deepcopy(opt.state_dict())["state"][0]["momentum_buffer"]
    opt.step()
    assert_same([d.state[0][0]["momentum_buffer"]], [momentum])
    assert not torch.equal(f[0].weight, model[0].weight)


def test_momentum_of_the_other_formulation_is_converted():
    model, ((x, y), *_) = made(mlp), batches(1)
    opt = fused_opt.SGD(model.parameters(), lr=0.1, momentum=0.9)
    error(model(x), y).backward()
    opt.step()
    twin = copy.deepcopy(model)
    opt.param_groups[0]["formulation"] = "sutskever"
    with higher.innerloop_ctx(model, opt) as (f, d):
        d.step(error(f(x), y))
        opt.zero_grad()
        error(model(x), y).backward()
        opt.step()
        assert_same(list(f.parameters()), list(model.parameters()))
    assert not torch.equal(model[0].weight, twin[0].weight)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_dict_goes_back_into_the_optimizer(kind):
    model, data = made(mlp), batches(3)
    params = list(model.parameters())
    opt = kind([{"params": params[:1], "lr": 0.3}, {"params": params[1:]}], lr=0.1, momentum=0.9)
    with higher.innerloop_ctx(model, opt) as (f, d):
        for x, y in data[:2]:
            d.step(error(f(x), y))
        f.copy_to(model)
        opt.load_state_dict(d.state_dict())
        d.step(error(f(data[2][0]), data[2][1]))
    error(model(data[2][0]), data[2][1]).backward()
    opt.step()
    assert_same(list(f.parameters()), list(model.parameters()))
    assert not any(v.requires_grad for s in d.state_dict()["state"].values() for v in s.values())


def test_state_dict_is_no_part_of_later_steps():
    model, data = made(mlp), batches(4)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"track_higher_grads": False, "keep_history": False}
    with higher.innerloop_ctx(model, opt, **options) as (f, d):
        d.step(error(f(data[0][0]), data[0][1]))
        saved = d.state_dict()
        expected = copy.deepcopy(saved["state"])
        for x, y in data[1:]:
            d.step(error(f(x), y))
    for number, state in expected.items():
        assert torch.equal(saved["state"][number]["momentum_buffer"], state["momentum_buffer"])


def test_zero_tensors_have_their_gradients():
    model, data = made(mlp), batches(4)
    hypers = hyper_tensors(momentum=0.0, weight_decay=0.0, dampening=0.0)

    def run(*values: Tensor) -> Tensor:
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        override = dict(zip(hypers, values, strict=True))
        with higher.innerloop_ctx(model, opt, override=override) as (f, d):
            for x, y in data[:3]:
                d.step(error(f(x), y))
            return error(f(data[3][0]), data[3][1])

    assert all(float(g) != 0 for g in gradients(run(*hypers.values()), list(hypers.values()))[:3])
    assert torch.autograd.gradcheck(run, tuple(hypers.values()))


def test_tensors_of_the_optimizer_itself_get_gradients():
    model, ((x, y), *_) = made(mlp), batches(1)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=lr)) as (f, d):
        d.step(error(f(x), y))
        error(f(x), y).backward()
    assert lr.grad is not None
    assert float(lr.grad) < 0


# --- What derivatives reach


def inner_loop(steps: int, by_hand: ByHand | None = None, **options: Any) -> tuple[Any, ...]:
    """Runs so many steps; returns meta-loss, hyper-parameters, fmodel, diffopt and the model."""
    model, data = made(mlp), batches(steps + 1)
    hypers = hyper_tensors()
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    options = {"copy_initial_weights": False, **options}
    with higher.innerloop_ctx(model, opt, override=hypers, **options) as (f, d):
        for x, y in data[:steps]:
            d.step(error(f(x), y))
        loss = error(f(data[steps][0]), data[steps][1])
    return loss, hypers, f, d, model


def by_hand_loop(steps: int, truncate: int | None = None, first_order: bool = False) -> Any:
    model, data, hypers = made(mlp), batches(steps + 1), hyper_tensors()
    loop = ByHand(model, hypers)
    for i, (x, y) in enumerate(data[:steps]):
        if truncate and i and i % truncate == 0:
            loop.cut()
        loop.step(error(loop(x), y), first_order)
    return error(loop(data[steps][0]), data[steps][1]), hypers, loop.initial


@pytest.mark.parametrize("steps", [1, 4, 6, 7])
@pytest.mark.parametrize("truncate", [1, 2, 3, 10])
def test_truncate_starts_from_constants(steps, truncate):
    loss, hypers, *_, model = inner_loop(steps, truncate=truncate)
    expected, their_hypers, initial = by_hand_loop(steps, truncate=truncate)
    assert_same([loss], [expected])
    assert_same(
        gradients(loss, [*hypers.values(), *model.parameters()]),
        gradients(expected, [*their_hypers.values(), *initial]),
    )


def test_truncate_frees_earlier_steps():
    *_, f, _, _ = inner_loop(5, truncate=2)
    assert [f.parameters(time=t).__next__().grad_fn is None for t in range(6)] == [
        *(True, True, True, True, True),
        False,
    ]


def test_truncate_leaves_losses_between_steps_alone():
    """After two steps the meta-loss reaches both, and its backward pass frees their graph."""
    model, data, lr = made(mlp), batches(4), torch.tensor(0.1, requires_grad=True)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    grads = []
    with higher.innerloop_ctx(model, opt, override={"lr": lr}, truncate=2) as (f, d):
        for i, (x, y) in enumerate(data):
            d.step(error(f(x), y))
            if i % 2:
                grads += torch.autograd.grad(error(f(x), y), lr)
    assert all(float(g) != 0 for g in grads)


def test_losses_of_tracked_steps_are_there_for_the_meta_loss():
    model, data = made(mlp), batches(4)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"copy_initial_weights": False, "truncate": 2}
    with higher.innerloop_ctx(model, opt, **options) as (f, d):
        losses = [error(f(x), y) for x, y in data[:1]]
        for x, y in data:
            losses.append(error(f(x), y))
            d.step(losses[-1])
        sum(losses).backward()
    assert model[0].weight.grad is not None


def test_first_order_has_the_gradients_of_fomaml():
    loss, hypers, *_, model = inner_loop(4, first_order=True)
    expected, their_hypers, initial = by_hand_loop(4, first_order=True)
    found = gradients(loss, [*hypers.values(), *model.parameters()])
    assert_same(found, gradients(expected, [*their_hypers.values(), *initial]))
    assert all(g is not None for g in found)


def test_first_order_without_decay_is_the_gradient_at_the_end():
    """(Finn et al., 2017): what the meta-loss says at the adapted weights, for the initial ones."""
    model, data = made(mlp), batches(4)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options = {"copy_initial_weights": False, "first_order": True}
    with higher.innerloop_ctx(model, opt, **options) as (f, d):
        for x, y in data[:3]:
            d.step(error(f(x), y))
        loss = error(f(data[3][0]), data[3][1])
    at_the_end = gradients(loss, list(f.parameters()))
    loss = error(f(data[3][0]), data[3][1])
    assert_same(gradients(loss, list(model.parameters())), at_the_end)


def test_test_mode_makes_leaves_with_the_same_weights():
    _, _, tracked, *_ = inner_loop(4)
    loss, hypers, f, d, model = inner_loop(4, track_higher_grads=False)
    assert_same(list(f.parameters()), list(tracked.parameters()))
    assert all(p.is_leaf and p.requires_grad for p in f.parameters())
    assert not any(s["momentum_buffer"].requires_grad for s in d.state[0].values())
    assert gradients(loss, [*hypers.values(), *model.parameters()]) == [None] * 8
    with pytest.raises(ValueError, match="time"):
        f.parameters(time=0)


def test_detach_cuts_weights_and_momentum():
    model, data = made(mlp), batches(4)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with higher.innerloop_ctx(model, opt, override={"lr": lr}) as (f, d):
        d.step(error(f(data[0][0]), data[0][1]))
        d.detach_()
        assert gradients(error(f(data[1][0]), data[1][1]), [lr]) == [None]
        assert all(p.is_leaf and p.requires_grad for p in f.parameters())
        d.step(error(f(data[1][0]), data[1][1]))
        assert gradients(error(f(data[2][0]), data[2][1]), [lr]) != [None]


def test_history_of_fast_weights():
    *_, f, _, model = inner_loop(3)
    assert_same(list(f.parameters(time=0)), list(model.parameters()))
    assert list(f.parameters()) == list(f.parameters(time=3)) == f.fast_params
    assert f.init_fast_params == list(f.parameters(time=0))
    assert len({id(next(f.parameters(time=t))) for t in range(4)}) == 4
    *_, f, _, model = inner_loop(3, keep_history=False)
    with pytest.raises(ValueError, match="keep_history"):
        f.parameters(time=0)
    with pytest.raises(ValueError, match="keep_history"):
        _ = f.init_fast_params


def tensors_alive() -> int:
    gc.collect()
    return sum(type(each) is Tensor for each in gc.get_objects())


@pytest.mark.parametrize(
    "options", [{"track_higher_grads": False}, {"truncate": 2, "keep_history": False}]
)
def test_memory_does_not_grow_without_history(options):
    model, data = made(mlp), batches(1)
    x, y = data[0]
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with higher.innerloop_ctx(model, opt, **options) as (f, d):
        counts = []
        for _ in range(12):
            d.step(error(f(x), y))
            counts.append(tensors_alive())
    assert counts[-1] == counts[-3] == counts[-5]


def test_test_mode_without_history_reuses_memory():
    model, data = made(mlp), batches(6)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options: dict[str, Any] = {"track_higher_grads": False, "keep_history": False}
    with higher.innerloop_ctx(model, opt, **options) as (f, d):
        places, states = [], []
        for x, y in data:
            d.step(error(f(x), y))
            places.append(f[0].weight.data_ptr())
            states.append(d.state[0][0]["momentum_buffer"].data_ptr())
    assert len(set(places)) == 2
    assert len(set(states)) == 2
    by_hand = ByHand(model, {**HYPERS, "momentum": 0.9, "dampening": 0, "weight_decay": 0})
    for x, y in data:
        by_hand.step(error(by_hand(x), y))
    assert_same(list(f.parameters()), by_hand.params)


def test_test_mode_with_history_leaves_earlier_weights_alone():
    model, data = made(mlp), batches(6)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with higher.innerloop_ctx(model, opt, track_higher_grads=False) as (f, d):
        kept = [d.step(error(f(x), y)) for x, y in data]
        values = [[p.detach().clone() for p in params] for params in kept]
        d.step(error(f(data[0][0]), data[0][1]))
    for params, expected in zip(kept, values, strict=True):
        assert_same(params, expected)
    assert len({p.data_ptr() for params in kept for p in params}) == 24


def test_unused_parameters_do_not_lend_their_memory():
    model, data = made(Switching), batches(8)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options: dict[str, Any] = {"track_higher_grads": False, "keep_history": False}
    by_hand = ByHand(
        made(Switching), {**HYPERS, "momentum": 0.9, "dampening": 0, "weight_decay": 0}
    )
    with higher.innerloop_ctx(model, opt, **options) as (f, d):
        for x, y in data:
            before = f.second.weight
            d.step(error(f(x), y))
            by_hand.step(error(by_hand(x), y))
            assert_same(list(f.parameters()), by_hand.params)
            assert (f.second.weight is before) is (f.calls % 3 != 1)
            spare = {t.data_ptr() for t in d._spare if t is not None}
            assert not spare & {p.data_ptr() for p in f.parameters()}


def test_reused_memory_is_never_what_the_user_gave():
    model, data = made(mlp), batches(6)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    options: dict[str, Any] = {"track_higher_grads": False, "keep_history": False}
    with higher.innerloop_ctx(model, opt, **options) as (f, d):
        for x, y in data[:2]:
            d.step(error(f(x), y))
        given = [p.detach().clone().requires_grad_() for p in f.parameters()]
        values = [p.detach().clone() for p in given]
        f.fast_params = given
        for x, y in data[2:]:
            d.step(error(f(x), y))
    assert_same(given, values)


def test_a_graph_of_overwritten_weights_raises():
    model, data = made(mlp), batches(4)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"track_higher_grads": False, "keep_history": False}
    with higher.innerloop_ctx(model, opt, **options) as (f, d):
        x, y = data[0]
        d.step(error(f(x), y))
        kept = error(f(x), y)
        for x, y in data[1:]:
            d.step(error(f(x), y))
        with pytest.raises(RuntimeError, match="inplace"):
            kept.backward()


def test_nothing_keeps_model_or_weights_alive():
    gc.collect()
    gc.disable()
    try:
        model, ((x, y), *_) = made(Convolutional), batches(1)
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with higher.innerloop_ctx(model, opt) as (f, d):
            d.step(error(f(x), y))
        alive = [
            weakref.ref(each) for each in (model, f, d, f.conv, model.conv, next(f.parameters()))
        ]
        del model, opt, f, d
        assert [ref() for ref in alive] == [None] * len(alive)
    finally:
        gc.enable()


# --- The model


def entered(model: nn.Module, **options: Any) -> Any:
    """The fmodel and the diffopt of an inner loop."""
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with higher.innerloop_ctx(model, opt, **options) as both:
        return both


def test_hooks_run_with_the_fast_weights():
    model, ((x, y), *_) = made(mlp), batches(1)
    seen: list[tuple[Any, ...]] = []
    model[0].register_forward_hook(lambda module, args, out: seen.append((module, out)))
    model.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    f, d = entered(model)
    d.step(error(f(x), y))
    seen.clear()
    out = f(x)
    ((module, hidden),) = seen
    assert module is f[0]
    assert_same([hidden], [F.linear(2 * x, f[0].weight, f[0].bias)])
    assert not torch.equal(out, model(x))


def test_hooks_of_the_copy_are_its_own():
    model, ((x, _), *_) = made(mlp), batches(1)
    f, _ = entered(model)
    calls: list[int] = []
    f[0].register_forward_hook(lambda *_: calls.append(0))
    f.register_forward_hook(lambda *_: calls.append(1))
    model(x)
    assert calls == []
    f(x)
    assert calls == [0, 1]


def test_submodules_and_methods_use_the_fast_weights():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(5, 5), nn.Linear(5, 2)
            self.stages = [self.body, (self.head, {"again": self.body})]
            self.run = self.encode
            self.tables: dict[str, Any] = {"scale": [2.0]}

        def encode(self, x: Tensor) -> Tensor:
            return torch.tanh(self.stages[0](x)) * self.tables["scale"][0]

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.run(x))

    model, ((x, y), *_) = made(Net), batches(1)
    f, d = entered(model)
    d.step(error(f(x), y))
    assert f.body.weight.grad_fn is not None
    expected = 2 * torch.tanh(F.linear(x, f.body.weight, f.body.bias))
    assert_same([f.encode(x), f.run(x)], [expected, expected])
    assert_same([f(x)], [F.linear(expected, f.head.weight, f.head.bias)])
    assert f.stages[0] is f.body
    assert f.stages[1][1]["again"] is f.body
    f.tables["scale"][0] = 1.0
    assert model.tables["scale"] == [2.0]
    with pytest.raises(AttributeError, match="Net"):
        _ = f.nothing


def test_attributes_are_the_copys():
    model = made(Convolutional)
    f, _ = entered(model)
    f.eval()
    assert not f.training
    assert not f.norm.training
    assert model.training
    f.training = True
    assert f.training
    f.note = "mine"
    assert f.note == "mine"
    assert not hasattr(model, "note")
    assert [name for name, _ in f.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert list(f.state_dict()) == list(model.state_dict())
    assert [name for name, _ in f.named_modules()] == [n for n, _ in model.named_modules()]
    assert list(dict(f.named_parameters()).values()) == list(f.parameters())
    assert isinstance(f, nn.Module)
    assert "BatchNorm2d" in repr(f)


def test_train_is_the_models_own():
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self.norm.eval()
            return self

    f = higher.monkeypatch(made(Careful).train())
    assert f.train() is f
    assert f.training
    assert not f.norm.training


def test_sequences_are_indexed():
    f, _ = entered(made(mlp))
    assert len(f) == 3
    assert isinstance(f[1], nn.Tanh)
    assert [type(each) for each in f] == [nn.Linear, nn.Tanh, nn.Linear]
    assert f
    assert entered(made(Tied))[0]


def test_assigned_weight_is_a_step():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(2))
            self.layer = nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.layer(x)

    model, ((x, _), *_) = made(Scaled), batches(1)
    f, _ = entered(model)
    f.scale = torch.full((2,), 3.0, dtype=torch.float64)
    assert_same([f(x)], [3 * model(x)])
    assert_same(list(f.parameters(time=0)), list(model.parameters()))
    assert list(f.parameters(recurse=False)) == [f.scale]


def test_params_of_a_call_become_the_fast_weights():
    model, ((x, y), *_) = made(mlp), batches(1)
    f, _ = entered(model)
    params = [torch.zeros_like(p).requires_grad_() for p in model.parameters()]
    assert_same([f(x, params=params)], [torch.zeros_like(y)])
    assert f.fast_params == params
    with pytest.raises(ValueError, match="expected 4 tensors"):
        f(x, params=params[1:])


def test_weights_without_an_fmodel():
    model, data = made(mlp), batches(4)
    f = higher.patch.make_functional(model)
    with pytest.raises(ValueError, match="params"):
        f(data[0][0])
    with pytest.raises(RuntimeError, match="no fast weights"):
        f.parameters()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    d = higher.optim.get_diff_optim(opt, model.parameters())
    with pytest.raises(ValueError, match="params"):
        d.step(torch.zeros(()))
    params = higher.utils.get_func_params(model)
    for x, y in data:
        params = d.step(error(f(x, params=params), y), params=params)
    other, other_opt = entered(model)
    for x, y in data:
        other_opt.step(error(other(x), y))
    assert_same(params, list(other.parameters()))


def test_created_optimizer_steps_like_a_real_one():
    model, data = made(mlp), batches(3)
    f = higher.monkeypatch(model)
    d = higher.create_diff_optim(fused_opt.SGD, {"lr": 0.1, "momentum": 0.9}, fmodel=f)
    g, other = entered(model)
    groups = [{"params": list(g.parameters())[:1]}, {"params": list(g.parameters())[1:]}]
    h = higher.monkeypatch(model)
    third = higher.create_diff_optim(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, groups, h)
    for x, y in data:
        d.step(error(f(x), y))
        other.step(error(g(x), y))
        third.step(error(h(x), y))
    assert_same(list(f.parameters()), list(g.parameters()))
    assert_same(list(h.parameters()), list(g.parameters()))
    with pytest.raises(ValueError, match="fmodel"):
        higher.create_diff_optim(torch.optim.SGD, {"lr": 0.1})


def test_created_optimizer_knows_the_fast_weights_of_its_groups():
    model, ((x, y), *_) = made(mlp), batches(1)
    f = higher.monkeypatch(model)
    before = list(f.parameters())
    groups = [{"params": before[2:], "lr": 0.5}, {"params": before[:1], "lr": 0.1}]
    d = higher.create_diff_optim(torch.optim.SGD, {"lr": 0.0}, groups, f)
    loss = error(f(x), y)
    grads = torch.autograd.grad(loss, before, retain_graph=True)
    new = d.step(loss)
    lrs = [0.1, 0.0, *[0.5] * (len(before) - 2)]
    assert_same(new, [p - lr * g for p, lr, g in zip(before, lrs, grads, strict=True)])
    assert new[1] is before[1]
    with pytest.raises(ValueError, match="reference_params"):
        higher.create_diff_optim(torch.optim.SGD, {"lr": 0.1}, [new[0], before[2]], f)


def test_running_statistics_move_in_the_copy_alone():
    model, data = made(Convolutional), batches(3)
    f, d = entered(model)
    for x, y in data:
        d.step(error(f(x), y))
    assert int(f.norm.num_batches_tracked) == 3
    assert int(model.norm.num_batches_tracked) == 0
    assert not torch.equal(f.norm.running_mean, model.norm.running_mean)


def test_a_buffer_that_a_graph_needs_is_not_written():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 2)
            self.register_buffer("scale", torch.ones(2))
            self.register_buffer("nothing", None)

        def forward(self, x: Tensor) -> Tensor:
            self.scale.mul_(0.5)
            return self.layer(x) * self.scale

    model, data = made(Counting), batches(4)
    f, d = entered(model, copy_initial_weights=False)
    for x, y in data:
        d.step(error(f(x), y))
    error(f(x), y).backward()
    assert model.layer.weight.grad is not None
    assert_same([f.scale, model.scale], [torch.full((2,), 0.5**5).double(), torch.ones(2).double()])


def test_shared_buffers_stay_one():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(5), nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x + 3))

    model, data = made(Net), batches(3)
    model.b.running_mean = model.a.running_mean
    other, f = copy.deepcopy(model), higher.monkeypatch(model)
    for x, _ in data:
        assert_same([f(x)], [other(x)])
    f.copy_to(model)
    assert_same(list(model.buffers()), list(other.buffers()))


def test_buffers_may_be_made_in_inference_mode():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 2)
            self.register_buffer("last", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            self.last = y.detach().mean(0)
            return y

    f, d = entered(made(Net))
    (x, y), *_ = batches(1)
    with torch.inference_mode():
        f(x)
    d.step(error(f(x), y))


def test_state_dict_is_the_models():
    class Net(nn.Linear):
        def __init__(self) -> None:
            super().__init__(5, 2)
            self.register_buffer("scale", torch.ones(1), persistent=False)
            self.seen = 3

        def get_extra_state(self) -> int:
            return self.seen

        def set_extra_state(self, seen: int) -> None:
            self.seen = seen

    model = made(Net)
    f = higher.monkeypatch(model)
    assert f.state_dict().keys() == model.state_dict().keys()
    f.load_state_dict({**model.state_dict(), "bias": torch.ones(2), "_extra_state": 4})
    assert f.seen == 4
    assert model.seen == 3
    assert_same([next(iter(f.parameters(time=0)))], [model.weight])
    assert_same(list(f.parameters())[1:], [torch.ones(2).double()])


def test_dropout_draws_as_ever():
    model, ((x, _), *_) = made(lambda: nn.Sequential(nn.Linear(5, 50), nn.Dropout())), batches(1)
    f, _ = entered(model)
    torch.manual_seed(5)
    expected = model(x)
    torch.manual_seed(5)
    assert torch.equal(f(x), expected)
    assert not torch.equal(f(x), expected)
    f.eval()
    assert torch.equal(f(x), f(x))


def test_deepcopy_goes_its_own_way():
    model, data = made(Convolutional), batches(3)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    f, d = entered(model, override={"lr": lr})
    d.step(error(f(data[0][0]), data[0][1]))
    branch = copy.deepcopy(f)
    x, y = data[1]
    assert_same([branch(x)], [f(x)])
    assert_same(gradients(error(branch(x), y), [lr]), gradients(error(f(x), y), [lr]))
    before = branch(x)
    d.step(error(f(x), y))
    assert_same([branch(x)], [before])
    assert int(branch.norm.num_batches_tracked) == 5
    assert int(f.norm.num_batches_tracked) == 4
    assert branch.conv is not f.conv
    assert len(branch.init_fast_params) == len(f.init_fast_params)
    assert branch.init_fast_params[0] is not f.init_fast_params[0]


def test_pickle_keeps_weights_and_buffers():
    model, ((x, y), *_) = made(Convolutional), batches(1)
    f, d = entered(model)
    d.step(error(f(x), y))
    loaded = pickle.loads(pickle.dumps(f))
    assert_same([loaded(x)], [f(x)])
    assert len(list(loaded.parameters(time=0))) == len(list(f.parameters()))
    file = io.BytesIO()
    torch.save(f, file)
    file.seek(0)
    assert_same([torch.load(file, weights_only=False)(x)], [f(x)])


def test_copy_to_writes_weights_and_buffers():
    model, ((x, y), *_) = made(Convolutional), batches(1)
    f, d = entered(model)
    d.step(error(f(x), y))
    f.copy_to(model)
    assert_same(list(model.state_dict().values()), list(f.state_dict().values()))
    assert all(isinstance(p, nn.Parameter) and p.is_leaf for p in model.parameters())
    other = made(mlp)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"expected conv\.weight"):
        f.copy_to(other)
    assert_same(list(other.state_dict().values()), list(before.values()))


def test_fast_weights_change_dtype_differentiably():
    model, ((x, y), *_) = made(mlp), batches(1)
    f, d = entered(model, copy_initial_weights=False)
    f.float()
    d.step(error(f(x.float()), y.float()))
    error(f(x.float()), y.float()).backward()
    assert model[0].weight.grad.dtype == torch.float64
    assert model[0].weight.dtype == torch.float64
    assert f[0].weight.dtype == torch.float32


def test_frozen_parameters_stay():
    model, ((x, y), *_) = made(mlp), batches(1)
    model[0].weight.requires_grad_(False)
    for options in ({}, {"track_higher_grads": False}):
        f, d = entered(model, **options)
        weight = f[0].weight
        d.step(error(f(x), y))
        assert f[0].weight is weight
        assert not weight.requires_grad


def test_inner_loops_nest():
    model, data = made(mlp), batches(3)
    f, d = entered(model, copy_initial_weights=False)
    d.step(error(f(data[0][0]), data[0][1]))
    inner = higher.monkeypatch(f, copy_initial_weights=False)
    opt = higher.create_diff_optim(torch.optim.SGD, {"lr": 0.1}, fmodel=inner)
    opt.step(error(inner(data[1][0]), data[1][1]))
    error(inner(data[2][0]), data[2][1]).backward()
    assert model[0].weight.grad is not None
    assert not torch.equal(inner[0].weight, f[0].weight)


@pytest.mark.parametrize("wrapped", [False, True])
def test_inner_loops_of_fast_weights(wrapped):
    model, ((x, y), *_) = made(mlp), batches(1)
    outer = higher.monkeypatch(model)
    whole = nn.Sequential(outer) if wrapped else outer
    opt = torch.optim.SGD(outer.parameters(), lr=0.1)
    inner, d = entered(model, copy_initial_weights=False)
    with higher.innerloop_ctx(whole, opt, copy_initial_weights=False) as (f, diffopt):
        diffopt.step(error(f(x), y))
        d.step(error(inner(x), y))
        loss, expected = error(f(x), y), error(inner(x), y)
    assert_same([loss], [expected])
    assert_same(
        gradients(loss, list(outer.parameters())), gradients(expected, list(model.parameters()))
    )


# --- Kinds of modules


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_nets(kind):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = kind(5, 4, num_layers=2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cell(x.unsqueeze(0))[0].squeeze(0))

    model, data = made(Net), batches(4)
    by_hand = ByHand(model, {**HYPERS, "momentum": 0.9, "dampening": 0, "weight_decay": 0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f, d = entered(model, copy_initial_weights=False)
        for x, y in data[:3]:
            d.step(error(f(x), y))
            by_hand.step(error(by_hand(x), y))
        loss = error(f(x), y)
    assert_same(
        gradients(loss, list(model.parameters())), gradients(error(by_hand(x), y), by_hand.initial)
    )


def test_attention():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
            self.into, self.out = nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.layer(self.into(x).unsqueeze(0)).squeeze(0))

    model, data = made(Net), batches(3)
    model.eval()
    by_hand = ByHand(model, {**HYPERS, "momentum": 0.9, "dampening": 0, "weight_decay": 0})
    f, d = entered(model)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for x, y in data:
            d.step(error(f(x), y))
            by_hand.step(error(by_hand(x), y))
    assert_same(list(f.parameters()), by_hand.params)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("norm", ["weight", "spectral"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_reparametrized_layers(norm, old):
    new = {"weight": nn.utils.parametrizations.weight_norm}
    new["spectral"] = nn.utils.parametrizations.spectral_norm
    wrap = getattr(nn.utils, f"{norm}_norm") if old else new[norm]
    model = made(lambda: nn.Sequential(wrap(nn.Linear(5, 7)), nn.Tanh(), nn.Linear(7, 2)))
    before, data = copy.deepcopy(model.state_dict()), batches(4)
    by_hand = ByHand(model, {**HYPERS, "momentum": 0.9, "dampening": 0, "weight_decay": 0})
    f, d = entered(model, copy_initial_weights=False)
    for x, y in data[:3]:
        d.step(error(f(x), y))
        by_hand.step(error(by_hand(x), y))
    assert_same(list(f.parameters()), by_hand.params)
    loss, expected = error(f(data[3][0]), data[3][1]), error(by_hand(data[3][0]), data[3][1])
    assert_same(gradients(loss, list(model.parameters())), gradients(expected, by_hand.initial))
    assert_same(list(model.state_dict().values()), list(before.values()))


def test_lists_of_parameters_are_followed():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.registered = nn.ParameterList([torch.randn(5, 5), torch.randn(5, 2)])
            self.plain = [self.registered[0], {"last": self.registered[1]}]

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.plain[0]) @ self.plain[1]["last"]

    model, data = made(Net), batches(2)
    model.plain = [model.registered[0], {"last": model.registered[1]}]
    f, d = entered(model)
    for x, y in data:
        d.step(error(f(x), y))
    assert f.plain[0] is f.registered[0]
    assert f.plain[1]["last"] is f.registered[1]
    assert f.plain[0].grad_fn is not None


@pytest.mark.parametrize("kind", [list, tuple, lambda weights: ((*weights,), 3)])
def test_weights_in_attributes_are_the_fast_ones(kind):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(5, dtype=torch.float64))
            self.weights = kind([self.weight])

        def forward(self, x: Tensor) -> Tensor:
            (weight, *_) = self.weights
            return x * (weight[0] if isinstance(weight, (list, tuple)) else weight)

    x, model = torch.ones(5).double(), Net()
    many = torch.arange(10.0).double().reshape(2, 5)
    f, d = entered(model)
    (new,) = d.step(f(x).sum())
    assert_same([f(x)], [new])
    assert_same([new], [torch.full_like(x, 0.9)])
    stateless = higher.make_functional(model)
    for each in (f, stateless):
        found = torch.vmap(lambda w, each=each: each(x, params=[w]))(many)
        assert_same([found], [many])
    assert f.weight is new
    assert_same([f(x)], [new])
    assert stateless.fast_params is None


def test_data_parallel_runs():
    model, ((x, y), *_) = made(mlp), batches(1)
    f, d = entered(nn.DataParallel(model))
    d.step(error(f(x), y))
    g, e = entered(model)
    e.step(error(g(x), y))
    assert_same(list(f.parameters()), list(g.parameters()))


def test_compiled_models_run_as_they_were_written():
    model, ((x, y), *_) = made(mlp), batches(1)
    whole = torch.compile(model, backend="eager")
    part = nn.Sequential(torch.compile(model[0], backend="eager"), model[1], model[2])
    in_place = made(mlp)
    in_place.compile(backend="eager")
    g, e = entered(model, copy_initial_weights=False)
    e.step(error(g(x), y))
    expected = list(g.parameters())
    for each in (whole, part, in_place):
        f, d = entered(each)
        d.step(error(f(x), y))
        assert_same(list(f.parameters()), expected)
        assert f.fast_params[0].grad_fn is not None
    f.copy_to(whole)
    assert_same(list(model.parameters()), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_modules_that_cannot_run_with_other_weights_are_named():
    scripted = nn.Sequential(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)))
    with pytest.raises(TypeError, match=r"torch\.jit"):
        higher.monkeypatch(scripted)
    lazy = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(ValueError, match="weight of LazyLinear"):
        higher.monkeypatch(lazy)
    lazy(torch.ones(1, 3))
    higher.monkeypatch(lazy)


def test_user_defined_init_and_slots_do_not_matter():
    class Odd(nn.Linear):
        def __init__(self, needed: str) -> None:
            super().__init__(5, 2)
            self.needed = needed
            self.loop: list[Any] = [self]
            self.loop.append(self.loop)

    model, ((x, y), *_) = made(lambda: Odd("x")), batches(1)
    f, d = entered(model)
    d.step(error(f(x), y))
    assert f.loop[0] is not model
    assert f.loop[1] is f.loop
    assert f.needed == "x"


# --- Arguments


def test_override_takes_all_its_forms():
    model, ((x, y), *_) = made(mlp), batches(1)
    params = list(model.parameters())
    opt = torch.optim.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=0.1)
    weights = []
    two = torch.tensor([0.2, 0.2])
    forms = [
        0.2,
        [0.2],
        [0.2, 0.2],
        (0.2, 0.2),
        two,
        two[:1],
        two[0],
        [two[0]],
        [two[:1]],
        [two[0], 0.2],
    ]
    for form in forms:
        with higher.innerloop_ctx(model, opt, override={"lr": form}) as (f, d):
            d.step(error(f(x), y))
            weights.append(f[2].weight)
    for each in weights:
        torch.testing.assert_close(each, weights[0], rtol=1e-7, atol=1e-9)
    with pytest.raises(ValueError, match="expected 1 value of lr, or 2"):
        higher.get_diff_optim(opt, params, override={"lr": [0.1] * 3})
    with pytest.raises(ValueError, match="learning_rate"):
        higher.get_diff_optim(opt, params, override={"learning_rate": 0.1})


@pytest.mark.parametrize("width", [1, 5000])
def test_override_may_be_a_parameter_list(width):
    model = nn.Linear(width, 1).double()
    x = torch.ones(2, width).double()
    opt = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)
    learned = nn.ParameterList([torch.tensor(0.1), torch.tensor(0.2)])
    with higher.innerloop_ctx(model, opt, override={"lr": learned}) as (f, d):
        d.step(f(x).square().sum())
        found = torch.autograd.grad(f(x).square().sum(), list(learned))
    assert all(bool(g != 0) for g in found)


@pytest.mark.parametrize("width", [1, 5000])
@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", torch.full((3,), 0.1)), ("momentum", 0.0), ("dampening", 0.5)],
)
def test_override_is_checked_whatever_the_size(option, value, width):
    model = nn.Linear(width, 1).double()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    with higher.innerloop_ctx(model, opt, override={option: [value]}) as (f, d):
        before = list(f.parameters())
        with pytest.raises(ValueError, match=r"1-element|Nesterov"):
            d.step(f(torch.ones(2, width).double()).square().sum())
        assert all(p is b for p, b in zip(f.parameters(), before, strict=True))


def test_decoupled_decay_has_the_precision_of_the_parameters():
    p = torch.linspace(1, 2, 9, dtype=torch.float64).requires_grad_()
    opt = fused_opt.SGD([p], lr=0.1, weight_decay=0.3, decoupled_weight_decay=True)
    lr = torch.tensor(0.1)
    d = higher.get_diff_optim(opt, [p], override={"lr": lr})
    assert_same(d.step(p.sum(), params=[p]), [(1 - lr.item() * 0.3) * p - lr.item()])


def test_override_of_a_step_stays():
    model, data = made(mlp), batches(2)
    f, d = entered(model)
    d.step(error(f(data[0][0]), data[0][1]), override={"lr": 0.0, "momentum": 0.0})
    assert_same(list(f.parameters()), list(model.parameters()))
    d.step(error(f(data[1][0]), data[1][1]))
    assert_same(list(f.parameters()), list(model.parameters()))


def test_grad_callback_sees_all_gradients_and_returns_those_to_use():
    model, ((x, y), *_) = made(Switching), batches(1)
    opt = torch.optim.SGD([model.head.weight, model.second.weight], lr=0.1)
    seen: list[Any] = []

    def halved(grads: list[Any]) -> list[Any]:
        seen.append(grads)
        return [None if g is None else g / 2 for g in grads]

    model.calls = 1  # the second layer is not used
    with higher.innerloop_ctx(model, opt) as (f, d):
        grads = torch.autograd.grad(error(f(x), y), f.head.weight)
        model_calls = f.calls
        f.calls = 1
        d.step(error(f(x), y), grad_callback=halved)
        assert model_calls == 2
        assert [g is None for g in seen[0]] == [False, False, True, True, False, False]
        assert_same([f.head.weight], [f.init_fast_params[4] - 0.05 * grads[0]])
    d = higher.get_diff_optim(opt, model.parameters(), fmodel=f, grad_callback=halved)
    d.step(error(f(x), y))
    assert len(seen) == 2


def test_lists_of_another_length_are_named():
    model, ((x, y), *_) = made(mlp), batches(1)
    f, d = entered(model)
    before = list(f.parameters())
    with pytest.raises(ValueError, match=r"grad_callback: expected 4 .* got 2"):
        d.step(error(f(x), y), grad_callback=lambda grads: grads[:2])
    with pytest.raises(ValueError, match=r"params: expected 4 .* got 2"):
        d.step(error(f(x), y), params=before[:2])
    opt = torch.optim.SGD(model[2].parameters(), lr=0.1)
    head = higher.get_diff_optim(opt, model[2].parameters(), f)  # of which f has more
    with pytest.raises(ValueError, match=r"params: expected 2 .* got 4"):
        head.step(error(f(x), y))
    assert all(p is b for p, b in zip(f.parameters(), before, strict=True))
    d.step(error(f(x), y), grad_callback=lambda grads: (2 * g for g in grads))


def test_registered_optimizers_step():
    class Signs(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, {"lr": lr})

    class DifferentiableSigns(higher.optim.DifferentiableOptimizer):
        def _update(self, grouped_grads: list[Any]) -> None:
            for group, states, grads in zip(
                self.param_groups, self.state, grouped_grads, strict=True
            ):
                for i, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                    states[i]["count"] = states[i].get("count", 0) + 1
                    group["params"][i] = p - group["lr"] * g.sign()

    model, ((x, y), *_) = made(mlp), batches(1)
    opt = Signs(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"fused_opt\.SGD or torch\.optim\.SGD, got Signs"):
        higher.get_diff_optim(opt, model.parameters())
    higher.register_optim(Signs, DifferentiableSigns)
    try:
        lr = torch.tensor(0.1, requires_grad=True)
        with higher.innerloop_ctx(model, opt, override={"lr": lr}) as (f, d):
            d.step(error(f(x), y))
            d.step(error(f(x), y))
            error(f(x), y).backward()
    finally:
        del higher.optim._CLASSES[Signs]
    assert lr.grad is not None
    assert d.state[0][0]["count"] == 2


class Unlike(torch.optim.SGD):
    """A subclass with a step of its own."""

    def step(self, closure: Any = None) -> None:
        raise AssertionError


class Alike(fused_opt.SGD):
    """A subclass without one."""


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_subclasses_that_torch_has_wrapped_are_taken(kind):
    model = made(mlp)
    opt = type("First", (kind,), {})(model.parameters(), lr=0.1)
    # As where it is the first optimizer of the process.
    type(opt).step = type(opt).profile_hook_step(kind.step)
    assert type(opt).step is not kind.step
    higher.get_diff_optim(opt, model.parameters())


def test_only_known_steps_are_taken():
    model, ((x, y), *_) = made(mlp), batches(1)
    for kind in (torch.optim.Adam, Unlike):
        with pytest.raises(TypeError, match=r"opt: expected a fused_opt\.SGD or"):
            higher.get_diff_optim(kind(model.parameters(), lr=0.1), model.parameters())
        with pytest.raises(TypeError, match="opt: expected"):
            higher.create_diff_optim(kind, {"lr": 0.1}, model.parameters())
    opt = Alike(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 1.0)  # wraps the step of the instance
    with higher.innerloop_ctx(model, opt) as (f, d):
        d.step(error(f(x), y))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_grad_norm", 1.0),
        ("stochastic_rounding", True),
        ("master_weights", "kahan"),
        ("state_dtype", torch.float32),
    ],
)
def test_options_that_steps_do_not_have_are_named(option, value):
    model, ((x, y), *_) = mlp(), batches(1)
    opt = fused_opt.SGD(model.parameters(), lr=0.1, **{option: value})
    with pytest.raises(ValueError, match=option):
        higher.get_diff_optim(opt, model.parameters())
    f, d = entered(model)
    d.param_groups[0][option] = value
    with pytest.raises(ValueError, match=option):
        d.step(error(f(x.float()), y.float()))


def test_attached_average_is_named():
    model = made(mlp)
    ema = fused_opt.EMA(model, decay=0.9)
    opt = fused_opt.SGD(model.parameters(), lr=0.1, ema=ema)
    with pytest.raises(ValueError, match="ema"):
        higher.get_diff_optim(opt, model.parameters())


def test_options_without_a_say_in_the_result_are_taken():
    model, ((x, y), *_) = made(mlp), batches(1)
    options: dict[str, Any] = {"reset_grads": True, "foreach": True, "rounding_seed": 3}
    opt = fused_opt.SGD(model.parameters(), lr=0.1, **options)
    error(model(x), y).backward()
    grad = model[0].weight.grad.clone()
    with higher.innerloop_ctx(model, opt) as (f, d):
        d.step(error(f(x), y))
    assert torch.equal(model[0].weight.grad, grad)


def test_other_arguments_are_checked():
    model = made(mlp)
    opt = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.ones(1))], lr=0.1)
    with pytest.raises(ValueError, match="reference_params"):
        higher.get_diff_optim(opt, model.parameters())
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="truncate"):
        higher.get_diff_optim(opt, model.parameters(), truncate=0)
    f = higher.monkeypatch(model)
    with pytest.raises(ValueError, match="bool"):
        f.track_higher_grads = 1


@pytest.mark.cuda
def test_device_moves_weights_buffers_and_momentum():
    model, ((x, y), *_) = made(Convolutional), batches(2)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    error(model(x), y).backward()
    opt.step()
    x, y = x.cuda(), y.cuda()
    with higher.innerloop_ctx(model, opt, device="cuda", copy_initial_weights=False) as (f, d):
        for _ in range(2):
            d.step(error(f(x), y))
        opt.zero_grad()
        error(f(x), y).backward()
    assert f.norm.running_mean.is_cuda
    assert model.conv.weight.grad.device.type == "cpu"


def test_device_of_the_model_is_taken_too():
    model, ((x, y), *_) = made(Convolutional), batches(1)
    f, d = entered(model, device="cpu")
    d.step(error(f(x), y))
    assert f.conv.weight.data_ptr() != model.conv.weight.data_ptr()
    assert f.norm.running_mean.data_ptr() != model.norm.running_mean.data_ptr()


# --- Learned options


def test_trainable_options_come_and_go():
    model = made(mlp)
    params = list(model.parameters())
    groups = [{"params": params[:2], "lr": 0.3}, {"params": params[2:]}]
    opt = fused_opt.SGD(groups, lr=0.1, momentum=0.9)
    override = higher.optim.get_trainable_opt_params(opt)
    assert set(override) == {"lr", "momentum", "weight_decay", "dampening"}
    assert [float(v) for v in override["lr"]] == pytest.approx([0.3, 0.1])
    assert all(v.requires_grad and v.is_leaf for vs in override.values() for v in vs)
    with torch.no_grad():
        override["lr"][1] += 0.4
    higher.optim.apply_trainable_opt_params(opt, override)
    assert [type(group["lr"]) for group in opt.param_groups] == [float, float]
    assert opt.param_groups[1]["lr"] == pytest.approx(0.5)
    before = opt.param_groups[0]["momentum"]
    with pytest.raises(ValueError, match="3"):
        higher.optim.apply_trainable_opt_params(opt, {"momentum": [0.1], "lr": [0.1] * 3})
    assert opt.param_groups[0]["momentum"] == before


def test_whole_numbers_learn_too():
    model = made(mlp)
    opt = torch.optim.SGD(model.parameters(), lr=1, momentum=0)
    override = {"lr": [torch.tensor(0.25)], "momentum": [torch.tensor(0.5)]}
    higher.optim.apply_trainable_opt_params(opt, {**override, "weight_decay": [torch.tensor(0.0)]})
    found = [opt.param_groups[0][name] for name in ("lr", "momentum", "weight_decay")]
    assert found == [0.25, 0.5, 0]


def test_trainable_options_may_be_tensors_and_tuples():
    model = made(mlp)
    lr = torch.tensor(0.1)
    opt = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.8, 0.9))
    override = higher.optim.get_trainable_opt_params(opt)
    assert isinstance(override["betas"][0], tuple)
    override["lr"][0].data += 0.4
    override["betas"][0][0].data += 0.1
    higher.optim.apply_trainable_opt_params(opt, override)
    assert opt.param_groups[0]["lr"] is lr
    assert float(lr) == pytest.approx(0.5)
    assert opt.param_groups[0]["betas"] == pytest.approx((0.9, 0.9))


def test_utils():
    assert higher.utils.flatten({"a": [1, (2, {3})], "b": 4}) == [1, 2, 3, 4]
    model = made(mlp)
    shared = higher.utils.get_func_params(model, safe_copy=False)
    assert shared[0].data_ptr() == model[0].weight.data_ptr()
    assert shared[0].is_leaf
    assert shared[0].requires_grad


# --- Transforms


def test_vmap_over_tasks_matches_a_loop():
    model = made(mlp)
    tasks = batches(4)
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    f = higher.make_functional(model)
    initial = [p.detach() for p in model.parameters()]

    def adapted(x: Tensor, y: Tensor, lr: Tensor) -> Tensor:
        params, momentum = initial, None
        for _ in range(3):
            grads = torch.func.grad(lambda p: error(f(x, params=p), y))(params)
            params, momentum = fused_opt.functional.sgd_step(
                params, grads, momentum, lr=lr, momentum=0.9
            )
        return error(f(x, params=params), y)

    xs, ys = (torch.stack(each) for each in zip(*tasks, strict=True))
    many = torch.vmap(adapted, in_dims=(0, 0, None))(xs, ys, lr)
    assert f.fast_params is None
    assert_same(
        gradients(many.sum(), [lr]), gradients(sum(adapted(x, y, lr) for x, y in tasks), [lr])
    )
    losses = []
    for x, y in tasks:
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with higher.innerloop_ctx(model, opt, override={"lr": lr}) as (g, d):
            for _ in range(3):
                d.step(error(g(x), y))
            losses.append(error(g(x), y))
    assert_same([many], [torch.stack(losses)])


# --- Time


def test_a_step_that_raises_leaves_weights_and_momentum_of_all_groups():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    groups = [
        {"params": list(model[0].parameters())},
        {"params": list(model[1].parameters()), "nesterov": True},
    ]
    opt = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    with higher.innerloop_ctx(model, opt) as (fmodel, diffopt):
        diffopt.step(fmodel(torch.ones(4, 3)).sum())
        weights, state = list(fmodel.parameters()), diffopt.state_dict()["state"]
        with pytest.raises(ValueError, match="Nesterov"):
            diffopt.step(fmodel(torch.ones(4, 3)).sum(), override={"momentum": [0.9, 0.0]})
        assert all(map(operator.is_, fmodel.parameters(), weights))
        for number, held in diffopt.state_dict()["state"].items():
            assert torch.equal(held["momentum_buffer"], state[number]["momentum_buffer"])


def test_entering_takes_a_small_part_of_what_the_package_takes():
    original = pytest.importorskip("higher")
    layers = [layer for _ in range(100) for layer in (nn.Linear(8, 8), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    assert len(list(model.modules())) == 200
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.set_num_threads(1)

    def seconds_to_enter(package) -> float:
        start = time.perf_counter()
        with package.innerloop_ctx(model, opt):
            return time.perf_counter() - start

    gc.collect()
    gc.disable()  # what other tests have left takes time too
    try:
        rounds = [(seconds_to_enter(higher), seconds_to_enter(original)) for _ in range(30)]
    finally:
        gc.enable()
    ours, theirs = (min(seconds) for seconds in zip(*rounds, strict=True))
    assert ours < theirs / 6


def test_no_class_is_made():
    model = made(mlp)
    entered(model)
    kinds = set(map(id, nn.Module.__subclasses__()))
    f, _ = entered(model)
    assert set(map(id, nn.Module.__subclasses__())) == kinds
    assert type(f) is higher.FunctionalModule
    assert [type(each) for each in f] == [type(each) for each in model]
