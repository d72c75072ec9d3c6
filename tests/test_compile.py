"""torch.compile: the functional steps inside a graph, and the classes at one graph break.

The oracle is the same code in eager mode, to the last bit. Most graphs run through "aot_eager",
which traces and functionalizes like "inductor" and generates no code; "inductor" has its own tests.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from reference import assert_same_bits, make_params, random_tensor, set_gradients
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from torch.library import opcheck

from fused_opt import EMA, SGD, clip_grad_norm_, functional
from fused_opt.functional import ema_update_, sgd_step_

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16

SHAPES = [(5, 7), (17,), (), (2, 3, 4)]
SAME = [F32] * 4
MIXED = [F32, BF16, F16, F64]
CALLS = 5

ops = torch.ops.fused_opt


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """No test sees what another has compiled, in this process or in a cache on disk."""
    torch._dynamo.reset()
    counters.clear()
    graphs_on_disk = torch._inductor.config.patch(fx_graph_cache=False)
    with graphs_on_disk, torch._functorch.config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


@pytest.fixture(params=["aot_eager", "inductor"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def inductor_at_hand(device: torch.device) -> None:
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        pytest.skip("inductor needs triton on a GPU")


def tensors(dtypes: Sequence[torch.dtype], device: Any = "cpu", seed: int = 0) -> list[Tensor]:
    return [
        random_tensor(shape, dtype, device, seed=100 * seed + i)
        for i, (shape, dtype) in enumerate(zip(SHAPES, dtypes, strict=True))
    ]


def graphs() -> int:
    """How many graphs have been compiled."""
    return counters["stats"]["unique_graphs"]


def graph_breaks() -> int:
    return sum(counters["graph_break"].values())


def assert_lists_same(
    actual: Sequence[Tensor | None], expected: Sequence[Tensor | None], what: str
) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a is None) == (e is None), f"{what}[{i}]"
        if a is not None and e is not None:
            assert_same_bits(a, e, f"{what}[{i}]")


# --- the functional steps in a graph -------------------------------------------------------------


def rounded_away(dtype: torch.dtype, kind: str, like: Tensor) -> Tensor | None:
    """A refinement of a half-precision parameter."""
    if dtype not in (BF16, F16):
        return None
    if kind == "kahan":
        return torch.zeros_like(like)
    if dtype == BF16:
        return torch.full_like(like, 77, dtype=torch.int16)
    return like.float()


#: Arguments of `sgd_step_` besides its lists, and how `Lists` makes those.
CASES: dict[str, dict[str, Any]] = {
    "no momentum": {"buffers": "none at all", "weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "momentum from the start": {"momentum": 0.9, "buffers": "all"},
    "some first steps, damped": {"momentum": 0.9, "dampening": 0.5, "buffers": "some"},
    "nesterov, sutskever, maximize": {
        "momentum": 0.9,
        "nesterov": True,
        "maximize": True,
        "formulation": "sutskever",
    },
    "decoupled weight decay": {
        "momentum": 0.9,
        "weight_decay": 0.1,
        "decoupled_weight_decay": True,
    },
    "mixed dtypes": {"momentum": 0.9, "dtypes": MIXED},
    "float32 momentum": {"momentum": 0.9, "dtypes": [F32, BF16, F16, BF16], "state_dtype": F32},
    "reset": {"momentum": 0.9, "reset_grads": True, "dtypes": MIXED},
    "shadows": {"momentum": 0.9, "decay": 0.9, "dtypes": MIXED},
    "some shadows": {"momentum": 0.9, "decay": 0.9, "without_shadow": (1, 3)},
    "no shadow at all": {"momentum": 0.9, "decay": 0.9, "without_shadow": (0, 1, 2, 3)},
    "refinements": {"momentum": 0.9, "dtypes": MIXED, "refinements": "split"},
    "stochastic rounding": {"momentum": 0.9, "dtypes": MIXED, "rounding": (2**64 - 1, 2**63)},
    "everything": {
        "momentum": 0.9,
        "weight_decay": 0.1,
        "nesterov": True,
        "dtypes": [BF16, F32, F16, BF16],
        "state_dtype": F32,
        "reset_grads": True,
        "decay": 0.5,
        "without_shadow": (2,),
        "refinements": "kahan",
    },
    "leaves that require gradients": {"momentum": 0.9, "requires_grad": True, "decay": 0.5},
}
FEW_CASES = ("momentum", "some first steps, damped", "everything", "leaves that require gradients")


class Lists:
    """What a case steps, the same whenever it is made."""

    def __init__(
        self,
        device: torch.device,
        dtypes: Sequence[torch.dtype] = SAME,
        buffers: str = "new",
        decay: float | None = None,
        without_shadow: Sequence[int] = (),
        refinements: str | None = None,
        requires_grad: bool = False,
        **options: Any,
    ) -> None:
        self.device, self.dtypes = device, dtypes
        self.params = [p.requires_grad_(requires_grad) for p in tensors(dtypes, device)]
        self.grads: list[Tensor] = []
        self.buffers: list[Tensor | None] | None = [None] * len(SHAPES)
        if buffers == "none at all":
            self.buffers = None
        elif buffers != "new":
            self.buffers = list(tensors(dtypes, device, 50))
            if buffers == "some":
                self.buffers[0] = self.buffers[2] = None
        self.shadows: list[Tensor | None] | None = None
        if decay is not None:
            wide = [F64 if dtype == F64 else F32 for dtype in dtypes]
            self.shadows = list(tensors(wide, device, 60))
            for i in without_shadow:
                self.shadows[i] = None
        self.refinements: list[Tensor | None] | None = None
        if refinements is not None:
            self.refinements = [
                rounded_away(d, refinements, p.detach())
                for d, p in zip(dtypes, self.params, strict=True)
            ]
        self.options = {"decay": decay, **options}

    def step(self, function: Callable[..., None], call: int) -> None:
        self.grads = tensors(self.dtypes, self.device, 1 + call)
        function(
            self.params, self.grads, self.buffers, self.shadows, self.refinements, **self.options
        )

    def assert_same(self, expected: Lists, what: str) -> None:
        for name in ("params", "grads", "buffers", "shadows", "refinements"):
            actual, wanted = getattr(self, name), getattr(expected, name)
            assert_lists_same(actual or [], wanted or [], f"{what}: {name}")


def step_with_lists(
    params: Any, grads: Any, buffers: Any, shadows: Any, refinements: Any, **options: Any
) -> None:
    options.setdefault("lr", 0.1)
    sgd_step_(params, grads, buffers, shadows=shadows, refinements=refinements, **options)


def assert_case(name: str, device: torch.device, backend: str) -> None:
    compiled = torch.compile(step_with_lists, fullgraph=True, backend=backend)
    actual, expected = Lists(device, **CASES[name]), Lists(device, **CASES[name])
    for call in range(CALLS):
        versions = [p._version for p in actual.params]
        actual.step(compiled, call)
        expected.step(step_with_lists, call)
        actual.assert_same(expected, f"call {call}")
        assert all(p._version > v for p, v in zip(actual.params, versions, strict=True))
    starts = None in (Lists(device, **CASES[name]).buffers or [])
    assert graphs() == 1 + starts


@pytest.mark.parametrize("name", CASES)
def test_step_in_a_graph_has_the_bits_of_eager(name, device):
    assert_case(name, device, "aot_eager")


@pytest.mark.parametrize("name", FEW_CASES)
def test_step_compiled_by_inductor_has_the_bits_of_eager(name, device):
    inductor_at_hand(device)
    assert_case(name, device, "inductor")


def test_buffers_of_a_first_step_are_kept_by_the_next(device, backend):
    inductor_at_hand(device)
    lists = Lists(device, momentum=0.9)
    compiled = torch.compile(step_with_lists, fullgraph=True, backend=backend)
    lists.step(compiled, 0)
    filled = list(lists.buffers or [])
    lists.step(compiled, 1)
    assert all(a is b for a, b in zip(lists.buffers or [], filled, strict=True))


@pytest.mark.parametrize("dtypes", [SAME, MIXED], ids=["float32", "mixed"])
def test_update_in_a_graph_has_the_bits_of_eager(dtypes, device, backend):
    inductor_at_hand(device)

    def update(shadows: list[Tensor], params: list[Tensor]) -> None:
        ema_update_(shadows, params, decay=0.9)

    compiled = torch.compile(update, fullgraph=True, backend=backend)
    wide = [F64 if dtype == F64 else F32 for dtype in dtypes]
    actual, expected = tensors(wide, device), tensors(wide, device)
    for call in range(CALLS):
        params = tensors(dtypes, device, 1 + call)
        compiled(actual, params)
        update(expected, params)
        assert_lists_same(actual, expected, f"call {call}")
    assert graphs() == 1


def test_empty_lists_are_a_step_of_nothing():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: Tensor) -> Tensor:
        sgd_step_([], [], [], lr=0.1, momentum=0.9)
        sgd_step_([], [], None, lr=0.1, shadows=[], decay=0.5)
        ema_update_([], [], decay=0.5)
        return x + 1

    assert step(torch.zeros(())) == 1


@pytest.mark.parametrize("name", ["lr", "momentum", "dampening", "weight_decay", "decay"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_number_that_is_a_tensor_may_change(shape, name, device, backend):
    inductor_at_hand(device)
    compiled = torch.compile(step_with_lists, fullgraph=True, backend=backend)
    options = {"momentum": 0.9, "decay": 0.5, "buffers": "all"}
    actual, expected = (Lists(device, **options) for _ in range(2))
    for call in range(CALLS):
        number = torch.full(shape, 0.1 / (1 + call), dtype=F64, device=device)
        actual.options[name] = expected.options[name] = number
        actual.step(compiled, call)
        expected.step(step_with_lists, call)
        actual.assert_same(expected, f"call {call}")
    assert graphs() == 1


@pytest.mark.parametrize("buffers", ["none", "all"])
def test_a_momentum_that_is_a_tensor_is_kept_where_it_holds_0(buffers, device, backend):
    inductor_at_hand(device)
    compiled = torch.compile(step_with_lists, fullgraph=True, backend=backend)
    actual, expected = (Lists(device, buffers=buffers) for _ in range(2))
    for call in range(CALLS):
        momentum = torch.tensor(0.3 * (call % 2), device=device)
        actual.options["momentum"] = expected.options["momentum"] = momentum
        actual.step(compiled, call)
        expected.step(step_with_lists, call)
        actual.assert_same(expected, f"call {call}")


@pytest.mark.parametrize("name", ["lr", "momentum", "dampening", "weight_decay", "decay"])
def test_a_number_that_changes_is_compiled_once_more(name, backend):
    compiled = torch.compile(step_with_lists, fullgraph=True, backend=backend)
    options = {"momentum": 0.9, "dampening": 0.1, "decay": 0.5, "buffers": "all", "lr": 0.1}
    actual, expected = (Lists(torch.device("cpu"), **options) for _ in range(2))
    for call in range(CALLS):
        # Numbers that float32 cannot hold: they must not be rounded on their way.
        actual.options[name] = expected.options[name] = 0.9 / (1 + call)
        actual.step(compiled, call)
        expected.step(step_with_lists, call)
        actual.assert_same(expected, f"call {call}")
    assert graphs() == 2


def test_the_count_of_roundings_is_compiled_once_more(backend):
    compiled = torch.compile(step_with_lists, fullgraph=True, backend=backend)
    options = {"dtypes": MIXED, "momentum": 0.9, "buffers": "all"}
    actual, expected = (Lists(torch.device("cpu"), **options) for _ in range(2))
    for call in range(CALLS):
        actual.options["rounding"] = expected.options["rounding"] = (2**64 - 1, 7 + call)
        actual.step(compiled, call)
        expected.step(step_with_lists, call)
        actual.assert_same(expected, f"call {call}")
    assert graphs() == 2


def test_a_decay_that_changes_is_compiled_once_more(backend):
    def update(shadows: list[Tensor], params: list[Tensor], decay: float) -> None:
        ema_update_(shadows, params, decay=decay)

    compiled = torch.compile(update, fullgraph=True, backend=backend)
    actual, expected, params = tensors(SAME), tensors(SAME), tensors(SAME, seed=1)
    for call in range(CALLS):
        compiled(actual, params, 1 - 0.9 / (1 + call))
        update(expected, params, 1 - 0.9 / (1 + call))
        assert_lists_same(actual, expected, f"call {call}")
    assert graphs() == 2


# --- beside the rest of a graph ------------------------------------------------------------------


def loss_of(weight: Tensor, bias: Tensor, inputs: Tensor) -> Tensor:
    return (inputs @ weight + bias).relu().pow(2).mean()


def test_a_whole_step_is_one_graph():
    """Forward, gradients and step. With aot_eager, which runs the operations of eager."""

    def train(params: Any, buffers: Any, shadows: Any, inputs: Tensor) -> Tensor:
        grads = torch.func.grad(loss_of, (0, 1))(*params, inputs)
        sgd_step_(params, grads, buffers, lr=0.1, momentum=0.9, shadows=shadows, decay=0.9)
        return torch.stack([p.sum() for p in params]).sum()

    def start() -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
        params = [random_tensor((7, 3), seed=1), random_tensor((3,), seed=2)]
        return params, [None, None], [p.clone() for p in params]

    compiled = torch.compile(train, fullgraph=True, backend="aot_eager")
    actual, expected = start(), start()
    for call in range(CALLS):
        inputs = random_tensor((4, 7), seed=10 + call)
        total, wanted = compiled(*actual, inputs), train(*expected, inputs)
        assert_same_bits(total, wanted)
        for a, e in zip(actual, expected, strict=True):
            assert_lists_same(a, e, f"call {call}")
    assert graphs() == 2


def test_the_graph_sees_parameters_before_and_after_the_step(device, backend):
    """Gradients as Inductor computes them lazily, which must not be from updated parameters."""
    inductor_at_hand(device)

    def step(param: Tensor) -> tuple[Tensor, ...]:
        before, grad = param * 4, param * 2
        sgd_step_([param], [grad], None, lr=0.25)
        return before, grad + 0, grad.sum(), param * 8

    actual, expected = (torch.arange(1.0, 9.0, device=device) for _ in range(2))
    results = torch.compile(step, fullgraph=True, backend=backend)(actual)
    assert_lists_same(results, step(expected), "results")
    assert_same_bits(actual, expected)


def test_gradients_are_not_written_unless_they_are_reset(backend):
    def step(param: Tensor, grad: Tensor) -> None:
        sgd_step_([param], [grad.expand(3, 4)], None, lr=0.5)

    param, grad = torch.zeros(3, 4), torch.ones(4)
    torch.compile(step, fullgraph=True, backend=backend)(param, grad)
    assert_same_bits(param, torch.full((3, 4), -0.5))
    assert grad._version == 0


@pytest.mark.parametrize("strides", ["channels last", "gaps", "views of one tensor"])
def test_parameters_have_any_strides(strides):
    def start() -> list[Tensor]:
        whole = random_tensor((2, 4, 6, 8))
        if strides == "channels last":
            return [whole.contiguous(memory_format=torch.channels_last)]
        return [whole[:, 1:3, ::2, 3:]] if strides == "gaps" else [whole[0], whole[1]]

    def step(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor | None]) -> None:
        sgd_step_(params, grads, buffers, lr=0.1, momentum=0.9)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    actual, expected = start(), start()
    held: tuple[list[Tensor | None], ...] = ([None] * len(actual), [None] * len(actual))
    for call in range(3):
        grads = [random_tensor(p.shape, seed=call + 1) for p in actual]
        compiled(actual, grads, held[0])
        step(expected, grads, held[1])
        assert_lists_same(actual, expected, f"call {call}")


def test_inductor_copies_nothing_and_allocates_new_momentum_alone():
    def step(*lists: Any) -> None:
        params, grads, buffers, shadows = lists
        options = {"lr": 0.1, "momentum": 0.9, "reset_grads": True}
        sgd_step_(params, grads, buffers, shadows=shadows, decay=0.9, **options)

    compiled = torch.compile(step, fullgraph=True)
    params, grads, shadows = ([random_tensor((5, 7), seed=i)] for i in range(3))
    buffers: list[Tensor | None] = [None]
    for allocated in (1, 0):
        _, (source,) = run_and_get_code(compiled, params, grads, buffers, shadows)
        call = source[source.index("def call(") : source.index("runner =")]
        assert call.count("torch.ops.fused_opt.sgd_step_.reset_grads(") == 1
        assert "cpp_fused" not in call
        assert call.count("empty_strided") == allocated


def test_an_error_in_a_graph_is_that_of_eager_and_changes_nothing(backend):
    def step(params: list[Tensor], grads: list[Tensor], lr: Tensor) -> None:
        sgd_step_(params, grads, None, lr=lr, reset_grads=True)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    params, grads = tensors(SAME), tensors(SAME, seed=1)
    with pytest.raises(ValueError, match=r"Invalid learning rate: -"):
        compiled(params, grads, torch.tensor(-0.1))
    with pytest.raises(ValueError, match=r"params\[0\]: shares memory"):
        compiled([params[0], params[0], *params[2:]], [grads[0], grads[0].clone(), *grads[2:]], 0.1)
    assert_lists_same(params, tensors(SAME), "params")
    assert_lists_same(grads, tensors(SAME, seed=1), "grads")


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("Invalid momentum value", {"momentum": -1.0}),
        ("Invalid formulation", {"formulation": "nadam"}),
        ("expected shadows and decay together", {"decay": 0.5}),
        ("shadows: expected 4 entries", {"decay": 0.5, "shadows": []}),
    ],
)
def test_an_error_outside_fullgraph_is_that_of_eager(message, change):
    @torch.compile(backend="aot_eager")
    def step(params: list[Tensor], grads: list[Tensor]) -> None:
        sgd_step_(params, grads, [None] * 4, lr=0.1, **change)

    params = tensors(SAME)
    with pytest.raises(ValueError, match=message):
        step(params, tensors(SAME, seed=1))
    assert_lists_same(params, tensors(SAME), "params")


# --- the operators -------------------------------------------------------------------------------


def arguments(device: torch.device, dtypes: Sequence[torch.dtype], requires_grad: bool) -> Any:
    params = [p.requires_grad_(requires_grad) for p in tensors(dtypes, device)]
    return params, tensors(dtypes, device, 1), tensors(dtypes, device, 2)


#: Options of the operator, the dtypes of its lists, its shadows and its refinements.
OPERATOR_CASES: dict[str, Any] = {
    "plain": ({"lr": 0.1, "momentum": 0.9}, SAME, 0, None),
    "first steps": ({"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "first": [1, 2]}, SAME, 0, None),
    "mixed": ({"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, MIXED, 0, None),
    "shadows": ({"lr": 0.1, "decay": 0.5}, SAME, 4, None),
    "some shadows": ({"lr": 0.1, "decay": 0.5, "shadow_places": [0, 3]}, MIXED, 2, None),
    "refinements": ({"lr": 0.1, "refinement_places": [1, 2]}, MIXED, 0, "split"),
    "rounding": ({"lr": 0.1, "momentum": 0.9, "rounding": [-1, 3]}, MIXED, 0, None),
}


def operator_arguments(
    name: str, device: torch.device, requires_grad: bool
) -> tuple[list[list[Tensor]], dict[str, Any]]:
    options, dtypes, shadow_count, kind = OPERATOR_CASES[name]
    params, grads, buffers = arguments(device, dtypes, requires_grad)
    places = options.get("shadow_places", range(shadow_count))
    shadows = [params[i].detach().double().float() for i in places]
    refinements = [rounded_away(p.dtype, kind, p.detach()) for p in params] if kind else []
    buffers = buffers if "momentum" in options else []
    lists = [params, grads, buffers, shadows, [r for r in refinements if r is not None]]
    return lists, dict(options)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("lr", ["number", "tensor"])
@pytest.mark.parametrize("overload", ["default", "reset_grads"])
@pytest.mark.parametrize("name", OPERATOR_CASES)
def test_step_operator_passes_opcheck(name, overload, lr, requires_grad, device):
    lists, options = operator_arguments(name, device, requires_grad)
    if lr == "tensor":
        options.update(lr=0.0, lr_tensor=torch.tensor(0.1, device=device))
    if overload == "reset_grads":
        options.update(reset_grads=True)
    opcheck(getattr(ops.sgd_step_, overload), tuple(lists), options)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtypes", [SAME, MIXED], ids=["float32", "mixed"])
def test_update_operator_passes_opcheck(dtypes, requires_grad, device):
    params, shadows, _ = arguments(device, dtypes, requires_grad)
    wide = [F64 if dtype == F64 else F32 for dtype in dtypes]
    shadows = [s.to(dtype) for s, dtype in zip(shadows, wide, strict=True)]
    opcheck(ops.ema_update_.default, (shadows, params), {"decay": 0.5})


@pytest.mark.parametrize("name", OPERATOR_CASES)
def test_step_operator_is_the_function(name, device):
    lists, options = operator_arguments(name, device, True)
    twins, rest = operator_arguments(name, device, False)
    ops.sgd_step_(*lists, **options)

    params, grads, held, shadows, refinements = twins
    buffers: list[Tensor | None] = list(held)
    for i in rest.pop("first", []):
        buffers[i] = None
    if "rounding" in rest:  # operators take integers with a sign
        rest["rounding"] = tuple(number % 2**64 for number in rest["rounding"])
    places = {"shadows": rest.pop("shadow_places", []), "refinements": []}
    places["refinements"] = rest.pop("refinement_places", [])
    streams: dict[str, Any] = {}
    for stream, present in (("shadows", shadows), ("refinements", refinements)):
        if present:
            at = dict(zip(places[stream] or range(len(params)), present, strict=True))
            streams[stream] = [at.get(i) for i in range(len(params))]
    sgd_step_(params, grads, buffers, **rest, **streams)

    assert_lists_same(lists[0], params, "params")
    assert_lists_same(lists[2], buffers, "momentum_buffers")
    assert_lists_same(lists[3], shadows, "shadows")
    assert_lists_same(lists[4], refinements, "refinements")
    assert all(p.is_leaf and p.requires_grad for p in lists[0])


def test_reset_is_chosen_by_its_argument(device):
    params, grads, _ = arguments(device, SAME, False)
    ops.sgd_step_(params, grads, [], [], [], lr=0.1)
    assert_lists_same(grads, tensors(SAME, device, 1), "grads")
    ops.sgd_step_(params, grads, [], [], [], lr=0.1, reset_grads=True)
    assert_lists_same(grads, [torch.zeros_like(g) for g in grads], "grads")


def test_operators_step_what_the_kernels_do_not_reach():
    weight, buffer = torch.ones(4, 2), torch.full((4, 2), 9.0)
    grad = torch.ones(4, 2).to_sparse()
    ops.sgd_step_([weight], [grad], [buffer], [], [], lr=0.5, momentum=0.9, first=[0])
    assert_same_bits(weight, torch.full((4, 2), 0.5))
    assert_same_bits(buffer, torch.ones(4, 2))


def test_operators_do_nothing_to_tensors_without_values():
    lists = [[t.to("meta") for t in tensors(SAME, seed=seed)] for seed in range(3)]
    assert ops.sgd_step_(*lists, [], [], lr=0.1, momentum=0.9) is None
    assert ops.ema_update_(lists[0], lists[1], decay=0.5) is None


@pytest.mark.parametrize("places", [[0], [0, 4], [-1, 0], [1, 1], [0, 1, 2]])
def test_places_that_do_not_fit_raise(places):
    params, grads, _ = arguments(torch.device("cpu"), SAME, False)
    shadows = [p.clone() for p in params[:2]]
    with pytest.raises(ValueError, match="shadow_places: expected 2 different indices below 4"):
        ops.sgd_step_(params, grads, [], shadows, [], lr=0.1, decay=0.5, shadow_places=places)
    assert_lists_same(params, tensors(SAME), "params")


def test_operators_survive_a_reload():
    importlib.reload(functional)
    params, grads, _ = arguments(torch.device("cpu"), SAME, False)
    ops.sgd_step_(params, grads, [], [], [], lr=0.1)
    ops.ema_update_(params, grads, decay=0.0)
    assert_lists_same(params, grads, "shadows")


# --- the classes ---------------------------------------------------------------------------------


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


class Training:
    """A model, its optimizer and its average, the same whenever they are made."""

    def __init__(self, kind: str) -> None:
        self.model = network()
        self.ema = EMA(self.model, decay=0.9)
        options: dict[str, Any] = {
            "ema": {"ema": self.ema},
            "max_grad_norm": {"max_grad_norm": 0.01},
            "ema and max_grad_norm": {"ema": self.ema, "max_grad_norm": 0.01},
            "lr as a tensor": {"lr": torch.tensor(0.1)},
        }.get(kind, {})
        options = {"lr": 0.1, "momentum": 0.9, **options}
        self.optimizer = SGD(self.model.parameters(), **options)
        self.scheduler = (
            torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
            if kind in ("a schedule", "lr as a tensor")
            else None
        )
        self.kind = kind

    def step(self, inputs: Tensor) -> Tensor:
        loss = self.model(inputs).pow(2).mean()
        loss.backward()
        if self.kind == "clip_grad_norm_":
            clip_grad_norm_(self.model.parameters(), 0.01)
        self.optimizer.step()
        if self.kind == "ema.update":
            self.ema.update()
        self.optimizer.zero_grad()
        return loss.detach()

    def run(self, step: Callable[[Tensor], Tensor], calls: int = CALLS) -> list[Tensor]:
        """Everything after each step; the compiler may not compile again after the second."""
        history: list[Tensor] = []
        for call in range(calls):
            with torch._dynamo.config.patch(error_on_recompile=call >= 2):
                history.append(step(random_tensor((5, 8), seed=call)))
            if self.scheduler is not None:
                self.scheduler.step()
            history += [t.detach().clone() for t in self.written() if t is not None]
        return history

    def written(self) -> list[Tensor | None]:
        shadows = self.ema.shadows.values()
        return [*self.model.parameters(), *shadows, self.optimizer.grad_norm]


KINDS = [
    "plain",
    "ema",
    "max_grad_norm",
    "ema and max_grad_norm",
    "ema.update",
    "clip_grad_norm_",
    "a schedule",
    "lr as a tensor",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_training_step_has_the_bits_of_eager(kind):
    """With aot_eager, which runs the operations of eager: inductor may round a loss otherwise."""
    actual, expected = Training(kind), Training(kind)
    compiled = torch.compile(actual.step, backend="aot_eager")
    assert_lists_same(actual.run(compiled), expected.run(expected.step), kind)
    assert actual.ema.num_updates == expected.ema.num_updates == (CALLS if "ema" in kind else 0)


@pytest.mark.parametrize("kind", ["ema", "max_grad_norm"])
def test_a_training_step_compiled_by_inductor_has_the_bits_of_eager(kind):
    """With a loss whose gradients are whole numbers, which do not depend on the order of sums."""

    def start() -> Training:
        training = Training(kind)
        with torch.no_grad():
            for p in training.model.parameters():
                p.copy_((8 * p).round())
        return training

    def step(training: Training, inputs: Tensor) -> Tensor:
        (training.model[0](inputs) + 1).sum().backward()
        training.optimizer.step()
        training.optimizer.zero_grad()
        return inputs.sin()

    compiled = torch.compile(step)
    actual, expected = start(), start()
    for call in range(CALLS):
        inputs = (4 * random_tensor((5, 8), seed=call)).round()
        with torch._dynamo.config.patch(error_on_recompile=call >= 2):
            compiled(actual, inputs)
        step(expected, inputs)
        assert_lists_same(actual.written(), expected.written(), f"call {call}")


def test_the_step_itself_may_be_compiled():
    param, twin = make_params([(3,)]) + make_params([(3,)])
    optimizer, other = SGD([param], lr=0.1, momentum=0.9), SGD([twin], lr=0.1, momentum=0.9)
    step = torch.compile(optimizer.step)
    for call in range(3):
        set_gradients([param], seed=call)
        set_gradients([twin], seed=call)
        step()
        other.step()
        assert_same_bits(param, twin)
    assert graphs() == 0


class OwnSGD(SGD):
    """A user's subclass with a step of its own."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("kind", ["step", "subclass", "hooks", "schedule", "copy", "ema.update"])
