"""Checkpoints: bitwise round trips, refusals, damaged files, atomic writes."""

import builtins
import io
import itertools
import os
import tracemalloc
import zipfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from common.runs.checkpoint import CheckpointWriter, keep_last, load, newest_good, read_meta, save, snapshot, write_atomically
from common.runs.config import UsageError


class Pair(NamedTuple):
    left: object
    right: object


def make_tree():
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(3, 4)).astype(np.float32), "b": np.float32([np.nan, -0.0, np.inf, 1e-42])}
    params = jax.tree.map(jnp.asarray, weights)
    half = jnp.asarray(rng.normal(size=(2, 5)), jnp.bfloat16).at[0, 0].set(jnp.nan)
    return {
        "params": params,
        "optimiser": optax.adam(1e-3).init(params),
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(8), (2, 3)),
        "pair": Pair(half, [jnp.int32(-5), (jnp.array([True, False]), np.uint8([0, 255]))]),
        "half": jnp.bfloat16(1.5),
        "empty": (jnp.zeros((0, 3)), None, ()),
    }


def bits(leaf):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return str(jax.random.key_impl(leaf)), leaf.shape, np.array(jax.random.key_data(leaf)).tobytes()
    return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()


@pytest.mark.parametrize("only_shapes", [False, True])
def test_round_trip_is_bitwise(tmp_path, only_shapes):
    tree, path, meta = make_tree(), tmp_path / "deep" / "1.npz", {"update": 3, "rows": [{"a": 1.5, "b": None}], "text": "ä"}
    save(path, tree, meta)
    template = jax.eval_shape(make_tree) if only_shapes else jax.tree.map(lambda x: x, tree)
    back = load(path, template)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert jax.tree.map(bits, back) == jax.tree.map(bits, tree)
    assert isinstance(back["pair"], Pair) and type(back["optimiser"]) is type(tree["optimiser"])
    assert read_meta(path) == meta
    assert jax.random.uniform(back["key"]) == jax.random.uniform(tree["key"])
    assert [p.name for p in path.parent.iterdir()] == ["1.npz"]


def test_round_trip_of_another_kind_of_key(tmp_path):
    key = jax.random.key(9, impl="rbg")
    save(tmp_path / "1.npz", {"key": key}, {})
    assert bits(load(tmp_path / "1.npz", {"key": key})["key"]) == bits(key)


def plain_tree(**changes):
    return {"a": np.zeros((2, 3), np.float32), "b": {"c": np.int32(1), "k": jax.random.key(0)}} | changes


OTHER = {
    "a name more": plain_tree(d=np.zeros(1)),
    "a name less": {"a": np.zeros((2, 3), np.float32)},
    "another name": {"A": np.zeros((2, 3), np.float32), "b": plain_tree()["b"]},
    "a shape": plain_tree(a=np.zeros((3, 2), np.float32)),
    "an axis": plain_tree(a=np.zeros((2, 3, 1), np.float32)),
    "float for int": plain_tree(a=np.zeros((2, 3), np.int32)),
    "width": plain_tree(a=np.zeros((2, 3), np.float64)),
    "half": plain_tree(a=jnp.zeros((2, 3), jnp.bfloat16)),
    "keys": plain_tree(b={"c": np.int32(1), "k": jax.random.split(jax.random.key(0))}),
    "kind of key": plain_tree(b={"c": np.int32(1), "k": jax.random.key(0, impl="rbg")}),
}


@pytest.mark.parametrize("other", OTHER.values(), ids=OTHER.keys())
@pytest.mark.parametrize("swap", [False, True])
def test_load_refuses_another_tree(tmp_path, other, swap):
    saved, template = (other, plain_tree()) if swap else (plain_tree(), other)
    save(tmp_path / "1.npz", saved, {})
    with pytest.raises(UsageError) as caught:
        load(tmp_path / "1.npz", template)
    assert str(tmp_path / "1.npz") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("kind", ["half", "key"])
def test_load_refuses_types_that_are_stored_as_the_same_integers(tmp_path, kind, swap):
    pairs = {"half": (jnp.ones(3, jnp.bfloat16), np.ones(3, np.uint16)), "key": (jax.random.key(0), np.zeros(2, np.uint32))}
    saved, template = reversed(pairs[kind]) if swap else pairs[kind]
    save(tmp_path / "1.npz", {"a": saved}, {})
    with pytest.raises(UsageError):
        load(tmp_path / "1.npz", {"a": template})


