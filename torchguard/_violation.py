"""What does torchguard say about a violation, and how does it read?"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal

from torchguard._model import Place

Kind = Literal[
    "write",
    "uncounted",
    "rebind",
    "unseen",
    "exported",
    "unchecked",
    "stashed",
    "wrapped",
    "recompute",
    "tracked",
    "invisible",
    "refused",
]


@dataclass(frozen=True)
class _Wording:
    """How a report speaks of one kind of violation; ``{write}`` is the operation, or "a write"."""

    headline: str
    explanation: str
    fix: str
    seen: bool = True  # whether the guard always sees who writes
    by_alias: bool = False  # whether the line that took an alias is shown
    unknown_writer: str = "between save and read, by a call that is not patched: out=, torch.ops or an extension"
    verb: str = ""  # instead of "would corrupt" or "may have corrupted a tensor saved for backward"


_CANNOT_SEE = """\
autograd cannot see this write: it does not move the version counter of the saved tensor.
If backward reads the saved tensor, the gradient is wrong. Without torchguard, backward() would
finish with wrong gradients and no error."""
_IF_READ = re.compile("If backward reads (the saved tensor|it), the gradient is wrong")
_ON_A_COPY = (
    "do it after backward(), or on {name}.data.clone(); to have autograd check it, use {name}.detach() under "
    "torch.no_grad()"
)

_WORDINGS: dict[Kind, _Wording] = {
    "write": _Wording("{write} through {alias}", _CANNOT_SEE, _ON_A_COPY, by_alias=True),
    "uncounted": _Wording(
        "{write}, which moves no version counter,",
        _CANNOT_SEE,
        "do it after backward(), or use an operation that moves the counter, which autograd checks",
    ),
    "rebind": _Wording(
        "{write}",
        """\
autograd cannot see this: the tensor that it saved points to other memory from now on, and
its version counter does not move. If backward reads it, the gradient is wrong. Without
torchguard, backward() would finish with wrong gradients and no error.""",
        "assign after backward(); to have autograd check it, use copy_() under torch.no_grad()",
    ),
    "unseen": _Wording(
        "a write through an alias",
        """\
The alias's own version counter moved, the saved tensor's did not: autograd cannot see that
its memory was written to. Without torchguard, backward() would finish with wrong gradients
and no error. To stop at the line that writes, use torchguard.strict(every_call=True).""",
        _ON_A_COPY,
        seen=False,
        by_alias=True,
        unknown_writer="between alias and read, by a call that is not patched: out=, torch.ops or an extension",
    ),
    "exported": _Wording(
        "a write from outside torch",
        """\
Code outside torch can write to this memory and autograd cannot see it: the saved bytes are not
what they were. Without torchguard, backward() would finish with wrong gradients and no error.""",
        "write after backward(), or to a copy: x.numpy().copy(), torch.tensor(array)",
        seen=False,
        by_alias=True,
        unknown_writer="between alias and read: by NumPy, a DLPack consumer, another process",
    ),
    "unchecked": _Wording(
        "{write}, under save hooks that switch PyTorch's check off,",
        """\
The version counter of the saved tensor moved, and without save hooks PyTorch would refuse to use it.
Under save hooks (saved_tensors_hooks, save_on_cpu, checkpoint) it compares no versions, and what the
pack hook returned is still the same memory. Without torchguard, backward() would finish with wrong
gradients and no error.""",
        "do it after backward(), or on a clone(); or have the pack hook return a copy, tensor.clone()",
        seen=False,
    ),
    "stashed": _Wording(
        "{write}, which nothing checks for,",
        """\
A Function stashed this tensor on its ctx instead of giving it to save_for_backward, and so does
what torch.compile makes of it: its version is never looked at. Without torchguard, backward()
would finish with wrong gradients and no error.""",
        "do it after backward(); to have autograd check it, use ctx.save_for_backward() in the Function",
        seen=False,
        unknown_writer="between the Function's forward and its backward",
    ),
    "wrapped": _Wording(
        "{write} inside a nested or wrapping tensor",
        """\
