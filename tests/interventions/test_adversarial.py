"""F_j: against ART itself, closed forms, and every trap of ART that is known."""

from __future__ import annotations

import math
import random
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.robust import AttackComparator, MinParamPerturbation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ce_plugin.errors import (
    AttackError,
    CEPluginError,
    InputError,
    ModelError,
    NoChangeWarning,
    ProbabilityWarning,
    TargetError,
    UnknownNameError,
)
from ce_plugin.interventions.adversarial import Adversarial
from ce_plugin.interventions.base import Context
from ce_plugin.networks.art import attack_class
from ce_plugin.networks.forward import load_art

PRESETS = ("fgsm", "bim", "pgd", "jsma")
pytestmark = pytest.mark.filterwarnings("error::UserWarning:ce_plugin")


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small only wait for their threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(n_classes=4, channels=2):
    torch.manual_seed(1)
    layers = [nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * 16, n_classes)).eval()


def images(n=3, channels=2):
    return torch.rand(n, channels, 6, 6, generator=torch.Generator().manual_seed(2))


def art_classifier(model, n_classes=4, clip_values=(0.0, 1.0), **options):
    load_art()
    from art.estimators.classification import PyTorchClassifier

    options = {"input_shape": (2, 6, 6), "loss": nn.CrossEntropyLoss(), **options}
    return PyTorchClassifier(model, nb_classes=n_classes, clip_values=clip_values, device_type="cpu", **options)


def context(n, **options):
    return Context(ids=tuple(range(n)), **options)


def linear(weight, bias=None):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return nn.Sequential(nn.Flatten(), layer)


# --- the right numbers, the right direction -------------------------------------------------------------------------


@given(seed=st.integers(0, 1000), eps=st.floats(0.01, 0.5))
@settings(max_examples=15, deadline=None)
def test_fgsm_of_a_linear_network_in_closed_form(seed, eps):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 4, generator=draw)
    x = torch.rand(2, 1, 2, 2, generator=draw)
    logits = x.flatten(1) @ weight.T
    gradient = (logits.softmax(1) - F.one_hot(logits.argmax(1), 3)) @ weight
    wanted = (x + eps * gradient.sign().reshape(x.shape)).clamp(0, 1)
    torch.testing.assert_close(Adversarial.fgsm(linear(weight), eps=eps).perturb(x), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["fgsm", "bim", "pgd"])
def test_same_as_art_in_image_units(name):
    """Normalised inputs, images in 0 to 255: the same as ART with ``preprocessing=``, called directly."""
    model, pictures = network(), images() * 255
    classifier = art_classifier(model, clip_values=(0.0, 255.0), preprocessing=(127.0, 128.0))
    options = {"eps": 8.0} if name == "fgsm" else {"eps": 8.0, "eps_step": 2.0, "max_iter": 5}
    if name == "pgd":
        options["num_random_init"] = 0
    names = {"fgsm": "FastGradientMethod", "bim": "BasicIterativeMethod", "pgd": "ProjectedGradientDescent"}
    direct = attack_class(names[name])(classifier, batch_size=1, **options)
    wanted = (torch.from_numpy(direct.generate(pictures.numpy())) - 127) / 128
    attack = Adversarial.preset(name, model, clip_values=(0, 255), normalization=(127.0, 128.0), **options)
    inputs = (pictures - 127) / 128
    found = attack.perturb(inputs)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    change = (found - inputs).abs() * 128
    assert change.max() <= 8.001
    assert change.max() >= 7.9
    result = attack.run(inputs)
    torch.testing.assert_close(result.l_inf, change.flatten(1).amax(1).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", PRESETS)
def test_untargeted_lowers_the_true_class_and_targeted_raises_the_aim(name):
    model, x = network(), images(6)
    options = {} if name == "jsma" else {"eps": 0.05}
    clean = model(x).softmax(1)
    away = clean.argmax(1)
    after = model(Adversarial.preset(name, model, **options).perturb(x)).softmax(1)
    if name == "jsma":  # which raises the runner-up, and may raise others too
        goal = clean.topk(2).indices[:, 1:]
        assert (after.gather(1, goal) > clean.gather(1, goal)).all()
    else:
        assert (after.gather(1, away[:, None]) < clean.gather(1, away[:, None])).all()
    aim = int((set(range(4)) - set(away.tolist())).pop())
    towards = model(Adversarial.preset(name, model, targeted_class=aim, **options).perturb(x)).softmax(1)
    assert (towards[:, aim] > clean[:, aim]).all()


def test_target_is_what_the_attack_moves_away_from():
    model, x = network(), images(2)
    target = 3 - model(x).argmax(1)
    after = model(Adversarial.fgsm(model, eps=0.02).values(x, context(2, target=target))).softmax(1)
    before = model(x).softmax(1)
    assert (after.gather(1, target[:, None]) < before.gather(1, target[:, None])).all()


def test_pgd_starts_at_random_and_bim_does_not():
    model, x = network(), images()
    bim, pgd = Adversarial.bim(model, max_iter=1), Adversarial.pgd(model, max_iter=1)
    assert torch.equal(bim.perturb(x, seed=0), bim.perturb(x, seed=1))
    assert not torch.equal(pgd.perturb(x, seed=0), pgd.perturb(x, seed=1))
    assert torch.equal(pgd.perturb(x, seed=1), pgd.perturb(x, seed=1))
    twice = torch.cat([x[:1], x[:1]])
    different = pgd.perturb(twice, ids=[4, 5])
    assert not torch.equal(different[0], different[1])


def test_default_step_reaches_the_border():
    attack = Adversarial.bim(linear(torch.tensor([[1.0] * 4, [-1.0] * 4])), eps=0.2)
    x = torch.full((1, 1, 2, 2), 0.6)
    torch.testing.assert_close(attack.perturb(x), x - 0.2)
    assert attack.config.make.__self__ is attack.config


# --- nothing depends on the batch, the order or what was drawn before ------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_batch_equals_singles_in_any_order(name):
    model, x = network(), images(4)
    attack = Adversarial.preset(name, model)
    ids = [7, 3, 5, 1]
    batch = attack.perturb(x, ids=ids)
    order = [2, 0, 3, 1]
    assert torch.equal(attack.perturb(x[order], ids=[ids[i] for i in order]), batch[order])
    for i in range(4):
        assert torch.equal(attack.values(x[i : i + 1], Context(ids=(ids[i],))), batch[i : i + 1])


def test_batch_size_is_near_to_singles_for_one_step():
    model, x = network(), images(5)
    together = Adversarial.fgsm(model, batch_size=2).perturb(x)
    assert (together == Adversarial.fgsm(model).perturb(x)).double().mean() > 0.99


def test_square_attack_is_seeded():
    model, x = network(), images(2)
    attack = Adversarial("SquareAttack", model=model, clip_values=(0, 1), eps=0.3, max_iter=20)
    first = attack.perturb(x)
    np.random.rand(3)  # noqa: NPY002
    assert torch.equal(first, attack.perturb(x))


def state(model):
    return {
        "training": [module.training for module in model.modules()],
        "grads": [p.grad for p in model.parameters()],
        "values": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "buffers": [b.clone() for b in model.buffers()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "random": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),  # noqa: NPY002
    }


def assert_same(before, after):
    assert before["training"] == after["training"]
    assert all(a is b for a, b in zip(before["grads"], after["grads"], strict=True))
    for key in ("values", "buffers"):
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(before[key], after[key], strict=True))
    for key in ("requires", "hooks", "random"):
        assert before[key] == after[key]


