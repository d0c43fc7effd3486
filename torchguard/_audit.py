"""Are the bytes of a save still those that were kept, where asking at once would hold up the device?

On a GPU the answer to a comparison has to be waited for. So it is left on the device, and all of one backward pass are
asked for together when it ends: then the gradients are there, and backward() raises all the same. What is kept until
then is a number a save, and where it was saved; not the save.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from weakref import WeakValueDictionary

import torch

from torchguard import _memory, _places, _policy, _torch, _verdict
from torchguard._saves import Save
from torchguard._violation import Kind, Violation

#: Devices on which a comparison is answered at once.
SYNCHRONOUS = {"cpu"}


@dataclass
class _Question:
    """Whether a save differs: how many elements, still on the device, and what is to be said."""

    changed: torch.Tensor
    describe: Callable[[int], Violation]
    guard: _policy.Respondent


class _Questions:
    """Those of one backward pass; they live as long as it does."""

    def __init__(self) -> None:
        self.asked: list[_Question] = []


_by_backward: WeakValueDictionary[int, _Questions] = WeakValueDictionary()


def put_off(save: Save, kind: Kind) -> bool:
    """Compare a save with the copy that was made of it, and ask for the result when backward ends.

    Returns whether that is so; otherwise it has to be compared here and now.
    """
    remarks = save.remark()
    guard = _verdict.in_charge(save)
    if guard is None or guard.repairs or _policy.state.reasons:
        return False
    if _torch.is_capturing(save.tensor):
        return True  # nobody may ask now, or whenever the graph is replayed
    questions = _questions()
    if questions is None:
        return False
    with _torch.hidden():
        tensor = _torch.behind(save.tensor)
        if remarks.proof is None:
            then, now = remarks.contents or [], _memory.strided_parts_of(tensor)
        else:
            then, now = [remarks.proof], [tensor] if _memory.readable(tensor) else []
        if [part.shape for part in then] != [part.shape for part in now]:
            return False
        changed = [_memory.differing_elements(a, b).sum() for a, b in zip(now, then, strict=True)]
    questions.asked.append(_Question(torch.stack(changed).sum(), _describer(save, kind), guard))
    return True


def _questions() -> _Questions | None:
    """Those of the backward pass that runs in this thread; None where none does."""
    number = _torch.current_backward()
    questions = _by_backward.get(number)
    if questions is None:
        questions = _Questions()
        if not _torch.when_backward_ends(partial(_settle, questions)):
            return None
        _by_backward[number] = questions
    return questions


def _settle(questions: _Questions) -> None:
    asked, questions.asked = questions.asked, []
    by_device: dict[torch.device, list[_Question]] = {}
    for question in asked:
        by_device.setdefault(question.changed.device, []).append(question)
    for group in by_device.values():
        with _torch.hidden():
            counts: list[int] = torch.stack([question.changed for question in group]).tolist()  # the one wait
        for question, count in zip(group, counts, strict=True):
            if count:
                question.guard.respond(question.describe(count))


def _describer(save: Save, kind: Kind) -> Callable[[int], Violation]:
    """What is to be said of a save, without the save."""
    trace = Save.__new__(Save)
    trace.code, trace.offset, trace.inner_code, trace.inner_offset = (
        save.code,
        save.offset,
        save.inner_code,
        save.inner_offset,
    )
    trace.node = save.node
    read = _places.user_instruction(sys._getframe(1))
    known = _memory.describe(save.tensor)
    size = _torch.behind(save.tensor).numel()
    thread = threading.current_thread().name

    def describe(elements: int) -> Violation:
        place = _places.place_of(read)
        return Violation(
            kind=kind,
            operation="",
            saved=_places.place_of(trace.instruction),
            aliased=None,
            written=place,
            read=place,
            saved_by=trace.operation,
            elements=min(elements, size),
            of=size,
            caught="read",
            thread=thread,
            **known,
        )

    return describe
