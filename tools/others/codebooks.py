"""Vector quantisation: codebooks that follow the data, also residual and orthogonal ones"""

import torch
import torch.nn.functional as F
from torch import nn
from vector_quantize_pytorch import ResidualVQ, VectorQuantize

REQUIRES = ("vector-quantize-pytorch",)
ALARM = (
    "True, and without consequence: the codebook that the distances were computed with is written to while the graph "
    "of the distances is alive, but with these options no gradient goes through them. `strict()` says *if backward "
    'reads it*; with `at="read"` it is silent.'
)

KINDS = (
    lambda: VectorQuantize(dim=8, codebook_size=16, decay=0.8),
    lambda: VectorQuantize(dim=8, codebook_size=16, use_cosine_sim=True, threshold_ema_dead_code=2),
    lambda: ResidualVQ(dim=8, codebook_size=16, num_quantizers=3, shared_codebook=True),
    lambda: VectorQuantize(dim=8, codebook_size=16, orthogonal_reg_weight=1.0),
    lambda: VectorQuantize(dim=8, codebook_size=16, rotation_trick=True),
)


def train():
    trained = []
    for kind in KINDS:
        torch.manual_seed(0)
        quantizer = kind()
        encoder, decoder = nn.Linear(12, 8), nn.Linear(8, 12)
        parameters = [*encoder.parameters(), *decoder.parameters(), *quantizer.parameters()]
        optimizer = torch.optim.Adam(parameters, lr=1e-2)
        for _ in range(5):
            x = torch.randn(4, 10, 12)
            quantized, _, commitment = quantizer(encoder(x))
            loss = F.mse_loss(decoder(quantized), x) + commitment.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for module in (encoder, decoder, quantizer):
            trained += [tensor.detach() for tensor in module.state_dict().values()]
    return trained
