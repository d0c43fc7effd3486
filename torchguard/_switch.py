"""How is the guard switched on for a whole process, and what is said and done when the process ends?

A session is what lies between. It belongs to the process that began it, the main one; that one sets the exit status
and sums up. Its child processes inherit the environment, are guarded by the same configuration, and leave what they
found for the main process in a file whose name they inherit, too.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import platform
import secrets
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torchguard import _config, _policy, _progress, _suppressions
from torchguard._config import Config, Layer
from torchguard._violation import Violation

if TYPE_CHECKING:
    from torchguard._report import ReportWriter
    from torchguard.guard import Guard

Origin = Literal["arguments", "command line", "environment"]

#: Tells child processes which process is the main one, how it is configured, and where it finds its mail.
_PARENT = "TORCHGUARD_PARENT"
_ASKED = ("TORCHGUARD", "TORCHGUARD_OPTIONS")


def say(line: str) -> None:
    """One line on standard error, if there is any."""
    with contextlib.suppress(Exception):
        sys.stderr.write(f"torchguard: {' '.join(line.splitlines())}\n")
        sys.stderr.flush()


# ---- on and off --------------------------------------------------------------------------------------------

_session: Session | None = None
_aside = False


def enable(
    mode: str = "strict",
    *,
    at: str | None = None,
    every_call: bool | None = None,
    report: str | os.PathLike[str] | None = None,
    exitcode: int | None = None,
    suppressions: str | os.PathLike[str] | Sequence[str] | None = None,
    max_reports: int | None = None,
    progress: bool | int | None = None,
) -> Guard:
    """Switch the guard on for the whole process, all threads, until :func:`disable`; replaces one that is on.

    What is not given here is taken from the command line, the environment (``TORCHGUARD_OPTIONS``) or pyproject.toml.

    Args:
        mode: ``"strict"``, ``"warn"``, ...
        at: when to judge, see ``Guard``.
        every_call: see ``Guard``.
        report: path to write the violations to, as they happen; ends in .jsonl, .json, .sarif, .html or .txt, and
            ``%r``, ``%h``, ``%p`` stand for rank, host and process.
        exitcode: status to exit with if violations were reported and the program succeeded; unless given somewhere, the
            status is left alone.
        suppressions: path of a file, or a list of lines, with violations to live with.
        max_reports: how many sites to warn of.
        progress: say now and then, on standard error, how far it is: True if that is a terminal, or every so many
            seconds (from 2 up) wherever it leads.

    Raises:
        ValueError: for an argument that cannot be used.
    """
    global _session
    importlib.import_module("torchguard.guard")  # brings torch, and with it what the environment asks for
    given = {
        "mode": mode,
        "at": at,
        "every_call": every_call,
        "report": report,
        "exitcode": exitcode,
        "suppressions": suppressions,
        "max_reports": max_reports,
        "progress": progress,
    }
    arguments = Layer("enable()", given)
    alone, wrong = _config.resolve([arguments])
    wrong += _suppressions.read(alone.suppressions, "suppressions")[1]
    if wrong:
        raise ValueError(f"torchguard: {_config.fault_of(wrong[0])}")
    if alone.mode == "off":
        modes = ", ".join(_config.MODES)
        raise ValueError(f"torchguard: enable() takes one of {modes}; to switch off, use torchguard.disable()")
    command_line = _session.layers if _session is not None and _session.origin == "command line" else []
    layers, problems = _surroundings()
    unless_told = Layer("", {"exitcode": 0}) if _session is None or _session.origin == "arguments" else Layer("", {})
    config, more = _config.resolve([arguments, *command_line, *layers, unless_told])
    for problem in [*problems, *more]:
        say(problem)
    if _session is None:
        _session = Session("arguments", config)
    else:
        _session.change(config)
    _session.begin()
    if _session.guard is None:
        raise RuntimeError("torchguard: the guard could not be switched on")  # begin() has said why
    return _session.guard


def disable() -> None:
    """Switch off what :func:`enable`, the environment or the command line switched on."""
    global _session
    if _session is None:
        return
    _session.pause()
    if _session.origin == "arguments":
        _session.conclude()
        _session = None


def at_import_of_torch() -> None:
    """torch has been imported (but for its last lines) and the variable is set. (Called by torchguard.)"""
    global _session
    if _aside:
        return
    if _session is None:
        config = _inherited_config()
        if config is None:
            layers, problems = _surroundings()
            config, more = _config.resolve(layers)
            for problem in [*problems, *more]:
                say(problem)
        if config.mode == "off":
            return
        _session = Session("environment", config)
    _session.begin()


def arm(config: Config, layers: list[Layer]) -> Session:
    """Begin a session as soon as the program imports torch; its environment is for the program to set first."""
    global _session
    _session = Session("command line", config, layers)
    if "torch" in sys.modules:
        _session.begin()
    else:
        sys.meta_path.insert(0, _WaitForTorch(_session.begin))
    return _session


def stand_aside() -> None:
    """Somebody else (the pytest plugin) switches the guard on and off in this process, whatever the environment says.

    (Called by torchguard.)
    """
    global _session, _aside
    _aside = True
    if _session is not None and _session.origin == "environment":
        _session.abandon()
        _session = None


def on_the_command_line() -> bool:
    """Whether this process was started by ``python -m torchguard``."""
    return _session is not None and _session.origin == "command line"


def _surroundings() -> tuple[list[Layer], list[str]]:
    environment, wrong = _config.of_environment(os.environ)
    project, more = _config.of_project()
    return [*environment, *project], [*wrong, *more]


class _WaitForTorch(importlib.abc.MetaPathFinder):
    """Calls back when torch has been imported: its entry point may be missing, or switched off."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        """The spec that Python finds, its loader made to call back."""
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            del loader.exec_module  # what is in the way of the loader's own method
            execute(module)
            self.callback()

        loader.exec_module = exec_module
        return spec


# ---- the main process and its children -----------------------------------------------------------------------


def _parent() -> dict[str, Any] | None:
    """What the main process has left in the environment; None if this is the main process."""
    try:
        parent = json.loads(os.environ[_PARENT])
        found = isinstance(parent, dict) and parent["pid"] != os.getpid() and isinstance(parent["mail"], str)
    except (KeyError, ValueError):
        return None
    return parent if found else None


def _inherited_config() -> Config | None:
    """The main process's configuration, if this child is asked for the same."""
    parent = _parent()
    try:
        if parent is None or parent["asked"] != [os.environ.get(name) for name in _ASKED]:
            return None
        config = parent["config"]
        if isinstance(config["suppressions"], list):
            config["suppressions"] = tuple(config["suppressions"])
        return Config(**config)
    except (KeyError, TypeError):
        return None


