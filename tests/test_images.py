"""Photographs become tensors; whatever cannot be read says so and says what to do."""

from __future__ import annotations

import io
import os
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ce_plugin.datasets import read_image, sample_photographs
from ce_plugin.errors import ArgumentError, CEPluginWarning, FileError, InputError
from ce_plugin.models import Framing, as_batch


def _save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_rgb_png_is_read_exactly(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    read = read_image(_save(Image.fromarray(pixels), tmp_path / "a.png"))
    assert read.dtype == torch.uint8
    assert (read.permute(1, 2, 0).numpy() == pixels).all()


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    # Orientation 6: the camera was turned; the stored top row is the right column of the upright picture.
    stored = np.zeros((2, 4, 3), dtype=np.uint8)
    stored[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    read = read_image(_save(Image.fromarray(stored), tmp_path / "a.png", exif=exif))
    assert read.shape == (3, 4, 2)
    assert (read[:, :, 1] == 255).all()
    assert (read[:, :, 0] == 0).all()


def test_grayscale_becomes_three_equal_channels(tmp_path: Path) -> None:
    read = read_image(_save(Image.new("L", (3, 2), 77), tmp_path / "a.png"))
    assert (read == 77).all()
    assert read.shape == (3, 2, 3)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    deep = Image.fromarray(np.full((2, 2), 257 * 100, dtype=np.uint16))
    assert (read_image(_save(deep, tmp_path / "a.png")) == 100).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_shown_on_white(tmp_path: Path, mode: str) -> None:
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    if mode == "P":
        flat = Image.new("P", (2, 2), 0)
        flat.putpalette([10, 20, 30])
        file = _save(flat, tmp_path / "a.png", transparency=0)
    else:
        file = _save(clear.convert(mode), tmp_path / "a.png")
    assert (read_image(file) == 255).all()


def test_cmyk_is_read(tmp_path: Path) -> None:
    read = read_image(_save(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), tmp_path / "a.jpg"))
    assert (read > 250).all()


@pytest.mark.parametrize("cut", [20, 150, 400])
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "gif"])
def test_truncated_files_are_refused_for_every_format(tmp_path: Path, kind: str, cut: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    file = tmp_path / f"a.{kind}"
    file.write_bytes(buffer.getvalue()[:cut])
    with pytest.raises(FileError, match=r"Expected argument `image` to be a .*picture.*a\."):
        read_image(file)


@given(st.sampled_from(["jpeg", "png", "webp", "tiff", "gif", "bmp", "ppm"]), st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_picture_is_a_picture_or_our_error(kind: str, data: st.DataObject) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(data.draw(st.sampled_from(["RGB", "L"]))).save(buffer, format=kind)
    whole = buffer.getvalue()
    first = data.draw(st.integers(0, len(whole) - 1) | st.integers(0, 60))
    damaged = (
        whole[:first] + data.draw(st.binary(min_size=1, max_size=8)) + whole[first + data.draw(st.integers(0, 9)) :]
    )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, and about ranges of values
        file = Path(folder, "a")
        file.write_bytes(damaged)
        try:
            read = read_image(file)
        except FileError:
            return
        assert read.dtype == torch.uint8
        assert read.dim() == 3


def test_missing_file_folder_and_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"an existing file, but got .*none.jpg"):
        read_image(tmp_path / "none.jpg")
    with pytest.raises(FileError, match=r"the folder .*Name its files"):
        read_image(tmp_path)
    text = tmp_path / "notes.jpg"
    text.write_text("not a picture")
    with pytest.raises(FileError, match=r"a picture in a known format.*notes.jpg.*Convert it"):
        read_image(text)
    empty = tmp_path / "empty.png"
    empty.touch()
    with pytest.raises(FileError, match=r"empty\.png"):
        read_image(empty)


@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_wide_values_are_scaled_by_their_range_and_it_is_said(tmp_path: Path, dtype: str) -> None:
    levels = np.linspace(0, 255, 64).reshape(8, 8)
    file = _save(Image.fromarray(levels.round().astype(dtype)), tmp_path / "a.tiff")
    with pytest.warns(CEPluginWarning, match=r"a\.tiff holds .* from 0 to 255, .* of 0 \(black\) to 255 \(white\)"):
        assert read_image(file)[1].tolist() == levels.round().tolist()
    deep = _save(Image.fromarray((257 * levels.round()).astype(dtype)), tmp_path / "b.tiff")
    with pytest.warns(CEPluginWarning, match=r"to 65535 \(white\)"):
        assert read_image(deep)[1].tolist() == levels.round().tolist()


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_sixteen_bits_are_scaled_by_their_type_even_where_it_is_dark(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, kind: str
) -> None:
    dark = Image.fromarray(np.array([[0, 200], [257, 2570]], dtype=np.uint16))
    assert read_image(_save(dark, tmp_path / f"a.{kind}"))[0].tolist() == [[0, 1], [1, 10]]
    unit = Image.fromarray(np.array([[0.0, 0.5], [0.25, 1.0]], dtype=np.float32))
    assert read_image(_save(unit, tmp_path / "b.tiff"))[0].tolist() == [[0, 128], [64, 255]]
    assert not recwarn.list


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0, 65536.0, 1e30])
def test_values_without_a_range_are_refused(tmp_path: Path, value: float) -> None:
    file = _save(Image.fromarray(np.array([[0.5, value]], dtype=np.float32)), tmp_path / "a.tiff")
    with pytest.raises(FileError, match=r"finite values from 0 to 1, 255 or 65535, but got .*a\.tiff"):
        read_image(file)
    if abs(value) < 1e9:
        file = _save(Image.fromarray(np.array([[5, value]], dtype=np.int32)), tmp_path / "b.tiff")
        with pytest.raises(FileError, match="whose values range from"):
            read_image(file)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _save(Image.new("L", (40, 30)), tmp_path / "a.png")
    for limit in (1199, 599, 10):  # a little above, and above twice of what Pillow warns for
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(
            FileError, match=rf"a picture of at most {limit} pixels, but .*Make it smaller.*Or raise PIL"
        ):
            read_image(file)
    for allowed in (1200, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", allowed)
        assert read_image(file).shape == (3, 30, 40)


def test_a_large_picture_in_a_small_file_takes_no_memory(tmp_path: Path) -> None:
    import resource

    Image.new("1", (13_000, 13_000)).save(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size < 500_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FileError, match="13000 x 13000"):
        read_image(tmp_path / "a.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    for place in (tmp_path / "pipe.png", "/dev/zero", tmp_path / "loop.png", tmp_path / ("x" * 300), ""):
        with pytest.raises(FileError, match="Expected argument `image` to be a"):
            read_image(place)
    for wrong in (None, 3, b"a.png", "a\0.png"):
        with pytest.raises(ArgumentError, match="`image` to be a file name"):
            read_image(wrong)  # type: ignore[arg-type]


def test_a_mode_that_cannot_be_shown_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(image: Image.Image, mode: str) -> None:
        raise ValueError("conversion from LAB to RGB not supported")  # as before Pillow 10

    monkeypatch.setattr(Image.Image, "convert", unknown)
    with pytest.raises(FileError, match=r"of mode LAB\. Convert it to RGB"):
        read_image(_save(Image.new("LAB", (4, 4)), tmp_path / "a.tiff"))


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"a\nb.png", "日本.png".encode(), b"=1+1.png"])
def test_names_of_every_kind_are_read(tmp_path: Path, name: bytes) -> None:
    assert read_image(_save(Image.new("L", (3, 2), 77), tmp_path / os.fsdecode(name))).shape == (3, 2, 3)


