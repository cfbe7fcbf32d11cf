"""The maze against recorded traces of minimax's AMaze, a brute-force solver, and what must hold on any level."""

from collections import deque
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.env import reset_from_bank, step_from_bank
from envs import maze
from envs.maze import EnvParams, EnvState, Level, Maze, shortest_solution

DIRECTIONS = [(1, 0), (0, 1), (-1, 0), (0, -1)]
solve = jax.jit(jax.vmap(shortest_solution))
params = EnvParams()


def keys(seed, num):
    return jax.random.split(jax.random.key(seed), num)


def to_numpy(tree):
    return jax.tree.map(np.array, tree)


def unstack(levels) -> list[Level]:
    levels = to_numpy(levels)
    return [jax.tree.map(lambda x, i=i: x[i], levels) for i in range(len(levels.agent_dir))]


@jax.jit
def play(levels: Level, actions):
    """Plays levels (N, ...) with actions (T, N) and no reset -> obs and states (T + 1, N), reward and terminated (T, N)."""
    env = Maze()
    start = jax.vmap(env.reset_to_level, (0, None))(levels, params)
    first = jax.vmap(env.get_obs)(start)

    def step(state, action):
        step_env = jax.vmap(env.step_env, (None, 0, 0, None))
        obs, state, reward, terminated, _ = step_env(jax.random.key(0), state, action, params)
        return state, (obs, state, reward, terminated)

    _, (obs, states, reward, terminated) = jax.lax.scan(step, start, actions)
    put_first = lambda x, xs: jnp.concatenate([x[None], xs])
    return jax.tree.map(put_first, first, obs), jax.tree.map(put_first, start, states), reward, terminated


@pytest.fixture(scope="module")
def random_levels():
    """500 levels of up to 60 walls."""
    return to_numpy(jax.jit(jax.vmap(Maze(num_walls=60).sample_level))(keys(0, 500)))


def random_actions(seed, steps, num):
    """Mostly forward, so that the agent gets about."""
    return np.random.default_rng(seed).choice(7, size=(steps, num), p=[0.15, 0.15, 0.5, 0.05, 0.05, 0.05, 0.05]).astype(np.int32)


def is_free(walls, pos):
    return ~walls[np.arange(len(walls)), pos[:, 1], pos[:, 0]]


# --- the recorded traces


def test_traces():
    with np.load(Path(__file__).parents[1] / "data" / "amaze_traces.npz") as file:
        data = dict(file)
    walls = np.unpackbits(data["wall"], axis=1, count=169).reshape(16, 13, 13).astype(bool)
    done = np.unpackbits(data["done"], axis=0).astype(bool)
    levels = Level(walls, np.int32(data["agent"]), np.int32(data["dir"]), np.int32(data["goal"]))
    obs, states, reward, terminated = to_numpy(play(levels, np.int32(data["actions"])))
    ours_done = terminated | (states.time[1:] >= params.max_steps_in_episode)
    table = np.zeros((9, 3), np.uint8)  # from the object's code to all three channels
    table[maze.CODES[:, 0]] = maze.CODES
    pose = np.concatenate([states.agent_pos, states.agent_dir[..., None]], -1)
    solved = 0
    for i in range(16):
        steps = np.flatnonzero(done[:, i])[0] + 1  # up to and including the first end
        np.testing.assert_array_equal(ours_done[:steps, i], done[:steps, i])
        np.testing.assert_allclose(reward[:steps, i], data["reward"][:steps, i], atol=1e-6)
        np.testing.assert_array_equal(pose[1 : steps + 1, i], data["pose"][:steps, i])
        np.testing.assert_array_equal(obs.image[: steps + 1, i], table[data["obs"][: steps + 1, i]])
        np.testing.assert_array_equal(obs.direction[1 : steps + 1, i], data["pose"][:steps, i, 2])
        solved += reward[steps - 1, i] > 0
    assert obs.image.dtype == np.uint8 and solved == 6


# --- what holds on any level


