"""Who has the last word, and what is said of what cannot be understood?"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
from outside import ROOT

import torchguard
from torchguard import _config
from torchguard._config import Config, Layer

ALL_MODES = ", ".join(("off", *_config.MODES))


def resolved(*layers: Layer, default: str = "off") -> Config:
    config, problems = _config.resolve(layers, default)
    assert problems == []
    return config


def problem(*layers: Layer) -> str:
    _, problems = _config.resolve(layers)
    (line,) = problems
    assert "\n" not in line
    return line


def of_environment(**variables: str) -> tuple[Config, list[str]]:
    layers, problems = _config.of_environment(variables)
    config, more = _config.resolve(layers)
    return config, [*problems, *more]


VALUES: dict[str, tuple[Any, ...]] = {
    "mode": ("strict", "warn", "off"),
    "report": ("/a.txt", "/b.html", "/c.jsonl"),
    "exitcode": (1, 2, 3),
    "max_reports": (1, 2, 3),
    "suppressions": ("/a", "/b", "/c"),
    "every_call": (True, False, True),
}


@pytest.mark.parametrize("option", sorted(VALUES))
def test_the_first_layer_that_names_an_option_wins(option: str) -> None:
    for order in itertools.permutations(VALUES[option]):
        layers = [Layer(str(i), {option: value}) for i, value in enumerate(order)]
        assert getattr(resolved(*layers), option) == order[0]
        assert getattr(resolved(Layer("empty", {}), *layers[1:]), option) == order[1]


def test_layers_are_merged_option_by_option() -> None:
    config = resolved(
        Layer("", {"mode": "warn"}), Layer("", {"mode": "strict", "exitcode": 3}), Layer("", {"report": "/r.txt"})
    )
    assert (config.mode, config.exitcode, config.report) == ("warn", 3, "/r.txt")


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().mode = "strict"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("layers", "mode"),
    [
        (({"mode": "1"},), "strict"),
        (({"mode": "on"}, {"mode": "warn"}), "warn"),
        (({"mode": "1"}, {"mode": "off"}), "strict"),  # on has been said, and by whom it counts more
        (({"mode": "0"}, {"mode": "strict"}), "off"),
        (({"mode": "OFF"},), "off"),
        (({"mode": False},), "off"),
        (({"mode": "Strict"},), "strict"),
        (({},), "off"),
    ],
)
def test_on_and_off(layers: tuple[dict[str, Any], ...], mode: str) -> None:
    assert resolved(*(Layer("", values) for values in layers)).mode == mode


def test_the_default_is_for_those_who_name_no_mode() -> None:
    assert resolved(default="strict").mode == "strict"
    assert resolved(Layer("", {"mode": "off"}), default="strict").mode == "off"


@pytest.mark.parametrize("name", sorted(_config.MODES))
def test_every_mode_of_the_table_is_a_function_of_the_package_and_makes_the_same_guard(name: str) -> None:
    made = getattr(torchguard, name)()
    configured = torchguard.Guard(**Config(mode=name).guard_keywords())
    for attribute in ("action", "at", "depth", "every_call"):
        assert getattr(made, attribute) == getattr(configured, attribute)


def test_the_page_names_every_option_and_every_mode() -> None:
    page = (ROOT / "docs" / "switching-on.md").read_text()
    for option in _config.OPTIONS:
        assert f"\n| `{option}` | " in page
    for mode in _config.MODES:
        assert f"`{mode}`" in page


# ---- what cannot be understood -----------------------------------------------------------------------------

ALL_MODES = ", ".join(("off", *_config.MODES))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"mode": "strcit"},
            f"X: mode='strcit' is not a mode of this version; did you mean 'strict'? ({ALL_MODES}); not switched on",
        ),
        ({"mode": "zzz"}, f"X: mode='zzz' is not a mode of this version ({ALL_MODES}); not switched on"),
        ({"reprot": "x"}, "X: unknown option 'reprot'; did you mean 'report'?"),
        ({"exit_code": "1"}, "X: unknown option 'exit_code'; did you mean 'exitcode'?"),
        ({"supressions": "1"}, "X: unknown option 'supressions'; did you mean 'suppressions'?"),
        ({"exitcode": "256"}, "X: exitcode='256' is not a number from 0 to 255; ignored"),
        ({"exitcode": -1}, "X: exitcode=-1 is not a number from 0 to 255; ignored"),
        ({"exitcode": True}, "X: exitcode=True is not a number"),
        ({"max_reports": "many"}, "X: max_reports='many' is not a number from 0 up; ignored"),
        ({"every_call": "maybe"}, "X: every_call='maybe' is neither true nor false; ignored"),
        ({"at": "never"}, "X: at='never' is not a moment of this version"),
        ({"report": 3}, "X: report=3 is not a path; ignored"),
        ({"report": ""}, "X: report='' is not a path; ignored"),
        (
            {"report": "r.jsno"},
            "X: report='r.jsno' does not say by its ending what kind of report to write; did you mean '.json'?",
        ),
        (
            {"report": "out"},
            "X: report='out' does not say by its ending what kind of report to write (.jsonl, .json, .sarif",
        ),
        (
            {"report": "tests"},
            "X: report='tests' is a directory; name a file in it, 'tests/report.html' say; ignored",
        ),
        ({"suppressions": [1]}, "X: suppressions=[1] is not a list of lines; ignored"),
    ],
)
def test_a_bad_value_is_one_clear_line(values: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert problem(Layer("X", values)).startswith(told)


def test_what_is_done_about_a_fault_is_left_out_where_it_is_an_error() -> None:
    assert _config.fault_of("X: report=3 is not a path; ignored") == "X: report=3 is not a path"
    assert _config.fault_of("X: mode='y' is no mode; did you mean 'z'?; not switched on").endswith("did you mean 'z'?")
    assert _config.fault_of("s.txt: No such file; nothing is suppressed") == "s.txt: No such file"
    assert _config.fault_of("s:1: 'x' has no reason; write it") == "s:1: 'x' has no reason; write it"


@pytest.mark.parametrize("value", ["strict:at=read", "at=read", "strict,at=read,exitcode=3"])
def test_options_in_the_variable_of_the_mode_are_told_where_they_belong(value: str) -> None:
    config, problems = of_environment(TORCHGUARD=value)
    assert config.mode == "off"
    told = "is not a mode: options stand in TORCHGUARD_OPTIONS, and the mode alone here; not switched on"
    assert problems == [f"TORCHGUARD={value!r} {told}"]


def test_a_bad_value_is_as_if_it_were_not_there_but_a_bad_mode_is_off() -> None:
    config, _ = _config.resolve(
        [Layer("", {"exitcode": "x", "mode": "x"}), Layer("", {"exitcode": 7, "mode": "strict"})]
    )
    assert (config.exitcode, config.mode) == (7, "off")


SENSELESS = "repair acts when backward reads: with it, at is 'read', not 'write'"


def test_a_combination_that_makes_no_sense_is_one_clear_line_and_the_mode_is_on_all_the_same() -> None:
    config, problems = of_environment(TORCHGUARD="repair", TORCHGUARD_OPTIONS="at=write:exitcode=3")
    assert problems == [f"TORCHGUARD_OPTIONS: at='write': {SENSELESS}; ignored"]
    assert (config.mode, config.at, config.exitcode) == ("repair", None, 3)
    assert torchguard.Guard(**config.guard_keywords()).at == "read"
    assert of_environment(TORCHGUARD="repair", TORCHGUARD_OPTIONS="at=read")[1] == []
    assert of_environment(TORCHGUARD="strict", TORCHGUARD_OPTIONS="at=write")[1] == []
    assert of_environment(TORCHGUARD="off", TORCHGUARD_OPTIONS="at=write")[1] == []


@pytest.mark.parametrize("action", _config.ACTIONS)
@pytest.mark.parametrize("at", [None, *_config.MOMENTS])
@pytest.mark.parametrize("depth", ["saves", "bytes"])  # "watch" has tests of its own
def test_every_combination_makes_a_guard_or_is_refused(action: Any, at: Any, depth: Any) -> None:
    wrong = _config.senseless(action, at, depth)
    if wrong is not None:
        with pytest.raises(ValueError, match=r"^torchguard: "):
            torchguard.Guard(action, at, depth)
        return
    guard = torchguard.Guard(action, at, depth)
    assert (guard.action, guard.depth) == (action, depth)
    assert guard.at == (at or ("read" if action == "repair" else "write"))


def test_watch_sees_no_call_and_says_so_in_one_line() -> None:
    config, problems = of_environment(TORCHGUARD="watch", TORCHGUARD_OPTIONS="every_call=1")
    assert (config.mode, bool(config.every_call)) == ("watch", False)
    assert problems == ["TORCHGUARD_OPTIONS: every_call='1': no call is seen: with watch, every_call is False; ignored"]
    with pytest.raises(ValueError, match=r"^torchguard: .*no call is seen"):
        torchguard.enable("watch", every_call=True)


@pytest.mark.parametrize("mode", ["repair", "watch", "audit"])
def test_a_mode_that_is_not_there_yet_is_one_clear_line(mode: str) -> None:
    if mode in _config.MODES:
        assert of_environment(TORCHGUARD=mode)[0].mode == mode
        return
    config, problems = of_environment(TORCHGUARD=mode)
    assert config.mode == "off"
    assert problems == [
        f"TORCHGUARD={mode!r} is not a mode of this version ({', '.join(('off', *_config.MODES))}); not switched on"
    ]


# ---- the environment ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "report=/tmp/r.txt:exitcode=3:max_reports=2",
        "report=/tmp/r.txt,exitcode=3,max_reports=2",
        "report=/tmp/r.txt exitcode=3\tmax_reports=2\n",
        "::report='/tmp/r.txt':exitcode=\"3\", max-reports=2",
        "exitcode=9:max_reports=2:report=/tmp/r.txt:exitcode=3",  # the last one counts, as in the sanitizers
    ],
)
def test_options_in_the_manner_of_the_sanitizers(text: str) -> None:
    config, problems = of_environment(TORCHGUARD="strict", TORCHGUARD_OPTIONS=text)
    assert problems == []
    assert (config.report, config.exitcode, config.max_reports) == ("/tmp/r.txt", 3, 2)


@pytest.mark.parametrize(
    ("text", "report"),
    [
        ("report='/a b:c,d'", "/a b:c,d"),
        ('report="/it\'s"', "/it's"),
        ("report=/a=b", "/a=b"),
        (r"report=C:\r.txt", None),
    ],
)
def test_what_stands_in_quotes_is_one_value(text: str, report: str | None) -> None:
    layers, problems = _config.of_environment({"TORCHGUARD_OPTIONS": text})
    assert problems == []
    assert layers[-1].values == {"report": report or r"C:\r.txt"}


def test_what_is_no_option_is_told() -> None:
    config, problems = of_environment(TORCHGUARD="warn", TORCHGUARD_OPTIONS="report:exitcode=3:=:every_call")
    assert (config.mode, config.exitcode, config.every_call) == ("warn", 3, True)
    assert problems == [
        "TORCHGUARD_OPTIONS: 'report' is not KEY=VALUE; ignored",
        "TORCHGUARD_OPTIONS: '=' is not KEY=VALUE; ignored",
    ]


def test_the_variable_beats_a_mode_among_the_options() -> None:
    assert of_environment(TORCHGUARD="warn", TORCHGUARD_OPTIONS="mode=strict")[0].mode == "warn"
    assert of_environment(TORCHGUARD="1", TORCHGUARD_OPTIONS="mode=warn")[0].mode == "warn"
    assert of_environment(TORCHGUARD="", TORCHGUARD_OPTIONS="")[0].mode == "off"


def test_relative_paths_start_from_where_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert of_environment(TORCHGUARD_OPTIONS="report=r.txt")[0].report == str(tmp_path / "r.txt")
    (tmp_path / "pyproject.toml").write_text("[tool.torchguard]\nsuppressions = 's.txt'\n")
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    layers, problems = _config.of_project()
    assert problems == []
    assert resolved(*layers).suppressions == str(tmp_path / "s.txt")


# ---- pyproject.toml ----------------------------------------------------------------------------------------


def test_pyproject_is_read_from_the_nearest_directory(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        "[tool.torchguard]\nmode = 'warn'\nexitcode = 0\nmax-reports = 3\nevery_call = true\n"
        "suppressions = ['a.py -- why']\nreport = 'out/r.jsonl'\n"
    )
    (tmp_path / "a" / "b").mkdir(parents=True)
    layers, problems = _config.of_project(str(tmp_path / "a" / "b"))
    assert problems == []
    report = str(tmp_path / "out" / "r.jsonl")
    expected = Config("warn", every_call=True, report=report, exitcode=0, suppressions=("a.py -- why",), max_reports=3)
    assert resolved(*layers) == expected
    (tmp_path / "a" / "pyproject.toml").write_text("[tool.other]\n")
    assert _config.of_project(str(tmp_path / "a" / "b")) == ([], [])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[tool.torchguard\n", "is not read: "),
        ("tool = 3 # torchguard\n", "is not read: "),
        ("[tool]\ntorchguard = 'strict'\n", "tool.torchguard is not a table; ignored"),
        ("\xff torchguard", "is not read: "),
    ],
)
def test_a_pyproject_that_cannot_be_used_is_told(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text, encoding="latin-1")
    layers, problems = _config.of_project(str(tmp_path))
    assert layers == []
    assert told in problems[0]


def test_an_unknown_key_in_pyproject_is_told_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.torchguard]\nmodes = 'warn'\n")
    layers, _ = _config.of_project(str(tmp_path))
    told = problem(*layers)
    assert told.startswith(
        f"{tmp_path / 'pyproject.toml'} [tool.torchguard]: unknown option 'modes'; did you mean 'mode'?"
    )


def test_a_python_that_cannot_read_toml_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.torchguard]\nmode = 'warn'\n")
    monkeypatch.setattr(_config.importlib, "import_module", _no_module)
    assert "pip install tomli" in _config.of_project(str(tmp_path))[1][0]


def _no_module(name: str) -> None:
    raise ModuleNotFoundError(name)
