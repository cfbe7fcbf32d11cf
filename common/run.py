"""Runs a method: every seed in one program over every device, in chunks of updates, with logs, checkpoints and figures.

A method gives `make_train(config) -> Train`. What its functions return decides what is written:

update    a flat dict of scalars. Per row of metrics.csv: the mean over the row's updates of what is float (NaN where a thing
          did not happen, which the mean passes over), the last value of what is integer (counters).
evaluate  a flat dict. Scalars go to metrics.csv; uint8 (H, W, 3) is a picture, kept through time as figures/NAME.png; uint8
          (T, H, W, 3) is a film, videos/NAME.gif, the seeds side by side; any other array goes to arrays/NAME.npy, and if it has
          one axis the newest is also drawn as a curve, in figures/evaluation.png.

Where the state has leaves with `params` in their name, a run stops when one of them is no longer finite.
"""

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from common.checkpoint import snapshot
from common.config import Fault, RunConfig, UsageError, die, method_name
from common.devices import make_mesh, setup_devices
from common.files import RunFiles
from common.hosts import agree, gather, is_main, join_hosts, meet
from common.stop import StopSignal
from common.trackers import require_trackers

FINITE = "params_finite"


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


def if_needed(needed, function, *args):
    """`function(*args)` if needed () bool, else `nothing_like` it. A loop of one round or none: under vmap, where all lanes need it
    or none does, a branch would be taken by all."""
    once = lambda carry: (jnp.bool_(False), function(*args))
    return jax.lax.while_loop(lambda carry: carry[0], once, (needed, nothing_like(function, *args)))[1]


def run(
    config: RunConfig, make_train: Callable[[Any], Train], highlights: tuple[str, ...] = (), given: Callable[[], dict] | None = None
) -> None:
    """Trains, evaluates, logs and saves, then prints a table. `highlights` name the metrics shown beside the progress bar.
    `given()` are fields of the State, or parts of those that are dicts, as numpy with an axis of seeds, with which a new run
    begins instead of `init`'s.

    Ends the program with one line and code 2 if the request cannot be met, before anything is compiled or overwritten; with one
    line and code 1 if the run cannot go on.
    """
    with faults_in_one_line():
        stop = begin(config)
        mesh = make_mesh(config.num_seeds, config.split_size)
        with jax.set_mesh(mesh):
            files = RunFiles(config, method_name())
            if train_and_record(Programs(config, make_train(config), mesh), files, stop, highlights, given):
                print_results(files)


