"""Says whether fused_opt works on this machine and, where it does not, what to do about it.

``python -m fused_opt.doctor`` where it is installed, ``python fused_opt/doctor.py`` before: this
needs the standard library alone, of Python 3.9 or newer. The doctor looks at the compilers that a
build would use, at the compiled module, torch, the driver and the GPUs, takes a step of one element
on each device, and ends in one line. Its exit status is 1 if there is a problem, else 0. ``--json``
prints the same facts as JSON.

A problem is what keeps fused_opt from working here, on any device of this machine:

- a module, a torch, a driver, a GPU or a step that fails, and a GPU that a CPU-only module wastes;
- a compiler that is missing or refused, but only if something has to be built here. Beside a module
  that works it is at most a warning: whoever installed a wheel needs no compiler;
- no driver, no GPU or no torch with CUDA, but only with ``--require-gpu``.

Whatever can crash or hang (torch, the module, the driver, a step) runs in a second process, so that
the report always comes.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib
import importlib.machinery
import io
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

if not __package__:
    # Run as a file: its neighbours are imported without fused_opt/__init__.py, which needs torch,
    # and are hidden from everyone who wants a global module of such a name.
    _folder = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _folder]
    sys.modules["fused_opt"] = ModuleType("fused_opt")
    sys.modules["fused_opt"].__path__ = [str(_folder)]

from fused_opt import _toolchain
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
    dotted,
    numbers,
)
from fused_opt._doctor_findings import diagnose, oldest_driver
from fused_opt._doctor_report import Report, Style, render

PACKAGE = Path(__file__).resolve().parent

VARIABLES = (
    "FUSED_OPT_CUDA",
    "FUSED_OPT_NVCC",
    *_toolchain.ARCH_VARIABLES,
    "CUDACXX",
    "CUDA_HOME",
    "CUDA_PATH",
    "CUDAHOSTCXX",
    "CXX",
    "CXXFLAGS",
    "MAX_JOBS",
    "CUDA_VISIBLE_DEVICES",
)
"""What changes a build, or the GPUs that are seen; shown where set."""

DEVICE_FILES = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""Where there is one, the driver is meant to work: on Linux, and on Windows' Linux."""

PROBE_TIMEOUT_S = 300  # A driver may have to compile every kernel from PTX.
COMMAND_TIMEOUT_S = 30


def examine(environ: Mapping[str, str]) -> Facts:
    """Looks at everything. What fails is a fault of its section and hides nothing else."""
    faults: list[Fault] = []

    def look(section: str, at: Callable[[], Any], otherwise: Any = None) -> Any:
        try:
            return at()
        except Exception as error:
            faults.append(Fault(section, _reason(error)))
            return otherwise

    child = look("probe", start_probe)  # It is at work while this process tries the compilers.
    package = look("package", look_at_package, Package(None, str(PACKAGE), None))
    compilers = look("nvcc", lambda: look_at_compilers(environ), [])
    build = look("build", lambda: look_at_build(environ))
    programs = look("programs", lambda: look_at_programs(environ), [])
    seen = look("probe", lambda: finish_probe(child, faults), {}) if child else {}
    module = Module(**seen["module"]) if "module" in seen else None
    driver = Driver(**seen["driver"]) if "driver" in seen else None
    return Facts(
        python=look_at_python(),
        package=package,
        environment={name: environ[name] for name in VARIABLES if name in environ},
        compilers=compilers,
        build=build,
        programs=programs,
        module=module,
        torch=Torch(**seen["torch"]) if "torch" in seen else None,
        driver=driver,
        gpus=[judge(Gpu(**gpu), module, driver) for gpu in seen.get("gpus", [])],
        steps=[Step(**step) for section, step in seen.items() if section.startswith("step on")],
        faults=faults,
    )


def judge(gpu: Gpu, module: Module | None, driver: Driver | None) -> Gpu:
    """Returns the GPU with what it would run of the module."""
    if module is None or module.error or module.cuda_version is None:
        why = "there is no module" if module is None or module.error else "the module is CPU-only"
        return dataclasses.replace(gpu, why_none=why)
    code = _toolchain.code_for(gpu.capability, module.cubins, module.ptx)
    why_none = None if code else "the module has no code for it"
    has = numbers(driver.release) if driver and driver.release else (0, 0)
    needs = numbers(module.cuda_version)
    if has[0] < needs[0]:
        code, why_none = None, "the driver is too old for the module"
    elif code == "ptx" and has < needs:  # Machine code runs on every driver of its major release.
        code = None
        why_none = f"the driver is too old for the module's PTX, of CUDA {module.cuda_version}"
    return dataclasses.replace(gpu, code=code, why_none=why_none)


# ---- What a build would use ----------------------------------------------------------------------


def look_at_python() -> Python:
    """Describes this interpreter."""
    return Python(platform.python_version(), sys.executable, f"{sys.platform} {platform.machine()}")


def look_at_package() -> Package:
    """Reads what the package says of itself, without an import."""
    text = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"', text, re.M)
    is_source = (PACKAGE.parent / "CMakeLists.txt").is_file()
    return Package(
        match[1] if match else None, str(PACKAGE), str(PACKAGE.parent) if is_source else None
    )


