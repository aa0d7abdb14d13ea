"""``ce-plugin experiment``: a recipe from its data to a table of numbers with intervals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy.stats import beta
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ce_plugin.attribution import ConceptCausalEffect, LayerCausalEffect
from ce_plugin.cli._commands import ExperimentOptions
from ce_plugin.cli._expected import Prepared
from ce_plugin.cli._recipe import EvidenceSpec, Recipe, SiteSpec, Training, packaged, read_recipe, recipe_file
from ce_plugin.cli._session import say
from ce_plugin.concepts import ConceptAutoencoder, train_autoencoder
from ce_plugin.datasets import (
    FASHION_CLASSES,
    DatasetImages,
    ImageSource,
    cub200,
    fashion_mnist,
    imagenet_samples,
    labels_for,
    matched_classes,
    open_source,
    pneumonia_xrays,
)
from ce_plugin.designs import RandomMask
from ce_plugin.errors import ArgumentError, FileError, ModelError, expected
from ce_plugin.expected import EffectTable, RayCluster
from ce_plugin.expected import run as run_over
from ce_plugin.expected.table import differences
from ce_plugin.files import write_files, written_whole
from ce_plugin.interventions import PixelMask
from ce_plugin.models import Framing, VisionModel, load_model, load_weights, train_classifier
from ce_plugin.networks import state_guard
from ce_plugin.networks.layers import find_layer
from ce_plugin.randomness import derived_seed, generator
from ce_plugin.report import Plan, build_manifest, planned_attack
from ce_plugin.report.experiment import LEAST_OF_HALVES, ExperimentStudy, save_experiment
from ce_plugin.sites import Evidence

_RECIPE, _NETWORK = "recipe.json", "network.pt"
# Random masks of each image.
_MASKS = 2


def run(options: ExperimentOptions, argv: Sequence[str]) -> dict[str, str]:
    """Run a recipe, list them, or print one; returns the images that could not be read, and why."""
    if options.list:
        for name, file in packaged().items():
            say(f"{name}: {read_recipe(file).title}")
        return {}
    if options.recipe is None:
        hint = f"There are {', '.join(packaged())}; or write ./mine.toml."
        raise ArgumentError(expected("recipe", "a name or a file", "nothing", hint))
    file = recipe_file(options.recipe)
    if options.print:
        say(file.read_text(encoding="utf-8").rstrip())
        return {}
    recipe = read_recipe(file)
    if options.images is not None:
        recipe = replace(recipe, data=replace(recipe.data, images=options.images))
    if options.weights is not None:
        recipe = replace(recipe, network=replace(recipe.network, weights=options.weights))
    return Experiment(recipe, options, argv).run()


@dataclass
class Experiment:
    """A recipe that is run in a folder.

    Args:
        recipe: what is run.
        options: where, with which data.
        argv: the words of the command.
    """

    recipe: Recipe
    options: ExperimentOptions
    argv: Sequence[str]

    def run(self) -> dict[str, str]:
        """From the data to the page; what is there already is not done again."""
        recipe, out = self.recipe, self.options.out
        source = source_of(recipe.data.source, self.options.data)
        training = recipe.network.training
        train_source = None if training is None else source_of(training.source, self.options.data)
        named = recipe.autoencoder.source
        code_source = source_of(named, self.options.data) if named else train_source
        net = _network(recipe, self.options.data)
        self._check_sites(net)
        data = self._prepared(net, source, matched=recipe.data.matched)
        if recipe.questions.largest and (n := len(self._ids(data))) < LEAST_OF_HALVES:
            hint = "Take more, or leave out questions.largest."
            raise ArgumentError(expected("images", f"{LEAST_OF_HALVES} or more, for two halves", n, hint))
        self._claim()
        facts: dict[str, str] = {}
        if training is not None and train_source is not None:
            self._train(net, train_source, training)
        facts["Network"] = f"{recipe.network.model}{self._accuracy(net, data)}"
        tables: dict[str, EffectTable] = {}
        skipped: dict[str, str] = {}
        for site in recipe.sites:
            autoencoder = None
            if site.concepts and code_source is not None:
                autoencoder = self._autoencoder(net, site, self._prepared(net, code_source))
                facts[f"Autoencoder of {site.name}"] = str(autoencoder.fidelity)
            tables[site.name] = self._table(net, data, site, autoencoder)
            skipped |= {source.paths[i]: why for i, why in tables[site.name].skipped.items()}
        # An earlier call may have had more of them.
        fewest, most = min(map(len, tables.values())), max(map(len, tables.values()))
        seen = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
        facts = {"Images": f"{seen} of {source.fingerprint}{self._unknown(data)}", **facts}
        page = self._save(net, source, tables, facts, skipped)
        say((out / "experiment.md").read_text(encoding="utf-8"), quiet=self.options.quiet)
        say(f"Page: {page.absolute()}")
        return skipped

    def _claim(self) -> None:
        """The folder is this recipe's: new, emptied, or of the same recipe, but for what is asked at the end."""
        out = self.options.out
        file = out / _RECIPE
        if self.options.force and not self.options.resume:
            shutil.rmtree(out / "tables", ignore_errors=True)
            for old in (file, out / _NETWORK, *out.glob("autoencoder-*.pt")):
                old.unlink(missing_ok=True)
        mine = _remembered(self.recipe)
        if file.exists():
            try:
                there = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise FileError(expected("out", "the folder of an experiment", f"{str(file)!r} ({error})")) from error
            differs = differences(there, mine)
            if differs:
                hint = "Choose another folder, or start anew with --force."
                raise FileError(expected("out", "of the same recipe", f"{str(out)!r}: {'; '.join(differs)}", hint))
        write_files(out, {_RECIPE: mine})

    def _check_sites(self, net: VisionModel) -> None:
        """Layers and nodes are there, before anything is trained."""
        black = net.inputs([torch.zeros(3, net.framing.size, net.framing.size, dtype=torch.uint8)])
        for site in self.recipe.sites:
            _, layer = find_layer(net.model, site.layer)
            held: list[Tensor] = []
            handle = layer.register_forward_hook(lambda _m, _i, value, held=held: held.append(value))
            try:
                with torch.no_grad(), state_guard(net.model):
                    net.model(black)
            finally:
                handle.remove()
            channels = held[0].shape[1] if held and isinstance(held[0], Tensor) and held[0].dim() > 1 else 0
            units = site.concepts or channels
            wrong = [node for node in site.nodes if node >= units]
            if wrong or (site.concepts and site.concepts >= channels):
                got = f"{wrong or site.concepts} at {site.layer}, which has {channels} channels"
                raise ArgumentError(expected("sites", f"nodes below {units}, codes below the layer's channels", got))

    def _prepared(self, net: VisionModel, source: ImageSource, matched: bool = False) -> Prepared:
        """Images as the network takes them, with labels as its classes; of classes that it does not know, with none."""
        labels: Sequence[int | None] | None
        if matched:
            if source.labels is None or source.class_names is None:
                raise ArgumentError(expected("data.matched", "false for images without classes", "true"))
            known = matched_classes(source.class_names, net.class_names or ())
            labels = [known.get(label) for label in source.labels]
        else:
            labels = labels_for(source, net.class_names, _n_outputs(net))
        return Prepared(source, replace(net, model=nn.Identity()), labels)

    def _ids(self, data: Prepared) -> list[int]:
        """Which images: all, or the first of a random order, so that a few are of all classes."""
        order = torch.randperm(len(data), generator=generator(self.recipe.seed, "experiment images")).tolist()
        if self.recipe.data.matched and data.labels is not None:
            order = [i for i in order if data.labels[i] is not None]
        return sorted(order[: self.recipe.data.images or None])

    def _unknown(self, data: Prepared) -> str:
        """How many images were left out for their class, in words."""
        if not self.recipe.data.matched or data.labels is None or data.source.labels is None:
            return ""
        pairs = list(zip(data.labels, data.source.labels, strict=True))
        known, unknown = ({own for label, own in pairs if (label is None) is out} for out in (False, True))
        images = sum(label is None for label, _ in pairs)
        return (
            f"; {len(known)} of {len(known) + len(unknown)} classes are the network's, and {images:,} images of the "
            "others are left out"
        )

    def _train(self, net: VisionModel, source: ImageSource, training: Training) -> None:
        """Train the network, or read it where that was done."""
        file = self.options.out / _NETWORK
        if not file.exists():
            images, labels = _stacked(self._prepared(net, source), training.images)
            if labels is None:
                raise ArgumentError(expected("network.training.source", "images with labels", "some without"))
            train_classifier(
                net.model.requires_grad_(True),
                images,
                labels,
                epochs=training.epochs,
                lr=training.rate,
                batch_size=training.batch_size,
                seed=self.recipe.seed,
                show_progress=not self.options.quiet,
            )
            with written_whole(file) as stream:
                torch.save(net.model.state_dict(), stream)
        load_weights(net.model, file)
        net.model.eval().requires_grad_(False)

    def _accuracy(self, net: VisionModel, data: Prepared) -> str:
        """Accuracy on the experiment's images, in words; refused where the recipe asks for more."""
        right = n = 0
        ids = self._ids(data)
        for first in range(0, len(ids), 256):
            # As the run has it: what cannot be read is left out, and said there.
            samples = [sample for i in ids[first : first + 256] if (sample := _readable(data, i)) is not None]
            known = [sample for sample in samples if sample.label is not None]
            if not known:
                continue
            with torch.no_grad():
                output = net.model(torch.stack([sample.image for sample in known]).to(net.device)).cpu()
            answer = output.argmax(1) if output.shape[1] > 1 else (output[:, 0] > 0).long()
            right += int((answer == torch.tensor([sample.label for sample in known])).sum())
            n += len(known)
        if not n:
            return ""
        low = float(beta.ppf(0.025, right, n - right + 1)) if right else 0.0
        high = float(beta.ppf(0.975, right + 1, n - right)) if right < n else 1.0
        least = 0.0 if self.recipe.network.training is None else self.recipe.network.training.least_accuracy
        said = f"{right / n:.2%} of {n:,} images right (95 % interval {low:.2%} to {high:.2%})"
        # A few images cannot show that a network is too bad.
        if high < least:
            hint = "Train it longer, or lower network.training.least_accuracy."
            raise ModelError(expected("network", f"one that answers at least {least:.1%} right", said, hint))
        return f", {said}"

    def _autoencoder(self, net: VisionModel, site: SiteSpec, data: Prepared) -> ConceptAutoencoder:
        """The autoencoder of a site, trained or read."""
        spec, out = self.recipe.autoencoder, self.options.out
        file = out / f"autoencoder-{site.layer}-{site.concepts}.pt"
        if file.exists():
            return ConceptAutoencoder.load(file)
        images, _ = _stacked(data, spec.images)
        made = train_autoencoder(
            net.model,
            site.layer,
            images,
            site.concepts,
            kernel_size=spec.kernel_size,
            epochs=spec.epochs,
            checkpoint=out / f"{file.name}.checkpoint",
            seed=self.recipe.seed,
            outcome="sigmoid" if _n_outputs(net) == 1 else "probability",
            show_progress=not self.options.quiet,
        )
        made.save(file)
        (out / f"{file.name}.checkpoint").unlink(missing_ok=True)
        return made

    def _table(
        self, net: VisionModel, data: Prepared, site: SiteSpec, autoencoder: ConceptAutoencoder | None
    ) -> EffectTable:
        """The effects of a site, written or gone on with."""
        recipe, asked = self.recipe, self.recipe.questions
        outcomes = list(asked.outcomes)
        if asked.detector and "probability" not in outcomes:
            outcomes.append("probability")
        shared: dict[str, Any] = {"outcome": outcomes[0], "seed": recipe.seed}
        explainer: LayerCausalEffect
        if autoencoder is None:
            explainer = LayerCausalEffect(net.model, site.layer, **shared)
        else:
            least = recipe.autoencoder.least_fidelity
            explainer = ConceptCausalEffect(net.model, site.layer, autoencoder, min_fidelity=least, **shared)
        say(f"{site.name}: {len(self._ids(data)):,} images", quiet=self.options.quiet)
        return run_over(
            explainer,
            data,
            self.options.out / "tables" / site.name.replace(", ", "-").replace(" ", "-"),
            given={name: _evidence(one, net, recipe) for name, one in recipe.evidences.items()},
            outcomes=outcomes,
            classes="all" if asked.detector else "explained",
            ids=self._ids(data),
            batch_size=recipe.batch_size,
            keep_images=False,
            resume=True,
            show_progress=not self.options.quiet,
            cluster=RayCluster(self.options.workers) if self.options.engine == "ray" else None,
        )

    def _save(
        self,
        net: VisionModel,
        source: ImageSource,
        tables: dict[str, EffectTable],
        facts: dict[str, str],
        skipped: dict[str, str],
    ) -> Path:
        """Tables and page."""
        recipe, asked = self.recipe, self.recipe.questions
        plain = next((site.name for site in recipe.sites if not site.concepts), "") if asked.detector else ""
        study = ExperimentStudy(
            recipe.title,
            recipe.about,
            tables,
            {site.name: site.nodes for site in recipe.sites},
            facts,
            asked.outcomes,
            asked.readings,
            asked.level,
            asked.fdr,
            plain,
            [name for name, one in recipe.evidences.items() if one.attack],
            recipe.seed,
            asked.largest,
        )
        manifest = build_manifest(
            arguments={"recipe": asdict(recipe)},
            command=["ce-plugin", *self.argv],
            seed=recipe.seed,
            inputs={recipe.data.source: source.fingerprint, "unreadable": skipped},
            model=net.model,
        )
        return save_experiment(study, self.options.out, manifest=manifest, tables=self.options.tables)


