"""Where an experiment takes place: a site's clean values, the network from there, and the way that trials take."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from ce_plugin.errors import InputError, ModelError, expected
from ce_plugin.interventions.base import Context, Intervention
from ce_plugin.networks.forward import Forward, Shared, is_opaque, select_heads
from ce_plugin.networks.graph import Suffix, SuffixConstants
from ce_plugin.networks.layers import find_layer, hooked, keep_copy, rows_dim
from ce_plugin.networks.tracing import Element, HookPoint, Untraceable, traced
from ce_plugin.sites import ConceptSite, LayerSite
from ce_plugin.trials._front import all_set, front_changes
from ce_plugin.trials._incremental import IncrementalTrials, with_rows
from ce_plugin.trials._repeats import check_deterministic, close
from ce_plugin.trials._runner import AggregateError, Runner
from ce_plugin.trials.batches import TrialSpec, checked_values, rows_of

logger = logging.getLogger("ce_plugin")
# The name of the site's value among the heads of a capturing pass; no user's head has it.
SITE = "\0site"
# Windows are followed where there are so many trials, of a network with so many operations a pass, of which they save
# so many: gathering and pasting crops takes time that operations do not show.
_MANY, _SMALL, _PAYS = 32, 2e7, 0.5


class _Reached(Exception):  # noqa: N818 - ends a pass, and is no error
    """The layer was reached; the rest of the pass is not wanted."""


@dataclass(frozen=True)
class SiteHook:
    """Where a site lies in a network.

    Args:
        name: the layer's dotted name, for messages.
        point: where the layer's value is read and set.
        encoder, decoder: of a concept autoencoder, whose code then is the site's value.
    """

    name: str
    point: HookPoint
    encoder: nn.Module | None = None
    decoder: nn.Module | None = None


def hook_of(site: LayerSite | ConceptSite, networks: list[nn.Module]) -> SiteHook:
    """The point of a network at which a site lies.

    Raises:
        ModelError, UnknownNameError: the network does not hold the layer.
    """
    layer = site.place if isinstance(site, ConceptSite) else site
    name, module = find_layer(networks, layer.layer)
    rows = rows_dim(module, layer.element, layer.at_input)
    point = HookPoint(module, at_input=layer.at_input, element=layer.element, call=layer.call or 0, rows=rows)
    if isinstance(site, ConceptSite):
        return SiteHook(name, point, site.autoencoder.encoder, site.autoencoder.decoder)
    return SiteHook(name, point)


class CapturingForward(Forward):
    """The network as it is, with the site's value as one more head (named ``SITE``).

    Args:
        forward: the network.
        place: the site.
        once: whether passing through the layer several times is an error, as it is where no call was named.
    """

    def __init__(self, forward: Forward, place: SiteHook, once: bool) -> None:
        self.forward, self.place, self.once = forward, place, once
        self.modules, self.learned = forward.modules, {}
        self.element: Element = None

    def __call__(self, inputs: tuple[Tensor, ...], args: tuple[object, ...] = ()) -> dict[str, Tensor]:
        store: list[Tensor] = []
        with hooked(self.place.point, partial(keep_copy, store), self.place.name) as found:
            heads = self.forward(inputs, args)
        if self.once and found.calls > 1:
            hint = f"Say which call: `LayerSite(layer, call=0)` to `call={found.calls - 1}`."
            got = f"{self.place.name!r}, which is passed through {found.calls} times"
            raise ModelError(expected("layer", "one that the network passes through once", got, hint))
        self.element = found.element
        return {**heads, SITE: self._encoded(store[0])}

    def at_site(self, inputs: tuple[Tensor, ...], args: tuple[object, ...]) -> Tensor:
        """The site's value alone; the pass ends at the layer."""
        store: list[Tensor] = []

        def act(value: Tensor) -> None:
            keep_copy(store, value)
            raise _Reached

        with torch.inference_mode(), suppress(_Reached), hooked(self.place.point, act, self.place.name):
            self.forward(inputs, args)
        with torch.inference_mode():
            value = self._encoded(store[0])
        return value.clone()

    def _encoded(self, value: Tensor) -> Tensor:
        return value if self.place.encoder is None else self.place.encoder(value)


