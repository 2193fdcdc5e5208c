# mypy: ignore-errors
"""Warp kernels of smoothed particle hydrodynamics in a periodic plane: cells, density, forces, motion.

All is in float64: pressure is sound_speed^2 times a small difference of densities, and float32 would leave noise.
"""

import math

import warp as wp  # noqa: TID253 (this module is imported only by the engine's first step)

wp.config.quiet, wp.config.log_level = True, wp.LOG_WARNING  # standard output is for results
wp.init()
wp.set_module_options({"enable_backward": False})

ZERO, ONE, TWO, THREE = (wp.constant(wp.float64(number)) for number in range(4))
HALF, FIVE, SIX, FIFTEEN = (wp.constant(wp.float64(number)) for number in (0.5, 5, 6, 15))
TINY = wp.constant(wp.float64(1e-12))
NORM = wp.constant(wp.float64(7 / (478 * math.pi)))


@wp.struct
class Setting:
    """What holds for all particles; `stiffness` is density x sound_speed^2, `transport` its share that shifts."""

    dt: wp.float64
    length: wp.float64
    density: wp.float64
    stiffness: wp.float64
    viscosity: wp.float64
    transport: wp.float64


@wp.struct
class Scenes:
    """What belongs to scenes: box, gravity, cells along each axis and the number of their first cell."""

    lower: wp.array(dtype=wp.vec2d)
    width: wp.array(dtype=wp.vec2d)
    gravity: wp.array(dtype=wp.vec2d)
    cells: wp.array(dtype=wp.vec2i)
    first: wp.array(dtype=wp.int32)


@wp.struct
class Particles:
    """What belongs to particles; `scenes` is -1 of those that are not there. `changes` are of both velocities."""

    scenes: wp.array(dtype=wp.int32)
    masses: wp.array(dtype=wp.float64)
    positions: wp.array(dtype=wp.vec2d)
    fluid: wp.array(dtype=wp.vec2d)
    transport: wp.array(dtype=wp.vec2d)
    densities: wp.array(dtype=wp.float64)
    pressures: wp.array(dtype=wp.float64)
    volumes2: wp.array(dtype=wp.float64)
    changes: wp.array(dtype=wp.vec4d)
    cells: wp.array(dtype=wp.int32)


@wp.struct
class Cells:
    """The particles of cell c are `members` from ends[c] - counts[c] to ends[c], in the order of their numbers."""

    counts: wp.array(dtype=wp.int32)
    ends: wp.array(dtype=wp.int32)
    members: wp.array(dtype=wp.int32)


@wp.func
def weight(q: wp.float64) -> wp.float64:
    """Return the quintic spline of a plane at q smoothing lengths, times the smoothing length squared."""
    a, b, c = wp.max(THREE - q, ZERO), wp.max(TWO - q, ZERO), wp.max(ONE - q, ZERO)
    a2, b2, c2 = a * a, b * b, c * c
    return NORM * (a2 * a2 * a - SIX * b2 * b2 * b + FIFTEEN * c2 * c2 * c)


@wp.func
def slope(q: wp.float64) -> wp.float64:
    """Return the derivative of `weight` by q, divided by q."""
    a, b, c = wp.max(THREE - q, ZERO), wp.max(TWO - q, ZERO), wp.max(ONE - q, ZERO)
    a2, b2, c2 = a * a, b * b, c * c
    return -FIVE * NORM * (a2 * a2 - SIX * b2 * b2 + FIFTEEN * c2 * c2) / (q + TINY)


@wp.func
def index(scenes: Scenes, scene: wp.int32, position: wp.vec2d, axis: wp.int32) -> wp.int32:
    """Return the cell of a position along an axis; a cell that exists even where the position is not a number."""
    share = (position[axis] - scenes.lower[scene][axis]) / scenes.width[scene][axis]
    count = scenes.cells[scene][axis]
    return wp.clamp(wp.int32((share - wp.floor(share)) * wp.float64(count)), 0, count - 1)


@wp.kernel
def clear(cells: Cells):
    """Empty the cells."""
    cells.counts[wp.tid()] = 0


@wp.kernel
def locate(scenes: Scenes, particles: Particles, cells: Cells):
    """Count the particles of each cell."""
    p = wp.tid()
    scene = particles.scenes[p]
    if scene < 0:
        return
    x = particles.positions[p]
    cell = scenes.first[scene] + index(scenes, scene, x, 0) * scenes.cells[scene][1] + index(scenes, scene, x, 1)
    particles.cells[p] = cell
    wp.atomic_add(cells.counts, cell, 1)


@wp.kernel
def reset(cells: Cells):
    """Turn the sums of counts into where each cell's members begin; `fill` moves that on to where they end."""
    cell = wp.tid()
    cells.ends[cell] -= cells.counts[cell]


@wp.kernel
def fill(particles: Particles, cells: Cells):
    """Write the members of cells, in any order."""
    p = wp.tid()
    if particles.scenes[p] >= 0:
        cells.members[wp.atomic_add(cells.ends, particles.cells[p], 1)] = p