def print_results(files: RunFiles) -> None:
    """Ends a run's output: the evaluation at its start and its end."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, quiet=not is_main())
    console.print(files.table())
    console.print(f"figures, videos, metrics.csv and summary.json are in {files.folder}")


def begin(config: RunConfig) -> StopSignal:
    """What comes before the first use of a device. Returns the signal to stop."""
    require_trackers(config)
    join_hosts(config.distributed)
    setup_devices(config.cache)
    return StopSignal()


@contextlib.contextmanager
def faults_in_one_line():
    """Ends the program with one line where a request cannot be met (code 2) or a run cannot go on (code 1)."""
    try:
        yield
    except UsageError as error:
        die(str(error))
    except Fault as error:
        if not is_main():
            sys.exit(1)
        die(str(error), 1)


def train_and_record(
    programs: "Programs",
    files: RunFiles,
    stop: StopSignal,
    highlights: tuple[str, ...] = (),
    given: Callable[[], dict] | None = None,
) -> bool:
    """Trains from where the folder's run is to the end, and writes what comes of it -> whether it came to the end.

    Raises Fault where the run cannot go on; what was saved before stays.
    """
    from rich.console import Console

    config, console = programs.config, Console(highlight=False, soft_wrap=True, quiet=not is_main())
    if jax.process_count() == 1:  # several processes end together, or the others would wait for the one that is gone
        stop.give_up = lambda: print(f"stopped before the chunk's end; {where_to_go_on(files)}", flush=True)
    begins_with = given() if given and not config.resume else None  # here, so that its faults come before anything is compiled
    state, start = files.open(programs)
    if given and start == 0:
        state = with_given(state, programs.place(begins_with or given()))
    programs.compile()
    console.print(
        f"[bold]{files.method}[/bold]: {len(files.lanes)} seeds on {jax.device_count()} devices, "
        f"compiled in {programs.compile_s:.0f} s, writing to {files.folder}"
    )
    if start == 0:
        raise_anywhere(files.record(0, {}, programs.evaluate(state), None), files)
    profiled = min(start + config.log_every, config.num_updates - config.log_every)  # the second chunk, if there is one
    with progress_bar(console, config.num_updates, start) as bar:
        for t in range(start, config.num_updates, config.log_every):
            began = time.perf_counter()
            with tracing(files.folder / "profile", config.profile and t == profiled):
                state, metrics = programs.chunk(state, t)
            files.train_s += time.perf_counter() - began
            stopped = agree(stop.notice())
            record_chunk(programs, files, state, t, metrics, stopped)
            bar(t + config.log_every, files.latest(highlights))
            if stopped and t + config.log_every < config.num_updates:
                raise_anywhere(files.wait(), files)
                console.print(f"stopped after {t + config.log_every} updates; {where_to_go_on(files)}")
                return False
    raise_anywhere(files.wait(), files)
    raise_anywhere(files.finish(programs.compile_s), files)
    return True


def with_given(state, given: dict):
    """The state with the given fields; of a field that is a dict, with the given parts."""
    merge = lambda ours, theirs: ours | theirs if isinstance(ours, dict) else theirs
    return state._replace(**{name: merge(getattr(state, name), value) for name, value in given.items()})


def record_chunk(programs: "Programs", files: RunFiles, state, t: int, metrics: dict, stopped: bool) -> None:
    """Writes what came of the updates from t: metrics, and an evaluation and a checkpoint where they are due."""
    config, end = programs.config, t + programs.config.log_every
    finite, last = metrics.pop(FINITE), end == config.num_updates
    fine = finite.all() or config.allow_nan
    results = programs.evaluate(state) if end % config.eval_every == 0 or last else {}
    due = end % config.save_every == 0 or last or stopped
    raise_anywhere(files.record(end, metrics, results, snapshot(state) if due and fine else None), files)
    if not fine:
        raise_anywhere(files.wait(), files)
        words = what_broke(finite, metrics, files.lanes, t)
        raise Fault(f"{words}; --allow-nan goes on all the same; {where_to_go_on(files)}")


def what_broke(finite: np.ndarray, metrics: dict, lanes: list[dict], t: int) -> str:
    """The first update (counted from 1) whose parameters are not finite, in which lane, and which of its metrics are not."""
    update = int(np.argmin(finite.all(0)))
    lane = int(np.argmin(finite[:, update]))
    floats = {name: values[lane, update] for name, values in metrics.items() if np.issubdtype(values.dtype, np.floating)}
    names = [name for name, value in floats.items() if not np.isfinite(value)]
    names = ", ".join(sorted(names, key=lambda name: "loss" not in name)[:3])  # some may be NaN for another reason: losses first
    where = " ".join(f"{name} {value}" for name, value in lanes[lane].items())
    return f"update {t + update + 1}, {where}: the parameters are no longer finite" + (f", nor is {names}" if names else "")


def where_to_go_on(files: RunFiles) -> str:
    """Words for the end of a run that is not finished."""
    newest = files.newest_checkpoint()
    return f"saved in {newest}; to go on: --resume --out {files.whole}" if newest else "nothing was saved yet"


def raise_anywhere(problem: OSError | None, files: RunFiles) -> None:
    """Raises Fault on every process where the first has a problem with its files."""
    if agree(problem is not None):
        reason = (problem.strerror or str(problem)) if problem else "see the first process"
        raise Fault(f"{files.folder} cannot be written: {reason}; {where_to_go_on(files)}") from problem


def tracing(folder, wanted: bool):
    """A context in which JAX's profiler writes a trace."""
    return jax.profiler.trace(str(folder)) if wanted and is_main() else contextlib.nullcontext()


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
                return jax.lax.scan(with_check(train_of(choice).update), state, updates)

            return jax.vmap(scan, **over_lanes)(state, choices)

        def evaluate(state):
            return jax.vmap(lambda state, choice: train_of(choice).evaluate(state), **over_lanes)(state, choices)

        self._init = jax.jit(init, out_shardings=self.layout)
        self._chunk = jax.jit(chunk, in_shardings=(self.layout, None), out_shardings=self.layout, donate_argnums=0)
        self._evaluate = jax.jit(evaluate, in_shardings=(self.layout,), out_shardings=self.layout)
        self.state_shape = jax.eval_shape(init, self._seeds)  # also finds mistakes before the first compile

    def compile(self) -> None:
        """Compiles the training and evaluation programs, and counts the seconds."""
        began = time.perf_counter()
        updates = jax.ShapeDtypeStruct((self.config.log_every,), jnp.int32)
        self._chunk = self._chunk.lower(self.state_shape, updates).compile()
        self._evaluate = self._evaluate.lower(self.state_shape).compile()
        self.compile_s += time.perf_counter() - began
        meet()

    def init(self):
        """The first state of every lane."""
        began = time.perf_counter()
        if hasattr(self._init, "lower"):  # it is not compiled yet
            on_cpu = jax.default_backend() == "cpu"  # it runs once: not worth optimising, which takes most of compiling it
            options = {"xla_backend_optimization_level": 0} if on_cpu else {}
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
        return state, gather(metrics)

    def evaluate(self, state) -> dict:
        """The method's evaluation as numpy, a leading axis of lanes."""
        return gather(self._evaluate(state))


def with_check(update: Callable) -> Callable:
    """`update`, with a metric that says whether every leaf of the state with `params` in its name is finite."""

    def checked(state, t):
        state, metrics = update(state, t)
        leaves = jax.tree_util.tree_leaves_with_path(state)
        params = [x for path, x in leaves if "params" in jax.tree_util.keystr(path) and jnp.issubdtype(x.dtype, jnp.floating)]
        return state, metrics | {FINITE: jnp.array([jnp.isfinite(x).all() for x in params], bool).all()}

    return checked


def progress_bar(console, num_updates: int, start: int):
    """A context that gives `bar(update, metrics)`: updates, updates per second, time left, and the metrics."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn(compact=True))
    progress = Progress(*columns, TextColumn("{task.fields[metrics]}"), console=console, disable=not is_main())

    @contextlib.contextmanager
    def context():
        with progress:
            task = progress.add_task("", total=num_updates, completed=start, rate="", metrics="")
            began = time.perf_counter()

            def bar(update, metrics):
                rate = (update - start) / (time.perf_counter() - began)
                shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
                progress.update(task, completed=update, rate=f"{rate:.2g}/s", metrics=shown)

            yield bar

    return context()
