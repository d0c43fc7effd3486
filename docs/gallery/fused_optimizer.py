"""A fused optimiser moves no version counter

`fused=True` hands the whole step to one kernel, and that kernel writes to the parameters without touching their
counters: PyTorch's check sees nothing. Without `fused=True` the same program is refused.

Upstream: we know no report. `make probe` lists every operator of torch that writes this way.
"""

import torch

import torchguard


def gradient(step: bool) -> torch.Tensor:
    w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=0.5, fused=True)
    first, second = (w * x).sum(), (w * x).prod()
    first.backward()
    if step:
        optimizer.step()
    x.grad = None
    second.backward()
    return x.grad


print("the truth:    ", gradient(step=False))
print("plain PyTorch:", gradient(step=True))

with torchguard.strict():
    gradient(step=True)
