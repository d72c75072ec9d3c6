"""Mutations of csrc/cuda, compiled side by side into one emulated module with sanitizers.

Each is an expression of the source and a wrong one in its place; a number that the module exports
says which of them is in force. `python tests/mutations.py`, in a process that can load the module,
runs the scenario of each and prints what became of it, as JSON; test_mutations.py is its caller.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emulated
import native_variants
import test_averages
import test_cuda
import test_emulator
import torch
from native_variants import ROOT

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
TARGET = "emulated"
SWITCH = "fused_opt_mutation"

DIFFER = "elements differ"  # from the CPU's
OVERRUN = "AddressSanitizer: heap-buffer-overflow"
OUT_OF_BOUNDS = "runtime error: index"
MISALIGNED = "runtime error: .* misaligned address"
GARBAGE = "runtime error: load of value 255"
OTHER_STREAM = "enqueued on another stream"


# --- scenarios, each as short as it can be -------------------------------------------------------


SHAPES = [(17,), (8193,), (2 * 8192 + 5,)]


def step(dtype: torch.dtype, **options: Any) -> None:
    make = test_cuda.of_shapes(SHAPES, dtype)
    test_cuda.assert_same_on_both(test_cuda.training(make, **options), TARGET, steps=1)


def sizes() -> None:
    step(F32, momentum=0.9)


def offsets() -> None:
    test_cuda.test_odd_offsets_have_the_cpus_bits_and_write_nothing_around(BF16, F32, 8195, TARGET)


def half_types() -> None:
    step(F16, grad_dtype=BF16, momentum=0.9)


def groups() -> None:
    test_cuda.test_many_param_groups_have_the_cpus_bits(17, TARGET)


def launches_of_many_tensors() -> None:
    """Without the kernels: what fills the tables is what may go wrong."""
    with emulated.emulator().in_place(), emulated.emulator().only_blocks([]):
        test_emulator.run_ema(1200)
        test_emulator.run_clip(1600)


def skips() -> None:
    test_cuda.test_steps_that_the_device_skips_and_counts_have_the_cpus_bits(
        F32, None, True, TARGET
    )


def device_numbers() -> None:
    test_cuda.test_numbers_on_the_device_have_the_cpus_bits(30, 20, TARGET)


def averages() -> None:
    test_cuda.test_many_averages_have_the_cpus_bits(7, F32, TARGET)


def averages_at_odd_offsets() -> None:
    with emulated.emulator().in_place():
        test_averages.test_views_that_are_aligned_differently_have_the_same_bits(
            F32, torch.device("cpu")
        )


def clipping() -> None:
    test_cuda.test_clipping_has_the_cpus_bits(0.5, F32, 2.0, TARGET)


def first_differentiable_step() -> None:
    test_cuda.test_a_differentiable_step_has_the_cpus_bits(False, F32, 0, TARGET)


def masters() -> None:
    step(BF16, momentum=0.9, master_weights="split")


# --- mutations -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutation:
    """An expression of a file that occurs there once, or once in the text around it."""

    name: str
    file: str
    old: str
    new: str
    scenario: Callable[[], None]
    #: A regular expression in what the scenario ends with.
    reason: str = DIFFER
    around: str = ""

    @property
    def text(self) -> str:
        return self.around or self.old


LAUNCH, STEP, HYPER = "multi_tensor_apply.cu", "step_kernel.cuh", "hyper_kernel.cuh"
NORM, PASS, DTYPES = "norm_kernel.cuh", "pass_kernel.cuh", "dtypes.cuh"

MUTATIONS = [
    Mutation(
        "a chunk ends one element early",
        STEP,
        "(chunk + 1) * kChunkElements + shift",
        "(chunk + 1) * kChunkElements + shift - 1",
        sizes,
    ),
    Mutation(
        "the search in prefix sums takes < for <=",
        STEP,
        "table.first_chunk[middle] <= chunk",
        "table.first_chunk[middle] < chunk",
        sizes,
        f"{DIFFER}|{OVERRUN}",
    ),
    Mutation(
        "8 bytes count as aligned",
        STEP,
        "address % kVectorBytes == 0",
        "address % (kVectorBytes / 2) == 0",
        offsets,
        MISALIGNED,
    ),
    Mutation(
        "the tail lacks its last element",
        STEP,
        "size - (last - first)",
        "size - (last - first) - 1",
        sizes,
    ),
    Mutation(
        "a vector reaches over the end",
        STEP,
        "(size - first) / N * N",
        "(size - first + N - 1) / N * N",
        sizes,
        OVERRUN,
    ),
    Mutation(
        "chunks after the first forget the head",
        STEP,
        "chunk * kChunkElements + shift",
        "chunk * kChunkElements",
        offsets,
        f"{MISALIGNED}|{DIFFER}",
        "chunk == 0 ? 0 : min(numel, chunk * kChunkElements + shift)",
    ),
    Mutation(
        "an element is as wide as what is computed in",
        STEP,
        "element_size(dtype(stream))",
        "int(sizeof(T))",
        half_types,
        f"{DIFFER}|{OVERRUN}",
    ),
    Mutation(
        "a launch goes to the null stream",
        LAUNCH,
        "stream",
        "cudaStream_t()",
        sizes,
        OTHER_STREAM,
        "pointers, 0, stream)",
    ),
    Mutation(
        "the kernel of hyper-parameters does not come before the step",
        LAUNCH,
        "stream",
        "cudaStream_t()",
        device_numbers,
        f"{OTHER_STREAM}|{GARBAGE}",
        "kHyperThreads,\n                  device, stream, *table)",
    ),
    Mutation(
        "what is absent is 0.0 instead of -0.0",
        PASS,
        "T(-0.0)",
        "T(0.0)",
        first_differentiable_step,
    ),
    Mutation(
        "only found_inf above 0 skips",
        HYPER,
        "is_skipped(table.found_inf)",
        "(table.found_inf != nullptr && *table.found_inf > 0)",
        skips,
    ),
    Mutation(
        "a skipped step resets no gradient",
        STEP,
        "!group.reset_grads || !row.data[kGrad]",
        "true",
        skips,
    ),
    Mutation(
        "counters advance before all numbers are read",
        LAUNCH,
        "group + table->group_count == groups && average + table->average_count == averages",
        "true",
        device_numbers,
    ),
    Mutation(
        "a table takes one row too many",
        LAUNCH,
        "rows_ + more >= Table::kRows",
        "rows_ + more > Table::kRows",
        launches_of_many_tensors,
        OUT_OF_BOUNDS,
    ),
    Mutation(
        "a table of gradients takes one row too many",
        LAUNCH,
        "table->rows == Table::kRows || chunks + more > kMaxBlocks",
        "table->rows > Table::kRows",
        launches_of_many_tensors,
        OUT_OF_BOUNDS,
        "if (table->rows == Table::kRows || chunks + more > kMaxBlocks) flush();",
    ),
    Mutation(
        "all rows have the group of the first",
        LAUNCH,
        "uint8_t(slot)",
        "uint8_t(0)",
        groups,
    ),
    Mutation(
        "further shadows get one entry too few",
        LAUNCH,
        "(int(list.averages.size()) - 1 + kStreams - 1) / kStreams",
        "(int(list.averages.size()) - 1) / kStreams",
        averages,
        f"{OUT_OF_BOUNDS}|{DIFFER}",
    ),
    Mutation(
        "further shadows count as aligned",
        STEP,
        "offset(a) == offset(0)",
        "true",
        averages_at_odd_offsets,
        MISALIGNED,
    ),
    Mutation(
        "no barrier before lanes are folded",
        NORM,
        "__syncthreads()",
        "void()",
        clipping,
        around="lanes[thread * N + k] = own[k];\n  __syncthreads();",
    ),
    Mutation(
        "no barrier before a warp folds",
        NORM,
        "__syncthreads()",
        "void()",
        clipping,
        around="lanes[thread] = far[0];\n  __syncthreads();",
    ),
    Mutation(
        "all chunks of a gradient are its first",
        NORM,
        "int64_t(block - table.first_chunk[row])",
        "int64_t(0)",
        clipping,
    ),
    Mutation(
        "halves of a pair change places",
        DTYPES,
        "k % 2 * 16",
        "(k + 1) % 2 * 16",
        masters,
    ),
]


# --- the module ----------------------------------------------------------------------------------


def mutate(folder: Path) -> None:
    """Writes a copy of csrc into the folder in which a number chooses the mutation."""
    shutil.copytree(ROOT / "csrc", folder / "csrc", dirs_exist_ok=True)
    for number, mutation in enumerate(MUTATIONS, start=1):
        path = folder / "csrc" / "cuda" / mutation.file
        source = path.read_text()
        assert source.count(mutation.text) == 1, (
            f"{mutation.name}: found {mutation.text!r} in "
            f"{mutation.file} {source.count(mutation.text)} times, and not once"
        )
        assert mutation.text.count(mutation.old) == 1, mutation.name
        choice = f"({SWITCH} == {number} ? ({mutation.new}) : ({mutation.old}))"
        path.write_text(source.replace(mutation.text, mutation.text.replace(mutation.old, choice)))
    (folder / "switch.h").write_text(
        f'extern "C" __attribute__((visibility("default"))) int {SWITCH};\nint {SWITCH} = 0;\n'
    )


def build() -> Path:
    """The module with all mutations: that of the variant, but for one object."""
    variant = native_variants.build("emulated-asan")
    folder = ROOT / "build" / "mutations"
    shutil.rmtree(folder / "csrc", ignore_errors=True)
    mutate(folder)
    module = folder / variant.name
    digest = hashlib.sha256(variant.read_bytes())
    for path in sorted((folder / "csrc").rglob("*.*")):
        digest.update(path.read_bytes())
    stamp = folder / "stamp"
    if stamp.exists() and stamp.read_text() == digest.hexdigest():
        return module
    source = ROOT / "csrc" / "cuda" / LAUNCH
    (entry,) = [
        entry
        for entry in json.loads((variant.parent / "compile_commands.json").read_text())
        if entry["file"] == str(source)
    ]
    compile_ = shlex.split(entry["command"])
    mutated = folder / "csrc" / "cuda" / LAUNCH
    compile_ = [str(mutated) if word == str(source) else word for word in compile_]
    compile_[compile_.index("-o") + 1] = str(folder / "mutated.o")
    compile_ += ["-O0", "-include", str(folder / "switch.h")]
    ninja = native_variants.program("ninja")
    listing = subprocess.run(
        [ninja, "-C", str(variant.parent), "-t", "commands", "_C"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    link = listing.stdout.splitlines()[-1]
    outputs = {
        entry["output"].removeprefix(f"{variant.parent}/"): folder / "mutated.o",
        f"-o {variant.name}": f"-o {module}",
    }
    for output, replacement in outputs.items():
        assert link.count(output) == 1, link
        link = link.replace(output, str(replacement))
    subprocess.run(compile_, cwd=variant.parent, check=True)
    subprocess.run(link, shell=True, cwd=variant.parent, check=True)
    stamp.write_text(digest.hexdigest())
    return module


# --- the process that runs them ------------------------------------------------------------------


def outcome(scenario: Callable[[], None], number: int) -> str:
    """How a scenario ends in a process of its own: with "", or with what was reported."""
    with tempfile.TemporaryFile("w+") as report:
        child = os.fork()
        if child == 0:
            os.dup2(report.fileno(), 2)
            status = 1
            try:
                library = ctypes.CDLL(str(emulated.emulator().path))
                ctypes.c_int.in_dll(library, SWITCH).value = number
                scenario()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        report.seek(0)
        return report.read() or "it ended without a word" if status else ""


def main() -> None:
    torch.set_num_threads(1)  # a forked process has no other threads
    sizes()  # once here: torch imports much when it is first used
    scenarios = {mutation.scenario.__name__: mutation.scenario for mutation in MUTATIONS}
    unchanged = {name: outcome(scenario, 0) for name, scenario in scenarios.items()}
    mutated = {m.name: outcome(m.scenario, i) for i, m in enumerate(MUTATIONS, start=1)}
    print(json.dumps({"unchanged": unchanged, "mutated": mutated}))


if __name__ == "__main__":
    main()
