"""What a detector has learned from images, and how it turns what interventions do into a score."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ce_plugin.detection.probes import FEW, Response, leading_logits
from ce_plugin.errors import InputError, expected, unknown_name
from ce_plugin.randomness import generator

__all__ = [
    "AGGREGATES",
    "ClassScale",
    "EffectDistance",
    "Fitted",
    "Judge",
    "Recogniser",
    "Reversal",
    "Sample",
    "aggregate",
    "learn",
]


# Images' worth of weight that a class's own centre and scale have to outweigh before they count more than everyone's.
_PRIOR = 20.0
_MAD = 1.4826
# A column that hardly varies over clean images must not be blown up: everyone's scale of it is at least this share of
# the typical one, and classes are drawn towards that.
_FLOOR = 0.05


@dataclass(frozen=True)
class ClassScale:
    """Centre and scale of every effect in every predicted class.

    With n images of a class, its centre is (n median_class + n0 median_all) / (n + n0), and its scale the same mean of
    squares of 1.4826 times the median absolute deviations, with n0 = 20: classes with few images borrow from all.

    Args:
        center: (K, F), float64.
        scale: (K, F), float64, positive.

    Example:
        >>> effects = torch.tensor([[1.0], [2.0], [3.0], [40.0]], dtype=torch.float64)
        >>> scale = ClassScale.fit(effects, torch.tensor([0, 0, 0, 1]), n_classes=3)
        >>> scale.center[2].item()  # a class without images has everyone's median
        2.5
        >>> scale.standardised(torch.tensor([[2.5]]), torch.tensor([2])).item()
        0.0
    """

    center: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, effects: Tensor, predicted: Tensor, n_classes: int) -> ClassScale:
        """Centres and scales of clean images' effects (N, F), of predicted classes (N,)."""
        effects = effects.double()
        counts = torch.bincount(predicted, minlength=n_classes).double()[:, None]
        everyone = effects.quantile(0.5, dim=0)
        center = everyone.expand(n_classes, -1).clone()
        present = counts.squeeze(1).nonzero().squeeze(1).tolist()
        for k in present:
            center[k] = effects[predicted == k].quantile(0.5, dim=0)
        center = (counts * center + _PRIOR * everyone) / (counts + _PRIOR)
        residual = (effects - center[predicted]).abs()
        typical = _floored(_MAD * residual.quantile(0.5, dim=0))
        squares = typical.square().expand(n_classes, -1).clone()
        for k in present:
            squares[k] = (_MAD * residual[predicted == k].quantile(0.5, dim=0)).square()
        scale = ((counts * squares + _PRIOR * typical.square()) / (counts + _PRIOR)).sqrt()
        return cls(center, scale)

    def standardised(self, effects: Tensor, predicted: Tensor) -> Tensor:
        """How many scales each effect lies from the centre of its class, (N, F), float64."""
        predicted = predicted.to(self.center.device)
        return (effects.to(self.center) - self.center[predicted]) / self.scale[predicted]


