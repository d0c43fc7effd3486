"""Is a program guarded whole when it is switched on from outside it, in every thread and child process?"""

from __future__ import annotations

import importlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from outside import CORRUPT, LINE, ROOT, entry_points, environment, python, reported, sources, summary

import torchguard
from torchguard import _config, _policy, _switch


@pytest.fixture(autouse=True)
def no_threads_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler's tests, say, have left running is not to be told of in the reports of these."""
    left = set(threading.enumerate()) - {threading.main_thread(), threading.current_thread()}
    all_threads = threading.enumerate
    monkeypatch.setattr(threading, "enumerate", lambda: [thread for thread in all_threads() if thread not in left])


def corrupt() -> torch.Tensor | None:
    a = torch.ones(3, requires_grad=True)
    out = a.sigmoid()
    out.data.zero_()
    out.sum().backward()
    return a.grad


def is_refused() -> bool:
    try:
        corrupt()
    except torchguard.SavedTensorCorruptionError:
        return True
    return False


def in_thread(function: Callable[[], object]) -> object:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


@pytest.fixture(autouse=True)
def off(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("TORCHGUARD", "TORCHGUARD_OPTIONS", "TORCHGUARD_PARENT"):
        monkeypatch.delenv(name, raising=False)
    yield
    torchguard.disable()


# ---- enable() and disable() --------------------------------------------------------------------------------


def test_enable_is_on_until_disable_in_every_thread() -> None:
    assert not is_refused()
    guard = torchguard.enable("strict")
    assert is_refused()
    assert in_thread(is_refused)
    assert len(guard.violations) == 1
    torchguard.disable()
    assert not is_refused()
    assert not in_thread(is_refused)
    torchguard.disable()  # once more is no mistake


def test_a_thread_that_an_unguarded_thread_starts_is_guarded() -> None:
    go, done = threading.Event(), []

    def old() -> None:
        go.wait()
        done.append(in_thread(is_refused))

    thread = threading.Thread(target=old)
    thread.start()
    guard = torchguard.enable()
    go.set()
    thread.join()
    assert done == [True]
    assert any("ran already" in what and thread.name in what for what in guard.unwatched)


def test_enable_in_a_thread_covers_the_main_thread_too() -> None:
    thread = threading.Thread(target=torchguard.enable)
    thread.start()
    thread.join()
    assert is_refused()
    torchguard.disable()
    assert not is_refused()


def test_a_thread_outlives_disable_and_finds_the_next_one() -> None:
    step, back = threading.Semaphore(0), threading.Semaphore(0)
    seen: list[bool] = []

    def work() -> None:
        for _ in range(3):
            step.acquire()
            seen.append(is_refused())
            back.release()

    torchguard.enable()
    thread = threading.Thread(target=work)
    thread.start()
    for switch in (lambda: None, torchguard.disable, torchguard.enable):
        switch()
        step.release()
        back.acquire()
    thread.join()
    assert seen == [True, False, True]


def test_enable_again_replaces_what_is_on() -> None:
    first = torchguard.enable("strict")
    second = torchguard.enable("warn")
    with pytest.warns(torchguard.SavedTensorCorruptionWarning):
        corrupt()
    assert first.violations == []
    assert len(second.violations) == 1
    assert _policy.process_wide == [second]


def test_a_block_within_answers_for_itself() -> None:
    outer = torchguard.enable("warn")
    with torchguard.strict() as inner:
        assert is_refused()
    assert (len(outer.violations), len(inner.violations)) == (0, 1)
    assert outer is _policy.innermost()


def test_enable_within_a_block_leaves_the_block_in_charge() -> None:
    with torchguard.strict():
        torchguard.enable("warn")
        assert is_refused()
    with pytest.warns(torchguard.SavedTensorCorruptionWarning):
        corrupt()
    with torchguard.strict():
        torchguard.disable()
        assert is_refused()
    assert not is_refused()


def test_enable_within_the_programs_own_hooks_does_not_take_their_place() -> None:
    packed = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        torchguard.enable()
        torch.ones(3, requires_grad=True).sigmoid()
    assert len(packed) == 1
    torch.ones(3, requires_grad=True).sigmoid()
    assert len(packed) == 1
    assert is_refused()


def test_enable_within_a_transform_of_torch_func() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        torchguard.enable()
        return x.sigmoid().sum()

    assert torch.func.grad(function)(torch.ones(3)).shape == (3,)
    assert is_refused()


def test_max_reports_bounds_the_warnings_and_not_what_is_kept() -> None:
    guard = torchguard.enable("warn", max_reports=1)
    with pytest.warns(torchguard.SavedTensorCorruptionWarning) as caught:
        corrupt()
        a = torch.ones(3, requires_grad=True)
        out = a.sigmoid()
        out.data.mul_(2)
    assert len(caught) == 1
    assert len(guard.violations) == 2


def test_a_report_is_there_when_it_happens_and_counts_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.jsonl"
    torchguard.enable("warn", report=path)
    with pytest.warns(torchguard.SavedTensorCorruptionWarning):
        corrupt()
    assert [record["times"] for record in reported(path)] == [1]
    corrupt()
    torchguard.disable()
    assert sources(path) == ["out.data.zero_()"]
    *_, hits, process = map(json.loads, path.read_text().splitlines())
    assert (hits["record"], hits["times"]) == ("hits", 2)
    assert process["about"]["ended"]


def test_each_report_has_what_was_found_while_it_was_asked_for(tmp_path: Path) -> None:
    torchguard.enable("warn", report=tmp_path / "a.jsonl")
    with pytest.warns(torchguard.SavedTensorCorruptionWarning):
        corrupt()
    torchguard.enable("strict", report=tmp_path / "a.jsonl")
    assert is_refused()
    torchguard.enable("strict", report=tmp_path / "b.html")
    assert is_refused()
    assert not (tmp_path / "b.html").exists()
    torchguard.disable()
    assert len(sources(tmp_path / "a.jsonl")) == 1
    assert "3 hits" in (tmp_path / "b.html").read_text()
    assert "TORCHGUARD_REPORT_TAKEN" not in os.environ


def test_reports_carry_who_allowed_what_and_what_is_not_watched(tmp_path: Path) -> None:
    suppressions = ["test_switch.py:corrupt -- meant"]
    guard = torchguard.enable("strict", report=tmp_path / "r.sarif", suppressions=suppressions)
    guard.note_unwatched(next(iter(guard.unwatched), "nothing"))
    assert not is_refused()
    with torchguard.allow("put back"):
        a = torch.ones(3, requires_grad=True).exp()
        a.data.zero_()
    torchguard.disable()
    (run,) = json.loads((tmp_path / "r.sarif").read_text())["runs"]
    assert sorted(
        (one["kind"], one["justification"]) for result in run["results"] for one in result["suppressions"]
    ) == [
        ("external", "meant (suppressed by suppressions:1)"),
        ("inSource", "put back"),
    ]


def test_a_report_as_text(tmp_path: Path) -> None:
    torchguard.enable("warn", report=tmp_path / "r.txt", suppressions=["test_switch.py:corrupt -- meant"])
    corrupt()
    torchguard.disable()
    text = (tmp_path / "r.txt").read_text()
    assert "zero_() through .data would corrupt" in text
    assert "suppressed: meant (suppressed by suppressions:1)" in text
    torchguard.enable(report=tmp_path / "r.txt")
    torchguard.disable()
    assert (tmp_path / "r.txt").read_text() == "torchguard: no violations in 1 process\n"


@pytest.mark.parametrize("name", ["file/r.txt", "r.html"])
def test_a_report_that_cannot_be_written_is_told_and_nothing_else(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "r.html.jsonl").mkdir()  # where its journal would be
    torchguard.enable("warn", report=tmp_path / name)
    with pytest.warns(torchguard.SavedTensorCorruptionWarning):
        corrupt()
    torchguard.disable()
    told = capsys.readouterr().err
    assert told.startswith(f"torchguard: the report cannot be written to {tmp_path / name}: ")
    assert told.count("\n") == 1


def test_a_stale_suppression_is_told_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    torchguard.enable(suppressions=["test_switch.py:corrupt -- meant", "gone.py -- old"])
    assert not is_refused()
    torchguard.disable()
    assert capsys.readouterr().err == (
        "torchguard: suppressions:2 matches nothing any more, take it out: gone.py -- old\n"
    )


def test_arguments_beat_the_environment_and_what_they_leave_open_is_taken_from_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHGUARD", "off")
    monkeypatch.setenv("TORCHGUARD_OPTIONS", f"suppressions={tmp_path / 's'}:every_call=1:reprot=x")
    (tmp_path / "s").write_text("test_switch.py:corrupt -- meant\n")
    guard = torchguard.enable("strict", every_call=False)
    assert guard.every_call is False
    assert not is_refused()
    assert guard.allowed
    assert "unknown option 'reprot'; did you mean 'report'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            {"mode": "strcit"},
            "torchguard: enable(): mode='strcit' is not a mode of this version; did you mean 'strict'?",
        ),
        (
            {"mode": "off"},
            "enable() takes one of strict, warn, repair, audit, watch; to switch off, use torchguard.disable()",
        ),
        (
            {"mode": None},
            "enable() takes one of strict, warn, repair, audit, watch; to switch off, use torchguard.disable()",
        ),
        ({"exitcode": 300}, "exitcode=300 is not a number from 0 to 255"),
        ({"report": "/"}, "enable(): report='/' is a directory; name a file in it, '/report.html' say"),
        (
            {"report": "r.htlm"},
            "report='r.htlm' does not say by its ending what kind of report to write; did you mean '.html'?",
        ),
        (
            {"suppressions": ["x.py"]},
            "suppressions:1: 'x.py' has no reason; write GLOB[:LINE|:FUNCTION] [KIND] -- REASON",
        ),
        ({"suppressions": "/nowhere"}, "torchguard: /nowhere: No such file or directory"),
    ],
)
def test_an_argument_that_cannot_be_used_is_an_error(arguments: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        torchguard.enable(**arguments)  # type: ignore[arg-type]
    assert not is_refused()


# ---- the environment variable ------------------------------------------------------------------------------


def test_the_entry_points_lead_where_they_should() -> None:
    for _, name, target in entry_points():
        assert name == "torchguard"
        module, _, attribute = target.partition(":")
        found = importlib.import_module(module)
        assert not attribute or callable(getattr(found, attribute))
    assert {group for group, _, _ in entry_points()} == {"torch.backends", "pytest11", "console_scripts"}


def test_without_the_variable_importing_torch_touches_nothing_of_ours() -> None:
    told = "import sys, torch; print([m for m in sys.modules if 'torchguard' in m or m == 'wrapt'])"
    done = python(["-c", told], TORCHGUARD="", TORCHGUARD_OPTIONS="report=x")
    assert (done.stdout, done.stderr) == ("['_torchguard_autostart']\n", "")
    done = python(["-c", "import sys, torchguard; print([m for m in sys.modules if m in ('torch', 'wrapt')])"])
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Path]:
    def write(text: str, name: str = "train.py") -> Path:
        path = tmp_path / name
        path.write_text(CORRUPT + text)
        return path

    return write


