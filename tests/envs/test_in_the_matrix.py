""" "In the matrix" against a recording of JaxMARL's, a slow reference written from the rules, and scenes worked out by hand."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common.runs.config import UsageError
from envs.in_the_matrix import COIN_CELLS, GRID, GRID_TILE, SPAWN_CELLS, GridState, InTheMatrix, draws

LEFT, RIGHT, FORWARD, INTERACT, STAY = range(5)
VECTORS = [(1, 0), (0, 1), (-1, 0), (0, -1)]
PRISONERS = {(0, 0): 3, (0, 1): 0, (1, 0): 5, (1, 1): 1}  # my coin, the other's -> mine
EASTERN, SOUTHERN, WESTERN, NORTHERN = range(4)


@partial(jax.jit, static_argnums=(0, 4))
def step(env, seed, states, actions, one_key=False):
    """One step of N games, each with its own key or all with one."""
    key = jax.random.key(seed)
    keys = jnp.broadcast_to(key, len(actions)) if one_key else jax.random.split(key, len(actions))
    return jax.vmap(env.step_env, (0, 0, 0, None))(keys, states, actions, env.default_params)


@partial(jax.jit, static_argnums=0)
def see(env, states):
    return jax.vmap(env.get_obs)(states)


ENV = InTheMatrix()
GAMES = {2: ENV, 3: InTheMatrix(num_players=3, fixed_coins=False), 5: InTheMatrix("imp", num_players=5)}


@partial(jax.jit, static_argnums=(0, 1, 2))
def random_play(env, num=100, steps=30):
    """-> states (steps + 1, N), actions, rewards, who met (steps, N, A), and chance, of play that gathers, and beams a lot.

    It begins with some coins held, side by side in the middle.
    """
    key_reset, key_act, key_step, key_held = jax.random.split(jax.random.key(3), 4)
    _, start = jax.vmap(env.reset_env, (0, None))(jax.random.split(key_reset, num), env.default_params)
    middle = np.array([(3, 3), (4, 3), (4, 4), (3, 4), (5, 4)], np.int32)[: env.num_agents]
    held = jax.random.randint(key_held, (num, env.num_agents, 2), 0, 3)
    start = start._replace(pos=jnp.broadcast_to(middle, (num, *middle.shape)), inventory=held)
    odds = jnp.array([0.15, 0.1, 0.45, 0.25, 0.05])
    actions = jax.random.choice(key_act, 5, (steps, num, env.num_agents), p=odds)

    def body(states, inputs):
        key, actions = inputs
        keys = jax.random.split(key, num)
        _, states, reward, _, info = jax.vmap(env.step_env, (0, 0, 0, None))(keys, states, actions, env.default_params)
        return states, (states, reward, info["met"], jax.vmap(partial(draws, num=env.num_agents))(keys))

    _, (states, reward, met, chance) = jax.lax.scan(body, start, (jax.random.split(key_step, steps), actions))
    states = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), start, states)
    return states, actions, reward, met, chance


@pytest.fixture(scope="module", params=[2, 3, 5])
def played(request):
    env = GAMES[request.param]
    return env, jax.tree.map(np.array, random_play(env))


def scene(players, coins=(), env=ENV, **fields):
    """A batch of one: players as (x, y, heading, cooperation coins, defection coins), only the coins listed by cell present."""
    x, y, heading, *held = zip(*players, strict=True)
    present = [tuple(cell) in set(coins) for cell in COIN_CELLS.tolist()]
    num = len(players)
    kinds = np.int32((np.arange(12) + 1) % 2)
    zeros = np.zeros(num, np.int32)
    state = GridState(
        np.int32([x, y]).T, np.int32(heading), np.int32(held).T, zeros, zeros > 0, kinds, np.array(present), np.int32(0)
    )
    state = state._replace(**{name: np.asarray(value, getattr(state, name).dtype) for name, value in fields.items()})
    return jax.tree.map(lambda x: x[None], state)


def one_step(state, *actions, seed=0, env=ENV):
    obs, state, reward, _, info = step(env, seed, state, jnp.int32([actions]))
    return jax.tree.map(lambda x: np.array(x[0]), (obs, state, reward, info))


# --- the recording


def test_recording():
    """JaxMARL 0.2.0's InTheGrid_2p (fixed_coin_location False, num_inner_steps 10000 so that nothing resets), 14 games of 152 steps
    of play that hunts the other player once both hold coins.

    Recorded: actions (14, 152, 2), reward (14, 152, 2); and of 153 states pos (x, y, heading) of both, inventory, freeze, grid
    (8, 8), view (2, 5, 5, 10) packed to bits, vector (2, 6); coins (14, 2, 6, 2), the cells of either kind. Compared: every step
    that does not end a freeze, in full, where chance enters (two on their way to one cell) against eight tries of ours; the end of
    a freeze up to chance. Where the peer is wrong it is not followed: two of its 18 spawn cells hold coins, which hide the
    player who begins there and are lost when it leaves.
    """
    with np.load(Path(__file__).parent / "data" / "in_the_matrix.npz") as file:
        data = dict(file)
    states = peer_states(data)
    at = lambda t: jax.tree.map(lambda x: x[:, t].reshape(-1, *x.shape[2:]), states)
    everything = at(slice(None))
    grid = data["grid"].reshape(-1, 8, 8)
    place = everything.pos[..., 0], everything.pos[..., 1]
    shown = (grid[np.arange(len(grid))[:, None], *place] == [1, 2]).all(1)  # the peer draws a coin over a player who begins on it
    before, after = at(slice(0, -1)), at(slice(1, None))
    actions, reward = np.int32(data["actions"].reshape(-1, 2)), data["reward"].reshape(-1, 2)
    thaws, fair = (before.freeze == 1).any(1), shown.reshape(14, 153)[:, :-1].ravel()
    tries = [step(ENV, seed, before, actions, True) for seed in range(8)]
    same = np.array([agree(ours, after) & np.isclose(paid, reward, atol=1e-5).all(1) for _, ours, paid, *_ in tries])
    assert same.any(0)[~thaws & fair].all()
    chance = ~same.all(0) & ~thaws & fair
    assert 0 < chance.sum() < 40 and thaws.sum() > 15 and (np.abs(reward).sum(1) > 0).sum() > 20
    for _, ours, *_ in tries:
        assert (ours.inventory[thaws] == 0).all() and (ours.freeze[thaws] == 0).all() and ours.present[thaws].all()
        assert (after.inventory[thaws] == 0).all() and (after.freeze[thaws] == 0).all()
        spawns = {tuple(cell) for cell in SPAWN_CELLS.tolist()}
        assert {tuple(p) for p in np.array(ours.pos)[thaws].reshape(-1, 2).tolist()} <= spawns

    seen = see(ENV, everything)
    np.testing.assert_array_equal(np.array(seen.image)[shown], peer_view(data)[shown])
    np.testing.assert_array_equal(seen.vector, data["vector"].reshape(-1, 2, 6))
    assert shown.mean() > 0.95


def agree(ours, theirs) -> np.ndarray:
    """Which of N states are the same (kinds and time aside)."""
    flat = lambda x: np.array(x).reshape(len(x), -1)
    names = ("pos", "heading", "inventory", "freeze", "beam", "present")
    return np.all([(flat(getattr(ours, n)) == flat(getattr(theirs, n))).all(1) for n in names], axis=0)


def peer_states(data) -> GridState:
    """The recorded states (14, 153) as ours: headings run the other way there, a freeze of -1 is none."""
    x, y, heading = np.moveaxis(np.int32(data["pos"]), -1, 0)
    frozen = np.maximum(np.int32(data["freeze"]), 0)
    kinds = (data["coins"][:, 1, :, None] == COIN_CELLS).all(-1).any(1)  # (14, 12): in the list of defection coins
    on_grid = data["grid"][:, :, COIN_CELLS[:, 0], COIN_CELLS[:, 1]]
    beam = np.zeros(data["freeze"].shape + (2,), bool)
    beam[:, 1:] = (data["actions"] == INTERACT) & (frozen[:, :-1, None] == 0)
    kinds = np.broadcast_to(np.int32(kinds)[:, None], on_grid.shape)
    freeze = np.stack([frozen, frozen], -1)
    time = np.zeros(frozen.shape, np.int32)
    inventory = np.int32(data["inventory"])
    return GridState(np.stack([x, y], -1), (1 - heading) % 4, inventory, freeze, beam, kinds, (on_grid == 3) | (on_grid == 4), time)


def peer_view(data) -> np.ndarray:
    """The recorded views turned as ours are: there rows run to the left and columns ahead, and headings the other way round."""
    view = np.unpackbits(data["view"], axis=-1, count=500).reshape(-1, 2, 5, 5, 10)
    turned = view[:, :, ::-1, ::-1].swapaxes(2, 3)
    return turned[..., [0, 1, 2, 3, 4, 5, 6, 9, 8, 7]]


# --- the reference


def reference_step(state, actions, chance, table):
    """One step of one game in plain Python, from the rules in the module's docstring -> pos, heading, inventory, freeze, reward."""
    order, _, _ = chance
    num = len(actions)
    turn = sorted(range(num), key=lambda i: (order[i], i))
    acts = [STAY if state.freeze[i] > 0 else actions[i] for i in range(num)]
    heading = [(state.heading[i] + {LEFT: 3, RIGHT: 1}.get(acts[i], 0)) % 4 for i in range(num)]
    old = [tuple(p) for p in state.pos.tolist()]
    want = list(old)
    for i in range(num):
        ahead = tuple(np.add(old[i], VECTORS[heading[i]]))
        if acts[i] == FORWARD and all(0 <= c < GRID for c in ahead):
            want[i] = ahead
    clash = True
    while clash:  # give way until nobody has to
        claims = {}
        for i in sorted(range(num), key=lambda i: (want[i] != old[i], turn.index(i))):
            claims.setdefault(want[i], i)
        losers = [i for i in range(num) if claims[want[i]] != i]
        for i in losers:
            want[i] = old[i]
        clash = bool(losers)
    held = state.inventory.copy()
    for k, cell in enumerate(map(tuple, COIN_CELLS.tolist())):
        if state.present[k] and cell in want:
            held[want.index(cell), state.kinds[k]] += 1
    able = [held[i].sum() > 0 and state.freeze[i] == 0 for i in range(num)]
    reward, met = np.zeros(num), set()
    for i in turn:
        if acts[i] != INTERACT or not able[i] or i in met:
            continue
        ahead, right = np.array(VECTORS[heading[i]]), np.array(VECTORS[(heading[i] + 1) % 4])
        for cell in (ahead, 2 * ahead, ahead - right, ahead + right):
            hit = [j for j in range(num) if want[j] == tuple(want[i] + cell) and able[j] and j not in met and j != i]
            if hit:
                met |= {i, hit[0]}
                for me, you in ((i, hit[0]), (hit[0], i)):
                    x, y = held[me] / held[me].sum(), held[you] / held[you].sum()
                    reward[me] = x @ np.reshape(table[0 if me < you else 1], (2, 2)) @ y
                break
    freeze = [5 if i in met else max(state.freeze[i] - 1, 0) for i in range(num)]
    return want, heading, held, freeze, reward


