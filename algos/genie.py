"""Genie: a playable world learned from video without actions (Bruce et al., 2402.15391).

A tokenizer (VQ-VAE) turns frames into integers. A latent action model (another VQ-VAE, on pixels) finds a handful of codes that say
what changed between frames. A masked transformer (MaskGIT) predicts the next frame's tokens from the past and a code. Then a person
who picks codes plays the world. What counts is whether frames obey the codes: Delta_4 PSNR, the PSNR lost when codes are random.

Run:     python algos/genie.py all        (the tokenizer, then the latent actions and the dynamics together)
         python algos/genie.py play --load runs/genie/1         (a page on this machine, to play what was learned)
         python algos/genie.py sample --load runs/genie/1       (each code held from held-out frames: a film)
         `tokenizer`, `lam` and `dynamics --load RUN` train a part, beginning with those of RUN
         --data FOLDER or videos.npz learns from your own

Paper:   --preset paper: the CoinRun case study's numbers (appendix F)

Expect:  frames that obey the codes (delta4_psnr above 0, in four seeds of four), in blocks: several codes for up and down, hardly
         one for left and right; videos/controls.gif shows what each does, a column each

Differs from the paper (its own way in brackets; the `cpu` preset also changes the numbers in CPU below):
 1. Codes are compared on the unit sphere, beta is 0.25 (not given), codebooks follow the encoder by a moving average (by the
    gradient of ||sg(e) - q||^2), and one hardly used begins anew at an encoder's output.
 2. Positions are rotary in time and space, and in space learned too, but in the latent actions' decoder: where that knows places, a
    code's meaning differs from place to place. Pre-norm; feed-forward layers of `ffn` times the width (none of it is given).
 3. An action token is added to every frame of the latent action model's encoder; e_t is read from the difference of its outputs at
    frames t + 1 and t (not given): read at t + 1 alone, at first it is the same vector for all changes.
 4. Frame t + 1's tokens are predicted in place, from its own unmasked tokens, all frames before, and the code of t -> t + 1 added
    to each of them (the text also allows a shift by a frame).
 5. With probability `clean_context` a clip's frames before a random one are unmasked, as they are when it is played (0).
 6. Frames within a clip are not masked at frame 1 (as the paper) and the loss is on masked tokens only (not given).
 7. t = 4 counts generated frames, after a prompt of `prompt_frames`; random codes are uniform; PSNR is averaged in dB over clips.
 8. The latent action model's error is divided by the variance of what it sees (not given), so that beta weighs the same on plain
    pictures. Its decoder's output is added to the frame before (the next frame, through a sigmoid). In training the codes of half
    of the clips (`lam_bypass`) go to the decoder as they were before quantisation (0).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tyro.conf import Positional

from common.nn import dense, orthogonal
from common.play import MAX_TEMPERATURE, Model, Session, open_server, serve
from common.runs import RunConfig, Train, cli, if_needed, nothing_like, require, require_range, run, shard_batch
from common.runs.earlier import Earlier, check_seeds, check_shapes, find_run, newest_run, read_state, state_like
from common.runs.loop import begin, faults_in_one_line
from common.runs.plot import save_gif
from common.runs.stop import StopSignal
from common.st import (
    Cache,
    Kind,
    Spec,
    grid_of,
    init_cache,
    init_st,
    patchify,
    positions,
    rms_norm,
    st,
    st_blocks,
    unpatchify,
)  # fmt: skip
from envs.clip_metrics import frechet, information, perplexity, psnr, random_features, to_uint8
from envs.clips import Source, make_source
from envs.cloning import make_cloning
from envs.true_game import describe_codes, read_codes, truth_of


@dataclass(frozen=True)
class Config(RunConfig):
    """Genie's settings; the defaults are the CoinRun case study's (tables 15 to 17)."""

    paths = ("load", "data")
    stage: Positional[Literal["all", "tokenizer", "lam", "dynamics", "sample", "play", "bc"]] = "all"
    """What to train: all, or one part (`dynamics` trains the latent actions with it); or what to do with a trained run: `sample`,
    a film of it; `play`, a page on which a person plays it; `bc`, behavioural cloning of an expert by its latent actions."""
    load: str | None = None
    """A run's folder, whose parameters to begin with. Default for all that need one: the newest run."""
    load_parts: tuple[Literal["tokenizer", "lam", "dynamics"], ...] = ("tokenizer", "lam", "dynamics")
    """Which of its parts a training run begins with; others begin anew, and may have other sizes."""
    port: int = 8000
    """Where `play` serves its page, on this machine only; 0: any port that is free."""
    data: str = "coinrun"
    """Where clips come from: coinrun, dots, an .npz of videos, uint8 (videos, frames, height, width, 3), or a folder of .gif or
    .mp4 files (`pip install 'nightjax[video]'` for all but .gif)."""
    size: int = 64
    """Height and width in pixels of the frames of dots, and of a folder's videos, which are cut to a square and scaled."""
    num_levels: int = 10_000
    """CoinRun's levels to learn from; those to test on come after them."""
    sticky: float = 0.0
    """Probability that CoinRun's random policy repeats its last action."""
    num_frames: int = 16
    """Frames of a clip, and how far back the model sees (T)."""

    num_updates: int = 500_000
    """Learning steps per seed; in `all` the first tokenizer_updates of them train the tokenizer."""
    tokenizer_updates: int = 300_000
    """Learning steps of the tokenizer in `all`."""
    tokenizer_batch: int = 48
    """Clips of each of the tokenizer's updates."""
    batch_size: int = 36
    """Clips of each update of the latent actions and the dynamics."""

    tokenizer: Kind = "st_vivit"
    """Attention of the tokenizer: in space, then in time (st_vivit); in space only (vit); over all tokens at once (c_vivit)."""
    patch: int = 4
    """Pixels a side of the tokenizer's patches."""
    num_codes: int = 1024
    """Tokens there are."""
    code_dim: int = 32
    """Length of codebook vectors, of tokens and of actions."""
    tokenizer_width: int = 512
    """Width of the tokenizer (d)."""
    encoder_blocks: int = 8
    """ST blocks of the tokenizer's encoder."""
    decoder_blocks: int = 8
    """ST blocks of the tokenizer's decoder."""
    lam_input: Literal["pixels", "tokens"] = "pixels"
    """What the latent action model sees and predicts."""
    num_actions: int = 6
    """Latent actions (|A|)."""
    lam_patch: int = 16
    """Pixels a side of the latent action model's patches."""
    lam_width: int = 512
    """Width of the latent action model."""
    lam_blocks: int = 8
    """ST blocks of its encoder, and of its decoder."""
    dynamics_width: int = 512
    """Width of the dynamics model."""
    dynamics_blocks: int = 12
    """ST blocks of the dynamics model."""
    action_input: Literal["add", "prepend"] = "add"
    """How an action enters the dynamics: added to the tokens of its frame, or as one more token."""
    heads: int = 8
    """Attention heads, everywhere."""
    ffn: int = 4
    """Hidden width of feed-forward layers, in widths."""
    qk_norm: bool = True
    """Normalise queries and keys of the dynamics model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the dynamics model computes in."""

    mask_low: float = 0.5
    """Lowest masking rate; a clip's is uniform between this and 1."""
    clean_context: float = 0.0
    """Probability that a clip's first frames, a random number of them, are not masked."""
    beta: float = 0.25
    """Weight of the commitment loss."""
    codebook_decay: float = 0.9
    """Codes move by 1 - codebook_decay of the way to the mean of what they stood for in an update."""
    lam_bypass: float = 0.5
    """Probability that the latent actions' decoder gets a clip's codes as they were before quantisation, in training."""
    least_use: float = 0.1
    """A code used less than this times its even share, over some 50 updates, begins anew; 0: never."""

    tokenizer_lr: float = 3e-4
    """Learning rate of the tokenizer, constant after tokenizer_warmup."""
    tokenizer_warmup: int = 10_000
    """Updates over which it rises from 0."""
    lr: float = 3e-5
    """Highest learning rate of the latent actions and the dynamics."""
    lr_min: float = 3e-6
    """Their last learning rate; a cosine leads there."""
    warmup: int = 5_000
    """Updates over which theirs rises from 0."""
    beta1: float = 0.9
    """AdamW's decay of the mean."""
    beta2: float = 0.9
    """AdamW's decay of the square."""
    weight_decay: float = 1e-4
    """AdamW's weight decay."""

    maskgit_steps: int = 25
    """Steps in which a frame's tokens are decided."""
    temperature: float = 1.0
    """Temperature at which tokens are drawn; 0: the likeliest."""
    prompt_frames: int = 1
    """Frames given before a rollout in evaluations."""
    eval_clips: int = 64
    """Held-out clips of an evaluation."""

    bc_updates: int = 100_000
    """Learning steps of `bc` per seed."""
    bc_batch: int = 16
    """The expert's clips of each of them."""
    bc_blocks: int = 12
    """ST blocks of its policies, which are as wide as the tokenizer."""
    labels: int = 200
    """The expert's steps whose true actions are known, from which `bc` learns what its latent actions mean."""

    def __post_init__(self):
        super().__post_init__()
        for name in (field.name for field in fields(Config) if field.type is int and field.name not in ("seed", "port")):
            require(getattr(self, name) >= 1, f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        require_range(
            self, 0, 1, "sticky", "mask_low", "clean_context", "beta1", "beta2", "codebook_decay", "lam_bypass", "least_use"
        )
        require_range(self, 0, 1000, "beta", "weight_decay")
        require_range(self, 0, MAX_TEMPERATURE, "temperature")
        require_range(self, 0, 65535, "port")
        for name in ("tokenizer_width", "lam_width", "dynamics_width"):
            width = getattr(self, name)
            require(width % (4 * self.heads) == 0, f"--{name.replace('_', '-')} {width}: must be a multiple of 4 * heads")
        require(self.load_parts, "--load-parts: name at least one part")
        require(self.data != "dots" or self.size % 8 == 0, f"--size {self.size}: must be a multiple of 8")
        longest = self.num_frames - 4
        require(self.prompt_frames <= longest, f"--prompt-frames {self.prompt_frames}: 4 more must fit: at most {longest}")
        if self.stage == "all":
            fits = self.tokenizer_updates < self.num_updates
            require(fits, f"--tokenizer-updates {self.tokenizer_updates}: must be below --num-updates {self.num_updates}")

    @property
    def split_size(self) -> int:
        return int(np.gcd(self.tokenizer_batch, self.batch_size))


PAPER = Config(log_every=50, eval_every=5000, save_every=1000, preset="paper")
CPU = replace(
    PAPER, preset="cpu", num_updates=3000, tokenizer_updates=1500, tokenizer_batch=4, batch_size=4, log_every=50, eval_every=1500,
    save_every=500, num_levels=500, sticky=0.8, num_frames=8, patch=8, num_codes=256, tokenizer_width=96, encoder_blocks=2,
    decoder_blocks=2, lam_width=96, lam_blocks=2, dynamics_width=128, dynamics_blocks=4, heads=4, tokenizer_lr=1e-3,
    tokenizer_warmup=100, lr=1e-3, lr_min=1e-4, warmup=100, beta2=0.95, clean_context=0.5, prompt_frames=4,
    bc_updates=600, bc_blocks=2,
)  # fmt: skip


class State(NamedTuple):
    """All of one seed's run. Every stage has the parts of all, so that any run can begin from any other."""

    params: dict  # tokenizer, lam, dynamics
    opt_state: dict  # tokenizer, world (lam and dynamics)
    shares: dict  # tokenizer (K,), lam (|A|,): how often each code is used, a running mean
    world: Any  # where the clips come from
    key: jax.Array


# --- patches and codes


def unit(x) -> jax.Array:
    """x / |x|."""
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-8)


