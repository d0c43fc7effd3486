"""Which mode does a test run in, and does the summary name each violation once with the tests that hit it?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from outside import CORRUPT, LINE, python, reported, sources

from torchguard import _switch

pytest_plugins = ["pytester"]

#: A test whose outcome tells which mode it ran in.
WHICH = """
from torchguard import _policy

def mode():
    guard = _policy.innermost()
    return {None: "off", "raise": "strict", "warn": "warn"}[guard and guard.action]
"""

Run = Callable[..., pytest.RunResult]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("TORCHGUARD", "TORCHGUARD_OPTIONS", "TORCHGUARD_PARENT", "PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # the plugin alone, and by name
    monkeypatch.setattr(_switch, "_aside", False)
    yield
    assert _switch._session is None


@pytest.fixture
def run(pytester: pytest.Pytester) -> Run:
    """Run pytest in this process, on the test module that is given."""

    def run(text: str = "", *arguments: str, **files: str) -> pytest.RunResult:
        for name, content in files.items():
            (pytester.path / name.replace("__", ".")).write_text(content)
        if text:
            pytester.makepyfile(test_it=CORRUPT + WHICH + text)
        plugin = ("-p", "torchguard.pytest_plugin", "-p", "no:cacheprovider")
        return pytester.runpytest_inprocess(*plugin, "-W", "default", *arguments)

    return run


def section(result: pytest.RunResult) -> list[str]:
    """The lines of the section in the terminal summary."""
    lines = result.outlines
    starts = [i for i, line in enumerate(lines) if line.startswith("=") and " torchguard: " in line]
    if not starts:
        return []
    end = next(i for i in range(starts[0] + 1, len(lines)) if lines[i].startswith("="))
    return [line for line in lines[starts[0] + 1 : end] if line]


# ---- precedence --------------------------------------------------------------------------------------------

#: From the one that counts most to the one that counts least.
PLACES = ("marker", "command line", "environment", "ini", "pyproject")


def asked(place: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str], dict[str, str]]:
    """A marker, arguments and files that ask for ``mode`` at one place."""
    if place == "marker":
        return f"@pytest.mark.torchguard({mode!r})", [], {}
    if place == "command line":
        return "", [f"--torchguard={mode}"], {}
    if place == "environment":
        monkeypatch.setenv("TORCHGUARD", mode)
        return "", [], {}
    if place == "ini":
        return "", [], {"pytest__ini": f"[pytest]\ntorchguard = {mode}\n"}
    return "", [], {"pyproject__toml": f"[tool.torchguard]\nmode = {mode!r}\n"}


MODES = [("strict", "warn"), ("off", "strict"), ("warn", "off")]


@pytest.mark.parametrize(
    ("higher", "lower", "modes"),
    [(*places, MODES[i % 3]) for i, places in enumerate(itertools.combinations(PLACES, 2))],
)
def test_precedence(higher: str, lower: str, modes: tuple[str, str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = asked(higher, modes[0], monkeypatch), asked(lower, modes[1], monkeypatch)
    text = f"import pytest\n{first[0]}\ndef test_it():\n    assert mode() == {modes[0]!r}\n"
    run(text, *first[1], *second[1], **first[2], **second[2]).assert_outcomes(passed=1)


@pytest.mark.parametrize("place", PLACES)
def test_combinations(place: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each place alone switches on, and the test next door that is marked off is off."""
    marker, arguments, files = asked(place, "warn", monkeypatch)
    text = f"import pytest\n{marker}\ndef test_on():\n    assert mode() == 'warn'\n"
    text += "@pytest.mark.torchguard('off')\ndef test_off():\n    assert mode() == 'off'\n    corrupt()\n"
    run(text, *arguments, **files).assert_outcomes(passed=2)


def test_off_by_default(run: Run) -> None:
    result = run("def test_it():\n    assert mode() == 'off'\n    corrupt()\n", "--strict-markers")
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*torchguard*")


@pytest.mark.parametrize(("files", "mode"), [({}, "strict"), ({"pyproject__toml": "[tool.torchguard]\nmode = 'warn'\n"}, "warn"),
                                             ({"pytest__ini": "[pytest]\ntorchguard = off\n"}, "strict")])  # fmt: skip
def test_the_option_alone_is_on_in_the_mode_that_is_configured(files: dict[str, str], mode: str, run: Run) -> None:
    result = run(f"def test_it():\n    assert mode() == {mode!r}\n", "--torchguard", **files)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines([f"torchguard: {mode}"])


