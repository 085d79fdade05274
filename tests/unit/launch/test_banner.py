"""The first screenful: everything that is about to run, and no more than fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast import knobs
from holdfast.configs.schema import RunConfig
from holdfast.fault_tolerance.bricks import BrickFile
from holdfast.knobs import RayJob
from holdfast.launch.banner import banner, ray_job_facts
from holdfast.launch.compose import compose_config
from holdfast.launch.run_dir import RunDir
from holdfast.launch.wording import aligned
from holdfast.trainer.adapting import Bricks
from holdfast.trainer.split import Split
from holdfast.trainer.token_store import TokenStore

_COLUMNS, _LINES = 110, 20
_RUN = RunDir(Path("/home/somebody/holdfast-runs/holdfast/20261123-231204-brisk-otter-7f3a"))
_STORE = TokenStore(
    path=Path("/somewhere"),
    title="local: standard library + pydoc topics",
    digest="9c1e5f00" * 4,
    n_tokens={Split.TRAIN: 10_000_000, Split.VALIDATION: 500_000},
    n_bytes={Split.TRAIN: 9_900_000, Split.VALIDATION: 500_000},
    documents=1400,
    licences=("PSF-2.0",),
)
_FRESH = "auto: nothing to continue, starting fresh"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*knobs.set_knobs(), "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def _config(*overrides: str) -> RunConfig:
    return compose_config(["experiment=main_job", *overrides])


def _facts(config: RunConfig, how: str = _FRESH, attempt: int = 1) -> dict[str, str]:
    return dict(banner(config, _RUN, attempt, _STORE, how))


def _rows(facts: dict[str, str]) -> int:
    """Lines on a screen, which breaks those that are too long."""
    return sum(-(-len(line) // _COLUMNS) for line in aligned(facts))


def _flat(text: str) -> str:
    return " ".join(text.split())


# -- what it says -----------------------------------------------------------------------------------------------------


def test_the_facts_of_the_main_job_are_complete_and_in_order() -> None:
    facts = _facts(_config())
    assert list(facts) == ["run", "devices", "memory", "data", "resume", "look"]
    first, software = facts["run"].split("\n")
    assert _flat(first) == "20261123-231204-brisk-otter-7f3a attempt 1"
    for name in ("holdfast", "python", "torch", "deepspeed", "ray"):
        assert f"{name} " in software
    for part in ("3 nodes x 1 ranks (Ray)", "1 spare", "cpu, gloo", "zero=2 fp32", "model 1m ", "M parameters"):
        assert part in facts["devices"]
    assert "adamw8bit" in facts["devices"]
    assert facts["data"] == "local: standard library + pydoc topics, 10.4 MB, digest 9c1e…, PSF-2.0"
    assert facts["resume"] == _FRESH
    assert facts["look"] == f"W&B off (tracker=wandb turns it on) | tail -f {_RUN.events_file}"


def test_frozen_bytes_are_counted_where_they_are() -> None:
    files = [BrickFile("adapter.base", "/base", "ab" * 32, 1000), BrickFile("adapter.tasks", "/task", "cd" * 32, 11)]
    bricks = Bricks("ab" * 32, ["cd" * 32], files)
    words = ["adapter.method=lora", "adapter.base=/base", "adapter.task=two", "adapter.tasks=[/task]"]
    facts = dict(banner(_config(*words), _RUN, 1, _STORE, _FRESH, bricks))
    assert "1,011 bytes read from files, in no snapshot" in facts["adapter"]
    held = "at most 506 bytes of them per keeper, 1,517 in all, parity included"  # 1000 / 2 and 11 / 2, rounded up
    assert facts["adapter"].endswith(held)
    assert all(len(line) <= _COLUMNS for line in aligned({"adapter": facts["adapter"]}))
    off = dict(banner(_config(*words, "adapter.in_memory=false"), _RUN, 1, _STORE, _FRESH, bricks))
    assert off["adapter"].endswith("nothing of them (adapter.in_memory=false)")


def test_memory_is_that_of_one_rank_and_of_its_buffers_in_the_keeper() -> None:
    few, many = (_facts(_config("parallel=zero2", f"launch.nodes={nodes}"))["memory"] for nodes in (1, 3))
    assert "3 x " in few and "/rank" in few
    assert few != many  # ZeRO divides it
    assert "4 x " in _facts(_config("snapshot.buffers=4"))["memory"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["launch=process"], "(processes)"),
        (["launch.gpus_per_worker=1"], "gpu, nccl"),
        (["launch.spares=0"], "0 spare"),
        (["parallel.precision=BF16"], "bf16"),
        (["parallel=pipeline", "model.n_layers=3"], "zero=1 pipeline=3x1 (waits "),
    ],
)
def test_devices_follow_the_configuration(overrides: Sequence[str], words: str) -> None:
    assert words not in _facts(_config())["devices"]
    assert words in _facts(_config(*overrides))["devices"]


@pytest.mark.parametrize(
    ("mode", "key", "words"),
    [
        ("AUTO", "k", "W&B online"),
        ("AUTO", None, "W&B offline"),
        ("ONLINE", "k", "W&B online"),
        ("ONLINE", None, "W&B online"),  # so it is told; a login may be kept elsewhere
        ("OFFLINE", "k", "W&B offline"),
        ("OFFLINE", None, "W&B offline"),
    ],
)
def test_where_to_look_is_what_the_tracker_will_do(
    mode: str, key: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    facts = _facts(_config("tracker=wandb", f"tracker.mode={mode}"))
    assert facts["look"].startswith(f"{words} | tail -f ")


def test_knobs_that_are_set_are_shown_and_nothing_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_HOME", "/data/runs")
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    facts = _facts(_config("tracker=wandb"))
    assert facts["environ"] == "HOLDFAST_HOME=/data/runs"
    assert "very-secret" not in str(facts)


# -- how much of the screen it takes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [_FRESH, "auto: continuing run1" + 100 * "\nnot resumed: run2: finished at step 300"])
@pytest.mark.parametrize("overrides", [[], ["launch.gpus_per_worker=1"], ["tracker=wandb"], ["launch=process"]])
def test_it_fits_on_one_screen(overrides: Sequence[str], how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOLDFAST_HOME", "/data/runs")
    assert 7 <= _rows(_facts(_config(*overrides), how)) <= _LINES


def test_of_many_runs_that_were_passed_over_the_newest_are_named_and_the_rest_counted() -> None:
    against = [f"not resumed: run{number}: finished at step 300" for number in range(8)]
    shown = _facts(_config(), "\n".join(["auto: continuing run9", *against]))["resume"].split("\n")
    assert shown == ["auto: continuing run9", *against[:3], "and 5 more, see run_started in the events"]
    few = "\n".join(["auto: continuing run9", *against[:3]])
    assert _facts(_config(), few)["resume"] == few


def test_a_long_name_is_shown_whole() -> None:
    config = replace(_config(), project="p" * 128)
    run_dir = RunDir(Path("/home/somebody/holdfast-runs") / config.project / ("r" * 128))
    facts = dict(banner(config, run_dir, 12, _STORE, _FRESH))
    assert "r" * 128 in facts["run"] and "attempt 12" in facts["run"]
    assert _rows(facts) <= _LINES


@pytest.mark.parametrize(
    ("stop_wait_s", "words"),
    [
        (3.0, ["WARNING", "3 s", '"RAY_JOB_STOP_WAIT_TIME_S": "120"']),
        (120, ["120 s"]),
    ],
)
def test_a_ray_job_says_whether_a_stop_leaves_it_time_to_save(stop_wait_s: float, words: list[str]) -> None:
    (told,) = ray_job_facts(RayJob("kelp-a1"), stop_wait_s).values()
    assert told.startswith("kelp-a1\n")
    assert all(word in told for word in words)
    assert ("WARNING" in told) == ("WARNING" in words)
    assert ray_job_facts(None, 120.0) == {}
