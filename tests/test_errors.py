"""Bad input is refused with a message that says what to do, and nothing has changed by then."""

import contextlib
import itertools
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from reference import DTYPES, assert_same_bits, make_params, random_tensor, set_gradients
from torch import Tensor, nn

import fused_opt
from fused_opt import EMA, SGD
from fused_opt.functional import ema_update_, sgd_step_

BF16 = torch.bfloat16


@contextlib.contextmanager
def refused(
    tensors: Iterable[Tensor | None],
    *words: str,
    error: type[Exception] | tuple[type[Exception], ...] = ValueError,
) -> Iterator[None]:
    """The block raises an error whose message has the words, and leaves every tensor as it was."""
    watched = [t for t in tensors if isinstance(t, Tensor) and t.dtype in DTYPES and not t.is_meta]
    before = [(t, t.detach().clone(), t._version, t.data_ptr()) for t in watched]
    with pytest.raises(error) as caught:
        yield
    for word in words:
        assert re.search(word, str(caught.value)), f"{word!r} is not in: {caught.value}"
    assert "Exception raised from" not in str(caught.value), "torch's C++ stack trace shows"
    for i, (t, values, version, pointer) in enumerate(before):
        assert_same_bits(t, values, f"tensor {i}")
        assert t._version == version, f"tensor {i} counts a write"
        assert t.data_ptr() == pointer


# --- the functional form -------------------------------------------------------------------------

Arguments = dict[str, Any]


def good_arguments() -> Arguments:
    """A step that passes, with everything that a step can have."""
    shapes = [(3, 4), (5,), (2, 3)]
    return {
        "params": [random_tensor(s, seed=i) for i, s in enumerate(shapes)],
        "grads": [random_tensor(s, seed=10 + i) for i, s in enumerate(shapes)],
        "momentum_buffers": [random_tensor(shapes[0], seed=20), None, random_tensor(shapes[2])],
        "shadows": [random_tensor(s, seed=30 + i) for i, s in enumerate(shapes)],
        "lr": 0.1,
        "momentum": 0.9,
        "decay": 0.9,
    }


def tensors_in(arguments: Arguments) -> list[Tensor]:
    lists = [value for value in arguments.values() if isinstance(value, list)]
    return [t for t in itertools.chain.from_iterable(lists) if isinstance(t, Tensor)]


def put(name: str, index: int, change: Callable[[Tensor], Any]) -> Callable[[Arguments], None]:
    """Replaces one entry of one list."""

    def damage(arguments: Arguments) -> None:
        arguments[name][index] = change(arguments[name][index])

    return damage


def set_to(**changes: Any) -> Callable[[Arguments], None]:
    return lambda arguments: arguments.update(changes)


def shorten(name: str) -> Callable[[Arguments], None]:
    return lambda arguments: arguments[name].pop()


def same_tensor_twice(arguments: Arguments) -> None:
    arguments["params"][2] = arguments["params"][0]
    arguments["grads"][2] = arguments["grads"][0].clone()
    arguments["momentum_buffers"][2] = arguments["momentum_buffers"][0].clone()
    arguments["shadows"][2] = arguments["shadows"][0].clone()


def overlapping_halves(arguments: Arguments) -> None:
    memory = random_tensor((20,))
    arguments["params"][0], arguments["params"][2] = (
        memory[:12].view(3, 4),
        memory[11:17].view(2, 3),
    )


def overlapping_shadows(arguments: Arguments) -> None:
    memory = random_tensor((20,))
    arguments["shadows"][0] = memory[:12].view(3, 4)
    arguments["shadows"][2] = memory[11:17].view(2, 3)


def shared_momentum(arguments: Arguments) -> None:
    memory = random_tensor((12,))
    arguments["momentum_buffers"][0] = memory.view(3, 4)
    arguments["momentum_buffers"][2] = memory[:6].view(2, 3)


def shadow_is_the_parameter(arguments: Arguments) -> None:
    arguments["shadows"][0] = arguments["params"][0]


def double_params(arguments: Arguments) -> None:
    arguments["params"][1] = arguments["params"][1].double()


