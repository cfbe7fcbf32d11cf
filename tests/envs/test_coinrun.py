"""CoinRun against recordings of the real game: levels, dynamics, pictures; and what must hold of any play."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.runs.config import UsageError
from envs import coinrun
from envs.coinrun import CoinRun, EnvParams, make_map, mt19937, play_clip, random_policy
from envs.coinrun_expert import make_expert

MONO = CoinRun(monochrome=True)


@pytest.fixture(scope="module")
def recorded():
    with np.load(Path(__file__).parent / "data" / "coinrun.npz") as file:
        return dict(file)


def to_numpy(tree):
    return jax.tree.map(np.asarray, tree)


@partial(jax.jit, static_argnums=2)
def play(levels, actions, seen=False):
    """Plays each of levels (N, ...) with actions (N, T), no reset -> first pictures (N,); states, pictures if `seen`, reward,
    terminated (T, N)."""
    params = EnvParams(levels)
    states = jax.vmap(MONO.reset_to_level, (0, None))(jnp.arange(len(actions)), params)

    def step(states, action):
        obs, states, reward, terminated, _ = jax.vmap(MONO.step_env, (None, 0, 0, None))(None, states, action, params)
        return states, (states, obs if seen else 0, reward, terminated)

    first = jax.vmap(MONO.get_obs, (0, None))(states, params) if seen else 0
    return first, jax.lax.scan(step, states, actions.T)[1]


# --- the real game


def test_random_numbers():
    """numpy's Mersenne Twister is the same one, seeded the same way."""
    for seed in (0, 5489, 2**31 - 1):
        theirs = np.random.RandomState(seed).randint(0, 2**32, 136, np.uint32)
        np.testing.assert_array_equal(jax.jit(mt19937, static_argnums=1)(jnp.uint32(seed), 136), theirs)


@pytest.mark.parametrize("hard", [True, False])
def test_levels(recorded, hard):
    prefix = "level_" if hard else "easy_level_"
    seeds, grids, things = (recorded[prefix + name] for name in ("seed", "grid", "entities"))
    maps = to_numpy(jax.jit(jax.vmap(lambda seed: make_map(seed, hard)))(np.uint32(seeds)))
    np.testing.assert_array_equal(maps.grid, grids)
    for i in range(len(seeds)):
        hazards = maps.hazard_kind[i] > 0
        crates = maps.crate_look[i] >= 0
        ours = [(*xy, v, k) for xy, v, k in zip(maps.hazard_cell[i], maps.hazard_speed[i], maps.hazard_kind[i], strict=True) if k]
        ours += [(*xy, 0, coinrun.CRATE) for xy in maps.crate_cell[i][crates]]
        theirs = things[i][~np.isnan(things[i, :, 0]) & (things[i, :, 6] > 0)][:, [0, 1, 2, 6]] - [0.5, 0.5, 0, 0]
        assert len(ours) == len(theirs) == hazards.sum() + crates.sum()
        np.testing.assert_allclose(sorted(map(tuple, np.float32(ours).reshape(-1, 4))), sorted(map(tuple, theirs)), atol=1e-6)


@pytest.mark.parametrize("kind", ["hard", "easy"])
def test_dynamics(recorded, kind):
    seed, action, agent, done, reward, enemies = (
        recorded[f"{kind}_{name}"] for name in ("seed", "action", "agent", "done", "reward", "enemies")
    )
    levels = CoinRun(hard=kind == "hard").levels(seed)
    _, (states, _, ours_reward, terminated) = to_numpy(play(levels, np.int32(action)))
    ours = np.stack([states.x, states.y, states.vx, states.vy], -1).swapaxes(0, 1)
    for i in range(len(seed)):
        steps = np.flatnonzero(done[i])[0] if done[i].any() else done.shape[1]
        np.testing.assert_array_equal(terminated[: steps + 1, i], done[i, : steps + 1])
        np.testing.assert_array_equal(ours_reward[: steps + 1, i], reward[i, : steps + 1])
        np.testing.assert_allclose(ours[i, :steps], agent[i, :steps], atol=2e-5)
        there = np.asarray(levels.enemy_v[i]) != 0
        np.testing.assert_allclose(np.sort(states.enemy_x[:steps, i, there], -1), enemies[i, :steps, : there.sum()], atol=2e-5)
    assert (reward > 0).any() and (done & (reward == 0)).any() and steps > 0


