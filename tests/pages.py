"""How does a test do what a page says: write its files, give its commands, compare what they print with what is shown?

A fenced block with a title is a file of that name; a later block of the same name takes its place. A block in
``console`` is a session in the directory of these files: after ``$`` a command, which ``>`` continues, under it what it
prints, where ``...`` stands for anything. A command must succeed, unless a traceback
is shown or the next one is ``echo $?``.
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from outside import environment

_FENCE = re.compile(r'^(?P<indent> *)```(?P<language>[\w-]*)(?: title="(?P<title>[^"]+)")?.*\n', re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that it is, or "", and its text."""

    language: str
    title: str
    text: str

    def commands(self) -> Iterator[tuple[str, str]]:
        """Each command of a session, and what it is to print."""
        command: list[str] = []
        shown: list[str] = []
        for line in self.text.splitlines(keepends=True):
            if line.startswith("$ "):
                if command:
                    yield "".join(command), "".join(shown)
                command, shown = [line[2:]], []
            elif line.startswith("> ") and not shown:
                command.append(line[2:])
            else:
                shown.append(line)
        yield "".join(command), "".join(shown)


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page in Markdown, in their order."""
    found = []
    position = 0
    while (fence := _FENCE.search(page, position)) is not None:
        end = page.index(f"\n{fence['indent']}```\n", fence.end() - 1)
        text = textwrap.dedent(page[fence.end() : end + 1])
        found.append(Block(fence["language"], fence["title"] or "", text))
        position = end + len(fence["indent"]) + 5
    return found


def say(command: str, directory: Path, status: int = 0) -> tuple[int, str]:
    """Give a command to a shell in which the last one ended with ``status``: how it ends, and all that it prints."""
    variables = environment(
        PATH=os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])),
        PYTHONUNBUFFERED="1",  # what it prints, and what it says on standard error, in the order in which it does
        GLOO_SOCKET_IFNAME="lo",
        HF_HUB_OFFLINE="1",
        COLUMNS="80",
        NO_COLOR="1",
        TERM="dumb",
    )
    done = subprocess.run(
        ["bash", "-c", f"(exit {status})\n{command}"],
        cwd=directory,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout


def do(page: str, directory: Path) -> int:
    """Do what a page says, and compare; the number of commands that were given.

    Raises:
        AssertionError: where it goes another way than shown, with what was printed.
    """
    status, given, failed = 0, 0, ""
    for block in blocks(page):
        if block.title:
            file = directory / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
        elif block.language == "console":
            for command, shown in block.commands():
                assert not failed or command.startswith("echo $?"), failed
                status, printed = say(command, directory, status)
                given += 1
                same = doctest.OutputChecker().check_output(shown, printed, doctest.ELLIPSIS)
                assert same, f"$ {command}--- printed\n{printed}\n--- and not\n{shown}"
                told = not status or shown.startswith("Traceback ")
                failed = "" if told else f"$ {command}ended with {status}:\n{printed}"
    assert not failed, failed
    return given