def used(model):
    """A network in the middle of training, with gradients, a frozen layer and a hook."""
    model.train()
    model(torch.rand(4, 2, 6, 6)).sum().backward()
    model[0].weight.requires_grad_(False)
    model[1].eval()
    model[0].register_forward_hook(lambda *args: None)
    return model


@pytest.mark.parametrize("name", PRESETS)
def test_everything_is_left_as_it_was(name):
    model, x = used(network()), images()
    before, copy = state(model), x.clone()
    found = Adversarial.preset(name, model).perturb(x)
    assert_same(before, state(model))
    assert torch.equal(x, copy)
    assert torch.equal(found, Adversarial.preset(name, model.eval()).perturb(x)), "train mode is no different"


def test_everything_is_left_as_it_was_after_an_error():
    model = used(network())
    before = state(model)

    def fail(*args):
        raise RuntimeError("inside the network")

    attack = Adversarial.fgsm(model)
    handle = model[5].register_full_backward_hook(fail)
    with pytest.raises(RuntimeError, match="inside the network"):
        attack.perturb(images())
    handle.remove()
    assert_same(before, state(model))


def test_instance_and_its_classifier_are_left_as_they_were():
    model = network()
    attack = attack_class("ProjectedGradientDescent")(art_classifier(used(model)), eps=0.1, max_iter=2, verbose=True)
    before = state(model)
    ours = Adversarial(attack, eps=0.2)
    ours.perturb(images())
    ours.perturb(images(), eps=0.05)
    assert_same(before, state(model))
    assert (attack.eps, attack._attack.eps, attack.verbose, attack.batch_size) == (0.1, 0.1, True, 32)


# --- every form of attack and network --------------------------------------------------------------------------------


def test_forms_of_one_attack_agree():
    model, x = network(), images()
    wanted = Adversarial.fgsm(model, eps=0.1).perturb(x)
    fgm = attack_class("FastGradientMethod")
    forms = [
        Adversarial(fgm(art_classifier(model), eps=0.1)),
        Adversarial(fgm, model=model, eps=0.1, clip_values=(0, 1)),
        Adversarial("FastGradientMethod", model=model, eps=0.1, clip_values=(0, 1)),
        Adversarial(lambda estimator, eps: fgm(estimator, eps=eps), model=model, eps=0.1, clip_values=(0, 1)),
        Adversarial.fgsm(art_classifier(model), eps=0.1),
        Adversarial.preset("fgsm", model, eps=0.1),
        Adversarial.fgsm(model, eps=0.1, norm="inf"),
    ]
    for form in forms:
        torch.testing.assert_close(form.perturb(x), wanted, atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", ["DeepFool", "CarliniL2Method", "HopSkipJump", "MomentumIterativeMethod"])
def test_other_attacks_run(name):
    options = {"max_iter": 3}
    if name == "CarliniL2Method":
        options = {"max_iter": 10, "binary_search_steps": 2, "initial_const": 10.0}
    if name == "HopSkipJump":
        options |= {"max_eval": 50, "init_eval": 20}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoChangeWarning)
        result = Adversarial(name, model=network(), clip_values=(0, 1), **options).run(images())
    assert result.clipped.shape == (3, 2, 6, 6)
    assert result.success.any()


