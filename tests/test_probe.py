"""Does the probe find today what is checked in, and does the guard's table agree with what it finds?"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import probe_counters
import pytest
import torch
from probe_counters import MOVES, STAYS

from torchguard import _counterless, _writers

pytestmark = pytest.mark.filterwarnings("ignore")

KNOWN: dict[str, Any] = json.loads(probe_counters.RECORD.read_text(encoding="utf-8"))
HOW = "look at what changed, then regenerate: make probe"
SAME_VERSION = torch.__version__.partition("+")[0] == KNOWN["torch"]


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """What is measured here and now."""
    return probe_counters.probe()


def of_this_version() -> None:
    if not SAME_VERSION:
        pytest.skip(f"the record is of torch {KNOWN['torch']}, this is {torch.__version__}")


def test_the_probe_finds_what_is_checked_in(record: dict[str, Any]) -> None:
    of_this_version()
    told = probe_counters.differences(KNOWN, record)
    assert told == [], f"{HOW}\n" + "\n".join(told)


def test_the_table_is_made_from_the_record() -> None:
    of_this_version()
    assert probe_counters.TABLE.read_text(encoding="utf-8") == probe_counters.table_of(KNOWN), HOW


def disagreements(record: dict[str, Any]) -> list[str]:
    """Where the guard believes other than what was measured."""
    told = []
    for key, arguments in record["operators"].items():
        name, _, overload = key.partition(".")
        operator = getattr(getattr(torch.ops.aten, name), overload or "default")
        told += _against(key, arguments, _writers.writer_of_operator(operator))
    for key, arguments in record["callables"].items():
        told += _against(key, arguments, _writers.writer_of(key.partition(".")[2]))
    return told


def _against(key: str, arguments: dict[str, str], writer: _writers.Writer | None) -> list[str]:
    told = []
    written = set() if writer is None else {argument for _, argument in writer.written}
    for argument, what in arguments.items():
        if writer is None or (argument not in written and what == STAYS):
            told.append(f"{key} writes to {argument}, and the guard does not know")
        elif (what == MOVES) == (argument in writer.uncounted):
            told.append(f"{key}: the counter of {argument} {what}, and the guard believes otherwise")
    return told


#: Seen to write and to move the counter, and called with nothing that a schema or a name gives away: PyTorch's own
#: check is enough for them.
TRACKED_AND_UNMARKED = {
    "instance_norm writes to running_mean, and the guard does not know",
    "instance_norm writes to running_var, and the guard does not know",
}


def test_the_guard_believes_what_was_measured(record: dict[str, Any]) -> None:
    """On any version of torch."""
    assert set(disagreements(record)) - TRACKED_AND_UNMARKED == set()


def test_enough_is_measured(record: dict[str, Any]) -> None:
    assert len(record["operators"]) > 250
    assert len(record["callables"]) > 300
    assert len(record["programs"]) > 60
    arguments = [what for found in record["operators"].values() for what in found.values()]
    assert {MOVES, STAYS} >= set(arguments), "an argument of which some members move and some do not"
    assert arguments.count(STAYS) > 30


def test_everything_that_can_write_was_run_or_says_why_not(record: dict[str, Any]) -> None:
    operators = set(probe_counters.operators())
    assert operators == record["operators"].keys() | record["operators not run"].keys()
    names = set(probe_counters.callables())
    assert names == record["callables"].keys() | record["callables not run"].keys()
    for part in ("operators", "callables", "programs"):
        assert not record[part].keys() & record[f"{part} not run"].keys()
        assert all(reason.strip() for reason in record[f"{part} not run"].values())


@pytest.mark.parametrize("namespace", probe_counters.SPACES)
def test_every_writer_that_python_can_call_was_probed(namespace: str, record: dict[str, Any]) -> None:
    """The table of the guard holds nothing that the probe did not look for."""
    probed = {key.partition(".")[0] for part in ("operators", "operators not run") for key in record[part]}
    probed |= {key.partition(".")[2] for part in ("callables", "callables not run") for key in record[part]}
    space = probe_counters.SPACES[namespace]
    found = set(_writers.writers_in(space, dir(space)))
    assert found
    assert found - probed == set()


def test_programs_agree_with_the_operators_they_are_made_of(record: dict[str, Any]) -> None:
    programs = record["programs"]
    for name, found in programs.items():
        if name.endswith(" fused"):
            assert found["param"] == STAYS, name
        elif name.startswith(("optim.", "init.")):
            assert set(found.values()) == {MOVES}, name
        elif name.startswith("nn.BatchNorm") and name.endswith("train"):
            assert found["running_mean"] == found["running_var"] == STAYS, name
        elif name.endswith(" eval"):
            assert found == {}, name
    assert programs["GradScaler.unscale_"] == {"grad": STAYS}


# ---- a false table is found out ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("_fused_adam_", ()),
        ("rrelu_with_noise_", ()),
        ("rrelu_with_noise_", ("noise", "self")),
        ("add_", ("self",)),
        ("batch_norm", ()),
        ("map_", ()),
        ("native_batch_norm", ("running_mean",)),
        ("zero_", ("self",)),
    ],
)
def test_a_false_entry_is_found_out(name: str, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_counterless.UNCOUNTED, name, arguments)
    _writers.writer_of.cache_clear()
    try:
        assert any(name in line for line in disagreements(KNOWN))
    finally:
        monkeypatch.undo()
        _writers.writer_of.cache_clear()
    assert set(disagreements(KNOWN)) <= TRACKED_AND_UNMARKED


@pytest.mark.parametrize("name", _counterless.UNMARKED)
def test_an_operator_that_is_left_out_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in probe_counters.BY_SOURCE:
        pytest.skip("not measured on this machine")
    monkeypatch.delitem(_counterless.UNMARKED, name)
    _writers.writer_of.cache_clear()
    try:
        assert any(name in line for line in disagreements(KNOWN))
    finally:
        _writers.writer_of.cache_clear()


def test_a_false_record_is_told_by_name() -> None:
    false = copy.deepcopy(KNOWN)
    false["operators"]["add_.Tensor"] = {"self": STAYS}
    del false["callables"]["Tensor.zero_"]
    false["operators not run"]["mul_.Tensor"] = "an invention"
    told = "\n".join(probe_counters.differences(false, KNOWN))
    assert "operators: add_.Tensor: {'self': 'stays'} is now {'self': 'moves'}" in told
    assert "callables: Tensor.zero_: nothing is now" in told
    assert "operators not run: mul_.Tensor: an invention is now nothing" in told
    assert probe_counters.table_of(false) != probe_counters.table_of(KNOWN)


FALSIFIED = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path[:0] = sys.argv[1:]
from torchguard import _counterless
_counterless.UNCOUNTED.clear()
_counterless.UNMARKED.clear()
import harness
from catalogue import PROGRAMS, counterless
wanted = {"statistics_by_functional", "fused_sgd", "gradients_unscaled_that_are_saved", "writer_noise"}
for case in PROGRAMS:
    if case.name in wanted:
        try:
            harness.check_all_modes(case)
        except AssertionError:
            wanted.discard(case.name)
print("passes all the same:", sorted(wanted))
"""


def test_the_catalogue_fails_with_an_empty_table() -> None:
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", FALSIFIED, str(here), str(here.parent)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.stdout.strip().endswith("passes all the same: []"), run.stdout + run.stderr
