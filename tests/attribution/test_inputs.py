"""Arguments as users write them, brought into one form."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from captum._utils.common import _select_targets
from hypothesis import given
from hypothesis import strategies as st

from ce_plugin import CausalEffect, Evidence
from ce_plugin.attribution._estimation import flat_target
from ce_plugin.attribution._experiment import Call
from ce_plugin.attribution._explainer import as_baseline, as_evidences, as_ids, as_inputs
from ce_plugin.interventions import Context, PixelMask


def test_inputs_are_cut_off_from_the_users_graph() -> None:
    leaf = torch.rand(2, 3, requires_grad=True)
    (x,) = as_inputs(leaf * 2)
    assert not x.requires_grad
    a, b = as_inputs((leaf, torch.rand(2, 1)))
    assert not a.requires_grad
    assert a.data_ptr() == leaf.data_ptr()  # no copy is made
    assert b.shape == (2, 1)


def test_args() -> None:
    tensor = torch.rand(2)
    effect = CausalEffect(torch.nn.Flatten())
    for args, wanted in ((None, ()), (3, (3,)), ((tensor, None), (tensor, None)), ([1, 2], ([1, 2],))):
        assert effect._experiment(Call(inputs=tensor, additional_forward_args=args)).args == wanted


def test_ids() -> None:
    assert as_ids(None, 3) == (0, 0, 0)
    for ids in ([4, 0, -1], (4, 0, -1), torch.tensor([4, 0, -1]), np.array([4, 0, -1]), range(3)):
        assert as_ids(ids, 3) == ((0, 1, 2) if isinstance(ids, range) else (4, 0, -1))  # type: ignore[arg-type]


def test_evidences() -> None:
    mask, evidence = PixelMask("zero"), Evidence(PixelMask("mean"), units=[1])
    assert as_evidences(None) == []
    assert [one.intervention for one in as_evidences(mask)] == [mask]
    assert as_evidences(evidence) == [evidence]
    assert as_evidences((evidence, mask))[0] is evidence


def test_baselines_keep_model_units_and_types() -> None:
    x = torch.rand(2, 3, dtype=torch.float64)
    values = as_baseline((0.5, torch.ones(1, 3)), (x, x))
    contexts = [Context(ids=(0, 0), position=k) for k in range(2)]
    assert torch.equal(values.values(x, contexts[0]), torch.full_like(x, 0.5))
    assert torch.equal(values.values(x, contexts[1]), torch.ones_like(x))
    assert repr(values) == "baselines(0.5, tensor(1, 3))"
    assert torch.equal(as_baseline(None, (x,)).values(x, contexts[0]), torch.zeros_like(x))


@pytest.mark.parametrize("bytes_", [1, 1 << 20])
def test_baselines_of_each_examples_own_follow_their_example(bytes_: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner asks for the values of as many examples together as fit into memory."""
    monkeypatch.setattr("ce_plugin.trials.batches._BYTES", bytes_)
    x, baselines = torch.rand(5, 4, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    weight = torch.rand(4, dtype=torch.float64)
    wanted = (x - baselines) * weight
    for per_eval in (None, 1, 3):
        found = CausalEffect(lambda v: v @ weight, outcome=None).attribute(
            x, baselines, perturbations_per_eval=per_eval
        )
        assert torch.allclose(found, wanted, atol=1e-12)


@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), n=st.integers(1, 3), data=st.data())
def test_flat_targets_select_what_captum_selects(shape: tuple[int, ...], n: int, data: st.DataObject) -> None:
    output = torch.arange(n * int(np.prod(shape))).reshape(n, *shape).float()
    index = st.tuples(*[st.integers(0, size - 1) for size in shape])
    one = data.draw(index)
    forms: list[Any] = [one, [one] * n, [data.draw(index) for _ in range(n)]]
    if len(shape) == 1:
        forms += [one[0], torch.tensor(one[0]), torch.tensor([one[0]]), [i[0] for i in forms[2]]]
        forms += [torch.tensor([i[0] for i in forms[2]])]
    for target in forms:
        flat = flat_target(target, tuple(output.shape))
        assert flat is not None
        found = output.flatten(1).gather(1, flat[:, None])[:, 0]
        assert torch.equal(found, _select_targets(output, target).reshape(-1))


def test_no_target() -> None:
    assert flat_target(None, (2, 3)) is None
    assert flat_target(None, (2,)) is None


def test_every_entry_of_an_output_has_its_own_flat_target() -> None:
    every = itertools.product(range(2), range(3), range(4))
    assert [int(flat_target(index, (1, 2, 3, 4))) for index in every] == list(range(24))  # type: ignore[arg-type]


@pytest.mark.parametrize("target", [0, (0,), [0, 0], torch.tensor([0, 0])])
def test_the_only_output_may_be_named(target: Any) -> None:
    assert flat_target(target, (2, 1)).tolist() == [0, 0]
