"""ART's attacks on a network: an estimator that is fast on a CPU, and attacks that need more than settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.harness.carlini import CarliniL2, CarliniLInf
from ce_plugin.interventions.crafting import ImageNetwork
from ce_plugin.networks.art import attack_class, attack_with_estimator
from ce_plugin.networks.forward import load_art

__all__ = ["BUILDERS", "CountedNetwork", "build_attack", "build_estimator", "predict"]

Array = npt.NDArray[Any]
REMEMBERED = 4096  # images whose scores are cached: Square requests the scores of the same images three times


class CountedNetwork(ImageNetwork):
    """A wrapper that counts the images passed to a network and protects its state from ART.

    Attributes:
        images: number of images so far.

    Example:
        >>> net = CountedNetwork(nn.Flatten())
        >>> _ = net(torch.zeros(3, 1, 2, 2))
        >>> net.images
        3
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._count = np.zeros(1, np.int64)  # an array, because the attributes of a guarded network are restored

    @property
    def images(self) -> int:
        """Number of images so far."""
        return int(self._count[0])

    def forward(self, images: Tensor) -> Tensor:
        """Scores (N, C)."""
        self._count += len(images)
        return super().forward(images)


def predict(network: nn.Module, images: Array, batch_size: int = 128) -> Array:
    """Scores (N, C) of images (N, ...), float32, both numpy."""
    with torch.no_grad():
        parts = [
            network(torch.from_numpy(np.ascontiguousarray(images[i : i + batch_size]))).float()
            for i in range(0, len(images), batch_size)
        ]
    scores: Array = torch.cat(parts).cpu().numpy()
    return scores


def build_estimator(network: nn.Module, shape: tuple[int, ...], n_classes: int) -> Any:
    """A ``PyTorchClassifier`` for images in [0, 1], fast when ART passes one image at a time.

    Args:
        network: images (N, *shape), float32, to logits (N, n_classes).
        shape: shape of one image.
        n_classes: number of logits.
    """
    return _quick_classifier()(
        network,
        loss=nn.CrossEntropyLoss(),
        input_shape=shape,
        nb_classes=n_classes,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )


@cache
def _quick_classifier() -> type[Any]:
    load_art()
    from art.estimators.classification import PyTorchClassifier

    class QuickClassifier(PyTorchClassifier):  # type: ignore[misc]
        """Avoids overhead of ART that costs more than the network: a data loader for every prediction, a backward pass
        for each label, and repeated requests for the same scores. The results are the same."""

        def predict(self, x: Array, batch_size: int = 128, training_mode: bool = False, **kwargs: Any) -> Array:
            images = np.ascontiguousarray(x, dtype=np.float32)
            keys = [image.tobytes() for image in images]
            known: dict[bytes, Array] = self.__dict__.setdefault("known_scores", {})
            new = list(dict.fromkeys(row for row, key in enumerate(keys) if key not in known))
            if len(known) + len(new) > REMEMBERED:
                known.clear()
                new = list(range(len(images)))
            if new:
                known.update(zip([keys[row] for row in new], predict(self.model, images[new]), strict=True))
            return np.stack([known[key] for key in keys])

        def class_gradient(
            self, x: Array, label: Any = None, training_mode: bool = False, **kwargs: Any
        ) -> npt.NDArray[np.float32]:
            images, scores = self._graph(np.array(x, dtype=np.float32))
            if label is None:
                wanted = torch.arange(self.nb_classes).expand(len(x), -1)
            else:
                labels = np.broadcast_to(np.asarray(label, dtype=np.int64).reshape(-1), (len(x),))
                wanted = torch.from_numpy(labels.copy())[:, None]
            columns = []
            for column in range(wanted.shape[1]):
                total = scores.gather(1, wanted[:, column : column + 1]).sum()
                (gradient,) = torch.autograd.grad(total, images, retain_graph=True)
                columns.append(gradient)
            gradients: npt.NDArray[np.float32] = torch.stack(columns, 1).numpy()
            return gradients

        def _graph(self, x: npt.NDArray[np.float32]) -> tuple[Tensor, Tensor]:
            """Images and their scores with the graph between them: one pass for all requested classes."""
            last = self.__dict__.get("last_graph")
            if last is None or not np.array_equal(last[0], x):
                images = torch.from_numpy(x.copy()).requires_grad_()
                last = self.__dict__["last_graph"] = (x, images, self.model(images))
            return last[1], last[2]

    return QuickClassifier


def build_attack(name: str, estimator: Any, settings: Mapping[str, Any], count: int) -> Any:
    """An attack of ART by class name, or one from :data:`BUILDERS`, for ``count`` images.

    Raises:
        UnknownNameError: there is no attack of this name.
        AttackError: ART rejects the settings.
    """
    if name in BUILDERS:
        return BUILDERS[name](estimator, dict(settings), count)
    kind = attack_class(name)
    given = {"batch_size": count, "verbose": False, "targeted": False}
    taken = {key: value for key, value in given.items() if key in kind.attack_params and key not in settings}
    return attack_with_estimator(kind, estimator, {**taken, **settings})


def _auto_attack(estimator: Any, settings: dict[str, Any], count: int) -> Any:
    """AutoAttack: its four attacks in turn, each on the images left, with the given numbers of steps and queries."""
    steps, queries, bound = settings["steps"], settings["queries"], settings["eps"]
    common = {"eps": bound, "batch_size": count, "verbose": False, "norm": np.inf}
    apgd = {**common, "eps_step": 2 * bound, "max_iter": steps, "nb_random_init": settings["restarts"]}
    gradient, square = attack_class("AutoProjectedGradientDescent"), attack_class("SquareAttack")
    attacks = [
        gradient(estimator, loss_type="cross_entropy", **apgd),
        gradient(estimator, loss_type="difference_logits_ratio", **apgd),
        attack_class("DeepFool")(estimator, epsilon=1e-3, nb_grads=10, batch_size=count, verbose=False),
        square(estimator, max_iter=queries, p_init=0.8, nb_restarts=1, **common),
    ]
    return attack_class("AutoAttack")(
        estimator, norm=np.inf, eps=bound, eps_step=2 * bound, attacks=attacks, batch_size=count
    )


class _Patch:
    """One patch optimised on all images, then placed on each of them at a different position."""

    def __init__(self, estimator: Any, settings: dict[str, Any], count: int) -> None:
        load_art()
        from art.attacks.evasion import AdversarialPatchPyTorch

        self.scale = settings["scale"]
        self.attack = AdversarialPatchPyTorch(
            estimator,
            rotation_max=settings["rotation"],
            scale_min=0.9 * self.scale,
            scale_max=self.scale,
            learning_rate=settings["rate"],
            max_iter=settings["max_iter"],
            batch_size=settings["batch"],
            patch_shape=tuple(estimator.input_shape),
            patch_type="square",
            optimizer="Adam",
            targeted=False,
            verbose=False,
        )

    def generate(self, x: Array, y: Array) -> Array:
        """Images (N, C, H, W) with the patch."""
        self.attack.generate(x, y)
        patched: Array = self.attack.apply_patch(x, scale=self.scale)
        return patched


BUILDERS: dict[str, Callable[[Any, dict[str, Any], int], Any]] = {
    "AutoAttackCapped": _auto_attack,
    "CarliniL2": lambda estimator, settings, count: CarliniL2(estimator.model, **settings),
    "CarliniLInf": lambda estimator, settings, count: CarliniLInf(estimator.model, **settings),
    "AdversarialPatchLearnt": _Patch,
}
"""Attacks that are put together here: name -> (estimator, settings, number of images) -> an attack of ART."""
