"""Learned physical simulators: train a graph network on recorded states, roll it out, know its error."""

from simworld.abduction import Abduction, abduct
from simworld.data import open_trajectories, write_trajectories
from simworld.fields import Field, index_field
from simworld.intervene import do, hold, negate, pin, remove, reserve, rotate, scale, shift
from simworld.kinds import MeshState, ObjectState, ParticleState, SlotState, SplatState
from simworld.losses import Loss, masked_slots, one_step, pushforward, rollout_positions, rollout_relative_l2, unrolled
from simworld.metrics import ConstantVelocity, Row, Static, evaluate, one_step_position_mse, position_mse
from simworld.models import (
    GNS,
    CausalJEPA,
    ForceNetwork,
    InteractionNetwork,
    LearnedSimulator,
    MeshGraphNet,
    NeuralMPM,
    Probe,
    SlotAttention,
    TrueSlots,
    VisualInteractionNetwork,
    load_checkpoint,
    load_encoder,
    save_checkpoint,
    set_probed,
)
from simworld.prescriptions import prescribe
from simworld.query import Answer, ask, read_query
from simworld.replacements import replace_slots
from simworld.scene import load_scene
from simworld.simulate import Intervention, Simulator, rollout
from simworld.state import State
from simworld.train import Fit, fit
from simworld.trajectory import Trajectory
from simworld.worlds import Counterfactual, branches, counterfactual

__all__ = [
    "GNS",
    "Abduction",
    "Answer",
    "CausalJEPA",
    "ConstantVelocity",
    "Counterfactual",
    "Field",
    "Fit",
    "ForceNetwork",
    "InteractionNetwork",
    "Intervention",
    "LearnedSimulator",
    "Loss",
    "MeshGraphNet",
    "MeshState",
    "NeuralMPM",
    "ObjectState",
    "ParticleState",
    "Probe",
    "Row",
    "Simulator",
    "SlotAttention",
    "SlotState",
    "SplatState",
    "State",
    "Static",
    "Trajectory",
    "TrueSlots",
    "VisualInteractionNetwork",
    "abduct",
    "ask",
    "branches",
    "counterfactual",
    "do",
    "evaluate",
    "fit",
    "hold",
    "index_field",
    "load_checkpoint",
    "load_encoder",
    "load_scene",
    "masked_slots",
    "negate",
    "one_step",
    "one_step_position_mse",
    "open_trajectories",
    "pin",
    "position_mse",
    "prescribe",
    "pushforward",
    "read_query",
    "remove",
    "replace_slots",
    "reserve",
    "rollout",
    "rollout_positions",
    "rollout_relative_l2",
    "rotate",
    "save_checkpoint",
    "scale",
    "set_probed",
    "shift",
    "unrolled",
    "write_trajectories",
]
