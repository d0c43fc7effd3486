"""One process of two that run programs of ``torch.distributed``, for ``test_distributed``.

Called as ``ranks.py SUITE FOLDER`` with the rank in the environment: runs every program of a suite without the write, with it, and under the guard,
and leaves in ``FOLDER/RANK.json`` what came of each. What is right is computed: a program corrupts on this rank where
its results with the write differ from those without it.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import torchguard

RANK = int(os.environ.get("TORCHGUARD_TEST_RANK", "0"))
WORLD = 2
OTHER = 1 - RANK

Body = Callable[[Callable[[Callable[[], Any]], Any]], Any]
SUITES: dict[str, dict[str, Body]] = {"collectives": {}, "sharded": {}, "replicated": {}}


# ---- collectives ---------------------------------------------------------------------------------------------------


def own(rows: int = 4) -> torch.Tensor:
    """Values that differ from rank to rank."""
    return torch.linspace(-1, 2, rows * 3).view(rows, 3) + RANK


def like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full(tensor.shape, float(RANK + 2))


def _async(work: Any) -> None:
    work.wait()


def _polled(work: Any) -> None:
    while not work.is_completed():
        pass


def _future(work: Any) -> Any:
    return work.get_future().wait()


def _exchange(t: torch.Tensor, **source: Any) -> None:
    """Rank 0 sends, rank 1 receives into ``t``."""
    if RANK == 0:
        dist.send(like(t), 1)
    else:
        dist.recv(t, **source)


def _exchange_in_background(t: torch.Tensor) -> None:
    """Rank 1 posts its receive before it sends what rank 0 waits for: waiting at once would hang."""
    if RANK == 0:
        box = torch.empty(1)
        dist.recv(box, 1)
        dist.send(like(t), 1)
    else:
        work = dist.irecv(t, 0)
        dist.send(torch.ones(1), 0)
        work.wait()


def _batched(t: torch.Tensor) -> None:
    ops = [dist.P2POp(dist.isend, like(t), OTHER), dist.P2POp(dist.irecv, t, OTHER)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()


def _coalesced(t: torch.Tensor) -> None:
    with dist.distributed_c10d._coalescing_manager():
        dist.all_reduce(t[:2])
        dist.all_reduce(t[2:])


def _in_background_with_other_work_between(t: torch.Tensor) -> None:
    work = dist.all_reduce(t, async_op=True)
    dist.all_reduce(torch.ones(2))
    work.wait()


def _dropped(t: torch.Tensor) -> None:
    dist.all_reduce(t, async_op=True)
    dist.barrier()


def _group() -> Any:
    return dist.group.WORLD


#: What each does to a tensor of four rows and three columns.
COLLECTIVES: dict[str, Callable[[torch.Tensor], Any]] = {
    "all_reduce": lambda t: dist.all_reduce(t),
    "all_reduce_max": lambda t: dist.all_reduce(t, dist.ReduceOp.MAX),
    "all_reduce_async": lambda t: _async(dist.all_reduce(t, async_op=True)),
    "all_reduce_polled": lambda t: _polled(dist.all_reduce(t, async_op=True)),
    "all_reduce_between": _in_background_with_other_work_between,
    "all_reduce_dropped": _dropped,
    "all_reduce_coalesced": lambda t: dist.all_reduce_coalesced([t[:2], t[2:]]),
    "all_reduce_in_block": _coalesced,
    "all_reduce_one_row": lambda t: dist.all_reduce(t[1]),
    "group_allreduce": lambda t: _group().allreduce([t]).wait(),
    "group_allreduce_by_keyword": lambda t: _group().allreduce(tensor=t).wait(),
    "group_allreduce_on_class": lambda t: dist.ProcessGroup.allreduce(_group(), t).wait(),
    "broadcast": lambda t: dist.broadcast(t, 0),
    "broadcast_async": lambda t: _async(dist.broadcast(t, 1, async_op=True)),
    "broadcast_coalesced": lambda t: dist._broadcast_coalesced(_group(), [t], 1 << 20, 0),
    "reduce": lambda t: dist.reduce(t, 0),
    "all_gather": lambda t: dist.all_gather([t[:2], t[2:]], like(t[:2])),
    "all_gather_into_tensor": lambda t: dist.all_gather_into_tensor(t, like(t[:2])),
    "gather": lambda t: dist.gather(like(t[:2]), [t[:2], t[2:]] if RANK == 0 else None, 0),
    "scatter": lambda t: dist.scatter(t, [like(t), like(t)] if RANK == 0 else None, 0),
    "reduce_scatter": lambda t: dist.reduce_scatter(t[:2], [like(t[:2]), like(t[:2])]),
    "reduce_scatter_tensor": lambda t: dist.reduce_scatter_tensor(t[:2], like(t)),
    "all_to_all_single": lambda t: dist.all_to_all_single(t, like(t)),
    "all_to_all_in_place": lambda t: dist.all_to_all_single(t, t.detach().clone()),
    "recv": lambda t: _exchange(t, src=0),
    "recv_from_any": _exchange,
    "irecv": _exchange_in_background,
    "batch_isend_irecv": _batched,
}


def judged(call: Callable[[torch.Tensor], Any], t: torch.Tensor) -> None:
    """Call, and see that a guard that speaks does so before memory changes."""
    before = t.detach().clone()
    try:
        call(t)
    except torchguard.SavedTensorCorruptionError:
        assert torch.equal(t, before), "the memory has changed already"
        raise


def _make_collective(name: str, call: Callable[[torch.Tensor], Any]) -> None:
    suite = SUITES["collectives"]

    def on_output(write: Any) -> Any:
        x = own().requires_grad_()
        y = x.sigmoid()
        write(lambda: judged(call, y.data))
        y.sum().backward()
        return [x.grad]

    def on_output_itself(write: Any) -> Any:
        x = own().requires_grad_()
        y = x.sigmoid()
        write(lambda: judged(call, y.detach()))
        y.sum().backward()
        return [x.grad]

    def on_weight(write: Any) -> Any:
        w, x = own().requires_grad_(), own().requires_grad_()
        loss = (w * x).sum()
        write(lambda: judged(call, w.data))
        loss.backward()
        return [x.grad]

    def on_copy(write: Any) -> Any:
        x = own().requires_grad_()
        y = x.sigmoid()
        write(lambda: call(y.detach().clone()))
        y.sum().backward()
        return [x.grad]

    def after_backward(write: Any) -> Any:
        w, x = own().requires_grad_(), own().requires_grad_()
        (w * x).sum().backward()
        write(lambda: call(w.data))
        return [x.grad]

    def on_other_rows(write: Any) -> Any:
        buffer = torch.cat([own(), own()])
        x = buffer[:4].requires_grad_()
        y = (x * x).sum()
        write(lambda: call(buffer.data[4:]))
        y.backward()
        return [x.grad]

    for body in (on_output, on_output_itself, on_weight, on_copy, after_backward, on_other_rows):
        suite[f"{name}/{body.__name__}"] = body


for _name, _call in COLLECTIVES.items():
    _make_collective(_name, _call)


def collective(body: Body) -> Body:
    SUITES["collectives"][body.__name__] = body
    return body


@collective
def all_reduce_of_what_is_the_same_everywhere(write: Any) -> Any:
    x = torch.ones(4, 3, requires_grad=True)
    y = x.sigmoid()
    write(lambda: dist.all_reduce(y.data, dist.ReduceOp.MAX))
    y.sum().backward()
    return [x.grad]


@collective
def all_reduce_of_zeros(write: Any) -> Any:
    x = torch.full((4, 3), -1.0, requires_grad=True)
    y = x.relu()
    write(lambda: dist.all_reduce(y.data))
    y.sum().backward()
    return [x.grad]


@collective
def buffer_received_again_as_it_was(write: Any) -> Any:
    buffer, w = torch.full((4, 3), 2.0), own().requires_grad_()
    loss = (buffer * w).sum()
    write(lambda: _exchange(buffer, src=0))
    loss.backward()
    return [w.grad]


@collective
def gradients_averaged_by_hand(write: Any) -> Any:
    layer = nn.Linear(3, 3)
    layer(own()).pow(2).sum().backward()

    def average() -> None:
        for p in layer.parameters():
            dist.all_reduce(p.grad.data)
            p.grad.data.div_(WORLD)

    write(average)
    return [p.detach().clone() for p in layer.parameters()]


@collective
def weights_averaged_before_backward(write: Any) -> Any:
    layer, x = nn.Linear(3, 3, bias=False), own().requires_grad_()
    nn.init.constant_(layer.weight, 1.0 + RANK)
    loss = layer(x).sum()

    def average() -> None:
        for p in layer.parameters():
            dist.all_reduce(p.data)

    write(average)
    loss.backward()
    return [x.grad]


@collective
def pipeline_buffer_reused(write: Any) -> Any:
    """The next micro-batch arrives in the memory that the first one's graph still needs."""
    w, buffer = own().requires_grad_(), own().clone()
    loss = (w * buffer).sum()
    write(lambda: _batched(buffer))
    loss.backward()
    return [w.grad]


