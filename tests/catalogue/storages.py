"""Writes by the methods of a storage, which has no version counter, and storages that get other memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from harness import Run, add, program

Handle = Callable[[torch.Tensor], Any]
Write = Callable[[Any], Any]

_ROUTE = "storage methods"


def _other() -> Any:
    return torch.full((3, 4), 7.0).untyped_storage()


def _typed(x: torch.Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return x.storage()


UNTYPED: dict[str, Write] = {
    "fill_": lambda s: s.fill_(1),
    "copy_": lambda s: s.copy_(_other()),
    "copy_from_a_typed_one": lambda s: s.copy_(torch.full((3, 4), 7.0)._typed_storage()._untyped_storage),
    "copy_by_keyword": lambda s: s.copy_(_other(), non_blocking=True),
    "item": lambda s: s.__setitem__(3, 1),
    "slice": lambda s: s.__setitem__(slice(2, 8), 1),
    "unbound_fill_": lambda s: torch.UntypedStorage.fill_(s, 1),
    "byteswap": lambda s: s.byteswap(torch.float32),
}
TYPED: dict[str, Write] = {
    "fill_": lambda s: s.fill_(7.0),
    "copy_": lambda s: s.copy_(_typed(torch.full((3, 4), 7.0))),
    "item": lambda s: s.__setitem__(3, 7.0),
    "slice": lambda s: s.__setitem__(slice(2, 8), 7.0),
}
HANDLES: dict[str, tuple[Handle, dict[str, Write]]] = {
    "untyped": (lambda x: x.untyped_storage(), UNTYPED),
    "untyped_of_data": (lambda x: x.data.untyped_storage(), {"fill_": UNTYPED["fill_"]}),
    "typed": (_typed, TYPED),
    "private_typed": (lambda x: x._typed_storage(), TYPED),
    "typed_untyped": (lambda x: _typed(x)._untyped_storage, {"fill_": UNTYPED["fill_"]}),
}


def _programs(name: str, handle: Handle, write: Write) -> None:
    def of_an_input(run: Run) -> Any:
        w, h = run.leaf(), run.leaf(requires_grad=False)
        out = h * w  # saved
        s = handle(h)
        run.write(write, s)
        out.sum().backward()
        return [w.grad]

    def of_an_output(run: Run) -> Any:
        w = run.leaf()
        s = handle(w)
        out = w.exp()  # saved
        s = handle(out)
        run.write(write, s)
        out.sum().backward()
        return [w.grad]

    def taken_before_the_guard(run: Run) -> Any:
        w, h = run.leaf(), run.leaf(requires_grad=False)
        s = handle(h)
        with run.guard():
            out = h.t() @ w  # saved
            run.write(write, s)
            out.sum().backward()
        return [w.grad]

    def after_backward(run: Run) -> Any:
        w, h = run.leaf(), run.leaf(requires_grad=False)
        s = handle(h)
        (h * w).sum().backward()
        run.write(write, s)
        return [w.grad]

    def of_a_clone(run: Run) -> Any:
        w, h = run.leaf(), run.leaf(requires_grad=False)
        out = h * w
        run.write(write, handle(h.clone()))
        out.sum().backward()
        return [w.grad]

    def of_what_is_there(run: Run) -> Any:
        w, h = run.leaf(), run.leaf(requires_grad=False)
        h.untyped_storage().fill_(0)
        out = h * w
        run.write(lambda s: s.fill_(0), handle(h))
        out.sum().backward()
        return [w.grad]

    names = []
    for body in (of_an_input, of_an_output, taken_before_the_guard):
        names.append(f"storage_{name}_{body.__name__}")
        add(body, name=names[-1], route=_ROUTE, kind="corrupting", enters_guard="guard" in body.__name__)
    for twin in (after_backward, of_a_clone, of_what_is_there):
        add(twin, name=f"storage_{name}_{twin.__name__}", route=_ROUTE, kind="innocent", twin_of=names)


for _kind, (_handle, _writes) in HANDLES.items():
    for _name, _write in _writes.items():
        _programs(f"{_kind}_{_name}", _handle, _write)


@program(route=_ROUTE, kind="innocent", twin_of="storage_untyped_slice_of_an_input")
def storage_slice_of_other_rows(run: Run) -> Any:
    w, both = run.leaf(), torch.ones(2, 3, 4)
    out = both[0] * w
    run.write(lambda: both.untyped_storage().__setitem__(slice(48, 96), 3))
    out.sum().backward()
    return [w.grad]


@program(route=_ROUTE, kind="innocent", twin_of="storage_typed_slice_of_an_input")
def typed_storage_item_between_the_columns(run: Run) -> Any:
    w, wide = run.leaf(), torch.ones(3, 8)
    out = wide[:, ::2] * w
    run.write(lambda: wide._typed_storage()._setitem(3, 7.0))
    out.sum().backward()
    return [w.grad]


# ---- resize_ -------------------------------------------------------------------------------------------------


@program(route="resize_", kind="corrupting")
def storage_freed_and_refilled_with_other_values(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w  # saved
    s = h.untyped_storage()

    def write() -> None:
        s.resize_(0)  # written
        s.resize_(48)
        s.fill_(1)  # written

    run.write(write)
    out.sum().backward()
    return [w.grad]


@program(route="resize_", kind="innocent", twin_of="storage_freed_and_refilled_with_other_values")
def storage_freed_after_backward(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    (h * w).sum().backward()
    run.write(lambda: h.untyped_storage().resize_(0))
    return [w.grad]


@program(route="resize_", kind="innocent", twin_of="storage_freed_and_refilled_with_other_values")
def storage_grown(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w
    run.write(lambda: h.untyped_storage().resize_(1 << 16))
    out.sum().backward()
    return [w.grad]


@program(route="resize_", kind="innocent", twin_of="storage_freed_and_refilled_with_other_values")
def storage_that_loses_what_nothing_saved(run: Run) -> Any:
    w, long = run.leaf(), torch.ones(24)
    out = long[:12].view(3, 4) * w
    run.write(lambda: long.untyped_storage().resize_(48))
    out.sum().backward()
    return [w.grad]


@program(route="resize_", kind="corrupting")
def alias_written_after_its_storage_has_grown(run: Run) -> Any:
    """The storage lies elsewhere then: what is known by address must follow."""
    w, h = run.leaf(), run.leaf(requires_grad=False)
    c = h.data
    out = h * w  # saved
    h.untyped_storage().resize_(1 << 16)
    run.write(lambda: c.zero_())
    out.sum().backward()
    return [w.grad]


@program(route="resize_", kind="corrupting", caught="read")
def alias_written_unseen_after_its_storage_has_grown(run: Run) -> Any:
    w = torch.ones(100, 100, requires_grad=True)
    h = torch.ones(100, 100)
    c = h.data
    out = h * w  # saved
    h.untyped_storage().resize_(1 << 20)
    run.write(lambda: torch.zeros(100, 100, out=c))
    out.sum().backward()
    return [w.grad]


@program(
    route="resize_",
    kind="innocent",
    twin_of=("alias_written_after_its_storage_has_grown", "alias_written_unseen_after_its_storage_has_grown"),
)
def alias_read_after_its_storage_has_grown(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    c = h.data
    out = h * w
    h.untyped_storage().resize_(1 << 16)
    run.write(lambda: c.sum())
    out.sum().backward()
    return [w.grad]


@program(route="resize_", kind="corrupting", caught="read", every_call="read")
def exported_after_its_storage_has_grown(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w  # saved
    h.untyped_storage().resize_(1 << 16)
    array = h.numpy()
    run.write(lambda: array.fill(7))
    out.sum().backward()
    return [w.grad]


@program(route="resize_", kind="corrupting")
def imported_alias_written_after_the_storage_has_grown(run: Run) -> Any:
    """Another storage lies over the new address, and not over the old one."""
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w  # saved
    torch.from_dlpack(torch.ones(3)).zero_()  # draws the map of addresses
    h.untyped_storage().resize_(1 << 16)
    storage = torch.from_dlpack(h)
    run.write(lambda: storage.zero_())
    out.sum().backward()
    return [w.grad]


@program(
    route="resize_",
    kind="innocent",
    twin_of=("exported_after_its_storage_has_grown", "imported_alias_written_after_the_storage_has_grown"),
)
def exported_and_read_after_its_storage_has_grown(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w
    torch.from_dlpack(torch.ones(3)).zero_()
    h.untyped_storage().resize_(1 << 16)
    array, tensor = h.numpy(), torch.from_dlpack(h)
    run.write(lambda: array.sum() + tensor.sum())
    out.sum().backward()
    return [w.grad]


# ---- shared memory -------------------------------------------------------------------------------------------


def _second_mapping(x: torch.Tensor) -> torch.Tensor:
    """The same shared memory at another address, as a process that it is sent to has it."""
    untyped = x.untyped_storage()
    handle, size = untyped._share_fd_cpu_()  # type: ignore[attr-defined]
    theirs = torch.UntypedStorage._new_shared_fd_cpu(handle, size)  # type: ignore[attr-defined]
    return torch.empty(0).set_(theirs, 0, x.shape)


@program(route="shared memory", kind="corrupting", caught="read", every_call="read")
def shared_memory_written_by_somebody_else(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    theirs = _second_mapping(h.share_memory_())
    out = h * w  # saved
    run.write(lambda: theirs.zero_())
    out.sum().backward()
    return [w.grad]


@program(route="shared memory", kind="corrupting", caught="read", every_call="read")
def sent_between_save_and_backward(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w  # saved
    theirs = _second_mapping(h)
    run.write(lambda: theirs.zero_())
    out.sum().backward()
    return [w.grad]


@program(route="shared memory", kind="corrupting", caught="read", every_call="read", enters_guard=True)
def received_before_the_guard(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    theirs = _second_mapping(h)
    with run.guard():
        out = h * w  # saved
        run.write(lambda: theirs.zero_())
        out.sum().backward()
    return [w.grad]


@program(route="shared memory", kind="corrupting")
def alias_written_after_sharing(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    c = h.data
    out = h * w  # saved
    h.share_memory_()
    run.write(lambda: c.zero_())
    out.sum().backward()
    return [w.grad]


@program(
    route="shared memory",
    kind="innocent",
    twin_of=(
        "shared_memory_written_by_somebody_else",
        "sent_between_save_and_backward",
        "received_before_the_guard",
        "alias_written_after_sharing",
    ),
)
def shared_memory_read_by_somebody_else(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    c = h.data
    out = h * w
    theirs = _second_mapping(h)
    run.write(lambda: theirs.sum() + c.sum())
    out.sum().backward()
    return [w.grad]


@program(route="shared memory", kind="innocent", twin_of="shared_memory_written_by_somebody_else")
def shared_weights_written_after_backward(run: Run) -> Any:
    """Hogwild: a worker writes to the shared weights once it has its gradients."""
    w, x = torch.nn.Parameter(torch.ones(3, 4)), run.leaf()
    w.share_memory_()
    theirs = _second_mapping(w.detach())
    torch.nn.functional.linear(x, w).sum().backward()
    run.write(lambda: theirs.sub_(0.1))
    return [w.grad, x.grad]
