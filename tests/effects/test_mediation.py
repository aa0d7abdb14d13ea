"""Mediation: the four quantities against a planted network, and what the result hands out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ce_plugin.effects import Mediation, mediation_effects
from ce_plugin.errors import ArgumentError, InferenceError, TargetError, UnitError
from ce_plugin.evaluation import PlantedMediation, mediation_truth


def outcomes(n: int = 24, bypass: bool = True) -> tuple[PlantedMediation, Tensor, Tensor, tuple[Tensor, ...]]:
    """A planted network, inputs, and the four kinds of run for each channel and for the whole layer."""
    net = PlantedMediation(4, 3, bypass=bypass).double()
    g = torch.Generator().manual_seed(1)
    x = torch.rand(n, 2, 4, 4, generator=g).double()
    x1 = x + 0.5 + 0.2 * torch.rand(n, 2, 4, 4, generator=g).double()
    with torch.no_grad():
        h, h1 = net.mediator(x), net.mediator(x1)
        rows = [[k] for k in range(4)] + [list(range(4))]
        runs: list[list[Tensor]] = [[], []]
        for row in rows:
            mixed, back = h.clone(), h1.clone()
            mixed[:, row], back[:, row] = h1[:, row], h[:, row]
            for where, clean, value in ((0, x, mixed), (1, x1, back)):
                handle = net.mediator.register_forward_hook(lambda module, args, out, value=value: value)
                runs[where].append(net(clean))
                handle.remove()
        return net, x, x1, (net(x), net(x1), torch.stack(runs[0], dim=1), torch.stack(runs[1], dim=1))


def mediation(n: int = 24, bypass: bool = True, **changes: object) -> Mediation:
    *_, runs = outcomes(n, bypass)
    labels = ["0", "1", "2", "3", "all"]
    what = {"unit_labels": labels, "site": "mediator", "cut": not bypass, "whole": (4,), "outcome": "logit", **changes}
    return Mediation.from_outcomes(*runs, **what)


def clearest(result: Mediation) -> int:
    """The class whose total effect is the clearest."""
    return int((result.total.mean(dim=0) / result.total.std(dim=0)).abs().argmax())


def test_all_four_quantities_of_the_planted_network() -> None:
    net, x, x1, runs = outcomes()
    found, truth = mediation_effects(*runs), mediation_truth(net, x, x1, [[0], [1], [2], [3], range(4)])
    result = mediation()
    for name in ("total", "indirect", "direct", "interaction"):
        torch.testing.assert_close(getattr(found, name), getattr(truth, name), atol=1e-9, rtol=0)
        torch.testing.assert_close(getattr(result, name), getattr(truth, name), atol=1e-9, rtol=0)
        assert getattr(truth, name).abs().max() > 0.1
    assert torch.equal(result.reference, runs[0])  # type: ignore[arg-type]


def test_single_precision_outcomes_are_subtracted_in_double() -> None:
    *_, runs = outcomes(3)
    found = mediation_effects(*(y.float() for y in runs))
    want = runs[1].float().double() - runs[0].float().double()
    assert torch.equal(found.total, want)


def test_shares_are_ratios_of_means() -> None:
    result = mediation()
    best = clearest(result)
    share = result.share(best)
    total, indirect, direct = result.column(best)
    torch.testing.assert_close(share.indirect, indirect.mean(0) / total.mean(), atol=1e-12, rtol=0)
    torch.testing.assert_close(share.direct, 1 - direct.mean(0) / total.mean(), atol=1e-12, rtol=0)
    torch.testing.assert_close(
        share.direct - share.indirect, result.interaction[:, :, best].mean(0) / total.mean(), atol=1e-12, rtol=0
    )
    assert (share.indirect_low < share.indirect).all()
    assert (share.indirect < share.indirect_high).all()
    assert share.total == pytest.approx(float(total.mean()))
    assert share.total_low < share.total < share.total_high


def test_a_cut_layer_is_labelled_and_its_share_is_one() -> None:
    result = mediation(bypass=False)
    share = result.share(clearest(result))
    for value in (share.indirect, share.indirect_low, share.indirect_high, share.direct):
        assert float(value[4]) == pytest.approx(1.0, abs=1e-9)
    assert "by construction" in repr(result)
    assert "by construction" in repr(share)
    for frame in (result.to_dataframe(), share.to_dataframe()):
        assert frame["cut"].all()
        assert set(frame.loc[frame["by_construction"], "label"]) == {"all"}
    around = mediation()
    other = around.share(clearest(around))
    assert "by construction" not in repr(around) + repr(other)
    assert not around.to_dataframe()["by_construction"].any()
    assert float(other.indirect[4]) != pytest.approx(1.0, abs=0.01)


def test_shares_are_refused_where_there_is_no_total_effect() -> None:
    result = mediation()
    result.total = result.total - result.total.mean(dim=0)
    numbers = r"its mean over 24 images is .*, with the interval \[-.*, \+.*\] at level 0.95, which contains 0"
    with pytest.raises(InferenceError, match=numbers):
        result.share(0)
    result.total[0] = torch.nan
    with pytest.raises(InferenceError, match="no total effect"):
        result.share(0)


def test_the_class_is_the_only_one_the_predicted_or_the_one_named() -> None:
    result = mediation()
    with pytest.raises(TargetError, match="`class_index` to be one class below 3, or one for each of 24 images"):
        result.share()
    best = clearest(result)
    result.predicted = torch.full((24,), best)
    for own in (result.share(), result.share(result.predicted), result.share(torch.tensor(best))):
        assert torch.equal(own.indirect, result.share(best).indirect)
    result.predicted = torch.arange(24) % 3
    total, indirect, _ = result.column()
    for i in (0, 1, 5):
        assert torch.equal(indirect[i], result.indirect[i, :, i % 3])
        assert total[i] == result.total[i, i % 3]
    for bad in (3, -1, torch.tensor([0, 1]), torch.tensor(0.5)):
        with pytest.raises(TargetError, match="class_index"):
            result.column(bad)
    one = Mediation(total=result.total[:, :1], indirect=result.indirect[..., :1], direct=result.direct[..., :1])
    assert all(torch.equal(a, b) for a, b in zip(one.column(), result.column(0), strict=True))


def test_examples_can_be_picked() -> None:
    result = mediation(predicted=torch.arange(24) % 3)
    for some, index in ((result[2], [2]), (result[1:3], [1, 2]), (result[[5, 0]], [5, 0]), (result[-1], [23])):
        assert len(some) == len(index)
        assert torch.equal(some.indirect, result.indirect[index])
        assert torch.equal(some.total, result.total[index])
        assert torch.equal(some.predicted, result.predicted[index])  # type: ignore[arg-type, index]
        assert some.unit_labels == result.unit_labels
    with pytest.raises(IndexError, match="example 24 of a mediation of 24"):
        result[24]


def test_data_frame_holds_every_number_in_its_place() -> None:
    result = mediation(3)
    frame = result.to_dataframe()
    assert len(frame) == 3 * 5 * 3
    for row in frame.sample(12, random_state=0).itertuples():
        i, u, c = row.example, row.unit, row[frame.columns.get_loc("class") + 1]
        assert row.label == result.unit_labels[u]
        assert row.total == result.total[i, c]
        assert row.indirect == result.indirect[i, u, c]
        assert row.direct == result.direct[i, u, c]
        assert row.interaction == pytest.approx(float(result.total[i, c] - row.direct - row.indirect), abs=1e-12)
    targeted = Mediation(
        total=result.total[:, :1],
        indirect=result.indirect[..., :1],
        direct=result.direct[..., :1],
        target=torch.tensor([7, 8, 9]),
    )
    assert targeted.to_dataframe().groupby("example")["class"].unique().map(list).tolist() == [[7], [8], [9]]
    assert "class 8" in repr(targeted)


def test_the_text_names_the_strongest_unit() -> None:
    result = mediation(5, intervention="Adversarial(pgd)")
    text = repr(result)
    assert text.startswith("Mediation of logit through mediator\n  5 examples, 5 units, 3 classes; Adversarial(pgd)\n")
    unit, column = divmod(int(result.indirect[0].abs().argmax()), 3)
    assert f"0: class {column}: total" in text
    assert f"through {result.unit_labels[unit]}" in text.splitlines()[2]
    assert text.endswith("...")


def test_share_table_is_sorted() -> None:
    result = mediation()
    share = result.share(clearest(result))
    frame = share.to_dataframe()
    assert frame["indirect_share"].is_monotonic_decreasing
    for row in frame.itertuples():
        assert row.indirect_share == share.indirect[row.unit]
        assert row.direct_high == share.direct_high[row.unit]
        assert row.label == share.unit_labels[row.unit]


def test_shapes_that_do_not_go_together_are_named() -> None:
    y, m = torch.zeros(2, 3), torch.zeros(2, 4, 3)
    shape = r"\(N, C\), \(N, C\), \(N, U, C\) and \(N, U, C\), but got .*\(2, 3\)"
    for bad in (
        (y, y[:1], m, m),
        (y, y, m[:1], m[:1]),
        (y, y, m, m[:, :2]),
        (y, y, y, y),
        (y, y, m[..., :1], m[..., :1]),
    ):
        with pytest.raises(UnitError, match=shape):
            mediation_effects(*bad)
    with pytest.raises(UnitError, match="`total, indirect, direct`"):
        Mediation(total=y, indirect=m, direct=m[:, :1])
    with pytest.raises(UnitError, match="`unit_labels` to be 4 names, but got 1"):
        Mediation(total=y, indirect=m, direct=m, unit_labels=["a"])
    with pytest.raises(UnitError, match=r"`whole` to be rows in range\(4\)"):
        Mediation(total=y, indirect=m, direct=m, whole=(4,))


def test_bad_levels_are_named_before_any_work() -> None:
    result = mediation()
    with pytest.raises(ArgumentError, match="`level`"):
        result.share(0, level=1.0)
    with pytest.raises(ArgumentError, match="`n_boot` to be at least 100, but got 10"):
        result.share(0, n_boot=10)
    with pytest.raises(InferenceError, match="at least 2 images, but got 1"):
        result[0].share(0)
