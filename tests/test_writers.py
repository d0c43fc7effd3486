"""Does the table of writers say what torch does when each of them is called?

Every entry that can be called on a small tensor is called: which of its arguments changed, did their version
move, did it call back? Nothing here repeats a list of the package: the truth is measured.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace as Namespace
from typing import Any

import probe_counters
import pytest
import torch
from probe_counters import SPECIAL, f, general_calls

from torchguard import Guard, _counterless, _memory, _torch, _writers
from torchguard._writers import EYE, OUT, Writer, substituted, writer_of, writer_of_operator, writers_in

pytestmark = pytest.mark.filterwarnings("ignore")

SPACES: dict[str, Any] = {
    "Tensor": torch.Tensor,
    "torch": torch,
    "functional": torch.nn.functional,
    "_nn": _torch.NN,
    "_VF": _torch.VARIABLE_FUNCTIONS,
}
TABLE: dict[str, tuple[Callable[..., Any], Writer]] = {
    f"{space}.{name}": entry
    for space, namespace in SPACES.items()
    for name, entry in sorted(writers_in(namespace, dir(namespace)).items())
}


#: Cannot be called on a small strided CPU tensor of this build: they need CUDA or a library's own layout.
NOT_CALLED = {key for key in TABLE if key.rpartition(".")[2] in probe_counters.NOT_RUN}


class Seen:
    """What one call was seen to do."""

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs
        tensors = list(itertools.chain.from_iterable(map(_memory.tensors_in, (*args, *kwargs.values()))))
        before = [(tensor._version, tensor.detach().clone()) for tensor in tensors]
        torch.manual_seed(0)
        state = torch.get_rng_state()
        with torch.no_grad():
            function(*args, **kwargs)
        self.drew = not torch.equal(state, torch.get_rng_state())
        self.moved = {id(t) for t, (version, _) in zip(tensors, before, strict=True) if t._version != version}
        self.changed = {
            id(t)
            for t, (_, copy) in zip(tensors, before, strict=True)
            if t.shape == copy.shape and not torch.equal(t.nan_to_num(nan=99.0), copy.nan_to_num(nan=99.0))
        }


def experiment(key: str) -> Seen | None:
    """Make the first call that torch accepts and that changes something; None if it accepts none."""
    function, _ = TABLE[key]
    name = key.rpartition(".")[2]
    calls = iter([SPECIAL[name]()]) if name in SPECIAL else general_calls(name)
    best = None
    for args, kwargs in calls:
        try:
            seen = Seen(function, args, kwargs)
        except (RuntimeError, TypeError, NotImplementedError, IndexError, ValueError):
            continue
        if seen.changed:
            return seen
        best = best or seen
    return best


_results: dict[str, Seen | None] = {}


def result(key: str) -> Seen:
    if key not in _results:
        _results[key] = experiment(key)
    seen = _results[key]
    if seen is None:
        assert key in NOT_CALLED, f"no call of {key} was accepted: give it one in SPECIAL"
        pytest.skip("cannot be called on a small CPU tensor of this build")
    return seen


@pytest.mark.parametrize("key", TABLE)
def test_a_call_does_what_the_table_says(key: str) -> None:
    writer = TABLE[key][1]
    seen = result(key)
    written = writer.targets(seen.args, seen.kwargs)
    targets = {id(target) for target in written}
    counted = {id(target) for target in written if writer.counts(target, seen.args, seen.kwargs)}
    assert seen.changed <= targets, "memory of an argument changed that is not listed"
    assert seen.moved <= targets
    assert seen.changed & counted <= seen.moved, "memory changed and the version did not move"
    assert seen.moved <= counted, "the version moves after all"
    assert seen.changed or seen.moved
    takes_a_function = any(callable(arg) and not isinstance(arg, torch.Tensor) for arg in seen.args)
    assert writer.calls_back is takes_a_function
    assert writer.draws is seen.drew


@pytest.mark.parametrize(
    "key", [key for key, (_, writer) in TABLE.items() if writer.draws and writer.written[0][0] == 0]
)
def test_a_rehearsal_draws_nothing_and_the_call_draws_what_it_would(key: str) -> None:
    """Under ``Guard("record")`` on an alias of a live save: same values, same state of the generator."""
    result(key)
    function, _ = TABLE[key]
    name = key.rpartition(".")[2]
    space = key.partition(".")[0]

    def where_programs_look_it_up() -> Any:
        return {"_VF": torch._VF, "_nn": torch._C._nn}.get(space, SPACES[space])

    def program(guarded: bool) -> tuple[torch.Tensor, torch.Tensor]:
        args, kwargs = SPECIAL[name]() if name in SPECIAL else ((f(30),), {})
        save = args[0].requires_grad_()
        loss = (save * save).sum()
        torch.manual_seed(3)
        with torch.no_grad():
            writing = getattr(where_programs_look_it_up(), name) if guarded else function
            writing(save.data, *args[1:], **kwargs)
        return save.detach().clone() + 0 * loss.detach(), torch.get_rng_state()

    plain = program(False)
    with Guard("record") as guard:
        guarded = program(True)
    args, _ = SPECIAL[name]() if name in SPECIAL else ((f(30),), {})
    assert len(guard.violations) == int(not torch.equal(plain[0], args[0])), "a write that changes nothing is none"
    assert all(map(torch.equal, plain, guarded))


def test_almost_everything_was_called() -> None:
    """The three tests above skip what they cannot call: that must stay a handful."""
    keys = [key for key in TABLE if key in _results] or list(TABLE)
    uncalled = {key for key in keys if _results.get(key, experiment(key)) is None}
    assert uncalled <= NOT_CALLED
    unchanged = {key for key in keys if (seen := _results.get(key)) is not None and not seen.changed}
    assert len(unchanged) <= 0.05 * len(keys), unchanged


# ---- completeness ------------------------------------------------------------------------------------------


#: Python's, from its data model.
IN_PLACE_OPERATORS = {
    f"__i{name}__"
    for name in [
        "add",
        "sub",
        "mul",
        "matmul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
        "concat",
    ]
}


def overridable() -> set[str]:
    """Names of torch's functions that say, by their name, that they work in place."""
    return {
        function.__name__
        for functions in torch.overrides.get_overridable_functions().values()
        for function in functions
        if (function.__name__.endswith("_") and not function.__name__.endswith("__"))
        or function.__name__ == "__setitem__"
        or function.__name__ in IN_PLACE_OPERATORS
    }


