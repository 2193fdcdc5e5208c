"""Learned simulators and their checkpoints."""

from simworld.models.base import LearnedSimulator
from simworld.models.checkpoint import MODELS, load_checkpoint, save_checkpoint
from simworld.models.force_network import ForceNetwork
from simworld.models.gns import GNS
from simworld.models.interaction_network import InteractionNetwork
from simworld.models.meshgraphnet import MeshGraphNet
from simworld.models.rigid_body_network import RigidBodyNetwork
from simworld.models.visual_interaction_network import VisualInteractionNetwork

__all__ = [
    "GNS",
    "MODELS",
    "ForceNetwork",
    "InteractionNetwork",
    "LearnedSimulator",
    "MeshGraphNet",
    "RigidBodyNetwork",
    "VisualInteractionNetwork",
    "load_checkpoint",
    "save_checkpoint",
]
