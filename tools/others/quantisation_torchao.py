"""Quantisation-aware training, and the 8-bit and 4-bit optimisers"""

import torch
import torch.nn.functional as F
from others_data import batches, digits
from torch import nn
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.qat import QATConfig

REQUIRES = ("torchao", "scikit-learn")


def train():
    trained = []
    for kind in (AdamW8bit, AdamW4bit, AdamWFp8):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        quantize_(net, QATConfig(Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8), step="prepare"))
        optimizer = kind(net.parameters(), lr=1e-2)
        for images, labels in batches(1):
            optimizer.zero_grad()
            F.cross_entropy(net(images), labels).backward()
            optimizer.step()
        trained += [weight.detach().clone() for weight in net.state_dict().values()]
        trained.append(net(digits(16)[0]).detach())
    return trained
