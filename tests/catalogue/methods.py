"""Calls that write in place through ``x.data``: every method, operator, index, function, initialiser and foreach call.

Each entry of a table is one write, on one line: that line is what the report must name. From each come a corrupting program
and its innocent twins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from harness import VALUES, Run, add, program
from torch import nn
from torch.nn import init

Write = Callable[[torch.Tensor], Any]


def _ones(*sizes: int) -> torch.Tensor:
    return torch.ones(sizes)


# ---- what is written to: saved for the gradient of `w` ------------------------------------------------------------


def _float_save(dtype: torch.dtype = torch.float32) -> Callable[[Run], tuple[torch.Tensor, ...]]:
    def save(run: Run) -> tuple[torch.Tensor, ...]:
        a, w = run.leaf(dtype=dtype), torch.full((3, 4), 2.0, dtype=dtype, requires_grad=True)
        h = a * 1.0
        out = h * w  # saved
        return h, out, w

    return save


def _index_save(run: Run) -> tuple[torch.Tensor, ...]:
    x = run.leaf()
    index = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1]])
    out = x.gather(0, index) * torch.arange(8.0).view(2, 4)  # saved
    return index, out, x


def _mask_save(run: Run) -> tuple[torch.Tensor, ...]:
    x = run.leaf()
    mask = torch.tensor(VALUES) > 0
    out = torch.where(mask, x, 0.0)  # saved
    return mask, out, x


def _pairs(
    prefix: str, route: str, table: dict[str, Write], save: Any, other_part: bool = False, **declared: Any
) -> None:
    """A corrupting program and its innocent twins for each write of the table."""
    for name, write in table.items():
        full = f"{prefix}_{name}"

        def corrupting(run: Run, write: Write = write) -> Any:
            h, out, w = save(run)
            c = h.data
            run.write(write, c)
            out.sum().backward()
            return [w.grad]

        def after_backward(run: Run, write: Write = write) -> Any:
            h, out, w = save(run)
            c = h.data
            out.sum().backward()
            run.write(write, c)
            return [w.grad]

        def on_a_clone(run: Run, write: Write = write) -> Any:
            h, out, w = save(run)
            c = h.data.clone()
            run.write(write, c)
            out.sum().backward()
            return [w.grad]

        def on_another_part(run: Run, write: Write = write) -> Any:
            both = torch.tensor([VALUES, VALUES])
            w = torch.full((3, 4), 2.0, requires_grad=True)
            out = both[0] * w
            c = both.data[1]
            run.write(write, c)
            out.sum().backward()
            return [w.grad]

        add(corrupting, name=full, route=route, kind="corrupting", **declared)
        twins = [after_backward, on_another_part if other_part else on_a_clone]
        for twin in twins:
            add(twin, name=f"{full}_{twin.__name__}", route=route, kind="innocent", twin_of=full)


# ---- methods ------------------------------------------------------------------------------------------------------

FLOAT: dict[str, Write] = {
    "abs_": lambda c: c.abs_(),
    "absolute_": lambda c: c.absolute_(),
    "acos_": lambda c: c.acos_(),
    "acosh_": lambda c: c.acosh_(),
    "add_": lambda c: c.add_(1.5),
    "addbmm_": lambda c: c.addbmm_(_ones(2, 3, 2), _ones(2, 2, 4)),
    "addcdiv_": lambda c: c.addcdiv_(_ones(3, 4), _ones(3, 4)),
    "addcmul_": lambda c: c.addcmul_(_ones(3, 4), _ones(3, 4), value=0.5),
    "addmm_": lambda c: c.addmm_(_ones(3, 2), _ones(2, 4)),
    "addmv_": lambda c: c[1].addmv_(_ones(4, 2), _ones(2)),
    "addr_": lambda c: c.addr_(_ones(3), _ones(4)),
    "apply_": lambda c: c.apply_(lambda v: v + 1),
    "arccos_": lambda c: c.arccos_(),
    "arccosh_": lambda c: c.arccosh_(),
    "arcsin_": lambda c: c.arcsin_(),
    "arcsinh_": lambda c: c.arcsinh_(),
    "arctan2_": lambda c: c.arctan2_(_ones(3, 4)),
    "arctan_": lambda c: c.arctan_(),
    "arctanh_": lambda c: c.arctanh_(),
    "asin_": lambda c: c.asin_(),
    "asinh_": lambda c: c.asinh_(),
    "atan2_": lambda c: c.atan2_(_ones(3, 4)),
    "atan_": lambda c: c.atan_(),
    "atanh_": lambda c: c.atanh_(),
    "baddbmm_": lambda c: c[None].baddbmm_(_ones(1, 3, 2), _ones(1, 2, 4)),
    "ceil_": lambda c: c.ceil_(),
    "clamp_": lambda c: c.clamp_(-1, 1),
    "clamp_max_": lambda c: c.clamp_max_(0.5),
    "clamp_min_": lambda c: c.clamp_min_(0.5),
    "clip_": lambda c: c.clip_(min=-0.01, max=0.01),
    "copy_": lambda c: c.copy_(_ones(3, 4)),
    "copysign_": lambda c: c.copysign_(-1.0),
    "cos_": lambda c: c.cos_(),
    "cosh_": lambda c: c.cosh_(),
    "cumprod_": lambda c: c.cumprod_(0),
    "cumsum_": lambda c: c.cumsum_(1),
    "deg2rad_": lambda c: c.deg2rad_(),
    "digamma_": lambda c: c.digamma_(),
    "div_": lambda c: c.div_(3),
    "divide_": lambda c: c.divide_(3, rounding_mode="floor"),
    "eq_": lambda c: c.eq_(0.3),
    "erf_": lambda c: c.erf_(),
    "erfc_": lambda c: c.erfc_(),
    "erfinv_": lambda c: c.erfinv_(),
    "exp2_": lambda c: c.exp2_(),
    "exp_": lambda c: c.exp_(),
    "expm1_": lambda c: c.expm1_(),
    "fill_": lambda c: c.fill_(7.0),
    "fill_diagonal_": lambda c: c.fill_diagonal_(7.0),
    "fix_": lambda c: c.fix_(),
    "floor_": lambda c: c.floor_(),
    "floor_divide_": lambda c: c.floor_divide_(0.7),
    "fmod_": lambda c: c.fmod_(0.7),
    "frac_": lambda c: c.frac_(),
    "ge_": lambda c: c.ge_(0.5),
    "greater_": lambda c: c.greater_(0.5),
    "greater_equal_": lambda c: c.greater_equal_(0.5),
    "gt_": lambda c: c.gt_(0.5),
    "heaviside_": lambda c: c.heaviside_(torch.tensor(1.0)),
    "hypot_": lambda c: c.hypot_(_ones(3, 4)),
    "i0_": lambda c: c.i0_(),
    "igamma_": lambda c: c.igamma_(_ones(3, 4)),
    "igammac_": lambda c: c.igammac_(_ones(3, 4)),
    "index_add_": lambda c: c.index_add_(0, torch.tensor([1]), _ones(1, 4)),
    "index_copy_": lambda c: c.index_copy_(0, torch.tensor([1, 0]), _ones(2, 4)),
    "index_fill_": lambda c: c.index_fill_(1, torch.tensor([3]), 7.0),
    "index_put_": lambda c: c.index_put_((torch.tensor([0, 2]), torch.tensor([1, 1])), torch.tensor(7.0)),
    "index_reduce_": lambda c: c.index_reduce_(0, torch.tensor([1]), 3 * _ones(1, 4), "prod"),
    "ldexp_": lambda c: c.ldexp_(torch.tensor(2)),
    "le_": lambda c: c.le_(0.5),
    "lerp_": lambda c: c.lerp_(_ones(3, 4), 0.25),
    "less_": lambda c: c.less_(0.5),
    "less_equal_": lambda c: c.less_equal_(0.5),
    "lgamma_": lambda c: c.lgamma_(),
    "log10_": lambda c: c.log10_(),
    "log1p_": lambda c: c.log1p_(),
    "log2_": lambda c: c.log2_(),
    "log_": lambda c: c.log_(),
    "logical_and_": lambda c: c.logical_and_(_ones(3, 4)),
    "logical_not_": lambda c: c.logical_not_(),
    "logical_or_": lambda c: c.logical_or_(_ones(3, 4)),
    "logical_xor_": lambda c: c.logical_xor_(_ones(3, 4)),
    "logit_": lambda c: c.logit_(eps=0.1),
    "lt_": lambda c: c.lt_(0.5),
    "map2_": lambda c: c.map2_(_ones(3, 4), _ones(3, 4), lambda x, y, z: x + y + z),
    "map_": lambda c: c.map_(_ones(3, 4), lambda x, y: x + y),
    "masked_fill_": lambda c: c.masked_fill_(c > 0, 7.0),
    "masked_scatter_": lambda c: c.masked_scatter_(c > 0, 7 * _ones(12)),
    "mul_": lambda c: c.mul_(0.5),
    "multiply_": lambda c: c.multiply_(0.5),
    "mvlgamma_": lambda c: c.mvlgamma_(1),
    "ne_": lambda c: c.ne_(0.5),
    "neg_": lambda c: c.neg_(),
    "negative_": lambda c: c.negative_(),
    "nextafter_": lambda c: c.nextafter_(torch.tensor(100.0)),
    "not_equal_": lambda c: c.not_equal_(0.5),
    "polygamma_": lambda c: c.polygamma_(1),
    "pow_": lambda c: c.pow_(2),
    "put_": lambda c: c.put_(torch.tensor([1, 5]), torch.tensor([7.0, 8.0])),
    "rad2deg_": lambda c: c.rad2deg_(),
    "reciprocal_": lambda c: c.reciprocal_(),
    "relu_": lambda c: c.relu_(),
    "remainder_": lambda c: c.remainder_(0.7),
    "renorm_": lambda c: c.renorm_(2, 0, 1.0),
    "round_": lambda c: c.round_(),
    "rsqrt_": lambda c: c.rsqrt_(),
    "scatter_": lambda c: c.scatter_(0, torch.tensor([[0, 1, 2, 0]]), 7.0),
    "scatter_add_": lambda c: c.scatter_add_(0, torch.tensor([[0, 1, 2, 0]]), _ones(1, 4)),
    "scatter_reduce_": lambda c: c.scatter_reduce_(0, torch.tensor([[0, 1, 2, 0]]), _ones(1, 4), "sum"),
    "sgn_": lambda c: c.sgn_(),
    "sigmoid_": lambda c: c.sigmoid_(),
    "sign_": lambda c: c.sign_(),
    "sin_": lambda c: c.sin_(),
    "sinc_": lambda c: c.sinc_(),
    "sinh_": lambda c: c.sinh_(),
    "sqrt_": lambda c: c.sqrt_(),
    "square_": lambda c: c.square_(),
    "sub_": lambda c: c.sub_(1.5, alpha=2),
    "subtract_": lambda c: c.subtract_(1.5),
    "tan_": lambda c: c.tan_(),
    "tanh_": lambda c: c.tanh_(),
    "tril_": lambda c: c.tril_(),
    "triu_": lambda c: c.triu_(),
    "true_divide_": lambda c: c.true_divide_(3),
    "trunc_": lambda c: c.trunc_(),
    "xlogy_": lambda c: c.xlogy_(2.0),
    "zero_": lambda c: c.zero_(),
}

RANDOM: dict[str, Write] = {
    "bernoulli_": lambda c: c.bernoulli_(0.5),
    "cauchy_": lambda c: c.cauchy_(),
    "exponential_": lambda c: c.exponential_(),
    "geometric_": lambda c: c.geometric_(0.5),
    "log_normal_": lambda c: c.log_normal_(),
    "normal_": lambda c: c.normal_(0, 1),
    "random_": lambda c: c.random_(0, 9),
    "uniform_": lambda c: c.uniform_(-1, 1),
}

DOUBLE: dict[str, Write] = {
    "float_power_": lambda c: c.float_power_(2),
    "double_mul_": lambda c: c.mul_(0.5),
}

INTEGER: dict[str, Write] = {
    "bitwise_and_": lambda c: c.bitwise_and_(0),
    "bitwise_left_shift_": lambda c: c.bitwise_left_shift_(1),
    "bitwise_not_": lambda c: c.bitwise_not_().bitwise_and_(3).bitwise_and_(1),
    "bitwise_or_": lambda c: c.bitwise_or_(1),
    "bitwise_right_shift_": lambda c: c.bitwise_right_shift_(1),
    "bitwise_xor_": lambda c: c.bitwise_xor_(1),
    "gcd_": lambda c: c.gcd_(torch.tensor(2)),
    "lcm_": lambda c: c.lcm_(torch.tensor(2)),
    "integer_zero_": lambda c: c.zero_(),
    "integer_add_": lambda c: c.add_(1),
}

BOOLEAN: dict[str, Write] = {
    "mask_logical_not_": lambda c: c.logical_not_(),
    "mask_fill_": lambda c: c.fill_(True),
    "mask_bitwise_xor_": lambda c: c.bitwise_xor_(torch.tensor(True)),
    "mask_zero_": lambda c: c.zero_(),
}

_pairs("method", "in-place method", FLOAT, _float_save(), other_part=True)
_pairs("method", "in-place method", RANDOM, _float_save(), other_part=True, exact=False)
_pairs("method", "in-place method", DOUBLE, _float_save(torch.float64))
_pairs("method", "in-place method", INTEGER, _index_save)
_pairs("method", "in-place method", BOOLEAN, _mask_save)

#: In-place methods that change what the alias is and not what is in its memory.
METADATA: dict[str, Write] = {
    "as_strided_": lambda c: c.as_strided_((2, 2), (1, 2)),
    "detach_": lambda c: c.detach_(),
    "requires_grad_": lambda c: c.requires_grad_(),
    "resize_": lambda c: c.resize_(2, 2),
    "resize_as_": lambda c: c.resize_as_(_ones(2)),
    "set_": lambda c: c.set_(_ones(2)),
    "squeeze_": lambda c: c.squeeze_(),
    "swapaxes_": lambda c: c.swapaxes_(0, 1),
    "swapdims_": lambda c: c.swapdims_(0, 1),
    "t_": lambda c: c.t_(),
    "transpose_": lambda c: c.transpose_(0, 1),
    "unsqueeze_": lambda c: c.unsqueeze_(0),
    "share_memory_": lambda c: c.share_memory_(),
}

#: Writes that leave every byte of the save as it is, and the writing program of which each is the twin.
NO_EFFECT: dict[str, tuple[str, Write]] = {
    "add_of_zero": ("add_", lambda c: c.add_(0)),
    "mul_by_one": ("mul_", lambda c: c.mul_(1)),
    "div_by_one": ("div_", lambda c: c.div_(1)),
    "pow_of_one": ("pow_", lambda c: c.pow_(1)),
    "clamp_that_clips_nothing": ("clamp_", lambda c: c.clamp_(-100, 100)),
    "clip_that_clips_nothing": ("clip_", lambda c: c.clip_(-100, 100)),
    "clamp_min_below_all": ("clamp_min_", lambda c: c.clamp_min_(-100)),
    "copy_of_equal_values": ("copy_", lambda c: c.copy_(torch.tensor(VALUES))),
    "copy_of_itself": ("copy_", lambda c: c.copy_(c)),
    "fill_of_an_empty_slice": ("fill_", lambda c: c[1:1].fill_(7.0)),
    "zero_of_an_empty_slice": ("zero_", lambda c: c[:, :0].zero_()),
    "masked_fill_with_an_empty_mask": ("masked_fill_", lambda c: c.masked_fill_(c > 100, 7.0)),
    "masked_scatter_with_an_empty_mask": ("masked_scatter_", lambda c: c.masked_scatter_(c > 100, _ones(12))),
    "index_fill_of_no_index": ("index_fill_", lambda c: c.index_fill_(0, torch.tensor([], dtype=torch.long), 7.0)),
    "index_add_of_zeros": ("index_add_", lambda c: c.index_add_(0, torch.tensor([1]), torch.zeros(1, 4))),
    "scatter_add_of_zeros": ("scatter_add_", lambda c: c.scatter_add_(0, torch.tensor([[0, 1]]), torch.zeros(1, 2))),
    "lerp_by_zero": ("lerp_", lambda c: c.lerp_(_ones(3, 4), 0.0)),
    "addcmul_of_zeros": ("addcmul_", lambda c: c.addcmul_(torch.zeros(3, 4), _ones(3, 4))),
    "nan_to_num_without_nan": ("nan_to_num_", lambda c: c.nan_to_num_()),
    "conj_physical_of_reals": ("mul_", lambda c: c.conj_physical_()),
    "tril_of_a_lower_part": ("tril_", lambda c: c.tril_(10)),
    "renorm_of_small_rows": ("renorm_", lambda c: c.renorm_(2, 0, 1e6)),
    "map_to_itself": ("map_", lambda c: c.map_(c, lambda x, y: x)),
    "apply_of_the_identity": ("apply_", lambda c: c.apply_(lambda v: v)),
    "normal_of_an_empty_slice": ("normal_", lambda c: c[:0].normal_()),
    "reverted_before_the_read": ("neg_", lambda c: c[:0].neg_().neg_()),
}


def _innocent_tables() -> None:
    for name, (twin, write) in NO_EFFECT.items():

        def body(run: Run, write: Write = write) -> Any:
            h, out, w = _float_save()(run)
            c = h.data
            run.write(write, c)
            out.sum().backward()
            return [w.grad]

        add(body, name=name, route="in-place method", kind="innocent", twin_of=f"method_{twin}")
    for name, write in METADATA.items():

        def reshaped(run: Run, write: Write = write) -> Any:
            h, out, w = _float_save()(run)
            c = h.data
            run.write(write, c)
            out.sum().backward()
            return [w.grad]

        add(reshaped, name=f"metadata_{name}", route="in-place method", kind="innocent", twin_of="method_zero_")


@program(name="method_nan_to_num_", route="in-place method", kind="corrupting")
def _nan_to_num(run: Run) -> Any:
    w = run.leaf([1.0, 1.0, 1.0])
    h = torch.tensor([float("nan"), 1.0, float("inf")])
    out = h * w  # saved
    c = h.data
    run.write(lambda: c.nan_to_num_())
    out.sum().backward()
    return [w.grad]


@program(name="method_conj_physical_", route="in-place method", kind="corrupting")
def _conj_physical(run: Run) -> Any:
    w = run.leaf([1 + 2j, 3 - 1j], torch.complex64)
    h = run.leaf([2 + 1j, 1 + 1j], torch.complex64)
    out = h * w  # saved
    c = h.data
    run.write(lambda: c.conj_physical_())
    out.abs().sum().backward()
    return [w.grad]


@program(name="conj_physical_after_backward", route="in-place method", kind="innocent", twin_of="method_conj_physical_")
def _conj_physical_after(run: Run) -> Any:
    w = run.leaf([1 + 2j, 3 - 1j], torch.complex64)
    h = run.leaf([2 + 1j, 1 + 1j], torch.complex64)
    c = h.data
    (h * w).abs().sum().backward()
    run.write(lambda: c.conj_physical_())
    return [w.grad]


_innocent_tables()

#: Writing methods that have no program, and why.
NO_PROGRAM = {
    "_coalesced_": "sparse tensors only",
    "resize_as_sparse_": "sparse tensors only",
    "sparse_resize_": "sparse tensors only",
    "sparse_resize_and_clear_": "sparse tensors only",
    "_philox_normal_": "private, needs a generator state of its own",
    "_philox_uniform_": "private, needs a generator state of its own",
}

TABLES: tuple[Any, ...] = (
    FLOAT,
    RANDOM,
    DOUBLE,
    INTEGER,
    BOOLEAN,
    METADATA,
    {"nan_to_num_", "conj_physical_"},
)


# ---- operators ----------------------------------------------------------------------------------------------------


def _add(c: torch.Tensor) -> None:
    c += 1.5


def _sub(c: torch.Tensor) -> None:
    c -= _ones(4)


def _mul(c: torch.Tensor) -> None:
    c *= 2


def _div(c: torch.Tensor) -> None:
    c /= 2


def _power(c: torch.Tensor) -> None:
    c **= 2


def _floordiv(c: torch.Tensor) -> None:
    c //= 2


def _mod(c: torch.Tensor) -> None:
    c %= 0.7


def _add_to_a_row(c: torch.Tensor) -> None:
    c[1] += 1.5


def _scale_masked(c: torch.Tensor) -> None:
    c[c > 0] *= 2


_pairs(
    "operator",
    "operator",
    {
        "iadd": _add,
        "isub": _sub,
        "imul": _mul,
        "itruediv": _div,
        "ipow": _power,
        "ifloordiv": _floordiv,
        "imod": _mod,
        "iadd_to_a_row": _add_to_a_row,
        "imul_of_masked": _scale_masked,
    },
    _float_save(),
    other_part=True,
)


@program(name="imatmul_that_makes_a_new_tensor", route="operator", kind="innocent", twin_of="operator_imul")
def _imatmul(run: Run) -> Any:
    """Tensors have no in-place ``@=``: Python falls back on ``c = c @ x``."""
    w = run.leaf([[2.0, 2.0], [2.0, 2.0]])
    h = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    out = h * w

    def write(c: torch.Tensor) -> None:
        c @= torch.tensor([[0.0, 1.0], [1.0, 0.0]])

    run.write(write, h.data)
    out.sum().backward()
    return [w.grad]


def _and(c: torch.Tensor) -> None:
    c &= 0


def _or(c: torch.Tensor) -> None:
    c |= 1


def _xor(c: torch.Tensor) -> None:
    c ^= 1


def _lshift(c: torch.Tensor) -> None:
    c <<= 1


def _rshift(c: torch.Tensor) -> None:
    c >>= 1


def _not_mask(c: torch.Tensor) -> None:
    c ^= True


def _mask_or(c: torch.Tensor) -> None:
    c |= c.new_ones(4)


_pairs(
    "operator",
    "operator",
    {"iand": _and, "ior": _or, "ixor": _xor, "ilshift": _lshift, "irshift": _rshift},
    _index_save,
)
_pairs("operator", "operator", {"mask_ixor": _not_mask, "mask_ior": _mask_or}, _mask_save)


# ---- x[i] = v: an index that picks the saved row 1, and one that does not -----------------------------------------

_BOOLS = [[False] * 6, [False, True] * 3, [False] * 6, [False] * 6]
_OTHER_BOOLS = [[True] * 6, [False] * 6, [False] * 6, [True, False] * 3]

INDEXES: dict[str, tuple[Any, Any]] = {
    "integer": (1, 2),
    "negative_integer": (-3, -1),
    "two_integers": ((1, 2), (2, 2)),
    "slice": (slice(0, 2), slice(2, 4)),
    "open_slice": (slice(1, None), slice(2, None)),
    "step": (slice(1, None, 2), slice(0, None, 2)),
    "slices_of_both": ((slice(0, 2), slice(1, 5, 2)), (slice(2, 4), slice(1, 5, 2))),
    "ellipsis": ((..., 0), (slice(2, 4), ..., 0)),
    "none": ((None, 1), (None, 2)),
    "row_mask": (torch.tensor([False, True, False, True]), torch.tensor([True, False, True, False])),
    "element_mask": (torch.tensor(_BOOLS), torch.tensor(_OTHER_BOOLS)),
    "list_mask": ([False, True, True, False], [False, False, True, True]),
    "mask_and_integer": (
        (torch.tensor([False, True, False, True]), 3),
        (torch.tensor([True, False, False, True]), 3),
    ),
    "index_tensor": (torch.tensor([1, 3]), torch.tensor([0, 2])),
    "negative_index_tensor": (torch.tensor([-3]), torch.tensor([-1, -2])),
    "index_matrix": (torch.tensor([[0, 1], [2, 2]]), torch.tensor([[0, 3], [2, 2]])),
    "two_index_tensors": (
        (torch.tensor([0, 1]), torch.tensor([4, 5])),
        (torch.tensor([0, 2]), torch.tensor([4, 5])),
    ),
    "index_tensor_and_slice": (
        (torch.tensor([0, 1]), slice(1, 3)),
        (torch.tensor([0, 3]), slice(1, 3)),
    ),
    "slice_and_index_tensor": (
        (slice(1, 2), torch.tensor([0, 5])),
        (slice(2, 3), torch.tensor([0, 5])),
    ),
    "list": ([1], [0, 3]),
    "numpy_index": (np.array([1]), np.array([2, 3])),
    "zero_dim_index": (torch.tensor(1), torch.tensor(3)),
    "bool": (True, False),
    "everything_or_nothing": (slice(None), slice(2, 2)),
    "ellipsis_or_empty_mask": (..., torch.zeros(4, dtype=torch.bool)),
    "row_or_empty_index": ([1], []),
}

_NEW_VALUES: dict[str, Any] = {
    "python_number": 7.0,
    "zero_dim_tensor": torch.tensor(7.0),
    "integer": 7,
    "boolean": True,
    "other_dtype": torch.tensor([7.0], dtype=torch.float64),
    "broadcast_row": torch.arange(6.0) + 50,
}


def _row_of_a_buffer(run: Run) -> tuple[torch.Tensor, ...]:
    buffer = torch.arange(24.0).view(4, 6) + 1
    w = run.leaf([1.0] * 6)
    out = buffer[1] * w  # saved
    return buffer, out, w


def _assignments() -> None:
    def body_for(index: Any, value: Any) -> Any:
        def write(c: torch.Tensor) -> None:
            c[index] = value

        def body(run: Run) -> Any:
            buffer, out, w = _row_of_a_buffer(run)
            c = buffer.data
            run.write(write, c)
            out.sum().backward()
            return [w.grad]

        return body

    for name, (hits, misses) in INDEXES.items():
        full = f"setitem_{name}"
        add(body_for(hits, 77.0), name=full, route="x[i] = v", kind="corrupting")
        add(body_for(misses, 77.0), name=f"{full}_elsewhere", route="x[i] = v", kind="innocent", twin_of=full)
    for name, value in _NEW_VALUES.items():
        full = f"setitem_value_{name}"
        add(body_for(1, value), name=full, route="x[i] = v", kind="corrupting")
        add(body_for(0, value), name=f"{full}_elsewhere", route="x[i] = v", kind="innocent", twin_of=full)


_assignments()


@program(name="setitem_of_the_values_there", route="x[i] = v", kind="innocent", twin_of="setitem_integer")
def _same_values_again(run: Run) -> Any:
    buffer, out, w = _row_of_a_buffer(run)
    c = buffer.data
    row = buffer[1].tolist()

    def write() -> None:
        c[1] = torch.tensor(row)

    run.write(write)
    out.sum().backward()
    return [w.grad]


# ---- functions ----------------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, Write] = {
    "relu_": lambda c: torch.relu_(c),
    "sigmoid_": lambda c: torch.sigmoid_(c),
    "tanh_": lambda c: torch.tanh_(c),
    "exp_": lambda c: torch.exp_(c),
    "abs_": lambda c: torch.abs_(c),
    "neg_": lambda c: torch.neg_(c),
    "clamp_": lambda c: torch.clamp_(c, -1, 1),
    "clamp_keyword": lambda c: torch.clamp_(input=c, min=-1, max=1),
    "fill_": lambda c: torch.fill_(c, 7.0),
    "zero_": lambda c: torch.zero_(c),
    "sqrt_": lambda c: torch.sqrt_(c),
    "square_": lambda c: torch.square_(c),
    "celu_": lambda c: torch.celu_(c),
    "selu_": lambda c: torch.selu_(c),
    "threshold_": lambda c: torch.threshold_(c, 0.5, 0.0),
    "index_put_": lambda c: torch.index_put_(c, (torch.tensor([1]),), torch.tensor(7.0)),
    "addmv_": lambda c: torch.addmv_(c[0], _ones(4, 2), _ones(2)),
    "logit_": lambda c: torch.logit_(c, 0.1),
    "xlogy_": lambda c: torch.xlogy_(c, 2.0),
    "F_relu": lambda c: F.relu(c, inplace=True),
    "F_relu6": lambda c: F.relu6(c, inplace=True),
    "F_hardtanh": lambda c: F.hardtanh(c, inplace=True),
    "F_elu": lambda c: F.elu(c, inplace=True),
    "F_leaky_relu": lambda c: F.leaky_relu(c, inplace=True),
    "F_silu": lambda c: F.silu(c, inplace=True),
    "F_mish": lambda c: F.mish(c, inplace=True),
    "F_hardswish": lambda c: F.hardswish(c, inplace=True),
    "F_hardsigmoid": lambda c: F.hardsigmoid(c, inplace=True),
    "F_celu": lambda c: F.celu(c, inplace=True),
    "F_selu": lambda c: F.selu(c, inplace=True),
    "F_threshold": lambda c: F.threshold(c, 0.5, 0.0, inplace=True),
    "F_relu_": lambda c: F.relu_(c),
    "F_elu_": lambda c: F.elu_(c),
    "F_hardtanh_": lambda c: F.hardtanh_(c),
    "F_leaky_relu_": lambda c: F.leaky_relu_(c),
    "F_threshold_": lambda c: F.threshold_(c, 0.5, 0.0),
    "F_normalize_into": lambda c: c.copy_(F.normalize(c, dim=0)),
    "nn_ReLU": lambda c: nn.ReLU(inplace=True)(c),
    "nn_LeakyReLU": lambda c: nn.LeakyReLU(0.1, inplace=True)(c),
    "nn_Hardswish": lambda c: nn.Hardswish(inplace=True)(c),
    "nn_SiLU": lambda c: nn.SiLU(inplace=True)(c),
    "nn_Threshold": lambda c: nn.Threshold(0.5, 0.0, inplace=True)(c),
    "nn_Sequential": lambda c: nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))(c),
}
RANDOM_FUNCTIONS: dict[str, Write] = {
    "dropout_": lambda c: torch.dropout_(c, 0.5, True),
    "alpha_dropout_": lambda c: torch.alpha_dropout_(c, 0.5, True),
    "F_dropout": lambda c: F.dropout(c, 0.5, inplace=True),
    "F_alpha_dropout": lambda c: F.alpha_dropout(c, 0.5, training=True, inplace=True),
    "F_feature_alpha_dropout": lambda c: F.feature_alpha_dropout(c, 0.5, training=True, inplace=True),
    "F_rrelu": lambda c: F.rrelu(c, training=True, inplace=True),
    "nn_Dropout": lambda c: nn.Dropout(0.5, inplace=True)(c),
}
INITIALISERS: dict[str, Write] = {
    "constant_": lambda c: init.constant_(c, 7.0),
    "ones_": lambda c: init.ones_(c),
    "zeros_": lambda c: init.zeros_(c),
    "eye_": lambda c: init.eye_(c),
    "dirac_": lambda c: init.dirac_(c.view(3, 2, 2)),
}
RANDOM_INITIALISERS: dict[str, Write] = {
    "normal_": lambda c: init.normal_(c),
    "uniform_": lambda c: init.uniform_(c),
    "trunc_normal_": lambda c: init.trunc_normal_(c),
    "xavier_uniform_": lambda c: init.xavier_uniform_(c),
    "xavier_normal_": lambda c: init.xavier_normal_(c),
    "kaiming_uniform_": lambda c: init.kaiming_uniform_(c),
    "kaiming_normal_": lambda c: init.kaiming_normal_(c),
    "orthogonal_": lambda c: init.orthogonal_(c),
    "sparse_": lambda c: init.sparse_(c, 0.5),
}

_pairs("function", "function with inplace", FUNCTIONS, _float_save())
_pairs("function", "function with inplace", RANDOM_FUNCTIONS, _float_save(), exact=False)
_pairs("init", "nn.init", INITIALISERS, _float_save())
_pairs("init", "nn.init", RANDOM_INITIALISERS, _float_save(), exact=False)


@program(name="relu_of_what_is_positive", route="function with inplace", kind="innocent", twin_of="function_relu_")
def _relu_of_positive(run: Run) -> Any:
    a = run.leaf()
    out = a.exp()
    c = out.data
    run.write(lambda: F.relu(c, inplace=True))
    out.sum().backward()
    return [a.grad]


@program(name="dropout_not_training", route="function with inplace", kind="innocent", twin_of="function_F_dropout")
def _dropout_not_training(run: Run) -> Any:
    a = run.leaf()
    out = a.exp()
    c = out.data
    run.write(lambda: F.dropout(c, 0.5, training=False, inplace=True))
    out.sum().backward()
    return [a.grad]


@program(name="function_not_in_place", route="function with inplace", kind="innocent", twin_of="function_F_relu")
def _function_not_in_place(run: Run) -> Any:
    h, out, w = _float_save()(run)
    run.write(lambda: F.relu(h.data))
    out.sum().backward()
    return [w.grad]


# ---- foreach ------------------------------------------------------------------------------------------------------

FOREACH: dict[str, Write] = {
    "abs_": lambda c: torch._foreach_abs_([c]),
    "add_scalar_": lambda c: torch._foreach_add_([c], 1.5),
    "add_list_": lambda c: torch._foreach_add_([c], [_ones(3, 4)], alpha=2),
    "addcmul_": lambda c: torch._foreach_addcmul_([c], [_ones(3, 4)], [_ones(3, 4)], 0.5),
    "addcdiv_": lambda c: torch._foreach_addcdiv_([c], [_ones(3, 4)], [_ones(3, 4)], 0.5),
    "clamp_max_": lambda c: torch._foreach_clamp_max_([c], 0.5),
    "clamp_min_": lambda c: torch._foreach_clamp_min_([c], 0.5),
    "copy_": lambda c: torch._foreach_copy_([c], [_ones(3, 4)]),
    "div_": lambda c: torch._foreach_div_([c], 3.0),
    "exp_": lambda c: torch._foreach_exp_([c]),
    "lerp_": lambda c: torch._foreach_lerp_([c], [_ones(3, 4)], 0.25),
    "maximum_": lambda c: torch._foreach_maximum_([c], 0.5),
    "minimum_": lambda c: torch._foreach_minimum_([c], 0.5),
    "mul_": lambda c: torch._foreach_mul_([c], 0.5),
    "mul_the_second_": lambda c: torch._foreach_mul_((_ones(2), c), 0.5),
    "neg_": lambda c: torch._foreach_neg_([c]),
    "pow_": lambda c: torch._foreach_pow_([c], 2.0),
    "reciprocal_": lambda c: torch._foreach_reciprocal_([c]),
    "round_": lambda c: torch._foreach_round_([c]),
    "sigmoid_": lambda c: torch._foreach_sigmoid_([c]),
    "sqrt_": lambda c: torch._foreach_sqrt_([c]),
    "sub_": lambda c: torch._foreach_sub_([c], 1.5),
    "tanh_": lambda c: torch._foreach_tanh_([c]),
    "zero_": lambda c: torch._foreach_zero_([c]),
    "zero_keyword": lambda c: torch._foreach_zero_(self=[c]),
}
_pairs("foreach", "foreach", FOREACH, _float_save(), other_part=True)


@program(name="foreach_over_other_tensors", route="foreach", kind="innocent", twin_of="foreach_mul_")
def _foreach_over_others(run: Run) -> Any:
    _, out, w = _float_save()(run)
    others = [torch.ones(3).data, torch.ones(2, 2).data]
    run.write(lambda: torch._foreach_mul_(others, 0.5))
    out.sum().backward()
    return [w.grad]


@program(name="foreach_empty_list_of_parts", route="foreach", kind="innocent", twin_of="foreach_zero_")
def _foreach_empty_parts(run: Run) -> Any:
    h, out, w = _float_save()(run)
    c = h.data
    run.write(lambda: torch._foreach_zero_([c[:0], c[1:1]]))
    out.sum().backward()
    return [w.grad]


# ---- calls that read in one argument what they write in another ------------------------------------------------------


@program(route="foreach", kind="corrupting", exact=False)
def foreach_copies_what_it_has_just_written(run: Run) -> Any:
    """The second copy reads what the first one wrote: the save changes, although ``b`` held its values before."""
    w, x = run.leaf(), _ones(3, 4)
    b = _ones(3, 4)
    out = x * w  # saved
    run.write(lambda: torch._foreach_copy_([b, x.data], [torch.zeros(3, 4), b]))
    out.sum().backward()
    return [w.grad]


@program(route="foreach", kind="innocent", twin_of="foreach_copies_what_it_has_just_written")
def foreach_copies_what_was_there_before(run: Run) -> Any:
    w, x = run.leaf(), _ones(3, 4)
    b = torch.zeros(3, 4)
    out = x * w
    run.write(lambda: torch._foreach_copy_([b, x.data], [_ones(3, 4), b]))
    out.sum().backward()
    return [w.grad]


@program(route="foreach", kind="corrupting", exact=False)
def foreach_reads_its_writes_through_a_view(run: Run) -> Any:
    w, x = run.leaf(), _ones(3, 4)
    b = torch.ones(2, 3, 4)
    out = x * w  # saved
    run.write(lambda: torch._foreach_copy_((b, x.data), (torch.zeros(2, 3, 4), b[1])))
    out.sum().backward()
    return [w.grad]


@program(route="foreach", kind="innocent", twin_of="foreach_reads_its_writes_through_a_view")
def foreach_reads_another_part_of_what_it_writes(run: Run) -> Any:
    w, x = run.leaf(), _ones(3, 4)
    b = torch.ones(2, 3, 4)
    out = x * w
    run.write(lambda: torch._foreach_copy_((b[0], x.data), (torch.zeros(3, 4), b[1])))
    out.sum().backward()
    return [w.grad]


@program(route="foreach", kind="innocent", twin_of="foreach_doubles_twice_through_two_views")
def foreach_adds_and_takes_away_through_two_views(run: Run) -> Any:
    """Each of the two changes the save, and both together do not."""
    w, x = run.leaf(), _ones(3, 4)
    out = x * w
    run.write(lambda: torch._foreach_mul_([x.data, x.data.t()], [2.0, 0.5]))
    out.sum().backward()
    return [w.grad]


@program(route="foreach", kind="corrupting", exact=False)
def foreach_doubles_twice_through_two_views(run: Run) -> Any:
    w, x = run.leaf(), _ones(3, 4)
    out = x * w  # saved
    run.write(lambda: torch._foreach_mul_([x.data, x.data.t()], [2.0, 2.0]))
    out.sum().backward()
    return [w.grad]
