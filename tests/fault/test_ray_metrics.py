"""A real Ray exports what a run with a fault has to show, on the port that Prometheus asks."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast.configs.schema import LaunchKind
from holdfast.launch.ray_fleet import RayFleet
from holdfast.launch.run import train
from holdfast.launch.run_metrics import METRICS
from tests.support.runs import events_of, tiny_config, write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

_NOT_WITHOUT_A_NOTICE = {"holdfast_preemptions_total"}


class _Scraper:
    """Asks every node that a fleet names, and keeps the newest value of each series of ours."""

    def __init__(self) -> None:
        self.urls: list[str] = []
        self.series: dict[tuple[str, str], float] = {}
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(1.0):
            for url in list(self.urls):
                try:
                    text = urllib.request.urlopen(url, timeout=5).read().decode()
                except OSError:
                    continue
                self.series |= dict(_series(text))

    def values(self, name: str, kind: str = "") -> list[float]:
        return [value for (found, tags), value in self.series.items() if found == name and f'kind="{kind}"' in tags]


def _series(text: str) -> Iterator[tuple[tuple[str, str], float]]:
    for name, tags, value in re.findall(r"^ray_(holdfast_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        yield (name, tags if "kind=" in tags else f'{tags},kind=""'), float(value)


def test_a_fault_and_its_recovery_are_on_the_nodes_metrics_port(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scraper = _Scraper()
    known = RayFleet.metrics_endpoints

    def endpoints(fleet: RayFleet) -> dict[str, str]:
        found = dict(known(fleet))
        scraper.urls = list(found.values())
        return found

    monkeypatch.setattr(RayFleet, "metrics_endpoints", endpoints)
    thread = threading.Thread(target=scraper.run)
    thread.start()
    corpus = write_corpus(tmp_path / "corpus")
    config = tiny_config(tmp_path / "runs", corpus, steps=10_000, faults=["sigkill rank=1 step=4"])
    config = replace(config, launch=replace(config.launch, kind=LaunchKind.LOCAL), run_id="r")
    stopper = threading.Thread(target=_stop_once, args=(scraper,))
    stopper.start()
    try:
        result = train(config)
    finally:
        scraper.over.set()
        thread.join()
        stopper.join()

    assert result.exit_code == 75
    (done,) = events_of(result.run_dir, "recovery_done")
    names = {name for name, _ in scraper.series}
    assert METRICS.keys() - names <= _NOT_WITHOUT_A_NOTICE | {"holdfast_lost_steps_total"}
    assert scraper.values("holdfast_recovery_seconds") == [pytest.approx(done["repaired_in_s"])]
    assert scraper.values("holdfast_failures_total", kind="worker") == [1]
    assert all('run_id="r"' in tags and 'attempt="1"' in tags for _, tags in scraper.series)


def _stop_once(scraper: _Scraper) -> None:
    """Ask the run to stop, with a scheduler's notice, as soon as its recovery was seen."""
    end = time.monotonic() + 300
    while not scraper.values("holdfast_recovery_seconds") and time.monotonic() < end:
        if scraper.over.wait(0.5):  # it has ended by itself
            return
    os.kill(os.getpid(), signal.SIGUSR1)
