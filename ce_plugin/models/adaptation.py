"""Unsupervised domain adaptation: a gradient reversal, the network and training of DANN, pseudo-labels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ce_plugin.errors import ArgumentError, InputError, ModelError, check_integer, check_number, expected
from ce_plugin.networks.guard import state_guard
from ce_plugin.randomness import derived_seed, generator

_HIDDEN = 100
_GAMMA = 10.0  # how fast the weight of the reversal rises, from the paper


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return -ctx.weight * gradients[0], None


class GradientReversal(nn.Module):
    """The identity, whose gradient is turned round: what follows learns to tell, what precedes learns to hide.

        R(z) = z,   dR/dz = -weight I

    Args:
        weight: a finite number, which may be changed during training; a negative one passes the gradient on unturned.

    Raises:
        ArgumentError: the weight is no finite number.

    Example:
        >>> z = torch.ones(2, requires_grad=True)
        >>> GradientReversal(0.5)(3 * z).sum().backward()
        >>> z.grad.tolist()
        [-1.5, -1.5]

    Source: Ganin et al. 2016 (arXiv 1505.07818), Eq. 15 and 16.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = check_number("weight", weight, "a finite number", above=-math.inf, below=math.inf)

    def forward(self, features: Tensor) -> Tensor:
        """Any tensor, as it is."""
        return cast(Tensor, _Reverse.apply(features, self.weight))

    def extra_repr(self) -> str:
        return f"weight={self.weight:g}"


