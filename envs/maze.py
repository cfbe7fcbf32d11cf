"""AMaze: a partially observed grid maze whose levels are data, as in minimax (2311.12716), which follows MiniGrid and DCD.

obs      image (5, 5, 3) uint8, MiniGrid's (object, colour, state) codes of what lies ahead; direction int32. The agent stands in
         the bottom row, middle column, looks up, and sees through walls; what is outside the map looks like wall.
actions  0 turn left, 1 turn right, 2 forward, 3 to 6 nothing (kept so that a policy has MiniGrid's seven outputs)
reward   1 - 0.9 (t + 1) / T on walking into the goal at step t (from 0), else 0; T = max_steps_in_episode
ends     goal reached (terminated), or T steps taken (truncated)

Positions are (x, y), x to the right and y down; maps are indexed [y, x]; directions are 0 right, 1 down, 2 left, 3 up. The one-cell
border of a MiniGrid maze is not stored: a "15 x 15" maze is 13 x 13 here. A level may have any shape, read off `walls`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.env import Environment

DIRECTIONS = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.int32)
EMPTY, WALL, GOAL = 0, 1, 2
CODES = np.array([[1, 0, 0], [2, 5, 0], [8, 1, 0]], np.uint8)  # MiniGrid's object, colour, state of each kind
VIEW = 5
TILE = 8  # pixels


class Level(NamedTuple):
    """What a designer may choose."""

    walls: jax.Array  # (H, W) bool
    agent_pos: jax.Array  # (2,) int32
    agent_dir: jax.Array  # () int32
    goal_pos: jax.Array  # (2,) int32


class EnvState(NamedTuple):
    walls: jax.Array  # (H, W) bool
    goal_pos: jax.Array  # (2,) int32
    agent_pos: jax.Array  # (2,) int32
    agent_dir: jax.Array  # () int32
    time: jax.Array  # () int32


class EnvParams(NamedTuple):
    max_steps_in_episode: int | jax.Array = 250


class Observation(NamedTuple):
    image: jax.Array  # (5, 5, 3) uint8
    direction: jax.Array  # () int32


def _view_offsets() -> np.ndarray:
    """(4, 25, 2): for each direction, the offset (x, y) of each cell of the view from the agent, row by row."""
    rows, cols = np.meshgrid(np.arange(VIEW), np.arange(VIEW), indexing="ij")
    ahead, right = (VIEW - 1 - rows).reshape(-1, 1), (cols - VIEW // 2).reshape(-1, 1)
    return np.stack([ahead * DIRECTIONS[d] + right * DIRECTIONS[(d + 1) % 4] for d in range(4)]).astype(np.int32)


VIEW_OFFSETS = _view_offsets()


class Maze(Environment):
    """The student's world. `sample_level` draws `num_walls` cells with replacement, as minimax's generator does."""

    def __init__(self, height: int = 13, width: int = 13, num_walls: int = 60):
        self.height, self.width, self.num_walls = height, width, num_walls

    @property
    def default_params(self) -> EnvParams:
        return EnvParams()

    @property
    def num_actions(self) -> int:
        return 7

    def action_space(self, params=None):
        from gymnax.environments import spaces  # on use only: gymnax starts the backend when it is imported

        return spaces.Discrete(self.num_actions)

    def observation_space(self, params=None):
        from gymnax.environments import spaces

        image = spaces.Box(0, 10, (VIEW, VIEW, 3), jnp.uint8)
        return spaces.Dict({"image": image, "direction": spaces.Discrete(4)})

    def reset_env(self, key, params: EnvParams):
        """A random level -> obs, state."""
        state = self.reset_to_level(self.sample_level(key), params)
        return self.get_obs(state, params), state

    def reset_to_level(self, level: Level, params: EnvParams) -> EnvState:
        """The first state of a level."""
        return EnvState(level.walls, level.goal_pos, level.agent_pos, level.agent_dir, jnp.int32(0))

    def step_env(self, key, state: EnvState, action, params: EnvParams):
        """-> obs, state, reward, terminated, info. Walking into the goal ends the episode; the agent does not move."""
        height, width = state.walls.shape
        turn = jnp.where(action == 0, 3, jnp.where(action == 1, 1, 0))
        ahead = state.agent_pos + (action == 2) * jnp.asarray(DIRECTIONS)[state.agent_dir]
        ahead = jnp.clip(ahead, 0, np.int32([width - 1, height - 1]))
        reached = (action == 2) & (ahead == state.goal_pos).all()
        blocked = reached | _at(state.walls, ahead)
        time = state.time + 1
        reward = jnp.where(reached, 1 - 0.9 * time.astype(jnp.float32) / params.max_steps_in_episode, 0.0)
        state = state._replace(
            agent_pos=jnp.where(blocked, state.agent_pos, ahead),
            agent_dir=(state.agent_dir + turn) % 4,
            time=time,
        )
        return self.get_obs(state, params), state, reward, reached, {}

    def get_obs(self, state: EnvState, params=None, key=None) -> Observation:
        """What the agent sees."""
        height, width = state.walls.shape
        cells = state.agent_pos + jnp.asarray(VIEW_OFFSETS)[state.agent_dir]  # (25, 2)
        inside = (cells >= 0).all(-1) & (cells < np.int32([width, height])).all(-1)
        is_wall = _at(state.walls, jnp.clip(cells, 0, np.int32([width - 1, height - 1]))) | ~inside
        is_goal = (cells == state.goal_pos).all(-1)[:, None]
        image = jnp.where(is_wall[:, None], CODES[WALL], jnp.where(is_goal, CODES[GOAL], CODES[EMPTY]))
        return Observation(image.reshape(VIEW, VIEW, 3), state.agent_dir)

    def sample_level(self, key) -> Level:
        """A random level: walls, then the agent and its direction, then the goal, each uniform over what is free."""
        key_walls, key_place = jax.random.split(key)
        cells = jax.random.randint(key_walls, (self.num_walls,), 0, self.height * self.width, jnp.int32)
        walls = jnp.zeros(self.height * self.width, bool).at[cells].set(True)
        return place(key_place, walls.reshape(self.height, self.width))

    def mutate_level(self, key, level: Level, num_edits: int) -> Level:
        """`num_edits` random edits, each uniformly one of: nothing; flip a cell; move the goal to a free cell.

        The flipped cell is neither the agent's nor the goal's; the agent stays. ACCEL's operators (2203.01302) as minimax has them.
        """

        def edit(level, key):
            key_kind, key_flip, key_goal = jax.random.split(key, 3)
            kind = jax.random.randint(key_kind, (), 0, 3, jnp.int32)
            shape = level.walls.shape
            agent, goal = one_hot(level.agent_pos, shape), one_hot(level.goal_pos, shape)
            flip = one_hot(random_cell(key_flip, ~(agent | goal)), shape) & ~(agent | goal) & (kind == 1)
            goal_pos = random_cell(key_goal, ~(level.walls | agent | goal))
            goal_pos = jnp.where((kind == 2) & ~(level.walls | agent | goal).all(), goal_pos, level.goal_pos)
            return level._replace(walls=level.walls ^ flip, goal_pos=goal_pos), None

        return jax.lax.scan(edit, level, jax.random.split(key, num_edits))[0]

    def render(self, state: EnvState | Level) -> jax.Array:
        """A picture of a state or a level, border included: ((H + 2) TILE, (W + 2) TILE, 3) uint8."""
        shape = state.walls.shape
        kinds = jnp.where(state.walls, WALL, jnp.where(one_hot(state.goal_pos, shape), GOAL, EMPTY))
        kinds = jnp.where(one_hot(state.agent_pos, shape), 3 + state.agent_dir, kinds)
        tiles = jnp.asarray(TILES)[jnp.pad(kinds, 1, constant_values=WALL)]  # (H + 2, W + 2, TILE, TILE, 3)
        return tiles.transpose(0, 2, 1, 3, 4).reshape(TILE * (shape[0] + 2), TILE * (shape[1] + 2), 3)


def _at(grid, pos):
    """grid[y, x] for pos (..., 2), by one flat gather."""
    return grid.reshape(-1)[pos[..., 1] * grid.shape[1] + pos[..., 0]]


def one_hot(pos, shape) -> jax.Array:
    """An (H, W) bool map that is set at `pos` alone."""
    return (jnp.arange(shape[0])[:, None] == pos[1]) & (jnp.arange(shape[1]) == pos[0])


def random_cell(key, free) -> jax.Array:
    """A uniformly random cell (x, y) among those set in `free` (H, W)."""
    count = jnp.cumsum(free.reshape(-1), dtype=jnp.int32)
    index = jnp.searchsorted(count, jax.random.randint(key, (), 0, jnp.maximum(count[-1], 1), jnp.int32), side="right")
    index = jnp.minimum(index, free.size - 1)
    return jnp.stack([index % free.shape[1], index // free.shape[1]]).astype(jnp.int32)


def place(key, walls) -> Level:
    """Puts an agent, its direction and a goal into a map, uniformly over its free cells (at least two)."""
    key_agent, key_dir, key_goal = jax.random.split(key, 3)
    agent_pos = random_cell(key_agent, ~walls)
    goal_pos = random_cell(key_goal, ~walls & ~one_hot(agent_pos, walls.shape))
    return Level(walls, agent_pos, jax.random.randint(key_dir, (), 0, 4, jnp.int32), goal_pos)


def embed(level: Level, height: int, width: int) -> Level:
    """The same level on a larger map filled up with walls: it looks and plays the same, since outside is wall anyway."""
    pad = [(0, height - level.walls.shape[0]), (0, width - level.walls.shape[1])]
    return level._replace(walls=jnp.pad(level.walls, pad, constant_values=True))


# --- the solver


def shortest_solution(level: Level) -> tuple[jax.Array, jax.Array]:
    """The fewest actions that reach the goal, turns included, and the fewest cells to walk; both int32, 0 if unsolvable."""
    height, width = level.walls.shape
    start = one_hot(level.agent_pos, level.walls.shape)
    goal = one_hot(level.goal_pos, level.walls.shape)
    facing = (jnp.arange(4) == level.agent_dir)[:, None, None]

    def forward(reached):  # (4, H, W): move each direction's map one cell that way
        right, down, left, up = reached
        return jnp.stack([
            jnp.pad(right, ((0, 0), (1, 0)))[:, :width],
            jnp.pad(down, ((1, 0), (0, 0)))[:height],
            jnp.pad(left, ((0, 0), (0, 1)))[:, 1:],
            jnp.pad(up, ((0, 1), (0, 0)))[1:],
        ]) & ~level.walls  # fmt: skip

    def expand_poses(reached):
        return reached | jnp.roll(reached, 1, 0) | jnp.roll(reached, -1, 0) | forward(reached)

    def expand_cells(reached):
        return reached | forward(jnp.broadcast_to(reached.any(0), reached.shape))

    def distance(expand, reached):
        def going_on(carry):
            reached, before, _ = carry
            return ~(reached & goal).any() & (reached != before).any()

        def step(carry):
            reached, _, steps = carry
            return expand(reached), reached, steps + 1

        reached, _, steps = jax.lax.while_loop(going_on, step, (reached, jnp.zeros_like(reached), jnp.int32(0)))
        return jnp.where((reached & goal).any(), steps, 0)

    return distance(expand_poses, start & facing), distance(expand_cells, jnp.broadcast_to(start, (4, height, width)))


# --- held-out mazes (layouts: benchmark data of the DCD line, 2010.03934; hexadecimal rows, most significant bit = x 0)


class FixedMaze(NamedTuple):
    size: int
    rows: str
    agent: tuple[int, int]
    direction: int
    goals: list[tuple[int, int]]

    @property
    def time_limit(self) -> int:
        """minimax's: 2 (H + 2) (W + 2)."""
        return 2 * (self.size + 2) ** 2


