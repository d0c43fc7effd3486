"""Does the guard hold out for an hour: nothing lost, nothing leaked, no crash, no deadlock?

Run by ``make soak``. Rounds of training, of corrupting and of innocent programs, in this thread and in others, under
guards that come and go. It watches the guard's tables, the process's memory, and that each round comes to an end.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import gc
import os
import random
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

import torchguard
from torchguard import Guard, SavedTensorCorruptionError
from torchguard._aliases import ALIASES
from torchguard._saves import LEDGER

#: A round that takes longer hangs.
_HANGS_AFTER = 300


def train(guard: Guard | None) -> float:
    """A small network, three steps with a hand-written optimiser and an average of the weights."""
    draws = torch.Generator().manual_seed(0)  # of its own: other threads draw, too
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(inplace=True), torch.nn.BatchNorm1d(16))
    for parameter in net.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 0.5, generator=draws)
    average = [parameter.detach().clone() for parameter in net.parameters()]
    loss = torch.zeros(())
    for _ in range(3):
        net.zero_grad()
        loss = net(torch.randn(4, 8, generator=draws)).square().mean()
        loss.backward()
        for parameter, mean in zip(net.parameters(), average, strict=True):
            assert parameter.grad is not None
            parameter.data.sub_(0.01 * parameter.grad)
            mean.data.lerp_(parameter.data, 0.1)
    return float(loss)


def corrupt(route: int) -> None:
    """Write to a save, by one of several routes, and read it."""
    a = torch.ones(16, requires_grad=True)
    y = a.exp()
    if route == 0:
        y.data.zero_()
    elif route == 1:
        torch.neg(y.data, out=y.data)
    elif route == 2:
        y.untyped_storage().copy_(torch.zeros(16).untyped_storage())
    elif route == 3:
        y.detach().numpy()[...] = 0
    elif route == 4:
        z = y * y
        y.data = torch.zeros(16)
        y = z
    y.sum().backward()


ROUTES = 5


#: What comes and goes. (Not ``watch()``: it changes what all threads' ``.data`` is, and sees fewer of the routes.)
GUARDS: list[Callable[..., Guard]] = [
    torchguard.strict,
    functools.partial(Guard, "record"),
    functools.partial(torchguard.strict, at="read"),
    torchguard.repair,
    torchguard.audit,
]


def one_round(chance: random.Random, expected: float) -> list[str]:
    """Some guards, one after the other and within each other; what went wrong."""
    wrong = []
    for _ in range(4):
        make = chance.choice(GUARDS)
        guard = make(every_call=chance.random() < 0.3)
        route, spoke = chance.randrange(ROUTES + 1), False
        with guard:
            if chance.random() < 0.3:
                with torchguard.warn() as inner:
                    train(None)
                wrong += [f"a false alarm of warn(): {found}" for found in inner.violations]
            if train(guard) != expected:
                wrong.append("training came to something else")
            wrong += [f"a false alarm in training under {guard!r}: {found}" for found in guard.violations]
            try:
                if route < ROUTES:
                    corrupt(route)
            except SavedTensorCorruptionError:
                spoke = True
        spoke = spoke or bool(guard.violations)
        if spoke != (route < ROUTES):
            wrong.append(f"route {route} under {guard!r}: {'a false alarm' if spoke else 'missed'}")
    return wrong


def in_threads(work: Callable[[random.Random], list[str]], seeds: list[int]) -> list[str]:
    """The same work in threads at once; what went wrong in any."""
    wrong: list[str] = []

    def body(seed: int) -> None:
        try:
            wrong.extend(work(random.Random(seed)))
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=body, args=(seed,), daemon=True) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_HANGS_AFTER)
        if thread.is_alive():
            faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)
            return [*wrong, "a thread does not come to an end"]
    return wrong


def entries() -> int:
    """How many things the guard's tables hold."""
    return len(LEDGER.pending) + len(LEDGER.groups) + len(ALIASES.by_storage) + len(ALIASES.young)


def megabytes() -> float:
    """The memory of this process; 0.0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main(arguments: list[str] | None = None) -> int:
    """Go on until the time is up. The exit status is 1 where anything went wrong."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (default 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=6, help="how many at once, in every second round (default 6)")
    parser.add_argument("--grow", type=float, default=64.0, help="megabytes that the process may grow by (default 64)")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    expected = train(None)
    chance = random.Random(options.seed)
    end = time.monotonic() + 60 * options.minutes
    shown = time.monotonic()
    rounds, most, settled = 0, 0, 0.0
    wrong: list[str] = []
    told = sys.stderr
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (repair() ends each time by saying what it repaired)
    while time.monotonic() < end:
        if rounds % 2:
            seeds = [chance.randrange(1 << 30) for _ in range(options.threads)]
            wrong += in_threads(lambda own: one_round(own, expected), seeds)
        else:
            wrong += one_round(chance, expected)
        rounds += 1
        if rounds == 4:  # torch has what it needs from now on
            gc.collect()
            settled = megabytes()
        most = max(most, entries())
        if wrong and len(wrong) > 20:
            break
        if time.monotonic() - shown > 60:
            shown = time.monotonic()
            print(f"# {rounds} rounds, {most} entries at the most, {megabytes():.0f} MB", flush=True)
    sys.stderr.close()
    sys.stderr = told
    gc.collect()
    grown = megabytes() - settled if settled else 0.0
    if grown > options.grow:
        wrong.append(f"the process grew by {grown:.0f} MB")
    if most > 20_000:
        wrong.append(f"the tables grew to {most} entries")
    for text in wrong[:20]:
        print(text)
    print(f"{rounds} rounds, {most} entries at the most, {grown:+.1f} MB; {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
