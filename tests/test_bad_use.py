"""Does bad use get one clear line?"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import torchguard
from torchguard import Guard, SavedTensorCorruptionError, Violation, allow, strict, warn


def entered_twice() -> None:
    with strict() as guard, guard:
        pass


def spent() -> None:
    guard = strict()
    with guard:
        pass
    with guard:
        pass


NEEDS_REASON = 'torchguard: allow() needs a reason, for example allow("the weights are put back before backward")'

CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "unknown action": (
        lambda: Guard("explode"),  # type: ignore[arg-type]
        ValueError,
        "torchguard: action is one of 'raise', 'warn', 'repair', 'record', not 'explode'",
    ),
    "action is None": (
        lambda: Guard(None),  # type: ignore[arg-type]
        ValueError,
        "torchguard: action is one of 'raise', 'warn', 'repair', 'record', not None",
    ),
    "action is a list": (
        lambda: Guard(["raise"]),  # type: ignore[arg-type]
        ValueError,
        "torchguard: action is one of 'raise', 'warn', 'repair', 'record', not ['raise']",
    ),
    "unknown moment": (
        lambda: Guard(at="dawn"),  # type: ignore[arg-type]
        ValueError,
        "torchguard: at is one of 'write', 'read', not 'dawn'",
    ),
    "unknown moment of strict": (
        lambda: strict(at="dawn"),  # type: ignore[arg-type]
        ValueError,
        "torchguard: at is one of 'write', 'read', not 'dawn'",
    ),
    "unknown moment of warn": (
        lambda: warn(at="dawn"),  # type: ignore[arg-type]
        ValueError,
        "torchguard: at is one of 'write', 'read', not 'dawn'",
    ),
    "unknown depth": (
        lambda: Guard(depth="abyss"),  # type: ignore[arg-type]
        ValueError,
        "torchguard: depth is one of 'watch', 'saves', 'bytes', not 'abyss'",
    ),
    "repair at the write": (
        lambda: Guard("repair", at="write"),
        ValueError,
        "torchguard: repair acts when backward reads: with it, at is 'read', not 'write'",
    ),
    "repair() at the write": (
        lambda: torchguard.repair(at="write"),
        ValueError,
        "torchguard: repair acts when backward reads: with it, at is 'read', not 'write'",
    ),
    "repair at the write for the whole process": (
        lambda: torchguard.enable("repair", at="write"),
        ValueError,
        "torchguard: enable(): at='write': repair acts when backward reads: with it, at is 'read', not 'write'",
    ),
    "unknown moment of audit": (
        lambda: torchguard.audit(at="dawn"),  # type: ignore[arg-type]
        ValueError,
        "torchguard: at is one of 'write', 'read', not 'dawn'",
    ),
    "every_call is no truth value": (
        lambda: Guard(every_call="yes"),  # type: ignore[arg-type]
        TypeError,
        "torchguard: every_call is True or False, not 'yes'",
    ),
    "allow without a reason": (lambda: allow(), ValueError, NEEDS_REASON),
    "allow with an empty reason": (lambda: allow(""), ValueError, NEEDS_REASON),
    "allow with a blank reason": (lambda: allow(" \n"), ValueError, NEEDS_REASON),
    "allow with a number": (lambda: allow(3), TypeError, NEEDS_REASON),  # type: ignore[arg-type]
    "allow used without calling it": (
        lambda: allow(lambda: None),  # type: ignore[arg-type]
        TypeError,
        NEEDS_REASON,
    ),
    "entered twice": (
        entered_twice,
        RuntimeError,
        "torchguard: this guard is entered already; make a new one for each block, with torchguard.strict() say",
    ),
    "entered again": (
        spent,
        RuntimeError,
        "torchguard: this guard has been used; make a new one for each block, with torchguard.strict() say",
    ),
    "left before it was entered": (
        lambda: strict().__exit__(None, None, None),
        RuntimeError,
        "torchguard: this guard is not entered",
    ),
    "a number decorated": (
        lambda: strict()(3),  # type: ignore[type-var]
        TypeError,
        "torchguard: guard() decorates functions, not 3",
    ),
    "a class decorated": (
        lambda: strict()(Violation),
        TypeError,
        "torchguard: guard() decorates functions, not the class Violation: decorate the methods that are to be watched",
    ),
    "suppressions that are a number": (
        lambda: strict(suppressions=3),  # type: ignore[arg-type]
        ValueError,
        "torchguard: suppressions: the path of a file, or lines of text, and not 3",
    ),
    "a string decorated with allow": (
        lambda: allow("why")("nothing"),  # type: ignore[type-var]
        TypeError,
        "torchguard: allow() decorates functions, not 'nothing'",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_use_gets_one_clear_line(name: str) -> None:
    program, kind, message = CASES[name]
    with pytest.raises(kind) as error:
        program()
    assert type(error.value) is kind
    assert str(error.value) == message
    assert "\n" not in message
    assert len(message) <= 120


@pytest.mark.parametrize("name", ["strict", "warn", "repair", "audit", "watch", "Guard"])
def test_a_decorator_without_parentheses_says_what_would_be_right(name: str) -> None:
    with pytest.raises(TypeError) as error:
        getattr(torchguard, name)(lambda: None)
    assert str(error.value) == (
        f"torchguard: as a decorator it is @torchguard.{name}(), with parentheses, not @torchguard.{name}"
    )


@pytest.mark.parametrize("name", ["strict", "warn", "repair", "audit", "watch"])
def test_what_comes_without_its_keyword_is_told(name: str) -> None:
    with pytest.raises(TypeError) as error:
        getattr(torchguard, name)("read")
    assert str(error.value) == (
        f"torchguard: {name}() takes at=, every_call= and suppressions=, by keyword, not 'read'"
    )
    with pytest.raises(TypeError, match=r"by keyword, not a list$"):
        getattr(torchguard, name)(["train.py -- a reason that is written down at some length"])


def test_a_guard_that_was_entered_twice_still_guards() -> None:
    x = torch.ones(3, requires_grad=True)
    with strict() as guard:
        with pytest.raises(RuntimeError, match="entered already"):
            guard.__enter__()
        y = x.exp()
        with pytest.raises(SavedTensorCorruptionError):
            y.data.zero_()


def test_a_guard_says_what_it_is() -> None:
    guard = Guard("warn")
    assert repr(guard) == "<torchguard.Guard action='warn', new, 0 violations>"
    with guard:
        assert repr(guard) == "<torchguard.Guard action='warn', entered, 0 violations>"
    assert repr(guard) == "<torchguard.Guard action='warn', left, 0 violations>"


def test_a_package_that_another_one_was_installed_over_says_so_in_one_line(tmp_path: Path) -> None:
    package = Path(torchguard.__file__).parent
    shutil.copytree(package, tmp_path / "torchguard", ignore=shutil.ignore_patterns("_ledger.py", "__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", "from torchguard import strict"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: torchguard: files of this package are missing")
    assert "pip install torchguard-autograd" in last
