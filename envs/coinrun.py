"""CoinRun: the platform game of Procgen (1912.01588), which Genie's case study (2402.15391, appendix F) learns from pixels.

obs      image (64, 64, 3) uint8: 13 x 13 tiles around the agent, which is always in the middle
actions  0 to 8: (horizontal + 1) * 3 + (vertical + 1), so 1 left, 4 nothing, 5 jump, 7 right, 8 right and jump; 9 to 14 do nothing
reward   10 for the coin, else 0
ends     coin taken, or touched a saw, an enemy or lava (terminated); 1,000 steps (truncated)

Level seed k is the real game's level k, and the dynamics are the real game's (XLA may contract float32 products and sums: agreement
is to 1e-5). Distances are in tiles, velocities in tiles a step; x grows to the right and y upwards, from the outer corner of the
lowest, leftmost of 64 x 64 tiles. The agent's box is 1 wide and 2 * AGENT_RY high. The sprites are our own; `monochrome` gives the
game's own pictures of flat rectangles, `paint_velocity` its two grey squares.

What can be played is a bank of levels in the params, and the state holds a place in it: a reset is cheap, and to play one level of
one's own, pack(map) gives a Level, and a bank of one is EnvParams(jax.tree.map(lambda x: x[None], level)).

Left out of the game: an enemy that walks through a crate while the agent falls from above it can, for one step, hold the agent up.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.env import Environment
from common.runs.config import require

SIZE = 64  # tiles a side
COIN, SAW, ENEMY, WALL, WALL_TOP, LAVA, LAVA_TOP, BARRIER, CRATE, SPACE = 1, 2, 5, 15, 16, 17, 18, 19, 20, 100  # the game's codes
AGENT_RY = np.float32(0.5787)
GRAVITY, JUMP, SPEED, MIX = np.float32(0.2), np.float32(1.5), np.float32(0.5), np.float32(0.2)
CORNER = np.float32(0.49)  # of a box's half width: where it is tested against walls
AIR_MIX = np.float32(MIX * np.float32(0.15))
SECTIONS, HAZARDS, PILE, DRAWS = 5, 7, 3, 136  # the most that a level has of each; hazards in a section; random numbers drawn
TRAIL = 8  # steps


class Map(NamedTuple):
    """A level as the real game stores it. Unused places have kind 0 (hazards) or look -1 (crates)."""

    grid: jax.Array  # (64, 64) int8 [y, x]
    hazard_kind: jax.Array  # (H,) int32: SAW, ENEMY or 0
    hazard_cell: jax.Array  # (H, 2) int32 x, y
    hazard_speed: jax.Array  # (H,) float32: an enemy's first velocity
    hazard_look: jax.Array  # (H,) int32 in [0, 9)
    crate_cell: jax.Array  # (C, 2) int32 x, y
    crate_look: jax.Array  # (C,) int32 in [0, 4), or -1
    themes: jax.Array  # (3,) int32: background in [0, 62), agent in [0, 5), ground in [0, 6)


# --- the level generator


def mt19937(seed, num: int) -> jax.Array:
    """The first `num` <= 227 outputs of the Mersenne Twister for a seed: (num,) uint32."""

    def follow(x, i):
        x = np.uint32(1812433253) * (x ^ (x >> 30)) + i
        return x, x

    first = jnp.asarray(seed).astype(jnp.uint32)
    _, rest = jax.lax.scan(follow, first, np.arange(1, 398 + num, dtype=np.uint32), unroll=16)
    state = jnp.concatenate([first[None], rest])
    low = state[1 : num + 1]
    mixed = (state[:num] & np.uint32(0x80000000)) | (low & np.uint32(0x7FFFFFFF))
    x = state[397 : 397 + num] ^ (mixed >> 1) ^ jnp.where(low & 1, np.uint32(0x9908B0DF), np.uint32(0))
    x = x ^ (x >> 11)
    x = x ^ ((x << 7) & np.uint32(0x9D2C5680))
    x = x ^ ((x << 15) & np.uint32(0xEFC60000))
    return x ^ (x >> 18)


class Dice:
    """Draws from a stream in turn; a draw that is not `used` takes nothing from it."""

    def __init__(self, stream, place):
        self.stream, self.place = stream, place

    def __call__(self, sides, used=True) -> jax.Array:
        """A number in [0, sides)."""
        x = self.stream[self.place]
        self.place = self.place + jnp.int32(used)
        return (x % jnp.maximum(jnp.asarray(sides), 1).astype(jnp.uint32)).astype(jnp.int32)


def make_map(seed, hard: bool = True) -> Map:
    """The real game's level of a seed (int32 or uint32)."""
    stream = mt19937(seed, DRAWS)
    dice = Dice(stream, jnp.int32(1))  # the first one shifts the background
    background = dice(62)
    dice.place += 2
    agent, ground = (dice(5), dice(6)) if hard else (jnp.int32(0), jnp.int32(0))
    themes = jnp.stack([background if hard else jnp.int32(0), agent, ground])
    dif = dice(3) + 1
    num = dice(dif) + dif
    danger = dice(3)
    y, x = np.indices((SIZE, SIZE), dtype=np.int32)
    border = (x == 0) | (x == SIZE - 1) | (y == SIZE - 1)
    grid = jnp.where(border, WALL, jnp.where(y == 0, WALL_TOP, SPACE))

    def build(carry, i):
        place, grid, x, y = carry
        dice = Dice(stream, place)
        going_on = (i < num) & (x + 15 < SIZE)
        after, *things = section(dice, grid, x, y, dif, danger, hard)
        kept = jax.tree.map(lambda new, old: jnp.where(going_on, new, old), (dice.place, *after), carry)
        return kept, [jnp.where(going_on, thing, 0) for thing in things]

    start = (dice.place, grid, jnp.int32(5), jnp.int32(1))
    (_, grid, cx, cy), things = jax.lax.scan(build, start, np.arange(SECTIONS))
    column = (x == cx) & (y < cy)
    grid = jnp.where(column, jnp.where(y == cy - 1, WALL_TOP, WALL), jnp.where((x == cx) & (y == cy), COIN, grid))
    grid = jnp.where(x > cx, WALL, grid)
    kind, cell, speed, look, crate_cell, crate_look = (t.reshape(-1, *t.shape[2:]) for t in things)
    return Map(grid.astype(jnp.int8), kind, cell, speed, look, crate_cell, crate_look - 1, themes)


