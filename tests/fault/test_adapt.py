"""Adapter runs that lose workers in the middle of a domain, and whole curricula that are interrupted."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from holdfast import adapters
from holdfast.configs.schema import RunConfig
from holdfast.events import Event, FaultDetected
from holdfast.fault_tolerance.manifest import Manifest
from holdfast.launch import compose
from holdfast.launch.cli import main
from holdfast.launch.curriculum import Curriculum
from holdfast.launch.run import Result, train
from holdfast.launch.sinks import Sinks
from holdfast.optim.config import OptimName
from holdfast.trainer.adapting import adapted_base
from holdfast.trainer.config import AdapterConfig, DataSource, ModelConfig
from holdfast.trainer.data import Batches
from holdfast.trainer.model import Decoder, initialise
from holdfast.types import Precision
from tests.support.drivers import records
from tests.support.runs import events_of, tiny_config, write_corpus

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights forget and learn as well as trained ones."""
    from holdfast.trainer.export import export_weights

    config = tiny_config(Path("/"), Path("/")).model
    model = Decoder(config)
    initialise(model, 7)
    path = tmp_path_factory.mktemp("base") / "model.safetensors"
    export_weights(dict(model.named_parameters()), path, metadata={})
    return path


def _config(root: Path, corpus: Path, base: Path, method: str, options: dict[str, Any], *faults: str) -> RunConfig:
    config = tiny_config(root, corpus, faults=faults, steps=8, nodes=2, spares=1)
    nf4 = bool(options.get("nf4"))
    options = {name: value for name, value in options.items() if name != "nf4"}
    config.adapter = AdapterConfig(method=method, options=options, base=str(base), task="one", nf4=nf4)
    config.parallel.precision = Precision.BF16 if nf4 else Precision.FP32
    config.optim.name = OptimName.ADAMW8BIT
    config.data.cache = str(corpus.with_name("cache"))
    return config


def _finished_task(root: Path, corpus: Path, base: Path, method: str, options: dict[str, Any]) -> str:
    done = train(_config(root, corpus, base, method, options))
    assert done.exit_code == 0
    return str(done.findings["weights"])


def _losses(result: Result) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(result.run_dir / "metrics.jsonl") if "loss" in record}


def _files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*.*"))}


def _state(result: Result) -> dict[str, bytes]:
    """Every stored byte of state. Manifests tell epochs too."""
    last = max((result.run_dir / "checkpoints").glob("step-*"))
    return {path.name: path.read_bytes() for path in last.glob("rank*.bin")}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        pytest.param("mora", {"rank": 4, "top_k": 6}, id="competing atoms"),
        pytest.param("brainstacks", {"rank": 2}, id="random routing", marks=pytest.mark.slow),
        pytest.param("mora", {"rank": 4, "nf4": True}, id="bf16 on 4 bits", marks=pytest.mark.slow),
    ],
)
def test_a_worker_killed_in_the_middle_of_the_second_domain_changes_no_bit(
    method: str, options: dict[str, Any], tmp_path: Path, corpus: Path, base: Path
) -> None:
    first = _finished_task(tmp_path / "first", corpus, base, method, options)
    frozen = _files(base.parent) | _files(Path(first))
    calm, struck = (
        _config(tmp_path / name, corpus, base, method, options, *faults)
        for name, faults in (("calm", ()), ("struck", ("sigkill rank=1 step=5",)))
    )
    for config in (calm, struck):
        config.adapter.tasks, config.adapter.task, config.adapter.seen = [first], "two", {"one": str(corpus)}
    expected, found = train(calm), train(struck)
    assert (expected.exit_code, found.exit_code) == (0, 0)
    assert len(events_of(found.run_dir, "fault_detected")) == 1
    assert _losses(found) == _losses(expected)
    assert _state(found) == _state(expected)
    assert _files(Path(str(found.findings["weights"]))) == _files(Path(str(expected.findings["weights"])))
    keys = ("bits_per_byte", "row", "before_bits_per_byte", "base_bits_per_byte", "text")
    assert [found.findings[key] for key in keys] == [expected.findings[key] for key in keys]
    assert _files(base.parent) | _files(Path(first)) == frozen