def test_strict_refuses_at_the_line_and_the_program_fails_as_it_would(script: Callable[..., Path]) -> None:
    path = script("corrupt()\n")
    done = python([path], cwd=path.parent, TORCHGUARD="strict", TORCHGUARD_OPTIONS="report=r.txt")
    assert done.returncode == 1
    assert "SavedTensorCorruptionError: zero_() through .data" in done.stderr
    assert summary(done)[:2] == ["torchguard: strict: 1 violation", f"  train.py:8  {LINE}"]
    assert "written   train.py:8" in (path.parent / "r.txt").read_text()  # although the program failed


def test_a_clean_program_says_and_exits_what_it_says_and_exits_without(script: Callable[..., Path]) -> None:
    path = script("import sys, os\nprint(clean().tolist(), os.getcwd(), sys.argv, sys.path)\n")
    bare, guarded = (python([path, "a"], cwd=path.parent, TORCHGUARD=mode) for mode in ("", "strict"))
    assert (guarded.returncode, guarded.stdout, guarded.stderr) == (bare.returncode, bare.stdout, bare.stderr)
    assert bare.stdout.startswith("[0.19")


ENDINGS = {
    "falls off its end": ("", 66),
    "sys.exit(0)": ("import sys; sys.exit(0)", 66),
    "sys.exit(3)": ("import sys; sys.exit(3)", 3),
    "sys.exit(text)": ("import sys; sys.exit('no luck')", 1),
    "an exception": ("raise KeyError('x')", 1),
    "os._exit": ("import os; os._exit(5)", 5),
}