def test_sampled_levels(random_levels):
    walls, agent, direction, goal = random_levels
    assert walls.shape == (500, 13, 13) and walls.dtype == bool
    count = walls.sum((1, 2))
    assert count.max() <= 60 and 45 < count.mean() < 55  # drawn with replacement: 169 (1 - (168 / 169)^60) = 50.6 on average
    assert is_free(walls, agent).all() and is_free(walls, goal).all() and (agent != goal).any(1).all()
    assert set(direction) == {0, 1, 2, 3}
    for pos in (agent, goal):
        assert pos.min() == 0 and pos.max() == 12


def test_a_level_without_walls_has_any_size():
    env = Maze(3, 5, num_walls=0)
    level = to_numpy(jax.jit(jax.vmap(env.sample_level))(keys(1, 300)))
    assert level.walls.shape == (300, 3, 5) and not level.walls.any()
    for pos in (level.agent_pos, level.goal_pos):
        assert {tuple(p) for p in pos.tolist()} == {(x, y) for x in range(5) for y in range(3)}


def test_random_cell_is_uniform():
    free = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 1], [0, 0, 0]], bool)
    cells = np.array(jax.jit(jax.vmap(lambda key: maze.random_cell(key, free)))(keys(2, 8000)))
    counts = np.zeros((4, 3))
    np.add.at(counts, (cells[:, 1], cells[:, 0]), 1)
    np.testing.assert_array_equal(counts > 0, free)
    assert np.abs(counts[free] - 2000).max() < 5 * np.sqrt(8000 * 0.25 * 0.75)


def test_random_play(random_levels):
    actions = random_actions(3, 80, 500)
    obs, states, reward, terminated = to_numpy(play(random_levels, actions))
    pos, direction, goal = states.agent_pos, states.agent_dir, states.goal_pos[0]
    assert pos.min() >= 0 and pos.max() <= 12 and all(is_free(random_levels.walls, p).all() for p in pos)
    assert (states.walls == random_levels.walls).all() and (states.goal_pos == goal).all()
    assert (states.time == np.arange(81)[:, None]).all()
    step, ahead = pos[1:] - pos[:-1], np.array(DIRECTIONS)[direction[:-1]]
    forward, still = actions == 2, (step == 0).all(-1)
    assert still[~forward].all() and ((step == ahead).all(-1) | still)[forward].all() and 0.2 < still[forward].mean() < 0.9
    # a step that fails had a wall, the edge or the goal ahead
    target = np.clip(pos[:-1] + ahead, 0, 12)
    into_wall = random_levels.walls[np.arange(500), target[..., 1], target[..., 0]] | (target != pos[:-1] + ahead).any(-1)
    into_goal = (pos[:-1] + ahead == goal).all(-1)
    np.testing.assert_array_equal(still[forward], (into_wall | into_goal)[forward])
    turn = np.select([actions == 0, actions == 1], [3, 1], 0)
    np.testing.assert_array_equal(direction[1:], (direction[:-1] + turn) % 4)
    np.testing.assert_array_equal(terminated, forward & into_goal)
    np.testing.assert_allclose(reward, np.where(terminated, 1 - 0.9 * np.arange(1, 81)[:, None] / 250, 0), atol=1e-6)
    assert terminated.sum() > 50
    np.testing.assert_array_equal(obs.direction, direction)


def test_actions_3_to_6_change_only_the_time(random_levels):
    few = jax.tree.map(lambda x: x[:80], random_levels)
    actions = random_actions(4, 80, 80) % 4 + 3
    obs, states, reward, terminated = to_numpy(play(few, actions))
    same = lambda x: (x == x[:1]).all()
    assert set(actions.ravel()) == {3, 4, 5, 6} and not reward.any() and not terminated.any()
    assert same(obs.image) and same(obs.direction) and all(same(x) for x in states._replace(time=np.zeros((1, 1))))
    assert (states.time == np.arange(81)[:, None]).all()


def seen(level: Level, pos, direction):
    """The view, cell by cell: four rows ahead of the agent and its own, two columns to each side; the map's outside is wall."""
    image = np.zeros((5, 5, 3), np.uint8)
    (ax, ay), (rx, ry) = DIRECTIONS[direction], DIRECTIONS[(direction + 1) % 4]
    for row in range(5):
        for col in range(5):
            x = pos[0] + (4 - row) * ax + (col - 2) * rx
            y = pos[1] + (4 - row) * ay + (col - 2) * ry
            inside = 0 <= x < level.walls.shape[1] and 0 <= y < level.walls.shape[0]
            is_goal = (x, y) == tuple(level.goal_pos)
            image[row, col] = (2, 5, 0) if not inside or level.walls[y, x] else (8, 1, 0) if is_goal else (1, 0, 0)
    return image


