"""Slot attention over films: from frames to slots, one for each thing seen, aligned over time.

Locatello et al. 2020, "Object-Centric Learning with Slot Attention", arXiv 2006.15055; carried from frame to frame
as in Kipf et al. 2022, "Conditional Object-Centric Learning from Video", arXiv 2111.12594; drawn in frames of reference
of the slots' own as in Biza et al. 2023, "Invariant Slot Attention", arXiv 2302.04973, of which shifts alone are here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from simworld.models.encoder import Encoder

TARGETS = ("pixels", "features")
STARTS = ("seeds", "colors", "random", "learned")
MOTIONS = ("none", "steady")
WIDTHS = (0.1, 0.2, 0.4)  # of half a frame: the bumps by which things are drawn about their place
FEATURES = 16  # channels of the features that may be reconstructed instead of pixels
CLAIM = 4.0  # by how much a slot goes before others at its place, in logits, at first
ENOUGH = 0.3  # of what stands out most: what stands out less starts no slot of its own
ENOUGH_EARLY = 0.2  # the same, of slots that take newcomers: who starts at frame 0 is not new later
CLOSE, AROUND = 0.12, 0.35  # of half a frame: from a seed to what starts none, and to what of its color starts none
BRIGHTER = 1.5  # times a seed's color, up to which a color is a shade of it
LITTLE = 1.0  # places: a slot that wins as many believes half of what it sees, at first
FEW = -2.0  # logarithm of the spread of contents at the start: places tell slots apart
NARROW = 20.0  # how narrowly slots look at first: by half less at 0.2 of half a frame from their place
NOBODY = -1.0  # at first, the logit by which places go to no slot
TINY = 1e-8  # attention that every place keeps, so that no slot is without any


class Corrector(nn.Module):
    """Slot attention: slots compete for the places of a feature map, and each is corrected by what it has won."""

    def __init__(self, feature_size: int, content_size: int, motion: str) -> None:
        super().__init__()
        self.inputs = nn.LayerNorm(feature_size)
        self.keys = nn.Linear(feature_size, content_size, bias=False)
        self.values = nn.Linear(feature_size, content_size, bias=False)
        self.norm = nn.LayerNorm(content_size)
        self.queries = nn.Linear(content_size, content_size, bias=False)
        self.narrow = nn.Linear(content_size, 1)
        nn.init.zeros_(self.narrow.weight)
        nn.init.constant_(self.narrow.bias, NARROW)
        self.nobody = nn.Parameter(torch.tensor(NOBODY))
        self.update = nn.GRUCell(content_size, content_size)
        self.refine = _two_layers(content_size)
        if motion == "steady":
            self.log_little = nn.Parameter(torch.tensor(LITTLE).log())
        self.motion = motion

    def look(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values [..., p, c] of features [..., p, f]."""
        features = self.inputs(features)
        keys: Tensor = self.keys(features)
        return keys * keys.shape[-1] ** -0.5, self.values(features)

    def forward(
        self, content: Tensor, places: Tensor, seen: tuple[Tensor, Tensor], grid: Tensor, num_iterations: int
    ) -> tuple[Tensor, Tensor]:
        """Return contents [b, k, c] and places [b, k, 2] after some rounds over keys and values at a grid [p, 2].

        A slot looks near its place, as narrowly as its content says; its new place is the mean of where it won. Under
        steady motion, one that has won little hardly moves towards there, and takes as little from there.
        """
        keys, values = seen
        for _ in range(num_iterations):
            normed = self.norm(content)
            away = (grid - places[:, :, None]).square().sum(-1)
            logits = self.queries(normed) @ keys.transpose(1, 2) - functional.softplus(self.narrow(normed)) * away
            nobody = self.nobody.expand(len(logits), 1, len(grid))
            attention = torch.cat([logits, nobody], 1).softmax(1)[:, :-1] + TINY
            won = attention.sum(2, keepdim=True)
            shares = attention / won
            taken, found = shares @ values, shares @ grid
            if self.motion == "steady":
                trust = won / (won + self.log_little.exp())
                taken, found = trust * taken, places + trust * (found - places)
            content = self.update(taken.flatten(0, 1), content.flatten(0, 1)).view_as(content)
            content, places = content + self.refine(content), found
        return content, places


