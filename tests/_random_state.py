"""Public calls, one after the other: run as a script, it prints which of them moved a global random state."""

from __future__ import annotations

import json
import pickle
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ce_plugin import errors as ce_errors


def states() -> dict[str, bytes]:
    """The global random state of each library."""
    return {
        "torch": pickle.dumps(torch.get_rng_state().numpy()),
        "numpy": pickle.dumps(np.random.get_state()),  # noqa: NPY002
        "python": pickle.dumps(random.getstate()),
    }


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and call; imports are calls too, as a library's first import may draw numbers."""
    draw = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    net[-1].weight.data *= 20
    x, many = torch.rand(2, 1, 8, 8, generator=draw), torch.rand(90, 1, 8, 8, generator=draw)
    with torch.no_grad():
        net[-1].bias.data -= net.eval()(many).mean(0)
    net.train()  # dropout draws numbers wherever the mode is not seen to
    folder = Path(tempfile.mkdtemp())

    import ce_plugin as ce

    yield "CausalEffect", lambda: ce.CausalEffect(net)
    from ce_plugin.designs import Joint, RandomMask, RandomRegions
    from ce_plugin.interventions import Adversarial, MeanOut, PixelMask, Resample, Smooth, ZeroOut

    yield "estimate", lambda: ce.CausalEffect(net).estimate(x)
    yield "attribute", lambda: ce.CausalEffect(net, PixelMask("noise")).attribute(x)
    yield "estimate_cost", lambda: ce.CausalEffect(net).estimate_cost(x)
    yield "LayerCausalEffect", lambda: ce.LayerCausalEffect(net, "3")
    yield "layer estimate", lambda: ce.LayerCausalEffect(net, "3").estimate(x)
    yield "layer estimate_cost", lambda: ce.LayerCausalEffect(net, "3").estimate_cost(x)
    for design in (RandomMask(0.5, n_trials=20), Joint([(0, 1)])):
        yield f"{design!r}", lambda design=design: ce.LayerCausalEffect(net, "3", ZeroOut(), design).estimate(x)
    yield "RandomRegions", lambda: ce.CausalEffect(net, None, RandomRegions(n_trials=20)).estimate(x)
    for intervention in (MeanOut(many), Resample(many, 2)):
        yield type(intervention).__name__, lambda one=intervention: ce.LayerCausalEffect(net, "3", one).estimate(x)
    yield "Smooth.noise", lambda: Smooth.gauss(1.0).perturb(x)
    yield "CausalEffectMap", lambda: ce.CausalEffectMap(net, "3").attribute(x)
    yield "CausalMediation", lambda: ce.CausalMediation(net, "3", 1 - x).estimate(x)
    estimate = ce.CausalEffect(net).estimate(x)
    yield "plot", lambda: estimate.plot(image=x[0], example=0)
    yield "to_dataframe", estimate.to_dataframe
    yield "p_values", estimate.p_values
    yield "save", lambda: estimate.save(folder / "a")
    yield "Estimate.load", lambda: ce.Estimate.load(folder / "a")

    yield "import evaluation", lambda: __import__("ce_plugin.evaluation")
    from ce_plugin import evaluation

    yield "auroc", lambda: evaluation.auroc([0.0, 1.0], [2.0, 3.0])
    yield "PlantedMediation", evaluation.PlantedMediation
    yield "insertion_deletion", lambda: evaluation.insertion_deletion(net.eval(), x, x, [0, 1], {"zero": 0 * x})
    net.train()
    for name in ("fgsm", "pgd", "jsma"):
        yield name, lambda name=name: Adversarial.preset(name, net).perturb(x)
    yield "an attack of ART", lambda: Adversarial("DeepFool", model=net, clip_values=(0, 1), max_iter=2).perturb(x)

    yield "import concepts", lambda: __import__("ce_plugin.concepts")
    from ce_plugin import concepts

    yield "ConceptAutoencoder", lambda: concepts.ConceptAutoencoder(4, 2)
    yield (
        "train_autoencoder",
        lambda: concepts.train_autoencoder(net, "3", torch.utils.data.DataLoader(many, shuffle=True), 2, epochs=2),
    )
    autoencoder = concepts.ConceptAutoencoder(4, 2)
    yield "measure_fidelity", lambda: concepts.measure_fidelity(net, "3", autoencoder, many)
    yield "ConceptAutoencoder.save", lambda: autoencoder.save(folder / "c")
    yield "ConceptAutoencoder.load", lambda: concepts.ConceptAutoencoder.load(folder / "c")
    yield "ConceptCausalEffect", lambda: ce.ConceptCausalEffect(net, "3", autoencoder, min_fidelity=0).estimate(x)

    yield "import detection", lambda: __import__("ce_plugin.detection")
    from ce_plugin import detection

    denoising = detection.Denoising(least_steps=2)
    signature = detection.Signature([detection.CounterAttack(), detection.PixelMasking(n_draws=2), denoising])
    detector = detection.CausalEffectDetector(net, signature)
    yield "CausalEffectDetector", lambda: detection.CausalEffectDetector(net)
    yield "fit", lambda: detector.fit(many, nb_epochs=1)
    yield (
        "fit with attacks",
        lambda: detection.CausalEffectDetector(
            net, detection.Signature([detection.CounterAttack()]), attacks=["fgsm"]
        ).fit(many),
    )
    yield "score", lambda: detector.score(x)
    yield "detect", lambda: detector.detect(x, explain=True, layer="3")
    yield "score_tensor", lambda: detector.score_tensor(x)
    yield "teach", lambda: detector.teach(x)
    yield "calibrate", lambda: detector.calibrate(torch.rand(30, 1, 8, 8, generator=draw))
    yield "detector.save", lambda: detector.save(folder / "d")
    yield "CausalEffectDetector.load", lambda: detection.CausalEffectDetector.load(folder / "d", net)

    yield "import models", lambda: __import__("ce_plugin.models")
    from ce_plugin import datasets, models

    yield "DigitsCNN.trained", lambda: models.DigitsCNN.trained(*[one[:50] for one in datasets.digits()], epochs=1)
    yield "digits", datasets.digits
    yield "load_model", lambda: models.load_model("torchvision:no_such_network")
    yield "import report", lambda: __import__("ce_plugin.report")
    from ce_plugin import report

    yield "digits_trial", lambda: report.digits_trial(n_train=100, n_fit=80, n_test=10, steps=1)
    from ce_plugin.cli import main

    yield "command", lambda: main(["explain", "no-such-picture.jpg", "--quiet"])


def run() -> dict[str, str]:
    """What each call moved: "" or the names of libraries; an error is one too."""
    found = {}
    for name, call in calls():
        before = states()
        try:
            call()
        except Exception as error:
            if not isinstance(error, ce_errors.UnknownNameError):
                found[name] = f"{type(error).__name__}: {error}"
                continue
        after = states()
        found[name] = ", ".join(one for one in before if before[one] != after[one])
    return found


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(run()))