def test_a_snapshot_holds_the_task_its_moments_and_nothing_that_is_frozen(
    tmp_path: Path, corpus: Path, base: Path
) -> None:
    first = _finished_task(tmp_path / "first", corpus, base, "mora", {"rank": 4})
    config = _config(tmp_path / "second", corpus, base, "mora", {"rank": 4})
    config.adapter.tasks, config.adapter.task = [first], "two"
    result = train(config)
    folder = max((result.run_dir / "checkpoints").glob("step-*"))
    manifests = [Manifest.from_bytes(path.read_bytes()) for path in sorted(folder.glob("rank*.manifest.arrow"))]
    names = {entry.spec.name for manifest in manifests for entry in manifest.entries}
    assert names
    assert all(".current." in name or name.startswith("rng/") for name in names)
    widths = {"wq": (64, 64), "wk": (64, 32), "wv": (64, 32), "wo": (64, 64)}
    widths |= {"w_gate": (64, 128), "w_up": (64, 128), "w_down": (128, 64)}
    elements = 2 * 4 * sum(sum(pair) for pair in widths.values())
    master = sum(e.length for m in manifests for e in m.entries if e.spec.name.endswith("/master"))
    assert master == 4 * elements


# -- frozen files that go away ----------------------------------------------------------------------------------------


def _delete(path: Path) -> None:
    path.unlink()


def _flip_one_bit(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def _lost_with_a_fault(
    monkeypatch: pytest.MonkeyPatch, config: RunConfig, harm: Callable[[Path], None], paths: Sequence[Path]
) -> Result:
    """The run, whose files are harmed when a fault is detected and before anybody has come back from it."""
    emit = Sinks.emit

    def harmful(sinks: Sinks, event: Event) -> None:
        if isinstance(event, FaultDetected):
            for path in paths:
                harm(path)
        emit(sinks, event)

    with monkeypatch.context() as patched:
        patched.setattr(Sinks, "emit", harmful)
        return train(config)


def _own_copy(base: Path, root: Path) -> Path:
    root.mkdir()
    return Path(shutil.copy(base, root / "model.safetensors"))


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, corpus: Path, base: Path) -> Result:
    return train(_config(tmp_path_factory.mktemp("calm"), corpus, base, "mora", {"rank": 4}))


