"""`.ci/gpu-check`, without a GPU: its steps, limits, table and status in a checkout that is faked.

The checkout has programs in place of the build, the doctor, the tests and the benchmark, and PATH
has an nvidia-smi and a compute-sanitizer. What is run, and how, is what a GPU machine runs.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import exercise
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = ROOT / ".ci" / "gpu-check"

pytestmark = pytest.mark.skipif(not PROGRAM.is_file(), reason="only a checkout has .ci")

TORCH = '{"torch": "2.11.0+cu130", "cuda": "13.0", "gpu": "NVIDIA H100", "capability": "90"}'
NO_TORCH_GPU = '{"torch": "2.13.0+cpu", "cuda": null, "gpu": null, "capability": null}'

#: What stands in the checkout; a test replaces one of them to make a step fail.
FILES = {
    "setup.py": """
import os, pathlib, sys, sysconfig
folder = pathlib.Path(sys.argv[sys.argv.index("--build-lib") + 1], "fused_opt")
folder.mkdir(parents=True, exist_ok=True)
name = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
(folder / name).write_text(os.environ["FUSED_OPT_CUDA"] + os.environ["FUSED_OPT_CUDA_ARCHS"])
""",
    "fused_opt/__init__.py": "",
    "fused_opt/doctor.py": "import sys; print('fused_opt works here', sys.argv[1:])",
    "pytest.py": """
import os, sys
assert os.environ["FUSED_OPT_REQUIRE_GPU"] == "1"
assert sys.argv[sys.argv.index("-m") + 1] == "cuda"
print("=== 9 passed, 2 skipped in 0.01s ===")
""",
    "tests/exercise.py": "print('3 scenarios have the bits')",
    "benchmarks/__init__.py": "",
    "benchmarks/__main__.py": """
import pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
folder.mkdir(exist_ok=True)
if sys.argv[1] == "plot":
    assert pathlib.Path(sys.argv[2]).is_file()
    (folder / "bandwidth.png").write_text("")
else:
    (folder / "rows.csv").write_text("op,ms\\nsgd,1\\nema,2\\n")
""",
    "bin/nvidia-smi": """#!/bin/sh
case "$1" in
  --list-gpus) echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)' ;;
  *) echo 'Driver Version : 580' ;;
esac
""",
    "bin/compute-sanitizer": """#!/bin/sh
test "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 || exit 5
case "$*" in
  *racecheck*) echo '========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)' ;;
  *) echo '========= ERROR SUMMARY: 0 errors' ;;
esac
""",
}

STEPS = [
    *("machine", "build", "cubins", "doctor", "cuda tests", "exercise"),
    *("memcheck", "racecheck", "initcheck", "benchmark", "benchmark of models", "plots"),
]


def load() -> ModuleType:
    loader = importlib.machinery.SourceFileLoader("gpu_check", str(PROGRAM))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_check", loader))
    sys.modules["gpu_check"] = module  # where dataclasses look for their module
    loader.exec_module(module)
    return module


class Checkout:
    """A faked checkout, and the program that runs there."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.out = folder, folder / "results"
        for name, text in FILES.items():
            self.write(name, text)
        self.module = load()
        monkeypatch.setattr(self.module, "ROOT", folder)
        monkeypatch.setattr(self.module, "EXERCISE", folder / "tests" / "exercise.py")
        monkeypatch.setattr(self.module, "OPTIONAL", {"json": "JSON"})
        monkeypatch.setattr(self.module, "read_cubins", lambda module, archs: f"read for {archs}")
        monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("FUSED_OPT_CUDA_ARCHS", raising=False)
        self.monkeypatch = monkeypatch
        self.torch_says(TORCH)

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def torch_says(self, line: str) -> None:
        self.monkeypatch.setattr(self.module, "ASK_TORCH", f"print({line!r})")

    def has_no_gpu(self) -> None:
        self.torch_says(NO_TORCH_GPU)
        self.write("bin/nvidia-smi", "#!/bin/sh\necho 'No devices were found'\nexit 6\n")

    def run(self, *arguments: str) -> tuple[int, dict[str, tuple[str, str]]]:
        """Returns the exit status, and the result and detail of each row of summary.json."""
        status = self.module.main(["--out", str(self.out), *arguments])
        summary = json.loads((self.out / "summary.json").read_text())
        assert summary["exit_status"] == status
        return status, {row["step"]: (row["result"], row["detail"]) for row in summary["steps"]}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    return Checkout(tmp_path, monkeypatch)


# ---- On a GPU ------------------------------------------------------------------------------------


