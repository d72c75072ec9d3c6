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
from fused_opt._toolchain import (
    TOOLS,
    Archs,
    Candidate,
    Nvcc,
    Tool,
    Toolchain,
    ToolchainError,
    code_for,
    inspect_nvcc,
    parse_archs,
    resolve,
    survey,
)

SCRIPT = Path(_toolchain.__file__)

FAKE_NVCC = """#!/bin/sh
echo "$*" >> "{here}/calls"
case "$*" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  --list-gpu-arch) for arch in {archs}; do echo "compute_$arch"; done ;;
  *--dryrun)
    echo '#$ _HERE_={here}'
    echo "#$ PATH={here}:$PATH"
    echo '#$ LIBRARIES=  "-L{here}/../lib64/stubs" "-L{here}/../lib64"'
    echo '#$ "$CICC_PATH/cicc" --c++17 -arch compute_{default_arch} -m64 "x.ii" -o "x.ptx"'
    echo '#$ "{here}"/g++ -m64 "x.o" -o "x"' ;;
  *) {on_compile} ;;
esac
"""

FAKE_TOOL = """#!/bin/sh
echo "Cuda compilation tools, release {release}, V{release}.88"
"""

FAKE_HOST_COMPILER = """#!/bin/sh
echo "g++ (Debian 12.2.0-14+deb12u1) 12.2.0"
"""

SM_30 = "ptxas fatal : Value 'sm_30' is not defined for option 'gpu-name'"

MakeNvcc = Callable[..., Path]


def says(text: str) -> str:
    """What a fake compiler does to fail with a message."""
    return f"printf '%s\\n' \"{text}\" >&2; exit 255"


BROKEN = says(SM_30.replace(" :", "   :"))


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def make_nvcc(tmp_path: Path) -> MakeNvcc:
    """Writes a fake toolkit into ``tmp_path/<folder>/bin`` and returns the path of its nvcc.

    ``tools`` gives a tool's release where it is not the toolkit's own; None leaves it out.
    """

    def make(
        folder: str,
        release: str = "13.0",
        archs: str = "75 80 86 87 88 89 90 100 110 103 120 121",
        default_arch: int = 75,
        on_compile: str = "exit 0",
        tools: Mapping[str, str | None] | None = None,
    ) -> Path:
        here = tmp_path / folder / "bin"
        text = FAKE_NVCC.format(
            here=here,
            release=release,
            archs=archs,
            default_arch=default_arch,
            on_compile=on_compile,
        )
        for name, its_release in {**dict.fromkeys(TOOLS, release), **(tools or {})}.items():
            if its_release is not None:
                write_program(here / name, FAKE_TOOL.format(release=its_release))
        write_program(here / "g++", FAKE_HOST_COMPILER)
        return write_program(here / "nvcc", text)

    return make


@pytest.fixture(autouse=True)
def nothing_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides this machine's toolkits and driver; a test may put some into its own folder."""
    monkeypatch.setattr(_toolchain, "CUDA_ROOT_PARENT", tmp_path / "usr_local")
    monkeypatch.setattr(_toolchain, "_package_folders", lambda: [tmp_path / "site-packages"])
    monkeypatch.setattr(_toolchain, "driver_release", lambda: None)


def on_path(*nvccs: Path) -> dict[str, str]:
    return {"PATH": os.pathsep.join(str(nvcc.parent) for nvcc in nvccs)}


def naming(nvcc: Path) -> dict[str, str]:
    return {"CUDACXX": str(nvcc), "PATH": ""}  # without PATH, a shell has a default of its own


def chosen(environ: Mapping[str, str]) -> str:
    nvcc = resolve(environ).nvcc
    assert nvcc is not None
    return nvcc.path


def refusal(environ: Mapping[str, str]) -> str:
    with pytest.raises(ToolchainError) as caught:
        resolve(environ)
    return str(caught.value)


# ---- Which nvcc ----------------------------------------------------------------------------------


def test_without_nvcc_the_build_is_cpu_only_and_says_so(tmp_path: Path) -> None:
    toolchain = resolve({"PATH": str(tmp_path)})
    assert toolchain.nvcc is None
    assert toolchain.cubins == toolchain.ptx == ()
    assert toolchain.notes == (
        "NO NVCC FOUND: building a CPU-ONLY module (FUSED_OPT_NVCC=/path/to/nvcc adds CUDA)",
    )


@pytest.mark.parametrize("name", ["FUSED_OPT_NVCC", "CUDACXX"])
def test_named_compiler_wins_over_path(make_nvcc: MakeNvcc, name: str) -> None:
    first, named = make_nvcc("first"), make_nvcc("named")
    assert chosen({**on_path(first), name: str(named)}) == str(named)


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
def test_named_toolkit_wins_over_path(make_nvcc: MakeNvcc, name: str) -> None:
    first, named = make_nvcc("first"), make_nvcc("named")
    assert chosen({**on_path(first), name: str(named.parent.parent)}) == str(named)


