"""Everything that people hand over in place of a plain float32 module, and what must be as before afterwards."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation
from torch import Tensor, nn
from torch.futures import Future
from torchvision.models import VisionTransformer

from ce_plugin import CausalEffect
from ce_plugin.designs import OneAtATime, RandomMask
from ce_plugin.errors import ModelError
from ce_plugin.interventions import PixelMask

SIDE = 12


def convolutional(channels: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3),
        nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 16, 5),
    )  # fmt: skip


def photographs(n: int = 2, channels: int = 3) -> Tensor:
    return torch.rand(n, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def cells(side: int = SIDE, patch: int = 4) -> Tensor:
    """A feature mask of square patches."""
    index = torch.arange(side) // patch
    return (index[:, None] * (side // patch) + index)[None, None]


def ours(model: Any, **options: Any) -> CausalEffect:
    return CausalEffect(model, PixelMask("zero"), OneAtATime(), outcome=None, **options)


def theirs(model: nn.Module, x: Tensor, target: int = 1) -> Tensor:
    with torch.no_grad():
        return FeatureAblation(copy.deepcopy(model).eval()).attribute(x, target=target, feature_mask=cells())


def same_as_captum(model: Any, plain: nn.Module, x: Tensor, atol: float = 1e-5, **options: Any) -> None:
    found = ours(model, **options).attribute(x, target=1, feature_mask=cells())
    assert torch.allclose(found.float(), theirs(plain, x), atol=atol)


def test_a_module_in_training_mode() -> None:
    net = convolutional().train()
    net[1].eval()
    before = copy.deepcopy(net.state_dict())
    same_as_captum(net, net, photographs())
    assert net.training
    assert not net[1].training
    assert net[5].training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_data_parallel() -> None:
    net = convolutional()
    same_as_captum(nn.DataParallel(net), net, photographs())


@pytest.mark.parametrize("way", ["module", "function", "in place"])
def test_compiled(way: str) -> None:
    net = convolutional().eval()
    plain = copy.deepcopy(net)
    torch._dynamo.reset()
    if way == "module":
        model: Any = torch.compile(net, backend="eager")
    elif way == "function":
        model = torch.compile(lambda x: net(x), backend="eager")
    else:
        net.compile(backend="eager")
        model = net
    same_as_captum(model, plain, photographs())
    same_as_captum(model, plain, photographs(5))


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    net = convolutional().eval()
    plain = copy.deepcopy(net)
    torch._dynamo.reset()
    same_as_captum(torch.compile(net), plain, photographs())


@pytest.mark.parametrize("how", ["script", "trace", "inside"])
def test_torchscript(how: str) -> None:
    net = convolutional().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "script":
            model: nn.Module = torch.jit.script(net)
        elif how == "trace":
            model = torch.jit.trace(net, photographs())
        else:
            model = nn.Sequential(OrderedDict(first=nn.Identity(), rest=torch.jit.script(net)))
    same_as_captum(model, net, photographs())


def test_vision_transformer() -> None:
    torch.manual_seed(0)
    net = VisionTransformer(
        image_size=SIDE, patch_size=4, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5, dropout=0.3
    )
    nn.init.normal_(net.heads.head.weight)
    same_as_captum(net, net, photographs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    net, x = convolutional().to(dtype).eval(), photographs().to(dtype)
    found = ours(net).estimate(x, feature_mask=cells())
    assert found.effect.dtype == torch.float32
    full = ours(copy.deepcopy(net).float()).estimate(x.float(), feature_mask=cells())
    assert (found.effect - full.effect).abs().max() < 0.05
    mapped = ours(net).attribute(x, target=1, feature_mask=cells())
    assert mapped.shape == x.shape
    assert torch.isfinite(mapped).all()


def test_autocast_and_a_training_step_in_the_same_context() -> None:
    net, x = convolutional().eval(), photographs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(net).attribute(x, target=1, feature_mask=cells())
        # Weights cast in inference mode have no gradient: a training step must not meet them in autocast's cache.
        net(x).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert torch.allclose(found.float(), theirs(net, x), atol=0.05)


def test_gradients_off_or_on_around_the_call() -> None:
    net, x = convolutional().eval(), photographs()
    wanted = theirs(net, x)
    for context in (torch.no_grad(), torch.enable_grad(), torch.inference_mode()):
        with context:
            assert torch.allclose(ours(net).attribute(x, target=1, feature_mask=cells()), wanted, atol=1e-5)


def test_what_is_returned_is_ordinary() -> None:
    net, x = convolutional().eval(), photographs().requires_grad_()
    found = ours(net).attribute(x, target=1, feature_mask=cells())
    estimate = ours(net).estimate(x, feature_mask=cells())
    for tensor in (found, estimate.effect, estimate.reference, estimate.contribution):
        assert not tensor.is_inference()
        assert not tensor.requires_grad
        tensor += 1.0
        weight = torch.ones_like(tensor, requires_grad=True)
        (tensor * weight).sum().backward()
        assert torch.equal(weight.grad, tensor)


class Viewing(nn.Module):
    """Insists on the ordinary memory layout, as networks with ``.view`` after a convolution do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4 * SIDE * SIDE, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).view(len(x), -1))


