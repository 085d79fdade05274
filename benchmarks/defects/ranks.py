"""Runs a function on two gloo ranks of this machine, with a deadline, and brings back what each returned or raised."""

from __future__ import annotations

import json
import logging
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

__all__ = ["WORLD_SIZE", "first_error", "on_two_ranks", "refusal"]

WORLD_SIZE = 2


LONGEST = 120
"""Characters of an error that are kept."""


def on_two_ranks(body: Callable[[], object], *, deadline_s: float = 300) -> list[object]:
    """What ``body`` returned on each rank (JSON values), or "KindOfError: first line".

    ``body`` is a function of the script's top level.

    Raises: TimeoutError past the deadline, after which no rank is left.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=_rank, args=(body, rank, folder)) for rank in range(WORLD_SIZE)]
        for process in ranks:
            process.start()
        until = time.monotonic() + deadline_s
        for process in ranks:
            process.join(max(until - time.monotonic(), 0))
        late = [process for process in ranks if process.is_alive()]
        for process in late:
            process.kill()
            process.join()
        if late:
            raise TimeoutError(f"{len(late)} of {WORLD_SIZE} ranks were not done after {deadline_s:g} s")
        return [_answer(Path(folder, f"{rank}.json")) for rank in range(WORLD_SIZE)]


def refusal(action: Callable[[], object]) -> str:
    """The error that ``action`` ends in, as "Kind: first line"; empty when it ends well."""
    try:
        action()
    except Exception as error:  # whatever a peer raises is the finding
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0][:LONGEST] if lines else 'no message'}"
    return ""


def first_error(answers: list[object]) -> str:
    """The first of the ranks' errors, empty when no rank had one."""
    return next((str(answer) for answer in answers if answer), "")


def _rank(body: Callable[[], object], rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", timedelta(seconds=60), world_size=WORLD_SIZE, rank=rank
    )
    answers: list[object] = []
    error = refusal(lambda: answers.append(body()))
    Path(folder, f"{rank}.json").write_text(json.dumps(error or answers[0]))
    dist.destroy_process_group()


def _answer(path: Path) -> object:
    return json.loads(path.read_text()) if path.exists() else "the process died"
