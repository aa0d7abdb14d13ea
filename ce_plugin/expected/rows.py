"""Rows of a table of effects: what one image does under each evidence, which depends on (seed, id) alone."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ce_plugin.attribution._experiment import Given, Ids
from ce_plugin.attribution._explainer import Explainer, as_evidences, as_ids
from ce_plugin.effects import Estimate, Outcome, resolve_outcome
from ce_plugin.effects.outcomes import OutcomeFunction, check_outcome
from ce_plugin.errors import (
    ArgumentError,
    InputError,
    ModelError,
    NoChangeWarning,
    OutcomeError,
    TargetError,
    check_integer,
    expected,
)
from ce_plugin.expected.answer import EXPLAINED
from ce_plugin.interventions import Adversarial
from ce_plugin.networks.forward import is_art_classifier
from ce_plugin.networks.guard import modules_of, state_guard
from ce_plugin.networks.layers import fingerprint

if TYPE_CHECKING:
    import pyarrow as pa

Evidences: TypeAlias = "Given | Mapping[str, Given]"
Classes: TypeAlias = "Literal['explained', 'all'] | Sequence[int]"
Named: TypeAlias = "str | Outcome | OutcomeFunction | None"

# Outcomes that compare classes, beside which the paper's prediction-weighted reduction can be computed.
_OF_CLASSES = ("probability", "log_odds", "margin", "logit")
# Of one output, the value above which the answer is 1, "present".
_OF_ONE_OUTPUT = {"sigmoid": 0.5, "raw": 0.0, "logit": 0.0}
# Images whose outputs are looked at together.
_SEVERAL = 8
_REDUCTION = "prediction_weighted"


class Sample(NamedTuple):
    """One image of a data set.

    Attributes:
        image: as the network takes it, (C, H, W), floating point.
        label: class index, or None.
        path: where it came from; may be empty.
    """

    image: Tensor
    label: int | None = None
    path: str = ""


class SeveralOutcomes:
    """Several outcomes of the same outputs, side by side, so that one run measures all of them.

    Args:
        outcomes: resolved ones.

    Attributes:
        widths: columns of each; known once outputs were measured.
    """

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        self.outcomes = tuple(outcomes)
        self.widths: list[int] = []
        self.looked = False

    def __call__(self, output: Tensor, reference_output: Tensor) -> Tensor:
        if not self.widths:
            for one in self.outcomes:
                check_outcome(one, output, warn=False)
        parts = [one(output, reference_output).reshape(len(output), -1) for one in self.outcomes]
        self.widths = [part.shape[1] for part in parts]
        return torch.cat(parts, 1)


@dataclass(kw_only=True)
class RowMaker:
    """Makes the rows of images: an explainer, the evidences, the outcomes and classes that are kept.

    Args:
        explainer: estimates the effects of a batch of images.
        given: evidence by name.
        outcomes: what is measured; None means the explainer's own and the paper's prediction-weighted reduction.
        classes: "explained": of each image the class that the network answers to it without evidence; "all"; or a list
            of indices.
        keep_images: attacked images are kept with their rows, 8 bits a value; their hashes are in any case.

    Example:
        >>> from ce_plugin import LayerCausalEffect
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> maker = RowMaker(explainer=LayerCausalEffect(net, "1", outcome="log_odds"), given={"clean": None})
        >>> rows = maker.rows([Sample(torch.rand(3), label=1)], ids=[7])
        >>> rows.column_names[:6], rows["effect_log_odds"].type.list_size
        (['id', 'evidence', 'path', 'label', 'explained', 'predicted'], 4)
    """

    explainer: Explainer
    given: Evidences = None
    outcomes: Sequence[Named] | None = None
    classes: Classes = EXPLAINED  # type: ignore[assignment]
    keep_images: bool = True
    about: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.evidences = named_evidences(self.explainer, self.given)
        for given in self.evidences.values():
            as_evidences(given)
        self.measured = SeveralOutcomes(resolved_outcomes(self.explainer.outcome, self.outcomes))
        self.classes = checked_classes(self.classes)
        # Its own copy: the user's explainer keeps its outcome.
        self._several = copy.copy(self.explainer)
        self._several.outcome = Outcome("several", self.measured, per_class=False)

    def rows(self, samples: Sequence[Sample], ids: Sequence[int]) -> pa.Table:
        """The rows of some images, one for each image and evidence.

        Args:
            samples: the images, equal in shape.
            ids: their ids in the data set.

        Raises:
            InputError: images of different shapes, or that are no tensors; a label that the network does not know.
        """
        import pyarrow as pa

        names = checked_ids(ids, len(samples))
        x = _batch(samples).to(_device(self.explainer))
        self._look(x)
        found: dict[str, tuple[Estimate, Tensor | None]] = {}
        for name, given in self.evidences.items():
            found[name] = self._estimate(x, given, names)
        explained = self._explained(x, found)
        parts = [self._part(samples, names, name, *found[name], explained=explained) for name in self.evidences]
        return pa.concat_tables(parts)

    def _look(self, x: Tensor) -> None:
        """Warn once where outputs already are probabilities; a few images do not tell."""
        if self.measured.looked or len(x) < _SEVERAL:
            return
        self.measured.looked = True
        with torch.no_grad(), state_guard(networks=self.explainer.forward.modules):
            heads = self.explainer.forward((x,))
        for head in heads.values():
            for one in self.measured.outcomes:
                check_outcome(one, head)

    def _estimate(self, x: Tensor, given: Given, ids: tuple[int, ...]) -> tuple[Estimate, Tensor | None]:
        """The estimate under one evidence, and the attacked images where it is an attack, (N, C, H, W), uint8."""
        levels = None
        if isinstance(given, Adversarial):
            x, levels = _attacked(given, x, ids, self.explainer.seed)
            given = None
        return estimated(self._several, x, given=given, ids=ids), levels

    def _explained(self, x: Tensor, found: dict[str, tuple[Estimate, Tensor | None]]) -> Tensor:
        """The class that the network answers to each image without evidence, (N,)."""
        for name, given in self.evidences.items():
            if given is None and (answers := self._answers(found[name][0])) is not None:
                return answers
        with torch.no_grad(), state_guard(networks=self.explainer.forward.modules):
            (head,) = self.explainer.forward((x,)).values()
        return _argmax(head.reshape(len(x), -1)).cpu()

    def _answers(self, estimate: Estimate) -> Tensor | None:
        """The class that the network answers under the estimate's evidence, (N,); None where outcomes do not say."""
        if estimate.predicted is not None:
            return estimate.predicted.cpu()
        first, width = self.measured.outcomes[0].name, self.measured.widths[0]
        if width != 1 or first not in _OF_ONE_OUTPUT:
            return None
        return _argmax(estimate.reference[:, :1] - _OF_ONE_OUTPUT[first]).cpu()

    def _part(
        self,
        samples: Sequence[Sample],
        ids: tuple[int, ...],
        name: str,
        estimate: Estimate,
        levels: Tensor | None,
        explained: Tensor,
    ) -> pa.Table:
        """The rows under one evidence."""
        import pyarrow as pa

        n, answers = len(ids), self._answers(estimate)
        labels = [None if sample.label is None else int(sample.label) for sample in samples]
        columns: dict[str, Any] = {
            "id": pa.array(ids, pa.int64()),
            "evidence": pa.array([name] * n),
            "path": pa.array([sample.path for sample in samples], pa.string()),
            "label": pa.array(labels, pa.int64()),
            "explained": pa.array(explained.tolist(), pa.int32()),
            "predicted": pa.array((explained if answers is None else answers).tolist(), pa.int32()),
        }
        check_units(estimate)
        parts = {"effect": estimate.effect, "outcome": estimate.reference[:, None]}
        if estimate.insertion_effect is not None:
            parts["insertion"] = estimate.insertion_effect[:, None]
        for kind, values in parts.items():
            own = torch.split(values, self.measured.widths, dim=2)
            for outcome, some in zip(self.measured.outcomes, own, strict=True):
                # What is not kept is not copied: of 1,000 classes that would take a tenth of the time.
                columns[f"{kind}_{outcome.name}"] = _lists(self._kept(outcome, some, explained))
        images: list[bytes] | list[None] = [None] * n if levels is None else [one.numpy().tobytes() for one in levels]
        hashes = [None if one is None else hashlib.sha256(one).hexdigest() for one in images]
        columns["image_sha256"] = pa.array(hashes, pa.string())
        columns["image"] = pa.array(images if self.keep_images else [None] * n, pa.binary())
        self._remember(estimate, labels)
        return pa.table(columns)

    def _kept(self, outcome: Outcome, values: Tensor, explained: Tensor) -> Tensor:
        """Of all columns (N, S, C) those of the classes that are kept."""
        classes = values.shape[2]
        if not outcome.per_class or classes == 1 or self.classes == "all":
            return values
        if self.classes == EXPLAINED:
            explained = explained.to(values.device)
            return values.gather(2, explained.reshape(-1, 1, 1).expand(-1, values.shape[1], 1))
        wanted = [int(c) for c in self.classes]
        if max(wanted) >= classes:
            raise TargetError(expected("classes", f"class indices below {classes}", max(wanted)))
        return values[:, :, wanted]

    def _remember(self, estimate: Estimate, labels: list[int | None]) -> None:
        """What the table says about itself, from the first rows; labels are checked in all."""
        widths = zip(self.measured.outcomes, self.measured.widths, strict=True)
        n_classes = max((width for one, width in widths if one.per_class), default=0)
        wrong = [label for label in labels if label is not None and not 0 <= label < max(n_classes, 2)]
        if n_classes and wrong:
            hint = "The labels must be indices of the network's outputs."
            raise InputError(expected("data", f"labels from 0 to {max(n_classes, 2) - 1}", wrong[0], hint))
        if not self.about:
            self.about = {
                "design": estimate.design,
                "intervention": estimate.intervention,
                "site": estimate.site,
                "unit_labels": estimate.labels_of(0),
                "n_classes": n_classes,
                "per_class": {one.name: one.per_class for one in self.measured.outcomes},
                "insertion": estimate.insertion_effect is not None,
            }

    def networks(self) -> list[nn.Module]:
        """The networks of explainer and evidence."""
        things = (self.explainer.forward.forward_func, self._autoencoder, *self.evidences.values())
        return [network for thing in things for network in modules_of(thing)]

    def to(self, device: str) -> None:
        """Move the networks of explainer and evidence."""
        for network in self.networks():
            network.to(device)

    @property
    def _autoencoder(self) -> object:
        return getattr(self.explainer, "autoencoder", None)

    def configuration(self, data: str) -> dict[str, Any]:
        """What rows depend on, JSON-able; rows were made before.

        Args:
            data: the fingerprint of the data set.
        """
        shown = {
            name: "none" if one is None else ", ".join(map(repr, as_evidences(one)))
            for name, one in self.evidences.items()
        }
        return {
            "explainer": type(self.explainer).__name__,
            **{name: self.about[name] for name in ("site", "intervention", "design")},
            "given": shown,
            "outcomes": [one.name for one in self.measured.outcomes],
            "classes": self.classes if isinstance(self.classes, str) else list(self.classes),
            "keep_images": self.keep_images,
            "seed": self.explainer.seed,
            "network": _fingerprint([self.explainer.forward.forward_func, self._autoencoder]),
            "values": _fingerprint([self.explainer.intervention, *self.evidences.values()]),
            "data": data,
        }


