"""All 30 optimisers, eight steps each"""

import torch
import torch.nn.functional as F
import torch_optimizer
from others_data import batches, perceptron, state

REQUIRES = ("torch-optimizer", "scikit-learn", "setuptools<81")
ALARM = (
    "True, and without consequence: Adahessian needs `backward(create_graph=True)`, so that a graph in which the "
    "weights are saved hangs on each gradient while it assigns `p.data`; nobody goes backward through it any more. "
    "The other optimisers are silent."
)


def train():
    trained = []
    names = sorted(name for name, kind in vars(torch_optimizer).items() if _is_optimizer(kind))
    for name in names:
        net = perceptron()
        given = {"base_optimizer": torch.optim.SGD} if name == "SAM" else {}
        if name == "Lookahead":
            optimizer = torch_optimizer.Lookahead(torch.optim.SGD(net.parameters(), lr=1e-2))
        else:
            optimizer = getattr(torch_optimizer, name)(net.parameters(), lr=1e-3, **given)
        for images, labels in batches():
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward(create_graph=name == "Adahessian")
            optimizer.step()
        trained += [tensor.detach() for tensor in state(net)]
    return trained


def _is_optimizer(kind):
    return isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
