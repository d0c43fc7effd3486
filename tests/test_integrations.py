"""What do the trainers' callbacks do alike, and what do they say where their package is missing?"""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from outside import python
from trainers import is_guarded

import torchguard
from torchguard import _config
from torchguard.integrations._callback import GuardCallback


def corrupt() -> None:
    a = torch.ones(3, requires_grad=True)
    out = a.sigmoid()
    out.data.zero_()
    out.sum().backward()


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [("lightning", "lightning", "lightning"), ("transformers", "transformers", "transformers")],
)
def test_a_missing_package_is_told_in_one_line_with_the_extra_that_brings_it(
    module: str, package: str, extra: str
) -> None:
    program = f"""
import sys
for name in ("lightning", "lightning.pytorch", "pytorch_lightning", "transformers"):
    sys.modules[name] = None  # as if it were not there
try:
    import torchguard.integrations.{module}
except ImportError as error:
    print(error)
"""
    done = python(["-c", program])
    assert done.stdout == (
        f"torchguard: torchguard.integrations.{module} needs {package}, which is not installed: "
        f"pip install 'torchguard-autograd[{extra}]'\n"
    ), done.stderr


def test_a_package_that_is_there_and_lacks_something_says_what(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("import something_that_is_nowhere\n")
    done = python(["-c", "import torchguard.integrations.transformers"], cwd=tmp_path)
    assert "No module named 'something_that_is_nowhere'" in done.stderr
    assert "torchguard-autograd[" not in done.stderr


@pytest.mark.parametrize("mode", _config.MODES)
def test_every_mode_is_a_guard_of_that_mode(mode: str) -> None:
    callback = GuardCallback(mode)
    callback.enter()
    try:
        assert callback.guard is not None
        expected = torchguard.Guard(**_config.MODES[mode])
        assert (callback.guard.action, callback.guard.at, callback.guard.depth) == (
            expected.action,
            expected.at,
            expected.depth,
        )
        assert is_guarded()
    finally:
        callback.leave()
    assert not is_guarded()


def test_off_is_no_guard() -> None:
    callback = GuardCallback("off")
    callback.enter()
    assert not is_guarded()
    assert callback.guard is None
    callback.leave()


@pytest.mark.parametrize(
    ("arguments", "keywords", "error"),
    [
        (["strct"], {}, "ValueError: torchguard: mode='strct' is not a mode of this version; did you mean 'strict'? (off, "),
        ([None], {}, "ValueError: torchguard: mode=None is not a mode of this version (off, "),
        ([], {"evry_call": True}, "TypeError: torchguard: 'evry_call' is no keyword of Guard; did you mean 'every_call'? ("),
        ([], {"every_call": 1}, "TypeError: torchguard: every_call is True or False, not 1"),
        (["off"], {"at": "noon"}, "ValueError: torchguard: at is one of 'write'"),
        ([], {"suppressions": ["train.py"]}, "ValueError: torchguard: suppressions:1: 'train.py' has no reason; "),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line_at_construction(arguments: Any, keywords: Any, error: str) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        GuardCallback(*arguments, **keywords)
    told = f"{raised.type.__name__}: {raised.value}"
    assert told.startswith(error)
    assert "\n" not in told


def test_keywords_count_more_than_the_mode() -> None:
    callback = GuardCallback("strict", action="record", suppressions=["elsewhere.py -- not here"])
    callback.enter()
    corrupt()
    callback.leave()
    assert [violation.operation for violation in callback.violations] == ["zero_()"]


def test_findings_are_kept_from_one_run_to_the_next() -> None:
    callback = GuardCallback("strict", action="record")
    for _ in range(2):
        callback.enter()
        corrupt()
        callback.leave()
    (violation,) = callback.violations
    assert violation.times == 2


def test_entered_again_without_being_left_it_is_one_guard() -> None:
    """A trainer that starts over with a smaller batch says so by beginning again."""
    callback = GuardCallback()
    callback.enter()
    first = callback.guard
    callback.enter()
    assert callback.guard is not first
    callback.leave()
    assert not is_guarded()
    callback.leave()  # once more is no mistake


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_a_copy_has_the_settings_and_is_off(duplicate: Any) -> None:
    callback = GuardCallback("strict", action="record", suppressions=["elsewhere.py -- not here"])
    callback.enter(lambda: 5)
    try:
        corrupt()
        other = duplicate(callback)
        assert other.guard is None
        other.leave()
        assert is_guarded()
    finally:
        callback.leave()
    assert (other.mode, other.violations, len(callback.violations)) == ("strict", [], 1)
    other.enter()
    corrupt()
    other.leave()
    assert len(other.violations) == 1
    assert len(callback.violations) == 1


# ---- Guard.step ----------------------------------------------------------------------------------------------


def test_a_guard_says_the_step_that_it_was_told() -> None:
    with torchguard.Guard(action="record") as guard:
        for step in range(4):
            guard.step = step
            if step >= 2:
                corrupt()
    (violation,) = guard.violations
    assert (violation.step, violation.times) == (2, 2)
    assert "\n  step      2\n" in str(violation)
    assert violation.to_dict()["step"] == 2


def test_the_step_is_no_part_of_the_site() -> None:
    with torchguard.Guard(action="record") as guard:
        corrupt()
    (violation,) = guard.violations
    assert violation.step is None
    assert "  step  " not in str(violation)
    assert violation.to_dict()["step"] is None
    assert dataclasses.replace(violation, step=4).site == violation.site


def test_the_step_may_be_a_function_and_an_allowed_write_has_one() -> None:
    with torchguard.Guard(action="record") as guard:
        guard.step = lambda: 7
        with torchguard.allow("why not"):
            corrupt()
    assert [violation.step for violation in guard.allowed] == [7]


@pytest.mark.parametrize("step", [lambda: 1 // 0, lambda: "seven", lambda: None, float("nan")])
def test_a_step_that_is_none_hurts_nobody(step: Any) -> None:
    with torchguard.Guard(action="record") as guard:
        guard.step = step
        corrupt()
    (violation,) = guard.violations
    assert violation.step is None


@pytest.mark.parametrize("step", ["seven", [7]])
def test_what_can_be_no_step_is_refused_in_one_line(step: Any) -> None:
    guard = torchguard.Guard(action="record")
    guard.step = torch.tensor(6)
    with pytest.raises(
        TypeError, match=r"^torchguard: guard\.step is a number, a function that returns one, or None, not"
    ):
        guard.step = step
    assert guard.step == 6


def test_a_decorated_function_is_told_the_step() -> None:
    guard = torchguard.Guard(action="record")
    run = guard(corrupt)
    guard.step = 3
    run()
    assert [violation.step for violation in guard.violations] == [3]