def test_candidates_are_tried_in_their_order(make_nvcc: MakeNvcc) -> None:
    places = {
        "site-packages/nvidia/cuda_nvcc": "pip",
        "site-packages/nvidia/cu12": "pip",
        "site-packages/nvidia/cu13": "pip",
        "usr_local/cuda-12.4": "/usr/local/cuda-12.4",
        "usr_local/cuda-12.10": "/usr/local/cuda-12.10",
        "usr_local/cuda-13.0": "/usr/local/cuda-13.0",
        "usr_local/cuda": "/usr/local/cuda",
        "second": "PATH",
        "first": "PATH",
        "CUDA_PATH": "CUDA_PATH",
        "CUDA_HOME": "CUDA_HOME",
        "CUDACXX": "CUDACXX",
        "FUSED_OPT_NVCC": "FUSED_OPT_NVCC",
    }
    nvccs = {place: make_nvcc(place) for place in places}
    environ = on_path(nvccs["first"], nvccs["second"])
    for name in ("CUDA_PATH", "CUDA_HOME"):
        environ[name] = str(nvccs[name].parent.parent)
    for name in ("CUDACXX", "FUSED_OPT_NVCC"):
        environ[name] = str(nvccs[name])
    found = survey(environ)
    assert [nvcc.path for nvcc in found] == [str(nvccs[place]) for place in reversed(places)]
    sources = [nvcc.candidate.source for nvcc in found]
    root = str(_toolchain.CUDA_ROOT_PARENT)
    assert [s.replace(root, "/usr/local") for s in sources] == list(reversed(places.values()))
    assert [nvcc.candidate.explicit for nvcc in found] == [True] * 4 + [False] * 9
    assert all(nvcc.healthy for nvcc in found)


def test_blank_variables_name_nothing(make_nvcc: MakeNvcc) -> None:
    names = (
        *("FUSED_OPT_NVCC", "CUDACXX", "CUDA_HOME", "CUDA_PATH", "CUDAHOSTCXX", "FUSED_OPT_CUDA"),
        *_toolchain.ARCH_VARIABLES,
    )
    nvcc = make_nvcc("only")
    toolchain = resolve({**on_path(nvcc), **dict.fromkeys(names, " ")})
    assert toolchain == resolve(on_path(nvcc))


def test_a_bare_command_name_is_looked_up_on_path(make_nvcc: MakeNvcc) -> None:
    nvcc = make_nvcc("only")
    assert chosen({**on_path(nvcc), "CUDACXX": "nvcc"}) == str(nvcc)


def test_unhealthy_nvcc_on_path_is_passed_over_with_its_reason(make_nvcc: MakeNvcc) -> None:
    broken, old, healthy = make_nvcc("a", on_compile=BROKEN), make_nvcc("b", "11.8"), make_nvcc("c")
    toolchain = resolve(on_path(broken, old, healthy))
    assert toolchain.nvcc is not None
    assert toolchain.nvcc.path == str(healthy)
    about_broken, about_old = toolchain.notes
    assert about_broken.startswith(f"passed over {broken} (CUDA 13.0, from PATH): mixed or broken")
    assert SM_30 in about_broken
    assert about_old.startswith(f"passed over {old} (CUDA 11.8, from PATH): CUDA 12.1 or newer")


def test_one_folder_under_two_names_is_tried_once(make_nvcc: MakeNvcc, tmp_path: Path) -> None:
    nvcc = make_nvcc("usr_local/cuda-13.0", on_compile=BROKEN)
    (tmp_path / "usr_local" / "cuda").symlink_to("cuda-13.0")
    assert refusal(on_path(nvcc)).count(SM_30) == 1


