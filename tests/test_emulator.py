"""The emulator of CUDA: what it lets pass and what it reports, and what only it can show.

tests/test_cuda.py runs its scenarios in the emulator (tests/emulated.py); one test here does so
again with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import emulated
import native_variants
import pytest
import torch
from emulated import emulator
from reference import assert_all_same_bits, assert_same_bits, make_params, random_tensor
from torch import Tensor

from fused_opt import SGD, clip_grad_norm_
from fused_opt.functional import ema_update_, sgd_step, sgd_step_

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
ROOT = native_variants.ROOT
CHUNK = 8192


# --- the emulator by itself ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def probes(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """tests/emulator/probes.cpp."""
    library = tmp_path_factory.mktemp("probes") / "probes.so"
    folder = ROOT / "tests" / "emulator"
    command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-shared", "-fPIC"]
    command += [f"-I{folder}", f"-I{ROOT / 'csrc'}", "-fvisibility=hidden", "-o", str(library)]
    command += [str(folder / f"{name}.cpp") for name in ("probes", "emulator")]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    for name in ("pass_on", "read_shared", "diverge", "shuffle", "record_order", "size", "stream"):
        getattr(loaded, f"probe_{name}").restype = ctypes.c_char_p
    loaded.probe_too_many_parameters.restype = ctypes.c_char_p
    loaded.probe_unloaded_kernel.restype = ctypes.c_char_p
    return loaded


def numbers(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def test_a_barrier_orders_what_threads_do(probes):
    results = torch.empty(3, 256, dtype=torch.int32)
    assert probes.probe_pass_on(numbers(results), 3, 7, True) == b""
    assert results.tolist() == [[(thread - 7) % 256 for thread in range(256)]] * 3


@pytest.mark.parametrize("seed", range(5))
def test_a_missing_barrier_shows(seed, probes):
    probes.emulator_seed(ctypes.c_uint64(seed))
    results = torch.empty(256, dtype=torch.int32)
    assert probes.probe_pass_on(numbers(results), 1, 1, False) == b""
    assert results.tolist() != [(thread - 1) % 256 for thread in range(256)]


def test_shared_memory_is_garbage_in_every_block(probes):
    results = torch.zeros(256, dtype=torch.int32)
    assert probes.probe_read_shared(numbers(results)) == b""
    assert results.tolist() == [-1] * 256


@pytest.mark.parametrize(("way", "trouble"), [(0, ""), (1, "barrier"), (2, "shuffle"), (3, "")])
def test_threads_that_wait_at_different_places_are_reported(way, trouble, probes):
    found = probes.probe_diverge(way).decode()
    assert trouble in found
    assert bool(found) == bool(trouble)
    if found:
        assert "thread 40 probes.cpp:" in found
        assert "thread 0 probes.cpp:" in found
    assert probes.probe_diverge(3) == b""  # the next kernel runs


def test_a_shuffle_moves_numbers_down_a_warp(probes):
    results = torch.full((64,), -1.0, dtype=F64)
    assert probes.probe_shuffle(numbers(results), 0xFFFFFFFF, 3) == b""
    lanes = [lane + 3 if lane + 3 < 32 else lane for lane in range(32)]
    assert results.tolist() == [*lanes, *(32 + lane for lane in lanes)]
    results.fill_(-1)
    assert probes.probe_shuffle(numbers(results), 0x0000000F, 2) == b""
    assert results[:2].tolist() == [2, 3]
    assert results[2:4].isnan().all()  # of lanes that do not take part
    assert (results[4:32] == -1).all()


def test_blocks_run_in_an_order_that_the_seed_chooses(probes):
    def order(seed: int) -> list[int]:
        results = torch.empty(20, dtype=torch.int32)
        probes.emulator_seed(ctypes.c_uint64(seed))
        assert probes.probe_record_order(numbers(results), 20) == b""
        return results.tolist()

    orders = [order(seed) for seed in (1, 2, 1)]
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(20))


@pytest.mark.parametrize(
    ("blocks", "threads", "trouble"),
    [
        (1, 1024, b""),
        (1, 1025, b"cudaErrorInvalidConfiguration"),
        (1, 0, b"cudaErrorInvalidConfiguration"),
        (0, 32, b"cudaErrorInvalidConfiguration"),
        (2**31, 32, b"cudaErrorInvalidConfiguration"),
    ],
)
def test_sizes_that_cuda_refuses_are_refused(blocks, threads, trouble, probes):
    assert probes.probe_size(ctypes.c_uint(blocks), ctypes.c_uint(threads)) == trouble


def test_more_parameters_than_cuda_takes_are_refused(probes):
    assert probes.probe_too_many_parameters() == b"cudaErrorInvalidValue"


def test_a_kernel_that_was_not_loaded_would_break_a_capture(probes):
    assert probes.probe_unloaded_kernel() == b"cudaErrorStreamCaptureUnsupported"


def test_work_on_another_stream_and_a_capture_mode_that_stays_are_reported(probes):
    assert probes.probe_stream(False, False) == b""
    assert b"another stream" in probes.probe_stream(True, False)
    assert b"capture mode" in probes.probe_stream(False, True)
    assert probes.probe_stream(False, False) == b""


def test_a_launch_copies_its_parameters_and_waits_for_its_stream(probes):
    assert probes.probe_copies_of_parameters() == (1 + 2 + 3) * 10 + 100


@pytest.mark.parametrize(("dtype", "name"), [(BF16, "bfloat16"), (F16, "float16")])
def test_conversions_are_torchs(dtype, name, probes):
    """Of all numbers, all halfway between two, and those beside; one NaN stands for all."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    wide = torch.empty(2**16)
    getattr(probes, f"probe_from_{name}")(numbers(bits), numbers(wide), ctypes.c_int64(2**16))
    assert_same_bits(wide, bits.view(dtype).float())
    finite = wide[wide.isfinite()].unique().double()
    halfway = (finite[1:] + finite[:-1]) / 2
    largest = torch.tensor([finite[-1] + (finite[-1] - finite[-2]) / 2, math.inf], dtype=F64)
    places = torch.cat([finite, halfway, largest, -largest]).float()
    inputs = torch.cat([places, places.nextafter(torch.tensor(math.inf))])
    inputs = torch.cat(
        [inputs, places.nextafter(torch.tensor(-math.inf)), torch.tensor([math.nan])]
    )
    outputs = torch.empty(len(inputs), dtype=dtype)
    getattr(probes, f"probe_to_{name}")(
        numbers(inputs), numbers(outputs), ctypes.c_int64(len(inputs))
    )
    assert_same_bits(outputs, inputs.to(dtype))
    assert outputs[-1:].view(torch.int16).item() == 0x7FFF


