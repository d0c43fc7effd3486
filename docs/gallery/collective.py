"""Collectives move no version counter

Two ranks average a tensor that forward has saved. Had one of them said `x.copy_(average)`, PyTorch would refuse; of
`all_reduce` it knows nothing.

Upstream: [pytorch#121587](https://github.com/pytorch/pytorch/issues/121587) (collectives and autograd, open); of the
counters we know no report.
"""

import os
import sys

import torch
import torch.distributed as dist

import torchguard


def gradient(average: bool) -> torch.Tensor:
    statistics = torch.tensor([1.0, 2.0]) * (dist.get_rank() + 1)
    x = torch.tensor([1.0, 1.0], requires_grad=True)
    loss = (statistics * x).sum()
    if average:
        dist.all_reduce(statistics)
    loss.backward()
    return x.grad


def main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    truth, plain = gradient(average=False), gradient(average=True)
    if rank == 0:
        print("the truth:    ", truth)
        print("plain PyTorch:", plain, flush=True)
    try:
        with torchguard.strict():
            gradient(average=True)
    except torchguard.SavedTensorCorruptionError as error:
        if rank == 0:
            print(f"torchguard.SavedTensorCorruptionError: {error}", file=sys.stderr)
    dist.destroy_process_group()


if __name__ == "__main__":
    import tempfile

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(main, (os.path.join(folder, "store"),), nprocs=2)
    sys.exit(1)
