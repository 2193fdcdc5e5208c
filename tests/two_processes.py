"""Trains in two processes; run by test_train.py, since each process runs the whole script."""

import sys

import torch

from simworld import Fit, InteractionNetwork, fit, one_step, open_trajectories

if __name__ == "__main__":
    data, out = sys.argv[1:]
    trajectories = open_trajectories(data)[:]
    torch.manual_seed(0)
    model = InteractionNetwork(
        dt=1 / 50,
        statistics=InteractionNetwork.measure(trajectories),
        latent_size=8,
        num_message_passing_steps=2,
        margin=2.0,
    )
    how = Fit(num_steps=2, batch_size=3, evaluate_every=2, accelerator="cpu", devices=2, warm_up=1)
    fit(model, trajectories, one_step(), how, out=out)
