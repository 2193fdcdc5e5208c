"""Causal-JEPA (Nam et al. 2026, arXiv 2602.11389): slots predicted from each other, with whole objects masked."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from simworld.models.base import LearnedSimulator, Noise, check_sizes
from simworld.models.slot_tokens import Layer, allowed_pairs, dense, places
from simworld.state import State
from simworld.trajectory import Trajectory

Actions = Literal["none", "input"]
Readout = Literal["slots", "change", "motion"]
SPREAD = 0.02  # of first values of codes of time and of the mask


class CausalJEPA(LearnedSimulator):
    """A bidirectional masked transformer over tokens of (time x slot), which predicts what is masked.

    Tokens are a scene's slots at `history_length` frames, the present one the last, and at `num_future` frames to
    come, with a code of time and none of slots. A visible token is a linear function of its slot. A masked one is
    phi(z_t0) + e_tau: a linear function of the same slot at the earliest frame, which is always visible and says
    which object it is, and a learned embedding with the code of its time. The future is always masked; in training
    also all of the history after t0 of some objects (`losses.masked_slots`), so that they must be inferred from the
    others. Actions and proprioception are tokens of their own. `predict` gives all future frames in one pass, a step
    the first of them.

    The defaults are the paper's for CLEVRER. `readout="slots"` is its form: the last layer gives the predicted slot.
    With `"change"` it gives the difference to the slot's latest visible frame, with `"motion"` that to where the slot's
    two latest visible frames lead in a straight line; small models learn so much faster.
    `norm_before_attention=False` leaves out the normalization before attention, as the authors' code does; that code
    also has heads of 8, for which say `head_size=8`. `interactions=False` lets each slot see its own tokens, actions
    and proprioception alone.
    """

    def __init__(
        self,
        *,
        dt: float,
        statistics: Mapping[str, Any],
        actions: Actions = "none",
        history_length: int = 6,
        num_future: int = 10,
        latent_size: int = 128,
        num_layers: int = 6,
        num_heads: int = 16,
        head_size: int = 64,
        feedforward_size: int = 2048,
        dropout: float = 0.1,
        interactions: bool = True,
        readout: Readout = "slots",
        norm_before_attention: bool = True,
    ) -> None:
        """Make a transformer of given size, its weights drawn from torch's generator.

        `statistics` is what `CausalJEPA.measure` returns for the training data.

        Raises:
            ValueError: a choice or size is outside its range, a statistic is missing, or more than one frame is to be
                predicted under actions, of which only the next is known.
        """
        arguments = {
            "statistics": dict(statistics),
            "actions": actions,
            "history_length": history_length,
            "num_future": num_future,
            "latent_size": latent_size,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "head_size": head_size,
            "feedforward_size": feedforward_size,
            "dropout": dropout,
            "interactions": interactions,
            "readout": readout,
            "norm_before_attention": norm_before_attention,
        }
        super().__init__(dt, arguments)
        _check_arguments(arguments)
        self.actions, self.readout, self.interactions = actions, readout, interactions
        self.history_length, self.num_future, self.dropout = history_length, num_future, dropout
        self._keep_statistics(statistics)
        self.slot_size = len(statistics["slots_mean"])
        self.num_proprioception = len(statistics["proprioception_mean"])
        size, steps = latent_size, history_length + num_future
        self.time = nn.Parameter(SPREAD * torch.randn(steps, size))
        self.mask = nn.Parameter(SPREAD * torch.randn(size))
        self.embed, self.anchor = nn.Linear(self.slot_size, size), nn.Linear(self.slot_size, size)
        self.layers = nn.ModuleList(
            Layer(size, num_heads, head_size, feedforward_size, dropout, norm_before_attention)
            for _ in range(num_layers)
        )
        self.norm, self.decode = nn.LayerNorm(size), nn.Linear(size, self.slot_size)
        if self.num_proprioception:
            self.embed_self = nn.Linear(self.num_proprioception, size)
            self.anchor_self = nn.Linear(self.num_proprioception, size)
            self.decode_self = nn.Linear(size, self.num_proprioception)
        if actions == "input":
            self.embed_action = nn.Linear(len(statistics["actions_mean"]), size)
        if readout != "slots":  # nothing is added, until something is learned
            for last in (self.decode, *((self.decode_self,) if self.num_proprioception else ())):
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)

    def _keep_statistics(self, statistics: Mapping[str, Any]) -> None:
        """Keep means and standard deviations as buffers, which are no weights: the arguments hold them."""
        for name in ("slots", "proprioception", "actions"):
            for which in ("mean", "std"):
                values = torch.tensor(statistics[f"{name}_{which}"], dtype=torch.float64)
                self.register_buffer(f"_{name}_{which}", values, persistent=False)
        self.change_scale = float(statistics["change"])

    @staticmethod
    def measure(
        trajectories: Iterable[Trajectory], *, noise_std: Noise = 0.0, actions: Actions = "none"
    ) -> dict[str, Any]:
        """Return means and standard deviations of slots, actions and proprioception, and the size of slots' changes.

        Changes are those from frame to frame, in standard deviations of the slots.

        Raises:
            ValueError: there are no steps of slots.
        """
        samples: dict[str, list[Tensor]] = {"slots": [], "change": [], "proprioception": [], "actions": []}
        for path in trajectories:
            if "slots" not in path.frames:
                raise ValueError(f"A CausalJEPA is trained on slots; got a {type(path.initial).__name__}.")
            slots, active = path["slots"].double(), path.active
            samples["slots"].append(slots[active])
            samples["change"].append(slots.diff(dim=0)[active[1:] & active[:-1]])
            if "proprioception" in path.frames:
                samples["proprioception"].append(path["proprioception"].double().flatten(0, 1))
            if path.actions is not None and actions == "input":
                samples["actions"].append(path.actions.double().flatten(0, 1))
        found = {name: torch.cat(values) if values else torch.zeros(1, 0) for name, values in samples.items()}
        if not found["change"].numel():
            raise ValueError("Statistics need at least one trajectory of two frames of slots; got none.")
        statistics: dict[str, Any] = {}
        for name in ("slots", "proprioception", "actions"):
            mean = found[name].mean(0)
            std = (found[name] - mean).square().mean(0).sqrt()
            statistics[f"{name}_mean"] = mean.tolist()
            statistics[f"{name}_std"] = torch.where(std > 0, std, 1.0).tolist()
        change = (found["change"] / torch.tensor(statistics["slots_std"])).square().mean().sqrt()
        return {**statistics, "change": float(change) or 1.0}

    def check(self, state: State, action: Tensor | None) -> None:
        """Raise a ValueError that says what this model needs and the state or action lacks."""
        if "slots" not in state:
            said = self.provenance.get("slots", {}).get("encoder", "true")
            how = "TrueSlots" if said == "true" else f"simworld encode {said}"
            raise ValueError(
                f"A CausalJEPA steps a SlotState; got a {type(state).__name__}. Encode it first, by {how}."
            )
        if state.slots.shape[1] != self.slot_size:
            raise ValueError(
                f"This model was trained on slots of {self.slot_size} numbers; got {state.slots.shape[1]}. "
                "Encode with the encoder that it was trained on."
            )
        if state.slots.dtype != self.dtype:
            raise ValueError(
                f"This model computes in {self.dtype}; got a state in {state.slots.dtype}. "
                "Convert the state with state.to(dtype), or the model with model.double()."
            )
        names = ["history"] if self.history_length > 1 else []
        names += ["past_actions"] if self.actions == "input" and self.history_length > 1 else []
        if self.num_proprioception:
            names += ["proprioception", *(["past_proprioception"] if self.history_length > 1 else [])]
        if "past_actions" in names and "past_actions" not in state:
            raise ValueError("This model was trained under actions, and the state knows none; give data with actions.")
        for name in names:
            known = state[name].shape[1] if name in state else 0
            wanted = self.num_proprioception if name == "proprioception" else self.history_length - 1
            exact = name == "proprioception"
            if known < wanted or (exact and known != wanted):
                what = "numbers" if exact else "frames before the present one"
                more = "" if exact else f" Encode with a history of {wanted} or more."
                raise ValueError(f"This model needs {name} of {wanted} {what}; the state has {known or 'none'}.{more}")
        self._check_action(state, action)

    def _check_action(self, state: State, action: Tensor | None) -> None:
        if self.actions == "none":
            if action is not None:
                raise ValueError(
                    "This model was trained without actions; leave them out or train with actions='input'."
                )
            return
        wanted = [state.num_scenes, len(self.get_buffer("_actions_mean"))]
        if action is None or list(action.shape) != wanted or action.dtype != self.dtype:
            got = "none" if action is None else f"{list(action.shape)} of {action.dtype}"
            raise ValueError(
                f"This model takes an action {wanted} of {self.dtype} per step, a row per scene; got {got}."
            )

    def forward(self, state: State, action: Tensor | None = None) -> Tensor:
        """Return [n, s + p]: the change of slots to the next frame in units of its rms, and that of proprioception.

        Proprioception is the scene's, the same in all of its rows. Rows of inactive slots do not change.
        """
        made, own = self.predicted(state, action)
        present = self._scaled("slots", state.slots)
        change = (made[:, :, self.history_length][self._place(state)] - present) / self.change_scale
        change = torch.where(state.active[:, None], change, 0.0)
        if own is None:
            return change
        moved = (own[:, self.history_length] - self._scaled("proprioception", state.proprioception)) / self.change_scale
        return torch.cat([change, moved[state.batch]], 1)

    def integrate(self, state: State, change: Tensor, action: Tensor | None = None) -> State:
        """Return the next state: slots and proprioception changed, the present ones at the end of their past."""
        stds = self._stds(state)
        moved = change * self.change_scale
        changes = {"slots": state.slots + moved[:, : self.slot_size] * stds[0]}
        if "past_actions" in state and action is not None:
            changes["past_actions"] = torch.cat([state.past_actions, action[:, None]], 1)[:, 1:]
        if "proprioception" in state:
            first = torch.searchsorted(state.batch, torch.arange(state.num_scenes, device=state.device))
            here = state.proprioception
            changes["proprioception"] = here + moved[first, self.slot_size :] * stds[1] if stds[1].numel() else here
            if "past_proprioception" in state:
                changes["past_proprioception"] = torch.cat([state.past_proprioception, here[:, None]], 1)[:, 1:]
        return state.advanced(**changes)

    def target(self, state: State, next_state: State, action: Tensor | None = None) -> Tensor:
        """Return the normalized change that `integrate` turns into `next_state`; zero for slots that are not there."""
        stds = self._stds(state)
        change = torch.where(state.active[:, None], (next_state.slots - state.slots) / stds[0], 0.0)
        if self.num_proprioception:
            moved = (next_state.proprioception - state.proprioception) / stds[1]
            change = torch.cat([change, moved[state.batch]], 1)
        return change / self.change_scale

    def free(self, state: State) -> Tensor:
        """Return which slots [n] the model moves: the active ones."""
        return state.free

    def predict(self, state: State, action: Tensor | None = None) -> Tensor:
        """Return [num_future, n, s]: the slots of the frames to come, all in one pass; inactive ones stay."""
        self.check(state, action)
        made, _ = self.predicted(state, action)
        std, mean = (self.get_buffer(f"_slots_{which}").to(state.slots) for which in ("std", "mean"))
        ahead = (made[:, :, self.history_length :][self._place(state)] * std + mean).transpose(0, 1)
        return torch.where(state.active[:, None], ahead, state.slots)

    def attention(self, state: State, action: Tensor | None = None) -> Tensor:
        """Return [n, m]: how much the next frame of each slot attends to each slot of its scene, by its number there.

        Weights of all layers and heads, averaged, summed over the frames of the slot that is looked at.
        """
        self.check(state, action)
        kept: list[Tensor] = []
        self.predicted(state, action, kept=kept)
        weights = torch.stack(kept).mean(0).mean(1)  # [b, tokens, tokens], over layers and heads
        scene, column = self._place(state)
        steps = self.history_length + self.num_future
        count = int(column.max()) + 1
        looking = weights[scene, column * steps + self.history_length, : count * steps]
        return looking.reshape(len(looking), count, steps).sum(2)

    def errors(
        self, trajectory: Trajectory, action: Tensor | None = None, *, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean squared errors of tokens: of histories [n, T_h], futures [k] and future proprioception [b T_p].

        Of a trajectory's first frame, whose next `num_future` are the future, of slots that are there; in standard
        deviations of slots and of proprioception, of which there may be none, [0].
        """
        state, ahead = trajectory.frame(0), slice(1, self.num_future + 1)
        self.check(state, action)
        made, own = self.predicted(state, action, hidden=hidden)
        rows = made[self._place(state)]
        past = [state.history[:, -(self.history_length - 1) :]] if self.history_length > 1 else []
        wanted = torch.cat([*past, trajectory["slots"][: self.num_future + 1].transpose(0, 1)], 1)
        missed = (rows - self._scaled("slots", wanted)).square().mean(2)
        history, future = missed[:, : self.history_length], missed[:, self.history_length :][trajectory.active[ahead].T]
        if own is None:
            return history, future, future[:0]
        coming = self._scaled("proprioception", trajectory["proprioception"][ahead].transpose(0, 1))
        return history, future, (own[:, self.history_length :] - coming).square().mean(2).flatten()

    def predicted(
        self,
        state: State,
        action: Tensor | None = None,
        *,
        hidden: Tensor | None = None,
        kept: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return slots [b, m, T, s] of all tokens, m the largest scene's number, and proprioception [b, T, p].

        In standard deviations from the mean; T is history and future. `hidden` [n] are slots whose history after its
        first frame is masked. `kept` takes the weights of attention of each layer.
        """
        scene, column = self._place(state)
        past = [state.history[:, -(self.history_length - 1) :]] if self.history_length > 1 else []
        history = self._scaled("slots", torch.cat([*past, state.slots[:, None]], 1))
        there = dense(state.active, scene, column)
        slots = dense(history, scene, column)
        masked = torch.zeros_like(there) if hidden is None else dense(hidden, scene, column)
        tokens, bases = self._masked_tokens(slots, masked, self.embed, self.anchor)
        groups, further = [tokens.flatten(1, 2)], []
        if self.num_proprioception:
            own = self._past("proprioception", state.proprioception, state)[:, None]
            own_tokens, own_bases = self._masked_tokens(own, masked[:, :1] & False, self.embed_self, self.anchor_self)
            further.append(own_tokens[:, 0])
        if self.actions == "input":
            assert action is not None
            done = self._past("actions", action, state)
            further.append(self.embed_action(done) + self.time[: self.history_length])
        groups += further
        pairs = allowed_pairs(there, tokens.shape[2], sum(one.shape[1] for one in further), self.interactions)
        x = torch.cat(groups, 1)
        for layer in self.layers:
            x = layer(x, pairs, kept)
        x = self.norm(x)
        num = tokens.shape[1] * tokens.shape[2]
        made = self._read(self.decode(x[:, :num]).reshape(*tokens.shape[:3], -1), bases)
        if not self.num_proprioception:
            return made, None
        own_made = self.decode_self(x[:, num : num + tokens.shape[2]])
        return made, self._read(own_made, own_bases[:, 0])

    def _masked_tokens(
        self, slots: Tensor, masked: Tensor, embed: nn.Module, anchor: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """Return tokens [b, m, T, latent] of slots [b, m, T_h, s], and what readouts are added to, [b, m, T, s]."""
        first, ahead = slots[:, :, :1], self.num_future
        unseen = anchor(first) + self.mask + self.time  # identity and time, nothing else
        seen = embed(slots) + self.time[: self.history_length]
        later = torch.arange(self.history_length, device=slots.device) > 0
        masked = masked[:, :, None, None] & later[:, None]
        history = torch.where(masked, unseen[:, :, : self.history_length], seen)
        tokens = torch.cat([history, unseen[:, :, self.history_length :]], 2)
        latest = torch.where(masked[:, :, -1:], first, slots[:, :, -1:]).expand(-1, -1, ahead, -1)
        if self.readout == "motion" and self.history_length > 1:
            speed = torch.where(masked[:, :, -1:], 0.0, slots[:, :, -1:] - slots[:, :, -2:-1])
            latest = latest + torch.arange(1, ahead + 1, device=slots.device)[:, None] * speed
        return tokens, torch.cat([first.expand_as(slots), latest], 2)

    def _read(self, made: Tensor, bases: Tensor) -> Tensor:
        return made if self.readout == "slots" else bases + self.change_scale * made

    def _past(self, name: str, present: Tensor, state: State) -> Tensor:
        """Return [b, T_h, k]: a quantity of scenes at the frames of the history, the present one the last."""
        if self.history_length > 1:
            past = state[f"past_{name}"][:, -(self.history_length - 1) :]
            present = torch.cat([past, present[:, None]], 1)
        else:
            present = present[:, None]
        return self._scaled(name, present)

    def _place(self, state: State) -> tuple[Tensor, Tensor]:
        return state.derived("slot places", ("batch",), places)

    def _scaled(self, name: str, values: Tensor) -> Tensor:
        mean, std = (self.get_buffer(f"_{name}_{which}").to(values) for which in ("mean", "std"))
        return (values - mean) / std

    def _stds(self, state: State) -> list[Tensor]:
        return [self.get_buffer(f"_{name}_std").to(state.slots) for name in ("slots", "proprioception")]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the network computes."""
        return self.mask.dtype


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    for name, known in (("actions", get_args(Actions)), ("readout", get_args(Readout))):
        if arguments[name] not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}; got {arguments[name]!r}.")
    sizes = ("history_length", "num_future", "latent_size", "num_layers", "num_heads", "head_size", "feedforward_size")
    check_sizes(arguments, *sizes)
    if not 0 <= arguments["dropout"] < 1:
        raise ValueError(f"dropout must be from 0 to below 1; got {arguments['dropout']}.")
    if arguments["actions"] == "input" and arguments["num_future"] != 1:
        raise ValueError(
            f"Under actions only the next frame can be predicted, as later actions are not known: say num_future=1; "
            f"got {arguments['num_future']}."
        )
    statistics = arguments["statistics"]
    names = [f"{name}_{which}" for name in ("slots", "proprioception", "actions") for which in ("mean", "std")]
    missing = [name for name in (*names, "change") if name not in statistics]
    if missing:
        raise ValueError(f"statistics lack {', '.join(missing)}; compute them with CausalJEPA.measure(trajectories).")
    if not statistics["slots_mean"] or not math.isfinite(statistics["change"]):
        raise ValueError("statistics must be of slots of one number or more, and finite.")
    if arguments["actions"] == "input" and not statistics["actions_mean"]:
        raise ValueError("actions='input' needs trajectories with actions to measure; these had none.")