def test_pictures(recorded):
    """The game's monochrome mode, pixel for pixel. The recording has a digit in base 4 for each channel; 0 is black."""
    code = recorded["frames"].astype(int)
    channels = np.stack([code // 16, code // 4 % 4, code % 4], -1)
    theirs = np.where(code[..., None] > 0, 64 * channels + 63, 0)
    first, (_, frames, _, _) = to_numpy(play(MONO.levels(recorded["frame_seed"]), np.int32(recorded["frame_action"]), True))
    ours = np.concatenate([first[None], frames]).swapaxes(0, 1)
    assert ours.dtype == np.uint8 and ours.shape == theirs.shape
    np.testing.assert_array_equal(ours, theirs)


def test_velocity_patch():
    """Shades by hand: 255 (v / 2 vmax + 1/2), rounded down, in two squares of 13 pixels."""
    paint = lambda vx, vy: coinrun.to_bytes(coinrun.paint_velocity(jnp.zeros((64, 64), jnp.uint32), np.float32(vx), np.float32(vy)))
    image, up = np.asarray(paint(0.25, -1.5)), np.asarray(paint(0, 1.5))
    assert (image[:13, :13] == 191).all() and not image[:13, 13:].any() and not image[13:].any()
    assert paint(0, np.float32(1.5) - np.float32(0.2) - np.float32(0.2))[0, 13, 0] == 220  # in the game; 221 without the last bits
    assert (up[:13, :13] == 127).all() and (up[:13, 13:26] == 255).all()


# --- what must hold


@pytest.fixture(scope="module")
def clips():
    env = CoinRun(num_levels=8)
    params = env.default_params._replace(max_steps_in_episode=50)
    run = jax.jit(jax.vmap(lambda key: play_clip(key, env, params, random_policy, 120)))
    return env, params, *to_numpy(run(jax.random.split(jax.random.key(0), 4)))


def test_rollout(clips):
    env, params, states, clip = clips
    assert clip.frames.shape == (4, 120, 64, 64, 3) and clip.frames.dtype == np.uint8
    assert set(np.unique(clip.actions)) == set(range(15))
    ends = [np.flatnonzero(done) for done in clip.done]
    for i, end in enumerate(ends):
        assert np.diff(end, prepend=-1).max() == 50  # none is longer than the limit
        assert (np.flatnonzero(np.diff(clip.levels[i])) == end[end < 119])[np.diff(clip.levels[i])[end[end < 119]] != 0].all()
    assert (clip.frames[:, 1:] != clip.frames[:, :-1]).any((2, 3, 4)).mean() > 0.8


def test_pictures_of_ours(clips):
    """A clip begins with its level's first picture; the agent is in the middle, and looks where it goes."""
    env, params, _, clip = clips
    state = env.reset_to_level(clip.levels[0, 0], params)
    states = [state, state._replace(look=jnp.int32(4))]
    right, left = np.asarray(jax.jit(jax.vmap(lambda s: env.render(s, params)))(jax.tree.map(lambda *x: jnp.stack(x), *states)))
    np.testing.assert_array_equal(clip.frames[0, 0], right)
    rows, columns = np.nonzero((right != left).any(-1))
    assert 25 <= rows.min() <= rows.max() < 35 and 29 <= columns.min() <= columns.max() < 35
    np.testing.assert_array_equal(coinrun.AGENT_LOOKS[:, 1], coinrun.AGENT_LOOKS[:, 4, :, ::-1])


def test_special_actions_do_nothing():
    env = CoinRun(num_levels=3)
    params = env.default_params
    state = env.reset_to_level(2, params)
    step = jax.jit(lambda action: env.step_env(None, state, action, params)[1])
    still = to_numpy(step(4))
    for action in (9, 14):
        jax.tree.map(np.testing.assert_array_equal, to_numpy(step(action)), still)
    assert step(7).vx == np.float32(0.1) and step(5).vy == np.float32(1.5)  # 0.2 * 0.5 on the ground, and a jump


def test_bad_levels():
    for bad in (dict(num_levels=0), dict(start_level=-1), dict(start_level=2**31)):
        with pytest.raises(UsageError):
            CoinRun(**bad)
    with pytest.raises(UsageError):
        CoinRun().levels([])


def test_expert():
    """It takes the coin of levels on which always right and jump does not."""
    env = CoinRun(start_level=20_000, num_levels=4)
    params, expert = env.default_params, make_expert(env)

    def play(level, policy):
        def step(carry, key):
            state, won, done = carry
            _, state, reward, terminated, _ = env.step_env(None, state, policy(key, state, params), params)
            return (state, won | (~done & (reward > 0)), done | terminated), None

        start = (env.reset_to_level(level, params), jnp.bool_(False), jnp.bool_(False))
        return jax.lax.scan(step, start, jax.random.split(jax.random.key(level), 80))[0][1]

    won, constant = (
        np.asarray(jax.jit(jax.vmap(lambda level, policy=policy: play(level, policy)))(jnp.arange(4)))
        for policy in (expert, lambda *_: jnp.int32(8))
    )
    assert won.sum() >= 3 and constant.sum() < won.sum()