def quantise(codebook, e):
    """The nearest code of e (..., code_dim): straight-through, its index, ||e - sg(q)||^2 (1711.00937)."""
    codebook = unit(codebook)
    index = (e @ codebook.T).argmax(-1).astype(jnp.int32)  # on the unit sphere the nearest is the one of largest product
    q, sg = codebook[index], jax.lax.stop_gradient
    return e + sg(q - e), index, ((e - sg(q)) ** 2).mean()


def follow(codebook, index, e, decay: float):
    """Codes that outputs e (M, code_dim) chose, index (M,), move towards their mean (1711.00937, appendix A.1), on the sphere."""
    chosen, old = jax.nn.one_hot(index, len(codebook), dtype=jnp.float32), unit(codebook)
    count = chosen.sum(0)[:, None]
    mean = chosen.T @ e / jnp.maximum(count, 1)
    return jnp.where(count > 0, unit(decay * old + (1 - decay) * mean), old)


def restart(key, codebook, share, index, e, least: float):
    """The code of the smallest share of use (K,), a mean over about 50 updates, begins anew where that is below least / K: at an
    output e (M, code_dim) of the encoder, the likelier the farther from all codes (as k-means++ begins) -> codebook, share."""
    num = len(codebook)
    share = 0.98 * share + 0.02 * jax.nn.one_hot(index, num, dtype=jnp.float32).mean(0)
    place = jax.random.categorical(key, jnp.log(jnp.maximum(1.0 - (e @ unit(codebook).T).max(-1), 1e-9)))
    dead = (jnp.arange(num) == share.argmin()) & (share < least / num)
    return jnp.where(dead[:, None], e[place], codebook), jnp.where(dead, 1 / num, share)


