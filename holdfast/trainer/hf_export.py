"""Trained weights as a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` open.

The built-in decoder is a LLaMA under other names, so its weights move to ``LlamaForCausalLM`` as they are.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import ConfigurationError
from holdfast.trainer import hf, hf_tokenizer, tokenizer
from holdfast.trainer.config import DataConfig, ModelConfig, ModelKind
from holdfast.trainer.hf_model import HfModel
from holdfast.trainer.models import model_of
from holdfast.trainer.wrapped import Wrapped, fill

__all__ = ["llama_sizes", "portable", "portable_name", "write_folder"]

_NAMES = {
    "embedding": "model.embed_tokens",
    "head.norm": "model.norm",
    "head.output": "lm_head",
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.w_gate": "mlp.gate_proj",
    "feed_forward.w_up": "mlp.up_proj",
    "feed_forward.w_down": "mlp.down_proj",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt "
    "tokenizer.model chat_template.jinja"
).split()


def portable_name(module: str) -> str:
    """What a module of the built-in decoder is called in a LLaMA."""
    block = _BLOCK.fullmatch(module)
    return f"model.layers.{block[1]}.{_NAMES[block[2]]}" if block else _NAMES[module]


def portable(config: ModelConfig, weights: Mapping[str, Tensor]) -> nn.Module:
    """The model of transformers that computes what the run's model does, fp32 on the CPU, with its ``weights``.

    Raises: ConfigurationError for the user's own module, which no class of transformers describes.
    """
    if config.kind is ModelKind.MODULE:
        raise ConfigurationError(
            f"model.path={config.path!r} is no class of transformers, so there is nothing to open its weights with "
            "there; use export/model.safetensors, or holdfast checkpoint export, and your own function"
        )
    if config.kind is ModelKind.HF:
        wrapped = HfModel(config).with_weights(weights)
        assert isinstance(wrapped, Wrapped)
        return wrapped.inner
    model = hf.fresh(hf.llama_config(llama_sizes(config)), 0)
    fill(model, {_parameter_name(name): tensor for name, tensor in weights.items()})
    return model.eval()


def _parameter_name(name: str) -> str:
    module, _, last = name.rpartition(".")
    return f"{portable_name(module)}.{last}"


def llama_sizes(config: ModelConfig) -> dict[str, Any]:
    """The built-in decoder's sizes, as config.json names those of a LLaMA."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": tokenizer.BOS,
        "eos_token_id": tokenizer.EOS,
        "pad_token_id": tokenizer.PAD,
    }


def write_folder(directory: Path, model: nn.Module, config: ModelConfig, data: DataConfig, dtype: torch.dtype) -> None:
    """Weights, configuration and tokenizer into ``directory``, which must be there. Raises: OSError,
    ConfigurationError."""
    hf.save(Wrapped(model, hf.logits).to(dtype), directory)
    if data.tokenizer:
        _copy(_TOKENIZER_FILES, Path(data.tokenizer), directory)
    else:
        _write_bytes(directory, model_of(config).max_seq_len)
    if config.kind is ModelKind.HF:
        _copy(["generation_config.json"], Path(config.path), directory)


def _copy(names: Iterable[str], source: Path, target: Path) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _write_bytes(directory: Path, longest: int) -> None:
    hf_tokenizer.write_byte_tokenizer(directory / hf_tokenizer.FILE)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
