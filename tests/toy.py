"""A method that fits a line by gradient descent: for tests of what all methods share, run as a user runs a file of their own.

Run:  python tests/toy.py --num-updates 8
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from common.runs.command import cli
from common.runs.config import RunConfig, require
from common.runs.devices import shard_batch
from common.runs.loop import run
from common.runs.programs import Train


@dataclass(frozen=True)
class Config(RunConfig):
    """The toy's settings."""

    may_grow = ("num_updates",)
    num_updates: int = 8
    """Gradient steps."""
    log_every: int = 2
    """Updates between two rows."""
    eval_every: int = 4
    """Updates between two evaluations."""
    save_every: int = 4
    """Updates between two checkpoints."""
    cache: str = "none"
    """No cache: the programs are small."""
    lr: float = 0.05
    """Learning rate of Adam."""
    noise: float = 0.1
    """Standard deviation of the targets' noise."""
    decay: float = 0.0
    """Weight decay; 0 leaves it out of the program."""
    batch: int = 8
    """Points in each batch."""
    width: int = 4
    """Inputs."""
    work: int = 0
    """Rounds of useless arithmetic in each update, to make it last."""
    nan_at: int = -1
    """Update (from 0) whose loss is not a number."""

    def __post_init__(self):
        super().__post_init__()
        require(self.lr > 0, f"--lr {self.lr}: must be positive")

    @property
    def split_size(self) -> int:
        return self.batch


CPU = Config()


class State(NamedTuple):
    """All of one seed's run."""

    params: Any
    opt_state: Any
    best: jax.Array  # () the lowest loss, inf at first
    seen: jax.Array  # () int32
    key: jax.Array


def make_train(config: Config) -> Train:
    """The toy as pure functions of one seed."""
    tx = optax.adam(config.lr)
    truth = jnp.arange(config.width) - 1.0

    def init(key):
        key, key_params = jax.random.split(key)
        params = {"w": jax.random.normal(key_params, (config.width,)), "b": jnp.zeros(())}
        return State(params, tx.init(params), jnp.inf, jnp.int32(0), key)

    def loss_fn(params, x, y):
        loss = ((x @ params["w"] + params["b"] - y) ** 2).mean()
        return loss + config.decay * (params["w"] ** 2).sum() if config.decay else loss

    def update(state, t):
        key, key_x, key_noise = jax.random.split(state.key, 3)
        x = shard_batch(jax.random.normal(key_x, (config.batch, config.width)))
        y = x @ truth + config.noise * jax.random.normal(key_noise, (config.batch,))
        y = y + 0 * jax.lax.fori_loop(0, config.work, lambda i, z: jnp.tanh(z @ z), jnp.zeros((64, 64)))[0, 0]
        y = jnp.where(t == config.nan_at, jnp.nan, y)
        loss, grads = jax.value_and_grad(loss_fn)(state.params, x, y)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        seen = state.seen + config.batch
        state = State(optax.apply_updates(state.params, updates), opt_state, jnp.minimum(state.best, loss), seen, key)
        return state, {"loss": loss, "rare": jnp.where(t % 3 == 0, loss, jnp.nan), "never": jnp.nan, "env_steps": seen}

    return Train(init, update, partial(evaluate, truth), config.num_updates)


def evaluate(truth, state):
    """The distance from the truth, a picture, a film and an array."""
    shade = (jnp.abs(state.params["w"]) * 100).astype(jnp.uint8)
    picture = jnp.broadcast_to(shade[None, :, None], (4, len(truth), 3))
    return {
        "error": jnp.abs(state.params["w"] - truth).mean(),
        "bars": picture,
        "film": picture[None].repeat(3, 0),
        "weights": truth,
    }


if __name__ == "__main__":
    run(cli(Config, __doc__, {"cpu": CPU}), make_train, highlights=("loss", "error"))
