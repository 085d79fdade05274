"""The README of an exported model: what was trained, on what, how well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from holdfast.launch.records import read_yaml
from holdfast.launch.run_dir import RunDir

__all__ = ["model_card"]


def model_card(run: RunDir, words: str, architecture: str, parameters: int, dtype: str) -> str:
    """Markdown with the metadata block that the hub reads. ``words`` say which weights these are."""
    values, record = read_yaml(run.config_file), run.record()
    facts = {**dict(_model(architecture, parameters, dtype, words)), **dict(_training(values, record))}
    rows = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- holdfast\n---\n\n"
        f"# {run.run_id}\n\nTrained by Holdfast, run `{run.run_id}`.\n\n"
        f"| | |\n|---|---|\n{rows}\n## Options\n\n```\n{_options(record)}\n```\n\n"
        "The licence of the weights is that of their training text and, if they began from other weights, of those.\n"
    )


def _model(architecture: str, parameters: int, dtype: str, words: str) -> Iterator[tuple[str, str]]:
    yield "architecture", architecture
    yield "parameters", f"{parameters:,}, {dtype}"
    yield "these are", words


def _training(values: Mapping[str, object], record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    last: Mapping[str, Any] = record["attempts"][-1] if record["attempts"] else {}
    yield "text", str(last.get("data") or f"{values.get('data.source')} {values.get('data.path')}".strip())
    if tokenizer := values.get("data.tokenizer"):
        yield "tokenizer", str(tokenizer)
    if values.get("model.init") == "WEIGHTS":
        yield "began with the weights of", str(values.get("model.path"))
    if base := values.get("adapter.base"):
        yield "adapters on", f"{base}, by {values.get('adapter.method')}"
    tokens = _number(values, "trainer.global_batch") * _number(values, "data.seq_len")
    yield "tokens in each step", f"{tokens:,}"
    yield "optimizer", f"{values.get('optim.name')}, peak learning rate {values.get('optim.lr')}"
    yield "precision", str(values.get("parallel.precision"))
    yield "seed", str(values.get("seed"))
    ended = record.get("ended") or {}
    yield (
        "the run",
        f"{ended.get('outcome', 'goes on')}, {ended.get('step', '?')} steps, {len(record['attempts'])} starts",
    )
    if bits := (ended.get("findings") or {}).get("bits_per_byte"):
        yield "held-out text at the end", f"{bits:.3f} bits per byte"
    yield "software", ", ".join(f"{name} {version}" for name, version in (last.get("versions") or {}).items())


def _number(values: Mapping[str, object], key: str) -> int:
    return int(str(values.get(key, 0)))


def _options(record: Mapping[str, Any]) -> str:
    last = record["attempts"][-1] if record["attempts"] else {"overrides": []}
    return "\n".join(last["overrides"]) or "(none: the defaults)"
