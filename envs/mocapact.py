"""Reads MoCapAct's rollouts (2208.07363): how experts in physics repeat recorded human motion, the data of H-GAP (2312.02682).

Needs h5py. The files are those of the dataset's small and large parts (licence: CDLA Permissive 2.0), one a recording, as its
README.md and distillation/rollout_experts.py describe them:

    observable_indices/walker/NAME              (n,) int: the columns of an observation, by name
    CMU_009_12-165-363/                         a snippet: recording, first and last frame; all that begin with CMU are read
        0/, 1/, ...                             episodes: first those from the snippet's start, then those from within
            observations/proprioceptive         (T + 1, columns) float32
            actions                             (T, 56) float32: as carried out, the expert's with noise of 0.1

and mean_actions, rewards, values, advantages, early_termination, metrics and statistics, which are not read. Observations and
actions are as the world gave and took them, not normalised: whoever wants that finds means and variances in the files.

Each observation is paired with the action that followed it; an episode's last observation, which none follows, is left out.
"""

import contextlib
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.runs.config import UsageError, require
from envs.cmu_humanoid import OBS_PARTS, OBS_SIZE

NUM_ACTIONS = 56
SENSORS = ("accelerometer", "gyro", "torque", "touch", "velocimeter")  # called sensors_NAME in the files
PIP = "pip install 'nightjax[physics]'"


class Rollouts(NamedTuple):
    """E episodes, filled up with zeros behind their last step."""

    obs: np.ndarray  # (E, T, 224) float32, as envs/cmu_humanoid.py describes it
    action: np.ndarray  # (E, T, 56) float32
    length: np.ndarray  # (E,) int32: steps that are there


class Recording(NamedTuple):
    """Where an episode is."""

    file: Path
    label: str  # of the file, for messages
    name: str  # its group in the file
    columns: np.ndarray  # (224,) int: of its observations, in the order of OBS_PARTS
    steps: int


def read(path: str | Path, min_steps: int = 16) -> Rollouts:
    """The episodes of a file, or of all .hdf5 files in a folder, by name; those of fewer than `min_steps` steps are left out.

    All are held in memory: 1.1 kB a step, and every episode takes as much as the longest. Raises UsageError, one line, for a path
    that holds none, a file that is not of this form or is damaged, numbers that are not finite, and without h5py.
    """
    path = Path(path)
    what = f"--data {path}"
    try:
        import h5py  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{what}: needs a reader of HDF5 files: {PIP}") from error
    require(path.exists(), f"{what}: there is no such file; give an .hdf5 file of MoCapAct's rollouts, or a folder of them")
    found = []
    for file in files_of(path):
        label = f"{what}: {file.name}" if path.is_dir() else what
        with opened(file, label) as held:
            found.extend(episodes_of(held, file, label))
    kept = [episode for episode in found if episode.steps >= max(min_steps, 1)]
    longest = max((episode.steps for episode in found), default=0)
    words = f"{what}: holds {len(found)} episodes, of at most {longest} steps: at least one of {min_steps} is needed"
    require(kept, words)
    return gathered(kept, what)


def files_of(path: Path) -> list[Path]:
    """The files that a path stands for. Raises UsageError for a folder without one."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.glob("*.hdf5") if not file.name.startswith("."))
    require(files, f"--data {path}: holds no .hdf5 file")
    return files


@contextlib.contextmanager
def opened(file: Path, label: str):
    """An open HDF5 file. Raises UsageError where it is none, and where it turns out to be damaged while it is open."""
    import h5py

    reason = lambda error: str(error).partition("\n")[0]
    try:
        held = h5py.File(file, "r")
    except OSError as error:
        raise UsageError(f"{label}: not an HDF5 file ({reason(error)})") from error
    with held:
        try:
            yield held
        except (OSError, KeyError, RuntimeError) as error:
            raise UsageError(f"{label}: cannot be read ({reason(error)})") from error


def dataset(held, name: str, label: str):
    """A file's array of numbers. Raises UsageError where it is missing or something else."""
    import h5py

    require(name in held, f"{label}: {name} is missing: this is no file of MoCapAct's rollouts, or not all of one")
    found = held[name]
    numbers = isinstance(found, h5py.Dataset) and found.shape is not None and found.dtype.kind in "fiu"
    require(numbers, f"{label}: {name} is no array of numbers")
    return found