def test_reference(played):
    """Every step of random play; places after a freeze apart, which are chance."""
    env, (states, actions, reward, _, chance) = played
    table = {2: [[3, 0, 5, 1]] * 2, 3: [[3, 0, 5, 1]] * 2, 5: [[1, -1, -1, 1], [-1, 1, 1, -1]]}[env.num_agents]
    crowded = 0
    for t in range(actions.shape[0]):
        for n in range(actions.shape[1]):
            take = lambda x, t=t, n=n: x[t, n]
            before, after = (jax.tree.map(lambda x, s=s: x[s, n], states) for s in (t, t + 1))  # noqa: B023
            want, heading, held, freeze, paid = reference_step(before, take(actions), [take(x) for x in chance], table)
            moving = before.freeze != 1
            np.testing.assert_array_equal(after.pos[moving], np.array(want)[moving])
            np.testing.assert_array_equal(after.heading[moving], np.array(heading)[moving])
            np.testing.assert_array_equal(after.inventory, np.where(moving[:, None], held, 0))
            np.testing.assert_array_equal(after.freeze, freeze)
            np.testing.assert_allclose(take(reward), paid, atol=1e-5)
            crowded += paid.any()
    assert crowded > 20


# --- what holds in any game


def test_random_play(played):
    env, (states, actions, reward, met, _) = played
    num, pos = env.num_agents, states.pos
    assert pos.min() == 0 and pos.max() == GRID - 1
    together = (pos[..., :, None, :] == pos[..., None, :, :]).all(-1).sum((-1, -2))
    assert (together == num).all(), "two players in one cell"
    frozen = states.freeze[:-1] > 0
    stays = frozen & (states.freeze[:-1] > 1)
    np.testing.assert_array_equal(pos[1:][stays], pos[:-1][stays])
    np.testing.assert_array_equal(states.heading[1:][stays], states.heading[:-1][stays])
    np.testing.assert_array_equal(states.freeze[1:][frozen], states.freeze[:-1][frozen] - 1)
    assert not (met & frozen).any() and (met.sum(-1) % 2 == 0).all() and met.sum() > 50
    assert (states.freeze[1:][met] == 5).all() and (reward[~met] == 0).all()
    thaws = states.freeze[:-1] == 1
    assert thaws.sum() > 20 and (states.inventory[1:][thaws] == 0).all()
    coins = states.present.sum(-1) + states.inventory.sum((-1, -2))
    quiet = ~thaws.any(-1)
    np.testing.assert_array_equal(coins[1:][quiet], coins[:-1][quiet])  # picked up, never lost
    if env.payoff[0, 0] == -env.payoff[1, 0]:  # matching pennies
        np.testing.assert_allclose(reward.sum(-1), 0, atol=1e-5)
    if num == 2:
        assert (states.present[1:][~quiet]).all()
        opposite = pos[1:][~quiet].sum(1)
        np.testing.assert_array_equal(opposite, GRID - 1)


