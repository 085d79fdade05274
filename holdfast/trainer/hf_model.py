"""A causal language model of Hugging Face as :class:`holdfast.trainer.models.Model`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor, nn

from holdfast.errors import ConfigurationError
from holdfast.parallel.partition import LayerCosts, Partition
from holdfast.parallel.pipeline_plan import PipelinePlan
from holdfast.parallel.schedule import Layout
from holdfast.trainer import hf
from holdfast.trainer.config import ModelConfig, ModelInit
from holdfast.trainer.hf_stages import HfStage, family_of, piece_of
from holdfast.trainer.models import Names, not_of_a_decoder
from holdfast.trainer.wrapped import Wrapped, fill

__all__ = ["HfModel"]

_NO_SIZES = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
"""What config.json says besides what the model computes in fp32."""


class HfModel:
    """The class that the directory's config.json names, under its own parameter names."""

    def __init__(self, config: ModelConfig) -> None:
        self._config, self._directory = config, Path(config.path)

    def problems(self) -> list[str]:
        config = self._config
        if not config.path or not self._directory.is_absolute():
            rule = "must be a directory with config.json, absolute, because processes have working folders of their own"
            return [f"model.path={config.path!r} {rule}"]
        options = [f"model.options={config.options} are of model=module; leave them out"] if config.options else []
        return [*not_of_a_decoder(config), *options, *self._unusable()]

    def _unusable(self) -> list[str]:
        try:
            _ = self.parameters
        except ConfigurationError as error:
            return list(error.problems)
        return []

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self._shapes.parameters())

    @property
    def vocab_size(self) -> int:
        return int(self.settings.vocab_size)

    @property
    def max_seq_len(self) -> int:
        return int(getattr(self.settings, "max_position_embeddings", 0))

    @property
    def d_model(self) -> int:
        return int(getattr(self.settings, "hidden_size", 0))

    @property
    def digest(self) -> str:
        found = json.loads((self._directory / hf.CONFIG).read_bytes())
        told = {name: value for name, value in found.items() if name not in _NO_SIZES}
        return str(xxhash.xxh3_128_hexdigest(json.dumps(told, sort_keys=True).encode()))

    @cached_property
    def settings(self) -> Any:  # Any: transformers is not checked
        """The directory's configuration."""
        return hf.read_config(self._directory)

    @cached_property
    def _shapes(self) -> nn.Module:
        return hf.shapes(self.settings)

    def build(self, seed: int, *, initial: bool = True) -> nn.Module:
        return Wrapped(self._whole(seed, initial=initial), hf.logits)

    def shapes(self) -> nn.Module:
        return Wrapped(hf.shapes(self.settings), hf.logits)

    def _whole(self, seed: int, *, initial: bool) -> nn.Module:
        if initial and self._config.init is ModelInit.WEIGHTS:
            model = hf.pretrained(self._directory, self.settings)
        else:
            model = hf.fresh(self.settings, seed)
        if self._config.activation_checkpointing:
            hf.recompute(model)
        return model

    def pipeline_problems(self) -> list[str]:
        try:
            family_of(self.settings)
        except ConfigurationError as error:
            return list(error.problems)
        return []

    def layer_costs(self, seq_len: int) -> LayerCosts:
        """As :func:`holdfast.parallel.partition.estimate_costs` counts, from the shapes themselves."""
        family, model = family_of(self.settings), self._shapes
        scores = 4.0 * self.d_model * seq_len
        blocks = [2.0 * _matrix_elements(block) + scores for block in family.blocks(model)]
        return LayerCosts(tuple(blocks), embedding=0.0, head=2.0 * self.vocab_size * self.d_model)

    def largest_piece(self, plan: PipelinePlan) -> int:
        return max(
            sum(prod(shape) for shape in names.values()) for names in self.layouts(plan.partition, plan.schedule.layout)
        )

    def piece(
        self, partition: Partition, layout: Layout, process: int, seed: int, *, initial: bool = True
    ) -> tuple[nn.Module, Sequence[HfStage]]:
        whole = self._whole(seed, initial=initial)
        return piece_of(whole, self.settings, partition, layout, process, self._config.activation_checkpointing)

    def layouts(self, partition: Partition, layout: Layout) -> list[Names]:
        found = list[Names]()
        for process in range(layout.processes):
            piece, _ = piece_of(hf.shapes(self.settings), self.settings, partition, layout, process)
            found.append({name: tuple(parameter.shape) for name, parameter in piece.named_parameters()})
        return found

    def with_weights(self, weights: Mapping[str, Tensor]) -> nn.Module:
        model = Wrapped(hf.fresh(self.settings, 0), hf.logits)
        fill(model, weights)
        return model.eval()


def _matrix_elements(block: nn.Module) -> int:
    return sum(parameter.numel() for parameter in block.parameters() if parameter.ndim >= 2)
