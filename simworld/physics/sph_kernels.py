# mypy: ignore-errors
"""Warp kernels of smoothed particle hydrodynamics in a periodic plane: neighbors, density, forces, motion.

Neighbors are found anew, in each scene for itself, when a particle may have gone half of a margin, `skin`, beyond the
support of the kernel; so what is found does not depend on the scenes beside.

All is in float64: pressure is sound_speed^2 times a small difference of densities, and float32 would leave noise.
"""

import math

from simworld.kernels.warp_start import wp

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
    skin: wp.float64
    density: wp.float64
    stiffness: wp.float64
    viscosity: wp.float64
    transport: wp.float64


@wp.struct
class Scenes:
    """What belongs to scenes: box, gravity, cells along each axis and the number of their first cell.

    `stale` is 1 where neighbors must be found anew.
    """

    lower: wp.array(dtype=wp.vec2d)
    width: wp.array(dtype=wp.vec2d)
    gravity: wp.array(dtype=wp.vec2d)
    cells: wp.array(dtype=wp.vec2i)
    first: wp.array(dtype=wp.int32)
    stale: wp.array(dtype=wp.int32)


@wp.struct
class Particles:
    """What belongs to particles; `scenes` is -1 of those that are not there. `changes` are of both velocities.

    `paths` are how far they went since neighbors were found. Row p of `neighbors` has room for as many as it has
    columns, while `num_neighbors` counts all, the particle itself among them; the largest count is `most`.
    """

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
    paths: wp.array(dtype=wp.float64)
    neighbors: wp.array2d(dtype=wp.int32)
    num_neighbors: wp.array(dtype=wp.int32)
    most: wp.array(dtype=wp.int32)


@wp.struct
class Cells:
    """The particles of cell c are `members` from ends[c] - counts[c] to ends[c], in the order of their numbers."""

    scenes: wp.array(dtype=wp.int32)
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
def shortest(way: wp.float64, width: wp.float64) -> wp.float64:
    """Return the shorter way round a periodic axis, for places that lie within one width of each other."""
    return wp.where(TWO * way > width, way - width, wp.where(TWO * way < -width, way + width, way))


@wp.func
def between(a: wp.vec2d, b: wp.vec2d, width: wp.vec2d) -> wp.vec2d:
    """Return the shortest way from b to a."""
    return wp.vec2d(shortest(a[0] - b[0], width[0]), shortest(a[1] - b[1], width[1]))


@wp.func
def inside(x: wp.float64, lower: wp.float64, width: wp.float64) -> wp.float64:
    """Return a coordinate moved into the box."""
    return x - wp.floor((x - lower) / width) * width


@wp.func
def index(x: wp.float64, lower: wp.float64, width: wp.float64, count: wp.int32) -> wp.int32:
    """Return the cell of a coordinate in the box; a cell that exists even where it is not a number."""
    return wp.clamp(wp.int32((x - lower) / width * wp.float64(count)), 0, count - 1)


@wp.func
def waits(scenes: Scenes, scene: wp.int32) -> bool:
    """Return whether a scene is there and its neighbors are to be found anew."""
    if scene < 0:
        return False
    return scenes.stale[scene] == 1


@wp.kernel
def clear(scenes: Scenes, cells: Cells):
    """Empty the cells."""
    cell = wp.tid()
    if waits(scenes, cells.scenes[cell]):
        cells.counts[cell] = 0


@wp.kernel
def locate(scenes: Scenes, particles: Particles, cells: Cells):
    """Move particles into the box and count those of each cell."""
    p = wp.tid()
    scene = particles.scenes[p]
    if waits(scenes, scene):
        lower, width, size = scenes.lower[scene], scenes.width[scene], scenes.cells[scene]
        x = inside(particles.positions[p][0], lower[0], width[0])
        y = inside(particles.positions[p][1], lower[1], width[1])
        row = index(x, lower[0], width[0], size[0]) * size[1] + index(y, lower[1], width[1], size[1])
        particles.positions[p] = wp.vec2d(x, y)
        particles.paths[p] = ZERO
        particles.cells[p] = scenes.first[scene] + row
        wp.atomic_add(cells.counts, scenes.first[scene] + row, 1)


@wp.kernel
def reset(scenes: Scenes, cells: Cells):
    """Turn the sums of counts into where each cell's members begin; `fill` moves that on to where they end."""
    cell = wp.tid()
    if waits(scenes, cells.scenes[cell]):
        cells.ends[cell] -= cells.counts[cell]