class DannCNN(nn.Module):
    """DANN's network for digits: two convolutions with pooling, and a head with one hidden layer.

    Beside the paper's it has batch normalisation, and dropout of whole channels, with which adaptation takes far fewer
    steps; the head has one hidden layer instead of two.

    Args:
        widths: channels of the two convolutions; the paper's are 32 and 48.
        hidden: units of the head's hidden layer.

    Attributes:
        features: conv, batch norm, ReLU, max pooling (3), conv, batch norm, dropout, ReLU, max pooling (8), flattening:
            (N, 16 * widths[1]).
        head: linear, ReLU, linear: logits of the classes.

    Raises:
        ArgumentError: a width below 1.

    Example:
        >>> net = DannCNN()
        >>> net.features(torch.zeros(2, 3, 28, 28)).shape, net(torch.zeros(2, 3, 28, 28)).shape
        (torch.Size([2, 768]), torch.Size([2, 10]))

    Source: Ganin et al. 2016 (arXiv 1505.07818), Figure 4a.
    """

    def __init__(self, widths: tuple[int, int] = (32, 48), hidden: int = _HIDDEN) -> None:
        super().__init__()
        first, second = (check_integer("widths", width, "two whole numbers, 1 or more", least=1) for width in widths)
        check_integer("hidden", hidden, least=1)
        self.features = nn.Sequential(
            nn.Conv2d(3, first, 5),
            nn.BatchNorm2d(first),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(first, second, 5),
            nn.BatchNorm2d(second),
            nn.Dropout2d(),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Sequential(nn.Linear(16 * second, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    @classmethod
    def seeded(cls, seed: int = 0, **sizes: Any) -> DannCNN:
        """A network whose weights depend on the seed alone; the global random state is not changed.

        Example:
            >>> one, two = DannCNN.seeded(3), DannCNN.seeded(3)
            >>> bool((one.head[0].weight == two.head[0].weight).all())
            True
        """
        with state_guard(seed=derived_seed(seed, "weights")):
            return cls(**sizes)

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (N, 3, 28, 28), values in [0, 1], to logits (N, 10)."""
        logits: Tensor = self.head(self.features(images))
        return logits


class Adaptation(NamedTuple):
    """How training went, and the domain classifier that came of it.

    Args:
        class_loss: cross-entropy on the source batch of each step, (steps,).
        domain_loss: binary cross-entropy of the domain classifier, (steps,); log 2 = 0.69 where it can only guess.
            Empty without a target.
        critic: features (N, D) to the logit of "target", (N, 1); None without a target.
    """

    class_loss: Tensor
    domain_loss: Tensor
    critic: nn.Module | None


def train_adapted(
    model: nn.Module,
    source: Tensor,
    labels: Tensor,
    target: Tensor | None = None,
    *,
    steps: int,
    weight: float = 1.0,
    reverse: bool = True,
    lr: float = 1e-3,
    batch_size: int = 64,
    seed: int = 0,
    show_progress: bool = False,
) -> Adaptation:
    """Train a network in place on labelled source images and, without labels, on those of a target domain (DANN).

        loss = cross-entropy(head(f(source)), labels) + binary cross-entropy(critic(R(f(x))), domain of x)

    with f the network's ``features`` and R a :class:`GradientReversal` of weight
    ``weight * (2 / (1 + exp(-10 p)) - 1)`` at the share p of the steps. The critic, linear - ReLU - linear, learns to
    tell the domains; the reversal makes f learn to hide them. Adam, its rate falling to zero by a cosine. What is drawn
    depends on ``seed`` alone, and the global random state is as before afterwards. The network ends in eval mode.

    Args:
        model: has ``features``, from images to (N, D), and ``head``, from these to logits (N, K).
        source: (N, C, H, W), in model units.
        labels: their classes, (N,), int64.
        target: (M, C, H, W), images of the other domain; None trains on the source only.
        steps: number of steps, at least 1.
        weight: of the reversal at the end, 0 or more.
        reverse: False leaves the gradient unturned: features that tell the domains as well as they can.
        lr: Adam's learning rate at the start, above 0.
        batch_size: images of a step from *each* domain.
        seed: any integer.
        show_progress: a bar of the steps.

    Returns:
        An :class:`Adaptation`.

    Raises:
        InputError: no images, images of different shapes, or labels that do not fit them.
        ArgumentError: a number out of range.
        ModelError: the network has no ``features`` and ``head``, or features that are not (N, D).

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> x, y = torch.rand(40, 3, 28, 28, generator=draw), torch.arange(40) % 10
        >>> trained = train_adapted(DannCNN.seeded(0, widths=(4, 4)), x, y, x.flip(1), steps=3, batch_size=8)
        >>> trained.class_loss.shape, trained.domain_loss.shape
        (torch.Size([3]), torch.Size([3]))

    Source: Ganin et al. 2016 (arXiv 1505.07818), Algorithm 1 and section 5.2.2, whose optimiser is SGD.
    """
    check_integer("steps", steps, least=1)
    check_integer("batch_size", batch_size, least=1)
    check_number("lr", lr, "above zero", above=0)
    if check_number("weight", weight, "a finite number, 0 or more", below=math.inf) < 0:
        raise ArgumentError(expected("weight", "a finite number, 0 or more", weight))
    features, head = _parts(model)
    _check_images(source, labels, target)
    critic, reversal = None if target is None else _critic(features, source, seed), GradientReversal()
    trained = nn.ModuleList([features, head, *([] if critic is None else [critic])])
    optimizer = torch.optim.Adam([p for p in trained.parameters() if p.requires_grad], lr=lr)
    own = _batches(len(source), batch_size, generator(seed, "source"))
    other = _batches(0 if target is None else len(target), batch_size, generator(seed, "target"))
    losses = torch.zeros(2, steps)
    model.train()
    try:
        with torch.enable_grad(), torch.random.fork_rng():
            torch.manual_seed(derived_seed(seed, "dropout"))
            for step in tqdm(range(steps), desc="training", disable=not show_progress):
                optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
                chosen = next(own)
                x = source[chosen] if target is None else torch.cat([source[chosen], target[next(other)]])
                # Channels last is twice as fast on a CPU.
                z = features(x.contiguous(memory_format=torch.channels_last))
                class_loss, domain_loss = F.cross_entropy(head(z[: len(chosen)]), labels[chosen]), z.new_zeros(())
                if critic is not None:
                    reversal.weight = (1 if reverse else -1) * weight * _schedule(step / steps)
                    domain = (torch.arange(len(x), device=x.device) >= len(chosen)).to(z)
                    domain_loss = F.binary_cross_entropy_with_logits(critic(reversal(z))[:, 0], domain)
                optimizer.zero_grad()
                torch.autograd.backward(class_loss + domain_loss)
                optimizer.step()
                losses[:, step] = torch.stack([class_loss, domain_loss]).detach()
    finally:
        model.eval()
    return Adaptation(losses[0], losses[1, : 0 if critic is None else steps], critic and critic.eval())


def pseudo_labels(
    model: nn.Module, images: Tensor, *, confidence: float = 0.95, batch_size: int = 500
) -> tuple[Tensor, Tensor]:
    """The network's own answers, where it is confident: which images, and their supposed labels.

        {i : max_c P(c | x_i) >= confidence},   argmax_c P(c | x_i)

    Args:
        model: from images to logits (N, K).
        images: (N, C, H, W), in model units, without labels.
        confidence: least probability of the answer, in [0, 1].
        batch_size: images of a pass.

    Returns:
        Indices (M,) of the confident answers, ascending, and the answers (M,), both int64.

    Raises:
        ArgumentError: a number out of range.

    Example:
        >>> model = nn.Linear(1, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0], [0.0]]))
        >>> pseudo_labels(model, torch.tensor([[9.0], [0.1], [-9.0]]))
        (tensor([0, 2]), tensor([0, 1]))

    Source: Lee 2013, Pseudo-label, section 2.2; here labels are given once, to confident answers only.
    """
    check_integer("batch_size", batch_size, least=1)
    if not 0 <= check_number("confidence", confidence, "in [0, 1]") <= 1:
        raise ArgumentError(expected("confidence", "in [0, 1]", confidence))
    with state_guard(model), torch.no_grad():
        likely = torch.cat([model(x).softmax(1) for x in torch.split(images, batch_size)])
    sure, answer = likely.max(1)
    chosen = (sure >= confidence).nonzero().flatten()
    return chosen, answer[chosen]


def _schedule(share: float) -> float:
    """From 0 to 1, so that the critic's first guesses do no harm."""
    return 2 / (1 + math.exp(-_GAMMA * share)) - 1


