"""The directions that a domain's tasks stay out of: a file that is made once, before the domain's first run.

What a run computes has to be a function of files. So these are computed by the driver from the base, the tasks so far
and the text of earlier domains, stored under their sha256 and noted, and every rank reads them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from torch import nn

from holdfast.adapters.methods.brainstacks import protected_directions
from holdfast.adapters.tensor_file import encode
from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError
from holdfast.launch.adapt_model import load_model, training_windows
from holdfast.launch.curriculum import Curriculum, Record
from holdfast.trainer.adapting import protected_side, protected_widths

__all__ = ["keep_directions", "refuse_directions"]

_SAMPLES = 8
"""Windows of an earlier domain for each direction: the paper takes 6."""


def refuse_directions(config: RunConfig, domains: int) -> None:
    """Raises: ConfigurationError for so many directions that a layer could be left without any to learn in; for a
    projection that was asked for and has nothing to project."""
    adapter = config.adapter
    asked = str(adapter.options.get("projection", "off"))
    if asked != "off" and not adapter.protected_directions:
        raise ConfigurationError(
            f"adapter.options.projection={asked} has nothing to stay out of with adapter.protected_directions=0; "
            "say how many of each earlier domain, or projection=off"
        )
    if not adapter.protected_directions:
        return
    widths = protected_widths(adapter, config.model)
    narrow, most = min(widths, key=widths.__getitem__), adapter.protected_directions * (domains - 1)
    if most >= widths[narrow]:
        raise ConfigurationError(
            f"adapter.protected_directions={adapter.protected_directions} of each of {domains - 1} earlier domains can "
            f"leave nothing of {narrow}, which has {widths[narrow]}; at most {(widths[narrow] - 1) // (domains - 1)}"
        )


def keep_directions(curriculum: Curriculum, record: Record, config: RunConfig, domain: str) -> Record:
    """The record with the domain's directions, which are computed if it has none and there is anything to protect.

    Raises: ConfigurationError, ManifestMismatch, DataError for files that are not there or damaged; OSError.
    """
    earlier = record.texts(but=domain)
    if not config.adapter.protected_directions or domain in record.directions or not (earlier and record.kept):
        return record
    model = load_model(curriculum, record)
    count = config.adapter.protected_directions
    samples = {name: partial(_forward, model, config, text, _SAMPLES * count) for name, text in earlier.items()}
    bases = protected_directions(model, samples, count=count, side=protected_side(config.adapter), seed=config.seed)
    tensors = {name: basis.cpu() for name, basis in bases.items()}
    digest = curriculum.keep_brick(encode(tensors, {"format": "pt", "domain": domain}))
    record = replace(record, directions={**record.directions, domain: digest})
    curriculum.write(record)
    return record


def _forward(model: nn.Module, config: RunConfig, text: str, windows: int) -> None:
    device = next(model.parameters()).device
    for tokens, _ in training_windows(config, text, windows):
        model(tokens.to(device))
