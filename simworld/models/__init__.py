"""Learned simulators and their checkpoints."""

from simworld.models.base import LearnedSimulator
from simworld.models.checkpoint import MODELS, load_checkpoint, save_checkpoint
from simworld.models.interaction_network import InteractionNetwork

__all__ = ["MODELS", "InteractionNetwork", "LearnedSimulator", "load_checkpoint", "save_checkpoint"]
