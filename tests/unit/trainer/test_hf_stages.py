"""Models of transformers cut into stages: all stages together are the model of one process, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from holdfast.errors import ConfigurationError
from holdfast.parallel import schedule as schedules
from holdfast.parallel.config import ParallelConfig
from holdfast.parallel.partition import balanced, equal
from holdfast.parallel.pipeline_plan import plan_pipeline
from holdfast.trainer.hf_stages import FAMILIES, family_of
from holdfast.trainer.models import model_of
from tests.support.hf_models import KINDS, hf_config, transformers, write_model

pytestmark = pytest.mark.timeout(240)  # the first import of transformers, on a machine with other work

_SEED = 4


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("processes", "chunks"), [(2, 1), (4, 1), (2, 2)])
def test_stages_give_the_loss_and_the_gradients_of_the_whole(
    processes: int, chunks: int, kind: str, recomputes: bool, tmp_path: Path
) -> None:
    write_model(tmp_path, kind)
    known = model_of(hf_config(tmp_path, activation_checkpointing=recomputes))
    whole = known.build(_SEED)
    text = torch.randint(259, (2, 13), generator=torch.Generator().manual_seed(8))
    tokens, targets = text[:, :-1], text[:, 1:]
    expected = whole(tokens, targets)
    expected.backward()

    layout = (
        schedules.gpipe(processes, 2) if chunks == 1 else schedules.interleaved(processes, chunks, processes)
    ).layout
    partition = equal(4, processes=processes, chunks=chunks)
    pieces = [known.piece(partition, layout, process, _SEED) for process in range(processes)]
    hidden = pieces[0][1][0].embed(tokens)
    for stage in range(processes * chunks):
        hidden = pieces[stage % processes][1][stage // processes](hidden)
    loss = pieces[-1][1][-1].loss(hidden, targets)
    loss.backward()
    assert torch.equal(loss, expected)

    summed: dict[str, torch.Tensor] = {}
    for (piece, _), names in zip(pieces, known.layouts(partition, layout), strict=True):
        assert {name: tuple(p.shape) for name, p in piece.named_parameters()} == names
        for name, parameter in piece.named_parameters():
            assert parameter.grad is not None, name
            summed[name] = summed[name] + parameter.grad if name in summed else parameter.grad
    for name, parameter in whole.named_parameters():
        if kind != "llama" and parameter is whole.inner.get_input_embeddings().weight:
            torch.testing.assert_close(summed.pop(name), parameter.grad)  # a tied table: added up in another order
        else:
            assert torch.equal(summed.pop(name), parameter.grad), name
    assert not summed


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_of_pieces_are_known_before_anything_is_built(kind: str, tmp_path: Path) -> None:
    write_model(tmp_path, kind)
    known = model_of(hf_config(tmp_path))
    plan = plan_pipeline(ParallelConfig(pipeline=2, zero_stage=1), known.layer_costs(16), world=2, microbatches=2)
    held = [known.piece(plan.partition, plan.schedule.layout, process, 0)[0] for process in range(2)]
    assert known.largest_piece(plan) == max(sum(p.numel() for p in piece.parameters()) for piece in held)
    assert balanced(known.layer_costs(16), processes=2).block_counts == plan.partition.block_counts


def test_a_family_that_nobody_can_cut_is_refused_with_those_that_are_known(tmp_path: Path) -> None:
    transformers.OPTConfig(
        vocab_size=259, hidden_size=16, ffn_dim=16, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16
    ).save_pretrained(tmp_path)
    known = model_of(hf_config(tmp_path))
    assert known.problems() == []
    (problem,) = known.pipeline_problems()
    assert "'opt' cannot be divided" in problem and all(name in problem for name in FAMILIES)
    with pytest.raises(ConfigurationError, match="gpt2, llama"):
        family_of(transformers.OPTConfig())
