"""Which small changes to a judging module does no test notice?

Run by ``make mutate``. The changes are mutmut's, and two more; its way of running them is not used (why, says decision
record 11). A server process imports torch and collects the tests once. It runs them once to learn which of them reach
which line, and then forks for each mutant: the child puts the mutated code into the functions that are there, so that
they keep their identity, and runs the tests that reach the mutated line until one fails. What is run when a module is
imported (tables, classes, default values) is mutated in a process that has torch, and imports the rest anew.

A mutant that survives is a missing test, or is explained in ``tools/survivors.toml``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SURVIVORS = ROOT / "tools" / "survivors.toml"

_CATALOGUE = "tests/test_catalogue.py::test_the_guard_does_with_the_program_what_it_must"
_KEPT = "tests/test_generated.py::test_what_was_once_wrong_is_right"

#: What runs in a process that would not see the mutant, or takes long and says little.
_LEFT_OUT = ("subprocess", "command_line", "soak", "leak", "for_a_moment")

#: A test that takes longer than so many seconds to fail is not asked first.
_SLOW = 5

#: A line that fewer tests run may make, in a process's first call, what is kept for the others: these are asked, too.
_FEW = 4

#: For each module the tests that may notice: a file or a test in it (and, after #, what its cases' names have in them),
#: and how many of them at most. Those of the first entry are run first.
TESTS: dict[str, tuple[tuple[str, int], ...]] = {
    "_overlap": (("tests/test_overlap.py", 1000),),
    "_fingerprint": (("tests/test_fingerprint.py", 1000),),
    "_suppressions": (("tests/test_suppressions.py", 1000),),
    "_verdict": (
        ("tests/test_mutants_judging.py", 1000),
        ("tests/test_repair.py", 1000),
        ("tests/test_at_read.py", 1000),
        ("tests/test_allow.py", 1000),
        ("tests/test_nesting_and_threads.py", 1000),
        (_CATALOGUE, 120),
    ),
    "_writers": (("tests/test_writers.py", 1000), (_CATALOGUE, 300), (_KEPT, 100)),
    "_rehearsal": (
        ("tests/test_guard.py", 1000),
        ("tests/test_writers.py::test_a_rehearsal", 60),
        ("tests/test_distributed.py::test_a_", 1000),
        ("tests/test_transparency_training.py#drawn", 20),
        (f"{_CATALOGUE}#complex", 100),
        (f"{_CATALOGUE}#foreach_copies", 10),
        (f"{_CATALOGUE}#foreach_reads", 10),
        ("tests/test_transparency_tensors.py", 60),
        (_CATALOGUE, 300),
        (_KEPT, 100),
    ),
    "_selfwrites": (
        ("tests/test_selfwrites.py", 1000),
        (f"{_CATALOGUE}#_its_own_", 40),
        ("tests/test_repair.py", 1000),
        ("tests/test_at_read.py", 1000),
        ("tests/test_transparency_func.py", 60),
        (_CATALOGUE, 300),
        (_KEPT, 100),
    ),
    "_writes": (
        ("tests/test_mutants_writes.py", 1000),
        ("tests/test_rows.py", 1000),
        ("tests/test_flat_buffers.py", 1000),
        ("tests/test_recompute.py", 100),
        ("tests/test_exports.py", 200),
        ("tests/test_hook_composition.py", 100),
        ("tests/test_stats.py", 100),
        ("tests/test_pool_threads.py", 1000),
        ("tests/test_counterless.py", 1000),
        ("tests/test_guard.py", 1000),
        ("tests/test_at_read.py", 1000),
        ("tests/test_repair.py", 1000),
        ("tests/test_nesting_and_threads.py", 1000),
        ("tests/test_transparency_tensors.py", 60),
        (_CATALOGUE, 400),
        (_KEPT, 100),
    ),
    "_aliases": (
        ("tests/test_mutants_aliases.py", 1000),
        ("tests/test_flat_buffers.py", 1000),
        ("tests/test_guard.py", 1000),
        ("tests/test_at_read.py", 1000),
        ("tests/test_functorch.py", 60),
        (_CATALOGUE, 300),
        (_KEPT, 100),
    ),
    "_ledger": (
        ("tests/test_mutants_ledger.py", 1000),
        ("tests/test_ledger.py", 1000),
        ("tests/test_flat_buffers.py", 1000),
        ("tests/test_guard.py", 1000),
        (_CATALOGUE, 200),
        (_KEPT, 100),
    ),
    "_policy": (
        ("tests/test_watch.py", 150),
        ("tests/test_distributed.py::test_an_intended", 5),
        (f"{_CATALOGUE}#compiled_", 30),
        ("tests/test_allow.py", 1000),
        ("tests/test_nesting_and_threads.py", 1000),
        ("tests/test_pool_threads.py", 1000),
        ("tests/test_guard.py", 1000),
        ("tests/test_stats.py", 1000),
        ("tests/test_repair.py", 1000),
        (_CATALOGUE, 60),
    ),
    "_packing": (
        ("tests/test_mutants_packing.py", 1000),
        ("tests/test_native.py", 1000),
        ("tests/test_guard.py", 1000),
        ("tests/test_hook_composition.py", 200),
        ("tests/test_refusals.py", 200),
        (_CATALOGUE, 300),
        (_KEPT, 100),
    ),
    "_saves": (
        ("tests/test_mutants_saves.py", 1000),
        ("tests/test_guard.py", 1000),
        ("tests/test_at_read.py", 1000),
        ("tests/test_repair.py", 300),
        ("tests/test_audit.py", 300),
        (_CATALOGUE, 300),
        (_KEPT, 100),
    ),
    "_refusal": (
        ("tests/test_refusals.py", 400),
        ("tests/test_guard.py", 1000),
        ("tests/test_functorch.py", 200),
        (f"{_CATALOGUE}#refused-", 150),
        (_KEPT, 100),
    ),
    "_reads": (
        ("tests/test_mutants_reads.py", 1000),
        ("tests/test_allow.py", 1000),
        ("tests/test_refusals.py", 200),
        ("tests/test_guard.py", 1000),
        ("tests/test_at_read.py", 1000),
        ("tests/test_repair.py", 1000),
        ("tests/test_audit.py", 1000),
        (_CATALOGUE, 300),
        (_KEPT, 100),
    ),
    "_memory": (
        ("tests/test_memory.py", 1000),
        ("tests/test_transparency_memory.py", 200),
        (_CATALOGUE, 300),
        (_KEPT, 60),
    ),
}


# ---- mutants ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """One small change to a module.

    Attributes:
        name: the function, and what became of its line; stays the same when lines move.
        lines: the first and last line of what is changed.
        code: the module with the change.
        function: the first and last line of the function that it stands in.
    """

    name: str
    lines: tuple[int, int]
    code: str
    function: tuple[int, int]


def mutants_of(source: str) -> list[Mutant]:
    """Every mutant of a module that compiles, in the order of its lines."""
    import libcst as cst
    from libcst.metadata import MetadataWrapper, PositionProvider
    from mutmut.mutation import mutators

    wrapper = MetadataWrapper(cst.parse_module(source))
    positions = wrapper.resolve(PositionProvider)
    operators = [*mutators.mutation_operators, (cst.If, _negated), (cst.IfExp, _negated), (cst.Expr, _dropped)]

    def changes(node: Any, function: str, outermost: Any = None) -> Iterator[tuple[Any, Any, str, Any]]:
        if isinstance(node, (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom)):
            return  # no values
        if isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and node.func.value in ("len", "isinstance"):
            return  # cannot be called otherwise
        if isinstance(node, (cst.FunctionDef, cst.ClassDef)):
            function = f"{function}.{node.name.value}".lstrip(".")
            outermost = outermost or (node if isinstance(node, cst.FunctionDef) else None)
        for kind, operator in operators:
            if isinstance(node, kind):
                made = list(operator(node))
                # A string is changed once: other letters say what "XX" around it says.
                made = made[:1] if kind is cst.BaseString else made
                yield from ((node, new, function, outermost or node) for new in made)
        for child in node.children:
            yield from changes(child, function, outermost)

    found: list[Mutant] = []
    names: Counter[str] = Counter()
    for node, new, function, outermost in changes(wrapper.module, ""):
        code = wrapper.module.deep_replace(node, new).code
        try:
            compile(code, "mutant", "exec")
        except (SyntaxError, ValueError):
            continue
        name = f"{function or 'module'}: {_told(source, code)}"
        names[name] += 1
        if names[name] > 1:
            name += f" #{names[name]}"
        place = positions[node]
        last = place.start.line if isinstance(node, cst.If) else place.end.line
        around = positions[outermost]
        found.append(Mutant(name, (place.start.line, last), code, (around.start.line, around.end.line)))
    return found


def _remembered(source: str, path: Path) -> list[Mutant]:
    """Every mutant of a module: making them takes minutes; they are kept as long as it and this file stay the same."""
    key = hashlib.sha256((source + Path(__file__).read_text(encoding="utf-8")).encode()).hexdigest()
    if path.exists():
        known, mutants = pickle.loads(path.read_bytes())
        if known == key:
            return list(mutants)
    mutants = mutants_of(source)
    path.write_bytes(pickle.dumps((key, mutants)))
    return mutants


def _negated(node: Any) -> Iterator[Any]:
    """``if x`` as ``if not x``, where mutmut has no other comparison to offer."""
    import libcst as cst

    if isinstance(node.test, (cst.Name, cst.Attribute, cst.Call)):
        yield node.with_changes(test=cst.UnaryOperation(cst.Not(), node.test))


def _dropped(node: Any) -> Iterator[Any]:
    """A call made for its effect, left out."""
    import libcst as cst

    if isinstance(node.value, cst.Call):
        yield cst.Expr(cst.Ellipsis())


def _told(old: str, new: str) -> str:
    """``old lines => new lines``, without what surrounds the change."""
    before, after = old.splitlines(), new.splitlines()
    while before and after and before[0] == after[0]:
        del before[0], after[0]
    while before and after and before[-1] == after[-1]:
        del before[-1], after[-1]
    return " => ".join(" ".join(line.strip() for line in lines) for lines in (before, after))


# ---- putting a mutant into a process that runs --------------------------------------------------------------------


def _own(code: types.CodeType) -> list[Any]:
    """What a code object does, but for the functions in it and its line numbers."""
    constants = [(type(c), repr(c)) for c in code.co_consts if not isinstance(c, types.CodeType)]
    return [
        code.co_code,
        code.co_names,
        code.co_varnames,
        code.co_freevars,
        code.co_cellvars,
        code.co_flags,
        code.co_argcount,
        constants,
    ]


def _inner(code: types.CodeType) -> list[types.CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]


def differences(old: types.CodeType, new: types.CodeType) -> list[tuple[types.CodeType, types.CodeType]] | None:
    """The functions that differ, old and new; None where what is run at import differs."""
    function = bool(old.co_flags & 1)  # CO_OPTIMIZED: neither a module nor the body of a class
    same = _own(old) == _own(new) and len(_inner(old)) == len(_inner(new))
    if not same:
        return [(old, new)] if function else None
    found: list[tuple[types.CodeType, types.CodeType]] = []
    for one, other in zip(_inner(old), _inner(new), strict=True):
        below = differences(one, other)
        if below is None:
            return None
        found += below
    return [(old, new), *found] if function and found else found


class Functions:
    """The functions of a module that live in this process."""

    def __init__(self, path: Path) -> None:
        self._by_code: dict[tuple[int, str], list[types.FunctionType]] = defaultdict(list)
        for thing in gc.get_objects():
            if type(thing) is types.FunctionType and thing.__code__.co_filename == str(path):
                self._by_code[(thing.__code__.co_firstlineno, thing.__code__.co_name)].append(thing)

    def replace(self, changed: list[tuple[types.CodeType, types.CodeType]]) -> bool:
        """Give them their mutated code; False where they cannot have it."""
        if any(_inner(old) for old, _ in changed):
            return False  # what it has made already, and handed to others, would stay what it is
        done = False
        for old, new in changed:
            for function in self._by_code[(old.co_firstlineno, old.co_name)]:
                if len(function.__code__.co_freevars) != len(new.co_freevars):
                    return False
                function.__code__ = new
                done = True
        return done


class _MutatedModule(importlib.machinery.SourceFileLoader):
    """Loads a module from other source than its file's; put on ``sys.meta_path``."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        super().__init__(name, str(path))
        self._source = source

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname: str) -> types.CodeType:
        return compile(self._source, self.path, "exec")


