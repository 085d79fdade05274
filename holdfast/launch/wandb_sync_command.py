"""``holdfast wandb-sync``: replays the files of a run to W&B. Loads no torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import cast

from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.storage_uri import below
from holdfast.launch import identity
from holdfast.launch.arguments import Parser, add_root
from holdfast.launch.find_run import find_run
from holdfast.launch.records import read_yaml
from holdfast.launch.run_dir import RunDir
from holdfast.launch.wandb_replay import ReplayFailed, Sent, folder, live_pieces, replay
from holdfast.trainer.config import WandbMode
from holdfast.trainer.trackers import WandbPlan, wandb_mode
from holdfast.trainer.trackers.plans import OFFLINE

__all__ = ["wandb_sync"]

_FAILED = 1
_INIT_TIMEOUT_S = 90.0


def wandb_sync(words: Sequence[str]) -> int:
    """Carry out the command line ``words``; the exit code: 1 if W&B did not take it. Raises: ConfigurationError."""
    args = _parser().parse_args(list(words))
    run = find_run(args.run, args.root)
    plan = _plan(run, args)
    _refuse_known(run, plan)
    try:
        sent = replay(run, plan)
    except ReplayFailed as error:
        sys.stderr.write(f"error: {error}\n")
        return _FAILED
    sys.stdout.write("".join(f"{line}\n" for line in _told(run, plan, sent)))
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="holdfast wandb-sync",
        allow_abbrev=False,
        description="Replays metrics.jsonl and events.jsonl of a run to W&B: one W&B run of all its attempts. Said "
        "again, it sends what is new.",
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="id or directory of a run; the newest if left out")
    parser.add_argument(
        "--mode",
        choices=[mode.value for mode in WandbMode],
        default=WandbMode.AUTO.value,
        help="offline writes a directory for `wandb sync`; auto is online with WANDB_API_KEY and offline without",
    )
    parser.add_argument("--id", metavar="ID", help="of the W&B run, if not the run's own")
    parser.add_argument("--project", metavar="NAME", help="of W&B, if not the run's own")
    parser.add_argument("--entity", metavar="NAME", help="of W&B, if not the run's own or the account's default")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds that uploads may take (600)")
    add_root(parser)
    return parser


def _plan(run: RunDir, args: argparse.Namespace) -> WandbPlan:
    if not 0 < args.timeout < float("inf"):
        raise ConfigurationError(f"--timeout={args.timeout:g} must be a positive number of seconds")
    config, record = read_yaml(run.config_file), run.record()
    storage, project = str(config.get("snapshot.storage") or ""), str(record["project"])
    overrides = [word for attempt in record["attempts"] for word in attempt.get("overrides", ())]
    return WandbPlan(
        run_id=args.id or run.run_id,
        project=args.project or project,
        entity=args.entity or str(config.get("tracker.entity") or "") or None,
        group=str(config.get("tracker.group") or identity.experiment(overrides)) or None,
        job_type="chaos" if config.get("chaos.faults") else "train",
        directory=str(run.path),
        checkpoints=below(storage, project, run.run_id) if storage else str(run.checkpoints),
        writes_to=str(folder(run)),
        config=_nested(config),
        mode=wandb_mode(WandbMode(args.mode)),
        must_arrive=True,
        init_timeout_s=_INIT_TIMEOUT_S,
        finish_timeout_s=args.timeout,
    )


def _nested(flat: Mapping[str, object]) -> dict[str, object]:
    nested: dict[str, object] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        place = nested
        for section in sections:
            place = cast("dict[str, object]", place.setdefault(section, {}))
        place[name] = value
    return nested


def _refuse_known(run: RunDir, plan: WandbPlan) -> None:
    """What W&B has had while the run went on, it would have twice."""
    known = live_pieces(run, is_online=True)
    if known and plan.run_id == run.run_id:
        raise ConfigurationError(
            f"W&B has followed {run.run_id} online ({known[0].name}), so a replay would show its steps twice; "
            f"--id {run.run_id}-replay makes another W&B run of it"
        )


def _told(run: RunDir, plan: WandbPlan, sent: Sent) -> list[str]:
    where = f"{plan.project}/{plan.run_id}"
    if not sent.attempts:
        return [f"nothing new for {where}"]
    attempts = f"{len(sent.attempts)} attempt{'s' if len(sent.attempts) > 1 else ''}"
    lines = [f"sent {sent.steps:,} steps and {sent.events:,} events of {attempts} to {where}"]
    lines += [f"but W&B refused a record, and maybe more: {why}" for why in sent.refused]
    if plan.mode == OFFLINE:
        (piece,) = sorted((folder(run) / "wandb").glob(f"offline-run-*-{plan.run_id}"))
        lines.append(f"upload it with: wandb sync {piece}")
        if live_pieces(run, is_online=False):
            lines.append(f"it holds what the pieces of each attempt in {run.path / 'wandb'} hold; leave those out")
    return lines