@collective
def value_of_a_future_is_the_tensor_itself(write: Any) -> Any:
    """Nothing changes, so the guard is silent, and must hand back the very memory that was reduced."""
    x = torch.full((4, 3), -1.0, requires_grad=True)
    y = x.relu()
    target = y.data

    def reduce() -> None:
        (value,) = _future(dist.all_reduce(target, async_op=True))
        assert value.data_ptr() == target.data_ptr()

    write(reduce)
    y.sum().backward()
    return [x.grad]


@collective
def operators_called_by_name(write: Any) -> Any:
    x = own().requires_grad_()
    y = x.sigmoid()
    name = _group().group_name

    def reduce() -> None:
        ops = torch.ops._c10d_functional
        ops.wait_tensor(ops.all_reduce_(y.data, "sum", name))

    write(reduce)
    y.sum().backward()
    return [x.grad]


#: Seen by ``every_call=True`` alone.
BY_OPERATOR = ("operators_called_by_name",)


# ---- models --------------------------------------------------------------------------------------------------------


def model(body: Body) -> Body:
    SUITES[suite_of(body.__name__)][body.__name__] = body
    return body


def suite_of(name: str) -> str:
    return "sharded" if name.startswith("fsdp") else "replicated"


def small() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4))


def batches(steps: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11 + RANK)
    return [torch.randn(5, 6, generator=generator) for _ in range(steps)]


