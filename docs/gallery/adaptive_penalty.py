"""The weight of a penalty adapts itself by `.data`, once the loss has been computed with it

`loss = objective + beta * divergence`: autograd saves `beta` for the gradient of the divergence. A forward that then
adapts `beta` for the next step has this step's backward read the new one: the gradient of the penalty is off by that
factor in every step in which the weight adapts. torchrl 0.14.1 does what is shown here in `KLPENPPOLoss`
([other people's code](others.md)).

Upstream: we know no report.
"""

import torch

import torchguard


class Penalised(torch.nn.Module):
    def __init__(self, target: float) -> None:
        super().__init__()
        self.target = target
        self.beta = torch.nn.Buffer(torch.tensor(1.0))

    def forward(self, objective: torch.Tensor, divergence: torch.Tensor) -> torch.Tensor:
        loss = objective + self.beta * divergence
        if divergence > self.target:
            self.beta.data *= 2.0
        return loss


def gradient(target: float) -> torch.Tensor:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = Penalised(target)(weight.sum(), weight.pow(2).sum())
    return torch.autograd.grad(loss, weight)[0]


print("the truth:    ", gradient(target=100.0))
print("plain PyTorch:", gradient(target=0.1))

with torchguard.strict():
    gradient(target=0.1)
