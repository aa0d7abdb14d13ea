"""CausalMediation: how much of an intervention's effect on the outcome passes through the units of a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from ce_plugin.attribution._estimation import Target
from ce_plugin.attribution._experiment import Call, Ids
from ce_plugin.attribution._explainer import Options, as_ids, as_inputs, with_channels
from ce_plugin.attribution.layer_effect import LayerCausalEffect
from ce_plugin.designs import Design, Joint
from ce_plugin.effects import Carriers, Estimate, Mediation, Outcome, carriers
from ce_plugin.effects.carrier_sets import check_levels
from ce_plugin.effects.mediation import check_bootstrap
from ce_plugin.effects.outcomes import OutcomeFunction
from ce_plugin.errors import ArgumentError, DesignError, InputError, ModelError, expected
from ce_plugin.interventions import Intervention, Patch
from ce_plugin.networks.guard import state_guard
from ce_plugin.sites import LayerSite

Sets = Sequence[Sequence[int]]


class CausalMediation:
    """How much of an intervention on the input passes through each unit, or each set of units, of a layer.

        TE = Y(x') - Y(x),   NIE = Y(x, M(x')) - Y(x),   NDE = Y(x', M(x)) - Y(x),   interaction = TE - NDE - NIE

    with x' the input under the intervention and M the units' value: "which channels carry this attack?"

    Args:
        forward_func, layer, outcome, output, seed, memory_budget, engine: as in :class:`LayerCausalEffect`. The
            outcome is the logit here: an attack that saturates a probability would hide what carries it.
        intervention: what is done to the whole input (an attack, a mask), or a tensor: the counterparts themselves,
            in which case every call takes inputs of the same shape.

    Raises:
        ArgumentError: ``intervention`` is neither.

    Example:
        >>> import torch
        >>> from ce_plugin.interventions import PixelMask
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).requires_grad_(False)
        >>> mediation = CausalMediation(net, "1", PixelMask("zero")).estimate(torch.rand(3, 1, 4, 4))
        >>> mediation.indirect.shape, mediation.cut
        (torch.Size([3, 4, 2]), True)
        >>> bool(torch.allclose(mediation.indirect.sum(1), mediation.total, atol=1e-6))  # what follows is linear
        True

    Source: Robins and Greenland 1992; Pearl 2001 (arXiv 1301.2300); for networks Vig et al. 2020 (arXiv 2004.12265).
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | str | LayerSite,
        intervention: Intervention | Tensor,
        *,
        outcome: str | Outcome | OutcomeFunction | None = "logit",
        **options: Unpack[Options],
    ) -> None:
        given: object = intervention
        if not isinstance(given, (Intervention, Tensor)):
            wanted = "an Intervention on the input, or a tensor of counterparts"
            raise ArgumentError(expected("intervention", wanted, type(given).__name__))
        self.intervention = intervention
        self.effects = LayerCausalEffect(forward_func, layer, outcome=outcome, **options)
        self.seed = self.effects.seed

    def estimate(
        self,
        inputs: Tensor,
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        sets: Sets | None = None,
        ids: Ids = None,
        show_progress: bool = False,
    ) -> Mediation:
        """The four quantities for every unit, or for every set of units.

        Args:
            inputs: (N, ...).
            target: as in captum; None measures every class, and shares are then about the predicted one.
            additional_forward_args, ids, show_progress: as in :meth:`LayerCausalEffect.attribute`.
            sets: groups of units that are set together; None means each unit by itself.

        Returns:
            A :class:`~ce_plugin.effects.Mediation`.

        Example:
            >>> import torch
            >>> from ce_plugin.interventions import PixelMask
            >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
            >>> every = CausalMediation(net, "1", PixelMask("zero")).estimate(torch.rand(9, 1, 4, 4), sets=[range(4)])
            >>> every.whole  # what stands for the whole layer, through which everything passes
            (0,)
        """
        x = self._images("inputs", inputs)
        design = None if sets is None else _joint(sets)
        x1 = self._counterparts(x, ids)
        call = Call(
            inputs=x,
            target=target,
            additional_forward_args=additional_forward_args,
            ids=ids,
            show_progress=show_progress,
        )
        through = self._run(call, Patch(x1), design)
        # Both ways about the same classes, though the intervention may change which one is predicted.
        around = self._run(replace(call, inputs=x1), Patch(x), design)
        total = around.reference - through.reference
        every = through.settings["units_of_site"]
        groups = [(u,) for u in range(every)] if design is None else design.groups
        return Mediation(
            total=total,
            indirect=through.effect,
            direct=total[:, None] + around.effect,
            unit_labels=through.labels_of(0),
            reference=through.reference,
            target=through.target,
            predicted=through.predicted,
            outcome=through.outcome,
            intervention=repr(self.intervention) if isinstance(self.intervention, Intervention) else "counterparts",
            site=repr(self.effects.site),
            cut=through.settings["cut"],
            whole=tuple(k for k, group in enumerate(groups) if len(group) == every),
            settings={"seed": self.seed, "route": through.settings["route"]},
            class_names=through.class_names,
        )

    def carriers(
        self,
        choosing: Tensor,
        testing: Tensor,
        *,
        levels: Sequence[float] = (0.5, 0.9),
        level: float = 0.95,
        n_boot: int = 2000,
        targets: tuple[Target, Target] = (None, None),
        ids: tuple[Sequence[int] | None, Sequence[int] | None] = (None, None),
    ) -> Carriers:
        """How many units carry 50 % and 90 % of the effect: ranked on some images, tested on others.

        Args:
            choosing: images that rank the units by their natural indirect effect, (N, ...).
            testing: other images, on which the sets of the best units are run, (M, ...).
            levels: shares of the total effect.
            level, n_boot: of the bootstrap intervals.
            targets: of the choosing and the testing images; None means the predicted class of the clean images.
            ids: of the choosing and the testing images.

        Returns:
            A :class:`~ce_plugin.effects.Carriers`.

        Raises:
            InferenceError: the intervention has no total effect on the outcome.
        """
        check_bootstrap(level, n_boot)
        check_levels(levels)
        pairs: dict[str, object] = {"targets": targets, "ids": ids}
        for name, pair in pairs.items():
            if not isinstance(pair, tuple) or len(pair) != 2:
                wanted = "a pair, for the choosing and the testing images"
                raise ArgumentError(expected(name, wanted, repr(pair), f"Write `{name}=(a, b)`."))
        chosen, x = self._images("choosing", choosing), self._images("testing", testing)
        if chosen.shape == x.shape and torch.equal(chosen, x.to(chosen)):
            hint = "On the images that chose them the best units are best by luck too: split them in halves."
            raise ArgumentError(expected("testing", "images other than those of `choosing`", "the same", hint))
        choose = self.estimate(choosing, targets[0], ids=ids[0])
        # Made once, because attacks are expensive.
        attacked = copy.copy(self)
        attacked.intervention = self._counterparts(x, ids[1])
        first = attacked.estimate(x, targets[1], sets=[(0,)], ids=ids[1])
        total, _, _ = first.column()
        target = first.predicted if targets[1] is None and first.target is None else targets[1]
        call, patch = Call(inputs=x, target=target, ids=ids[1]), Patch(attacked.intervention)

        def run(sets: list[tuple[int, ...]]) -> Tensor:
            return self._run(call, patch, Joint(sets)).effect[..., 0]

        return carriers(choose, run, total, levels=levels, level=level, n_boot=n_boot, seed=self.seed)

    def _images(self, name: str, inputs: Tensor) -> Tensor:
        """The inputs, which are one tensor here."""
        every = as_inputs(inputs, self.effects.forward.modules)
        if len(every) != 1:
            raise InputError(expected(name, "one tensor (N, ...)", f"a tuple of {len(every)}"))
        return every[0]

    def _counterparts(self, x: Tensor, ids: Ids) -> Tensor:
        """The inputs under the intervention."""
        if isinstance(self.intervention, Tensor):
            if self.intervention.shape != x.shape:
                wanted = f"counterparts of the inputs' shape {tuple(x.shape)}"
                raise InputError(expected("intervention", wanted, tuple(self.intervention.shape)))
            return self.intervention.to(x)
        with state_guard(self.intervention, networks=self.effects.forward.modules):
            intervention = with_channels(self.intervention, self.effects._input_layout((x,)))
            return intervention.perturb(x, ids=as_ids(ids, len(x)), seed=self.seed)

    def _run(self, call: Call, patch: Patch, design: Design | None) -> Estimate:
        # A copy shares what was learned about the network's structure.
        explainer = copy.copy(self.effects)
        explainer.intervention, explainer.design = patch, design
        found: Estimate | dict[str, Estimate] = explainer._estimates(call)
        if isinstance(found, dict):
            wanted = "a model with one output head"
            raise ModelError(expected("forward_func", wanted, sorted(found), "Name one with `output=`."))
        return found


def _joint(sets: Sets) -> Joint:
    """The sets as groups; an error names the argument that the user wrote."""
    try:
        return Joint(sets)
    except DesignError as error:
        wanted = "one or more sets of different unit indices"
        raise DesignError(expected("sets", wanted, repr(sets), "Write [(0,), (0, 1)].")) from error
