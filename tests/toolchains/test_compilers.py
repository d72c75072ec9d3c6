"""The resolver and the build with real compilers: one too old, healthy ones, and mixed pairs.

`make test-toolchains` runs these; `make test` does not, since they download about 1.3 GB.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import cmake
import ninja
import pytest
from compilers import (
    DEVELOPMENT,
    NVCC,
    ROOT,
    SYSTEM_PATH,
    Compiler,
    call,
    debian,
    pypi,
    run,
    with_foreign_ptxas,
)

from fused_opt import _toolchain
from fused_opt._toolchain import Candidate, Nvcc, ToolchainError, inspect_nvcc, resolve

CMAKE = Path(cmake.CMAKE_BIN_DIR) / "cmake"
NINJA = Path(ninja.BIN_DIR) / "ninja"
LOAD = """
import importlib.machinery, importlib.util, sys
loader = importlib.machinery.ExtensionFileLoader("_C", sys.argv[1])
spec = importlib.util.spec_from_file_location("_C", sys.argv[1], loader=loader)
module = importlib.util.module_from_spec(spec)
loader.exec_module(module)
print(module.cuda_version, ",".join(module.cuda_archs), ",".join(module.ptx_archs))
"""


@pytest.fixture(scope="session")
def debian_11_8() -> Compiler:
    """The nvcc of Debian 12, without the headers that building would need."""
    return debian("bookworm", (11, 8), NVCC)


@pytest.fixture(scope="session")
def debian_12_4() -> Compiler:
    """The toolkit of Debian 13."""
    return debian("trixie", (12, 4), {**NVCC, **DEVELOPMENT})


@pytest.fixture(scope="session")
def pypi_13_0() -> Compiler:
    """The first complete nvcc on PyPI; its CUDA runtime lies where nvcc does not look."""
    return pypi("13.0.2")


@pytest.fixture(scope="session")
def pypi_13_4() -> Compiler:
    """The newest toolkit on PyPI, with other folders and one more architecture."""
    return pypi("13.4.3")


@pytest.fixture(scope="session")
def system() -> Compiler:
    """The toolkit that NVIDIA's packages install on this machine."""
    roots = sorted(Path("/usr/local").glob("cuda-*"), key=_toolchain._version_in_name)
    found = [root / "bin" / "nvcc" for root in roots if (root / "bin" / "nvcc").is_file()]
    if not found:
        pytest.skip("no toolkit in /usr/local")
    release = re.search(r"release (\d+)\.(\d+)", run(found[-1], "--version"))
    assert release is not None
    return Compiler("system", (int(release[1]), int(release[2])), found[-1])


@pytest.fixture
def compiler(request: pytest.FixtureRequest) -> Compiler:
    """The compiler that the test's parameter names."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def other(request: pytest.FixtureRequest) -> Compiler:
    """A second one."""
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def hidden_toolkits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Leaves the resolver only what a test names; what this machine has besides plays no part."""
    monkeypatch.setattr(_toolchain, "CUDA_ROOT_PARENT", tmp_path / "no-cuda")
    monkeypatch.setattr(_toolchain, "_package_folders", list)
    monkeypatch.setattr(_toolchain, "driver_release", lambda: None)


def inspect(compiler: Compiler, path: str = "") -> Nvcc:
    candidate = Candidate(str(compiler.nvcc), "FUSED_OPT_NVCC", True)
    return inspect_nvcc(candidate, {"PATH": path or compiler.path})


def explicit(compiler: Compiler, path: str = "") -> dict[str, str]:
    return {"PATH": path or compiler.path, "FUSED_OPT_NVCC": str(compiler.nvcc)}


