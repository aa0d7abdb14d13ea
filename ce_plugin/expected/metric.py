"""ExpectedCausalEffect: expected effects in a loop of one's own, as a metric of torchmetrics."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ce_plugin.attribution._estimation import Target
from ce_plugin.attribution._experiment import Ids
from ce_plugin.attribution._explainer import Explainer
from ce_plugin.effects import Estimate
from ce_plugin.errors import InputError, expected
from ce_plugin.expected.answer import ExpectedEstimate, answered
from ce_plugin.expected.moments import Moments, merged, moments_of, packed, unpacked
from ce_plugin.expected.rows import Evidences, checked_ids, estimated, named_evidences, series_extras, series_of
from ce_plugin.networks.forward import widest

try:
    from torchmetrics import Metric
    from torchmetrics.utilities.distributed import gather_all_tensors
except ImportError as missing:
    hint = "Install it: pip install 'ce-plugin[data]'"
    wanted = expected("ExpectedCausalEffect", "imported with torchmetrics installed", missing, hint)
    raise ModuleNotFoundError(wanted) from missing


class ExpectedCausalEffect(Metric):
    """Expected causal effects over images: the mean of what an explainer estimates of each, and its error over images.

        effect_uc = (1/n) sum_i Effect_uc(x_i),  std_error = sd_i(Effect_uc) / sqrt(n)

    One float64 state holds the number of images, means and co-moments of all evidences; states merge exactly (Chan), so
    that parts of the data may be seen by other processes, as torchmetrics and Lightning do it. It is on the metric's
    device, or on the CPU where that has no float64. The explainer is no submodule: its network is neither moved nor
    saved with the metric, and copies of the metric share it.

    Args:
        explainer: a :class:`~ce_plugin.CausalEffect`, :class:`~ce_plugin.LayerCausalEffect`,
            :class:`~ce_plugin.ConceptCausalEffect` or other explainer with ``estimate``.
        given: evidence, or several by name: ``{"clean": None, "FGSM": Adversarial.fgsm(model), ...}``; every image is
            seen under each of them.
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ArgumentError: no explainer, or no evidence.

    Example:
        >>> from torch import nn
        >>> from ce_plugin import LayerCausalEffect
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> metric = ExpectedCausalEffect(LayerCausalEffect(net, "1", outcome="log_odds"))
        >>> for first in (0, 16):
        ...     metric.update(torch.rand(16, 3), ids=range(first, first + 16))
        >>> answer = metric.compute()
        >>> answer.effect.shape, answer.n_images, answer.significant().shape
        (torch.Size([1, 4, 2]), 32.0, torch.Size([1, 4, 2]))

    Source: Yang et al., ICIP 2019 (arXiv 1902.03380), Eq. 2; Chan, Golub, LeVeque 1983.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    moments: Tensor

    def __init__(self, explainer: Explainer, *, given: Evidences = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._shared = _Shared(explainer)
        self.given = named_evidences(explainer, given)
        self._about: dict[str, Any] = {}
        self.add_state("moments", packed(None), dist_reduce_fx=functools.partial(_reduced, len(self.given)))

    @property
    def explainer(self) -> Explainer:
        """What estimates the effects of each image."""
        return self._shared.explainer

    def update(self, x: Tensor | tuple[Tensor, ...], target: Target = None, ids: Ids = None) -> None:
        """See some images.

        Args:
            x: (N, ...), or a tuple of such: what the explainer takes.
            target: as in ``estimate``; None means all classes, and must then be None in every call.
            ids: one integer per image, its index in the data set. Random designs, evidence and fills are drawn from it:
                with equal ids images would get equal draws, whose error does not average out.

        Raises:
            InputError: no ids, an id twice, or images whose units or classes are others than before.
        """
        n = len(x[0] if isinstance(x, tuple) else x)
        names = checked_ids(ids, n)
        series = []
        for given in self.given.values():
            estimate = estimated(self.explainer, x, target=target, given=given, ids=names)
            series.append(series_of(estimate))
            self._about = self._about or about(estimate, target)
        new = moments_of(torch.stack([one.to(self.moments.device) for one in series], 1), series_extras(estimate))
        before = self._unpacked()
        if before is not None and before.mean.shape != new.mean.shape:
            wanted = f"of the units and classes {_sizes(before)} that other images had"
            raise InputError(expected("x", wanted, f"{_sizes(new)}"))
        self.moments = packed(merged([new] if before is None else [before, new]), self.moments)

    def compute(self) -> ExpectedEstimate:
        """The expected effects of all images seen, one row for each evidence.

        Raises:
            InputError: no image was seen.
        """
        moments = self._unpacked()
        known = {"outcome": self.explainer.outcome.name, **self._about}
        columns = known.pop("classes", None)
        classes = range(0 if moments is None else moments.mean.shape[2])
        return answered(moments, list(self.given), list(classes) if columns is None else columns, **known)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the images that another metric of this kind has seen; one that has seen none changes nothing."""
        super().merge_state(incoming_state)
        self._computed = None
        # What was merged counts as seen: torchmetrics warns where nothing was.
        self._update_count += int(self.moments[0] > 0)
        if isinstance(incoming_state, ExpectedCausalEffect):
            self._about = self._about or incoming_state._about

    def sync(self, dist_sync_fn: Callable[..., Any] | None = None, *args: Any, **kwargs: Any) -> None:
        """As in torchmetrics; a process that has seen no image takes part as one with n = 0."""
        gather = dist_sync_fn or self.dist_sync_fn or gather_all_tensors
        super().sync(functools.partial(_gathered, gather), *args, **kwargs)

    def plot(self, *args: Any, **kwargs: Any) -> Any:
        """Bars of the expected effects, as :meth:`ExpectedEstimate.plot` draws them: (figure, axes)."""
        figure = self.compute().plot(*args, **kwargs)
        return figure, figure.axes[0]

    def _unpacked(self) -> Moments | None:
        return unpacked(self.moments, len(self.given))

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """``forward`` and ``merge_state`` come here; the vectors may differ in length, where one has seen nothing."""
        state: Tensor = incoming_state["moments"].to(self.moments.device)
        parts = [unpacked(one, len(self.given)) for one in (state, self.moments)]
        self.moments = packed(merged([part for part in parts if part is not None]), self.moments)

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """torchmetrics takes the dimensions from tensors of one number; those of an estimate stay."""
        held = super()._wrap_compute(functools.wraps(compute)(lambda *args, **kwargs: _Box(compute(*args, **kwargs))))

        @functools.wraps(compute)
        def unboxed(*args: Any, **kwargs: Any) -> Any:
            return held(*args, **kwargs).value

        return unboxed

    def _apply(self, fn: Callable[..., Any], exclude_state: Sequence[str] = "") -> Any:
        """Follow the metric to a device that has float64; from one without it the state stays on the CPU."""
        self._computed = self._forward_cache = None
        this = super()._apply(fn, [*exclude_state, "moments"])
        device = self.device if widest(self.device) is torch.float64 else torch.device("cpu")
        self.moments = self.moments.to(device)
        self._defaults["moments"] = packed(None).to(device)
        return this


class _Shared:
    """Holds an explainer that copies of a metric share, and that is no part of its state."""

    def __init__(self, explainer: Explainer) -> None:
        self.explainer = explainer

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


class _Box:
    """Holds what torchmetrics must not look into."""

    def __init__(self, value: Any) -> None:
        self.value = value


def about(estimate: Estimate, target: Target = None) -> dict[str, Any]:
    """What an estimate says of how it was made, for the answer over images."""
    names = ("outcome", "design", "intervention", "site", "seed", "n_trials", "p", "groups")
    found: dict[str, Any] = {name: getattr(estimate, name) for name in names}
    found["unit_labels"] = estimate.labels_of(0)
    if target is not None:
        found["classes"] = [target] if isinstance(target, int) else ["target"]
    return found


def _sizes(moments: Moments) -> tuple[int, int]:
    _, series, classes = moments.mean.shape
    return series - moments.extras, classes


def _reduced(evidences: int, states: Tensor) -> Tensor:
    """The reduction of a synchronised state: one row for each process."""
    parts = [unpacked(state, evidences) for state in states]
    return packed(merged([part for part in parts if part is not None]), states)


def _gathered(gather: Callable[..., Any], state: Tensor, group: Any = None) -> list[Tensor]:
    """Every process's state, all of one length: where none was seen it is short, and zeros follow."""
    states: list[Tensor] = gather(state, group=group)
    longest = max(map(len, states))
    return [pad(one, (0, longest - len(one))) for one in states]
