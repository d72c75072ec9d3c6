"""Variants of the compiled module that only tests use: with sanitizers, or counting what runs.

Each is built by the project's own CMakeLists.txt into a folder of build/, and a process of pytest
takes it in place of the package's module where its environment says so:

    python tests/native_variants.py asan pytest tests/test_sgd.py     # builds it, then runs this

The module's path goes into the variable FUSED_OPT_TEST_NATIVE, which conftest.py reads.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
NATIVE = "FUSED_OPT_TEST_NATIVE"
#: Names the module in place of the variant `emulated`: one with sanitizers or a mutation.
EMULATED = "FUSED_OPT_TEST_EMULATED"


@dataclass(frozen=True)
class Variant:
    """What differs from the module that is shipped."""

    cxx_flags: str
    cmake_options: tuple[str, ...] = ()
    #: Libraries of the compiler that a process must load before everything else.
    preload: tuple[str, ...] = ()
    environ: dict[str, str] = field(default_factory=dict)


#: Python and torch free little at exit, and torch allocates more than a sanitizer likes to see.
ASAN_OPTIONS = "detect_leaks=0:abort_on_error=1:allocator_may_return_null=1"
SANITIZE = "-O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all -fsanitize="

VARIANTS = {
    "asan": Variant(
        SANITIZE + "address,undefined",
        preload=("libasan.so", "libubsan.so"),
        environ={"ASAN_OPTIONS": ASAN_OPTIONS, "UBSAN_OPTIONS": "print_stacktrace=1"},
    ),
    # The kernels of CUDA, run on the CPU: tests/emulator.
    "emulated": Variant("-O1", ("-DFUSED_OPT_EMULATE_CUDA=ON",)),
    # For tests/races.cpp, which links its objects: torch's OpenMP library is not instrumented.
    "tsan": Variant("-O1 -g -fno-omit-frame-pointer -fsanitize=thread"),
    # Lines keep their counts at -O0 alone; threads that count the same line lose none.
    "coverage": Variant("-O0 -g --coverage -fprofile-update=atomic"),
}
VARIANTS["emulated-asan"] = replace(
    VARIANTS["asan"], cmake_options=VARIANTS["emulated"].cmake_options
)


def build(name: str) -> Path:
    """Builds a variant, or brings it up to date, and returns the path of its module."""
    variant, folder = VARIANTS[name], ROOT / "build" / "variants" / name
    cmake, ninja = (program(tool) for tool in ("cmake", "ninja"))
    configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"]
    configure += [
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder}",
        "-DCMAKE_BUILD_TYPE=None",
        f"-DCMAKE_CXX_FLAGS={variant.cxx_flags}",
        *variant.cmake_options,
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes of pytest may need it too
        for command in (configure, [cmake, "--build", str(folder), "--target", "_C"]):
            result = subprocess.run(
                command, capture_output=True, text=True, env=os.environ | {"FUSED_OPT_CUDA": "0"}
            )
            if result.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{result.stdout}\n{result.stderr}")
    (module,) = folder.glob("_C*.so")
    return module


def program(name: str) -> str:
    """The path of a build tool, of this interpreter's packages before the system's."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if path is None:
        raise FileNotFoundError(f"{name} is needed to build; `pip install {name}` provides it")
    return path


def environment(name: str, module: Path, variable: str = NATIVE) -> dict[str, str]:
    """The variables with which a process tests that module, which `variable` names."""
    variant = VARIANTS[name]
    compiler = os.environ.get("CXX", "c++")
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={library}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for library in variant.preload
    ]
    preload = {"LD_PRELOAD": " ".join(libraries)} if libraries else {}
    return os.environ | variant.environ | preload | {variable: str(module)}


def load(path: str | Path, name: str = "fused_opt._C") -> ModuleType:
    """Loads the compiled module at that path under a name, without entering it anywhere."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    """Builds the variant that is named first, and runs the rest as `python -m ...` with it."""
    if len(sys.argv) < 2 or sys.argv[1] not in VARIANTS:
        print(f"expected a variant ({', '.join(VARIANTS)}) and what `python -m` is to run with it")
        return 2
    name, *command = sys.argv[1:]
    module = build(name)
    print(f"built {module.relative_to(ROOT)}", flush=True)
    if not command:
        return 0
    command = [sys.executable, "-m", *command]
    return subprocess.run(command, env=environment(name, module), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