def trained(net: nn.Module, write: Any = None, **adam: Any) -> list[torch.Tensor]:
    """Losses and weights of a few steps; ``write`` comes between the first forward and its backward."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, **adam)
    results = []
    for i, x in enumerate(batches()):
        loss = net(x).pow(2).mean()
        if i == 0 and write is not None:
            write()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        results.append(loss)
    return results + [getattr(p, "_local_tensor", p).detach() for p in net.parameters()]


def mesh() -> Any:
    return dist.device_mesh.init_device_mesh("cpu", (WORLD,))


def sharded(**options: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    net = small()
    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh(), **options)
    return fully_shard(net, mesh=mesh(), **options)


def low_precision() -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def fully_sharded(**options: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        small(), auto_wrap_policy=ModuleWrapPolicy({nn.Linear}), device_id=torch.device("cpu"), **options
    )


def tensor_parallel() -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(small(), mesh(), {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel()})


def replicated(net: nn.Module | None = None, **options: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(small() if net is None else net, **options)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "fsdp2": sharded,
    "fsdp2_kept": lambda: sharded(reshard_after_forward=False),
    "fsdp2_bfloat16": lambda: sharded(mp_policy=low_precision()),
    "fsdp1": lambda: fully_sharded(use_orig_params=True),
    "fsdp1_flat": fully_sharded,
    "ddp": replicated,
    "ddp_views": lambda: replicated(gradient_as_bucket_view=True),
    "ddp_static": lambda: replicated(static_graph=True),
    "tensor_parallel": tensor_parallel,
}


def _make_model(name: str, make: Callable[[], nn.Module]) -> None:
    suite = SUITES[suite_of(name)]

    def trains(write: Any) -> Any:
        net = make()
        write(lambda: None)
        return trained(net)

    def activation_overwritten(write: Any) -> Any:
        net, kept = make(), []
        keep = small_part(net).register_forward_hook(lambda _m, _i, output: kept.append(output))

        def zero() -> None:
            getattr(kept[0], "_local_tensor", kept[0]).data.mul_(0.5)

        results = trained(net, lambda: write(zero))
        keep.remove()
        return results

    def activation_copied(write: Any) -> Any:
        net, kept = make(), []
        keep = small_part(net).register_forward_hook(lambda _m, _i, output: kept.append(output))

        def zero() -> None:
            getattr(kept[0], "_local_tensor", kept[0]).data.clone().mul_(0.5)

        results = trained(net, lambda: write(zero))
        keep.remove()
        return results

    for body in (trains, activation_overwritten, activation_copied):
        suite[f"{name}/{body.__name__}"] = body


def small_part(net: nn.Module) -> nn.Module:
    """The Tanh, whose output is saved."""
    return next(part for part in net.modules() if isinstance(part, nn.Tanh))


for _name, _make in MODELS.items():
    _make_model(_name, _make)


def _weights_halved(write: Any, net: nn.Module, of: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Between forward and backward; what the optimizer sees (a shard, or all of it) is written to."""

    def halve() -> None:
        for p in net.parameters():
            of(getattr(p, "_local_tensor", p)).mul_(0.5)

    loss = net(batches()[0]).pow(2).mean()
    write(halve)
    loss.backward()
    return [getattr(p.grad, "_local_tensor", p.grad) for p in net.parameters()]


