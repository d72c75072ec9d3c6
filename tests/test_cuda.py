"""On CUDA: the CPU's bits, in one launch, on the current stream, without waiting for the device.

Each scenario runs on the CPU and on the GPU with the same numbers. Both backends compile the same
rules without contraction, so the CPU's result is an oracle for the GPU to the last bit. And each
runs with the same kernels in the emulator, which needs no GPU.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from emulated import emulator
from reference import (
    DTYPES,
    HALF_DTYPES,
    assert_same_bits,
    everything,
    flag_id,
    legal_flags,
    momentum_of,
    random_tensor,
)
from test_averages import Several, flat
from torch import Tensor, nn

from fused_opt import EMA, SGD, clip_grad_norm_, schedules
from fused_opt.functional import ema_update, ema_update_, sgd_step, sgd_step_

DEVICE = "cuda"
needs_gpu = pytest.mark.cuda


@pytest.fixture(params=["emulated", pytest.param(DEVICE, marks=needs_gpu)])
def target(request: pytest.FixtureRequest) -> str:
    """What has to give the CPU's bits: a GPU, or its kernels in the emulator (emulated.py)."""
    return request.param


STEPS = 4

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
#: The dtypes of a parameter and its gradient.
PAIRS = [(F64, F64), *((p, g) for p in (F32, BF16, F16) for g in (F32, BF16, F16))]
#: The dtypes of a shadow and its parameter.
SHADOWS = [(F32, F32), (F64, F64), (F32, F64), (F32, BF16), (BF16, BF16), (F32, F16), (F16, F16)]

#: Below and above a vector of 16 bytes, a block of 256 threads with vectors, and the chunks of both
#: backends (8192 and 16384 elements).
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 255, 256, 257, 1000, 2047, 2048, 2049)
CHUNKS = tuple(chunk + d for chunk in (8192, 16384, 3 * 8192) for d in (-1, 0, 1))
SHAPES = [(), *((n,) for n in SIZES + CHUNKS), (3, 5, 7)]

SPECIAL = [0.0, -0.0, 1.0, -3.0, float("inf"), float("-inf"), float("nan"), 65519.0, 65520.0]
SPECIAL += [3.5e38, 1e-40, -1e-45, 6e-8, 2.0**-24, 2.0**-25, 1.0 + 2.0**-8, 1.0 + 3 * 2.0**-9]

# --- the same scenario on two devices ------------------------------------------------------------

#: Does a step and returns all that it may write.
Advance = Callable[[int], Iterable[Tensor]]
#: Builds everything on a device.
Scenario = Callable[[torch.device], Advance]


def history(scenario: Scenario, device: str, steps: int) -> list[list[Tensor]]:
    """What a scenario wrote, step by step, on the CPU."""
    if device == "emulated":
        with emulator().in_place():
            return history(scenario, "cpu", steps)
    advance = scenario(torch.device(device))
    return [[t.detach().cpu().clone() for t in advance(step)] for step in range(steps)]


def assert_same_on_both(scenario: Scenario, target: str, steps: int = STEPS) -> None:
    expected, actual = (history(scenario, device, steps) for device in ("cpu", target))
    for step, (on_cpu, on_target) in enumerate(zip(expected, actual, strict=True)):
        for i, (e, a) in enumerate(zip(on_cpu, on_target, strict=True)):
            assert_same_bits(a, e, f"step {step}, tensor {i}")


def tensor(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str, seed: int
) -> Tensor:
    """Normal numbers, rounded on the CPU."""
    return random_tensor(shape, dtype, seed=seed).to(device)


def make_params(
    shapes: Iterable[tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> list[nn.Parameter]:
    return [nn.Parameter(tensor(s, dtype, device, seed=i)) for i, s in enumerate(shapes)]


def set_gradients(params: Iterable[Tensor], step: int, dtype: torch.dtype | None = None) -> None:
    """Writes into the gradients that are there, as a captured graph needs it."""
    for i, p in enumerate(params):
        grad = tensor(tuple(p.shape), dtype or p.dtype, p.device, seed=10_000 * (step + 1) + i)
        if p.grad is not None:
            p.grad.copy_(grad)
            continue
        if grad.dtype != p.dtype:
            p.grad_dtype = grad.dtype
        p.grad = grad


def written(optimizer: SGD) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    momentum = [momentum_of(optimizer, p) for p in params]
    shadows = list(optimizer.ema.shadows.values()) if optimizer.ema is not None else []
    everything = [*params, *(p.grad for p in params), *momentum, *shadows]
    return [t for t in everything if t is not None]


def training(
    make: Callable[[torch.device], list[nn.Parameter]],
    *,
    grad_dtype: torch.dtype | None = None,
    decay: float | None = 0.9,
    **options: Any,
) -> Scenario:
    """Steps of an optimizer, with an average unless `decay` is None."""

    def scenario(device: torch.device) -> Advance:
        params = make(device)
        ema = None if decay is None else EMA(params, decay=decay)
        optimizer = SGD(params, **{"lr": 0.1, **options}, ema=ema)

        def advance(step: int) -> list[Tensor]:
            set_gradients(params, step, grad_dtype)
            optimizer.step()
            return written(optimizer)

        return advance

    return scenario


def of_shapes(
    shapes: Iterable[tuple[int, ...]], dtype: torch.dtype
) -> Callable[[torch.device], list[nn.Parameter]]:
    return lambda device: make_params(shapes, dtype, device)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Whatever waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- every rule in every dtype -------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "grad_dtype"), PAIRS)
