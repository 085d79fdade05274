"""``holdfast adapt``: teach a frozen model one domain after the other, each in a run of its own."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from holdfast import knobs
from holdfast.configs import validate
from holdfast.configs.plain import to_plain
from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError, ManifestMismatch
from holdfast.launch.adapt_words import curricula_table, matrix
from holdfast.launch.arguments import Parser, add_root
from holdfast.launch.curriculum import Curriculum, Learned, Record, find_curriculum, list_curricula
from holdfast.launch.wording import size
from holdfast.trainer.config import DataSource, ModelKind

__all__ = ["adapt"]

_METHOD = "mora"
_ADVICE = "holdfast adapt --help tells more"


def adapt(words: Sequence[str]) -> int:
    """Carry out the command line ``words``; the exit code. Raises: ConfigurationError with all mistakes."""
    first = words[0] if words else ""
    if first in ("-h", "--help", ""):
        sys.stdout.write(_HELP)
        return 0 if first else 2
    try:
        return _ACTIONS[first](_parser(first).parse_args(list(words[1:]))) if first in _ACTIONS else teach(words)
    except ManifestMismatch as error:  # files that the user can put back
        raise ConfigurationError(str(error)) from error


_HELP = """\
holdfast adapt domains=[PATH,...] adapter.base=FILE [GROUP=OPTION ...] [KEY=VALUE ...]

Teaches a frozen model one domain after the other. Each domain is a file or directory of text, PATH or NAME:PATH, and is
learned by a run of its own, with everything that holdfast train can be told. Then it prints, in bits per byte, what
each domain had become after each. The same words again go on where they were.

  domains=[...]        which domains, in this order; the same as adapter.domains
  adapter.base=FILE    frozen weights, such as <run>/export/model.safetensors, with model=… as in that run
  adapter.method=NAME  how to learn; without it mora. adapter.options.rank=8 and the like are of the method
  adapter.rounds=N     tasks for each domain, each on top of those before it
  run_id=NAME          name of the curriculum; with it, domains can be added behind those that are learned

holdfast adapt --list                what was learned so far, and which methods there are
holdfast adapt route "TEXT"          which domains' tasks serve a text best
holdfast adapt generate "TEXT"       what the model writes, with the tasks that serve the text best
holdfast adapt export --to DIR       base and tasks as one model.safetensors, where the method adds up

Exit codes: as holdfast train.
"""


# -- teaching ---------------------------------------------------------------------------------------------------------


def teach(words: Sequence[str]) -> int:
    """Learn what is not learned yet; print the matrix."""
    from holdfast.launch import compose
    from holdfast.trainer.adapting import find_bricks

    config = _config(compose.compose_config([_renamed(word) for word in words]))
    domains = _domains(config)
    for domain, path in domains.items():
        validate.refuse_bad(_run_config(config, domain, path))
    bricks = find_bricks(config.adapter)
    name = config.run_id or f"adapt-{_digest(config, bricks.base)}"
    curriculum, command = Curriculum(Path(config.root, config.project, name)), ("holdfast", "adapt", *words)
    with curriculum.lock():
        record = _opened(curriculum, config, bricks.base, bricks.size_bytes)
        _refuse_other_order(record, list(domains), name)
        config.adapter.base = str(curriculum.keep_base(Path(config.adapter.base), bricks.base))
        for domain in domains:
            code, record = _learn(curriculum, record, config, domain, command)
            if code:
                left = f"{domain} with exit code {code}; go on with: {shlex.join(command)}"
                sys.stdout.write(f"\n{matrix(record)}\nleft     {left}\n")
                return code
    sys.stdout.write(f"\n{matrix(record)}\nlearned  {curriculum.path}\n")
    return 0


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
    kept["adapter"] = {name: value for name, value in dict(about["adapter"]).items() if name != "base"}  # type: ignore[call-overload]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def _sizes(config: RunConfig) -> dict[str, object]:
    """Of the built-in decoder: what its record says, and its name."""
    plain: dict[str, object] = dict(to_plain(config)["model"])  # type: ignore[call-overload]
    return {key: value for key, value in plain.items() if key not in ("kind", "path", "init", "options")}


def _opened(curriculum: Curriculum, config: RunConfig, base: str, base_bytes: int) -> Record:
    """The record that is there, or a new one. Raises: ConfigurationError where it is of something else."""
    plain = to_plain(config)
    adapter = {key: dict(plain["adapter"])[key] for key in ("method", "options", "target_modules", "nf4")}  # type: ignore[call-overload]
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


def _learn(
    curriculum: Curriculum, record: Record, config: RunConfig, domain: str, command: Sequence[str]
) -> tuple[int, Record]:
    """All rounds of one domain that are still to be learned; an exit code, 0 if it is finished."""
    rounds, has_rounds = [task for task in record.learned if task.domain == domain], config.adapter.rounds > 1
    while len(rounds) < config.adapter.rounds and not any(_is_last(task, config) for task in rounds):
        ready = _round_config(curriculum, record, config, domain, len(rounds) + 1)
        code, learned = _learn_round(curriculum, ready, domain, command, is_kept_anyway=not has_rounds)
        if learned is None:
            return code, record
        record = curriculum.add(record, learned)
        rounds.append(learned)
    return 0, record


def _is_last(task: Learned, config: RunConfig) -> bool:
    return config.adapter.rounds > 1 and task.gain < config.adapter.least_gain


def _learn_round(
    curriculum: Curriculum, ready: RunConfig, domain: str, command: Sequence[str], *, is_kept_anyway: bool
) -> tuple[int, Learned | None]:
    """One run. Its exit code and, if that is 0, what it left."""
    from holdfast.adapters.store import read_sidecar
    from holdfast.launch.run import run

    result = run(ready, overrides=(), command=command)
    if result.exit_code or "weights" not in result.findings:
        return result.exit_code or 1, None
    found, task = result.findings, ready.adapter.task
    saved = Path(str(found["weights"]))
    sidecar = read_sidecar(saved)
    bits, before = float(str(found["bits_per_byte"])), float(str(found["before_bits_per_byte"]))
    return 0, Learned(
        task=task,
        domain=domain,
        text=ready.data.path,
        directory=curriculum.keep_task(saved, task, sidecar.digest) if is_kept_anyway or bits < before else "",
        digest=sidecar.digest,
        size_bytes=(saved / sidecar.tensors).stat().st_size,
        base_bits=float(str(found["base_bits_per_byte"])),
        before_bits=before,
        bits={**found["row"], domain: bits},  # type: ignore[dict-item]  # JSON of a worker's answer
    )


def _round_config(curriculum: Curriculum, record: Record, config: RunConfig, domain: str, number: int) -> RunConfig:
    """Of the run that trains the domain's task with this number, on top of all that is kept."""
    ready = _run_config(config, domain, _domains(config)[domain])
    task = f"{domain}.{number}" if config.adapter.rounds > 1 else domain
    ready.run_id, ready.resume = f"{curriculum.name}.{task}", "auto"
    ready.adapter.task = task
    ready.adapter.tasks = [str(curriculum.path / done.directory) for done in record.kept]
    ready.adapter.seen = {done.domain: done.text for done in record.learned if done.domain != domain}
    return ready