def named_evidences(explainer: object, given: Evidences) -> dict[str, Given]:
    """Evidence by name; a single one is called "clean" where it is None, else "given".

    Raises:
        ArgumentError: no explainer, or no evidence.
    """
    if not isinstance(explainer, Explainer):
        wanted, hint = "an explainer such as LayerCausalEffect(model, layer)", "Pass the explainer, not the network."
        raise ArgumentError(expected("explainer", wanted, type(explainer).__name__, hint))
    if not isinstance(given, Mapping):
        return {"clean" if given is None else "given": given}
    if not given or not all(isinstance(name, str) and name for name in given):
        hint = 'Write {"clean": None, "FGSM": Adversarial.fgsm(model)}.'
        raise ArgumentError(expected("given", "evidence by name, one or more", repr(given), hint))
    return dict(given)


def checked_ids(ids: Ids, n: int) -> tuple[int, ...]:
    """One id for each image, each once.

    Raises:
        InputError: there are none, too few or too many, or one comes twice.
    """
    if ids is None:
        hint = "Pass the images' indices in the data set: what is random is drawn from them."
        raise InputError(expected("ids", "one integer per image", None, hint))
    names = as_ids(ids, n)
    if len(set(names)) < n:
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(expected("ids", "each image once", f"{twice} several times"))
    return names