@pytest.mark.parametrize("players", [2, 3, 5])
def test_starts(players):
    """On distinct spawn cells, without coins, all of them used; every heading is faced."""
    env = GAMES[players]
    reset = jax.jit(jax.vmap(env.reset_env, (0, None)))
    obs, states = reset(jax.random.split(jax.random.key(0), 500), env.default_params)
    pos = np.array(states.pos)
    cells = {tuple(cell) for cell in pos.reshape(-1, 2).tolist()}
    assert cells == {tuple(cell) for cell in SPAWN_CELLS.tolist()} and len(cells) == 16
    assert not cells & {tuple(cell) for cell in COIN_CELLS.tolist()}
    assert all(len({tuple(p) for p in game}) == players for game in pos.tolist())
    assert (np.bincount(np.array(states.heading).ravel(), minlength=4) > 100 * players).all()
    kinds = np.array(states.kinds)
    assert (kinds.sum(1) == 6).all() and (kinds == kinds[0]).all() == env.fixed_coins
    if not env.fixed_coins:
        assert (np.abs(kinds.mean(0) - 0.5) < 0.12).all()
    assert np.array(states.present).all()
    assert obs.image.shape == (500, players, 5, 5, 10) and obs.vector.shape == (500, players, 3 * players)


def test_the_fixed_coins_lie_as_in_pax():
    """Its list of twelve cells, the even ones defection coins and the odd ones cooperation coins."""
    _, state = jax.jit(ENV.reset_env)(jax.random.key(0), ENV.default_params)
    cooperation = {tuple(cell) for cell in COIN_CELLS[np.array(state.kinds) == 0].tolist()}
    assert cooperation == {(1, 2), (1, 6), (1, 5), (5, 1), (6, 6), (5, 6)}


