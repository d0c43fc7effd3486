"""Which generated programs has the guard once treated wrongly? Each as short as it still failed."""

from __future__ import annotations

from generated.runs import Program

_KEPT = {
    "output_of_a_checkpoint_exported_after_it_was_written": """
a2 = grid(1).requires_grad_()
y3 = F.hardswish(a2)
y4 = checkpoint(Exp.apply, y3, use_reentrant=False)
y5 = y4.view_as(y4)
y5.mul_(-1)
torch.exp(dlpack.from_dlpack(dlpack.to_dlpack(y4.detach())), out=dlpack.from_dlpack(dlpack.to_dlpack(y4.detach())))
y7, y8 = torch.linalg.slogdet(y4 + 5 * torch.eye(4))
y8.sum().backward()
""",
    "output_beside_a_view_that_was_out_of_date": """
a1 = grid(2, 3).requires_grad_()
y2 = a1 * 1
y3 = y2.view_as(y2)
y2.mul_(2)
y4 = y3.exp()
""",
    "two_outputs_beside_a_view_that_was_out_of_date": """
n4 = grid(6, 4)
a3 = torch.nn.Parameter(n4[3:])
y5 = a3.expand(2, *a3.shape)
n4.masked_fill_(n4 > 0, 1)
y11, y12 = torch._foreach_sigmoid([y5, grid(3, 4)])
""",
    "output_in_place_of_what_was_copied_for_backward": """
a1 = grid(4).requires_grad_()
a2 = grid(4).requires_grad_()
y3 = a1 * 1
y3.pow_(a2)
y4 = a1.abs()
y4.hypot_(a2)
y5 = a1 * 2
y5.copysign_(a2)
""",
    "output_in_place_beside_a_view_that_was_out_of_date": """
a1 = grid(4).requires_grad_()
y2 = a1 * 1
y3 = y2.view_as(y2)
y2.mul_(2)
y4 = a1 * 1
y4.pow_(y3)
""",
    "foreach_is_named_in_a_refusal": """
a1 = grid(3, 4).t().requires_grad_()
y4, y5 = torch._foreach_exp([a1, a1])
y4.mul_(3.25)
y4.backward(torch.ones_like(y4))
""",
    "one_call_writes_to_the_save_and_to_its_alias": """
a1 = grid(4).requires_grad_()
y2 = a1.exp()
torch._foreach_mul_([y2[::2].data, y2], 2)
y2.sum().backward()
""",
    "view_written_in_place_is_swapped": """
a1 = torch.nn.Parameter(grid(3, 4))
y2 = (a1 * 1).view(12)[:4]
y2.relu_()
t3 = torch.empty(0).set_(grid(4).untyped_storage())
torch.utils.swap_tensors(t3, y2)
""",
    "tensor_swapped_with_itself_is_refused": """
a1 = torch.nn.Parameter(grid(4))
y2 = a1.exp() * 1
y3 = y2.median()
y4 = y2 * y2
torch.utils.swap_tensors(y2, y2)
""",
    "checkpoint_makes_anew_what_was_written_outside_torch": """
a1 = grid(3, 4).requires_grad_()
y2 = a1 * 1
y3 = checkpoint(Exp.apply, y2, use_reentrant=False)
np.from_dlpack(torch.empty(0).set_(y3.detach()).detach())[...] = 3.25
torch._foreach_mul_((y3.data,), [-1])
(y3.sum() + y2.sum()).backward()
""",
    "checkpoint_reads_what_was_rebound_to_the_same": """
n1 = np.linspace(-1.7, 2.3, 12, dtype=np.float32).reshape(3, 4)
a1 = torch.from_numpy(n1).requires_grad_()
y2 = F.selu(a1)
y4 = y2.softmax(-1)
y3 = checkpoint(torch.sin, y2, use_reentrant=False)
y2.data = y2.detach().clone()
(y3 * y2).sum().backward()
""",
    "leaf_that_requires_grad_is_written_by_what_has_no_derivative": """
a1 = grid(4).requires_grad_()
y2 = a1.exp()
y2.data.requires_grad_().logical_not_()
y2.sum().backward()
""",
    "leaf_that_requires_grad_is_refused": """
a1 = grid(4).requires_grad_()
y2 = a1.exp()
y2.data.requires_grad_().add_(1)
""",
    "expanded_save_over_two_exports": """
n1 = bytearray(48)
a2 = torch.frombuffer(n1, dtype=torch.float32).requires_grad_()
y3 = a2.expand(2, *a2.shape)
y4 = F.selu(y3)
y3.data[0].numpy()[0] = 3.25
y4.sum().backward()
""",
    "alias_without_a_counter": """
a1 = grid(3, 4).requires_grad_()
y2 = a1.exp()
with torch.inference_mode(): torch.neg(y2.data, out=torch.empty(0).set_(y2.detach()))
y2.sum().backward()
""",
    "detached_alias_of_a_dead_one_writes_nothing_new": """
a1 = torch.zeros(3, 4).requires_grad_()
y2 = a1 * a1
c3 = a1.data.detach()
y4 = a1 * a1
torch._C.TensorBase.mul_(c3, 0.5)
y4.sum().backward()
""",
    "users_function_writes_to_an_expanded_alias": """
a1 = grid(3, 4).requires_grad_()
y2 = a1.expand(2, *a1.shape)
y3 = torch.linalg.norm(y2)
torch.from_dlpack(y2.detach()).map_(torch.from_dlpack(y2.detach()), lambda first, second: first + 1)
y3.sum().backward()
""",
    "input_and_output_of_one_kind": """
a1 = grid(12).requires_grad_()
y2 = a1.cumprod(-1)
y3 = y2.cumprod(-1)
y2.data = y2.data.clone() * 2
y3.sum().backward()
""",
    "view_made_without_grad_mode_is_written_to": """
a1 = grid(4, dtype=torch.complex64).requires_grad_()
y2 = a1 * a1
a3 = torch.nn.Parameter(torch.from_numpy(a1.detach().numpy()))
o4 = torch.optim.ASGD([a3])
a3.grad = torch.ones_like(a3)
o4.step()
y2.abs().sum().backward()
""",
    "one_element_with_a_stride": """
n1 = bytearray(48)
a2 = torch.frombuffer(n1, dtype=torch.float32).requires_grad_()
y3 = torch.atleast_2d(a2).diagonal()
y4, y5 = torch._foreach_mul([grid(3, 2), y3], [y3, grid(3, 2)])
y4.sum().backward()
""",
    "argument_of_a_checkpoint_is_rebound": """
a1 = grid(4).requires_grad_()
y2 = a1.exp()
y3 = checkpoint(torch.sin, y2, use_reentrant=False)
y2.data = torch.zeros(4)
y3.sum().backward()
""",
    "argument_of_a_checkpoint_is_named_in_a_refusal": """
a1 = grid(1, 4)
a2 = grid().requires_grad_()
y3 = torch.minimum(a1, a2)
y9 = checkpoint(Exp.apply, y3, use_reentrant=False)
y3.mT[y3.mT > 1e9] = 0
torch.autograd.backward([y9.sum(), y3.sum()])
""",
    "what_backward_saved_again_is_named_in_a_refusal": """
a2 = grid(4).requires_grad_()
y9 = a2.clamp(-1, 1)
y11 = F.layer_norm(y9, (4,))
g12 = torch.autograd.grad(y11.sum(), y9, create_graph=True)[0]
y9.set_(grid(4))
(g12 * g12).sum().backward()
""",
    "write_to_a_neighbour_in_the_same_buffer": """
n4 = grid(6, 4)
a2 = torch.nn.Parameter(n4[:3])
a3 = torch.nn.Parameter(n4[3:])
y5 = a3.std()
with torch.inference_mode(): a2 **= 2
y5.pow(2).sum().backward(retain_graph=True)
""",
    "tracked_write_that_changes_nothing_then_a_freed_graph": """
n4 = bytearray(48)
a2 = torch.frombuffer(n4, dtype=torch.float32).requires_grad_()
y5 = a2.kthvalue(1, 0)[0]
y7 = torch.lerp(a2, y5, y5)
y5.abs().sum().backward()
y8 = y7.sigmoid()
y8.fill_(0.5)
y8.sum().backward()
""",
    "set_to_a_copy_of_itself": """
a2 = grid(3, 4).requires_grad_()
y3 = a2 * a2
with torch.no_grad(): a2.set_(a2.detach().clone())
y3.sum().backward(create_graph=True)
""",
    "step_over_what_a_pair_of_hooks_keeps": """
n4 = bytearray(48)
a2 = torch.frombuffer(n4, dtype=torch.float32).requires_grad_()
with saving('same'): y7 = a2 * a2
o8 = torch.optim.Adadelta([a2])
if a2.grad is None: a2.grad = torch.ones_like(a2)
o8.step()
y7.abs().sum().backward()
""",
    "write_over_what_a_pair_of_hooks_copied": """
a2 = grid(3, 4).requires_grad_()
with saving('copied'): y3 = a2 * a2
a2.data.mul_(2)
y3.sum().backward()
""",
    "what_a_transform_saved_cannot_be_copied_when_it_is_over": """
a2 = grid(12).requires_grad_()
y6 = transformed(torch.func.hessian(lambda x: (x ** 3).sum()), a2)
torch.nn.init.zeros_(torch.empty(0).set_(a2.detach()))
y12 = Product.apply(y6, y6)
y12.sum().backward(create_graph=True)
""",
    "repaired_it_ends_in_a_cycle_of_its_own": """
a2 = grid(4, dtype=torch.float64).requires_grad_()
y5 = F.glu(a2)
with torch.no_grad(): a2.scatter_(0, torch.zeros_like(a2[:1], dtype=torch.long), 0)
y5.sum().backward(create_graph=True)
""",
    "repaired_it_keeps_what_is_no_save_of_its_own": """
a1 = grid(3, 4, dtype=torch.bfloat16)
a2 = grid(4, 3, dtype=torch.bfloat16).t().contiguous().requires_grad_()
y3 = F.threshold(a2, 0.1, 0.0)
y3 = y3.scatter_reduce(0, torch.zeros(3, 4, dtype=torch.long), a1, "prod")
y3.squeeze_()
y3.sum().backward(create_graph=True)
""",
    "what_would_be_refused_hides_a_later_write": """
n4 = bytearray(48)
a2 = torch.frombuffer(n4, dtype=torch.float32).requires_grad_()
y5, y6 = torch._foreach_tanh([a2, a2])
y7 = y5.cumprod(-1)
y7 **= 2
y8 = y7 * 3
y6.register_hook(lambda _: looked(torch.normal(0.0, 1.0, y5.data.t().shape, out=y5.data.t())))
torch.autograd.backward([y6.sum(), y8.sum()])
""",
    "saves_without_an_element": """
a1 = grid(0, 4, dtype=torch.complex64)
y3 = a1.abs().log1p()
y5 = F.hardswish(y3)
m6 = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Tanh())
y7 = m6(y5)
a8 = m6.get_parameter('1.weight')
y10 = F.softplus(y7)
with torch.no_grad(): a8[a8 > 0] = 2
torch.nn.init.eye_(y5)
y10.sum().backward()
""",
    "written_in_inference_mode": """
a2 = grid(1, 4).requires_grad_()
y3 = torch.linalg.svdvals(a2)
with torch.inference_mode(): torch.nn.Parameter(y3)[:] = 3.25
y9 = F.l1_loss(y3, a2)
y9.abs().sum().backward()
""",
    "rebinding_to_integers_is_refused": """
a2 = grid(3, 1).requires_grad_()
y3 = a2.mT @ a2
y3.register_hook(lambda _: looked(torch.nn.utils.vector_to_parameters(torch.full((12,), 1), [y3])))
y7 = torch.addmm(y3, y3, y3)
c11 = y3
c11.sum().backward()
""",
    "out_and_gradients_do_not_go_together": """
a1 = grid(3, 4).requires_grad_()
with saving('detached'): y3 = F.interpolate(a1.reshape(1, 1, -1), scale_factor=2)
y5 = F.mish(y3)
torch.sigmoid(y3.expand_as(torch.from_dlpack(y3.data)), out=torch.from_dlpack(y3.data))
""",
    "tracked_write_by_an_operator_in_a_thread": """
a2 = grid(4, 3).t().contiguous().requires_grad_()
y3 = checkpoint(Exp.apply, a2, use_reentrant=False)
y4 = F.mish(y3)
y5 = y4 ** y3
in_thread(lambda: torch.ops.aten.mul_(y4, -1))
torch.nn.Parameter(y3.data).data *= 0.5
torch.autograd.backward([y5.sum(), y5.sum()])
""",
    "view_that_was_out_of_date_is_detached": """
n4 = bytearray(48)
a2 = torch.frombuffer(n4, dtype=torch.float32).requires_grad_()
y5 = a2.view_as(a2)
y6 = y5 / y5
with torch.no_grad(): a2.add_(1)
with torch.inference_mode(): y5.detach_()
y6.sum().backward()
""",
    "memory_that_others_hold_is_saved_inside_a_transform": """
a1 = grid(1).requires_grad_()
n2 = np.linspace(-1.7, 2.3, 12, dtype=np.float32).reshape(3, 4)
a3 = torch.from_numpy(n2)
y4 = transformed(torch.func.grad(lambda x, w: (x * w).square().sum(), argnums=1), a1, a3)
np.copyto(n2, 3.25)
y4.sum().backward()
""",
    "memory_that_others_hold_is_written_after_a_transform_was_read": """
a1 = grid(1).requires_grad_()
n2 = np.linspace(-1.7, 2.3, 12, dtype=np.float32).reshape(3, 4)
a3 = torch.from_numpy(n2)
y4 = transformed(torch.func.grad(lambda x, w: (x * w).square().sum(), argnums=1), a1, a3)
y4.sum().backward()
np.copyto(n2, 3.25)
""",
    "what_a_pullback_saved_is_written_to": """
a1 = grid(3, 4)
a2 = grid(3, 4).requires_grad_()
y3 = transformed(lambda x, w: torch.func.vjp(torch.mul, x, w)[1](x * w)[1], a2, a1)
with torch.no_grad(): a2.add_(1)
y3.sum().backward()
""",
    "what_a_pullback_saved_is_silently_written_to": """
a1 = grid(3, 4)
a2 = grid(3, 4).requires_grad_()
y3 = transformed(lambda x, w: torch.func.vjp(torch.mul, x, w)[1](x * w)[1], a2, a1)
a2.data.add_(1)
y3.sum().backward()
""",
    "what_a_pullback_saved_is_differentiated_three_times": """
a1 = grid(3, 4)
a2 = grid(3, 4).requires_grad_()
y3 = transformed(lambda x, w: torch.func.vjp(torch.mul, x, w)[1](x * w)[1], a2, a1)
g4 = torch.autograd.grad((y3 * y3).sum(), a2, create_graph=True)[0]
(g4 * g4).sum().backward()
""",
    "what_a_checkpoint_recomputes_from_is_not_what_a_double_backward_saves": """
a2 = grid(3, 4, dtype=torch.float16).requires_grad_()
y3 = a2.prod(0)
y4 = y3 + 1
y4.retain_grad()
y6 = checkpoint(Product.apply, y3, y4, use_reentrant=False)
g14 = torch.autograd.grad(y6, y3, torch.ones_like(y6), create_graph=True)[0]
""",
    "what_lies_beside_the_argument_of_a_checkpoint_is_read_again": """
n4 = grid(6, 4)
a2 = torch.nn.Parameter(n4[:3])
a3 = torch.nn.Parameter(n4[3:])
y6 = region(lambda x, w: checkpoint(lambda y: bent(y, w), x, use_reentrant=False), a2, a3)
with torch.no_grad(): torch.nn.Parameter(a3.data).tril_()
y6.abs().sum().backward()
""",
    "step_over_what_lies_beside_the_argument_of_a_checkpoint": """
n4 = grid(6, 4)
a2 = torch.nn.Parameter(n4[:3])
a3 = torch.nn.Parameter(n4[3:])
y6 = region(lambda x, w: checkpoint(lambda y: bent(y, w), x, use_reentrant=False), a2, a3)
o10 = torch.optim.SGD([a3], lr=0.1)
if a3.grad is None: a3.grad = torch.ones_like(a3)
o10.step()
y6.pow(2).sum().backward(retain_graph=True)
""",
    "checkpoint_closes_over_its_own_argument": """
n4 = np.linspace(-1.7, 2.3, 12, dtype=np.float32).reshape(3, 4)
a2 = torch.from_numpy(n4).requires_grad_()
y5 = a2.gather(-1, torch.zeros(3, 2, dtype=torch.long))
y6 = region(lambda x, w: checkpoint(lambda y: bent(y, w), x, use_reentrant=False), y5, y5)
y5 **= 2
torch.autograd.backward([y6.sum(), y5.sum()])
""",
    "no_gradient_flows_to_a_checkpoint_that_reads_what_was_written": """
a2 = grid(5, 4)[1:4].requires_grad_()
y4, y5 = a2.chunk(2, -1)
n9 = grid(3, 8)
a7 = n9[:, ::2].requires_grad_()
y10 = region(lambda x, w: checkpoint(lambda y: y.exp() + w * w, x, use_reentrant=True), a7, a2)
F.relu_(y4.data.view(torch.int32))
y13, y14 = torch._foreach_sigmoid([y10, n9])
y14.sum().backward(retain_graph=True)
""",
    "pointed_at_what_inference_mode_made": """
a2 = torch.nn.Parameter(grid(0, 4, dtype=torch.float64).mT)
y4 = F.hardtanh(a2)
y8 = y4.std()
c13 = y4
with torch.inference_mode(): torch.nn.utils.vector_to_parameters(torch.full((c13.numel(),), 3.25), [c13])
g17 = torch.autograd.grad(y8, y4, torch.eye(y8.numel()).reshape(-1, *y8.shape), is_grads_batched=True)[0]
""",
    "rebound_to_the_same_under_hooks_that_return_a_key": """
a2 = grid(1, 4, dtype=torch.float64).requires_grad_()
y3 = F.hardtanh(a2)
with saving('keyed'): y4 = F.cosine_similarity(a2, y3, dim=-1)
y3.data = y3.detach().clone()
torch.autograd.backward([y3.sum(), y4.sum()])
""",
    "reshaped_in_place_under_hooks_that_return_a_key": """
a1 = torch.nn.Parameter(grid(3, 1))
with saving('keyed'): y3 = a1.logcumsumexp(0)
y3.unsqueeze_(0)
(y3.sum() + y3.sum()).backward()
""",
    "repaired_it_ends_in_the_cycle_that_pytorch_makes": """
a2 = grid(3, 4).requires_grad_()
y3 = a2.max()
c6 = y3.data
y7, y8 = torch._foreach_div([c6, y3], [y3, c6])
o14 = torch.optim.ASGD([a2])
if a2.grad is None: a2.grad = torch.ones_like(a2)
o14.step()
y7.sum().backward(create_graph=True)
""",
    "zeros_that_take_no_memory_are_saved_inside_a_transform": """
a2 = torch.nn.Parameter(grid(4, 4, dtype=torch.bfloat16))
y3 = transformed(torch.func.hessian(lambda x: (x ** 3).sum()), a2)
y4 = y3.tile(2)
a2.data.mul_(2)
y4.logsumexp(0).sum().backward()
""",
    "what_a_transform_saved_is_rebound": """
a1 = grid(3, 4).t().requires_grad_()
y3 = transformed(torch.func.vmap(lambda x, w: x.exp() * w), a1, a1)
y6 = transformed(torch.func.vmap(torch.func.grad(lambda x, w: (x * w).square().sum())), y3, y3)
y10, y11 = y3.min(0)
y3.data = y10.detach()
""",
    "repair_leaves_what_was_rebound_and_then_written_to_pytorch": """
a2 = torch.nn.Parameter(grid(3, 4))
y3 = Viewed.apply(a2 * 1)
y3.data = y3 * 2
y5 = y3.clone().mul_(a2)
with torch.inference_mode(): F.threshold(y3, 0.0, 1.0, inplace=True)
y6 = F.huber_loss(y5, y5)
o7 = torch.optim.NAdam([a2])
if a2.grad is None: a2.grad = torch.ones_like(a2)
o7.step()
(y6.sum() + y6.sum()).backward()
""",
    "gradient_of_nothing_is_what_was_saved": """
a8 = grid(0, 4, dtype=torch.float16).requires_grad_()
y11 = a8.cummax(-1).values
y11.sum().backward(retain_graph=True)
y11.pow(2).sum().backward(retain_graph=True)
(y11 * y11.detach()).sum().backward()
""",
    "write_to_nothing_is_refused": """
a8 = grid(0, 4, dtype=torch.float16).requires_grad_()
y11 = a8.cummax(-1).values
with torch.no_grad(): a8.mul_(2)
y11.sum().backward()
""",
    "compiled_output_is_written_and_differentiated_twice": """
a2 = torch.nn.Parameter(grid(4, 4).mT)
y3 = region(made_by("aot_eager", written_inside), a2, a2)
torch.nn.init.zeros_(torch.from_dlpack(y3.data))
g13 = torch.autograd.grad(y3.sum(), a2, create_graph=True)[0]
g14 = torch.autograd.grad(g13.sum(), y3, allow_unused=True, materialize_grads=True)[0]
""",
    "argument_of_a_checkpoint_is_reshaped_in_place": """
n4 = bytearray(48)
a2 = torch.frombuffer(n4, dtype=torch.float32).requires_grad_()
y5 = Cube.apply(a2)
y6 = checkpoint(torch.sin, y5, use_reentrant=False)
y5.unsqueeze_(0)
y6.backward(torch.ones_like(y6))
""",
    "norm_of_a_norm_is_refused_in_the_name_of_the_write": """
a2 = grid(2, 3, 4, dtype=torch.float64).requires_grad_()
y3 = torch.linalg.vector_norm(a2, 3, 0)
y4 = y3.norm(dim=-1)
torch.fill_(y3, 1)
g14 = torch.autograd.grad(y4.sum(), a2, allow_unused=True, materialize_grads=True)[0]
""",
    "what_inference_mode_made_is_read_in_the_place_of_what_was_saved": """
a2 = grid(5, 4)[1:4].requires_grad_()
y3 = a2.clamp(-1, 1)
y4 = y3.std()
torch._foreach_zero_([a2.split(2)[0].data.view(torch.int32)])
with torch.inference_mode(): y3.data = y3.data.mT.contiguous().mT
y4.sum().backward()
""",
    "what_repair_goes_on_with_outlives_it_as_it_would_without": """
a2 = grid(3, 4).requires_grad_()
y3 = a2 ** 3
y4 = y3.abs().rsqrt()
y3.sum().backward(inputs=[y4], retain_graph=True)
m5 = torch.nn.Linear(4, 4)
y6 = m5(y4)
with torch.no_grad(): torch.normal(0.0, 1.0, y4.shape, out=y4)
y6.sum().backward(create_graph=True)
""",
    "checkpoint_of_a_weight_that_became_another_dtype": """
a1 = grid(2, 3, 4)
a2 = grid(5, 4, dtype=torch.float64)[1:4].requires_grad_()
y4 = region(lambda x, w: checkpoint(lambda y: bent(y, w), x, use_reentrant=False), a1, a2)
torch._foreach_copy_([torch.asarray(torch.ops.aten.alias(a1).detach().numpy())], [y4])
torch.nn.utils.vector_to_parameters(torch.full((a2.numel(),), 0.5), [a2])
y4.backward(torch.ones_like(y4))
""",
    "rebound_to_the_same_bytes_saved_twice_once_under_a_key": """
a2 = grid(1, 4).requires_grad_()
y3 = F.hardtanh(a2)
with saving('keyed'): y4 = a2 * y3
y6 = y3.cos()
y3.data = y3.detach().clone()
y4.sum().backward()
""",
    "counted_write_and_then_another_memory": """
a2 = grid(3, 4, dtype=torch.float16).requires_grad_()
y3 = F.silu(a2)
o5 = torch.optim.Rprop([a2])
if a2.grad is None: a2.grad = torch.ones_like(a2)
o5.step()
torch.nn.utils.vector_to_parameters(torch.full((12,), 0.5), [a2])
y3.abs().sum().backward()
""",
}

KEPT: dict[str, Program] = {name: tuple(text.strip().splitlines()) for name, text in _KEPT.items()}
