"""Does ``python -m torchguard`` run a program as Python would, and say at the end what it found?"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from outside import CORRUPT, LINE, environment, python, summary

import torchguard
from torchguard import __main__ as command_line
from torchguard._fast import native

#: What a program can see of how it was started.
SELFIE = """
import os, sys
main = sys.modules["__main__"]
print(sys.argv, sys.path, __file__, __name__, __package__, __spec__ and (__spec__.name, __spec__.origin, type(__spec__.loader)), type(__loader__).__name__, __cached__, __doc__)
print(sorted(main.__dict__), main.__dict__ is globals(), __builtins__, os.getcwd())
print(sys.excepthook is sys.__excepthook__, sys.exit.__module__, sys.stdin.read(), __debug__, sys.flags)
class Local: pass
import pickle
print(pickle.loads(pickle.dumps(Local)) is Local)
"""

NEVER = "torchguard: strict: no violations (the program did not import torch)\n"


def same(arguments: list[str], cwd: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run as Python does and under the command; what the program says and its status must be the same."""
    bare = python([*flags, *arguments], cwd=cwd, **variables)
    guarded = python([*flags, "-m", "torchguard", *arguments], cwd=cwd, **variables)
    assert guarded.stdout == bare.stdout
    assert guarded.returncode == bare.returncode
    assert guarded.stderr == bare.stderr + NEVER
    return bare


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "below").mkdir()
    for name in ("program.py", "below/__main__.py", "below/other.py"):
        (tmp_path / name).write_text(SELFIE)
    (tmp_path / "link.py").symlink_to("below/other.py")
    with zipfile.ZipFile(tmp_path / "zipped.pyz", "w") as file:
        file.writestr("__main__.py", SELFIE)
    return tmp_path


@pytest.mark.parametrize(
    "arguments",
    [
        ["program.py"],
        ["./program.py", "--mode", "x", "-m", "y", "--", "demo"],
        ["below/other.py", "a"],
        ["link.py"],
        ["below", "a"],
        ["zipped.pyz", "a"],
        ["-m", "program", "--mode", "x", "-h"],
        ["-m", "below", "a"],
        ["-m", "below.other"],
    ],
    ids=" ".join,
)
def test_a_program_finds_itself_as_python_starts_it(arguments: list[str], here: Path) -> None:
    assert same(arguments, here).returncode == 0


def test_flags_of_python_are_python_s(here: Path) -> None:
    same(["program.py"], here, "-O", "-W", "error", "-u")
    same(["below/other.py"], here, "-P", "-X", "utf8") if sys.version_info >= (3, 11) else None


ENDS = {
    "value": "import sys; sys.exit(3)",
    "text": "raise SystemExit('no luck')",
    "exception": "def f():\n    raise ValueError('x')\ntry:\n    f()\nexcept ValueError as e:\n    raise KeyError('y') from e",
    "group": "raise ExceptionGroup('two', [ValueError(1), KeyError(2)])" if sys.version_info >= (3, 11) else "1/0",
    "syntax": "x = (",
    "hook": "import sys\nsys.excepthook = lambda kind, error, tb: print('mine', kind, tb.tb_lineno, error.__traceback__ is tb)\n1/0",
    "thread": "import threading\ndef f():\n    1/0\nt = threading.Thread(target=f, name='T'); t.start(); t.join()",
    "exit hook": "import atexit, sys\natexit.register(lambda: print('last', hasattr(sys, 'last_value')))\n1/0",
    "_exit": "import os, sys\nsys.stderr.write('torchguard: strict: no violations (the program did not import torch)\\n'[:0]); raise SystemExit",
}


