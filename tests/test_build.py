"""What the build put into ``fused_opt._C``: static checks that need no GPU and no driver."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import cubins
import pytest

import fused_opt
from fused_opt import _C, _toolchain

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


def lacking(what: str) -> NoReturn:
    """Skips the test; in continuous integration, where nobody reads what is skipped, fails it."""
    if os.environ.get("CI"):
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


def tool(name: str) -> str:
    """Returns the path of a system program, or skips the test."""
    return shutil.which(name) or lacking(f"{name} is not installed")


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    """The path of cuobjdump."""
    return cubins.find_cuobjdump() or lacking(f"cuobjdump is not installed ({cubins.CURE})")


# ---- build_info ----------------------------------------------------------------------------------


def test_build_info_describes_the_module() -> None:
    info = fused_opt.build_info()
    assert set(info) == {"version", "cuda_version", "cuda_archs", "ptx_archs", "cpu_isa"}
    assert info["version"] == fused_opt.__version__
    assert info["cpu_isa"] in CPU_ISAS
    assert info["cpu_isa"] in _C.cpu_isas()


def test_build_info_lists_architectures_as_digits_lowest_first() -> None:
    info = fused_opt.build_info()
    archs, ptx = info["cuda_archs"], info["ptx_archs"]
    assert archs == sorted(archs, key=int)
    assert ptx == sorted({archs[0], archs[-1]}, key=int) if IS_CUDA else archs == ptx == []
    if IS_CUDA:
        assert re.fullmatch(r"\d+\.\d+", str(info["cuda_version"]))


def test_build_info_returns_a_new_dict() -> None:
    fused_opt.build_info()["cuda_archs"].append("1")
    assert "1" not in fused_opt.build_info()["cuda_archs"]


def test_levels_of_the_cpu_loops_start_at_the_baseline() -> None:
    assert tuple(_C.cpu_isas()) == CPU_ISAS[: len(_C.cpu_isas())]


# ---- GPU code ------------------------------------------------------------------------------------


def reported_archs(module: Path) -> tuple[list[str], list[str]]:
    """Returns what a module, loaded in a process of its own, says of itself."""
    code = f"""
import importlib.machinery, importlib.util, json
loader = importlib.machinery.ExtensionFileLoader("_C", {str(module)!r})
module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
loader.exec_module(module)
print(json.dumps([module.cuda_archs, module.ptx_archs]))
"""
    machine_code, ptx = json.loads(run(sys.executable, "-c", code))
    return machine_code, ptx


@needs_cuda_code
def test_module_holds_exactly_the_architectures_it_reports(cuobjdump: str) -> None:
    assert cubins.architectures(cuobjdump, MODULE) == (_C.cuda_archs, _C.ptx_archs)


@needs_cuda_code
def test_no_kernel_of_any_architecture_has_a_stack_frame_or_spills(cuobjdump: str) -> None:
    assert cubins.problems(cubins.kernels(cuobjdump, MODULE), _C.cuda_archs) == []


SPILLING = """
__global__ void spilling(const float* in, float* out) {
  float values[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) values[i] = in[threadIdx.x * 64 + i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) out[threadIdx.x * 64 + i] = values[63 - i] * values[i * 7 % 64];
}
__global__ void indexing(const float* in, float* out, int n) {
  float values[64];
  for (int i = 0; i < n; ++i) values[i * n % 64] = in[i];
  out[0] = values[n];
}
__global__ void clean(float* out) { out[threadIdx.x] *= 2; }
"""


def test_spilled_registers_and_arrays_in_memory_are_seen(
    nvcc: str, cuobjdump: str, tmp_path: Path
) -> None:
    source, cubin = tmp_path / "spilling.cu", tmp_path / "spilling.cubin"
    source.write_text(SPILLING)
    run(nvcc, "-cubin", "-arch=sm_80", "-maxrregcount=24", source, "-o", cubin)
    found = {kernel.name: kernel.stack for kernel in cubins.kernels(cuobjdump, cubin)}
    spilling, indexing, clean = (
        next(found[name] for name in found if kind in name)
        for kind in ("spilling", "indexing", "clean")
    )
    assert spilling >= 4  # The compiler reports 360 bytes of stack and as many of spills.
    assert indexing == 4 * 64
    assert clean == 0


def test_a_kernel_that_one_architecture_lacks_is_a_problem() -> None:
    def kernel(arch: str, name: str, stack: int = 0) -> cubins.Kernel:
        return cubins.Kernel(arch, name, stack, 0)

    whole = [kernel(arch, kind) for arch in ("80", "90") for kind in cubins.KINDS]
    assert cubins.problems(whole, ["80", "90"]) == []
    assert cubins.problems(whole[:-1], ["80", "90"]) == [f"sm_90 lacks {cubins.KINDS[-1]}"]
    assert len(cubins.problems(whole, ["80", "90", "100"])) == len(cubins.KINDS)
    assert cubins.problems([], ["80"]) == [f"no {kind} was found" for kind in cubins.KINDS]
    spilled = [*whole, kernel("80", "more", 8), kernel("90", "more")]
    assert cubins.problems(spilled, ["80", "90"]) == [
        "sm_80 more: stack frame 8, local 0 bytes",
    ]


@needs_cuda_code
def test_every_kernel_loads_and_stores_16_bytes_at_a_time(cuobjdump: str) -> None:
    arch = "90" if "90" in _C.cuda_archs else _C.cuda_archs[-1]
    sass = run(cuobjdump, "--dump-sass", "--gpu-architecture", f"sm_{arch}", MODULE)
    _, *functions = re.split(r"Function : ", sass)
    kernels = {text.split(maxsplit=1)[0]: text for text in functions}
    for kind in ("step_kernel", "norm_kernel", "scale_kernel"):
        found = {name: text for name, text in kernels.items() if kind in name}
        assert found
        for name, text in found.items():
            assert re.search(r"\bLDG\.E\S*\.128", text), f"{name}: no 128-bit load"
            if kind != "norm_kernel":
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


@pytest.mark.parametrize("option", ["-DCMAKE_CUDA_ARCHITECTURES=90"])
def test_a_request_that_the_build_does_not_read_is_refused(
    cmake: str, tmp_path: Path, option: str
) -> None:
    with pytest.raises(AssertionError, match="FUSED_OPT_CUDA_ARCHS='90' cmake --fresh"):
        configure(cmake, tmp_path, option, FUSED_OPT_CUDA="0")


# ---- CMake and nvcc ------------------------------------------------------------------------------

#: Blank variables count as unset, for CMake as for the resolver: what a test asks for is all.
NOTHING_NAMED = dict.fromkeys(
    (
        *("FUSED_OPT_CUDA", "FUSED_OPT_NVCC", "CUDACXX", "CUDA_HOME", "CUDA_PATH"),
        *_toolchain.ARCH_VARIABLES,
    ),
    "",
)

#: CMake identifies nvcc without naming an architecture. A distribution's nvcc then took sm_30 for
#: granted, and a newer toolkit's ptxas, first on PATH, did not know that any more.
SHIM = """#!/bin/sh
case " $* " in
  *arch*|*gencode*) exec {nvcc} "$@" ;;
  *) exec {nvcc} -Xptxas -arch=sm_30 "$@" ;;