def wrapped(kind):
    model = network()
    if kind == "data parallel":
        return nn.DataParallel(model)
    if kind == "compiled":
        return torch.compile(model, backend="aot_eager")
    if kind == "script":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.script(model)
    return model.to({"double": torch.float64, "bfloat16": torch.bfloat16}.get(kind, torch.float32))


@pytest.mark.parametrize("kind", ["data parallel", "compiled", "script", "double", "bfloat16"])
@pytest.mark.parametrize("name", ["fgsm", "bim", "jsma"])
def test_forms_of_network(kind, name):
    """ART takes float32 and nothing else; the network and the inputs may be of any kind."""
    model = wrapped(kind)
    dtype = next(iter(model.parameters())).dtype
    x = images().to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoChangeWarning)
        found = Adversarial.preset(name, model, eps=0.1).perturb(x)
        wanted = Adversarial.preset(name, network(), eps=0.1).perturb(x.float())
    assert found.dtype == dtype
    if kind != "bfloat16":
        assert ((found.float() - wanted).abs() < 1e-5).double().mean() > 0.98


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_result_is_an_ordinary_tensor_in_every_mode(mode):
    model = network()
    with mode():
        x = images()
        found = Adversarial.pgd(model).values(x, context(3))
    assert not found.is_inference()
    assert not found.requires_grad
    found.add_(0)
    model(found.requires_grad_()).sum().backward()
    assert torch.equal(found.detach(), Adversarial.pgd(network()).values(images(), context(3)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", PRESETS)
def test_cuda(name):
    model, x = network().cuda(), images().cuda()
    found = Adversarial.preset(name, model, eps=0.1).perturb(x)
    assert found.device == x.device
    wanted = Adversarial.preset(name, network(), eps=0.1).perturb(images())
    assert ((found.cpu() - wanted).abs() < 1e-4).double().mean() > 0.9
    assert next(model.parameters()).is_cuda
    on_cpu = Adversarial.preset(name, network(), eps=0.1).perturb(x)
    assert on_cpu.is_cuda


def test_mask_is_honoured_by_every_attack():
    model, x = network(), images()
    mask = torch.zeros(1, 6, 6)
    mask[:, :3] = 1
    for name in PRESETS:
        found = Adversarial.preset(name, model, mask=mask).perturb(x)
        assert torch.equal(found[:, :, 3:], x[:, :, 3:]), name
        assert not torch.equal(found[:, :, :3], x[:, :, :3]), name
    direct = attack_class("BasicIterativeMethod")(art_classifier(model), batch_size=1, verbose=False)
    wanted = direct.generate(x.numpy(), mask=mask.numpy())
    ours = Adversarial.bim(model, eps_step=0.1, max_iter=100, mask=mask)
    torch.testing.assert_close(ours.perturb(x), torch.from_numpy(wanted))
    with pytest.raises(AttackError, match=r"mask.*broadcastable"):
        Adversarial.fgsm(model, mask=torch.ones(5)).perturb(x)


def test_unchanged_values_keep_their_bits():
    """There and back between units costs rounding; where nothing was attacked there is none."""
    x = (images().double() * 255 - 127.3) / 57.9
    attack = Adversarial.jsma(network(), clip_values=(0, 255), normalization=(127.3, 57.9), eps=100.0, max_iter=2)
    changed = attack.perturb(x) != x
    assert 0 < int(changed.sum()) <= 3 * 8


# --- JSMA ------------------------------------------------------------------------------------------------------------


def test_jsma_aims_at_the_runner_up_and_does_not_draw():
    model, x = network(), images(5)
    goal = model(x).topk(2).indices[:, 1]
    direct = attack_class("SaliencyMapMethod")(art_classifier(model), theta=0.3, verbose=False)
    wanted = direct.generate(x.numpy(), y=goal.numpy())
    result = Adversarial.jsma(model).run(x)
    torch.testing.assert_close(result.clipped, torch.from_numpy(wanted), atol=1e-6, rtol=0)
    assert torch.equal(result.prediction[result.success], goal[result.success])


def test_jsma_takes_no_more_steps_than_asked():
    """Each step adds eps to two values, be they new or not."""
    model, x = network(), images()
    for steps in (1, 4):
        attack = Adversarial.jsma(model, eps=0.01, max_iter=steps)
        added = (attack.perturb(x) - x).flatten(1).sum(1)
        torch.testing.assert_close(added, torch.full((3,), 0.02 * steps), atol=1e-5, rtol=0)
        on_art = Adversarial.jsma(art_classifier(model), eps=0.01, max_iter=steps)
        torch.testing.assert_close(on_art.perturb(x), attack.perturb(x))
    few = Adversarial.jsma(model, eps=0.01, gamma=1 / 72).perturb(x)
    assert (few != x).flatten(1).sum(1).max() <= 2


def test_jsma_away_from_a_class_that_is_not_the_answer():
    model, x = network(), images(1)
    order = model(x).argsort(descending=True)[0]
    third = int(order[2])
    found = Adversarial.jsma(model, max_iter=2).run(x, target=order[1:2])
    assert model(found.clipped)[0, third] > model(x)[0, third]
    assert torch.equal(found.clipped, Adversarial.jsma(model, max_iter=2, targeted_class=third).perturb(x))


# --- several labels, one output --------------------------------------------------------------------------------------


def test_multi_label_fgsm_is_the_gradient_of_the_cross_entropies():
    model, x = network(5), images()
    inputs = x.clone().requires_grad_()
    logits = model(inputs)
    F.binary_cross_entropy_with_logits(logits, (logits > 0).float(), reduction="sum").backward()
    wanted = (x + 0.05 * inputs.grad.sign()).clamp(0, 1)
    attack = Adversarial.fgsm(model, eps=0.05, multi_label=True)
    torch.testing.assert_close(attack.perturb(x), wanted, atol=1e-6, rtol=0)
    result = attack.run(x)
    assert torch.equal(result.clean_prediction, logits > 0)
    assert torch.equal(result.success, ((logits > 0) != (model(wanted) > 0)).any(1))


@pytest.mark.parametrize("name", PRESETS)
def test_multi_label_without_any_positive_is_attacked_all_the_same(name):
    """An all-zero row of labels is what ART divides by its sum, and then attacks nothing."""
    model, x = network(5), images()
    with torch.no_grad():
        model[5].bias.sub_(model(x).max() + 0.01)
    result = Adversarial.preset(name, model, multi_label=True).run(x)
    assert not result.clean_prediction.any()
    assert result.success.all()


@pytest.mark.parametrize("name", PRESETS)
def test_multi_label_target_flips_that_label(name):
    model, x = network(5), images()
    target = torch.tensor([0, 3, 2])
    clean = model(x).gather(1, target[:, None])
    attack = Adversarial.preset(name, model, multi_label=True)
    after = model(attack.values(x, context(3, target=target))).gather(1, target[:, None])
    assert ((after - clean) * clean.sign() < 0).all()
    if name == "fgsm":
        inputs = x.clone().requires_grad_()
        (model(inputs).gather(1, target[:, None]) * clean.sign()).sum().backward()
        wanted = (x - 0.3 * inputs.grad.sign()).clamp(0, 1)
        torch.testing.assert_close(attack.values(x, context(3, target=target)), wanted)
    present = Adversarial.preset(name, model, multi_label=True, targeted_class=1, eps=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoChangeWarning)
        result = present.run(x)
    assert torch.equal(result.success, result.prediction[:, 1])
    assert result.success.all()


def test_multi_label_through_an_art_attack_whose_loss_would_fail():
    model, x = network(5), images()
    classifier = art_classifier(model, 5, loss=nn.BCEWithLogitsLoss(), preprocessing=(0.4, 0.3))
    direct = attack_class("FastGradientMethod")(classifier, eps=0.05)
    with pytest.raises(ValueError, match="size"):
        direct.generate(x.numpy(), y=np.array([[1, 0, 1, 0, 0]] * 3, dtype=np.float32))
    ours = Adversarial(direct, multi_label=True)
    inner = Adversarial.fgsm(model, eps=0.05, multi_label=True, normalization=(0.4, 0.3))
    wanted = inner.perturb((x - 0.4) / 0.3) * 0.3 + 0.4
    torch.testing.assert_close(ours.perturb(x), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", PRESETS)
def test_one_output(name):
    model, x = network(1), images()
    with torch.no_grad():
        model[5].bias.sub_(model(x).mean())
    sign = model(x).sign()
    result = Adversarial.preset(name, model).run(x)
    assert ((model(result.clipped) - model(x)) * sign < 0).all()
    assert result.prediction.shape == (3, 1)
    squeezed = nn.Sequential(model, nn.Flatten(0))
    assert torch.equal(Adversarial.preset(name, squeezed).perturb(x), result.clipped)


@pytest.mark.parametrize(("ending", "options"), [(nn.Softmax(1), {}), (nn.Sigmoid(), {"multi_label": True})])
def test_networks_that_end_in_probabilities(ending, options):
    model, x = network(), images()
    ended = nn.Sequential(model, ending)
    wanted = Adversarial.fgsm(model, eps=0.1, **options).run(x)
    found = Adversarial.fgsm(ended, eps=0.1, probabilities=True, **options).run(x)
    assert ((found.clipped - wanted.clipped).abs() < 1e-5).double().mean() > 0.98
    assert torch.equal(found.clean_prediction, wanted.clean_prediction)
    with pytest.warns(ProbabilityWarning, match="probabilities=True"):
        Adversarial.fgsm(ended, eps=0.1, **options).run(x)


def test_dictionary_output():
    model, x = network(), images()

    class Dictionary(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return {"logits": self.model(x)}

    wanted = Adversarial.fgsm(model).perturb(x)
    assert torch.equal(Adversarial.fgsm(Dictionary(), output="logits").perturb(x), wanted)
    with pytest.raises(ModelError, match="output="):
        Adversarial.fgsm(Dictionary()).perturb(x)


# --- results, sweeps, Captum -----------------------------------------------------------------------------------------


def test_result():
    model, x = network(), images()
    result = Adversarial.bim(model, eps=0.1).run(x)
    assert torch.equal(result.clean_prediction, model(x).argmax(1))
    assert torch.equal(result.prediction, model(result.clipped).argmax(1))
    assert torch.equal(result.success, result.clean_prediction != result.prediction)
    torch.testing.assert_close(result.l2, (result.clipped - x).flatten(1).norm(dim=1).double(), atol=1e-5, rtol=0)
    assert result.success_rate == result.success.double().mean()
    assert repr(result).startswith("AttackResult(bim, eps=0.1, success=")
    towards = Adversarial.bim(model, eps=0.1, targeted_class=2).run(x)
    assert torch.equal(towards.success, towards.prediction == 2)


def test_raw_may_leave_the_clip_range():
    """An estimator without clip values clips nothing; what ``do`` sets is clipped all the same."""
    attack = attack_class("FastGradientMethod")(art_classifier(network(), clip_values=None), eps=0.3)
    result = Adversarial(attack, clip_values=(0, 1)).run(images())
    assert result.raw.max() > 1.1
    assert result.clipped.min() >= 0
    assert result.clipped.max() <= 1


def test_sweep():
    model, x = network(), images()
    attack = Adversarial.bim(model)
    results = attack.sweep(x, eps=[0.01, 0.3])
    assert list(results) == [0.01, 0.3]
    for eps, result in results.items():
        assert torch.equal(result.clipped, Adversarial.bim(model, eps=eps).perturb(x))
        assert torch.equal(result.clipped, attack.perturb(x, eps=eps))
        assert result.eps == eps
    with pytest.raises(AttackError, match=r"eps.*clip range"):
        attack.sweep(x, eps=[0.1, 2.0])
    with pytest.raises(AttackError, match="DeepFool has none"):
        Adversarial("DeepFool", model=model, clip_values=(0, 1)).sweep(x, eps=[0.1])


def test_explicit_step_keeps_its_ratio():
    recipe = Adversarial.bim(network(), eps=0.4, eps_step=0.1).config.resized(0.2)
    assert recipe.settings["eps_step"] == pytest.approx(0.05)
    instance = attack_class("BasicIterativeMethod")(art_classifier(network()), eps=0.4, eps_step=0.1)
    assert Adversarial(instance).config.resized(0.2).settings == {"eps": 0.2, "eps_step": pytest.approx(0.05)}


def test_min_param_perturbation():
    """x = 0.5 everywhere, logits (s, 0) with s the sum minus 1.6: FGSM wins from eps = 0.1 on."""
    model = linear(torch.tensor([[1.0] * 4, [0.0] * 4]), torch.tensor([-1.6, 0.0]))
    search = MinParamPerturbation(
        model, Adversarial.fgsm(model), arg_name="eps", arg_min=0.01, arg_max=0.5, arg_step=0.02, mode="linear"
    )
    found, eps = search.evaluate(torch.full((1, 1, 2, 2), 0.5), target=0, perturbations_per_eval=1)
    assert eps == pytest.approx(0.11)
    torch.testing.assert_close(found, torch.full((1, 1, 2, 2), 0.39))


def test_attack_comparator():
    model, x = network(), images()
    target = model(x).argmax(1)

    def accuracy(out, target):
        return (out.argmax(1) == target).float()

    comparator = AttackComparator(model, accuracy)
    comparator.add_attack(Adversarial.fgsm(model), "fgsm")
    comparator.add_attack(Adversarial.bim(model), "bim", attack_kwargs={"eps": 0.2})
    results = comparator.evaluate(x, target=target)
    assert torch.equal(results["Original"], torch.ones(3))
    for name, eps in (("fgsm", 0.3), ("bim", 0.2)):
        wanted = Adversarial.preset(name, model, eps=eps).run(x)
        assert torch.equal(results[name]["mean"], (~wanted.success).float())


def test_tuple_in_tuple_out():
    model, x = network(), images()
    (found,) = Adversarial.fgsm(model).perturb((x,))
    assert torch.equal(found, Adversarial.fgsm(model)(x))
    with pytest.raises(InputError, match=r"one tensor.*2 tensors"):
        Adversarial.fgsm(model).perturb((x, x))
    with pytest.raises(InputError, match=r"one tensor.*input 2"):
        Adversarial.fgsm(model).values(x, Context(ids=(0, 0, 0), position=1))


def test_repr():
    attack = Adversarial.pgd(network(), eps=8, clip_values=(0, 255), normalization=(127.0, 128.0), targeted_class=3)
    shown = repr(attack)
    for part in ("pgd", "eps=8", "num_random_init=1", "(0.0, 255.0)", "127.0", "targeted_class=3"):
        assert part in shown
    assert repr(Adversarial.fgsm(network())) == "Adversarial(fgsm, eps=0.3, clip_values=(0.0, 1.0))"


# --- errors before any work ------------------------------------------------------------------------------------------


class Unused(nn.Module):
    def forward(self, x):
        raise AssertionError("an error must come before any work")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"eps": -0.1}, "`eps` to be a finite number, at least 0"),
        ({"eps": float("nan")}, "finite"),
        ({"eps": 1.5}, r"at most the clip range 1 of \(0.0, 1.0\), but got 1.5.*clip_values=\(0, 255\)"),
        ({"eps": 256, "clip_values": (0, 255)}, "at most the clip range 255"),
        ({"clip_values": (1.0, 0.0)}, "low < high"),
        ({"clip_values": (0.0, float("inf"))}, "low < high"),
        ({"clip_values": 1.0}, r"a pair \(low, high\)"),
        ({"eps_step": 0.0}, "`eps_step` to be positive"),
        ({"max_iter": 0}, "`max_iter` to be positive"),
        ({"batch_size": 0}, "`batch_size`"),
        ({"batch_size": 2, "multi_label": True}, "1 for multi-label"),
        ({"targeted_class": -1}, "`targeted_class`"),
        ({"targeted_class": 1.0}, "`targeted_class`"),
    ],
)
def test_settings_are_checked_first(options, match):
    with pytest.raises(AttackError, match=match):
        Adversarial.bim(Unused(), **options)


