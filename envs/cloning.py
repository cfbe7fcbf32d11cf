"""Behavioural cloning of CoinRun's expert from its latent actions (Genie, 2402.15391, section 3.3 and appendix E).

A frozen model names the latent action between each two frames of an expert who is only watched. A policy learns to foresee them;
what they mean is looked up in a few of the expert's steps whose true actions are known. The oracle learns from the true ones.

Differs from the paper: clips are played by the expert as they are needed; no action is random (a tenth of the oracle's, which was
better so); every block of a policy sees the last 4 frames, so that the whole sees some more.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from common.env import select
from common.nn import dense
from common.runs.config import require
from common.runs.programs import Train
from common.st import Cache, Spec, grid_of, init_cache, init_st, patchify, positions, rms_norm, st_blocks
from envs.clips import Game, Source, make_source

CONTEXT = 4  # frames that each block of a policy sees
LONGEST = 500  # steps of a game when policies are tested


class Cloning(NamedTuple):
    """All of one seed's run of `bc`."""

    params: dict  # what the loaded run learned, which stays as it is
    policies: dict  # two, stacked: of latent actions, and the oracle, of true ones
    opt_state: Any
    world: Any
    key: jax.Array


def init_policy(key, config, shape: tuple[int, int], num: int) -> dict:
    """An ST transformer over frames, with a token where one of `num` actions is read."""
    key_st, key_token, key_action = jax.random.split(key, 3)
    width, pixels = config.tokenizer_width, 3 * config.patch**2
    params = init_st(key_st, pixels, num, grid_of(shape, config.patch), width, config.bc_blocks, config)
    token = 0.1 * jax.random.normal(key_token, (width,), jnp.float32)
    action = 0.1 * jax.random.normal(key_action, (num, width), jnp.float32)
    return params | {"token": token, "action": action}


def policy(params, frames, before, config, cache: Cache | None = None):
    """pi(a_t | x_{t-3:t}, a_{<t}): frames (B, T, H, W, 3), the action before each (B, T), -1: none -> logits (B, T, n), cache."""
    before = jax.nn.one_hot(before, len(params["action"]), dtype=jnp.float32) @ params["action"]
    h = dense(params["in"], patchify(frames, config.patch)) + positions(params) + before[:, :, None]
    token = jnp.broadcast_to(params["token"], (*h.shape[:2], 1, h.shape[-1]))
    h, cache = st_blocks(params, jnp.concatenate([h, token], axis=2), Spec(config.heads, CONTEXT), cache)
    return dense(params["out"], rms_norm(params["norm"], h[:, :, -1])), cache


