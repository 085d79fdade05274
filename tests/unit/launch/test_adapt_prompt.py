"""What a curriculum's model makes of a text, and as one model without adapters."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import safetensors.torch
import torch

from holdfast import adapters
from holdfast.errors import ConfigurationError
from holdfast.launch.adapt_prompt import Asked, Prompted
from holdfast.trainer import tokenizer
from holdfast.trainer.model import Decoder, generate
from tests.support.curricula import MODEL, make_curriculum


def test_merged_weights_compute_what_base_and_tasks_compute(tmp_path: Path) -> None:
    curriculum = make_curriculum(tmp_path, "freeze_and_add")
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
    prompted = Prompted(make_curriculum(tmp_path, "mora"))
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
    prompted = Prompted(make_curriculum(tmp_path, method))
    lines = [line for line in prompted.routes("some words").splitlines()[1:] if "weight" not in line]
    bits = [float(line.split()[0]) for line in lines]
    assert (len(bits), bits) == (choices, sorted(bits))
    assert any("base alone" in line for line in lines)


def test_a_long_text_is_judged_by_its_end(tmp_path: Path) -> None:
    prompted = Prompted(make_curriculum(tmp_path, "mora"))
    assert prompted.routes("x" * 50 + "the end of what was said") == prompted.routes(
        "y" * 50 + "the end of what was said"
    )


def _written(prompted: Prompted, **asked: object) -> str:
    return prompted.write("some words", Asked(**asked), n=12, temperature=0, seed=0)  # type: ignore[arg-type]


def test_each_mode_writes_what_its_tasks_write(tmp_path: Path) -> None:
    prompted = Prompted(make_curriculum(tmp_path, "brainstacks", 3))
    first, own = (_written(prompted, first=n) for n in (2, 3)), _written(prompted, task="t1")
    assert _written(prompted, mode="prefix", domain="t1") == next(first)
    assert _written(prompted, mode="ungated") == next(first)
    assert _written(prompted, mode="own-only", domain="t1") == own
    assert len({own, _written(prompted, first=2), _written(prompted, first=0)}) == 3
    tokens = torch.tensor([[256, *b"some words"]])
    losses = {}
    for size in range(4):
        for chosen in combinations(("t0", "t1", "t2"), size):
            with torch.no_grad(), adapters.using_tasks(prompted._model, weights=dict.fromkeys(chosen, 1.0)):
                losses[chosen] = float(prompted._model(tokens[:, :-1], tokens[:, 1:]))
    weights = dict.fromkeys(min(losses, key=losses.__getitem__), 1.0)
    with adapters.using_tasks(prompted._model, weights=weights):
        ids = generate(prompted._model, tokens[0].tolist(), 12, temperature=0, max_seq_len=MODEL.max_seq_len)
    assert _written(prompted, mode="oracle") == f"some words{tokenizer.decode(ids)}\n"


@pytest.mark.parametrize(
    ("method", "asked", "word"),
    [
        ("mora", {"mode": "oracle"}, "mora's tasks act together"),
        ("mora", {"mode": "routed"}, "mora's tasks act together"),
        ("brainstacks", {"mode": "routed"}, "school has no router"),
        ("oracle", {"mode": "ungated"}, "one task act at a time"),
        ("lora", {"mode": "prefix", "domain": "t0"}, "has overwritten 't0'"),
        ("brainstacks", {"mode": "ungated", "first": 1}, "give one of them"),
        ("brainstacks", {"mode": "ungated", "domain": "t0"}, "is of --mode own-only or prefix"),
    ],
)
def test_what_a_method_cannot_do_is_refused(method: str, asked: dict[str, object], word: str, tmp_path: Path) -> None:
    prompted = Prompted(make_curriculum(tmp_path, method))
    with pytest.raises(ConfigurationError, match=word):
        _written(prompted, **asked)
