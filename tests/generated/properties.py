"""What must hold of a program, whatever it is?

* *missed*: plain PyTorch finishes with results that are not the truth, and the guard has said nothing.
* *false alarm*: the bytes of no live save have changed silently (or, judged at the read, backward reads none that has), and
  the guard speaks.
* *let through*: plain PyTorch refuses it, and under the guard it passes; *other error*: it is refused in other words.
* *changed*: under ``warn()``, or under ``strict()`` where that is silent, a result is not the same, bit for bit.
* *not repaired*: under ``repair()`` a result is not the truth; *unsaid*: it is, by what the guard did without a word.
* *kept*: a tensor outlives the program under the guard, and does not without it.
* *left*: torch is not as it was found.
* *crash*: an error that neither PyTorch nor the guard means to raise.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import program_hooks

import torchguard
from generated.runs import COPYING, Outcome, Program, Recorder, cloning, differ, quiet, run, same_bits


@dataclass(frozen=True)
class Failure:
    """A property that does not hold."""

    kind: str
    mode: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind} under {self.mode}: {self.text}"


@dataclass
class Known:
    """What is known of a program without a guard.

    Attributes:
        plain: what it does in plain PyTorch.
        truth: what it does where each save is cloned.
        written: whether the bytes of a live save change silently.
        read: whether backward reads such a save.
        touched: whether the bytes of a live save change, in whatever way, also after PyTorch would have refused.
        repaired: what it does where each save is cloned and no version compared.
        wrong: names of the results that are not the truth, where plain PyTorch finishes.
        saves: how many tensors autograd saves.
        healed: names of the results that would not be the truth if PyTorch compared no versions.
        closed_over: whether the bytes of anything change that a checkpoint reads again, and that is no save.
    """

    plain: Outcome
    truth: Outcome
    written: bool
    read: bool
    touched: bool
    repaired: Outcome
    wrong: list[str]
    saves: int
    healed: list[str]
    closed_over: bool

    @property
    def kind(self) -> str:
        """In the catalogue's words."""
        if self.plain.error is not None:
            return "refused"
        if self.wrong:
            return "corrupting"
        return "unread" if self.written else "innocent"


def known(program: Program) -> Known:
    """Run a program without a guard, in three ways."""
    with quiet():
        plain = run(program)
        truth = run(program, cloning(), threads=False, places=COPYING)
        repaired = run(program, cloning(refusing=False), threads=False, places=COPYING)
        recorder = Recorder()
        recorded = run(program, recorder.hooks(), recorder.look, threads=False, places=recorder.places)
    wrong, healed = [], []
    if plain.error is None and truth.error is None:
        wrong = _wrong(program, plain, truth)
    del recorded
    touched, closed_over = recorder.touched, recorder.closed_over
    if plain.error is not None:
        further = Recorder(refusing=False)
        with quiet():
            unchecked = run(program, further.hooks(), further.look, threads=False, places=further.places)
        healed = _wrong(program, unchecked, repaired)
        if (unchecked.error is None) != (repaired.error is None):
            healed.append("the error")
        touched, closed_over = touched or further.touched, closed_over or further.closed_over
    return Known(
        plain, truth, recorder.changed, recorder.read, touched, repaired, wrong, recorder.saves, healed, closed_over
    )


_MADE_BY_A_STAND_IN = re.compile(r"(\w+) = (?:transformed|region)\(")
_WITH_RESPECT_TO = re.compile(r"^(\w+) = torch\.autograd\.grad\(.*, (\w+)[,)]")


def _wrong(program: Program, outcome: Outcome, truth: Outcome) -> list[str]:
    """The names of results that are not the truth.

    A transform's or a region's result is a copy where the truth is made: no second derivative leads back to it there.
    """
    copies = {found[1] for line in program if (found := _MADE_BY_A_STAND_IN.search(line))}
    unknown = {found[1] for line in program if (found := _WITH_RESPECT_TO.match(line)) and found[2] in copies}
    return [name for name in differ(outcome.results, truth.results) if name not in unknown]


