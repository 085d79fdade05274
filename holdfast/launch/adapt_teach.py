"""Teaching: which runs a curriculum needs, one after the other, and what is kept of each."""

from __future__ import annotations

import copy
import hashlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from holdfast import knobs
from holdfast.configs import validate
from holdfast.configs.plain import to_plain
from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError
from holdfast.launch.adapt_words import matrix
from holdfast.launch.curriculum import Curriculum, Learned, Record
from holdfast.trainer.config import DataSource, ModelKind

__all__ = ["teach"]

_METHOD = "mora"
_ADVICE = "holdfast adapt --help tells more"
_FIXED = ("method", "options", "target_modules", "nf4")
"""Options of the adapters that one curriculum has from its beginning."""


def teach(words: Sequence[str]) -> int:
    """Learn what is not learned yet; print the matrix. The exit code.

    Raises: ConfigurationError with all mistakes; ManifestMismatch for files that are damaged.
    """
    from holdfast.launch import compose
    from holdfast.launch.adapt_directions import refuse_directions
    from holdfast.trainer.adapting import find_bricks

    config = _config(compose.compose_config([_renamed(word) for word in words]))
    domains = _domains(config)
    for domain, path in domains.items():
        validate.refuse_bad(_run_config(config, domain, path))
    refuse_directions(config, len(domains))
    bricks = find_bricks(config.adapter)
    name = config.run_id or f"adapt-{_digest(config, bricks.base)}"
    curriculum = Curriculum(Path(config.root, config.project, name))
    with curriculum.lock():
        record = _opened(curriculum, config, bricks.base, bricks.size_bytes)
        _refuse_other_order(record, list(domains), name)
        config.adapter.base = str(curriculum.keep_base(Path(config.adapter.base), bricks.base))
        return _Lessons(curriculum, config, ("holdfast", "adapt", *words)).learn(record, domains)


# -- what is asked for ------------------------------------------------------------------------------------------------


def _renamed(word: str) -> str:
    return f"adapter.{word}" if word.startswith("domains=") else word


def _config(config: RunConfig) -> RunConfig:
    if config.model.kind is not ModelKind.DECODER or config.data.tokenizer:
        raise ConfigurationError(
            "holdfast adapt teaches the built-in decoder, in bytes; with another model or data.tokenizer teach one "
            "task at a time, with holdfast train adapter.method=…"
        )
    config.root = config.root or str(knobs.home())
    config.adapter.method = config.adapter.method or _METHOD
    config.adapter.base = str(Path(config.adapter.base).expanduser().absolute()) if config.adapter.base else ""
    if config.data.source is DataSource.LOCAL:
        config.data.source = DataSource.TEXT
    return config


def _domains(config: RunConfig) -> dict[str, str]:
    """Paths by name. Raises: ConfigurationError."""
    if not config.adapter.domains:
        raise ConfigurationError(f"domains is empty: name files or directories, domains=[one,two]; {_ADVICE}")
    found, problems = dict[str, str](), list[str]()
    for entry in config.adapter.domains:
        name, _, path = entry.rpartition(":")
        place = Path(path).expanduser().absolute()
        name = name or place.name.partition(".")[0]
        if name in found:
            problems.append(f"domains: {name!r} is there twice; give one another name, domains=[other:{place}]")
        if not place.exists():
            problems.append(f"domains: {place} does not exist")
        found[name] = str(place)
    if problems:
        raise ConfigurationError(problems)
    return found


def _digest(config: RunConfig, base: str) -> str:
    """What makes one curriculum of it."""
    about = {**to_plain(config), "base": base}
    kept = {key: about[key] for key in ("seed", "trainer", "model", "adapter", "optim", "base")}
    kept["model"] = _sizes(config)
    apart = ("base", "in_memory", "router_prompts")  # where things are, and what is trained when all is learned
    kept["adapter"] = {name: value for name, value in dict(about["adapter"]).items() if name not in apart}  # type: ignore[call-overload]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def _sizes(config: RunConfig) -> dict[str, object]:
    """Of the built-in decoder: what its record says, and its name."""
    plain: dict[str, object] = dict(to_plain(config)["model"])  # type: ignore[call-overload]
    return {key: value for key, value in plain.items() if key not in ("kind", "path", "init", "options")}


def _opened(curriculum: Curriculum, config: RunConfig, base: str, base_bytes: int) -> Record:
    """The record that is there, or a new one. Raises: ConfigurationError where it is of something else."""
    plain = to_plain(config)
    adapter = {key: dict(plain["adapter"])[key] for key in _FIXED}  # type: ignore[call-overload]
    if config.adapter.protected_directions:
        adapter["protected_directions"] = config.adapter.protected_directions
    model = _sizes(config)
    new = Record(model=model, adapter=adapter, base=base, base_bytes=base_bytes)
    if not curriculum.exists():
        curriculum.write(new)
        return new
    old = curriculum.record()
    pairs = {"model": (old.model, model), "adapter": (old.adapter, adapter), "base": (old.base, base)}
    if other := [what for what, (theirs, ours) in pairs.items() if theirs != ours]:
        raise ConfigurationError(
            f"curriculum {curriculum.name} was begun with another {', '.join(other)}; another run_id begins a new one"
        )
    return old


