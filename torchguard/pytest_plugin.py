"""Which mode does each test run in, and which tests hit which violation?

Every test has a guard of its own, from its first fixture to its last; between tests, and while conftest files and test
modules are imported, one in the mode of the whole run is on. Whatever a guard hears travels with the test's reports, so
that the process that prints the summary knows it, whichever process ran the test.

torch is imported when the first guard is entered, and not before. (PYTEST_DONT_REWRITE: nothing is asserted here.)
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from torchguard import _config
from torchguard._config import Config, Layer

if TYPE_CHECKING:
    from torchguard._report import ReportWriter
    from torchguard._violation import Violation
    from torchguard.guard import Guard


def _mode(text: str) -> str:
    _, wrong = _config.resolve([Layer("", {"mode": text})])
    if wrong:
        said = _config.fault_of(wrong[0]).removeprefix("mode=")
        raise argparse.ArgumentTypeError(f"{said}; a path that follows needs --torchguard=MODE")
    return text


def _report(text: str) -> str:
    _, wrong = _config.resolve([Layer("", {"report": text})])
    if wrong:
        raise argparse.ArgumentTypeError(_config.fault_of(wrong[0]).removeprefix("report="))
    return text


#: What a marker may say; the rest is for the whole run.
_OF_A_TEST = ("mode", "at", "every_call", "suppressions", "max_reports")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The command line options, and their twins for the ini file."""
    group = parser.getgroup("torchguard", "silent writes to tensors saved for backward")
    modes = ", ".join(_config.MODES)
    group.addoption(
        "--torchguard",
        nargs="?",
        const="on",
        type=_mode,
        metavar="MODE",
        help=f"run the tests under the guard: off, {modes}; without a value as configured elsewhere, or strict",
    )
    group.addoption(
        "--torchguard-report",
        type=_report,
        metavar="FILE",
        help=f"write the violations to FILE, which ends in {', '.join(_config.REPORTS)}",
    )
    parser.addini("torchguard", f"run the tests under the guard: off, {modes}", default=None)
    parser.addini("torchguard_report", "write the violations to this file", default=None)
    parser.addini("torchguard_suppressions", "file with violations to live with", default=None)


# ---- the run -----------------------------------------------------------------------------------------------


@dataclass
class _Site:
    violation: Violation
    times: int
    tests: dict[str, None]


