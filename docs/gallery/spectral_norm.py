"""A spectral norm keeps its singular vectors by `.data`, and the critic is called twice

Each forward improves the two vectors and assigns them, `u.data = ...`. A critic that sees the real images, then the
fake ones, and goes backward once, computes the first gradient with the second pair of vectors. PyTorch's own
`spectral_norm` wrote over its vectors, too, and has cloned them since 2018; torchgan 0.1.0 does what is shown here
([other people's code](others.md)).

Upstream: [pytorch#13350](https://github.com/pytorch/pytorch/pull/13350)
"""

import torch
import torch.nn.functional as F

import torchguard


def gradient(fake_images: bool) -> torch.Tensor:
    weight = torch.tensor([[2.0, 0.0], [1.0, 1.0]], requires_grad=True)
    u = torch.nn.Parameter(torch.tensor([1.0, 0.0]), requires_grad=False)
    v = torch.nn.Parameter(torch.tensor([0.0, 1.0]), requires_grad=False)

    def critic(images: torch.Tensor) -> torch.Tensor:
        v.data = F.normalize(weight.t() @ u, dim=0).detach()
        u.data = F.normalize(weight @ v, dim=0).detach()
        return (images @ (weight / u.dot(weight @ v))).sum()

    real = critic(torch.tensor([1.0, 2.0]))
    if fake_images:
        critic(torch.tensor([3.0, 4.0]))
    return torch.autograd.grad(real, weight)[0]  # that of the real images alone


print("the truth:    ", gradient(fake_images=False))
print("plain PyTorch:", gradient(fake_images=True))

with torchguard.strict():
    gradient(fake_images=True)
