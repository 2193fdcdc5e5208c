# mypy: ignore-errors
# ruff: noqa: SIM108
"""Warp kernels of the material point method: particles to grid, walls and obstacles, grid to particles.

Everything is in three dimensions; a plane is one layer of nodes, in which a transfer visits 9 nodes and not 27.
Node (i, j, k) of a scene lies at `lower` + (i - PAD, j - PAD, k - PAD) cells, so that walls pass through nodes.
"""

from simworld import kinds
from simworld.kernels.warp_start import wp

wp.set_module_options({"enable_backward": False})

PAD = wp.constant(3)
KINEMATIC, WATER, SAND = wp.constant(kinds.KINEMATIC), wp.constant(kinds.WATER), wp.constant(kinds.SAND)
TINY = wp.constant(1e-12)


@wp.struct
class Setting:
    """What holds for all particles: numbers of the engine, of its materials and of the grid."""

    dt: wp.float32
    cell: wp.float32
    dim: wp.int32
    depth: wp.int32
    size: wp.vec3i
    water_stiffness: wp.float32
    water_exponent: wp.float32
    water_viscosity: wp.float32
    water_shock: wp.float32
    sand_shear: wp.float32
    sand_bulk: wp.float32
    sand_slope: wp.float32
    goop_shear: wp.float32
    goop_bulk: wp.float32
    goop_yield: wp.float32
    goop_decay: wp.float32


@wp.struct
class Scenes:
    """What belongs to scenes: walls, gravity, and obstacles, those of scene s in rows starts[s] to starts[s + 1]."""

    lower: wp.array(dtype=wp.vec3)
    upper: wp.array(dtype=wp.vec3)
    gravity: wp.array(dtype=wp.vec3)
    starts: wp.array(dtype=wp.int32)
    ends: wp.array(dtype=wp.vec2i)
    radii: wp.array(dtype=wp.float32)


@wp.struct
class Particles:
    """What belongs to particles; `materials` is 0 of those that are not there, 3 of those that follow a script."""

    materials: wp.array(dtype=wp.int32)
    scenes: wp.array(dtype=wp.int32)
    masses: wp.array(dtype=wp.float32)
    volumes: wp.array(dtype=wp.float32)
    frictions: wp.array(dtype=wp.float32)
    positions: wp.array(dtype=wp.vec3)
    velocities: wp.array(dtype=wp.vec3)
    affine: wp.array(dtype=wp.mat33)
    strains: wp.array(dtype=wp.mat33)
    log_volumes: wp.array(dtype=wp.float32)


@wp.struct
class Contact:
    """Where a place is to the nearest obstacle: depth inside, the way out, and the obstacle's velocity there."""

    depth: wp.float32
    normal: wp.vec3
    velocity: wp.vec3


@wp.func
def directions(dim: wp.int32):
    """Return ones in the first `dim` axes."""
    return wp.vec3(1.0, 1.0, wp.where(dim == 3, 1.0, 0.0))


@wp.func
def water_stress(s: Setting, p: wp.int32, particles: Particles):
    """Return the Kirchhoff stress of water: pressure by Tait's equation, viscosity by the rate of shear."""
    rate = particles.affine[p]
    log_volume = wp.min(particles.log_volumes[p], 0.0)
    pressure = s.water_stiffness / s.water_exponent * (wp.exp(-s.water_exponent * log_volume) - 1.0)
    pressure -= s.water_shock * wp.min(wp.trace(rate), 0.0)
    viscous = s.water_viscosity * (rate + wp.transpose(rate))
    return wp.exp(log_volume) * (viscous - pressure * wp.diag(directions(s.dim)))


@wp.func
def water_volume(s: Setting, p: wp.int32, particles: Particles, rate: wp.mat33, density: wp.float32):
    """Return the logarithm of volume over that at rest after a sub-step: never more than `density` leaves room for.

    Without the limit, what came apart and met again would not resist compression, or would fill too much space.
    """
    grown = particles.log_volumes[p] + wp.log(wp.max(1.0 + s.dt * wp.trace(rate), 0.1))
    rest = particles.masses[p] / particles.volumes[p]
    return wp.min(grown, wp.max(wp.log(rest / density), 0.0))


