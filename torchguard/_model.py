"""What does torchguard talk about, as plain values: a place in the user's code, a span of memory?"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """One place in the user's code.

    Attributes:
        file: path of the source file, as Python knows it.
        line: line number, counted from 1.
        function: qualified name of the function that contains the line.
        source: the source line without its indentation, or ``""`` where no source is to be had.
        expression: the expression that ran, or ``""`` where this Python does not say (before 3.11).
    """

    file: str
    line: int
    function: str
    source: str = ""
    expression: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Span:
    """The memory of one strided tensor, in bytes.

    Attributes:
        device: the device's name; two spans on different devices never overlap.
        address: address of the first element.
        itemsize: bytes an element.
        sizes: elements along each dimension.
        strides: distance in bytes between neighbours along each dimension.
    """

    device: str
    address: int
    itemsize: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many elements the span has."""
        count = 1
        for size in self.sizes:
            count *= size
        return count

    @property
    def bounds(self) -> tuple[int, int]:
        """First byte and one past the last byte; equal where the span has no elements."""
        if 0 in self.sizes:
            return self.address, self.address
        low = high = self.address
        for size, stride in zip(self.sizes, self.strides, strict=True):
            reach = (size - 1) * stride
            if reach < 0:
                low += reach
            else:
                high += reach
        return low, high + self.itemsize
