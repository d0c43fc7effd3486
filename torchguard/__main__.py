"""How does ``python -m torchguard SCRIPT`` run a program under the guard, as Python would run it?"""

from __future__ import annotations

import argparse
import builtins
import importlib
import importlib.machinery
import importlib.metadata
import io
import os
import pkgutil
import platform
import re
import runpy
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torchguard
from torchguard import _config, _suppressions, _switch, _tracebacks
from torchguard._config import Layer

#: What ``torchguard WORD`` does, where the word is not a program: the module with its ``main``. (A script of that name
#: is run by ``torchguard ./WORD``.)
_COMMANDS = {"demo": "torchguard._demo", "merge": "torchguard._report._merging"}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and which option was meant."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            options = [*map(_as_written, _config.OPTIONS), "--version", "--help"]
            name = unknown.split()[0].partition("=")[0]
            message = f"unknown option {name!r}{_config.nearest(name, options)}"
        flag = re.fullmatch(r"argument (\S+): ignored explicit argument (.*)", message)
        if flag is not None:
            option = flag[1].removeprefix("--").replace("-", "_")
            message = f"{flag[1]} takes no value, and not {flag[2]}; values are for TORCHGUARD_OPTIONS={option}=VALUE"
        _switch.say(message)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="torchguard",
        usage="\n       ".join(
            (
                "%(prog)s [options] SCRIPT [ARGS ...]",
                "%(prog)s [options] -m MODULE [ARGS ...]",
                "%(prog)s merge FILES ... -o OUT",
                "%(prog)s demo",
            )
        ),
        description="Run a program under the guard, as Python would run it.",
        epilog=f"Exit status: the program's own; {_config.EXIT_STATUS} (or --exitcode) if it succeeded although "
        "violations were reported. What is not given here comes from TORCHGUARD, TORCHGUARD_OPTIONS and "
        "[tool.torchguard] in pyproject.toml, in that order.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--mode", metavar="MODE", help=f"one of off, {', '.join(_config.MODES)}; strict if nothing else says"
    )
    parser.add_argument("--at", metavar="MOMENT", help=f"when to judge: {', '.join(_config.MOMENTS)}")
    parser.add_argument("--every-call", action="store_true", default=None, help="also see calls that no patch sees")
    parser.add_argument(
        "--report", metavar="FILE", help=f"write the violations there; ends in {', '.join(_config.REPORTS)}"
    )
    parser.add_argument("--exitcode", metavar="N", help="exit status if only violations went wrong; 0 leaves it alone")
    parser.add_argument(
        "--suppressions", metavar="FILE", help="violations to live with, GLOB[:LINE|:FUNCTION] [KIND] -- REASON"
    )
    parser.add_argument("--max-reports", metavar="N", help="how many sites to warn of and to list at the end")
    parser.add_argument(
        "--progress", action="store_true", default=None, help="say now and then how far it is, if there is a terminal"
    )
    parser.add_argument("--version", action="store_true", help="say which torchguard this is, and with which torch")
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument("program", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line says; the exit status. The program's own exceptions pass through."""
    parser = _parser()
    told = vars(parser.parse_args(sys.argv[1:] if arguments is None else arguments))
    module, program = told.pop("module"), told.pop("program")
    if told.pop("version"):
        print(_versions())
        return 0
    if module is None and program and program[0] in _COMMANDS:
        status: int = importlib.import_module(_COMMANDS[program[0]]).main(program[1:])
        return status
    if not (module or program):
        parser.error("say which program to run: a script, or -m and a module")
    layers = [Layer("", {_as_written(key): value for key, value in told.items() if value is not None})]
    _, wrong = _config.resolve(layers)
    wrong += _suppressions.read(told["suppressions"], "--suppressions")[1]
    if wrong:
        _switch.say(_config.fault_of(wrong[0]))
        return 2
    environment, problems = _config.of_environment(os.environ)
    project, more = _config.of_project()
    config, rest = _config.resolve([*layers, *environment, *project], default="strict")
    for problem in (*problems, *more, *rest):
        _switch.say(problem)
    if rest and config.mode == "off":  # a mode that does not exist, in a file or a variable: nobody asked for "off"
        return 2
    if config.mode == "off" and told["report"] is not None:
        _switch.say(f"--report: nothing is written to {told['report']}: the mode is off")
    run = _module(module) if module else _script(program)
    session = _switch.arm(config, layers)
    try:
        run()
    except SystemExit as leaving:
        session.status = _switch.status_of(leaving.code)
        raise
    except BaseException:
        session.status = 1
        sys.excepthook = _without_our_frames(sys.excepthook)
        raise
    session.status = 0
    return 0


def _versions() -> str:
    """What ``--version`` says: the distribution by its name on PyPI; torch is asked for, and not imported."""
    try:
        with_torch = f"torch {importlib.metadata.version('torch')}"
    except importlib.metadata.PackageNotFoundError:
        with_torch = "no torch"
    from torchguard._fast import native

    hot_paths = "Python" if native is None else "C"
    told = f"Python {platform.python_version()}, {with_torch}; hot paths in {hot_paths}"
    return f"torchguard-autograd {torchguard.__version__} ({told})"


def _as_written(option: str) -> str:
    return "--" + option.replace("_", "-")


# ---- the program -------------------------------------------------------------------------------------------


def _script(words: list[str]) -> Callable[[], object]:
    """Ready to run ``python SCRIPT ARGS``."""
    script = words[0]
    sys.argv[:] = words
    if os.path.isdir(script) or pkgutil.get_importer(script) is not None:  # or a zip file
        program = _as_main()
        _set_path(os.path.abspath(script))
        return lambda: _run_as_python_does("__main__", alter_argv=False, keep=program)
    path = os.path.join(os.getcwd(), script)  # with its ./ and ../, as Python has it
    try:
        with io.open_code(path) as file:
            code = pkgutil.read_code(file)
        if code is None:
            with io.open_code(path) as file:
                source = file.read()
    except OSError as error:
        sys.stderr.write(f"torchguard: can't open file {path!r}: [Errno {error.errno}] {error.strerror}\n")
        sys.exit(2)
    program = _as_main(path)
    _set_path(os.path.dirname(os.path.realpath(path)))

    def run() -> None:
        exec(code or compile(source, path, "exec", dont_inherit=True), program.__dict__)

    return run


def _module(words: list[str]) -> Callable[[], object]:
    """Ready to run ``python -m MODULE ARGS``."""
    sys.argv[:] = ["-m", *words[1:]]
    program = _as_main()
    _set_path(os.getcwd())
    return lambda: _run_as_python_does(words[0], alter_argv=True, keep=program)


def _run_as_python_does(name: str, alter_argv: bool, keep: types.ModuleType) -> None:
    # What `python -m` itself calls; the public run_module() takes the module down again when its last line has run, and
    # threads, atexit functions and pickles still need it.
    runpy._run_module_as_main(name, alter_argv)  # type: ignore[attr-defined]


def _as_main(file: str | None = None) -> types.ModuleType:
    """A fresh ``__main__``, in the place of this one."""
    _kept.append(sys.modules["__main__"])
    program = types.ModuleType("__main__")
    program.__dict__.update(__builtins__=builtins, __annotations__={}, __package__=None)
    if file is not None:
        loader = importlib.machinery.SourceFileLoader("__main__", file)
        program.__dict__.update(__file__=file, __cached__=None, __loader__=loader)
    sys.modules["__main__"] = program
    return program


_kept: list[Any] = []


def _set_path(directory: str) -> None:
    """Put ``directory`` where Python has put what it found this command in."""
    if getattr(sys.flags, "safe_path", False) or sys.flags.isolated:
        return
    sys.path[0] = directory


# ---- tracebacks --------------------------------------------------------------------------------------------


def _without_our_frames(hook: Callable[..., Any]) -> Callable[..., Any]:
    """An excepthook that shows what ``hook`` would show had Python run the program itself."""

    def show(kind: type[BaseException], error: BaseException, traceback: types.TracebackType | None) -> None:
        traceback = _tracebacks.of_program(error, traceback, runner=__file__)
        sys.last_traceback = traceback
        hook(kind, error.with_traceback(traceback), traceback)

    return show


if __name__ == "__main__":
    sys.exit(main())
