"""F_j: the counterfactual value is an adversarial example, made by any evasion attack of ART."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, cast

from torch import Tensor

from ce_plugin.errors import AttackError, InputError, check_integer, check_number, expected, unknown_name
from ce_plugin.interventions.base import Context, Inputs, Intervention, Normalization, NormalizationLike
from ce_plugin.interventions.crafting import (
    PRESETS,
    AttackConfig,
    AttackResult,
    TargetClassifier,
    check_options,
    checked_model,
    craft,
    resolve_clip_values,
)


class Adversarial(Intervention):
    """F_j: x' is an adversarial example of x, found by an evasion attack of the Adversarial Robustness Toolbox.

    The attack works in *image units* (``eps``, ``eps_step``, ``clip_values``); ``normalization`` describes what was
    done to the image before the model. The attack moves away from the explained target, or without one from the class
    predicted on the clean input, or towards ``targeted_class``. JSMA, which needs a target class, uses the runner-up.
    Networks with several labels (sigmoid) are attacked as a problem of two classes: "all labels as predicted on the
    clean input" against "one flipped"; with a target only that label counts. The same holds for networks with one
    output.

    Each image is attacked separately, with random numbers from (seed, id), so that results do not depend on the batch
    or its order. The model, in whatever mode, and the global random state are left as they were.

    Args:
        attack: an ART ``EvasionAttack`` (copied, never changed), its class, the class's name ("SquareAttack"), the
            name of a preset ("fgsm", "bim", "pgd", "jsma"), or a function ``(estimator, **settings) -> EvasionAttack``.
        model: the network for a class, name or function: an ``nn.Module`` with scores (N, C), or an ART classifier.
        normalization: (mean, std) of ``model units = (image - mean) / std``; None where the two are the same.
        clip_values: (low, high) of an image; taken from the attack's classifier where that has them. Presets take
            (0, 1) where there are none, or (0, 255) where ``normalization`` is for such images. Images outside of
            them are refused.
        targeted_class: the target class; with several labels the label to make present.
        multi_label: each output is a label of its own.
        probabilities: the network ends in a softmax or sigmoid.
        output: key or function that selects the scores from the network's output.
        mask: where the attack may change the image, broadcastable to one image; for attacks without mask support,
            changes elsewhere are reverted.
        batch_size: images attacked together. More than 1 is faster, but results then depend on the batch: rounding
            varies with its size, iterated signs amplify it to 2 eps in some pixels, and random starts are drawn from
            the id of its first image.
        settings: arguments of the class or function (``eps=``, ``max_iter=`` ...), or settings of the copied instance.

    Raises:
        AttackError: the attack cannot be built: no model, no clip values, eps negative, above the clip range or far
            below a grey level of it ...
        UnknownNameError: no such attack, or no such setting.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> with torch.no_grad():
        ...     _ = model[1].weight.copy_(torch.tensor([[1.0, 1, -1, -1], [0, 0, 0, 0]]))
        >>> attack = Adversarial.fgsm(model, eps=0.25)
        >>> attack.perturb(torch.full((1, 1, 2, 2), 0.5)).flatten().tolist()
        [0.25, 0.25, 0.75, 0.75]

    Source: Yang et al., ICIP 2019 (arXiv 1902.03380): F_j, eps 0.3 in L-inf, 10 iterations.
    """

    def __init__(
        self,
        attack: Any,
        *,
        model: Any = None,
        normalization: NormalizationLike = None,
        clip_values: tuple[float, float] | None = None,
        targeted_class: int | None = None,
        multi_label: bool = False,
        probabilities: bool = False,
        output: str | int | Callable[[Any], Tensor] | None = None,
        mask: Tensor | None = None,
        batch_size: int = 1,
        **settings: Any,
    ) -> None:
        config = AttackConfig.of(attack, settings)
        if config.is_instance and model is not None:
            raise AttackError(expected("model", "None, as the attack has its own", type(model).__name__))
        check_options(targeted_class, batch_size, multi_label, probabilities, output, mask)
        classifier = config.source.estimator if config.is_instance else checked_model(model)
        self.normalization = Normalization.of(normalization)
        self.clip_values = resolve_clip_values(clip_values, classifier, self.normalization if config.label else None)
        config = config.sized(self.clip_values)
        config.check(self.clip_values)
        config.check_proportion(self.clip_values)
        self.config = config if targeted_class is None or multi_label else config.aimed()
        options = (targeted_class, multi_label, probabilities, output, batch_size, mask)
        self._classifier = TargetClassifier(classifier, self.normalization, self.clip_values, *options)

    @classmethod
    def fgsm(cls, model: Any, *, eps: float | None = None, **options: Any) -> Adversarial:
        """Fast gradient sign method: one step of eps along the sign of the loss's gradient.

        x' = clip(x + eps sign(grad_x J(x, y))).

        Args:
            model: see :class:`Adversarial`.
            eps: largest change of a value, in image units; None is 0.3 of the clip range.
            options: those of :class:`Adversarial` and of ART's ``FastGradientMethod``. ``clip_values`` default to those
                of the model if it is an ART classifier; else to (0, 1), or to (0, 255) where ``normalization`` is for
                such images.

        Source: Goodfellow, Shlens, Szegedy, 2015 (arXiv 1412.6572).
        """
        return cls("fgsm", model=model, eps=eps, **options)

    @classmethod
    def bim(
        cls, model: Any, *, eps: float | None = None, eps_step: float | None = None, max_iter: int = 10, **options: Any
    ) -> Adversarial:
        """Basic iterative method: ``max_iter`` gradient-sign steps of ``eps_step``, kept within eps of x.

        Args:
            model, eps: see :meth:`fgsm`.
            eps_step: change per step; None is 2.5 eps / max_iter, at most eps.
            max_iter: number of steps.
            options: those of :class:`Adversarial` and of ART's ``BasicIterativeMethod``.

        Source: Kurakin, Goodfellow, Bengio, 2017 (arXiv 1607.02533).
        """
        return cls("bim", model=model, eps=eps, eps_step=eps_step, max_iter=max_iter, **options)

    @classmethod
    def pgd(
        cls,
        model: Any,
        *,
        eps: float | None = None,
        eps_step: float | None = None,
        max_iter: int = 10,
        num_random_init: int = 1,
        **options: Any,
    ) -> Adversarial:
        """Projected gradient descent: :meth:`bim` from a random point of the eps-ball (ART by default starts at x).

        Args:
            model, eps, eps_step, max_iter: see :meth:`bim`.
            num_random_init: random starts, drawn from (seed, id); 0 starts at x, which is BIM.
            options: those of :class:`Adversarial` and of ART's ``ProjectedGradientDescent``.

        Source: Madry et al., 2018 (arXiv 1706.06083).
        """
        own = {"eps": eps, "eps_step": eps_step, "max_iter": max_iter, "num_random_init": num_random_init}
        return cls("pgd", model=model, **own, **options)  # type: ignore[arg-type] # these are settings

    @classmethod
    def jsma(
        cls, model: Any, *, eps: float | None = None, max_iter: int = 25, gamma: float | None = None, **options: Any
    ) -> Adversarial:
        """Jacobian saliency map attack: values are increased in pairs until the runner-up class is predicted.

        ART uses the two largest gradients at each step, not Papernot's search over pairs.

        Args:
            model: see :meth:`fgsm`.
            eps: change of a value in one step, ART's ``theta``; a value may be changed more than once. None is 0.3 of
                the clip range.
            max_iter: number of steps, each of about three passes. ART itself limits only the share of values that
                change, which on large images takes hours; 25 steps at 224 x 224 take a few seconds on a CPU.
            gamma: largest share of values that may change, in addition; None means no limit.
            options: those of :class:`Adversarial`.

        Source: Papernot et al., 2016 (arXiv 1511.07528).
        """
        return cls("jsma", model=model, eps=eps, max_iter=max_iter, gamma=gamma, **options)

    @classmethod
    def preset(cls, name: str, model: Any, **options: Any) -> Adversarial:
        """A preset by name, with its options; an unknown name raises ``UnknownNameError``."""
        if name not in PRESETS:
            raise unknown_name("attack", name, PRESETS)
        made: Adversarial = getattr(cls, name)(model, **options)
        return made

    @property
    def batch_size(self) -> int:
        """Images that are attacked together."""
        return self._classifier.batch_size

    def values(self, clean: Tensor, context: Context) -> Tensor:
        """The adversarial examples of ``clean``, clipped, in model units.

        Args:
            clean: (N, ...), in model units.
            context: its targets, if any, are the classes to move away from.

        Returns:
            An ordinary, detached tensor of the shape, device and dtype of ``clean``.
        """
        return craft(self._classifier, self.config, clean, context).clipped

    def perturb(
        self,
        inputs: Inputs,
        *,
        eps: float | None = None,
        target: Tensor | None = None,
        ids: Sequence[int] | None = None,
        seed: int = 0,
        variant: int = 0,
    ) -> Inputs:
        """The adversarial examples of the inputs; ``eps=`` overrides the size (as ``MinParamPerturbation`` does).

        Args:
            inputs: (N, ...), or a tuple of one such tensor, in model units.
            eps: size of the attack instead of its own, in image units.
            target: classes to move away from, (N,); None means the predicted ones.
            ids: one id per example, from which its random numbers are drawn; with None all examples get the same.
            seed: seed of the random numbers.
            variant: selects other random numbers for the same id.

        Raises:
            AttackError: eps is negative or larger than the clip range, or the attack has no eps.
        """
        clean, context = _examples(inputs, target, ids, seed, variant)
        adversarial = craft(self._classifier, self._resized(eps), clean, context).clipped
        return cast(Inputs, (adversarial,) if isinstance(inputs, tuple) else adversarial)

    def run(
        self, inputs: Tensor, *, target: Tensor | None = None, ids: Sequence[int] | None = None, seed: int = 0
    ) -> AttackResult:
        """Attack a batch and return raw and clipped results, success, predictions and distances.

        Args:
            inputs: (N, ...), in model units.
            target, ids, seed: see :meth:`perturb`.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
            >>> with torch.no_grad():
            ...     _ = model[1].weight.copy_(torch.tensor([[1.0, 1, -1, -1], [0, 0, 0, 0]]))
            >>> Adversarial.fgsm(model, eps=0.25).run(torch.tensor([[[[0.6, 0.6], [0.5, 0.5]]]]))
            AttackResult(fgsm, eps=0.25, success=1 of 1, l_inf<=0.25)
        """
        return craft(self._classifier, self.config, *_examples(inputs, target, ids, seed))

    def sweep(
        self,
        inputs: Tensor,
        *,
        eps: Sequence[float],
        target: Tensor | None = None,
        ids: Sequence[int] | None = None,
        seed: int = 0,
    ) -> dict[float, AttackResult]:
        """:meth:`run` for several sizes: a result for each, in the order given; all are checked before any work."""
        if isinstance(eps, (str, Real)):
            raise AttackError(expected("eps", "a sequence of sizes", repr(eps), f"Write eps=[{eps}]."))
        configs = {_size(size): self._resized(_size(size)) for size in eps}
        clean, context = _examples(inputs, target, ids, seed)
        return {size: craft(self._classifier, config, clean, context) for size, config in configs.items()}

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.config.settings.items())
        parts = [self.config.name, *([settings] if settings else []), f"clip_values={self.clip_values}"]
        if not self.normalization.is_identity:
            parts.append(f"normalization={(self.normalization.mean, self.normalization.std)}")
        parts += [f"{name}={value!r}" for name, value in self._classifier.options().items()]
        return f"Adversarial({', '.join(parts)})"

    def _resized(self, eps: float | None) -> AttackConfig:
        if eps is None:
            return self.config
        config = self.config.resized(_size(eps))
        config.check(self.clip_values)
        return config


def _size(eps: object) -> float:
    return check_number("eps", eps, "a finite number, at least 0, in image units", error=AttackError)


def _examples(
    inputs: Tensor | tuple[Tensor, ...], target: Tensor | None, ids: Sequence[int] | None, seed: int, variant: int = 0
) -> tuple[Tensor, Context]:
    """The only tensor of the inputs, and the context of its examples."""
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    if len(tensors) != 1:
        raise InputError(expected("inputs", "one tensor, as attacks take one input", f"{len(tensors)} tensors"))
    if not isinstance(tensors[0], Tensor) or tensors[0].dim() < 1:
        raise InputError(expected("inputs", "a tensor (N, ...)", type(tensors[0]).__name__))
    check_integer("seed", seed, error=InputError)
    n = len(tensors[0])
    if ids is not None and len(ids) != n:
        raise InputError(expected("ids", f"one per example, {n}", f"{len(ids)}"))
    names = (0,) * n if ids is None else tuple(int(i) for i in ids)
    return tensors[0], Context(names, seed, target, variant=variant)
