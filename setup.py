"""Compiles csrc/ with CMake into `ca3d_kernels._native` and `._cuda`; installs both packages."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_tool(name: str) -> str:
    """Path of a build tool: the build environment's own script first, then PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name) or name


class CMakeBuild(build_ext):
    """Builds the native extensions of the project with CMake and Ninja, all with the first one."""

    def build_extension(self, ext: Extension) -> None:
        if ext is not self.extensions[0]:
            return
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        target.mkdir(parents=True, exist_ok=True)
        # A fresh folder for every build: a re-used CMake cache remembers the ninja of a build
        # environment that pip has deleted since.
        with tempfile.TemporaryDirectory(prefix="ca3d-build-") as build:
            subprocess.run(
                [
                    find_tool("cmake"),
                    "-S", str(ROOT),
                    "-B", build,
                    "-G", "Ninja",
                    f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
                    f"-DCMAKE_BUILD_TYPE={os.environ.get('CA3D_BUILD_TYPE', 'Release')}",
                    f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
                    f"-DPython_EXECUTABLE={sys.executable}",
                    "-DPYBIND11_FINDPYTHON=ON",
                    f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                    f"-DCA3D_VERSION={self.distribution.get_version()}",
                    f"-DCA3D_SANITIZE={os.environ.get('CA3D_SANITIZE', '')}",
                    f"-DCA3D_CUDA={os.environ.get('CA3D_CUDA') or 'auto'}",
                    f"-DCA3D_CUDA_ARCHS={os.environ.get('CA3D_CUDA_ARCHS', '')}",
                ],
                check=True,
            )  # fmt: skip
            subprocess.run([find_tool("cmake"), "--build", build], check=True)


setup(
    packages=[*find_packages(include=["ca3d_kernels*"]), *find_packages("python")],
    package_dir={"ca3d_kernels": "ca3d_kernels", "ca3d": "python/ca3d"},
    package_data={
        "ca3d_kernels": ["py.typed", "*.pyi"],
        "ca3d": ["py.typed", "data/embedded/*.npz", "data/embedded/*.txt"],
    },
    ext_modules=[
        Extension("ca3d_kernels._native", sources=[]),
        # Only where nvcc is found, see cmake/cuda.cmake.
        Extension("ca3d_kernels._cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
