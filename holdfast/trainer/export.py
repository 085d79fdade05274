"""What leaves a finished run: weights as safetensors, written atomically, and generated text."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from holdfast.trainer.config import DataConfig, TrainerConfig
from holdfast.trainer.model import generate
from holdfast.trainer.vocabulary import vocabulary_of
from holdfast.trainer.wrapped import answers

__all__ = ["export_weights", "sample_text"]

_TEMPERATURE, _TOP_K = 0.8, 50


def export_weights(weights: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str]) -> int:
    """Write fp32 ``weights`` to ``path``; a reader sees the whole file or none. Returns its bytes. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask wants it; safetensors lets nobody but the owner read
        safetensors.torch.save_file(dict(weights), temporary, metadata=dict(metadata))
        temporary.chmod(mode)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except SafetensorError as error:  # the operating system's, in other words
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size


def sample_text(model: nn.Module, trainer: TrainerConfig, seed: int, data: DataConfig) -> str:
    """Text from trained weights, alone in fp32 on the CPU; the same on every machine that computes alike."""
    if not answers(model):
        return ""
    vocabulary = vocabulary_of(data)
    given, _ = vocabulary.encode(trainer.prompt.encode())
    ids = generate(
        model,
        [*(vocabulary.begin or vocabulary.end), *given.tolist()],
        trainer.generate_bytes,
        temperature=_TEMPERATURE,
        top_k=_TOP_K,
        seed=seed,
        max_seq_len=data.seq_len,
    )
    return trainer.prompt + vocabulary.decode(ids)