class _Run:
    """One run of pytest: its configuration, the guard that is on, what the tests reported."""

    def __init__(self, config: pytest.Config, options: argparse.Namespace) -> None:
        self.pytest_config = config
        self.distributes = "PYTEST_XDIST_WORKER" not in os.environ and bool(
            getattr(options, "numprocesses", None) or getattr(options, "dist", "no") != "no"
        )
        self.layers, problems = self._layers(options)
        self.config, more = _config.resolve(self.layers)
        self.problems = [*problems, *more]
        self.guard: Guard | None = None
        self.on = False
        self.heard: dict[Any, list[Any]] = {}
        self.outside: list[dict[str, Any]] = []
        self.used: set[str] = set()
        self.sites: dict[Any, _Site] = {}
        self.report: ReportWriter | None = None
        self.reports_of_workers: list[str] = []
        self._suppressions: Any = None

    def _layers(self, options: argparse.Namespace) -> tuple[list[Layer], list[str]]:
        config = self.pytest_config
        named = {"mode": options.torchguard, "report": options.torchguard_report}
        layers = [Layer("the command line", named)]
        problems: list[str] = []
        if os.environ.get("TORCHGUARD") or os.environ.get("TORCHGUARD_OPTIONS"):
            from torchguard import _switch

            if not _switch.on_the_command_line():
                environment, problems = _config.of_environment(os.environ)
                layers += environment
                _switch.stand_aside()
        ini = {"mode": "torchguard", "report": "torchguard_report", "suppressions": "torchguard_suppressions"}
        values = {option: config.getini(name) or None for option, name in ini.items()}
        layers.append(Layer("the ini file: torchguard", values, str(config.rootpath)))
        project, more = _config.of_project(str(config.rootpath))
        return [*layers, *project], [*problems, *more]

    # ---- guards

    def change(self, config: Config) -> None:
        """Another guard, or none, from now on."""
        before, self.guard = self.guard, None
        if config.mode != "off":
            guard = self.make(config)
            guard.max_reports = config.max_reports
            self.guard = guard.enter_everywhere()
        if before is not None:
            before.leave()
            if self.report is not None:
                for what in before.unwatched:
                    self.report.note_unwatched(what)

    def make(self, config: Config) -> Guard:
        """A guard whose violations are heard here."""
        from torchguard.guard import Guard

        self.on = True
        self.open_report()
        guard = Guard(**config.guard_keywords(), suppressions=self._suppressions_of(config))
        guard.listener = self.hear
        return guard

    def _suppressions_of(self, config: Config) -> Any:
        from torchguard import _suppressions

        if config.suppressions != self.config.suppressions:
            found, wrong = _suppressions.read(config.suppressions, "suppressions")
            self.problems += [problem for problem in wrong if problem not in self.problems]
            return found
        if self._suppressions is None:
            self._suppressions, wrong = _suppressions.read(self.config.suppressions, "suppressions")
            self.problems += wrong
        return self._suppressions

    def config_of(self, item: pytest.Item) -> tuple[Config, list[str]]:
        """What is asked for one test, and what is wrong with its markers."""
        markers = []
        for marker in item.iter_markers("torchguard"):
            values = dict(marker.kwargs)
            for name in sorted(values.keys() - _OF_A_TEST):
                of_the_run = f"{name} is for the whole run; of a test are {', '.join(_OF_A_TEST)}"
                unknown = f"unknown option {name!r}{_config.nearest(name, _OF_A_TEST)}"
                return self.config, [f"the marker torchguard: {of_the_run if name in _config.OPTIONS else unknown}"]
            if len(marker.args) > 1:
                return self.config, ["the marker torchguard takes one mode, and options by name"]
            mode = marker.args[0] if marker.args else values.pop("mode", None)
            markers.append(Layer("the marker torchguard", {**values, "mode": "on" if mode is None else mode}))
        if not markers:
            return self.config, []
        # Of several markers, an outer one names the mode only where none within does.
        alone, wrong = _config.resolve(markers)
        if alone.suppressions is not None:
            from torchguard import _suppressions

            wrong += _suppressions.read(alone.suppressions, "the marker torchguard: suppressions")[1]
        config, _ = _config.resolve([*markers, *self.layers])
        return config, wrong

    # ---- violations

    def hear(self, violation: Violation, _: bool) -> None:
        """Take down what a guard reports; what cannot be written down must not hurt the test."""
        key = (violation.site, violation.allowed)
        self.heard.setdefault(key, [violation, 0])[1] += 1
        try:
            self.add_to_report(violation)
        except Exception as error:
            self.problem(f"a violation could not be written down: {type(error).__name__}: {error}")

    def take_heard(self) -> list[dict[str, Any]]:
        """What was heard since the last call, as plain values."""
        heard, self.heard = self.heard, {}
        return [{**violation.to_dict(), "times": times} for violation, times in heard.values()]

    def collect(self, records: list[dict[str, Any]], test: str) -> None:
        """Enter what a test reported."""
        for record in records:
            violation = _violation_of(record)
            key = (violation.site, violation.allowed)
            if key not in self.sites:
                self.sites[key] = _Site(violation, 0, {})
            site = self.sites[key]
            site.times += violation.times
            site.tests[test] = None

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A hook: collect, in the process that prints the summary."""
        records = getattr(report, "torchguard", None)
        if records:
            self.collect(records, report.nodeid)

    # ---- the report

    def report_path(self) -> str | None:
        """Where to write the violations of this process; None for nowhere, or not yet."""
        if "PYTEST_XDIST_WORKER" not in os.environ:
            return self.config.report
        # What a worker writes is put into the report of the process that started it, and is there if it crashes.
        path: str | None = getattr(self.pytest_config, "workerinput", {}).get(_REPORT)
        return path

    def open_report(self) -> None:
        """Open the report, if one is asked for and it is not open; what was heard before is in it, too."""
        path = self.report_path()
        if path is None or self.report is not None:
            return
        try:
            from torchguard._report import open_report

            self.report = open_report(path, self.problem)
        except Exception as error:  # the tests are to run all the same
            self.problem(str(error))
        for violation, times in list(self.heard.values()):
            self.add_to_report(replace(violation, times=times))

    def add_to_report(self, violation: Violation) -> None:
        """Write it down now: the test may end the process."""
        if self.report is not None:
            from torchguard import _suppressions

            self.report.add(violation, suppressed=_suppressions.gave(violation.allowed))

    def absorb(self, path: str) -> None:
        """Put a worker's report into that of the run."""
        self.reports_of_workers.remove(path)
        if os.path.exists(path):
            from torchguard._report import ReportError

            self.open_report()
            if self.report is not None:
                try:
                    self.report.absorb(path)
                except ReportError as error:
                    self.problem(str(error))

    def close_report(self) -> None:
        """No more is written."""
        for path in list(self.reports_of_workers):  # of workers that were stopped, or never told that they were done
            self.absorb(path)
        if self.report is not None:
            self.report.close()

    def note_missing_report(self) -> None:
        """A report was asked for on the command line, and nothing that would write it was switched on."""
        asked = self.pytest_config.getoption("torchguard_report")
        if asked is not None and not self.on and self.pytest_config.getoption("torchguard") is None:
            self.problem(f"--torchguard-report: {asked} is not written: no test ran under the guard; add --torchguard")

    def problem(self, line: str) -> None:
        """Keep what is to be told at the end, once."""
        if line not in self.problems:
            self.problems.append(line)


