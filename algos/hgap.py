"""H-GAP: one generative model of a humanoid's motion, steered by planning to tasks that it was never trained on (2312.02682).

A VQ-VAE turns 16 steps of states and actions, given the first state, into a few integers, several for each 4 steps. A transformer
(the prior) learns which integers follow a state. To act, many sequences are drawn from it and decoded, their states are scored by
any function of states, and the first action of the best is done (section 4, algorithm 1). No reward is seen in training.

Run:     python algos/hgap.py                   (both models, then every task)
         python algos/hgap.py plan --load runs/hgap/1 --task forward             (returns, and a film)
         python algos/hgap.py plan --load runs/hgap/1 --task my_task.py:wave     (a function of named observations: see README)
         python algos/hgap.py plan --load runs/hgap/1 --planner mppi             (MPPI with the true dynamics instead)
         `vqvae` and `prior --load RUN` train one part; `bc` and `offline` train what H-GAP is compared with
         --data FOLDER_OR_FILE learns from MoCapAct's rollouts (.hdf5) or an .npz of obs, action, length

Paper:   --preset paper: the official code's sizes (17 M + 13 M parameters), on the planar body; --body cmu: the paper's

Expect:  each task's return above that of the average demonstration; videos/tasks.gif shows one model at all of them

Differs from the paper (its own way in brackets; what is marked with * is only so in the `cpu` preset):
 1. The body is planar with 12 joints, its data are noisy rollouts of envs/humanoid_skills.py (56 joints, MoCapAct).
 2. Plans are scored on states as they are (the official code: on standardised ones, in which a speed is none).
 3. The codebook begins at outputs of the encoder, and codes hardly used begin anew there (no such thing); its moving average
    moves once an update (twice in the official code).
 4. The convolutions' norm is over the channels of one step, so that the encoder is causal (over the whole window).
 5. All windows are whole, so no mask is modelled (a mask channel).
 6. The nucleus keeps the token that crosses top_p (drops it).
 7. Falls count at every moment of a control step (at its end); float32 (fp16).
 8.* Sizes below; rates 1e-3 (2e-4, 3e-4), decay .01 (.1), no dropout (.1); a plan every 2nd step, of 100 (every one, of 400).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tyro.conf import Positional

from common.causal import attention_block, attention_step, conv_block, init_attention_block, init_conv_block, init_norm, layer_norm
from common.nn import dense, draw_from_nucleus, init_dense, matmul
from common.runs import RunConfig, Train, cli, if_needed, require, require_multiple, require_range, run, shard_batch
from common.runs.earlier import Earlier, check_seeds, check_shapes, find_run, newest_run, read_state, state_like
from common.runs.loop import begin as start_run
from common.runs.loop import faults_in_one_line
from envs.humanoid_control import (
    Tasks,
    begin_worlds,
    check_task,
    film,
    follow_plan,
    make_tasks,
    may_fall,
    play,
    rewards,
    true_dynamics,
    write_report,
)
from envs.humanoid_data import Data, draw_windows, load_data, make_env
from envs.humanoid_offline import make_bc, make_offline


@dataclass(frozen=True)
class Config(RunConfig):
    """H-GAP's settings; the defaults are those of the official code."""

    paths = ("load", "data")
    stage: Positional[Literal["all", "vqvae", "prior", "plan", "bc", "offline"]] = "all"
    """What to train: all, or one part; `plan`: what to do with a trained run; `bc` and `offline`: behaviour cloning, and offline
    reinforcement learning of each task."""
    load: str | None = None
    """A run's folder, whose parameters to begin with. Default for all that need one: the newest run."""
    body: Literal["planar", "cmu"] = "planar"
    """The humanoid: 12 joints in a plane, or dm_control's 56 (needs the physics extra, --data, and an accelerator's speed)."""
    data: str = "skills"
    """What is learned from: `skills`, drawn from envs/humanoid_skills.py; an .npz; MoCapAct's .hdf5, a file or a folder of them."""
    episodes: int = 512
    """Demonstrators of `skills`, 400 steps each."""

    num_updates: int = 600_000
    """Learning steps per seed; in `all` the first vqvae_updates of them train the VQ-VAE."""
    vqvae_updates: int = 300_000
    """Learning steps of the VQ-VAE in `all`."""
    batch_size: int = 128
    """Windows of an update."""
    window: int = 16
    """Steps of a window (T)."""
    pool: int = 4
    """Steps of a latent step (L)."""
    codes_per_step: int = 8
    """Codes of each latent step (c)."""
    num_codes: int = 512
    """Codes there are (K), in one codebook."""
    latent: int = 1024
    """Width of a latent step (D), cut into codes_per_step slices."""
    width: int = 512
    """Width of the VQ-VAE."""
    layers: int = 4
    """Layers of its encoder, and of its decoder: all but one are causal convolutions, one is attention."""
    prior_width: int = 512
    """Width of the prior."""
    prior_layers: int = 4
    """Its layers."""
    heads: int = 4
    """Attention heads, everywhere."""
    dropout: float = 0.1
    """Share of residual branches' outputs and of attention that is dropped in training."""
    action_weight: float = 5.0
    """Weight of actions in the reconstruction's error, beside 1 of states."""
    commitment: float = 1.0
    """Weight of the commitment loss."""
    codebook_decay: float = 0.99
    """Of the moving averages of the codebook."""
    least_use: float = 0.02
    """A code whose average count in an update falls below this times its even share begins anew; 0: never."""
    lr: float = 2e-4
    """Learning rate of the VQ-VAE, constant."""
    prior_lr: float = 3e-4
    """Highest learning rate of the prior: up to it in a fifth of its updates, then along a cosine to a tenth."""
    weight_decay: float = 0.1
    """AdamW's, of matrices."""

    mlp_hidden: int = 256
    """Units of the two hidden layers of `bc`'s and `offline`'s networks."""
    bc_batch: int = 1024
    """Steps of an update of `bc`."""
    bc_lr: float = 1e-3
    """Its learning rate."""
    offline_batch: int = 256
    """Steps of an update of `offline`, of each task."""
    offline_lr: float = 3e-4
    """Its learning rate."""
    offline_alpha: float = 2.5
    """Weight of values beside imitation in `offline` (TD3+BC, 2106.06860)."""

    samples: int = 64
    """Plans that are drawn each time (N)."""
    horizon: int = 16
    """Steps of a plan that are scored."""
    temperature: float = 2.0
    """Temperature at which codes are drawn."""
    top_p: float = 0.99
    """Codes are drawn from the likeliest whose probabilities together reach this."""
    plan_every: int = 1
    """Steps that are done of a plan before the next."""
    task: str = "all"
    """What `plan` does: a task's name, `all`, or FILE.py:FUNCTION of named observations (..., n) that gives (...)."""
    planner: Literal["hgap", "mppi", "predictive_sampling", "imitate"] = "hgap"
    """How `plan` acts: by H-GAP; by the true dynamics; or by the likeliest codes, whatever the task."""
    sigma: float = 0.3
    """Standard deviation of the noise on plans with the true dynamics."""
    falling: bool = False
    """Whether, in a task of your own, all of the body may touch the ground; else a fall ends an episode."""
    eval_episodes: int = 16
    """Episodes of each task in an evaluation."""
    eval_steps: int = 400
    """Steps of each of them."""

    def __post_init__(self):
        super().__post_init__()
        for name in (field.name for field in fields(Config) if field.type is int and field.name != "seed"):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        require_range(self, 0, 1, "dropout", "codebook_decay", "least_use", "top_p", "lr", "prior_lr", "bc_lr", "offline_lr")
        require_range(self, 0, 100, "action_weight", "commitment", "weight_decay", "temperature", "sigma", "offline_alpha")
        require(self.window % self.pool == 0, f"--pool {self.pool}: must divide --window {self.window}")
        fits = self.latent % self.codes_per_step == 0
        require(fits, f"--codes-per-step {self.codes_per_step}: must divide --latent {self.latent}")
        require(self.horizon <= self.window, f"--horizon {self.horizon}: must be at most --window {self.window}")
        fits = self.plan_every <= self.horizon
        require(fits, f"--plan-every {self.plan_every}: must be at most --horizon {self.horizon}")
        require_multiple(self, "eval_steps", "plan_every")
        for name in ("width", "prior_width"):
            fits = getattr(self, name) % self.heads == 0
            require(fits, f"--{name.replace('_', '-')} {getattr(self, name)}: must be a multiple of --heads {self.heads}")
        if self.stage == "all":
            fits = self.vqvae_updates < self.num_updates
            require(fits, f"--vqvae-updates {self.vqvae_updates}: must be below --num-updates {self.num_updates}")

    @property
    def split_size(self) -> int:
        return {"bc": self.bc_batch, "offline": self.offline_batch}.get(self.stage, self.batch_size)

    @property
    def tokens(self) -> int:
        return self.window // self.pool * self.codes_per_step


