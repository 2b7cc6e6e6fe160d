"""Twin-log weights: as many codes as bits say, exact where it can be, and better than integers on long tails."""

from __future__ import annotations

import pytest
import torch

from bench import twin_log
from qdiff.errors import InputError
from qdiff.formats.table import format_named
from qdiff.formats.weight import quantize_weight


def tails(rows: int = 32, columns: int = 512) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, columns, generator=generator)
    return normal / torch.empty(rows, columns).exponential_(generator=generator).sqrt()


def nmse(weight: torch.Tensor, values: torch.Tensor) -> float:
    return float((values - weight).square().sum() / weight.square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_row_has_no_more_values_than_codes(bits):
    """The published code has a code for zero beside its 2^b and one more on the negative side."""
    weight = tails()
    weight[3] = 0
    found = twin_log.quantize(weight, bits)
    assert int(found.codes.max()) < 2**bits
    for row in found.dequantize():
        assert len(row.unique()) <= 2**bits
    assert found.dequantize()[3].abs().max() < 1e-4


def test_powers_of_two_come_back():
    weight = torch.tensor([[2.0**e * sign for e in range(4) for sign in (1, -1)]])
    assert torch.allclose(twin_log.quantize_dequantize(weight, 3), weight, rtol=1e-2)


def test_signs_stay_and_the_search_finds_what_a_loop_finds():
    weight = tails(2, 64)
    found = twin_log.quantize(weight, 3)
    assert torch.equal(found.dequantize() < 0, weight < 0)
    least = [float("inf")] * 2
    for eta in twin_log.ETAS:
        scaled = (weight.abs().mean(1) * eta).half().float()
        for row in range(2):
            error = 0.0
            for mine in (weight[row] >= 0, weight[row] < 0):
                logs = (weight[row][mine].abs() + scaled[row]).log2().clamp(min=-24)
                trials = []
                for share in twin_log.SHARES:
                    low, high = logs.quantile(1 - share), logs.quantile(share)
                    step, start = ((high - low) / 3).half().float(), low.half().float()
                    level = ((logs - start) / step).round().clamp(0, 3)
                    values = torch.exp2(level * step + start) - scaled[row]
                    trials.append(float((values - weight[row][mine].abs()).square().sum()))
                error += min(trials)
            least[row] = min(least[row], error)
    errors = (found.dequantize() - weight).square().sum(1).tolist()
    assert errors == pytest.approx(least, rel=1e-4)


def test_long_tails_are_its_own():
    """At 3 bits it beats integers of 4 on weights with heavy tails, and at 4 loses to them on Gaussian weights."""
    heavy = tails()
    assert nmse(heavy, twin_log.quantize_dequantize(heavy, 3)) < nmse(
        heavy, quantize_weight(heavy, format_named("int4"), "mse").dequantize()
    )
    normal = torch.randn(32, 512, generator=torch.Generator().manual_seed(1))
    assert nmse(normal, twin_log.quantize_dequantize(normal, 4)) > nmse(
        normal, quantize_weight(normal, format_named("int4"), "mse").dequantize()
    )
    assert twin_log.effective_bits(1152, 3) == pytest.approx(3.07, abs=0.01)


def test_what_it_does_not_take():
    for weight, bits in ((torch.zeros(3), 3), (torch.zeros(3, 3), 1), (torch.full((2, 2), torch.nan), 3)):
        with pytest.raises(InputError):
            twin_log.quantize(weight, bits)