@pytest.mark.parametrize("ending", sorted(ENDINGS))
def test_the_exit_status_is_ours_only_if_the_program_succeeded(ending: str, script: Callable[..., Path]) -> None:
    text, status = ENDINGS[ending]
    late = "\nfile = open('late.txt', 'w')\nfile.write('not flushed')\n"
    path = script(f"print(corrupt().tolist()){late}{text}\n")
    done = python([path], cwd=path.parent, TORCHGUARD="warn", TORCHGUARD_OPTIONS="report=r.jsonl")
    assert done.returncode == status, done.stderr
    assert done.stdout == "[0.0, 0.0, 0.0]\n"  # as without the guard
    assert "SavedTensorCorruptionWarning" in done.stderr
    assert sources(path.parent / "r.jsonl") == ["c.zero_()"]
    assert (path.parent / "late.txt").read_text() == ("" if "_exit" in text else "not flushed")
    assert bool(summary(done)) is ("_exit" not in text)


def test_options_exit_status_stale_suppressions_and_bounds(script: Callable[..., Path]) -> None:
    path = script("def other():\n    a = torch.ones(2, requires_grad=True); b = a.exp(); b.data.add_(1); b.sum().backward()\n"
                  "for _ in range(3): corrupt()\nother()\n\ndef meant():\n    corrupt.__globals__['other']()\nmeant()\n")  # fmt: skip
    (path.parent / "s.txt").write_text("gone.py -- old\n")
    options = "exitcode=7:max_reports=1:suppressions=s.txt:bogus=1"
    done = python([path], cwd=path.parent, TORCHGUARD="warn", TORCHGUARD_OPTIONS=options)
    assert done.returncode == 7
    assert done.stderr.count("SavedTensorCorruptionWarning") == 1
    options = ", ".join(_config.OPTIONS)
    assert [line for line in done.stderr.splitlines() if line.startswith(("torchguard", "  and", "  train"))] == [
        f"torchguard: TORCHGUARD_OPTIONS: unknown option 'bogus' ({options}); ignored",
        "torchguard: warn: 2 violations",
        f"  train.py:8  {LINE}  (3 times)",
        "  and 1 more (max_reports=1)",
        "torchguard: s.txt:1 matches nothing any more, take it out: gone.py -- old",
    ]


