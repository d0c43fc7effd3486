"""A ConvNeXt and a MobileNet with timm's optimisers, average of the weights, adaptive clipping"""

import torch
import torch.nn.functional as F
from others_data import torchvision_without_cuda

torchvision_without_cuda()

import timm  # noqa: E402
import timm.optim  # noqa: E402
import timm.utils  # noqa: E402

REQUIRES = ("timm",)

#: With a Lookahead around one of them.
OPTIMIZERS = ("adafactor", "adamp", "lamb", "lars", "lookahead_radam", "madgrad", "nadamw", "novograd", "sgdp", "lion")


def train():
    trained = []
    for model in ("test_convnext", "test_efficientnet"):
        for name in OPTIMIZERS:
            torch.manual_seed(0)
            net = timm.create_model(model, num_classes=4)
            average = timm.utils.ModelEmaV3(net, decay=0.9)
            optimizer = timm.optim.create_optimizer_v2(net, opt=name, lr=1e-3, weight_decay=0.01)
            for step in range(3):
                images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
                optimizer.zero_grad()
                F.cross_entropy(net(images), labels).backward()
                timm.utils.dispatch_clip_grad(net.parameters(), 0.02, mode="agc")
                optimizer.step()
                average.update(net, step=step)
            trained += [*net.state_dict().values(), *average.module.state_dict().values()]
    return trained
