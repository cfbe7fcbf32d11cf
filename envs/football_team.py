"""What a team of envs/football.py is: one small network that all ten players share, and files that hold a league of such teams.

The network's first layer sees the team's view once and adds each player's own: W (view, own_i) = W_view view + W_own own_i.
Weights are (out, in) and matches come last, as in the world; any axes of matches will do.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.env import shipped
from common.nn import orthogonal
from common.runs.checkpoint import load, read_meta, save
from common.runs.config import UsageError, require
from envs.football_state import NORMAL, NUM_ACTIONS, OWN_VIEW, FootballState, like, own_view, team_view

WHOLE_VIEW = 126  # of `team_view`, all but the score and the clock
LEAGUE_FILE = "football_league.npz"  # in envs/data


class Team(NamedTuple):
    """A team's parameters; a league of M teams has an axis (M,) before these."""

    whole: jax.Array  # (H, 126)
    own: jax.Array  # (H, 43)
    first_bias: jax.Array  # (H,)
    hidden: jax.Array  # (H, H)
    hidden_bias: jax.Array  # (H,)
    last: jax.Array  # (19, H)
    last_bias: jax.Array  # (19,)


def init_team(key, hidden: int = 64) -> Team:
    """Orthogonal weights; the last layer's are small, so that every action is about as likely."""
    key_first, key_hidden, key_last = jax.random.split(key, 3)
    first = orthogonal(key_first, (hidden, WHOLE_VIEW + OWN_VIEW), 2**0.5)
    zero = jnp.zeros(hidden, jnp.float32)
    between, last = orthogonal(key_hidden, (hidden, hidden), 2**0.5), orthogonal(key_last, (NUM_ACTIONS, hidden), 0.01)
    return Team(first[:, :WHOLE_VIEW], first[:, WHOLE_VIEW:], zero, between, zero, last, jnp.zeros(NUM_ACTIONS, jnp.float32))


def apply_team(params: Team, whole, own) -> jax.Array:
    """A team's view (126, ...) and its players' own (43, 10, ...) -> logits (19, 10, ...)."""
    column = lambda bias: bias.reshape(-1, *[1] * (own.ndim - 1))
    seen = jnp.tensordot(params.whole, whole, 1)[:, None]
    x = jnp.tanh(seen + jnp.tensordot(params.own, own, 1) + column(params.first_bias))
    x = jnp.tanh(jnp.tensordot(params.hidden, x, 1) + column(params.hidden_bias))
    logits = jnp.tensordot(params.last, x, 1) + column(params.last_bias)
    return jnp.where(legal_actions(whole, own), logits, -1e9)


def legal_actions(whole, own) -> jax.Array:
    """Which actions a player chooses from (19, 10, ...) bool: kicks and dribbling only with the ball, to stop only what he does,
    which the world takes for idling where they are not; and a slide only within 3 m of a ball that the other team has in play."""
    runs, sprints, dribbles = (own[6] != 0) | (own[7] != 0), own[8] > 0, own[9] > 0
    has, theirs = own[14] > 0, ((whole[96] > 0) & (whole[97 + NORMAL] > 0))[None]
    slides = theirs & ~has & (own[13] == 0) & (own[19] < 3.0 / 20)
    always, kicks = jnp.ones_like(has), has & (own[15] == 0)
    legal = [always] * 9 + [kicks] * 4 + [~sprints, runs, sprints, slides, has & ~dribbles, dribbles]
    return jnp.stack(jnp.broadcast_arrays(*legal))


def views(state: FootballState, team: int = 0):
    """What `apply_team` needs of a state: (126, ...), (43, 10, ...). `team`: 0 for the one that plays left, 1 for the right."""
    return team_view(state, 0.0)[team, :WHOLE_VIEW], own_view(state)[team].swapaxes(0, 1)


def team_logits(params: Team, state: FootballState, team: int = 0) -> jax.Array:
    """(10, 19, ...)."""
    return apply_team(params, *views(state, team)).swapaxes(0, 1)


def team_actions(key, params: Team, state: FootballState, team: int = 0) -> jax.Array:
    """Sampled actions (10, ...) int32 of a team: half of what `step_env` takes; each side in its own frame."""
    return sample_actions(key, apply_team(params, *views(state, team)))[0]


