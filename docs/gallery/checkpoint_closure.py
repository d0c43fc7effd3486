"""A checkpoint recomputes with what its weights hold by then

`torch.utils.checkpoint` saves its arguments only. What the function reads besides, weights, masks, buffers, is
read again in backward, and nobody checks that it is what it was: not even a write that moves the counter is noticed.

Upstream: the documentation of `torch.utils.checkpoint` warns of "silently incorrect gradients" where the two runs
differ, "e.g., due to a global variable".
"""

import torch
from torch.utils.checkpoint import checkpoint

import torchguard


def gradient(decay: bool) -> torch.Tensor:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    scale = torch.tensor([3.0, 4.0])
    out = checkpoint(lambda x: (scale * x).sin(), x, use_reentrant=False)
    if decay:
        scale.mul_(0.5)
    out.sum().backward()
    return x.grad


print("the truth:    ", gradient(decay=False))
print("plain PyTorch:", gradient(decay=True))

with torchguard.strict():
    gradient(decay=True)
