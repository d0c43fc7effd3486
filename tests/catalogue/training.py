"""Training as people write it: optimisers by hand, clipped weights, averaged weights, two losses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import Run, add, program
from torch import nn

Step = Callable[[nn.Module], Any]


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))


def _loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).pow(2).mean()  # saved


def _state(model: nn.Module) -> list[Any]:
    return [p.detach().clone() for p in model.parameters()] + [p.grad for p in model.parameters()]


# ---- a silent step: right after backward, wrong before it ---------------------------------------------------------


def _sgd(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.sub_(0.1 * p.grad)  # written


def _sgd_with_alpha(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.add_(p.grad, alpha=-0.1)  # written


def _sgd_by_operator(model: nn.Module) -> None:
    for p in model.parameters():
        p.data -= 0.1 * p.grad  # written


def _adam(model: nn.Module) -> None:
    for p in model.parameters():
        mean, square = 0.1 * p.grad, 0.001 * p.grad * p.grad
        p.data.addcdiv_(mean, square.sqrt().add_(1e-8), value=-0.1)  # written


def _foreach(model: nn.Module) -> None:
    parameters = [p.data for p in model.parameters()]
    torch._foreach_add_(parameters, [p.grad for p in model.parameters()], alpha=-0.1)  # written


def _clip(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.clamp_(-0.05, 0.05)  # written


def _decay(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(0.9)  # written


def _renorm(model: nn.Module) -> None:
    for p in model.parameters():
        if p.dim() > 1:
            p.data.renorm_(2, 0, 0.1)  # written


def _noise(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.add_(0.5)  # written


def _prune(model: nn.Module) -> None:
    for p in model.parameters():
        p.data[p.data.abs() < 0.3] = 0  # written


def _soft_update(model: nn.Module) -> None:
    torch.manual_seed(7)
    for p, q in zip(model.parameters(), _model().parameters(), strict=True):
        p.data.copy_(0.5 * p.data + 0.5 * q.data)  # written


def _load(model: nn.Module) -> None:
    torch.manual_seed(7)
    for p, q in zip(model.parameters(), _model().parameters(), strict=True):
        p.data.copy_(q)  # written


def _initialise(model: nn.Module) -> None:
    for p in model.parameters():
        nn.init.uniform_(p.data)  # written


STEPS: tuple[Step, ...] = (
    _sgd,
    _sgd_with_alpha,
    _sgd_by_operator,
    _adam,
    _foreach,
    _clip,
    _decay,
    _renorm,
    _noise,
    _prune,
    _soft_update,
    _load,
    _initialise,
)


def _steps() -> None:
    for step in STEPS:
        name = f"step{step.__name__}"

        def after_backward(run: Run, step: Step = step) -> Any:
            model, x = _model(), torch.randn(6, 4)
            losses = []
            for _ in range(3):
                model.zero_grad()
                loss = _loss(model, x)
                loss.backward()
                run.write(step, model)
                losses.append(loss.detach())
            return [*losses, *_state(model)]

        def before_backward(run: Run, step: Step = step) -> Any:
            model, x = _model(), torch.randn(6, 4)
            _loss(model, x).backward()
            loss = _loss(model, x)
            run.write(step, model)
            loss.backward()
            return [p.grad for p in model.parameters()]

        corrupting = f"{name}_before_backward"
        add(before_backward, name=corrupting, route="training", kind="corrupting", exact=False)
        add(
            after_backward,
            name=f"{name}_after_backward",
            route="training",
            kind="innocent",
            truth="cloned saves",
            twin_of=corrupting,
        )


_steps()


# ---- PyTorch's optimisers -----------------------------------------------------------------------------------------

OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, foreach=False),
    "sgd_foreach": lambda p: torch.optim.SGD(p, 0.1, foreach=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.1, foreach=False),
    "adam_foreach": lambda p: torch.optim.Adam(p, 0.1, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
}
FUSED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, fused=True),
}


def _optimisers() -> None:
    def between(run: Run, make: Any) -> Any:
        model, x = _model(), torch.randn(6, 4)
        optimiser = make(model.parameters())
        _loss(model, x).backward()
        loss = _loss(model, x)
        run.write(lambda: optimiser.step())
        loss.backward()
        return [p.grad for p in model.parameters()]

    def after(run: Run, make: Any) -> Any:
        model, x = _model(), torch.randn(6, 4)
        optimiser = make(model.parameters())
        for _ in range(3):
            optimiser.zero_grad()
            _loss(model, x).backward()
            run.write(lambda: optimiser.step())
        return _state(model)

    route = "torch.optim"
    for name, make in OPTIMISERS.items():
        add(
            lambda run, make=make: between(run, make),
            name=f"optimiser_{name}_before_backward",
            route=route,
            kind="refused",
        )
        add(
            lambda run, make=make: after(run, make),
            name=f"optimiser_{name}",
            route=route,
            kind="innocent",
            truth="cloned saves",
        )
    for name, make in FUSED.items():
        full = f"optimiser_fused_{name}_before_backward"
        add(lambda run, make=make: between(run, make), name=full, route=route, kind="corrupting", exact=False)
        add(
            lambda run, make=make: after(run, make),
            name=f"optimiser_fused_{name}",
            route=route,
            kind="innocent",
            truth="cloned saves",
            twin_of=full,
        )


_optimisers()


@program(route="torch.optim", kind="innocent", truth="cloned saves")
def optimiser_in_backward_hooks(run: Run) -> Any:
    """``register_post_accumulate_grad_hook``: each parameter is updated as soon as its gradient is there."""
    model, x = _model(), torch.randn(6, 4)

    def update(p: torch.Tensor) -> None:
        run.write(lambda: p.data.sub_(0.1 * p.grad))
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(update)
    for _ in range(3):
        _loss(model, x).backward()
    return [p.detach() for p in model.parameters()]


@program(route="torch.optim", kind="innocent", truth="cloned saves", twin_of="step_sgd_before_backward")
def gradients_accumulated_and_applied(run: Run) -> Any:
    model = _model()
    for _ in range(2):
        for _ in range(3):
            (_loss(model, torch.randn(6, 4)) / 3).backward()
        run.write(_sgd, model)
        for p in model.parameters():
            p.grad.data.zero_()
    return _state(model)


@program(route="training", kind="corrupting")
def clipped_between_two_accumulated_losses_made_before(run: Run) -> Any:
    model = _model()
    one, two = _loss(model, torch.randn(6, 4)), _loss(model, torch.randn(6, 4))
    one.backward()
    run.write(_clip, model)
    two.backward()
    return [p.grad for p in model.parameters()]


@program(
    route="training",
    kind="innocent",
    truth="cloned saves",
    twin_of="clipped_between_two_accumulated_losses_made_before",
)
def clipped_between_two_losses_made_one_after_the_other(run: Run) -> Any:
    model = _model()
    _loss(model, torch.randn(6, 4)).backward()
    run.write(_clip, model)
    _loss(model, torch.randn(6, 4)).backward()
    return _state(model)


# ---- a weight of a term of the loss that adapts itself ---------------------------------------------------------


class _Penalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight_of_penalty = nn.Buffer(torch.tensor(0.5))

    def forward(self, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return _loss(model, x) + self.weight_of_penalty * sum(p.pow(2).sum() for p in model.parameters())  # saved

    def adapt(self) -> None:
        self.weight_of_penalty.data *= 2.0  # written


@program(route="training", kind="corrupting")
def penalty_adapted_before_backward(run: Run) -> Any:
    model, penalised = _model(), _Penalised()
    loss = penalised(model, torch.randn(6, 4))
    run.write(penalised.adapt)
    loss.backward()
    return [p.grad for p in model.parameters()]


@program(route="training", kind="innocent", truth="cloned saves", twin_of="penalty_adapted_before_backward")
def penalty_adapted_after_backward(run: Run) -> Any:
    model, penalised = _model(), _Penalised()
    for _ in range(3):
        penalised(model, torch.randn(6, 4)).backward()
        run.write(penalised.adapt)
    return _state(model)


# ---- GAN ----------------------------------------------------------------------------------------------------------


@program(route="training", kind="corrupting", exact=False)
def wgan_critic_clipped_between_forward_and_backward(run: Run) -> Any:
    critic, generator = _model(), nn.Linear(2, 4)
    fake = generator(torch.randn(6, 2))  # saved
    loss = critic(fake).mean() - critic(torch.randn(6, 4)).mean()  # saved
    run.write(_clip, critic)
    loss.backward()
    return [p.grad for p in (*critic.parameters(), *generator.parameters())]


@program(
    route="training",
    kind="innocent",
    truth="cloned saves",
    twin_of="wgan_critic_clipped_between_forward_and_backward",
)
def wgan_critic_clipped_after_its_step(run: Run) -> Any:
    critic, generator = _model(), nn.Linear(2, 4)
    optimiser = torch.optim.RMSprop(critic.parameters(), 0.01)
    for _ in range(3):
        optimiser.zero_grad()
        fake = generator(torch.randn(6, 2)).detach()
        (critic(fake).mean() - critic(torch.randn(6, 4)).mean()).backward()
        optimiser.step()
        run.write(_clip, critic)
    (-critic(generator(torch.randn(6, 2))).mean()).backward()
    return _state(critic) + [p.grad for p in generator.parameters()]


# ---- averaged weights and target networks -------------------------------------------------------------------------


def _follow(target: nn.Module, model: nn.Module) -> None:
    for p, q in zip(target.parameters(), model.parameters(), strict=True):
        p.data.mul_(0.9).add_(q.data, alpha=0.1)  # written


@program(route="training", kind="innocent", truth="cloned saves", twin_of="step_soft_update_before_backward")
def averaged_copy(run: Run) -> Any:
    model = _model()
    average = copy.deepcopy(model)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimiser.zero_grad()
        _loss(model, torch.randn(6, 4)).backward()
        optimiser.step()
        run.write(_follow, average, model)
    return _state(model) + _state(average)


@program(route="training", kind="innocent", truth="cloned saves", twin_of="step_soft_update_before_backward")
def averaged_copy_updated_before_backward(run: Run) -> Any:
    """Another network's memory: nothing that backward reads."""
    model = _model()
    average = copy.deepcopy(model)
    loss = _loss(model, torch.randn(6, 4))
    run.write(_follow, average, model)
    loss.backward()
    return _state(model) + [p.detach() for p in average.parameters()]


