"""What a run reads and never writes, and the digest of all that decides what it computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from holdfast.configs.plain import to_plain
from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError, SnapshotError
from holdfast.fault_tolerance.bricks import BrickFile
from holdfast.launch import identity
from holdfast.trainer import corpus
from holdfast.trainer.models import model_of
from holdfast.trainer.token_store import TokenStore

if TYPE_CHECKING:
    from holdfast.trainer.adapting import Bricks

__all__ = ["Material", "material_of", "run_digest"]


@dataclass(frozen=True, slots=True)
class Material:
    """What a run reads and never writes."""

    store: TokenStore
    seen: Mapping[str, TokenStore]
    bricks: Bricks | None

    @property
    def frozen(self) -> Sequence[BrickFile]:
        return () if self.bricks is None else self.bricks.files

    @property
    def digests(self) -> dict[str, object]:
        """Besides the configuration they decide what is computed."""
        frozen = {} if self.bricks is None else {"bricks": self.bricks.digests}
        return {"text": self.store.digest, **frozen}


def material_of(config: RunConfig) -> Material:
    """Prepare what is not in the cache yet. Raises: ConfigurationError."""
    cache = Path(config.data.cache or Path(config.root, "cache"))
    seen = {
        name: corpus.prepare(replace(config.data, path=str(path)), cache) for name, path in config.adapter.seen.items()
    }
    bricks = None
    if config.adapter.method:
        from holdfast.trainer.adapting import find_bricks  # loads torch

        try:
            bricks = find_bricks(config.adapter)
        except SnapshotError as error:  # damage; nothing has started yet
            raise ConfigurationError(str(error)) from error
    return Material(corpus.prepare(config.data, cache), seen, bricks)


def run_digest(config: RunConfig, material: Material) -> str:
    """Two runs with the same one compute the same."""
    plain = {key: value for key, value in to_plain(config).items() if key != "adapter" or config.adapter.method}
    return identity.config_digest({**plain, **material.digests, **_choosing(config), **_model_digest(config)})


def _choosing(config: RunConfig) -> dict[str, object]:
    """Evaluations change no state unless they choose it."""
    trainer = config.trainer
    return {"evaluations": [trainer.eval_every, trainer.eval_windows]} if config.adapter.keep_best else {}


def _model_digest(config: RunConfig) -> dict[str, object]:
    """What the configuration does not say about the model. Weights that it begins with are not in it: a run that is
    continued does not read them."""
    digest = model_of(config.model).digest
    return {"architecture": digest} if digest else {}
