"""Checkpoints: one safetensors file with the weights and, in its header, all that rebuilds the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from simworld.models.base import LearnedSimulator
from simworld.models.causal_jepa import CausalJEPA
from simworld.models.encoder import Encoder
from simworld.models.force_network import ForceNetwork
from simworld.models.gns import GNS
from simworld.models.interaction_network import InteractionNetwork
from simworld.models.latent_world import LatentWorld
from simworld.models.meshgraphnet import MeshGraphNet
from simworld.models.neural_mpm import NeuralMPM
from simworld.models.rigid_body_network import RigidBodyNetwork
from simworld.models.slot_attention import SlotAttention
from simworld.models.visual_interaction_network import VisualInteractionNetwork
from simworld.saving import replacing

Kept = TypeVar("Kept", LearnedSimulator, Encoder)
SCHEMA = "simworld.checkpoint"
SCHEMA_VERSION = 1
MODELS: Mapping[str, type[LearnedSimulator]] = MappingProxyType(
    {
        "InteractionNetwork": InteractionNetwork,
        "ForceNetwork": ForceNetwork,
        "RigidBodyNetwork": RigidBodyNetwork,
        "GNS": GNS,
        "MeshGraphNet": MeshGraphNet,
        "NeuralMPM": NeuralMPM,
        "VisualInteractionNetwork": VisualInteractionNetwork,
        "CausalJEPA": CausalJEPA,
    }
)


ENCODERS: Mapping[str, type[Encoder]] = MappingProxyType({"SlotAttention": SlotAttention, "LatentWorld": LatentWorld})


def save_checkpoint(model: LearnedSimulator | Encoder, path: str | Path, **provenance: Any) -> None:
    """Write a model's or an encoder's weights, constructor arguments and provenance to one file, whole or not at all.

    `provenance` (plain values: dataset, seed, units, command) is added to what the model already carries.
    """
    header = {
        "schema": SCHEMA,
        "schema_version": str(SCHEMA_VERSION),
        "model": type(model).__name__,
        "arguments": json.dumps(model.arguments),
        "provenance": json.dumps({**model.provenance, **provenance}),
    }
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_tensors(weights, header, Path(path))


def load_checkpoint(path: str | Path) -> LearnedSimulator:
    """Return the model in a checkpoint, ready to step; a bare name, as in "rope", is one shipped with simworld.

    Raises:
        FileNotFoundError: there is no such file, and no shipped checkpoint of that name.
        ValueError: the file is damaged, foreign, of a newer schema, or of another model than it says.
    """
    path = _find(path)
    header, weights = read_tensors(path, SCHEMA, SCHEMA_VERSION)
    kind = MODELS.get(header.get("model", ""))
    if header.get("model") == "LatentWorld":
        raise ValueError(
            f"{path} holds a LatentWorld, which sees films and predicts its own embeddings of them; load it with "
            "load_encoder, or judge it with simworld bench slots --checkpoint."
        )
    if kind is None and header.get("model") in ENCODERS:
        raise ValueError(
            f"{path} holds a {header['model']}, which makes slots of films and predicts nothing; encode films with it "
            "(simworld encode) and give a model of slots."
        )
    if kind is None:
        raise ValueError(f"{path} holds a model '{header.get('model')}'; this version knows {', '.join(MODELS)}.")
    return _rebuilt(path, kind, header, weights)


def holds_encoder(path: str | Path) -> bool:
    """Return whether a checkpoint, or a shipped one of that name, holds an encoder of films."""
    header, _ = read_tensors(_find(path), SCHEMA, SCHEMA_VERSION)
    return header.get("model") in ENCODERS


def load_encoder(path: str | Path) -> Encoder:
    """Return the encoder of films in a checkpoint; a bare name is one shipped with simworld.

    Raises:
        FileNotFoundError: there is no such file, and no shipped checkpoint of that name.
        ValueError: the file is damaged, foreign, of a newer schema, or holds no encoder.
    """
    path = _find(path)
    header, weights = read_tensors(path, SCHEMA, SCHEMA_VERSION)
    kind = ENCODERS.get(header.get("model", ""))
    if kind is None:
        raise ValueError(
            f"{path} holds a model '{header.get('model')}', which does not see films; encoders are of "
            f"{', '.join(ENCODERS)}."
        )
    return _rebuilt(path, kind, header, weights)


def _rebuilt(path: Path, kind: type[Kept], header: Mapping[str, str], weights: Mapping[str, torch.Tensor]) -> Kept:
    """Return what a checkpoint holds, or say that its contents do not fit it."""
    try:
        model = kind(**json.loads(header["arguments"]))
        first, _ = next(model.named_parameters())
        model = model.to(weights[first].dtype)  # buffers may be of another
        model.load_state_dict(weights)
        provenance = json.loads(header.get("provenance", "{}"))
        if not (isinstance(provenance, dict) and all(_sound(value) for value in weights.values())):
            raise ValueError("weights or provenance hold what none was trained to")
    except (KeyError, TypeError, RuntimeError, ValueError, StopIteration) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{path} says it holds a {kind.__name__}, but its contents do not fit one ({reason}); "
            "it was written by another version or altered. Train or fetch it again."
        ) from error
    model.provenance = provenance
    return model.eval()


def _sound(weight: torch.Tensor) -> bool:
    return weight.is_floating_point() and bool(torch.isfinite(weight).all())


def shipped(suffix: str) -> dict[str, Path]:
    """Return the files of a kind that come with the package, by name."""
    folder = Path(str(resources.files("simworld"))) / "assets"
    return {path.stem: path for path in sorted(folder.glob(f"*{suffix}"))}


def shipped_checkpoints() -> dict[str, str]:
    """Return by name what each checkpoint that comes with the package holds: a model and what it is trained on."""
    found = {}
    for name, path in shipped(".safetensors").items():
        header, _ = read_tensors(path, SCHEMA, SCHEMA_VERSION)
        provenance = json.loads(header.get("provenance", "{}"))
        found[name] = f"{header['model']}, trained on {provenance.get('dataset', 'data that it does not name')}"
    return found


def write_tensors(tensors: Mapping[str, torch.Tensor], header: Mapping[str, str], path: Path) -> None:
    """Write a safetensors file under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(path) as partial:
            save_file(dict(tensors), partial, metadata=dict(header))
    except SafetensorError as error:
        raise OSError(f"{path} could not be written ({error}); free some space or choose another place.") from error


def read_tensors(path: Path, schema: str, version: int) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Return header and tensors of a safetensors file of a given schema, or say what else it is."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); fetch or write it again.") from error
    if header.get("schema") != schema:
        raise ValueError(f"{path} is not a {schema} file (its schema: {header.get('schema')}); give one that is.")
    number = header.get("schema_version", "none")
    if not (number.isdecimal() and int(number) <= version):
        raise ValueError(
            f"{path} has schema version {number}, this simworld reads up to {version}; "
            "update it with: pip install --upgrade simworld"
        )
    return header, tensors


def _find(path: str | Path) -> Path:
    found = Path(path)
    if found.suffix in (".h5", ".npz"):
        raise ValueError(f"{path} is a file of data; a checkpoint is a .safetensors file or a shipped name.")
    if found.is_file():
        return found
    names = shipped(".safetensors")
    if str(path) in names:
        return names[str(path)]
    near = get_close_matches(str(path), names, n=4)
    meant = f"; near it among those that are shipped: {', '.join(near)}" if near else ""
    raise FileNotFoundError(f"There is no checkpoint file '{path}'{meant}. `simworld info` lists the shipped ones.")
