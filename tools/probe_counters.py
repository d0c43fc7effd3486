"""Which writes of PyTorch move no version counter? Every operator that can write is run, and its counters are watched.

    python tools/probe_counters.py             # write torchguard/_counterless.py and tests/data/counters.json
    python tools/probe_counters.py --check     # compare with them instead

Standard library and torch only. What is run, on real tensors of the CPU:

* each overload of an ``aten`` operator whose schema marks an argument (other than an ``out``) as written, and each that
  takes running statistics, which most schemas do not mark;
* each name that says it works in place, in ``torch.Tensor``, ``torch``, ``torch._C._nn`` and ``torch._VF``;
* programs: steps of the optimisers (plain, foreach, fused), ``nn.init``, the normalisation modules, observers and fake
  quantisation, gradient scaling, and the collectives of a process group of one.

For every tensor among the arguments it is compared before and after: did its bytes change, did its version?
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "torchguard" / "_counterless.py"
RECORD = ROOT / "tests" / "data" / "counters.json"

#: What was seen of a tensor that a call wrote to.
MOVES, STAYS = "moves", "stays"

Call = tuple[list[Any], dict[str, Any]]


# ---- samples -------------------------------------------------------------------------------------------------------


def f(*shape: int) -> torch.Tensor:
    """Fresh floats between 0.05 and 0.95, negative ones among them."""
    count = torch.Size(shape).numel()
    values = torch.linspace(0.05, 0.95, max(count, 1))[:count].clone()
    values[::3] *= -1
    return values.reshape(shape)


def i(*shape: int) -> torch.Tensor:
    """Fresh integers from 1 on."""
    return torch.arange(1, torch.Size(shape).numel() + 1).reshape(shape)


def b(*shape: int) -> torch.Tensor:
    """Fresh booleans, both kinds."""
    return i(*shape) % 2 == 0


def z(*shape: int) -> torch.Tensor:
    """Fresh complex numbers."""
    return torch.complex(f(*shape), f(*shape).flip(0) if shape else f(*shape))


def index() -> torch.Tensor:
    """Fresh indices into three elements."""
    return torch.tensor([0, 2])


def _adam(**more: Any) -> Call:
    lists = [[f(3)], [f(3)], [torch.ones(3)], [torch.ones(3)], [torch.zeros(3)], [torch.ones(())]]
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "eps": 1e-8, "amsgrad": True}
    return lists, {
        **options,
        "maximize": False,
        "grad_scale": torch.tensor(2.0),
        "found_inf": torch.tensor(0.0),
        **more,
    }


def _sgd(**more: Any) -> Call:
    options: dict[str, Any] = {"weight_decay": 0.1, "momentum": 0.9, "lr": 0.1, "dampening": 0.0}
    options |= {"nesterov": False, "maximize": False, "is_first_step": False}
    return [[f(3)], [f(3)], [torch.ones(3)]], {**options, "grad_scale": torch.tensor(2.0), **more}


def _adagrad(**more: Any) -> Call:
    options: dict[str, Any] = {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "eps": 1e-8, "maximize": False}
    return [[f(3)], [f(3)], [torch.ones(3)], [torch.ones(())]], {**options, "grad_scale": torch.tensor(2.0), **more}


def _observed() -> list[Any]:
    """x, observer_on, fake_quant_on, running_min, running_max, scale, zero_point, and the constants."""
    state = [torch.tensor([1]), torch.tensor([1]), torch.zeros(1), torch.zeros(1), torch.ones(1)]
    return [f(30), *state, torch.zeros(1, dtype=torch.int32), 0.01, 0, 255, 0]


def _normalised() -> list[Any]:
    """input, weight, bias, running_mean, running_var."""
    return [f(4, 3), torch.ones(3), torch.zeros(3), torch.zeros(3), torch.ones(3)]


def _out(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.zeros(shape) for shape in shapes]


def _lr(value: float) -> dict[str, Any]:
    return {"lr": torch.tensor(value)}


_BATCH = ((4, 3), (3,), (3,))

#: Calls for those that the general ones do not suit, by the name of the operator or of the overload.
SPECIAL: dict[str, Callable[[], Call]] = {
    "__setitem__": lambda: ([f(3, 4), 1, 7.0], {}),
    "__imatmul__": lambda: ([f(3, 3), f(3, 3)], {}),
    "addbmm_": lambda: ([f(3, 3), f(2, 3, 3), f(2, 3, 3)], {}),
    "baddbmm_": lambda: ([f(2, 3, 3), f(2, 3, 3), f(2, 3, 3)], {}),
    "addmm_": lambda: ([f(3, 3), f(3, 3), f(3, 3)], {}),
    "addmv_": lambda: ([f(3), f(3, 3), f(3)], {}),
    "addr_": lambda: ([f(3, 3), f(3), f(3)], {}),
    "apply_": lambda: ([f(3), lambda v: v + 1], {}),
    "map_": lambda: ([f(3), f(3), lambda v, w: v + w + 1], {}),
    "map2_": lambda: ([f(3), f(3), f(3), lambda v, w, u: v + w + u + 1], {}),
    "float_power_": lambda: ([f(3).abs().double(), 2.0], {}),
    "float_power_.Tensor": lambda: ([f(3).abs().double(), f(3).double()], {}),
    "fill_diagonal_": lambda: ([f(3, 3), 7.0], {}),
    "index_add_": lambda: ([f(3), 0, index(), f(2)], {}),
    "index_copy_": lambda: ([f(3), 0, index(), f(2) + 1], {}),
    "index_fill_": lambda: ([f(3), 0, index(), 7.0], {}),
    "index_fill_.int_Tensor": lambda: ([f(3), 0, index(), torch.tensor(7.0)], {}),
    "index_put_": lambda: ([f(3), (index(),), torch.tensor(7.0)], {}),
    "_index_put_impl_": lambda: ([f(3), [index()], torch.tensor(7.0)], {}),
    "index_reduce_": lambda: ([f(3), 0, index(), f(2) + 3, "prod"], {}),
    "masked_fill_": lambda: ([f(3), b(3), 7.0], {}),
    "masked_fill_.Tensor": lambda: ([f(3), b(3), torch.tensor(7.0)], {}),
    "masked_scatter_": lambda: ([f(3), b(3), f(3) + 7], {}),
    "put_": lambda: ([f(3), index(), f(2) + 7], {}),
    "scatter_": lambda: ([f(3), 0, index(), f(2) + 7], {}),
    "scatter_.value": lambda: ([f(3), 0, index(), 7.0], {}),
    "scatter_.reduce": lambda: ([f(3), 0, index(), f(2) + 7], {"reduce": "add"}),
    "scatter_.value_reduce": lambda: ([f(3), 0, index(), 7.0], {"reduce": "add"}),
    "scatter_add_": lambda: ([f(3), 0, index(), f(2) + 7], {}),
    "scatter_reduce_": lambda: ([f(3), 0, index(), f(2) + 7, "sum"], {}),
    "renorm_": lambda: ([f(3, 3) + 5, 2, 0, 0.5], {}),
    "polygamma_": lambda: ([f(3) + 3, 2], {}),
    "mvlgamma_": lambda: ([f(3) + 9, 2], {}),
    "ldexp_": lambda: ([f(3), torch.tensor([1, 2, 3])], {}),
    "lerp_": lambda: ([f(3), f(3) + 1, 0.5], {}),
    "lerp_.Tensor": lambda: ([f(3), f(3) + 1, f(3)], {}),
    "clamp_": lambda: ([f(3), 0.0, 0.1], {}),
    "clip_": lambda: ([f(3), 0.0, 0.1], {}),
    "clamp_.Tensor": lambda: ([f(3), f(3) + 1, f(3) + 2], {}),
    "clip_.Tensor": lambda: ([f(3), f(3) + 1, f(3) + 2], {}),
    "conj_physical_": lambda: ([z(3)], {}),
    "nan_to_num_": lambda: ([torch.tensor([float("nan")])], {}),
    "div_.Scalar_mode": lambda: ([f(3), 2], {"rounding_mode": "floor"}),
    "div_.Tensor_mode": lambda: ([f(3), f(3) + 2], {"rounding_mode": "floor"}),
    "divide_.Scalar_mode": lambda: ([f(3), 2], {"rounding_mode": "floor"}),
    "divide_.Tensor_mode": lambda: ([f(3), f(3) + 2], {"rounding_mode": "floor"}),
    "random_": lambda: ([f(30)], {}),
    "random_.to": lambda: ([f(30), 100], {}),
    "random_.from": lambda: ([f(30), 3, 100], {}),
    "geometric_": lambda: ([f(30), 0.3], {}),
    "bernoulli_.Tensor": lambda: ([f(30), f(30).abs()], {}),
    "uniform_": lambda: ([f(30), 2.0, 3.0], {}),
    "log_normal_": lambda: ([f(30), 1.0, 2.0], {}),
    "alpha_dropout_": lambda: ([f(30), 0.5, True], {}),
    "dropout_": lambda: ([f(30), 0.5, True], {}),
    "feature_alpha_dropout_": lambda: ([f(30, 30, 2), 0.5, True], {}),
    "feature_dropout_": lambda: ([f(30, 30, 2), 0.5, True], {}),
    "rrelu_": lambda: ([f(30) - 2, 0.1, 0.9, True], {}),
    "rrelu_with_noise_": lambda: ([f(30) - 2, torch.ones(30) * 9, 0.1, 0.9, True], {}),
    "rrelu_with_noise": lambda: ([f(30) - 2, torch.ones(30) * 9, 0.1, 0.9, True], {}),
    "rrelu_with_noise.out": lambda: ([f(30) - 2, torch.ones(30) * 9, 0.1, 0.9, True], {"out": f(30)}),
    "threshold_": lambda: ([f(3), 0.5, 7.0], {}),
    "hardtanh_": lambda: ([f(3), -0.01, 0.01], {}),
    "embedding_renorm_": lambda: ([f(3, 3) + 5, index(), 0.5, 2.0], {}),
    "_add_relu_": lambda: ([f(3), f(3) + 1], {}),
    "copy_": lambda: ([f(3), f(3) + 1], {}),
    "_sobol_engine_initialize_state_": lambda: ([torch.zeros(2, 30, dtype=torch.long), 2], {}),
    "_sobol_engine_scramble_": lambda: (
        [torch.arange(60).reshape(2, 30), torch.tril(torch.ones(2, 30, 30, dtype=torch.long)), 2],
        {},
    ),
    "_sobol_engine_ff_": lambda: (
        [torch.zeros(2, dtype=torch.long), 3, torch.ones(2, 30, dtype=torch.long), 2, 0],
        {},
    ),
    "_amp_foreach_non_finite_check_and_unscale_": lambda: (
        [[torch.tensor([1.0, float("inf")])], torch.zeros(1), torch.tensor([0.5])],
        {},
    ),
    "_amp_foreach_non_finite_check_and_unscale.out": lambda: (
        [[torch.tensor([1.0, float("inf")])], torch.zeros(1), torch.tensor([0.5])],
        {"out": [torch.zeros(2)]},
    ),
    "_amp_update_scale_": lambda: (
        [torch.tensor([8.0]), torch.full((1,), 3, dtype=torch.int32), torch.ones(1), 2.0, 0.5, 9],
        {},
    ),
    "_amp_update_scale.out": lambda: (
        [torch.tensor([8.0]), torch.full((1,), 3, dtype=torch.int32), torch.ones(1), 2.0, 0.5, 9],
        {"out": torch.zeros(1)},
    ),
    "_fused_sgd_": _sgd,
    "_fused_sgd_.tensor_lr": lambda: _sgd(**_lr(0.1)),
    "_fused_sgd.out": lambda: _sgd(out=[f(3)]),
    "_fused_sgd.tensor_lr_out": lambda: _sgd(**_lr(0.1), out=[f(3)]),
    "_fused_adagrad_": _adagrad,
    "_fused_adagrad_.tensor_lr": lambda: _adagrad(**_lr(0.1)),
    "_fused_adagrad.out": lambda: _adagrad(out=[f(3)]),
    "_fused_adagrad.tensor_lr_out": lambda: _adagrad(**_lr(0.1), out=[f(3)]),
    "_fused_adam_": _adam,
    "_fused_adam_.tensor_lr": lambda: _adam(**_lr(0.1)),
    "_fused_adam.out": lambda: _adam(out=[f(3)]),
    "_fused_adam.tensor_lr_out": lambda: _adam(**_lr(0.1), out=[f(3)]),
    "_fused_adamw_": _adam,
    "_fused_adamw_.tensor_lr": lambda: _adam(**_lr(0.1)),
    "_fused_adamw.out": lambda: _adam(out=[f(3)]),
    "_fused_adamw.tensor_lr_out": lambda: _adam(**_lr(0.1), out=[f(3)]),
    "_foreach_addcdiv_": lambda: ([[f(3)], [f(3)], [f(3)], 2.0], {}),
    "_foreach_addcdiv_.Tensor": lambda: ([[f(3)], [f(3)], [f(3)], torch.tensor([2.0])], {}),
    "_foreach_addcdiv_.ScalarList": lambda: ([[f(3)], [f(3)], [f(3)], [2.0]], {}),
    "_foreach_addcmul_": lambda: ([[f(3)], [f(3)], [f(3)], 2.0], {}),
    "_foreach_addcmul_.Tensor": lambda: ([[f(3)], [f(3)], [f(3)], torch.tensor([2.0])], {}),
    "_foreach_addcmul_.ScalarList": lambda: ([[f(3)], [f(3)], [f(3)], [2.0]], {}),
    "_foreach_lerp_": lambda: ([[f(3)], [f(3) + 1], 0.5], {}),
    "_foreach_lerp_.List": lambda: ([[f(3)], [f(3) + 1], [f(3)]], {}),
    "_foreach_lerp_.ScalarList": lambda: ([[f(3)], [f(3) + 1], [0.5]], {}),
    "_foreach_pow_": lambda: ([[f(3)], 3.0], {}),
    "_foreach_clamp_max_": lambda: ([[f(3)], 0.0], {}),
    "_cummax_helper": lambda: ([f(3), torch.zeros(3), i(3) + 9, 0], {}),
    "_cummin_helper": lambda: ([f(3), torch.zeros(3), i(3) + 9, 0], {}),
    "fused_moving_avg_obs_fake_quant": lambda: (_observed(), {}),
    "_fused_moving_avg_obs_fq_helper": lambda: (_observed(), {}),
    "_fused_moving_avg_obs_fq_helper.out": lambda: (_observed(), {"out0": f(30), "out1": b(30)}),
    "batch_norm": lambda: ([*_normalised(), True, 0.1, 1e-5, True], {}),
    "_batch_norm_impl_index": lambda: ([*_normalised(), True, 0.1, 1e-5, True], {}),
    "native_batch_norm": lambda: ([*_normalised(), True, 0.1, 1e-5], {}),
    "native_batch_norm.out": lambda: (
        [*_normalised(), True, 0.1, 1e-5],
        dict(zip(("out", "save_mean", "save_invstd"), _out(*_BATCH), strict=True)),
    ),
    "_native_batch_norm_legit": lambda: ([*_normalised(), True, 0.1, 1e-5], {}),
    "_native_batch_norm_legit.out": lambda: (
        [*_normalised(), True, 0.1, 1e-5],
        dict(zip(("out", "save_mean", "save_invstd"), _out(*_BATCH), strict=True)),
    ),
    "_batch_norm_with_update": lambda: ([*_normalised(), 0.1, 1e-5], {}),
    "_batch_norm_with_update.out": lambda: (
        [*_normalised(), 0.1, 1e-5],
        dict(zip(("out", "save_mean", "save_invstd", "reserve"), _out(*_BATCH, (0,)), strict=True)),
    ),
    "batch_norm_update_stats": lambda: ([f(4, 3), torch.zeros(3), torch.ones(3), 0.1], {}),
    "batch_norm_update_stats.out": lambda: (
        [f(4, 3), torch.zeros(3), torch.ones(3), 0.1],
        dict(zip(("out0", "out1"), _out((3,), (3,)), strict=True)),
    ),
    "instance_norm": lambda: (
        [f(2, 3, 4), torch.ones(3), torch.zeros(3), torch.zeros(3), torch.ones(3), True, 0.1, 1e-5, True],
        {},
    ),
}  # fmt: skip

#: Not run on this machine, or not to be run at all, and why.
NOT_RUN: dict[str, str] = {
    "record_stream": "takes a stream of an accelerator, and writes nothing",
    "retain_grad": "takes down a wish, and writes no memory",
    "retain_grad_": "takes down a wish, and writes no memory",
    "_flash_attention_forward_no_dropout_inplace": "needs CUDA",
    "_fill_mem_eff_dropout_mask_": "needs CUDA",
    "_philox_normal_": "needs CUDA",
    "_philox_uniform_": "needs CUDA",
    "_mkldnn_transpose_": "needs a tensor of oneDNN's own layout",
    "fbgemm_linear_fp16_weight": "needs weights that FBGEMM has packed",
    "fbgemm_linear_fp16_weight_fp32_activation": "needs weights that FBGEMM has packed",
    "batch_norm_gather_stats": "needs CUDA",
    "batch_norm_gather_stats_with_counts": "needs CUDA",
    "cudnn_batch_norm": "needs CUDA with cuDNN",
    "miopen_batch_norm": "needs ROCm",
    "__idiv__": "Python 2's division, whose operator is gone",
    "resize_as_sparse_": "needs a sparse tensor: it has no memory of its own",
    "sparse_resize_": "needs a sparse tensor: it has no memory of its own",
    "sparse_resize_and_clear_": "needs a sparse tensor: it has no memory of its own",
    "_coalesced_": "needs a sparse tensor: it has no memory of its own",
    "copy_sparse_to_sparse_": "needs a sparse tensor: it has no memory of its own",
    "sspaddmm_": "needs a sparse tensor: it has no memory of its own",
    "hspmm_": "needs a sparse tensor: it has no memory of its own",
}

#: What torch's sources say of those that this machine cannot run: they write through a raw pointer.
BY_SOURCE: dict[str, dict[str, str]] = {
    "_fill_mem_eff_dropout_mask_": {"self": STAYS},
    "cudnn_batch_norm": {"running_mean": STAYS, "running_var": STAYS},
    "miopen_batch_norm": {"running_mean": STAYS, "running_var": STAYS},
    "batch_norm_gather_stats": {"running_mean": STAYS, "running_var": STAYS},
    "batch_norm_gather_stats_with_counts": {"running_mean": STAYS, "running_var": STAYS},
}


def general_calls(name: str) -> Iterator[Call]:
    """Calls to try in turn: floats, then other types, with none, one or two more arguments."""
    for make in (f, i, b, z):
        if name.startswith("_foreach_"):
            first, other = [make(3)], [make(3).flip(0)]
            extras: list[tuple[Any, ...]] = [(), (2,), (other,), ([2],), (torch.tensor(2.0),), (other, [make(3)])]
        else:
            first, other = make(3), make(3).flip(0)  # type: ignore[assignment]
            extras = [(), (other,), (2,), (0,), (other, make(3)), (2, 3), (0, 1), (make(),)]
        for extra in extras:
            yield _fresh([first, *extra]), {}
    for extra in [(), (1, 0)]:
        yield [f(3, 3), *extra], {}


def calls_by_schema(schema: Any) -> Iterator[Call]:
    """Calls with an argument of the right type for each of the schema's."""
    for make, shape in itertools.product((f, i, b), ((3,), (3, 3))):
        args, kwargs = [], {}
        for argument in schema.arguments:
            if argument.has_default_value() and not _is_out(argument):
                continue
            value = _sample(str(argument.type), make, shape)
            if argument.kwarg_only:
                kwargs[argument.name] = value
            else:
                args.append(value)
        yield args, kwargs