# --- tokenizer (section 2.1, appendix C.2)


def tokenizer_spec(config: Config) -> Spec:
    return Spec(config.heads, config.num_frames, config.tokenizer)


def init_tokenizer(key, config: Config, shape: tuple[int, int]) -> dict:
    """Encoder, decoder, codebook."""
    key_encoder, key_decoder, key_code = jax.random.split(key, 3)
    grid, pixels, width = grid_of(shape, config.patch), 3 * config.patch**2, config.tokenizer_width
    size = (width, config.encoder_blocks, config, config.tokenizer)
    return {
        "encoder": init_st(key_encoder, pixels, config.code_dim, grid, *size),
        "decoder": init_st(key_decoder, config.code_dim, pixels, grid, width, config.decoder_blocks, *size[2:]),
        "codebook": jax.random.normal(key_code, (config.num_codes, config.code_dim), jnp.float32),
    }


def encode(params, x, config: Config) -> jax.Array:
    """Patches (B, T, N, pixels) -> unit vectors (B, T, N, code_dim), each frame's from it and those before."""
    return unit(st(params["encoder"], x, tokenizer_spec(config))[0])


def tokenise(params, frames, config: Config) -> jax.Array:
    """Frames (B, T, H, W, 3) -> tokens (B, T, N) int32."""
    return quantise(params["codebook"], encode(params, patchify(frames, config.patch), config))[1]


def decode(params, tokens, config: Config, cache: Cache | None = None):
    """Tokens (B, T, N) -> patches (B, T, N, pixels) in [0, 1], cache."""
    x, cache = st(params["decoder"], unit(params["codebook"])[tokens], tokenizer_spec(config), cache=cache)
    return jax.nn.sigmoid(x), cache


def tokenizer_loss(params, frames, config: Config):
    """||x - x^||^2 + beta ||e - sg(q)||^2 -> loss, (metrics, indices, encoder outputs)."""
    x = patchify(frames, config.patch)
    e = encode(params, x, config)
    q, index, commit = quantise(params["codebook"], e)
    out = jax.nn.sigmoid(st(params["decoder"], q, tokenizer_spec(config))[0])
    error = ((x - out) ** 2).mean()
    metrics = {"tokenizer_loss": error, "tokenizer_perplexity": perplexity(index, config.num_codes), "tokenizer_commit": commit}
    return error + config.beta * commit, (metrics, index, e)


# --- latent action model (section 2.1, appendix C.1)


def init_lam(key, config: Config, shape: tuple[int, int]) -> dict:
    """Encoder with an action token, decoder, codebook of |A| codes."""
    key_encoder, key_decoder, key_code, key_token, key_action = jax.random.split(key, 5)
    tokens = config.lam_input == "tokens"
    grid = grid_of(shape, config.patch if tokens else config.lam_patch)
    n_in, width = config.code_dim if tokens else 3 * config.lam_patch**2, config.lam_width
    decoder = init_st(key_decoder, n_in, n_in, grid, width, config.lam_blocks, config)
    return {
        "encoder": init_st(key_encoder, n_in, config.code_dim, grid, width, config.lam_blocks, config),
        "token": 0.1 * jax.random.normal(key_token, (width,), jnp.float32),
        "decoder": decoder | {"out": decoder["out"] | {"w": 0.01 * decoder["out"]["w"]}},  # at first nothing changes
        "action": orthogonal(key_action, (config.code_dim, width)),
        "codebook": jax.random.normal(key_code, (config.num_actions, config.code_dim), jnp.float32),
    }


def infer_actions(params, x, config: Config):
    """x_1..x_T (B, T, N, n_in) -> e (B, T - 1, code_dim), where e_t is of x_t -> x_{t+1} and comes from x_1..x_{t+1}."""
    encoder, spec = params["encoder"], Spec(config.heads, config.num_frames)
    h = dense(encoder["in"], x) + positions(encoder)
    token = jnp.broadcast_to(params["token"], (*x.shape[:2], 1, config.lam_width))
    h, _ = st_blocks(encoder, jnp.concatenate([h, token], axis=2), spec)
    seen = rms_norm(encoder["norm"], h[:, :, -1])
    return unit(dense(encoder["out"], seen[:, 1:] - seen[:, :-1]))


def predict_next(params, x, actions, config: Config) -> jax.Array:
    """x_1..x_{T-1} (B, T - 1, N, n_in), codes (B, T - 1, code_dim) -> x_2..x_T, where x_{t+1} comes from x_1..x_t, a_1..a_t.

    The decoder says what changes, and knows no place but by what is near, so that a code means the same everywhere.
    """
    action = (actions @ params["action"])[:, :, None]
    return x + st(params["decoder"], x, Spec(config.heads, config.num_frames), action, placed=False)[0]


def lam_view(params, frames, config: Config) -> jax.Array:
    """What the latent action model sees: patches of pixels, or (the ablation) the frozen tokenizer's codes."""
    if config.lam_input == "pixels":
        return patchify(frames, config.lam_patch)
    codes = unit(params["tokenizer"]["codebook"])[tokenise(params["tokenizer"], frames, config)]
    return jax.lax.stop_gradient(codes)


