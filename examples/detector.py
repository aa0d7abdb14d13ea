"""A detector in the Adversarial Robustness Toolbox: train a classifier, attack it, fit the detector, detect, count.

It is the toolbox's own script for its detectors with one line changed: `CausalEffectDetector(classifier)`, which needs
clean images only, replaces `BinaryInputDetector(network)`, whose network must be trained on attacked images.
"""

import numpy as np
import torch
from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent
from art.estimators.classification import PyTorchClassifier
from torch import nn

from ce_plugin.datasets import digits
from ce_plugin.detection import CausalEffectDetector
from ce_plugin.models import DigitsCNN

torch.set_num_threads(1)  # several threads are no faster for a network this small

# Read the data: handwritten digits of 8 x 8 pixels, which come with scikit-learn.
images, labels = (part.numpy() for part in digits())
order = np.random.default_rng(0).permutation(len(images))
train, test = order[:1300], order[1300:]

# Make the classifier and train it.
torch.manual_seed(0)
network = DigitsCNN()
classifier = PyTorchClassifier(
    model=network,
    loss=nn.CrossEntropyLoss(),
    optimizer=torch.optim.Adam(network.parameters(), lr=3e-3),
    input_shape=(1, 8, 8),
    nb_classes=10,
    clip_values=(0.0, 1.0),
    device_type="cpu",
)
classifier.fit(images[train], labels[train], batch_size=50, nb_epochs=10)
right = classifier.predict(images[test]).argmax(1) == labels[test]
print(f"accuracy on test images: {right.mean():.1%}")

# Fit the detector to clean images; no attack is needed. It holds out some of them to set its threshold.
detector = CausalEffectDetector(classifier, fpr=0.05)
detector.fit(images[train], nb_epochs=5)
print(detector)

# Attack the test images, and run the detector on those that fool the classifier.
clean, answer = images[test][right], labels[test][right]
for attack in (
    FastGradientMethod(classifier, eps=0.2),
    ProjectedGradientDescent(classifier, eps=0.2, eps_step=0.02, max_iter=20, verbose=False),
):
    attacked = attack.generate(clean)
    fooled = classifier.predict(attacked).argmax(1) != answer
    report, is_adversarial = detector.detect(attacked[fooled])
    print(f"{type(attack).__name__}: {is_adversarial.sum()} of {fooled.sum()} that fool the classifier are flagged")

report, is_adversarial = detector.detect(clean)
print(f"clean test images: {is_adversarial.sum()} of {len(clean)} are flagged, {0.05 * len(clean):.0f} are expected")

# Why was the last attack's most suspicious image flagged?
scores = detector.score(attacked[fooled])
report, _ = detector.detect(attacked[fooled][[scores.argmax()]], explain=True, layer="features.2")
print(report["explanations"][0])
