""" "* in the matrix": a matrix game spread out in a gridworld, as in Shaper (2312.12568); STORM in JaxMARL.

Two players (or more) gather coins of two kinds, cooperation and defection; what a player holds is its strategy. A beam that hits a
player plays the matrix game with it: both get what the bilinear game pays for the shares of their coins, sit out some steps while
each sees what the other held, and begin again with nothing, from new places.

obs      image (A, 5, 5, 10) uint8, what lies ahead: the player stands in the bottom row, middle column, and looks up. Channels:
         self, other player, cooperation coin, defection coin, wall, beam, and which way the other faces: as I do, to my right,
         at me, to my left.
         vector (A, 3 A) float32: own coins of each kind, whether I am ready (hold any), whether each other is, in clockwise order
         of players, and each other's coins of each kind, 0 while that one may move.
actions  (A,) int32: 0 turn left, 1 turn right, 2 forward, 3 interact, 4 stay; what is none of these stays
reward   (A,) float32: x_i M x_j for the shares x of coins of two players that meet, else 0
ends     after `max_steps_in_episode` steps (truncated)

Moves are simultaneous: who moves gives way to who stays, one of several on their way to the same cell goes there, at random, and
two may change places. A beam reaches the cells one and two ahead and those beside the first. It hits a ready player who may move,
and only a ready player's counts. After the freeze the coins that were taken lie on the floor again, save where somebody stands.

More than two players (ours): a player meets one other at most on each step; beams count in random order, each hits the first free
player of ahead, two ahead, left, right; those who thaw begin on free spawn cells.

Differs from Pax's game, which JaxMARL ports: two of Pax's spawn cells lie on coins (which are eaten or lost), and nobody faces the
fourth way there at the start; there the last step of an episode is never rewarded.

Positions are (x, y), x to the right and y down; headings are 0 right, 1 down, 2 left, 3 up.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.env import Environment
from common.runs.config import require

GRID = 8
SIGHT = 5
GRID_TILE = 12  # pixels
MAX_PLAYERS = 8
COOPERATION, DEFECTION = 0, 1
LEFT, RIGHT, FORWARD, INTERACT, STAY = range(5)
SELF, OTHER, COIN, WALL_SEEN, BEAM, FACING = 0, 1, 2, 4, 5, 6  # channels
# A player's payoff in its own view, own strategy first: CC, CD, DC, DD; of the lower and the higher number of the two that meet.
GRID_PAYOFFS = {"ipd": [[3, 0, 5, 1], [3, 0, 5, 1]], "imp": [[1, -1, -1, 1], [-1, 1, 1, -1]]}


# (x, y) of the coins' places, and of the cells on which players begin: four in each corner.
COIN_CELLS = np.array(
    [(1, 1), (1, 2), (2, 1), (1, 6), (2, 6), (1, 5), (6, 2), (5, 1), (6, 1), (6, 6), (6, 5), (5, 6)], np.int32
)  # fmt: skip
SPAWN_CELLS = np.array([(abs(7 * (c % 2) - s % 3), abs(7 * (c // 2) - s // 3)) for c in range(4) for s in range(4)], np.int32)
NUM_COINS = len(COIN_CELLS)


class GridState(NamedTuple):
    pos: jax.Array  # (A, 2) int32
    heading: jax.Array  # (A,) int32
    inventory: jax.Array  # (A, 2) int32: coins held, cooperation and defection
    freeze: jax.Array  # (A,) int32: steps still to sit out
    beam: jax.Array  # (A,) bool: whose beam is seen
    kinds: jax.Array  # (12,) int32: of the coin that belongs on each of COIN_CELLS
    present: jax.Array  # (12,) bool: whether it lies there
    time: jax.Array  # () int32


class GridParams(NamedTuple):
    payoff: jax.Array  # (2, 4) float32
    freeze: int | jax.Array = 5
    max_steps_in_episode: int | jax.Array = 152


class GridObservation(NamedTuple):
    image: jax.Array  # (A, 5, 5, 10) uint8
    vector: jax.Array  # (A, 3 A) float32


class InTheMatrix(Environment):
    """`fixed_coins` puts the kinds in the same places in every episode; else they are dealt anew, six of each."""

    def __init__(self, game: str = "ipd", num_players: int = 2, fixed_coins: bool = True, max_steps_in_episode: int = 152):
        require(game in GRID_PAYOFFS, f"game {game!r}: must be one of {', '.join(GRID_PAYOFFS)}")
        require(2 <= num_players <= MAX_PLAYERS, f"{num_players} players: must lie between 2 and {MAX_PLAYERS}")
        require(max_steps_in_episode >= 1, f"max_steps_in_episode {max_steps_in_episode}: must be at least 1")
        self.payoff, self.num_agents = np.array(GRID_PAYOFFS[game], np.float32), num_players
        self.fixed_coins, self.max_steps = fixed_coins, max_steps_in_episode

    @property
    def default_params(self) -> GridParams:
        return GridParams(self.payoff, max_steps_in_episode=self.max_steps)

    @property
    def num_actions(self) -> int:
        return 5

    def action_space(self, params=None):
        from gymnax.environments import spaces  # on use only: gymnax starts the backend when it is imported

        return spaces.Discrete(self.num_actions)

    def observation_space(self, params=None):
        from gymnax.environments import spaces

        image = spaces.Box(0, 1, (self.num_agents, SIGHT, SIGHT, 10), jnp.uint8)
        return spaces.Dict(
            {"image": image, "vector": spaces.Box(0, NUM_COINS, (self.num_agents, 3 * self.num_agents), jnp.float32)}
        )

    def reset_env(self, key, params: GridParams):
        """Players on spawn cells, every coin on the floor -> obs, state."""
        num = self.num_agents
        key_players, key_coins = (key, None) if self.fixed_coins else jax.random.split(key)
        _, place, heading = draws(key_players, num)
        pos = spawn(jnp.zeros((num, 2), jnp.int32), jnp.ones(num, bool), place)
        deal = np.arange(NUM_COINS)
        if not self.fixed_coins:
            noise = jax.random.uniform(key_coins, (NUM_COINS,), jnp.float32)
            deal = (noise[:, None] > noise).sum(1)
        zeros, nobody = jnp.zeros(num, jnp.int32), jnp.zeros(num, bool)
        kinds, inventory = jnp.int32((deal + 1) % 2), jnp.zeros((num, 2), jnp.int32)
        state = GridState(pos, heading, inventory, zeros, nobody, kinds, jnp.ones(NUM_COINS, bool), jnp.int32(0))
        return self.get_obs(state, params), state

    def step_env(self, key, state: GridState, actions, params: GridParams):
        """actions (A,) -> obs, state, reward (A,), terminated (never), info.

        info["met"] (A,) bool: who played the matrix game; info["strategy"] (A,): the share of cooperation coins they held.
        """
        num = self.num_agents
        order, place, turn = draws(key, num)
        actions = jnp.where(state.freeze > 0, STAY, actions)
        heading = (state.heading + (actions == RIGHT) - (actions == LEFT)) % 4
        target = jnp.clip(state.pos + vector_of(heading) * (actions == FORWARD)[:, None], 0, GRID - 1)
        pos = resolve(state.pos, target, order)

        on = (pos[:, None] == COIN_CELLS).all(-1) & state.present  # (A, 12)
        found = [(on & (state.kinds == kind)).sum(1, dtype=jnp.int32) for kind in (COOPERATION, DEFECTION)]
        inventory = state.inventory + jnp.stack(found, axis=-1)
        present = state.present & ~on.any(0)

        able = (inventory.sum(1) > 0) & (state.freeze == 0)
        meet = meetings(pos, heading, able & (actions == INTERACT), able, order)
        share = inventory[:, COOPERATION].astype(jnp.float32) / jnp.maximum(inventory.sum(1), 1)
        reward = jnp.where(meet, pair_payoffs(share, params.payoff), 0.0).sum(1)
        met = meet.any(1)

        thaws = state.freeze == 1
        pos = jnp.where(thaws[:, None], spawn(pos, thaws, place), pos)
        heading = jnp.where(thaws, turn, heading)
        occupied = (pos[:, None] == COIN_CELLS).all(-1).any(0)
        state = GridState(
            pos,
            heading,
            inventory=jnp.where(thaws[:, None], 0, inventory),
            freeze=jnp.where(met, params.freeze, jnp.maximum(state.freeze - 1, 0)),
            beam=actions == INTERACT,
            kinds=state.kinds,
            present=present | (thaws.any() & ~occupied),
            time=state.time + 1,
        )
        info = {"met": met, "strategy": share}
        return self.get_obs(state, params), state, reward, jnp.bool_(False), info

    def get_obs(self, state: GridState, params=None, key=None) -> GridObservation:
        """What each player sees."""
        return GridObservation(see(state), self._vector(state))

    def _vector(self, state: GridState) -> jax.Array:
        num, ready = self.num_agents, state.inventory.sum(1) > 0
        shown = state.inventory * (state.freeze > 0)[:, None]
        rows = []
        for i in range(num):
            others = [(i + k) % num for k in range(1, num)]
            seen = [ready[j] for j in others] + [shown[j, kind] for j in others for kind in (COOPERATION, DEFECTION)]
            rows.append(jnp.stack([state.inventory[i, COOPERATION], state.inventory[i, DEFECTION], ready[i], *seen]))
        return jnp.stack(rows).astype(jnp.float32)

    def render(self, state: GridState) -> jax.Array:
        """A picture with its wall: players as arrows (dim while frozen), coins as discs; (10 GRID_TILE, 10 GRID_TILE, 3) uint8."""
        y, x = np.indices((GRID, GRID), dtype=np.int32)
        tiles = jnp.zeros((GRID, GRID), jnp.int32)
        for tile, cells in zip((TILE_COIN, TILE_COIN + 1, TILE_BEAM), boards(state), strict=True):
            tiles = jnp.where(lit(cells, GRID * y + x) & (tiles == 0), tile, tiles)
        for i in range(self.num_agents):
            look = TILE_PLAYER + 8 * i + 4 * (state.freeze[i] > 0) + state.heading[i]
            tiles = jnp.where((x == state.pos[i, 0]) & (y == state.pos[i, 1]), look, tiles)
        image = jnp.asarray(GRID_TILES)[jnp.pad(tiles, 1, constant_values=TILE_WALL)]
        return image.transpose(0, 2, 1, 3, 4).reshape((GRID + 2) * GRID_TILE, (GRID + 2) * GRID_TILE, 3)


# --- the rules


def vector_of(heading) -> jax.Array:
    """The step (x, y) that each heading (...,) takes: (..., 2) int32."""
    return jnp.stack([(heading == i).astype(jnp.int32) - (heading == i + 2) for i in range(2)], axis=-1)


def right_of(vector) -> jax.Array:
    """The direction to the right of each direction (..., 2)."""
    return jnp.stack([-vector[..., 1], vector[..., 0]], axis=-1)


def resolve(pos, target, order) -> jax.Array:
    """Where players (A, 2) end up who are on their way to `target`: who stays goes first, then who has the lower `order` (A,).

    Who gives way stays, and others give way to it in turn; so it takes as many rounds as there are players.
    """
    num = len(pos)
    for _ in range(num if num > 2 else 1):
        moves = (target != pos).any(-1)
        same = (target[:, None] == target).all(-1) & ~np.eye(num, dtype=bool)
        target = jnp.where(((same & (~moves | goes_before(order))).any(1) & moves)[:, None], pos, target)
    return target


def goes_before(order) -> jax.Array:
    """(A, A): whether the second player goes before the first: by a lower `order` (A,), then by number."""
    seat = np.arange(len(order))
    return (order < order[:, None]) | ((order == order[:, None]) & (seat < seat[:, None]))


def meetings(pos, heading, zapping, able, order) -> jax.Array:
    """Who meets whom (A, A) bool, symmetric, at most one other each.

    zapping (A,): whose beam counts; able (A,): who can be hit; beams count in turn, the lowest `order` (A,) first.
    """
    num = len(pos)
    forward = vector_of(heading)
    offset = pos - pos[:, None]  # (A, A, 2): of the second from the first
    along, side = (offset * forward[:, None]).sum(-1), (offset * right_of(forward)[:, None]).sum(-1)
    straight, beside = side == 0, along == 1
    place = jnp.select([straight & beside, straight & (along == 2), (side == -1) & beside, (side == 1) & beside], [4, 3, 2, 1], 0)
    rank = (~goes_before(order)).sum(1, keepdims=True)  # of the beams: more for who goes earlier
    score = jnp.where(zapping[:, None] & able & (place > 0), place + 4 * rank, 0)
    meet = jnp.zeros((num, num), bool)
    for _ in range(num // 2):
        best = (score == score.max()) & (score > 0)
        meet = meet | best | best.T
        busy = meet.any(1)
        score = jnp.where(busy | busy[:, None], 0, score)
    return meet


def pair_payoffs(share, payoff) -> jax.Array:
    """What each player would get from each (A, A), of the share (A,) of cooperation coins among their coins: a bilinear game."""
    seat = np.arange(len(share))
    lower = seat[:, None] < seat
    cc, cd, dc, dd = (jnp.where(lower, payoff[0, k], payoff[1, k]) for k in range(4))
    x, y = share[:, None], share
    return x * (y * cc + (1 - y) * cd) + (1 - x) * (y * dc + (1 - y) * dd)


def draws(key, num: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A step's chance (A,) int32, all from one word a player: who goes first (14 bits), a place (16 bits), a heading (2 bits)."""
    words = jax.random.bits(key, (num,), jnp.uint32)
    return tuple(x.astype(jnp.int32) for x in (words >> 18, (words >> 2) & 0xFFFF, words & 3))