def test_norms_other_than_inf_may_exceed_the_range():
    x = images()
    result = Adversarial.fgsm(network(), eps=2.0, norm=2).run(x)
    assert (result.l2 <= 2.0001).all()
    assert (result.l2 > 1).all()


def test_what_is_attacked_is_checked_first():
    with pytest.raises(AttackError, match=r"an nn.Module or an ART classifier, but got function.*BlackBoxClassifier"):
        Adversarial.fgsm(lambda x: x)
    with pytest.raises(AttackError, match=r"nn\.Module"):
        Adversarial("FastGradientMethod", clip_values=(0, 1))
    with pytest.raises(AttackError, match=r"clip_values.*nothing is clipped"):
        Adversarial("FastGradientMethod", model=network())
    instance = attack_class("FastGradientMethod")(art_classifier(network()))
    with pytest.raises(AttackError, match="`model` to be None"):
        Adversarial(instance, model=network())
    with pytest.raises(AttackError, match="those of the attack's estimator"):
        Adversarial(instance, clip_values=(0, 255))
    with pytest.raises(AttackError, match="an ART EvasionAttack"):
        Adversarial(3, model=network(), clip_values=(0, 1))
    unclipped = attack_class("FastGradientMethod")(art_classifier(network(), clip_values=None))
    with pytest.raises(AttackError, match="nothing is clipped"):
        Adversarial(unclipped)


