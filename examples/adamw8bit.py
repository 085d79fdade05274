"""8-bit AdamW in a plain torch loop: a small network learns a function, with the state of its optimizer in 2 bytes per
parameter and moment pair instead of 8, stops, and goes on from a saved state dict with the same bits.

    python examples/adamw8bit.py
"""

from __future__ import annotations

import io

import torch
from torch import Tensor, nn

from holdfast.optim import AdamW8bit


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 1))


def make_optimizer(model: nn.Module) -> AdamW8bit:
    # Names make messages speak of "0.weight"; a group may override any option, here: exact moments for the last layer.
    named = list(model.named_parameters())
    return AdamW8bit([{"params": named[:-2]}, {"params": named[-2:], "bits": 32}], lr=1e-3, weight_decay=0.01)


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(step))
    return x, torch.sin(x.sum(1, keepdim=True))


def train(model: nn.Module, optimizer: AdamW8bit, steps: range) -> float:
    loss = torch.zeros(())
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def state_bytes(optimizer: AdamW8bit) -> int:
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))


def main() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"loss after 100 steps: {train(model, optimizer, range(100)):.4f}")
    print(f"state: {state_bytes(optimizer) / parameters:.2f} bytes per parameter")

    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    other = make_model()
    resumed = make_optimizer(other)
    saved.seek(0)
    checkpoint = torch.load(saved, weights_only=True)
    other.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["optimizer"])
    here, there = train(model, optimizer, range(100, 200)), train(other, resumed, range(100, 200))
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    print(f"loss after 200 steps: {here:.4f}, resumed: {there:.4f}, the same bits: {same}")


if __name__ == "__main__":
    main()