@program(route="training", kind="unread", truth="cloned saves")
def target_network_updated_with_next_q_still_bound(run: Run) -> Any:
    """``next_q`` was not detached: the target's weights are saved, and no backward ever reads them."""
    model = _model()
    target = copy.deepcopy(model)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    state, following = torch.randn(6, 4), torch.randn(6, 4)
    next_q = target(following)
    loss = F.mse_loss(model(state), 1 + 0.9 * next_q.detach())
    loss.backward()
    optimiser.step()
    run.write(_follow, target, model)
    return _state(model) + [next_q.detach()]


@program(route="training", kind="corrupting", exact=False)
def target_network_updated_before_a_backward_through_it(run: Run) -> Any:
    model = _model()
    target = _model()
    state = torch.randn(6, 4, requires_grad=True)
    loss = F.mse_loss(model(state), target(state))  # saved
    run.write(_scale, target)
    loss.backward()
    return [state.grad]


def _scale(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.mul_(2)  # written


@program(
    route="training",
    kind="innocent",
    truth="cloned saves",
    twin_of="target_network_updated_before_a_backward_through_it",
)
def target_network_under_no_grad(run: Run) -> Any:
    model = _model()
    target = copy.deepcopy(model)
    for _ in range(3):
        state = torch.randn(6, 4)
        with torch.no_grad():
            next_q = target(state)
        loss = F.mse_loss(model(state), next_q)
        run.write(_follow, target, model)
        loss.backward()
    return _state(model)


# ---- perturbed and restored ---------------------------------------------------------------------------------------


@program(route="training", kind="unread")
def perturbed_and_restored_before_backward(run: Run) -> Any:
    model = _model()
    loss = _loss(model, torch.randn(6, 4))
    old = [p.data.clone() for p in model.parameters()]

    def perturb() -> None:
        for p in model.parameters():
            p.data.add_(1)  # written

    def restore() -> None:
        for p, value in zip(model.parameters(), old, strict=True):
            p.data.copy_(value)  # written

    run.write(perturb)
    with torch.no_grad():
        model(torch.ones(1, 4))
    run.write(restore)
    loss.backward()
    return [p.grad for p in model.parameters()]


@program(route="training", kind="innocent", truth="cloned saves", twin_of="step_noise_before_backward")
def sharpness_aware_step(run: Run) -> Any:
    """SAM: climb, take the gradient there, come back."""
    model, x = _model(), torch.randn(6, 4)
    for _ in range(2):
        model.zero_grad()
        _loss(model, x).backward()
        steps = [0.05 * p.grad for p in model.parameters()]

        def climb(steps: list[torch.Tensor] = steps) -> None:
            for p, step in zip(model.parameters(), steps, strict=True):
                p.data.add_(step)

        def descend(steps: list[torch.Tensor] = steps) -> None:
            for p, step in zip(model.parameters(), steps, strict=True):
                p.data.sub_(step)

        run.write(climb)
        model.zero_grad()
        _loss(model, x).backward()
        run.write(descend)
        run.write(_sgd, model)
    return _state(model)


@program(route="training", kind="innocent", truth="cloned saves", twin_of="step_noise_before_backward")
def weights_binarised_around_forward_and_backward(run: Run) -> Any:
    model, x = _model(), torch.randn(6, 4)
    for _ in range(2):
        own = [p.data.clone() for p in model.parameters()]

        def binarise() -> None:
            for p in model.parameters():
                p.data.sign_()

        def restore(own: list[torch.Tensor] = own) -> None:
            for p, value in zip(model.parameters(), own, strict=True):
                p.data.copy_(value)

        run.write(binarise)
        _loss(model, x).backward()
        run.write(restore)
    return _state(model)


# ---- one flat buffer ----------------------------------------------------------------------------------------------


def _flat_parameters() -> tuple[torch.Tensor, nn.Parameter, nn.Parameter]:
    """Parameters over one buffer, each with a version counter of its own."""
    flat = torch.randn(32)
    return flat, nn.Parameter(flat.data[:16].view(4, 4)), nn.Parameter(flat.data[16:].view(4, 4))


@program(route="training", kind="innocent", truth="cloned saves", twin_of="flat_buffer_updated_before_backward")
def flat_buffer_updated_after_backward(run: Run) -> Any:
    flat, a, b = _flat_parameters()
    for _ in range(3):
        a.grad = b.grad = None
        (torch.randn(3, 4) @ a @ b).pow(2).sum().backward()
        update = torch.cat([a.grad.view(-1), b.grad.view(-1)])
        run.write(lambda update=update: flat.sub_(0.01 * update))
    return [flat, a.grad, b.grad]


@program(route="training", kind="innocent", twin_of="flat_buffer_updated_before_backward")
def other_slice_of_a_flat_buffer_updated_before_backward(run: Run) -> Any:
    flat, a, _ = _flat_parameters()
    x = torch.randn(3, 4, requires_grad=True)
    loss = (x @ a).pow(2).sum()
    run.write(lambda: flat[16:].mul_(2))
    loss.backward()
    return [a.grad, x.grad]


@program(route="training", kind="corrupting")
def flat_buffer_updated_before_backward(run: Run) -> Any:
    flat, a, b = _flat_parameters()
    loss = (torch.randn(3, 4) @ a @ b).pow(2).sum()  # saved
    run.write(lambda: flat.mul_(2))
    loss.backward()
    return [a.grad, b.grad]


@program(route="training", kind="corrupting")
def parameters_pointed_into_a_flat_buffer_then_the_buffer_updated(run: Run) -> Any:
    layer, x = nn.Linear(4, 4, bias=False), torch.randn(3, 4, requires_grad=True)
    flat = layer.weight.detach().clone().view(-1)
    layer.weight.data = flat.view(4, 4)
    loss = layer(x).pow(2).sum()  # saved
    run.write(lambda: flat.mul_(2))
    loss.backward()
    return [x.grad]


@program(
    route="training",
    kind="innocent",
    truth="cloned saves",
    twin_of="parameters_pointed_into_a_flat_buffer_then_the_buffer_updated",
)
def parameters_pointed_into_a_flat_buffer_updated_after_backward(run: Run) -> Any:
    layer = nn.Linear(4, 4, bias=False)
    flat = layer.weight.detach().clone().view(-1)
    layer.weight.data = flat.view(4, 4)
    for _ in range(3):
        layer(torch.randn(3, 4)).pow(2).sum().backward()
        run.write(lambda: flat.mul_(0.9))
    return [layer.weight.grad, flat]


# ---- other things done through .data ------------------------------------------------------------------------------


@program(route="training", kind="innocent", twin_of="step_noise_before_backward")
def gradients_scaled_and_clipped_through_data(run: Run) -> Any:
    model = _model()
    _loss(model, torch.randn(6, 4)).backward()
    run.write(lambda: [p.grad.data.clamp_(-1e3, 1e3) for p in model.parameters()])
    run.write(lambda: nn.utils.clip_grad_norm_(model.parameters(), 1e6))
    return [p.grad for p in model.parameters()]


@program(route="training", kind="innocent", twin_of="step_load_before_backward", truth="cloned saves")
def state_loaded_between_steps(run: Run) -> Any:
    model, other = _model(), _model()
    _loss(model, torch.randn(6, 4)).backward()
    run.write(lambda: model.load_state_dict(other.state_dict()))
    _loss(model, torch.randn(6, 4)).backward()
    return _state(model)


@program(route="training", kind="refused")
def state_loaded_between_forward_and_backward(run: Run) -> Any:
    model, other = _model(), _model()
    loss = _loss(model, torch.randn(6, 4))
    run.write(lambda: model.load_state_dict(other.state_dict()))
    loss.backward()
    return _state(model)


@program(route="training", kind="innocent", twin_of="step_initialise_before_backward", truth="cloned saves")
def weights_initialised_before_the_forward(run: Run) -> Any:
    model = _model()
    run.write(_initialise, model)
    _loss(model, torch.ones(6, 4)).backward()
    return _state(model)


@program(route="training", kind="innocent", twin_of="step_decay_before_backward")
def loss_kept_and_read_through_data(run: Run) -> Any:
    model, total = _model(), torch.zeros(())
    for _ in range(3):
        loss = _loss(model, torch.randn(6, 4))
        run.write(lambda loss=loss: total.add_(loss.data))
        loss.backward()
    return [p.grad for p in model.parameters()]
