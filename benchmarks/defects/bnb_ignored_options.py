"""bitsandbytes' SGD8bit takes nesterov and dampening, its RMSprop8bit momentum, and does nothing with them.

Five steps with and without the option: bits that stay the same mean that it was ignored without a word.
"""

from __future__ import annotations

from typing import Any

import torch
from steps import after
from verdict import Finding, Kind, conclude, ours

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("SGD8bit", {"lr": 1e-2, "momentum": 0.9}, {"nesterov": True}),
    ("SGD8bit", {"lr": 1e-2, "momentum": 0.9}, {"dampening": 0.5}),
    ("RMSprop8bit", {"lr": 1e-2}, {"momentum": 0.9}),
]


def effect(kind: Kind, options: dict[str, Any], more: dict[str, Any]) -> str:
    start, grads = torch.randn(64, 256), [torch.randn(64, 256) for _ in range(5)]
    plain, _ = after(kind, start, grads, **options)
    try:
        with_it, _ = after(kind, start, grads, **options, **more)
    except (ValueError, NotImplementedError):
        return "refused"
    return "ignored" if torch.equal(plain, with_it) else "has an effect"


def finding(kinds: dict[str, Kind]) -> Finding:
    effects = [f"{name} {next(iter(more))}: {effect(kinds[name], options, more)}" for name, options, more in CASES]
    return Finding("; ".join(effects), any("ignored" in text for text in effects))


def theirs() -> Finding:
    from bitsandbytes.optim import RMSprop8bit, SGD8bit

    return finding({"SGD8bit": SGD8bit, "RMSprop8bit": RMSprop8bit})


def own() -> Finding:
    return finding({"SGD8bit": ours("SGD8bit"), "RMSprop8bit": ours("RMSprop8bit")})


if __name__ == "__main__":
    conclude(theirs, own)