@dataclass(frozen=True)
class EffectDistance:
    """The distance of an image's effects from those of clean images, of one group of interventions.

    d = log((v - mu)' P (v - mu)), where v is the inverse hyperbolic sine of the standardised effects, which tames
    heavy tails, and mu and P are the mean and the inverse of the shrunken covariance of clean images. Effects that are
    abnormally small count as much as those that are abnormally large.

    Args:
        scale: centres and scales by class.
        mean: mu, (F,).
        precision: P, (F, F).

    Example:
        >>> clean = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
        >>> classes = torch.arange(500) % 2
        >>> distance = EffectDistance.fit(clean, classes, n_classes=2)
        >>> odd = distance(torch.full((1, 4), 9.0), torch.tensor([0]))
        >>> bool(odd > distance(clean, classes).max())
        True

    Source: the covariance is shrunk as in Ledoit and Wolf, Journal of Multivariate Analysis 88 (2004), 365-411.
    """

    scale: ClassScale
    mean: Tensor
    precision: Tensor

    @classmethod
    def fit(cls, effects: Tensor, predicted: Tensor, n_classes: int) -> EffectDistance:
        """Learn from clean images' effects (N, F), of predicted classes (N,).

        Raises:
            InputError: an effect is not finite.
        """
        from sklearn.covariance import LedoitWolf

        effects, predicted = effects.detach().double().cpu(), predicted.cpu()
        if not bool(effects.isfinite().all()):
            hint = "The network's logits overflow or are NaN under an intervention; run it in float32."
            raise InputError(expected("x", "images with finite effects", "effects with NaN or infinity", hint))
        scale = ClassScale.fit(effects, predicted, n_classes)
        values = scale.standardised(effects, predicted).asinh()
        shrunk = LedoitWolf().fit(values.numpy())
        mean, precision = torch.as_tensor(shrunk.location_), torch.as_tensor(shrunk.precision_)
        return cls(scale, mean.double(), precision.double())

    def __call__(self, effects: Tensor, predicted: Tensor) -> Tensor:
        """The distances (N,), float64, with a gradient where the effects have one."""
        deviation = self.scale.standardised(effects, predicted).asinh() - self.mean
        return ((deviation @ self.precision) * deviation).sum(1).clamp_min(1e-9).log()

    def to(self, device: torch.device) -> EffectDistance:
        """The same on another device."""
        scale = ClassScale(self.scale.center.to(device), self.scale.scale.to(device))
        return EffectDistance(scale, self.mean.to(device), self.precision.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored; :meth:`from_tensors` is the way back."""
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "scale"}
        return {**own, "center": self.scale.center, "scale": self.scale.scale}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> EffectDistance:
        """The distance whose :meth:`tensors` these are."""
        return cls(ClassScale(tensors["center"], tensors["scale"]), tensors["mean"], tensors["precision"])


def _floored(typical: Tensor) -> Tensor:
    floor = _FLOOR * typical.median()
    # All columns constant (a network that ignores its input): any scale will do, since every difference is zero.
    return typical.clamp_min(float(floor) if floor > 0 else 1e-9)


# Ridge penalty in units of one image's weight, and how many images a class's own terms have to outweigh.
_PENALTY = 1.0


@dataclass(frozen=True)
class Reversal:
    """The margin that is left under an intervention, held against what the idle run promises.

    With m the margin of the predicted class under do(...) and z the idle logits, arsinh(m / s) of clean images is
    predicted linearly from z, its largest entries and the predicted class; r is what is left, and -r, over its
    spread in the class, says how much more than usual the intervention takes away. It is one-sided: an image whose
    answer an intervention does *not* shake is no reason for an alarm.

    Without the condition on z, -r says how near to another answer, or how far into it, the intervention brings an
    image, compared with clean ones of its predicted class: images that an attack left next to a boundary stand out.

    Args:
        unit: s, the typical margin, a scalar tensor.
        coefficients: of the linear prediction, (P, S), S interventions.
        spread: standard deviation of r in each predicted class, shrunk to everyone's, (K, S).
        conditional: whether z is held against it, or the predicted class only.

    Example:
        >>> from ce_plugin.detection.probes import margin_under
        >>> random = torch.Generator().manual_seed(0)
        >>> logits = torch.randn(300, 3, generator=random).double() * 3
        >>> do = logits + 0.1 * torch.randn(300, 3, generator=random).double()
        >>> reversal = Reversal.fit(margin_under(do[:, None], logits), logits)
        >>> usual = reversal(margin_under(do[:, None], logits), logits)
        >>> turned = reversal(torch.full((1, 1), -5.0), logits[:1])
        >>> bool(turned > usual.max())
        True
    """

    unit: Tensor
    coefficients: Tensor
    spread: Tensor
    conditional: bool = True

    @classmethod
    def fit(cls, margins: Tensor, idle: Tensor, *, conditional: bool = True) -> Reversal:
        """Learn from clean images.

        Args:
            margins: of the predicted class under each intervention, (N, S).
            idle: logits of the idle run, (N, K).
            conditional: whether the margin is held against what these logits promise.

        Raises:
            InputError: logits that are not finite.
        """
        margins, idle = margins.detach().double().cpu(), idle.detach().double().cpu()
        if not bool(margins.isfinite().all() and idle.isfinite().all()):
            hint = "The network's logits overflow or are NaN under an intervention; run it in float32."
            raise InputError(expected("x", "images with finite logits", "NaN or infinity", hint))
        unit = margins.abs().median().clamp_min(1e-9)
        predicted = idle.argmax(1)
        x, wanted = _explaining(idle, conditional), (margins / unit).asinh()
        gram = x.T @ x + _PENALTY * torch.eye(x.shape[1], dtype=torch.float64)
        coefficients = torch.linalg.solve(gram, x.T @ wanted)
        squares = (wanted - x @ coefficients).square()
        counts = torch.bincount(predicted, minlength=idle.shape[1]).double()[:, None]
        sums = torch.zeros(idle.shape[1], squares.shape[1], dtype=torch.float64).index_add(0, predicted, squares)
        spread = ((sums + _PRIOR * squares.mean(0)) / (counts + _PRIOR)).sqrt().clamp_min(1e-9)
        return cls(unit, coefficients, spread, conditional)

    def __call__(self, margins: Tensor, idle: Tensor) -> Tensor:
        """-r over its spread, (N, S), float64; greater means that more than usual was taken away."""
        margins, idle = margins.to(self.coefficients), idle.to(self.coefficients)
        left = (margins / self.unit).asinh() - _explaining(idle, self.conditional) @ self.coefficients
        return -left / self.spread[idle.detach().argmax(1)]

    def to(self, device: torch.device) -> Reversal:
        """The same on another device."""
        unit, coefficients, spread = (value.to(device) for value in self.tensors().values())
        return Reversal(unit, coefficients, spread, self.conditional)

    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored."""
        return {"unit": self.unit, "coefficients": self.coefficients, "spread": self.spread}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], *, conditional: bool) -> Reversal:
        """What :meth:`tensors` gave."""
        return cls(tensors["unit"], tensors["coefficients"], tensors["spread"], conditional)


