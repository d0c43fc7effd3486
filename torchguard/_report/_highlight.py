"""Which parts of a line of Python are keywords, strings, numbers, comments?

For excerpts: a few lines from the middle of a file need not be whole statements, so the lines are scanned, not parsed.
"""

from __future__ import annotations

import keyword
import re

_TOKEN = re.compile(
    r"""
      (?P<comment>\#.*)
    | (?P<string>(?:\b[rbfuRBFU]{1,2})?(?:
          \"{3}.*?(?:\"{3}|$) | '{3}.*?(?:'{3}|$) | "(?:\\.|[^"\\])*(?:"|$) | '(?:\\.|[^'\\])*(?:'|$)
      ))
    | (?P<number>\b(?:0[xXoObB][\da-fA-F_]+|\d[\d_]*\.?[\d_]*(?:[eE][+-]?\d+)?[jJ]?))
    | (?P<decorator>^\s*@[\w.]+)
    | (?P<name>[^\W\d]\w*)
    """,
    re.VERBOSE,
)

#: Characters that a page would hide or that turn the direction of what follows: shown by name.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with control characters and those that turn the direction of writing shown by their number."""
    return _INVISIBLE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def highlight(line: str) -> list[tuple[str, str]]:
    """The line cut into pieces: what each is (keyword, string, number, comment, decorator or ``""``), and its text."""
    line = visible(line.expandtabs(4))
    pieces: list[tuple[str, str]] = []
    end = 0
    for match in _TOKEN.finditer(line):
        kind = match.lastgroup or ""
        if kind == "name":
            if not keyword.iskeyword(match.group()):
                continue
            kind = "keyword"
        if match.start() > end:
            pieces.append(("", line[end : match.start()]))
        pieces.append((kind, match.group()))
        end = match.end()
    if end < len(line):
        pieces.append(("", line[end:]))
    return pieces
