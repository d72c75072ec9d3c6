"""`fused_opt.higher` call by call against the package `higher` 0.2.1, and where they differ."""

from __future__ import annotations

import copy
import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_opt.higher as ours

original = pytest.importorskip("higher")

#: To the rounding of fp64 over a few steps: higher adds up in the same order, but not everywhere.
EXACT = {"rtol": 1e-12, "atol": 1e-14}

X = torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(6, 5)
Y = torch.linspace(2, -1, 12, dtype=torch.float64).reshape(6, 2)


class Net(nn.Module):
    """A tied weight, a buffer that moves, a method, and an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 5), nn.BatchNorm1d(5)
        self.second = nn.Linear(5, 5, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(5, 2)
        self.scale = 2.0

    def features(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x)))) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def made() -> tuple[nn.Module, torch.optim.SGD]:
    """A model, and an optimizer with two param groups and some momentum."""
    torch.manual_seed(0)
    model = Net().double()
    first, rest = [model.head.bias, model.first.weight], [model.norm.weight, model.head.weight]
    groups = [{"params": first}, {"params": rest, "lr": 0.05, "nesterov": True, "dampening": 0}]
    opt = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.01, dampening=0.1)
    error(model(X)).backward()
    opt.step()
    opt.zero_grad()
    return model, opt


def error(output: Tensor) -> Tensor:
    return ((output - Y) ** 2).mean()


def steps(f: Any, d: Any, count: int = 3) -> list[list[Tensor]]:
    """What each step returns."""
    return [list(d.step(error(f(X)))) for _ in range(count)]


Scenario = Callable[[Any], Any]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    """Adds a function of the package whose results must agree."""
    SCENARIOS[function.__name__] = function
    return function


@scenario
def inner_loop(higher: Any) -> Any:
    model, opt = made()
    with higher.innerloop_ctx(model, opt) as (f, d):
        returned = steps(f, d)
        loss = error(f(X))
        grads = torch.autograd.grad(
            loss, list(f.init_fast_params if higher is ours else f.parameters(time=0))
        )
        history = [list(f.parameters(time=t)) for t in range(4)]
    return returned, loss, grads, history, list(f.parameters()), list(model.parameters())


@scenario
def initial_weights_of_the_model(higher: Any) -> Any:
    model, opt = made()
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (f, d):
        steps(f, d)
        error(f(X)).backward()
    return [p.grad for p in model.parameters()]


@scenario
def initial_weights_copied(higher: Any) -> Any:
    model, opt = made()
    with higher.innerloop_ctx(model, opt) as (f, d):
        steps(f, d)
        error(f(X)).backward()
    return [p.grad for p in model.parameters()]


@scenario
def override(higher: Any) -> Any:
    model, opt = made()
    lr = [torch.tensor([v], requires_grad=True) for v in (0.1, 0.2)]
    momentum = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    decay = torch.tensor([0.03, 0.04], dtype=torch.float64, requires_grad=True)
    hypers = {"lr": lr, "momentum": momentum, "weight_decay": decay}
    with higher.innerloop_ctx(model, opt, override=hypers) as (f, d):
        returned = steps(f, d)
        grads = torch.autograd.grad(error(f(X)), [*lr, momentum, decay])
    return returned, grads, [g.dtype for g in grads]


@scenario
def override_of_a_step(higher: Any) -> Any:
    model, opt = made()
    lr = torch.tensor([0.2], dtype=torch.float64, requires_grad=True)
    with higher.innerloop_ctx(model, opt) as (f, d):
        steps(f, d, 1)
        d.step(error(f(X)), override={"lr": [lr]})
        steps(f, d, 1)
        return list(f.parameters()), torch.autograd.grad(error(f(X)), lr)


@scenario
def options_set_by_hand(higher: Any) -> Any:
    model, opt = made()
    lr = torch.tensor([0.2], dtype=torch.float64, requires_grad=True)
    with higher.innerloop_ctx(model, opt) as (f, d):
        d.param_groups[0]["lr"] = lr
        steps(f, d)
        return torch.autograd.grad(error(f(X)), lr), [g["lr"] for g in d.param_groups[1:]]


@scenario
def grad_callback(higher: Any) -> Any:
    model, opt = made()
    seen: list[Any] = []

    def halved(grads: Any) -> Any:
        seen.append(list(grads))
        return [g / 2 for g in grads]

    with higher.innerloop_ctx(model, opt) as (f, d):
        d.step(error(f(X)), grad_callback=halved)
        return seen, list(f.parameters())


@scenario
def params_of_a_step(higher: Any) -> Any:
    model, opt = made()
    with higher.innerloop_ctx(model, opt) as (f, d):
        mine = [(p.detach() + 0.1).requires_grad_() for p in f.parameters()]
        returned = d.step(error(f(X, params=mine)), params=mine)
        return list(returned), list(f.parameters()), len(list(f.parameters(time=2)))


@scenario
def without_tracking(higher: Any) -> Any:
    model, opt = made()
    with higher.innerloop_ctx(model, opt, track_higher_grads=False) as (f, d):
        returned = steps(f, d)
        moved = [p for p in f.parameters() if p.grad_fn is None]
    return returned, len(moved), [p.requires_grad for p in f.parameters()]


@scenario
def buffers(higher: Any) -> Any:
    model, opt = made()
    with higher.innerloop_ctx(model, opt) as (f, d):
        steps(f, d)
    return f.norm.running_mean, f.norm.num_batches_tracked, list(model.buffers())


@scenario
def modes_and_attributes(higher: Any) -> Any:
    model, opt = made()
    with higher.innerloop_ctx(model, opt) as (f, d):
        steps(f, d, 1)
        f.eval()
        f.scale = 3.0
        out = f(X)
    return out, f.training, model.training, f.scale, model.scale, f.head(f.features(X))


@scenario
def weight_assigned_to_the_model(higher: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Linear(5, 2).double()
    f = higher.monkeypatch(model)
    f.bias = torch.ones(2, dtype=torch.float64)
    return f(X), list(f.parameters()), list(f.parameters(time=0)), list(f.parameters(time=1))


@scenario
def stateless_model(higher: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    f = higher.patch.make_functional(model)
    d = higher.optim.get_diff_optim(opt, model.parameters())
    params = higher.utils.get_func_params(model)
    for _ in range(3):
        params = d.step(error(f(X, params=params)), params=params)
    return list(params), f.fast_params


@scenario
def encapsulator(higher: Any) -> Any:
    model, _ = nn.Linear(5, 2).double(), torch.manual_seed(0)

    def doubled(f: Any, module: nn.Module) -> None:
        f.update_params([torch.ones_like(p) for p in module.parameters()])

    return higher.patch.make_functional(model, encapsulator=doubled)(X)


@scenario
def fast_weights_assigned(higher: Any) -> Any:
    model, opt = made()
    with higher.innerloop_ctx(model, opt) as (f, d):
        steps(f, d, 1)
        f.fast_params = [p.detach().requires_grad_() for p in f.fast_params]
        steps(f, d, 1)
        return list(f.parameters(time=2)), list(f.parameters(time=3)), len(f.fast_params)


@scenario
def created_optimizer(higher: Any) -> Any:
    model, _ = made()
    f = higher.monkeypatch(model)
    options = {"lr": 0.1, "momentum": 0.9}
    d = higher.create_diff_optim(torch.optim.SGD, options, fmodel=f, override={"lr": [0.2]})
    other = higher.create_diff_optim(torch.optim.SGD, options, list(f.parameters()))
    return steps(f, d), list(other.step(error(f(X)), params=f.fast_params))


@scenario
def momentum_in_state(higher: Any) -> Any:
    model, opt = made()
    with higher.innerloop_ctx(model, opt) as (f, d):
        before = [s[i]["momentum_buffer"] for s in d.state for i in range(2)]
        steps(f, d)
        return before, [s[i]["momentum_buffer"] for s in d.state for i in range(2)]


@scenario
def momentum_off_for_a_step(higher: Any) -> Any:
    model, opt = made()
    with higher.innerloop_ctx(model, opt) as (f, d):
        for group in d.param_groups:
            group["nesterov"] = False
        for momentum in (0.9, 0.0, 0.9):
            d.step(error(f(X)), override={"momentum": [momentum]})
        return list(f.parameters())


@scenario
def unused_and_frozen_parameters(higher: Any) -> Any:
    torch.manual_seed(0)
    model = Net().double()
    model.head.bias.requires_grad_(False)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with higher.innerloop_ctx(model, opt) as (f, d):
        for i in range(4):
            d.step(error(f(X)) if i % 2 else f.first(X).square().mean())
        return list(f.parameters()), [f.head.bias.requires_grad]


@scenario
def sequences(higher: Any) -> Any:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 2)).double()
    f = higher.monkeypatch(model)
    return len(f), len(list(f)), f[1].out_features


@scenario
def utilities(higher: Any) -> Any:
    model, _ = made()
    nested = {"a": [1, (2, 3)], "b": {4}}
    params = higher.utils.get_func_params(model)
    return higher.utils.flatten(nested), params, [p.requires_grad for p in params]


def assert_alike(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found.detach(), expected.detach(), **EXACT)
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for f, e in zip(found, expected, strict=True):
            assert_alike(f, e)
    else:
        assert found == expected


@pytest.mark.parametrize("name", SCENARIOS)
def test_same_results(name):
    assert_alike(SCENARIOS[name](ours), SCENARIOS[name](original))


def test_the_version_is_the_one_that_we_drop_in_for():
    assert importlib.metadata.version("higher") == "0.2.1"


@pytest.mark.parametrize(
    "name",
    [
        *("innerloop_ctx", "get_diff_optim", "create_diff_optim", "register_optim", "monkeypatch"),
        *("patch.monkeypatch", "patch.make_functional", "utils.flatten", "utils.get_func_params"),
        *("optim.get_diff_optim", "optim.create_diff_optim", "optim.register_optim"),
        *("optim.get_trainable_opt_params", "optim.apply_trainable_opt_params"),
        *("optim.DifferentiableOptimizer.step", "optim.DifferentiableOptimizer.__init__"),
    ],
)
def test_arguments_have_the_same_names_in_the_same_order(name):
    signatures = []
    for function in (original, ours):
        for part in name.split("."):
            function = getattr(function, part)
        signatures.append(list(inspect.signature(function).parameters.values()))
    theirs, mine = signatures
    theirs = [p for p in theirs if p.kind is not p.VAR_KEYWORD]
    assert [p.name for p in mine[: len(theirs)]] == [p.name for p in theirs]
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in mine[len(theirs) :])
    for p, q in zip(mine, theirs, strict=False):
        assert p.default == q.default


# --- Where they differ, and why


def simple(package: Any, **options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = nn.Linear(5, 2).double()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    with package.innerloop_ctx(model, opt) as both:
        return both


def test_zero_tensors_have_gradients():
    """higher skips a term whose tensor holds 0, and with it the gradient that it should have."""
    zeros = {name: torch.zeros(1, requires_grad=True) for name in ("momentum", "weight_decay")}
    found = {}
    for package in (original, ours):
        f, d = simple(package)
        for _ in range(2):
            d.step(error(f(X)), override={k: [v] for k, v in zeros.items()})
        found[package] = torch.autograd.grad(error(f(X)), zeros.values(), allow_unused=True)
    assert found[original] == (None, None)
    assert all(float(g) != 0 for g in found[ours])


def test_maximize_ascends():
    """higher has no maximize, and descends."""
    for package, ascends in ((original, False), (ours, True)):
        f, d = simple(package, maximize=True)
        before = error(f(X))
        d.step(before)
        assert bool(error(f(X)) > before) is ascends


def test_forward_hooks_run():
    """higher drops the model's hooks."""
    for package, expected in ((original, []), (ours, [1])):
        calls: list[int] = []
        model = nn.Sequential(nn.Linear(5, 2)).double()
        model[0].register_forward_hook(lambda *_, calls=calls: calls.append(1))
        package.monkeypatch(model)(X)
        assert calls == expected


