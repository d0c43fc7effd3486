"""vector_to_parameters points saved parameters elsewhere

`p.data = ...` writes nothing: it makes the very tensor that autograd saved point to other memory. No counter moves, and
backward reads the new values.

Upstream: of this function we know no report; [pytorch#30987](https://github.com/pytorch/pytorch/issues/30987) (open)
wants `.data` removed.
"""

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import torchguard


def gradient(perturb: bool) -> torch.Tensor:
    scale = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    loss = (scale * x).sum()
    if perturb:
        vector_to_parameters(parameters_to_vector([scale]) + 5, [scale])
    loss.backward()
    return x.grad


print("the truth:    ", gradient(perturb=False))
print("plain PyTorch:", gradient(perturb=True))

with torchguard.strict():
    gradient(perturb=True)