def _violation_of(record: dict[str, Any]) -> Violation:
    from torchguard._model import Place
    from torchguard._violation import Violation

    values = dict(record)
    for name, value in record.items():
        if isinstance(value, dict):
            values[name] = Place(**value)
    values["shape"] = tuple(record["shape"])
    return Violation(**values)


_RUN = pytest.StashKey[_Run]()
_REPORT = "torchguard_report"
_OUTSIDE = "(outside tests)"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Generator[None, Any, Any]:
    """From here on, conftest files are imported."""
    _begin(early_config, early_config.known_args_namespace)
    return (yield)


def _begin(config: pytest.Config, options: argparse.Namespace) -> None:
    run = config.stash[_RUN] = _Run(config, options)
    config.add_cleanup(lambda: run.change(Config()))
    if not run.distributes:
        run.change(run.config)
    elif run.config.mode != "off":
        run.open_report()


def pytest_configure(config: pytest.Config) -> None:
    """The marker, for ``--strict-markers``; reports come to the run that they belong to."""
    if _RUN not in config.stash:  # named in a conftest file, which is read late
        _begin(config, config.option)
    config.pluginmanager.register(config.stash[_RUN], "torchguard-run")
    if config.stash[_RUN].on:
        config.stash[_RUN].open_report()  # a worker of xdist is told late where to
    config.addinivalue_line(
        "markers",
        "torchguard(mode, *, at, every_call, suppressions, max_reports): run the test under the guard in that mode, or "
        "with mode 'off' without it; without a mode as configured, or strict.",
    )


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say that the guard is on."""
    run = config.stash.get(_RUN, None)
    return None if run is None or run.config.mode == "off" else f"torchguard: {run.config.mode}"


# ---- a test ------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """A guard for the test and its fixtures."""
    run = item.config.stash[_RUN]
    config, wrong = run.config_of(item)
    if wrong:
        item.stash[_WRONG] = wrong[0]
    run.outside += run.take_heard()  # by what was imported since the last test
    if config.mode == "off" and run.guard is None:
        return (yield)
    run.change(config)
    try:
        return (yield)
    finally:
        run.change(run.config)


_WRONG = pytest.StashKey[str]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A marker that cannot be understood fails its test."""
    wrong = item.stash.get(_WRONG, None)
    if wrong is not None:
        pytest.fail(f"torchguard: {_config.fault_of(wrong)}", pytrace=False)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Attach what was heard; show the test's own frames where the guard refused."""
    run = item.config.stash[_RUN]
    if run.on and call.excinfo is not None:
        call.excinfo = _without_our_frames(call.excinfo)
    report = yield
    if run.heard:
        report.torchguard = run.take_heard()
    return report