class Strict(Viewing):
    """Asserts it."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.is_contiguous()
        return super().forward(x)


@pytest.mark.parametrize("kind", [Viewing, Strict])
def test_networks_that_insist_on_a_memory_layout(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net, x = kind(), photographs()
    found = ours(net).attribute(x, target=1)
    wanted = FeatureAblation(net).attribute(x, target=1, feature_mask=torch.arange(SIDE * SIDE).view(1, 1, SIDE, SIDE))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_one_networks_layout_is_not_another_functions() -> None:
    """What was learned about a module says nothing about a function that does more than run it."""
    net, x = convolutional().eval(), photographs()
    wanted = theirs(net, x)
    assert torch.allclose(ours(net).attribute(x, target=1, feature_mask=cells()), wanted, atol=1e-5)
    assert ours(net).attribute(x, target=1).shape == x.shape

    def viewing(images: Tensor) -> Tensor:
        return net(images.view(-1, 3 * SIDE * SIDE).view(-1, 3, SIDE, SIDE))

    many = ours(net).attribute(x, target=1)
    assert torch.allclose(ours(viewing).attribute(x, target=1), many, atol=1e-5)
    assert torch.allclose(ours(net, output=lambda out: out).attribute(x, target=1), many, atol=1e-5)


def test_a_flag_may_take_the_network_another_way() -> None:
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain, self.viewing = convolutional(), Viewing()

        def forward(self, x: Tensor, view: bool) -> Tensor:
            return self.viewing(x) if view else self.plain(x)

    net, x = Two().eval(), photographs()
    for flag, part in ((False, net.plain), (True, net.viewing), (False, net.plain)):
        found = ours(net).attribute(x, target=1, additional_forward_args=flag)
        assert torch.allclose(found, ours(part).attribute(x, target=1), atol=1e-5)


@pytest.mark.parametrize("form", ["channels_last", "transposed", "expanded"])
def test_inputs_in_any_memory_layout(form: str) -> None:
    net, x = convolutional().eval(), photographs()
    if form == "channels_last":
        given = x.contiguous(memory_format=torch.channels_last)
    elif form == "transposed":
        given = x.transpose(2, 3).contiguous().transpose(2, 3)
    else:
        given, x = x[:1].expand(3, -1, -1, -1), x[:1].repeat(3, 1, 1, 1)
    found = ours(net).attribute(given, target=1, feature_mask=cells())
    assert torch.allclose(found, theirs(net, x), atol=1e-5)
    assert ours(net).attribute(given, target=1).shape == x.shape


@pytest.mark.parametrize("n", [1, 3])
def test_networks_that_write_to_their_input(n: int) -> None:
    net = nn.Sequential(nn.ReLU(inplace=True), *convolutional()).eval()
    x = torch.randn(n, 3, SIDE, SIDE)
    before = x.clone()
    explainer = ours(net)
    explainer.estimate_cost(x)
    found = explainer.attribute(x, target=1)
    assert torch.equal(x, before)
    safe = nn.Sequential(nn.ReLU(), *net[1:]).eval()
    assert torch.allclose(found, ours(safe).attribute(x, target=1), atol=1e-5)


def test_modules_that_cannot_be_compared() -> None:
    class Odd(nn.Sequential):
        def __eq__(self, other: object) -> bool:
            raise TypeError("compares with nothing")

        __hash__ = nn.Module.__hash__

    net = convolutional().eval()
    same_as_captum(Odd(*net), net, photographs())


def test_networks_that_squeeze_their_output() -> None:
    """Batches of one lose a dimension there; no batch of another size may be taken for an aggregate because of it."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.rand(3, 1, 3, 3, dtype=torch.float64)
    wanted = ours(body).estimate(x)
    for n in (1, 2, 3):
        for per_eval in (None, 1, 2, 4):
            found = ours(lambda images: body(images).squeeze()).estimate(x[:n], perturbations_per_eval=per_eval)
            assert torch.allclose(found.effect, wanted.effect[:n], atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_one_number_per_example(n: int) -> None:
    weight = torch.rand(4, dtype=torch.float64)
    x = torch.rand(n, 4, dtype=torch.float64)
    for function in (lambda v: v @ weight, lambda v: (v @ weight)[:, None], lambda v: (v @ weight).squeeze()):
        assert torch.allclose(ours(function).attribute(x), x * weight, atol=1e-12)
        assert ours(function).estimate(x).effect.shape == (n, 4, 1)


def test_one_number_per_batch() -> None:
    x = torch.rand(3, 4, dtype=torch.float64)

    def model(v: Tensor) -> Tensor:
        return v.square().sum()

    for returned in (model, lambda v: model(v).item(), lambda v: model(v).reshape(1)):
        found = ours(returned).attribute(x)
        # A unit is the same column of all examples, since all share one outcome.
        assert found.shape == (1, 4)
        assert torch.allclose(found[0].double(), x.square().sum(0), atol=1e-5)
    assert torch.allclose(ours(model).attribute(x), FeatureAblation(model).attribute(x), atol=1e-12)


def test_one_vector_per_batch() -> None:
    x = torch.rand(3, 4, dtype=torch.float64)

    def model(v: Tensor) -> Tensor:
        return torch.stack([v.sum(), v.square().sum()])

    found = ours(model).estimate(x)
    assert found.effect.shape == (1, 4, 2)
    assert torch.allclose(found.contribution[0], torch.stack([x.sum(0), x.square().sum(0)], 1), atol=1e-12)


def test_values_per_batch_beside_values_per_example_are_refused() -> None:
    net = nn.Linear(4, 3)

    def model(v: Tensor) -> dict[str, Tensor]:
        out = net(v)
        return {"logits": out, "loss": out.square().mean()}

    with pytest.raises(ModelError, match=r"one value per example in every output.*`output=`"):
        ours(model).estimate(torch.rand(3, 4))
    assert ours(model, output="logits").estimate(torch.rand(3, 4)).effect.shape == (3, 4, 3)


def test_dictionaries_tuples_and_objects() -> None:
    body, side = nn.Linear(4, 3).double(), nn.Linear(4, 2).double()
    x = torch.rand(2, 4, dtype=torch.float64)
    wanted, other = ours(body).estimate(x), ours(side).estimate(x)

    class Output(OrderedDict[str, Tensor]):
        """As transformers' ModelOutput: attributes, keys and whole numbers."""

        def __getattr__(self, name: str) -> Tensor:
            return self[name]

        def __getitem__(self, key: Any) -> Any:
            return super().__getitem__(key) if isinstance(key, str) else list(self.values())[key]

    def model(v: Tensor) -> Output:
        return Output(logits=body(v), side=side(v))

    heads = ours(model).estimate(x)
    assert sorted(heads) == ["logits", "side"]
    assert torch.equal(heads["logits"].effect, wanted.effect)
    assert torch.equal(heads["side"].effect, other.effect)
    for output in ("logits", 0, lambda out: out.logits):
        assert torch.equal(ours(model, output=output).estimate(x).effect, wanted.effect)
    some = ours(model, output=["side"]).estimate(x)
    assert torch.equal(some["side"].effect, other.effect)
    assert torch.equal(ours(lambda v: (body(v), side(v)), output=1).estimate(x).effect, other.effect)
    assert torch.equal(ours(lambda v: {"out": body(v)}).estimate(x).effect, wanted.effect)
    with pytest.raises(ModelError, match=r"one output head, but got \['logits', 'side'\].*`output=`"):
        ours(model).attribute(x, target=0)
    with pytest.raises(ModelError, match=r"a tensor or a dict of tensors, but got tuple.*Name the part"):
        ours(lambda v: (body(v), side(v))).attribute(x, target=0)
    with pytest.raises(ModelError, match=r"a part of what the model returns \(\['logits', 'side'\]\), but got 'logit'"):
        ours(model, output="logit").attribute(x, target=0)


def test_heads_have_their_own_predictions_and_random_errors() -> None:
    body, side = nn.Linear(4, 3), nn.Linear(4, 2)
    x = torch.rand(2, 4)
    explainer = CausalEffect(lambda v: {"a": body(v), "b": side(v)}, PixelMask("zero"), RandomMask(0.5, 50))
    heads = explainer.estimate(x)
    assert torch.equal(heads["a"].predicted, body(x).argmax(1))
    assert torch.equal(heads["b"].predicted, side(x).argmax(1))
    alone = CausalEffect(side, PixelMask("zero"), RandomMask(0.5, 50)).estimate(x)
    assert torch.allclose(heads["b"].effect, alone.effect, atol=1e-5)
    assert torch.allclose(heads["b"].std_error, alone.std_error, atol=1e-5)


def test_segmentation() -> None:
    torch.manual_seed(0)
    net, x = nn.Conv2d(3, 2, 3, padding=1).double(), photographs().double()
    found = ours(net).estimate(x, feature_mask=cells())
    assert found.class_shape == (2, SIDE, SIDE)
    assert found.effect.shape == (2, 9, 2 * SIDE * SIDE)
    one = ours(net).attribute(x, target=(1, 3, 5), feature_mask=cells())
    wanted = found.contribution.reshape(2, 9, 2, SIDE, SIDE)[:, :, 1, 3, 5]
    assert torch.allclose(one[:, 0, ::4, ::4].flatten(1), wanted, atol=1e-12)
    probability = CausalEffect(net, PixelMask("zero"), OneAtATime()).estimate(x, feature_mask=cells())
    assert torch.allclose(probability.reference.reshape(2, 2, -1).sum(1), torch.ones(2, SIDE * SIDE).double())


def test_tuples_of_inputs_and_further_arguments() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.table = nn.Conv2d(1, 2, 3), nn.Linear(4, 2)

        def forward(self, image: Tensor, table: Tensor, scale: Tensor, sign: int, names: list[str]) -> Tensor:
            assert names == ["a", "b"]
            return sign * scale[:, None] * (self.image(image).sum((2, 3)) + self.table(table))

    net = Net().double()
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    args = (torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), -1, ["a", "b"])
    wanted = FeatureAblation(net).attribute(x, target=1, additional_forward_args=args)
    for per_eval in (None, 1, 5):
        found = ours(net).attribute(x, target=1, additional_forward_args=args, perturbations_per_eval=per_eval)
        assert isinstance(found, tuple)
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(found, wanted, strict=True))
    masks = torch.tensor([[0, 0, 1, 1]]).expand(4, 4)[None, None], torch.tensor([[0, 1, 2, 2]])
    if find_spec("captum.testing") is None:
        # Before version 0.9 captum sets equal ids of several inputs one input after the other.
        masks = masks[0], masks[1] + 2
    wanted = FeatureAblation(net).attribute(x, target=1, additional_forward_args=args, feature_mask=masks)
    found = ours(net).attribute(x, target=1, additional_forward_args=args, feature_mask=masks)
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(found, wanted, strict=True))
    (single,) = ours(nn.Linear(4, 2)).attribute((torch.rand(2, 4),), target=0)
    assert single.shape == (2, 4)


