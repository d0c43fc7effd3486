"""A WGAN clips its critic between forward and backward

The clip belongs after the optimiser's step. One line too early, it rewrites the weights that backward is about to read.

Upstream: a mistake of the program's; [pytorch#6990](https://github.com/pytorch/pytorch/issues/6990) explains why
`.detach()` would have had it refused.
"""

import torch

import torchguard


def gradient(clip: bool) -> torch.Tensor:
    torch.manual_seed(0)
    critic = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    loss = critic(torch.ones(4, 2)).mean()
    if clip:
        for p in critic.parameters():
            p.data.clamp_(-0.01, 0.01)
    loss.backward()
    return critic[0].bias.grad


print("the truth:    ", gradient(clip=False))
print("plain PyTorch:", gradient(clip=True))

with torchguard.strict():
    gradient(clip=True)
