"""What is simulated, seen: cameras, Gaussian splats, radiance fields, photographs."""

from simworld.render.appearance import Look, to_splats
from simworld.render.bind import Binding, bind, pose
from simworld.render.camera import Camera, orbit
from simworld.render.files import read_splats, write_splats
from simworld.render.fit_splats import FitReport, SplatFit, fit_splats
from simworld.render.images import overlap, psnr, ssim
from simworld.render.photos import Photos, read_photos, write_transforms
from simworld.render.rasterize import rasterization
from simworld.render.scenes import render
from simworld.render.splats import moved, render_splats

__all__ = [
    "Binding",
    "Camera",
    "FitReport",
    "Look",
    "Photos",
    "SplatFit",
    "bind",
    "fit_splats",
    "moved",
    "orbit",
    "overlap",
    "pose",
    "psnr",
    "rasterization",
    "read_photos",
    "read_splats",
    "render",
    "render_splats",
    "ssim",
    "to_splats",
    "write_splats",
    "write_transforms",
]
