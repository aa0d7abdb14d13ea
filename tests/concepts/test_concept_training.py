"""Training: what it finds, what it leaves alone, that it can be interrupted, and the routes that must agree."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from _planted_layer import CHANNELS, SOURCES, Mixture, matched_correlations, sources
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ce_plugin.concepts import ConceptAutoencoder, measure_fidelity, train_autoencoder
from ce_plugin.concepts.images import as_source
from ce_plugin.concepts.recorded import Recorded
from ce_plugin.concepts.training import independent_components, start_linear
from ce_plugin.errors import ArgumentError, FileError, InputError, ModelError, UnknownNameError
from ce_plugin.networks.guard import state_guard


def quick(
    network: nn.Module, layer: Any = "mix", images: Any = None, concepts: int = SOURCES, **options: Any
) -> ConceptAutoencoder:
    options = {"epochs": 2, "batch_size": 16, **options}
    return train_autoencoder(network, layer, sources(40) if images is None else images, concepts, **options)


def same_weights(one: nn.Module, other: nn.Module, atol: float = 0.0) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.allclose(a, b, atol=atol, rtol=0) for a, b in pairs)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_planted_sources_are_found(kernel_size: int) -> None:
    network = Mixture()
    trained = train_autoencoder(
        network, "mix", sources(300), SOURCES, kernel_size=kernel_size, epochs=12, lr=3e-3, lambda_interpretability=0.05
    )
    new = sources(100, seed=9)
    with torch.no_grad():
        code = trained.encode(network.mix(new))
    assert float(matched_correlations(code, new).min()) > 0.95
    assert trained.fidelity is not None
    assert trained.fidelity.agreement > 0.95
    # Untrained weights do not find them, so that the threshold means something.
    untrained = ConceptAutoencoder(CHANNELS, SOURCES, kernel_size=kernel_size)
    with torch.no_grad():
        assert float(matched_correlations(untrained.encode(network.mix(new)), new).min()) < 0.8


def test_every_term_falls_when_it_is_asked_for() -> None:
    """Against a training in which a term has weight zero, that term ends lower where it has a weight."""
    network, images = Mixture(), sources(80)
    options = {"epochs": 15, "lr": 3e-3, "concepts": 2}
    for term in ("shallow", "deep", "interpretability"):
        weights = {f"lambda_{name}": float(name == "shallow") for name in ("shallow", "deep", "interpretability")}
        if term == "shallow":
            weights = {"lambda_shallow": 0.0, "lambda_deep": 1.0, "lambda_interpretability": 0.0}
        without = quick(network, images=images, **options, **weights).history[-1]
        weights[f"lambda_{term}"] = 3.0
        with_it = quick(network, images=images, **options, **weights).history[-1]
        key = f"train_{term}"
        assert with_it[key] < 0.9 * without[key], (term, with_it[key], without[key])


class Careless(nn.Module):
    """Batch norm, dropout, in-place steps behind the layer, a skip connection round it, and ``view`` by batch size."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.layer = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1))
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6 * 36, 4)
        for parameter in self.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=g)

    def forward(self, x: Tensor) -> Tensor:
        n = x.size(0)
        x = self.norm(self.stem(x))
        x = self.layer(x) + x
        x += 0.1
        x = self.relu(x)
        logits: Tensor = self.head(self.drop(x).view(n, -1))
        return logits


