"""Training of a concept autoencoder beside a frozen network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ce_plugin.concepts.fidelity import compare_outputs
from ce_plugin.concepts.images import Images, as_source
from ce_plugin.concepts.losses import check_outcome, deep_loss, interpretability_loss, shallow_loss
from ce_plugin.concepts.model import ConceptAutoencoder, check_sizes
from ce_plugin.concepts.recorded import Batch, Recorded
from ce_plugin.errors import ArgumentError, ModelError, expected
from ce_plugin.files import damaged, load, save
from ce_plugin.networks.forward import OutputSelector, double
from ce_plugin.networks.guard import state_guard, turn
from ce_plugin.networks.layers import Layer, find_layer, fingerprint, probe
from ce_plugin.randomness import generator


@dataclass(frozen=True)
class Settings:
    """What a training was asked for; what an interrupted one must share with the one that goes on.

    Args: those of ``train_autoencoder``; ``interpretability`` is the name of the callable, ``validation`` a share or a
    word that says that the images are others.

    Raises:
        ArgumentError: a number out of its range.
    """

    concepts: int
    hidden: int | None
    kernel_size: int
    lambda_shallow: float
    lambda_deep: float
    lambda_interpretability: float
    interpretability: str
    epochs: int
    batch_size: int
    lr: float
    validation: float | str
    patience: int
    seed: int
    outcome: str

    def __post_init__(self) -> None:
        if self.concepts < 1:
            raise ArgumentError(expected("concepts", "at least 1", self.concepts))
        lambdas = ("lambda_shallow", "lambda_deep", "lambda_interpretability")
        for name in lambdas:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ArgumentError(expected(name, "zero or more", value))
        if not any(getattr(self, name) > 0 for name in lambdas[:2]):
            hint = "With neither, nothing asks the autoencoder to restore anything."
            raise ArgumentError(expected("lambda_shallow", "above zero where lambda_deep is zero", 0.0, hint))
        for name in ("epochs", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise ArgumentError(expected(name, "1 or more", getattr(self, name)))
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ArgumentError(expected("lr", "above zero", self.lr))
        if not isinstance(self.validation, str) and not 0.0 < self.validation < 1.0:
            hint = "Without held-out images there is nothing to stop by and no fidelity."
            raise ArgumentError(expected("validation", "a share in (0, 1), or images", self.validation, hint))
        check_outcome(self.outcome)

    def to_dict(self) -> dict[str, object]:
        """The fields by name."""
        return asdict(self)


Terms = dict[str, Tensor]


class Objective:
    """``lambda_shallow shallow + lambda_deep deep + lambda_interpretability interpretability``.

    Args:
        settings: the weights, the outcome, and the size of a batch.
        scale: unit of the shallow term.
        interpretability: from a code to a scalar.
    """

    def __init__(self, settings: Settings, scale: float, interpretability: Callable[[Tensor], Tensor]) -> None:
        self.settings, self.scale, self._interpretability = settings, scale, interpretability

    def terms(self, autoencoder: ConceptAutoencoder, recorded: Recorded, batch: Batch) -> Terms:
        """Each term and the total, with gradient to the autoencoder."""
        s = self.settings
        code = autoencoder.encode(batch.activations)
        reconstruction = autoencoder.decode(code)
        found = {
            "shallow": shallow_loss(batch.activations, reconstruction, self.scale),
            "deep": deep_loss(batch.output, recorded.answer(reconstruction, batch), s.outcome),
            "interpretability": self._interpretability(code),
        }
        weights = (s.lambda_shallow, s.lambda_deep, s.lambda_interpretability)
        total = torch.zeros_like(found["shallow"])
        for value, weight in zip(found.values(), weights, strict=True):
            # Left out at weight zero: zero times a value that is not finite is not zero.
            total = total + weight * value if weight > 0 else total
        return {**found, "total": total}

    def epoch(
        self,
        autoencoder: ConceptAutoencoder,
        recorded: Recorded,
        rows: list[int],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> dict[str, float]:
        """Means of all terms over some images, in this order; with an optimizer, a step per batch.

        Raises:
            ArgumentError: the loss is no longer finite.
        """
        sums: dict[str, float] = {}
        size = self.settings.batch_size
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            terms = self.terms(autoencoder, recorded, recorded.batch(some))
            if not bool(terms["total"].isfinite()):
                hint = "Try a tenth of it, and look at what `interpretability` returns."
                raise ArgumentError(expected("lr", "so small that the loss stays finite", self.settings.lr, hint))
            if optimizer is not None:
                optimizer.zero_grad()
                torch.autograd.backward(terms["total"])
                optimizer.step()
            for key, value in terms.items():
                sums[key] = sums.get(key, 0.0) + float(value.detach()) * len(some)
        return {key: value / len(rows) for key, value in sums.items()}


State = dict[str, Tensor]
# Version of a checkpoint's content.
_CHECKPOINT = 1
_WANTED = "a checkpoint of train_autoencoder"


class Progress:
    """The course of one training.

    Args:
        path: of the checkpoint, or None.
        settings: what is asked for.
        layer: name of the layer.
        fingerprint: of the network.

    Attributes:
        history: per epoch, each term on the images fitted on ("train_...") and on those held out ("validation_...").
        best: weights of the best epoch.
    """

    def __init__(self, path: str | PathLike[str] | None, settings: Settings, layer: str, fingerprint: str) -> None:
        self.path, self.settings, self.layer, self.fingerprint = path, settings, layer, fingerprint
        self.history: list[dict[str, float]] = []
        self.best: State = {}
        self._state: State = {}
        self._optimizer: dict[str, Any] | None = None
        self._n_images = 0

    @classmethod
    def open(cls, path: str | PathLike[str] | None, settings: Settings, layer: str, fingerprint: str) -> Progress:
        """A new training, or the one that the file holds.

        Raises:
            FileError: the file is no checkpoint.
            ModelError: it is one of another layer or network.
            ArgumentError: it is one with other settings.
        """
        progress = cls(path, settings, layer, fingerprint)
        if path is not None and Path(path).exists():
            progress._read(path)
        return progress

    def _read(self, path: str | PathLike[str]) -> None:
        content = load(path, "checkpoint", _CHECKPOINT, _WANTED)
        hint = "Choose another file, or delete this one to begin again."
        here = (self.layer, self.fingerprint)
        if (content["layer_name"], content["fingerprint"]) != here:
            came = f"one of layer {content['layer_name']!r} of network {content['fingerprint']}"
            wanted = f"one of layer {self.layer!r} of this network ({self.fingerprint})"
            raise ModelError(expected("checkpoint", wanted, came, hint))
        asked = self.settings.to_dict()
        other = {k: v for k, v in content["settings"].items() if k != "epochs" and asked.get(k) != v}
        if other:
            wanted = "one with " + ", ".join(f"{key}={asked.get(key)!r}" for key in other)
            came = "one with " + ", ".join(f"{key}={value!r}" for key, value in other.items())
            raise ArgumentError(expected("checkpoint", wanted, came, hint))
        self.history, self.best, self._state = content["history"], content["best"], content["state"]
        self._optimizer, self._n_images = content["optimizer"], content["n_images"]

    def begin(self, autoencoder: ConceptAutoencoder, n_images: int) -> None:
        """Check that the images are those of the checkpoint, or write the first one.

        Raises:
            ArgumentError: the checkpoint is of a training on other images.
        """
        now = autoencoder.state_dict()
        if self.path is not None and self._state:
            shapes = {key: value.shape for key, value in now.items()}
            if any({key: value.shape for key, value in s.items()} != shapes for s in (self._state, self.best)):
                raise damaged(self.path, _WANTED, "its weights are of another autoencoder")
            keys = [key for key in now if key.startswith("encoder.standardize.")]
            same = n_images == self._n_images and all(
                torch.allclose(self._state[key], now[key].cpu(), rtol=1e-2, atol=1e-5) for key in keys
            )
            if not same:
                hint = "Choose another file, or delete this one to begin again."
                came = f"one of {self._n_images} others" if n_images != self._n_images else "one of others"
                raise ArgumentError(expected("checkpoint", f"one of these {n_images} images", came, hint))
            return
        self._n_images = n_images
        self.best = self._state = _copy(now)
        self._write()

    def restore(self, autoencoder: ConceptAutoencoder, optimizer: torch.optim.Optimizer) -> None:
        """Weights and optimizer as they were when the file was written."""
        autoencoder.load_state_dict(self._state)
        if self.path is not None and self._optimizer is not None:
            try:
                optimizer.load_state_dict(self._optimizer)
            except (LookupError, TypeError, AttributeError, ValueError) as error:
                raise damaged(self.path, _WANTED, error) from error

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return len(self.history)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the patience is at its end."""
        return self.epoch >= self.settings.epochs or self._waited() >= self.settings.patience

    @property
    def rate(self) -> float:
        """The learning rate of the next epoch: halved after each half of the patience without improvement."""
        step = max(1, self.settings.patience // 2)
        halvings, best, waited = 0, float("inf"), 0
        for loss in self._losses():
            best, waited = (loss, 0) if loss < best else (best, waited + 1)
            halvings += waited > 0 and waited % step == 0
        return float(self.settings.lr * 0.5**halvings)

    def _losses(self) -> list[float]:
        return [record["validation_total"] for record in self.history]

    def _waited(self) -> int:
        losses = self._losses()
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    def end_epoch(
        self,
        autoencoder: ConceptAutoencoder,
        optimizer: torch.optim.Optimizer,
        fitted: dict[str, float],
        checked: dict[str, float],
    ) -> None:
        """Take down what an epoch brought, and write the checkpoint."""
        record = {"epoch": float(self.epoch + 1), "lr": self.rate}
        record |= {f"train_{key}": value for key, value in fitted.items()}
        record |= {f"validation_{key}": value for key, value in checked.items()}
        self.history.append(record)
        self._state, self._optimizer = _copy(autoencoder.state_dict()), optimizer.state_dict()
        if self._waited() == 0:
            self.best = self._state
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            content = {
                "settings": self.settings.to_dict(),
                "layer_name": self.layer,
                "fingerprint": self.fingerprint,
                "n_images": self._n_images,
                "history": self.history,
                "best": self.best,
                "state": self._state,
                "optimizer": self._optimizer,
            }
            save(self.path, "checkpoint", _CHECKPOINT, content, force=True)


def _copy(state: dict[str, Any]) -> State:
    return {key: value.detach().cpu().clone() for key, value in state.items()}


_ROUNDS, _TOLERANCE = 60, 1e-4
# Below this share of the largest variance a direction is rounding noise.
_RANK = 1e-7
# The code is zero at this quantile of a component: for what is absent nearly everywhere, that is where it is absent.
_ABSENT = 0.01


def independent_components(vectors: Tensor, number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Directions in which data are a mixture of independent, skewed or heavy-tailed sources.

    The first principal components, whitened, then turned by FastICA (symmetric, log cosh).

    Args:
        vectors: centred data, (n, C).
        number: how many components are wanted, at most C.
        seed: of the first turn.

    Returns:
        ``unmixing (K, C)`` and ``mixing (C, K)``: ``vectors @ unmixing.T`` are sources of variance 1, each with its
        longer tail above zero, and ``sources @ mixing.T`` the closest to the data that K directions allow. K is
        smaller than ``number`` where the data have fewer directions.

    Source: Hyvarinen 1999, "Fast and robust fixed-point algorithms for independent component analysis".
    """
    values, directions = torch.linalg.eigh(vectors.T @ vectors / len(vectors))
    values, directions = values.flip(0)[:number], directions.flip(1)[:, :number]
    kept = values > _RANK * values[0].clamp_min(torch.finfo(values.dtype).tiny)
    values, directions = values[kept], directions[:, kept]
    if len(values) == 0:
        return vectors.new_zeros(0, vectors.shape[1]), vectors.new_zeros(vectors.shape[1], 0)
    whitening, colouring = (directions / values.sqrt()).T, directions * values.sqrt()
    # Single precision suffices for the turn, and takes half the time; most of it is spent here.
    white = (vectors @ whitening.T).float()
    draw = generator(seed, "components")
    turn = _orthogonal(torch.randn(len(values), len(values), generator=draw))
    for _ in range(_ROUNDS if len(values) > 1 else 0):
        bent = (white @ turn.T).tanh()
        new = _orthogonal(bent.T @ white / len(white) - (1 - bent.square()).mean(0)[:, None] * turn)
        moved = ((new * turn).sum(1).abs() - 1).abs().max()
        turn = new
        if moved < _TOLERANCE:
            break
    sign = (white @ turn.T).pow(3).mean(0).sign()
    turn = turn * torch.where(sign == 0, 1.0, sign)[:, None]
    turn = turn.to(whitening)
    return turn @ whitening, colouring @ turn.T


def _orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthogonal rows of length 1."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    nearest: Tensor = left @ right
    return nearest


def start_linear(autoencoder: ConceptAutoencoder, vectors: Tensor) -> None:
    """Set the first weights so that the code is ``relu(unmixing h + offset)`` and the reconstruction linear in it.

    Leaky ReLUs in a row before a ReLU do nothing to what it lets through, and nothing to a code that is never negative,
    so that identities in the middle of the kernels make the five layers one linear encoder and one linear decoder.
    What is left of the inner channels keeps its random weights on the way in and gets none on the way out: it does
    nothing yet, and learns.

    Args:
        autoencoder: standardised, untrained; one with fewer inner channels than concepts is left as it is.
        vectors: activations at some positions, (n, C), in the layer's own units; where they do not vary there is
            nothing to start from.
    """
    if autoencoder.hidden < autoencoder.concepts or len(vectors) < 2:
        return
    scale = autoencoder.get_buffer("encoder.standardize.scale").flatten().to(vectors)
    centred = vectors - autoencoder.get_buffer("encoder.standardize.mean").flatten().to(vectors)
    unmixing, mixing = independent_components(centred, autoencoder.concepts, autoencoder.seed)
    k = len(unmixing)
    if k == 0:
        return
    # One by one: torch.quantile takes no more than 16 million values at a time.
    lowest = torch.stack([component.quantile(_ABSENT) for component in unmixing @ centred.T])
    with torch.no_grad():
        eye = torch.eye(k).to(unmixing)
        _set(autoencoder.encoder, "conv1", k, unmixing * scale, -lowest)
        _set(autoencoder.encoder, "conv2", k, eye, None)
        _set(autoencoder.encoder, "conv3", k, eye, None)
        _set(autoencoder.decoder, "conv4", k, eye, None)
        _set(autoencoder.decoder, "conv5", len(mixing), mixing / scale[:, None], (mixing @ lowest) / scale)


def _set(part: nn.Sequential, name: str, rows: int, matrix: Tensor, bias: Tensor | None) -> None:
    """Put a matrix into the middle of the first ``rows`` kernels, nothing into the rest of them."""
    layer = part.get_submodule(name)
    weight, middle = layer.get_parameter("weight"), layer.get_parameter("weight").shape[-1] // 2
    weight[:rows] = 0.0
    weight[:rows, : matrix.shape[1], middle, middle] = matrix.to(weight)
    if bias is not None:
        layer.get_parameter("bias")[:rows] = bias.to(weight)


# Activations at about so many positions are enough for the components, and fit into memory.
_POSITIONS = 20_000
# (recorded images, which of them)
Part = tuple[Recorded, list[int]]


def prepared(fit: Part, settings: Settings) -> tuple[ConceptAutoencoder, float]:
    """An autoencoder before its first step, and the layer's mean absolute deviation from its channels' means."""
    recorded, rows = fit
    mean, spread, positions = _moments(fit, settings)
    example = recorded.batch(rows[:1]).activations
    size = float(spread.square().mean().sqrt())
    # A channel that hardly varies is not blown up to the size of the others, nor is rounding noise.
    floor = 1e-3 * size if size > 1e-6 * float(mean.abs().max()) else 1.0
    autoencoder = ConceptAutoencoder(
        len(mean), settings.concepts, settings.hidden, settings.kernel_size, seed=settings.seed
    )
    autoencoder.to(example.device, example.dtype).standardize(mean.to(example), spread.clamp_min(floor).to(example))
    start_linear(autoencoder, positions)
    return autoencoder, float((positions - mean).abs().mean()) or 1.0


def _moments(fit: Part, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """In one pass: mean and standard deviation of each channel, (C,), and activations at random positions, (n, C)."""
    recorded, rows = fit
    draw = generator(settings.seed, "positions")
    each = -(-_POSITIONS // len(rows))
    count, found = 0, []
    total = square = torch.zeros(recorded.shape[0], dtype=torch.float64)
    for start in range(0, len(rows), settings.batch_size):
        h = double(recorded.batch(rows[start : start + settings.batch_size]).activations.flatten(2))
        count += h[:, 0].numel()
        total, square = total + h.sum((0, 2)), square + h.square().sum((0, 2))
        if len(rows) > _POSITIONS:
            h = h[torch.rand(len(h), generator=draw) < _POSITIONS / len(rows)]
        picks = torch.rand(len(h), h.shape[2], generator=draw).argsort(1)[:, :each]
        found.append(torch.gather(h, 2, picks[:, None].expand(-1, h.shape[1], -1)).transpose(1, 2).flatten(0, 1))
    mean = total / count
    return mean, (square / count - mean.square()).clamp_min(0).sqrt(), torch.cat(found)


# A convolution whose kernels have so many weights or fewer takes the full learning rate.
_TERMS = 32


def train_autoencoder(
    network: nn.Module,
    layer: Layer,
    images: Images,
    concepts: int,
    *,
    hidden: int | None = None,
    kernel_size: int = 3,
    lambda_shallow: float = 1.0,
    lambda_deep: float = 1.0,
    lambda_interpretability: float = 0.1,
    interpretability: Callable[[Tensor], Tensor] | None = None,
    epochs: int = 50,
    batch_size: int = 32,
    lr: float = 1e-3,
    validation: float | Images = 0.2,
    patience: int = 8,
    checkpoint: str | PathLike[str] | None = None,
    seed: int = 0,
    outcome: str = "probability",
    output: OutputSelector = None,
    cache_bytes: int = 1 << 30,
    device: torch.device | str | None = None,
    show_progress: bool = False,
) -> ConceptAutoencoder:
    """Train an autoencoder for a layer of a network.

    The loss is ``lambda_shallow mean|h - h'| / s + lambda_deep KL(original output || output with the autoencoder
    inserted) + lambda_interpretability I(code)``, with s the layer's mean absolute deviation on the training images.
    The network is frozen and in eval mode; its modes, ``requires_grad`` flags, gradients and the global random state
    are as before afterwards. What comes before the layer is run once per image where its results fit into
    ``cache_bytes``, and only what comes after it is run again where torch.fx can cut the network there; else the whole
    network is run for each batch, with the same numbers. The first weights are those of independent components of the
    activations (FastICA), from which Adam goes on; the rate is smaller for kernels of more than 32 weights, in
    proportion, and halved whenever the loss on the held-out images has not improved for half of ``patience``. Weights,
    order and split depend on ``seed`` only.

    Args:
        network: any module that returns logits (N, C), or of which ``output`` names them.
        layer: a submodule, or its dotted name, that returns (N, C, h, w).
        images: as the network takes them: a tensor (N, ...), a Dataset, or a DataLoader (of which the data set is
            used), of images or (image, label) pairs. Random augmentation in a Dataset is drawn once where results are
            kept in memory.
        concepts: channels K of the code, ``1 <= K < C``.
        hidden, kernel_size: see :class:`ConceptAutoencoder`.
        lambda_shallow, lambda_deep, lambda_interpretability: weights of the terms, zero or more. Codes of photographs
            stay dense at the default: more interpretability makes concepts absent from more places, at some loss of
            fidelity.
        interpretability: a callable from a code (N, K, h, w) to a scalar; None means
            :func:`interpretability_loss`.
        epochs: at most so many passes over the images.
        batch_size: images per step.
        lr: learning rate at the start.
        validation: share of the images that is held out, in (0, 1), or images of their own. Give your own where
            several images show one thing (crops, frames), so that none of it is on both sides.
        patience: stop after so many epochs without a better loss on the held-out images; the best epoch is kept.
        checkpoint: a file, written after every epoch, from which an interrupted training goes on as if it had not
            been interrupted. Only ``epochs`` and what concerns memory and display may differ then.
        seed: any integer.
        outcome: ``"probability"`` (softmax) or ``"sigmoid"`` (multi-label).
        output: which part of what the network returns holds the logits: a key, an index or a callable.
        cache_bytes: memory for activations.
        device: where to train; None means where the network is. It is moved there and back.
        show_progress: a bar over the epochs.

    Returns:
        The autoencoder of the best epoch, on the network's device and in eval mode, with ``history``, and ``fidelity``
        on the held-out images. These chose the epoch: measure what you report on images of its own
        (:func:`measure_fidelity`).

    Raises:
        ArgumentError: a number out of its range; a checkpoint of a training with other settings.
        ModelError: the layer is not reached once or returns nothing spatial; the network returns no logits; a
            checkpoint of another layer or network.
        InputError: the images cannot be used.
        FileError: the checkpoint is none, or cannot be written.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))
        >>> autoencoder = train_autoencoder(net, "1", torch.randn(20, 1, 8, 8), concepts=2, epochs=2)
        >>> autoencoder.layer_name, len(autoencoder.history), autoencoder.fidelity.n_images
        ('1', 2, 4)

    Source: Yang et al., ICIP 2019, section 3.2; Harradon et al. 2018 (arXiv 1802.00541), Eqn 7.
        Adam: Kingma and Ba 2015.
    """
    settings = Settings(
        concepts=concepts,
        hidden=hidden,
        kernel_size=kernel_size,
        lambda_shallow=lambda_shallow,
        lambda_deep=lambda_deep,
        lambda_interpretability=lambda_interpretability,
        interpretability=_name(interpretability),
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        validation=validation if isinstance(validation, (int, float)) else "images of their own",
        patience=patience,
        seed=seed,
        outcome=outcome,
    )
    name, _ = find_layer(network, layer)
    with ExitStack() as stack:
        progress = Progress.open(checkpoint, settings, name, fingerprint(network))
        stack.enter_context(turn(network))
        stack.enter_context(_on(network, device))
        stack.enter_context(state_guard(network))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for parameter in network.parameters():
            parameter.requires_grad_(False)
        fit, held = _parts(network, name, images, validation, output, settings, cache_bytes, show_progress)
        autoencoder, deviation = prepared(fit, settings)
        objective = Objective(settings, deviation, interpretability or interpretability_loss)
        progress.begin(autoencoder, len(fit[1]))
        _train(autoencoder, objective, progress, fit, held, show_progress)
        autoencoder.load_state_dict(progress.best)
        autoencoder.eval().requires_grad_(True)
        autoencoder.layer_name, autoencoder.fingerprint = name, progress.fingerprint
        autoencoder.history = progress.history
        autoencoder.fidelity = compare_outputs(_answers(autoencoder, held, batch_size), outcome)
    # Only now is the network back where it was.
    first = next((p for p in (*network.parameters(), *network.buffers())), None)
    return autoencoder if first is None else autoencoder.to(first.device)


def _name(interpretability: object) -> str:
    if interpretability is not None and not callable(interpretability):
        wanted = "None or a callable from a code (N, K, h, w) to a scalar"
        raise ArgumentError(expected("interpretability", wanted, repr(interpretability)))
    return (
        "" if interpretability is None else getattr(interpretability, "__qualname__", type(interpretability).__name__)
    )


@contextmanager
def _on(network: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """The network on another device, and back."""
    first = next((p for p in (*network.parameters(), *network.buffers())), None)
    if device is None or first is None or torch.device(device) == first.device:
        yield
        return
    before = first.device
    network.to(device)
    try:
        yield
    finally:
        network.to(before)


def _parts(
    network: nn.Module,
    name: str,
    images: Images,
    validation: float | Images,
    output: OutputSelector,
    settings: Settings,
    cache_bytes: int,
    show_progress: bool,
) -> tuple[Part, Part]:
    """The images to fit on and those held out."""
    own = not isinstance(validation, (int, float))
    source = as_source(images, network, least=1 if own else 2)
    _check_fit(*probe(network, name, source.take([0]), output), name, settings)
    sources = [source, as_source(validation, network, name="validation")] if own else [source]  # type: ignore[arg-type]
    total = sum(map(len, sources))
    with tqdm(total=total, desc=f"activations of {name}", unit="image", disable=not show_progress) as bar:
        recorded = [
            Recorded(
                network,
                name,
                part,
                output,
                batch_size=settings.batch_size,
                cache_bytes=cache_bytes * len(part) // total,
                tick=bar.update,
            )
            for part in sources
        ]
    if own:
        return (recorded[0], list(range(len(recorded[0])))), (recorded[1], list(range(len(recorded[1]))))
    order = torch.randperm(len(source), generator=generator(settings.seed, "held out")).tolist()
    held = min(max(1, round(float(settings.validation) * len(source))), len(source) - 1)
    return (recorded[0], sorted(order[held:])), (recorded[0], sorted(order[:held]))


def _check_fit(activations: Tensor, logits: Tensor, name: str, settings: Settings) -> None:
    """That such an autoencoder can be built for the layer, and the outcome fits the network."""
    channels = activations.shape[1]
    if settings.concepts >= channels:
        wanted = f"at least 1 and below the {channels} channels of layer {name!r}"
        raise ArgumentError(expected("concepts", wanted, settings.concepts, "A code as wide compresses nothing."))
    check_sizes(channels, settings.concepts, settings.hidden, settings.kernel_size)
    check_outcome(settings.outcome, logits)


def _train(
    autoencoder: ConceptAutoencoder,
    objective: Objective,
    progress: Progress,
    fit: Part,
    held: Part,
    show_progress: bool,
) -> None:
    """Epoch by epoch, from where the progress stands."""
    settings = progress.settings
    optimizer = torch.optim.Adam(_groups(autoencoder))
    progress.restore(autoencoder, optimizer)
    recorded, rows = fit
    with tqdm(total=settings.epochs, initial=progress.epoch, unit="epoch", disable=not show_progress) as bar:
        while not progress.finished:
            for group in optimizer.param_groups:
                group["lr"] = progress.rate * group["share"]
            autoencoder.train()
            draw = generator(settings.seed, "order", progress.epoch)
            order = [rows[i] for i in torch.randperm(len(rows), generator=draw).tolist()]
            fitted = objective.epoch(autoencoder, recorded, order, optimizer)
            autoencoder.eval()
            with torch.no_grad():
                checked = objective.epoch(autoencoder, *held)
            progress.end_epoch(autoencoder, optimizer, fitted, checked)
            bar.set_postfix({key: f"{value:.3g}" for key, value in checked.items()})
            bar.update()


def _groups(autoencoder: ConceptAutoencoder) -> list[dict[str, Any]]:
    """Each convolution with its share of the learning rate: the step of a sum must not grow with its terms."""
    found: list[dict[str, Any]] = []
    for layer in autoencoder.modules():
        if isinstance(layer, nn.Conv2d):
            terms = layer.weight[0].numel()
            found.append({"params": list(layer.parameters()), "share": min(1.0, _TERMS / terms), "lr": 0.0})
    return found


def _answers(autoencoder: ConceptAutoencoder, held: Part, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits of the held-out images without and with the autoencoder."""
    recorded, rows = held
    with torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = recorded.batch(rows[start : start + batch_size])
            yield batch.output, recorded.answer(autoencoder(batch.activations), batch)
