"""What a configuration must obey before any process starts. All problems are found together; no Hydra, and no torch
unless there are adapters."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any

from holdfast.configs.adapter_rules import adapter_problems, curriculum_problems, frozen_files
from holdfast.configs.chaos_rules import chaos_problems
from holdfast.configs.data_rules import data_problems, missing_files
from holdfast.configs.host import Host, this_host
from holdfast.configs.launch_rules import deadline_problems, is_duration, launch_problems
from holdfast.configs.layout import batch_problems, pipeline_problems, stage_repair_problems
from holdfast.configs.memory import bandwidth_problems, memory_problems
from holdfast.configs.model_rules import model_problems, optim_problems
from holdfast.configs.options import enum_of, kinds
from holdfast.configs.plain import from_plain, to_plain
from holdfast.configs.protection import protection_problems
from holdfast.configs.schema import RunConfig
from holdfast.configs.snapshot_rules import snapshot_problems, unusable_storage
from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.board import MAX_BUFFERS
from holdfast.fault_tolerance.bricks import BrickFile
from holdfast.trainer.config import TrackerName

__all__ = ["Host", "check", "refuse_bad", "this_host"]


def refuse_bad(config: RunConfig) -> None:
    """Raises: ConfigurationError with everything that is wrong with ``config`` on this machine."""
    found = check(config, this_host(), frozen_files)
    problems = [*found, *_missing_packages(config), *missing_files(config, is_sound=not found)]
    problems = problems or unusable_storage(config)
    if problems:
        raise ConfigurationError(problems)


def check(
    config: RunConfig, host: Host, frozen: Callable[[RunConfig], Sequence[BrickFile]] = lambda config: ()
) -> list[str]:
    """Everything that is wrong with ``config``, one sentence each; empty when the run may start. Pure, but for
    ``frozen``, which says how long the files are that keepers have to hold besides snapshots."""
    wrong_types = _type_problems(config)
    if wrong_types:
        return wrong_types  # nothing else can be judged
    return [problem for part in _PARTS for problem in part(config)] + [
        *memory_problems(config, host, frozen),
        *bandwidth_problems(config),
    ]


def _missing_packages(config: RunConfig) -> Iterator[str]:
    """Of this machine's Python."""
    wants_it = config.tracker.name in (TrackerName.TENSORBOARD, TrackerName.BOTH)
    if wants_it and importlib.util.find_spec("tensorboard") is None:
        yield (
            f"tracker.name={config.tracker.name.name} needs the package tensorboard, which is not installed; "
            "pip install 'holdfast[tensorboard]', or leave tracker= out"
        )


# -- values, one by one -----------------------------------------------------------------------------------------------


def _type_problems(config: RunConfig) -> list[str]:
    """Hydra checks types; a config made in Python has been checked by nobody."""
    try:
        from_plain(to_plain(config))
    except ConfigurationError as error:
        return list(error.problems)
    return [
        f"{key}={_value(config, key)!r} must be a member of {members.__name__}, not its name"
        for key, members in ((key, enum_of(key)) for key in kinds())
        if members is not None and not isinstance(_value(config, key), members)
    ]


def _value(config: RunConfig, key: str) -> Any:  # of whatever type the key has
    return reduce(getattr, key.split("."), config)


def _single_values(config: RunConfig) -> Iterator[str]:
    for key, (holds, rule) in _RULES.items():
        value = _value(config, key)
        if not holds(value):
            yield f"{key}={value!r} must be {rule}"


def _is_at_least(least: int, value: int) -> bool:
    return value >= least