@pytest.mark.parametrize("harm", [_delete, _flip_one_bit])
def test_a_base_that_is_lost_or_damaged_in_the_middle_of_a_run_comes_back_from_the_keepers(
    harm: Callable[[Path], None],
    tmp_path: Path,
    corpus: Path,
    base: Path,
    calm: Result,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = _own_copy(base, tmp_path / "own")
    config = _config(tmp_path / "struck", corpus, own, "mora", {"rank": 4}, "sigkill rank=1 step=5")
    found = _lost_with_a_fault(monkeypatch, config, harm, [own])
    assert (calm.exit_code, found.exit_code) == (0, 0)
    assert len(events_of(found.run_dir, "fault_detected")) == 1
    assert _losses(found) == _losses(calm)
    assert _state(found) == _state(calm)
    assert found.findings["text"] == calm.findings["text"]
    restored = events_of(found.run_dir, "bricks_restored")
    assert {event["rank"] for event in restored} == {0, 1}
    assert {(*event["files"], event["bytes"]) for event in restored} == {(str(own), base.stat().st_size)}
    assert harm is _delete or own.read_bytes() != base.read_bytes()  # what the user has is left as it is


@pytest.mark.slow
def test_a_node_that_is_lost_together_with_all_frozen_files_gets_its_pieces_back_from_the_others(
    tmp_path: Path, corpus: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = _own_copy(base, tmp_path / "own")
    first = Path(_finished_task(tmp_path / "first", corpus, own, "mora", {"rank": 4}))
    files = [own, first / "adapter.json", *first.glob("*.safetensors")]
    sizes = [path.stat().st_size for path in files]
    configs = []
    for name, faults in (("calm", ()), ("struck", ("node_sigkill node=1 step=5",))):
        config = _config(tmp_path / name, corpus, own, "mora", {"rank": 4}, *faults)
        config.launch.nodes, config.trainer.global_batch, config.trainer.eval_windows = 3, 12, 6
        config.adapter.tasks, config.adapter.task = [str(first)], "two"
        configs.append(config)
    expected, found = train(configs[0]), _lost_with_a_fault(monkeypatch, configs[1], _delete, files)
    assert (expected.exit_code, found.exit_code) == (0, 0)
    assert (_losses(found), _state(found)) == (_losses(expected), _state(expected))
    assert not any(path.exists() for path in files)
    before, after = events_of(found.run_dir, "bricks_held")
    pieces = [-(-size // 2) for size in sizes]  # three nodes, one of which may be lost
    assert sum(before["held"].values()) == sum(sizes) + sum(pieces)
    assert (before["read"], before["sent"], before["coded"]) == (sum(sizes), sum(sizes), sum(pieces))
    assert after["held"] == before["held"]
    assert after["coded"] == before["coded"] + after["held"]["1"]
    restored = events_of(found.run_dir, "bricks_restored")
    assert {event["rank"] for event in restored} == {0, 1, 2}
    assert all(event["files"].keys() == set(map(str, files)) for event in restored)


@pytest.mark.slow
def test_a_run_that_was_stopped_behind_its_last_step_is_evaluated_with_what_it_learned(
    tmp_path: Path, corpus: Path, base: Path
) -> None:
    """Its new process has never trained the task that it evaluates."""
    calm = train(_config(tmp_path / "calm", corpus, base, "mora", {"rank": 4}))
    config = _config(tmp_path / "late", corpus, base, "mora", {"rank": 4}, "sigkill rank=0 step=8 at=export.begin")
    late = train(config)
    assert (calm.exit_code, late.exit_code) == (0, 0)
    assert len(events_of(late.run_dir, "fault_detected")) == 1
    assert late.findings["bits_per_byte"] == calm.findings["bits_per_byte"]
    assert calm.findings["bits_per_byte"] != calm.findings["base_bits_per_byte"]


# -- holdfast adapt ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class School:
    """A curriculum of two domains that was interrupted twice."""

    words: list[str]
    curriculum: Curriculum
    texts: dict[str, str]
    codes: list[int]
    told: list[str]


def _adapt(*words: str) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as told:
        code = main(["adapt", *words])
    return code, told.getvalue()


def _words(root: Path, corpus: Path, base: Path) -> list[str]:
    (root / "sums").mkdir()
    for number in range(12):
        lines = [f"{a} + {number} = {a + number}" for a in range(120)]
        (root / "sums" / f"{number}.txt").write_text("\n".join(lines))
    model = "d_model=64 n_layers=2 n_heads=2 n_kv_heads=1 d_ff=128 max_seq_len=64".split()
    run = "max_steps=30 global_batch=4 micro_batch=2 eval_windows=8 generate_bytes=8".split()
    return [
        f"domains=[{root / 'sums'},lines:{corpus}]",
        f"adapter.base={base}",
        f"root={root / 'runs'}",
        *("launch=process", "launch.nodes=2", "launch.spares=0", "data.seq_len=32", "optim.lr=3e-3", "run_id=school"),
        *("adapter.options.rank=4", "data.validation_share=0.2"),
        *(f"model.{word}" for word in model),
        *(f"trainer.{word}" for word in run),
    ]


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory, corpus: Path, base: Path) -> School:
    """Stopped in its first domain, and killed when that was finished and not noted."""
    root = tmp_path_factory.mktemp("school")
    words, curriculum = _words(root, corpus, base), Curriculum(root / "runs" / "holdfast" / "school")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    calls = [_adapt(*words, "chaos.faults=['driver_sigterm step=2']")]
    assert curriculum.record().learned == []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Curriculum, "add", killed)
        calls.append(_adapt(*words))
    assert curriculum.record().learned == []
    calls.append(_adapt(*words))
    texts = {"sums": str(root / "sums"), "lines": str(corpus)}
    return School(words, curriculum, texts, [code for code, _ in calls], [told for _, told in calls])


def _offline_bits(curriculum: Curriculum, text: str, words: list[str], first: int) -> float:
    """Of a domain with the first tasks, in this process, from the files alone."""
    from holdfast.trainer import corpus as corpora

    record = curriculum.record()
    config = compose.compose_config([word for word in words if not word.startswith("domains")])
    adapter = AdapterConfig(**record.adapter, base=str(curriculum.brick(record.base)))
    adapter.tasks = [str(curriculum.path / task.directory) for task in record.kept]
    model = adapted_base(adapter, ModelConfig(**record.model), record.base).eval()
    data = replace(config.data, path=text, source=DataSource.TEXT)
    store = corpora.prepare(data, Path(config.root) / "cache")
    batches = Batches(store, seed=0, seq_len=32, global_batch=4, micro_batch=2, rank=0, world=1)
    nats = bytes_ = 0.0
    with adapters.using_tasks(model, first=first), torch.no_grad():
        for tokens, targets, _ in batches.validation(8, 2):
            nats += float(model(tokens, targets)) * targets.numel()
            bytes_ += int((targets < 256).sum())
    return nats / bytes_ / 0.6931471805599453


def test_a_curriculum_that_is_interrupted_goes_on_and_its_matrix_is_that_of_the_files(school: School) -> None:
    assert school.codes == [75, 130, 0]
    assert "left     sums with exit code 75; go on with: holdfast adapt" in school.told[0]
    record, runs = school.curriculum.record(), school.curriculum.path.parent
    assert record.domains == ["sums", "lines"]
    attempts = json.loads((runs / "school.sums" / "run.json").read_text())["attempts"]
    assert [attempt["ended"]["outcome"] for attempt in attempts] == ["stopped", "finished"]
    for row, task in enumerate(record.kept, start=1):
        for domain, bits in task.bits.items():
            offline = _offline_bits(school.curriculum, school.texts[domain], school.words, row)
            assert bits == pytest.approx(offline, abs=1e-5)
    assert re.search(r"after sums +\d\.\d{3}\nafter lines +\d\.\d{3} +\d\.\d{3}", school.told[2])


def test_a_curriculum_that_is_learned_is_left_as_it_is(school: School) -> None:
    kept = ("bricks", "tasks")
    before = [_files(school.curriculum.path / name) for name in kept], school.curriculum.record()
    code, told = _adapt(*school.words)
    assert (code, told.count("END"), told.count("after lines")) == (0, 0, 1)
    assert ([_files(school.curriculum.path / name) for name in kept], school.curriculum.record()) == before


def test_domains_in_another_order_are_another_curriculum(school: School, capsys: pytest.CaptureFixture[str]) -> None:
    other = f"domains=[lines:{school.texts['lines']},{school.texts['sums']}]"
    assert _adapt(other, *school.words[1:])[0] == 2
    assert "has learned ['sums', 'lines'] in this order" in capsys.readouterr().err


def test_what_was_learned_is_listed_routes_and_writes(school: School) -> None:
    there = ["--root", str(school.curriculum.path.parent.parent)]
    assert "school  mora(rank=4) on base" in _adapt("--list", *there)[1]
    code, table = _adapt("route", "17 + 3 = 20", *there)
    bits = [float(found) for found in re.findall(r"^(\d\.\d{3})", table, re.MULTILINE)]
    assert (code, len(bits), bits) == (0, 4, sorted(bits))  # the base, each task, both
    assert _adapt("generate", "17 + ", "--bytes", "12", "--temperature", "0", *there)[1].startswith("17 + ")
    assert _adapt("export", "--to", str(school.curriculum.path / "whole"), *there)[0] == 2  # mora cannot be merged
    kept = next((school.curriculum.path / "tasks").glob("sums-*/*.safetensors"))
    whole = kept.read_bytes()
    try:
        kept.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert _adapt("route", "17", *there)[0] == 2
    finally:
        kept.write_bytes(whole)


@pytest.mark.slow
def test_rounds_of_a_domain_end_when_they_gain_nothing(tmp_path: Path, corpus: Path, base: Path) -> None:
    words = _words(tmp_path, corpus, base)
    rounds = [f"domains=[{tmp_path / 'sums'}]", "adapter.rounds=3", "adapter.least_gain=9"]
    assert _adapt(*words[1:], *rounds)[0] == 0
    (task,) = Curriculum(tmp_path / "runs" / "holdfast" / "school").record().learned
    assert task.task == "sums.1"


# -- directions, the best state and a router -------------------------------------------------------------------------


def _careful(root: Path, corpus: Path, base: Path) -> list[str]:
    """A rate that overshoots, so that the best state is not the last; the second domain leaves the first alone."""
    options = ("adapter.method=brainstacks", "adapter.options.rank=2", "adapter.protected_directions=2")
    best = ("adapter.keep_best=true", "trainer.eval_every=3", "trainer.max_steps=12", "optim.lr=0.1")
    words = [word for word in _words(root, corpus, base) if not word.startswith(("trainer.max_steps", "optim.lr"))]
    return [*words, *options, *best, "adapter.router_prompts=8"]


def _run_of(root: Path, task: str) -> dict[str, Any]:
    ended: dict[str, Any] = json.loads((root / "runs" / "holdfast" / f"school.{task}" / "run.json").read_text())[
        "ended"
    ]
    return dict(ended["findings"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_killed_in_the_second_domain_changes_no_bit_of_a_curriculum_with_directions_and_best_states(
    tmp_path: Path, corpus: Path, base: Path
) -> None:
    """Killed between the evaluation that was best and the end. Both curricula have learned the first domain at once."""
    calm, struck = (tmp_path / name for name in ("calm", "struck"))
    calm.mkdir()
    words = _careful(calm, corpus, base)
    assert _adapt(f"domains=[{calm / 'sums'}]", *words[1:])[0] == 0
    shutil.copytree(calm / "runs", struck / "runs")
    for root, extra in ((calm, []), (struck, ["chaos.faults=['sigkill rank=1 step=10']"])):
        code, told = _adapt(*words, f"root={root / 'runs'}", *extra)
        assert (code, "router   2 domains from 16 outcomes" in told) == (0, True), told
    schools = [Curriculum(root / "runs" / "holdfast" / "school") for root in (calm, struck)]
    runs = [school.path.with_name("school.lines") for school in schools]
    assert [len(events_of(run, "fault_detected")) for run in runs] == [0, 1]
    for folder in ("bricks", "tasks"):
        assert _files(schools[1].path / folder) == _files(schools[0].path / folder)
    records = [school.record() for school in schools]
    assert records[0].directions.keys() == {"lines"} and records[1].directions == records[0].directions
    assert [task.bits for task in records[1].learned] == [task.bits for task in records[0].learned]
    found = [_run_of(root, "lines") for root in (calm, struck)]
    assert found[0]["best_step"] == found[1]["best_step"] < 12
    evaluated = {event["step"]: event["bits_per_byte"] for event in events_of(runs[0], "evaluated")}
    assert found[0]["bits_per_byte"] == min(evaluated.values()) == evaluated[found[0]["best_step"]]
    _is_outside(schools[0], records[0].directions["lines"])


@pytest.mark.slow
def test_a_task_that_no_longer_improves_ends_with_its_best_and_is_finished(
    tmp_path: Path, corpus: Path, base: Path
) -> None:
    config = _config(tmp_path, corpus, base, "lora", {"rank": 4})
    config.trainer.max_steps, config.trainer.eval_every, config.optim.lr = 40, 1, 0.5
    config.adapter.keep_best, config.adapter.patience, config.run_id, config.resume = True, 2, "early", "auto"
    first = train(config)
    found = first.findings
    assert first.exit_code == 0 and "2 evaluations until step" in str(found["ended"])
    assert found["step"] == first.step == int(str(found["best_step"])) + 2 < 40
    evaluated = {event["step"]: event["bits_per_byte"] for event in events_of(first.run_dir, "evaluated")}
    assert found["bits_per_byte"] == evaluated[found["best_step"]] == min(evaluated.values())
    again = train(config)
    assert (again.exit_code, again.findings, again.reason) == (0, found, "the goal was reached before")


def _is_outside(school: Curriculum, digest: str) -> None:
    """The energy of the second task's frozen matrices inside the directions is rounding."""
    bases = safetensors.torch.load_file(school.brick(digest))
    (file,) = next((school.path / "tasks").glob("lines-*")).glob("*.safetensors")
    frozen = safetensors.torch.load_file(file)
    assert len(bases) == 14
    for layer, basis in bases.items():
        up = frozen[f"{layer}.0.up"].double()
        assert (up @ basis.double().T).square().sum() < 1e-10 * up.square().sum()
