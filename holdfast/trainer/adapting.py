"""Adapters in the trainer: the decoder that trains when only one task's tensors change, and what is left of it.

The base and the finished tasks are files that every rank reads and nobody writes. They are frozen, so they are in no
gradient, no optimizer and no snapshot: what recovery restores is the task, put on top of the same files again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from holdfast import adapters
from holdfast.adapters.methods.brainstacks import protect
from holdfast.adapters.store import task_files
from holdfast.adapters.targets import ALL_LINEAR
from holdfast.errors import ConfigurationError, HoldfastError, InvariantViolation, ManifestMismatch
from holdfast.fault_tolerance.bricks import BrickFile
from holdfast.parallel.microbatches import Microbatch
from holdfast.trainer.config import AdapterConfig, ModelConfig
from holdfast.trainer.frozen import Frozen, file_digest
from holdfast.trainer.models import model_of
from holdfast.trainer.wrapped import fill
from holdfast.types import Precision

__all__ = [
    "AdapterTask",
    "Bricks",
    "adapted_base",
    "find_bricks",
    "frozen_paths",
    "problems_of",
    "protected_side",
    "protected_widths",
    "trainable_elements",
]

Inputs = Iterable[Microbatch]


@dataclass(frozen=True, slots=True)
class Bricks:
    """The frozen files, by their sha256: read, never stored with the run's state."""

    base: str
    tasks: Sequence[str]
    files: Sequence[BrickFile]
    directions: str = ""
    """Empty if the task stays out of none."""

    @property
    def digests(self) -> list[str]:
        """Of all of them."""
        return [self.base, *self.tasks, *([self.directions] if self.directions else [])]

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class AdapterTask:
    """One task on one base, the same on every rank and in every epoch."""

    config: AdapterConfig
    model: ModelConfig
    seed: int
    frozen: Frozen
    inputs: Callable[[], Inputs]
    """Some text of the task, the same on every rank: for methods that look at it before they start and end."""

    def begin(self, device: torch.device, precision: Precision = Precision.FP32) -> nn.Module:
        """The base with the finished tasks and, untrained, this one. Parameters are fp32, as an engine takes them;
        finished tasks have the ``precision`` that it will compute in.

        Raises: ConfigurationError and ManifestMismatch for files that are not there, damaged, or of something else.
        """
        with self.frozen.at_hand(self.config) as config:
            decoder = adapted_base(config, self.model).to(device)
            directions = _read_directions(Path(config.directions)) if config.directions else {}
        self._collect(decoder)
        adapters.start_task(decoder, self.config.task, seed=self.seed)
        if directions:
            protect(decoder, directions)
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
    if base_digest and file_digest(Path(config.base)) != base_digest:
        raise ConfigurationError(f"adapter.base={config.base!r} is not the file that the run began with; put it back")
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
    files = [_found(name, path) for name, path in frozen_paths(config)]
    digests = [sidecar.digest for sidecar in sidecars]
    for task, digest in zip(config.tasks, digests, strict=True):
        if digest not in (file.digest for file in files):
            raise ManifestMismatch(f"the tensors in {task} have not sha256 {digest}: they are damaged")
    directions = files[-1].digest if config.directions else ""
    return Bricks(files[0].digest, digests, files, directions)


def _found(name: str, path: Path) -> BrickFile:
    try:
        return BrickFile(name, str(path), file_digest(path), path.stat().st_size)
    except OSError as error:
        raise ConfigurationError(f"{name}: {path} cannot be read: {error}") from error


def frozen_paths(config: AdapterConfig) -> Iterator[tuple[str, Path]]:
    """Every file that the run will read, after the option that names it. Raises: as :func:`find_bricks`."""
    yield "adapter.base", Path(config.base)
    for task in map(Path, config.tasks):
        yield from (("adapter.tasks", path) for path in task_files(task))
    if config.directions:
        yield "adapter.directions", Path(config.directions)


def problems_of(config: AdapterConfig, model: ModelConfig) -> list[str]:
    """What is wrong with method, options and layers, one sentence each; nothing is read."""
    try:
        _begun(config, model)
    except HoldfastError as error:
        return [f"adapter: {problem}" for problem in getattr(error, "problems", [str(error)])]
    if (config.directions or config.protected_directions) and not protected_side(config):
        has = f"adapter.method={config.method} with options {config.options} stays out of no directions"
        return [f"{has}, so it takes no adapter.directions and no adapter.protected_directions; use brainstacks"]
    return []


def protected_side(config: AdapterConfig) -> str:
    """On which side of a layer the method stays out of directions, "input" or "output"; empty if it does not."""
    projection = getattr(adapters.create_method(config.method, config.options), "projection", "off")
    return {"off": "", "input": "input"}.get(projection, "output")


def protected_widths(config: AdapterConfig, model: ModelConfig) -> dict[str, int]:
    """Of each adapted layer on that side: as many directions leave nothing to learn in."""
    layers = adapters.adapters_of(_begun(config, model)).layers
    is_input = protected_side(config) == "input"
    return {name: layer.in_features if is_input else layer.out_features for name, layer in layers.items()}


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


def _read_directions(path: Path) -> dict[str, Tensor]:
    """By layer. Raises: ConfigurationError."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"adapter.directions={str(path)!r} cannot be read: {error}") from error
