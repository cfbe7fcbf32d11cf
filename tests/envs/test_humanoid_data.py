"""What H-GAP learns from: episodes are never mixed, skills and demonstrations, files of one's own."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.env import shipped
from common.runs.config import UsageError
from envs import humanoid_data
from envs.humanoid import CROUCHING, PARTS, REST_ACTION, STANDING, TASKS, Humanoid, split
from envs.humanoid_data import draw_windows, load_data, read_npz, standardise
from envs.humanoid_skills import (
    FASTEST,
    FEATURES,
    FILE,
    NOISE,
    PERIOD,
    SKILLS,
    SLOWEST,
    Command,
    act,
    command_features,
    demonstrate,
    load_skills,
    new_command,
    phase,
    save_skills,
    steps_left,
    window_starts,
)

# --- episodes and windows


@pytest.fixture
def over():
    """Where episodes end, of 5 demonstrators: never, in the first step, in the last, one after another, and at random."""
    ends = np.zeros((5, 40), bool)
    ends[1, 0] = ends[2, -1] = ends[3, 10:14] = True
    ends[4] = np.random.default_rng(0).random(40) < 0.15
    return ends


def episodes(over):
    """The number of each step's episode, (N, T)."""
    return np.cumsum(over, 1) - over


def test_steps_left_are_those_of_the_same_episode(over):
    number = episodes(over)
    expected = [[(row[t:] == row[t]).sum() for t in range(40)] for row in number]
    found = steps_left(jnp.asarray(over))
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == jnp.int32


@pytest.mark.parametrize("length", [1, 5, 16])
def test_windows_never_straddle_an_episodes_end(over, length):
    """All that lie within one begin somewhere, and no others: the numbers of a window's steps are one."""
    number = episodes(over)
    starts = window_starts(np.asarray(steps_left(jnp.asarray(over))), length)
    whole = {(n, t) for n in range(5) for t in range(41 - length) if len(set(number[n, t : t + length])) == 1}
    assert set(map(tuple, starts.tolist())) == whole and len(starts) == len(whole) and starts.dtype == np.int32


def test_drawn_windows_hold_one_episode_in_its_order(over):
    number, time = episodes(over), np.broadcast_to(np.arange(40), over.shape)
    lane = np.broadcast_to(np.arange(5)[:, None], over.shape)
    steps = np.stack([lane, number, time], -1).astype(np.float32)
    starts = window_starts(np.asarray(steps_left(jnp.asarray(over))), 6)
    windows = np.asarray(draw_windows(jax.random.key(0), steps, starts, 3000, 6))
    assert windows.shape == (3000, 6, 3)
    assert (windows[..., :2] == windows[:, :1, :2]).all() and (np.diff(windows[..., 2], axis=1) == 1).all()
    assert len(np.unique(windows[:, 0], axis=0)) == len(starts), "some windows are never drawn"


# --- skills


def test_skills_that_are_shipped_are_small_and_do_something():
    assert shipped(FILE, "").stat().st_size <= 1_000_000
    skills = load_skills()
    assert set(skills) == {"gaits", "dive"}
    command = Command(*(jnp.zeros(3, dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32, jnp.int32)))
    for params in skills.values():
        assert params["mean"].shape == params["std"].shape == (Humanoid.obs_size,) and (params["std"] > 0).all()
        assert params["layers"][0]["w"].shape[0] == Humanoid.obs_size + FEATURES
        assert all(x.dtype == np.float32 and np.isfinite(x).all() for x in jax.tree.leaves(params))
        action = act(params, jnp.tile(params["mean"], (3, 1)), command)
        assert action.shape == (3, Humanoid.num_actions) and np.abs(action - REST_ACTION).max() > 0.05


def a_policy(seed, hidden=8):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    shapes = ((56 + FEATURES, hidden), (hidden, hidden), (hidden, 12))
    layers = [{"w": 0.3 * draw(*shape), "b": draw(shape[1])} for shape in shapes]
    return {"mean": draw(56), "std": 1 + draw(56) ** 2, "layers": layers}


def test_skills_come_back_from_their_file(tmp_path):
    policies = {"gaits": a_policy(0), "dive": a_policy(1)}
    save_skills(tmp_path / "skills.npz", policies, "how they were made")
    found = load_skills(tmp_path / "skills.npz")
    assert jax.tree.structure(found) == jax.tree.structure(policies)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(policies), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
        assert a.dtype == np.float32
    assert str(np.load(tmp_path / "skills.npz")["about"]) == "how they were made"


