"""Is what ``_memory`` says of a tensor's memory and counter what a look at the tensor shows?"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from torchguard import _memory
from torchguard._counts import COUNTS
from torchguard._memory import (
    changed_bytes,
    describe,
    replicas_of,
    same_bytes,
    shares_counter,
    span_of,
    storage_of,
    touched_elements,
    version_of,
)

# ---- spans -------------------------------------------------------------------------------------------------

STRIDED: dict[str, Callable[[], torch.Tensor]] = {
    "contiguous": lambda: torch.zeros(3, 4),
    "scalar": lambda: torch.tensor(1.0),
    "row": lambda: torch.zeros(3, 4)[1],
    "column": lambda: torch.zeros(3, 4)[:, 1],
    "transpose": lambda: torch.zeros(3, 4).t(),
    "step": lambda: torch.zeros(9)[1::3],
    "expanded": lambda: torch.zeros(3, 1).expand(3, 5),
    "overlapping windows": lambda: torch.zeros(9).unfold(0, 4, 1),
    "as_strided": lambda: torch.zeros(20).as_strided((2, 3), (7, 2), 3),
    "bool": lambda: torch.zeros(5, dtype=torch.bool),
    "int8 of float": lambda: torch.zeros(4).view(torch.int8)[1:],
    "double": lambda: torch.zeros(4, dtype=torch.float64)[2:],
    "half": lambda: torch.zeros(4, dtype=torch.bfloat16),
    "complex": lambda: torch.zeros(4, dtype=torch.complex64)[1:],
    "real part": lambda: torch.zeros(4, dtype=torch.complex64).real,
    "imaginary part": lambda: torch.zeros(4, dtype=torch.complex64).imag,
    "leaf": lambda: torch.zeros(4, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.zeros(4)),
    "non-leaf": lambda: torch.zeros(4, requires_grad=True) * 2,
    "of numpy": lambda: torch.from_numpy(np.zeros((3, 4))),
    "of the middle of numpy": lambda: torch.from_numpy(np.zeros(12)[3:]),
    "channels last": lambda: torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "inference": lambda: _inference(),
    "empty view": lambda: torch.zeros(6)[3:3],
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8),
}


def _inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.zeros(4)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("kind", STRIDED)
def test_span_is_where_the_tensor_lies(kind: str) -> None:
    tensor = STRIDED[kind]()
    span = span_of(tensor)
    assert span is not None
    size = tensor.element_size()
    assert span.address == tensor.untyped_storage().data_ptr() + tensor.storage_offset() * size
    assert span.address == tensor.data_ptr() or tensor.numel() == 0
    assert (span.itemsize, span.sizes) == (size, tuple(tensor.shape))
    assert span.strides == tuple(stride * size for stride in tensor.stride())
    assert span.device == "cpu"
    assert span.elements == tensor.numel()


def _fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.zeros(3)


def _vmapped() -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    torch.func.vmap(lambda x: seen.append(x) or x)(torch.zeros(3, 2))
    return seen


WITHOUT_MEMORY: dict[str, Callable[[], torch.Tensor]] = {
    "meta": lambda: torch.zeros(3, device="meta"),
    "fake": _fake,
    "sparse": lambda: torch.eye(3).to_sparse(),
    "empty": lambda: torch.empty(0),
    "mkldnn": lambda: torch.zeros(3, 4).to_mkldnn(),
    "freed storage": lambda: _freed(),
}


def _freed() -> torch.Tensor:
    tensor = torch.zeros(4)
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WITHOUT_MEMORY)
def test_span_is_none_where_there_is_no_memory(kind: str) -> None:
    tensor = WITHOUT_MEMORY[kind]()
    assert span_of(tensor) is None
    storage_of(tensor)  # does not raise
    version_of(tensor)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["csr", "csc", "nested", "jagged"])
def test_span_of_exotic_layouts_is_none(layout: str) -> None:
    if layout in ("csr", "csc"):
        tensor = getattr(torch.eye(3), f"to_sparse_{layout}")()
    else:
        kind = torch.jagged if layout == "jagged" else torch.strided
        tensor = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=kind)
    assert span_of(tensor) is None


def test_subclass_is_not_called() -> None:
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *_: Any, **__: Any) -> Any:
            raise AssertionError("user code was called")

    tensor = torch.zeros(3, 2).as_subclass(Loud)
    assert same_bytes(tensor, tensor)
    assert span_of(tensor) is not None
    assert storage_of(tensor)
    assert version_of(tensor) == 0
    assert describe(tensor) == {"dtype": "float32", "shape": (3, 2), "device": "cpu"}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_what_has_no_memory_lies_in_no_storage() -> None:
    for layout in ("coo", "csr"):
        tensor = getattr(torch.eye(3), f"to_sparse_{layout}")()
        assert storage_of(tensor) == 0
        assert not _memory.has_memory(tensor)

    def look(x: torch.Tensor) -> torch.Tensor:
        assert not _memory.has_memory(x), "a wrapper of torch.func's: asked with the transform in force"
        return x.sum()

    torch.func.grad(look)(torch.ones(3))


def test_a_mode_is_not_asked() -> None:
    class Loud(TorchFunctionMode):
        def __torch_function__(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("user code was called")

    tensor = torch.zeros(3, 2)
    with Loud():
        span, counter = span_of(tensor), _memory.counter_of(tensor)
        same = same_bytes(tensor, tensor)
    assert span == span_of(tensor)
    assert shares_counter(counter, tensor)
    assert same


def test_what_keeps_no_version_has_not_moved() -> None:
    assert not _memory.has_moved(_inference(), 0)
    tensor = torch.zeros(2)
    assert not _memory.has_moved(tensor, 0)
    tensor.add_(1)
    assert _memory.has_moved(tensor, 0)


def test_a_wrapper_of_a_transform_moves_the_counters_inside_it() -> None:
    tensor, told = torch.ones(3), []

    def look(x: torch.Tensor) -> torch.Tensor:
        told.append(shares_counter(x, tensor))
        version = tensor._version
        x.add_(0)
        told.append(tensor._version != version)
        return x.sum()

    torch.vmap(look)(tensor[None])
    tensor = torch.ones(1, 3)
    torch.vmap(look)(tensor)
    assert told == [True, True, True, True]


def test_a_copy_is_made_of_what_is_reached_and_counted() -> None:
    whole = torch.arange(40.0)
    before, size = COUNTS.copies, whole.untyped_storage().nbytes()
    part, beside, other = whole[30:], whole[32:34], torch.ones(2)
    replicas = replicas_of([part, other], [beside])
    assert COUNTS.copies == before + 2, "one for each storage"
    assert whole.untyped_storage().nbytes() == size
    assert torch.equal(replicas[id(part)], part)
    assert replicas[id(part)].untyped_storage().nbytes() <= 4 * len(part) + 16
    replicas[id(part)][2] = 7
    assert float(replicas[id(beside)][0]) == 7


def test_the_like_of_what_inference_mode_made_reads_the_same() -> None:
    with torch.inference_mode():
        made = torch.arange(12, dtype=torch.float64).view(3, 4).t()[1:]
    like = _memory.outside_inference_mode(made)
    assert not like.is_inference()
    assert (like.dtype, like.stride(), like.data_ptr()) == (made.dtype, made.stride(), made.data_ptr())
    assert torch.equal(like, made)


def test_other_shapes_and_dtypes_are_other_bytes() -> None:
    flags = torch.zeros(3, dtype=torch.bool)
    assert same_bytes(flags, flags.clone())
    assert not same_bytes(flags, torch.zeros(4, dtype=torch.bool))
    assert not same_bytes(flags, torch.zeros(3, 1, dtype=torch.bool))
    assert not same_bytes(flags, torch.zeros(3, dtype=torch.uint8))
    assert not same_bytes(torch.zeros(3), torch.zeros(3, dtype=torch.int32))


def test_a_nested_tensor_of_strided_layout_has_no_shape_to_tell() -> None:
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    assert describe(nested) == {"dtype": "float32", "shape": (), "device": "cpu"}


def test_looking_does_not_materialise_a_copy_on_write_tensor() -> None:
    first = torch.zeros(4)
    second = torch._lazy_clone(first)
    span, _, _ = span_of(second), storage_of(second), version_of(second)
    assert torch._C._is_cow_tensor(second)
    assert torch._C._is_cow_tensor(first)
    assert span is not None


def test_storage_is_one_for_all_views_and_another_for_other_memory() -> None:
    tensor = torch.zeros(3, 4)
    same = [tensor, tensor[1], tensor.t(), tensor.data, tensor.detach(), tensor.view(torch.int32)]
    assert len({storage_of(view) for view in same}) == 1
    assert storage_of(torch.zeros(3, 4)) != storage_of(tensor)


def test_version_is_minus_one_where_none_is_kept() -> None:
    assert version_of(_inference()) == -1
    tensor = torch.zeros(2)
    assert version_of(tensor) == 0
    tensor.add_(1)
    assert version_of(tensor) == 1


# ---- shared counters ---------------------------------------------------------------------------------------


def _set(source: torch.Tensor) -> torch.Tensor:
    return torch.empty(0).set_(source)


def _rebound(source: torch.Tensor) -> torch.Tensor:
    other = torch.zeros(1)
    other.data = source
    return other


def _moved_apart(source: torch.Tensor) -> torch.Tensor:
    alias = source.data
    with torch.no_grad():
        alias.mul_(1)
    return alias


ALIASES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "itself": lambda x: x,
    "view": lambda x: x.view(-1),
    "row": lambda x: x[0],
    "row of row": lambda x: x[0][1:],
    "transpose": lambda x: x.t(),
    "detached": lambda x: x.detach(),
    "detached view": lambda x: x.detach()[0],
    "view of detached view": lambda x: x[0].detach()[1:],
    "alias": lambda x: x.data,
    "alias of alias": lambda x: x.data.data,
    "view of alias": lambda x: x.data[0],
    "alias of view": lambda x: x[0].data,
    "detached alias": lambda x: x.data.detach(),
    "reinterpreted": lambda x: x.detach().view(torch.int32),
    "set_": lambda x: _set(x.detach()),
    "rebound": lambda x: _rebound(x.detach()),
    "rebound to alias": lambda x: _rebound(x.data),
    "of its numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "of its dlpack": lambda x: torch.from_dlpack(x.detach()),
    "of its storage": lambda x: torch.tensor([]).set_(x.detach().untyped_storage()),
    "parameter of alias": lambda x: torch.nn.Parameter(x.data),
    "parameter of detached": lambda x: torch.nn.Parameter(x.detach()),
    "other memory": lambda x: torch.zeros(2, 3),
    "other memory, moved": lambda x: torch.zeros(2, 3).add_(1),
    "alias moved apart": _moved_apart,
    "inference": lambda x: _inference(),
}

SOURCES: dict[str, Callable[[], torch.Tensor]] = {
    "leaf": lambda: torch.zeros(2, 3, requires_grad=True),
    "plain": lambda: torch.zeros(2, 3),
    "written to": lambda: torch.zeros(2, 3).add_(1).add_(1),
    "non-leaf": lambda: torch.zeros(2, 3, requires_grad=True) * 2,
    "view": lambda: torch.zeros(5, 3)[1:3],
    "of numpy": lambda: torch.from_numpy(np.zeros((2, 3), dtype=np.float32)),
}


@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("source", SOURCES)
def test_sharing_is_what_a_tracked_write_shows(source: str, alias: str) -> None:
    save = SOURCES[source]()
    other = ALIASES[alias](save)
    versions = version_of(save), version_of(other)
    bytes_before = save.detach().clone()

    answer = shares_counter(other, save)
    back = shares_counter(save, other)

    assert (version_of(save), version_of(other)) == versions
    assert torch.equal(save.detach(), bytes_before)
    with torch.no_grad():
        if other.is_inference():
            with torch.inference_mode():
                other.add_(0)
        else:
            other.add_(0)
    truth = save._version != versions[0]
    assert answer is truth
    assert back is truth


def test_sharing_inside_a_transform_is_what_a_tracked_write_shows() -> None:
    told: list[tuple[bool, bool]] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        for make in (torch.detach, lambda y: y.data, torch.clone, lambda y: y[0]):
            y = x * 2
            alias, version = make(y), y._version
            answer = shares_counter(alias, y)
            assert y._version == version
            alias.add_(0)
            told.append((answer, y._version != version))
        return x.sum()

    torch.func.grad(look)(torch.ones(3))
    assert [answer for answer, _ in told] == [truth for _, truth in told] == [True, False, False, True]


def test_the_probe_leaves_no_trace_in_autograd() -> None:
    a = torch.ones(3, requires_grad=True)
    out = a.sigmoid()
    assert shares_counter(out.detach(), out)
    assert not shares_counter(out.data, out)
    assert out._version == 0
    out.sum().backward()  # PyTorch's own check passes
    assert a.grad is not None


def test_without_a_way_to_put_a_counter_back_equal_versions_count_as_shared(monkeypatch: Any) -> None:
    monkeypatch.setattr(_memory._torch, "CAN_PROBE_COUNTERS", False)
    x = torch.zeros(3)
    assert shares_counter(x.data, x)
    assert not shares_counter(x.data, x.add_(1))


# ---- bytes -------------------------------------------------------------------------------------------------

DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.complex64,
    torch.uint8,
]  # fmt: skip

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "whole": lambda x: x,
    "row": lambda x: x[1],
    "column": lambda x: x[:, 1],
    "transpose": lambda x: x.t(),
    "odd columns": lambda x: x[:, 1::2],
    "scalar": lambda x: x[2, 3],
    "expanded": lambda x: x[1:2].expand(3, 6),
    "inner block": lambda x: x[1:3, 2:5],
}


def filled(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(24).reshape(4, 6).remainder(2 if dtype == torch.bool else 100).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_replica_has_the_same_layout_and_values_over_memory_of_its_own(layout: str, dtype: torch.dtype) -> None:
    tensor = LAYOUTS[layout](filled(dtype))
    replica = replicas_of([tensor])[id(tensor)]
    assert (replica.shape, replica.stride(), replica.dtype) == (tensor.shape, tensor.stride(), dtype)
    assert torch.equal(replica, tensor)
    before = tensor.clone()
    replica.fill_(1)
    assert torch.equal(tensor, before)
    assert storage_of(replica) != storage_of(tensor)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)], ids=str)
def test_an_empty_tensor_has_an_empty_replica_that_nothing_can_change(shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape)
    replica = replicas_of([tensor])[id(tensor)]
    assert replica.shape == tensor.shape
    replica.fill_(1)
    assert not changed_bytes(tensor, replica).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("written", LAYOUTS)
def test_touched_elements_are_those_that_differ_afterwards(written: str, layout: str, dtype: torch.dtype) -> None:
    """A write to one view, rehearsed on a replica, against the elements of another view that really change."""
    base = filled(dtype)
    target, save = LAYOUTS[written](base), LAYOUTS[layout](base)
    replica = replicas_of([target])[id(target)]
    value = True if dtype == torch.bool else 77
    (replica if replica.stride().count(0) == 0 else replica[0]).fill_(value)

    mask = changed_bytes(target, replica)
    here, there = span_of(target), span_of(save)
    assert here is not None
    assert there is not None
    before = save.clone()
    counted = touched_elements(mask, here.address, there)

    (target if target.stride().count(0) == 0 else target[0]).fill_(value)
    assert counted == int((save != before).sum())


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_touched_elements_by_brute_force(data: Any) -> None:
    sizes = tuple(data.draw(st.lists(st.integers(1, 4), max_size=3)))
    strides = tuple(data.draw(st.integers(0, 12)) for _ in sizes)
    itemsize = data.draw(st.sampled_from([1, 2, 4, 8]))
    span = _memory.Span("cpu", 1000 + data.draw(st.integers(0, 30)), itemsize, sizes, strides)
    start = 1000 + data.draw(st.integers(-20, 40))
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=1, max_size=60)))
    dirty = {start + i for i, bit in enumerate(mask.tolist()) if bit}
    truth = 0
    for index in product(*map(range, sizes)):
        first = span.address + sum(i * stride for i, stride in zip(index, strides, strict=True))
        truth += any(first + byte in dirty for byte in range(itemsize))
    assert touched_elements(mask, start, span) == truth


@pytest.mark.parametrize("length", [0, 1, 5, _memory._SHORT, _memory._SHORT + 1, 3 * _memory._SHORT])
@pytest.mark.parametrize("where", [(), (0,), (-1,), (0, -1), (2, 3, 4), (700,), (1, 900)])
def test_a_trimmed_mask_says_the_same_of_any_span(length: int, where: tuple[int, ...]) -> None:
    mask = torch.zeros(length, dtype=torch.bool)
    for i in where:
        if -length <= i < length:
            mask[i] = True
    trimmed, skipped = _memory.trimmed(mask)
    for first, size in ((0, length), (0, 4), (1, 3), (length - 3, 3), (698, 5), (896, 8)):
        if first >= 0 and 0 < size <= length - first:
            region = _memory.Span("cpu", 1000 + first, 1, (size,), (1,))
            assert touched_elements(trimmed, 1000 + skipped, region) == touched_elements(mask, 1000, region)
    assert trimmed.sum() == mask.sum()
    if length > _memory._SHORT:
        assert not len(trimmed) or bool(trimmed[0] & trimmed[-1]), "nothing to be looked through in vain"


def test_a_reinterpretation_touches_the_elements_whose_bytes_it_changes() -> None:
    save = torch.zeros(4)
    bytes_ = save.view(torch.uint8)
    replica = replicas_of([bytes_])[id(bytes_)]
    replica[5] = 1  # the second byte of the second element
    here, there = span_of(bytes_), span_of(save)
    assert here is not None
    assert there is not None
    assert touched_elements(changed_bytes(bytes_, replica), here.address, there) == 1


def test_a_write_of_the_value_that_is_there_changes_no_byte() -> None:
    tensor = torch.tensor([0.0, float("nan"), 3.0])
    replica = replicas_of([tensor])[id(tensor)]
    replica.copy_(tensor.clone())
    assert not changed_bytes(tensor, replica).any()
    replica[0] = -0.0
    assert changed_bytes(tensor, replica).sum() == 1  # the sign of zero is a byte like any other


def test_what_shares_memory_shares_the_copy() -> None:
    base, elsewhere = torch.arange(12.0), torch.ones(2)
    row, all_, part = base[4:8], base.view(3, 4), base.view(torch.uint8)[40:44]
    replicas = replicas_of([row], [all_, part, elsewhere])
    assert set(replicas) == {id(row), id(all_), id(part)}
    replicas[id(row)].fill_(7)
    assert replicas[id(all_)].tolist() == [[0, 1, 2, 3], [7] * 4, [8, 9, 10, 11]]
    replicas[id(part)].zero_()
    assert replicas[id(all_)][2].tolist() == [8, 9, 0, 11]
    assert torch.equal(base, torch.arange(12.0))


def test_gaps_between_elements_do_not_count() -> None:
    base = torch.zeros(4, 6)
    column = base[:, 1]
    replica = replicas_of([column])[id(column)]
    replica.untyped_storage().fill_(1)  # its gaps as well
    span = span_of(column)
    assert span is not None
    assert touched_elements(changed_bytes(column, replica), span.address, span) == 4
    other = span_of(base[:, 2])
    assert other is not None
    replica = replicas_of([column])[id(column)]
    replica.fill_(1)
    assert touched_elements(changed_bytes(column, replica), span.address, other) == 0


@pytest.mark.parametrize(
    "view", [torch.conj, lambda z: z.conj().imag, lambda z: z.conj().real], ids=["conj", "neg", "real"]
)
def test_a_replica_of_a_lazy_view_is_one(view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    base = torch.tensor([1 + 2j, 3 - 4j, 0 + 5j])
    tensor = view(base)
    replicas = replicas_of([tensor], [base])
    replica, whole = replicas[id(tensor)], replicas[id(base)]
    assert (replica.is_conj(), replica.is_neg()) == (tensor.is_conj(), tensor.is_neg())
    assert torch.equal(replica, tensor)
    assert not changed_bytes(tensor, replica).any()
    replica[1] = 7
    assert torch.equal(view(whole), replica)  # they share the copy
    differs = (torch.view_as_real(whole) != torch.view_as_real(base)).any(-1)
    assert differs.tolist() == [False, True, False]
    span = span_of(base)
    here = span_of(tensor)
    assert span is not None
    assert here is not None
    assert touched_elements(changed_bytes(tensor, replica), here.address, span) == 1
    _memory.overwrite(tensor, replica)
    assert torch.equal(base, whole)


def test_same_bytes_is_about_bits() -> None:
    nan = float("nan")
    assert same_bytes(torch.tensor([nan, 1.0]), torch.tensor([nan, 1.0]))
    assert not same_bytes(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bytes(torch.tensor([1.0]), torch.tensor([1]))
    assert not same_bytes(torch.zeros(2), torch.zeros(3))
    assert not same_bytes(torch.zeros(2), torch.zeros(2, 1))
    assert same_bytes(torch.zeros(0), torch.zeros(0))
    assert same_bytes(torch.tensor(1.0), torch.tensor(1.0))
    assert same_bytes(torch.arange(6.0).reshape(2, 3).t(), torch.arange(6.0).reshape(2, 3).t().contiguous())
    assert same_bytes(torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.complex64))
    assert same_bytes(torch.ones(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool))


# ---- counters without memory ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in STRIDED if kind != "inference"])
def test_a_counter_keeps_no_memory_and_moves_with_its_tensor(kind: str, grad: bool) -> None:
    tensor = STRIDED[kind]()
    with torch.set_grad_enabled(grad):
        counter = _memory.counter_of(tensor)
    assert (counter.numel(), counter.untyped_storage().nbytes(), counter.requires_grad) == (0, 0, False)
    assert shares_counter(counter, tensor)
    version = tensor._version
    torch.autograd.graph.increment_version(tensor)
    assert (tensor._version, counter._version) == (version + 1, version + 1)
    other = torch.ones_like(tensor)
    both = _memory.with_counter(counter, other)
    torch.autograd.graph.increment_version(both)
    assert tensor._version == version + 2
    assert storage_of(both) == storage_of(other) != storage_of(tensor)
    assert counter.numel() == 0


def test_a_counter_of_a_subclass_is_made_without_its_code() -> None:
    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, *_: Any, **__: Any) -> Any:
            raise AssertionError("called")

    with torch._C.DisableTorchFunctionSubclass():
        tensor = torch.ones(3).as_subclass(Loud)
    with torch.no_grad():
        counter = _memory.counter_of(tensor)
    torch.autograd.graph.increment_version(counter)
    assert version_of(tensor) == version_of(counter) == 1


# ---- what there is in memory ---------------------------------------------------------------------------------------


def test_the_tensors_in_a_value() -> None:
    a, b, c, d = (torch.zeros(1) for _ in range(4))
    found = list(_memory.tensors_in([a, (b, 3, None), {"x": [c], "y": {"z": d}}, "text", {a.dtype}]))
    assert [id(tensor) for tensor in found] == [id(a), id(b), id(c), id(d)]
    assert list(_memory.tensors_in(5)) == []


@pytest.mark.filterwarnings("ignore")
def test_which_tensors_have_memory_and_which_are_empty() -> None:
    for kind, make in STRIDED.items():
        assert _memory.has_memory(make()), kind
        assert _memory.is_empty(make()) is (kind == "empty view"), kind
        assert _memory.readable(make()), kind
    for kind, make in WITHOUT_MEMORY.items():
        assert not _memory.has_memory(make()), kind
        assert _memory.is_empty(make()) is (kind == "empty"), kind
        assert _memory.readable(make()) is (kind in ("empty", "meta", "fake")), kind
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    assert not _memory.has_memory(nested)
    assert not _memory.is_empty(nested)
    assert not _memory.is_empty(torch.zeros(0, device="meta"))
    assert not _memory.is_empty(torch.zeros(0, 3).to_sparse())


def test_readable_is_what_the_storage_reaches() -> None:
    base = torch.zeros(6)
    whole, part, nothing = base[:], base[1:3], base[6:6]
    base.untyped_storage().resize_(12)  # three elements
    assert not _memory.readable(whole)
    assert _memory.strided_parts_of(whole) == []
    assert _memory.readable(part)
    assert len(_memory.strided_parts_of(part)) == 1
    assert _memory.readable(nothing)
    base.untyped_storage().resize_(11)
    assert not _memory.readable(part)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.complex64], ids=str)
def test_the_stretch_of_a_tensor_in_its_storage(layout: str, dtype: torch.dtype) -> None:
    tensor = LAYOUTS[layout](filled(dtype))
    span = span_of(tensor)
    assert span is not None
    start = span.address - tensor.untyped_storage().data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(span.sizes, span.strides, strict=True))
    assert _memory.stretch_in_storage(tensor) == (start, start + last + span.itemsize)
    assert _memory.end_in_storage(tensor) == start + last + span.itemsize


@pytest.mark.filterwarnings("ignore")
def test_the_stretch_of_what_has_no_strides() -> None:
    base = torch.zeros(6)
    assert _memory.stretch_in_storage(base[2:2]) == (8, 8)
    assert _memory.end_in_storage(base[2:2]) == 0
    assert _memory.stretch_in_storage(torch.eye(3).to_sparse()) is None
    assert _memory.stretch_in_storage(torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])) is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contents_are_the_bytes_of_the_elements_in_order(layout: str, dtype: torch.dtype) -> None:
    tensor = LAYOUTS[layout](filled(dtype))
    contents = _memory.contents_of(tensor)
    assert contents.dtype == torch.uint8
    assert contents.shape == (tensor.numel() * tensor.element_size(),)
    assert torch.equal(contents.view(dtype), tensor.reshape(-1))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_contents_of_what_reads_otherwise_than_it_lies() -> None:
    z = torch.tensor([1 + 2j, 3 - 4j])
    assert torch.equal(_memory.contents_of(z.conj()).view(z.dtype), torch.tensor([1 - 2j, 3 + 4j]))
    assert torch.equal(_memory.contents_of(z.conj().imag).view(torch.float32), torch.tensor([-2.0, 4.0]))
    assert _memory.contents_of(torch.quantize_per_tensor(torch.ones(2), 0.5, 3, torch.qint8)).tolist() == [5, 5]
    assert not _memory.can_be_copied([z, torch.quantize_per_tensor(torch.ones(2), 0.5, 3, torch.qint8)])
    assert _memory.can_be_copied([z.conj(), z.conj().imag, torch.ones(2)])


@pytest.mark.filterwarnings("ignore")
def test_the_parts_of_a_tensor() -> None:
    dense = torch.arange(3.0)
    (part,) = _memory.strided_parts_of(dense)
    assert part is dense
    sparse = torch.eye(3).to_sparse()
    parts = _memory.strided_parts_of(sparse)
    assert {storage_of(part) for part in parts} == {storage_of(sparse._indices()), storage_of(sparse._values())}
    assert _memory.strided_parts_of(_freed()) == []
    assert _memory.strided_parts_of(torch.zeros(3, device="meta")) == []
    assert _memory.same_parts(parts, _memory.strided_parts_of(torch.eye(3).to_sparse()))
    assert not _memory.same_parts(parts, _memory.strided_parts_of((torch.eye(3) * 2).to_sparse()))
    assert not _memory.same_parts(parts, parts[:1])
    assert _memory.same_parts([], [])


# ---- what differs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_differing_elements_are_those_whose_bits_differ(layout: str, dtype: torch.dtype) -> None:
    tensor = LAYOUTS[layout](filled(dtype))
    other = tensor.clone(memory_format=torch.contiguous_format)
    assert not _memory.differing_elements(tensor, other).any()
    assert _memory.changed_elements(tensor, other) == 0
    flat = other.view(-1)
    flat[-1] = not flat[-1] if dtype == torch.bool else flat[-1] + 1
    assert _memory.differing_elements(tensor, other).nonzero().flatten().tolist() == [tensor.numel() - 1]
    assert _memory.changed_elements(tensor, other) == 1
    assert _memory.largest_difference(tensor, other) == 1.0


def test_what_cannot_be_compared_counts_as_changed() -> None:
    tensor = torch.zeros(2, 3)
    assert _memory.changed_elements(tensor, None) == 6
    for proof in (torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.int32)):
        assert _memory.changed_elements(tensor, proof) == 6
        assert _memory.largest_difference(tensor, proof) is None
    freed = _freed()
    assert _memory.changed_elements(freed, torch.zeros(4)) == 4
    assert _memory.largest_difference(freed, torch.zeros(4)) is None
    assert _memory.differing_elements(torch.zeros(0), torch.zeros(0)).shape == (0,)
    assert _memory.largest_difference(torch.zeros(0), torch.zeros(0)) == 0.0


def test_the_largest_difference() -> None:
    nan, inf = float("nan"), float("inf")

    def difference(a: list[Any], b: list[Any], dtype: torch.dtype = torch.float32) -> float | None:
        return _memory.largest_difference(torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype))

    assert difference([1.0, 5.0, 2.0], [1.0, 2.0, 4.0]) == 3.0
    assert difference([0.0, inf], [-0.0, inf]) == 0.0
    assert difference([0.0, 2.0], [-0.0, 1.0]) == 1.0
    assert difference([inf], [1.0]) == inf
    assert str(difference([nan, 1.0], [2.0, 1.0])) == "nan"
    assert difference([nan], [nan]) == 0.0
    assert difference([3 + 4j, 1j], [0j, 1j], torch.complex64) == 5.0
    assert difference([2**60 + 2**10, 1], [2**60, 1], torch.int64) == 2.0**10
    assert difference([True], [False], torch.bool) == 1.0


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_within_by_brute_force(data: Any) -> None:
    base = torch.zeros(24)
    tensor = LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))](base.view(4, 6))
    picked = torch.tensor(data.draw(st.lists(st.booleans(), min_size=tensor.numel(), max_size=tensor.numel())))
    offsets = torch.arange(24).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).reshape(-1)
    window = base[data.draw(st.integers(0, 23)) :: data.draw(st.integers(1, 5))]
    reached = torch.arange(24).as_strided(window.shape, window.stride(), window.storage_offset()).tolist()
    span = span_of(window)
    assert span is not None
    truth = any(offset in reached for offset in offsets[picked].tolist())
    assert _memory.any_within(tensor, picked, span) is truth


def test_nothing_without_memory_lies_within() -> None:
    span = span_of(torch.zeros(3))
    assert span is not None
    assert not _memory.any_within(torch.zeros(3, device="meta"), torch.ones(3, dtype=torch.bool), span)


# ---- random numbers -------------------------------------------------------------------------------------------------


def test_random_numbers_are_drawn_again() -> None:
    generator, unused = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    x = torch.zeros(2)
    with _memory.same_random_numbers([x], ["text", generator, x]):
        first, own = torch.rand(3), torch.rand(3, generator=generator)
        other = torch.rand(3, generator=unused)
    assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(3, generator=generator), own)
    assert not torch.equal(torch.rand(3, generator=unused), other)
    with pytest.raises(ValueError, match="in between"), _memory.same_random_numbers([x], [generator]):
        first, own = torch.rand(3), torch.rand(3, generator=generator)
        raise ValueError("in between")
    assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(3, generator=generator), own)


def test_what_draws_nothing_puts_nothing_back() -> None:
    generator = torch.Generator().manual_seed(1)
    with _memory.same_random_numbers([], [generator]):
        first, own = torch.rand(3), torch.rand(3, generator=generator)
    assert not torch.equal(torch.rand(3), first)
    assert not torch.equal(torch.rand(3, generator=generator), own)


def test_same_bytes_of_what_reads_otherwise_than_it_lies() -> None:
    z = torch.tensor([1 + 2j, 3 - 4j])
    for lazy in (z.conj(), z.conj().imag):
        plain = lazy.resolve_conj().resolve_neg()
        as_it_lies = z if lazy.is_complex() else z.imag
        for a, b in ((lazy, plain), (plain, lazy), (lazy, lazy), (as_it_lies, as_it_lies.clone())):
            assert same_bytes(a, b)
        for a, b in ((lazy, as_it_lies), (as_it_lies, lazy)):
            assert not same_bytes(a, b)


def test_what_lies_between_the_elements_is_not_written_over() -> None:
    base = torch.zeros(4, 6)
    part = base[:, 1:3]
    replica = replicas_of([part])[id(part)]
    replica.fill_(1)
    base[0, 4] = 5  # since the copy was made
    _memory.overwrite(part, replica)
    expected = torch.zeros(4, 6)
    expected[:, 1:3] = 1
    expected[0, 4] = 5
    assert torch.equal(base, expected)


def test_elements_that_lie_over_each_other_are_written_over() -> None:
    base = torch.zeros(6)
    part = base[::2].expand(4, 3)
    replica = replicas_of([part])[id(part)]
    replica[0] = torch.tensor([1.0, 2.0, 3.0])
    _memory.overwrite(part, replica)
    assert base.tolist() == [1, 0, 2, 0, 3, 0]