def expand(t: Tensor) -> Tensor:
    return torch.ones(1).expand(t.shape)


def transpose(t: Tensor) -> Tensor:
    return t.t().contiguous()


# What is wrong, how it comes about, and what the message must name: the argument, what was
# expected, what came.
BAD_STEPS: dict[str, tuple[Callable[[Arguments], Any], tuple[str, ...]]] = {
    "gradient in fp64": (put("grads", 1, Tensor.double), ("grad", "float64", "float32")),
    "gradient in int32": (put("grads", 1, Tensor.int), ("grad", "int32", "float32")),
    "gradient in fp8": (
        put("grads", 1, lambda g: g.to(torch.float8_e4m3fn)),
        ("grad", "float8", "float32"),
    ),
    "fp32 gradient of an fp64 parameter": (double_params, ("grad", "float32", "float64")),
    "integer parameter": (put("params", 1, Tensor.int), ("param", "int32")),
    "gradient on another device": (
        put("grads", 2, lambda g: g.to("meta")),
        ("grad", "meta", "cpu"),
    ),
    "parameter on another device": (put("params", 2, lambda p: p.to("meta")), ("meta", "cpu")),
    "momentum on another device": (
        put("momentum_buffers", 2, lambda v: v.to("meta")),
        ("momentum", "meta", "cpu"),
    ),
    "shadow on another device": (
        put("shadows", 2, lambda s: s.to("meta")),
        ("shadow", "meta", "cpu"),
    ),
    "transposed gradient": (put("grads", 0, transpose), ("grad", "3, 4", "4, 3")),
    "flat gradient": (put("grads", 0, torch.flatten), ("grad", "3, 4", "12")),
    "gradient with one element more": (
        put("grads", 1, lambda g: torch.cat([g, g[:1]])),
        ("grad", "5", "6"),
    ),
    "0-dim gradient": (put("grads", 1, torch.sum), ("grad", "5")),
    "momentum of the wrong size": (
        put("momentum_buffers", 2, lambda v: v[:1]),
        ("momentum", "2, 3", "1, 3"),
    ),
    "momentum of another dtype": (
        put("momentum_buffers", 0, Tensor.double),
        ("momentum", "float64", "float32"),
    ),
    "shadow of the wrong shape": (put("shadows", 1, lambda s: s[:4]), ("shadow", "5", "4")),
    "shadow of another dtype": (
        put("shadows", 1, Tensor.double),
        ("shadow", "float64", "float32"),
    ),
    "fewer gradients": (shorten("grads"), ("grads", "2", "3")),
    "fewer momentum buffers": (shorten("momentum_buffers"), ("momentum_buffers", "2", "3")),
    "fewer shadows": (shorten("shadows"), ("shadows", "2", "3")),
    "fewer parameters": (shorten("params"), ("2", "3")),
    "no momentum buffers": (set_to(momentum_buffers=None), ("momentum_buffers",)),
    "decay above one": (set_to(decay=1.5), ("decay", r"1\.5", r"0.*1")),
    "decay below zero": (set_to(decay=-0.25), ("decay", r"-0\.25")),
    "decay nan": (set_to(decay=float("nan")), ("decay", "nan")),
    "shadows without decay": (set_to(decay=None), ("decay",)),
    "decay without shadows": (set_to(shadows=None), ("shadows",)),
    "unknown formulation": (
        set_to(formulation="nesterov1983"),
        ("formulation", "nesterov1983", "torch", "sutskever"),
    ),
    "learning rate of two elements": (set_to(lr=torch.tensor([0.1, 0.2])), ("lr", "1-element|2")),
    "the same parameter twice": (same_tensor_twice, ("param",)),
    "parameters that overlap": (overlapping_halves, ("param",)),
    "shadows that overlap": (overlapping_shadows, ("shadow",)),
    "momentum that overlaps": (shared_momentum, ("momentum",)),
    "a shadow that is its parameter": (shadow_is_the_parameter, ("memory|overlap",)),
    "expanded parameter": (put("params", 1, expand), ("param",)),
    "expanded momentum": (put("momentum_buffers", 0, expand), ("momentum",)),
    "expanded shadow": (put("shadows", 1, expand), ("shadow",)),
}


