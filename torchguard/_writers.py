"""Which calls write to memory, to which of their arguments, and does PyTorch's version counter notice?

The table is derived from torch itself: names that end in an underscore, in-place operators, and the
operators' schemas, which say what each of them mutates. What a schema does not say is measured:
``_counterless.py`` is what ``tools/probe_counters.py`` saw.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from torchguard import _counterless, _memory, _torch

#: These change what a tensor is, not what is in its memory (most such operators carry the tag
#: ``inplace_view``).
_METADATA_ONLY = frozenset(
    {
        "requires_grad_",
        "rename_",
        "share_memory_",
        "_coalesced_",
        "sparse_resize_",
        "sparse_resize_and_clear_",
        "resize_as_sparse_",
        "_resize_output_",
        "resize_",
        "resize_as_",
        "set_",
        "retain_grad",
        "record_stream",
    }
)

#: These methods change what a tensor is, and move its version all the same.
RESHAPING = (
    "as_strided_", "resize_", "resize_as_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_", "unsqueeze_",
)  # fmt: skip

#: These draw random numbers and do not carry torch's tag for it, or not in every build.
_DRAW = frozenset(
    {
        "alpha_dropout_",
        "dropout_",
        "feature_alpha_dropout_",
        "feature_dropout_",
        "rrelu_",
        "rrelu_with_noise",
        "rrelu_with_noise_",
        "_fill_mem_eff_dropout_mask_",
    }
)

#: These call a function of the user's, which must not be called twice.
_CALL_BACK = frozenset({"apply_", "map_", "map2_"})

#: These write to Python lists of tensors, in TorchScript.
_OF_LISTS = frozenset({"sort"})

_IN_PLACE_OPERATORS = frozenset(
    [
        "__iadd__",
        "__isub__",
        "__imul__",
        "__imatmul__",
        "__idiv__",
        "__itruediv__",
        "__ifloordiv__",
        "__imod__",
        "__ipow__",
        "__iand__",
        "__ior__",
        "__ixor__",
        "__ilshift__",
        "__irshift__",
        "__setitem__",
    ]
)


@dataclass(frozen=True)
class Writer:
    """A call that writes.

    Attributes:
        name: its name, ``"add_"`` say.
        written: position and keyword of each argument that it writes to.
        uncounted: keywords of those whose version does not move.
        calls_back: whether it calls a function of the user's.
        draws: whether it draws random numbers.
        on_storage: whether it is a method of a storage, and ``name`` its title.
        collective: whether other processes take part. Only its rehearsal tells whether a version moves.
    """

    name: str
    written: tuple[tuple[int, str], ...] = ((0, "self"),)
    uncounted: frozenset[str] = frozenset()
    calls_back: bool = False
    draws: bool = False
    on_storage: bool = False
    collective: bool = False

    @property
    def once(self) -> bool:
        """Whether it must not be made twice: its rehearsal is the call."""
        return self.calls_back or self.collective

    def refused(self, target: torch.Tensor) -> bool:
        """Whether PyTorch refuses the call because ``target`` requires grad, but for what has no derivative.

        ``logical_not_`` and its like it lets through. A rehearsal would not be refused.
        """
        if not target.requires_grad or self.collective:
            return False
        try:
            return self.calls_back or (torch.is_grad_enabled() and target.is_leaf)
        except RuntimeError:  # a view of which PyTorch cannot tell any more where it comes from
            return True

    @property
    def title(self) -> str:
        """The name as a report shows it."""
        return self.name if self.on_storage else title_of(self.name)

    def counts(self, target: torch.Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether the version counter of ``target`` moves in a call with these arguments."""
        if not self.uncounted:
            return True
        rest = replace(self, written=tuple(entry for entry in self.written if entry[1] not in self.uncounted))
        return any(other is target for other in rest.targets(args, kwargs))

    @property
    def keeps_statistics(self) -> bool:
        """Whether all it writes to are running statistics.

        Batch normalisation saves them even where its backward has no use for them, and the next call changes them:
        what that does to a save shows when backward reads it.
        """
        return self.uncounted == _STATISTICS

    def targets(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The tensors that a call with these arguments writes to."""
        found: list[torch.Tensor] = []
        for value in self.written_to(args, kwargs):
            found.extend((value,) if isinstance(value, torch.Tensor) else _memory.tensors_in(value))
        return found

    def written_to(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The arguments that a call writes to: tensors, or lists of them."""
        found = []
        for position, keyword in self.written:
            if position < len(args):
                value = args[position]
            else:  # torch.add_ and its like call "input" what their schemas call "self"
                value = kwargs.get(keyword, None if position else kwargs.get("input"))
            if value is not None:
                found.append(value)
        return found


_STATISTICS = frozenset({"running_mean", "running_var"})

#: The position of an argument that is passed by keyword only.
_NO_POSITION = 10**6

_TITLES = {
    "out=": "out=",
    "__setitem__": "x[i] = v",
    "__iadd__": "+=",
    "__isub__": "-=",
    "__imul__": "*=",
    "__imatmul__": "@=",
    "__idiv__": "/=",
    "__itruediv__": "/=",
    "__ifloordiv__": "//=",
    "__imod__": "%=",
    "__ipow__": "**=",
    "__iand__": "&=",
    "__ior__": "|=",
    "__ixor__": "^=",
    "__ilshift__": "<<=",
    "__irshift__": ">>=",
}


def title_of(name: str) -> str:
    """A call of this name as a report shows it."""
    return _TITLES.get(name, f"{name}()")


def substituted(value: Any, replicas: Mapping[int, torch.Tensor]) -> Any:
    """The same argument with each tensor that has a replica (by its id) replaced by it, lists and tuples kept."""
    if isinstance(value, torch.Tensor):
        return replicas.get(id(value), value)
    if not isinstance(value, (list, tuple)):
        return value
    items = [substituted(item, replicas) for item in value]
    if all(new is old for new, old in zip(items, value, strict=True)):
        return value  # a torch.Size stays one
    return items if isinstance(value, list) else tuple(items)


def is_in_place(name: str) -> bool:
    """Whether a callable of this name writes to what it is given."""
    return name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))


