"""What must be fast. Each kernel is defined by a plain PyTorch version, which faster ones must agree with."""

from simworld.kernels.segments import segment_sum

__all__ = ["segment_sum"]