def _sample(kind: str, make: Callable[..., torch.Tensor], shape: tuple[int, ...]) -> Any:
    kind = kind.removeprefix("Optional[").removesuffix("]") if kind.startswith("Optional[") else kind
    samples: dict[str, Callable[[], Any]] = {
        "Tensor": lambda: make(*shape),
        "List[Tensor]": lambda: [make(*shape)],
        "number": lambda: 2,
        "int": lambda: 0,
        "float": lambda: 0.5,
        "bool": lambda: True,
        "List[number]": lambda: [2],
        "List[int]": lambda: [3],
        "str": lambda: "sum",
    }
    return samples.get(kind, lambda: None)()


def _fresh(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return type(value)(map(_fresh, value)) if isinstance(value, (list, tuple)) else value


# ---- what is run ---------------------------------------------------------------------------------------------------


def _is_out(argument: Any) -> bool:
    """An ``out=``: written, and passed by keyword only."""
    return bool(argument.kwarg_only) and argument.alias_info is not None and argument.alias_info.is_write


def _is_written(argument: Any) -> bool:
    info = argument.alias_info
    return info is not None and info.is_write and not _is_out(argument) and "Tensor" in str(argument.type)


def _takes_statistics(schema: Any) -> bool:
    name = schema.name.partition("::")[2]
    return not name.endswith(("_backward", "_functional", "_no_training", "_no_update")) and any(
        argument.name == "running_mean" for argument in schema.arguments
    )


#: TorchScript's own, on lists and dictionaries.
_OF_CONTAINERS = frozenset(["setdefault", "pop", "Delete", "clear", "_set_item", "update", "popitem", "remove", "sort"])


def operators() -> dict[str, tuple[Any, Any]]:
    """Overloads of ``aten`` operators that can write: name, then the function and its schema."""
    found = {}
    for schema in torch._C._jit_get_all_schemas():
        space, _, name = schema.name.partition("::")
        if space != "aten" or name in _OF_CONTAINERS:
            continue
        if any(map(_is_written, schema.arguments)) or _takes_statistics(schema):
            packet = getattr(torch.ops.aten, name, None)
            overload = getattr(packet, schema.overload_name or "default", None)
            key = f"{name}.{schema.overload_name}" if schema.overload_name else name
            found[key] = (overload, schema)
    return dict(sorted(found.items()))


_OPERATORS = [
    "add", "sub", "mul", "matmul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift",
]  # fmt: skip
IN_PLACE_OPERATORS = {f"__i{name}__" for name in _OPERATORS} | {"__setitem__"}

SPACES: dict[str, Any] = {
    "Tensor": torch.Tensor,
    "torch": torch,
    "_nn": torch._C._nn,
    "_VF": torch._C._VariableFunctions,
}


def works_in_place(name: str) -> bool:
    """Whether the name says so."""
    return name in IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))


