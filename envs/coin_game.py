"""The coin game on a 3 x 3 torus: two players, red and blue, and a coin of each colour (Lerer and Peysakhovich, 1707.01068).

obs      (2, 3, 3, 4) float32, one-hot maps [row, column, channel] of: self, the other, the coin of one's own colour, the other
         coin. Egocentric (Shaper's): the torus is turned so that oneself is in the middle.
actions  (2,) int32: 0 right, 1 left, 2 down, 3 up, 4 stay; what is none of these stays
reward   (2,) float32: +1 to who picks up a coin of either colour, and -2 to the coin's owner if it was the other who did. Both move
         at once and may share a cell; when both reach a coin each is paid, and the owner also loses 2.
ends     after `max_steps_in_episode` steps (truncated)

A coin that was picked up comes back on a random cell without a player, as in LOLA's game (1709.04326).

Differs from Pax's game, which JaxMARL ports: there a coin may come back under a player, who may pick it up by staying; there the
last step of an episode is never rewarded.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.env import Environment
from common.runs.config import require

TORUS = 3
COIN_TILE = 16  # pixels
OWN = np.eye(2, dtype=bool)  # (player, coin)


class CoinState(NamedTuple):
    players: jax.Array  # (2, 2) int32: (row, column) of red and blue
    coins: jax.Array  # (2, 2) int32: (row, column) of the red and the blue coin
    time: jax.Array  # () int32


class CoinParams(NamedTuple):
    max_steps_in_episode: int | jax.Array = 16
    own: float | jax.Array = 1.0  # for a coin of one's own colour
    other: float | jax.Array = 1.0  # for a coin of the other's colour
    stolen: float | jax.Array = -2.0  # when the other picks up a coin of one's own colour


class CoinGame(Environment):
    """`egocentric` turns each player's maps so that it stands in the middle."""

    num_agents = 2

    def __init__(self, egocentric: bool = True, max_steps_in_episode: int = 16):
        require(max_steps_in_episode >= 1, f"max_steps_in_episode {max_steps_in_episode}: must be at least 1")
        self.egocentric, self.max_steps = egocentric, max_steps_in_episode

    @property
    def default_params(self) -> CoinParams:
        return CoinParams(self.max_steps)

    @property
    def num_actions(self) -> int:
        return 5

    def action_space(self, params=None):
        from gymnax.environments import spaces  # on use only: gymnax starts the backend when it is imported

        return spaces.Discrete(self.num_actions)

    def observation_space(self, params=None):
        from gymnax.environments import spaces

        return spaces.Box(0, 1, (2, TORUS, TORUS, 4), jnp.float32)

    def reset_env(self, key, params: CoinParams):
        """Players anywhere, coins on cells without a player -> obs, state."""
        noise = jax.random.uniform(key, (4,), jnp.float32)
        cells = (noise[:2] * TORUS**2).astype(jnp.int32)
        players = jnp.stack([cells // TORUS, cells % TORUS], axis=-1)
        state = CoinState(players, free_cells(players, noise[2:]), jnp.int32(0))
        return self.get_obs(state, params), state

    def step_env(self, key, state: CoinState, actions, params: CoinParams):
        """actions (2,) -> obs, state, reward (2,), terminated (never), info.

        info["picked"] (2, 2) bool: whether each player picked up a coin of its own colour, and of the other's.
        """
        row = (actions == 2).astype(jnp.int32) - (actions == 3)
        column = (actions == 0).astype(jnp.int32) - (actions == 1)
        players = (state.players + jnp.stack([row, column], axis=-1)) % TORUS
        picked = (players[:, None] == state.coins).all(-1)  # (player, coin)
        own, other = (picked & OWN).any(1), (picked & ~OWN).any(1)  # by player
        reward = (params.own * own + params.other * other + params.stolen * other[::-1]).astype(jnp.float32)
        fresh = free_cells(players, jax.random.uniform(key, (2,), jnp.float32))
        coins = jnp.where(picked.any(0)[:, None], fresh, state.coins)
        state = CoinState(players, coins, state.time + 1)
        info = {"picked": jnp.stack([own, other], axis=-1)}
        return self.get_obs(state, params), state, reward, jnp.bool_(False), info

    def get_obs(self, state: CoinState, params=None, key=None) -> jax.Array:
        """(2, 3, 3, 4) float32."""
        (red, blue), (red_coin, blue_coin) = state.players, state.coins
        things = jnp.stack([jnp.stack([red, blue, red_coin, blue_coin]), jnp.stack([blue, red, blue_coin, red_coin])])
        if self.egocentric:
            things = (things - state.players[:, None] + 1) % TORUS  # (2, 4, 2)
        cell = things[..., 0] * TORUS + things[..., 1]
        maps = (cell[:, None] == np.arange(TORUS**2)[:, None]).astype(jnp.float32)  # (2, 9, 4)
        return maps.reshape(2, TORUS, TORUS, 4)

    def render(self, state: CoinState) -> jax.Array:
        """A picture: players as squares, coins as discs, in their colours; (3 COIN_TILE, 3 COIN_TILE, 3) uint8."""
        image = jnp.broadcast_to(jnp.asarray(COIN_FLOOR), (TORUS, TORUS, COIN_TILE, COIN_TILE, 3))
        rows, columns = np.indices((TORUS, TORUS))
        for shapes, things in ((PLAYER_SHAPES, state.players), (COIN_SHAPES, state.coins)):
            for shape, colour, thing in zip(shapes, COIN_COLOURS, things, strict=True):
                here = (rows == thing[0]) & (columns == thing[1])
                image = jnp.where(here[..., None, None, None] & shape[..., None], colour, image)
        return image.transpose(0, 2, 1, 3, 4).reshape(TORUS * COIN_TILE, TORUS * COIN_TILE, 3)


def free_cells(players, noise) -> jax.Array:
    """A uniformly random cell without a player for each number of `noise` (C,) in [0, 1) -> (C, 2) int32 (row, column)."""
    red, blue = players[:, 0] * TORUS + players[:, 1]
    low, high = jnp.minimum(red, blue), jnp.maximum(red, blue)
    free = TORUS**2 - 1 - (low != high)
    index = jnp.minimum((noise * free).astype(jnp.int32), free - 1)  # of the free cells in turn: step over the players'
    cell = index + (index >= low)
    cell = cell + ((cell >= high) & (low != high))
    return jnp.stack([cell // TORUS, cell % TORUS], axis=-1)


def _coin_shapes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A floor tile (COIN_TILE, COIN_TILE, 3), and the masks of the two players and of the two coins, (2, COIN_TILE, COIN_TILE)."""
    floor = np.full((COIN_TILE, COIN_TILE, 3), (24, 27, 38), np.uint8)
    floor[-1], floor[:, -1] = (34, 38, 52), (34, 38, 52)  # a faint grid
    y, x = np.mgrid[:COIN_TILE, :COIN_TILE] + 0.5
    players = np.stack([(x > 1) & (x < 8) & (y > 1) & (y < 8), (x > 8) & (x < 15) & (y > 1) & (y < 8)])
    coins = np.stack([(x - centre) ** 2 + (y - 11.5) ** 2 < 8 for centre in (4.5, 11.5)])
    return floor, players, coins


COIN_FLOOR, PLAYER_SHAPES, COIN_SHAPES = _coin_shapes()
COIN_COLOURS = np.array([[226, 87, 76], [84, 144, 235]], np.uint8)