Autograd saved a tensor that others are inside of: a nested tensor, or a subclass that wraps them (a DTensor,
say). Those inside were written to, and the version counter of the whole does not move. Without torchguard,
backward() would finish with wrong gradients and no error.""",
        "do it after backward(), or write to the whole by an operation that moves its version counter",
        seen=False,
        unknown_writer="between save and read, by a call that is not patched: out=, torch.ops or an extension",
    ),
    "recompute": _Wording(
        "{write}",
        """\
A checkpoint saves nothing of what its function computes: backward runs the function again, with
what weights, biases, buffers and masks hold by then. PyTorch checks none of them, not even their
versions. Without torchguard, backward() would finish with wrong gradients and no error.""",
        "do it after backward(), or hand the tensor to checkpoint() as an argument, which autograd checks",
        seen=False,
        unknown_writer="between forward and backward, by code that is not patched: out=, torch.ops, NumPy or C++",
        verb="has changed a tensor that a checkpoint reads again in backward",
    ),
    "invisible": _Wording(
        "a write that no Python sees",
        """\
The bytes of the saved tensor are not what they were, and no call that writes was seen. Without
torchguard, backward() would finish with wrong gradients and no error.""",
        "write after backward(), or to a clone(); a custom operator must name what it writes to in mutates_args",
        seen=False,
        verb="has corrupted a tensor saved for backward",
        unknown_writer="between save and read: a kernel or C++ code through data_ptr(), a custom operator, a process",
    ),
    "tracked": _Wording(
        "{write}, at which PyTorch would refuse to go on,",
        """\
The version counter of the saved tensor moved: PyTorch refuses to use it, as modified by an inplace
operation.""",
        "do it after backward(), or on a clone()",
        seen=False,
    ),
    "refused": _Wording(
        "{write} through {alias}",
        """\
torchguard.watch() gives an alias made by .data the version counter of its source, and moves the
counter for writes that move none: so PyTorch sees the write, and refuses. Counters belong to a
whole storage: a write to another part of it moves them, too.""",
        "do it after backward(), or on {name}.data.clone(); torchguard.strict() stops at the line that writes",
        seen=False,
        by_alias=True,
        unknown_writer="between alias and read; watch() sees no writes, torchguard.strict() does",
        verb="moved the version of a tensor saved for backward",
    ),
}

_REPAIRED = """\
Backward is given the bytes that were saved, so that the gradient is right. Without torchguard.repair()
it would be wrong, with no error, or PyTorch would refuse to compute it."""

_RESET = "\x1b[0m"
_COLOURS = {"headline": "\x1b[1;31m", "label": "\x1b[1m", "place": "\x1b[36m", "fix": "\x1b[32m"}


class SavedTensorCorruptionError(RuntimeError):
    """Raised where a tensor that autograd saved for backward would be, or was, changed without autograd
    noticing.

    Attributes:
        violation: the :class:`Violation` that is being reported.
    """

    def __init__(self, violation: Violation) -> None:
        super().__init__(str(violation))  # text: load_state_dict() and loggers put the arguments into texts of theirs
        self.violation = violation

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.violation,)


class SavedTensorCorruptionWarning(UserWarning):
    """Warned, once a site, where :class:`SavedTensorCorruptionError` would be raised under ``strict()``."""


class UnwatchedWarning(UserWarning):
    """Warned, once a process, of each thing that this torch or this program keeps out of the guard's sight."""


