"""Save hooks switch PyTorch's own check off

`save_on_cpu`, or any pair of `saved_tensors_hooks`: on the CPU nothing is copied, and autograd compares no versions
of what hooks return. An ordinary `add_` that PyTorch refuses elsewhere goes through here.

Upstream: we know no report; [pytorch#128545](https://github.com/pytorch/pytorch/pull/128545) tells how versions and
hooks meet.
"""

import torch

import torchguard


def gradient(shift: bool) -> torch.Tensor:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    with torch.autograd.graph.save_on_cpu():
        out = x.exp()
    if shift:
        with torch.no_grad():
            out.add_(10)
    out.sum().backward()
    return x.grad


print("the truth:    ", gradient(shift=False))
print("plain PyTorch:", gradient(shift=True))

with torchguard.strict():
    gradient(shift=True)
