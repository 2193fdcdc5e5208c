"""How alike two pictures are: PSNR, SSIM, and the overlap of silhouettes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

WINDOW, WIDTH = 11, 1.5  # pixels: of the windows that SSIM compares, and the standard deviation of their weights
STEADY = (0.01**2, 0.03**2)  # keep the quotients of SSIM finite in flat windows


def psnr(predicted: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return the peak signal-to-noise ratio [...] of pictures [..., h, w, c] with values in 0 to 1, in dB.

    With a `mask` [..., h, w] of bools only its pixels count. Equal pictures have an infinite ratio.

    Raises:
        ValueError: the pictures differ in shape, the mask is of another, or one has no pixel.
    """
    _check_alike("psnr", predicted, target)
    errors = (predicted - target).square().mean(-1)
    if mask is None:
        return -10 * errors.mean((-2, -1)).log10()
    if mask.shape != errors.shape or bool((~mask).flatten(-2).all(-1).any()):
        raise ValueError(
            f"A mask of psnr must be {list(errors.shape)}, with a pixel in each picture; got {list(mask.shape)}."
        )
    return -10 * ((errors * mask).sum((-2, -1)) / mask.sum((-2, -1))).log10()


def ssim(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the structural similarity [...] of pictures [..., h, w, c] with values in 0 to 1; differentiable.

    The mean over channels and over all windows of 11 pixels, with Gaussian weights, that lie within (Wang et al. 2004).

    Raises:
        ValueError: the pictures differ in shape, or are smaller than a window.
    """
    _check_alike("ssim", predicted, target)
    if min(predicted.shape[-3:-1]) < WINDOW:
        raise ValueError(f"ssim needs pictures of {WINDOW} pixels or more a side; got {list(predicted.shape[-3:-1])}.")
    ahead = predicted.shape[:-3]
    one, other = (value.reshape(-1, *value.shape[-3:]).permute(0, 3, 1, 2) for value in (predicted, target))
    means = _blurred(torch.cat([one, other, one * one, other * other, one * other]))
    a, b, aa, bb, ab = means.chunk(5)
    low, high = STEADY
    alike = (2 * a * b + low) * (2 * (ab - a * b) + high)
    most = (a * a + b * b + low) * (aa - a * a + bb - b * b + high)
    return (alike / most).mean((1, 2, 3)).reshape(ahead)


def overlap(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the intersection of silhouettes [..., h, w] of bools over their union [...]; 1 where both are empty.

    Raises:
        ValueError: the silhouettes differ in shape.
    """
    if predicted.shape != target.shape:
        raise ValueError(f"overlap compares silhouettes; got {list(predicted.shape)} and {list(target.shape)}.")
    union = (predicted | target).sum((-2, -1))
    return torch.where(union > 0, (predicted & target).sum((-2, -1)) / union.clamp(min=1), 1.0)


def _blurred(pictures: Tensor) -> Tensor:
    """Return pictures [b, c, h, w] as the weighted means of windows, along one axis and then the other."""
    channels = pictures.shape[1]
    weights = _weights().to(pictures)
    across = weights.view(1, 1, 1, -1).expand(channels, 1, 1, -1)
    blurred = torch.nn.functional.conv2d(pictures, across, groups=channels)
    return torch.nn.functional.conv2d(blurred, across.transpose(2, 3), groups=channels)


@cache
def _weights() -> Tensor:
    away = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    bell = torch.exp(-0.5 * (away / WIDTH).square())
    return bell / bell.sum()


def _check_alike(what: str, predicted: Tensor, target: Tensor) -> None:
    if predicted.shape != target.shape or predicted.ndim < 3:
        raise ValueError(
            f"{what} compares pictures of one shape [..., h, w, c]; got {list(predicted.shape)} and "
            f"{list(target.shape)}."
        )
