"""What the guard says of writes that move no counter, what it costs a program, and what else it must leave as it is."""

from __future__ import annotations

import copy
import functools
import gc
import os
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import harness
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from harness import Program, Run
from torch import nn
from torch._dynamo.utils import counters

import torchguard
from torchguard import SavedTensorCorruptionError, _intercept, _torch
from torchguard._saves import LEDGER, Save

_preserve = torch.autograd._unsafe_preserve_version_counter
BATCH = torch.arange(12.0).reshape(3, 4)


def leaf() -> torch.Tensor:
    return torch.tensor(harness.VALUES, requires_grad=True)


def saves_of(tensor: torch.Tensor) -> list[Save]:
    return LEDGER.in_storage(torch._C._storage_id(tensor))


# ---- the report ----------------------------------------------------------------------------------------------------


def test_the_report_names_the_line_that_updated_the_statistics() -> None:
    bn = nn.BatchNorm1d(4).eval()
    with pytest.raises(SavedTensorCorruptionError) as caught, torchguard.strict():
        out = bn(leaf())
        bn.train()
        bn(BATCH)  # the write
        out.sum().backward()
    violation = caught.value.violation
    assert (violation.kind, violation.caught, violation.operation) == ("uncounted", "read", "batch_norm()")
    text = str(caught.value)
    assert text.startswith("batch_norm(), which moves no version counter, has corrupted a tensor saved")
    assert [line.split("  ")[1].split(" ")[0] for line in text.splitlines() if line.startswith("  ")][:3] == [
        "saved",
        "written",
        "read",
    ]
    assert "out = bn(leaf())" in text
    assert "bn(BATCH)  # the write" in text
    assert "out.sum().backward()" in text
    assert "4 of 4 elements" in text


def test_only_the_call_that_changed_something_is_named() -> None:
    bn = nn.BatchNorm1d(4).eval()
    with pytest.raises(SavedTensorCorruptionError) as caught, torchguard.strict():
        out = bn(leaf())
        bn(BATCH)
        nn.BatchNorm1d(4)(BATCH)
        bn.train()(BATCH)  # the first
        bn.train()(BATCH + 1)
        out.sum().backward()
    assert caught.value.violation.written is not None
    assert "# the first" in caught.value.violation.written.source


def test_the_report_names_the_line_that_wrote_in_a_preserved_block() -> None:
    with pytest.raises(SavedTensorCorruptionError) as caught, torchguard.strict():
        w, h = leaf(), torch.ones(3, 4)
        out = w * h
        with _preserve(h):
            h[1] = 7.0  # the write
        out.sum().backward()
    violation = caught.value.violation
    assert violation.operation == "x[i] = v under _unsafe_preserve_version_counter()"
    assert violation.written is not None
    assert violation.written.source.startswith("h[1] = 7.0")
    assert (violation.elements, violation.of, violation.caught) == (4, 12, "read")


def test_the_report_names_the_block_where_the_write_was_not_seen() -> None:
    with pytest.raises(SavedTensorCorruptionError) as caught, torchguard.strict():
        w, h = leaf(), torch.ones(3, 4)
        out = w * h
        with _preserve(h):  # the block
            torch._C.TensorBase.zero_(h)
        out.sum().backward()
    assert caught.value.violation.written is not None
    assert "# the block" in caught.value.violation.written.source


def test_a_fused_step_is_reported_at_the_line_of_the_step() -> None:
    w, x = leaf(), leaf()
    optimiser = torch.optim.SGD([w], lr=0.1, fused=True)
    w.grad = torch.ones(3, 4)
    with pytest.raises(SavedTensorCorruptionError, match=r"_fused_sgd_\(\), which moves no version counter") as caught:
        with torchguard.strict():
            out = w * x
            optimiser.step()
            out.sum().backward()
    assert caught.value.violation.written is not None
    assert caught.value.violation.written.source == "optimiser.step()"
    assert torch.equal(w.detach(), leaf().detach())


