"""States of a physical system as immutable values.

Every field of a state is declared once, by a `Field`: its unit, the shape of one row, what a row
belongs to and whether it may change in time. Batching, trajectories, files, interventions and display
read that declaration, so a new kind of state, or a user's own quantity, needs no further code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

import torch
from torch import Tensor

from simworld.fields import Field, check_values

if TYPE_CHECKING:
    from simworld.simulate import Simulator

T = TypeVar("T")


class State:
    """A frozen set of declared tensors that describe one or more scenes at one instant.

    Entities of all scenes lie in one flat axis; `batch` [n] int64, sorted, says which scene each belongs
    to. `active` [n] bool marks entities that take part: an inactive one neither acts nor moves.
    `simulator` is what `rollout` steps the state with unless told otherwise; it is a reference, not part
    of the value: files and comparisons leave it out.

    Values are checked here, at construction, so that no step need check them again.

    Raises:
        ValueError: a field is unknown or missing, has the wrong shape, or holds NaN or infinity; `batch`
            is unsorted; an index points outside its scene.
        TypeError: a value is not a tensor or has the wrong dtype.
    """

    fields: ClassVar[Mapping[str, Field]] = MappingProxyType({})
    batch: Tensor
    active: Tensor
    num_scenes: int
    simulator: Simulator | None
    _values: dict[str, Tensor]
    _derived: dict[str, tuple[tuple[Tensor | None, ...], Any]]

    def __init__(
        self,
        *,
        batch: Tensor | None = None,
        active: Tensor | None = None,
        simulator: Simulator | None = None,
        **values: Tensor,
    ) -> None:
        if type(self).fields is State.fields:
            raise TypeError("State is abstract; make an ObjectState or another kind with fields.")
        _check_names(type(self), values)
        for name, value in values.items():
            _check_dtype(type(self), name, value)
        first = next((v for k, v in values.items() if self.fields[k].per == "entity"), None)
        if first is None or first.ndim == 0:
            raise ValueError(f"{type(self).__name__} needs at least one field per entity with a row for each entity.")
        num = first.shape[0]
        batch = torch.zeros(num, dtype=torch.long, device=first.device) if batch is None else batch
        active = torch.ones(num, dtype=torch.bool, device=first.device) if active is None else active
        self._set(values, batch, active, _count_scenes(batch, num), simulator)
        _check_flags(self)
        for name in values:
            _check_shape(self, name)
            _check_numbers(self, name)

    def _set(
        self,
        values: dict[str, Tensor],
        batch: Tensor,
        active: Tensor,
        num_scenes: int,
        simulator: Simulator | None,
        derived: dict[str, tuple[tuple[Tensor | None, ...], Any]] | None = None,
    ) -> None:
        for name, value in (
            ("_values", values),
            ("batch", batch),
            ("active", active),
            ("num_scenes", num_scenes),
            ("simulator", simulator),
            ("_derived", {} if derived is None else derived),
        ):
            object.__setattr__(self, name, value)

    def _like(self, values: dict[str, Tensor], **changes: Any) -> Self:
        """Return a state of this kind without checking: for values derived from checked ones."""
        made = object.__new__(type(self))
        regrouped = "batch" in changes
        made._set(
            values,
            changes.get("batch", self.batch),
            changes.get("active", self.active),
            changes.get("num_scenes", self.num_scenes),
            changes.get("simulator", self.simulator),
            None if regrouped else self._derived,
        )
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_derived": {}}  # factors of matrices and the like, which other processes make anew

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"States are frozen: use state.replace({name}=...) to make a changed one.")

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._values:
            return self._values[name]
        if name in self.fields:
            raise AttributeError(
                f"This {type(self).__name__} carries no {name}; give it with state.replace({name}=...)."
            )
        raise AttributeError(f"{type(self).__name__} has no field '{name}'; its fields are {', '.join(self.fields)}.")

    def __getitem__(self, name: str) -> Tensor:
        """Return the field called `name`, as `state.name` does."""
        if name not in self._values:
            raise KeyError(f"This {type(self).__name__} carries no '{name}'; it carries {', '.join(self._values)}.")
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return self.num_entities

    def __repr__(self) -> str:
        sizes = ", ".join(f"{k} {list(v.shape)} {self.fields[k].unit}" for k, v in self._values.items())
        return f"{type(self).__name__}({self.num_entities} entities, {self.num_scenes} scenes: {sizes})"

    def derived(self, name: str, sources: Sequence[str], make: Callable[[State], T]) -> T:
        """Return `make(self)`, computed anew only when one of the fields it is made from was replaced.

        States are values, so what follows from static fields holds for a whole rollout. `name` tells apart
        what is derived; `sources` may name fields that the state does not carry, "batch" and "active". Nothing
        is kept of sources that ask for a gradient.
        """
        named = {**self._values, "batch": self.batch, "active": self.active}
        tensors = tuple(named.get(source) for source in sources)
        known = self._derived.get(name)
        if known is not None and all(a is b for a, b in zip(known[0], tensors, strict=True)):
            return cast(T, known[1])
        value = make(self)
        if not any(source is not None and source.requires_grad for source in tensors):
            self._derived[name] = (tensors, value)
        return value

    @property
    def num_entities(self) -> int:
        """Number of entities in all scenes, active or not."""
        return int(self.batch.shape[0])

    @property
    def device(self) -> torch.device:
        """Device of the state's tensors."""
        return self.batch.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers that may change in time, or of all, if none may."""
        names = (*self.dynamic_fields, *self._values)
        return next((self[name].dtype for name in names if self[name].is_floating_point()), torch.get_default_dtype())

    @property
    def free(self) -> Tensor:
        """Which entities [n] a simulator moves: active and, where the state says so, neither fixed nor kinematic."""
        free = self.active
        for name in ("fixed", "kinematic"):
            free = free & ~self[name] if name in self else free
        return free

    @property
    def moving_fields(self) -> tuple[str, ...]:
        """Names of the fields carried here that may change in time and have a row per entity."""
        return tuple(name for name in self.dynamic_fields if self.fields[name].per == "entity")

    @property
    def dynamic_fields(self) -> tuple[str, ...]:
        """Names of the fields carried here that may change in time; `past_fields` follow from them."""
        return tuple(k for k in self._values if not self.fields[k].static and not self.fields[k].past_of)

    @property
    def past_fields(self) -> tuple[str, ...]:
        """Names of the fields carried here that hold what others were at the instants before."""
        return tuple(name for name in self._values if self.fields[name].past_of)

    @property
    def static_fields(self) -> tuple[str, ...]:
        """Names of the fields carried here that are constant in time."""
        return tuple(name for name in self._values if self.fields[name].static)

    @classmethod
    def with_fields(cls, **fields: Field) -> type[Self]:
        """Return a kind of state with further fields, whose declarations travel in its files."""
        taken = sorted(fields.keys() & {*cls.fields, "batch", "active", "simulator", "num_scenes", "fields"})
        if taken:
            raise ValueError(f"{cls.__name__} already has {', '.join(taken)}; choose other names for the new fields.")
        return cast(type[Self], type(cls.__name__, (cls,), {"fields": MappingProxyType({**cls.fields, **fields})}))

    @classmethod
    def with_units(cls, **units: str) -> type[Self]:
        """Return this kind of state with some fields in other units, as a recording in pixels needs."""
        _check_names(cls, units, complete=False)
        fields = {name: replace(field, unit=units.get(name, field.unit)) for name, field in cls.fields.items()}
        return cast(type[Self], type(cls.__name__, (cls,), {"fields": MappingProxyType(fields)}))

    def replace(self, *, active: Tensor | None = None, **changes: Tensor) -> Self:
        """Return this state with some fields changed; shapes and dtypes are checked.

        Entities cannot be added or taken away; `active` removes them without changing shapes.
        """
        _check_names(type(self), changes, complete=False)
        made = self._like({**self._values, **changes}, active=self.active if active is None else active)
        if active is not None:
            _check_flags(made)
        for name, value in changes.items():
            _check_dtype(type(self), name, value)
        spatial = any("d" in self.fields[name].shape for name in changes)
        for name, field in self.fields.items():
            if name in made and (name in changes or field.per in changes or (spatial and "d" in field.shape)):
                _check_shape(made, name)
            if name in changes and field.static:
                _check_numbers(made, name)
        return made

    def advanced(self, **changes: Tensor) -> Self:
        """Return the state one step on: some fields changed, and what they were put at the end of their past."""
        for name in self.past_fields:
            present = self[self.fields[name].past_of]
            changes[name] = torch.cat([self[name][:, 1:], present[:, None]], 1) if self[name].shape[1] else self[name]
        return self.replace(**changes)

    def using(self, simulator: Simulator | None) -> Self:
        """Return this state tied to a simulator, so that `rollout(state, actions)` needs no other."""
        return self._like(self._values, simulator=simulator)

    def to(self, *args: Any) -> Self:
        """Return this state on another device, or with its floating-point fields in another dtype."""
        values = {name: cast_tensor(value, *args) for name, value in self._values.items()}
        device = next(iter(values.values())).device
        return self._like(values, batch=self.batch.to(device), active=self.active.to(device))

    def repeat(self, count: int) -> Self:
        """Return `count` copies of every scene: copy 0 of all scenes, then copy 1, and so on."""
        return type(self).cat([self] * count)

    @classmethod
    def cat(cls, states: Sequence[Self]) -> Self:
        """Return one state with the scenes of all `states`, in order, tied to the simulator of the first.

        Raises:
            ValueError: there are none, or they do not carry the same fields in the same widths.
        """
        if not states:
            raise ValueError("State.cat needs at least one state, got none.")
        names = set(states[0])
        for state in states:
            if set(state) != names or state.fields != states[0].fields:
                raise ValueError(f"States to join must carry the same fields: got {sorted(names)} and {sorted(state)}.")
            for name in names:
                if state[name].shape[1:] != states[0][name].shape[1:]:
                    shapes = " and ".join(str(list(one[name].shape)) for one in (states[0], state))
                    raise ValueError(f"States to join must be alike but in their numbers of rows: {name} are {shapes}.")
        return states[0]._like(
            {name: cat_rows(states, name, [s[name] for s in states]) for name in states[0]},
            batch=torch.cat(
                [s.batch + k for s, k in zip(states, _offsets([s.num_scenes for s in states]), strict=True)]
            ),
            active=torch.cat([s.active for s in states]),
            num_scenes=sum(s.num_scenes for s in states),
        )

    def scene(self, number: int) -> Self:
        """Return one scene as a state of its own."""
        if not 0 <= number < self.num_scenes:
            raise IndexError(f"The state has {self.num_scenes} scenes, 0 to {self.num_scenes - 1}; got {number}.")
        here = rows_between(self.batch, number)
        values = {name: value[self.rows_of(name, number, here)] for name, value in self._values.items()}
        values = {k: v - here.start if self.fields[k].per == "index" else v for k, v in values.items()}
        return self._like(values, batch=self.batch[here] - number, active=self.active[here], num_scenes=1)

    def rows_of(self, name: str, scene: int, here: slice) -> slice | Tensor:
        """Return which rows of a field belong to a scene, whose entities are `here`."""
        per = self.fields[name].per
        if per == "entity":
            return here
        if per == "scene":
            return slice(scene, scene + 1)
        first = self[name if per == "index" else per][:, 0]
        return torch.logical_and(first >= here.start, first < here.stop)

    def identical(self, other: State) -> bool:
        """Return whether both states hold the same fields with the same values, bit for bit."""
        return (
            self.fields == other.fields
            and set(self) == set(other)
            and torch.equal(self.batch, other.batch)
            and torch.equal(self.active, other.active)
            and all(self[k].dtype == other[k].dtype and torch.equal(self[k], other[k]) for k in self)
        )


def cast_tensor(value: Tensor, *args: Any) -> Tensor:
    """Return a tensor elsewhere or in another dtype, as `Tensor.to` does, but integers and flags as they are."""
    return value.to(*args) if value.is_floating_point() else value.to(value.to(*args).device)


def rows_between(batch: Tensor, scene: int) -> slice:
    """Return which rows of a sorted `batch` belong to a scene, as a slice."""
    edges = torch.searchsorted(batch, torch.tensor([scene, scene + 1], device=batch.device))
    return slice(int(edges[0]), int(edges[1]))


def cat_rows(states: Sequence[State], name: str, values: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Return one field of several states joined, entity numbers shifted to where the entities went."""
    if states[0].fields[name].per == "index":
        shifts = _offsets([s.num_entities for s in states])
        values = [v + k for v, k in zip(values, shifts, strict=True)]
    return torch.cat(list(values), dim=dim)