@model
def fsdp2_unsharded_weights_written(write: Any) -> Any:
    return _weights_halved(write, sharded(reshard_after_forward=False), lambda t: t.data)


@model
def fsdp2_copies_of_unsharded_weights_written(write: Any) -> Any:
    return _weights_halved(write, sharded(reshard_after_forward=False), lambda t: t.data.clone())


@model
def fsdp2_copies_of_shards_written(write: Any) -> Any:
    return _weights_halved(write, sharded(), lambda t: t.data.clone())


def _parallel_weights(write: Any, change: Callable[[list[torch.Tensor]], Any]) -> Any:
    net = tensor_parallel()
    loss = net(batches()[0]).pow(2).mean()
    write(lambda: change(list(net.parameters())))
    loss.backward()
    return [p.grad.to_local() for p in net.parameters()]  # type: ignore[union-attr]


def _foreach_halve(tensors: list[torch.Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_mul_(tensors, 0.5)


@model
def tensor_parallel_weights_written(write: Any) -> Any:
    return _parallel_weights(write, lambda weights: [p.data.mul_(0.5) for p in weights])


@model
def tensor_parallel_weights_written_by_foreach(write: Any) -> Any:
    return _parallel_weights(write, _foreach_halve)


@model
def tensor_parallel_copies_of_weights_written(write: Any) -> Any:
    return _parallel_weights(write, lambda weights: _foreach_halve([p.detach().clone() for p in weights]))


@model
def ddp_weights_written(write: Any) -> Any:
    return _weights_halved(write, replicated(), lambda t: t.data)


@model
def ddp_copies_of_weights_written(write: Any) -> Any:
    return _weights_halved(write, replicated(), lambda t: t.data.clone())


if importlib.util.find_spec("torchguard._storages"):  # there it is seen that storages are freed

    @model
    def fsdp2_shards_written(write: Any) -> Any:
        """Backward gathers other weights than forward used: wrong with every way to write, .data or not."""
        return _weights_halved(write, sharded(), lambda t: t.detach())


class Scaled(nn.Module):
    """A buffer that the forward saves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.full((3,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * self.scale + x


def _two_forwards(write: Any, change: Callable[[nn.Module], Any], **options: Any) -> Any:
    """Only what the second forward's broadcast writes differs between the runs."""
    net = replicated(Scaled(), **options)
    first = net(torch.zeros(3)).sum()
    change(net.module)
    out = []
    write(lambda: out.append(net(torch.zeros(3)).sum()))
    # Without DDP's own reduction, in which this rank would be missing once the guard has spoken.
    return torch.autograd.grad(first, [net.module.weight])


@model
def ddp_buffer_broadcast_into_a_save(write: Any) -> Any:
    return _two_forwards(write, _rebuffer)


def _rebuffer(module: nn.Module) -> None:
    """Rank 0 gets other values in another tensor; rank 1's buffer is the one that is saved."""
    if RANK == 0:
        module.scale = module.scale + 1.0


@model
def ddp_buffer_broadcast_of_the_same(write: Any) -> Any:
    return _two_forwards(write, lambda m: None)


@model
def ddp_buffer_not_broadcast(write: Any) -> Any:
    return _two_forwards(write, _rebuffer, broadcast_buffers=False)


# ---- the worker ----------------------------------------------------------------------------------------------------


def flat(results: Any) -> list[torch.Tensor]:
    return [r.detach().clone() for r in results]


def same_bits(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8)) for x, y in zip(a, b, strict=True)
    )


