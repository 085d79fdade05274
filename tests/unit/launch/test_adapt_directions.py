"""Which directions a domain stays out of, compared with whole singular value decompositions in fp64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from holdfast import adapters
from holdfast.errors import ConfigurationError, ManifestMismatch
from holdfast.launch.adapt_directions import keep_directions, refuse_directions
from holdfast.launch.adapt_model import load_model, training_windows
from holdfast.launch.curriculum import Curriculum
from holdfast.trainer.adapting import AdapterTask, find_bricks
from holdfast.trainer.frozen import Frozen
from tests.support.curricula import MODEL, config_of, make_curriculum
from tests.support.runs import write_corpus

_COUNT = 2


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, str]:
    other = tmp_path / "numbers"
    other.mkdir()
    for number in range(12):
        (other / f"{number}.txt").write_text(" ".join(str(n * n + number) for n in range(400)))
    return {"t0": str(write_corpus(tmp_path / "lines")), "t1": str(other)}


def _rows(curriculum: Curriculum, root: Path, text: str, side: str) -> dict[str, Tensor]:
    """By layer: what each window, on average over its tokens, is answered by the tasks, or asks them."""
    model, rows = load_model(curriculum, curriculum.record()), dict[str, list[Tensor]]()
    for name, layer in adapters.adapters_of(model).layers.items():

        def note(module: torch.nn.Module, args: tuple[Tensor], y: Tensor, name: str = name) -> None:
            seen = args[0] if side == "input" else y - module.base(args[0])
            rows.setdefault(name, []).append(seen.double().mean(1))

        layer.register_forward_hook(note)
    with torch.no_grad():
        for tokens, _ in training_windows(config_of(root, curriculum), text, 8 * _COUNT):
            model(tokens)
    return {name: torch.cat(found) for name, found in rows.items()}


def _span(parts: list[Tensor]) -> Tensor:
    """The projector on the strongest directions of all parts together."""
    top = torch.cat([torch.linalg.svd(part, full_matrices=False)[2][:_COUNT] for part in parts])
    q = torch.linalg.qr(top.T)[0]
    return q @ q.T


@pytest.mark.parametrize("side", ["output", "input"])
def test_directions_are_those_of_the_tasks_on_the_text_of_each_earlier_domain(
    side: str, tmp_path: Path, texts: dict[str, str]
) -> None:
    curriculum = make_curriculum(tmp_path, "brainstacks", texts=texts, projection=side)
    config = config_of(tmp_path, curriculum, protected_directions=_COUNT)
    record = keep_directions(curriculum, curriculum.record(), config, "t2")
    assert curriculum.record() == replace(record, learned=list(record.learned))
    found = safetensors.torch.load_file(curriculum.brick(record.directions["t2"]))
    rows = [_rows(curriculum, tmp_path, text, side) for text in texts.values()]
    assert found.keys() == rows[0].keys() and len(found) == 2
    for name, basis in found.items():
        assert len(basis) == 2 * _COUNT
        wanted = _span([part[name] for part in rows])
        torch.testing.assert_close(basis.double().T @ basis.double(), wanted, rtol=0, atol=2e-3)
    before = curriculum.brick(record.directions["t2"]).stat().st_mtime_ns
    assert keep_directions(curriculum, record, config, "t2") is record  # once
    again = keep_directions(curriculum, replace(record, directions={}), config, "t2")
    assert again == record and curriculum.brick(record.directions["t2"]).stat().st_mtime_ns == before


def test_nothing_is_protected_before_there_is_anything(tmp_path: Path, texts: dict[str, str]) -> None:
    curriculum = make_curriculum(tmp_path, "brainstacks", 1, texts)
    record = curriculum.record()
    config = config_of(tmp_path, curriculum, protected_directions=_COUNT)
    assert keep_directions(curriculum, record, config, "t0") is record
    assert keep_directions(curriculum, record, config_of(tmp_path, curriculum), "t1") is record


def test_a_task_is_trained_and_frozen_outside_the_directions_of_its_file(tmp_path: Path, texts: dict[str, str]) -> None:
    curriculum = make_curriculum(tmp_path, "brainstacks", texts=texts)
    config = config_of(tmp_path, curriculum, protected_directions=_COUNT)
    record = keep_directions(curriculum, curriculum.record(), config, "t2")
    adapter = replace(config.adapter, base=str(curriculum.brick(record.base)), task="t2")
    adapter.directions = str(curriculum.brick(record.directions["t2"]))
    bricks = find_bricks(adapter)
    assert bricks.directions == record.directions["t2"] == bricks.digests[-1]
    task = AdapterTask(adapter, MODEL, 0, Frozen(bricks.files), list)
    decoder = task.begin(torch.device("cpu"))
    for parameter in adapters.trainable_parameters(decoder):
        torch.nn.init.normal_(parameter)
    weights = {name: tensor.detach() for name, tensor in decoder.named_parameters() if tensor.requires_grad}
    tokens = torch.randint(256, (2, 9))
    finished = task.finish(weights)
    task.count(decoder, 1)
    with torch.no_grad():
        assert torch.equal(decoder.eval()(tokens), finished(tokens))  # what was validated is what is frozen
    bases = safetensors.torch.load_file(adapter.directions)
    for name, layer in adapters.adapters_of(finished).layers.items():
        up = layer.task_rows(0)["up"].double()
        assert (up @ bases[name].double().T).square().sum() < 1e-10 * up.square().sum()
    Path(adapter.directions).write_bytes(Path(adapter.directions).read_bytes()[:-1] + b"x")
    with pytest.raises(ConfigurationError, match="is not the file that the run began with"):
        task.begin(torch.device("cpu"))
    Path(adapter.directions).unlink()
    with pytest.raises(ConfigurationError, match=r"adapter\.directions: .* cannot be read"):
        find_bricks(adapter)


@pytest.mark.parametrize(
    ("adapter", "domains", "word"),
    [
        ({"protected_directions": 16}, 3, "of each of 2 earlier domains can leave nothing of .* has 32; at most 15"),
        ({"options": {"projection": "input"}}, 2, "projection=input has nothing to stay out of"),
    ],
)
def test_directions_that_leave_nothing_and_projections_of_nothing_are_refused(
    adapter: dict[str, object], domains: int, word: str, tmp_path: Path
) -> None:
    curriculum = make_curriculum(tmp_path, "brainstacks")
    with pytest.raises(ConfigurationError, match=word):
        refuse_directions(config_of(tmp_path, curriculum, **adapter), domains)
    refuse_directions(config_of(tmp_path, curriculum, protected_directions=15), 3)


def test_a_text_that_is_gone_is_told(tmp_path: Path) -> None:
    curriculum = make_curriculum(tmp_path, "brainstacks", texts={"t0": "/nowhere", "t1": "/nowhere"})
    with pytest.raises((ConfigurationError, ManifestMismatch), match="/nowhere, from which a domain was learned"):
        keep_directions(curriculum, curriculum.record(), config_of(tmp_path, curriculum, protected_directions=1), "t2")
