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
    "two signs in one word": lambda t: t[:2].neg_(),
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


@pytest.mark.parametrize("offset", range(18))
def test_memory_at_any_offset_has_the_fingerprint_of_its_bytes(offset: int) -> None:
    values = torch.arange(41, dtype=torch.uint8)
    assert fingerprint(torch.cat([values.new_zeros(offset), values])[offset:]) == fingerprint(values)


@pytest.mark.parametrize("words", range(1, 26))
def test_the_last_bytes_have_a_place_of_their_own(words: int) -> None:
    """They are fewer than a word has, and are filled up with zeros: exchanged with any other word, they show."""
    tensor = torch.zeros(2 * words + 1, dtype=torch.int32)
    tensor[::2] = torch.arange(1, words + 2)
    before = fingerprint(tensor)
    for i in range(words):
        exchanged = tensor.clone()
        exchanged[2 * i], exchanged[-1] = tensor[-1], tensor[2 * i]
        assert fingerprint(exchanged) != before


def test_one_bit_more_or_less_changes_half_of_the_fingerprint() -> None:
    """Whichever bit it is, each bit of the fingerprint may change: changes that belong together do not cancel out."""
    random = torch.Generator().manual_seed(0)
    samples = 60
    flipped = torch.zeros(64, 64)  # bit of the word, bit of the fingerprint
    for _ in range(samples):
        tensor = torch.randint(-(2**62), 2**62, (4,), generator=random)
        before = fingerprint(tensor)
        for bit in range(64):
            changed = tensor.clone()
            changed[2] ^= 1 << bit if bit < 63 else -(1 << 63)
            difference = (fingerprint(changed) ^ before) % (1 << 64)
            flipped[bit] += torch.tensor([difference >> place & 1 for place in range(64)])
    share = flipped / samples
    assert share.min() > 0.1
    assert share.max() < 0.9
    assert abs(share.mean() - 0.5) < 0.01