@pytest.mark.parametrize("bad", BAD_STEPS)
def test_a_bad_step_is_refused_and_changes_nothing(bad):
    damage, words = BAD_STEPS[bad]
    arguments = good_arguments()
    sgd_step_(**arguments)
    arguments = good_arguments()
    damage(arguments)
    with refused(tensors_in(arguments), *words):
        sgd_step_(**arguments)
    if isinstance(arguments["momentum_buffers"], list):
        assert arguments["momentum_buffers"][1] is None, "a first buffer was left behind"


@pytest.mark.parametrize("name", ["params", "grads", "shadows", "momentum_buffers"])
@pytest.mark.parametrize("thing", [1.0, "weights", [1.0, 2.0]], ids=["float", "str", "list"])
def test_what_is_no_tensor_is_refused_by_name(name, thing):
    arguments = good_arguments()
    arguments[name][2] = thing
    with refused(tensors_in(arguments), name, type(thing).__name__, error=TypeError):
        sgd_step_(**arguments)


def test_none_among_the_parameters_is_refused():
    arguments = good_arguments()
    arguments["params"][2] = None
    with refused(tensors_in(arguments), "params", "None", error=TypeError):
        sgd_step_(**arguments)


BAD_UPDATES: dict[str, tuple[Callable[[Arguments], Any], tuple[str, ...]]] = {
    "fewer shadows": (shorten("shadows"), ("shadows", "2", "3")),
    "shadow of the wrong shape": (put("shadows", 1, lambda s: s[:4]), ("shadow", "5", "4")),
    "shadow of another dtype": (put("shadows", 1, Tensor.int), ("shadow", "int32", "float32")),
    "shadow on another device": (put("shadows", 2, lambda s: s.to("meta")), ("meta", "cpu")),
    "decay above one": (set_to(decay=1.001), ("decay", r"1\.001")),
    "decay below zero": (set_to(decay=-1), ("decay", "-1")),
    "decay nan": (set_to(decay=float("nan")), ("decay", "nan")),
    "shadows that overlap": (overlapping_shadows, ("shadow",)),
    "a shadow that is its parameter": (shadow_is_the_parameter, ("memory|overlap",)),
    "expanded shadow": (put("shadows", 1, expand), ("shadow",)),
}


@pytest.mark.parametrize("bad", BAD_UPDATES)
def test_a_bad_update_is_refused_and_changes_nothing(bad):
    damage, words = BAD_UPDATES[bad]
    arguments = {name: good_arguments()[name] for name in ("shadows", "params", "decay")}
    damage(arguments)
    with refused(tensors_in(arguments), *words):
        ema_update_(**arguments)


@pytest.mark.parametrize("name", ["params", "shadows"])
@pytest.mark.parametrize("thing", [1.0, None])
def test_an_update_of_what_is_no_tensor_is_refused_by_name(thing, name):
    arguments = {name: good_arguments()[name] for name in ("shadows", "params", "decay")}
    arguments[name][2] = thing
    with refused(tensors_in(arguments), name, type(thing).__name__, error=TypeError):
        ema_update_(**arguments)


def test_parameters_read_by_an_update_may_overlap():
    """An update only reads them: tied weights need not be told apart here."""
    memory = random_tensor((6,))
    params = [memory[:4], memory[2:], memory[:1].expand(3)]
    shadows = [torch.zeros(4), torch.zeros(4), torch.zeros(3)]
    ema_update_(shadows, params, decay=0.5)
    for s, p in zip(shadows, params, strict=True):
        assert_same_bits(s, p * 0.5)


# --- overlap -------------------------------------------------------------------------------------

