"""Does a long run say how far it is, where somebody sees it, and only there?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from outside import CORRUPT, environment, python

import torchguard
from torchguard import _config, _progress
from torchguard._config import Config, Layer

NUMBERS = (
    r"\d+ saves? \(\d+ alive\), \d+ writes? judged, \d+ alias(es)?, \d+ exports?, "
    r"\d+ cop(y|ies) \(\S+ k?B held\), \d+\.\d s on slow paths, (no violations|\d+ violations?)"
)
LINE = re.compile(rf"torchguard: \d+:\d\d:\d\d  {NUMBERS}")


def lines(text: str) -> list[str]:
    return [line for line in text.replace("\r", "").splitlines() if LINE.fullmatch(line)]


def in_a_terminal(arguments: list[str], **variables: str) -> str:
    """What a program says when its standard error is a terminal."""
    pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *arguments], env=environment(**variables), stdout=subprocess.DEVNULL, stderr=theirs
    )
    os.close(theirs)
    said = b""
    try:
        while chunk := os.read(ours, 4096):
            said += chunk
    except OSError:  # Linux says so when the other end is closed
        pass
    finally:
        os.close(ours)
        process.wait(60)
    return said.decode()


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "train.py"
    path.write_text(CORRUPT + "for _ in range(3): clean()\n")
    return str(path)


@pytest.fixture(autouse=True)
def off(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("TORCHGUARD", "TORCHGUARD_OPTIONS", "TORCHGUARD_PARENT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    yield
    torchguard.disable()


# ---- who asks, and where -----------------------------------------------------------------------------------------


def test_on_a_terminal(program: str) -> None:
    said = in_a_terminal(["-m", "torchguard", "--progress", program])
    (line,) = lines(said)  # it is over before the first interval is
    assert ": 0:00:0" in line
    assert "3 saves" in line
    assert line.endswith("no violations")
    assert said.replace("\r", "").endswith(f"{line}\ntorchguard: strict: no violations\n")


def test_by_variable_on_a_terminal(program: str) -> None:
    said = in_a_terminal([program], TORCHGUARD="strict", TORCHGUARD_OPTIONS="progress")
    assert len(lines(said)) == 1


def test_never_elsewhere(program: str) -> None:
    done = python(["-m", "torchguard", "--progress", program])
    assert done.stderr == "torchguard: strict: no violations\n"


def test_never_unless_wanted(program: str) -> None:
    assert lines(in_a_terminal(["-m", "torchguard", program])) == []


def test_elsewhere_if_asked_for_by_seconds(program: str) -> None:
    done = python(["-m", "torchguard", program], TORCHGUARD_OPTIONS="progress=300")
    assert len(lines(done.stderr)) == 1
    done = python([program], TORCHGUARD="strict", TORCHGUARD_OPTIONS="progress=300")
    assert len(lines(done.stderr)) == 1


def test_by_pyproject(program: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.torchguard]\nprogress = 300\n")
    done = python(["-m", "torchguard", program], cwd=tmp_path)
    assert len(lines(done.stderr)) == 1


def test_the_main_process_alone(program: str) -> None:
    with open(program, "a") as file:
        file.write(
            "import multiprocessing, os, subprocess, sys\n"
            "if __name__ == '__main__' and 'INNER' not in os.environ:\n"
            "    process = multiprocessing.get_context('fork').Process(target=clean)\n"
            "    process.start(); process.join()\n"
            "    subprocess.run([sys.executable, __file__], env={**os.environ, 'INNER': '1'}, check=True)\n"
        )
    done = python([program], TORCHGUARD="strict", TORCHGUARD_OPTIONS="progress=300")
    assert len(lines(done.stderr)) == 1, done.stderr


def test_rank_0_alone(program: str) -> None:
    for rank in ("0", "1"):
        done = python(["-m", "torchguard", program], TORCHGUARD_OPTIONS="progress=300", RANK=rank)
        assert len(lines(done.stderr)) == (rank == "0")


def test_enable_and_disable(capsys: pytest.CaptureFixture[str]) -> None:
    torchguard.enable("strict", progress=300)
    torch.ones(3, requires_grad=True).exp().sum().backward()
    assert capsys.readouterr().err == ""
    torchguard.disable()
    (line,) = lines(capsys.readouterr().err)
    assert " 1 save (" in line
    torchguard.enable("strict", progress=True)  # pytest's standard error is no terminal
    torchguard.disable()
    assert capsys.readouterr().err == ""


def test_enabled_anew_it_tells_of_what_is_over_and_begins_again(capsys: pytest.CaptureFixture[str]) -> None:
    torchguard.enable("strict", progress=300)
    torch.ones(3, requires_grad=True).exp().sum().backward()
    torchguard.enable("warn", progress=300)
    assert len(lines(capsys.readouterr().err)) == 1
    torchguard.disable()
    (line,) = lines(capsys.readouterr().err)
    assert " 0 saves (" in line


# ---- what can be written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "read"),
    [("yes", True), ("1", True), (True, True), ("no", False), ("0", False), (False, False), ("2", 2), (60, 60)],
)
def test_values(written: Any, read: bool | int) -> None:
    config, problems = _config.resolve([Layer("", {"mode": "strict", "progress": written})])
    assert problems == []
    assert config.progress == read
    assert type(config.progress) is type(read)


@pytest.mark.parametrize("written", ["often", "-3", "2.5", "", [5]])
def test_bad_values(written: Any) -> None:
    config, (problem,) = _config.resolve([Layer("here", {"mode": "strict", "progress": written})])
    assert config == Config("strict")
    assert problem == (
        f"here: progress={written!r} is neither true, nor false, nor a number of seconds from 2 up; ignored"
    )


def test_a_bad_value_given_to_enable() -> None:
    with pytest.raises(ValueError, match="progress='often' is neither true, nor false"):
        torchguard.enable(progress="often")  # type: ignore[arg-type]


# ---- while it runs ---------------------------------------------------------------------------------------------


def test_lines_come_one_after_another_until_the_end() -> None:
    said: list[str] = []
    third = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 3:
            third.set()

    with torchguard.strict() as guard:
        y = torch.ones(3, requires_grad=True).sigmoid()
        before = threading.enumerate()
        progress = _progress.Progress(guard, 0.001, say)
        assert third.wait(60)
        assert threading.enumerate() == before  # the program does not see it
        progress.end()
        y.sum().backward()
    assert all(re.fullmatch(rf"\d:\d\d:\d\d  {NUMBERS}", line) for line in said)
    count = len(said)
    progress.end()  # once more says nothing
    assert len(said) == count
    assert guard.unwatched == torchguard.strict().unwatched


def test_violations_are_told() -> None:
    said: list[str] = []
    with torchguard.Guard(action="record") as guard:
        progress = _progress.Progress(guard, 300, said.append)
        y = torch.ones(3, requires_grad=True).sigmoid()
        y.data.zero_()
        y.sum().backward()
        progress.end()
    assert said[0].endswith(", 1 violation")


def test_what_goes_wrong_is_told_once_and_hurts_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    told = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        told.set()

    with torchguard.strict() as guard:
        monkeypatch.setattr(guard, "findings", None)
        progress = _progress.Progress(guard, 0.001, say)
        assert told.wait(60)
        progress.end()
        monkeypatch.undo()
    assert said == ["no more progress: AttributeError: 'NoneType' object has no attribute 'violations'"]


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "0:00:00"), (59.9, "0:00:59"), (61, "0:01:01"), (3_600, "1:00:00"), (360_061, "100:01:01")],
)
def test_the_clock(seconds: float, told: str) -> None:
    assert _progress._clock(seconds) == told
