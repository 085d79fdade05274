"""Whether this version of Holdfast can continue a run, and from where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from holdfast.configs.plain import to_plain
from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError, SnapshotError
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.storage import open_storage
from holdfast.launch.find_run import find_run
from holdfast.launch.finding import BAD, OK, WARN, Finding
from holdfast.launch.identity import config_digest, versions
from holdfast.launch.records import nested, read_yaml
from holdfast.launch.resume import checkpoints_uri
from holdfast.launch.run_dir import Record, RunDir

__all__ = ["run_checks"]

_WHERE = frozenset({"root", "project", "run_id", "resume"})
"""Options that find a run and say nothing of what it is."""


def run_checks(name: str, config: RunConfig, overrides: Sequence[str]) -> Iterator[Finding]:
    """``name``: the run's id or directory. Its options are judged if ``overrides`` give any."""
    try:
        run = find_run(name, config.root)
        record = run.record()
    except ConfigurationError as error:
        yield from (Finding(BAD, "run", problem) for problem in error.problems)
        return
    yield _state(run, record)
    yield from _writers(record)
    if any(word.partition("=")[0] not in _WHERE for word in overrides):
        yield _options(run, config)
    yield from _checkpoints(run, config)


def _state(run: RunDir, record: Record) -> Finding:
    driver, ended = run.driver(), record["ended"]
    if driver is not None:
        return Finding(
            WARN, "run", f"{run.run_id} is driven by {driver}; it must end before another driver can take it"
        )
    if ended is None:
        return Finding(
            OK, "run", f"{run.run_id}: its last driver has died without a word" if record["attempts"] else run.run_id
        )
    return Finding(
        OK, "run", f"{run.run_id} {ended['outcome']} at step {ended['step']} (exit code {ended['exit_code']})"
    )


def _writers(record: Record) -> Iterator[Finding]:
    if not record["attempts"]:
        return
    theirs, ours = record["attempts"][-1].get("versions", {}), versions()
    other = [
        f"{name} {theirs[name]} (here {ours.get(name, 'none')})" for name in theirs if theirs[name] != ours.get(name)
    ]
    if other:
        text = f"last driven by {', '.join(other)}; it continues, and sums may round differently"
        yield Finding(WARN, "versions", text)
    else:
        yield Finding(OK, "versions", "those of its last attempt")


def _options(run: RunDir, config: RunConfig) -> Finding:
    if config_digest(nested(read_yaml(run.config_file))) == config_digest(to_plain(config)):
        return Finding(OK, "same run", "these options mean this run, if the text is the same")
    return Finding(
        BAD,
        "same run",
        f"these options have another model, data, optimizer, batch, seed or precision than {run.config_file}; "
        "give the same again, or start another run",
    )


def _checkpoints(run: RunDir, config: RunConfig) -> Iterator[Finding]:
    uri = checkpoints_uri(config, run)
    try:
        good, rejected = checkpoint.list_checkpoints(open_storage(uri))
    except SnapshotError as error:
        yield Finding(BAD, "resume", f"{uri} cannot be read: {error}")
        return
    for refused in rejected:
        yield Finding(WARN, "checkpoint", f"{refused.name} is refused: {refused.reason}; older ones are used")
    if good:
        newest = good[0]
        yield Finding(OK, "resume", f"continues from step {newest.step:,} of {len(good)} checkpoints in {uri}")
    elif rejected:
        yield Finding(
            BAD, "resume", f"none of the {len(rejected)} checkpoints in {uri} can be used, and nothing is begun anew"
        )
    else:
        yield Finding(WARN, "resume", f"no checkpoint in {uri}: begins anew; see snapshot.persist_every_steps")
