"""What works round ART's quirks, each checked against ART itself."""

from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from ce_plugin.errors import AttackError, ModelError, UnknownNameError
from ce_plugin.interventions.crafting import BinaryProblem, ImageNetwork
from ce_plugin.networks.art import attack_class, attack_with_estimator, build_classifier, copy_attack, is_art_attack
from ce_plugin.networks.forward import clip_values_of, is_art_classifier, load_art, unwrap

CPU = torch.device("cpu")


def network(n_classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 9, n_classes))


def art_classifier(model, **options):
    load_art()
    from art.estimators.classification import PyTorchClassifier

    settings = {"clip_values": (0.0, 1.0), "input_shape": (2, 5, 5), "nb_classes": 3, **options}
    return PyTorchClassifier(model, loss=nn.CrossEntropyLoss(), device_type="cpu", **settings)


def run_python(code, home):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env={"HOME": str(home)},
        check=True,
    )
    return result.stdout


def test_not_imported_until_used(tmp_path):
    code = (
        "import sys, ce_plugin.networks.art as a, ce_plugin.networks.forward as f;"
        "import ce_plugin.interventions.adversarial as b; from torch import nn;"
        "b.Adversarial.pgd(nn.Linear(1, 2)); print(f.is_art_classifier(nn.Linear(1, 2)), a.is_art_attack(3),"
        "'art' in sys.modules)"
    )
    assert run_python(code, tmp_path) == "False False False\n"
    assert not (tmp_path / ".art").exists()


def test_users_logging_random_state_and_config_are_kept(tmp_path):
    config = tmp_path / ".art" / "config.json"
    config.parent.mkdir()
    config.write_text(f'{{"ART_DATA_PATH": "{tmp_path}/mine"}}')
    log = tmp_path / "log.txt"
    code = f"""
import logging, random, numpy as np, torch
logging.basicConfig(handlers=[logging.FileHandler({str(log)!r}, mode="w")], level=logging.INFO)
logging.info("before")
states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
from ce_plugin.networks.forward import load_art
load_art()
logging.info("after")
print(states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()))
print(logging.getLogger("tests").handlers)
import art.config
print(art.config.ART_DATA_PATH)
"""
    assert run_python(code, tmp_path).split() == ["True", "[]", f"{tmp_path}/mine"]
    assert "mine" in config.read_text()
    text = log.read_text()
    assert "before" in text
    assert "after" in text


def test_kinds_are_told_apart():
    classifier = art_classifier(network())
    attack = attack_class("FastGradientMethod")(classifier)
    assert is_art_classifier(classifier)
    assert not is_art_classifier(attack)
    assert is_art_attack(attack)
    assert not is_art_attack(classifier)
    assert logging.getLogger("art").handlers


def test_unknown_attack_names_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'FastGradientMethod'"):
        attack_class("FastGradientMethd")
    with pytest.raises(UnknownNameError, match="one of"):
        attack_class("load_art")


@pytest.mark.parametrize("preprocessing", [None, (127.0, 128.0), (np.array([0.3, 0.6]), np.array([0.2, 0.5]))])
def test_unwrap_computes_what_predict_computes(preprocessing):
    options = {} if preprocessing is None else {"preprocessing": preprocessing}
    classifier = art_classifier(network(), **options)
    x = np.random.default_rng(0).random((4, 2, 5, 5), dtype=np.float32)
    module, clip = unwrap(classifier)
    assert clip == (0.0, 1.0)
    np.testing.assert_allclose(module(torch.from_numpy(x)).detach().numpy(), classifier.predict(x), atol=1e-6)
    # ... and its gradient is that of ART.
    y = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    inputs = torch.from_numpy(x).requires_grad_()
    nn.functional.cross_entropy(module(inputs), torch.tensor([0, 1, 2, 0])).backward()
    np.testing.assert_allclose(inputs.grad, classifier.loss_gradient(x, y), atol=1e-7)
    assert any(child is classifier.model for child in module.modules()), "eval mode and hooks must reach the network"


def test_unwrap_applies_torch_defences_and_refuses_others():
    load_art()
    from art.defences.postprocessor import Rounded
    from art.defences.preprocessor import FeatureSqueezing
    from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
    from art.estimators.classification import BlackBoxClassifier

    class Square(PreprocessorPyTorch):
        def forward(self, x, y=None):
            return x**2, y

    square = Square(device_type="cpu", apply_predict=True)
    classifier = art_classifier(network(), preprocessing_defences=square, preprocessing=(0.5, 2.0))
    x = np.random.default_rng(0).random((2, 2, 5, 5), dtype=np.float32)
    module, _ = unwrap(classifier)
    np.testing.assert_allclose(module(torch.from_numpy(x)).detach().numpy(), classifier.predict(x), atol=1e-6)
    squeezing = FeatureSqueezing(clip_values=(0.0, 1.0))
    with pytest.raises(ModelError, match=r"FeatureSqueezing"):
        unwrap(art_classifier(network(), preprocessing_defences=squeezing))
    with pytest.raises(ModelError, match="Rounded"):
        unwrap(art_classifier(network(), postprocessing_defences=Rounded()))
    with pytest.raises(ModelError, match="BlackBoxClassifier"):
        unwrap(BlackBoxClassifier(lambda x: x, (2,), 2))