Make = Callable[[], torchguard.Guard]

#: The variable by which ``tools/fuzz.py`` tells the processes that it starts: "all", "read" or nothing.
WHICH = "TORCHGUARD_FUZZ_MODES"

MODES: dict[str, Make] = {
    "strict": lambda: torchguard.strict(),
    "warn": lambda: torchguard.warn(),
    "strict(every_call)": lambda: torchguard.strict(every_call=True),
    "warn(every_call)": lambda: torchguard.warn(every_call=True),
}
#: And those that speak when backward reads.
AT_READ: dict[str, Make] = {
    "strict(at=read)": lambda: torchguard.strict(at="read"),
    "warn(at=read)": lambda: torchguard.warn(at="read"),
    "repair": lambda: torchguard.repair(),
    "audit": lambda: torchguard.audit(),
}
ALL = {**MODES, **AT_READ}
MODES = {"all": ALL, "read": AT_READ}.get(os.environ.get(WHICH, ""), MODES)


def failures(
    program: Program, modes: dict[str, Make] | None = None, facts: Known | None = None, collecting: bool = False
) -> list[Failure]:
    """The properties that do not hold; ``collecting``: with the garbage collector on."""
    facts = facts or known(program)
    return [
        failure for mode, make in (modes or MODES).items() for failure in _under(program, facts, mode, make, collecting)
    ]


def _under(program: Program, facts: Known, mode: str, make: Make, collecting: bool) -> list[Failure]:
    guard = make()
    before = _torch_now()
    with quiet() as told:
        outcome = run(program, guard, collecting=collecting)
    spoken = [note for note in told if issubclass(note.category, torchguard.SavedTensorCorruptionWarning)]
    found: list[Failure] = []

    def fail(kind: str, text: str) -> None:
        found.append(Failure(kind, mode, text))

    if (now := _torch_now()) != before:
        fail("left", f"{now} instead of {before}")
    spoke = bool(guard.violations)
    raises, repairs = guard.action == "raise", str(guard.action) == "repair"
    may_speak = facts.touched if repairs else facts.read if str(guard.at) == "read" else facts.written
    plain = facts.plain
    refused_alike = plain.error is not None and outcome.error is not None and _same_error(outcome.error, plain.error)
    if repairs and not spoke and plain.error is not None and not refused_alike:
        plain = facts.repaired  # every byte is as it was saved: it goes on, and nobody need know
        if facts.healed:
            fail("unsaid", ", ".join(facts.healed))
    # What a checkpoint closes over is judged as it reads that again: before PyTorch refuses what comes later, and where
    # no gradient flows.
    if facts.closed_over and spoke and guard.violations[-1].kind == "recompute":
        may_speak = True
    beyond_repair = repairs and spoke and _is_beyond_repair(guard.violations[-1], program)
    if outcome.error is not None and outcome.error[0] == "SavedTensorCorruptionError":
        if not raises and not beyond_repair:
            fail("crash", "warn() raises")
    elif raises and spoke:
        fail("crash", f"a violation and nothing raised: {guard.violations[0]}")
    if not raises and spoke != bool(spoken) and not (beyond_repair and outcome.corruption):
        fail("crash", "violations and warnings are not the same")
    if spoke and not may_speak and not facts.wrong:
        fail("false alarm", f"line {outcome.line}: {guard.violations[0]}")
    if not spoke and facts.wrong and not (not guard.every_call and _out_of_sight(program)):
        fail("missed", ", ".join(facts.wrong))
    if not (raises and spoke) and not (beyond_repair and outcome.corruption):
        if repairs and spoke:
            # What a checkpoint computes anew cannot be repaired: PyTorch compares its shapes and dtypes, as it does without.
            compared = refused_alike and outcome.error is not None and outcome.error[0] == "CheckpointError"
            if (outcome.error is None) != (facts.repaired.error is None) and not (
                _is_of_the_copies(facts.repaired.error)
                or compared
                or (_is_refusal(plain.error) and _is_refusal(outcome.error) and _left_to_pytorch(program))
            ):
                fail("not repaired", f"{outcome.error} instead of {facts.repaired.error}")
        elif plain.error is not None:
            if outcome.error is None:
                fail("let through", plain.error[1])
            elif not _same_error(outcome.error, plain.error) or outcome.line != plain.line:
                fail("other error", f"line {outcome.line}, not {plain.line}: {outcome.error} instead of {plain.error}")
        elif outcome.error is not None:
            fail("crash", f"line {outcome.line}: {outcome.error}")
        if repairs and spoke:
            known = outcome.error is None and not _is_of_the_copies(facts.repaired.error)
            if known and (changed := _wrong(program, outcome, facts.repaired)) and not found:
                fail("not repaired", ", ".join(changed))
        elif plain is facts.repaired:
            if (changed := _wrong(program, outcome, plain)) and not found:
                fail("not repaired", ", ".join(changed))
        elif (changed := same_bits(outcome.results, plain.results)) and not found:
            fail("changed", ", ".join(changed))
        # Where repair() goes on although PyTorch refuses, there is no run to compare a cycle of gradients with.
        more = set(outcome.held if repairs and facts.plain.error is not None else outcome.alive)
        more -= set(facts.plain.alive)
        if repairs and facts.plain.error is not None:
            more -= set(facts.repaired.alive)  # nor does it outlive the program because of the guard
        compiles = any("made_by" in line for line in program)  # its first call leaves cycles, whose turn that is
        if more and not found and not compiles:
            fail("kept", ", ".join(sorted(more)))
    return found


