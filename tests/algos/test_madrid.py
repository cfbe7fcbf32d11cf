"""MADRID: regret by hand, flaws, the archive's cells and ties, duels, emitters, the winner's curse, bad settings."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sizes import OWN, SMALL_LEAGUE

from algos import madrid
from algos.madrid import CPU, Config, Elite, cell_of, make_players, make_train, regret
from common.archive import Archive, init_archive
from common.runs.config import UsageError
from envs.football import Football
from envs.football_state import LONG, SHORT, SHOT, STOP

SIZES = OWN["madrid"] | dict(references=("league", "hard"), emitter="gaussian", grid=(20, 8))
SMALL = replace(CPU, num_seeds=1, num_updates=4, log_every=2, eval_every=4, save_every=4, **SIZES)
BOTS = replace(SMALL, league="none", target="hard", references=("hard",), candidates=16, duels=0, chunk=256)


def elites(level, xp, sp, plays=4.0) -> Elite:
    """From lists of shares."""
    level, xp, sp = (jnp.asarray(x, jnp.float32) for x in (level, xp, sp))
    return Elite(level, xp, sp, jnp.full(xp.shape[:-1], plays))


def levels_at(*balls) -> np.ndarray:
    """Levels with the ball there, (N, 42)."""
    level = np.zeros((len(balls), 42), np.float32)
    level[:, 40:] = balls
    return level


def empty(num_refs: int) -> Archive:
    like = elites(np.zeros(42), np.zeros(2), np.zeros(2))
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_refs, *x.shape)), init_archive(like, SMALL.num_cells, 2))


# --- regret


def test_regret_by_hand():
    """Of four matches the reference wins two and loses one; the target wins one of its own and concedes three."""
    found = regret(elites(np.zeros((3, 42)), [[0.5, 0.25], [1, 0], [0, 0]], [[0.25, 0.75], [0, 1], [0, 0]]))
    np.testing.assert_allclose(found, [0.25 - (-0.5), 2.0, 0.0])


def test_pooling_counts_matches():
    one = elites(np.zeros((1, 42)), [[1.0, 0.0]], [[0.5, 0.5]], plays=4)
    two = elites(np.zeros((1, 42)), [[0.25, 0.5]], [[0.0, 0.25]], plays=12)
    both = madrid.pooled(one, two)
    assert both.plays == 16
    np.testing.assert_allclose(both.xp, [[7 / 16, 6 / 16]])
    np.testing.assert_allclose(both.sp, [[2 / 16, 5 / 16]])


def test_the_first_goal_decides():
    """Recorded matches by hand: who scored first, from the scores after every step."""
    config = replace(SMALL, horizon=40, chunk=64)
    players = make_players(config)
    assert players.names == ["early", "hard", "late"]
    assert make_players(replace(SMALL, target="hard")).names == ["early", "hard", "hard"]
    level = np.array(Football().sample_level(jax.random.key(1), (64,)))
    level[40], level[41], level[2:4] = 0.85, 0.0, [[0.83], [0.0]]  # a left player before the right goal
    left = np.array([1, 2, 0])
    first, states = jax.jit(lambda level: madrid.play_jobs(jax.random.key(0), config, players, left, level, True))(
        jnp.stack([level] * 3)
    )
    goals = np.asarray(states.score) > 0  # (jobs, T, 2, B)
    when = np.where(goals.any(1), goals.argmax(1), 99)
    expected = np.stack([when[:, 0] < when[:, 1], when[:, 1] < when[:, 0]], axis=1)
    np.testing.assert_array_equal(first, expected)
    assert first[0, 0].mean() > 0.3, "the hard bot misses the open chance: the test tests nothing"


def test_score_puts_matches_where_they_belong(monkeypatch):
    """Each level's share is of its own matches, each reference's of its own jobs."""

    def fake(key, config, players, left, levels, record=False):
        return jnp.stack([levels[:, 0] > jnp.asarray(left)[:, None] * 0.1, levels[:, 1] > 0], axis=1).astype(jnp.float32), ()

    monkeypatch.setattr(madrid, "play_jobs", fake)
    levels = np.asarray(jax.random.uniform(jax.random.key(0), (3, 10, 42), minval=-0.2, maxval=0.5))
    elite = madrid.score(jax.random.key(0), replace(SMALL, chunk=8), None, jnp.asarray(levels), 2)
    np.testing.assert_array_equal(elite.xp[..., 0], levels[..., 0] > np.arange(3)[:, None] * 0.1)
    np.testing.assert_array_equal(elite.sp[..., 0], levels[..., 0] > np.float32(3 * 0.1))
    np.testing.assert_array_equal(elite.xp[..., 1], levels[..., 1] > 0)
    np.testing.assert_array_equal(elite.level, levels)


# --- flaws


def test_flaws_change_the_targets_actions_alone():
    state = Football().reset_to_level(jnp.zeros((42, 2)))
    x = np.asarray(state.x).copy()
    x[:, 3] = [[-30.0, 30.0], [-30.0, 30.0]]  # each team's third outfield player: in the left third, in the right
    owner = np.zeros(x.shape, bool)
    owner[1, 3] = True
    state = state._replace(x=jnp.asarray(x), owner=jnp.asarray(owner))
    action = jnp.full((10, 2), SHOT).at[0].set(SHORT)
    flawed = lambda name, team=1: np.asarray(madrid.with_flaw(name, state, action, team))
    np.testing.assert_array_equal(flawed("none"), action)
    assert (flawed("never_shoots")[1:] == 0).all() and (flawed("never_shoots")[0] == SHORT).all()
    assert (flawed("never_passes")[0] == 0).all() and (flawed("never_passes")[1:] == SHOT).all()
    frozen = flawed("frozen")  # the right team's own third is on the right
    assert frozen[2].tolist() == [SHOT, STOP] and (np.delete(frozen, 2, 0) == np.delete(action, 2, 0)).all()
    np.testing.assert_array_equal(flawed("frozen", 0), action)  # the left team does not have the ball
    np.testing.assert_array_equal(flawed("ignores_loose_ball"), action)
    loose = state._replace(owner=jnp.zeros_like(state.owner))
    assert (np.asarray(madrid.with_flaw("ignores_loose_ball", loose, action, 1)) == STOP).all()
    assert LONG not in flawed("never_passes")


# --- the archive


def test_cells():
    """20 along the pitch, 8 across it; what lies outside belongs to the edge."""
    level = levels_at((-0.9, -0.4), (-0.9, 0.4), (0.9, 0.4), (0.0, 0.0), (-0.82, -0.29), (2.0, -2.0))
    assert cell_of(level, SMALL).tolist() == [0, 7, 159, 10 * 8 + 4, 1, 152]


def test_ties_and_whole_elites():
    """Of equal children the first is taken; a child no better than the elite is not."""
    archive = jax.tree.map(lambda x: x[0], empty(1))
    balls = [(0.0, 0.0)] * 3 + [(0.5, 0.1)]
    first = elites(levels_at(*balls) + np.arange(4)[:, None] * 1e-3, [[0.5, 0]] * 3 + [[0, 1]], np.zeros((4, 2)))
    archive, taken = madrid.offer(SMALL, archive, first, jnp.ones(4, bool))
    assert taken.tolist() == [True, False, False, True]
    again, taken = madrid.offer(SMALL, archive, first, jnp.ones(4, bool))
    assert not taken.any()
    jax.tree.map(np.testing.assert_array_equal, archive, again)
    held = int(cell_of(first.level[0], SMALL))
    np.testing.assert_array_equal(archive.genotype.level[held], first.level[0])
    assert madrid.summary_of(jax.tree.map(lambda x: x[None], archive))["qd_score"] == pytest.approx(2.5 + 1.0)


def test_random_keeps_the_newest():
    archive = jax.tree.map(lambda x: x[0], empty(1))
    good, bad = (elites(levels_at((0.0, 0.0), (0.0, 0.0)), [xp, [1, 0]], np.zeros((2, 2))) for xp in ([0.5, 0], [0, 0.25]))
    archive, _ = madrid.keep_newest(SMALL, archive, good)
    archive, taken = madrid.keep_newest(SMALL, archive, bad)
    assert taken.tolist() == [True, False]
    np.testing.assert_allclose(archive.fitness[archive.fitness > -jnp.inf], [-0.25])


def test_duels(monkeypatch):
    """A lucky child falls back and is refused, the elite's pooled mean is kept; a good child wins by its new matches alone; empty
    cells are just filled."""
    balls = [(0.0, 0.0), (0.5, 0.1), (-0.5, 0.1)]
    cells = np.asarray(cell_of(levels_at(*balls), SMALL))
    archive = empty(1)
    old = elites(levels_at(*balls[:2])[None], [[[0.5, 0]] * 2], np.zeros((1, 2, 2)))
    archive, _ = jax.vmap(partial(madrid.offer, SMALL))(archive, old, jnp.ones((1, 2), bool))
    child = elites(levels_at(*balls)[None] + 1e-3, [[[1.0, 0], [0.75, 0], [0, 1]]], np.zeros((1, 3, 2)))

    truth = np.float32([[0.0, 0], [0.75, 0], [0.25, 0], [0.25, 0]])  # the two children, then the two elites

    def fake(key, config, players, levels, repeats):
        assert levels.shape == (1, 4, 42)
        return elites(levels, truth[None], np.zeros((1, 4, 2)))

    monkeypatch.setattr(madrid, "score", fake)
    config = replace(SMALL, candidates=8, duels=2)
    after, taken = madrid.duel(jax.random.key(0), config, None, archive, child)
    assert taken.tolist() == [[False, True, True]]  # the first child's 1 does not count any more: 0 is less than (0.5 + 0.25) / 2
    np.testing.assert_allclose(after.fitness[0, cells], [0.375, 0.75, -1.0])
    np.testing.assert_allclose(after.genotype.plays[0, cells], [8, 4, 4])
    np.testing.assert_array_equal(after.genotype.level[0, cells[0]], old.level[0, 0])
    truth[0, 0] = 0.5
    after, taken = madrid.duel(jax.random.key(0), config, None, archive, child)
    assert taken.tolist() == [[True, True, True]]
    np.testing.assert_allclose(after.fitness[0, cells], [0.5, 0.75, -1.0])


# --- emitters


def test_children_are_near_their_parents():
    archive = empty(2)
    parents = np.zeros((2, 1, 42), np.float32)
    parents[1] += 0.3
    archive, _ = jax.vmap(partial(madrid.offer, SMALL))(
        archive, elites(parents, [[[0, 0]]] * 2, [[[0, 0]]] * 2), jnp.ones((2, 1), bool)
    )
    config = replace(SMALL, candidates=400)
    children = np.asarray(madrid.mutate(jax.random.key(0), archive, config))
    assert children.shape == (2, 400, 42)
    np.testing.assert_allclose(children[0].mean(), 0.0, atol=0.01)  # no elite of one reference has children for another
    np.testing.assert_allclose(children[1][:, ::2].mean(), 0.3, atol=0.01)
    np.testing.assert_allclose(children[0].std(), 0.1, atol=0.01)
    assert np.abs(children[..., 1::2]).max() <= 0.4


def test_cma_emitters_climb_and_restart():
    config = replace(SMALL, emitter="cma", candidates=32, num_emitters=2)
    cma, archive = madrid.make_cma(config), empty(1)
    start = elites(levels_at((0.0, 0.0), (0.5, 0.1))[None], [[[0, 0]] * 2], np.zeros((1, 2, 2)))
    archive, _ = jax.vmap(partial(madrid.offer, SMALL))(archive, start, jnp.ones((1, 2), bool))
    first = state = jax.jit(lambda key: madrid.restart_emitters(key, cma, archive, config))(jax.random.key(1))
    ask = jax.jit(lambda key, state: madrid.ask(key, cma, state, config))
    starts = np.asarray(start.level[0])
    assert all((mean == starts).all(1).any() for mean in np.asarray(state.mean[0]))
    tell = jax.jit(lambda key, *args: madrid.tell(key, cma, *args, archive, config))
    for i in range(25):
        children, state = ask(jax.random.key(i), state)
        rank = jax.vmap(jax.vmap(madrid.improvement_rank))(children[..., 0].reshape(1, 2, 16), jnp.zeros((1, 2, 16)))
        state = tell(jax.random.key(50 + i), state, children, rank.reshape(1, 32), jnp.ones((1, 32), bool))
    assert (state.mean[..., 0] - first.mean[..., 0] > 0.2).all(), "the means do not follow the ranks"
    after = tell(jax.random.key(7), state, children, rank.reshape(1, 32), (jnp.arange(32) < 16)[None])
    assert (np.asarray(after.mean[0, 1]) == starts).all(1).any() and not (np.asarray(after.mean[0, 0]) == starts).all(1).any()
    assert float(after.std[0, 1]) == pytest.approx(config.sigma)


# --- the search


def test_winners_curse():
    """A reference that is the target itself: the archive's estimates say regret, fresh matches do not."""
    config = replace(BOTS, candidates=64, horizon=64, repeats=4)
    players, archive = make_players(config), empty(1)
    play = jax.jit(lambda key, levels: madrid.score(key, config, players, levels, 4))
    offer = jax.jit(lambda archive, elite: jax.vmap(partial(madrid.offer, SMALL))(archive, elite, jnp.ones((1, 64), bool))[0])
    ball = jnp.stack([jnp.full(64, 0.7), jnp.tile(jnp.linspace(-0.35, 0.35, 8), 8)], axis=-1)[None]  # 8 cells before a goal
    for i in range(2):
        levels = madrid.sample_levels(jax.random.key(9 + i), (1, 64)).at[:, :, 40:].set(ball)
        archive = offer(archive, play(jax.random.key(i), levels))
    known = np.asarray(archive.fitness[0] > -jnp.inf)
    assert known.sum() == 8
    held = jnp.tile(archive.genotype.level[:, known], (1, 8, 1))
    fresh = float(regret(play(jax.random.key(50), held)).mean())
    noise = (2 / (64 * 4)) ** 0.5  # of the mean at most: a match's value is -1, 0 or 1
    assert abs(fresh) < 4 * noise < float(archive.fitness[0][known].mean())


