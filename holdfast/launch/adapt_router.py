"""The router of a curriculum: trained on outcomes when its domains are learned, and refused by other ones."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast import adapters
from holdfast.adapters.methods.brainstacks import Examples, MetaRouter, targets, train_router
from holdfast.adapters.signed_json import read_signed, signed
from holdfast.adapters.tensor_file import decode, encode, write_whole
from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError, ManifestMismatch
from holdfast.launch.adapt_choices import Choices
from holdfast.launch.adapt_model import choices_of, held_out_windows, load_model, training_windows
from holdfast.launch.adapt_outcomes import Outcomes
from holdfast.launch.curriculum import Curriculum, Record

__all__ = ["Router", "keep_router", "load_router", "weights_of"]

FORMAT_VERSION = 1
_FILE = "router.json"
_WIDEST = 512
_HELD_OUT_SHARE = 0.25
_THRESHOLD = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Router:
    """What ``router.json`` says."""

    base: str
    """Fingerprint of the weights whose hidden states it reads."""
    tasks: Mapping[str, str]
    """Its lineage: the tasks whose outcomes it was trained on, oldest first, and their digests."""
    domains: list[str]
    features: int
    """Width of the hidden states."""
    width: int
    digest: str
    """sha256 of its tensors' file, a brick."""
    prompts: int
    """That it was trained on."""
    bits: Mapping[str, float]
    """Bits per token behind held-out prompts: ``routed``, ``searched``, ``base`` and, if they can act, ``ungated``."""
    format_version: int = FORMAT_VERSION

    @property
    def words(self) -> str:
        """In a line."""
        others = ", ".join(f"{name} {bits:.3f}" for name, bits in self.bits.items())
        return (
            f"{len(self.domains)} domains from {self.prompts} outcomes; bits per token behind held-out ones: {others}"
        )


def keep_router(curriculum: Curriculum, record: Record, config: RunConfig) -> str:
    """Train a router unless the one that is there fits, or the method has nothing to choose. A line about it.

    Raises: ConfigurationError, ManifestMismatch, DataError for files that are not there or damaged; OSError.
    """
    choices = choices_of(record)
    if not config.adapter.router_prompts or not choices.can_be_routed or len(choices.domains) < 2:
        return ""
    if (curriculum.path / _FILE).exists() and (old := _read(curriculum)).tasks == _lineage(record):
        return old.words
    model = load_model(curriculum, record)
    outcomes, held_out = (_outcomes(model, choices, record, config, is_held_out=last) for last in (False, True))
    router = _trained(outcomes, held_out, config.seed)
    about = Router(
        base=adapters.base_fingerprint(model),
        tasks=_lineage(record),
        domains=choices.domains,
        features=router.tokens[0].in_features,  # type: ignore[arg-type]  # of a linear layer
        width=router.queries.shape[1],
        digest=curriculum.keep_brick(encode(router.state_dict(), {"format": "pt"})),
        prompts=len(outcomes),
        bits=_held_out_bits(router, held_out),
    )
    write_whole(curriculum.path / _FILE, signed(asdict(about)))
    return about.words


def load_router(curriculum: Curriculum, record: Record, model: nn.Module) -> MetaRouter | None:
    """None if none was trained. Raises: ConfigurationError for one of another base or other tasks; ManifestMismatch for
    damage."""
    path = curriculum.path / _FILE
    if not path.exists():
        return None
    about = _read(curriculum)
    if about.tasks != _lineage(record) or about.base != adapters.base_fingerprint(model):
        raise ConfigurationError(
            f"{path} was trained on another base or on the tasks {list(about.tasks)}, and there are "
            f"{[task.task for task in record.kept]}; the words that taught this curriculum train it again, and "
            "without that file a search chooses"
        )
    router = MetaRouter(about.features, about.domains, width=about.width)
    router.load_state_dict(_tensors(curriculum.brick(about.digest), about.digest))
    return router.eval()


@torch.no_grad()
def weights_of(router: MetaRouter, features_1PH: Tensor, choices: Choices) -> tuple[dict[str, float], dict[str, float]]:
    """The probability of every domain, and the domains that act, each with weight 1: those above one half, or the
    likeliest of them where one task acts at a time. None is an abstention."""
    router.eval()
    row = router(features_1PH).sigmoid()[0].tolist()
    told = dict(zip(router.domains, row, strict=True))
    chosen = [domain for domain, probability in told.items() if probability > _THRESHOLD]
    if not choices.method.acts_apart:
        chosen = sorted(chosen, key=told.__getitem__)[-1:]
    return told, dict.fromkeys(chosen, 1.0)


def _lineage(record: Record) -> dict[str, str]:
    return {task.task: task.digest for task in record.kept}


def _outcomes(model: nn.Module, choices: Choices, record: Record, config: RunConfig, *, is_held_out: bool) -> Outcomes:
    """Of every domain's text, as many windows of each."""
    count, texts = config.adapter.router_prompts, record.texts()
    if is_held_out:
        parts = [held_out_windows(config, texts[d], math.ceil(count * _HELD_OUT_SHARE)) for d in choices.domains]
    else:
        parts = [training_windows(config, texts[domain], count) for domain in choices.domains]
    return Outcomes(model, choices, list(chain.from_iterable(parts)))


def _trained(outcomes: Outcomes, held_out: Outcomes, seed: int) -> MetaRouter:
    examples, others = _examples(outcomes), _examples(held_out)
    features = examples.features.shape[-1]
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        router = MetaRouter(features, outcomes.choices.domains, width=min(_WIDEST, features))
        train_router(router, examples, others, seed=seed)
    return router


def _examples(outcomes: Outcomes) -> Examples:
    wanted = [targets(found, outcomes.choices.domains) for found in outcomes.found()]
    return Examples(outcomes.features(), torch.stack(wanted))


def _held_out_bits(router: MetaRouter, outcomes: Outcomes) -> dict[str, float]:
    choices, features = outcomes.choices, outcomes.features()
    chosen = [weights_of(router, features[n : n + 1], choices)[1] for n in range(len(outcomes))]
    nats = {
        "routed": [float(outcomes.losses(list(weights))[n]) for n, weights in enumerate(chosen)],
        "searched": [found.loss for found in outcomes.found()],
        "base": outcomes.losses([]).tolist(),
    }
    if not choices.method.needs_task:
        nats["ungated"] = outcomes.losses(choices.domains).tolist()
    return {name: math.fsum(losses) / len(losses) / math.log(2) for name, losses in nats.items()}


def _read(curriculum: Curriculum) -> Router:
    return Router(**read_signed(curriculum.path / _FILE, format_version=FORMAT_VERSION))


def _tensors(path: Path, digest: str) -> dict[str, Any]:
    try:
        data = bytearray(path.read_bytes())
    except FileNotFoundError as error:
        raise ManifestMismatch(f"the router's tensors, {path}, are not there") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise ManifestMismatch(f"the router's tensors, {path}, have another sha256 than their name: they are damaged")
    return decode(data, str(path))
