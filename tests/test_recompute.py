"""Checkpoints under the guard: does everything live, fail and compute as without it, and what does a report say?"""

from __future__ import annotations

import functools
import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_debug_enabled,
    set_checkpoint_early_stop,
)

import torchguard
from torchguard import SavedTensorCorruptionError, SavedTensorCorruptionWarning
from torchguard._saves import LEDGER

BOTH = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])
GUARDS: dict[str, Callable[[], Any]] = {
    "strict": torchguard.strict,
    "warn": torchguard.warn,
    "every_call": lambda: torchguard.strict(every_call=True),
}


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (3, 4)), requires_grad=True)


# ---- lifetimes -------------------------------------------------------------------------------------------------------


@BOTH
def test_what_is_read_is_not_kept_alive(reentrant: bool) -> None:
    """The function finds another mask the second time; the first one is gone as soon as it is without the guard."""
    box, x = [torch.randn(4)], leaf()
    with torchguard.strict():
        out = checkpoint(lambda x: (x * box[0]).exp(), x, use_reentrant=reentrant)
        gone = weakref.ref(box[0])
        box[0] = torch.ones(4)
        assert gone() is None
        out.sum().backward()


@BOTH
def test_a_temporary_of_outside_memory_is_not_kept_alive(reentrant: bool) -> None:
    base, made = torch.randn(2, 4), []

    def body(x: torch.Tensor) -> torch.Tensor:
        row = base[0]
        made.append(weakref.ref(row))
        return (x * row).exp()

    with torchguard.strict():
        out = checkpoint(body, leaf(), use_reentrant=reentrant)
        assert made[0]() is None or not reentrant
        out.sum().backward()
        del out
    assert [item() for item in made] == [None, None]


@BOTH
def test_copies_go_with_the_graph(reentrant: bool) -> None:
    mask = torch.randn(1000)

    def memory() -> int:
        gc.collect()
        return sum(thing.numel() for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))

    with torchguard.strict():
        out = checkpoint(lambda x: (x * mask).exp(), leaf(1000), use_reentrant=reentrant)
        before = memory()
        with torchguard.allow("looked at below"):
            mask.add_(1)
        entries = [save for save in LEDGER.all_alive() if save.operation == "checkpoint"]
        assert [save.remark().proof is not None for save in entries] == [True]
        entries.clear()
        del out
        assert not [save for save in LEDGER.all_alive() if save.operation == "checkpoint"]
        assert memory() <= before


@BOTH
def test_a_step_after_backward_meets_no_entry_and_copies_nothing(reentrant: bool) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), leaf()
    with torchguard.strict():
        loss = checkpoint(model, x, use_reentrant=reentrant).sum()
        assert [save for save in LEDGER.all_alive() if save.operation == "checkpoint"]
        loss.backward()  # and the loss stays bound, with its graph
        alive = [save for save in LEDGER.all_alive() if save.operation == "checkpoint"]
        with torch.no_grad():
            model[0].weight.add_(1)
        assert all(save.remarks is None for save in alive)
        alive.clear()
        assert not [save for save in LEDGER.all_alive() if save.operation == "checkpoint"]


@BOTH
def test_entries_do_not_pile_up(reentrant: bool) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), leaf()
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    gc.collect()
    with torchguard.strict():
        sizes = []
        for _ in range(20):
            checkpoint(model, x, use_reentrant=reentrant).sum().backward()
            optimiser.step()
            sizes.append(len(LEDGER))
    assert sizes == [0] * 20


@BOTH
def test_the_error_keeps_nothing_of_the_graph_alive(reentrant: bool) -> None:
    masks, x = [torch.randn(4)], leaf()
    with torchguard.strict():
        out = checkpoint(lambda x: (x * masks[0]).exp(), x, use_reentrant=reentrant)
        masks[0].add_(1)
        try:
            out.sum().backward()
        except SavedTensorCorruptionError as error:
            kept = error.with_traceback(None)  # the frames of torch hold the checkpoint
    gone = weakref.ref(masks[0])
    del out
    masks.clear()
    gc.collect()
    assert gone() is None
    assert kept.violation.operation == "add_()"


@BOTH
def test_the_graph_goes_without_the_garbage_collector(reentrant: bool) -> None:
    class Body:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 2).exp()

    gc.collect()
    gc.disable()
    try:
        with torchguard.strict():
            body = Body()
            gone = weakref.ref(body)
            out = checkpoint(body, leaf(), use_reentrant=reentrant)
            del body
            assert gone() is not None
            out.sum().backward()
            del out
            assert gone() is None
    finally:
        gc.enable()