def _run_config(config: RunConfig, domain: str, path: str) -> RunConfig:
    """Of the run that learns a domain first."""
    ready = copy.deepcopy(config)
    ready.run_id = ""
    ready.data.path, ready.adapter.task, ready.adapter.domains = path, domain, []
    return ready


# -- looking at what was learned --------------------------------------------------------------------------------------


def _parser(action: str) -> Parser:
    parser = Parser(prog=f"holdfast adapt {action}", allow_abbrev=False)
    add_root(parser)
    if action == "--list":
        return parser
    parser.add_argument("--run", metavar="NAME", help="name or directory of the curriculum; the newest if left out")
    if action == "export":
        parser.add_argument("--to", required=True, metavar="DIR", help="folder of the file, made if it does not exist")
        parser.add_argument("--first", type=int, metavar="N", help="the first N tasks instead of all")
        return parser
    parser.add_argument("text", metavar="TEXT", help="what is written so far")
    if action == "generate":
        parser.add_argument("--task", metavar="NAME", help="let only this task act, instead of those that serve best")
        parser.add_argument("--first", type=int, metavar="N", help="let the first N tasks act, 0 for the bare base")
        parser.add_argument("--bytes", type=int, default=200, metavar="N", help="how much to write (200)")
        parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 takes the likeliest (0.8)")
        parser.add_argument("--seed", type=int, default=0, metavar="N")
    return parser


def _root(args: argparse.Namespace) -> Path:
    return Path(args.root).expanduser().absolute() if args.root else knobs.home()


def _list(args: argparse.Namespace) -> int:
    from holdfast.adapters.registry import method_names

    found = list_curricula(_root(args))
    sys.stdout.write("".join(f"{line}\n" for line in _listing(found)))
    sys.stdout.write(f"methods  {', '.join(method_names())}\n")
    return 0


def _listing(found: Sequence[Curriculum]) -> Iterator[str]:
    if not found:
        yield "nothing was learned so far"
    for curriculum in found:
        yield curricula_table(curriculum, curriculum.record())


def _route(args: argparse.Namespace) -> int:
    from holdfast.launch.adapt_prompt import Prompted

    prompted = Prompted(find_curriculum(args.run, _root(args)))
    sys.stdout.write(prompted.routes(args.text))
    return 0


def _generate(args: argparse.Namespace) -> int:
    from holdfast.launch.adapt_prompt import Prompted

    prompted = Prompted(find_curriculum(args.run, _root(args)))
    sys.stdout.write(
        prompted.write(
            args.text, task=args.task, first=args.first, n=args.bytes, temperature=args.temperature, seed=args.seed
        )
    )
    return 0


def _export(args: argparse.Namespace) -> int:
    from holdfast.launch.adapt_prompt import Prompted

    path = Path(args.to).expanduser().absolute() / "model.safetensors"
    size_bytes = Prompted(find_curriculum(args.run, _root(args))).export(path, first=args.first)
    sys.stdout.write(f"{path}  {size(size_bytes)}\n")
    return 0


_ACTIONS: dict[str, Callable[[argparse.Namespace], int]] = {
    "--list": _list,
    "route": _route,
    "generate": _generate,
    "export": _export,
}
