"""What follows from the doctor's facts: problems and warnings, and what to do about each.

The commands that build stand here too, for errors at run time that end in one.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fused_opt import _toolchain
from fused_opt._doctor_facts import (
    Build,
    Facts,
    Gpu,
    Module,
    capability,
    code,
    counted,
    dotted,
    numbers,
)

MIN_PYTHON = (3, 10)
MIN_TORCH = (2, 10)

OLDEST_DRIVERS = {12: ("12.1", "R530"), 13: ("13.0", "R580")}
"""By the CUDA major of the module. CUDA 12 itself loads from R525 on, but only R530 accepts kernel
parameters above 4 KB, which carry the longer lists of tensors."""

REPORT_IT = "Report this with the output of `python -m fused_opt.doctor --json`"


@dataclass(frozen=True)
class Finding:
    """Something to know, and what to do about it."""

    level: str
    """"problem": the exit status is 1; or "warning"."""
    subject: str
    """What it is about: "module", "torch", "cuda:0"..."""
    message: str
    cure: str
    """One line, to be done or to be run; no full stop, for it may end in a command."""
    rebuild: bool = False
    """Whether the cure is to build the module on this machine."""


def problem(subject: str, message: str, cure: str, rebuild: bool = False) -> Finding:
    """A finding that makes the exit status 1."""
    return Finding("problem", subject, message, cure, rebuild)


def warning(subject: str, message: str, cure: str) -> Finding:
    """A finding that does not."""
    return Finding("warning", subject, message, cure)


def diagnose(facts: Facts, require_gpu: bool = False) -> list[Finding]:
    """Returns the findings. What has to be cured first comes first."""
    about_code = [*check_module(facts), *check_gpus(facts)]
    faults = list(check_faults(facts))
    rebuild = any(finding.rebuild for finding in [*faults, *about_code])
    return [
        *check_python(facts),
        *check_build(facts, rebuild),
        *faults,
        *about_code,
        *check_torch(facts),  # To install fused_opt brings a torch, too.
        *check_driver(facts),
        *check_steps(facts, about_code),
        *(check_required_gpu(facts) if require_gpu else ()),
    ]


def check_faults(facts: Facts) -> Iterator[Finding]:
    """Sections that the doctor could not finish."""
    driver = "Reinstall the NVIDIA driver, or reboot if it was just updated"
    build = f"Build the module again: {build_command(facts.package.source)}"
    cures = {"driver": driver, "gpus": driver, "torch": "Reinstall torch", "module": build}
    for fault in facts.faults:
        yield problem(
            fault.section,
            f"Looking at the {fault.section} fails: {fault.reason}.",
            cures.get(fault.section, REPORT_IT),
            rebuild=fault.section == "module",
        )


def check_python(facts: Facts) -> Iterator[Finding]:
    """The interpreter's age."""
    if numbers(facts.python.version) < MIN_PYTHON:
        yield problem(
            "python",
            f"fused_opt needs Python {dotted(MIN_PYTHON)} or newer, and {facts.python.executable} "
            f"is {facts.python.version}.",
            f"Use Python {dotted(MIN_PYTHON)} or newer",
        )


def check_torch(facts: Facts) -> Iterator[Finding]:
    """Whether it is there, new enough, and sees the GPUs that the driver shows."""
    torch, gpus = facts.torch, facts.gpus
    if torch is None:
        return
    at_least = dotted(MIN_TORCH)
    if torch.version is None:
        cure = f"Install torch: {pip()} install 'torch>={at_least}'"
        if torch.error != "it is not installed":
            cure = f"Repair torch until `{shlex.quote(sys.executable)} -c 'import torch'` works"
        yield problem("torch", f"torch cannot be imported: {torch.error}.", cure)
        return
    if numbers(torch.version) < MIN_TORCH:
        yield warning(
            "torch",
            f"fused_opt is made for torch {at_least} or newer, and this is {torch.version}.",
            f"Update torch: {pip()} install --upgrade 'torch>={at_least}'",
        )
    if gpus and torch.cuda_version is None:
        yield warning(
            "torch",
            f"torch {torch.version} is built without CUDA and leaves {counted(gpus)} idle.",
            "Install a torch with CUDA to make use of that",
        )
    elif torch.gpus < len(gpus):
        release = facts.driver.release if facts.driver else None
        yield problem(
            "torch",
            f"torch {torch.version}, built for CUDA {torch.cuda_version}, can use {torch.gpus} of "
            f"{counted(gpus)}, with a driver for CUDA {release}.",
            f"Update the NVIDIA driver, or install a torch for CUDA {release} or older",
        )