def _offsets(sizes: Sequence[int]) -> list[int]:
    return [0, *accumulate(sizes)][:-1]


def _count_scenes(batch: Tensor, num: int) -> int:
    if not isinstance(batch, Tensor):
        raise TypeError(f"batch must be a torch.Tensor; got {type(batch).__name__}.")
    if num == 0:
        raise ValueError("A state needs at least one entity; got none.")
    if batch.shape != (num,) or batch.dtype != torch.long:
        raise ValueError(f"batch must be int64 of shape [{num}]; got {batch.dtype} {list(batch.shape)}.")
    steps = batch.diff()
    if bool(((steps < 0) | (steps > 1)).any()) or int(batch[0]) != 0:
        raise ValueError(
            "batch must be sorted and number the scenes from 0 without gaps; sort entities by scene and number anew."
        )
    return int(batch[-1]) + 1


def _check_names(kind: type[State], values: Mapping[str, object], complete: bool = True) -> None:
    unknown = [name for name in values if name not in kind.fields]
    if unknown:
        raise ValueError(
            f"{kind.__name__} has no field {', '.join(map(repr, unknown))}; it has {', '.join(kind.fields)}. "
            f"Declare further ones with {kind.__name__}.with_fields."
        )
    if not complete:
        return
    missing = [name for name, field in kind.fields.items() if field.required and name not in values]
    if missing:
        raise ValueError(f"{kind.__name__} needs {', '.join(missing)}; got {', '.join(values) or 'nothing'}.")


