"""Learned simulators and their checkpoints."""

from simworld.models.base import LearnedSimulator
from simworld.models.causal_jepa import CausalJEPA
from simworld.models.checkpoint import (
    ENCODERS,
    MODELS,
    holds_encoder,
    load_checkpoint,
    load_encoder,
    save_checkpoint,
    shipped_checkpoints,
)
from simworld.models.force_network import ForceNetwork
from simworld.models.gns import GNS
from simworld.models.interaction_network import InteractionNetwork
from simworld.models.latent_world import LatentWorld
from simworld.models.meshgraphnet import MeshGraphNet
from simworld.models.neural_mpm import NeuralMPM
from simworld.models.probes import Probe, set_probed
from simworld.models.rigid_body_network import RigidBodyNetwork
from simworld.models.slot_attention import SlotAttention
from simworld.models.true_slots import TrueSlots
from simworld.models.visual_interaction_network import VisualInteractionNetwork

__all__ = [
    "ENCODERS",
    "GNS",
    "MODELS",
    "CausalJEPA",
    "ForceNetwork",
    "InteractionNetwork",
    "LatentWorld",
    "LearnedSimulator",
    "MeshGraphNet",
    "NeuralMPM",
    "Probe",
    "RigidBodyNetwork",
    "SlotAttention",
    "TrueSlots",
    "VisualInteractionNetwork",
    "holds_encoder",
    "load_checkpoint",
    "load_encoder",
    "save_checkpoint",
    "set_probed",
    "shipped_checkpoints",
]
