"""The four programs with which the discussion of silent writes always begins."""

from __future__ import annotations

from typing import Any

import torch
from harness import Run, program
from torch import nn

_ROUTE = "textbook"


@program(route=_ROUTE, kind="corrupting")
def sigmoid_output_zeroed_through_data(run: Run) -> Any:
    a = run.leaf([1.0, 2.0, 3.0])
    out = a.sigmoid()  # saved
    c = out.data
    run.write(lambda: c.zero_())
    out.sum().backward()
    return [a.grad]


@program(route=_ROUTE, kind="refused")
def sigmoid_output_zeroed_through_detach(run: Run) -> Any:
    a = run.leaf([1.0, 2.0, 3.0])
    out = a.sigmoid()
    c = out.detach()
    run.write(lambda: c.zero_())
    out.sum().backward()
    return [a.grad]


@program(route=_ROUTE, kind="innocent", twin_of="sigmoid_output_zeroed_through_data")
def shared_memory_that_nothing_saved(run: Run) -> Any:
    v1, v2, t = run.leaf([1.0, 2.0]), run.leaf([3.0, 4.0]), run.leaf([5.0, 6.0], requires_grad=False)
    total = v1 + v2
    run.write(lambda: total.detach().data.add_(t))
    (total.sum() * 2).backward()
    return [v1.grad, v2.grad]


@program(route=_ROUTE, kind="innocent", twin_of="sigmoid_output_zeroed_through_data", truth="cloned saves")
def two_networks_of_which_one_is_trained(run: Run) -> Any:
    first, second = nn.Linear(4, 4), nn.Linear(4, 1)
    x = torch.randn(3, 4)
    hidden = first(x).detach()
    second(hidden).pow(2).mean().backward()

    def step() -> None:
        for parameter in second.parameters():
            parameter.data.sub_(0.1 * parameter.grad)

    run.write(step)
    return [p.grad for p in (*first.parameters(), *second.parameters())] + [p.detach() for p in second.parameters()]