def test_players_of_a_league():
    players = make_players(replace(SMALL, references=("league", "sound", "easy"), num_checkpoints=9))
    assert players.names == ["early", "middle", "late", "easy", "late"]
    assert players.is_bot.tolist() == [False, False, False, True, False] and players.place.tolist() == [0, 1, 2, 0, 2]
    assert make_players(replace(SMALL, num_checkpoints=1)).names == ["early", "hard", "late"]


def test_bad_settings_are_refused(tmp_path):
    for change, words in (
        (dict(target="nobody"), "last or one of easy"),
        (dict(references=("hard", "nobody")), "'nobody': must be one of league, sound"),
        (dict(league="none", target="last"), "must be a bot's name"),
        (dict(league="none", target="hard", references=("league",)), "needs --league"),
        (dict(duels=9), "between 0 and --candidates 8"),
        (dict(grid=(0, 4)), "--grid: 0 cells along the pitch"),
        (dict(grid=(10, 1001)), "--grid: 1001 cells across the pitch"),
        (dict(chunk=1), "at least the repeats"),
        (dict(emitter="cma", method="targeted"), "goes with --method madrid"),
        (dict(emitter="cma", num_emitters=4), "at least 4"),
        (dict(references=()), "at least one"),
    ):
        with pytest.raises(UsageError, match=words):
            replace(SMALL, **change)
    for path, words in (
        (tmp_path / "none.npz", "cannot be read"),
        (SMALL_LEAGUE.replace("small_league", "amaze_traces"), "is no league"),
    ):
        with pytest.raises(UsageError, match=words) as error:
            make_train(replace(SMALL, league=str(path)))
        assert "\n" not in str(error.value)
    assert isinstance(Config(), Config)
