"""One attempt of a run: from configuration, directory and material to everything that its conductor is made of."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from holdfast import knobs
from holdfast.clock import SystemClock
from holdfast.configs import layout as layouts
from holdfast.configs.host import this_host
from holdfast.configs.memory import keeper_limit_bytes
from holdfast.configs.plain import to_plain
from holdfast.configs.protection import parity_ratio, protection_groups
from holdfast.configs.schema import RunConfig
from holdfast.events import EventSink, Protection
from holdfast.fault_tolerance.bricks import Brick, deal_bricks, groups_of, held_bytes
from holdfast.fault_tolerance.lanes import make_lanes
from holdfast.fault_tolerance.machine import Layout, Supervisor
from holdfast.fault_tolerance.protection import REDUCED
from holdfast.launch import identity
from holdfast.launch.conductor import Conductor
from holdfast.launch.crew import ProcessSpecs
from holdfast.launch.durable import DurableTier
from holdfast.launch.fleet import Fleet
from holdfast.launch.material import Material
from holdfast.launch.resume import checkpoints_uri
from holdfast.launch.run_dir import RunDir
from holdfast.launch.sinks import Sinks
from holdfast.trainer import corpus

__all__ = ["Attempt", "begin"]


def begin(
    config: RunConfig,
    run_dir: RunDir,
    material: Material,
    digest: str,
    overrides: Sequence[str],
    command: Sequence[str],
) -> Attempt:
    """Note in the run's directory that there is another attempt. Raises: SnapshotError if its record cannot be read."""
    ray_job, before = knobs.ray_job(), run_dir.record()["attempts"]
    number = run_dir.begin_attempt(
        config=to_plain(config),
        overrides=overrides,
        command=command,
        versions=identity.versions(),
        git=identity.git_commit(Path.cwd()),
        ray_job=ray_job.submission_id if ray_job else None,
        data=corpus.describe(material.store),
    )
    return Attempt(
        config=config,
        run_dir=run_dir,
        number=number,
        material=material,
        digest=digest,
        overrides=overrides,
        command=command,
        is_after_death=bool(before) and before[-1]["ended"] is None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """What it is made of, and what has started it."""

    config: RunConfig
    run_dir: RunDir
    number: int
    """From 1."""
    material: Material
    digest: str
    """Of the run, see :func:`holdfast.launch.material.run_digest`."""
    overrides: Sequence[str]
    command: Sequence[str]
    is_after_death: bool
    """The driver before this one has died."""

    @property
    def tag(self) -> str:
        """Distinguishes its processes from those of other attempts."""
        return self._tag(self.number)

    @property
    def tag_before(self) -> str:
        """Of the attempt before."""
        return self._tag(self.number - 1)

    def _tag(self, number: int) -> str:
        return f"{self.run_dir.run_id[-48:]}-a{number}"

    def durable(self, events: EventSink) -> DurableTier:
        """Its checkpoints, those of earlier attempts included."""
        config, world = self.config, layouts.world(self.config)
        return DurableTier(
            checkpoints_uri(config, self.run_dir),
            config.snapshot,
            world=world,
            config_digest=self.digest,
            events=events,
            layout=identity.layout(config.parallel, world=world),
        )

    def conductor(self, fleet: Fleet, sinks: Sinks) -> Conductor:
        """What drives the processes of ``fleet`` and tells ``sinks`` about it."""
        config, clock = self.config, SystemClock()
        layout = self._layout(fleet, sinks)
        bricks = self._bricks(layout)
        return Conductor(
            config,
            fleet=fleet,
            supervisor=Supervisor(layout, config.recovery, now=clock.now()),
            layout=layout,
            specs=self._specs(bricks),
            durable=self.durable(sinks),
            run_dir=self.run_dir.path,
            events=sinks,
            on_step=sinks.step,
            clock=clock,
            bricks=[brick for brick in bricks.values() if brick.nodes],
        )

    def _bricks(self, layout: Layout) -> Mapping[str, Brick]:
        """What is frozen by its digest, and who holds it."""
        files, config = self.material.frozen, self.config
        if not config.adapter.in_memory:
            return {file.digest: Brick(file) for file in files}
        dealt = deal_bricks(files, groups_of(layout.lanes, config.launch.workers_per_node))
        return {brick.file.digest: brick for brick in dealt}

    def _layout(self, fleet: Fleet, events: EventSink) -> Layout:
        """Where everything goes; says what nodes that protect each other have in common."""
        config = self.config
        zones = config.launch.zones or fleet.zones(config.launch.nodes)
        grouping = protection_groups(config, zones)
        for warning in grouping.warnings:
            events.emit(Protection(REDUCED, warning))
        return Layout(
            nodes=config.launch.nodes,
            workers_per_node=config.launch.workers_per_node,
            spares=config.launch.spares,
            hosts=tuple(fleet.hosts(config.launch.nodes)),
            lanes=make_lanes(grouping.groups, config.launch.workers_per_node, grouping.parity),
            zones=tuple(zones),
            group_size=config.snapshot.group_size,
            parity=config.snapshot.parity,
            stages=layouts.stage_facts(config),
            replicas_every=layouts.replicas_every(config.parallel),
            batch_parts=config.trainer.global_batch // config.trainer.micro_batch,
        )

    def _specs(self, bricks: Mapping[str, Brick]) -> ProcessSpecs:
        config = self.config
        frozen = max(held_bytes(list(bricks.values()), node) for node in range(config.launch.nodes))
        return ProcessSpecs(
            worker={
                "config": to_plain(config),
                "run_dir": str(self.run_dir.path),
                "attempt": self.number,
                "store": str(self.material.store.path),
                "seen": {name: str(store.path) for name, store in self.material.seen.items()},
                "bricks": [asdict(replace(bricks[file.digest], file=file)) for file in self.material.frozen],
                "config_digest": self.digest,
            },
            keeper={
                "run_tag": self.tag,
                "limit_bytes": max(keeper_limit_bytes(config, this_host()) - frozen, 0),
                "buffers": config.snapshot.buffers,
                "lease_s": config.recovery.lease_s,
                "token": secrets.token_hex(16),
                "parity_ratio": parity_ratio(config),
                "persist_mb_per_s": config.snapshot.persist_mb_per_s,
            },
        )