# Two views of one memory that share no element, though their ranges of addresses interleave.
INTERLEAVED: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "columns": lambda m: tuple(m[:, j] for j in range(m.shape[1])),
    "rows": lambda m: tuple(m[i] for i in range(m.shape[0])),
    "blocks of columns": lambda m: (m[:, :2], m[:, 2:]),
    "even and odd": lambda m: (m.view(-1)[::2], m.view(-1)[1::2]),
    "a column and the rest": lambda m: (m[:, 0], m[:, 1:]),
    "a block and a column beside it": lambda m: (m[1:3, 1:], m[:, 0]),
    "neighbours": lambda m: (m.view(-1)[:7], m.view(-1)[7:]),
    "transposed blocks": lambda m: (m.t()[:2], m.t()[2:]),
}

OVERLAPPING: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "the same": lambda m: (m, m),
    "a view of it": lambda m: (m, m.view(-1)),
    "a row": lambda m: (m, m[1]),
    "a row and a column": lambda m: (m[1], m[:, 2]),
    "shifted": lambda m: (m.view(-1)[:8], m.view(-1)[7:]),
    "blocks of columns": lambda m: (m[:, :3], m[:, 2:]),
    "every second and every third": lambda m: (m.view(-1)[::2], m.view(-1)[1::3]),
    "one element": lambda m: (m[:, 1], m[2, 1]),
    "transposed": lambda m: (m, m.t()),
}


def with_gradients(views: Iterable[Tensor]) -> list[nn.Parameter]:
    params = [nn.Parameter(v) for v in views]
    set_gradients(params, seed=1)
    return params


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("case", INTERLEAVED)
def test_interleaved_parameters_step_independently(case, grouped):
    memory = random_tensor((5, 4))
    params = with_gradients(INTERLEAVED[case](memory))
    alone = [nn.Parameter(p.detach().clone()) for p in params]
    set_gradients(alone, seed=1)
    groups = [{"params": [p]} for p in params] if grouped else params
    one, two = SGD(groups, lr=0.1, momentum=0.9), SGD(alone, lr=0.1, momentum=0.9)
    for step in range(3):
        set_gradients(params, seed=step)
        set_gradients(alone, seed=step)
        one.step()
        two.step()
    for p, q in zip(params, alone, strict=True):
        assert_same_bits(p, q)
        assert_same_bits(one.state[p]["momentum_buffer"], two.state[q]["momentum_buffer"])


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("case", OVERLAPPING)
def test_overlapping_parameters_are_refused(case, grouped):
    memory = random_tensor((5, 5))
    params = with_gradients(OVERLAPPING[case](memory))
    groups = [{"params": [p]} for p in params] if grouped else params
    optimizer = SGD(groups, lr=0.1, momentum=0.9)
    with refused([memory, *params, *(p.grad for p in params)], "param|memory|overlap"):
        optimizer.step()
    assert not any(optimizer.state.get(p) for p in params)


def test_an_overlap_that_appears_later_is_refused():
    """A check that remembers what it has seen must notice a replaced storage."""
    params = make_params([(4,), (4,)])
    optimizer = SGD(params, lr=0.1)
    for step in range(2):
        set_gradients(params, seed=step)
        optimizer.step()
    params[1].data = params[0].data
    with refused([*params, *(p.grad for p in params)], "param|memory|overlap"):
        optimizer.step()
    params[1].data = params[0].detach().clone()
    optimizer.step()
    params[1].data = params[0].data
    with refused([*params, *(p.grad for p in params)], "param|memory|overlap"):
        optimizer.step()


@pytest.mark.parametrize("trial", range(40))
def test_random_views_are_refused_exactly_when_they_share_an_element(trial):
    generator = torch.Generator().manual_seed(trial)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    memory, index = torch.zeros(64), torch.arange(64)
    views, elements = [], []
    for _ in range(2):
        where = (pick(1, 4), pick(1, 4)), (pick(1, 9), pick(1, 5)), pick(0, 16)
        views.append(torch.as_strided(memory, *where))
        elements.append(torch.as_strided(index, *where).flatten().tolist())
    together = elements[0] + elements[1]
    params = with_gradients(views)
    optimizer = SGD(params, lr=1.0)
    if len(set(together)) < len(together):
        with refused([memory], "param|memory|overlap"):
            optimizer.step()
        return
    optimizer.step()
    expected = torch.zeros(64)
    for p, where in zip(params, elements, strict=True):
        expected[where] -= p.grad.flatten()
    assert torch.equal(memory, expected)


