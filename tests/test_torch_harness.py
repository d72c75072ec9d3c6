"""The acceptance harness of the torch wheel: every configuration of its OptimizerInfo for SGD.

The counterpart of each comparison is torch.optim.SGD(foreach=False), the plainest of torch's own
implementations. Where a configuration is a torch flag (foreach, fused, differentiable) it must make
no difference, so the counterpart never gets it.
"""

# The harness generates unittest classes.
# ruff: noqa: PT009, PT027

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("expecttest", reason="torch.testing._internal imports it")

import torch
from reference import random_tensor
from torch import Tensor
from torch.nn import Parameter
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    TensorTracker,
    _get_optim_inputs_including_global_cliquey_kwargs,
    optim_db,
    optim_error_inputs_func_sgd,
    optim_inputs_func_sgd,
    optims,
)
from torch.testing._internal.common_utils import TestCase

import fused_opt

TORCH_INFO = next(info for info in optim_db if info.optim_cls is torch.optim.SGD)
INFO = OptimizerInfo(
    fused_opt.SGD,
    optim_inputs_func=optim_inputs_func_sgd,
    optim_error_inputs_func=optim_error_inputs_func_sgd,
    scheduler_inputs=TORCH_INFO.scheduler_inputs,
    supported_impls=("foreach", "differentiable", "fused"),
    supports_sparse=True,
    metadata_for_sparse=TORCH_INFO.metadata_for_sparse,
    supports_fused_on=("cpu", "cuda"),
)
#: torch selects no foreach configurations on a CPU.
CONFIGURATIONS = {"cpu": 27, "cuda": 36}
IMPLEMENTATION_FLAGS = ("foreach", "differentiable", "fused")
SHAPES = [(10, 5), (10,), (3, 4, 2), ()]
STEPS = 7

#: Half types: torch rounds after each of its four operations, ours once. complex64 is fp32.
TOLERANCES = {
    torch.float32: {"rtol": 2e-6, "atol": 1e-7},
    torch.complex64: {"rtol": 2e-6, "atol": 1e-6},
    torch.float64: {"rtol": 4e-15, "atol": 1e-16},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
    torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2},
}


def configurations(device: str, dtype: torch.dtype, info: OptimizerInfo) -> list[dict[str, Any]]:
    """The keyword arguments of every configuration, each with tensors of its own."""
    inputs = _get_optim_inputs_including_global_cliquey_kwargs(device, dtype, info)
    return [copy.deepcopy(i.kwargs) for i in inputs]


