"""What a model and its optimizer must obey in a run."""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.configs.schema import RunConfig
from holdfast.optim.config import check as check_optim
from holdfast.trainer.config import ModelKind
from holdfast.trainer.models import model_of
from holdfast.trainer.sizing import MIN_VOCAB_SIZE

__all__ = ["model_problems", "optim_problems"]


def model_problems(config: RunConfig) -> Iterator[str]:
    model, is_builtin = model_of(config.model), config.model.kind is ModelKind.DECODER
    problems = model.problems()
    yield from problems
    if problems and not is_builtin:
        return
    longest = model.max_seq_len
    if config.data.seq_len > longest >= 1:
        own, more = ("model.max_seq_len", " or raise model.max_seq_len") if is_builtin else ("the model's longest", "")
        yield f"data.seq_len={config.data.seq_len} must be at most {own}={longest}; try data.seq_len={longest}{more}"
    if not config.data.tokenizer and 0 < model.vocab_size < MIN_VOCAB_SIZE and not is_builtin:
        yield (
            f"model.path={config.model.path!r} has a vocabulary of {model.vocab_size}, and bytes need "
            f"{MIN_VOCAB_SIZE}: 256 byte values, <bos>, <eos> and <pad>; set data.tokenizer"
        )


def optim_problems(config: RunConfig) -> Iterator[str]:
    yield from check_optim(config.optim)
    for key, reason in _NOT_FOR_TRAINING.items():
        if key in config.optim.options:
            yield f"optim.options.{key} {reason}; leave it out"


_NOT_FOR_TRAINING = {
    "percentile_clipping": "looks at one tensor at a time, and shards hold parts of several; use optim.grad_clip",
    "stochastic_rounding": "is for bfloat16 weights, and the trainer updates fp32 masters",
    "seed": "is that of stochastic rounding, and the trainer updates fp32 masters",
}
