"""The page of concepts: what they look like and do, and how far their autoencoder can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ce_plugin.attribution import ConceptCausalEffect
from ce_plugin.concepts import ConceptAutoencoder, ConceptReport, Fidelity, examine, measure_fidelity
from ce_plugin.errors import ModelError, expected
from ce_plugin.files import table_files
from ce_plugin.models import VisionModel
from ce_plugin.networks.forward import double
from ce_plugin.report.photograph import OUTCOMES
from ce_plugin.report.sections import Section, cell, digits, save_page
from ce_plugin.visualization import spotlight

_BATCH = 8


class Pictures(Protocol):
    """Pictures as the network takes them, (C, H, W) each, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor: ...


@dataclass(frozen=True)
class Example:
    """A picture that activates a concept.

    Attributes:
        name: of the picture.
        picture: (C, H, W), values in [0, 1].
        box: region round the peak, (left, top, right, bottom) in pixels.
        peak: the code's greatest value.
        answer: what the network says.
        contribution: of the concept to that answer, minus its effect.
        insertion: effect of inserting the autoencoder on that answer.
    """

    name: str
    picture: Tensor
    box: tuple[int, int, int, int]
    peak: float
    answer: str
    contribution: float
    insertion: float


@dataclass(frozen=True)
class Concept:
    """One concept.

    Attributes:
        number: in the code.
        dead: never active, or without effect on the reconstruction.
        duplicates: numbers of the concepts that say the same.
        mean_activation: over all positions of all pictures.
        share_active: share of the pictures in which it is active.
        classes: (class, mean contribution over all pictures), the most supported first, the most opposed last.
        examples: the pictures that activate it most.
    """

    number: int
    dead: bool
    duplicates: tuple[int, ...]
    mean_activation: float
    share_active: float
    classes: tuple[tuple[str, float], ...]
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class ConceptStudy:
    """All concepts of an autoencoder on a set of pictures.

    Attributes:
        layer: of the network.
        concepts: those with the strongest mean effects first, dead ones last.
        report: what :func:`ce_plugin.concepts.examine` found.
        fidelity: on these pictures.
        trained_fidelity: on the pictures that were held out in training.
        insertion: mean absolute effect of inserting the autoencoder on the network's own answers.
        effects: mean contributions over all pictures, (K, C).
    """

    layer: str
    concepts: tuple[Concept, ...]
    report: ConceptReport
    fidelity: Fidelity
    trained_fidelity: Fidelity | None
    insertion: float
    effects: Tensor


def concept_study(
    net: VisionModel,
    autoencoder: ConceptAutoencoder,
    images: Pictures,
    names: Sequence[str],
    *,
    top: int = 5,
    outcome: str = "log_odds",
    min_fidelity: float = 0.9,
    show_progress: bool = False,
) -> ConceptStudy:
    """Look at every concept.

    Args:
        net: the network that the autoencoder was trained for.
        autoencoder: as :meth:`ConceptAutoencoder.load` returns it.
        images: as the network takes them, each read when it is needed.
        names: of the pictures.
        top: examples of each concept.
        outcome: what is measured, one number per class.
        min_fidelity: see :class:`ce_plugin.ConceptCausalEffect`.
        show_progress: a bar over the pictures.

    Raises:
        ModelError: the autoencoder is for another layer or network, or below ``min_fidelity``.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        >>> from ce_plugin.concepts import train_autoencoder
        >>> images = torch.rand(6, 3, 8, 8)
        >>> autoencoder = train_autoencoder(model, "1", images, concepts=2, epochs=1)
        >>> found = concept_study(VisionModel(model), autoencoder, images, list("abcdef"), top=2, min_fidelity=0)
        >>> len(found.concepts), found.effects.shape
        (2, torch.Size([2, 2]))
    """
    layer = autoencoder.layer_name
    if not layer:
        raise ModelError(expected("autoencoder", "one that was trained for a layer", "an untrained one"))
    # Made first: it refuses an autoencoder that does not belong here or changes too much, before any work.
    explainer = ConceptCausalEffect(net.model, layer, autoencoder, outcome=outcome, min_fidelity=min_fidelity)
    fidelity = measure_fidelity(net.model, layer, autoencoder, images, batch_size=_BATCH)  # type: ignore[arg-type]
    report = examine(autoencoder, net.model, layer, images, top=top, batch_size=_BATCH)  # type: ignore[arg-type]
    effects, own, insertion, answers = _effects(explainer, images, show_progress)
    order = effects.abs().amax(1).masked_fill(report.dead, -1.0).argsort(descending=True, stable=True).tolist()
    twins = {k: [b if a == k else a for a, b, *_ in report.duplicates if k in (a, b)] for k in order}

    def example(concept: int, place: int) -> Example:
        number = int(report.examples[concept, place])
        box = [int(v) for v in report.boxes[concept, place]]
        return Example(
            name=names[number],
            picture=net.pictures(images[number][None])[0],
            box=(box[0], box[1], box[2], box[3]),
            peak=float(report.peaks[concept, place]),
            answer=net.class_name(answers[number]),
            contribution=float(own[number, concept]),
            insertion=float(insertion[number]),
        )

    concepts = tuple(
        Concept(
            number=k,
            dead=bool(report.dead[k]),
            duplicates=tuple(twins[k]),
            mean_activation=float(report.mean_activation[k]),
            share_active=float(report.share_active[k]),
            classes=_strongest(net, effects[k]),
            examples=tuple(example(k, t) for t in range(report.examples.shape[1]) if int(report.examples[k, t]) >= 0),
        )
        for k in order
    )
    mean_insertion = float(insertion.abs().mean())
    return ConceptStudy(layer, concepts, report, fidelity, autoencoder.fidelity, mean_insertion, effects)