def lam_loss(params, key, x, config: Config):
    """The decoder's squared error over the variance, and beta ||e - sg(q)||^2.

    -> loss, (metrics, codes (B, T - 1, code_dim), indices, outputs of the encoder).
    """
    e = infer_actions(params, x, config)
    q, index, commit = quantise(params["codebook"], e)
    bypass = jax.random.uniform(key, (len(x), 1, 1), jnp.float32) < config.lam_bypass
    error = ((predict_next(params, x[:, :-1], jnp.where(bypass, e, q), config) - x[:, 1:]) ** 2).mean()
    metrics = {"lam_loss": error, "lam_perplexity": perplexity(index, config.num_actions), "lam_commit": commit}
    return error / x.var() + config.beta * commit, (metrics, q, index, e)


# --- dynamics (section 2.1)


def dynamics_spec(config: Config) -> Spec:
    return Spec(config.heads, config.num_frames, qk_norm=config.qk_norm, dtype=config.dtype)


def init_dynamics(key, config: Config, shape: tuple[int, int]) -> dict:
    """A transformer over tokens, one more of which is MASK, with a matrix that lets an action in."""
    key_st, key_action = jax.random.split(key)
    grid, width = grid_of(shape, config.patch), config.dynamics_width
    params = init_st(key_st, config.num_codes + 1, config.num_codes, grid, width, config.dynamics_blocks, config)
    return params | {"action": orthogonal(key_action, (config.code_dim, width))}


def predict_tokens(params, tokens, actions, config: Config, cache: Cache | None = None):
    """Tokens (B, T, N), some MASK, the code that led to each frame (B, T, code_dim) or 0 -> logits (B, T, N, K), cache."""
    h = params["in"]["w"][tokens] + params["in"]["b"] + positions(params)
    action = (actions @ params["action"])[:, :, None]
    add = config.action_input == "add"
    h = h + action if add else jnp.concatenate([h, action], axis=2)
    h, cache = st_blocks(params, h, dynamics_spec(config), cache)
    h = h if add else h[:, :, :-1]
    return dense(params["out"], rms_norm(params["norm"], h)), cache


def draw_mask(key, shape: tuple[int, int, int], config: Config) -> jax.Array:
    """Which tokens (B, T, N) are hidden: at a rate of each clip's own, never in frame 1, nor in a clip's clean context."""
    key_rate, key_mask, key_clean, key_first = jax.random.split(key, 4)
    batch, length, _ = shape
    rate = jax.random.uniform(key_rate, (batch, 1, 1), jnp.float32, minval=config.mask_low)
    clean = jax.random.uniform(key_clean, (batch,), jnp.float32) < config.clean_context
    first = jnp.where(clean, jax.random.randint(key_first, (batch,), 1, length, jnp.int32), 1)
    return (jax.random.uniform(key_mask, shape, jnp.float32) < rate) & (jnp.arange(length) >= first[:, None])[..., None]


def lead_in(codes) -> jax.Array:
    """Codes of transitions (B, T - 1, code_dim) -> of the frames they lead to (B, T, code_dim), 0 for frame 1."""
    return jnp.pad(codes, ((0, 0), (1, 0), (0, 0)))


def hidden_loss(params, tokens, mask, codes, config: Config):
    """Cross-entropy (nats) and accuracy of the hidden tokens, given the others and codes (B, T - 1, code_dim)."""
    logits, _ = predict_tokens(params, jnp.where(mask, config.num_codes, tokens), lead_in(codes), config)
    log_p = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    right = logits.argmax(-1) == tokens
    return tuple(jnp.sum(x * mask).astype(jnp.float32) / jnp.maximum(mask.sum(), 1) for x in (-log_p, right))


def dynamics_loss(params, key, tokens, codes, config: Config):
    """Cross-entropy of tokens hidden at random -> loss, metrics."""
    loss, accuracy = hidden_loss(params, tokens, draw_mask(key, tokens.shape, config), codes, config)
    return loss, {"dynamics_loss": loss, "dynamics_accuracy": accuracy}


# --- sampling (section 2.2)


def draw_tokens(key, logits, temperature) -> jax.Array:
    """Draws from softmax(logits / temperature), (..., K) -> (...); 0: the likeliest. One random number a token, not K, as with
    jax.random.categorical, which took a quarter of a frame's time."""
    weight = jnp.exp((logits - logits.max(-1, keepdims=True)) / jnp.maximum(temperature, 1e-6))
    below = jnp.cumsum(weight, axis=-1)
    return (below < jax.random.uniform(key, (*logits.shape[:-1], 1), jnp.float32) * below[..., -1:]).sum(-1, dtype=jnp.int32)


def fill_in(key, logits_of: Callable, shape: tuple[int, int], config: Config, temperature=None, steps=None):
    """MaskGIT (2202.04200): in every step all hidden tokens are drawn, and the surest are kept, a cosine's share.

    logits_of: tokens (B, N), some MASK -> (B, N, K). None: the config's own numbers.

    -> tokens (B, N), the probability that each had when it was drawn.
    """
    temperature = config.temperature if temperature is None else temperature
    steps = config.maskgit_steps if steps is None else steps

    def step(s, carry):
        tokens, sure = carry
        logits = logits_of(tokens)
        draw = draw_tokens(jax.random.fold_in(key, s), logits, temperature)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), draw[..., None], axis=-1)[..., 0]
        hidden = tokens == config.num_codes
        rank = jnp.where(hidden, -log_p, -jnp.inf).argsort(-1).argsort(-1)
        kept = hidden & (rank < jnp.maximum(s, jnp.round(shape[1] * (1 - jnp.cos(jnp.pi / 2 * s / steps)))))  # one more at least
        return jnp.where(kept, draw, tokens), jnp.where(kept, jnp.exp(log_p), sure)

    return jax.lax.fori_loop(1, steps + 1, step, (jnp.full(shape, config.num_codes, jnp.int32), jnp.zeros(shape, jnp.float32)))


