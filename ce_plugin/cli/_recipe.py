"""Recipes of experiments: what a TOML file may say, checked before any work."""

from __future__ import annotations

import sys
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ce_plugin.errors import ArgumentError, FileError, check_integer, check_number, expected, unknown_name
from ce_plugin.files import existing_file
from ce_plugin.report import ATTACKS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
"""Where the package's own recipes lie."""

_OUTCOMES = ("log_odds", "probability", "logit", "margin", "prediction_weighted", "sigmoid")


@dataclass(frozen=True, kw_only=True)
class Data:
    """The images over which effects are averaged.

    Args:
        source: ``fashion-mnist:test``, ``imagenet-samples``, ``pneumonia-xrays:test``, ``cub200``, or what
            ``ce-plugin expected`` takes: a folder, Parquet, ``torchvision:NAME:SPLIT``, ``MODULE:FUNCTION``.
        images: so many, the first of a random order; 0 means all.
        matched: classes are found by name among the network's, and images of others are left out, and counted.
    """

    source: str
    images: int = 0
    matched: bool = False

    def __post_init__(self) -> None:
        check_integer("data.images", self.images, least=0)


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a network is trained: Adam, the rate falling to zero by a cosine, cross-entropy.

    Args:
        source: as in :class:`Data`.
        epochs: passes over the images.
        rate: Adam's rate at the start.
        batch_size: images of a step.
        images: at most so many; 0 means all.
        least_accuracy: on the experiment's images; a network below it is an error.
    """

    source: str
    epochs: int = 4
    rate: float = 1e-3
    batch_size: int = 100
    images: int = 0
    least_accuracy: float = 0.0

    def __post_init__(self) -> None:
        check_integer("network.training.epochs", self.epochs, least=1)
        check_integer("network.training.batch_size", self.batch_size, least=1)
        check_integer("network.training.images", self.images, least=0)
        check_number("network.training.rate", self.rate, "above zero", above=0)
        check_number("network.training.least_accuracy", self.least_accuracy, "a share in [0, 1]", above=-1e-9, below=1)


@dataclass(frozen=True, kw_only=True)
class Network:
    """The network.

    Args:
        model: ``torchvision:NAME``, ``MODULE:FACTORY`` or ``FILE.py:FACTORY``.
        weights: ``DEFAULT``, or what :func:`~ce_plugin.models.load_model` takes, here or in the folder of data sets.
        size: side of the square that it sees; 0 leaves what the factory says.
        grayscale: it takes one channel.
        training: None means that it is taken as it is.
    """

    model: str
    weights: str = "DEFAULT"
    size: int = 0
    grayscale: bool = False
    training: Training | None = None

    def __post_init__(self) -> None:
        check_integer("network.size", self.size, least=0)


@dataclass(frozen=True, kw_only=True)
class EvidenceSpec:
    """One evidence: none, masked at random, or attacked.

    Args:
        mask: share of patches that are set to black (the paper's PWM); 0 masks nothing.
        attack: "", or fgsm, bim, pgd, jsma.
        eps: largest change of a value, as a share of the range.
    """

    mask: float = 0.0
    attack: str = ""
    eps: float = 8 / 255

    def __post_init__(self) -> None:
        check_number("evidences.mask", self.mask, "a share in [0, 1)", above=-1e-9, below=1)
        check_number("evidences.eps", self.eps, "a share in (0, 1]", above=0, below=1 + 1e-9)
        if self.attack and self.attack not in ATTACKS:
            raise unknown_name("evidences.attack", self.attack, ATTACKS)
        if self.attack and self.mask:
            raise ArgumentError(expected("evidences", "masked or attacked", f"mask = {self.mask} and {self.attack}"))


@dataclass(frozen=True, kw_only=True)
class SiteSpec:
    """Whose effects: all channels of a layer, or all channels of an autoencoder's code inserted there.

    Args:
        layer: dotted name.
        nodes: those that the tables show; all are in nodes.csv, and tested together.
        concepts: channels of the autoencoder's code; 0 means no autoencoder.
    """

    layer: str
    nodes: tuple[int, ...] = ()
    concepts: int = 0

    def __post_init__(self) -> None:
        check_integer("sites.concepts", self.concepts, least=0)
        for node in self.nodes:
            check_integer("sites.nodes", node, least=0)

    @property
    def name(self) -> str:
        """What its folder and its rows are called."""
        return f"{self.layer}, code of {self.concepts}" if self.concepts else self.layer


@dataclass(frozen=True, kw_only=True)
class AutoencoderSpec:
    """How autoencoders are trained, on the network's training images or, where it has none, on ``source``.

    Args:
        source: as in :class:`Data`; "" means that of the network's training.
        images: the first so many.
        epochs: at most so many.
        kernel_size: of its convolutions.
        least_fidelity: share of held-out images whose top class it must leave as it is.
    """

    source: str = ""
    images: int = 4000
    epochs: int = 10
    kernel_size: int = 3
    least_fidelity: float = 0.9

    def __post_init__(self) -> None:
        for name in ("images", "epochs", "kernel_size"):
            check_integer(f"autoencoder.{name}", getattr(self, name), least=1)
        check_number("autoencoder.least_fidelity", self.least_fidelity, "a share in [0, 1]", above=-1e-9, below=1)


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What is asked of the tables of effects.

    Args:
        outcomes: all are measured in one run.
        readings: of the paper's columns: "A", effect of the node given the evidence; "B", effect of the evidence given
            that the node is set.
        level: of the intervals.
        fdr: false discovery rate over all nodes of a site.
        detector: whether the index is tested as a detector of attacked images.
        largest: whether the node of the largest effect is found on one half of the images and measured on the other,
            as it has to be: the largest of many measured values is too large.
    """

    outcomes: tuple[str, ...] = ("prediction_weighted", "log_odds")
    readings: tuple[str, ...] = ("A", "B")
    level: float = 0.95
    fdr: float = 0.05
    detector: bool = False
    largest: bool = False

    def __post_init__(self) -> None:
        check_number("questions.level", self.level, "a share in (0, 1)", above=0, below=1)
        check_number("questions.fdr", self.fdr, "a share in (0, 1)", above=0, below=1)
        for name in self.outcomes:
            if name not in _OUTCOMES:
                raise unknown_name("questions.outcomes", name, _OUTCOMES)
        for name in self.readings:
            if name not in ("A", "B"):
                raise unknown_name("questions.readings", name, ("A", "B"))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An experiment.

    Args:
        title, about: for the reader.
        data, network, evidences, sites, autoencoder, questions: see there. The first evidence is what the others are
            compared with.
        batch_size: images that are estimated together.
        seed: of everything random.
    """

    title: str
    about: str = ""
    data: Data
    network: Network
    evidences: dict[str, EvidenceSpec]
    sites: tuple[SiteSpec, ...]
    autoencoder: AutoencoderSpec = field(default_factory=AutoencoderSpec)
    questions: Questions = field(default_factory=Questions)
    batch_size: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("batch_size", self.batch_size, least=1)
        if not self.evidences or not self.sites:
            raise ArgumentError(expected("recipe", "one with evidences and sites", "one without"))
        names = [site.name for site in self.sites]
        if len(set(names)) < len(names):
            raise ArgumentError(expected("sites", "each once", names))
        clean = [name for name, one in self.evidences.items() if not one.mask and not one.attack]
        if "B" in self.questions.readings and (len(clean) != 1 or len(self.evidences) < 2):
            wanted = "one that is clean, `clean = {}`, and others, for reading B"
            raise ArgumentError(expected("evidences", wanted, ", ".join(self.evidences)))
        coded = any(site.concepts for site in self.sites)
        if coded and self.network.training is None and not self.autoencoder.source:
            hint = "Name images to train it on: autoencoder.source."
            raise ArgumentError(expected("autoencoder", "one with images for the sites with a code", "none", hint))
        if self.questions.detector:
            self._check_detector(next(iter(self.evidences)) in clean)

    def _check_detector(self, first_is_clean: bool) -> None:
        """The index needs the clean images, attacked ones, and a site without autoencoder to compare with."""
        attacked = any(one.attack for one in self.evidences.values())
        plain = any(not site.concepts for site in self.sites)
        if not (first_is_clean and attacked and plain and any(site.nodes for site in self.sites)):
            wanted = "a recipe with clean images first, an attack, a site without concepts, and nodes"
            raise ArgumentError(expected("questions.detector", wanted, "true in another"))
        if "prediction_weighted" not in self.questions.outcomes:
            raise ArgumentError(
                expected("questions.outcomes", "with prediction_weighted, for the detector", self.questions.outcomes)
            )


def packaged() -> dict[str, Path]:
    """The package's own recipes by name."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.toml"))}


def recipe_file(name: str) -> Path:
    """The file of a recipe: one of the package's, or the user's own.

    Raises:
        UnknownNameError: neither.
    """
    if name.endswith(".toml"):
        return existing_file(name, "recipe", "an existing .toml file")
    known = packaged()
    if name not in known:
        raise unknown_name("recipe", name, known)
    return known[name]


def read_recipe(file: Path) -> Recipe:
    """What a file says.

    Raises:
        FileError: no TOML.
        UnknownNameError: a key that a recipe does not have.
        ArgumentError: a key that is missing, or a value that cannot be.

    Example:
        >>> read_recipe(recipe_file("table3")).evidences["FGSM"].eps
        0.3
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FileError(expected("recipe", "a TOML file", f"{str(file)!r} ({error})")) from error
    found: Recipe = _built(Recipe, content, "")
    return found


def _built(kind: type[Any], content: Any, where: str) -> Any:
    """A dataclass from a table of the file; every key is known, and of its type."""
    if not isinstance(content, dict):
        raise ArgumentError(expected(where, "a table", repr(content), f"Write [{where}]."))
    hints = get_type_hints(kind)
    for key in content:
        if key not in hints:
            raise unknown_name(f"key of {where or 'the recipe'}", key, hints)
    values = {}
    for one in fields(kind):
        name = f"{where}.{one.name}" if where else one.name
        if one.name in content:
            values[one.name] = _value(hints[one.name], content[one.name], name)
        elif one.default is MISSING and one.default_factory is MISSING:
            raise ArgumentError(expected(name, "in the recipe", "nothing"))
    return kind(**values)


def _value(kind: Any, value: Any, where: str) -> Any:
    """A value of the file as the type that is wanted."""
    arguments = get_args(kind)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ArgumentError(expected(where, "a list", repr(value)))
        return tuple(_value(arguments[0], one, where) for one in value)
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ArgumentError(expected(where, "a table of tables", repr(value)))
        return {name: _value(arguments[1], one, f"{where}.{name}") for name, one in value.items()}
    if type(None) in arguments:
        return _value(arguments[0], value, where)
    if kind in (str, int, float, bool):
        wanted = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
        allowed = (int, float) if kind is float else (kind,)
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
            raise ArgumentError(expected(where, wanted, repr(value)))
        return kind(value)
    return _built(kind, value, where)