def source_of(name: str, root: Path) -> ImageSource:
    """A data set of a recipe.

    Args:
        name: one of ours (``fashion-mnist:test``), or what :func:`~ce_plugin.datasets.open_source` takes.
        root: folder of data sets: for ours a folder of their name in it, or torchvision's.

    Raises:
        FileError: it is not there; the message says what to put where.
    """
    kind, _, split = name.partition(":")
    if kind in _OWN:
        try:
            return _OWN[kind](root, split)
        except FileError as error:
            hint = f"Put it into {str(root / kind)!r}, or name another folder with --data."
            raise FileError(expected("data", f"a folder with {kind}", f"the error {error}", hint)) from error
    return open_source(str(root / name) if (root / name).exists() else name, root=root)


def _fashion(root: Path, split: str) -> ImageSource:
    places = [root / "fashion-mnist", root / "FashionMNIST" / "raw"]
    there = next((place for place in places if place.is_dir()), places[0])
    images, labels = fashion_mnist(there, split or "test")
    # Not a list of images: each would be sent to a worker with the memory of all, of which it is a view.
    found = DatasetImages(TensorDataset(images, labels), f"fashion-mnist:{split or 'test'}")
    found.class_names = FASHION_CLASSES
    found.labels = labels.tolist()
    return found


