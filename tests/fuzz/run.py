"""A training run: a model, an optimizer, an average; and all that can be seen of it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from reference import random_tensor
from torch import Tensor, nn

from fused_opt import EMA, SGD, schedules
from fuzz.oracle import Averaging, Snapshot

#: Around the widths of vectors (4 to 32 elements), a tile, and the chunk of a launch.
SIZES = (0, 1, 3, 7, 8, 9, 17, 33, 65, 257, 1025)
LARGE_SIZES = (16383, 16384, 16385)

#: Decays, each with its equation in plain Python.
DECAYS: dict[str, tuple[Any, Callable[[int], float]]] = {
    "0.9": (0.9, lambda k: 0.9),
    "0": (0, lambda k: 0.0),
    "1": (1.0, lambda k: 1.0),
    "constant": (schedules.constant(0.99), lambda k: 0.99),
    "tf_warmup": (schedules.tf_warmup(0.7), lambda k: min(0.7, (1 + k) / (10 + k))),
    "equal": (schedules.equal(), lambda k: k / (k + 1)),
    "function": (lambda k: 1 - 1 / (k + 2), lambda k: 1 - 1 / (k + 2)),
}
#: Those that can be pickled and saved.
PLAIN_DECAYS = tuple(name for name in DECAYS if name != "function")


class Model(nn.Module):
    """Parameters that come one by one, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))

    def add(self, size: int, dtype: torch.dtype, layout: str, seed: int) -> nn.Parameter:
        """A new parameter under the next name."""
        values = random_tensor((size,), dtype, seed=seed)
        if layout == "transposed" and size % 3 == 0:
            values = values.view(-1, 3)
        param = nn.Parameter(laid_out(values, layout))
        self.register_parameter(f"p{len(list(self.parameters()))}", param)
        return param