def test_observation_is_the_view_ahead():
    env = Maze(6, 9, num_walls=20)
    levels = jax.jit(jax.vmap(env.sample_level))(keys(5, 60))
    look = lambda level: env.get_obs(env.reset_to_level(level, params), params)
    obs = to_numpy(jax.jit(jax.vmap(look))(levels))
    assert obs.image.dtype == np.uint8 and obs.direction.dtype == np.int32
    for i, level in enumerate(unstack(levels)):
        np.testing.assert_array_equal(obs.image[i], seen(level, level.agent_pos, level.agent_dir))
        assert obs.direction[i] == level.agent_dir


# --- the solver


def search(start, neighbours, is_goal):
    """Breadth first -> the moves of a shortest way, or None."""
    came_from, queue = {start: None}, deque([start])
    while queue:
        here = queue.popleft()
        if is_goal(here):
            moves = []
            while came_from[here]:
                here, move = came_from[here]
                moves.append(move)
            return moves[::-1]
        for move, there in neighbours(here):
            if there not in came_from:
                came_from[there] = (here, move)
                queue.append(there)
    return None


def shortest_ways(level: Level):
    """The actions of a shortest solution (turns are actions) and the cells of a shortest way; None where there is none."""
    height, width = level.walls.shape
    free = lambda x, y: 0 <= x < width and 0 <= y < height and not level.walls[y, x]

    def poses(pose):
        x, y, d = pose
        ahead = x + DIRECTIONS[d][0], y + DIRECTIONS[d][1]
        turns = [(0, (x, y, (d - 1) % 4)), (1, (x, y, (d + 1) % 4))]
        return turns + ([(2, (*ahead, d))] if free(*ahead) else [])

    def cells(pos):
        around = [(pos[0] + dx, pos[1] + dy) for dx, dy in DIRECTIONS]
        return [(None, there) for there in around if free(*there)]

    start, goal = tuple(level.agent_pos.tolist()), tuple(level.goal_pos.tolist())
    actions = search((*start, int(level.agent_dir)), poses, lambda pose: pose[:2] == goal)
    path = search(start, cells, lambda pos: pos == goal)
    return actions, path and len(path)


@pytest.fixture(scope="module")
def hard_levels():
    """80 levels of many walls, about half of them unsolvable."""
    return to_numpy(jax.jit(jax.vmap(Maze(num_walls=85).sample_level))(keys(6, 80)))


def test_shortest_solution_equals_brute_force(hard_levels):
    steps, path = to_numpy(solve(hard_levels))
    assert steps.dtype == path.dtype == np.int32
    for i, level in enumerate(unstack(hard_levels)):
        actions, cells = shortest_ways(level)
        assert (steps[i], path[i]) == ((len(actions), cells) if actions else (0, 0))
    assert 20 < (steps == 0).sum() < 60 and (steps > path).any()


def test_following_the_shortest_solution(hard_levels):
    """It ends the episode with its last action, not before, and the reward says how many there were."""
    steps, _ = to_numpy(solve(hard_levels))
    actions = np.full((80, 80), 6, np.int32)
    for i, level in enumerate(unstack(hard_levels)):
        way = shortest_ways(level)[0] or []
        assert len(way) <= 80
        actions[: len(way), i] = way
    _, _, reward, terminated = to_numpy(play(hard_levels, actions))
    solvable = steps > 0
    np.testing.assert_array_equal(terminated.sum(0), solvable)
    np.testing.assert_array_equal(terminated.argmax(0)[solvable] + 1, steps[solvable])
    np.testing.assert_allclose(reward.sum(0), np.where(solvable, 1 - 0.9 * steps / 250, 0), atol=1e-6)


# --- held-out mazes

