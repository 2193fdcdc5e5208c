"""Transformers over tokens of slots: dense layouts of ragged scenes, who may attend to whom, layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from simworld.state import State


def places(state: State) -> tuple[Tensor, Tensor]:
    """Return scene [n] and number within it [n] of each entity: its place in a dense layout."""
    counts = torch.bincount(state.batch, minlength=state.num_scenes)
    starts = counts.cumsum(0) - counts
    return state.batch, torch.arange(state.num_entities, device=state.device) - starts[state.batch]


def dense(values: Tensor, scene: Tensor, column: Tensor) -> Tensor:
    """Return values [n, ...] as [b, m, ...], zero where a scene has fewer than m entities."""
    shape = (int(scene[-1]) + 1, int(column.max()) + 1, *values.shape[1:])
    return values.new_zeros(shape).index_put((scene, column), values)


def allowed_pairs(there: Tensor, num_steps: int, num_further: int, interactions: bool) -> Tensor:
    """Return [b, 1, k, k]: which token may attend to which; k is m slots x steps and further tokens behind them.

    `there` [b, m] are slots that take part; each token sees itself, so that what nobody sees has no NaN. Without
    `interactions` a slot sees its own tokens and the further ones, which see each other alone.
    """
    scenes, slots = there.shape
    seen = torch.cat([there.repeat_interleave(num_steps, 1), there.new_ones(scenes, num_further)], 1)
    itself = torch.eye(seen.shape[1], dtype=torch.bool, device=there.device)
    pairs = seen[:, None, :].expand(-1, seen.shape[1], -1)
    if not interactions:
        numbers = torch.arange(slots, device=there.device).repeat_interleave(num_steps)
        owner = torch.cat([numbers, numbers.new_full((num_further,), -1)])
        pairs = pairs & ((owner[:, None] == owner) | (owner == -1))
    return (pairs | itself)[:, None]


class Layer(nn.Module):
    """One layer of a transformer: attention and a feed-forward network, each added to what it is given."""

    def __init__(
        self, size: int, num_heads: int, head_size: int, feedforward_size: int, dropout: float, norm_first: bool
    ) -> None:
        super().__init__()
        self.num_heads, self.head_size, self.rate = num_heads, head_size, dropout
        self.norm_attention: nn.Module = nn.LayerNorm(size) if norm_first else nn.Identity()
        self.project = nn.Linear(size, 3 * num_heads * head_size)
        self.join = nn.Linear(num_heads * head_size, size)
        self.norm = nn.LayerNorm(size)
        self.grow, self.shrink = nn.Linear(size, feedforward_size), nn.Linear(feedforward_size, size)

    def forward(self, x: Tensor, pairs: Tensor, kept: list[Tensor] | None = None) -> Tensor:
        """Return tokens [b, k, size]; `kept` takes the weights [b, heads, k, k] of attention."""
        scenes, count, _ = x.shape
        heads = self.project(self.norm_attention(x)).reshape(scenes, count, 3, self.num_heads, self.head_size)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        if kept is not None:
            scores = query @ key.transpose(-1, -2) / math.sqrt(self.head_size)
            kept.append(scores.masked_fill(~pairs, -math.inf).softmax(-1))
        rate = self.rate if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=pairs, dropout_p=rate)
        mixed = self.join(mixed.transpose(1, 2).reshape(scenes, count, -1))
        x = x + functional.dropout(mixed, self.rate, self.training)
        grown = functional.dropout(functional.gelu(self.grow(self.norm(x))), self.rate, self.training)
        return x + functional.dropout(self.shrink(grown), self.rate, self.training)
