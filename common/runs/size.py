"""How large a run would be, for `--dry-run`: everything is traced, nothing is compiled or written."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core


def bytes_of(shape_or_array) -> int:
    """The bytes of an array or a shape; those of a key are its data's."""
    if jnp.issubdtype(shape_or_array.dtype, jax.dtypes.prng_key):
        shape_or_array = jax.eval_shape(jax.random.key_data, shape_or_array)
    return math.prod(shape_or_array.shape) * np.dtype(shape_or_array.dtype).itemsize


def tree_bytes(tree) -> int:
    """The bytes of a pytree's leaves."""
    return sum(bytes_of(x) for x in jax.tree.leaves(tree))


def _inner(eqn) -> list[core.Jaxpr]:
    """The programs inside a step: a loop's body, a branch's sides."""
    parts = [part for value in eqn.params.values() for part in (value if isinstance(value, tuple | list) else (value,))]
    closed = [part.jaxpr for part in parts if isinstance(part, core.ClosedJaxpr)]
    return closed + [part for part in parts if isinstance(part, core.Jaxpr)]


def peak_bytes(jaxpr: core.Jaxpr) -> int:
    """The most that a program's values take at one time, if its steps are done one by one, in order, and a value is dropped after
    its last use. What XLA fuses takes less, what it does ahead of time more."""
    sizes = lambda variables: sum(bytes_of(v.aval) for v in variables if isinstance(v, core.Var))
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if isinstance(v, core.Var)}
    last |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if isinstance(v, core.Var)}
    live = peak = sizes([*jaxpr.invars, *jaxpr.constvars])
    for i, eqn in enumerate(jaxpr.eqns):
        within = max((peak_bytes(part) - sizes([*part.invars, *part.outvars]) for part in _inner(eqn)), default=0)
        live += sizes(eqn.outvars)
        peak = max(peak, live + max(within, 0))
        live -= sizes({v for v in [*eqn.invars, *eqn.outvars] if isinstance(v, core.Var) and last.get(v, i) == i})
    return peak


def learned(state):
    """What a method's State has learned: its parameters, or the elites of its archive."""
    return state.params if hasattr(state, "params") else state.archive.genotype


def measure(train) -> dict[str, int]:
    """Of one seed of a method (a `Train`): the number of its parameters; bytes of its state, and at the most in an update and in an
    evaluation, the state included. Traces them, and so finds what does not fit together."""
    state = jax.eval_shape(train.init, jax.eval_shape(lambda: jax.random.key(0)))
    programs = {
        "update": jax.make_jaxpr(train.update)(state, jax.ShapeDtypeStruct((), jnp.int32)),
        "evaluation": jax.make_jaxpr(train.evaluate)(state),
    }
    found = {name: peak_bytes(program.jaxpr) for name, program in programs.items()}
    return {"parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(learned(state))), "state": tree_bytes(state), **found}


def in_words(count: int) -> str:
    """Bytes for people, such as 1.2 GB."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} bytes"


def say_how_large(config, train, mesh: jax.sharding.Mesh, num_lanes: int) -> str:
    """What --dry-run prints. `num_lanes`: what is trained side by side: seeds, or every setting's seeds."""
    found, (groups, parts) = measure(train), mesh.devices.shape
    unit, each = ("seed" if num_lanes == config.num_seeds else "lane"), num_lanes // groups
    whole = in_words(found["state"] * num_lanes)
    lines = {
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}, {each} of {num_lanes} {unit}s on each",
        "batch": f"{config.split_size} a {unit}" + (f", {config.split_size // parts} of them on each device" if parts > 1 else ""),
        "parameters": f"{found['parameters']:,} a {unit}",
        "state": f"{in_words(found['state'])} a {unit}, {whole} in all (a checkpoint)",
    }
    for name in ("update", "evaluation"):
        here = each * (found["state"] + (found[name] - found["state"]) // parts)
        lines[name] = f"at most about {in_words(found[name])} a {unit}, {in_words(here)} a device; less where XLA fuses"
    head = f"preset {config.preset}: {config.num_updates} updates; nothing was compiled or written"
    return "\n".join([head, *(f"  {name:<11} {words}" for name, words in lines.items())])
