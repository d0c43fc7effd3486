"""An average beside a student that learns from it (EMA as a teacher)"""

import torch
import torch.nn.functional as F
from ema_pytorch import EMA
from others_data import batches, perceptron, state

REQUIRES = ("ema-pytorch", "scikit-learn")


def train():
    net = perceptron()
    teacher = EMA(net, beta=0.9, update_after_step=0, update_every=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for images, labels in batches(4):
        out = net(images)
        loss = F.cross_entropy(out, labels) + F.mse_loss(out, teacher(images).detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update()
    teacher.copy_params_from_ema_to_model()
    return state(net, teacher)
