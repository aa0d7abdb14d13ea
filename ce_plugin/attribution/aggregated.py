"""Networks that return one value for the whole batch, which makes the batch one example."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ce_plugin.attribution.estimation import Answer, answers
from ce_plugin.attribution.measured import Measured
from ce_plugin.designs import EveryUnit
from ce_plugin.errors import ModelError, expected
from ce_plugin.trials import Runner, Setting
from ce_plugin.trials.runner import as_one_row, run_aggregated

__all__ = ["answers_of_batch", "check_shared", "outputs_of_batch"]


def check_shared(setting: Setting, until: float | None) -> None:
    """Whether all examples share what they must share to be one.

    Raises:
        ModelError: they do not.
    """
    shared = len(set(setting.context.ids)) == 1 and isinstance(setting.units.labels[0], str)
    if until is not None or not shared:
        todo = "Leave out `until=`, `ids=` and masks that differ between examples."
        wanted = "a model that returns one value per example for these options"
        raise ModelError(expected("forward_func", wanted, "one value per batch", todo))


def outputs_of_batch(setting: Setting, runner: Runner, first: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch's outputs, (1, ...) for each head.

    Args:
        setting, runner: the experiment.
        first: the outputs of the first example alone.

    Raises:
        ModelError: some outputs have one value per example and others have not.
    """
    # Copies, because a network may write to its input.
    raw = runner.evaluate(tuple(x.clone() for x in setting.inputs), setting.args)
    heads = {name: as_one_row(head) for name, head in raw.items()}
    if any(heads[name].shape != one.shape for name, one in first.items()):
        shapes = [tuple(head.shape) for head in raw.values()]
        got = f"shapes {shapes} for {setting.n} examples, some not one for each"
        todo = "Name the part to explain with `output=`."
        raise ModelError(expected("forward_func", "a model with one value per example in every output", got, todo))
    return heads


def answers_of_batch(
    setting: Setting, runner: Runner, measured: Measured, used: list[int], keep: bool
) -> dict[str, Answer]:
    """The effects on the batch's outcome."""
    outcomes = run_aggregated(runner, setting, measured)
    compared = measured.reference
    if setting.design.reference == "all":
        every = run_aggregated(runner, replace(setting, design=EveryUnit()), measured)
        compared = {name: outcome[:, 0] for name, outcome in every.items()}
    return answers(setting, outcomes, compared, measured, used[:1], keep)
