"""The guard leaves networks and random states as they were, on success and on error."""

from __future__ import annotations

import functools
import random
import time
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from ce_plugin.networks.guard import modules_of, state_guard


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.conv(x)).mean((2, 3))))


def scripted(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(net)


WRAPPERS = {
    "plain": lambda net: net,
    "script": scripted,
    "compiled": lambda net: torch.compile(net, backend="eager"),
    "data parallel": nn.DataParallel,
}
GLOBAL_NET = nn.Linear(1, 1)


def helper(x):
    return GLOBAL_NET(x)


def prepared(wrap):
    """A network in an uneven state: modes, gradients, flags and hooks all differ from module to module."""
    torch.manual_seed(0)
    net = Net().train()
    model = wrap(net)
    net.norm.eval()
    model(torch.rand(4, 1, 5, 5)).sum().backward()
    parameters = list(model.parameters())
    parameters[1].grad = None
    parameters[2].requires_grad_(False)
    # Scripted networks take no hooks.
    handle = None if isinstance(model, torch.jit.ScriptModule) else model.register_forward_hook(lambda *args: None)
    return model, handle


def snapshot(model):
    modules = list(model.modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "training": [module.training for module in modules],
        "grads": [(id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "hooks": [list(getattr(module, name).items()) for module in modules for name in hooks],
        "buffers": [(id(b), b.clone()) for b in model.buffers()],
        "random": (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()),  # noqa: NPY002
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def disturb(model):
    """Change everything that the guard promises to restore."""
    for module in model.modules():
        module.training = True
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(torch.rand(4, 1, 5, 5)).sum().backward()
    for module in () if isinstance(model, torch.jit.ScriptModule) else model.modules():
        module._forward_hooks.clear()
        module.register_forward_pre_hook(lambda *args: None)
    with torch.no_grad():
        for buffer in model.buffers():
            buffer.add_(1)
    np.random.rand()  # noqa: NPY002
    random.random()


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before(wrap, fails):
    model, handle = prepared(wrap)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="in the middle") if fails else nullcontext():  # noqa: SIM117
        with state_guard(model, seed=3):
            assert not any(module.training for module in model.modules())
            assert all(parameter.grad is None for parameter in model.parameters())
            disturb(model)
            assert not same(before, snapshot(model))
            if fails:
                raise RuntimeError("in the middle")
    after = snapshot(model)
    for key in before:
        assert same(before[key], after[key]), key
    if handle is not None:
        handle.remove()
        assert not model._forward_hooks, "the user's handle must still remove the user's hook"


def test_snapshot_sees_each_disturbance():
    model, _ = prepared(lambda net: net)
    before = snapshot(model)
    disturb(model)
    after = snapshot(model)
    assert [key for key in before if same(before[key], after[key])] == []


def test_replaced_buffer_comes_back():
    net = Net()
    buffer = net.norm.running_mean
    with state_guard(net):
        net.norm.running_mean = torch.ones(2)
        net.norm.register_buffer("late", torch.ones(1))
    assert net.norm.running_mean is buffer
    assert net.norm.late == 1, "what a first forward pass makes stays"


def test_buffer_of_nan_and_resized_buffer():
    net = nn.Module()
    net.register_buffer("a", torch.tensor([float("nan"), 1.0]))
    net.register_buffer("b", torch.tensor([1, 2]))
    version = net.a._version
    with state_guard(net):
        net.b.resize_(5).fill_(0)
    assert net.b.tolist() == [1, 2]
    assert net.a._version == version, "an unchanged buffer must not be written to"


def test_graph_through_buffers_survives():
    net = nn.BatchNorm1d(2).eval()
    out = net(torch.rand(3, 2, requires_grad=True)).sum()
    with state_guard(net):
        net(torch.rand(3, 2))
    out.backward()
    assert net.weight.grad is not None


def test_seed_is_for_the_inside_only():
    torch.manual_seed(5)
    outer = torch.rand(1)
    torch.manual_seed(5)
    draws = []
    for _ in range(2):
        with state_guard(seed=1):
            draws.append((torch.rand(1).item(), np.random.rand(), random.random()))  # noqa: NPY002
    assert draws[0] == draws[1]
    assert torch.equal(outer, torch.rand(1))


def test_nested():
    net = Net().train()
    grad = net.head.weight.grad = torch.ones(3, 2)
    with state_guard(net):
        with state_guard(net.head):
            net.head.weight.grad = torch.zeros(3, 2)
        assert net.head.weight.grad is None
        assert not net.training
    assert net.head.weight.grad is grad
    assert all(module.training for module in net.modules())


def test_flag_is_set_without_calling_train():
    class Merging(nn.Module):
        def train(self, mode=True):
            raise AssertionError("train() may do what cannot be taken back")

    net = nn.Sequential(Merging())
    with state_guard(net):
        assert not net[0].training
    assert net[0].training


def test_lazy_network_may_be_initialised_inside():
    net = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    with state_guard(net):
        net(torch.rand(3, 4))
    assert net(torch.rand(3, 4)).shape == (3, 2)


def test_in_inference_mode():
    net = Net()
    mean = net.norm.running_mean.clone()
    with torch.inference_mode(), state_guard(net):
        net.norm.running_mean.add_(1)
    assert torch.equal(net.norm.running_mean, mean)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_random_state():
    torch.rand(1, device="cuda")
    before = torch.cuda.get_rng_state()
    with state_guard(seed=0):
        first = torch.rand(1, device="cuda")
    with state_guard(seed=0):
        assert torch.equal(first, torch.rand(1, device="cuda"))
    assert torch.equal(before, torch.cuda.get_rng_state())


class Holder:
    def __init__(self, model):
        self.model = model

    def score(self, x):
        return self.model(x)

    def __call__(self, x):
        return self.model(x)


def decorate(func):
    @functools.wraps(func)
    def inner(*args):
        return func(*args)

    return inner


NET = nn.Linear(1, 1)
FORMS = {
    "module": NET,
    "bound method": NET.forward,
    "method of holder": Holder(NET).score,
    "callable": Holder(NET),
    "partial": functools.partial(lambda net, x: net(x), NET),
    "partial keyword": functools.partial(lambda x, net: net(x), net=NET),
    "closure": (lambda net: lambda x: net(x))(NET),
    "default": lambda x, net=NET: net(x),
    "list in closure": (lambda nets: lambda x: nets[0](x))([NET]),
    "dict": (lambda nets: lambda x: nets["a"](x))({"a": NET}),
    "decorated": decorate(NET.forward),
    "compiled function": torch.compile((lambda net: lambda x: net(x))(NET), backend="eager"),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_modules_are_found(form):
    assert modules_of(form) == [NET]


def test_modules_of_globals_children_and_nothing():
    assert modules_of(lambda x: GLOBAL_NET(x)) == [GLOBAL_NET]
    assert modules_of(lambda x: helper(x)) == [GLOBAL_NET]
    net = Net()
    assert modules_of((lambda a, b: lambda x: a(b(x)))(net, net.head)) == [net]
    assert modules_of(torch.relu) == []
    assert modules_of(lambda x: np.asarray(torch.relu(x))) == []


def test_unbound_cell():
    def outer():
        def forward(x):
            return later(x)

        found = modules_of(forward)
        later = NET
        return found, modules_of(forward), later

    assert outer()[:2] == ([], [NET])


def test_overhead_is_small():
    net = nn.Sequential(*(nn.Sequential(nn.Conv2d(100, 100, 3), nn.BatchNorm2d(100)) for _ in range(55)))
    assert sum(p.numel() for p in net.parameters()) > 4.9e6
    times = []
    for _ in range(10):
        start = time.thread_time()
        with state_guard(net):
            pass
        times.append(time.thread_time() - start)
    assert min(times) < 0.03