def test_random_designs_on_tuples_of_inputs() -> None:
    x = torch.rand(2, 1, 3, 3, dtype=torch.float64), torch.rand(2, 4, dtype=torch.float64)

    def model(image: Tensor, table: Tensor) -> Tensor:
        return torch.stack([image.flatten(1).sum(1), 2 * table.sum(1)], 1)

    estimate = CausalEffect(model, PixelMask("zero"), RandomMask(0.5, 200), outcome=None).estimate(x)
    wanted = torch.zeros(2, 13, 2, dtype=torch.float64)
    wanted[:, :9, 0], wanted[:, 9:, 1] = -x[0].flatten(1), -2 * x[1]
    assert torch.allclose(estimate.effect, wanted, atol=0.05)


def art_classifier(net: nn.Module, **options: Any) -> Any:
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        net, loss=nn.CrossEntropyLoss(), input_shape=(3, SIDE, SIDE), nb_classes=5, clip_values=(0.0, 1.0),
        device_type="cpu", **options,
    )  # fmt: skip


def test_an_art_classifier_with_preprocessing() -> None:
    net, x = convolutional().eval(), photographs()
    mean, std = np.float32([0.4, 0.5, 0.6]).reshape(3, 1, 1), np.float32([0.2, 0.25, 0.3]).reshape(3, 1, 1)
    classifier = art_classifier(net, preprocessing=(mean, std))
    explainer = ours(classifier)
    assert explainer.forward.clip_values == (0.0, 1.0)
    reference = explainer.estimate(x, feature_mask=cells()).reference
    assert np.abs(reference.numpy() - classifier.predict(x.numpy())).max() < 1e-5

    def by_hand(images: Tensor) -> Tensor:
        return net((images - torch.from_numpy(mean)) / torch.from_numpy(std))

    wanted = FeatureAblation(by_hand).attribute(x, target=1, feature_mask=cells())
    assert torch.allclose(explainer.attribute(x, target=1, feature_mask=cells()), wanted, atol=1e-5)
    net.train()
    again = explainer.attribute(x, target=1, feature_mask=cells())
    assert torch.allclose(again, wanted, atol=1e-5)
    assert net.training


def test_a_future_is_refused() -> None:
    def model(x: Tensor) -> Future[Tensor]:
        future: Future[Tensor] = Future()
        future.set_result(x)
        return future

    with pytest.raises(ModelError, match=r"returns a Future.*lambda x: model\(x\).wait\(\)"):
        ours(model).attribute(torch.rand(2, 4), target=0)


def test_nothing_callable_is_refused() -> None:
    with pytest.raises(ModelError, match="a callable or an ART classifier, but got int"):
        CausalEffect(3)


def test_after_an_error_all_is_as_it_was() -> None:
    net, x = convolutional().train(), photographs()
    net(x).sum().backward()
    state, gradients = copy.deepcopy(net.state_dict()), [p.grad for p in net.parameters()]
    calls = 0

    def breaks(images: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        torch.rand(3)
        if calls > 4:
            raise RuntimeError("broken on purpose")
        return net(images)

    random_state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="on purpose"):
        ours(breaks).attribute(x, target=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert net.training
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    assert all(p.grad is gradient for p, gradient in zip(net.parameters(), gradients, strict=True))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