@pytest.mark.parametrize("flags", legal_flags(formulation=("torch", "sutskever")), ids=flag_id)
def test_a_step_has_the_cpus_bits(flags, dtype, grad_dtype, target):
    shapes = [(), (0,), (1,), (17,), (1000,), (8193,)]
    make = of_shapes(shapes, dtype)
    assert_same_on_both(training(make, grad_dtype=grad_dtype, decay=None, **flags), target)
    assert_same_on_both(training(make, grad_dtype=grad_dtype, reset_grads=True, **flags), target)


@pytest.mark.parametrize("decay", [None, 0.999, 0.25])
@pytest.mark.parametrize(("dtype", "grad_dtype"), PAIRS)
def test_every_size_has_the_cpus_bits(dtype, grad_dtype, decay, target):
    make = of_shapes(SHAPES, dtype)
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    assert_same_on_both(training(make, grad_dtype=grad_dtype, decay=decay, **options), target)


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.5, 0.999, 1.0])
@pytest.mark.parametrize(("shadow_dtype", "dtype"), SHADOWS)
def test_an_update_has_the_cpus_bits(shadow_dtype, dtype, decay, target):
    def scenario(device: torch.device) -> Advance:
        shadows = [tensor(s, shadow_dtype, device, seed=i) for i, s in enumerate(SHAPES)]

        def advance(step: int) -> list[Tensor]:
            seed = 1000 * (step + 1)
            params = [tensor(s, dtype, device, seed=seed + i) for i, s in enumerate(SHAPES)]
            ema_update_(shadows, params, decay=decay)
            return shadows + params

        return advance

    assert_same_on_both(scenario, target)


@pytest.mark.parametrize("formulation", ["torch", "sutskever"])
@pytest.mark.parametrize(("shadow_dtype", "dtype"), SHADOWS)
def test_the_functional_step_has_the_cpus_bits(shadow_dtype, dtype, formulation, target):
    shapes = [(5,), (8193,), (3, 4)]

    def scenario(device: torch.device) -> Advance:
        params = [tensor(s, dtype, device, seed=i) for i, s in enumerate(shapes)]
        shadows = [tensor(s, shadow_dtype, device, seed=9 + i) for i, s in enumerate(shapes)]
        momentum: list[Tensor | None] = [None] * len(shapes)

        def advance(step: int) -> list[Tensor]:
            seed = 100 * (step + 1)
            grads = [tensor(s, dtype, device, seed=seed + i) for i, s in enumerate(shapes)]
            sgd_step_(
                params,
                grads,
                momentum,
                lr=0.1,
                momentum=0.9,
                weight_decay=0.1,
                formulation=formulation,
                shadows=shadows,
                decay=0.9,
            )
            return [*params, *momentum, *shadows, *grads]

        return advance

    assert_same_on_both(scenario, target)