PAPER = Config(log_every=50, eval_every=50_000, save_every=5000, episodes=4096, preset="paper")
CPU = replace(
    PAPER, preset="cpu", num_updates=2400, vqvae_updates=1200, eval_every=2400, save_every=400, episodes=512, codes_per_step=4,
    num_codes=256, latent=128, width=128, layers=3, prior_width=128, prior_layers=3, dropout=0.0, lr=1e-3, prior_lr=1e-3,
    weight_decay=0.01, offline_alpha=1.0, plan_every=2, eval_episodes=6, eval_steps=100,
)  # fmt: skip


class Codebook(NamedTuple):
    """Moving averages, whose quotient is the codebook (appendix of 1711.00937)."""

    count: jax.Array  # (K,)
    total: jax.Array  # (K, D / c)


class State(NamedTuple):
    """All of one seed's run."""

    params: dict  # vqvae, prior
    codebook: Codebook
    opt_state: dict
    key: jax.Array


# --- VQ-VAE (section 3.1)


def init_vqvae(key, config: Config, sizes: tuple[int, int]) -> dict:
    """Encoder and decoder; sizes: of an observation, of an action."""
    (obs, action), width, keys = sizes, config.width, jax.random.split(key, 8)
    convs = lambda key: [init_conv_block(k, width) for k in jax.random.split(key, config.layers - 1)]
    place = lambda key: 0.02 * jax.random.normal(key, (config.window, width), jnp.float32)
    encoder = {"in": init_dense(keys[0], obs + action, width, 1.0), "place": place(keys[1]), "convs": convs(keys[2])}
    encoder |= {"attention": init_attention_block(keys[3], width), "out": init_dense(keys[4], width, config.latent, 1.0)}
    decoder = {"in": init_dense(keys[5], obs + config.latent, width, 1.0), "place": place(keys[1]), "norm": init_norm(width)}
    decoder |= {"attention": init_attention_block(keys[6], width), "convs": convs(keys[2])}
    return {"encoder": encoder, "decoder": decoder | {"out": init_dense(keys[7], width, obs + action, 0.1)}}