class ForwardFromSite(Forward):
    """From values of the site, and each row's example, to the network's outputs.

    Args:
        forward: the network.
        place: the site.
        inputs, args: the examples' own inputs and additional arguments, which everything that by-passes the site
            depends on.
        suffix: runs only what depends on the site; None passes every row through the whole network.
        captured: what the suffix knows about the examples.
    """

    def __init__(
        self,
        forward: Forward,
        place: SiteHook,
        inputs: tuple[Tensor, ...],
        args: tuple[object, ...],
        suffix: Suffix | None = None,
        captured: SuffixConstants | None = None,
    ) -> None:
        self.forward, self.place = forward, place
        self.inputs, self.args = inputs, args
        self.suffix, self.captured = suffix, captured
        self.modules = forward.modules
        key = ("downstream", place.name, place.point.at_input, place.point.call, suffix is None)
        found = forward.learned.setdefault(key, {})
        self.learned = found if isinstance(found, dict) else {}

    def __call__(self, inputs: tuple[Tensor, ...], args: tuple[object, ...] = ()) -> dict[str, Tensor]:
        (values,), (examples,) = inputs, args
        if not isinstance(examples, Tensor):
            raise TypeError("examples are a tensor of indices")
        if self.suffix is not None and self.captured is not None:
            with traced():
                heads = select_heads(self.suffix.run(self.captured, values, examples), self.forward.output)
                return with_rows(heads, len(values))
        return self.full(values, examples)

    def full(self, values: Tensor, examples: Tensor) -> dict[str, Tensor]:
        """By a pass through the whole network, with a hook that sets the layer's value."""
        # A copy, because the operation after the layer may write to it.
        layer = values.clone() if self.place.decoder is None else self.place.decoder(values)
        n = len(self.inputs[0])
        args = rows_of(self.args, n, examples)
        if self.place.point.module is None:
            return self.forward((layer,), args)
        with hooked(self.place.point, lambda _: layer, self.place.name):
            return self.forward(rows_of(self.inputs, n, examples), args)


@dataclass(frozen=True)
class LayerEvidence:
    """One evidence at a layer.

    Args:
        site, place: where.
        intervention: what is set.
        context: of all N examples.
        chosen: from a number of units to what is set for each example, bool (N, U).
        networks: that hold the layer.
        known: how values of a shape are laid out.
    """

    site: LayerSite | ConceptSite
    place: SiteHook
    intervention: Intervention
    context: Context
    chosen: Callable[[int], Tensor]
    networks: list[nn.Module]
    known: dict[torch.Size, LayerSite | ConceptSite] = field(default_factory=dict)

    def __call__(self, value: Tensor, examples: Tensor) -> Tensor:
        """The layer's value with the evidence set, for rows of these examples."""
        own = value if self.place.encoder is None else self.place.encoder(value)
        shape = own.shape[1:]
        if shape not in self.known:
            site = self.site
            self.known[shape] = site.laid_out(own, self.networks) if isinstance(site, LayerSite) else site
        units = self.known[shape].units_of((own,))
        rows = self.chosen(units.width)[examples.cpu()]
        (mask,) = units.masks(rows, torch.zeros(len(rows), dtype=torch.int64))
        mask = mask.to(own.device)
        context = self.context.select(examples.tolist())
        do = checked_values(self.intervention, own, replace(context, mask=mask))
        new = torch.where(mask, do, own)
        return new if self.place.decoder is None else self.place.decoder(new)


