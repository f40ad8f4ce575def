"""Weights and their optimiser, in a file and back: whoever has an optimiser goes on bit for bit."""

# torch is partly untyped.
# pyright: reportUnknownMemberType=false

from pathlib import Path
from typing import Any

import pytest
import torch

from selfwright.core.errors import ModelError
from selfwright.core.models import optimizer


def born(fused: bool, width: int = 2) -> tuple[dict[str, torch.Tensor], Any]:
    torch.manual_seed(0)
    weights = {name: torch.randn(3, width, requires_grad=True) for name in ("a.b", "c")}
    return weights, torch.optim.AdamW(weights.values(), lr=0.1, fused=fused)


def learn(weights: dict[str, torch.Tensor], adam: Any, steps: int) -> None:
    for k in range(steps):
        for weight in weights.values():
            weight.grad = weight.detach() * (k + 1) - 0.5
        adam.step()


@pytest.mark.parametrize("fused", [False, True])
def test_what_was_stored_goes_on_as_if_nothing_had_happened(tmp_path: Path, fused: bool) -> None:
    weights, adam = born(fused)
    learn(weights, adam, 3)
    optimizer.write(tmp_path / "state", optimizer.state_of(weights, adam))
    learn(weights, adam, 3)
    again, other = born(fused)
    optimizer.restore(tmp_path / "state", again, other)
    learn(again, other, 3)
    # Without its moments and its count it would come out elsewhere.
    fresh, third = born(fused)
    optimizer.take({f"weight.{k}": v for k, v in weights.items()}, fresh, third)
    learn(fresh, third, 3)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not any(torch.equal(weights[name], fresh[name]) for name in weights)


def test_what_is_not_of_these_weights_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    weights, adam = born(False)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    wider, theirs = born(False, width=4)
    optimizer.write(tmp_path / "wide", optimizer.state_of(wider, theirs))
    optimizer.write(tmp_path / "part", optimizer.state_of({"c": weights["c"]}, adam))
    (tmp_path / "torn").write_bytes((tmp_path / "wide").read_bytes()[:-8])
    for name, said in {
        "wide": "2 trained tensors, and here are 2, or they are of other shapes",
        "part": "1 trained tensors, and here are 2",
        "torn": "cannot read",
        "none": "cannot read",
    }.items():
        with pytest.raises(ModelError, match=said):
            optimizer.restore(tmp_path / name, weights, adam)
    assert all(torch.equal(before[name], weights[name]) for name in before)
    assert not adam.state
