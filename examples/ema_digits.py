"""A mean teacher on handwritten digits: what if the update comes between a loss and its backward?

A student learns from few labels, and from agreeing, on noisy digits, with a teacher: the moving average
(EMA) of its own weights, which is also the model that is used in the end. The optimiser is written by
hand, as it was in the days before `torch.no_grad()`:

    v.mul_(MOMENTUM).add_(p.grad)
    p.data.add_(v, alpha=-LEARNING_RATE)

Each of the two losses has its own update. That is right as long as each has its own forward, too. With
`--mistake` both forwards run first, to save time: the update for the first loss then stands between the
forward and the backward of the second one, and overwrites the weights that autograd has saved for it.

With an optimiser of `torch.optim` PyTorch would refuse ("modified by an inplace operation"). A write
through `p.data` does not count as one: backward mixes the old activations with the new weights, and
nobody says a word.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import _common
import torchguard

GUARDS: _common.Guards = {"off": contextlib.nullcontext, "strict": torchguard.strict, "warn": torchguard.warn}

BATCH = 64
LABELLED = 200
TRAINING = 1500  # the remaining 297 digits test the teacher
LEARNING_RATE = 0.5
MOMENTUM = 0.5
DECAY = 0.98
NOISE = 0.3


@dataclass
class MeanTeacher:
    """The student, the moving average of its weights, and the velocity of each of its weights."""

    student: nn.Module
    teacher: nn.Module
    velocities: list[Tensor]


def make_mean_teacher() -> MeanTeacher:
    student = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    return MeanTeacher(student, copy.deepcopy(student), [torch.zeros_like(p) for p in student.parameters()])


def classification_loss(student: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The student should know the few digits that have a label."""
    chosen = torch.randint(LABELLED, (BATCH,))
    return F.cross_entropy(student(images[chosen]), labels[chosen])


def consistency_loss(model: MeanTeacher, images: Tensor) -> Tensor:
    """On a noisy digit the student should say what the teacher says on the clean one."""
    chosen = images[torch.randint(TRAINING, (BATCH,))]
    with torch.no_grad():
        target = model.teacher(chosen).softmax(dim=1)
    return F.cross_entropy(model.student(chosen + NOISE * torch.randn_like(chosen)), target)


def update(model: MeanTeacher, loss: Tensor) -> None:
    """Momentum SGD by hand: the gradient of `loss`, then the weights."""
    model.student.zero_grad()
    loss.backward()
    for p, v in zip(model.student.parameters(), model.velocities, strict=True):
        assert p.grad is not None
        v.mul_(MOMENTUM).add_(p.grad)
        p.data.add_(v, alpha=-LEARNING_RATE)


def update_teacher(model: MeanTeacher) -> None:
    for average, p in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
        average.data.mul_(DECAY).add_(p.data, alpha=1 - DECAY)


def train(model: MeanTeacher, images: Tensor, labels: Tensor, mistake: bool) -> tuple[Tensor, Tensor]:
    """One step: both losses, their updates, and the moving average."""
    classification = classification_loss(model.student, images, labels)
    if mistake:
        consistency = consistency_loss(model, images)
        update(model, classification)  # too early: it writes to the weights saved for the other loss
    else:
        update(model, classification)
        consistency = consistency_loss(model, images)
    update(model, consistency)
    update_teacher(model)
    return classification, consistency


def main(argv: Sequence[str] | None = None) -> _common.Run:
    args = _common.arguments(
        __doc__, argv, steps=600, mistake="run both forwards before the update that the first loss asks for"
    )
    _common.make_repeatable(args.seed)
    images, labels = _common.digits()
    model = make_mean_teacher()
    losses = _common.Losses(args.steps)
    errors: list[_common.GradientError] = []

    with GUARDS[args.guard]():
        for step in range(args.steps):
            if args.measures(step):
                errors.append(_common.gradient_error(model, lambda model: train(model, images, labels, args.mistake)))
            classification, consistency = train(model, images, labels, args.mistake)
            losses.add(step, classification=classification, consistency=consistency)

    with torch.no_grad():
        answers = model.teacher(images[TRAINING:]).argmax(dim=1)
    print(f"the teacher reads {(answers == labels[TRAINING:]).float().mean():.1%} of the digits it never saw")
    return _common.finish(losses, errors)


if __name__ == "__main__":
    main()