def test_an_expanded_parameter_is_refused():
    memory = torch.zeros(1)
    param = nn.Parameter(memory.expand(4))
    param.grad = torch.ones(4)
    with refused([memory, param.grad], "param|memory|overlap"):
        SGD([param], lr=0.1).step()


def test_an_expanded_gradient_is_read_like_any_other():
    """What `param.sum().backward()` may leave behind."""
    params = make_params([(3, 4)])
    before = params[0].detach().clone()
    params[0].grad = torch.ones(1).expand(3, 4)
    SGD(params, lr=1.0, momentum=0.9).step()
    assert_same_bits(params[0], before - 1.0)


@pytest.mark.parametrize("shared", ["expanded", "two parameters", "overlapping"])
def test_a_shared_gradient_is_never_reset_before_all_have_read_it(shared):
    """Either refused with nothing changed, or right: a reset must not be read as a gradient."""
    params = make_params([(4,), (4,)])
    memory = torch.ones(5)
    params[0].grad, params[1].grad = {
        "expanded": (memory[:1].expand(4), torch.ones(4)),
        "two parameters": (memory[:4], memory[:4]),
        "overlapping": (memory[:4], memory[1:]),
    }[shared]
    before = [p.detach().clone() for p in params]
    optimizer = SGD(params, lr=1.0, reset_grads=True)
    refusal = None
    try:
        optimizer.step()
    except ValueError as error:
        refusal = str(error)
    if refusal is not None:
        assert "grad" in refusal
        assert memory.tolist() == [1.0] * 5
    else:
        assert not any(p.grad.any() for p in params)
    for p, old in zip(params, before, strict=True):
        assert_same_bits(p, old if refusal is not None else old - 1.0)


# --- through the optimizer -----------------------------------------------------------------------


class Training:
    """An optimizer of two groups with an average, two steps on its way, gradients at hand."""

    def __init__(self, **options: Any) -> None:
        self.params = make_params([(3, 4), (5,), (2, 3), (7,)])
        self.ema = EMA(self.params, decay=0.5)
        groups = [{"params": self.params[:2]}, {"params": self.params[2:], "lr": 0.2}]
        options = {"lr": 0.1, "momentum": 0.9, "reset_grads": True, **options}
        self.optimizer = SGD(groups, ema=self.ema, **options)
        for step in range(2):
            set_gradients(self.params, seed=step)
            self.optimizer.step()
        set_gradients(self.params, seed=2)

    def tensors(self) -> list[Tensor]:
        state = self.optimizer.state
        return [
            *self.params,
            *(p.grad for p in self.params if p.grad is not None),
            *(s for p in self.params for s in state[p].values() if isinstance(s, Tensor)),
            *self.ema.shadows.values(),
        ]


def give_double_gradient(training: Training) -> None:
    param = training.params[3]
    param.grad = None
    param.grad_dtype = torch.float64
    param.grad = torch.ones(7, dtype=torch.float64)


def give_state(key: str, value: Tensor) -> Callable[[Training], None]:
    def damage(training: Training) -> None:
        training.optimizer.state[training.params[3]][key] = value

    return damage


def give_option(**options: Any) -> Callable[[Training], None]:
    return lambda training: training.optimizer.param_groups[1].update(options)


def share_memory(training: Training) -> None:
    training.params[3].data = training.params[1].data.view(-1)[:1].expand(7)


def shrink_shadow(training: Training) -> None:
    training.ema.shadows["3"].data = torch.zeros(6)