# --- scenes worked out by hand


@pytest.mark.parametrize("mine", [0, 1])
@pytest.mark.parametrize("others", [0, 1])
def test_pure_strategies_play_the_matrix(mine, others):
    held = [(2, 0), (0, 3)]
    start = scene([(3, 3, EASTERN, *held[mine]), (4, 3, EASTERN, *held[others])])
    _, state, reward, info = one_step(start, INTERACT, STAY)
    np.testing.assert_allclose(reward, [PRISONERS[mine, others], PRISONERS[others, mine]])
    assert info["met"].all() and (state.freeze == 5).all()
    np.testing.assert_allclose(info["strategy"], [1 - mine, 1 - others])


def test_mixed_strategies_are_bilinear():
    """Shares (1/4, 3/4) against (1/2, 1/2): (3 + 0 + 15 + 3) / 8 and (3 + 15 + 0 + 3)... each by hand."""
    _, _, reward, _ = one_step(scene([(3, 3, EASTERN, 1, 3), (4, 3, EASTERN, 2, 2)]), INTERACT, STAY)
    first = 0.25 * (0.5 * 3 + 0.5 * 0) + 0.75 * (0.5 * 5 + 0.5 * 1)
    second = 0.5 * (0.25 * 3 + 0.75 * 0) + 0.5 * (0.25 * 5 + 0.75 * 1)
    np.testing.assert_allclose(reward, [first, second], atol=1e-6)


def test_the_reach_of_a_beam():
    """One and two ahead, ahead to the left and to the right; for every heading; nowhere else."""
    for heading, (dx, dy) in enumerate(VECTORS):
        hits = set()
        for x in range(GRID):
            for y in range(GRID):
                if (x, y) != (3, 4):
                    _, _, reward, info = one_step(scene([(3, 4, heading, 1, 0), (x, y, EASTERN, 1, 0)]), INTERACT, STAY)
                    hits |= {(x - 3, y - 4)} if info["met"].any() else set()
        assert hits == {(dx, dy), (2 * dx, 2 * dy), (dx + dy, dy - dx), (dx - dy, dy + dx)}