def test_unknown_names():
    with pytest.raises(UnknownNameError, match="Did you mean 'fgsm'"):
        Adversarial.preset("fgms", network())
    with pytest.raises(UnknownNameError, match="Did you mean 'SquareAttack'"):
        Adversarial("SquareAttak", model=network(), clip_values=(0, 1))
    with pytest.raises(UnknownNameError, match="Did you mean 'num_random_init'"):
        Adversarial.fgsm(network(), num_random_ini=3)
    with pytest.raises(UnknownNameError, match=r"setting of FastGradientMethod.*Did you mean 'eps'"):
        Adversarial(attack_class("FastGradientMethod"), model=network(), clip_values=(0, 1), epss=0.1)


def test_attacks_that_cannot_aim():
    attack = Adversarial("DeepFool", model=network(), clip_values=(0, 1), targeted_class=1)
    with pytest.raises(AttackError, match="DeepFool cannot aim"):
        attack.perturb(images())
    with pytest.raises(AttackError, match="a class in 0 to 3"):
        Adversarial.fgsm(network(), targeted_class=9).perturb(images())


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        (torch.zeros(1, 2, 6, 6, dtype=torch.uint8), "floats"),
        (torch.zeros(0, 2, 6, 6), "at least one example"),
        (torch.full((1, 2, 6, 6), float("nan")), "finite"),
    ],
)
def test_inputs_are_checked_first(inputs, match):
    with pytest.raises(InputError, match=match):
        Adversarial.fgsm(Unused()).perturb(inputs)


