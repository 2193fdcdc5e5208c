"""What must be fast. Each kernel is defined by a plain PyTorch version, which faster ones must agree with."""

from simworld.kernels.neighbors import NeighborPairs, NeighborSearch, neighbor_pairs, neighbor_pairs_reference
from simworld.kernels.segments import gather_sum, gather_sum_reference, segment_sum, segment_sum_reference

__all__ = [
    "NeighborPairs",
    "NeighborSearch",
    "gather_sum",
    "gather_sum_reference",
    "neighbor_pairs",
    "neighbor_pairs_reference",
    "segment_sum",
    "segment_sum_reference",
]
