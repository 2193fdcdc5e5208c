"""Simulators with known equations: the ground truth that learned ones are trained on and judged against."""

from simworld.physics.cradle import CradleState, cradle_engine, cradle_episode
from simworld.physics.interaction_worlds import balls_engine, balls_episode, string_engine, string_episode
from simworld.physics.mpm import Goop, MaterialState, MPMEngine, Sand, Water, material_state
from simworld.physics.planar import PlanarEngine
from simworld.physics.push import PushEngine, push_episode, push_state, rotation_error
from simworld.physics.rope import RopeState, rope_episode
from simworld.physics.sph import LiquidState, SPHEngine

__all__ = [
    "CradleState",
    "Goop",
    "LiquidState",
    "MPMEngine",
    "MaterialState",
    "PlanarEngine",
    "PushEngine",
    "RopeState",
    "SPHEngine",
    "Sand",
    "Water",
    "balls_engine",
    "balls_episode",
    "cradle_engine",
    "cradle_episode",
    "material_state",
    "push_episode",
    "push_state",
    "rope_episode",
    "rotation_error",
    "string_engine",
    "string_episode",
]
