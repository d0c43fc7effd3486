"""Does other people's code run under the guard as it runs without, and is what the guard says of it true?

Run by ``make others``. Each script in ``tools/others/`` is a small training with a package from PyPI that writes
through ``.data``; it names the package, and ``train()`` returns the final weights. Each runs in processes of its own:
without the guard, under the guard in several modes, and, without the guard, with every save cloned. What must hold: it
ends the same way with the same weights, bit for bit; and what the guard says is true, which the clones tell: if they
lead to other weights, backward has read what somebody wrote over. Then the tests of some packages, with and without.

An alarm is explained in the script (``ALARM``), or it is a failure, as is a script that expects one and has none.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import hashlib
import importlib
import importlib.metadata
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TRAININGS = ROOT / "tools" / "others"
PAGE = ROOT / "docs" / "others.md"

#: Its name on the page, TORCHGUARD, TORCHGUARD_OPTIONS.
MODES = {
    "strict": ("strict", ""),
    "every call": ("strict", "every_call=yes"),
    "warn": ("warn", ""),
    "at the read": ("strict", "at=read"),
}
#: How long one training, one suite may take, and one installation, in seconds.
_TRAINING, _SUITE, _INSTALLATION = 300, 2400, 600
#: What ends the name in a requirement.
_END_OF_NAME = r"[\s\[<>=!~;]"
#: So many alarms of one training stand on the page.
_SHOWN = 4


# ---- what is run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """A script of ours that trains something with somebody's package.

    Attributes:
        path: the script.
        requires: what pip is to install; the first is the package that it is about.
        about: first line of its docstring.
        alarm: why the guard speaks; empty where it must be silent.
        corrupts: whether the final weights are wrong without the guard.
        cloned: whether it can run with its saves cloned; torch.func refuses save hooks.
    """

    path: Path
    requires: tuple[str, ...]
    about: str
    alarm: str = ""
    corrupts: bool = False
    cloned: bool = True

    @property
    def package(self) -> str:
        """The package that it is about, without a version."""
        return re.split(_END_OF_NAME, self.requires[0])[0]


@dataclass(frozen=True)
class Suite:
    """The tests that come with a package's source distribution.

    Attributes:
        package: its name on PyPI.
        select: what pytest is given.
        requires: what its tests need besides.
        alarms: why the guard speaks in a test: a part of the test's name, and the reason.
    """

    package: str
    select: tuple[str, ...]
    requires: tuple[str, ...] = ()
    alarms: dict[str, str] = field(default_factory=dict)


SUITES = (
    Suite("ema-pytorch", ("tests",)),
    Suite("pytorch-optimizer", ("tests/optimizers/test_lomo.py", "tests/optimizers/test_schedulefree.py")),
    Suite(
        "torch-optimizer",
        ("tests/test_optimizer_with_nn.py", "tests/test_param_validation.py"),
        alarms={
            "test_basic_nn_modeloptimizer_config": "True, and without consequence: the tests call "
            "`backward(create_graph=True)`, so that a graph in which the weights are saved hangs on each gradient "
            "while the optimiser writes to the weights; nobody goes backward through it."
        },
    ),
)


def read_training(path: Path) -> Training:
    """What a script says of itself, without running it.

    Raises:
        ValueError: if it lacks REQUIRES or ``train()``.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    said: dict[str, Any] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            name = statement.targets[0].id
            if name in ("REQUIRES", "ALARM", "CORRUPTS", "CLONED"):
                said[name] = ast.literal_eval(statement.value)
    functions = {statement.name for statement in tree.body if isinstance(statement, ast.FunctionDef)}
    if not said.get("REQUIRES") or "train" not in functions:
        raise ValueError(f"{path.name} needs REQUIRES = (package, ...) and a function train() that returns tensors")
    about = (ast.get_docstring(tree) or path.stem).splitlines()[0]
    return Training(
        path,
        tuple(said["REQUIRES"]),
        about,
        said.get("ALARM", ""),
        bool(said.get("CORRUPTS")),
        said.get("CLONED", True),
    )


# ---- one run, in its own process -----------------------------------------------------------------------------------


