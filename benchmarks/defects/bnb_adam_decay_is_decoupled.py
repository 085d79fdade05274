"""bitsandbytes' Adam with weight_decay is AdamW: the decay is not added to the gradient, as torch.optim.Adam's is.

Five steps with the same gradients, in 32 bits, where only the rule counts, and in 8 bits; distances are relative to the
distance between torch's Adam and AdamW.
"""

from __future__ import annotations

import torch
from steps import after
from verdict import Finding, Kind, conclude, ours

OPTIONS = {"lr": 1e-2, "weight_decay": 0.5}


def finding(kinds: dict[str, Kind]) -> Finding:
    start, grads = torch.randn(64, 256), [torch.randn(64, 256) for _ in range(5)]
    adam, _ = after(torch.optim.Adam, start, grads, **OPTIONS)
    adamw, _ = after(torch.optim.AdamW, start, grads, **OPTIONS)
    texts, shows_it = [], False
    for name, kind in kinds.items():
        param, _ = after(kind, start, grads, **OPTIONS)
        to_adam, to_adamw = (float((param - other).norm() / (adam - adamw).norm()) for other in (adam, adamw))
        texts.append(f"{name} is {to_adam:.1g} away from torch's Adam and {to_adamw:.1g} from its AdamW")
        shows_it = shows_it or to_adam > to_adamw
    return Finding("; ".join(texts), shows_it)


def theirs() -> Finding:
    from bitsandbytes.optim import Adam, Adam8bit

    return finding({"Adam": Adam, "Adam8bit": Adam8bit})


def own() -> Finding:
    return finding({"Adam": ours("Adam"), "Adam8bit": ours("Adam8bit")})


if __name__ == "__main__":
    conclude(theirs, own)