def test_overrides_of_no_dimensions():
    """higher asks an override for its length."""
    f, d = simple(original)
    with pytest.raises(TypeError):
        d.step(error(f(X)), override={"lr": torch.tensor(0.1)})
    f, d = simple(ours)
    d.step(error(f(X)), override={"lr": torch.tensor(0.1)})


def test_unknown_overrides():
    """higher keeps an option that no step reads: a slip of the pen goes unnoticed."""
    f, d = simple(original)
    d.step(error(f(X)), override={"learning_rate": [0.1]})
    f, d = simple(ours)
    with pytest.raises(ValueError, match="learning_rate"):
        d.step(error(f(X)), override={"learning_rate": [0.1]})


def test_first_weights_in_test_mode():
    """higher has the latest weights at time 0, having forgotten the first."""
    for package in (original, ours):
        torch.manual_seed(0)
        model = nn.Linear(5, 2).double()
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        with package.innerloop_ctx(model, opt, track_higher_grads=False) as (f, d):
            d.step(error(f(X)))
        if package is original:
            assert_alike(list(f.parameters(time=0)), list(f.parameters()))
        else:
            with pytest.raises(ValueError, match="time"):
                f.parameters(time=0)


def test_frozen_parameters_in_test_mode():
    """higher makes all weights require gradients."""
    for package in (original, ours):
        model = nn.Linear(5, 2).double()
        model.bias.requires_grad_(False)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        with package.innerloop_ctx(model, opt, track_higher_grads=False) as (f, d):
            d.step(error(f(X)))
        assert [p.requires_grad for p in f.parameters()] == [True, package is original]


