"""What a job takes along to the cluster, and what is wrong with it before anything is uploaded. Loads no Ray."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml  # type: ignore[import-untyped]  # comes with OmegaConf, its stubs do not

from holdfast.errors import ConfigurationError

__all__ = ["SHIPPED", "RuntimeEnv", "read_runtime_env", "shadowing_names", "size_problems"]

SHIPPED = Path(__file__).with_name("runtime_env.yaml")
"""The runtime environment that comes with the package."""
_LARGEST = 5
_MODULE_ENDINGS = (".py", ".pyc", ".so")


@dataclass(frozen=True, slots=True)
class RuntimeEnv:
    """A runtime environment as Ray takes it, and what Holdfast looks at."""

    plain: Mapping[str, Any]
    """Of YAML."""
    source: Path

    @property
    def working_dir(self) -> Path | None:
        """The directory to be uploaded; None if the job brings none, or one that is somewhere else already."""
        named = self.plain.get("working_dir")
        return None if named is None or "://" in str(named) else Path(str(named)).absolute()

    @property
    def excludes(self) -> tuple[str, ...]:
        return tuple(map(str, self.plain.get("excludes") or ()))

    @property
    def env_vars(self) -> Mapping[str, str]:
        return dict(self.plain.get("env_vars") or {})

    def warnings(self) -> list[str]:
        """What works and will be regretted."""
        found = []
        if "RAY_JOB_STOP_WAIT_TIME_S" not in self.env_vars:
            found.append(
                f"{self.source} does not set env_vars.RAY_JOB_STOP_WAIT_TIME_S: stopping the job leaves 3 s for "
                'saving; set it to "120"'
            )
        if "pip" in self.plain or "conda" in self.plain:
            found.append(
                f"{self.source} installs packages on every node for every job, and hangs where there is no network; "
                "an image or an environment on shared storage starts at once"
            )
        return found


def read_runtime_env(file: Path | None) -> RuntimeEnv:
    """The user's runtime environment, or the one that comes with the package. Raises: ConfigurationError."""
    source = file or SHIPPED
    try:
        plain = yaml.safe_load(source.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigurationError(f"--runtime-env={source} cannot be read: {' '.join(str(error).split())}") from error
    problems = _form_problems(plain, source)
    if problems:
        raise ConfigurationError(problems)
    environment = RuntimeEnv(plain, source)
    folder = environment.working_dir
    if folder is not None and not folder.is_dir() and folder.suffix not in (".zip", ".gz", ".whl"):
        raise ConfigurationError(
            f"{source}: working_dir={plain['working_dir']!r} must be a directory; {folder} is none"
        )
    return environment


def _form_problems(plain: object, source: Path) -> list[str]:
    if not isinstance(plain, Mapping):
        return [f"{source} must hold keys and values, such as working_dir: ./"]
    problems = []
    if not isinstance(plain.get("excludes") or [], list):
        problems.append(f"{source}: excludes={plain['excludes']!r} must be a list of patterns")
    variables = plain.get("env_vars") or {}
    if not isinstance(variables, Mapping):
        return [*problems, f"{source}: env_vars={variables!r} must map names to texts"]
    problems += [
        f'{source}: env_vars.{name}={value!r} must be a text; write "{value}"'
        for name, value in variables.items()
        if not isinstance(value, str)
    ]
    return problems


def shadowing_names(paths: Collection[str]) -> list[str]:
    """Files and packages at the top of a directory that Python would import instead of its own standard library: the
    directory comes first on the path of every worker, which then dies before it can say why."""
    there = set(paths)
    tops = {PurePosixPath(path).parts[0] for path in there}
    return sorted(
        top
        for top in tops
        if top.partition(".")[0] in sys.stdlib_module_names
        and ((top in there and top.endswith(_MODULE_ENDINGS)) or f"{top}/__init__.py" in there)
    )


def size_problems(files: Mapping[str, int], *, limit_bytes: int, folder: Path) -> list[str]:
    """Nothing, or one sentence with the largest files. ``files``: bytes by relative path."""
    total = sum(files.values())
    if total <= limit_bytes:
        return []
    largest = sorted(files.items(), key=lambda item: -item[1])[:_LARGEST]
    named = ", ".join(f"{path} ({_mib(size)})" for path, size in largest)
    what = f"working_dir={folder} would upload {_mib(total)} in {len(files)} files"
    rule = f"Ray's dashboard takes {_mib(limit_bytes)}"
    return [f"{what}, and {rule}; the largest are {named}; name them under excludes, or in .gitignore"]


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
