"""do(class = c) by a generator: the same picture of another class, and parts painted as a class would have them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ce_plugin.errors import InputError, ModelError, TargetError, check_integer, check_number, expected
from ce_plugin.interventions.base import Context, Intervention, Normalization, NormalizationLike
from ce_plugin.networks.guard import state_guard
from ce_plugin.randomness import generator as random_generator

# So many latent variables are fitted at once.
_ROWS = 512


class ConditionalGenerator(Protocol):
    """A module from latent variables (N, latent) and classes (N,) to pictures (N, C, H, W), in image units.

    Attributes:
        latent: number of latent variables, which are N(0, 1).
        classes: number of classes.
    """

    latent: int
    classes: int

    def __call__(self, z: Tensor, classes: Tensor, /) -> Tensor: ...


class LatentOptions(TypedDict, total=False):
    """How latent variables are found; see :func:`infer_latents`."""

    steps: int
    starts: int
    lr: float
    noise: float


def _checked_options(*, steps: int = 60, starts: int = 4, lr: float = 0.1, noise: float = 0.2) -> LatentOptions:
    return {
        "steps": check_integer("steps", steps, least=1),
        "starts": check_integer("starts", starts, least=1),
        "lr": check_number("lr", lr, "above zero", above=0),
        "noise": check_number("noise", noise, "above zero", above=0),
    }


def infer_latents(
    generator: ConditionalGenerator,
    pictures: Tensor,
    classes: Tensor,
    *,
    known: Tensor | None = None,
    ids: Sequence[int] | None = None,
    seed: int = 0,
    steps: int = 60,
    starts: int = 4,
    lr: float = 0.1,
    noise: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """The most likely latent variables of pictures whose class is known, by gradient steps (Adam).

        z = argmin |z|^2 + sum over known pixels of (G(z, y) - x)^2 / noise^2

    that is, the maximum of p(z given x, y) where pixels are those of the generator plus normal noise. The steps begin
    at several draws from (seed, id), of which the best end is kept. The generator is left as it was.

    Args:
        generator: see :class:`~ce_plugin.interventions.generation.ConditionalGenerator`.
        pictures: (N, C, H, W), in the generator's units.
        classes: of the pictures, (N,).
        known: bool, broadcastable to the pictures: which pixels count; None: all.
        ids: one for each picture; None: all begin at the same draws.
        seed: of the draws.
        steps: gradient steps, 1 or more.
        starts: draws for each picture, 1 or more.
        lr: Adam's learning rate.
        noise: standard deviation of the pixels' noise, in the generator's units.

    Returns:
        The latent variables, (N, latent), and the value of the minimised sum, (N,).

    Raises:
        ModelError: the generator has no ``latent`` and ``classes``, or returns pictures of another shape.
        ArgumentError: a number out of its range.
        TargetError: classes that are out of range, or not one for each picture.

    Example:
        >>> class Shift(nn.Module):  # one latent variable: the brightness
        ...     latent, classes = 1, 2
        ...     def forward(self, z, classes):
        ...         return (z[:, 0] + classes)[:, None, None, None].expand(-1, 1, 2, 2)
        >>> x = torch.full((1, 1, 2, 2), 0.5)
        >>> z, _ = infer_latents(Shift(), x, torch.tensor([0]), noise=0.01, steps=200)
        >>> round(float(z), 2)
        0.5

    Source: abduction, the first of the three steps of a counterfactual: Pearl 2009, section 7.1; by gradient through
    a generator: Creswell, Bharath 2016 (arXiv 1611.05644).
    """
    _check_generator(generator)
    _checked_options(steps=steps, starts=starts, lr=lr, noise=noise)
    count = len(pictures)
    _check_classes("classes", classes, generator, count)
    names = (0,) * count if ids is None else tuple(ids)
    if known is None:
        known = torch.ones_like(pictures, dtype=torch.bool)
    known, found = known.expand_as(pictures), []
    with _frozen(generator):
        for rows in torch.split(torch.arange(count), max(1, _ROWS // starts)):
            draws = [
                torch.randn(starts, generator.latent, generator=random_generator(seed, names[i], "latents"))
                for i in rows.tolist()
            ]
            # Copies, because those of the runner are inference tensors, through which no gradient goes.
            x, seen = (part[rows].clone().repeat_interleave(starts, 0) for part in (pictures.detach(), known))
            y = classes.to(x.device)[rows].repeat_interleave(starts)
            z, misfit = _descended(generator, torch.cat(draws).to(x), x, y, seen.to(x) / noise, steps, lr)
            best = misfit.reshape(-1, starts).argmin(1)
            here = best + starts * torch.arange(len(rows), device=best.device)
            found.append((z[here], misfit[here]))
    if not found:
        return pictures.new_zeros(0, generator.latent), pictures.new_zeros(0)
    return torch.cat([z for z, _ in found]), torch.cat([misfit for _, misfit in found])


def _descended(
    generator: ConditionalGenerator, z: Tensor, x: Tensor, y: Tensor, weight: Tensor, steps: int, lr: float
) -> tuple[Tensor, Tensor]:
    """Latent variables after the steps, and the sum for each row; rows do not depend on each other."""

    def misfits(z: Tensor) -> Tensor:
        made = generator(z, y)
        if made.shape != x.shape:
            raise ModelError(expected("generator", f"one of pictures {tuple(x.shape)}", f"one of {tuple(made.shape)}"))
        return z.square().sum(1) + ((made - x) * weight).square().flatten(1).sum(1)

    z = z.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=lr)
    for _ in range(steps):
        (z.grad,) = torch.autograd.grad(misfits(z).sum(), z)
        optimizer.step()
    with torch.no_grad():
        return z.detach(), misfits(z)


@contextmanager
def _frozen(generator: Any) -> Iterator[None]:
    """Eval mode, with gradients enabled for all but the generator's own parameters; restored afterwards."""
    with torch.inference_mode(False), torch.enable_grad(), state_guard(generator):
        if isinstance(generator, nn.Module):
            generator.requires_grad_(False)
        yield


