"""Has memory that was given up for a while come back as it was?

FSDP frees what is saved of its parameters after the forward pass and gathers it anew before backward reads it. A copy
would keep just the memory that it frees; sixty-four bits a save do not. ``torch.hash_tensor`` cannot be the
fingerprint: it is an exclusive or, blind to order and to what changes twice.
"""

from __future__ import annotations

import torch

from torchguard import _memory, _torch

#: Odd, so that multiplying loses no bit (those of splitmix64, as signed numbers).
_STEP, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685

_WORDS = 1 << 15


def of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The fingerprint of a tensor's bytes; None where it has none, or not all of its memory."""
    with _torch.hidden():
        if not _memory.can_be_copied([tensor]) or _memory.end_in_storage(tensor) > tensor.untyped_storage().nbytes():
            return None
        memory = _memory.contents_of(tensor)
        whole = memory.numel() // 8 * 8
        rest = torch.zeros(8, dtype=torch.uint8, device=memory.device)
        rest[: memory.numel() - whole] = memory[whole:]
        words = memory[:whole] if memory.storage_offset() % 8 == 0 else memory[:whole].clone()
        total = _scrambled(rest.view(torch.int64), _position(whole // 8))
        positions = torch.arange(_WORDS, device=memory.device).mul_(_STEP)
        for i, chunk in enumerate(words.view(torch.int64).split(_WORDS)):
            total += _scrambled(chunk + positions[: chunk.numel()], _position(i * _WORDS))
        return total


def _position(word: int) -> int:
    return (word * _STEP + (1 << 63)) % (1 << 64) - (1 << 63)


def _scrambled(words: torch.Tensor, position: int) -> torch.Tensor:
    """The sum of the words, each scrambled together with its position."""
    mixed = words + position
    mixed.bitwise_xor_((mixed >> 32).bitwise_and_(0xFFFFFFFF)).mul_(_FIRST)
    mixed.bitwise_xor_((mixed >> 29).bitwise_and_(0x7FFFFFFFF)).mul_(_SECOND)
    mixed.bitwise_xor_((mixed >> 32).bitwise_and_(0xFFFFFFFF))
    return mixed.sum()
