"""What ``holdfast adapt`` prints about curricula."""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.adapters.forgetting import LossMatrix
from holdfast.launch.curriculum import Curriculum, Learned, Record
from holdfast.launch.wording import size, table

__all__ = ["curricula_table", "matrix"]


def matrix(record: Record) -> str:
    """Bits per byte of every domain's held-out text, after every task; what was forgotten; what it takes to store."""
    if not record.kept:
        return "nothing is learned yet"
    domains = list(dict.fromkeys(task.domain for task in record.kept))
    bare = {task.domain: task.base_bits for task in record.learned}
    rows = [["bits per byte", *domains], ["base", *(f"{bare[domain]:.3f}" for domain in domains)]]
    rows += [[f"after {task.task}", *_cells(task, domains)] for task in record.kept]
    return "\n".join([*table(rows), *_summary(record, domains), _stored(record)])


def _cells(task: Learned, domains: list[str]) -> Iterator[str]:
    for domain in domains:
        yield f"{task.bits[domain]:.3f}" if domain in task.bits else ""


def _summary(record: Record, domains: list[str]) -> Iterator[str]:
    """Of each domain its last task counts."""
    after = {task.domain: task.bits for task in record.kept}
    losses = LossMatrix.so_far(
        [{domain: bits[domain] for domain in domains if domain in bits} for bits in after.values()]
    )
    yield f"final    {losses.final:.3f} on average"
    if before := domains[:-1]:
        rise = f"{losses.forgetting:+.3f} bits per byte on average"
        yield f"forgot   {rise} since they were learned: {', '.join(before)}"


def _stored(record: Record) -> str:
    tasks = sum(task.size_bytes for task in record.kept)
    return (
        f"stored   base {record.base[:8]}… {size(record.base_bytes)}, {len(record.kept)} tasks {size(tasks)}, each once"
    )


def curricula_table(curriculum: Curriculum, record: Record) -> str:
    """A curriculum and its tasks."""
    options = ", ".join(f"{name}={value}" for name, value in record.adapter["options"].items())
    head = f"{curriculum.name}  {record.adapter['method']}({options}) on base {record.base[:8]}…, {curriculum.path}"
    rows = [_row(task) for task in record.learned]
    return "\n".join([head, *(table(rows, "  ") if rows else ["  nothing is learned yet"])])


def _row(task: Learned) -> list[str]:
    what = f"{task.digest[:8]}… {size(task.size_bytes)}" if task.directory else "dropped"
    change = f"{task.before_bits:.3f} -> {task.bits[task.domain]:.3f} bits per byte of {task.domain}"
    return [task.task, what, change, task.text]
