"""Is training with the Trainer of Transformers watched, changed in nothing, and let go of at any end?"""

from __future__ import annotations

import copy
import inspect
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import Meddler, is_guarded, quiet, same, weights

import torchguard
from torchguard import _config

os.environ.setdefault("HF_HUB_OFFLINE", "1")
REASON = "needs the extra: pip install 'torchguard-autograd[transformers]'"
with quiet():
    pytest.importorskip("accelerate", reason=REASON)
    transformers: Any = pytest.importorskip("transformers", reason=REASON)
    TRAIN = transformers.Trainer.train
    from torchguard.integrations.transformers import TorchguardCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # what Transformers warns of is its own affair

DATA = [{"input_ids": (torch.arange(8) + i) % 32, "labels": (torch.arange(8) + i) % 32} for i in range(16)]
STEPS = 5


class Trainer(transformers.Trainer):
    """Tells the model when backward is through."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self.model.transformer.h[0].mlp.act.after_backward()
        return loss


def small(meddler: Meddler | None = None) -> Any:
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    model.transformer.h[0].mlp.act = meddler or Meddler()
    return model


def trainer(folder: Path, *callbacks: Any, meddler: Meddler | None = None, cls: Any = Trainer, **options: Any) -> Any:
    torch.manual_seed(0)
    options = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2, "report_to": "none",
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True, **options,
    }  # fmt: skip
    return cls(
        model=small(meddler),
        args=transformers.TrainingArguments(**options),
        train_dataset=DATA,
        eval_dataset=DATA[:4],
        callbacks=list(callbacks),
    )


def train(folder: Path, *callbacks: Any, **options: Any) -> dict[str, torch.Tensor]:
    """The weights after training."""
    one = trainer(folder, *callbacks, **options)
    one.train()
    return weights(one.model)


# ---- the same weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "options"), [*((mode, {}) for mode in _config.MODES), ("strict", {"every_call": True})], ids=str
)
def test_guarded_and_unguarded_training_end_with_the_same_weights(
    mode: str, options: dict[str, Any], tmp_path: Path
) -> None:
    meddler = Meddler()
    callback = TorchguardCallback(mode, **options)
    assert same(train(tmp_path, callback, meddler=meddler), train(tmp_path))
    assert meddler.seen == [True] * STEPS
    assert callback.violations == []
    assert not is_guarded()


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_with_evaluation_accumulation_and_checkpointing(gradient_checkpointing: bool, tmp_path: Path) -> None:
    options = {
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "gradient_checkpointing": gradient_checkpointing,
    }
    callback = TorchguardCallback()
    assert same(train(tmp_path, callback, **options), train(tmp_path, **options))
    assert callback.violations == []


# ---- a planted write -------------------------------------------------------------------------------------------


def test_the_planted_write_corrupts_and_its_twin_does_not(tmp_path: Path) -> None:
    right = train(tmp_path)
    assert not same(train(tmp_path, meddler=Meddler("write")), right)
    assert same(train(tmp_path, meddler=Meddler("late")), right)


@pytest.mark.parametrize("call", [0, 3])
def test_the_write_is_reported_with_its_step(call: int, tmp_path: Path) -> None:
    callback = TorchguardCallback("strict")
    with pytest.raises(torchguard.SavedTensorCorruptionError, match=rf"\n  step      {call}\n") as raised:
        train(tmp_path, callback, meddler=Meddler("write", call))
    assert raised.value.violation.step == call
    assert [violation.step for violation in callback.violations] == [call]
    assert not is_guarded()


@pytest.mark.parametrize("mode", ["strict", "warn"])
def test_the_twin_is_silent(mode: str, tmp_path: Path) -> None:
    callback = TorchguardCallback(mode)
    train(tmp_path, callback, meddler=Meddler("late"))
    assert callback.violations == []


def test_warn_leaves_a_training_with_a_write_as_it_is(tmp_path: Path) -> None:
    callback = TorchguardCallback("warn")
    assert same(
        train(tmp_path, callback, meddler=Meddler("write")),
        train(tmp_path, meddler=Meddler("write")),
    )
    assert [violation.step for violation in callback.violations] == [3]


def test_the_step_is_that_of_the_optimizer(tmp_path: Path) -> None:
    callback = TorchguardCallback("warn")
    train(tmp_path, callback, meddler=Meddler("write", 5), gradient_accumulation_steps=2)
    assert [violation.step for violation in callback.violations] == [2]


# ---- in and out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("added", ["at construction", "later"])
def test_the_guard_is_gone_after_an_exception(error: BaseException, added: str, tmp_path: Path, found: Any) -> None:
    meddler = Meddler(error)
    callback = TorchguardCallback()
    one = trainer(tmp_path, *([callback] if added == "at construction" else []), meddler=meddler)
    if added == "later":
        one.add_callback(callback)
    before = found()
    with pytest.raises(type(error)):
        one.train()
    assert meddler.seen == [True] * 4
    assert not is_guarded()
    assert before.differences() == []


@pytest.mark.parametrize("event", ["on_train_begin", "on_step_end", "on_train_end"])
def test_an_exception_in_another_callback(event: str, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        assert is_guarded() == (event != "on_train_end")
        raise ValueError(event)

    broken = type("Broken", (transformers.TrainerCallback,), {event: fail})()
    with pytest.raises(ValueError, match=event):
        train(tmp_path, TorchguardCallback(), broken)
    assert not is_guarded()


def test_a_callback_that_is_removed_while_it_is_on(tmp_path: Path) -> None:
    class Removing(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            one.remove_callback(TorchguardCallback)

    one = trainer(tmp_path, TorchguardCallback(), Removing())
    one.train()
    assert not is_guarded()


def test_evaluation_and_prediction_outside_training_are_not_guarded(tmp_path: Path) -> None:
    meddler = Meddler()
    one = trainer(tmp_path, TorchguardCallback(), meddler=meddler)
    one.train()
    one.evaluate()
    one.predict(DATA[:4])
    assert meddler.seen[:STEPS] == [True] * STEPS
    assert not any(meddler.seen[STEPS:])
    assert len(meddler.seen) > STEPS


def test_a_training_that_starts_over_with_a_smaller_batch(tmp_path: Path) -> None:
    class OutOfMemory(Meddler):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 1:
                raise RuntimeError("CUDA out of memory.")
            return super().forward(x)

    meddler = OutOfMemory()
    train(tmp_path, TorchguardCallback(), meddler=meddler, auto_find_batch_size=True)
    assert meddler.seen == [True] * STEPS
    assert not is_guarded()


def test_a_training_inside_a_training(tmp_path: Path) -> None:
    class Nested(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                with pytest.raises(ValueError, match="inner"):
                    train(tmp_path, TorchguardCallback(), meddler=Meddler(ValueError("inner")))
                assert is_guarded()

    meddler = Meddler()
    train(tmp_path, TorchguardCallback(), Nested(), meddler=meddler)
    assert meddler.seen == [True] * STEPS
    assert not is_guarded()


def test_a_subclass_with_a_train_of_its_own_leaves_at_the_end(tmp_path: Path) -> None:
    class Own(Trainer):
        train = TRAIN if not hasattr(TRAIN, "__wrapped__") else TRAIN.__wrapped__

    meddler = Meddler()
    train(tmp_path, TorchguardCallback(), meddler=meddler, cls=Own)
    assert meddler.seen == [True] * STEPS
    assert not is_guarded()


def test_train_is_called_and_documented_as_ever(tmp_path: Path) -> None:
    original = transformers.Trainer.train.__wrapped__
    assert inspect.signature(transformers.Trainer.train) == inspect.signature(original)
    assert transformers.Trainer.train.__doc__ == original.__doc__
    assert not hasattr(original, "__wrapped__")


def test_resumed_from_a_checkpoint_the_steps_go_on(tmp_path: Path) -> None:
    train(tmp_path, TorchguardCallback(), save_strategy="steps", save_steps=2, max_steps=2)
    callback = TorchguardCallback("warn")
    one = trainer(tmp_path, callback, meddler=Meddler("write", 1), max_steps=4)
    one.train(resume_from_checkpoint=True)
    assert [violation.step for violation in callback.violations] == [3]


def test_copies_of_the_handler_with_all_its_callbacks(tmp_path: Path) -> None:
    class Copying(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.copies = copy.deepcopy(one.callback_handler.callbacks[1])

    copying = Copying()
    one = trainer(tmp_path, TorchguardCallback("warn"), copying)
    one.train()
    assert isinstance(copying.copies, TorchguardCallback)
    assert (copying.copies.mode, copying.copies.guard) == ("warn", None)
