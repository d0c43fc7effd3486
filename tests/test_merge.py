"""Do the reports of many ranks become one, and is none lost when a rank dies half-way?"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report_samples import SOURCE, violation, written

from torchguard._report import Report, ReportError, merge, merge_command, open_report

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
        assert (stem, said_rank, pid, suffix) == ("r", f"rank{rank}", str(os.getpid()), "jsonl")
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
import os, signal, sys, datetime
import torch, torch.distributed as dist
import torchguard
from torchguard._report import open_report

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=size,
                        timeout=datetime.timedelta(seconds=20))
writer = open_report(sys.argv[1])

class Reporting(torchguard.Guard):
    def respond(self, violation):
        writer.add(violation)
        super().respond(violation)

def step():
    y = torch.sigmoid(torch.ones(4, requires_grad=True))
    y.data.zero_()

with Reporting("record"):
    step()
    dist.barrier()
    if rank == 1:
        y = torch.exp(torch.ones(3, requires_grad=True))
        y.data.fill_(2)
        os.write(writer._descriptor, b'{"record": "violation", "site": "ab')
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.barrier()
    except RuntimeError:
        pass
    step()
writer.close()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_rank_that_is_killed_half_way_loses_nothing(tmp_path: Path) -> None:
    """Two real ranks; one kills itself while it writes a line."""
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "rank.py", str(tmp_path / "r.jsonl"), str(tmp_path / "meet")]
    ranks = [subprocess.Popen(command, env={**environment, "RANK": str(rank)}, cwd=tmp_path) for rank in range(2)]
    try:
        assert [rank.wait(120) for rank in ranks] == [0, -9]
    finally:
        for rank in ranks:
            rank.kill()
    files = sorted(tmp_path.glob("r.rank*.jsonl"))
    assert len(files) == 2
    report = merge(files, tmp_path / "all.html")
    zero, fill = report.findings
    assert (report.ranks(zero), zero.times) == ([0, 1], 3)
    assert (report.ranks(fill), fill.times) == ([1], 1)
    cut, unfinished = report.told()
    assert cut == f"{files[1]}: the last line is cut off, its process was killed while it wrote it"
    assert unfinished.startswith(
        "1 process did not close the report (killed, or running still), so counts may be too low: rank 1"
    )
    assert "the last line is cut off" in (tmp_path / "all.html").read_text()


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


# ---- the command


def test_the_command_tells_what_it_made(capsys: pytest.CaptureFixture[str]) -> None:
    written(Path("r.jsonl"), violation(), times=3)
    assert merge_command(["r.jsonl", "-o", "all.html"]) == 0
    assert capsys.readouterr().out == "torchguard: all.html: 1 site, 3 hits, in 1 process\n"


def test_an_open_report_is_merged_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    writer = open_report("r.jsonl")
    writer.add(violation())
    assert merge_command(["r.jsonl", "-o", "all.json"]) == 0
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
    assert merge_command(["good.jsonl", name, "-o", "all.html"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"torchguard: {told}")
    assert error.count("\n") == 1
    assert not Path("all.html").exists()


def test_an_output_that_cannot_be_is_told_before_anything_is_read() -> None:
    with pytest.raises(ReportError, match=r"not 'all\.pdf'"):
        merge(["missing"], "all.pdf")
    with pytest.raises(ReportError, match="needs reports"):
        merge([], "all.html")


def test_no_torch_is_needed_to_merge() -> None:
    """The package itself imports torch; what merges does not."""
    code = (
        "import sys, types\npackage = types.ModuleType('torchguard')\n"
        f"package.__path__ = [{str(HERE.parent / 'torchguard')!r}]\nsys.modules['torchguard'] = package\n"
        "from torchguard._report import merge_command\nstatus = merge_command(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules\nsys.exit(status)\n"
    )
    written(Path("r.jsonl"), violation())
    subprocess.run([sys.executable, "-c", code, "r.jsonl", "-o", "all.html"], timeout=60, check=True)
    assert Path("all.html").exists()
