"""A state machine that trains as users do, and knows at each moment what everything must be.

Each rule does one thing to the run and states what that changes; everything else must keep its
bits. What a step makes of it, oracle.py says. A step is also repeated by a twin, which has the same
state but no history, on another number of threads, and must come to the same bits.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from reference import DTYPES, FULL_DTYPES, HALF_DTYPES, MOMENTUM_KEYS, random_tensor
from torch import Tensor, nn

import fused_opt
from fused_opt import _C, EMA, SGD
from fuzz import faults
from fuzz.oracle import (
    GONE,
    REFINEMENT_KEYS,
    Snapshot,
    after_step,
    after_update,
    assert_snapshots_agree,
    groups,
    members,
    momentum_dtype,
    refusal,
)
from fuzz.run import (
    DECAYS,
    LARGE_SIZES,
    LAYOUTS,
    PLAIN_DECAYS,
    SIZES,
    Model,
    Run,
    laid_out,
    places,
    snapshot,
    threads,
    through_file,
    through_pickle,
    twin_of,
    versions,
)

seeds = st.integers(0, 2**16)
sizes = st.sampled_from(SIZES) | st.integers(0, 70)
dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(("dense", "dense", *LAYOUTS))
#: Now and then more elements than a chunk of a launch has, which are slow to check.
rarely_large = st.integers(0, 9).flatmap(lambda n: sizes if n else st.sampled_from(LARGE_SIZES))

#: What has been done over all examples, for the summary of a long run.
COUNTS: dict[str, int] = {}


def count(what: str) -> None:
    COUNTS[what] = COUNTS.get(what, 0) + 1


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Options of a param group that the constructor accepts."""
    momentum = draw(st.sampled_from((0.0, 0.5, 0.9, 0.9)))
    nesterov = momentum > 0 and draw(st.booleans())
    return {
        "lr": draw(st.sampled_from((0.0, 0.01, 0.1, 0.1, 0.5))),
        "momentum": momentum,
        "dampening": 0.0 if nesterov else draw(st.sampled_from((0.0, 0.0, 0.25))),
        "weight_decay": draw(st.sampled_from((0.0, 0.0, 0.05))),
        "nesterov": nesterov,
        "maximize": draw(st.booleans()),
        "formulation": draw(st.sampled_from(("torch", "torch", "sutskever"))),
        "decoupled_weight_decay": draw(st.booleans()),
        "reset_grads": draw(st.booleans()),
        "state_dtype": draw(st.sampled_from((None, None, None, torch.float32, torch.bfloat16))),
        "master_weights": draw(st.sampled_from((None, None, *REFINEMENT_KEYS))),
        "stochastic_rounding": draw(st.booleans()),
        "rounding_seed": draw(st.integers(0, 3)),
    }


#: What users change between steps.
CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "lr": st.sampled_from((0.0, 0.05, 0.2, 1.0)),
    "momentum": st.sampled_from((0.0, 0.25, 0.9)),
    "dampening": st.sampled_from((0.0, 0.5)),
    "weight_decay": st.sampled_from((0.0, 0.1)),
    "nesterov": st.booleans(),
    "maximize": st.booleans(),
    "formulation": st.sampled_from(tuple(MOMENTUM_KEYS)),
    "decoupled_weight_decay": st.booleans(),
    "reset_grads": st.booleans(),
    "master_weights": st.sampled_from((None, *REFINEMENT_KEYS)),
    "stochastic_rounding": st.booleans(),
    "rounding_seed": st.integers(0, 2**64 - 1),
    "state_dtype": st.sampled_from((None, torch.float32, torch.float16)),
}


