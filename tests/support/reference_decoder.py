"""A slow, independent truth for the decoder: the papers' formulas, one sequence and mostly one number at a time.

Everything is float64 and differentiable. Nothing here comes from the decoder but the names of its weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from holdfast.trainer.config import ModelConfig

__all__ = ["reference_gradients", "reference_logits", "reference_loss"]

Weights = Mapping[str, Tensor]


def reference_logits(config: ModelConfig, weights: Weights, tokens: list[int]) -> Tensor:
    """Logits [T, V] of one sequence."""
    hidden = [weights["embedding.weight"][token] for token in tokens]
    for number in range(config.n_layers):
        hidden = _block(config, {k: weights[f"blocks.{number}.{k}"] for k in _BLOCK}, hidden)
    output = weights["embedding.weight" if config.tie_embeddings else "head.output.weight"]
    return torch.stack([output @ _rms_norm(x, weights["head.norm.weight"], config.norm_eps) for x in hidden])


def reference_loss(config: ModelConfig, weights: Weights, tokens: list[list[int]], targets: list[list[int]]) -> Tensor:
    """Mean of -log p(target), nats."""
    nats = []
    for sequence, wanted in zip(tokens, targets, strict=True):
        for logits, target in zip(reference_logits(config, weights, sequence), wanted, strict=True):
            nats.append(-torch.log(torch.exp(logits[target]) / torch.exp(logits).sum()))
    return torch.stack(nats).mean()


def reference_gradients(
    config: ModelConfig, weights: Weights, tokens: list[list[int]], targets: list[list[int]]
) -> dict[str, Tensor]:
    """Derivative of the loss by every weight."""
    leaves = {name: weight.detach().double().requires_grad_() for name, weight in weights.items()}
    reference_loss(config, leaves, tokens, targets).backward()  # type: ignore[no-untyped-call]
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


_BLOCK = [
    "attention_norm.weight",
    "attention.wq.weight",
    "attention.wk.weight",
    "attention.wv.weight",
    "attention.wo.weight",
    "feed_forward_norm.weight",
    "feed_forward.w_gate.weight",
    "feed_forward.w_up.weight",
    "feed_forward.w_down.weight",
]


def _block(config: ModelConfig, w: Weights, hidden: list[Tensor]) -> list[Tensor]:
    """Pre-normalisation and residuals: arXiv 2302.13971, section 2.2."""
    normed = [_rms_norm(x, w["attention_norm.weight"], config.norm_eps) for x in hidden]
    hidden = [x + y for x, y in zip(hidden, _attention(config, w, normed), strict=True)]
    normed = [_rms_norm(x, w["feed_forward_norm.weight"], config.norm_eps) for x in hidden]
    return [x + _swiglu(w, y) for x, y in zip(hidden, normed, strict=True)]


def _rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """arXiv 1910.07467, equation 4, with eps under the root."""
    mean_square = sum(x[i] * x[i] for i in range(len(x))) / len(x)
    return x / (mean_square + eps) ** 0.5 * gain


def _attention(config: ModelConfig, w: Weights, hidden: list[Tensor]) -> list[Tensor]:
    """Scaled dot products (arXiv 1706.03762, equation 1), causal; heads in groups (arXiv 2305.13245, section 2.2)."""
    size, group = config.d_model // config.n_heads, config.n_heads // config.n_kv_heads
    heads: list[list[Tensor]] = []
    for head in range(config.n_heads):
        mine, shared = slice(head * size, (head + 1) * size), slice(head // group * size, (head // group + 1) * size)
        queries = [_turned(w["attention.wq.weight"][mine] @ x, t, config.rope_theta) for t, x in enumerate(hidden)]
        keys = [_turned(w["attention.wk.weight"][shared] @ x, t, config.rope_theta) for t, x in enumerate(hidden)]
        values = [w["attention.wv.weight"][shared] @ x for x in hidden]
        heads.append([_attend(queries[t], keys[: t + 1], values[: t + 1]) for t in range(len(hidden))])
    return [w["attention.wo.weight"] @ torch.cat([head[t] for head in heads]) for t in range(len(hidden))]


def _attend(query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    scores = [torch.exp(query @ key / math.sqrt(len(query))) for key in keys]
    total = torch.stack(scores).sum()
    return torch.stack([score / total * value for score, value in zip(scores, values, strict=True)]).sum(0)


def _turned(x: Tensor, position: int, theta: float) -> Tensor:
    """arXiv 2104.09864, section 3.2.2: the i-th plane turns by position * theta^(-2 i / size).

    The paper's i-th plane has axes 2 i and 2 i + 1; here they are i and i + size / 2, which is the same up to a
    permutation of the rows of the query and key matrices.
    """
    half = len(x) // 2
    turned: list[Tensor] = [x[0]] * len(x)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(x))
        turned[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        turned[i + half] = x[i] * math.sin(angle) + x[i + half] * math.cos(angle)
    return torch.stack(turned)


def _swiglu(w: Weights, x: Tensor) -> Tensor:
    """arXiv 2002.05202, equations 5 and 6."""
    gate = w["feed_forward.w_gate.weight"] @ x
    swish = gate / (1 + torch.exp(-gate))
    return w["feed_forward.w_down.weight"] @ (swish * (w["feed_forward.w_up.weight"] @ x))
