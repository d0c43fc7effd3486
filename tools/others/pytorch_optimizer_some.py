"""SAM, Lookahead, LOMO (steps inside backward), schedule-free, Shampoo, Ranger21 and others"""

import pytorch_optimizer as po
import torch
import torch.nn.functional as F
from others_data import batches, perceptron, state

REQUIRES = ("pytorch-optimizer", "scikit-learn")

PLAIN = (
    "adabelief",
    "adahessian",
    "came",
    "diffgrad",
    "lamb",
    "lars",
    "madgrad",
    "prodigy",
    "ranger21",
    "shampoo",
    "sophiah",
    "soap",
)


def train():
    trained = []
    for name in PLAIN:
        kind = po.load_optimizer(name)
        given = {"num_iterations": 8} if name == "ranger21" else {}
        trained += run(lambda net, kind=kind, given=given: kind(net.parameters(), lr=1e-3, **given), name)
    trained += run(lambda net: po.Lookahead(po.AdamP(net.parameters(), lr=1e-3)), "lookahead")
    trained += run(lambda net: po.ScheduleFreeAdamW(net.parameters(), lr=1e-3), "schedule-free")
    trained += sam()
    trained += lomo()
    return trained


def run(make, name):
    net = perceptron()
    optimizer = make(net)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for images, labels in batches():
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward(create_graph=name in ("adahessian", "sophiah"))
        optimizer.step()
    if hasattr(optimizer, "eval"):
        optimizer.eval()
    return [tensor.detach() for tensor in state(net)]


def sam():
    net = perceptron()
    optimizer = po.SAM(net.parameters(), base_optimizer=torch.optim.SGD, lr=1e-2, momentum=0.9)
    for images, labels in batches():
        F.cross_entropy(net(images), labels).backward()
        optimizer.first_step(zero_grad=True)
        F.cross_entropy(net(images), labels).backward()
        optimizer.second_step(zero_grad=True)
    return state(net)


def lomo():
    net = perceptron()
    optimizer = po.LOMO(net, lr=1e-2)
    for images, labels in batches():
        optimizer.fused_backward(F.cross_entropy(net(images), labels), lr=1e-2)
    return state(net)