@pytest.mark.parametrize(("status", "expected"), [(0, 5), (3, 3)])
def test_the_exit_status_that_enable_is_given(status: int, expected: int, script: Callable[..., Path]) -> None:
    """It is not known before the program ends, though the guard is off by then."""
    path = script(
        "import sys, torchguard\n"
        "torchguard.enable('warn', exitcode=5); corrupt(); torchguard.disable()\n"
        "torchguard.enable('warn', exitcode=6); clean(); torchguard.disable()\n"
        f"print('after'); sys.exit({status})\n"
    )
    done = python([path], cwd=path.parent)
    assert (done.returncode, done.stdout) == (expected, "after\n")


@pytest.mark.parametrize(
    "variables",
    [
        {"TORCHGUARD": "strcit", "TORCHGUARD_OPTIONS": ""},
        {"TORCHGUARD": "strict", "TORCHGUARD_OPTIONS": "exitcode=x"},
    ],
)
def test_a_bad_value_is_told_and_the_program_runs(variables: dict[str, str], script: Callable[..., Path]) -> None:
    done = python([script("print(clean().shape)\n")], **variables)
    assert (done.returncode, done.stdout) == (0, "torch.Size([3])\n")
    for line in done.stderr.splitlines():
        assert line.startswith("torchguard: TORCHGUARD")
    assert done.stderr


def test_a_package_that_is_broken_does_not_break_torch(tmp_path: Path) -> None:
    """Another project's package of that name, say, with nothing of ours in it."""
    (tmp_path / "torchguard").mkdir()
    (tmp_path / "torchguard" / "__init__.py").write_text("raise RuntimeError('two\\nlines')\n")
    path = os.pathsep.join((str(tmp_path), environment()["PYTHONPATH"]))
    done = python(["-c", "import torch; print(torch.ones(1))"], PYTHONPATH=path, cwd=tmp_path, TORCHGUARD="strict")
    assert (done.returncode, done.stdout) == (0, "tensor([1.])\n")
    assert done.stderr == "torchguard: could not be switched on: RuntimeError: two lines\n"
    done = python(["-c", "import torch; print(torch.ones(1))"], PYTHONPATH=path, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "tensor([1.])\n", "")