def test_image_network_normalises_and_picks():
    model = network().double()
    images = torch.rand(2, 2, 5, 5)
    net = ImageNetwork(model, lambda x: (x - 0.5) / 2)
    assert net(images).dtype == torch.float32
    torch.testing.assert_close(net(images), model((images.double() - 0.5) / 2).float())
    assert not list(net.parameters()), "ART must not reach the user's network"

    class Dictionary(nn.Module):
        def forward(self, x):
            return {"scores": x.flatten(1), "other": x}

    torch.testing.assert_close(ImageNetwork(Dictionary(), output="scores")(images), images.flatten(1))
    torch.testing.assert_close(ImageNetwork(Dictionary(), output=lambda r: r["scores"])(images), images.flatten(1))
    with pytest.raises(ModelError, match=r"dict.*output="):
        ImageNetwork(Dictionary())(images)
    with pytest.raises(ModelError, match=r"\(N, C\)"):
        ImageNetwork(nn.Identity())(images)
    assert ImageNetwork(nn.Flatten(0))(torch.rand(3, 1)).shape == (3, 1)


def test_probabilities_become_logits():
    logits = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64)
    softmax = ImageNetwork(nn.Softmax(1), probabilities=True)(logits.float())
    torch.testing.assert_close(softmax.softmax(1), logits.softmax(1).float())
    sigmoid = ImageNetwork(nn.Sigmoid(), probabilities=True, multi_label=True)(logits.float())
    torch.testing.assert_close(sigmoid, logits.float(), atol=1e-5, rtol=1e-5)
    assert ImageNetwork(nn.Sigmoid(), probabilities=True)(torch.tensor([[200.0], [-200.0]])).isfinite().all()


def test_binary_problem_decides_by_the_weakest_label_and_descends_the_sum():
    logits = torch.tensor([[1.5, -0.5, 3.0]], requires_grad=True)
    problem = BinaryProblem(nn.Identity(), torch.tensor([1.0, -1.0, 0.0]))
    scores = problem(logits)
    assert scores.tolist() == [[-0.25, 0.25]]
    scores[0, 1].backward()
    expected = -torch.autograd.grad(
        nn.functional.binary_cross_entropy_with_logits(logits[:, :2], torch.tensor([[1.0, 0.0]]), reduction="sum"),
        logits,
    )[0]
    torch.testing.assert_close(logits.grad, expected / 2)
    assert problem(torch.tensor([[1.5, 0.2, -9.0]])).argmax(1) == 0, "one label flipped"


def test_binary_problem_of_a_sure_network_still_has_a_gradient():
    logits = torch.tensor([[30.0]], requires_grad=True)
    problem = BinaryProblem(nn.Identity(), torch.tensor([1.0]))
    nn.functional.cross_entropy(problem(logits), torch.tensor([1])).backward()
    assert logits.grad != 0


def test_sequential_keeps_its_hooks_and_forward():
    class Doubled(nn.Sequential):
        def forward(self, x):
            return 2 * super().forward(x)

    model, seen = Doubled(nn.Flatten(), nn.Linear(50, 3)), []
    model.register_forward_hook(lambda *args: seen.append(1))
    classifier = build_classifier(ImageNetwork(model), (2, 5, 5), 3, (0.0, 1.0), CPU)
    x = torch.rand(2, 2, 5, 5)
    np.testing.assert_allclose(classifier.predict(x.numpy()), model(x).detach().numpy(), rtol=1e-6)
    assert len(seen) == 2


def test_estimator_goes_by_position():
    classifier = art_classifier(network())
    for name in ("FastGradientMethod", "SaliencyMapMethod", "DeepFool", "SquareAttack"):
        attack = attack_with_estimator(attack_class(name), classifier, {"batch_size": 3})
        assert attack.estimator is classifier
        assert attack.batch_size == 3
    with pytest.raises(AttackError, match="nonnegative"):
        attack_with_estimator(attack_class("FastGradientMethod"), classifier, {"eps": -1.0})
    with pytest.raises(AttackError, match="returns an ART EvasionAttack"):
        attack_with_estimator(lambda estimator: 3, classifier, {})


def test_copies_of_attacks_leave_the_original():
    classifier = art_classifier(network())
    attack = attack_class("ProjectedGradientDescent")(classifier, eps=0.1, max_iter=3)
    other = art_classifier(network())
    clone = copy_attack(attack, other, {"eps": 0.2, "verbose": False, "unknown": 1})
    assert (clone.eps, clone._attack.eps, clone.verbose, attack.eps, attack._attack.eps) == (0.2, 0.2, False, 0.1, 0.1)
    assert clone.estimator is other
    assert clone._attack.estimator is other
    assert attack.estimator is classifier
    with pytest.raises(AttackError, match="nonnegative"):
        copy_attack(attack, classifier, {"eps": -0.5})


def test_clip_values_of_arrays():
    classifier = art_classifier(network(), clip_values=(np.array([0.0, -1.0]), np.array([1.0, 2.0])))
    assert clip_values_of(classifier) == (-1.0, 2.0)
    assert clip_values_of(None) is None