def _explaining(idle: Tensor, conditional: bool) -> Tensor:
    """What the margin is predicted from, (N, P): with few classes the class; and, if conditional, the logits."""
    few = idle.shape[1] <= FEW
    top = idle.topk(min(3, idle.shape[1]), dim=1).values if few else leading_logits(idle)
    own = torch.nn.functional.one_hot(idle.detach().argmax(1), idle.shape[1]).to(idle) if few else idle[:, :0]
    columns = [torch.ones_like(top[:, :1]), own]
    if conditional:
        columns += [top, *([idle, own * top[:, :1]] if few else [])]
    return torch.cat(columns, 1)


_HIDDEN = 32
_STEPS = 600
_BATCH = 256
_LEARNING_RATE = 5e-3
_DECAY = 0.1
_INITIAL = 0.33
_FOLDS = 4
# Beyond so many standard deviations a trait says no more: an image far from all that was shown is nobody's likeness.
_FAR = 8.0


@dataclass(frozen=True)
class Recogniser:
    """Likeness of an image's effects to those of the attacked images that were shown.

    z = (h(t) - center) / spread, where h is the logit of a network with two hidden layers, trained to tell attacked
    images from clean and harmlessly altered ones, both kinds counting the same; center and spread are those of clean
    and altered images that h was not trained on (four folds). It is one verdict among others: an attack of another
    kind, which it takes for clean, is still judged by its deviations.

    Args:
        mean, scale: of the traits, (P,).
        first, second, last: weights of the layers, (32, P + 1), (32, 33), (1, 33); the last column are offsets.
        center, spread: scalars.

    Example:
        >>> usual = torch.randn(80, 1, 2, generator=torch.Generator().manual_seed(0))
        >>> recogniser = Recogniser.fit(usual, usual[:, 0] + torch.tensor([4.0, 0.0]), seed=0)
        >>> recogniser(torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])).gt(1.5).tolist()
        [False, True, False]
    """

    mean: Tensor
    scale: Tensor
    first: Tensor
    second: Tensor
    last: Tensor
    center: Tensor
    spread: Tensor

    @classmethod
    def fit(cls, usual: Tensor, attacked: Tensor, seed: int) -> Recogniser:
        """Learn from traits.

        Args:
            usual: of clean images, each in V versions (as it is, and harmlessly altered), (n, V, P).
            attacked: of attacked images, (M, P).
            seed: of the weights and of the order of training.
        """
        usual, attacked = usual.double(), attacked.double()
        folds = torch.arange(len(usual)) % _FOLDS
        folds = folds[torch.randperm(len(usual), generator=generator(seed, "recognition", "folds"))]
        unseen = torch.cat([_trained(usual[folds != k], attacked, seed)(usual[folds == k]) for k in range(_FOLDS)])
        whole = _trained(usual, attacked, seed)
        return replace(whole, center=unseen.mean(), spread=unseen.std().clamp_min(1e-9))

    def __call__(self, traits: Tensor) -> Tensor:
        """z of traits (..., P), (...)."""
        x = ((traits.to(self.mean) - self.mean) / self.scale).clamp(-_FAR, _FAR)
        return (_logit(x, (self.first, self.second, self.last)) - self.center) / self.spread

    def to(self, device: torch.device) -> Recogniser:
        """The same on another device."""
        return Recogniser(*(value.to(device) for value in self.tensors().values()))

    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Recogniser:
        """What :meth:`tensors` gave."""
        return cls(**tensors)


