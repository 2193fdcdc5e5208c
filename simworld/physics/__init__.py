"""Simulators with known equations: the ground truth that learned ones are trained on and judged against."""

from simworld.physics.rope import RopeEngine, RopeState, rope_episode

__all__ = ["RopeEngine", "RopeState", "rope_episode"]
