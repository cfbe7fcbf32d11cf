"""The coin game against a recording of JaxMARL's, transitions worked out by hand, and what must hold in any game."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from envs.coin_game import COIN_COLOURS, COIN_TILE, CoinGame, CoinState, free_cells

env = CoinGame()
params = env.default_params
RIGHT, LEFT, DOWN, UP, STAY = range(5)


@jax.jit
def step(states, actions, seed=0):
    """One step of N games."""
    keys = jax.random.split(jax.random.key(seed), actions.shape[0])
    return jax.vmap(env.step_env, (0, 0, 0, None))(keys, states, actions, params)


def game(red, blue, red_coin, blue_coin):
    """The state of one game, as a batch of one."""
    return CoinState(np.int32([[red, blue]]), np.int32([[red_coin, blue_coin]]), np.zeros(1, np.int32))


def random_play(num=300, steps=40):
    """-> states (steps + 1, N), actions, rewards and what was picked (steps, N) of random play."""
    key_reset, key_act = jax.random.split(jax.random.key(7))
    actions = jax.random.randint(key_act, (steps, num, 2), 0, 5)
    _, start = jax.jit(jax.vmap(env.reset_env, (0, None)))(jax.random.split(key_reset, num), params)

    def body(states, inputs):
        seed, actions = inputs
        obs, states, reward, _, info = step(states, actions, seed)
        return states, (obs, states, reward, info["picked"])

    _, (obs, states, reward, picked) = jax.lax.scan(body, start, (jnp.arange(steps), actions))
    states = jax.tree.map(lambda x, xs: np.concatenate([x[None], xs]), start, states)
    return jax.tree.map(np.array, (obs, states, actions, reward, picked))


@pytest.fixture(scope="module")
def played():
    return random_play()


def test_recording():
    """JaxMARL 0.2.0's CoinGame (egocentric, num_inner_steps 64 so that nothing resets), 16 games of 63 uniformly random steps.

    Recorded: actions (16, 63, 2), reward (16, 63, 2), pos (16, 64, 4, 2) of red, blue, red coin, blue coin, obs (16, 64, 2, 36)
    packed to bits. Compared: moves, rewards, the coins that stay, observations. Not compared: where a coin
    comes back, which is random in both (and in JaxMARL may be under a player; here never, as in LOLA's game).
    """
    with np.load(Path(__file__).parent / "data" / "coin_game.npz") as file:
        actions, reward, pos, obs = (file[name] for name in ("actions", "reward", "pos", "obs"))
    before, after = np.int32(pos[:, :-1].reshape(-1, 4, 2)), np.int32(pos[:, 1:].reshape(-1, 4, 2))
    states = CoinState(before[:, :2], before[:, 2:], np.zeros(len(before), np.int32))
    _, ours, our_reward, _, info = step(states, jnp.int32(actions.reshape(-1, 2)))
    np.testing.assert_array_equal(ours.players, after[:, :2])
    np.testing.assert_array_equal(our_reward, reward.reshape(-1, 2))
    picked = np.array(info["picked"])  # (N, player, own or other) -> by coin
    taken = np.stack([picked[:, 0, 0] | picked[:, 1, 1], picked[:, 1, 0] | picked[:, 0, 1]], axis=-1)
    np.testing.assert_array_equal(np.array(ours.coins)[~taken], after[:, 2:][~taken])
    assert taken.sum() > 300 and (reward < 0).sum() > 100
    seen = np.unpackbits(obs, axis=-1, count=36).reshape(-1, 2, 3, 3, 4)
    all_states = CoinState(*np.split(np.int32(pos.reshape(-1, 4, 2)), 2, axis=1), np.zeros(seen.shape[0], np.int32))
    np.testing.assert_array_equal(jax.vmap(env.get_obs)(all_states), seen)


@pytest.mark.parametrize(
    ("where", "actions", "reward"),
    [
        (((0, 0), (2, 2), (0, 1), (1, 1)), (RIGHT, STAY), (1, 0)),  # red takes its own coin
        (((0, 0), (2, 2), (1, 1), (0, 1)), (RIGHT, STAY), (1, -2)),  # red takes blue's coin
        (((0, 0), (2, 2), (2, 1), (0, 1)), (STAY, LEFT), (-2, 1)),  # blue takes red's coin
        (((0, 0), (0, 2), (0, 1), (1, 1)), (RIGHT, LEFT), (-1, 1)),  # both reach the red coin
        (((0, 0), (2, 2), (0, 1), (0, 1)), (RIGHT, STAY), (2, -2)),  # both coins in one cell
        (((0, 0), (0, 2), (0, 1), (0, 1)), (RIGHT, LEFT), (0, 0)),  # both players and both coins: 1 + 1 - 2
        (((0, 0), (1, 2), (2, 0), (0, 2)), (UP, UP), (1, 1)),  # over the edge; each takes its own
        (((0, 0), (2, 2), (1, 1), (1, 0)), (STAY, STAY), (0, 0)),
    ],
)
def test_rewards_by_hand(where, actions, reward):
    *_, ours, _, _ = step(game(*where), jnp.int32([actions]))
    np.testing.assert_array_equal(ours[0], reward)


def test_the_last_step_is_rewarded():
    """Pax and JaxMARL pay nothing on the last step of an episode; the paper's game has no such rule."""
    state = game((0, 0), (2, 2), (0, 1), (1, 1))._replace(time=np.int32([15]))
    single = jax.tree.map(lambda x: x[0], state)
    _, _, reward, _, truncated, _ = jax.jit(env.step)(jax.random.key(0), single, jnp.int32([RIGHT, STAY]))
    assert truncated and reward[0] == 1


@pytest.mark.parametrize("action", range(5))
def test_moves_wrap_around(action):
    row, column = {RIGHT: (0, 1), LEFT: (0, -1), DOWN: (1, 0), UP: (-1, 0), STAY: (0, 0)}[action]
    cells = np.array([(r, c) for r in range(3) for c in range(3)], np.int32)
    states = CoinState(np.stack([cells, cells], 1), np.stack([cells, cells], 1), np.zeros(9, np.int32))
    _, after, *_ = step(states, jnp.full((9, 2), action))
    np.testing.assert_array_equal(after.players[:, 0], (cells + [row, column]) % 3)


def test_what_is_not_an_action_stays():
    _, after, *_ = step(game((0, 0), (2, 2), (0, 1), (1, 1)), jnp.int32([[-1, 7]]))
    np.testing.assert_array_equal(after.players, [[(0, 0), (2, 2)]])


def test_coins_appear_on_any_free_cell_alike():
    """Never on a player, and uniformly over the seven (or, where the players share a cell, eight) others."""
    for red, blue in (((0, 0), (2, 2)), ((1, 1), (1, 1)), ((2, 0), (0, 1))):
        noise = (np.arange(840) + 0.5) / 840
        cells = np.array(free_cells(jnp.int32([red, blue]), noise))
        counts = np.zeros((3, 3), int)
        np.add.at(counts, tuple(cells.T), 1)
        assert counts[red] == counts[blue] == 0
        free = counts[counts > 0]
        assert len(free) == (8 if red == blue else 7) and (free == 840 // len(free)).all()


def test_random_play(played):
    """A coin appears off the players; it moves when and only when it is picked up; who picks what is paid for."""
    obs, states, _, reward, picked = played
    own, other = picked[..., 0], picked[..., 1]
    np.testing.assert_array_equal(reward, own + 1.0 * other - 2.0 * other[..., ::-1])
    taken = own | other[..., ::-1]  # by coin
    np.testing.assert_array_equal(np.where(taken[..., None], states.coins[:-1], states.coins[1:]), states.coins[:-1])
    fresh, players = states.coins[1:], states.players[1:]
    under = (fresh[:, :, :, None] == players[:, :, None]).all(-1).any(-1)
    assert not under[taken].any() and taken.sum() > 1000
    start = (states.coins[0][:, :, None] == states.players[0][:, None]).all(-1)
    assert not start.any()
    np.testing.assert_array_equal(obs.sum((3, 4)), 1)  # each thing is in one cell
    np.testing.assert_array_equal(obs[..., 1, 1, 0], 1)  # oneself in the middle


def test_swapping_players_and_colours_swaps_everything(played):
    obs, states, actions, reward, _ = played
    flat = lambda x: x[:-1].reshape(-1, *x.shape[2:])
    swapped = CoinState(flat(states.players)[:, ::-1], flat(states.coins)[:, ::-1], flat(states.time))
    our_obs, after, our_reward, _, _ = step(swapped, actions.reshape(-1, 2)[:, ::-1])
    np.testing.assert_array_equal(our_reward[:, ::-1], reward.reshape(-1, 2))
    np.testing.assert_array_equal(after.players[:, ::-1], states.players[1:].reshape(-1, 2, 2))
    np.testing.assert_array_equal(our_obs[:, ::-1, ..., :2], obs.reshape(-1, *obs.shape[2:])[..., :2])


def test_allocentric_maps():
    state = jax.tree.map(lambda x: x[0], game((0, 1), (2, 2), (1, 0), (2, 0)))
    obs = np.array(CoinGame(egocentric=False).get_obs(state))
    for player, order in enumerate(((0, 1, 2, 3), (1, 0, 3, 2))):
        for channel, thing in enumerate(order):
            assert tuple(np.argwhere(obs[player, ..., channel])[0]) == [(0, 1), (2, 2), (1, 0), (2, 0)][thing]


def test_render():
    state = jax.tree.map(lambda x: x[0], game((0, 1), (2, 2), (0, 1), (2, 0)))
    image = np.array(jax.jit(env.render)(state))
    assert image.shape == (3 * COIN_TILE, 3 * COIN_TILE, 3) and image.dtype == np.uint8
    cell = lambda row, column: image[row * COIN_TILE : (row + 1) * COIN_TILE, column * COIN_TILE : (column + 1) * COIN_TILE]
    amount = lambda row, column, colour: (cell(row, column) == COIN_COLOURS[colour]).all(-1).sum()
    assert amount(0, 1, 0) > amount(2, 2, 1) > 0, "red stands on its coin"
    assert amount(2, 0, 1) > 0 and amount(0, 0, 0) == amount(0, 0, 1) == amount(2, 0, 0) == 0
