"""Is each write to what PyTorch's operators save seen, and nothing else? (A slice; ``make sweep`` takes more samples.)"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import sweep
import sweep_operators
from sweep_operators import Result, examine
from test_broken_guard import Alarmist, Mute

PARTS = 4

#: Gradients of these are for other devices, or take no sample on a CPU.
NO_SAMPLE = {"torch_ops_aten__flash_attention_forward", "torch_ops_aten__efficient_attention_forward"}


@functools.cache
def operators() -> list[Any]:
    return sweep_operators.operators()


@pytest.mark.parametrize("part", range(PARTS))
def test_every_write_that_corrupts_is_caught_and_nothing_else_is_reported(part: int) -> None:
    results = [examine(operator, samples=1) for operator in operators()[part::PARTS]]
    assert [f"{one.name}: {failure}" for one in results for failure in one.failures] == []
    assert sum(one.corrupting for one in results) == sum(one.caught for one in results) > 80
    assert len([one for one in results if one.samples]) > 120


def of(name: str) -> Any:
    return next(operator for operator in operators() if operator.name == name)


def test_a_save_that_no_gradient_uses_is_named() -> None:
    found = examine(of("linalg.svdvals"), samples=1)
    assert found.unread
    assert found.failures == []


@pytest.mark.parametrize(("guard", "said"), [(Mute, "missed"), (Alarmist, "false alarm")])
def test_a_broken_guard_fails(guard: type, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchguard.strict", lambda: guard("raise"))
    found = examine(of("exp"), samples=1)
    assert found.failures
    if said == "missed":
        assert said in found.failures[0]


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main(["--only", "sigmoid", "--samples", "1"]) == 0
    told = capsys.readouterr().out
    assert "caught" in told
    assert "of these caught; 0 failures" in told


def test_the_page_tells_recall_and_names_what_no_gradient_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = [
        Result("one", samples=1, writes=3, corrupting=2, caught=2),
        Result("two", samples=1, writes=1, unread={"input 0"}),
        Result("three"),
    ]
    text = sweep.page(results, 1)
    assert "| of these are caught | 2: a recall of 100 % |" in text
    assert "| `two` | input 0 |" in text
    assert "| without a sample that can be copied | `three` |" in text
    results[0].caught = 1
    assert "a recall of 50 %" in sweep.page(results, 1)
    page = tmp_path / "page.md"
    monkeypatch.setattr(sweep, "operators", lambda: [of("linalg.svdvals")])
    assert sweep.main(["--samples", "1", "--page", str(page)]) == 0
    assert "`linalg_svdvals`" in page.read_text()
    page.unlink()
    monkeypatch.setattr(sweep, "operators", lambda: [of("exp")])
    monkeypatch.setattr("torchguard.strict", lambda: Mute("raise"))
    assert sweep.main(["--samples", "1", "--page", str(page)]) == 1
    assert not page.exists()


def test_the_page_of_the_documentation_was_written_by_the_command() -> None:
    text = (Path(__file__).parents[1] / "docs" / "operators.md").read_text(encoding="utf-8")
    written = [line for line in sweep.page([], 1).splitlines() if line and not line.startswith("|")]
    assert [line for line in written if line not in text and "torch" not in line] == []
    assert ": a recall of 100 %" in text