@pytest.mark.parametrize(("first", "second"), [((0, 0), (1, 0)), ((1, 0), (0, 0)), ((0, 0), (0, 0))])
def test_only_who_is_ready_meets(first, second):
    _, state, reward, info = one_step(scene([(3, 3, EASTERN, *first), (4, 3, WESTERN, *second)]), INTERACT, INTERACT)
    assert not info["met"].any() and not reward.any() and not state.freeze.any()


def test_freeze_shows_inventories_and_then_all_begins_anew():
    """Five steps out, each seeing what the other holds; then both stand on opposite spawn cells with nothing, and all coins lie."""
    start = scene([(3, 3, EASTERN, 2, 1), (4, 3, EASTERN, 0, 3)], coins=[(1, 1)])
    obs, state, _, _ = one_step(start, INTERACT, STAY)
    np.testing.assert_array_equal(obs.vector, [[2, 1, 1, 1, 0, 3], [0, 3, 1, 1, 2, 1]])
    for k in range(5):
        batch = jax.tree.map(lambda x: x[None], state)
        obs, state, reward, _ = one_step(batch, FORWARD, INTERACT, seed=k)
        assert not reward.any()
        if k < 4:
            np.testing.assert_array_equal(state.pos, [(3, 3), (4, 3)])
            np.testing.assert_array_equal(obs.vector[0], [2, 1, 1, 1, 0, 3])
    np.testing.assert_array_equal(state.pos.sum(0), GRID - 1)
    assert not obs.vector.any() and state.present.all() and not state.freeze.any()


def test_vector_hides_what_others_hold():
    obs, _, _, _ = one_step(scene([(0, 0, EASTERN, 2, 1), (7, 7, EASTERN, 0, 3)]), STAY, STAY)
    np.testing.assert_array_equal(obs.vector, [[2, 1, 1, 1, 0, 0], [0, 3, 1, 1, 0, 0]])


def test_coins_are_picked_up_by_walking():
    start = scene([(0, 1, EASTERN, 0, 0), (7, 7, EASTERN, 0, 0)], coins=[(1, 1), (1, 2)])
    _, state, _, _ = one_step(start, FORWARD, STAY)
    np.testing.assert_array_equal(state.inventory, [[0, 1], [0, 0]])  # (1, 1) is a defection coin where coins are fixed
    assert state.present.sum() == 1


@pytest.mark.parametrize(
    ("players", "actions", "ends"),
    [
        ([(3, 3, EASTERN), (4, 3, WESTERN)], (FORWARD, STAY), {((3, 3), (4, 3))}),  # who stays has precedence
        ([(3, 3, EASTERN), (5, 3, WESTERN)], (FORWARD, FORWARD), {((4, 3), (5, 3)), ((3, 3), (4, 3))}),  # a coin toss
        ([(3, 3, EASTERN), (4, 3, WESTERN)], (FORWARD, FORWARD), {((4, 3), (3, 3))}),  # they change places
        ([(3, 3, EASTERN), (4, 3, EASTERN)], (FORWARD, FORWARD), {((4, 3), (5, 3))}),  # one after the other
        ([(6, 3, EASTERN), (7, 3, EASTERN)], (FORWARD, FORWARD), {((6, 3), (7, 3))}),  # who walks into the wall stays
        ([(0, 0, WESTERN), (0, 7, SOUTHERN)], (FORWARD, FORWARD), {((0, 0), (0, 7))}),
    ],
)
def test_moves(players, actions, ends):
    start = scene([(*p, 0, 0) for p in players])
    seen = {tuple(map(tuple, one_step(start, *actions, seed=seed)[1].pos.tolist())) for seed in range(20)}
    assert seen == ends


def test_giving_way_is_passed_on():
    """Players 0 and 1 are on their way to one cell, player 2 behind player 0: if 0 stays so must 2."""
    env = GAMES[3]
    start = scene([(3, 3, EASTERN, 0, 0), (4, 2, SOUTHERN, 0, 0), (2, 3, EASTERN, 0, 0)], env=env)
    ends = {tuple(map(tuple, one_step(start, FORWARD, FORWARD, FORWARD, seed=s, env=env)[1].pos.tolist())) for s in range(20)}
    assert ends == {((4, 3), (4, 2), (3, 3)), ((3, 3), (4, 3), (2, 3))}


