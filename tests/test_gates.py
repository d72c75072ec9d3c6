"""`make coverage` and `make sanitize`: what they run, and that they fail where they should."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import native_suites
import native_variants
import pytest

CI = native_variants.ROOT / ".ci"

pytestmark = pytest.mark.skipif(not CI.is_dir(), reason="only a checkout has .ci")


def load(name: str) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(f"gate_{name}", str(CI / name))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module  # where dataclasses look for their module
    loader.exec_module(module)
    return module


def test_the_files_are_there_and_each_is_run_once() -> None:
    for files in (native_suites.SUITES, native_suites.CORE):
        assert all((native_suites.TESTS / name).is_file() for name in files)
        for jobs in (1, 2, 3, 40):
            parts = native_suites.shares(files, jobs)
            assert sorted(name for part in parts for name in part) == sorted(files)
            assert len(parts) == min(jobs, len(files))


@pytest.fixture
def suites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of test files that run on no variant at all."""
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(native_suites, "TESTS", tmp_path / "tests")
    monkeypatch.setattr(native_variants, "ROOT", tmp_path)
    monkeypatch.setattr(native_variants, "build", lambda name: tmp_path / name)
    monkeypatch.setattr(native_variants, "environment", lambda name, module, variable: {})
    return tmp_path / "tests"


@pytest.mark.parametrize(
    ("text", "failed", "passed"),
    [
        ("def test_a(): pass\ndef test_numbers_of_all(): 1 / 0\n", False, 2),
        ("def test_a(): 1 / 0\n", True, 1),
        ("import os; os._exit(0)\n", True, 1),  # It ended before it said anything.
    ],
)
def test_a_process_that_fails_or_dies_is_a_failure(
    suites: Path, text: str, failed: bool, passed: int
) -> None:
    (suites / "test_one.py").write_text("def test_b(): pass\n")
    (suites / "test_two.py").write_text(text)
    outcome = native_suites.run("asan", ["test_one.py", "test_two.py"], 2)
    assert (outcome.failed, outcome.passed) == (failed, passed)


def test_a_part_below_the_limit_fails_and_its_file_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    coverage = load("coverage")
    files = {
        "fused_opt/sgd.py": coverage.Lines(100, 95),
        "csrc/rules/sgd.h": coverage.Lines(10, 10),
        "csrc/cpu/kernels.cpp": coverage.Lines(100, 95),
        "csrc/plan.cpp": coverage.Lines(100, 99),
    }
    assert coverage.print_table(files)
    capsys.readouterr()
    assert not coverage.print_table(files | {"csrc/cpu/dtypes.h": coverage.Lines(2, 1)})
    below = [line for line in capsys.readouterr().out.splitlines() if "below 95 %" in line]
    assert [line.split()[0] for line in below] == ["csrc/cpu/"]


@pytest.mark.parametrize(
    ("output", "complaint", "status", "finding"),
    [
        ("60 cases on baseline: 0 with other bits than one thread's\n", "", 0, ""),
        ("60 cases on baseline: 1 with other bits than one thread's\n", "", 1, "see above"),
        (
            "60 cases on baseline: 0 with other bits than one thread's\n",
            "data race",
            66,
            "see above",
        ),
        ("", "unexpected memory mapping", 66, "see above"),
    ],
)
def test_a_race_or_another_bit_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, output: str, complaint: str, status: int, finding: str
) -> None:
    sanitize = load("sanitize")

    def run(command: list[str], **options: Any) -> Any:
        planted = command[-1] == "--plant"
        answer = ("", "data race", 66) if planted else (output, complaint, status)
        return type(
            "Result", (), dict(zip(("stdout", "stderr", "returncode"), answer, strict=True))
        )

    monkeypatch.setattr(sanitize, "build_races", lambda: Path("races"))
    monkeypatch.setattr(sanitize.subprocess, "run", run)
    races, planted = sanitize.look_for_races()
    assert races.finding.endswith(finding)
    assert bool(races.finding) == bool(finding)
    assert planted.finding == ""


def test_a_planted_race_that_is_not_reported_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    sanitize = load("sanitize")
    blind = type("Result", (), {"stdout": "", "stderr": "", "returncode": 0})
    monkeypatch.setattr(sanitize, "build_races", lambda: Path("races"))
    monkeypatch.setattr(sanitize.subprocess, "run", lambda *_, **__: blind)
    _, planted = sanitize.look_for_races()
    assert planted.finding == "the planted race was not reported"