@wp.func
def stretched(s: Setting, p: wp.int32, particles: Particles):
    """Return the left Cauchy-Green strain, of which no part has flowed yet, after another sub-step."""
    step = wp.identity(n=3, dtype=wp.float32) + s.dt * particles.affine[p]
    return step * particles.strains[p] * wp.transpose(step)


@wp.func
def principal_axes(dim: wp.int32, strain: wp.mat33):
    """Return the eigenvectors, as columns, and the eigenvalues of a symmetric matrix; of a plane in closed form."""
    axes = wp.identity(n=3, dtype=wp.float32)
    values = wp.vec3(1.0, 1.0, 1.0)
    if dim == 3:
        axes, values = wp.eig3(strain)
    else:
        mean = 0.5 * (strain[0, 0] + strain[1, 1])
        half = 0.5 * (strain[0, 0] - strain[1, 1])
        radius = wp.sqrt(half * half + strain[0, 1] * strain[0, 1])
        angle = 0.5 * wp.atan2(strain[0, 1], half)
        c, t = wp.cos(angle), wp.sin(angle)
        axes = wp.mat33(c, -t, 0.0, t, c, 0.0, 0.0, 0.0, 1.0)
        values = wp.vec3(mean + radius, mean - radius, 1.0)
    return axes, wp.vec3(wp.max(values[0], 1e-6), wp.max(values[1], 1e-6), wp.max(values[2], 1e-6))


@wp.func
def sand_flow(s: Setting, p: wp.int32, particles: Particles, log_strain: wp.vec3):
    """Return the elastic part of a logarithmic strain within Drucker and Prager's cone (Klar et al. 2016).

    Volume that sand gained as it came apart is kept, and taken back before it resists compression again.
    """
    dim, ones = wp.float32(s.dim), directions(s.dim)
    whole = log_strain + ones * (particles.log_volumes[p] / dim)
    volume = whole[0] + whole[1] + whole[2]
    flat = whole - ones * (volume / dim)
    size = wp.length(flat)
    if volume >= 0.0:
        particles.log_volumes[p] = volume
        return wp.vec3(0.0, 0.0, 0.0)
    particles.log_volumes[p] = 0.0
    excess = size + (dim * s.sand_bulk + 2.0 * s.sand_shear) / (2.0 * s.sand_shear) * volume * s.sand_slope
    if excess <= 0.0:
        return whole
    return whole - flat * (wp.min(excess, size) / wp.max(size, TINY))


@wp.func
def goop_flow(s: Setting, log_strain: wp.vec3):
    """Return the elastic part of a logarithmic strain: shear beyond the yield strain decays (Bingham)."""
    ones = directions(s.dim)
    volume = log_strain[0] + log_strain[1] + log_strain[2]
    flat = log_strain - ones * (volume / wp.float32(s.dim))
    size = wp.length(flat)
    excess = size - s.goop_yield / (2.0 * s.goop_shear)
    if excess <= 0.0:
        return log_strain
    return log_strain - flat * (excess * (1.0 - s.goop_decay) / size)


@wp.func
def solid_stress(s: Setting, p: wp.int32, particles: Particles):
    """Return the Kirchhoff stress of sand or goop, elastic in the logarithmic strain, after plastic flow."""
    axes, values = principal_axes(s.dim, stretched(s, p, particles))
    log_strain = 0.5 * wp.vec3(wp.log(values[0]), wp.log(values[1]), wp.log(values[2]))
    sandy = particles.materials[p] == SAND
    shear, bulk = wp.where(sandy, s.sand_shear, s.goop_shear), wp.where(sandy, s.sand_bulk, s.goop_bulk)
    if sandy:
        log_strain = sand_flow(s, p, particles, log_strain)
    else:
        log_strain = goop_flow(s, log_strain)
    squares = wp.vec3(wp.exp(2.0 * log_strain[0]), wp.exp(2.0 * log_strain[1]), wp.exp(2.0 * log_strain[2]))
    particles.strains[p] = axes * wp.diag(squares) * wp.transpose(axes)
    volume = log_strain[0] + log_strain[1] + log_strain[2]
    stress = 2.0 * shear * log_strain + bulk * volume * directions(s.dim)
    return axes * wp.diag(stress) * wp.transpose(axes)