# ---- children -----------------------------------------------------------------------------------------------------


def in_child(work: Callable[[], Any], cpu: float, wall: float, log: Path) -> tuple[str, Any]:
    """Run in a forked process: ("done", what it returned), ("timeout", None) or ("died", None)."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(receive)
            os.setsid()
            with contextlib.suppress(OSError, AttributeError):  # who is interrupted leaves nobody behind (Linux)
                ctypes.CDLL(None).prctl(1, signal.SIGKILL)
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (int(cpu) + 1, int(cpu) + 5))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            result = pickle.dumps(work())
            with os.fdopen(send, "wb") as sending:
                sending.write(result)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(3)
        finally:
            os._exit(0)
    os.close(send)
    finished = threading.Event()

    def watch() -> None:
        if not finished.wait(wall):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with os.fdopen(receive, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    late = not finished.is_set() and not watcher.is_alive()
    finished.set()
    watcher.join()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # what the tests started
    if data:
        return "done", pickle.loads(data)
    killed_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return ("timeout" if late or killed_by in (signal.SIGXCPU, signal.SIGKILL) else "died"), None


# ---- tests --------------------------------------------------------------------------------------------------------


@dataclass
class Reach:
    """What running the tests once told.

    Attributes:
        lines: for each line of the module, the tests that run it.
        seconds: for each test, the processor time that it takes.
        failed: tests that fail without any mutant.
        imported: the lines that run before any test does.
    """

    lines: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    seconds: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    imported: set[int] = field(default_factory=set)

    def of(self, first: int, last: int) -> set[str]:
        """The tests that run any of these lines."""
        return set().union(*(self.lines.get(line, ()) for line in range(first, last + 1)))


class _Tracer:
    """Notes the lines of one file that are run."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self.seen: set[int] = set()

    def __call__(self, frame: types.FrameType, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename == self._path else None

    def _line(self, frame: types.FrameType, event: str, argument: object) -> Any:
        self.seen.add(frame.f_lineno)
        return self._line

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        threading.settrace(self)
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(None)
            threading.settrace(None)


def _run_one(item: Any, following: Any) -> bool:
    """Whether the test passes (or is skipped)."""
    session = item.session
    before = session.testsfailed
    item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
    return bool(session.testsfailed == before)


def _run_until_one_fails(items: Sequence[Any]) -> str | None:
    for i, item in enumerate(items):
        if not _run_one(item, items[i + 1] if i + 1 < len(items) else None):
            return str(item.nodeid)
    return None


def _chosen(items: list[Any], module: str, seed: int, of_each: int | None) -> list[Any]:
    """Those of the collected tests that are asked for, at most so many of each kind."""
    chosen: list[Any] = []
    for i, (tests, most) in enumerate(TESTS[module]):
        most = most if of_each is None or i == 0 else min(most, of_each)  # the module's own stand first: all of them
        prefix, _, part = tests.partition("#")
        here = [
            item
            for item in items
            if item.nodeid.startswith(prefix) and part in item.nodeid and not any(w in item.nodeid for w in _LEFT_OUT)
        ]
        if len(here) > most:
            here.sort(key=lambda item: hashlib.sha256(f"{seed} {item.nodeid}".encode()).digest())
            seen: Counter[str] = Counter()
            turns = {}
            for item in here:  # as many of each of the catalogue's routes, as far as there are
                route = getattr(getattr(item, "callspec", None), "params", {}).get("case")
                route = str(getattr(route, "route", ""))
                turns[item] = seen[route]
                seen[route] += 1
            here = sorted(here, key=lambda item: turns[item])[:most]
        chosen += here
    return chosen


class Plugin:
    """Runs ``work`` where pytest would run the tests that it has collected."""

    def __init__(self, work: Callable[[list[Any]], Any]) -> None:
        self._work = work
        self.result: Any = None

    def pytest_configure(self, config: Any) -> None:
        config.addinivalue_line("markers", "timeout: of the plugin that is left out")

    def pytest_runtestloop(self, session: Any) -> bool:
        if session.testsfailed:
            raise session.Interrupted("the tests cannot be collected")
        self.result = self._work(session.items)
        return True


def _collect(files: list[str], work: Callable[[list[Any]], Any], scratch: Path) -> Any:
    import hypothesis
    import pytest

    # The same examples every time; and one that fails is enough, it need not be the smallest.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutate", phases=phases, derandomize=True, database=None)
    hypothesis.settings.load_profile("mutate")
    plugin = Plugin(work)
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-p",
        "no:timeout",
        "--capture=no",
        "--tb=line",
        "--assert=plain",
    ]
    status = pytest.main([*files, *options, f"--basetemp={scratch / 'tmp'}"], plugins=[plugin])
    if plugin.result is None:
        raise RuntimeError(f"pytest ended with {status} before any test ran")
    return plugin.result


