"""What ``holdfast doctor`` looks at on the machine it runs on."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from holdfast import knobs
from holdfast.configs import validate
from holdfast.configs.memory import state_bytes
from holdfast.configs.schema import LaunchKind, RunConfig
from holdfast.errors import ConfigurationError
from holdfast.launch.finding import BAD, OK, WARN, Finding
from holdfast.launch.identity import versions
from holdfast.launch.lease import hold
from holdfast.launch.run_dir import root_problems
from holdfast.launch.upload import shadowing_names
from holdfast.launch.wording import size
from holdfast.trainer.config import TrackerName, WandbMode

__all__ = ["host_checks"]

_SHM = Path("/dev/shm")
_SHM_BYTES = 200_000_000
"""Ray keeps its object store there; a container's 64 MB are too few."""


def host_checks(config: RunConfig) -> Iterator[Finding]:
    """Everything but Ray's cluster, in the order of a start."""
    yield from _versions()
    yield from _devices(config)
    yield from _kernels()
    yield from _configuration(config)
    yield from _root(config)
    yield from _shared_memory(config)
    yield from _names()
    yield from _tracker(config)


def _versions() -> Iterator[Finding]:
    found = versions()
    missing = [name for name in ("torch", "deepspeed", "ray", "numpy", "pyarrow") if name not in found]
    if platform.system() != "Linux":
        yield Finding(BAD, "system", f"{platform.system()} has no memory files that a process leaves behind; use Linux")
    if missing:
        yield Finding(BAD, "versions", f"{', '.join(missing)} missing; pip install holdfast")
    yield Finding(OK, "versions", ", ".join(f"{name} {version}" for name, version in found.items()))


def _devices(config: RunConfig) -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding(BAD, "torch", f"does not load ({error}); install a build for this machine, see pytorch.org")
        return
    wanted = config.launch.gpus_per_worker * config.launch.workers_per_node
    count = torch.cuda.device_count()
    if not count:
        if wanted:
            yield Finding(
                WARN,
                "GPUs",
                f"none here, and each node needs {wanted:g}; right on a head node, else look at nvidia-smi",
            )
        else:
            yield Finding(OK, "GPUs", "none; trains on the CPU with gloo")
        return
    names = ", ".join(sorted({torch.cuda.get_device_name(index) for index in range(count)}))
    has_nccl = torch.distributed.is_nccl_available()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if has_nccl else ""  # type: ignore[no-untyped-call]
    level = BAD if wanted and not nccl else (WARN if wanted > count else OK)
    need = f"; each node needs {wanted:g}: lower launch.workers_per_node" if wanted > count else ""
    yield Finding(level, "GPUs", f"{count} ({names}); NCCL {nccl or 'missing: install a CUDA build of torch'}{need}")


def _kernels() -> Iterator[Finding]:
    from holdfast.fault_tolerance import staging
    from holdfast.native_build import find_compiler
    from holdfast.optim import native

    compiler = shutil.which(find_compiler(os.environ)[0])
    for about, isas, package in (("optimizer", native.isas, "optim"), ("snapshots", staging.isas, "fault_tolerance")):
        try:
            found = isas()
        except Exception as error:  # whatever a library says that does not load: the line tells it
            found = []
            yield Finding(WARN, about, f"the kernels do not load: {error}")
        if found:
            yield Finding(OK, about, f"C++ kernels: {', '.join(found)}")
        else:
            build = f"python -m holdfast.{package}.build_kernels"
            how = f"{build} builds them" if compiler else f"install a C++ compiler, then {build}"
            yield Finding(WARN, about, f"no C++ kernels: slower, with the same results; {how}")


def _configuration(config: RunConfig) -> Iterator[Finding]:
    """The rules of a start, memory among them."""
    host = validate.this_host()
    problems = validate.check(config, host)
    for problem in problems:
        yield Finding(BAD, "options", problem)
    if not problems:
        state = size(state_bytes(config))
        yield Finding(
            OK, "options", f"may start here: {state} of state per rank, {size(host.free_bytes)} of memory free"
        )


def _root(config: RunConfig) -> Iterator[Finding]:
    ranks = config.launch.nodes * config.launch.workers_per_node
    need = 0 if validate.check(config, validate.this_host()) else state_bytes(config) * ranks
    problems = root_problems(config.root, need_bytes=need * (config.snapshot.keep_last + 1))
    for problem in problems:
        yield Finding(BAD, "root", problem)
    if problems:
        return
    try:
        with hold(Path(config.root) / f".doctor-{os.getpid()}.lock"):
            pass
    except ConfigurationError as error:
        yield Finding(BAD, "root", "; ".join(error.problems))
    else:
        free = size(shutil.disk_usage(config.root).free)
        kept = size(need * (config.snapshot.keep_last + 1))
        yield Finding(
            OK, "root", f"{config.root} can be written and locked; {free} free, checkpoints take up to {kept}"
        )
    finally:
        Path(config.root, f".doctor-{os.getpid()}.lock").unlink(missing_ok=True)


def _shared_memory(config: RunConfig) -> Iterator[Finding]:
    if config.launch.kind is LaunchKind.PROCESS or not _SHM.is_dir():
        return
    total = shutil.disk_usage(_SHM).total
    if total < _SHM_BYTES:
        yield Finding(
            WARN,
            "shm",
            f"/dev/shm has {size(total)} and Ray wants {size(_SHM_BYTES)}: docker run --shm-size=1g, or a "
            "memory emptyDir at /dev/shm",
        )
    else:
        yield Finding(OK, "shm", f"/dev/shm has {size(total)}")


def _names() -> Iterator[Finding]:
    """A job's working directory comes first on every worker's path, and so does this one for a driver started here."""
    here = Path.cwd()
    top = [path.name for path in here.iterdir()]
    packages = [f"{name}/__init__.py" for name in top if (here / name / "__init__.py").is_file()]
    shadowing = shadowing_names([*(name for name in top if (here / name).is_file()), *packages])
    for name in shadowing:
        yield Finding(BAD, "names", f"{here / name} hides Python's own module of that name from workers; rename it")
    if not shadowing:
        yield Finding(OK, "names", f"nothing in {here} hides a module of the standard library")


def _tracker(config: RunConfig) -> Iterator[Finding]:
    if config.tracker.name is TrackerName.NONE:
        yield Finding(OK, "W&B", "off; tracker=wandb turns it on")
        return
    try:
        version = metadata.version("wandb")
    except metadata.PackageNotFoundError:
        yield Finding(BAD, "W&B", "tracker=wandb, and wandb is not installed; pip install wandb, or tracker=none")
        return
    mode, has_key = config.tracker.mode, knobs.wandb_key() is not None
    if mode is WandbMode.ONLINE and not has_key:
        yield Finding(WARN, "W&B", f"{version}; online without WANDB_API_KEY: only a login of this user's helps")
    else:
        online = mode is not WandbMode.OFFLINE and has_key
        yield Finding(OK, "W&B", f"{version}, {'online' if online else 'offline'}")
