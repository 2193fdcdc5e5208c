"""Recorded trajectories: the HDF5 store, and readers of other projects' formats."""

from simworld.data.propnet import read_propnet_cradle, read_propnet_rope
from simworld.data.store import TrajectoryFile, open_trajectories, write_trajectories

__all__ = ["TrajectoryFile", "open_trajectories", "read_propnet_cradle", "read_propnet_rope", "write_trajectories"]
