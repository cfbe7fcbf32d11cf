"""A method's functions of one seed, and the compiled programs of all seeds made of them.

A method gives `make_train(config) -> Train`. What its functions return decides what is written:

update    a flat dict of scalars. Per row of metrics.csv: the mean over the row's updates of what is float (NaN where a thing
          did not happen, which the mean passes over), the last value of what is integer (counters).
evaluate  a flat dict. Scalars go to metrics.csv; uint8 (H, W, 3) is a picture, kept through time as figures/NAME.png; uint8
          (T, H, W, 3) is a film, videos/NAME.gif, the seeds side by side; any other array goes to arrays/NAME.npy, and if it has
          one axis the newest is also drawn as a curve, in figures/evaluation.png.

Where the state has leaves with `params` in their name, a run stops when one of them is no longer finite.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from common.runs.config import RunConfig
from common.runs.hosts import gather, meet

FINITE = "params_finite"
NOTHING = float(np.finfo(np.float32).min)  # what programs give for NaN, which JAX_DEBUG_NANS takes for a fault


class Train(NamedTuple):
    """A method, as pure functions of one seed."""

    init: Callable[[jax.Array], Any]  # key -> State: everything that must survive a restart, the key included
    update: Callable[[Any, jax.Array], tuple[Any, dict]]  # (State, t) -> (State, metrics); t is shared by all seeds
    evaluate: Callable[[Any], dict]  # State -> metrics, pictures, films
    num_updates: int


def train_fn(train: Train) -> Callable[[jax.Array], tuple[Any, dict]]:
    """The whole training as one function key -> (State, metrics (num_updates,)): `jit(vmap(train_fn(...)))(keys)`."""
    return lambda key: jax.lax.scan(train.update, train.init(key), jnp.arange(train.num_updates))


def nothing_like(function, *args):
    """What `function(*args)` would return, with NaN for floats and 0 for all else: for the branch in which it does not happen."""
    like = jax.eval_shape(function, *args)
    return jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan if jnp.issubdtype(x.dtype, jnp.floating) else 0, x.dtype), like)


def prepared(config: RunConfig, make: Callable, *args):
    """What `make(*args)` gives, computed once, before a method's program is traced, as numpy. In a dry run zeros of that shape."""
    if config.dry_run:
        return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(make, *args))
    return jax.tree.map(np.asarray, jax.jit(make)(*args))


def if_needed(needed, function, *args):
    """`function(*args)` if needed () bool, else `nothing_like` it. A loop of one round or none: under vmap, where all lanes need it
    or none does, a branch would be taken by all.

    What does not depend on args is moved out of the loop by XLA, and done in any case. args depend on the loop's counter, as far as
    XLA can tell."""

    def once(carry):
        zero = 0 * carry[1].astype(jnp.float32)  # not simplified: 0 times a float may be NaN
        return (
            jnp.bool_(False),
            carry[1] + 1,
            function(*jax.tree.map(lambda x: x + zero.astype(x.dtype) if is_float(x) else x, args)),
        )

    return jax.lax.while_loop(lambda carry: carry[0], once, (needed, jnp.int32(0), nothing_like(function, *args)))[2]