STEPS = {
    "SixteenRooms": [26],
    "SixteenRooms2": [28],
    "Labyrinth": [113],
    "LabyrinthFlipped": [113],
    "Labyrinth2": [113],
    "StandardMaze": [54],
    "StandardMaze2": [73],
    "StandardMaze3": [54],
    "SmallCorridor": [16, 18, 20, 22, 24] * 2,
    "LargeCorridor": [22, 24, 26, 28, 30, 32, 34, 36] * 2,
}
WALLS = [46, 53, 72, 72, 72, 73, 72, 71, 71, 161]


def test_held_out_mazes():
    names = list(maze.HELD_OUT)
    assert names == list(STEPS)
    levels, owners = maze.fixed_levels(names)
    steps, _ = to_numpy(solve(levels))
    for i, name in enumerate(names):
        size, mine = maze.HELD_OUT[name].size, owners == i
        assert sorted(steps[mine]) == sorted(STEPS[name])
        inside = levels.walls[mine][:, :size, :size]
        assert set(inside.sum((1, 2))) == {WALLS[i]}
        assert levels.walls[mine].sum() - inside.sum() == mine.sum() * (19**2 - size**2)  # walls all around
        assert maze.HELD_OUT[name].time_limit == 2 * (size + 2) ** 2
    assert is_free(levels.walls, levels.agent_pos).all() and is_free(levels.walls, levels.goal_pos).all()


def test_held_out_levels_draws_goals():
    names = ["Labyrinth", "SmallCorridor", "SixteenRooms"]
    levels, limits = to_numpy(jax.jit(lambda key: maze.held_out_levels(key, names, 60))(jax.random.key(0)))
    assert levels.walls.shape == (3, 60, 13, 13) and limits.tolist() == [450, 450, 450]
    for i, name in enumerate(names):
        assert {tuple(goal) for goal in levels.goal_pos[i].tolist()} == set(maze.HELD_OUT[name].goals)
        assert (levels.agent_pos[i] == maze.HELD_OUT[name].agent).all() and (levels.walls[i] == levels.walls[i, 0]).all()


# --- edits


def full_level():
    """Nothing but the agent's cell and the goal's, in opposite corners."""
    walls = np.ones((13, 13), bool)
    walls[0, 0] = walls[12, 12] = False
    return Level(walls, np.int32([0, 0]), np.int32(1), np.int32([12, 12]))


@pytest.fixture(scope="module")
def mutate():
    """Seven edits."""
    return jax.jit(jax.vmap(partial(Maze().mutate_level, num_edits=7)))


@pytest.mark.parametrize("kind", ["random", "full"])
def test_mutate_level(mutate, random_levels, kind):
    levels = random_levels if kind == "random" else jax.tree.map(lambda x: np.stack([x] * 500), full_level())
    edited = to_numpy(mutate(keys(7, 500), levels))
    np.testing.assert_array_equal(edited.agent_pos, levels.agent_pos)
    np.testing.assert_array_equal(edited.agent_dir, levels.agent_dir)
    assert is_free(edited.walls, edited.agent_pos).all() and is_free(edited.walls, edited.goal_pos).all()
    assert (edited.goal_pos != edited.agent_pos).any(1).all() and edited.goal_pos.min() >= 0 and edited.goal_pos.max() <= 12
    flips = (edited.walls != levels.walls).sum((1, 2))
    assert flips.max() <= 7 and flips.max() >= 5 and flips.min() == 0 and abs(flips.mean() - 7 / 3) < 0.4
    assert (edited.goal_pos != levels.goal_pos).any(1).any()
    assert jax.tree.map(lambda x: (x.shape, x.dtype), edited) == jax.tree.map(lambda x: (x.shape, x.dtype), levels)


