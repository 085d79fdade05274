"""The parts of a decoder, put together, are the decoder."""

from __future__ import annotations

import pytest
import torch

from holdfast.parallel import schedule as schedules
from holdfast.parallel.partition import from_block_counts
from holdfast.trainer.config import ModelConfig
from holdfast.trainer.model import Decoder, initialise
from holdfast.trainer.stages import layouts_of, piece_of


def _model(*, tied: bool, n_layers: int = 5) -> ModelConfig:
    return ModelConfig(
        name="tiny",
        d_model=16,
        n_layers=n_layers,
        n_heads=2,
        n_kv_heads=1,
        d_ff=24,
        max_seq_len=12,
        tie_embeddings=tied,
    )


@pytest.mark.parametrize("tied", [False, True])
def test_the_pieces_of_a_pipeline_compute_what_the_decoder_does(tied: bool) -> None:
    config = _model(tied=tied)
    whole = Decoder(config)
    initialise(whole, seed=3)
    layout = schedules.gpipe(2, 1).layout
    partition = from_block_counts([3, 2], n_layers=5, processes=2)
    tokens = torch.arange(24).view(2, 12)
    hidden = None
    for process in range(2):
        piece, (stage,) = piece_of(config, partition, layout, process)
        initialise(piece, seed=3)
        hidden = stage(stage.embed(tokens) if hidden is None else hidden)
    assert hidden is not None
    assert torch.equal(stage.loss(hidden, tokens), whole(tokens, tokens))


@pytest.mark.parametrize(("swapped", "tied"), [(False, False), (True, False), (False, True), (True, True)])
def test_every_parameter_is_somewhere_and_only_the_ends_are_in_several_places(swapped: bool, tied: bool) -> None:
    config = _model(tied=tied, n_layers=6)
    schedule = schedules.one_f_one_b(6, 2, swapped=swapped)
    layouts = layouts_of(config, from_block_counts([1] * 6, n_layers=6, processes=6), schedule.layout)
    whole = {name: tuple(param.shape) for name, param in Decoder(config).named_parameters()}
    assert {name: shape for layout in layouts for name, shape in layout.items()} == whole
    places = {name: [n for n, layout in enumerate(layouts) if name in layout] for name in whole}
    firsts, lasts = ([0, 1], [4, 5]) if swapped else ([0], [5])
    assert places.pop("embedding.weight") == firsts + (lasts if tied else [])
    assert places.pop("head.norm.weight") == lasts
    assert tied or places.pop("head.output.weight") == lasts
    assert all(len(where) == 1 for where in places.values())