def test_markers_on_test_class_and_module(run: Run) -> None:
    text = """
import pytest
pytestmark = pytest.mark.torchguard("warn")

def test_module(): assert mode() == "warn"

@pytest.mark.torchguard("strict")
class TestClass:
    def test_class(self): assert mode() == "strict"
    @pytest.mark.torchguard("off")
    def test_method(self): assert mode() == "off"
    @pytest.mark.torchguard(every_call=True)
    def test_option_only(self):
        assert mode() == "strict"
        assert _policy.innermost().every_call

@pytest.mark.torchguard
def test_just_on(): assert mode() == "warn"

@pytest.mark.parametrize("value", [1, pytest.param(2, marks=pytest.mark.torchguard("strict"))])
def test_parameter(value): assert mode() == ("warn" if value == 1 else "strict")
"""
    run(text, "--strict-markers", "-W", "error").assert_outcomes(passed=7)


@pytest.mark.parametrize(
    ("marker", "told"),
    [
        (
            "'strcit'",
            "torchguard: the marker torchguard: mode='strcit' is not a mode of this version; did you mean 'strict'?",
        ),
        ("'strict', evry_call=True", "unknown option 'evry_call'; did you mean 'every_call'?"),
        ("'strict', 'warn'", "takes one mode, and options by name"),
        (
            "'strict', report='r.json'",
            "torchguard: the marker torchguard: report is for the whole run; of a test are mode, at, every_call, suppress",
        ),
        ("exitcode=3", "the marker torchguard: exitcode is for the whole run; of a test are mode"),
        ("supressions=[]", "unknown option 'supressions'; did you mean 'suppressions'? (mode, at, every_call, suppr"),
        ("suppressions=['a.py']", "the marker torchguard: suppressions:1: 'a.py' has no reason; write GLOB"),
        ("suppressions='nope.txt'", "nope.txt: No such file or directory"),
    ],
)
def test_a_marker_that_cannot_be_understood_fails_its_test(marker: str, told: str, run: Run) -> None:
    text = f"import pytest\n@pytest.mark.torchguard({marker})\ndef test_it(): pass\ndef test_other(): pass\n"
    result = run(text)
    result.assert_outcomes(passed=1, errors=1)
    assert told in result.stdout.str()


def test_an_option_that_cannot_be_understood_is_a_usage_error(run: Run) -> None:
    result = run("def test_it(): pass\n", "--torchguard", "test_it.py")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "'test_it.py' is not a mode of this version" in result.stderr.str()
    assert "needs --torchguard=MODE" in result.stderr.str()


def test_a_bad_variable_or_ini_value_is_told_and_the_tests_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHGUARD_OPTIONS", "reprot=x")
    result = run("def test_it(): pass\n", pytest__ini="[pytest]\ntorchguard = strcit\n")
    result.assert_outcomes(passed=1)
    told = section(result)
    assert told[0].startswith("TORCHGUARD_OPTIONS: unknown option 'reprot'; did you mean 'report'?")
    assert told[1].startswith("the ini file: torchguard: mode='strcit' is not a mode of this version")


