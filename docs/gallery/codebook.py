"""A codebook follows the data while backward still needs it

Vector quantisation moves its code vectors towards what it has just seen, in forward, through `.data`. As long as no
gradient goes through the distances that is harmless; where one does (a loss on the distances, codes that are sampled),
backward reads the moved vectors. In vector-quantize-pytorch 1.32.0 this happens with
`commitment_use_cross_entropy_loss=True`, and with `straight_through=True` ([other people's code](others.md)).

Upstream: we know no report.
"""

import torch
import torch.nn.functional as F

import torchguard


def gradient(follow: bool) -> torch.Tensor:
    codebook = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), requires_grad=False)
    x = torch.tensor([[0.5, 1.0], [1.5, 0.5]], requires_grad=True)
    similarity = x @ codebook.t()
    nearest = similarity.argmax(dim=1)
    if follow:
        codebook.data.index_copy_(0, nearest, codebook[nearest].lerp(x.detach(), 0.2))
    F.cross_entropy(similarity, nearest).backward()
    return x.grad


print("the truth:    ", gradient(follow=False))
print("plain PyTorch:", gradient(follow=True))

with torchguard.strict():
    gradient(follow=True)
