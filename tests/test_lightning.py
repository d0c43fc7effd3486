"""Is training with Lightning watched from its first step to its last, changed in nothing, and let go of at any end?"""

from __future__ import annotations

import copy
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from outside import python
from torch import nn
from trainers import Meddler, example, is_guarded, quiet, same, weights

with quiet():
    L: Any = pytest.importorskip(
        "lightning.pytorch", reason="needs the extra: pip install 'torchguard-autograd[lightning]'"
    )
    from torchguard.integrations.lightning import TorchguardCallback

import torchguard
from torchguard import _config

pytestmark = pytest.mark.filterwarnings("ignore")  # what Lightning warns of is its own affair

DATA = torch.arange(48.0).view(12, 4) / 48


class Model(L.LightningModule):
    def __init__(self, meddler: Meddler | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), meddler or Meddler(), nn.Dropout(0.2), nn.Linear(8, 1))

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.net(batch).square().mean()

    def on_after_backward(self) -> None:
        self.net[1].after_backward()

    def validation_step(self, batch: torch.Tensor, index: int) -> None:
        self.log("loss", self.net(batch).square().mean())

    test_step = validation_step

    def predict_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.net(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def loader() -> Any:
    return torch.utils.data.DataLoader(DATA, batch_size=2)


def trainer(*callbacks: Any, **options: Any) -> Any:
    quietly = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(
        **{"max_epochs": 2, "accelerator": "cpu", "devices": 1, **quietly, **options}, callbacks=list(callbacks)
    )


def fit(*callbacks: Any, meddler: Meddler | None = None, **options: Any) -> dict[str, torch.Tensor]:
    """The weights after training."""
    torch.manual_seed(0)
    model = Model(meddler)
    trainer(*callbacks, **options).fit(model, loader())
    return weights(model)


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """Lightning has the process ignore Ctrl+C once it was interrupted."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


# ---- the same weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "options"), [*((mode, {}) for mode in _config.MODES), ("strict", {"every_call": True})], ids=str
)
def test_guarded_and_unguarded_training_end_with_the_same_weights(mode: str, options: dict[str, Any]) -> None:
    meddler = Meddler()
    callback = TorchguardCallback(mode, **options)
    assert same(fit(callback, meddler=meddler), fit())
    assert meddler.seen == [True] * 12
    assert callback.violations == []
    assert not is_guarded()


@pytest.mark.parametrize("what", ["write", "late"])
def test_warn_leaves_a_training_with_a_write_as_it_is(what: Any) -> None:
    callback = TorchguardCallback("warn")
    assert same(fit(callback, meddler=Meddler(what)), fit(meddler=Meddler(what)))
    assert len(callback.violations) == (what == "write")


# ---- a planted write -------------------------------------------------------------------------------------------


def test_the_planted_write_corrupts_and_its_twin_does_not() -> None:
    right = fit()
    assert not same(fit(meddler=Meddler("write")), right)
    assert same(fit(meddler=Meddler("late")), right)


@pytest.mark.parametrize("call", [0, 3, 11])
def test_the_write_is_reported_with_its_step(call: int) -> None:
    callback = TorchguardCallback("strict")
    with pytest.raises(torchguard.SavedTensorCorruptionError, match=rf"\n  step      {call}\n") as raised:
        fit(callback, meddler=Meddler("write", call))
    assert raised.value.violation.step == call
    assert [violation.step for violation in callback.violations] == [call]
    assert not is_guarded()


@pytest.mark.parametrize("mode", ["strict", "warn"])
def test_the_twin_is_silent(mode: str) -> None:
    callback = TorchguardCallback(mode)
    fit(callback, meddler=Meddler("late"))
    assert callback.violations == []


def test_the_step_is_that_of_the_optimizer() -> None:
    callback = TorchguardCallback("warn")
    fit(callback, meddler=Meddler("write", 5), accumulate_grad_batches=2)
    assert [violation.step for violation in callback.violations] == [2]


def test_outside_fit_there_is_no_step() -> None:
    class Sloppy(Model):
        def test_step(self, batch: torch.Tensor, index: int) -> None:
            with torch.inference_mode(False), torch.enable_grad():
                x = batch.clone().requires_grad_()
                y = torch.sigmoid(x)
                y.data.zero_()
                y.sum().backward()

    callback = TorchguardCallback("warn")
    trainer(callback, inference_mode=False).test(Sloppy(), loader(), verbose=False)
    (violation,) = callback.violations
    assert (violation.step, violation.times) == (None, 6)


# ---- in and out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run",
    [
        lambda trainer, model: trainer.fit(model, loader(), loader()),
        lambda trainer, model: trainer.validate(model, loader(), verbose=False),
        lambda trainer, model: trainer.test(model, loader(), verbose=False),
        lambda trainer, model: trainer.predict(model, loader()),
    ],
    ids=["fit", "validate", "test", "predict"],
)
@pytest.mark.parametrize("error", [None, ValueError("no"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_the_guard_is_gone_whatever_ran_and_however_it_ended(
    run: Callable[[Any, Any], Any], error: BaseException | None, found: Any
) -> None:
    class Failing(Meddler):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            if error is not None and len(self.seen) == 2:
                raise error
            return y

    meddler = Failing()
    callback = TorchguardCallback()
    before = found()
    if error is None:
        run(trainer(callback), Model(meddler))
    else:
        with pytest.raises((type(error), SystemExit)):
            run(trainer(callback), Model(meddler))
    assert meddler.seen
    assert all(meddler.seen)
    assert callback.guard is not None
    assert not is_guarded()
    assert before.differences() == []


def test_an_exception_in_another_callback_s_setup() -> None:
    class Broken(L.Callback):
        def setup(self, *_: Any, **__: Any) -> None:
            assert is_guarded()
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fit(TorchguardCallback(), Broken())
    assert not is_guarded()


def test_one_callback_for_several_runs() -> None:
    callback = TorchguardCallback("warn")
    model = Model(Meddler("write"))
    one = trainer(callback)
    one.fit(model, loader())
    first = callback.guard
    one.validate(model, loader(), verbose=False)
    assert callback.guard is not first
    assert [violation.step for violation in callback.violations] == [3]


def test_the_guard_does_not_keep_the_trainer() -> None:
    callback = TorchguardCallback()
    fit(callback)
    assert callback.guard is not None
    assert callback.guard.step is None


def test_checkpoints_and_copies_of_the_trainer_s_callbacks(tmp_path: Path) -> None:
    class Copying(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            self.copies = copy.deepcopy(trainer.callbacks[0])
            trainer.save_checkpoint(tmp_path / "saved.ckpt")

    copying = Copying()
    plain = fit(copying)
    callback = TorchguardCallback()
    assert same(fit(callback, copying), plain)
    assert isinstance(copying.copies, TorchguardCallback)
    assert copying.copies.guard is None
    torch.manual_seed(0)
    model = Model()
    trainer(callback, max_epochs=3).fit(model, loader(), ckpt_path=tmp_path / "saved.ckpt", weights_only=False)


def test_the_learning_rate_finder_which_ends_a_fit_half_way() -> None:
    torch.manual_seed(0)
    model = Model()
    model.lr = 0.1
    callback = TorchguardCallback()
    found = L.tuner.Tuner(trainer(callback)).lr_find(model, loader(), num_training=5, min_lr=1e-3)
    assert found is not None
    assert not is_guarded()


def test_the_other_name_of_the_package(tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text(f"""
import sys, warnings
warnings.simplefilter("ignore")
import pytorch_lightning as L, torch
from torchguard.integrations.lightning import TorchguardCallback
assert issubclass(TorchguardCallback, L.Callback)
assert "lightning.pytorch" not in sys.modules
{example("lightning.md", "train.py").replace("import lightning.pytorch as L", "")}
""")
    done = python([program], cwd=tmp_path)
    assert done.stdout.splitlines()[-1].startswith("step 3, 2 times: h.data.clamp_"), done.stdout + done.stderr


# ---- several processes -----------------------------------------------------------------------------------------

RANKS = """
import hashlib, json, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_lightning import Meddler, Model, TorchguardCallback, loader, trainer
from trainers import is_guarded, weights


class Told(Model):
    def on_train_end(self):
        digest = hashlib.sha256(repr(sorted((k, v.tolist()) for k, v in weights(self).items())).encode()).hexdigest()
        steps = [violation.step for violation in callback.violations] if callback else None
        with open(f"{self.global_rank}.jsonl", "a") as file:
            print(json.dumps([name, self.global_rank, digest, self.net[1].seen, steps]), file=file)


for name, callback, what in [
    ("unguarded", None, None),
    ("guarded", TorchguardCallback("strict"), None),
    ("warned", TorchguardCallback("warn"), "write"),
]:
    torch.manual_seed(0)
    model = Told(Meddler(what))
    trainer(*filter(None, [callback]), devices=2, strategy=sys.argv[2], use_distributed_sampler=True).fit(model, loader())
    assert not is_guarded()
    if sys.argv[2] != "ddp":
        assert callback is None or callback.guard is None
"""


@pytest.mark.skipif(not hasattr(torch.distributed, "ProcessGroupGloo"), reason="needs gloo")
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_two_ranks_each_have_a_guard_and_the_same_weights(tmp_path: Path) -> None:
    done = python(["-c", RANKS, Path(__file__).parent, "ddp_fork"], cwd=tmp_path, timeout=110)
    lines = [json.loads(line) for file in tmp_path.glob("*.jsonl") for line in file.read_text().splitlines()]
    told = {(name, rank): (digest, seen, steps) for name, rank, digest, seen, steps in lines}
    assert set(told) == {(name, rank) for name in ("unguarded", "guarded", "warned") for rank in (0, 1)}, done.stderr
    assert {told["unguarded", rank][0] for rank in (0, 1)} == {told["guarded", rank][0] for rank in (0, 1)}
    for rank in (0, 1):
        assert told["unguarded", rank][1:] == ([False] * 6, None)
        assert told["guarded", rank][1:] == ([True] * 6, [])
        assert told["warned", rank][1:] == ([True] * 6, [3])
    assert done.returncode == 0, done.stderr