def test_targets_are_checked():
    attack, x = Adversarial.fgsm(network()), images()
    for target, match in [
        (torch.tensor([0, 1]), r"indices \(3,\)"),
        (torch.tensor([0, 1, 4]), "0 to 3"),
        (torch.tensor([0.0, 1, 2]), "indices"),
    ]:
        with pytest.raises(TargetError, match=match):
            attack.run(x, target=target)
    with pytest.raises(InputError, match="one per example, 3"):
        attack.run(x, ids=[1])


# --- the range of the images -----------------------------------------------------------------------------------------

GREY = (127.0, 128.0)


def grey_levels():
    return (images() * 255).round()


@pytest.mark.parametrize(
    ("options", "inputs", "match"),
    [
        ({}, lambda: (images() - 0.5) / 0.2, r"within clip_values=\(0.0, 1.0\).*If they are normalised, write norm"),
        ({}, grey_levels, r"values from .* to 2\d\d.*clip_values=\(0, 255\), and sizes in these units: eps=8"),
        ({}, lambda: images() * 1.2, r"clip_values=\(0, 2\), or clamp them"),
        ({"normalization": (0.5, 0.2)}, grey_levels, r"Write clip_values=\(0, 255\)"),
        ({"normalization": (0.5, 0.2)}, lambda: (grey_levels() - 0.5) / 0.2, r"clip_values=\(0, 255\)"),
        ({"clip_values": (0, 255), "eps": 8}, images, r"in the units of.*Write clip_values=\(0, 1\)"),
    ],
)
def test_images_in_other_units_are_refused_before_any_work(options, inputs, match):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=match):
            Adversarial.fgsm(Unused(), **options).perturb(inputs())


@pytest.mark.parametrize(
    ("options", "obeyed", "inputs"),
    [
        ({}, {"normalization": (0.5, 0.2)}, lambda: (images() - 0.5) / 0.2),
        ({}, {"clip_values": (0, 255), "eps": 8}, grey_levels),
        ({}, {"clip_values": (0, 2)}, lambda: images() * 1.2),
        ({"normalization": (0.5, 0.2)}, {"clip_values": (0, 255)}, lambda: (grey_levels() - 0.5) / 0.2),
        ({"clip_values": (0, 255), "eps": 8}, {"clip_values": (0, 1), "eps": 8 / 255}, images),
    ],
)
def test_the_hint_works_when_obeyed(options, obeyed, inputs):
    with pytest.raises(InputError):
        Adversarial.fgsm(network(), **options).perturb(inputs())
    assert Adversarial.fgsm(network(), **{**options, **obeyed}).run(inputs()).l_inf.max() > 0


