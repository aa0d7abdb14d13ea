"""An estimate for the eye: maps over pictures, bars with intervals, and what a notebook shows of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from ce_plugin.effects.region import RegionTest
from ce_plugin.errors import (
    ArgumentError,
    InputError,
    SaturationWarning,
    TargetError,
    UnitError,
    check_integer,
    check_number,
    expected,
    unknown_name,
)
from ce_plugin.networks.forward import double
from ce_plugin.sites import InputSite
from ce_plugin.visualization.pictures import NEGATIVE, POSITIVE, as_picture, draw_map, overlay, sheet, signal

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

Outline: TypeAlias = Literal["region", "significant", "none"]
Classes: TypeAlias = "int | str | Sequence[int | str] | None"

# Of a volume, in a plot.
_SLICES = 6
# Of an estimate in a notebook: units in its table, and examples.
_STRONGEST, _EXAMPLES = 5, 3
_DPI = 100
_INTERVAL = "#555555"
_BESIDE = "display:flex;flex-wrap:wrap;gap:1em;align-items:flex-start"


class Drawn(Protocol):
    """What is drawn of an :class:`~ce_plugin.effects.Estimate`; its docstring says what each part is."""

    effect: Tensor
    std_error: Tensor | None
    n_units: Tensor
    target: Tensor | None
    predicted: Tensor | None
    pictures: Tensor | None
    answer: RegionTest | None
    class_names: tuple[str, ...] | None
    settings: dict[str, Any]
    n_trials: int
    site: str
    outcome: str
    design: str
    intervention: str

    @property
    def contribution(self) -> Tensor: ...
    @property
    def smoothed_contribution(self) -> Tensor: ...
    def __len__(self) -> int: ...
    def significant(self, fdr: float = ...) -> Tensor: ...
    def half_width(self, level: float = ...) -> Tensor: ...
    def labels_of(self, example: int) -> list[str]: ...
    def place_of(self, example: int, unit: int) -> str: ...
    def summary(self, example: int | None = ...) -> str: ...
    def strongest(self, example: int = ..., target: int | str | None = ..., top: int = ...) -> pd.DataFrame: ...


def plot_estimate(
    estimate: Drawn,
    image: Tensor | None = None,
    *,
    example: int = 0,
    target: Classes = None,
    feature_mask: Tensor | None = None,
    sliding_window_shapes: tuple[int, ...] | None = None,
    strides: int | tuple[int, ...] | None = None,
    fdr: float = 0.05,
    level: float = 0.95,
    top: int = 20,
    width: int = 480,
    title: str | None = None,
    kind: Literal["map", "bars"] | None = None,
    ax: Axes | None = None,
    class_names: Sequence[str] | None = None,
    cmap: str | Colormap | None = None,
    colorbar: bool = True,
    outline: Outline | None = None,
) -> Figure:
    """Draw the contributions of one example to one class, or to several side by side on one scale.

    Over an image colours are the smoothed contributions, where the design has them; outlined is the region that was
    tested, or what is significant by the effects themselves. Bars show the effects and their intervals.

    Args:
        estimate: what ``estimate(...)`` returned.
        image: the example, (C, H, W), values in [0, 1] or bytes (uint8): the contributions are laid over it,
            significant units outlined. Of a volume (C, D, H, W) six slices are drawn; a signal, in the shape in which
            the network took it, is drawn as lines. None takes the picture that the estimate keeps, if it keeps one.
        example: index of the example.
        target: class, its index or name, or several; None means the predicted class, where all classes were computed.
        feature_mask: the units, where they are not the default grid: what ``estimate(...)`` was given.
        sliding_window_shapes, strides: likewise.
        fdr: false discovery rate of the outlines, or of the filled bars. Exact designs have neither.
        level: of the bars' confidence intervals.
        top: number of bars, the largest contributions first.
        width: of each map, or of the bars, in pixels.
        title: written above; None says which class.
        kind: "map" or "bars"; None draws a map where there is an image.
        ax: matplotlib's axes to draw one class into; its figure is returned.
        class_names: one for each class; None takes those that the estimate carries.
        cmap: matplotlib's colour map, or its name, from what opposes the class to what supports it; None: blue and
            orange, transparent at zero.
        colorbar: draw the scale of a map beside it.
        outline: "region" (that was tested, see ``answer=``), "significant" or "none"; None takes the region where one
            was tested.

    Returns:
        A figure. In a notebook it shows itself; elsewhere ``figure.savefig("effects.png")``.

    Raises:
        ArgumentError: no such example, ``top`` below 1, or several classes for one ``ax``.
        TargetError: no such class.
        UnknownNameError: no class, colour map, kind or outline of this name.
        UnitError: the units are not those of the image; say which with ``feature_mask`` or windows.

    Example:
        >>> from ce_plugin.effects import Estimate
        >>> effect, reference = torch.tensor([[[-0.4], [0.1]]]), torch.tensor([[0.9]])
        >>> estimate = Estimate(effect=effect, reference=reference, class_shape=(1,), outcome="probability",
        ...                     unit_labels=["left", "right"])
        >>> [label.get_text() for label in plot_estimate(estimate).axes[0].get_yticklabels()]
        ['left', 'right']
    """
    check_integer("example", example)
    if not -len(estimate) <= example < len(estimate):
        raise ArgumentError(expected("example", f"below {len(estimate)}, the number of examples", example))
    check_integer("top", top, "at least 1", least=1)
    check_integer("width", width, "a number of pixels, 1 or more", least=1)
    check_number("fdr", fdr, "in (0, 1)", above=0, below=1)
    check_number("level", level, "in (0, 1)", above=0, below=1)
    choices = {"kind": (kind, ("map", "bars")), "outline": (outline, ("region", "significant", "none"))}
    for name, (value, allowed) in choices.items():
        if value is not None and value not in allowed:
            raise unknown_name(name, value, allowed)
    names = estimate.class_names if class_names is None else tuple(class_names)
    # What is no class is refused where the class is looked up.
    every = list(target) if isinstance(target, Sequence) and not isinstance(target, str) else [target]
    columns = [column_of(estimate, example, one, names) for one in every]
    if ax is not None and len(columns) != 1:
        raise ArgumentError(expected("target", "one class for one `ax`", f"{len(columns)} classes"))
    if image is None and kind != "bars" and estimate.pictures is not None:
        image = estimate.pictures[example]
    titles = [f"What supports {_quoted(name)}" if title is None else title for _, name in columns]
    if image is None or kind == "bars":
        if kind == "map":
            raise InputError(expected("image", "the example's picture, for a map", None))
        return _bars(estimate, example, columns, titles, top=top, width=width, fdr=fdr, level=level, ax=ax)
    given: object = image
    if not isinstance(given, Tensor) or image.dim() not in (2, 3, 4):
        as_picture(image)  # says what is wrong with it
    site = InputSite(feature_mask, sliding_window_shapes, strides, channel_dim=_channel_dim(estimate))
    layers = [_planes(estimate, example, column, image, site, fdr, outline) for column, _ in columns]
    shown, planes, regions = layers[0][0], [one[1] for one in layers], [one[2] for one in layers]
    if shown.dim() == 2:
        if ax is not None or len(columns) > 1:
            raise ArgumentError(expected("ax", "None, and one class, for a signal", "others"))
        return signal(planes[0].mean(0), shown, significant=regions[0], width=width, title=titles[0])
    if shown.dim() == 4:
        if ax is not None or len(columns) > 1:
            raise ArgumentError(expected("ax", "None, and one class, for a volume", "others"))
        return _slices(planes[0], shown, regions[0], width, titles[0])
    return _maps(
        shown, planes, regions, titles, width=width, ax=ax, cmap=cmap, label=_scale_label(estimate) if colorbar else ""
    )


def _maps(
    shown: Tensor,
    planes: list[Tensor],
    regions: list[Tensor | None],
    titles: list[str],
    *,
    width: int,
    ax: Axes | None,
    cmap: str | Colormap | None,
    label: str,
) -> Figure:
    """Maps over one picture, side by side on one scale; with a label the scale stands beside them."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import FuncFormatter

    pixels = as_picture(shown).permute(1, 2, 0).numpy()
    values = [plane.mean(0).cpu().double().numpy() for plane in planes]
    scale = max(float(abs(one).max()) for one in values) or None
    inches, high = width / _DPI, width / _DPI * pixels.shape[0] / pixels.shape[1]
    size = (len(values) * inches + (0.9 if label else 0.0), high + 0.35)
    figure, every = _side_by_side(ax, len(values), size)
    for axes, plane, region, title in zip(every, values, regions, titles, strict=True):
        colors = draw_map(axes, plane, pixels, scale=scale, significant=region, cmap=cmap)
        axes.set_title(title, fontsize=10)
    if label and scale:
        ruler = figure.colorbar(ScalarMappable(Normalize(-scale, scale), colors), ax=every, shrink=0.85, pad=0.02)
        ruler.set_label(label, fontsize=9)
        ruler.ax.tick_params(labelsize=8)
        if label.endswith("per cent points"):
            ruler.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:+.3g}"))
    return figure