class Predictor(nn.Module):
    """Where the slots of the next frame start from: self-attention among slots, none of which has a number."""

    def __init__(self, content_size: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(content_size)
        self.among = nn.MultiheadAttention(content_size, num_heads, batch_first=True)
        self.refine = _two_layers(content_size)
        self.bound = nn.LayerNorm(content_size)  # else what is added frame by frame grows beyond what clips have shown
        nn.init.zeros_(self.among.out_proj.weight)  # at first, slots stay what they are

    def forward(self, slots: Tensor) -> Tensor:
        """Return slots [b, k, c] to start the next frame with."""
        normed = self.norm(slots)
        slots = slots + self.among(normed, normed, normed, need_weights=False)[0]
        made: Tensor = self.bound(slots + self.refine(slots))
        return made


def _two_layers(size: int) -> nn.Sequential:
    last = nn.Linear(2 * size, size)
    return nn.Sequential(nn.LayerNorm(size), nn.Linear(size, 2 * size), nn.ReLU(), last)


class SlotAttention(Encoder):
    """An encoder of square films: recurrent slot attention, trained to show each film again from its slots.

    A slot [slot_size] is what its thing is like (all but two numbers) and where its attention lies (the last two: x to
    the right and y downwards, -1 to 1 over the frame). Convolutions see the frame at half its size and make a map of
    a quarter of it; the decoder draws each slot at `num_cells`^2 places, relative to where the slot lies, with an
    alpha; alphas compete over slots. So a thing looks alike wherever it is.

    `reconstruct="pixels"` shows the halved frames again, `"features"` what a fixed random network of two convolutions
    (drawn from `feature_seed`) makes of them, each channel scaled by its spread over the training films, which
    `statistics` tell. `initial="seeds"` starts slots of frame 0 at what stands out most from the frame's median color,
    one after the other, which suits plain backgrounds; `"colors"` does so too, but beside a seed another starts only
    where the color is no shade of the seed's, nor a blend of that with the median. `"random"` draws starts from a
    learned Gaussian at places drawn evenly; then order has no meaning, and permuted draws give permuted slots.
    `"learned"` starts each from its own.

    With `motion="steady"` slots go on from frame to frame as they went, and those that win little of a frame keep to
    that course: what is hidden for a while is looked for where it would come out. With `"none"` they begin where they
    were. With `newcomers`, which goes with `"colors"`, a slot that has started on the background alone starts anew at
    what stands out in a later frame and is no shade of the slots near it: what was hidden, or was not there.

    The loss is of `num_drawn` frames of each clip, drawn at random, or of all, if it is 0.

    Raises:
        ValueError: sizes do not fit each other, or a choice is not known.
    """

    feature_mean: Tensor
    feature_std: Tensor
    first_filter: Tensor
    second_filter: Tensor
    seen_grid: Tensor
    drawn_grid: Tensor

    def __init__(
        self,
        *,
        dt: float = 0.1,
        num_slots: int = 7,
        slot_size: int = 50,
        image_size: int = 64,
        num_channels: int = 32,
        decoder_size: int = 48,
        num_cells: int = 8,
        num_heads: int = 4,
        initial: str = "seeds",
        motion: str = "none",
        newcomers: bool = False,
        num_drawn: int = 0,
        reconstruct: str = "pixels",
        first_iterations: int = 3,
        later_iterations: int = 1,
        feature_seed: int = 0,
        statistics: dict[str, list[float]] | None = None,
    ) -> None:
        given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        _check_arguments(given)
        super().__init__(dt=dt, image_size=image_size, num_slots=num_slots, arguments=given)
        self.slot_size = slot_size
        self.initial, self.motion, self.reconstruct = initial, motion, reconstruct
        self.newcomers = newcomers
        self.num_drawn = num_drawn
        self.first_iterations, self.later_iterations = first_iterations, later_iterations
        self.num_cells, content = num_cells, slot_size - 2
        self.trunk = _trunk(num_channels)
        self.mix = nn.Sequential(
            nn.LayerNorm(num_channels),
            nn.Linear(num_channels, 2 * num_channels),
            nn.ReLU(),
            nn.Linear(2 * num_channels, 2 * num_channels),
        )
        self.corrector = Corrector(2 * num_channels, content, motion)
        self.predictor = Predictor(content, num_heads)
        if motion == "steady":
            self.turn = nn.Parameter(torch.zeros(()))
        if initial == "random":
            self.start_mean = nn.Parameter(torch.randn(content) * content**-0.5)
            self.start_log_std = nn.Parameter(torch.full((content,), FEW))
        elif initial in ("seeds", "colors"):
            self.from_color = nn.Linear(3, content)
        else:
            self.start = nn.Parameter(torch.cat([torch.randn(num_slots, content), 2 * torch.rand(num_slots, 2) - 1], 1))
        self.channels = 3 if reconstruct == "pixels" else FEATURES
        self.patch = image_size // (2 if reconstruct == "pixels" else 4) // num_cells
        self.claim = nn.Parameter(torch.tensor(CLAIM))
        self.from_content = nn.Linear(content, decoder_size)
        self.from_place = nn.Linear(len(WIDTHS) + 2, decoder_size, bias=False)
        middle = nn.Linear(decoder_size, decoder_size)
        last = nn.Linear(decoder_size, (self.channels + 1) * self.patch**2)
        nn.init.zeros_(last.weight)  # at first, slots draw alike, each about its place
        nn.init.zeros_(last.bias)
        self.decoder = nn.Sequential(nn.ReLU(), middle, nn.ReLU(), last)
        self._fix(feature_seed, statistics)

    def _fix(self, feature_seed: int, statistics: dict[str, list[float]] | None) -> None:
        """Keep what is not learned: grids, and the random network whose features may be shown."""
        self.register_buffer("seen_grid", _grid(self.image_size // 4), persistent=False)
        self.register_buffer("drawn_grid", _grid(self.num_cells), persistent=False)
        if self.reconstruct == "features":
            drawn = torch.Generator().manual_seed(feature_seed)
            for name, shape in (("first_filter", (FEATURES, 3, 5, 5)), ("second_filter", (FEATURES, FEATURES, 3, 3))):
                weights = torch.randn(shape, generator=drawn) / (shape[1] * shape[2] * shape[3]) ** 0.5
                self.register_buffer(name, weights, persistent=False)
            said = statistics or {"mean": [0.0] * FEATURES, "std": [1.0] * FEATURES}
            for name in ("mean", "std"):
                self.register_buffer(f"feature_{name}", torch.tensor(said[name]).view(-1, 1, 1), persistent=False)

    def start_slots(self, frames: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return slots [b, k, s] that prepared films [b, T, 3, h, w] start from; a random start needs a generator.

        Raises:
            ValueError: the start is random and there is no generator.
        """
        if self.initial == "learned":
            return self.start.expand(len(frames), -1, -1)
        if self.initial in ("seeds", "colors"):
            colors, places, _ = self._seeds(frames[:, 0])
            return torch.cat([self.from_color(colors), places], 2)
        if generator is None:
            raise ValueError("Slots of this encoder start at random; give a torch.Generator.")
        shape, where = (len(frames), self.num_slots), generator.device
        noise = torch.randn(*shape, self.slot_size - 2, generator=generator, device=where).to(self.start_mean)
        places = (2 * torch.rand(*shape, 2, generator=generator, device=where) - 1).to(self.start_mean)
        return torch.cat([self.start_mean + self.start_log_std.exp() * noise, places], 2)

    def _seeds(self, frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hide = _shade if self.initial == "colors" else _nearness
        return _seeds(frame, self.seen_grid, self.num_slots, hide, ENOUGH_EARLY if self.newcomers else ENOUGH)

    def forward(self, frames: Tensor, start: Tensor) -> Tensor:
        """Return slots [b, T, k, s] of prepared frames [b, T, 3, h, w], from the slots [b, k, s] that they start at."""
        count, length = frames.shape[:2]
        seen = self.trunk(frames.flatten(0, 1)).flatten(2).transpose(1, 2)
        features = self.mix(seen).view(count, length, len(self.seen_grid), -1)
        keys, values = self.corrector.look(features)
        slots, content, places = [], start[..., :-2], start[..., -2:]
        moved = torch.zeros_like(places)
        if self.newcomers:
            colors, _, started = self._seeds(frames[:, 0])
        for t in range(length):
            rounds = self.first_iterations if t == 0 else self.later_iterations
            ahead = places if self.motion == "none" else (places + moved).clamp(-1, 1)
            if self.newcomers and t > 0:
                new, color, place = _newcomers(frames[:, t], self.seen_grid, colors, ahead.detach(), started)
                colors, started = torch.where(new, color, colors), started | new[..., 0]
                content = torch.where(new, self.from_color(color), content)
                ahead, moved = torch.where(new, place, ahead), torch.where(new, 0.0, moved)
            content, places = self.corrector(content, ahead, (keys[:, t], values[:, t]), self.seen_grid, rounds)
            if self.motion == "steady" and t > 0:  # places of frame 0 come from wherever a slot started
                moved = moved + self.turn.sigmoid() * (places - ahead)
            slots.append(torch.cat([content, places], -1))
            content = self.predictor(content)
        return torch.stack(slots, 1)

    def decode(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Return what each slot of [..., k, s] draws, [..., k, channels, h, w], and its alphas [..., k, h, w]."""
        # Far away all looks alike, so a slot draws one thing near its place, or what is everywhere.
        apart = self.drawn_grid - slots[..., None, -2:]
        bumps = [(-apart.square().sum(-1, keepdim=True) / (2 * width**2)).exp() for width in WIDTHS]
        near = torch.cat([*bumps, apart / WIDTHS[-1] * bumps[-1]], -1)
        hidden = self.from_content(slots[..., :-2])[..., None, :] + self.from_place(near)
        cells, patch = self.num_cells, self.patch
        drawn = self.decoder(hidden).view(-1, cells, cells, self.channels + 1, patch, patch)
        drawn = drawn.permute(0, 3, 1, 4, 2, 5).reshape(*slots.shape[:-1], -1, cells * patch, cells * patch)
        claims = (self.claim * bumps[1]).view(*slots.shape[:-1], cells, cells)
        claims = claims.repeat_interleave(patch, -1).repeat_interleave(patch, -2)
        return drawn[..., :-1, :, :], (drawn[..., -1, :, :] + claims).softmax(-3)

    def shown_again(self, slots: Tensor) -> Tensor:
        """Return what slots [..., k, s] show together, [..., channels, h, w]."""
        drawn, alphas = self.decode(slots)
        return (drawn * alphas[..., None, :, :]).sum(-4)

    def aim(self, frames: Tensor) -> Tensor:
        """Return what slots are to show of prepared frames [..., 3, h, w]: these, or features of them."""
        if self.reconstruct == "pixels":
            return frames
        return (self.random_features(frames) - self.feature_mean) / self.feature_std

    def random_features(self, frames: Tensor) -> Tensor:
        """Return features [..., 16, h/2, w/2] of prepared frames, before they are scaled."""
        flat = functional.conv2d(frames.flatten(0, -4), self.first_filter, stride=2, padding=2).relu()
        made = functional.conv2d(flat, self.second_filter, padding=1)
        return made.view(*frames.shape[:-3], *made.shape[1:])

    def loss(self, rgb: Tensor, generator: torch.Generator) -> Tensor:
        """Return the mean squared error of films [b, T, h, w, 3] shown again, in units of -1 to 1 or of a spread."""
        frames = self.prepare(rgb)
        slots = self(frames, self.start_slots(frames, generator))
        if 0 < self.num_drawn < frames.shape[1]:
            drawn = torch.rand(frames.shape[:2], generator=generator).argsort(1)[:, : self.num_drawn]
            rows = torch.arange(len(frames))[:, None]
            slots, frames = slots[rows, drawn], frames[rows, drawn]
        return (self.shown_again(slots) - self.aim(frames)).square().mean()

    @torch.no_grad()
    def owners(self, slots: Tensor) -> Tensor:
        """Return which slot of [T, k, s] each pixel of the film belongs to, uint8 [T, h, w]: the one of largest alpha.

        Alphas are drawn at half the size or less, and interpolated.
        """
        _, alphas = self.decode(slots)
        size = (self.image_size, self.image_size)
        return functional.interpolate(alphas, size, mode="bilinear").argmax(1).to(torch.uint8)

    @torch.no_grad()
    def slots(self, rgb: Tensor, seed: int) -> Tensor:
        """Return the slots [T, k, s] of a film [T, h, w, 3], aligned over time; a random start is drawn from `seed`."""
        frames = self.prepare(rgb)
        found: Tensor = self(frames[None], self.start_slots(frames[None], torch.Generator().manual_seed(seed)))[0]
        return found

    @staticmethod
    def measure_films(films: Sequence[Tensor], **arguments: Any) -> dict[str, list[float]] | None:
        """Return the `statistics` of films [T, h, w, 3] for these arguments: none are needed to show pixels again."""
        if arguments.get("reconstruct", "pixels") == "pixels":
            return None
        model = SlotAttention(**arguments)
        made = torch.cat([model.random_features(model.prepare(film)) for film in films])
        mean, std = made.mean((0, 2, 3)), made.std((0, 2, 3)).clamp(min=1e-6)
        return {"mean": mean.tolist(), "std": std.tolist()}


def _trunk(channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, channels, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
    )


def _seeds(
    frame: Tensor,
    grid: Tensor,
    count: int,
    hide: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    share: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return colors and places [b, count, .] of what stands out most in a frame, one after the other, and who does.

    What stands out is unlike the median color; a seed hides by shares `hide` what may start no other. When nothing is
    left that stands out by a `share` of the first, seeds are of the median color, in the corners.
    """
    cells, middle, left = _standing_out(frame)
    enough, rows = share * left.amax(1), torch.arange(len(frame))
    corners = grid.new_tensor([[-1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]])
    colors, places, started = [], [], []
    for number in range(count):
        most, best = left.max(1)
        found = (most > enough)[:, None]
        colors.append(torch.where(found, cells[rows, best], middle[:, 0]))
        places.append(torch.where(found, grid[best], corners[number % 4]))
        started.append(found[:, 0])
        away = (grid - grid[best][:, None]).square().sum(2)
        left = left * (1 - hide(away, cells, cells[rows, best][:, None], middle))
    return torch.stack(colors, 1), torch.stack(places, 1), torch.stack(started, 1)


def _standing_out(frame: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the cells [b, p, 3] of frames [b, 3, h, w], their median [b, 1, 3] and how unlike it each is, [b, p]."""
    cells = functional.avg_pool2d(frame, 2).flatten(2).transpose(1, 2)
    middle = cells.median(1, keepdim=True).values
    return cells, middle, (cells - middle).norm(dim=2)


def _newcomers(
    frame: Tensor, grid: Tensor, colors: Tensor, places: Tensor, started: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return which slot [b, k, 1] starts anew in a frame [b, 3, h, w], if any, with what color and where.

    That is at what stands out most when each slot that has `started` [b, k] hides its shades at its place: `colors` and
    `places` are [b, k, .]. The slot is the first that has not.
    """
    cells, middle, left = _standing_out(frame)
    enough, rows = ENOUGH * left.amax(1), torch.arange(len(frame))
    for color, place, there in zip(colors.unbind(1), places.unbind(1), started.unbind(1), strict=True):
        away = (grid - place[:, None]).square().sum(2)
        left = left * (1 - there[:, None] * _shade(away, cells, color[:, None], middle))
    most, best = left.max(1)
    first = functional.one_hot((~started).long().argmax(1), started.shape[1]).bool()
    new = first & ~started & (most > enough)[:, None]
    return new[..., None], cells[rows, best][:, None], grid[best][:, None]


def _nearness(away: Tensor, cells: Tensor, seed: Tensor, middle: Tensor) -> Tensor:
    """Return shares [b, p] by which a seed hides cells at squared distances `away`, whatever their color."""
    return (-away / (2 * WIDTHS[1] ** 2)).exp()


def _shade(away: Tensor, cells: Tensor, seed: Tensor, middle: Tensor) -> Tensor:
    """Return shares [b, p] by which a seed hides cells: those close to it, and around it those of its own color.

    Its color's own are its shades and its blends with the `middle`, as far as either explains how a cell [b, p, 3]
    differs from the middle; -1 is black.
    """
    apart = cells - middle
    unlike = torch.minimum(_beside(apart, seed - middle), _beside(cells + 1, seed + 1))
    like = (1 - unlike / apart.norm(dim=2).clamp(min=TINY)).clamp(min=0)
    return torch.maximum((-away / (2 * CLOSE**2)).exp(), like * (-away / (2 * AROUND**2)).exp())


def _beside(vectors: Tensor, along: Tensor) -> Tensor:
    """Return how far vectors [b, p, 3] end from what 0 to `BRIGHTER` times another [b, 1, 3] reaches, [b, p]."""
    shares = (vectors * along).sum(2, keepdim=True) / along.square().sum(2, keepdim=True).clamp(min=TINY)
    missed: Tensor = (vectors - shares.clamp(0, BRIGHTER) * along).norm(dim=2)
    return missed


def _grid(size: int) -> Tensor:
    """Return the centres (x, y) [size^2, 2] of cells, row by row, -1 to 1."""
    along = (torch.arange(size) + 0.5) / size * 2 - 1
    rows, columns = torch.meshgrid(along, along, indexing="ij")
    return torch.stack([columns, rows], -1).flatten(0, 1)


def _check_arguments(given: dict[str, Any]) -> None:
    for name, known in (("initial", STARTS), ("motion", MOTIONS), ("reconstruct", TARGETS)):
        if given[name] not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}; got {given[name]!r}.")
    if given["newcomers"] and given["initial"] != "colors":
        raise ValueError(f"newcomers are told by their colors; set initial = 'colors', not {given['initial']!r}.")
    if given["num_drawn"] < 0:
        raise ValueError(f"num_drawn must be 0 (all frames of a clip) or more; got {given['num_drawn']}.")
    free = ("feature_seed", "num_drawn", "newcomers")
    whole = [k for k, v in given.items() if isinstance(v, int) and k not in free and v < 1]
    if whole:
        raise ValueError(f"{whole[0]} must be 1 or more; got {given[whole[0]]}.")
    size, cells, heads = given["image_size"], given["num_cells"], given["num_heads"]
    coarsest = cells * (2 if given["reconstruct"] == "pixels" else 4)
    if size % 4 or size % coarsest:
        raise ValueError(f"image_size must be a multiple of 4 and of {coarsest}, for {cells} cells; got {size}.")
    if given["slot_size"] < 3 or (given["slot_size"] - 2) % heads:
        raise ValueError(f"slot_size must be 2 above a multiple of num_heads={heads}; got {given['slot_size']}.")
