"""Which nvcc and which GPU architectures this build uses: the one place that decides.

CMake runs this file (``python fused_opt/_toolchain.py --cmake``) before it enables CUDA, because
CMake takes whatever nvcc it meets first and fails there when that one is broken. Standard library
only, Python 3.9 or newer, and no import of the package: it must run before anything is built.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

DEFAULT_ARCHS = (75, 80, 86, 89, 90, 100, 120)
"""Turing to Blackwell, the large and the small chips of each; PTX at both ends covers the rest."""

MIN_RELEASE = (12, 1)
"""The first nvcc whose kernels accept 32,764 bytes of parameters; older ones stop at 4,096."""

PROBE_SOURCE = "__global__ void probe() {}\nint main() { probe<<<1, 1>>>(); return 0; }\n"
PROBE_TIMEOUT_S = 120
CUDA_ROOT_PARENT = Path("/usr/local")


class ToolchainError(Exception):
    """No usable answer; the message is advice for the person who builds."""


@dataclass(frozen=True)
class Candidate:
    """An nvcc worth trying, and where its name came from."""

    path: str
    source: str
    explicit: bool
    """Named by a person: when it is unusable that is an error, never a silent fall-back."""


@dataclass(frozen=True)
class Nvcc:
    """A healthy nvcc: new enough, and able to compile and link a kernel."""

    path: str
    release: tuple[int, int]
    archs: tuple[int, ...]
    """Every architecture it can compile for, ascending."""


@dataclass(frozen=True)
class Toolchain:
    """The answer: a compiler (None: CPU-only) and the architectures to build."""

    nvcc: Nvcc | None
    cubins: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    """Lines that a person should see even though the build goes on."""

    @property
    def ptx(self) -> tuple[int, ...]:
        """Architectures kept as PTX, which a driver compiles for GPUs that have no cubin here.

        The lowest and the highest: PTX serves only chips of its own number or above, so that
        compute_120 alone would leave out sm_110.

        >>> Toolchain(None, (75, 80, 90)).ptx
        (75, 90)
        """
        return tuple(sorted({self.cubins[0], self.cubins[-1]})) if self.cubins else ()


def resolve(environ: Mapping[str, str] | None = None) -> Toolchain:
    """Chooses the nvcc and the architectures.

    Args:
        environ: the environment to read; the process's own if None. ``FUSED_OPT_CUDA`` is ``0``
            (no CUDA), ``1`` (CUDA or an error) or ``auto`` (CUDA if there is an nvcc).
            ``FUSED_OPT_NVCC``, ``CUDACXX``, ``CUDA_HOME`` and ``CUDA_PATH`` name a compiler;
            ``FUSED_OPT_CUDA_ARCHS`` names architectures (``"90"``, ``"80;90"``).

    Raises:
        ToolchainError: a request cannot be met, or every nvcc found is unusable.
    """
    environ = os.environ if environ is None else environ
    mode = environ.get("FUSED_OPT_CUDA", "").strip().lower() or "auto"
    if mode not in ("0", "1", "auto"):
        raise ToolchainError(f"FUSED_OPT_CUDA is 0, 1 or auto, found {mode!r}")
    if mode == "0":
        return Toolchain(None, notes=("building a CPU-ONLY module, as FUSED_OPT_CUDA=0 asks",))

    nvcc, refused = find_nvcc(environ)
    if nvcc is not None:
        cubins = choose_archs(environ.get("FUSED_OPT_CUDA_ARCHS", ""), nvcc)
        return Toolchain(nvcc, cubins, tuple(f"passed over {reason}" for reason in refused))
    if refused:
        listing = "".join(f"\n  {reason}" for reason in refused)
        raise ToolchainError(
            f"no nvcc on this machine is usable:{listing}\n"
            "Set FUSED_OPT_NVCC to a working nvcc, or FUSED_OPT_CUDA=0 to build for the CPU only."
        )
    if mode == "1":
        raise ToolchainError(
            "FUSED_OPT_CUDA=1 asks for CUDA, but there is no nvcc on PATH or in "
            f"{CUDA_ROOT_PARENT}/cuda*. Install the CUDA toolkit or set FUSED_OPT_NVCC to its nvcc."
        )
    note = "NO NVCC FOUND: building a CPU-ONLY module (FUSED_OPT_NVCC=/path/to/nvcc adds CUDA)"
    return Toolchain(None, notes=(note,))


def find_nvcc(environ: Mapping[str, str]) -> tuple[Nvcc | None, tuple[str, ...]]:
    """Returns the first healthy nvcc, and why each one before it was refused.

    Raises:
        ToolchainError: a candidate that a person named is unusable.
    """
    refused: list[str] = []
    for candidate in candidates(environ):
        try:
            return inspect_nvcc(candidate.path, environ), tuple(refused)
        except ToolchainError as error:
            reason = f"{candidate.path} (from {candidate.source}): {error}"
            if candidate.explicit:
                raise ToolchainError(
                    f"{reason}\nCorrect {candidate.source} or unset it to let the build choose."
                ) from None
            refused.append(reason)
    return None, tuple(refused)


def candidates(environ: Mapping[str, str]) -> Iterator[Candidate]:
    """Yields every nvcc to try, best first, each file once."""
    seen: set[Path] = set()
    for candidate in _explicit_candidates(environ):
        seen.add(Path(candidate.path).resolve())
        yield candidate
    for candidate in _implicit_candidates(environ):
        real = Path(candidate.path).resolve()
        if real not in seen and real.is_file() and os.access(real, os.X_OK):
            seen.add(real)
            yield candidate


def _explicit_candidates(environ: Mapping[str, str]) -> Iterator[Candidate]:
    for name in ("FUSED_OPT_NVCC", "CUDACXX"):
        value = environ.get(name, "").strip()
        if value:  # A bare command name is looked up, as a shell would.
            path = Path(shutil.which(value, path=environ.get("PATH")) or value)
            yield Candidate(str(path.absolute()), name, True)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        value = environ.get(name, "").strip()
        if value:
            yield Candidate(str(Path(value).absolute() / "bin" / "nvcc"), name, True)


def _implicit_candidates(environ: Mapping[str, str]) -> Iterator[Candidate]:
    for folder in environ.get("PATH", "").split(os.pathsep):
        if folder:
            yield Candidate(str(Path(folder).absolute() / "nvcc"), "PATH", False)
    versioned = sorted(CUDA_ROOT_PARENT.glob("cuda-*"), key=_version_in_name, reverse=True)
    for root in [CUDA_ROOT_PARENT / "cuda", *versioned]:
        yield Candidate(str(root / "bin" / "nvcc"), str(root), False)


def _version_in_name(path: Path) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", path.name))


def inspect_nvcc(path: str, environ: Mapping[str, str]) -> Nvcc:
    """Checks one nvcc and returns what it can do.

    Raises:
        ToolchainError: it is missing, too old, or cannot compile and link a kernel.
    """
    if not Path(path).exists():
        raise ToolchainError("there is no such file")
    if not (Path(path).is_file() and os.access(path, os.X_OK)):
        raise ToolchainError("it is not an executable file")
    status, output = _run([path, "--version"], environ)
    match = re.search(r"release (\d+)\.(\d+)", output)
    if status != 0 or match is None:
        raise ToolchainError(f"`nvcc --version` names no release: {_gist(output)}")
    release = (int(match[1]), int(match[2]))
    if release < MIN_RELEASE:
        raise ToolchainError(
            f"it is CUDA {_dotted(release)}, and CUDA {_dotted(MIN_RELEASE)} or newer is needed "
            "(kernel parameters above 4 KB)"
        )
    _compile_probe(path, environ)
    _, output = _run([path, "--list-gpu-arch"], environ)
    archs = sorted({int(digits) for digits in re.findall(r"^compute_(\d+)\s*$", output, re.M)})
    if not archs:
        raise ToolchainError(f"`nvcc --list-gpu-arch` lists none: {_gist(output)}")
    return Nvcc(path, release, tuple(archs))


def _compile_probe(path: str, environ: Mapping[str, str]) -> None:
    """Compiles and links a kernel with no architecture flag, as CMake does to identify nvcc."""
    host_compiler = environ.get("CUDAHOSTCXX", "").strip()
    host_flags = ["-ccbin", host_compiler] if host_compiler else []
    with tempfile.TemporaryDirectory(prefix="fused_opt_nvcc_") as folder:
        source = Path(folder) / "probe.cu"
        source.write_text(PROBE_SOURCE, encoding="ascii")
        command = [path, str(source), "-o", str(source.with_suffix("")), *host_flags]
        status, output = _run(command, environ)
    if status != 0:
        raise ToolchainError(f"it cannot compile and link an empty kernel: {_gist(output)}")


def choose_archs(request: str, nvcc: Nvcc) -> tuple[int, ...]:
    """Returns the architectures to build, ascending.

    Args:
        request: the value of ``FUSED_OPT_CUDA_ARCHS``; blank asks for the default list.
        nvcc: the compiler that must be able to build them.

    Raises:
        ToolchainError: the request is malformed, or names one that this nvcc cannot build.
    """
    compiler = f"{nvcc.path} (CUDA {_dotted(nvcc.release)})"
    requested = parse_archs(request)
    if not requested:
        cubins = tuple(arch for arch in DEFAULT_ARCHS if arch in nvcc.archs)
        if not cubins:
            raise ToolchainError(f"{compiler} builds none of {_listed(DEFAULT_ARCHS)}")
        return cubins
    missing = [arch for arch in requested if arch not in nvcc.archs]
    if missing:
        raise ToolchainError(
            f"FUSED_OPT_CUDA_ARCHS names {_listed(missing)}, which {compiler} cannot build. "
            f"It builds {_listed(nvcc.archs)}."
        )
    return requested


def parse_archs(request: str) -> tuple[int, ...]:
    """Reads a list of architectures separated by semicolons, commas or spaces.

    >>> parse_archs("90;80, 9.0")
    (80, 90)

    Raises:
        ToolchainError: an item is not an architecture number.
    """
    found: set[int] = set()
    for item in re.split(r"[;,\s]+", request.strip()):
        match = re.fullmatch(r"(\d{1,2})\.?(\d)", item)
        if match:
            found.add(int(match[1] + match[2]))
        elif item:
            raise ToolchainError(
                f"FUSED_OPT_CUDA_ARCHS: {item!r} is no architecture; write numbers, as in 80;90"
            )
    return tuple(sorted(found))


def cmake_lines(toolchain: Toolchain) -> str:
    """Returns what CMake reads: KEY=VALUE lines, with an empty NVCC for CPU-only.

    In CMake's own list "80-real" is a cubin alone and "75" a cubin with PTX. The other lists become
    compile definitions, which a semicolon would break.
    """
    nvcc, ptx = toolchain.nvcc, toolchain.ptx
    cmake_archs = [f"{arch}" if arch in ptx else f"{arch}-real" for arch in toolchain.cubins]
    values = {
        "NVCC": nvcc.path if nvcc else "",
        "CUDA_VERSION": _dotted(nvcc.release) if nvcc else "",
        "CUDA_ARCHS": ",".join(map(str, toolchain.cubins)),
        "PTX_ARCHS": ",".join(map(str, ptx)),
        "CMAKE_CUDA_ARCHITECTURES": ";".join(cmake_archs),
    }
    return "\n".join(f"{key}={value}" for key, value in values.items())


def _run(command: Sequence[str], environ: Mapping[str, str]) -> tuple[int, str]:
    """Runs a command and returns its status and all it printed."""
    try:
        result = subprocess.run(
            command,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {PROBE_TIMEOUT_S} s"
    except OSError as error:
        return 1, str(error)
    return result.returncode, result.stdout


def _gist(output: str) -> str:
    """Returns the line of a compiler's output that says what went wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"fatal|error|not found", line, re.I)]
    return (telling or lines or ["it printed nothing"])[0]


def _dotted(release: tuple[int, int]) -> str:
    return f"{release[0]}.{release[1]}"


def _listed(archs: Sequence[int]) -> str:
    return " ".join(map(str, archs))


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the choice; a refusal goes to stderr and returns 1."""
    parser = argparse.ArgumentParser(description="Choose the nvcc and the GPU architectures.")
    parser.add_argument("--cmake", action="store_true", required=True, help="print KEY=VALUE lines")
    parser.parse_args(argv)
    try:
        toolchain = resolve()
    except ToolchainError as error:
        print(error, file=sys.stderr)
        return 1
    for note in toolchain.notes:
        print(note, file=sys.stderr)
    print(cmake_lines(toolchain))
    return 0


if __name__ == "__main__":
    sys.exit(main())
