"""The test files that exercise the compiled module, run on one of its variants.

.ci/sanitize and .ci/coverage run them. Files are shared out among processes of pytest here, and not
by a plugin: a worker of pytest-xdist ends without what counts lines having written its numbers.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import native_variants

TESTS = Path(__file__).resolve().parent

#: What runs natively on the CPU. The other files start compilers, or are about Python alone.
SUITES = tuple(
    f"test_{name}.py"
    for name in (
        *("amp", "averages", "capturable", "checkpoint", "clip", "differentiable", "dtypes"),
        *("ema", "ema_averages", "ema_formats", "errors", "functional", "masters", "offload"),
        *("polyak", "post_hoc", "properties", "rounding", "schedules", "sgd", "swa_utils"),
        *("target_network", "torch_harness"),
    )
)

#: One of each kind of kernel: what is worth running on every ISA level.
CORE = tuple(f"test_{name}.py" for name in ("clip", "dtypes", "functional", "masters", "rounding"))

#: Tests of very many steps or numbers, which reach no line and no address that others do not.
LONG = (
    *("small_steps_reach", "no_update_is_lost", "numbers_of", "every_float_is_split"),
    *("over_a_thousand_steps", "by_its_place_in_memory_alone"),
)


@dataclass
class Outcome:
    """What processes of pytest said, together."""

    passed: int = 0
    failed: bool = False
    seconds: float = 0
    output: str = ""


def shares(files: Sequence[str], jobs: int) -> list[list[str]]:
    """The files in about as many equal parts, by their length."""
    parts: list[list[str]] = [[] for _ in range(jobs)]
    lengths = [0] * jobs
    for length, name in sorted(((TESTS / name).stat().st_size, name) for name in files)[::-1]:
        least = lengths.index(min(lengths))
        parts[least].append(name)
        lengths[least] += length
    return [part for part in parts if part]


def run(
    variant: str,
    files: Sequence[str],
    jobs: int,
    environ: Mapping[str, str] | None = None,
    variable: str = native_variants.NATIVE,
) -> Outcome:
    """Builds the variant and runs those files on it. What fails is in the output."""
    start = time.monotonic()
    environment = native_variants.environment(variant, native_variants.build(variant), variable)
    options = ["-q", "-p", "no:cacheprovider", "-m", "not cuda", "-k"]
    options.append(" and ".join(f"not {name}" for name in LONG))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *(f"tests/{name}" for name in part)],
            cwd=native_variants.ROOT,
            env={**environment, "PYTHONPATH": _path(), **(environ or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for part in shares(files, jobs)
    ]
    outcome = Outcome()
    for process in processes:
        output, _ = process.communicate()
        outcome.output += output
        outcome.failed |= process.returncode != 0
        passed = re.findall(r"^(?:.*\D)?(\d+) passed", output, re.M)
        outcome.passed += int(passed[-1]) if passed else 0
        outcome.failed |= not passed
    outcome.seconds = time.monotonic() - start
    return outcome


def _path() -> str:
    """The checkout before whatever is installed."""
    entries = [str(native_variants.ROOT), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(entry for entry in entries if entry)
