"""Maps drawn over images by Captum's visualiser, and images as data URIs."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ce_plugin.errors import ArgumentError, InputError, check_integer, check_number, expected, unknown_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure


POSITIVE = "#e8590c"
"""Colour of what supports the class: orange."""
NEGATIVE = "#1c6fd1"
"""Colour of what opposes the class: blue. Colour-blind readers can distinguish the two."""

_DPI = 100
# Resizing and attacks may leave [0, 1] by a little; normalised images leave it by far more.
_OVERSHOOT = 0.05
Pixels = npt.NDArray[np.float64]


def contribution_colors(share: float = 1.0) -> Colormap:
    """Colour map of signed contributions: blue against the class, transparent at zero, orange for it.

    Args:
        share: share of the colour range to use, in (0, 1]: a map whose largest value is a third of the common scale
            gets a third of the range.

    Example:
        >>> float(contribution_colors()(0.5)[3])  # alpha at zero: the photograph shines through
        0.0
    """
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    steps = np.linspace(-share, share, 257)
    colors = []
    for value in steps:
        red, green, blue = to_rgb(POSITIVE if value >= 0 else NEGATIVE)
        # The root makes small values visible and keeps zero transparent.
        colors.append((red, green, blue, 0.88 * abs(float(value)) ** 0.8))
    return LinearSegmentedColormap.from_list("contribution", colors, N=257)


def overlay(
    attribution: Tensor,
    image: Tensor,
    *,
    scale: float | None = None,
    significant: Tensor | None = None,
    sign: str = "all",
    width: int = 300,
    title: str | None = None,
    cmap: str | Colormap | None = None,
) -> Figure:
    """An attribution drawn over the grayscale image, by Captum's ``visualize_image_attr``.

    Args:
        attribution: (H, W), or (C, H, W), whose channels are averaged.
        image: (C, H, W), values in [0, 1] or bytes (uint8), C = 1 or 3.
        scale: the value that gets the full colour; None means the largest absolute value. A common scale makes
            several maps comparable.
        significant: (H, W) boolean; regions of True are outlined, in dark with a white edge.
        sign: ``"all"`` (orange supports, blue opposes) or ``"positive"`` (orange only).
        width: width of the figure, in pixels.
        title: title above the image.
        cmap: colour map of matplotlib, or its name; None means blue, transparent, orange.

    Returns:
        A figure without axes.

    Raises:
        InputError: attribution and image do not have the same height and width, or the image is none.
        ArgumentError: the scale is not positive, or the sign is unknown.

    Example:
        >>> figure = overlay(torch.eye(8), torch.rand(3, 8, 8), significant=torch.eye(8) > 0)
        >>> figure.get_size_inches().tolist()
        [3.0, 3.0]

    Source: the blended heat map of ``captum.attr.visualization``.
    """
    values = _plane(attribution)
    shown = _channels_last(image)
    if values.shape != shown.shape[:2]:
        raise InputError(expected("attribution", f"of the image's size {shown.shape[:2]}", values.shape))
    if scale is not None:
        check_number("scale", scale, "None or a positive number", above=0)
    check_integer("width", width, "a number of pixels, 1 or more", least=1)
    if not isinstance(sign, str) or sign not in ("all", "positive"):
        raise ArgumentError(expected("sign", "'all' or 'positive'", repr(sign)))
    if sign == "positive":
        values = values.clip(min=0)
    figure, axes = _frame(values.shape, width, title)
    draw_map(axes, values, shown, scale=scale, significant=significant, cmap=cmap)
    return figure


def draw_map(
    axes: Axes,
    values: Pixels,
    shown: Pixels,
    *,
    scale: float | None = None,
    significant: Tensor | None = None,
    cmap: str | Colormap | None = None,
) -> Colormap:
    """Draw a map over a grayscale image into axes, by Captum's ``visualize_image_attr``.

    Args:
        axes: to draw into; their frame and ticks are removed.
        values: of the map, (H, W).
        shown: the image, (H, W, C), values in [0, 1].
        scale, significant: as in :func:`overlay`.
        cmap: from what opposes the class to what supports it; None means :func:`contribution_colors`.

    Returns:
        The colour map from minus to plus the scale.

    Raises:
        ArgumentError: a colour map of unknown name.

    Example:
        >>> from matplotlib.figure import Figure
        >>> draw_map(Figure().add_subplot(), np.eye(4), np.zeros((4, 4, 1))).name
        'contribution'
    """
    from captum.attr import visualization as captum_pictures

    whole = contribution_colors() if cmap is None else named_colors(cmap)
    # Brightened, so that the colours can be distinguished on dark parts too.
    gray = 0.3 + 0.65 * np.repeat(shown.mean(axis=2, keepdims=True), 3, axis=2)
    greatest = float(np.abs(values).max(initial=0.0))
    if greatest == 0.0:
        # Captum divides by the largest value; a map of zeros shows only the photograph.
        axes.imshow(gray, vmin=0, vmax=1)
    else:
        full = scale or greatest
        clipped = values.clip(-full, full)
        share = min(greatest / full, 1.0)
        # Captum scales each map to its own maximum; for a common scale the colour map is truncated instead.
        colors = contribution_colors(share) if cmap is None else _middle(whole, share)
        captum_pictures.visualize_image_attr(
            (clipped / np.abs(clipped).max())[:, :, None],
            gray * 255.0,
            method="blended_heat_map",
            sign="all",
            plt_fig_axis=(axes.get_figure(), axes),
            outlier_perc=1e-6,  # with 0, rounding can leave no value above Captum's threshold
            cmap=colors,
            # Ours carry their own alpha.
            alpha_overlay=None if cmap is None else 0.6,  # type: ignore[arg-type, unused-ignore]
            use_pyplot=False,
        )
        axes.images[0].set_clim(0, 255)  # Captum stretches a dull photograph to full contrast
    _draw_outlines(axes, significant, values)
    axes.set_axis_off()
    return whole


def named_colors(cmap: str | Colormap) -> Colormap:
    """A colour map of matplotlib by its name, or itself.

    Raises:
        UnknownNameError: none has this name.
        ArgumentError: neither a name nor a colour map.

    Example:
        >>> named_colors("RdBu").name
        'RdBu'
    """
    from matplotlib import colormaps
    from matplotlib.colors import Colormap as Kind

    if isinstance(cmap, Kind):
        return cmap
    given: object = cmap
    if not isinstance(given, str):
        raise ArgumentError(expected("cmap", "None, a colour map of matplotlib or its name", type(given).__name__))
    if given not in colormaps:
        raise unknown_name("cmap", given, list(colormaps))
    return colormaps[given]


def _middle(colors: Colormap, share: float) -> Colormap:
    """The middle of a colour map, as wide as this share of it."""
    from matplotlib.colors import ListedColormap

    return ListedColormap(colors(0.5 + 0.5 * np.linspace(-share, share, 257)), name=colors.name)


def signal(
    attribution: Tensor,
    values: Tensor,
    *,
    significant: Tensor | None = None,
    width: int = 480,
    title: str | None = None,
) -> Figure:
    """An attribution along a signal: the signal's channels as lines, the attribution as the colour behind them.

    Args:
        attribution: (L,).
        values: of the signal, (C, L).
        significant: (L,) boolean; where it is True a line is drawn below.
        width: of the figure, in pixels.
        title: written above.

    Returns:
        A figure; orange supports, blue opposes.

    Raises:
        InputError: the attribution is not as long as the signal.

    Example:
        >>> len(signal(torch.linspace(-1, 1, 20), torch.rand(2, 20)).axes[0].lines)
        2
    """
    from ce_plugin.visualization.figure import NotebookFigure

    if values.dim() != 2 or attribution.shape != values.shape[1:]:
        got = f"{tuple(attribution.shape)} for a signal {tuple(values.shape)}"
        raise InputError(expected("attribution", "of shape (L,) for a signal (C, L)", got))
    check_integer("width", width, "a number of pixels, 1 or more", least=1)
    figure = NotebookFigure(figsize=(width / _DPI, 0.4 * width / _DPI), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    lines = values.detach().double().cpu().numpy()
    low, high = float(lines.min()), float(lines.max())
    margin = 0.05 * (high - low or 1.0)
    behind, greatest = attribution.detach().double().cpu().numpy()[None], float(attribution.abs().max()) or 1.0
    axes.imshow(
        behind, cmap=contribution_colors(), vmin=-greatest, vmax=greatest, aspect="auto", interpolation="nearest",
        extent=(-0.5, lines.shape[1] - 0.5, low - margin, high + margin),
    )  # fmt: skip
    for line in lines:
        axes.plot(line, color="#333333", linewidth=0.9)
    if significant is not None:
        where = significant.detach().cpu().numpy().nonzero()[0]
        axes.plot(where, np.full(len(where), low - 0.6 * margin), color="#111111", marker="|", linestyle="")
    axes.set_xlim(-0.5, lines.shape[1] - 0.5)
    if title:
        axes.set_title(title, fontsize=10)
    return figure


def magnify(perturbation: Tensor) -> tuple[Tensor, float]:
    """A perturbation made visible: multiplied and added to medium grey.

    Args:
        perturbation: (C, H, W), as a share of the image's range (a change from black to white is 1).

    Returns:
        The image 0.5 + factor * perturbation, (C, H, W), with values in [0, 1], and the factor: the largest whole
        number that keeps the image within 0.15 and 0.85, or 0.5 if the perturbation is too large for that.

    Example:
        >>> shown, factor = magnify(torch.tensor([[[0.02, -0.02]]]))
        >>> factor, [round(v, 2) for v in shown.flatten().tolist()]
        (17.0, [0.84, 0.16])
    """
    greatest = float(perturbation.abs().max()) if perturbation.numel() else 0.0
    factor = 1.0 if greatest == 0 else max(float(np.floor(0.35 / greatest * (1 + 1e-5))), 0.5)
    return (0.5 + factor * perturbation.detach().float().cpu()).clamp(0, 1), factor


def outlines(region: Tensor) -> npt.NDArray[np.float64]:
    """The border of a region, along the edges of its pixels.

    Args:
        region: (H, W) boolean.

    Returns:
        (S, 2, 2): line segments ((x0, y0), (x1, y1)) in the coordinates of ``imshow``, each as long as its straight
        piece of border.

    Example:
        >>> outlines(torch.ones(2, 3, dtype=torch.bool)).shape  # a rectangle has four sides
        (4, 2, 2)
    """
    inside = np.pad(region.detach().cpu().numpy().astype(np.int8), 1)
    segments: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for swap in (False, True):
        # Changes from row to row are horizontal borders; in the transpose, vertical ones.
        steps = np.diff(inside.T if swap else inside, axis=0)
        for row in np.flatnonzero(steps.any(axis=1)):
            line = np.concatenate(([0], steps[row], [0]))
            changes = np.flatnonzero(np.diff(line))
            for start, stop in itertools.pairwise(changes):
                if line[start + 1] != 0:
                    along, across = (float(start) - 1.5, float(stop) - 1.5), float(row) - 0.5
                    ends = ((along[0], across), (along[1], across))
                    segments.append(tuple((y, x) for x, y in ends) if swap else ends)  # type: ignore[arg-type]
    return np.array(segments, dtype=np.float64).reshape(-1, 2, 2)


def as_bytes(images: Tensor) -> Tensor:
    """Images of any range of values as bytes, for display.

    Args:
        images: (N, C, H, W): values in [0, 1] and in [0, 255] are taken as they are; any others (a network's normalised
            input) are stretched, image by image, from their smallest to their largest.

    Returns:
        uint8 (N, C, H, W), on the CPU.

    Example:
        >>> as_bytes(torch.tensor([[[[0.0, 1.0]]], [[[-2.0, 2.0]]]])).flatten().tolist()
        [0, 255, 0, 255]
    """
    values = images.detach().float().cpu()
    low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
    if bool((low < -_OVERSHOOT).any()) or bool((high > 255 * (1 + _OVERSHOOT)).any()):
        values = (values - low) / (high - low).clamp(min=1e-12)
    elif bool((high > 1 + _OVERSHOOT).any()):
        values = values / 255
    return (255 * values).round().clamp(0, 255).to(torch.uint8)


def data_uri(shown: Figure | Tensor) -> str:
    """A figure or an image as a data URI for an HTML page: ``data:image/...;base64,...``.

    Args:
        shown: a figure, which becomes a JPEG; or an image (C, H, W) with values in [0, 1] and C = 1 or 3, which becomes
            a PNG or a JPEG of the same size in pixels, whichever is the smaller file.

    Example:
        >>> data_uri(torch.zeros(3, 8, 8))[:22]
        'data:image/png;base64,'
    """
    from PIL import Image

    if isinstance(shown, Tensor):
        pixels = (_channels_last(shown) * 255).round().astype(np.uint8)
        image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
        return min((_encoded(image, "png"), _encoded(image, "jpeg")), key=len)
    return _encoded(_drawn(shown, _DPI), "jpeg")


def _drawn(figure: Figure, dpi: int) -> Any:
    """The figure as a Pillow image."""
    from PIL import Image

    from ce_plugin.visualization.figure import png

    return Image.open(io.BytesIO(png(figure, dpi))).convert("RGB")


def _encoded(image: Any, kind: str) -> str:
    buffer = io.BytesIO()
    options: dict[str, Any] = {"optimize": True} if kind == "png" else {"quality": 90, "subsampling": 0}
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _plane(attribution: Tensor) -> Pixels:
    given: object = attribution
    if not isinstance(given, Tensor):
        raise InputError(expected("attribution", "a tensor (H, W) or (C, H, W)", type(given).__name__))
    values = attribution.detach().cpu().double()
    if values.dim() == 3:
        values = values.mean(dim=0)
    if values.dim() != 2 or not bool(torch.isfinite(values).all()):
        raise InputError(expected("attribution", "finite, of shape (H, W) or (C, H, W)", tuple(attribution.shape)))
    plane: Pixels = values.numpy()
    return plane


def as_picture(image: Tensor, name: str = "image") -> Tensor:
    """A picture with values in [0, 1] on the CPU, (1 or 3, H, W); bytes are divided by 255.

    Raises:
        InputError: it is no tensor, has another shape, or values that are no grey levels: a network's normalised
            input, for example.

    Example:
        >>> as_picture(torch.full((1, 1, 2), 255, dtype=torch.uint8)).tolist()
        [[[1.0, 1.0]]]
    """
    given: object = image
    if not isinstance(given, Tensor):
        move = ".movedim(-1, 0)" if _last(given) in (1, 3) else ""
        hint = f"Write `torch.as_tensor(image){move}`." if isinstance(given, np.ndarray) else ""
        raise InputError(expected(name, "a tensor (1 or 3, H, W)", type(given).__name__, hint))
    if image.dim() != 3 or image.shape[0] not in (1, 3):
        hint = "Write `image.movedim(-1, 0)`." if image.dim() == 3 and image.shape[-1] in (1, 3) else ""
        hint = hint or "`VisionModel.pictures` turns a batch of inputs into such pictures."
        raise InputError(expected(name, "of shape (1 or 3, H, W)", tuple(image.shape), hint))
    shown = image.detach().cpu()
    if shown.dtype == torch.uint8:
        return shown.double() / 255
    if not shown.is_floating_point():
        wanted = "of a floating-point type with values in [0, 1], or of bytes (uint8)"
        raise InputError(expected(name, wanted, str(shown.dtype)))
    low, high = (float(end) for end in shown.double().aminmax())
    if not (low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT):
        hint = "Write `image / 255`." if low >= 0 and 1 < high <= 255 else "Undo the normalisation: `x * std + mean`."
        raise InputError(expected(name, "with values in [0, 1]", f"{low:.4g} to {high:.4g}", hint))
    return shown.double().clamp(0, 1)


def _last(given: object) -> int:
    """The last size of an array, or 0."""
    return int(given.shape[-1]) if isinstance(given, np.ndarray) and given.ndim == 3 else 0


def _channels_last(image: Tensor) -> Pixels:
    shown: Pixels = as_picture(image).permute(1, 2, 0).numpy()
    return shown


def _frame(shape: tuple[int, ...], width: int, title: str | None) -> tuple[Figure, Any]:
    from ce_plugin.visualization.figure import NotebookFigure

    inches = width / _DPI
    height = inches * shape[0] / shape[1]
    head = 0.3 if title else 0.0
    figure = NotebookFigure(figsize=(inches, height + head), dpi=_DPI)
    axes = figure.add_axes((0.0, 0.0, 1.0, height / (height + head)))
    if title:
        figure.text(0.5, 1 - 0.5 * head / (height + head), title, ha="center", va="center", fontsize=9)
    return figure, axes


def _draw_outlines(axes: Any, significant: Tensor | None, values: Pixels) -> None:
    from matplotlib.collections import LineCollection

    if significant is None:
        return
    if tuple(significant.shape) != values.shape:
        raise InputError(expected("significant", f"of the map's size {values.shape}", tuple(significant.shape)))
    lines = list(outlines(significant))
    # A light line under a dark one is visible on any photograph.
    for color, thickness in (("white", 2.8), ("#111111", 1.4)):
        axes.add_collection(LineCollection(lines, colors=color, linewidths=thickness, capstyle="projecting"))
    height, breadth = values.shape
    axes.set_xlim(-0.5, breadth - 0.5)
    axes.set_ylim(height - 0.5, -0.5)


def sheet(rows: Sequence[Sequence[tuple[str, Figure | Tensor]]], *, note: str = "", width: int = 300) -> Figure:
    """A grid of images, each with its title.

    Args:
        rows: rows of (title, image); an image is a figure, or (C, H, W) with values in [0, 1], C = 1 or 3.
        note: text below the grid.
        width: width of each image, in pixels.

    Returns:
        A figure.

    Raises:
        ArgumentError: no image, or rows of different lengths.
        InputError: a tensor of another shape.

    Example:
        >>> import torch
        >>> sheet([[("left", torch.rand(3, 8, 8)), ("right", torch.rand(1, 8, 8))]]).get_size_inches().tolist()
        [6.0, 3.3]
    """
    from ce_plugin.visualization.figure import NotebookFigure

    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or lengths == {0}:
        raise ArgumentError(expected("rows", "one or more rows of equal length", [len(row) for row in rows]))
    inches, head, foot = width / _DPI, 0.3, 0.3 if note else 0.0
    columns = lengths.pop()
    height = len(rows) * (inches + head) + foot
    figure = NotebookFigure(figsize=(columns * inches, height), dpi=_DPI)
    for i, row in enumerate(rows):
        for j, (title, shown) in enumerate(row):
            bottom = height - (i + 1) * (inches + head)
            axes = figure.add_axes((j / columns + 0.004, bottom / height, 1 / columns - 0.008, inches / height))
            axes.imshow(_pixels(shown))
            axes.set_axis_off()
            top = (bottom + inches + 0.5 * head) / height
            figure.text((j + 0.5) / columns, top, _shortened(title), ha="center", va="center", fontsize=9)
    figure.text(0.5, 0.5 * foot / height, note, ha="center", va="center", fontsize=8.5)
    return figure


def _shortened(title: str, most: int = 48) -> str:
    """The title, shortened to fit above an image."""
    return title if len(title) <= most else title[: most - 1] + "…"


def _pixels(shown: Figure | Tensor) -> npt.NDArray[Any]:
    if isinstance(shown, Tensor):
        pixels: npt.NDArray[Any] = as_picture(shown, "rows").expand(3, -1, -1).permute(1, 2, 0).numpy()
        return pixels
    return np.asarray(_drawn(shown, 150))


def spotlight(image: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """An image with one region outlined in white and the rest darkened.

    Args:
        image: (C, H, W), values in [0, 1].
        box: (left, top, right, bottom) in pixels, right and bottom exclusive.

    Returns:
        An image of the same shape.

    Raises:
        InputError: not an image, or a box that is empty or outside the image.

    Example:
        >>> import torch
        >>> spotlight(torch.full((1, 4, 4), 0.8), (1, 1, 3, 4))[0, :, 3].tolist()  # the outline
        [1.0, 1.0, 1.0, 1.0]
    """
    image = as_picture(image)
    left, top, right, bottom = box
    height, width = image.shape[-2:]
    if image.dim() != 3 or not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise InputError(expected("box", f"a region inside of a picture (C, {height}, {width})", box))
    shown = 0.5 * image.detach().float().cpu()
    edge = max(1, min(height, width) // 112)
    outer = (slice(max(0, top - edge), bottom + edge), slice(max(0, left - edge), right + edge))
    shown[:, outer[0], outer[1]] = 1.0
    shown[:, top:bottom, left:right] = image[:, top:bottom, left:right].detach().float().cpu()
    return shown.clamp(0, 1)