def test_tensors_of_the_optimizer():
    """higher copies options, and the gradient of a learning rate goes to the copy."""
    for package in (original, ours):
        model, lr = nn.Linear(5, 2).double(), torch.tensor([0.1], requires_grad=True)
        opt = torch.optim.SGD(model.parameters(), lr=lr)
        with package.innerloop_ctx(model, opt) as (f, d):
            d.step(error(f(X)))
            error(f(X)).backward()
        assert (lr.grad is None) == (package is original)


def test_deep_copies():
    """higher keeps a generator in its modules."""
    f, _ = simple(original)
    with pytest.raises(TypeError, match="generator"):
        copy.deepcopy(f)
    f, _ = simple(ours)
    assert_alike(copy.deepcopy(f)(X), f(X))


def test_stateless_models_have_their_buffers():
    """higher leaves a model without fast weights without buffers too."""
    model = nn.BatchNorm1d(5).double()
    params = [p.detach().requires_grad_() for p in model.parameters()]
    f = original.patch.make_functional(model)
    with pytest.raises(AttributeError):
        f(X, params=params)
    f = ours.patch.make_functional(model)
    assert_alike(f(X, params=params), model(X))


def test_flags_are_no_trainable_options():
    """higher makes tensors of flags, which are then looked at in every step."""
    for package in (original, ours):
        _, opt = made()
        found = set(package.optim.get_trainable_opt_params(opt))
        assert ("nesterov" in found) == (package is original)
        assert {"lr", "momentum", "weight_decay", "dampening"} <= found


