"""Adapters in the trainer: the decoder that trains when only one task's tensors change, and what is left of it.

The base and the finished tasks are files that every rank reads and nobody writes. They are frozen, so they are in no
gradient, no optimizer and no snapshot: what recovery restores is the task, put on top of the same files again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from holdfast import adapters
from holdfast.adapters.targets import ALL_LINEAR
from holdfast.errors import ConfigurationError, HoldfastError, InvariantViolation
from holdfast.parallel.microbatches import Microbatch
from holdfast.trainer.config import AdapterConfig, ModelConfig
from holdfast.trainer.models import model_of
from holdfast.trainer.wrapped import fill
from holdfast.types import Precision

__all__ = ["AdapterTask", "Bricks", "adapted_base", "find_bricks", "problems_of", "trainable_elements", "verify_base"]

_CHUNK_BYTES = 1 << 20

Inputs = Iterable[Microbatch]


@dataclass(frozen=True, slots=True)
class Bricks:
    """The frozen files, by their sha256: read, never stored with the run's state."""

    base: str
    tasks: Sequence[str]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class AdapterTask:
    """One task on one base, the same on every rank and in every epoch."""

    config: AdapterConfig
    model: ModelConfig
    seed: int
    base_digest: str
    inputs: Callable[[], Inputs]
    """Some text of the task, the same on every rank: for methods that look at it before they start and end."""

    def begin(self, device: torch.device, precision: Precision = Precision.FP32) -> nn.Module:
        """The base with the finished tasks and, untrained, this one. Parameters are fp32, as an engine takes them;
        finished tasks have the ``precision`` that it will compute in.

        Raises: ConfigurationError and ManifestMismatch for files that are not there, damaged, or of something else.
        """
        decoder = adapted_base(self.config, self.model, self.base_digest).to(device)
        self._collect(decoder)
        adapters.start_task(decoder, self.config.task, seed=self.seed)
        if precision is Precision.BF16:
            _round_buffers(decoder, torch.bfloat16)
        decoder.register_forward_hook(_add_penalty)
        return decoder

    def count(self, decoder: nn.Module, step: int) -> None:
        """Let the task take part in evaluation if it has been trained, by this process or by one before it."""
        for layer in adapters.adapters_of(decoder).layers.values() if step else ():
            layer.count_untrained()

    def finish(self, weights: Mapping[str, Tensor]) -> nn.Module:
        """On the CPU, with the task frozen as its ``weights`` were trained.

        Raises: ConfigurationError if training has not changed anything.
        """
        decoder = self.begin(torch.device("cpu"))
        own = dict(decoder.named_parameters())
        with torch.no_grad():
            for name, tensor in weights.items():
                own[name].copy_(tensor)
        self._collect(decoder)
        adapters.finish_task(decoder)
        return decoder.eval()

    def save(self, decoder: nn.Module, directory: Path) -> None:
        """Write the finished task alone. Raises: OSError."""
        adapters.save_adapters(decoder, directory, only=self.config.task)

    @torch.no_grad()
    def _collect(self, decoder: nn.Module) -> None:
        if not adapters.adapters_of(decoder).method.needs_inputs:
            return
        device, was_training = next(decoder.parameters()).device, decoder.training
        with adapters.collect_inputs(decoder.eval()):
            for tokens, targets, _ in self.inputs():
                decoder(tokens.to(device), targets.to(device))
        decoder.train(was_training)


def adapted_base(config: AdapterConfig, model: ModelConfig, base_digest: str = "") -> nn.Module:
    """The base with all of its finished tasks, on the CPU. Raises: as :meth:`AdapterTask.begin`."""
    verify_base(config, base_digest)
    decoder = model_of(model).build(0, initial=False)
    try:
        fill(decoder, safetensors.torch.load_file(config.base))
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"adapter.base={config.base!r} cannot be read: {error}") from error
    except (RuntimeError, InvariantViolation) as error:  # torch's only word for weights of another shape, and fill's
        raise ConfigurationError(f"adapter.base={config.base!r} is of another model: {error}") from error
    if config.nf4:
        adapters.quantise_base(decoder, _targets(config))
    adapters.inject(decoder, adapters.create_method(config.method, config.options), _targets(config))
    adapters.append_adapters(decoder, [Path(task) for task in config.tasks])
    return decoder


def verify_base(config: AdapterConfig, digest: str) -> None:
    """Reads the whole file, once per process. Raises: ConfigurationError if it has another sha256, unless that is
    empty."""
    if digest and _file_digest(Path(config.base)) != digest:
        raise ConfigurationError(f"adapter.base={config.base!r} is not the file that the run began with; put it back")


def find_bricks(config: AdapterConfig) -> Bricks:
    """What the run will read. Raises: ConfigurationError for files that are missing and for a task that is finished,
    ManifestMismatch for damage."""
    base, tasks = Path(config.base), [Path(task) for task in config.tasks]
    if not base.is_file():
        raise ConfigurationError(f"adapter.base={config.base!r} is no file; give it the weights that a run exported")
    sidecars = [adapters.read_sidecar(task) for task in tasks]
    if config.task in (name for sidecar in sidecars for name in sidecar.tasks):
        raise ConfigurationError(
            f"adapter.task={config.task!r} is among the finished adapter.tasks; give it another name"
        )
    sizes = [(task / sidecar.tensors).stat().st_size for task, sidecar in zip(tasks, sidecars, strict=True)]
    return Bricks(_file_digest(base), [sidecar.digest for sidecar in sidecars], base.stat().st_size + sum(sizes))


def problems_of(config: AdapterConfig, model: ModelConfig) -> list[str]:
    """What is wrong with method, options and layers, one sentence each; nothing is read."""
    try:
        _begun(config, model)
    except HoldfastError as error:
        return [f"adapter: {problem}" for problem in getattr(error, "problems", [str(error)])]
    return []


def trainable_elements(config: AdapterConfig, model: ModelConfig) -> int:
    """Elements that get a gradient and moments, without memory for any of them."""
    return sum(parameter.numel() for parameter in adapters.trainable_parameters(_begun(config, model)))


def _begun(config: AdapterConfig, model: ModelConfig) -> nn.Module:
    """A task on a model that has shapes only."""
    method = adapters.create_method(config.method, config.options)
    decoder = model_of(model).shapes()
    if method.needs_inputs:  # there are none; LoRA of this rank trains no less
        method = adapters.create_method("lora", {"rank": config.options.get("rank", 8)})
    adapters.inject(decoder, method, _targets(config))
    adapters.start_task(decoder, config.task or "task")
    return decoder


def _targets(config: AdapterConfig) -> str | Sequence[str]:
    names = config.target_modules
    return names[0] if len(names) == 1 and (names[0] == ALL_LINEAR or names[0].startswith("^")) else names


def _round_buffers(decoder: nn.Module, dtype: torch.dtype) -> None:
    """DeepSpeed sees to parameters only."""
    for module in decoder.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(module, name, buffer.to(dtype))


def _add_penalty(module: nn.Module, _: Any, loss: Tensor) -> Tensor:
    """The method's own term has a gradient, but the loss that is told stays that of the text."""
    if not (module.training and torch.is_grad_enabled()):
        return loss
    term = adapters.penalty(module)
    return loss + (term - term.detach()).to(loss.dtype)


def _file_digest(path: Path) -> str:
    about = path.stat()
    return _content_digest(path, about.st_size, about.st_mtime_ns)


@cache
def _content_digest(path: Path, size: int, changed_ns: int) -> str:
    """Once per process and file: a base may have gigabytes, and a recovery should not wait for them again."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
