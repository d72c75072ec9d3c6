"""The exponential moving average of a model's weights."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from fused_opt._averages import Averages
from fused_opt._counter import Counter, is_capturing
from fused_opt._hyper import check_decay
from fused_opt._plan import Gate, Plan

if TYPE_CHECKING:
    from fused_opt.sgd import SGD

ModelOrParams = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]

_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


class EMA:
    r"""Keeps a shadow of every parameter, its exponential moving average.

    .. math:: s \leftarrow s + (1 - \beta)(p - s)

    with the decay β. One call updates all shadows in one pass; handed to ``fused_opt.SGD(ema=...)``
    they are updated inside the optimizer's own pass instead, which spares reading the parameters
    once more, and the results are the same bits.

    Shadows have the parameter's dtype, and float32 for bfloat16 and float16, in which an average
    with a decay near 1 stops moving. Parameters that share storage have one shadow. Frozen
    parameters have one too and follow the model.

    Args:
        model_or_params: a module, whose parameters are known by name; or an iterable of tensors,
            which are then named "0", "1" and so on, or of (name, tensor) pairs.
        decay: β, in [0, 1]; a one-element tensor may be changed in place between updates, and on
            the parameters' GPU it is read there.

    Raises:
        ValueError: decay outside [0, 1], no parameters, or a name that occurs twice.
        TypeError: something in the iterable is no tensor.

    Example:
        >>> import torch
        >>> from fused_opt import EMA
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> ema = EMA(model, decay=0.9)
        >>> start = model.weight.detach().clone()
        >>> with torch.no_grad():
        ...     _ = model.weight.add_(1.0)
        >>> ema.update()
        >>> torch.allclose(ema.shadows["weight"], start + 0.1)
        True
        >>> with ema.average_parameters():
        ...     torch.equal(model.weight, ema.shadows["weight"])
        True
    """

    def __init__(self, model_or_params: ModelOrParams, decay: float | Tensor = 0.999) -> None:
        self.decay = decay
        self._updates = Counter("num_updates of the EMA")
        # An iterable can be walked only once, a module gains and loses parameters.
        self._source: nn.Module | list[tuple[str, Tensor]] = (
            model_or_params if isinstance(model_or_params, nn.Module) else _named(model_or_params)
        )
        self._params: dict[str, Tensor] = {}
        self._shadow_of: dict[Tensor, Tensor] = {}
        self._backup: list[Tensor] | None = None  # the weights, while the shadows are applied
        self._optimizer: weakref.ref[SGD] | None = None
        self._plan = Plan(keeps_memory=True)
        self.register()

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the optimizer, which attaches its copy of the EMA itself."""
        state = self.__dict__.copy()
        del state["_plan"], state["_updates"]
        state["num_updates"] = self.num_updates
        state["_optimizer"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        self._updates = Counter("num_updates of the EMA", state.pop("num_updates"))
        self.__dict__.update(state)
        self._plan = Plan(keeps_memory=True)

    def __repr__(self) -> str:
        return f"EMA({len(self._params)} parameters, decay={self.decay})"

    @property
    def decay(self) -> float | Tensor:
        """β, in [0, 1]; may be changed between updates, a tensor also in place."""
        return self._decay

    @decay.setter
    def decay(self, decay: float | Tensor) -> None:
        check_decay(decay)
        self._decay = decay if isinstance(decay, Tensor) else float(decay)

    @property
    def num_updates(self) -> int:
        """How often the shadows were updated.

        Updates that were replayed in a CUDA graph, or that a GPU could have skipped, are counted
        there, and asking for them waits for the GPU.
        """
        return int(self._updates)

    @num_updates.setter
    def num_updates(self, count: int) -> None:
        self._updates.set(count)

    @property
    def shadows(self) -> dict[str, Tensor]:
        """The shadows by name: the tensors themselves, in a new dict."""
        return {name: self._shadow_of[param] for name, param in self._params.items()}

    @torch.no_grad()
    def register(self) -> None:
        """Starts over from the weights as they are now.

        Shadows that exist are overwritten in place. Parameters that the module has gained get a
        shadow, and those it has lost are forgotten.

        Raises:
            RuntimeError: the shadows are applied.
        """
        self._require_not_applied("register")
        params, shadow_of = _tensors(self._source), {}
        if not params:
            raise ValueError("model_or_params: expected at least one parameter, got none")
        for param in params.values():
            shadow = self._shadow_of.get(param)
            if shadow is None:
                shadow = torch.empty_like(param, dtype=_WIDER.get(param.dtype, param.dtype))
            shadow_of[param] = shadow.requires_grad_(False)
        for param, shadow in shadow_of.items():
            shadow.copy_(param)
        self._params, self._shadow_of = params, shadow_of
        self.num_updates = 0

    @_disable_dynamo
    @torch.no_grad()
    def update(self) -> None:
        """Moves every shadow towards its parameter.

        Raises:
            RuntimeError: the shadows are applied, or the EMA is attached to an optimizer, whose
                steps update it.
        """
        self._require_not_applied("update")
        if self.optimizer is not None:
            raise RuntimeError(
                "update: this EMA is attached to an optimizer, whose every step updates it; "
                "detach it with `optimizer.ema = None` to update it yourself"
            )
        gate = self._gate()
        averages = self._averages(gate is not None)
        if averages is not None:
            self._plan.run_ema(averages, self._subject, gate)
        if gate is None:
            self._updates.add()

    def _averages(self, left_to_device: bool) -> Averages | None:  # noqa: ARG002
        """What the next step does to the shadows; None if nothing."""
        check_decay(self._decay)
        return Averages(self._shadow_of, (self._decay,))  # type: ignore[arg-type]

    def _copy_buffers(self, gate: Gate | None) -> None:
        """What follows a step."""

    def _gate(self) -> Gate | None:
        """Counts a captured update where it is replayed."""
        home = next(iter(self._shadow_of.values())).device
        if home.type != "cuda":
            return None
        counter = self._updates.on(home)  # which a capture would come too late to make
        return Gate(None, [counter], home) if is_capturing(home) else None

    def _subject(self, stream: str, param: Tensor) -> str:
        """Names a tensor at fault by its parameter's name."""
        names = (name for name, other in self._params.items() if other is param)
        return f"{stream}[{next(names)!r}]"

    @torch.no_grad()
    def apply_shadow(self) -> None:
        """Puts the shadows in the place of the weights, in place, and keeps the weights aside.

        Raises:
            RuntimeError: they are already applied.
        """
        self._require_not_applied("apply_shadow")
        _check_match("apply_shadow", self._params, self.shadows)
        # All memory is taken before the first weight is overwritten: running out changes nothing.
        backup = [param.detach().clone() for param in self._shadow_of]
        self._backup = backup
        self.copy_to()

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the weights back that :meth:`apply_shadow` has kept, in place.

        Raises:
            RuntimeError: the shadows are not applied.
        """
        if self._backup is None:
            raise RuntimeError("restore: the shadows are not applied")
        for param, weights in zip(self._shadow_of, self._backup, strict=True):
            param.copy_(weights)
        self._backup = None

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Applies the shadows inside a ``with`` block and restores the weights after it.

        Example:
            >>> import torch
            >>> from fused_opt import EMA
            >>> model = torch.nn.Linear(2, 1)
            >>> ema = EMA(model)
            >>> with ema.average_parameters():
            ...     prediction = model(torch.ones(1, 2))
        """
        self.apply_shadow()
        try:
            yield
        finally:
            self.restore()

    @torch.no_grad()
    def copy_to(self, model_or_params: ModelOrParams | None = None) -> None:
        """Copies the shadows into weights, for good.

        Args:
            model_or_params: what receives them, matched by name; the tracked parameters if None.

        Raises:
            ValueError: names or shapes differ. Nothing has changed.
        """
        shadows = self.shadows
        targets = self._params if model_or_params is None else _tensors(model_or_params)
        _check_match("model_or_params", targets, shadows)
        for name, target in targets.items():
            target.copy_(shadows[name])

    def state_dict(self) -> dict[str, Any]:
        """Returns ``{"decay", "num_updates", "shadows": {name: tensor}}``, without copying.

        The decay is a number, also where it is kept as a tensor.
        """
        decay, num_updates = float(self._decay), self.num_updates
        return {"decay": decay, "num_updates": num_updates, "shadows": self.shadows}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` returned, keeping shadows in place and in dtype.

        Raises:
            ValueError: a key is missing or unknown, or names or shapes differ. Nothing has changed.
            RuntimeError: the shadows are applied.
        """
        self._require_not_applied("load_state_dict")
        expected = {"decay", "num_updates", "shadows"}
        if set(state_dict) != expected:
            raise ValueError(
                f"state_dict: expected the keys {sorted(expected)}, got {sorted(state_dict)}"
            )
        check_decay(state_dict["decay"])
        shadows = self.shadows
        _check_match("state_dict['shadows']", state_dict["shadows"], shadows)
        for name, shadow in shadows.items():
            shadow.copy_(state_dict["shadows"][name])
        if isinstance(self._decay, Tensor):
            self._decay.fill_(state_dict["decay"])
        else:
            self.decay = state_dict["decay"]
        self.num_updates = state_dict["num_updates"]

    @property
    def optimizer(self) -> SGD | None:
        """The optimizer whose steps update this EMA, or None."""
        return self._optimizer() if self._optimizer is not None else None

    def _attach(self, optimizer: SGD) -> None:
        if self.optimizer not in (None, optimizer):
            raise ValueError(
                "ema: this EMA is attached to another optimizer; one EMA rides in one optimizer"
            )
        self._optimizer = weakref.ref(optimizer)

    def _detach(self) -> None:
        self._optimizer = None

    def _require_not_applied(self, what: str) -> None:
        if self._backup is not None:
            raise RuntimeError(
                f"{what}: the shadows are applied in the place of the weights; call restore() first"
            )


def _named(params: Iterable[Tensor] | Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Gives parameters without a name their place as one."""
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise TypeError(
            "model_or_params: expected a module or an iterable of parameters, got "
            f"{type(params).__name__}"
        )
    return [item if isinstance(item, tuple) else (str(i), item) for i, item in enumerate(params)]


def _tensors(model_or_params: ModelOrParams) -> dict[str, Tensor]:
    """The tensors by name, each once, also where several share their elements."""
    named: Iterable[tuple[str, Tensor]] = (
        model_or_params.named_parameters()
        if isinstance(model_or_params, nn.Module)
        else _named(model_or_params)
    )
    distinct: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"model_or_params: expected tensors, got {type(tensor).__name__} as {name!r}"
            )
        if name in distinct:
            raise ValueError(f"model_or_params: the name {name!r} occurs twice")
        elements: Any = id(tensor)
        if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ and tensor.numel():
            elements = (tensor.data_ptr(), tensor.device, tensor.shape, tensor.stride())
        if elements not in seen:
            seen.add(elements)
            distinct[name] = tensor
    return distinct


def _check_match(argument: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raises ValueError, naming the tensors, unless names and shapes are the same."""
    missing = sorted(set(expected) - set(found))
    unknown = sorted(set(found) - set(expected))
    if missing or unknown:
        raise ValueError(
            f"{argument}: expected the names of the shadows; missing {missing}, unknown {unknown}"
        )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{argument}: expected shape {tuple(tensor.shape)} for {name!r}, got "
                f"{tuple(found[name].shape)}"
            )
