"""What do the three example scripts share? Data, arguments, losses, and the proof of a mistake.

It also answers, before anything else runs, whether the `torchguard` that Python found is this project's.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

GuardMode = Literal["off", "strict", "warn"]
Guards = Mapping[GuardMode, Callable[[], AbstractContextManager[object]]]


def require_our_torchguard() -> None:
    """Leave with one line when `import torchguard` brings nothing, or another project of that name."""
    try:
        found = importlib.import_module("torchguard")
    except ModuleNotFoundError as error:
        if error.name != "torchguard":
            raise
        sys.exit("torchguard is not installed: pip install torchguard-autograd")
    if not (hasattr(found, "strict") and hasattr(found, "SavedTensorCorruptionError")):
        sys.exit(
            'the installed "torchguard" is a different PyPI project of that name, not this one: '
            "pip uninstall torchguard torchguard-autograd && pip install torchguard-autograd"
        )


# The scripts import this module before torchguard: the reader gets the line above, not a traceback.
require_our_torchguard()

import sklearn.datasets  # noqa: E402  (the check above comes first)
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

State = TypeVar("State")


@dataclass(frozen=True)
class Arguments:
    """The command line that the three scripts have in common."""

    guard: GuardMode
    mistake: bool
    steps: int
    seed: int

    def measures(self, step: int) -> bool:
        """Are this step's gradients compared with the truth? Ten are, if the mistake is made unguarded."""
        return self.mistake and self.guard == "off" and step % max(1, self.steps // 10) == 0


def arguments(module_doc: str | None, argv: Sequence[str] | None, *, steps: int, mistake: str) -> Arguments:
    """Read the command line; `mistake` says in a few words what this script's mistake is."""
    parser = argparse.ArgumentParser(description=(module_doc or "").partition("\n")[0])
    parser.add_argument("--guard", choices=("off", "strict", "warn"), default="off", help="default: off")
    parser.add_argument("--mistake", action="store_true", help=mistake)
    parser.add_argument("--steps", type=int, default=steps, metavar="N", help=f"default: {steps}")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    found = parser.parse_args(argv)
    if found.steps < 1:
        parser.error("--steps must be at least 1")
    return Arguments(found.guard, found.mistake, found.steps, found.seed)


def make_repeatable(seed: int) -> None:
    """The same seed gives the same losses, to the last bit, on the same machine."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # the order of a sum depends on how many threads share it


def digits() -> tuple[Tensor, Tensor]:
    """The 1797 handwritten digits that scikit-learn ships: rows of 64 values in [0, 1], and labels."""
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    return torch.from_numpy(images).float() / 16, torch.from_numpy(labels)


class Losses:
    """Every loss of a run: a line now and then for the reader, all of them for the digest."""

    def __init__(self, steps: int) -> None:
        self._every = max(1, steps // 6)
        self._digest = hashlib.sha256()

    def add(self, step: int, **losses: Tensor) -> None:
        values = {name: float(loss.item()) for name, loss in losses.items()}
        self._digest.update(" ".join(value.hex() for value in values.values()).encode() + b"\n")
        if step % self._every == 0:
            print(f"step {step:4d}  " + "  ".join(f"{name} {value:+.4f}" for name, value in values.items()))

    def digest(self) -> str:
        return self._digest.hexdigest()


@dataclass(frozen=True)
class GradientError:
    """The gradient furthest from the truth: its largest difference, as a share of its largest true entry."""

    parameter: str
    share: float


def gradient_error(state: State, step: Callable[[State], object]) -> GradientError:
    """Take one step twice, on copies of `state`: as it is, and with every save cloned. What differs?

    A cloned save is out of reach of any later write, so the second run's gradients are the true ones.
    Neither run touches `state` or the random numbers of the training that goes on after.
    """
    actual = _gradients_after(step, copy.deepcopy(state))
    with torch.autograd.graph.saved_tensors_hooks(lambda save: save.detach().clone(), lambda save: save):
        true = _gradients_after(step, copy.deepcopy(state))
    shares = {name: _share(actual[name], true[name]) for name in true}
    worst = max(shares, key=lambda name: shares[name])
    return GradientError(worst, shares[worst])


def _gradients_after(step: Callable[[State], object], state: State) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=()):
        step(state)
    return {name: p.grad for name, p in _parameters_of(state) if p.grad is not None}


def _parameters_of(state: Any) -> Iterator[tuple[str, nn.Parameter]]:
    for field in fields(state):
        part = getattr(state, field.name)
        if isinstance(part, nn.Module):
            yield from part.named_parameters(prefix=field.name)


def _share(actual: Tensor, true: Tensor) -> float:
    difference = (actual - true).abs().max().item()
    return difference / true.abs().max().item() if difference else 0.0


@dataclass(frozen=True)
class Run:
    """What a script hands back to whoever calls its `main`."""

    digest: str
    gradient_errors: tuple[GradientError, ...]


def finish(losses: Losses, gradient_errors: Sequence[GradientError]) -> Run:
    """Print the last lines of a run: how wrong its gradients were, if that was measured, and the digest."""
    if gradient_errors:
        worst = max(gradient_errors, key=lambda error: error.share)
        median = statistics.median(error.share for error in gradient_errors)
        print(
            f"gradient of {worst.parameter}: wrong by up to {100 * worst.share:.0f} %, "
            f"by {100 * median:.0f} % in the median of {len(gradient_errors)} measured steps "
            "(autograd finished without an error)"
        )
    print(f"losses sha256: {losses.digest()}")
    return Run(losses.digest(), tuple(gradient_errors))