def section(dice: Dice, grid, x, y, dif, danger, hard: bool):
    """One stretch of ground or pit, from column x on.

    -> (grid, x, y) after it; hazards' kind, cell, speed, look (HAZARDS, ...); crates' cell, look + 1 (2 PILE, ...).
    """
    dy = jnp.minimum(dice(4) + 1 + dif // 3, 5)
    coin_toss = dice(2, used=(y >= 5) & (y < 20))
    dy = jnp.where((y >= 20) | ((y >= 5) & (coin_toss == 1)), -dy, dy)
    dx = dice(2 * dif) + 3 + dif // 3
    y = jnp.maximum(y + dy, 1)
    deep = (dx > 7) & (y > 3)
    pit = (dice(20, used=deep) >= dif) & deep

    x1, x2 = dice(3, pit) + 1, dice(3, pit) + 1
    width = dx - x1 - x2
    lava = jnp.where(danger == 0, dice(y - 3, pit) + 1, 0)
    of_pit = [hazard(dice, pit & (i < width) & (danger > 0), danger == 2, x + x1 + i, 1) for i in range(HAZARDS)]
    bridge = pit & (width > 4)
    left = dice(2, bridge) + jnp.where(width == 5, 1, 2)
    last = dice(2, bridge)
    length = jnp.where(width == 7, width - left - (last + 2), last + 1)

    flat = ~pit
    saw = flat & (dice(10, flat) < 2 * dif) & (dx > 3)
    saw_x = jnp.where(saw, x + 1 + dice(dx - 2, saw), -1)
    enemy = flat & (dice(10, flat) < dif) & (dx > 3) & hard
    enemy_x = jnp.where(enemy, x + 1 + dice(dx - 2, enemy), -1)
    none = jnp.bool_(False)
    of_flat = [hazard(dice, saw, none, saw_x, y), hazard(dice, enemy, enemy, enemy_x, y)]
    of_flat += [jax.tree.map(jnp.zeros_like, of_flat[0])] * (HAZARDS - 2)
    hazards = [jax.tree.map(lambda a, b: jnp.where(pit, a, b), *pair) for pair in zip(of_pit, of_flat, strict=True)]
    crates = [crate for _ in range(2) for crate in pile(dice, flat, x, y, dx, saw_x, enemy_x)]

    row, column = np.indices((SIZE, SIZE), dtype=np.int32)
    inner = pit & (column >= x + x1) & (column < x + x1 + width)
    ground = (column >= x) & (column < x + dx) & ~inner & (row < y)
    bridged = bridge & (row == y - 1) & (column >= x + x1 + left) & (column < x + x1 + left + length)
    grid = jnp.where(ground, jnp.where(row == y - 1, WALL_TOP, WALL), grid)
    grid = jnp.where(inner & (row >= 1) & (row <= lava), jnp.where(row == lava, LAVA_TOP, LAVA), grid)
    grid = jnp.where(bridged, WALL_TOP, grid)
    before = (column == x - 1) & (row == y) & (grid != WALL) & (grid != WALL_TOP)
    grid = jnp.where(before | ((column == x + dx) & (row == y)), BARRIER, grid)
    stack = lambda rows: [jnp.stack(leaves) for leaves in zip(*rows, strict=True)]
    return (grid, x + dx, y), *stack(hazards), *stack(crates)


def hazard(dice: Dice, there, walks, x, y):
    """A saw, or an enemy if it `walks`: kind, cell, speed, look; all 0 unless `there`."""
    walks = there & walks
    speed = jnp.where(walks, np.float32(0.15) * (2 * dice(2, walks) - 1), 0)
    look = jnp.where(walks, dice(9, walks), 0)
    cell = jnp.where(there, jnp.stack([x, jnp.broadcast_to(y, jnp.shape(x))]), 0)
    return jnp.where(there, jnp.where(walks, ENEMY, SAW), 0), cell, speed, look


def pile(dice: Dice, flat, x, y, dx, saw_x, enemy_x):
    """A pile of crates, perhaps: the cell and look + 1 of each of PILE."""
    column = x + 1 + dice(dx - 2, flat)
    there = flat & (dice(2, flat) == 1) & (column != saw_x) & (column != enemy_x)
    height = dice(3, there) + 1
    crates = []
    for i in range(PILE):
        used = there & (i < height)
        crates.append((jnp.where(used, jnp.stack([column, y + i]), 0), jnp.where(used, dice(4, used) + 1, 0)))
    return crates


def difficulty(seed, hard: bool = True) -> jax.Array:
    """How hard a seed's level is made: 1, 2 or 3."""
    return 1 + (mt19937(seed, 7)[6 if hard else 4] % 3).astype(jnp.int32)


# --- levels as the simulator holds them


class Level(NamedTuple):
    """What a level needs in play, packed: bit y of `columns[x, k]` is set where tile (x, y) is of the kind KINDS[k].

    Rows above 31 look like row 31: the agent can get no higher than row 35, and what is up there is walls of full height.
    """

    columns: jax.Array  # (64, 5) uint32
    tiles: jax.Array  # (32, 8) uint32: what is drawn, 4 bits a tile, tile x in word x // 8
    enemy_x: jax.Array  # (E,) float32: where enemies start
    enemy_v: jax.Array  # (E,) float32: their first velocity, 0 where there is none
    enemy_row: jax.Array  # (E,) int32
    enemy_ends: jax.Array  # (2, E) int32: the tiles to the left and right where they turn
    enemy_slows: jax.Array  # (2, E) bool: whether turning there costs speed
    enemy_crates: jax.Array  # (2, 2, E) bool: whether a crate lies one or two tiles inside the left and right end
    enemy_look: jax.Array  # (E,) int32
    themes: jax.Array  # (3,) int32


WALLS, CRATES, DEADLY, SAWS, COINS = range(5)  # of Level.columns; DEADLY is lava
T_WALL, T_TOP, T_LAVA, T_LAVA_TOP, T_COIN, T_SAW, T_CRATE = range(1, 8)  # of Level.tiles; 0 is nothing; crates have 4 looks
T_SAW2, T_DECOR = 11, 12  # a saw at odd times; 12 to 15 are things in the sky


def pack(map: Map) -> Level:
    """Any map whose walls, lava and things lie below row 31, or are walls up to the ceiling."""
    grid = map.grid.astype(jnp.int32)
    y, x = np.indices((SIZE, SIZE), dtype=np.int32)
    at = lambda cell, used: ((cell[:, 0, None, None] == x) & (cell[:, 1, None, None] == y) & used[:, None, None]).any(0)
    saws = at(map.hazard_cell, map.hazard_kind == SAW)
    looks = [at(map.crate_cell, map.crate_look == look) for look in range(4)]
    wall = (grid == WALL) | (grid == WALL_TOP)
    lava = (grid == LAVA) | (grid == LAVA_TOP)
    layers = jnp.stack([wall, sum(looks) > 0, lava, saws, grid == COIN], -1)[:32]  # (32, 64, 5)
    columns = (layers.astype(jnp.uint32) << np.arange(32, dtype=np.uint32)[:, None, None]).sum(0, dtype=jnp.uint32)
    tiles = jnp.where(saws, T_SAW, jnp.select([grid == k for k in (WALL, WALL_TOP, LAVA, LAVA_TOP, COIN)], range(1, 6), 0))
    for look, there in enumerate(looks):
        tiles = jnp.where(there, T_CRATE + look, tiles)
    sky = (y * np.int32(0x9E37) + x * np.int32(0x79B9) + map.themes[0] * 0x3C6F) * np.int32(0x5BD1)
    decor = jnp.where(((sky >> 8) % 11 == 0) & (y < 31), T_DECOR + (sky >> 16) % 4, 0)
    tiles = jnp.where(tiles == 0, decor, tiles)
    nibbles = tiles[:32].reshape(32, 8, 8).astype(jnp.uint32) << (4 * np.arange(8, dtype=np.uint32))
    walks = map.hazard_kind == ENEMY
    column, row = map.hazard_cell[:, 0], map.hazard_cell[:, 1]
    along = grid[row]  # (E, 64)
    turns = (along == WALL) | (along == WALL_TOP) | (along == BARRIER)
    left = jnp.where(turns & (x[0] < column[:, None]), x[0], -1).max(1)
    right = jnp.where(turns & (x[0] > column[:, None]), x[0], SIZE).min(1)
    crates = jnp.concatenate([sum(looks)[row] > 0, jnp.zeros((len(row), 4), bool)], 1)  # (E, 68)
    beside = lambda at: jnp.take_along_axis(crates, at[:, None], 1)[:, 0]
    inside = jnp.stack([jnp.stack([beside(left + i), beside(right - i)]) for i in (1, 2)])
    slows = jnp.stack([((x[0] == end[:, None]) & (along == WALL)).any(1) for end in (left, right)])
    order = jnp.argsort(~walks, stable=True)  # enemies first
    level = Level(
        columns,
        nibbles.sum(-1, dtype=jnp.uint32),
        jnp.where(walks, column + np.float32(0.5), 0),
        jnp.where(walks, map.hazard_speed, 0),
        row,
        jnp.stack([left, right]),
        slows,
        inside,
        map.hazard_look,
        map.themes,
    )
    return level._replace(**{name: jnp.take(getattr(level, name), order, -1) for name in Level._fields if name.startswith("enemy")})


class EnvParams(NamedTuple):
    levels: Level  # (R, ...): what can be played
    max_steps_in_episode: int | jax.Array = 1000


class EnvState(NamedTuple):
    level: jax.Array  # () int32: which of params.levels
    x: jax.Array  # () float32: the agent's centre
    y: jax.Array
    vx: jax.Array
    vy: jax.Array
    on_crate: jax.Array  # () bool
    look: jax.Array  # () int32: 0 stands, 1 walks, 2 walks (other foot); + 3 to the left
    enemy_x: jax.Array  # (E,) float32
    enemy_v: jax.Array  # (E,) float32
    trail: jax.Array  # (TRAIL, E) float32: where enemies were, the latest first
    time: jax.Array  # () int32


# --- dynamics


def cell(v) -> jax.Array:
    """The tile that a coordinate lies in."""
    return jnp.floor(v).astype(jnp.int32)


def bit(word, row) -> jax.Array:
    """Bit `row` of a column, 0 or 1; row 31 stands for all above."""
    return (word >> jnp.clip(row, 0, 31).astype(jnp.uint32)) & 1


def look_up(view, kind, x, column) -> jax.Array:
    """Column `column` of one kind from the three around an agent that was at x, view (3, 5)."""
    offset = column - cell(x)
    return jnp.where(offset < 0, view[0, kind], jnp.where(offset == 0, view[1, kind], view[2, kind]))


def accelerate(view, x, y, vx, vy, on_crate, move):
    """What the agent's keys do: move () int32 in [0, 9) -> vx, vy, the command left/right and down/up, supported.

    It can jump, and steers five times as fast, when it is supported.
    """
    cmd_x, cmd_y = move // 3 - 1, move % 3 - 1
    under = look_up(view, WALLS, x, cell(x - CORNER)) | look_up(view, WALLS, x, cell(x + CORNER))
    support = (on_crate | (bit(under, cell(y - np.float32(0.5887))) > 0)) & (vy == 0)
    cmd_y = jnp.where(support, cmd_y, jnp.minimum(cmd_y, 0))
    mix = jnp.where(support, MIX, AIR_MIX)
    vx = (1 - mix) * vx + mix * SPEED * cmd_x.astype(jnp.float32)
    vx = jnp.where(jnp.abs(vx) < mix * SPEED, 0, vx)
    fallen = jnp.clip(vy + jnp.where(support, GRAVITY * cmd_y, 0) - GRAVITY, -JUMP, JUMP)
    return vx, jnp.where(cmd_y > 0, JUMP, fallen), cmd_x, cmd_y, support


def move_agent(view, x, y, vx, vy, cmd_x, cmd_y):
    """Moves the agent in 4 to 6 parts of a step, each first along one axis and then along the other.

    view (3, 5) uint32: the columns floor(x) - 1 .. floor(x) + 1 of the level. -> x, y, vx, vy, whether it stands on a crate.
    """
    start_x, last_y = x, y
    column = lambda kind, c: look_up(view, kind, start_x, c)
    num = jnp.maximum((4 * jnp.sqrt(vx * vx + vy * vy)).astype(jnp.int32), 4)
    part = 1 / num.astype(jnp.float32)
    x_first = jnp.where(cmd_y != 0, False, (cmd_x != 0) | (jnp.abs(vx) > jnp.abs(vy)))
    top_crate = cell(last_y - np.float32(1.5787 - 0.01))  # the highest whose top the agent may have been above
    top_crate = top_crate - (last_y < (top_crate + 1).astype(jnp.float32) + AGENT_RY)

    def move_by(x, y, vy, dx, dy):
        """-> x, y, blocked, landed on a crate."""
        horizontal = dx != 0
        nx, ny = x + dx, y + dy
        ry, half = AGENT_RY * np.float32(0.98), np.float32(0.5)
        word = column(WALLS, cell(nx - CORNER)) | column(WALLS, cell(nx + CORNER))
        block = (bit(word, cell(ny - ry)) | bit(word, cell(ny + ry))) > 0
        snap_x = jnp.where(dx > 0, jnp.floor(nx + half) - half, jnp.ceil(nx - half) + half)
        snap_y = jnp.where(dy > 0, jnp.floor(ny + AGENT_RY) - AGENT_RY, jnp.ceil(ny - AGENT_RY) + AGENT_RY)
        nx = jnp.where(block & horizontal, snap_x, nx)
        ny = jnp.where(block & ~horizontal, snap_y, ny)
        left = cell(nx - half)
        off = nx - (left.astype(jnp.float32) + half)
        near = jnp.float32(0.999)
        word = jnp.where(off < near, column(CRATES, left), 0) | jnp.where(1 - off < near, column(CRATES, left + 1), 0)
        landed = jnp.bool_(False)
        falls = ~horizontal & (vy < 0) & (cmd_y >= 0)
        for row in (top_crate, top_crate - 1):
            middle = row.astype(jnp.float32) + half
            hit = falls & ~landed & (row >= 0) & (bit(word, row) > 0) & (jnp.abs(ny - middle) < AGENT_RY + half - np.float32(0.001))
            ny = jnp.where(hit, middle + (half + AGENT_RY), ny)
            landed = landed | hit
        return nx, ny, block | landed, landed

    def substep(i, carry):
        x, y, vx, vy, free_x, free_y, on_crate, going = carry
        zero = jnp.float32(0)
        going = going & (i < num)
        x1, y1, first_blocked, landed = move_by(x, y, vy, jnp.where(x_first, vx * part, zero), jnp.where(x_first, zero, vy * part))
        vy1 = jnp.where(landed, 0, vy)
        x2, y2, second_blocked, landed2 = move_by(
            x1, y1, vy1, jnp.where(x_first, zero, vx * part), jnp.where(x_first, vy1 * part, zero)
        )
        vy2 = jnp.where(landed2, 0, vy1)
        block_x = jnp.where(x_first, first_blocked, second_blocked)
        block_y = jnp.where(x_first, second_blocked, first_blocked)
        keep = lambda new, old: jnp.where(going, new, old)
        return (
            keep(x2, x), keep(y2, y), vx, keep(vy2, vy),
            free_x + (going & ~block_x), free_y + (going & ~block_y),
            on_crate | (going & (landed | landed2)), going & ~(block_x & block_y),
        )  # fmt: skip

    start = (x, y, vx, vy, jnp.int32(0), jnp.int32(0), jnp.bool_(False), jnp.bool_(True))
    x, y, vx, vy, free_x, free_y, on_crate, _ = jax.lax.fori_loop(0, 6, substep, start)
    share = lambda free: free.astype(jnp.float32) / num.astype(jnp.float32)
    return x, y, vx * share(free_x), vy * share(free_y), on_crate


def step_enemies(x, v, ends, slows, stops):
    """One step of the enemies (E,): four quarter steps, mirrored where a turning tile begins.

    slows (2, E) bool: where a turn at the left and right end costs a quarter of the speed. stops (2, 2, E) bool: where it ends the
    step too, and what was not walked is lost from the speed; stops[1] only when the turn is not exactly at the end.
    """
    free, going = jnp.zeros_like(v), jnp.ones_like(v, bool)
    half = np.float32(0.5)
    left, right = (ends[0] + 1).astype(jnp.float32), ends[1].astype(jnp.float32)
    for _ in range(4):
        new = x + v * np.float32(0.25)
        at_left, at_right = new - CORNER < left, new + CORNER >= right
        new = new + 2 * jnp.where(at_left, left - (new - half), jnp.where(at_right, right - (new + half), 0))
        slowed = (at_left & slows[0]) | (at_right & slows[1])
        apart = jnp.where(at_left, new - left, right - new) - half > np.float32(0.001)
        over = jnp.where(at_left, stops[0, 0] | (stops[1, 0] & apart), stops[0, 1] | (stops[1, 1] & apart))
        x = jnp.where(going, new, x)
        v = jnp.where((at_left | at_right) & going, -v, v)
        free = free + (going & ~slowed)
        going = going & ~(slowed & over)
    return x, v * (free * np.float32(0.25))


@partial(jax.jit, static_argnums=1)
def _make_levels(seeds, hard: bool) -> Level:
    return jax.lax.map(lambda seed: pack(make_map(seed, hard)), seeds, batch_size=64)


class CoinRun(Environment):
    """The levels of seeds start_level .. start_level + num_levels - 1, as in Procgen."""

    def __init__(self, hard=True, start_level=0, num_levels=200, monochrome=False, paint_velocity=False):
        require(num_levels >= 1, f"num_levels {num_levels}: must be at least 1")
        require(0 <= start_level < 2**31 - num_levels, f"start_level {start_level}: level seeds lie in [0, 2^31)")
        self.hard, self.start_level, self.num_levels = hard, start_level, num_levels
        self.monochrome, self.paint_velocity = monochrome, paint_velocity

    @property
    def default_params(self) -> EnvParams:
        return EnvParams(self.levels(np.arange(self.start_level, self.start_level + self.num_levels)))

    @property
    def num_actions(self) -> int:
        return 15

    def action_space(self, params=None):
        from gymnax.environments import spaces  # on use only: gymnax starts the backend when it is imported

        return spaces.Discrete(self.num_actions)

    def observation_space(self, params=None):
        from gymnax.environments import spaces

        return spaces.Box(0, 255, (PIXELS, PIXELS, 3), jnp.uint8)

    def levels(self, seeds, blank: bool = False) -> Level:
        """The levels of seeds (R,), numbers in [0, 2^31), with as many places for enemies as the fullest needs, in eights.

        Not for use inside jit: shapes depend on the levels. `blank`: of every level zeros and all places, made without compiling.
        """
        seeds = np.asarray(seeds, np.uint32)
        require(seeds.ndim == 1 and len(seeds) >= 1, f"levels: seeds of shape {seeds.shape}, must be one row of them")
        if blank:
            shapes = jax.eval_shape(_make_levels, seeds, self.hard)
            return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype)), shapes)
        levels = _make_levels(seeds, self.hard)
        places = 8 * max(1, -(-int((levels.enemy_v != 0).sum(1).max()) // 8))
        return Level(*(x[..., :places] if name.startswith("enemy") else x for name, x in levels._asdict().items()))

    def reset_env(self, key, params: EnvParams):
        """A level drawn from params.levels -> obs, state."""
        level = jax.random.randint(key, (), 0, params.levels.themes.shape[0], jnp.int32)
        state = self.reset_to_level(level, params)
        return self.get_obs(state, params), state

    def reset_to_level(self, level, params: EnvParams) -> EnvState:
        """The first state of params.levels[level]."""
        zero, x = jnp.float32(0), params.levels.enemy_x[level]
        trail = jnp.full((TRAIL, *x.shape), -100.0, jnp.float32)
        return EnvState(
            jnp.int32(level), jnp.float32(1.5), 1 + jnp.float32(AGENT_RY), zero, zero, jnp.bool_(False), jnp.int32(1),
            x, params.levels.enemy_v[level], trail, jnp.int32(0),
        )  # fmt: skip

    def step_env(self, key, state: EnvState, action, params: EnvParams):
        """-> obs, state, reward, terminated, info."""
        levels, level = params.levels, state.level
        move = jnp.where(action < 9, action, 4)
        view = jnp.stack([levels.columns[level, jnp.clip(cell(state.x) + i, 0, SIZE - 1)] for i in (-1, 0, 1)])
        vx, vy, cmd_x, cmd_y, support = accelerate(view, state.x, state.y, state.vx, state.vy, state.on_crate, move)
        # The game takes an enemy in a crate for the agent on it, when the agent falls from above the crate.
        above = (vy < 0) & (cmd_y >= 0) & (state.y >= (levels.enemy_row[level] + 1).astype(jnp.float32) + AGENT_RY)
        stops = levels.enemy_crates[level] & above
        ends, slows = levels.enemy_ends[level], levels.enemy_slows[level]
        enemy_x, enemy_v = step_enemies(state.enemy_x, state.enemy_v, ends, slows, stops)
        x, y, vx, vy, on_crate = move_agent(view, state.x, state.y, vx, vy, cmd_x, cmd_y)
        time = state.time + 1
        stands = (jnp.abs(vx) < np.float32(0.01)) & (cmd_x == 0) & support
        look = jnp.where(stands, 0, jnp.where((time // 5 % 2 == 0) | ~support, 1, 2))
        to_left = jnp.where(cmd_x == 0, state.look >= 3, cmd_x < 0)
        alive = levels.enemy_v[level] != 0
        met = (
            alive
            & (jnp.abs(enemy_x - x) < 1)
            & (jnp.abs(levels.enemy_row[level] + np.float32(0.5) - y) < AGENT_RY + np.float32(0.5))
        )
        touched = touching(levels.columns, level, x, y)
        died = met.any() | touched[DEADLY] | touched[SAWS]
        trail = jnp.concatenate([state.enemy_x[None], state.trail[:-1]])
        state = EnvState(level, x, y, vx, vy, on_crate, look + 3 * to_left.astype(jnp.int32), enemy_x, enemy_v, trail, time)
        reward = jnp.where(touched[COINS], jnp.float32(10), 0)
        return self.get_obs(state, params), state, reward, died | touched[COINS], {}

    def get_obs(self, state: EnvState, params: EnvParams, key=None) -> jax.Array:
        """The picture."""
        return self.render(state, params)

    def render(self, state: EnvState, params: EnvParams) -> jax.Array:
        """The picture of a state: (64, 64, 3) uint8."""
        image = monochrome(state, params.levels) if self.monochrome else picture(state, params.levels)
        if self.paint_velocity:
            image = paint_velocity(image, state.vx, state.vy)
        return to_bytes(image)


def touching(columns, level, x, y):
    """(5,) bool: which kinds of tile the agent's box touches. Saws are things with a box of their own, others fill their tile."""
    eps = np.float32(0.001)
    left, right = cell(x - (np.float32(0.5) - eps)), cell(x + (np.float32(0.5) - eps))
    low, high = cell(y - (AGENT_RY - eps)), cell(y + (AGENT_RY - eps))
    words = columns[level, left] | columns[level, right]
    rows = (jnp.uint32(2) << jnp.minimum(high, 31).astype(jnp.uint32)) - (jnp.uint32(1) << jnp.clip(low, 0, 31).astype(jnp.uint32))
    touched = (words & rows) > 0
    first = cell(x - np.float32(0.5))
    off = x - np.float32(0.5) - first.astype(jnp.float32)
    words = columns[level, first, SAWS] | jnp.where(off > 0, columns[level, first + 1, SAWS], 0)
    row = cell(y - np.float32(0.5))
    saw = jnp.bool_(False)
    for r in (row - 1, row, row + 1, row + 2):
        near = jnp.abs(r.astype(jnp.float32) + np.float32(0.5) - y) < AGENT_RY + np.float32(0.5)
        saw = saw | (near & (r >= 0) & (bit(words, r) > 0))
    return jnp.where(np.arange(5) == SAWS, saw, touched)


# --- playing


def random_policy(key, state: EnvState, params: EnvParams) -> jax.Array:
    """The case study's policy: uniform over all 15 actions."""
    return jax.random.randint(key, (), 0, 15, jnp.int32)


class Clip(NamedTuple):
    """Frames and what happened between them. Where `done[t]` is set, frame t + 1 is the first of another episode."""

    frames: jax.Array  # (T, 64, 64, 3) uint8
    actions: jax.Array  # (T,) int32: taken at frame t
    rewards: jax.Array  # (T,) float32: for that action
    done: jax.Array  # (T,) bool: that action ended the episode, for either reason
    levels: jax.Array  # (T,) int32: the place in params.levels of frame t


def play_clip(key, env: CoinRun, params: EnvParams, policy, num_steps: int, state: EnvState | None = None) -> tuple[EnvState, Clip]:
    """Plays `num_steps` steps with auto-reset, from a random level or from `state` -> the last state, and a Clip.

    policy: (key, state, params) -> action. For many clips at once, vmap over keys.
    """
    key_reset, key_steps = jax.random.split(key)
    if state is None:
        _, state = env.reset_env(key_reset, params)

    def step(state, key):
        key_act, key_env = jax.random.split(key)
        action = policy(key_act, state, params)
        _, after, reward, terminated, truncated, _ = env.step(key_env, state, action, params)
        return after, Clip(env.render(state, params), action, reward, terminated | truncated, state.level)

    return jax.lax.scan(step, state, jax.random.split(key_steps, num_steps))


# --- pictures: (64, 64) uint32, red + 256 green + 65536 blue, until the end


PIXELS = 64
PER_TILE = np.float32(PIXELS / 13)  # pixels a tile
GAP = np.float32(0.02)  # by how much the game draws tiles too large, in tiles


def rgb(red, green, blue) -> np.uint32:
    return np.uint32(red + 256 * green + 65536 * blue)


def pixel_centres(state: EnvState):
    """World coordinates of the pixels' columns and rows, (64,) each. The agent is in the middle."""
    offset = (np.arange(PIXELS, dtype=np.float32) + np.float32(0.5)) / PER_TILE - np.float32(6.5)
    return state.x + offset, state.y - offset


def tile_at(levels: Level, level, x, y) -> jax.Array:
    """What is drawn in tiles (x, y), whatever their shape; outside of the world is wall."""
    word = levels.tiles[level, jnp.clip(y, 0, 31), jnp.clip(x, 0, SIZE - 1) // 8]
    code = (word >> (4 * (x & 7)).astype(jnp.uint32)) & 15
    return jnp.where((y < 0) | (x < 0) | (x >= SIZE), T_WALL, code.astype(jnp.int32))


def run_mask(first, last) -> jax.Array:
    """Pixels first .. last - 1 of a row as bits of two words: (...,) int32 -> (2, ...) uint32."""
    below = lambda n: jnp.where(n >= 32, np.uint32(0xFFFFFFFF), (np.uint32(1) << jnp.clip(n, 0, 31).astype(jnp.uint32)) - 1)
    return jnp.stack([below(last - 32 * i) & ~below(first - 32 * i) for i in (0, 1)])


def to_columns(state: EnvState, x) -> jax.Array:
    """The first column of pixels whose centres lie at x or to the right of it."""
    return cell((x - state.x + np.float32(6.5)) * PER_TILE + np.float32(0.5))


def to_rows(state: EnvState, y) -> jax.Array:
    """The first row of pixels whose centres lie at y or below."""
    return cell((state.y - y + np.float32(6.5)) * PER_TILE + np.float32(0.5))


def union(masks, rows, pixel_rows, slot) -> jax.Array:
    """Which pixels are in any of E stamps: (64, 64) bool.

    masks (2, I, E): row i of each stamp; rows (E,): the tile row that a stamp lies in; pixel_rows (64,): the tile row of each row
    of pixels; slot (64,): which row of a stamp would be there (none outside of [0, I)).
    """
    masks = jax.lax.optimization_barrier(masks)  # else they are computed anew for every row
    num, lowest = masks.shape[1], pixel_rows[-1]
    by_row = jnp.where(rows == lowest + np.arange(15)[:, None], masks[:, :, None], np.uint32(0))  # (2, I, 15, E)
    by_row = jax.lax.reduce(by_row, np.uint32(0), jax.lax.bitwise_or, (3,)).reshape(2, num * 15)
    words = by_row[:, jnp.clip(slot, 0, num - 1) * 15 + pixel_rows - lowest]
    return expand(jnp.where((slot >= 0) & (slot < num), words, np.uint32(0)))


def expand(words) -> jax.Array:
    """Rows of 64 bits, (2, 64) uint32, as a (64, 64) bool image."""
    columns = np.arange(PIXELS, dtype=np.int32)
    word = jnp.where(columns < 32, words[0][:, None], words[1][:, None])
    return ((word >> (columns % 32).astype(np.uint32)) & 1) > 0


def trails(state: EnvState, rows, pixel_rows) -> jax.Array:
    """The pixels of the puffs that enemies leave, which grow, rise, and go after TRAIL steps: (64, 64) bool."""
    age = np.arange(TRAIL + 1, dtype=np.float32)
    growth = np.float32(1.05) ** age
    x = jnp.concatenate([state.enemy_x[None], state.trail])  # (TRAIL + 1, E)
    rx, ry, up = np.float32(0.3) * growth, np.float32(0.2) * growth, np.float32(0.25) + np.float32(0.01) * age
    left, right = to_columns(state, x - rx[:, None]), to_columns(state, x + rx[:, None])
    row = pixel_rows[:, None].astype(jnp.float32)  # puffs stay within their tile row
    top, bottom = to_rows(state, row + (up + ry)), to_rows(state, row + (up - ry))  # (64, TRAIL + 1)
    index = np.arange(PIXELS)
    oldest = (index[:, None] >= top) & (index[:, None] < bottom)  # these rows show puffs of at least some age
    oldest = jnp.where(oldest, TRAIL + 1 - np.arange(TRAIL + 1), 0).max(1)  # how many of the oldest ages they show
    masks = jnp.where((age < state.time)[:, None] & (state.enemy_v != 0), run_mask(left, right), np.uint32(0))
    masks = jax.lax.associative_scan(jnp.bitwise_or, masks[:, ::-1], axis=1)
    return union(masks, rows, pixel_rows, oldest - 1)


def game_colour(kind: int) -> np.uint32:
    """The colour of a kind of thing in the game's monochrome mode."""
    c = 29 * (kind + 1) % 64
    return rgb(64 * (c // 16 + 1) - 1, 64 * (c // 4 % 4 + 1) - 1, 64 * (c % 4 + 1) - 1)


CODE_KINDS = [None, WALL, WALL_TOP, LAVA, LAVA_TOP, COIN, SAW, CRATE, CRATE, CRATE, CRATE, SAW + 1, None, None, None, None]
FLAT = np.array([0 if kind is None else game_colour(kind) for kind in CODE_KINDS], np.uint32)


def monochrome(state: EnvState, levels: Level) -> jax.Array:
    """The game's `use_monochrome_assets` with `restrict_themes` and no backgrounds, pixel for pixel."""
    level, (x, y) = state.level, pixel_centres(state)
    x, y = x[None], y[:, None]
    at = lambda x, y: tile_at(levels, level, cell(x), cell(y))
    ground = jnp.zeros((PIXELS, PIXELS), jnp.int32)
    for dx, dy in ((-1, -1), (-1, 1), (1, -1), (1, 1)):  # drawn column by column, upwards
        code = at(x + dx * GAP, y + dy * GAP)
        ground = jnp.where((code > 0) & (code < T_SAW), code, ground)
    thing = at(x, y)
    thing = jnp.where((thing == T_SAW) & (state.time % 2 == 1), T_SAW2, thing)
    image = jnp.asarray(FLAT)[jnp.where((thing >= T_SAW) & (thing <= T_SAW2), thing, ground)]
    rows, pixel_rows = levels.enemy_row[level], cell(y[:, 0])
    image = jnp.where(trails(state, rows, pixel_rows), game_colour(59), image)
    look, agent = state.look % 3, [game_colour(kind) for kind in (0, 12, 13)]
    image = image.at[29:35, 30:34].set(jnp.where(look == 0, agent[0], jnp.where(look == 1, agent[1], agent[2])))
    half = np.float32(0.5)
    masks = run_mask(to_columns(state, state.enemy_x - half), to_columns(state, state.enemy_x + half))
    masks = jnp.where(levels.enemy_v[level] != 0, masks, np.uint32(0))
    enemies = union(masks[:, None], rows, pixel_rows, jnp.zeros(PIXELS, jnp.int32))
    return jnp.where(enemies, jnp.where(state.time // 5 % 2 == 0, game_colour(6), game_colour(7)), image)


def paint_velocity(image, vx, vy) -> jax.Array:
    """The game's `paint_vel_info`: two grey squares for the agent's velocity, left/right and down/up."""
    half = np.float32(0.5)
    for i, (v, top) in enumerate(((vx, SPEED), (vy, JUMP))):
        part = half * v / top  # the game adds the half in double precision: carry what float32 loses
        lost = (half * v - part) - (top - 1) * part  # exact, as top - 1 is 0.5 or -0.5
        total = jax.lax.optimization_barrier(half + part)  # else XLA takes (half + part) - half for part
        total = total + ((part - (total - half)) + lost / top)
        shade = jnp.clip(total * 255, 0, 255).astype(jnp.uint32)
        image = image.at[:13, 13 * i : 13 * (i + 1)].set(shade * rgb(1, 1, 1))
    return image


def to_bytes(image) -> jax.Array:
    """(64, 64) uint32 colours -> (64, 64, 3) uint8, four pixels in three words at a time."""
    p = [image[:, i::4] for i in range(4)]
    words = jnp.stack([p[0] | p[1] << 24, p[1] >> 8 | p[2] << 16, p[2] >> 16 | p[3] << 8], -1)
    return jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(PIXELS, PIXELS, 3)


# --- our own sprites: 8 x 8 texels a tile, the agent 6 x 10 pixels


INKS = {
    "k": (36, 34, 46),
    "w": (245, 245, 245),
    "y": (255, 205, 60),
    "o": (214, 150, 30),
    "s": (170, 178, 190),
    "d": (112, 120, 134),
    "r": (232, 78, 40),
    "l": (255, 150, 60),
    "b": (176, 122, 70),
    "n": (128, 84, 46),
    "c": (226, 236, 246),
}
GROUNDS = [  # body, darker body, top, darker top
    ((134, 94, 62), (112, 76, 50), (166, 120, 80), (146, 104, 68)),  # dirt
    ((134, 94, 62), (112, 76, 50), (98, 186, 72), (76, 152, 58)),  # grass
    ((112, 92, 138), (92, 74, 116), (196, 150, 206), (164, 122, 176)),  # planet
    ((216, 186, 122), (194, 164, 102), (240, 216, 158), (222, 196, 136)),  # sand
    ((150, 168, 190), (130, 148, 172), (246, 250, 255), (214, 226, 240)),  # snow
    ((128, 130, 134), (106, 108, 114), (168, 170, 174), (146, 148, 154)),  # stone
]
AGENTS = [(236, 196, 150), (82, 140, 230), (92, 190, 100), (240, 130, 180), (246, 214, 82)]
SKIES = [  # top, bottom
    ((96, 160, 226), (190, 222, 244)),
    ((62, 74, 130), (150, 130, 176)),
    ((236, 160, 110), (250, 218, 168)),
    ((44, 52, 84), (86, 104, 146)),
    ((120, 190, 190), (210, 236, 222)),
    ((150, 120, 170), (228, 196, 214)),
    ((84, 132, 120), (186, 208, 172)),
    ((110, 110, 120), (190, 190, 196)),
]
SPRITES = {  # rows from the top; "." lets the sky through; 1 2 3 4 are the ground's colours
    T_WALL: "11111111 11211111 11111111 11111121 11111111 12111111 11111211 11111111",
    T_TOP: "33333333 33333333 43343343 14114114 11111111 11211111 11111121 11111111",
    T_LAVA: "rrrrrrrr rrrlrrrr rrrrrrrr rrrrrrlr rrrrrrrr rlrrrrrr rrrrrrrr rrrrlrrr",
    T_LAVA_TOP: "........ l..ll..l llllllll rlrrlrrl rrrrrrrr rrrlrrrr rrrrrrrr rlrrrrlr",
    T_COIN: "........ ..yyyy.. .ywwyyo. .ywyyyo. .yyyyyo. .yyyyoo. ..yooo.. ........",
    T_SAW: "........ s..ss..s .ssssss. sssddsss .sdkkds. ssdkkdss ssssssss dddddddd",
    T_SAW2: "........ ..s..s.. ssssssss .ssddss. ssdkkdss .sdkkds. ssssssss dddddddd",
    T_CRATE: "nnnnnnnn nbbbbbbn nbbbbbbn nnnnnnnn nnnnnnnn nbbbbbbn nbbbbbbn nnnnnnnn",
    T_CRATE + 1: "nnnnnnnn nnbbbbnn nbnbbnbn nbbnnbbn nbbnnbbn nbnbbnbn nnbbbbnn nnnnnnnn",
    T_CRATE + 2: "nnnnnnnn nbbbbbbn nbbbbbbn nbbbbbbn nbbbbbbn nbbbbbbn nbbbbbbn nnnnnnnn",
    T_CRATE + 3: "nnnnnnnn nbbrrbbn nbbrrbbn nbbrrbbn nbbrrbbn nbbbbbbn nbbrrbbn nnnnnnnn",
    T_DECOR: "........ ........ ..ccc... .ccccc.. cccccccc cccccccc ........ ........",
    T_DECOR + 1: "........ ...c.... ..ccc... ...c.... ........ ........ ........ ........",
    T_DECOR + 2: "........ ........ ........ .....ccc ...ccccc ..cccccc ........ ........",
    T_DECOR + 3: "........ ........ ........ ........ ......c. .....ccc ......c. ........",
}  # fmt: skip
STANDS = "..aa.. .aaaa. .awka. .aaaa. ..aa.. .bbbb. .bbbb. .bbbb. .a..a. .a..a."
WALKS = "..aa.. .aaaa. .aawk. .aaaa. ..aa.. .bbbb. bbbbb. .bbbb. .a.aa. a....."
WALKS2 = "..aa.. .aaaa. .aawk. .aaaa. ..aa.. .bbbb. .bbbbb .bbbb. .aaa.. ....a."
ENEMY_BODY = np.array([0b01110, 0b11111, 0b11111, 0b11111, 0b10101], np.uint32)  # bit 0 is the leftmost pixel
ENEMY_EYES = np.array([0b00000, 0b00010, 0b00010, 0b00000, 0b00000], np.uint32)  # looks to the left
BODY_COLOURS = [(178, 70, 150), (70, 130, 90), (196, 84, 62)]  # of enemies and, darker, of what they leave


def sprite(rows: str, inks: dict) -> np.ndarray:
    """A sprite's colours, 0 where nothing is drawn."""
    return np.array([[0 if c == "." else rgb(*inks[c]) for c in row] for row in rows.split()], np.uint32)


def _tiles() -> tuple[np.ndarray, np.ndarray]:
    """(8, 16) uint32: 8 texels of 4 bits for every row of every kind of tile; (6, 16): their inks on each ground, 0 is sky."""
    names = ".1234" + "kwyosdrlbnc"
    words = np.zeros((8, 16), np.uint32)
    for code, rows in SPRITES.items():
        for v, row in enumerate(rows.split()):
            words[v, code] = sum(names.index(c) << 4 * u for u, c in enumerate(row))
    return words, np.array([[0, *(rgb(*c) for c in ground), *(rgb(*INKS[c]) for c in names[5:])] for ground in GROUNDS], np.uint32)


def _agents() -> np.ndarray:
    """(5, 6, 10, 6) uint32: the colours of each agent in each look."""
    looks = []
    for colour in AGENTS:
        inks = INKS | {"a": colour, "b": tuple(int(0.75 * v) for v in colour)}
        right = [sprite(rows, inks) for rows in (STANDS, WALKS, WALKS2)]
        looks.append(right + [look[:, ::-1] for look in right])
    return np.array(looks)


(TILE_WORDS, TILE_INKS), AGENT_LOOKS = _tiles(), _agents()


def sky(levels: Level, level, y) -> jax.Array:
    """The sky's colour in rows at heights y (64,): (64,) uint32, in 16 bands over the world's lower half."""
    ends = jnp.asarray(np.array(SKIES, np.float32))[levels.themes[level, 0] % len(SKIES)]  # (2, 3)
    high = jnp.floor(jnp.clip(y / 2, 0, 16)) / 16
    channels = (ends[0] * high[:, None] + ends[1] * (1 - high[:, None])).astype(jnp.uint32)
    return channels[:, 0] | channels[:, 1] << 8 | channels[:, 2] << 16


def pick_from(table, index) -> jax.Array:
    """table[index] of a power of two of entries that broadcast, by a tree of selects: gathers are slow on CPU."""
    table = list(table)
    while len(table) > 1:
        odd = (index & 1) > 0
        table, index = [jnp.where(odd, b, a) for a, b in zip(table[::2], table[1::2], strict=True)], index >> 1
    return table[0]


def place(bits, left) -> jax.Array:
    """Bits whose lowest one is the pixel `left` of a row, as two words: (...,) -> (2, ...) uint32."""
    shift = lambda n: jnp.clip(n, 0, 31).astype(jnp.uint32)
    word = lambda n: jnp.where(n >= 32, 0, jnp.where(n >= 0, bits << shift(n), jnp.where(n > -32, bits >> shift(-n), 0)))
    return jnp.stack([word(left), word(left - 32)])


def picture(state: EnvState, levels: Level) -> jax.Array:
    """What a player sees."""
    level, (x, y) = state.level, pixel_centres(state)
    column, row = cell(x), cell(y)
    word = jnp.clip(row, 0, 31)[:, None], column[0] // 8 + np.arange(3)  # (64, 1), (3,)
    words = levels.tiles[level, word[0], jnp.clip(word[1], 0, 7)]
    words = jnp.where((row[:, None] < 0) | (word[1] < 0) | (word[1] > 7), np.uint32(0x11111111 * T_WALL), words)  # (64, 3)
    nibble = (column - 8 * word[1][0]).astype(jnp.uint32)  # (64,) in [0, 24)
    chosen = jnp.where(nibble < 8, words[:, :1], jnp.where(nibble < 16, words[:, 1:2], words[:, 2:]))
    code = ((chosen >> (4 * (nibble & 7))) & 15).astype(jnp.int32)
    code = jnp.where((code == T_SAW) & (state.time % 2 == 1), T_SAW2, code)
    u, v = ((x - column.astype(jnp.float32)) * 8).astype(jnp.int32), ((row + 1 - y) * 8).astype(jnp.int32)
    texels = pick_from(TILE_WORDS, jnp.clip(v, 0, 7)[:, None])  # (64, 16): a row of each kind of tile, 8 texels of 4 bits
    texel = pick_from([texels[:, i, None] for i in range(16)], code) >> (4 * jnp.clip(u, 0, 7)).astype(jnp.uint32)
    inks = jnp.asarray(TILE_INKS)[levels.themes[level, 2]]
    image = pick_from([sky(levels, level, y)[:, None], *inks[1:]], texel)

    half, rows = np.float32(0.5), levels.enemy_row[level]
    body = jnp.asarray(np.array([rgb(*c) for c in BODY_COLOURS]))[levels.themes[level, 0] % 3]
    image = jnp.where(trails(state, rows, row), ((body >> 1) & np.uint32(0x7F7F7F)) + rgb(96, 96, 96), image)
    slot = np.arange(PIXELS) - to_rows(state, (row + 1).astype(jnp.float32))
    left = to_columns(state, state.enemy_x - half)
    there = levels.enemy_v[level] != 0
    image = jnp.where(union(place(jnp.where(there, ENEMY_BODY[:, None], 0), left), rows, row, slot), body, image)
    eyes = jnp.where(state.enemy_v > 0, ENEMY_EYES[:, None] << 2, ENEMY_EYES[:, None])
    image = jnp.where(union(place(jnp.where(there, eyes, 0), left), rows, row, slot), rgb(*INKS["k"]), image)
    agent = jnp.asarray(AGENT_LOOKS)[levels.themes[level, 1], state.look]
    return image.at[25:35, 29:35].set(jnp.where(agent == 0, image[25:35, 29:35], agent))
