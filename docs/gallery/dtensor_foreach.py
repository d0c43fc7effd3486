"""`_foreach_` operations on DTensors move no counter of the DTensor

The local shard's counter moves, that of the DTensor, which autograd saved, does not.

Upstream: [pytorch#197502](https://github.com/pytorch/pytorch/pull/197502)
"""

import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

import torchguard


def gradient(step: bool) -> torch.Tensor:
    mesh = init_device_mesh("cpu", (1,))
    w = torch.nn.Parameter(distribute_tensor(torch.tensor([1.0, 2.0]), mesh, [Replicate()]))
    x = distribute_tensor(torch.tensor([3.0, 4.0]), mesh, [Replicate()]).requires_grad_()
    loss = (w * x).sum()
    if step:
        with torch.no_grad():
            torch._foreach_mul_([w], 10.0)
    loss.backward()
    return x.grad.to_local()


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
print("the truth:    ", gradient(step=False))
print("plain PyTorch:", gradient(step=True))

with torchguard.strict():
    gradient(step=True)
