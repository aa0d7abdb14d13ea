"""do(class = c): the counterfactual value is an image that is synthesised for a class, by gradient ascent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ce_plugin.errors import ArgumentError, InputError, TargetError, check_integer, check_number, expected, unknown_name
from ce_plugin.interventions._filters import gaussian
from ce_plugin.interventions.base import Context, Intervention, Normalization, NormalizationLike, checked_examples
from ce_plugin.interventions.crafting import TargetClassifier, checked_model, resolve_clip_values

_STARTS = ("input", "noise")
# Of the noise that ascent may start from, and of a step, as shares of the clip range.
_SPREAD, _STEP = 0.1, 0.01


class ClassVisualization(Intervention):
    """do(class = c): x' is the input, or noise, changed step by step until the network sees class c in it.

        J(x) = z_c(x) - l2 * mean(((x - mid) / half)^2)
        x <- clip(x + lr * g / rms(g)),   g = dJ(shifted x) / dx

    z_c is the logit of the class; mid and half are the middle and half the width of the clip values. Before each
    gradient the image is shifted by up to ``jitter`` pixels, drawn from (seed, id); every ``blur_every`` steps it is
    blurred. Both, and ``l2``, keep it from becoming a pattern of fine noise that only this network understands.

    Each image is made alone, so that results do not depend on the batch. The network is left as it was.

    Args:
        model: an ``nn.Module`` with scores (N, C), or an ART classifier.
        target_class: the class c.
        steps: number of steps.
        lr: root mean square of the change in one step, in image units; None is 1 % of the clip range.
        l2: weight of the regularisation; 0 means none.
        blur_every: steps from one blur to the next; 0 means never.
        blur_sigma: of the blur, in pixels.
        jitter: largest shift in each direction, in pixels; what leaves on one side returns on the other.
        start: ``"input"``: the image itself; ``"noise"``: normal noise around mid, drawn from (seed, id).
        normalization: (mean, std) of ``model units = (image - mean) / std``; None where the two are the same.
        clip_values: (low, high) of an image; None as in :class:`Adversarial`.
        probabilities: the network ends in a softmax, which is inverted.
        output: key or function that selects the scores from the network's output.

    Raises:
        AttackError: the model is no network, or the clip values are not known.
        ArgumentError: a setting out of its range. UnknownNameError: an unknown start.
        TargetError: at the run, a class that the network does not have.
        InputError: at the run, inputs that are not images (N, C, H, W).

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0, 1, -1, -1], [0, 0, 0, 0]]))
        >>> made = ClassVisualization(net, 0, steps=3, lr=0.1, blur_every=0, jitter=0)
        >>> made(torch.full((1, 1, 2, 2), 0.5)).flatten().tolist()
        [0.8000..., 0.8000..., 0.2000..., 0.2000...]

    Source: Erhan et al. 2009 (activation maximisation); Simonyan, Vedaldi, Zisserman 2014 (arXiv 1312.6034), Eq. 1;
    Yosinski et al. 2015 (arXiv 1506.06579), the blur; Mordvintsev, Olah, Tyka 2015, the jitter.
    """

    def __init__(
        self,
        model: Any,
        target_class: int,
        *,
        steps: int = 100,
        lr: float | None = None,
        l2: float = 1.0,
        blur_every: int = 4,
        blur_sigma: float = 0.5,
        jitter: int = 8,
        start: str = "input",
        normalization: NormalizationLike = None,
        clip_values: tuple[float, float] | None = None,
        probabilities: bool = False,
        output: str | int | Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.target_class = check_integer("target_class", target_class, least=0)
        self.steps = check_integer("steps", steps, least=1)
        self.l2 = check_number("l2", l2, "a finite number, 0 or more")
        self.blur_every = check_integer("blur_every", blur_every, least=0)
        self.blur_sigma = check_number("blur_sigma", blur_sigma, "a positive number of pixels", above=0)
        self.jitter = check_integer("jitter", jitter, least=0)
        if self.l2 < 0:
            raise ArgumentError(expected("l2", "a finite number, 0 or more", l2))
        if start not in _STARTS:
            raise unknown_name("start", start, _STARTS)
        self.start = start
        self.normalization = Normalization.of(normalization)
        low, high = resolve_clip_values(clip_values, checked_model(model), self.normalization)
        self.lr = _STEP * (high - low) if lr is None else check_number("lr", lr, "a positive number", above=0)
        self._classifier = TargetClassifier(
            model, self.normalization, (low, high), probabilities=probabilities, output=output
        )

    @property
    def clip_values(self) -> tuple[float, float]:
        """Lowest and highest value of an image, in image units."""
        return self._classifier.clip_values

    @property
    def forward_equivalents(self) -> int:  # type: ignore[override]
        """A forward and a backward pass for each step."""
        return 3 * self.steps

    def values(self, clean: Tensor, context: Context) -> Tensor:
        """The synthesised images, (N, C, H, W), in model units."""
        return self._made(clean, context, self.steps)[-1]

    def frames(self, inputs: Tensor, *, every: int = 1, ids: Sequence[int] | None = None, seed: int = 0) -> Tensor:
        """How the images come about, for an animation.

        Args:
            inputs: (N, C, H, W), in model units.
            every: steps from one frame to the next; the last step is always the last frame.
            ids, seed: as in :meth:`perturb`.

        Returns:
            (F, N, C, H, W), in model units; the first frame is the start.

        Example:
            >>> from torch import nn
            >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
            >>> ClassVisualization(net, 0, steps=5).frames(torch.full((1, 1, 2, 2), 0.5), every=2).shape
            torch.Size([4, 1, 1, 2, 2])
        """
        check_integer("every", every, least=1)
        context = Context(checked_examples((inputs,), ids, seed), seed)
        return torch.stack(self._made(inputs, context, every))

    def _made(self, clean: Tensor, context: Context, every: int) -> list[Tensor]:
        """The images at the start, every so many steps and at the end, each (N, C, H, W)."""
        if clean.dim() != 4 or not clean.is_floating_point():
            raise InputError(expected("inputs", "float images (N, C, H, W)", f"{clean.dtype}, {tuple(clean.shape)}"))
        kept = [k for k in range(self.steps + 1) if k % every == 0 or k == self.steps]
        with self._classifier.ready():
            image = self.normalization.to_image(clean.detach().float())
            self._check_class(image)
            made = [
                [one for k, one in enumerate(self._ascent(image[i : i + 1], context, i)) if k in kept]
                for i in range(len(image))
            ]
            return [self.normalization.to_model(torch.cat(frame)).to(clean) for frame in zip(*made, strict=True)]

    def _check_class(self, image: Tensor) -> None:
        with torch.no_grad():
            classes = self._classifier.network()(image[:1]).shape[1]
        if self.target_class >= classes:
            raise TargetError(expected("target_class", f"a class in 0 to {classes - 1}", self.target_class))

    def _ascent(self, image: Tensor, context: Context, example: int) -> Iterator[Tensor]:
        """One image, (1, C, H, W) in image units, at the start and after each step."""
        network, (low, high) = self._classifier.network(), self.clip_values
        draws = replace(context, variant=0).generator(example, "class visualization")
        middle, half = (low + high) / 2, (high - low) / 2
        x = image
        if self.start == "noise":
            noise = torch.randn(image.shape[1:], generator=draws)[None].to(image)
            x = (middle + _SPREAD * (high - low) * noise).clamp(low, high)
        yield x
        for step in range(1, self.steps + 1):
            shift = torch.randint(-self.jitter, self.jitter + 1, (2,), generator=draws).tolist()
            leaf = x.detach().roll(shift, (2, 3)).requires_grad_()
            objective = network(leaf)[0, self.target_class] - self.l2 * ((leaf - middle) / half).square().mean()
            (gradient,) = torch.autograd.grad(objective, leaf)
            gradient = gradient.roll([-pixels for pixels in shift], (2, 3))
            size = gradient.square().mean().sqrt()
            # A gradient of exactly zero (every unit saturated) leaves the image as it is.
            x = (x + self.lr * gradient / size.clamp(min=torch.finfo(size.dtype).tiny)).clamp(low, high)
            if self.blur_every and step % self.blur_every == 0 and step < self.steps:
                x = gaussian(x, self.blur_sigma)
            yield x

    def __repr__(self) -> str:
        parts = [f"target_class={self.target_class}", f"steps={self.steps}", f"lr={self.lr:g}", f"l2={self.l2:g}"]
        parts += [f"blur_every={self.blur_every}", f"blur_sigma={self.blur_sigma:g}", f"jitter={self.jitter}"]
        return f"ClassVisualization({', '.join([*parts, f'start={self.start!r}', f'clip_values={self.clip_values}'])})"
