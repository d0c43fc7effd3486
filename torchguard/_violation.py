"""What does torchguard say about a violation, and how does it read?"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from torchguard._model import Place

Kind = Literal["write", "uncounted", "rebind", "unseen"]

_RESET = "\x1b[0m"
_COLOURS = {"headline": "\x1b[1;31m", "label": "\x1b[1m", "place": "\x1b[36m", "fix": "\x1b[32m"}


class SavedTensorCorruptionError(RuntimeError):
    """Raised where a tensor that autograd saved for backward would be, or was, changed without autograd
    noticing.

    Attributes:
        violation: the :class:`Violation` that is being reported.
    """

    def __init__(self, violation: Violation) -> None:
        super().__init__(violation)
        self.violation = violation

    def __str__(self) -> str:
        return str(self.violation)


class SavedTensorCorruptionWarning(UserWarning):
    """Warned, once a site, where :class:`SavedTensorCorruptionError` would be raised under ``strict()``."""


@dataclass(frozen=True)
class Violation:
    """A silent write that overlaps a live save.

    Attributes:
        kind: ``"write"`` (through an alias, by a call that the guard saw), ``"uncounted"`` (by a call that
            moves no version counter, whatever it writes through), ``"rebind"`` (``x.data = y`` on the tensor
            that was saved) or ``"unseen"`` (a write that only the alias's version counter gave away).
        operation: the call that wrote, ``"zero_()"`` say; ``""`` if it was not seen.
        saved: where the tensor was saved for backward, or None if no user code was on the stack.
        aliased: where the alias that was written through was taken, if the guard saw it being taken.
        written: where the write is; for an unseen write, where backward read the save.
        read: where backward read the save, if the violation was found then.
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
        lines += ["", *(f"  {line}" for line in self._explanation()), *self._ways_out(paint)]
        return "\n".join(lines)

    def _headline(self) -> str:
        what = {
            "write": f"{self.operation} through {'.data' if self.aliased else 'an alias'}",
            "uncounted": f"{self.operation}, which moves no version counter,",
            "rebind": self.operation,
            "unseen": "a write through an alias",
        }[self.kind]
        verb = "would corrupt" if self.caught == "write" else "may have corrupted"
        return f"{what} {verb} a tensor saved for backward"

    def _places(self) -> list[tuple[str, Place | None, str]]:
        shape = ", ".join(map(str, self.shape))
        saved = f"{self.dtype}[{shape}] on {self.device}" + (f", by {self.saved_by}" if self.saved_by else "")
        changed = f"{self.elements} of {self.of} elements"
        places: list[tuple[str, Place | None, str]] = [("saved", self.saved, saved)]
        if self.kind in ("write", "unseen"):
            places.append(("aliased", self.aliased, ""))
        if self.kind == "unseen":
            places.append(("written", None, ""))
            places.append(("read", self.written, f"up to {changed}"))
        else:
            places.append(("written", self.written, changed))
            if self.caught == "read" and self.read != self.written:
                places.append(("read", self.read, ""))
        return places

    def _unknown(self, label: str) -> str:
        if label == "aliased":
            return "(the alias was made before the guard came, or by a route it does not follow)"
        if label == "written" and self.kind == "unseen":
            return "(between alias and read, by a call that is not patched: out=, torch.ops or an extension)"
        return "(no user code on the stack)"

    def _explanation(self) -> list[str]:
        if self.kind == "rebind":
            return [
                "autograd cannot see this: the tensor that it saved points to other memory from now on, and",
                "its version counter does not move. If backward reads it, the gradient is wrong. Without",
                "torchguard, backward() would finish with wrong gradients and no error.",
            ]
        if self.kind == "unseen":
            return [
                "The alias's own version counter moved, the saved tensor's did not: autograd cannot see that",
                "its memory was written to. Without torchguard, backward() would finish with wrong gradients",
                "and no error. To stop at the line that writes, use torchguard.strict(every_call=True).",
            ]
        return [
            "autograd cannot see this write: it does not move the version counter of the saved tensor.",
            "If backward reads the saved tensor, the gradient is wrong. Without torchguard, backward() would",
            "finish with wrong gradients and no error.",
        ]

    def _ways_out(self, paint: Any) -> list[str]:
        name = self._aliased_name()
        if self.kind == "uncounted":
            fix = "do it after backward(), or use an operation that moves the counter, which autograd checks"
        elif self.kind == "rebind":
            fix = "assign after backward(); to have autograd check it, use copy_() under torch.no_grad()"
        else:
            fix = (
                f"do it after backward(), or on {name}.data.clone(); to have autograd check it, use "
                f"{name}.detach() under torch.no_grad()"
            )
        return [
            f"  {paint('fix:  ', 'fix')} {fix}",
            f'  {paint("allow:", "fix")} with torchguard.allow("why"): ...',
        ]

    def _aliased_name(self) -> str:
        expression = self.aliased.expression if self.aliased else ""
        name = expression.removesuffix(".data")
        return name if name != expression and name.isprintable() and len(name) <= 30 else "x"