@wp.func
def place(s: Setting, scenes: Scenes, scene: wp.int32, position: wp.vec3):
    """Return a position in cells from node 0, kept where all nodes round it exist."""
    local = (position - scenes.lower[scene]) / s.cell
    for a in range(3):
        local[a] = wp.clamp(local[a] + wp.float32(PAD), 1.0, wp.float32(s.size[a] - 2)) if a < s.dim else 0.0
    return local


@wp.func
def weights(dim: wp.int32, base: wp.vec3i, local: wp.vec3):
    """Return the weights of quadratic B-splines, row a for the three nodes along axis a."""
    w = wp.mat33()
    for a in range(3):
        f = local[a] - wp.float32(base[a])
        if a < dim:
            w[a, 0] = 0.5 * (1.5 - f) * (1.5 - f)
            w[a, 1] = 0.75 - (f - 1.0) * (f - 1.0)
            w[a, 2] = 0.5 * (f - 0.5) * (f - 0.5)
        else:
            w[a, 0] = 1.0
    return w


@wp.func
def first_node(local: wp.vec3, dim: wp.int32):
    """Return the lowest node that takes part in the transfer of a particle."""
    last = wp.where(dim == 3, wp.int32(local[2] - 0.5), 0)
    return wp.vec3i(wp.int32(local[0] - 0.5), wp.int32(local[1] - 0.5), last)


@wp.func
def node(s: Setting, scene: wp.int32, i: wp.int32, j: wp.int32, k: wp.int32):
    """Return the row of a node in the grids of all scenes."""
    return ((scene * s.size[0] + i) * s.size[1] + j) * s.size[2] + k


@wp.kernel
def clear(grid: wp.array(dtype=wp.vec4), drag: wp.array(dtype=wp.float32)):
    """Empty the grid."""
    row = wp.tid()
    grid[row] = wp.vec4()
    drag[row] = 0.0


@wp.kernel
def scatter(
    s: Setting, scenes: Scenes, particles: Particles, grid: wp.array(dtype=wp.vec4), drag: wp.array(dtype=wp.float32)
):
    """Add momentum and mass of particles, with the impulse of their stress, to `grid`; mass x friction to `drag`."""
    p = wp.tid()
    if particles.materials[p] < WATER:
        return
    stress = wp.mat33()
    if particles.materials[p] == WATER:
        stress = water_stress(s, p, particles)
    else:
        stress = solid_stress(s, p, particles)
    scene, mass = particles.scenes[p], particles.masses[p]
    slope = mass * particles.affine[p] - (4.0 * s.dt * particles.volumes[p] / (s.cell * s.cell)) * stress
    momentum = mass * particles.velocities[p]
    local = place(s, scenes, scene, particles.positions[p])
    base = first_node(local, s.dim)
    w = weights(s.dim, base, local)
    for i in range(3):
        for j in range(3):
            for k in range(s.depth):
                weight = w[0, i] * w[1, j] * w[2, k]
                away = wp.vec3(wp.float32(base[0] + i), wp.float32(base[1] + j), wp.float32(base[2] + k)) - local
                given = weight * (momentum + slope * (away * s.cell))
                row = node(s, scene, base[0] + i, base[1] + j, base[2] + k)
                wp.atomic_add(grid, row, wp.vec4(given[0], given[1], given[2], weight * mass))
                wp.atomic_add(drag, row, weight * mass * particles.frictions[p])


@wp.func
def slide(velocity: wp.vec3, normal: wp.vec3, friction: wp.float32):
    """Return a velocity that goes into no wall of outward `normal`, slowed along it by Coulomb friction."""
    into = wp.dot(velocity, normal)
    if into >= 0.0:
        return velocity
    along = velocity - into * normal
    speed = wp.length(along)
    return along * (wp.max(speed + friction * into, 0.0) / wp.max(speed, TINY))


@wp.func
def nearest(scenes: Scenes, particles: Particles, scene: wp.int32, position: wp.vec3):
    """Return the contact with the obstacle in which a position lies deepest; obstacles are rods between particles."""
    found = Contact()
    found.depth = -1.0e6
    for row in range(scenes.starts[scene], scenes.starts[scene + 1]):
        a, b = scenes.ends[row][0], scenes.ends[row][1]
        rod = particles.positions[b] - particles.positions[a]
        share = wp.dot(position - particles.positions[a], rod) / wp.max(wp.dot(rod, rod), TINY)
        share = wp.clamp(share, 0.0, 1.0)
        away = position - particles.positions[a] - share * rod
        distance = wp.length(away)
        if scenes.radii[row] - distance > found.depth:
            found.depth = scenes.radii[row] - distance
            across = wp.vec3(-rod[1], rod[0], 0.0)
            found.normal = wp.where(distance > 1e-6, away / wp.max(distance, 1e-6), wp.normalize(across))
            found.velocity = (1.0 - share) * particles.velocities[a] + share * particles.velocities[b]
    return found


