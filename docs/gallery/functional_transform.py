"""Inside torch.func nothing watches `.data` either

`torch.func.grad` differentiates the function; a write through `.data` inside it changes what its backward reads.

Upstream: [pytorch#94817](https://github.com/pytorch/pytorch/pull/94817) made `x.data = y` inside a transform an
error; writing through `x.data` is not one.
"""

import torch

import torchguard


def gradient(clip: bool) -> torch.Tensor:
    def loss(x: torch.Tensor) -> torch.Tensor:
        hidden = x.exp()
        if clip:
            hidden.data.clamp_(max=1.0)
        return hidden.sum()

    return torch.func.grad(loss)(torch.tensor([-1.0, 1.0, 2.0]))


print("the truth:    ", gradient(clip=False))
print("plain PyTorch:", gradient(clip=True))

with torchguard.strict():
    gradient(clip=True)
