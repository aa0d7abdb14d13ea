"""ClassCounterfactual, ClassInfill and infer_latents: closed forms on a linear generator, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from ce_plugin import CausalEffect
from ce_plugin.designs import OneAtATime
from ce_plugin.errors import ArgumentError, InputError, ModelError, TargetError
from ce_plugin.interventions import ClassCounterfactual, ClassInfill, PixelMask, infer_latents

SHAPE = (1, 4, 4)
# Far enough for a linear generator, in milliseconds.
EXACT = {"steps": 250, "starts": 1, "lr": 0.1}


class Linear(nn.Module):
    """G(z, y) = W z + m_y: the most likely z has a closed form."""

    latent, classes = 3, 4

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(16, 3, generator=draw, dtype=torch.float64))
        self.means = nn.Parameter(torch.randn(4, 16, generator=draw, dtype=torch.float64))
        self.drop = nn.Dropout(0.5)  # of no effect in eval mode alone

    def forward(self, z: Tensor, classes: Tensor) -> Tensor:
        made: Tensor = self.drop(z @ self.weight.T + self.means[classes]).reshape(-1, *SHAPE)
        return made

    def posterior(self, x: Tensor, y: int, noise: float, known: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The most likely z of each picture, by the normal equations, and the sum that it minimises."""
        keep = torch.ones(16, dtype=torch.float64) if known is None else known.flatten().double()
        weight = self.weight.detach() * keep[:, None] / noise
        rest = (x.flatten(1) - self.means.detach()[y]) * keep / noise
        z = torch.linalg.solve(weight.T @ weight + torch.eye(3, dtype=torch.float64), weight.T @ rest.T).T
        return z, z.square().sum(1) + (rest - z @ weight.T).square().sum(1)


def pictures(n: int = 3) -> Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def left() -> Tensor:
    return torch.tensor([True, True, False, False]).expand(SHAPE)


@pytest.mark.parametrize("noise", [0.3, 2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_latents_are_the_most_likely_ones(noise: float, masked: bool) -> None:
    make, x, known = Linear(), pictures(), left() if masked else None
    z, misfit = infer_latents(make, x, torch.full((3,), 2), known=known, noise=noise, **EXACT)  # type: ignore[arg-type]
    expected, least = make.posterior(x, 2, noise, known)
    torch.testing.assert_close(z, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(misfit, least, atol=1e-4, rtol=1e-6)


def test_latents_do_not_depend_on_the_batch_and_several_starts_are_never_worse() -> None:
    make, x, y = Linear(), pictures(), torch.tensor([0, 1, 2])
    short = {"steps": 5, "starts": 3}
    together, misfit = infer_latents(make, x, y, ids=[4, 5, 6], **short)  # type: ignore[arg-type]
    alone, _ = infer_latents(make, x[1:2], y[1:2], ids=[5], **short)  # type: ignore[arg-type]
    torch.testing.assert_close(together[1:2], alone)
    _, single = infer_latents(make, x, y, ids=[4, 5, 6], steps=5, starts=1)
    assert bool((misfit <= single + 1e-9).all())
    other, _ = infer_latents(make, x, y, ids=[4, 5, 6], seed=1, **short)  # type: ignore[arg-type]
    assert not torch.equal(together, other)


def test_the_class_is_set_and_the_latents_stay() -> None:
    """On a linear network the effect of do(class = c) on a logit is its weights times the difference of the means."""
    make, z = Linear().train(), torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = (z @ make.weight.T + make.means[1]).detach().reshape(-1, *SHAPE)
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2).double())
    do = ClassCounterfactual(make, 3, latents=z)
    explainer = CausalEffect(network, do, OneAtATime(), outcome="logit")
    found = explainer.estimate(x, feature_mask=torch.zeros(1, *SHAPE, dtype=torch.long)).effect
    change = (make.means[3] - make.means[1]).detach() @ network[1].weight.detach().T
    torch.testing.assert_close(found, change.expand(3, 1, 2))
    # Pixel by pixel the effects are those of the pixels, and sum to the whole on a linear network.
    torch.testing.assert_close(explainer.estimate(x).effect.sum(1), found[:, 0])
    assert make.training
    assert make.drop.training
    assert all(p.requires_grad and p.grad is None for p in make.parameters())


@pytest.mark.parametrize("source", [1, torch.tensor([1, 1, 1]), None])
def test_pictures_whose_latents_are_not_known(source: int | Tensor | None) -> None:
    """The generator's own pictures, of another class; the class that they have is found where it is not given."""
    make, z = Linear().eval(), torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = make(z, torch.tensor([1, 1, 1])).detach()
    made = ClassCounterfactual(make, 3, source=source, noise=0.001, **EXACT)(x)  # type: ignore[arg-type]
    torch.testing.assert_close(made, make(z, torch.tensor([3, 3, 3])).detach(), atol=1e-3, rtol=0)


def test_each_example_keeps_its_own_latents_in_parts_of_a_batch() -> None:
    make, z = Linear().eval(), torch.arange(15, dtype=torch.float64).reshape(5, 3)
    x = make(z, torch.zeros(5, dtype=torch.long)).detach()
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2).double())
    explainer = CausalEffect(network, ClassCounterfactual(make, 2, latents=z), OneAtATime(), outcome="logit")
    whole = explainer.estimate(x, perturbations_per_eval=1)
    parts = [
        CausalEffect(network, ClassCounterfactual(make, 2, latents=z[i : i + 1]), OneAtATime(), outcome="logit")
        .estimate(x[i : i + 1])
        .effect
        for i in range(5)
    ]
    torch.testing.assert_close(whole.effect, torch.cat(parts))


