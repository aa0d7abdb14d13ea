"""Scorers: how unusual the probes' responses are, and how this becomes one score."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from ce_plugin.detection.probes import FEW, Response, leading_logits
from ce_plugin.errors import InputError, expected, unknown_name
from ce_plugin.networks.forward import double
from ce_plugin.randomness import generator

# Images' worth of weight that a class's own centre and scale have to outweigh before they count more than everyone's.
_PRIOR = 20.0
_MAD = 1.4826
# A column that hardly varies over clean images must not be blown up: everyone's scale of it is at least this share of
# the typical one, and classes are drawn towards that.
_FLOOR = 0.05
_FOLDS = 4


@dataclass(frozen=True)
class Sample:
    """Measured images.

    Args:
        responses: of each probe, by its name.
        idle: logits without any intervention, (N, K).
    """

    responses: dict[str, Response]
    idle: Tensor

    @property
    def predicted(self) -> Tensor:
        """Classes, (N,)."""
        return self.idle.detach().argmax(1)

    def features(self) -> Tensor:
        """All effects and margins (their inverse hyperbolic sines) and the leading logits in a row, (N, P), float64."""
        columns = []
        for response in self.responses.values():
            columns += [double(response.effects).asinh(), double(response.margins).asinh()]
        leading = double(leading_logits(self.idle))
        largest = leading.topk(min(3, leading.shape[1]), dim=1).values
        return torch.cat([*columns, leading, largest], 1)

    def cpu(self) -> Sample:
        """On the CPU, where scores are computed in float64, with their gradients."""
        responses = {}
        for name, response in self.responses.items():
            responses[name] = Response(*(one.cpu() for one in response))
        return Sample(responses, self.idle.cpu())

    def detached(self) -> Sample:
        """Without gradients, on the CPU."""
        responses = {}
        for name, response in self.responses.items():
            responses[name] = Response(*(one.detach().cpu() for one in response))
        return Sample(responses, self.idle.detach().cpu())

    def to_dict(self) -> dict[str, Any]:
        """What a file of a checkpoint holds; :meth:`from_dict` reads it."""
        return {"responses": {name: list(response) for name, response in self.responses.items()}, "idle": self.idle}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Sample:
        """The images of :meth:`to_dict`."""
        return cls({name: Response(*parts) for name, parts in content["responses"].items()}, content["idle"])

    def select(self, rows: Tensor | slice) -> Sample:
        """Some of them."""
        responses = {}
        for name, (effects, margins, answers, left) in self.responses.items():
            responses[name] = Response(effects[rows], margins[rows], answers[rows], left[rows])
        return Sample(responses, self.idle[rows])

    @staticmethod
    def joined(samples: Sequence[Sample]) -> Sample:
        """Several one after the other."""
        responses = {}
        for name in samples[0].responses:
            parts = [one.responses[name] for one in samples]
            responses[name] = Response(*map(torch.cat, zip(*parts, strict=True)))
        return Sample(responses, torch.cat([one.idle for one in samples]))


class FittedModule(nn.Module):
    """A module whose buffers are what was fitted: without values before it is fitted, or a state dict is loaded.

    Their shapes are those of what is loaded, so load with ``load_state_dict(..., assign=True)``.

    Attributes:
        fitted: names of these buffers.
    """

    fitted: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        super().__init__()
        for name in self.fitted:
            self.register_buffer(name, UninitializedBuffer())


class ClassScale(FittedModule):
    """Centre and scale of every effect in every predicted class.

    With n images of a class, its centre is (n median_class + n0 median_all) / (n + n0), and its scale the same mean of
    squares of 1.4826 times the median absolute deviations, with n0 = 20: classes with few images borrow from all.

    Attributes:
        center: (K, F), float64.
        scale: (K, F), float64, positive.

    Example:
        >>> effects = torch.tensor([[1.0], [2.0], [3.0], [40.0]], dtype=torch.float64)
        >>> classes = ClassScale().fit(effects, torch.tensor([0, 0, 0, 1]), n_classes=3)
        >>> classes.center[2].item()  # a class without images has everyone's median
        2.5
        >>> classes(torch.tensor([[2.5]]), torch.tensor([2])).item()
        0.0
    """

    center: Tensor
    scale: Tensor
    fitted = ("center", "scale")

    def fit(self, effects: Tensor, predicted: Tensor, n_classes: int) -> ClassScale:
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
        typical = _MAD * residual.quantile(0.5, dim=0)
        floor = _FLOOR * float(typical.median())
        # All columns constant (a network that ignores its input): any scale will do, since every difference is zero.
        typical = typical.clamp_min(floor if floor > 0 else 1e-9)
        squares = typical.square().expand(n_classes, -1).clone()
        for k in present:
            squares[k] = (_MAD * residual[predicted == k].quantile(0.5, dim=0)).square()
        self.center = center
        self.scale = ((counts * squares + _PRIOR * typical.square()) / (counts + _PRIOR)).sqrt()
        return self

    def forward(self, effects: Tensor, predicted: Tensor) -> Tensor:
        """How many scales each effect lies from the centre of its class, (N, F), float64."""
        return (effects.to(self.center) - self.center[predicted]) / self.scale[predicted]


class EffectDistance(FittedModule):
    """The distance of an image's effects from those of clean images, of one probe.

    d = log((v - mu)' P (v - mu)), where v is the inverse hyperbolic sine of the standardised effects, which tames
    heavy tails, and mu and P are the mean and the inverse of the shrunken covariance of clean images. Effects that are
    abnormally small count as much as those that are abnormally large.

    Attributes:
        classes: centres and scales by class.
        mean: mu, (F,).
        precision: P, (F, F).

    Example:
        >>> clean = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
        >>> classes = torch.arange(500) % 2
        >>> distance = EffectDistance().fit(clean, classes, n_classes=2)
        >>> odd = distance(torch.full((1, 4), 9.0), torch.tensor([0]))
        >>> bool(odd > distance(clean, classes).max())
        True

    Source: the covariance is shrunk as in Ledoit and Wolf, Journal of Multivariate Analysis 88 (2004), 365-411.
    """

    mean: Tensor
    precision: Tensor
    fitted = ("mean", "precision")

    def __init__(self) -> None:
        super().__init__()
        self.classes = ClassScale()

    def fit(self, effects: Tensor, predicted: Tensor, n_classes: int) -> EffectDistance:
        """Learn from clean images' effects (N, F), of predicted classes (N,).

        Raises:
            InputError: an effect is not finite.
        """
        from sklearn.covariance import LedoitWolf

        effects, predicted = double(effects.detach()), predicted.cpu()
        _check_finite("effects", effects)
        values = self.classes.fit(effects, predicted, n_classes)(effects, predicted).asinh()
        shrunk = LedoitWolf().fit(values.numpy())
        self.mean = torch.as_tensor(shrunk.location_).double()
        self.precision = torch.as_tensor(shrunk.precision_).double()
        return self

    def forward(self, effects: Tensor, predicted: Tensor) -> Tensor:
        """The distances (N,), float64, with a gradient where the effects have one."""
        deviation = self.classes(effects, predicted).asinh() - self.mean
        squares: Tensor = ((deviation @ self.precision) * deviation).sum(1)
        return squares.clamp_min(1e-9).log()


# Ridge penalty in units of one image's weight.
_PENALTY = 1.0


class MarginResidual(FittedModule):
    """The margin that is left under an intervention, compared with the one predicted from the idle run.

    With m the margin of the predicted class under do(...) and z the idle logits, arsinh(m / s) of clean images is
    predicted linearly from z, its largest entries and the predicted class; r is the residual, and -r, over its
    spread in the class, says how much more than usual the intervention takes away. It is one-sided: an image whose
    answer an intervention does *not* shake is no reason for an alarm.

    Without the condition on z, -r measures how near the intervention brings an image to another answer, or how far
    into it, compared with clean images of its predicted class: images that an attack left next to a boundary stand out.

    Args:
        conditional: whether the prediction is from z, or from the predicted class only.

    Attributes:
        unit: s, the typical margin, a scalar tensor.
        coefficients: of the linear prediction, (P, S), S interventions.
        spread: standard deviation of r in each predicted class, shrunk to everyone's, (K, S).

    Example:
        >>> from ce_plugin.detection.probes import margin_under
        >>> random = torch.Generator().manual_seed(0)
        >>> logits = torch.randn(300, 3, generator=random).double() * 3
        >>> do = logits + 0.1 * torch.randn(300, 3, generator=random).double()
        >>> residual = MarginResidual().fit(margin_under(do[:, None], logits), logits)
        >>> usual = residual(margin_under(do[:, None], logits), logits)
        >>> turned = residual(torch.full((1, 1), -5.0), logits[:1])
        >>> bool(turned > usual.max())
        True
    """

    unit: Tensor
    coefficients: Tensor
    spread: Tensor
    fitted = ("unit", "coefficients", "spread")

    def __init__(self, conditional: bool = True) -> None:
        super().__init__()
        self.conditional = conditional

    def fit(self, margins: Tensor, idle: Tensor) -> MarginResidual:
        """Learn from clean images.

        Args:
            margins: of the predicted class under each intervention, (N, S).
            idle: logits of the idle run, (N, K).

        Raises:
            InputError: logits that are not finite.
        """
        margins, idle = double(margins.detach()), double(idle.detach())
        _check_finite("logits", margins, idle)
        self.unit = margins.abs().median().clamp_min(1e-9)
        predicted = idle.argmax(1)
        x, wanted = self._predictors(idle), (margins / self.unit).asinh()
        gram = x.T @ x + _PENALTY * torch.eye(x.shape[1], dtype=torch.float64)
        self.coefficients = torch.linalg.solve(gram, x.T @ wanted)
        squares = (wanted - x @ self.coefficients).square()
        counts = torch.bincount(predicted, minlength=idle.shape[1]).double()[:, None]
        sums = torch.zeros(idle.shape[1], squares.shape[1], dtype=torch.float64).index_add(0, predicted, squares)
        self.spread = ((sums + _PRIOR * squares.mean(0)) / (counts + _PRIOR)).sqrt().clamp_min(1e-9)
        return self

    def forward(self, margins: Tensor, idle: Tensor) -> Tensor:
        """-r over its spread, (N, S), float64; greater means that more than usual was taken away."""
        margins, idle = margins.to(self.coefficients), idle.to(self.coefficients)
        residual = (margins / self.unit).asinh() - self._predictors(idle) @ self.coefficients
        return -residual / self.spread[idle.detach().argmax(1)]

    def _predictors(self, idle: Tensor) -> Tensor:
        """What the margin is predicted from, (N, P): with few classes the class; and, if conditional, the logits."""
        few = idle.shape[1] <= FEW
        top = idle.topk(min(3, idle.shape[1]), dim=1).values if few else leading_logits(idle)
        own = F.one_hot(idle.detach().argmax(1), idle.shape[1]).to(idle) if few else idle[:, :0]
        columns = [torch.ones_like(top[:, :1]), own]
        if self.conditional:
            columns += [top, *([idle, own * top[:, :1]] if few else [])]
        return torch.cat(columns, 1)


def _check_finite(what: str, *tensors: Tensor) -> None:
    for tensor in tensors:
        if not bool(tensor.isfinite().all()):
            hint = "The network's logits overflow or are NaN under an intervention; run it in float32."
            raise InputError(expected("x", f"images with finite {what}", f"{what} with NaN or infinity", hint))


_HIDDEN = 32
_STEPS = 600
_BATCH = 256
_LEARNING_RATE = 5e-3
_DECAY = 0.1
_INITIAL = 0.33
# Features are clipped at so many standard deviations: an image far from all attacked examples is like none of them.
_FAR = 8.0


class AttackClassifier(FittedModule):
    """Likeness of an image's effects to those of attacked examples.

    z = (h(t) - center) / spread, where h is the logit of a network with two hidden layers, trained to distinguish
    attacked images from clean and harmlessly altered ones, both with the same total weight; center and spread are those
    of clean and altered images that h was not trained on (four folds). It is one score among others: an attack of
    another kind, which it takes for clean, still has unusual deviations.

    Args:
        n_features: P.

    Attributes:
        mean, scale: of the features, (P,).
        layers: the network.
        center, spread: scalars.

    Example:
        >>> usual = torch.randn(80, 1, 2, generator=torch.Generator().manual_seed(0))
        >>> attacks = AttackClassifier(2).fit(usual, usual[:, 0] + torch.tensor([4.0, 0.0]), seed=0)
        >>> attacks(torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])).gt(1.5).tolist()
        [False, True, False]
    """

    mean: Tensor
    scale: Tensor
    center: Tensor
    spread: Tensor
    fitted = ("mean", "scale", "center", "spread")

    def __init__(self, n_features: int) -> None:
        super().__init__()
        # Weights come from `fit` or from a file, and not from the global random state.
        layer = functools.partial(nn.Linear, dtype=torch.float64, device="meta")
        layers = layer(n_features, _HIDDEN), nn.SiLU(), layer(_HIDDEN, _HIDDEN), nn.SiLU(), layer(_HIDDEN, 1)
        self.layers = nn.Sequential(*layers).requires_grad_(False)

    def fit(self, usual: Tensor, attacked: Tensor, seed: int) -> AttackClassifier:
        """Learn from features.

        Args:
            usual: of clean images, each in V versions (as it is, and harmlessly altered), (n, V, P).
            attacked: of attacked images, (M, P).
            seed: of the weights and of the order of training.
        """
        usual, attacked = usual.double(), attacked.double()
        folds = _folds(len(usual), generator(seed, "recognition", "folds"))
        unseen = []
        for fold in range(_FOLDS):
            self._train(usual[folds != fold], attacked, seed)
            unseen.append(self._logit(usual[folds == fold]))
        self._train(usual, attacked, seed)
        logits = torch.cat(unseen)
        self.center, self.spread = logits.mean(), logits.std().clamp_min(1e-9)
        return self

    def forward(self, features: Tensor) -> Tensor:
        """z of features (..., P), (...)."""
        return (self._logit(features) - self.center) / self.spread

    def _logit(self, features: Tensor) -> Tensor:
        x = ((features.to(self.mean) - self.mean) / self.scale).clamp(-_FAR, _FAR)
        logits: Tensor = self.layers(x)
        return logits.squeeze(-1)

    def _train(self, usual: Tensor, attacked: Tensor, seed: int) -> None:
        features = torch.cat([usual.flatten(0, 1), attacked])
        is_attacked = torch.cat([torch.zeros(len(features) - len(attacked)), torch.ones(len(attacked))]).to(features)
        share = is_attacked.mean()
        weight = torch.where(is_attacked > 0, 0.5 / share, 0.5 / (1 - share))
        self.mean, self.scale = features.mean(0), features.std(0).clamp_min(1e-6)
        random = generator(seed, "recognition")
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                drawn = torch.randn(layer.weight.shape, generator=random, dtype=torch.float64)
                layer.weight = nn.Parameter(drawn * (_INITIAL / layer.in_features) ** 0.5)
                layer.bias = nn.Parameter(torch.zeros(layer.out_features, dtype=torch.float64))
        x = ((features - self.mean) / self.scale).clamp(-_FAR, _FAR)
        optimizer = torch.optim.AdamW(self.layers.parameters(), lr=_LEARNING_RATE, weight_decay=_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=_STEPS)
        with torch.enable_grad():
            for _ in range(_STEPS):
                rows = torch.randint(len(x), (_BATCH,), generator=random)
                logits = self.layers(x[rows]).squeeze(-1)
                loss = F.binary_cross_entropy_with_logits(logits, is_attacked[rows], weight[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
        self.layers.requires_grad_(False).zero_grad()


def _folds(n: int, random: torch.Generator) -> Tensor:
    """The fold of each of n images, (n,): equally many in each, in random order."""
    return (torch.arange(n) % _FOLDS)[torch.randperm(n, generator=random)]


AGGREGATES = ("soft_square", "sum", "max")


def aggregate(deviations: Tensor, how: str = "soft_square") -> Tensor:
    """One score from standardised deviations.

    ============= ================================== ===========================================================
    how           score of z_1 ... z_D
    ============= ================================== ===========================================================
    "soft_square" sum_d softplus(z_d)^2              usual deviations hardly count
    "sum"         sum_d z_d                          very usual deviations offset unusual ones
    "max"         max_d z_d                          the most unusual one decides
    ============= ================================== ===========================================================

    Args:
        deviations: z, (N, D), centred and scaled on clean images.
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


