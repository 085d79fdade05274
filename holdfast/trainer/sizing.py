"""How big a decoder is and what it costs, from its configuration alone. No torch: the driver uses it too."""

from __future__ import annotations

import math

from holdfast.parallel.partition import LayerCosts, estimate_costs
from holdfast.parallel.pipeline_plan import PipelinePlan
from holdfast.trainer.config import ModelConfig

__all__ = ["MIN_VOCAB_SIZE", "check", "flops_per_token", "largest_piece", "layer_costs", "parameter_count"]

MIN_VOCAB_SIZE = 259
"""256 byte values, <bos>, <eos>, <pad>."""

_SIZES = ("d_model", "n_layers", "n_heads", "n_kv_heads", "d_ff", "max_seq_len")


def parameter_count(config: ModelConfig) -> int:
    """Trainable parameters; tied embeddings count once."""
    tables = 1 if config.tie_embeddings else 2
    norms = config.d_model * (2 * config.n_layers + 1)
    return tables * config.vocab_size * config.d_model + config.n_layers * _block_matrices(config) + norms


def largest_piece(config: ModelConfig, plan: PipelinePlan) -> int:
    """Parameters of the pipeline process that has most. Tied embeddings are in every process that has an end."""
    return max(_piece(config, plan, process) for process in range(plan.partition.processes))


def _piece(config: ModelConfig, plan: PipelinePlan, process: int) -> int:
    layout = plan.schedule.layout
    stages = range(process, layout.stages, layout.processes)
    blocks = sum(len(stage.blocks) for stage in plan.partition.of_process(process))
    has_table = not layout.first_stages.isdisjoint(stages)
    has_head = not layout.last_stages.isdisjoint(stages)
    tables = max(has_table, has_head) if config.tie_embeddings else has_table + has_head
    table = tables * config.vocab_size * config.d_model
    return blocks * (_block_matrices(config) + 2 * config.d_model) + table + has_head * config.d_model


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Floating-point operations of forward and backward per token, a multiply-add counted as two.

    Recomputation is not counted; the half of the attention scores that the causal mask discards is, as in the source.

    Source: arXiv 2204.02311 (PaLM), appendix B: 6 N + 12 L H Q T, where N leaves out the embedding look-up
    and the norms, which multiply no matrices.
    """
    matrices = config.n_layers * _block_matrices(config) + config.vocab_size * config.d_model
    return 6 * matrices + 12 * config.n_layers * config.d_model * seq_len


def layer_costs(config: ModelConfig, seq_len: int) -> LayerCosts:
    """What each layer costs in a forward pass, for dividing them among the stages of a pipeline."""
    return estimate_costs(
        n_layers=config.n_layers,
        d_model=config.d_model,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        d_ff=config.d_ff,
        vocab_size=config.vocab_size,
        seq_len=seq_len,
    )


def check(config: ModelConfig) -> list[str]:
    """Everything that is wrong with ``config``, one sentence each; empty when a decoder can be built."""
    problems = [
        f"model.{name}={getattr(config, name)} must be at least 1" for name in _SIZES if _below_one(config, name)
    ]
    if config.vocab_size < MIN_VOCAB_SIZE:
        problems.append(
            f"model.vocab_size={config.vocab_size} must be at least {MIN_VOCAB_SIZE}: "
            "256 byte values, <bos>, <eos> and <pad>"
        )
    for name in ("rope_theta", "norm_eps"):
        if not 0 < getattr(config, name) < math.inf:  # also refuses NaN
            problems.append(f"model.{name}={getattr(config, name)} must be positive and finite")
    return problems + _check_heads(config)


def _check_heads(config: ModelConfig) -> list[str]:
    if any(_below_one(config, name) for name in ("d_model", "n_heads", "n_kv_heads")):
        return []  # already reported, and there is nothing to divide
    problems = []
    if config.d_model % 2:
        problems.append(
            f"model.d_model={config.d_model} must be even, because rotary embeddings turn pairs; "
            f"try d_model={config.d_model + 1}"
        )
    elif config.d_model % (2 * config.n_heads):
        problems.append(
            f"model.n_heads={config.n_heads} must divide model.d_model={config.d_model} into heads of even size, "
            f"because rotary embeddings turn pairs; try n_heads={_nearest_divisor(config.d_model // 2, config.n_heads)}"
        )
    if config.n_heads % config.n_kv_heads:
        problems.append(
            f"model.n_kv_heads={config.n_kv_heads} must divide model.n_heads={config.n_heads}; "
            f"try n_kv_heads={_nearest_divisor(config.n_heads, config.n_kv_heads)}"
        )
    return problems


def _block_matrices(config: ModelConfig) -> int:
    """Elements of the weight matrices of one block."""
    d_kv = config.d_model // config.n_heads * config.n_kv_heads
    attention = 2 * config.d_model * config.d_model + 2 * config.d_model * d_kv
    return attention + 3 * config.d_model * config.d_ff


def _below_one(config: ModelConfig, name: str) -> bool:
    return int(getattr(config, name)) < 1


def _nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of ``number`` closest to ``wanted``; the smaller one of two."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(d - wanted), default=1)
