"""Checkpoints: any pytree in one .npz file, written atomically, read without executing anything.

Zip files carry a checksum of every member, so a damaged file is noticed when it is read. What is read was written by `save`
or it is refused: sizes and types are compared with what is expected before memory is taken.
"""

import contextlib
import json
import math
import os
import re
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from common.runs.config import UsageError
from common.runs.hosts import gather

META = "__meta__"


def write_atomically(path: Path, write) -> None:
    """`write(file)` fills a temporary neighbour (binary), which then takes the place of `path` in one step, for good."""
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
    with contextlib.suppress(PermissionError):  # Windows opens no folders; what a power cut then loses is the rename alone
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# --- leaves


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


def _stored_like(like):
    """The shape and type of `_stored`."""
    if _is_key(like):
        return jax.eval_shape(_stored, like)
    return jax.ShapeDtypeStruct(like.shape, jnp.uint16) if like.dtype == jnp.bfloat16 else like


def _restored(array: np.ndarray, like):
    if _is_key(like):
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(jnp.empty((), like.dtype)))
    return array.view(jnp.bfloat16) if like.dtype == jnp.bfloat16 else array


# --- writing


class Snapshot(NamedTuple):
    """A pytree's leaves by their paths' names, copied to the host."""

    arrays: dict[str, np.ndarray]
    types: dict[str, str]


def snapshot(tree) -> Snapshot:
    """Copies a pytree to the host, on every process; its buffers may be given away afterwards."""
    leaves = _named_leaves(tree)
    arrays = {name: np.array(gather(_stored(leaf))) for name, leaf in leaves}  # a copy: on CPU device_get gives a view
    return Snapshot(arrays, {name: str(leaf.dtype) for name, leaf in leaves})


def write_snapshot(path: Path, held: Snapshot, meta: dict) -> None:
    """Writes every leaf under its name, and `meta` (JSON values) beside them."""
    text = np.array(json.dumps({"meta": meta, "types": held.types}))
    write_atomically(path, lambda file: np.savez(file, **held.arrays, **{META: text}))


def save(path: Path, tree, meta: dict) -> None:
    """Writes every leaf of `tree` under its path's name, and `meta` (JSON values) beside them."""
    write_snapshot(path, snapshot(tree), meta)


def checkpoint_path(folder: Path, update: int) -> Path:
    """The file of an update's checkpoint."""
    return folder / f"{update:08d}.npz"


def checkpoints_in(folder: Path) -> list[Path]:
    """The files that `checkpoint_path` names, oldest first; whatever else lies there is passed over."""
    return sorted((path for path in folder.glob("*.npz") if re.fullmatch(r"[0-9]{8,}", path.stem)), key=lambda path: int(path.stem))


def keep_last(folder: Path, count: int) -> None:
    """Removes all but the `count` newest checkpoints."""
    for path in checkpoints_in(folder)[:-count]:
        path.unlink()


class CheckpointWriter:
    """Writes checkpoints in a thread of its own, one at a time, while training goes on. An error comes out at the next call."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self._thread, self._pending = ThreadPoolExecutor(1), Future()
        self._pending.set_result(None)

    def write(self, update: int, held: Snapshot, meta: dict) -> None:
        """Begins to write; waits for the one before."""
        self.wait()
        self._pending = self._thread.submit(self._write, update, held, meta)

    def _write(self, update: int, held: Snapshot, meta: dict) -> None:
        write_snapshot(checkpoint_path(self.folder, update), held, meta)
        keep_last(self.folder, self.keep)

    def wait(self) -> None:
        """Returns when all is on the disk."""
        self._pending.result()

    def close(self) -> None:
        """Ends the thread, once it has written what it was given."""
        self._thread.shutdown()


# --- reading


def _check_members(archive: zipfile.ZipFile, size: int) -> None:
    """Raises ValueError for what `save` never writes: packed members, more data than the file holds, odd or repeated names."""
    infos = archive.infolist()
    for info in infos:
        parts = info.filename.split("/")
        if not info.filename.endswith(".npy") or "\\" in info.filename or "" in parts or ".." in parts:
            raise ValueError(f"it has a part with the name {info.filename!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"its part {info.filename!r} is packed")
    if len({info.filename for info in infos}) < len(infos):
        raise ValueError("a name occurs twice")
    if sum(info.file_size for info in infos) > size:
        raise ValueError("it declares more data than it holds")


def _read_header(archive: zipfile.ZipFile, name: str) -> tuple[np.dtype, tuple[int, ...]]:
    """The type and shape that a member declares, which must be of the size that it has. Reads no data."""
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"its part {name!r} is of version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        size = archive.getinfo(f"{name}.npy").file_size - file.tell()
    if dtype.hasobject:
        raise ValueError(f"its part {name!r} holds pickled objects")
    if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"its part {name!r} declares {dtype}{list(shape)} and holds {size} bytes")
    return dtype, shape


def _read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _open(file: BinaryIO | Path) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(file)
    _check_members(archive, os.path.getsize(file) if isinstance(file, Path) else file.seek(0, os.SEEK_END))
    return archive


def _read_text(archive: zipfile.ZipFile) -> dict:
    dtype, shape = _read_header(archive, META)
    text = json.loads(str(_read(archive, META))) if dtype.kind == "U" and shape == () else None
    if not (isinstance(text, dict) and isinstance(text.get("meta"), dict) and isinstance(text.get("types"), dict)):
        raise ValueError("it does not say what it holds")
    return text


def read_meta(file: BinaryIO | Path) -> dict:
    """The `meta` of a checkpoint."""
    with _open(file) as archive:
        return _read_text(archive)["meta"]


def check_fits(file: BinaryIO | Path, template, path: Path) -> None:
    """Raises UsageError unless the file's leaves are the template's (names, shapes, types); reads no data. `path` is for words."""
    wanted = _named_leaves(template)
    with _open(file) as archive:
        types, held = _read_text(archive)["types"], {name.removesuffix(".npy") for name in archive.namelist()} - {META}
        differing = {name for name, _ in wanted} ^ held
        if differing:
            raise UsageError(f"{path} holds another method's state: {sorted(differing)[0]} is only on one side")
        for name, like in wanted:
            (dtype, shape), stored = _read_header(archive, name), _stored_like(like)
            if types.get(name) != str(like.dtype) or dtype != stored.dtype or shape != stored.shape:
                has, needs = f"{types.get(name)} {dtype}{list(shape)}", f"{like.dtype}{list(stored.shape)}"
                raise UsageError(f"{path}: {name} is {has}, this run has {needs}")


def load(file: BinaryIO | Path, template, path: Path | None = None):
    """Reads a checkpoint into the structure of `template` (arrays or shapes) -> the pytree, its leaves numpy arrays or keys.

    `path` names the file in messages.
    Raises UsageError if the file's leaves are not the template's (names, shapes, types), ValueError if it is no checkpoint.
    """
    check_fits(file, template, path or file)
    with _open(file) as archive:
        leaves = [_restored(_read(archive, name), like) for name, like in _named_leaves(template)]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def newest_good(folder: Path) -> tuple[Path, dict] | None:
    """The newest checkpoint in a folder that reads without a fault, and its meta; damaged ones are reported and passed over."""
    for path in reversed(checkpoints_in(folder)):
        try:
            with _open(path) as archive:
                damaged = archive.testzip()
            if damaged is None:
                return path, read_meta(path)
            reason = f"its part {damaged} fails the checksum"
        except Exception as error:  # whatever a damaged or hostile file makes zipfile, numpy or json raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
        print(f"passing over the damaged checkpoint {path}: {reason}")
    return None
