"""Training a classifier, small data in memory: as CheXNet was, with Adam and binary cross-entropy, or by classes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ce_plugin.errors import InputError, check_integer, check_number, expected
from ce_plugin.randomness import derived_seed, generator


def train_classifier(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    lr: float = 1e-3,
    batch_size: int = 32,
    mirror: bool = False,
    seed: int = 0,
    show_progress: bool = False,
) -> list[float]:
    """Train a network in place: Adam with betas .9 and .999, the rate falling to zero by a cosine.

        loss = mean over images and outputs of -y log s(z) - (1 - y) log(1 - s(z)), or cross-entropy of classes

    Order, mirroring and dropout depend on ``seed`` alone, and the global random state is as before afterwards.
    Parameters that need no gradient stay as they are. The network is in eval mode at the end.

    Args:
        model: from inputs to logits (N, K).
        inputs: (N, C, H, W), in model units, on the network's device.
        labels: findings that may be true together, (N, K), bool; or classes, (N,), integers, which of a network with
            one output are 0 and 1.
        epochs: passes over the images, at least 1.
        lr: Adam's learning rate at the start, above 0.
        batch_size: images of a step, at least 1; two at least where there is batch normalisation. A last step of one
            image is left out.
        mirror: each image is turned left to right in each epoch with probability 1/2, as CheXNet's were.
        seed: any integer.
        show_progress: a bar of the steps.

    Returns:
        The mean loss of each epoch.

    Raises:
        InputError: no images, or labels that do not fit them or the network.
        ArgumentError: a number out of range.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]]).repeat(32, 1)
        >>> net = nn.Linear(1, 1)
        >>> losses = train_classifier(net, x, x[:, 0].long(), epochs=200, lr=0.1)
        >>> losses[-1] < 0.1, (net(x)[:2, 0] > 0).tolist()
        (True, [False, True])

    Source: Rajpurkar et al. 2017 (arXiv 1711.05225), section 2, whose rate fell by a tenth on plateaus instead.
    """
    check_integer("epochs", epochs, least=1)
    check_integer("batch_size", batch_size, least=1)
    check_number("lr", lr, "above zero", above=0)
    if not len(inputs) or len(labels) != len(inputs) or labels.dim() not in (1, 2):
        wanted = f"labels ({len(inputs)},) or ({len(inputs)}, K) of one image or more"
        raise InputError(expected("labels", wanted, f"shape {tuple(labels.shape)}"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.999))
    draw = generator(seed, "training")
    steps, step, losses = epochs * math.ceil(len(inputs) / batch_size), 0, []
    model.train()
    try:
        with torch.random.fork_rng(), tqdm(total=steps, desc="training", disable=not show_progress) as bar:
            torch.manual_seed(derived_seed(seed, "training dropout"))
            for _ in range(epochs):
                total, seen = 0.0, 0
                for chosen in torch.split(torch.randperm(len(inputs), generator=draw), batch_size):
                    optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
                    step += 1
                    bar.update()
                    if len(chosen) == 1 and batch_size > 1:
                        continue  # batch normalisation needs two
                    here = chosen.to(inputs.device)
                    x = _mirrored(inputs[here], draw) if mirror else inputs[here]
                    loss = _loss(model(x), labels.to(inputs.device)[here])
                    optimizer.zero_grad()
                    torch.autograd.backward(loss)
                    optimizer.step()
                    total, seen = total + float(loss.detach()) * len(chosen), seen + len(chosen)
                losses.append(total / max(seen, 1))
    finally:
        model.eval()
    return losses


def _mirrored(x: Tensor, draw: torch.Generator) -> Tensor:
    """About half of the images turned left to right."""
    turned = (torch.rand(len(x), generator=draw) < 0.5).to(x.device)
    return torch.where(turned.reshape(-1, *[1] * (x.dim() - 1)), x.flip(-1), x)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of findings or of one output, else cross-entropy of classes.

    Raises:
        InputError: the network has other outputs than the labels.
    """
    if labels.dim() == 1 and logits.dim() == 2 and logits.shape[1] > 1:
        if labels.is_floating_point() or not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
            raise InputError(
                expected("labels", f"class indices below {logits.shape[1]}", sorted(set(labels.tolist()))[:9])
            )
        return F.cross_entropy(logits, labels)
    own = labels[:, None] if labels.dim() == 1 else labels
    if logits.shape != own.shape or bool(((own != 0) & (own != 1)).any()):
        wanted = f"0 and 1, of shape {tuple(logits.shape)} like the network's outputs"
        raise InputError(
            expected("labels", wanted, f"shape {tuple(own.shape)}, {sorted(set(own.flatten().tolist()))[:9]}")
        )
    return F.binary_cross_entropy_with_logits(logits, own.to(logits.dtype))