def test_everything_runs_in_order_and_leaves_its_results(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    status, rows = checkout.run()
    assert status == 0
    assert list(rows) == STEPS
    assert {result for result, _ in rows.values()} == {"ok"}
    assert rows["cuda tests"][1] == "9 passed, 2 skipped in 0.01s"
    assert rows["cubins"][1] == "read for ['90']"
    assert rows["plots"][1] == "2 plots, beside the rows"
    assert "--require-gpu" in rows["doctor"][1]
    logs = ("build", "doctor", "tests", "memcheck", "nvidia-smi", "packages", "environment")
    for name in (*(f"{log}.txt" for log in logs), "summary.txt", "benchmark-of-models/rows.csv"):
        assert (checkout.out / name).is_file(), name
    assert [line.split("  ")[0] for line in table(checkout)[1:]] == STEPS
    assert "everything is in" in capsys.readouterr().out


def table(checkout: Checkout) -> list[str]:
    return (checkout.out / "summary.txt").read_text().splitlines()


def test_the_build_is_in_place_for_the_gpu_and_make_test_builds_again(checkout: Checkout) -> None:
    checkout.write(".venv/.package-installed", "")
    assert checkout.run()[0] == 0
    (module,) = (checkout.folder / "fused_opt").glob("_C*.so")
    assert module.read_text() == "190"
    assert not (checkout.folder / ".venv" / ".package-installed").exists()


def test_architectures_that_are_named_are_built(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FUSED_OPT_CUDA_ARCHS", "80;90")
    assert checkout.run()[1]["cubins"] == ("ok", "read for ['80', '90']")


@pytest.mark.parametrize(
    ("file", "step"),
    [
        ("fused_opt/doctor.py", "doctor"),
        ("pytest.py", "cuda tests"),
        ("benchmarks/__main__.py", "benchmark"),
    ],
)
def test_a_step_that_fails_is_told_and_the_others_still_run(
    checkout: Checkout, file: str, step: str
) -> None:
    checkout.write(file, "print('7 of them went wrong'); raise SystemExit(4)")
    status, rows = checkout.run()
    assert status == 1
    assert list(rows) == STEPS
    result, detail = rows[step]
    assert result == "failed"
    assert detail.startswith("exit status 4: 7 of them went wrong; see ")
    assert rows["memcheck"][0] == "ok"


def test_nothing_runs_on_a_module_that_was_not_built(checkout: Checkout) -> None:
    checkout.write("setup.py", "raise SystemExit('fused_opt: `pip install ninja` provides it')")
    status, rows = checkout.run()
    assert status == 1
    assert list(rows) == ["machine", "build"]
    assert "`pip install ninja` provides it" in rows["build"][1]


def test_an_exercise_that_fails_is_not_run_under_the_sanitizers(checkout: Checkout) -> None:
    checkout.write("tests/exercise.py", "raise SystemExit('not the bits')")
    status, rows = checkout.run()
    assert status == 1
    assert rows["exercise"][0] == "failed"
    assert "memcheck" not in rows
    assert rows["plots"][0] == "ok"


def test_a_finding_of_a_sanitizer_fails_and_a_tool_that_refuses_the_gpu_does_not(
    checkout: Checkout,
) -> None:
    checkout.write(
        "bin/compute-sanitizer",
        """#!/bin/sh
case "$*" in
  *racecheck*) echo 'RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)'; exit 9 ;;
  *initcheck*) echo 'Error: Device not supported'; echo 'ERROR SUMMARY: 1 error'; exit 255 ;;
  *) echo 'Invalid __global__ read'; echo '========= ERROR SUMMARY: 3 errors'; exit 9 ;;
esac
""",
    )
    status, rows = checkout.run()
    assert status == 1
    assert rows["memcheck"] == ("failed", "ERROR SUMMARY: 3 errors; see memcheck.txt")
    assert rows["racecheck"][0] == "failed"
    assert rows["initcheck"][0] == "skipped"
    assert "Device not supported" in rows["initcheck"][1]
    checkout.write("bin/compute-sanitizer", "#!/bin/sh\necho 'Error: Device not supported'\n")
    assert checkout.run()[0] == 0


def test_what_a_sanitizer_says_is_read(checkout: Checkout) -> None:
    verdict, module = checkout.module.verdict, checkout.module
    assert verdict(0, "x\n===== ERROR SUMMARY: 0 errors\n", "log") == "ERROR SUMMARY: 0 errors"
    with pytest.raises(module.StepFailedError, match="1 error; see log"):
        verdict(9, "===== ERROR SUMMARY: 1 error\n", "log")
    with pytest.raises(module.StepFailedError, match="exit status 1: not the bits"):
        verdict(1, "===== ERROR SUMMARY: 0 errors\nnot the bits\n", "log")
    with pytest.raises(module.StepSkippedError, match="ends with 127 and no summary: not found"):
        verdict(127, "not found\n", "log")


def test_a_gpu_that_torch_does_not_see_is_a_failure(checkout: Checkout) -> None:
    checkout.torch_says(NO_TORCH_GPU)
    status, rows = checkout.run()
    assert status == 1
    expected = "nvidia-smi shows NVIDIA H100 80GB HBM3, and torch sees no GPU"
    assert rows["torch"] == ("failed", expected)


# ---- Packages and tools --------------------------------------------------------------------------


def test_packages_that_are_missing_are_named_and_no_failure(checkout: Checkout) -> None:
    checkout.monkeypatch.setattr(checkout.module, "OPTIONAL", {"no_such_package": "dreams"})
    status, rows = checkout.run()
    assert status == 0
    assert rows["package no_such_package"] == ("missing", "without it: no dreams")


def test_what_the_build_needs_is_named_with_the_cure(checkout: Checkout) -> None:
    needed = {"no_such_package": "no_such_package"}
    checkout.monkeypatch.setattr(checkout.module, "NEEDED_TO_BUILD", needed)
    status, rows = checkout.run()
    assert status == 1
    assert list(rows) == ["machine", "packages"]
    cure = f"{sys.executable} -m pip install no_such_package"
    assert rows["packages"] == ("failed", f"needed and missing: no_such_package ({cure})")


def test_kernels_that_nothing_can_read_are_a_failure_with_the_cure(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load()
    monkeypatch.setattr(module.cubins, "find_cuobjdump", lambda: None)
    with pytest.raises(module.StepFailedError, match="pip install nvidia-cuda-cuobjdump"):
        module.read_cubins(Path("_C.so"), ["90"])


def test_kernels_are_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    module = load()
    kernels = [module.cubins.Kernel("90", kind, 0, 0) for kind in module.cubins.KINDS]
    monkeypatch.setattr(module.cubins, "find_cuobjdump", lambda: "cuobjdump")
    monkeypatch.setattr(module.cubins, "architectures", lambda *_: (["90"], ["90"]))
    monkeypatch.setattr(module.cubins, "kernels", lambda *_: kernels)
    expected = "4 kernels for sm_90: stack frame 0, spills 0"
    assert module.read_cubins(Path("_C.so"), ["90"]) == expected
    with pytest.raises(module.StepFailedError, match="has \\['90'\\], and not \\['80'\\]"):
        module.read_cubins(Path("_C.so"), ["80"])
    kernels[0] = kernels[0]._replace(stack=16)
    with pytest.raises(module.StepFailedError, match=r"1 problems: sm_90 .*stack frame 16"):
        module.read_cubins(Path("_C.so"), ["90"])


def test_the_table_needs_no_rich(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    checkout.run()
    output = capsys.readouterr().out
    assert "\n".join(table(checkout)) in output
    assert table(checkout)[0].split() == ["step", "result", "seconds", "detail"]


@pytest.mark.slow
def test_gpu_tests_are_collected_without_the_packages_that_a_gpu_machine_may_lack() -> None:
    packages = "expecttest higher torch_ema ema_pytorch lightning pytorch_lightning hypothesis "
    packages += "matplotlib rich typer sklearn"
    code = f"""
import importlib.machinery, sys
finder = importlib.machinery.PathFinder
find = finder.find_spec
class Hiding:  # no function: pytest keeps it in a class, where that would become a method
    def __call__(self, name, *rest):
        return None if name.partition(".")[0] in {packages.split()} else find(name, *rest)
finder.find_spec = Hiding()
import pytest
options = ["-p", "no:cacheprovider", "--override-ini=addopts=", "-q", "--collect-only"]
sys.exit(pytest.main([*options, "-m", "cuda", "tests"]))
"""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # pytest finds its plugins, hypothesis, itself.
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    for file in ("test_cuda", "test_higher", "test_capturable", "test_clip"):
        assert f"tests/{file}.py::" in result.stdout


# ---- Time ----------------------------------------------------------------------------------------


def test_what_takes_too_long_is_ended_with_all_that_it_started(checkout: Checkout) -> None:
    code = "import os, subprocess, time; subprocess.Popen(['sleep', '60']); "
    code += "print(os.getpid(), flush=True); time.sleep(60)"
    check = checkout.module.Check(checkout.folder, 60, dict(os.environ))
    start = time.monotonic()
    status, output = check.run("log.txt", [sys.executable, "-c", code], 1.5)
    assert status is None
    assert time.monotonic() - start < 30
    assert ended(group=int(output))


def ended(group: int) -> bool:
    """Waits until a group has no process left; whoever inherited them must first bury them."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_what_the_time_does_not_reach_is_told(checkout: Checkout) -> None:
    # Of 16 s, 10 are kept for ending what was killed, and 25 for the plots by the benchmark.
    status, rows = checkout.run("--minutes", str(22 / 60))
    assert status == 1  # The tests were not run.
    for step in ("cuda tests", "memcheck", "benchmark", "benchmark of models"):
        result, detail = rows[step]
        assert result == "skipped"
        assert detail.startswith("no time left: ")
    assert rows["plots"] == ("skipped", "nothing was measured")


def test_a_benchmark_that_is_stopped_keeps_its_rows_and_fails_nothing(checkout: Checkout) -> None:
    slow = FILES["benchmarks/__main__.py"] + "\nif '--quick' not in sys.argv:\n"
    checkout.write("benchmarks/__main__.py", slow + "    import time; time.sleep(60)\n")
    check = checkout.module.Check(checkout.folder, 60, dict(os.environ))
    name = "benchmark of models"
    assert not check.step(name, 2, lambda limit: checkout.module.benchmark(check, name, limit))
    (row,) = check.results
    assert row.result == "skipped"
    assert row.detail.startswith("stopped after 2 s with 2 rows")


def test_tests_that_are_not_done_in_time_are_a_failure(checkout: Checkout) -> None:
    checkout.write("pytest.py", "import time; time.sleep(60)")
    check = checkout.module.Check(checkout.folder, 60, dict(os.environ))
    assert not check.step("t", 1, lambda limit: checkout.module.tests(check, limit))
    assert check.results[0].result == "failed"
    assert check.results[0].detail == "not done within 1 s; see tests.txt"


# ---- Without a GPU -------------------------------------------------------------------------------


def test_without_a_gpu_it_builds_beside_the_package_and_ends_with_3(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout.has_no_gpu()
    status, rows = checkout.run()
    assert status == 3
    assert list(rows) == ["machine", "build", "cubins", "GPU"]
    assert rows["cubins"] == ("ok", "read for ['90']")
    assert capsys.readouterr().out.splitlines()[-1] == "no GPU"
    assert list((checkout.folder / "fused_opt").glob("_C*")) == []
    (module,) = (checkout.folder / "build" / "gpu-check" / "lib" / "fused_opt").iterdir()
    assert module.read_text() == "190"


def test_without_a_gpu_a_build_that_fails_ends_with_1(
    checkout: Checkout, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout.has_no_gpu()
    checkout.write("setup.py", "raise SystemExit('no nvcc on this machine is usable')")
    status, rows = checkout.run()
    assert status == 1
    assert rows["build"][0] == "failed"
    assert "no nvcc on this machine is usable" in rows["build"][1]
    assert capsys.readouterr().out.splitlines()[-1] != "no GPU"


def test_without_a_gpu_kernels_that_spill_end_with_1(checkout: Checkout) -> None:
    def spilled(module: Path, archs: list[str]) -> str:
        raise checkout.module.StepFailedError("sm_90 step: stack frame 8")

    checkout.has_no_gpu()
    checkout.monkeypatch.setattr(checkout.module, "read_cubins", spilled)
    status, rows = checkout.run()
    assert status == 1
    assert rows["cubins"] == ("failed", "sm_90 step: stack frame 8")


# ---- The exercise --------------------------------------------------------------------------------


def test_the_exercise_of_the_sanitizers_runs() -> None:
    result = subprocess.run(
        [sys.executable, exercise.__file__, "cpu"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    count = len(exercise.SCENARIOS)
    assert result.stdout.splitlines()[-1] == f"{count} scenarios have the CPU's bits on cpu"


def test_the_exercise_sees_a_bit_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter([0.0, -0.0])
    scenario = lambda device: [torch.ones(3), torch.full((2,), next(runs))]  # noqa: E731
    assert exercise.differences(scenario, torch.device("cpu")) == 1
    runs = iter([0.0, -0.0])
    monkeypatch.setattr(exercise, "SCENARIOS", {"signs": scenario})
    monkeypatch.setattr(sys, "argv", ["exercise.py", "cpu"])
    assert exercise.main() == 1
