"""Metrics against values computed by hand, and what they refuse."""

import math

import pytest
import torch

from qdiff.errors import InputError
from qdiff.evaluation.metrics import DB_CAP, cosine, decibels, paired, psnr, sqnr_db, ssim


def pictures(*, count: int = 2, side: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 200, (count, side, side, 3), dtype=torch.uint8, generator=generator)


def test_psnr_is_that_of_the_hand() -> None:
    a = pictures()
    b = a.clone()
    b[0] += 10  # every value is off by 10/255
    b[1, 0, 0, 0] += 51  # one value of 24 * 24 * 3 is off by 0.2
    expected = [20 * math.log10(25.5), -10 * math.log10(0.04 / (24 * 24 * 3))]
    assert psnr(a, b).tolist() == pytest.approx(expected, rel=1e-12)


def test_psnr_reads_bytes_and_unit_floats_alike() -> None:
    a, b = pictures(), pictures(seed=1)
    assert psnr(a.float() / 255, b).tolist() == pytest.approx(psnr(a, b).tolist(), abs=1e-5)


def test_frames_of_a_video_are_pooled() -> None:
    a = pictures(count=3)[None]
    b = a.clone()
    b[0, 1] += 20
    assert psnr(a, b).tolist() == pytest.approx([10 * math.log10(3 / (20 / 255) ** 2)], rel=1e-12)
    assert ssim(a, b).shape == (1,)


def test_ssim_of_two_flat_pictures_is_the_luminance_term() -> None:
    """Without variance SSIM is (2 m n + C1) / (m^2 + n^2 + C1), Wang et al. 2004, equation 6, with C1 = 0.01^2."""
    a = torch.full((1, 32, 32, 3), 0.25)
    b = torch.full((1, 32, 32, 3), 0.75)
    expected = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert ssim(a, b).tolist() == pytest.approx([expected], rel=1e-6)


def test_ssim_of_each_pair_is_its_own() -> None:
    a, b = pictures(), pictures(seed=1)
    b[0] = a[0]
    first, second = ssim(a, b).tolist()
    assert first == pytest.approx(1.0, abs=1e-9)
    assert abs(second) < 0.2
    assert second == pytest.approx(ssim(a[1:], b[1:]).item(), rel=1e-12)


def test_identical_pictures_count_as_the_cap() -> None:
    a = pictures()
    b = a.clone()
    b[1] += 10
    result = paired(a, b)
    assert [pair.identical for pair in result.per_image] == [True, False]
    assert math.isinf(psnr(a, b)[0])
    assert result.per_image[0].psnr_db == DB_CAP
    assert result.psnr_db_min == pytest.approx(20 * math.log10(25.5))
    assert result.psnr_db_mean == pytest.approx((DB_CAP + 20 * math.log10(25.5)) / 2)  # mean of dB, not dB of a mean
    assert result.ssim_min <= result.ssim_mean <= 1.0 + 1e-9


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.full((2, 24, 24, 3), float("nan")), "NaN"),
        (torch.full((2, 24, 24, 3), 3.0), r"\[0, 1\]"),
        (torch.full((2, 24, 24, 3), -1.0), r"\[0, 1\]"),
        (torch.zeros(2, 3, 24, 24), "shapes"),
        (torch.zeros(2, 24, 24, 3, dtype=torch.int64), "dtype"),
    ],
)
def test_bad_pictures_are_refused(bad: torch.Tensor, message: str) -> None:
    for measure in (psnr, ssim, paired):
        with pytest.raises(InputError, match=message):
            measure(pictures(), bad)


def test_channels_first_small_and_no_pictures_are_refused() -> None:
    with pytest.raises(InputError, match="permute"):
        psnr(torch.zeros(1, 3, 24, 24), torch.zeros(1, 3, 24, 24))
    with pytest.raises(InputError, match="11 x 11"):
        ssim(pictures(side=10), pictures(side=10))
    with pytest.raises(InputError, match="no pictures"):
        paired(pictures()[:0], pictures()[:0])


def test_tensor_errors_are_those_of_the_hand() -> None:
    reference, approximation = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5])
    assert sqnr_db(reference, approximation) == pytest.approx(20.0)  # 25 / 0.25
    assert cosine(reference, approximation) == pytest.approx(23 / (5 * math.hypot(3, 3.5)))


def test_sqnr_does_not_depend_on_the_scale_and_cosine_is_blind_to_it() -> None:
    reference = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert sqnr_db(1e-20 * reference, 0.9e-20 * reference) == pytest.approx(20.0, abs=1e-4)
    assert cosine(reference, 3 * reference) == pytest.approx(1.0)
    assert cosine(reference, -reference) == pytest.approx(-1.0)


def test_half_precision_sums_do_not_overflow() -> None:
    reference = torch.full((4096,), 300.0, dtype=torch.float16)
    assert sqnr_db(reference, reference * 0.5) == pytest.approx(20 * math.log10(2))


def test_zero_tensors() -> None:
    zero, one = torch.zeros(4), torch.ones(4)
    assert sqnr_db(zero, zero) == math.inf and sqnr_db(zero, one) == -math.inf
    assert cosine(zero, zero) == 1.0 and cosine(zero, one) == 0.0 and cosine(one, zero) == 0.0
    assert decibels(math.inf) == DB_CAP and decibels(-math.inf) == -DB_CAP and decibels(41.5) == 41.5
    with pytest.raises(InputError):
        decibels(math.nan)


@pytest.mark.parametrize("measure", [sqnr_db, cosine])
def test_tensors_that_cannot_be_compared_are_refused(measure) -> None:
    good = torch.ones(4)
    for bad, message in [
        (torch.tensor([1.0, math.nan, math.inf, 1.0]), "2 NaN or infinite of 4"),
        (torch.ones(2, 2), "shapes"),
    ]:
        with pytest.raises(InputError, match=message):
            measure(good, bad)
    with pytest.raises(InputError, match="empty"):
        measure(torch.ones(0), torch.ones(0))
