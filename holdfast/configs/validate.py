"""What a configuration must obey before any process starts. All problems are found together; no Hydra, and no torch
unless there are adapters."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path
from typing import Any

import psutil

from holdfast import knobs
from holdfast.configs.adapter_rules import adapter_problems, curriculum_problems, frozen_files, method_problems
from holdfast.configs.layout import (
    pipeline_plan,
    pipeline_problems,
    replicas_of,
    stage_repair_problems,
    world,
)
from holdfast.configs.options import enum_of, kinds
from holdfast.configs.plain import from_plain, to_plain
from holdfast.configs.protection import brick_bytes, fewer_nodes, parity_ratio, protection_problems
from holdfast.configs.schema import LaunchKind, RunConfig
from holdfast.errors import ConfigurationError, SnapshotError
from holdfast.fault_tolerance.board import MAX_BUFFERS
from holdfast.fault_tolerance.bricks import BrickFile
from holdfast.fault_tolerance.chaos import ChaosFault, parse, parse_all
from holdfast.fault_tolerance.storage import open_storage
from holdfast.fault_tolerance.storage_uri import below, parse_uri
from holdfast.optim.config import check as check_optim
from holdfast.optim.config import moment_count
from holdfast.trainer.config import DataSource, ModelKind, TrackerName
from holdfast.trainer.models import model_of
from holdfast.trainer.sizing import MIN_VOCAB_SIZE
from holdfast.trainer.vocabulary import vocabulary_of

__all__ = [
    "Host",
    "check",
    "keeper_limit_bytes",
    "never_happens",
    "refuse_bad",
    "state_bytes",
    "this_host",
]

_GB = 10**9


@dataclass(frozen=True, slots=True)
class Host:
    """What the machine of the driver has to offer."""

    free_bytes: int
    """Memory that processes started now may take."""
    ray_address: str = ""
    """The cluster that RAY_ADDRESS names."""


def this_host() -> Host:
    """The machine this process runs on, at this moment; inside a container no more than the container may use."""
    free_bytes = min(psutil.virtual_memory().available, _container_free_bytes(Path("/sys/fs/cgroup")))
    return Host(int(free_bytes), knobs.ray_address() or "")


def refuse_bad(config: RunConfig) -> None:
    """Raises: ConfigurationError with everything that is wrong with ``config`` on this machine."""
    found = check(config, this_host(), frozen_files)
    problems = [*found, *_missing_packages(config), *_missing_files(config, is_sound=not found)]
    problems = problems or _unusable_storage(config)
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
        *_memory_problems(config, host, frozen),
        *_bandwidth_problems(config),
    ]


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


def _is_duration(value: float) -> bool:
    return 0 < value < math.inf


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
_SECONDS: _Rule = (_is_duration, "a positive number of seconds")
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


def _model(config: RunConfig) -> Iterator[str]:
    model, is_builtin = model_of(config.model), config.model.kind is ModelKind.DECODER
    problems = model.problems()
    yield from problems
    if problems and not is_builtin:
        return
    longest = model.max_seq_len
    if config.data.seq_len > longest >= 1:
        own, more = ("model.max_seq_len", " or raise model.max_seq_len") if is_builtin else ("the model's longest", "")
        yield f"data.seq_len={config.data.seq_len} must be at most {own}={longest}; try data.seq_len={longest}{more}"
    if not config.data.tokenizer and 0 < model.vocab_size < MIN_VOCAB_SIZE and not is_builtin:
        yield (
            f"model.path={config.model.path!r} has a vocabulary of {model.vocab_size}, and bytes need "
            f"{MIN_VOCAB_SIZE}: 256 byte values, <bos>, <eos> and <pad>; set data.tokenizer"
        )


def _optim(config: RunConfig) -> Iterator[str]:
    yield from check_optim(config.optim)
    for key, reason in _NOT_FOR_TRAINING.items():
        if key in config.optim.options:
            yield f"optim.options.{key} {reason}; leave it out"


_NOT_FOR_TRAINING = {
    "percentile_clipping": "looks at one tensor at a time, and shards hold parts of several; use optim.grad_clip",
    "stochastic_rounding": "is for bfloat16 weights, and the trainer updates fp32 masters",
    "seed": "is that of stochastic rounding, and the trainer updates fp32 masters",
}


def _data(config: RunConfig) -> Iterator[str]:
    source, path = config.data.source, config.data.path
    if source is DataSource.LOCAL and path:
        yield f"data.path={path!r} is not read by data=local; add data=text, data=jsonl or data=parquet"
    if source is not DataSource.LOCAL and not path:
        yield f"data.path is empty, but data={source.value} needs it: data.path=<file or directory>"
    if config.data.split and source is not DataSource.HF:
        yield f"data.split={config.data.split!r} is of data=hf; leave it out"
    if source in (DataSource.JSONL, DataSource.PARQUET, DataSource.HF) and not config.data.field:
        yield f"data.field is empty, but data={source.value} needs the name of the field that holds the text"


def _missing_packages(config: RunConfig) -> Iterator[str]:
    """Of this machine's Python."""
    wants_it = config.tracker.name in (TrackerName.TENSORBOARD, TrackerName.BOTH)
    if wants_it and importlib.util.find_spec("tensorboard") is None:
        yield (
            f"tracker.name={config.tracker.name.name} needs the package tensorboard, which is not installed; "
            "pip install 'holdfast[tensorboard]', or leave tracker= out"
        )