HELD_OUT = {
    "SixteenRooms": FixedMaze(13, "0248 0008 0240 176e 0200 0048 1add 0208 0240 0f6b 0248 0040 0208", (1, 1), 0, [(11, 11)]),
    "SixteenRooms2": FixedMaze(13, "0208 0048 0248 1edd 0240 0048 17df 0248 0200 1b6f 0248 0040 0248", (1, 1), 0, [(11, 11)]),
    "Labyrinth": FixedMaze(13, "0000 0ffe 0802 0bfa 0a0a 0aea 0aaa 0aaa 088a 0ffa 0082 1ebe 0080", (0, 12), 0, [(6, 6)]),
    "LabyrinthFlipped": FixedMaze(13, "0000 0ffe 0802 0bfa 0a0a 0aea 0aaa 0aaa 0a22 0bfe 0820 0faf 0020", (12, 12), 2, [(6, 6)]),
    "Labyrinth2": FixedMaze(13, "0800 0bfe 0a02 0afa 0a8a 02aa 1eaa 02ea 0a0a 0bfa 0802 0ffe 0000", (0, 0), 0, [(6, 6)]),
    "StandardMaze": FixedMaze(13, "0084 0ef6 0800 0ff7 0010 1fbe 0120 0c6f 0522 15ba 1488 16ee 0228", (6, 0), 0, [(6, 12)]),
    "StandardMaze2": FixedMaze(13, "0284 0af1 0804 0ff7 0254 1ad4 0a16 0b72 093a 0daa 08aa 0aaa 0220", (0, 6), 0, [(12, 4)]),
    "StandardMaze3": FixedMaze(13, "0140 0f5e 0850 03d5 1a14 02d6 0a92 0abb 08a8 0eae 08a2 0baa 0888", (3, 0), 0, [(12, 6)]),
    "SmallCorridor": FixedMaze(
        13,
        " ".join(["0000"] + ["0aaa"] * 5 + ["0ffe"] + ["0aaa"] * 5 + ["0000"]),
        (0, 6),
        0,
        [(2 * k, y) for y in (5, 7) for k in range(1, 6)],
    ),
    "LargeCorridor": FixedMaze(
        19,
        " ".join(["00000"] + ["2aaaa"] * 8 + ["3fffe"] + ["2aaaa"] * 8 + ["00000"]),
        (0, 9),
        0,
        [(2 * k, y) for y in (8, 10) for k in range(1, 9)],
    ),
}


