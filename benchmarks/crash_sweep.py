"""Is there any moment at which a SIGKILL changes what a run computes?

Every named failpoint, for the worker or keeper that passes it and for the driver while somebody does, under ZeRO-1, 2
and 3: whole runs of three nodes with parity for one, in which the kills happen one after the other. After each run the
loss of every step, the exported weights and the checkpoint are compared with an undisturbed run, bit by bit; so are
the states at every step boundary with what keepers held, what was restored and what is on disk.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from record import table, write_record

from tests.support.runs import events_of, write_corpus
from tests.support.strikes import sightings
from tests.support.sweep import STAGES, Cells, Truth, cells_of, differences, sweep, sweep_config, undisturbed

COLUMNS = ("killed", "ZeRO", "places", "steps lost by each recovery, or resumed from", "states compared", "s", "wrong")
SHARES = {"worker": 3, "keeper": 1, "driver": 4}
"""Runs among which the places of a stage are divided."""


def cells(stage: int) -> Iterator[Cells]:
    """Every place once per victim."""
    for victim, shares in SHARES.items():
        for share in range(shares):
            yield from (found for found in cells_of(stage, shares=shares, share=share) if found.victim == victim)


def row(found: Cells, root: Path, corpus: Path, truth: Truth) -> Sequence[object]:
    """One run, and everything that is wrong with it."""
    started_s = time.perf_counter()
    try:
        struck = sweep(found, root, corpus)
    except AssertionError as error:
        return (found.victim, found.stage, ", ".join(found.names), "", "", "", str(error)[:500])
    seconds, wrong = time.perf_counter() - started_s, differences(struck, truth)
    lost = [event["steps_lost"] for event in events_of(struck.run_dir, "recovery_done")]
    cost = ", ".join(map(str, lost)) if not struck.resumed else ", ".join(str(have) for have, _ in struck.resumed)
    compared = len(sightings(struck.folder))
    return (
        found.victim,
        found.stage,
        ", ".join(found.names),
        cost,
        compared,
        f"{seconds:.0f}",
        "; ".join(wrong) or "-",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, nargs="*", default=list(STAGES), help="ZeRO stages (default: all)")
    options = parser.parse_args()
    rows = list[Sequence[object]]()
    with tempfile.TemporaryDirectory() as temporary:
        corpus = write_corpus(Path(temporary, "corpus"))
        for stage in options.stages:
            truth = undisturbed(sweep_config(Path(temporary, f"truth{stage}"), corpus, stage=stage))
            for found in cells(stage):
                rows.append(row(found, Path(temporary, f"run{len(rows)}"), corpus, truth))
                print(*rows[-1], flush=True)
    wrong = sum(each[-1] != "-" for each in rows)
    places = sum(len(found.names) for stage in options.stages for found in cells(stage))
    body = f"{places} places, {len(rows)} runs, {wrong} of them with a difference.\n\n{table(COLUMNS, rows)}"
    write_record("crash_sweep", "A SIGKILL at every named failpoint", body)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
