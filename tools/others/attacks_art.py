"""Feature adversaries (assigns .data in a loop), PGD and adversarial training"""

import numpy
import torch
from art.attacks.evasion import FeatureAdversariesPyTorch, ProjectedGradientDescentPyTorch
from art.defences.trainer import AdversarialTrainerMadryPGD
from art.estimators.classification import PyTorchClassifier
from others_data import digits
from torch import nn

REQUIRES = ("adversarial-robustness-toolbox", "scikit-learn")


def train():
    torch.manual_seed(0)
    numpy.random.seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    images, labels = digits(64)
    classifier = PyTorchClassifier(
        model=net,
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.Adam(net.parameters(), lr=1e-2),
        input_shape=(64,),
        nb_classes=10,
        clip_values=(0, 1),
        device_type="cpu",
    )
    classifier.fit(images.numpy(), labels.numpy(), batch_size=32, nb_epochs=2)
    AdversarialTrainerMadryPGD(classifier, nb_epochs=2, batch_size=32, max_iter=3).fit(images.numpy(), labels.numpy())
    hostile = ProjectedGradientDescentPyTorch(classifier, max_iter=3, verbose=False).generate(images[:8].numpy())
    kwargs = {"layer": 1, "max_iter": 5, "batch_size": 8, "optimizer": None, "step_size": 0.05, "random_start": False}
    features = FeatureAdversariesPyTorch(classifier, delta=0.2, **kwargs).generate(
        images[:8].numpy(), images[8:16].numpy()
    )
    return [*net.state_dict().values(), torch.tensor(hostile), torch.tensor(features)]