def _samples(root: Path, split: str) -> ImageSource:
    return DatasetImages(imagenet_samples(root / "imagenet-samples"), "imagenet-samples")


def _pneumonia(root: Path, split: str) -> ImageSource:
    files = pneumonia_xrays(root / "chest-xray" / "pneumonia-224px", split or "test")
    return DatasetImages(files, f"pneumonia-xrays:{split or 'test'}")


def _cub(root: Path, split: str) -> ImageSource:
    files = cub200(root / "cub200", split)
    found = DatasetImages(files, f"cub200{split and ':'}{split}")
    found.labels = files.labels.tolist()
    return found


_OWN: dict[str, Callable[[Path, str], ImageSource]] = {
    "cub200": _cub,
    "fashion-mnist": _fashion,
    "imagenet-samples": _samples,
    "pneumonia-xrays": _pneumonia,
}


def _remembered(recipe: Recipe) -> dict[str, Any]:
    """What a folder shares with the recipe that goes on in it: all but words, questions, and the number of images."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    for name in ("title", "about"):
        del content[name]
    del content["data"]["images"]
    for name in ("readings", "level", "fdr", "largest"):
        del content["questions"][name]
    return content


def _network(recipe: Recipe, root: Path) -> VisionModel:
    """The network, before it is trained; its first weights depend on the seed alone."""
    spec = recipe.network
    weights: str | Path = spec.weights
    if weights != "DEFAULT" and not Path(weights).exists() and (root / weights).exists():
        weights = root / weights
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(recipe.seed, "experiment network"))
        net = load_model(spec.model, weights)
    if spec.size:
        net = replace(net, framing=Framing(spec.size))
    net = replace(net, grayscale=spec.grayscale or net.grayscale)
    net.model.eval()
    return net


def _n_outputs(net: VisionModel) -> int:
    """How many outputs the network has."""
    black = net.inputs([torch.zeros(3, net.framing.size, net.framing.size, dtype=torch.uint8)])
    with torch.no_grad(), state_guard(net.model):
        return int(net.model(black)[0].numel())


def _evidence(spec: EvidenceSpec, net: VisionModel, recipe: Recipe) -> Any:
    """What is passed as evidence."""
    if spec.attack:
        # Whoever asks several outputs for a sigmoid says that each is a label of its own.
        labels = "sigmoid" in recipe.questions.outcomes and _n_outputs(net) > 1
        return planned_attack(net, spec.attack, Plan(attacks=(spec.attack,), eps=spec.eps), multi_label=labels)[0]
    if spec.mask:
        units = RandomMask(spec.mask, n_trials=_MASKS, seed=recipe.seed)
        return Evidence(PixelMask("zero", normalization=net.normalization), units=units)
    return None


def _readable(data: Prepared, index: int) -> Any:
    """A sample, or None where it cannot be read."""
    try:
        return data[index]
    except (OSError, ValueError, SyntaxError, EOFError):
        return None


def _stacked(data: Prepared, images: int) -> tuple[Tensor, Tensor | None]:
    """The first images, in memory, and their labels."""
    n = min(images or len(data), len(data))
    samples = [sample for i in range(n) if (sample := _readable(data, i)) is not None]
    labels = [sample.label for sample in samples]
    return torch.stack([s.image for s in samples]), None if None in labels else torch.tensor(labels)
