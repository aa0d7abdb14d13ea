"""The base class of interventions: a rule that supplies the counterfactual value x' which ``do`` sets."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import TypeVar, Union, cast

import torch
from captum.robust import Perturbation
from torch import Tensor

from ce_plugin.errors import ArgumentError, InputError, check_integer, expected
from ce_plugin.randomness import generator

Inputs = TypeVar("Inputs", bound="Tensor | tuple[Tensor, ...]")


@dataclass(frozen=True)
class Context:
    """What an intervention is told about the examples whose counterfactual values it supplies.

    Args:
        ids: one id per example, (N,); equal ids get equal random numbers.
        seed: seed of the run.
        target: class index of each example, (N,), if known: the explained class, or the predicted one.
        position: index of this tensor, if the inputs are a tuple.
        variant: which of the intervention's alternative values to return, in ``range(n_variants)``.
        mask: for interventions with ``per_trial``: what this trial sets, broadcastable to the clean value.
        rows: index of each example in the batch that the user passed, (N,); None means the whole batch.
        donors: the values at the site for the inputs that :meth:`Intervention.donors` returned, one tensor for each
            tensor of the site; None if it returned None.
    """

    ids: tuple[int, ...]
    seed: int = 0
    target: Tensor | None = None
    position: int = 0
    variant: int = 0
    mask: Tensor | None = None
    rows: tuple[int, ...] | None = None
    donors: tuple[Tensor, ...] | None = None

    def generator(self, example: int, stream: str) -> torch.Generator:
        """A new CPU generator for one example: its numbers do not depend on earlier draws."""
        return generator(self.seed, self.ids[example], stream, self.position, self.variant)

    def select(self, examples: slice | Sequence[int]) -> Context:
        """The context of some of the examples."""
        index = range(len(self.ids))[examples] if isinstance(examples, slice) else examples
        target = None if self.target is None else self.target[list(index)]
        rows = index if self.rows is None else [self.rows[i] for i in index]
        return replace(self, ids=tuple(self.ids[i] for i in index), target=target, rows=tuple(rows))

    def own(self, values: Tensor, clean: Tensor) -> Tensor:
        """The rows of these examples, where ``values`` has one row for each example of the user's batch."""
        if self.rows is None or values.dim() != clean.dim() or len(values) == 1:
            return values
        return values[[row for row in self.rows if row < len(values)]]


class Intervention(Perturbation):  # type: ignore[misc]
    """An intervention variable F_u with values {idle, do(x'_u)}. It defines x'; a design defines when x' is set.

    Subclasses write :meth:`values`. An intervention is a :class:`captum.robust.Perturbation`: called on inputs, it sets
    *all* units, so that it works in Captum's ``AttackComparator`` and ``MinParamPerturbation``.

    Attributes:
        n_variants: number of alternative values x'. With several, effects are averages over them.
        per_trial: True if x' depends on what a trial sets (as for an in-painter); the runner then requests values
            batch by batch, with ``context.mask`` set.
        forward_equivalents: cost of x' for one example, in forward passes of the network (a backward pass counts as
            two).

    Source: Yang et al., ICIP 2019 (arXiv 1902.03380), Eq. 3; Pearl 2009, Eq. 3.8.
    """

    n_variants: int = 1
    per_trial: bool = False
    forward_equivalents: int = 0

    def donors(self, inputs: tuple[Tensor, ...], context: Context) -> tuple[Tensor, ...] | None:
        """Inputs of the network whose values at the site are needed in ``context.donors``; None if none are.

        Args:
            inputs: the examples' own inputs, (N, ...) each, under their evidence.
            context: ids and seed.

        Returns:
            One counterpart per example, (N, ...) each, or a reference set of any length, (R, ...) each.
        """
        return None

    def collect(self, values: Iterable[Tensor]) -> Tensor:
        """Combine the donors' values at the site, which come batch by batch; by default all are kept."""
        return torch.cat(list(values))

    @abstractmethod
    def values(self, clean: Tensor, context: Context) -> Tensor:
        """The counterfactual value x' of the whole site.

        Args:
            clean: value of the site, (N, ...), in model units.
            context: see :class:`Context`.

        Returns:
            A tensor of the shape, device and dtype of ``clean``, which must not be changed.
        """

    def perturb(
        self,
        inputs: Inputs,
        *,
        target: Tensor | None = None,
        ids: Sequence[int] | None = None,
        seed: int = 0,
        variant: int = 0,
    ) -> Inputs:
        """The inputs with every unit set to its counterfactual value.

        Args:
            inputs: (N, ...), or a tuple of such tensors.
            target: class index per example, (N,), for interventions that need one.
            ids: one id per example; with None all examples get the same random numbers.
            seed: seed of the random numbers.
            variant: which alternative, for interventions with several.

        Returns:
            The perturbed inputs, a tensor or a tuple as passed.
        """
        tensors: tuple[Tensor, ...] = inputs if isinstance(inputs, tuple) else (inputs,)
        names = checked_examples(tensors, ids, seed)
        check_integer("variant", variant, f"an index below {self.n_variants}, the number of alternatives", least=0)
        if variant >= self.n_variants:
            wanted = f"an index below {self.n_variants}, the number of alternatives"
            raise ArgumentError(expected("variant", wanted, variant))
        base = Context(ids=names, seed=seed, target=target, variant=variant)
        donors = self.donors(tensors, base)
        if donors is not None:
            base = replace(base, donors=tuple(self.collect([donor]) for donor in donors))
        out = tuple(self.values(x, replace(base, position=i)) for i, x in enumerate(tensors))
        return cast(Inputs, out if isinstance(inputs, tuple) else out[0])


