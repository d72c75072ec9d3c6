"""What the build put into ``fused_opt._C``: static checks that need no GPU and no driver."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fused_opt
from fused_opt import _C

ROOT = Path(fused_opt.__file__).resolve().parent.parent
MODULE = Path(_C.__file__)
IS_CUDA = _C.cuda_version is not None
CPU_ISAS = ("baseline", "x86-64-v3", "x86-64-v4")

needs_cuda_code = pytest.mark.skipif(not IS_CUDA, reason="fused_opt._C is a CPU-only module")


def run(*command: str | Path, cwd: Path | None = None, **environ: str) -> str:
    """Runs a command and returns its output; a failure shows all it said."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def tool(name: str) -> str:
    """Returns the path of a system program, or skips the test."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def cuobjdump_candidates() -> Iterator[Path]:
    for folder in map(Path, sys.path):
        yield from sorted(folder.glob("nvidia/*/bin/cuobjdump"))
        yield folder / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump"
    on_path = shutil.which("cuobjdump")
    if on_path is not None:
        yield Path(on_path)
    yield Path("/usr/local/cuda/bin/cuobjdump")


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    """The path of cuobjdump: from a wheel, from PATH or from the toolkit."""
    for path in cuobjdump_candidates():
        if path.is_file():
            return str(path)
    pytest.skip("cuobjdump is not installed (pip install nvidia-cuda-cuobjdump)")


# ---- build_info ----------------------------------------------------------------------------------


def test_build_info_describes_the_module() -> None:
    info = fused_opt.build_info()
    assert set(info) == {"version", "cuda_version", "cuda_archs", "ptx_archs", "cpu_isa"}
    assert info["version"] == fused_opt.__version__
    assert info["cpu_isa"] in CPU_ISAS
    assert info["cpu_isa"] in _C.cpu_isas()


def test_build_info_lists_architectures_as_digits_lowest_first() -> None:
    info = fused_opt.build_info()
    cubins, ptx = info["cuda_archs"], info["ptx_archs"]
    assert cubins == sorted(cubins, key=int)
    assert ptx == sorted({cubins[0], cubins[-1]}, key=int) if IS_CUDA else cubins == ptx == []
    if IS_CUDA:
        assert re.fullmatch(r"\d+\.\d+", str(info["cuda_version"]))


def test_build_info_returns_a_new_dict() -> None:
    fused_opt.build_info()["cuda_archs"].append("1")
    assert "1" not in fused_opt.build_info()["cuda_archs"]


def test_levels_of_the_cpu_loops_start_at_the_baseline() -> None:
    assert tuple(_C.cpu_isas()) == CPU_ISAS[: len(_C.cpu_isas())]


# ---- GPU code ------------------------------------------------------------------------------------


@needs_cuda_code
def test_module_holds_exactly_the_architectures_it_reports(cuobjdump: str) -> None:
    listing = run(cuobjdump, "--list-elf", "--list-ptx", MODULE)
    cubins = re.findall(r"\.sm_(\d+)\.cubin", listing)
    ptx = re.findall(r"\.sm_(\d+)\.ptx", listing)
    assert sorted(set(cubins), key=int) == _C.cuda_archs
    assert sorted(set(ptx), key=int) == _C.ptx_archs


@needs_cuda_code
def test_no_kernel_uses_a_stack_frame_or_spills(cuobjdump: str) -> None:
    # A kernel parameter that is indexed while not `const __grid_constant__` is copied to a stack
    # frame of 19 KB that no spill count shows; LOCAL covers the spills.
    usage = run(cuobjdump, "--dump-resource-usage", MODULE)
    rows = re.findall(r"Function (\w+):\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    steps = [name for name, _, _ in rows if "step_kernel" in name]
    assert len(steps) >= len(_C.cuda_archs)
    assert [row for row in rows if row[1:] != ("0", "0")] == []


@needs_cuda_code
def test_every_step_kernel_loads_and_stores_16_bytes_at_a_time(cuobjdump: str) -> None:
    arch = "90" if "90" in _C.cuda_archs else _C.cuda_archs[-1]
    sass = run(cuobjdump, "--dump-sass", "--gpu-architecture", f"sm_{arch}", MODULE)
    _, *functions = re.split(r"Function : ", sass)
    steps = {text.split(maxsplit=1)[0]: text for text in functions if "step_kernel" in text[:2000]}
    assert steps
    for name, text in steps.items():
        assert re.search(r"\bLDG\.E\S*\.128", text), f"{name}: no 128-bit load"
        assert re.search(r"\bSTG\.E\S*\.128", text), f"{name}: no 128-bit store"


# ---- Linking -------------------------------------------------------------------------------------


def test_module_loads_without_torch_or_a_driver() -> None:
    code = f"""
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("_C", {str(MODULE)!r})
spec = importlib.util.spec_from_file_location("_C", {str(MODULE)!r}, loader=loader)
module = importlib.util.module_from_spec(spec)
loader.exec_module(module)
assert module.cpu_isa() in module.cpu_isas()
assert not any(name.split(".")[0] in ("torch", "numpy") for name in sys.modules)
print(open("/proc/self/maps").read())
"""
    mapped = run(sys.executable, "-c", code)
    assert MODULE.name in mapped
    for library in ("libtorch", "libc10", "libcuda.so", "libcudart", "libnvidia"):
        assert library not in mapped


def test_module_names_only_system_libraries() -> None:
    dynamic = run(tool("readelf"), "--dynamic", "--wide", MODULE)
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\.so", dynamic)
    system = {"libgomp", "libstdc++", "libgcc_s", "libc", "libm", "libdl", "librt", "libpthread"}
    assert {name for name in needed if not name.startswith("ld-linux")} <= system
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_module_exports_nothing_of_its_own_but_its_entry_point() -> None:
    # torch loads a CUDA runtime into the global scope: a cuda* name exported here would bind to it.
    symbols = run(tool("nm"), "--dynamic", "--defined-only", "--demangle", "--format=posix", MODULE)
    names = [line.rsplit(maxsplit=3)[0] for line in symbols.splitlines()]
    assert "PyInit__C" in names
    assert [name for name in names if re.search(r"cuda|fused_opt", name, re.IGNORECASE)] == []


# ---- CMake ---------------------------------------------------------------------------------------


def cmake_tool(name: str, folder_attribute: str) -> str:
    """Returns cmake or ninja, from its pip package or from PATH, as setup.py does."""
    try:
        folder = str(getattr(importlib.import_module(name), folder_attribute))
    except (ImportError, AttributeError):
        return tool(name)
    return shutil.which(name, path=folder) or tool(name)


@pytest.fixture(scope="module")
def cmake() -> str:
    """The path of cmake, where a native build is possible."""
    pytest.importorskip("pybind11")
    tool("c++")
    if not (ROOT / "CMakeLists.txt").is_file():
        pytest.skip("fused_opt runs from an installed copy, without its sources")
    return cmake_tool("cmake", "CMAKE_BIN_DIR")


def configure(cmake: str, build: Path, *options: str, **environ: str) -> str:
    return run(
        cmake,
        f"-S{ROOT}",
        f"-B{build}",
        "-GNinja",
        f"-DCMAKE_MAKE_PROGRAM={cmake_tool('ninja', 'BIN_DIR')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build / 'out'}",
        *options,
        **environ,
    )


def test_each_cpu_level_exports_one_symbol_and_no_weak_one(cmake: str, tmp_path: Path) -> None:
    # The linker keeps one copy of a weak function. If that copy came from the AVX-512 unit, the
    # baseline would run it too, and die on a machine without AVX-512.
    nm = tool("nm")
    configure(cmake, tmp_path, FUSED_OPT_CUDA="0")
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    objects = {
        re.findall(r"-DFUSED_OPT_ISA=(\w+)", entry["command"])[0]: tmp_path / entry["output"]
        for entry in commands
        if entry["file"].endswith("cpu/kernels.cpp")
    }
    assert set(objects) >= {isa.replace("-", "_") for isa in _C.cpu_isas()}
    run(cmake, "--build", tmp_path, "--target", *(f"kernels_{isa}" for isa in objects))
    for isa, path in objects.items():
        lines = run(nm, "--defined-only", "--extern-only", "--format=posix", path).splitlines()
        assert [line.split()[:2] for line in lines] == [[f"fused_opt_kernels_{isa}", "T"]]


def test_no_unit_is_compiled_for_the_building_machine(cmake: str, tmp_path: Path) -> None:
    configure(cmake, tmp_path, FUSED_OPT_CUDA="0")
    commands = (tmp_path / "compile_commands.json").read_text()
    assert "-march=native" not in commands
    assert "-ffast-math" not in commands


@pytest.mark.slow
@needs_cuda_code
def test_a_kept_build_folder_follows_a_new_request(cmake: str, tmp_path: Path) -> None:
    nvcc = tool("nvcc")
    build, shim = tmp_path / "build", tmp_path / "nvcc"
    shim.write_text(f'#!/bin/sh\nexec {nvcc} "$@"\n')
    shim.chmod(0o755)

    def cuda_code() -> list[str]:
        commands = (build / "compile_commands.json").read_text()
        return re.findall(r"code=\[(.+?)\]", commands)

    configure(cmake, build, FUSED_OPT_NVCC=nvcc, FUSED_OPT_CUDA_ARCHS="80;90")
    assert cuda_code() == ["compute_80,sm_80", "compute_90,sm_90"]
    configure(cmake, build, FUSED_OPT_NVCC=nvcc, FUSED_OPT_CUDA_ARCHS="90")
    assert cuda_code() == ["compute_90,sm_90"]
    with pytest.raises(AssertionError, match=r"cmake\s+--fresh"):
        configure(cmake, build, FUSED_OPT_NVCC=str(shim), FUSED_OPT_CUDA_ARCHS="90")
    configure(cmake, build, "--fresh", FUSED_OPT_NVCC=str(shim), FUSED_OPT_CUDA_ARCHS="90")
    assert str(shim) in (build / "compile_commands.json").read_text()


# ---- Without a build -----------------------------------------------------------------------------


def test_without_the_native_module_import_works_and_use_names_the_cure(tmp_path: Path) -> None:
    package = Path(fused_opt.__file__).parent
    leave_out = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(package, tmp_path / "fused_opt", ignore=leave_out)
    # Blocked by name, since the finder of an editable install knows where the module is.
    code = f"""
import sys
sys.modules["fused_opt._C"] = None
import torch, fused_opt
assert fused_opt.__file__.startswith({str(tmp_path)!r})
weight = torch.zeros(3)
for use in (
    lambda: fused_opt.SGD([weight], lr=0.1),
    lambda: fused_opt.EMA([weight]),
    lambda: fused_opt.functional.sgd_step_([weight], [weight], [], lr=0.1),
    lambda: fused_opt.functional.ema_update_([weight], [weight], decay=0.9),
    lambda: fused_opt.build_info(),
):
    try:
        use()
        print("it ran")
    except ImportError as error:
        print(str(error).replace(chr(10), " "))
"""
    messages = run(sys.executable, "-c", code, cwd=tmp_path).splitlines()
    assert len(messages) == 5
    for message in messages:
        assert "fused_opt._C" in message
        assert "pip install" in message
