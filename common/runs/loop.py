"""The run of a method: every seed in one program over the devices, in chunks of updates, with logs, checkpoints and figures."""

import contextlib
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from common.runs.checkpoint import snapshot
from common.runs.command import die, method_name
from common.runs.config import Fault, RunConfig, UsageError
from common.runs.devices import idle_devices, make_mesh, setup_devices
from common.runs.files import RunFiles
from common.runs.hosts import agree, is_main, join_hosts, settings_of_first
from common.runs.programs import FINITE, Programs, Train
from common.runs.size import say_how_large
from common.runs.stop import StopSignal
from common.runs.trackers import require_trackers


def run(
    config: RunConfig, make_train: Callable[[Any], Train], highlights: tuple[str, ...] = (), given: Callable[[], dict] | None = None
) -> Path | None:
    """Trains, evaluates, logs and saves, then prints a table. `highlights` name the metrics shown beside the progress bar.
    `given()` are fields of the State, or parts of those that are dicts, as numpy with an axis of seeds, with which a new run
    begins instead of `init`'s. -> the run's folder, or None if it did not come to its end.

    Ends the program with one line and code 2 if the request cannot be met, before anything is compiled or overwritten; with one
    line and code 1 if the run cannot go on. Works in a session in which JAX was used before, and gives back what it takes there.
    """
    with faults_in_one_line(), begin(config) as stop:
        config = settings_of_first(config)
        mesh = make_mesh(config.num_seeds, config.split_size)
        with jax.set_mesh(mesh):
            if config.dry_run:
                return say_size(config, make_train(config), mesh, config.num_seeds)
            files = RunFiles(config, method_of(make_train))
            if train_and_record(Programs(config, make_train(config), mesh), files, stop, highlights, given):
                print_results(files)
                return files.folder


def method_of(make_train: Callable) -> str:
    """The method's name: of the file that is run, or of the module in a session."""
    module = getattr(make_train, "__module__", "__main__")
    return method_name() if module == "__main__" else module.rpartition(".")[2]


def say_size(config: RunConfig, train: Train, mesh: jax.sharding.Mesh, num_lanes: int) -> None:
    """Prints how large a run would be (--dry-run)."""
    if is_main():
        print(f"{method_name()}, {say_how_large(config, train, mesh, num_lanes)}")


def print_results(files: RunFiles) -> None:
    """Ends a run's output: the evaluation at its start and its end."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True, quiet=not is_main())
    console.print(files.table())
    console.print(f"figures, videos, metrics.csv and summary.json are in {files.folder}", markup=False)


def begin(config: RunConfig) -> StopSignal:
    """What comes before the first use of a device. -> the signal to stop, to be entered."""
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
    programs: Programs,
    files: RunFiles,
    stop: StopSignal,
    highlights: tuple[str, ...] = (),
    given: Callable[[], dict] | None = None,
) -> bool:
    """Trains from where the folder's run is to the end, and writes what comes of it -> whether it came to the end.

    Raises Fault where the run cannot go on; what was saved before stays.
    """
    try:
        return _train_and_record(programs, files, stop, highlights, given)
    finally:
        files.close()


def _train_and_record(programs: Programs, files: RunFiles, stop: StopSignal, highlights, given) -> bool:
    from rich.console import Console

    config, console = programs.config, Console(highlight=False, soft_wrap=True, quiet=not is_main())
    if jax.process_count() == 1:  # several processes end together, or the others would wait for the one that is gone
        stop.give_up = lambda: print(f"stopped before the chunk's end; {where_to_go_on(files)}", flush=True)
    begins_with = given() if given and not config.resume else None  # here, so that its faults come before anything is compiled
    state, start = files.open(programs)
    if given and start == 0:
        state = with_given(state, programs.place(begins_with or given()))
    programs.compile()
    mesh = programs.layout.mesh
    console.print(
        f"{files.method}: {len(files.lanes)} seeds on {mesh.size} devices, "
        f"compiled in {programs.compile_s:.0f} s, writing to {files.folder}",
        markup=False,
    )
    if idle := idle_devices(mesh, len(files.lanes), config.split_size):
        console.print(idle, markup=False)
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
            bar(t + config.log_every, files.rows.latest(highlights))
            if stopped and t + config.log_every < config.num_updates:
                raise_anywhere(files.wait(), files)
                console.print(f"stopped after {t + config.log_every} updates; {where_to_go_on(files)}", markup=False)
                return False
    raise_anywhere(files.wait(), files)
    raise_anywhere(files.finish(programs.compile_s, mesh.size), files)
    require_folder(files, config.num_updates, state)
    return True


def with_given(state, given: dict):
    """The state with the given fields; of a field that is a dict, with the given parts."""
    merge = lambda ours, theirs: ours | theirs if isinstance(ours, dict) else theirs
    return state._replace(**{name: merge(getattr(state, name), value) for name, value in given.items()})


def record_chunk(programs: Programs, files: RunFiles, state, t: int, metrics: dict, stopped: bool) -> None:
    """Writes what came of the updates from t: metrics, and an evaluation and a checkpoint where they are due."""
    config, end = programs.config, t + programs.config.log_every
    finite, last = metrics.pop(FINITE), end == config.num_updates
    fine = finite.all() or config.allow_nan
    results = programs.evaluate(state) if end % config.eval_every == 0 or last else {}
    require_folder(files, end, state, lambda: files.add(end, metrics, results))
    due = end % config.save_every == 0 or last or stopped
    raise_anywhere(files.record(end, metrics, results, snapshot(state) if due and fine else None), files)
    if not fine:
        raise_anywhere(files.wait(), files)
        words = what_broke(finite, metrics, files.lanes, t)
        raise Fault(f"{words}; --allow-nan goes on all the same; {where_to_go_on(files)}")


def require_folder(files: RunFiles, update: int, state, first: Callable[[], Any] = lambda: None) -> None:
    """Raises Fault where somebody has taken the run's folder away, once its state is saved elsewhere; `first` comes before that."""
    if agree(files.lost()):
        first()
        words = files.rescue(update, snapshot(state))
        raise Fault(f"{files.folder} is gone, or another run has taken it; update {update} is {words}")


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
    return f"saved in {newest}; to go on: --resume --out {shlex.quote(str(files.whole))}" if newest else "nothing was saved yet"


def raise_anywhere(problem: OSError | None, files: RunFiles) -> None:
    """Raises Fault on every process where the first has a problem with its files."""
    if agree(problem is not None):
        reason = (problem.strerror or str(problem)) if problem else "see the first process"
        raise Fault(f"{files.folder} cannot be written: {reason}; {where_to_go_on(files)}") from problem


def tracing(folder, wanted: bool):
    """A context in which JAX's profiler writes a trace."""
    return jax.profiler.trace(str(folder)) if wanted and is_main() else contextlib.nullcontext()


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