@wp.kernel
def fill(scenes: Scenes, particles: Particles, cells: Cells):
    """Write the members of cells, in any order."""
    p = wp.tid()
    if waits(scenes, particles.scenes[p]):
        cells.members[wp.atomic_add(cells.ends, particles.cells[p], 1)] = p


@wp.kernel
def sort(scenes: Scenes, cells: Cells):
    """Bring the members of each cell in the order of their numbers, so that sums come out the same on each run."""
    cell = wp.tid()
    if not waits(scenes, cells.scenes[cell]):
        return
    start = cells.ends[cell] - cells.counts[cell]
    for k in range(start + 1, cells.ends[cell]):
        moved = cells.members[k]
        place = k
        while place > start and cells.members[place - 1] > moved:
            cells.members[place] = cells.members[place - 1]
            place -= 1
        cells.members[place] = moved


@wp.kernel
def find_neighbors(s: Setting, scenes: Scenes, particles: Particles, cells: Cells):
    """Write which particles of the nine cells round its own lie within the support and the skin of each particle."""
    p = wp.tid()
    scene = particles.scenes[p]
    if not waits(scenes, scene):
        return
    x, size, first = particles.positions[p], scenes.cells[scene], scenes.first[scene]
    reach = THREE * s.length + s.skin
    local = particles.cells[p] - first
    count = wp.int32(0)
    for number in range(9):
        row = (local / size[1] + number / 3 - 1 + size[0]) % size[0]
        cell = first + row * size[1] + (local % size[1] + number % 3 - 1 + size[1]) % size[1]
        for k in range(cells.ends[cell] - cells.counts[cell], cells.ends[cell]):
            way = between(x, particles.positions[cells.members[k]], scenes.width[scene])
            if wp.dot(way, way) < reach * reach:
                if count < particles.neighbors.shape[1]:
                    particles.neighbors[p, count] = cells.members[k]
                count += 1
    particles.num_neighbors[p] = wp.min(count, particles.neighbors.shape[1])
    wp.atomic_max(particles.most, 0, count)


@wp.kernel
def refresh(scenes: Scenes):
    """Say that neighbors are found."""
    scenes.stale[wp.tid()] = 0


@wp.kernel
def sum_density(s: Setting, scenes: Scenes, particles: Particles):
    """Write the density of each particle, its mass times the sum of weights, its own among them, and what follows."""
    p = wp.tid()
    scene = particles.scenes[p]
    if scene < 0:
        return
    x, width, scale = particles.positions[p], scenes.width[scene], ONE / (s.length * s.length)
    total = ZERO
    for k in range(particles.num_neighbors[p]):
        way = between(x, particles.positions[particles.neighbors[p, k]], width)
        q2 = scale * wp.dot(way, way)
        if q2 < THREE * THREE:
            total += weight(wp.sqrt(q2))
    density = particles.masses[p] * total * scale
    particles.densities[p] = density
    particles.pressures[p] = s.stiffness * (density / s.density - ONE)
    particles.volumes2[p] = ONE / (total * total * scale * scale)


@wp.kernel
def accelerate(s: Setting, scenes: Scenes, particles: Particles):
    """Write the acceleration of the fluid and that by which its particles are shifted (Adami et al. 2013, 8 and 13)."""
    p = wp.tid()
    scene = particles.scenes[p]
    if scene < 0:
        return
    x, u, v = particles.positions[p], particles.fluid[p], particles.transport[p]
    density, pressure, volume2 = particles.densities[p], particles.pressures[p], particles.volumes2[p]
    width, scale = scenes.width[scene], ONE / (s.length * s.length)
    force, shift = wp.vec2d(), wp.vec2d()
    for k in range(particles.num_neighbors[p]):
        other = particles.neighbors[p, k]
        way = between(x, particles.positions[other], width)
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
    change = particles.changes[p]
    u = particles.fluid[p] + s.dt * wp.vec2d(change[0], change[1])
    v = u + HALF * s.transport * s.dt * wp.vec2d(change[2], change[3])
    path = particles.paths[p] + s.dt * wp.length(v)
    particles.fluid[p] = u
    particles.transport[p] = v
    particles.positions[p] += s.dt * v
    particles.paths[p] = path
    if TWO * path > s.skin:
        scenes.stale[scene] = 1