def test_a_conftest_file_may_name_the_plugin(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("pytest_plugins = ['torchguard.pytest_plugin']")
    pytester.makepyfile(test_it=CORRUPT + WHICH + "def test_it(torchguard_strict):\n    assert mode() == 'strict'\n")
    pytester.makeini("[pytest]\ntorchguard = warn\n")
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-W", "default")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["torchguard: warn"])


# ---- what is guarded ---------------------------------------------------------------------------------------


def test_a_violation_fails_its_test_and_shows_the_test_s_own_frames(run: Run) -> None:
    result = run("def test_it():\n    corrupt()\n", "--torchguard")
    result.assert_outcomes(failed=1)
    shown = result.stdout.str()
    assert "SavedTensorCorruptionError: zero_() through .data" in shown
    assert "_intercept.py" not in shown
    assert "test_it.py:7: SavedTensorCorruptionError" in shown


def test_a_violation_while_a_module_is_imported_shows_the_module_s_own_frames(run: Run) -> None:
    result = run("corrupt()\ndef test_it(): pass\n", "--torchguard")
    result.assert_outcomes(errors=1)
    shown = result.stdout.str()
    assert "SavedTensorCorruptionError: zero_() through .data" in shown
    assert "_intercept.py" not in shown
    assert "c.zero_()" in shown


def test_warn_lets_the_test_pass_and_the_summary_names_it_once_with_its_tests(run: Run) -> None:
    text = """
def test_a(): assert corrupt().tolist() == [0, 0, 0]
def test_b(): corrupt(); corrupt()
def test_c(): clean()
"""
    result = run(text, "--torchguard=warn")
    result.assert_outcomes(passed=3, warnings=2)
    assert section(result) == [
        f"test_it.py:7  {LINE.partition('  ')[0]}",
        f"  {LINE.partition('  ')[2]}  (3 times)",
        "    test_it.py::test_a",
        "    test_it.py::test_b",
    ]


def test_a_violation_that_a_test_catches_is_in_the_summary(run: Run) -> None:
    result = run("import pytest\ndef test_it():\n    with pytest.raises(RuntimeError): corrupt()\n", "--torchguard")
    result.assert_outcomes(passed=1)
    assert "    test_it.py::test_it" in section(result)


def test_fixtures_of_every_scope_and_conftest_code_are_guarded(run: Run) -> None:
    conftest = (
        CORRUPT
        + """
import pytest
corrupt()

@pytest.fixture(scope="session", autouse=True)
def session_wide():
    a = torch.ones(2, requires_grad=True).exp(); a.data.fill_(1)
    yield
    a = torch.ones(2, requires_grad=True).exp(); a.data.fill_(2)

@pytest.fixture
def own():
    a = torch.ones(2, requires_grad=True).exp(); a.data.fill_(3)
    yield
    a = torch.ones(2, requires_grad=True).exp(); a.data.fill_(4)

def pytest_sessionfinish():
    a = torch.ones(2, requires_grad=True).exp(); a.data.fill_(5)
"""
    )
    text = (
        "a = torch.ones(2, requires_grad=True).exp(); a.data.fill_(6)\ndef test_it(own): pass\ndef test_other(): pass\n"
    )
    result = run(text, "--torchguard=warn", "-W", "ignore", conftest__py=conftest)
    result.assert_outcomes(passed=2)
    told = section(result)
    by_test: dict[str, list[str]] = {}
    source = ""
    for line in told:
        if line.startswith("    "):
            by_test.setdefault(line.strip(), []).append(source)
        elif not line.startswith("  "):
            source = line.rpartition("  ")[2].rpartition("; ")[2]
    outside = by_test.pop("(outside tests)")
    assert sorted(outside) == ["a.data.fill_(5)", "a.data.fill_(6)", "c.zero_()"]
    assert by_test == {
        "test_it.py::test_it": ["a.data.fill_(1)", "a.data.fill_(3)", "a.data.fill_(4)"],
        "test_it.py::test_other": ["a.data.fill_(2)"],
    }


def test_a_graph_that_a_fixture_made_is_guarded_in_the_tests_that_use_it(run: Run) -> None:
    text = """
import pytest

@pytest.fixture(scope="module")
def graph():
    a = torch.ones(3, requires_grad=True)
    return a.sigmoid()

def test_first(graph): pass
def test_second(graph):
    with pytest.raises(RuntimeError, match="test_it.py"):
        graph.data.zero_()
"""
    run(text, "--torchguard").assert_outcomes(passed=2)


def test_unittest_classes(run: Run) -> None:
    text = """
import unittest, pytest

@pytest.mark.torchguard("strict")
class Case(unittest.TestCase):
    @classmethod
    def setUpClass(cls): assert mode() == "strict"
    def setUp(self): assert mode() == "strict"
    def test_refused(self):
        with self.assertRaises(RuntimeError): corrupt()
    def test_fails(self): corrupt()
    @pytest.mark.torchguard("off")
    def test_off(self): pass

class Off(unittest.TestCase):
    def test_off(self): assert mode() == "off"
"""
    result = run(text.replace('    def setUp(self): assert mode() == "strict"\n', ""))
    result.assert_outcomes(passed=3, failed=1)
    assert [line.strip() for line in section(result)[2:]] == [
        "test_it.py::Case::test_fails",
        "test_it.py::Case::test_refused",
    ]


def test_the_fixture_yields_a_strict_guard_whatever_the_rest_is_under(run: Run) -> None:
    text = """
import pytest

@pytest.mark.parametrize("how", [1, pytest.param(2, marks=pytest.mark.torchguard("warn")),
                                 pytest.param(3, marks=pytest.mark.torchguard("off"))])
def test_it(how, torchguard_strict):
    with pytest.raises(RuntimeError): corrupt()
    assert [violation.operation for violation in torchguard_strict.violations] == ["zero_()"]
    assert torchguard_strict.action == "raise"
"""
    result = run(text)
    result.assert_outcomes(passed=3)
    assert len(section(result)) == 5
    assert "(3 times)" in section(result)[1]


def test_a_thread_of_a_test_is_guarded(run: Run) -> None:
    text = """
import threading
def test_it():
    thread = threading.Thread(target=corrupt)
    thread.start(); thread.join()
"""
    result = run(text, "--torchguard=warn", "-W", "ignore")
    result.assert_outcomes(passed=1)
    assert "    test_it.py::test_it" in section(result)


# ---- reports and suppressions ------------------------------------------------------------------------------


def test_a_report_from_the_option_or_the_ini_file(run: Run, pytester: pytest.Pytester) -> None:
    text = "def test_it():\n    corrupt()\n"
    result = run(
        text, "--torchguard", "--torchguard-report=a.jsonl", pytest__ini="[pytest]\ntorchguard_report = b.jsonl\n"
    )
    (record,) = reported(pytester.path / "a.jsonl")
    assert record["violation"]["written"]["source"] == "c.zero_()"
    assert record["hit"]["test"] == "test_it.py::test_it"
    assert not (pytester.path / "b.jsonl").exists()
    assert f"report: {pytester.path / 'a.jsonl'}" in section(result)
    run("", "--torchguard")
    assert (pytester.path / "b.jsonl").read_text()


def test_suppressions_with_reasons_and_stale_ones_told(run: Run, pytester: pytest.Pytester) -> None:
    (pytester.path / "s.txt").write_text("test_it.py:corrupt -- zeroed on purpose\ngone.py -- old\nbad.py\n")
    text = """
import pytest
def test_it(): corrupt()
@pytest.mark.torchguard(suppressions=[])
def test_refused():
    with pytest.raises(RuntimeError): corrupt()
"""
    result = run(text, "--torchguard", pytest__ini="[pytest]\ntorchguard_suppressions = s.txt\n")
    result.assert_outcomes(passed=2)
    assert section(result)[2:] == [
        "    test_it.py::test_refused",
        "s.txt:3: 'bad.py' has no reason; write GLOB[:LINE|:FUNCTION] [KIND] -- REASON",
        "s.txt:2 matches nothing any more, take it out: gone.py -- old",
    ]


# ---- in processes of their own -----------------------------------------------------------------------------


def test_torch_is_not_imported_while_the_plugin_is_off(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import sys, pytest\n"
        "def test_it(pytestconfig):\n"
        "    assert pytestconfig.pluginmanager.hasplugin('torchguard')\n"
        "    assert not {'torch', 'wrapt', 'torchguard.guard', 'torchguard._switch'} & set(sys.modules)\n"
    )
    for arguments in ([], ["--torchguard=off"]):
        done = python(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", *arguments], cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr


def test_xdist(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(
        "import torch\na = torch.ones(2, requires_grad=True).exp(); a.data.fill_(1)\n"
    )
    (tmp_path / "s.txt").write_text("test_it.py:fine -- meant\ngone.py -- old\n")
    (tmp_path / "test_it.py").write_text(
        CORRUPT + "import pytest\n@pytest.mark.parametrize('i', range(4))\ndef test_it(i): corrupt()\n"
        "def fine():\n    a = torch.ones(2, requires_grad=True).exp(); a.data.fill_(2)\ndef test_fine(): fine()\n"
    )
    options = [
        "--torchguard=warn",
        "--torchguard-report=r.jsonl",
        "-o",
        "torchguard_suppressions=s.txt",
        "-W",
        "ignore",
    ]
    done = python(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", *options], cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if "torchguard: 2 violations" in line)
    told = lines[at + 1 :]
    expected = [f"    test_it.py::test_it[{i}]" for i in range(4)]
    assert sorted(line for line in told if "test_it[" in line) == expected
    assert sum("(4 times)" in line for line in told) == 1
    assert told.count("    (outside tests)") == 1
    assert "s.txt:2 matches nothing any more, take it out: gone.py -- old" in told
    assert len({record["site"] for record in reported(tmp_path / "r.jsonl")}) == 3  # with the one that is suppressed
    assert [path.name for path in tmp_path.glob("r.*")] == ["r.jsonl"], "the workers' are in it"


CRASHING = """
import os, pytest
def test_before(): corrupt()
def test_crash():
    a = torch.ones(2, requires_grad=True).exp(); a.data.fill_(2)
    os._exit(3)
"""


@pytest.mark.parametrize("workers", [(), ("-n", "1", "--max-worker-restart=0")], ids=["alone", "xdist"])
def test_a_test_that_ends_the_process_loses_no_violation(tmp_path: Path, workers: tuple[str, ...]) -> None:
    (tmp_path / "test_it.py").write_text(CORRUPT + CRASHING)
    options = ["--torchguard=warn", "--torchguard-report=r.html", "-W", "ignore", *workers]
    done = python(["-m", "pytest", "-q", "-p", "no:cacheprovider", *options], cwd=tmp_path)
    assert done.returncode == (1 if workers else 3), done.stdout + done.stderr
    if not workers:
        python(["-m", "torchguard", "merge", "r.html.jsonl", "-o", "r.html"], cwd=tmp_path)
    python(["-m", "torchguard", "merge", "r.html", "-o", "all.jsonl"], cwd=tmp_path)
    assert sorted(sources(tmp_path / "all.jsonl")) == [
        "a = torch.ones(2, requires_grad=True).exp(); a.data.fill_(2)",
        "c.zero_()",
    ]
    tests = [record["hit"]["test"] for record in reported(tmp_path / "all.jsonl")]
    assert tests == ["test_it.py::test_before", "test_it.py::test_crash"]


def test_a_report_that_cannot_be_written_fails_no_test(run: Run, pytester: pytest.Pytester) -> None:
    (pytester.path / "file").write_text("")
    result = run(
        "def test_it():\n    corrupt()\n", "--torchguard=warn", "--torchguard-report=file/r.html", "-W", "ignore"
    )
    result.assert_outcomes(passed=1)
    assert sum("the report cannot be written to" in line for line in section(result)) == 1


@pytest.mark.parametrize(
    ("report", "told"),
    [
        ("r.htm", "'r.htm' does not say by its ending what kind of report to write; did you mean '.html'?"),
        ("reports", "'reports' is a directory; name a file in it, 'reports/report.html' say"),
        ("reports.json", "'reports.json' is a directory; name a file in it, 'reports.json/report.html' say"),
    ],
)
def test_a_report_that_cannot_be_is_a_usage_error(report: str, told: str, run: Run, pytester: pytest.Pytester) -> None:
    for name in ("reports", "reports.json"):
        (pytester.path / name).mkdir()
    result = run("def test_it():\n    corrupt()\n", "--torchguard=warn", f"--torchguard-report={report}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"error: argument --torchguard-report: {told}" in result.stderr.str()


def test_a_report_in_the_ini_file_that_cannot_be_is_told(run: Run) -> None:
    ini = "[pytest]\ntorchguard = warn\ntorchguard_report = r.htm\n"
    result = run("def test_it():\n    corrupt()\n", "-W", "ignore", pytest__ini=ini)
    result.assert_outcomes(passed=1)
    assert any("report='r.htm' does not say by its ending" in line for line in section(result))


def test_a_report_that_nothing_is_switched_on_for_is_told(run: Run, pytester: pytest.Pytester) -> None:
    result = run("def test_it(): pass\n", "--torchguard-report=r.json")
    result.assert_outcomes(passed=1)
    assert "torchguard: not switched on" in result.stdout.str()
    assert section(result) == [
        "--torchguard-report: r.json is not written: no test ran under the guard; add --torchguard"
    ]
    assert not (pytester.path / "r.json").exists()


@pytest.mark.parametrize("how", ["a marker", "off by name", "the ini file"])
def test_a_report_that_is_written_or_need_not_be_is_not_told_of(how: str, run: Run, pytester: pytest.Pytester) -> None:
    marker = "import pytest\n@pytest.mark.torchguard\n" if how == "a marker" else ""
    ini = "[pytest]\ntorchguard_report = r.json\n" if how == "the ini file" else "[pytest]\n"
    arguments = [] if how == "the ini file" else ["--torchguard-report=r.json"]
    arguments += ["--torchguard=off"] if how == "off by name" else []
    result = run(f"{marker}def test_it(): clean()\n", *arguments, pytest__ini=ini)
    result.assert_outcomes(passed=1)
    assert "is not written" not in result.stdout.str()
    assert (pytester.path / "r.json").exists() == (how == "a marker")


def test_the_variable_and_pytest(tmp_path: Path) -> None:
    """The plugin answers for the variable: a summary by pytest, no exit status of ours, though torch was there first."""
    (tmp_path / "early.py").write_text("import torch\n")
    (tmp_path / "test_it.py").write_text(CORRUPT + "def test_it(): corrupt()\n")
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "early", "-W", "error::pytest.PytestWarning"]
    done = python(arguments, cwd=tmp_path, TORCHGUARD="warn")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torchguard: 1 violation ==" in done.stdout
    assert done.stderr == ""