@pytest.mark.parametrize("first", ["import torchguard; torchguard.strict", "import torchguard.guard", "import torch"])
def test_whatever_is_imported_first(first: str, tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(
        f"{first}\n{CORRUPT}\nfrom torchguard import _policy\nprint(len(_policy.process_wide))\ncorrupt()\n"
    )
    done = python([path], cwd=tmp_path, TORCHGUARD="warn", TORCHGUARD_OPTIONS="exitcode=0")
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert summary(done)[0] == "torchguard: warn: 1 violation"


def test_enable_and_disable_within_a_guarded_program(script: Callable[..., Path]) -> None:
    path = script(
        "import torchguard\n"
        "corrupt()\n"
        "torchguard.disable(); corrupt(); torchguard.enable('strict')\n"
        "try: corrupt()\n"
        "except torchguard.SavedTensorCorruptionError: print('refused')\n"
    )
    done = python([path], cwd=path.parent, TORCHGUARD="warn")
    assert (done.returncode, done.stdout) == (66, "refused\n")
    assert summary(done) == ["torchguard: strict: 1 violation", f"  train.py:8  {LINE}  (2 times)"]


def test_torch_imported_in_a_thread_covers_the_main_one(tmp_path: Path) -> None:
    path = tmp_path / "train.py"
    path.write_text(
        "import threading\n"
        "thread = threading.Thread(target=lambda: __import__('torch'))\nthread.start(); thread.join()\n"
        f"{CORRUPT}\ncorrupt()\n"
        "thread = threading.Thread(target=clean)\nthread.start(); thread.join()\n"
    )
    done = python([path], cwd=tmp_path, TORCHGUARD="warn")
    assert done.returncode == 66, done.stderr
    assert summary(done)[0] == "torchguard: warn: 1 violation"


def test_what_runs_after_the_last_line_is_guarded(script: Callable[..., Path]) -> None:
    """Threads that outlive the main one, and functions that run at exit."""
    path = script(
        "import atexit, threading, time\n"
        "def at_exit():\n    print('at exit'); corrupt()\n"
        "atexit.register(at_exit)\n"
        "def late():\n    time.sleep(0.2); b = torch.ones(2, requires_grad=True).exp(); b.data.add_(1)\n"
        "threading.Thread(target=late).start()\n"
    )
    done = python([path], cwd=path.parent, TORCHGUARD="warn")
    assert done.returncode == 66
    assert summary(done)[0] == "torchguard: warn: 2 violations"


CHILDREN = """
import os, subprocess, sys
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, Dataset

class Data(Dataset):
    def __len__(self): return 1
    def __getitem__(self, index):
        a = torch.ones(2, requires_grad=True); b = a.exp()
        b.data.fill_(7)
        return index

def forked():
    a = torch.ones(2, requires_grad=True); b = a.tanh()
    b.data.fill_(8)

if __name__ == "__main__":
    for _ in DataLoader(Data(), num_workers=1): pass
    statuses = []
    for method, target in (("fork", forked), ("spawn", corrupt)):
        child = mp.get_context(method).Process(target=target)
        child.start(); child.join(); statuses.append(child.exitcode)
    pid = os.fork()
    if not pid:
        forked()
        sys.exit(0)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os.chdir("/")
    other = os.path.join(os.path.dirname(os.path.abspath(__file__)), "other.py")
    statuses.append(subprocess.run([sys.executable, other]).returncode)
    print(statuses)
"""


def test_child_processes_are_guarded_and_the_main_one_answers_for_them(script: Callable[..., Path]) -> None:
    script("corrupt()\n", "other.py")
    path = script(CHILDREN)
    suppressions = path.parent / "s.txt"
    suppressions.write_text("other.py -- suppressed in a child only\n")
    options = "report=r.jsonl:suppressions=s.txt"
    done = python([path], cwd=path.parent, TORCHGUARD="warn", TORCHGUARD_OPTIONS=options)
    assert done.returncode == 66, done.stderr
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0]"  # as without the guard
    told = summary(done)
    assert told[0] == "torchguard: warn: 4 violations"
    for source, count in (("b.data.fill_(7)", 1), ("b.data.fill_(8)", 2), ("c.zero_()", 1)):
        assert sum(f"  {source}  " in line and "(pid " in line for line in told) == count, told
    assert not any("matches nothing" in line for line in told)
    assert reported(path.parent / "r.jsonl") == []
    reports = sorted(path.parent.glob("r.*.pid*.jsonl"))
    assert len(reports) == 5
    assert sum(record["suppressed"] is not None for report in reports for record in reported(report)) == 1
    done = python(["-m", "torchguard", "merge", "r*.jsonl", "-o", "all.json"], cwd=path.parent)
    assert done.stdout == "torchguard: all.json: 3 sites, 4 hits, in 6 processes; 1 allowed or suppressed\n", (
        done.stderr
    )
    assert done.stderr == "", "each process closed its report"
    assert not list(Path(os.environ.get("TMPDIR", "/tmp")).glob(f"torchguard-{os.getpid()}-*"))


