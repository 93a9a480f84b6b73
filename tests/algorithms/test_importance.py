from __future__ import annotations

import math

import pytest
import torch

from raylign.algorithms.importance import Importance, combine_ratios, correct_importance


def row(*ratios: float) -> torch.Tensor:
    return torch.tensor([ratios]).log()


ALL = torch.ones(1, 4, dtype=torch.bool)


def test_truncation_by_hand() -> None:
    weight, hit = correct_importance(row(0.1, 1.0, 2.5, 2.0), ALL, Importance(cap=2.25))
    torch.testing.assert_close(weight, torch.tensor([[0.1, 1.0, 2.25, 2.0]]))
    assert hit.tolist() == [[False, False, True, False]]


def test_masking_by_hand() -> None:
    icepop = Importance("mask", cap=5.0, floor=0.5)
    weight, hit = correct_importance(row(0.4, 0.6, 4.9, 5.1), ALL, icepop)
    torch.testing.assert_close(weight, torch.tensor([[0.0, 0.6, 4.9, 0.0]]))
    assert hit.tolist() == [[True, False, False, True]]


def test_one_ratio_a_sequence() -> None:
    logs, active = row(2.0, 0.25, 8.0, 3.0), torch.tensor([[True, True, True, False]])
    assert combine_ratios(logs, active, "sequence").exp().tolist() == [
        pytest.approx([4.0, 4.0, 4.0, 1.0])
    ]
    mean = 4 ** (1 / 3)
    assert combine_ratios(logs, active, "geometric").exp().tolist() == [
        pytest.approx([mean, mean, mean, 1.0])
    ]
    for level, ratio in (("sequence", 4.0), ("geometric", mean)):
        bounds = Importance("mask", level, cap=2.0)  # type: ignore[arg-type]
        weight, hit = correct_importance(logs, active, bounds)
        kept = 0.0 if ratio > 2 else ratio
        assert weight.tolist() == [pytest.approx([kept, kept, kept, 0.0])]
        assert hit.tolist() == [[ratio > 2] * 3 + [False]]


def test_none_trusts_the_worker() -> None:
    active = torch.tensor([[True, False, True, True]])
    weight, hit = correct_importance(row(0.1, 1.0, 9.0, 2.0), active, Importance("none"))
    assert weight.tolist() == [[1.0, 0.0, 1.0, 1.0]] and not hit.any()


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_as_the_loop_says_whatever_the_padding(mode: str, level: str) -> None:
    generator = torch.Generator().manual_seed(1)
    logs = 0.3 * torch.randn(6, 9, generator=generator)
    active = torch.rand(6, 9, generator=generator) < 0.6
    active[5] = False
    floor = 0.8 if mode == "mask" else 0.0
    bounds = Importance(mode, level, cap=1.3, floor=floor)  # type: ignore[arg-type]
    hidden = torch.where(active, logs, math.nan)
    weight, hit = correct_importance(hidden, active, bounds)
    for r in range(6):
        own = [float(logs[r, t]) for t in range(9) if active[r, t]]
        for t in range(9):
            if not active[r, t]:
                assert weight[r, t] == 0 and not hit[r, t]
                continue
            choice = {"token": float(logs[r, t]), "sequence": sum(own)}
            ratio = math.exp(choice.get(level, sum(own) / len(own)))
            outside = ratio > 1.3 or ratio < floor
            kept = min(ratio, 1.3) if mode == "truncate" else ratio * (not outside)
            assert (
                float(weight[r, t]) == pytest.approx(kept, rel=1e-5) and bool(hit[r, t]) is outside
            )
    wide = torch.nn.functional.pad(hidden, (0, 3), value=math.inf)
    again, _ = correct_importance(wide, torch.nn.functional.pad(active, (0, 3)), bounds)
    torch.testing.assert_close(again[:, :9], weight)
    assert (again[:, 9:] == 0).all()


def test_no_gradient_and_no_overflow() -> None:
    logs = torch.tensor([[1e6, -1e6, 90.0, 0.0]], requires_grad=True)
    for mode in ("truncate", "mask"):
        for level in ("token", "sequence", "geometric"):
            bounds = Importance(mode, level)  # type: ignore[arg-type]
            weight, _ = correct_importance(logs, ALL, bounds)
            assert torch.isfinite(weight).all() and not weight.requires_grad


def test_bounds_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="give 0 <= floor < cap"):
        Importance("mask", cap=0.5, floor=0.5)
    with pytest.raises(ValueError, match="no effect with mode=truncate"):
        Importance("truncate", floor=0.5)
