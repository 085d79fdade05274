"""What a run that trains adapters must obey. Torch is loaded only if there are some."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from holdfast.configs.schema import RunConfig
from holdfast.errors import HoldfastError
from holdfast.fault_tolerance.bricks import BrickFile
from holdfast.trainer.models import model_of

__all__ = ["adapter_problems", "curriculum_problems", "frozen_files", "method_problems"]

_OF_A_METHOD = ("options", "base", "nf4", "tasks", "task", "seen", "keep_best", "directions", "protected_directions")


def adapter_problems(config: RunConfig) -> Iterator[str]:
    adapter, parallel = config.adapter, config.parallel
    if not adapter.method:
        for key in _OF_A_METHOD:
            if getattr(adapter, key):
                yield f"adapter.{key}={getattr(adapter, key)!r} is of a method, and there is none; set adapter.method"
        return
    if parallel.pipeline > 1:
        yield f"adapter.method={adapter.method} with parallel.pipeline={parallel.pipeline}: adapters have no pipeline"
    if parallel.zero_stage == 3:
        yield f"adapter.method={adapter.method} with parallel.zero_stage=3: the base is whole on every rank; use 2"
    if not adapter.base:
        yield "adapter.base is empty: adapters need frozen weights, such as <run>/export/model.safetensors"
    if not adapter.task:
        yield "adapter.task is empty: name what is learned, for example adapter.task=law"
    if adapter.keep_best and not config.trainer.eval_every:
        yield "adapter.keep_best=true needs trainer.eval_every, the steps between the evaluations it chooses from"
    for key in ("spike", "patience"):
        if getattr(adapter, key) and not adapter.keep_best:
            yield f"adapter.{key}={getattr(adapter, key)} is looked at by adapter.keep_best=true only"
    if not model_of(config.model).problems():
        yield from method_problems(config)


def curriculum_problems(config: RunConfig) -> Iterator[str]:
    if config.adapter.domains:
        yield f"adapter.domains={config.adapter.domains} are learned by holdfast adapt; one run learns adapter.task"


def frozen_files(config: RunConfig) -> list[BrickFile]:
    """What the keepers are to hold, with paths in place of digests: only sizes are looked at. Files that cannot be
    read are left out, because whoever reads them will say more."""
    adapter, found = config.adapter, list[BrickFile]()
    if not (adapter.method and adapter.base and adapter.in_memory):
        return found
    from holdfast.trainer.adapting import frozen_paths

    with suppress(OSError, HoldfastError):
        for name, path in frozen_paths(adapter):
            found.append(BrickFile(name, str(path), str(path), path.stat().st_size))
    return found


def method_problems(config: RunConfig) -> list[str]:
    from holdfast.trainer.adapting import problems_of  # torch, which all other rules can do without

    return problems_of(config.adapter, config.model)
