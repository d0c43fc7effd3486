"""Does the guard catch every corrupting program of the catalogue, and leave all the others alone?"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import catalogue
import harness
import pytest
import torch
from catalogue import PROGRAMS, methods
from harness import Program


@pytest.mark.parametrize("case", PROGRAMS, ids=str)
def test_the_program_is_what_it_claims_to_be(case: Program) -> None:
    harness.check_kind(case)


@pytest.mark.parametrize("case", PROGRAMS, ids=str)
def test_the_guard_does_with_the_program_what_it_must(case: Program) -> None:
    harness.check_all_modes(case)


def test_every_row_of_the_table_of_verdicts_has_programs_and_the_page_shows_the_table() -> None:
    assert {harness.row_of(case) for case in PROGRAMS} == set(harness.VERDICTS)
    columns = {mode.column for mode in harness.MODES} | {"watch"}
    assert all(row.keys() == columns for row in harness.VERDICTS.values())
    page = (Path(__file__).parent.parent / "docs" / "choosing.md").read_text(encoding="utf-8")
    assert f"\n{harness.table_of_verdicts()}\n" in page


def test_names_are_unique() -> None:
    assert [name for name, count in Counter(case.name for case in PROGRAMS).items() if count > 1] == []


def test_every_corrupting_program_has_an_innocent_twin() -> None:
    corrupting = {case.name for case in PROGRAMS if case.kind == "corrupting"}
    twinned = {name for case in PROGRAMS if case.kind == "innocent" for name in case.twin_of}
    assert corrupting - twinned == set()
    assert {name for case in PROGRAMS for name in case.twin_of} - corrupting == set()


def test_the_four_textbook_programs_come_first() -> None:
    assert [case.route for case in PROGRAMS[:4]] == ["textbook"] * 4
    assert catalogue.PROGRAMS is harness.PROGRAMS


def test_every_in_place_method_of_a_tensor_has_a_program() -> None:
    names = {name for name in dir(torch.Tensor) if name.endswith("_") and not name.endswith("__")}
    covered = {name for name in names if any(name in table for table in methods.TABLES)}
    assert names - covered - set(methods.NO_PROGRAM) == set()