def test_warned_once_a_site_and_found_again() -> None:
    bn, x = nn.BatchNorm1d(4).eval(), leaf()
    with pytest.warns(torchguard.SavedTensorCorruptionWarning) as told, torchguard.warn() as guard:
        for i in range(3):
            out = bn.eval()(x)
            bn.train()(BATCH + i)
            out.sum().backward()
    assert len({(note.filename, note.lineno) for note in told}) == len(told)
    assert {violation.times for violation in guard.violations} == {6}  # the mean and the variance
    assert {violation.operation for violation in guard.violations} == {"batch_norm()"}


def test_after_a_warning_another_batch_is_another_violation() -> None:
    bn, x = nn.BatchNorm1d(4).eval(), leaf()
    with torchguard.Guard("record") as guard:
        out = bn(x)
        bn.train()(BATCH)  # first
        out.sum().backward(retain_graph=True)
        bn(BATCH * 2)  # second
        out.sum().backward()
    lines = {violation.written.source.rpartition("# ")[2] for violation in guard.violations if violation.written}
    assert lines == {"first", "second"}


# ---- what only every_call=True sees --------------------------------------------------------------------------------

_BATCH_NORM = torch.batch_norm
_ARGUMENTS = (True, 0.1, 1e-5, True)


def _script(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
    return torch.batch_norm(x, None, None, mean, var, True, 0.1, 1e-5, True)


@functools.cache
def _scripted() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(_script)


UNPATCHED: dict[str, Callable[[Any], Any]] = {
    "bound_before": lambda bn: _BATCH_NORM(BATCH, None, None, bn.running_mean, bn.running_var, *_ARGUMENTS),
    "packet": lambda bn: torch.ops.aten.native_batch_norm(
        BATCH, None, None, bn.running_mean, bn.running_var, True, 0.1, 1e-5
    ),
    "overload": lambda bn: torch.ops.aten._native_batch_norm_legit.default(
        BATCH, None, None, bn.running_mean, bn.running_var, True, 0.1, 1e-5
    ),
    "composite": lambda bn: torch.ops.aten.batch_norm(
        BATCH, None, None, bn.running_mean, bn.running_var, *_ARGUMENTS
    ),
    "with_update": lambda bn: torch.ops.aten._batch_norm_with_update(
        BATCH, None, None, bn.running_mean, bn.running_var, 0.1, 1e-5
    ),
    "torchscript": lambda bn: _scripted()(BATCH, bn.running_mean, bn.running_var),
    "scripted_module": lambda bn: torch.jit.script(_sharing(bn))(BATCH),
    "numpy": lambda bn: bn.running_var.numpy().fill(7.0),
}  # fmt: skip


def _sharing(bn: Any) -> Any:
    other = nn.BatchNorm1d(4)
    other.running_mean, other.running_var = bn.running_mean, bn.running_var
    return other


def _evaluated(update: Callable[[Any], Any]) -> Callable[[Run], Any]:
    def program(run: Run) -> Any:
        bn = nn.BatchNorm1d(4).eval()
        x = run.leaf()
        out = bn(x)  # saved
        run.write(lambda: update(bn))
        out.square().sum().backward()
        return [x.grad]

    return program


def _trained(update: Callable[[Any], Any]) -> Callable[[Run], Any]:
    def program(run: Run) -> Any:
        bn = nn.BatchNorm1d(4)
        x = run.leaf()
        out = bn(x)
        run.write(lambda: update(bn))
        out.square().sum().backward()
        return [x.grad]

    return program


EVERY_CALL = [mode for mode in harness.MODES if mode.every_call]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNPATCHED)
def test_updates_that_no_patch_sees(name: str) -> None:
    case = Program(
        name, "", "corrupting", _evaluated(UNPATCHED[name]), caught="read", every_call="read"
    )  # fmt: skip
    harness.check_kind(case)
    harness.check_all_modes(case, EVERY_CALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNPATCHED)
def test_updates_that_no_patch_sees_in_training(name: str) -> None:
    case = Program(name, "", "unread", _trained(UNPATCHED[name]))
    harness.check_kind(case)
    harness.check_all_modes(case)


# ---- blocks of FSDP2 -----------------------------------------------------------------------------------------------

_FSDP = """
def free(h):
    kept = h.clone()
    h.untyped_storage().resize_(0)
    return kept

def refill(h, kept):
    h.untyped_storage().resize_(kept.untyped_storage().nbytes())
    h.untyped_storage().fill_(1)  # whatever memory it is given
    with preserve(h):
        h.copy_(kept)
"""


