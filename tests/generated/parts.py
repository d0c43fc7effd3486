"""What may a generated program use that torch does not have? A script that keeps a program carries copies of these."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch


def grid(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Distinct numbers from -1.7 to 2.3."""
    size = 1
    for length in shape:
        size *= length
    real = torch.linspace(-1.7, 2.3, max(size, 2), dtype=torch.float64)[:size].reshape(shape)
    if dtype.is_complex:
        return torch.complex(real, 1 - real).to(dtype)
    return real.to(dtype)


def every_second(x: torch.Tensor) -> torch.Tensor:
    """Every second element, by strides."""
    return x.as_strided((x.numel() // 2,), (2,)) if x.is_contiguous() else x[..., ::2]


def looked(result: Any = None) -> None:
    """Marks a write in the middle of backward; the recorder puts itself in this place."""


def in_thread(work: Callable[[], Any]) -> None:
    """Work in a thread of its own; what it raises is raised here."""
    raised = []

    def body() -> None:
        try:
            work()
        except Exception as error:
            raised.append(error.with_traceback(None))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if raised:
        raise raised.pop()


def saving(kind: str) -> Any:
    """Save hooks of the program: it keeps the tensor, a tuple with it, a key to it, or a copy."""
    store: dict[int, torch.Tensor] = {}

    def enter(tensor: torch.Tensor) -> int:
        store[len(store)] = tensor
        return len(store) - 1

    pairs: dict[str, Any] = {
        "same": (lambda x: x, lambda x: x),
        "boxed": (lambda x: (x,), lambda box: box[0]),
        "detached": (lambda x: x.detach(), lambda x: x),
        "copied": (lambda x: x.clone(), lambda x: x),
        "keyed": (enter, lambda key: store[key]),
    }
    return torch.autograd.graph.saved_tensors_hooks(*pairs[kind])


def transformed(work: Callable[..., Any], *tensors: torch.Tensor) -> Any:
    """What a transform of torch.func makes of tensors. What shall be the truth puts itself in this place."""
    return work(*tensors)


def region(work: Callable[..., Any], *tensors: torch.Tensor) -> Any:
    """What a compiled function, or a checkpoint that reads what it is not given, makes of tensors; as before."""
    return work(*tensors)


def bent(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Saves its inputs, its output, and what is between."""
    return (x.sin() * w).exp()


def written_inside(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Writes to what it has made, as it may."""
    y = x * w
    y.mul_(2)
    y[..., :1] = 0.5
    return y.sigmoid()


def two_results(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Saves the second of two outputs."""
    return x.tanh() * w.softmax(-1) + x


@functools.cache
def made_by(backend: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """A function, compiled: anew for each shape and dtype, however many there are."""
    function = torch.compile(work, backend=backend, dynamic=False)
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    return function


class Cube(torch.autograd.Function):
    """Saves its input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class Exp(torch.autograd.Function):
    """Saves its output."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        return y * gradient


class Product(torch.autograd.Function):
    """Saves two inputs and something in between."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        between = a + b
        ctx.save_for_backward(a, b, between)
        return a * b * between

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b, between = ctx.saved_tensors
        return (
            (gradient * (b * between + a * b)).sum_to_size(a.shape),
            (gradient * (a * between + a * b)).sum_to_size(b.shape),
        )


class Pair(torch.autograd.Function):
    """Two outputs, both saved."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sine, cosine = x.sin(), x.cos()
        ctx.save_for_backward(sine, cosine)
        return sine, cosine

    @staticmethod
    def backward(ctx: Any, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        sine, cosine = ctx.saved_tensors
        return first * cosine - second * sine


class InPlace(torch.autograd.Function):
    """Writes to its input, and saves what it has become."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x.tanh_()
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        return gradient * (1 - y * y)


class OldExp(torch.autograd.Function):
    """Saves its output in setup_context."""

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
        ctx.save_for_backward(output, *inputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        y, _ = ctx.saved_tensors
        return y * gradient


class InForward(torch.autograd.Function):
    """Records a graph of its own in forward, and goes back through it in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            own = x.detach().requires_grad_()
            result = (own.exp() * own).sin()
        ctx.save_for_backward(own, result)
        return result.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        own, result = ctx.saved_tensors
        return torch.autograd.grad(result, own, gradient, retain_graph=True)[0]


class Doubly(torch.autograd.Function):
    """Its backward is another Function."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return 2 * Product.apply(x, gradient) / (x + gradient)


class Viewed(torch.autograd.Function):
    """Its output is a view of its input, and saved."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = x.view_as(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        return gradient * y.cos()


class Partly(torch.autograd.Function):
    """One of its outputs has no gradient; both are saved."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, mask = x * 2, x > 0
        ctx.mark_non_differentiable(mask)
        ctx.save_for_backward(y, mask)
        return y, mask

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> torch.Tensor:
        y, mask = ctx.saved_tensors
        return gradient * y * mask