def test_the_range_comes_from_the_normalization():
    attack = Adversarial.pgd(network(), eps=4, normalization=GREY)
    assert attack.clip_values == (0.0, 255.0)
    assert Adversarial.fgsm(network(), normalization=([0.485, 0.456], [0.229, 0.224])).clip_values == (0.0, 1.0)
    assert Adversarial.fgsm(network(), normalization=(0.0, 255.0)).clip_values == (0.0, 255.0)
    clean = grey_levels()
    result = attack.run((clean - 127.0) / 128.0)
    assert result.l_inf.max() == pytest.approx(4, abs=1e-3)
    with pytest.raises(AttackError, match=r"`clip_values` to be given for images with normalization=.*clip_values="):
        Adversarial.fgsm(network(), normalization=(3.0, 2.0))
    assert Adversarial.fgsm(network(), normalization=(3.0, 2.0), clip_values=(0, 8)).clip_values == (0, 8)


def test_a_size_for_images_to_1_is_refused_for_images_to_255():
    match = r"in the units of clip_values=\(0.0, 255.0\), half a grey level or more, but got 0.01569.*write eps=4\."
    for preset in ("fgsm", "bim", "pgd", "jsma"):
        with pytest.raises(AttackError, match=match):
            Adversarial.preset(preset, Unused(), eps=4 / 255, normalization=GREY)
    with pytest.raises(AttackError, match=match):
        Adversarial("FastGradientMethod", model=Unused(), eps=4 / 255, clip_values=(0, 255))
    assert Adversarial.pgd(Unused(), eps=4, normalization=GREY).config.size == 4
    assert Adversarial.fgsm(network(), clip_values=(0, 255)).config.size == pytest.approx(0.3 * 255)


def test_images_outside_an_estimators_range():
    attack = Adversarial.fgsm(art_classifier(network()), eps=0.1)
    with pytest.raises(InputError, match="give the classifier their `clip_values`"):
        attack.perturb(grey_levels())


# --- wrong settings, and what they are called elsewhere --------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "given", "meant"),
    [
        ("pgd", {"steps": 5}, "max_iter"),
        ("pgd", {"num_steps": 5}, "max_iter"),
        ("bim", {"nb_iter": 5}, "max_iter"),
        ("bim", {"alpha": 0.1}, "eps_step"),
        ("pgd", {"step_size": 0.1}, "eps_step"),
        ("pgd", {"restarts": 2}, "num_random_init"),
        ("fgsm", {"epsilon": 0.1}, "eps"),
        ("fgsm", {"bounds": (0, 1)}, "clip_values"),
        ("fgsm", {"target_class": 1}, "targeted_class"),
        ("fgsm", {"mean": 0.5}, "normalization"),
        ("fgsm", {"ord": 2}, "norm"),
        ("jsma", {"steps": 3}, "max_iter"),
        ("jsma", {"epsilon": 0.2}, "eps"),
        ("pgd", {"max_itr": 3}, "max_iter"),
        ("fgsm", {"batchsize": 2}, "batch_size"),
    ],
)
def test_an_unknown_setting_points_to_the_right_one(preset, given, meant):
    with pytest.raises(UnknownNameError, match=rf"setting of {preset}.*but got .*Did you mean '{meant}'"):
        Adversarial.preset(preset, Unused(), **given)
    (value,) = given.values()
    obeyed = {meant: (0.5, 0.2) if meant == "normalization" else value}
    assert Adversarial.preset(preset, network(), **obeyed).perturb(images()).shape == images().shape


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("fgms", "fgsm"), ("FGSM", "fgsm"), ("pgdd", "pgd"), ("squareattack", "SquareAttack"), ("deepfol", "DeepFool"),
        ("cw", "CarliniL2Method"), ("apgd", "AutoProjectedGradientDescent"),
    ],
)  # fmt: skip
def test_an_unknown_attack_lists_the_short_names_first(name, meant):
    match = rf"'fgsm', 'bim', 'pgd', 'jsma', or of ART's attacks \(.*Did you mean '{meant}'"
    with pytest.raises(UnknownNameError, match=match) as caught:
        Adversarial(name, model=Unused(), clip_values=(0, 1))
    assert str(caught.value).endswith(f"Did you mean '{meant}'?")
    Adversarial(meant, model=Unused(), clip_values=(0, 1))


def test_a_preset_by_its_name_is_the_preset():
    model, x = network(), images()
    for name in ("fgsm", "bim", "pgd", "jsma"):
        own = {"eps": 0.2} | ({"max_iter": 3} if name != "fgsm" else {})
        one, other = Adversarial(name, model=model, **own), Adversarial.preset(name, model, **own)
        assert repr(one) == repr(other)
        assert torch.equal(one.perturb(x), other.perturb(x))


