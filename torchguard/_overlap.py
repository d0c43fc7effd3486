"""Do two strided spans of memory share a byte? Knows plain integers only.

Two spans overlap when there are indices ``i`` and ``j`` and bytes ``p`` and ``q`` within an element with

    a.address + sum(i_k * a.stride_k) + p  ==  b.address + sum(j_k * b.stride_k) + q

a linear Diophantine equation in bounded unknowns, the problem that ``numpy.shares_memory`` solves. Deciding
it is NP-hard in general, but the strides of tensors nest (each is a multiple of the next, or nearly), and
then a depth-first search that prunes by range and by greatest common divisor ends at once. The search is
bounded all the same: past the bound the answer is "maybe", and the caller has to look at the memory itself.
"""

from __future__ import annotations

from math import gcd

from torchguard._model import Span

# Nodes of the search tree. Programs seen so far need fewer than a hundred; 20,000 take about 10 ms.
_WORK = 20_000


class _TooMuchWork(Exception):
    pass


def overlaps(a: Span, b: Span, work: int = _WORK) -> bool | None:
    """Whether the two spans share at least one byte; None where ``work`` steps do not suffice to tell."""
    if a.device != b.device:
        return False
    a_low, a_high = a.bounds
    b_low, b_high = b.bounds
    if a_low >= b_high or b_low >= a_high or a_low == a_high or b_low == b_high:
        return False
    # Normalise to sum(step * x) == target with steps > 0 and 0 <= x <= limit: the terms of b are mirrored
    # (x becomes limit - x), which moves their sign to the left-hand side and their reach to the target.
    terms = _terms(a) + _terms(b)
    target = (b_high - 1) - a_low
    try:
        return _solvable(_merged(terms), target, [work])
    except _TooMuchWork:
        return None


def _terms(span: Span) -> list[tuple[int, int]]:
    """(step, limit) for every dimension that moves, and for the bytes within an element."""
    terms = [
        (abs(stride), size - 1)
        for size, stride in zip(span.sizes, span.strides, strict=True)
        if size > 1 and stride != 0
    ]
    if span.itemsize > 1:
        terms.append((1, span.itemsize - 1))
    return terms


def _merged(terms: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same set of sums from fewer terms, greatest step first.

    A term whose step is reached, without a gap, by the terms below it extends their run: dimensions that are
    contiguous become one.
    """
    merged: list[tuple[int, int]] = []
    for step, limit in sorted(terms):
        if merged:
            last_step, last_limit = merged[-1]
            if step % last_step == 0 and step <= last_step * (last_limit + 1):
                merged[-1] = (last_step, last_limit + (step // last_step) * limit)
                continue
        merged.append((step, limit))
    merged.reverse()
    return merged


def _solvable(terms: list[tuple[int, int]], target: int, work: list[int]) -> bool:
    """Whether sum(step * x) == target has a solution with 0 <= x <= limit; the target is within reach."""
    reach = [0] * (len(terms) + 1)
    divisor = [0] * (len(terms) + 1)
    for k in range(len(terms) - 1, -1, -1):
        step, limit = terms[k]
        reach[k] = reach[k + 1] + step * limit
        divisor[k] = gcd(divisor[k + 1], step)

    def search(k: int, rest: int) -> bool:
        work[0] -= 1
        if work[0] < 0:
            raise _TooMuchWork
        if k == len(terms):
            return rest == 0
        if rest % divisor[k]:
            return False
        step, limit = terms[k]
        if k == len(terms) - 1:
            return True  # within reach and divisible: x = rest // step
        most = min(limit, rest // step)
        least = max(0, -((reach[k + 1] - rest) // step))
        return any(search(k + 1, rest - step * x) for x in range(most, least - 1, -1))

    return search(0, target)
