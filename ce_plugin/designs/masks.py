"""Random designs in which each unit flips by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ce_plugin.designs.base import Design, Grid, check_n_trials, is_share
from ce_plugin.errors import DesignError, expected
from ce_plugin.randomness import generator

__all__ = ["RandomMask"]


class RandomMask(Design):
    """Each unit flips with probability p in each trial, independently: effects are averaged over the others' flips.

    Args:
        p: probability of a flip, in (0, 1); the paper masks 10 % of the area.
        n_trials: number of trials, 2 or more.
        balanced: each unit flips in exactly ``round(p * n_trials)`` trials.
        antithetic: trials come in pairs that draw a flip from u and from 1 - u: smaller errors where effects are
            close to additive. Errors are then taken from pair means.
        estimator: ``"adjusted"`` or ``"difference_in_means"``.
        seed: any integer.

    Raises:
        DesignError: p outside (0, 1), fewer than 2 trials, an odd number of antithetic trials, a balanced design in
            which a unit would never (or always) flip.

    Example:
        >>> RandomMask(0.5, n_trials=4, balanced=True).assignments(3).sum(0).tolist()
        [2, 2, 2]

    Source: F_i of Yang et al., ICIP 2019 (p = 0.1); the expected effect is the p-weighted Banzhaf value.
    """

    def __init__(
        self,
        p: float = 0.1,
        n_trials: int = 400,
        *,
        balanced: bool = False,
        antithetic: bool = False,
        estimator: str = "adjusted",
        seed: int = 0,
    ) -> None:
        if not is_share(p):
            raise DesignError(expected("p", "a probability in (0, 1)", p, "Write 0.1 for ten per cent."))
        check_n_trials(n_trials)
        if antithetic and n_trials % 2:
            raise DesignError(expected("n_trials", "even for antithetic pairs", n_trials))
        if balanced and not 0 < round(p * n_trials) < n_trials:
            todo = f"Use at least {round(1 / min(p, 1 - p)) + 1} trials, or balanced=False."
            raise DesignError(expected("n_trials", f"so large that units flip and idle at p={p}", n_trials, todo))
        if estimator not in ("adjusted", "difference_in_means"):
            raise DesignError(expected("estimator", "'adjusted' or 'difference_in_means'", repr(estimator)))
        self.p, self.n_trials, self.seed = float(p), int(n_trials), int(seed)
        self.balanced, self.antithetic, self.estimator = balanced, antithetic, estimator

    def n_trials_for(self, n_units: int) -> int:
        return self.n_trials

    def flip_probability(self) -> float | None:
        """p, or for a balanced design the share that is exactly held."""
        return round(self.p * self.n_trials) / self.n_trials if self.balanced else self.p

    def blocks(self, n_trials: int) -> Tensor | None:
        """Antithetic pairs; None otherwise."""
        return torch.arange(n_trials) // 2 if self.antithetic else None

    def assignments(self, n_units: int, *, example: int = 0, grid: Grid | None = None) -> Tensor:
        draw = generator(self.seed, example, "assignments")
        if self.balanced and self.antithetic:
            return self._balanced_pairs(n_units, draw)
        if self.balanced:
            # The k smallest of T uniform numbers: exactly k flips, independently for each unit.
            rank = torch.rand(self.n_trials, n_units, generator=draw).argsort(0).argsort(0)
            return rank < round(self.p * self.n_trials)
        if self.antithetic:
            uniform = torch.rand(self.n_trials // 2, n_units, generator=draw)
            return torch.stack([uniform < self.p, 1 - uniform < self.p], dim=1).flatten(0, 1)
        return torch.rand(self.n_trials, n_units, generator=draw) < self.p

    def _balanced_pairs(self, n_units: int, draw: torch.Generator) -> Tensor:
        """In k (of T/2) pairs one member of the pair flips; for p > 1/2 the same with do and idle exchanged."""
        k = round(self.p * self.n_trials)
        few = min(k, self.n_trials - k)
        chosen = torch.rand(self.n_trials // 2, n_units, generator=draw).argsort(0).argsort(0) < few
        first = torch.rand(self.n_trials // 2, n_units, generator=draw) < 0.5
        pairs = torch.stack([chosen & first, chosen & ~first], dim=1).flatten(0, 1)
        return pairs if few == k else ~pairs

    def __repr__(self) -> str:
        flags = "".join(f", {name}=True" for name in ("balanced", "antithetic") if getattr(self, name))
        return f"RandomMask({self.p}, n_trials={self.n_trials}{flags}, estimator={self.estimator!r}, seed={self.seed})"