def ran(body: Body, writes: bool, guard: Any) -> tuple[list[torch.Tensor] | None, BaseException | None]:
    torch.manual_seed(7)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with guard:
                return flat(body(lambda write: write() if writes else None)), None
    except Exception as error:
        return None, error


def report_on(suite: str, name: str, body: Body) -> dict[str, Any]:
    truth, failed = ran(body, False, contextlib.nullcontext())
    told: dict[str, Any] = {}
    if failed is not None:
        told["failed"] = "".join(traceback.format_exception(failed))
        return told
    plain, error = ran(body, True, contextlib.nullcontext())
    told["plain"] = repr(error) if error else "corrupted" if not same_bits(plain or [], truth or []) else "intact"
    every_call = name in BY_OPERATOR
    strict = torchguard.strict(every_call=every_call)
    found, error = ran(body, True, strict)
    told["strict"] = repr(error) if error else "silent"
    if isinstance(error, torchguard.SavedTensorCorruptionError):
        violation = error.violation
        told["strict"] = "spoke"
        told["caught"], told["operation"] = violation.caught, violation.operation
        told["report"] = str(violation)
    elif error is not None:
        told["traceback"] = "".join(traceback.format_exception(error))
    told["strict_violations"] = len(strict.violations)
    if found is not None:
        told["same_as_plain"] = same_bits(found, plain or [])
    if "/" in name and suite != "collectives":
        strict = torchguard.strict(every_call=True)
        found, error = ran(body, True, strict)
        told["every_call"] = "spoke" if strict.violations else "silent" if error is None else repr(error)
        told["same_as_plain"] = told.get("same_as_plain", True) and (found is None or same_bits(found, plain or []))
    record = torchguard.Guard("record", every_call=every_call)
    found, error = ran(body, True, record)
    told["record"] = repr(error) if error else "recorded" if record.violations else "silent"
    told["record_same_as_plain"] = plain is not None and found is not None and same_bits(found, plain)
    return told


def main() -> None:
    suite, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=RANK,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=60),
    )
    told = {name: report_on(suite, name, body) for name, body in SUITES[suite].items()}
    (folder / f"{RANK}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