#: What a tensor is changes, not what is in its memory. ``detach_`` has a patch of its own.
METADATA: dict[str, Callable[[torch.Tensor], Any]] = {
    "as_strided_": lambda x: x.as_strided_((2, 2), (1, 2)),
    "detach_": lambda x: x.detach_(),
    "requires_grad_": lambda x: x.requires_grad_(),
    "resize_": lambda x: x.resize_(2, 2),
    "resize_as_": lambda x: x.resize_as_(torch.ones(2)),
    "set_": lambda x: x.set_(torch.ones(3)),
    "share_memory_": lambda x: x,  # moves the memory elsewhere, see below
    "squeeze_": lambda x: x.squeeze_(),
    "swapaxes_": lambda x: x.swapaxes_(0, 1),
    "swapdims_": lambda x: x.swapdims_(0, 1),
    "t_": lambda x: x.t_(),
    "transpose_": lambda x: x.transpose_(0, 1),
    "unsqueeze_": lambda x: x.unsqueeze_(0),
    "rename_": lambda x: x.rename_(None),
}
SPARSE_ONLY = {"_coalesced_", "resize_as_sparse_", "sparse_resize_", "sparse_resize_and_clear_"}
NO_MEMORY_OF_THEIR_OWN = set(METADATA) | SPARSE_ONLY


def test_every_in_place_name_of_torch_is_in_the_table_or_writes_no_memory() -> None:
    known = {key.partition(".")[2] for key in TABLE}
    assert overridable() - known <= NO_MEMORY_OF_THEIR_OWN


