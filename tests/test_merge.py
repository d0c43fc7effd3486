"""Do the reports of many ranks become one, and is none lost when a rank dies half-way?"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from outside import environment, python
from report_samples import SOURCE, violation, written

from torchguard._report import Report, ReportError, merge, open_report
from torchguard._report._merging import main

HERE = Path(__file__).parent
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (*RANK_VARIABLES, "TORCHGUARD_REPORT_TAKEN", "TORCHGUARD_REPORT_TAKEN_BY"):
        monkeypatch.delenv(name, raising=False)
    Path("train.py").write_text(SOURCE)
    return tmp_path


def write_as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, name: str = "r.jsonl", **options: Any) -> str:
    """The file that a rank's report of one violation is in."""
    with monkeypatch.context() as patched:
        patched.setenv("RANK", str(rank))
        patched.setenv("WORLD_SIZE", "4")
        return written(Path(name), violation(**options.pop("changes", {})), **options).path


def plain(report: Report) -> Any:
    return json.loads(json.dumps(list(report.records())))


def test_each_rank_writes_its_own_file_and_the_name_says_whose(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write_as_rank(monkeypatch, rank) for rank in range(3)]
    assert len(set(paths)) == 3
    for rank, path in enumerate(paths):
        stem, said_rank, host, pid, suffix = Path(path).name.split(".")
        assert (stem, said_rank, pid, suffix) == ("r", f"rank{rank}", f"pid{os.getpid()}", "jsonl")
        assert host


def test_a_job_of_one_process_has_the_plain_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert Path(written(Path("r.jsonl"), violation()).path).name == "r.jsonl"


