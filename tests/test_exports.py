"""Memory that is handed out of torch: how long does it cost anything, and is it what it is without the guard?"""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from harness import lacks_writable_capsules
from torch.utils import dlpack

import torchguard
from torchguard import Guard, SavedTensorCorruptionError, strict
from torchguard._exports import EXPORTS
from torchguard._saves import LEDGER

copy.copy(torch.ones(()))  # the first copy has Python cache what it finds, on the class


writes_through_dlpack = pytest.mark.skipif(bool(lacks_writable_capsules()), reason=lacks_writable_capsules())


def saves() -> list[Any]:
    """The live saves."""
    return LEDGER.all_alive()


pytestmark = pytest.mark.usefixtures("empty_ledger")


def proofs() -> int:
    """How many live saves keep a copy."""
    return sum(save.remarks is not None and save.remarks.proof is not None for save in saves())


def weight(requires_grad: bool = True) -> torch.Tensor:
    return torch.ones(3, 4, requires_grad=requires_grad)


# ---- lifetimes ---------------------------------------------------------------------------------------------

HANDLES: dict[str, Callable[[torch.Tensor], Any]] = {
    "numpy": lambda x: x.numpy(),
    "view": lambda x: x.numpy()[1:].T,
    "memoryview": lambda x: memoryview(x.numpy()),
    "np.from_dlpack": lambda x: np.from_dlpack(x),
    "torch.from_dlpack": lambda x: torch.from_dlpack(x),
    "capsule": lambda x: dlpack.to_dlpack(x),
    "view of a consumer": lambda x: torch.from_dlpack(x)[1:].t(),
    "from_numpy(numpy)": lambda x: torch.from_numpy(x.numpy()),
}


@pytest.mark.parametrize("name", HANDLES)
def test_a_save_keeps_proof_while_the_handle_lives_and_not_after(name: str) -> None:
    h, w = weight(requires_grad=False), weight()
    with strict():
        handle = HANDLES[name](h)
        first = h * w
        assert proofs() == 1
        del first
        del handle
        second = h * w
        assert proofs() == 0
        second.sum().backward()


@pytest.mark.parametrize("name", HANDLES)
def test_the_proof_goes_when_the_handle_is_gone_unwritten(name: str) -> None:
    h, w = weight(requires_grad=False), weight()
    with strict():
        out = h * w
        handle = HANDLES[name](h)
        assert proofs() == 1
        del handle
        other = torch.ones(2) * torch.ones(2, requires_grad=True)  # the next save looks after the dead
        assert proofs() == 0
        (out.sum() + other.sum()).backward()


@writes_through_dlpack
def test_the_proof_stays_when_one_of_two_handles_is_gone() -> None:
    h, w = weight(requires_grad=False), weight()
    with strict(), pytest.raises(SavedTensorCorruptionError):
        out = h * w
        first, second = h.numpy(), np.from_dlpack(h)
        del first
        _ = torch.ones(2) * w[0, :2]
        assert proofs() >= 1
        second[0] = 7
        out.sum().backward()


def test_a_handle_that_wrote_and_died_is_told() -> None:
    h, w = weight(requires_grad=False), weight()
    with strict(), pytest.raises(SavedTensorCorruptionError, match="outside torch"):
        out = h * w
        h.numpy().fill(7)
        _ = torch.ones(2) * w[0, :2]
        out.sum().backward()


def test_only_what_the_array_reaches_keeps_proof() -> None:
    both, w = torch.ones(2, 3, 4), weight()
    with strict():
        held = both[1].numpy()
        outs = [both[0] * w, both[1] * w]
        assert proofs() == 1
        sum(out.sum() for out in outs).backward()
    assert held.shape == (3, 4)


def test_logging_keeps_nothing() -> None:
    w = weight()
    with strict():
        for _ in range(5):
            out = w.exp()
            out.detach().numpy().mean()
            loss = out.sum()
            float(loss.detach().numpy())
            loss.backward()
        del out, loss
        gc.collect()
        assert proofs() == 0
        assert not EXPORTS.by_storage or all(not shared.saves for shared in EXPORTS.by_storage.values())


