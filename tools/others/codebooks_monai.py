"""A VQ-VAE whose codebook moves in forward (through .data), once no gradient can need it any more"""

import torch
import torch.nn.functional as F
from monai.networks.nets import VQVAE
from others_data import digits

REQUIRES = ("monai", "scikit-learn")


def train():
    torch.manual_seed(0)
    net = VQVAE(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=(8, 8),
        num_res_channels=(8, 8),
        num_res_layers=1,
        downsample_parameters=((2, 4, 1, 1),) * 2,
        upsample_parameters=((2, 4, 1, 1, 0),) * 2,
        num_embeddings=16,
        embedding_dim=8,
        decay=0.8,
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    images, _ = digits(128)
    for batch in images.view(-1, 1, 8, 8).split(32):
        first, commitment = net(batch)
        second, again = net(batch.flip(-1))  # the codebook has moved on before one backward for both
        loss = F.mse_loss(first, batch) + F.mse_loss(second.flip(-1), batch) + commitment + again
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.state_dict().values()