class Branching(Careless):
    """The same, but torch.fx cannot trace it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if bool(x.sum() < 1e9) else super().forward(-x)


def photographs(n: int = 30, seed: int = 0) -> Tensor:
    return torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def test_the_network_and_the_random_state_are_left_alone() -> None:
    network = Careless().train()
    network.norm.eval()
    network.stem.requires_grad_(False)
    network.head.weight.grad = torch.ones_like(network.head.weight)
    handle = network.head.register_forward_hook(lambda *args: None)
    before = copy.deepcopy(network.state_dict())
    flags = [(m.training, tuple(m._forward_hooks)) for m in network.modules()]
    wanted = [p.requires_grad for p in network.parameters()]
    states = torch.get_rng_state()
    for options in ({}, {"interpretability": lambda code: 1 / 0}):
        try:
            quick(network, "layer", photographs(), 2, **options)
        except ZeroDivisionError:
            assert options
        else:
            assert not options
        assert all(torch.equal(network.state_dict()[key], value) for key, value in before.items())
        assert [(m.training, tuple(m._forward_hooks)) for m in network.modules()] == flags
        assert [p.requires_grad for p in network.parameters()] == wanted
        assert network.head.weight.grad is not None
        assert torch.equal(network.head.weight.grad, torch.ones_like(network.head.weight))
        assert network.layer[0].weight.grad is None
        assert torch.equal(torch.get_rng_state(), states)
    handle.remove()


def test_the_network_is_in_eval_mode() -> None:
    """With dropout on, the deep term would not vanish for a perfect reconstruction."""
    network = Careless().train()
    result = measure_fidelity(network, "layer", nn.Identity(), photographs())
    assert (result.agreement, result.kl, result.outcome_change) == (1.0, 0.0, 0.0)
    assert network.training


def test_equal_seeds_give_equal_autoencoders() -> None:
    network = Mixture()
    torch.manual_seed(1)
    one = quick(network)
    torch.manual_seed(2)
    assert same_weights(one, quick(network))
    assert not same_weights(one, quick(network, seed=1))


def test_memory_and_tracing_change_no_numbers() -> None:
    """Everything kept, nothing kept, and the whole network run for each batch."""
    images = photographs()
    kept = quick(Careless(), "layer", images, 2)
    run_again = quick(Careless(), "layer", images, 2, cache_bytes=0)
    whole = quick(Branching(), "layer", images, 2)
    neither = quick(Branching(), "layer", images, 2, cache_bytes=0)
    for other in (run_again, whole, neither):
        assert same_weights(kept, other, atol=1e-4)
        assert other.history[-1]["validation_total"] == pytest.approx(kept.history[-1]["validation_total"], rel=1e-3)


@pytest.mark.parametrize(("kind", "cut"), [(Careless, True), (Branching, False)])
def test_replacing_a_layers_output_is_what_a_hook_does(kind: type[nn.Module], cut: bool) -> None:
    network, images = kind().double(), photographs().double()
    new = torch.randn(7, 6, 6, 6).double()
    rows = list(range(3, 10))
    with state_guard(network):
        recorded = Recorded(network, "layer", as_source(images, network), None, batch_size=8, cache_bytes=1 << 20)
        assert (recorded.cut, recorded.cached) == (cut, True)
        batch = recorded.batch(rows)
        got = recorded.answer(new, batch)
        network.get_submodule("layer").register_forward_hook(lambda *args: new)
        torch.testing.assert_close(got, network(images[rows]), rtol=0, atol=1e-12)
        assert bool((got - batch.output).abs().max() > 0.01)


class InPlace(nn.Sequential):
    """What follows the layer works in place on the layer's output."""

    def __init__(self, traceable: bool) -> None:
        super().__init__(nn.Conv2d(1, 6, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(96, 4))
        self.traceable = traceable

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.traceable or bool(x.sum() < 1e9) else -x)


@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_steps_in_place_behind_the_layer_spoil_nothing(traceable: bool, cache_bytes: int) -> None:
    network, images = InPlace(traceable), photographs(9)
    with state_guard(network):
        recorded = Recorded(network, "0", as_source(images, network), None, batch_size=4, cache_bytes=cache_bytes)
        assert recorded.cut is traceable
        batch = recorded.batch([4, 2])
        assert torch.allclose(batch.activations, network[0](images[[4, 2]]), atol=1e-6)
        assert bool((batch.activations < 0).any())
        new = -batch.activations
        kept = new.clone()
        recorded.answer(new, batch)
        assert torch.equal(new, kept)
        torch.testing.assert_close(recorded.answer(batch.activations, batch), batch.output)


@pytest.mark.parametrize(("name", "layer"), [("resnet18", "layer3.0.conv1"), ("squeezenet1_1", "features.6.expand1x1")])
def test_real_networks_are_cut_also_where_something_by_passes_the_layer(name: str, layer: str) -> None:
    from torchvision.models import get_model

    network = get_model(name, weights=None).double()
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    with state_guard(network):
        recorded = Recorded(network, layer, as_source(images, network), None, batch_size=4, cache_bytes=1 << 30)
        assert recorded.cut
        batch = recorded.batch([2, 0, 1])
        new = batch.activations.flip(1)
        got = recorded.answer(new, batch)
        network.get_submodule(layer).register_forward_hook(lambda *args: new.clone())
        want = network(images[[2, 0, 1]])
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(got, batch.output, rtol=1e-6, atol=0)