def _effects(
    explainer: ConceptCausalEffect, images: Pictures, show_progress: bool
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Mean contributions (K, C); each picture's to its own answer, (N, K); its insertion effect (N,); the answers."""
    from tqdm import tqdm

    total: Tensor | None = None
    own, insertion, answers = [], [], list[int]()
    with tqdm(total=len(images), desc="effects", unit="image", disable=not show_progress, leave=False) as bar:
        for start in range(0, len(images), _BATCH):
            batch = torch.stack([images[i] for i in range(start, min(start + _BATCH, len(images)))])
            found = explainer.estimate(batch)
            contribution = double(found.contribution)
            total = contribution.sum(0) if total is None else total + contribution.sum(0)
            with torch.no_grad():
                best = explainer.forward.forward_func(batch).argmax(1).cpu()
            rows = torch.arange(len(best))
            own.append(contribution[rows, :, best])
            if found.insertion_effect is not None:  # concepts have one
                insertion.append(double(found.insertion_effect)[rows, best])
            answers += best.tolist()
            bar.update(len(batch))
    mean = torch.zeros(0, 0) if total is None else total / len(images)
    return mean, torch.cat(own), torch.cat(insertion), answers


def _strongest(net: VisionModel, contributions: Tensor, each: int = 3) -> tuple[tuple[str, float], ...]:
    """The classes that a concept supports most, and those that it opposes most."""
    order = contributions.argsort(descending=True, stable=True).tolist()
    chosen = order if len(order) <= 2 * each else [*order[:each], *order[-each:]]
    return tuple((net.class_name(c), float(contributions[c])) for c in chosen)


class ConceptsSection(Section[ConceptStudy]):
    """The concepts of a layer: contributions to classes, and the pictures that activate each most."""

    name, template = "concepts", "concepts.html.j2"

    def __init__(self, outcome: str) -> None:
        self.outcome = OUTCOMES[outcome]

    def record(self, found: ConceptStudy) -> dict[str, Any]:
        """Fidelity, and what each concept does."""
        return {
            "layer": found.layer,
            "fidelity_on_these_pictures": found.fidelity.to_dict(),
            "fidelity_in_training": None if found.trained_fidelity is None else found.trained_fidelity.to_dict(),
            "mean_absolute_insertion_effect": found.insertion,
            "dead": [concept.number for concept in found.concepts if concept.dead],
            "duplicates": [list(pair) for pair in found.report.duplicates],
            "concepts": [
                {
                    "concept": concept.number,
                    "share_active": concept.share_active,
                    "mean_contributions": dict(concept.classes),
                    "examples": [example.name for example in concept.examples],
                }
                for concept in found.concepts
            ],
        }

    def render(self, found: ConceptStudy) -> dict[str, Any]:
        """A card for each concept that is not dead."""
        return {
            "found": found,
            "outcome": self.outcome,
            "dead": [concept.number for concept in found.concepts if concept.dead],
            "concepts": [
                {
                    "concept": concept,
                    "greatest": max((abs(value) for _, value in concept.classes), default=0.0),
                    "examples": [self._example(example, concept.number) for example in concept.examples],
                }
                for concept in found.concepts
                if not concept.dead
            ],
        }

    def _example(self, example: Example, number: int) -> dict[str, Any]:
        return cell(
            example.name,
            f"{example.name}, where concept {number} is most active",
            spotlight(example.picture, example.box),
            caption=f"activity {example.peak:.2g}; the network says “{example.answer}”: the concept adds "
            f"{digits(example.contribution)} {self.outcome}, the autoencoder itself {digits(example.insertion)}",
        )


def save_concepts(
    study: ConceptStudy,
    out: str | Path,
    *,
    model: str,
    outcome: str,
    manifest: Mapping[str, Any],
    tables: str = "csv",
) -> Path:
    """Write ``concepts.html``, ``concepts.csv`` and ``manifest.json``; each appears only when it is complete.

    Args:
        study: what was found.
        out: the folder, which :func:`~ce_plugin.report.check_out` has allowed.
        model: the network's name.
        outcome: what was measured.
        manifest: see :func:`~ce_plugin.report.build_manifest`; the findings are added to it.
        tables: suffix of the table, see :func:`ce_plugin.files.table_files`.

    Returns:
        Path of the page.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from ce_plugin.concepts import ConceptReport, Fidelity
        >>> from ce_plugin.report import build_manifest
        >>> none, numbers = torch.zeros(0), torch.zeros(0, 1, dtype=torch.long)
        >>> report = ConceptReport(none, none, none, none, (), numbers, none, none, none, n_images=4)
        >>> study = ConceptStudy("features.9", (), report, Fidelity(1.0, 0.0, 0.0, 4), None, 0.0, none)
        >>> manifest = build_manifest(arguments={}, command=[], seed=0, inputs={}, model=torch.nn.Linear(1, 1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_concepts(study, folder, model="net", outcome="logit", manifest=manifest).name
        'concepts.html'
    """
    files = table_files({"concepts": study.report.to_dataframe()}, tables)
    return save_page(ConceptsSection(outcome), study, out, manifest, files, model=model)
