"""The experiment that a run carries out, and how its trials are cut into batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ce_plugin.designs import Design
from ce_plugin.interventions.base import Context, Intervention
from ce_plugin.sites import Units
from ce_plugin.trials.batching import BatchSize

__all__ = ["Cost", "Rows", "Setting", "Wanted", "batches", "rows_of_args"]

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

    Example:
        >>> print(Cost(trials=196, forward_passes=198, route="full", outcome_bytes=1 << 20))
        196 trials, 198 forward passes (route: full), 1.0 MiB of outcomes
    """

    trials: int
    forward_passes: float
    route: str
    outcome_bytes: int

    def __str__(self) -> str:
        passes = f"{self.trials} trials, {self.forward_passes:.6g} forward passes (route: {self.route})"
        return f"{passes}, {self.outcome_bytes / 2**20:.1f} MiB of outcomes"


@dataclass(frozen=True)
class Setting:
    """What is held fixed while trials vary.

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
        blocks = self.design.blocks(stop)
        trials = torch.arange(stop) if blocks is None else blocks
        return trials[start:stop] % self.intervention.n_variants

    def args_of(self, examples: Tensor) -> tuple[object, ...]:
        """The additional forward arguments of a batch of rows."""
        return rows_of_args(self.args, self.n, examples)


def rows_of_args(args: tuple[object, ...], n: int, examples: Tensor) -> tuple[object, ...]:
    """Tensors with one row per example are taken row by row, everything else as it is."""
    return tuple(
        arg[examples.to(arg.device)] if isinstance(arg, Tensor) and arg.dim() and len(arg) == n else arg for arg in args
    )


@dataclass(frozen=True)
class Rows:
    """One batch: each row's example, what it sets, which alternative value, and which trial it is; (B, ...) each."""

    examples: Tensor
    assignments: Tensor
    variants: Tensor
    trials: Tensor

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, part: slice) -> Rows:
        return Rows(self.examples[part], self.assignments[part], self.variants[part], self.trials[part])


def _segments(setting: Setting, wanted: list[Wanted], size: BatchSize) -> Iterator[Rows]:
    """All rows in order, in pieces that belong to one example and are no longer than a batch."""
    repeats = setting.repeats
    for example, start, stop in wanted:
        # Random designs draw all their trials at once; exact ones make each piece when it is needed.
        drawn = None if setting.design.exact else setting.assignments(example, 0, stop)
        first = start * repeats
        while first < stop * repeats:
            last = min(first + size.rows, stop * repeats)
            row = torch.arange(first, last)
            trials = row // repeats
            low, high = int(trials[0]), int(trials[-1]) + 1
            piece = drawn[low:high] if drawn is not None else setting.assignments(example, low, high)
            variants = setting.variants(low, high) if drawn is not None else row % repeats
            yield Rows(torch.full_like(row, example), piece[trials - low], variants, trials)
            first = last


def batches(setting: Setting, wanted: list[Wanted], size: BatchSize) -> Iterator[Rows]:
    """Full batches of rows, across examples; ``size`` may change between them."""
    held: list[Rows] = []
    count = 0
    for segment in _segments(setting, wanted, size):
        held.append(segment)
        count += len(segment)
        while count >= size.rows:
            joined, take = _join(held), size.rows  # the size may change while the batch runs
            held, count = [joined[take:]], count - take
            yield joined[:take]
    if count:
        yield _join(held)


def _join(parts: list[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    return Rows(
        torch.cat([part.examples for part in parts]),
        torch.cat([part.assignments for part in parts]),
        torch.cat([part.variants for part in parts]),
        torch.cat([part.trials for part in parts]),
    )