def check_build(facts: Facts, needed: bool) -> Iterator[Finding]:
    """What stops a build; a problem only if one is needed."""
    build = facts.build
    if build is not None and build.refusal:
        yield _refusal(build.refusal, "problem" if needed else "warning")
    if not needed:
        return
    has_nvcc = any(compiler.problem is None for compiler in facts.compilers)
    if facts.gpus and build is not None and not build.refusal and not has_nvcc:
        yield problem(
            "nvcc",
            f"CUDA kernels have to be built for {counted(facts.gpus)}, and there is no nvcc.",
            f"Install the CUDA toolkit, {dotted(_toolchain.MIN_RELEASE)} or newer, or set "
            "FUSED_OPT_NVCC to its nvcc",
        )
    packages = {"C++": ("a C++ compiler", "g++"), "Python.h": ("Python.h", "python3-dev")}
    for program in facts.programs:
        if program.path is None and program.name in packages:
            what, package = packages[program.name]
            yield problem(
                program.name,
                f"The module has to be built, and {what} is missing.",
                f"Install {what}: apt install {package} (on Debian and Ubuntu)",
            )


def _refusal(text: str, level: str) -> Finding:
    """The resolver's last line, or the last sentence of its only one, says what to set."""
    reason, _, cure = text.rpartition("\n")
    if not reason:
        reason, _, cure = text.rpartition(". ")
        reason, cure = (reason + ".", cure) if reason else (text, "Correct that variable")
    return Finding(level, "nvcc", f"A build would be refused here: {reason}", cure.rstrip("."))


def check_module(facts: Facts) -> Iterator[Finding]:
    """Whether the compiled module is there, loads, and belongs to this package."""
    module, package = facts.module, facts.package
    if module is None:
        return
    command = build_command(package.source)
    if module.error:
        yield _module_with_error(module, command)
    elif package.version and module.version != package.version:
        yield problem(
            "module",
            f"The compiled module is of fused_opt {module.version}, and the Python files beside it "
            f"are of {package.version}.",
            f"Build the module again: {command}",
            rebuild=True,
        )
    elif module.path and Path(module.path).resolve().parent != Path(package.folder).resolve():
        yield problem(
            "module",
            f"{package.folder} has no compiled module, and Python takes {module.path} for it.",
            f"Build the module here: {command}",
            rebuild=True,
        )


def _module_with_error(module: Module, command: str) -> Finding:
    if module.hidden:
        return problem(
            "module",
            f"{module.error}, and hides {module.hidden}, which has one.",
            f"Start Python in another folder, or build the module here: {command}",
        )
    if module.path is None:
        return problem("module", f"{module.error}.", f"Build the module: {command}", rebuild=True)
    message = f"{module.path} cannot be imported: {module.error}."
    if "libgomp" in str(module.error):
        cure = "Install GCC's OpenMP library: apt install libgomp1, or dnf install libgomp"
        return problem("module", message, cure)
    return problem("module", message, f"Build the module on this machine: {command}", rebuild=True)


