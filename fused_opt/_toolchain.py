"""Which nvcc and which GPU architectures this build uses: the one place that decides.

CMake runs this file (``python fused_opt/_toolchain.py --cmake``) before it enables CUDA, because
CMake takes whatever nvcc it meets first and fails there when that one is broken. The doctor asks it
too. Standard library only, Python 3.9 or newer, and no import of the package: it must run before
anything is built.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

MIN_RELEASE = (12, 1)
"""The first nvcc whose kernels accept 32,764 bytes of parameters; older ones stop at 4,096."""

MIN_ARCH = 70
"""The first architecture that accepts them."""

DEFAULT_ARCHS = (75, 80, 86, 89, 90, 100, 120)
"""Turing to Blackwell, the large and the small chips of each; PTX at both ends covers the rest."""

ARCH_VARIABLES = ("FUSED_OPT_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CUDAARCHS")
"""Where a person names architectures; the first that is not blank counts."""

FAMILIES = {
    "kepler+tegra": (32,),
    "kepler+tesla": (37,),
    "kepler": (35,),
    "maxwell+tegra": (53,),
    "maxwell": (50, 52),
    "pascal": (60, 61),
    "volta+tegra": (72,),
    "volta": (70,),
    "turing": (75,),
    "ampere+tegra": (87,),
    "ampere": (80, 86),
    "ada": (89,),
    "hopper": (90,),
    "blackwell+tegra": (110,),
    "blackwell": (100, 103, 120, 121),
}
"""The names that ``TORCH_CUDA_ARCH_LIST`` takes, with the architectures torch means by them."""

TOOLS = ("cudafe++", "ptxas", "fatbinary", "nvlink")
"""What nvcc runs by name alone, so that PATH decides whose they are."""

PROBE_SOURCE = "__global__ void probe() {}\nint main() { probe<<<1, 1>>>(); return 0; }\n"
PROBE_TIMEOUT_S = 120
CUDA_ROOT_PARENT = Path("/usr/local")

Release = tuple[int, int]


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
class Tool:
    """A program that an nvcc runs."""

    name: str
    path: str
    """Empty: there is none on the PATH that nvcc uses."""
    release: Release | None
    """None: it does not tell."""

    def __str__(self) -> str:
        release = f"CUDA {_dotted(self.release)}" if self.release else "of no known release"
        return f"{self.path} ({release})" if self.path else f"{self.name} (not to be found)"


@dataclass(frozen=True)
class Nvcc:
    """All that is known of a candidate, healthy or not."""

    candidate: Candidate
    release: Release | None = None
    tools: tuple[Tool, ...] = ()
    host_compiler: str | None = None
    """Name and version of the C++ compiler that it calls."""
    default_arch: int | None = None
    """What it builds for when no architecture is named, as when CMake identifies it."""
    archs: tuple[int, ...] = ()
    """Every architecture it can compile for, ascending."""
    library_dirs: tuple[str, ...] = ()
    """Where the CUDA runtime lies, if not where nvcc itself looks (pip's toolkit)."""
    problem: str | None = None
    """What is wrong with it and what to set; None: healthy."""
    warnings: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The file that is run."""
        return self.candidate.path

    @property
    def healthy(self) -> bool:
        """Whether it can build this project."""
        return self.problem is None

    def __str__(self) -> str:
        release = f"CUDA {_dotted(self.release)}, " if self.release else ""
        return f"{self.path} ({release}from {self.candidate.source})"


@dataclass(frozen=True)
class Toolchain:
    """The answer: a compiler (None: CPU-only) and the architectures to build."""

    nvcc: Nvcc | None
    cubins: tuple[int, ...] = ()
    """Machine code, ascending."""
    ptx: tuple[int, ...] = ()
    """Code that a driver compiles for GPUs that have no cubin here, ascending."""
    notes: tuple[str, ...] = ()
    """Lines that a person should see even though the build goes on."""


# ---- The answer ----------------------------------------------------------------------------------


def resolve(environ: Mapping[str, str] | None = None) -> Toolchain:
    """Chooses the nvcc and the architectures.

    Args:
        environ: the environment to read; the process's own if None. ``FUSED_OPT_CUDA`` is ``0``
            (no CUDA), ``1`` (CUDA or an error) or ``auto`` (CUDA if there is an nvcc).
            ``FUSED_OPT_NVCC``, ``CUDACXX``, ``CUDA_HOME`` and ``CUDA_PATH`` name a compiler,
            ``CUDAHOSTCXX`` the C++ compiler that it calls; ``FUSED_OPT_CUDA_ARCHS``,
            ``TORCH_CUDA_ARCH_LIST`` and ``CUDAARCHS`` name architectures.

    Raises:
        ToolchainError: a request cannot be met, or every nvcc found is unusable.
    """
    environ = os.environ if environ is None else environ
    mode = environ.get("FUSED_OPT_CUDA", "").strip().lower() or "auto"
    if mode not in ("0", "1", "auto"):
        raise ToolchainError(f"FUSED_OPT_CUDA is 0, 1 or auto, found {mode!r}.")
    if mode == "0":
        return Toolchain(None, notes=("building a CPU-ONLY module, as FUSED_OPT_CUDA=0 asks",))

    driver = driver_release()
    refused: list[Nvcc] = []
    for candidate in candidates(environ):
        nvcc = inspect_nvcc(candidate, environ, driver)
        if nvcc.healthy:
            archs = choose_archs(environ, nvcc)
            notes = [f"passed over {other}: {other.problem}" for other in refused]
            notes += [f"{nvcc}: {warning}" for warning in nvcc.warnings]
            return Toolchain(nvcc, archs.cubins, archs.ptx, (*notes, *archs.notes))
        if candidate.explicit:
            raise ToolchainError(
                f"{nvcc}: {nvcc.problem}\n"
                f"Correct {candidate.source}, or unset it to let the build choose."
            )
        refused.append(nvcc)
    return _without_nvcc(refused, mandatory=mode == "1")


def _without_nvcc(refused: Sequence[Nvcc], mandatory: bool) -> Toolchain:
    """Returns the choice of a CPU-only module, where that is no surprise."""
    if refused:
        raise ToolchainError(
            "no nvcc on this machine is usable:"
            + "".join(f"\n  {nvcc}: {nvcc.problem}" for nvcc in refused)
            + "\nFUSED_OPT_NVCC names another nvcc; FUSED_OPT_CUDA=0 builds for the CPU only."
        )
    if mandatory:
        raise ToolchainError(
            f"FUSED_OPT_CUDA=1 asks for CUDA, but there is no nvcc on PATH, in {CUDA_ROOT_PARENT}"
            "/cuda* or among Python's packages. Install the CUDA toolkit, "
            f"{_dotted(MIN_RELEASE)} or newer, or set FUSED_OPT_NVCC to its nvcc."
        )
    note = "NO NVCC FOUND: building a CPU-ONLY module (FUSED_OPT_NVCC=/path/to/nvcc adds CUDA)"
    return Toolchain(None, notes=(note,))


def survey(environ: Mapping[str, str]) -> tuple[Nvcc, ...]:
    """Inspects every candidate, in the order in which the build would try them."""
    driver = driver_release()
    return tuple(inspect_nvcc(candidate, environ, driver) for candidate in candidates(environ))


# ---- Candidates ----------------------------------------------------------------------------------


def candidates(environ: Mapping[str, str]) -> Iterator[Candidate]:
    """Yields every nvcc to try, best first, each file once.

    Two names are one file if their folders are the same: nvcc looks for its tools beside the name
    it was called by, so that a link to it in another folder is another compiler.
    """
    seen: set[Path] = set()
    for candidate in (*_explicit_candidates(environ), *_implicit_candidates(environ)):
        path = Path(candidate.path)
        place = Path(os.path.realpath(path.parent), path.name)
        if place not in seen and (candidate.explicit or _is_executable(candidate.path)):
            seen.add(place)
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
    for folder in _package_folders():  # nvidia/cu13, nvidia/cuda_nvcc
        for root in sorted(Path(folder).glob("nvidia/cu*"), key=_version_in_name, reverse=True):
            yield Candidate(str(root / "bin" / "nvcc"), "pip", False)


def _package_folders() -> list[str]:
    """Returns where pip installs; an isolated build hides some of these from ``sys.path``."""
    paths = sysconfig.get_paths()
    return [paths["purelib"], paths["platlib"], site.getusersitepackages(), *filter(None, sys.path)]


def _version_in_name(path: Path) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", path.name))


def _is_executable(path: str) -> bool:
    return os.access(path, os.X_OK) and Path(path).is_file()  # which raises without permission


# ---- Health --------------------------------------------------------------------------------------


def inspect_nvcc(
    candidate: Candidate, environ: Mapping[str, str], driver: Release | None = None
) -> Nvcc:
    """Finds out what an nvcc is and whether it can build this project.

    Args:
        candidate: the nvcc; what makes it unusable is told in ``problem``, never raised.
        environ: the environment in which the build would run it.
        driver: the newest CUDA release that this machine's driver runs; None: no driver.
    """
    if not os.path.lexists(candidate.path):
        return Nvcc(candidate, problem="there is no such file.")
    if not _is_executable(candidate.path):
        return Nvcc(candidate, problem="it is not an executable file.")
    _, output = _run([candidate.path, "--version"], environ)
    release = _release(output)
    if release is None:
        return Nvcc(candidate, problem=f"`nvcc --version` names no release: {_gist(output)}.")

    _, output = _run([candidate.path, "--list-gpu-arch"], environ)
    archs = sorted({int(digits) for digits in re.findall(r"^compute_(\d+)\s*$", output, re.M)})
    nvcc = Nvcc(candidate, release, archs=tuple(archs))
    too_new = ""
    if driver and release[0] > driver[0]:
        ends = f"this machine's driver ends at CUDA {_dotted(driver)}"
        too_new = f"{ends}, so that what it builds cannot run here"
    with tempfile.TemporaryDirectory(prefix="fused_opt_nvcc_") as folder:
        source = Path(folder) / "probe.cu"
        source.write_text(PROBE_SOURCE, encoding="ascii")
        # Without an architecture, as CMake identifies an nvcc: there broken ones fail.
        probe = [nvcc.path, str(source), "-o", str(source.with_suffix(""))]
        host_compiler = environ.get("CUDAHOSTCXX", "").strip()
        probe += ["-ccbin", host_compiler] if host_compiler else []
        nvcc = _with_dry_run(nvcc, probe, environ)
        problem = next(_problems(nvcc, probe, environ, too_new), None)
    warnings = (too_new,) if too_new and candidate.explicit else ()
    return replace(nvcc, problem=problem, warnings=warnings)


def _with_dry_run(nvcc: Nvcc, probe: Sequence[str], environ: Mapping[str, str]) -> Nvcc:
    """Adds what nvcc's own dry run tells: the programs that it would really run, and how.

    Its lines are ``#$ NAME=value`` and ``#$ command``. nvcc runs its tools along the PATH that it
    prints there, and a wrapper script around it leaves the lines as they are.
    """
    _, output = _run([*probe, "--dryrun"], environ)
    values = dict(re.findall(r"^#\$ (\w+)=(.*)", output, re.M))
    commands = re.findall(r"^#\$ (?!\w+=)(.*)", output, re.M)
    if not commands:  # It stops before them where it has no host compiler; the probe will tell.
        return nvcc
    path = values.get("PATH", "")

    def locate(program: str) -> str:
        return shutil.which(program, path=path) or ""

    def version(program: str) -> str:
        return _run([program, "--version"], environ)[1] if program else ""

    tools = [(name, locate(name)) for name in TOOLS]
    linker = re.sub(r'^((?:"[^"]*"|[^"\s])*).*', r"\1", commands[-1]).replace('"', "")
    number = re.search(r"(?:\)|version) (\d[\d.]*)", version(locate(linker)))
    arch = re.search(r"-arch[ =](?:compute|sm)_(\d+)", "\n".join(commands))
    return replace(
        nvcc,
        tools=tuple(Tool(name, where, _release(version(where))) for name, where in tools),
        host_compiler=f"{Path(linker).name} {number[1] if number else '(of no known version)'}",
        default_arch=int(arch[1]) if arch else None,
        library_dirs=_library_dirs(values),
    )


def _library_dirs(values: Mapping[str, str]) -> tuple[str, ...]:
    """Returns where the CUDA runtime lies, if nvcc does not look there: pip has lib, not lib64."""
    searched = re.findall(r'"-L(.*?)"', values.get("LIBRARIES", ""))
    beside = str(Path(values.get("_HERE_", "")).parent / "lib")
    having = [d for d in (*searched, beside) if (Path(d) / "libcudart_static.a").exists()]
    return (beside,) if having == [beside] else ()


def _problems(
    nvcc: Nvcc, probe: Sequence[str], environ: Mapping[str, str], too_new: str
) -> Iterator[str]:
    """Yields what makes it unusable, each with its cure; the costly check comes last."""
    release = nvcc.release or (0, 0)
    if release < MIN_RELEASE:
        yield (
            f"CUDA {_dotted(MIN_RELEASE)} or newer is needed (kernel parameters above 4 KB). "
            "Install a newer toolkit, or set FUSED_OPT_NVCC to a newer nvcc."
        )
    if too_new and not nvcc.candidate.explicit:
        yield (
            f"{too_new}. Update the driver or install an older toolkit; "
            f"FUSED_OPT_NVCC={nvcc.path} takes this one all the same."
        )
    strange = [tool for tool in nvcc.tools if tool.release != release]
    if strange:
        yield _mixed(nvcc, f"it runs {', '.join(map(str, strange))}")
    if not nvcc.archs:
        yield f"`nvcc --list-gpu-arch` lists no architecture. {_way_out(nvcc)}"
    folders = [f"-L{folder}" for folder in nvcc.library_dirs]
    status, output = _run([*probe, *folders], environ)
    if status != 0:
        yield _diagnosis(nvcc, output)


def _diagnosis(nvcc: Nvcc, output: str) -> str:
    """Returns what the output of a failed compilation means, and the cure."""
    gist = _gist(output)
    refused = re.search(r"unsupported \w+ version!.*?(?:later than (\d+).*?!|\n)", output)
    if refused:
        accepted = f", such as g++-{refused[1]}" if refused[1] else ""
        said = refused[0].strip(" .!\n")
        return (
            f"it does not accept the host compiler {nvcc.host_compiler}: {said}. Set CUDAHOSTCXX "
            f"to one that it accepts{accepted}, or FUSED_OPT_NVCC to a newer nvcc."
        )
    if "preprocess host compiler" in output:
        return (
            f"its host compiler does not run: {gist}. Install g++, or set CUDAHOSTCXX to a C++ "
            "compiler."
        )
    if "exception specification is incompatible" in output:  # cospi and others since glibc 2.41
        return (
            f"its headers clash with this system's C library, which is too new for it: {gist}. "
            "Install a newer toolkit, or set FUSED_OPT_NVCC to a newer nvcc."
        )
    for tool in nvcc.tools:
        if re.search(rf"^{re.escape(tool.name)}\b", output, re.M):
            return _mixed(nvcc, f"with no architecture named, its {tool} fails: {gist}")
    return f"it cannot compile and link an empty kernel: {gist}. {_way_out(nvcc)}"


def _mixed(nvcc: Nvcc, finding: str) -> str:
    return f"mixed or broken toolkit: {finding}. {_way_out(nvcc)}"


def _way_out(nvcc: Nvcc) -> str:
    if Path(nvcc.path).is_symlink():
        return (
            "It is a link, and nvcc looks for its parts beside the link: set FUSED_OPT_NVCC to "
            f"{os.path.realpath(nvcc.path)}."
        )
    return (
        "Set FUSED_OPT_NVCC to the nvcc of a toolkit that is whole, or reinstall this one with "
        "its bin folder first on PATH."
    )


# ---- Architectures -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Archs:
    """Architectures, ascending."""

    cubins: tuple[int, ...]
    ptx: tuple[int, ...]
    notes: tuple[str, ...] = ()


def choose_archs(environ: Mapping[str, str], nvcc: Nvcc) -> Archs:
    """Returns what a person named, else what nvcc can build of the default list.

    PTX is kept at both ends, besides where it is asked for: it serves only chips of its own number
    or above, so that compute_120 alone would leave out sm_110.

    Raises:
        ToolchainError: a request is malformed or cannot be met.
    """
    buildable = [arch for arch in nvcc.archs if arch >= MIN_ARCH]
    request = "the default list"
    asked = Archs(tuple(arch for arch in DEFAULT_ARCHS if arch in buildable), ())
    for variable in ARCH_VARIABLES:
        value = environ.get(variable, "")
        if value.strip(" ;,\t\n"):
            request = f"{variable}={value}"
            asked = parse_archs(value, variable, buildable)
            break
    named = sorted({*asked.cubins, *asked.ptx})
    missing = [arch for arch in named if arch not in buildable]
    if missing or not named:
        raise ToolchainError(
            f"{request} names {_listed(missing or DEFAULT_ARCHS)}, but {nvcc} builds these kernels "
            f"for {_listed(buildable)} only (older GPUs than {MIN_ARCH} lack parameters above "
            "4 KB). Set FUSED_OPT_CUDA_ARCHS to some of these, or FUSED_OPT_NVCC to another nvcc."
        )
    return replace(asked, ptx=tuple(sorted({*asked.ptx, named[0], named[-1]})))


def parse_archs(request: str, variable: str, buildable: Sequence[int] = ()) -> Archs:
    """Reads a list of architectures, separated by semicolons, commas or spaces.

    An item is a number such as ``90`` or ``9.0``, a name such as ``Hopper``, or ``all``,
    ``all-major`` (the first of each generation) or ``native``. torch's ``+PTX`` adds PTX, CMake's
    ``-virtual`` asks for nothing else, and its ``-real`` is what an item means anyway.

    >>> parse_archs("8.0;9.0+PTX", "TORCH_CUDA_ARCH_LIST")
    Archs(cubins=(80, 90), ptx=(90,), notes=())
    >>> parse_archs("86-real 90-virtual", "CUDAARCHS")
    Archs(cubins=(86,), ptx=(90,), notes=())

    Args:
        request: the value of the variable.
        variable: its name, for messages.
        buildable: what ``all`` and ``all-major`` choose from, ascending.

    Raises:
        ToolchainError: an item is none of these, or ``native`` is asked for and there is no GPU.
    """
    cubins: set[int] = set()
    ptx: set[int] = set()
    notes: list[str] = []
    for item in filter(None, re.split(r"[;,\s]+", request)):
        word = re.sub(r"(\+ptx|-real|-virtual)$", "", item.lower())
        suffix = item.lower()[len(word) :]
        archs = _archs_named(word, variable, buildable)
        if not archs:
            raise ToolchainError(
                f"{variable}={request}: {item!r} is no architecture. Write numbers such as 90 or "
                "9.0+PTX, names such as Hopper, or one of all, all-major and native."
            )
        (ptx if suffix == "-virtual" else cubins).update(archs)
        if suffix == "+ptx":
            ptx.add(archs[-1])
        if re.search(r"\d[af]$", word):
            notes.append(
                f"{variable} names {item}, which is built as plain {archs[0]}: the kernels use no "
                "instruction that only one architecture has"
            )
    return Archs(tuple(sorted(cubins)), tuple(sorted(ptx)), tuple(notes))


def _archs_named(word: str, variable: str, buildable: Sequence[int]) -> Sequence[int]:
    """Returns the architectures that a word in lower case means; none if it means none."""
    number = re.fullmatch(r"([1-9]\d?)\.?(\d)[af]?", word)
    if number:
        return [int(number[1] + number[2])]
    if word == "all":
        return buildable
    if word == "all-major":
        return sorted({arch // 10: arch for arch in reversed(buildable)}.values())
    if word == "native":
        return native_archs(variable)
    return FAMILIES.get(word, ())


def code_for(capability: int, cubins: Sequence[int], ptx: Sequence[int]) -> str | None:
    """Returns what a GPU would run: "cubin", "ptx" (compiled by its driver at first use) or None.

    A cubin serves GPUs of its own major number and the same or a higher minor one; PTX serves all
    of its number and above. ``capability`` is the GPU's, without the dot.

    >>> code_for(86, [80, 90], [80]), code_for(120, [80, 90], [90]), code_for(75, [80], [80])
    ('cubin', 'ptx', None)
    """
    if any(arch // 10 == capability // 10 and arch <= capability for arch in cubins):
        return "cubin"
    return "ptx" if any(arch <= capability for arch in ptx) else None


# ---- The driver ----------------------------------------------------------------------------------


def _driver_library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def driver_release() -> Release | None:
    """Returns the newest CUDA release that the driver here runs; None: there is no driver."""
    library = _driver_library()
    number = ctypes.c_int()
    if library is None or library.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def native_archs(variable: str) -> Sequence[int]:
    """Returns the architectures of this machine's GPUs, ascending.

    Args:
        variable: what asks for them, for the message.

    Raises:
        ToolchainError: there is no driver or no GPU.
    """
    library = _driver_library()
    count, device, major, minor = (ctypes.c_int() for _ in range(4))
    archs = set()
    if library and library.cuInit(0) == 0 and library.cuDeviceGetCount(ctypes.byref(count)) == 0:
        for ordinal in range(count.value):
            library.cuDeviceGet(ctypes.byref(device), ordinal)
            # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR in cuda.h
            library.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
            library.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
            archs.add(10 * major.value + minor.value)
    if not archs:
        raise ToolchainError(
            f"{variable} asks for native, the architecture of this machine's GPU, but no "
            f"{'GPU' if library else 'driver'} is found. Name it instead, as in {variable}=90."
        )
    return sorted(archs)


# ---- Helpers -------------------------------------------------------------------------------------


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


def _release(output: str) -> Release | None:
    """Reads what nvcc and its tools answer to ``--version``."""
    match = re.search(r"release (\d+)\.(\d+)", output)
    return (int(match[1]), int(match[2])) if match else None


def _gist(output: str) -> str:
    """Returns the line of a compiler's output that says what went wrong."""
    lines = [" ".join(line.split()) for line in output.splitlines() if line.strip()]
    telling = [
        line for line in lines if re.search(r"fatal|error|not found|no such file", line, re.I)
    ]
    return (telling or lines or ["it printed nothing"])[0].rstrip(" .")


def _dotted(release: Release) -> str:
    return f"{release[0]}.{release[1]}"


def _listed(archs: Sequence[int]) -> str:
    return " ".join(map(str, archs))


# ---- What CMake reads ----------------------------------------------------------------------------


def cmake_lines(toolchain: Toolchain) -> str:
    """Returns what CMake reads: KEY=VALUE lines, with an empty NVCC for CPU-only.

    In CMake's own list "80-real" is a cubin alone, "90-virtual" PTX alone and "75" both. The other
    lists become compile definitions, which a semicolon would break.
    """
    nvcc, cubins, ptx = toolchain.nvcc, toolchain.cubins, toolchain.ptx

    def in_cmake(arch: int) -> str:
        return (
            f"{arch}-virtual" if arch not in cubins else f"{arch}{'' if arch in ptx else '-real'}"
        )

    values = {
        "NVCC": nvcc.path if nvcc else "",
        "CUDA_VERSION": _dotted(nvcc.release) if nvcc and nvcc.release else "",
        "CUDA_ARCHS": ",".join(map(str, cubins)),
        "PTX_ARCHS": ",".join(map(str, ptx)),
        "CMAKE_CUDA_ARCHITECTURES": ";".join(map(in_cmake, sorted({*cubins, *ptx}))),
        "LIBRARY_DIRS": ":".join(nvcc.library_dirs) if nvcc else "",
    }
    return "\n".join(f"{key}={value}" for key, value in values.items())


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
