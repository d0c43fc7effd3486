"""MAML: three differentiable inner steps a task, through the optimiser's own state"""

import higher
import torch
import torch.nn.functional as F
from others_data import digits
from torch import nn

REQUIRES = ("higher", "scikit-learn")


def train():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    outer = torch.optim.Adam(net.parameters(), lr=1e-2)
    images, labels = digits(256)
    for kind in (torch.optim.SGD, torch.optim.Adam):
        for task in range(4):
            few, many = slice(64 * task, 64 * task + 16), slice(64 * task + 16, 64 * task + 64)
            inner = kind(net.parameters(), lr=1e-2)
            outer.zero_grad()
            with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fast, stepper):
                for _ in range(3):
                    stepper.step(F.cross_entropy(fast(images[few]), labels[few]))
                F.cross_entropy(fast(images[many]), labels[many]).backward()
            outer.step()
    return net.state_dict().values()
