"""MoCapAct's rollouts are read as they were written, and what is no such file is named."""

import sys

import numpy as np
import pytest

from common.runs.config import UsageError
from envs.cmu_humanoid import OBS_PARTS, OBS_SIZE
from envs.mocapact import SENSORS, read

h5py = pytest.importorskip("h5py")

SPARE = 7  # columns of other observations, before and behind each part


def write(path, snippets, seed=0):
    """A file of MoCapAct's form with episodes of these steps: {snippet: (steps, ...)} -> what `read` is to give, an episode each.

    The parts lie in another order than that of observations, with others between them.
    """
    rng, expected, first = np.random.default_rng(seed), [], SPARE
    with h5py.File(path, "w") as file:
        places = {}
        for part, size in reversed(OBS_PARTS.items()):
            places[part] = np.arange(first, first + size)
            file[f"observable_indices/walker/{'sensors_' * (part in SENSORS)}{part}"] = places[part]
            first += size + SPARE
        file["observable_indices/walker/time_in_clip"] = np.arange(SPARE)
        file["ref_steps"], file["n_start_rollouts"], file["n_rsi_rollouts"] = np.arange(1, 6), 1, 1
        file["stats/proprio_mean"], file["stats/proprio_var"] = np.full(first, 5.0), np.full(first, 9.0)
        for snippet, lengths in snippets.items():
            for i, steps in enumerate(lengths):
                obs = rng.normal(size=(steps + 1, first)).astype(np.float32)
                action = rng.uniform(-1, 1, (steps, 56)).astype(np.float32)
                group = file.create_group(f"{snippet}/{i}")
                group["observations/proprioceptive"], group["actions"] = obs, action
                group["mean_actions"], group["rewards"] = action + 1, np.ones(steps, np.float32)
                expected.append((np.concatenate([obs[:-1, places[part]] for part in OBS_PARTS], 1), action))
            file[f"{snippet}/early_termination"] = np.zeros(len(lengths), bool)
            file[f"{snippet}/start_metrics/episode_lengths"] = np.array(lengths[:1])
    return expected


def assert_holds(found, expected):
    """Rollouts hold these episodes, and zeros behind them."""
    longest = max(len(action) for _, action in expected)
    assert found.obs.shape == (len(expected), longest, OBS_SIZE) and found.action.shape == (len(expected), longest, 56)
    assert found.obs.dtype == found.action.dtype == np.float32 and found.length.dtype == np.int32
    for i, (obs, action) in enumerate(expected):
        assert found.length[i] == len(action)
        np.testing.assert_array_equal(found.obs[i, : len(obs)], obs)
        np.testing.assert_array_equal(found.action[i, : len(action)], action)
        assert not found.obs[i, len(obs) :].any() and not found.action[i, len(action) :].any()


def test_a_file(tmp_path):
    """Snippets by name, episodes by number: 10 comes after 9. The order of columns in the file does not matter."""
    path = tmp_path / "CMU_009_12.hdf5"
    expected = write(path, {"CMU_009_12-0-198": (20, 16), "CMU_009_12-165-363": tuple(range(17, 29))})
    assert_holds(read(path), expected)
    assert_holds(read(str(path)), expected)


def test_a_folder(tmp_path):
    """Files by name; others are not looked at."""
    later = write(tmp_path / "CMU_016_22.hdf5", {"CMU_016_22-0-82": (30, 18)}, 1)
    first = write(tmp_path / "CMU_009_12.hdf5", {"CMU_009_12-0-198": (16,)}, 2)
    (tmp_path / "dataset_metrics.npz").write_bytes(b"something else")
    (tmp_path / "._CMU_009_12.hdf5").write_bytes(b"something else")
    assert_holds(read(tmp_path), first + later)


def test_short_episodes_are_left_out(tmp_path):
    expected = write(tmp_path / "a.hdf5", {"CMU_1-0-9": (15, 40, 16), "CMU_2-0-9": (3,)})
    assert_holds(read(tmp_path), [expected[1], expected[2]])
    assert_holds(read(tmp_path, min_steps=41 - 1), [expected[1]])
    assert_holds(read(tmp_path, min_steps=0), expected)
    refused(tmp_path, "holds 4 episodes, of at most 40 steps: at least one of 41 is needed", 41)