def dotted(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"


# ---- Too old -------------------------------------------------------------------------------------


def test_debians_nvcc_11_8_is_refused_for_its_age(debian_11_8: Compiler) -> None:
    with pytest.raises(ToolchainError) as error:
        resolve(explicit(debian_11_8))
    message = str(error.value)
    assert f"{debian_11_8.nvcc} (CUDA 11.8, from FUSED_OPT_NVCC)" in message
    assert "CUDA 12.1 or newer is needed (kernel parameters above 4 KB)" in message
    assert "mixed" not in message


# ---- Healthy -------------------------------------------------------------------------------------

#: nvcc's range from 70 on: the kernels need parameters that older GPUs do not take.
RANGES = {
    (12, 4): [70, 72, 75, 80, 86, 87, 89, 90],
    (13, 0): [75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121],
    (13, 4): [75, 80, 86, 87, 88, 89, 90, 100, 103, 107, 110, 120, 121],
}

healthy_ones = pytest.mark.parametrize(
    "compiler", ["debian_12_4", "pypi_13_0", "pypi_13_4", "system"], indirect=True
)


def require_healthy(nvcc: Nvcc) -> None:
    """Passes over a compiler that this machine's g++ is too new for, if it says so."""
    if nvcc.healthy:
        return
    assert nvcc.problem is not None
    assert "host compiler" in nvcc.problem, nvcc.problem
    assert "CUDAHOSTCXX" in nvcc.problem
    pytest.skip(f"{nvcc}: {nvcc.problem}")


@healthy_ones
def test_a_whole_toolkit_is_understood(compiler: Compiler) -> None:
    nvcc = inspect(compiler)
    require_healthy(nvcc)
    assert nvcc.release == compiler.release
    assert [arch for arch in nvcc.archs if arch >= 70] == RANGES.get(compiler.release, nvcc.archs)
    assert nvcc.default_arch == (52 if compiler.release < (13, 0) else 75)
    assert {tool.release for tool in nvcc.tools} == {compiler.release}
    assert re.fullmatch(r"\S+ \d+(\.\d+)+", nvcc.host_compiler or "")


@healthy_ones
def test_the_kernels_build_for_the_whole_range(compiler: Compiler, tmp_path: Path) -> None:
    nvcc = inspect(compiler)
    require_healthy(nvcc)
    build = tmp_path / "build"
    settings = {
        "CMAKE_MAKE_PROGRAM": NINJA,
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": tmp_path / "out",
        "Python_EXECUTABLE": sys.executable,
    }
    options = [f"-D{key}={value}" for key, value in settings.items()]
    environ = {**explicit(compiler), "FUSED_OPT_CUDA": "1", "FUSED_OPT_CUDA_ARCHS": "all"}
    run(CMAKE, f"-S{ROOT}", f"-B{build}", "-GNinja", *options, environ=environ)
    run(CMAKE, "--build", build, environ=environ)

    (module,) = (tmp_path / "out").glob("_C*.so")
    archs = [str(arch) for arch in nvcc.archs if arch >= 70]
    ends = [archs[0], archs[-1]]
    reported = run(sys.executable, "-c", LOAD, module, environ={"PATH": SYSTEM_PATH})
    assert reported.split() == [dotted(compiler.release), ",".join(archs), ",".join(ends)]
    assert code_in(module) == (archs, ends)


def code_in(module: Path) -> tuple[list[str], list[str]]:
    """Returns the architectures of the cubins and of the PTX in a module."""
    pattern = "nvidia/*/bin/cuobjdump"
    tools = [path for folder in map(Path, sys.path) for path in sorted(folder.glob(pattern))]
    assert tools, "cuobjdump is missing: pip install nvidia-cuda-cuobjdump"
    listing = run(tools[0], "--list-elf", "--list-ptx", module)
    found = (set(re.findall(rf"\.sm_(\d+)\.{kind}", listing)) for kind in ("cubin", "ptx"))
    cubins, ptx = (sorted(archs, key=int) for archs in found)
    return cubins, ptx


def test_a_toolkit_from_pypi_is_found_without_path(
    pypi_13_4: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = pypi_13_4.bin.parents[2]
    monkeypatch.setattr(_toolchain, "_package_folders", lambda: [str(site)])
    nvcc = resolve({"PATH": SYSTEM_PATH}).nvcc
    assert nvcc is not None
    assert (nvcc.path, nvcc.candidate.source) == (str(pypi_13_4.nvcc), "pip")


# ---- Mixed ---------------------------------------------------------------------------------------

mixed_pairs = pytest.mark.parametrize(
    ("compiler", "other"),
    [
        ("debian_12_4", "debian_11_8"),
        ("debian_12_4", "pypi_13_0"),
        ("pypi_13_0", "debian_12_4"),
        ("pypi_13_0", "pypi_13_4"),
    ],
    indirect=True,
)


@mixed_pairs
def test_a_mixed_pair_is_refused_with_both_versions(
    compiler: Compiler, other: Compiler, tmp_path: Path
) -> None:
    mixed = with_foreign_ptxas(compiler, other, tmp_path)
    with pytest.raises(ToolchainError) as error:
        resolve(explicit(mixed))
    message = str(error.value)
    assert f"{mixed.nvcc} (CUDA {dotted(compiler.release)}, from FUSED_OPT_NVCC)" in message
    assert f"mixed or broken toolkit: it runs {mixed.bin}/ptxas (CUDA {dotted(other.release)})" in (
        message
    )
    assert "FUSED_OPT_NVCC to" in message


@mixed_pairs
def test_a_mixed_pair_first_on_path_is_passed_over(
    compiler: Compiler, other: Compiler, pypi_13_4: Compiler, tmp_path: Path
) -> None:
    mixed = with_foreign_ptxas(compiler, other, tmp_path)
    path = os.pathsep.join([str(mixed.bin), str(pypi_13_4.bin), SYSTEM_PATH])
    toolchain = resolve({"PATH": path})
    assert toolchain.nvcc is not None
    assert toolchain.nvcc.path == str(pypi_13_4.nvcc)
    (note,) = [note for note in toolchain.notes if "passed over" in note]
    assert "mixed or broken toolkit" in note
    assert str(mixed.nvcc) in note


def test_the_failure_of_debians_layout(
    debian_12_4: Compiler, pypi_13_0: Compiler, tmp_path: Path
) -> None:
    # A newer toolkit ahead on PATH: Debian's nvcc takes its ptxas, which no longer knows nvcc's
    # default architecture, and CMake fails while it identifies the compiler.
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(two_lines LANGUAGES CXX CUDA)\n"
    )
    path = os.pathsep.join([str(pypi_13_0.bin), debian_12_4.path])
    options = (f"-S{tmp_path}", f"-B{tmp_path}/build", "-GNinja", f"-DCMAKE_MAKE_PROGRAM={NINJA}")
    status, output = call(CMAKE, *options, environ={"PATH": path, "CUDACXX": str(debian_12_4.nvcc)})
    assert status != 0
    assert "'sm_52' is not defined for option 'gpu-name'" in re.sub(r"\s+", " ", output)

    problem = inspect(debian_12_4, path).problem
    assert problem is not None
    assert "mixed or broken toolkit" in problem
    assert f"{pypi_13_0.bin}/ptxas (CUDA 13.0)" in problem
    nvcc = resolve({"PATH": path}).nvcc
    assert nvcc is not None
    assert nvcc.path == str(pypi_13_0.nvcc)