def test_one_edit_is_one_of_three():
    start = full_level()
    walls = start.walls.copy()
    walls[3:9, 3:9] = False
    level = start._replace(walls=walls)
    edit = jax.jit(jax.vmap(partial(Maze().mutate_level, num_edits=1), (0, None)))
    edited = to_numpy(edit(keys(8, 6000), level))
    flips = (edited.walls != walls).sum((1, 2))
    moved = (edited.goal_pos != level.goal_pos).any(1)
    assert flips.max() == 1 and not (flips & moved).any()
    for share in (flips.mean(), moved.mean(), (~moved & (flips == 0)).mean()):
        assert abs(share - 1 / 3) < 5 * np.sqrt(2 / 9 / 6000)
    kept = np.zeros((13, 13), bool)
    kept[0, 0] = kept[12, 12] = True
    np.testing.assert_array_equal((edited.walls != walls).any(0), ~kept)  # any cell but the agent's and the goal's
    goals = {tuple(pos) for pos in edited.goal_pos[moved].tolist()}
    assert goals == {(x, y) for x in range(3, 9) for y in range(3, 9)}


def test_embed_plays_the_same(random_levels):
    few = jax.tree.map(lambda x: x[:80], random_levels)
    larger = jax.vmap(lambda level: maze.embed(level, 16, 19))(few)
    assert (
        larger.walls.shape == (80, 16, 19) and (np.array(larger.walls).sum((1, 2)) == few.walls.sum((1, 2)) + 16 * 19 - 169).all()
    )
    actions = random_actions(9, 80, 80)
    (obs, _, reward, terminated), (obs_, _, reward_, terminated_) = play(few, actions), play(larger, actions)
    jax.tree.map(np.testing.assert_array_equal, (obs, reward, terminated), (obs_, reward_, terminated_))
    assert terminated.any()


# --- procedural families


def reachable(level: Level) -> int:
    """How many cells can be reached."""
    found, queue = set(), [tuple(level.agent_pos.tolist())]
    while queue:
        x, y = queue.pop()
        if (x, y) in found or not (0 <= x < level.walls.shape[1] and 0 <= y < level.walls.shape[0]) or level.walls[y, x]:
            continue
        found.add((x, y))
        queue += [(x + dx, y + dy) for dx, dy in DIRECTIONS]
    return len(found)


@pytest.mark.parametrize("size, num", [(13, 30), (19, 5)])
def test_perfect_maze_is_a_spanning_tree(size, num):
    levels = unstack(jax.jit(jax.vmap(partial(maze.perfect_maze, size=size)))(keys(10, num)))
    cells = size // 2 + 1
    for level in levels:
        assert level.walls.shape == (size, size) and not level.walls[::2, ::2].any()
        assert (~level.walls).sum() == reachable(level) == 2 * cells**2 - 1
        assert not level.walls[tuple(level.goal_pos[::-1])] and tuple(level.goal_pos) != tuple(level.agent_pos)
    assert len({level.walls.tobytes() for level in levels}) == num


def test_four_rooms():
    levels = to_numpy(jax.jit(jax.vmap(maze.four_rooms))(keys(11, 200)))
    assert levels.walls.shape == (200, 17, 17) and (to_numpy(solve(levels))[0] > 0).all()
    assert (levels.walls.sum((1, 2)) == 2 * 17 - 1 - 4).all()
    outside = levels.walls.copy()
    outside[:, 8], outside[:, :, 8] = False, False
    assert not outside.any()
    arms = [levels.walls[:, 8, :8], levels.walls[:, 8, 9:], levels.walls[:, :8, 8], levels.walls[:, 9:, 8]]
    for arm in arms:  # one door in each, anywhere
        assert ((~arm).sum(1) == 1).all() and (~arm).any(0).all()
    for pos in (levels.agent_pos, levels.goal_pos):  # nothing stands in a doorway
        assert (pos != 8).all()
    assert (levels.agent_pos != levels.goal_pos).any(1).all()


@pytest.mark.parametrize("size, rivers", [(9, 5), (7, 6)])
def test_crossing(size, rivers):
    levels = to_numpy(jax.jit(jax.vmap(partial(maze.crossing, size=size, rivers=rivers)))(keys(12, 200)))
    assert levels.walls.shape == (200, size, size) and (to_numpy(solve(levels))[0] > 0).all()
    assert (levels.agent_pos == 0).all() and (levels.goal_pos == size - 1).all()
    for walls in levels.walls:
        is_row, is_column = walls.sum(1) == size - 1, walls.sum(0) == size - 1  # a whole line but for its gap
        lines = is_row[:, None] | is_column
        assert is_row.sum() + is_column.sum() == rivers and not (walls & ~lines).any()
        assert not is_row[::2].any() and not is_column[::2].any()
        gaps = lines & ~walls
        assert gaps.sum() == rivers and not (gaps & is_row[:, None] & is_column).any()
    assert len({walls.tobytes() for walls in levels.walls}) > 10