@dataclass(frozen=True)
class Violation:
    """A silent write that overlaps a live save.

    Attributes:
        kind: ``"write"`` (through an alias, by a call that the guard saw), ``"uncounted"`` (by a call that
            moves no version counter, whatever it writes through), ``"rebind"`` (``x.data = y`` on the tensor
            that was saved), ``"unseen"`` (a write that only the alias's version counter gave away),
            ``"exported"`` (a write from outside torch, to memory that was handed to NumPy, DLPack or another
            process), ``"unchecked"`` (a write that moves the version, where the program's save hooks switch
            PyTorch's check off), ``"stashed"`` (any write, tracked or not, to what PyTorch reads without a look
            at its version), ``"wrapped"`` (a write to what is inside a nested tensor, or a subclass that wraps
            others, a DTensor say: the version of the whole does not move), ``"recompute"`` (any write to what a
            checkpoint reads again), ``"tracked"`` (a write that PyTorch sees and would refuse; only where it is
            repaired) or ``"invisible"`` (one that only the bytes gave away, where those of every save are kept).
        operation: the call that wrote, ``"zero_()"`` say; ``""`` if it was not seen.
        saved: where the tensor was saved for backward, or None if no user code was on the stack.
        aliased: where the alias that was written through was taken, if the guard saw it being taken.
        written: where the write is; for an unseen write, where backward read the save.
        read: where backward read the save, if the violation was found then.
        largest_difference: by how much the elements differ at most from what was saved (for complex ones the distance;
            NaN where one of two differing elements is), if both were compared; else None.
        repaired: whether backward was given the bytes that were saved (``repair()``). ``times`` then counts the saves.
        saved_by: the operation that saved the tensor, ``"sigmoid"`` say; ``""`` where it cannot be known.
        dtype: element type of the save, ``"float32"`` say.
        shape: shape of the save.
        device: device of the save.
        elements: how many elements of the save change; for an unseen write, how many may have.
        of: how many elements the save has.
        caught: ``"write"`` (nothing had changed yet) or ``"read"`` (backward was about to use the save).
        allowed: the reason given to :func:`torchguard.allow`, or None.
        thread: name of the thread that wrote.
        times: how often this site was hit while the guard was on.
        step: the step of the training that it was first hit in, if the guard was told (``Guard.step``).
        refusal: PyTorch's own error message, word for word, where PyTorch refused.
    """

    kind: Kind
    operation: str
    saved: Place | None
    aliased: Place | None
    written: Place | None
    saved_by: str
    dtype: str
    shape: tuple[int, ...]
    device: str
    elements: int
    of: int
    caught: Literal["write", "read"] = "write"
    allowed: str | None = None
    thread: str = "MainThread"
    times: int = 1
    read: Place | None = None
    step: int | None = None
    largest_difference: float | None = None
    repaired: bool = False
    refusal: str = ""

    @property
    def site(self) -> tuple[Any, ...]:
        """What makes two violations the same finding: the kind of write and the three places."""
        return (self.kind, self.operation, self.saved, self.aliased, self.written)

    def to_dict(self) -> dict[str, Any]:
        """The same data as plain dictionaries, lists, strings and numbers."""
        data = dataclasses.asdict(self)
        data["shape"] = list(self.shape)
        return data

    @property
    def headline(self) -> str:
        """What happened, in one line."""
        return self._headline()

    @property
    def explanation(self) -> str:
        """Why autograd cannot see it, and what follows."""
        return " ".join(self._explanation())

    @property
    def ways_out(self) -> list[str]:
        """What to do about it, a line each."""
        return [" ".join(line.split()) for line in self._ways_out(lambda text, what: text)]

    def timeline(self) -> list[tuple[str, Place | None, str]]:
        """The life of the memory in order: saved, aliased, written, read; where, and what is known about it."""
        return [
            (
                label,
                place,
                ", ".join(part for part in ("" if place else self._unknown(label).strip("()"), note) if part),
            )
            for label, place, note in self._places()
        ]

    def __str__(self) -> str:
        return self.render()

    def render(self, color: bool = False) -> str:
        """The report as text, about ten lines; ``color`` adds ANSI colours for a terminal."""

        def paint(text: str, what: str) -> str:
            return f"{_COLOURS[what]}{text}{_RESET}" if color and text else text

        lines = [paint(self._headline(), "headline"), ""]
        for label, place, note in self._places():
            where, source = (str(place), place.source) if place else (self._unknown(label), "")
            body = "  ".join(part for part in (paint(where, "place"), source) if part)
            lines.append(f"  {paint(f'{label:<9}', 'label')} {body}{'     ' + note if note else ''}")
        if self.step is not None:
            lines.append(f"  {paint('step     ', 'label')} {self.step}")
        explanation = _REPAIRED.splitlines() if self.repaired else self._explanation()
        lines += ["", *(f"  {line}" for line in explanation), *self._ways_out(paint)]
        if self.refusal:
            lines += ["", self.refusal]
        return "\n".join(lines)

    def _headline(self) -> str:
        wording = _WORDINGS[self.kind]
        headline = wording.headline
        if self._alias_unseen:
            headline = "{write}, which autograd cannot see,"
        elif self.kind == "refused" and self.aliased is None:
            headline = "{write}"
        elif self.kind == "refused" and not self.operation:
            headline = "{write}, perhaps through {alias},"
        what = headline.format(write=self.operation or "a write", alias=self._alias())
        corrupts = "has corrupted" if self.largest_difference is not None else "may have corrupted"
        if self.caught == "write":
            corrupts = "would corrupt"
        healed = ": backward is given what was saved" if self.repaired else ""
        return f"{what} {wording.verb or corrupts + ' a tensor saved for backward'}{healed}"

    def _alias(self) -> str:
        """``.data``, unless the line that took the alias did it otherwise."""
        if self.aliased is None:
            return "an alias"
        line = self.aliased.expression or self.aliased.source
        return ".data" if not line or "data" in line else "an alias"

    def _places(self) -> list[tuple[str, Place | None, str]]:
        shape = ", ".join(map(str, self.shape))
        saved = f"{self.dtype}[{shape}] on {self.device}" + (f", by {self.saved_by}" if self.saved_by else "")
        changed = f"{self.elements} of {self.of} elements"
        if isinstance(self.largest_difference, (int, float)):  # a report from a file may hold anything
            changed += f", by up to {self.largest_difference:.3g}"
        places: list[tuple[str, Place | None, str]] = [("saved", self.saved, saved)]
        if _WORDINGS[self.kind].by_alias and not (self.kind == "refused" and self.aliased is None):
            places.append(("aliased", self.aliased, ""))
        if self._writer_unknown:
            places.append(("written", None, ""))
            # Not compared, it is the whole save for all the guard knows.
            bounded = self.kind in ("unseen", "recompute", "stashed", "wrapped", "refused")
            bound = "up to " if bounded and self.largest_difference is None else ""
            places.append(("read", self.written, bound + changed))
        else:
            bound = "up to " if self.kind == "refused" else ""
            places.append(("written", self.written, bound + changed))
            if self.caught == "read" and self.read != self.written:
                places.append(("read", self.read, ""))
        return places

    @property
    def _writer_unknown(self) -> bool:
        return not _WORDINGS[self.kind].seen and not self.operation

    @property
    def _alias_unseen(self) -> bool:
        """There may be none: ``x`` itself is written to, say, and torch.func saved what it had wrapped around it."""
        return self.kind == "write" and self.aliased is None

    def _unknown(self, label: str) -> str:
        if label == "saved" and self.kind == "refused":
            return "(watch() does not keep where: torchguard.strict() does)"
        if label == "aliased":
            return (
                "(none was seen: it is from before the guard, of a route it does not follow, or of torch's own making)"
            )
        if label == "written" and self._writer_unknown:
            return f"({_WORDINGS[self.kind].unknown_writer})"
        return "(no user code on the stack)"

    def _explanation(self) -> list[str]:
        text = _WORDINGS[self.kind].explanation
        if self.caught == "read":
            text = _IF_READ.sub(r"Backward is about to read \1", text)
        return text.splitlines()

    def _ways_out(self, paint: Any) -> list[str]:
        fix = _WORDINGS[self.kind].fix.format(name=self._aliased_name())
        if self._alias_unseen:
            fix = "do it after backward(), or on a clone()"
        return [
            f"  {paint('fix:  ', 'fix')} {fix}",
            f'  {paint("allow:", "fix")} with torchguard.allow("why"): ...',
        ]

    def _aliased_name(self) -> str:
        expression = self.aliased.expression if self.aliased else ""
        name = expression.removesuffix(".data")
        return name if name != expression and name.isprintable() and len(name) <= 30 else "x"


# Tracebacks and warnings show the name that users import.
for _public in (SavedTensorCorruptionError, SavedTensorCorruptionWarning, UnwatchedWarning, Violation):
    _public.__module__ = "torchguard"