_OWN_COUNTER = re.compile(r"(\.data\b|set_\(|Parameter\(|Tensor\(|copy\().*detach\(")
_UNSEEN = re.compile(r"\bout=|torch\.ops|TensorBase")


def _out_of_sight(program: Program) -> bool:
    """Whether it makes unseen writes, and detaches an alias that is gone at once: a limit that is told."""
    return any(map(_OWN_COUNTER.search, program)) and any(map(_UNSEEN.search, program))


def _is_beyond_repair(violation: torchguard.Violation, program: Program) -> bool:
    """Whether repair() raises, as it says: what a checkpoint computes anew, or what hooks hand out that return a key."""
    recomputed = violation.kind == "unseen" and any("checkpoint(" in line for line in program)
    return recomputed or violation.kind in ("recompute", "unchecked")


def _is_of_the_copies(error: tuple[str, str] | None) -> bool:
    """Whether it is no fault of the program's: what torch.func has wrapped cannot be copied once the transform is over."""
    return error is not None and "invalid python storage" in error[1]


def _is_refusal(error: tuple[str, str] | None) -> bool:
    return error is not None and "modified by an inplace operation" in error[1]


def _left_to_pytorch(program: Program) -> bool:
    """Whether a version may move where repair() keeps no copy: by a call that no patch sees, by a write to what was rebound."""
    return any(_UNSEEN.search(line) or ".data = " in line for line in program)


_ADDRESS = re.compile(r"0x[0-9a-f]+")
_NODE = re.compile(r"which is output \d+ of \w+")


def _same_error(a: tuple[str, str], b: tuple[str, str]) -> bool:
    if a[0] != b[0] or a[0] == "TorchRuntimeError":  # torch.compile's: it retells the frames that it went through
        return a[0] == b[0]
    x, y = (_ADDRESS.sub("0x", text) for text in (a[1], b[1]))
    # A view that was written in place is named by another node: a limit that is told.
    named = "AsStrided" in x + y
    return x == y or (named and _NODE.sub("", x) == _NODE.sub("", y))


def _torch_now() -> Any:
    return (
        program_hooks(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch.is_grad_enabled(),
        id(vars(torch.Tensor).get("add_")),
        id(vars(torch.Tensor).get("data")),
    )