# --- pictures


def test_render():
    env = Maze(4, 6)
    walls = np.zeros((4, 6), bool)
    walls[1, 2] = True
    draw = jax.jit(env.render)
    level = Level(walls, np.int32([4, 3]), np.int32(0), np.int32([1, 0]))
    state = EnvState(walls, level.goal_pos, level.agent_pos, level.agent_dir, np.int32(5))
    picture = np.array(draw(level))
    assert picture.shape == (6 * maze.TILE, 8 * maze.TILE, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, draw(state))
    tiles = picture.reshape(6, maze.TILE, 8, maze.TILE, 3).transpose(0, 2, 1, 3, 4)
    kinds = np.pad(np.zeros((4, 6), int), 1, constant_values=maze.WALL)
    kinds[1 + 1, 2 + 1], kinds[0 + 1, 1 + 1], kinds[3 + 1, 4 + 1] = maze.WALL, maze.GOAL, 3
    np.testing.assert_array_equal(tiles, maze.TILES[kinds])
    goal, agent, wall = (62, 201, 122), (255, 196, 61), (112, 120, 138)
    for colour, where in ((goal, kinds == maze.GOAL), (agent, kinds == 3), (wall, kinds == maze.WALL)):
        np.testing.assert_array_equal((tiles == colour).all(-1).any((2, 3)), where)


def test_rendered_agent_points_where_it_faces():
    arrow = (maze.TILES[3:] == (255, 196, 61)).all(-1)
    y, x = np.mgrid[: maze.TILE, : maze.TILE] - (maze.TILE - 1) / 2
    for direction, (dx, dy) in enumerate(DIRECTIONS):
        across = np.abs(x * dy + y * dx)[arrow[direction]]
        along = (x * dx + y * dy)[arrow[direction]]
        front, back = across[along > 0], across[along < 0]
        assert arrow[direction].sum() > 8 and front.sum() / len(front) < back.sum() / len(back)  # narrow in front, wide behind


# --- steps with resets, gymnax, banks


def corridor(goal: int) -> Level:
    """A 1 x 6 corridor; the agent stands at its left end and looks along it."""
    return Level(np.zeros((1, 6), bool), np.int32([0, 0]), np.int32(0), np.int32([goal, 0]))


def test_step_resets_and_keeps_the_last_observation():
    env, limit = Maze(5, 5, num_walls=4), EnvParams(4)
    step = jax.jit(env.step)
    obs, state = jax.jit(env.reset)(jax.random.key(0), limit)
    for t in range(4):
        before = state
        obs, state, reward, terminated, truncated, info = step(jax.random.key(t), state, jnp.int32(1), limit)
        assert not terminated and reward == 0 and truncated == (t == 3)
        assert info["final_observation"].direction == (before.agent_dir + 1) % 4
        assert info["terminated"] == terminated and info["truncated"] == truncated
        assert state.time == (0 if t == 3 else t + 1)
    assert (state.walls != before.walls).any()
    jax.tree.map(np.testing.assert_array_equal, obs, env.get_obs(state))
    # the goal ends an episode without truncating it
    state = env.reset_to_level(jax.tree.map(lambda x: jnp.asarray(x), full_level()), params)
    state = state._replace(walls=jnp.zeros((5, 5), bool), goal_pos=jnp.int32([0, 1]), agent_pos=jnp.int32([0, 0]))
    _, state, reward, terminated, truncated, _ = step(jax.random.key(1), state, jnp.int32(2), limit)
    assert terminated and not truncated and state.time == 0 and abs(reward - (1 - 0.9 / 4)) < 1e-6


