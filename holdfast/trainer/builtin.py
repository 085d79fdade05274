"""The built-in decoder as :class:`holdfast.trainer.models.Model`. No torch until something is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from holdfast.parallel.partition import LayerCosts, Partition
from holdfast.parallel.pipeline_plan import PipelinePlan
from holdfast.parallel.schedule import Layout
from holdfast.trainer import sizing
from holdfast.trainer.config import ModelConfig, ModelInit
from holdfast.trainer.models import Names

if TYPE_CHECKING:
    from torch import Tensor, nn

    from holdfast.trainer.model import Decoder
    from holdfast.trainer.stages import Stage

__all__ = ["Builtin"]


class Builtin:
    """See :mod:`holdfast.trainer.model`, :mod:`holdfast.trainer.stages` and :mod:`holdfast.trainer.sizing`."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config

    def problems(self) -> list[str]:
        return [*self._not_read(), *sizing.check(self._config)]

    def _not_read(self) -> list[str]:
        config = self._config
        is_set = {
            "path": bool(config.path),
            "init": config.init is not ModelInit.FRESH,
            "options": bool(config.options),
        }
        return [
            f"model.{key}={getattr(config, key)!r} is not read by the built-in decoder; add model=hf or model=module"
            for key in (key for key, is_there in is_set.items() if is_there)
        ]

    @property
    def parameters(self) -> int:
        return sizing.parameter_count(self._config)

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    @property
    def max_seq_len(self) -> int:
        return self._config.max_seq_len

    @property
    def d_model(self) -> int:
        return self._config.d_model

    @property
    def digest(self) -> str:
        return ""

    def build(self, seed: int, *, initial: bool = True) -> Decoder:
        from holdfast.trainer.model import Decoder, initialise

        decoder = Decoder(self._config)
        if initial:
            initialise(decoder, seed)
        return decoder

    def shapes(self) -> Decoder:
        import torch

        from holdfast.trainer.model import Decoder

        with torch.device("meta"):
            return Decoder(self._config)

    def pipeline_problems(self) -> list[str]:
        return []

    def layer_costs(self, seq_len: int) -> LayerCosts:
        return sizing.layer_costs(self._config, seq_len)

    def largest_piece(self, plan: PipelinePlan) -> int:
        return sizing.largest_piece(self._config, plan)

    def piece(
        self, partition: Partition, layout: Layout, process: int, seed: int, *, initial: bool = True
    ) -> tuple[nn.Module, Sequence[Stage]]:
        from holdfast.trainer.model import initialise
        from holdfast.trainer.stages import piece_of

        piece, stages = piece_of(self._config, partition, layout, process)
        if initial:
            initialise(piece, seed)
        return piece, stages

    def layouts(self, partition: Partition, layout: Layout) -> list[Names]:
        from holdfast.trainer.stages import layouts_of

        return list(layouts_of(self._config, partition, layout))

    def with_weights(self, weights: Mapping[str, Tensor]) -> Decoder:
        from holdfast.trainer.model import Decoder

        decoder = Decoder(self._config)
        decoder.load_state_dict(dict(weights))
        return decoder
