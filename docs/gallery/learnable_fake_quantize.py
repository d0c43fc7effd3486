"""PyTorch's learnable fake quantisation estimates its scale by `.data`, and is called twice

While it estimates (`enable_static_estimate()`), each forward of `torch.ao`'s learnable fake quantisation writes the
scale of what it has just seen over that of the forward before, `scale.data.copy_(...)`. One that is shared by two
branches, or sees two batches before one backward, tells the first by the second's scale which values were clipped: what
was inside the range then gets no gradient.

Upstream: we know no report.
"""

import torch
from torch.ao.quantization import MovingAverageMinMaxObserver
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

import torchguard


def gradient(second_branch: bool) -> torch.Tensor:
    quantize = _LearnableFakeQuantize(MovingAverageMinMaxObserver, 0, 255, averaging_constant=0.5)
    quantize.enable_static_estimate()
    x = torch.linspace(-1.0, 1.0, 5, requires_grad=True)
    out = quantize(x)
    if second_branch:
        quantize(torch.tensor([-0.1, 0.1]))
    return torch.autograd.grad(out.sum(), x)[0]


print("the truth:    ", gradient(second_branch=False))
print("plain PyTorch:", gradient(second_branch=True))

with torchguard.strict():
    gradient(second_branch=True)