BAD_TRAININGS: dict[str, tuple[Callable[[Training], Any], tuple[str, ...]]] = {
    "gradient of an unsupported dtype": (give_double_gradient, ("grad", "float64", "float32")),
    "momentum buffer of the wrong size": (
        give_state("momentum_buffer", torch.zeros(6)),
        ("momentum", "7", "6"),
    ),
    "momentum buffer of another dtype": (
        give_state("momentum_buffer", torch.zeros(7, dtype=torch.float64)),
        ("momentum", "float64", "float32"),
    ),
    "momentum buffer on another device": (
        give_state("momentum_buffer", torch.zeros(7, device="meta")),
        ("momentum", "meta", "cpu"),
    ),
    "overlapping parameters": (share_memory, ("param|memory|overlap",)),
    "unknown formulation": (give_option(formulation="heavy"), ("formulation", "heavy")),
    "shadow of the wrong shape": (shrink_shadow, ("shadow", "7", "6")),
    "learning rate of two elements": (give_option(lr=torch.ones(2)), ("lr",)),
}


@pytest.mark.parametrize("bad", BAD_TRAININGS)
def test_a_fault_in_the_last_group_leaves_the_first_untouched(bad):
    damage, words = BAD_TRAININGS[bad]
    training = Training()
    damage(training)
    with refused(training.tensors(), *words):
        training.optimizer.step()
    assert training.ema.num_updates == 2


@pytest.mark.parametrize("formulation", ["torch", "sutskever"])
def test_a_refused_first_step_leaves_no_state(formulation):
    params = make_params([(3,), (4,)])
    set_gradients(params, seed=0)
    params[1].grad = None
    params[1].grad_dtype = torch.float64
    params[1].grad = torch.ones(4, dtype=torch.float64)
    optimizer = SGD(params, lr=0.1, momentum=0.9, formulation=formulation)
    with refused([*params, *(p.grad for p in params)], "grad"):
        optimizer.step()
    assert not any(optimizer.state.get(p) for p in params)
    params[1].grad = None
    optimizer.step()  # and the first step is still a first step
    assert list(optimizer.state[params[0]])


def test_training_goes_on_after_a_refused_step():
    refused_once, never = Training(), Training()
    buffer = refused_once.optimizer.state[refused_once.params[3]]["momentum_buffer"]
    give_state("momentum_buffer", torch.zeros(6))(refused_once)
    with pytest.raises(ValueError, match="momentum"):
        refused_once.optimizer.step()
    give_state("momentum_buffer", buffer)(refused_once)
    refused_once.optimizer.step()
    never.optimizer.step()
    for a, b in zip(refused_once.tensors(), never.tensors(), strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_a_decay_made_invalid_later_is_refused(decay):
    """When it is set, or when it is used."""
    training = Training()
    with refused(training.tensors(), "decay", str(decay)):
        training.ema.decay = decay
        training.optimizer.step()


# --- constructors --------------------------------------------------------------------------------

BAD_OPTIONS: list[dict[str, Any]] = [
    {"lr": torch.tensor([0.1, 0.2])},
    {"lr": -0.1},
    {"lr": float("-inf")},
    {"lr": torch.tensor(-0.1)},
    {"momentum": -0.5},
    {"weight_decay": -0.5},
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.9, "dampening": 0.5},
    {"fused": True, "differentiable": True},
    {"fused": True, "foreach": True},
]
# Every pair tells which of two faults is reported, that is, the order of the checks.
BAD_PAIRS = [
    {**a, **b} for a, b in itertools.combinations(BAD_OPTIONS, 2) if not a.keys() & b.keys()
]


@pytest.mark.parametrize("options", BAD_OPTIONS + BAD_PAIRS, ids=str)
def test_the_constructor_refuses_what_torch_refuses_in_its_words(options):
    params = make_params([(3,)])
    with pytest.raises(Exception, match=r"\S") as theirs:
        torch.optim.SGD(params, **options)
    with pytest.raises(theirs.type) as ours:
        SGD(params, **options)
    assert str(ours.value) == str(theirs.value)


ACCEPTED_OPTIONS: list[dict[str, Any]] = [
    {"lr": float("nan")},
    {"lr": float("inf")},
    {"dampening": -0.5, "momentum": 0.9},
    {"foreach": True, "lr": torch.tensor(0.1)},
    {"fused": True},
    {"foreach": True},
]