def _without_our_frames(info: pytest.ExceptionInfo[BaseException]) -> pytest.ExceptionInfo[BaseException]:
    error = info.value
    if type(error).__name__ == "SavedTensorCorruptionError":
        from torchguard import _tracebacks

        shown = _tracebacks.of_program(error, error.__traceback__)
        if shown is not None:
            return pytest.ExceptionInfo.from_exception(error.with_traceback(shown))
    return info


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """The same for what test modules do when they are imported."""
    show: Any = collector.repr_failure
    if collector.config.stash[_RUN].on:
        collector.repr_failure = lambda excinfo: show(_without_our_frames(excinfo))  # type: ignore[method-assign]
    try:
        return (yield)
    finally:
        vars(collector).pop("repr_failure", None)


@pytest.fixture
def torchguard_strict(request: pytest.FixtureRequest) -> Iterator[Guard]:
    """A strict guard, on from here to the end of the test, whatever the rest of the run is under."""
    run = request.config.stash[_RUN]
    config, _ = run.config_of(request.node)
    with run.make(replace(config, mode="strict")) as guard:
        yield guard


# ---- the end -----------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True, trylast=True)  # the summary is printed by a wrapper around this one
def pytest_sessionfinish(session: pytest.Session) -> Generator[None, Any, Any]:
    """What was heard outside tests; a worker sends it to the process that prints."""
    result = yield
    run = session.config.stash[_RUN]
    run.change(Config())
    outside = run.outside + run.take_heard()
    sent = getattr(session.config, "workeroutput", None)
    if sent is not None:
        used = sorted(run._suppressions.used) if run._suppressions is not None else []
        sent["torchguard"] = {"outside": outside, "used": used, "on": run.on}
    else:
        run.collect(outside, _OUTSIDE)
    run.close_report()
    return result


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """A worker of xdist is started."""
    run = node.config.stash[_RUN]
    if run.config.report is not None:
        beside = run.config.report if run.report is None else run.report.path
        path = f"{beside.replace('%', '')}.{node.workerinput['workerid']}.jsonl"
        node.workerinput[_REPORT] = path
        run.reports_of_workers.append(path)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A worker of xdist is done, or has crashed."""
    run = node.config.stash[_RUN]
    path = node.workerinput.get(_REPORT)
    if path in run.reports_of_workers:
        run.absorb(path)
    sent = getattr(node, "workeroutput", {}).get("torchguard")
    if sent:
        run.collect(sent["outside"], _OUTSIDE)
        run.used.update(sent["used"])
        run.on = run.on or sent["on"]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Each violation once, with the tests that hit it; suppressions that match nothing any more."""
    run = config.stash[_RUN]
    run.note_missing_report()
    found = [site for site in run.sites.values() if site.violation.allowed is None]
    stale = _stale(run) if run.on else []
    if not (found or stale or run.problems):
        return
    count = f"{len(found) or 'no'} {'violation' if len(found) == 1 else 'violations'}"
    terminalreporter.section(f"torchguard: {count if run.on or found else 'not switched on'}")
    for site in found:
        place = site.violation.written or site.violation.read
        where = f"{place}  {place.source}" if place is not None else "(no user code on the stack)"
        terminalreporter.write_line(where, bold=True)
        times = "" if site.times == 1 else f"  ({site.times} times)"
        terminalreporter.write_line(f"  {str(site.violation).splitlines()[0]}{times}")
        for test in site.tests:
            terminalreporter.write_line(f"    {test}")
    for line in (*run.problems, *stale):
        terminalreporter.write_line(line)
    if run.report is not None and os.path.exists(run.report.path):
        terminalreporter.write_line(f"report: {run.report.path}")


def _stale(run: _Run) -> list[str]:
    from torchguard import _suppressions

    found = run._suppressions or _suppressions.read(run.config.suppressions, "suppressions")[0]
    found.used |= run.used
    return [f"{one.source} matches nothing any more, take it out: {one.text}" for one in found.stale()]
