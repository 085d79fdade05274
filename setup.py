"""The part of the build that pyproject.toml cannot say: the optimizer's C++ kernels."""

import os
import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

sys.path.insert(0, str(Path(__file__).parent))

from holdfast.optim import build_kernels


class BuildKernels(Command):
    """Puts the library into the package. Where that fails the package does without, unless kernels are required."""

    description = "compile the C++ kernels of the optimizer"
    command_name = "build_kernels"
    user_options = []
    editable_mode = False

    def initialize_options(self):
        self.build_lib = None

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        if self.editable_mode and build_kernels.is_current(build_kernels.LIBRARY):
            return
        target = build_kernels.LIBRARY if self.editable_mode else self._in_build
        if not self.editable_mode:
            target.unlink(missing_ok=True)  # of an earlier build
        try:
            isas = build_kernels.build(target, os.environ)
        except build_kernels.KernelsNotBuilt as error:
            if os.environ.get("HOLDFAST_REQUIRE_KERNELS") == "1":
                raise SystemExit(f"{error.details}error: HOLDFAST_REQUIRE_KERNELS=1, but {error}") from error
            self.warn(f"{error}. The optimizer will take plain torch operations on CPUs: slower, with the same results")
        else:
            self.announce(f"built {target}: {', '.join(isas)}", level=2)
            self.distribution.has_kernels = not self.editable_mode

    @property
    def _in_build(self):
        return Path(self.build_lib, "holdfast", "optim", "kernels", build_kernels.LIBRARY.name)

    def get_source_files(self):
        return [os.path.relpath(path) for path in build_kernels.sources()]

    def get_outputs(self):
        return [str(self._in_build)] if self._in_build.exists() else []

    def get_output_mapping(self):
        there = self.editable_mode and build_kernels.LIBRARY.exists()
        return {str(self._in_build): os.path.relpath(build_kernels.LIBRARY)} if there else {}


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