def test_a_child_that_is_asked_for_something_else_gets_that(script: Callable[..., Path]) -> None:
    script("corrupt(); print('child done')\n", "other.py")
    path = script(
        "import os, subprocess, sys\n"
        "subprocess.run([sys.executable, 'other.py'], env={**os.environ, 'TORCHGUARD': 'off'}, check=True)\n"
        "print('done')\n"
    )
    done = python([path], cwd=path.parent, TORCHGUARD="strict")
    assert (done.returncode, done.stdout, done.stderr) == (0, "child done\ndone\n", "")


RANKS = """
import torch.distributed as dist
dist.init_process_group("gloo")
if dist.get_rank() == 1:
    corrupt()
total = torch.ones(1)
dist.all_reduce(total)
import sys
sys.stdout.write(f"sum {int(total)}\\n")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("how", ["variable", "command line"])
def test_two_ranks(how: str, script: Callable[..., Path]) -> None:
    path = script(RANKS)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    if how == "variable":
        options = "report=r.jsonl"
        done = python([*launch, path], cwd=path.parent, TORCHGUARD="warn", TORCHGUARD_OPTIONS=options)
        assert done.returncode == 66, done.stderr
        told = next(line for line in summary(done) if "c.zero_()" in line)
        assert "(rank 1, pid " in told
    else:
        guarded = ["-m", "torchguard", "--mode", "warn", "--report", "r.jsonl", "--exitcode", "0", path]
        done = python([*launch, *guarded], cwd=path.parent)
        assert done.returncode == 0, done.stderr
    assert done.stdout.count("sum 2") == 2
    reports = sorted(path.parent.glob("r.rank*.jsonl"))
    host = socket.gethostname().split(".")[0]
    assert [re.sub(r"\d+\.jsonl", "N", report.name) for report in reports] == [f"r.rank{i}.{host}.pidN" for i in (0, 1)]
    assert list(map(sources, reports)) == [[], ["c.zero_()"]]


# ---- the examples, as they are -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wgan_digits.py", "ema_digits.py", "actor_critic_digits.py"])
def test_an_example_is_refused_from_outside(name: str) -> None:
    done = python([f"examples/{name}", "--steps", "5", "--mistake"], TORCHGUARD="strict")
    assert done.returncode == 1
    assert re.search(rf"written +examples/{name}:\d+", done.stderr), done.stderr


def test_an_example_trains_the_same_to_the_last_bit() -> None:
    script = ["examples/ema_digits.py", "--steps", "10"]
    bare, guarded, by_command = (
        python(script),
        python(script, TORCHGUARD="strict"),
        python(["-m", "torchguard", *script]),
    )
    assert bare.returncode == guarded.returncode == by_command.returncode == 0
    assert "losses sha256" in bare.stdout
    assert bare.stdout == guarded.stdout == by_command.stdout
    assert guarded.stderr == ""
    assert by_command.stderr == "torchguard: strict: no violations\n"


def test_the_helpers_run_this_checkout() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import torchguard; print(torchguard.__file__)"],
        env=environment(), capture_output=True, text=True, check=True, cwd="/",
    )  # fmt: skip
    assert done.stdout.strip() == str(ROOT / "torchguard" / "__init__.py")
    assert _switch.on_the_command_line() is False