def test_nothing_that_is_in_the_table_is_called_harmless_here() -> None:
    assert not {key.partition(".")[2] for key in TABLE} & NO_MEMORY_OF_THEIR_OWN


@pytest.mark.parametrize("name", METADATA)
def test_what_the_table_leaves_out_writes_no_memory(name: str) -> None:
    if not hasattr(torch.Tensor, name):
        pytest.skip("this torch has no such method")
    memory = f(4, 3)
    before = memory.clone()
    METADATA[name](memory.detach())
    assert torch.equal(memory, before)
    assert writer_of(name) is None


@pytest.mark.parametrize("name", METADATA)
def test_what_moves_a_version_all_the_same_is_listed(name: str) -> None:
    if not hasattr(torch.Tensor, name):
        pytest.skip("this torch has no such method")
    tensor = torch.ones(1, 1) if name == "squeeze_" else torch.ones(4, 3)
    before = tensor._version
    METADATA[name](tensor)
    own_patch = name == "set_"
    assert (name in _writers.RESHAPING or own_patch) is (tensor._version != before)


def test_share_memory_keeps_every_value() -> None:
    tensor = f(4, 3)
    before = tensor.clone()
    tensor.share_memory_()
    assert torch.equal(tensor, before)


def test_functions_that_call_the_others_are_left_out() -> None:
    """Those written in Python: what they call is judged, and would be twice. Of ``torch.Tensor`` they are there."""
    in_python = {key for key, (function, _) in TABLE.items() if inspect.isfunction(function)}
    assert {key.partition(".")[0] for key in in_python} <= {"Tensor"}
    assert all(callable(function) for function, _ in TABLE.values())
    assert inspect.isfunction(torch.nn.functional.rrelu)
    assert not _writers.writers_in(Namespace(relu_=lambda x: x, number_=3), ["relu_", "number_", "missing_"])
    assert set(_writers.writers_in(Namespace(add_=torch.Tensor.add_), ["add_"])) == {"add_"}


def test_in_place_operators_are_all_there() -> None:
    known = {key.removeprefix("Tensor.") for key in TABLE if key.startswith("Tensor.")}
    assert {name for name in IN_PLACE_OPERATORS if hasattr(torch.Tensor, name)} <= known
    assert "__setitem__" in known


# ---- schemas -----------------------------------------------------------------------------------------------


def operators() -> Iterator[Any]:
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        if isinstance(packet, torch._ops.OpOverloadPacket):
            for overload in packet.overloads():
                yield getattr(packet, overload)