# ---- the run ------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What became of a mutant: "killed" (by a test), "timeout", "survived", or "not reached" by any test."""

    name: str
    line: int
    outcome: str
    by: str | None = None
    tests: int = 0


class Module:
    """One module under mutation."""

    def __init__(self, name: str, options: argparse.Namespace, scratch: Path) -> None:
        self.name = name
        self.path = ROOT / "torchguard" / f"{name}.py"
        self.source = self.path.read_text(encoding="utf-8")
        self._seed, self._budget, self._verbose = options.seed, options.budget, options.verbose
        self._most = options.most
        self._scratch = scratch
        self._kills: Counter[str] = Counter()
        self._files = sorted({prefix.partition("::")[0] for prefix, _ in TESTS[name]})
        self._files = [name for name in self._files if (ROOT / name).exists()]

    def tests_at(self) -> dict[str, int]:
        """When each file of tests was written to last, in nanoseconds."""
        return {name: (ROOT / name).stat().st_mtime_ns for name in self._files}

    def run(self, mutants: list[Mutant], shown: Callable[[Result], None]) -> list[Result]:
        """What becomes of each mutant. In this process neither torchguard nor a test is imported."""
        log = self._scratch / "server.log"
        state, answer = in_child(lambda: self._serve(mutants, shown), 10**6, 10**6, log)
        if state != "done":
            raise SystemExit(f"{self.name}: the tests cannot be run:\n{log.read_text()[-3000:]}")
        reach, results = answer
        if reach.failed:
            print(f"{self.name}: left out, because they fail without any mutant: {', '.join(reach.failed)}")
        by_name = {result.name: result for result in results}
        for mutant in mutants:
            if mutant.name not in by_name:
                by_name[mutant.name] = result = self._anew(mutant, reach)
                shown(result)
        return [by_name[mutant.name] for mutant in mutants]

    # -- in the server: everything is imported, and forked

    def _serve(self, mutants: list[Mutant], shown: Callable[[Result], None]) -> tuple[Reach, list[Result]]:
        tracer = _Tracer(self.path)
        threading.settrace(tracer)
        sys.settrace(tracer)

        def work(items: list[Any]) -> tuple[Reach, list[Result]]:
            sys.settrace(None)
            threading.settrace(None)
            chosen = {item.nodeid: item for item in _chosen(items, self.name, self._seed, self._most)}
            functions = Functions(self.path)
            gc.collect()
            gc.freeze()  # a child is to copy few pages
            log = self._scratch / "reach.log"
            state, reach = in_child(lambda: self._learn(list(chosen.values())), 3600, 3600, log)
            if state != "done":
                raise RuntimeError(f"the tests end with {state}:\n{log.read_text()[-2000:]}")
            reach.imported = set(tracer.seen)
            results: list[Result] = []
            original = compile(self.source, str(self.path), "exec")
            for mutant in mutants:
                changed = differences(original, compile(mutant.code, str(self.path), "exec"))
                result = self._forked(mutant, changed, functions, chosen, reach) if changed else None
                if result is not None:
                    results.append(result)
                    shown(result)
            return reach, results

        return _collect(self._files, work, self._scratch)  # type: ignore[no-any-return]

    def _learn(self, items: list[Any]) -> Reach:
        reach = Reach()
        for i, item in enumerate(items):
            tracer = _Tracer(self.path)
            start = time.process_time()
            with tracer.on():
                passed = _run_one(item, items[i + 1] if i + 1 < len(items) else None)
            reach.seconds[item.nodeid] = time.process_time() - start
            if not passed:
                reach.failed.append(item.nodeid)
                continue
            for line in tracer.seen:
                reach.lines[line].add(item.nodeid)
        reach.lines = dict(reach.lines)
        return reach

    def _order(self, reach: Reach, candidates: set[str]) -> list[str]:
        """Those that have noticed other mutants first, then the module's own, then file by file, quick ones first."""
        own, _, part = TESTS[self.name][0][0].partition("#")
        files: dict[str, list[str]] = defaultdict(list)
        for test in sorted(candidates, key=lambda test: (reach.seconds[test], test)):
            files["" if test.startswith(own) and part in test else test.partition("::")[0]].append(test)
        turns = [(i if file else -1, test) for file, tests in files.items() for i, test in enumerate(tests)]
        ordered = sorted(turns, key=lambda turn: (-self._kills[turn[1]], turn))
        chosen: list[str] = []
        seconds = 0.0
        for _, test in ordered:
            if chosen and seconds + reach.seconds[test] > self._budget:
                continue
            chosen.append(test)
            seconds += reach.seconds[test]
        return chosen

    def _forked(
        self,
        mutant: Mutant,
        changed: list[tuple[types.CodeType, types.CodeType]],
        functions: Functions,
        items: dict[str, Any],
        reach: Reach,
    ) -> Result | None:
        """None where the mutant has to be run in a process that imports it."""
        first, last = mutant.lines
        reached = reach.of(first, last)
        if 0 < len(reached) < _FEW:
            reached |= reach.of(*mutant.function)
        tests = self._order(reach, reached)
        at_import = any(line in reach.imported for line in range(first, last + 1))
        if not tests:
            return None if at_import else Result(mutant.name, first, "not reached")

        def work() -> str | None:
            if not functions.replace(changed):
                raise RuntimeError("no such function")
            return _run_until_one_fails([items[test] for test in tests])

        seconds = sum(reach.seconds[test] for test in tests)
        log = self._scratch / "mutant.log"
        begun = time.monotonic()
        state, by = in_child(work, 10 + 3 * seconds, 90 + 10 * seconds, log)
        if self._verbose:
            os.write(1, log.read_bytes())
        if state == "died" and b"no such function" in log.read_bytes():
            return None
        result = self._judged(mutant, state, by, len(tests))
        if by is not None and time.monotonic() - begun > _SLOW:
            self._kills[by] -= 3  # it waits for what will not happen: another first, the next time
        return None if at_import and result.outcome == "survived" else result

    def _judged(self, mutant: Mutant, state: str, by: str | None, tests: int) -> Result:
        if by is not None:
            self._kills[by] += 1
        outcome = state if state == "timeout" else "killed" if state == "died" or by is not None else "survived"
        return Result(mutant.name, mutant.lines[0], outcome, by or ("(crash)" if state == "died" else None), tests)

    # -- in a process of its own, for what is run at import

    def _anew(self, mutant: Mutant, reach: Reach) -> Result:
        first, last = mutant.lines
        reached = reach.of(first, last)
        if not reached or any(line in reach.imported for line in range(first, last + 1)):
            reached = set(reach.seconds) - set(reach.failed)  # what was made at import, any of them may ask about
        tests = self._order(reach, reached)
        files = sorted({test.partition("::")[0] for test in tests})

        def work() -> str | None:
            loader: Any = _MutatedModule(f"torchguard.{self.name}", self.path, mutant.code)
            sys.meta_path.insert(0, loader)

            def run(items: list[Any]) -> tuple[str | None]:
                named = {item.nodeid: item for item in items}
                missing = next((test for test in tests if test not in named), None)
                return (missing or _run_until_one_fails([named[test] for test in tests]),)

            return _collect(files, run, self._scratch)[0]  # type: ignore[no-any-return]

        seconds = sum(reach.seconds[test] for test in tests)
        log = self._scratch / "mutant.log"
        state, by = in_child(work, 60 + 3 * seconds, 300 + 10 * seconds, log)
        if self._verbose:
            os.write(1, log.read_bytes())
        return self._judged(mutant, state, by, len(tests))


