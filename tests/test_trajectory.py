from __future__ import annotations

import pytest
import torch

from simworld import InteractionNetwork, MeshState, Trajectory
from simworld.data.generate import GENERATORS


def test_mean_velocities_are_what_positions_say():
    (path,) = GENERATORS["video_billiards"].make([[1, 0, 0]], num_bodies=6)
    means = path.with_mean_velocities()
    assert torch.equal(means["positions"], path["positions"][1:])
    assert torch.equal(means.initial.velocities, means["velocities"][0])
    assert torch.allclose(means["velocities"] * path.dt, path["positions"].diff(dim=0), atol=1e-14)
    hits = (means["velocities"] - path["velocities"][1:]).abs().amax((1, 2)) > 1e-6
    assert 0 < int(hits.sum()) < len(hits)  # they differ where something was hit
    with pytest.raises(ValueError, match="position differences"):
        InteractionNetwork.measure([path], actions="none")
    InteractionNetwork.measure([means], actions="none")


def test_mean_velocities_are_made_where_none_are_recorded():
    places = torch.tensor([[[0.0, 0.0]], [[1.0, 0.0]], [[1.0, 3.0]]])
    state = MeshState(positions=places[0], cells=torch.zeros(0, 2, dtype=torch.int64))
    path = Trajectory(initial=state, frames={"positions": places}, active=torch.ones(3, 1, dtype=torch.bool), dt=0.5)
    made = path.with_mean_velocities()
    assert made.initial.positions.tolist() == [[1.0, 0.0]]
    assert made.initial.velocities.tolist() == [[2.0, 0.0]]
    assert made["velocities"].tolist() == [[[2.0, 0.0]], [[0.0, 6.0]]]


def test_mean_velocities_of_a_single_frame_are_refused():
    (path,) = GENERATORS["video_drift"].make([[1, 0, 0]])
    with pytest.raises(ValueError, match="two frames or more"):
        path.window(0, 1).with_mean_velocities()