# ---- transparency ----------------------------------------------------------------------------------------------------


def plain(h: torch.Tensor) -> torch.Tensor:
    return checkpoint(lambda x: F.gelu(x @ x.T), h, use_reentrant=False)


def dropped(h: torch.Tensor) -> torch.Tensor:
    return checkpoint(
        nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.RReLU(), nn.Tanh()).train(), h, use_reentrant=True
    )


def dropped_anew(h: torch.Tensor) -> torch.Tensor:
    body = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh())
    return checkpoint(body, h, use_reentrant=False, preserve_rng_state=False)


def with_keywords(h: torch.Tensor) -> torch.Tensor:
    return checkpoint(
        lambda x, *, by, names: (x * by).exp() + len(names), h, use_reentrant=False, by=h.sum(), names=["a"]
    )


def in_segments(h: torch.Tensor) -> torch.Tensor:
    return checkpoint_sequential(
        nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid()), 2, h, use_reentrant=False
    )


def in_segments_reentrantly(h: torch.Tensor) -> torch.Tensor:
    return checkpoint_sequential([nn.Linear(4, 4), torch.tanh, torch.exp], 3, h, use_reentrant=True)


def selected(h: torch.Tensor) -> torch.Tensor:
    policy = functools.partial(
        create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.exp.default]
    )
    return checkpoint(lambda x: ((x @ x.T).sin() @ x).exp(), h, use_reentrant=False, context_fn=policy)


def to_the_end(h: torch.Tensor) -> torch.Tensor:
    with set_checkpoint_early_stop(False):
        return checkpoint(lambda x: x.exp().sin() * 2, h, use_reentrant=False)


def debugged(h: torch.Tensor) -> torch.Tensor:
    return checkpoint(lambda x: x.exp().sin(), h, use_reentrant=False, debug=True)


def unchecked(h: torch.Tensor) -> torch.Tensor:
    return checkpoint(lambda x: x.exp().sin(), h, use_reentrant=False, determinism_check="none")


def nested(h: torch.Tensor) -> torch.Tensor:
    def outer(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(lambda x: x.exp().sin(), x, use_reentrant=False) * checkpoint(
            torch.tanh, x, use_reentrant=True
        )

    return checkpoint(outer, h, use_reentrant=False)


def wrapped(h: torch.Tensor) -> torch.Tensor:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))(h)


def attention(h: torch.Tensor) -> torch.Tensor:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    return checkpoint(layer, h[None], use_reentrant=True)


def frozen_attention(h: torch.Tensor) -> torch.Tensor:
    layer = nn.MultiheadAttention(4, 2, batch_first=True).eval().requires_grad_(False)
    fixed = h.detach()[None]
    return checkpoint(lambda x: x + layer(fixed, fixed, fixed)[0], h, use_reentrant=False)


def normalised(h: torch.Tensor) -> torch.Tensor:
    norm = nn.BatchNorm1d(4, momentum=None)
    out = checkpoint(norm, h, use_reentrant=False)
    return torch.cat([out, (out * norm.running_mean).exp()])


def cast(h: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return checkpoint(
            nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)), h, use_reentrant=False
        ).float()


def on_a_device(h: torch.Tensor) -> torch.Tensor:
    with torch.device("cpu"):
        return checkpoint(lambda x: x * torch.ones(4).exp() + x.sin(), h, use_reentrant=False)


