"""Of PyTorch's own operators with their own sample inputs: is each write to what they saved seen, and nothing else?

For every sample the operator runs with and without the guard, which must make no difference. Then each of its inputs and
outputs in turn is written to through ``.data`` between forward and backward: where the gradients are then not those of the
run without the write, the guard must have spoken, and where no live save's bytes changed, it must not.
"""

from __future__ import annotations

import sys
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from generated.runs import Recorder, differ, exact_clone, quiet, same_bits, taken_down

import torchguard


def operators() -> list[Any]:
    """PyTorch's database of operators: those that have a gradient."""
    try:
        import expecttest  # noqa: F401
    except ImportError:  # torch's test classes derive from its TestCase, and nothing here uses them
        stand_in: Any = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stand_in
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    return [operator for operator in op_db if operator.supports_autograd]


@dataclass
class Result:
    """What was found of one operator.

    Attributes:
        samples: how many sample inputs were run.
        writes: how many writes were made.
        corrupting: how many of them made a gradient wrong.
        caught: of how many of these the guard spoke.
        unread: the inputs and outputs of which a save was written to that no gradient uses.
        failures: what is wrong, in words.
    """

    name: str
    samples: int = 0
    writes: int = 0
    corrupting: int = 0
    caught: int = 0
    unread: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)


class _Run:
    """One forward and backward of one sample, on tensors of its own."""

    def __init__(self, operator: Any, sample: Any) -> None:
        self.operator = operator
        memo: dict[int, torch.Tensor] = {}
        self.args = _copied((sample.input, *sample.args), memo)
        self.kwargs = _copied(sample.kwargs, memo)
        self.inputs = list({id(tensor): tensor for tensor in _tensors((self.args, self.kwargs))}.values())
        self.outputs: list[torch.Tensor] = []

    def forward(self) -> None:
        torch.manual_seed(20)
        self.outputs = list(_tensors(self.operator.op(*self.args, **self.kwargs)))

    def backward(self) -> dict[str, Any]:
        heads = [output for output in self.outputs if output.requires_grad]
        if heads:
            torch.autograd.backward(heads, [_seed(head) for head in heads])
        results = {f"grad of input {i}": tensor.grad for i, tensor in enumerate(self.inputs) if tensor.is_leaf}
        return {name: taken_down(value) for name, value in results.items() if value is not None}

    def values(self) -> dict[str, Any]:
        return {f"output {i}": taken_down(output) for i, output in enumerate(self.outputs)}

    def places(self) -> list[str]:
        """The names of what can be written to."""
        return [f"input {i}" for i in range(len(self.inputs))] + [f"output {i}" for i in range(len(self.outputs))]

    def at(self, place: str) -> torch.Tensor:
        kind, _, number = place.partition(" ")
        return (self.inputs if kind == "input" else self.outputs)[int(number)]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _copied(value: Any, memo: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        if id(value) not in memo:
            memo[id(value)] = exact_clone(value.detach()).requires_grad_(value.requires_grad)
        return memo[id(value)]
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        items = [_copied(item, memo) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: _copied(item, memo) for key, item in value.items()}
    return value


def _seed(head: torch.Tensor) -> torch.Tensor:
    """A gradient to begin with: no two elements alike."""
    with torch.no_grad():
        seed = torch.linspace(0.5, 1.5, max(head.numel(), 1), dtype=torch.float64)[: head.numel()]
        return seed.reshape(head.shape).to(head.dtype)


def write(tensor: torch.Tensor) -> None:
    """Change every element through ``.data``; indices become other valid ones."""
    alias = tensor.data
    if alias.dtype == torch.bool:
        alias.logical_not_()
    elif alias.is_floating_point() or alias.is_complex():
        alias.mul_(0.5).add_(0.25)
    else:
        alias.zero_()


_DTYPES = (torch.float64, torch.float32, torch.complex128, torch.bfloat16)


def examine(operator: Any, samples: int) -> Result:
    """All that is to be known of one operator, from its first sample inputs."""
    result = Result(operator.formatted_name)
    dtype = next((one for one in _DTYPES if one in operator.supported_backward_dtypes("cpu")), None)
    if dtype is None:
        return result
    with quiet():
        torch.manual_seed(20)
        for sample in islice(operator.sample_inputs("cpu", dtype, requires_grad=True), samples):
            try:
                probe = _Run(operator, sample)
            except (RuntimeError, TypeError):  # sparse, nested: no memory to copy
                continue
            result.samples += 1
            _without_a_write(result, operator, sample)
            for place in _places(operator, sample, probe):
                _with_a_write(result, operator, sample, place)
    return result


def _places(operator: Any, sample: Any, probe: _Run) -> list[str]:
    try:
        probe.forward()
        probe.backward()
    except Exception:
        return []
    return [place for place in probe.places() if probe.at(place).layout == torch.strided and probe.at(place).numel()]


def _outcome(run: _Run, guard: AbstractContextManager[Any], place: str | None = None, look: Any = None) -> Any:
    """The results, or the error; the write's own is put in brackets."""
    try:
        with guard:
            run.forward()
            values = run.values()
            if place is not None:
                write(run.at(place))
                if look is not None:
                    look()
            return {**(values if place is None else {}), **run.backward()}
    except Exception as error:
        error.__traceback__ = None
        return error


def _same(a: Any, b: Any, compare: Callable[[Any, Any], list[str]] = same_bits) -> bool:
    if isinstance(a, Exception) or isinstance(b, Exception):
        return type(a) is type(b) and str(a) == str(b)
    return not compare(a, b)


def _without_a_write(result: Result, operator: Any, sample: Any) -> None:
    plain = _outcome(_Run(operator, sample), nullcontext())
    again = _outcome(_Run(operator, sample), nullcontext())
    guard = torchguard.strict()
    guarded = _outcome(_Run(operator, sample), guard)
    if guard.violations:
        result.failures.append(f"a false alarm without a write: {guard.violations[0]}")
    elif not _same(plain, guarded, same_bits if _same(plain, again) else differ):
        result.failures.append(f"the guard changes {_short(plain)} to {_short(guarded)}")


def _with_a_write(result: Result, operator: Any, sample: Any, place: str) -> None:
    truth = _outcome(_Run(operator, sample), nullcontext())
    if isinstance(truth, Exception):
        return
    truth = {name: value for name, value in truth.items() if name.startswith("grad")}
    plain = _outcome(_Run(operator, sample), nullcontext(), place)
    recorder = Recorder()
    _outcome(_Run(operator, sample), recorder.hooks(), place, recorder.look)
    guard = torchguard.strict()
    guarded = _outcome(_Run(operator, sample), guard, place)
    result.writes += 1
    if isinstance(plain, Exception):
        if not guard.violations and not _same(plain, guarded):
            result.failures.append(f"{place}: {_short(guarded)} instead of {_short(plain)}")
        return
    wrong = bool(differ(plain, truth))
    if wrong:
        result.corrupting += 1
        result.caught += bool(guard.violations)
        if not guard.violations:
            result.failures.append(f"{place} written to: missed")
    elif guard.violations:
        if recorder.changed:
            result.unread.add(place)
        else:
            result.failures.append(f"{place} written to: a false alarm: {guard.violations[0]}")
    elif not _same(plain, guarded, differ):
        result.failures.append(f"{place} written to: the guard changes {_short(plain)} to {_short(guarded)}")


def _short(outcome: Any) -> str:
    return f"{type(outcome).__name__}: {outcome}"[:200]