def _logit(x: Tensor, layers: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """The network's answer (...) to standardised traits (..., P)."""
    for layer in layers[:-1]:
        x = F.silu(F.linear(x, layer[:, :-1], layer[:, -1]))
    return F.linear(x, layers[-1][:, :-1], layers[-1][:, -1]).squeeze(-1)


def _trained(usual: Tensor, attacked: Tensor, seed: int) -> Recogniser:
    """The network, not yet centred and scaled."""
    traits = torch.cat([usual.flatten(0, 1), attacked])
    is_attacked = torch.cat([torch.zeros(len(traits) - len(attacked)), torch.ones(len(attacked))]).to(traits)
    share = is_attacked.mean()
    worth = torch.where(is_attacked > 0, 0.5 / share, 0.5 / (1 - share))
    mean, scale = traits.mean(0), traits.std(0).clamp_min(1e-6)
    x = ((traits - mean) / scale).clamp(-_FAR, _FAR)
    random = generator(seed, "recognition")
    first, second, last = (
        _drawn(n_out, n_in, random) for n_out, n_in in ((_HIDDEN, x.shape[1]), (_HIDDEN, _HIDDEN), (1, _HIDDEN))
    )
    layers = (first, second, last)
    optimizer = torch.optim.AdamW(layers, lr=_LEARNING_RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=_STEPS)
    with torch.enable_grad():
        for _ in range(_STEPS):
            rows = torch.randint(len(x), (_BATCH,), generator=random)
            losses = F.binary_cross_entropy_with_logits(_logit(x[rows], layers), is_attacked[rows], reduction="none")
            optimizer.zero_grad()
            (losses * worth[rows]).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    nought, one = torch.zeros_like(share), torch.ones_like(share)
    return Recogniser(mean, scale, first.detach(), second.detach(), last.detach(), nought, one)


def _drawn(n_out: int, n_in: int, random: torch.Generator) -> Tensor:
    """Weights of a layer before training, offsets of zero beside them."""
    weights = torch.randn(n_out, n_in, generator=random, dtype=torch.float64) * (_INITIAL / n_in) ** 0.5
    return torch.cat([weights, torch.zeros(n_out, 1, dtype=torch.float64)], 1).requires_grad_()


AGGREGATES = ("soft_square", "sum", "max")


def aggregate(deviations: Tensor, how: str = "soft_square") -> Tensor:
    """One score from the groups' standardised distances.

    ============= ================================== ===========================================================
    how           score of z_1 ... z_G
    ============= ================================== ===========================================================
    "soft_square" sum_g softplus(z_g)^2              a group that sees nothing unusual says nothing
    "sum"         sum_g z_g                          one that finds an image very usual makes up for another
    "max"         max_g z_g                          the most suspicious group decides
    ============= ================================== ===========================================================

    Args:
        deviations: z, (N, G): distances, centred and scaled on clean images.
        how: a name of the table.

    Returns:
        (N,); greater means more adversarial.

    Raises:
        UnknownNameError: another name.

    Example:
        >>> import torch
        >>> z = torch.tensor([[0.0, 0.0], [-9.0, 4.0]])
        >>> [round(value, 2) for value in aggregate(z).tolist()]
        [0.96, 16.15]
        >>> aggregate(z, "max").tolist()
        [0.0, 4.0]
    """
    if how not in AGGREGATES:
        raise unknown_name("aggregate", how, AGGREGATES)
    if how == "soft_square":
        return F.softplus(deviations).square().sum(1)
    return deviations.sum(1) if how == "sum" else deviations.amax(1)


_LARGEST = 3
_OWN = ("center", "spread", "usual", "allowance")
# Standard deviations up to which the verdicts of groups that do not lead hardly count.
_ALLOWANCE = 2.0


@dataclass(frozen=True)
class Sample:
    """Measured images.

    Args:
        responses: of each group.
        idle: logits without any intervention, (N, K).
    """

    responses: dict[str, Response]
    idle: Tensor

    @property
    def predicted(self) -> Tensor:
        """Classes, (N,)."""
        return self.idle.detach().argmax(1)

    def traits(self) -> Tensor:
        """All effects and margins (their inverse hyperbolic sines) and the leading logits in a row, (N, P), float64."""
        measured = [part for one in self.responses.values() for part in one.parts()[:2]]
        leading = leading_logits(self.idle)
        largest = leading.topk(min(_LARGEST, leading.shape[1]), dim=1).values
        return torch.cat([*(part.double().asinh() for part in measured), leading.double(), largest.double()], 1)

    def __len__(self) -> int:
        return len(self.idle)

    def select(self, rows: Tensor | slice) -> Sample:
        """Some of them."""
        responses = {name: one.select(rows) for name, one in self.responses.items()}
        return Sample(responses, self.idle[rows])

    @staticmethod
    def joined(samples: list[Sample]) -> Sample:
        """Several one after the other."""
        names = samples[0].responses
        responses = {name: Response.joined([one.responses[name] for one in samples]) for name in names}
        return Sample(responses, torch.cat([one.idle for one in samples]))


@dataclass(frozen=True)
class Judge:
    """The three ways in which a group can be unusual.

    Args:
        distance: of effects and idle logits from those of clean images; None where the group has no effects.
        reversal: what its interventions take from the predicted class beyond the usual; None where it has no margins.
        left: the margins that they leave, whatever the idle logits promise; None where these are not judged.
    """

    distance: EffectDistance | None
    reversal: Reversal | None
    left: Reversal | None = None

    @classmethod
    def fit(cls, response: Response, sample: Sample) -> Judge:
        """Learn from clean images."""
        n_classes = sample.idle.shape[1]
        effects, margins, _, left = response.parts()
        return cls(
            EffectDistance.fit(_beside(response, sample), sample.predicted, n_classes) if effects.shape[1] else None,
            Reversal.fit(margins, sample.idle) if margins.shape[1] else None,
            Reversal.fit(left, sample.idle, conditional=False) if left.shape[1] else None,
        )

    def __call__(self, response: Response, sample: Sample) -> Tensor:
        """Distance, then each reversal, then each margin, (N, up to 1 + 2 S), float64."""
        columns = []
        if self.distance is not None:
            columns.append(self.distance(_beside(response, sample), sample.predicted)[:, None])
        if self.reversal is not None:
            columns.append(self.reversal(response.margins, sample.idle))
        if self.left is not None:
            columns.append(self.left(response.parts()[3], sample.idle))
        return torch.cat(columns, 1)

    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored."""
        distance = {} if self.distance is None else self.distance.tensors()
        reversal = {} if self.reversal is None else self.reversal.tensors()
        left = {} if self.left is None else self.left.tensors()
        return {**_under("distance", distance), **_under("reversal", reversal), **_under("left", left)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Judge:
        """What :meth:`tensors` gave."""
        distance, reversal, left = (_inside(side, tensors) for side in ("distance", "reversal", "left"))
        return cls(
            EffectDistance.from_tensors(distance) if distance else None,
            Reversal.from_tensors(reversal, conditional=True) if reversal else None,
            Reversal.from_tensors(left, conditional=False) if left else None,
        )

    def to(self, device: torch.device) -> Judge:
        """The same on another device."""
        return Judge(
            None if self.distance is None else self.distance.to(device),
            None if self.reversal is None else self.reversal.to(device),
            None if self.left is None else self.left.to(device),
        )


@dataclass(frozen=True)
class Fitted:
    """A judge for each group, what its verdicts are like on clean images, and what attacked images have taught.

    Args:
        judges: group -> judge.
        center, spread: mean and standard deviation of each verdict on clean images that the judge was not fitted on,
            (D,), float64.
        usual: traits of the clean images, each as it is and harmlessly altered, (n, V, P).
        allowance: what is taken from each verdict before it counts, (D,): 0 for groups that lead, else 2.
        how: see :func:`~ce_plugin.detection.scorers.aggregate`.
        known: recognises attacks that were shown; None: none were.
    """

    judges: dict[str, Judge] = field(repr=False)
    center: Tensor = field(repr=False)
    spread: Tensor = field(repr=False)
    usual: Tensor = field(repr=False)
    allowance: Tensor = field(repr=False)
    how: str
    known: Recogniser | None = field(default=None, repr=False)

    def deviations(self, sample: Sample) -> Tensor:
        """Every verdict, centred and scaled on clean images, (N, D), float64; the likeness to known attacks is last."""
        deviations = (_verdicts(self.judges, sample) - self.center) / self.spread
        return self.with_likeness(deviations, sample.traits())

    def with_likeness(self, deviations: Tensor, traits: Tensor) -> Tensor:
        """Deviations with the likeness to known attacks as last column, anew where they have one already."""
        own = deviations[:, : len(self.center)]
        return own if self.known is None else torch.cat([own, self.known(traits)[:, None]], 1)

    def score(self, deviations: Tensor) -> Tensor:
        """The scores (N,), float64."""
        known = deviations.shape[1] - len(self.allowance)
        return aggregate(deviations - F.pad(self.allowance, (0, known)), self.how)

    def taught(self, attacked: Sample, seed: int) -> Fitted:
        """The same, with what these attacked images have in common that clean ones have not."""
        return replace(self, known=Recogniser.fit(self.usual, attacked.traits(), seed))

    def to(self, device: torch.device) -> Fitted:
        """The same on another device; what only learning takes, ``usual``, stays where it is."""
        judges = {name: one.to(device) for name, one in self.judges.items()}
        known = None if self.known is None else self.known.to(device)
        center, spread, allowance = (one.to(device) for one in (self.center, self.spread, self.allowance))
        return Fitted(judges, center, spread, self.usual, allowance, self.how, known)

    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored."""
        inner = {key: value for name, one in self.judges.items() for key, value in _under(name, one.tensors()).items()}
        known = {} if self.known is None else self.known.tensors()
        return {**_under("judges", inner), **_under("known", known), **{name: getattr(self, name) for name in _OWN}}

    @classmethod
    def from_tensors(cls, names: tuple[str, ...], tensors: Mapping[str, Any], how: str) -> Fitted:
        """What :meth:`tensors` gave."""
        judges = {name: Judge.from_tensors(_inside(f"judges/{name}", tensors)) for name in names}
        # Files of older versions have no allowance.
        own = {
            "allowance": torch.zeros_like(tensors["center"]),
            **{name: tensors[name] for name in _OWN if name in tensors},
        }
        known = _inside("known", tensors)
        return cls(judges, **own, how=how, known=Recogniser.from_tensors(known) if known else None)


def learn(
    clean: Sample, altered: Sample | None, *, how: str, seed: int, leading: Collection[str] | None = None
) -> Fitted:
    """Learn what clean images are like.

    Centre and spread of the verdicts come from images that the judge was not fitted on (four folds), for on its own
    images every distance is too small.

    Args:
        clean: clean images.
        altered: harmless alterations of the same images, one each, in the same order, or None.
        how: of :func:`~ce_plugin.detection.scorers.aggregate`.
        seed: of the folds.
        leading: names of the groups that count in full; None: all.
    """
    folds = torch.arange(len(clean)) % _FOLDS
    folds = folds[torch.randperm(len(clean), generator=generator(seed, "folds"))]
    parts = []
    for fold in range(_FOLDS):
        judges = _fit(clean, altered, (folds != fold).nonzero().squeeze(1))
        parts.append(_verdicts(judges, clean.select((folds == fold).nonzero().squeeze(1))))
    held_out = torch.cat(parts)
    center, spread = held_out.mean(0), held_out.std(0).clamp_min(1e-9)
    judges = _fit(clean, altered, torch.arange(len(clean)))
    versions = [clean, *([altered] if altered is not None else [])]
    usual = torch.stack([one.traits() for one in versions], 1)
    return Fitted(judges, center, spread, usual, _allowance(judges, clean, leading), how)


def _fit(clean: Sample, altered: Sample | None, rows: Tensor) -> dict[str, Judge]:
    parts = [clean.select(rows), *([altered.select(rows)] if altered is not None else [])]
    sample = Sample.joined(parts)
    return {name: Judge.fit(response, sample) for name, response in sample.responses.items()}


def _allowance(judges: dict[str, Judge], sample: Sample, leading: Collection[str] | None) -> Tensor:
    """0 for each verdict of a group that leads, 2 for each of the others, (D,)."""
    one = sample.select(slice(0, 1))
    widths = {name: judge(one.responses[name], one).shape[1] for name, judge in judges.items()}
    taken = [0.0 if leading is None or name in leading else _ALLOWANCE for name in judges]
    return torch.tensor(taken, dtype=torch.float64).repeat_interleave(torch.tensor(list(widths.values())))


def _verdicts(judges: dict[str, Judge], sample: Sample) -> Tensor:
    return torch.cat([judge(sample.responses[name], sample) for name, judge in judges.items()], 1)


def _beside(response: Response, sample: Sample) -> Tensor:
    """Effects beside the idle logits: a distance then sees whether an effect fits the answer that it changed."""
    return torch.cat([response.effects, leading_logits(sample.idle).to(response.effects)], 1)


def _under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}/{key}": value for key, value in tensors.items()}


def _inside(name: str, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    start = f"{name}/"
    return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
