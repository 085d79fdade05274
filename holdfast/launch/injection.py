"""The driver's part of fault injection: what is due, who is told to suffer it, and telling everybody that it struck."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from holdfast.configs.chaos_rules import never_happens
from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError
from holdfast.events import EventSink, FaultInjected
from holdfast.fault_tolerance import chaos
from holdfast.fault_tolerance.chaos import ALL, NEXT, ChaosFault, Target
from holdfast.fault_tolerance.ledger import Ledger
from holdfast.launch import inject_files
from holdfast.launch.inject_files import Answer, State, Wish

__all__ = ["Injector"]

logger = logging.getLogger(__name__)

_LOOK_S = 0.1
"""Between two looks at the ledger, once there is anything to inject."""
_LISTEN_S = 0.5
"""Between two looks for wishes."""
_PATIENCE_S = 5.0
"""After its step has passed, an accepted wish may still turn up in the ledger for so long."""


class Injector:
    """Used from the conductor's thread. An entry is claimed in the ledger before anybody is told to strike."""

    def __init__(self, config: RunConfig, run_dir: Path, events: EventSink) -> None:
        self._config, self._run_dir, self._events = config, run_dir, events
        self._scheduled = chaos.parse_all(config.chaos.faults)
        self._accepted: dict[int, ChaosFault] = {}
        self._passed_s: dict[int, float] = {}
        self._ledger = Ledger(inject_files.struck_folder(run_dir))
        self._first_step: int | None = None
        self._seen_step = -1
        self._look_s = self._listen_s = 0.0
        self._heard = max((wish.number for wish in inject_files.wishes(run_dir, 0)), default=0)
        self._told = self._told_before()
        self._close_old_wishes()

    @property
    def ledger_folder(self) -> str:
        return str(self._ledger.folder)

    def begin(self, version: int) -> None:
        """An epoch starts from there. What the schedule has for the driver before the first of them is history."""
        if self._first_step is None:
            self._first_step, self._seen_step = max(version, 0), max(version, 0) - 1

    # -- who has to know ------------------------------------------------------------------------------------------

    def for_workers(self) -> list[tuple[str, str]]:
        """Entries that workers do not find in their configuration, each with its source."""
        return [_told_as(fault) for fault in self._accepted.values() if fault.target is Target.WORKER and fault.at]

    def for_keepers(self) -> list[tuple[str, str]]:
        """Entries at the failpoints of keepers."""
        return [_told_as(fault) for fault in self._entries() if fault.target is Target.KEEPER and fault.at]

    # -- what is due ----------------------------------------------------------------------------------------------

    def due(self, step: int, *, has_checkpoint: bool) -> Iterator[ChaosFault]:
        """What the driver itself has to do now that ``step`` steps are finished; each is noted when it is taken.
        Damage to a checkpoint waits until there is one."""
        if self._first_step is None or not (self._scheduled or self._accepted):
            return
        steps = range(self._seen_step + 1, step + 1)
        self._seen_step = max(self._seen_step, step)
        for entry in self._entries():
            if not entry.at and (has_checkpoint or entry.target is not Target.CHECKPOINT):
                yield from (fault for fault, at in self._due(entry, steps, step) if self._ledger.claim(fault, at))

    def _due(self, entry: ChaosFault, news: range, step: int) -> Iterator[tuple[ChaosFault, int]]:
        assert self._first_step is not None, "an epoch has begun"
        if entry.rate is None:
            is_past = NEXT != entry.step < self._first_step
            fault = None if is_past else entry.due(entry.number, step)
            if fault is not None:
                yield fault, step
            return
        for at in news:
            for number in self._numbers(entry):
                fault = entry.due(number, at)
                if fault is not None:
                    yield fault, at

    def _numbers(self, entry: ChaosFault) -> Sequence[int]:
        assert entry.rate is not None, "it has a number of its own otherwise"
        if entry.target is Target.WORKER:
            return range(self._config.launch.nodes * self._config.launch.workers_per_node)
        if entry.target in (Target.KEEPER, Target.NODE):
            return range(self._config.launch.nodes)
        first, last = entry.rate.numbers or (0, 0)
        is_everywhere = entry.rate.numbers is None and entry.target in (Target.STORAGE, Target.LINK)
        return [ALL] if is_everywhere else range(first, last + 1)

    def _entries(self) -> Sequence[ChaosFault]:
        return [*self._scheduled, *self._accepted.values()]

    # -- wishes ---------------------------------------------------------------------------------------------------

    def listen(self, now: float, step: int) -> bool:
        """Look for wishes and answer them; whether workers or keepers must be told of new entries."""
        if now < self._listen_s:
            return False
        self._listen_s = now + _LISTEN_S
        wishes = inject_files.wishes(self._run_dir, self._heard)
        self._give_up_missed(now, step)
        return sum(self._consider(wish, step) for wish in wishes) > 0

    def _consider(self, wish: Wish, step: int) -> bool:
        self._heard = wish.number
        source = f"holdfast inject {wish.number:03d}: {wish.entry}"
        try:
            fault = chaos.parse(wish.entry, source=source, any_step=True)
            problems = [*self._refusals(fault, step)]
        except ConfigurationError as error:
            problems = list(error.problems)
        if problems:
            self._answer(wish.number, Answer(State.REFUSED, "; ".join(problems)))
            return False
        logger.info("%s, by %s", source, wish.by)
        self._accepted[wish.number] = fault
        self._answer(wish.number, Answer(State.ACCEPTED))
        return bool(fault.at)

    def _refusals(self, fault: ChaosFault, step: int) -> Iterator[str]:
        if not self._config.chaos.allow_inject:
            yield "the run refuses it: chaos.allow_inject=false"
        yield from never_happens(fault, self._config)
        if fault.step != NEXT and fault.step < step:
            yield f"step={fault.step} has passed: the run is at step {step}; leave step= out for the next one"

    def _give_up_missed(self, now: float, step: int) -> None:
        for number, fault in list(self._accepted.items()):
            if fault.rate is not None or fault.step == NEXT or fault.step >= step or self._ledger.has(fault):
                continue
            if now > self._passed_s.setdefault(number, now + _PATIENCE_S):
                del self._accepted[number]
                self._answer(number, Answer(State.MISSED, f"nobody reached {fault.at or 'it'} at that step"))

    def _answer(self, number: int, found: Answer) -> None:
        try:
            inject_files.answer(self._run_dir, number, found)
        except OSError as error:
            logger.warning("wish %d is not answered (%s): %s", number, found.state.value, error)

    # -- telling --------------------------------------------------------------------------------------------------

    def report(self, now: float, *, is_urgent: bool = False) -> None:
        """One event for each strike that has not been told, whoever struck."""
        if not (self._scheduled or self._accepted) or (now < self._look_s and not is_urgent):
            return
        self._look_s = now + _LOOK_S
        for strike in self._ledger.news():
            if strike not in self._told:
                self._told.add(strike)
                self._events.emit(strike)
                self._answer_struck(strike)

    def close(self, now: float) -> None:
        """The run ends: nothing strikes any more."""
        self.report(now, is_urgent=True)
        for number, fault in self._accepted.items():
            if fault.rate is None:
                self._answer(number, Answer(State.MISSED, "the run has ended"))

    def _answer_struck(self, strike: FaultInjected) -> None:
        for number, fault in list(self._accepted.items()):
            if fault.source == strike.source:
                self._answer(number, Answer(State.STRUCK, step=strike.step))
                if fault.rate is None:
                    del self._accepted[number]

    def _told_before(self) -> set[FaultInjected]:
        """In earlier attempts of this run, whose words are the record."""
        found = set[FaultInjected]()
        with suppress(FileNotFoundError), (self._run_dir / "events.jsonl").open(errors="replace") as lines:
            for line in lines:
                if '"fault_injected"' in line:
                    with suppress(ValueError, TypeError):
                        found.add(_from_record(json.loads(line)))
        return found

    def _close_old_wishes(self) -> None:
        """Of a driver that has ended without an answer."""
        for number in range(1, self._heard + 1):
            known = inject_files.answer_to(self._run_dir, number)
            if known is None or not known.is_final:
                self._answer(number, Answer(State.MISSED, "the driver that was asked has ended"))


def _told_as(fault: ChaosFault) -> tuple[str, str]:
    return str(fault), fault.source


def _from_record(record: Mapping[str, object]) -> FaultInjected:
    names = asdict(FaultInjected("", "", 0, 0, "", ""))
    return FaultInjected(**{name: record[name] for name in names if name in record})  # type: ignore[arg-type]