def mutated(operator: Any) -> dict[int, str]:
    return {
        position: argument.name
        for position, argument in enumerate(operator._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    }


def on_tensors(operator: Any, position: int) -> bool:
    return "Tensor" in str(operator._schema.arguments[position].type)


def test_every_argument_that_a_schema_mutates_is_listed() -> None:
    by_name = {key.partition(".")[2]: writer for key, (_, writer) in TABLE.items()}
    checked = 0
    for operator in operators():
        name = operator._schema.name.rpartition("::")[2]
        if name in by_name and operator._overloadname.find("out") < 0:
            expected = {(p, n) for p, n in mutated(operator).items() if on_tensors(operator, p)}
            assert expected <= set(by_name[name].written), str(operator)
            checked += 1
    assert checked > 250


#: Their schemas mark an argument of which they change no memory.
MARKED_FOR_NOTHING = {"_resize_output_", "record_stream", "retain_grad"}


def test_every_operator_that_mutates_has_a_writer() -> None:
    """``torch.ops``, as ``every_call=True`` sees it: the arguments that the schema marks, and those it should."""
    checked = 0
    for operator in operators():
        expected = {(p, n) for p, n in mutated(operator).items() if on_tensors(operator, p)}
        name = operator._schema.name.rpartition("::")[2]
        expected |= set(_counterless.UNMARKED.get(name, ()))  # test_probe.py measures these
        writer = writer_of_operator(operator)
        if not expected:
            assert writer is None or not any(on_tensors(operator, p) for p, _ in writer.written)
        elif torch.Tag.inplace_view in operator.tags or name in NO_MEMORY_OF_THEIR_OWN | MARKED_FOR_NOTHING:
            assert writer is None, str(operator)
        else:
            assert writer is not None, str(operator)
            assert set(writer.written) == expected, str(operator)
            checked += 1
    assert checked > 1000


def test_a_packet_has_the_writer_of_its_overloads() -> None:
    """``torch.ops.aten.add_``: which overload will be called is not known yet."""
    checked = 0
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        if not isinstance(packet, torch._ops.OpOverloadPacket) or not writers_of_overloads(packet):
            continue
        writer = writer_of_operator(packet)
        if name == "sort":
            continue  # its in-place overloads sort Python lists
        assert writer is not None, name
        expected = set().union(*(set(w.written) for w in writers_of_overloads(packet)))
        assert expected <= set(writer.written), name
        checked += 1
    assert checked > 150
    assert writer_of_operator(torch.ops.aten.add) is None
    assert writer_of_operator(torch.ops.aten.add_) == writer_of_operator(torch.ops.aten.add_.Tensor)


def test_an_operator_is_told_as_its_function_is() -> None:
    """Name, what is not counted, and whether it draws: what calls of the function showed holds for the operator."""
    checked = drawing = uncounted = 0
    for key, (_, entry) in TABLE.items():
        packet = getattr(torch.ops.aten, key.partition(".")[2], None)
        writer = None if packet is None else writer_of_operator(packet)
        if writer is None:
            continue
        assert replace(writer, written=()) == replace(entry, written=()), key
        checked, drawing, uncounted = checked + 1, drawing + writer.draws, uncounted + bool(writer.uncounted)
    assert checked > 200
    assert drawing > 10
    assert uncounted > 10


#: Where each collective receives: the arguments that its documentation calls output, or all where it is in place.
RECEIVES = {
    "c10d": {
        "recv_": (0, "tensors"),
        "recv_any_source_": (0, "tensors"),
        "reduce_": (0, "tensors"),
        "allreduce_": (0, "tensors"),
        "allreduce_coalesced_": (0, "tensors"),
        "broadcast_": (0, "tensors"),
        "gather_": (0, "output_tensors"),
        "scatter_": (0, "output_tensors"),
        "allgather_": (0, "output_tensors"),
        "_allgather_base_": (0, "output_tensor"),
        "allgather_coalesced_": (0, "output_lists"),
        "allgather_into_tensor_coalesced_": (0, "outputs"),
        "reduce_scatter_": (0, "output_tensors"),
        "_reduce_scatter_base_": (0, "output_tensor"),
        "reduce_scatter_tensor_coalesced_": (0, "outputs"),
        "alltoall_": (0, "output_tensors"),
        "alltoall_base_": (0, "output"),
    },
    "_c10d_functional": {
        "all_reduce_": (0, "input"),
        "all_reduce_coalesced_": (0, "inputs"),
        "broadcast_": (0, "input"),
        "irecv": (0, "tensor"),
        "batch_p2p_ops": (3, "tensors"),
    },
}
RECEIVES_OUT = {"all_gather_into_tensor_out", "reduce_scatter_tensor_out"}


@pytest.mark.parametrize("namespace", sorted(RECEIVES))
def test_a_collective_writes_to_what_it_receives_into(namespace: str) -> None:
    if namespace not in _torch.COLLECTIVE_OPERATORS:
        pytest.skip("this torch cannot unbox their Work")
    sending = 0
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        if space != namespace:
            continue
        writer = writer_of_operator(getattr(getattr(torch.ops, space), name))
        x = f(3)
        if name in RECEIVES_OUT:
            assert writer is not None, name
            assert [t is x for t in writer.targets((f(3), "sum", 1, "0"), {"out": x})] == [True]
        elif name not in RECEIVES[namespace]:
            assert writer is None, name
            sending += 1
            continue
        else:
            assert writer is not None, name
            assert writer.written == (RECEIVES[namespace][name],)
        assert writer.name == name
        assert writer.collective
        assert writer.once, "it must not be made twice: others take part"
        assert not writer.counts(x, (x, x, x, x), {"out": x}), "only its rehearsal tells"
    assert sending >= 4


def writers_of_overloads(packet: Any) -> list[Writer]:
    """Of the overloads on tensors that write, those with ``out=`` excepted: the keyword gives them away."""
    found = []
    for overload in packet.overloads():
        operator = getattr(packet, overload)
        written = mutated(operator)
        if any(operator._schema.arguments[p].kwarg_only for p in written):
            continue
        if any(on_tensors(operator, p) for p in written) and (writer := writer_of_operator(operator)):
            found.append(writer)
    return found


# ---- finding and replacing the targets ---------------------------------------------------------------------


def test_targets_are_found_by_position_and_by_keyword() -> None:
    x, y = f(3), f(3)
    add = writer_of("add_")
    assert add is not None
    assert [t is x for t in add.targets((x, y), {})] == [True]
    assert [t is x for t in add.targets((), {"self": x, "other": y})] == [True]
    assert [t is x for t in add.targets((), {"input": x})] == [True]


def test_what_is_called_input_is_the_first_argument_only() -> None:
    """``batch_norm(input=x, weight=w, ...)`` without running statistics writes to nothing."""
    norm = writer_of("batch_norm")
    assert norm is not None
    x, mean, var = f(3, 2), f(2), f(2)
    assert norm.targets((), {"input": x, "weight": None}) == []
    found = norm.targets((), {"input": x, "running_mean": mean, "running_var": var})
    assert {id(t) for t in found} == {id(mean), id(var)}


def test_what_is_not_counted_is_found_by_keyword() -> None:
    norm, adam = writer_of("batch_norm"), writer_of("_fused_adam_")
    assert norm is not None
    assert adam is not None
    mean, steps, x = [f(2)], [f(1)], [f(2)]
    assert not norm.counts(mean[0], (), {"input": f(3, 2), "running_mean": mean[0]})
    keywords = {"self": x, "grads": [f(2)], "exp_avgs": [f(2)], "exp_avg_sqs": [f(2)], "max_exp_avg_sqs": []}
    assert not adam.counts(x[0], (), {**keywords, "state_steps": steps})
    plain = Writer("made_up_", written=((0, "self"), (1, "other")), uncounted=frozenset({"other"}))
    assert plain.counts(x[0], (), {"self": x[0], "other": mean[0]})
    assert not plain.counts(mean[0], (), {"self": x[0], "other": mean[0]})


def gone_view() -> torch.Tensor:
    """One of several views that an operation returned, after their base was written to: PyTorch cannot say its node."""
    base = f(4, 2).requires_grad_() * 1
    view = base.unbind()[0]
    base.mul_(2)
    return view


TARGETS: dict[str, Callable[[], torch.Tensor]] = {
    "leaf": lambda: f(3).requires_grad_(),
    "plain": lambda: f(3),
    "result": lambda: f(3).requires_grad_() * 1,
    "view of a leaf": lambda: f(3).requires_grad_()[:2],
    "gone view": gone_view,
}
CALLS: dict[str, Callable[[torch.Tensor], Any]] = {
    "add_": lambda x: x.add_(1),
    "apply_": lambda x: x.apply_(lambda value: value + 1),
    "map_": lambda x: x.map_(f(*x.shape), lambda one, other: one + other),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("target", TARGETS)
def test_what_pytorch_refuses_is_known_before(target: str, call: str, grad: bool) -> None:
    """Whatever is said to be refused is; what is not may still be, for what only the call can tell."""
    writer = writer_of(call)
    assert writer is not None
    tensor = TARGETS[target]()
    with torch.set_grad_enabled(grad):
        said = writer.refused(tensor)
        try:
            CALLS[call](tensor)
        except RuntimeError:
            assert said or target == "view of a leaf"
        else:
            assert not said


def test_a_collective_is_not_refused_for_what_requires_grad() -> None:
    assert not Writer("broadcast_", collective=True).refused(f(3).requires_grad_())
    assert not Writer("broadcast_", collective=True, calls_back=True).refused(f(3).requires_grad_())


def test_targets_in_lists_and_several_arguments() -> None:
    args, kwargs = SPECIAL["_fused_adam_"]()
    adam = TABLE["torch._fused_adam_"][1]
    # params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs as the schema has them: the steps as well, or not.
    found = {id(target) for target in adam.targets(args, kwargs)}
    assert {id(member) for part in args[:5] for member in part} <= found
    names = ["self", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "state_steps"]
    assert {id(t) for t in adam.targets((), {**dict(zip(names, args, strict=True)), **kwargs})} == found


def test_out_is_a_target() -> None:
    x, y = f(3), f(3)
    assert OUT.title == "out="
    assert OUT.draws, "it may be torch.rand"
    assert [t is x for t in OUT.targets((y,), {"out": x})] == [True]
    assert [t is t2 for t, t2 in zip(OUT.targets((y,), {"out": (x, y)}), (x, y), strict=True)] == [True, True]


def test_eye_writes_to_its_tensor_and_draws_nothing() -> None:
    x = f(3, 3)
    for args, kwargs in (((x,), {}), ((), {"tensor": x})):
        assert [t is x for t in EYE.targets(args, kwargs)] == [True]
    assert EYE.title == "eye_()"
    state = torch.get_rng_state()
    version = x._version
    torch.nn.init.eye_(x)
    assert EYE.draws is not torch.equal(state, torch.get_rng_state())
    assert EYE.counts(x, (x,), {}) is (x._version != version)


def test_running_statistics_are_what_batch_norm_updates() -> None:
    keeping = {key for key, (_, writer) in TABLE.items() if writer.keeps_statistics}
    assert keeping == {
        key
        for key, (_, writer) in TABLE.items()
        if {name for _, name in writer.written} == {"running_mean", "running_var"}
    }
    assert {"torch.batch_norm", "torch.native_batch_norm"} <= keeping


def test_substitution_replaces_what_has_a_replica_wherever_it_stands() -> None:
    x, y, copy = f(3), f(3), f(3)
    index = (slice(None), [0, 1])
    args = substituted((x, [y, x], (x, index), 2, torch.Size([3])), {id(x): copy})
    assert args[0] is args[1][1] is args[2][0] is copy
    assert args[1][0] is y
    assert args[2][1] is index
    assert isinstance(args[4], torch.Size)
    assert [type(value) for value in args[1:3]] == [list, tuple]
    values = torch.max(torch.ones(2, 2), 0)
    assert substituted(values, {id(values.indices): copy})[1] is copy
    assert substituted(values, {}) is values


def test_titles_read_as_the_program_does() -> None:
    titles = {name: writer.title for name in ("add_", "__iadd__", "__setitem__") if (writer := writer_of(name))}
    assert titles == {"add_": "add_()", "__iadd__": "+=", "__setitem__": "x[i] = v"}
    for key, (_, writer) in TABLE.items():
        assert not writer.title.startswith("__"), key
    assert Writer("UntypedStorage.copy_", on_storage=True).title == "UntypedStorage.copy_"
    signs = {
        "add": "+", "and": "&", "floordiv": "//", "lshift": "<<", "matmul": "@", "mod": "%", "mul": "*", "or": "|",
        "pow": "**", "rshift": ">>", "sub": "-", "truediv": "/", "xor": "^", "div": "/",
    }  # fmt: skip
    assert {name: _writers.title_of(f"__i{name}__") for name in signs} == {n: f"{s}=" for n, s in signs.items()}


def test_readers_are_no_writers() -> None:
    for name in ("add", "sigmoid", "clone", "detach", "__init__", "__getitem__", "__add__", "numpy"):
        assert writer_of(name) is None
    assert _writers.writers_in(torch, ["add", "relu"]) == {}
