"""A made-up ``wandb`` that notes what it is told, and a reader of the files that the real one writes."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Install", "calls", "install", "records"]

Install = Callable[..., None]
"""Takes a twist: Python that replaces ``on_init``, ``on_log`` or ``on_finish`` of the made-up module."""

_FAKE = """
import json, os, sys, time
from pathlib import Path

def on_init(mode): pass
def on_log(values): pass
def on_finish(): pass

class Settings:
    def __init__(self, **values):
        self.values = values

class Run:
    def __init__(self, folder):
        self.file = open(folder, "a", buffering=1)
    def note(self, *what):
        self.file.write(json.dumps(what) + chr(10))
    def define_metric(self, name, step_metric=None):
        self.note("define_metric", name, step_metric)
    def log(self, values):
        on_log(values)
        self.note("log", values)
    def alert(self, title, text, level, wait_duration=None):
        self.note("alert", title, level, *([wait_duration] if wait_duration else []))
    @property
    def summary(self):
        return self
    def update(self, values):
        self.note("summary", values)
    def log_artifact(self, artifact, aliases):
        self.note("artifact", artifact.name, artifact.type, artifact.references, aliases)
    def mark_preempting(self):
        self.note("preempting")
    def finish(self, exit_code):
        on_finish()
        self.note("finish", exit_code)

class Artifact:
    def __init__(self, name, type, metadata):
        self.name, self.type, self.references = name, type, []
    def add_reference(self, uri, checksum):
        self.references.append([uri, checksum])

def init(settings, **options):
    global stop
    run = Run(Path(options["dir"]) / "calls")
    stop = settings.values.pop("stop_fn")
    run.note("init", options, settings.values, os.environ.get("WANDB_SERVICE"), sys.stdin.isatty())
    on_init(options["mode"])
    return run
"""


def install(directory: Path, monkeypatch: pytest.MonkeyPatch, twist: str = "") -> None:
    """Put a ``wandb`` in front of the real one, for helpers only: no test imports it. It lies below ``directory``."""
    (directory / "fake").mkdir()
    (directory / "fake" / "wandb.py").write_text(_FAKE + textwrap.dedent(twist))
    monkeypatch.syspath_prepend(str(directory / "fake"))


def calls(directory: Path, *kinds: str) -> list[Any]:
    """What the module was told, in order; ``directory`` is the one of ``wandb.init``."""
    noted = [json.loads(line) for line in (directory / "calls").read_text().splitlines()]
    return [call[1:] for call in noted if call[0] in kinds]


def records(data: bytes) -> Iterator[Any]:
    """W&B's transaction log: a header of 7 bytes, then LevelDB's log format with protobuf records."""
    from wandb.proto import wandb_internal_pb2

    at, parts = 7, b""
    while at + 7 <= len(data):
        left_in_block = 32768 - at % 32768
        if left_in_block < 7:
            at += left_in_block
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record
