"""What is asked for: which mode, with which options, and who has the last word?

Arguments beat the command line, that beats the environment, that beats ``[tool.torchguard]`` in pyproject.toml. What
comes out is one frozen :class:`Config`. What cannot be understood is told in one line each and otherwise ignored: a
program must run whatever stands in a variable.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

#: What each mode is made of, as keywords of ``Guard``. A mode that is entered here exists everywhere: variable,
#: command line, pytest, ``enable()``.
MODES: dict[str, dict[str, Any]] = {
    "strict": {"action": "raise"},
    "warn": {"action": "warn"},
    "repair": {"action": "repair", "at": "read", "every_call": True},
    "audit": {"action": "raise", "depth": "bytes"},
    "watch": {"action": "raise", "at": "read", "depth": "watch"},
}
#: What a guard can do, when it can judge, and what it can look at.
ACTIONS: tuple[str, ...] = ("raise", "warn", "repair", "record")
MOMENTS: tuple[str, ...] = ("write", "read")
DEPTHS: tuple[str, ...] = ("watch", "saves", "bytes")


def senseless(action: str, at: str | None, depth: str, every_call: bool | None = False) -> str | None:
    """What is wrong with a combination, and what would be right; None where nothing is."""
    if depth == "watch" and every_call:
        return "no call is seen: with watch, every_call is False"
    if depth == "watch" and at == "write":
        return "PyTorch compares versions when backward reads: with watch, at is 'read', not 'write'"
    if action == "repair" and at == "write":
        return "repair acts when backward reads: with it, at is 'read', not 'write'"
    return None


_ON = ("1", "on", "true", "yes")
_OFF = ("0", "off", "false", "no")

#: The exit status of a program that succeeded although violations were reported.
EXIT_STATUS = 66


@dataclass(frozen=True)
class Config:
    """What is asked for.

    Attributes:
        mode: ``"off"`` or one of :data:`MODES`.
        at: when to judge, one of :data:`MOMENTS`; None as the mode has it.
        every_call: also see calls that no patch sees; None as the mode has it.
        report: path to write the violations to.
        exitcode: status of a program that succeeded although violations were reported; 0 leaves it alone.
        suppressions: path of a file, or the lines themselves.
        max_reports: how many sites to warn of and to show in the summary; None for all.
        progress: say now and then how far it is: True on a terminal, a number of seconds wherever standard error leads.
    """

    mode: str = "off"
    at: str | None = None
    every_call: bool | None = None
    report: str | None = None
    exitcode: int = EXIT_STATUS
    suppressions: str | tuple[str, ...] | None = None
    max_reports: int | None = None
    progress: bool | int = False

    def guard_keywords(self) -> dict[str, Any]:
        """The keywords of the ``Guard`` that this asks for."""
        asked = {"at": self.at, "every_call": self.every_call}
        return {**MODES[self.mode], **{name: value for name, value in asked.items() if value is not None}}


OPTIONS: tuple[str, ...] = tuple(field.name for field in fields(Config))


@dataclass(frozen=True)
class Layer:
    """What one source asks for, as it was written there.

    Attributes:
        source: what to call it in messages.
        values: option and value.
        directory: what relative paths start from; None for the working directory.
    """

    source: str
    values: Mapping[str, Any]
    directory: str | None = None


class _Bad(Exception):
    """A value that cannot be used; the message says what would do."""


def resolve(layers: Sequence[Layer], default: str = "off") -> tuple[Config, list[str]]:
    """One configuration from all layers, those that count most first; and what is wrong with them, a line each.

    Args:
        default: the mode where no layer names one. Where one says just ``on``, the next that names a mode says which;
            else it is strict.
    """
    chosen: dict[str, Any] = {}
    written_in: dict[str, str] = {}
    problems: list[str] = []
    turned_on = False
    for layer in layers:
        for written, value in layer.values.items():
            option = written.removeprefix("--").replace("-", "_")
            if option not in OPTIONS:
                what = f"unknown option {written!r}{nearest(option, OPTIONS)}; ignored"
                problems.append(f"{layer.source}: {what}".removeprefix(": "))
                continue
            if option in chosen or value is None:
                continue
            if option == "mode" and isinstance(value, (str, bool)) and str(value).lower() in _ON:
                turned_on = True
                continue
            try:
                parsed = _PARSERS[option](value, layer.directory)
                if not (turned_on and option == "mode" and parsed == "off"):
                    chosen[option] = parsed
                    written_in[option] = f"{layer.source}: {written}={value!r}".removeprefix(": ")
            except _Bad as bad:
                what = str(bad)
                if option == "mode":
                    chosen["mode"] = "off"  # of all that could be guessed, the one that changes nothing
                    if layer.source == "TORCHGUARD" and "=" in value:
                        what = "is not a mode: options stand in TORCHGUARD_OPTIONS, and the mode alone here"
                name = layer.source if layer.source == "TORCHGUARD" else f"{layer.source}: {written}".removeprefix(": ")
                problems.append(f"{name}={value!r} {what}; {'not switched on' if option == 'mode' else 'ignored'}")
    if "mode" not in chosen:
        chosen["mode"] = default if default != "off" or not turned_on else "strict"
    for option in ("at", "every_call"):
        wrong = _senseless_in(Config(**chosen), option) if option in chosen else None
        if wrong is not None:
            del chosen[option]
            problems.append(f"{written_in[option]}: {wrong}; ignored")
    return Config(**chosen), problems


def _senseless_in(config: Config, option: str) -> str | None:
    if config.mode == "off":
        return None
    keywords = config.guard_keywords()
    at, every_call = (config.at, False) if option == "at" else (None, config.every_call)
    return senseless(keywords["action"], at, keywords.get("depth", "saves"), every_call)


#: What is done about a problem where nobody can be told that it is an error.
_OUTCOMES = ("ignored", "not switched on", "nothing is suppressed")


def fault_of(problem: str) -> str:
    """A line about what is wrong, without what is done about it: for where it is an error."""
    for outcome in _OUTCOMES:
        problem = problem.removesuffix(f"; {outcome}")
    return problem


def nearest(name: str, choices: Iterable[str]) -> str:
    """What to say of a name that is none of ``choices``: which was meant, and which there are."""
    choices = list(choices)
    near = difflib.get_close_matches(name, choices, 1, 0.5)
    return (f"; did you mean {near[0]!r}?" if near else "") + f" ({', '.join(choices)})"


# ---- values ------------------------------------------------------------------------------------------------


def _one_of(name: str, choices: Callable[[], Sequence[str]]) -> Callable[[Any, str | None], str]:
    def parse(value: Any, _: str | None) -> str:
        allowed = choices()
        text = value.lower() if isinstance(value, str) else value
        if name == "mode" and str(value).lower() in _OFF:
            return "off"
        if text not in allowed:
            raise _Bad(f"is not a {name} of this version{nearest(str(value), allowed)}")
        return str(text)

    return parse


def _boolean(value: Any, _: str | None) -> bool:
    text = str(value).lower()
    if text not in (*_ON, *_OFF):
        raise _Bad("is neither true nor false")
    return text in _ON


def _integer(low: int, high: int | None) -> Callable[[Any, str | None], int]:
    def parse(value: Any, _: str | None) -> int:
        text = "" if isinstance(value, bool) else str(value)
        number = int(text) if re.fullmatch(r"\d{1,9}", text) else -1
        if number < low or (high is not None and number > high):
            raise _Bad(f"is not a number from {low} {f'to {high}' if high is not None else 'up'}")
        return number

    return parse


def _boolean_or_seconds(value: Any, _: str | None) -> bool | int:
    text = str(value).lower()
    if text in (*_ON, *_OFF):
        return text in _ON
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise _Bad("is neither true, nor false, nor a number of seconds from 2 up")
    return int(text)


def _path(value: Any, directory: str | None) -> str:
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise _Bad("is not a path")
    # Absolute, because the program may change its directory, and its child processes start in others.
    return os.path.abspath(os.path.join(directory or "", os.path.expanduser(os.fspath(value))))


#: What a report's path may end in; what each is for is told in docs/reports.md.
REPORTS: tuple[str, ...] = (".jsonl", ".json", ".sarif", ".html", ".txt")


def _report(value: Any, directory: str | None) -> str:
    path = _path(value, directory)
    if os.path.isdir(path):
        raise _Bad(f"is a directory; name a file in it, {os.path.join(os.fspath(value), 'report.html')!r} say")
    suffix = os.path.splitext(path)[1]
    if suffix.lower() not in REPORTS:
        raise _Bad(f"does not say by its ending what kind of report to write{nearest(suffix, REPORTS)}")
    return path


def _lines_or_path(value: Any, directory: str | None) -> str | tuple[str, ...]:
    if isinstance(value, (list, tuple)):
        if not all(isinstance(line, str) for line in value):
            raise _Bad("is not a list of lines")
        return tuple(value)
    return _path(value, directory)


_PARSERS: dict[str, Callable[[Any, str | None], Any]] = {
    "mode": _one_of("mode", lambda: ("off", *MODES)),
    "at": _one_of("moment", lambda: MOMENTS),
    "every_call": _boolean,
    "report": _report,
    "exitcode": _integer(0, 255),
    "suppressions": _lines_or_path,
    "max_reports": _integer(0, None),
    "progress": _boolean_or_seconds,
}


# ---- where layers come from --------------------------------------------------------------------------------


def of_environment(environment: Mapping[str, str]) -> tuple[list[Layer], list[str]]:
    """``TORCHGUARD`` and ``TORCHGUARD_OPTIONS``, and what is wrong with the latter."""
    layers = []
    mode = environment.get("TORCHGUARD", "").strip()
    if mode:
        layers.append(Layer("TORCHGUARD", {"mode": mode}))
    values, problems = _options_of(environment.get("TORCHGUARD_OPTIONS", ""))
    layers.append(Layer("TORCHGUARD_OPTIONS", values))
    return layers, problems


#: As the sanitizers have it: KEY=VALUE, separated by colons, commas or space; a value that holds one is in quotes.
_OPTION = re.compile(
    r"""(?P<key>[^\s:,='"]+)(?:=(?:"(?P<double>[^"]*)"|'(?P<single>[^']*)'|(?P<plain>(?:[A-Za-z]:(?=[\\/]))?[^\s:,]*)))?"""
    r"""(?=[\s:,]|$)|(?P<rest>[^\s:,]+)"""
)


def _options_of(text: str) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    problems = []
    for match in _OPTION.finditer(text):
        key = match["key"]
        if key is None or (value := match["double"] or match["single"] or match["plain"]) is None:
            if key in ("every_call", "progress"):
                values[key] = True
            else:
                problems.append(f"TORCHGUARD_OPTIONS: {match[0]!r} is not KEY=VALUE; ignored")
        else:
            values[key] = value
    return values, problems


def of_project(start: str | None = None) -> tuple[list[Layer], list[str]]:
    """``[tool.torchguard]`` of the nearest pyproject.toml from ``start`` upwards, and what is wrong with it."""
    try:
        directory = os.path.abspath(start or os.getcwd())
    except OSError:  # the working directory is gone
        return [], []
    while not os.path.isfile(path := os.path.join(directory, "pyproject.toml")):
        parent = os.path.dirname(directory)
        if parent == directory:
            return [], []
        directory = parent
    try:
        with open(path, "rb") as file:
            content = file.read()
        if b"torchguard" not in content:
            return [], []
        toml = _toml_reader()
        if toml is None:
            return [], [f"{path} is not read: this Python has no tomllib; pip install tomli"]
        table = toml.loads(content.decode()).get("tool", {}).get("torchguard", {})
    except (OSError, ValueError, AttributeError) as error:
        return [], [f"{path} is not read: {error}"]
    if not isinstance(table, dict):
        return [], [f"{path}: tool.torchguard is not a table; ignored"]
    return [Layer(f"{path} [tool.torchguard]", table, directory)], []


def _toml_reader() -> Any:
    for name in ("tomllib", "tomli"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    return None
