"""What do the tests of trainers plant into a small model, and what do they compare?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from outside import ROOT
from pages import blocks
from torch import nn

from torchguard import _intercept, _policy, _watch


class Meddler(nn.Module):
    """An activation that in one of its calls goes on to do something else.

    ``"write"`` doubles its input, which backward needs and forward does not any more: what it changes, it changes by a
    wrong gradient. ``"late"`` is its twin, the same once backward is through (somebody calls ``after_backward()``).
    An exception is raised.
    """

    def __init__(self, what: Literal["write", "late"] | BaseException | None = None, call: int = 3) -> None:
        super().__init__()
        self.what = what
        self.call = call
        self.calls = 0
        self.late: torch.Tensor | None = None
        self.seen: list[bool] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.gelu(x)
        self.seen.append(is_guarded())
        if torch.is_grad_enabled():
            if self.calls == self.call:
                if isinstance(self.what, BaseException):
                    raise self.what
                if self.what == "write":
                    x.data.mul_(2)
                self.late = x if self.what == "late" else None
            self.calls += 1
        return y

    def after_backward(self) -> None:
        if self.late is not None:
            self.late.data.mul_(2)
            self.late = None


with contextlib.suppress(ImportError):  # its thread would outlive the test, and be told as one that no guard watches
    from tqdm import tqdm

    tqdm.monitor_interval = 0


def is_guarded() -> bool:
    """Whether this thread is under a guard, patches and all."""
    patched = _intercept._installed > 0 or bool(_watch.watching)
    return patched and _policy.innermost() is not None


def weights(module: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """To the last bit."""
    return a.keys() == b.keys() and all(
        torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8)) for name in a
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Other packages' warnings, at their import, are not ours to mend."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def example(page: str, title: str) -> str:
    """The program of that name on a page of ``docs/howto/``."""
    (program,) = [block.text for block in blocks((ROOT / "docs" / "howto" / page).read_text()) if block.title == title]
    return program