def estimated(explainer: Explainer, x: Any, **options: Any) -> Estimate:
    """The estimate of a model with one head.

    That nothing changes in some images is no reason for a warning; :func:`answered` warns where it is so in all.

    Raises:
        ModelError: there are several heads.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoChangeWarning)
        estimate = explainer.estimate(x, **options)
    if isinstance(estimate, dict):
        hint = "Name one with `output=` in the explainer."
        raise ModelError(expected("explainer", "one of a model with one output head", sorted(estimate), hint))
    found: Estimate = estimate
    return found


def series_extras(estimate: Estimate) -> int:
    """How many series beside the units an estimate has."""
    return 1 if estimate.insertion_effect is None else 2


def check_units(estimate: Estimate) -> None:
    """That all images have the same units.

    Raises:
        InputError: they have not.
    """
    labels = estimate.unit_labels
    if bool((estimate.n_units != estimate.effect.shape[1]).any()) or (labels and isinstance(labels[0], list)):
        hint = "Without `feature_mask` all images have the same grid."
        raise InputError(expected("x", "images with the same units", "units that differ", hint))


def series_of(estimate: Estimate) -> Tensor:
    """Effects, then the outcome of the reference, then the insertion effect where there is one: (N, S, C).

    Raises:
        InputError: images with other units than the first.
    """
    check_units(estimate)
    extras = [estimate.reference] + ([] if estimate.insertion_effect is None else [estimate.insertion_effect])
    return torch.cat([estimate.effect, torch.stack(extras, 1)], 1)


def resolved_outcomes(own: Outcome, outcomes: Sequence[Named] | None) -> list[Outcome]:
    """The outcomes of a table, in order.

    Raises:
        OutcomeError: none, or two of the same name.
    """
    if outcomes is None:
        reduction = [resolve_outcome(_REDUCTION)] if own.name in _OF_CLASSES else []
        return [own, *reduction]
    several = [outcomes] if isinstance(outcomes, str) or not isinstance(outcomes, Iterable) else list(outcomes)
    found = [resolve_outcome(one) for one in several]
    names = [one.name for one in found]
    if not names or len(set(names)) < len(names):
        raise OutcomeError(expected("outcomes", "one outcome or more, of different names", names))
    return found


def checked_classes(classes: object) -> Any:
    """The classes that are kept: "explained", "all" or a tuple of indices.

    Raises:
        ArgumentError: anything else.
    """
    if isinstance(classes, str) and classes in (EXPLAINED, "all"):
        return classes
    wanted = "'explained', 'all', or class indices"
    if isinstance(classes, str) or not isinstance(classes, Iterable):
        raise ArgumentError(expected("classes", wanted, repr(classes)))
    found = tuple(check_integer("classes", one, wanted, least=0) for one in classes)
    if not found or len(set(found)) < len(found):
        raise ArgumentError(expected("classes", wanted + ", each once", repr(classes)))
    return found


def _batch(samples: Sequence[Sample]) -> Tensor:
    """The images as one batch.

    Raises:
        InputError: they are no tensors of one shape.
    """
    images: list[Tensor] = []
    for sample in samples:
        image: object = sample.image
        where = f" ({sample.path})" if sample.path else ""
        if not isinstance(image, Tensor) or not image.is_floating_point():
            kind = f"{image.dtype} tensors" if isinstance(image, Tensor) else type(image).__name__
            hint = "Give the data set a transform that makes what the network takes: transform=ToTensor(), for example."
            raise InputError(expected("data", "images as floating-point tensors", f"{kind}{where}", hint))
        if images and image.shape != images[0].shape:
            got = f"{tuple(images[0].shape)} and {tuple(image.shape)}{where}"
            raise InputError(expected("data", "images of one shape", got, "Resize or crop them in its transform."))
        images.append(image)
    return torch.stack(images)


def _argmax(output: Tensor) -> Tensor:
    """The class of the largest of several outputs; of a single one whether it is positive."""
    return output.argmax(1) if output.shape[1] > 1 else (output[:, 0] > 0).long()


def _device(explainer: Explainer) -> torch.device:
    first = next((p for network in explainer.forward.modules for p in network.parameters()), None)
    return torch.device("cpu") if first is None else first.device


def _attacked(attack: Adversarial, x: Tensor, ids: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """The attacked images in the 256 levels of an image file: as the network takes them, and as those levels."""
    image = attack.normalization.to_image(attack.perturb(x, ids=ids, seed=seed))
    low, high = attack.clip_values
    levels = ((image - low) / (high - low) * 255.0).round().clamp(0, 255)
    return attack.normalization.to_model(levels / 255.0 * (high - low) + low), levels.to(torch.uint8).cpu()


def _lists(values: Tensor) -> pa.Array:
    """Rows (N, ...) as an Arrow array of lists of one length, float32."""
    import pyarrow as pa

    flat = values.float().cpu().reshape(len(values), -1).contiguous()
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1).numpy(), pa.float32()), flat.shape[1])


def _fingerprint(things: Iterable[object]) -> str:
    """A digest of the networks and tensors that things hold."""
    digest = hashlib.blake2b(digest_size=8)
    for thing in things:
        if thing is None:
            continue
        if is_art_classifier(thing):
            thing = thing.model  # type: ignore[attr-defined]
        for network in modules_of(thing):
            digest.update(fingerprint(network).encode())
        for leaf in tree_leaves(getattr(thing, "__dict__", {})):
            if isinstance(leaf, Tensor) and not isinstance(thing, nn.Module):
                digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
