"""What a user gets: the source distribution, the wheel built from it, and the installed package.

FUSED_OPT_WHEEL names a wheel to check in place of one that is built here; .ci/test-wheel sets it.
"""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

import fused_opt
from fused_opt import _C

ROOT = Path(__file__).resolve().parents[1]
GIVEN_WHEEL = os.environ.get("FUSED_OPT_WHEEL", "")

#: A wheel stays a download of seconds: the native module with every architecture is about 1 MB.
MAX_WHEEL_BYTES = 5_000_000

#: Where nothing listens: what tries to reach a network through its proxy fails at once.
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"

needs_checkout = pytest.mark.skipif(
    not (ROOT / "CMakeLists.txt").is_file(), reason="there are no sources beside the tests"
)


def run(*command: str | Path, cwd: Path, **environ: str) -> str:
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


def sources() -> set[str]:
    """Returns the files of the checkout that a build, the tests and the documents need."""
    files = [path for path in ROOT.glob("*") if path.suffix in (".md", ".py", ".toml", ".txt")]
    for folder in ("benchmarks", "csrc", "docs", "fused_opt", "tests"):
        files += [path for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    files = [path for path in files if ROOT / "benchmarks" / "results" not in path.parents]
    names = {path.relative_to(ROOT).as_posix() for path in files if path.is_file()}
    # What builds and benchmarks leave behind is no source.
    return {name for name in names if not name.endswith((".so", ".svg"))} - {"requirements.txt"}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, built from a copy of the sources that no git knows."""
    pytest.importorskip("setuptools")
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("sdist")
    for name in {*sources(), "LICENSE", "MANIFEST.in", "Makefile"}:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    (copy / "fused_opt" / Path(_C.__file__).name).write_bytes(b"left by an earlier build")
    run(sys.executable, "-c", BUILD_SDIST, out, cwd=copy)
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel under test: the given one, else a CPU-only one built from the sdist."""
    if GIVEN_WHEEL:
        return Path(GIVEN_WHEEL)
    if not (ROOT / "CMakeLists.txt").is_file():
        pytest.skip("there are no sources beside the tests, and FUSED_OPT_WHEEL names no wheel")
    for module in ("cmake", "ninja", "pybind11"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "git").write_text(f"#!/bin/sh\necho \"$@\" >>'{folder}/git-calls'\nexit 1\n")
    (folder / "git").chmod(0o755)
    environ = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "FUSED_OPT_CUDA": "0"}
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    archive = request.getfixturevalue("sdist")
    run(*PIP, "wheel", *options, archive, cwd=folder, **environ, **NO_NETWORK)
    assert not (folder / "git-calls").exists()
    return next(folder.glob("*.whl"))


# ---- Source distribution -------------------------------------------------------------------------


@needs_checkout
def test_sdist_holds_every_source(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"csrc/binding.cpp", "fused_opt/_toolchain.py", "fused_opt/doctor.py"} <= sources()
    assert sources() - names == set()


@needs_checkout
def test_sdist_holds_no_build_products(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = archive.getnames()
    assert [name for name in names if re.search(r"\.(so|o|pyc)$|/build/", name)] == []


@needs_checkout
def test_a_build_option_adds_the_local_version_of_a_cuda_variant(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    code = """
import sys
from setuptools import build_meta
settings = {"--global-option": ["egg_info", f"--egg-base={sys.argv[1]}", "--tag-build=+cu128"]}
build_meta.prepare_metadata_for_build_wheel(sys.argv[1], settings)
"""
    run(sys.executable, "-c", code, tmp_path, cwd=ROOT)
    assert (tmp_path / f"fused_opt-{fused_opt.__version__}+cu128.dist-info").is_dir()


# ---- Wheel ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_wheel_holds_the_package_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = [name for name in archive.namelist() if not name.endswith("/")]
    names = [name for name in files if ".dist-info/" not in name]
    assert {"fused_opt/py.typed", "fused_opt/doctor.py", "fused_opt/_C.pyi"} <= set(names)
    assert {"fused_opt/higher/__init__.py", "fused_opt/benchmarks/probe.cpp"} <= set(names)
    assert len([name for name in names if re.fullmatch(r"fused_opt/_C\..*so", name)]) == 1
    # A folder fused_opt.libs would hold bundled libraries, a second libgomp among them.
    ours = re.compile(r"fused_opt/(((benchmarks|higher)/)?\w+\.(py|pyi|typed|cpp)|_C\..*so)")
    assert [name for name in names if not ours.fullmatch(name)] == []


@pytest.mark.slow
def test_wheel_requires_nothing_but_torch(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        path = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(path))
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert required == ["torch>=2.10"]
    assert metadata["Version"].partition("+")[0] == fused_opt.__version__


@pytest.mark.slow
def test_wheel_is_a_small_download(wheel: Path) -> None:
    assert wheel.stat().st_size < MAX_WHEEL_BYTES


def test_the_module_with_its_cuda_code_fits_a_small_wheel() -> None:
    # A wheel is a deflated archive, and all but the module is a few dozen KB: so the module of this
    # build, CUDA code included where nvcc was found, tells the size without another build.
    module = Path(_C.__file__).read_bytes()
    assert len(zlib.compress(module)) < MAX_WHEEL_BYTES - 200_000


# ---- Installed package ---------------------------------------------------------------------------


@pytest.mark.slow
def test_installed_wheel_takes_a_step(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    options = ("--no-index", "--no-deps", "--target", site)
    run(*PIP, "install", *options, wheel, cwd=tmp_path, **NO_NETWORK)
    code = f"""
import torch, fused_opt
from fused_opt import _C
assert fused_opt.__file__.startswith({str(site)!r}), fused_opt.__file__
assert _C.__file__.startswith({str(site)!r}), _C.__file__
weight = torch.nn.Parameter(torch.tensor([1.0]))
weight.grad = torch.tensor([2.0])
ema = fused_opt.EMA([weight], decay=0.5)
fused_opt.SGD([weight], lr=0.25, momentum=0.9, ema=ema).step()
assert weight.item() == 0.5
assert fused_opt.build_info()["version"] == fused_opt.__version__
print("stepped")
"""
    output = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    assert output.split() == ["stepped"]


def test_torch_and_the_module_share_one_pool_of_threads(tmp_path: Path) -> None:
    code = "import torch; from fused_opt import _C; print(open('/proc/self/maps').read())"
    mapped = run(sys.executable, "-c", code, cwd=ROOT)
    assert len(set(re.findall(r"/\S*libgomp\S*", mapped))) == 1
