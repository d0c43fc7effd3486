"""fastai's optimisers, all hand-written on .data, and its Learner"""

from others_data import digits, perceptron, torchvision_without_cuda
from torch import nn

torchvision_without_cuda()

import fastai.optimizer as optimizers  # noqa: E402
from fastai.data.core import DataLoaders  # noqa: E402
from fastai.data.load import DataLoader  # noqa: E402
from fastai.learner import Learner  # noqa: E402

REQUIRES = ("fastai", "scikit-learn")


def train():
    trained = []
    for name in ("SGD", "RMSProp", "Adam", "RAdam", "QHAdam", "Larc", "Lamb", "ranger"):
        net = perceptron()
        pairs = list(zip(*digits(128), strict=True))
        loaders = DataLoaders(DataLoader(pairs, bs=32, num_workers=0), DataLoader(pairs[:32], bs=32, num_workers=0))
        learner = Learner(loaders, net, nn.CrossEntropyLoss(), opt_func=getattr(optimizers, name), lr=1e-2)
        with learner.no_logging():
            learner.fit(2)
        trained += net.state_dict().values()
    return trained