def _check_generator(generator: Any) -> None:
    missing = [name for name in ("latent", "classes") if not isinstance(getattr(generator, name, None), int)]
    if not callable(generator) or missing:
        wanted = "a module (z, classes) -> pictures with the numbers `latent` and `classes`"
        came = f"{type(generator).__name__}, without {' and '.join(missing)}" if missing else type(generator).__name__
        raise ModelError(expected("generator", wanted, came, "Set them: generator.latent, generator.classes = 64, 10."))
    if generator.classes < 1:
        hint = "Train it with labels: train_gan(images, labels, ...)."
        raise ModelError(expected("generator", "one of classes", "one that knows no classes", hint))


def _check_class(argument: str, value: object, generator: ConditionalGenerator) -> int:
    wanted = f"a class in 0 to {generator.classes - 1}"
    index = check_integer(argument, value, wanted, least=0, error=TargetError)
    if index >= generator.classes:
        raise TargetError(expected(argument, wanted, index))
    return index


def _check_classes(argument: str, classes: Tensor, generator: ConditionalGenerator, count: int) -> None:
    if classes.shape != (count,) or classes.is_floating_point():
        wanted = f"whole numbers ({count},), one for each picture"
        raise TargetError(expected(argument, wanted, f"{classes.dtype}, {tuple(classes.shape)}"))
    for value in set(classes.tolist()):
        _check_class(argument, value, generator)


def _best_class(
    generator: ConditionalGenerator,
    pictures: Tensor,
    known: Tensor | None,
    context: Context,
    options: LatentOptions,
) -> tuple[Tensor, Tensor]:
    """Latent variables and class, (N, latent) and (N,), of the class whose pictures fit best."""
    found = [
        infer_latents(
            generator,
            pictures,
            torch.full((len(pictures),), c),
            known=known,
            ids=context.ids,
            seed=context.seed,
            **options,
        )
        for c in range(generator.classes)
    ]
    best = torch.stack([misfit for _, misfit in found]).argmin(0)
    return torch.stack([z for z, _ in found])[best, torch.arange(len(best), device=best.device)], best