def refused(path, words, min_steps=16):
    """`read` says this, and the path, in one line."""
    with pytest.raises(UsageError) as error:
        read(path, min_steps)
    message = str(error.value)
    assert message.startswith(f"--data {path}: ") and words in message and "\n" not in message, message


def test_what_is_no_file_of_rollouts(tmp_path):
    refused(tmp_path / "none.hdf5", "there is no such file")
    refused(tmp_path, "holds no .hdf5 file")
    path = tmp_path / "a.hdf5"
    for content in (b"", b"not HDF5" * 100):
        path.write_bytes(content)
        refused(path, "not an HDF5 file")
        refused(tmp_path, "a.hdf5: not an HDF5 file")


def test_a_file_that_is_cut_off(tmp_path):
    path = tmp_path / "a.hdf5"
    write(path, {"CMU_1-0-9": (200,)})
    path.write_bytes(path.read_bytes()[:-100_000])
    refused(path, "")


def change(path, name, value=None):
    """Replaces what a file holds under a name, or takes it away."""
    with h5py.File(path, "a") as file:
        del file[name]
        if value is not None:
            file[name] = value


OBS, ACTION, PLACES = "CMU_1-0-9/1/observations/proprioceptive", "CMU_1-0-9/1/actions", "observable_indices/walker"
WIDTH = OBS_SIZE + SPARE * len(OBS_PARTS)  # the last columns that are read end here
SHAPED = np.zeros((21, WIDTH), np.float32)
WRONG = {
    "no columns": (PLACES, None, f"{PLACES}/actuator_activation is missing"),
    "no part": (f"{PLACES}/sensors_touch", None, f"{PLACES}/sensors_touch is missing"),
    "no snippet": ("CMU_1-0-9", None, "CMU_... is missing"),
    "no episode": ("CMU_1-0-9", np.zeros(3), "CMU_1-0-9/0 is missing"),
    "no actions": (ACTION, None, f"{ACTION} is missing"),
    "no observations": (OBS, None, f"{OBS} is missing"),
    "actions that are words": (ACTION, "walk", f"{ACTION} is no array of numbers"),
    "another robot": (f"{PLACES}/joints_pos", np.arange(21), "joints_pos has 21 numbers: must be 56"),
    "no place": (f"{PLACES}/body_height", np.array([-1]), "observable_indices has -1: must not be negative"),
    "other actions": (ACTION, np.zeros((20, 21)), f"{ACTION} is [20, 21]: must be [steps, 56]"),
    "one action": (ACTION, np.zeros(56), f"{ACTION} is [56]: must be [steps, 56]"),
    "too few columns": (OBS, SHAPED[:, :-1], f"{OBS} is [21, {WIDTH - 1}]: must be [21, {WIDTH} or more]"),
    "too few rows": (OBS, SHAPED[:-1], f"{OBS} is [20, {WIDTH}]: must be [21, {WIDTH} or more], one row more than actions"),
    "NaN seen": (OBS, np.where(np.arange(21)[:, None] == 19, np.nan, SHAPED), f"{OBS} has numbers that are not finite"),
    "infinite action": (ACTION, np.full((20, 56), np.inf), f"{ACTION} has numbers that are not finite"),
    "too large for 32 bits": (ACTION, np.full((20, 56), 1e300), f"{ACTION} has numbers that are not finite"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_within_a_file(tmp_path, case):
    """It is named, also within a folder."""
    name, value, words = WRONG[case]
    path = tmp_path / "a.hdf5"
    write(path, {"CMU_1-0-9": (30, 20)})
    change(path, name, value)
    refused(path, words)
    refused(tmp_path, f"a.hdf5: {words}" if case not in ("another robot", "no place") else words)


def test_without_h5py(tmp_path, monkeypatch):
    write(tmp_path / "a.hdf5", {"CMU_1-0-9": (16,)})
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused(tmp_path, "pip install 'nightjax[physics]'")
