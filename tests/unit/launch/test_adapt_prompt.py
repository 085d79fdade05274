"""What a curriculum's model makes of a text, and as one model without adapters."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import safetensors.torch
import torch

from holdfast import adapters
from holdfast.adapters.store import read_sidecar
from holdfast.errors import ConfigurationError
from holdfast.launch.adapt_prompt import Prompted
from holdfast.launch.curriculum import Curriculum, Learned, Record
from holdfast.trainer.config import ModelConfig
from holdfast.trainer.export import export_weights
from holdfast.trainer.model import Decoder, initialise

MODEL = ModelConfig(d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=48, max_seq_len=24)
TARGETS = ["wq", "wo"]


def _curriculum(root: Path, method: str, tasks: int = 2) -> Curriculum:
    """Of random tasks."""
    base = Decoder(MODEL)
    initialise(base, 1)
    source = root / "base.safetensors"
    export_weights(dict(base.named_parameters()), source, metadata={})
    curriculum = Curriculum(root / "project" / "school")
    curriculum.keep_base(source, "b" * 64)
    adapters.inject(base, adapters.create_method(method, {"rank": 2}), TARGETS)
    torch.manual_seed(0)
    learned = []
    for number in range(tasks):
        adapters.start_task(base, f"t{number}")
        with torch.no_grad():
            for parameter in adapters.trainable_parameters(base):
                parameter.add_(torch.randn_like(parameter))
        adapters.finish_task(base)
        saved = root / f"t{number}"
        adapters.save_adapters(base, saved, only=f"t{number}")
        digest = read_sidecar(saved).digest
        directory = curriculum.keep_task(saved, f"t{number}", digest)
        facts = {"digest": digest, "size_bytes": 1, "base_bits": 8.0, "before_bits": 8.0, "bits": {f"t{number}": 7.0}}
        learned.append(Learned(task=f"t{number}", domain=f"t{number}", text="", directory=directory, **facts))  # type: ignore[arg-type]
    about = {"method": method, "options": {"rank": 2}, "target_modules": TARGETS, "nf4": False}
    record = Record(model=asdict(MODEL), adapter=about, base=_digest(curriculum), base_bytes=1, learned=learned)
    (curriculum.path / "bricks" / ("b" * 64 + ".safetensors")).rename(curriculum.brick(record.base))
    curriculum.write(record)
    return curriculum


def _digest(curriculum: Curriculum) -> str:
    import hashlib

    return hashlib.sha256((curriculum.path / "bricks" / ("b" * 64 + ".safetensors")).read_bytes()).hexdigest()


def test_merged_weights_compute_what_base_and_tasks_compute(tmp_path: Path) -> None:
    curriculum = _curriculum(tmp_path, "freeze_and_add")
    tokens = torch.randint(256, (1, 9), generator=torch.Generator().manual_seed(2))
    for first in (None, 1, 0):
        prompted, path = Prompted(curriculum), tmp_path / f"merged{first}" / "model.safetensors"
        with torch.no_grad(), adapters.using_tasks(prompted._model, first=first):
            wanted = prompted._model(tokens)
        assert prompted.export(path, first=first) == path.stat().st_size
        whole = Decoder(MODEL)
        whole.load_state_dict(safetensors.torch.load_file(path))
        torch.testing.assert_close(whole(tokens), wanted, rtol=1e-4, atol=1e-5)


def test_a_method_that_cannot_be_merged_says_why_and_writes_nothing(tmp_path: Path) -> None:
    prompted = Prompted(_curriculum(tmp_path, "mora"))
    with pytest.raises(ConfigurationError, match="mora cannot be merged"):
        prompted.export(tmp_path / "out" / "model.safetensors", first=None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "choices"),
    [("lora", 2), ("mora", 4), ("brainstacks", 5), ("oracle", 3)],
)
def test_each_choice_that_a_method_allows_is_tried_and_the_best_comes_first(
    method: str, choices: int, tmp_path: Path
) -> None:
    prompted = Prompted(_curriculum(tmp_path, method))
    lines = [line for line in prompted.routes("some words").splitlines()[1:] if "weight" not in line]
    bits = [float(line.split()[0]) for line in lines]
    assert (len(bits), bits) == (choices, sorted(bits))
    assert any("base alone" in line for line in lines)


def test_a_long_text_is_judged_by_its_end(tmp_path: Path) -> None:
    prompted = Prompted(_curriculum(tmp_path, "mora"))
    assert prompted.routes("x" * 50 + "the end of what was said") == prompted.routes(
        "y" * 50 + "the end of what was said"
    )
