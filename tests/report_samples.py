"""Violations and reports for the tests of reports, and the checks of a JSON schema (those that SARIF's schema uses)."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from torchguard._model import Place
from torchguard._report import ReportWriter, open_report
from torchguard._violation import Violation

SOURCE = """\
import torch

def step(h):
    y = torch.sigmoid(h)  # saved
    w = y.data
    w.zero_()
    y.sum().backward()
"""


def violation(file: str | Path = "train.py", **changes: Any) -> Violation:
    """A write through ``.data``, at the lines of ``SOURCE``."""

    def place(line: int, expression: str = "") -> Place:
        return Place(str(file), line, "step", SOURCE.splitlines()[line - 1].strip(), expression)

    found = Violation(
        "write", "zero_()", place(4, "torch.sigmoid(h)"), place(5, "y.data"), place(6), "sigmoid", "float32", (64, 10), "cpu",
        640, 640,
    )  # fmt: skip
    return dataclasses.replace(found, **changes)


def written(path: Path, *violations: Violation, times: int = 1) -> ReportWriter:
    """A closed report of violations, each hit ``times`` times."""
    with open_report(path) as writer:
        for _ in range(times):
            for each in violations:
                writer.add(each)
    return writer


# ---- JSON schema, draft 4, as far as SARIF's schema goes

_TYPES: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "number": (int, float), "integer": int,
}  # fmt: skip
_FORMATS = {
    "date-time": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)",
    "uri": r"[A-Za-z][\w+.-]*:[\w:/?#\[\]@!$&'()*+,;=.~%-]*",
    "uri-reference": r"[\w:/?#\[\]@!$&'()*+,;=.~%-]*",
}


def faults(value: Any, schema: dict[str, Any], root: dict[str, Any], where: str = "$") -> list[str]:
    """What about ``value`` the schema forbids; a keyword that this does not know is a fault, too."""
    if "$ref" in schema:
        return faults(value, root["definitions"][schema["$ref"].removeprefix("#/definitions/")], root, where)
    found = []
    for keyword, rule in schema.items():
        found += [f"{where}: {fault}" for fault in _check(keyword, rule, value, schema)]
        if keyword == "properties" and isinstance(value, dict):
            for name, inner in rule.items():
                if name in value:
                    found += faults(value[name], inner, root, f"{where}.{name}")
        elif keyword == "items" and isinstance(value, list):
            for i, item in enumerate(value):
                found += faults(item, rule, root, f"{where}[{i}]")
        elif keyword == "additionalProperties" and isinstance(rule, dict) and isinstance(value, dict):
            for name in value.keys() - schema.get("properties", {}).keys():
                found += faults(value[name], rule, root, f"{where}.{name}")
        elif keyword in ("anyOf", "oneOf"):
            fits = sum(not faults(value, {**inner}, root, where) for inner in rule)
            if fits == 0 or (keyword == "oneOf" and fits > 1):
                found.append(f"{where}: {fits} of {keyword} fit")
    return found


def _check(keyword: str, rule: Any, value: Any, schema: dict[str, Any]) -> list[str]:
    wrong = False
    if keyword == "type":
        names = [rule] if isinstance(rule, str) else rule
        wrong = not any(
            isinstance(value, _TYPES[name]) and not (isinstance(value, bool) and name in ("integer", "number"))
            for name in names
        )
    elif keyword == "enum":
        wrong = value not in rule
    elif keyword == "required":
        wrong = isinstance(value, dict) and not set(rule) <= value.keys()
    elif keyword == "additionalProperties":
        wrong = rule is False and isinstance(value, dict) and bool(value.keys() - schema.get("properties", {}).keys())
    elif keyword == "minimum":
        wrong = isinstance(value, (int, float)) and value < rule
    elif keyword == "maximum":
        wrong = isinstance(value, (int, float)) and value > rule
    elif keyword == "minItems":
        wrong = isinstance(value, list) and len(value) < rule
    elif keyword == "uniqueItems":
        wrong = rule is True and isinstance(value, list) and any(v in value[:i] for i, v in enumerate(value))
    elif keyword == "pattern":
        wrong = isinstance(value, str) and re.search(rule, value) is None
    elif keyword == "format":
        wrong = isinstance(value, str) and re.fullmatch(_FORMATS[rule], value, re.ASCII) is None
    elif keyword not in (
        "$schema", "id", "title", "description", "default", "definitions", "properties", "items", "anyOf", "oneOf",
    ):  # fmt: skip
        return [f"keyword {keyword!r} is not checked"]
    return [f"{keyword} {rule!r} does not hold of {value!r:.80}"] if wrong else []
