"""How the alias came to be, and which part of the memory it shows."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from harness import Run, add, program
from torch import nn

import torchguard

Alias = Callable[[torch.Tensor], torch.Tensor]


# ---- what the alias is taken of -----------------------------------------------------------------------------------


def _leaf(run: Run, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = run.leaf()
    return h, h * w  # saved


def _constant(run: Run, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = run.leaf(requires_grad=False)
    return h, h * w  # saved


def _non_leaf_input(run: Run, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = run.leaf() + 1
    return h, h * w  # saved


def _output(run: Run, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = w.tanh()  # saved
    return out, out


def _view(run: Run, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = torch.ones(2, 3, 4)[1]
    return h, h * w  # saved


def _view_of_a_leaf(run: Run, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = run.leaf([[1.0] * 4] * 6)[::2]
    return h, h * w  # saved


def _parameter(run: Run, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = nn.Parameter(torch.ones(3, 4))
    return h, h * w  # saved


SAVES = {
    "leaf": _leaf,
    "constant": _constant,
    "non_leaf_input": _non_leaf_input,
    "output": _output,
    "view": _view,
    "view_of_a_leaf": _view_of_a_leaf,
    "parameter": _parameter,
}

# ---- how it is taken ----------------------------------------------------------------------------------------------

THROUGH_DATA: dict[str, Alias] = {
    "data": lambda h: h.data,
    "data_of_data": lambda h: h.data.data.data,
    "data_then_detach": lambda h: h.data.detach(),
    "detach_then_data": lambda h: h.detach().data,
    "data_by_getattr": lambda h: getattr(h, "data"),  # noqa: B009
    "slice": lambda h: h.data[1:],
    "row": lambda h: h.data[1],
    "element": lambda h: h.data[1, 2],
    "every_other_column": lambda h: h.data[:, ::2],
    "transpose": lambda h: h.data.t(),
    "property_T": lambda h: h.data.T,
    "property_mT": lambda h: h.data.mT,
    "permute": lambda h: h.data.permute(1, 0),
    "movedim": lambda h: h.data.movedim(0, 1),
    "view": lambda h: h.data.view(-1) if h.is_contiguous() else h.data.view(3, 2, 2),
    "view_as": lambda h: h.data.view_as(torch.empty(3, 4)),
    "reshape": lambda h: h.data.reshape(3, 2, 2),
    "unflatten": lambda h: h.data.unflatten(1, (2, 2)),
    "unsqueeze": lambda h: h.data.unsqueeze(0),
    "narrow": lambda h: h.data.narrow(1, 1, 2),
    "select": lambda h: h.data.select(0, 2),
    "chunk": lambda h: h.data.chunk(2)[1],
    "split": lambda h: h.data.split(1, dim=1)[2],
    "unbind": lambda h: h.data.unbind()[2],
    "iteration": lambda h: list(h.data)[1],
    "as_strided": lambda h: h.data.as_strided((2, 2), (1, 2), h.storage_offset()),
    "as_strided_from_the_storage_start": lambda h: h.data.as_strided((3,), (1,), h.storage_offset() + 1),
    "diagonal": lambda h: h.data.diagonal(),
    "unfold": lambda h: h.data.unfold(1, 2, 2),
    "expand_by_nothing": lambda h: h.data.expand(1, 3, 4),
    "same_size_dtype": lambda h: h.data.view(torch.int32),
    "smaller_dtype": lambda h: h.data.view(torch.uint8),
    "larger_dtype": lambda h: h.data.view(torch.float64) if h.is_contiguous() else h.data.view(torch.int32),
    "as_complex": lambda h: torch.view_as_complex(h.data.unflatten(1, (2, 2))),
    "new_parameter": lambda h: nn.Parameter(h.data, requires_grad=False),
    "alias_op": lambda h: torch.ops.aten.alias(h.data),
    "to_that_copies_nothing": lambda h: h.data.to(torch.float32),
    "contiguous_that_copies_nothing": lambda h: h.data[0].contiguous(),
}

OTHER_ROUTES: dict[str, Alias] = {
    "set_from_a_storage": lambda h: torch.empty(0).set_(h.untyped_storage(), h.storage_offset(), h.shape, h.stride()),
    "set_from_a_tensor": lambda h: torch.empty(0).set_(h.detach()),
    "from_numpy": lambda h: torch.from_numpy(h.detach().numpy()),
    "from_numpy_interior": lambda h: torch.from_numpy(h.detach().numpy()[1]),
    "from_numpy_transposed": lambda h: torch.from_numpy(h.detach().numpy().T),
    "from_numpy_other_dtype": lambda h: torch.from_numpy(h.detach().numpy().view(np.int32)),
    "as_tensor": lambda h: torch.as_tensor(h.detach().numpy()),
    "asarray": lambda h: torch.asarray(h.detach().numpy()),
    "frombuffer": lambda h: torch.frombuffer(h.detach()[0].numpy(), dtype=torch.float32),
    "from_dlpack": lambda h: torch.from_dlpack(h.detach()),
    "from_dlpack_interior": lambda h: torch.from_dlpack(h.detach()[1]),
    "from_dlpack_capsule": lambda h: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(h.detach())),
    "from_numpy_of_numpy_from_dlpack": lambda h: torch.from_numpy(h.detach().numpy()[:2]),
}


def _one_for(save: Any, alias: Alias, name: str, route: str, **declared: Any) -> None:
    def corrupting(run: Run) -> Any:
        w = run.leaf()
        h, out = save(run, w)
        c = alias(h)  # the alias, of .data or not
        run.write(lambda: c.fill_(3))
        out.sum().backward()
        return [w.grad]

    def of_a_clone(run: Run) -> Any:
        w = run.leaf()
        h, out = save(run, w)
        c = alias(h.detach().clone())
        run.write(lambda: c.fill_(3))
        out.sum().backward()
        return [w.grad]

    def after_backward(run: Run) -> Any:
        w = run.leaf()
        h, out = save(run, w)
        c = alias(h)
        out.sum().backward()
        run.write(lambda: c.fill_(3))
        return [w.grad]

    add(corrupting, name=name, route=route, kind="corrupting", **declared)
    for twin in (of_a_clone, after_backward):
        add(twin, name=f"{name}_{twin.__name__}", route=route, kind="innocent", twin_of=name)


for _name, _save in SAVES.items():
    _one_for(_save, THROUGH_DATA["data"], f"data_of_{_name}", ".data")
for _name, _alias in THROUGH_DATA.items():
    _one_for(_non_leaf_input, _alias, f"alias_{_name}", "view of .data")
for _name in ("transpose", "slice", "unfold", "same_size_dtype", "as_strided"):
    _one_for(_view_of_a_leaf, THROUGH_DATA[_name], f"alias_{_name}_of_a_view", "view of .data")
    _one_for(_output, THROUGH_DATA[_name], f"alias_{_name}_of_an_output", "view of .data")
for _name, _alias in OTHER_ROUTES.items():
    _one_for(_non_leaf_input, _alias, f"alias_{_name}", "alias without .data")
    _one_for(_output, _alias, f"alias_{_name}_of_an_output", "alias without .data")


# ---- which part ---------------------------------------------------------------------------------------------------

Part = Callable[[torch.Tensor], torch.Tensor]

#: What is saved of a 4x6 buffer; a part that shares elements with it; a part that shares none.
PARTS: dict[str, tuple[Part, Part, Part]] = {
    "rows": (lambda b: b[1], lambda b: b[1:3], lambda b: b[2]),
    "rows_around": (lambda b: b[1:3], lambda b: b[0:2], lambda b: b[::3]),
    "columns": (lambda b: b[:, 0], lambda b: b[:, :2], lambda b: b[:, 1]),
    "last_columns": (lambda b: b[:, 3:], lambda b: b[:, 2:4], lambda b: b[:, :3]),
    "interleaved": (lambda b: b.view(-1)[0::2], lambda b: b.view(-1)[0::4], lambda b: b.view(-1)[1::2]),
    "interleaved_by_three": (lambda b: b.view(-1)[0::3], lambda b: b.view(-1)[0::2], lambda b: b.view(-1)[1::3]),
    "diagonals": (lambda b: b.diagonal(), lambda b: b.diagonal(), lambda b: b.diagonal(1)),
    "diagonal_and_column": (lambda b: b.diagonal(), lambda b: b[:, 3], lambda b: b[:, 4]),
    "transposed": (lambda b: b.t()[0], lambda b: b[2], lambda b: b.t()[1]),
    "transposed_blocks": (lambda b: b[:2, :3].t(), lambda b: b[1:, 2:], lambda b: b[:, 3:].t()),
    "blocks": (lambda b: b[:2, :3], lambda b: b[1:3, 2:5], lambda b: b[2:, 3:]),
    "block_between": (lambda b: b[:, 2:4], lambda b: b[0, 3], lambda b: b[:, 4:]),
    "adjacent": (lambda b: b.view(-1)[:12], lambda b: b.view(-1)[11:], lambda b: b.view(-1)[12:]),
    "elements": (lambda b: b[1, 1], lambda b: b[1, 1], lambda b: b[1, 2]),
    "overlapping_windows": (
        lambda b: b.view(-1).unfold(0, 2, 3),
        lambda b: b.view(-1)[1::3],
        lambda b: b.view(-1)[2::3],
    ),
    "expanded": (lambda b: b[:1].expand(3, 6), lambda b: b[0, 5], lambda b: b[1:]),
    "bytes": (
        lambda b: b[1],
        lambda b: b.view(torch.uint8).view(-1)[24:32],
        lambda b: b.view(torch.uint8).view(-1)[:24],
    ),
    "a_single_byte": (
        lambda b: b[0, :1],
        lambda b: b.view(torch.uint8).view(-1)[2:3],
        lambda b: b.view(torch.uint8).view(-1)[4:5],
    ),
    "halves_of_elements": (
        lambda b: b[:, ::2],
        lambda b: b.view(torch.int16)[:, 1::4],
        lambda b: b.view(torch.int16)[:, 2::4],
    ),
    "strided_blocks": (
        lambda b: b.as_strided((3, 2), (6, 2)),
        lambda b: b.as_strided((3,), (7,), 0),
        lambda b: b.as_strided((3, 3), (6, 2), 1),
    ),
    "everything_or_nothing": (lambda b: b, lambda b: b[3, 5], lambda b: b[4:]),
    "three_dimensions": (
        lambda b: b.view(2, 3, 4)[:, 1],
        lambda b: b.view(2, 3, 4)[1, :, 0],
        lambda b: b.view(2, 3, 4)[:, ::2],
    ),
}


def _parts() -> None:
    def body_for(saved: Part, written: Part) -> Any:
        def body(run: Run) -> Any:
            b = torch.arange(24.0).view(4, 6) + 1
            w = torch.ones_like(saved(b)).contiguous().requires_grad_()
            out = saved(b) * w  # saved
            c = written(b.data)
            run.write(lambda: c.fill_(77))
            out.sum().backward()
            return [w.grad]

        return body

    for name, (saved, hit, miss) in PARTS.items():
        full = f"part_{name}"
        add(body_for(saved, hit), name=full, route="part of .data", kind="corrupting")
        add(body_for(saved, miss), name=f"{full}_disjoint", route="part of .data", kind="innocent", twin_of=full)


_parts()


@program(route="part of .data", kind="corrupting")
def part_many_saves_one_written(run: Run) -> Any:
    b = torch.arange(24.0).view(4, 6)
    ws = [run.leaf([1.0] * 6) for _ in range(4)]
    total = sum((b[i] * w).sum() for i, w in enumerate(ws))  # saved
    c = b.data
    run.write(lambda: c[3].zero_())
    total.backward()
    return [w.grad for w in ws]


@program(route="part of .data", kind="innocent", twin_of="part_many_saves_one_written")
def part_many_saves_the_row_between_written(run: Run) -> Any:
    b = torch.arange(30.0).view(5, 6)
    ws = [run.leaf([1.0] * 6) for _ in range(4)]
    total = sum((b[i if i < 2 else i + 1] * w).sum() for i, w in enumerate(ws))
    c = b.data
    run.write(lambda: c[2].zero_())
    total.backward()
    return [w.grad for w in ws]


@program(route="alias without .data", kind="corrupting")
def storage_object_used_again_for_other_memory(run: Run) -> Any:
    """A map of addresses that is drawn once must not outlive the storage it was drawn for."""
    always_alive = run.leaf() * run.leaf()
    seen: dict[int, int] = {}
    shift = []
    for _ in range(1000):
        w = run.leaf([[1.0] * 4] * 5)
        h = torch.ones(5, 4)
        key, address = h.untyped_storage()._cdata, h.data_ptr()
        out = (h * w).sum()  # saved
        if seen.setdefault(key, address) != address:
            break
        torch.from_numpy(np.zeros(1)).add_(1)
        out.backward()
        shift.append(torch.ones(5, 4))
        if len(shift) % 3 == 0:
            del shift[0]
        del h, out
    else:
        raise AssertionError("the allocator never used a storage object again")
    c = torch.from_numpy(h.numpy())  # noqa: F821 (bound where the loop ends)
    run.write(lambda: c.fill_(3))
    del always_alive
    return [torch.autograd.grad(out, w)]  # noqa: F821 (bound where the loop ends)


@program(route="alias without .data", kind="innocent", twin_of="storage_object_used_again_for_other_memory")
def foreign_memory_that_nothing_saved(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w
    run.write(lambda: torch.from_numpy(np.zeros((3, 4), np.float32)).fill_(3))
    out.sum().backward()
    return [w.grad]


# ---- complex ------------------------------------------------------------------------------------------------------


def _complex(run: Run) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    w = run.leaf([1 + 1j, 2 - 1j, 3 + 0j], torch.complex64)
    z = torch.tensor([1 + 2j, 3 + 4j, 5 + 6j])
    return w, z, (z * w).abs()  # saved


def _complex_part(run: Run) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    w = run.leaf([1.0, 2.0, 3.0])
    z = torch.tensor([1 + 2j, 3 + 4j, 5 + 6j])
    return w, z, z.real * w  # saved


def _real(c: torch.Tensor) -> Any:
    c.real.zero_()


def _imag(c: torch.Tensor) -> Any:
    c.imag.zero_()


def _set_real(c: torch.Tensor) -> Any:
    c.real = torch.zeros(3)


def _set_imag(c: torch.Tensor) -> Any:
    c.imag = torch.zeros(3)


def _as_real(c: torch.Tensor) -> Any:
    torch.view_as_real(c)[:, 0].zero_()


def _as_real_imag(c: torch.Tensor) -> Any:
    torch.view_as_real(c)[:, 1].zero_()


def _conjugate_view(c: torch.Tensor) -> Any:
    c.conj().mul_(2)


def _negative_view(c: torch.Tensor) -> Any:
    c.conj().imag[:2].zero_()


def _complex_mul(c: torch.Tensor) -> Any:
    c.mul_(1j)


def _from_a_conjugate(c: torch.Tensor) -> Any:
    """What it is given lies in memory as the save does, and reads otherwise."""
    c.copy_(c.clone().conj())


def _conjugate_view_as_it_was(c: torch.Tensor) -> Any:
    c.conj().copy_(torch.tensor([1 - 2j, 3 - 4j, 5 - 6j]))


def _negative_view_as_it_was(c: torch.Tensor) -> Any:
    c.conj().imag.copy_(torch.tensor([-2.0, -4.0, -6.0]))


def _from_a_conjugate_as_it_was(c: torch.Tensor) -> Any:
    c.copy_(torch.tensor([1 - 2j, 3 - 4j, 5 - 6j]).conj())


def _from_its_own_conjugate(c: torch.Tensor) -> Any:
    """A call that reads, conjugated, what it writes to."""
    c[:2].copy_(c[:2].conj())


def _written_by_data(make: Any, write: Any, late: bool = False) -> Any:
    """``make`` gives a leaf, what is saved, and an output; ``write`` writes to ``.data`` of the second."""

    def body(run: Run) -> Any:
        w, saved, out = make(run)
        c = saved.data
        if not late:
            run.write(write, c)
        out.sum().backward()
        if late:
            run.write(write, c)
        return [w.grad]

    return body


def _complex_programs() -> None:
    route = "complex alias"
    writes = (_real, _imag, _set_real, _set_imag, _as_real, _conjugate_view, _negative_view, _complex_mul)
    for write in (*writes, _from_a_conjugate, _from_its_own_conjugate):
        name = f"complex{write.__name__}"
        add(_written_by_data(_complex, write), name=name, route=route, kind="corrupting")
        add(
            _written_by_data(_complex, write, True),
            name=f"{name}_after_backward",
            route=route,
            kind="innocent",
            twin_of=name,
        )
    for twin in (_conjugate_view_as_it_was, _negative_view_as_it_was, _from_a_conjugate_as_it_was):
        of = f"complex{twin.__name__.removesuffix('_as_it_was')}"
        add(_written_by_data(_complex, twin), name=f"complex{twin.__name__}", route=route, kind="innocent", twin_of=of)
    for hit, miss in ((_real, _imag), (_set_real, _set_imag), (_as_real, _as_real_imag)):
        name = f"real_part_saved{hit.__name__}"
        add(_written_by_data(_complex_part, hit), name=name, route=route, kind="corrupting")
        add(
            _written_by_data(_complex_part, miss),
            name=f"{name}_not_touched",
            route=route,
            kind="innocent",
            twin_of=name,
        )


_complex_programs()


# ---- quantised ----------------------------------------------------------------------------------------------------


class _Quantised(torch.autograd.Function):
    """Keeps a tensor of which no copy over other memory can be made: the bytes decide when backward reads it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(q)
        return x * q.dequantize()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return grad * ctx.saved_tensors[0].dequantize(), None