def _check_dtype(kind: type[State], name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}. Use torch.as_tensor.")
    wanted = kind.fields[name].kind
    right = {"float": value.is_floating_point(), "int": value.dtype == torch.long, "bool": value.dtype == torch.bool}
    if not right[wanted]:
        way = {"float": ".float()", "int": ".long()", "bool": ".bool()"}[wanted]
        raise TypeError(f"{name} must hold {wanted} values; got {value.dtype}. Convert it with {way}.")


def _num_rows(state: State, name: str) -> int | None:
    per = state.fields[name].per
    if per == "index":
        return None
    if per in ("entity", "scene"):
        return state.num_entities if per == "entity" else state.num_scenes
    if per not in state:
        raise ValueError(f"{name} has a row for each of {per}, which this state does not carry; give {per} too.")
    return int(state[per].shape[0])


def _check_shape(state: State, name: str) -> None:
    field, value, rows = state.fields[name], state[name], _num_rows(state, name)
    sizes: dict[str, int] = {}
    if "d" in field.shape:
        spatial = (state[k] for k, f in state.fields.items() if "d" in f.shape and k in state)
        sizes |= next(({"d": int(one.shape[-1])} for one in spatial if one.ndim > len(field.shape)), {})
    wanted: list[int | str] = [rows if rows is not None else "m"]
    wanted += [sizes.get(s, s) if isinstance(s, str) else s for s in field.shape]
    got = list(value.shape)
    if len(got) != len(wanted) or any(isinstance(w, int) and w != g for w, g in zip(wanted, got, strict=True)):
        raise ValueError(f"{name} must have shape [{', '.join(map(str, wanted))}] ({_meaning(field)}); got {got}.")


def _meaning(field: Field) -> str:
    return {"entity": "a row per entity", "scene": "a row per scene", "index": "rows of entity numbers"}.get(
        field.per, f"a row for each of {field.per}"
    )


def _check_numbers(state: State, name: str) -> None:
    field, value = state.fields[name], state[name]
    check_values(field, name, value)
    if field.per == "index" and value.numel():
        if int(value.min()) < 0 or int(value.max()) >= state.num_entities:
            raise ValueError(
                f"{name} must hold entity numbers from 0 to {state.num_entities - 1}; "
                f"got {int(value.min())} to {int(value.max())}."
            )
        scenes = state.batch[value]
        if bool((scenes != scenes[:, :1]).any()):
            raise ValueError(f"{name} joins entities of different scenes; each row must stay within one scene.")


def _check_flags(state: State) -> None:
    active = state.active
    if not isinstance(active, Tensor):
        raise TypeError(f"active must be a torch.Tensor; got {type(active).__name__}.")
    if active.dtype != torch.bool or active.shape != state.batch.shape:
        raise ValueError(
            f"active must be bool of shape [{state.num_entities}]; got {active.dtype} {list(active.shape)}."
        )
