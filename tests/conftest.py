from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from simworld.models import InteractionNetwork
from simworld.physics import rope_episode
from simworld.state import State
from simworld.trajectory import Trajectory

RECORDED = Path(os.environ.get("SIMWORLD_DATA", Path(__file__).parents[2] / "shared/data")) / "propnet/Rope_valid.npz"


@pytest.fixture(scope="session")
def episode() -> Trajectory:
    return rope_episode([7, 0, 1], num_steps=30)


@pytest.fixture(scope="session")
def episodes() -> list[Trajectory]:
    return [rope_episode([7, 0, k], num_steps=12).to(torch.float32) for k in range(4)]


@pytest.fixture
def state(episode: Trajectory) -> State:
    return episode.initial


@pytest.fixture
def make_model(episode: Trajectory):
    def make(**arguments) -> InteractionNetwork:
        torch.manual_seed(0)
        given = {"margin": 2.0, "latent_size": 16, "num_message_passing_steps": 3, **arguments}
        return InteractionNetwork(dt=1 / 50, statistics=InteractionNetwork.measure([episode]), **given)

    return make


@pytest.fixture(scope="session")
def recorded() -> Path:
    if not RECORDED.is_file():
        pytest.skip(f"recorded data is not here ({RECORDED}); set SIMWORLD_DATA to its folder")
    return RECORDED
