"""Where each package's files lie; everything else is in pyproject.toml.

The kernels and the benchmark live in top-level folders but are imported as ``fastnn.kernels`` and ``fastnn.bench``:
a top-level import package called ``kernels`` exists on PyPI, and another one would break transformers.
"""

from setuptools import find_namespace_packages, find_packages, setup
from setuptools.command.build_py import build_py

ROOMS = ("kernels", "bench")
FOLDERS = {
    f"fastnn.{room}.{name}": f"{room}/{name.replace('.', '/')}"
    for room in ROOMS
    for name in find_namespace_packages(room, exclude=["*__pycache__*", "results*"])
}


class BuildRooms(build_py):
    """``fastnn/bench`` holds an ``__init__.py`` only; the modules that belong beside it are in ``bench/``."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = list(super().find_package_modules(package, package_dir))
        if (room := package.removeprefix("fastnn.")) in ROOMS:
            modules += super().find_package_modules(package, room)
        return modules


setup(
    packages=[*find_packages(include=["fastnn*"]), *FOLDERS],
    package_dir=FOLDERS,
    package_data={"": ["py.typed", "*.cu", "*.cuh"]},
    cmdclass={"build_py": BuildRooms},
)