class EvidenceForward(Forward):
    """A network with evidence at some of its layers; its last additional argument is each row's example.

    Args:
        forward: the network.
        evidences: in the order in which they are set.
    """

    def __init__(self, forward: Forward, evidences: list[LayerEvidence]) -> None:
        self.forward, self.evidences = forward, evidences
        self.modules, self.learned = forward.modules, {}

    def __call__(self, inputs: tuple[Tensor, ...], args: tuple[object, ...] = ()) -> dict[str, Tensor]:
        with self.held(args) as rest:
            return self.forward(inputs, rest)

    @contextmanager
    def held(self, args: tuple[object, ...]) -> Iterator[tuple[object, ...]]:
        """The evidence is set in one pass through the network, with its own additional arguments."""
        *rest, examples = args
        if not isinstance(examples, Tensor):
            raise TypeError("the last argument holds the examples' indices")
        with ExitStack() as stack:
            for evidence in self.evidences:
                act = partial(evidence, examples=examples)
                stack.enter_context(hooked(evidence.place.point, act, evidence.place.name))
            yield tuple(rest)


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
        self,
        site: LayerSite | ConceptSite,
        inputs: tuple[Tensor, ...],
        args: tuple[object, ...],
        runner: Runner,
        repeat: bool = False,
    ) -> CapturedSite:
        """The site's values for these inputs, and the network from there.

        Args:
            site: where.
            inputs, args: of the network, (N, ...) each.
            runner: of the network.
            repeat: pass the last example once more, which must give the same.

        Raises:
            ModelError: the layer is not reached or reached several times; the network is not deterministic; or
                ``engine="suffix"`` for a network that cannot be cut.
            InputError: the layer's value is no tensor with a row for each example.
        """
        place = hook_of(site, self.forward.modules)
        layer = site.place if isinstance(site, ConceptSite) else site
        capturing = CapturingForward(runner.forward, place, once=layer.call is None)
        started = time.perf_counter()
        try:
            heads = runner.of(capturing).reference(inputs, args, 1, repeat)
        except AggregateError as error:
            wanted = "one value, and one output of the network, for each example"
            raise InputError(expected("layer", f"a layer with {wanted}", f"another from {place.name!r}")) from error
        values = heads.pop(SITE)
        place = replace(place, point=replace(place.point, element=capturing.element))
        whole = ForwardFromSite(runner.forward, place, inputs, args)
        seconds = (time.perf_counter() - started) / len(values)
        captured_site = CapturedSite(whole, (values,), (torch.arange(len(values)),), heads, seconds=seconds)
        # Evidence at a layer is set by hooks, which only whole passes meet.
        if self.engine == "full" or runner.forward is not self.forward:
            return captured_site
        cut = self._cut(place, inputs, args, values)
        return captured_site if cut is None else replace(captured_site, forward=cut, route="suffix", whole=whole)

    def followed(self, captured_site: CapturedSite, spec: TrialSpec) -> CapturedSite:
        """With what follows the differences of single flips, where the site and the design allow it and it pays."""
        flips_one = spec.design.flips_one and not spec.intervention.per_trial and len(spec.inputs) == 1
        if self.engine == "full" or not flips_one:
            return captured_site
        found = captured_site
        if captured_site.forward is self.forward and spec.inputs[0].dim() == 4:
            # The input: only where many trials may repay that the network is traced.
            if sum(map(spec.n_trials, range(spec.n))) < _MANY:
                return captured_site
            inputs, args, place = captured_site.values, captured_site.args, SiteHook("the input", HookPoint())
            cut = self._cut(place, inputs, args, inputs[0])
            if cut is not None:
                whole, examples = ForwardFromSite(self.forward, place, inputs, args), torch.arange(len(inputs[0]))
                found = CapturedSite(cut, inputs, (examples,), route="suffix", whole=whole)
        cut_out = found.forward
        if not isinstance(cut_out, ForwardFromSite) or cut_out.suffix is None or cut_out.captured is None:
            return captured_site
        flips = IncrementalTrials(cut_out.suffix, cut_out.captured, self.forward.output)
        with traced():
            return replace(found, flips=flips) if self._pays(flips, cut_out, spec) else captured_site

    def _pays(self, flips: IncrementalTrials, cut: ForwardFromSite, spec: TrialSpec) -> bool:
        """Whether following differences takes less time; only for windows that needs to be measured."""
        kind, at_input = flips.kind(spec), cut.place.point.module is None
        suffix, captured = cut.suffix, cut.captured
        if suffix is None or captured is None or not kind:
            return False
        if self.engine != "auto" or not (kind == "window" or at_input):
            return True
        key = (id(suffix), *[x.shape[1:] for x in spec.inputs], flips.area(spec))
        if key not in self._paying:
            large = suffix.full_flops(captured) >= _SMALL
            share = 1.0 if at_input else suffix.share(captured)
            self._paying[key] = large and flips.cost(spec) < _PAYS * share
        return self._paying[key]

    def start(
        self, captured_site: CapturedSite, runner: Runner, trials: int, repeat: bool = False
    ) -> tuple[CapturedSite, Runner, dict[str, Tensor]]:
        """The reference's outputs, (N, ...) for each head, and what the trials are run with.

        The part of the network that is cut out must return what the network returns, or the whole network is used.
        Where the site is the input, ``repeat`` passes the last example once more; at a layer :meth:`at` has done so.

        Raises:
            ModelError: the network is not deterministic.
            Untraceable: the part that is cut out fails, or returns something else: see :meth:`uncut`.
        """
        own = runner.of(captured_site.forward)
        own.flips = captured_site.flips
        at_input = not isinstance(captured_site.forward, ForwardFromSite)
        heads = own.reference(captured_site.values, captured_site.args, trials, repeat and at_input)
        whole = captured_site.whole or captured_site.forward
        if not isinstance(whole, ForwardFromSite):
            return captured_site, own, heads
        known = captured_site.outputs if whole.place.decoder is None else None
        few = torch.arange(runner.fewest(len(whole.inputs[0])))
        first = captured_site.values[0][few.to(captured_site.values[0].device)]
        with torch.inference_mode():
            started = time.perf_counter()
            wanted = known or whole.full(first, few)
            captured_site = replace(captured_site, seconds=captured_site.seconds or time.perf_counter() - started)
            if close(heads if known else {name: head[: len(few)] for name, head in heads.items()}, wanted):
                return captured_site, own, heads
            again = whole.full(first, few)
        check_deterministic({name: head[: len(few)] for name, head in wanted.items()}, again)
        if captured_site.whole is None:
            hint = "Take another layer, or its input (`LayerSite(layer, at_input=True)`)."
            got = f"{whole.place.name!r}, whose own value put back changes the outputs"
            raise ModelError(expected("layer", "one whose value can be set", got, hint))
        raise Untraceable("its traced part gives other outputs on the clean input")

    def uncut(self, captured_site: CapturedSite, failure: Exception) -> CapturedSite:
        """The same site with passes through the whole network, now and in later experiments.

        Args:
            captured_site: what :meth:`at` found, or the input.
            failure: of the part that was cut out.

        Raises:
            ModelError: ``engine="suffix"`` insists on that part.
        """
        whole, reason = captured_site.whole, str(failure)
        place = SiteHook("the input", HookPoint()) if whole is None else whole.place
        inputs, args = (captured_site.values, captured_site.args) if whole is None else (whole.inputs, whole.args)
        self._suffixes[_key(place, inputs, args)] = reason
        self._fall_back(place.name, reason)
        return replace(captured_site, forward=whole or captured_site.forward, route="full", whole=None, flips=None)

    def changes(self, captured_site: CapturedSite, spec: TrialSpec) -> list[Tensor]:
        """Where the changes of a layer's units arrive: at its front, whatever way its trials take.

        The front of a code, and of a layer in a network that cannot be traced, is the site itself; the latter is said
        once.

        Args:
            captured_site: the layer.
            spec: its trials.

        Returns:
            For each example (F, ...) in the layer's shape, over the values of the front and the alternative values of
            the intervention; see :func:`~ce_plugin.trials._front.front_changes`.
        """
        whole = captured_site.forward
        if isinstance(whole, ForwardFromSite) and whole.place.decoder is None:
            try:
                return self._at_front(whole, spec)
            except Untraceable as reason:
                if f"front: {reason}" not in self._logged:
                    self._logged.add(f"front: {reason}")
                    said = "%s: the map lies where the layer itself changes, because %s"
                    logger.warning(said, whole.place.name, reason)
        return _by_example(spec, lambda i, do: (do - spec.inputs[0][i : i + 1]).abs())

    def _at_front(self, whole: ForwardFromSite, spec: TrialSpec) -> list[Tensor]:
        """The changes at the front.

        Raises:
            Untraceable: it is not found.
        """

        def changes(cut: ForwardFromSite | str) -> list[Tensor]:
            if isinstance(cut, str) or cut.suffix is None or cut.captured is None:
                raise Untraceable(str(cut))
            with torch.inference_mode(), traced():
                found = _by_example(spec, partial(front_changes, cut.suffix, cut.captured))
            return [change.clone() for change in found]  # ordinary tensors

        values = spec.inputs[0]
        if not isinstance(whole.forward, EvidenceForward):
            return changes(
                whole if whole.suffix else self._traced(whole.place, whole.inputs, whole.args, values, self._suffixes)
            )
        found: list[Tensor] = []
        # What is behind the layer is not passed through here, which is an error elsewhere.
        with suppress(ModelError), whole.forward.held(whole.args) as args:
            found = changes(self._traced(whole.place, whole.inputs, args, values, {}))
        return found

    def _cut(
        self, place: SiteHook, inputs: tuple[Tensor, ...], args: tuple[object, ...], values: Tensor
    ) -> ForwardFromSite | None:
        """The part of the network that depends on the site; None where it cannot be cut out, which is logged.

        Raises:
            ModelError: it cannot be, and ``engine="suffix"`` insists on it.
        """
        found = self._traced(place, inputs, args, values, self._suffixes)
        if isinstance(found, str):
            self._fall_back(place.name, found)
            return None
        return found

    def _traced(
        self,
        place: SiteHook,
        inputs: tuple[Tensor, ...],
        args: tuple[object, ...],
        values: Tensor,
        suffixes: dict[object, Suffix | str],
    ) -> ForwardFromSite | str:
        """The part of the network that depends on the site, or why it cannot be cut out; what is learned is added."""
        network = self.forward.forward_func
        if not isinstance(network, nn.Module):
            return "forward_func is a function, not a module"
        if is_opaque(network):
            return "the network is scripted or compiled"
        if any(isinstance(arg, Shared) for arg in args):
            return "an additional argument belongs to all examples"
        key = _key(place, inputs, args)
        try:
            with traced():
                suffix = suffixes.get(key)
                if suffix is None:
                    suffix = Suffix(network, place.point, decoder=place.decoder, n_inputs=len(inputs), args=args)
                    suffixes[key] = suffix
                if isinstance(suffix, str):
                    return suffix
                with torch.inference_mode():
                    captured = suffix.capture(inputs, args, values)
                return ForwardFromSite(self.forward, place, inputs, args, suffix, captured)
        except Untraceable as error:
            # Where the capture failed the suffix stays: it may succeed with other inputs.
            suffixes.setdefault(key, str(error))
            return str(error)

    def _fall_back(self, name: str, reason: str) -> None:
        if self.engine == "suffix":
            hint = 'Write engine="auto" to pass every trial through the whole network.'
            raise ModelError(expected("engine", "'auto' or 'full' for this network", f"'suffix': {reason}", hint))
        if reason not in self._logged:
            self._logged.add(reason)
            logger.info("%s: every trial passes through the whole network, because %s", name, reason)


def _by_example(spec: TrialSpec, at: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
    """What ``at`` finds with all units set, for each example (F, ...), over the intervention's alternative values."""
    variants = range(spec.intervention.n_variants)
    return [torch.cat([at(i, all_set(spec, i, variant)) for variant in variants]) for i in range(spec.n)]


def _key(place: SiteHook, inputs: tuple[Tensor, ...], args: tuple[object, ...]) -> object:
    """What a traced part of a network belongs to."""
    fixed = [arg if isinstance(arg, (str, int, float, bool, type(None))) else id(arg) for arg in args]
    return (place.point, id(place.decoder), len(inputs), *fixed)