def test_a_step_is_one_graph_break(kind):
    params = make_params([(3,), (4, 5)])
    set_gradients(params, seed=0)
    ema = EMA(params)
    optimizer = (OwnSGD if kind == "subclass" else SGD)(params, lr=0.1, momentum=0.9)
    called = []
    if kind == "hooks":
        optimizer.register_step_pre_hook(lambda *_: called.append("before"))
        optimizer.register_step_post_hook(lambda *_: called.append("after"))
    if kind == "schedule":
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    if kind == "copy":
        optimizer = copy.deepcopy(optimizer)
        set_gradients(optimizer.param_groups[0]["params"], seed=0)

    @torch.compile(backend="aot_eager")
    def function(x: Tensor) -> Tensor:
        y = x.sin()
        if kind == "ema.update":
            ema.update()
        else:
            optimizer.step()
        return y.cos()

    x = torch.ones(5)
    for call in range(3):
        with torch._dynamo.config.patch(error_on_recompile=call > 0):
            torch.testing.assert_close(function(x), x.sin().cos())
        assert (graph_breaks(), graphs()) == (1, 2)
    assert called == (["before", "after"] * 3 if kind == "hooks" else [])


def test_clip_grad_norm_is_one_graph_break():
    params, twins = make_params([(3,), (4, 5)]), make_params([(3,), (4, 5)])

    @torch.compile(backend="aot_eager")
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.sin()
        norm = clip_grad_norm_(params, 0.5)
        return y.cos(), norm

    for call in range(3):
        set_gradients(params, seed=call)
        set_gradients(twins, seed=call)
        with torch._dynamo.config.patch(error_on_recompile=call > 0):
            _, norm = function(torch.ones(5))
        assert_same_bits(norm, clip_grad_norm_(twins, 0.5))
        assert_lists_same([p.grad for p in params], [p.grad for p in twins], "grads")
    assert graph_breaks() == 1