def fingerprint(tensors: Iterable[Any]) -> str:
    """SHA-256 of types, shapes and bytes."""
    import torch

    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def run_here(script: Path, outcome: Path, cloned: bool) -> None:
    """Run a training in this process and write down how it ended and what came of it."""
    import torch

    told: dict[str, Any] = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(_exact_copy, lambda copy: copy) if cloned else nullcontext()
    try:
        with hooks:
            told = {"ended": "finished", "weights": fingerprint(runpy.run_path(str(script))["train"]())}
    except BaseException as error:
        told = {"ended": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", "weights": ""}
        raise
    finally:
        outcome.write_text(json.dumps(told), encoding="utf-8")


def _exact_copy(tensor: Any) -> Any:
    """A copy that has the strides of what it copies, so that the same kernels run on it."""
    import torch

    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        return tensor.clone()
    copy = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    dense = all(stride for size, stride in zip(tensor.size(), tensor.stride(), strict=True) if size > 1)
    return copy.copy_(tensor.detach()) if dense else tensor.detach().clone()


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        ended: "finished", or the error in a line.
        weights: fingerprint of the weights, or of what became of each test.
        alarms: a line for each violation.
        output: the end of what it printed.
    """

    ended: str
    weights: str
    alarms: tuple[str, ...] = ()
    output: str = ""


def environment(mode: str | None, report: Path) -> dict[str, str]:
    """The variables of a run: one thread, no network, no GPU; in ``mode``, None for none."""
    ours = {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "0",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHGUARD")}
    if mode is not None:
        ours["TORCHGUARD"], options = MODES[mode]
        ours["TORCHGUARD_OPTIONS"] = f"report='{report}':exitcode=0:{options}".rstrip(":")
    return inherited | ours


def read_alarms(report: Path) -> tuple[str, ...]:
    """A line for each violation in a report and in those of its child processes: where, by what, onto what."""
    lines = set()
    for path in sorted(report.parent.glob(f"{report.stem}*{report.suffix}")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if record.get("record") == "violation" and record["suppressed"] is None:
                lines.add(_in_a_line(record["violation"]))
    return tuple(sorted(lines))


def _in_a_line(violation: dict[str, Any]) -> str:
    place = violation["written"] or violation["read"] or {"file": "?", "line": 0, "source": ""}
    file = re.sub(r".*/(site-packages|sources)/", "", place["file"])
    what = f"{violation['operation']}, saved by {violation['saved_by'] or '?'}"
    return f"{file}:{place['line']}  {place['source']}  ({what})"


class Runner:
    """Runs a training in processes that differ in nothing but the guard.

    One process of the environment's interpreter imports torch, once, and forks. A child is put under the guard by the
    very function that torch calls at the end of its import when ``TORCHGUARD`` is set; only then is the package
    imported.
    """

    def __init__(self, python: str, training: Training) -> None:
        preloaded = ["sklearn.datasets"] if "scikit-learn" in training.requires else []  # what most of them learn from
        command = [python, str(Path(__file__).resolve()), "--serve", *preloaded]
        self._server = subprocess.Popen(
            command, env=environment(None, Path()), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def run(self, training: Training, mode: str | None, cloned: bool = False) -> Outcome:
        """Run a training in a process of its own."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            outcome, report, log = (Path(folder, name) for name in ("outcome.json", "report.jsonl", "log.txt"))
            job = {
                "script": str(training.path.resolve()),
                "outcome": str(outcome),
                "log": str(log),
                "folder": folder,
                "variables": environment(mode, report),
                "cloned": cloned,
            }
            self._server.stdin.write(json.dumps(job) + "\n")
            self._server.stdin.flush()
            status = self._server.stdout.readline().strip()
            told = json.loads(outcome.read_text(encoding="utf-8")) if outcome.exists() else {}
            output = log.read_text(encoding="utf-8", errors="replace")[-4000:] if log.exists() else ""
            ended = told.get("ended") or f"ended with {status or 'the process that forks'}"
            return Outcome(ended, told.get("weights", ""), read_alarms(report), output)


def serve(preloaded: Sequence[str]) -> None:
    """Fork a child for each line of standard input, and say how it ended; in the child, run what the line asks for."""
    for name in ("torch", *preloaded):
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run_job(json.loads(line))
            return
        deadline = time.monotonic() + _TRAINING
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                deadline = float("inf")
            time.sleep(0.02)
        print("status" if deadline != float("inf") else f"a time-out after {_TRAINING} s", flush=True)


def _run_job(job: dict[str, Any]) -> None:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["variables"])
    importlib.invalidate_caches()
    if "TORCHGUARD" in os.environ:
        importlib.import_module("_torchguard_autostart").start()
    run_here(Path(job["script"]), Path(job["outcome"]), job["cloned"])