def _quantise(values: list[float]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return torch.quantize_per_tensor(torch.tensor(values), 0.5, 0, torch.qint8)


def _quantised(run: Run) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    w, q = run.leaf([1.0, 2.0, 3.0]), _quantise([1.0, 2.0, 3.0])
    return w, q, _Quantised.apply(w, q)  # type: ignore[no-untyped-call] # saved


def _quantised_programs() -> None:
    route = "quantised alias"
    writes = {
        "fill": lambda c: c.fill_(2.0),
        "copy": lambda c: c.copy_(_quantise([1.0, 2.0, 4.0])),
        "row": lambda c: c[1:].fill_(3.0),
    }
    for name, write in writes.items():
        name = f"quantised_{name}"
        add(
            _written_by_data(_quantised, write),
            name=name,
            route=route,
            kind="corrupting",
            caught="read",
            every_call="read",
        )
        add(
            _written_by_data(_quantised, write, True),
            name=f"{name}_after_backward",
            route=route,
            kind="innocent",
            twin_of=name,
        )
    same = {
        "copy": lambda c: c.copy_(_quantise([1.0, 2.0, 3.0])),
        "row": lambda c: c[1:2].fill_(2.0),
    }
    for name, write in same.items():
        of = f"quantised_{name}"
        add(
            _written_by_data(_quantised, write), name=f"{of}_of_what_is_there", route=route, kind="innocent", twin_of=of
        )


_quantised_programs()


# ---- when it was taken --------------------------------------------------------------------------------------------


@program(route="alias from before the guard", kind="corrupting", enters_guard=True)
def alias_taken_before_the_guard(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    c = h.data
    with run.guard():
        out = h * w  # saved
        run.write(lambda: c.zero_())
        out.sum().backward()
    return [w.grad]


@program(route="alias from before the guard", kind="corrupting", enters_guard=True)
def alias_of_a_parameter_taken_before_the_guard(run: Run) -> Any:
    layer = nn.Linear(4, 2)
    x = run.leaf()
    weights = layer.weight.data
    with run.guard():
        out = layer(x).tanh()  # saved
        run.write(lambda: weights.clamp_(-0.01, 0.01))
        out.sum().backward()
    return [x.grad]


@program(route="alias from before the guard", kind="corrupting", enters_guard=True)
def view_of_an_alias_from_before_the_guard(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    c = h.data
    with run.guard():
        out = h * w  # saved
        run.write(lambda: c[1:].t().zero_())
        out.sum().backward()
    return [w.grad]


@program(
    route="alias from before the guard",
    kind="innocent",
    enters_guard=True,
    twin_of=[
        "alias_taken_before_the_guard",
        "alias_of_a_parameter_taken_before_the_guard",
        "view_of_an_alias_from_before_the_guard",
    ],
)
def alias_from_before_the_guard_after_backward(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    c = h.data
    with run.guard():
        out = h * w
        out.sum().backward()
        run.write(lambda: c.zero_())
    return [w.grad]


@program(route="alias from before the guard", kind="refused", enters_guard=True)
def tracked_alias_from_before_the_guard(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    c = h.detach()
    with run.guard():
        out = h * w
        run.write(lambda: c.zero_())
        out.sum().backward()
    return [w.grad]


@program(route=".data", kind="corrupting")
def alias_taken_before_the_save(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    c = h.data
    out = h * w  # saved
    run.write(lambda: c.zero_())
    out.sum().backward()
    return [w.grad]


@program(route=".data", kind="innocent", twin_of="alias_taken_before_the_save", truth="cloned saves")
def alias_written_before_the_save(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    c = h.data
    run.write(lambda: c.fill_(5))
    out = h * w
    out.sum().backward()
    return [w.grad]


@program(route=".data", kind="corrupting", truth="cloned saves")
def alias_written_before_and_after_the_save(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    c = h.data
    c.fill_(5)
    out = h * w  # saved
    run.write(lambda: c.fill_(6))
    out.sum().backward()
    return [w.grad]


@program(
    route=".data",
    kind="innocent",
    truth="cloned saves",
    twin_of="alias_written_before_and_after_the_save",
)
def alias_written_between_two_forwards(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    c = h.data
    (h * w).sum().backward()
    run.write(lambda: c.fill_(6))
    (h * w).sum().backward()
    return [w.grad]


@program(route=".data", kind="innocent", twin_of="alias_taken_before_the_save")
def graph_dropped_before_the_write(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w
    c = h.data
    del out
    run.write(lambda: c.zero_())
    return [torch.zeros(1)]


@program(route=".data", kind="innocent", twin_of="alias_taken_before_the_save")
def graph_in_a_cycle_collected_before_the_write(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    holder: list[Any] = [h * w]
    holder.append(holder)
    del holder
    gc.collect()
    c = h.data
    run.write(lambda: c.zero_())
    return [torch.zeros(1)]


@program(route=".data", kind="innocent", twin_of="alias_taken_before_the_save")
def memory_reused_after_the_graph_is_gone(run: Run) -> Any:
    for _ in range(8):
        w = run.leaf()
        (w.exp() * 2).sum().backward()
        run.write(lambda: torch.ones(3, 4).data.zero_())
    return [w.grad]


@program(route=".data", kind="innocent", twin_of="alias_taken_before_the_save")
def read_through_data(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w
    run.write(lambda: h.data.sum().item() + h.data.clone().mul_(2).sum().item())
    out.sum().backward()
    return [w.grad]


@program(route=".data", kind="innocent", twin_of="alias_taken_before_the_save")
def forward_under_no_grad(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    with torch.no_grad():
        out = h * w
    c = h.data
    run.write(lambda: c.zero_())
    return [out]


@program(route=".data", kind="corrupting")
def write_under_no_grad(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out = h * w  # saved
    with torch.no_grad():
        c = h.data
        run.write(lambda: c.zero_())
    out.sum().backward()
    return [w.grad]


@program(route=".data", kind="refused")
def tracked_write_under_no_grad(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out = h * w
    with torch.no_grad():
        run.write(lambda: h.zero_())
    out.sum().backward()
    return [w.grad]


@program(route=".data", kind="corrupting")
def data_inline(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out = h * w  # saved
    run.write(lambda: h.data.zero_())
    out.sum().backward()
    return [w.grad]


@program(route=".data", kind="innocent", twin_of=["data_inline", "write_under_no_grad"])
def data_inline_after_backward(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    (h * w).sum().backward()
    run.write(lambda: h.data.zero_())
    return [w.grad]


@program(route=".data", kind="corrupting", exact=False)
def two_writes_of_which_both_corrupt(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out = h * w  # saved

    def write() -> None:
        h.data[0].zero_()  # written
        h.data[1].zero_()

    run.write(write)
    out.sum().backward()
    return [w.grad]


@program(route=".data", kind="innocent", twin_of="two_writes_of_which_both_corrupt")
def two_writes_after_backward(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    (h * w).sum().backward()

    def write() -> None:
        h.data[0].zero_()
        h.data[1].zero_()

    run.write(write)
    return [w.grad]


@program(route=".data", kind="unread")
def changed_and_put_back(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out = h * w
    c = h.data
    old = c.clone()
    run.write(lambda: c.zero_())
    run.write(lambda: c.copy_(old))
    out.sum().backward()
    return [w.grad]


@program(route=".data", kind="unread")
def saved_and_never_read(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out = h * w
    run.write(lambda: h.data.zero_())
    return [out.detach()]


@program(route=".data", kind="unread")
def branch_that_backward_does_not_take(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out, other = h * w, w * 3
    run.write(lambda: h.data.zero_())
    other.sum().backward()
    del out
    return [w.grad]


@program(route=".data", kind="unread", read_in_vain=True)
def gradient_that_is_not_asked_for(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out = h * w
    run.write(lambda: h.data.zero_())
    return [torch.autograd.grad(out.sum(), h)]


@program(route=".data", kind="unread", read_in_vain=True)
def write_that_a_zero_gradient_hides(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out = h * w * 0.0
    run.write(lambda: h.data.fill_(2.0))
    out.sum().backward()
    return [w.grad]


# ---- threads ------------------------------------------------------------------------------------------------------


@program(route="another thread", kind="corrupting")
def written_in_a_thread(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out = h * w  # saved
    c = h.data

    def write() -> None:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(lambda: c.zero_()).result()  # written

    run.write(write)
    out.sum().backward()
    return [w.grad]


@program(route="another thread", kind="corrupting")
def everything_in_a_thread(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()

    def work() -> None:
        out = h * w  # saved
        c = h.data
        run.write(lambda: c.zero_())
        out.sum().backward()

    run.in_thread(work)
    return [w.grad]


@program(route="another thread", kind="innocent", twin_of=["written_in_a_thread", "everything_in_a_thread"])
def written_in_a_thread_after_backward(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()

    def work() -> None:
        (h * w).sum().backward()
        c = h.data
        run.write(lambda: c.zero_())

    run.in_thread(work)
    return [w.grad]


# ---- allow --------------------------------------------------------------------------------------------------------


@program(route="allow", kind="corrupting", allowed=True)
def write_that_is_allowed(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out = h * w  # saved
    with torchguard.allow("the straight-through estimator wants it"):
        run.write(lambda: h.data.zero_())
    out.sum().backward()
    return [w.grad]


@program(route="allow", kind="corrupting")
def write_after_the_block_that_allows(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out = h * w  # saved
    with torchguard.allow("nothing happens here"):
        pass
    run.write(lambda: h.data.zero_())
    out.sum().backward()
    return [w.grad]


@program(route="allow", kind="innocent", twin_of=["write_that_is_allowed", "write_after_the_block_that_allows"])
def nothing_to_allow(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    (h * w).sum().backward()
    with torchguard.allow("it is after backward anyway"):
        run.write(lambda: h.data.zero_())
    return [w.grad]
