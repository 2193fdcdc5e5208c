"""Learned physical simulators: states in, rollouts out, with known error."""
