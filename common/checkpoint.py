"""Checkpoints: any pytree in one .npz file, written atomically, read without executing anything.

Zip files carry a checksum of every member, so a damaged file is noticed when it is read.
"""

import json
import os
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
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


def _stored(leaf):
    """What a file holds of a leaf: a key's data, the bits of a bfloat16 (which numpy does not know), else the leaf itself."""
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf.view(jnp.uint16) if leaf.dtype == jnp.bfloat16 else leaf


def _restored(array: np.ndarray, like):
    if _is_key(like):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(jnp.empty((), like.dtype)))
    return array.view(jnp.bfloat16) if like.dtype == jnp.bfloat16 else array


def save(path: Path, tree, meta: dict) -> None:
    """Writes every leaf of `tree` under its path's name, and `meta` (JSON values) beside them."""
    leaves = _named_leaves(tree)
    arrays = {name: np.asarray(_stored(leaf)) for name, leaf in leaves}
    types = {name: str(leaf.dtype) for name, leaf in leaves}
    arrays[META] = np.array(json.dumps({"meta": meta, "types": types}))
    write_atomically(path, lambda file: np.savez(file, **arrays))


def read_meta(path: Path) -> dict:
    """The `meta` of a checkpoint."""
    with np.load(path, allow_pickle=False) as file:
        return json.loads(str(file[META]))["meta"]


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
        types = json.loads(str(file[META]))["types"]
        for name, like in wanted:
            array, stored = file[name], jax.eval_shape(_stored, like) if _is_key(like) else like
            if types[name] != str(like.dtype) or array.shape != stored.shape:
                raise UsageError(f"{path}: {name} is {types[name]}{list(array.shape)}, this run has {like.dtype}{list(like.shape)}")
            leaves.append(_restored(array, like))
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
        except (OSError, EOFError, RuntimeError, ValueError, KeyError, zipfile.BadZipFile) as error:
            reason = str(error)
        print(f"passing over the damaged checkpoint {path}: {reason}")
    return None


def keep_last(folder: Path, count: int) -> None:
    """Removes all but the `count` newest checkpoints."""
    for path in sorted(folder.glob("*.npz"))[:-count]:
        path.unlink()