def callables() -> dict[str, Callable[..., Any]]:
    """Python's names for what works in place, and those that torch.overrides knows beside."""
    found = {}
    for space, namespace in SPACES.items():
        for name in dir(namespace):
            function = getattr(namespace, name, None)
            if works_in_place(name) and callable(function):
                found[f"{space}.{name}"] = function
    known = {key.partition(".")[2] for key in found}
    for owner, functions in torch.overrides.get_overridable_functions().items():
        for function in functions:
            name = getattr(function, "__name__", "")
            if works_in_place(name) and name not in known:
                found[f"{getattr(owner, '__name__', owner)}.{name}"] = function
    return dict(sorted(found.items()))


#: These change what a tensor is, or where its memory lies, and write none.
METADATA = {
    "as_strided_", "detach_", "rename_", "requires_grad_", "resize_", "resize_as_", "_resize_output_", "set_",
    "set_data", "share_memory_", "squeeze_", "swapaxes_", "swapdims_", "t_", "transpose_", "unsqueeze_",
}  # fmt: skip


# ---- one measurement -----------------------------------------------------------------------------------------------


def _leaves(label: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield label, value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(label, item)


def measure(call: Callable[[], Any], tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """For each labelled tensor that the call writes to: does its version move, or does it stay?"""
    before = [(label, tensor, tensor._version, _bits(tensor)) for label, tensor in tensors]
    torch.manual_seed(0)
    call()
    found: dict[str, str] = {}
    for label, tensor, version, bits in before:
        if tensor._version != version:
            found[label] = MOVES if found.get(label, MOVES) == MOVES else "some move"
        elif _bits(tensor) != bits:
            found[label] = STAYS if found.get(label, STAYS) == STAYS else "some move"
    return found


def _bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist())


def _label_of(schema: Any, position: int) -> str:
    if schema is not None and position < len(schema.arguments):
        return str(schema.arguments[position].name)
    return "self" if position == 0 else str(position)


def try_calls(
    function: Callable[..., Any], calls: Iterable[Call], label: Callable[[int], str], marked: set[str]
) -> dict[str, str] | str:
    """What the first call does that writes to all that the schema marks; else what the best does; else the reason."""
    best: dict[str, str] = {}
    reason = "no call writes anything but what it returns"
    for args, kwargs in calls:
        tensors = [pair for position, value in enumerate(args) for pair in _leaves(label(position), value)]
        tensors += [pair for name, value in kwargs.items() for pair in _leaves(name, value)]

        def call(args: list[Any] = args, kwargs: dict[str, Any] = kwargs) -> None:
            with torch.no_grad():
                function(*args, **kwargs)

        try:
            found = measure(call, tensors)
        except (RuntimeError, TypeError, NotImplementedError, IndexError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0][:160] or type(error).__name__
            continue
        found = {name: what for name, what in found.items() if not _names_an_out(name, marked, kwargs)}
        if len(found) > len(best):
            best = found
        if found.keys() >= marked and found:
            return found
    return best or reason


def _names_an_out(name: str, marked: set[str], kwargs: dict[str, Any]) -> bool:
    return name in kwargs and name not in marked and name.startswith(("out", "save_", "reserve"))


def probe_operators() -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """What each overload does to the version of each argument that it writes; and what could not be run, and why."""
    found: dict[str, dict[str, str]] = {}
    not_run: dict[str, str] = {}
    for key, (function, schema) in operators().items():
        name = key.partition(".")[0]
        if name in METADATA:
            not_run[key] = "writes no memory"
            continue
        reason = NOT_RUN.get(key) or NOT_RUN.get(name)
        if reason is None and function is None:
            reason = "torch.ops does not have it: TorchScript's own"
        if reason is not None:
            not_run[key] = reason
            continue
        special = SPECIAL.get(key) or (SPECIAL.get(name) if not key.endswith("out") else None)
        calls = itertools.chain(
            [special()] if special else [],
            [SPECIAL[name]()] if name in SPECIAL and special is not SPECIAL[name] and not key.endswith("out") else [],
            () if key in SPECIAL else calls_by_schema(schema),
            () if key in SPECIAL else general_calls(name),
        )
        marked = {str(argument.name) for argument in schema.arguments if _is_written(argument)}
        result = try_calls(function, calls, partial(_label_of, schema), marked)
        if isinstance(result, str):
            not_run[key] = result
        else:
            found[key] = result
    return found, not_run


def probe_callables() -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The same for Python's names, argument by argument as the operator's schema calls them."""
    found: dict[str, dict[str, str]] = {}
    not_run: dict[str, str] = {}
    for key, function in callables().items():
        name = key.partition(".")[2]
        if name in METADATA:
            not_run[key] = "writes no memory"
        elif name in NOT_RUN:
            not_run[key] = NOT_RUN[name]
        elif inspect.isfunction(function) and not key.startswith("Tensor."):
            not_run[key] = "a Python function: it calls operators that are here"
        else:
            schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
            schema = max(schemas, key=lambda one: len(one.arguments), default=None)
            marked = {str(argument.name) for one in schemas for argument in one.arguments if _is_written(argument)}
            calls = [SPECIAL[name]()] if name in SPECIAL else general_calls(name)
            result = try_calls(function, calls, partial(_label_of, schema), marked or {"self"})
            if isinstance(result, str):
                not_run[key] = result
            else:
                found[key] = result
    return found, not_run


# ---- programs ------------------------------------------------------------------------------------------------------

#: What runs, and the tensors that it may write to.
Prepared = tuple[Callable[[], Any], dict[str, Any]]


def _optimiser_programs() -> Iterator[tuple[str, Callable[[], Prepared]]]:
    special: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}, "Muon": {}}
    for name in sorted(dir(torch.optim)):
        kind = getattr(torch.optim, name)
        if not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)) or kind is torch.optim.Optimizer:
            continue
        parameters = inspect.signature(kind).parameters
        for way in ("plain", "foreach", "fused"):
            if way != "plain" and way not in parameters:
                continue
            options = dict(special.get(name, {}))
            options |= {key: key == way for key in ("foreach", "fused") if key in parameters}
            yield f"optim.{name} {way}", partial(_step, kind, options)


def _step(kind: Any, options: dict[str, Any]) -> Prepared:
    parameter = torch.nn.Parameter(f(3, 3))
    parameter.grad = f(3, 3) + 2
    if kind.__name__ == "SparseAdam":
        parameter.grad = parameter.grad.to_sparse()
    optimiser = kind([parameter], **options)

    def step() -> Any:
        return optimiser.step(lambda: parameter.detach().sum()) if kind.__name__ == "LBFGS" else optimiser.step()

    step()  # makes the state
    state = {name: value for name, value in optimiser.state[parameter].items() if isinstance(value, torch.Tensor)}
    return step, {"param": parameter, **({} if parameter.grad.is_sparse else {"grad": parameter.grad}), **state}


def _init_programs() -> Iterator[tuple[str, Callable[[], Prepared]]]:
    extra: dict[str, tuple[Any, ...]] = {"constant_": (7.0,), "sparse_": (0.5,)}
    for name in sorted(dir(torch.nn.init)):
        function = getattr(torch.nn.init, name)
        if name.endswith("_") and not name.startswith("_") and inspect.isfunction(function):
            shape = (3, 3, 3) if name == "dirac_" else (3, 3)

            def prepare(function: Any = function, name: str = name, shape: tuple[int, ...] = shape) -> Prepared:
                tensor = f(*shape)
                return lambda: function(tensor, *extra.get(name, ())), {"tensor": tensor}

            yield f"init.{name}", prepare


def _module(make: Callable[[], torch.nn.Module], *inputs: torch.Tensor, train: bool = True) -> Prepared:
    module = make().train(train)
    module(*inputs)  # what is lazy is there afterwards
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return lambda: module(*(tensor * 3 + 1 if tensor.is_floating_point() else tensor for tensor in inputs)), state


def _module_programs() -> Iterator[tuple[str, Callable[[], Prepared]]]:
    nn = torch.nn
    images = {1: (4, 3, 5), 2: (4, 3, 5, 5), 3: (4, 3, 5, 5, 5)}
    for n in (1, 2, 3):
        for kind in (f"BatchNorm{n}d", f"LazyBatchNorm{n}d", f"InstanceNorm{n}d"):
            sizes = () if kind.startswith("Lazy") else (3,)
            options = {"track_running_stats": True}
            for train in (True, False):
                make = partial(getattr(nn, kind), *sizes, **options)
                yield f"nn.{kind} {'train' if train else 'eval'}", partial(_module, make, f(*images[n]), train=train)
    yield "nn.BatchNorm1d momentum=None", lambda: _module(lambda: nn.BatchNorm1d(3, momentum=None), f(4, 3))
    yield "nn.BatchNorm1d momentum=0", lambda: _module(lambda: nn.BatchNorm1d(3, momentum=0.0), f(4, 3))
    yield "nn.SyncBatchNorm of one process", lambda: _module(lambda: nn.SyncBatchNorm(3), f(4, 3))
    yield "nn.Embedding max_norm", lambda: _module(lambda: _large(nn.Embedding(3, 3, max_norm=0.1)), index())
    yield (
        "nn.EmbeddingBag max_norm",
        lambda: _module(lambda: _large(nn.EmbeddingBag(3, 3, max_norm=0.1)), index(), torch.tensor([0])),
    )
    yield "utils.spectral_norm", lambda: _module(lambda: nn.utils.spectral_norm(nn.Linear(3, 3)), f(4, 3))
    yield (
        "parametrizations.spectral_norm",
        lambda: _module(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), f(4, 3)),
    )
    for observer in ("MinMaxObserver", "MovingAverageMinMaxObserver", "PerChannelMinMaxObserver", "HistogramObserver"):
        yield f"ao.{observer}", partial(_module, getattr(torch.ao.quantization, observer), f(4, 3))
    for fake in ("FakeQuantize", "FusedMovingAvgObsFakeQuantize"):
        yield f"ao.{fake}", partial(_module, getattr(torch.ao.quantization, fake), f(4, 3))


def _large(module: Any) -> Any:
    """With weights that are renormalised when they are looked up."""
    module.weight.data.add_(5)
    return module


def _utility_programs() -> Iterator[tuple[str, Callable[[], Prepared]]]:
    def with_grad() -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(f(3))
        parameter.grad = f(3) + 5
        return parameter

    def scaler(method: str) -> Prepared:
        parameter = with_grad()
        scaler = torch.amp.GradScaler("cpu")
        optimiser = torch.optim.SGD([parameter], lr=0.1)
        scaler.scale(torch.ones(()))
        if method == "unscale_":
            return lambda: scaler.unscale_(optimiser), {"param": parameter, "grad": parameter.grad}
        scaler.unscale_(optimiser)
        scaler.step(optimiser)
        state = {"scale": scaler._scale, "growth_tracker": scaler._growth_tracker}
        return scaler.update, state

    def clip(function: Any, *args: Any) -> Prepared:
        parameter = with_grad()
        return lambda: function([parameter], *args), {"grad": parameter.grad}

    def averaged() -> Prepared:
        model = torch.nn.Linear(3, 3)
        average = torch.optim.swa_utils.AveragedModel(model)
        average.update_parameters(model)
        with torch.no_grad():
            model.weight.add_(1)
        return lambda: average.update_parameters(model), dict(average.named_parameters())

    yield "GradScaler.unscale_", lambda: scaler("unscale_")
    yield "GradScaler.update", lambda: scaler("update")
    yield "utils.clip_grad_norm_", lambda: clip(torch.nn.utils.clip_grad_norm_, 0.1)
    yield "utils.clip_grad_value_", lambda: clip(torch.nn.utils.clip_grad_value_, 0.1)
    yield "AveragedModel.update_parameters", averaged


def _collectives() -> Iterator[tuple[str, Callable[[], Prepared]]]:
    dist: Any = torch.distributed
    written: dict[str, Callable[[torch.Tensor], Any]] = {
        "all_reduce": dist.all_reduce,
        "broadcast": lambda x: dist.broadcast(x, 0),
        "reduce": lambda x: dist.reduce(x, 0),
        "all_gather": lambda x: dist.all_gather([x], f(3) + 1),
        "all_gather_into_tensor": lambda x: dist.all_gather_into_tensor(x, f(3) + 1),
        "gather": lambda x: dist.gather(f(3) + 1, [x], 0),
        "scatter": lambda x: dist.scatter(x, [f(3) + 1], 0),
        "reduce_scatter": lambda x: dist.reduce_scatter(x, [f(3) + 1]),
        "reduce_scatter_tensor": lambda x: dist.reduce_scatter_tensor(x, f(3) + 1),
        "all_to_all": lambda x: dist.all_to_all([x], [f(3) + 1]),
        "all_to_all_single": lambda x: dist.all_to_all_single(x, f(3) + 1),
        "all_reduce_coalesced": lambda x: dist.all_reduce_coalesced([x]),
        "all_gather_coalesced": lambda x: dist.all_gather_coalesced([[x]], [f(3) + 1]),
    }
    for name, call in written.items():
        if not hasattr(dist, name):
            continue

        def prepare(call: Callable[[torch.Tensor], Any] = call) -> Prepared:
            tensor = f(3)
            return lambda: call(tensor), {"tensor": tensor}

        yield f"distributed.{name}", prepare


def probe_programs() -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The same for whole programs, by the name of the tensor that they write to."""
    found: dict[str, dict[str, str]] = {}
    not_run: dict[str, str] = {}

    def run(programs: Iterable[tuple[str, Callable[[], Prepared]]]) -> None:
        for name, prepare in programs:
            torch.manual_seed(0)
            try:
                call, tensors = prepare()
                pairs = [pair for label, value in tensors.items() for pair in _leaves(label, value)]
                found[name] = measure(call, pairs)
            except (RuntimeError, TypeError, NotImplementedError, ValueError, AttributeError, AssertionError) as error:
                not_run[name] = str(error).strip().partition("\n")[0][:160] or type(error).__name__

    run(_optimiser_programs())
    run(_init_programs())
    run(_module_programs())
    run(_utility_programs())
    if not torch.distributed.is_available():
        not_run["distributed"] = "this build of torch has no torch.distributed"
    elif torch.distributed.is_initialized():
        not_run["distributed"] = "a process group is there already"
    else:
        distributed: Any = torch.distributed
        try:
            store = distributed.HashStore()
            distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        except (RuntimeError, ValueError) as error:
            not_run["distributed"] = str(error).strip().partition("\n")[0][:160]
        else:
            try:
                run(_collectives())
            finally:
                torch.distributed.destroy_process_group()
    return found, not_run


# ---- the record and the table --------------------------------------------------------------------------------------


def probe() -> dict[str, Any]:
    """Everything that was measured, sorted, as it is written to the record."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = {
            "operators": probe_operators(),
            "callables": probe_callables(),
            "programs": probe_programs(),
        }
    record: dict[str, Any] = {"torch": torch.__version__.partition("+")[0]}
    for name, (found, not_run) in parts.items():
        record[name] = {key: dict(sorted(value.items())) for key, value in sorted(found.items())}
        record[f"{name} not run"] = dict(sorted(not_run.items()))
    record["by torch's sources"] = BY_SOURCE
    return record


def uncounted(record: dict[str, Any]) -> dict[str, list[str]]:
    """For each operator the arguments that it writes to and whose counter stays."""
    seen: dict[str, dict[str, set[str]]] = {}
    names = [(key.partition(".")[0], value) for key, value in record["operators"].items()]
    names += [(key.partition(".")[2], value) for key, value in record["callables"].items()]
    for name, arguments in [*names, *record["by torch's sources"].items()]:
        for argument, what in arguments.items():
            seen.setdefault(name, {}).setdefault(argument, set()).add(what)
    found = {}
    for name, arguments in sorted(seen.items()):
        staying = {argument for argument, what in arguments.items() if what != {MOVES}}
        if staying and len(staying) == len(arguments):
            staying |= _marked(name)  # it works behind autograd's back altogether
        if staying:
            found[name] = sorted(staying)
    return found


def _marked(name: str) -> set[str]:
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
    return {str(argument.name) for one in schemas for argument in one.arguments if _is_written(argument)}


def unmarked(record: dict[str, Any]) -> dict[str, list[tuple[int, str]]]:
    """For each operator the arguments, with their position, that it writes unseen and that no schema marks."""
    found = {}
    for name, arguments in uncounted(record).items():
        schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
        places = {
            (position, str(argument.name))
            for schema in schemas
            for position, argument in enumerate(schema.arguments)
            if argument.name in arguments
        }
        if places and not any(_is_written(argument) for schema in schemas for argument in schema.arguments):
            found[name] = sorted(places)
    return found


def table_of(record: dict[str, Any]) -> str:
    """The module that the package reads."""
    lines = [
        '"""Which operators of torch write to which of their arguments without moving the version counter?',
        "",
        "Generated: ``make probe`` runs every operator that can write and puts down here what it saw.",
        '"""',
        "",
        "#: The version that was probed.",
        f'TORCH = "{record["torch"]}"',
        "",
        "#: Arguments that are written to and whose version counter stays where it was.",
        "UNCOUNTED: dict[str, tuple[str, ...]] = {",
        *(f'    "{name}": ({_quoted(arguments)},),' if len(arguments) == 1 else f'    "{name}": ({_quoted(arguments)}),'
          for name, arguments in uncounted(record).items()),
        "}",
        "",
        "#: Of these the operators whose schema does not say that they write: position and name of what they write to.",
        "UNMARKED: dict[str, tuple[tuple[int, str], ...]] = {",
        *(f'    "{name}": ({", ".join(f"({p}, {chr(34)}{a}{chr(34)})" for p, a in places)}),'
          for name, places in unmarked(record).items()),
        "}",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def differences(known: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What one record says and the other does not, in words."""
    told = []
    for part in sorted(known.keys() | now.keys()):
        before, after = known.get(part), now.get(part)
        if not (isinstance(before, dict) and isinstance(after, dict)):
            if before != after:
                told.append(f"{part}: {before} is now {after}")
            continue
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                was, is_now = before.get(key, "nothing"), after.get(key, "nothing")
                told += [f"{part}: {key}: {was} is now {is_now}"]
    return told


def main(arguments: list[str] | None = None) -> int:
    """Probe, and write what was found or compare it with what is there."""
    parser = argparse.ArgumentParser(description="Which writes of PyTorch move no version counter?")
    parser.add_argument("--check", action="store_true", help="compare with what is checked in, write nothing")
    check = parser.parse_args(arguments).check
    record = probe()
    text = json.dumps(record, indent=1) + "\n"
    moved = sum(
        set(value.values()) == {MOVES} for part in ("operators", "callables") for value in record[part].values()
    )
    total = sum(len(record[part]) for part in ("operators", "callables"))
    print(f"torch {record['torch']}: {total} writers run, {moved} move every counter, {total - moved} do not;")
    not_run = sum(len(record[f"{part} not run"]) for part in ("operators", "callables"))
    print(f"{not_run} could not be run or write no memory")
    if check:
        told = differences(json.loads(RECORD.read_text(encoding="utf-8")), record)
        print("\n".join(told) or "as it is checked in")
        return 1 if told or TABLE.read_text(encoding="utf-8") != table_of(record) else 0
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(text, encoding="utf-8")
    TABLE.write_text(table_of(record), encoding="utf-8")
    print(f"written: {TABLE.relative_to(ROOT)}, {RECORD.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