def sample_frame(key, params, cache: Cache, action, config: Config, temperature=None, steps=None):
    """Draws one frame after those in the cache, given the code (B, code_dim) that leads to it.

    -> tokens (B, N), the new cache, the probability that each token had when it was drawn (B, N).
    """

    def predict(tokens):
        logits, new = predict_tokens(params, tokens[:, None], action[:, None], config, cache)
        return logits[:, 0], new

    shape = action.shape[0], len(positions(params))
    tokens, sure = fill_in(key, lambda tokens: predict(tokens)[0], shape, config, temperature, steps)
    return tokens, predict(tokens)[1], sure


def read_prompt(params, tokens, codes, config: Config) -> Cache:
    """The dynamics' cache after a prompt: tokens (B, P, N), codes that lead to each of its frames (B, P, code_dim)."""
    width = len(positions(params)) + (config.action_input == "prepend")
    cache = init_cache(params, dynamics_spec(config), tokens.shape[0], width)

    def step(cache, inputs):
        z, a = inputs
        return predict_tokens(params, z[:, None], a[:, None], config, cache)[1], None

    return jax.lax.scan(step, cache, (tokens.swapaxes(0, 1), codes.swapaxes(0, 1)))[0]


def rollout(key, params, prompt, codes, config: Config) -> jax.Array:
    """Prompt (B, P, N), codes that lead to each of T frames (B, T, code_dim) -> tokens (B, T, N), those after the prompt drawn."""
    length = prompt.shape[1]
    cache = read_prompt(params, prompt, codes[:, :length], config)

    def step(cache, inputs):
        tokens, cache, _ = sample_frame(inputs[0], params, cache, inputs[1], config)
        return cache, tokens

    keys = jax.random.split(key, codes.shape[1] - length)
    _, drawn = jax.lax.scan(step, cache, (keys, codes[:, length:].swapaxes(0, 1)))
    return jnp.concatenate([prompt, drawn.swapaxes(0, 1)], axis=1)


# --- training


def source_of(config: Config) -> Source:
    """The clips' source. Raises UsageError where frames cannot be cut into patches."""
    args = (config.data, config.num_frames, config.size, config.num_levels, config.sticky)
    source = make_source(*args, blank=config.dry_run)
    for name in ("patch", "lam_patch"):
        size = getattr(config, name)
        fits = source.shape[0] % size == 0 and source.shape[1] % size == 0
        require(fits, f"--{name.replace('_', '-')} {size}: must divide frames of {source.shape[0]} x {source.shape[1]}")
    for name in ("tokenizer_batch", "batch_size"):
        size = getattr(config, name)
        require(size <= source.most, f"--{name.replace('_', '-')} {size}: only {source.most} games go on at once")
    return source


def optimisers(config: Config) -> dict:
    """AdamW: the tokenizer's with a constant rate, the others' with a cosine, both warmed up (tables 15 to 17)."""
    updates = config.num_updates - (config.tokenizer_updates if config.stage == "all" else 0)
    flat = optax.linear_schedule(0.0, config.tokenizer_lr, config.tokenizer_warmup)
    cosine = optax.warmup_cosine_decay_schedule(0.0, config.lr, config.warmup, max(updates, config.warmup + 1), config.lr_min)
    adamw = partial(optax.adamw, b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay)
    return {"tokenizer": adamw(flat), "world": adamw(cosine)}


def world_parts(config: Config) -> tuple[str, ...]:
    """What is trained after the tokenizer."""
    return ("lam",) if config.stage == "lam" else ("lam", "dynamics")


def make_train(config: Config) -> Train:
    """Genie as pure functions of one seed."""
    source, txs, parts = source_of(config), optimisers(config), world_parts(config)

    def init(key):
        key, key_tokenizer, key_lam, key_dynamics, key_world = jax.random.split(key, 5)
        params = {
            "tokenizer": init_tokenizer(key_tokenizer, config, source.shape),
            "lam": init_lam(key_lam, config, source.shape),
            "dynamics": init_dynamics(key_dynamics, config, source.shape),
        }
        opt_state = {"tokenizer": txs["tokenizer"].init(params["tokenizer"])}
        opt_state["world"] = txs["world"].init({name: params[name] for name in parts})
        nums = {"tokenizer": config.num_codes, "lam": config.num_actions}
        shares = {name: jnp.full(num, 1 / num, jnp.float32) for name, num in nums.items()}
        return State(params, opt_state, shares, source.init(key_world), key)

    def descend(name, params, opt_state, grads):
        updates, opt_state = txs[name].update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def renew(key, part, share, index, e):
        """The part with its codebook brought up to date -> part, share."""
        index, e = index.reshape(-1), e.reshape(-1, config.code_dim)
        codebook = follow(part["codebook"], index, e, config.codebook_decay)
        codebook, share = restart(key, codebook, share, index, e, config.least_use)
        return part | {"codebook": codebook}, share

    def learn_tokenizer(state: State, frames):
        """One step of stage 1."""
        key, key_codes = jax.random.split(state.key)
        params, frames = state.params["tokenizer"], shard_batch(frames[: config.tokenizer_batch])
        grads, (metrics, index, e) = jax.grad(tokenizer_loss, has_aux=True)(params, frames, config)
        params, opt_state = descend("tokenizer", params, state.opt_state["tokenizer"], grads)
        params, share = renew(key_codes, params, state.shares["tokenizer"], index, e)
        opt_state, shares = state.opt_state | {"tokenizer": opt_state}, state.shares | {"tokenizer": share}
        return State(state.params | {"tokenizer": params}, opt_state, shares, state.world, key), metrics

    def world_loss(params, frozen, key, frames):
        """Both losses of stage 2; no gradient goes from the dynamics to the codes, nor to the tokenizer."""
        x, (key_lam, key_mask) = lam_view(frozen, frames, config), jax.random.split(key)
        loss, (metrics, q, index, e) = lam_loss(params["lam"], key_lam, x, config)
        if "dynamics" in params:
            tokens = tokenise(frozen["tokenizer"], frames, config)
            more, dynamics_metrics = dynamics_loss(params["dynamics"], key_mask, tokens, jax.lax.stop_gradient(q), config)
            loss, metrics = loss + more, metrics | dynamics_metrics
        return loss, (metrics, index, e)

    def learn_world(state: State, frames):
        """One step of stage 2: latent actions and dynamics on the same clips."""
        key, key_loss, key_codes = jax.random.split(state.key, 3)
        params, frames = {name: state.params[name] for name in parts}, shard_batch(frames[: config.batch_size])
        grads, (metrics, index, e) = jax.grad(world_loss, has_aux=True)(params, state.params, key_loss, frames)
        params, opt_state = descend("world", params, state.opt_state["world"], grads)
        lam, share = renew(key_codes, params["lam"], state.shares["lam"], index, e)
        opt_state, shares = state.opt_state | {"world": opt_state}, state.shares | {"lam": share}
        return State(state.params | params | {"lam": lam}, opt_state, shares, state.world, key), metrics

    def with_all_metrics(learn, other):
        def learn_and_pad(*args):
            new, metrics = learn(*args)
            return new, nothing_like(other, *args)[1] | metrics

        return learn_and_pad

    batches = {"tokenizer": config.tokenizer_batch, "all": max(config.tokenizer_batch, config.batch_size)}

    def update(state: State, t):
        key, key_draw = jax.random.split(state.key)
        clips, world = source.draw(key_draw, state.world, batches.get(config.stage, config.batch_size))
        args = state._replace(world=world, key=key), clips.frames
        if config.stage != "all":
            return (learn_tokenizer if config.stage == "tokenizer" else learn_world)(*args)
        first, then = with_all_metrics(learn_tokenizer, learn_world), with_all_metrics(learn_world, learn_tokenizer)
        return jax.lax.cond(t < config.tokenizer_updates, first, then, *args)

    return Train(init, update, partial(evaluate, config, source), config.num_updates)


