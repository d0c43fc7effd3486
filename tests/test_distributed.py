"""Are collectives, and what is built on them, judged like every other write, on every rank and without a hang?"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch.testing._internal.two_tensor import TwoTensor

import torchguard
from torchguard import SavedTensorCorruptionError, SavedTensorCorruptionWarning, _collectives, _torch

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

TESTS = Path(__file__).parent
TIMEOUT = 300

#: The write arrives when nobody asks, or backward is the first to see that nobody else refuses it, or it is made to what
#: a subclass wraps: caught at the read.
AT_THE_READ = (
    "all_reduce_dropped/",
    "ddp_buffer_broadcast_into_a_save",
    "fsdp2_shards_written",
    "tensor_parallel_weights_written",
)

Told = dict[str, dict[str, Any]]


def launch(suite: str, folder: Path) -> list[Told]:
    """What the two ranks tell of each program of a suite."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "GLOO_SOCKET_IFNAME": "lo"}
    logs = [folder / f"{rank}.log" for rank in range(ranks.WORLD)]
    with contextlib.ExitStack() as stack:
        processes = [
            subprocess.Popen(
                [sys.executable, str(TESTS / "ranks.py"), suite, str(folder)],
                env={**environment, "TORCHGUARD_TEST_RANK": str(rank)},
                stdout=(log := stack.enter_context(logs[rank].open("w"))),
                stderr=log,
            )
            for rank in range(ranks.WORLD)
        ]
        try:
            for process in processes:
                process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            pytest.fail(f"a rank of {suite} hangs:\n" + "\n".join(log.read_text()[-3000:] for log in logs))
        finally:
            for process in processes:
                process.kill()
                process.wait()
    for rank, process in enumerate(processes):
        assert process.returncode == 0, f"rank {rank} of {suite}:\n{logs[rank].read_text()[-3000:]}"
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks.WORLD)]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Told]]:
    """Runs a suite when its first program is asked for."""
    found: dict[str, list[Told]] = {}

    def of(suite: str) -> list[Told]:
        if suite not in found:
            found[suite] = launch(suite, tmp_path_factory.mktemp(suite))
        return found[suite]

    return of


def check(name: str, one: dict[str, Any]) -> None:
    """The guard does with a program, on one rank, what it must."""
    assert "failed" not in one, one["failed"]
    if one["plain"] == "intact":
        assert one["strict"] == "silent", one.get("traceback", one.get("report"))
        assert (one["strict_violations"], one["record"]) == (0, "silent")
        assert one.get("every_call", "silent") == "silent"
        assert one["same_as_plain"]
        assert one["record_same_as_plain"]
    elif one["plain"] == "corrupted":
        assert one["strict"] == "spoke", one
        assert one["caught"] == ("read" if name.startswith(AT_THE_READ) else "write")
        assert "ranks.py" in one["report"]
        assert one["record"] == "recorded"
        assert one["record_same_as_plain"]
        assert one.get("every_call", "spoke") == "spoke"
    else:  # PyTorch refuses it
        assert one["strict"] == one["record"] == one["plain"]


@pytest.mark.timeout(2 * TIMEOUT)
@pytest.mark.parametrize(("suite", "name"), [(suite, name) for suite in ranks.SUITES for name in ranks.SUITES[suite]])
def test_on_both_ranks(suite: str, name: str, told: Callable[[str], list[Told]]) -> None:
    for rank in range(ranks.WORLD):
        check(name, told(suite)[rank][name])


@pytest.mark.timeout(2 * TIMEOUT)
@pytest.mark.parametrize("name", ranks.COLLECTIVES)
def test_each_collective_corrupts_somewhere_and_its_twins_nowhere(name: str, told: Callable[[str], list[Told]]) -> None:
    both = told("collectives")
    kinds = {body: {rank[f"{name}/{body}"]["plain"] for rank in both} for body in ("on_output", "on_weight")}
    assert all("corrupted" in kind for kind in kinds.values()), kinds
    for body in ("on_copy", "after_backward", "on_other_rows"):
        assert {rank[f"{name}/{body}"]["plain"] for rank in both} == {"intact"}


@pytest.mark.timeout(2 * TIMEOUT)
def test_the_source_of_a_broadcast_is_innocent_and_the_others_are_not(told: Callable[[str], list[Told]]) -> None:
    for name, suite in (("broadcast/on_output", "collectives"), ("ddp_buffer_broadcast_into_a_save", "replicated")):
        assert [rank[name]["strict"] for rank in told(suite)] == ["silent", "spoke"]


@pytest.mark.timeout(2 * TIMEOUT)
def test_the_report_names_the_line_and_the_public_function(told: Callable[[str], list[Told]]) -> None:
    one = told("collectives")[0]["weights_averaged_before_backward"]
    assert one["operation"] == "all_reduce()"
    assert "dist.all_reduce(p.data)" in one["report"]