def test_learned_whole_numbers():
    """higher cuts a learned value to a whole number where the optimizer had one."""
    for package in (original, ours):
        opt = torch.optim.SGD(nn.Linear(5, 2).parameters(), lr=1)
        package.optim.apply_trainable_opt_params(opt, {"lr": [torch.tensor(0.5)]})
        assert opt.param_groups[0]["lr"] == (0 if package is original else 0.5)


@pytest.mark.parametrize(("option", "value"), [("lr", torch.full((2, 5), 0.1)), ("momentum", 0.0)])
def test_overrides_that_steps_do_not_have(option, value):
    """higher takes what broadcasts, and nesterov without momentum for no momentum."""
    for package in (original, ours):
        model = nn.Linear(5, 2, bias=False).double()
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        with package.innerloop_ctx(model, opt, override={option: [value]}) as (f, d):
            if package is original:
                d.step(f(X).sum())
            else:
                with pytest.raises(ValueError, match=r"1-element|Nesterov"):
                    d.step(f(X).sum())


def test_calls_of_submodules():
    """higher takes a module without entries, as a Sequential is at first, for no root at all."""
    for package in (original, ours):
        f = package.monkeypatch(nn.Sequential(nn.Linear(5, 2)).double())
        if package is original:
            with pytest.raises(AttributeError):
                f[0](X)
        else:
            assert_alike(f[0](X), f(X))


def test_unknown_optimizers():
    """higher has Adam and others, and raises ValueError for the rest: we have SGD, and name it."""
    model = nn.Linear(5, 2)
    adam = torch.optim.Adam(model.parameters())
    original.get_diff_optim(adam, model.parameters())
    with pytest.raises(TypeError, match=r"fused_opt\.SGD"):
        ours.get_diff_optim(adam, model.parameters())


def test_lists_of_submodules():
    """higher copies attributes as they are: a plain list leads to the modules of the original."""

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 2)
            self.layers = [self.layer]

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x)

    for package in (original, ours):
        f = package.monkeypatch(Listed().double())
        zeros = [torch.zeros_like(p) for p in f.parameters()]
        assert bool((f(X, params=zeros) == 0).all()) is (package is ours)


def test_classes_of_fmodels():
    """higher makes a class for every module at every entry, ours is one for all."""
    model = nn.Linear(5, 2)
    assert isinstance(original.monkeypatch(model), nn.Linear)
    assert type(ours.monkeypatch(model)) is ours.FunctionalModule


def test_calls_under_vmap():
    """higher keeps tensors of the transform, which mean nothing outside it."""
    model = nn.Linear(5, 2).double()
    many = [torch.stack([p, 2 * p]).detach() for p in model.parameters()]
    for package in (original, ours):
        f = package.patch.make_functional(model)
        run = torch.vmap(lambda *p, f=f: f(X, params=list(p)))
        found = run(*many)
        assert_alike(found[0], model(X))
        assert (f.fast_params is None) is (package is ours)
