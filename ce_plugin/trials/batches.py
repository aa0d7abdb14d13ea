"""The experiment that a run carries out, and how its trials are cut into batches."""

from __future__ import annotations

import contextlib
import operator
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ce_plugin.designs import Design
from ce_plugin.errors import ArgumentError, expected
from ce_plugin.interventions.base import Context, Intervention
from ce_plugin.networks.forward import is_opaque
from ce_plugin.networks.layers import in_this_thread
from ce_plugin.sites import Units

_FIRST, _LARGEST = (4, 8, 16), 4096
# Shorter batches than this are dominated by fixed costs, so that a larger batch always pays.
_SHORT_SECONDS = 0.004
_TIMINGS = 3
# What kernels load and keep for the shapes of a run, measured.
KERNELS_LOADED = 8 << 20


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with contextlib.suppress(OSError, ValueError), open("/proc/meminfo") as info:
        for line in info:
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return 4 << 30


def _nbytes(value: object) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, (tuple, list)):
        return sum(map(_nbytes, value))
    return 0


@contextlib.contextmanager
def bytes_per_row(modules: list[nn.Module], rows: int, inputs: tuple[Tensor, ...]) -> Iterator[list[int]]:
    """Measure during a forward pass what one row takes at its peak; the list's one entry is valid afterwards.

    The peak of inference is where some operation holds its input and output; residual connections keep a few more
    such tensors alive, hence the factor. Scripted and compiled modules are not hooked. Passes of other threads do not
    count.
    """
    row = max(sum(map(_nbytes, inputs)) // max(rows, 1), 1)
    result, largest, handles = [64 * row], 0, []

    @in_this_thread
    def hook(module: nn.Module, args: object, output: object) -> None:
        nonlocal largest
        largest = max(largest, _nbytes(args) + _nbytes(output))

    for root in modules:
        if is_opaque(root):
            continue
        for module in root.modules():
            if module._modules or is_opaque(module):
                continue
            handles.append(module.register_forward_hook(hook))
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()
    if largest:
        result[0] = 4 * row + 3 * largest // max(rows, 1)


def kernels_overhead(modules: list[nn.Module]) -> int:
    """Bytes that a pass takes whatever its number of rows, measured: convolutions copy their weights, reordered.

    Two copies are alive at once, and the allocator holds on to about as much as one more. Linear maps and convolutions
    of one cell read their weights as they are.
    """
    largest = 0
    for module in modules:
        for parameter in module.parameters():
            if not is_lazy(parameter) and parameter.shape[2:].numel() > 1:
                largest = max(largest, _nbytes(parameter))
    return 3 * largest


class BatchSize:
    """Chooses the number of rows per pass: the fastest of a few, then larger or smaller ones while they are faster.

    On a CPU large batches are *slower* (they fall out of the caches and their memory is handed back to the system
    after each operation), so that time is measured, on trials that have to be run anyway. Sizes take turns, because the
    machine's own speed drifts.

    Args:
        limit: largest number of rows that memory allows.
        fixed: a number of rows that the user wants; nothing is measured then.
        start: what an earlier run learned.

    Attributes:
        rows: the number of rows to take now.
        fastest: the number of rows that proved fastest, once it is known; None where memory was what decided.
    """

    def __init__(self, limit: int, fixed: int | None = None, start: int | None = None) -> None:
        self.limit = max(1, min(limit, _LARGEST))
        self.fastest: int | None = None
        self._times: dict[int, float] = {}
        self._queue: list[int] = []
        if fixed is not None:
            self._chosen = fixed
        elif start is not None:
            self._chosen = min(start, self.limit)
        else:
            self._chosen = min(_FIRST[1], self.limit)
            self._queue = sorted({min(size, self.limit) for size in _FIRST}) * _TIMINGS

    @property
    def rows(self) -> int:
        return self._queue[0] if self._queue else self._chosen

    @property
    def settled(self) -> bool:
        """Whether nothing is left to be timed."""
        return not self._queue

    @contextlib.contextmanager
    def timed(self, rows: int, device: torch.device) -> Iterator[None]:
        """Time one pass of ``rows`` rows and learn from it."""
        if not self._queue or rows != self.rows:
            yield
            return
        on_cuda = device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        yield
        if on_cuda:
            torch.cuda.synchronize(device)
        self._learn(time.perf_counter() - start)

    def _learn(self, seconds: float) -> None:
        if not self._queue:
            return  # memory has run out during this very pass
        rows = self._queue.pop(0)
        # The fastest of a few: a first pass of a new shape sets things up, and other work only ever adds time.
        self._times[rows] = min(self._times.get(rows, seconds), seconds)
        if self._queue:
            return
        per_row = {size: taken / size for size, taken in self._times.items()}
        best, largest = min(per_row, key=per_row.__getitem__), max(per_row)
        short = self._times[largest] <= _SHORT_SECONDS
        if (short or best == largest) and 2 * largest <= self.limit:
            self._queue = [2 * largest] if short else [best, 2 * best] * _TIMINGS
        elif not short and best == min(per_row) and best > 1:
            self._queue = [best, best // 2] * _TIMINGS
        else:
            self._chosen = largest if short else best
            bound = self._chosen == largest and self.limit < _LARGEST
            self.fastest = None if bound else self._chosen

    def settle(self, rows: int, limit: int) -> None:
        """Take so many rows from now on, and nothing is timed."""
        self.limit, self._chosen, self._queue = limit, min(rows, limit), []

    def halve(self, rows: int) -> None:
        """After ``rows`` rows did not fit into memory."""
        self.limit = max(1, min(self.limit, rows // 2))
        self._chosen = min(self.rows, self.limit)
        self._queue = []


# An example and the range of its trials that are wanted.
Wanted: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True)
class Cost:
    """What a run will cost, known before it.

    Args:
        trials: over all examples, alternative values and draws of evidence.
        forward_passes: what the run takes, in passes of one example through the whole network, references included;
            counted in floating-point operations where only a part of it is run.
        route: how trials are evaluated: ``"full"`` passes each through the whole network, ``"suffix"`` through the
            part that depends on the site, ``"channel differences"`` and ``"window differences"`` only follow what a
            single unit changes there.
        outcome_bytes: memory that the outcomes of all trials take.
        pass_bytes: memory that a pass of one row takes, with the outcomes and the clean values that are kept beside it;
            no budget below can be kept.
        memory_budget: of the run, in bytes; None where there is none.

    Example:
        >>> print(Cost(trials=196, forward_passes=198, route="full", outcome_bytes=1 << 20))
        196 trials, 198 forward passes (route: full), 1.0 MiB of outcomes
    """

    trials: int
    forward_passes: float
    route: str
    outcome_bytes: int
    pass_bytes: int = 0
    memory_budget: int | None = None

    def __str__(self) -> str:
        passes = f"{self.trials} trials, {self.forward_passes:.6g} forward passes (route: {self.route})"
        text = f"{passes}, {self.outcome_bytes / 2**20:.1f} MiB of outcomes"
        if self.memory_budget is not None and self.pass_bytes > self.memory_budget:
            budget = f"the budget of {self.memory_budget / 2**20:.1f} MiB"
            text += f"; one row takes {self.pass_bytes / 2**20:.1f} MiB, more than {budget}"
        return text


@dataclass(frozen=True)
class TrialSpec:
    """What stays the same while trials vary.

    Args:
        inputs: the inputs under their evidence, (N, ...) each.
        args: additional forward arguments; tensors with N rows go with their example.
        units: of the input.
        design: yields the assignments.
        intervention: supplies x'.
        context: ids and seed.
    """

    inputs: tuple[Tensor, ...]
    args: tuple[object, ...]
    units: Units
    design: Design
    intervention: Intervention
    context: Context

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.inputs[0])

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return self.inputs[0].device

    @property
    def repeats(self) -> int:
        """How often a trial is run: exact designs run it under every alternative value, random ones take turns."""
        return self.intervention.n_variants if self.design.exact else 1

    def n_trials(self, example: int) -> int:
        """Trials of one example, repeats not counted."""
        return self.design.n_trials_for(int(self.units.n_units[example]))

    def assignments(self, example: int, start: int, stop: int) -> Tensor:
        """Some trials of one example, bool (stop - start, U); units that only other examples have stay idle."""
        n_units = int(self.units.n_units[example])
        rows = self.design.rows(n_units, start, stop, example=self.context.ids[example], grid=self.units.grid)
        return torch.nn.functional.pad(rows, (0, self.units.width - n_units)) if n_units < self.units.width else rows

    def variants(self, start: int, stop: int) -> Tensor:
        """Which alternative value a trial of a random design sets: in turn; antithetic partners set the same."""
        return self.design.turns(stop)[start:stop] % self.intervention.n_variants

    def args_of(self, examples: Tensor) -> tuple[object, ...]:
        """The additional forward arguments of a batch of rows."""
        return rows_of(self.args, self.n, examples)


@dataclass(frozen=True)
class GivenTrials(TrialSpec):
    """Trials whose assignments are given, each run under every alternative value.

    Args:
        given: for each example its assignments, bool (T, U).
    """

    given: tuple[Tensor, ...] = ()

    def n_trials(self, example: int) -> int:
        """Trials of one example, repeats not counted."""
        return len(self.given[example])

    def assignments(self, example: int, start: int, stop: int) -> Tensor:
        """Some trials of one example, bool (stop - start, U)."""
        rows = self.given[example][start:stop]
        return torch.nn.functional.pad(rows, (0, self.units.width - rows.shape[1]))


class _Alternative(Intervention):
    """One of an intervention's alternative values.

    Args:
        intervention: supplies them.
        variant: which one.
    """

    def __init__(self, intervention: Intervention, variant: int) -> None:
        self.intervention, self.variant = intervention, variant
        self.per_trial, self.forward_equivalents = intervention.per_trial, intervention.forward_equivalents

    def values(self, clean: Tensor, context: Context) -> Tensor:
        return self.intervention.values(clean, replace(context, variant=self.variant))

    def __repr__(self) -> str:
        return repr(self.intervention)


def alternatives(spec: TrialSpec) -> list[TrialSpec]:
    """The trials with each alternative value by itself; those of a random design, which takes turns, stay together."""
    if spec.repeats == 1:
        return [spec]
    return [replace(spec, intervention=_Alternative(spec.intervention, variant)) for variant in range(spec.repeats)]


_Given = TypeVar("_Given")


def rows_of(given: tuple[_Given, ...], n: int, examples: Tensor) -> tuple[_Given, ...]:
    """Inputs or arguments of some examples: tensors with N rows are taken row by row, everything else as it is."""
    found: list[Any] = list(given)
    for position, value in enumerate(given):
        if isinstance(value, Tensor) and value.dim() and len(value) == n:
            found[position] = value[examples.to(value.device)]
    return tuple(found)


@dataclass(frozen=True)
class TrialBatch:
    """One batch: each row's example, what it sets, which alternative value, and which trial it is; (B, ...) each."""

    examples: Tensor
    assignments: Tensor
    variants: Tensor
    trials: Tensor

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, part: slice | Tensor) -> TrialBatch:
        return TrialBatch(self.examples[part], self.assignments[part], self.variants[part], self.trials[part])


def batches(spec: TrialSpec, wanted: list[Wanted], size: BatchSize) -> Iterator[TrialBatch]:
    """All rows in order, in full batches across examples; ``size`` may change between them."""
    repeats, parts, count = spec.repeats, [], 0
    for example, start, stop in wanted:
        # Random designs draw all their trials at once; exact ones make each piece when it is needed.
        drawn = None if spec.design.exact else spec.assignments(example, 0, stop)
        first = start * repeats
        while first < stop * repeats:
            row = torch.arange(first, min(first + size.rows - count, stop * repeats))
            trials = row // repeats
            low, high = int(trials[0]), int(trials[-1]) + 1
            piece = spec.assignments(example, low, high) if drawn is None else drawn[low:high]
            variants = row % repeats if drawn is None else spec.variants(low, high)
            parts.append((torch.full_like(row, example), piece[trials - low], variants, trials))
            first, count = first + len(row), count + len(row)
            if count == size.rows:
                yield TrialBatch(*map(torch.cat, zip(*parts, strict=True)))
                parts, count = [], 0
    if parts:
        yield TrialBatch(*map(torch.cat, zip(*parts, strict=True)))


# For each example and each alternative value the counterfactual inputs, (1, ...) each.
Values: TypeAlias = "dict[int, list[tuple[Tensor, ...]]]"

_BYTES = 256 << 20


class Counterfactuals:
    """Supplies the counterfactual values of examples, and keeps them while the same experiment asks again.

    Args:
        laid_out: puts a tensor into the memory format in which the network takes it.
    """

    def __init__(self, laid_out: Callable[[Tensor], Tensor]) -> None:
        self._laid_out = laid_out
        self._kept: Values = {}
        self._kept_of: tuple[object, ...] = (None, None, None)

    def chunks(self, spec: TrialSpec, wanted: list[Wanted]) -> Iterator[tuple[list[Wanted], Values | None]]:
        """Examples in groups whose values fit into a fixed amount of memory, with the values.

        The values are None where they depend on the trial.
        """
        each = sum(map(_nbytes, spec.inputs)) // spec.n * spec.intervention.n_variants
        step = max(1, _BYTES // max(each, 1))
        for first in range(0, len(wanted), step):
            chunk = wanted[first : first + step]
            # An attack is dear: where all examples fit into one chunk, later rounds of trials find its values here.
            yield chunk, self.of(spec, [example for example, _, _ in chunk], keep=spec.n <= step)

    def of(self, spec: TrialSpec, examples: list[int], keep: bool = False) -> Values | None:
        """The values of some examples; None where they depend on the trial."""
        if spec.intervention.per_trial:
            return None
        of = (spec.inputs, spec.intervention, spec.context)
        if any(map(operator.is_not, of, self._kept_of)):
            self._kept_of, self._kept = of, {}
        missing = [example for example in examples if example not in self._kept]
        if not missing:
            return self._kept
        values, context = dict(self._kept), spec.context.select(missing)
        for variant in range(spec.intervention.n_variants):
            made = []
            for position, x in enumerate(spec.inputs):
                at = replace(context, variant=variant, position=position)
                made.append(checked_values(spec.intervention, x[missing], at))
            for k, example in enumerate(missing):
                own = tuple([self._laid_out(x[k : k + 1]) for x in made])
                values.setdefault(example, []).append(own)
        if keep:
            self._kept = values
        return values


def values_of_trials(spec: TrialSpec, rows: TrialBatch, clean: Tensor, mask: Tensor, position: int) -> Tensor:
    """Values that depend on what the trial sets, (B, ...), one call for each alternative value.

    Args:
        spec: the experiment.
        rows: the batch.
        clean: each row's own value, (B, ...).
        mask: what each row sets, broadcastable to ``clean``.
        position: which of the inputs this is.
    """
    context = replace(spec.context.select(rows.examples.tolist()), position=position)
    do = clean.clone()
    for variant in sorted(set(rows.variants.tolist())):
        here = (rows.variants == variant).nonzero()[:, 0]
        part = replace(context.select(here.tolist()), variant=variant, mask=mask[here.to(mask.device)])
        do[here.to(do.device)] = checked_values(spec.intervention, clean[here.to(do.device)], part)
    return do


def checked_values(intervention: Intervention, clean: Tensor, context: Context) -> Tensor:
    """An intervention's x', which anyone may have written, in the type and on the device of the clean value.

    Raises:
        ArgumentError: the values have another shape than ``clean``, or are not finite.
    """
    values = intervention.values(clean, context).detach()
    if values.shape != clean.shape:
        wanted = f"one whose values have the input's shape {tuple(clean.shape)}"
        raise ArgumentError(expected("intervention", wanted, f"{intervention!r} with {tuple(values.shape)}"))
    if not bool(torch.isfinite(values).all()):
        raise ArgumentError(expected("intervention", "one whose values are finite", f"NaN from {intervention!r}"))
    return values.to(clean)
