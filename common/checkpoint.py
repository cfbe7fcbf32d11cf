"""Checkpoints: any pytree in one .npz file, written atomically, read without executing anything.

Zip files carry a checksum of every member, so a damaged file is noticed when it is read.
"""

import json
import os
import zipfile
from pathlib import Path

import jax
import numpy as np

from common.config import UsageError

META = "__meta__"


def write_atomically(path: Path, write) -> None:
    """`write(file)` fills a temporary neighbour (binary), which then takes the place of `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _named_leaves(tree) -> list[tuple[str, object]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _is_key(leaf) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _as_numpy(leaf) -> np.ndarray:
    array = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
    return array.view(np.uint16) if array.dtype == jax.numpy.bfloat16 else array


def save(path: Path, tree, meta: dict) -> None:
    """Writes every leaf of `tree` under its path's name, and `meta` (JSON values) beside them."""
    arrays = {name: _as_numpy(leaf) for name, leaf in _named_leaves(tree)}
    arrays[META] = np.array(json.dumps(meta))
    write_atomically(path, lambda file: np.savez(file, **arrays))


def read_meta(path: Path) -> dict:
    """The `meta` of a checkpoint."""
    with np.load(path, allow_pickle=False) as file:
        return json.loads(str(file[META]))


def load(path: Path, template):
    """Reads a checkpoint into the structure of `template` (arrays or shapes) -> the pytree, its leaves numpy arrays or keys.

    Raises UsageError if the file's leaves are not the template's (names, shapes, types).
    """
    leaves = []
    with np.load(path, allow_pickle=False) as file:
        wanted = _named_leaves(template)
        differing = {name for name, _ in wanted} ^ (set(file.files) - {META})
        if differing:
            raise UsageError(f"{path} holds another method's state: {sorted(differing)[0]} is only on one side")
        for name, like in wanted:
            is_key, is_bf16 = _is_key(like), like.dtype == jax.numpy.bfloat16
            expected = jax.eval_shape(jax.random.key_data, like) if is_key else like
            array = file[name]
            dtype = np.dtype(np.uint16) if is_bf16 else expected.dtype
            if array.shape != expected.shape or array.dtype != dtype:
                raise UsageError(f"{path}: {name} is {array.dtype}{list(array.shape)}, this run has {dtype}{list(expected.shape)}")
            array = array.view(jax.numpy.bfloat16) if is_bf16 else array
            leaves.append(jax.random.wrap_key_data(array) if is_key else array)
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def newest_good(folder: Path) -> tuple[Path, dict] | None:
    """The newest checkpoint in a folder that reads without a fault, and its meta; damaged ones are reported and passed over."""
    for path in sorted(folder.glob("*.npz"), reverse=True):
        try:
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()
            if damaged is None:
                return path, read_meta(path)
            reason = f"its part {damaged} fails the checksum"
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            reason = str(error)
        print(f"passing over the damaged checkpoint {path}: {reason}")
    return None


def keep_last(folder: Path, count: int) -> None:
    """Removes all but the `count` newest checkpoints."""
    for path in sorted(folder.glob("*.npz"))[:-count]:
        path.unlink()
