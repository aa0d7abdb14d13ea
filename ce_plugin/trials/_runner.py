"""Runs trials: sets what an assignment says, passes it through the network, measures the outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ce_plugin.errors import CEPluginError, ModelError, expected
from ce_plugin.networks.forward import Forward, is_opaque
from ce_plugin.networks.tracing import Untraceable
from ce_plugin.trials._incremental import IncrementalTrials
from ce_plugin.trials._repeats import check_repeated, random_marks
from ce_plugin.trials.batches import (
    KERNELS_LOADED,
    BatchSize,
    Counterfactuals,
    TrialBatch,
    TrialSpec,
    Values,
    batches,
    bytes_per_row,
    free_memory,
    kernels_overhead,
    rows_of,
    values_of_trials,
)

# From the heads' outputs of B rows and the rows' examples (B,) to each head's outcomes (B, C).
Measure: TypeAlias = Callable[[dict[str, Tensor], Tensor], dict[str, Tensor]]
_REFERENCE_ROWS = 16
# Alive at once: sums over alternative values, their means, and two of their kind in float64, twice as large.
OUTCOME_COPIES = 6
# A run must have this many trials before it is worth trying another memory layout.
_MANY = 32


class AggregateError(Exception):
    """The forward function returned one value for the batch, not one per row."""


@dataclass
class _Shared:
    """What runners of one experiment know in common.

    Args:
        passes: rows that went through the network, or a part of it.
        row_bytes: the most that a row of a pass took at its peak.
        drawn: whether a pass of the clean inputs drew random numbers.
    """

    passes: int = 0
    row_bytes: int = 0
    drawn: bool = False


class Runner:
    """Evaluates trials in batches.

    Args:
        forward: what is called.
        rows: number of rows per pass; None chooses it by memory and speed.
        memory_budget: bytes that a pass may take beyond model and inputs; None means half of what is free.
        show_progress: a progress bar over trials.

    Attributes:
        outcome_bytes: what the outcomes of all trials take, which is part of the budget.
        estimate_bytes: what estimating effects from them takes afterwards, beside what the allocator then holds.

    Example:
        >>> runner = Runner(Forward(torch.nn.Linear(2, 3)), memory_budget=1 << 20)
        >>> runner.rows is None, runner.passes
        (True, 0)
    """

    def __init__(
        self, forward: Forward, rows: int | None = None, memory_budget: int | None = None, show_progress: bool = False
    ) -> None:
        self.forward = forward
        self.rows = rows
        self.memory_budget = memory_budget
        self.show_progress = show_progress
        self._shared = _Shared()
        self._row_bytes = 1
        self._channels_last = False
        self._values = Counterfactuals(self._laid_out)
        self.outcome_bytes = self.estimate_bytes = 0
        self.flips: IncrementalTrials | None = None

    @property
    def passes(self) -> int:
        """Rows that went through the network, or a part of it, so far."""
        return self._shared.passes

    def count(self, rows: int) -> None:
        """Rows that pass through the network outside of the runner."""
        self._shared.passes += rows

    def of(self, forward: Forward) -> Runner:
        """A runner of another function with the same limits, whose passes count here too."""
        if forward is self.forward:
            return self
        other = Runner(forward, self.rows, self.memory_budget, self.show_progress)
        other._shared = self._shared
        return other

    def evaluate(self, inputs: tuple[Tensor, ...], args: tuple[object, ...]) -> dict[str, Tensor]:
        """One pass in inference mode; what leaves it are ordinary tensors on the inputs' device."""
        if self._channels_last:
            inputs = tuple(map(self._laid_out, inputs))
        with torch.inference_mode():
            heads = self.forward(inputs, args)
        rows, device = len(inputs[0]), inputs[0].device
        self._shared.passes += rows
        ordinary = {}
        for name, head in heads.items():
            # A clone made outside of inference mode is an ordinary tensor: autograd and in-place writes work on it.
            clone = head.to(device).clone()
            # For one row "a value per row" and "a value per batch" are the same; networks that squeeze look alike.
            ordinary[name] = as_one_row(clone) if rows == 1 else clone
        return ordinary

    def evaluate_aggregated(
        self, inputs: tuple[Tensor, ...], args: tuple[object, ...], repeat: bool
    ) -> dict[str, Tensor]:
        """The one value that a network returns for a batch, (1, ...) for each head; ``repeat`` passes it twice.

        Raises:
            ModelError: the network is not deterministic.
        """

        def run() -> dict[str, Tensor]:
            # Copies, because a network may write to its input.
            heads = self.evaluate(tuple(x.clone() for x in inputs), args)
            return {name: as_one_row(head) for name, head in heads.items()}

        marks = random_marks(inputs[0].device) if repeat else ()
        found = run()
        if repeat:
            check_repeated(found, run, found, drawn=marks != random_marks(inputs[0].device))
        return found

    def fewest(self, n: int) -> int:
        """How many of N examples to pass where one would do: all of them where a network may insist on their number."""
        return min(self.rows or 1, n)

    def first(self, inputs: tuple[Tensor, ...], args: tuple[object, ...]) -> dict[str, Tensor]:
        """The outputs of the first example, (1, ...) for each head."""
        n = len(inputs[0])
        examples = torch.arange(self.fewest(n))
        heads = self._sized(inputs, args, examples)
        return {
            name: head[:1] if len(examples) > 1 and head.dim() else as_one_row(head) for name, head in heads.items()
        }

    def reference(
        self, inputs: tuple[Tensor, ...], args: tuple[object, ...], trials: int, repeat: bool = False
    ) -> dict[str, Tensor]:
        """The outputs of the inputs as they are, (N, ...) for each head; learns memory and layout for ``trials``.

        With ``repeat`` the last example, which shared its pass with others, passes once more by itself.

        Raises:
            AggregateError: the network returns one value per batch.
            ModelError: the network is random, mixes examples, or takes no other number of rows than N.
        """
        if self.flips is not None:
            return self.flips.reference(len(inputs[0]))
        self._channels_last = trials >= _MANY and self._likes_channels_last(inputs, args)
        n, start, most = len(inputs[0]), 0, self.rows or _REFERENCE_ROWS
        marks = random_marks(inputs[0].device) if repeat else ()
        parts: list[dict[str, Tensor]] = []
        # The first example goes alone, since it shows how much memory the others will take.
        step = self.rows or 1
        while start < n:
            examples = torch.arange(start, min(start + step, n))
            try:
                heads = self._sized(inputs, args, examples)
            except torch.OutOfMemoryError:
                if len(examples) == 1:
                    raise
                most = step = len(examples) // 2
                continue
            _check_rows(heads, len(examples), parts[0] if parts else None)
            parts.append(heads)
            start += len(examples)
            step = min(self.rows or self._affordable(inputs[0].device), most)
        found = joined(parts)
        if repeat:
            self._shared.drawn = marks != random_marks(inputs[0].device)
            self._repeat_last(inputs, args, found, 1 if self.rows is None else len(examples))
        return found

    def _repeat_last(
        self, inputs: tuple[Tensor, ...], args: tuple[object, ...], found: dict[str, Tensor], rows: int
    ) -> None:
        """Pass the last example again: alone, or before others, where the number of rows is not to change."""
        n = len(inputs[0])
        examples = torch.arange(n - rows, n).roll(1)

        def again() -> dict[str, Tensor]:
            heads = self.evaluate(rows_of(inputs, n, examples), rows_of(args, n, examples))
            _check_rows(heads, len(examples), found)
            return {name: head[:1] for name, head in heads.items()}

        last = {name: head[-1:] for name, head in found.items()}
        check_repeated(last, again, found, self._shared.drawn)

    def _sized(self, inputs: tuple[Tensor, ...], args: tuple[object, ...], examples: Tensor) -> dict[str, Tensor]:
        """The outputs of some of N examples.

        Raises:
            ModelError: the network fails for so many rows, but not for N.
        """
        n = len(inputs[0])

        def run(rows: Tensor) -> dict[str, Tensor]:
            return self.evaluate(rows_of(inputs, n, rows), rows_of(args, n, rows))

        with _any_number_of_rows(len(examples), n, lambda: run(torch.arange(n))):
            with bytes_per_row(self.forward.modules, len(examples), rows_of(inputs, n, examples)) as measure:
                heads = run(examples)
            self._row_bytes = max(self._row_bytes, measure[0])
            self._shared.row_bytes = max(self._shared.row_bytes, measure[0])
            return heads

    def run(
        self,
        spec: TrialSpec,
        start: int,
        stop: int,
        measure: Measure,
        active: list[int] | None = None,
        repeat: bool = False,
    ) -> dict[str, Tensor]:
        """Outcomes of the trials ``start`` to ``stop`` of every example.

        Args:
            spec: the experiment.
            start, stop: range of trials; an example with fewer has NaN in place of those it lacks.
            measure: from outputs to outcomes.
            active: indices of the examples that are wanted; None means all.
            repeat: pass one row of the first batch once more, alone, which must give the same.

        Returns:
            (N, stop - start, C) for each head. In an exact design with several alternative values, every trial is
            run under each of them and the outcomes are averaged; in a random one they are set in turn.

        Raises:
            AggregateError: the network returns one value per batch.
            ModelError: the network is random, mixes examples, or takes no other number of rows than N.
        """
        wanted, total = [], 0
        for example in range(spec.n) if active is None else active:
            last = min(stop, spec.n_trials(example))
            if last > start:
                wanted.append((example, start, last))
                total += (last - start) * spec.repeats
        flips = self.flips if spec.design.flips_one and not spec.intervention.per_trial else None
        size = self._batch_size(spec, flips)
        outcomes = _Outcomes(spec, start, stop)
        with tqdm(total=total, desc="trials", unit="trial", disable=not self.show_progress) as bar:
            for chunk, values in self._values.chunks(spec, wanted):
                for rows in batches(spec, chunk, size):
                    with size.timed(len(rows), spec.device):
                        heads = self._pass(spec, rows, values, size, flips)
                    if flips is not None and self.rows is None:
                        size.settle(*flips.rows(self._budget(spec.device), spec.device))
                    if repeat:
                        self._repeat_trial(spec, rows, values, heads, flips, min(size.rows, len(rows)))
                        repeat = False
                    outcomes.add(measure(heads, rows.examples.to(spec.device)), rows)
                    bar.update(len(rows))
        if flips is None and size.fastest is not None:
            self.forward.learned[_key("rows", spec.inputs, spec.args)] = size.fastest
        return outcomes.means()

    def _repeat_trial(
        self,
        spec: TrialSpec,
        rows: TrialBatch,
        values: Values | None,
        heads: dict[str, Tensor],
        flips: IncrementalTrials | None,
        passed: int,
    ) -> None:
        """Pass the row that is least like the others again: alone, or behind clean ones, where B is not to change."""
        unlike = torch.zeros(len(rows), device=spec.device)
        for head in heads.values():
            wide = head.reshape(len(rows), -1).float()
            unlike = unlike + (wide - wide.mean(0)).abs().amax(1)
        k = int(unlike[1:].argmax()) + 1 if len(rows) > 1 else 0  # alone it will be the first: here it is not
        one, first = rows[k : k + 1], {name: head[k : k + 1] for name, head in heads.items()}
        clean = 0 if self.rows is None else passed - 1
        examples = one.examples.expand(clean + 1)
        inputs = []
        for x, do in zip(spec.inputs, self._intervened(spec, one, values), strict=True):
            beside = self._laid_out(x[examples[:clean].to(x.device)])
            inputs.append(torch.cat([beside, do]))

        def again() -> dict[str, Tensor]:
            if flips is not None and values is not None:
                return flips(spec, one, values)
            # Copies, because a network may write to its input.
            found = self.evaluate(tuple([x.clone() for x in inputs]), spec.args_of(examples))
            _check_rows(found, len(examples), heads)
            return {name: head[clean:] for name, head in found.items()}

        if values is None:  # they depend on the trial, and may be drawn anew: two passes of the same are compared
            first = again()
        check_repeated(first, again, heads, self._shared.drawn)

    def _budget(self, device: torch.device) -> int:
        """Bytes for the rows of a pass, beside the outcomes and what a pass takes anyway."""
        if self.memory_budget is None:
            return free_memory(device) // 2
        outcomes = OUTCOME_COPIES * self.outcome_bytes + self.estimate_bytes
        return max(self.memory_budget - outcomes - kernels_overhead(self.forward.modules), 1)

    @property
    def pass_bytes(self) -> int:
        """Bytes that a pass of one row takes, as far as passes have shown."""
        return self._shared.row_bytes + kernels_overhead(self.forward.modules) + KERNELS_LOADED

    def _affordable(self, device: torch.device) -> int:
        """How many rows the memory budget allows."""
        return max(1, self._budget(device) // self._row_bytes)

    def _batch_size(self, spec: TrialSpec, flips: IncrementalTrials | None) -> BatchSize:
        if self.rows is not None:
            return BatchSize(self.rows, fixed=self.rows)
        if flips is not None:
            return BatchSize(_MANY, fixed=flips.rows(self._budget(spec.device), spec.device)[0])
        known = self.forward.learned.get(_key("rows", spec.inputs, spec.args))
        return BatchSize(self._affordable(spec.device), start=known if isinstance(known, int) else None)

    def _pass(
        self,
        spec: TrialSpec,
        rows: TrialBatch,
        values: Values | None,
        size: BatchSize,
        flips: IncrementalTrials | None,
    ) -> dict[str, Tensor]:
        """The outputs of one batch; in smaller ones where it does not fit into memory."""
        try:
            if flips is not None and values is not None:
                heads = flips(spec, rows, values)
            else:

                def run(some: TrialBatch) -> dict[str, Tensor]:
                    return self.evaluate(self._intervened(spec, some, values), spec.args_of(some.examples))

                as_many = torch.arange(spec.n) % len(rows)
                with _any_number_of_rows(len(rows), spec.n, lambda: run(rows[as_many])):
                    heads = run(rows)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
        else:
            _check_rows(heads, len(rows))
            return heads
        # Outside of the handler, because the error holds on to the tensors that did not fit.
        size.halve(len(rows))
        parts, start = [], 0
        while start < len(rows):
            part = rows[start : start + size.rows]  # a part that does not fit either makes the next ones smaller
            parts.append(self._pass(spec, part, values, size, flips))
            start += len(part)
        return joined(parts)

    def _intervened(self, spec: TrialSpec, rows: TrialBatch, values: Values | None) -> tuple[Tensor, ...]:
        """where(assignment, x', clean) for each input."""
        masks = spec.units.masks(rows.assignments, rows.examples)
        examples = rows.examples.tolist()
        keys = list(zip(examples, rows.variants.tolist(), strict=True))
        # Rows of one example and one value broadcast, which saves two copies of the batch.
        one_example, one_key = len(set(examples)) == 1, len(set(keys)) == 1
        out = []
        for position, (x, mask) in enumerate(zip(spec.inputs, masks, strict=True)):
            here = mask.to(x.device)
            clean = self._laid_out(x[examples[0] : examples[0] + 1] if one_example else x[rows.examples.to(x.device)])
            if values is None:
                do = values_of_trials(spec, rows, clean.expand(len(keys), *x.shape[1:]), here, position)
            elif one_key:
                do = values[keys[0][0]][keys[0][1]][position]
            else:
                do = torch.cat([values[example][variant][position] for example, variant in keys])
            out.append(torch.where(here, do, clean))
        return tuple(out)

    def _laid_out(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self._channels_last and x.dim() == 4 else x

    def _likes_channels_last(self, inputs: tuple[Tensor, ...], args: tuple[object, ...]) -> bool:
        """Whether the network computes the same on images whose channels lie side by side in memory.

        On CPUs convolutions are often faster there (``benchmarks/engine``). Networks that insist on another
        layout raise an error, which is why one example is tried, once for each network and shape.
        """
        if not self._has_layouts(inputs):
            return False
        key = _key("channels_last", inputs, args)
        if key not in self.forward.learned:
            few = self.fewest(len(inputs[0]))
            rest = rows_of(args, len(inputs[0]), torch.arange(few))
            try:
                # Copies, because a network may write to its input.
                plain = self.evaluate(tuple([x[:few].clone() for x in inputs]), rest)
                self._channels_last = True
                other = self.evaluate(tuple([x[:few].clone() for x in inputs]), rest)
                same = all(torch.allclose(plain[k].float(), other[k].float(), rtol=1e-3, atol=1e-4) for k in plain)
            except (RuntimeError, ValueError, AssertionError):  # the ways in which networks refuse a layout
                same = False
            finally:
                self._channels_last = False
            self.forward.learned[key] = same
        return bool(self.forward.learned[key])

    def _has_layouts(self, inputs: tuple[Tensor, ...]) -> bool:
        """Convolutions over images on a CPU."""
        if not all(x.device.type == "cpu" and x.dim() == 4 for x in inputs):
            return False
        for root in self.forward.modules:
            if not is_opaque(root) and any(isinstance(module, nn.Conv2d) for module in root.modules()):
                return True
        return False

    def layout_passes(self, inputs: tuple[Tensor, ...], args: tuple[object, ...], trials: int) -> int:
        """How many rows a run of so many trials takes to find out which memory layout the network likes."""
        known = _key("channels_last", inputs, args) in self.forward.learned
        few = self.fewest(len(inputs[0]))
        return 2 * few if trials >= _MANY and not known and self._has_layouts(inputs) else 0


@contextmanager
def _any_number_of_rows(rows: int, n: int, as_many: Callable[[], object]) -> Iterator[None]:
    """Where a pass of some rows fails: whether it is their number that the network cannot take.

    Args:
        rows: that are passed inside.
        n: the number of rows that the user's network surely takes.
        as_many: passes so many.

    Raises:
        ModelError: N rows pass.
    """
    try:
        yield
    except (CEPluginError, AggregateError, Untraceable, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if rows == n or not _passes(as_many):
            raise
        lines = str(error).strip().splitlines() or [""]
        got = f"one that takes {n} and fails for {rows} ({type(error).__name__}: {lines[0]})"
        hint = "Pass `perturbations_per_eval=1`: then every pass has as many rows as there are examples."
        raise ModelError(expected("forward_func", "a model that takes any number of rows", got[:400], hint)) from error


def _passes(run: Callable[[], object]) -> bool:
    try:
        run()
    except Exception:
        return False
    return True


def as_one_row(head: Tensor) -> Tensor:
    """(1, *K), also where the network left the 1 out."""
    return head if head.dim() and len(head) == 1 else head[None]


def run_aggregated(runner: Runner, spec: TrialSpec, measure: Measure) -> dict[str, Tensor]:
    """Outcomes of a network that returns one value for the whole batch: one trial at a time, (1, T, C) for each head.

    All examples share the assignments, since they share the outcome. The first trial is run twice.

    Raises:
        ModelError: the network is not deterministic.
    """
    everyone = torch.arange(spec.n)
    # Kept, because the trial with every unit is run after the others.
    values = runner._values.of(spec, everyone.tolist(), keep=True)
    outcomes: list[dict[str, Tensor]] = []
    for trial in range(spec.n_trials(0)):
        row = spec.assignments(0, trial, trial + 1).expand(spec.n, -1)
        parts: list[dict[str, Tensor]] = []
        for repeat in range(spec.repeats):
            variant = torch.tensor(repeat) if spec.repeats > 1 else spec.variants(trial, trial + 1)
            rows = TrialBatch(everyone, row, variant.expand(spec.n), torch.full((spec.n,), trial))
            inputs = runner._intervened(spec, rows, values)
            heads = runner.evaluate_aggregated(inputs, spec.args, repeat=not (outcomes or parts))
            parts.append(measure(heads, everyone[:1]))
        outcomes.append({k: torch.stack([part[k] for part in parts]).mean(0) for k in parts[0]})
    return {name: torch.stack([one[name] for one in outcomes], dim=1) for name in outcomes[0]}


class _Outcomes:
    """Collects outcomes by example and trial; rows of the same trial are averaged."""

    def __init__(self, spec: TrialSpec, start: int, stop: int) -> None:
        self.shape, self.start, self.device = (spec.n, stop - start), start, spec.device
        self.count = torch.zeros(self.shape, device=self.device)
        self.sums: dict[str, Tensor] = {}

    def add(self, outcomes: dict[str, Tensor], rows: TrialBatch) -> None:
        index = (rows.examples.to(self.device), (rows.trials - self.start).to(self.device))
        for name, outcome in outcomes.items():
            if name not in self.sums:
                self.sums[name] = outcome.new_zeros((*self.shape, outcome.shape[1]))
            self.sums[name].index_put_(index, outcome, accumulate=True)
        self.count.index_put_(index, torch.ones(len(rows), device=self.device), accumulate=True)

    def means(self) -> dict[str, Tensor]:
        # Where nothing was run this is 0 / 0, the NaN that marks it.
        return {name: sums / self.count[..., None].to(sums.dtype) for name, sums in self.sums.items()}


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The heads of several batches, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _check_rows(heads: dict[str, Tensor], rows: int, others: dict[str, Tensor] | None = None) -> None:
    """One value per row, of the shape that other rows' values have."""
    for name, head in heads.items():
        if head.dim() == 0 or len(head) != rows or (others is not None and others[name].shape[1:] != head.shape[1:]):
            raise AggregateError


def _key(what: str, inputs: tuple[Tensor, ...], args: tuple[object, ...]) -> object:
    """What a network was given when something was learned about it: other arguments may take other ways through it."""
    plain = (str, int, float, bool, type(None))
    shown = [arg if isinstance(arg, plain) else type(arg).__name__ for arg in args]
    return (what, *[(x.shape[1:], x.dtype, str(x.device)) for x in inputs], *shown)