def backward_inside(h: torch.Tensor) -> torch.Tensor:
    def body(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        (gradient,) = torch.autograd.grad(y.cos().sum(), x, retain_graph=True)
        return gradient * y

    return checkpoint(body, h, use_reentrant=False)


def mapped(h: torch.Tensor) -> torch.Tensor:
    return checkpoint(lambda x: torch.func.vmap(lambda row: row.sin() * row.sum())(x), h, use_reentrant=False)


def without_gradients(h: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        kept = checkpoint(lambda x: x.exp(), h, use_reentrant=False) + checkpoint(
            lambda x: x.exp(), h, use_reentrant=True
        )
    return h * kept


def several_outputs(h: torch.Tensor) -> torch.Tensor:
    one, other = checkpoint(lambda x: (x.exp(), {"other": x.sin()}), h, use_reentrant=False)
    return one * other["other"]


def twice_differentiable(h: torch.Tensor) -> torch.Tensor:
    out = checkpoint(lambda x: x.exp().sin(), h, use_reentrant=False).sum()
    (gradient,) = torch.autograd.grad(out, h, create_graph=True)
    return gradient.exp()


CLEAN = [
    plain, dropped, dropped_anew, with_keywords, in_segments, in_segments_reentrantly, selected, to_the_end, debugged,
    unchecked, nested, wrapped, attention, frozen_attention, normalised, cast, on_a_device, backward_inside, mapped,
    without_gradients, several_outputs, twice_differentiable,
]  # fmt: skip


def outcome(program: Callable[[torch.Tensor], torch.Tensor]) -> list[Any]:
    torch.manual_seed(3)
    x = leaf()
    out = program(x * 1)
    out.sum().backward()
    return [out.detach(), x.grad, torch.rand(2)]


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("program", CLEAN, ids=lambda program: program.__name__)
def test_a_clean_program_computes_the_same_bits(program: Any, guard: str) -> None:
    if guard == "every_call" and program in (attention, frozen_attention):
        pytest.skip("every_call=True keeps attention from its fast path: docs/limits.md")
    if program is debugged and guard != "strict":
        pytest.skip("torch's logging of a second such run is one that pytest cannot format")
    expected = outcome(program)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SavedTensorCorruptionWarning)
        with GUARDS[guard]() as entered:
            found = outcome(program)
    assert entered.violations == []
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def raises_inside(h: torch.Tensor) -> torch.Tensor:
    def body(x: torch.Tensor) -> torch.Tensor:
        raise KeyError("inside")

    return checkpoint(body, h, use_reentrant=False)


def saves_fewer(h: torch.Tensor) -> torch.Tensor:
    runs: list[None] = []

    def body(x: torch.Tensor) -> torch.Tensor:
        runs.append(None)
        return x.exp().sin() if len(runs) == 1 else x * 1

    return checkpoint(body, h, use_reentrant=False)


def other_shapes(h: torch.Tensor) -> torch.Tensor:
    keep = torch.tensor([True, True, False])
    out = checkpoint(lambda x: x[keep].exp().sin(), h, use_reentrant=False)
    keep[0] = False  # the bytes changed, and PyTorch notices it by the shapes
    return out


def other_shapes_reentrantly(h: torch.Tensor) -> torch.Tensor:
    keep = torch.tensor([True, True, False])
    out = checkpoint(lambda x: x[keep].exp().sin(), h, use_reentrant=True)
    keep[0] = False
    return out


def raises_when_recomputed(h: torch.Tensor) -> torch.Tensor:
    index = torch.tensor([1])
    out = checkpoint(lambda x: x[index].exp(), h, use_reentrant=False)
    index.fill_(9)
    return out


def debugging_a_mismatch(h: torch.Tensor) -> torch.Tensor:
    with set_checkpoint_debug_enabled(True):
        return saves_fewer(h)


def kept_and_mutated(h: torch.Tensor) -> torch.Tensor:
    policy = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.exp.default])
    kept: list[torch.Tensor] = []

    def body(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.exp())
        return kept[-1].sin()

    out = checkpoint(body, h, use_reentrant=False, context_fn=policy)
    with torch.no_grad():
        kept[0].add_(1)
    return out


def unknown_check(h: torch.Tensor) -> torch.Tensor:
    return checkpoint(torch.exp, h, use_reentrant=False, determinism_check="thorough")


def keywords_reentrantly(h: torch.Tensor) -> torch.Tensor:
    return checkpoint(torch.exp, h, use_reentrant=True, by=1)


FAILING = [
    raises_inside, saves_fewer, other_shapes, other_shapes_reentrantly, raises_when_recomputed, debugging_a_mismatch,
    kept_and_mutated, unknown_check, keywords_reentrantly,
]  # fmt: skip


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("program", FAILING, ids=lambda program: program.__name__)
def test_a_program_that_fails_fails_with_the_same_error(program: Any, guard: str) -> None:
    def error_of() -> Exception:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            outcome(program)
        return caught.value

    expected = error_of()
    with GUARDS[guard]() as entered:
        found = error_of()
    assert type(found) is type(expected)
    if program is not debugging_a_mismatch:  # its text has addresses and stacks
        assert str(found) == str(expected)
    assert entered.violations == []


@pytest.mark.parametrize("reentrant", [True, False])
def test_torch_is_as_it_was(reentrant: bool) -> None:
    before = vars(torch.utils.checkpoint).copy(), vars(torch.utils.checkpoint.CheckpointFunction).copy()
    with torchguard.strict():
        assert torch.utils.checkpoint._checkpoint_hook is not before[0]["_checkpoint_hook"]
        checkpoint(torch.exp, leaf(), use_reentrant=reentrant).sum().backward()
    now = vars(torch.utils.checkpoint), vars(torch.utils.checkpoint.CheckpointFunction)
    for old, new in zip(before, now, strict=True):
        assert old.keys() == new.keys()
        assert all(new[key] is value for key, value in old.items())


