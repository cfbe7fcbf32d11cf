"""With JAX_ENABLE_X64 worlds and sources of data give numbers of the types that they give without."""

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs import pcfg, stories
from envs.clips import make_source, play_at_random
from envs.coin_game import CoinGame
from envs.coinrun import CoinRun, EnvParams
from envs.football import Football
from envs.football_bots import BOTS, bot_actions, pair
from envs.football_team import init_team, match_actions
from envs.in_the_matrix import InTheMatrix
from envs.locomotion import Locomotion
from envs.matrix_games import InfiniteMatrixGame, MatrixGame, n_player, two_player
from envs.maze import Maze
from envs.maze_editor import MazeEditor
from envs.maze_eval import FAMILIES
from envs.planar import ROBOTS, Legged, Planar

WIDE = {np.dtype(name) for name in ("int64", "uint64", "float64")}
WORLDS = {
    "maze": Maze(),
    "maze_editor": MazeEditor(5, 5, num_walls=6, noise_dim=3),
    "coin_game": CoinGame(),
    "coin_game_not_egocentric": CoinGame(egocentric=False),
    "in_the_matrix": InTheMatrix(),
    "in_the_matrix4": InTheMatrix("imp", 4, fixed_coins=False),
    "ipd": MatrixGame(two_player("ipd")),
    "tragedy5": MatrixGame(n_player("tragedy", 5)),
    "infinite": InfiniteMatrixGame(two_player("imp")),
    "football": Football(),
    "football_simple115": Football(observation="simple115", shaping="checkpoint"),
    "coinrun": CoinRun(),
    "coinrun_monochrome": CoinRun(hard=False, monochrome=True, paint_velocity=True),
    **{robot: Planar(robot) for robot in ROBOTS},
}
KEY = jax.eval_shape(lambda: jax.random.key(0))
number, numbers = (lambda *shape, kind=kind: jax.ShapeDtypeStruct(shape, kind) for kind in (jnp.int32, jnp.float32))


def types(tree):
    """Shapes and types of what is in a tree."""
    return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def narrow(function, *args):
    """The shapes that a function gives with JAX_ENABLE_X64; none of them is of 64 bits, and all are as without."""
    with jax.enable_x64():
        found = jax.eval_shape(function, *args)
    assert not {x.dtype for x in jax.tree.leaves(found)} & WIDE, types(found)
    assert types(found) == types(jax.eval_shape(function, *args))
    return found


def actions_of(env):
    """The shape of what a world takes."""
    if isinstance(env, Legged):
        return numbers(env.num_agents, env.num_actions)
    if isinstance(env, InfiniteMatrixGame):
        return numbers(2, 5)
    return number(env.num_agents) if hasattr(env, "num_agents") else number()


@pytest.mark.parametrize("name", WORLDS)
def test_worlds(name):
    env = WORLDS[name]
    params = EnvParams(env.levels(np.arange(2), blank=True)) if isinstance(env, CoinRun) else env.default_params
    first_obs, state = narrow(lambda key: env.reset_env(key, params), KEY)
    obs, after, *_ = narrow(lambda *args: env.step_env(*args, params), KEY, state, actions_of(env))
    assert types((obs, after)) == types((first_obs, state))
    obs, after, *_ = narrow(lambda *args: env.step(*args, params), KEY, state, actions_of(env))  # with auto-reset
    assert types((obs, after)) == types((first_obs, state))
    if hasattr(env, "render"):
        narrow(lambda state: env.render(state, *[params] * isinstance(env, CoinRun)), state)


@pytest.mark.slow
def test_locomotion():
    pytest.importorskip("mujoco.mjx")
    env = Locomotion("hopper_3x1")
    _, state = narrow(lambda key: env.reset_env(key, env.default_params), KEY)
    _, after, *_ = narrow(lambda *args: env.step_env(None, *args, env.default_params), state, actions_of(env))
    assert types(after) == types(state)
    narrow(env.render, state)


def test_levels_of_mazes():
    for family in FAMILIES.values():
        narrow(family.sample, KEY)
    level = narrow(Maze().sample_level, KEY)
    assert types(narrow(partial(Maze().mutate_level, num_edits=3), KEY, level)) == types(level)


def test_levels_of_coinrun():
    with jax.enable_x64():
        levels = CoinRun().levels(np.arange(2), blank=True)
    assert not {x.dtype for x in jax.tree.leaves(levels)} & WIDE


def test_players_of_football():
    _, state = narrow(lambda key: Football().reset_env(key, Football().default_params, (3,)), KEY)
    bots = pair(BOTS["easy"], BOTS["hard"])
    team = narrow(init_team, KEY)
    narrow(lambda key, state: bot_actions(key, state, bots), KEY, state)
    narrow(match_actions, KEY, team, team, state)


@pytest.mark.parametrize("data", ["dots", *(pytest.param(name, marks=pytest.mark.slow) for name in ("coinrun", "expert"))])
def test_clips(data):
    source = make_source(data, 4, 16, 2, 0.5, blank=True)
    world = narrow(source.init, KEY)
    clips, after = narrow(lambda key, world: source.draw(key, world, 2), KEY, world)
    assert types(after) == types(world)
    narrow(lambda key: source.held_out(key, 2), KEY)
    if data != "expert":  # whose game is that of coinrun
        narrow(lambda key, level: play_at_random(key, source.game, level, 4, 0.5), KEY, number())


def test_strings_and_stories():
    language, tasks = pcfg.Language(), pcfg.task_table(0.5)
    narrow(lambda key: pcfg.sample_pretraining(key, 4, tasks, language), KEY)
    text = narrow(lambda key: pcfg.sample_finetuning(key, 4, 0.5, language), KEY)
    for linked in (False, True):
        narrow(lambda key, linked=linked: pcfg.sample_test(key, 4, linked, language), KEY)
    narrow(lambda text: pcfg.ask(text, 0, 1, language), text)
    for protocol in get_args(stories.Protocol):
        told = narrow(lambda key, protocol=protocol: stories.sample_stories(key, 4, protocol), KEY)
        narrow(stories.has_features, told.tokens)
