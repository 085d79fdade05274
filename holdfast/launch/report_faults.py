"""What a report says of each fault."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from holdfast.events import RecoveryDone, RecoveryPlanned
from holdfast.fault_tolerance.policy import name_ranks
from holdfast.launch.fault_stories import FaultStory
from holdfast.launch.report_parts import Block, Facts, Folded, Said, Section, Table
from holdfast.launch.wording import duration, size

__all__ = ["fault_sections"]

_HEAD = ("", "time", "who", "source", "detected", "repaired", "steps lost")


def fault_sections(stories: Sequence[FaultStory], words: Mapping[int, Mapping[str, str]]) -> Iterator[Section]:
    """A table of all faults, then each of them; ``words`` are the ends of logs by ordinal."""
    if not stories:
        yield Section("Faults", [Said("No fault was detected.")])
        return
    rows = [_row(story) for story in stories]
    yield Section("Faults", [Table(_HEAD, rows, numbers=frozenset({4, 5, 6}))])
    for story in stories:
        yield _section(story, words.get(story.ordinal, {}))


def _row(story: FaultStory) -> list[str]:
    done = story.done
    return [
        f"F{story.ordinal}",
        _at(story.time_s),
        _who(story),
        story.plans[-1].source if story.plans else "",
        duration(story.fault.detected_after_s),
        duration(done.repaired_in_s) if done else "not repaired",
        f"{done.steps_lost:,}" if done else "",
    ]


def _section(story: FaultStory, words: Mapping[str, str]) -> Section:
    first, *more = story.fault.cause.splitlines() or ["no reason given"]
    facts = {
        "time": f"{_at(story.time_s)}, attempt {story.attempt}",
        "lost": _who(story),
        "announced": "a preemption, and no failure" if story.fault.is_preemption else "",
        "phase": f"{story.fault.phase or 'unknown'}, last step {story.fault.last_step:,}",
        "on purpose": "\n".join(f"shortly before, {one.source}" for one in story.injected),
        "decision": "\n".join(map(_decision, story.plans)) or "none: the run did not go on in this attempt",
        "rejected": "\n".join(dict.fromkeys(reason for plan in story.plans for reason in plan.rejected)),
        "detected": f"{duration(story.fault.detected_after_s)} after the last sign of life",
        **(_repair(story.done) if story.done else {}),
    }
    blocks: list[Block] = [Facts({name: value for name, value in facts.items() if value})]
    blocks += [Folded("traceback", "\n".join(more))] if more else []
    blocks += [Folded(f"the last lines of failures/{file}", text) for file, text in words.items()]
    return Section(f"F{story.ordinal}: {first}", blocks, level=3)


def _repair(done: RecoveryDone) -> dict[str, str]:
    rest = {name.replace("_", " "): seconds for name, seconds in done.split_s.items() if name != "detect"}
    split = ", ".join(f"{name} {duration(seconds)}" for name, seconds in rest.items())
    return {
        "repaired": f"in {duration(done.repaired_in_s)}{f': {split}' if split else ''}",
        "resumed": f"at step {done.step:,}, epoch {done.epoch}",
        "steps lost": f"{done.steps_lost:,}",
        "moved": size(done.bytes_moved),
        "budget": f"failures {done.failures} of {done.failures_allowed}, preemptions {done.preemptions}",
    }


def _decision(plan: RecoveryPlanned) -> str:
    version = "a fresh model" if plan.version < 0 else f"version {plan.version:,}"
    return f"{version} from {plan.source}{', approximate' if plan.is_approximate else ''}: {plan.reason}"


def _who(story: FaultStory) -> str:
    fault = story.fault
    found = [
        name_ranks(fault.ranks) if fault.ranks else "",
        f"node {fault.node}" if fault.node is not None else "",
        f"pid {fault.pid}" if fault.pid is not None else "",
    ]
    return ", ".join(part for part in found if part) or "nobody is known to be lost"


def _at(time_s: float) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.localtime(time_s))
