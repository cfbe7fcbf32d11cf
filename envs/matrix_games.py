"""Matrix games of two actions: iterated games for N players, and the infinite discounted game for two.

Iterated game (Shaper 2312.12568; Leading the Pack 2312.12564)
  obs      (A, 2^A + 1) float32, one-hot: the last joint action as each player sees it, its own action first and then its
           neighbours' clockwise, read as a binary number; for two players CC, CD, DC, DD. The last place is START.
  actions  (A,) int32: 0 cooperate, 1 defect; what is neither counts as 0
  reward   (A,) float32: the payoff of the joint action, taken on every step, the last included
  ends     after `max_steps_in_episode` steps (truncated); the next episode begins at START

A payoff is an array (A, 2^A): what each player gets in each joint action, in that player's own view.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.env import Environment
from common.runs.config import require

# Rows CC, CD, DC, DD; columns first and second player. Shaper's games, M-FOS's chicken (2205.01447), and Pax's stag hunt.
TWO_PLAYER = {
    "ipd": [[-1, -1], [-3, 0], [0, -3], [-2, -2]],
    "imp": [[1, -1], [-1, 1], [-1, 1], [1, -1]],
    "chicken": [[0, 0], [-1, 1], [1, -1], [-100, -100]],
    "stag_hunt": [[4, 4], [1, 3], [3, 1], [2, 2]],
}


def two_player(game: str) -> np.ndarray:
    """The payoff (2, 4) of a game of two: ipd (prisoner's dilemma), imp (matching pennies), chicken or stag_hunt."""
    require(game in TWO_PLAYER, f"game {game!r}: must be one of {', '.join(TWO_PLAYER)}")
    first, second = np.array(TWO_PLAYER[game], np.float32).T
    return np.stack([first, second[[0, 2, 1, 3]]])  # the second player's CD is the joint action DC


def public_goods(cooperators, players: int):
    """The N-player prisoner's dilemma: to defect pays exactly 1 more whatever the others do."""
    return 2 * (cooperators - 1), 2 * cooperators + 1


def snowdrift(cooperators, players: int):
    """Those who cooperate share the cost of what all get; N-player chicken."""
    return players - (players - 1) / np.maximum(cooperators, 1), np.where(cooperators >= 1, players, 0)


def stag_hunt(cooperators, players: int):
    """A hunt costs 3 and yields 6 c / N to all, if half the players (and at least two) take part."""
    yields = 6 * cooperators / players * (cooperators >= max(2, -(-players // 2)))
    return yields - 3, yields


def tragedy(cooperators, players: int):
    """The commons yield 5 to all while a majority cooperates; to cooperate costs 3."""
    kept = 5 * (cooperators > players / 2)
    return kept - 3, kept


N_PLAYER = {"public_goods": public_goods, "snowdrift": snowdrift, "stag_hunt": stag_hunt, "tragedy": tragedy}


def n_player(game: str, players: int) -> np.ndarray:
    """The payoff (N, 2^N) of a symmetric game of N players: public_goods, snowdrift, stag_hunt or tragedy (2312.12564).

    What a player gets depends on its action and on how many cooperate.
    """
    require(game in N_PLAYER, f"game {game!r}: must be one of {', '.join(N_PLAYER)}")
    require(2 <= players <= 10, f"{players} players: must lie between 2 and 10")
    state = np.arange(2**players)
    defects = state >> players - 1
    cooperators = players - np.array([bin(s).count("1") for s in state])
    to_cooperator, to_defector = N_PLAYER[game](cooperators, players)
    row = np.where(defects, to_defector, to_cooperator)
    return np.broadcast_to(row, (players, len(row))).astype(np.float32)


class MatrixState(NamedTuple):
    view: jax.Array  # (A,) int32: the last joint action in each player's view, 2^A for START
    time: jax.Array  # () int32


class MatrixParams(NamedTuple):
    payoff: jax.Array  # (A, 2^A) float32
    max_steps_in_episode: int | jax.Array = 100


class MatrixGame(Environment):
    """An iterated game. `payoff` (A, 2^A), as `two_player` or `n_player` give it."""

    def __init__(self, payoff, max_steps_in_episode: int = 100):
        self.payoff, self.max_steps = np.asarray(payoff, np.float32), max_steps_in_episode
        self.num_agents = len(self.payoff)
        expected = (self.num_agents, 2**self.num_agents)
        require(self.payoff.shape == expected, f"payoff {list(self.payoff.shape)}: must be {list(expected)}, (A, 2^A)")
        require(max_steps_in_episode >= 1, f"max_steps_in_episode {max_steps_in_episode}: must be at least 1")

    @property
    def default_params(self) -> MatrixParams:
        return MatrixParams(self.payoff, self.max_steps)

    @property
    def num_actions(self) -> int:
        return 2

    def action_space(self, params=None):
        from gymnax.environments import spaces  # on use only: gymnax starts the backend when it is imported

        return spaces.Discrete(self.num_actions)

    def observation_space(self, params=None):
        from gymnax.environments import spaces

        return spaces.Box(0, 1, (self.num_agents, 2**self.num_agents + 1), jnp.float32)

    def reset_env(self, key, params: MatrixParams):
        """-> obs, state: START."""
        state = MatrixState(jnp.full(self.num_agents, 2**self.num_agents, jnp.int32), jnp.int32(0))
        return self.get_obs(state, params), state

    def step_env(self, key, state: MatrixState, actions, params: MatrixParams):
        """actions (A,) -> obs, state, reward (A,), terminated (never), info. The key is not used."""
        view = joint_views(actions)
        reward = (jax.nn.one_hot(view, 2**self.num_agents, dtype=jnp.float32) * params.payoff).sum(-1)
        state = MatrixState(view, state.time + 1)
        return self.get_obs(state, params), state, reward, jnp.bool_(False), {}

    def get_obs(self, state: MatrixState, params=None, key=None) -> jax.Array:
        """(A, 2^A + 1) float32."""
        return jax.nn.one_hot(state.view, 2**self.num_agents + 1, dtype=jnp.float32)


def joint_views(actions) -> jax.Array:
    """A joint action (A,) as a number in each player's view (A,) int32: own action first, then clockwise, defect = 1."""
    players = actions.shape[0]
    seat = np.arange(players)
    weights = np.int32(2 ** (players - 1 - (seat[None] - seat[:, None]) % players))
    return (weights * (actions == 1)).sum(-1, dtype=jnp.int32)


# --- the infinite discounted game


def solve_dominant(a, b) -> jax.Array:
    """x (..., n, m) with a x = b, for `a` (..., n, n) diagonally dominant by rows: Gauss-Jordan elimination without pivoting.

    Unrolled, so for small n. No LAPACK: batched LAPACK calls can deadlock on CPU.
    """
    n = a.shape[-1]
    ab = jnp.concatenate([a, b], axis=-1)
    for i in range(n):
        row = ab[..., i, :] / ab[..., i, i, None]
        ab = ab - (ab[..., :, i] - np.eye(n, dtype=np.float32)[i])[..., None] * row[..., None, :]
    return ab[..., n:]


def discounted_values(first, second, payoff, gamma) -> jax.Array:
    """The exact value (..., 2) of two memory-one policies: (1 - gamma) p0 (I - gamma P)^-1 r, the mean reward per step.

    first, second (..., 5): the probabilities that they cooperate after CC, CD, DC, DD in their own view and at START;
    payoff (2, 4) in each player's own view; 0 <= gamma < 1. Differentiable in everything.
    """
    swap = np.array([0, 2, 1, 3])
    c1, c2 = first[..., :4], second[..., swap]
    moves = jnp.stack([c1 * c2, c1 * (1 - c2), (1 - c1) * c2, (1 - c1) * (1 - c2)], axis=-1)  # P (..., 4, 4)
    c1, c2 = first[..., 4], second[..., 4]
    start = jnp.stack([c1 * c2, c1 * (1 - c2), (1 - c1) * c2, (1 - c1) * (1 - c2)], axis=-1)
    rewards = jnp.stack([payoff[0], payoff[1][swap]], axis=-1)  # (4, 2), the first player's view
    rewards = jnp.broadcast_to(rewards, (*moves.shape[:-1], 2))
    values = solve_dominant(np.eye(4, dtype=np.float32) - gamma * moves, rewards)
    return (1 - gamma) * (start[..., None] * values).sum(-2)


class InfiniteState(NamedTuple):
    policies: jax.Array  # (2, 5) float32: the probabilities of cooperating after CC, CD, DC, DD and at START
    time: jax.Array  # () int32


class InfiniteParams(NamedTuple):
    payoff: jax.Array  # (2, 4) float32
    gamma: float | jax.Array = 0.96
    max_steps_in_episode: int | jax.Array = 100


class InfiniteMatrixGame(Environment):
    """The game whose actions are whole memory-one policies (M-FOS, 2205.01447).

    An action (2, 5) is the logits of cooperating after CC, CD, DC, DD and at START; the reward (2,) is the exact value of the
    two policies against each other; obs (2, 10) is each player's own probabilities, then the other's.
    """

    def __init__(self, payoff, gamma: float = 0.96, max_steps_in_episode: int = 100):
        self.payoff, self.gamma, self.max_steps = np.asarray(payoff, np.float32), gamma, max_steps_in_episode
        require(self.payoff.shape == (2, 4), f"payoff {list(self.payoff.shape)}: must be [2, 4]")
        require(0 <= gamma < 1, f"gamma {gamma}: must lie in [0, 1)")
        self.num_agents = 2

    @property
    def default_params(self) -> InfiniteParams:
        return InfiniteParams(self.payoff, self.gamma, self.max_steps)

    @property
    def num_actions(self) -> int:
        return 5

    def action_space(self, params=None):
        from gymnax.environments import spaces

        return spaces.Box(-jnp.inf, jnp.inf, (5,), jnp.float32)

    def observation_space(self, params=None):
        from gymnax.environments import spaces

        return spaces.Box(0, 1, (2, 10), jnp.float32)

    def reset_env(self, key, params: InfiniteParams):
        """Random policies, their logits uniform in [0, 1) as in Pax -> obs, state."""
        state = InfiniteState(jax.nn.sigmoid(jax.random.uniform(key, (2, 5), jnp.float32)), jnp.int32(0))
        return self.get_obs(state, params), state

    def step_env(self, key, state: InfiniteState, actions, params: InfiniteParams):
        """actions (2, 5) -> obs, state, reward (2,), terminated (never), info. The key is not used."""
        policies = jax.nn.sigmoid(actions)
        reward = discounted_values(policies[0], policies[1], params.payoff, params.gamma)
        state = InfiniteState(policies, state.time + 1)
        return self.get_obs(state, params), state, reward, jnp.bool_(False), {}

    def get_obs(self, state: InfiniteState, params=None, key=None) -> jax.Array:
        """(2, 10) float32."""
        return jnp.concatenate([state.policies, state.policies[::-1]], axis=-1)