def encode(params, x, config: Config, key=None) -> jax.Array:
    """Standardised windows (B, T, obs + action) -> slices of latent steps (B, T / L, c, D / c)."""
    p = params["encoder"]
    h = dense(p["in"], x) + p["place"]
    for block in p["convs"]:
        h = conv_block(block, h)
    h = dense(p["out"], attention_block(p["attention"], h, config.heads, key, config.dropout))
    z = h.reshape(len(x), -1, config.pool, config.latent).max(2)
    return z.reshape(*z.shape[:2], config.codes_per_step, -1)


def decode(params, z, first, config: Config, key=None) -> jax.Array:
    """Latent steps (B, T / L, c, D / c), first states (B, obs) -> windows (B, T, obs + action); states are offsets."""
    p, length = params["decoder"], z.shape[1] * config.pool
    z = z.reshape(*z.shape[:2], config.latent)
    w_first, w_code = jnp.split(p["in"]["w"], [first.shape[-1]])
    h = (matmul(z, w_code) + (first @ w_first + p["in"]["b"])[:, None]).repeat(config.pool, axis=1) + p["place"][:length]
    h = attention_block(p["attention"], h, config.heads, key, config.dropout)
    for block in p["convs"]:
        h = conv_block(block, h)
    out = dense(p["out"], layer_norm(p["norm"], h))
    offset = jnp.pad(first, ((0, 0), (0, out.shape[-1] - first.shape[-1])))[:, None]
    state = (jnp.arange(length) > 0)[:, None] | (jnp.arange(out.shape[-1]) >= first.shape[-1])  # the first state is as it was given
    return offset + jnp.where(state, out, 0)


