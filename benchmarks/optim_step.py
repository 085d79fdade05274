"""How long does one step of the 8-bit AdamW take, against a plain copy of the bytes that it has to move, and its peers?

Parameters with gradients of one size: "flat" is one tensor, "list" the 148 tensors of a decoder of 12 layers (98 of
them below 4096 elements, which every 8-bit optimizer here keeps in 32 bits), "many" is tensors of 4096 elements and
"one" a single tensor as large as they are together. In float32 and in bfloat16, which torch updates with bfloat16
moments. The ways take turns, in an order drawn anew each
round, and caches are filled with something else before each; a ratio is of the same round.

- The floor copies half of an update's traffic with one copy_ on as many threads: an update reads the parameter, its
  gradient and two codes and writes all but the gradient, 16 bytes per float32 parameter, so the copy reads 8 and
  writes 8 (bfloat16: 5 and 5). The in-place floor makes just the update's reads and writes, in two torch operations.
- Each peer, in float32 on the largest number of threads, has a process of its own, where the floor and Holdfast take
  turns with it, and a compiler cache that was empty. A peer that is not installed, or not done by its deadline, is
  named and left out.
- "The call of the kernels alone" leaves out everything that is done in Python in every step, most of it for every
  tensor: finding gradients, and checking that no tensor has moved or changed its kind.
- "First step" is the very first: it allocates the state, and in it torchao compiles every shape of parameter.

``--peers-python`` runs the peers in another environment; Holdfast's checkout is put on its path.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from optim_peers import CASES, FLOOR, FUSED, OURS, PEERS, Found
from record import quartiles, spread, table, write_record

FLOOR_BARS = {"flat": 1.3, "list": 1.5}
"""Longest step of ours, as a multiple of the floor."""
PEER_BAR, FUSED_BAR, STATE_BAR = 20, 1.0, 2.04
FUSED_THREADS = 2

Ways = dict[str, Found]


def run_company(company: str, case: str, dtype: str, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """What ``optim_peers.py`` found in a process of its own; only "missing" when it found nothing."""
    rounds = options.rounds if company == "torch" else options.peer_rounds
    python = sys.executable if company == "torch" else options.peers_python
    command = [python, str(Path(__file__).with_name("optim_peers.py")), company, "--case", case, "--dtype", dtype]
    command += ["--threads", str(threads), "--millions", str(options.millions), "--rounds", str(rounds)]
    with tempfile.TemporaryDirectory() as cache:
        status, output, errors = _run(command, _environment(threads, cache), options.deadline_s)
    if status is None:
        return {"missing": {company: f"not done after {options.deadline_s:g} s"}}
    if status:
        last = errors.strip().splitlines()[-1:] or ["no output"]
        return {"missing": {company: f"exit status {status}: {last[0]}"}}
    found = json.loads(output.splitlines()[-1])
    return {**found, "ways": {name: Found(**values) for name, values in found["ways"].items()}}


def _run(command: list[str], environment: dict[str, str], deadline_s: float) -> tuple[int | None, str, str]:
    """Exit status, None past the deadline, and both outputs. The processes that compile for torchao end with it."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, "", ""
    return process.returncode, output, errors


def _environment(threads: int, cache: str) -> dict[str, str]:
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "TORCHINDUCTOR_CACHE_DIR": cache,
    }


def rows(ways: Ways, count: int) -> Iterator[list[str]]:
    """A line per way: the ratios are of the same process."""
    for name, found in ways.items():
        middle, is_bare = quartiles(found.seconds)[1], not found.state_bytes
        yield [
            name,
            spread([1e9 * s / count for s in found.seconds]),
            spread(ratios(ways, name, FLOOR)),
            spread(ratios(ways, name, OURS)) if OURS in ways else "",
            "" if is_bare else f"{found.state_bytes / count:.3f}",
            "" if is_bare else f"{found.first_s:.2f} s, {found.first_s / middle:.1f}×",
        ]


def ratios(ways: Ways, name: str, other: str) -> list[float]:
    return [a / b for a, b in zip(ways[name].seconds, ways[other].seconds, strict=True)]


