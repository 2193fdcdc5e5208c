from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from simworld.kernels.particle_grid import (
    Stencil,
    from_grid,
    from_grid_reference,
    splines,
    to_grid,
    to_grid_reference,
)


def made(num=30, size=8, d=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    places = 1 + (size - 3) * torch.rand(num, d, generator=generator, dtype=torch.float64)
    numbers, weights, ways = splines(places)
    strides = torch.tensor([size**k for k in reversed(range(d))])
    return places, numbers, ways, Stencil.of((numbers * strides).sum(-1), weights, size**d)


@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_transfers_agree_with_their_definitions_in_value_and_gradient(d, seed):
    *_, stencil = made(d=d, seed=seed)
    generator = torch.Generator().manual_seed(seed + 10)
    cases = [(to_grid, to_grid_reference, len(stencil.nodes)), (from_grid, from_grid_reference, stencil.num_nodes)]
    for fast, plain, rows in cases:
        values = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
        found = []
        for function in (fast, plain):
            given, weights = values.clone().requires_grad_(), stencil.weights.clone().requires_grad_()
            result = function(given, replace(stencil, weights=weights))
            wave = torch.arange(result.numel(), dtype=torch.float64).sin().view_as(result)
            slopes = torch.autograd.grad((result * wave).sum(), [given, weights])
            found.append([result.detach(), *slopes])
        for ours, wanted in zip(*found, strict=True):
            assert torch.allclose(ours, wanted, atol=1e-13)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_splines_give_back_constants_and_places(d):
    places, numbers, ways, stencil = made(d=d)
    assert torch.allclose(stencil.weights.sum(1), torch.ones(len(places), dtype=torch.float64))
    assert (stencil.weights >= 0).all()
    back = (stencil.weights[..., None] * numbers).sum(1)
    assert torch.allclose(back, places, atol=1e-12)
    assert torch.allclose(places[:, None] + ways, numbers.double(), atol=1e-12)


def test_splines_and_their_slopes_do_not_jump_where_particles_change_nodes():
    eps = 1e-9
    grid = torch.arange(9, dtype=torch.float64)[:, None].sin()
    sides = []
    for place in (3.5 - eps, 3.5 + eps):
        at = torch.tensor([[place]], dtype=torch.float64, requires_grad=True)
        numbers, weights, _ = splines(at)
        value = from_grid(grid, Stencil.of(numbers[..., 0], weights, 9))
        sides.append((value.detach(), torch.autograd.grad(value.sum(), at)[0]))
    for left, right in zip(*sides, strict=True):
        assert torch.allclose(left, right, atol=1e-7)


def test_sums_to_the_grid_keep_what_is_summed():
    *_, stencil = made()
    values = torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(to_grid(values, stencil).sum(0), values.sum(0), atol=1e-12)