class TrainingMachine(RuleBasedStateMachine):
    """One run of training, and what is known of it."""

    run: Run
    known: Snapshot
    aside: Snapshot  # the weights, while an average is in their place

    def settle(self, changes: Snapshot | None = None) -> None:
        """Asserts that these changes and no others have happened."""
        now = snapshot(self.run)
        assert_snapshots_agree({**self.known, **(changes or {})}, now)
        self.known = now

    # --- the start --------------------------------------------------------------------------------

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        count("examples")
        model, self.aside = Model(), {}
        for _ in range(data.draw(st.integers(1, 4))):
            self._new_param(data, model)
        params = list(model.parameters())
        for param in params:
            param.requires_grad_(data.draw(st.integers(0, 5)) > 0)
        inside = params[: max(1, len(params) - data.draw(st.integers(0, 1)))]
        max_norm = data.draw(st.sampled_from((None, None, 1.0, 1e3)))
        group = data.draw(options())
        optimizer = SGD([{"params": inside, **group}], max_grad_norm=max_norm)
        self.run = Run(model, optimizer)
        self._equip()
        if data.draw(st.integers(0, 3)):
            self._new_average(data)
        self.known = snapshot(self.run)

    def _new_param(self, data: st.DataObject, model: Model) -> nn.Parameter:
        size, dtype = data.draw(rarely_large), data.draw(dtypes)
        return model.add(size, dtype, data.draw(layouts), data.draw(seeds))

    def _new_average(self, data: st.DataObject) -> None:
        run = self.run
        names = st.sampled_from(tuple(DECAYS))
        run.decays = data.draw(st.lists(names, min_size=1, max_size=3))
        run.every, run.after = data.draw(st.sampled_from(((1, 0), (1, 0), (1, 2), (2, 0), (3, 4))))
        run.ema = EMA(
            run.model,
            [DECAYS[name][0] for name in run.decays],
            update_every=run.every,
            update_after_step=run.after,
        )
        run.count_frozen()
        if data.draw(st.booleans()):
            run.optimizer.ema = run.ema

    def _equip(self) -> None:
        """What does not survive a copy: hooks, and the scheduler of the learning rate."""
        run = self.run
        run.optimizer.register_step_pre_hook(lambda *_: run.calls.append("pre"))
        run.optimizer.register_step_post_hook(lambda *_: run.calls.append("post"))

    # --- gradients --------------------------------------------------------------------------------

    def _some(self, data: st.DataObject, fewest: int = 0) -> list[str]:
        names = sorted(self.run.params)
        chosen = data.draw(st.lists(st.sampled_from(names), min_size=fewest, unique=True))
        return names if data.draw(st.booleans()) else chosen

    def _set_gradients(
        self, data: st.DataObject, factor: float = 1.0, *, everywhere: bool = False
    ) -> None:
        """New gradients for some, in place or fresh; the others keep what they have."""
        seed, layout = data.draw(seeds), data.draw(layouts)
        in_place = data.draw(st.booleans())
        changes: Snapshot = {}
        names = sorted(self.run.params) if everywhere else self._some(data)
        for i, name in enumerate(names):
            param = self.run.params[name]
            values = random_tensor(param.shape, param.dtype, seed=seed + i) * factor
            if in_place and param.grad is not None and not param.grad.is_sparse:
                param.grad.copy_(values)
            else:
                param.grad = laid_out(values, layout)
            changes["grad", name] = values
        self.settle(changes)

    @rule(data=st.data())
    def drop_gradients(self, data: st.DataObject) -> None:
        changes: Snapshot = {}
        for name in self._some(data):
            self.run.params[name].grad = None
            changes["grad", name] = None
        self.settle(changes)

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none: bool) -> None:
        inside = {name for _, name in members(self.known)}
        held = {name for name in inside if self.known["grad", name] is not None}
        zeros = {name: torch.zeros_like(self.known["grad", name]) for name in held}
        self.run.optimizer.zero_grad(set_to_none)
        self.settle({("grad", name): None if set_to_none else zeros[name] for name in held})

    @rule(data=st.data())
    def sparse_gradient(self, data: st.DataObject) -> None:
        """For a parameter whose next step is the same with it: full precision, dense momentum."""
        names = []
        for group, name in members(self.known):
            param = self.known["param", name]
            key = MOMENTUM_KEYS[group["formulation"]]
            has_momentum = (key, name) in self.known or not group["momentum"]
            decays = group["weight_decay"] and not group["decoupled_weight_decay"]
            if param.dtype in FULL_DTYPES and param.dim() == 1 and param.numel() and has_momentum:
                names += [] if decays or param.numel() > 2000 else [name]
        assume(names)
        name = data.draw(st.sampled_from(names))
        param = self.run.params[name]
        values = random_tensor(param.shape, param.dtype, seed=data.draw(seeds))
        values[values < 0] = 0.0
        param.grad = values.to_sparse()
        self.settle({("grad", name): values})

    # --- steps ------------------------------------------------------------------------------------

    @rule(data=st.data(), times=st.integers(1, 4))
    def train(self, data: st.DataObject, times: int) -> None:
        """Ordinary steps, after what stands in their way is out of it."""
        if self.run.is_applied:
            self._restored()
        self._set_gradients(data, everywhere=True)
        if self._expected_fault(self.known) is not None:
            self._make_fit()
        for _ in range(times):
            self._set_gradients(data)
            self._step(lambda: self.run.optimizer.step())

    @rule(data=st.data(), how=st.sampled_from(("plain", "plain", "closure", "grads stay")))
    def step(self, data: st.DataObject, how: str) -> None:
        if how == "closure":
            self._step_with_closure(data)
            return
        if how == "plain":
            self._set_gradients(data)
        self._step(lambda: self.run.optimizer.step())

    def _step_with_closure(self, data: st.DataObject) -> None:
        seed = data.draw(seeds)
        grads = {
            name: random_tensor(p.shape, p.dtype, seed=seed) for name, p in self.run.params.items()
        }

        def closure() -> float:
            assert torch.is_grad_enabled()
            for name, param in self.run.params.items():
                param.grad = grads[name].clone()
            return 3.5

        def step() -> None:
            assert self.run.optimizer.step(closure) == 3.5

        if self.run.is_attached and self.run.is_applied:  # raises before it calls the closure
            self._step(step)
            return
        self._step(step, given={("grad", name): grad for name, grad in grads.items()})

    def _step(
        self,
        step: Callable[[], Any],
        *,
        scale: float = 1.0,
        skipped: bool = False,
        given: Snapshot | None = None,
        checks_skipped: bool = True,
    ) -> bool:
        """Steps and checks everything; returns whether the step was refused, as it had to be.

        ``given`` are gradients that the step itself sets; a step that is skipped may be so before
        it is checked.
        """
        run, known = self.run, {**self.known, **(given or {})}
        fault = self._expected_fault(known) if checks_skipped or not skipped else None
        if run.is_attached and run.is_applied:
            fault = RuntimeError
        if fault is not None:
            self._refused(step, fault, given)
            return True
        twin = None if skipped else self._twin_step(known, given, scale)
        old, lying = versions(run), places(run)
        run.calls.clear()
        step()
        assert run.calls == ["pre", "post"]
        changes = after_step(known, run.step_averaging, scale=scale, skipped=skipped)
        self._check_places(lying, given)
        self._check_versions(old, changes, given)
        self.settle({**(given or {}), **changes})
        if twin is not None:
            self._check_twin(snapshot(twin))
        count("steps skipped" if skipped else "steps")
        return False

    def _expected_fault(self, known: Snapshot) -> type[Exception] | None:
        """What a step raises that is not skipped."""
        averaging = self.run.step_averaging
        return None if refusal(known, averaging) is None else ValueError

    def _has_gained(self) -> bool:
        """Whether there are parameters that the average does not know; steps leave them out."""
        tracked = {key[2] for key in self.known if key[0] == "shadow"}
        return tracked != set(self.run.params)

    def _refused(
        self,
        step: Callable[[], Any],
        fault: type[BaseException] | tuple[type[BaseException], ...],
        given: Snapshot | None = None,
    ) -> None:
        """The step raises and nothing has changed, not even a version."""
        old, lying = versions(self.run), places(self.run)
        with pytest.raises(fault):
            step()
        if not given:  # a closure makes new gradients
            assert versions(self.run) == old
            assert places(self.run) == lying
        self.settle(given)
        count("steps refused")

    def _twin_step(self, known: Snapshot, given: Snapshot | None, scale: float) -> Run:
        twin = twin_of(self.run)
        for key, value in (given or {}).items():
            twin.params[key[1]].grad = value.clone()
        if scale != 1.0:
            twin.optimizer.grad_scale = torch.tensor(scale)
            twin.optimizer.found_inf = torch.tensor(0.0)
        level = _C.cpu_isa()
        with threads(1 if torch.get_num_threads() > 1 else 2):
            _C.set_cpu_isa(_C.cpu_isas()[0])
            try:
                twin.optimizer.step()
            finally:
                _C.set_cpu_isa(level)
        return twin

    def _check_twin(self, twin: Snapshot) -> None:
        shared = {key: twin[key] for key in twin if isinstance(twin[key], Tensor)}
        assert_snapshots_agree(shared, {key: self.known[key] for key in shared})

    def _check_places(self, lying: dict[Any, Any], given: Snapshot | None) -> None:
        now = places(self.run)
        for key, place in lying.items():
            if key not in (given or {}):
                assert now[key] == place, f"{key} has moved"

    def _check_versions(
        self, old: dict[Any, int], changes: Snapshot, given: Snapshot | None
    ) -> None:
        now = versions(self.run)
        for key, version in old.items():
            if key in (given or {}):
                continue
            written = (key in changes) if isinstance(key, tuple) else (("param", key) in changes)
            numel = self.known[key if isinstance(key, tuple) else ("param", key)].numel()
            if written:
                assert now[key] > version or not numel, f"{key} was written and not counted"
            else:
                assert now[key] == version or self._scaler_writes(key), f"{key} was not written"

    def _scaler_writes(self, key: Any) -> bool:
        """torch's scaler multiplies gradients by 1 to look at them."""
        return self.scaling and isinstance(key, tuple) and key[0] == "grad"

    scaling = False

    @rule(
        data=st.data(),
        kind=st.sampled_from(("torch", "ours")),
        is_inf=st.booleans(),
        unscales=st.booleans(),
    )
    def step_with_scaler(
        self, data: st.DataObject, kind: str, is_inf: bool, unscales: bool
    ) -> None:
        scale = 2.0 ** data.draw(st.integers(-3, 4))
        self._set_gradients(data, scale)
        grads = {name: self.known["grad", name] for _, name in members(self.known)}
        held = [name for name, grad in grads.items() if grad is not None and grad.numel()]
        assume(held)
        if is_inf:
            name = data.draw(st.sampled_from(held))
            grad = self.run.params[name].grad
            assume(grad is not None and not grad.is_sparse)
            place = torch.tensor(data.draw(st.integers(0, grad.numel() - 1)))
            infinite = data.draw(st.sampled_from((float("inf"), float("nan"), -float("inf"))))
            grad[torch.unravel_index(place, grad.shape)] = infinite
            self.known = snapshot(self.run)
        has_half = torch.float16 in {g.dtype for g in grads.values() if g is not None}
        scaler = (torch.amp if kind == "torch" else fused_opt).GradScaler(
            "cpu", init_scale=scale, growth_interval=1
        )
        scaler.scale(torch.zeros(()))
        unscales &= not has_half
        if unscales:
            self._unscale(scaler, scale)
            scale = 1.0
        self._scaled_step(scaler, scale, is_inf, knows_early=unscales or kind == "torch")
        if is_inf:
            self.zero_grad(set_to_none=True)

    def _unscale(self, scaler: torch.amp.GradScaler, scale: float) -> None:
        inside = [name for _, name in members(self.known)]
        grads = {name: self.known["grad", name] for name in inside}
        scaler.unscale_(self.run.optimizer)
        self.settle(
            {("grad", name): grad / scale for name, grad in grads.items() if grad is not None}
        )

    def _scaled_step(
        self, scaler: torch.amp.GradScaler, scale: float, is_inf: bool, *, knows_early: bool
    ) -> None:
        """``knows_early``: the scaler has looked for infinite gradients before the step."""
        optimizer, before = self.run.optimizer, scaler.get_scale()
        is_ours = isinstance(scaler, fused_opt.GradScaler)
        self.scaling = True
        try:
            refused = self._step(
                lambda: scaler.step(optimizer),
                scale=scale,
                skipped=is_inf,
                checks_skipped=not knows_early,
            )
        finally:
            self.scaling = False
        if refused:
            for name in ("found_inf", "grad_scale"):  # torch's scaler leaves them
                assert not is_ours or name not in vars(optimizer)
                vars(optimizer).pop(name, None)
            return
        scaler.update()
        assert scaler.get_scale() == before * (0.5 if is_inf else 2.0)
        count(f"steps of {'our' if is_ours else 'torch'} scaler")

    @rule(data=st.data())
    def step_with_lr_of_a_hook(self, data: st.DataObject) -> None:
        """A pre-hook changes the learning rate, and a post-hook changes it back."""
        self._set_gradients(data)
        run, group = self.run, self.run.optimizer.param_groups[0]
        lr = self.known["group", 0, "lr"]
        before = run.optimizer.register_step_pre_hook(lambda *_: group.update(lr=lr / 4))
        after = run.optimizer.register_step_post_hook(lambda *_: group.update(lr=lr))
        try:
            known, self.known = self.known, {**self.known, ("group", 0, "lr"): lr / 4}
            changes = {("group", 0, "lr"): lr}
            fault = self._expected_fault(self.known)
            if fault is not None or (run.is_attached and run.is_applied):
                self.known = known
                with pytest.raises((ValueError, RuntimeError)):
                    run.optimizer.step()
                group.update(lr=lr)
            else:
                changes = {**after_step(self.known, run.step_averaging), **changes}
                run.optimizer.step()
            self.settle(changes)
        finally:
            before.remove()
            after.remove()

    @rule(data=st.data(), kind=st.sampled_from(faults.KINDS))
    def failed_step(self, data: st.DataObject, kind: str) -> None:
        """Something is wrong with one parameter: the step raises and nothing has changed."""
        self._set_gradients(data)
        fault = faults.FAULTS[kind]
        held = [name for _, name in members(self.known) if self.known["grad", name] is not None]
        assume(held)
        if self.run.is_applied or self._expected_fault(self.known) is not None:
            return
        name = data.draw(st.sampled_from(held))
        undo = fault.cause(self.run, name)
        if undo is None:  # it cannot happen here
            return
        kept, self.known = self.known, snapshot(self.run)
        self.run.calls.clear()
        how = data.draw(st.sampled_from(("plain", "closure", "scaler")))
        self._refused(faults.stepping(self.run, fault, how), fault.error)
        assert "post" not in self.run.calls
        undo()
        self.known = {**kept, ("grad_norm",): self.known["grad_norm",]}
        self.settle()
        count(f"fault: {kind}")

    # --- options ----------------------------------------------------------------------------------

    @rule(data=st.data(), option=st.sampled_from(tuple(CHANGES)))
    def change_option(self, data: st.DataObject, option: str) -> None:
        found = self.run.optimizer.param_groups
        i = data.draw(st.integers(0, len(found) - 1))
        value = data.draw(CHANGES[option])
        found[i][option] = value
        self.settle({("group", i, option): value})

    @rule(value=st.sampled_from((None, 0.5, 100.0, float("inf"))))
    def change_max_grad_norm(self, value: float | None) -> None:
        for group in self.run.optimizer.param_groups:
            group["max_grad_norm"] = value
        count_of = len(self.run.optimizer.param_groups)
        self.settle({("group", i, "max_grad_norm"): value for i in range(count_of)})

    @rule(gamma=st.sampled_from((0.5, 0.8)))
    def schedule_lr(self, gamma: float) -> None:
        """A scheduler of torch's takes over, steps, and is dropped."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it wants steps of its own before
            scheduler = torch.optim.lr_scheduler.ExponentialLR(self.run.optimizer, gamma)
            scheduler.step()
        changes: Snapshot = {}
        for i, group in enumerate(groups(self.known)):
            changes["group", i, "lr"] = group["lr"] * gamma
            changes["group", i, "initial_lr"] = group.get("initial_lr", group["lr"])
        self.settle(changes)

    @rule(data=st.data())
    def add_group(self, data: st.DataObject) -> None:
        run = self.run
        assume(len(run.params) < 7)
        params = [self._new_param(data, run.model) for _ in range(data.draw(st.integers(0, 2)))]
        group = data.draw(options())
        run.optimizer.add_param_group({"params": params, **group})
        i, names = len(run.optimizer.param_groups) - 1, {p: n for n, p in run.params.items()}
        added = {**run.optimizer.defaults, "max_grad_norm": self.known["group", 0, "max_grad_norm"]}
        changes: Snapshot = {("group", i, k): v for k, v in {**added, **group}.items()}
        changes["members",] = [*self.known["members",], [names[p] for p in params]]
        for param in params:
            name = names[param]
            changes |= {("param", name): param.detach(), ("grad", name): None}
            changes["trains", name] = True
        self.settle(changes)

    @rule(data=st.data())
    def flip_requires_grad(self, data: st.DataObject) -> None:
        changes: Snapshot = {}
        for name in self._some(data):
            trains = not self.known["trains", name]
            self.run.params[name].requires_grad_(trains)
            changes["trains", name] = trains
        self.settle(changes)

    # --- the memory of parameters -----------------------------------------------------------------

    @rule(data=st.data(), dtype=dtypes)
    def convert_model(self, data: st.DataObject, dtype: torch.dtype) -> None:
        """As a user does, who keeps the optimizer with its state."""
        dense = [p.grad for p in self.run.params.values() if p.grad is not None]
        assume(not any(grad.is_sparse for grad in dense))
        self.run.model.to(dtype)
        changes: Snapshot = {}
        for key, value in self.known.items():
            if key[0] in ("param", "grad") and value is not None:
                changes[key] = value.to(dtype)
        self.settle(changes)
        if data.draw(st.booleans()):
            self._make_fit()

    @rule()
    def make_fit(self) -> None:
        self._make_fit()

    def _make_fit(self) -> None:
        """What helps after a conversion: the state is loaded anew, and refinements are dropped."""
        run, changes = self.run, self._cast_state()
        for _, name in members(self.known):
            for key in REFINEMENT_KEYS.values():
                if run.optimizer.state.get(run.params[name], {}).pop(key, None) is not None:
                    changes[key, name] = GONE
        for i, group in enumerate(run.optimizer.param_groups):
            group.update(master_weights=None, state_dtype=None)
            changes["group", i, "master_weights"] = changes["group", i, "state_dtype"] = None
            if group["lr"] == 0:  # by which no velocity can be converted
                group["lr"] = changes["group", i, "lr"] = 0.1
        # Without masters the momentum is that of the parameter again.
        for _, name in members(self.known):
            for key in MOMENTUM_KEYS.values():
                if self.known.get((key, name)) is not None:
                    dtype = self.known["param", name].dtype
                    changes[key, name] = self.known[key, name].to(dtype)
        run.optimizer.load_state_dict(run.optimizer.state_dict())
        if run.ema is not None and not run.is_applied:
            run.ema.register()
            run.count_frozen()
            changes |= self._registered()
        self.settle(changes)

    @rule(data=st.data(), layout=layouts)
    def replace_memory(self, data: st.DataObject, layout: str) -> None:
        for name in self._some(data):
            param = self.run.params[name]
            param.data = laid_out(param.data, layout)
        self.settle()

    @rule(data=st.data())
    def change_weights(self, data: st.DataObject) -> None:
        """From outside, as pruning or a copied checkpoint does."""
        changes: Snapshot = {}
        for name in self._some(data):
            param = self.run.params[name]
            values = random_tensor(param.shape, param.dtype, seed=data.draw(seeds))
            with torch.no_grad():
                param.copy_(values)
            changes["param", name] = values
        self.run.model.steps += 1
        changes["buffer", "steps"] = self.known["buffer", "steps"] + 1
        if data.draw(st.booleans()):
            self.run.optimizer.sync_masters()
            changes |= self._synced({**self.known, **changes})
        self.settle(changes)

    def _synced(self, known: Snapshot) -> Snapshot:
        """What sync_masters makes of refinements: the parameters are exact as they are."""
        changes: Snapshot = {}
        for _, name in members(known):
            param = known["param", name]
            for key in REFINEMENT_KEYS.values():
                held = known.get((key, name))
                if held is None:
                    continue
                exact = param.float() if key == "master" else torch.zeros_like(held)
                fits = param.dtype in {"master": HALF_DTYPES, "residual": (torch.bfloat16,)}.get(
                    key, (held.dtype,)
                )
                changes[key, name] = exact if fits else GONE
        return changes

    # --- checkpoints ------------------------------------------------------------------------------

    def _cast_state(self) -> Snapshot:
        """Loading converts momentum to the dtype that it should have, and forgets the norm."""
        changes: Snapshot = {("grad_norm",): None}
        for group, name in members(self.known):
            for key in MOMENTUM_KEYS.values():
                held = self.known.get((key, name))
                if held is not None:
                    changes[key, name] = held.to(momentum_dtype(self.known, name, group))
        return changes

    @rule(
        data=st.data(),
        through=st.sampled_from((lambda state: state, through_file, through_pickle, copy.deepcopy)),
        is_fresh=st.booleans(),
    )
    def checkpoint(
        self, data: st.DataObject, through: Callable[[Any], Any], is_fresh: bool
    ) -> None:
        """The optimizer's state goes into a fresh optimizer, or back into the same."""
        run = self.run
        state = through(run.optimizer.state_dict())
        changes = self._cast_state()
        if is_fresh:
            ema, run.optimizer.ema = run.optimizer.ema, None
            made = [
                {"params": g["params"], **data.draw(options())} for g in run.optimizer.param_groups
            ]
            run.optimizer = SGD(made, lr=3.0, ema=ema)
            self._equip()
        run.optimizer.load_state_dict(state)
        self.settle(changes)
        count("checkpoints")

    @rule(steps=st.booleans())
    def go_through_torch(self, steps: bool) -> None:
        """torch.optim.SGD takes the state over, maybe trains, and gives it back."""
        run = self.run
        theirs = torch.optim.SGD(
            [{"params": g["params"]} for g in run.optimizer.param_groups], foreach=False
        )
        theirs.load_state_dict(through_file(run.optimizer.state_dict()))
        back = theirs.state_dict()
        run.optimizer.load_state_dict(back)
        changes: Snapshot = {("grad_norm",): None}
        for group, name in members(self.known):
            dtype, wanted = self.known["param", name].dtype, momentum_dtype(self.known, name, group)
            for key in MOMENTUM_KEYS.values():
                held = self.known.get((key, name))
                if held is not None:  # torch keeps it in the parameter's dtype
                    changes[key, name] = held.to(dtype).to(wanted)
            for key in REFINEMENT_KEYS.values():
                held = self.known.get((key, name))
                if held is None:
                    continue
                if key == "compensation" and dtype in HALF_DTYPES:
                    changes[key, name] = held.to(dtype)
                elif key != "master" or dtype != torch.float32:  # rounded to what it cannot be
                    changes[key, name] = GONE
        self.settle(changes)
        count("checkpoints")

    @rule(pickles=st.booleans())
    def copy_everything(self, pickles: bool) -> None:
        """Training goes on in a copy of the whole; the original is left behind unchanged."""
        run = self.run
        if any(name not in PLAIN_DECAYS for name in run.decays):
            pickles = False
        before = snapshot(run)
        copied = (through_pickle if pickles else copy.deepcopy)((run.model, run.optimizer, run.ema))
        self.settle()
        names = dict(run.params)
        run.model, run.optimizer, run.ema = copied
        self._equip()
        assert not {p.data_ptr() for p in run.params.values() if p.numel()} & {
            p.data_ptr() for p in names.values()
        }
        changes: Snapshot = {key: None for key in before if key[0] == "grad"}  # as torch copies
        changes["grad_norm",] = None
        self.settle(changes)
        count("checkpoints")

    # --- the average ------------------------------------------------------------------------------

    def _has_average(self) -> bool:
        return self.run.ema is not None

    @precondition(_has_average)
    @rule()
    def attach_or_detach(self) -> None:
        run = self.run
        run.optimizer.ema = None if run.is_attached else run.ema
        self.settle({("ema", "attached"): run.is_attached})

    @precondition(_has_average)
    @rule()
    def update_average(self) -> None:
        run = self.run
        assert run.ema is not None
        assert run.averaging is not None
        fault: type[Exception] | None = None
        if run.is_applied or run.is_attached:
            fault = RuntimeError
        elif refusal(self.known, run.averaging, in_step=False) is not None:
            fault = ValueError
        if fault is not None:
            self._refused(run.ema.update, fault)
            return
        changes = after_update(self.known, run.averaging, in_step=False)
        run.ema.update()
        self.settle(changes)
        count("updates of averages")

    @precondition(_has_average)
    @rule(data=st.data(), how=st.sampled_from(("apply_shadow", "swap")))
    def apply_average(self, data: st.DataObject, how: str) -> None:
        run = self.run
        assert run.ema is not None
        k = data.draw(st.integers(0, len(run.decays) - 1))
        if self._has_gained() or (run.is_applied and how == "apply_shadow"):
            if not run.is_applied or how == "apply_shadow":
                self._refused(lambda: run.ema.apply_shadow(k), RuntimeError)  # type: ignore[union-attr]
            return
        if run.is_applied:
            self._restored()
            return
        weights = {key: v for key, v in self.known.items() if key[0] in ("param", "buffer")}
        getattr(run.ema, how)(k)
        self.settle(self._averages_of(k) | {("ema", "applied"): k})
        self.aside = weights

    def _averages_of(self, k: int, known: Snapshot | None = None) -> Snapshot:
        """The weights where an average is copied into them."""
        known = self.known if known is None else known
        changes: Snapshot = {("buffer", "steps"): known["copy", "steps"]}
        for key, value in known.items():
            if key[:2] == ("shadow", k):
                changes["param", key[2]] = value.to(self.known["param", key[2]].dtype)
        return changes

    @precondition(lambda self: self.run.is_applied)
    @rule()
    def restore_weights(self) -> None:
        self._restored()

    def _restored(self) -> None:
        assert self.run.ema is not None
        self.run.ema.restore()
        changes: Snapshot = {("ema", "applied"): None}
        for key, value in self.aside.items():
            changes[key] = value.to(self.known[key].dtype)
        self.settle(changes)
        self.aside = {}

    @precondition(_has_average)
    @rule(data=st.data())
    def evaluate(self, data: st.DataObject) -> None:
        """With an average in a `with` block, which may raise, and steps which must not happen."""
        run = self.run
        assert run.ema is not None
        if run.is_applied or self._has_gained():
            return
        k = data.draw(st.integers(0, len(run.decays) - 1))
        expected, kept = self._averages_of(k), self.known
        with pytest.raises(ZeroDivisionError), run.ema.average_parameters(k):  # noqa: PT012
            self.settle(expected | {("ema", "applied"): k})
            if run.is_attached:
                self._refused(run.optimizer.step, RuntimeError)
            raise ZeroDivisionError
        self.known = kept
        self.settle()

    @precondition(_has_average)
    @rule(data=st.data())
    def copy_average(self, data: st.DataObject) -> None:
        run = self.run
        assert run.ema is not None
        k = data.draw(st.integers(0, len(run.decays) - 1))
        if run.is_applied or self._has_gained():
            self._refused(lambda: run.ema.copy_to(average=k), RuntimeError)  # type: ignore[union-attr]
            return
        changes = self._averages_of(k)
        run.ema.copy_to(average=k)
        self.settle(changes)

    @precondition(_has_average)
    @rule()
    def register_average(self) -> None:
        run = self.run
        assert run.ema is not None
        if run.is_applied:
            self._refused(run.ema.register, RuntimeError)
            return
        run.ema.register()
        run.count_frozen()
        self.settle(self._registered())

    def _registered(self) -> Snapshot:
        """Every shadow is its parameter again, in the dtype that it should have."""
        changes: Snapshot = {("ema", "num_steps"): 0}
        for name in self.run.params:
            param = self.known["param", name]
            wide = torch.float32 if param.dtype in HALF_DTYPES else param.dtype
            changes |= {("shadow", k, name): param.to(wide) for k in range(len(self.run.decays))}
        changes["copy", "steps"] = self.known["buffer", "steps"]
        return changes

    @precondition(_has_average)
    @rule(through=st.sampled_from((lambda state: state, through_file, copy.deepcopy)))
    def checkpoint_average(self, through: Callable[[Any], Any]) -> None:
        """Its state goes into a fresh average of the same model."""
        run = self.run
        assert run.ema is not None
        if self._has_gained():
            self._refused(run.ema.state_dict, RuntimeError)
            return
        dtypes_of = {key: v.dtype for key, v in self.known.items() if key[0] == "shadow"}
        state = through(run.ema.state_dict())
        rules = [DECAYS[n][0] if n not in PLAIN_DECAYS else 0.123 for n in run.decays]
        was_attached, run.optimizer.ema = run.is_attached, None
        run.ema = EMA(run.model, rules)
        run.ema.load_state_dict(state)
        run.count_frozen()
        changes: Snapshot = {}
        for key in dtypes_of:
            param = self.known["param", key[2]]
            wide = torch.float32 if param.dtype in HALF_DTYPES else param.dtype
            changes[key] = self.known[key].to(wide)
        applied = self.known["ema", "applied"]
        if applied is not None:  # the weights become the average again
            changes |= self._averages_of(applied, {**self.known, **changes})
            # The model may have been converted since they were put aside.
            self.aside = {key: v.to(self.known[key].dtype) for key, v in self.aside.items()}
        if was_attached:
            run.optimizer.ema = run.ema
        self.settle(changes)
        count("checkpoints")