@functools.cache
def writer_of(name: str) -> Writer | None:
    """What the operator ``name`` writes to; None where it writes to no memory."""
    if name in _METADATA_ONLY or name in _OF_LISTS:
        return None
    in_place = is_in_place(name)
    written = dict(_counterless.UNMARKED.get(name, ()) or _torch.UNMARKED.get(name, ()))
    draws = name in _DRAW
    for schema in _torch.schemas_of(name):
        if not in_place and (not schema.is_mutable or schema.overload_name.endswith("out")):
            continue  # an ``out`` is told by its keyword (OUT)
        for position, argument in enumerate(schema.arguments):
            info = argument.alias_info
            if info is not None and info.is_write and "Tensor" in str(argument.type) and not argument.kwarg_only:
                written[position] = argument.name
        tags = _tags(name, schema.overload_name)
        if torch.Tag.inplace_view in tags:
            return None
        draws = draws or torch.Tag.nondeterministic_seeded in tags
    if not written and not in_place:
        return None
    return Writer(
        name,
        tuple(sorted(written.items())) or ((0, "self"),),
        uncounted=_uncounted(name),
        calls_back=name in _CALL_BACK,
        draws=draws,
    )


def _uncounted(name: str) -> frozenset[str]:
    return frozenset(_counterless.UNCOUNTED.get(name, ()))


def _tags(name: str, overload: str) -> Sequence[Any]:
    packet = getattr(torch.ops.aten, name, None)
    operator = getattr(packet, overload or "default", None)
    return getattr(operator, "tags", ())


def writers_in(namespace: Any, names: Iterable[str]) -> dict[str, tuple[Callable[..., Any], Writer]]:
    """The callables of a namespace that write, with what they write to.

    Functions written in Python are left out (those of ``torch.Tensor`` excepted): they call the ones that are
    here.
    """
    found = {}
    for name in names:
        function = getattr(namespace, name, None)
        if not callable(function) or (namespace is not torch.Tensor and inspect.isfunction(function)):
            continue
        writer = writer_of(name)
        if writer is not None:
            found[name] = (function, writer)
    return found


def writer_of_operator(operator: Any) -> Writer | None:
    """What a ``torch.ops`` operator writes to, by its schema; None where it writes to nothing or does not
    say.
    """
    # Which overload of a packet will be called is not known, but an ``out`` is told by its keyword (OUT).
    packet = hasattr(operator, "overloads")
    overloads = [getattr(operator, name) for name in operator.overloads()] if packet else [operator]
    name = str(_torch.schema_of(overloads[0]).name).rpartition("::")[2]
    if str(_torch.schema_of(overloads[0]).name).partition("::")[0] in _torch.COLLECTIVE_OPERATORS:
        return _writer_of_collective(_torch.schema_of(overloads[0]))
    written = {argument: position for position, argument in _counterless.UNMARKED.get(name, ())}
    for overload in overloads:
        for position, argument in enumerate(_torch.schema_of(overload).arguments):
            info = argument.alias_info
            if info is not None and info.is_write and not (packet and argument.kwarg_only and argument.name == "out"):
                written[argument.name] = position
    if not written:
        return None
    if name in _METADATA_ONLY or any(torch.Tag.inplace_view in overload.tags for overload in overloads):
        return None
    places = tuple(sorted((position, argument) for argument, position in written.items()))
    draws = any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)
    return Writer(name, places, _uncounted(name), draws=draws or name in _DRAW)


def _writer_of_collective(schema: Any) -> Writer | None:
    name = str(schema.name).rpartition("::")[2]
    written = {
        position if not argument.kwarg_only else _NO_POSITION: argument.name
        for position, argument in enumerate(schema.arguments)
        if name in _RECEIVES_INTO.get(argument.name, ()) or (argument.alias_info and argument.alias_info.is_write)
    }
    if not written and name.endswith("_") and "barrier" not in name:
        written = {0: schema.arguments[0].name}  # torch.ops.c10d: the schemas do not say it
    if not written:
        return None
    return Writer(name, tuple(sorted(written.items())), frozenset(written.values()), collective=True)


#: The arguments of functional operators that are written to although the schema does not say it.
_RECEIVES_INTO = {"tensor": ("irecv",), "tensors": ("batch_p2p_ops",)}


#: ``out=``: whatever the function is, this is what it writes to.
OUT = Writer("out=", written=((_NO_POSITION, "out"),), draws=True)  # it may be any function

#: ``nn.init.eye_`` writes by ``out=``, which no patch sees.
EYE = Writer("eye_", written=((0, "tensor"),))