def test_units_are_those_of_images() -> None:
    make, z = Linear().eval(), torch.zeros(3, 3, dtype=torch.float64)
    do = ClassCounterfactual(make, 3, latents=z, normalization=(0.5, 0.25))
    torch.testing.assert_close(do(pictures()) * 0.25 + 0.5, make(z, torch.full((3,), 3)).detach())


def test_infill_paints_what_the_class_has_there_given_what_is_visible() -> None:
    make, x, noise = Linear().eval(), pictures(), 0.3
    z, _ = make.posterior(x, 2, noise, ~left())
    wanted = torch.where(left(), make(z, torch.full((3,), 2)).detach(), x)
    fill = ClassInfill(make, 2, noise=noise, **EXACT)  # type: ignore[arg-type]
    torch.testing.assert_close(fill(x, left().expand_as(x)), wanted, atol=1e-3, rtol=0)
    torch.testing.assert_close(PixelMask(fill, region=left())(x), wanted, atol=1e-3, rtol=0)


def test_infill_in_an_explanation_is_asked_anew_for_each_trial() -> None:
    """Brute force: each quarter masked by itself, painted by the normal equations, on a linear network."""
    make, x, noise = Linear().eval(), pictures(2), 0.3
    network = nn.Sequential(nn.Flatten(), nn.Linear(16, 2).double())
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])[None, None]
    do = PixelMask(ClassInfill(make, 0, noise=noise, **EXACT))  # type: ignore[arg-type]
    found = CausalEffect(network, do, OneAtATime(), outcome="logit").estimate(x, feature_mask=mask).effect
    for unit in range(4):
        hidden = (mask == unit)[0]
        z, _ = make.posterior(x, 0, noise, ~hidden)
        painted = torch.where(hidden, make(z, torch.zeros(2, dtype=torch.long)), x)
        with torch.no_grad():
            torch.testing.assert_close(found[:, unit], network(painted) - network(x), atol=1e-3, rtol=0)


def test_infill_without_a_class_takes_the_one_that_fits_best() -> None:
    make, x, noise = Linear().eval(), pictures(), 0.3
    misfits = torch.stack([make.posterior(x, c, noise, ~left())[1] for c in range(4)])
    best = misfits.argmin(0)
    found = ClassInfill(make, noise=noise, **EXACT)(x, left().expand_as(x))  # type: ignore[arg-type]
    for i, c in enumerate(best.tolist()):
        alone = ClassInfill(make, c, noise=noise, **EXACT)(x[i : i + 1], left()[None])  # type: ignore[arg-type]
        torch.testing.assert_close(found[i : i + 1], alone)


def test_nothing_random_is_touched_and_text_says_what_it_is() -> None:
    before = torch.get_rng_state()
    do = ClassCounterfactual(Linear(), 3, source=1, steps=2, starts=2)
    do(pictures())
    assert torch.equal(torch.get_rng_state(), before)
    assert repr(do) == "ClassCounterfactual(target_class=3, source=1, steps=2, starts=2, lr=0.1, noise=0.2)"
    assert do.forward_equivalents == 13
    assert repr(ClassInfill(Linear())) == "ClassInfill(target_class=None, steps=60, starts=4, lr=0.1, noise=0.2)"


def test_errors() -> None:
    make, x = Linear(), pictures()
    with pytest.raises(ModelError, match=r"`generator`.*without latent and classes"):
        ClassInfill(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="`target_class` to be a class in 0 to 3, but got 4"):
        ClassCounterfactual(make, 4)
    with pytest.raises(TargetError, match="`source`"):
        ClassCounterfactual(make, 0, source=torch.tensor([0.5]))
    for name, value in (("steps", 0), ("starts", 0), ("lr", 0.0), ("noise", -1.0)):
        with pytest.raises(ArgumentError, match=f"argument `{name}`"):
            ClassCounterfactual(make, 0, **{name: value})  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"`latents` to be of shape \(N, 3\)"):
        ClassCounterfactual(make, 0, latents=torch.zeros(2, 4))
    with pytest.raises(InputError, match="`latents` to be one row for each example"):
        ClassCounterfactual(make, 0, latents=torch.zeros(2, 3).double())(x)
    with pytest.raises(ModelError, match="`generator` to be one of pictures"):
        infer_latents(make, x[..., :2], torch.zeros(3, dtype=torch.long), steps=1)
    with pytest.raises(TargetError, match=r"`classes` to be whole numbers \(3,\)"):
        infer_latents(make, x, torch.zeros(2, dtype=torch.long))
    unlabelled = Linear()
    unlabelled.classes = 0
    with pytest.raises(ModelError, match="one of classes"):
        ClassInfill(unlabelled)