esac
"""

SM_30 = "ptxas fatal : Value 'sm_30' is not defined for option 'gpu-name'"


@pytest.fixture(scope="module")
def nvcc() -> str:
    """The path of a healthy nvcc."""
    try:
        found = _toolchain.resolve().nvcc
    except _toolchain.ToolchainError as error:
        pytest.skip(f"no healthy nvcc here: {error}")
    if found is None:
        pytest.skip("no nvcc here")
    return found.path


def unwrapped(error: AssertionError) -> str:
    """Returns a message without the line breaks and the indentation that CMake gives it."""
    return " ".join(str(error).split())


def write_script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def shim(nvcc: str, tmp_path: Path) -> Path:
    """The path of an nvcc that fails where CMake identifies it, and nowhere else."""
    return write_script(tmp_path / "shim" / "nvcc", SHIM.format(nvcc=nvcc))


@pytest.fixture
def shim_first(shim: Path, nvcc: str) -> dict[str, str]:
    """An environment with the shim first on PATH, and a healthy nvcc behind it."""
    path = os.pathsep.join([str(shim.parent), str(Path(nvcc).parent), os.environ["PATH"]])
    return {**NOTHING_NAMED, "PATH": path}


def test_plain_cmake_fails_with_the_shim_whatever_the_architectures(
    cmake: str, shim: Path, shim_first: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(two_lines LANGUAGES CUDA)\n"
    )
    command = [cmake, f"-S{tmp_path}", f"-B{tmp_path / 'build'}", "-GNinja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={cmake_tool('ninja', 'BIN_DIR')}"]
    with pytest.raises(AssertionError) as caught:
        run(*command, **{**shim_first, "CUDAARCHS": "90"})
    message = unwrapped(caught.value)
    assert f"Compiler: {shim}" in message
    assert SM_30 in message


@pytest.mark.slow
def test_pip_install_takes_the_healthy_nvcc_behind_the_shim(
    cmake: str, shim: Path, shim_first: dict[str, str], tmp_path: Path
) -> None:
    if not all(map(importlib.util.find_spec, ("pip", "setuptools"))):
        pytest.skip("pip and setuptools are not installed")
    source, target = tmp_path / "source", tmp_path / "target"
    for name in ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, source)
    for name in ("benchmarks", "csrc", "fused_opt"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    (source / "setup.cfg").write_text("[build_ext]\ndebug=1\n")  # Not optimized, to be quick.
    pip = [sys.executable, "-m", "pip", "install", "-v", "--no-index", "--no-deps"]
    pip += ["--no-build-isolation", "--target", str(target), str(source)]
    output = run(*pip, **{**shim_first, "FUSED_OPT_CUDA_ARCHS": "90"})
    assert f"*** fused_opt: passed over {shim} (CUDA " in output
    assert "mixed or broken toolkit" in output
    assert SM_30 in output
    (module,) = (target / "fused_opt").glob("_C*.so")
    assert reported_archs(module) == (["90"], ["90"])


def test_only_the_shim_is_an_error_that_names_its_parts_and_the_cure(
    shim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_toolchain, "CUDA_ROOT_PARENT", tmp_path)
    monkeypatch.setattr(_toolchain, "_package_folders", list)
    elsewhere = os.environ["PATH"].split(os.pathsep)
    path = os.pathsep.join(
        [str(shim.parent), *(d for d in elsewhere if not Path(d, "nvcc").exists())]
    )
    if shutil.which("g++", path=path) is None:
        pytest.skip("g++ lies beside an nvcc")
    with pytest.raises(_toolchain.ToolchainError) as caught:
        _toolchain.resolve({"PATH": path})
    head, about_shim, tail = str(caught.value).splitlines()
    assert head == "no nvcc on this machine is usable:"
    expected = (
        rf"  {shim} \(CUDA (\S+), from PATH\): mixed or broken toolkit: with no architecture "
    )
    expected += (
        rf"named, its /\S+/ptxas \(CUDA \1\) fails: {SM_30}\. Set FUSED_OPT_NVCC to the nvcc"
    )
    assert re.match(expected, about_shim)
    assert tail == "FUSED_OPT_NVCC names another nvcc; FUSED_OPT_CUDA=0 builds for the CPU only."


def test_cmake_refuses_the_shim_when_it_is_named(
    cmake: str, shim: Path, shim_first: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError) as caught:
        configure(cmake, tmp_path / "build", **{**shim_first, "CUDACXX": str(shim)})
    message = unwrapped(caught.value)
    assert f"{shim} (CUDA " in message
    assert "mixed or broken toolkit: with no architecture named, its /" in message
    assert f"fails: {SM_30}. Set FUSED_OPT_NVCC to the nvcc of" in message
    assert "Correct CUDACXX, or unset it to let the build choose." in message


@pytest.mark.slow
def test_the_module_holds_exactly_the_architectures_asked_for(
    cmake: str, nvcc: str, cuobjdump: str, tmp_path: Path
) -> None:
    # One build folder throughout: it follows each new request.
    for variable, request, archs, ptx in (
        ("FUSED_OPT_CUDA_ARCHS", "90", ["90"], ["90"]),
        ("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX", ["80", "90"], ["80", "90"]),
        ("CUDAARCHS", "86-real;90-virtual", ["86"], ["86", "90"]),
        ("TORCH_CUDA_ARCH_LIST", "Ada", ["89"], ["89"]),
    ):
        environ = {**NOTHING_NAMED, "FUSED_OPT_NVCC": nvcc, variable: request}
        configure(cmake, tmp_path, "-DCMAKE_BUILD_TYPE=None", **environ)
        run(cmake, "--build", tmp_path, **environ)
        (module,) = (tmp_path / "out").glob("_C*.so")
        assert cubins.architectures(cuobjdump, module) == (archs, ptx)
        assert reported_archs(module) == (archs, ptx)


@pytest.mark.slow
def test_a_kept_build_folder_follows_a_new_request(cmake: str, nvcc: str, tmp_path: Path) -> None:
    build = tmp_path / "build"
    other = write_script(tmp_path / "nvcc", f'#!/bin/sh\nexec {nvcc} "$@"\n')

    def cuda_code() -> list[str]:
        commands = (build / "compile_commands.json").read_text()
        return re.findall(r"code=\[(.+?)\]", commands)

    def ask(nvcc: str | Path, archs: str, *options: str) -> None:
        named = {"FUSED_OPT_NVCC": str(nvcc), "FUSED_OPT_CUDA_ARCHS": archs}
        configure(cmake, build, *options, **{**NOTHING_NAMED, **named})

    ask(nvcc, "80;90")
    assert cuda_code() == ["compute_80,sm_80", "compute_90,sm_90"]
    ask(nvcc, "90")
    assert cuda_code() == ["compute_90,sm_90"]
    with pytest.raises(AssertionError, match=r"cmake\s+--fresh"):
        ask(other, "90")
    ask(other, "90", "--fresh")
    assert str(other) in (build / "compile_commands.json").read_text()
    (rerun,) = re.findall(r"^build build\.ninja.*", (build / "build.ninja").read_text(), re.M)
    assert str(other) in rerun  # An nvcc that is updated in place configures anew.


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
