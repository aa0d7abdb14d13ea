"""Threads that explain the same network and others, while others predict: as if each were alone."""

from __future__ import annotations

import pickle
import random
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from _state import Stateful, differences, snapshot
from torch import Tensor, nn

from ce_plugin import CausalEffect, CausalEffectMap, LayerCausalEffect
from ce_plugin.designs import OneAtATime, RandomMask
from ce_plugin.errors import ModelError
from ce_plugin.interventions import Adversarial, PixelMask
from ce_plugin.networks import inserted, last_conv_layer, read_layer
from ce_plugin.networks.guard import _TURNS, SharedContext, state_guard

THREADS = 8


class Cached(nn.Module):
    """Caches what follows from its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.bias = nn.Conv2d(3, 4, 3, stride=2), nn.Parameter(torch.randn(4))
        self.head = nn.Linear(4 * 25, 5)
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        bias = self.cache.get("bias")
        if bias is None:
            bias = self.cache["bias"] = self.bias.tanh()
        return self.head((self.body(x) + bias[:, None, None]).relu().flatten(1))


def network(kind: int) -> nn.Module:
    torch.manual_seed(kind)
    if kind % 3 == 2:
        return Cached().eval()
    found: nn.Module = Stateful(kind, writes=False)
    return found.train() if kind % 3 == 1 else found.eval()


def cells() -> Tensor:
    index = torch.arange(12) // 4
    return (index[:, None] * 3 + index)[None, None]


JOBS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "prediction": lambda net, x: net(x),
    "layer": lambda net, x: LayerCausalEffect(net, layer(net), outcome=None).estimate(x).effect,
    "layer, in full": lambda net, x: LayerCausalEffect(net, layer(net), outcome=None, engine="full").estimate(x).effect,
    "input": lambda net, x: (
        CausalEffect(net, PixelMask("zero"), OneAtATime(), outcome=None).estimate(x, feature_mask=cells()).effect
    ),
    "random trials": lambda net, x: CausalEffect(
        net, PixelMask("mean"), RandomMask(p=0.5, n_trials=40), outcome=None
    ).attribute(x, target=1, feature_mask=cells()),
    "map": lambda net, x: CausalEffectMap(net, layer(net)).attribute(x, target=1),
    "attack": lambda net, x: (
        CausalEffect(
            net,
            Adversarial.pgd(net, eps=0.1, max_iter=1, clip_values=(0, 1)),
            RandomMask(p=0.5, n_trials=4),
            outcome=None,
        )
        .estimate(x[:1], feature_mask=cells())
        .effect
    ),
    "activations": lambda net, x: read_layer(net, layer(net), x)[0],
    "another layer": lambda net, x: replaced(net, x),
}


def layer(net: nn.Module) -> str:
    return "body" if isinstance(net, Cached) else "conv"


def replaced(net: nn.Module, x: Tensor) -> Tensor:
    """The outputs with half of the layer's value in its place."""
    assert last_conv_layer(net, x) is not None
    with inserted(net, layer(net), lambda value: value / 2) as changed:
        return changed(x)


def disturbances(calls: int) -> list[str]:
    """Run so many calls in eight threads, half of them on one network; what differed from a thread alone."""
    networks = [network(0), *map(network, range(1, THREADS + 1))]
    x = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    # Passes in training mode depend on who else is at work; all else must not.
    jobs = [
        (name, k)
        for name in JOBS
        for k in range(len(networks))
        if not networks[k].training or name not in ("prediction", "activations", "another layer")
    ]
    with torch.no_grad():
        wanted = {(name, k): JOBS[name](networks[k], x) for name, k in jobs}
    before = snapshot(*networks)
    draw = random.Random(0)
    shared, own = [job for job in jobs if job[1] == 0], [job for job in jobs if job[1] != 0]
    todo = [draw.choice(shared if draw.random() < 0.5 else own) for _ in range(calls)]

    def run(job: tuple[str, int]) -> str | None:
        try:
            with torch.no_grad():
                found = JOBS[job[0]](networks[job[1]], x)
        except BaseException as error:
            return f"{job}: {error!r}"
        return None if torch.allclose(found, wanted[job], rtol=1e-4, atol=1e-5) else f"{job}: another result"

    with ThreadPoolExecutor(THREADS) as pool:
        found = [message for message in pool.map(run, todo) if message is not None]
    pickle.dumps(networks)
    return found + differences(before, snapshot(*networks))