def look_at_compilers(environ: Mapping[str, str]) -> list[Compiler]:
    """Inspects every nvcc."""
    return [
        Compiler(
            path=nvcc.path,
            source=nvcc.candidate.source,
            explicit=nvcc.candidate.explicit,
            release=_text(nvcc.release),
            tools=[Program(tool.name, tool.path, _text(tool.release)) for tool in nvcc.tools],
            host_compiler=nvcc.host_compiler,
            default_arch=nvcc.default_arch,
            archs=list(nvcc.archs),
            problem=nvcc.problem,
            warnings=list(nvcc.warnings),
        )
        for nvcc in _toolchain.survey(environ)
    ]


def look_at_build(environ: Mapping[str, str]) -> Build:
    """Asks what a build would choose."""
    try:
        choice = _toolchain.resolve(environ)
    except _toolchain.ToolchainError as error:
        return Build(refusal=str(error))
    return Build(
        nvcc=choice.nvcc.path if choice.nvcc else None,
        buildable=list(choice.nvcc.archs) if choice.nvcc else [],
        cubins=list(choice.cubins),
        ptx=list(choice.ptx),
        notes=list(choice.notes),
    )


def look_at_programs(environ: Mapping[str, str]) -> list[Program]:
    """Finds what a build uses besides nvcc, where CMake and setup.py look for it."""
    path = environ.get("PATH", os.defpath)
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), path])
    header = Path(sysconfig.get_path("include")) / "Python.h"
    named = shlex.split(environ.get("CXX", ""))[:1]
    return [
        _program("C++", named or ["c++", "g++", "clang++"], path),
        Program("Python.h", str(header) if header.is_file() else None, platform.python_version()),
        _program("cmake", ["cmake"], scripts),
        _program("ninja", ["ninja"], scripts),
    ]