def fixed_levels(names: list[str]) -> tuple[Level, np.ndarray]:
    """The named mazes with each of their goals, on the largest map among them.

    -> a Level of numpy arrays (K, ...), and for each the index (K,) of its name.
    """
    size = max(HELD_OUT[name].size for name in names)
    levels, owners = [], []
    for owner, name in enumerate(names):
        maze = HELD_OUT[name]
        walls = np.ones((size, size), bool)
        for y, row in enumerate(maze.rows.split()):
            walls[y, : maze.size] = [int(row, 16) >> (maze.size - 1 - x) & 1 for x in range(maze.size)]
        for goal in maze.goals:
            levels.append(Level(walls, np.int32(maze.agent), np.int32(maze.direction), np.int32(goal)))
            owners.append(owner)
    return Level(*(np.stack(leaves) for leaves in zip(*levels, strict=True))), np.array(owners)


def held_out_levels(key, names: list[str], episodes: int) -> tuple[Level, np.ndarray]:
    """`episodes` starts of each named maze, the goal drawn anew for each where a maze has several.

    -> Level (len(names), episodes, ...), and each maze's time limit (len(names),).
    """
    levels, owners = fixed_levels(names)
    first = np.searchsorted(owners, np.arange(len(names)))[:, None]
    goals = np.bincount(owners)[:, None]
    pick = first + jax.random.randint(key, (len(names), episodes), 0, goals, jnp.int32)
    limits = np.array([HELD_OUT[name].time_limit for name in names], np.int32)
    return jax.tree.map(lambda x: jnp.asarray(x)[pick], levels), limits


