"""An actor and a critic that share a trunk: what if the actor's update comes between the two backwards?

A contextual bandit on handwritten digits: the actor looks at a digit and bets on one of ten answers, the
reward is 1 for the right one and 0 for any other, and the critic learns which reward to expect. Both stand
on the same trunk. The optimiser (RMSprop) is written by hand:

    square.mul_(SMOOTHING).addcmul_(p.grad, p.grad, value=1 - SMOOTHING)
    p.data.addcdiv_(p.grad, square.sqrt().add_(1e-8), value=-LEARNING_RATE)

Right is: backward for both losses, then the update. With `--mistake` each of the two has a backward and an
update of its own (the first backward with `retain_graph=True`, as PyTorch's error message suggests). The
actor's update then moves the trunk's weights, which autograd has saved for the critic's backward: the
critic's gradients are computed with weights that its forward never saw.

Had the update said `p.addcdiv_()` under `torch.no_grad()`, PyTorch would have refused the second backward
with its famous "modified by an inplace operation". `p.data` silences the message, not the bug.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import _common
import torchguard

GUARDS: _common.Guards = {"off": contextlib.nullcontext, "strict": torchguard.strict, "warn": torchguard.warn}

BATCH = 64
LEARNING_RATE = 5e-3
SMOOTHING = 0.9
ENTROPY = 0.05


class ActorCritic(nn.Module):
    """A policy and a value on top of one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()
        )
        self.actor = nn.Linear(64, 10)
        self.critic = nn.Linear(64, 1)

    def forward(self, images: Tensor) -> tuple[torch.distributions.Categorical, Tensor]:
        features = self.trunk(images)
        return torch.distributions.Categorical(logits=self.actor(features)), self.critic(features).squeeze(1)


@dataclass
class Agent:
    """The model, and the running mean of each weight's squared gradient."""

    model: ActorCritic
    squares: dict[str, Tensor]


def make_agent() -> Agent:
    model = ActorCritic()
    return Agent(model, {name: torch.zeros_like(p) for name, p in model.named_parameters()})


def update(agent: Agent, parts: Iterable[str]) -> None:
    """RMSprop by hand, for the named parts of the model."""
    for name, p in agent.model.named_parameters():
        if p.grad is not None and name.startswith(tuple(parts)):
            square = agent.squares[name]
            square.mul_(SMOOTHING).addcmul_(p.grad, p.grad, value=1 - SMOOTHING)
            p.data.addcdiv_(p.grad, square.sqrt().add_(1e-8), value=-LEARNING_RATE)


def train(agent: Agent, images: Tensor, labels: Tensor, mistake: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Bet on a batch of digits, collect the rewards, learn from them."""
    chosen = torch.randint(len(images), (BATCH,))
    policy, value = agent.model(images[chosen])
    action = policy.sample()
    reward = (action == labels[chosen]).float()

    advantage = reward - value.detach()
    actor_loss = -(policy.log_prob(action) * advantage).mean() - ENTROPY * policy.entropy().mean()
    critic_loss = F.mse_loss(value, reward)

    agent.model.zero_grad()
    if mistake:
        actor_loss.backward(retain_graph=True)
        update(agent, ("trunk", "actor"))  # too early: the critic's backward needs the trunk as it was
        agent.model.zero_grad()
        critic_loss.backward()
        update(agent, ("trunk", "critic"))
    else:
        (actor_loss + critic_loss).backward()
        update(agent, ("trunk", "actor", "critic"))
    return actor_loss, critic_loss, reward.mean()


def main(argv: Sequence[str] | None = None) -> _common.Run:
    args = _common.arguments(__doc__, argv, steps=600, mistake="update the actor between its backward and the critic's")
    _common.make_repeatable(args.seed)
    images, labels = _common.digits()
    agent = make_agent()
    losses = _common.Losses(args.steps)
    errors: list[_common.GradientError] = []

    with GUARDS[args.guard]():
        for step in range(args.steps):
            if args.measures(step):
                errors.append(_common.gradient_error(agent, lambda agent: train(agent, images, labels, args.mistake)))
            actor_loss, critic_loss, reward = train(agent, images, labels, args.mistake)
            losses.add(step, actor=actor_loss, critic=critic_loss, reward=reward)

    return _common.finish(losses, errors)


if __name__ == "__main__":
    main()