def _call(command: Sequence[str], variables: dict[str, str] | None, limit: int, folder: str | Path) -> tuple[int, str]:
    """Status and output; 124 where it ran past ``limit`` seconds."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=variables,
            timeout=limit,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except subprocess.TimeoutExpired:
        return 124, f"took longer than {limit} s"
    return done.returncode, done.stdout[-4000:]


# ---- the verdict ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What came of a training or a suite.

    Attributes:
        name: the training's file, or "tests".
        package: name on PyPI.
        version: what was installed.
        about: what part was run.
        said: the result, in a line.
        alarms: what the guard said.
        ok: whether all is as it must be.
        why: the explanation of the alarms.
    """

    name: str
    package: str
    version: str
    about: str
    said: str
    alarms: tuple[str, ...] = ()
    ok: bool = True
    why: str = ""


def judge(
    training: Training, version: str, plain: Outcome, again: Outcome, truth: Outcome, guarded: dict[str, Outcome]
) -> Verdict:
    """Compare the runs of one training.

    Args:
        training: what was run.
        version: of its package.
        plain: without the guard.
        again: the same once more, where something differs.
        truth: the same with every save cloned.
        guarded: under the guard, by mode.
    """
    alarms = tuple(sorted({alarm for outcome in guarded.values() for alarm in outcome.alarms}))

    def verdict(said: str, ok: bool = False) -> Verdict:
        name = training.path.stem
        return Verdict(name, training.package, version, training.about, said, alarms, ok, training.alarm)

    if plain.ended != "finished":
        return verdict(f"does not run without the guard: {plain.ended}")
    if plain.weights != again.weights:
        return verdict("has other weights each time: seed it")
    if truth.ended != "finished":
        return verdict(f"does not run with its saves cloned: {truth.ended}")
    for mode, outcome in guarded.items():
        if outcome.ended == "finished" and outcome.weights != plain.weights:
            return verdict(f"other weights under {mode}")
        if outcome.ended != "finished" and not (outcome.alarms and "SavedTensorCorruptionError" in outcome.ended):
            return verdict(f"under {mode}: {outcome.ended}")
    corrupted = truth.weights != plain.weights
    result = "weights are wrong" if corrupted else "weights are right"
    silent = [mode for mode, outcome in guarded.items() if not outcome.alarms]
    if corrupted and silent:
        return verdict(f"{result}, and nothing is said under {', '.join(silent)}")
    if corrupted != training.corrupts:
        return verdict(f"{result}, which CORRUPTS in the script does not say")
    if bool(alarms) != bool(training.alarm):
        return verdict(
            f"{_count(len(alarms), 'alarm')} not explained" if alarms else "the alarm that ALARM explains does not come"
        )
    if not alarms:
        return verdict("same weights, silent", ok=True)
    spoke = ", ".join(mode for mode in guarded if mode not in silent)
    return verdict(f"{_count(len(alarms), 'alarm')} ({spoke}); {result} without the guard", ok=True)


