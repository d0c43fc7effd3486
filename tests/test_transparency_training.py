"""Do optimisers, parametrisations, autocast and whole models train to the same bits with the guard on as off?"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_transparency import attempt, transparent
from torch import nn
from torch.nn.utils import (
    clip_grad_norm_,
    clip_grad_value_,
    parameters_to_vector,
    parametrizations,
    parametrize,
    prune,
    spectral_norm,
    vector_to_parameters,
    weight_norm,
)
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

pytestmark = pytest.mark.filterwarnings("ignore")


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))


def train(model: nn.Module, optimiser: torch.optim.Optimizer, steps: int = 5) -> list[torch.Tensor]:
    losses = []
    for _ in range(steps):

        def closure() -> torch.Tensor:
            optimiser.zero_grad()
            loss = F.cross_entropy(model(torch.randn(6, 4)), torch.arange(6) % 2)
            loss.backward()
            return loss

        losses.append(optimiser.step(closure).detach().clone())
    return losses


OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "SGD foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "Adam foreach": lambda p: torch.optim.Adam(p, 0.01, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True, maximize=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, 0.01, fused=True),
    "differentiable": lambda p: torch.optim.SGD(p, 0.1, differentiable=False, foreach=False),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.1, centered=True),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "ASGD": lambda p: torch.optim.ASGD(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam foreach": lambda p: torch.optim.RAdam(p, foreach=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, max_iter=3),
}


@transparent
@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers(name: str) -> Any:
    model = mlp()
    optimiser = OPTIMISERS[name](model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimiser, 2)
    losses = train(model, optimiser)
    scheduler.step()
    state = copy.deepcopy(optimiser.state_dict())
    twin = OPTIMISERS[name](model.parameters())
    twin.load_state_dict(state)
    losses += train(model, twin, 2)
    return [losses, list(model.parameters()), list(model.buffers()), state["state"]]


@transparent
def test_a_hand_written_optimiser_and_its_average() -> Any:
    model, average = mlp(), mlp()
    average.load_state_dict(model.state_dict())
    for _ in range(4):
        loss = F.cross_entropy(model(torch.randn(6, 4)), torch.arange(6) % 2)
        loss.backward()
        for p, q in zip(model.parameters(), average.parameters(), strict=True):
            p.data -= 0.1 * p.grad.data
            p.data.clamp_(-1, 1)
            p.grad.data.zero_()
            q.data.mul_(0.9).add_(p.data, alpha=0.1)
            q.data = q.data.clone()
    return [loss.detach(), list(model.parameters()), list(average.parameters())]


@transparent
def test_a_differentiable_step() -> Any:
    w, lr = torch.randn(3, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    fast = w * 1
    for _ in range(3):
        (g,) = torch.autograd.grad((fast * fast).sin().sum(), fast, create_graph=True)
        fast = fast - lr * g
    fast.sum().backward()
    return [w, lr, fast]


@transparent
def test_an_optimiser_as_a_hook() -> Any:
    model = mlp()
    optimisers = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}

    def step(p: torch.Tensor) -> None:
        optimisers[p].step()
        optimisers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        F.cross_entropy(model(torch.randn(6, 4)), torch.arange(6) % 2).backward()
    return [list(model.parameters()), [p.grad for p in model.parameters()]]


@transparent
def test_averaged_models() -> Any:
    model = mlp()
    swa, ema = AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        train(model, optimiser, 1)
        swa.update_parameters(model)
        ema.update_parameters(model)
    update_bn([torch.randn(6, 4)], swa)
    return [list(swa.parameters()), list(swa.buffers()), list(ema.parameters())]


@transparent
def test_clipping_and_vectors() -> Any:
    model = mlp()
    F.cross_entropy(model(torch.randn(6, 4)), torch.arange(6) % 2).backward()
    norm = clip_grad_norm_(model.parameters(), 0.1)
    norm2 = clip_grad_norm_(model.parameters(), 0.01, foreach=True)
    clip_grad_value_(model.parameters(), 0.001)
    vector = parameters_to_vector(model.parameters())
    vector_to_parameters(vector.detach() * 2, model.parameters())
    return [norm, norm2, list(model.parameters()), model[0].weight._version]


@transparent
@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: weight_norm(m),
        lambda m: spectral_norm(m),
        lambda m: parametrizations.weight_norm(m),
        lambda m: parametrizations.spectral_norm(m),
        lambda m: parametrizations.orthogonal(m),
        lambda m: (prune.l1_unstructured(m, "weight", 0.3) and m) or m,
        lambda m: (prune.random_structured(m, "weight", 0.3, dim=0) and m) or m,
    ],
    ids=["old weight_norm", "old spectral_norm", "weight_norm", "spectral_norm", "orthogonal", "pruned", "structured"],
)
def test_parametrised_weights(wrap: Callable[[nn.Module], nn.Module]) -> Any:
    layer = wrap(nn.Linear(4, 4))
    model = nn.Sequential(layer, nn.ReLU(inplace=True), nn.Linear(4, 2))
    losses = train(model, torch.optim.SGD(model.parameters(), 0.1), 3)
    copied = attempt(copy.deepcopy, layer)
    with parametrize.cached():
        cached = model(torch.ones(2, 4))
    if parametrize.is_parametrized(layer):
        layer.weight = torch.eye(4) if "orthogonal" in str(layer).lower() else layer.weight.detach()
        parametrize.remove_parametrizations(layer, "weight")
    return [
        losses,
        cached,
        dict(layer.named_parameters()),
        dict(layer.named_buffers()),
        list(copied.parameters()) if isinstance(copied, nn.Module) else copied,
    ]


@transparent
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_autocast(dtype: torch.dtype) -> Any:
    model = mlp()
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            out = model(torch.randn(6, 4))
            out.data.mul(1)
            with torch.autocast("cpu", enabled=False):
                loss = F.cross_entropy(out.float(), torch.arange(6) % 2)
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    with torch.autocast("cpu", dtype=dtype):
        x = torch.randn(3, 3)
        y = x @ x
        y.add_(1)
        mixed = attempt(lambda: x.addmm_(y, y))
        cached = model(torch.randn(6, 4)).dtype
    return [losses, list(model.parameters()), y, mixed, cached]


@transparent
def test_gradient_scaling() -> Any:
    model = mlp()
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, float("inf"), 1.0):
        optimiser.zero_grad()
        loss = model(torch.randn(6, 4)).sum() * factor
        scaler.scale(loss).backward()
        scaler.unscale_(optimiser)
        scaler.step(optimiser)
        scaler.update()
    return [list(model.parameters()), scaler.get_scale(), scaler.state_dict()]


@transparent
def test_models() -> Any:
    return _run_models(training=True)


@transparent(guards=["strict", "warn"])
def test_models_in_evaluation() -> Any:
    """With a function mode on the stack, as ``every_call`` has it, PyTorch leaves its fused fast paths."""
    return _run_models(training=False)


def _run_models(training: bool) -> Any:
    x = torch.randn(2, 5, 8, requires_grad=True)
    image = torch.randn(2, 3, 8, 8, requires_grad=True)
    models: list[tuple[nn.Module, Any]] = [
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (x,)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, activation="gelu"), (x,)),
        (nn.MultiheadAttention(8, 2, batch_first=True), (x, x, x)),
        (nn.LSTM(8, 4, 2, dropout=0.1, bidirectional=True), (x,)),
        (nn.GRU(8, 4), (x,)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(True), nn.MaxPool2d(2), nn.Flatten()), (image,)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Hardswish(inplace=True), nn.AdaptiveAvgPool2d(1)), (image,)),
        (nn.Sequential(nn.LayerNorm(8), nn.SiLU(inplace=True), nn.Linear(8, 8), nn.RReLU(inplace=True)), (x,)),
        (nn.Bilinear(8, 8, 3), (x, x)),
    ]  # fmt: skip
    results: list[Any] = []
    for model, inputs in models:
        model.train(training)
        if not training:
            with torch.no_grad():
                results.append(_first(model(*inputs)))
            with torch.inference_mode():
                results.append(_first(model(*inputs)).clone())
        out = _first(model(*inputs))
        (out * out).sum().backward()
        results += [out.detach(), list(model.parameters()), list(model.buffers())]
    return [*results, x.grad, image.grad]


def _first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


@transparent
def test_packed_sequences_and_embeddings() -> Any:
    embedding = nn.EmbeddingBag(5, 3, mode="sum", sparse=True)
    plain = nn.Embedding(5, 4, padding_idx=0, max_norm=1.0)
    rnn = nn.LSTM(4, 3, batch_first=True)
    tokens = torch.tensor([[1, 2, 3], [4, 1, 0]])
    packed = pack_padded_sequence(plain(tokens).clone(), [3, 2], batch_first=True)
    out, _ = pad_packed_sequence(rnn(packed)[0], batch_first=True)
    bag = embedding(tokens)
    (out.sum() + bag.square().sum()).backward()
    torch.optim.SparseAdam(embedding.parameters(), 0.1).step()
    return [out, bag, plain.weight, embedding.weight.detach(), list(rnn.parameters())]


@transparent
def test_losses() -> Any:
    x, y = torch.randn(4, 3, requires_grad=True), torch.rand(4, 3)
    target, sequence = torch.tensor([0, 1, 2, 0]), torch.randn(5, 2, 4, requires_grad=True)
    total = sum(
        [
            F.mse_loss(x, y), F.l1_loss(x, y), F.smooth_l1_loss(x, y), F.huber_loss(x, y), F.nll_loss(x.log_softmax(1), target),
            F.binary_cross_entropy_with_logits(x, y), F.kl_div(x.log_softmax(1), y), F.cosine_embedding_loss(x, y, target - 1),
            F.triplet_margin_loss(x, y, y + 1), F.multi_margin_loss(x, target), F.gaussian_nll_loss(x, y, y + 0.1),
            F.ctc_loss(sequence.log_softmax(2), torch.tensor([[1, 2], [2, 3]]), (5, 5), (2, 2)),
        ]
    )  # fmt: skip
    total.backward()
    return [total, x, sequence]


@transparent
def test_saving_and_resuming() -> Any:
    model = mlp()
    optimiser = torch.optim.Adam(model.parameters())
    losses = train(model, optimiser, 2)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "whole": model}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    again = mlp()
    again.load_state_dict(loaded["model"])
    resumed = torch.optim.Adam(again.parameters())
    resumed.load_state_dict(loaded["optimiser"])
    return [losses, train(again, resumed, 2), list(again.parameters()), list(loaded["whole"].parameters())]


@transparent
def test_random_numbers_are_drawn_as_ever() -> Any:
    leaf = torch.ones(4, requires_grad=True)
    kept = leaf.exp()
    x = torch.zeros(4)
    x.normal_().uniform_().bernoulli_(0.5).exponential_()
    F.dropout(x, 0.5, inplace=True)
    F.rrelu(x, training=True, inplace=True)
    x.data.random_(10)
    x.data.geometric_(0.5)
    nn.init.xavier_uniform_(torch.empty(3, 3))
    return [x, torch.rand(3), torch.get_rng_state(), kept]


@transparent
def test_generators_are_drawn_from_as_ever() -> Any:
    """By keyword or by position, where the guard has to try the call on a copy first: no zero becomes another number."""
    found: list[Any] = []
    for draw in (
        lambda y, g: y.bernoulli_(0.0, generator=g),
        lambda y, g: torch.bernoulli(torch.zeros(4), generator=g, out=y),
        lambda y, g: torch.rrelu_(y, 0.1, 0.3, True, g),
        lambda y, g: torch._C._nn.rrelu_with_noise_(y, torch.empty(4), 0.1, 0.3, True, g),
    ):
        generator = torch.Generator().manual_seed(3)
        y = torch.zeros(4, requires_grad=True) * 1
        kept = y * y
        draw(y.data, generator)
        found += [y.detach().clone(), torch.rand(3, generator=generator), generator.get_state(), kept]
    return found


@transparent
def test_flags_are_left_alone() -> Any:
    leaf = torch.ones(4, requires_grad=True)
    seen: list[Any] = []

    def flags() -> list[Any]:
        return [
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_anomaly_enabled(),
        ]

    seen.append(flags())
    with torch.no_grad():
        kept = leaf.data
        kept.add_(1)
        seen.append(flags())
    out = leaf.exp()
    seen.append(flags())
    attempt(lambda: out.add_(1).sum().backward())
    seen.append(flags())
    return seen