# --- procedural held-out families


def four_rooms(key, size: int = 17) -> Level:
    """Four rooms, a door in each arm of the cross at random (minimax's FourRooms; time limit 250)."""
    key_x, key_y, key_place = jax.random.split(key, 3)
    middle = size // 2
    line = np.arange(size) == middle
    walls = jnp.asarray(line[:, None] | line)
    doors = np.array([0, middle + 1])
    opened = walls.at[middle, doors + jax.random.randint(key_x, (2,), 0, middle, jnp.int32)].set(False)
    opened = opened.at[doors + jax.random.randint(key_y, (2,), 0, middle, jnp.int32), middle].set(False)
    return place(key_place, walls)._replace(walls=opened)  # nothing is placed in a doorway


def perfect_maze(key, size: int = 13) -> Level:
    """A maze with one way between any two cells, by depth-first search (minimax's PerfectMaze; size 13, 19, 101).

    Time limit 2 (size + 2)^2.
    """
    key_start, key_walk, key_place = jax.random.split(key, 3)
    cells = size // 2 + 1
    start = jax.random.randint(key_start, (2,), 0, cells, jnp.int32)
    visited = one_hot(start, (cells, cells))
    walls = jnp.ones((size, size), bool).at[2 * start[1], 2 * start[0]].set(False)
    stack = jnp.zeros((cells * cells, 2), jnp.int32).at[0].set(start)

    def walk(carry, noise):
        walls, visited, stack, depth = carry
        here = stack[depth]
        ways = here + jnp.asarray(DIRECTIONS)
        inside = ((ways >= 0) & (ways < cells)).all(-1)
        fresh = inside & ~_at(visited, jnp.clip(ways, 0, cells - 1))
        there = ways[jnp.argmax(jnp.where(fresh, noise, -1.0))]
        moved = fresh.any()
        there = jnp.where(moved, there, here)
        for pos in (2 * there, here + there):  # the cell, and the wall on the way to it
            walls = walls.at[pos[1], pos[0]].set(False)
        depth = jnp.where(moved, depth + 1, jnp.maximum(depth - 1, 0))  # a dead end: one step back
        stack = stack.at[depth].set(jnp.where(moved, there, stack[depth]))
        return (walls, visited | one_hot(there, (cells, cells)), stack, depth), None

    noise = jax.random.uniform(key_walk, (2 * cells * cells, 4), jnp.float32)
    (walls, *_), _ = jax.lax.scan(walk, (walls, visited, stack, jnp.int32(0)), noise)
    return place(key_place, walls)