def _made(generator: ConditionalGenerator, z: Tensor, classes: Tensor) -> Tensor:
    with _frozen(generator), torch.no_grad():
        return generator(z.clone(), classes.clone())


class ClassCounterfactual(Intervention):
    """do(class = c), X <- Y: x' = G(z, c), the picture that the generator makes of the same latent variables.

    The three steps of a counterfactual: z is what the picture says of everything but its class (abduction), the class
    is set (action), and the generator makes a picture of both (prediction). What differs between x' and x is then due
    to the class, as far as the generator knows it. z is given for pictures that the generator made, and found by
    :func:`infer_latents` for others; what cannot be made from any z is lost then, so compare with do(class = the class
    that it has), whose effect is that of the generator alone.

    Args:
        generator: a module (z, classes) -> pictures, in image units, with the numbers ``latent`` and ``classes``, such
            as :class:`~ce_plugin.models.Generator`.
        target_class: the class c.
        latents: z of each example of the batch, (N, latent); None: they are found.
        source: the class that the pictures have, where latents are found: one number, or one for each example, (N,);
            None: the class whose pictures fit best, which takes as many times as long as there are classes.
        normalization: (mean, std) of ``model units = (image - mean) / std``; None where the two are the same.
        options: ``steps``, ``starts``, ``lr`` and ``noise`` of :func:`infer_latents`.

    Raises:
        ModelError: the generator has no ``latent`` and ``classes``.
        TargetError: a class that the generator does not know.
        InputError: at the run, latents that do not fit the examples, or pictures that do not fit the generator.

    Example:
        >>> from ce_plugin.models import Generator
        >>> make = Generator(classes=10).eval()
        >>> z = make.latents([0, 1])
        >>> threes = make(z, torch.tensor([3, 3])).detach()
        >>> eights = ClassCounterfactual(make, 8, latents=z)(threes)
        >>> torch.equal(eights, make(z, torch.tensor([8, 8])))
        True

    Source: condition II of Yang et al., ICIP 2019, where the class is what is set; Pearl 2009, section 7.1; with
    generators: Kocaoglu et al. 2018 (arXiv 1709.02023), Pawlowski, Castro, Glocker 2020 (arXiv 2006.06485).
    """

    def __init__(
        self,
        generator: ConditionalGenerator,
        target_class: int,
        *,
        latents: Tensor | None = None,
        source: int | Tensor | None = None,
        normalization: NormalizationLike = None,
        **options: Unpack[LatentOptions],
    ) -> None:
        _check_generator(generator)
        self.generator, self.options = generator, _checked_options(**options)
        self.target_class = _check_class("target_class", target_class, generator)
        if latents is not None and (latents.dim() != 2 or latents.shape[1] != generator.latent):
            raise InputError(expected("latents", f"of shape (N, {generator.latent})", tuple(latents.shape)))
        self.latents = latents
        if isinstance(source, Tensor):
            _check_classes("source", source, generator, len(source))
            self.source: int | Tensor | None = source
        else:
            self.source = None if source is None else _check_class("source", source, generator)
        self.normalization = Normalization.of(normalization)

    @property
    def forward_equivalents(self) -> int:  # type: ignore[override]
        """One pass of the generator where latents are given, else three a step and start, for each class tried."""
        if self.latents is not None:
            return 1
        tried = self.generator.classes if self.source is None else 1
        return 1 + 3 * tried * self.options["steps"] * self.options["starts"]

    def values(self, clean: Tensor, context: Context) -> Tensor:
        """The same pictures as class c, (N, C, H, W), in model units."""
        image = self.normalization.to_image(clean)
        made = _made(self.generator, self._latents(image, context), _same(self.target_class, image))
        if made.shape != clean.shape:
            raise InputError(expected("inputs", f"pictures {tuple(made.shape)} as the generator's", tuple(clean.shape)))
        return self.normalization.to_model(made).to(clean)

    def _latents(self, image: Tensor, context: Context) -> Tensor:
        """z of these examples."""
        if self.latents is not None:
            return _rows("latents", self.latents.to(image), context)
        if self.source is None:
            return _best_class(self.generator, image, None, context, self.options)[0]
        if isinstance(self.source, Tensor):
            classes = _rows("source", self.source.to(image.device), context)
        else:
            classes = _same(self.source, image)
        return infer_latents(self.generator, image, classes, ids=context.ids, seed=context.seed, **self.options)[0]

    def __repr__(self) -> str:
        parts = [f"target_class={self.target_class}"]
        if self.latents is not None:
            parts.append(f"latents={tuple(self.latents.shape)}")
        elif self.source is not None:
            parts.append(f"source={tuple(self.source.shape) if isinstance(self.source, Tensor) else self.source}")
        parts += [f"{name}={value}" for name, value in self.options.items()]
        if not self.normalization.is_identity:
            parts.append(f"normalization=({self.normalization.mean}, {self.normalization.std})")
        return f"ClassCounterfactual({', '.join(parts)})"


