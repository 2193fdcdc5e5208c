"""A world model learned end to end from films: one embedding for each frame, and what it will be next.

LeWorldModel, arXiv 2603.19312, scaled down to two cores, with its regularizer SIGReg, which is made of the statistic of
Epps and Pulley 1983, "A test for normality based on the empirical characteristic function".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from simworld.models.encoder import Encoder
from simworld.state import State

KNOTS, LAST = 17, 3.0  # of the quadrature, from 0 to 3 standard deviations


def sigreg(embeddings: Tensor, directions: Tensor) -> Tensor:
    """Return how far embeddings [..., N, d] are from a standard Gaussian along directions [m, d] of unit length.

    Of each direction u the statistic of Epps and Pulley: N times the integral over t from -3 to 3 of
    exp(-t^2 / 2) |phi(t) - exp(-t^2 / 2)|^2, phi(t) the mean of exp(i t <z, u>) over the N embeddings, by the
    trapezoid rule of 17 knots on the half from 0 on, doubled; then the mean over directions, and over what leads. Of N
    draws from the Gaussian it is about 1 whatever N, of embeddings that are all the same it grows with N.
    """
    along = embeddings @ directions.T
    knots = torch.linspace(0, LAST, KNOTS).to(along)
    weights = torch.full_like(knots, 2 * LAST / (KNOTS - 1))
    weights[[0, -1]] /= 2
    gauss = (-knots.square() / 2).exp()
    turned = along[..., None] * knots
    apart = (turned.cos().mean(-3) - gauss).square() + turned.sin().mean(-3).square()
    return ((apart * gauss * weights).sum(-1) * embeddings.shape[-2]).mean()


class LatentWorld(Encoder):
    """An encoder of frames and a predictor of its next embedding, trained together: a simulator of one slot a scene.

    Convolutions and two layers make an embedding [slot_size] of a frame at half its size; a perceptron of the last
    `history_length` embeddings says how the last one changes. The loss is the squared error of predicted next
    embeddings plus `weight` times `sigreg`, through both of which gradients flow into both networks: nothing is
    stopped or averaged, and `sigreg` alone keeps embeddings from becoming all the same. It is taken of the batch at
    each frame of a clip by itself, along `num_directions` directions drawn anew in each step.

    Beside the paper: convolutions for its transformers, layer normalization for its batch normalization.
    """

    def __init__(
        self,
        *,
        dt: float = 0.1,
        image_size: int = 64,
        slot_size: int = 64,
        num_channels: int = 16,
        hidden_size: int = 256,
        history_length: int = 3,
        weight: float = 0.09,
        num_directions: int = 256,
        statistics: dict[str, list[float]] | None = None,
    ) -> None:
        given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        sizes = {k: v for k, v in given.items() if isinstance(v, int)}
        wrong = [k for k, v in sizes.items() if v < 1]
        if wrong or image_size % 16 or weight < 0:
            name = wrong[0] if wrong else "image_size" if image_size % 16 else "weight"
            raise ValueError(
                f"Sizes must be 1 or more, image_size a multiple of 16, weight 0 or more; got {name}={given[name]}."
            )
        super().__init__(dt=dt, image_size=image_size, num_slots=1, arguments=given)
        self.slot_size, self.history_length = slot_size, history_length
        self.weight, self.num_directions = weight, num_directions
        self.trunk = nn.Sequential(
            nn.Conv2d(3, num_channels, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(num_channels, 2 * num_channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * num_channels, 4 * num_channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(4 * num_channels * (image_size // 16) ** 2, hidden_size),
            nn.LayerNorm(hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, slot_size),
        )
        self.predictor = nn.Sequential(
            nn.Linear(history_length * slot_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, slot_size),
        )

    @staticmethod
    def measure_films(films: Sequence[Tensor], **arguments: Any) -> dict[str, list[float]] | None:
        """Return None: this model needs no statistics."""
        return None

    def forward(self, frames: Tensor) -> Tensor:
        """Return embeddings [..., s] of prepared frames [..., 3, h, w]."""
        made: Tensor = self.trunk(frames.flatten(0, -4))
        return made.view(*frames.shape[:-3], self.slot_size)

    def slots(self, rgb: Tensor, seed: int) -> Tensor:
        """Return the embeddings [T, 1, s] of a film [T, h, w, 3]; nothing is random."""
        made: Tensor = self(self.prepare(rgb))
        return made[:, None]

    def next_embedding(self, known: Tensor) -> Tensor:
        """Return the embedding [..., s] after those known [..., history_length, s]."""
        change: Tensor = self.predictor(known.flatten(-2))
        return known[..., -1, :] + change

    def loss(self, rgb: Tensor, generator: torch.Generator) -> Tensor:
        """Return the loss of clips [b, T, h, w, 3]; T must be above `history_length`.

        Raises:
            ValueError: clips are too short.
        """
        if rgb.shape[1] <= self.history_length:
            raise ValueError(
                f"Clips of {rgb.shape[1]} frames have none to predict after {self.history_length}; set num_frames to "
                f"{self.history_length + 1} or more."
            )
        found: Tensor = self(self.prepare(rgb))
        known = found.unfold(1, self.history_length, 1)[:, :-1].transpose(2, 3)
        missed = (self.next_embedding(known) - found[:, self.history_length :]).square().mean()
        directions = torch.randn(self.num_directions, self.slot_size, generator=generator).to(found)
        directions = directions / directions.norm(dim=1, keepdim=True)
        return missed + self.weight * sigreg(found.transpose(0, 1), directions)

    def step(self, state: State, action: Tensor | None = None) -> State:
        """Return the embeddings of the next frame, which this model has not seen.

        Raises:
            ValueError: the state has no slots of this size, knows too few frames, or there is an action.
        """
        if action is not None:
            raise ValueError("This model was trained without actions; leave them out.")
        if "slots" not in state or state.slots.shape[1] != self.slot_size:
            got = f"slots of {state.slots.shape[1]}" if "slots" in state else f"a {type(state).__name__}"
            raise ValueError(
                f"This model steps slots of {self.slot_size} numbers; got {got}. Encode a film with this model."
            )
        needed = self.history_length - 1
        had = state.history.shape[1] if "history" in state else 0
        if had < needed:
            raise ValueError(f"This model needs a history of {needed} frames; got {had}. Encode with history={needed}.")
        known = state.slots[:, None]
        if needed:
            known = torch.cat([state.history[:, had - needed :], known], 1)
        moved = torch.where(state.active[:, None], self.next_embedding(known), state.slots)
        return state.advanced(slots=moved)
