"""Which violations does a suppression speak of, and is one that speaks of none told?"""

from __future__ import annotations

import dataclasses
import ntpath
import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import torchguard
from torchguard import _suppressions
from torchguard._model import Place
from torchguard._violation import Violation


def violation(**values: Any) -> Violation:
    here = Place("/work/src/models/net.py", 42, "Net.forward")
    made = Violation("write", "zero_()", here, here, here, "sigmoid", "float32", (3,), "cpu", 3, 3)
    return dataclasses.replace(made, **values)


def matches(line: str, **values: Any) -> bool:
    suppression = _suppressions.parse(f"{line} -- why", "s:1")
    assert suppression is not None
    return suppression.matches(violation(**values))


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("net.py", True),
        ("models/net.py", True),
        ("src/models/net.py", True),
        ("/work/src/models/net.py", True),
        ("./models/net.py", True),
        ("*.py", True),
        ("models/*.py", True),
        ("models/n?t.py", True),
        ("src/**/net.py", True),
        ("src/**", True),
        ("/work/**/net.py", True),
        ("**/models/**/net.py", True),
        ("et.py", False),  # part of a name
        ("src/*.py", False),  # a star stays in its directory
        ("/src/models/net.py", False),
        ("models", False),
        ("lib/**/net.py", False),
        ("lib/**", False),
        ("src/**t.py", True),
        ("src/**x.py", False),
        ("NET.py", False),  # but for Windows, a file has its name
        (r"models\net.py", False),
        ("n.t.py", False),  # a dot is a dot
        ("net.py:42", True),
        ("net.py:40-50", True),
        ("net.py:41", False),
        ("net.py:43-50", False),
        ("net.py:Net.forward", True),
        ("net.py:forward", True),
        ("net.py:Net.*", True),
        ("net.py:backward", False),
        ("net.py:Net", False),
        ("net.py:42-42", True),
        ("net.py:1-41", False),
        ("net.py:[A-Z]*.for*", True),
        ("net.py:[!A-Z]*", True),  # of the bare name
        ("net.py:Net.?orward", True),
        ("net.py:N-t.forward", False),
        ("net.py write", True),
        ("net.py *", True),
        ("net.py rebind,write", True),
        ("net.py rebind", False),
        ("net.py:42 unseen", False),
    ],
)
def test_what_a_line_speaks_of(line: str, match: bool) -> None:
    assert matches(line) is match


@pytest.mark.parametrize("function", ["<lambda>", "<module>", "f.<locals>.g", "größe", "_step2"])
def test_every_name_that_a_function_can_have_is_taken_for_one(function: str) -> None:
    assert matches(f"net.py:{function}", written=Place("/work/src/models/net.py", 42, function))
    assert not matches(f"net.py:{function}", written=Place("/work/src/models/net.py", 42, "other"))


def test_where_the_write_was_not_seen_it_is_the_line_that_reads() -> None:
    assert matches("train.py:7 unseen", kind="unseen", written=None, read=Place("train.py", 7, "<module>"))
    assert not matches("**", written=None, read=None)


def test_code_without_a_file_is_named_as_python_names_it() -> None:
    assert matches("<stdin>:7", written=Place("<stdin>", 7, "<module>"))


def test_code_without_a_file_lies_in_no_directory() -> None:
    assert not matches("/**", written=Place("<stdin>", 7, "<module>"))


def test_a_method_of_a_class_within_another_has_its_bare_name_too() -> None:
    place = Place("net.py", 7, "Net.Block.forward")
    assert matches("net.py:forward", written=place)
    assert matches("net.py:Net.Block.forward", written=place)
    assert not matches("net.py:Block.forward", written=place)


def test_a_file_has_its_name_where_the_working_directory_is_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert matches("net.py", written=Place("net.py", 7, "f"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (r"models\net.py", True),
        ("models/net.py", True),
        (r"Models\NET.PY", True),
        (r"C:\work\src\models\net.py:42", True),
        (r"C:\work\src\models\net.py", True),
        ("c:/work/**", True),
        (r"D:\work\src\models\net.py", False),
        (r"src\net.py", False),
    ],
)
def test_on_windows_backslashes_are_slashes_and_letters_have_no_case(
    line: str, match: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = types.SimpleNamespace(name="nt", path=ntpath, fspath=os.fspath, PathLike=os.PathLike)
    monkeypatch.setattr(_suppressions, "os", windows)
    assert matches(line, written=Place(r"C:\work\src\models\net.py", 42, "f")) is match


def test_a_file_below_the_working_directory_is_matched_from_anywhere_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert matches(f"{tmp_path}/src/a.py", written=Place("src/a.py", 1, "f"))
    assert matches(f"{tmp_path.name}/src/a.py", written=Place("src/a.py", 1, "f"))


@pytest.mark.parametrize("line", ["", "   ", "# a comment -- with dashes"])
def test_what_is_no_suppression(line: str) -> None:
    assert _suppressions.parse(line, "s:1") is None


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("net.py", "s:3: 'net.py' has no reason; write GLOB[:LINE|:FUNCTION] [KIND] -- REASON"),
        ("net.py --", "s:3: 'net.py --' has no reason"),
        ("net.py --   ", "s:3: 'net.py --' has no reason"),
        ("-- why", "cannot be read"),
        ("net.py write now -- why", "cannot be read"),
        ("net.py: -- why", "cannot be read"),
        ("net.py:9-3 -- why", "s:3: '9-3' ends before it begins; write a line (9), lines (3-9) or a function (step, "),
        ("net.py:0 -- why", "s:3: '0' counts from 0, and lines from 1; write a line (9)"),
        ("net.py:0-3 -- why", "s:3: '0-3' counts from 0, and lines from 1; write a line (9)"),
        ("net.py:3- -- why", "s:3: '3-' is neither lines nor the name of a function; write a line (9)"),
        ("net.py:-3 -- why", "s:3: '-3' is neither lines nor the name of a function; write a line (9)"),
        ("net.py:3,9 -- why", "s:3: '3,9' is neither lines nor the name of a function; write a line (9)"),
        ("net.py:3..9 -- why", "s:3: '3..9' is neither lines nor the name of a function; write a line (9)"),
        ("net.py:step() -- why", "s:3: 'step()' is neither lines nor the name of a function; write a line (9)"),
        ("net.py:9:12 -- why", "s:3: '9:12' is a line with something behind it; write a line (9)"),
        ("net.py rebnd -- why", "s:3: no kind of violation is called 'rebnd'; did you mean 'rebind'? (write, "),
    ],
)
def test_a_line_that_cannot_be_read_is_told(line: str, told: str) -> None:
    with pytest.raises(_suppressions.SuppressionError) as caught:
        _suppressions.parse(line, "s:3")
    assert told in str(caught.value)