class Session:
    """One configuration, from switching on to the end of the process.

    Attributes:
        origin: who asked for it.
        config: what was asked for.
        layers: what the command line said.
        guard: the guard that is on; None while none is.
        status: exit status of the program, if whoever runs it knows.
    """

    def __init__(self, origin: Origin, config: Config, layers: Sequence[Layer] = ()) -> None:
        self.origin: Origin = origin
        self.config = config
        self.layers = list(layers)
        self.guard: Guard | None = None
        self.status: int | None = None
        self._progress: _progress.Progress | None = None
        self._began = False
        self._beginning = False
        self._asked_to_exit: Any = None
        self._sites: dict[Any, list[Any]] = {}
        self._report: ReportWriter | None = None
        self._lock = threading.RLock()
        self._concluded_in = self._finished_in = 0
        self._reported = 0
        self._elsewhere = False  # whether child processes wrote reports
        parent = _parent() if origin == "environment" else None
        self._child = parent is not None
        name = f"torchguard-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
        self._mail: str = parent["mail"] if parent is not None else os.path.join(tempfile.gettempdir(), name)
        self._suppressions = _suppressions.Suppressions()
        self._read_suppressions()
        if origin != "arguments" and not self._child:
            self._tell_children()
        atexit.register(self.finish)
        _sessions_here.append(self)

    def _read_suppressions(self) -> None:
        self._suppressions, problems = _suppressions.read(self.config.suppressions, "suppressions")
        if not self._child:
            for problem in problems:
                say(problem)

    def _tell_children(self) -> None:
        os.environ["TORCHGUARD"] = self.config.mode
        asked = [os.environ.get(name) for name in _ASKED]
        told = {"pid": os.getpid(), "mail": self._mail, "asked": asked, "config": dataclasses.asdict(self.config)}
        os.environ[_PARENT] = json.dumps(told)

    # ---- on and off

    def begin(self, guard_is_ready: bool = False) -> None:
        """Switch the guard on; says so in one line if that cannot be."""
        if self.config.mode == "off" or self.guard is not None or self._concluded_in == os.getpid():
            return
        module = sys.modules.get("torchguard.guard")
        if not guard_is_ready and module is not None and getattr(module.__spec__, "_initializing", False):
            # Somebody imports the guard, the guard imports torch, and torch calls here.
            _policy.waiting.append(functools.partial(self.begin, guard_is_ready=True))
            return
        try:
            from torchguard.guard import Guard

            if self.guard is not None or self._beginning:
                return  # switched on by the import of torch that this import led to
            self._beginning = True
            guard = Guard(**self.config.guard_keywords(), suppressions=self._suppressions)
            guard.listener = self._hear
            guard.max_reports = self.config.max_reports
            self._open_report()
            guard.enter_everywhere()
            self.guard = guard
            self._began = True
            _cover_other_threads(guard)
            self._finish_with_multiprocessing()
            if not self._child:
                self._progress = _progress.begin(guard, self.config.progress, say)
        except Exception as error:
            say(f"could not be switched on: {type(error).__name__}: {error}")
        finally:
            self._beginning = False

    def pause(self) -> None:
        """Switch the guard off."""
        guard, self.guard = self.guard, None
        progress, self._progress = self._progress, None
        if progress is not None:
            progress.end()
        if guard is not None:
            guard.leave()
            if self._report is not None:
                for what in guard.unwatched:
                    self._report.note_unwatched(what)

    def change(self, config: Config) -> None:
        """Go on under another configuration."""
        self.pause()
        if config.report != self.config.report:
            self._close_report()
        if config.suppressions != self.config.suppressions:
            self.config = config
            self._read_suppressions()
        self.config = config

    def abandon(self) -> None:
        """Switch off and say nothing at the end."""
        self.pause()
        self._close_report()
        self._forget()

    def _forget(self) -> None:
        atexit.unregister(self.finish)
        if self in _sessions_here:
            _sessions_here.remove(self)

    # ---- while it lasts

    def _hear(self, violation: Violation, new: bool) -> None:
        """Take a violation down; what cannot be written down must not hurt the program."""
        try:
            with self._lock:
                if self._report is not None:
                    self._add_to_report(violation)
                key = (violation.site, violation.allowed)
                entry = self._sites.get(key)
                if entry is not None:
                    entry[1] += 1
                    return
                self._sites[key] = [violation, 1]
                if violation.allowed is None and self.origin != "command line":
                    self._watch_exit()
                if self._child:
                    self._post(violation)
        except Exception as error:
            say(f"a violation could not be written down: {type(error).__name__}: {error}")

    def _all(self) -> list[Violation]:
        with self._lock:
            return [dataclasses.replace(violation, times=times) for violation, times in self._sites.values()]

    def _open_report(self) -> None:
        """Open the report that is asked for, if it is not open; what was found before is in it, too."""
        if self.config.report is None or self._report is not None:
            return
        try:
            from torchguard._report import open_report

            self._report = open_report(self.config.report, say)
        except Exception as error:  # the program is to run all the same
            say(str(error))
        for violation in self._all():
            self._add_to_report(violation)

    def _add_to_report(self, violation: Violation) -> None:
        if self._report is not None:
            self._report.add(violation, suppressed=_suppressions.gave(violation.allowed))

    def _close_report(self) -> None:
        report, self._report = self._report, None
        if report is not None:
            report.close()

    def _watch_exit(self) -> None:
        """From the first violation on: nothing else tells ``sys.exit(1)`` from success."""
        original = sys.exit
        if self._child or not self.config.exitcode or getattr(original, "_torchguard", False):
            return

        @functools.wraps(original)
        def watched_exit(status: Any = None, /) -> Any:
            if threading.current_thread() is threading.main_thread():
                self._asked_to_exit = status
            original(status)

        watched_exit._torchguard = True  # type: ignore[attr-defined]
        sys.exit = watched_exit

    # ---- children

    def forked(self) -> None:
        """This process has been forked off: what was found so far is the parent's to tell."""
        self._lock = threading.RLock()
        self._sites = {}
        self._child = True
        self._progress = None
        if self.guard is not None:
            from torchguard._findings import Findings

            self.guard.findings = Findings(watching=self.guard.depth == "watch")

    def _finish_with_multiprocessing(self) -> None:
        """A process that multiprocessing has forked ends without ``atexit``."""
        util = sys.modules.get("multiprocessing.util")
        if util is None:
            return

        def finish_at_exit(session: Session) -> None:
            util.Finalize(None, session.finish, exitpriority=-1000)

        util.register_after_fork(self, finish_at_exit)
        if sys.modules["multiprocessing.process"].parent_process() is not None:
            finish_at_exit(self)

    def _post(self, violation: Violation) -> None:
        if violation.allowed is None:
            reported = self._report is not None and bool(self._report.path)
            self._mail_to_parent({"line": f"{_line_of(violation)}  ({_name_of_process()})", "reported": reported})
        else:
            self._mail_to_parent({"used": sorted(self._suppressions.used)})

    def _mail_to_parent(self, letter: dict[str, Any]) -> None:
        descriptor = os.open(self._mail, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, (json.dumps(letter) + "\n").encode())
        finally:
            os.close(descriptor)

    def _collect_mail(self) -> list[str]:
        """What child processes reported, a line each; suppressions that they used are used."""
        lines = []
        with contextlib.suppress(OSError):
            with open(self._mail, encoding="utf-8") as file:
                letters = [json.loads(line) for line in file]
            os.unlink(self._mail)
            for letter in letters:
                self._suppressions.used.update(letter.get("used", ()))
                self._elsewhere = self._elsewhere or bool(letter.get("reported"))
                if "line" in letter:
                    lines.append(letter["line"])
        return lines

    # ---- the end

    def finish(self) -> None:
        """The process ends: conclude, and set the exit status; once a process."""
        self.conclude()
        if self._finished_in == os.getpid():
            return
        self._finished_in = os.getpid()
        if not self._child and self._reported and self.config.exitcode and self._succeeded():
            _exit_with(self.config.exitcode)

    def conclude(self) -> None:
        """Leave the guard, write the report, sum up; once a process."""
        if self._concluded_in == os.getpid():
            return
        self._concluded_in = os.getpid()
        try:
            self.pause()
            if self._report is not None:
                self._report.close()
            if self._child:
                return
            told = self._collect_mail()
            mine = [violation for violation in self._all() if violation.allowed is None]
            self._reported = len(mine) + len(told)
            self._sum_up(mine, told)
        except Exception as error:
            say(f"could not sum up: {type(error).__name__}: {error}")
        finally:
            if not (self._reported and self.config.exitcode):
                self._forget()

    def _sum_up(self, mine: list[Violation], told: list[str]) -> None:
        if self.origin != "arguments" and self.config.mode != "off":
            count = len(mine) + len(told)
            if count or self.origin == "command line":
                never = "" if self._began else " (the program did not import torch)"
                say(f"{self.config.mode}: {count or 'no'} {'violation' if count == 1 else 'violations'}{never}")
            lines = [_line_of(violation) for violation in mine] + told
            most = self.config.max_reports
            for line in lines[:most]:
                _print(f"  {line}")
            if most is not None and len(lines) > most:
                _print(f"  and {len(lines) - most} more (max_reports={most})")
            if count and self._report is not None and os.path.exists(self._report.path):
                _print(f"  report: {self._report.path}")
                if self._elsewhere:
                    stem, suffix = os.path.splitext(self._report.path)
                    others = "and those of other processes beside it, to make one of them"
                    _print(f"          {others}: torchguard merge {stem}*{suffix} -o OUT.html")
        if self._began:
            for suppression in self._suppressions.stale():
                say(f"{suppression.source} matches nothing any more, take it out: {suppression.text}")

    def _succeeded(self) -> bool:
        if self.status is not None:
            return self.status == 0
        if self._asked_to_exit is not None:
            return status_of(self._asked_to_exit) == 0
        return getattr(sys, "last_type", None) is None  # set where an exception ended the program