@wp.kernel
def sort(cells: Cells):
    """Bring the members of each cell in the order of their numbers, so that sums come out the same on each run."""
    cell = wp.tid()
    start = cells.ends[cell] - cells.counts[cell]
    for k in range(start + 1, cells.ends[cell]):
        moved = cells.members[k]
        place = k
        while place > start and cells.members[place - 1] > moved:
            cells.members[place] = cells.members[place - 1]
            place -= 1
        cells.members[place] = moved


@wp.struct
class Neighborhood:
    """A cell's members, `start` to `stop`, and how far the box they are seen in lies from their own."""

    start: wp.int32
    stop: wp.int32
    shift: wp.vec2d


@wp.func
def over(number: wp.int32, size: wp.int32) -> wp.int32:
    """Return 1 or -1 for what lies beyond the upper or the lower side, otherwise 0."""
    return wp.where(number < 0, -1, wp.where(number >= size, 1, 0))


@wp.func
def beside(scenes: Scenes, cells: Cells, scene: wp.int32, cell: wp.int32, number: wp.int32) -> Neighborhood:
    """Return one of the nine cells round a cell, itself among them."""
    size, width = scenes.cells[scene], scenes.width[scene]
    local = cell - scenes.first[scene]
    x, y = local / size[1] + number / 3 - 1, local % size[1] + number % 3 - 1
    right, up = over(x, size[0]), over(y, size[1])
    found = scenes.first[scene] + (x - right * size[0]) * size[1] + y - up * size[1]
    stop = cells.ends[found]
    shift = wp.vec2d(wp.float64(right) * width[0], wp.float64(up) * width[1])
    return Neighborhood(stop - cells.counts[found], stop, shift)


@wp.kernel
def sum_density(s: Setting, scenes: Scenes, particles: Particles, cells: Cells):
    """Write the density of each particle, its mass times the sum of weights, its own among them, and what follows."""
    p = wp.tid()
    scene = particles.scenes[p]
    if scene < 0:
        return
    x, scale = particles.positions[p], ONE / (s.length * s.length)
    total = ZERO
    for number in range(9):
        near = beside(scenes, cells, scene, particles.cells[p], number)
        seen = x - near.shift
        for k in range(near.start, near.stop):
            way = seen - particles.positions[cells.members[k]]
            q2 = scale * wp.dot(way, way)
            if q2 < THREE * THREE:
                total += weight(wp.sqrt(q2))
    density = particles.masses[p] * total * scale
    particles.densities[p] = density
    particles.pressures[p] = s.stiffness * (density / s.density - ONE)
    particles.volumes2[p] = ONE / (total * total * scale * scale)


@wp.kernel
def accelerate(s: Setting, scenes: Scenes, particles: Particles, cells: Cells):
    """Write the acceleration of the fluid and that by which its particles are shifted (Adami et al. 2013, 8 and 13)."""
    p = wp.tid()
    scene = particles.scenes[p]
    if scene < 0:
        return
    x, u, v = particles.positions[p], particles.fluid[p], particles.transport[p]
    density, pressure, volume2 = particles.densities[p], particles.pressures[p], particles.volumes2[p]
    scale = ONE / (s.length * s.length)
    force, shift = wp.vec2d(), wp.vec2d()
    for number in range(9):
        near = beside(scenes, cells, scene, particles.cells[p], number)
        seen = x - near.shift
        for k in range(near.start, near.stop):
            other = cells.members[k]
            way = seen - particles.positions[other]
            q2 = scale * wp.dot(way, way)
            if q2 < THREE * THREE and other != p:
                steep = (volume2 + particles.volumes2[other]) * slope(wp.sqrt(q2))
                density2 = particles.densities[other]
                u2 = particles.fluid[other]
                middle = (density2 * pressure + density * particles.pressures[other]) / (density + density2)
                carried = density * wp.dot(v - u, way) * u
                carried += density2 * wp.dot(particles.transport[other] - u2, way) * u2
                force += steep * (HALF * carried - middle * way + s.viscosity * (u - u2))
                shift -= steep * way
    factor = scale * scale / particles.masses[p]
    force = factor * force + scenes.gravity[scene]
    shift = factor * s.stiffness * shift
    particles.changes[p] = wp.vec4d(force[0], force[1], shift[0], shift[1])


@wp.kernel
def move(s: Setting, scenes: Scenes, particles: Particles):
    """Change velocities, then positions by the new ones."""
    p = wp.tid()
    scene = particles.scenes[p]
    if scene < 0:
        return
    change, lower, width = particles.changes[p], scenes.lower[scene], scenes.width[scene]
    u = particles.fluid[p] + s.dt * wp.vec2d(change[0], change[1])
    v = u + HALF * s.transport * s.dt * wp.vec2d(change[2], change[3])
    x = particles.positions[p] + s.dt * v - lower
    x = wp.vec2d(x[0] - wp.floor(x[0] / width[0]) * width[0], x[1] - wp.floor(x[1] / width[1]) * width[1])
    particles.fluid[p] = u
    particles.transport[p] = v
    particles.positions[p] = lower + x