def test_eight_threads() -> None:
    assert disturbances(200) == []


@pytest.mark.slow
def test_eight_threads_for_long() -> None:
    assert disturbances(2000) == []


def test_two_guards_of_one_network_take_turns_and_others_do_not_wait() -> None:
    net, other, order = nn.Linear(1, 1), nn.Linear(1, 1), []
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with state_guard(net):
            inside.set()
            leave.wait(10)
            order.append("first")

    def second() -> None:
        with state_guard(nn.Sequential(net)):  # the same network within another
            order.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    inside.wait(10)
    threads[1].start()
    with state_guard(other):  # nobody has this one
        assert torch.equal(net(torch.ones(1)), net(torch.ones(1)))
    leave.set()
    for thread in threads:
        thread.join(10)
    assert order == ["first", "second"]


def test_threads_are_served_in_the_order_in_which_they_asked() -> None:
    net, order = nn.Linear(1, 1), []

    def ask(k: int) -> None:
        with state_guard(net):
            order.append(k)

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(5)]
    with state_guard(net):
        for waiting, thread in enumerate(threads, 1):
            thread.start()
            while len(_TURNS._waiting) < waiting:
                pass
        with state_guard(net):  # its own thread need not wait
            assert order == []
    for thread in threads:
        thread.join(10)
    assert order == list(range(5))


def test_threads_that_would_wait_for_each_other_get_an_error() -> None:
    nets, barrier, found = [nn.Linear(1, 1), nn.Linear(1, 1)], threading.Barrier(2), []

    def run(outer: nn.Module, inner: nn.Module) -> None:
        try:
            with state_guard(outer):
                barrier.wait(10)
                with state_guard(inner):
                    found.append("inside")
        except ModelError as error:
            found.append(str(error))

    threads = [threading.Thread(target=run, args=pair) for pair in (nets, nets[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert "inside" in found
    assert any("two threads" in message for message in found)
    with state_guard(*nets):  # and everything is free again
        pass


def test_the_random_state_is_that_from_before_the_first() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    barrier = threading.Barrier(2)

    def run(seed: int | None) -> None:
        with state_guard(seed=seed):
            torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
            if seed is None:
                barrier.wait(10)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (None, 1, None, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    assert before[2] == random.getstate()


def test_seeded_regions_do_not_mix() -> None:
    def draw(_: int) -> list[float]:
        with state_guard(seed=7):
            return [float(torch.rand(1)) + random.random() for _ in range(50)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(draw, range(12)))
    assert all(one == found[0] for one in found)


def test_a_shared_context_is_opened_once_and_closed_by_the_last() -> None:
    events: list[str] = []

    class Context:
        def __enter__(self) -> None:
            events.append("open")

        def __exit__(self, *error: object) -> None:
            events.append("close")

    shared = SharedContext(Context)
    with shared, shared:
        events.append("inside")
    with shared:
        pass
    assert events == ["open", "inside", "close", "open", "close"]


def test_hooks_of_a_run_act_in_its_own_thread() -> None:
    net, x = network(0), torch.rand(2, 3, 12, 12)
    wanted, found = net(x), []
    with inserted(net, "conv", lambda value: value * 0):
        thread = threading.Thread(target=lambda: found.append(net(x)))
        thread.start()
        thread.join(10)
        assert not torch.allclose(net(x), wanted)
    assert torch.equal(found[0], wanted)


def test_warnings_are_the_users() -> None:
    """Filters belong to the whole process: a run in one thread must not change what another hears."""
    net, x, filters = network(0), torch.rand(1, 3, 12, 12), []

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            filters.append(list(warnings.filters))
            return self.net(x)

    LayerCausalEffect(Looks(), "net.conv", outcome="probability").estimate(x)
    assert all(now == filters[0] for now in filters)