def match_actions(key, left: Team, right: Team, state: FootballState) -> jax.Array:
    """Sampled actions (20, B) of two teams, the left one first, as `step_env` takes them. One product for both."""
    both = jax.tree.map(lambda a, b: jnp.stack([jnp.asarray(a), jnp.asarray(b)]), left, right)
    logits = jax.vmap(apply_team, out_axes=2)(both, team_view(state, 0.0)[:, :WHOLE_VIEW], own_view(state).swapaxes(1, 2))
    return jnp.moveaxis(sample_actions(key, logits)[0], 1, 0).reshape(20, *state.time.shape)


def sample_actions(key, logits):
    """Logits (19, 10, ...) -> actions (10, ...) int32 and their log-probabilities, by one uniform number a player.

    One word of threefry a match and a hash of it for each player: threefry for all would cost more than the network.
    """
    seed = jax.random.bits(key, logits.shape[2:], jnp.uint32)
    word = seed ^ like(np.arange(1, 11, dtype=np.uint32) * np.uint32(0x9E3779B9), logits[0])
    word = (word ^ (word >> 16)) * np.uint32(0x7FEB352D)
    word = (word ^ (word >> 15)) * np.uint32(0x846CA68B)
    u = (word >> 8).astype(jnp.float32) * 2.0**-24
    top = logits.max(0)
    weight = jnp.exp(logits - top)
    sums = [weight[0]]
    for k in range(1, NUM_ACTIONS):
        sums.append(sums[-1] + weight[k])
    action = sum((s <= u * sums[-1]).astype(jnp.int32) for s in sums[:-1])
    kind = like(np.arange(NUM_ACTIONS, dtype=np.int32), logits)
    chosen = jnp.where(kind == action, logits, 0.0).sum(0)
    return action, chosen - top - jnp.log(sums[-1])


# --- leagues


def shipped_league() -> Path:
    """The league that comes with this repository; made by the command in its `meta`."""
    return shipped(LEAGUE_FILE, "python algos/tizero.py")


def save_league(path: Path, params: Team, names: list[str], meta: dict) -> None:
    """Writes M teams (M, ...), the earliest first, as float16. `meta`: JSON values that say how they were made."""
    require(len(names) == len(params.whole), f"a league of {len(params.whole)} teams has {len(names)} names")
    half = jax.tree.map(lambda x: np.asarray(x, np.float16), params)
    save(path, half, meta | {"names": list(names), "hidden": int(params.hidden.shape[-1])})


def load_league(path: Path | str | None = None) -> tuple[Team, list[str]]:
    """-> M teams (M, ...) float32, numpy, the earliest first, and their names. Without a path: the league that is shipped.

    Raises UsageError where the file is no league or not all of one.
    """
    path = Path(path) if path else shipped_league()
    try:
        meta = read_meta(path)
        names, hidden = meta["names"], meta["hidden"]
        if not (isinstance(names, list) and names and all(isinstance(x, str) for x in names) and isinstance(hidden, int)):
            raise ValueError("it does not name its teams")
        params = load(path, league_shape(len(names), hidden), path)
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"league {path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever a damaged or hostile file makes zipfile, numpy or json raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{path} is no league: {reason}") from error
    params = jax.tree.map(lambda x: x.astype(np.float32), params)
    require(all(np.isfinite(x).all() for x in params), f"league {path}: a parameter is not finite")
    return params, names


def league_shape(num: int, hidden: int) -> Team:
    """Shapes and types of a file's arrays. Raises ValueError for sizes that no league has."""
    if not (1 <= hidden <= 4096 and 1 <= num <= 4096):
        raise ValueError(f"it has {num} teams with {hidden} hidden units")
    shapes = [
        (hidden, WHOLE_VIEW),
        (hidden, OWN_VIEW),
        (hidden,),
        (hidden, hidden),
        (hidden,),
        (NUM_ACTIONS, hidden),
        (NUM_ACTIONS,),
    ]
    return Team(*(jax.ShapeDtypeStruct((num, *shape), jnp.float16) for shape in shapes))
