"""The doctor: what it sees on healthy and broken machines, what it makes of it and prints."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fused_opt
from fused_opt import _C, _toolchain, doctor
from fused_opt._doctor_facts import (
    Build,
    Compiler,
    Driver,
    Facts,
    Fault,
    Gpu,
    Module,
    Package,
    Program,
    Python,
    Step,
    Torch,
)
from fused_opt._doctor_findings import build_command, diagnose
from fused_opt._doctor_report import Report, Style, render

PACKAGE = Path(doctor.__file__).parent
FILES = sorted(PACKAGE.glob("*doctor*.py"))
MODULE_NAME = Path(_C.__file__).name
RIGHT = [0.625, 3.0, 1.65625]

# ---- A machine of plain data ---------------------------------------------------------------------

HEALTHY_NVCC = Compiler(
    path="/usr/local/cuda/bin/nvcc",
    source="/usr/local/cuda",
    explicit=False,
    release="12.8",
    tools=[Program("ptxas", "/usr/local/cuda/bin/ptxas", "12.8")],
    host_compiler="g++ 12.2.0",
    default_arch=52,
    archs=[50, 70, 75, 80, 86, 89, 90, 100, 101, 120],
    problem=None,
    warnings=[],
)
BROKEN_NVCC = dataclasses.replace(
    HEALTHY_NVCC,
    path="/usr/bin/nvcc",
    source="PATH",
    release="12.1",
    tools=[Program("ptxas", "/usr/bin/ptxas", "11.8")],
    problem="mixed or broken toolkit: it runs /usr/bin/ptxas (CUDA 11.8). Set FUSED_OPT_NVCC.",
)
MODULE = Module(
    path="/site/fused_opt/_C.cpython-311.so",
    version="0.1.0",
    cuda_version="12.8",
    cubins=[80, 90],
    ptx=[80, 90],
    cpu_isa="x86-64-v3",
    cpu_isas=["baseline", "x86-64-v3"],
    oldest_driver="12.1",
    oldest_driver_branch="R530",
)
CPU_MODULE = dataclasses.replace(
    MODULE, cuda_version=None, cubins=[], ptx=[], oldest_driver=None, oldest_driver_branch=None
)
MODULE_OF_13 = dataclasses.replace(
    MODULE, cuda_version="13.0", oldest_driver="13.0", oldest_driver_branch="R580"
)
H100 = Gpu("cuda:0", "NVIDIA H100", 90)
LAPTOP = Gpu("cuda:1", "NVIDIA RTX 2000", 75)
BLACKWELL = Gpu("cuda:1", "NVIDIA RTX 5090", 120)
STEP = Step("cpu", RIGHT, RIGHT)
GPU_STEP = Step("cuda:0", RIGHT, RIGHT)


def machine(**changes: Any) -> Facts:
    """A healthy machine with an H100 and an installed wheel, but for the changes."""
    facts = Facts(
        python=Python("3.11.7", "/usr/bin/python3", "linux x86_64"),
        package=Package("0.1.0", "/site/fused_opt", None),
        compilers=[HEALTHY_NVCC],
        build=Build("/usr/local/cuda/bin/nvcc", HEALTHY_NVCC.archs, [75, 80, 90], [75, 90]),
        programs=[
            Program("C++", "/usr/bin/c++", "12.2.0"),
            Program("Python.h", "/usr/include/python3.11/Python.h", "3.11.7"),
            Program("cmake", "/usr/bin/cmake", "3.31.2"),
            Program("ninja", "/usr/bin/ninja", "1.11.1"),
        ],
        module=MODULE,
        torch=Torch("2.13.0+cu128", "12.8", gpus=1),
        driver=Driver("12.4", devices=True),
        gpus=[H100],
        steps=[STEP, GPU_STEP],
    )
    facts = dataclasses.replace(facts, **changes)
    gpus = [doctor.judge(gpu, facts.module, facts.driver) for gpu in facts.gpus]
    return dataclasses.replace(facts, gpus=gpus)


def without_gpu(**changes: Any) -> Facts:
    """A healthy machine that has neither GPU nor driver."""
    nothing: dict[str, Any] = {"gpus": [], "driver": Driver(), "steps": [STEP]}
    return machine(**{**nothing, "torch": Torch("2.13.0+cpu"), **changes})


def levels(facts: Facts, require_gpu: bool = False) -> list[tuple[str, str]]:
    return [(found.level, found.subject) for found in diagnose(facts, require_gpu)]


def text_of(facts: Facts, require_gpu: bool = False, **style: Any) -> str:
    return render(Report(facts, diagnose(facts, require_gpu)), Style(**style))


# ---- No problem ----------------------------------------------------------------------------------

HEALTHY = {
    "gpu": machine(),
    "no gpu and no driver": without_gpu(),
    "a driver and no gpu": without_gpu(driver=Driver("12.4", devices=True)),
    "no gpu and a driver too old for the module": without_gpu(driver=Driver("11.4")),
    "no nvcc": machine(compilers=[], build=Build()),
    "a broken nvcc beside the chosen one": machine(compilers=[BROKEN_NVCC, HEALTHY_NVCC]),
    "no compiler at all": machine(programs=[Program("C++", None, None)], compilers=[]),
    "a CPU-only module without a gpu": without_gpu(module=CPU_MODULE),
    "the driver of a newer major": machine(driver=Driver("13.0", devices=True)),
    "the oldest driver": machine(driver=Driver("12.1", devices=True)),
    "PTX that the driver understands": machine(
        gpus=[H100, BLACKWELL],
        torch=Torch("2.13.0+cu128", "12.8", gpus=2),
        driver=Driver("12.8", devices=True),
    ),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_found_on_a_healthy_machine(name: str) -> None:
    assert diagnose(HEALTHY[name]) == []
    assert (
        text_of(HEALTHY[name]).splitlines()[-1].startswith("✓ Healthy: fused_opt runs on this CPU")
    )


def test_the_last_line_says_where_it_runs() -> None:
    def last(facts: Facts) -> str:
        return text_of(facts).splitlines()[-1]

    assert last(machine()) == "✓ Healthy: fused_opt runs on this CPU (x86-64-v3) and cuda:0"
    assert last(without_gpu()).endswith("this CPU (x86-64-v3); there is no GPU here")
    idle = machine(torch=Torch("2.13.0+cpu"), steps=[STEP])
    assert last(idle).endswith("this CPU (x86-64-v3); torch uses no GPU here")


# ---- Each problem, its message and its cure ------------------------------------------------------

REBUILD = (
    "in the folder of fused_opt's source code, which holds setup.py, run "
    r"FUSED_OPT_CUDA=1 FUSED_OPT_CUDA_ARCHS={} .*pip install --force-reinstall --no-deps \.$"
)

#: The facts, the subjects of the problems, and what the first one's message and cure must match.
PROBLEMS: dict[str, tuple[Facts, list[str], str, str]] = {
    "a Python that is too old": (
        machine(python=Python("3.9.2", "/usr/bin/python3", "linux x86_64")),
        ["python"],
        r"fused_opt needs Python 3\.10 or newer, and /usr/bin/python3 is 3\.9\.2\.",
        r"^Use Python 3\.10 or newer$",
    ),
    "no torch": (
        without_gpu(torch=Torch(error="it is not installed"), steps=[]),
        ["torch"],
        r"torch cannot be imported: it is not installed\.",
        r"^Install torch: .*pip install 'torch>=2\.10'$",
    ),
    "a torch that does not load": (
        without_gpu(torch=Torch(error="OSError: libcudart.so.12: cannot open"), steps=[]),
        ["torch"],
        r"torch cannot be imported: OSError: libcudart\.so\.12: cannot open\.",
        r"^Repair torch until `.* -c 'import torch'` works$",
    ),
    "a torch too new for the driver": (
        machine(torch=Torch("2.13.0+cu130", "13.0", gpus=0), steps=[STEP]),
        ["torch"],
        r"torch 2\.13\.0\+cu130, built for CUDA 13\.0, can use 0 of 1 GPU \(NVIDIA H100\), with a "
        r"driver for CUDA 12\.4\.",
        r"^Update the NVIDIA driver, or install a torch for CUDA 12\.4 or older$",
    ),
    "no module": (
        machine(module=Module(error="/site/fused_opt has no compiled module"), steps=[]),
        ["module"],
        r"^/site/fused_opt has no compiled module\.$",
        r"^Build the module: in the folder .* setup\.py, run .*pip install .* \.$",
    ),
    "no module in a source tree": (
        machine(
            module=Module(error="/my src/fused_opt has no compiled module"),
            package=Package("0.1.0", "/my src/fused_opt", "/my src"),
            steps=[],
        ),
        ["module"],
        r"^/my src/fused_opt has no compiled module\.$",
        r"^Build the module: .*pip install -e '/my src'$",
    ),
    "a module hidden by a source tree": (
        machine(
            module=Module(error="/src/fused_opt has no compiled module", hidden="/site/fused_opt"),
            package=Package("0.1.0", "/src/fused_opt", "/src"),
            steps=[],
        ),
        ["module"],
        r"^/src/fused_opt has no compiled module, and hides /site/fused_opt, which has one\.$",
        r"^Start Python in another folder, or build the module here: .*pip install -e /src$",
    ),
    "a module that does not load": (
        machine(module=Module("/site/fused_opt/_C.so", "invalid ELF header"), steps=[]),
        ["module"],
        r"^/site/fused_opt/_C\.so cannot be imported: invalid ELF header\.$",
        r"^Build the module on this machine: ",
    ),
    "no OpenMP library": (
        machine(module=Module("/_C.so", "libgomp.so.1: cannot open shared object"), steps=[]),
        ["module"],
        r"^/_C\.so cannot be imported: libgomp\.so\.1: cannot open shared object\.$",
        r"apt install libgomp1, or dnf install libgomp$",
    ),
    "a module of another version": (
        machine(module=dataclasses.replace(MODULE, version="0.0.9")),
        ["module"],
        r"^The compiled module is of fused_opt 0\.0\.9, and the Python files .* are of 0\.1\.0\.$",
        r"^Build the module again: ",
    ),
    "a module of another folder": (
        machine(module=dataclasses.replace(MODULE, path="/src/fused_opt/_C.so")),
        ["module"],
        r"^/site/fused_opt has no compiled module, and Python takes /src/fused_opt/_C\.so for it\.",
        r"^Build the module here: ",
    ),
    "a CPU-only module beside a GPU": (
        machine(module=CPU_MODULE, steps=[STEP, Step("cuda:0", RIGHT, error="no kernels")]),
        ["module"],
        r"^The compiled module is CPU-only, and this machine has 1 GPU \(NVIDIA H100\)\.$",
        "^Rebuild the module: " + REBUILD.format("90"),
    ),
    "a CPU-only module, a GPU and no nvcc": (
        machine(module=CPU_MODULE, compilers=[], build=Build(), steps=[STEP]),
        ["nvcc", "module"],
        r"^CUDA kernels have to be built for 1 GPU \(NVIDIA H100\), and there is no nvcc\.$",
        r"^Install the CUDA toolkit, 12\.1 or newer, or set FUSED_OPT_NVCC to its nvcc$",
    ),
    "a module without code for the GPU": (
        machine(
            gpus=[H100, LAPTOP],
            torch=Torch("2.13.0+cu128", "12.8", gpus=2),
            steps=[STEP, GPU_STEP, Step("cuda:1", RIGHT, error="no kernel image")],
        ),
        ["cuda:1"],
        r"^NVIDIA RTX 2000 \(cuda:1\) has compute capability 7\.5 and can run nothing of the "
        r"module, which has machine code 80 90 and PTX 80 90: the module has no code for it\.$",
        "^Rebuild the module: " + REBUILD.format("75,90"),
    ),
    "PTX that the driver does not understand": (
        machine(gpus=[H100, BLACKWELL], torch=Torch("2.13.0+cu128", "12.8", gpus=2)),
        ["cuda:1"],
        r"compute capability 12\.0 .* the driver is too old for the module's PTX, of CUDA 12\.8\.$",
        "^Rebuild the module: " + REBUILD.format("90,120"),
    ),
    "a GPU that the nvcc cannot build for": (
        machine(
            gpus=[BLACKWELL],
            build=Build("/opt/cuda-12.4/bin/nvcc", [75, 80, 90], [75, 80, 90], [75, 90]),
        ),
        ["cuda:1"],
        r"NVIDIA RTX 5090 \(cuda:1\)",
        r"^Set FUSED_OPT_NVCC to an nvcc of CUDA 12\.8 or newer, since /opt/cuda-12\.4/bin/nvcc "
        r"cannot build 120, and rebuild the module: in the folder .*FUSED_OPT_CUDA_ARCHS=120 ",
    ),
    "a GPU that is too old": (
        machine(gpus=[Gpu("cuda:0", "GeForce GTX 1080", 61)], steps=[STEP]),
        ["cuda:0"],
        r"^GeForce GTX 1080 has compute capability 6\.1, and fused_opt needs 7\.0 or newer\.$",
        r"^Hide cuda:0 with CUDA_VISIBLE_DEVICES, or use the CPU$",
    ),
    "a module too new for the driver": (
        machine(module=MODULE_OF_13, steps=[STEP, Step("cuda:0", RIGHT, error="driver")]),
        ["driver"],
        r"^The module, built with CUDA 13\.0, needs driver R580 \(CUDA 13\.0\) or newer; this one "
        r"is for CUDA 12\.4\.$",
        r"^Update the NVIDIA driver to R580, or set FUSED_OPT_NVCC to an nvcc of CUDA 12 and re",
    ),
    "a driver too old for any build": (
        machine(driver=Driver("11.4", devices=True)),
        ["driver"],
        r"needs driver R530 \(CUDA 12\.1\) or newer; this one is for CUDA 11\.4\.$",
        r"^Update the NVIDIA driver to R530$",
    ),
    "a driver without large kernel parameters": (
        machine(driver=Driver("12.0", devices=True)),
        ["driver"],
        r"needs driver R530 \(CUDA 12\.1\) or newer; this one, for CUDA 12\.0, refuses the kernel "
        r"parameters above 4 KB",
        r"^Update the NVIDIA driver to R530$",
    ),
    "a driver that does not start": (
        without_gpu(driver=Driver("12.4", "cuInit returns 803 (MISMATCH)", devices=True)),
        ["driver"],
        r"^The NVIDIA driver does not start: cuInit returns 803 \(MISMATCH\)\.$",
        r"^Make nvidia-smi work: reboot if the driver was just updated, else reinstall it$",
    ),
    "a step that fails on the CPU": (
        without_gpu(steps=[Step("cpu", RIGHT, error="AttributeError: no Plan")]),
        ["step on cpu"],
        r"^The step on cpu fails: AttributeError: no Plan\.$",
        r"^Build the module again: ",
    ),
    "a step that fails on a GPU": (
        machine(steps=[STEP, Step("cuda:0", RIGHT, error="out of memory. Free some")]),
        ["step on cuda:0"],
        r"^The step on cuda:0 fails: out of memory\. Free some$",
        r"^Do what the error of the step on cuda:0 says, above$",
    ),
    "a step that is wrong": (
        without_gpu(steps=[Step("cpu", RIGHT, [0.0, 3.0, 1.5])]),
        ["step on cpu"],
        r"^The step on cpu gives \[0\.0, 3\.0, 1\.5\], and \[0\.625, 3\.0, 1\.65625\] is right\.$",
        r"^Report this with the output of `python -m fused_opt\.doctor --json`$",
    ),
    "no module, no C++ compiler": (
        without_gpu(module=Module(error="none"), programs=[Program("C++", None, None)], steps=[]),
        ["C++", "module"],
        r"^The module has to be built, and a C\+\+ compiler is missing\.$",
        r"^Install a C\+\+ compiler: apt install g\+\+ \(on Debian and Ubuntu\)$",
    ),
    "no module, no header": (
        without_gpu(
            module=Module(error="none"), programs=[Program("Python.h", None, None)], steps=[]
        ),
        ["Python.h", "module"],
        r"^The module has to be built, and Python\.h is missing\.$",
        r"^Install Python\.h: apt install python3-dev \(on Debian and Ubuntu\)$",
    ),
    "no module, and a build that is refused": (
        without_gpu(
            module=Module(error="none"),
            build=Build(
                refusal="no nvcc is usable:\n  /a: too old.\nSet FUSED_OPT_NVCC to another."
            ),
            steps=[],
        ),
        ["nvcc", "module"],
        r"(?s)^A build would be refused here: no nvcc is usable:\n  /a: too old\.$",
        r"^Set FUSED_OPT_NVCC to another$",
    ),
    "a module that kills Python": (
        without_gpu(module=None, steps=[], faults=[Fault("module", "Python dies of SIGSEGV")]),
        ["module"],
        r"^Looking at the module fails: Python dies of SIGSEGV\.$",
        r"^Build the module again: ",
    ),
    "a module that kills Python, and no C++ compiler": (
        without_gpu(
            module=None,
            programs=[Program("C++", None, None)],
            steps=[],
            faults=[Fault("module", "Python dies of SIGSEGV")],
        ),
        ["C++", "module"],
        r"^The module has to be built, and a C\+\+ compiler is missing\.$",
        r"^Install a C\+\+ compiler: ",
    ),
    "a torch that kills Python": (
        without_gpu(torch=None, steps=[], faults=[Fault("torch", "Python dies of SIGILL")]),
        ["torch"],
        r"^Looking at the torch fails: Python dies of SIGILL\.$",
        r"^Reinstall torch$",
    ),
    "a driver that hangs": (
        without_gpu(driver=None, faults=[Fault("driver", "no answer within 300 s")]),
        ["driver"],
        r"^Looking at the driver fails: no answer within 300 s\.$",
        r"^Reinstall the NVIDIA driver, or reboot if it was just updated$",
    ),
    "a fault of the doctor's own": (
        without_gpu(compilers=[], faults=[Fault("nvcc", "KeyError: 'PATH'")]),
        ["nvcc"],
        r"^Looking at the nvcc fails: KeyError: 'PATH'\.$",
        r"^Report this with the output of `python -m fused_opt\.doctor --json`$",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_problem_is_named_with_its_cure(name: str) -> None:
    facts, subjects, message, cure = PROBLEMS[name]
    report = Report(facts, diagnose(facts))
    assert [problem.subject for problem in report.problems] == subjects
    assert re.search(message, report.problems[0].message), report.problems[0].message
    assert re.search(cure, report.problems[0].cure), report.problems[0].cure
    last_line = render(report, Style()).splitlines()[-1]
    assert last_line == f"✗ {report.advice}"
    assert report.problems[0].cure in last_line
    assert "\n" not in report.advice


def test_several_problems_are_counted_and_listed_with_their_cures() -> None:
    facts = without_gpu(torch=Torch(error="it is not installed"), module=Module(error="none"))
    text = text_of(facts)
    assert re.search(r"✗ 2 problems\. To begin with: Build the module: .* \.$", text)
    assert re.search(r"→ Build the module: .*\n.*\n +→ Install torch: ", text)


#: What is worth a line and does not change the exit status.
WARNINGS: dict[str, tuple[Facts, str, str]] = {
    "a torch without CUDA beside a GPU": (
        machine(torch=Torch("2.13.0+cpu"), steps=[STEP]),
        r"^torch 2\.13\.0\+cpu is built without CUDA and leaves 1 GPU \(NVIDIA H100\) idle\.$",
        r"^Install a torch with CUDA to make use of that$",
    ),
    "an old torch": (
        without_gpu(torch=Torch("2.9.1+cpu")),
        r"^fused_opt is made for torch 2\.10 or newer, and this is 2\.9\.1\+cpu\.$",
        r"^Update torch: .*pip install --upgrade 'torch>=2\.10'$",
    ),
    "a refused build beside a module that works": (
        machine(build=Build(refusal="FUSED_OPT_CUDA_ARCHS=9 is wrong. Write 90."), compilers=[]),
        r"^A build would be refused here: FUSED_OPT_CUDA_ARCHS=9 is wrong\.$",
        r"^Write 90$",
    ),
    "a refusal without a cure": (
        machine(build=Build(refusal="FUSED_OPT_CUDA is 0, 1 or auto, found 'yes'.")),
        r"^A build would be refused here: FUSED_OPT_CUDA is 0, 1 or auto, found 'yes'\.$",
        r"^Correct that variable$",
    ),
    "a driver that does not start where nothing expects one": (
        without_gpu(driver=Driver("12.4", "cuInit returns 999 (UNKNOWN)")),
        r"^The NVIDIA driver does not start: cuInit returns 999 \(UNKNOWN\)\.$",
        r"nvidia-smi",
    ),
    "a driver without its library": (
        without_gpu(driver=Driver(devices=True)),
        r"^The NVIDIA driver is loaded, and its library libcuda\.so\.1 is missing\.$",
        r"libnvidia-compute.*--gpus all",
    ),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_a_warning_is_no_problem(name: str) -> None:
    facts, message, cure = WARNINGS[name]
    (found,) = diagnose(facts)
    assert found.level == "warning"
    assert re.search(message, found.message), found.message
    assert re.search(cure, found.cure), found.cure
    text = text_of(facts)
    assert "Good to know" in text
    assert found.cure in text
    assert "✓ Healthy" in text.splitlines()[-1]


#: What --require-gpu alone makes a problem.
REQUIRED: dict[str, tuple[Facts, str, str]] = {
    "no driver": (
        without_gpu(),
        r"^A GPU is required, and there is no NVIDIA driver \(libcuda\.so\.1\)\.$",
        r"^Install the NVIDIA driver; start a container with its GPUs \(docker run --gpus all\)$",
    ),
    "no GPU": (
        without_gpu(driver=Driver("12.4", devices=True)),
        r"^A GPU is required, and the driver shows none\.$",
        r"^Check nvidia-smi and CUDA_VISIBLE_DEVICES",
    ),
    "hidden GPUs": (
        without_gpu(driver=Driver("12.4"), environment={"CUDA_VISIBLE_DEVICES": ""}),
        r"^A GPU is required, and the driver shows none \(CUDA_VISIBLE_DEVICES is ''\)\.$",
        r"^Check nvidia-smi and CUDA_VISIBLE_DEVICES",
    ),
    "a torch without CUDA": (
        machine(torch=Torch("2.13.0+cpu"), steps=[STEP]),
        r"^A GPU is required, and torch 2\.13\.0\+cpu is built without CUDA\.$",
        r"^Install a torch with CUDA$",
    ),
    "a driver without a device": (
        without_gpu(driver=Driver("12.4", "cuInit returns 999 (UNKNOWN)")),
        r"^A GPU is required, and the driver finds no device of its own\.$",
        r"^Make nvidia-smi work; ",
    ),
}


@pytest.mark.parametrize("name", REQUIRED)
def test_a_required_gpu_that_cannot_be_used_is_a_problem(name: str) -> None:
    facts, message, cure = REQUIRED[name]
    assert Report(facts, diagnose(facts)).problems == []
    (found,) = Report(facts, diagnose(facts, require_gpu=True)).problems
    assert re.search(message, found.message), found.message
    assert re.search(cure, found.cure), found.cure


def test_a_required_gpu_that_works_is_no_problem() -> None:
    assert diagnose(machine(), require_gpu=True) == []


# ---- What a GPU runs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "driver", "module", "expected"),
    [
        (90, "12.4", MODULE, "cubin"),
        (89, "12.4", MODULE, "cubin"),
        (90, "12.0", MODULE, "cubin"),
        (120, "12.8", MODULE, "ptx"),
        (120, "13.0", MODULE, "ptx"),
        (120, "12.4", MODULE, "the driver is too old for the module's PTX, of CUDA 12.8"),
        (75, "12.8", MODULE, "the module has no code for it"),
        (90, "12.8", MODULE_OF_13, "the driver is too old for the module"),
        (90, "12.8", CPU_MODULE, "the module is CPU-only"),
        (90, "12.8", Module(error="none"), "there is no module"),
        (90, "12.8", None, "there is no module"),
    ],
)
def test_what_a_gpu_runs(
    capability: int, driver: str, module: Module | None, expected: str
) -> None:
    gpu = doctor.judge(Gpu("cuda:0", "GPU", capability), module, Driver(driver))
    assert expected in (gpu.code, gpu.why_none)
    assert (gpu.code is None) != (gpu.why_none is None)
    verdicts = {"cubin": "runs native machine code", "ptx": "runs PTX that the driver compiles"}
    line = f"GPU, compute capability {capability // 10}.{capability % 10}: "
    line += verdicts.get(expected, f"runs nothing, for {expected}")
    assert line in text_of(
        machine(gpus=[Gpu("cuda:0", "GPU", capability)], module=module, driver=Driver(driver)),
        width=200,
    )


@pytest.mark.parametrize(
    ("capability", "release"),
    [
        (70, "CUDA 12"),
        (80, "CUDA 12.1 or newer"),
        (120, "CUDA 12.8 or newer"),
        (110, "CUDA 13.0 or newer"),
    ],
)
def test_an_nvcc_for_a_gpu_is_named(capability: int, release: str) -> None:
    facts = machine(
        gpus=[Gpu("cuda:0", "GPU", capability)],
        module=dataclasses.replace(MODULE, cubins=[], ptx=[]),
        build=Build("/nvcc", [61], [61], [61]),
    )
    (problem,) = diagnose(facts)
    assert problem.cure.startswith(f"Set FUSED_OPT_NVCC to an nvcc of {release}, since /nvcc")


def test_the_command_that_builds_suits_a_source_tree_and_a_wheel() -> None:
    assert build_command("/a b").endswith("pip install -e '/a b'")
    assert build_command("/src", [80, 90]).startswith(
        "FUSED_OPT_CUDA=1 FUSED_OPT_CUDA_ARCHS=80,90 "
    )
    assert build_command("/src", []).startswith("FUSED_OPT_CUDA=1 ")
    assert "FUSED_OPT" not in build_command("/src")
    for_a_wheel = build_command(None, [90])
    assert "which holds setup.py" in for_a_wheel
    assert for_a_wheel.endswith("pip install --force-reinstall --no-deps .")


# ---- Text and JSON -------------------------------------------------------------------------------

SHOWN = {**{name: row[0] for name, row in PROBLEMS.items()}, **HEALTHY}


@pytest.mark.parametrize("name", SHOWN)
def test_json_has_the_facts_and_all_that_the_text_shows(name: str) -> None:
    facts = SHOWN[name]
    report = Report(facts, diagnose(facts))
    content = json.loads(report.to_json())
    assert set(content) == {
        "healthy", "advice", "problems", "warnings", "python", "package", "environment",
        "compilers", "build", "programs", "module", "torch", "driver", "gpus", "steps", "faults",
    }  # fmt: skip
    assert content["healthy"] is (report.problems == [])
    assert content["problems"] == [dataclasses.asdict(found) for found in report.problems]
    assert [step.pop("passed") for step in content["steps"]] == [s.passed for s in facts.steps]
    for key, value in dataclasses.asdict(facts).items():
        assert content[key] == value

    everything = report.to_json()
    for word in render(report, Style()).split():
        fact = word.strip("(),;:.'`").replace("sm_", "")
        if re.search(r"\d|/", fact):
            assert fact in everything or fact.replace(".", "") in everything, fact


@pytest.mark.parametrize("width", [80, 120])
def test_rows_fit_the_terminal_and_are_aligned(width: int) -> None:
    text = text_of(machine(compilers=[BROKEN_NVCC, HEALTHY_NVCC]), width=width)
    *rows, last = text.splitlines()
    assert all(len(row) <= width for row in rows)
    assert last.startswith("✓ Healthy")
    values = [re.match(r"  \S \S+(?: \S+)*  +|  +", row) for row in rows if row.startswith("  ")]
    assert len({match.end() for match in values if match}) == 1


def test_the_text_shows_every_nvcc_and_the_chosen_one() -> None:
    text = text_of(machine(compilers=[BROKEN_NVCC, HEALTHY_NVCC]), width=200)
    assert re.search(
        r"! nvcc 12\.1 +/usr/bin/nvcc \(from PATH\)\n +ptxas 11\.8; sm_52 by default", text
    )
    assert "mixed or broken toolkit: it runs /usr/bin/ptxas (CUDA 11.8)." in text
    assert re.search(r"✓ nvcc 12\.8 +/usr/local/cuda/bin/nvcc \(from /usr/local/cuda\)", text)
    assert "would take /usr/local/cuda/bin/nvcc: machine code 75 80 90 and PTX 75 90" in text
    assert re.search(r"✓ C\+\+ +12\.2\.0, /usr/bin/c\+\+", text)
    assert re.search(r"✓ cmake +3\.31\.2, /usr/bin/cmake", text)
    assert re.search(r"✓ ninja +1\.11\.1, /usr/bin/ninja", text)


def test_the_text_shows_module_torch_driver_gpus_and_steps() -> None:
    text = text_of(machine(), width=200)
    assert re.search(r"✓ fused_opt\._C +0\.1\.0, /site/fused_opt/_C\.cpython-311\.so", text)
    assert re.search(r"CUDA kernels +CUDA 12\.8: machine code 80 90 and PTX 80 90", text)
    assert re.search(r"CPU loops +x86-64-v3 \(rather than baseline\)\n", text)
    assert re.search(r"✓ torch +2\.13\.0\+cu128, built for CUDA 12\.8, can use 1 GPU", text)
    assert "for CUDA 12.4; the oldest one for this module is R530, for CUDA 12.1" in text
    assert re.search(r"✓ cuda:0 +NVIDIA H100, compute capability 9\.0: runs native machine", text)
    assert re.search(r"✓ step on cpu +SGD with momentum and EMA on one element: exactly", text)
    assert re.search(r"✓ step on cuda:0 +SGD", text)


def test_warnings_of_a_compiler_are_shown() -> None:
    nvcc = dataclasses.replace(HEALTHY_NVCC, warnings=["what it builds cannot run here"])
    assert re.search(
        r"! nvcc 12\.8(.*\n)+? +what it builds cannot run here", text_of(machine(compilers=[nvcc]))
    )


def test_notes_of_a_build_are_shown_unless_a_compiler_has_them_already() -> None:
    nvcc = dataclasses.replace(HEALTHY_NVCC, warnings=["it ends at CUDA 12.4"])
    notes = [
        f"passed over /usr/bin/nvcc: {BROKEN_NVCC.problem}",
        "it ends at CUDA 12.4",
        "90a is 90",
    ]
    build = Build("/usr/local/cuda/bin/nvcc", [90], [90], [90], notes)
    text = text_of(machine(compilers=[BROKEN_NVCC, nvcc], build=build), width=200)
    assert re.search(r"would take .*machine code 90 and PTX 90\n +90a is 90\n", text)
    assert text.count("mixed or broken toolkit") == text.count("it ends at CUDA 12.4") == 1
    without = text_of(machine(build=Build(notes=["NO NVCC FOUND: set FUSED_OPT_NVCC"])))
    assert re.search(r"· a build +would have no CUDA kernels\n +NO NVCC FOUND", without)


def test_variables_that_matter_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = machine(environment={"CUDA_HOME": "/opt/cuda", "CUDAARCHS": "90"})
    assert re.search(r"· CUDA_HOME +/opt/cuda\n.* CUDAARCHS +90\n", text_of(facts))


class Terminal(io.StringIO):
    """A text stream that claims to be a terminal."""

    def __init__(self, terminal: bool = True, encoding: str = "utf-8") -> None:
        super().__init__()
        self._terminal = terminal
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize(
    ("stream", "environ", "colour"),
    [
        (Terminal(), {}, True),
        (Terminal(), {"NO_COLOR": ""}, True),  # The convention: set and not empty.
        (Terminal(), {"NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (Terminal(terminal=False), {}, False),
    ],
)
def test_colour_is_for_terminals_that_want_it(
    stream: Terminal, environ: dict[str, str], colour: bool
) -> None:
    style = Style.of(stream, environ)
    assert style.colour is colour
    text = render(Report(machine(), []), style)
    assert ("\x1b[32m✓\x1b[0m" in text) is colour
    assert ("\x1b" in text) is colour


def test_signs_are_ascii_where_the_stream_is() -> None:
    style = Style.of(Terminal(encoding="ascii"), {})
    facts = PROBLEMS["no module, no C++ compiler"][0]
    text = render(Report(facts, diagnose(facts)), style)
    assert text.isascii()
    assert "X fused_opt._C" in re.sub("\x1b.*?m", "", text)


def test_the_width_is_that_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, width in (("80", 80), ("20", 60), ("500", 120)):
        monkeypatch.setenv("COLUMNS", columns)
        assert Style.of(Terminal(), {}).width == width


# ---- The command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("json_", [False, True])
@pytest.mark.parametrize(
    ("facts", "options", "status"),
    [
        (machine(), [], 0),
        (machine(), ["--require-gpu"], 0),
        (without_gpu(), [], 0),
        (without_gpu(), ["--require-gpu"], 1),
        (machine(torch=Torch("2.13.0+cpu"), steps=[STEP]), [], 0),
        (machine(module=CPU_MODULE), [], 1),
    ],
)
def test_the_exit_status_is_1_if_there_is_a_problem(
    facts: Facts,
    options: list[str],
    status: int,
    json_: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda environ: facts)
    assert doctor.main([*options, *(["--json"] if json_ else [])]) == status
    printed = capsys.readouterr()
    assert printed.err == ""
    if json_:
        assert json.loads(printed.out)["healthy"] is (status == 0)
    else:
        assert printed.out.splitlines()[-1].startswith("✗" if status else "✓")


# ---- Looking -------------------------------------------------------------------------------------

SECTIONS = {
    "package": "look_at_package",
    "nvcc": "look_at_compilers",
    "build": "look_at_build",
    "programs": "look_at_programs",
    "probe": "start_probe",
}


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_that_crashes_hides_no_other(
    section: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = '{"starting": "torch"}\n{"seen": {"version": "2.13.0"}}\n'
    canned = [sys.executable, "-S", "-c", f"print({lines!r}, end='')"]
    monkeypatch.setattr(doctor, "start_probe", lambda: child_that_runs(canned))
    monkeypatch.setattr(_toolchain, "CUDA_ROOT_PARENT", tmp_path)

    def crash(*arguments: Any) -> None:
        raise KeyError("gone")

    monkeypatch.setattr(doctor, SECTIONS[section], crash)
    facts = doctor.examine({"PATH": str(tmp_path)})
    assert facts.faults == [Fault(section, "KeyError: 'gone'")]
    assert (facts.torch is None) is (section == "probe")
    assert (facts.build is None) is (section == "build")
    assert (facts.programs == []) is (section == "programs")
    assert (facts.package.version is None) is (section == "package")
    assert f"Looking at the {section} fails: KeyError: 'gone'." in text_of(facts)


def child_that_runs(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(code: str) -> tuple[dict[str, Any], list[Fault]]:
    faults: list[Fault] = []
    child = child_that_runs([sys.executable, "-S", "-c", code])
    return doctor.finish_probe(child, faults), faults


def test_a_probe_that_dies_is_a_fault_of_what_it_was_looking_at() -> None:
    seen, faults = finish(
        "import os\n"
        """print('{"starting": "torch"}\\n{"seen": 1}\\n{"starting": "module"}', flush=True)\n"""
        "os.kill(os.getpid(), 11)"
    )
    assert seen == {"torch": 1}
    assert faults == [Fault("module", "Python dies of SIGSEGV")]


def test_a_probe_that_fails_tells_its_last_line() -> None:
    assert finish("raise SystemExit('one\\nno memory')") == (
        {},
        [Fault("probe", "Python ends with status 1: no memory")],
    )


def test_a_probe_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 0.5)
    started = time.monotonic()
    seen, faults = finish(
        """print('{"starting": "driver"}', flush=True)\nimport time\ntime.sleep(20)"""
    )
    assert time.monotonic() - started < 15
    assert seen == {}
    assert faults == [Fault("driver", "no answer within 0.5 s")]


def test_a_step_is_taken_and_right(device: torch.device) -> None:
    step = doctor.take_step(str(device))
    assert step == Step(str(device), RIGHT, RIGHT)
    assert step.passed


def test_a_step_that_does_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = importlib.import_module("fused_opt.functional")
    monkeypatch.setattr(functional, "sgd_step_", lambda *args, **options: None)
    step = doctor.take_step("cpu")
    assert step.found == [1.0, 2.0, 2.0]
    assert not step.passed


def test_a_step_that_raises_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise RuntimeError("no kernel image\nand a long trace")

    monkeypatch.setattr(importlib.import_module("fused_opt.functional"), "sgd_step_", refuse)
    step = doctor.take_step("cpu")
    assert step.error == "no kernel image"
    assert not step.passed


def test_the_module_of_this_build_is_described() -> None:
    module, info = doctor.look_at_module(), fused_opt.build_info()
    assert module.error is None
    assert module.path == _C.__file__
    assert module.version == info["version"] == doctor.look_at_package().version
    assert module.cuda_version == info["cuda_version"]
    assert [str(arch) for arch in module.cubins] == info["cuda_archs"]
    assert [str(arch) for arch in module.ptx] == info["ptx_archs"]
    assert module.cpu_isa == info["cpu_isa"]
    assert module.cpu_isas == _C.cpu_isas()


@pytest.mark.parametrize(
    ("cuda_version", "oldest"),
    [
        (None, (None, None)),
        ("12.1", ("12.1", "R530")),
        ("12.8", ("12.1", "R530")),
        ("13.0", ("13.0", "R580")),
        ("14.2", ("14.0", None)),
    ],
)
def test_the_oldest_driver_follows_from_the_cuda_release(
    cuda_version: str | None,
    oldest: tuple[str | None, str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_C, "cuda_version", cuda_version)
    module = doctor.look_at_module()
    assert (module.oldest_driver, module.oldest_driver_branch) == oldest


def test_programs_are_found_with_their_versions(tmp_path: Path) -> None:
    write_script(tmp_path / "c++", "echo 'c++ (Debian 12.2.0-14) 12.3.1'")
    write_script(tmp_path / "my-cxx", "echo 'clang version 17.0.2'")
    programs = {
        program.name: program for program in doctor.look_at_programs({"PATH": str(tmp_path)})
    }
    assert programs["C++"] == Program("C++", str(tmp_path / "c++"), "12.3.1")
    named = doctor.look_at_programs({"PATH": str(tmp_path), "CXX": "my-cxx -O2"})[0]
    assert named == Program("C++", str(tmp_path / "my-cxx"), "17.0.2")
    missing = doctor.look_at_programs({"PATH": str(tmp_path / "none")})[0]
    assert missing == Program("C++", None, None)


def test_the_doctor_needs_only_the_standard_library_of_python_39() -> None:
    assert len(FILES) == 4
    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 9))
        names = {
            alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names
        }
        names |= {node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert names
        for name in names:
            assert name.split(".")[0] in sys.stdlib_module_names or re.fullmatch(
                r"fused_opt(\._doctor_\w+)?", name
            ), f"{file.name} imports {name}"


# ---- The whole, in a process of its own ----------------------------------------------------------


def write_script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


class Copy:
    """A copy of the package on a machine where nothing else is installed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.package = root / "tree" / "fused_opt"
        self.module = self.package / MODULE_NAME
        shutil.copytree(PACKAGE, self.package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        shutil.copy(_C.__file__, self.module)
        self.edit("_toolchain.py", 'Path("/usr/local")', f'Path("{root}/no_cuda")')
        (root / "bin").mkdir()
        write_script(root / "bin" / "c++", "echo 'c++ 12.2.0'")

    def edit(self, name: str, old: str, new: str) -> None:
        text = (self.package / name).read_text()
        assert old in text
        (self.package / name).write_text(text.replace(old, new))

    def torch(self, text: str) -> dict[str, str]:
        """Writes a torch, and returns the environment in which it is the one."""
        (self.root / "torch.py").write_text(text)
        return {"PYTHONPATH": str(self.root)}

    def facts(self, *options: str, **environ: str) -> dict[str, Any]:
        """Returns the JSON with a torch that takes no time to import, and fails at every step."""
        stand_in = self.torch("__version__ = '2.13.0'\nclass version: cuda = None\n")
        facts: dict[str, Any] = json.loads(
            self.run("--json", *options, **stand_in, **environ).stdout
        )
        return facts

    def run(self, *options: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Runs the doctor as a file, or as the options say."""
        command = options if options and options[0] in ("-I", "-m") else (self.script, *options)
        # -S: no finder of an editable install, which would find its module for this copy too.
        installed = [entry for entry in sys.path if entry.endswith("-packages")]
        first = environ.pop("PYTHONPATH", "")
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, [first, *installed]))
        result = subprocess.run(
            [sys.executable, "-S", *command],
            cwd=self.root / "tree",
            env={"PATH": str(self.root / "bin"), **environ},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.stderr == ""
        assert "Traceback" not in result.stdout
        assert result.returncode == (0 if "Healthy" in result.stdout else 1)
        return result

    @property
    def script(self) -> str:
        return str(self.package / "doctor.py")


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_it_runs_as_a_file_and_as_a_module(copy: Copy) -> None:
    as_file, as_module = copy.run(), copy.run("-m", "fused_opt.doctor")
    assert "step on cpu" in as_file.stdout
    assert "✓ Healthy: fused_opt runs on this CPU" in as_file.stdout.splitlines()[-1]
    assert as_file.stdout == as_module.stdout
    assert "\x1b" not in as_file.stdout


def test_json_is_all_there_is_on_stdout(copy: Copy) -> None:
    content = json.loads(copy.run("--json").stdout)
    assert content["healthy"] is True
    assert content["module"]["path"] == str(copy.module)
    assert content["module"]["cpu_isa"] == _C.cpu_isa()
    assert content["torch"]["version"] == torch.__version__
    assert content["steps"][0]["device"] == "cpu"
    assert content["steps"][0]["found"] == RIGHT
    assert content["python"]["executable"] == sys.executable


def test_before_anything_is_installed_it_says_what_to_do(copy: Copy) -> None:
    copy.module.unlink()
    output = copy.run("-I", copy.script).stdout  # No site-packages: no torch, nothing.
    assert f"✗ {copy.package} has no compiled module." in re.sub(r"\n +", " ", output)
    assert "✗ torch cannot be imported: it is not installed." in output
    assert re.search(r"✗ 2 problems\. To begin with: Build the module: .*\n$", output)


def test_it_runs_in_a_source_tree_with_blanks_in_its_name(tmp_path: Path) -> None:
    (tmp_path / "my folder").mkdir()
    copy = Copy(tmp_path / "my folder")
    copy.module.unlink()
    (copy.package.parent / "CMakeLists.txt").touch()
    output = copy.run().stdout
    assert output.endswith(f"pip install -e '{copy.package.parent}'\n")


def test_a_module_that_is_garbage_is_named_with_the_reason(copy: Copy) -> None:
    copy.module.write_bytes(b"This is no ELF file." * 50)
    content = copy.facts()
    assert content["module"]["path"] == str(copy.module)
    assert content["module"]["error"] == "invalid ELF header"
    assert (
        content["problems"][0]["message"]
        == f"{copy.module} cannot be imported: invalid ELF header."
    )
    assert content["torch"]["version"] == "2.13.0"
    assert content["steps"] == []


def test_a_module_that_kills_python_does_not_kill_the_doctor(copy: Copy, tmp_path: Path) -> None:
    compile_c(
        "#include <signal.h>\n__attribute__((constructor)) void f() { raise(SIGSEGV); }",
        copy.module,
    )
    content = copy.facts()
    assert content["faults"] == [{"section": "module", "reason": "Python dies of SIGSEGV"}]
    assert content["module"] is None
    assert content["torch"]["version"] == "2.13.0"
    assert content["build"] is not None


def test_a_module_without_what_is_asked_of_it_hides_nothing_else(copy: Copy) -> None:
    copy.module.unlink()
    (copy.package / "_C.py").write_text("cuda_version = None\nversion = '0.0.1'\n")
    content = copy.facts()
    (fault,) = content["faults"]
    assert fault["section"] == "module"
    assert re.match("AttributeError: .* no attribute", fault["reason"])
    assert content["torch"]["version"] == "2.13.0"


def test_a_module_for_another_python_is_named(copy: Copy) -> None:
    copy.module.rename(copy.package / "_C.cpython-37m-x86_64-linux-gnu.so")
    error = copy.facts()["module"]["error"]
    version = "{}.{}".format(*sys.version_info)
    assert error.endswith(f"for Python {version}, only _C.cpython-37m-x86_64-linux-gnu.so")


def test_an_installed_package_that_the_source_tree_hides_is_named(copy: Copy) -> None:
    installed = copy.root / "site" / "fused_opt"
    installed.mkdir(parents=True)
    copy.module.rename(installed / MODULE_NAME)
    content = json.loads(
        copy.run("-m", "fused_opt.doctor", "--json", PYTHONPATH=str(installed.parent)).stdout
    )
    assert content["module"]["hidden"] == str(installed)
    assert content["advice"].startswith("1 problem. Start Python in another folder")


def test_a_stale_module_is_noticed(copy: Copy) -> None:
    copy.edit("__init__.py", fused_opt.__version__, "9.9.9")
    output = copy.run().stdout
    assert "The compiled module is of fused_opt" in output
    assert "9.9.9" in output


def test_a_wrong_step_is_noticed(copy: Copy) -> None:
    copy.edit("functional.py", "        plan.run()\n", "        pass\n")
    output = copy.run().stdout
    assert "✗ step on cpu" in output
    assert "wrong: gives [1.0, 2.0, 2.0] in place of [0.625, 3.0, 1.65625]" in output


def test_a_torch_that_does_not_load_is_named_with_the_reason(copy: Copy) -> None:
    broken = copy.torch("raise OSError('libcudart.so.12: cannot open shared object file')")
    output = copy.run(**broken).stdout
    assert "OSError: libcudart.so.12: cannot open shared object file" in output
    assert "✓ fused_opt._C" in output
    assert "Repair torch until" in output.splitlines()[-1]


def test_a_torch_that_kills_python_does_not_kill_the_doctor(copy: Copy) -> None:
    deadly = copy.torch("import os, signal\nos.kill(os.getpid(), signal.SIGILL)")
    content = json.loads(copy.run("--json", **deadly).stdout)
    assert content["faults"] == [{"section": "torch", "reason": "Python dies of SIGILL"}]
    assert content["advice"] == "1 problem. Reinstall torch"


def test_what_torch_prints_is_kept_out_of_the_report(copy: Copy) -> None:
    chatty = copy.torch(
        "import os\nprint('hello')\nos.write(1, b'{')\n__version__ = '2.13.0'\n"
        "class version: cuda = None\n"
    )
    content = json.loads(copy.run("--json", **chatty).stdout)
    assert content["torch"]["version"] == "2.13.0"


def test_files_of_the_package_do_not_pass_for_global_modules(copy: Copy) -> None:
    mistaken = copy.torch("import sgd")  # fused_opt has an sgd.py beside the script that runs.
    assert "✗ torch cannot be imported: No module named 'sgd'." in copy.run(**mistaken).stdout


def test_a_broken_nvcc_is_shown_and_is_no_problem_beside_a_module(copy: Copy) -> None:
    write_script(
        copy.root / "bin" / "nvcc", "echo 'Cuda compilation tools, release 11.8, V11.8.89'"
    )
    content = json.loads(copy.run("--json").stdout)
    (nvcc,) = content["compilers"]
    assert nvcc["path"] == str(copy.root / "bin" / "nvcc")
    assert nvcc["release"] == "11.8"
    assert "12.1 or newer" in nvcc["problem"]
    assert content["problems"] == []
    assert [warning["subject"] for warning in content["warnings"]] == ["nvcc"]
    assert "FUSED_OPT_NVCC" in content["warnings"][0]["cure"]


def test_a_broken_nvcc_is_the_first_problem_where_a_module_has_to_be_built(copy: Copy) -> None:
    write_script(
        copy.root / "bin" / "nvcc", "echo 'Cuda compilation tools, release 11.8, V11.8.89'"
    )
    copy.module.unlink()
    problems = copy.facts()["problems"]
    assert [problem["subject"] for problem in problems] == ["nvcc", "module"]


def test_variables_of_the_environment_are_reported(copy: Copy) -> None:
    content = copy.facts(FUSED_OPT_CUDA="0", CUDA_VISIBLE_DEVICES="")
    assert content["environment"] == {"FUSED_OPT_CUDA": "0", "CUDA_VISIBLE_DEVICES": ""}
    assert "FUSED_OPT_CUDA=0" in content["build"]["notes"][0]


def test_an_ascii_terminal_gets_ascii(tmp_path: Path) -> None:
    (tmp_path / "größe").mkdir()
    output = Copy(tmp_path / "größe").run(PYTHONIOENCODING="ascii").stdout
    assert "+ fused_opt._C" in output
    assert "gr\\xf6\\xdfe" in output


@pytest.mark.parametrize("name", ["python3.9"])
def test_it_runs_on_an_older_python(copy: Copy, name: str) -> None:
    python = shutil.which(name)
    if (
        python is None
        or subprocess.run([python, "-V"], check=False, capture_output=True).returncode
    ):
        pytest.skip(f"{name} is not installed")
    result = subprocess.run(
        [python, "-I", "-S", copy.script], capture_output=True, text=True, check=False
    )
    assert result.stderr == ""
    assert "fused_opt needs Python 3.10 or newer" in result.stdout


# ---- A driver that is a stand-in -----------------------------------------------------------------

FAKE_DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static int number(const char* name) { return getenv(name) ? atoi(getenv(name)) : 0; }
static int gpu(int index) {  /* FAKE_GPUS is "90 75" */
  const char* text = getenv("FAKE_GPUS");
  for (; text && *text && index > 0; --index) text = strchr(text, ' ') ? strchr(text, ' ') + 1 : "";
  return text && *text ? atoi(text) : 0;
}
int cuDriverGetVersion(int* version) { *version = number("FAKE_DRIVER"); return 0; }
int cuInit(unsigned flags) { return number("FAKE_INIT"); }
int cuGetErrorName(int code, const char** name) { *name = "CUDA_ERROR_FAKE"; return 0; }
int cuDeviceGetCount(int* count) { for (*count = 0; gpu(*count); ++*count) {} return 0; }
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDeviceGetName(char* name, int size, int device) {
  return snprintf(name, size, "Fake GPU %d", gpu(device)), 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? gpu(device) / 10 : attribute == 76 ? gpu(device) % 10 : -1;
  return 0;
}
"""


def compile_c(source: str, target: Path) -> None:
    """Makes a shared library, or skips the test where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("cc is not installed")
    file = target.with_suffix(".c")
    file.write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", target, file], check=True)
    file.unlink()


@pytest.fixture
def driver(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Makes a driver, and returns the environment in which it is the one."""
    if torch.version.cuda is not None:
        pytest.skip("torch would take the stand-in too")
    folder = tmp_path / "driver"
    folder.mkdir()
    compile_c(FAKE_DRIVER, folder / "libcuda.so.1")

    def make(release: int, gpus: str = "", init: int = 0) -> dict[str, str]:
        return {
            "LD_LIBRARY_PATH": str(folder),
            "FAKE_DRIVER": str(release),
            "FAKE_GPUS": gpus,
            "FAKE_INIT": str(init),
        }

    return make


def test_gpus_are_listed_by_the_driver_for_a_torch_without_cuda(
    copy: Copy, driver: Callable[..., dict[str, str]]
) -> None:
    if _C.cuda_version is None:
        pytest.skip("fused_opt._C is a CPU-only module")
    content = copy.facts(**driver(13010, "90 61 121"))
    assert content["driver"]["release"] == "13.1"
    names = [(gpu["device"], gpu["name"], gpu["capability"]) for gpu in content["gpus"]]
    assert names == [
        ("cuda:0", "Fake GPU 90", 90),
        ("cuda:1", "Fake GPU 61", 61),
        ("cuda:2", "Fake GPU 121", 121),
    ]
    expected = [
        _toolchain.code_for(gpu, [int(a) for a in _C.cuda_archs], [int(a) for a in _C.ptx_archs])
        for gpu in (90, 61, 121)
    ]
    assert [gpu["code"] for gpu in content["gpus"]] == expected
    assert expected[1] is None
    assert "cuda:1" in [problem["subject"] for problem in content["problems"]]
    assert [warning["subject"] for warning in content["warnings"]] == ["torch"]


@pytest.mark.parametrize(
    ("init", "error"), [(0, None), (100, None), (803, "cuInit returns 803 (CUDA_ERROR_FAKE)")]
)
def test_a_driver_is_started(
    copy: Copy, driver: Callable[..., dict[str, str]], init: int, error: str | None
) -> None:
    content = copy.facts(**driver(12040, init=init))
    assert content["driver"]["release"] == "12.4"
    assert content["driver"]["error"] == error
    assert content["gpus"] == []


def test_a_driver_that_kills_python_does_not_kill_the_doctor(copy: Copy, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    compile_c(
        "int cuInit(unsigned f) { return *(volatile int*)0; }\n"
        "int cuDriverGetVersion(int* v) { *v = 12040; return 0; }",
        tmp_path / "bad" / "libcuda.so.1",
    )
    content = copy.facts(LD_LIBRARY_PATH=str(tmp_path / "bad"))
    assert content["faults"] == [{"section": "driver", "reason": "Python dies of SIGSEGV"}]


def test_no_gpu_is_a_problem_only_if_one_is_required(
    copy: Copy, driver: Callable[..., dict[str, str]]
) -> None:
    without = driver(13010, init=100)
    assert copy.run(**without).returncode == 0
    required = copy.run("--require-gpu", **without)
    assert required.returncode == 1
    assert "A GPU is required, and the driver shows none." in required.stdout