def _missing_files(config: RunConfig, *, is_sound: bool) -> list[str]:
    paths = {f"adapter.seen.{name}": path for name, path in config.adapter.seen.items()}
    if config.data.source not in (DataSource.LOCAL, DataSource.HF) and config.data.path:
        paths["data.path"] = config.data.path
    return (_unfit_tokenizer(config) if is_sound else []) + [
        f"{key}={path!r} does not exist on this machine, which reads it before the workers start"
        for key, path in paths.items()
        if not Path(str(path)).exists()
    ]


def _unfit_tokenizer(config: RunConfig) -> list[str]:
    try:
        have, need = model_of(config.model).vocab_size, vocabulary_of(config.data).size
    except ConfigurationError as error:
        return list(error.problems)
    if not config.data.tokenizer or have == 0 or need <= have:
        return []
    return [
        f"data.tokenizer={config.data.tokenizer!r} has {need:,} tokens, more than the model's vocabulary of {have:,}"
    ]


def _batch(config: RunConfig) -> Iterator[str]:
    batch, micro, world = config.trainer.global_batch, config.trainer.micro_batch, replicas_of(config)
    if min(batch, micro, world) < 1:
        return  # reported already
    who = "ranks" if config.parallel.pipeline <= 1 else "replicas of the pipeline"
    unit = micro * world
    if batch % unit:
        near = [str(near) for near in (batch - batch % unit, batch - batch % unit + unit) if near]
        advice = f"try trainer.global_batch={' or '.join(near)}"
        if batch % world == 0:
            fitting = max(size for size in range(1, micro + 1) if batch // world % size == 0)
            advice += f", or trainer.micro_batch={fitting}"
        else:
            advice += f"; a run that is continued keeps its batch: give it {_fitting_worlds(batch, world)} {who}"
        yield (
            f"trainer.global_batch={batch} must be a multiple of trainer.micro_batch x {who} = "
            f"{micro} x {world} = {unit}; {advice}"
        )
    if config.trainer.eval_windows < world:
        yield (
            f"trainer.eval_windows={config.trainer.eval_windows} must be at least the number of {who}, {world}: "
            f"each evaluates equally many; try trainer.eval_windows={4 * world}"
        )


def _fitting_worlds(batch: int, world: int) -> str:
    """The nearest numbers of ranks that divide the batch, below and above."""
    below = max(n for n in range(1, world + 1) if batch % n == 0)
    above = next((n for n in range(world, batch + 1) if batch % n == 0), below)
    return str(below) if above == below else f"{below} or {above}"


def _snapshots(config: RunConfig) -> Iterator[str]:
    every, persist = config.snapshot.every_steps, config.snapshot.persist_every_steps
    if every >= 1 and persist > 0 and persist % every:
        yield (
            f"snapshot.persist_every_steps={persist} must be a multiple of snapshot.every_steps={every}, because "
            f"checkpoints are written from snapshots; try snapshot.persist_every_steps={-(-persist // every) * every}"
        )

    if config.snapshot.storage:
        try:
            parse_uri(config.snapshot.storage)
        except ConfigurationError as error:
            yield from (f"snapshot.{problem}" for problem in error.problems)


def _unusable_storage(config: RunConfig) -> list[str]:
    """Whether an object can be written there and taken away, tried only when nothing else is wrong."""
    if not config.snapshot.storage:
        return []
    test = f"holdfast-write-test-{uuid.uuid4().hex[:8]}"
    try:
        storage = open_storage(below(config.snapshot.storage, config.project))
        storage.write(test, [b"holdfast"])
        storage.delete(test)
    except SnapshotError as error:
        return [f"snapshot.storage={config.snapshot.storage!r} cannot be used: {error}"]
    return []


def _deadlines(config: RunConfig) -> Iterator[str]:
    recovery = config.recovery
    if not all(map(_is_duration, (recovery.heartbeat_s, recovery.suspect_after_s, recovery.step_timeout_s))):
        return  # reported already
    if not recovery.heartbeat_s < recovery.suspect_after_s:
        yield (
            f"recovery.heartbeat_s={recovery.heartbeat_s} must be below recovery.suspect_after_s="
            f"{recovery.suspect_after_s}, or every rank counts as frozen; "
            f"try recovery.heartbeat_s={recovery.suspect_after_s / 50:g}"
        )
    if not recovery.suspect_after_s < recovery.step_timeout_s:
        yield (
            f"recovery.suspect_after_s={recovery.suspect_after_s} must be below recovery.step_timeout_s="
            f"{recovery.step_timeout_s}, or a frozen rank counts as a slow one; raise recovery.step_timeout_s"
        )


def _launch(config: RunConfig) -> Iterator[str]:
    launch = config.launch
    if launch.kind is LaunchKind.PROCESS:
        for key, value in (("address", launch.address), ("gpus_per_worker", launch.gpus_per_worker)):
            if value:
                yield f"launch.{key}={value!r} is for Ray, and launch=process runs without it; use launch=local"
    if config.run_id and config.resume not in ("auto", "must", "never", config.run_id):
        yield f"run_id={config.run_id!r} and resume={config.resume!r} name two runs; leave run_id empty"
    if config.recovery.min_nodes > launch.nodes >= 1:
        yield (
            f"recovery.min_nodes={config.recovery.min_nodes} must not exceed launch.nodes={launch.nodes}; "
            "the run starts with that many"
        )


def _chaos(config: RunConfig) -> Iterator[str]:
    try:
        parse_all(config.chaos.faults)
    except ConfigurationError as error:
        yield from error.problems
    for entry in config.chaos.faults:
        with contextlib.suppress(ConfigurationError):  # its problems are among those above
            yield from never_happens(parse(entry), config)


def never_happens(fault: ChaosFault, config: RunConfig) -> Iterator[str]:
    """Why an entry that can be read would not strike in a run of this configuration."""
    word = fault.kind.number_key
    bound = {"rank": world(config), "node": config.launch.nodes, "": 1}[word]
    _, highest = (fault.rate.numbers or (0, 0)) if fault.rate else (0, fault.number)
    if highest >= bound:
        yield f"chaos fault '{fault}': {word}={highest} does not exist; {word}s are 0 to {bound - 1}"
    is_inside_a_step = fault.at.startswith("step.")
    last = config.trainer.max_steps - is_inside_a_step  # no step begins when all are finished
    key, step = ("from", fault.rate.first) if fault.rate else ("step", fault.step)
    if step > last:
        yield (
            f"chaos fault '{fault}': {key}={step} is never reached; "
            f"the last one is {last} with trainer.max_steps={config.trainer.max_steps}; "
            "raise that, or inject nothing with 'chaos.faults=[]'"
        )
    if fault.what == "parity" and not config.snapshot.parity:
        yield f"chaos fault '{fault}': there is no parity with snapshot.parity=0"


_PARTS: tuple[Callable[[RunConfig], Iterator[str]], ...] = (
    _single_values,
    _model,
    _optim,
    adapter_problems,
    curriculum_problems,
    _data,
    pipeline_problems,
    stage_repair_problems,
    _batch,
    _snapshots,
    protection_problems,
    _deadlines,
    _launch,
    _chaos,
)


# -- memory -----------------------------------------------------------------------------------------------------------


def state_bytes(config: RunConfig) -> int:
    """Bytes of one snapshot of one rank, to about a percent: fp32 master weights and the optimizer's moments.

    Gradients and low-precision copies of the weights are made anew and never stored. Tensors that are too small for
    8-bit moments are not told apart. Source: arXiv 1910.02054, section 5; with 8 bits a code per element and moment,
    and an fp32 scale per block.
    """
    moment = 1 + 4 / config.optim.block_size if config.optim.name.is_8bit else 4
    moments = moment_count(config.optim) * moment
    shards = replicas_of(config) if config.parallel.zero_stage >= 1 else 1
    best = 4 if config.adapter.keep_best else 0
    return math.ceil(_parameters_of_process(config) * (4 + best + moments) / shards)


def _parameters_of_process(config: RunConfig) -> int:
    """That train, of the one that has most."""
    if config.adapter.method:
        from holdfast.trainer.adapting import trainable_elements

        return 0 if method_problems(config) else trainable_elements(config.adapter, config.model)
    try:
        plan = pipeline_plan(config) if config.parallel.pipeline > 1 else None
    except ConfigurationError:  # reported already
        plan = None
    model = model_of(config.model)
    return model.parameters if plan is None else model.largest_piece(plan)


def _has_no_size(config: RunConfig) -> bool:
    return bool(model_of(config.model).problems())


def keeper_limit_bytes(config: RunConfig, host: Host) -> int:
    """Memory that each keeper may use: what the user allows, else its share of half of what ``host`` has free."""
    if config.snapshot.memory_limit_gb > 0:
        return int(config.snapshot.memory_limit_gb * _GB)
    return host.free_bytes // 2 // (config.launch.nodes if _is_one_host(config, host) else 1)


def _is_one_host(config: RunConfig, host: Host) -> bool:
    return config.launch.kind is LaunchKind.PROCESS or not (config.launch.address or host.ray_address)


def _memory_problems(config: RunConfig, host: Host, frozen: Callable[[RunConfig], Sequence[BrickFile]]) -> list[str]:
    """Refused here, snapshots cannot end a run hours later. On a cluster only the user's own limit is known."""
    if _has_no_size(config) or check_optim(config.optim) or world(config) < 1 or any(protection_problems(config)):
        return []  # reported already
    own, held = math.ceil(state_bytes(config) * _buffers(config)), brick_bytes(config, frozen(config))
    per_node = own * config.launch.workers_per_node + max(held)
    everywhere = own * world(config) + sum(held)
    limit_gb, is_one_host = config.snapshot.memory_limit_gb, _is_one_host(config, host)
    problems = []
    if limit_gb > 0 and per_node > keeper_limit_bytes(config, host):
        problems.append(
            f"snapshot.memory_limit_gb={limit_gb} must be at least {math.ceil(per_node / _GB * 100) / 100}: "
            f"{_need(config, max(held))} take {per_node:,} bytes per node"
        )
    allowed = host.free_bytes if limit_gb > 0 else host.free_bytes // 2
    if is_one_host and everywhere > allowed:
        share = "" if limit_gb > 0 else "half of "
        problems.append(
            f"snapshots need {everywhere:,} bytes of host memory ({_need(config, max(held))} on "
            f"launch.nodes={config.launch.nodes}), and {share}the {host.free_bytes:,} bytes that are free "
            f"{'are' if limit_gb > 0 else 'is'} not enough; {_way_out(config)}"
        )
    return problems


def _bandwidth_problems(config: RunConfig) -> Iterator[str]:
    """A run that is asked to stop must be able to save itself."""
    mb_per_s, grace_s = config.snapshot.persist_mb_per_s, config.recovery.stop_grace_s
    if _has_no_size(config) or check_optim(config.optim) or world(config) < 1 or not 0 < mb_per_s < math.inf:
        return  # reported already, or without a bound
    needed_s = state_bytes(config) * config.launch.workers_per_node / (mb_per_s * 10**6)
    if needed_s > grace_s:
        yield (
            f"snapshot.persist_mb_per_s={mb_per_s} lets a checkpoint take {needed_s:.0f} s, and a run that is asked to "
            f"stop has recovery.stop_grace_s={grace_s}; raise one of them"
        )


def _buffers(config: RunConfig) -> float:
    """Memory for each rank, in buffers. Where the run may go on with fewer nodes there has to be room for the ranks of
    the next smaller world beside those before, what a lost node held included."""
    own, nodes = config.snapshot.buffers + parity_ratio(config), config.launch.nodes
    fewer = next(iter(fewer_nodes(config)), 0)
    if not fewer:
        return own
    growth = nodes / fewer if config.parallel.zero_stage >= 1 else 1.0
    return own * (1 + growth) + (nodes - fewer) / fewer


def _need(config: RunConfig, frozen_bytes: int) -> str:
    fewer = next(iter(fewer_nodes(config)), 0)
    twice = f"; and room to go on with {fewer} nodes (recovery.shrink_after_s)" if fewer else ""
    frozen = f"; and {frozen_bytes:,} bytes per node of frozen files (adapter.in_memory)" if frozen_bytes else ""
    return (
        f"snapshot.buffers={config.snapshot.buffers} of {state_bytes(config):,} bytes, and {parity_ratio(config):.3g} "
        f"more for parity={config.snapshot.parity}, for each of launch.workers_per_node="
        f"{config.launch.workers_per_node} ranks{twice}{frozen}"
    )


def _way_out(config: RunConfig) -> str:
    ways = ["choose a smaller model"]
    if config.parallel.zero_stage == 0 and world(config) > 1:
        ways.append("shard the state with parallel=zero2")
    if not config.optim.name.is_8bit and moment_count(config.optim):
        ways.append(f"keep 8-bit moments with optim={config.optim.name.value}8bit")
    if config.snapshot.buffers > 3:
        ways.append("lower snapshot.buffers to 3")
    if config.adapter.method and config.adapter.in_memory:
        ways.append("leave the frozen files to the storage alone with adapter.in_memory=false")
    if config.snapshot.memory_limit_gb == 0:
        ways.append("set snapshot.memory_limit_gb to use more than half")
    return ", ".join(ways[:-1]) + " or " + ways[-1] if len(ways) > 1 else ways[0]


def _container_free_bytes(cgroup: Path) -> float:
    """What the container's limit leaves, page cache that can be dropped included; infinite without a limit."""
    v1 = cgroup / "memory"
    for limit, used, cache in (
        (cgroup / "memory.max", cgroup / "memory.current", cgroup / "memory.stat"),
        (v1 / "memory.limit_in_bytes", v1 / "memory.usage_in_bytes", v1 / "memory.stat"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file, or the word "max"
            return max(0, int(limit.read_text()) - int(used.read_text()) + _droppable(cache.read_text()))
    return math.inf


def _droppable(memory_stat: str) -> int:
    found = re.search(r"^(?:total_)?inactive_file (\d+)$", memory_stat, re.MULTILINE)
    return int(found[1]) if found else 0