# --- evaluation


def evaluate(config: Config, source: Source, state: State) -> dict:
    """Held-out clips, always the same: how well each part does its work, and a film of every code held."""
    keys = jnp.stack([jax.random.key(1), jax.random.key(3)])
    both = jax.lax.map(lambda key: source.held_out(key, config.eval_clips), keys)
    params, clips, others = state.params, jax.tree.map(lambda x: x[0], both), both.frames[1]
    tokens, (codes, index) = tokenise(params["tokenizer"], clips.frames, config), actions_of(params, clips.frames, config)
    results = tokenizer_results(params, clips.frames, tokens, config) if config.stage != "lam" else {}
    results |= lam_results(params, clips, codes, index, source, config) if config.stage != "tokenizer" else {}
    if config.stage in ("tokenizer", "lam"):
        return results
    key_mask, key_play, key_film = jax.random.split(jax.random.key(2), 3)
    results |= token_results(key_mask, params, tokens, codes, config)
    has_learned = state.opt_state["world"][0].count > 0  # else there is nothing to play

    def played(params, codes) -> dict:
        film = controls(key_film, params, tokens[:4], codes[:4], source.shape, config)
        return play_results(key_play, params, clips.frames, others, tokens, codes, config) | {"controls": film}

    return results | if_needed(has_learned, played, params, codes)


def actions_of(params, frames, config: Config):
    """The codes' vectors (B, T - 1, code_dim) and indices (B, T - 1) of clips."""
    e = infer_actions(params["lam"], lam_view(params, frames, config), config)
    return quantise(params["lam"]["codebook"], e)[:2]


def pixels(params, tokens, shape, config: Config) -> jax.Array:
    """Tokens (B, T, N) -> frames (B, T, H, W, 3) in [0, 1]."""
    return unpatchify(decode(params["tokenizer"], tokens, config)[0], config.patch, shape)


def tokenizer_results(params, frames, tokens, config: Config) -> dict:
    """PSNR of the reconstruction, also of frames that differ from those before, and of these in their place; codes used; a picture,
    truth above reconstruction."""
    shape, truth = frames.shape[2:4], frames / 255
    out = pixels(params, tokens, shape, config)
    shown = jnp.stack([truth[:8, -1], out[:8, -1]])  # (2, 8, H, W, 3)
    moved = (frames[:, 1:] != frames[:, :-1]).any((-3, -2, -1))
    mean = lambda x: (x * moved).sum() / jnp.maximum(moved.sum(), 1)
    return {
        "psnr": psnr(truth, out).mean(),
        "moved_psnr": mean(psnr(truth, out)[:, 1:]),
        "copy_psnr": mean(psnr(truth[:, 1:], truth[:, :-1])),
        "codes_used": perplexity(tokens, config.num_codes) / config.num_codes,
        "reconstruction": to_uint8(shown.swapaxes(1, 2).swapaxes(2, 3).reshape(2 * shape[0], -1, 3)),
    }