def crossing(key, size: int = 9, rivers: int = 5) -> Level:
    """From corner to corner over `rivers` wall lines, each with one gap, so that a way exists (MiniGrid's SimpleCrossing).

    Time limit 4 (size + 2)^2. minimax's generator draws a number of rivers that varies; here it is MiniGrid's, always `rivers`.
    """
    key_lines, key_order, key_gap = jax.random.split(key, 3)
    per_axis = (size - 1) // 2
    chosen = jax.random.permutation(key_lines, 2 * per_axis) < rivers  # which of the lines x = 1, 3, .. and y = 1, 3, .. are rivers
    lines = chosen.reshape(2, per_axis)
    where = np.arange(1, size - 1, 2)
    columns, rows = (jnp.sort(jnp.where(lines[axis], where, size)) for axis in range(2))
    is_line = jnp.zeros((2, size), bool).at[:, where].set(lines)
    walls = is_line[1][:, None] | is_line[0]
    # the rivers in the order in which the way crosses them: a random interleaving of the columns (0) and the rows (1)
    order = jnp.argsort(jnp.where(chosen, jax.random.uniform(key_order, (2 * per_axis,), jnp.float32), 2.0))
    crossings = (order >= per_axis).astype(jnp.int32)[:rivers]

    def cross(carry, inputs):
        walls, room = carry  # room (2,): how many columns and rows were crossed
        axis, noise = inputs
        line = jnp.where(axis == 0, columns[room[0]], rows[room[1]])
        across = jnp.where(axis == 0, rows, columns)  # the lines that bound the room along the river
        index = room[1 - axis]
        low = jnp.where(index > 0, across[index - 1] + 1, 0)
        high = across[jnp.minimum(index, per_axis - 1)]
        high = jnp.where(index < per_axis, high, size)
        gap = low + jnp.floor(noise * (high - low)).astype(jnp.int32)
        x, y = jnp.where(axis == 0, line, gap), jnp.where(axis == 0, gap, line)
        return (walls.at[y, x].set(False), room.at[axis].add(1)), None

    noise = jax.random.uniform(key_gap, (rivers,), jnp.float32)
    (walls, _), _ = jax.lax.scan(cross, (walls, jnp.zeros(2, jnp.int32)), (crossings, noise))
    return Level(walls, jnp.zeros(2, jnp.int32), jnp.int32(0), jnp.full(2, size - 1, jnp.int32))


# --- pictures


def _tiles() -> np.ndarray:
    """(7, TILE, TILE, 3) uint8: empty, wall, goal, and the agent facing each way."""
    floor, wall, goal, agent = (24, 27, 38), (112, 120, 138), (62, 201, 122), (255, 196, 61)
    tiles = np.zeros((7, TILE, TILE, 3), np.uint8)
    tiles[:] = floor
    tiles[:, -1], tiles[:, :, -1] = (34, 38, 52), (34, 38, 52)  # a faint grid
    tiles[WALL] = wall
    tiles[GOAL, 1:-1, 1:-1] = goal
    y, x = np.mgrid[:TILE, :TILE] + 0.5
    arrow = (x > 1) & (x < TILE - 1) & (np.abs(y - TILE / 2) <= (TILE - 1 - x) / 2 + 0.25)  # points right
    for direction in range(4):
        tiles[3 + direction][np.rot90(arrow, -direction)] = agent
    return tiles


TILES = _tiles()