@wp.kernel
def push(
    s: Setting, scenes: Scenes, particles: Particles, grid: wp.array(dtype=wp.vec4), drag: wp.array(dtype=wp.float32)
):
    """Turn momentum of nodes into velocity and apply gravity, obstacles and walls."""
    row = wp.tid()
    cell = grid[row]
    if cell[3] <= 0.0:
        return
    index = wp.vec3i((row / (s.size[1] * s.size[2])) % s.size[0], (row / s.size[2]) % s.size[1], row % s.size[2])
    scene = row / (s.size[0] * s.size[1] * s.size[2])
    friction = drag[row] / cell[3]
    velocity = wp.vec3(cell[0], cell[1], cell[2]) / cell[3] + s.dt * scenes.gravity[scene]
    position = scenes.lower[scene]
    for a in range(3):
        position[a] += s.cell * wp.float32(index[a] - PAD) if a < s.dim else 0.0
    contact = nearest(scenes, particles, scene, position)
    if contact.depth > 0.0:
        velocity = contact.velocity + slide(velocity - contact.velocity, contact.normal, friction)
    for a in range(3):
        normal = wp.vec3()
        if a < s.dim and position[a] <= scenes.lower[scene][a] + 1e-3 * s.cell:
            normal[a] = 1.0
            velocity = slide(velocity, normal, friction)
        elif a < s.dim and position[a] >= scenes.upper[scene][a] - 1e-3 * s.cell:
            normal[a] = -1.0
            velocity = slide(velocity, normal, friction)
    grid[row] = wp.vec4(velocity[0], velocity[1], velocity[2], cell[3])


@wp.kernel
def script(s: Setting, particles: Particles):
    """Move the particles that follow a script by their own velocity."""
    p = wp.tid()
    if particles.materials[p] == KINEMATIC:
        particles.positions[p] += s.dt * particles.velocities[p]


@wp.kernel
def gather(s: Setting, scenes: Scenes, particles: Particles, grid: wp.array(dtype=wp.vec4)):
    """Give particles the velocity of the nodes and its gradient, move them, and keep them out of what is solid."""
    p = wp.tid()
    if particles.materials[p] < WATER:
        return
    scene = particles.scenes[p]
    local = place(s, scenes, scene, particles.positions[p])
    base = first_node(local, s.dim)
    w = weights(s.dim, base, local)
    velocity = wp.vec3()
    affine = wp.mat33()
    mass = wp.float32(0.0)
    for i in range(3):
        for j in range(3):
            for k in range(s.depth):
                cell = grid[node(s, scene, base[0] + i, base[1] + j, base[2] + k)]
                away = wp.vec3(wp.float32(base[0] + i), wp.float32(base[1] + j), wp.float32(base[2] + k)) - local
                weight = w[0, i] * w[1, j] * w[2, k]
                part = weight * wp.vec3(cell[0], cell[1], cell[2])
                mass += weight * cell[3]
                velocity += part
                affine += wp.outer(part, away)
    affine *= 4.0 / s.cell
    particles.affine[p] = affine
    if particles.materials[p] == WATER:
        density = mass / wp.pow(s.cell, wp.float32(s.dim))
        particles.log_volumes[p] = water_volume(s, p, particles, affine, density)
    position = particles.positions[p] + s.dt * velocity
    contact = nearest(scenes, particles, scene, position)
    if contact.depth > 0.0:
        position += contact.depth * contact.normal
        velocity = contact.velocity + slide(velocity - contact.velocity, contact.normal, particles.frictions[p])
    for a in range(3):
        if a < s.dim:
            position[a] = wp.clamp(position[a], scenes.lower[scene][a], scenes.upper[scene][a])
    particles.velocities[p] = velocity
    particles.positions[p] = position