def check_gpus(facts: Facts) -> Iterator[Finding]:
    """Whether the module has code that each GPU can run with this driver."""
    module, driver = facts.module, facts.driver
    if module is None or module.error:
        return
    for gpu in facts.gpus:
        if gpu.capability < _toolchain.MIN_ARCH:
            yield problem(
                gpu.device,
                f"{gpu.name} has compute capability {capability(gpu.capability)}, and fused_opt "
                f"needs {capability(_toolchain.MIN_ARCH)} or newer.",
                f"Hide {gpu.device} with CUDA_VISIBLE_DEVICES, or use the CPU",
            )
    gpus = [gpu for gpu in facts.gpus if gpu.capability >= _toolchain.MIN_ARCH]
    if gpus and module.cuda_version is None:
        yield problem(
            "module",
            f"The compiled module is CPU-only, and this machine has {counted(gpus)}.",
            _rebuild(gpus, facts),
            rebuild=True,
        )
    elif gpus and driver and driver.release and module.oldest_driver:
        if numbers(driver.release) < numbers(module.oldest_driver):
            yield _old_driver(driver.release, module)
        else:
            yield from (_idle(gpu, module, facts) for gpu in gpus if gpu.code is None)


def _old_driver(release: str, module: Module) -> Finding:
    oldest = f"driver {module.oldest_driver_branch or 'for'} (CUDA {module.oldest_driver})"
    message = f"The module, built with CUDA {module.cuda_version}, needs {oldest} or newer"
    cure = f"Update the NVIDIA driver to {module.oldest_driver_branch or 'a newer one'}"
    major, _ = numbers(release)
    if major == numbers(str(module.cuda_version))[0]:
        message += (
            f"; this one, for CUDA {release}, refuses the kernel parameters above 4 KB that long "
            "lists of tensors need."
        )
    else:
        message += f"; this one is for CUDA {release}."
        if major >= _toolchain.MIN_RELEASE[0]:
            cure += f", or set FUSED_OPT_NVCC to an nvcc of CUDA {major} and rebuild the module"
    return problem("driver", message, cure)


def _idle(gpu: Gpu, module: Module, facts: Facts) -> Finding:
    return problem(
        gpu.device,
        f"{gpu.name} ({gpu.device}) has compute capability {capability(gpu.capability)} and can "
        f"run nothing of the module, which has {code(module.cubins, module.ptx)}: {gpu.why_none}.",
        _rebuild([gpu], facts),
        rebuild=True,
    )


def _rebuild(gpus: Sequence[Gpu], facts: Facts) -> str:
    """The cure for GPUs without code: all of this machine stay served."""
    build = facts.build or Build()
    command = build_command(facts.package.source, archs_for(facts.gpus, build.buildable))
    for gpu in gpus:
        if build.buildable and buildable(gpu.capability, build.buildable) is None:
            return (
                f"Set FUSED_OPT_NVCC to an nvcc of {nvcc_for(gpu.capability)}, since {build.nvcc} "
                f"cannot build {gpu.capability}, and rebuild the module: {command}"
            )
    return f"Rebuild the module: {command}"


def check_driver(facts: Facts) -> Iterator[Finding]:
    """Whether the driver starts; where it has no device file, nobody expects it to."""
    driver = facts.driver
    if driver and driver.error:
        yield Finding(
            "problem" if driver.devices else "warning",
            "driver",
            f"The NVIDIA driver does not start: {driver.error}.",
            "Make nvidia-smi work: reboot if the driver was just updated, else reinstall it",
        )
    elif driver and driver.devices and driver.release is None:
        yield warning(
            "driver",
            "The NVIDIA driver is loaded, and its library libcuda.so.1 is missing.",
            "Install the driver's compute libraries (libnvidia-compute), or start the container "
            "with its GPUs (docker run --gpus all)",
        )


def check_steps(facts: Facts, about_code: Sequence[Finding]) -> Iterator[Finding]:
    """Steps that fail, unless it is said already why."""
    subjects = {finding.subject for finding in about_code}
    for step in facts.steps:
        on_gpu = step.device != "cpu"
        if step.passed or (on_gpu and subjects & {step.device, "module", "driver"}):
            continue
        subject = f"step on {step.device}"
        if step.error is None:
            message = f"The {subject} gives {step.found}, and {step.expected} is right."
            yield problem(subject, message, REPORT_IT)
        elif on_gpu:
            message = f"The {subject} fails: {step.error}"
            yield problem(subject, message, f"Do what the error of the {subject} says, above")
        else:
            message = f"The {subject} fails: {step.error}."
            cure = f"Build the module again: {build_command(facts.package.source)}"
            yield problem(subject, message, cure)


