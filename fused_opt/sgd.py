"""Momentum SGD as a drop-in for ``torch.optim.SGD``: one pass over memory, EMA included."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, _use_grad_for_differentiable

from fused_opt._averages import Averages
from fused_opt._composite import sgd_formula
from fused_opt._counter import Counter, is_capturing
from fused_opt._hyper import (
    OWN_OPTIONS,
    REFINEMENT_DTYPES,
    REFINEMENT_KEY,
    STATE_KEY,
    ClipHyper,
    SgdHyper,
    as_scalar,
    check_capturable,
    check_options,
    common_max_grad_norm,
)
from fused_opt._plan import Clip, Gate, Plan, Refinement, Rows, new_momentum
from fused_opt._rounding import group_roundings, shadow_roundings
from fused_opt._state import ParamStates
from fused_opt.ema import EMA
from fused_opt.target_network import TargetNetwork

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.optim.optimizer import ParamsT

_P = ParamSpec("_P")
_R = TypeVar("_R")


class SGD(torch.optim.SGD):
    r"""Momentum SGD in one pass over memory, with the EMA of the weights in the same pass.

    With gradient g, lr η, momentum μ, dampening τ and weight decay λ, for every element

    .. math::
        g &\leftarrow \min(1, n_\text{max} / (n + 10^{-6})) \, g \qquad
            \text{if gradients of norm } n \text{ are clipped to } n_\text{max} \\
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
        lr: the learning rate. It, ``momentum``, ``dampening``, ``weight_decay``, ``max_grad_norm``
            and the EMA's decay may be one-element tensors, to be changed in place; on the
            parameters' GPU they are read there, and nothing waits for them.
        momentum: 0 keeps no momentum; a tensor always does.
        dampening: scales the gradient on its way into the momentum by ``1 - dampening``.
        weight_decay: λ, an L2 penalty, or decoupled from the gradient.
        nesterov: requires momentum and no dampening.
        maximize: ascends instead of descending.
        foreach: recorded for compatibility; selects nothing.
        differentiable: lets autograd see the step. Plain torch operations run, the first momentum
            is attached to the graph, and the EMA is not.
        fused: recorded for compatibility; selects nothing.
        ema: its shadows are updated by every step: those of parameters with and without a
            gradient, in and outside this optimizer. The same bits as ``step(); ema.update()``,
            which rounds shadows to nearest. A ``TargetNetwork`` stands for its EMA.
        formulation: ``"torch"`` or ``"sutskever"``.
        decoupled_weight_decay: shrinks the parameter itself, p ← (1 − ηλ)p + …, and leaves λp out
            of d, so that the momentum does not carry it (Loshchilov and Hutter, "Decoupled weight
            decay regularization", ICLR 2019).
        reset_grads: the step fills the gradients it has read with 0, in place. A gradient that is
            None stays None.
        state_dtype: the dtype that the momentum is stored in; None for the parameter's. Checkpoints
            keep it: momentum in another dtype is converted when it is loaded.
        master_weights: how bfloat16 and float16 parameters keep updates that are smaller than half
            their spacing; other parameters are exact as they are. ``None``: not at all, every
            result is rounded to nearest even. ``"fp32"``: the state holds a float32 ``master``,
            which the step updates, and writes its rounding to the parameter. ``"split"``, for
            bfloat16: the state holds the lower 16 bits of that master, ``residual``, and the
            parameter is its upper half; the same bits as ``"fp32"`` in half the memory.
            ``"kahan"``: the state holds what rounding has lost, ``compensation``, in the
            parameter's dtype. Beside a master the momentum is float32 unless ``state_dtype`` says
            otherwise, and the EMA follows the master. Master and residual round bfloat16 ties away
            from zero, which can be undone.
        stochastic_rounding: rounds bfloat16 and float16 parameters without a refinement, momentum
            and shadows up or down with the odds that keep the mean, so that small steps add up
            without more state. The random numbers depend on ``rounding_seed``, the steps taken
            since the group was added while any group rounded so (``rounding_steps`` in
            ``param_groups``, saved with it), the parameter's place in ``param_groups``, and the
            element's in memory: any number of threads and any device give the same bits, and a
            checkpoint resumes them.
        rounding_seed: in [0, 2**64). The same for all by default, so that replicas of a model that
            see the same gradients stay the same.
        max_grad_norm: clips the gradients to this 2-norm, taken over all param groups, which must
            agree on it: as ``clip_grad_norm_`` before the step, but the step multiplies each
            gradient as it reads it, and none is written. The norm, in :attr:`grad_norm`, takes one
            more pass over the gradients. None does not clip, and inf only takes the norm.
        capturable: prepares for CUDA graphs. All state exists from the start, so that the first
            step may be captured, and a step allocates nothing and counts on the device. Takes no
            dampening, since the first step would differ from those after it.

    Raises:
        ValueError: as ``torch.optim.SGD``, with its messages; an unknown formulation,
            ``state_dtype`` or ``master_weights``; a ``rounding_seed`` out of range; a
            ``max_grad_norm`` that is not above 0 or differs between groups (as a tensor, is not the
            same one); ``capturable`` with dampening; an ``ema`` that is attached to another
            optimizer. ``step``: gradients or state that do not fit their parameter, tensors that
            share memory. Nothing has changed.
        RuntimeError: ``step``: the EMA's shadows are applied, CUDA fails, or a CUDA graph is
            captured before there is all the state that the step needs, or with
            ``stochastic_rounding`` and not ``capturable``. Nothing has changed.

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
        momentum: float | Tensor = 0,
        dampening: float | Tensor = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        ema: EMA | TargetNetwork | None = None,
        formulation: Literal["torch", "sutskever"] = "torch",
        decoupled_weight_decay: bool = False,
        reset_grads: bool = False,
        state_dtype: torch.dtype | None = None,
        master_weights: Literal["fp32", "split", "kahan"] | None = None,
        stochastic_rounding: bool = False,
        rounding_seed: int = 0,
        max_grad_norm: float | Tensor | None = None,
        capturable: bool = False,
    ) -> None:
        numbers = {"momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        for name, number in numbers.items():
            as_scalar(number, name)
        super().__init__(
            params,
            lr,
            momentum,  # type: ignore[arg-type]
            dampening,  # type: ignore[arg-type]
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
        if differentiable and master_weights is not None:
            raise ValueError("master_weights would hide the parameters that differentiable needs")
        if differentiable and stochastic_rounding:
            raise ValueError("stochastic_rounding has no gradient, which differentiable needs")
        self.defaults.update(
            formulation=formulation,
            decoupled_weight_decay=decoupled_weight_decay,
            reset_grads=reset_grads,
            state_dtype=state_dtype,
            master_weights=master_weights,
            stochastic_rounding=stochastic_rounding,
            rounding_seed=rounding_seed,
            rounding_steps=0,
            max_grad_norm=max_grad_norm,
            capturable=capturable,
        )
        self._complete_groups()
        self._start(None)
        self._prepare_capture()
        self.ema = ema  # last: what raises before leaves it free for another optimizer

    def _complete_groups(self) -> None:
        """Gives every group our own options, where it has none, and checks them."""
        for group in self.param_groups:
            for option in OWN_OPTIONS:
                group.setdefault(option, self.defaults[option])
            check_options(group)
        self._max_grad_norm()

    def _max_grad_norm(self) -> float | Tensor | None:
        """What all groups say, which users change between steps."""
        max_norm = common_max_grad_norm(self.param_groups)
        if max_norm is not None and self.defaults["differentiable"]:
            raise ValueError("max_grad_norm clips outside the graph that differentiable needs")
        return max_norm

    def _start(self, ema: EMA | TargetNetwork | None) -> None:
        self._plan = Plan(keeps_memory=True)
        self._clip: Clip | None = None
        # Where fused_opt.GradScaler wants to be told whether gradients are infinite, for one step.
        self._sought_inf: Tensor | None = None
        # Steps that only a device knows to be taken, beside those in the groups.
        self._rounding_steps = Counter("rounding_steps")
        self._ema: EMA | None = None
        self.ema = ema

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and deep copies take the EMA along, which then tracks the copied parameters."""
        state = super().__getstate__()
        groups = [self._with_rounding_steps(group) for group in state["param_groups"]]
        return {**state, "param_groups": groups, "ema": self._ema}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        # load_state_dict comes here too, without an EMA: the one that is attached stays.
        is_loading = "ema" not in state
        ema = state.pop("ema", self.__dict__.get("_ema"))
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for option, default in OWN_OPTIONS.items():
            self.defaults.setdefault(option, default)
        self._complete_groups()
        self._start(ema)
        if not is_loading:
            self._prepare_capture()

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Returns what ``torch.optim.SGD`` does, with our options in the param groups."""
        state = super().state_dict()
        state["param_groups"] = list(map(self._with_rounding_steps, state["param_groups"]))
        return state

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint of this class or of ``torch.optim.SGD``.

        A group's options are replaced by the checkpoint's, the formulation like the learning rate;
        those that it lacks, as torch's checkpoints lack ours, stay as they are. Momentum of another
        formulation than the group's is converted at the next step, and momentum of another dtype
        than the group's ``state_dtype`` asks for at once. Masters and residuals that
        ``torch.optim.SGD`` has rounded to the parameter's dtype are left out: the parameters that
        it has trained are exact as they are. A checkpoint that cannot be loaded changes nothing.
        """
        loaded: dict[str, Any] = {}

        # Between the user's hooks, which change what is loaded, and what they find loaded.
        def complete(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
            loaded.update(self._completed(state_dict))
            return loaded

        def restore(_: Any) -> None:
            self._restore_dtypes(loaded)
            self._prepare_capture()

        last_before = self.register_load_state_dict_pre_hook(complete)
        first_after = self.register_load_state_dict_post_hook(restore, prepend=True)
        before = dict(vars(self))
        try:
            super().load_state_dict(state_dict)
        except BaseException:  # torch has made new groups and state, and left the old ones alone
            vars(self).clear()
            vars(self).update(before)
            raise
        finally:
            last_before.remove()
            first_after.remove()

    def _completed(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint with those of our options that it lacks, once they are checked."""
        groups = state_dict["param_groups"]
        if len(groups) == len(self.param_groups):  # otherwise torch raises
            owns = [self._with_rounding_steps(group) for group in self.param_groups]
            groups = [
                {**{option: own[option] for option in OWN_OPTIONS}, **group}
                for own, group in zip(owns, groups, strict=True)
            ]
            for own, group in zip(owns, groups, strict=True):
                check_options({**self.defaults, **group})
                # Their refinements are made as soon as it is loaded.
                if group["capturable"] and group["master_weights"] is not None:
                    for param in own["params"]:
                        self._states.check_refinable(param, group["master_weights"])
            common_max_grad_norm(groups)
        return {**state_dict, "param_groups": groups}

    def _restore_dtypes(self, state_dict: dict[str, Any]) -> None:
        """Takes the state as it was saved, where torch has rounded it to the parameter's dtype."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            hyper = SgdHyper.of_group(group)
            for param, index in zip(group["params"], saved["params"], strict=True):
                for key, value in state_dict["state"].get(index, {}).items():
                    if not isinstance(value, Tensor) or param.is_complex():
                        continue
                    if key in STATE_KEY.values():
                        self.state[param][key] = value.to(param.device, hyper.momentum_dtype(param))
                    elif key not in REFINEMENT_KEY.values():
                        continue
                    elif value.dtype in REFINEMENT_DTYPES[key]:
                        self.state[param][key] = value.to(param.device)
                    else:  # torch.optim.SGD has rounded it, and its steps have left it behind
                        del self.state[param][key]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as in torch; it may name its own ``formulation`` and so on.

        ``max_grad_norm`` is that of the other groups.
        """
        if isinstance(param_group, dict):  # otherwise torch raises
            check_options({**OWN_OPTIONS, **self.defaults, **param_group})
            if "max_grad_norm" in self.defaults:  # not while the constructor adds its groups
                known = self.param_groups[0]
                param_group.setdefault("max_grad_norm", known["max_grad_norm"])
                common_max_grad_norm([known, param_group])
        super().add_param_group(param_group)
        if "_plan" in self.__dict__:  # again, not before the constructor is through
            group = self.param_groups[-1]
            group["rounding_steps"] = self._shifted(group["rounding_steps"], -1)
            try:
                self._prepare_capture()
            except BaseException:  # such as no memory
                del self.param_groups[-1]
                raise

    @torch.no_grad()
    def _prepare_capture(self) -> None:
        """Makes what a captured step may not, for the groups that are ``capturable``."""
        if not self._is_capturable():
            return
        started, states = [], self._states
        for group in self.param_groups:
            hyper = SgdHyper.of_group(group)
            for param in group["params"] if group["capturable"] else ():
                momentum = refinement = None
                if hyper.state_key is not None and not states.has_momentum(param, hyper):
                    momentum = states.converted_momentum(param, hyper)
                    momentum = new_momentum(param, hyper) if momentum is None else momentum
                if hyper.refinement_key is not None:
                    refinement = states.wanted_refinement(param, hyper)
                started.append((param, hyper, momentum, refinement))
        for param, hyper, momentum, refinement in started:
            if momentum is not None:
                states.keep_momentum(param, momentum, hyper)
            if refinement is not None:
                states.keep_refinement(param, refinement, hyper)
        self._reserve()

    def _reserve(self) -> None:
        """Takes the memory that steps use on devices, and makes the counter there."""
        home = self._home()
        if home is None:
            return
        self._rounding_steps.on(home)
        if self._ema is not None:
            self._ema._updates.on(home)
        of_device: dict[torch.device, list[int]] = {home: []}
        for param in (param for group in self.param_groups for param in group["params"]):
            if param.device.type in _OUR_DEVICES:
                of_device.setdefault(param.device, []).append(param.numel())
        for device, elements in of_device.items():
            # Of each group, as it is and as dense copies; and of what only the EMA tracks.
            self._plan.reserve(device, 2 * len(self.param_groups) + 2, elements)

    @property
    def _states(self) -> ParamStates:
        return ParamStates(self.state, self._subject)

    def _is_capturable(self) -> bool:
        return True in [group["capturable"] for group in self.param_groups]

    def _home(self) -> torch.device | None:
        """Where steps are counted on a device, if they can be."""
        for group in self.param_groups:
            for param in group["params"]:
                return param.device if param.device.type in _OUR_DEVICES else None
        return torch.device("cpu")

    @property
    def ema(self) -> EMA | None:
        """The EMA that every step updates. Setting it attaches another, or none."""
        return self._ema

    @ema.setter
    def ema(self, ema: EMA | TargetNetwork | None) -> None:
        if isinstance(ema, TargetNetwork):
            ema = ema.ema
        if ema is not None:
            if not isinstance(ema, EMA):
                raise TypeError(
                    "ema: expected a fused_opt.EMA or TargetNetwork, got " + type(ema).__name__
                )
            home = self._home()
            if home is not None and self._is_capturable():
                ema._updates.on(home)  # which may find no memory, and leaves the EMA free then
            ema._attach(self)
        if self._ema is not None and self._ema is not ema:
            self._ema._detach()
        self._ema = ema

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the gradients at the last step, before they were clipped.

        A new tensor of no dimensions on the first gradient's device, float64 where a gradient is
        and otherwise float32. A scale that ``torch.amp.GradScaler`` has put on the gradients is
        divided out, and a step that it skips leaves the norm of the gradients that made it do so.
        None before the first step, and without ``max_grad_norm``.
        """
        return None if self._clip is None else self._clip.norm()

    @staticmethod
    def profile_hook_step(func: Callable[_P, _R]) -> Callable[_P, _R]:
        """What torch wraps every ``step`` in; under ``torch.compile``, one clean graph break."""
        wrapped: Callable[_P, _R] = Optimizer.profile_hook_step(func)
        return _disable_dynamo(wrapped)

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
        # Set by torch.amp.GradScaler.
        found_inf = getattr(self, "found_inf", None)
        grad_scale = getattr(self, "grad_scale", None)
        grad_scale = 1.0 if grad_scale is None else grad_scale
        if self.defaults["differentiable"]:
            self._differentiable_step(found_inf, float(grad_scale))
        else:
            self._step(found_inf, grad_scale)
        return loss

    def _step(self, found_inf: float | Tensor | None, grad_scale: float | Tensor) -> None:
        """Plans, checks and runs one step, unless gradients are infinite.

        The host asks whether they are only where no device can act on it: at once, if it is told
        itself, and once the step is planned, if something in it cannot be skipped by a device.
        """
        sought, self._sought_inf = self._sought_inf, None
        if found_inf is not None and sought is None and not self._is_left_to_device(found_inf):
            if float(found_inf) != 0:
                self._skip(grad_scale)
                return
            found_inf = None
        max_norm, clip, skipped = self._max_grad_norm(), None, False
        averages = None
        if self._ema is not None:
            left = self._is_counted_on_device(found_inf if sought is None else sought)
            averages = self._ema._averages(left)
        plan = self._plan
        plan.clear(self._subject)
        try:
            in_pass = None if self._ema is None else self._ema._in_pass(averages)
            started = self._add_groups(grad_scale, in_pass)
            if max_norm is not None or sought is not None:
                plan.check()
                clip = self._take_norm(max_norm, grad_scale)
                if sought is not None:
                    found_inf = sought.copy_(clip.total - clip.total != 0)  # by inf and NaN
            if not isinstance(found_inf, Tensor):
                found_inf = None
            elif self._needs_host(found_inf, started):
                skipped, found_inf = float(found_inf) != 0, None
            if max_norm is None:
                clip = None
            if not skipped:
                self._run(clip, found_inf, averages, started)
        finally:
            plan.clear(self._subject)
        self._clip = clip
        if skipped:
            self._reset_grads()

    def _is_left_to_device(self, found_inf: float | Tensor) -> bool:
        """Whether a device shall see for itself if a step is skipped."""
        if not isinstance(found_inf, Tensor) or self._home() is None:
            return False
        return found_inf.is_cuda or self._is_capturable()

    def _is_counted_on_device(self, found_inf: float | Tensor | None) -> bool:
        """Whether a device alone may know that a step is taken, or how often."""
        home = self._home()
        if home is None:
            return False
        capturable = self._is_capturable() or is_capturing(home)
        return capturable or (found_inf is not None and self._is_left_to_device(found_inf))

    def _needs_host(self, found_inf: Tensor, started: list[tuple[Rows, SgdHyper]]) -> bool:
        """Whether a step must know now if it is skipped, waiting for the GPU.

        No device can skip what torch runs, or a parameter's first step where the next would differ
        because it is not the first.
        """
        states = self._states

        def differs(rows: Rows, hyper: SgdHyper) -> bool:
            converted = any(states.has_other_momentum(param, hyper) for param in rows.params)
            return rows.momentum_buffers is not None and (hyper.may_dampen or converted)

        return (
            not self._is_left_to_device(found_inf)
            or self._plan.has_torch_rows
            or any(differs(rows, hyper) for rows, hyper in started)
        )

    def _skip(self, grad_scale: float | Tensor) -> None:
        """What is left of a step that the host knows to be skipped."""
        max_norm = self._max_grad_norm()
        self._clip = None
        if max_norm is not None:
            params = [param for group in self.param_groups for param in group["params"]]
            self._plan.clear(self._subject)
            try:
                self._plan.add_grads([p.grad for p in params if p.grad is not None])
                self._clip = self._take_norm(max_norm, grad_scale)
            finally:
                self._plan.clear(self._subject)
        self._reset_grads()

    def _reset_grads(self) -> None:
        """Infinite gradients must not stay."""
        for group in self.param_groups:
            for param in group["params"] if group["reset_grads"] else ():
                if param.grad is not None:
                    param.grad.zero_()

    def _take_norm(self, max_norm: float | Tensor | None, grad_scale: float | Tensor) -> Clip:
        """The norm of all gradients in the plan; without clipping, one that does not overflow."""
        params = (param for group in self.param_groups for param in group["params"])
        devices = (param.grad.device for param in params if param.grad is not None)
        home = next(devices, torch.device("cpu"))
        if max_norm is None:
            return self._plan.grad_norm(ClipHyper(float("inf"), infinity=True), home)
        return self._plan.grad_norm(ClipHyper(max_norm, grad_scale), home)

    def _add_groups(
        self, grad_scale: float | Tensor, averages: Averages | None
    ) -> list[tuple[Rows, SgdHyper]]:
        """Adds everything to the plan, and returns the rows that had no complete state."""
        plan = self._plan
        if averages is not None:
            plan.set_averages(averages)
        started: list[tuple[Rows, SgdHyper]] = []
        roundings = group_roundings(self.param_groups, self._rounding_steps_on_device())
        for group, rounding in zip(self.param_groups, roundings, strict=True):
            if group["capturable"]:
                check_capturable(group)
            hyper = SgdHyper.of_group(group, grad_scale)
            new = plan.add_param_group(group["params"], self.state, hyper, rounding)
            if new.params:
                plan.require_no_capture(new)
                started += [(rows, hyper) for rows in self._start_state(new, hyper)]
        if averages is not None:
            plan.add_remaining_ema(
                partial(self._refinements, started),
                lambda: shadow_roundings(averages.shadows, self.param_groups, roundings),
            )
        return started

    def _rounding_steps_on_device(self) -> Tensor | None:
        """What the home has counted; the groups take over what another device has."""
        steps, home = self._rounding_steps, self._home()
        if steps.counts_on not in (None, home):
            for group in self.param_groups:
                group["rounding_steps"] = self._shifted(group["rounding_steps"], +1)
            steps = self._rounding_steps = Counter("rounding_steps")
        return steps.held(home)

    def _run(
        self,
        clip: Clip | None,
        found_inf: Tensor | None,
        averages: Averages | None,
        started: list[tuple[Rows, SgdHyper]],
    ) -> None:
        """Runs the plan, keeps new state, and counts the step: on the device if only that can."""
        rounding = any(group["stochastic_rounding"] for group in self.param_groups)
        counters = [] if self._ema is None else [self._ema._updates]
        counters += [self._rounding_steps] if rounding else []
        gate = self._gate(found_inf, counters) if found_inf is not None or counters else None
        rest: list[Callable[[], object]] = [partial(self._keep_state, started)]
        if self._ema is not None and averages is not None:
            rest.append(
                self._ema._planned_besides(
                    averages, gate, self._subject, partial(self._refinements, started), rounding
                )
            )
        if gate is None and self._ema is not None:
            rest.append(self._ema._updates.next())
        if gate is None and rounding and self._rounding_steps.counts_on is not None:
            rest.append(self._rounding_steps.next())
        elif gate is None and rounding:  # in all groups, as a device does: one may begin later
            rest += [
                partial(group.__setitem__, "rounding_steps", group["rounding_steps"] + 1)
                for group in self.param_groups
            ]

        def settle() -> None:
            for part in rest:
                part()

        self._plan.run(clip, gate, settle)

    def _refinements(self, started: list[tuple[Rows, SgdHyper]]) -> Refinement | None:
        """What gives the refinement of a parameter, those that this step makes among them."""
        if not any(group["master_weights"] for group in self.param_groups):
            return None
        new = {
            param: refinement
            for rows, _ in started
            for param, refinement in zip(rows.params, rows.refinements or (), strict=False)
        }
        # The state may hold what a group has had before.
        unrefined = {
            param
            for group in self.param_groups
            if not group["master_weights"]
            for param in group["params"]
        }
        states = self._states
        return lambda param: (
            None if param in unrefined else new.get(param, states.refinement(param))
        )

    def _gate(self, found_inf: Tensor | None, counters: list[Counter]) -> Gate | None:
        """What a device decides and counts; None if the host knows that the step is taken once."""
        home = self._home()
        left_to_device = found_inf is not None or self._is_capturable()
        if home is None:
            return None
        if self._rounding_steps in counters and not left_to_device and is_capturing(home):
            raise RuntimeError(
                "stochastic_rounding: expected capturable=True where a CUDA graph is captured, "
                "whose replays must not round alike"
            )
        if not (left_to_device or home.type == "cuda"):
            return None
        # Where they are not needed yet too: in a capture it would be too late to make them.
        for counter in counters:
            counter.on(home)
        if not (left_to_device or is_capturing(home)):
            return None
        return Gate(found_inf, [counter.counted_on(home) for counter in counters], home)

    def _keep_state(self, started: list[tuple[Rows, SgdHyper]]) -> None:
        states = self._states
        for rows, hyper in started:
            for i, param in enumerate(rows.params):
                if rows.momentum_buffers is not None:
                    states.keep_momentum(param, rows.momentum_buffers[i], hyper)
                if rows.refinements is not None:
                    states.keep_refinement(param, rows.refinements[i], hyper)

    def _with_rounding_steps(self, group: dict[str, Any]) -> dict[str, Any]:
        """A group with all steps in its count, those on the device too, which waits for it.

        The group itself keeps its part: a captured step has it, and adds the device's.
        """
        if "rounding_steps" not in group:  # a hook of the user's has left it out
            return group
        return {**group, "rounding_steps": self._shifted(group["rounding_steps"], +1)}

    def _shifted(self, steps: int, sign: int) -> int:
        """A count of steps with (+1) or without (-1) those that a device has counted."""
        return (steps + sign * int(self._rounding_steps)) % 2**64

    def _start_state(self, new: Rows, hyper: SgdHyper) -> list[Rows]:
        """Plans the step of rows whose state is not complete, and returns them with it.

        What is there in another form is converted; what has no momentum is at its first step.
        """
        states = self._states
        if hyper.refinement_key is not None:
            refinements = [states.wanted_refinement(param, hyper) for param in new.params]
            new = new._replace(refinements=refinements)
        if new.momentum_buffers is None:
            self._plan.add_sgd(new, hyper)
            return [new]
        new.momentum_buffers[:] = [
            states.converted_momentum(param, hyper) if momentum is None else momentum
            for param, momentum in zip(new.params, new.momentum_buffers, strict=True)
        ]
        held = [momentum is not None for momentum in new.momentum_buffers]
        first = new.take([i for i, is_held in enumerate(held) if not is_held])
        later = new.take([i for i, is_held in enumerate(held) if is_held])
        self._plan.add_first_sgd(first, hyper)
        self._plan.add_sgd(later, hyper)
        return [first, later]

    @torch.no_grad()
    def sync_masters(self) -> None:
        """Takes the parameters as they are for exact, after they were changed from outside.

        With ``master_weights`` the next step starts from the master, and without this call it
        would undo whatever else has written to the parameters: a copied checkpoint, a pruning mask.
        What refines a parameter of another dtype than it has now is dropped.
        """
        for group in self.param_groups:
            for param in group["params"]:
                self._states.sync_refinement(param)

    def _differentiable_step(
        self, found_inf: float | Tensor | None, grad_scale: float | Tensor
    ) -> None:
        if found_inf is not None and float(found_inf) != 0:
            self._skip(grad_scale)
            return
        self._max_grad_norm()
        averages = None
        if self._ema is not None:
            with torch.no_grad():  # before anything is changed: a decay may be out of range
                averages = self._ema._averages(left_to_device=False)
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
                    self._states.keep_momentum(param, new_momentum, hyper)
        if self._ema is not None:
            with torch.no_grad():
                self._ema._run(averages, None, self._subject)

    def _subject(self, stream: str, param: Tensor) -> str:
        """Names a tensor at fault by its parameter's place in ``param_groups``."""
        for g, group in enumerate(self.param_groups):
            for i, other in enumerate(group["params"]):
                if other is param:
                    name = f" ({group['param_names'][i]!r})" if "param_names" in group else ""
                    return f"{stream} of parameter {i} in group {g}{name}"
        return f"{stream} of a parameter that only the EMA tracks"


_OUR_DEVICES = ("cpu", "cuda")
