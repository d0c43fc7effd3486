"""What do the benchmarks run? Each workload is a function that sets up and returns one training step.

Two chains of tiny operations, where the cost of a save and of a write shows undiluted; models trained the way people
train them, small and not so small, compiled and under autocast; and single kernels on small and on large tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Step = Callable[[], object]


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


def mlp_model(device: str) -> torch.nn.Sequential:
    """Three layers of width 256, 256 and 10."""
    return torch.nn.Sequential(
        torch.nn.Linear(256, 256),
        torch.nn.ReLU(),
        torch.nn.Linear(256, 256),
        torch.nn.ReLU(),
        torch.nn.Linear(256, 10),
    ).to(device)


def mlp(device: str) -> Step:
    """A multi-layer perceptron of width 256, batch 64, SGD."""
    model = mlp_model(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(64, 256, device=device), torch.randint(0, 10, (64,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def legacy(device: str) -> Step:
    """The same model with a hand-written ``.data`` optimiser and an EMA copy."""
    model = mlp_model(device)
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


class _Residual(torch.nn.Module):
    """Two convolutions with batch normalisation, and a way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            torch.nn.BatchNorm2d(channels),
            torch.nn.ReLU(inplace=True),
            torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            torch.nn.BatchNorm2d(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.body(x), inplace=True)


def conv_net(device: str) -> Step:
    """A ResNet-style net of four residual blocks on 16 images of 32 by 32, SGD with momentum."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3, padding=1),
        *(_Residual(16) for _ in range(4)),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 10),
    ).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = torch.randn(16, 3, 32, 32, device=device), torch.randint(0, 10, (16,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def gru(device: str) -> Step:
    """A GRU cell over 200 steps, Adam."""
    cell = torch.nn.GRUCell(32, 64).to(device)
    optimizer = torch.optim.Adam(cell.parameters())
    x = torch.randn(200, 8, 32, device=device)

    def step() -> None:
        optimizer.zero_grad()
        h = torch.zeros(8, 64, device=device)
        for row in x:
            h = cell(row, h)
        h.square().mean().backward()
        optimizer.step()

    return step


class _GPT(torch.nn.Module):
    def __init__(self, words: int = 256, width: int = 128, layers: int = 2) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(words, width)
        self.places = torch.nn.Parameter(torch.zeros(64, width))
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict(
                {
                    "before": torch.nn.LayerNorm(width),
                    "qkv": torch.nn.Linear(width, 3 * width),
                    "out": torch.nn.Linear(width, width),
                    "between": torch.nn.LayerNorm(width),
                    "up": torch.nn.Linear(width, 4 * width),
                    "down": torch.nn.Linear(4 * width, width),
                }
            )
            for _ in range(layers)
        )
        self.head = torch.nn.Linear(width, words, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens) + self.places[: tokens.shape[1]]
        blocks: Any = self.blocks
        for block in blocks:
            parts = block["qkv"](block["before"](x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
            seen = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
            x = x + block["out"](seen.transpose(1, 2).flatten(2))
            x = x + block["down"](F.gelu(block["up"](block["between"](x))))
        logits: torch.Tensor = self.head(x)
        return logits


def gpt(device: str) -> Step:
    """A GPT of two layers; gradients of four small batches accumulated, clipped, AdamW."""
    model = _GPT().to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(0, 256, (4, 4, 33), device=device)

    def step() -> None:
        optimizer.zero_grad()
        for batch in tokens:
            logits = model(batch[:, :-1])
            (F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()) / len(tokens)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def mlp_compiled(device: str) -> Step:
    """The multi-layer perceptron, compiled."""
    model = mlp_model(device)
    compiled = torch.compile(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(64, 256, device=device), torch.randint(0, 10, (64,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(compiled(x), y).backward()
        optimizer.step()

    return step


def mlp_autocast(device: str) -> Step:
    """The multi-layer perceptron in bfloat16 by autocast."""
    plain = mlp_model(device)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    x, y = torch.randn(64, 256, device=device), torch.randint(0, 10, (64,), device=device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = F.cross_entropy(plain(x), y)
        loss.backward()
        optimizer.step()

    return step


WORKLOADS: dict[str, Callable[[str], Step]] = {
    "chain": chain,
    "chain_in_place": chain_in_place,
    "mlp": mlp,
    "legacy": legacy,
    "transformer": transformer,
    "conv_net": conv_net,
    "gru": gru,
    "gpt": gpt,
    "mlp_compiled": mlp_compiled,
    "mlp_autocast": mlp_autocast,
}

SIZES = {"small": 8, "large": 512}


def _kernel(make: Callable[[torch.Tensor], Step], n: int) -> Callable[[str], Step]:
    """A single kernel on an ``n`` by ``n`` tensor, a save alive elsewhere, as in the middle of a step."""

    def setup(device: str) -> Step:
        kept = torch.ones(2, device=device, requires_grad=True).exp()
        once = make(torch.randn(n, n, device=device))

        def step() -> None:
            once()
            assert kept.requires_grad

        return step

    return setup


def _add_in_place(x: torch.Tensor) -> Step:
    return lambda: x.add_(1.0)


def _matmul(x: torch.Tensor) -> Step:
    w = x.clone().requires_grad_()
    return lambda: x @ w


def _softmax(x: torch.Tensor) -> Step:
    w = x.clone().requires_grad_()
    return lambda: w.softmax(-1)


def _compiled(make: Callable[[torch.Tensor], Step]) -> Callable[[torch.Tensor], Step]:
    return lambda x: torch.compile(make(x))


def _under_autocast(make: Callable[[torch.Tensor], Step]) -> Callable[[torch.Tensor], Step]:
    def make_both(x: torch.Tensor) -> Step:
        once = make(x)

        def both() -> None:
            with torch.autocast(x.device.type, dtype=torch.bfloat16):
                once()

        return both

    return make_both


def _data(x: torch.Tensor) -> Step:
    return lambda: x.data


def _set_item(x: torch.Tensor) -> Step:
    def once() -> None:
        x[0] = 1.0

    return once


def _optimizer(kind: type[torch.optim.Optimizer], **options: object) -> Callable[[torch.Tensor], Step]:
    def make(x: torch.Tensor) -> Step:
        parameters = [torch.nn.Parameter(x.clone()) for _ in range(8)]
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer: Any = kind(parameters, **options)  # type: ignore[arg-type]
        return lambda: optimizer.step()

    return make


_KERNELS: dict[str, Callable[[torch.Tensor], Step]] = {
    "add_": _add_in_place,
    "matmul": _matmul,
    "softmax": _softmax,
    "data": _data,
    "setitem": _set_item,
    "adamw foreach": _optimizer(torch.optim.AdamW, foreach=True),
    "adamw fused": _optimizer(torch.optim.AdamW, fused=True),
    "sgd fused": _optimizer(torch.optim.SGD, lr=0.01, fused=True),
    "softmax compiled": _compiled(_softmax),
    "matmul autocast": _under_autocast(_matmul),
}

#: Single kernels, each on small and on large tensors.
KERNELS: dict[str, Callable[[str], Step]] = {
    f"{name} {size}": _kernel(make, n) for name, make in _KERNELS.items() for size, n in SIZES.items()
}