class ProbeScorer(nn.Module):
    """Scores how unusual one probe's response is, in up to three ways.

    Args:
        sides: those of :data:`~ce_plugin.detection.probes.SIDES` that the probe's responses have.

    Attributes:
        distance: of effects and idle logits from those of clean images, or None.
        reversal: what interventions take from the predicted class beyond the usual, or None.
        margin: how little they leave of its margin, without regard to the idle logits, or None.
    """

    def __init__(self, sides: Sequence[str]) -> None:
        super().__init__()
        self.sides = tuple(sides)
        self.distance = EffectDistance() if "distance" in sides else None
        self.reversal = MarginResidual() if "reversal" in sides else None
        self.margin = MarginResidual(conditional=False) if "margin" in sides else None

    def fit(self, response: Response, sample: Sample) -> ProbeScorer:
        """Learn from clean images."""
        if self.distance is not None:
            self.distance.fit(_beside(response, sample), sample.predicted, sample.idle.shape[1])
        if self.reversal is not None:
            self.reversal.fit(response.margins, sample.idle)
        if self.margin is not None:
            self.margin.fit(response.left, sample.idle)
        return self

    def forward(self, response: Response, sample: Sample) -> Tensor:
        """Distance, then each reversal, then each margin, (N, up to 1 + 2 S), float64."""
        columns = []
        if self.distance is not None:
            columns.append(self.distance(_beside(response, sample), sample.predicted)[:, None])
        if self.reversal is not None:
            columns.append(self.reversal(response.margins, sample.idle))
        if self.margin is not None:
            columns.append(self.margin(response.left, sample.idle))
        return torch.cat(columns, 1)