@pytest.mark.parametrize("end", sorted(ENDS))
def test_a_program_ends_as_python_ends_it(end: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(ENDS[end])
    assert same(["program.py"], tmp_path).stdout.count("torchguard") == 0


def test_a_module_s_traceback_is_python_s(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("1/0\n")
    assert "runpy" in same(["-m", "program"], tmp_path).stderr


def test_an_interrupt_is_an_interrupt(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    assert same(["program.py"], tmp_path).returncode == -signal.SIGINT


def test_os_exit_leaves_at_once(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import os\nos._exit(9)\n")
    done = python(["-m", "torchguard", "program.py"], cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (9, "", "")


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    done = python(["-m", "torchguard", "nope.py"], cwd=tmp_path)
    assert done.returncode == 2
    assert (
        done.stderr
        == f"torchguard: can't open file {str(tmp_path / 'nope.py')!r}: [Errno 2] No such file or directory\n"
    )


@pytest.mark.parametrize("where", ["pyproject.toml", "TORCHGUARD"])
def test_a_mode_that_does_not_exist_is_not_taken_for_off(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.py").write_text("raise AssertionError('run unguarded')\n")
    (tmp_path / "pyproject.toml").write_text("[tool.torchguard]\nmode = 'strcit'\n" if where != "TORCHGUARD" else "")
    monkeypatch.chdir(tmp_path)
    if where == "TORCHGUARD":
        monkeypatch.setenv("TORCHGUARD", "strcit")
    else:
        monkeypatch.delenv("TORCHGUARD", raising=False)
    assert command_line.main(["x.py"]) == 2
    assert "'strcit' is not a mode of this version; did you mean 'strict'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--mode", "strcit", "x.py"], "--mode='strcit' is not a mode of this version; did you mean 'strict'?"),
        (["--mode", "repair,", "x.py"], "--mode='repair,' is not a mode of this version"),
        (["--exitcode", "x", "x.py"], "--exitcode='x' is not a number from 0 to 255"),
        (["--reprot", "r", "x.py"], "unknown option '--reprot'; did you mean '--report'?"),
        (["--suppressions", "nope.txt", "x.py"], "nope.txt: No such file or directory"),
        (["--mode"], "argument --mode: expected one argument"),
        (["--vesion"], "unknown option '--vesion'; did you mean '--version'? (--mode, "),
        (["--reprot=r.json", "x.py"], "unknown option '--reprot'; did you mean '--report'?"),
        (
            ["--progress=5", "x.py"],
            "--progress takes no value, and not '5'; values are for TORCHGUARD_OPTIONS=progress=VALUE",
        ),
        ([], "say which program to run"),
        (["-m"], "say which program to run"),
    ],
)
def test_what_is_wrong_with_the_command_line_is_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: object = command_line.main(arguments)
    except SystemExit as leaving:
        status = leaving.code
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith(f"torchguard: {told}")
    assert error.count("\n") == 1


def test_a_report_that_cannot_be_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "reports").mkdir()
    (tmp_path / "x.py").write_text("raise AssertionError('run')\n")
    monkeypatch.chdir(tmp_path)
    assert command_line.main(["--report", "reports", "x.py"]) == 2
    assert capsys.readouterr().err == (
        "torchguard: --report='reports' is a directory; name a file in it, 'reports/report.html' say\n"
    )


def test_a_report_that_nothing_is_switched_on_for_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("print('run')\n")
    told = "torchguard: --report: nothing is written to r.json: the mode is off\n"
    done = python(["-m", "torchguard", "--report", "r.json", "x.py"], cwd=tmp_path, TORCHGUARD="off")
    assert (done.returncode, done.stdout, done.stderr) == (0, "run\n", told)
    done = python(["-m", "torchguard", "x.py"], cwd=tmp_path, TORCHGUARD="off", TORCHGUARD_OPTIONS="report=r.json")
    assert (done.returncode, done.stdout, done.stderr) == (0, "run\n", "")


def test_version_names_the_distribution_and_the_torch_that_it_runs_with(tmp_path: Path) -> None:
    import torch

    part = "C" if native is not None else "Python"
    with_torch = f"(Python {platform.python_version()}, torch {torch.__version__}; hot paths in {part})"
    done = python(["-X", "importtime", "-m", "torchguard", "--version"], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"torchguard-autograd {torchguard.__version__} {with_torch}\n")
    assert not re.search(r"\| +torch$", done.stderr, re.M), "torch is not imported for it"


def test_version_where_there_is_no_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def not_there(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", not_there)
    assert command_line.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(
        f"torchguard-autograd {torchguard.__version__} (Python {platform.python_version()}, no torch; "
    )


def test_the_version_is_that_of_the_distribution() -> None:
    text = (Path(torchguard.__file__).parent.parent / "pyproject.toml").read_text()
    assert f'\nname = "torchguard-autograd"\nversion = "{torchguard.__version__}"\n' in text


def test_a_program_s_own_version_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("import sys\nprint(sys.argv)\n")
    assert python(["-m", "torchguard", "x.py", "--version"], cwd=tmp_path).stdout == "['x.py', '--version']\n"


def test_help_names_every_option_and_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        command_line.main(["--help"])
    assert leaving.value.code == 0
    told = " ".join(capsys.readouterr().out.split())
    for option in ("--mode", "--at", "--every-call", "--report", "--exitcode", "--suppressions", "--max-reports", "66"):
        assert option in told


# ---- with torch --------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        (tmp_path / "train.py").write_text(CORRUPT + text)
        return tmp_path

    return write


def test_strict_shows_the_program_s_own_frames(script: Callable[[str], Path]) -> None:
    done = python(["-m", "torchguard", "train.py"], cwd=script("corrupt()\n"))
    assert done.returncode == 1
    shown = [line for line in done.stderr.splitlines() if line.startswith("  File ")]
    assert [line.rpartition(", ")[2] for line in shown] == ["in <module>", "in corrupt"]
    assert summary(done) == ["torchguard: strict: 1 violation", f"  train.py:8  {LINE}"]


def test_pytorch_s_own_error_is_shown_as_without_the_guard(script: Callable[[str], Path]) -> None:
    text = "a = torch.ones(3, requires_grad=True)\nb = a.exp()\nb.detach().zero_()\nb.sum().backward()\n"
    directory = script(text)
    bare, guarded = python(["train.py"], cwd=directory), python(["-m", "torchguard", "train.py"], cwd=directory)
    assert (bare.returncode, guarded.returncode) == (1, 1)
    assert guarded.stderr == bare.stderr + "torchguard: strict: no violations\n"


@pytest.mark.parametrize(("end", "status"), [("", 66), ("import sys; sys.exit(3)\n", 3)])
def test_the_status_says_whether_violations_were_reported(end: str, status: int, script: Callable[[str], Path]) -> None:
    directory = script(f"file = open('late.txt', 'w'); file.write('x')\nprint(corrupt())\n{end}")
    arguments = ["-m", "torchguard", "--mode=warn", "--report", "r.txt", "train.py"]
    done = python(arguments, cwd=directory, TORCHGUARD="strict", TORCHGUARD_OPTIONS="exitcode=66:report=no.txt")
    assert done.returncode == status
    assert done.stdout == "tensor([0., 0., 0.])\n"
    assert (directory / "late.txt").read_text() == "x"
    assert "c.zero_()" in (directory / "r.txt").read_text()
    assert not (directory / "no.txt").exists()


def test_the_environment_beats_pyproject_and_the_command_line_both(script: Callable[[str], Path]) -> None:
    directory = script("corrupt()\nraise SystemExit(None)\n")
    (directory / "pyproject.toml").write_text("[tool.torchguard]\nmode = 'warn'\nexitcode = 5\nmax_reports = 0\n")
    done = python(["-m", "torchguard", "train.py"], cwd=directory)
    assert done.returncode == 5
    assert done.stderr == "torchguard: warn: 1 violation\n  and 1 more (max_reports=0)\n"
    done = python(["-m", "torchguard", "--exitcode", "7", "train.py"], cwd=directory, TORCHGUARD_OPTIONS="exitcode=6")
    assert done.returncode == 7
    done = python(["-m", "torchguard", "train.py"], cwd=directory, TORCHGUARD="off")
    assert (done.returncode, done.stderr) == (0, "")


def test_without_the_entry_point_the_command_guards_all_the_same(script: Callable[[str], Path]) -> None:
    directory = script(
        "import torch.utils\nprint(type(torch.__spec__.loader).__name__, 'exec_module' in vars(torch.__loader__))\ncorrupt()\n"
    )
    arguments = ["-m", "torchguard", "--mode", "warn", "train.py"]
    done = python(arguments, cwd=directory, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert (done.returncode, done.stdout) == (66, "SourceFileLoader False\n")


def test_a_program_may_set_torch_s_variables_before_it_imports_torch(script: Callable[[str], Path]) -> None:
    directory = script("")
    (directory / "train.py").write_text(
        "import sys\nprint([name for name in ('torch', 'wrapt') if name in sys.modules])\n"
    )
    done = python(["-m", "torchguard", "train.py"], cwd=directory)
    assert done.stdout == "[]\n"


def test_child_processes_of_the_command_are_guarded(script: Callable[[str], Path]) -> None:
    directory = script(
        "if __name__ == '__main__':\n"
        "    import torch.multiprocessing\n"
        "    torch.multiprocessing.spawn(corrupt, nprocs=1)\n"
    )
    done = python(["-m", "torchguard", "--mode", "warn", "train.py"], cwd=directory)
    assert done.returncode == 66, done.stderr
    assert summary(done)[0] == "torchguard: warn: 1 violation"
    assert "(pid " in summary(done)[1]


def test_pytest_under_the_command(script: Callable[[str], Path]) -> None:
    directory = script("")
    (directory / "train.py").rename(directory / "test_it.py")
    (directory / "test_it.py").write_text(CORRUPT + "\ndef test_it():\n    corrupt()\n")
    arguments = ["-m", "torchguard", "--mode=warn", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = python(arguments, cwd=directory)
    assert done.returncode == 66, done.stdout + done.stderr
    assert summary(done)[0] == "torchguard: warn: 1 violation"


def test_the_demo(tmp_path: Path) -> None:
    done = python(["-c", "import sys; from torchguard.__main__ import main; sys.exit(main())", "demo"], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "a.grad is      [0.0, 0.0, 0.0]\na.grad should be [0.1966, 0.105, 0.0452]" in done.stdout
    assert "SavedTensorCorruptionError: zero_() through .data would corrupt" in done.stdout
    assert "written   demo.py:6" in done.stdout
    assert command_line.main(["demo", "x"]) == 2
    program = done.stdout.partition("---")[0].strip().splitlines()
    assert len(program) <= 10


def test_the_variable_of_the_tests_is_not_theirs() -> None:
    assert "TORCHGUARD" not in environment()
    assert environment(TORCHGUARD="x")["TORCHGUARD"] == "x"
    assert os.pathsep in environment()["PYTHONPATH"]
