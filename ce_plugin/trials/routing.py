"""Where an experiment takes place: the site's clean values, and what runs the network from there."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ce_plugin.errors import InputError, ModelError, expected
from ce_plugin.networks.forward import Forward, is_opaque
from ce_plugin.networks.graph import HookPoint, Suffix, Untraceable
from ce_plugin.sites import ConceptSite, LayerSite
from ce_plugin.trials.batches import TrialSpec
from ce_plugin.trials.downstream import SITE, CapturingForward, ForwardFromSite, SiteHook
from ce_plugin.trials.incremental import IncrementalTrials
from ce_plugin.trials.runner import AggregateError, Runner

__all__ = ["CapturedSite", "Router", "hook_of"]

logger = logging.getLogger("ce_plugin")
# How far two ways of computing the same outputs may be apart, in multiples of the largest output.
# Windows are followed where there are so many trials, of a network with so many operations a pass, of which they save
# so many: gathering and pasting crops takes time that operations do not show.
_MANY, _SMALL, _PAYS = 32, 2e7, 0.5
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class CapturedSite:
    """A site under given evidence.

    Attributes:
        forward: from the site's values to outputs.
        values: the site's clean values, one tensor (N, ...) for each tensor of the site.
        args: what goes to ``forward`` beside them.
        outputs: the network's own outputs by head, without an autoencoder; None where the site is the input.
        route: "full", "suffix", or what the differences are followed in.
        seconds: that a clean pass of one example took.
        flips: runs trials that set one unit each.
        whole: the same by passes through the whole network, where ``forward`` is a part of it.
    """

    forward: Forward
    values: tuple[Tensor, ...]
    args: tuple[object, ...]
    outputs: dict[str, Tensor] | None = None
    route: str = "full"
    whole: ForwardFromSite | None = None
    seconds: float = 0.0
    flips: IncrementalTrials | None = None

    @property
    def taken(self) -> str:
        """The route that trials took."""
        return self.route if self.flips is None else self.flips.route

    @property
    def is_cut(self) -> bool:
        """Whether the site's value is known to decide the output: nothing by-passes it."""
        suffix = self.forward.suffix if isinstance(self.forward, ForwardFromSite) else None
        return suffix is not None and suffix.is_cut


def hook_of(site: LayerSite | ConceptSite, networks: list[nn.Module]) -> SiteHook:
    """The point of a network at which a site lies.

    Raises:
        ModelError, UnknownNameError: the network does not hold the layer.
    """
    name, module = site.module(networks)
    layer = site.place if isinstance(site, ConceptSite) else site
    point = HookPoint(module, at_input=layer.at_input, element=layer.element, call=layer.call or 0)
    if isinstance(site, ConceptSite):
        return SiteHook(name, point, site.autoencoder.encoder, site.autoencoder.decoder)
    return SiteHook(name, point)