def judge_suite(
    suite: Suite, version: str, plain: dict[str, str], guarded: dict[str, str], alarms: tuple[str, ...]
) -> Verdict:
    """Compare a suite's tests, name by name."""
    about = f"its own tests ({' '.join(suite.select)})"
    changed = {name for name in plain.keys() | guarded.keys() if plain.get(name) != guarded.get(name)}
    explained = {reason for part, reason in suite.alarms.items() if any(part in name for name in changed)}
    open_ = sorted(name for name in changed if not any(part in name for part in suite.alarms))
    why = " ".join(sorted(explained)) or " ".join(suite.alarms.values())
    tally = ", ".join(
        f"{list(plain.values()).count(what)} {what}" for what in sorted(set(plain.values()), reverse=True)
    )

    def verdict(said: str, ok: bool = False) -> Verdict:
        return Verdict("tests", suite.package, version, about, said, alarms, ok, why)

    if not plain:
        return verdict("no test ran")
    if open_:
        shown = "; ".join(f"{name}: {plain.get(name)} -> {guarded.get(name)}" for name in open_[:5])
        return verdict(f"{_count(len(open_), 'test')} changed: {shown}")
    if alarms and not suite.alarms:
        return verdict(f"{tally}; alarms not explained")
    return verdict(
        f"{tally}; " + (f"{len(changed)} of them refused, explained" if changed else "the same under strict"), True
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


# ---- the environment -----------------------------------------------------------------------------------------------


class Environment:
    """A virtual environment to be thrown away, or an interpreter that is used as it stands.

    Attributes:
        python: its interpreter.
    """

    def __init__(self, directory: Path | None, python: str = sys.executable) -> None:
        self.directory = directory
        self.python = os.path.abspath(python if directory is None else directory / "bin" / "python")

    def make(self) -> str | None:
        """Create it, with torch as pinned and this checkout of torchguard; None, or what went wrong in a line."""
        if self.directory is None:
            return None
        if not Path(self.python).exists():
            code, output = _call([sys.executable, "-m", "venv", str(self.directory)], None, _INSTALLATION, ROOT)
            if code:
                return _last_error(output)
        return self.install(("numpy", "pytest", "-e", str(ROOT)))

    def install(self, requirements: Sequence[str]) -> str | None:
        """Have packages installed, torch as pinned; None, or a line that says why they cannot be."""
        if self.directory is None:
            return None
        return self._pip("install", *requirements)

    def sources(self, package: str, version: str) -> Path | str:
        """Where the source distribution of the installed version lies unpacked; or why there is none."""
        if self.directory is None:
            return "has its tests run only in an environment of the runner's"
        folder = self.directory / "sources"
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as download:
            wrong = self._pip("download", "--no-deps", "--no-binary", package, "-d", download, f"{package}=={version}")
            found = [*Path(download).glob("*.tar.gz")]
            if not found:
                return wrong or "has no source distribution"
            with tarfile.open(found[0]) as archive:
                top = archive.getnames()[0].partition("/")[0]
                archive.extractall(folder, filter="data")
        if (folder / top / "tests").is_dir():
            (folder / top / "tests" / "__init__.py").touch()  # some packages install a ``tests`` of their own
        return folder / top

    def version(self, package: str) -> str:
        """The version that is installed; empty if none is."""
        ask = f"import importlib.metadata as m; print(m.version({package!r}))"
        code, output = _call([self.python, "-c", ask], environment(None, Path()), _INSTALLATION, ROOT)
        return output.strip() if code == 0 else ""

    def _pip(self, *arguments: str) -> str | None:
        command = [self.python, "-m", "pip", arguments[0], "--disable-pip-version-check", "-qq", "--prefer-binary"]
        with tempfile.TemporaryDirectory() as folder:
            pins = Path(folder, "constraints.txt")
            pins.write_text(pins_beside(arguments[1:], ROOT / "constraints.txt"), encoding="utf-8")
            code, output = _call([*command, "-c", str(pins), *arguments[1:]], None, _INSTALLATION, ROOT)
        return _last_error(output) if code else None


def pins_beside(requirements: Sequence[str], pins: Path) -> str:
    """The pins of what is not held to a version by ``requirements`` themselves: old packages need an old setuptools."""
    held = {_name_of(one) for one in requirements if re.search("[<>=!~]", one)}
    lines = pins.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if _name_of(line) not in held)


def _name_of(requirement: str) -> str:
    """The project that a requirement names, as indexes spell it."""
    return re.sub(r"[-_.]+", "-", re.split(_END_OF_NAME, requirement)[0]).lower()


