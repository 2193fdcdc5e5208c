"""The contract that every simulator must keep, to be called from tests: ours and users' own.

from simworld.testing import check_simulator
check_simulator(my_simulator, state, actions)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from simworld.fields import Field
from simworld.intervene import do
from simworld.simulate import Simulator, rollout
from simworld.state import State


def check_simulator(
    simulator: Simulator,
    state: State,
    actions: Tensor | None = None,
    *,
    tolerance: float = 1e-4,
    order_matters: bool = False,
) -> None:
    """Raise an AssertionError that names the first promise which a simulator breaks on `state`.

    `actions` [T, n, a] has at least 6 steps (six steps without actions, if None). `tolerance` is how far
    results may differ, relative to their largest value, where only the order of summation differs; the
    rest must agree bit for bit. Engines that solve contacts in the order of entities say `order_matters`.
    """
    if actions is not None and len(actions) < 6:
        raise ValueError(f"check_simulator needs actions for 6 steps; got {len(actions)}.")
    with torch.no_grad():
        check_leaves_input_alone(simulator, state, actions)
        check_splits(simulator, state, actions)
        check_batch(simulator, state, actions, tolerance)
        if not order_matters:
            check_order(simulator, state, actions, tolerance)
        check_true_value(simulator, state, actions)
        check_past(simulator, state, actions)
        check_inactive(simulator, state, actions, tolerance)


def check_leaves_input_alone(simulator: Simulator, state: State, actions: Tensor | None) -> None:
    """A step changes nothing in the state and the action it is given."""
    action = _first(actions)
    before = {name: state[name].clone() for name in state}
    given = None if action is None else action.clone()
    simulator.step(state, action)
    for name, value in before.items():
        assert torch.equal(state[name], value), f"step wrote into its input's {name}"
    assert given is None or torch.equal(action, given), "step wrote into its action"  # type: ignore[arg-type]


def check_splits(simulator: Simulator, state: State, actions: Tensor | None) -> None:
    """Six steps are two and then four, bit for bit: nothing is remembered outside the state."""
    whole = _roll(simulator, state, actions, 6)
    first = _roll(simulator, state, actions, 2)
    second = _roll(simulator, first.frame(-1), None if actions is None else actions[2:], 4)
    assert whole.frame(-1).identical(second.frame(-1)), "six steps are not two and then four"


def check_batch(simulator: Simulator, state: State, actions: Tensor | None, tolerance: float) -> None:
    """Scenes in a batch go as they go alone."""
    other = simulator.step(state, _first(actions))
    both = type(state).cat([state, other])
    action = _first(actions)
    together = simulator.step(both, None if action is None else torch.cat([action, action]))
    alone = type(state).cat([other, simulator.step(other, action)])
    _assert_close(together, alone, tolerance, "a batch is not equal to its scenes")


def check_order(simulator: Simulator, state: State, actions: Tensor | None, tolerance: float) -> None:
    """The order in which entities are listed does not matter."""
    order = _shuffled(state)
    action = _first(actions)
    shuffled = simulator.step(_reordered(state, order), _permuted(action, order, state))
    wanted = _reordered(simulator.step(state, action), order)
    _assert_close(shuffled, wanted, tolerance, "the order of entities matters")


def check_true_value(simulator: Simulator, state: State, actions: Tensor | None) -> None:
    """Setting fields to the values they have anyway changes nothing, bit for bit."""
    plain = _roll(simulator, state, actions, 6)
    values: dict[str, Any] = {name: plain.frame(3)[name] for name in state.dynamic_fields}
    changed = _roll(simulator, state, actions, 6, [do(at=3, **values)])
    assert all(torch.equal(plain[k], changed[k]) for k in plain.frames), "intervening with the true value matters"


def check_past(simulator: Simulator, state: State, actions: Tensor | None) -> None:
    """What is changed at step 3 leaves the frames before as they were, and the change arrives."""
    plain = _roll(simulator, state, actions, 6)
    name = next(k for k in state.dynamic_fields if state.fields[k].kind == "float")
    shift: dict[str, Any] = {name: lambda rows: rows + 1.0}
    changed = _roll(simulator, state, actions, 6, [do(at=3, **shift)])
    assert torch.equal(plain[name][:3], changed[name][:3]), "an intervention changed the past"
    assert not torch.equal(plain[name][3], changed[name][3]), "an intervention did not arrive"


def check_inactive(simulator: Simulator, state: State, actions: Tensor | None, tolerance: float) -> None:
    """An inactive entity neither moves nor matters."""
    for entity in sorted({0, state.num_entities // 2, state.num_entities - 1}):
        _check_inactive(simulator, state, actions, tolerance, entity)


def _check_inactive(simulator: Simulator, state: State, actions: Tensor | None, tolerance: float, last: int) -> None:
    others = torch.arange(state.num_entities, device=state.device) != last
    gone = state.replace(active=others)
    path = _roll(simulator, gone, actions, 6)
    for name in state.moving_fields:
        assert torch.equal(path[name][0, last], path[name][-1, last]), f"an inactive entity's {name} changed"
    elsewhere: dict[str, Any] = {name: _other(state.fields[name]) for name in state.moving_fields}
    moved = _roll(simulator, do(entities=last, **elsewhere)(gone, 0), actions, 6)
    for name in state.moving_fields:
        found, known = moved[name][:, others].double(), path[name].double()
        difference = (known[:, others] - found).abs().max()
        assert difference <= tolerance * known.abs().max(), f"an inactive entity matters to others' {name}"


def _other(field: Field) -> Callable[[Tensor], Tensor]:
    """Return a change of rows that keeps to what is allowed of them."""
    if field.kind == "bool":
        return torch.logical_not
    if field.limits == "unit length":
        return lambda rows: functional.normalize(rows * 0.9 + 0.1, dim=-1)
    return lambda rows: rows * 0.9 + 0.1


def check_locality(simulator: Simulator, state: State, *, entity: int, reach: float) -> None:
    """Within one step a change to an entity does not reach those farther away than `reach`.

    For a graph network, `reach` is the connectivity radius times the number of message passing steps, and of a GNS with
    kernels two of their radii farther.
    """
    with torch.no_grad():
        disturbed = do(entities=entity, velocities=lambda rows: rows + 1.0)(state, 0)
        plain, changed = simulator.step(state), simulator.step(disturbed)
        far = (state.positions - state.positions[entity]).norm(dim=1) > reach
        assert bool(far.any()), f"no entity is farther than {reach} from entity {entity}; nothing was tested"
        assert torch.equal(plain.positions[far], changed.positions[far]), f"a change travelled farther than {reach}"


def _roll(simulator: Simulator, state: State, actions: Tensor | None, num_steps: int, interventions: Any = ()) -> Any:
    return rollout(state, actions, simulator=simulator, num_steps=num_steps, interventions=interventions)


def _first(actions: Tensor | None) -> Tensor | None:
    return None if actions is None else actions[0]


def _shuffled(state: State) -> Tensor:
    """Return an order of entities that keeps scenes together."""
    keys = torch.rand(state.num_entities, generator=torch.Generator().manual_seed(0)).to(state.device)
    return torch.argsort(state.batch + keys)


def _permuted(action: Tensor | None, order: Tensor, state: State) -> Tensor | None:
    if action is None or len(action) != state.num_entities:
        return action
    return action[order]


def _reordered(state: State, order: Tensor) -> State:
    place = torch.argsort(order)
    values: dict[str, Any] = {
        name: state[name][order] if state.fields[name].per == "entity" else state[name] for name in state
    }
    values |= {name: place[state[name]] for name in state if state.fields[name].per == "index"}
    return type(state)(batch=state.batch[order], active=state.active[order], **values)


def _assert_close(got: State, wanted: State, tolerance: float, message: str) -> None:
    for name in wanted.dynamic_fields:
        made, known = got[name].double(), wanted[name].double()
        difference, largest = float((made - known).abs().max()), float(known.abs().max())
        assert difference <= tolerance * largest, f"{message}: {name} differs by {difference:.3g} of {largest:.3g}"