@pytest.mark.parametrize("options", ACCEPTED_OPTIONS, ids=str)
def test_the_constructor_accepts_what_torch_accepts(options):
    params = make_params([(3,)])
    torch.optim.SGD(params, **options)
    SGD(params, **options)


BAD_PARAMS: dict[str, Callable[[], Any]] = {
    "nothing": list,
    "a bare tensor": lambda: torch.zeros(3, requires_grad=True),
    "a number": lambda: [1.0],
    "a result": lambda: [torch.zeros(3, requires_grad=True) * 2],
    "twice in two groups": lambda: (lambda p: [{"params": [p]}, {"params": [p]}])(
        nn.Parameter(torch.zeros(3))
    ),
    "a number among the groups": lambda: [{"params": make_params([(3,)]), "momentum": 0.9}, 3],
}


@pytest.mark.parametrize("bad", BAD_PARAMS)
def test_parameters_that_torch_refuses_are_refused_in_its_words(bad):
    params = BAD_PARAMS[bad]()
    with pytest.raises(Exception, match=r"\S") as theirs:
        torch.optim.SGD(params, lr=0.1)
    with pytest.raises(theirs.type) as ours:
        SGD(params, lr=0.1)
    assert str(ours.value) == str(theirs.value)


def test_the_options_of_ours_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        SGD(make_params([(3,)]), 0.1, 0, 0, 0, False, False)


@pytest.mark.parametrize("formulation", ["polyak", "", None, 1])
def test_an_unknown_formulation_is_refused(formulation):
    words = ("formulation", "torch", "sutskever", repr(formulation))
    with refused([], *words, error=(ValueError, TypeError)):
        SGD(make_params([(3,)]), lr=0.1, formulation=formulation)


def test_an_unknown_formulation_of_a_group_is_refused():
    """When the group comes, or at the step."""
    params = make_params([(3,)])
    set_gradients(params, seed=0)
    with refused(params, "formulation", "polyak"):
        SGD([{"params": params, "formulation": "polyak"}], lr=0.1).step()


BAD_AVERAGES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "decay above one": (lambda: EMA(make_params([(3,)]), decay=1.5), ("decay", r"1\.5")),
    "decay below zero": (lambda: EMA(make_params([(3,)]), decay=-1e-9), ("decay", "-1e-09")),
    "decay nan": (lambda: EMA(make_params([(3,)]), decay=float("nan")), ("decay", "nan")),
    "no parameters": (lambda: EMA([]), ("param",)),
    "a module without parameters": (lambda: EMA(nn.Tanh()), ("param",)),
    "a number": (lambda: EMA(3), ("model_or_params|param",)),
    "a list of numbers": (lambda: EMA([1.0, 2.0]), ("param", "float")),
    "a bare tensor": (lambda: EMA(torch.zeros(3)), ("param",)),
    "the same name twice": (
        lambda: EMA([("w", torch.zeros(3)), ("w", torch.zeros(4))]),
        ("w",),
    ),
}


@pytest.mark.parametrize("bad", BAD_AVERAGES)
def test_a_bad_average_is_refused(bad):
    make, words = BAD_AVERAGES[bad]
    with refused([], *words, error=(ValueError, TypeError)):
        make()


def test_an_average_of_parameters_that_became_other_shapes_is_refused():
    params = make_params([(3,), (4,)])
    ema = EMA(params)
    params[1].data = torch.zeros(5)
    with refused(ema.shadows.values(), "4", "5"):
        ema.update()
    assert ema.num_updates == 0


# --- what CUDA reports ---------------------------------------------------------------------------

# The number of a CUDA error, and what its advice must speak of.
CUDA_ERRORS = {
    3: ("fork", "spawn"),  # cudaErrorInitializationError
    35: ("driver", "[Uu]pdate|[Uu]pgrade|[Ii]nstall"),  # cudaErrorInsufficientDriver
    100: ("GPU|device", "CUDA_VISIBLE_DEVICES|nvidia-smi|CPU|cpu"),  # cudaErrorNoDevice
    209: ("architecture|compute capability", "[Bb]uild|[Ii]nstall"),  # NoKernelImageForDevice
    222: ("older than CUDA", "[Uu]pdate the driver, or rebuild"),  # cudaErrorUnsupportedPtxVersion
    801: ("R530", "4 KB", "update"),  # cudaErrorNotSupported
}


