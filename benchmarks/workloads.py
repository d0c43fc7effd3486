"""What do the benchmarks run? Each workload is a function that sets up and returns one training step.

Two chains of tiny operations, where the cost of a save and of a write shows undiluted, and three small models
trained the way people train them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F

Step = Callable[[], None]


def chain(device: str) -> Step:
    """150 tiny operations on 8 elements."""
    x = torch.randn(8, device=device, requires_grad=True)

    def step() -> None:
        h = x
        for _ in range(50):
            h = (h * 1.01).sin() + 0.1
        h.sum().backward()
        x.grad = None

    return step


def chain_in_place(device: str) -> Step:
    """150 tiny operations, 100 of them in place, all saves live."""
    x = torch.randn(8, device=device, requires_grad=True)

    def step() -> None:
        h = x
        for _ in range(50):
            h = h.sin()
            h.add_(0.1)
            h.mul_(1.01)
        h.sum().backward()
        x.grad = None

    return step


def _mlp(device: str) -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Linear(256, 256),
        torch.nn.ReLU(),
        torch.nn.Linear(256, 256),
        torch.nn.ReLU(),
        torch.nn.Linear(256, 10),
    ).to(device)


def mlp(device: str) -> Step:
    """A multi-layer perceptron of width 256, batch 64, SGD."""
    model = _mlp(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(64, 256, device=device), torch.randint(0, 10, (64,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def legacy(device: str) -> Step:
    """The same model with a hand-written ``.data`` optimiser and an EMA copy."""
    model = _mlp(device)
    average = copy.deepcopy(model)
    x, y = torch.randn(64, 256, device=device), torch.randint(0, 10, (64,), device=device)

    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for p in model.parameters():
            assert p.grad is not None
            p.data.add_(p.grad.data, alpha=-0.01)
        for p, q in zip(model.parameters(), average.parameters(), strict=True):
            q.data.mul_(0.99).add_(p.data, alpha=0.01)

    return step


def transformer(device: str) -> Step:
    """A transformer encoder of two layers, AdamW."""
    layer = torch.nn.TransformerEncoderLayer(128, 4, 256, batch_first=True, dropout=0.0)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(16, 32, 128, device=device)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


WORKLOADS: dict[str, Callable[[str], Step]] = {
    "chain": chain,
    "chain_in_place": chain_in_place,
    "mlp": mlp,
    "legacy": legacy,
    "transformer": transformer,
}
