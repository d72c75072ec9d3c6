"""Optimizers whose steps autograd looks through, as ``higher.optim`` has them.

``get_diff_optim`` makes the ``diffopt`` of an inner loop from an ordinary optimizer.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fused_opt import _differentiable
from fused_opt._differentiable import SgdHypers
from fused_opt._hyper import OWN_OPTIONS, STATE_KEY, SgdHyper, as_scalar
from fused_opt._state import ParamStates
from fused_opt.higher.patch import FunctionalModule
from fused_opt.higher.utils import Device, detached, flatten, mapped
from fused_opt.sgd import SGD

#: For each option one value for all param groups, bare or in a list, or a list of one for each.
Override: TypeAlias = Mapping[str, Any]
Gradients: TypeAlias = Sequence[Tensor | None]
GradCallback: TypeAlias = Callable[[list[Tensor | None]], Gradients]


#: Up to so many tensors, of so many elements together, torch operations take less time than a node.
SHORT, SHORT_ELEMENTS = 4, 4096


class DifferentiableOptimizer(ABC):
    """The steps of an optimizer on fast weights, out of place.

    It starts with the options and the state of the optimizer, which it never changes. Options may
    be tensors that require gradients, those of the optimizer included.

    Args:
        other: the optimizer.
        reference_params: the parameters of the model, in the order of its ``parameters()``.
        fmodel: the model whose fast weights :meth:`step` replaces; None leaves it to ``params=``.
        device: where the state goes; None leaves it where it is.
        override: options in place of the optimizer's, in a dict: for each a value for all param
            groups, bare or as a list of one, or a list of one for each.
        grad_callback: is given all gradients in a list, in the order of ``reference_params``, None
            where there is none, and returns those to use.
        track_higher_grads: False runs in test mode: steps are no part of any graph, and the weights
            after each are leaves.
        first_order: takes gradients for constants (first-order MAML, Finn et al., 2017).
            Derivatives pass through the steps, but not through the gradients, and the graph of the
            loss is freed, as by ``loss.backward()``.
        truncate: every so many steps, the next one starts from constants, and so do those before
            it that are still kept. Derivatives reach back through at most that many steps, and of a
            loss that is taken between two steps through one at least.
        keep_history: False writes, where no graph can need them, to the memory of weights and state
            that this optimizer made two steps ago.

    Attributes:
        param_groups: the options of each param group.
        state: of each param group, the state by the place of the parameter in it.

    Raises:
        ValueError: a parameter of the optimizer is not among ``reference_params``; an override
            that does not fit the param groups; ``truncate`` below 1.
    """

    def __init__(
        self,
        other: torch.optim.Optimizer,
        reference_params: Iterable[Tensor],
        fmodel: FunctionalModule | None = None,
        device: Device = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
        track_higher_grads: bool = True,
        *,
        first_order: bool = False,
        truncate: int | None = None,
        keep_history: bool = True,
    ) -> None:
        if truncate is not None and truncate < 1:
            raise ValueError(f"truncate: expected None or a number of steps, got {truncate}")
        self._fmodel = fmodel
        self._grad_callback = grad_callback
        self._track_higher_grads = track_higher_grads
        self._first_order = first_order
        self._truncate = truncate
        self._keep_history = keep_history
        self._steps = 0
        self.param_groups: list[dict[str, Any]] = []
        self.state: list[defaultdict[int, dict[str, Any]]] = []
        self._indices: list[list[int]] = []  # of each group's parameters among all
        reference_params = list(reference_params)
        self._count = len(reference_params)
        known = {id(param): index for index, param in enumerate(reference_params)}
        for group in other.param_groups:
            params = group["params"]
            if not known.keys() >= set(map(id, params)):
                raise ValueError("reference_params: expected all parameters of the optimizer")
            self._indices.append([known[id(param)] for param in params])
            self.param_groups.append({**group, "params": [None] * len(params)})
            self.state.append(defaultdict(dict))
            for place, param in enumerate(params if other.state else ()):
                if param in other.state:
                    state = self._initial_state(other.state, param, group)
                    self.state[-1][place] = mapped(lambda each: _copied(each, device), state)
        self._members = {index for indices in self._indices for index in indices}
        if override is not None:
            self._apply_override(override)

    def _initial_state(self, state: Any, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """What to take over of the optimizer's state of a parameter."""
        del group
        return dict(state[param])

    def _apply_override(self, override: Override) -> None:
        chosen = {option: self._of_each_group(option, override[option]) for option in override}
        for option, values in chosen.items():
            for group, value in zip(self.param_groups, values, strict=True):
                group[option] = value

    def _of_each_group(self, option: str, values: Any) -> Sequence[Any]:
        if option == "params" or option not in self.param_groups[0]:
            raise ValueError(f"override: expected options of the optimizer, got {option!r}")
        if isinstance(values, Tensor) and values.dim() > 0:
            values = values.unbind()
        elif isinstance(values, Iterable) and not isinstance(values, (Tensor, str)):
            values = list(values)  # an nn.ParameterList is no Sequence
        else:
            values = [values]
        count = len(self.param_groups)
        if len(values) not in (1, count):
            raise ValueError(
                f"override: expected 1 value of {option}, or {count} for as many param groups, got "
                f"{len(values)}"
            )
        return values if len(values) == count else [values[0]] * count

    def step(
        self,
        loss: Tensor,
        params: Iterable[Tensor] | None = None,
        override: Override | None = None,
        grad_callback: GradCallback | None = None,
    ) -> list[Tensor]:
        """Takes the gradients of the loss, and steps from the fast weights to new ones.

        Args:
            loss: a scalar that depends on the weights.
            params: the weights, in place of those of ``fmodel``.
            override: options, from this step on.
            grad_callback: for this step, in place of the constructor's.

        Returns:
            All weights, which are the fast weights of ``fmodel`` from now on. Those without a
            gradient and those in no param group are the same objects as before.

        Raises:
            ValueError: there are no weights to step from, or of another number than
                ``reference_params`` has; a callback returns another number; the override does not
                fit.
        """
        if override is not None:
            self._apply_override(override)
        fast = None if self._fmodel is None else self._fmodel.fast_params
        old = fast if params is None else list(params)
        if old is None:
            raise ValueError("params: expected the weights to step from, as there is no fmodel")
        if len(old) != self._count:
            raise ValueError(
                f"params: expected {self._count} weights, like reference_params, got {len(old)}"
            )
        is_cut = self._is_cut()
        callback = self._grad_callback if grad_callback is None else grad_callback
        grads: Gradients = self._gradients(loss, old, is_cut, everything=callback is not None)
        if callback is not None:
            grads = list(callback(list(grads)))
            if len(grads) != len(old):
                raise ValueError(
                    f"grad_callback: expected {len(old)} gradients, one for each weight, got "
                    f"{len(grads)}"
                )
        if is_cut:
            self.detach_()
            fast = None if self._fmodel is None else self._fmodel.fast_params
            old = fast if params is None and fast is not None else list(map(detached, old))
        new = self._stepped(old, grads)
        self._steps += 1
        if self._fmodel is not None:
            self._fmodel.fast_params = new
        return new

    def _is_cut(self) -> bool:
        """Whether this step starts from constants."""
        every = self._truncate if self._track_higher_grads else None
        return every is not None and self._steps > 0 and self._steps % every == 0

    def _gradients(
        self, loss: Tensor, params: list[Tensor], is_cut: bool, everything: bool
    ) -> list[Tensor | None]:
        """The gradients of the parameters that the step, or everything that a callback may need."""
        wanted = [
            param.requires_grad and (everything or index in self._members)
            for index, param in enumerate(params)
        ]
        inputs = [param for param, is_wanted in zip(params, wanted, strict=True) if is_wanted]
        if not inputs:
            return [None] * len(params)
        is_tracked = self._track_higher_grads and not self._first_order
        found = torch.autograd.grad(
            loss,
            inputs,
            retain_graph=is_tracked,
            create_graph=is_tracked and not is_cut,
            allow_unused=True,
        )
        if len(inputs) == len(params):
            return list(found)
        grads = iter(found)
        return [next(grads) if is_wanted else None for is_wanted in wanted]

    def _stepped(self, params: list[Tensor], grads: Gradients) -> list[Tensor]:
        """The parameters after a step."""
        grouped_grads = []
        for group, indices in zip(self.param_groups, self._indices, strict=True):
            group["params"] = [params[index] for index in indices]
            grouped_grads.append([grads[index] for index in indices])
        with nullcontext() if self._track_higher_grads else torch.no_grad():
            self._update(grouped_grads)
        new = params.copy()
        for group, indices in zip(self.param_groups, self._indices, strict=True):
            for index, param in zip(indices, group["params"], strict=True):
                is_leaf_wanted = not self._track_higher_grads and param is not params[index]
                new[index] = param.requires_grad_() if is_leaf_wanted else param
            group["params"] = [None] * len(indices)  # which nothing here keeps alive
        return new

    @abstractmethod
    def _update(self, grouped_grads: list[list[Tensor | None]]) -> None:
        """Replaces ``params`` in each of :attr:`param_groups`, and what is in :attr:`state`.

        Args:
            grouped_grads: the gradients of each group's parameters; None leaves one as it is.
        """

    def detach_(self) -> None:
        """Cuts the fast weights and the state from the steps that made them."""
        if self._fmodel is not None:
            self._fmodel.detach_()
        for states in self.state:
            for place, state in states.items():
                states[place] = mapped(_without_graph, state)

    def state_dict(self) -> dict[str, Any]:
        """What the optimizer's ``load_state_dict`` takes, in copies without any graph."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        first = 0
        for group, states in zip(self.param_groups, self.state, strict=True):
            numbers = list(range(first, first + len(group["params"])))
            first += len(numbers)
            groups.append({**mapped(_saved, group), "params": numbers})
            for place, held in states.items():
                state[numbers[place]] = mapped(_saved, held)
        return {"state": state, "param_groups": groups}


class DifferentiableSGD(DifferentiableOptimizer):
    """The steps of ``fused_opt.SGD`` and ``torch.optim.SGD``; see ``functional.sgd_step``.

    All param groups step in one pass. Both formulations and decoupled weight decay are there.

    Raises:
        ValueError: an option or an EMA of ``fused_opt.SGD`` that these steps do not have.
    """

    def __init__(self, other: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        _check_options(other)
        super().__init__(other, *args, **kwargs)
        self._made: list[Tensor | None] = []
        self._spare: list[Tensor | None] = []

    def _initial_state(self, state: Any, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The momentum, in the formulation of the group."""
        hyper = SgdHyper.of_group({**OWN_OPTIONS, **group})
        key = STATE_KEY[hyper.formulation]
        momentum = state[param].get(key)
        if momentum is None:
            momentum = ParamStates(state, lambda stream, _: stream).converted_momentum(param, hyper)
        return {} if momentum is None else {key: momentum}

    def _update(self, grouped_grads: list[list[Tensor | None]]) -> None:
        alike: dict[tuple[bool, bool], list[int]] = {}
        for number, group in enumerate(self.param_groups):
            maximize = bool(group.get("maximize")) and not _is_sutskever(group)
            alike.setdefault((bool(group["nesterov"]), maximize), []).append(number)
        writes = [
            self._stepped_groups(numbers, grouped_grads, nesterov, maximize)
            for (nesterov, maximize), numbers in alike.items()
        ]
        for write in writes:  # once no step can fail any more
            write()

    def _stepped_groups(
        self,
        numbers: list[int],
        grouped_grads: list[list[Tensor | None]],
        nesterov: bool,
        maximize: bool,
    ) -> Callable[[], None]:
        """Steps some of the groups together, and returns what keeps the results."""
        parts = [_prepared(self.param_groups[n], grouped_grads[n]) for n in numbers]
        params, grads, hypers = parts[0] if len(parts) == 1 else _joined(parts)
        states = [
            (self.state[n][i], STATE_KEY[self.param_groups[n].get("formulation", "torch")])
            for n in numbers
            for i in range(len(grouped_grads[n]))
        ]
        buffers = [state.get(key) for state, key in states]
        step: Callable[..., tuple[list[Tensor], list[Tensor | None]]]
        step = partial(_differentiable.step, in_two=True)
        if not (self._keep_history or self._track_higher_grads):
            step = self._step_into_spare_memory
        elif len(params) <= SHORT and sum(map(Tensor.numel, params)) <= SHORT_ELEMENTS:
            step = _differentiable.step_by_torch
        new_params, new_buffers = step(params, grads, buffers, hypers, nesterov, maximize)

        def write() -> None:
            rest = iter(new_params)
            for n in numbers:
                self.param_groups[n]["params"] = list(islice(rest, len(grouped_grads[n])))
            for (state, key), buffer in zip(states, new_buffers, strict=True):
                if buffer is not None:
                    state[key] = buffer

        return write

    def _step_into_spare_memory(
        self,
        params: list[Tensor],
        grads: list[Tensor | None],
        buffers: list[Tensor | None],
        hypers: SgdHypers,
        nesterov: bool,
        maximize: bool,
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Steps into the memory that the step before has stepped from, if that was made here."""
        old: list[Tensor | None] = [*params, *buffers]
        if len(self._made) != len(old):  # at first, or when groups step together that did not
            self._made = self._spare = [None] * len(old)
        out = self._spare[: len(params)], self._spare[len(params) :]
        new_params, new_buffers = _differentiable.step(
            params, grads, buffers, hypers, nesterov, maximize, out
        )
        new = [*new_params, *new_buffers]
        rows = zip(old, self._made, new, strict=True)
        self._spare = [o if o is m and o is not n else None for o, m, n in rows]
        self._made = new
        return new_params, new_buffers


#: Parameters, gradients and hyper-parameters of what steps together.
_Part: TypeAlias = tuple[list[Tensor], list[Tensor | None], SgdHypers]


def _prepared(group: dict[str, Any], grads: list[Tensor | None]) -> _Part:
    """A group as what is left to do for ``functional.sgd_step``."""
    _check_group(group)
    params: list[Tensor] = group["params"]
    hypers = SgdHypers(group["lr"], group["momentum"], group["weight_decay"], group["dampening"])
    decay = hypers.weight_decay
    has_decay = isinstance(decay, Tensor) or decay != 0
    if not (_is_sutskever(group) or (has_decay and group.get("decoupled_weight_decay"))):
        return params, grads, hypers

    pairs = list(zip(params, grads, strict=True))
    lr, decay = as_scalar(group["lr"], "lr"), as_scalar(group["weight_decay"], "weight_decay")
    if has_decay and group["decoupled_weight_decay"]:
        params = [p if g is None else (_kept(lr, decay, p) * p).to(p.dtype) for p, g in pairs]
        hypers, has_decay = hypers._replace(weight_decay=0), False
    if _is_sutskever(group):  # p + w, with w = mu w - lr d: the other formula, for -lr d and lr -1
        sign = -1 if group["maximize"] else 1
        descents = [g if g is None or not has_decay else sign * g + decay * p for p, g in pairs]
        if not has_decay:
            descents = [g if g is None else sign * g for g in grads]
        grads = [d if d is None else (-lr * d).to(d.dtype) for d in descents]
        hypers = hypers._replace(lr=-1, weight_decay=0)
    return params, grads, hypers


def _kept(lr: float | Tensor, decay: float | Tensor, param: Tensor) -> float | Tensor:
    """What decoupled weight decay leaves of a parameter, in no lower precision than that has."""
    lr, decay = (
        each.to(torch.promote_types(each.dtype, param.dtype)) if isinstance(each, Tensor) else each
        for each in (lr, decay)
    )
    return 1 - lr * decay


def _joined(parts: list[_Part]) -> _Part:
    """Groups as one list, in which each parameter has its own hyper-parameters."""
    params = [param for part in parts for param in part[0]]
    grads = [grad for part in parts for grad in part[1]]
    hypers: list[Any] = [[part[2][k] for part in parts for _ in part[0]] for k in range(4)]
    return params, grads, SgdHypers(*hypers)


def _is_sutskever(group: dict[str, Any]) -> bool:
    return group.get("formulation") == "sutskever"


#: What a differentiable step does not have, and what there is instead.
_REFUSALS = {
    "master_weights": "run the inner loop on float32 parameters",
    "stochastic_rounding": "run the inner loop on float32 parameters",
    "max_grad_norm": "clip in a grad_callback",
    "state_dtype": "leave it None, for the parameter's dtype",
}


def _check_group(group: dict[str, Any]) -> None:
    for option, instead in _REFUSALS.items():
        if group.get(option):
            raise ValueError(
                f"{option}: differentiable steps do not have it, got {group[option]!r}; {instead}"
            )


def _check_options(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        _check_group(group)
    if getattr(optimizer, "ema", None) is not None:
        raise ValueError(
            "ema: differentiable steps update no average; set optimizer.ema to None, and use "
            "functional.ema_update"
        )


def _copied(value: Any, device: Device) -> Any:
    """A copy of a tensor, on that device; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone() if device is None else value.detach().to(device, copy=True)


def _saved(value: Any) -> Any:
    """What later steps, of whatever optimizer, do not change."""
    return _copied(value, None)


def _without_graph(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


# --- Which class makes the steps of an optimizer

_CLASSES: dict[type, type[DifferentiableOptimizer]] = {}


def register_optim(optim_type: type, diff_optim_type: type[DifferentiableOptimizer]) -> None:
    """Makes :func:`get_diff_optim` take optimizers of a class, by one that does their steps.

    Args:
        optim_type: the class of the optimizers; not of classes derived from it.
        diff_optim_type: a :class:`DifferentiableOptimizer` with an ``_update``.
    """
    _CLASSES[optim_type] = diff_optim_type


def _class_for(optim_type: type) -> type[DifferentiableOptimizer]:
    registered = _CLASSES.get(optim_type)
    if registered is not None:
        return registered
    # torch wraps the step of the class whose constructor runs first, which may inherit it.
    steps = [inspect.unwrap(kind.step) for kind in (torch.optim.SGD, SGD)]
    if issubclass(optim_type, torch.optim.SGD) and inspect.unwrap(optim_type.step) in steps:
        return DifferentiableSGD
    raise TypeError(
        f"opt: expected a fused_opt.SGD or torch.optim.SGD, got {optim_type.__name__}; "
        "register_optim adds other classes"
    )


def get_diff_optim(
    opt: torch.optim.Optimizer,
    reference_params: Iterable[Tensor],
    fmodel: FunctionalModule | None = None,
    device: Device = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """The differentiable steps of an optimizer; see :class:`DifferentiableOptimizer`.

    Raises:
        TypeError: the optimizer is neither ``fused_opt.SGD`` nor ``torch.optim.SGD``, nor of a
            class that :func:`register_optim` knows.
    """
    return _class_for(type(opt))(
        opt,
        reference_params,
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
        **kwargs,
    )


def create_diff_optim(
    opt_type: type[torch.optim.Optimizer],
    opt_kwargs: dict[str, Any] | None = None,
    params: Iterable[Any] | None = None,
    fmodel: FunctionalModule | None = None,
    device: Device = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """The differentiable steps of an optimizer that does not exist.

    Args:
        opt_type: its class.
        opt_kwargs: what its constructor would be given.
        params: fast weights, or param groups of them; those of ``fmodel`` if None. What are no
            fast weights of ``fmodel`` stands for its weights, or for ``params=``, in their order.
        fmodel: as for :func:`get_diff_optim`, with the arguments after it.
        device: where the state goes.
        override: options in place of those in ``opt_kwargs``.
        track_higher_grads: False runs in test mode.
        **kwargs: as for :class:`DifferentiableOptimizer`.

    Raises:
        ValueError: neither ``params`` nor ``fmodel`` is given; some are fast weights of ``fmodel``
            and others are not.
        TypeError: a class of optimizers that :func:`get_diff_optim` does not take.
    """
    if params is None and fmodel is None:
        raise ValueError("params: expected fast weights, as there is no fmodel")
    diff_optim_type = _class_for(opt_type)
    entries = list(fmodel.parameters() if params is None and fmodel is not None else params or ())
    fast = (None if fmodel is None else fmodel.fast_params) or []
    fast_leaves = _leaves(fast)
    known = dict(zip(map(id, fast), fast_leaves, strict=True))
    groups = [
        {**each, "params": _leaves(each["params"], known)}
        for each in entries
        if isinstance(each, dict)
    ]
    leaves = [leaf for group in groups for leaf in group["params"]] or _leaves(entries, known)
    opt = opt_type(groups or leaves, **(opt_kwargs or {}))
    is_known = not {*map(id, leaves)}.isdisjoint(map(id, fast_leaves))
    return diff_optim_type(
        opt,
        fast_leaves if is_known else leaves,
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
        **kwargs,
    )


def _leaves(
    params: Tensor | Iterable[Tensor], known: Mapping[int, Tensor] | None = None
) -> list[Tensor]:
    """What an optimizer takes in place of fast weights; those known, by the id of the weight."""
    params, known = [params] if isinstance(params, Tensor) else params, known or {}
    return [
        known[id(param)] if id(param) in known else param.detach().requires_grad_()
        for param in params
    ]


# --- Learned options


def get_trainable_opt_params(
    opt: torch.optim.Optimizer, device: Device = None
) -> dict[str, list[Any]]:
    """The numbers among an optimizer's options as tensors that require gradients: an override.

    Flags are no numbers, and neither is what differentiable steps do not use.

    Args:
        opt: the optimizer.
        device: where the tensors go.
    """

    def tensor(value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            value = value.detach().clone()
            return (value if device is None else value.to(device)).requires_grad_()
        return torch.tensor(float(value), device=device, requires_grad=True)

    override: dict[str, list[Any]] = {}
    for group in opt.param_groups:
        for option, value in group.items():
            if option != "params" and option not in OWN_OPTIONS and _is_numeric(value):
                override.setdefault(option, []).append(mapped(tensor, value))
    return override


def _is_numeric(value: Any) -> bool:
    leaves = flatten(value)
    return all(
        isinstance(leaf, (int, float, Tensor)) and not isinstance(leaf, bool) for leaf in leaves
    )


def apply_trainable_opt_params(opt: torch.optim.Optimizer, override: Override) -> None:
    """Writes an override into an optimizer's param groups, as numbers where those are numbers.

    Args:
        opt: the optimizer; options that are tensors are written in place.
        override: for each option a list of one value, or of one for each param group.

    Raises:
        ValueError: an option that the optimizer does not have, or lists of another length.
            Nothing has changed.
    """
    groups = opt.param_groups
    for option, values in override.items():
        if option not in groups[0] or len(values) not in (1, len(groups)):
            raise ValueError(
                f"override: expected options of the optimizer with 1 value or {len(groups)}, got "
                f"{option!r} with {len(values)}"
            )
    for option, values in override.items():
        for number, group in enumerate(groups):
            new = values[number if len(values) > 1 else 0]
            group[option] = _applied(new, group[option])


def _applied(new: Any, old: Any) -> Any:
    """A learned value in the form of the one that it replaces."""
    if isinstance(old, (list, tuple)):
        return type(old)([_applied(n, o) for n, o in zip(new, old, strict=True)])
    if isinstance(old, Tensor):
        with torch.no_grad():
            return old.copy_(new.reshape(old.shape) if isinstance(new, Tensor) else new)
    if type(old) is int and not float(new).is_integer():  # such as a momentum that was 0
        return float(new)
    return type(old)(new)
