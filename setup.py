"""The part of the build that pyproject.toml cannot say: the C++ kernels of the optimizer and of snapshots."""

import os
import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

sys.path.insert(0, str(Path(__file__).parent))

from holdfast.fault_tolerance import build_kernels as staging
from holdfast.native_build import KernelsNotBuilt
from holdfast.optim import build_kernels as optim

ROOT = Path(__file__).resolve().parent
LIBRARIES = (optim.NATIVE, staging.NATIVE)


class BuildKernels(Command):
    """Puts the libraries into the package. Where that fails the package does without, unless kernels are required."""

    description = "compile the C++ kernels"
    command_name = "build_kernels"
    user_options = []
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        for library in LIBRARIES:
            if not (self.editable_mode and library.is_current()):
                self._build(library)

    def _build(self, library):
        target = library.path if self.editable_mode else self._in_build(library)
        if not self.editable_mode:
            target.unlink(missing_ok=True)  # of an earlier build
        try:
            isas = library.build(target, os.environ)
        except KernelsNotBuilt as error:
            if os.environ.get("HOLDFAST_REQUIRE_KERNELS") == "1":
                raise SystemExit(f"{error.details}error: HOLDFAST_REQUIRE_KERNELS=1, but {error}") from error
            self.warn(f"{error}. {library.absence}")
        else:
            self.announce(f"built {target}: {', '.join(isas)}", level=2)
            self.distribution.has_kernels |= not self.editable_mode

    def _in_build(self, library):
        return Path(self.build_lib, library.path.relative_to(ROOT))

    def get_source_files(self):
        return [os.path.relpath(path) for library in LIBRARIES for path in library.sources()]

    def get_outputs(self):
        return [str(path) for path in map(self._in_build, LIBRARIES) if path.exists()]

    def get_output_mapping(self):
        there = [library for library in LIBRARIES if self.editable_mode and library.path.exists()]
        return {str(self._in_build(library)): os.path.relpath(library.path) for library in there}


class BuildAll(build):
    sub_commands = [*build.sub_commands, ("build_kernels", None)]


class Holdfast(Distribution):
    has_kernels = False  # known once they are built

    def has_ext_modules(self):
        return self.has_kernels


class Wheel(bdist_wheel):
    """For one platform and every Python with the library inside, for every platform without."""

    def run(self):
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_kernels
        super().run()

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(distclass=Holdfast, cmdclass={"build": BuildAll, "build_kernels": BuildKernels, "bdist_wheel": Wheel})
