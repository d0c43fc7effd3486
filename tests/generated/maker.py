"""Which program comes next? Lines are drawn one by one, and each is tried in plain PyTorch before it is kept.

All chance comes from one source: from a ``random.Random`` the same seed makes the same program, and from hypothesis
(``driven``) a program that fails becomes a short one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from generated.runs import Program, compiled, namespace, quiet


class Chance(Protocol):
    """Where all choices come from: a ``random.Random``, or something that asks."""

    def randrange(self, below: int, /) -> int:
        """A number from 0 to below ``below``."""


SHAPES = [(3, 4)] * 6 + [(4,)] * 3 + [(4, 4)] * 2 + [(2, 3, 4), (1,), (), (0, 4), (3, 1), (1, 4), (12,), (2, 2, 4, 4)]
DTYPES = ["float32"] * 8 + ["float64"] * 2 + ["bfloat16", "float16", "complex64"]

#: What makes a leaf; the last ones share memory with something that has a name.
LEAVES = [
    "grid({shape}{dtype}).requires_grad_()",
    "grid({shape}{dtype}).requires_grad_()",
    "grid({shape}{dtype}).requires_grad_()",
    "torch.nn.Parameter(grid({shape}{dtype}))",
    "torch.nn.Parameter(grid({shape}{dtype}).mT)",
    "grid({shape}{dtype}).t().requires_grad_()",
    "grid(3, 8{dtype})[:, ::2].requires_grad_()",
    "grid(5, 4{dtype})[1:4].requires_grad_()",
    "grid(4, 3{dtype}).t().contiguous().requires_grad_()",
    "grid({shape}{dtype})",
    "grid({shape}{dtype})",
    "torch.nn.Parameter(grid({shape}{dtype}), requires_grad=False)",
]

#: Operations with one result; {a}, {b}, {c} are tensors, {i} an index, {d} a dimension.
OPERATIONS = """
{a}.sigmoid()
{a}.tanh()
{a}.exp()
{a}.sin()
{a}.abs().sqrt()
{a}.abs().rsqrt()
{a}.relu()
{a}.square()
{a} ** 3
{a} ** 2.5
2 ** {a}
{a}.reciprocal()
{a}.abs().log1p()
{a}.erf()
{a}.atan()
{a}.tan()
{a}.clamp(-1, 1)
{a}.clamp(min={b})
{a} * {b}
{a} * {b}
{a} * {a}
{a} / {b}
{a} + {b}
{a} - 2 * {b}
{a} ** {b}
torch.atan2({a}, {b})
torch.maximum({a}, {b})
torch.minimum({a}, {b})
torch.hypot({a}, {b})
torch.addcmul({a}, {b}, {c})
torch.addcdiv({a}, {b}, {c})
torch.lerp({a}, {b}, 0.3)
torch.lerp({a}, {b}, {c})
torch.where({a} > 0, {a}, {b})
torch.where({a} > 0, {b} * {a}, {b})
{a} * ({a} > 0)
{a} * 3
{a} + 1
-{a}
{a}.lerp({b}, 0.5)
{a} @ {b}
{a} @ {b}.mT
{a}.mT @ {b}
torch.matmul({a}, {b})
torch.mv({a}, {b})
torch.outer({a}, {b})
torch.bmm({a}, {b})
torch.addmm({a}, {b}, {c})
torch.einsum("ij,kj->ik", {a}, {b})
torch.dot({a}, {b})
torch.linalg.multi_dot([{a}, {b}, {c}])
torch.cdist({a}, {b})
torch.baddbmm({a}, {b}, {c})
F.linear({a}, {b})
F.linear({a}, {b}, {c})
F.bilinear({a}, {a}, torch.ones(2, 4, 4), None)
{a}.sum({d})
{a}.sum()
{a}.mean({d})
{a}.prod({d})
{a}.prod()
{a}.var({d})
{a}.std()
{a}.norm()
{a}.norm(dim={d})
{a}.amax({d})
{a}.max()
{a}.logsumexp({d})
{a}.median()
{a}.max({d}).values
{a}.cumsum({d})
{a}.cumprod({d})
{a}.logcumsumexp({d})
{a}.cummax({d}).values
{a}.sort({d}).values
{a}.topk(1, {d}).values
{a}.kthvalue(1, {d})[0]
torch.linalg.norm({a})
torch.linalg.vector_norm({a}, 3, {d})
{a}.renorm(2, 0, 1.5)
{a}.softmax({d})
{a}.log_softmax({d})
F.softplus({a})
F.gelu({a})
F.silu({a})
F.elu({a})
F.leaky_relu({a})
F.hardswish({a})
F.hardtanh({a})
F.mish({a})
F.logsigmoid({a})
F.celu({a})
F.selu({a})
F.softshrink({a})
F.threshold({a}, 0.1, 0.0)
F.prelu({a}, {b})
F.glu({a})
F.normalize({a}, dim={d})
F.cosine_similarity({a}, {b}, dim={d})
F.layer_norm({a}, {a}.shape[-1:])
F.layer_norm({a}, {b}.shape, {b}, {c})
F.rms_norm({a}, {a}.shape[-1:])
F.rms_norm({a}, {b}.shape, {b})
F.group_norm({a}, 1)
F.instance_norm({a})
F.batch_norm({a}, None, None, {b}, {c}, True)
F.batch_norm({a}, {b}.detach(), {c}.detach().abs(), training=False)
F.local_response_norm({a}, 2)
F.conv1d({a}.reshape(1, 1, -1), {b}.reshape(1, 1, -1)[..., :2])
F.conv2d({a}.reshape(1, 1, 3, 4), {b}.reshape(1, 1, 3, 4)[..., :2, :2])
F.conv_transpose1d({a}.reshape(1, 1, -1), {b}.reshape(1, 1, -1)[..., :2])
F.max_pool1d({a}, 2)
F.avg_pool1d({a}, 2)
F.adaptive_avg_pool1d({a}, 2)
F.interpolate({a}.reshape(1, 1, -1), scale_factor=2)
F.pad({a}, (1, 1))
F.pad({a}.reshape(1, 1, -1), (1, 1), mode="reflect")
F.dropout({a}, 0.5)
F.feature_dropout({a}, 0.5) if False else F.dropout({a}, 0.3)
F.alpha_dropout({a}, 0.5, True)
F.mse_loss({a}, {b})
F.l1_loss({a}, {b})
F.smooth_l1_loss({a}, {b})
F.huber_loss({a}, {b})
F.binary_cross_entropy({a}.sigmoid(), {b}.sigmoid())
F.binary_cross_entropy_with_logits({a}, {b}.sigmoid())
F.kl_div({a}.log_softmax(-1), {b}.softmax(-1), reduction="sum")
F.cross_entropy({a}, torch.tensor([0, 2, 1]))
F.cross_entropy({a}, torch.tensor([0, 2, 1]), {b})
F.nll_loss({a}.log_softmax(-1), torch.tensor([0, 2, 1]))
F.margin_ranking_loss({a}, {b}, torch.ones(1))
F.triplet_margin_loss({a}, {b}, {c})
F.poisson_nll_loss({a}, {b})
F.gaussian_nll_loss({a}, {b}, {c}.abs() + 1)
F.cosine_embedding_loss({a}, {b}, torch.ones(1))
F.pairwise_distance({a}, {b})
F.scaled_dot_product_attention({a}, {b}, {c})
F.embedding(torch.tensor([0, 2]), {a})
F.embedding_bag(torch.tensor([[0, 2]]), {a}, mode="mean")
F.embedding(torch.tensor([0, 2]), {a}, max_norm=1.0)
F.grid_sample({a}.reshape(1, 1, 3, 4), {b}.reshape(1, 3, 2, 2))
{a}[torch.tensor([0, 1])]
{a}[{a} > 0]
{a}[..., torch.tensor([1, 0])]
{a}.gather(-1, torch.zeros(3, 2, dtype=torch.long))
{a}.index_select({d}, torch.tensor([0, 0]))
{a}.take(torch.tensor([0, 1, 1]))
{a}.masked_fill({a} > 0, 0.5)
{a}.masked_select({a} > 0)
{a}.scatter(-1, torch.zeros(3, 1, dtype=torch.long), {b})
{a}.scatter_add(-1, torch.zeros(3, 1, dtype=torch.long), {b})
{a}.scatter_reduce(0, torch.zeros(3, 4, dtype=torch.long), {b}, "prod")
{a}.index_add(0, torch.tensor([0]), {b}[:1])
{a}.index_copy(0, torch.tensor([0]), {b}[:1])
{a}.repeat(2, 1)
{a}.repeat_interleave(2, {d})
{a}.tile(2)
{a}.roll(1)
{a}.flip({d})
{a}.tril()
{a}.diff()
{a}.trace()
torch.cat([{a}, {b}], {d})
torch.stack([{a}, {b}])
torch.cat([{a}, {a}.exp()])
torch.diag_embed({a})
torch.cross({a}[..., :3], {b}[..., :3], dim=-1)
torch.trapezoid({a})
torch.linalg.det({a})
torch.linalg.inv({a} + 5 * torch.eye(4))
torch.linalg.solve({a} + 5 * torch.eye(4), {b})
torch.linalg.cholesky({a} @ {a}.mT + torch.eye({a}.shape[0]))
torch.linalg.svdvals({a})
torch.linalg.matrix_exp({a})
torch.fft.fft({a}).abs()
torch.view_as_real({a})
torch.complex({a}, {b}).abs()
{a}.to(torch.float64)
{a}.to(torch.float32)
{a}.half().float()
{a}.clone()
{a}.contiguous()
{a}.view_as({a})
{a}.expand(2, *{a}.shape)
Cube.apply({a})
Exp.apply({a})
OldExp.apply({a})
Product.apply({a}, {b})
Pair.apply({a})[0]
Pair.apply({a})[1] * Pair.apply({a})[0]
InPlace.apply({a} * 1)
InPlace.apply({a})
checkpoint(Exp.apply, {a}, use_reentrant=False)
checkpoint(torch.sin, {a}, use_reentrant=False)
torch.sigmoid_({a} * 1)
{a}.exp().mul_({b})
{a}.clone().mul_({b})
{a}.clone().relu_()
F.relu({a} * 2, inplace=True)
F.silu({a} * 2, inplace=True)
({a} * 1).clamp_(-1, 1)
torch._foreach_mul([{a}, {b}], 2.0)[0]
torch._foreach_exp([{a}, {b}])[1]
torch._foreach_sqrt([{a}.abs(), {b}])[0]
torch._foreach_mul([{a}, {b}], [{b}, {a}])[0]
""".strip().splitlines()

#: Operations with several results.
OF_SEVERAL = [
    "{a}.max({d})",
    "{a}.min({d})",
    "{a}.sort({d})",
    "{a}.topk(2, {d})",
    "{a}.split(2, {d})",
    "{a}.chunk(2, {d})",
    "{a}[:2].unbind()",
    "{a}.aminmax()",
    "{a}.cummax({d})",
    "torch.var_mean({a}, {d})",
    "torch.std_mean({a})",
    "Pair.apply({a})",
    "torch.linalg.qr({a} + torch.eye(4))",
    "torch.linalg.eigh({a} + {a}.mT)",
    "torch.linalg.svd({a})[:2]",
    "torch.linalg.slogdet({a} + 5 * torch.eye(4))",
    "torch.frexp({a})",
    "torch._foreach_exp([{a}, {b}])",
    "torch._foreach_mul([{a}, {b}], 3.0)",
    "torch._foreach_mul([{a}, {b}], [{b}, {a}])",
    "torch._foreach_sigmoid([{a}, {b}])",
    "torch._foreach_tanh([{a}, {b}])",
    "torch._foreach_div([{a}, {b}], [{b}, {a}])",
    "torch.gradient({a})[:2]",
    "torch.ops.aten.native_layer_norm({a}, {a}.shape[-1:], None, None, 1e-5)[:2]",
    "torch.ops.aten.native_dropout({a}, 0.5, True)",
]

#: Views: they share the version counter.
VIEWS = """
{e}[0]
{e}[-1]
{e}[1:]
{e}[:1]
{e}[::2]
{e}[..., 0]
{e}[..., 1:]
{e}[..., ::2]
{e}[...]
{e}[None]
{e}.t()
{e}.mT
{e}.transpose(0, -1)
{e}.view(-1)
{e}.reshape(-1)
{e}.flatten()
{e}.ravel()
{e}.unsqueeze(0)
{e}.squeeze()
{e}.narrow(0, 0, 1)
{e}.narrow(-1, 1, 1)
{e}.select(0, 0)
{e}.diagonal()
{e}.unfold(0, 2, 1)
{e}.view_as({e})
{e}.unbind()[0]
{e}.split(2)[0]
{e}.tensor_split(2)[1]
{e}.chunk(2)[0]
{e}.swapaxes(0, -1)
{e}.movedim(0, -1)
{e}.contiguous()
{e}.cpu()
{e}.float()
{e}.conj()
{e}.real
{e}.imag
{e}.resolve_conj()
{e}.expand_as({e})
every_second({e})
{e}.as_strided({e}.shape, {e}.stride())
torch.atleast_2d({e})
torch.view_as_real({e})
torch.ops.aten.alias({e})
torch.ops.aten.view({e}, [-1])
{e}.detach()
{e}.detach()
{e}.detach()[0]
torch.detach({e})
torch.ops.aten.detach({e})
{e}.detach().view(torch.int32)
{e}.detach().view(torch.uint8)
{e}.detach().requires_grad_()
""".strip().splitlines()

#: Aliases with a version counter of their own.
ALIASES = """
{e}.data
{e}.data
{e}.data
{e}.data
{e}.data[0]
{e}.data.view(-1)
{e}.data.t()
{e}.data.detach()
{e}.data.data
{e}.data.view(torch.int32)
{e}.data.view(torch.uint8)
{e}.data.requires_grad_()
{e}.detach().data
getattr({e}, "data")
torch.nn.Parameter({e}.data)
torch.nn.Parameter({e})
copy.copy({e}.detach())
torch.Tensor({e})
torch.from_numpy({e}.detach().numpy())
torch.as_tensor({e}.detach().numpy())
torch.asarray({e}.detach().numpy())
torch.frombuffer({e}.detach().numpy(), dtype=torch.float32)
torch.from_dlpack({e}.detach())
torch.from_dlpack({e}.detach().numpy())
torch.from_dlpack({e}.data)
dlpack.from_dlpack(dlpack.to_dlpack({e}.detach()))
torch.empty(0).set_({e}.detach())
torch.empty(0).set_({e}.data)
torch.tensor([], dtype={e}.dtype).set_({e}.untyped_storage(), {e}.storage_offset(), {e}.shape, {e}.stride())
""".strip().splitlines()

#: What is no tensor and reaches the memory.
ARRAYS = """
{e}.detach().numpy()
{e}.numpy(force=True)
{e}.data.numpy()
np.asarray({e}.detach())
np.array({e}.detach(), copy=None)
{e}.detach().__array__()
np.from_dlpack({e}.detach())
{e}.detach().numpy()[0:1]
{e}.detach().numpy().T
{e}.detach().numpy().reshape(-1)
{e}.detach()[0].numpy()
np.asarray(memoryview({e}.detach().numpy()))
np.frombuffer({e}.detach().numpy(), dtype=np.float32)
{e}.tolist()
np.array({e}.detach())
""".strip().splitlines()

STORAGES = """
{e}.untyped_storage()
{e}.data.untyped_storage()
{e}.detach().untyped_storage()
{e}.storage()
{e}.storage().untyped()
{e}.untyped_storage().clone()
""".strip().splitlines()

#: Writes to a tensor {t}; {o} is another tensor, {v} a number.
WRITES = """
{t}.zero_()
{t}.fill_({v})
{t}.add_({v})
{t}.mul_({v})
{t}.mul_({o})
{t}.add_({o}, alpha=0.5)
{t}.sub_({v})
{t}.div_(2)
{t}.neg_()
{t}.copy_({o})
{t}.copy_({o}, non_blocking=True)
{t}.clamp_(-0.5, 0.5)
{t}.sigmoid_()
{t}.tanh_()
{t}.abs_()
{t}.exp_()
{t}.normal_()
{t}.uniform_()
{t}.bernoulli_(0.5)
{t}.exponential_()
{t}.random_(5)
{t}.lerp_({o}, 0.5)
{t}.addcmul_({o}, {o}, value=0.1)
{t}.pow_(2)
{t}.round_()
{t}.t_()
{t}.unsqueeze_(0)
{t}.transpose_(0, -1)
{t}.squeeze_()
{t}.resize_as_({t})
{t}.requires_grad_()
{t}.sort()
{t}.logical_not_()
{t}.eq_({o})
{t}.tril_()
{t}.cumsum_(0)
{t}.swapaxes_(0, -1)
{t}.index_fill_(0, torch.tensor([0]), {v})
{t}.index_copy_(0, torch.tensor([1]), torch.full_like({t}[:1], {v}))
{t}.index_add_(0, torch.tensor([0]), torch.full_like({t}[:1], {v}))
{t}.index_put_((torch.tensor([0]),), torch.tensor({v}))
{t}.masked_fill_({t} > 0, {v})
{t}.masked_fill_({t} > 1e9, {v})
{t}.masked_scatter_({t} > 0, torch.full_like({t}, {v}))
{t}.scatter_(0, torch.zeros_like({t}[:1], dtype=torch.long), {v})
{t}.put_(torch.tensor([0]), torch.tensor([{v}]))
{t}.fill_diagonal_({v})
{t}.apply_(lambda number: -number)
{t}.map_({t}, lambda first, second: first + 1)
{t}.detach_()
{t}.__imul__({v})
{t}.__setitem__(0, {v})
{t}[0] = {v}
{t}[...] = {v}
{t}[:] = {v}
{t}[:1] = {o}
{t}[-1] = {v}
{t}[..., 0] = {v}
{t}[..., 1:] = {v}
{t}[{t} > 0] = {v}
{t}[{t} > 1e9] = {v}
{t}[torch.tensor([0])] = {v}
{t}[0:0] = {v}
{t}[()] = {v}
{t}[[0, 1]] = {v}
{t} += {v}
{t} *= {v}
{t} -= {o}
{t} /= 2
{t} **= 2
{t}.data = {o}
{t}.data = {o}.detach()
{t}.data = {t}.detach().clone()
{t}.data = {t}.data
{t}.data = {t} * 2
{t}.data = {t}.data.mT.contiguous().mT
{t}.data += {v}
{t}.data *= {v}
{t}.data[0] = {v}
{t}.data[0] += {v}
{t}.data.mul_({v})
{t}.data.zero_()
{t}.data.copy_({o})
{t}.data.add_({o}, alpha=-0.1)
{t}.data.set_({o}.data)
{t}.data.set_({t}.data.clone())
{t}.set_({o}.detach())
{t}.set_({t}.detach().clone())
{t}.set_()
{t}.detach().mul_({v})
{t}.detach().copy_({o})
{t}.real = {v}
{t}.imag = {o}
{t}.data.real = {o}
torch.relu_({t})
torch.zero_({t})
torch.fill_({t}, {v})
torch.neg_({t})
torch.sigmoid_({t}.data)
F.relu({t}, inplace=True)
F.relu({t}.data, inplace=True)
F.relu_({t})
F.hardtanh({t}, inplace=True)
F.dropout({t}, 0.5, inplace=True)
F.elu_({t})
F.leaky_relu_({t}.data)
F.threshold({t}, 0.0, 1.0, inplace=True)
torch.nn.ReLU(inplace=True)({t})
torch.nn.init.zeros_({t})
torch.nn.init.normal_({t})
torch.nn.init.uniform_({t}.data)
torch.nn.init.constant_({t}.data, {v})
torch.nn.init.eye_({t})
torch.nn.init.orthogonal_({t})
torch.nn.init.trunc_normal_({t})
torch.Tensor.mul_({t}, {v})
torch.Tensor.add_({t}.data, {o})
torch.Tensor.__setitem__({t}, 0, {v})
torch._C.TensorBase.mul_({t}, {v})
operator.iadd({t}, {v})
operator.setitem({t}, 0, {v})
getattr({t}, "mul_")({v})
torch._foreach_add_([{t}], {v})
torch._foreach_mul_([{t}, {o}], {v})
torch._foreach_mul_(({t},), [{v}])
torch._foreach_copy_([{t}], [{o}])
torch._foreach_zero_([{t}])
torch._foreach_lerp_([{t}], [{o}], 0.5)
torch._foreach_addcdiv_([{t}], [{o}], [{o}], 0.1)
torch._foreach_neg_([{t}])
torch._foreach_clamp_max_([{t}], 0.1)
torch._amp_foreach_non_finite_check_and_unscale_([{t}], torch.zeros(1), torch.full((1,), 0.5))
torch.add({t}, {v}, out={t})
torch.exp({t}, out={t})
torch.neg({t}, out={t})
torch.clamp({t}, 0, 0.5, out={t})
torch.mul({o}.expand_as({t}), {v}, out={t})
torch.sigmoid({o}.expand_as({t}), out={t})
torch.where({t} > 0, {t}, {o}.expand_as({t}), out={t})
torch.cumsum({t}, 0, out={t})
torch.sub({v}, {t}.detach(), out={t}.detach())
torch.zeros({t}.shape, out={t})
torch.normal(0.0, 1.0, {t}.shape, out={t})
torch.ops.aten.mul_({t}, {v})
torch.ops.aten.zero_({t})
torch.ops.aten.add_.Tensor({t}, {o})
torch.ops.aten.copy_.default({t}, {o})
torch.ops.aten.exp.out({t}, out={t})
torch.ops.aten.index_put_({t}, [torch.tensor([0])], torch.tensor({v}))
torch.ops.aten._foreach_mul_.Scalar([{t}], {v})
torch.ops.aten.relu_({t})
torch.index_fill({t}, 0, torch.tensor([0]), {v})
torch.index_put_({t}, (torch.tensor([0]),), torch.tensor({v}))
torch.masked_fill({t}, {t} > 0, {v})
torch.embedding_renorm_({t}, torch.tensor([0]), 0.5, 2.0)
torch.utils.swap_tensors({t}, {o})
torch.nn.utils.clip_grad_norm_([{t}], 0.1)
torch.nn.utils.vector_to_parameters(torch.full((12,), {v}), [{t}])
torch.nn.utils.vector_to_parameters(torch.full(({t}.numel(),), {v}), [{t}])
F.batch_norm(grid(3, 4), {t}, {t}, training=True)
F.batch_norm(grid(3, 4), {t}.data, {t}.data, training=True)
{t}.untyped_storage().fill_(0)
{t}.untyped_storage().copy_({t}.untyped_storage().clone())
{t}.untyped_storage()[0] = 7
{t}.storage()[0] = {v}
{t}.storage().fill_({v})
{t}.detach().numpy().fill({v})
{t}.detach().numpy()[...] = {v}
{t}.numpy(force=True)[0] = {v}
np.negative({t}.detach().numpy(), out={t}.detach().numpy())
np.asarray({t}.detach())[...] *= -1
np.from_dlpack({t}.detach())[...] = {v}
torch.from_numpy({t}.detach().numpy()).mul_({v})
torch.from_dlpack({t}.detach()).mul_({v})
dlpack.from_dlpack(dlpack.to_dlpack({t}.detach())).zero_()
torch.empty(0).set_({t}.detach()).fill_({v})
torch.neg({t}.data, out={t}.data)
torch.mul({t}.data, {v}, out={t}.data)
torch.ops.aten.mul_({t}.data, {v})
""".strip().splitlines()

ARRAY_WRITES = """
{n}[...] = {v}
{n}[:1] = {v}
{n} *= -1
{n}.fill({v})
np.negative({n}, out={n})
np.put({n}, [0], [{v}])
np.copyto({n}, {v})
{n}.sort(axis=0)
np.add({n}, 1, out={n})
{n}.flat[0] = {v}
{n}.setflags(write=False)
memoryview({n}.reshape(-1)).cast("B")[0] = 3
""".strip().splitlines()

STORAGE_WRITES = """
{s}.fill_(0)
{s}[0] = 3
{s}.copy_({s}.clone())
{s}.copy_(torch.zeros(len({s}), dtype=torch.uint8).untyped_storage())
{s}[0:2] = 1
""".strip().splitlines()

OPTIMISERS = """
torch.optim.SGD([{p}], lr=0.1)
torch.optim.SGD([{p}], lr=0.1, momentum=0.9, foreach=True)
torch.optim.SGD([{p}], lr=0.1, foreach=False)
torch.optim.SGD([{p}], lr=0.1, fused=True)
torch.optim.SGD([{p}], lr=0.1, momentum=0.9, fused=True)
torch.optim.Adam([{p}], lr=0.1)
torch.optim.Adam([{p}], lr=0.1, fused=True)
torch.optim.AdamW([{p}], lr=0.1, foreach=True)
torch.optim.AdamW([{p}], lr=0.1, fused=True)
torch.optim.Adagrad([{p}], lr=0.1)
torch.optim.Adagrad([{p}], lr=0.1, fused=True)
torch.optim.RMSprop([{p}], lr=0.1)
torch.optim.Adadelta([{p}])
torch.optim.Adamax([{p}])
torch.optim.Rprop([{p}])
torch.optim.NAdam([{p}])
torch.optim.ASGD([{p}])
""".strip().splitlines()

MODULES = [
    "torch.nn.Linear(4, 4)",
    "torch.nn.Linear(4, 3, bias=False)",
    "torch.nn.BatchNorm1d(4)",
    "torch.nn.BatchNorm1d(4).eval()",
    "torch.nn.LayerNorm(4)",
    "torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(inplace=True), torch.nn.Linear(4, 4))",
    "torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh())",
    "torch.nn.GRUCell(4, 4)",
    "torch.nn.GRU(4, 4)",
    "torch.nn.MultiheadAttention(4, 2)",
    "torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(4, 4))",
    "torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4))",
    "torch.nn.Embedding(4, 4, max_norm=1.0)",
    "torch.nn.Conv1d(3, 3, 2)",
    "torch.nn.PReLU()",
    "torch.nn.InstanceNorm1d(3, affine=True, track_running_stats=True)",
]

BACKWARDS = """
{h}.sum().backward()
{h}.sum().backward()
{h}.backward(torch.ones_like({h}))
{h}.sum().backward(retain_graph=True)
{h}.pow(2).sum().backward(retain_graph=True)
{h}.abs().sum().backward()
({h} * {k}).sum().backward()
({h}.sum() + {k}.sum()).backward()
({h} * {k}.detach()).sum().backward()
torch.autograd.backward([{h}.sum(), {k}.sum()])
torch.autograd.backward([{h}.sum(), {k}.sum()], retain_graph=True)
{h}.sum().backward(inputs=[{a}], retain_graph=True)
{h}.sum().backward(create_graph=True)
""".strip().splitlines()

GRADIENTS = """
torch.autograd.grad({h}.sum(), {a}, allow_unused=True, materialize_grads=True)[0]
torch.autograd.grad({h}.sum(), {a}, retain_graph=True)[0]
torch.autograd.grad({h}.sum(), {a}, create_graph=True)[0]
torch.autograd.grad({h}.sum(), {a}, create_graph=True)[0]
torch.autograd.grad({h}, {a}, torch.ones_like({h}), create_graph=True)[0]
torch.autograd.grad({h}, {a}, torch.eye({h}.numel()).reshape(-1, *{h}.shape), is_grads_batched=True)[0]
""".strip().splitlines()

#: Wider: what else an operation may be. Whether a program has them is not drawn: the seeds of old make what they made.
MORE_OPERATIONS = """
transformed(torch.func.grad(lambda x: x.sin().sum()), {a})
transformed(torch.func.grad(lambda x, w: (x * w).exp().sum()), {a}, {b})
transformed(torch.func.grad(lambda x, w: (x.tanh() * w).square().sum(), argnums=1), {a}, {b})
transformed(lambda x, w: torch.func.grad(lambda y: (y * w).sin().sum())(x), {a}, {b})
transformed(lambda x: torch.func.grad(torch.func.grad(lambda y: y ** 3))(x), {a}.sum())
transformed(lambda x: torch.func.vjp(torch.exp, x)[1](x.cos())[0], {a})
transformed(lambda x, w: torch.func.vjp(torch.mul, x, w)[1](x * w)[1], {a}, {b})
transformed(lambda x: torch.func.jvp(torch.sin, (x,), (x.cos(),))[1], {a})
transformed(torch.func.vmap(torch.func.grad(lambda x: x.exp().sum())), {a})
transformed(torch.func.vmap(torch.func.grad(lambda x, w: (x * w).square().sum())), {a}, {b})
transformed(torch.func.vmap(lambda x, w: x.exp() * w), {a}, {b})
transformed(torch.func.vmap(torch.sigmoid), {a})
transformed(torch.func.jacrev(lambda x: x.sigmoid().sum()), {a})
transformed(torch.func.jacfwd(lambda x: x.exp().sum()), {a})
transformed(torch.func.hessian(lambda x: (x ** 3).sum()), {a})
transformed(torch.func.grad(lambda x: written_inside(x, x.cos()).sum()), {a})
region(made_by("eager", bent), {a}, {b})
region(made_by("aot_eager", bent), {a}, {b})
region(made_by("aot_eager", written_inside), {a}, {b})
region(made_by("aot_eager", two_results), {a}, {b})
checkpoint(bent, {a}, {b}, use_reentrant=False)
checkpoint(bent, {a}, {b}, use_reentrant=True)
checkpoint(written_inside, {a}, {b}, use_reentrant=False)
checkpoint(Product.apply, {a}, {b}, use_reentrant=False)
checkpoint(F.dropout, {a}, use_reentrant=False)
region(lambda x, w: checkpoint(lambda y: bent(y, w), x, use_reentrant=False), {a}, {b})
region(lambda x, w: checkpoint(lambda y: y.exp() + w * w, x, use_reentrant=True), {a}, {b})
checkpoint(lambda x: checkpoint(torch.exp, x.sin(), use_reentrant=False), {a}, use_reentrant=False)
InForward.apply({a})
Doubly.apply({a})
Viewed.apply({a} * 1)
Partly.apply({a})[0]
""".strip().splitlines()

SAVING = ["same", "boxed", "detached", "copied"]

VALUES = ["0", "0.5", "-1", "2", "3.25", "1"]


class Maker:
    """Draws one program.

    Args:
        chance: where all choices come from.
        lines: at most so many lines are tried.
        wide: whether the parts that came later are among them.
    """

    def __init__(self, chance: Chance, lines: int, wide: bool = False) -> None:
        self.chance = chance
        self.wide = wide
        self.limit = lines
        self.lines: list[str] = []
        self.space = namespace()
        self.counter = 0
        self.ended = False

    # ---- choices

    def pick(self, options: Sequence[Any]) -> Any:
        return options[self.chance.randrange(len(options))]

    def one_in(self, n: int) -> bool:
        return self.chance.randrange(n) == n - 1

    def names(self, wanted: Callable[[Any], bool]) -> list[str]:
        return [name for name, value in self.space.items() if name[-1].isdigit() and _is(wanted, value)]

    def tensor(self, wanted: Callable[[torch.Tensor], bool] = lambda _: True) -> str | None:
        """The name of a tensor, the young ones more often."""
        names = self.names(lambda value: isinstance(value, torch.Tensor) and wanted(value))
        if not names:
            return None
        return names[-1 - min(self.chance.randrange(len(names)), self.chance.randrange(len(names)))]

    def new(self, kind: str) -> str:
        self.counter += 1
        return f"{kind}{self.counter}"

    def fill(self, template: str, **given: str) -> str | None:
        """The template with names in it; None where there is nothing of a kind."""
        for key, wanted in (
            ("a", _numbers),
            ("b", _numbers),
            ("c", _numbers),
            ("o", _numbers),
            ("h", _has_graph),
            ("k", _has_graph),
        ):
            if "{" + key + "}" in template and key not in given:
                name = self.tensor(wanted)
                if name is None:
                    return None
                given[key] = name
        return template.format(**given, d=self.pick([0, -1]), i=self.pick([0, 1]), v=self.pick(VALUES))

    # ---- lines

    def emit(self, line: str | None) -> bool:
        """Try a line; keep it where plain PyTorch takes it."""
        if line is None:
            return False
        try:
            with quiet():
                exec(compiled((line,))[0], self.space)
        except Exception as error:
            error.__traceback__ = None
            if isinstance(error, SyntaxError):
                return False
            refused = "inplace operation" in str(error) and "gradient" in str(error)
            if (refused and self.one_in(2)) or self.one_in(60):
                # PyTorch refuses it: some programs end here, most have no such line.
                self.lines.append(line)
                self.ended = True
                return True
            return False
        self.lines.append(line)
        return True

    def leaf(self) -> bool:
        shape = ", ".join(map(str, self.pick(SHAPES)))
        dtype = self.pick(DTYPES)
        template = self.pick(LEAVES)
        given = "" if dtype == "float32" else f", dtype=torch.{dtype}"
        return self.emit(f"{self.new('a')} = {template.format(shape=shape, dtype=given)}".replace("(, ", "("))

    def sharing_leaf(self) -> bool:
        """Leaves in one buffer, or over somebody else's memory."""
        name, other, buffer = self.new("a"), self.new("a"), self.new("n")
        kind = self.chance.randrange(5)
        if kind == 0:
            return (
                self.emit(f"{buffer} = grid(6, 4)")
                and self.emit(f"{name} = torch.nn.Parameter({buffer}[:3])")
                and self.emit(f"{other} = torch.nn.Parameter({buffer}[3:])")
            )
        if kind == 1:
            return self.emit(f"{buffer} = np.linspace(-1.7, 2.3, 12, dtype=np.float32).reshape(3, 4)") and self.emit(
                f"{name} = torch.from_numpy({buffer}).requires_grad_()"
            )
        if kind == 2:
            return self.emit(f"{buffer} = np.linspace(-1.7, 2.3, 12, dtype=np.float32).reshape(3, 4)") and self.emit(
                f"{name} = torch.from_numpy({buffer})"
            )
        if kind == 3:
            return self.emit(f"{buffer} = bytearray(48)") and self.emit(
                f"{name} = torch.frombuffer({buffer}, dtype=torch.float32).requires_grad_()"
            )
        return (
            self.emit(f"{buffer} = grid(3, 8)")
            and self.emit(f"{name} = {buffer}[:, ::2].requires_grad_()")
            and self.emit(f"{other} = {buffer}[:, 1::2]")
        )

    def operation(self) -> bool:
        if self.one_in(10):
            template = self.fill(self.pick(OF_SEVERAL))
            if template is None:
                return False
            return self.emit(f"{self.new('y')}, {self.new('y')} = {template}")
        if self.one_in(25):
            module = self.names(lambda value: isinstance(value, torch.nn.Module))
            source = self.tensor(_numbers)
            if module and source:
                return self.emit(f"{self.new('y')} = {self.pick(module)}({source})")
        template = self.fill(self.pick(MORE_OPERATIONS if self.wide and self.one_in(5) else OPERATIONS))
        if template is None:
            return False
        if self.one_in(12):
            target = self.tensor(_has_graph)  # the name is bound anew, what it stood for may die
            if target is not None:
                return self.emit(f"{target} = {template}")
        if self.one_in(15):
            return self.emit(
                f"with saving({self.pick([*SAVING, 'keyed'] if self.wide else SAVING)!r}): {self.new('y')} = {template}"
            )
        return self.emit(f"{self.new('y')} = {template}")

    def module(self) -> bool:
        name = self.new("m")
        if not self.emit(f"{name} = {self.pick(MODULES)}"):
            return False
        source = self.tensor(_numbers)
        result = self.new("y")
        if source and "GRU(" in self.lines[-1]:
            return self.emit(f"{result} = {name}({source})[0]")
        if source and "Multihead" in self.lines[-1]:
            return self.emit(f"{result} = {name}({source}, {source}, {source})[0]")
        if source:
            self.emit(f"{result} = {name}({source})")
        if self.one_in(2):
            parameter = self.pick([key for key, _ in self.space[name].named_parameters()] or ["weight"])
            return self.emit(
                f"{self.new('a')} = {name}.{parameter}"
                if not any(part.isdigit() for part in parameter.split("."))
                else f"{self.new('a')} = {name}.get_parameter({parameter!r})"
            )
        return True

    def path(self, base: str) -> str:
        """The name, or an alias of what it stands for."""
        expression = base
        for _ in range(self.pick([0, 0, 1, 1, 1, 2, 3])):
            expression = self.pick(ALIASES if self.one_in(2) else VIEWS).format(e=expression)
            if len(expression) > 120:
                break
        return expression

    def alias(self) -> bool:
        base = self.tensor()
        if base is None:
            return False
        kind = self.chance.randrange(8)
        if kind == 7:
            return self.emit(f"{self.new('n')} = {self.pick(ARRAYS).format(e=base)}")
        if kind == 6:
            return self.emit(f"{self.new('s')} = {self.pick(STORAGES).format(e=base)}")
        return self.emit(f"{self.new('c')} = {self.path(base)}")

    def write_line(self) -> str | None:
        kind = self.chance.randrange(10)
        if kind == 8:
            arrays = self.names(lambda value: isinstance(value, np.ndarray))
            if arrays:
                return str(self.pick(ARRAY_WRITES)).format(n=self.pick(arrays), v=self.pick(VALUES))
        if kind == 9:
            storages = self.names(lambda value: "torage" in type(value).__name__)
            if storages:
                return str(self.pick(STORAGE_WRITES)).format(s=self.pick(storages))
        base = self.tensor()
        if base is None:
            return None
        template = self.pick(WRITES)
        path = base
        if not self.one_in(3):
            path = self.pick(ALIASES).format(e=self.pick(VIEWS).format(e=base) if self.one_in(3) else base)
        elif self.one_in(2):
            path = self.path(base)
        if path != base and template.startswith("{t} ") and "data" not in path:
            path = base
        return self.fill(template, t=path)

    def write(self) -> bool:
        line = self.write_line()
        if line is None:
            return False
        kind = self.chance.randrange(12)
        if kind < 4:
            return self.emit(f"with torch.no_grad(): {line}")
        if kind == 4 and "=" not in line:
            return self.emit(f"in_thread(lambda: {line})")
        if kind == 5:
            return self.emit(f"with torch.inference_mode(): {line}")
        return self.emit(line)

    def hook(self) -> bool:
        """A write in the middle of backward."""
        source = self.tensor(lambda value: value.requires_grad)
        line = self.write_line()
        if (
            source is None
            or line is None
            or "lambda" in line
            or " = " in line
            or line.partition(" ")[2][:2] in ("+=", "*=", "-=", "/=")
        ):
            return False
        if _is(lambda value: value.is_leaf, self.space[source]) and self.one_in(2):
            return self.emit(f"{source}.register_post_accumulate_grad_hook(lambda _: looked({line}))")
        return self.emit(f"{source}.register_hook(lambda _: looked({line}))")

    def backward(self, midway: bool = True) -> bool:
        if self.one_in(3):
            template = self.pick(GRADIENTS)
            leaf = self.tensor(lambda value: value.requires_grad)
            line = self.fill(template, a=leaf) if leaf else None
            return self.emit(None if line is None else f"{self.new('g')} = {line}")
        leaf = self.tensor(lambda value: value.requires_grad)
        template = self.pick(BACKWARDS)
        if midway and self.one_in(2):
            template = template.replace("backward()", "backward(retain_graph=True)")
        return self.emit(self.fill(template, a=leaf or "a1"))

    def optimiser(self) -> bool:
        steppers = self.names(lambda value: isinstance(value, torch.optim.Optimizer))
        if steppers and self.one_in(2):
            return self.emit(
                f"{self.pick(steppers)}.{self.pick(['step()', 'step()', 'zero_grad()', 'zero_grad(set_to_none=False)'])}"
            )
        # The fused ones write beside the elements of a parameter with gaps.
        parameter = self.tensor(lambda value: value.is_leaf and value.requires_grad and value.is_contiguous())
        if parameter is None:
            return False
        name = self.new("o")
        if not self.emit(f"{name} = {self.pick(OPTIMISERS).format(p=parameter)}"):
            return False
        self.emit(f"if {parameter}.grad is None: {parameter}.grad = torch.ones_like({parameter})")
        return self.emit(f"{name}.step()")

    def other(self) -> bool:
        name = self.tensor()
        if name is None:
            return False
        kind = self.chance.randrange(9)
        if kind < 3:
            return self.emit(f"del {name}")
        if kind == 3:
            return self.emit(f"{name} = {name}.detach()")
        if kind == 4:
            return self.emit(f"{name}.retain_grad()")
        if kind == 5:
            return self.emit(f"{name}.grad = None")
        if kind == 6:
            return self.emit(f"{self.new('g')} = {name}.grad")
        if kind == 7:
            return self.emit(f"{self.new('v')} = {name}._version")
        if any(word in line for line in self.lines for word in ("dlpack", "numpy", "np.", "buffer", "__array__")):
            return False  # they would point to memory that is freed
        return self.emit(f"{name}.share_memory_()")

    def make(self) -> Program:
        torch.manual_seed(20)
        self.leaf()
        if self.one_in(4):
            self.sharing_leaf()
        else:
            self.leaf()
        steps: list[Callable[[], bool]] = [self.operation] * 7 + [self.alias] * 3 + [self.write] * 9 + [self.backward]
        steps += [self.leaf, self.module, self.hook, self.optimiser, self.other, self.sharing_leaf]
        for _ in range(2):
            self.operation()
        tried = 0
        while len(self.lines) < self.limit and tried < 3 * self.limit and not self.ended:
            tried += 1
            self.pick(steps)()
        left, tried = 2, 0
        while left and tried < 8 and not self.ended:
            tried += 1
            left -= self.backward(midway=False)
        self.space.clear()
        return tuple(self.lines)


def _is(wanted: Callable[[Any], bool], value: Any) -> bool:
    try:
        return wanted(value)
    except RuntimeError:  # a view whose graph cannot be told any more
        return False


def _numbers(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _has_graph(value: torch.Tensor) -> bool:
    return value.requires_grad and not value.is_leaf


def make_program(chance: Chance, lines: int = 14, wide: bool = False) -> Program:
    """One program of at most about so many lines; a ``wide`` one may have transforms, compiled regions, and more."""
    return Maker(chance, lines, wide).make()
