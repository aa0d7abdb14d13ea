"""F_j: the counterfactual value is an adversarial example, crafted by any evasion attack of ART."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor

from ce_plugin.errors import AttackError, InputError, expected, unknown_name
from ce_plugin.interventions.base import Context, Inputs, Intervention, Normalization, NormalizationLike
from ce_plugin.interventions.crafting import (
    AttackConfig,
    AttackResult,
    TargetClassifier,
    check_options,
    checked_model,
    craft,
    resolve_clip_values,
)
from ce_plugin.networks.forward import is_art_classifier

_PRESETS = ("fgsm", "bim", "pgd", "jsma")


class Adversarial(Intervention):
    """F_j: x' is an adversarial example of x, found by an evasion attack of the Adversarial Robustness Toolbox.

    The attack works in *image units* (``eps``, ``eps_step``, ``clip_values``); ``normalization`` says what was done
    to the image before the model. It moves away from the target that the run explains, or else from the network's own
    answer on the clean input, or towards ``targeted_class``. JSMA, which must aim, aims at the runner-up.
    Networks with several labels (sigmoid) are attacked as a problem of two classes: "all labels as the network
    decided on the clean input" against "one flipped"; with a target only that label counts. The same holds for
    networks with one output.

    Each image is crafted alone, with random numbers of (seed, id), so that a batch gives what its examples give one
    by one, in any order. The model, in whatever mode, and the global random state are left as they were.

    Args:
        attack: an ART ``EvasionAttack`` (copied, never changed), a class of such, a class's name ("SquareAttack"), or
            a function ``(estimator, **settings) -> EvasionAttack``.
        model: the network for a class, name or function: an ``nn.Module`` with scores (N, C), or an ART classifier.
        normalization: (mean, std) of ``model units = (image - mean) / std``; None where the two are the same.
        clip_values: (low, high) of an image; taken from the attack's classifier where that has them.
        targeted_class: the class to aim at; with several labels the label to make present.
        multi_label: each output is a label of its own.
        probabilities: the network ends in a softmax or sigmoid.
        output: key or function that takes the scores from what the network returns.
        mask: where the attack may change the image, broadcastable to one image; attacks that know no mask are
            undone elsewhere.
        batch_size: images crafted together. More than 1 is quicker and gives up that a batch equals its examples:
            rounding differs with the size of a batch, iterated signs amplify it to 2 eps in some pixels, and random
            starts are those of the batch's first id.
        settings: what the class or function takes (``eps=``, ``max_iter=`` ...), or is set on the instance's copy.

    Raises:
        AttackError: the attack cannot be built: no model, no clip values, eps negative or beyond the clip range ...
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
        check_options(targeted_class, batch_size, multi_label)
        classifier = config.source.estimator if config.is_instance else checked_model(model)
        if clip_values is None and config.label and not is_art_classifier(classifier):
            clip_values = (0.0, 1.0)
        self.clip_values = resolve_clip_values(clip_values, classifier)
        config.check(self.clip_values)
        self.config = config if targeted_class is None or multi_label else config.aimed()
        self.normalization = Normalization.of(normalization)
        options = (targeted_class, multi_label, probabilities, output, batch_size, mask)
        self._classifier = TargetClassifier(classifier, self.normalization, self.clip_values, *options)

    @classmethod
    def fgsm(cls, model: Any, *, eps: float = 0.3, **options: Any) -> Adversarial:
        """Fast gradient sign method: one step of eps along the sign of the loss's gradient.

        x' = clip(x + eps sign(grad_x J(x, y))).

        Args:
            model: see :class:`Adversarial`.
            eps: largest change of a value, in image units.
            options: those of :class:`Adversarial` and of ART's ``FastGradientMethod``; ``clip_values`` are (0, 1) where
                neither they nor the model, an ART classifier, say otherwise.

        Source: Goodfellow, Shlens, Szegedy, 2015 (arXiv 1412.6572).
        """
        return cls(AttackConfig("FastGradientMethod", {"eps": eps}, "fgsm"), model=model, **options)

    @classmethod
    def bim(
        cls, model: Any, *, eps: float = 0.3, eps_step: float | None = None, max_iter: int = 10, **options: Any
    ) -> Adversarial:
        """Basic iterative method: ``max_iter`` gradient-sign steps of ``eps_step``, kept within eps of x.

        Args:
            model, eps: see :meth:`fgsm`.
            eps_step: change per step; None is 2.5 eps / max_iter, at most eps.
            max_iter: number of steps.
            options: those of :class:`Adversarial` and of ART's ``BasicIterativeMethod``.

        Source: Kurakin, Goodfellow, Bengio, 2017 (arXiv 1607.02533).
        """
        settings = {"eps": eps, "eps_step": eps_step, "max_iter": max_iter}
        return cls(AttackConfig("BasicIterativeMethod", settings, "bim"), model=model, **options)

    @classmethod
    def pgd(
        cls,
        model: Any,
        *,
        eps: float = 0.3,
        eps_step: float | None = None,
        max_iter: int = 10,
        num_random_init: int = 1,
        **options: Any,
    ) -> Adversarial:
        """Projected gradient descent: :meth:`bim` from a random point of the eps-ball (ART's own default is none).

        Args:
            model, eps, eps_step, max_iter: see :meth:`bim`.
            num_random_init: random starts, drawn from (seed, id); 0 starts at x, which is BIM.
            options: those of :class:`Adversarial` and of ART's ``ProjectedGradientDescent``.

        Source: Madry et al., 2018 (arXiv 1706.06083).
        """
        settings = {"eps": eps, "eps_step": eps_step, "max_iter": max_iter, "num_random_init": num_random_init}
        return cls(AttackConfig("ProjectedGradientDescent", settings, "pgd"), model=model, **options)

    @classmethod
    def jsma(
        cls, model: Any, *, eps: float = 0.3, max_iter: int = 25, gamma: float | None = None, **options: Any
    ) -> Adversarial:
        """Jacobian saliency map attack: pairs of values are raised one after the other, until the runner-up wins.

        ART takes the two largest gradients at each step, not Papernot's search over pairs.

        Args:
            model: see :meth:`fgsm`.
            eps: change of a value in one step, ART's ``theta``; a value may be raised again.
            max_iter: number of steps, each of about three passes. ART itself bounds only the share of values that
                change, which on large images takes hours; 25 steps at 224 x 224 take a few seconds on a CPU.
            gamma: largest share of values that may change, besides; None is no bound.
            options: those of :class:`Adversarial`.

        Source: Papernot et al., 2016 (arXiv 1511.07528).
        """
        settings = {"theta": eps, "max_iter": max_iter, "gamma": gamma}
        return cls(AttackConfig("SaliencyMapMethod", settings, "jsma"), model=model, **options)

    @classmethod
    def preset(cls, name: str, model: Any, **options: Any) -> Adversarial:
        """A preset by its name, with that preset's options; an unknown name raises ``UnknownNameError``."""
        if name not in _PRESETS:
            raise unknown_name("attack", name, _PRESETS)
        made: Adversarial = getattr(cls, name)(model, **options)
        return made

    def values(self, clean: Tensor, context: Context) -> Tensor:
        """The adversarial examples of ``clean``, clipped, in model units.

        Args:
            clean: (N, ...), in model units.
            context: its targets, where given, are the classes to move away from.

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
        """The adversarial examples of the inputs; with ``eps=``, of that size (``MinParamPerturbation``'s argument).

        Args:
            inputs: (N, ...), or a tuple of one such tensor, in model units.
            eps: size of the attack in place of its own, in image units.
            target: classes to move away from, (N,); None is the network's answer.
            ids: one id per example, which names its random numbers; None gives every example the same.
            seed: seed of what is random.
            variant: names further random numbers.

        Raises:
            AttackError: eps is negative, beyond the clip range, or the attack has none.
        """
        clean, context = _examples(inputs, target, ids, seed, variant)
        adversarial = craft(self._classifier, self._resized(eps), clean, context).clipped
        return cast(Inputs, (adversarial,) if isinstance(inputs, tuple) else adversarial)

    def run(
        self, inputs: Tensor, *, target: Tensor | None = None, ids: Sequence[int] | None = None, seed: int = 0
    ) -> AttackResult:
        """Attack a batch and report on it: raw and clipped results, success, predictions and distances.

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
        configs = {float(size): self._resized(size) for size in eps}
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
        config = self.config.resized(float(eps))
        config.check(self.clip_values)
        return config


def _examples(
    inputs: Tensor | tuple[Tensor, ...], target: Tensor | None, ids: Sequence[int] | None, seed: int, variant: int = 0
) -> tuple[Tensor, Context]:
    """The one tensor of the inputs, and what is known of its examples."""
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    if len(tensors) != 1:
        raise InputError(expected("inputs", "one tensor, as attacks know one input", f"{len(tensors)} tensors"))
    n = len(tensors[0])
    if ids is not None and len(ids) != n:
        raise InputError(expected("ids", f"one per example, {n}", f"{len(ids)}"))
    names = (0,) * n if ids is None else tuple(int(i) for i in ids)
    return tensors[0], Context(names, seed, target, variant=variant)