def test_the_same_site_is_there_once_with_the_ranks_that_hit_it(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [write_as_rank(monkeypatch, rank, times=rank + 1) for rank in range(3)]
    paths.append(write_as_rank(monkeypatch, 3, changes={"operation": "exp_()"}))
    report = merge(paths, "all.html")
    zero, exp = report.findings
    assert (report.ranks(zero), zero.times) == ([0, 1, 2], 6)
    assert (report.ranks(exp), exp.times) == ([3], 1)
    assert "ranks 0, 1, 2" in Path("all.html").read_text()
    merge(paths, "all.sarif")
    results = json.loads(Path("all.sarif").read_text())["runs"][0]["results"]
    assert sorted(result["properties"]["ranks"] for result in results) == [[0, 1, 2], [3]]


def test_checkouts_in_different_directories_are_the_same_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = []
    for name in ("one", "two"):
        (tmp_path / name / ".git").mkdir(parents=True)
        (tmp_path / name / "train.py").write_text(SOURCE)
        monkeypatch.chdir(tmp_path / name)
        # Absolute: two nodes whose checkouts lie in different places.
        paths.append(written(tmp_path / f"{name}.jsonl", violation(tmp_path / name / "train.py")).path)
    (site,) = merge(paths, tmp_path / "all.json").findings
    assert site.times == 2


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".sarif", ".html"])
def test_every_format_can_be_merged(monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    paths = [write_as_rank(monkeypatch, rank, f"r{suffix}") for rank in range(2)]
    report = merge(paths, "all.txt")
    assert [site.times for site in report.findings] == [2]
    assert [report.ranks(site) for site in report.findings] == [[0, 1]]


def test_merging_is_a_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """In any order, by steps, and with files named twice: the same."""
    paths = [write_as_rank(monkeypatch, rank, times=3, changes={"elements": 600 + rank}) for rank in range(4)]
    expected = plain(merge(paths, "all.jsonl"))
    for seed in range(5):
        shuffled = random.Random(seed).sample(paths * 2, 8)
        assert plain(merge(shuffled, "again.jsonl")) == expected
    merge(paths[:2], "half.sarif")
    assert plain(merge(["half.sarif", "all.jsonl", *paths[1:]], "steps.json")) == expected


# ---- ranks that die

RANK = """
import datetime, os, sys, time
import torch, torch.distributed as dist

rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=30))

def step():
    y = torch.sigmoid(torch.ones(4, requires_grad=True))
    y.data.zero_()

def of_rank_1():
    y = torch.exp(torch.ones(3, requires_grad=True))
    y.data.fill_(2)

step()
dist.barrier()
if rank == 1:
    of_rank_1()
    print("killed here", flush=True)
    time.sleep(60)
try:
    dist.barrier()
except RuntimeError:
    print("lost the other rank", flush=True)
step()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("name", ["r.jsonl", "r.html"])
def test_a_rank_that_is_killed_half_way_loses_nothing(tmp_path: Path, name: str) -> None:
    """Two real ranks; one is killed from outside while it waits in the middle of a step."""
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torchguard", "--mode", "warn", "--report", name, "--exitcode", "0"]
    command += ["rank.py", str(tmp_path / "meet")]
    ranks = [
        subprocess.Popen(
            command, env=environment(RANK=str(rank), WORLD_SIZE="2"), cwd=tmp_path, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        assert ranks[1].stdout is not None
        assert ranks[1].stdout.readline() == "killed here\n"
        ranks[1].kill()
        told, _ = ranks[0].communicate(timeout=100)
        assert (ranks[0].returncode, ranks[1].wait(10), told) == (0, -9, "lost the other rank\n")
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    zeroth, first = sorted(tmp_path.glob("r.rank*"))
    assert zeroth.suffix == Path(name).suffix
    assert (first.suffix, first.name.startswith("r.rank1.")) == (".jsonl", True)
    with first.open("ab") as file:
        file.write(b'{"record": "violation", "site": "ab')  # as if it had been killed in the middle of a line
    report = merge([zeroth, first], tmp_path / "all.html")
    zero, fill = report.findings
    assert (report.ranks(zero), zero.times) == ([0, 1], 3)
    assert (report.ranks(fill), fill.times) == ([1], 1)
    cut, unfinished = report.told()
    assert cut == f"{first}: the last line is cut off, its process was killed while it wrote it"
    assert unfinished.startswith(
        "1 process did not close the report (killed, or running still), so counts may be too low: rank 1"
    )
    assert "the last line is cut off" in (tmp_path / "all.html").read_text()
    if name == "r.html":
        (forgotten, *_) = merge([zeroth], tmp_path / "half.txt").told()
        told = "is of a process that was killed, or runs still; it is not in this report: name it, too"
        assert forgotten == f"{first} {told}"
        Path(tmp_path / "r2.html.jsonl").write_bytes(first.read_bytes())  # of another report
        assert merge([zeroth, first], tmp_path / "both.txt").notes == [cut]


def test_a_report_cut_off_anywhere_keeps_every_whole_line() -> None:
    written(Path("r.jsonl"), violation(), violation(operation="exp_()"), violation(operation="é_()"), times=3)
    whole = Path("r.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in [*range(0, len(whole), 37), *ends, *(end - 1 for end in ends)]:
        Path("cut.jsonl").write_bytes(whole[:cut])
        report = merge(["cut.jsonl"], "all.jsonl")
        # A line that lacks nothing but its newline is whole.
        kept = [line for line in whole[:cut].split(b"\n") if line.endswith(b"}") and line in whole.split(b"\n")]
        assert len(report.findings) == sum(b'"record": "violation"' in line for line in kept), cut
        told = [note for note in report.notes if "cut off" in note or "empty" in note]
        assert bool(told) == (cut == 0 or (cut not in ends and cut + 1 not in ends)), cut


def test_a_broken_line_in_the_middle_is_told_and_the_rest_is_read() -> None:
    written(Path("r.jsonl"), violation(), violation(operation="exp_()"))
    lines = Path("r.jsonl").read_bytes().splitlines(keepends=True)
    for broken in (b"\x00\xff\n", b"[]\n", b'{"record": "violation"}\n', b'{"record": "hits", "site": 3}\n', b"7\n"):
        Path("b.jsonl").write_bytes(lines[0] + lines[1] + broken + b"".join(lines[2:]))
        report = merge(["b.jsonl"], "all.txt")
        assert len(report.findings) == 2
        assert report.notes == ["b.jsonl: line 3 cannot be read, it is left out"], broken


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".sarif", ".html"])
def test_a_damaged_report_is_read_or_refused_and_never_a_traceback(suffix: str) -> None:
    written(Path(f"r{suffix}"), violation(), violation(operation="exp_()"), times=2)
    whole = Path(f"r{suffix}").read_bytes()
    values = list(re.finditer(rb': ("[^"]*"|\d+|null|\[\]|\{)', whole))
    chance, outcomes = random.Random(0), set()
    for _ in range(60):
        match = chance.choice(values)
        wrong = chance.choice([b"null", b"-1", b'"x"', b"[]", b"{}", b"true"])
        Path("damaged").write_bytes(whole[: match.start(1)] + wrong + whole[match.end(1) :])
        try:
            merge(["damaged"], f"all{chance.choice(['.html', '.sarif', '.txt'])}")
            outcomes.add("read")
        except ReportError as error:
            outcomes.add(f"refused in {len(str(error).splitlines())} line")
    assert outcomes - {"refused in 1 line"} == {"read"}


# ---- names

NAMES = [
    # asked for, rank, child, restarted, name
    ("r.jsonl", None, False, False, "r.jsonl"),
    ("r.jsonl", None, True, False, "r.H.pidP.jsonl"),
    ("r.jsonl", None, False, True, "r.H.pidP.jsonl"),
    ("r.jsonl", 1, False, False, "r.rank1.H.pidP.jsonl"),
    ("r.jsonl", 1, True, False, "r.rank1.H.pidP.jsonl"),
    ("%r.jsonl", 1, False, False, "1.jsonl"),
    ("%r.jsonl", 1, True, False, "1.H.pidP.jsonl"),
    ("%r.jsonl", 1, False, True, "1.H.pidP.jsonl"),
    ("%r.jsonl", None, False, False, "0.jsonl"),
    ("r.%p.jsonl", None, True, False, "r.P.jsonl"),
    ("r.%p.jsonl", 1, False, False, "r.P.rank1.jsonl"),
    ("%h/r.jsonl", 1, False, False, "H/r.rank1.pidP.jsonl"),
    ("%h-%r-%p.jsonl", 1, True, True, "H-1-P.jsonl"),
    ("100%.jsonl", None, False, False, "100%.jsonl"),
]


@pytest.mark.parametrize(("asked", "rank", "child", "restarted", "name"), NAMES)
def test_no_two_processes_have_one_name(
    monkeypatch: pytest.MonkeyPatch, asked: str, rank: int | None, child: bool, restarted: bool, name: str
) -> None:
    if rank is not None:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
    if restarted:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    if child:
        monkeypatch.setenv("TORCHGUARD_REPORT_TAKEN", f"{rank}:{os.path.abspath(asked)}")
        monkeypatch.setenv("TORCHGUARD_REPORT_TAKEN_BY", str(os.getppid()))
    host = re.sub(r"[^\w-]", "_", socket.gethostname().split(".")[0])
    expected = re.sub(r"\bH\b", host, name).replace("pidP", f"pid{os.getpid()}")
    expected = re.sub(r"\bP\b", str(os.getpid()), expected)
    with open_report(asked) as writer:
        assert writer.path == ("" if child else os.path.abspath(expected)), (
            "a child that has nothing to tell has no file"
        )
        writer.add(violation())
        assert writer.path == os.path.abspath(expected)
        assert Path(writer.path).exists()


@pytest.mark.skipif(sys.platform == "win32", reason="flock")
def test_two_jobs_at_one_time_do_not_write_to_one_file() -> None:
    waits = (
        "import sys\nfrom report_samples import violation\nfrom torchguard._report import open_report\n"
        "with open_report('r.jsonl') as writer:\n    writer.add(violation(operation='exp_()'))\n"
        "    print('ready', flush=True)\n    sys.stdin.read()\n"
    )
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    other = subprocess.Popen(
        [sys.executable, "-c", waits],
        env=environment(PYTHONPATH=path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        mine = written(Path("r.jsonl"), violation()).path
        other.communicate(timeout=60)
    finally:
        other.kill()
        other.communicate()
    assert re.fullmatch(rf"r\.\S+\.pid{os.getpid()}\.jsonl", Path(mine).name)
    assert [site.violation["operation"] for site in merge(["r.jsonl", mine], "all.json").findings] == [
        "exp_()",
        "zero_()",
    ]
    assert Path(written(Path("r.jsonl"), violation()).path).name == "r.jsonl", "once the other is through"


def test_a_job_started_by_slurm_or_mpi_has_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, size in (("SLURM_PROCID", "SLURM_NTASKS"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")):
        with monkeypatch.context() as patched:
            patched.setenv(rank, "3")
            patched.setenv(size, "4")
            assert ".rank3." in Path(written(Path("r.jsonl"), violation()).path).name
            patched.setenv(size, "1")
            assert Path(written(Path("r.jsonl"), violation()).path).name == "r.jsonl"


# ---- the command


def test_the_command_tells_what_it_made(capsys: pytest.CaptureFixture[str]) -> None:
    written(Path("r.jsonl"), violation(), times=3)
    assert main(["r.jsonl", "-o", "all.html"]) == 0
    assert capsys.readouterr().out == "torchguard: all.html: 1 site, 3 hits, in 1 process\n"


def test_an_open_report_is_merged_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    writer = open_report("r.jsonl")
    writer.add(violation())
    assert main(["r.jsonl", "-o", "all.json"]) == 0
    assert "did not close the report" in capsys.readouterr().err
    writer.close()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("missing.jsonl", None, "cannot read missing.jsonl: No such file or directory"),
        ("notes.jsonl", "hello\n", "notes.jsonl is not a report of torchguard, or is damaged"),
        ("other.sarif", '{"version": "2.1.0", "runs": [{"results": []}]}', "other.sarif is not a report of torchguard"),
        ("other.html", "<!doctype html><p>hello", "other.html is not a report of torchguard, or is damaged"),
        ("other.json", "[1, 2]", "other.json is not a report of torchguard, or is damaged"),
        ("r.txt", "zero_() would", "r.txt is not a report of torchguard, or is damaged; text reports cannot be merged"),
        ("new.jsonl", '{"torchguard": 99, "record": "process"}\n', "new.jsonl was written by a newer torchguard"),
        ("binary.jsonl", "\x00\x01", "binary.jsonl is not a report of torchguard, or is damaged"),
    ],
)
def test_what_is_no_report_is_one_clear_line(
    name: str, content: str | None, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        Path(name).write_text(content)
    written(Path("good.jsonl"), violation())
    assert main(["good.jsonl", name, "-o", "all.html"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"torchguard: {told}")
    assert error.count("\n") == 1
    assert not Path("all.html").exists()


def test_a_glob_that_no_shell_has_seen_to_is_seen_to(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in range(2):
        write_as_rank(monkeypatch, rank)
    assert main(["r.rank*.jsonl", "-o", "all.jsonl"]) == 0
    assert capsys.readouterr().out == "torchguard: all.jsonl: 1 site, 2 hits, in 2 processes\n"
    assert main(["*.jsonl", "-o", "all.jsonl"]) == 0, "with its own result among the files"
    assert capsys.readouterr().out == "torchguard: all.jsonl: 1 site, 2 hits, in 2 processes\n"
    assert main(["rank*.sarif", "-o", "all.html"]) == 2
    assert capsys.readouterr().err == "torchguard: no file is called rank*.sarif\n"


@pytest.mark.parametrize("arguments", [[], ["a.jsonl"], ["-o", "all.html"], ["a.jsonl", "--out", "all.html"]])
def test_a_wrong_command_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    told = capsys.readouterr().err
    assert leaving.value.code == 2
    assert told.startswith("torchguard: merge: ")
    assert told.endswith("; write torchguard merge FILES -o OUT\n")
    assert told.count("\n") == 1


def test_an_output_that_cannot_be_is_told_before_anything_is_read() -> None:
    with pytest.raises(ReportError, match=r"'all\.pdf' does not say by its ending what to write"):
        merge(["missing"], "all.pdf")
    with pytest.raises(ReportError, match="needs reports"):
        merge([], "all.html")


def test_neither_torch_nor_jinja_is_needed_to_merge() -> None:
    code = (
        "import sys\nsys.modules['torch'] = sys.modules['jinja2'] = None\n"
        "from torchguard.__main__ import main\nsys.exit(main(['merge', *sys.argv[1:]]))\n"
    )
    written(Path("r.jsonl"), violation())
    for out, status in (("all.sarif", 0), ("all.html", 2)):
        done = python(["-c", code, "r.jsonl", "-o", out], cwd=Path.cwd())
        assert done.returncode == status, done.stderr
        assert Path(out).exists() is (status == 0)
    assert done.stderr == "torchguard: an .html report needs jinja2, which comes with torch: pip install jinja2\n"