# --- launches ------------------------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[list[emulated.Counts]]:
    """In the emulator; the list then holds what ran."""
    found: list[emulated.Counts] = []
    with emulator().in_place():
        emulator().counts()
        yield found
        found.append(emulator().counts())


def test_the_package_runs_in_the_emulator_while_it_is_in_place():
    params, shadows = [torch.zeros(3)], [torch.ones(3)]
    with counted() as found:
        ema_update_(shadows, params, decay=0.5)
    assert shadows[0].tolist() == [0.5] * 3
    assert found[0].launches == found[0].blocks == 1
    emulator().counts()
    ema_update_(shadows, params, decay=0.5)
    assert emulator().counts().launches == 0


def capacity(launches_of: Callable[[int], int], most: int) -> int:
    """The largest number of something that one launch takes."""
    low, high = 1, most
    assert launches_of(low) == 1 < launches_of(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if launches_of(middle) == 1 else (low, middle)
    return low


def run_ema(count: int) -> list[Tensor]:
    params, shadows = (
        [random_tensor((1 + i % 3,), seed=s + i) for i in range(count)] for s in (0, 10_000)
    )
    ema_update_(shadows, params, decay=0.75)
    return shadows


def run_groups(count: int) -> list[Tensor]:
    params = make_params([(1 + i % 3,) for i in range(count)], F32)
    groups = [{"params": [p], "lr": 0.1 + i} for i, p in enumerate(params)]
    optimizer = SGD(groups, lr=0.1)
    for i, p in enumerate(params):
        p.grad = random_tensor(p.shape, seed=50 + i)
    optimizer.step()
    return [p.detach() for p in params]


def run_clip(count: int) -> list[Tensor]:
    params = make_params([(1 + i % 3,) for i in range(count)], F32)
    for i, p in enumerate(params):
        p.grad = random_tensor(p.shape, seed=50 + i)
    return [clip_grad_norm_(params, 0.5), *(p.grad for p in params)]


def run_pass(count: int) -> list[Tensor]:
    params, grads = (
        [random_tensor((1 + i % 3,), seed=s + i) for i in range(count)] for s in (0, 10_000)
    )
    return sgd_step(params, grads, lr=0.1)[0]


def run_pass_groups(count: int) -> list[Tensor]:
    params, grads = (
        [random_tensor((1 + i % 3,), seed=s + i) for i in range(count)] for s in (0, 10_000)
    )
    return sgd_step(params, grads, lr=[0.1 + i for i in range(count)])[0]


@pytest.mark.parametrize(
    ("run", "launches", "most"),
    [
        (run_ema, 1, 2000),
        (run_groups, 1, 100),
        (run_clip, 3, 4000),
        (run_pass, 1, 2000),
        (run_pass_groups, 1, 200),
    ],
)
def test_lists_around_the_capacity_of_a_launch_have_the_cpus_bits(run, launches, most):
    """One row or group less than a table holds, as many, and one more."""
    small = True

    def launches_of(count: int) -> int:
        with counted() as found, emulator().only_blocks([]):
            run(count)
        if small:  # a list that does not fit the table of 4 KB takes another
            return 1 + (found[0].largest_parameters > 4096)
        return math.ceil(found[0].launches / launches)

    capacities = [capacity(launches_of, most)]
    small = False
    capacities.append(capacity(launches_of, most))
    assert capacities[0] < capacities[1]
    for count in [c + d for c in capacities for d in (-1, 0, 1)] + [2 * capacities[1] + 1]:
        with counted() as found:
            actual = run(count)
        assert_all_same_bits(actual, run(count))
        assert found[0].largest_parameters <= 32764
        tables = 1 if count <= capacities[0] else math.ceil(count / capacities[1])
        assert math.ceil(found[0].launches / launches) == tables
        assert (found[0].largest_parameters <= 4096) == (count <= capacities[0])


@pytest.mark.parametrize("count", [700, 701, 5000])
def test_long_lists_have_the_cpus_bits(count):
    def run() -> list[Tensor]:
        params, grads, momentum, shadows = (
            [
                random_tensor((i % 4,), BF16 if s == 1 else F32, seed=s * 10_000 + i)
                for i in range(count)
            ]
            for s in range(4)
        )
        sgd_step_(params, grads, momentum, lr=0.1, momentum=0.9, shadows=shadows, decay=0.9)
        return [*params, *momentum, *shadows]

    with counted() as found:
        actual = run()
    assert_all_same_bits(actual, run())
    assert found[0].blocks == sum(i % 4 > 0 for i in range(count))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_order_of_blocks_and_threads_changes_a_bit(seed):
    params = make_params([(40_000,), (5,), (16385,)], F32)
    for i, p in enumerate(params):
        p.grad = random_tensor(p.shape, seed=50 + i)
    expected = clip_grad_norm_(params, 1e9)
    emulator().seed(seed)
    with emulator().in_place():
        assert_same_bits(clip_grad_norm_(params, 1e9), expected)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        "cudaLaunchKernel",
        "cudaFuncGetAttributes",
        "cudaGetDevice",
        "cudaThreadExchangeStreamCaptureMode",
    ],
)
def test_an_error_of_cuda_is_raised_and_the_next_step_runs(function, tmp_path):
    def run() -> list[Tensor]:
        params, grads = [torch.ones(5, dtype=F64)], [torch.ones(5)]
        sgd_step_(params, [grads[0].double()], None, lr=0.5)
        return params

    fresh = emulated.Emulator(emulated.copy_of_module(tmp_path))  # that has loaded no kernel
    with fresh.in_place():
        fresh.fail(function, 9)
        with pytest.raises(fresh.module.CudaError, match="cudaErrorInvalidConfiguration while"):
            run()
        assert run()[0].tolist() == [0.5] * 5


