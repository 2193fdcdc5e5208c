"""How alike pictures are, against closed forms."""

import math

import pytest
import torch

from simworld.render.images import overlap, psnr, ssim


def pictures(count=2, size=(24, 30)):
    return torch.rand(count, *size, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_psnr_of_a_known_error():
    given = pictures()
    torch.testing.assert_close(psnr(given + 0.1, given), torch.full((2,), 20.0, dtype=torch.float64))
    assert psnr(given, given).tolist() == [math.inf, math.inf]


def test_only_masked_pixels_count():
    given = pictures(1)[0]
    mask = torch.zeros(given.shape[:2], dtype=torch.bool)
    mask[3:9, 2:5] = True
    wrong = given + torch.where(mask, 0.01, 0.7)[..., None]
    assert float(psnr(wrong, given, mask=mask)) == pytest.approx(40.0)


def test_ssim_of_equal_pictures_is_one_and_of_a_shift_in_brightness_the_closed_form():
    given = pictures()
    torch.testing.assert_close(ssim(given, given), torch.ones(2, dtype=torch.float64))
    one, other = torch.full((20, 20, 3), 0.4).double(), torch.full((20, 20, 3), 0.6).double()
    wanted = (2 * 0.4 * 0.6 + 1e-4) / (0.4**2 + 0.6**2 + 1e-4)
    assert float(ssim(one, other)) == pytest.approx(wanted)


def test_ssim_is_that_of_windows_taken_one_by_one():
    one, other = pictures()[0, :12, :13, :1], pictures()[1, :12, :13, :1]
    away = torch.arange(11, dtype=torch.float64) - 5
    bell = torch.exp(-away.square() / (2 * 1.5**2))
    weights = bell[:, None] * bell / bell.sum() ** 2
    found = []
    for row in range(2):
        for column in range(3):
            a, b = (v[row : row + 11, column : column + 11, 0] for v in (one, other))
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
            vab = (weights * (a - ma) * (b - mb)).sum()
            found.append((2 * ma * mb + 1e-4) * (2 * vab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    torch.testing.assert_close(ssim(one, other), torch.stack(found).mean())


def test_ssim_has_the_gradient_of_its_differences():
    one, other = pictures()[0, :12, :12, :1], pictures()[1, :12, :12, :1]
    torch.autograd.gradcheck(lambda value: ssim(value, other), one.requires_grad_())


def test_overlap_of_silhouettes():
    one, other = torch.zeros(2, 4, 4, dtype=torch.bool), torch.zeros(2, 4, 4, dtype=torch.bool)
    one[0, :2], other[0, 1:3] = True, True
    assert overlap(one, other).tolist() == [pytest.approx(1 / 3), 1.0]


def test_what_cannot_be_compared_is_said():
    with pytest.raises(ValueError, match=r"psnr compares pictures of one shape"):
        psnr(pictures(), pictures(1))
    with pytest.raises(ValueError, match=r"ssim needs pictures of 11 pixels or more a side; got \[10, 30\]"):
        ssim(pictures()[:, :10], pictures()[:, :10])
    with pytest.raises(ValueError, match=r"mask of psnr must be \[2, 24, 30\], with a pixel in each"):
        psnr(pictures(), pictures(), mask=torch.zeros(2, 24, 30, dtype=torch.bool))
