"""A GAN whose critic is spectrally normalised, fed real and fake images before one backward"""

import torch
import torch.nn.functional as F
from others_data import digits, torchvision_without_cuda
from torch import nn

torchvision_without_cuda()

from torchgan.layers import SpectralNorm2d  # noqa: E402

REQUIRES = ("torchgan", "scikit-learn", "setuptools<81")
CORRUPTS = True
ALARM = (
    "True. Every forward assigns new singular vectors to `u.data` and `v.data`, which the previous forward has saved "
    "for the gradient of `sigma`. A critic that sees real and fake images before one backward gets the gradient of the "
    "first with the vectors of the second. PyTorch's own `spectral_norm` clones them for this reason "
    "([pytorch#13350](https://github.com/pytorch/pytorch/pull/13350)). In the [gallery](gallery.md)."
)


def train():
    torch.manual_seed(0)
    critic = nn.Sequential(
        SpectralNorm2d(nn.Conv2d(1, 4, 3)), nn.LeakyReLU(0.2, inplace=True), nn.Flatten(), nn.Linear(144, 1)
    )
    generator = nn.Sequential(nn.Linear(8, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))
    critics = torch.optim.SGD([p for p in critic.parameters() if p.requires_grad], lr=0.1)
    generators = torch.optim.SGD(generator.parameters(), lr=0.1)
    images, _ = digits(128)
    for real in images.view(-1, 1, 8, 8).split(32):
        fake = generator(torch.randn(32, 8))
        critics.zero_grad()
        (F.relu(1 - critic(real)).mean() + F.relu(1 + critic(fake.detach())).mean()).backward()
        critics.step()
        generators.zero_grad()
        (-critic(fake).mean()).backward()
        generators.step()
    return [*critic.state_dict().values(), *generator.state_dict().values()]