@BOTH
def test_a_checkpoint_made_inside_and_run_backward_outside(reentrant: bool) -> None:
    mask, x = torch.randn(4), leaf()
    with torchguard.strict():
        out = checkpoint(lambda x: (x * mask).exp(), x, use_reentrant=reentrant)
    mask.add_(1)  # nobody watches any more
    out.sum().backward()
    assert x.grad is not None


@BOTH
def test_a_checkpoint_made_outside_and_run_backward_inside(reentrant: bool) -> None:
    mask, x = torch.randn(4), leaf()
    out = checkpoint(lambda x: (x * mask).exp(), x, use_reentrant=reentrant)
    with torchguard.strict() as guard:
        mask.add_(1)  # what was read before the guard is not known
        out.sum().backward()
    assert guard.violations == []


@BOTH
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_compiled_and_scripted_modules(reentrant: bool, compiled: bool) -> None:
    torch._dynamo.reset()
    layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    module: Any = torch.compile(layer, backend="aot_eager") if compiled else torch.jit.script(layer)
    x = leaf()
    # TorchScript turns the exception that stops early into an error of its own.
    with torchguard.strict(), set_checkpoint_early_stop(compiled):
        for _ in range(2):
            checkpoint(module, x, use_reentrant=reentrant).sum().backward()
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        out = checkpoint(module, x, use_reentrant=reentrant)
        with torch.no_grad():
            (layer if compiled else module)[0].bias.add_(1)
        with pytest.raises(SavedTensorCorruptionError):
            out.sum().backward()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@BOTH
def test_what_is_followed_leaves_buffers_random_numbers_and_results_as_they_are(reentrant: bool) -> None:
    """The replay makes calls twice; nobody must notice, but for the warning."""

    def run() -> list[Any]:
        torch.manual_seed(5)
        model = nn.Sequential(
            nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.BatchNorm1d(4, momentum=None),
            nn.Embedding(3, 4, max_norm=0.5), nn.Tanh(),
        )  # fmt: skip
        x, rows = leaf(), torch.tensor([0, 2, 1])

        def body(x: torch.Tensor) -> torch.Tensor:
            for layer in list(model)[:5]:
                x = layer(x)
            return model[6](x + model[5](rows)) + torch.rand(3, 4)

        out = checkpoint(body, x, use_reentrant=reentrant)
        with torch.no_grad():
            model[0].weight.mul_(1.5)
            model[5].weight.mul_(1.5)
        (out * torch.rand(3, 4)).sum().backward()
        return [
            out,
            x.grad,
            torch.rand(2),
            *model.buffers(),
            *model.parameters(),
            *(p.grad for p in model.parameters()),
        ]

    expected = run()
    with warnings.catch_warnings(record=True) as caught, torchguard.warn() as guard:
        warnings.simplefilter("always")
        found = run()
    assert caught
    assert {violation.kind for violation in guard.violations} == {"recompute"}
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


# ---- what is reported ------------------------------------------------------------------------------------------------


@BOTH
def test_the_report(reentrant: bool) -> None:
    bias, x = torch.zeros(4), leaf()
    with torchguard.strict() as guard:
        out = checkpoint(lambda x: (x + bias).exp(), x, use_reentrant=reentrant)  # called
        bias[1:3].add_(1)  # changed
        with pytest.raises(SavedTensorCorruptionError) as caught:
            out.sum().backward()  # recomputed
    (violation,) = guard.violations
    assert caught.value.violation.site == violation.site
    assert (violation.kind, violation.caught, violation.operation) == ("recompute", "read", "add_()")
    assert violation.saved is not None
    assert violation.written is not None
    assert violation.read is not None
    assert "# called" in violation.saved.source
    assert "# changed" in violation.written.source
    assert "# recomputed" in violation.read.source
    assert (violation.elements, violation.of, violation.saved_by) == (2, 4, "checkpoint")
    text = str(violation)
    assert text.startswith("add_() has changed a tensor that a checkpoint reads again in backward\n\n  saved ")
    assert "2 of 4 elements" in text
    assert "PyTorch checks none of them, not even their" in text
    assert "fix:   do it after backward(), or hand the tensor to checkpoint() as an argument" in text


