"""What is simulated, seen: cameras, Gaussian splats, radiance fields, photographs."""

from simworld.render.appearance import Look, to_splats
from simworld.render.bind import Binding, bind, pose
from simworld.render.camera import Camera, orbit
from simworld.render.field_shapes import field_to_mesh, field_to_splats
from simworld.render.fields import HashField, PositionalField, RadianceField, load_field, render_field, save_field
from simworld.render.files import read_splats, write_splats
from simworld.render.film import write_film
from simworld.render.fit_fields import fit_field
from simworld.render.fit_splats import FitReport, SplatFit, fit_splats
from simworld.render.images import overlap, psnr, ssim
from simworld.render.photos import Photos, read_photos, write_transforms
from simworld.render.rasterize import rasterization
from simworld.render.recover import Recovery, recover
from simworld.render.scenes import render
from simworld.render.splats import decomposed, moved, render_splats, with_covariances
from simworld.render.surfaces import register, sample_mesh, splats_from_mesh, surface
from simworld.render.usd import read_usd, write_usd
from simworld.render.web import serve, write_html

__all__ = [
    "Binding",
    "Camera",
    "FitReport",
    "HashField",
    "Look",
    "Photos",
    "PositionalField",
    "RadianceField",
    "Recovery",
    "SplatFit",
    "bind",
    "decomposed",
    "field_to_mesh",
    "field_to_splats",
    "fit_field",
    "fit_splats",
    "load_field",
    "moved",
    "orbit",
    "overlap",
    "pose",
    "psnr",
    "rasterization",
    "read_photos",
    "read_splats",
    "read_usd",
    "recover",
    "register",
    "render",
    "render_field",
    "render_splats",
    "sample_mesh",
    "save_field",
    "serve",
    "splats_from_mesh",
    "ssim",
    "surface",
    "to_splats",
    "with_covariances",
    "write_film",
    "write_html",
    "write_splats",
    "write_transforms",
    "write_usd",
]