def test_fsdp_frees_memory_and_fills_it_again() -> None:
    space: dict[str, Any] = {"preserve": _preserve}
    exec(compile(_FSDP, f"{os.path.dirname(torch.__file__)}/distributed/fsdp/_fully_shard/_invented.py", "exec"), space)
    w, h = leaf(), torch.linspace(0, 1, 12).reshape(3, 4)
    with torch.no_grad():
        truth = h.clone()
    with torchguard.strict(every_call=True) as guard:
        out = w * h
        kept = space["free"](h)
        space["refill"](h, kept)
        out.sum().backward()
    assert w.grad is not None
    assert torch.equal(w.grad, truth)
    assert guard.violations == []


# ---- what it costs -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not _torch.PRESERVES_SEVERAL, reason="a block of this torch preserves one tensor")
def test_no_copy_is_kept_of_what_nothing_changed() -> None:
    bn, x, h = nn.BatchNorm1d(4).eval(), leaf(), torch.ones(3, 4)
    with torchguard.strict():
        out = bn(x) * h
        bn(BATCH)
        with _preserve((h, bn.running_mean)):
            h.sum()
        assert [save.remarks.proof for one in (h, bn.running_mean) for save in saves_of(one) if save.remarks] == [
            None,
            None,
        ]
        out.sum().backward()


def test_a_copy_goes_with_the_graph() -> None:
    bn, x = nn.BatchNorm1d(4).eval(), leaf()
    with torchguard.strict():
        out = bn(x)
        bn.train()(BATCH)
        proofs = [save.remarks.proof for save in saves_of(bn.running_mean) if save.remarks is not None]
        held = [weakref.ref(proof) for proof in proofs if proof is not None]
        assert held
        del out, proofs
        gc.collect()
        assert [hold() for hold in held] == [None] * len(held)


def test_an_error_of_the_call_keeps_no_save_alive() -> None:
    bn, x = nn.BatchNorm1d(4).eval(), leaf()
    with torchguard.strict():
        out = bn(x)
        hold = weakref.ref(saves_of(bn.running_mean)[0])
        with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
            bn.train()(BATCH[:1])
        assert hold() is not None
        del out
        assert hold() is None
        assert caught.value.__traceback__ is not None


def test_an_error_in_a_block_is_the_programs_own_and_the_versions_are_put_back() -> None:
    h = torch.ones(3, 4)
    with torchguard.strict(), pytest.raises(KeyError, match="mine"), _preserve(h):
        h.add_(1)
        raise KeyError("mine")
    assert h._version == 0


@pytest.mark.skipif(not _torch.PRESERVES_SEVERAL, reason="a block of this torch preserves one tensor")
def test_a_block_keeps_its_arguments_and_attributes() -> None:
    h, k = torch.ones(3), torch.ones(4)
    with torchguard.strict():
        block = _preserve((h, k))
        assert block.tensors == (h, k)
        assert block.prev_versions == (0, 0)
        assert vars(block).keys() == {"tensors", "prev_versions"}
        with pytest.raises(AssertionError, match="Expected tensors to be a tuple"):
            _preserve([h])  # type: ignore[arg-type]
        assert isinstance(block, _preserve)
        with block as nothing:
            assert nothing is None
    hold = weakref.ref(block)
    del block
    gc.collect()
    assert hold() is None