def _last_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.partition("ERROR: ")[2] or line for line in lines if "error" in line.lower()]
    return (errors or lines or ["pip said nothing"])[-1][:300]


# ---- all of it -----------------------------------------------------------------------------------------------------


def try_training(environment_: Environment, training: Training, modes: Sequence[str]) -> Verdict:
    """Install, run and judge."""
    wrong = environment_.install(training.requires)
    if wrong is not None:
        said = f"cannot be installed here: {wrong}"
        return Verdict(training.path.stem, training.package, "", training.about, said, ok=False)
    with Runner(environment_.python, training) as runner:
        plain = runner.run(training, None)
        truth = runner.run(training, None, cloned=True) if training.cloned else plain
        guarded = {mode: runner.run(training, mode) for mode in modes}
        if any(outcome.alarms for outcome in guarded.values()):
            guarded["at the read"] = runner.run(training, "at the read")
        compared = [one for one in (truth, *guarded.values()) if one.ended == "finished"]
        differ = any(one.weights != plain.weights for one in compared)
        again = runner.run(training, None) if differ else plain
    verdict = judge(training, environment_.version(training.package), plain, again, truth, guarded)
    if not verdict.ok:
        for outcome in (plain, truth, *guarded.values()):
            if outcome.ended != "finished":
                print(outcome.output, file=sys.stderr)
    return verdict


def try_suite(environment_: Environment, suite: Suite) -> Verdict:
    """Install, unpack, run the tests with and without the guard, and judge."""
    about = f"its own tests ({' '.join(suite.select)})"
    wrong = environment_.install((suite.package, *suite.requires))
    version = environment_.version(suite.package)
    sources: Path | str = wrong if wrong is not None else environment_.sources(suite.package, version)
    if isinstance(sources, str):
        return Verdict("tests", suite.package, version, about, f"cannot be run here: {sources}", ok=False)
    found: dict[str | None, dict[str, str]] = {}
    alarms: tuple[str, ...] = ()
    for mode in (None, "strict"):
        with tempfile.TemporaryDirectory() as folder:
            results, report = Path(folder, "results.xml"), Path(folder, "report.jsonl")
            options = ("-q", "-p", "no:cacheprovider", "-o", "addopts=", f"--junitxml={results}", "--tb=short")
            command = [environment_.python, "-m", "pytest", *options, *suite.select]
            _, output = _call(command, environment(mode, report), _SUITE, sources)
            found[mode] = read_results(results) if results.exists() else {}
            alarms = read_alarms(report)
            if not found[mode]:
                print(output, file=sys.stderr)
    return judge_suite(suite, version, found[None], found["strict"], alarms)


def read_results(path: Path) -> dict[str, str]:
    """What became of each test, by its name, from pytest's JUnit file."""
    kinds = {"failure": "failed", "error": "error", "skipped": "skipped"}
    results = {}
    for case in ElementTree.parse(path).iter("testcase"):
        kind = next((kinds[child.tag] for child in case if child.tag in kinds), "passed")
        results[f"{case.get('classname')}.{case.get('name')}"] = kind
    return results


def table(verdicts: Sequence[Verdict]) -> str:
    """The page's table, Markdown."""
    lines = ["| package | what was run | result |", "|---|---|---|"]
    for verdict in sorted(verdicts, key=lambda one: (one.package.lower(), one.name == "tests", one.name)):
        cells = (f"{verdict.package} {verdict.version}".strip(), verdict.about, verdict.said)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    told = [verdict for verdict in verdicts if verdict.alarms]
    for verdict in sorted(told, key=lambda one: (one.package.lower(), one.name)):
        shown = [*verdict.alarms[:_SHOWN]]
        if len(verdict.alarms) > _SHOWN:
            shown.append(f"and {len(verdict.alarms) - _SHOWN} more of the kind")
        lines += ["", f"**{verdict.package}**, {verdict.about}:", "", "```text", *shown, "```", "", verdict.why]
    return "\n".join(lines)