def _beside(response: Response, sample: Sample) -> Tensor:
    """Effects and idle logits side by side: the distance then depends on whether effects fit the logits."""
    return torch.cat([response.effects, leading_logits(sample.idle).to(response.effects)], 1)


# Standard deviations up to which the deviations of probes that do not lead hardly count.
_ALLOWANCE = 2.0


class Scorer(FittedModule):
    """From responses to scores: a scorer for each probe, their values on clean images, and an attack classifier.

    Args:
        how: see :func:`~ce_plugin.detection.scorers.aggregate`.
        sides: how each probe is scored, in their order; :meth:`fit` takes it from the responses.
        n_features: of the attacked examples that it was fitted to; None where there were none.

    Attributes:
        probes: a :class:`ProbeScorer` for each probe.
        center, spread: mean and standard deviation of each of their scores on clean images that they were not fitted
            on, (D,), float64.
        usual: features of the clean images, each as it is and harmlessly altered, (n, V, P).
        allowance: what is taken from each deviation before it counts, (D,): 0 for probes that lead, else 2.
        attacks: the attack classifier, or None where there were no attacked examples.
    """

    center: Tensor
    spread: Tensor
    usual: Tensor
    allowance: Tensor
    fitted = ("center", "spread", "usual", "allowance")

    def __init__(self, how: str, sides: Sequence[Sequence[str]] = (), n_features: int | None = None) -> None:
        super().__init__()
        self.how = how
        self.probes = nn.ModuleList(map(ProbeScorer, sides))
        self.attacks = None if n_features is None else AttackClassifier(n_features)

    def fit(
        self, clean: Sample, altered: Sample | None, *, seed: int, leading: Collection[str] | None = None
    ) -> Scorer:
        """Learn what clean images are like.

        Centre and spread come from images that the scorers were not fitted on (four folds), for on its own images
        every distance is too small.

        Args:
            clean: clean images.
            altered: harmless alterations of the same images, one each, in the same order, or None.
            seed: of the folds.
            leading: names of the probes that count in full; None: all.
        """
        folds, parts = _folds(len(clean.idle), generator(seed, "folds")), []
        for fold in range(_FOLDS):
            self._fit_probes(clean, altered, (folds != fold).nonzero().squeeze(1))
            parts.append(self._scores(clean.select((folds == fold).nonzero().squeeze(1))))
        unseen = torch.cat(parts)
        self.center, self.spread = unseen.mean(0), unseen.std(0).clamp_min(1e-9)
        self._fit_probes(clean, altered, torch.arange(len(clean.idle)))
        versions = [clean.features()] if altered is None else [clean.features(), altered.features()]
        self.usual = torch.stack(versions, 1)
        allowances = []
        for name, response in clean.responses.items():
            width = ("distance" in response.sides) + response.margins.shape[1] + response.left.shape[1]
            allowances += [0.0 if leading is None or name in leading else _ALLOWANCE] * width
        self.allowance = torch.tensor(allowances, dtype=torch.float64)
        return self

    def with_attacks(self, attacked: Sample, seed: int) -> Scorer:
        """A copy with a classifier that is fitted to these attacked images."""
        again = copy.deepcopy(self)
        features = attacked.features()
        again.attacks = AttackClassifier(features.shape[1]).fit(self.usual, features, seed)
        return again

    def deviations(self, sample: Sample) -> Tensor:
        """Every score of the probes, centred and scaled on clean images, (N, D), float64; the likeness to known attacks
        is the last column.
        """
        sample = sample.cpu()
        deviations = (self._scores(sample) - self.center) / self.spread
        return deviations if self.attacks is None else self.with_likeness(deviations, sample.features())

    def with_likeness(self, deviations: Tensor, features: Tensor) -> Tensor:
        """Deviations with the likeness to known attacks as last column, anew where they have one already."""
        own = deviations[:, : len(self.center)]
        return own if self.attacks is None else torch.cat([own, self.attacks(features)[:, None]], 1)

    def score(self, deviations: Tensor) -> Tensor:
        """The scores (N,), float64."""
        known = deviations.shape[1] - len(self.allowance)
        return aggregate(deviations - F.pad(self.allowance, (0, known)), self.how)

    def _fit_probes(self, clean: Sample, altered: Sample | None, rows: Tensor) -> None:
        sample = clean.select(rows)
        if altered is not None:
            sample = Sample.joined([sample, altered.select(rows)])
        self.probes = nn.ModuleList()
        for response in sample.responses.values():
            self.probes.append(ProbeScorer(response.sides).fit(response, sample))

    def _scores(self, sample: Sample) -> Tensor:
        columns = []
        for scorer, response in zip(self.probes, sample.responses.values(), strict=True):
            columns.append(scorer(response, sample))
        return torch.cat(columns, 1)
