"""Causal language models of Hugging Face: the only door to transformers, which is imported when it is first needed.

Nothing is downloaded, no code of a model's directory is run (``trust_remote_code`` stays off) and no pickle is read.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.errors import ConfigurationError
from holdfast.trainer.wrapped import Wrapped, seeded

__all__ = [
    "CONFIG",
    "fresh",
    "library",
    "llama_config",
    "logits",
    "pretrained",
    "read_config",
    "recompute",
    "save",
    "shapes",
    "weight_files",
]

CONFIG = "config.json"


@cache
def library() -> Any:  # Any: transformers is not checked
    """transformers itself, quiet. Raises: ConfigurationError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformers
    except ImportError as error:
        raise ConfigurationError(
            "model=hf needs transformers, which is not installed: pip install 'holdfast[hf]'"
        ) from error
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    return transformers


def read_config(directory: Path) -> Any:
    """The configuration in a directory. Raises: ConfigurationError for one that transformers cannot use."""
    if not (directory / CONFIG).is_file():
        raise ConfigurationError(f"model.path={str(directory)!r} holds no {CONFIG}; name a model's directory")
    try:
        config = library().AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"model.path={str(directory)!r} cannot be used: {_line(error)}") from error
    return config


def shapes(config: Any) -> nn.Module:
    """The model on the meta device. Raises: ConfigurationError for what is no causal language model."""
    with torch.device("meta"):
        return _from_config(config)


def fresh(config: Any, seed: int) -> nn.Module:
    """The model in fp32 on the CPU, its weights drawn as transformers draws them, by ``seed`` alone."""
    with seeded(seed):
        return _from_config(config)


def pretrained(directory: Path, config: Any) -> nn.Module:
    """The model in fp32 on the CPU with the directory's weights.

    Raises: ConfigurationError for weights that are missing, damaged or of another model.
    """
    where = f"model.path={str(directory)!r}"
    weight_files(directory)
    try:
        with _quiet():
            model, found = library().AutoModelForCausalLM.from_pretrained(
                directory,
                config=config,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigurationError(f"the weights of {where} cannot be read: {_line(error)}") from error
    missing = sorted(found["missing_keys"])
    if missing:  # transformers would draw them, and only warn
        raise ConfigurationError(f"the weights of {where} lack {', '.join(missing[:5])}; they are of another model")
    return _trainable(model)


def weight_files(directory: Path) -> list[Path]:
    """The directory's safetensors. Raises: ConfigurationError without any."""
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        why = f"; {pickles[0]} is a pickle, which is not read: save it as safetensors" if pickles else ""
        raise ConfigurationError(f"model.path={str(directory)!r} holds no model.safetensors{why}")
    return files


def logits(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    """[B, T, V]. Without a cache, as training needs it; the causal mask is the model's own."""
    found: Tensor = model(input_ids=tokens_BT, use_cache=False).logits
    return found


def llama_config(sizes: Mapping[str, Any]) -> Any:
    """The configuration of a LLaMA: ``sizes`` as config.json names them."""
    return library().LlamaConfig(**sizes)


def save(model: Wrapped, directory: Path) -> None:
    """Weights as safetensors, in several files if they are large, and the configuration; tied weights once."""
    with _quiet():
        model.inner.save_pretrained(directory)  # type: ignore[operator]  # of transformers' class


def recompute(model: Any) -> None:
    """From now on each block is computed anew in the backward pass instead of keeping its activations."""
    with _quiet():  # versions differ in what they call it
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _from_config(config: Any) -> nn.Module:
    try:
        with _quiet():
            model = library().AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, attn_implementation=_attention(config), trust_remote_code=False
            )
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        kind = getattr(config, "model_type", "?")
        raise ConfigurationError(f"a model of type {kind!r} is no causal language model: {_line(error)}") from error
    return _trainable(model)


def _attention(config: Any) -> str | None:
    """torch's own kernel for families whose stages rely on its causal mask, else what transformers chooses."""
    return "sdpa" if config.model_type in ("llama", "gpt2") else None


def _trainable(model: nn.Module) -> nn.Module:
    return model.float().train()


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