def bars(companies: Mapping[str, Any], case: str, threads: int) -> Iterator[list[str]]:
    """What was promised of float32, and whether this run keeps it."""
    main = companies.get("torch", {})
    ways, count = main.get("ways", {}), main.get("count", 1)
    if OURS in ways and case in FLOOR_BARS:
        yield _bar("ours / floor", quartiles(ratios(ways, OURS, FLOOR))[1], at_most=FLOOR_BARS[case])
    if {OURS, FUSED} <= set(ways) and threads == FUSED_THREADS:
        yield _bar("ours / torch AdamW fused", quartiles(ratios(ways, OURS, FUSED))[1], at_most=FUSED_BAR)
    if OURS in ways:
        yield _bar("state, bytes per parameter", ways[OURS].state_bytes / count, at_most=STATE_BAR)
    for package, name in PEERS.items():
        theirs = companies.get(package, {}).get("ways", {})
        if name in theirs:
            yield _bar(f"{package} / ours", quartiles(ratios(theirs, name, OURS))[1], at_least=PEER_BAR)


def _bar(what: str, value: float, *, at_most: float = 0.0, at_least: float = 0.0) -> list[str]:
    """Two decimals, as the bars are stated."""
    value = round(value, 2)
    is_met = value <= at_most if at_most else value >= at_least
    return [what, f"≤ {at_most:g}" if at_most else f"≥ {at_least:g}", f"{value:.2f}", "met" if is_met else "**missed**"]


def section(case: str, dtype: str, threads: int, options: argparse.Namespace) -> str:
    chosen = ["torch", *_peers_of(case, dtype, threads, options)]
    companies = {company: run_company(company, case, dtype, threads, options) for company in chosen}
    lines: list[list[str]] = []
    for company, found in companies.items():
        ways = found.get("ways", {})
        shown = {name for name in ways if company == "torch" or name in PEERS.values()}
        lines += [row for row in rows(ways, found.get("count", 1)) if row[0] in shown]
    columns = ["way", "ns per parameter: median (quartiles)", "/ floor", "/ ours", "state, B per parameter"]
    columns.append("first step; / later ones")
    parts = [_title(case, dtype, threads, companies, options), table(columns, lines)]
    promises = list(bars(companies, case, threads)) if dtype == "float32" else []
    if promises:
        parts.append(table(["bar", "promised", "measured", ""], promises))
    parts += [
        f"Left out: {name}, {why}." for found in companies.values() for name, why in found.get("missing", {}).items()
    ]
    text = "\n\n".join(parts)
    print(text, end="\n\n", flush=True)
    return text


def _peers_of(case: str, dtype: str, threads: int, options: argparse.Namespace) -> list[str]:
    """One of them compiles for a minute and takes seconds a step: not everywhere, unless asked."""
    is_shown = case in FLOOR_BARS and dtype == "float32" and threads == max(options.threads)
    return options.peers if is_shown or options.peers_everywhere else []


def _title(case: str, dtype: str, threads: int, companies: Mapping[str, Any], options: argparse.Namespace) -> str:
    known = next((found for found in companies.values() if "count" in found), {"count": 0, "tensors": 0})
    versions = {name: v for found in companies.values() for name, v in found.get("versions", {}).items()}
    peers = ", ".join(f"{name} {versions[name]}" for name in PEERS if name in versions)
    size = f"{known['count'] / 1e6:.1f} M parameters in {known['tensors']} tensors"
    rounds = f"{options.rounds} rounds" + (f", {options.peer_rounds} with a peer" if options.peers else "")
    heading = f"## {case}, {dtype}, {threads} thread{'s'[: threads - 1]}: {size}"
    return f"{heading}\n\n{rounds}{f'; {peers}' if peers else ''}."


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--millions", type=float, default=50, help="parameters; for many, 20 tensors each million")
    parser.add_argument("--rounds", type=int, default=25, help="measurements of every way")
    parser.add_argument("--peers", nargs="+", choices=["none", *PEERS], default=list(PEERS), help="slow, so optional")
    parser.add_argument("--peers-everywhere", action="store_true", help="not only in float32 on most threads")
    parser.add_argument("--peer-rounds", type=int, default=5, help="measurements beside a peer")
    parser.add_argument("--peers-python", default=sys.executable, help="the Python that has them")
    parser.add_argument("--deadline-s", type=float, default=600, help="of each process, compiling included")
    parser.add_argument("--record", default="optim_step", help="theme of the record, another one for some of the cases")
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    options.peers = [] if "none" in options.peers else options.peers
    return options


def main() -> None:
    options = parse()
    print(f"load average {os.getloadavg()[0]:.2f}", flush=True)
    sections = [
        section(case, dtype, threads, options)
        for case in options.cases
        for dtype in options.dtypes
        for threads in options.threads
    ]
    if not options.no_record:
        write_record(options.record, "Time of an optimizer step", "\n\n".join([str(__doc__), *sections]))


if __name__ == "__main__":
    main()
