"""The choice of nvcc and architectures, with shell scripts that stand in for compilers."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fused_opt import _toolchain
from fused_opt._toolchain import Nvcc, Toolchain, ToolchainError, parse_archs, resolve

SCRIPT = Path(_toolchain.__file__)

FAKE_NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  --list-gpu-arch) for arch in {archs}; do echo "compute_$arch"; done ;;
  *) {compile} ;;
esac
"""

BROKEN = "echo \"ptxas fatal   : Value 'sm_30' is not defined for option 'gpu-name'\" >&2; exit 255"

MakeNvcc = Callable[..., Path]


@pytest.fixture
def make_nvcc(tmp_path: Path) -> MakeNvcc:
    """Writes a fake nvcc into ``tmp_path/<folder>/bin`` and returns its path."""

    def make(
        folder: str,
        release: str = "13.0",
        archs: str = "75 80 86 87 88 89 90 100 103 110 120 121",
        on_compile: str = "exit 0",
    ) -> Path:
        path = tmp_path / folder / "bin" / "nvcc"
        path.parent.mkdir(parents=True)
        path.write_text(FAKE_NVCC.format(release=release, archs=archs, compile=on_compile))
        path.chmod(0o755)
        return path

    return make


@pytest.fixture(autouse=True)
def no_system_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks for /usr/local/cuda* in the test's own folder instead."""
    monkeypatch.setattr(_toolchain, "CUDA_ROOT_PARENT", tmp_path / "usr_local")


def on_path(*nvccs: Path) -> dict[str, str]:
    return {"PATH": os.pathsep.join(str(nvcc.parent) for nvcc in nvccs)}


def chosen(environ: Mapping[str, str]) -> str:
    nvcc = resolve(environ).nvcc
    assert nvcc is not None
    return nvcc.path


# ---- Which nvcc ----------------------------------------------------------------------------------


def test_without_nvcc_the_build_is_cpu_only_and_says_so(tmp_path: Path) -> None:
    toolchain = resolve({"PATH": str(tmp_path)})
    assert toolchain.nvcc is None
    assert toolchain.cubins == toolchain.ptx == ()
    (note,) = toolchain.notes
    assert "CPU-ONLY" in note
    assert "FUSED_OPT_NVCC" in note


@pytest.mark.parametrize("name", ["FUSED_OPT_NVCC", "CUDACXX"])
def test_named_compiler_wins_over_path(make_nvcc: MakeNvcc, name: str) -> None:
    first, named = make_nvcc("first"), make_nvcc("named")
    assert chosen({**on_path(first), name: str(named)}) == str(named)


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_named_toolkit_wins_over_path(make_nvcc: MakeNvcc, name: str) -> None:
    first, named = make_nvcc("first"), make_nvcc("named")
    assert chosen({**on_path(first), name: str(named.parent.parent)}) == str(named)


def test_named_candidates_are_tried_in_their_order(make_nvcc: MakeNvcc) -> None:
    environ = on_path(make_nvcc("on_path"))
    for name in ("CUDA_PATH", "CUDA_HOME", "CUDACXX", "FUSED_OPT_NVCC"):
        nvcc = make_nvcc(name)
        environ[name] = str(nvcc.parent.parent if name in ("CUDA_HOME", "CUDA_PATH") else nvcc)
        assert chosen(environ) == str(nvcc)


def test_blank_variables_name_nothing(make_nvcc: MakeNvcc) -> None:
    nvcc = make_nvcc("only")
    blank = dict.fromkeys(("FUSED_OPT_NVCC", "CUDACXX", "CUDA_HOME", "FUSED_OPT_CUDA"), " ")
    assert chosen({**on_path(nvcc), **blank}) == str(nvcc)


def test_a_bare_command_name_is_looked_up_on_path(make_nvcc: MakeNvcc) -> None:
    nvcc = make_nvcc("only")
    assert chosen({**on_path(nvcc), "CUDACXX": "nvcc"}) == str(nvcc)


def test_unhealthy_nvcc_on_path_is_passed_over_with_its_reason(make_nvcc: MakeNvcc) -> None:
    broken, old, healthy = make_nvcc("a", on_compile=BROKEN), make_nvcc("b", "11.8"), make_nvcc("c")
    toolchain = resolve(on_path(broken, old, healthy))
    assert toolchain.nvcc is not None
    assert toolchain.nvcc.path == str(healthy)
    about_broken, about_old = toolchain.notes
    assert str(broken) in about_broken
    assert "sm_30" in about_broken
    assert str(old) in about_old
    assert "11.8" in about_old


def test_toolkit_folders_are_tried_after_path_newest_first(make_nvcc: MakeNvcc) -> None:
    for version in ("12.4", "12.10", "13.0"):
        make_nvcc(f"usr_local/cuda-{version}", release=version)
    assert chosen({"PATH": ""}).endswith("cuda-13.0/bin/nvcc")
    make_nvcc("usr_local/cuda", release="12.4")
    assert chosen({"PATH": ""}).endswith("cuda/bin/nvcc")