def test_every_term_of_every_epoch_is_kept_and_progress_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    trained = quick(Mixture(), epochs=3, lambda_deep=2.0)
    assert capsys.readouterr() == ("", "")
    assert [record["epoch"] for record in trained.history] == [1, 2, 3]
    for record in trained.history:
        for part in ("train", "validation"):
            shallow, deep, other, total = (
                record[f"{part}_{key}"] for key in ("shallow", "deep", "interpretability", "total")
            )
            assert total == pytest.approx(shallow + 2.0 * deep + 0.1 * other, rel=1e-5)
    quick(Mixture(), epochs=3, show_progress=True)
    shown = capsys.readouterr().err
    assert "activations of mix" in shown
    assert "3/3" in shown


class StopError(Exception):
    """What stands for a power cut."""


def interrupted(after: int, error: type[BaseException]) -> Any:
    calls = [0]

    def plain_sparsity(code: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] > after:
            raise error
        return code.mean()

    return plain_sparsity


@pytest.mark.parametrize("error", [KeyboardInterrupt, StopError])
@pytest.mark.parametrize("steps", [0, 1, 4, 7])
def test_an_interrupted_training_goes_on_as_if_it_had_not_been(
    error: type[BaseException], steps: int, tmp_path: Path
) -> None:
    """Two steps and one check per epoch: interrupted before, within, and between epochs."""
    network, file = Mixture(), tmp_path / "checkpoint.pt"
    options = {"epochs": 4, "batch_size": 16, "patience": 2}
    straight = quick(network, interpretability=interrupted(10**9, error), **options)
    with pytest.raises(error):
        quick(network, interpretability=interrupted(steps, error), checkpoint=file, **options)
    assert all(parameter.requires_grad for parameter in network.parameters())
    resumed = quick(network, interpretability=interrupted(10**9, error), checkpoint=file, **options)
    assert same_weights(straight, resumed)
    assert straight.history == resumed.history
    assert straight.fidelity == resumed.fidelity
    assert list(tmp_path.iterdir()) == [file]
    again = quick(network, interpretability=interrupted(0, error), checkpoint=file, **options)
    assert same_weights(straight, again)  # all done: not one step was made


def test_more_epochs_can_be_asked_for_later(tmp_path: Path) -> None:
    network, file = Mixture(), tmp_path / "checkpoint.pt"
    quick(network, epochs=2, checkpoint=file)
    assert same_weights(quick(network, epochs=3, checkpoint=file), quick(network, epochs=3))


def test_checkpoints_of_something_else_are_refused(tmp_path: Path) -> None:
    network, file = Mixture(), tmp_path / "checkpoint.pt"
    quick(network, checkpoint=file)
    before = file.read_bytes()
    with pytest.raises(ArgumentError, match=r"one with concepts=2, but got one with concepts=3\. Choose another file"):
        quick(network, concepts=2, checkpoint=file)
    with pytest.raises(ArgumentError, match=r"one with lr=0.5, seed=3, but got one with lr=0.001, seed=0"):
        quick(network, lr=0.5, seed=3, checkpoint=file)
    with pytest.raises(
        ModelError, match=r"one of layer 'mix' of this network .*, but got one of layer 'mix' of network"
    ):
        quick(Mixture(seed=2), checkpoint=file)
    with pytest.raises(ArgumentError, match="one of these 32 images, but got one of others"):
        quick(network, images=3 * sources(40), checkpoint=file)
    with pytest.raises(ArgumentError, match="one of these 16 images, but got one of 32 others"):
        quick(network, images=sources(20), checkpoint=file)
    assert file.read_bytes() == before
    file.write_text("notes")
    with pytest.raises(FileError, match=r"a checkpoint of train_autoencoder, but got .*which is none"):
        quick(network, checkpoint=file)
    ConceptAutoencoder(CHANNELS, 2).save(file, force=True)
    with pytest.raises(FileError, match="which holds something else"):
        quick(network, checkpoint=file)


def test_training_stops_early_and_keeps_the_best_epoch() -> None:
    """At a rate that destroys what the start had, the first epoch is the best one."""
    network = Mixture()
    trained = quick(network, epochs=30, lr=3.0, patience=3)
    losses = [record["validation_total"] for record in trained.history]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 3 < 30
    rates = [record["lr"] for record in trained.history]
    assert rates[best : best + 2] == [rates[best]] * 2
    assert rates[-1] < rates[best]
    stopped_there = quick(network, epochs=best + 1, lr=3.0, patience=3)
    assert same_weights(trained, stopped_there)


class Pairs(Dataset[tuple[Tensor, int]]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], index


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(sources(4))


def test_images_come_in_every_form() -> None:
    network, images = Mixture(), sources(40)
    want = quick(network, images=images)
    loader = DataLoader(Pairs(images), batch_size=7, shuffle=True)
    for form in (Pairs(images), TensorDataset(images), loader, list(images), images.double()):
        assert same_weights(want, quick(network, images=form))