def vectors(codebook: Codebook) -> jax.Array:
    """The codes (K, D / c)."""
    return codebook.total / jnp.maximum(codebook.count, 1e-6)[:, None]


def nearest(codes, z) -> jax.Array:
    """The nearest code of z (..., D / c) -> (...) int32."""
    return (2 * matmul(z, codes.T) - (codes**2).sum(-1)).argmax(-1).astype(jnp.int32)


def vqvae_loss(params, key, codes, x, num_obs: int, config: Config):
    """Weighted squared error of windows x (B, T, obs + action), and commitment -> loss, (metrics, z, index)."""
    keys = jax.random.split(key)
    z = encode(params, x, config, keys[0])
    index = nearest(codes, z)
    q, sg = codes[index], jax.lax.stop_gradient
    out = decode(params, z + sg(q - z), x[:, 0, :num_obs], config, keys[1])
    error = ((out - x) ** 2).mean((0, 1))
    weight = jnp.where(jnp.arange(len(error)) < num_obs, 1.0, config.action_weight)
    commit = ((z - sg(q)) ** 2).mean()
    metrics = {"state_mse": error[:num_obs].mean(), "action_mse": error[num_obs:].mean(), "commit": commit}
    return (weight * error).mean() + config.commitment * commit, (metrics, z, index)


def follow(key, codebook: Codebook, z, index, config: Config, t) -> Codebook:
    """The moving averages after outputs z (..., D / c) chose codes; in the first update, and where hardly used, codes begin at
    outputs drawn at random."""
    z, index, num = z.reshape(-1, z.shape[-1]), index.reshape(-1), config.num_codes
    chosen, decay, even = jax.nn.one_hot(index, num, dtype=jnp.float32), config.codebook_decay, len(z) / num
    count = decay * codebook.count + (1 - decay) * chosen.sum(0)
    total = decay * codebook.total + (1 - decay) * chosen.T @ z
    dead = (count < config.least_use * even) | (t == 0)
    drawn = z[jax.random.randint(key, (num,), 0, len(z), jnp.int32)]
    count = jnp.where(dead, (0.1 + config.least_use) * even, count)
    return Codebook(count, jnp.where(dead[:, None], drawn * count[:, None], total))


# --- prior (section 3.2)


class Cache(NamedTuple):
    """Keys and values of the codes before, for each layer (B, heads, S, c): S codes of a window."""

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]


def init_prior(key, config: Config, num_obs: int) -> dict:
    """A causal transformer over codes, given a state."""
    width, keys = config.prior_width, jax.random.split(key, 5)
    one = lambda key: init_attention_block(key, width)
    return {
        "code": 0.02 * jax.random.normal(keys[0], (config.num_codes, width), jnp.float32),
        "place": 0.02 * jax.random.normal(keys[1], (config.tokens, width), jnp.float32),
        "state": init_dense(keys[2], num_obs, width, 1.0),
        "blocks": jax.vmap(one)(jax.random.split(keys[3], config.prior_layers)),
        "norm": init_norm(width),
        "out": 0.02 * jax.random.normal(keys[4], (width, config.num_codes), jnp.float32),
    }


def prior(params, index, first, config: Config, key=None) -> jax.Array:
    """Codes of windows (B, S), first states (B, obs) -> logits (B, S, K) of each code, from those before it."""
    before = jnp.pad(params["code"][index[:, :-1]], ((0, 0), (1, 0), (0, 0)))
    h = before + params["place"] + dense(params["state"], first)[:, None]
    keys = jnp.zeros(config.prior_layers, jnp.int32) if key is None else jax.random.split(key, config.prior_layers)
    step = lambda h, p: (attention_block(p[0], h, config.heads, None if key is None else p[1], config.dropout), None)
    h, _ = jax.lax.scan(step, h, (params["blocks"], keys), unroll=config.prior_layers)
    return matmul(layer_norm(params["norm"], h), params["out"])


