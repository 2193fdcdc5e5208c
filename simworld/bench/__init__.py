"""Named benchmarks: one error table each, with naive rows and published figures beside ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from simworld.bench.contacts import balls_in, cradle, string_in
from simworld.bench.counterfactual import counterfactual
from simworld.bench.forces import charged, nbody_egnn, nbody_in, springs
from simworld.bench.meshes import beam, couette, cylinder_flow_small, flag_small, plate_small
from simworld.bench.particles import fluid_fall, lj3, sand, tgv_2d, water_drop_small, water_ramps
from simworld.bench.photos import photos
from simworld.bench.push import push_3d
from simworld.bench.rope import read_rope, rope
from simworld.bench.rows import environment, result
from simworld.bench.slots import slots
from simworld.bench.solar import solar_system
from simworld.bench.vin import vin
from simworld.metrics import Row

BENCHMARKS: Mapping[str, Callable[..., list[Row]]] = {
    "rope": rope,
    "springs": springs,
    "charged": charged,
    "nbody-egnn": nbody_egnn,
    "nbody-in": nbody_in,
    "balls-in": balls_in,
    "string-in": string_in,
    "cradle": cradle,
    "push-3d": push_3d,
    "solar-system": solar_system,
    "water-drop-small": water_drop_small,
    "sand": sand,
    "water-ramps": water_ramps,
    "tgv-2d": tgv_2d,
    "fluid-fall": fluid_fall,
    "lj3": lj3,
    "couette": couette,
    "beam": beam,
    "cylinder-flow-small": cylinder_flow_small,
    "flag-small": flag_small,
    "plate-small": plate_small,
    "photos": photos,
    "counterfactual": counterfactual,
    "vin": vin,
    "slots": slots,
}
OBJECTS = tuple(BENCHMARKS)[1 : tuple(BENCHMARKS).index("solar-system") + 1]
"""The tables of object worlds, which `simworld bench objects` makes one after the other."""

TRAINING = ("fluid-fall", "lj3")
"""The tables that train networks of their own, in a folder `out`."""

__all__ = ["BENCHMARKS", "OBJECTS", "TRAINING", "environment", "read_rope", "result", "rope"]