def test_own_held_out_images_are_the_ones_that_are_looked_at() -> None:
    network, held = Mixture(), sources(11, seed=5)
    trained = quick(network, validation=held)
    assert trained.fidelity == measure_fidelity(network, "mix", trained, held)
    assert trained.fidelity is not None
    assert trained.fidelity.n_images == 11


def test_networks_with_several_labels_or_outputs() -> None:
    class Dictionary(Mixture):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x), "n": torch.tensor(len(x))}

    network = Dictionary()
    with pytest.raises(ModelError, match=r"returns logits .*, but got several heads \(logits, n\)\. Name the part"):
        quick(network)
    one = quick(network, output="logits")
    assert same_weights(one, quick(network, output=lambda result: result["logits"]), atol=1e-6)
    several = quick(network, output="logits", outcome="sigmoid")
    assert several.history[0]["train_deep"] != one.history[0]["train_deep"]
    single = quick(network, output=lambda result: result["logits"][:, :1], outcome="sigmoid")
    assert single.fidelity is not None
    with pytest.raises(ArgumentError, match="`outcome` to be 'sigmoid' where the network has one output"):
        quick(network, output=lambda result: result["logits"][:, :1])


def test_a_term_of_ones_own_replaces_ours() -> None:
    network = Mixture()
    plain = quick(network, interpretability=lambda code: code.abs().mean(), lambda_interpretability=50.0, epochs=10)
    ours = quick(network, lambda_interpretability=0.0, epochs=10)
    x = network.mix(sources(20)).detach()
    assert plain.encode(x).mean().item() < 0.5 * ours.encode(x).mean().item()
    with pytest.raises(ArgumentError, match=r"`interpretability` to be None or a callable .*, but got 0.5"):
        quick(network, interpretability=0.5)


def test_training_works_where_gradients_are_off() -> None:
    network = Mixture()
    want = quick(network)
    with torch.no_grad():
        assert same_weights(want, quick(network))


def test_dead_channels_and_fewer_directions_than_concepts() -> None:
    """A layer of rank 3 with constant channels, and more concepts than it has directions."""
    network = Mixture()
    network.mix.weight.data[:2] = 0.0
    trained = quick(network, concepts=6)
    assert all(bool(p.isfinite().all()) for p in trained.parameters())
    assert trained.fidelity is not None
    assert trained.fidelity.agreement > 0.8


@pytest.mark.parametrize("value", [0.0, 1e3])
def test_a_layer_that_never_varies(value: float) -> None:
    network = Mixture()
    network.mix.weight.data.zero_()
    network.mix.bias.data.fill_(value)
    trained = quick(network)
    assert all(bool(p.isfinite().all()) for p in trained.parameters())
    torch.testing.assert_close(
        trained(torch.full((1, CHANNELS, 8, 8), value)).mean().item(), value, rtol=1e-3, atol=0.1
    )


