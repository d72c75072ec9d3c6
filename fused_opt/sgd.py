"""Momentum SGD as a drop-in for ``torch.optim.SGD``: one pass over memory, EMA included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import _use_grad_for_differentiable

from fused_opt._composite import sgd_formula
from fused_opt._hyper import (
    STATE_KEY,
    SgdHyper,
    as_scalar,
    check_formulation,
    check_state_dtype,
)
from fused_opt._plan import Plan, Rows
from fused_opt.ema import EMA

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim.optimizer import ParamsT


class SGD(torch.optim.SGD):
    r"""Momentum SGD in one pass over memory, with the EMA of the weights in the same pass.

    With gradient g, lr η, momentum μ, dampening τ and weight decay λ, for every element

    .. math::
        d &= g + \lambda p \qquad (-g + \lambda p \text{ to maximize}) \\
        v &\leftarrow \mu v + (1 - \tau) d \qquad (v \leftarrow d \text{ at the first step}) \\
        p &\leftarrow p - \eta u, \qquad u = v, \text{ or } d + \mu v \text{ with nesterov} \\
        s &\leftarrow s + (1 - \beta)(p - s) \qquad \text{the shadow of the EMA, if there is one}

    The state holds v as ``momentum_buffer``, as ``torch.optim.SGD`` does, and checkpoints load
    both ways. The second formulation (Sutskever et al., "On the importance of initialization and
    momentum in deep learning", ICML 2013) keeps the learning rate inside the momentum:

    .. math::
        w &\leftarrow \mu w - \eta (1 - \tau) d \qquad (w \leftarrow -\eta d \text{ at first}) \\
        p &\leftarrow p + w, \qquad \text{or } p + \mu w - \eta d \text{ with nesterov}

    As long as η stays the same, w = −ηv and both take the same path. When η changes, the first
    applies the new η to the whole momentum at once, the second only to new gradients. The state
    holds w as ``velocity``; momentum found under the other name is converted with the current η.

    Parameters, gradients, momentum and shadows may be float32, bfloat16 and float16 in any
    mixture, or float64, on CPU and CUDA; arithmetic is float32 (float64 for float64), rounded once
    where a result is stored. Sparse and complex tensors and tensor subclasses run through plain
    torch operations. Gradients are never written, unless ``reset_grads`` asks for it.

    Args:
        params: parameters, named parameters, or param groups, as for ``torch.optim.SGD``.
        lr: the learning rate; a one-element tensor on the parameters' GPU is read there.
        momentum: 0 keeps no momentum.
        dampening: scales the gradient on its way into the momentum by ``1 - dampening``.
        weight_decay: λ, an L2 penalty, or decoupled from the gradient.
        nesterov: requires momentum and no dampening.
        maximize: ascends instead of descending.
        foreach: recorded for compatibility; selects nothing.
        differentiable: lets autograd see the step. Plain torch operations run, the first momentum
            is attached to the graph, and the EMA is not.
        fused: recorded for compatibility; selects nothing.
        ema: its shadows are updated by every step: those of parameters with and without a
            gradient, in and outside this optimizer. The same bits as ``step(); ema.update()``.
        formulation: ``"torch"`` or ``"sutskever"``.
        decoupled_weight_decay: shrinks the parameter itself, p ← (1 − ηλ)p + …, and leaves λp out
            of d, so that the momentum does not carry it (Loshchilov and Hutter, "Decoupled weight
            decay regularization", ICLR 2019).
        reset_grads: the step fills the gradients it has read with 0, in place. A gradient that is
            None stays None.
        state_dtype: the dtype that the momentum is stored in; None for the parameter's. Checkpoints
            keep it: momentum in another dtype is converted when it is loaded.

    Raises:
        ValueError: as ``torch.optim.SGD``, with its messages; an unknown formulation or
            ``state_dtype``; an ``ema`` that is attached to another optimizer. ``step``: gradients
            or momentum that do not fit their parameter, tensors that share memory. Nothing has
            changed.
        RuntimeError: ``step``: the EMA's shadows are applied, or CUDA fails.

    Example:
        >>> import torch
        >>> from fused_opt import EMA, SGD
        >>> model = torch.nn.Linear(4, 2)
        >>> ema = EMA(model, decay=0.99)
        >>> opt = SGD(model.parameters(), lr=0.1, momentum=0.9, ema=ema)
        >>> isinstance(opt, torch.optim.SGD)
        True
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     model(torch.ones(1, 4)).pow(2).sum().backward()
        ...     opt.step()
        >>> ema.num_updates
        3
    """

    # torch.amp.GradScaler leaves unscaling and skipping to the step. A class attribute: pickling
    # and deepcopy drop those of instances.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        ema: EMA | None = None,
        formulation: Literal["torch", "sutskever"] = "torch",
        decoupled_weight_decay: bool = False,
        reset_grads: bool = False,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
        if differentiable and reset_grads:
            raise ValueError("reset_grads would overwrite gradients that differentiable needs")
        if differentiable and state_dtype is not None:
            raise ValueError("state_dtype would round the momentum that differentiable needs")
        self.defaults.update(
            formulation=formulation,
            decoupled_weight_decay=decoupled_weight_decay,
            reset_grads=reset_grads,
            state_dtype=state_dtype,
        )
        self._complete_groups()
        self._start(ema)

    def _complete_groups(self) -> None:
        """Gives every group our own options, where it has none, and checks them."""
        for group in self.param_groups:
            for option in _OWN_OPTIONS:
                group.setdefault(option, self.defaults[option])
            check_formulation(group["formulation"])
            check_state_dtype(group["state_dtype"])

    def _start(self, ema: EMA | None) -> None:
        self._plan = Plan()
        self._ema: EMA | None = None
        self.ema = ema

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and deep copies take the EMA along, which then tracks the copied parameters."""
        return {**super().__getstate__(), "ema": self._ema}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        # load_state_dict comes here too, without an EMA: the one that is attached stays.
        ema = state.pop("ema", self.__dict__.get("_ema"))
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for option, default in _OWN_OPTIONS.items():
            self.defaults.setdefault(option, default)
        self._complete_groups()
        self._start(ema)

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of ``torch.optim.SGD``.

        A group's options are replaced by the checkpoint's, the formulation like the learning rate;
        those that it lacks, as torch's checkpoints lack ours, stay as they are. Momentum of another
        formulation than the group's is converted at the next step, and momentum of another dtype
        than the group's ``state_dtype`` asks for at once.
        """
        groups = state_dict["param_groups"]
        if len(groups) == len(self.param_groups):  # otherwise torch raises
            groups = [
                {**{option: own[option] for option in _OWN_OPTIONS}, **group}
                for own, group in zip(self.param_groups, groups, strict=True)
            ]
        super().load_state_dict({**state_dict, "param_groups": groups})
        self._restore_state_dtype(state_dict)

    def _restore_state_dtype(self, state_dict: dict[str, Any]) -> None:
        """Takes the momentum as it was saved: torch has rounded it to the parameter's dtype."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            if group["state_dtype"] is None:
                continue
            for param, index in zip(group["params"], saved["params"], strict=True):
                for key in STATE_KEY.values():
                    momentum = state_dict["state"].get(index, {}).get(key)
                    if isinstance(momentum, Tensor):
                        self.state[param][key] = momentum.to(param.device, group["state_dtype"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as in torch; it may name its own ``formulation`` and so on."""
        if isinstance(param_group, dict):  # otherwise torch raises
            check_formulation(param_group.get("formulation", "torch"))
            check_state_dtype(param_group.get("state_dtype"))
        super().add_param_group(param_group)

    @property
    def ema(self) -> EMA | None:
        """The EMA that every step updates. Setting it attaches another, or none."""
        return self._ema

    @ema.setter
    def ema(self, ema: EMA | None) -> None:
        if ema is not None:
            if not isinstance(ema, EMA):
                raise TypeError(f"ema: expected a fused_opt.EMA, got {type(ema).__name__}")
            ema._attach(self)
        if self._ema is not None and self._ema is not ema:
            self._ema._detach()
        self._ema = ema

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one step, and that of the EMA.

        Args:
            closure: reevaluates the model, with gradients enabled, and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        if self._ema is not None:
            self._ema._require_not_applied("step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Set by torch.amp.GradScaler. On a GPU this waits for the backward pass to finish.
        found_inf = getattr(self, "found_inf", None)
        grad_scale = getattr(self, "grad_scale", None)
        if found_inf is not None and float(found_inf) != 0:
            self._reset_grads()
            return loss
        scale = 1.0 if grad_scale is None else float(grad_scale)
        if self.defaults["differentiable"]:
            self._differentiable_step(scale)
        else:
            self._step(scale)
        if self._ema is not None:
            self._ema.num_updates += 1
        return loss

    def _reset_grads(self) -> None:
        """What is left of a step that is skipped: infinite gradients must not stay."""
        for group in self.param_groups:
            for param in group["params"] if group["reset_grads"] else ():
                if param.grad is not None:
                    param.grad.zero_()

    @_disable_dynamo
    def _step(self, grad_scale: float) -> None:
        ema = self._ema
        shadows = ema._shadow_of if ema is not None else None
        decay = ema.decay if ema is not None else 0.0
        plan = self._plan
        plan.clear(self._subject)
        started: list[tuple[Rows, SgdHyper]] = []
        try:
            for group in self.param_groups:
                hyper = SgdHyper.of_group(group, grad_scale)
                new = plan.add_param_group(group["params"], self.state, shadows, hyper, decay)
                if new.params:
                    started += [(rows, hyper) for rows in self._start_momentum(new, hyper, decay)]
            if shadows is not None:
                plan.add_remaining_ema(shadows, decay)
            plan.run()
        finally:
            plan.clear(self._subject)
        for rows, hyper in started:
            for param, momentum in zip(rows.params, rows.momentum_buffers or (), strict=True):
                self._keep_momentum(param, momentum, hyper.formulation)

    def _start_momentum(self, new: Rows, hyper: SgdHyper, decay: float) -> list[Rows]:
        """Plans the step of rows whose momentum the state lacks, and returns them with it.

        Momentum that is there in the other formulation is converted; what has none is at its
        first step.
        """
        other_key = STATE_KEY[_OTHER[hyper.formulation]]
        held = [self.state.get(param, {}).get(other_key) for param in new.params]
        first = new.take([i for i, momentum in enumerate(held) if momentum is None])
        later = new.take([i for i, momentum in enumerate(held) if momentum is not None])
        if later.momentum_buffers is not None:
            later.momentum_buffers[:] = [
                self._converted(param, momentum, hyper)
                for param, momentum in zip(new.params, held, strict=True)
                if momentum is not None
            ]
        self._plan.add_first_sgd(first, hyper, decay)
        self._plan.add_sgd(later, hyper, decay)
        return [first, later]

    def _converted(self, param: Tensor, momentum: Tensor, hyper: SgdHyper) -> Tensor:
        """The momentum in the formulation of ``hyper``, from the other one: w = -lr v."""
        if hyper.formulation == "sutskever":
            return momentum * -as_scalar(hyper.lr, "lr")
        if hyper.lr == 0:
            raise ValueError(
                f"{self._subject('momentum_buffers', param)}: expected a learning rate other than "
                "0 to convert the velocity of the sutskever formulation"
            )
        return momentum / -as_scalar(hyper.lr, "lr")

    def _keep_momentum(self, param: Tensor, momentum: Tensor | None, formulation: str) -> None:
        state = self.state[param]
        state[STATE_KEY[formulation]] = momentum
        state.pop(STATE_KEY[_OTHER[formulation]], None)

    def _differentiable_step(self, grad_scale: float) -> None:
        for group in self.param_groups:
            hyper = SgdHyper.of_group(group, grad_scale)
            for param in group["params"]:
                if param.grad is None:
                    continue
                momentum = self.state.get(param, {}).get(hyper.state_key)
                # The graph may need the parameter as it was, and it is overwritten here.
                new_param, new_momentum = sgd_formula(param.clone(), param.grad, momentum, hyper)
                param.copy_(new_param)
                if hyper.state_key is not None:
                    self._keep_momentum(param, new_momentum, hyper.formulation)
        if self._ema is not None:
            with torch.no_grad():
                self._plan.run_ema(self._ema._shadow_of, self._ema.decay, self._subject)

    def _subject(self, stream: str, param: Tensor) -> str:
        """Names a tensor at fault by its parameter's place in ``param_groups``."""
        for g, group in enumerate(self.param_groups):
            for i, other in enumerate(group["params"]):
                if other is param:
                    name = f" ({group['param_names'][i]!r})" if "param_names" in group else ""
                    return f"{stream} of parameter {i} in group {g}{name}"
        return f"{stream} of a parameter that only the EMA tracks"


# What a param group has beyond torch's options, and what it is where nothing is said.
_OWN_OPTIONS = {
    "formulation": "torch",
    "decoupled_weight_decay": False,
    "reset_grads": False,
    "state_dtype": None,
}

_OTHER = {"torch": "sutskever", "sutskever": "torch"}
