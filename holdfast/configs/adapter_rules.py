"""What a run that trains adapters must obey. Torch is loaded only if there are some."""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.configs.schema import RunConfig
from holdfast.trainer.models import model_of

__all__ = ["adapter_problems", "curriculum_problems", "method_problems"]


def adapter_problems(config: RunConfig) -> Iterator[str]:
    adapter, parallel = config.adapter, config.parallel
    if not adapter.method:
        for key in ("options", "base", "nf4", "tasks", "task", "seen"):
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
    if not model_of(config.model).problems():
        yield from method_problems(config)


def curriculum_problems(config: RunConfig) -> Iterator[str]:
    if config.adapter.domains:
        yield f"adapter.domains={config.adapter.domains} are learned by holdfast adapt; one run learns adapter.task"


def method_problems(config: RunConfig) -> list[str]:
    from holdfast.trainer.adapting import problems_of  # torch, which all other rules can do without

    return problems_of(config.adapter, config.model)
