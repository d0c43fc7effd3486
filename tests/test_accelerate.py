"""Does the guard, put around a loop that Accelerate has prepared, say which step went wrong and change nothing?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from trainers import Meddler, is_guarded, quiet, same, weights

os.environ.setdefault("HF_HUB_OFFLINE", "1")
with quiet():
    accelerate: Any = pytest.importorskip(
        "accelerate", reason="needs the extra: pip install 'torchguard-autograd[accelerate]'"
    )

import torchguard
from torchguard import _config

pytestmark = pytest.mark.filterwarnings("ignore")  # what Accelerate warns of is its own affair


@pytest.fixture(autouse=True)
def one_accelerator_a_test() -> Iterator[None]:
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def train(meddler: Meddler | None = None, guard: Any = None, **options: Any) -> dict[str, torch.Tensor]:
    """The weights after a loop such as the page shows."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    accelerator = accelerate.Accelerator(cpu=True, **options)
    meddler = meddler or Meddler()
    model = nn.Sequential(nn.Linear(4, 8), meddler, nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(torch.arange(48.0).view(12, 4) / 48, batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for step, batch in enumerate(loader):
        if guard is not None:
            guard.step = step
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).float().square().mean())
            meddler.after_backward()
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return weights(accelerator.unwrap_model(model))


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}], ids=str)
@pytest.mark.parametrize("mode", _config.MODES)
def test_guarded_and_unguarded_training_end_with_the_same_weights(mode: str, options: dict[str, Any]) -> None:
    meddler = Meddler()
    with torchguard.Guard(**_config.MODES[mode]) as guard:
        guarded = train(meddler, guard, **options)
    assert same(guarded, train(**options))
    assert meddler.seen == [True] * 6
    assert guard.violations == []


def test_the_write_is_reported_with_its_step_and_its_twin_is_silent() -> None:
    right = train()
    assert not same(train(Meddler("write")), right)
    assert same(train(Meddler("late")), right)
    with torchguard.warn() as guard:
        train(Meddler("write"), guard)
    assert [violation.step for violation in guard.violations] == [3]
    with torchguard.strict() as guard:
        train(Meddler("late"), guard)
    assert guard.violations == []


def test_the_guard_is_gone_after_an_exception() -> None:
    with pytest.raises(torchguard.SavedTensorCorruptionError, match="\n  step      2\n"):
        with torchguard.strict() as guard:
            train(Meddler("write", 2), guard)
    assert not is_guarded()
