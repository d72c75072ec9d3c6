"""Fetches real CUDA compilers, without root and without installing them, for the tests beside it.

Each is unpacked once into a folder of its own in CACHE: 1.3 GB of downloads, 1 GB on disk. CUDA
11.8 and 12.4 are Debian packages, from the mirror that this machine uses; CUDA 13 comes from PyPI.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("FUSED_OPT_TOOLCHAINS", ROOT / ".venv" / "toolchains")).absolute()

#: What a build needs besides nvcc, without any toolkit that this machine has on its own PATH.
SYSTEM_PATH = "/usr/bin:/bin"

#: What apt checks Debian's signatures with.
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

#: Packages, each with the patterns of those files that are unpacked.
Packages = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Compiler:
    """A CUDA toolkit on disk."""

    name: str
    release: tuple[int, int]
    nvcc: Path

    @property
    def bin(self) -> Path:
        """The folder of its ptxas, which must be on PATH for Debian's nvcc to find it."""
        return self.nvcc.parent

    @property
    def path(self) -> str:
        """A PATH on which it comes first and no other toolkit follows."""
        return f"{self.bin}{os.pathsep}{SYSTEM_PATH}"


def call(
    *command: str | Path, cwd: Path | None = None, environ: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Runs a command, in the given environment alone, and returns its status and output."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=None if environ is None else dict(environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return result.returncode, result.stdout


def run(
    *command: str | Path, cwd: Path | None = None, environ: Mapping[str, str] | None = None
) -> str:
    """Runs a command and returns its output; a failure shows all it said."""
    status, output = call(*command, cwd=cwd, environ=environ)
    assert status == 0, f"{' '.join(map(str, command))}\n{output}"
    return output


def once(name: str, fill: Callable[[Path], None]) -> Path:
    """Returns the folder CACHE/name, filled by the first call; a broken-off fill starts again.

    It is filled under its final name, since Debian's files hold absolute paths.
    """
    folder, complete = CACHE / name, CACHE / f"{name}.complete"
    if not complete.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        fill(folder)
        complete.touch()
    return folder


# ---- Debian --------------------------------------------------------------------------------------

LIBRARIES = "./usr/lib/x86_64-linux-gnu"
NVCC = {
    "nvidia-cuda-toolkit": (
        "./etc/*",
        "./usr/bin/*",
        "./usr/lib/cuda/*",
        "./usr/lib/nvidia-cuda-toolkit/bin/*",
        "./usr/lib/nvidia-cuda-toolkit/libdevice/*",
    )
}
DEVELOPMENT = {  # Of 2.5 GB unpacked, the headers and the static runtime.
    "nvidia-cuda-dev": (
        "./usr/include/*",
        f"{LIBRARIES}/libcudart_static.a",
        f"{LIBRARIES}/libcudadevrt.a",
    ),
    "libcu++-dev": ("./usr/include/*",),
}


def debian(suite: str, release: tuple[int, int], packages: Packages) -> Compiler:
    """Returns the toolkit of a Debian suite, unpacked from the given parts of its packages.

    It keeps Debian's layout, the one that mixes toolkits: nvcc's profile names the folder of cicc,
    but ptxas lies in usr/bin, where nvcc finds it through PATH alone.
    """

    def fill(folder: Path) -> None:
        if not KEYRING.is_file() or shutil.which("apt-get") is None:
            pytest.skip("this is no Debian machine, so that Debian's nvcc cannot be fetched")
        _download(suite, packages, folder)
        for name, patterns in packages.items():
            (archive,) = folder.glob(f"{name}_*.deb")
            unpack = f"dpkg-deb --fsys-tarfile {archive} | tar -x -C {folder} --wildcards"
            run("bash", "-o", "pipefail", "-c", " ".join([unpack, *map(repr, patterns)]))
            archive.unlink()
        _relocate(folder)

    name = f"debian-{release[0]}.{release[1]}"
    return Compiler(name, release, once(name, fill) / "usr" / "bin" / "nvcc")


def _download(suite: str, packages: Packages, folder: Path) -> None:
    """Downloads packages with settings and lists of its own: the machine's stay as they are."""
    # Quotes keep the variables from the shell; apt-get prints one line per index that it knows.
    uris = run("apt-get", "indextargets", "--format=$(REPO_URI)", "Identifier: Packages").split()
    assert uris, "apt knows no mirror: /etc/apt has no sources"
    apt = folder / "apt"
    (apt / "lists" / "partial").mkdir(parents=True)
    sources = apt / "sources.list"
    components = "main contrib non-free"
    sources.write_text(f"deb [signed-by={KEYRING}] {uris[0]} {suite} {components}\n")
    settings = {
        "APT::Sandbox::User": "root",  # The user _apt cannot write here.
        "Acquire::Languages": "none",
        "Dir::Cache": str(apt),
        "Dir::Etc::SourceList": str(sources),
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State::Lists": str(apt / "lists"),
    }
    options = [f"--option={key}={value}" for key, value in settings.items()]
    run("apt-get", *options, "update")
    run("apt-get", *options, "download", *(f"{name}/{suite}" for name in packages), cwd=folder)
    shutil.rmtree(apt)


def _relocate(root: Path) -> None:
    """Turns the absolute paths in Debian's wrapper and profile of nvcc to the unpacked folder."""
    wrapper, profile = root / "usr" / "bin" / "nvcc", root / "etc" / "nvcc.profile"
    wrapper.write_text(wrapper.read_text().replace("/usr/lib/", f"{root}/usr/lib/"))
    text = profile.read_text().replace("/usr/lib/", f"{root}/usr/lib/")
    # Outside /usr, CMake knows the libdevice of a toolkit by the end of its path.
    text = text.replace("/nvidia-cuda-toolkit/libdevice", "/cuda/nvvm/libdevice")
    profile.write_text(f'{text}INCLUDES += "-I{root}/usr/include" $(_SPACE_)\n')
    link = root / "usr" / "lib" / "nvidia-cuda-toolkit" / "bin" / "nvcc.profile"
    link.unlink()
    link.symlink_to(profile)


# ---- PyPI ----------------------------------------------------------------------------------------


def pypi(toolkit: str) -> Compiler:
    """Returns a toolkit of CUDA 13 as pip installs it; PyPI has no nvcc of CUDA 12."""

    def fill(folder: Path) -> None:
        parts = f"cuda-toolkit[nvcc,cudart,crt,nvvm,cccl]=={toolkit}"
        run(sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, parts)

    major, minor, *_ = map(int, toolkit.split("."))
    name = f"pypi-{toolkit}"
    root = once(name, fill) / "nvidia" / f"cu{major}"
    return Compiler(name, (major, minor), root / "bin" / "nvcc")


# ---- Mixed pairs ---------------------------------------------------------------------------------


def with_foreign_ptxas(compiler: Compiler, other: Compiler, folder: Path) -> Compiler:
    """Returns a toolkit of links to a compiler's files, except that its ptxas is another's."""
    root = compiler.bin.parent
    for entry in root.iterdir():
        if entry.name != "bin":
            (folder / entry.name).symlink_to(entry)
    (folder / "bin").mkdir()
    for entry in compiler.bin.iterdir():
        source = other.bin / "ptxas" if entry.name == "ptxas" else entry
        (folder / "bin" / entry.name).symlink_to(source)
    return Compiler(f"mixed-{compiler.name}", compiler.release, folder / "bin" / "nvcc")
