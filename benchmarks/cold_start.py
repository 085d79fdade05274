"""How long does Holdfast keep somebody waiting: its import beside torch's, its help, its configuration, a first step?

Everything is a new process each time, in turns: ``import holdfast`` and ``holdfast.Snapshotter`` after ``import torch``
in the same process, as shares of torch's own import; ``holdfast --help`` and ``holdfast train --cfg job`` against an
interpreter that does nothing; and the time from ``holdfast demo``, and from what ``make train`` starts once it is set
up, to the moment its first step is recorded, against ``import torch``. The disk's cache is warm after a first round,
which does not count.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import record
import runs

_IMPORTS = """
import time
began = time.perf_counter()
import torch
torch_s = time.perf_counter() - began
began = time.perf_counter()
import holdfast
holdfast_s = time.perf_counter() - began
began = time.perf_counter()
holdfast.Snapshotter
print(torch_s, holdfast_s, time.perf_counter() - began)
"""
_RUNS = {"demo": "`holdfast demo`", "main_job": "`make train`, set up before,"}
"""By experiment."""
_DEADLINE_S = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--runs", type=int, default=3, help="of each kind; each takes a start of four processes")
    args = parser.parse_args()
    rounds = [_round() for _ in range(args.rounds + 1)][1:]
    with tempfile.TemporaryDirectory() as root:
        first = {kind: [_first_step_s(Path(root), kind, number) for number in range(args.runs)] for kind in _RUNS}
    _report(rounds, first)


def _round() -> dict[str, float]:
    torch_s, holdfast_s, snapshotter_s = map(float, _output("-c", _IMPORTS).split())
    return {
        "torch": torch_s,
        "holdfast": holdfast_s,
        "snapshotter": snapshotter_s,
        "nothing": _wall_s("-c", "pass"),
        "help": _wall_s("-m", "holdfast", "--help"),
        "config": _wall_s("-m", "holdfast", "train", "--cfg", "job"),
    }


def _output(*words: str) -> str:
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_DEADLINE_S).stdout


def _wall_s(*words: str) -> float:
    began_s = time.perf_counter()
    _output(*words)
    return time.perf_counter() - began_s


def _first_step_s(root: Path, kind: str, number: int) -> float:
    words = (f"experiment={kind}", "trainer.max_steps=2", "chaos.faults=[]", "resume=never")
    attempt = runs.drive(root, f"{kind}{number}", words)
    return attempt.first_step_beyond(0, attempt.started_s) - attempt.started_s


def _report(rounds: Sequence[dict[str, float]], first: Mapping[str, Sequence[float]]) -> None:
    of = {name: [found[name] for found in rounds] for name in rounds[0]}
    torch_s = record.quartiles(of["torch"])[1]
    rows = [
        _row("`import holdfast` after `import torch`", of["holdfast"], of["torch"], "of the import of torch"),
        _row("`holdfast.Snapshotter`, for the first time", of["snapshotter"], of["torch"], "of the import of torch"),
        _row("`holdfast --help`", of["help"], of["nothing"], "of an interpreter that does nothing"),
        _row("`holdfast train --cfg job`", of["config"], of["nothing"], "of an interpreter that does nothing"),
        *[
            _row(f"{_RUNS[kind]} to its first step", found, [torch_s] * len(found), "of the import of torch")
            for kind, found in first.items()
        ],
    ]
    body = record.table(["what", "seconds, median (quartiles)", "ratio", "of what"], rows)
    facts = json.dumps({"rounds": len(rounds), "runs": len(first["demo"]), "import_torch_s": round(torch_s, 2)})
    record.write_record("cold_start", "What a cold start takes", f"{facts}\n\n{body}")


def _row(what: str, values: Sequence[float], others: Sequence[float], of_what: str) -> list[str]:
    return [what, record.spread(values, 4), f"{record.spread(record.ratios(values, others), 3)}x", of_what]


if __name__ == "__main__":
    main()