def test_components_of_a_mixture_are_its_sources() -> None:
    """Skewed independent sources, mixed at random: found up to order, with their longer tails above zero."""
    g = torch.Generator().manual_seed(0)
    truth = torch.rand(5000, 3, generator=g).double() ** 8 - 1 / 9
    mixing = torch.randn(6, 3, generator=g).double()
    data = truth @ mixing.T
    unmixing, back = independent_components(data - data.mean(0), 5, seed=0)
    assert unmixing.shape == (3, 6)  # no more directions than there are
    found = (data - data.mean(0)) @ unmixing.T
    torch.testing.assert_close(found.square().mean(0), torch.ones(3).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(found @ back.T, data - data.mean(0), rtol=0, atol=1e-5)
    table = torch.corrcoef(torch.cat([truth.T, found.T]))[:3, 3:]
    assert bool((table.amax(1) > 0.98).all())


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_the_start_is_linear(kernel_size: int) -> None:
    """Code and reconstruction of the first weights, against two matrix products."""
    autoencoder = ConceptAutoencoder(6, 3, hidden=5, kernel_size=kernel_size).double()
    g = torch.Generator().manual_seed(0)
    mean, scale = torch.randn(6, generator=g).double(), torch.rand(6, generator=g).double() + 0.5
    autoencoder.standardize(mean, scale)
    vectors = mean + torch.randn(4000, 6, generator=g).double() ** 3
    start_linear(autoencoder, vectors)
    unmixing, mixing = independent_components(vectors - mean, 3, seed=0)
    signals = (vectors - mean) @ unmixing.T
    lowest = signals.quantile(0.01, dim=0)
    code = autoencoder.encode(vectors[:, :, None, None])[:, :, 0, 0]
    torch.testing.assert_close(code, (signals - lowest).relu())
    restored = autoencoder.decode(code[:, :, None, None])[:, :, 0, 0]
    torch.testing.assert_close(restored, (code + lowest) @ mixing.T + mean)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"concepts": 0}, "`concepts` to be at least 1, but got 0"),
        ({"concepts": CHANNELS}, f"`concepts` to be at least 1 and below the {CHANNELS} channels of layer 'mix'"),
        ({"lambda_deep": -1.0}, "`lambda_deep` to be zero or more, but got -1.0"),
        ({"lambda_interpretability": float("nan")}, "`lambda_interpretability` to be zero or more, but got nan"),
        ({"lambda_shallow": 0.0, "lambda_deep": 0.0}, "`lambda_shallow` to be above zero where lambda_deep is zero"),
        ({"epochs": 0}, "`epochs` to be 1 or more, but got 0"),
        ({"batch_size": 0}, "`batch_size` to be 1 or more"),
        ({"patience": 0}, "`patience` to be 1 or more"),
        ({"lr": 0.0}, "`lr` to be above zero"),
        ({"validation": 1.0}, r"`validation` to be a share in \(0, 1\), or images, but got 1.0"),
        ({"outcome": "logit"}, "`outcome` to be one of"),
        ({"kernel_size": 2}, "`kernel_size` to be a positive odd number"),
    ],
)
def test_numbers_out_of_range_stop_it_before_any_work(options: dict[str, Any], words: str) -> None:
    network, seen = Mixture(), []
    network.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    with pytest.raises(ArgumentError, match=words):
        quick(network, **options)
    assert sum(seen) <= 1


class Shared(Mixture):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x)


def test_layers_that_cannot_be_used() -> None:
    network = Mixture()
    with pytest.raises(
        ModelError, match=r"`layer` to be a layer \('head'\) that returns \(N, C, h, w\), N = 1, but got \(1, 5\)"
    ):
        quick(network, "head")
    with pytest.raises(ModelError, match=r"reached once in a pass .*, but got one that is reached 2 times"):
        quick(Shared())
    network.spare = nn.Conv2d(1, 4, 1)
    with pytest.raises(ModelError, match=r"\('spare'\), but got one that is not reached"):
        quick(network, "spare")
    with pytest.raises(ModelError, match="`layer` to be a module of the network, but got another Conv2d"):
        quick(network, nn.Conv2d(1, 1, 1))
    with pytest.raises(
        UnknownNameError, match=r"one of 'drop', 'head', 'mix', 'spare', but got 'mixx'\. Did you mean 'mix'"
    ):
        quick(network, "mixx")
    with pytest.raises(ArgumentError, match="`layer` to be a submodule of the network or its dotted name, but got 3"):
        quick(network, 3)
    with pytest.raises(ModelError, match=r"`network` to be a torch.nn.Module, but got function"):
        quick(lambda x: x)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(10, 1, 8, 8), r"images that the Mixture takes, but got \(1, 1, 8, 8\), at which it fails"),
        (
            torch.zeros(10, 3, 8, 8).long(),
            r"floating point, as the network takes them, but got \(10, 3, 8, 8\) of torch.int64",
        ),
        (torch.full((10, 3, 8, 8), float("nan")), "`images` to be finite, but got NaN"),
        (torch.zeros(1, 3, 8, 8), "at least 2 images, but got 1"),
        (Stream(), "a Dataset with a length, or a DataLoader of one, but got Stream"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)], r"of one shape, but got \[\(3, 8, 8\), \(3, 9, 9\)\]"),
        ([[1, 2], [3, 4]], r"floating point tensors, as the network takes them, but got int \(item 0\)"),
    ],
)
def test_images_that_cannot_be_used(images: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        quick(Mixture(), images=images)


def test_a_loss_that_is_no_longer_finite_is_said() -> None:
    with pytest.raises(ArgumentError, match="`lr` to be so small that the loss stays finite, but got 1e"):
        quick(Mixture(), lr=1e30, epochs=5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_on_a_gpu_and_back() -> None:
    network = Mixture()
    trained = quick(network, device="cuda")
    assert next(network.parameters()).device.type == "cpu"
    assert trained.fidelity is not None
    assert trained.history[-1]["validation_total"] == pytest.approx(
        quick(network).history[-1]["validation_total"], rel=0.05
    )