def _program(name: str, commands: Iterable[str], path: str) -> Program:
    found = next(filter(None, (shutil.which(command, path=path) for command in commands)), None)
    if found is None:
        return Program(name, None, None)
    try:
        result = subprocess.run(
            [found, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return Program(name, found, None)
    first_line = re.sub(r"\(.*?\)", "", result.stdout.partition("\n")[0])  # c++ (Debian 12.2) 12.2
    match = re.search(r"\d+(\.\d+)+", first_line)
    return Program(name, found, match[0] if match else None)


# ---- The second process --------------------------------------------------------------------------


def start_probe() -> subprocess.Popen[str]:
    """Starts this file once more, with the same switches of the interpreter, as a probe."""
    flags = {"ignore_environment": "-E", "no_user_site": "-s", "no_site": "-S"}
    switches = [switch for flag, switch in flags.items() if getattr(sys.flags, flag)]
    return subprocess.Popen(
        [sys.executable, *switches, str(Path(__file__).resolve()), "--probe"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def probe() -> None:
    """Looks at one thing after another; prints a JSON line before and after each."""
    # Imported code may print, which must not end up between the lines.
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**content: Any) -> None:
        lines.write(json.dumps(content, default=dataclasses.asdict) + "\n")
        lines.flush()  # The next thing looked at may end the process.

    def look(section: str, at: Callable[[], Any]) -> Any:
        say(starting=section)
        try:
            seen = at()
        except Exception as error:  # Whatever it is, the rest is still worth a look.
            say(fault=_reason(error))
            return None
        say(seen=seen)
        return seen

    driver = look("driver", look_at_driver)
    if driver and driver.release and not driver.error:
        look("gpus", look_at_gpus)
    torch = look("torch", look_at_torch)  # First: the module then shares its OpenMP library.
    module = look("module", look_at_module)
    if torch and torch.version and module and not module.error:
        for device in ["cpu", *(f"cuda:{index}" for index in range(torch.gpus))]:
            look(f"step on {device}", lambda device=device: take_step(device))  # type: ignore[misc]


def finish_probe(child: subprocess.Popen[str], faults: list[Fault]) -> dict[str, Any]:
    """Returns what the probe saw in each section; adds what it failed at."""
    try:
        output, complaints = child.communicate(timeout=PROBE_TIMEOUT_S)
        ending = _ending(child.returncode, complaints)
    except subprocess.TimeoutExpired:
        child.kill()
        output, _ = child.communicate()
        ending = f"no answer within {PROBE_TIMEOUT_S} s"
    seen: dict[str, Any] = {}
    section = "probe"
    for line in output.splitlines():
        entry = json.loads(line)
        section = entry.get("starting", section)
        if "seen" in entry:
            seen[section] = entry["seen"]
        elif "fault" in entry:
            faults.append(Fault(section, entry["fault"]))
    if ending:
        faults.append(Fault(section, ending))
    return seen


def _ending(status: int, complaints: str) -> str | None:
    if status > 0:
        return f"Python ends with status {status}: {complaints.strip().rpartition(chr(10))[2]}"
    if status == 0:
        return None
    try:
        return f"Python dies of {signal.Signals(-status).name}"
    except ValueError:
        return f"Python dies of signal {-status}"


# ---- What the second process looks at ------------------------------------------------------------


def look_at_driver() -> Driver:
    """Asks the driver for its release, and starts it."""
    devices = any(path.exists() for path in DEVICE_FILES)
    release = _toolchain.driver_release()
    if release is None:
        return Driver(devices=devices)
    cuda = ctypes.CDLL("libcuda.so.1")
    status = cuda.cuInit(0)
    if status in (0, 100):  # CUDA_ERROR_NO_DEVICE is no fault of the driver.
        return Driver(dotted(release), devices=devices)
    name = ctypes.c_char_p()
    cuda.cuGetErrorName(status, ctypes.byref(name))
    error = f"cuInit returns {status} ({(name.value or b'an unknown error').decode()})"
    return Driver(dotted(release), error, devices)


def look_at_gpus() -> list[Gpu]:
    """Lists the GPUs that the driver shows, in the order of torch, which may not see them."""
    cuda = ctypes.CDLL("libcuda.so.1")
    count = ctypes.c_int()
    cuda.cuInit(0)
    cuda.cuDeviceGetCount(ctypes.byref(count))
    gpus: list[Gpu] = []
    for index in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
        major, minor = ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(name, len(name), device)
        # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
        cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        text = name.value.decode(errors="replace")
        gpus.append(Gpu(f"cuda:{index}", text, 10 * major.value + minor.value))
    return gpus


def look_at_torch() -> Torch:
    """Imports torch."""
    try:
        import torch
    except Exception as error:  # A broken one raises anything: OSError, AttributeError...
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        return Torch(error="it is not installed" if missing else _reason(error))
    cuda = torch.version.cuda  # None for a CPU-only build, and for ROCm, whose GPUs have no kernels
    gpus = torch.cuda.device_count() if cuda and torch.cuda.is_available() else 0
    return Torch(torch.__version__, cuda, gpus)


def look_at_module() -> Module:
    """Imports the compiled module."""
    try:
        module = importlib.import_module("fused_opt._C")
    except ModuleNotFoundError:
        return missing_module()
    except ImportError as error:
        return Module(path=error.path, error=_reason(error).replace(f"{error.path}: ", ""))
    oldest = oldest_driver(module.cuda_version) if module.cuda_version else (None, None)
    return Module(
        path=module.__file__,
        version=module.version,
        cuda_version=module.cuda_version,
        cubins=[int(arch) for arch in module.cuda_archs],
        ptx=[int(arch) for arch in module.ptx_archs],
        cpu_isa=module.cpu_isa(),
        cpu_isas=list(module.cpu_isas()),
        oldest_driver=oldest[0],
        oldest_driver_branch=oldest[1],
    )


def missing_module() -> Module:
    """Says what there is in place of the module: one for another Python, one in another folder."""
    error = f"{PACKAGE} has no compiled module"
    others = sorted(path.name for path in PACKAGE.glob("_C.*.so"))
    if others:
        this = ".".join(platform.python_version_tuple()[:2])
        error += f" for Python {this}, only {', '.join(others)}"
    names = [f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    for folder in (Path(entry) / "fused_opt" for entry in sys.path):
        if any((folder / name).is_file() for name in names):
            return Module(error=error, hidden=str(folder))
    return Module(error=error)


def take_step(device: str) -> Step:
    """Takes one step of SGD with momentum and an EMA, on one element, and reads it back."""
    expected = [0.625, 3.0, 1.65625]  # v = 2/2 + 2, p = 1 - v/8, s = 2 + (p - 2)/4: all exact
    try:
        import torch

        from fused_opt.functional import sgd_step_

        param, grad, momentum, shadow = (
            torch.full((1,), value, device=device) for value in (1.0, 2.0, 2.0, 2.0)
        )
        sgd_step_([param], [grad], [momentum], lr=0.125, momentum=0.5, shadows=[shadow], decay=0.75)
        found = [tensor.item() for tensor in (param, momentum, shadow)]
    except Exception as error:
        return Step(device, expected, error=_reason(error))
    return Step(device, expected, found)


# ---- The command ---------------------------------------------------------------------------------


def _reason(error: BaseException) -> str:
    """Returns the first line of an exception, with its type where the text alone says little."""
    text = str(error).strip().partition("\n")[0].rstrip(".")
    telling = isinstance(error, (ImportError, RuntimeError)) and text
    return text if telling else f"{type(error).__name__}: {text}".rstrip(": ")


def _text(release: Sequence[int] | None) -> str | None:
    return None if release is None else dotted(release)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; returns 1 if there is a problem."""
    parser = argparse.ArgumentParser(
        prog="python -m fused_opt.doctor" if __package__ else None,
        description="Say whether fused_opt works on this machine, and what to do if not.",
    )
    parser.add_argument("--json", action="store_true", help="print the facts as JSON, and no text")
    parser.add_argument("--require-gpu", action="store_true", help="fail without a usable GPU")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.probe:
        probe()
        return 0
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # A path may have any character.
    facts = examine(os.environ)
    report = Report(facts, diagnose(facts, options.require_gpu))
    if options.json:
        print(report.to_json())
    else:
        print(render(report, Style.of(sys.stdout, os.environ)))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
