"""The LoRA of an adapter run as a folder of PEFT, for the model that ``holdfast export --to hf`` makes of its base."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from holdfast import adapters
from holdfast.adapters.targets import exactly
from holdfast.trainer.config import ModelConfig, ModelKind
from holdfast.trainer.hf import llama_config, shapes
from holdfast.trainer.hf_export import llama_sizes, portable_name

__all__ = ["write_peft"]


def write_peft(model: nn.Module, config: ModelConfig, directory: Path) -> None:
    """All finished tasks of ``model`` as one LoRA. Raises: ConfigurationError for a method that is no sum of products,
    OSError."""
    known = _renamed(model, config) if config.kind is ModelKind.DECODER else model
    adapters.save_peft(known, directory, task_type="CAUSAL_LM")


def _renamed(model: nn.Module, config: ModelConfig) -> nn.Module:
    """The same adapters on a LLaMA whose own weights nobody reads."""
    ours = adapters.adapters_of(model)
    theirs = shapes(llama_config(llama_sizes(config))).to_empty(device="cpu")  # adapters live where their base does
    names = {name: portable_name(name) for name in ours.layers}
    injected = adapters.inject(theirs, ours.method, exactly(list(names.values())))
    for name, layer in ours.layers.items():
        for number in range(len(ours.tasks)):
            injected.layers[names[name]].append(layer.task_rows(number))
    injected.tasks.extend(ours.tasks)
    return theirs