class Loud:
    """Unpickling it would leave a trace."""

    def __reduce__(self):
        return exec, ("import builtins; builtins.unpickled = True",)


def swap_part(path, name, array):
    """Puts another array into a checkpoint."""
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **arrays | {name: array})


def test_pickled_objects_are_refused(tmp_path):
    boxed, path = np.array([Loud()], dtype=object), tmp_path / "1.npz"
    save(path, {"a": np.zeros(1)}, {})
    swap_part(path, "a", boxed)
    with pytest.raises(ValueError, match="pickle"):
        load(path, {"a": np.zeros(1)})
    save(path, {"a": np.zeros(1)}, {})
    swap_part(path, "__meta__", boxed)
    with pytest.raises(ValueError, match="pickle"):
        read_meta(path)
    assert newest_good(tmp_path) is None
    assert not hasattr(builtins, "unpickled")


def rewrite(path, change, **options):
    """Writes a checkpoint's parts anew, each as `change(name, data)` has it (name -> data), with zipfile's own options."""
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, data in change(parts):
            file.writestr(name, data)


def header(shape, dtype="<f4"):
    """The head of an array that is not there."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


HOSTILE = {
    "bomb": (lambda parts: [*parts.items(), ("a.npy", header((1 << 24,)) + bytes(1 << 26))], "packed"),
    "huge shape": (lambda parts: [*(parts | {"a.npy": header((1 << 40, 1 << 20))}).items()], "declares"),
    "more than it holds": (lambda parts: [*(parts | {"a.npy": header((51,), "<i8") + bytes(400)}).items()], "declares"),
    "negative": (lambda parts: [*(parts | {"a.npy": header((-5, -10), "<i8") + bytes(400)}).items()], "declares"),
    "path up": (lambda parts: [*parts.items(), ("../../etc/x.npy", b"")], "name"),
    "absolute path": (lambda parts: [*parts.items(), ("/etc/x.npy", b"")], "name"),
    "other file": (lambda parts: [*parts.items(), ("run.py", b"print()")], "name"),
    "twice": (lambda parts: [*parts.items(), *parts.items()], "twice"),
    "meta of objects": (lambda parts: [*(parts | {"__meta__.npy": header((), "|O") + b"cos"}).items()], "pickle"),
    "meta is a list": (lambda parts: [*(parts | {"__meta__.npy": text_array("[1]")}).items()], "does not say"),
    "meta is deep": (lambda parts: [*(parts | {"__meta__.npy": text_array("[" * 100_000)}).items()], "recursion"),
}


def text_array(text):
    file = io.BytesIO()
    np.save(file, np.array(text))
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_in_little_memory(tmp_path, capsys, case):
    change, word = HOSTILE[case]
    save_numbered(tmp_path, 1, 2)
    path = tmp_path / "00000002.npz"
    rewrite(path, change, compression=zipfile.ZIP_DEFLATED if case == "bomb" else zipfile.ZIP_STORED)
    tracemalloc.start()
    found = newest_good(tmp_path)
    if found[0] == path:  # the head of an array is read when the array is wanted
        with pytest.raises(ValueError, match=word):
            load(path, {"a": np.arange(50)})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    said = capsys.readouterr().out
    assert found[0] == path or (found[1] == {"update": 1} and word in said and said.count("\n") == 1)
    assert peak < 20e6


def test_a_shape_that_differs_is_refused_before_data_is_read(tmp_path):
    save(tmp_path / "1.npz", {"a": np.zeros(10_000_000)}, {})
    tracemalloc.start()
    with pytest.raises(UsageError, match="10000000"):
        load(tmp_path / "1.npz", {"a": np.zeros(3)})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


# --- which file to go on from


def save_numbered(folder, *numbers, size=50):
    for i in numbers:
        save(folder / f"{i:08d}.npz", {"a": np.arange(size) + i}, {"update": i})


def test_newest_good_is_the_newest(tmp_path):
    assert newest_good(tmp_path) is None and newest_good(tmp_path / "missing") is None
    save_numbered(tmp_path, 5, 20, 100)
    (tmp_path / "99999999.txt").write_text("not a checkpoint")
    assert newest_good(tmp_path) == (tmp_path / "00000100.npz", {"update": 100})


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
    elif how == "truncated":
        data = data[: len(data) * 2 // 3]
    elif how == "empty":
        data = b""
    elif how == "text":
        data = b"this is no zip file\n" * 50
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "text"])
def test_newest_good_passes_over_damage(tmp_path, capsys, how):
    save_numbered(tmp_path, 1, 2, 3, size=1000)  # so that the middle of the file is data
    damage(tmp_path / "00000003.npz", how)
    assert newest_good(tmp_path) == (tmp_path / "00000002.npz", {"update": 2})
    said = capsys.readouterr().out
    assert "00000003.npz" in said and "00000002" not in said
    damage(tmp_path / "00000002.npz", how)
    damage(tmp_path / "00000001.npz", how)
    assert newest_good(tmp_path) is None


def test_newest_good_needs_meta(tmp_path):
    save_numbered(tmp_path, 1)
    np.savez(tmp_path / "00000002.npz", a=np.zeros(3))
    np.savez(tmp_path / "00000003.npz", a=np.zeros(3), __meta__=np.array("{not json"))
    assert newest_good(tmp_path)[1] == {"update": 1}


def test_no_flipped_byte_does_harm(tmp_path, capsys):
    """Whichever byte is flipped, the file is passed over or reads as it was written."""
    save_numbered(tmp_path, 1, 2)
    path = tmp_path / "00000002.npz"
    whole, passed_over = path.read_bytes(), 0
    for i, flip in itertools.product(range(len(whole)), (0x01, 0xFF)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ flip]) + whole[i + 1 :])
        found, meta = newest_good(tmp_path)
        capsys.readouterr()
        if found == path:
            assert meta == {"update": 2}
            np.testing.assert_array_equal(load(path, {"a": np.arange(50)})["a"], np.arange(50) + 2)
        passed_over += found != path
    assert passed_over > len(whole)


def test_keep_last(tmp_path):
    save_numbered(tmp_path, 1, 30, 4, 200, 1000)
    (tmp_path / "notes.txt").write_text("")
    keep_last(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000200.npz", "00001000.npz", "notes.txt"]
    keep_last(tmp_path, 5)
    assert len(list(tmp_path.glob("*.npz"))) == 2


# --- writing


def test_write_atomically(tmp_path):
    path = tmp_path / "new" / "file"
    write_atomically(path, lambda file: file.write(b"first"))
    assert path.read_bytes() == b"first"

    def replace(file):
        file.write(b"second")
        file.flush()
        assert path.read_bytes() == b"first"  # nothing is seen of it until it is whole

    write_atomically(path, replace)
    assert path.read_bytes() == b"second"
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_write_atomically_keeps_the_old_file_when_the_writer_raises(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path):
    save_numbered(tmp_path, 1)
    with pytest.raises(TypeError):
        save(tmp_path / "00000001.npz", {"a": np.zeros(3)}, {"update": object()})
    assert newest_good(tmp_path)[1] == {"update": 1}


# --- writing beside the training


def test_a_snapshot_outlives_its_buffers():
    """A donated buffer's memory is used again: on CPU what device_get gives would change with it."""
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros(100_000)
    held = snapshot({"x": x})
    for _ in range(3):
        x = jax.block_until_ready(step(x))
    assert (held.arrays["x"] == 0).all() and held.types == {"x": "float32"}


def test_the_writer_keeps_the_newest_and_hands_errors_over(tmp_path):
    writer = CheckpointWriter(tmp_path / "c", keep=2)
    for update in (1, 2, 30):
        writer.write(update, snapshot({"a": jnp.full(3, update)}), {"update": update})
    writer.wait()
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["00000002.npz", "00000030.npz"]
    assert load(tmp_path / "c" / "00000030.npz", {"a": jnp.zeros(3, int)})["a"].tolist() == [30, 30, 30]
    (tmp_path / "file").write_text("")
    writer = CheckpointWriter(tmp_path / "file" / "c", keep=2)
    writer.write(1, snapshot({}), {})
    with pytest.raises(OSError):
        writer.write(2, snapshot({}), {})


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """The order that survives a power cut: the file's data, the renaming, the folder's data."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, real=real, name=name: (calls.append(name), real(*args))[1])
    write_atomically(tmp_path / "file", lambda file: file.write(b"x"))
    assert calls == ["fsync", "replace", "fsync"]