def checked_examples(inputs: tuple[Tensor, ...], ids: Sequence[int] | None, seed: int) -> tuple[int, ...]:
    """One id for each example."""
    for x in inputs:
        given: object = x
        if not isinstance(given, Tensor) or not x.dim():
            got = f"shape {tuple(x.shape)}" if isinstance(given, Tensor) else type(given).__name__
            raise InputError(expected("inputs", "a tensor (N, ...), or a tuple of such", got))
    check_integer("seed", seed)
    if ids is None:
        return (0,) * len(inputs[0])
    every: object = ids
    if isinstance(every, (str, bytes)) or not isinstance(every, Iterable):
        raise InputError(expected("ids", "one integer per example", repr(ids)))
    names = tuple(check_integer("ids", i, "one integer per example", error=InputError) for i in ids)
    if len(names) != len(inputs[0]):
        raise InputError(expected("ids", f"{len(inputs[0])} ids, one per example", len(names)))
    return names


Numbers = Union[float, Sequence[float]]


@dataclass(frozen=True)
class Normalization:
    """What was done to the image before the model: ``model = (image - mean) / std``, per channel (dimension 1).

    Args:
        mean: one number, or one per channel, in image units.
        std: likewise, positive.

    Raises:
        ArgumentError: std is not positive, a value is not finite, or mean and std have different lengths.

    Example:
        >>> n = Normalization(127.0, 128.0)
        >>> float(n.to_model(torch.tensor([[255.0]])))
        1.0
        >>> float(n.to_image(torch.tensor([[1.0]])))
        255.0
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __init__(self, mean: Numbers = 0.0, std: Numbers = 1.0) -> None:
        for name, value in (("mean", mean), ("std", std)):
            try:
                numbers = [float(value)] if isinstance(value, Real) else [float(v) for v in value]  # type: ignore[union-attr]
            except (TypeError, ValueError):
                numbers = []
            if not numbers or not all(map(math.isfinite, numbers)):
                raise ArgumentError(expected("normalization", "a pair (mean, std) of finite numbers", (mean, std)))
            object.__setattr__(self, name, tuple(numbers))
        if min(self.std) <= 0:
            raise ArgumentError(expected("normalization", "a pair (mean, std) with positive std", (mean, std)))
        if 1 not in (len(self.mean), len(self.std)) and len(self.mean) != len(self.std):
            raise ArgumentError(expected("normalization", "a mean and a std of equal lengths", (mean, std)))

    @classmethod
    def of(cls, value: NormalizationLike) -> Normalization:
        """A Normalization from ``None``, a pair ``(mean, std)`` or a Normalization."""
        if value is None:
            return cls()
        if isinstance(value, Normalization):
            return value
        if isinstance(value, (tuple, list)) and len(value) == 2:
            return cls(*value)
        raise ArgumentError(
            expected("normalization", "None or a pair (mean, std)", repr(value), "Write (127.0, 128.0), for example.")
        )

    @property
    def is_identity(self) -> bool:
        """Whether image and model units are the same."""
        return set(self.mean) == {0.0} and set(self.std) == {1.0}

    def _shaped(self, numbers: tuple[float, ...], like: Tensor) -> Tensor:
        if len(numbers) > 1 and (like.dim() < 2 or like.shape[1] != len(numbers)):
            wanted = f"of one number or one per channel of {tuple(like.shape)}"
            raise ArgumentError(expected("normalization", wanted, f"{len(numbers)}"))
        shape = [1, len(numbers)] + [1] * max(like.dim() - 2, 0)
        return torch.tensor(numbers, dtype=like.dtype, device=like.device).reshape(shape[: max(like.dim(), 1)])

    def to_model(self, image: Tensor) -> Tensor:
        """Image units to model units, (N, C, ...)."""
        if self.is_identity:
            return image
        return (image - self._shaped(self.mean, image)) / self._shaped(self.std, image)

    def to_image(self, model: Tensor) -> Tensor:
        """Model units to image units, (N, C, ...)."""
        if self.is_identity:
            return model
        return model * self._shaped(self.std, model) + self._shaped(self.mean, model)


NormalizationLike = Union[Normalization, "tuple[Numbers, Numbers]", None]
