"""A Wasserstein GAN on handwritten digits: what if its weights are clipped one line too early?

The critic of a WGAN must be Lipschitz; the original recipe clips each of its weights to [-c, c] after
each update:

    loss.backward()
    optimiser.step()
    for p in critic.parameters():
        p.data.clamp_(-CLIP, CLIP)

With `--mistake` the clip stands between the critic's forward and its backward. By then autograd has saved
the weights (the gradient of a layer is the gradient of the next one times that one's weights), and the
clip overwrites the saves: backward multiplies by weights that the forward never used.

Had the clip said `p.clamp_()` under `torch.no_grad()`, PyTorch would have refused at backward. `p.data`
is an alias with a version counter of its own: the write leaves no trace, training goes on, and its
gradients are wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import _common
import torchguard

GUARDS: _common.Guards = {"off": contextlib.nullcontext, "strict": torchguard.strict, "warn": torchguard.warn}

BATCH = 64
NOISE = 16
CLIP = 0.05
CRITIC_STEPS = 3
LEARNING_RATE = 5e-3


def make_critic() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))


def make_generator() -> nn.Module:
    return nn.Sequential(nn.Linear(NOISE, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())


@dataclass
class Gan:
    """The two players and their optimisers."""

    critic: nn.Module = field(default_factory=make_critic)
    generator: nn.Module = field(default_factory=make_generator)

    def __post_init__(self) -> None:
        self.critic_optimiser = torch.optim.RMSprop(self.critic.parameters(), LEARNING_RATE)
        self.generator_optimiser = torch.optim.RMSprop(self.generator.parameters(), LEARNING_RATE)


def clip_weights(critic: nn.Module) -> None:
    for p in critic.parameters():
        p.data.clamp_(-CLIP, CLIP)


def train_critic(gan: Gan, images: Tensor, mistake: bool) -> Tensor:
    """One update of the critic: real digits score high, made-up ones low."""
    real = images[torch.randint(len(images), (BATCH,))]
    fake = gan.generator(torch.randn(BATCH, NOISE)).detach()

    gan.critic_optimiser.zero_grad()
    loss: Tensor = gan.critic(fake).mean() - gan.critic(real).mean()
    if mistake:
        clip_weights(gan.critic)  # too early: autograd has saved these weights for the next line
    loss.backward()
    gan.critic_optimiser.step()
    if not mistake:
        clip_weights(gan.critic)
    return loss


def train_generator(gan: Gan) -> Tensor:
    """One update of the generator: its digits should score high."""
    gan.generator_optimiser.zero_grad()
    loss: Tensor = -gan.critic(gan.generator(torch.randn(BATCH, NOISE))).mean()
    loss.backward()
    gan.generator_optimiser.step()
    return loss


def main(argv: Sequence[str] | None = None) -> _common.Run:
    args = _common.arguments(
        __doc__, argv, steps=200, mistake="clip the weights between the critic's forward and its backward"
    )
    _common.make_repeatable(args.seed)
    images, _ = _common.digits()
    gan = Gan()
    losses = _common.Losses(args.steps)
    errors: list[_common.GradientError] = []

    with GUARDS[args.guard]():
        for step in range(args.steps):
            if args.measures(step):
                errors.append(_common.gradient_error(gan, lambda gan: train_critic(gan, images, args.mistake)))
            for _ in range(CRITIC_STEPS):
                critic_loss = train_critic(gan, images, args.mistake)
            generator_loss = train_generator(gan)
            losses.add(step, critic=critic_loss, generator=generator_loss)

    return _common.finish(losses, errors)


if __name__ == "__main__":
    main()