def test_saves_of_the_same_bytes_share_one_proof() -> None:
    """As in a loop over a recurrent cell whose weights are exported."""
    h, w = weight(requires_grad=False), weight()
    held = h.numpy()
    with strict():
        x: torch.Tensor = w
        for _ in range(20):
            x = x * h
        copies = {id(save.remarks.proof) for save in saves() if save.remarks is not None}
        assert proofs() == 20
        assert len(copies) == 1
        x.sum().backward()
    assert held.sum() == 12


def test_saves_of_other_bytes_share_none() -> None:
    h, w = weight(requires_grad=False), weight()
    held = h.numpy()
    with strict(), pytest.raises(SavedTensorCorruptionError):
        first = h * w
        held[0] = 5
        second = h * w
        second.sum().backward()  # this one is right
        first.sum().backward()


def test_an_array_that_only_the_tensor_holds_costs_nothing() -> None:
    w = weight()
    with strict():
        h = torch.from_numpy(np.ones((3, 4), dtype=np.float32))
        out = h * w
        assert proofs() == 0
        array = np.ones((3, 4), dtype=np.float32)
        held = torch.from_numpy(array)
        also = held * w
        assert proofs() == 1
        del array
        too = held * w
        assert proofs() == 1
        (out + also + too).sum().backward()


def test_an_array_whose_base_is_held_can_be_written_to() -> None:
    w = weight()
    base = np.ones((4, 4), dtype=np.float32)
    with strict(), pytest.raises(SavedTensorCorruptionError):
        out = torch.from_numpy(base[1:]) * w
        base[2] = 5
        out.sum().backward()


