"""What the end of a run says: the command that continues it, and what is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from holdfast.launch import run
from holdfast.launch.conductor import Verdict


@pytest.mark.parametrize(
    ("words", "overrides", "changes", "says"),
    [
        (
            ["data=text", "data.path=/a b/c", "resume=auto"],
            ["data=text", "data.path=/a b/c", "resume=auto"],
            {"run_id": "r-1"},
            "holdfast train data=text 'data.path=/a b/c' run_id=r-1",
        ),
        (
            ["run_id=r-1", "--config-dir", "conf", "experiment=mine", "trainer.max_steps=10"],
            ["run_id=r-1", "experiment=mine", "trainer.max_steps=10"],
            {"run_id": "r-1", "trainer.max_steps": "20"},
            "holdfast train --config-dir conf experiment=mine run_id=r-1 trainer.max_steps=20",
        ),
        (  # a sweep, of which this was one run
            ["-m", "optim.lr=1e-3,1e-4", "seed=1"],
            ["optim.lr=1e-4", "seed=1"],
            {"run_id": "r-2"},
            "holdfast train optim.lr=1e-4 seed=1 run_id=r-2",
        ),
    ],
)
def test_the_command_to_type_next_means_the_same_run(
    words: Sequence[str], overrides: Sequence[str], changes: Mapping[str, str], says: str
) -> None:
    assert run._with_changes(["holdfast", "train", *words], overrides, changes) == says


def test_a_run_that_python_code_has_started_has_no_command() -> None:
    assert run._with_changes(["holdfast.train"], [], {"run_id": "r-1"}) == "the same configuration with run_id=r-1"


@pytest.mark.parametrize(
    ("step", "saved", "says"),
    [
        (8, 8, {"saved": "checkpoint of step 8, step-00000008"}),
        (8, 4, {"saved": "checkpoint of step 4, step-00000004, and nothing later"}),
        (8, -1, {"saved": "no checkpoint"}),
        (-1, None, {}),
    ],
)
def test_what_is_saved_is_what_is_on_disk(step: int, saved: int | None, says: Mapping[str, str]) -> None:
    verdict = Verdict("finished", 0, "", step, faults=0, steps_lost=0, findings={}, saved=saved)
    assert run._what_is_saved(verdict) == says