def test_gymnax_wrapper():
    from gymnax.wrappers import LogWrapper

    limit = EnvParams(20)
    env = LogWrapper(Maze(5, 5, num_walls=3))
    assert env.num_actions == 7 and env.name == "Maze" and env.default_params.max_steps_in_episode == 250
    actions, sights = env.action_space(limit), env.observation_space(limit)

    def step(carry, key):
        _, state = carry
        key_act, key_step = jax.random.split(key)
        action = jnp.minimum(actions.sample(key_act), 2)
        obs, state, reward, terminated, truncated, info = env.step(key_step, state, action, limit)
        fine = sights.contains(obs) & sights.contains(info["final_observation"]) & actions.contains(action)
        return (obs, state), (reward, terminated, truncated, info, fine)

    @jax.jit
    def run(key):
        first = env.reset(key, limit)
        return first, jax.lax.scan(step, first, jax.random.split(key, 300))[1]

    (obs, _), (reward, terminated, truncated, info, fine) = to_numpy(run(jax.random.key(1)))
    assert fine.all() and sights.contains(obs)
    assert obs.image.shape == sights.spaces["image"].shape and obs.image.dtype == sights.spaces["image"].dtype
    ends = np.flatnonzero(terminated | truncated)
    starts = [0, *ends[:-1] + 1]
    assert terminated.sum() > 3 and truncated.sum() > 3
    np.testing.assert_array_equal(info["returned_episode_lengths"][ends], ends + 1 - starts)
    assert (ends + 1 - starts).max() == 20
    sums = [reward[a : b + 1].sum() for a, b in zip(starts, ends, strict=True)]
    np.testing.assert_allclose(info["returned_episode_returns"][ends], sums, atol=1e-6)
    np.testing.assert_array_equal(np.array(sums) > 0, terminated[ends])


def play_bank(goals, actions, limit):
    """-> for every step: the goal and the position after it, reward, done, the index of the level."""
    env, bank = Maze(), jax.tree.map(lambda *x: jnp.stack(x), *map(corridor, goals))

    def step(carry, action):
        obs, state, reward, done = step_from_bank(env, jax.random.key(0), carry, action, bank, EnvParams(limit))
        expected = env.get_obs(state.env)
        right = (obs.image == expected.image).all() & (obs.direction == expected.direction)
        return state, (state.env.goal_pos[0], state.env.agent_pos[0], state.env.time, reward, done, state.index, right)

    @jax.jit
    def run(actions):
        obs, state = reset_from_bank(env, bank, EnvParams(limit))
        return obs, state, jax.lax.scan(step, state, actions)[1]

    obs, state, trace = to_numpy(run(jnp.int32(actions)))
    assert state.index == 0 and state.env.goal_pos[0] == goals[0] and state.env.time == 0
    assert (obs.image[:, 2, 0] == 8).any() == (goals[0] < 5)  # the goal lies straight ahead, at most four cells away
    assert trace[-1].all()
    return trace[:-1]


def test_levels_of_a_bank_come_in_turn():
    goals = [2, 5, 1]
    goal, pos, time, reward, done, index = play_bank(goals, [2] * 16, limit=4)
    # 0 takes two steps, 1 runs into the limit of four, 2 takes one, and so on
    assert np.flatnonzero(done).tolist() == [1, 5, 6, 8, 12, 13, 15]
    np.testing.assert_array_equal(index, np.cumsum(done) % 3)
    np.testing.assert_array_equal(goal, np.array(goals)[index])
    np.testing.assert_array_equal(pos, [1, 0, 1, 2, 3, 0, 0, 1, 0, 1, 2, 3, 0, 0, 1, 0])
    np.testing.assert_array_equal(time, pos)
    expected = np.zeros(16)
    expected[[1, 8, 15]], expected[[6, 13]] = 1 - 0.9 * 2 / 4, 1 - 0.9 / 4
    np.testing.assert_allclose(reward, expected, atol=1e-6)


def test_a_bank_of_one_repeats():
    goal, pos, time, reward, done, index = play_bank([3], [2] * 9, limit=250)
    assert (goal == 3).all() and not index.any()
    np.testing.assert_array_equal(done, np.arange(9) % 3 == 2)
    np.testing.assert_array_equal(pos, [1, 2, 0] * 3)
    np.testing.assert_array_equal(time, pos)
    np.testing.assert_allclose(reward, [0, 0, 1 - 0.9 * 3 / 250] * 3, atol=1e-6)