# ---- tracing and copying -------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _norms(x: torch.Tensor) -> torch.Tensor:
    mean, var = torch.zeros(4), torch.ones(4)
    y = torch.batch_norm(x, None, None, mean, var, True, 0.1, 1e-5, True)
    return y * F.batch_norm(x * 2, torch.zeros(4), torch.ones(4), training=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiling_breaks_no_graph_and_changes_no_bit(backend: str, fresh_dynamo: None) -> None:
    def use(guarded: bool) -> tuple[list[torch.Tensor], int]:
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        x = leaf()
        with torchguard.strict() if guarded else harness.nullcontext():
            ballast = leaf() * leaf()
            results = []
            for function in (torch.compile(_norms, backend=backend, fullgraph=True),
                             torch.compile(model, backend=backend, fullgraph=True)):  # fmt: skip
                for _ in range(2):
                    out = function(x)
                    out.square().sum().backward()
                    results.append(out.detach())
            del ballast
        assert not counters["graph_break"]
        assert x.grad is not None
        return [*results, x.grad, *model.state_dict().values()], counters["stats"]["unique_graphs"]

    plain, graphs = use(False)
    guarded, guarded_graphs = use(True)
    assert all(map(torch.equal, plain, guarded))
    assert graphs == guarded_graphs


@pytest.mark.filterwarnings("ignore")
def test_torchscript_and_fx_see_pytorchs_own_function() -> None:
    def script(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        return torch.batch_norm(x, None, None, mean, var, True, 0.1, 1e-5, True)

    plain = torch.jit.script(script).code
    original = torch.batch_norm
    with torchguard.strict():
        ballast = leaf() * leaf()
        assert torch.jit.script(script).code == plain
        assert torch.jit.script(nn.BatchNorm1d(4)).code
        traced = torch.fx.symbolic_trace(script)
        assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [original]
        exported = torch.export.export(nn.BatchNorm1d(4), (BATCH,))
        assert any("batch_norm" in str(node.target) for node in exported.graph.nodes)
        del ballast
    assert torch.batch_norm is original


def test_what_is_patched_copies_and_pickles_as_the_original() -> None:
    original = torch.batch_norm
    with torchguard.strict():
        assert torch.batch_norm is not original
        assert torch.batch_norm == original
        assert copy.deepcopy({"f": torch.batch_norm})["f"] is original
        stored = pickle.dumps([torch.batch_norm, _preserve])
        assert pickle.loads(stored)[1] is _preserve
    assert pickle.loads(stored) == [original, _preserve]


def test_a_mode_of_the_user_sees_what_it_saw_before() -> None:
    class Names(torch.overrides.TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    def program() -> list[str]:
        bn = nn.BatchNorm1d(4)
        with Names() as mode:
            out = bn(BATCH)
            torch.batch_norm(BATCH, None, None, bn.running_mean, bn.running_var, True, 0.1, 1e-5, True)
        assert out.grad_fn is not None
        return mode.names

    plain = program()
    with torchguard.strict():
        ballast = leaf() * leaf()
        assert program() == plain
        del ballast


@pytest.mark.parametrize("every_call", [False, True])
def test_training_is_the_same_bit_for_bit(every_call: bool) -> None:
    def train() -> list[torch.Tensor]:
        torch.manual_seed(1)
        generator = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
        critic = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None), nn.LeakyReLU(0.2), nn.Linear(4, 1))
        optimisers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in (generator, critic)]
        for step in range(4):
            fake = generator(torch.randn(6, 4))
            (critic(torch.randn(6, 4)).mean() - critic(fake.detach()).mean()).backward()
            optimisers[1].step()
            critic.zero_grad()
            (critic.eval() if step % 2 else critic)(fake).mean().backward()
            critic.train()
            optimisers[0].step()
            generator.zero_grad()
        return [*generator.state_dict().values(), *critic.state_dict().values()]

    plain = train()
    with torchguard.strict(every_call=every_call) as guard:
        guarded = train()
    assert all(map(torch.equal, plain, guarded))
    assert guard.violations == []


def test_what_keeps_statistics_is_known_by_name() -> None:
    functions = {function.__name__ for function, writer in _intercept.WRITERS.items() if writer.keeps_statistics}
    assert {"batch_norm", "native_batch_norm", "_native_batch_norm_legit", "batch_norm_update_stats"} <= functions


@pytest.mark.filterwarnings("ignore")
def test_the_compiler_leaves_the_guards_own_code_alone(fresh_dynamo: None) -> None:
    """Where a function mode breaks the graph, every frame below is offered to the compiler, the judgement among them."""
    bn, x = nn.BatchNorm1d(4).eval(), leaf()
    with torchguard.Guard("record", every_call=True) as guard:
        out = bn(x)
        compiled = torch.compile(bn.train(), backend="eager")
        counters.clear()
        compiled(BATCH)
        out.sum().backward()
    assert [violation.operation for violation in guard.violations] == ["batch_norm()"]
    assert counters["stats"]["calls_captured"] <= 2