def status_of(code: object) -> int:
    """The exit status of a process that ends by ``SystemExit(code)``."""
    return 0 if code is None else code & 0xFF if isinstance(code, int) else 1


def _line_of(violation: Violation) -> str:
    place = violation.written or violation.read
    where = f"{place}  {place.source}  " if place is not None else ""
    times = f"  ({violation.times} times)" if violation.times > 1 else ""
    return f"{where}{str(violation).splitlines()[0]}{times}"


def _name_of_process() -> str:
    rank = os.environ.get("RANK")
    return f"rank {rank}, pid {os.getpid()}" if rank else f"pid {os.getpid()}"


def _print(line: str) -> None:
    with contextlib.suppress(Exception):
        sys.stderr.write(line + "\n")


#: Sessions that a child process forked off from here has to take over.
_sessions_here: list[Session] = []


def _in_forked_child() -> None:
    for session in _sessions_here:
        session.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)


def _cover_other_threads(guard: Guard) -> None:
    """Save hooks are a thread's own: threads that run already have to be reached, or told of."""
    if guard.depth == "watch":
        return  # what it patches, it patches for all of them
    others = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    if threading.main_thread() in others and _call_in_main_thread(guard):
        others.remove(threading.main_thread())
    if others:
        names = ", ".join(sorted({thread.name for thread in others}))
        guard.note_unwatched(f"tensors saved by threads that ran already when the guard was switched on: {names}")


