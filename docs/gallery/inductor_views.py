"""torch.compile loses the check for saved views of inputs

Eager PyTorch stops a loop that loads the next batch into its input buffer before backward. Inductor saves a view of the
buffer, rebuilt without its counter.

Upstream: [pytorch#197887](https://github.com/pytorch/pytorch/issues/197887)
"""

import torch

import torchguard


@torch.compile(backend="inductor")
def layer(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x @ w


def gradient(next_batch: bool) -> torch.Tensor:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    w = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    out = layer(x, w)
    if next_batch:
        x.copy_(torch.tensor([[50.0, 60.0], [70.0, 80.0]]))
    out.sum().backward()
    return w.grad


print("the truth:    ", gradient(next_batch=False))
print("plain PyTorch:", gradient(next_batch=True))

with torchguard.strict():
    gradient(next_batch=True)