def episodes_of(held, file: Path, label: str) -> list[Recording]:
    """A file's episodes, snippet by snippet. Raises UsageError where something is missing or has another size."""
    columns = columns_of(held, label)
    snippets = [name for name in held if name.startswith("CMU")]
    require(snippets, f"{label}: CMU_... is missing: no group of rollouts")
    episodes = []
    for snippet in snippets:
        group = held[snippet]
        names = sorted((name for name in group if name.isdecimal()), key=int) if hasattr(group, "keys") else []
        require(names, f"{label}: {snippet}/0 is missing: no episode")
        for name in names:
            steps = steps_of(held, f"{snippet}/{name}", columns, label)
            episodes.append(Recording(file, label, f"{snippet}/{name}", columns, steps))
    return episodes


def columns_of(held, label: str) -> np.ndarray:
    """Where an observation's parts are among the file's, (224,) int, in the order of OBS_PARTS."""
    columns = []
    for part, size in OBS_PARTS.items():
        name = f"observable_indices/walker/{f'sensors_{part}' if part in SENSORS else part}"
        found = dataset(held, name, label)
        require(found.size == size, f"{label}: {name} has {found.size} numbers: must be {size}")
        columns.append(np.asarray(found[()], np.int64).reshape(-1))
    columns = np.concatenate(columns)
    require(columns.min() >= 0, f"{label}: observable_indices has {columns.min()}: must not be negative")
    return columns


def steps_of(held, name: str, columns: np.ndarray, label: str) -> int:
    """An episode's steps. Raises UsageError where its arrays are not of one length or not wide enough."""
    action, obs = (dataset(held, f"{name}/{part}", label) for part in ("actions", "observations/proprioceptive"))
    fits = action.ndim == 2 and action.shape[1] == NUM_ACTIONS
    require(fits, f"{label}: {name}/actions is {list(action.shape)}: must be [steps, {NUM_ACTIONS}]")
    rows, width = len(action) + 1, columns.max() + 1
    fits = obs.ndim == 2 and len(obs) == rows and obs.shape[1] >= width
    words = f"must be [{rows}, {width} or more], one row more than actions"
    require(fits, f"{label}: {name}/observations/proprioceptive is {list(obs.shape)}: {words}")
    return len(action)


def gathered(episodes: list[Recording], what: str) -> Rollouts:
    """The numbers of episodes. Raises UsageError where they are not finite or do not fit."""
    num, longest = len(episodes), max(episode.steps for episode in episodes)
    try:
        obs, action = (np.zeros((num, longest, size), np.float32) for size in (OBS_SIZE, NUM_ACTIONS))
    except MemoryError as error:
        size = 4 * num * longest * (OBS_SIZE + NUM_ACTIONS) >> 20
        raise UsageError(f"{what}: holds {size} MB of numbers, which do not fit into memory: give fewer files") from error
    for (file, label), of_file in itertools.groupby(enumerate(episodes), lambda item: item[1][:2]):
        with opened(file, label) as held, np.errstate(over="ignore"):
            for i, (_, _, name, columns, steps) in of_file:
                obs[i, :steps] = held[f"{name}/observations/proprioceptive"][:steps][:, columns]
                action[i, :steps] = held[f"{name}/actions"][()]
                for kind, x in (("observations/proprioceptive", obs), ("actions", action)):
                    require(np.isfinite(x[i]).all(), f"{label}: {name}/{kind} has numbers that are not finite")
    return Rollouts(obs, action, np.array([episode.steps for episode in episodes], np.int32))