def check_required_gpu(facts: Facts) -> Iterator[Finding]:
    """``--require-gpu``: what is no problem otherwise, and keeps every GPU from a step."""
    driver, torch = facts.driver, facts.torch
    if driver and driver.release is None:
        yield problem(
            "driver",
            "A GPU is required, and there is no NVIDIA driver (libcuda.so.1).",
            "Install the NVIDIA driver; start a container with its GPUs (docker run --gpus all)",
        )
    elif driver and driver.error and not driver.devices:
        yield problem(
            "driver",
            "A GPU is required, and the driver finds no device of its own.",
            "Make nvidia-smi work; start a container with its GPUs (docker run --gpus all)",
        )
    elif driver and not driver.error and not facts.gpus:
        visible = facts.environment.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f" (CUDA_VISIBLE_DEVICES is {visible!r})"
        yield problem(
            "gpus",
            f"A GPU is required, and the driver shows none{hidden}.",
            "Check nvidia-smi and CUDA_VISIBLE_DEVICES; start a container with its GPUs",
        )
    elif facts.gpus and torch and torch.version and torch.cuda_version is None:
        yield problem(
            "torch",
            f"A GPU is required, and torch {torch.version} is built without CUDA.",
            "Install a torch with CUDA",
        )


def oldest_driver(cuda_version: str) -> tuple[str, str | None]:
    """Returns the CUDA release and the branch of the oldest driver that runs all of a module.

    >>> oldest_driver("12.8")
    ('12.1', 'R530')
    """
    major, _ = numbers(cuda_version)
    return OLDEST_DRIVERS.get(major, (f"{major}.0", None))


# ---- How to build --------------------------------------------------------------------------------


def source_tree() -> str | None:
    """Returns the source tree that this package runs from, or None if a wheel was installed."""
    folder = Path(__file__).resolve().parent.parent
    return str(folder) if (folder / "CMakeLists.txt").is_file() else None


def build_command(source: str | None, archs: Sequence[int] | None = None) -> str:
    """Returns the command that builds the module for this interpreter.

    Args:
        source: the source tree that the package runs from; None for an installed wheel, which has
            no source: the command is then for the folder that holds it.
        archs: the GPU architectures that it must have; an empty list asks for CUDA and leaves them
            to the build, None leaves it everything.
    """
    request = "" if archs is None else "FUSED_OPT_CUDA=1 "
    if archs:
        request += f"FUSED_OPT_CUDA_ARCHS={','.join(map(str, archs))} "
    if source:
        return f"{request}{pip()} install -e {shlex.quote(source)}"
    command = f"{request}{pip()} install --force-reinstall --no-deps ."
    return f"in the folder of fused_opt's source code, which holds setup.py, run {command}"


def pip() -> str:
    """Returns how to call the pip of this interpreter."""
    found = shutil.which("pip")
    if found and Path(found).parent == Path(sys.executable).parent:
        return "pip"
    return f"{shlex.quote(sys.executable)} -m pip"


def archs_for(gpus: Sequence[Gpu], archs: Sequence[int]) -> list[int]:
    """Returns the architectures to ask for, so that each of these GPUs gets machine code."""
    wanted = [gpu.capability for gpu in gpus if gpu.capability >= _toolchain.MIN_ARCH]
    return sorted({buildable(value, archs) or value for value in wanted})


def buildable(wanted: int, archs: Sequence[int]) -> int | None:
    """Returns the best of the architectures whose machine code runs on a compute capability.

    >>> buildable(103, [90, 100, 120])
    100
    """
    return max((arch for arch in archs if _toolchain.code_for(wanted, [arch], [])), default=None)


def nvcc_for(wanted: int) -> str:
    """Returns which releases of CUDA build for a compute capability."""
    if wanted < 75:
        return "CUDA 12"
    if 110 <= wanted < 120:
        return "CUDA 13.0 or newer"
    return f"CUDA {'12.8' if wanted >= 100 else dotted(_toolchain.MIN_RELEASE)} or newer"
