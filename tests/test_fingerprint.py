"""Does a fingerprint tell memory that came back from memory that did not?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from torchguard import _fingerprint


def fingerprint(tensor: torch.Tensor) -> int:
    found = _fingerprint.of(tensor)
    assert found is not None
    return int(found)


def exchange_ends(tensor: torch.Tensor) -> None:
    """Whole words of eight bytes change places."""
    first = tensor[:2].clone()
    tensor[:2] = tensor[70_000:70_002]
    tensor[70_000:70_002] = first


#: Each of these escapes an exclusive or, a sum, or a sum of products with the position.
CHANGES: dict[str, Callable[[torch.Tensor], object]] = {
    "one bit of the first": lambda t: t.view(torch.int32)[:1].bitwise_xor_(1),
    "the sign of the last": lambda t: t[-1:].neg_(),
    "two signs": lambda t: t[:4:3].neg_(),
    "all signs": lambda t: t.neg_(),
    "two elements exchanged": lambda t: t[:2].copy_(t[:2].flip(0)),
    "two distant words exchanged": exchange_ends,
    "all turned round": lambda t: t.copy_(t.flip(0)),
    "moved by one": lambda t: t.copy_(t.roll(1)),
    "zeros": lambda t: t.zero_(),
    "a constant": lambda t: t.fill_(3.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_shows(change: Callable[[torch.Tensor], object]) -> None:
    tensor = torch.linspace(1, 2, 70_003)
    before = fingerprint(tensor)
    change(tensor)
    assert fingerprint(tensor) != before


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 1 << 15, (1 << 15) + 1])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64, torch.complex64, torch.bool])
def test_the_same_bytes_have_the_same_fingerprint_wherever_they_lie(size: int, dtype: torch.dtype) -> None:
    values = torch.arange(size).to(dtype)
    shifted = torch.cat([values[:1], values])[1:] if size else values.clone()
    assert fingerprint(values) == fingerprint(shifted) == fingerprint(values.clone())


def test_a_transposed_tensor_has_the_fingerprint_of_its_elements() -> None:
    tensor = torch.randn(5, 7)
    assert fingerprint(tensor.t()) == fingerprint(tensor.t().contiguous()) != fingerprint(tensor)


def test_memory_that_is_not_there_has_none() -> None:
    tensor = torch.randn(8)
    tensor.untyped_storage().resize_(0)
    assert _fingerprint.of(tensor) is None
