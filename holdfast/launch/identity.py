"""What a run is called, what it is made of, and when two configurations belong to the same run."""

from __future__ import annotations

import hashlib
import json
import platform
import random
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from holdfast import __version__
from holdfast.parallel.config import ParallelConfig

__all__ = ["FREE_KEYS", "config_digest", "experiment", "git_commit", "layout", "new_run_id", "versions"]

_ADJECTIVES = (
    "agile amber azure bold brave breezy bright brisk calm candid cheery clear clever coral cosy crisp "
    "daring deep eager early fair fleet fond frosty gentle glad golden grand hale happy hardy humble "
    "jolly keen kind late light lively lucid lucky mellow merry mild neat nimble noble patient plain "
    "proud quick quiet rapid ready rosy sharp silent silver smooth snug stout sunny swift tidy young"
).split()
_NOUNS = (
    "abalone anchor auk barnacle bay beacon bream brine buoy clam cliff cod conch cormorant cove crab "
    "current dolphin dune eel eider fjord gannet grebe gull haddock harbor heron herring island kelp krill "
    "lagoon lantern limpet lobster mackerel marlin marsh mussel narwhal nautilus otter oyster pebble pelican petrel "
    "plover puffin ray reef sail seal shoal shrimp skua sponge squid tern tide trout turtle urchin walrus"
).split()

FREE_KEYS: Mapping[str, str] = {
    "project": "where the run is kept, not what it computes",
    "root": "where the run is kept, not what it computes",
    "run_id": "where the run is kept, not what it computes",
    "resume": "how this start looks for the run",
    "trainer.max_steps": "a finished run may be given a farther goal",
    "trainer.log_every": "what is shown",
    "trainer.nonfinite": "what happens to steps that cannot be made",
    "trainer.max_nonfinite": "what happens to steps that cannot be made",
    "trainer.eval_every": "evaluation changes no state",
    "trainer.eval_windows": "evaluation changes no state",
    "trainer.generate_bytes": "what is shown",
    "trainer.prompt": "what is shown",
    "adapter.base": "where the frozen weights are; they have a digest of their own",
    "adapter.tasks": "where the finished tasks are; each has a digest of its own",
    "adapter.in_memory": "where copies of the frozen files are",
    "adapter.seen": "evaluation changes no state",
    "adapter.directions": "where they are; the file has a digest of its own",
    "adapter.protected_directions": "how the file of directions is made",
    "adapter.router_prompts": "what is trained when all tasks are",
    "adapter.rounds": "how many tasks come after this one",
    "adapter.least_gain": "how many tasks come after this one",
    "adapter.domains": "which tasks come before and after this one",
    "data.cache": "where the tokens are kept; the text itself has a digest of its own",
    "model.name": "a label",
    "model.path": "where the model is; what it is has a digest of its own",
    "data.tokenizer": "where the tokenizer is; the text has a digest of its own",
    "data.split": "the text has a digest of its own",
    "trainer.micro_batch": "in how many passes a rank sees its share of the global batch; the samples stay the same",
    "parallel.zero_stage": "where state lives, not what it is; a checkpoint is read in any layout",
    "parallel.pipeline": "where layers live",
    "parallel.schedule": "in which order microbatches take turns; the sums are the same",
    "parallel.chunks": "where layers live",
    "parallel.blocks": "where layers live",
    "parallel.collective_timeout_s": "a deadline",
    "launch": "processes; a checkpoint is read by any number of ranks",
    "recovery": "deadlines and budgets",
    "snapshot": "how often and where state is copied",
    "tracker": "who watches",
    "chaos": "faults leave no trace in the result",
}
"""Keys and sections that may change from one attempt of a run to the next, each with the reason."""


_LATER: Mapping[str, object] = {"model.kind": "DECODER", "model.init": "FRESH"}
"""Keys that older runs did not have, with the value that means what these did: they say nothing then."""


def config_digest(plain: Mapping[str, object]) -> str:
    """128 bits of everything in a plain configuration that decides what is computed: all but :data:`FREE_KEYS`."""
    fixed = dict(sorted(_fixed(plain, "")))
    return hashlib.sha256(json.dumps(fixed).encode()).hexdigest()[:32]


def _fixed(section: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for name, value in section.items():
        key = prefix + name
        if key in FREE_KEYS or (key in _LATER and value == _LATER[key]):
            continue
        if isinstance(value, Mapping):
            yield from _fixed(value, f"{key}.")
        else:
            yield key, value


def layout(parallel: ParallelConfig, *, world: int) -> str:
    """How the state is divided among ranks, in the words of a checkpoint's record."""
    ranks = f"{world} {'rank' if world == 1 else 'ranks'}, ZeRO stage {parallel.zero_stage}"
    if parallel.pipeline == 1:
        return ranks
    blocks = f" of {'+'.join(map(str, parallel.blocks))} blocks" if parallel.blocks else ""
    swapped = ", swapped" if parallel.swapped else ""
    return f"{ranks}, pipeline of {parallel.pipeline} x {parallel.chunks}{blocks}{swapped}"


def new_run_id(now: datetime | None = None, rng: random.Random | None = None) -> str:
    """A name that sorts by time of creation (UTC) and can be said aloud: ``20261123-231204-brisk-otter-7f3a``."""
    now = (now or datetime.now(timezone.utc)).astimezone(timezone.utc)
    rng = rng or random.SystemRandom()  # not the seeded generator: two runs with one seed are two runs
    words = f"{rng.choice(_ADJECTIVES)}-{rng.choice(_NOUNS)}"
    return f"{now:%Y%m%d-%H%M%S}-{words}-{rng.randrange(16**4):04x}"


def versions() -> dict[str, str]:
    """Versions of Python, Holdfast and what decides about its numbers, without importing any of it."""
    found = {"holdfast": __version__, "python": platform.python_version()}
    for package in ("torch", "deepspeed", "ray", "numpy", "pyarrow"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def experiment(overrides: Sequence[str]) -> str:
    """What the user calls it: the value of ``experiment=``, empty without one."""
    return next((word.partition("=")[2] for word in overrides if word.startswith("experiment=")), "")


def git_commit(directory: Path) -> str | None:
    """Commit of the working tree around ``directory``, ``-dirty`` behind it if files were changed; None outside."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=5.0, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