def test_a_thread_of_a_picture_is_refused() -> None:
    Framing(224)(torch.zeros(3, 10, 2000, dtype=torch.uint8))
    for shape in ((3, 1, 201), (3, 60_000, 1)):
        with pytest.raises(InputError, match="at most 200 times as long as wide"):
            Framing(224)(torch.zeros(shape, dtype=torch.uint8))


def test_gray_is_luma_in_whole_steps() -> None:
    colour = torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None].expand(3, 4, 4)
    batch = as_batch([colour], Framing(4), value_range=(0, 255), grayscale=True)
    assert batch.shape == (1, 1, 4, 4)
    assert (batch == round(0.299 * 10 + 0.587 * 20 + 0.114 * 30)).all()
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    for picture in (levels, levels.expand(3, 16, 16)):
        assert torch.equal(as_batch([picture], Framing(16), value_range=(0, 255), grayscale=True)[0], levels.float())


def test_framing_keeps_the_centre() -> None:
    image = torch.zeros(3, 20, 40, dtype=torch.uint8)
    image[:, :, 10:30] = 200
    assert (Framing(20, interpolation="nearest")(image) == 200).all()


def test_framing_resizes_the_shorter_side() -> None:
    wide, high = torch.zeros(3, 30, 60), torch.zeros(3, 60, 30)
    assert Framing(8, resize=10)(wide).shape == Framing(8, resize=10)(high).shape == (3, 8, 8)
    # A constant picture stays constant, whatever the interpolation.
    for interpolation in ("bilinear", "bicubic", "nearest"):
        assert (Framing(8, 10, interpolation)(torch.full((3, 31, 57), 9, dtype=torch.uint8)) == 9).all()


