"""Do the commands under ``tools/`` say what is true?"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import compare
import compat
from catalogue import PROGRAMS

NAMED = {case.name: case for case in PROGRAMS}


@pytest.mark.parametrize(
    ("tool", "program", "column"),
    [
        ("plain PyTorch", PROGRAMS[0].name, "missed"),
        ("torchguard.strict()", PROGRAMS[0].name, "caught"),
        ("allow_mutation_on_saved_tensors", "out_through_an_alias_that_is_gone", "repaired"),
        ("plain PyTorch", "out_into_a_tracked_alias", None),
        ("allow_mutation_on_saved_tensors", "out_into_a_tracked_alias", "refused, then right"),
        ("torchguard.repair()", "out_into_a_tracked_alias", "refused, then right"),
        ("torchguard.repair()", PROGRAMS[0].name, "repaired"),
        ('torchguard.strict(at="read")', PROGRAMS[0].name, "caught"),
        ("torchguard.watch()", PROGRAMS[0].name, "caught"),
        ("torchguard.audit()", PROGRAMS[0].name, "caught"),
        ("torchguard.strict()", "out_of_values_that_are_there", None),
    ],
)
def test_a_program_is_put_into_its_column(tool: str, program: str, column: str | None) -> None:
    case = NAMED[program]
    assert compare.verdict(case, compare.TOOLS[tool]) == column


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("5 failed, 33 passed", {"failed": 5, "passed": 33}),
        ("121 passed, 1 skipped, 2 warnings", {"passed": 121, "skipped": 1, "warning": 2}),
        ("807 errors", {"error": 807}),
        ("Segmentation fault", {}),
    ],
)
def test_the_last_line_of_pytest_is_counted(line: str, expected: dict[str, int]) -> None:
    assert compat.counted(line) == expected


def test_a_row_of_the_table_of_versions_has_the_columns_of_the_page() -> None:
    counts = {"test_guard": compat.counted("1 failed, 119 passed, 2 skipped"), "test_watch": compat.counted("3 errors")}
    row = compat.row("3.12.1", "2.13.0", "both", counts)
    assert row == "| 3.12.1 | 2.13.0 | both | `test_guard` 119 / 1 / 2, `test_watch` 0 / 3 / 0 |"
    page = (Path(__file__).parents[1] / "docs" / "compatibility.md").read_text(encoding="utf-8")
    assert row.count("|") == "| Python | torch | demos | tests |".count("|")
    assert "| Python | torch | demos | tests |" in page


def test_without_a_version_of_torch_all_packages_are_those_of_the_constraints() -> None:
    assert "-c" in compat.packages(None, None)
    assert "-c" not in compat.packages("2.5.0", None)
    assert "torch==2.5.0" in compat.packages("2.5.0", None)


def test_an_interpreter_that_is_not_there_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["compat.py", "--python", "/nowhere/python3"])
    with pytest.raises(SystemExit, match=r"^compat: --python /nowhere/python3 cannot be run .*python3.12 say$"):
        compat.main()
    assert capfd.readouterr() == ("", "")