WRONG = [
    ({"eps": "8/255"}, r"`eps` to be a finite number.*but got '8/255'. Write it without quotes: eps=8 / 255"),
    ({"eps": "0.1"}, r"`eps`.*without quotes: eps=0.1"),
    ({"eps": "large"}, "`eps` to be a finite number"),
    ({"eps": True}, "`eps`"),
    ({"eps": [0.1]}, "`eps`"),
    ({"eps": 1j}, "`eps`"),
    ({"eps": torch.tensor(0.1)}, "`eps`"),
    ({"eps": -0.1}, "`eps`"),
    ({"eps": float("inf")}, "`eps`"),
    ({"eps_step": "2/255"}, r"`eps_step` to be positive.*eps_step=2 / 255"),
    ({"eps_step": -1}, "`eps_step`"),
    ({"eps_step": True}, "`eps_step`"),
    ({"eps_step": float("nan")}, "`eps_step`"),
    ({"eps": 0.1, "eps_step": 0.2}, r"`eps_step` to be at most eps, which is 0.1"),
    ({"max_iter": 2.5}, "`max_iter` to be positive, a whole number"),
    ({"max_iter": "10"}, "`max_iter`"),
    ({"max_iter": True}, "`max_iter`"),
    ({"max_iter": -3}, "`max_iter`"),
    ({"num_random_init": -1}, "`num_random_init`"),
    ({"num_random_init": 1.5}, "`num_random_init`"),
    ({"norm": "l2"}, "`norm`"),
    ({"norm": 0.5}, "`norm`"),
    ({"norm": float("nan")}, "`norm`"),
    ({"targeted": "yes"}, "`targeted` to be True or False"),
    ({"targeted": 1}, "`targeted`"),
    ({"batch_size": "2"}, "`batch_size`"),
    ({"batch_size": 2.0}, "`batch_size`"),
    ({"batch_size": True}, "`batch_size`"),
    ({"targeted_class": "cat"}, "`targeted_class`"),
    ({"targeted_class": True}, "`targeted_class`"),
    ({"multi_label": "no"}, "`multi_label`"),
    ({"probabilities": 1}, "`probabilities`"),
    ({"output": 1.5}, "`output`"),
    ({"mask": [1]}, "`mask`"),
    ({"clip_values": "ab"}, "`clip_values`"),
    ({"clip_values": ("a", "b")}, "`clip_values`"),
    ({"clip_values": (0, 1, 2)}, "`clip_values`"),
    ({"clip_values": (False, True)}, "`clip_values`"),
    ({"normalization": 3}, "`normalization`"),
    ({"normalization": ("a", "b")}, "`normalization`"),
]


@pytest.mark.parametrize(("options", "match"), WRONG, ids=[str(options) for options, _ in WRONG])
def test_every_wrong_setting_is_refused_at_construction(options, match):
    with pytest.raises(CEPluginError, match=match):
        Adversarial.pgd(Unused(), **options)


@pytest.mark.parametrize("eps", ["8/255", "x", True, None, [0.1], float("nan"), -1])
def test_wrong_sizes_at_the_call(eps):
    attack, x = Adversarial.fgsm(Unused()), images()
    if eps is not None:
        with pytest.raises(AttackError, match="`eps`"):
            attack.perturb(x, eps=eps)
        with pytest.raises(AttackError, match="`eps`"):
            attack.sweep(x, eps=[0.1, eps])
    with pytest.raises(AttackError, match="`eps`"):
        attack.sweep(x, eps="8/255")
    with pytest.raises(InputError, match="`seed`"):
        attack.perturb(x, seed="a")
    with pytest.raises(InputError, match="`inputs`"):
        attack.perturb(None)


_values = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 400), st.floats(-2, 400), st.text(max_size=5), st.just([0.1]),
    st.sampled_from(["8/255", "inf", float("nan"), float("inf"), (0, 1), (0, 255), np.float32(0.1), np.int64(2)]),
)  # fmt: skip
_names = st.sampled_from(
    ["eps", "eps_step", "max_iter", "num_random_init", "norm", "targeted", "batch_size", "targeted_class",
     "clip_values", "multi_label", "probabilities", "normalization", "mask", "output", "steps", "alpha"]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["fgsm", "bim", "pgd", "jsma"]), st.dictionaries(_names, _values, max_size=3))
def test_random_settings_are_an_error_of_ours_or_a_valid_attack(preset, options):
    try:
        attack = Adversarial.preset(preset, Unused(), **options)
    except CEPluginError:
        return
    low, high = attack.clip_values
    assert low < high
    assert math.isfinite(attack.config.size)
    assert attack.config.size >= 0
    assert attack.config.setting("max_iter", 1) >= 1


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_no_change_warns(eps):
    flat = linear(torch.zeros(3, 4), torch.tensor([1.0, 2, 3]))
    x = torch.rand(2, 1, 2, 2)
    with pytest.warns(NoChangeWarning, match="fgsm changed nothing in 2 of 2"):
        found = Adversarial.fgsm(flat, eps=eps).perturb(x)
    assert torch.equal(found, x)


def test_attack_that_returns_no_images():
    load_art()
    from art.attacks.attack import EvasionAttack

    class Patch(EvasionAttack):
        attack_params = ()
        _estimator_requirements = ()

        def __init__(self, estimator):
            super().__init__(estimator=estimator)

        def generate(self, x, y=None, **kwargs):
            return x, y

    class Broken(Patch):
        def generate(self, x, y=None, **kwargs):
            return x * np.nan

    with pytest.raises(AttackError, match="returns adversarial images"):
        Adversarial(Patch, model=network(), clip_values=(0, 1)).perturb(images())
    with pytest.raises(AttackError, match="finite"):
        Adversarial(Broken, model=network(), clip_values=(0, 1)).perturb(images())


def test_black_box_estimator():
    load_art()
    from art.estimators.classification import BlackBoxClassifier

    weight = np.array([[1.0, 1, -1, -1], [0, 0, 0, 0]], dtype=np.float32)
    classifier = BlackBoxClassifier(lambda x: x.reshape(len(x), -1) @ weight.T, (1, 2, 2), 2, clip_values=(0.0, 1.0))
    attack = attack_class("HopSkipJump")(classifier, max_iter=2, max_eval=50, init_eval=10, verbose=False)
    result = Adversarial(attack).run(torch.tensor([[[[0.6, 0.6], [0.5, 0.5]]]]))
    assert result.success.all()