@BOTH
def test_a_write_that_was_not_seen(reentrant: bool) -> None:
    bias, x = torch.zeros(4), leaf()
    with torchguard.strict():
        out = checkpoint(lambda x: (x + bias).exp(), x, use_reentrant=reentrant)
        torch.ones(4, out=bias)
        with pytest.raises(SavedTensorCorruptionError) as caught:
            out.sum().backward()
    text = str(caught.value)
    assert text.startswith("a write has changed a tensor that a checkpoint reads again")
    assert "written   (between forward and backward, by code that is not patched" in text
    assert "out.sum().backward()     up to 4 of 4 elements" in text


@BOTH
def test_of_a_step_each_tensor_that_matters_is_told_once(reentrant: bool) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), leaf()
    with warnings.catch_warnings(record=True) as caught, torchguard.warn() as guard:
        warnings.simplefilter("always")
        out = checkpoint(model, x, use_reentrant=reentrant)
        with torch.no_grad():
            model[0].weight.add_(1)
            model[0].bias.add_(1)
            model[2].weight.add_(1)
            model[2].bias.add_(1)  # no gradient depends on it
        out.sum().backward()
    assert [violation.written.source for violation in guard.violations if violation.written] == [
        "model[0].weight.add_(1)",
        "model[0].bias.add_(1)",
        "model[2].weight.add_(1)",
    ]
    assert len(caught) == 3


@BOTH
def test_what_was_told_is_accepted_and_the_next_write_is_told_again(reentrant: bool) -> None:
    mask, x = torch.randn(4), leaf()
    with warnings.catch_warnings(record=True), torchguard.warn() as guard:
        warnings.simplefilter("always")
        out = checkpoint(lambda x: (x * mask).exp(), x, use_reentrant=reentrant).sum()
        mask.add_(1)
        out.backward(retain_graph=True)
        out.backward(retain_graph=True)
        assert len(guard.violations) == 1
        mask.mul_(2)
        out.backward()
    assert [(violation.operation, violation.times) for violation in guard.violations] == [("add_()", 1), ("mul_()", 1)]


@BOTH
def test_the_write_to_blame_is_the_one_after_which_the_bytes_stayed_changed(reentrant: bool) -> None:
    mask, x = torch.ones(4), leaf()
    with torchguard.strict():
        out = checkpoint(lambda x: (x * mask).exp(), x, use_reentrant=reentrant)
        mask.add_(1)
        mask.sub_(1)
        mask.mul_(3)
        with pytest.raises(SavedTensorCorruptionError, match=r"^mul_\(\) has changed"):
            out.sum().backward()


@BOTH
def test_an_allowed_write_is_kept_with_its_reason(reentrant: bool) -> None:
    mask, x = torch.ones(4), leaf()
    with torchguard.strict() as guard:
        out = checkpoint(lambda x: (x * mask).exp(), x, use_reentrant=reentrant)
        with torchguard.allow("it is meant"):
            mask.add_(1)
        out.sum().backward()
    assert [violation.allowed for violation in guard.allowed] == ["it is meant"]
    assert guard.violations == []


@BOTH
def test_the_guard_that_was_left_answers_for_what_was_written_under_it(reentrant: bool) -> None:
    mask, x = torch.ones(4), leaf()
    with torchguard.strict() as guard:
        out = checkpoint(lambda x: (x * mask).exp(), x, use_reentrant=reentrant)
        mask.add_(1)
    with pytest.raises(SavedTensorCorruptionError):
        out.sum().backward()
    assert len(guard.violations) == 1


# ---- threads ---------------------------------------------------------------------------------------------------------


@BOTH
def test_threads_have_checkpoints_of_their_own(reentrant: bool) -> None:
    """What one thread's function reads is not taken for what another's does."""
    found: dict[int, Any] = {}
    ready = threading.Barrier(4)

    def work(number: int) -> None:
        mask, x = torch.ones(4), leaf()

        def body(x: torch.Tensor) -> torch.Tensor:
            ready.wait(30)
            return (x * mask).exp()

        try:
            out = checkpoint(body, x, use_reentrant=reentrant)
            if number % 2:
                mask.add_(1)
            out.sum().backward()
            found[number] = None
        except SavedTensorCorruptionError as error:
            found[number] = error.violation.of

    with torchguard.strict():
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == {0: None, 1: 4, 2: None, 3: 4}


def test_no_guard_no_record() -> None:
    gc.collect()
    before = len(LEDGER)
    out = checkpoint(torch.exp, leaf(), use_reentrant=False)
    assert len(LEDGER) == before
    out.sum().backward()
