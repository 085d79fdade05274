"""What a rank must not lose: progress, the owner's tensors and the random state."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from holdfast.trainer import state as module
from holdfast.trainer.state import StateView, TrainState
from holdfast.types import SliceSpec, StateSlice
from tests.support.tiny_training import Journal, NotingEngine


@pytest.fixture(autouse=True)
def _random_state() -> Iterator[None]:
    before = torch.get_rng_state()
    torch.manual_seed(11)
    yield
    torch.set_rng_state(before)


def _draws() -> list[float]:
    """Of every kind; an odd number of normals leaves the second of a pair behind in the generator."""
    return [*torch.randn(3).tolist(), *torch.rand(2).tolist(), *torch.randint(1000, (3,)).tolist()]


def _view(train: TrainState | None = None, rank: int = 0) -> tuple[StateView, NotingEngine]:
    owner = NotingEngine([])
    return StateView(train or TrainState(), owner, rank=rank), owner


def test_a_finished_step_counts_itself_and_its_tokens() -> None:
    train = TrainState(step=4, tokens=100)
    train.advance(32)
    assert train == TrainState(step=5, tokens=132)


def test_the_state_is_the_owners_tensors_by_reference_and_the_random_state_of_this_rank() -> None:
    view, owner = _view(rank=3)
    weight, random = view.capture().slices
    assert weight.spec == SliceSpec("weight", (3,), 0, 3, "float32")
    assert weight.tensor.data_ptr() == owner.weight.data_ptr()
    size = torch.get_rng_state().numel()
    assert random.spec == SliceSpec("rng/rank3/cpu", (size,), 0, size, "uint8")
    assert torch.equal(random.tensor, torch.get_rng_state())


def test_scalars_are_json_values_copied_when_they_are_captured() -> None:
    live: dict[str, object] = {"updates": 0}

    class Owner(NotingEngine):
        def scalars(self) -> dict[str, object]:
            return live

    view = StateView(TrainState(step=2, tokens=64), Owner([]), rank=0)
    captured = view.capture().scalars
    view.train.advance(32)
    live["updates"] = 1
    assert json.loads(json.dumps(captured)) == {"step": 2, "tokens": 64, "owner": {"updates": 0}}
    assert view.capture().scalars == {"step": 3, "tokens": 96, "owner": {"updates": 1}}


def test_every_capture_reads_the_random_state_into_the_same_memory() -> None:
    view, _ = _view()
    first = view.capture().slices[1].tensor
    torch.rand(1000)
    second = view.capture().slices[1].tensor
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(second, torch.get_rng_state())


def test_the_random_state_does_not_move_under_a_captured_state() -> None:
    view, _ = _view()
    random = view.capture().slices[1].tensor
    before = random.clone()
    _draws()
    assert torch.equal(random, before)


def test_draws_after_adopting_are_the_draws_after_capturing_to_the_bit() -> None:
    view, _ = _view(TrainState(step=7, tokens=70))
    torch.randn(1)
    state = view.capture()
    stored = [s.tensor.clone() for s in state.slices]
    want = _draws()
    view.train.advance(10)
    for piece, copy in zip(state.slices, stored, strict=True):
        piece.tensor.copy_(copy)
    view.adopt(state.scalars)
    assert _draws() == want
    assert view.train == TrainState(step=7, tokens=70)


def test_another_view_adopts_what_one_has_captured() -> None:
    old, _ = _view(TrainState(step=7, tokens=70))
    captured, want = {s.spec.name: s.tensor.clone() for s in old.capture().slices}, _draws()
    new, _ = _view()
    train = new.train
    for piece in new.capture().slices:
        piece.tensor.copy_(captured[piece.spec.name])
    new.adopt(json.loads(json.dumps(old.capture().scalars)))
    assert _draws() == want
    assert new.train is train == TrainState(step=7, tokens=70)


def test_the_owner_gets_its_scalars_back_and_is_refreshed_last() -> None:
    journal: Journal = []

    class Owner(NotingEngine):
        def refresh(self) -> None:
            super().refresh()
            journal.append(f"random state in place: {torch.equal(torch.get_rng_state(), random)}")

    view = StateView(TrainState(), Owner(journal), rank=0)
    random = torch.Generator().manual_seed(5).get_state()
    view.capture().slices[1].tensor.copy_(random)
    view.adopt({"step": 1, "tokens": 2, "owner": {"updates": 9}})
    assert journal == ["scalars {'updates': 9}", "refresh", "random state in place: True"]


def test_the_owners_slices_are_asked_for_once() -> None:
    class Owner(NotingEngine):
        asked = 0

        def slices(self) -> list[StateSlice]:
            self.asked += 1
            return super().slices()

    owner = Owner([])
    view = StateView(TrainState(), owner, rank=0)
    assert view.capture().slices is view.capture().slices
    assert owner.asked == 1


def test_with_a_gpu_its_random_state_belongs_to_the_state(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.Generator().manual_seed(3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", device.get_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", device.set_state)
    view, _ = _view(rank=1)
    state = view.capture()
    assert [s.spec.name for s in state.slices] == ["weight", "rng/rank1/cpu", "rng/rank1/cuda"]
    want = torch.rand(4, generator=device), torch.rand(4)
    view.adopt(state.scalars)
    assert torch.equal(torch.rand(4, generator=device), want[0])
    assert torch.equal(torch.rand(4), want[1])


def test_without_a_gpu_there_is_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module._devices() == ("cpu",)
