"""Vector quantisation whose gradient goes through the distances to a codebook that moves in forward"""

import torch
import torch.nn.functional as F
from torch import nn
from vector_quantize_pytorch import VectorQuantize

REQUIRES = ("vector-quantize-pytorch",)
CORRUPTS = True
ALARM = (
    "True. `forward` moves the codebook by `embed.data.copy_` once it has computed the distances to it. With a loss "
    "on the distances, or codes sampled with a gradient, backward needs the codebook that they were computed with and "
    "reads the moved one. In the [gallery](gallery.md)."
)

KINDS = (
    {"commitment_use_cross_entropy_loss": True},
    {"commitment_use_cross_entropy_loss": True, "use_cosine_sim": True},
    {"straight_through": True, "rotation_trick": False, "stochastic_sample_codes": True, "sample_codebook_temp": 1.0},
)


def train():
    trained = []
    for kind in KINDS:
        torch.manual_seed(0)
        quantizer = VectorQuantize(dim=8, codebook_size=16, **kind)
        encoder, decoder = nn.Linear(12, 8), nn.Linear(8, 12)
        optimizer = torch.optim.SGD([*encoder.parameters(), *decoder.parameters()], lr=0.1)
        for _ in range(3):
            x = torch.randn(4, 10, 12)
            quantized, _, commitment = quantizer(encoder(x))
            loss = F.mse_loss(decoder(quantized), x) + commitment.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for module in (encoder, decoder, quantizer):
            trained += [tensor.detach() for tensor in module.state_dict().values()]
    return trained
