"""What do the trainings in ``tools/others/`` learn from, and what do they train?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def digits(count: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """scikit-learn's handwritten digits: images [count, 64] between 0 and 1, labels [count]."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images[:count], dtype=torch.float32) / 16, torch.tensor(labels[:count])


def batches(epochs: int = 2, size: int = 64) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The digits, in order, a few times."""
    images, labels = digits()
    for _ in range(epochs):
        yield from zip(images.split(size), labels.split(size), strict=True)


def perceptron() -> nn.Sequential:
    """The same small network each time: 64 inputs, 10 classes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))


def state(*modules: nn.Module) -> list[torch.Tensor]:
    """All that was trained: weights and buffers."""
    return [tensor for module in modules for tensor in module.state_dict().values()]


def torchvision_without_cuda() -> None:
    """Let torchvision be imported where PyPI's wheel, built for CUDA, meets a CPU build of torch.

    It names two operators at import that its library then lacks; who needs no operator of its does without them.
    """
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            _OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
