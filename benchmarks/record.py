"""What every benchmark prints: medians with quartiles, ratios, and a dated record with command and versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from holdfast.launch.identity import git_commit

__all__ = ["quartiles", "ratios", "spread", "table", "write_record"]

_PACKAGES = ("holdfast", "torch", "deepspeed", "ray", "numpy", "pyarrow", "xxhash")
_LOAD_BEFORE = os.getloadavg()[0]
"""Of the last minute, before this benchmark makes load of its own."""


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Round by round."""
    return [value / other for value, other in zip(values, others, strict=True)]


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def versions() -> Mapping[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def spread(values: Sequence[float], digits: int = 2) -> str:
    """``median (lower quartile–upper quartile)``."""
    low, middle, high = quartiles(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def write_record(theme: str, title: str, body: str, *, hardware: str = "") -> Path:
    """Print the record and write ``records/<theme>_<hardware>_<yyyymm>.md`` beside this file."""
    today = datetime.date.today()
    hardware = hardware or f"cpu{os.cpu_count()}"
    command = "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    commit = git_commit(Path(__file__).parent) or "unknown"
    machine = f"{_processor()}, {os.cpu_count()} cores, {_memory_gb():.0f} GB"
    load = f"load average {_LOAD_BEFORE:.2f} when it began"
    known = ", ".join(f"{name} {version}" for name, version in versions().items())
    text = (
        f"# {title}\n\n{today.isoformat()}, `{command}`, commit {commit}.\n\n"
        f"{machine}, {load}; Python {platform.python_version()}, {known}.\n\n{body}\n"
    )
    print(text)
    path = Path(__file__).parent / "records" / f"{theme}_{hardware}_{today:%Y%m}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path
