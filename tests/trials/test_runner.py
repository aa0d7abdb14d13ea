"""The runner: outcomes of trials, in whatever batches they are run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ce_plugin.designs import OneAtATime, RandomMask
from ce_plugin.interventions import Context, PixelMask
from ce_plugin.networks import Forward
from ce_plugin.sites import InputSite
from ce_plugin.trials._runner import AggregateError, Runner, run_aggregated
from ce_plugin.trials.batches import TrialSpec

DOUBLE = torch.float64


def spec(x: Tensor, design: Any = None, fill: Any = 0.0, mask: Tensor | None = None, args: tuple = ()) -> TrialSpec:  # type: ignore[type-arg]
    units = InputSite(mask).units_of((x,))
    return TrialSpec((x,), args, units, design or OneAtATime(), PixelMask(fill), Context(ids=tuple(range(len(x)))))


def outcomes(heads: dict[str, Tensor], examples: Tensor) -> dict[str, Tensor]:
    return {name: head.reshape(len(head), -1) for name, head in heads.items()}


def test_outcomes_of_trials_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [10.0, 20.0]], dtype=DOUBLE)
    found = Runner(Forward(lambda v: v.sum(1))).run(spec(x, fill=(0.0, 3.0)), 0, 2, outcomes)[""]
    wanted = torch.tensor([[(2 + 5) / 2, (1 + 4) / 2], [(20 + 23) / 2, (10 + 13) / 2]], dtype=DOUBLE)
    assert torch.equal(found[..., 0], wanted)


def test_trials_that_an_example_lacks_or_nobody_wants_are_nan() -> None:
    x = torch.rand(3, 4, dtype=DOUBLE)
    mask = torch.tensor([[0, 1, 2, 3], [0, 0, 1, 1], [0, 0, 0, 0]])
    run = spec(x, mask=mask)
    runner = Runner(Forward(lambda v: v.sum(1)))
    assert runner.run(run, 0, 4, outcomes)[""].isnan()[..., 0].sum(1).tolist() == [0, 2, 3]
    assert runner.run(run, 1, 3, outcomes)[""].isnan()[..., 0].sum(1).tolist() == [0, 1, 2]
    some = runner.run(run, 0, 4, outcomes, active=[1])[""]
    assert some.isnan()[..., 0].sum(1).tolist() == [4, 2, 4]


def test_parts_of_a_run_are_the_run() -> None:
    x = torch.rand(2, 5, dtype=DOUBLE)
    for design in (OneAtATime(), RandomMask(0.5, 20)):
        run = spec(x, design, fill=("noise", 0.0))
        runner = Runner(Forward(lambda v: v.square().sum(1)))
        stop = run.n_trials(0)
        whole = runner.run(run, 0, stop, outcomes)[""]
        parts = [runner.run(run, a, min(a + 3, stop), outcomes)[""] for a in range(0, stop, 3)]
        assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-12)


def test_passes_are_counted_in_rows() -> None:
    x = torch.rand(3, 4)
    runner = Runner(Forward(nn.Linear(4, 2)), rows=5)
    runner.reference((x,), (), 12)
    assert runner.passes == 3
    runner.run(spec(x, fill=(0.0, 1.0)), 0, 4, outcomes)
    assert runner.passes == 3 + 24


def test_the_reference_is_run_in_parts() -> None:
    seen = []

    def model(x: Tensor, scale: Tensor) -> Tensor:
        seen.append(len(x))
        return x * scale[:, None]

    x, scale = torch.rand(40, 3), torch.arange(40.0)
    found = Runner(Forward(model)).reference((x,), (scale,), 1)[""]
    assert torch.equal(found, x * scale[:, None])
    assert seen == [1, 16, 16, 7]
    seen.clear()
    Runner(Forward(model), rows=25).reference((x,), (scale,), 1)
    assert seen == [25, 15]
    seen.clear()
    Runner(Forward(model), memory_budget=1).reference((x,), (scale,), 1)
    assert seen == [1] * 40


def test_aggregates_are_noticed() -> None:
    x = torch.rand(6, 3)
    for model in (lambda v: v.sum(), lambda v: v.sum(0), lambda v: v[:2], lambda v: {"a": v, "b": v.mean()}):
        with pytest.raises(AggregateError):
            Runner(Forward(model)).reference((x,), (), 1)
    runner = Runner(Forward(lambda v: v.sum()))
    assert runner.reference((x[:1],), (), 1)[""].shape == (1,)
    with pytest.raises(AggregateError):
        runner.run(spec(x[:1]), 0, 3, outcomes)


def test_aggregated_trials() -> None:
    x = torch.rand(3, 4, dtype=DOUBLE)
    run = TrialSpec((x,), (), InputSite().units_of((x,)), OneAtATime(), PixelMask((0.0, 1.0)), Context(ids=(0, 0, 0)))
    found = run_aggregated(Runner(Forward(lambda v: v.sum())), run, outcomes)[""]
    wanted = x.sum() - x.sum(0) + (0 + 3) / 2
    assert torch.allclose(found, wanted.reshape(1, 4, 1))


def test_values_are_asked_for_once_for_each_example_and_experiment() -> None:
    asked: list[int] = []

    def infill(images: Tensor) -> Tensor:
        asked.extend(images[:, 0].tolist())
        return images * 0

    x = torch.arange(5.0)[:, None].expand(5, 3)
    runner = Runner(Forward(lambda v: v.sum(1)), rows=4)
    run = spec(x, fill=infill)
    for _ in range(3):
        runner.run(run, 0, 3, outcomes, active=[0, 3])
    runner.run(run, 0, 3, outcomes)
    assert sorted(asked) == [0, 1, 2, 3, 4]
    runner.run(spec(x, fill=infill), 0, 3, outcomes)
    assert len(asked) == 10


def test_values_of_many_examples_are_made_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ce_plugin.trials.batches._BYTES", 2 * 3 * 4)
    asked = []

    def infill(images: Tensor) -> Tensor:
        asked.append(len(images))
        return images * 0

    x = torch.rand(5, 3)
    found = Runner(Forward(lambda v: v.sum(1)), rows=100).run(spec(x, fill=infill), 0, 3, outcomes)[""]
    assert asked == [2, 2, 1]
    assert torch.allclose(found[..., 0], x.sum(1, keepdim=True) - x, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 1, 5, 4), (3, 2, 5, 4), (3, 3, 1, 1), (3, 6), (3, 2, 2, 2, 2)])
def test_rows_are_contiguous_where_no_layout_was_chosen(shape: tuple[int, ...]) -> None:
    x = torch.rand(shape)
    layouts = []

    def model(v: Tensor) -> Tensor:
        layouts.append(v.is_contiguous())
        return v.view(len(v), -1).sum(1)

    for design in (OneAtATime(), RandomMask(0.5, 40)):
        for rows in (None, 1, 7):
            runner = Runner(Forward(model), rows=rows)
            runner.reference((x,), (), 1000)
            runner.run(spec(x, design, fill=("mean", 0.0)), 0, 6, outcomes)
    assert all(layouts)


def test_convolutions_on_a_cpu_get_their_channels_side_by_side() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.seen: list[bool] = []

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return self.conv(x).mean((2, 3))

    net, x = Net(), torch.rand(2, 3, 6, 6)
    runner = Runner(Forward(net))
    assert runner.layout_passes((x,), (), 100) == 2
    runner.reference((x,), (), 100)
    assert net.seen == [False, True, True, True]
    assert runner.layout_passes((x,), (), 100) == 0
    net.seen.clear()
    runner.run(spec(x, fill=("zero", "blur")), 0, 30, outcomes)
    assert net.seen
    assert all(net.seen)
    # Too few trials to be worth a try.
    few = Runner(Forward(Net()))
    assert few.layout_passes((x,), (), 5) == 0
    few.reference((x,), (), 5)
    assert not any(few.forward.modules[0].seen)  # type: ignore[union-attr]


def test_a_runner_that_once_chose_a_layout_forgets_it_for_few_trials() -> None:
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), torch.rand(1, 3, 6, 6)
    runner = Runner(Forward(net))
    runner.reference((x,), (), 100)
    assert runner._channels_last
    runner.reference((x,), (), 1)
    assert not runner._channels_last