def _same(value: int, image: Tensor) -> Tensor:
    """One class for all pictures, (N,)."""
    return torch.full((len(image),), value, device=image.device)


def _rows(argument: str, values: Tensor, context: Context) -> Tensor:
    """The rows of the examples of this context, of values that have one for each example of the user's batch."""
    rows = context.rows if context.rows is not None else range(len(context.ids))
    if (context.rows is None and len(values) != len(rows)) or max(rows, default=-1) >= len(values):
        raise InputError(expected(argument, "one row for each example", f"{len(values)} for {max(rows) + 1} or more"))
    return values[list(rows)]


class ClassInfill:
    """In-painting by a generator: what class c would have there, given the pixels that are not masked.

        G(z, c),   z = argmax p(z given the visible pixels, c)

    A fill for :class:`PixelMask`: ``PixelMask(ClassInfill(generator, 8))``. Zero and blur say what a picture is without
    a patch; this says what it is where the patch is as class c has it, so that strokes that are *absent* count too.

    Args:
        generator: as in :class:`ClassCounterfactual`; its pictures are in image units.
        target_class: the class c; None: for each picture and mask the class whose visible pixels fit best.
        seed: of the draws at which the search for z begins.
        options: ``steps``, ``starts``, ``lr`` and ``noise`` of :func:`infer_latents`.

    Raises:
        ModelError: the generator has no ``latent`` and ``classes``.
        TargetError: a class that the generator does not know.

    Example:
        >>> from ce_plugin.interventions import PixelMask
        >>> from ce_plugin.models import Generator
        >>> fill = ClassInfill(Generator(classes=10), 8, steps=2, starts=1)
        >>> PixelMask(fill, region=(0, 0, 14, 28))(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 1, 28, 28])

    Source: Yeh et al. 2017: Semantic image inpainting with deep generative models (arXiv 1607.07539), without the
    discriminator's term; as a fill for explanations: Chang et al. 2019 (arXiv 1807.08024).
    """

    def __init__(
        self,
        generator: ConditionalGenerator,
        target_class: int | None = None,
        *,
        seed: int = 0,
        **options: Unpack[LatentOptions],
    ) -> None:
        _check_generator(generator)
        self.generator, self.options = generator, _checked_options(**options)
        self.target_class = None if target_class is None else _check_class("target_class", target_class, generator)
        self.seed = check_integer("seed", seed)

    def __call__(self, images: Tensor, masks: Tensor) -> Tensor:
        """Pictures (N, C, H, W) in image units, masks of that shape, bool, True where painted, to the painted ones."""
        context, known = Context((0,) * len(images), self.seed), ~masks
        if self.target_class is None:
            z, classes = _best_class(self.generator, images, known, context, self.options)
        else:
            classes = _same(self.target_class, images)
            z, _ = infer_latents(self.generator, images, classes, known=known, seed=self.seed, **self.options)
        return torch.where(masks, _made(self.generator, z, classes).to(images), images)

    def __repr__(self) -> str:
        parts = [f"target_class={self.target_class}", *(f"{name}={value}" for name, value in self.options.items())]
        return f"ClassInfill({', '.join(parts)})"
