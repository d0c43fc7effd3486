"""Functional updates in place, and a meta-optimiser that differentiates through its steps"""

import torch
import torch.nn.functional as F
import torchopt
from others_data import digits
from torch import nn

REQUIRES = ("torchopt", "scikit-learn")


def train():
    return [*functional(), *meta()]


def functional():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    parameters = tuple(net.parameters())
    optimizer = torchopt.adam(lr=1e-2)
    state = optimizer.init(parameters)
    images, labels = digits(128)
    for _ in range(4):
        gradients = torch.autograd.grad(F.cross_entropy(net(images), labels), parameters)
        updates, state = optimizer.update(gradients, state, inplace=True)
        torchopt.apply_updates(parameters, updates, inplace=True)
    return parameters


def meta():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    rate = nn.Parameter(torch.tensor(1.0))
    outer = torch.optim.Adam([rate], lr=1e-2)
    inner = torchopt.MetaAdam(net, lr=1e-2)
    images, labels = digits(128)
    for _ in range(3):
        start, memory = torchopt.extract_state_dict(net), torchopt.extract_state_dict(inner)
        for _ in range(2):
            inner.step(F.cross_entropy(net(images[:64]), labels[:64]) * rate)
        outer.zero_grad()
        F.cross_entropy(net(images[64:]), labels[64:]).backward()
        outer.step()
        torchopt.recover_state_dict(net, start)
        torchopt.recover_state_dict(inner, memory)
        torchopt.stop_gradient(net)
        torchopt.stop_gradient(inner)
    return [rate, *net.state_dict().values()]
