"""Does watch() refuse every program of the catalogue that it must, and none without a reason that can be computed?

The reason is a run in plain PyTorch in which ``.data`` is an alias that shares the counter, as ``.detach()`` makes it. What
that run refuses, watch() must refuse; what else watch() refuses must write by a call that moves no counter. Everything
else has the results of plain PyTorch, bit for bit.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import catalogue  # noqa: F401
import pytest
import torch
from harness import (
    PROGRAMS,
    VERDICTS,
    Program,
    Run,
    _quiet,
    _TorchAsItIs,
    outcome_of,
    plain_run,
    row_of,
    same_bits,
    skip_what_is_lacking,
)

import torchguard

#: Corrupting programs on these routes may finish as in plain PyTorch: watch() has no save hooks and patches no call that
#: moves a counter.
NOT_COVERED = {
    "alias without .data": "set_, from_numpy and the like make an alias with a counter of its own",
    "alias from before the guard": "its counter cannot be changed",
    "allow": "allowed",
    "checkpoint": "what is recomputed was never saved",
    "memory exported from torch": "no counter belongs to it",
    "no Python sees it": "no counter moves with a raw pointer, and nothing checks what a Function stashed",
    "out= and the like": "y = x.data gives one memory two counters for good where it was assigned",
    "preserved counter": "the block is there to hide writes from the counter",
    "resize_": "exported memory",
    "save hooks of the program": "PyTorch makes no check under save hooks",
    "shared memory": "written by another process",
    "storage methods": "a storage whose tensor was asked for it before the guard",
    "torch.compile": "what a Function stashed is not checked, nor what inductor saved of a view",
    "torch.func": "inside transforms of tensors that are differentiated outside as well, and pulls after them",
    "wrapper subclass": "what is written to inside a wrapper moves the counter of what is inside",
    "running statistics": "statistics that another operation than batch normalisation saved",
}

#: Of these routes the programs that must be refused all the same.
COVERED = re.compile(
    r"^(?!.*(before_the_guard|storage_object)).*(from_dlpack_by_torch|alias_from_dlpack(_of|_int|$)|wrapped_data)"
)

#: Single programs.
NOT_COVERED_PROGRAMS = {
    "ordinary_autograd_inside_a_transform": "as on the route torch.func",
    "written_in_the_memory_it_was_rebound_to_before_the_save": "two counters over one memory",
    "nested_storage": "no plain tensor over the memory of a nested one shares its counter",
    "nested_numpy": "as with other memory that was exported",
    "parameters_pointed_into_a_flat_buffer_then_the_buffer_updated": "two counters over one memory",
}

#: Writes that count as such even where they change no byte, or another tensor over the same counter.
MOVED_BY_WATCH = {
    "memory exported from torch",
    "operator that moves no counter",
    "running statistics",
    "storage methods",
    "training",
    "vector_to_parameters",
    "x.data = y",
}

#: Here a plain ``.data`` stays plain: see Note [Who keeps the plain alias].
STAYS_PLAIN = {"allow", "torch.func", "save hooks switched off", "torch.compile", "alias from before the guard"}

REFUSES = re.compile(r"modified by an inplace operation|has been modified inplace")


class _AsDetached:
    """``.data`` that shares the counter, in plain PyTorch."""

    def __init__(self) -> None:
        self.original: Any = torch.Tensor.data

    def __get__(self, tensor: Any, owner: Any = None) -> Any:
        return self.original if tensor is None else tensor.detach()

    def __set__(self, tensor: Any, value: Any) -> None:
        self.original.__set__(tensor, value)


@contextlib.contextmanager
def _as_detached() -> Iterator[None]:
    torch.Tensor.data = _AsDetached()  # type: ignore[assignment]
    try:
        yield
    finally:
        del torch.Tensor.data


def _without_versions(text: str) -> str:
    return re.sub(r"at version \d+; expected version \d+", "", text)


def check_watched(case: Program) -> None:
    """watch() does with the program what it must."""
    skip_what_is_lacking(case)
    plain = plain_run(case)
    verdict = VERDICTS[row_of(case)]["watch"]
    before = _TorchAsItIs()
    with _quiet() as caught:
        found = outcome_of(case, Run(), torchguard.watch)
    left = before.differences()
    assert not left, f"{case}: left behind: {left}"
    assert not [note for note in caught if isinstance(note.message, torchguard.SavedTensorCorruptionWarning)]
    assert (verdict == "PyTorch refuses") == (plain.error is not None)
    if plain.error is not None:
        assert found.error is not None, f"{case}: PyTorch refuses it, under watch() it passes"
        assert isinstance(found.error, type(plain.error))
        assert _without_versions(str(plain.error)) in _without_versions(str(found.error))
        return
    refused = found.error is not None
    if refused:
        assert isinstance(found.error, RuntimeError), f"{case}: {found.error!r}"
        assert REFUSES.search(str(found.error)), f"{case}: {found.error!r}"
    else:
        assert same_bits(found.results, plain.results), f"{case}: {found.results} is not {plain.results}"
    assert not (refused and verdict == "silent"), f"{case}: {found.error}"
    if verdict == "raises, if covered":
        free = (case.route in NOT_COVERED and not COVERED.search(case.name)) or case.name in NOT_COVERED_PROGRAMS
        assert refused or free, f"{case}: missed"
    with _quiet():
        detached = None if case.route in STAYS_PLAIN or case.allowed else outcome_of(case, Run(), _as_detached).error
    if detached is not None and REFUSES.search(str(detached)):
        assert refused, f"{case}: with detach() PyTorch refuses it: {detached}"
    elif refused and case.kind != "corrupting":
        moved = case.route in MOVED_BY_WATCH or re.search("apply_|map_|map2_", case.name)
        assert moved or case.route in STAYS_PLAIN, f"{case}: refused for no reason: {found.error}"


@pytest.mark.parametrize("case", PROGRAMS, ids=str)
def test_watch_refuses_what_it_must(case: Program) -> None:
    check_watched(case)