def test_policies_act_around_the_pose_of_rest_as_numpy_says():
    params, rng = a_policy(2), np.random.default_rng(3)
    obs = (params["mean"] + 9 * rng.normal(size=(4, 56))).astype(np.float32)
    command = Command(jnp.array([0, 1, 3, 4]), jnp.array([1.0, 0, 0, 0]), jnp.full(4, 0.8), jnp.array([3, 3, 3, 3]))
    h = np.concatenate([np.clip((obs - params["mean"]) / params["std"], -5, 5), command_features(command)], -1)
    for layer in params["layers"][:-1]:
        h = np.tanh(h @ layer["w"] + layer["b"])
    expected = REST_ACTION + h @ params["layers"][-1]["w"] + params["layers"][-1]["b"]
    np.testing.assert_allclose(act(params, obs, command), expected, rtol=1e-4, atol=1e-4)


def command_of(skill, speed=0.0, height=STANDING, clock=0):
    return Command(*(jnp.asarray(x) for x in (np.int32(skill), np.float32(speed), np.float32(height), np.int32(clock))))


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (command_of(0, 1.5, clock=PERIOD // 4), [1.5, 0, 0, 0, 1, 0]),
        (command_of(0, -1.0, clock=3 * PERIOD), [-1, 0, 0, 0, 0, 1]),
        (command_of(2, 0, 0.67, clock=5), [0, 5 * (0.67 - STANDING), 0, 0, 0, 0]),
        (command_of(3, 0.4, clock=PERIOD // 2), [0.4, 0, 1, 0, 0, -1]),
        (command_of(4, 0, clock=5), [0, 0, 0, 1, 0, 0]),
    ],
)
def test_policies_see_their_command_and_the_clock_only_where_it_counts(command, expected):
    found = command_features(command)
    assert found.shape == (FEATURES,)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert phase(command) == (int(command.clock) % PERIOD) / PERIOD


def test_commands_lie_in_their_ranges():
    """Only skills that have a chance, as often as it says; a walk's speed and a crouch's height reach near both ends."""
    chances = np.array([0.4, 0.0, 0.3, 0.3, 0.0])
    command = jax.vmap(lambda key: new_command(key, chances))(jax.random.split(jax.random.key(0), 4000))
    skill, speed, height, clock = map(np.asarray, command)
    np.testing.assert_allclose(np.bincount(skill, minlength=5) / 4000, chances, atol=0.04)
    walk, crouch, hop = (skill == SKILLS.index(name) for name in ("walk", "crouch", "hop"))
    ends = lambda x: (x.min(), x.max())
    np.testing.assert_allclose(ends(speed[walk]), (SLOWEST, FASTEST), atol=0.05)
    np.testing.assert_allclose(ends(speed[hop]), (0.4 * SLOWEST, 0.4 * FASTEST), atol=0.05)
    np.testing.assert_allclose(ends(height[crouch]), (CROUCHING - 0.1, STANDING), atol=0.02)
    assert (speed[walk] >= SLOWEST).all() and (speed[walk] <= FASTEST).all() and not speed[crouch].any()
    assert (height[~crouch] == np.float32(STANDING)).all() and (height[crouch] <= STANDING).all()
    assert set(clock) == set(range(PERIOD))


# --- demonstrations


class Counting(Humanoid):
    """A humanoid whose pose stays, that rises by 1 m a step, and that falls in the seventh step of an episode, the 14th, ..."""

    def simulate(self, state, action, params):
        time = state.time + 1
        return state._replace(time=time, push=jnp.zeros_like(state.push).at[-1].set(time % 7 == 0), pos=state.pos.at[1].add(1.0))


POLICIES = {"gaits": a_policy(0), "dive": a_policy(1)}


@pytest.fixture(scope="module")
def demonstrated():
    """16 demonstrators, 2 of which dive, of 2 x 50 steps, in a world whose falls are known."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("envs.humanoid_skills.Humanoid", Counting)
        run = jax.jit(lambda key: demonstrate(key, POLICIES, 16, 2, diving=0.125))
        return jax.tree.map(np.asarray, run(jax.random.key(0)))


def test_demonstrations_end_with_their_falls_and_begin_anew(demonstrated):
    """Those of gaits fall in each seventh step; the height grows by 1 m a step within an episode, and nowhere else."""
    found, _ = demonstrated
    assert found.obs.shape == (16, 100, 56) and found.action.shape == (16, 100, 12)
    fell = found.fell[:14]
    assert (fell == ((np.arange(100) + 1) % 7 == 0)).all()
    np.testing.assert_array_equal(found.left[:14], steps_left(jnp.asarray(fell)))
    height = split(found.obs)["body_height"][..., 0]
    rises, left = np.diff(height, axis=1), found.left[:, :-1]
    np.testing.assert_allclose(rises[left > 1], 1, atol=1e-3)
    assert (rises[left == 1] < -1).all() and (left[:14] == 1).any()


def test_dives_go_on_through_falls(demonstrated):
    found, _ = demonstrated
    assert found.fell[14:].any() and (found.left[14:] > 7).any()
    ends = found.left[14:] == 1
    assert ends[:, :-1].sum() <= 8  # about one in 120 steps


def test_actions_are_the_policys_with_noise_in_range(demonstrated):
    """Of those that dive: their command is always the same."""
    found, _ = demonstrated
    assert np.abs(found.action).max() == 1 and np.isfinite(found.obs).all()
    command = Command(jnp.full((2, 100), 4), jnp.zeros((2, 100)), jnp.full((2, 100), STANDING), jnp.zeros((2, 100), int))
    mean = np.asarray(act(POLICIES["dive"], found.obs[14:], command))
    noise = (found.action[14:] - mean)[np.abs(mean) < 0.6]
    assert noise.size > 100 and np.abs(noise.mean()) < 5 * NOISE / noise.size**0.5
    assert noise.std() == pytest.approx(NOISE, rel=4 / noise.size**0.5)


def test_worlds_are_those_in_which_blocks_begin(demonstrated):
    found, worlds = demonstrated
    obs = jax.vmap(jax.vmap(Humanoid().get_obs, -1), -1)(worlds)  # (N, blocks, O) from (..., blocks, N)
    assert worlds.pos.shape == (2, 2, 16) and worlds.time.shape == (2, 16)
    for block in (0, 1):
        np.testing.assert_allclose(obs[:, block], found.obs[:, 50 * block], atol=1e-4)


# --- data


@pytest.fixture
def settings():
    return SimpleNamespace(data="skills", body="planar", episodes=4, window=4, dry_run=False)


def parts_of(num, seed, lengths):
    rng = np.random.default_rng(seed)
    obs, action = (rng.normal(3, 2, (num, 10, size)).astype(np.float32) for size in (56, 12))
    left = np.maximum(np.array(lengths)[:, None] - np.arange(10), 0).astype(np.int32)
    return obs, action, left, np.zeros((num, 10), bool)


def test_steps_are_standardised_by_those_that_are_there_and_are_learned_from(settings):
    """Not by what lies behind an episode's end, nor by what is held out; no number is blown up that hardly changes."""
    train, held = parts_of(3, 0, (10, 4, 6)), parts_of(2, 1, (10, 5))
    train[0][1, 4:], train[0][..., 7] = 1e6, 0.5
    data = standardise(Humanoid(), settings, train, held, None)
    there = np.concatenate(train[:2], -1)[train[2] > 0]
    assert len(there) == 20
    np.testing.assert_allclose(data.mean, there.mean(0), rtol=1e-4)
    np.testing.assert_allclose(data.std, np.maximum(there.std(0), 0.01), rtol=1e-4)
    np.testing.assert_allclose(data.held_steps * data.std + data.mean, np.concatenate(held[:2], -1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(data.steps * data.std + data.mean, np.concatenate(train[:2], -1), rtol=1e-3, atol=1e-4)
    assert set(map(tuple, data.starts)) == {*((0, t) for t in range(7)), (1, 0), *((2, t) for t in range(3))}
    assert set(map(tuple, data.held_starts)) == {*((0, t) for t in range(7)), (1, 0), (1, 1)}
    seen = split(there[:, :56])
    expected = {name: float(np.mean(task(seen))) for name, task in TASKS.items()}
    assert data.task_means == pytest.approx(expected, rel=1e-4) and data.num_obs == 56
    assert data.steps.dtype == data.held_steps.dtype == np.float32


@pytest.mark.parametrize("part", [0, 1])
def test_windows_longer_than_all_episodes_are_refused(settings, part):
    parts = [parts_of(2, 0, (10, 4)), parts_of(2, 0, (10, 4))]
    parts[part] = parts_of(2, 0, (3, 2))
    with pytest.raises(UsageError, match="--data skills: no episode is as long as --window 4"):
        standardise(Humanoid(), settings, *parts, None)


def test_demonstrators_held_out_are_a_group_of_their_own(settings, monkeypatch):
    """And evaluations begin where they do, but not where one lies."""
    blocks = humanoid_data.BLOCKS

    def stub(key, skills, num, blocks, diving):
        tag = jax.random.uniform(key, (1, 1, 1)) + jnp.arange(num, dtype=jnp.float32)[:, None, None]
        obs, action = (jnp.broadcast_to(tag, (num, 6, size)) for size in (56, 12))
        worlds = {"pos": jnp.broadcast_to(tag[:, 0, 0], (2, blocks, num)), "time": jnp.broadcast_to(jnp.arange(num), (blocks, num))}
        return (obs, action, jnp.full((num, 6), 6) - jnp.arange(6), jnp.zeros((num, 6), bool)), worlds

    monkeypatch.setattr(humanoid_data, "demonstrate", stub)
    monkeypatch.setattr(humanoid_data, "GROUP", 8)
    settings.episodes, settings.window = 20, 6
    data = load_data(settings)
    tags = lambda steps: set((steps * data.std + data.mean)[:, 0, 0].round(3).tolist())
    assert len(data.steps) == 20 and len(data.held_steps) == 8
    assert len(tags(data.steps)) == 20 and len(tags(data.held_steps)) == 8 and not tags(data.steps) & tags(data.held_steps)
    assert data.worlds["pos"].shape == (2, blocks * 7) and data.worlds["time"].shape == (blocks * 7,)
    assert set(data.worlds["time"].tolist()) == set(range(7))  # the eighth dives
    assert set(data.worlds["pos"][1].round(3).tolist()) < tags(data.held_steps)


def test_a_dry_run_draws_nothing(settings):
    settings.dry_run, settings.episodes = True, 130
    data = load_data(settings)
    assert data.steps.shape == (130, 400, 68) and not data.steps.any() and data.starts.shape == (1, 2)


# --- files


def npz(folder, name="data.npz", **changes):
    """A file of 12 episodes of 8 to 19 steps, in an order of their own; the first number of an action is the episode."""
    rng, num, steps = np.random.default_rng(0), 12, 20
    arrays = {"obs": rng.normal(size=(num, steps, 56)), "action": rng.uniform(-1, 1, (num, steps, 12))}
    arrays["action"][..., 0] = np.arange(num)[:, None] / 12
    arrays = {name: x.astype(np.float32) for name, x in arrays.items()} | {"length": 8 + np.arange(num) * 5 % num} | changes
    np.savez(folder / name, **{name: x for name, x in arrays.items() if x is not None})
    return folder / name


def test_a_file_of_ones_own_is_learned_from_and_a_tenth_held_out(settings, tmp_path):
    settings.data, settings.window = str(npz(tmp_path)), 10
    data = load_data(settings)
    lengths = 8 + np.arange(12) * 5 % 12
    long = [i for i in range(12) if lengths[i] >= 10]
    assert len(long) == 10
    tags = lambda steps, starts: (steps * data.std + data.mean)[starts[:, 0], starts[:, 1], 56] * 12
    assert set(tags(data.held_steps, data.held_starts).round().astype(int)) == {long[9]}
    found = tags(data.steps, data.starts).round().astype(int)
    assert np.bincount(found, minlength=12).tolist() == [lengths[i] - 9 if i in long[:9] else 0 for i in range(12)]
    assert data.worlds is None and not data.fell.any() and data.left.max() == lengths[long[:9]].max()


def test_few_episodes_are_held_out_the_last_and_one_is_too_few(settings, tmp_path):
    settings.data = str(npz(tmp_path, length=np.array([0, 12, *[0] * 8, 14, 0])))
    data = load_data(settings)
    assert len(data.steps) == 1 and data.left.max() == 12 and data.held_left.max() == 14
    settings.data = str(npz(tmp_path, length=np.array([0, 12, *[0] * 10])))
    with pytest.raises(UsageError, match="needs at least 2 episodes, one of them to be held out$"):
        load_data(settings)


def with_nan(name, place):
    """An array of a file with one number that is none."""
    size = {"obs": 56, "action": 12}[name]
    x = np.zeros((12, 20, size), np.float32)
    x[place] = np.nan
    return {name: x}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"obs": None}, "has no obs"),
        ({"action": None, "length": None}, "has no action, no length"),
        ({"obs": np.zeros((12, 20, 55), np.float32)}, "obs has 55 numbers a step, this body 56"),
        ({"action": np.zeros((12, 20, 56), np.float32)}, "action has 56 numbers a step, this body 12"),
        ({"obs": np.zeros((20, 56), np.float32)}, "obs has 2 axes, needs 3: episodes, steps, numbers"),
        ({"action": np.zeros((12, 20, 12), np.int64)}, "action is int64, needs floats"),
        ({"obs": np.zeros((12, 20, 56), bool)}, "obs is bool, needs floats"),
        ({"action": np.zeros((12, 19, 12), np.float32)}, "do not belong together"),
        ({"action": np.zeros((11, 20, 12), np.float32)}, "do not belong together"),
        ({"length": np.full(11, 20)}, "do not belong together"),
        ({"length": np.full((12, 1), 20)}, "do not belong together"),
        ({"length": np.full(12, 20.0)}, "do not belong together"),
        ({"length": np.full(12, 21)}, "a length is not between 0 and 20"),
        ({"length": np.full(12, -1)}, "a length is not between 0 and 20"),
        ({"length": np.full(12, 3)}, "the longest of 12 episodes has 3 steps, needs 4"),
        ({"length": np.zeros(12, int)}, "the longest of 12 episodes has 0 steps, needs 4"),
        (with_nan("obs", (3, 2, 5)), "obs of episode 3 is not finite at step 2"),
        (with_nan("action", (2, 7, 11)), "action of episode 2 is not finite at step 7"),
        ({"obs": np.array([{"a": 1}], object)}, "is no .npz of numbers (ValueError)"),
    ],
    ids=lambda x: x[:30].replace(" ", "_") if isinstance(x, str) else "",
)
def test_faulty_files_are_refused_in_one_line(tmp_path, changes, words):
    path = npz(tmp_path, **changes)
    with pytest.raises(UsageError) as error:
        read_npz(path, Humanoid, 4)
    assert words in str(error.value) and "\n" not in str(error.value) and str(error.value).startswith(f"--data {path}: ")


