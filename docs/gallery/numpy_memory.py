"""NumPy writes to the memory of a tensor

`x.numpy()` and `torch.from_numpy` share memory. What NumPy does to it autograd cannot see at all.

Upstream: the discussion of [pytorch#6597](https://github.com/pytorch/pytorch/pull/6597)
"""

import torch

import torchguard


def gradient(normalise: bool) -> torch.Tensor:
    batch = torch.tensor([2.0, 4.0])
    array = batch.numpy()
    w = torch.tensor([1.0, 1.0], requires_grad=True)
    loss = (w * batch).sum()
    if normalise:
        array /= array.max()
    loss.backward()
    return w.grad


print("the truth:    ", gradient(normalise=False))
print("plain PyTorch:", gradient(normalise=True))

with torchguard.strict():
    gradient(normalise=True)
