"""The humanoid's experts: what their commands ask for, what rewards say of it, and how policies are packed."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from algos import humanoid_experts as experts
from algos.humanoid_experts import CPU, SWING
from common.runs.checkpoint import save
from common.runs.config import UsageError, as_dict
from common.runs.earlier import state_like
from envs.humanoid import CROUCHING, REST, STANDING, Humanoid, split
from envs.humanoid_skills import PERIOD, SKILLS, Command, act, load_skills

WALK, STAND, CROUCH, HOP, DIVE = range(len(SKILLS))
TINY = replace(CPU, num_envs=4, num_steps=4, hidden=8, num_minibatches=2, num_updates=4, log_every=2, eval_every=4, save_every=2)


def command_of(skill, speed=0.0, height=STANDING, clock=0):
    """A command of each of some clocks (or speeds, ...)."""
    all = np.broadcast_arrays(skill, speed, height, clock, np.zeros(1))[:4]
    kinds = (jnp.int32, jnp.float32, jnp.float32, jnp.int32)
    return Command(*(jnp.asarray(x, kind) for x, kind in zip(all, kinds, strict=True)))


# --- gaits


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (command_of(WALK, 1.5, clock=[0, 4, 9, 12, 16, 19]), ["01", "01", "11", "10", "10", "11"]),
        (command_of(WALK, -1.0, clock=[0, 9, 12]), ["01", "11", "10"]),
        (command_of(HOP, 0.3, clock=[0, 5, 9, 12, 19]), ["00", "00", "11", "11", "11"]),
        (command_of(HOP, 0.0, clock=[20, 25, 29, 60]), ["00", "00", "11", "00"]),
        (command_of(WALK, [0.1, -0.1, 0.0], clock=[0, 0, 12]), ["11", "11", "11"]),
        (command_of([STAND, CROUCH, DIVE], 1.0, clock=2), ["11", "11", "11"]),
    ],
)
def test_feet_are_to_bear_weight_by_the_clock(command, expected):
    """Walking, one foot is in the air and then the other; hopping, both; slow walks and the rest stand."""
    found = np.asarray(experts.expected_contact(command))
    assert ["".join("01"[int(foot)] for foot in feet) for feet in found.T] == expected


def test_each_foot_is_in_the_air_for_its_share_of_the_cycle():
    for skill in (WALK, HOP):
        contact = experts.expected_contact(command_of(skill, 1.0, clock=np.arange(PERIOD)))
        np.testing.assert_allclose((~contact).mean(1), SWING, atol=1.01 / PERIOD)


# --- rewards


@pytest.fixture(scope="module")
def standing():
    """A humanoid that stands at rest, both feet bearing weight, (..., 1), its pelvis at exactly the height."""
    env = Humanoid()
    angle = np.zeros(13, np.float32)
    for i, rod in enumerate(env.robot.rods[1:], 1):
        angle[i] = angle[rod.parent] + REST[i - 1]
    state = env.begin(jnp.asarray(angle), jnp.zeros(2), jnp.zeros(13), env.default_params)[1]
    state = state._replace(push=jnp.zeros(11).at[:4].set(0.25))
    state = jax.tree.map(lambda x: jnp.asarray(x)[..., None], state)
    return state._replace(pos=state.pos.at[1].add(STANDING - env.torso(state)[0][1]))


def reward(state, command):
    return float(experts.gait_reward(state, command, split(Humanoid().get_obs(state).T))[0])


def test_standing_still_is_what_standing_asks_for(standing):
    """By hand: speed, height, trunk, contacts in full; arms and knees by their distance from what is wanted."""
    near = lambda x, width: np.exp(-((x / width) ** 2))
    arms = 2 * near(0.1, 0.4) + 2 * near(0.2, 0.5)
    expected = 0.35 + 0.2 + 0.2 + 0.25 + 0.05 * arms / 2 + 0.05
    knee = list(np.float32(REST)).index(np.float32(-0.4))
    assert knee == 3  # not a hip
    found = reward(standing, command_of(STAND))
    assert found == pytest.approx(expected, abs=0.03)


def test_speed_height_and_contacts_are_rewarded_as_commanded(standing):
    """Each alone, all else the same."""
    lifted = lambda *points: standing._replace(push=standing.push.at[np.array(points)].set(0))
    walk = command_of(WALK, 1.0, clock=4)
    both, swung, wrong = (reward(x, walk) for x in (standing, lifted(0, 1), lifted(2, 3)))
    assert swung - both == pytest.approx(0.125, abs=1e-4) and both - wrong == pytest.approx(0.125, abs=1e-4)
    moving = standing._replace(vel=standing.vel.at[0].set(1.0))
    assert reward(moving, walk) - reward(standing, walk) == pytest.approx(0.35 * (1 - np.exp(-6.25)) + 0.05, abs=1e-3)
    low = standing._replace(pos=standing.pos.at[1].add(CROUCHING - STANDING))
    stand, crouch = command_of(STAND), command_of(CROUCH, height=CROUCHING)
    drop = STANDING - CROUCHING
    assert reward(standing, stand) - reward(low, stand) == pytest.approx(0.2 * (1 - np.exp(-((drop / 0.1) ** 2))) + drop, abs=1e-3)
    assert reward(low, crouch) - reward(standing, crouch) == pytest.approx(0.2 + 3 * drop, abs=1e-3)


def test_hops_are_rewarded_for_rising_while_the_clock_says_so(standing):
    up = standing._replace(vel=standing.vel.at[1].set(0.5))
    gain = lambda clock: reward(up, command_of(HOP, clock=clock)) - reward(standing, command_of(HOP, clock=clock))
    assert gain(4) == pytest.approx(0.15, abs=1e-3) and gain(12) == pytest.approx(0, abs=1e-3)


def test_arms_swing_against_each_other_when_walking(standing):
    """A quarter into the cycle the left arm is in front."""

    def swung(by):
        angle = standing.angle.at[9:11].add(0.1 + by).at[11:13].add(0.1 - by)  # both at 0, and then apart
        return standing._replace(angle=angle)

    walk, stand = command_of(WALK, 1.0, clock=PERIOD // 4), command_of(STAND)
    assert reward(swung(0.5), walk) > reward(swung(0.0), walk) + 0.02 > reward(swung(-0.5), walk) + 0.03
    assert reward(swung(0.5), stand) < reward(swung(0.0), stand) - 0.02


def test_diving_is_rewarded_for_turning_forwards_and_getting_ahead(standing):
    worth = lambda spin, speed: float(
        experts.dive_reward(standing._replace(spin=standing.spin.at[0].set(spin), vel=standing.vel.at[0].set(speed)), None)[0]
    )
    assert worth(-2.5, 1.0) == pytest.approx(0.7) and worth(3.0, -4.0) == pytest.approx(-0.6)
    assert worth(-9.0, 9.0) == pytest.approx(1.4)


def test_abrupt_commands_and_fast_joints_cost(standing):
    seen = split(Humanoid().get_obs(standing).T)
    calm = standing.act.T
    assert experts.effort(standing, calm, seen)[0] == 0
    assert experts.effort(standing, calm + 0.5, seen)[0] == pytest.approx(0.3 * 0.25, rel=1e-4)
    fast = seen | {"joints_vel": jnp.full((1, 12), 3.0)}
    assert experts.effort(standing, calm, fast)[0] == pytest.approx(0.0004 * 9, rel=1e-4)


# --- learning


def test_log_probabilities_are_those_of_normal_distributions():
    rng = np.random.default_rng(0)
    mean, action, log_std = rng.normal(size=(3, 12)), rng.normal(size=(3, 12)), rng.normal(size=12)
    expected = stats.norm.logpdf(action, mean, np.exp(log_std)).sum(-1) + 6 * np.log(2 * np.pi)
    np.testing.assert_allclose(experts.log_prob(*map(jnp.float32, (mean, log_std, action))), expected, rtol=1e-3)


def test_observations_are_standardised_by_running_means():
    """The first update counts for nearly all; in the long run each for a five-hundredth."""
    obs = jnp.float32(np.random.default_rng(0).normal(3, 2, (4, 50, 56)))
    norm = {"count": jnp.float32(1e-2), "mean": jnp.zeros(56), "square": jnp.ones(56)}
    norm = experts.follow(norm, obs)
    share = 1 / 1.01
    np.testing.assert_allclose(norm["mean"], share * obs.mean((0, 1)), rtol=1e-4)
    np.testing.assert_allclose(norm["square"], 1 - share + share * (obs**2).mean((0, 1)), rtol=1e-4)
    late = experts.follow(norm | {"count": jnp.float32(1e6)}, obs + 1)
    np.testing.assert_allclose(late["mean"] - norm["mean"], 0.002 * (obs.mean((0, 1)) + 1 - norm["mean"]), rtol=2e-2, atol=1e-5)
    policy = experts.policy_of({"actor": []}, norm)
    variance = np.asarray(norm["square"]) - np.asarray(norm["mean"]) ** 2
    np.testing.assert_allclose(policy["std"], np.sqrt(variance), rtol=1e-3)
    still = experts.policy_of({"actor": []}, {"mean": jnp.ones(56), "square": jnp.ones(56)})
    np.testing.assert_allclose(still["std"], 0.01, rtol=1e-4)


@pytest.mark.parametrize("stage", ["gaits", "dive"])
def test_types_do_not_depend_on_x64(stage):
    with jax.enable_x64():
        train = experts.make_train(replace(TINY, stage=stage))
        state = jax.eval_shape(train.init, jax.eval_shape(lambda: jax.random.key(0)))
        new, metrics = jax.eval_shape(train.update, state, jax.ShapeDtypeStruct((), jnp.int32))
        results = jax.eval_shape(train.evaluate, state)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert types(new) == types(state)
    assert not {x.dtype for x in jax.tree.leaves((new, metrics, results))} & {np.dtype("int64"), np.dtype("float64")}
    assert results["skills"].dtype == jnp.uint8


def test_settings_that_do_not_fit_are_refused_in_one_line():
    for changes, words in (
        ({"num_minibatches": 3}, "--num-envs 1024: must be a multiple of --num-minibatches 3"),
        ({"hidden": 0}, "--hidden 0: must be at least 1"),
        ({"gamma": 1.5}, "--gamma 1.5: must lie between 0 and 1"),
    ):
        with pytest.raises(UsageError, match=f"^{words}"):
            replace(CPU, **changes)
    with pytest.raises(UsageError, match="pack: trains nothing"):
        experts.make_train(replace(TINY, stage="pack"))


# --- packing


def save_run(folder, stage, seed):
    """A run's folder with the checkpoint of a model at random; and the first seed's policy."""
    config, rng = replace(TINY, stage=stage, num_seeds=2, seed=seed), np.random.default_rng(seed)
    key = lambda x: jax.random.split(jax.random.key(1), x.shape[0])
    fill = lambda x: key(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.asarray(rng.normal(size=x.shape), x.dtype)
    state = jax.tree.map(fill, state_like(config, experts.make_train))
    state = state._replace(norm=state.norm | {"square": state.norm["mean"] ** 2 + 1})
    save(folder / "checkpoints" / "00000004.npz", state, {"config": as_dict(config), "update": 4})
    first = jax.tree.map(lambda x: x[0], state._replace(key=()))
    return str(folder), jax.device_get(experts.policy_of(first.params, first.norm))


def test_packed_policies_come_back_and_act_alike(tmp_path, capsys):
    """In half precision: those of the first seeds, by what they were trained to do."""
    runs = {stage: save_run(tmp_path / stage, stage, seed) for seed, stage in enumerate(("gaits", "dive"))}
    path = tmp_path / "skills.npz"
    experts.main(replace(TINY, stage="pack", load=tuple(folder for folder, _ in runs.values()), out=str(path)))
    found, obs = load_skills(path), 2 * jax.random.normal(jax.random.key(0), (5, 56))
    assert found.keys() == runs.keys() and str(path) in capsys.readouterr().out
    for stage, (_, policy) in runs.items():
        assert jax.tree.structure(found[stage]) == jax.tree.structure(policy)
        for a, b in zip(jax.tree.leaves(found[stage]), jax.tree.leaves(policy), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
        command = command_of([WALK, STAND, CROUCH, HOP, DIVE], 1.0, clock=3)
        np.testing.assert_allclose(act(found[stage], obs, command), act(policy, obs, command), atol=0.1)
    assert np.abs(act(found["dive"], obs, command) - act(found["gaits"], obs, command)).max() > 1
    about = str(np.load(path)["about"])
    assert "gaits: --num-updates 4 --seed 0 --hidden 8" in about and "dive: --num-updates 4 --seed 1 --hidden 8" in about


def test_packing_nothing_is_refused_in_one_line(tmp_path, capsys):
    for load, words in (((), "pack: give the runs, --load RUN RUN"), ((str(tmp_path / "none"),), "there is no checkpoint")):
        with pytest.raises(SystemExit) as stop:
            experts.main(replace(TINY, stage="pack", load=load, out=str(tmp_path / "skills.npz")))
        told = capsys.readouterr().err
        assert stop.value.code == 2 and words in told and told.count("\n") == 1
    assert not (tmp_path / "skills.npz").exists()
