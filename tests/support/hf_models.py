"""Tiny models of transformers, made from configurations without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from holdfast.trainer.config import ModelConfig, ModelInit, ModelKind

__all__ = ["KINDS", "hf_config", "peer", "transformers", "write_model"]

transformers: Any = pytest.importorskip("transformers", reason="needs the extra hf")

_LLAMA: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_GPT2: dict[str, Any] = {"vocab_size": 259, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, **_NO_DROPOUT}
KINDS = ("llama", "llama tied", "gpt2")


def peer(kind: str, **changes: Any) -> Any:
    """A model of transformers with its own random weights."""
    sizes = (_GPT2 if kind == "gpt2" else _LLAMA) | {"tie_word_embeddings": kind != "llama"} | changes
    cls = transformers.GPT2Config if kind == "gpt2" else transformers.LlamaConfig
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return transformers.AutoModelForCausalLM.from_config(cls(**sizes))


def write_model(directory: Path, kind: str, **changes: Any) -> Any:
    """The model's directory, weights included; returns the model."""
    model = peer(kind, **changes)
    model.save_pretrained(directory)
    return model


def hf_config(directory: Path, init: ModelInit = ModelInit.FRESH, **options: Any) -> ModelConfig:
    return ModelConfig(name="hf", kind=ModelKind.HF, path=str(directory), init=init, **options)
