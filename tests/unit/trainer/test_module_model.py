"""The user's own modules in the trainer."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from holdfast.trainer.config import ModelConfig, ModelInit, ModelKind
from holdfast.trainer.models import model_of

_SOURCE = """
from types import SimpleNamespace
from torch import nn
import torch.nn.functional as F

class Logits(nn.Module):
    def __init__(self, width=8, vocabulary=259):
        super().__init__()
        self.table, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
    def forward(self, tokens):
        return self.head(self.table(tokens))

class Wrapped(Logits):
    def forward(self, tokens):
        return SimpleNamespace(logits=super().forward(tokens))

class Loss(Logits):
    def forward(self, tokens, targets):
        return F.cross_entropy(super().forward(tokens).flatten(0, 1), targets.flatten())

class Both(Logits):
    def forward(self, tokens, targets=None):
        logits = super().forward(tokens)
        return logits if targets is None else 2 * F.cross_entropy(logits.flatten(0, 1), targets.flatten())

class Flat(Logits):
    def forward(self, tokens):
        return super().forward(tokens).flatten(0, 1)

class Normed(Logits):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

def broken():
    raise RuntimeError("no such size")

number = 3
def not_a_module():
    return 3
"""


@pytest.fixture(autouse=True)
def _importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_models.py").write_text(_SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_models", None)


def _config(name: str, **options: object) -> ModelConfig:
    return ModelConfig(name="module", kind=ModelKind.MODULE, path=f"own_models:{name}", options=options)


_TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
_TARGETS = torch.tensor([[2, 3, 4], [5, 6, 7]])


@pytest.mark.parametrize("name", ["Logits", "Wrapped", "Loss", "Both"])
def test_every_way_to_answer_trains_on_the_same_loss(name: str) -> None:
    known = model_of(_config(name, width=4))
    assert known.problems() == []
    model = known.build(3)
    expected = model.inner.head(model.inner.table(_TOKENS))
    loss = F.cross_entropy(expected.flatten(0, 1), _TARGETS.flatten())
    torch.testing.assert_close(model(_TOKENS, _TARGETS), 2 * loss if name == "Both" else loss)
    assert known.vocab_size == (0 if name == "Loss" else 259)
    assert known.parameters == sum(p.numel() for p in model.parameters()) == 259 * 4 + 259 * 4 + 259


def test_the_seed_alone_decides_the_first_weights() -> None:
    known, before = model_of(_config("Logits")), torch.get_rng_state()
    one, same, other = (known.build(seed).get_parameter("head.weight") for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_come_back_under_their_names() -> None:
    known = model_of(_config("Logits"))
    weights = {name: p.detach() + 1 for name, p in known.build(0).named_parameters()}
    again = known.with_weights(weights)
    assert all(torch.equal(p, weights[name]) for name, p in again.named_parameters())
    assert not again.training and not again.inner.training


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("own_models", "must be <package.module>:<function>"),
        ("no_such_package.x:build", "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("own_models:nothing", "has no callable 'nothing'"),
        ("own_models:number", "has no callable 'number'"),
        ("own_models:not_a_module", "returned int; it must return an nn.Module"),
        ("own_models:broken", "RuntimeError: no such size"),
        ("own_models:Flat", "gave logits [4, 259] for tokens [1, 4]"),
        ("own_models:Normed", "has norm, a BatchNorm1d whose running statistics no snapshot holds"),
    ],
)
def test_what_cannot_train_is_refused_with_the_reason(path: str, words: str) -> None:
    (problem,) = model_of(ModelConfig(kind=ModelKind.MODULE, path=path)).problems()
    assert problem.startswith(f"model.path={path!r} ") and words in problem


def test_unknown_options_are_named() -> None:
    (problem,) = model_of(_config("Logits", depth=3)).problems()
    assert "depth" in problem


def test_a_pipeline_of_a_module_is_refused_with_those_that_can() -> None:
    (problem,) = model_of(_config("Logits")).pipeline_problems()
    assert "cannot be divided" in problem and "model=hf" in problem


def test_a_module_brings_its_own_weights() -> None:
    config = _config("Logits")
    config.init = ModelInit.WEIGHTS
    assert "is of model=hf" in model_of(config).problems()[0]