def lam_results(params, clips, codes, index, source: Source, config: Config) -> dict:
    """How much the inferred codes help the decoder against other clips' codes, and against those of another time in the clip, in
    dB; what codes say of the true change, while the game goes on."""
    x = lam_view(params, clips.frames, config)
    error = lambda codes: ((predict_next(params["lam"], x[:, :-1], codes, config) - x[:, 1:]) ** 2).mean((-2, -1)) + 1e-5
    arms = jnp.stack([codes, jnp.roll(codes, 1, axis=0), jnp.roll(codes, codes.shape[1] // 2, axis=1)])
    lam_psnr, other_clips, other_times = jax.lax.map(lambda codes: -10 * jnp.log10(error(codes)).mean(), arms)
    of_code = jax.nn.one_hot(jnp.where(clips.action < 0, -1, index), config.num_actions, dtype=jnp.float32)
    count = lambda change: jnp.einsum("bta,btc->ac", of_code, jax.nn.one_hot(change, source.num_changes, dtype=jnp.float32))
    table = count(clips.change)
    return {
        "lam_psnr": lam_psnr,
        "lam_psnr_gain": lam_psnr - other_clips,
        "lam_psnr_gain_in_time": lam_psnr - other_times,
        "code_perplexity": perplexity(index, config.num_actions),
        "code_purity": table.max(1).sum() / table.sum(),
        "code_information": information(table),
        "code_information_chance": information(count(jnp.roll(clips.change, 1, axis=0))),
        "codes_and_changes": table,
    }


def token_results(key, params, tokens, codes, config: Config) -> dict:
    """Cross-entropy (nats) of the last frame's tokens, all hidden: of the dynamics; of the tokens' frequencies; of the best mixture
    of those with a copy of the frame before. And of tokens hidden as in training."""
    drawn = draw_mask(key, tokens.shape, config)
    masks = jnp.stack([drawn, jnp.zeros_like(drawn).at[:, -1].set(True)])
    masked, last = jax.lax.map(lambda mask: hidden_loss(params["dynamics"], tokens, mask, codes, config)[0], masks)
    share = jnp.zeros(config.num_codes, jnp.float32).at[tokens.reshape(-1)].add(1.0) / tokens.size
    unigram, same = share[tokens[:, -1]], tokens[:, -1] == tokens[:, -2]
    weights = jnp.linspace(0, 1, 101, dtype=jnp.float32)[:-1, None, None]  # the best on the very clips: it favours the baseline
    mixtures = -jnp.log(weights * same + (1 - weights) * unigram)
    return {
        "cross_entropy": last,
        "unigram_cross_entropy": -jnp.log(unigram).mean(),
        "copy_cross_entropy": mixtures.mean((1, 2)).min(),
        "masked_cross_entropy": masked,
    }


def play_results(key, params, frames, others, tokens, codes, config: Config, draws: int = 2) -> dict:
    """Delta_4 PSNR (section 3): PSNR of the 4th generated frame under inferred codes minus that under random ones, same key.

    And how far 4 generated frames lie from other clips' frames, beside how far true ones do (Frechet, random features: not FVD).
    """
    key_draw, key_codes = jax.random.split(key)
    prompt, end = config.prompt_frames, config.prompt_frames + 4
    truth, codes = frames[:, prompt:end] / 255, codes[:, : end - 1]
    still = psnr(truth[:, 3], frames[:, prompt - 1] / 255)
    index = jax.random.randint(key_codes, (draws, *codes.shape[:2]), 0, config.num_actions, jnp.int32)[:, :, prompt - 1 :]
    random = jnp.stack([codes] * draws).at[:, :, prompt - 1 :].set(unit(params["lam"]["codebook"])[index])

    def played(codes):
        drawn = rollout(key_draw, params["dynamics"], tokens[:, :prompt], lead_in(codes), config)
        return pixels(params, drawn, frames.shape[2:4], config)[:, prompt:]

    clips = jax.lax.map(played, jnp.concatenate([codes[None], random]))  # (1 + draws, B, 4, H, W, 3)
    inferred, *at_random = psnr(truth[:, 3], clips[:, :, 3])
    delta = inferred - sum(at_random) / draws
    others = random_features(others[:, prompt:end] / 255)
    return {
        "rollout_psnr": inferred.mean(),
        "still_psnr": still.mean(),
        "delta4_psnr": delta.mean(),
        "delta4_psnr_low": delta.mean() - 1.96 * delta.std() / (delta.size - 1) ** 0.5,
        "frechet": frechet(random_features(clips[0]), others),
        "frechet_of_truth": frechet(random_features(truth), others),
    }


def controls(key, params, tokens, codes, shape, config: Config) -> jax.Array:
    """A film (T, rows * H, |A| * W, 3) uint8: a prompt a row, a code a column, which is held after the prompt."""
    rows, length, num = tokens.shape
    prompt, actions = config.prompt_frames, config.num_actions
    held = jnp.tile(unit(params["lam"]["codebook"]), (rows, 1))[:, None]  # (rows * |A|, 1, code_dim)
    codes = codes.repeat(actions, 0).at[:, prompt - 1 :].set(held)
    drawn = rollout(key, params["dynamics"], tokens[:, :prompt].repeat(actions, 0), lead_in(codes), config)
    film = to_uint8(pixels(params, drawn, shape, config)).reshape(rows, actions, length, *shape, 3)
    return film.transpose(2, 0, 3, 1, 4, 5).reshape(length, rows * shape[0], actions * shape[1], 3)


# --- playing (section 2.2)

HELD = 5  # frames for which a code is held to show what it does (figure 17)


class World(NamedTuple):
    """Where worlds that are being played are."""

    dynamics: Cache
    decoder: Cache  # the tokenizer's


def begin_world(params, frames, codes, config: Config):
    """Frames (1, P, H, W, 3), the codes between them (1, P - 1) -> World, the frames as the tokenizer gives them."""
    tokens, codebook = tokenise(params["tokenizer"], frames, config), unit(params["lam"]["codebook"])
    dynamics = read_prompt(params["dynamics"], tokens, lead_in(codebook[codes]), config)
    decoder = params["tokenizer"]["decoder"]
    empty = World(dynamics, init_cache(decoder, tokenizer_spec(config), 1, tokens.shape[2]))
    world, shown = jax.lax.scan(lambda world, z: show(params, world, z, config, frames.shape[2:4]), empty, tokens.swapaxes(0, 1))
    return world, shown.swapaxes(0, 1)


def show(params, world: World, tokens, config: Config, shape):
    """Decodes the next frame, tokens (B, N) -> World, frames (B, H, W, 3) uint8."""
    x, decoder = decode(params["tokenizer"], tokens[:, None], config, world.decoder)
    return world._replace(decoder=decoder), to_uint8(unpatchify(x, config.patch, shape))[:, 0]


def imagine(key, params, world: World, codes, temperature, steps, config: Config, shape):
    """The next frame of B worlds, given codes (B,) -> World, frames (B, H, W, 3), how sure tokens are (B, N)."""
    action = unit(params["lam"]["codebook"])[codes]
    tokens, dynamics, sure = sample_frame(key, params["dynamics"], world.dynamics, action, config, temperature, steps)
    return *show(params, world._replace(dynamics=dynamics), tokens, config, shape), sure


def model_to_play(params, config: Config, shape: tuple[int, int]) -> Model:
    """The trained parameters as the page's model."""
    grid = (shape[0] // config.patch, shape[1] // config.patch)
    key_of = lambda seed, time: jax.random.fold_in(jax.random.key(seed), time)

    def begin(params, frames, codes):
        world, shown = begin_world(params, frames[None], codes[None], config)
        return world, shown[0]

    def step(params, seed, time, world, code, temperature, steps):
        world, frames, sure = imagine(key_of(seed, time), params, world, code[None], temperature, steps, config, shape)
        return world, frames[0], sure[0].reshape(grid)

    def hold(params, seed, time, world, temperature, steps):
        worlds = jax.tree.map(lambda x: x.repeat(config.num_actions, 1) if x.ndim else x, world)
        codes = jnp.arange(config.num_actions)
        one = lambda worlds, key: imagine(key, params, worlds, codes, temperature, steps, config, shape)[:2]
        return jax.lax.scan(one, worlds, jax.random.split(key_of(seed, time), HELD))[1].swapaxes(0, 1)

    infer = lambda params, frames: actions_of(params, frames[None], config)[1][0]
    begin, step, hold, infer = (partial(jax.jit(f), params) for f in (begin, step, hold, infer))
    begin_from = lambda frames, codes: begin(frames, np.asarray(codes, np.int32))
    return Model(shape, config.num_actions, infer, begin_from, lambda *x: step(*x[:3], np.int32(x[3]), *x[4:]), hold)


def play(config: Config, folder: Path, stop: StopSignal) -> None:
    """Serves a page on which a person plays the first seed of the run in a folder."""
    trained, params, source = trained_run(config, folder)
    about = {"title": f"Genie: {folder}", "subtitle": f"{trained.data}, {trained.num_actions} latent actions"}
    with open_server(config.port) as server:
        model = model_to_play(params, trained, source.shape)
        infer = partial(jax.jit(lambda params, frames: actions_of(params, frames, trained)[1]), params)
        meaning = read_codes(infer, source, trained.num_actions, trained.eval_clips)
        truth = truth_of(infer, source, meaning, trained.num_frames, trained.prompt_frames, trained.sticky)
        session = Session(model, truth, about | describe_codes(source, meaning), config.temperature, config.maskgit_steps)
        for request in ({"do": "hold"}, {"do": "step", "code": 0}, {"do": "reset"}):  # compiled before the first visit
            session.answer(request)
        serve(server, session, stop)


# --- command


def find(folder: Path) -> Earlier:
    """A run, whose settings' `stage` is the part that it has come to. Raises UsageError if there is none."""
    found = find_run(folder, Config, "Genie")
    in_first_part = found.config.stage == "all" and found.update <= found.config.tokenizer_updates
    return found._replace(config=replace(found.config, stage="tokenizer")) if in_first_part else found


def starting_params(config: Config, folder: Path) -> dict:
    """Parts of another run's parameters, for run(given=...). Raises UsageError where they do not fit this run's sizes."""
    found = find(folder)
    check_seeds(found, config)
    params = read_state(found, make_train).params
    params = {name: params[name] for name in config.load_parts}
    check_shapes(found, params, state_like(config, make_train).params)
    return {"params": params}


def trained_run(config: Config, folder: Path) -> tuple[Config, dict, Source]:
    """A finished run's settings (but how to sample is this config's), its first seed's parameters, its source of clips."""
    found = find(folder)
    trained, params = found.config, read_state(found, make_train).params
    require(trained.stage in ("all", "dynamics"), f"--load {folder}: only its {trained.stage} was trained: give it to `dynamics`")
    trained = replace(trained, temperature=config.temperature, maskgit_steps=config.maskgit_steps)
    return trained, jax.tree.map(lambda x: jnp.asarray(x[0]), params), source_of(trained)


def clone(config: Config, folder: Path) -> None:
    """Trains and tests the policies of `bc`, one for each seed of the run in a folder."""
    found = find(folder)
    trained, params = found.config, read_state(found, make_train).params
    require(trained.data == "coinrun", f"--load {folder}: has learned from {trained.data}; bc needs a run on coinrun")
    own = {field.name: getattr(config, field.name) for field in fields(RunConfig)}
    own |= {name: getattr(config, name) for name in ("bc_updates", "bc_batch", "bc_blocks", "labels", "lr", "lr_min", "warmup")}
    own |= {"num_updates": config.bc_updates, "num_seeds": trained.num_seeds}
    own |= {"eval_every": config.bc_updates, "save_every": min(config.save_every, config.bc_updates)}
    config = replace(trained, **own | {"stage": "bc", "load": str(folder)})

    def make(config: Config) -> Train:
        model = make_train(config)  # outside of what is traced: it makes CoinRun's levels
        infer = lambda params, x: actions_of(params, x, config)[1]
        init_model = lambda key: model.init(key).params
        return make_cloning(config, source_of(config), optimisers(config)["world"], init_model, infer)

    run(config, make, highlights=("won_latent", "won_oracle"), given=lambda: {"params": params})


def sample(config: Config, folder: Path, stop: StopSignal) -> None:
    """Writes a film of every code held after held-out prompts, by the first seed of the run in a folder."""
    trained, params, source = trained_run(config, folder)

    @jax.jit
    def film(key):
        clips = source.held_out(jax.random.fold_in(key, 0), 4)
        tokens, codes = tokenise(params["tokenizer"], clips.frames, trained), actions_of(params, clips.frames, trained)[0]
        return controls(jax.random.fold_in(key, 1), params, tokens, codes, source.shape, trained)

    path = Path(config.out or folder) / "videos" / "sample.gif"
    save_gif(path, np.asarray(film(jax.random.key(config.seed))))
    print(f"rows are prompts, columns are codes 0 to {trained.num_actions - 1}: {path}")


def main(config: Config) -> None:
    """Trains a stage, or samples."""
    with faults_in_one_line():
        folder = None
        if config.load or config.stage in ("dynamics", "sample", "play", "bc"):
            folder = Path(config.load) if config.load else newest_run()
            find(folder)
            config = replace(config, load=str(folder))  # so that a run that is resumed finds it again
        if config.stage in ("sample", "play"):
            require(not config.dry_run, f"--dry-run: {config.stage} trains nothing")
            with begin(config) as stop:
                return (sample if config.stage == "sample" else play)(config, folder, stop)
        if config.stage == "bc":
            return clone(config, folder)
    given = partial(starting_params, config, folder) if folder else None
    run(config, make_train, highlights=("psnr", "lam_psnr_gain", "delta4_psnr"), given=given)


if __name__ == "__main__":
    main(cli(Config, __doc__, {"cpu": CPU, "paper": PAPER}))
