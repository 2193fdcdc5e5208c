"""Learned simulators and their checkpoints."""

from simworld.models.base import LearnedSimulator
from simworld.models.causal_jepa import CausalJEPA
from simworld.models.checkpoint import MODELS, load_checkpoint, save_checkpoint
from simworld.models.force_network import ForceNetwork
from simworld.models.gns import GNS
from simworld.models.interaction_network import InteractionNetwork
from simworld.models.meshgraphnet import MeshGraphNet
from simworld.models.rigid_body_network import RigidBodyNetwork
from simworld.models.true_slots import TrueSlots
from simworld.models.visual_interaction_network import VisualInteractionNetwork

__all__ = [
    "GNS",
    "MODELS",
    "CausalJEPA",
    "ForceNetwork",
    "InteractionNetwork",
    "LearnedSimulator",
    "MeshGraphNet",
    "RigidBodyNetwork",
    "TrueSlots",
    "VisualInteractionNetwork",
    "load_checkpoint",
    "save_checkpoint",
]