LAYOUTS = ("dense", "misaligned", "gaps", "transposed")


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values, elsewhere in memory."""
    if layout == "misaligned":
        memory = torch.zeros(values.numel() + 1, dtype=values.dtype)
        return memory[1:].view(values.shape).copy_(values)
    if layout == "gaps":
        memory = torch.zeros((*values.shape, 2), dtype=values.dtype)
        return memory[..., 0].copy_(values)
    if layout == "transposed" and values.dim() == 2:
        return values.t().contiguous().t()
    return values.clone(memory_format=torch.contiguous_format)


@dataclass
class Run:
    """What a user holds. ``averaging`` is what the average was made with."""

    model: Model
    optimizer: SGD
    ema: EMA | None = None
    decays: Sequence[str] = ()
    every: int = 1
    after: int = 0
    frozen: frozenset[str] = frozenset()
    calls: list[str] = field(default_factory=list)  # of hooks

    @property
    def params(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    @property
    def averaging(self) -> Averaging | None:
        """How the average is updated next."""
        if self.ema is None:
            return None
        rules = [DECAYS[name][1] for name in self.decays]
        return Averaging(rules, self.every, self.after, self.frozen)

    @property
    def is_attached(self) -> bool:
        return self.ema is not None and self.optimizer.ema is self.ema

    @property
    def step_averaging(self) -> Averaging | None:
        """How a step updates the average, if it does."""
        return self.averaging if self.is_attached else None

    @property
    def is_applied(self) -> bool:
        return self.ema is not None and self.ema._applied is not None

    def count_frozen(self) -> None:
        """To be called whenever the average registers the model."""
        self.frozen = frozenset(n for n, p in self.params.items() if not p.requires_grad)


def snapshot(run: Run) -> Snapshot:
    """Copies everything that can be observed."""
    found: Snapshot = {}
    for name, param in run.params.items():
        found["param", name] = _copied(param)
        found["grad", name] = None if param.grad is None else _copied(param.grad)
        found["trains", name] = param.requires_grad
        for key, value in run.optimizer.state.get(param, {}).items():
            found[key, name] = _copied(value)
    found["buffer", "steps"] = _copied(run.model.steps)
    names = {param: name for name, param in run.params.items()}
    groups = run.optimizer.state_dict()["param_groups"]
    found["members",] = [[names[p] for p in g["params"]] for g in run.optimizer.param_groups]
    for i, group in enumerate(groups):
        for option, value in group.items():
            if option != "params":
                is_number = isinstance(value, Tensor) and value.numel() == 1
                found["group", i, option] = float(value) if is_number else value
    norm = run.optimizer.grad_norm
    found["grad_norm",] = None if norm is None else norm.clone()
    if run.ema is not None:
        found |= _of_average(run, run.ema)
    return found


def _of_average(run: Run, ema: EMA) -> Snapshot:
    found: Snapshot = {("ema", "num_steps"): ema.num_steps, ("ema", "applied"): ema._applied}
    found["ema", "attached"] = run.is_attached
    for k, average in enumerate(ema.averages):
        found |= {("shadow", k, name): _copied(shadow) for name, shadow in average.items()}
    found["copy", "steps"] = _copied(ema._kept.copied["steps"])
    return found


def _copied(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    dense = value.to_dense() if value.is_sparse else value
    return dense.clone()


def versions(run: Run) -> dict[Any, int]:
    """The version counter of everything that a graph may hold."""
    found = {name: param._version for name, param in run.params.items()}
    grads = {name: p.grad for name, p in run.params.items()}
    found |= {("grad", name): g._version for name, g in grads.items() if g is not None}
    for k, average in enumerate([] if run.ema is None else run.ema.averages):
        found |= {("shadow", k, name): shadow._version for name, shadow in average.items()}
    return found


def places(run: Run) -> dict[Any, Any]:
    """Where everything lies, and which objects the gradients are."""
    found: dict[Any, Any] = {name: p.data_ptr() for name, p in run.params.items()}
    found |= {("grad", name): id(p.grad) for name, p in run.params.items()}
    for k, average in enumerate([] if run.ema is None else run.ema.averages):
        found |= {("shadow", k, name): shadow.data_ptr() for name, shadow in average.items()}
    return found


# --- copies of runs -------------------------------------------------------------------------------


def twin_of(run: Run) -> Run:
    """The same state in objects that have no history: new tensors, a new optimizer and average."""
    model, params = Model(), {}
    model.steps.copy_(run.model.steps)
    # Tensors with gaps come last in the sum of a norm. Otherwise the layout must not matter.
    clips = run.optimizer.param_groups[0]["max_grad_norm"] is not None
    cloned = _cloned_with_gaps if clips else torch.clone
    for name, param in run.params.items():
        params[param] = nn.Parameter(cloned(param.detach()), name not in run.frozen)
        model.register_parameter(name, params[param])
    ema = _twin_average(run, model) if run.is_attached else None
    groups = []
    for saved, group in zip(
        run.optimizer.state_dict()["param_groups"], run.optimizer.param_groups, strict=True
    ):
        groups.append({**saved, "params": [params[p] for p in group["params"]]})
    optimizer = SGD(groups, lr=1.0, max_grad_norm=groups[0]["max_grad_norm"])
    for param, twin in params.items():
        twin.requires_grad_(param.requires_grad)
        twin.grad = None if param.grad is None else cloned(param.grad.detach())
        if run.optimizer.state.get(param):
            optimizer.state[twin] = copy.deepcopy(run.optimizer.state[param])
    optimizer.ema = ema
    return Run(model, optimizer, ema, run.decays, run.every, run.after, run.frozen)


def _cloned_with_gaps(tensor: Tensor) -> Tensor:
    if tensor.is_sparse:
        return tensor.clone()
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in strides if size)
    memory = torch.zeros(last + 1, dtype=tensor.dtype)
    return memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def _twin_average(run: Run, model: Model) -> EMA:
    assert run.ema is not None
    averages = run.ema.averages
    ema = EMA(
        model,
        run.ema.decay,
        update_every=run.every,
        update_after_step=run.after,
        filter=lambda name, _: name in averages[0],
    )
    for mine, theirs in zip(ema.averages, averages, strict=True):
        for name, shadow in theirs.items():
            mine[name].data = shadow.clone()
    ema._kept.copied["steps"].copy_(run.ema._kept.copied["steps"])
    ema.num_steps = run.ema.num_steps
    return ema


def through_file(state: Any) -> Any:
    """What a checkpoint file keeps."""
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def through_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
