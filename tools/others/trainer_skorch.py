"""A grid search of classifiers with gradient clipping and a schedule of rates"""

import torch
from others_data import digits
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from skorch.callbacks import GradientNormClipping, LRScheduler
from torch import nn

REQUIRES = ("skorch", "scikit-learn")


class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(inplace=True), nn.Linear(width, 10)
        )

    def forward(self, x):
        return self.body(x)


def train():
    torch.manual_seed(0)
    images, labels = digits(256)
    net = NeuralNetClassifier(
        Net,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.SGD,
        lr=0.1,
        max_epochs=3,
        verbose=0,
        callbacks=[GradientNormClipping(1.0), LRScheduler("StepLR", step_size=1)],
    )
    search = GridSearchCV(net, {"module__width": [8, 16]}, cv=2, scoring="accuracy")
    search.fit(images.numpy(), labels.numpy())
    return search.best_estimator_.module_.state_dict().values()
