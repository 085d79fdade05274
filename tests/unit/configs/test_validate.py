"""What a configuration must obey, and that all mistakes are told together."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from holdfast.configs import host, validate
from holdfast.configs.adapter_rules import frozen_files
from holdfast.configs.layout import stage_facts
from holdfast.configs.memory import keeper_limit_bytes, state_bytes
from holdfast.configs.protection import fewer_nodes
from holdfast.configs.schema import LaunchKind, RunConfig
from holdfast.configs.validate import Host, check, refuse_bad
from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.stage_policy import MomentRepair, Repair, StageFacts
from holdfast.optim.config import OptimName
from holdfast.parallel.config import ScheduleKind
from holdfast.trainer.config import DataSource
from holdfast.trainer.sizing import parameter_count

BIG = Host(free_bytes=10**13)


def changed(**values: Any) -> RunConfig:
    """Defaults but for ``trainer__max_steps=3`` and the like."""
    config = RunConfig()
    for name, value in values.items():
        *sections, last = name.split("__")
        setattr(reduce(getattr, sections, config), last, value)
    return config


def problems_of(**values: Any) -> list[str]:
    return check(changed(**values), BIG)


def test_the_defaults_are_sound() -> None:
    assert check(RunConfig(), BIG) == []


def test_this_machine_may_run_the_defaults() -> None:
    validate.refuse_bad(RunConfig())
    assert validate.this_host().free_bytes > 0


# -- single values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("project", "../up"),
        ("project", ""),
        ("root", "runs"),
        ("run_id", "a/b"),
        ("resume", ""),
        ("resume", "/some/path"),
        ("seed", -1),
        ("trainer.max_steps", 0),
        ("trainer.global_batch", 0),
        ("trainer.micro_batch", -8),
        ("trainer.log_every", 0),
        ("trainer.eval_every", -1),
        ("trainer.generate_bytes", -1),
        ("data.seq_len", 0),
        ("data.validation_share", 0.0),
        ("data.validation_share", 1.0),
        ("data.validation_share", float("nan")),
        ("data.cache", "cache"),
        ("parallel.zero_stage", 4),
        ("parallel.zero_stage", -1),
        ("parallel.collective_timeout_s", 0.0),
        ("parallel.bucket_elements", 0),
        ("snapshot.every_steps", 0),
        ("snapshot.buffers", 2),
        ("snapshot.buffers", 17),
        ("snapshot.memory_limit_gb", -1.0),
        ("snapshot.persist_every_steps", -1),
        ("snapshot.persist_every_s", -1.0),
        ("snapshot.persist_every_s", float("inf")),
        ("snapshot.persist_mb_per_s", -1.0),
        ("snapshot.persist_mb_per_s", float("nan")),
        ("snapshot.keep_last", 1),
        ("recovery.heartbeat_s", 0.0),
        ("recovery.suspect_after_s", float("inf")),
        ("recovery.abort_after_s", -1.0),
        ("recovery.start_timeout_s", float("nan")),
        ("recovery.step_timeout_s", 0.0),
        ("recovery.max_failures", -1),
        ("recovery.max_no_progress", 0),
        ("recovery.stop_grace_s", 0.0),
        ("recovery.lease_s", 0.0),
        ("launch.nodes", 0),
        ("launch.workers_per_node", 0),
        ("launch.spares", -1),
        ("launch.gpus_per_worker", 0.5),
        ("launch.gpus_per_worker", -1.0),
        ("launch.threads_per_worker", 0),
        ("tracker.init_timeout_s", 0.0),
        ("tracker.finish_timeout_s", -1.0),
        ("model.d_model", 0),
        ("model.vocab_size", 258),
        ("optim.lr", -1.0),
        ("optim.betas", [0.9]),
    ],
)
def test_a_value_out_of_bounds_is_named_with_its_rule(key: str, value: Any) -> None:
    (problem,) = problems_of(**{key.replace(".", "__"): value})
    assert problem.startswith(f"{key}={value!r} must be ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 0),
        ("trainer.max_steps", 1),
        ("trainer.generate_bytes", 0),
        ("parallel.zero_stage", 0),
        ("snapshot.buffers", 16),
        ("snapshot.persist_every_steps", 0),
        ("recovery.max_failures", 0),
        ("launch.spares", 0),
        ("launch.gpus_per_worker", 2.0),
        ("root", "/scratch/runs"),
        ("run_id", "20261123-231204-brisk-otter-7f3a"),
        ("resume", "20261123-231204-brisk-otter-7f3a"),
    ],
)
def test_the_bounds_themselves_are_allowed(key: str, value: Any) -> None:
    assert problems_of(**{key.replace(".", "__"): value}) == []


def test_the_rule_about_buffers_says_what_each_is_for() -> None:
    (problem,) = problems_of(snapshot__buffers=2)
    assert "go back to" in problem
    assert "being filled" in problem


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("trainer.max_steps", "3", "must be of type int"),
        ("trainer.max_steps", True, "must be of type int"),
        ("chaos.faults", "sigkill rank=1 step=2", "must be a list"),
        ("parallel.precision", "BF16", "must be a member of Precision, not its name"),
        ("parallel.precision", "bf16", "must be one of FP32, BF16"),
        ("model", None, "must be a mapping"),
    ],
)
def test_a_wrong_type_in_a_configuration_made_in_python_is_told_and_nothing_else(
    key: str, value: Any, rule: str
) -> None:
    config = changed(**{key.replace(".", "__"): value})
    config.seed = -1
    assert check(config, BIG) == [f"{key}={value!r} {rule}"]


# -- relations --------------------------------------------------------------------------------------------------------


def test_a_batch_that_does_not_divide_names_the_nearest_ones_that_do() -> None:
    (problem,) = problems_of(trainer__global_batch=30)
    assert problem == (
        "trainer.global_batch=30 must be a multiple of trainer.micro_batch x ranks = 8 x 3 = 24; "
        "try trainer.global_batch=24 or 48, or trainer.micro_batch=5"
    )


def test_a_batch_below_one_micro_batch_per_rank_is_not_answered_with_zero() -> None:
    (problem,) = problems_of(trainer__global_batch=7)
    assert "; try trainer.global_batch=24; " in problem


@pytest.mark.parametrize(("nodes", "fitting"), [(5, "3 or 6"), (7, "6"), (4, "3 or 6")])
def test_a_run_whose_batch_the_ranks_cannot_share_is_told_how_many_can(nodes: int, fitting: str) -> None:
    """Its batch is part of what it computes."""
    values = {"trainer__global_batch": 6, "trainer__micro_batch": 1, "launch__nodes": nodes}
    (problem,) = problems_of(**values, snapshot__memory_limit_gb=1.0)
    assert problem.endswith(f"; a run that is continued keeps its batch: give it {fitting} ranks")


@pytest.mark.parametrize(("nodes", "workers_per_node"), [(1, 1), (3, 2), (2, 4)])
def test_the_batch_is_divided_by_all_ranks_of_all_nodes(nodes: int, workers_per_node: int) -> None:
    layout = {"launch__nodes": nodes, "launch__workers_per_node": workers_per_node}
    world = nodes * workers_per_node
    assert problems_of(trainer__global_batch=2 * 8 * world, **layout) == []
    assert len(problems_of(trainer__global_batch=2 * 8 * world + 1, **layout)) == 1


def test_every_rank_evaluates_at_least_one_window() -> None:
    (problem,) = problems_of(trainer__eval_windows=2)
    assert problem.startswith("trainer.eval_windows=2 must be at least the number of ranks, 3")


def test_a_sequence_must_fit_the_model() -> None:
    (problem,) = problems_of(data__seq_len=2000)
    assert problem.startswith("data.seq_len=2000 must be at most model.max_seq_len=1024")


def test_checkpoints_are_written_from_snapshots() -> None:
    (problem,) = problems_of(snapshot__every_steps=7)
    assert problem.startswith("snapshot.persist_every_steps=100 must be a multiple of snapshot.every_steps=7")
    assert problem.endswith("try snapshot.persist_every_steps=105")
    assert problems_of(snapshot__every_steps=7, snapshot__persist_every_steps=0) == []


def test_a_bound_that_keeps_a_stopped_run_from_saving_itself_is_refused() -> None:
    needed_mb = state_bytes(RunConfig()) * RunConfig().launch.workers_per_node / 1e6
    assert problems_of(snapshot__persist_mb_per_s=needed_mb / 10, recovery__stop_grace_s=10.1) == []
    (problem,) = problems_of(snapshot__persist_mb_per_s=needed_mb / 10, recovery__stop_grace_s=9.9)
    assert "lets a checkpoint take 10 s, and a run that is asked to stop has recovery.stop_grace_s=9.9" in problem


@pytest.mark.parametrize("uri", ["ftp://host/p", "s3://b/p?regoin=x", "relative"])
def test_a_storage_that_cannot_be_meant_is_refused_without_a_network(uri: str) -> None:
    (problem,) = problems_of(snapshot__storage=uri)
    assert problem.startswith(f"snapshot.storage {uri!r}")


def test_a_storage_is_tried_before_anything_starts_and_left_as_it_was(tmp_path: Path) -> None:
    storage = tmp_path / "durable"
    validate.refuse_bad(changed(snapshot__storage=str(storage)))
    assert [path for path in storage.rglob("*") if path.is_file()] == []
    storage.joinpath("file").write_bytes(b"")
    with pytest.raises(ConfigurationError, match=r"snapshot\.storage=.* cannot be used: .*Not a directory"):
        validate.refuse_bad(changed(snapshot__storage=str(storage / "file")))


def test_deadlines_are_ordered() -> None:
    first, second = problems_of(recovery__suspect_after_s=0.1, recovery__step_timeout_s=0.1)
    assert first.startswith("recovery.heartbeat_s=0.2 must be below recovery.suspect_after_s=0.1")
    assert second.startswith("recovery.suspect_after_s=0.1 must be below recovery.step_timeout_s=0.1")


@pytest.mark.parametrize("source", [DataSource.TEXT, DataSource.JSONL, DataSource.PARQUET])
def test_the_users_own_text_needs_a_path(source: DataSource) -> None:
    (problem,) = problems_of(data__source=source)
    assert problem == f"data.path is empty, but data={source.value} needs it: data.path=<file or directory>"


def test_a_path_without_a_source_is_not_ignored_in_silence() -> None:
    (problem,) = problems_of(data__path="/books")
    assert problem.startswith("data.path='/books' is not read by data=local")


def test_rows_need_a_field() -> None:
    (problem,) = problems_of(data__source=DataSource.JSONL, data__path="/books", data__field="")
    assert problem.startswith("data.field is empty")


def test_a_path_must_exist_on_the_machine_that_reads_it(tmp_path: Path) -> None:
    config = changed(data__source=DataSource.TEXT, data__path=str(tmp_path / "gone"), seed=-1)
    with pytest.raises(ConfigurationError) as caught:
        validate.refuse_bad(config)
    seed, path = caught.value.problems
    assert seed.startswith("seed=-1")
    assert path.startswith(f"data.path='{tmp_path}/gone' does not exist")
    validate.refuse_bad(changed(data__source=DataSource.TEXT, data__path=str(tmp_path)))


@pytest.mark.parametrize(("key", "value"), [("address", "auto"), ("gpus_per_worker", 1.0)])
def test_what_only_ray_can_do_is_refused_without_it(key: str, value: Any) -> None:
    (problem,) = problems_of(launch__kind=LaunchKind.PROCESS, **{f"launch__{key}": value})
    assert problem == f"launch.{key}={value!r} is for Ray, and launch=process runs without it; use launch=local"


@pytest.mark.parametrize("key", ["percentile_clipping", "stochastic_rounding", "seed"])
def test_what_the_trainer_would_ignore_or_could_not_shard_is_refused(key: str) -> None:
    value = {"percentile_clipping": 5, "stochastic_rounding": True, "seed": 3}[key]
    (problem,) = problems_of(optim__options={key: value})
    assert problem.startswith(f"optim.options.{key} ") and problem.endswith("; leave it out")


def test_options_of_the_optimizer_are_judged_before_anything_starts() -> None:
    found = problems_of(optim__name=OptimName.SGD, optim__options={"nestorov": True})
    assert found[0].startswith("optim.options.nestorov is not an argument of sgd; it takes dampening, nesterov, ")


def test_two_names_for_one_run_are_refused() -> None:
    assert problems_of(run_id="a", resume="a") == []
    assert problems_of(run_id="a", resume="never") == []
    (problem,) = problems_of(run_id="a", resume="b")
    assert problem == "run_id='a' and resume='b' name two runs; leave run_id empty"


@pytest.mark.parametrize(
    ("entry", "fragment"),
    [
        ("sigkill rank=3 step=1", "rank=3 does not exist; ranks are 0 to 2"),
        ("keeper_sigkill node=3 step=1", "node=3 does not exist; nodes are 0 to 2"),
        ("sigkill rank=0 step=300", "step=300 is never reached; the last one is 299 with trainer.max_steps=300"),
        ("sigkill rank=0 step=301 at=export.begin", "step=301 is never reached; the last one is 300"),
        ("keeper_sigkill node=0 step=301", "step=301 is never reached"),
        ("sigkil rank=0 step=1", "did you mean 'sigkill'?"),
        ("node_sigkill node=3 step=1", "node=3 does not exist; nodes are 0 to 2"),
        ("disk_full node=3 step=1 for=1", "node=3 does not exist"),
        ("driver_sigkill step=301", "step=301 is never reached; the last one is 300"),
        ("sigkill rate=0.1 ranks=1-3", "rank=3 does not exist; ranks are 0 to 2"),
        ("sigkill rate=0.1 from=300", "from=300 is never reached; the last one is 299"),
    ],
)
def test_a_fault_that_would_never_happen_is_refused(entry: str, fragment: str) -> None:
    (problem,) = problems_of(chaos__faults=["hang rank=1 step=3", entry])
    assert fragment in problem


@pytest.mark.parametrize(
    "entry",
    [
        "sigkill rank=2 step=299",
        "sigkill rank=2 step=300 at=export.begin",
        "keeper_sigkill node=2 step=300",
        "sigkill rate=0.1 ranks=0-2 from=299 to=9999",
        "disk_full step=300 for=1",
    ],
)
def test_the_last_rank_and_step_may_be_hit(entry: str) -> None:
    assert problems_of(chaos__faults=[entry]) == []


def test_parity_that_is_not_there_cannot_be_damaged() -> None:
    (problem,) = problems_of(chaos__faults=["flip rank=0 step=1 what=parity"], snapshot__parity=0)
    assert "there is no parity with snapshot.parity=0" in problem


def test_misspelled_and_impossible_faults_are_told_together() -> None:
    problems = problems_of(chaos__faults=["sigkil rank=0 step=1", "sigkill rank=9 step=999"])
    assert len(problems) == 3


def test_mistakes_in_every_section_are_told_together() -> None:
    problems = problems_of(
        seed=-1,
        trainer__global_batch=25,
        data__path="/x",
        model__n_heads=3,
        optim__lr=-1.0,
        snapshot__buffers=1,
        recovery__heartbeat_s=99.0,
        launch__spares=-1,
        chaos__faults=["nonsense"],
    )
    named = ["seed", "trainer.global_batch", "data.path", "model.n_heads", "optim.lr"]
    named += ["snapshot.buffers", "recovery.heartbeat_s", "launch.spares", "chaos fault"]
    assert all(any(problem.startswith(name) for problem in problems) for name in named)


def test_zeros_everywhere_are_answered_not_divided_by() -> None:
    zeros = {"trainer__global_batch": 0, "trainer__micro_batch": 0, "launch__nodes": 0, "snapshot__every_steps": 0}
    zeros |= {"model__d_model": 0, "model__n_heads": 0, "optim__block_size": 0, "recovery__heartbeat_s": 0}
    assert len(problems_of(**zeros)) == len(zeros)


# -- a pipeline -------------------------------------------------------------------------------------------------------

_PIPELINE = {"parallel__pipeline": 3, "parallel__zero_stage": 1, "model__n_layers": 6}


def test_a_pipeline_with_replicas_shares_the_batch_among_the_replicas() -> None:
    fits = {**_PIPELINE, "launch__workers_per_node": 2, "trainer__micro_batch": 4}
    assert problems_of(**fits, trainer__global_batch=24, trainer__eval_windows=2) == []  # two replicas of three
    (problem,) = problems_of(**fits, trainer__global_batch=20)
    assert "must be a multiple of trainer.micro_batch x replicas of the pipeline = 4 x 2 = 8" in problem


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"parallel__zero_stage": 2}, "use parallel.zero_stage=1"),
        ({"launch__nodes": 4, "trainer__global_batch": 32}, "parallel.pipeline=3 must divide the number of ranks, 4"),
        ({"model__n_layers": 2}, "3 pipeline stages for 2 blocks"),
        ({"parallel__blocks": [1, 2, 2]}, "add up to 5, the model has 6 blocks"),
        ({"parallel__blocks": [3, 3]}, "2 numbers for 3 stages"),
        ({"parallel__swapped": True}, "use at least 4"),
        ({"parallel__chunks": 2, "parallel__schedule": ScheduleKind.GPIPE}, "only ONE_F_ONE_B is interleaved"),
        ({"parallel__chunks": 2, "trainer__global_batch": 16}, "must be a multiple of the 3 processes"),
    ],
)
def test_a_pipeline_that_cannot_be_is_refused_with_the_rule(values: dict[str, Any], word: str) -> None:
    problems = problems_of(**{**_PIPELINE, **values})
    assert any(word in problem for problem in problems), problems


@pytest.mark.parametrize(("key", "value"), [("chunks", 2), ("blocks", [1, 1]), ("swapped", True)])
def test_options_of_a_pipeline_without_one_are_refused(key: str, value: object) -> None:
    (problem,) = problems_of(**{f"parallel__{key}": value})
    assert problem == f"parallel.{key}={value} is of a pipeline, and there is none; set parallel.pipeline too"


_REBUILT = {**_PIPELINE, "parallel__blocks": [2, 2, 2], "recovery__stage__repair": Repair.CHECKFREE}


def test_stages_that_are_alike_may_be_made_from_each_other() -> None:
    assert problems_of(**_REBUILT) == []
    facts = stage_facts(changed(**_REBUILT))
    assert facts == StageFacts((2, 2, 2), Repair.CHECKFREE, has_end_copies=False)
    assert stage_facts(changed(**_PIPELINE)) is None


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"parallel__pipeline": 1, "parallel__blocks": []}, "is of a pipeline, and there is none"),
        ({"parallel__blocks": [1, 2, 3]}, "other numbers of blocks: [1, 2, 3]"),
        ({"launch__workers_per_node": 2, "trainer__micro_batch": 4}, "needs one stage per rank"),
        ({"parallel__chunks": 2, "parallel__blocks": [1] * 6}, "needs one stage per rank"),
        ({"recovery__stage__repair": Repair.CHECKFREE_PLUS}, "set parallel.swapped=true"),
        ({"recovery__stage__moments": MomentRepair.AVERAGED}, "codes of 8 bits have no average"),
        ({"recovery__stage__moments": MomentRepair.EXACT}, "use RESET or AVERAGED"),
        ({"recovery__stage__norm_exponent": 3}, "1 or 2"),
        ({"recovery__stage__heal_steps": 9, "recovery__stage__log_mb": 0.1}, "holds less than two microbatches'"),
    ],
)
def test_a_repair_of_stages_that_cannot_be_is_refused_with_the_rule(values: dict[str, Any], word: str) -> None:
    problems = problems_of(**{**_REBUILT, **values})
    assert any(word in problem for problem in problems), problems


def test_the_state_of_a_rank_is_that_of_the_largest_process_and_shared_by_replicas() -> None:
    alone = {"optim__name": OptimName.ADAMW, "parallel__zero_stage": 1, "model__n_layers": 6, "launch__nodes": 4}
    whole = parameter_count(changed(**alone).model)
    d_model, vocabulary = changed(**alone).model.d_model, changed(**alone).model.vocab_size
    ends = 2 * vocabulary * d_model + d_model
    last = (whole - ends) // 2 + vocabulary * d_model + d_model  # half of the blocks, and the head with its norm
    assert state_bytes(changed(**alone, parallel__pipeline=2, trainer__global_batch=32)) == 12 * last // 2


# -- memory -----------------------------------------------------------------------------------------------------------


def test_state_is_master_weights_and_moments_over_the_ranks_that_share_them() -> None:
    """specs: arXiv 1910.02054 section 5, K = 12 for fp32 Adam; 4 + 2 + 8/B with 8-bit moments."""
    count = parameter_count(RunConfig().model)
    assert state_bytes(changed(optim__name=OptimName.ADAMW, parallel__zero_stage=0)) == 12 * count
    assert state_bytes(changed(optim__name=OptimName.ADAMW, parallel__zero_stage=1)) == 4 * count
    assert state_bytes(changed(launch__nodes=1)) == pytest.approx(6.03125 * count, abs=1)


@pytest.mark.parametrize(
    ("name", "options", "moments"),
    [
        ("adam", {}, 2),
        ("sgd", {}, 1),
        ("lion", {}, 1),
        ("rmsprop", {}, 1),
        ("rmsprop", {"momentum": 0.9, "centered": True}, 3),
        ("adagrad", {}, 1),
        ("lamb", {}, 2),
        ("lars", {}, 1),
        ("ademamix", {}, 3),
    ],
)
def test_state_counts_the_moments_of_each_optimizer(name: str, options: dict[str, Any], moments: int) -> None:
    count = parameter_count(RunConfig().model)
    values = {"optim__options": options, "parallel__zero_stage": 0}
    assert state_bytes(changed(optim__name=OptimName(name), **values)) == (4 + 4 * moments) * count
    in_8_bits = state_bytes(changed(optim__name=OptimName(f"{name}8bit"), **values))
    assert in_8_bits == pytest.approx((4 + moments * (1 + 4 / 256)) * count, abs=1)


def test_sgd_without_momentum_keeps_masters_only() -> None:
    config = changed(optim__name=OptimName.SGD, optim__momentum=0.0, parallel__zero_stage=0)
    assert state_bytes(config) == 4 * parameter_count(config.model)
    (problem,) = check(config, Host(1000))
    assert "8-bit" not in problem


def test_snapshots_may_use_half_of_what_is_free() -> None:
    config = RunConfig()
    need = 3 * (3 + 1) * state_bytes(config)  # three nodes; two versions of parity, each half as large as a buffer
    assert check(config, Host(2 * need)) == []
    (problem,) = check(config, Host(2 * need - 2))
    assert problem.startswith(f"snapshots need {need:,} bytes of host memory")
    assert "half of" in problem


def test_a_run_that_may_go_on_with_fewer_nodes_needs_room_for_both_worlds() -> None:
    config = changed(recovery__shrink_after_s=30.0, trainer__micro_batch=1)
    assert fewer_nodes(config) == [2, 1]
    per_rank = (3 + 2) * (1 + 3 / 2) + 1 / 2  # pairs mirror each other; and half of what the lost node held
    need = 3 * math.ceil(per_rank * state_bytes(config))
    assert check(config, Host(2 * need)) == []
    (problem,) = check(config, Host(2 * need - 2))
    assert problem.startswith(f"snapshots need {need:,} bytes of host memory")
    assert "room to go on with 2 nodes (recovery.shrink_after_s)" in problem
    config.recovery.min_nodes = 3
    assert fewer_nodes(config) == []


def test_no_more_nodes_can_be_kept_than_the_run_starts_with() -> None:
    (problem,) = problems_of(recovery__min_nodes=4)
    assert problem.startswith("recovery.min_nodes=4 must not exceed launch.nodes=3")


def test_a_limit_of_the_users_own_replaces_the_half() -> None:
    config = changed(model__d_model=1024, model__n_layers=24, model__d_ff=4096, snapshot__memory_limit_gb=3.0)
    config.snapshot.parity = 0
    per_node = 3 * state_bytes(config)
    assert 1 * 10**9 < per_node < 3 * 10**9
    assert check(config, Host(3 * per_node)) == []
    (problem,) = check(config, Host(3 * per_node - 1))
    assert problem.startswith(f"snapshots need {3 * per_node:,} bytes")
    config.snapshot.memory_limit_gb = 1.0
    (problem,) = check(config, BIG)
    assert problem.startswith("snapshot.memory_limit_gb=1.0 must be at least ")
    assert f"{per_node:,} bytes per node" in problem


def test_the_way_out_names_what_would_help() -> None:
    config = changed(optim__name=OptimName.ADAMW, parallel__zero_stage=0, snapshot__buffers=5)
    (problem,) = check(config, Host(1000))
    for way in ("smaller model", "parallel=zero2", "optim=adamw8bit", "snapshot.buffers", "memory_limit_gb"):
        assert way in problem
    config.optim.name = OptimName.LION
    assert "optim=lion8bit" in check(config, Host(1000))[0]
    config.optim.name = OptimName.LION8BIT
    assert "8-bit" not in check(config, Host(1000))[0]


@pytest.mark.parametrize(("address", "ray_address"), [("auto", ""), ("", "10.0.0.1:6379")])
def test_on_a_cluster_the_memory_of_this_machine_says_nothing(address: str, ray_address: str) -> None:
    assert check(changed(launch__address=address), Host(1000, ray_address)) == []


def test_without_ray_its_address_does_not_matter() -> None:
    assert len(check(changed(launch__kind=LaunchKind.PROCESS), Host(1000, "10.0.0.1:6379"))) == 1


def test_keepers_on_one_host_share_half_of_what_is_free() -> None:
    assert keeper_limit_bytes(RunConfig(), Host(600)) == 100
    assert keeper_limit_bytes(changed(launch__address="auto"), Host(600)) == 300
    assert keeper_limit_bytes(changed(snapshot__memory_limit_gb=1.5), Host(600)) == 1_500_000_000


@pytest.mark.parametrize(
    ("folder", "limit", "used", "cache"),
    [
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_a_container_offers_no_more_than_its_limit(
    tmp_path: Path, folder: str, limit: str, used: str, cache: str
) -> None:
    assert host._container_free_bytes(tmp_path) == float("inf")
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / limit).write_text("1000\n")
    (tmp_path / folder / used).write_text("700\n")
    (tmp_path / folder / "memory.stat").write_text(f"anon 5\n{cache} 200\n")
    assert host._container_free_bytes(tmp_path) == 500
    (tmp_path / folder / used).write_text("1700\n")
    assert host._container_free_bytes(tmp_path) == 0


def test_a_container_without_a_limit_offers_everything(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    assert host._container_free_bytes(tmp_path) == float("inf")


def test_checking_loads_neither_torch_nor_hydra() -> None:
    code = "import sys; from holdfast.configs import validate; print({'torch', 'hydra', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# -- adapters ---------------------------------------------------------------------------------------------------------


def adapted(**values: Any) -> RunConfig:
    return changed(**{"adapter__method": "mora", "adapter__base": "/base", "adapter__task": "one", **values})


def test_frozen_files_in_memory_need_room_beside_the_snapshots(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.touch()
    os.truncate(base, 10**9)  # a hole: only its size is looked at
    config = adapted(adapter__base=str(base), adapter__options={"rank": 4})
    frozen, snapshots = frozen_files(config), 3 * math.ceil((3 + 1) * state_bytes(config))
    need = snapshots + 10**9 * 3 // 2  # three nodes, one of which may be lost
    assert check(config, Host(2 * need), lambda _: frozen) == []
    (problem,) = check(config, Host(2 * need - 2), lambda _: frozen)
    assert problem.startswith(f"snapshots need {need:,} bytes of host memory")
    assert "500,000,000 bytes per node of frozen files (adapter.in_memory)" in problem
    assert "adapter.in_memory=false" in problem
    config.snapshot.memory_limit_gb = 0.4
    (problem,) = check(config, BIG, lambda _: frozen)
    assert problem.startswith("snapshot.memory_limit_gb=0.4 must be at least 0.5")
    config.adapter.in_memory = False
    assert frozen_files(config) == []
    os.truncate(base, 10**13)
    with pytest.raises(ConfigurationError, match="bytes of host memory"):
        refuse_bad(
            adapted(adapter__base=str(base), adapter__options={"rank": 4})
        )  # at once, and not after ten terabytes


def test_frozen_files_that_cannot_be_read_are_left_to_whoever_reads_them(tmp_path: Path) -> None:
    config = adapted(adapter__base=str(tmp_path / "nowhere"), adapter__tasks=[str(tmp_path / "nothing")])
    assert frozen_files(config) == []


def test_an_adapter_run_is_sound_and_needs_memory_for_its_task_only() -> None:
    config = adapted(adapter__options={"rank": 4})
    assert check(config, BIG) == []
    model = config.model
    kv = model.d_model // model.n_heads * model.n_kv_heads
    pairs = [(model.d_model, model.d_model)] * 2 + [(model.d_model, kv)] * 2 + [(model.d_model, model.d_ff)] * 3
    elements = model.n_layers * 4 * sum(map(sum, pairs))
    whole = changed()
    assert state_bytes(config) / state_bytes(whole) == pytest.approx(elements / parameter_count(model), rel=1e-3)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"adapter__base": ""}, "adapter.base is empty"),
        ({"adapter__base": "model.safetensors"}, "adapter.base='model.safetensors' must be absolute"),
        ({"adapter__tasks": ["tasks/one"]}, "adapter.tasks=['tasks/one'] must be absolute"),
        ({"adapter__task": "a/b"}, "adapter.task='a/b' must be letters"),
        ({"adapter__task": ""}, "adapter.task is empty"),
        (
            {"adapter__method": "", "adapter__task": "", "adapter__base": "", "adapter__nf4": True},
            "adapter.nf4=True is",
        ),
        ({"adapter__method": "morra"}, "'morra' does not exist"),
        ({"adapter__options": {"rank": -1}}, "rank=-1 must be at least 1"),
        ({"adapter__domains": ["/text"]}, "are learned by holdfast adapt"),
        ({"adapter__rounds": 0}, "adapter.rounds=0 must be at least 1"),
        ({"adapter__keep_best": True}, "adapter.keep_best=true needs trainer.eval_every"),
        ({"adapter__spike": 0.1}, "adapter.spike=0.1 is looked at by adapter.keep_best=true only"),
        (
            {"adapter__spike": -0.1, "adapter__keep_best": True, "trainer__eval_every": 1},
            "adapter.spike=-0.1 must be at least 0",
        ),
        ({"adapter__patience": 2}, "adapter.patience=2 is looked at by adapter.keep_best=true only"),
        ({"adapter__directions": "/d"}, "stays out of no directions"),
        ({"adapter__protected_directions": 2}, "stays out of no directions"),
        ({"parallel__zero_stage": 3}, "the base is whole on every rank"),
        ({"adapter__method": "", "adapter__task": ""}, "adapter.base='/base' is of a method, and there is none"),
    ],
)
def test_adapter_options_that_cannot_be(values: dict[str, Any], word: str) -> None:
    (problem,) = check(adapted(**values), BIG)
    assert word in problem


def test_adapters_have_no_pipeline() -> None:
    values = {"parallel__pipeline": 2, "launch__nodes": 2, "trainer__global_batch": 16}
    assert any("adapters have no pipeline" in problem for problem in check(adapted(**values), BIG))