def test_bytes_cannot_be_written_to() -> None:
    w = weight()
    with strict(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        h = torch.frombuffer(bytes(48), dtype=torch.float32).view(3, 4)
        out = h * w
        assert proofs() == 0
        out.sum().backward()


@pytest.mark.parametrize("shared", [True, False])
def test_a_private_mapping_cannot_be_written_to_a_shared_one_can(shared: bool, tmp_path: Path) -> None:
    gc.collect()  # an error of another test may hold its saves
    path = tmp_path / "weights"
    np.ones(12, dtype=np.float32).tofile(path)
    w = torch.ones(12, requires_grad=True)
    with strict() as guard:
        h = torch.from_file(str(path), shared=shared, size=12)
        out = h * w
        assert proofs() == shared
        with open(path, "r+b") as file:
            file.write(bytes(8))
        if shared:
            with pytest.raises(SavedTensorCorruptionError) as raised:
                out.sum().backward()
            assert "from_file" in raised.value.violation.aliased.source  # type: ignore[union-attr]
        else:
            out.sum().backward()
    assert len(guard.violations) == shared


def test_a_file_that_was_mapped_before_the_guard(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    np.ones(12, dtype=np.float32).tofile(path)
    w = torch.ones(12, requires_grad=True)
    h = torch.from_file(str(path), shared=True, size=12)
    with strict(), pytest.raises(SavedTensorCorruptionError):
        out = h * w
        with open(path, "r+b") as file:
            file.write(bytes(8))
        out.sum().backward()


def test_the_guard_keeps_no_array_no_tensor_and_no_entry_alive() -> None:
    with strict():
        x = weight(requires_grad=False)
        array = x.numpy()
        consumer = torch.from_dlpack(x)
        source = np.ones((3, 4), dtype=np.float32)
        made = torch.from_numpy(source)
        outs = [t * weight() for t in (x, consumer, made)]
        held = [ref(thing) for thing in (x, array, consumer, source, made)]
        assert EXPORTS.by_storage
        del array, consumer, source, made, outs, x
        gc.collect()
        assert [hold() for hold in held] == [None] * 5
        EXPORTS.settle_dead()
        assert not [shared for shared in EXPORTS.by_storage.values() if shared.exports]


def test_ten_thousand_exports_leave_nothing() -> None:
    x, w = weight(requires_grad=False), weight()
    with strict():
        x.numpy()
        for _ in range(10_000):
            x.numpy()
            torch.from_dlpack(x)
        torch.ones(3).numpy()
        (x * w).sum().backward()
        shared = EXPORTS.by_storage[torch._C._storage_id(x)]
        assert (len(shared.exports), len(shared.saves), len(shared.proofs)) == (0, 0, 0)
        before = len(EXPORTS.by_storage)
        for _ in range(1000):
            torch.ones(3).numpy()
            torch.from_numpy(np.ones(3))
        assert len(EXPORTS.by_storage) <= before + 1
        assert len(EXPORTS.dead) == 0


def test_a_storage_that_takes_the_place_of_an_exported_one_is_not_exported() -> None:
    w = weight()
    with strict():
        for _ in range(200):
            x = weight(requires_grad=False)
            x.numpy()
            del x
            fresh = weight(requires_grad=False)
            (fresh * w).sum().backward()
            assert proofs() == 0


def test_what_happened_between_two_guards_is_known_to_the_second() -> None:
    h, w = weight(requires_grad=False), weight()
    with strict():
        h.numpy()
        (h * w).sum().backward()
    array = h.numpy()
    with strict(), pytest.raises(SavedTensorCorruptionError):
        out = h * w
        array[0] = 5
        out.sum().backward()


@writes_through_dlpack
def test_an_array_from_the_first_guard_is_known_to_the_second() -> None:
    h, w = weight(requires_grad=False), weight()
    with strict():
        consumer = np.from_dlpack(h)
    with strict(), pytest.raises(SavedTensorCorruptionError) as raised:
        out = h * w
        consumer[0] = 5
        out.sum().backward()
    assert "np.from_dlpack(h)" in raised.value.violation.aliased.source  # type: ignore[union-attr]


_ORDINARY = """
import torch
from torchguard import strict
from torchguard._exports import EXPORTS

asked, ask = [], EXPORTS.ask

def count(save, storage, grad_fn):
    asked.append(tuple(save.tensor.shape))
    ask(save, storage, grad_fn)

EXPORTS.ask = count
model = torch.nn.Sequential(
    torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.Dropout(0.5), torch.nn.GELU(), torch.nn.Softmax(-1)
)
with strict():
    x = torch.ones(3, 4, requires_grad=True)
    model(x).sum().backward()  # types of node that are met for the first time are asked about
    assert asked, "nothing is counted"
    asked.clear()
    model(x).sum().backward()
    assert asked == [], asked
"""


def test_ordinary_saves_ask_no_storage() -> None:
    """The Python object of a storage costs a microsecond: fresh results must not be asked for one.

    In a process of its own: once dynamo has run, frames hold their arguments once more, and it is asked again.
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    done = subprocess.run([sys.executable, "-c", _ORDINARY], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- the report --------------------------------------------------------------------------------------------


def test_the_report() -> None:
    h, w = weight(requires_grad=False), weight()
    with strict() as guard, pytest.raises(SavedTensorCorruptionError) as raised:
        out = h * w
        array = h.numpy()
        array[1] = 5
        out.sum().backward()
    (violation,) = guard.violations
    assert (violation.kind, violation.caught, violation.operation) == ("exported", "read", "")
    assert (violation.elements, violation.of) == (4, 12)
    assert violation.aliased is not None
    assert violation.aliased.source == "array = h.numpy()"
    text = str(raised.value)
    assert text.startswith("a write from outside torch has corrupted a tensor saved for backward")
    assert "array = h.numpy()" in text
    assert "(between alias and read: by NumPy, a DLPack consumer, another process)" in text
    assert "4 of 12 elements" in text
    assert "write after backward(), or to a copy" in text


def test_the_report_names_the_array_that_reaches_what_changed() -> None:
    h, w = weight(requires_grad=False), weight()
    with strict(), pytest.raises(SavedTensorCorruptionError) as raised:
        out = h * w
        top = h[:2].numpy()
        bottom = h[2:].numpy()
        bottom[:] = 5
        out.sum().backward()
    assert raised.value.violation.aliased is not None
    assert raised.value.violation.aliased.source == "bottom = h[2:].numpy()"
    assert top.sum() == 8


def test_the_report_of_a_storage() -> None:
    h, w = weight(requires_grad=False), weight()
    with strict(), pytest.raises(SavedTensorCorruptionError) as raised:
        out = h * w
        h.untyped_storage()[3] = 5
        out.sum().backward()
    violation = raised.value.violation
    assert (violation.kind, violation.operation, violation.elements) == ("uncounted", "storage[i] = v", 1)
    assert str(raised.value).startswith("storage[i] = v, which moves no version counter, would corrupt")


def test_warned_once_a_write() -> None:
    """After the warning the save is what it is now: another read is silent, another write is told."""
    h, w = weight(requires_grad=False), weight()
    with Guard("record") as guard:
        out = h * w
        array = h.numpy()
        array[1] = 5
        out.sum().backward(retain_graph=True)
        out.sum().backward(retain_graph=True)
        assert sum(violation.times for violation in guard.violations) == 1
        array[2] = 5
        out.sum().backward()
        assert sum(violation.times for violation in guard.violations) == 2


# ---- the same as without the guard -------------------------------------------------------------------------


def _facts(array: Any) -> tuple[Any, ...]:
    flags = array.flags
    names = ("C_CONTIGUOUS", "F_CONTIGUOUS", "OWNDATA", "WRITEABLE", "ALIGNED", "WRITEBACKIFCOPY")
    base = array.base
    return (
        type(array),
        type(base),
        array.dtype,
        array.shape,
        array.strides,
        tuple(flags[name] for name in names),
        array.tobytes(),
        None if not isinstance(base, torch.Tensor) else (base.requires_grad, base.is_leaf, base._version),
    )


def _result(call: Callable[[], Any]) -> Any:
    try:
        result = call()
    except Exception as error:
        return type(error), str(error)
    if isinstance(result, np.ndarray):
        return _facts(result)
    if isinstance(result, torch.Tensor) and result.layout == torch.strided and not result.is_meta:
        storage = result.untyped_storage()
        return (
            type(result),
            result.dtype,
            result.shape,
            result.stride(),
            -1 if result.is_inference() else result._version,
            result.requires_grad,
            storage.resizable(),
            storage.nbytes(),
            str(result.detach()),
        )
    return type(result)


class Marked(torch.Tensor):
    """A subclass."""


def _tensors() -> dict[str, Callable[[], torch.Tensor]]:
    return {
        "plain": lambda: torch.arange(12.0).view(3, 4),
        "transposed": lambda: torch.arange(12.0).view(3, 4).t(),
        "strided": lambda: torch.arange(12.0)[::3],
        "expanded": lambda: torch.ones(1, 4).expand(3, 4),
        "scalar": lambda: torch.tensor(3.0),
        "empty": lambda: torch.ones(0, 4),
        "bool": lambda: torch.tensor([True, False]),
        "bfloat16": lambda: torch.ones(3, dtype=torch.bfloat16),
        "complex": lambda: torch.ones(3, dtype=torch.complex64) * 1j,
        "conjugate": lambda: (torch.ones(3, dtype=torch.complex64) * 1j).conj(),
        "negative": lambda: (torch.ones(3, dtype=torch.complex64) * 1j).conj().imag,
        "int8": lambda: torch.ones(3, dtype=torch.int8),
        "requires grad": lambda: torch.ones(3, requires_grad=True),
        "parameter": lambda: torch.nn.Parameter(torch.ones(3)),
        "frozen parameter": lambda: torch.nn.Parameter(torch.ones(3), requires_grad=False),
        "non-leaf": lambda: torch.ones(3, requires_grad=True) * 2,
        "subclass": lambda: torch.ones(3).as_subclass(Marked),
        "sparse": lambda: torch.eye(3).to_sparse(),
        "meta": lambda: torch.ones(3, device="meta"),
        "inference": _inference,
        "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
        "shared": lambda: torch.ones(3).share_memory_(),
        "from_numpy": lambda: torch.from_numpy(np.ones(3)),
    }


def _inference() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(3)


OUT: dict[str, Callable[[torch.Tensor], Any]] = {
    "numpy": lambda x: x.numpy(),
    "forced": lambda x: x.numpy(force=True),
    "by keyword": lambda x: torch.Tensor.numpy(x, force=False),
    "detached": lambda x: x.detach().numpy(),
    "asarray": lambda x: np.asarray(x),
    "asarray of a dtype": lambda x: np.asarray(x, dtype=np.float64),
    "array": lambda x: np.array(x),
    "np.from_dlpack": lambda x: np.from_dlpack(x),
    "torch.from_dlpack": lambda x: torch.from_dlpack(x),
    "from_dlpack copy": lambda x: torch.from_dlpack(x, copy=True),
    "capsule": lambda x: dlpack.to_dlpack(x),
    "consumed": lambda x: dlpack.from_dlpack(dlpack.to_dlpack(x)),
    "__dlpack__": lambda x: x.__dlpack__(),
    "__dlpack__ copy": lambda x: torch.from_dlpack(x.__dlpack__(copy=True)),
    "__dlpack__ stream": lambda x: x.__dlpack__(stream=1),
    "cuda interface": lambda x: x.__cuda_array_interface__,
    "as_tensor": lambda x: torch.as_tensor(x),
    "asarray of torch": lambda x: torch.asarray(x),
    "nothing": lambda x: dlpack.to_dlpack(),  # type: ignore[call-arg]
    "set_": lambda x: torch.empty(0, dtype=x.dtype).set_(x.detach()),
    "storage": lambda x: x.untyped_storage().fill_(0).nbytes(),
    "storage item": lambda x: x.untyped_storage().__setitem__(0, 1),
    "storage item beyond": lambda x: x.untyped_storage().__setitem__(1000, 1),
    "storage resize": lambda x: x.untyped_storage().resize_(100).nbytes(),
    "storage resize wrongly": lambda x: x.untyped_storage().resize_("a"),
    "storage fill wrongly": lambda x: x.untyped_storage().fill_("a"),
    "storage copy wrongly": lambda x: x.untyped_storage().copy_(torch.UntypedStorage(3)),
}


@pytest.mark.parametrize("route", OUT)
def test_types_flags_bases_and_errors_are_the_same(route: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, make in _tensors().items():
            if name == "meta" and route.startswith("storage"):
                continue  # PyTorch itself crashes, as it does where some of the others are resized
            if route.startswith("storage resize") and name not in ("plain", "bool", "scalar", "parameter"):
                continue
            expected = _result(lambda make=make: OUT[route](make()))
            with strict():
                keep = weight().exp()  # a save is alive: nothing is let through at the door
                found = _result(lambda make=make: OUT[route](make()))
                del keep
            assert found == expected, name


IN: dict[str, Callable[[], Any]] = {
    "from_numpy": lambda: torch.from_numpy(np.arange(3)),
    "from_numpy of no array": lambda: torch.from_numpy([1]),
    "from_numpy of objects": lambda: torch.from_numpy(np.array([None])),
    "from_numpy reversed": lambda: torch.from_numpy(np.arange(3)[::-1]),
    "as_tensor of a list": lambda: torch.as_tensor([1, 2]),
    "as_tensor by keyword": lambda: torch.as_tensor(data=np.arange(3)),
    "as_tensor of a dtype": lambda: torch.as_tensor(np.arange(3), dtype=torch.float16),
    "asarray": lambda: torch.asarray(np.arange(3.0), requires_grad=True),
    "asarray of a scalar": lambda: torch.asarray(np.float32(1)),
    "asarray of a buffer": lambda: torch.asarray(bytearray(8), dtype=torch.float32),
    "asarray copied": lambda: torch.asarray(np.arange(3), copy=True),
    "frombuffer": lambda: torch.frombuffer(bytearray(8), dtype=torch.int16, offset=2),
    "frombuffer too short": lambda: torch.frombuffer(bytearray(1), dtype=torch.int16),
    "from_dlpack": lambda: torch.from_dlpack(np.arange(3)),
    "from_dlpack of nothing": lambda: torch.from_dlpack(3),
    "from_file that is not there": lambda: torch.from_file("/nowhere/at/all", size=3),
    "no argument": lambda: torch.from_numpy(),  # type: ignore[call-arg]
}


@pytest.mark.parametrize("route", IN)
def test_what_is_taken_in_is_the_same(route: str) -> None:
    expected = _result(IN[route])
    with strict():
        assert _result(IN[route]) == expected


def test_an_array_is_found_again_through_its_base() -> None:
    x = weight(requires_grad=False)
    with strict():
        array = x.numpy()
        assert array.base.data_ptr() == x.data_ptr()
        assert np.asarray(x).ctypes.data == x.data_ptr()
        assert np.from_dlpack(x).ctypes.data == x.data_ptr()
        array[0] = 7
    assert x[0].tolist() == [7.0] * 4


def test_an_array_can_be_resized_once_its_tensor_is_gone() -> None:
    """NumPy refuses arrays with weak references: the guard's go with the tensor."""
    array = np.ones(4, dtype=np.float32)
    with strict():
        h = torch.from_numpy(array)
        out = h * torch.ones(4, requires_grad=True)
        out.sum().backward()
        del h, out
        array.resize(8)
    assert array.shape == (8,)


def test_reference_counts_are_the_same() -> None:
    array = np.ones(4, dtype=np.float32)
    before = sys.getrefcount(array)
    with strict():
        h = torch.from_numpy(array)
        assert sys.getrefcount(array) == before + 1
        del h
        assert sys.getrefcount(array) == before


def test_the_functions_pickle_as_ever() -> None:
    functions = [torch.from_numpy, torch.as_tensor, torch.asarray, torch.from_dlpack, torch.Tensor.numpy]
    expected = [pickle.loads(pickle.dumps(function)) for function in functions]
    with strict():
        names = ["from_numpy", "as_tensor", "asarray", "from_dlpack"]
        found = [pickle.loads(pickle.dumps(function)) for function in [getattr(torch, name) for name in names]]
        pickled = pickle.dumps(torch.Tensor.numpy)
    assert [function == other for function, other in zip(found, expected, strict=False)] == [True] * 4
    assert pickle.loads(pickled) is torch.Tensor.numpy


def test_storages_copy_and_print_as_ever() -> None:
    storage = torch.arange(4, dtype=torch.uint8).untyped_storage()
    expected = (repr(storage), list(copy.copy(storage)), list(copy.deepcopy(storage)))
    with strict():
        keep = weight().exp()
        found = (repr(storage), list(copy.copy(storage)), list(copy.deepcopy(storage)))
        assert storage.fill_(3) is storage
        assert list(storage) == [3] * 4
        del keep
    assert found == expected


def test_tensors_pickle_and_copy_as_ever() -> None:
    tensor = weight()
    with strict():
        keep = tensor.exp()
        for made in (pickle.loads(pickle.dumps(tensor)), copy.copy(tensor), copy.deepcopy(tensor)):
            assert (type(made), made.requires_grad) == (torch.Tensor, True)
            assert torch.equal(made, tensor)
        del keep


def test_as_tensor_under_a_default_device_and_in_script() -> None:
    with strict(), torch.device("cpu"):
        assert torch.as_tensor(np.ones(2)).device.type == "cpu"

    def scripted(x: float) -> torch.Tensor:
        return torch.as_tensor(x)

    with strict(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.jit.script(scripted)(2.0).item() == 2.0


def test_subclasses_see_their_calls() -> None:
    seen: list[str] = []

    class Seeing(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs)

    def calls() -> list[str]:
        seen.clear()
        x = torch.ones(3).as_subclass(Seeing)
        x.numpy()
        x.__dlpack__()
        np.asarray(x)
        return list(seen)

    expected = calls()
    with strict():
        assert calls() == expected


# ---- other processes ---------------------------------------------------------------------------------------


def _double(queue: Any, done: Any) -> None:
    tensor = queue.get()
    tensor.mul_(2)
    done.put(True)


@pytest.mark.timeout(100)
def test_another_process_writes_to_a_tensor_that_it_was_sent() -> None:
    context = mp.get_context("fork")
    queue, done = context.Queue(), context.Queue()
    process = context.Process(target=_double, args=(queue, done), daemon=True)
    process.start()
    h, w = weight(requires_grad=False), weight()
    with strict(), pytest.raises(SavedTensorCorruptionError, match="outside torch"):
        out = h * w
        queue.put(h)
        assert done.get(timeout=60)
        assert h[0, 0] == 2
        out.sum().backward()
    process.join(60)


def test_sharing_moves_no_value_and_is_silent() -> None:
    h, w = weight(requires_grad=False), weight()
    with strict() as guard:
        out = h * w
        assert h.share_memory_() is h
        assert h.is_shared()
        out.sum().backward()
        (h * w).sum().backward()
        assert not guard.violations
    assert w.grad is not None
    assert w.grad.tolist() == [[2.0] * 4] * 3


# ---- storages of trusted writers ---------------------------------------------------------------------------

_SHARDING = """
def free(storage):
    storage.resize_(0)

def fill(storage, size, values):
    storage.resize_(size)
    storage.copy_(values)
"""


def _sharding() -> dict[str, Any]:
    """Code that frees storages and fills them again, as FSDP does, in a file of FSDP's."""
    space: dict[str, Any] = {}
    exec(
        compile(_SHARDING, f"{os.path.dirname(torch.__file__)}/distributed/fsdp/_fully_shard/_invented.py", "exec"),
        space,
    )
    return space


@pytest.mark.parametrize("same", [True, False])
def test_a_storage_that_fsdp_frees_and_fills_is_judged_by_its_bytes(same: bool) -> None:
    sharding = _sharding()
    h, w = weight(requires_grad=False), weight()
    values = h.clone() if same else h + 1
    with Guard("record") as guard:
        out = h * w
        sharding["free"](h.untyped_storage())
        sharding["fill"](h.untyped_storage(), 48, values.untyped_storage())
        out.sum().backward()
    assert len(guard.violations) == (not same)
    assert all(violation.caught == "read" for violation in guard.violations)


def test_a_storage_that_anybody_else_frees_is_refused_before_it_happens() -> None:
    h, w = weight(requires_grad=False), weight()
    with strict(), pytest.raises(SavedTensorCorruptionError, match="resize_"):
        out = h * w
        h.untyped_storage().resize_(16)
    assert h.untyped_storage().nbytes() == 48
    out.sum().backward()


# ---- threads -----------------------------------------------------------------------------------------------


@pytest.mark.timeout(100)
def test_many_threads_export_save_and_let_go() -> None:
    x = weight(requires_grad=False)
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            w = weight()
            for i in range(150):
                array = x.numpy() if (i + seed) % 2 else np.from_dlpack(x)
                out = (x * w).sin()
                own = torch.from_numpy(np.full((3, 4), float(i), dtype=np.float32))
                (out * own).sum().backward()
                array.sum()
                del array
        except BaseException as error:
            errors.append(error)

    with strict() as guard:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        assert not guard.violations
        EXPORTS.settle_dead()
        assert not EXPORTS.by_storage[torch._C._storage_id(x)].exports


def test_an_array_written_after_the_guard_is_left_is_not_its_business() -> None:
    h, w = weight(requires_grad=False), weight()
    with strict() as guard:
        out = h * w
        array = h.numpy()
    array[0] = 5
    out.sum().backward()
    assert not guard.violations


def test_an_array_written_in_the_guard_is_told_after_it() -> None:
    h, w = weight(requires_grad=False), weight()
    with strict() as guard:
        out = h * w
        h.numpy()[0] = 5
    with pytest.raises(SavedTensorCorruptionError):
        out.sum().backward()
    assert len(guard.violations) == 1


def test_nothing_is_patched_without_a_guard() -> None:
    assert "numpy" not in vars(torch.Tensor)
    assert not {"fill_", "copy_", "resize_", "__setitem__", "_byteswap"} & set(vars(torch.UntypedStorage))
    with torchguard.strict():
        assert "numpy" in vars(torch.Tensor)
    assert "numpy" not in vars(torch.Tensor)