def test_three_in_reach_meet_in_pairs():
    """Two beams at one player: one of them, at random, plays with it, the other with nobody."""
    env = GAMES[3]
    start = scene([(3, 3, EASTERN, 1, 0), (5, 3, WESTERN, 1, 0), (4, 3, NORTHERN, 0, 1)], env=env)
    met = {tuple(one_step(start, INTERACT, INTERACT, STAY, seed=s, env=env)[3]["met"].tolist()) for s in range(20)}
    assert met == {(True, False, True), (False, True, True)}


def test_turning():
    for heading in range(4):
        _, state, _, _ = one_step(scene([(3, 3, heading, 0, 0), (6, 3, heading, 0, 0)]), LEFT, RIGHT)
        np.testing.assert_array_equal(state.heading, [(heading - 1) % 4, (heading + 1) % 4])


def test_what_is_not_an_action_stays():
    start = scene([(3, 3, EASTERN, 1, 0), (4, 3, WESTERN, 1, 0)])
    for strange in (-1, 5, 77):
        _, state, reward, _ = one_step(start, strange, strange)
        np.testing.assert_array_equal(state.pos, [(3, 3), (4, 3)])
        assert not reward.any() and not state.beam.any()


def test_the_view():
    """A scene drawn by hand: # outside, c and d coins, b beam, 2 the other; the player looks up from the bottom row's middle."""
    players = [(1, 3, NORTHERN, 0, 0), (2, 2, WESTERN, 0, 0)]
    obs, _, _, _ = one_step(scene(players, coins=[(1, 1), (1, 2), (2, 1)]), INTERACT, STAY)
    window = ["#....", "#.dd.", "#bc2.", "#.1.."]  # rows y = 0 to 3 of x = -1 to 3
    legend = {"1": 0, "2": 1, "c": 2, "d": 3, "#": 4, "b": 5}
    for row in range(5):
        for column in range(5):
            sign = "#" if row == 0 else window[row - 1][column]  # y = -1 lies outside
            expected = np.zeros(10)
            if sign in legend:
                expected[legend[sign]] = 1
            if sign == "2":
                expected[6 + 3] = 1  # it faces west, to the left of north
            np.testing.assert_array_equal(obs.image[0, row, column], expected, err_msg=f"{row} {column}")


def test_last_step_is_rewarded():
    """Pax and JaxMARL pay nothing on the last step of an episode; the paper's game has no such rule."""
    start = jax.tree.map(lambda x: x[0], scene([(3, 3, EASTERN, 1, 0), (4, 3, WESTERN, 1, 0)], time=151))
    _, _, reward, _, truncated, _ = jax.jit(ENV.step)(jax.random.key(0), start, jnp.int32([INTERACT, STAY]))
    assert truncated and (reward == 3).all()


@pytest.mark.parametrize("arguments", [("chicken",), ("ipd", 1), ("ipd", 9), ("imp", 2, True, 0)])
def test_bad_arguments_get_one_line(arguments):
    with pytest.raises(UsageError) as error:
        InTheMatrix(*arguments)
    assert "must" in str(error.value) and "\n" not in str(error.value)


def test_render():
    start = scene([(3, 3, EASTERN, 1, 0), (0, 7, WESTERN, 1, 0)], coins=[(1, 1), (1, 2)], beam=[True, False])
    state = jax.tree.map(lambda x: x[0], start)
    render = jax.jit(ENV.render)
    image = np.array(render(state))
    assert image.shape == (10 * GRID_TILE, 10 * GRID_TILE, 3) and image.dtype == np.uint8
    cell = lambda picture, x, y: picture[(y + 1) * GRID_TILE : (y + 2) * GRID_TILE, (x + 1) * GRID_TILE : (x + 2) * GRID_TILE]
    floor = cell(image, 7, 0)
    differs = {(x, y) for x in range(-1, 9) for y in range(-1, 9) if (cell(image, x, y) != floor).any()}
    wall = {(x, y) for x in range(-1, 9) for y in range(-1, 9) if not (0 <= x < 8 and 0 <= y < 8)}
    assert differs == wall | {(3, 3), (0, 7), (1, 1), (1, 2), (4, 3), (5, 3), (4, 2), (4, 4)}
    assert (cell(image, 1, 1) != cell(image, 1, 2)).any(), "the coins look alike"
    frozen = np.array(render(state._replace(freeze=np.int32([3, 3]))))
    assert cell(frozen, 3, 3).max() < cell(image, 3, 3).max()
