"""Recorded trajectories: the HDF5 store, and readers and writers of other projects' formats."""

from simworld.data.arrays import from_arrays
from simworld.data.deepmind import read_deepmind, write_deepmind
from simworld.data.dpinet import read_dpinet
from simworld.data.formats import export_data, import_data
from simworld.data.geoelements import read_geoelements, write_geoelements
from simworld.data.lagrangebench import read_lagrangebench, write_lagrangebench
from simworld.data.mesh_cells import mesh_faults
from simworld.data.meshes import mesh_state, read_mesh, read_meshes, read_surface
from simworld.data.meshgraphnets import read_meshgraphnets
from simworld.data.metadata import peer_metadata, write_metadata
from simworld.data.propnet import read_propnet_cradle, read_propnet_rope
from simworld.data.store import TrajectoryFile, open_trajectories, write_trajectories
from simworld.data.tignn import read_tignn
from simworld.data.vtk import write_vtk
from simworld.data.vtk_points import read_vtk
from simworld.data.xdmf import write_xdmf

__all__ = [
    "TrajectoryFile",
    "export_data",
    "from_arrays",
    "import_data",
    "mesh_faults",
    "mesh_state",
    "open_trajectories",
    "peer_metadata",
    "read_deepmind",
    "read_dpinet",
    "read_geoelements",
    "read_lagrangebench",
    "read_mesh",
    "read_meshes",
    "read_meshgraphnets",
    "read_propnet_cradle",
    "read_propnet_rope",
    "read_surface",
    "read_tignn",
    "read_vtk",
    "write_deepmind",
    "write_geoelements",
    "write_lagrangebench",
    "write_metadata",
    "write_trajectories",
    "write_vtk",
    "write_xdmf",
]