@pytest.mark.parametrize(("dtype", "grad_dtype"), PAIRS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_special_values_have_the_cpus_bits(dtype, grad_dtype, nesterov, target):
    """Infinities, NaN, subnormal numbers, ties and overflow of the narrowing."""
    n = len(SPECIAL)

    def scenario(device: torch.device) -> Advance:
        values = torch.tensor(SPECIAL, dtype=F64)
        param, grad, buffer = (m.flatten() for m in torch.meshgrid([values] * 3, indexing="ij"))
        p, v = (t.to(dtype).to(device) for t in (param, buffer))
        g = grad.to(grad_dtype).to(device)
        s = values.repeat(n * n).to(F64 if dtype == F64 else F32).to(device)

        def advance(step: int) -> list[Tensor]:
            options = {"lr": 0.5, "momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.125}
            sgd_step_([p], [g], [v], **options, shadows=[s], decay=0.75)
            return [p, g, v, s]

        return advance

    assert_same_on_both(scenario, target, steps=2)


# --- layouts -------------------------------------------------------------------------------------

OFFSETS = [(k, k, k, k) for k in range(9)]
OFFSETS += [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 2, 3, 5), (4, 8, 4, 8)]


@pytest.mark.parametrize("numel", [1, 5, 40, 8192, 8195, 3 * 8192 + 1])
@pytest.mark.parametrize(("dtype", "grad_dtype"), PAIRS)
def test_odd_offsets_have_the_cpus_bits_and_write_nothing_around(dtype, grad_dtype, numel, target):
    """Streams that reach 16-byte alignment together, at once or later, and those that never do."""
    shadow_dtype = F64 if dtype == F64 else F32
    stream_dtypes = (dtype, grad_dtype, dtype, shadow_dtype)

    def scenario(device: torch.device) -> Advance:
        memory = [
            [tensor((numel + 16,), d, device, seed=4 * i + s) for s, d in enumerate(stream_dtypes)]
            for i in range(len(OFFSETS))
        ]
        views = [
            [m[o : o + numel] for m, o in zip(streams, offsets, strict=True)]
            for streams, offsets in zip(memory, OFFSETS, strict=True)
        ]
        params, grads, momentum, shadows = (list(stream) for stream in zip(*views, strict=True))

        def advance(step: int) -> list[Tensor]:
            options = {"lr": 0.1, "momentum": 0.9, "reset_grads": step == STEPS - 1}
            sgd_step_(params, grads, momentum, **options, shadows=shadows, decay=0.9)
            return [m for streams in memory for m in streams]

        return advance

    assert_same_on_both(scenario, target)


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "channels_last": ((4, 3, 9, 9), lambda m: m.to(memory_format=torch.channels_last)),
    "transposed": ((60, 90), Tensor.t),
    "column": ((333, 4), lambda m: m[:, 1]),
    "columns": ((333, 7), lambda m: m[:, 1:4]),
    "every_second": ((5000,), lambda m: m[1::2]),
    "inner_block": ((19, 19), lambda m: m[2:7, 1:8]),
    "odd_offset": ((9001,), lambda m: m[3:]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_has_the_cpus_bits(layout, dtype, target):
    shape, view = LAYOUTS[layout]

    def make(device: torch.device) -> list[nn.Parameter]:
        return [nn.Parameter(view(tensor(shape, dtype, device, seed=0)))]

    assert_same_on_both(training(make, momentum=0.9), target)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_other_strides_have_the_cpus_bits(dtype, target):
    shapes = [(6, 9), (64, 129)]

    def scenario(device: torch.device) -> Advance:
        params = make_params(shapes, dtype, device)
        ema = EMA(params, decay=0.9)
        optimizer = SGD(params, lr=0.1, momentum=0.9, ema=ema)

        def advance(step: int) -> list[Tensor]:
            for i, p in enumerate(params):
                p.grad = tensor(tuple(p.shape[::-1]), dtype, device, seed=10 * step + i).t()
            optimizer.step()
            return written(optimizer)

        return advance

    assert_same_on_both(scenario, target)


# --- lists ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_more_tensors_than_a_launch_carries_have_the_cpus_bits(dtype, decay, target):
    shapes = [(1 + 37 * i % 301,) for i in range(2000)]
    make = of_shapes(shapes, dtype)
    assert_same_on_both(training(make, decay=decay, momentum=0.9), target, steps=2)


@pytest.mark.parametrize("count", [1, 4, 5, 16, 17, 40, 300])
def test_many_param_groups_have_the_cpus_bits(count, target):
    """Each group has hyper-parameters of its own, and an empty group stands among them."""

    def scenario(device: torch.device) -> Advance:
        params = make_params([(1 + i,) for i in range(2 * count)], F32, device)
        groups: list[dict[str, Any]] = [
            {
                "params": params[2 * i : 2 * i + 2],
                "lr": 0.1 / (1 + i),
                "momentum": (0.0, 0.5, 0.9)[i % 3],
                "weight_decay": 0.01 * (i % 5),
                "maximize": i % 2 == 1,
                "formulation": ("torch", "sutskever")[i % 2],
                "reset_grads": i % 7 == 0,
            }
            for i in range(count)
        ]
        groups.insert(count // 2, {"params": []})
        ema = EMA(params, decay=0.9)
        optimizer = SGD(groups, lr=0.1, ema=ema)

        def advance(step: int) -> list[Tensor]:
            set_gradients(params, step)
            optimizer.step()
            return written(optimizer)

        return advance

    assert_same_on_both(scenario, target)


def test_mixed_dtypes_have_the_cpus_bits(target):
    def make(device: torch.device) -> list[nn.Parameter]:
        return [
            nn.Parameter(tensor((100 + i,), DTYPES[i % len(DTYPES)], device, seed=i))
            for i in range(50)
        ]

    assert_same_on_both(training(make, momentum=0.9, nesterov=True), target)


def test_absent_and_late_gradients_have_the_cpus_bits(target):
    """Some parameters are frozen, some get their first gradient late, some outside are tracked."""

    def scenario(device: torch.device) -> Advance:
        params = make_params([(100 + i,) for i in range(12)], F32, device)
        params[3].requires_grad_(False)
        ema = EMA(params, decay=0.9)
        optimizer = SGD(params[:9], lr=0.1, momentum=0.9, dampening=0.5, ema=ema)

        def advance(step: int) -> list[Tensor]:
            optimizer.zero_grad()
            trained = [p for i, p in enumerate(params[:9]) if i != 3 and (i + step) % 3]
            set_gradients(trained, step)
            optimizer.step()
            return written(optimizer) + params[9:]

        return advance

    assert_same_on_both(scenario, target, steps=6)


@needs_gpu
def test_parameters_on_cpu_and_cuda_share_a_step():
    """The CPU's parameters and the GPU's, in one optimizer with one average."""
    shapes = [(100 + i,) for i in range(6)]

    def make(device: torch.device) -> list[nn.Parameter]:
        mixed = ["cpu", device] * 3
        return [
            nn.Parameter(tensor(s, F32, d, seed=i))
            for i, (s, d) in enumerate(zip(shapes, mixed, strict=True))
        ]

    assert_same_on_both(training(make, momentum=0.9), DEVICE)


@needs_gpu
def test_two_devices_share_a_step():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    shapes = [(100 + i,) for i in range(6)]

    def make(device: torch.device) -> list[nn.Parameter]:
        devices = [device] if device.type == "cpu" else ["cuda:1", "cuda:0"]
        return [
            nn.Parameter(tensor(s, F32, devices[i % len(devices)], seed=i))
            for i, s in enumerate(shapes)
        ]

    assert_same_on_both(training(make, momentum=0.9), DEVICE)
    assert torch.cuda.current_device() == 0


@needs_gpu
def test_a_device_that_is_not_the_current_one_takes_a_step():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")

    def make(device: torch.device) -> list[nn.Parameter]:
        return make_params(
            [(1000,)], F32, device if device.type == "cpu" else torch.device("cuda:1")
        )

    assert_same_on_both(training(make, momentum=0.9), DEVICE)
    assert torch.cuda.current_device() == 0


# --- all that a step can do ----------------------------------------------------------------------

MASTERS = [(BF16, "fp32"), (BF16, "split"), (BF16, "kahan"), (F16, "fp32"), (F16, "kahan")]
#: Fewer than SHAPES, with a chunk that ends inside a vector, and more than one.
SOME_SHAPES = [(), (0,), (3,), (17,), (8193,), (3 * 8192 + 5,)]


@pytest.mark.parametrize("reset_grads", [False, True])
@pytest.mark.parametrize(("dtype", "master"), MASTERS)
def test_masters_have_the_cpus_bits(dtype, master, reset_grads, target):
    def scenario(device: torch.device) -> Advance:
        params = make_params(SHAPES, dtype, device)
        # One lies where only single elements can be moved.
        params.append(nn.Parameter(tensor((9000,), dtype, device, seed=1)[1:]))
        ema = EMA(params, decay=0.9)
        options = {"momentum": 0.9, "reset_grads": reset_grads, "master_weights": master}
        optimizer = SGD(params, lr=1e-3, ema=ema, **options)

        def advance(step: int) -> list[Tensor]:
            set_gradients(params, step)
            optimizer.step()
            return [*everything(optimizer), *(p.grad for p in params)]

        return advance

    assert_same_on_both(scenario, target)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_stochastic_rounding_has_the_cpus_bits(dtype, target):
    """Some groups round so and some do not, on more rows and groups than a launch carries."""
    shapes = SHAPES + [(1 + i % 19,) for i in range(800)]

    def scenario(device: torch.device) -> Advance:
        params = make_params(shapes, dtype, device)
        groups = [
            {"params": params[g::25], "rounding_seed": g, "stochastic_rounding": g % 3 != 0}
            for g in range(25)
        ]
        ema = EMA(params, decay=0.9)
        optimizer = SGD(groups, lr=0.1, momentum=0.9, nesterov=True, ema=ema)

        def advance(step: int) -> list[Tensor]:
            set_gradients(params, step)
            optimizer.step()
            return written(optimizer)

        return advance

    assert_same_on_both(scenario, target, steps=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 8, 9, 11, 12, 30])
def test_many_averages_have_the_cpus_bits(count, dtype, target):
    """As many as the entries of a table hold, or as a table, and one more or less."""

    def scenario(device: torch.device) -> Advance:
        params = make_params(SOME_SHAPES, dtype, device)
        params.append(nn.Parameter(tensor((9001,), dtype, device, seed=1)[1:]))
        params[3].requires_grad_(False)
        decays = tuple(k / (count + 1) for k in range(count))
        ema = Several(params, decays, F64 if dtype == F64 else F32, every=2)
        optimizer = SGD(params, lr=0.1, momentum=0.9, ema=ema, stochastic_rounding=count == 7)

        def advance(step: int) -> list[Tensor]:
            set_gradients([p for p in params if p.requires_grad], step)
            optimizer.step()
            return [*params, *flat(ema.rows)]

        return advance

    assert_same_on_both(scenario, target)


@pytest.mark.parametrize("count", [2, 9])
def test_many_tensors_with_many_averages_have_the_cpus_bits(count, target):
    def scenario(device: torch.device) -> Advance:
        params = make_params([(1 + i % 7,) for i in range(700)], F32, device)
        ema = Several(params, tuple(k / (count + 1) for k in range(count)))
        optimizer = SGD(params, lr=0.1, ema=ema)

        def advance(step: int) -> list[Tensor]:
            set_gradients(params, step)
            optimizer.step()
            return [*params, *flat(ema.rows)]

        return advance

    assert_same_on_both(scenario, target, steps=1)


#: What makes a step be skipped, and what does not.
FOUND = [0.0, 1.0, 0.0, 1e-30, float("nan"), -2.0, -0.0, float("inf"), 0.0]


@pytest.mark.parametrize("reset_grads", [False, True])
@pytest.mark.parametrize(("dtype", "master"), [(F32, None), (F64, None), (BF16, None), *MASTERS])
def test_steps_that_the_device_skips_and_counts_have_the_cpus_bits(
    dtype, master, reset_grads, target
):
    """Schedules and random numbers go by the count of steps that were taken."""

    def scenario(device: torch.device) -> Advance:
        params = make_params(SOME_SHAPES, dtype, device)
        ema = EMA(params, decay=schedules.tf_warmup(0.999), update_every=2)
        options = {"reset_grads": reset_grads, "master_weights": master}
        options["stochastic_rounding"] = dtype == BF16
        optimizer = SGD(params, lr=0.1, momentum=0.9, ema=ema, capturable=True, **options)

        def advance(step: int) -> list[Tensor]:
            set_gradients(params, step)
            optimizer.found_inf = torch.tensor(FOUND[step], device=device)
            optimizer.step()
            return [*everything(optimizer), *(p.grad for p in params)]

        return advance

    assert_same_on_both(scenario, target, steps=len(FOUND))


@pytest.mark.parametrize("averages", [1, 8, 9, 20])
@pytest.mark.parametrize("groups", [1, 14, 15, 30])
def test_numbers_on_the_device_have_the_cpus_bits(groups, averages, target):
    """More groups and averages than one launch reads, all by one count that comes last."""

    def scenario(device: torch.device) -> Advance:
        params = make_params([(3 + i,) for i in range(groups)], F32, device)
        params += make_params([(5,)], F64, device)
        hypers: list[dict[str, Any]] = [
            {
                "params": params[g : g + 1],
                "lr": torch.tensor(0.1 + g, device=device),
                "momentum": torch.tensor(0.01 * g, device=device, dtype=F64),
                "weight_decay": torch.tensor(0.1, device=device),
                "stochastic_rounding": True,
            }
            for g in range(groups + 1)
        ]
        numbers = [torch.tensor(k / (averages + 1), device=device) for k in range(averages)]
        decays = [schedules.tf_warmup(0.999) if k % 3 == 0 else d for k, d in enumerate(numbers)]
        ema = Several(params, tuple(decays), after=1)
        optimizer = SGD(hypers, lr=0.1, ema=ema, capturable=True)

        def advance(step: int) -> list[Tensor]:
            set_gradients(params, step)
            optimizer.step()
            return [*params, *flat(ema.rows)]

        return advance

    assert_same_on_both(scenario, target, steps=3)


@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_clipping_has_the_cpus_bits(max_norm, dtype, norm_type, target):
    sizes = (0, 1, 5, 8, 511, 512, 513, 1025, 4097, 8193, 16383, 16384, 16385, 50_003)
    shapes = [(), *((n,) for n in sizes)]

    def scenario(device: torch.device) -> Advance:
        params = make_params(shapes, dtype, device)
        params.append(nn.Parameter(tensor((20_001,), dtype, device, seed=1)[1:]))

        def advance(step: int) -> list[Tensor]:
            set_gradients(params, step)
            norm = clip_grad_norm_(params, max_norm, norm_type)
            return [norm, *(p.grad for p in params)]

        return advance

    assert_same_on_both(scenario, target, steps=1)


@pytest.mark.parametrize("count", [100, 1600])
def test_a_clipped_step_of_many_tensors_has_the_cpus_bits(count, target):
    def make(device: torch.device) -> list[nn.Parameter]:
        return [
            nn.Parameter(tensor((1 + i % 50,), DTYPES[i % 4], device, seed=i)) for i in range(count)
        ]

    assert_same_on_both(training(make, momentum=0.9, max_grad_norm=0.5), target, steps=2)


#: -0.0 shows what stands for an absent momentum: 0.0 in its place would make 0.0 of it.
SIGNED = [-0.0, 0.0, 1.0, -1.0]


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("late", [False, True])
def test_a_differentiable_step_has_the_cpus_bits(late, dtype, offset, target):
    """Its outputs and all derivatives, those by its numbers too."""
    sizes = [1, 4, 5, 1023, 1024, 1025, 8193, 16384, 16385, 40_000]

    def scenario(device: torch.device) -> Advance:
        def leaves(first: int) -> list[Tensor]:
            values = [
                tensor((n + offset,), dtype, device, seed=first + i) for i, n in enumerate(sizes)
            ]
            for value in values:
                value[: len(SIGNED) + offset] = torch.tensor(
                    (SIGNED * 2)[: len(value[: len(SIGNED) + offset])], dtype=dtype
                )
            return [value[offset:].requires_grad_() for value in values]

        def advance(step: int) -> list[Tensor]:
            params, grads, momentum, shadows = (leaves(100 * (4 * step + k)) for k in range(4))
            numbers = [
                torch.tensor(v, dtype=dtype, device=device, requires_grad=True)
                for v in (0.1, 0.9, 0.01, 0.75)
            ]
            lr, mu, weight_decay, decay = numbers
            new, velocity = sgd_step(
                params,
                grads,
                momentum if late else None,
                lr=lr,
                momentum=mu,
                weight_decay=weight_decay,
                nesterov=step % 2 == 1,
            )
            averages = ema_update(shadows, new, decay=decay)
            outputs = [*new, *(v for v in velocity if v is not None), *averages]
            leaf = [*params, *grads, *shadows, *numbers, *(momentum if late else [])]
            cotangents = [
                tensor(tuple(o.shape), dtype, device, seed=7 + i) for i, o in enumerate(outputs)
            ]
            derivatives = torch.autograd.grad(outputs, leaf, cotangents, allow_unused=True)
            return [*outputs, *(d for d in derivatives if d is not None)]

        return advance

    assert_same_on_both(scenario, target, steps=2)


@pytest.mark.parametrize("count", [60, 800])
def test_differentiable_steps_of_many_tensors_have_the_cpus_bits(count, target):
    """More rows and more numbers than a launch carries."""

    def scenario(device: torch.device) -> Advance:
        def advance(step: int) -> list[Tensor]:
            params, grads = (
                [
                    tensor((1 + i % 9,), F32, device, seed=s + i).requires_grad_()
                    for i in range(count)
                ]
                for s in (0, 10_000)
            )
            rates = [torch.tensor(0.1 + i, device=device, requires_grad=True) for i in range(count)]
            new, _ = sgd_step(params, grads, lr=rates, momentum=0.9)
            cotangents = [tensor(tuple(p.shape), F32, device, seed=i) for i, p in enumerate(new)]
            return [*new, *torch.autograd.grad(new, [*params, *grads, *rates], cotangents)]

        return advance

    assert_same_on_both(scenario, target, steps=1)


# --- the average ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_average_alone_has_the_cpus_bits(dtype, target):
    def scenario(device: torch.device) -> Advance:
        params = make_params([(3, 5), (8193,), ()], dtype, device)
        ema = EMA(params, decay=0.9)

        def advance(step: int) -> list[Tensor]:
            with torch.no_grad():
                for i, p in enumerate(params):
                    p.copy_(tensor(tuple(p.shape), dtype, device, seed=50 * (step + 1) + i))
            ema.update()
            with ema.average_parameters():
                applied = [p.detach().clone() for p in params]
            return [*params, *ema.shadows.values(), *applied]

        return advance

    assert_same_on_both(scenario, target)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_average_in_the_step_equals_one_beside_it(dtype):
    one, two = (make_params(SHAPES, dtype, torch.device(DEVICE)) for _ in range(2))
    inside, beside = EMA(one, decay=0.9), EMA(two, decay=0.9)
    fused = SGD(one, lr=0.1, momentum=0.9, ema=inside)
    plain = SGD(two, lr=0.1, momentum=0.9)
    for step in range(STEPS):
        set_gradients(one, step)
        set_gradients(two, step)
        fused.step()
        plain.step()
        beside.update()
    for a, b in zip(inside.shadows.values(), beside.shadows.values(), strict=True):
        assert_same_bits(a, b)


@needs_gpu
def test_a_checkpoint_of_the_cpu_goes_on_on_cuda():
    def start(device: str) -> tuple[list[nn.Parameter], EMA, SGD]:
        params = make_params([(3, 5), (1000,)], F32, torch.device(device))
        ema = EMA(params, decay=0.9)
        return params, ema, SGD(params, lr=0.1, momentum=0.9, ema=ema)

    cpu_params, cpu_ema, cpu = start("cpu")
    params, ema, optimizer = start(DEVICE)
    for step in range(2):
        set_gradients(cpu_params, step)
        cpu.step()
    optimizer.load_state_dict(copy.deepcopy(cpu.state_dict()))
    ema.load_state_dict(cpu_ema.state_dict())
    with torch.no_grad():
        for p, q in zip(params, cpu_params, strict=True):
            p.copy_(q)
    for tensors in (optimizer.state[params[0]].values(), ema.shadows.values()):
        assert all(t.device.type == torch.device(DEVICE).type for t in tensors)
    for step in range(2, 4):
        set_gradients(cpu_params, step)
        set_gradients(params, step)
        cpu.step()
        optimizer.step()
    for a, b in zip(written(optimizer), written(cpu), strict=True):
        assert_same_bits(a, b)


# --- streams, graphs, synchronisation ------------------------------------------------------------


@needs_gpu
def test_a_step_runs_on_the_current_stream():
    """The gradient arrives late on a side stream: a step on another stream would miss it."""
    params = make_params([(1000,), (8193,)], F32, torch.device(DEVICE))
    twins = [nn.Parameter(p.detach().cpu().clone()) for p in params]
    set_gradients(twins, step=0)
    for p in params:
        p.grad = torch.zeros_like(p)
    pinned = [q.grad.pin_memory() for q in twins]
    ema, twin_ema = EMA(params, decay=0.5), EMA(twins, decay=0.5)
    optimizer = SGD(params, lr=0.1, momentum=0.9, ema=ema)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for p, grad in zip(params, pinned, strict=True):
            p.grad.copy_(grad, non_blocking=True)
        optimizer.step()
    stream.synchronize()
    SGD(twins, lr=0.1, momentum=0.9, ema=twin_ema).step()
    for a, b in zip(
        params + list(ema.shadows.values()), twins + list(twin_ema.shadows.values()), strict=True
    ):
        assert_same_bits(a, b)


@contextmanager
def side_stream() -> Iterator[None]:
    """Where warm-up before a capture belongs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@needs_gpu
@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("count", [5, 2000])
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"formulation": "sutskever"}], ids=str)
def test_a_captured_step_replays(options, count, decay):
    shapes = [(1 + 37 * i % 301,) for i in range(count)]

    def start(device: str) -> tuple[list[nn.Parameter], SGD]:
        params = make_params(shapes, F32, torch.device(device))
        ema = None if decay is None else EMA(params, decay=decay)
        return params, SGD(params, lr=0.1, momentum=0.9, ema=ema, **options)

    params, optimizer = start(DEVICE)
    twins, twin = start("cpu")
    set_gradients(params, step=0)
    with side_stream():
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(4):
        set_gradients(twins, step)
        twin.step()
        if step == 0:
            continue
        set_gradients(params, step)
        graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(written(optimizer), written(twin), strict=True):
        assert_same_bits(a, b)


@needs_gpu
def test_a_step_may_be_captured_without_a_warm_up():
    """Nothing is loaded or set up at the first launch that a capture forbids."""
    params = make_params([(100,), (8193,)], F32, torch.device(DEVICE))
    twins = [nn.Parameter(p.detach().cpu().clone()) for p in params]
    optimizer, twin = SGD(params, lr=0.1), SGD(twins, lr=0.1)
    set_gradients(params, step=0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step in range(3):
        set_gradients(params, step)
        set_gradients(twins, step)
        graph.replay()
        twin.step()
    for a, b in zip(params, twins, strict=True):
        assert_same_bits(a, b)


@needs_gpu
def test_a_captured_update_replays():
    params = make_params([(100,), (8193,)], BF16, torch.device(DEVICE))
    twins = [nn.Parameter(p.detach().cpu().clone()) for p in params]
    ema, twin = EMA(params, decay=0.75), EMA(twins, decay=0.75)
    with side_stream():
        ema.update()  # changes nothing: the shadows are the weights
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema.update()
    for step in range(3):
        with torch.no_grad():
            for i, (p, q) in enumerate(zip(params, twins, strict=True)):
                q.copy_(tensor(tuple(q.shape), BF16, "cpu", seed=20 * step + i))
                p.copy_(q)
        graph.replay()
        twin.update()
    for a, b in zip(ema.shadows.values(), twin.shadows.values(), strict=True):
        assert_same_bits(a, b)


@needs_gpu
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("formulation", ["torch", "sutskever"])
def test_a_captured_step_reads_the_learning_rate_at_each_replay(formulation, shape):
    params = make_params([(100,), (8193,)], F32, torch.device(DEVICE))
    twins = [nn.Parameter(p.detach().cpu().clone()) for p in params]
    options = {"momentum": 0.9, "formulation": formulation}
    lr, twin_lr = torch.full(shape, 0.1, device=DEVICE), torch.full(shape, 0.1)
    optimizer, twin = SGD(params, lr=lr, **options), SGD(twins, lr=twin_lr, **options)
    set_gradients(params, step=0)
    with side_stream():
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step, rate in enumerate((0.1, 0.05, 0.3)):
        lr.fill_(rate)
        twin_lr.fill_(rate)
        set_gradients(twins, step)
        twin.step()
        if step == 0:
            continue
        set_gradients(params, step)
        graph.replay()
    for a, b in zip(params, twins, strict=True):
        assert_same_bits(a, b)


@needs_gpu
@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "reset_grads": True}], ids=str
)
def test_a_step_never_waits_for_the_device(options, decay):
    params = make_params([(100,), (8193,)], F32, torch.device(DEVICE))
    ema = None if decay is None else EMA(params, decay=decay)
    optimizer = SGD(params, lr=0.1, ema=ema, **options)
    set_gradients(params, step=0)
    with no_synchronisation():
        optimizer.step()  # the first, which makes the state
        optimizer.step()


@needs_gpu
def test_the_functional_forms_never_wait_for_the_device():
    device = torch.device(DEVICE)
    params, grads, shadows = ([tensor((1000,), F32, device, seed=i)] for i in range(3))
    lr = torch.tensor(0.1, device=device)
    with no_synchronisation():
        sgd_step_(params, grads, [None], lr=lr, momentum=0.9, shadows=shadows, decay=0.9)
        ema_update_(shadows, params, decay=0.9)


@needs_gpu
@pytest.mark.parametrize("dtype", [F32, F64, BF16])
@pytest.mark.parametrize("lr_dtype", [F32, F64])
@pytest.mark.parametrize("formulation", ["torch", "sutskever"])
def test_a_learning_rate_on_the_device_is_read_there(formulation, lr_dtype, dtype):
    options = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "formulation": formulation}
    params = make_params([(100,), (8193,)], dtype, torch.device(DEVICE))
    twins = [nn.Parameter(p.detach().cpu().clone()) for p in params]
    lr = torch.tensor(0.1, device=DEVICE, dtype=lr_dtype)
    twin_lr = torch.tensor(0.1, dtype=lr_dtype)
    ema, twin_ema = EMA(params, decay=0.9), EMA(twins, decay=0.9)
    optimizer = SGD(params, lr=lr, ema=ema, **options)
    twin = SGD(twins, lr=twin_lr, ema=twin_ema, **options)
    for step in range(STEPS):
        set_gradients(params, step)
        set_gradients(twins, step)
        with no_synchronisation():
            optimizer.step()
            lr.mul_(0.5)
        twin.step()
        twin_lr.mul_(0.5)
    for a, b in zip(written(optimizer), written(twin), strict=True):
        assert_same_bits(a, b)


def test_a_learning_rate_on_the_cpu_serves_parameters_on_the_device(target):
    def scenario(device: torch.device) -> Advance:
        params = make_params([(100,), (8193,)], F32, device)
        optimizer = SGD(params, lr=torch.tensor(0.1), momentum=0.9)

        def advance(step: int) -> list[Tensor]:
            set_gradients(params, step)
            optimizer.step()
            return written(optimizer)

        return advance

    assert_same_on_both(scenario, target)


def test_groups_with_learning_rates_on_device_cpu_and_host_share_a_step(target):
    def scenario(device: torch.device) -> Advance:
        params = make_params([(100 + i,) for i in range(6)], F32, device)
        rates = [torch.tensor(0.1, device=device), torch.tensor(0.2), 0.3]
        groups = [{"params": params[2 * i : 2 * i + 2], "lr": lr} for i, lr in enumerate(rates)]
        optimizer = SGD(groups, lr=1.0, momentum=0.9)

        def advance(step: int) -> list[Tensor]:
            set_gradients(params, step)
            optimizer.step()
            return written(optimizer)

        return advance

    assert_same_on_both(scenario, target)


@needs_gpu
def test_a_warm_step_allocates_nothing():
    params = make_params([(1 + i,) for i in range(900)], F32, torch.device(DEVICE))
    ema = EMA(params, decay=0.9)
    optimizer = SGD(params, lr=0.1, momentum=0.9, reset_grads=True, ema=ema)
    set_gradients(params, step=0)
    optimizer.step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    optimizer.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@needs_gpu
@pytest.mark.parametrize(("count", "launches"), [(1, 1), (500, 1), (2000, 4)])
def test_a_list_of_one_dtype_is_one_launch_per_table(count, launches):
    """A table holds some 570 tensors; nothing else runs on the device."""
    params = make_params([(1 + i % 50,) for i in range(count)], F32, torch.device(DEVICE))
    ema = EMA(params, decay=0.9)
    optimizer = SGD(params, lr=0.1, momentum=0.9, reset_grads=True, ema=ema)
    set_gradients(params, step=0)
    optimizer.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.zeros(1, device=DEVICE).add_(1)  # shows that the profiler sees kernels at all
        optimizer.step()
        torch.cuda.synchronize()
    names = [
        event.name
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and "step_kernel" in event.name
    ]
    if not any(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events()):
        pytest.skip("the profiler sees no kernels on this machine")
    assert len(names) <= launches
    assert names


# --- errors --------------------------------------------------------------------------------------


def arguments_on(device: str) -> dict[str, Any]:
    shapes = [(3, 4), (5,)]
    return {
        "params": [tensor(s, F32, device, seed=i) for i, s in enumerate(shapes)],
        "grads": [tensor(s, F32, device, seed=10 + i) for i, s in enumerate(shapes)],
        "momentum_buffers": [tensor(s, F32, device, seed=20 + i) for i, s in enumerate(shapes)],
        "shadows": [tensor(s, F32, device, seed=30 + i) for i, s in enumerate(shapes)],
    }


@needs_gpu
@pytest.mark.parametrize("name", ["params", "grads", "momentum_buffers", "shadows"])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("home", "away"), [(DEVICE, "cpu"), ("cpu", DEVICE)])
def test_a_tensor_on_the_wrong_device_is_refused_and_nothing_changes(home, away, index, name):
    arguments = arguments_on(home)
    arguments[name][index] = arguments[name][index].to(away)
    tensors = [t for stream in arguments.values() for t in stream]
    before, versions = [t.clone() for t in tensors], [t._version for t in tensors]
    with pytest.raises(ValueError, match="device") as caught:
        sgd_step_(**arguments, lr=0.1, momentum=0.9, decay=0.9)
    for word in (torch.device(home).type, torch.device(away).type):
        assert re.search(word, str(caught.value))
    for t, expected in zip(tensors, before, strict=True):
        assert_same_bits(t, expected)
    assert [t._version for t in tensors] == versions


@needs_gpu
def test_momentum_left_on_the_cpu_is_refused_and_nothing_changes():
    params = make_params([(3,), (4,)], F32, torch.device(DEVICE))
    ema = EMA(params, decay=0.9)
    optimizer = SGD(params, lr=0.1, momentum=0.9, ema=ema)
    set_gradients(params, step=0)
    optimizer.step()
    state = optimizer.state[params[1]]
    state["momentum_buffer"] = state["momentum_buffer"].cpu()
    before = [t.clone() for t in written(optimizer)]
    with pytest.raises(ValueError, match="momentum"):
        optimizer.step()
    for t, expected in zip(written(optimizer), before, strict=True):
        assert_same_bits(t, expected)
    assert ema.num_updates == 1


@needs_gpu
def test_a_gradient_scaler_scales_and_skips():
    params = make_params([(100,), (8193,)], F32, torch.device(DEVICE))
    twins = make_params([(100,), (8193,)], F32, torch.device(DEVICE))
    optimizer, twin = SGD(params, lr=0.1, momentum=0.9), SGD(twins, lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    for step in range(4):
        set_gradients(params, step)
        set_gradients(twins, step)
        for p in params:
            p.grad.mul_(1024.0)
        scaler.scale(torch.ones((), device=DEVICE))  # a scaler is lazy until its first loss
        if step == 2:
            params[0].grad[7] = float("inf")
            before = [p.detach().clone() for p in params]
        scaler.step(optimizer)
        if step == 2:
            for p, expected in zip(params, before, strict=True):
                assert_same_bits(p, expected)
        else:
            twin.step()
        for p, q in zip(params, twins, strict=True):
            assert_same_bits(p, q)
        scaler.update(1024.0)


# --- size ----------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_more_elements_than_32_bits_count(dtype):
    """Windows at both ends and around element 2^31 step like a small tensor; the rest stays 0."""
    numel, middle, width = 2**31 + 3 * 8192 + 17, 2**31 - 4096, 8192
    needed = numel * (3 * dtype.itemsize + 4) + 2**31  # parameter, gradient, momentum, shadow
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free device memory")
    windows = [slice(0, width), slice(middle, middle + width), slice(numel - width, numel)]
    param = nn.Parameter(torch.zeros(numel, dtype=dtype, device=DEVICE))
    param.grad = torch.zeros_like(param)
    ema = EMA([param], decay=0.75)
    optimizer = SGD([param], lr=0.5, momentum=0.9, ema=ema)
    small = nn.Parameter(torch.zeros(3 * width, dtype=dtype))
    small_ema = EMA([small], decay=0.75)
    twin = SGD([small], lr=0.5, momentum=0.9, ema=small_ema)
    for step in range(2):
        set_gradients([small], step)
        for i, window in enumerate(windows):
            param.grad[window].copy_(small.grad[i * width : (i + 1) * width])
        optimizer.step()
        twin.step()
    streams = [param, optimizer.state[param]["momentum_buffer"], ema.shadows["0"]]
    twins = [small, twin.state[small]["momentum_buffer"], small_ema.shadows["0"]]
    for stream, expected in zip(streams, twins, strict=True):
        for i, window in enumerate(windows):
            assert_same_bits(
                stream.detach()[window], expected.detach()[i * width : (i + 1) * width]
            )
            stream.detach()[window].zero_()
        for part in stream.detach().split(2**28):
            assert not part.any()
