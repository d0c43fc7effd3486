"""Lion, with decay"""

import torch.nn.functional as F
from lion_pytorch import Lion
from others_data import batches, perceptron, state

REQUIRES = ("lion-pytorch", "scikit-learn")


def train():
    net = perceptron()
    optimizer = Lion(net.parameters(), lr=1e-3, weight_decay=1e-2)
    for images, labels in batches():
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return state(net)
