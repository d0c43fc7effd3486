"""Optimisers that find their own rate, or forget little: Prodigy, D-Adaptation, CAME, AdaBelief, schedule-free"""

import torch.nn.functional as F
from adabelief_pytorch import AdaBelief
from came_pytorch import CAME
from dadaptation import DAdaptAdaGrad, DAdaptAdam, DAdaptSGD
from others_data import batches, perceptron, state
from prodigyopt import Prodigy
from schedulefree import AdamWScheduleFree, SGDScheduleFree

REQUIRES = ("prodigyopt", "dadaptation", "came-pytorch", "adabelief-pytorch", "schedulefree", "scikit-learn")

KINDS = (
    lambda on: Prodigy(on, weight_decay=0.01, safeguard_warmup=True),
    lambda on: DAdaptAdam(on, decouple=True, weight_decay=0.01),
    lambda on: DAdaptSGD(on, momentum=0.9, weight_decay=0.01),
    lambda on: DAdaptAdaGrad(on, momentum=0.9, eps=1e-6),
    lambda on: CAME(on, lr=1e-3, weight_decay=0.01),
    lambda on: AdaBelief(on, lr=1e-3, rectify=True, weight_decay=0.01, amsgrad=True, print_change_log=False),
    lambda on: AdamWScheduleFree(on, lr=1e-2, weight_decay=0.01),
    lambda on: SGDScheduleFree(on, lr=1e-1),
)


def train():
    trained = []
    for kind in KINDS:
        net = perceptron()
        optimizer = kind(net.parameters())
        averages = hasattr(optimizer, "train")
        for images, labels in batches():
            if averages:
                optimizer.train()
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
            if averages:
                optimizer.eval()
        trained += state(net)
    return trained
