"""A hand-written optimiser steps before the second loss has gone backward

Actor and critic share a body. The body's weights are updated through `.data` after the first backward, and the second
backward reads them. With `torch.optim.SGD` PyTorch refuses this; with a hand-written update it does not notice.

Upstream: [pytorch#5396](https://github.com/pytorch/pytorch/issues/5396) asked in 2018 that `.data` share the counter,
[pytorch#30987](https://github.com/pytorch/pytorch/issues/30987) (open) that it go.
"""

import torch

import torchguard


def gradient(step: bool) -> torch.Tensor:
    body = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    head = torch.tensor([1.0, -1.0], requires_grad=True)
    x = torch.tensor([0.5, 0.25], requires_grad=True)
    features = torch.tanh(head @ body * x)
    actor, critic = features.sum(), (features * features).sum()
    actor.backward(retain_graph=True)
    if step:
        for p in (body, head):
            p.data -= 0.5 * p.grad
    body.grad = head.grad = None
    critic.backward()
    return body.grad


print("the truth:    ", gradient(step=False))
print("plain PyTorch:", gradient(step=True))

with torchguard.strict():
    gradient(step=True)
