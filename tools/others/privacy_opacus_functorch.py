"""DP-SGD with torch.func (which refuses save hooks: its saves are not cloned)"""

import warnings

import torch
from opacus import PrivacyEngine
from others_data import digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

REQUIRES = ("opacus", "scikit-learn")
CLONED = False


def train():
    warnings.filterwarnings("ignore")
    return privately("functorch")


def privately(mode):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 10)
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    loader = DataLoader(TensorDataset(*digits(128)), batch_size=32)
    criterion = nn.CrossEntropyLoss()
    made = PrivacyEngine().make_private(
        module=net,
        optimizer=optimizer,
        data_loader=loader,
        criterion=criterion,
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        noise_generator=torch.Generator().manual_seed(1),
        grad_sample_mode=mode,
    )
    private, optimizer, *between, loader = made
    for _ in range(2):
        for images, labels in loader:
            optimizer.zero_grad()
            (between[0] if between else criterion)(private(images), labels).backward()
            optimizer.step()
    return net.state_dict().values()
