"""Runs torch's own ``test/test_optim.py`` with our classes in the place of torch's.

``python tests/upstream/run.py /path/to/pytorch``, or ``make test-upstream TORCH_SRC=...``, takes
the sources of the torch that is installed. The tests run twice, with torch's classes and with ours,
so that what fails here in any case is no difference. What differs is compared with
``expected_differences.py``. Exits with 0 if they agree, 1 if they do not, and 2 if the tests do not
run. Without sources, or without expecttest, which torch's tests import, it only says so.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import torch
from expected_differences import EXPECTED_DIFFERENCES

HERE = Path(__file__).resolve().parent
TESTS = "test_optim.py"

#: By test: its outcome, and the first line of what it says.
Outcomes = dict[str, dict[str, str]]


class Difference(NamedTuple):
    """A test that ends differently with our classes."""

    name: str
    with_torch: str
    with_ours: str
    message: str


def run_tests(tests: Path, classes: str) -> Outcomes:
    """Runs the tests with the classes of "torch" or "fused_opt"; nothing if they do not finish."""
    print(f"fused_opt: {tests / TESTS} with the classes of {classes}", flush=True)
    # The checkout's fused_opt; beside an installed package there is none.
    path = [HERE, tests, HERE.parents[1], os.environ.get("PYTHONPATH", "")]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes.json"
        options = ["-q", "--no-header", "--tb=line", "-r", "", "--disable-warnings"]
        isolated = ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tests)]
        subprocess.run(
            [sys.executable, "-m", "pytest", *options, *isolated, "-p", "swap", TESTS],
            cwd=tests,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(str(part) for part in path if part != ""),
                "FUSED_OPT_UPSTREAM_CLASSES": classes,
                "FUSED_OPT_UPSTREAM_OUTCOMES": str(file),
            },
            check=False,
        )
        return json.loads(file.read_text()) if file.exists() else {}


def differences(with_torch: Outcomes, with_ours: Outcomes) -> list[Difference]:
    """The tests whose outcomes differ, or that ran only once."""
    absent = {"outcome": "absent", "message": ""}
    found = []
    for name in sorted(with_torch.keys() | with_ours.keys()):
        theirs, ours = with_torch.get(name, absent), with_ours.get(name, absent)
        if theirs["outcome"] != ours["outcome"]:
            message = ours["message"] or theirs["message"]
            found.append(Difference(name, theirs["outcome"], ours["outcome"], message))
    return found


def faults(found: list[Difference], expected: Mapping[str, str]) -> list[str]:
    """What is not as the list of expected differences says, in either direction."""
    lines = [
        f"unexpected: {d.name}: {d.with_torch} with torch, {d.with_ours} with ours: {d.message}"
        for d in found
        if not any(fnmatchcase(d.name, pattern) for pattern in expected)
    ]
    lines += [
        f"expected, but does not occur: {pattern}"
        for pattern in expected
        if not any(fnmatchcase(d.name, pattern) for d in found)
    ]
    return lines


def warn_of_another_release(source: Path) -> None:
    """Tests of another release may ask for what the installed torch does not do, or no longer."""
    file = source / "version.txt"
    of_source = file.read_text().strip() if file.exists() else "unknown"
    if of_source.split(".")[:2] != torch.__version__.split(".")[:2]:
        print(
            f"fused_opt: warning: the sources in {source} are of torch {of_source}, and "
            f"{torch.__version__} is installed; tests may fail with either's classes",
            flush=True,
        )


def reason_to_skip(source: str) -> str | None:
    """What is missing to run the tests at all."""
    if not source:
        return "no sources of torch were given; name a checkout with TORCH_SRC=/path/to/pytorch"
    if importlib.util.find_spec("expecttest") is None:
        return "expecttest is not installed, which torch's tests import"
    return None


def main(source: str) -> int:
    """Runs everything; returns the exit status."""
    skipped = reason_to_skip(source)
    if skipped is not None:
        print(f"fused_opt: skipped: {skipped}")
        return 0
    tests = Path(source).resolve() / "test"
    if not (tests / TESTS).exists():
        print(f"fused_opt: there is no {tests / TESTS}", file=sys.stderr)
        return 2
    warn_of_another_release(tests.parent)
    with_torch, with_ours = (run_tests(tests, classes) for classes in ("torch", "fused_opt"))
    if not (with_torch and with_ours):
        print("fused_opt: the tests did not run", file=sys.stderr)
        return 2
    found = differences(with_torch, with_ours)
    for classes, outcomes in (("torch", with_torch), ("fused_opt", with_ours)):
        counts = Counter(each["outcome"] for each in outcomes.values())
        print(f"{classes:10}", ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
    wrong = faults(found, EXPECTED_DIFFERENCES)
    print(f"{len(found)} tests differ, {len(wrong)} not as expected", *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
