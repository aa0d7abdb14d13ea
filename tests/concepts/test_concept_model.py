"""The autoencoder itself: shape, sign, tracing, what it belongs to, and its files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from _planted_layer import CHANNELS, SOURCES, Mixture, sources
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from ce_plugin.concepts import ConceptAutoencoder, Fidelity, fingerprint, train_autoencoder
from ce_plugin.errors import ArgumentError, FileError, InputError, ModelError, UnknownNameError
from ce_plugin.files import load, save


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.data())
def test_code_is_narrow_never_negative_and_of_the_same_size(channels: int, data: st.DataObject) -> None:
    concepts = data.draw(st.integers(1, channels - 1))
    kernel = data.draw(st.sampled_from([1, 3, 5]))
    height, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    autoencoder = ConceptAutoencoder(channels, concepts, kernel_size=kernel)
    h = torch.randn(2, channels, height, width)
    code = autoencoder.encode(h)
    assert code.shape == (2, concepts, height, width)
    assert bool((code >= 0).all())
    assert autoencoder.decode(code).shape == h.shape
    assert torch.equal(autoencoder(h), autoencoder.decode(code))


def test_there_are_five_convolutions_and_the_code_is_the_narrowest() -> None:
    autoencoder = ConceptAutoencoder(32, 4)
    widths = [m.out_channels for m in autoencoder.modules() if isinstance(m, nn.Conv2d)]
    assert len(widths) == 5
    assert min(widths) == widths[2] == 4


def test_weights_come_from_the_seed_and_leave_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (ConceptAutoencoder(8, 2, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["encoder.conv1.weight"], other["encoder.conv1.weight"])


def test_standardising_is_undone_by_the_decoder() -> None:
    """Activations shifted and stretched per channel give the same code and the reconstruction shifted and stretched."""
    plain = ConceptAutoencoder(6, 2).double()
    shifted = ConceptAutoencoder(6, 2).double()
    mean, scale = torch.randn(6).double(), torch.rand(6).double() + 0.5
    shifted.standardize(mean, scale)
    h = torch.randn(3, 6, 5, 5).double()
    moved = h * scale[:, None, None] + mean[:, None, None]
    torch.testing.assert_close(shifted.encode(moved), plain.encode(h))
    torch.testing.assert_close(shifted(moved), plain(h) * scale[:, None, None] + mean[:, None, None])


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_parts_can_be_traced_and_spliced(part: str) -> None:
    module = getattr(ConceptAutoencoder(6, 2), part)
    traced = fx.symbolic_trace(module)
    x = torch.randn(2, 6 if part == "encoder" else 2, 4, 4)
    assert torch.equal(traced(x), module(x))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"channels": 1, "concepts": 1}, "`channels` to be 2 or more, but got 1"),
        ({"channels": 8, "concepts": 0}, "`concepts` to be at least 1 and below channels = 8, but got 0"),
        ({"channels": 8, "concepts": 8}, "`concepts` to be at least 1 and below channels = 8, but got 8"),
        ({"channels": 8, "concepts": 2, "hidden": 0}, "`hidden` to be None or a positive"),
        ({"channels": 8, "concepts": 2, "kernel_size": 2}, "`kernel_size` to be a positive odd number, but got 2"),
    ],
)
def test_numbers_out_of_range(values: dict[str, int], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        ConceptAutoencoder(**values)


def test_other_activations_are_refused() -> None:
    autoencoder = ConceptAutoencoder(8, 2)
    for shape in ((1, 7, 4, 4), (1, 8), (8, 4, 4)):
        with pytest.raises(InputError, match=r"`activations` to be of shape \(N, 8, h, w\), but got"):
            autoencoder.encode(torch.zeros(shape))
    with pytest.raises(ArgumentError, match="`scale` to be above zero in every channel, but got 0"):
        autoencoder.standardize(torch.zeros(8), torch.zeros(8))
    with pytest.raises(ArgumentError, match=r"`mean` to be \(8,\), finite, but got \(1,\)"):
        autoencoder.standardize(torch.zeros(1), torch.ones(8))


@pytest.fixture(scope="module")
def trained() -> tuple[Mixture, ConceptAutoencoder]:
    network = Mixture()
    return network, train_autoencoder(network, "mix", sources(60), SOURCES, epochs=2)


def test_a_trained_one_knows_its_layer_and_network(trained: tuple[Mixture, ConceptAutoencoder]) -> None:
    network, autoencoder = trained
    assert autoencoder.layer_name == "mix"
    assert autoencoder.check(network, "mix") is autoencoder.check(network, network.mix) is autoencoder.fidelity
    with pytest.raises(ModelError, match=r"one for layer 'drop', but got one for layer 'mix'\. Train one"):
        autoencoder.check(network, "drop")
    other = Mixture(seed=2)
    with pytest.raises(
        ModelError, match=f"Mixture \\({fingerprint(other)}\\), but got one for network {fingerprint(network)}"
    ):
        autoencoder.check(other, "mix")
    with pytest.raises(UnknownNameError, match=r"but got 'mixx'. Did you mean 'mix'"):
        autoencoder.check(network, "mixx")


def test_the_same_network_wrapped_or_elsewhere_is_the_same() -> None:
    network = Mixture()
    name = fingerprint(network)
    assert fingerprint(nn.DataParallel(network)) == name
    assert fingerprint(Mixture().double()) == name
    conv = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    before = fingerprint(conv)
    assert fingerprint(conv.to(memory_format=torch.channels_last)) == before
    conv[1].num_batches_tracked += 1
    assert fingerprint(conv) == before
    conv[1].running_mean += 1e-3
    assert fingerprint(conv) != before


def test_a_poor_one_is_refused_with_its_numbers(trained: tuple[Mixture, ConceptAutoencoder]) -> None:
    network, autoencoder = trained
    good = autoencoder.fidelity
    assert good is not None
    try:
        autoencoder.fidelity = Fidelity(agreement=0.8, kl=0.5, outcome_change=0.25, n_images=40)
        assert autoencoder.check(network, "mix", 0.8) is autoencoder.fidelity
        words = r"keeps the top class of at least 90\.0% of the images, but got 80\.0% of 40 .*KL 0\.5, .*outcome 0\.25"
        with pytest.raises(ModelError, match=words):
            autoencoder.check(network, "mix", 0.9)
    finally:
        autoencoder.fidelity = good
    with pytest.raises(ModelError, match="but got one that was not trained"):
        ConceptAutoencoder(CHANNELS, 2).check(network, "mix", 0.9)
    with pytest.raises(ArgumentError, match=r"`min_fidelity` to be a share in \[0, 1\], but got 95"):
        autoencoder.check(network, "mix", 95)


def test_a_file_holds_all_of_it(trained: tuple[Mixture, ConceptAutoencoder], tmp_path: Path) -> None:
    network, autoencoder = trained
    file = autoencoder.save(tmp_path / "concepts.pt")
    loaded = ConceptAutoencoder.load(file)
    for key, value in autoencoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert loaded.check(network, "mix") == autoencoder.fidelity
    assert loaded.history == autoencoder.history
    assert loaded.config() == autoencoder.config()
    assert not loaded.training
    assert [path.name for path in tmp_path.iterdir()] == ["concepts.pt"]


def test_a_file_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    file = tmp_path / "concepts.pt"
    ConceptAutoencoder(8, 2).save(file)
    before = file.read_bytes()
    with pytest.raises(FileError, match=r"to be a new file, but got .*which exists. Pass force=True"):
        ConceptAutoencoder(8, 3).save(file)
    assert file.read_bytes() == before
    assert ConceptAutoencoder.load(ConceptAutoencoder(8, 3).save(file, force=True)).concepts == 3


def test_double_precision_survives_a_file(tmp_path: Path) -> None:
    autoencoder = ConceptAutoencoder(8, 2).double()
    h = torch.randn(1, 8, 3, 3).double()
    loaded = ConceptAutoencoder.load(autoencoder.save(tmp_path / "a.pt"))
    assert torch.equal(loaded(h), autoencoder(h))


def test_each_weight_keeps_its_type(tmp_path: Path) -> None:
    autoencoder = ConceptAutoencoder(8, 2)
    autoencoder.encoder.half()
    autoencoder.decoder.bfloat16()
    loaded = ConceptAutoencoder.load(autoencoder.save(tmp_path / "a.pt")).state_dict()
    assert all(loaded[key].dtype == value.dtype for key, value in autoencoder.state_dict().items())
    assert {value.dtype for value in loaded.values()} == {torch.float16, torch.bfloat16}


class Trap:
    """What a pickle may do when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.file,))