class Programs:
    """The compiled programs of a run: all lanes together, laid out over the mesh. A lane is a seed, or a variant's seed.

    `train` is what every seed does; or a function choice -> Train, int32 () -> what a variant does. The seeds of the first of
    `num_variants` variants come first.
    """

    def __init__(self, config: RunConfig, train: Train | Callable, mesh: jax.sharding.Mesh, num_variants: int = 1):
        self.config, self.compile_s = config, 0.0
        self.layout = NamedSharding(mesh, PartitionSpec("seed"))
        self._seeds = np.tile(np.arange(config.seed, config.seed + config.num_seeds, dtype=np.int32), num_variants)
        choices = np.repeat(np.arange(num_variants, dtype=np.int32), config.num_seeds)
        train_of = train if callable(train) else lambda choice: train
        over_lanes = dict(spmd_axis_name="seed")

        def init(seeds):
            return jax.vmap(lambda seed, choice: train_of(choice).init(jax.random.key(seed)), **over_lanes)(seeds, choices)

        def chunk(state, updates):
            def scan(state, choice):
                state, metrics = jax.lax.scan(with_check(train_of(choice).update), state, updates)
                return state, mark(metrics)

            return jax.vmap(scan, **over_lanes)(state, choices)

        def evaluate(state):
            return jax.vmap(lambda state, choice: mark(train_of(choice).evaluate(state)), **over_lanes)(state, choices)

        self._init = jax.jit(init, out_shardings=self.layout)
        self._chunk = jax.jit(chunk, in_shardings=(self.layout, None), out_shardings=self.layout, donate_argnums=0)
        self._evaluate = jax.jit(evaluate, in_shardings=(self.layout,), out_shardings=self.layout)
        self.state_shape = jax.eval_shape(init, self._seeds)  # also finds mistakes before the first compile

    def compile(self) -> None:
        """Compiles the training and evaluation programs, unless they are, and counts the seconds."""
        began = time.perf_counter()
        updates = jax.ShapeDtypeStruct((self.config.log_every,), jnp.int32)
        if hasattr(self._chunk, "lower"):
            options = self.config.compiler_options if jax.default_backend() == "cpu" else {}
            self._chunk = self._chunk.lower(self.state_shape, updates).compile(compiler_options=options)
            self._evaluate = self._evaluate.lower(self.state_shape).compile(compiler_options=options)
        self.compile_s += time.perf_counter() - began
        meet()

    def init(self):
        """The first state of every lane."""
        began = time.perf_counter()
        if hasattr(self._init, "lower"):  # it is not compiled yet
            on_cpu = jax.default_backend() == "cpu"  # it runs once: not worth optimising, which takes most of compiling it
            options = {"xla_backend_optimization_level": 0} | self.config.compiler_options if on_cpu else {}
            self._init = self._init.lower(self._seeds).compile(compiler_options=options)
        self.compile_s += time.perf_counter() - began
        meet()
        return self._init(self._seeds)

    def place(self, state):
        """Spreads a state that was read from a file over the devices of every process."""

        def place_leaf(x):
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                wrap = lambda data: jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
                return jax.jit(wrap, out_shardings=self.layout)(place_leaf(np.asarray(jax.random.key_data(x))))
            return jax.make_array_from_callback(x.shape, self.layout, lambda index: np.asarray(x[index]))

        return jax.tree.map(place_leaf, state)

    def chunk(self, state, t: int):
        """`log_every` updates from update t -> state, metrics as numpy (lanes, log_every). The state given is used up.

        The metric `params_finite` says after which updates the parameters were finite.
        """
        state, metrics = self._chunk(state, np.arange(t, t + self.config.log_every, dtype=np.int32))
        return state, unmark(gather(metrics))

    def evaluate(self, state) -> dict:
        """The method's evaluation as numpy, a leading axis of lanes."""
        return unmark(gather(self._evaluate(state)))


def is_float(x) -> bool:
    """Whether an array holds floating-point numbers."""
    return jnp.issubdtype(x.dtype, jnp.floating)


def mark(metrics: dict) -> dict:
    """NaN (which says that a thing did not happen) as NOTHING."""
    return jax.tree.map(lambda x: jnp.where(jnp.isnan(x), jnp.asarray(NOTHING, x.dtype), x) if is_float(x) else x, metrics)


def unmark(metrics: dict) -> dict:
    """What `mark` was given, on the host."""
    nothing = lambda x: x == np.asarray(NOTHING, x.dtype)
    return jax.tree.map(lambda x: np.where(nothing(x), np.asarray(np.nan, x.dtype), x) if is_float(x) else x, metrics)


def with_check(update: Callable) -> Callable:
    """`update`, with a metric that says whether every leaf of the state with `params` in its name is finite."""

    def checked(state, t):
        state, metrics = update(state, t)
        leaves = jax.tree_util.tree_leaves_with_path(state)
        params = [x for path, x in leaves if "params" in jax.tree_util.keystr(path) and is_float(x)]
        return state, metrics | {FINITE: jnp.array([jnp.isfinite(x).all() for x in params], bool).all()}

    return checked