def _refuse_other_order(record: Record, domains: list[str], name: str) -> None:
    if domains[: len(record.domains)] != record.domains:
        raise ConfigurationError(
            f"curriculum {name} has learned {record.domains} in this order, and domains={domains} do not begin with "
            "them; another run_id begins a new one"
        )


def _run_config(config: RunConfig, domain: str, path: str) -> RunConfig:
    """Of the run that learns a domain first."""
    ready = copy.deepcopy(config)
    ready.run_id = ""
    ready.data.path, ready.adapter.task, ready.adapter.domains = path, domain, []
    return ready


# -- the runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Lessons:
    """The runs of one curriculum."""

    curriculum: Curriculum
    config: RunConfig
    command: Sequence[str]

    def learn(self, record: Record, domains: Mapping[str, str]) -> int:
        """What of the domains, paths by name, is still to be learned, and a router for them. An exit code."""
        for domain, path in domains.items():
            code, record = self._learn_domain(record, domain, path)
            if code:
                left = f"{domain} with exit code {code}; go on with: {shlex.join(self.command)}"
                sys.stdout.write(f"\n{matrix(record)}\nleft     {left}\n")
                return code
        sys.stdout.write(f"\n{matrix(record)}\n")
        sys.stdout.write(f"{self._route(record)}learned  {self.curriculum.path}\n")
        return 0

    def _learn_domain(self, record: Record, domain: str, path: str) -> tuple[int, Record]:
        """All rounds that are left; an exit code, 0 if the domain is finished."""
        from holdfast.launch.adapt_directions import keep_directions

        rounds = [task for task in record.learned if task.domain == domain]
        while len(rounds) < self.config.adapter.rounds and not any(map(self._is_last, rounds)):
            record = keep_directions(self.curriculum, record, self.config, domain)
            code, learned = self._learn_round(self._round_config(record, domain, path, len(rounds) + 1), domain)
            if learned is None:
                return code, record
            record = self.curriculum.add(record, learned)
            rounds.append(learned)
        return 0, record

    def _is_last(self, task: Learned) -> bool:
        return self._has_rounds and task.gain < self.config.adapter.least_gain

    @property
    def _has_rounds(self) -> bool:
        return self.config.adapter.rounds > 1

    def _round_config(self, record: Record, domain: str, path: str, number: int) -> RunConfig:
        """Of the run that trains the domain's task with this number, on top of all that is kept."""
        ready, directions = _run_config(self.config, domain, path), record.directions.get(domain)
        task = f"{domain}.{number}" if self._has_rounds else domain
        ready.run_id, ready.resume = f"{self.curriculum.name}.{task}", "auto"
        ready.adapter.task = task
        ready.tracker.group = ready.tracker.group or self.curriculum.name
        ready.adapter.tasks = [str(self.curriculum.path / done.directory) for done in record.kept]
        ready.adapter.seen = dict(record.texts(but=domain))
        ready.adapter.directions = str(self.curriculum.brick(directions)) if directions else ""
        return ready

    def _learn_round(self, ready: RunConfig, domain: str) -> tuple[int, Learned | None]:
        """One run. Its exit code and, if that is 0, what it left."""
        from holdfast.adapters.store import read_sidecar
        from holdfast.launch.run import run

        result = run(ready, overrides=(), command=self.command)
        if result.exit_code or "weights" not in result.findings:
            return result.exit_code or 1, None
        found, task = result.findings, ready.adapter.task
        saved = Path(str(found["weights"]))
        sidecar = read_sidecar(saved)
        bits, before = float(str(found["bits_per_byte"])), float(str(found["before_bits_per_byte"]))
        is_kept = not self._has_rounds or bits < before
        return 0, Learned(
            task=task,
            domain=domain,
            text=ready.data.path,
            directory=self.curriculum.keep_task(saved, task, sidecar.digest) if is_kept else "",
            digest=sidecar.digest,
            size_bytes=(saved / sidecar.tensors).stat().st_size,
            base_bits=float(str(found["base_bits_per_byte"])),
            before_bits=before,
            bits={**found["row"], domain: bits},  # type: ignore[dict-item]  # JSON of a worker's answer
        )

    def _route(self, record: Record) -> str:
        """A line about the router that fits the record's tasks, trained if there is none; empty without one."""
        from holdfast.launch.adapt_router import keep_router

        told = keep_router(self.curriculum, record, self.config)
        return f"router   {told}\n" if told else ""