def _side_by_side(ax: Axes | None, count: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A new figure, in inches, with so many axes; or the user's axes and their figure."""
    from ce_plugin.visualization.figure import NotebookFigure

    if ax is None:
        made = NotebookFigure(figsize=size, dpi=_DPI, layout="constrained")
        return made, list(made.subplots(1, count, squeeze=False)[0])
    figure = ax.get_figure(root=True)
    if figure is None:
        raise ArgumentError(expected("ax", "axes of a figure", "removed ones"))
    return figure, [ax]


def _planes(
    estimate: Drawn, example: int, column: int, image: Tensor, site: InputSite, fdr: float, outline: Outline | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The picture with its channels first, the contributions at its pixels, and what is outlined there."""
    batch = image.detach().cpu()[None]
    n_units = int(estimate.n_units[example])
    units = site.units_of((batch,))
    if int(units.n_units[0]) != n_units:
        hint = "Hand over the `feature_mask` or windows that the estimate was made with."
        raise UnitError(expected("image", f"with the {n_units} units of the estimate", int(units.n_units[0]), hint))
    channels = (1 if site.channel_dim is None else site.channel_dim) % batch.dim()
    contribution = estimate.smoothed_contribution[example, :n_units, column].detach().cpu()
    (plane,) = units.spread(double(contribution)[None])
    found = None
    if estimate.answer is not None and outline in (None, "region"):
        found = estimate.answer.region[example, :n_units]
    elif estimate.std_error is not None and outline in (None, "significant"):
        found = estimate.significant(fdr)[example, :n_units, column].cpu()
    region = None
    if found is not None:
        (where,) = units.spread(double(found)[None])
        region = where.movedim(channels, 1)[0].amax(0) > 0.5
    return batch.movedim(channels, 1)[0], plane.movedim(channels, 1)[0], region


def _slices(plane: Tensor, volume: Tensor, region: Tensor | None, width: int, title: str) -> Figure:
    """Slices of a volume (C, D, H, W), evenly spaced, with one scale for all."""
    depth, scale = volume.shape[1], float(plane.mean(0).abs().max()) or None
    rows: list[list[tuple[str, Figure | Tensor]]] = [[]]
    for k in torch.linspace(0, depth - 1, min(depth, _SLICES)).round().long().tolist():
        outlined = None if region is None else region[k]
        drawn = overlay(plane[:, k], volume[:, k], scale=scale, significant=outlined, width=width)
        rows[0].append((f"slice {k} of {depth}", drawn))
    return sheet(rows, note=title, width=max(width // len(rows[0]), 1))


def column_of(
    estimate: Drawn, example: int, target: int | str | None, names: Sequence[str] | None = None
) -> tuple[int, str]:
    """Which column of the effects a class is, and what it is called.

    Args:
        estimate: whose columns.
        example: whose prediction None means.
        target: index or name of the class.
        names: of all classes; None takes those that the estimate carries.

    Raises:
        TargetError: the estimate has no such class.
        UnknownNameError: no class has this name.
    """
    names = estimate.class_names if names is None else names
    if isinstance(target, str):
        if names is None:
            hint = "Pass `class_names=` to use names."
            raise TargetError(
                expected("target", "None or a class index, where names are not known", repr(target), hint)
            )
        if target not in names:
            raise unknown_name("target", target, names)
        target = names.index(target)
    elif target is not None:
        check_integer("target", target, "None, a class index or a name", error=TargetError)

    def called(index: object) -> str:
        if names is not None and isinstance(index, int) and 0 <= index < len(names):
            return names[index]
        return f"class {index}"

    classes = estimate.effect.shape[2]
    if estimate.target is not None or classes == 1:
        if target is not None and estimate.target is not None and int(estimate.target[example].flatten()[0]) != target:
            hint = "The estimate holds this class only; leave `target` out of estimate() to get all."
            raise TargetError(expected("target", f"{estimate.target[example].tolist()}", target, hint))
        own = estimate.target[example].tolist() if estimate.target is not None else 0
        return 0, called(own)
    if target is None:
        if estimate.predicted is None:
            raise TargetError(expected("target", f"a class index below {classes}", None))
        target = int(estimate.predicted[example])
    if not 0 <= target < classes:
        raise TargetError(expected("target", f"a class index below {classes}", target))
    return target, called(target)


def _bars(
    estimate: Drawn,
    example: int,
    columns: list[tuple[int, str]],
    titles: list[str],
    *,
    top: int,
    width: int,
    fdr: float,
    level: float,
    ax: Axes | None,
) -> Figure:
    """Bars of the largest contributions to each class, side by side."""
    n_units = int(estimate.n_units[example])
    if not n_units:
        raise InputError(expected("estimate", "with at least one unit", "none"))
    shown = min(top, n_units)
    figure, every = _side_by_side(ax, len(columns), (len(columns) * width / _DPI, 0.9 + 0.24 * shown))
    for axes, (column, _), title in zip(every, columns, titles, strict=True):
        _bars_of(axes, estimate, example, column, shown, fdr, level)
        axes.set_title(title, fontsize=10)
    return figure


def _bars_of(axes: Axes, estimate: Drawn, example: int, column: int, top: int, fdr: float, level: float) -> None:
    """One example's largest contributions to one class."""
    own = slice(int(estimate.n_units[example]))
    values = estimate.contribution[example, own, column].detach().cpu()
    found = half = None
    if estimate.std_error is not None:
        found = estimate.significant(fdr)[example, own, column].cpu()
        half = estimate.half_width(level)[example, own, column].cpu()
    labels = estimate.labels_of(example)
    order = values.abs().argsort(descending=True, stable=True)[:top].tolist()
    for place, unit in enumerate(order):
        value = float(values[unit])
        sure = found is None or bool(found[unit])
        color = POSITIVE if value >= 0 else NEGATIVE
        axes.barh(place, value, color=color if sure else "none", edgecolor=color, height=0.72)
        if half is not None:
            axes.errorbar(value, place, xerr=float(half[unit]), color=_INTERVAL, capsize=2, linewidth=1)
    axes.set_yticks(range(len(order)), [labels[unit] for unit in order])
    axes.invert_yaxis()
    axes.axvline(0, color=_INTERVAL, linewidth=0.8)
    note = "" if found is None else "; filled: significant"
    axes.set_xlabel(f"contribution to the {_measured(estimate)} (positive supports the class){note}", fontsize=9)


def estimate_html(estimate: Drawn) -> str:
    """What a notebook shows: of the first examples the sentence, the picture or bars, and the five strongest units."""
    parts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SaturationWarning)  # it comes where a person asks for intervals
        for i in range(min(len(estimate), _EXAMPLES)):
            if estimate.predicted is None and estimate.target is None and estimate.effect.shape[2] > 1:
                return f"<pre>{escape(repr(estimate))}</pre>"  # no single class to speak of
            figure = plot_estimate(estimate, example=i, width=360, top=10)
            shown = beside(figure, _table(estimate, i))
            parts.append(f"<p>{escape(estimate.summary(i))}</p>{shown}")
    rest = len(estimate) - len(parts)
    if rest:
        parts.append(f"<p>... and {rest} more example{'s' * (rest > 1)}.</p>")
    said = f"{estimate.intervention}, {estimate.design}, {estimate.n_trials} trials"
    return f"<div>{''.join(parts)}<p><small>{escape(said)}</small></p></div>"


def _table(estimate: Drawn, example: int) -> str:
    """The strongest units of one example with their intervals, as HTML."""
    column, name = column_of(estimate, example, None)
    frame = estimate.strongest(example, column if estimate.target is None else None, top=_STRONGEST)
    rows = []
    for unit, size, *ends in frame.drop(columns="label").to_numpy().tolist():
        sure = ["{:+.3g} to {:+.3g}".format(*ends)] if ends else []
        rows.append([estimate.place_of(example, int(unit)), f"{size:+.3g}", *sure])
    interval = [] if estimate.std_error is None else ["95 % interval"]
    return html_table([f"strongest for {_quoted(name)}", _measured(estimate), *interval], rows)


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in a table of HTML.

    Example:
        >>> html_table(["unit", "effect"], [["<7>", "+0.2"]])
        '<table><tr><th>unit</th><th>effect</th></tr><tr><td>&lt;7&gt;</td><td>+0.2</td></tr></table>'
    """
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{lines}</table>"


def beside(figure: Figure, table: str) -> str:
    """A figure and a table side by side in a notebook, where there is room."""
    return f'<div style="{_BESIDE}">{figure._repr_html_() or ""}{table}</div>'


def _measured(estimate: Drawn) -> str:
    return (estimate.outcome or "outcome").replace("_", "-")


def _scale_label(estimate: Drawn) -> str:
    if estimate.outcome in ("probability", "sigmoid"):
        return "contribution, in per cent points"
    return f"contribution to the {_measured(estimate)}"


def _quoted(name: str) -> str:
    return name if name.startswith("class ") else f"“{name}”"


def _channel_dim(estimate: Drawn) -> int | None:
    dim: int | None = estimate.settings.get("channel_dim") if estimate.site.startswith("InputSite") else None
    return dim