# ---- one process ---------------------------------------------------------------------------------------------------


def scattered(y: torch.Tensor, **options: Any) -> Any:
    """A collective that corrupts though there is but one rank."""
    return dist.scatter(y.data, [torch.zeros_like(y)], 0, **options)


def saved() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.ones(3, requires_grad=True)
    return x, x.sigmoid()


@pytest.mark.usefixtures("group")
def test_alone_every_collective_that_changes_nothing_is_innocent() -> None:
    with torchguard.strict() as guard:
        x, y = saved()
        dist.all_reduce(y.data)
        dist.broadcast(y.data, 0)
        dist.reduce(y.data, 0)
        assert dist.all_reduce(y.data, async_op=True).wait()
        y.sum().backward()
    assert x.grad is not None
    assert guard.violations == []


@pytest.mark.usefixtures("group")
def test_strict_speaks_before_memory_changes() -> None:
    with torchguard.strict():
        _, y = saved()
        before = y.detach().clone()
        with pytest.raises(SavedTensorCorruptionError, match=r"scatter\(\) through .data would corrupt"):
            scattered(y)
        assert torch.equal(y, before)


@pytest.mark.usefixtures("group")
def test_a_background_collective_is_answered_when_it_is_waited_for() -> None:
    with torchguard.strict():
        _, y = saved()
        before = y.detach().clone()
        work = scattered(y, async_op=True)
        assert isinstance(work, dist.Work)
        with pytest.raises(SavedTensorCorruptionError):
            work.wait()
        assert torch.equal(y, before)


@pytest.mark.usefixtures("group")
def test_a_save_made_before_the_wait_counts() -> None:
    with torchguard.strict():
        x = torch.ones(3, requires_grad=True)
        a = x.sigmoid()
        buffer = a.data
        work = scattered(buffer, async_op=True)
        y = buffer * x
        del a
        with pytest.raises(SavedTensorCorruptionError):
            work.wait()
        y.sum().backward()
        assert x.grad is not None
        assert torch.equal(x.grad, torch.ones(3).sigmoid())


@pytest.mark.usefixtures("group")
def test_a_future_has_the_programs_own_tensors() -> None:
    with torchguard.Guard("record") as guard:
        _, y = saved()
        target = y.data
        (value,) = dist.all_reduce(target, async_op=True).get_future().wait()
        assert value is target
        assert scattered(y, async_op=True).get_future().wait()
        assert torch.equal(y, torch.zeros(3))
    assert [violation.operation for violation in guard.violations] == ["scatter()"]


@pytest.mark.usefixtures("group")
def test_an_intended_collective_is_kept_with_its_reason() -> None:
    with torchguard.strict() as guard:
        _, y = saved()
        with torchguard.allow("on purpose"):
            work = scattered(y, async_op=True)
        work.wait()
        assert torch.equal(y, torch.zeros(3))
    assert guard.violations == []
    assert [violation.allowed for violation in guard.allowed] == ["on purpose"]


@pytest.mark.usefixtures("group")
def test_warn_puts_the_result_into_place() -> None:
    with torchguard.warn():
        x, y = saved()
        with pytest.warns(SavedTensorCorruptionWarning, match=r"scatter\(\)"):
            scattered(y)
        y.sum().backward()
    assert torch.equal(y, torch.zeros(3))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros(3))


def test_what_pytorch_refuses_it_refuses(group: Any) -> None:
    def message() -> str:
        _, y = saved()
        with pytest.raises((RuntimeError, ValueError, TypeError)) as refused:
            group.allgather([[y.data]], [torch.zeros(4)]).wait()
        return f"{refused.type} {refused.value}"

    plain = message()
    with torchguard.strict():
        assert message() == plain


@pytest.mark.usefixtures("group")
def test_a_dropped_work_keeps_nothing_alive() -> None:
    import weakref

    with torchguard.Guard("record"):
        _, y = saved()
        hold = weakref.ref(y)
        scattered(y, async_op=True)
        dist.barrier()
        del y
        assert hold() is None


#: What a collective writes to beside a save; of a wrapper's memory the guard can make no copy.
BESIDE: dict[str, Callable[[], torch.Tensor]] = {
    "plain": lambda: torch.ones(3),
    "negated": lambda: torch._neg_view(torch.ones(3)),
    "wrapper": lambda: TwoTensor(torch.ones(3), torch.ones(3)),
}


