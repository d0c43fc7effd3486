"""A diffusion model, with its average copied in and out (through .data) around each look at what it makes"""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from others_data import digits

REQUIRES = ("diffusers", "scikit-learn")


def train():
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    averages = [EMAModel(net.parameters(), decay=0.9), EMAModel(net.parameters(), decay=0.9, foreach=True)]
    noising = DDPMScheduler(num_train_timesteps=20)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    images, _ = digits(64)
    looks = []
    for batch in images.view(-1, 1, 8, 8).split(16):
        noise = torch.randn_like(batch)
        steps = torch.randint(0, 20, (len(batch),))
        loss = F.mse_loss(net(noising.add_noise(batch, noise, steps), steps).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for average in averages:
            average.step(net.parameters())
            average.store(net.parameters())
            average.copy_to(net.parameters())
            with torch.no_grad():
                looks.append(net(noise, steps).sample)
            average.restore(net.parameters())
    return [*net.state_dict().values(), *averages[0].shadow_params, *averages[1].shadow_params, *looks]