def plain(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same configuration for the counterpart."""
    kept = {k: v for k, v in kwargs.items() if k not in IMPLEMENTATION_FLAGS}
    return {**copy.deepcopy(kept), "foreach": False}


def make_params(device: str, dtype: torch.dtype, kwargs: dict[str, Any]) -> list[Parameter]:
    """Parameters, which a differentiable step may write only if they need no gradient."""
    trained = not kwargs.get("differentiable", False)
    return [
        Parameter(random_tensor(s, dtype, device, seed=i), requires_grad=trained)
        for i, s in enumerate(SHAPES)
    ]


def set_gradients(params: list[Parameter], step: int) -> None:
    """The gradient of a different quadratic at each step, so that it depends on the parameters."""
    for i, p in enumerate(params):
        target = random_tensor(p.shape, p.dtype, p.device, seed=1000 + 10 * step + i)
        p.grad = (p.detach() - target).clone()


def run(optimizer: torch.optim.Optimizer, params: list[Parameter], steps: range) -> list[Tensor]:
    """The parameters after each of the given steps."""
    seen = []
    for step in steps:
        set_gradients(params, step)
        optimizer.step()
        seen += [p.detach().clone() for p in params]
    return seen


class TestHarness(TestCase):
    def configured(
        self, device: str, dtype: torch.dtype, info: OptimizerInfo
    ) -> Iterator[tuple[dict[str, Any], list[Parameter], torch.optim.Optimizer]]:
        """An optimizer of each configuration over fresh parameters."""
        for kwargs in configurations(device, dtype, info):
            params = make_params(device, dtype, kwargs)
            yield kwargs, params, info.optim_cls(params, **kwargs)

    @optims([INFO], dtypes=[torch.float32])
    def test_every_configuration_is_there(self, device, dtype, optim_info):
        device_type = torch.device(device).type
        found = len(configurations(device, dtype, optim_info))
        self.assertEqual(found, CONFIGURATIONS[device_type])

    @optims([INFO], dtypes=list(TOLERANCES))
    def test_each_step_equals_torchs(self, device, dtype, optim_info):
        for kwargs, params, optimizer in self.configured(device, dtype, optim_info):
            twins = make_params(device, dtype, kwargs)
            expected = torch.optim.SGD(twins, **plain(kwargs))
            tracker = TensorTracker(assert_eq_kwargs=TOLERANCES[dtype])
            for step in range(STEPS):
                set_gradients(twins, step)
                expected.step()
                for q in twins:
                    tracker.add(q)
                    if kwargs.get("momentum"):
                        tracker.add(expected.state[q]["momentum_buffer"])
            for step in range(STEPS):
                set_gradients(params, step)
                optimizer.step()
                for p in params:
                    tracker.pop_check_set(p, self)
                    if kwargs.get("momentum"):
                        tracker.pop_check_set(optimizer.state[p]["momentum_buffer"], self)
                    else:
                        self.assertNotIn("momentum_buffer", optimizer.state.get(p, {}))
            self.assertTrue(tracker.all_popped())

    @optims([INFO], dtypes=[torch.float32, torch.float64])
    def test_flags_of_implementation_change_no_bits(self, device, dtype, optim_info):
        results: dict[str, list[Tensor]] = {}
        for kwargs, params, optimizer in self.configured(device, dtype, optim_info):
            if kwargs["differentiable"]:
                continue  # a composition of torch's operations, compared above
            mine = run(optimizer, params, range(STEPS))
            first = results.setdefault(str(plain(kwargs)), mine)
            self.assertEqual(mine, first, rtol=0, atol=0)

    @optims([INFO], dtypes=[torch.float32, torch.bfloat16])
    def test_training_goes_downhill(self, device, dtype, optim_info):
        for kwargs, params, optimizer in self.configured(device, dtype, optim_info):
            sign = 1.0 if kwargs.get("maximize") else -1.0
            optimizer.param_groups[0]["lr"] = 1e-2
            optimizer.param_groups[0]["weight_decay"] = 0.0
            values = []
            for _ in range(20):
                values.append(sum(p.detach().double().square().sum().item() for p in params))
                for p in params:
                    p.grad = 2 * p.detach()
                optimizer.step()
            self.assertGreater(sign * (values[-1] - values[0]), 0, str(kwargs))

    @optims([INFO], dtypes=[torch.float32])
    def test_parameters_without_gradients_stay(self, device, dtype, optim_info):
        for _, params, optimizer in self.configured(device, dtype, optim_info):
            before = copy.deepcopy(params)
            optimizer.step()
            self.assertEqual(params, before, rtol=0, atol=0)
            self.assertFalse(optimizer.state)

    def resumed(
        self,
        device: str,
        dtype: torch.dtype,
        info: OptimizerInfo,
        revive: Callable[[torch.optim.Optimizer, list[Parameter], dict[str, Any]], Any],
    ) -> None:
        """Asserts that a run which `revive` interrupts ends in the bits of one without a break.

        `revive` gets the optimizer, copies of its parameters and the configuration, and returns
        the optimizer that goes on with those copies.
        """
        for kwargs, params, optimizer in self.configured(device, dtype, info):
            run(optimizer, params, range(3))
            copies = [Parameter(p.detach().clone(), p.requires_grad) for p in params]
            revived = revive(optimizer, copies, kwargs)
            expected = run(optimizer, params, range(3, STEPS))
            self.assertEqual(run(revived, copies, range(3, STEPS)), expected, rtol=0, atol=0)
            for p, q in zip(params, copies, strict=True):
                self.assertEqual(
                    dict(revived.state.get(q, {})), dict(optimizer.state.get(p, {})), rtol=0, atol=0
                )

    @optims([INFO], dtypes=[torch.float32, torch.bfloat16])
    def test_state_dict_resumes(self, device, dtype, optim_info):
        def revive(optimizer, params, kwargs):
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            other = optim_info.optim_cls(params, lr=123.0)
            other.load_state_dict(torch.load(file, weights_only=True))
            # `differentiable` is read from the constructor's defaults, in torch as well.
            other.defaults["differentiable"] = kwargs["differentiable"]
            return other

        self.resumed(device, dtype, optim_info, revive)

    @optims([INFO], dtypes=[torch.float32])
    def test_state_dict_of_an_older_torch_resumes(self, device, dtype, optim_info):
        def revive(optimizer, params, kwargs):
            state = copy.deepcopy(optimizer.state_dict())
            for flag in ("foreach", "fused", "differentiable", "formulation", "reset_grads"):
                state["param_groups"][0].pop(flag)
            if not kwargs.get("maximize"):
                state["param_groups"][0].pop("maximize")
            other = optim_info.optim_cls(params, **kwargs)
            other.load_state_dict(state)
            return other

        self.resumed(device, dtype, optim_info, revive)

    @optims([INFO], dtypes=[torch.float32])
    def test_state_dict_of_torch_resumes(self, device, dtype, optim_info):
        def revive(optimizer, params, kwargs):
            through = torch.optim.SGD(params, **plain(kwargs))
            through.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            other = optim_info.optim_cls(params, **kwargs)
            other.load_state_dict(copy.deepcopy(through.state_dict()))
            return other

        self.resumed(device, dtype, optim_info, revive)

    @optims([INFO], dtypes=[torch.float32])
    def test_deepcopy_and_pickle_resume(self, device, dtype, optim_info):
        def adopt(clone: torch.optim.Optimizer, params: list[Parameter]) -> Any:
            """Hands the clone's parameters' place in its state and groups over to `params`."""
            group = clone.param_groups[0]
            for theirs, ours in zip(group["params"], params, strict=True):
                if theirs in clone.state:
                    clone.state[ours] = clone.state.pop(theirs)
            group["params"] = params
            return clone

        def deepcopied(optimizer, params, kwargs):
            return adopt(copy.deepcopy(optimizer), params)

        def pickled(optimizer, params, kwargs):
            return adopt(pickle.loads(pickle.dumps(optimizer)), params)

        for revive in (deepcopied, pickled):
            self.resumed(device, dtype, optim_info, revive)

    @optims([INFO], dtypes=[torch.float32])
    def test_deepcopy_and_pickle_keep_attributes(self, device, dtype, optim_info):
        for _, params, optimizer in self.configured(device, dtype, optim_info):
            run(optimizer, params, range(2))
            public = {k for k in optimizer.__dict__ if not k.startswith("_")}
            for clone in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
                self.assertIs(type(clone), optim_info.optim_cls)
                self.assertLessEqual(public, {k for k in clone.__dict__ if not k.startswith("_")})
                self.assertEqual(
                    clone._step_supports_amp_scaling, optimizer._step_supports_amp_scaling
                )
                self.assertEqual(clone.state_dict(), optimizer.state_dict(), rtol=0, atol=0)

    @optims([INFO], dtypes=[torch.float32])
    def test_state_dict_hooks_run(self, device, dtype, optim_info):
        _, _, optimizer = next(self.configured(device, dtype, optim_info))
        calls: list[str] = []
        optimizer.register_state_dict_pre_hook(lambda o: calls.append("save"))
        optimizer.register_state_dict_post_hook(lambda o, s: calls.append("saved"))
        optimizer.register_load_state_dict_pre_hook(lambda o, s: calls.append("load"))
        optimizer.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
        optimizer.load_state_dict(optimizer.state_dict())
        self.assertEqual(calls, ["save", "saved", "load", "loaded"])

    @optims([INFO], dtypes=[torch.float32])
    def test_error_inputs_raise(self, device, dtype, optim_info):
        cases = optim_info.optim_error_inputs_func(device=device, dtype=dtype)
        for case in cases:
            self.assertEqual(case.error_on, OptimizerErrorEnum.CONSTRUCTION_ERROR)
            given, kwargs = case.optimizer_error_input.params, case.optimizer_error_input.kwargs
            params = make_params(device, dtype, {}) if given is None else given
            if issubclass(case.error_type, Warning):
                with self.assertWarnsRegex(case.error_type, case.error_regex):
                    optim_info.optim_cls(params, **kwargs)
            else:
                with self.assertRaisesRegex(case.error_type, case.error_regex):
                    optim_info.optim_cls(params, **kwargs)
        self.assertEqual(len(cases), 7 if torch.device(device).type == "cpu" else 0)

    @optims([INFO], dtypes=[torch.float32])
    def test_scheduler_inputs_drive_the_step(self, device, dtype, optim_info):
        for constructors in optim_info.scheduler_inputs:
            for kwargs, params, optimizer in self.configured(device, dtype, optim_info):
                twins = make_params(device, dtype, kwargs)
                expected = torch.optim.SGD(twins, **plain(kwargs))
                pairs = [(c(optimizer), c(expected)) for c in constructors]
                for step in range(STEPS):
                    for o, ps in ((optimizer, params), (expected, twins)):
                        set_gradients(ps, step)
                        o.step()
                    self.assertEqual(params, twins, rtol=1e-5, atol=1e-6)
                    for pair in pairs:
                        for scheduler in pair:
                            plateau = isinstance(
                                scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau
                            )
                            scheduler.step(*([1.0] if plateau else []))
                    self.assertEqual(
                        optimizer.param_groups[0]["lr"], expected.param_groups[0]["lr"]
                    )

    @optims([INFO], dtypes=[torch.float32, torch.float64])
    def test_sparse_inputs_equal_torchs(self, device, dtype, optim_info):
        kwargs, constructors = optim_info.metadata_for_sparse
        for options in ({}, {"fused": True}, {"foreach": True}):
            results = []
            for cls, flags in (
                (optim_info.optim_cls, options),
                (torch.optim.SGD, {"foreach": False}),
            ):
                weight = Parameter(random_tensor((6, 3), dtype, device))
                optimizer = cls([weight], **kwargs, **flags)
                schedulers = [c(optimizer) for c in constructors]
                for step in range(STEPS):
                    rows = torch.tensor([step % 6, 2, (3 * step) % 6], device=device)
                    optimizer.zero_grad()
                    looked_up = torch.nn.functional.embedding(rows, weight, sparse=True)
                    looked_up.square().sum().backward()
                    self.assertTrue(weight.grad.is_sparse)
                    optimizer.step()
                    for scheduler in schedulers:
                        scheduler.step()
                results.append(weight.detach())
            self.assertEqual(*results, **TOLERANCES[dtype])

    @optims([INFO], dtypes=[torch.float64])
    def test_differentiable_steps_pass_gradcheck(self, device, dtype, optim_info):
        for kwargs in configurations(device, dtype, optim_info):
            if not kwargs["differentiable"]:
                continue

            def steps(param, first, second, kwargs=kwargs):
                """Everything that two steps leave, as a function of what they read."""
                param = param.clone()
                optimizer = optim_info.optim_cls([param], **kwargs)
                for grad in (first, second):
                    param.grad = grad
                    optimizer.step()
                return (param, *optimizer.state.get(param, {}).values())

            inputs = [random_tensor((4,), dtype, device, seed=i).requires_grad_() for i in range(3)]
            self.assertTrue(torch.autograd.gradcheck(steps, inputs))


instantiate_device_type_tests(TestHarness, globals(), only_for=("cpu", "cuda"))
if "TestHarnessCUDA" in globals():  # generated where there is a GPU
    globals()["TestHarnessCUDA"].pytestmark = [pytest.mark.cuda]