def test_work_of_the_host_runs_in_the_order_of_its_stream():
    shadow, other = torch.zeros(1), torch.zeros(1)
    with emulator().in_place(), emulator().stream() as stream:
        jobs = []
        for target, source in ((other, shadow), (shadow, torch.ones(1))):
            plan = emulator().module.Plan()
            job = plan.host_job(1)
            job.add_copy(target.data_ptr(), source.data_ptr(), 4)
            jobs.append(job)
            job.enqueue(stream)
        assert shadow.item() == other.item() == 0
        emulator().run_stream(stream)
    assert (shadow.item(), other.item()) == (1, 0)


# --- size ----------------------------------------------------------------------------------------

#: Offsets that 32 bits do not count, in bytes or in elements, signed or not.
FAR = [2**29, 2**30, 2**31]


@pytest.mark.parametrize("offset", [0, 1])
def test_more_elements_than_32_bits_count_step_like_few(offset):
    """The blocks at both ends and around far offsets step, and nothing beside them is written.

    The other blocks are not run: memory that nobody has touched takes no space.
    """
    numel, dtype = 2**31 + 13, BF16
    shift = (8 - offset) % 8  # elements before the first that is aligned
    blocks = [0, 1, numel // CHUNK]
    blocks += [far // CHUNK + d for far in FAR for d in (-1, 0)]

    def of_block(block: int) -> slice:
        begin = 0 if block == 0 else block * CHUNK + shift
        return slice(begin, min(numel, (block + 1) * CHUNK + shift))

    streams = [torch.empty(numel + offset, dtype=dtype)[offset:] for _ in range(4)]  # all 0
    windows = [of_block(block) for block in sorted(set(blocks))]
    small = [
        [random_tensor((w.stop - w.start,), dtype, seed=10 * i + s) for s in range(4)]
        for i, w in enumerate(windows)
    ]
    for window, values in zip(windows, small, strict=True):
        for stream, value in zip(streams, values, strict=True):
            stream[window] = value
    hyper: dict[str, Any] = {"lr": 0.5, "momentum": 0.9, "decay": 0.75}
    with emulator().in_place(), emulator().only_blocks(blocks):
        params, grads, momentum, shadows = ([stream] for stream in streams)
        sgd_step_(params, grads, momentum, shadows=shadows, **hyper)
    params, grads, momentum, shadows = (list(each) for each in zip(*small, strict=True))
    sgd_step_(params, grads, momentum, shadows=shadows, **hyper)
    for window, values in zip(windows, small, strict=True):
        for stream, value in zip(streams, values, strict=True):
            assert_same_bits(stream[window], value)
            stream[window] = 0
    for window, stream in itertools.product(windows, streams):
        assert not stream[max(0, window.start - CHUNK) : window.stop + CHUNK].any()


# --- sanitizers ----------------------------------------------------------------------------------


#: Of tests/test_cuda.py. All of them take minutes with sanitizers; those of mutations.py run too.
SANITIZED = ["masters", "mixed_dtypes", "device_skips", "special_values", "late_gradients"]


@pytest.mark.slow
def test_scenarios_of_cuda_pass_with_sanitizers():
    """AddressSanitizer and UndefinedBehaviorSanitizer end the process at a fault."""
    selected = f"emulated and ({' or '.join(SANITIZED)})"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/test_cuda.py", "-k", selected],
        cwd=ROOT,
        env=emulated.environment("emulated-asan"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    assert " passed" in result.stdout