def test_what_is_no_such_file_is_said_and_not_run(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    with pytest.raises(FileError, match=r"written by ConceptAutoencoder.save, but got .*No such file"):
        ConceptAutoencoder.load(file)
    for content in (b"", b"GIF89a", b"PK\x03\x04 not really"):
        file.write_bytes(content)
        with pytest.raises(FileError, match=r"a\.pt', which is none"):
            ConceptAutoencoder.load(file)
    torch.save({"format": Trap(tmp_path / "sprung")}, file)
    with pytest.raises(FileError, match="which is none"):
        ConceptAutoencoder.load(file)
    assert not (tmp_path / "sprung").exists()
    torch.save(ConceptAutoencoder(8, 2).state_dict(), file)
    with pytest.raises(FileError, match="which holds something else"):
        ConceptAutoencoder.load(file)
    content = load(ConceptAutoencoder(8, 2).save(tmp_path / "b.pt"), "ConceptAutoencoder", 1)
    save(file, "ConceptAutoencoder", 99, content, force=True)
    with pytest.raises(FileError, match="version 1, but got version 99"):
        ConceptAutoencoder.load(file)
    save(file, "ConceptAutoencoder", 1, {**content, "config": {"channels": 8, "concepts": 3}}, force=True)
    with pytest.raises(FileError, match="which does not fit together"):
        ConceptAutoencoder.load(file)


def test_files_of_release_0_3_are_read(tmp_path: Path) -> None:
    made, file = ConceptAutoencoder(8, 2, seed=3), tmp_path / "old.pt"
    about = {"format": "ce_plugin concepts", "version": 1, "kind": "ConceptAutoencoder"}
    content = {"config": made.config(), "layer_name": "mix", "fingerprint": "0", "fidelity": None, "history": []}
    torch.save({**about, **content, "state": dict(made.state_dict())}, file)
    loaded = ConceptAutoencoder.load(file)
    assert loaded.layer_name == "mix"
    for key, value in made.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ConceptAutoencoder(8, 2).save(tmp_path / "a.pt")
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"can be written, but got .*No space left"):
        ConceptAutoencoder(8, 3).save(file, force=True)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