def test_a_file_gives_those_that_can_be_read_and_names_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.txt").write_text("# ours\n\nnet.py:42 -- put back before backward\nother.py\nold.py -- gone\n")
    found, problems = _suppressions.read(str(tmp_path / "s.txt"), "")
    assert [one.source for one in found.all] == ["s.txt:3", "s.txt:5"]
    assert problems == ["s.txt:4: 'other.py' has no reason; write GLOB[:LINE|:FUNCTION] [KIND] -- REASON"]
    assert found.reason_for(violation()) == "put back before backward (suppressed by s.txt:3)"
    assert found.reason_for(violation(written=Place("/x.py", 1, "f"))) is None
    assert [one.text for one in found.stale()] == ["old.py -- gone"]


def test_a_kind_that_is_like_no_other_is_told() -> None:
    with pytest.raises(_suppressions.SuppressionError, match=r"^s:3: no kind of violation is called 'xyz'; \(write, "):
        _suppressions.parse("net.py xyz -- why", "s:3")


def test_a_reason_may_have_dashes_in_it() -> None:
    found = _suppressions.parse("net.py write -- first -- and second", "s:1")
    assert found is not None
    assert (found.path, found.kinds, found.reason) == ("net.py", {"write"}, "first -- and second")


def test_what_is_no_list_of_lines_is_told() -> None:
    value: Any = 3
    found, problems = _suppressions.read(value, "suppressions")
    assert len(found) == 0
    assert problems == ["suppressions: the path of a file, or lines of text, and not 3"]


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_bytes(b"net.py -- \xff")
    found, (problem,) = _suppressions.read(str(tmp_path / "s.txt"), "")
    assert len(found) == 0
    assert problem.startswith(f"{tmp_path / 's.txt'}: 'utf-8' codec can't decode")
    assert problem.endswith("; nothing is suppressed")


def test_a_file_elsewhere_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s.txt").write_text("net.py -- why")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert _suppressions.read(str(tmp_path / "s.txt"), "")[0].all[0].source == f"{tmp_path / 's.txt'}:1"
    assert _suppressions.read("../s.txt", "")[0].all[0].source == "../s.txt:1"


@pytest.mark.parametrize(
    ("reason", "suppressed"),
    [
        (None, False),
        ("zeroed on purpose", False),
        ("zeroed on purpose (twice)", False),
        ("not (suppressed by s:1) but allowed", False),
        ("why (suppressed by s:1)", True),
    ],
)
def test_the_reason_of_a_suppression_is_known_from_that_of_an_allow_block(reason: str | None, suppressed: bool) -> None:
    assert _suppressions.gave(reason) is suppressed


def test_a_file_that_is_not_there_is_told() -> None:
    found, problems = _suppressions.read("/nowhere/s.txt", "")
    assert len(found) == 0
    assert problems == ["/nowhere/s.txt: No such file or directory; nothing is suppressed"]


# ---- guards ------------------------------------------------------------------------------------------------


def corrupt() -> torch.Tensor:
    a = torch.ones(3, requires_grad=True)
    out = a.sigmoid()
    out.data.zero_()
    out.sum().backward()
    assert a.grad is not None
    return a.grad


@pytest.mark.parametrize("make", [torchguard.strict, torchguard.warn])
def test_a_guard_lives_with_what_is_suppressed_and_keeps_it_with_the_reason(make: Any) -> None:
    with make(suppressions=["test_suppressions.py:corrupt write -- zeroed on purpose", "nowhere.py -- old"]) as guard:
        assert corrupt().tolist() == [0, 0, 0]
        corrupt()
    assert guard.violations == []
    (allowed,) = guard.allowed
    assert allowed.allowed == "zeroed on purpose (suppressed by suppressions:1)"
    assert allowed.times == 2
    assert [one.text for one in guard.suppressions.stale()] == ["nowhere.py -- old"]


def test_another_kind_or_place_is_not_suppressed() -> None:
    with torchguard.strict(suppressions=["test_suppressions.py:corrupt rebind -- why", "other.py -- why"]):
        with pytest.raises(torchguard.SavedTensorCorruptionError):
            corrupt()


def test_a_decorated_function_has_the_suppressions_of_its_guard() -> None:
    assert torchguard.strict(suppressions=["test_suppressions.py -- why"])(corrupt)().tolist() == [0, 0, 0]


def test_a_guard_refuses_a_suppression_without_a_reason() -> None:
    with pytest.raises(ValueError, match=r"torchguard: suppressions:1: 'a\.py' has no reason"):
        torchguard.strict(suppressions=["a.py"])