def spawn(pos, moving, place) -> jax.Array:
    """Puts the players set in `moving` (A,) on random free spawn cells, in turn; two players always on opposite ones.

    place (A,) int32 in [0, 2^16) -> pos (A, 2).
    """
    num = len(pos)
    if num == 2:
        corner, step = (place[0] >> 2) & 3, place[0] & 3  # the cell SPAWN_CELLS[place & 15] without a gather
        cell = jnp.abs((GRID - 1) * jnp.stack([corner & 1, corner >> 1]) - jnp.stack([step % 3, step // 3]))
        return jnp.where(moving[:, None], jnp.stack([cell, GRID - 1 - cell]), pos)
    for i in range(num):
        placed = (~moving | (np.arange(num) < i)) & (np.arange(num) != i)
        free = ~((pos[:, None] == SPAWN_CELLS).all(-1) & placed[:, None]).any(0)  # (16,)
        count = (np.tri(len(SPAWN_CELLS), dtype=np.int32) * free).sum(1)  # 1 for the first free cell, 2 for the second
        chosen = free & (count == 1 + ((place[i] * free.sum()) >> 16))
        cell = jnp.where(chosen[:, None], SPAWN_CELLS, 0).sum(0, dtype=jnp.int32)
        pos = jnp.where((moving[i] & (np.arange(num) == i))[:, None], cell, pos)
    return pos


# --- what is seen


def board(cells, on) -> jax.Array:
    """A map of the 64 cells in two words of 32 bits: those of `cells` (K, 2) that are set in `on` (K,) -> (2,) uint32.

    Cells are looked up by shifts, with neither gathers nor scatters, which are slow under vmap on CPU.
    """
    index = GRID * cells[:, 1] + cells[:, 0]
    bits = jnp.where(on, jnp.uint32(1) << (index & 31).astype(jnp.uint32), jnp.uint32(0))
    words = jnp.where(index // 32 == np.arange(2)[:, None], bits, jnp.uint32(0))
    return jax.lax.reduce(words, np.uint32(0), jax.lax.bitwise_or, (1,))


def lit(board, index) -> jax.Array:
    """Whether cells are set on a board: index (...,) int32, in [0, 64) -> bool."""
    word = jnp.where(index < 32, board[0], board[1])
    return ((word >> (index & 31).astype(jnp.uint32)) & 1) > 0


def boards(state: GridState) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where cooperation coins, defection coins and beams are."""
    forward = vector_of(state.heading)
    right, first = right_of(forward), state.pos + forward
    cells = jnp.stack([first, first + forward, first - right, first + right], axis=1).reshape(-1, 2)  # (4 A, 2)
    inside = ((cells >= 0) & (cells < GRID)).all(-1)
    beams = board(cells, inside & jnp.repeat(state.beam, 4))
    coins = [board(COIN_CELLS, state.present & (state.kinds == kind)) for kind in (COOPERATION, DEFECTION)]
    return *coins, beams


def see(state: GridState) -> jax.Array:
    """The images (A, 5, 5, 10) uint8. A player hides a coin, and either hides a beam."""
    num = len(state.pos)
    rows, columns = np.divmod(np.arange(SIGHT**2, dtype=np.int32), SIGHT)
    ahead, side = SIGHT - 1 - rows, columns - SIGHT // 2
    forward = vector_of(state.heading)
    x, y = (
        state.pos[:, k, None] + ahead * forward[:, k, None] + side * right_of(forward)[:, k, None] for k in range(2)
    )  # (A, 25) each
    inside = (x >= 0) & (x < GRID) & (y >= 0) & (y < GRID)
    here = (x[:, None] == state.pos[:, 0, None]) & (y[:, None] == state.pos[:, 1, None])  # (A, A, 25): the second is seen there
    here = here & ~np.eye(num, dtype=bool)[..., None]
    facing = jnp.int32(1) << FACING + (state.heading - state.heading[:, None]) % 4  # (A, A)
    player = jnp.where(here, (1 << OTHER) + facing[..., None], 0).sum(1) + ((ahead == 0) & (side == 0)) * (1 << SELF)
    index = jnp.where(inside, GRID * y + x, 0)
    coin, defection, beam = (lit(cells, index) for cells in boards(state))
    thing = jnp.where(coin, 1 << COIN, jnp.where(defection, 2 << COIN, jnp.where(beam, 1 << BEAM, 0)))
    code = jnp.where(inside, jnp.where(player > 0, player, thing), 1 << WALL_SEEN)  # a bit for each channel
    channels = (code[..., None] >> np.arange(10, dtype=np.int32)) & 1
    return channels.astype(jnp.uint8).reshape(num, SIGHT, SIGHT, 10)


# --- pictures


TILE_WALL, TILE_COIN, TILE_BEAM, TILE_PLAYER = 1, 2, 4, 5
PLAYER_COLOURS = [
    (255, 127, 14),
    (84, 144, 235),
    (236, 64, 122),
    (255, 235, 59),
    (41, 182, 246),
    (171, 71, 188),
    (160, 120, 90),
    (255, 205, 210),
]


def _grid_tiles() -> np.ndarray:
    """(5 + 64, GRID_TILE, GRID_TILE, 3) uint8: floor, wall, the two coins, beam; each player facing each way, then the same dim."""
    tiles = np.full((TILE_PLAYER + 8 * MAX_PLAYERS, GRID_TILE, GRID_TILE, 3), (24, 27, 38), np.uint8)
    tiles[:, -1], tiles[:, :, -1] = (34, 38, 52), (34, 38, 52)  # a faint grid
    tiles[TILE_WALL] = (112, 120, 138)
    tiles[TILE_BEAM, 1:-1, 1:-1] = (188, 189, 34)
    y, x = np.mgrid[:GRID_TILE, :GRID_TILE] + 0.5
    disc = (x - GRID_TILE / 2) ** 2 + (y - GRID_TILE / 2) ** 2 < (GRID_TILE / 4) ** 2
    tiles[TILE_COIN][disc], tiles[TILE_COIN + 1][disc] = (62, 201, 122), (214, 39, 40)
    arrow = (x > 1) & (x < GRID_TILE - 1) & (np.abs(y - GRID_TILE / 2) <= (GRID_TILE - 1 - x) / 2 + 0.25)  # points right
    for player, colour in enumerate(PLAYER_COLOURS):
        for heading in range(4):
            tile = TILE_PLAYER + 8 * player + heading
            tiles[tile][np.rot90(arrow, -heading)] = colour
            tiles[tile + 4][np.rot90(arrow, -heading)] = np.array(colour) // 2
    return tiles


GRID_TILES = _grid_tiles()
