"""Matrix games against tables worked out by hand, a slow sum of the discounted game, and the papers' closed forms."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.runs.config import UsageError
from envs.matrix_games import InfiniteMatrixGame, MatrixGame, discounted_values, n_player, solve_dominant, two_player

# By hand, from the papers: (game, my action, the other's) -> my reward; 0 cooperates.
BY_HAND = {
    "ipd": {(0, 0): -1, (0, 1): -3, (1, 0): 0, (1, 1): -2},
    "chicken": {(0, 0): 0, (0, 1): -1, (1, 0): 1, (1, 1): -100},
    "stag_hunt": {(0, 0): 4, (0, 1): 1, (1, 0): 3, (1, 1): 2},
}
# Leading the Pack's tables as its authors' settings give them: game -> players -> rows by number of defectors, (to C, to D).
TABLES = {
    "public_goods": {3: [(4, None), (2, 5), (0, 3), (None, 1)], 4: [(6, None), (4, 7), (2, 5), (0, 3), (None, 1)]},
    "snowdrift": {3: [(7 / 3, None), (2, 3), (1, 3), (None, 0)], 2: [(1.5, None), (1, 2), (None, 0)]},
    "stag_hunt": {3: [(3, None), (1, 4), (-3, 0), (None, 0)], 4: [(3, None), (1.5, 4.5), (0, 3), (-3, 0), (None, 0)],
                  5: [(3, None), (1.8, 4.8), (0.6, 3.6), (-3, 0), (-3, 0), (None, 0)]},
    "tragedy": {3: [(2, None), (2, 5), (-3, 0), (None, 0)], 4: [(2, None), (2, 5), (-3, 0), (-3, 0), (None, 0)],
                5: [(2, None), (2, 5), (2, 5), (-3, 0), (-3, 0), (None, 0)]},
}  # fmt: skip


def step(env, actions):
    """-> obs, reward of one step from START, as numpy."""
    params = env.default_params
    _, state = env.reset_env(None, params)
    obs, _, reward, terminated, _ = env.step_env(None, state, jnp.asarray(actions, jnp.int32), params)
    assert not terminated
    return np.array(obs), np.array(reward)


def all_rewards(payoff):
    """Joint action -> rewards (A,), by playing every one of them."""
    env, num = MatrixGame(payoff), len(payoff)
    joint = np.array(list(itertools.product((0, 1), repeat=num)), np.int32)
    _, state = env.reset_env(None, env.default_params)
    play = jax.jit(jax.vmap(lambda actions: env.step_env(None, state, actions, env.default_params)[2]))
    return dict(zip(map(tuple, joint.tolist()), np.array(play(joint)), strict=True))


@pytest.mark.parametrize("game", BY_HAND)
def test_games_of_two(game):
    for (mine, others), reward in all_rewards(two_player(game)).items():
        np.testing.assert_array_equal(reward, [BY_HAND[game][mine, others], BY_HAND[game][others, mine]])


def test_matching_pennies():
    """The first player wins where both show the same; the sum is zero."""
    for (first, second), reward in all_rewards(two_player("imp")).items():
        np.testing.assert_array_equal(reward, [1, -1] if first == second else [-1, 1])


def test_observations_of_two_players():
    """Own action first: where the first player sees CD, the second sees DC; an episode begins at START."""
    env = MatrixGame(two_player("ipd"))
    start, _ = env.reset_env(None, env.default_params)
    np.testing.assert_array_equal(start, [[0, 0, 0, 0, 1]] * 2)
    for actions, seen in {(0, 0): (0, 0), (0, 1): (1, 2), (1, 0): (2, 1), (1, 1): (3, 3)}.items():
        np.testing.assert_array_equal(step(env, actions)[0].argmax(1), seen)


def test_observation_of_three_players_is_rotated():
    """Player 1 of (C, D, C) sees its own D, then player 2's C, then player 0's C: binary 100."""
    obs, _ = step(MatrixGame(n_player("tragedy", 3)), (0, 1, 0))
    assert obs.shape == (3, 9)
    np.testing.assert_array_equal(obs.argmax(1), [0b010, 0b100, 0b001])
    np.testing.assert_array_equal(obs.sum(1), 1)


@pytest.mark.parametrize(("game", "players"), [(game, n) for game, tables in TABLES.items() for n in tables])
def test_games_of_many_equal_the_tables(game, players):
    for joint, reward in all_rewards(n_player(game, players)).items():
        expected = [TABLES[game][players][sum(joint)][action] for action in joint]
        np.testing.assert_allclose(reward, expected, atol=1e-6)


@pytest.mark.parametrize("players", [2, 3, 4, 5, 6])
def test_closed_forms(players):
    """What must hold of each game by its definition, for every joint action; permuting players permutes rewards."""
    rewards = {game: all_rewards(n_player(game, players)) for game in TABLES}
    for joint in rewards["public_goods"]:
        cooperators = players - sum(joint)
        for i, action in enumerate(joint):
            flipped = joint[:i] + (1 - action,) + joint[i + 1 :]
            gain = (rewards["public_goods"][flipped][i] - rewards["public_goods"][joint][i]) * (1 if action == 0 else -1)
            assert gain == pytest.approx(1), "to defect gains exactly one whatever the others do"
        welfare = rewards["snowdrift"][joint].sum()
        assert welfare == pytest.approx(players**2 - players + 1 if cooperators else 0, abs=1e-4)
        hunters, kept = max(2, (players + 1) // 2), cooperators > players / 2
        caught = 6 * cooperators / players if cooperators >= hunters else 0
        assert rewards["stag_hunt"][joint].sum() == pytest.approx(players * caught - 3 * cooperators, abs=1e-4)
        assert rewards["tragedy"][joint].sum() == 5 * players * kept - 3 * cooperators
        for table in rewards.values():
            turned = joint[1:] + joint[:1]
            np.testing.assert_allclose(table[turned], np.roll(table[joint], -1), atol=1e-6)
    everyone, nobody = (0,) * players, (1,) * players
    assert rewards["public_goods"][everyone][0] == 2 * (players - 1) and rewards["public_goods"][nobody][0] == 1
    assert all(rewards[game][nobody][0] == 0 for game in ("snowdrift", "stag_hunt", "tragedy"))


def test_public_goods_of_two_is_the_prisoners_dilemma():
    """The same game, three higher."""
    np.testing.assert_array_equal(n_player("public_goods", 2), two_player("ipd") + 3)


def test_what_is_not_an_action_cooperates():
    env = MatrixGame(two_player("ipd"))
    for strange in (-1, 2, 99):
        np.testing.assert_array_equal(step(env, (strange, 1))[1], step(env, (0, 1))[1])


@pytest.mark.parametrize("make", [lambda: two_player("go"), lambda: n_player("ipd", 3), lambda: n_player("tragedy", 1),
                                  lambda: n_player("tragedy", 11), lambda: MatrixGame(np.zeros((2, 5))),
                                  lambda: MatrixGame(two_player("ipd"), 0), lambda: InfiniteMatrixGame(np.zeros((3, 8))),
                                  lambda: InfiniteMatrixGame(two_player("ipd"), gamma=1.0)])  # fmt: skip
def test_bad_arguments_get_one_line(make):
    with pytest.raises(UsageError) as error:
        make()
    assert "must" in str(error.value) and "\n" not in str(error.value)


# --- the infinite game


def summed(first, second, payoff, gamma, steps=4000):
    """The value of two policies by playing out the distribution over joint actions, in float64."""
    swap = [0, 2, 1, 3]
    joint = lambda p, q: np.array([p * q, p * (1 - q), (1 - p) * q, (1 - p) * (1 - q)])
    moves = np.array([joint(first[s], second[swap[s]]) for s in range(4)])
    now, total = joint(first[4], second[4]), np.zeros(2)
    for t in range(steps):
        total += gamma**t * np.array([now @ payoff[0], now @ payoff[1][swap]])
        now = now @ moves
    return (1 - gamma) * total


@pytest.mark.parametrize("game", ["ipd", "imp", "stag_hunt"])
def test_discounted_values_are_the_sum(game):
    first, second = np.random.default_rng(0).uniform(size=(2, 20, 5))
    payoff = two_player(game)
    ours = np.array(jax.jit(lambda p, q: discounted_values(p, q, payoff, 0.96))(first, second))
    assert ours.shape == (20, 2)
    expected = [summed(p, q, payoff.astype(float), 0.96) for p, q in zip(first, second, strict=True)]
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_discounted_values_by_hand():
    """Tit for tat against always-defect loses the first step only: (1 - g) (-3) + g (-2) and (1 - g) 0 + g (-2)."""
    tit_for_tat, defect = jnp.array([1.0, 0, 1, 0, 1]), jnp.zeros(5)
    value = discounted_values(tit_for_tat, defect, two_player("ipd"), 0.9)
    np.testing.assert_allclose(value, [-0.3 - 1.8, -1.8], atol=1e-6)
    swapped = discounted_values(defect, tit_for_tat, two_player("ipd"), 0.9)
    np.testing.assert_allclose(swapped, [-1.8, -0.3 - 1.8], atol=1e-6)


def test_discounted_values_have_gradients_under_vmap():
    """Against finite differences; and no LAPACK in the program, which could deadlock when batched."""
    payoff, policies = two_player("ipd"), jnp.asarray(np.random.default_rng(1).uniform(0.1, 0.9, (3, 2, 5)))
    value = lambda p: discounted_values(p[0], p[1], payoff, 0.9)[0]
    grads = np.array(jax.jit(jax.vmap(jax.grad(value)))(policies))
    for k in range(3):
        for place in itertools.product(range(2), range(5)):
            shift = np.zeros((2, 5))
            shift[place] = 1e-4
            p = np.array(policies[k], float)
            up, down = (summed(*(p + s), payoff.astype(float), 0.9, 600)[0] for s in (shift, -shift))
            assert grads[k][place] == pytest.approx((up - down) / 2e-4, abs=2e-3)
    text = str(jax.make_jaxpr(jax.vmap(jax.grad(value)))(policies))
    assert not re.search(r"= (lu|triangular_solve|qr|cholesky|custom_linear_solve)\b", text)


def test_solve_dominant():
    rng = np.random.default_rng(2)
    a = rng.uniform(-1, 1, (50, 4, 4)) + 5 * np.eye(4)
    b = rng.normal(size=(50, 4, 2))
    np.testing.assert_allclose(solve_dominant(a, b), np.linalg.solve(a, b), atol=1e-5)


def test_infinite_game_steps():
    env = InfiniteMatrixGame(two_player("ipd"), gamma=0.96)
    obs, state = env.reset_env(jax.random.key(0), env.default_params)
    assert obs.shape == (2, 10) and obs.min() >= 0.5 and obs.max() <= 0.7311
    logits = jnp.array([[50.0] * 5, [-50.0] * 5])  # always cooperate against always defect
    obs, state, reward, _, _ = env.step_env(None, state, logits, env.default_params)
    np.testing.assert_allclose(reward, [-3, 0], atol=1e-5)
    np.testing.assert_allclose(obs, [[1] * 5 + [0] * 5, [0] * 5 + [1] * 5], atol=1e-6)