def test_ten_is_newer_than_four(make_nvcc: MakeNvcc) -> None:
    for version in ("12.4", "12.10"):
        make_nvcc(f"usr_local/cuda-{version}", release=version)
    assert chosen({"PATH": ""}).endswith("cuda-12.10/bin/nvcc")


def test_one_file_under_two_names_is_tried_once(make_nvcc: MakeNvcc, tmp_path: Path) -> None:
    nvcc = make_nvcc("usr_local/cuda-13.0", on_compile=BROKEN)
    (tmp_path / "usr_local" / "cuda").symlink_to("cuda-13.0")
    with pytest.raises(ToolchainError) as caught:
        resolve(on_path(nvcc))
    assert str(caught.value).count("sm_30") == 1


def test_a_host_compiler_named_for_cuda_is_used_in_the_check(make_nvcc: MakeNvcc) -> None:
    picky = (
        'case "$*" in *"-ccbin g++-12"*) exit 0 ;; *) echo "error: gcc too new" >&2; exit 1 ;; esac'
    )
    environ = on_path(make_nvcc("only", on_compile=picky))
    assert resolve({**environ, "CUDAHOSTCXX": "g++-12"}).nvcc is not None
    with pytest.raises(ToolchainError, match="gcc too new"):
        resolve(environ)


# ---- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FUSED_OPT_NVCC", "CUDACXX", "CUDA_HOME", "CUDA_PATH"])
def test_a_named_nvcc_that_is_missing_is_an_error(make_nvcc: MakeNvcc, name: str) -> None:
    environ = {**on_path(make_nvcc("healthy")), name: "/no/such/place"}
    with pytest.raises(ToolchainError, match=f"(?s)/no/such/place.*no such file.*Correct {name}"):
        resolve(environ)


def test_a_named_nvcc_that_is_a_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="not an executable file"):
        resolve({"FUSED_OPT_NVCC": str(tmp_path)})


def test_a_named_nvcc_that_is_too_old_is_an_error(make_nvcc: MakeNvcc) -> None:
    environ = {**on_path(make_nvcc("healthy")), "FUSED_OPT_NVCC": str(make_nvcc("old", "12.0"))}
    with pytest.raises(ToolchainError, match=r"CUDA 12\.0, and CUDA 12\.1 or newer is needed"):
        resolve(environ)


def test_the_oldest_supported_release_is_accepted(make_nvcc: MakeNvcc) -> None:
    toolchain = resolve(on_path(make_nvcc("oldest", "12.1", archs="50 75 80 86 87 89 90")))
    assert toolchain.nvcc is not None
    assert toolchain.nvcc.release == (12, 1)
    assert toolchain.cubins == (75, 80, 86, 89, 90)


def test_a_named_nvcc_that_cannot_compile_is_an_error(make_nvcc: MakeNvcc) -> None:
    environ = {**on_path(make_nvcc("ok")), "CUDACXX": str(make_nvcc("shim", on_compile=BROKEN))}
    with pytest.raises(ToolchainError, match=r"cannot compile and link.*'sm_30' is not defined"):
        resolve(environ)


def test_only_broken_compilers_is_an_error_that_names_each_and_the_way_out(
    make_nvcc: MakeNvcc,
) -> None:
    old, broken = make_nvcc("old", "10.1"), make_nvcc("broken", on_compile=BROKEN)
    with pytest.raises(ToolchainError) as caught:
        resolve(on_path(old, broken))
    for part in (str(old), "10.1", str(broken), "sm_30", "FUSED_OPT_NVCC", "FUSED_OPT_CUDA=0"):
        assert part in str(caught.value)


def test_a_program_that_is_no_nvcc_is_an_error(tmp_path: Path) -> None:
    impostor = tmp_path / "nvcc"
    impostor.write_text("#!/bin/sh\necho hello\n")
    impostor.chmod(0o755)
    with pytest.raises(ToolchainError, match="names no release: hello"):
        resolve({"FUSED_OPT_NVCC": str(impostor)})


# ---- The switch ----------------------------------------------------------------------------------


def test_switch_off_ignores_every_nvcc(make_nvcc: MakeNvcc) -> None:
    toolchain = resolve({"FUSED_OPT_CUDA": "0", "FUSED_OPT_NVCC": str(make_nvcc("ok"))})
    assert toolchain.nvcc is None
    assert "CPU-ONLY" in toolchain.notes[0]


def test_switch_on_makes_a_missing_nvcc_an_error(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="FUSED_OPT_CUDA=1 asks for CUDA"):
        resolve({"FUSED_OPT_CUDA": "1", "PATH": str(tmp_path)})


