"""What planned faults must obey: each can be read, and strikes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from holdfast.configs.layout import world
from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.chaos import ChaosFault, parse, parse_all

__all__ = ["chaos_problems", "never_happens"]


def chaos_problems(config: RunConfig) -> Iterator[str]:
    try:
        parse_all(config.chaos.faults)
    except ConfigurationError as error:
        yield from error.problems
    for entry in config.chaos.faults:
        with contextlib.suppress(ConfigurationError):  # its problems are among those above
            yield from never_happens(parse(entry), config)


def never_happens(fault: ChaosFault, config: RunConfig) -> Iterator[str]:
    """Why an entry that can be read would not strike in a run of this configuration."""
    word = fault.kind.number_key
    bound = {"rank": world(config), "node": config.launch.nodes, "": 1}[word]
    _, highest = (fault.rate.numbers or (0, 0)) if fault.rate else (0, fault.number)
    if highest >= bound:
        yield f"chaos fault '{fault}': {word}={highest} does not exist; {word}s are 0 to {bound - 1}"
    is_inside_a_step = fault.at.startswith("step.")
    last = config.trainer.max_steps - is_inside_a_step  # no step begins when all are finished
    key, step = ("from", fault.rate.first) if fault.rate else ("step", fault.step)
    if step > last:
        yield (
            f"chaos fault '{fault}': {key}={step} is never reached; "
            f"the last one is {last} with trainer.max_steps={config.trainer.max_steps}; "
            "raise that, or inject nothing with 'chaos.faults=[]'"
        )
    if fault.what == "parity" and not config.snapshot.parity:
        yield f"chaos fault '{fault}': there is no parity with snapshot.parity=0"