def test_framing_enlarges_small_pictures() -> None:
    assert Framing(32)(torch.zeros(3, 5, 4)).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "`size` to be a number of pixels, 1 to 16384, but got 0"),
        ({"size": 8, "resize": 4}, "`resize` to be None, or from size = 8 to 16384, but got 4"),
        ({"size": 100_000}, "1 to 16384, but got 100000"),
        ({"size": "224"}, "`size` to be a number of pixels, 1 to 16384, but got '224'"),
        ({"size": True}, "but got True"),
        ({"size": 8.0}, "but got 8.0"),
        ({"size": None}, "but got None"),
        ({"size": 8, "resize": "9"}, "but got '9'"),
        ({"interpolation": "cubic"}, "`interpolation` to be one of"),
    ],
)
def test_framing_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Framing(**options)  # type: ignore[arg-type]


def test_framing_refuses_other_shapes() -> None:
    with pytest.raises(InputError, match=r"of shape \(C, H, W\), but got \(4, 4\)"):
        Framing(2)(torch.zeros(4, 4))


def test_batch_is_in_image_units() -> None:
    black, white = torch.zeros(3, 6, 6, dtype=torch.uint8), torch.full((3, 9, 4), 255, dtype=torch.uint8)
    batch = as_batch([black, white], Framing(4), value_range=(-1.0, 3.0))
    assert batch.shape == (2, 3, 4, 4)
    assert batch.dtype == torch.float32
    assert torch.equal(batch[0], torch.full((3, 4, 4), -1.0))
    assert torch.equal(batch[1], torch.full((3, 4, 4), 3.0))
    with pytest.raises(InputError, match=r"at least one picture"):
        as_batch([])
    with pytest.raises(InputError, match=r"uint8.*torch.float32"):
        as_batch([torch.zeros(3, 4, 4)])
    with pytest.raises(ArgumentError, match=r"low < high"):
        as_batch([black], value_range=(1.0, 1.0))


def test_sample_photographs_are_the_two_of_scikit_learn() -> None:
    photographs = sample_photographs()
    assert list(photographs) == ["flower.jpg", "china.jpg"]
    assert all(image.dtype == torch.uint8 and image.shape == (3, 427, 640) for image in photographs.values())
    photographs["china.jpg"][:] = 0  # a copy: scikit-learn's own array is read-only