@pytest.mark.parametrize("code", CUDA_ERRORS)
def test_an_error_of_cuda_comes_with_advice(code):
    advice = fused_opt._cuda_advice.cuda_advice(code)
    for word in CUDA_ERRORS[code]:
        assert re.search(word, advice), f"{word!r} is not in: {advice}"


def test_an_error_of_cuda_without_advice_is_still_text():
    assert isinstance(fused_opt._cuda_advice.cuda_advice(999), str)


@pytest.mark.parametrize("code", [209, 222])
def test_a_gpu_without_code_is_named_with_the_command_that_builds_it(code, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU number {device}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, device))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    module = fused_opt._native.native()
    monkeypatch.setattr(module, "cuda_version", "12.8")
    monkeypatch.setattr(module, "cuda_archs", ["75", "90"])
    monkeypatch.setattr(module, "ptx_archs", ["75"])

    def run(device, threads):
        raise module.CudaError(code, "cudaErrorSomething while loading the kernel")

    with pytest.raises(RuntimeError) as caught:
        fused_opt._launch.launch(1, run)
    message = str(caught.value)
    assert message.startswith("cudaErrorSomething while loading the kernel. ")
    assert "GPU number 1 (cuda:1) is of architecture 121" in message
    assert "built with machine code 75 90 and PTX 75" in message
    assert "`python -m fused_opt.doctor`" in message
    assert re.search(r": .*FUSED_OPT_CUDA=1 FUSED_OPT_CUDA_ARCHS=121 .*pip install .+$", message)
    assert ("older than CUDA 12.8" in message) is (code == 222)


def test_a_driver_too_old_for_the_runtime_is_told_which_one_to_get(monkeypatch):
    for cuda_version, driver in (
        ("12.4", r"R530 \(CUDA 12\.1\)"),
        ("13.0", r"R580 \(CUDA 13\.0\)"),
    ):
        monkeypatch.setattr(fused_opt._C, "cuda_version", cuda_version)
        advice = fused_opt._cuda_advice.cuda_advice(35)
        assert re.search(f"made with CUDA {cuda_version}. Update the driver to {driver} or", advice)
        assert "`python -m fused_opt.doctor`" in advice


def test_cuda_tensors_and_a_cpu_only_module_end_in_the_command_that_builds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fused_opt._native.native(), "cuda_version", None)
    plan = fused_opt._plan.Plan()
    plan._native = types.SimpleNamespace(check=lambda: None, devices=lambda: [-1, 0])
    with pytest.raises(RuntimeError, match=r"without CUDA kernels.*FUSED_OPT_CUDA_ARCHS=90 .*pip"):
        plan.run()


def test_a_differentiable_step_of_cuda_tensors_ends_in_the_same_command(monkeypatch):
    module = fused_opt._native.native()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(module, "cuda_version", None)
    monkeypatch.setattr(module, "fit_pass", lambda streams, rules: (0, 0, 1))  # on cuda:0
    tensors = [torch.ones(3)]
    with pytest.raises(RuntimeError, match=r"without CUDA kernels.*FUSED_OPT_CUDA_ARCHS=90 .*pip"):
        fused_opt.functional.sgd_step(tensors, tensors, lr=0.1)
    with pytest.raises(RuntimeError, match=r"without CUDA kernels.*FUSED_OPT_CUDA_ARCHS=90 .*pip"):
        fused_opt.functional.ema_update(tensors, tensors, decay=0.9)


def test_a_module_that_is_missing_points_to_the_doctor(monkeypatch):
    monkeypatch.delattr(fused_opt, "_C")
    monkeypatch.setitem(sys.modules, "fused_opt._C", None)
    with pytest.raises(ImportError, match=r"`python -m fused_opt\.doctor` explains"):
        fused_opt.build_info()
