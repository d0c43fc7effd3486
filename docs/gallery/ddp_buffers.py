"""DistributedDataParallel hides its buffer broadcast from the check

Before every forward DDP copies rank 0's buffers over those of the others. When people ran into PyTorch's refusal (two
forwards, one backward), the copy was wrapped so that the counters do not move: now the other ranks compute wrong
gradients.

Upstream: [pytorch#22095](https://github.com/pytorch/pytorch/issues/22095),
[pytorch#175024](https://github.com/pytorch/pytorch/issues/175024),
[pytorch#175851](https://github.com/pytorch/pytorch/pull/175851)
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import torchguard


class Scale(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * self.scale * x


def gradient(two_forwards: bool) -> torch.Tensor:
    model = DistributedDataParallel(Scale())
    model.module.scale.fill_(1.0 + 9 * dist.get_rank())  # each rank adapts its own
    first = model.module(torch.ones(2))
    if two_forwards:
        model(torch.ones(2))  # broadcasts rank 0's buffers before it runs
    return torch.autograd.grad(first.sum(), model.module.weight)[0]


def main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    truth, plain = gradient(two_forwards=False), gradient(two_forwards=True)
    if rank == 1:
        print("the truth:    ", truth)
        print("plain PyTorch:", plain, flush=True)
    try:
        with torchguard.strict():
            gradient(two_forwards=True)
    except torchguard.SavedTensorCorruptionError as error:
        print(f"torchguard.SavedTensorCorruptionError: {error}", file=sys.stderr)
    dist.destroy_process_group()


if __name__ == "__main__":
    import tempfile

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(main, (os.path.join(folder, "store"),), nprocs=2)
    sys.exit(1)
