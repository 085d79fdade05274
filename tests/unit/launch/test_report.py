"""``holdfast report``: what it says, and that nothing in a run's files can become more than text in it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pytest

from holdfast import events as e
from holdfast.errors import ConfigurationError
from holdfast.launch.cli import main
from holdfast.launch.report_command import report, write_report
from holdfast.launch.report_svg import Axis, Band, Chart, Line, Mark, draw, stacked_bar
from tests.support.told import Told, story

_EVIL = "<script>alert(1)</script>\"'&<img src=http://x.example/y>"
_VOID = {"meta"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; every element must be closed by its own end."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data + "\n"


def _written(told: Told) -> tuple[Page, str]:
    html, markdown = write_report(told.dir, told.dir.path / "report.html")
    return Page(html.read_text()), markdown.read_text()


def _evil(root: Path) -> Told:
    """Everything that anybody may have put into files."""
    told = Told(root, "evil").attempt(("holdfast", "train", _EVIL))
    told.event(e.RunStarted("evil", 1, 3, _EVIL)).event(e.EpochStarted(1, 3, -1))
    for step in range(1, 6):
        told.step(step, 1001.0 + step)
    cause = f"{_EVIL}\nTraceback {_EVIL}\n\x1b[2J\x00\ud800"
    fault = e.FaultDetected(1, (1,), 1, 7, cause, _EVIL, 5, 0.5)
    told.event(e.FaultInjected("sigkill", "worker", 1, 5, "", _EVIL)).event(fault)
    (told.dir.path / "logs" / "rank00001.attempt1.log").write_text(f"```\n{_EVIL}\n")
    told.dir.record_failure(1, asdict(fault), [told.dir.rank_log(1, 1)])
    told.event(e.RecoveryPlanned(1, _EVIL, 4, _EVIL, (_EVIL,)))
    told.event(e.Protection("degraded", _EVIL)).event(e.CheckpointWritten(4, f"| {_EVIL}", 1, 0.1))
    told.event(e.CheckpointRejected(_EVIL, _EVIL)).event(e.StageRebuilt(1, 4, _EVIL, [0], 0.5, 9))
    told.event(e.StagesMeasured(4, {_EVIL: 0.5})).event(e.Evaluated(4, 2.0, 6)).event(e.Generated(4, f"</pre>{_EVIL}"))
    return told.end(1020.0, "failed", 1, reason=_EVIL)


# -- contents ---------------------------------------------------------------------------------------------------------


def test_a_report_tells_the_whole_story_in_html_and_in_markdown(tmp_path: Path) -> None:
    page, markdown = _written(story(tmp_path))
    for says in (
        "Run r1",
        "FINISHED",
        "9 of 9",
        "holdfast train",
        "finished, exit code 0: the goal is reached",
        "version 4 from keeper memory: version 4 is complete",
        "version 5 in memory: not complete at rank 1",
        "shortly before, chaos.faults: sigkill rank=1 step=5",
        "in 3.50 s: regroup 0.50 s, restore 2.00 s, first step 1.00 s",
        "0.50 s after the last sign of life",
        "2.0 kB",
        "failures 1 of 10, preemptions 0",
        "last words",
        "step-00000009",
        "so it",
    ):
        assert says in page.text, says
        escaped = re.sub(r"\\(.)", r"\1", markdown)
        assert says in escaped, says
    assert page.tags.count("svg") == 6
    titles = ["Loss", "Throughput", "Where the time went", "Faults", "Protection over time", "Evaluations"]
    places = [page.text.index(f"\n{title}\n") for title in titles]
    assert places == sorted(places)


def test_the_shares_of_the_wall_time_sum_to_it(tmp_path: Path) -> None:
    _, markdown = _written(story(tmp_path))
    rows = re.findall(r"^\| ([^|]+) \| ([\d.,]+) \| ([\d.]+) % \|$", markdown, re.MULTILINE)
    seconds = [float(row[1]) for row in rows]
    assert [name for name, *_ in rows][-1] == "all the time that drivers have worked"
    assert sum(seconds[:-1]) == pytest.approx(seconds[-1], abs=0.05) and seconds[-1] == 30.0
    assert sum(float(row[2]) for row in rows[:-1]) == pytest.approx(100.0, abs=0.3)


def test_a_run_without_steps_faults_or_events_has_a_report(tmp_path: Path) -> None:
    for run_id, told in (("r1", Told(tmp_path)), ("r2", Told(tmp_path, "r2").attempt())):
        page, markdown = _written(told)
        assert f"Run {run_id}" in page.text and "No fault was detected." in markdown


def test_a_run_that_belongs_to_a_curriculum_shows_its_matrix(tmp_path: Path) -> None:
    told = story(tmp_path, "law.v2.task-1")
    task = {"task": "task-0", "domain": "law", "directory": "tasks/a", "base_bits": 3.0, "bits": {"law": 2.0}}
    after = {"task": "task-1", "domain": "code", "directory": "b", "base_bits": 4.0, "bits": {"law": 2.5, "code": 1.5}}
    dropped = {**after, "task": "task-2", "directory": ""}
    folder = told.dir.path.with_name("law.v2")
    folder.mkdir()
    (folder / "curriculum.json").write_text(json.dumps({"about": {"learned": [task, after, dropped]}}))
    _, markdown = _written(told)
    table = "| after | law | code |\n| --- | ---: | ---: |\n| base | 3.000 | 4.000 |\n"
    assert f"{table}| task-0 | 2.000 |  |\n| task-1 | 2.500 | 1.500 |\n" in markdown
    (folder / "curriculum.json").write_text('{"about": {"lear')
    assert "Adapters" not in _written(told)[1]


# -- safety -----------------------------------------------------------------------------------------------------------


def test_nothing_in_the_files_of_a_run_becomes_markup_or_reaches_the_network(tmp_path: Path) -> None:
    page, markdown = _written(_evil(tmp_path))
    assert not {"script", "img", "a", "link", "iframe", "object", "image", "use"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "href", "srcset", "style", "xlink:href"} & names and not any(n.startswith("on") for n in names)
    assert page.text.count(_EVIL) >= 10
    assert not re.search(r"@import|url\(", (tmp_path / "p" / "evil" / "report.html").read_text())
    outside_of_code = re.sub(r"^(`{3,})\n.*?\n\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    assert "<script" not in outside_of_code and "<img" not in outside_of_code
    assert "````\n```\n<script>" in markdown  # behind a fence longer than the one in it


def test_a_target_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = story(tmp_path)
    target = tmp_path / "out.html"
    assert main(["report", str(told.dir.path), "--output", str(target)]) == 0
    assert capsys.readouterr().out.split() == [str(target), str(tmp_path / "out.md")]
    for output, why in (
        (tmp_path, "is a directory"),
        (tmp_path / "a.md", "the HTML"),
        (tmp_path / "no" / "f", "cannot be"),
    ):
        with pytest.raises(ConfigurationError, match=why):
            report([str(told.dir.path), "--output", str(output)])
    assert not list(tmp_path.glob("*.tmp-*"))


# -- charts -----------------------------------------------------------------------------------------------------------


def test_a_line_goes_through_its_points() -> None:
    """Two points and round numbers: the corners of the plot."""
    svg = draw(Chart("about", Axis("x"), Axis("y"), [Line("loss", [(0.0, 0.0), (10.0, 100.0)])], height=280))
    assert 'd="M64.0 240.0L948.0 30.0"' in svg
    assert re.findall(r'class="tick"[^>]*>([^<]+)<', svg) == [
        "0",
        "20",
        "40",
        "60",
        "80",
        "100",
        "0",
        "2",
        "4",
        "6",
        "8",
        "10",
    ]


def test_a_long_line_keeps_its_peaks_and_gaps_stay_gaps() -> None:
    points = [(float(n), 1.0) for n in range(100_000)]
    points[54_321] = (54_321.0, 100.0)
    points[77_777] = (77_777.0, -100.0)
    svg = draw(Chart("about", Axis("x"), Axis("y"), [Line("loss", points)]))
    ys = [float(y) for y in re.findall(r"L[\d.]+ ([\d.]+)", svg)]
    assert len(ys) <= 1300 and min(ys) == 30.0 and max(ys) == 240.0
    svg = draw(Chart("about", Axis("x"), Axis("y"), [Line("loss", [(0.0, 1.0), (1.0, math.nan), (2.0, 2.0)])]))
    assert len(re.findall(r"M[\d.]+ [\d.]+h0.1", svg)) == 2


@pytest.mark.parametrize("values", [[], [math.nan], [3.0], [0.0, 0.0], [1e-12, 1e12], [-5.0, -5.0]])
def test_any_numbers_make_a_picture(values: list[float]) -> None:
    points = [(float(n), value) for n, value in enumerate(values)]
    marks, bands = [Mark(2.0, "fault", "<&>", "F1")], [Band(1.0, 1.0, "outage", "")]
    svg = draw(Chart("<&>", Axis("<", is_duration=True), Axis(">"), [Line("loss", points)], marks, bands))
    numbers = re.findall(r' (?:[xy][12]?|height|width)="([^"]+)"', svg)
    assert all(math.isfinite(float(number)) for number in numbers) and "nan" not in svg
    Page(svg)


def test_the_parts_of_a_bar_are_as_wide_as_their_shares() -> None:
    svg = stacked_bar("about", [("useful", 0.75, "a"), ("lost", 0.0, "b"), ("restore", 0.25, "c")])
    assert re.findall(r' width="([\d.]+)"', svg) == ["720.00", "0.00", "240.00"]
    assert re.findall(r">(\d+%)<", svg) == ["75%", "25%"]


# -- in a browser -----------------------------------------------------------------------------------------------------

_BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.timeout(240)
@pytest.mark.skipif(_BROWSER is None, reason="needs Chromium or Chrome, to open a report in")
def test_a_browser_shows_the_report_without_a_network_and_without_complaint(tmp_path: Path) -> None:
    """Foreign text included: what the browser has made of the page has no script, and nothing was asked for by it."""
    told = _evil(tmp_path)
    html, _ = write_report(told.dir, tmp_path / "report.html")
    dom, log = _browse(tmp_path, html, "--dump-dom")
    page = Page(dom)
    assert page.tags.count("svg") == 6 and "script" not in page.tags and page.text.count(_EVIL) >= 10
    assert "CONSOLE" not in log  # refused by the policy of the page, or broken
    picture = tmp_path / "seen.png"
    _browse(tmp_path, html, f"--screenshot={picture}", "--window-size=900,1600")
    content = picture.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 20_000  # an empty page of this size has 7,000
    assert _requests(tmp_path / "net.json") == set()


def _browse(folder: Path, page: Path, *options: str) -> tuple[str, str]:
    """What the browser writes and what it logs."""
    always = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    always += ["--enable-logging=stderr", f"--log-net-log={folder / 'net.json'}"]
    command = [str(_BROWSER), *always, *options, f"file://{page}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    return done.stdout, done.stderr


def _requests(net_log: Path) -> set[str]:
    """Addresses of the one host that the page names; the browser itself asks its maker for things."""
    return set(re.findall(r"http://x\.example[^\"]*", net_log.read_text(errors="replace")))