@pytest.mark.parametrize("corrupting", [True, False])
@pytest.mark.parametrize("name", ["allgather_into_tensor", "reduce_scatter_tensor", "allgather"])
@pytest.mark.parametrize("beside", BESIDE)
def test_a_collective_that_writes_to_more_than_a_save(group: Any, beside: str, name: str, corrupting: bool) -> None:
    def run(write: bool = True) -> list[torch.Tensor]:
        x, y = saved()
        source = torch.zeros(3) if corrupting else y.detach().clone()
        other = BESIDE[beside]()
        outputs: Any = [y.data, other]
        if write:
            outputs = [outputs] if name == "allgather" else outputs
            getattr(group, f"{name}_coalesced")(outputs, [source, torch.zeros(3)]).wait()
            # A wrapper's collective runs for each part, and the work that comes back is one part's: the others may not be done.
            group.barrier().wait()
        y.sum().backward()
        assert x.grad is not None
        inside = [other.a, other.b] if isinstance(other, TwoTensor) else [other]
        return [x.grad, y.detach(), torch.tensor(other._version), *(part.resolve_neg() for part in inside)]

    plain, truth = run(), run(write=False)
    assert torch.equal(plain[0], truth[0]) is not corrupting
    with torchguard.Guard("record") as guard:
        found = run()
    assert all(map(torch.equal, found, plain))
    assert bool(guard.violations) is corrupting


@pytest.mark.parametrize("corrupting", [True, False])
def test_a_collective_is_given_its_keywords(group: Any, corrupting: bool) -> None:
    with torchguard.Guard("record") as guard:
        _, y = saved()
        source = torch.zeros(3) if corrupting else y.detach().clone()
        group.scatter(output_tensor=y.data, input_tensors=[source], root=0).wait()
        assert torch.equal(y, source)
    assert [violation.operation for violation in guard.violations] == ["scatter()"] * corrupting


@pytest.mark.usefixtures("group")
def test_operators_are_seen_with_every_call() -> None:
    with torchguard.strict(every_call=True):
        x, y = saved()
        before = y.detach().clone()
        name = dist.group.WORLD.group_name  # type: ignore[union-attr]
        out = torch.ops._c10d_functional.all_gather_into_tensor_out
        with pytest.raises(SavedTensorCorruptionError, match="all_gather_into_tensor_out"):
            out(torch.zeros(3), 1, name, out=y.data)
        assert torch.equal(y, before)
        assert out(y.detach().clone(), 1, name, out=y.data).shape == (3,)
        y.sum().backward()
        assert x.grad is not None


@pytest.mark.skipif("c10d" not in _torch.COLLECTIVE_OPERATORS, reason="this torch cannot unbox their Work")
def test_operators_that_return_a_work_are_seen_with_every_call(group: Any) -> None:
    def scatter(y: torch.Tensor, source: torch.Tensor) -> Any:
        return torch.ops.c10d.scatter_([y.data], [[source]], group.boxed(), 0, True, -1)

    with torchguard.strict(every_call=True):
        x, y = saved()
        before = y.detach().clone()
        with pytest.raises(SavedTensorCorruptionError, match=r"scatter_\(\)"):
            scatter(y, torch.zeros(3))
        assert torch.equal(y, before)
        (outputs, work) = scatter(y, before)
        assert outputs[0].data_ptr() == y.data_ptr()
        dist.Work.unbox(work).wait()
        y.sum().backward()
        assert x.grad is not None


def test_the_methods_are_those_of_the_process_groups() -> None:
    """Every method that takes tensors is either known to write, or known not to."""
    known = {
        *_collectives.METHODS,
        "send",
        "split_group",
        "merge_remote_group",
        "allocate_tensor",
        "supports_tensor_alloc",
    }
    for owner in _torch.PROCESS_GROUPS:
        takes = {
            name
            for name in vars(owner)
            if not name.startswith("__") and "ensor" in (getattr(owner, name).__doc__ or "").partition("->")[0]
        }
        assert takes - known == set()


def test_nothing_of_torch_distributed_is_imported() -> None:
    code = (
        "import sys, torch; before = {m for m in sys.modules if m.startswith('torch.distributed')}; import torchguard\n"
        "with torchguard.strict(): pass\n"
        "print({m for m in sys.modules if m.startswith('torch.distributed')} - before)"
    )
    assert run(code) == "set()\n"


def test_a_build_without_distributed_is_guarded() -> None:
    code = (
        "import torch; del torch._C._distributed_c10d; del torch.distributed._broadcast_coalesced\n"
        "import torchguard\n"
        "x = torch.ones(3, requires_grad=True)\n"
        "with torchguard.strict():\n"
        "    y = x.sigmoid()\n"
        "    try: y.data.zero_()\n"
        "    except torchguard.SavedTensorCorruptionError: print('spoke')\n"
    )
    assert run(code) == "spoke\n"


def run(code: str) -> str:
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 0, found.stderr
    return found.stdout