def keep(verdict: Verdict, folder: Path) -> None:
    """Write a verdict down, so that the page can be written from several runs."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{verdict.package}.{verdict.name}.json"
    path.write_text(json.dumps(dataclasses.asdict(verdict), indent=1), encoding="utf-8")


def kept(folder: Path, trainings: Sequence[Training]) -> tuple[list[Verdict], list[str]]:
    """The verdicts that were written down, and the names of those that are missing."""
    verdicts, missing = [], []
    for package, name in [(one.package, one.path.stem) for one in trainings] + [
        (one.package, "tests") for one in SUITES
    ]:
        path = folder / f"{package}.{name}.json"
        if path.exists():
            told = json.loads(path.read_text(encoding="utf-8"))
            verdicts.append(Verdict(**{**told, "alarms": tuple(told["alarms"])}))
        else:
            missing.append(f"{package} ({name})")
    return verdicts, missing


_BEGIN, _END = "<!-- written by tools/others.py -->", "<!-- end -->"


def record(page: Path, verdicts: Sequence[Verdict], missing: Sequence[str]) -> None:
    """Put the table into the page, between the two marks, and what it lacks."""
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(_BEGIN)
    versions = f"torch {importlib.metadata.version('torch')}, Python {'.'.join(map(str, sys.version_info[:3]))}"
    lacks = f"\n\nNot run for this table: {', '.join(missing)}." if missing else ""
    middle = f"{_BEGIN}\n\n{versions}:\n\n{table(verdicts)}{lacks}\n\n{_END}"
    page.write_text(before + middle + rest.partition(_END)[2], encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 1 if anything is not as it must be."""
    parser = argparse.ArgumentParser(description="Run other people's packages with and without the guard.")
    parser.add_argument(
        "--only", metavar="WORDS", help="only packages that have one of these in their name, separated by commas"
    )
    parser.add_argument("--what", choices=("trainings", "suites", "all"), default="all")
    parser.add_argument(
        "--modes", default="strict,every call,warn", help="of the guard, separated by commas: %(default)s"
    )
    parser.add_argument("--trainings", type=Path, default=TRAININGS, help="folder of the scripts")
    parser.add_argument("--directory", type=Path, default=ROOT / ".venv-others", help="of the throw-away environment")
    parser.add_argument("--python", help="use this interpreter as it stands, and install nothing")
    parser.add_argument(
        "--record", action="store_true", help="write what this and earlier runs found into docs/others.md"
    )
    parser.add_argument("--serve", nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.serve is not None:
        serve(asked.serve)
        return 0
    modes = [mode.strip() for mode in asked.modes.split(",")]
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        parser.error(f"--modes takes {', '.join(MODES)}, not {unknown[0]!r}")
    trainings = [read_training(path) for path in sorted(asked.trainings.glob("*.py"))]
    words = (asked.only or "").split(",")
    chosen = [one for one in trainings if any(word in one.package for word in words) and asked.what != "suites"]
    suites = [one for one in SUITES if any(word in one.package for word in words) and asked.what != "trainings"]
    if not chosen and not suites:
        parser.error(f"nothing has {asked.only!r} in its name: {', '.join(sorted({t.package for t in trainings}))}")
    place = Environment(None, asked.python) if asked.python else Environment(asked.directory.resolve())
    print(f"others: preparing {place.directory or place.python}", flush=True)
    wrong = place.make()
    if wrong is not None:
        print(f"others: the environment cannot be made: {wrong}")
        return 1
    verdicts = []
    asked_for: list[Training | Suite] = [*chosen, *suites]
    for one in asked_for:
        verdict = try_training(place, one, modes) if isinstance(one, Training) else try_suite(place, one)
        verdicts.append(verdict)
        keep(verdict, asked.directory / "verdicts")
        print(
            f"{'ok  ' if verdict.ok else 'BAD '} {verdict.package} {verdict.version} ({verdict.name}): {verdict.said}"
        )
        for alarm in verdict.alarms:
            print(f"       {alarm}")
        sys.stdout.flush()
    if asked.record:
        record(PAGE, *kept(asked.directory / "verdicts", trainings))
    bad = sum(not verdict.ok for verdict in verdicts)
    print(f"others: {len(verdicts)} runs, {bad or 'none'} not as it must be")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
