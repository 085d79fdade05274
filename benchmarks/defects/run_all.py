"""Runs every script of this folder and prints one line each, and the findings of those that did not go as described.

Run it with a Python that has the peers: ``python benchmarks/defects/run_all.py``. Exit status 0 when all of them show
what docs/peer-defects.md says; ``--verbose`` prints every finding.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

from verdict import Outcome

HELPERS = {"fsdp2", "ranks", "run_all", "steps", "verdict"}
DEADLINE_S = 600


def run(script: Path) -> tuple[Outcome, str]:
    """Its outcome and what it printed."""
    checkout = str(Path(__file__).parents[2])
    paths = os.pathsep.join(path for path in (checkout, os.environ.get("PYTHONPATH")) if path)
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": paths}
    try:
        done = subprocess.run(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            timeout=DEADLINE_S,
        )
    except subprocess.TimeoutExpired:
        return Outcome.CANNOT_TELL, f"not done after {DEADLINE_S} s"
    known = done.returncode in list(Outcome)
    return Outcome(done.returncode) if known else Outcome.CANNOT_TELL, done.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verbose", action="store_true", help="print every finding")
    parser.add_argument("names", nargs="*", help="scripts to run, without .py; all of them by default")
    options = parser.parse_args()
    for package in ("torch", "bitsandbytes", "torchao"):
        try:
            print(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            print(package, "is not installed")
    outcomes = []
    for script in sorted(Path(__file__).parent.glob("*.py")):
        if script.stem in HELPERS or (options.names and script.stem not in options.names):
            continue
        outcome, output = run(script)
        outcomes.append(outcome)
        print(f"{script.stem}: {outcome.name.lower().replace('_', ' ')}", flush=True)
        if options.verbose or outcome is not Outcome.AS_DESCRIBED:
            print("\n".join(f"    {line}" for line in output.splitlines()[:-1]), flush=True)
    as_described = outcomes.count(Outcome.AS_DESCRIBED)
    print(f"{as_described} of {len(outcomes)} as described")
    return 0 if as_described == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
