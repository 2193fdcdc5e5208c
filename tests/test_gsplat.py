"""gsplat's projection, harmonics and covariances, which run on any machine, as oracles; on CUDA all of it."""

import importlib
import warnings

import pytest
import torch

from simworld.kernels.projection import covariances
from simworld.render.camera import orbit
from simworld.render.harmonics import evaluate_harmonics
from simworld.render.rasterize import rasterization

pytest.importorskip("gsplat", reason="gsplat is not installed")
CAMERAS = orbit((0, 0, 0), distance=2.5, count=3, width=61, height=45)


def oracle(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module("gsplat.cuda._torch_impl"), name)


def splats(count=200, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    made = {
        "means": 0.5 * torch.randn(count, 3, generator=g),
        "quats": torch.randn(count, 4, generator=g),
        "scales": 0.01 + 0.1 * torch.rand(count, 3, generator=g),
        "opacities": torch.rand(count, generator=g),
        "colors": 0.4 * torch.randn(count, 16, 3, generator=g),
    }
    return {name: value.to(dtype) for name, value in made.items()}


def matrices(dtype=torch.float64):
    return torch.stack([c.viewmat for c in CAMERAS]).to(dtype), torch.stack([c.K for c in CAMERAS]).to(dtype)


def test_covariances_are_those_of_gsplat():
    given = splats()
    theirs, _ = oracle("_quat_scale_to_covar_preci")(given["quats"], given["scales"], compute_preci=False)
    torch.testing.assert_close(covariances(given["quats"], given["scales"]), theirs)


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_harmonics_are_those_of_gsplat(degree):
    given = splats()
    directions = torch.randn(200, 3, generator=torch.Generator().manual_seed(1)).double()
    theirs = oracle("_spherical_harmonics")(degree, directions, given["colors"])
    torch.testing.assert_close(evaluate_harmonics(given["colors"], directions, degree), theirs)


def test_projections_are_those_of_gsplat():
    given, (viewmats, Ks) = splats(), matrices()
    made, _, meta = rasterization(**given, viewmats=viewmats, Ks=Ks, width=61, height=45, sh_degree=3)
    covars = covariances(given["quats"], given["scales"])
    radii, means, depths, conics, _ = oracle("_fully_fused_projection")(given["means"], covars, viewmats, Ks, 61, 45)
    which = meta["camera_ids"], meta["gaussian_ids"]
    assert len(which[0]) > 300
    assert bool((radii[which] > 0).all())
    torch.testing.assert_close(meta["means2d"], means[which])
    torch.testing.assert_close(meta["depths"], depths[which])
    torch.testing.assert_close(meta["conics"], conics[which])
    assert bool(made.isfinite().all())


def test_without_cuda_gsplat_is_refused_in_words():
    given, (viewmats, Ks) = splats(5, torch.float32), matrices(torch.float32)
    with pytest.raises(ValueError, match="gsplat renders on CUDA alone; these splats are on cpu"):
        rasterization(**given, viewmats=viewmats, Ks=Ks, width=61, height=45, sh_degree=3, backend="gsplat")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="gsplat renders on CUDA")
@pytest.mark.parametrize("mode", ["RGB", "RGB+ED"])
def test_on_cuda_all_backends_agree(mode):
    viewmats, Ks = (value.cuda() for value in matrices(torch.float32))
    found = {}
    for backend in ("warp", "torch", "gsplat"):
        given = {name: value.cuda().requires_grad_() for name, value in splats(dtype=torch.float32).items()}
        made, alphas, _ = rasterization(
            **given, viewmats=viewmats, Ks=Ks, width=61, height=45, sh_degree=3, render_mode=mode, backend=backend
        )
        (made.sum() + alphas.sum()).backward()
        found[backend] = made.detach(), given["means"].grad
    for backend in ("warp", "gsplat"):
        torch.testing.assert_close(found[backend][0], found["torch"][0], atol=2e-3, rtol=0)
        scale = found["torch"][1].abs().max()
        torch.testing.assert_close(found[backend][1] / scale, found["torch"][1] / scale, atol=1e-2, rtol=0)
