"""Training of a concept autoencoder beside a frozen network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ce_plugin.concepts.fidelity import compare_outputs
from ce_plugin.concepts.images import Images, as_source
from ce_plugin.concepts.layers import Layer, OutputSelector, find_layer, fingerprint, probe
from ce_plugin.concepts.losses import check_outcome, interpretability_loss
from ce_plugin.concepts.model import ConceptAutoencoder, check_sizes
from ce_plugin.concepts.preparation import Part, prepared
from ce_plugin.concepts.progress import Progress
from ce_plugin.concepts.recorded import Recorded
from ce_plugin.concepts.settings import Settings
from ce_plugin.concepts.terms import Objective
from ce_plugin.errors import ArgumentError, expected
from ce_plugin.guard import state_guard
from ce_plugin.randomness import generator

__all__ = ["train_autoencoder"]

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