def test_switch_takes_three_values(make_nvcc: MakeNvcc) -> None:
    nvcc = make_nvcc("ok")
    for value in ("1", "auto", "AUTO"):
        assert chosen({**on_path(nvcc), "FUSED_OPT_CUDA": value}) == str(nvcc)
    with pytest.raises(ToolchainError, match="0, 1 or auto, found 'yes'"):
        resolve({"FUSED_OPT_CUDA": "yes"})


# ---- Which architectures -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ("", ()),
        (" ; ", ()),
        ("90", (90,)),
        ("80;90", (80, 90)),
        ("90;80", (80, 90)),
        ("80,90", (80, 90)),
        ("80 90", (80, 90)),
        ("80; 90;", (80, 90)),
        ("90;90", (90,)),
        ("8.0;9.0", (80, 90)),
        ("100;12.0", (100, 120)),
    ],
)
def test_architecture_lists_are_read(request_: str, expected: tuple[int, ...]) -> None:
    assert parse_archs(request_) == expected


@pytest.mark.parametrize(
    "item", ["sm_90", "compute_90", "9", "90a", "9.0.0", "hopper", "-90", "1000"]
)
def test_what_is_no_architecture_is_refused(item: str) -> None:
    with pytest.raises(ToolchainError, match=r"FUSED_OPT_CUDA_ARCHS: .* is no architecture"):
        parse_archs(f"80;{item}")


def test_default_is_the_list_that_nvcc_can_build(make_nvcc: MakeNvcc) -> None:
    assert resolve(on_path(make_nvcc("new"))).cubins == (75, 80, 86, 89, 90, 100, 120)
    older = make_nvcc("older", "12.4", archs="50 52 60 70 75 80 86 87 89 90")
    assert resolve(on_path(older)).cubins == (75, 80, 86, 89, 90)


def test_a_named_architecture_that_nvcc_cannot_build_is_an_error(make_nvcc: MakeNvcc) -> None:
    environ = {**on_path(make_nvcc("ok")), "FUSED_OPT_CUDA_ARCHS": "70;90"}
    with pytest.raises(ToolchainError, match=r"names 70, which .* cannot build\. It builds 75 80"):
        resolve(environ)


def test_a_named_architecture_outside_the_default_list_is_built(make_nvcc: MakeNvcc) -> None:
    toolchain = resolve({**on_path(make_nvcc("ok")), "FUSED_OPT_CUDA_ARCHS": "87"})
    assert toolchain.cubins == toolchain.ptx == (87,)


def test_ptx_is_kept_at_both_ends() -> None:
    assert Toolchain(None, (75, 80, 90)).ptx == (75, 90)
    assert Toolchain(None, (90,)).ptx == (90,)
    assert Toolchain(None).ptx == ()


# ---- What CMake reads ----------------------------------------------------------------------------


def test_cmake_reads_one_line_per_key() -> None:
    toolchain = Toolchain(Nvcc("/opt/cuda/bin/nvcc", (13, 0), (75, 80, 90)), (75, 80, 90))
    assert _toolchain.cmake_lines(toolchain).splitlines() == [
        "NVCC=/opt/cuda/bin/nvcc",
        "CUDA_VERSION=13.0",
        "CUDA_ARCHS=75,80,90",
        "PTX_ARCHS=75,90",
        "CMAKE_CUDA_ARCHITECTURES=75;80-real;90",
    ]


def run_script(environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-S", str(SCRIPT), "--cmake"],
        env=dict(environ),
        capture_output=True,
        text=True,
        check=False,
    )


def test_script_prints_the_choice(make_nvcc: MakeNvcc) -> None:
    nvcc = make_nvcc("ok")
    result = run_script({"FUSED_OPT_NVCC": str(nvcc), "FUSED_OPT_CUDA_ARCHS": "90"})
    assert result.returncode == 0
    assert result.stdout.splitlines()[0] == f"NVCC={nvcc}"
    assert result.stderr == ""


def test_script_says_cpu_only_on_stderr() -> None:
    result = run_script({"FUSED_OPT_CUDA": "0"})
    assert result.returncode == 0
    assert result.stdout.splitlines()[0] == "NVCC="
    assert "CPU-ONLY" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_script_refuses_with_the_reason_and_no_traceback() -> None:
    result = run_script({"FUSED_OPT_NVCC": "/no/such/nvcc"})
    assert result.returncode == 1
    assert result.stdout == ""
    assert "/no/such/nvcc (from FUSED_OPT_NVCC): there is no such file" in result.stderr
    assert "Traceback" not in result.stderr


def test_script_needs_only_the_standard_library_of_python_39() -> None:
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"), feature_version=(3, 9))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        assert all(name.split(".")[0] in sys.stdlib_module_names for name in names)


def test_the_nvcc_of_this_machine_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    monkeypatch.undo()
    try:
        nvcc = resolve({"PATH": os.environ["PATH"]}).nvcc
    except ToolchainError as error:
        pytest.skip(f"no healthy nvcc here: {error}")
    assert nvcc is not None
    assert nvcc.release >= _toolchain.MIN_RELEASE
    assert 90 in nvcc.archs