def init_cache(config: Config, batch: int) -> Cache:
    """Before the first code."""
    empty = jnp.zeros((batch, config.heads, config.tokens, config.prior_width // config.heads), jnp.float32)
    return Cache((empty,) * config.prior_layers, (empty,) * config.prior_layers)


def prior_step(params, before, state, cache: Cache, s, config: Config):
    """`prior` for code s alone: embeddings of the code before and of the first state (B, d) each -> logits (B, K), cache."""
    h, new = before + params["place"][s] + state, []
    for i, (k, v) in enumerate(zip(*cache, strict=True)):
        h, *kv = attention_step(jax.tree.map(lambda x, i=i: x[i], params["blocks"]), h, k, v, s, config.heads)
        new.append(kv)
    return matmul(layer_norm(params["norm"], h), params["out"]), Cache(*zip(*new, strict=True))


def sample_codes(key, params, first, num: int, config: Config, temperature: float) -> jax.Array:
    """`num` sequences of codes for each first state (M, obs): (M * num, S)."""
    state = dense(params["state"], first).repeat(num, 0)

    def step(carry, inputs):
        before, cache = carry
        key, s = inputs
        logits, cache = prior_step(params, before, state, cache, s, config)
        code = draw_from_nucleus(key, logits, temperature, config.top_p)
        return (params["code"][code], cache), code

    carry = jnp.zeros_like(state), init_cache(config, len(state))
    _, codes = jax.lax.scan(step, carry, (jax.random.split(key, config.tokens), jnp.arange(config.tokens)))
    return codes.T


# --- training


def make_train(config: Config) -> Train:
    """H-GAP, or what it is compared with, as pure functions of one seed."""
    data, parts = load_data(config), ("vqvae", "prior")
    if config.stage in ("bc", "offline"):
        return (make_bc if config.stage == "bc" else make_offline)(config, data, make_env(config.body))
    num_obs, size, txs = data.num_obs, len(data.mean), optimisers(config)

    def init(key):
        key, key_vqvae, key_prior = jax.random.split(key, 3)
        params = {"vqvae": init_vqvae(key_vqvae, config, (num_obs, size - num_obs))}
        params |= {"prior": init_prior(key_prior, config, num_obs)}
        shape = config.num_codes, config.latent // config.codes_per_step
        book = Codebook(jnp.ones(shape[0], jnp.float32), jnp.zeros(shape, jnp.float32))
        return State(params, book, {name: txs[name].init(params[name]) for name in parts}, key)

    def descend(name, state: State, grads, key, **more):
        updates, opt_state = txs[name].update(grads, state.opt_state[name], state.params[name])
        params = state.params | {name: optax.apply_updates(state.params[name], updates)}
        return state._replace(params=params, opt_state=state.opt_state | {name: opt_state}, key=key, **more)

    def learn_vqvae(state: State, t):
        key, key_draw, key_loss, key_codes = jax.random.split(state.key, 4)
        x = shard_batch(draw_windows(key_draw, data.steps, data.starts, config.batch_size, config.window))
        loss = jax.grad(vqvae_loss, has_aux=True)
        grads, (metrics, z, index) = loss(state.params["vqvae"], key_loss, vectors(state.codebook), x, num_obs, config)
        book = follow(key_codes, state.codebook, z, index, config, t)
        return descend("vqvae", state, grads, key, codebook=book), metrics | {"prior_loss": jnp.float32(jnp.nan)}

    def learn_prior(state: State, t):
        key, key_draw, key_loss = jax.random.split(state.key, 3)
        x = shard_batch(draw_windows(key_draw, data.steps, data.starts, config.batch_size, config.window))
        index = codes_of(state, x, config)
        loss, grads = jax.value_and_grad(prior_loss)(state.params["prior"], key_loss, index, x[:, 0, :num_obs], config)
        nothing = dict.fromkeys(("state_mse", "action_mse", "commit"), jnp.float32(jnp.nan))
        return descend("prior", state, grads, key), nothing | {"prior_loss": loss}

    def update(state: State, t):
        if config.stage == "all":
            return jax.lax.cond(t < config.vqvae_updates, learn_vqvae, learn_prior, state, t)
        return (learn_vqvae if config.stage == "vqvae" else learn_prior)(state, t)

    return Train(init, update, partial(evaluate, config, data), config.num_updates)


def optimisers(config: Config) -> dict:
    """AdamW with clipped gradients: the VQ-VAE's at a constant rate, the prior's up and then down a cosine."""
    updates = max(config.num_updates - (config.vqvae_updates if config.stage == "all" else 0), 2)
    cosine = optax.warmup_cosine_decay_schedule(0.0, config.prior_lr, updates // 5, updates, config.prior_lr / 10)
    decayed = partial(jax.tree.map, lambda x: x.ndim > 1)
    adamw = lambda lr: optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(lr, b1=0.9, b2=0.95, weight_decay=config.weight_decay, mask=decayed)
    )
    return {"vqvae": adamw(config.lr), "prior": adamw(cosine)}


def codes_of(state: State, x, config: Config) -> jax.Array:
    """Windows (B, T, obs + action) -> codes (B, S) int32, latent step by latent step."""
    return nearest(vectors(state.codebook), encode(state.params["vqvae"], x, config)).reshape(len(x), -1)


def prior_loss(params, key, index, first, config: Config) -> jax.Array:
    """Cross-entropy (nats) of codes (B, S)."""
    log_p = jax.nn.log_softmax(prior(params, index, first, config, key))
    return -jnp.take_along_axis(log_p, index[..., None], axis=-1).mean()


# --- planning (section 3.3, algorithm 1)

CHUNK = 128  # plans that are made at a time on a CPU, whose caches they then fit


def imagine(key, config: Config, data: Data, state: State, obs, samples: int, temperature: float) -> jax.Array:
    """`samples` plans from each observation (M, O), decoded, in their own units: (M, samples, T, obs + action)."""

    def some(key, first):
        codes = sample_codes(key, state.params["prior"], first, samples, config, temperature)
        z = vectors(state.codebook)[codes].reshape(len(codes), -1, config.codes_per_step, config.latent // config.codes_per_step)
        return decode(state.params["vqvae"], z, first.repeat(samples, 0), config)

    first = (obs - data.mean[: data.num_obs]) / data.std[: data.num_obs]
    worlds = max(CHUNK // samples, 1)
    if jax.default_backend() == "cpu" and len(obs) > worlds and len(obs) % worlds == 0:
        chunks = first.reshape(-1, worlds, data.num_obs)
        plans = jax.lax.map(lambda x: some(*x), (jax.random.split(key, len(chunks)), chunks))
    else:
        plans = some(key, first)
    return plans.reshape(len(obs), samples, config.window, -1) * data.std + data.mean


def make_planner(config: Config, env, data: Data, state: State, tasks: Tasks, samples: int, temperature: float) -> Callable:
    """H-GAP's: key, memory, world, obs (M, O) -> actions (M, T, A) of the best of `samples` plans, memory."""

    def planner(key, memory, world, obs):
        plans = imagine(key, config, data, state, obs, samples, temperature)
        scores = rewards(env, tasks, plans[:, :, : config.horizon, : data.num_obs]).sum(-1)
        return plans[jnp.arange(len(obs)), scores.argmax(1)][..., data.num_obs :], memory

    return planner


# --- evaluation


def evaluate(config: Config, data: Data, state: State) -> dict:
    """Reconstruction and prediction on windows that were held out; then, once there is a prior, every task and a film."""
    results = reconstruction(config, data, state)
    if config.stage == "vqvae":
        return results
    has_learned = state.opt_state["prior"][1][0].count > 0
    learned = State(state.params, state.codebook, {}, ())
    return results | if_needed(has_learned, partial(control_results, config, data), learned)


def reconstruction(config: Config, data: Data, state: State, num: int = 512) -> dict:
    """Mean squared errors in variances, codes in use, cross-entropy of the prior and of the codes' frequencies (nats)."""
    x = draw_windows(jax.random.key(1), data.held_steps, data.held_starts, num, config.window)
    num_obs, codes = data.num_obs, vectors(state.codebook)
    index = nearest(codes, encode(state.params["vqvae"], x, config))
    out = decode(state.params["vqvae"], codes[index], x[:, 0, :num_obs], config)
    error, still = (out - x) ** 2, (x[:, :1] - x) ** 2
    share = jax.nn.one_hot(index.reshape(-1), config.num_codes, dtype=jnp.float32).mean(0)
    entropy = -(share * jnp.log(share + 1e-9)).sum()
    return {
        "heldout_state_mse": error[:, 1:, :num_obs].mean(),
        "still_state_mse": still[:, 1:, :num_obs].mean(),
        "heldout_action_mse": error[..., num_obs:].mean(),
        "perplexity": jnp.exp(entropy),
        "unigram_loss": entropy,
        "heldout_prior_loss": prior_loss(state.params["prior"], None, index.reshape(num, -1), x[:, 0, :num_obs], config),
    }


def control_results(config: Config, data: Data, state: State) -> dict:
    """Returns of every task: planned, and by one sample; imitation; how far decoded states are from what their actions bring."""
    env = make_env(config.body)
    tasks, keys = make_tasks(config, env), jax.random.split(jax.random.key(2), 5)
    world = begin_worlds(keys[0], env, data.worlds, len(tasks.which))
    arms = {"": (config.samples, config.temperature), "unplanned_": (1, config.temperature), "imitation_": (1, 0.0)}
    planners = [make_planner(config, env, data, state, tasks, *arm) for arm in arms.values()]

    def all_arms(key, memory, world, obs):
        parts = zip(planners, jnp.split(obs, len(arms)), jax.random.split(key, len(arms)), strict=True)
        return jnp.concatenate([planner(key, (), None, obs)[0] for planner, obs, key in parts]), memory

    three = jax.tree.map(lambda x: jnp.concatenate([x] * len(arms), axis=-1), world)
    everyone = tasks._replace(which=np.tile(tasks.which, len(arms)))
    outcome = play(keys[1], env, everyone, all_arms, (), three, config.eval_steps, config.plan_every)
    results = film(env, tasks, outcome.worlds, config.eval_episodes)
    results["returns"] = outcome.total.reshape(len(arms), len(tasks.names), -1)
    for name, total, length in zip(arms, jnp.split(outcome.total, len(arms)), jnp.split(outcome.length, len(arms)), strict=True):
        each = total.reshape(len(tasks.names), -1).mean(1)
        results |= {f"{name}return_{task}": x for task, x in zip(tasks.names, each, strict=True)}
        results[f"{name}length"] = length[~may_fall(tasks)].mean(dtype=jnp.float32)
    return results | open_loop(keys[2], config, env, data, state, world)


def open_loop(key, config: Config, env, data: Data, state: State, world) -> dict:
    """The decoder as dynamics: the actions of one sampled plan of each world done one after the other; squared distance, in
    variances, of the states that follow to those decoded, and to those when nothing would move."""
    mean, std, num_obs = data.mean[: data.num_obs], data.std[: data.num_obs], data.num_obs
    first = env.get_obs(world).T
    plan = imagine(key, config, data, state, first, 1, 1.0)[:, 0]
    actions, plan, first = plan[..., num_obs:].swapaxes(0, 1), (plan[..., :num_obs] - mean) / std, (first - mean) / std
    after, alive = follow_plan(env, world, actions[:-1])
    after, alive = (after.swapaxes(0, 1) - mean) / std, alive.T[..., None]
    error = lambda guess: (((guess - after) ** 2) * alive).sum() / (jnp.maximum(alive.sum(), 1) * num_obs)
    return {"open_loop_mse": error(plan[:, 1:]), "open_loop_still_mse": error(first[:, None])}


# --- command


def find(folder: Path) -> Earlier:
    """A run, whose settings' `stage` is the part that it has come to. Raises UsageError if there is none."""
    found = find_run(folder, Config, "H-GAP")
    in_first_part = found.config.stage == "all" and found.update <= found.config.vqvae_updates
    return found._replace(config=replace(found.config, stage="vqvae")) if in_first_part else found


def starting_state(config: Config, folder: Path) -> dict:
    """What another run has learned, for run(given=...). Raises UsageError where it does not fit this run's sizes."""
    found = find(folder)
    check_seeds(found, config)
    theirs, like = read_state(found, make_train), state_like(config, make_train)
    check_shapes(found, {"params": theirs.params, "codebook": theirs.codebook}, like._asdict())
    return {"params": theirs.params, "codebook": theirs.codebook}


PLANNING = ("samples", "horizon", "temperature", "top_p", "plan_every", "task", "falling", "eval_episodes", "eval_steps", "seed")


def plan(config: Config, found: Earlier | None) -> None:
    """Plays tasks with each seed of a run, or with the true dynamics; prints the returns, writes plan.json and a film."""
    trained = replace(found.config, **{name: getattr(config, name) for name in PLANNING}) if found else config
    data, env = load_data(trained), make_env(trained.body)
    tasks, state = make_tasks(trained, env, data), read_state(found, make_train) if found else None

    @jax.jit
    def go(seed, state):
        keys = jax.random.split(jax.random.key(seed))
        world = begin_worlds(keys[0], env, data.worlds, len(tasks.which))
        if config.planner in ("hgap", "imitate"):
            arm = (trained.samples, trained.temperature) if config.planner == "hgap" else (1, 0.0)
            planner, memory = make_planner(trained, env, data, state, tasks, *arm), ()
        else:
            sizes = trained.samples, trained.horizon, trained.plan_every, config.sigma
            planner, first = true_dynamics(env, tasks, *sizes, config.planner == "predictive_sampling")
            memory = first(world)
        outcome = play(keys[1], env, tasks, planner, memory, world, trained.eval_steps, trained.plan_every)
        return outcome.total, outcome.length, film(env, tasks, outcome.worlds, trained.eval_episodes)

    lane = lambda i: jax.tree.map(lambda x: jnp.asarray(x[i]), state)
    found_out = [jax.tree.map(np.asarray, go(trained.seed + i, lane(i))) for i in range(trained.num_seeds)]
    folder = Path(config.out) if config.out else found.folder if found else Path("runs/hgap/plan")
    about = {"planner": config.planner, "config": {name: getattr(trained, name) for name in PLANNING}}
    write_report(folder, about, tasks, found_out, {name: x * trained.eval_steps for name, x in data.task_means.items()})


def main(config: Config) -> None:
    """Trains a stage, or plans."""
    with faults_in_one_line():
        check_task(config.task, make_env(config.body))
        require(not config.load or config.stage not in ("bc", "offline"), f"--load: {config.stage} begins anew")
        found = None
        alone = config.stage == "plan" and config.planner in ("mppi", "predictive_sampling")
        if config.load or (config.stage in ("prior", "plan") and not alone):
            found = find(Path(config.load) if config.load else newest_run())
            fits = ("all", "prior") if config.stage == "plan" else ("all", "vqvae", "prior")
            require(found.config.stage in fits, f"--load {found.folder}: only its {found.config.stage} was trained")
            config = replace(config, load=str(found.folder))  # so that a run that is resumed finds it again
        if config.stage == "plan":
            require(not config.dry_run, "--dry-run: plan trains nothing")
            with start_run(config):
                return plan(config, found)
    given = partial(starting_state, config, found.folder) if found else None
    shown = {"bc": ("action_mse", "imitation_length"), "offline": ("critic_loss", "return_forward")}
    run(config, make_train, highlights=shown.get(config.stage, ("state_mse", "prior_loss", "return_forward")), given=given)


if __name__ == "__main__":
    main(cli(Config, __doc__, {"cpu": CPU, "paper": PAPER}))