def _is_name(value: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", value) is not None


def _is_name_or_empty(value: str) -> bool:
    return not value or _is_name(value)


def _is_absolute_or_empty(value: str) -> bool:
    return not value or Path(value).is_absolute()


_Rule = tuple[Callable[[Any], bool], str]
_SEED: _Rule = (lambda v: 0 <= v < 2**63, "a whole number from 0 to 2^63 - 1")
_COUNT: _Rule = (partial(_is_at_least, 0), "at least 0")
_POSITIVE_COUNT: _Rule = (partial(_is_at_least, 1), "at least 1")
_SECONDS: _Rule = (is_duration, "a positive number of seconds")
_NAME = "letters, digits, '.', '_' and '-', beginning with a letter or digit, at most 128"
_ABSOLUTE = "absolute, because each process resolves a relative path against a folder of its own"

_RULES: Mapping[str, _Rule] = {
    "project": (_is_name, _NAME),
    "root": (_is_absolute_or_empty, _ABSOLUTE),
    "run_id": (_is_name_or_empty, f"{_NAME}; leave it empty for a new name"),
    "resume": (_is_name, "auto, must, never, or the id of a run"),
    "seed": _SEED,
    "trainer.max_steps": _POSITIVE_COUNT,
    "trainer.global_batch": _POSITIVE_COUNT,
    "trainer.micro_batch": _POSITIVE_COUNT,
    "trainer.log_every": _POSITIVE_COUNT,
    "trainer.eval_every": (partial(_is_at_least, 0), "at least 0, where 0 evaluates at the end only"),
    "trainer.generate_bytes": _COUNT,
    "adapter.task": (_is_name_or_empty, _NAME),
    "adapter.base": (_is_absolute_or_empty, _ABSOLUTE),
    "adapter.tasks": (lambda paths: all(map(_is_absolute_or_empty, paths)), _ABSOLUTE),
    "adapter.spike": (lambda v: 0 <= v < math.inf, "at least 0, where 0 lets the loss rise"),
    "adapter.patience": (partial(_is_at_least, 0), "at least 0, where 0 is patient for ever"),
    "adapter.directions": (_is_absolute_or_empty, _ABSOLUTE),
    "adapter.protected_directions": _COUNT,
    "adapter.router_prompts": _COUNT,
    "adapter.rounds": _POSITIVE_COUNT,
    "adapter.least_gain": (lambda v: 0 <= v < math.inf, "at least 0"),
    "data.seq_len": _POSITIVE_COUNT,
    "data.validation_share": (lambda v: 0 < v < 1, "between 0 and 1, both excluded: both parts need text"),
    "data.cache": (_is_absolute_or_empty, _ABSOLUTE),
    "data.tokenizer": (_is_absolute_or_empty, _ABSOLUTE),
    "parallel.zero_stage": (lambda v: 0 <= v <= 3, "0, 1, 2 or 3"),
    "parallel.pipeline": _POSITIVE_COUNT,
    "parallel.chunks": _POSITIVE_COUNT,
    "parallel.collective_timeout_s": _SECONDS,
    "parallel.bucket_elements": _POSITIVE_COUNT,
    "snapshot.every_steps": _POSITIVE_COUNT,
    "snapshot.buffers": (
        lambda v: 3 <= v <= MAX_BUFFERS,
        (
            f"from 3 to {MAX_BUFFERS}: one buffer holds what all ranks can go back to, one the version that is "
            "not yet known to be complete everywhere, one is being filled"
        ),
    ),
    "snapshot.max_age_steps": (partial(_is_at_least, 0), "at least 0, where 0 never ends the run"),
    "trainer.max_nonfinite": (partial(_is_at_least, 0), "at least 0"),
    "snapshot.copy_mb_per_s": (lambda v: 0 <= v < math.inf, "at least 0, where 0 is no bound"),
    "snapshot.fence_timeout_s": (lambda v: 0 < v < math.inf, "more than 0"),
    "snapshot.memory_limit_gb": (lambda v: 0 <= v < math.inf, "at least 0, where 0 means half of what is free"),
    "snapshot.persist_every_steps": (partial(_is_at_least, 0), "at least 0, where 0 writes one at the end only"),
    "snapshot.persist_every_s": (lambda v: 0 <= v < math.inf, "at least 0, where 0 counts steps only"),
    "snapshot.persist_mb_per_s": (lambda v: 0 <= v < math.inf, "at least 0, where 0 writes as fast as it goes"),
    "snapshot.keep_last": (partial(_is_at_least, 2), "at least 2, so that the last good one outlives a bad write"),
    "recovery.heartbeat_s": _SECONDS,
    "recovery.suspect_after_s": _SECONDS,
    "recovery.abort_after_s": _SECONDS,
    "recovery.start_timeout_s": _SECONDS,
    "recovery.step_timeout_s": _SECONDS,
    "recovery.max_failures": _COUNT,
    "recovery.max_preemptions": (partial(_is_at_least, 0), "at least 0, where 0 is no limit"),
    "recovery.max_no_progress": _POSITIVE_COUNT,
    "recovery.stop_grace_s": _SECONDS,
    "recovery.shrink_after_s": (lambda v: 0 <= v < math.inf, "at least 0, where 0 never goes on with fewer nodes"),
    "recovery.min_nodes": _POSITIVE_COUNT,
    "recovery.retry_node_s": _SECONDS,
    "recovery.lease_s": _SECONDS,
    "recovery.stage.norm_exponent": (lambda v: v in (1, 2), "1 or 2"),
    "recovery.stage.rate_factor": (lambda v: 0 < v < math.inf, "more than 0"),
    "recovery.stage.rate_decay_steps": _POSITIVE_COUNT,
    "recovery.stage.heal_steps": _COUNT,
    "recovery.stage.heal_lr": (lambda v: 0 < v < math.inf, "more than 0"),
    "recovery.stage.log_mb": (lambda v: 0 < v < math.inf, "more than 0"),
    "launch.nodes": _POSITIVE_COUNT,
    "launch.workers_per_node": _POSITIVE_COUNT,
    "launch.spares": _COUNT,
    "launch.gpus_per_worker": (
        lambda v: v >= 0 and float(v).is_integer(),
        "0 or a whole number: ranks that share a GPU cannot form an NCCL group",
    ),
    "launch.threads_per_worker": _POSITIVE_COUNT,
    "tracker.init_timeout_s": _SECONDS,
    "tracker.finish_timeout_s": _SECONDS,
    "tracker.alert_after_s": _SECONDS,
}
"""Rules about one value each; those of ``model`` and ``optim`` live with their owners."""


# -- how values fit together ------------------------------------------------------------------------------------------


_PARTS: tuple[Callable[[RunConfig], Iterator[str]], ...] = (
    _single_values,
    model_problems,
    optim_problems,
    adapter_problems,
    curriculum_problems,
    data_problems,
    pipeline_problems,
    stage_repair_problems,
    batch_problems,
    snapshot_problems,
    protection_problems,
    deadline_problems,
    launch_problems,
    chaos_problems,
)