def _parts(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    features, head = getattr(model, "features", None), getattr(model, "head", None)
    if not isinstance(features, nn.Module) or not isinstance(head, nn.Module):
        raise ModelError(expected("model", "a module with the modules `features` and `head`", type(model).__name__))
    return features, head


def _check_images(source: Tensor, labels: Tensor, target: Tensor | None) -> None:
    if not len(source) or labels.shape != source.shape[:1] or labels.is_floating_point():
        wanted = f"class indices ({len(source)},) of one image or more"
        raise InputError(expected("labels", wanted, f"{labels.dtype} of shape {tuple(labels.shape)}"))
    if target is not None and (not len(target) or target.shape[1:] != source.shape[1:]):
        wanted = f"one image or more of the source's shape {tuple(source.shape[1:])}"
        raise InputError(expected("target", wanted, f"shape {tuple(target.shape)}"))


def _critic(features: nn.Module, source: Tensor, seed: int) -> nn.Sequential:
    """The domain classifier for these features."""
    with state_guard(features, seed=derived_seed(seed, "critic")):
        found = features(source[:2])
        if found.dim() != 2:
            hint = "End `features` with nn.Flatten()."
            raise ModelError(expected("model", "one whose features are (N, D)", tuple(found.shape), hint))
        critic = nn.Sequential(nn.Linear(found.shape[1], _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, 1))
    return critic.to(source)


def _batches(n: int, size: int, draw: torch.Generator) -> Iterator[Tensor]:
    """Indices of batches without end: each image once, in random order, before any comes again."""
    rest = torch.zeros(0, dtype=torch.long)
    while True:
        while len(rest) < size:
            rest = torch.cat([rest, torch.randperm(n, generator=draw)])
        yield rest[:size]
        rest = rest[size:]
