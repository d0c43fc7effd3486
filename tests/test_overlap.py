"""Does ``overlaps`` answer as counting bytes does, and as ``numpy.shares_memory`` does?"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchguard._memory import span_of
from torchguard._model import Span
from torchguard._overlap import overlaps


def span(address: int, itemsize: int, sizes: tuple[int, ...], strides: tuple[int, ...], device: str = "cpu") -> Span:
    return Span(device, address, itemsize, sizes, strides)


def bytes_of(a: Span) -> set[int]:
    """Every byte of a span, counted one by one."""
    starts = (
        a.address + sum(i * stride for i, stride in zip(index, a.strides, strict=True))
        for index in product(*map(range, a.sizes))
    )
    return {start + byte for start in starts for byte in range(a.itemsize)}


class _Fake:
    """Memory that does not exist, for NumPy to reason about."""

    def __init__(self, a: Span) -> None:
        self.__array_interface__ = {
            "data": (a.address, False),
            "shape": a.sizes,
            "strides": a.strides,
            "typestr": f"|V{a.itemsize}",
            "version": 3,
        }


def numpy_says(a: Span, b: Span) -> bool:
    return bool(np.shares_memory(np.asarray(_Fake(a)), np.asarray(_Fake(b))))


@st.composite
def spans(draw: Any, most: int = 4) -> Span:
    dimensions = draw(st.integers(0, 3))
    sizes = tuple(draw(st.integers(0 if draw(st.integers(0, 9)) == 0 else 1, most)) for _ in range(dimensions))
    strides = tuple(draw(st.integers(-24, 24) | st.sampled_from([0, 1, 2, 4, 8, 16, 32])) for _ in range(dimensions))
    return span(4096 + draw(st.integers(0, 48)), draw(st.sampled_from([1, 2, 3, 4, 8, 16])), sizes, strides)


@settings(max_examples=500, deadline=None)
@given(spans(), spans())
def test_overlap_is_a_shared_byte(a: Span, b: Span) -> None:
    truth = not bytes_of(a).isdisjoint(bytes_of(b))
    assert overlaps(a, b) is truth
    assert overlaps(b, a) is truth


@settings(max_examples=250, deadline=None)
@given(spans(most=40), spans(most=40))
def test_overlap_is_what_numpy_says(a: Span, b: Span) -> None:
    assert overlaps(a, b) is numpy_says(a, b)


@settings(max_examples=250, deadline=None)
@given(spans(), spans(), st.integers(0, 12))
def test_too_little_work_gives_no_answer_and_never_a_wrong_one(a: Span, b: Span, work: int) -> None:
    truth = not bytes_of(a).isdisjoint(bytes_of(b))
    assert overlaps(a, b, work) in (truth, None)


@settings(max_examples=100, deadline=None)
@given(spans())
def test_bounds_and_elements_are_those_of_the_bytes(a: Span) -> None:
    own = bytes_of(a)
    low, high = a.bounds
    assert (low, high) == ((min(own), max(own) + 1) if own else (a.address, a.address))
    assert a.elements == len(list(product(*map(range, a.sizes))))


@st.composite
def views(draw: Any, base: torch.Tensor) -> torch.Tensor:
    view = base
    for _ in range(draw(st.integers(1, 3))):
        if view.dim() == 0:
            break
        dim = draw(st.integers(0, view.dim() - 1))
        kind = draw(st.sampled_from(["select", "narrow", "step", "transpose", "bytes"]))
        size = view.shape[dim]
        if kind == "select" and size:
            view = view.select(dim, draw(st.integers(0, size - 1)))
        elif kind == "narrow":
            start = draw(st.integers(0, size))
            view = view.narrow(dim, start, draw(st.integers(0, size - start)))
        elif kind == "step" and size:
            index = [slice(None)] * view.dim()
            index[dim] = slice(draw(st.integers(0, size - 1)), None, draw(st.integers(1, 3)))
            view = view[tuple(index)]
        elif kind == "transpose":
            view = view.transpose(dim, draw(st.integers(0, view.dim() - 1)))
        elif kind == "bytes" and view.stride(-1) == 1:
            view = view.view(torch.int8)
    return view


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_views_of_one_tensor_overlap_where_a_write_to_one_shows_in_the_other(data: Any) -> None:
    base = torch.zeros(4, 3, 5, dtype=torch.int16)
    a, b = data.draw(views(base)), data.draw(views(base))
    a.fill_(1)
    here, there = span_of(a), span_of(b)
    assert here is not None
    assert there is not None
    # int16 ones have a zero byte: what counts is whether b has an element that a has a byte of.
    base.zero_()
    a.fill_(-1)
    assert overlaps(here, there) is bool(b.ne(0).any())


ROWS, COLUMNS = 6, 8


def matrix(address: int, rows: int, columns: int) -> Span:
    return span(address, 4, (rows, columns), (4 * COLUMNS, 4))


CASES = {
    "the same": (matrix(0, 6, 8), matrix(0, 6, 8), True),
    "neighbours": (matrix(0, 2, 8), matrix(2 * 4 * COLUMNS, 2, 8), False),
    "rows 0, 2, 4 and rows 1, 3, 5": (
        span(0, 4, (3, 8), (8 * COLUMNS, 4)),
        span(4 * COLUMNS, 4, (3, 8), (8 * COLUMNS, 4)),
        False,
    ),
    "columns 0 to 3 and columns 4 to 7": (matrix(0, 6, 4), matrix(16, 6, 4), False),
    "columns 0 to 4 and columns 4 to 7": (matrix(0, 6, 5), matrix(16, 6, 4), True),
    "even columns and odd columns": (span(0, 4, (6, 4), (32, 8)), span(4, 4, (6, 4), (32, 8)), False),
    "every second and every third": (span(0, 4, (12,), (8,)), span(4, 4, (8,), (12,)), True),
    "every fourth, two apart": (span(0, 4, (9,), (16,)), span(8, 4, (9,), (16,)), False),
    "a row and a column that cross": (span(64, 4, (8,), (4,)), span(12, 4, (6,), (32,)), True),
    "the real and the imaginary parts": (span(0, 4, (10,), (8,)), span(4, 4, (10,), (8,)), False),
    "upper bytes and lower bytes": (span(0, 1, (10,), (2,)), span(1, 1, (10,), (2,)), False),
    "half an element": (span(0, 8, (1,), (8,)), span(4, 4, (1,), (4,)), True),
    "an expanded scalar": (span(16, 4, (5, 5), (0, 0)), span(0, 4, (8,), (4,)), True),
    "an expanded scalar beside": (span(32, 4, (5, 5), (0, 0)), span(0, 4, (8,), (4,)), False),
    "empty, at the start": (span(0, 4, (0,), (4,)), span(0, 4, (8,), (4,)), False),
    "empty, in the middle": (span(8, 4, (0,), (4,)), span(0, 4, (8,), (4,)), False),
    "empty in one dimension only": (span(8, 4, (3, 0), (4, 4)), span(0, 4, (8,), (4,)), False),
    "both empty": (span(8, 4, (0,), (4,)), span(8, 4, (0,), (4,)), False),
    "scalars": (span(8, 4, (), ()), span(8, 4, (), ()), True),
    "scalars side by side": (span(8, 4, (), ()), span(12, 4, (), ()), False),
    "backwards": (span(28, 4, (8,), (-4,)), span(0, 4, (1,), (4,)), True),
    "backwards, between": (span(56, 4, (8,), (-8,)), span(4, 4, (8,), (8,)), False),
    "another device": (matrix(0, 6, 8), span(0, 4, (48,), (4,), device="cuda:0"), False),
}


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    a, b, truth = CASES[name]
    assert overlaps(a, b) is truth
    assert overlaps(b, a) is truth


def test_addresses_as_large_as_they_get() -> None:
    top = 2**64 - 4096
    assert overlaps(span(top, 4, (8,), (4,)), span(top + 28, 4, (8,), (4,))) is True
    assert overlaps(span(top, 4, (8,), (8,)), span(top + 4, 4, (8,), (8,))) is False


def test_a_hard_problem_ends_without_an_answer() -> None:
    """Random steps are a subset-sum problem, which nobody can bound; no tensor that a program makes has them."""
    random = np.random.default_rng(0)
    steps = tuple(int(step) for step in random.integers(2**21, 2**22, 20))
    hard = span(0, 1, (2,) * 20, steps)
    sums = np.zeros(1, dtype=np.int64)
    for step in steps:
        sums = np.concatenate([sums, sums + step])
    address = int(np.median(sums))
    while address in sums:
        address += 1
    point = span(address, 1, (), ())
    assert overlaps(hard, point, 2_000) is None
    assert overlaps(hard, point) in (None, False)


def test_a_programs_problems_take_few_steps() -> None:
    """Large tensors, sliced and transposed: a few hundred steps are plenty."""
    a = span(0, 4, (512, 64, 32, 32), (64 * 32 * 32 * 4, 32 * 32 * 4, 32 * 4, 4))
    for offset, sizes, strides in [
        (64, (512, 64, 32, 16), (64 * 32 * 32 * 4, 32 * 32 * 4, 32 * 4, 8)),
        (128, (32, 32, 64, 512), (4, 128, 4096, 262144)),
        (4, (100,), (1000,)),
    ]:
        assert overlaps(a, span(offset, 4, sizes, strides), 300) is True
    left, right = span(0, 4, (4096, 1000), (8000, 4)), span(4000, 4, (4096, 1000), (8000, 4))
    assert overlaps(left, right, 300) is False


def test_what_one_look_can_tell_takes_one_step() -> None:
    """Contiguous dimensions are one, and a single dimension needs no search."""
    point = span(4 * 777, 4, (), ())
    assert overlaps(point, point, 1) is True
    assert overlaps(span(0, 4, (7, 11, 13, 17), (4 * 2431, 4 * 221, 4 * 17, 4)), point, 1) is True
    assert overlaps(span(0, 4, (13, 17), (4 * 17, 4)), span(4 * 77 + 1, 1, (), ()), 1) is True
    assert overlaps(point, point, 0) is None