def cloning_loss(params, frames, actions, config) -> jax.Array:
    """Cross-entropy of actions (B, T - 1), -1 where there is none."""
    before = jnp.pad(actions[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    log_p = jax.nn.log_softmax(policy(params, frames[:, :-1], before, config)[0])
    picked = jax.nn.one_hot(actions, log_p.shape[-1], dtype=jnp.float32)
    return -(log_p * picked).sum() / jnp.maximum(picked.sum(), 1)


def play_levels(key, game: Game, act, memory) -> jax.Array:
    """One game on each level; act(key, frames, memory) -> actions, memory. -> (num_levels,) bool: which are won."""

    def step(carry):
        t, states, outcome, memory = carry
        actions, memory = act(jax.random.fold_in(key, t), jax.vmap(game.render)(states), memory)
        after, now = jax.vmap(game.step)(states, actions)
        over = outcome > 0
        return t + 1, jax.vmap(select)(over, states, after), jnp.where(over, outcome, now), memory

    start = (0, jax.vmap(game.start)(jnp.arange(game.num_levels)), jnp.zeros(game.num_levels, jnp.int32), memory)
    return jax.lax.while_loop(lambda carry: (carry[0] < LONGEST) & (carry[2] == 0).any(), step, start)[2] == 1


def play_policy(key, game: Game, params, meaning, config) -> jax.Array:
    """A policy's games. `meaning` (n, keys): how often each of its actions was seen with each of the game's, which is drawn so."""
    tokens = len(positions(params)) + 1
    none = jnp.full((game.num_levels, 1), -1, jnp.int32)
    memory = (init_cache(params, Spec(config.heads, CONTEXT), game.num_levels, tokens), none)

    def act(key, frames, memory):
        cache, before = memory
        key_latent, key_real = jax.random.split(key)
        logits, cache = policy(params, frames[:, None], before, config, cache)
        latent = jax.random.categorical(key_latent, logits).astype(jnp.int32)  # (levels, 1)
        return jax.random.categorical(key_real, jnp.log(meaning + 1e-6)[latent[:, 0]]), (cache, latent)

    return play_levels(key, game, act, memory)


def make_cloning(config, source: Source, tx, init_model: Callable, infer: Callable) -> Train:
    """Both policies' training as pure functions of one seed.

    init_model(key) -> the frozen model's parameters; infer(params, frames) -> its latent actions (B, T - 1).
    """
    expert, num_keys = make_source("expert", config.num_frames, config.size, config.num_levels, 0.0), source.game.num_actions
    num = max(num_keys, config.num_actions)
    require(config.bc_batch <= expert.most, f"--bc-batch {config.bc_batch}: at most {expert.most} experts play at once")
    steps = expert.most * (config.num_frames - 1)
    require(config.labels <= steps, f"--labels {config.labels}: must be at most {steps}, what {expert.most} experts do in a clip")

    def init(key):
        key, key_params, key_policies, key_world = jax.random.split(key, 4)
        policies = jax.vmap(lambda key: init_policy(key, config, source.shape, num))(jax.random.split(key_policies))
        return Cloning(init_model(key_params), policies, tx.init(policies), expert.init(key_world), key)

    def labelled(params, clips) -> jax.Array:
        """Latent and true actions (2, B, T - 1), -1 where the game is over."""
        latent = jnp.where(clips.action < 0, -1, infer(params, clips.frames))
        return jnp.stack([latent, clips.action])

    def loss(policies, frames, actions):
        losses = jax.vmap(lambda params, actions: cloning_loss(params, frames, actions, config))(policies, actions)
        return losses.sum(), losses

    def update(state: Cloning, t):
        key, key_draw = jax.random.split(state.key)
        clips, world = expert.draw(key_draw, state.world, config.bc_batch)
        grads, losses = jax.grad(loss, has_aux=True)(state.policies, clips.frames, labelled(state.params, clips))
        updates, opt_state = tx.update(grads, state.opt_state, state.policies)
        state = state._replace(policies=optax.apply_updates(state.policies, updates), opt_state=opt_state, world=world, key=key)
        return state, {"latent_loss": losses[0], "oracle_loss": losses[1]}

    def dictionary(state: Cloning) -> jax.Array:
        """D of appendix E, as counts (n, keys), from `labels` of the expert's steps."""
        clips, _ = expert.draw(jax.random.key(4), state.world, -(-config.labels // (config.num_frames - 1)))
        latent, real = (actions.reshape(-1)[: config.labels] for actions in labelled(state.params, clips))
        return jax.nn.one_hot(latent, num, dtype=jnp.float32).T @ jax.nn.one_hot(real, num_keys, dtype=jnp.float32)

    def evaluate(state: Cloning) -> dict:
        key_policies, key_random, key_constant = jax.random.split(jax.random.key(5), 3)
        meaning = dictionary(state)
        play = lambda params, meaning: play_policy(key_policies, source.game, params, meaning, config)
        latent, oracle = jax.vmap(play)(state.policies, jnp.stack([meaning, jnp.eye(num, num_keys, dtype=jnp.float32)]))
        draw = lambda key, frames, memory: (jax.random.randint(key, (len(frames),), 0, num_keys, jnp.int32), memory)
        right_up = lambda key, frames, memory: (jnp.full(len(frames), 8, jnp.int32), memory)
        won = {"latent": latent, "oracle": oracle, "random": play_levels(key_random, source.game, draw, ())}
        won["right_up"] = play_levels(key_constant, source.game, right_up, ())
        results = {f"won_{name}": x.mean() for name, x in won.items()}
        for grade in (1, 2, 3):  # how hard a level is
            here = source.game.grades == grade
            results |= {f"won_{name}_{grade}": (x * here).sum().astype(jnp.float32) / here.sum() for name, x in won.items()}
        return results | {"dictionary": meaning}

    return Train(init, update, evaluate, config.num_updates)
