"""Batch normalisation rewrites its running statistics behind every counter

In eval mode backward reads the running statistics that forward used. A training batch in between rewrites them, and
no counter moves.

Upstream: [pytorch#13402](https://github.com/pytorch/pytorch/issues/13402) (open since 2018),
[pytorch#120622](https://github.com/pytorch/pytorch/issues/120622)
"""

import torch

import torchguard


def gradient(train_between: bool) -> torch.Tensor:
    norm = torch.nn.BatchNorm1d(2)
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0]], requires_grad=True)
    loss = (norm.eval()(x) ** 2).sum()
    if train_between:
        norm.train()(torch.tensor([[10.0, 20.0], [30.0, 70.0]]))
    loss.backward()
    return x.grad


print("the truth:    ", gradient(train_between=False))
print("plain PyTorch:", gradient(train_between=True))

with torchguard.strict():
    gradient(train_between=True)
