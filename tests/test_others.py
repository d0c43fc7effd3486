"""Does ``make others`` tell apart what it must: same, silent, alarmed, corrupted, changed, broken?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import others
import pytest
from others import MODES, Outcome, Suite, Training, Verdict

#: Stands for a package that writes through ``.data`` where it may: after backward.
INNOCENT = """
def step(parameters):
    for p in parameters:
        p.data.sub_(0.1 * p.grad)
"""
#: And for one that does not: between forward and backward.
CORRUPTING = """
def clip(parameters):
    for p in parameters:
        p.data.clamp_(-0.1, 0.1)
"""
TRAINING = '''
"""A small training"""
import sys
sys.path.insert(0, {folder!r})
import torch
import {package}

REQUIRES = ("{package}",)
CORRUPTS = {corrupts}
ALARM = {alarm!r}


def train():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    for _ in range(2):
        net.zero_grad()
        loss = net(torch.ones(2, 3)).sum()
        {before}
        loss.backward()
        {after}
    return [p for p in net.parameters()]
'''


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verdict]:
    """Two stand-ins for packages, run without a network by the interpreter that runs this test."""
    folder = tmp_path_factory.mktemp("others")
    packages, trainings = folder / "packages", folder / "trainings"
    for place in (packages, trainings):
        place.mkdir()
    (packages / "innocent_stand_in.py").write_text(INNOCENT)
    (packages / "corrupting_stand_in.py").write_text(CORRUPTING)
    after = {"before": "pass", "after": "innocent_stand_in.step(net.parameters())"}
    before = {"before": "corrupting_stand_in.clip(net.parameters())", "after": "pass"}
    for name, package, corrupts, alarm, moments in (
        ("silent", "innocent_stand_in", False, "", after),
        ("explained", "corrupting_stand_in", True, "the clip comes too early", _stepping(before)),
    ):
        given = {"folder": str(packages), "package": package, "corrupts": corrupts, "alarm": alarm, **moments}
        (trainings / f"{name}.py").write_text(TRAINING.format(**given).lstrip())
    found = {}
    environment = others.Environment(None, sys.executable)
    for path in sorted(trainings.glob("*.py")):
        found[path.stem] = others.try_training(environment, others.read_training(path), ["strict"])
    return found


def _stepping(moments: dict[str, str]) -> dict[str, str]:
    return {**moments, "after": "[p.data.sub_(p.grad) for p in net.parameters()]"}


def test_a_training_that_writes_after_backward_is_silent(verdicts: dict[str, Verdict]) -> None:
    assert (verdicts["silent"].ok, verdicts["silent"].said) == (True, "same weights, silent")
    assert verdicts["silent"].alarms == ()


def test_a_corruption_is_told_with_its_line_and_proven_by_the_clones(verdicts: dict[str, Verdict]) -> None:
    found = verdicts["explained"]
    assert found.ok
    assert found.said == "1 alarm (strict, at the read); weights are wrong without the guard"
    assert all(
        "corrupting_stand_in.py:4  p.data.clamp_(-0.1, 0.1)  (clamp_(), saved by " in line for line in found.alarms
    )


FINISHED, OTHER = Outcome("finished", "aa"), Outcome("finished", "bb")
REFUSED = Outcome("SavedTensorCorruptionError: no", "", ("a.py:1  x",))


@pytest.mark.parametrize(
    ("alarm", "corrupts", "plain", "again", "truth", "guarded", "said"),
    [
        ("", False, Outcome("ValueError: no", ""), FINISHED, FINISHED, FINISHED, "does not run without the guard: ValueError: no"),
        ("", False, FINISHED, OTHER, FINISHED, FINISHED, "has other weights each time: seed it"),
        ("", False, FINISHED, FINISHED, FINISHED, OTHER, "other weights under strict"),
        ("", False, FINISHED, FINISHED, FINISHED, Outcome("KeyError: 1", ""), "under strict: KeyError: 1"),
        ("", False, FINISHED, FINISHED, OTHER, FINISHED, "weights are wrong, and nothing is said under strict"),
        ("", False, FINISHED, FINISHED, OTHER, REFUSED, "weights are wrong, which CORRUPTS in the script does not say"),
        ("", True, FINISHED, FINISHED, OTHER, REFUSED, "1 alarm not explained"),
        ("why", True, FINISHED, FINISHED, FINISHED, REFUSED, "weights are right, which CORRUPTS in the script does not say"),
        ("why", False, FINISHED, FINISHED, FINISHED, FINISHED, "the alarm that ALARM explains does not come"),
    ],
)  # fmt: skip
def test_what_is_not_as_it_must_be_is_told(
    alarm: str, corrupts: bool, plain: Outcome, again: Outcome, truth: Outcome, guarded: Outcome, said: str
) -> None:
    training = Training(Path("x.py"), ("package[extra]>=1",), "about", alarm, corrupts)
    verdict = others.judge(training, "1", plain, again, truth, {"strict": guarded})
    assert (verdict.package, verdict.said, verdict.ok) == ("package", said, False)


def test_a_suite_is_compared_name_by_name() -> None:
    suite = Suite("package", ("tests",))
    same = others.judge_suite(suite, "1", {"a": "passed", "b": "failed"}, {"a": "passed", "b": "failed"}, ())
    assert (same.ok, same.said) == (True, "1 passed, 1 failed; the same under strict")
    other = others.judge_suite(suite, "1", {"a": "passed"}, {"a": "failed"}, ("x",))
    assert (other.ok, other.said) == (False, "1 test changed: a: passed -> failed")
    caught = others.judge_suite(suite, "1", {"a": "passed"}, {"a": "passed"}, ("x",))
    assert (caught.ok, caught.said) == (False, "1 passed; alarms not explained")
    told = others.judge_suite(Suite("package", (), (), {"a": "why"}), "1", {"a": "passed"}, {"a": "failed"}, ("x",))
    assert (told.ok, told.said, told.why) == (True, "1 passed; 1 of them refused, explained", "why")
    assert others.judge_suite(suite, "1", {}, {}, ()).said == "no test ran"


class _OutOfReach(others.Environment):
    def install(self, requirements: Sequence[str]) -> str | None:
        return f"no {requirements[0]} on this index"


def test_what_cannot_be_installed_is_not_as_it_must_be() -> None:
    place = _OutOfReach(None, sys.executable)
    one = others.try_training(place, Training(Path("x.py"), ("package>=1",), "about"), ["strict"])
    assert (one.ok, one.said) == (False, "cannot be installed here: no package>=1 on this index")
    suite = others.try_suite(place, Suite("package", ("tests",)))
    assert (suite.ok, suite.said) == (False, "cannot be run here: no package on this index")


def test_what_a_training_holds_to_a_version_the_pins_do_not(tmp_path: Path) -> None:
    pins = tmp_path / "pins.txt"
    pins.write_text("# pins\nnumpy==2.2.6 ; python_version < '3.11'\nset_up.tools==84.2.1\ntorch==2.13.0\n")
    assert others.pins_beside(("package[a]", "Set-Up_Tools<81", "torch"), pins) == (
        "# pins\nnumpy==2.2.6 ; python_version < '3.11'\ntorch==2.13.0\n"
    )


def test_the_page_is_written_from_what_was_kept(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{others._BEGIN}\nold\n{others._END}\nafter\n")
    verdict = Verdict("tests", "package", "1.2", "about | it", "1 alarm", ("a.py:1  x",), True, "because")
    training = Training(Path("x.py"), ("package",), "about")
    others.keep(verdict, tmp_path)
    found, missing = others.kept(tmp_path, [training])
    assert found == []
    assert missing[0] == "package (x)"
    others.keep(Verdict("x", "package", "1.2", "about | it", "1 alarm", ("a.py:1  x",), True, "because"), tmp_path)
    found, missing = others.kept(tmp_path, [training])
    others.record(page, found, missing)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "| package 1.2 | about \\| it | 1 alarm |" in text
    assert "a.py:1  x\n```\n\nbecause" in text
    assert "old" not in text
    assert f"Not run for this table: {', '.join(missing)}." in text


def test_every_script_says_what_it_needs() -> None:
    trainings = [others.read_training(path) for path in sorted(others.TRAININGS.glob("*.py"))]
    assert len({training.package for training in trainings}) >= 8
    assert all(training.alarm or not training.corrupts for training in trainings)
    with pytest.raises(ValueError, match="needs REQUIRES"):
        others.read_training(Path(__file__))


def test_bad_arguments_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, line in (
        (["--only", "nothing-is-called-so"], "nothing has 'nothing-is-called-so' in its name"),
        (["--modes", "strict,loud"], f"--modes takes {', '.join(MODES)}, not 'loud'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            others.main(arguments)
        assert stopped.value.code == 2
        assert line in capsys.readouterr().err