@dataclass
class Router:
    """Finds a site in a network; what it learned about the network's structure serves later experiments too.

    Args:
        forward: the network.
        engine: "auto" runs the part that depends on the site where it can be cut out, "suffix" insists on it, "full"
            passes every trial through the whole network.
    """

    forward: Forward
    engine: str = "auto"
    _suffixes: dict[object, Suffix | str] = field(default_factory=dict)
    _logged: set[str] = field(default_factory=set)
    _paying: dict[object, bool] = field(default_factory=dict)

    def at(
        self, site: LayerSite | ConceptSite, inputs: tuple[Tensor, ...], args: tuple[object, ...], runner: Runner
    ) -> CapturedSite:
        """The site's values for these inputs, and the network from there.

        Raises:
            ModelError: the layer is not reached or reached several times; the network is not deterministic; or
                ``engine="suffix"`` for a network that cannot be cut.
            InputError: the layer's value is no tensor with a row for each example.
        """
        place = hook_of(site, self.forward.modules)
        observed = CapturingForward(runner.forward, place, once=self._named(site).call is None)
        watcher, started = runner.of(observed), time.perf_counter()
        try:
            heads = watcher.reference(inputs, args, 1)
        except AggregateError as error:
            wanted = "one value, and one output of the network, for each example"
            raise InputError(expected("layer", f"a layer with {wanted}", f"another from {place.name!r}")) from error
        values = heads.pop(SITE)
        place = replace(place, point=replace(place.point, element=observed.element))
        whole = ForwardFromSite(runner.forward, place, inputs, args)
        seconds = (time.perf_counter() - started) / len(values)
        captured_site = CapturedSite(whole, (values,), (torch.arange(len(values)),), heads, seconds=seconds)
        # Evidence at a layer is set by hooks, which only whole passes meet.
        if self.engine == "full" or runner.forward is not self.forward:
            return captured_site
        suffix = self._suffix(place, len(inputs), args)
        if isinstance(suffix, Suffix):
            try:
                with torch.inference_mode():
                    captured = suffix.capture(inputs, args, values)
            except Untraceable as error:
                suffix = str(error)
            else:
                cut = ForwardFromSite(self.forward, place, inputs, args, suffix, captured)
                return replace(captured_site, forward=cut, route="suffix", whole=whole)
        self._fall_back(place.name, suffix)
        return captured_site

    def at_input(self, inputs: tuple[Tensor, ...], args: tuple[object, ...]) -> CapturedSite | None:
        """The input itself as a site whose differences can be followed; None where the network cannot be traced."""
        place = SiteHook("the input", HookPoint())
        suffix = self._suffix(place, len(inputs), args)
        if isinstance(suffix, Suffix):
            try:
                with torch.inference_mode():
                    captured = suffix.capture(inputs, args, inputs[0])
            except Untraceable as error:
                suffix = str(error)
            else:
                whole = ForwardFromSite(self.forward, place, inputs, args)
                cut = ForwardFromSite(self.forward, place, inputs, args, suffix, captured)
                return CapturedSite(cut, inputs, (torch.arange(len(inputs[0])),), route="suffix", whole=whole)
        self._fall_back(place.name, suffix)
        return None

    def followed(self, captured_site: CapturedSite, spec: TrialSpec) -> CapturedSite:
        """With what follows the differences of single flips, where the site and the design allow it and it pays."""
        if self.engine == "full" or not follows(spec):
            return captured_site
        if not isinstance(captured_site.forward, ForwardFromSite):
            # The input: only where many trials may repay that the network is traced.
            few = sum(map(spec.n_trials, range(spec.n))) < _MANY
            wanted = captured_site.forward is self.forward and spec.inputs[0].dim() == 4 and not few
            found = self.at_input(captured_site.values, captured_site.args) if wanted else None
            return captured_site if found is None else self._paid(found, spec, captured_site)
        return captured_site if captured_site.forward.suffix is None else self._paid(captured_site, spec, captured_site)

    def _paid(self, captured_site: CapturedSite, spec: TrialSpec, otherwise: CapturedSite) -> CapturedSite:
        """A located site with its flips followed, or what there was before where that does not pay."""
        cut = captured_site.forward
        if not isinstance(cut, ForwardFromSite) or cut.suffix is None or cut.captured is None:
            return otherwise
        flips = IncrementalTrials(cut)
        kind = flips.kind(spec)
        at_input = cut.place.point.module is None
        if (kind == "window" or at_input) and self.engine == "auto":
            suffix, captured = cut.suffix, cut.captured
            key = (id(suffix), *(tuple(x.shape[1:]) for x in spec.inputs), flips.area(spec))
            if key not in self._paying:
                whole = suffix.full_flops(captured)
                share = 1.0 if at_input else suffix.share(captured)
                self._paying[key] = whole >= _SMALL and flips.cost(spec) < _PAYS * share
            if not self._paying[key]:
                return otherwise
        return replace(captured_site, flips=flips) if kind else otherwise

    def start(
        self, captured_site: CapturedSite, runner: Runner, trials: int
    ) -> tuple[CapturedSite, Runner, dict[str, Tensor]]:
        """The reference's outputs, (N, ...) for each head, and what the trials are run with.

        The part of the network that is cut out must say what the network says, or the whole network is used.

        Raises:
            ModelError: the network is not deterministic.
        """
        own = runner.of(captured_site.forward)
        own.flips = captured_site.flips
        heads = own.reference(captured_site.values, captured_site.args, trials)
        whole = captured_site.whole or captured_site.forward
        if not isinstance(whole, ForwardFromSite):
            return captured_site, own, heads
        known = captured_site.outputs if whole.place.decoder is None else None
        some, first = len(captured_site.values[0]) if known else 1, torch.tensor([0])
        started = time.perf_counter()
        with torch.inference_mode():
            wanted = known or whole.full(captured_site.values[0][:1], first)
        captured_site = replace(captured_site, seconds=captured_site.seconds or time.perf_counter() - started)
        with torch.inference_mode():
            if close({name: head[:some] for name, head in heads.items()}, wanted):
                return captured_site, own, heads
            again = whole.full(captured_site.values[0][:1], first)
        check_deterministic({name: head[:1] for name, head in wanted.items()}, again)
        if captured_site.whole is None:
            hint = "Take another layer, or its input (`LayerSite(layer, at_input=True)`)."
            got = f"{whole.place.name!r}, whose own value put back changes the outputs"
            raise ModelError(expected("layer", "one whose value can be set", got, hint))
        self._fall_back(whole.place.name, "its traced part gives other outputs on the clean input")
        return self.start(replace(captured_site, forward=whole, route="full", whole=None, flips=None), runner, trials)

    @staticmethod
    def _named(site: LayerSite | ConceptSite) -> LayerSite:
        return site.place if isinstance(site, ConceptSite) else site

    def _suffix(self, place: SiteHook, n_inputs: int, args: tuple[object, ...]) -> Suffix | str:
        """The part of the network that depends on the site, or why there is none."""
        network = self.forward.forward_func
        if not isinstance(network, nn.Module):
            return "forward_func is a function, not a module"
        if is_opaque(network):
            return "the network is scripted or compiled"
        fixed = tuple(arg if isinstance(arg, (str, int, float, bool, type(None))) else id(arg) for arg in args)
        key = (place.point, id(place.decoder), n_inputs, fixed)
        if key not in self._suffixes:
            try:
                self._suffixes[key] = Suffix(network, place.point, decoder=place.decoder, n_inputs=n_inputs, args=args)
            except Untraceable as error:
                self._suffixes[key] = str(error)
        return self._suffixes[key]

    def _fall_back(self, name: str, reason: str) -> None:
        if self.engine == "suffix":
            hint = 'Write engine="auto" to pass every trial through the whole network.'
            raise ModelError(expected("engine", "'auto' or 'full' for this network", f"'suffix': {reason}", hint))
        if reason not in self._logged:
            self._logged.add(reason)
            logger.info("%s: every trial passes through the whole network, because %s", name, reason)


def follows(spec: TrialSpec) -> bool:
    """Whether trials each flip one unit of one tensor, to a value that does not depend on the trial."""
    return spec.design.flips_one and not spec.intervention.per_trial and len(spec.inputs) == 1


def check_deterministic(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Whether two passes of the same input say the same.

    Raises:
        ModelError: they do not.
    """
    if close(first, second):
        return
    gap = max(float((first[k].double() - second[k].double()).abs().max()) for k in first)
    hint = "Seed or switch off what is random (dropout that ignores eval mode, random transforms)."
    got = f"outputs that differ by {gap:.2g} between two passes of the same input"
    raise ModelError(expected("forward_func", "a deterministic model", got, hint))


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether two sets of outputs are equal up to rounding."""
    if a.keys() != b.keys() or any(a[k].shape != b[k].shape for k in a):
        return False
    for k in a:
        one, other = a[k].double(), b[k].double()
        tolerance = _TOLERANCE.get(a[k].dtype, 1e-4) * float(one.abs().max().clamp(min=1e-12))
        if not bool(((one - other).abs() <= tolerance).all()):
            return False
    return True