def explained(module: str) -> dict[str, str]:
    """The survivors of a module that are explained, by name."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    read = tomllib.loads(SURVIVORS.read_text(encoding="utf-8")) if SURVIVORS.exists() else {}
    found: dict[str, str] = {}
    for entry in read.get(module, []):
        for name in entry["mutants"]:
            found[name] = entry["why"]
    return found


def main(arguments: list[str] | None = None) -> int:
    """Mutate the modules. The exit status is 1 where a mutant survives that is not explained."""
    parser = argparse.ArgumentParser(
        prog="make mutate", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--module", action="append", choices=[*TESTS], metavar="NAME", help=f"of {', '.join(TESTS)}")
    parser.add_argument("--sample", type=int, default=None, metavar="N", help="no more than N mutants of each module")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default 0)")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of tests for each mutant (default 20)")
    parser.add_argument(
        "--most", type=int, default=None, metavar="N", help="no more than N tests of each kind but the first"
    )
    parser.add_argument("--only", default=None, metavar="TEXT", help="mutants whose name has TEXT in it")
    parser.add_argument("--again", action="store_true", help="those that survived the last time")
    parser.add_argument("--open", action="store_true", help="the same, without those that are explained")
    parser.add_argument("--rest", action="store_true", help="those that were never run")
    parser.add_argument("--list", action="store_true", help="only name the mutants")
    parser.add_argument("--verbose", action="store_true", help="show what the tests print")
    options = parser.parse_args(arguments)
    try:
        import libcst  # noqa: F401
        import mutmut.mutation.mutators  # noqa: F401
    except ImportError as error:
        parser.exit(2, f"make mutate: {error}; `make mutate` installs it: pip install -e '.[mutation]'\n")

    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    os.environ.setdefault("TORCHGUARD_NATIVE", "0")  # the part in C does what is to be mutated in Python
    kept = ROOT / ".mutation"
    kept.mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="mutate-"))
    status = 0
    try:
        for name in options.module or TESTS:
            status |= _mutate(name, options, kept / f"{name}.json", scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return status


def _mutate(name: str, options: argparse.Namespace, last_time: Path, scratch: Path) -> int:
    module = Module(name, options, scratch)
    every = _remembered(module.source, last_time.with_suffix(".pickle"))
    mutants = [mutant for mutant in every if options.only is None or options.only in mutant.name]
    earlier: dict[str, Any] = json.loads(last_time.read_text()) if last_time.exists() else {}
    if options.again or options.open:
        alive = {key for key, value in earlier.items() if value["outcome"] in ("survived", "not reached")}
        alive -= explained(name).keys() if options.open else set()
        mutants = [mutant for mutant in mutants if mutant.name in alive]
    if options.rest:
        mutants = [mutant for mutant in mutants if mutant.name not in earlier]
    if options.sample is not None and len(mutants) > options.sample:
        drawn = set(random.Random(options.seed).sample(range(len(mutants)), options.sample))
        mutants = [mutant for i, mutant in enumerate(mutants) if i in drawn]
    if options.list:
        print("\n".join(f"{name}.py:{mutant.lines[0]}  {mutant.name}" for mutant in mutants))
        return 0
    if not mutants:
        print(f"{name}: no mutants")
        return 0

    known = explained(name)
    begun = time.time()
    terminal = os.dup(1)  # what is forked writes elsewhere
    names = {mutant.name for mutant in every}

    def shown(result: Result) -> None:
        # Kept at once: a run that is stopped goes on with --rest. It may be told in a fork: the file is what is known.
        kept: dict[str, Any] = json.loads(last_time.read_text()) if last_time.exists() else {}
        kept = {key: value for key, value in kept.items() if key in names} | {result.name: asdict(result)}
        last_time.write_text(json.dumps(kept, indent=1))
        if result.outcome in ("survived", "not reached"):
            why = f"    explained: {known[result.name]}\n" if result.name in known else ""
            os.write(terminal, f"{result.outcome:11}  {name}.py:{result.line}  {result.name}\n{why}".encode())

    # Only here: the processes that are forked have it, and nothing of torchguard.
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    tests = module.tests_at()
    results = module.run(mutants, shown)
    if module.tests_at() != tests:
        # A mutant of what runs at import looks for its tests by name: one that is gone by then would count as a kill.
        print(f"{name}: its tests were edited meanwhile; what was killed since may not be: run it once more")
        return 1
    counts = Counter(result.outcome for result in results)
    survivors = [result for result in results if result.outcome in ("survived", "not reached")]
    unexplained = [result for result in survivors if result.name not in known]
    print(
        f"{name}: {len(every)} mutants, {len(results)} run; {counts['killed']} killed, {counts['timeout']} timed out, "
        f"{len(survivors)} survived ({len(survivors) - len(unexplained)} of them explained), "
        f"{time.time() - begun:.0f} s",
        flush=True,
    )
    for result in unexplained:
        print(f"    not explained: {name}.py:{result.line}  {result.name}", flush=True)
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