_pending: list[Any] = []


def _call_in_main_thread(guard: Guard) -> bool:
    """Have the main thread covered as soon as it runs Python code."""

    def cover(_: Any) -> int:
        with contextlib.suppress(Exception):
            if guard in _policy.process_wide:
                guard.cover_this_thread()
        return 0

    if not hasattr(ctypes, "pythonapi"):  # not CPython
        return False
    call = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(cover)
    _pending.append(call)  # it must outlive the call
    return bool(ctypes.pythonapi.Py_AddPendingCall(call, None) == 0)


def _exit_with(status: int) -> None:
    """End the process with ``status`` once everything else, down to the last destructor, has been torn down.

    ``os._exit`` would lose what is still in buffers. glibc's ``exit`` may be called again by what runs at exit: it goes
    on with the rest and ends with the new status. Elsewhere ``_exit`` comes last, after C's buffers are flushed.
    """
    try:
        libc = ctypes.CDLL(None)
        register = libc.__cxa_atexit
        end, flush = (libc.exit, None) if platform.libc_ver()[0] == "glibc" else (libc._exit, libc.fflush)
    except (OSError, AttributeError, TypeError):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(status)
    register.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    register(ctypes.cast(end, ctypes.c_void_p), status, None)
    if flush is not None:
        register(ctypes.cast(flush, ctypes.c_void_p), None, None)  # registered later, runs earlier