def test_no_episodes_at_all_are_refused_in_one_line(tmp_path):
    none = {"obs": np.zeros((0, 20, 56), np.float32), "action": np.zeros((0, 20, 12), np.float32), "length": np.zeros(0, int)}
    with pytest.raises(UsageError, match="the longest of 0 episodes has 0 steps, needs 4"):
        read_npz(npz(tmp_path, **none), Humanoid, 4)


def test_what_lies_behind_an_episodes_end_may_be_anything(tmp_path):
    changes = with_nan("obs", (0, slice(8, None))) | with_nan("action", (0, 19))
    obs, action, left, fell = read_npz(npz(tmp_path, **changes), Humanoid, 4)
    assert len(obs) == 12 and left[0].tolist() == [*range(8, 0, -1), *[0] * 12] and left.dtype == np.int32
    assert obs.dtype == action.dtype == np.float32 and fell.shape == left.shape and not fell.any()


@pytest.mark.parametrize("kind", ["text", "nothing", "a cut npz", "an npy", "a folder"])
def test_what_is_no_npz_is_refused_in_one_line(tmp_path, kind):
    path = tmp_path / "bad.npz"
    if kind == "a folder":
        path.mkdir()
    elif kind == "an npy":
        with path.open("wb") as file:
            np.save(file, np.zeros((12, 20, 56)))
    else:
        whole = npz(tmp_path).read_bytes()
        path.write_bytes({"text": b"no zip", "nothing": b"", "a cut npz": whole[: len(whole) // 2]}[kind])
    with pytest.raises(UsageError) as error:
        read_npz(path, Humanoid, 4)
    assert "is no .npz" in str(error.value) and "\n" not in str(error.value)


def test_data_that_are_not_there_and_bodies_without_data_are_refused(settings, tmp_path):
    settings.data = str(tmp_path / "none.npz")
    with pytest.raises(UsageError, match="none.npz: there is no such file or folder$"):
        load_data(settings)
    settings.data, settings.body = "skills", "cmu"
    with pytest.raises(UsageError, match="--body cmu: needs --data, MoCapAct's rollouts$"):
        load_data(settings)


@pytest.mark.slow
def test_demonstrations_of_the_shipped_skills_are_worth_learning_from(settings):
    """Most of what is shown goes on for long; it walks, and each task has its share."""
    settings.episodes, settings.window = 32, 16
    data = load_data(settings)
    assert (data.left > 100).mean() > 0.3 and np.isfinite(data.steps).all()
    assert data.task_means["forward"] > 0.1 and data.task_means["crouch"] > 0.05 and data.task_means["rotate"] > 0.05
    assert sum(PARTS.values()) == data.num_obs