def test_folders_that_name_no_place_are_passed_by(
    make_nvcc: MakeNvcc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = make_nvcc("ok")
    monkeypatch.chdir(make_nvcc("here").parent)
    (tmp_path / "loop").symlink_to("loop")
    path = os.pathsep.join([str(tmp_path / "loop"), "", "/no/such/folder", str(nvcc.parent)])
    assert chosen({"PATH": path}) == str(nvcc)
    assert "it is not an executable file." in refusal({"FUSED_OPT_NVCC": str(tmp_path / "loop")})


def test_a_broken_link_to_an_nvcc_does_not_hide_the_nvcc_itself(
    make_nvcc: MakeNvcc, tmp_path: Path
) -> None:
    # nvcc looks for its parts beside the name it was called by.
    nvcc = make_nvcc("usr_local/cuda", on_compile=f'test "$0" = {tmp_path}/usr_local/cuda/bin/nvcc')
    link = tmp_path / "links" / "nvcc"
    link.parent.mkdir()
    link.symlink_to(nvcc)
    toolchain = resolve(on_path(link))
    assert toolchain.nvcc is not None
    assert toolchain.nvcc.path == str(nvcc)
    (note,) = toolchain.notes
    assert note == (
        f"passed over {link} (CUDA 13.0, from PATH): it cannot compile and link an empty kernel: it"
        " printed nothing. It is a link, and nvcc looks for its parts beside the link: set"
        f" FUSED_OPT_NVCC to {nvcc}."
    )


def test_a_toolkit_that_pip_installed_is_linked_with_the_lib_folder_that_it_has(
    make_nvcc: MakeNvcc, tmp_path: Path
) -> None:
    lib = tmp_path / "site-packages" / "nvidia" / "cu13" / "lib"
    needs_lib = f'case "$*" in *"-L{lib}"*) exit 0 ;; *) exit 1 ;; esac'
    nvcc = make_nvcc("site-packages/nvidia/cu13", on_compile=needs_lib)
    assert "cannot compile and link" in refusal({})
    lib.mkdir()
    (lib / "libcudart_static.a").touch()
    toolchain = resolve({})
    assert toolchain.nvcc is not None
    assert toolchain.nvcc.path == str(nvcc)
    assert toolchain.nvcc.library_dirs == (str(lib),)
    assert f"LIBRARY_DIRS={lib}" in _toolchain.cmake_lines(toolchain).splitlines()


def test_a_toolkit_with_lib64_needs_no_other_folder(make_nvcc: MakeNvcc, tmp_path: Path) -> None:
    nvcc = make_nvcc("cuda")
    for name in ("lib", "lib64"):
        (tmp_path / "cuda" / name).mkdir()
        (tmp_path / "cuda" / name / "libcudart_static.a").touch()
    toolchain = resolve(on_path(nvcc))
    assert toolchain.nvcc is not None
    assert toolchain.nvcc.library_dirs == ()


def test_python_packages_are_sought_beside_and_along_sys_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(sys, "path", ["", "/build-env/site-packages"])
    folders = _toolchain._package_folders()
    assert "/build-env/site-packages" in folders
    assert str(Path(pytest.__file__).parent.parent) in folders  # which sys.path no longer names
    assert "" not in folders


# ---- What is found out about an nvcc -------------------------------------------------------------


def test_inspection_tells_what_nvcc_would_run(make_nvcc: MakeNvcc) -> None:
    path = make_nvcc("cuda", "12.4", archs="50 90 89", default_arch=52)
    candidate = Candidate(str(path), "PATH", False)
    assert inspect_nvcc(candidate, {}) == Nvcc(
        candidate,
        (12, 4),
        tuple(Tool(name, str(path.parent / name), (12, 4)) for name in TOOLS),
        "g++ 12.2.0",
        52,
        (50, 89, 90),
    )


def test_inspection_runs_nvcc_four_times_and_a_refusal_for_age_never_compiles(
    make_nvcc: MakeNvcc,
) -> None:
    for release, calls in (("13.0", 4), ("11.8", 3)):
        path = make_nvcc(release, release)
        inspect_nvcc(Candidate(str(path), "PATH", False), {})
        lines = (path.parent / "calls").read_text().splitlines()
        assert len(lines) == calls
        assert lines[:2] == ["--version", "--list-gpu-arch"]
        assert lines[2].endswith("--dryrun")


def test_the_wrapper_of_an_nvcc_is_seen_through(make_nvcc: MakeNvcc, tmp_path: Path) -> None:
    nvcc = make_nvcc("cuda")
    wrapper = write_program(tmp_path / "bin" / "nvcc", f'#!/bin/sh\nexec {nvcc} "$@"\n')
    found = inspect_nvcc(Candidate(str(wrapper), "PATH", False), {})
    assert found.healthy
    assert [tool.path for tool in found.tools] == [str(nvcc.parent / name) for name in TOOLS]


def test_a_host_compiler_named_for_cuda_is_used_in_the_check(make_nvcc: MakeNvcc) -> None:
    picky = f'case "$*" in *"-ccbin g++-12"*) exit 0 ;; esac; {says("error: no")}'
    environ = on_path(make_nvcc("only", on_compile=picky))
    assert resolve({**environ, "CUDAHOSTCXX": "g++-12"}).nvcc is not None
    assert "error: no" in refusal(environ)


@pytest.mark.parametrize(
    ("banner", "expected"),
    [
        ("g++ (Debian 12.2.0-14+deb12u1) 12.2.0", "g++ 12.2.0"),
        ("g++ (GCC) 8.5.0 20210514 (Red Hat 8.5.0-22)", "g++ 8.5.0"),
        ("Ubuntu clang version 18.1.3 (1ubuntu1)", "g++ 18.1.3"),
        ("nonsense", "g++ (of no known version)"),
    ],
)
def test_the_version_of_the_host_compiler_is_read(
    make_nvcc: MakeNvcc, banner: str, expected: str
) -> None:
    nvcc = make_nvcc("cuda")
    write_program(nvcc.parent / "g++", f"#!/bin/sh\necho '{banner}'\n")
    assert inspect_nvcc(Candidate(str(nvcc), "PATH", False), {}).host_compiler == expected


# ---- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FUSED_OPT_NVCC", "CUDACXX", "CUDA_HOME", "CUDA_PATH"])
def test_a_named_nvcc_that_is_missing_is_an_error(make_nvcc: MakeNvcc, name: str) -> None:
    path = "/no/such/place/bin/nvcc" if name.startswith("CUDA_") else "/no/such/place"
    assert refusal({**on_path(make_nvcc("healthy")), name: "/no/such/place"}) == (
        f"{path} (from {name}): there is no such file.\n"
        f"Correct {name}, or unset it to let the build choose."
    )


def test_a_named_nvcc_that_is_a_folder_is_an_error(tmp_path: Path) -> None:
    message = refusal({"FUSED_OPT_NVCC": str(tmp_path)})
    assert f"{tmp_path} (from FUSED_OPT_NVCC): it is not an executable file.\n" in message


def test_a_program_that_is_no_nvcc_is_an_error(tmp_path: Path) -> None:
    impostor = write_program(tmp_path / "nvcc", "#!/bin/sh\necho hello\n")
    message = refusal({"FUSED_OPT_NVCC": str(impostor)})
    assert ": `nvcc --version` names no release: hello.\n" in message


def test_a_file_that_the_system_cannot_run_is_an_error(tmp_path: Path) -> None:
    impostor = write_program(tmp_path / "nvcc", "\0")
    message = refusal({"FUSED_OPT_NVCC": str(impostor)})
    assert "names no release: [Errno 8] Exec format error" in message


def test_a_named_nvcc_that_is_too_old_is_an_error_with_the_reason(make_nvcc: MakeNvcc) -> None:
    old = make_nvcc("old", "12.0")
    assert refusal({**on_path(make_nvcc("healthy")), "FUSED_OPT_NVCC": str(old)}) == (
        f"{old} (CUDA 12.0, from FUSED_OPT_NVCC): CUDA 12.1 or newer is needed (kernel parameters"
        " above 4 KB). Install a newer toolkit, or set FUSED_OPT_NVCC to a newer nvcc.\n"
        "Correct FUSED_OPT_NVCC, or unset it to let the build choose."
    )


def test_the_oldest_supported_release_is_accepted(make_nvcc: MakeNvcc) -> None:
    toolchain = resolve(on_path(make_nvcc("oldest", "12.1", archs="50 75 80 86 87 89 90")))
    assert toolchain.nvcc is not None
    assert toolchain.nvcc.release == (12, 1)
    assert toolchain.cubins == (75, 80, 86, 89, 90)


def test_tools_of_another_release_are_a_mixed_toolkit(make_nvcc: MakeNvcc) -> None:
    nvcc = make_nvcc("cuda", "12.4", tools={"ptxas": "13.0", "nvlink": "12.8"})
    assert refusal(naming(nvcc)) == (
        f"{nvcc} (CUDA 12.4, from CUDACXX): mixed or broken toolkit: it runs"
        f" {nvcc.parent}/ptxas (CUDA 13.0), {nvcc.parent}/nvlink (CUDA 12.8). Set FUSED_OPT_NVCC to"
        " the nvcc of a toolkit that is whole, or reinstall this one with its bin folder first on"
        " PATH.\nCorrect CUDACXX, or unset it to let the build choose."
    )


@pytest.mark.parametrize("name", TOOLS)
def test_each_tool_is_compared(make_nvcc: MakeNvcc, name: str) -> None:
    nvcc = make_nvcc("cuda", tools={name: "12.9"})
    assert f"it runs {nvcc.parent}/{name} (CUDA 12.9). Set" in refusal(naming(nvcc))


def test_a_tool_from_elsewhere_on_path_is_the_one_that_counts(
    make_nvcc: MakeNvcc, tmp_path: Path
) -> None:
    # Debian splits the toolkit: its nvcc lies beside no ptxas, and takes the first on PATH.
    nvcc = make_nvcc("debian", "12.4", tools={"ptxas": None})
    stranger = make_nvcc("newer", "13.0").parent / "ptxas"
    message = refusal({"CUDACXX": str(nvcc), "PATH": str(stranger.parent)})
    assert f"mixed or broken toolkit: it runs {stranger} (CUDA 13.0). Set" in message


def test_a_missing_tool_is_a_broken_toolkit(make_nvcc: MakeNvcc) -> None:
    nvcc = make_nvcc("cuda", tools={"fatbinary": None})
    message = refusal(naming(nvcc))
    assert "mixed or broken toolkit: it runs fatbinary (not to be found). Set" in message


def test_a_tool_that_tells_no_release_is_a_broken_toolkit(make_nvcc: MakeNvcc) -> None:
    nvcc = make_nvcc("cuda")
    write_program(nvcc.parent / "ptxas", "#!/bin/sh\nexit 1\n")
    message = refusal(naming(nvcc))
    assert f"it runs {nvcc.parent}/ptxas (of no known release). Set" in message


def test_a_tool_that_fails_is_a_broken_toolkit(make_nvcc: MakeNvcc) -> None:
    nvcc = make_nvcc("cuda", on_compile=BROKEN)
    assert refusal(naming(nvcc)) == (
        f"{nvcc} (CUDA 13.0, from CUDACXX): mixed or broken toolkit: with no architecture named,"
        f" its {nvcc.parent}/ptxas (CUDA 13.0) fails: {SM_30}. Set FUSED_OPT_NVCC to the nvcc of a"
        " toolkit that is whole, or reinstall this one with its bin folder first on PATH.\n"
        "Correct CUDACXX, or unset it to let the build choose."
    )


def test_a_host_compiler_that_nvcc_refuses_is_named_with_one_that_it_takes(
    make_nvcc: MakeNvcc,
) -> None:
    error = (
        "/opt/cuda/crt/host_config.h:143:2: error: #error -- unsupported GNU version! gcc versions"
        " later than 11 are not supported! The nvcc flag can be used to override this."
    )
    nvcc = make_nvcc("cuda", on_compile=says(error))
    assert refusal(naming(nvcc)) == (
        f"{nvcc} (CUDA 13.0, from CUDACXX): it does not accept the host compiler g++ 12.2.0:"
        " unsupported GNU version! gcc versions later than 11 are not supported. Set CUDAHOSTCXX to"
        " one that it accepts, such as g++-11, or FUSED_OPT_NVCC to a newer nvcc.\n"
        "Correct CUDACXX, or unset it to let the build choose."
    )


def test_a_clang_that_nvcc_refuses_is_named(make_nvcc: MakeNvcc) -> None:
    error = "#error -- unsupported clang version! clang version must be less than 17"
    message = refusal(naming(make_nvcc("cuda", on_compile=says(error))))
    assert (
        "host compiler g++ 12.2.0: unsupported clang version! clang version must be less than 17."
        " Set CUDAHOSTCXX to one that it accepts, or FUSED_OPT_NVCC to a newer nvcc." in message
    )


def test_a_missing_host_compiler_is_named(make_nvcc: MakeNvcc) -> None:
    error = "g++-9: No such file or directory\nnvcc fatal   : Failed to preprocess host compiler"
    message = refusal(naming(make_nvcc("cuda", on_compile=says(error))))
    assert (
        ": its host compiler does not run: g++-9: No such file or directory. Install g++, or set"
        " CUDAHOSTCXX to a C++ compiler.\n" in message
    )


def test_a_c_library_too_new_for_nvcc_is_named(make_nvcc: MakeNvcc) -> None:
    error = "mathcalls.h(79): error: exception specification is incompatible with that of cospi"
    message = refusal(naming(make_nvcc("cuda", on_compile=says(error))))
    assert (
        f": its headers clash with this system's C library, which is too new for it: {error}."
        " Install a newer toolkit, or set FUSED_OPT_NVCC to a newer nvcc.\n" in message
    )


def test_any_other_failure_shows_the_line_that_tells(make_nvcc: MakeNvcc) -> None:
    error = "In file included\nx.h: fatal error: cuda_runtime.h: No such file or directory.\nend"
    message = refusal(naming(make_nvcc("cuda", on_compile=says(error))))
    assert (
        ": it cannot compile and link an empty kernel: x.h: fatal error: cuda_runtime.h: No such"
        " file or directory. Set FUSED_OPT_NVCC to the nvcc of a toolkit that is whole" in message
    )


def test_an_nvcc_that_hangs_is_given_up(
    make_nvcc: MakeNvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_toolchain, "PROBE_TIMEOUT_S", 0.2)
    nvcc = make_nvcc("cuda", on_compile="exec /bin/sleep 60")
    assert "empty kernel: no answer within 0.2 s." in refusal(naming(nvcc))


def test_an_nvcc_that_lists_no_architecture_is_broken(make_nvcc: MakeNvcc) -> None:
    nvcc = make_nvcc("cuda", archs="")
    assert "`nvcc --list-gpu-arch` lists no architecture. Set" in refusal(naming(nvcc))


def test_only_broken_compilers_is_an_error_that_names_each_and_its_cure(
    make_nvcc: MakeNvcc,
) -> None:
    old, broken = make_nvcc("old", "10.1"), make_nvcc("broken", on_compile=BROKEN)
    head, about_old, about_broken, tail = refusal(on_path(old, broken)).splitlines()
    assert head == "no nvcc on this machine is usable:"
    assert about_old.startswith(f"  {old} (CUDA 10.1, from PATH): CUDA 12.1 or newer is needed")
    assert about_old.endswith("or set FUSED_OPT_NVCC to a newer nvcc.")
    assert about_broken.startswith(f"  {broken} (CUDA 13.0, from PATH): mixed or broken toolkit")
    assert about_broken.endswith("with its bin folder first on PATH.")
    assert tail == "FUSED_OPT_NVCC names another nvcc; FUSED_OPT_CUDA=0 builds for the CPU only."


# ---- The driver ----------------------------------------------------------------------------------


def test_an_nvcc_beyond_the_driver_is_passed_over_loudly(
    make_nvcc: MakeNvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_toolchain, "driver_release", lambda: (12, 4))
    newer, fitting = make_nvcc("newer", "13.0"), make_nvcc("fitting", "12.8")
    toolchain = resolve(on_path(newer, fitting))
    assert toolchain.nvcc is not None
    assert toolchain.nvcc.path == str(fitting)  # 12.8 runs on any driver of CUDA 12
    assert toolchain.nvcc.warnings == ()
    assert toolchain.notes == (
        f"passed over {newer} (CUDA 13.0, from PATH): this machine's driver ends at CUDA 12.4, so"
        " that what it builds cannot run here. Update the driver or install an older toolkit;"
        f" FUSED_OPT_NVCC={newer} takes this one all the same.",
    )


def test_a_named_nvcc_beyond_the_driver_is_taken_with_a_warning(
    make_nvcc: MakeNvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_toolchain, "driver_release", lambda: (12, 4))
    nvcc = make_nvcc("newer", "13.0")
    toolchain = resolve({"FUSED_OPT_NVCC": str(nvcc)})
    assert toolchain.nvcc is not None
    assert toolchain.nvcc.warnings == (
        "this machine's driver ends at CUDA 12.4, so that what it builds cannot run here",
    )
    assert toolchain.notes == (
        f"{nvcc} (CUDA 13.0, from FUSED_OPT_NVCC): {toolchain.nvcc.warnings[0]}",
    )


def test_only_compilers_beyond_the_driver_is_an_error(
    make_nvcc: MakeNvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_toolchain, "driver_release", lambda: (12, 4))
    nvcc = make_nvcc("newer", "13.0")
    message = refusal(on_path(nvcc))
    assert message.startswith("no nvcc on this machine is usable:\n")
    assert survey(on_path(nvcc))[0].warnings == ()  # its problem says it
    assert f"FUSED_OPT_NVCC={nvcc} takes this one all the same.\n" in message


FAKE_DRIVER = """
int cuDriverGetVersion(int* release) { *release = 12040; return RELEASE_STATUS; }
int cuInit(unsigned flags) { return flags; }
int cuDeviceGetCount(int* count) { *count = GPUS; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = 10 + ordinal; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  static const int capabilities[2][2] = {{9, 0}, {8, 6}};
  *value = capabilities[device - 10][attribute - 75];
  return 0;
}
"""


def ask_driver(folder: Path, expression: str, *definitions: str) -> str:
    """Evaluates an expression of ``_toolchain`` in a process that has a driver of our making."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("cc is not installed")
    (folder / "driver.c").write_text(FAKE_DRIVER)
    command = [compiler, "-shared", "-fPIC", *definitions, "driver.c", "-o", "libcuda.so.1"]
    subprocess.run(command, cwd=folder, check=True)
    code = f"import _toolchain\ntry: print({expression})\nexcept Exception as e: print(e)"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(SCRIPT.parent), "LD_LIBRARY_PATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_the_driver_tells_its_release(tmp_path: Path) -> None:
    call = "_toolchain.driver_release()"
    assert ask_driver(tmp_path, call, "-DRELEASE_STATUS=0", "-DGPUS=0") == "(12, 4)"
    assert ask_driver(tmp_path, call, "-DRELEASE_STATUS=34", "-DGPUS=0") == "None"  # a stub library


def test_native_is_what_the_driver_finds(tmp_path: Path) -> None:
    call = "_toolchain.parse_archs('native', 'CUDAARCHS').cubins"
    assert ask_driver(tmp_path, call, "-DRELEASE_STATUS=0", "-DGPUS=2") == "(86, 90)"
    assert ask_driver(tmp_path, call, "-DRELEASE_STATUS=0", "-DGPUS=0") == (
        "CUDAARCHS asks for native, the architecture of this machine's GPU, but no GPU is found."
        " Name it instead, as in CUDAARCHS=90."
    )


def test_native_without_a_driver_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_toolchain, "_driver_library", lambda: None)
    with pytest.raises(ToolchainError, match=r"FUSED_OPT_CUDA_ARCHS asks for native, .*no driver"):
        parse_archs("80;native", "FUSED_OPT_CUDA_ARCHS")


def test_without_the_library_there_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(_toolchain.ctypes, "CDLL", missing)
    assert _toolchain.driver_release() is None


# ---- The switch ----------------------------------------------------------------------------------


def test_switch_off_ignores_every_nvcc(make_nvcc: MakeNvcc) -> None:
    toolchain = resolve({"FUSED_OPT_CUDA": "0", "FUSED_OPT_NVCC": str(make_nvcc("ok"))})
    assert toolchain == Toolchain(
        None, notes=("building a CPU-ONLY module, as FUSED_OPT_CUDA=0 asks",)
    )


def test_switch_on_makes_a_missing_nvcc_an_error(tmp_path: Path) -> None:
    assert refusal({"FUSED_OPT_CUDA": "1", "PATH": str(tmp_path)}) == (
        "FUSED_OPT_CUDA=1 asks for CUDA, but there is no nvcc on PATH, in"
        f" {_toolchain.CUDA_ROOT_PARENT}/cuda* or among Python's packages. Install the CUDA"
        " toolkit, 12.1 or newer, or set FUSED_OPT_NVCC to its nvcc."
    )


def test_switch_takes_three_values(make_nvcc: MakeNvcc) -> None:
    nvcc = make_nvcc("ok")
    for value in ("1", "auto", "AUTO"):
        assert chosen({**on_path(nvcc), "FUSED_OPT_CUDA": value}) == str(nvcc)
    assert refusal({"FUSED_OPT_CUDA": "yes"}) == "FUSED_OPT_CUDA is 0, 1 or auto, found 'yes'."


# ---- Which architectures -------------------------------------------------------------------------

BUILDABLE = (70, 75, 80, 86, 90, 100, 103, 120)


@pytest.mark.parametrize(
    ("request_", "cubins", "ptx"),
    [
        ("90", [90], []),
        ("80;90", [80, 90], []),
        ("90;80", [80, 90], []),
        ("80,90", [80, 90], []),
        ("80 90", [80, 90], []),
        ("80\t90\n", [80, 90], []),
        ("80; 90;", [80, 90], []),
        (";;80,,90", [80, 90], []),
        ("90;90", [90], []),
        ("90;9.0", [90], []),
        ("8.0;9.0", [80, 90], []),
        ("100;12.0", [100, 120], []),
        ("5.2", [52], []),
        ("9.0+PTX", [90], [90]),
        ("90+ptx", [90], [90]),
        ("8.0;9.0+PTX", [80, 90], [90]),
        ("8.0 8.6+PTX 9.0", [80, 86, 90], [86]),
        ("7.5+PTX;12.0+PTX", [75, 120], [75, 120]),
        ("80-real", [80], []),
        ("90-virtual", [], [90]),
        ("86-real;90-virtual", [86], [90]),
        ("90-real;90-virtual", [90], [90]),
        ("9.0-REAL", [90], []),
        ("90a", [90], []),
        ("9.0a", [90], []),
        ("10.0f;10.3a+PTX", [100, 103], [103]),
        ("90a-real", [90], []),
        ("Hopper", [90], []),
        ("hopper", [90], []),
        ("Hopper+PTX", [90], [90]),
        ("Ampere;Hopper+PTX", [80, 86, 90], [90]),
        ("Ampere+PTX", [80, 86], [86]),
        ("Ampere-virtual", [], [80, 86]),
        ("Ampere+Tegra", [87], []),
        ("Kepler+Tesla", [37], []),
        ("Kepler+Tegra", [32], []),
        ("Kepler", [35], []),
        ("Maxwell+Tegra;Maxwell", [50, 52, 53], []),
        ("Pascal", [60, 61], []),
        ("Volta+Tegra+PTX;Volta", [70, 72], [72]),
        ("Turing Ada", [75, 89], []),
        ("Blackwell", [100, 103, 120, 121], []),
        ("Blackwell+Tegra", [110], []),
        ("all", [70, 75, 80, 86, 90, 100, 103, 120], []),
        ("ALL", [70, 75, 80, 86, 90, 100, 103, 120], []),
        ("all-major", [70, 80, 90, 100, 120], []),
        ("all-major;86+PTX", [70, 80, 86, 90, 100, 120], [86]),
    ],
)
def test_architecture_lists_are_read(request_: str, cubins: list[int], ptx: list[int]) -> None:
    archs = parse_archs(request_, "TORCH_CUDA_ARCH_LIST", BUILDABLE)
    assert (list(archs.cubins), list(archs.ptx)) == (cubins, ptx)


@pytest.mark.parametrize(
    "item",
    [
        *("sm_90", "compute_90", "9", "9.", ".9", "9.0.0", "9..0", "-90", "1000", "00"),
        *("90b", "90aa", "a", "+PTX", "90+", "90+PTX+PTX", "90+SASS", "PTX", "-real", "90-cubin"),
        *("Fermi", "Hopper+Tegra", "Grace", "major", "OFF", "auto", "90:80", "90/80", "⁹0"),
    ],
)
def test_what_is_no_architecture_is_refused(item: str) -> None:
    with pytest.raises(ToolchainError) as caught:
        parse_archs(f"80;{item}", "CUDAARCHS")
    assert str(caught.value) == (
        f"CUDAARCHS=80;{item}: {item!r} is no architecture. Write numbers such as 90 or 9.0+PTX,"
        " names such as Hopper, or one of all, all-major and native."
    )


def test_a_letter_after_the_number_is_dropped_with_a_note() -> None:
    assert parse_archs("9.0a;10.0f+PTX;80", "TORCH_CUDA_ARCH_LIST") == Archs(
        (80, 90, 100),
        (100,),
        tuple(
            f"TORCH_CUDA_ARCH_LIST names {item}, which is built as plain {arch}: the kernels use no"
            " instruction that only one architecture has"
            for item, arch in (("9.0a", 90), ("10.0f+PTX", 100))
        ),
    )


def test_that_note_is_shown(make_nvcc: MakeNvcc) -> None:
    toolchain = resolve({**on_path(make_nvcc("ok")), "CUDAARCHS": "90a"})
    assert len(toolchain.notes) == 1
    assert "90a" in toolchain.notes[0]


def test_default_is_the_list_that_nvcc_can_build(make_nvcc: MakeNvcc) -> None:
    toolchain = resolve(on_path(make_nvcc("new")))
    assert toolchain.cubins == (75, 80, 86, 89, 90, 100, 120)
    assert toolchain.ptx == (75, 120)
    older = make_nvcc("older", "12.4", archs="50 52 60 70 75 80 86 87 89 90")
    toolchain = resolve(on_path(older))
    assert toolchain.cubins == (75, 80, 86, 89, 90)
    assert toolchain.ptx == (75, 90)


def test_variables_for_architectures_have_an_order(make_nvcc: MakeNvcc) -> None:
    environ = on_path(make_nvcc("ok"))
    for name, request, cubins in (
        ("CUDAARCHS", "80-real", (80,)),
        ("TORCH_CUDA_ARCH_LIST", "8.6", (86,)),
        ("FUSED_OPT_CUDA_ARCHS", "90", (90,)),
    ):
        environ[name] = request
        assert resolve(environ).cubins == cubins
    environ["FUSED_OPT_CUDA_ARCHS"] = " ;, "
    assert resolve(environ).cubins == (86,)


@pytest.mark.parametrize("name", _toolchain.ARCH_VARIABLES)
def test_a_named_architecture_that_nvcc_cannot_build_is_an_error(
    make_nvcc: MakeNvcc, name: str
) -> None:
    nvcc = make_nvcc("ok", archs="50 61 75 80 90")
    assert refusal({**on_path(nvcc), name: "61;70 90-virtual 103-virtual"}) == (
        f"{name}=61;70 90-virtual 103-virtual names 61 70 103, but {nvcc} (CUDA 13.0, from PATH)"
        " builds these kernels for 75 80 90 only (older GPUs than 70 lack parameters above 4 KB)."
        " Set FUSED_OPT_CUDA_ARCHS to some of these, or FUSED_OPT_NVCC to another nvcc."
    )


def test_an_nvcc_that_builds_nothing_of_the_default_list_is_an_error(make_nvcc: MakeNvcc) -> None:
    nvcc = make_nvcc("odd", archs="50 87")
    assert refusal(on_path(nvcc)).startswith(
        f"the default list names 75 80 86 89 90 100 120, but {nvcc} (CUDA 13.0, from PATH) builds"
        " these kernels for 87 only "
    )


def test_all_leaves_out_what_the_kernels_cannot_run_on(make_nvcc: MakeNvcc) -> None:
    nvcc = make_nvcc("ok", "12.4", archs="50 52 60 61 70 75 80 86 90")
    assert resolve({**on_path(nvcc), "CUDAARCHS": "all"}).cubins == (70, 75, 80, 86, 90)


@pytest.mark.parametrize(
    ("request_", "cubins", "ptx"),
    [
        ("87", (87,), (87,)),
        ("80;86;90", (80, 86, 90), (80, 90)),
        ("80;86+PTX;90", (80, 86, 90), (80, 86, 90)),
        ("86-real;90-virtual", (86,), (86, 90)),
        ("80-virtual;90-real", (90,), (80, 90)),
        ("90-virtual", (), (90,)),
    ],
)
def test_ptx_is_kept_at_both_ends_and_where_it_is_asked_for(
    make_nvcc: MakeNvcc, request_: str, cubins: tuple[int, ...], ptx: tuple[int, ...]
) -> None:
    toolchain = resolve({**on_path(make_nvcc("ok")), "FUSED_OPT_CUDA_ARCHS": request_})
    assert (toolchain.cubins, toolchain.ptx) == (cubins, ptx)


@pytest.mark.parametrize(
    ("capability", "cubins", "ptx", "expected"),
    [
        (80, [80], [], "cubin"),
        (86, [80], [], "cubin"),
        (80, [86], [], None),
        (90, [80], [], None),
        (90, [80], [80], "ptx"),
        (80, [90], [90], None),
        (120, [100], [], None),
        (110, [75, 120], [75, 120], "ptx"),
        (110, [120], [120], None),
        (90, [], [90], "ptx"),
        (90, [], [], None),
    ],
)
def test_what_a_gpu_runs(
    capability: int, cubins: list[int], ptx: list[int], expected: str | None
) -> None:
    assert code_for(capability, cubins, ptx) == expected


# ---- What CMake reads ----------------------------------------------------------------------------


def test_cmake_reads_one_line_per_key() -> None:
    candidate = Candidate("/opt/cuda/bin/nvcc", "PATH", False)
    nvcc = Nvcc(candidate, (13, 0), archs=(75, 80, 90, 100))
    lines = _toolchain.cmake_lines(Toolchain(nvcc, (75, 80, 90), (75, 90, 100))).splitlines()
    assert lines == [
        "NVCC=/opt/cuda/bin/nvcc",
        "CUDA_VERSION=13.0",
        "CUDA_ARCHS=75,80,90",
        "PTX_ARCHS=75,90,100",
        "CMAKE_CUDA_ARCHITECTURES=75;80-real;90;100-virtual",
        "LIBRARY_DIRS=",
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
