"""Drives CMake: CMakeLists.txt owns every source and flag, pyproject.toml everything else."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name: str, folder_attribute: str) -> str:
    """Returns the path of cmake or ninja: the pip package's own program, else the one on PATH."""
    try:
        folder = getattr(importlib.import_module(name), folder_attribute)
        path = shutil.which(name, path=str(folder))
    except (ImportError, AttributeError):
        path = None
    path = path or shutil.which(name)
    if path is None:
        raise SystemExit(f"fused_opt: {name} is needed to build; `pip install {name}` provides it")
    return path


def run(command: list[str]) -> None:
    """Runs a command; its own output, not a traceback, says why it failed."""
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit("fused_opt: the native module was not built; the lines above say why")


class CMakeBuild(build_ext):
    """Builds fused_opt._C with CMake and Ninja."""

    def build_extension(self, ext: Extension) -> None:
        """Configures and builds into the folder where setuptools expects the module."""
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        ninja = find_tool("ninja", "BIN_DIR")
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        # --fresh: a kept folder remembers its nvcc and, from an isolated build, a deleted ninja.
        configure = [cmake, "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
        ]
        jobs = os.environ.get("MAX_JOBS")
        run(configure)
        run([cmake, "--build", str(build), *(["--parallel", jobs] if jobs else [])])


setup(ext_modules=[Extension("fused_opt._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
