"""What every algorithm file promises, checked on each of them at a tiny size."""

import dataclasses
import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sizes import OWN, SIZES

from common.config import RunConfig
from common.devices import make_mesh
from common.run import Programs, train_fn

pytestmark = pytest.mark.timeout(600)
ROOT = Path(__file__).resolve().parents[2]
METHODS = sorted(path.stem for path in (ROOT / "algos").glob("[a-z]*.py"))
SMALL = dict(num_envs=4, num_steps=256, hidden=8, eval_episodes=1, num_epochs=1, num_minibatches=2)
SMALL |= dict(teacher_hidden=8, teacher_filters=2, search_every=2, search_batches=2, search_levels=8, search_steps=256)
SMALL |= dict(buffer_size=16, min_fill=0.2, replay_prob=0.9)  # 256 steps: an episode must end for its level to enter the buffer
SMALL |= dict(population_size=4, num_opponents=2, rl_minibatches=2, num_episodes=2, eval_learners=2)  # the trials of the shapers
SMALL |= dict(robot="hopper", batch_size=8, episode_length=10, num_cells=16, cvt_samples=64, num_emitters=2)
SMALL |= SIZES
RUN = dict(num_seeds=2, num_updates=4, log_every=2, eval_every=2, save_every=2)
VARIANTS = [(name, {}) for name in METHODS]
VARIANTS += [("shaper", {"method": "mfos", "averaging": "attention"}), ("shaper", {"method": "mfos", "trainer": "ppo"})]
VARIANTS += [("shaper_nplayer", {"num_shapers": 2, "repair": True})]
VARIANTS += [("plr", {"robust": False}), ("plr", {"parallel": True}), ("accel", {"parallel": True})]
VARIANTS += [("paired", {"score": "population_regret", "num_students": 3}), ("paired", {"score": "neg_return", "num_students": 1})]
VARIANTS += [("mix_me", {"emitter": "cma_me"})]
SHOWN = {
    "shaper": ("eval_shaper", None),
    "lola": ("eval_welfare", None),
    "shaper_nplayer": ("eval_shapers", None),
    "mix_me": ("qd_score", "elites"),
    "tracr": ("a_ce0", None),
    "finetuning": ("tuned_a", None),
    "genie": ("delta4_psnr", "controls"),
    "tizero": ("share_hard", "match"),
    "madrid": ("regret_again", "worst_matches"),
}  # the score and the film of evaluations


def learned(state):
    """What a method's State has learned: parameters, or the elites of an archive."""
    return state.params if hasattr(state, "params") else state.archive.genotype


def tiny(name, **changes):
    """The module and its smallest useful Config."""
    module = importlib.import_module(f"algos.{name}")
    fields = {field.name for field in dataclasses.fields(module.Config)}
    settings = SMALL | RUN | OWN.get(name, {}) | changes
    return module, dataclasses.replace(module.CPU, **{k: v for k, v in settings.items() if k in fields})


def make(name, **changes):
    module, config = tiny(name, **changes)
    return config, module.make_train(config)


@pytest.mark.parametrize("name", METHODS)
def test_file_says_how_to_run_it_and_what_differs(name):
    module, _ = tiny(name)
    for heading in ("Run:", "Expect:", "Differs from"):
        assert heading in module.__doc__
    assert f"python algos/{name}.py" in module.__doc__
    assert re.search(r"\b\d{4}\.\d{4,5}\b", module.__doc__), "no arXiv id"
    assert issubclass(module.Config, RunConfig) and module.Config.__dataclass_params__.frozen
    assert {module.CPU.preset, module.PAPER.preset} == {"cpu", "paper"}


@pytest.mark.parametrize("name", METHODS)
def test_imports_run_one_way(name):
    source = (ROOT / "algos" / f"{name}.py").read_text()
    assert not re.search(r"^(from|import) (algos|results|tests)\b", source, re.M)


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=lambda x: str(x))
def test_programs_are_fit_for_cpu_and_seeds(name, changes):
    """No convolution and no LAPACK under vmapped seeds; choices made from the shared index stay branches."""
    config, train = make(name, **changes)
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    states = jax.eval_shape(jax.vmap(train.init), keys)
    text = str(jax.make_jaxpr(jax.vmap(train.init))(keys))
    text += str(jax.make_jaxpr(jax.vmap(train.evaluate))(states))
    update = str(jax.make_jaxpr(jax.vmap(train.update, (0, None)))(states, jnp.int32(0)))
    used = set(re.findall(r"= (\w+)[\[ ]", text + update))
    assert "scan" in used and ("dot_general" in used or name in ("lola", "shaper"))  # tiny products are written out there
    assert not {name for name in used if re.match(r"conv_|qr|cholesky|eigh|svd|lu$|.*callback", name)}
    branching = name in ("sfl", "mix_me", "finetuning", "genie") or (
        name in ("accel", "plr") and getattr(config, "robust", True) and not config.parallel
    )
    assert ("cond[" in update) == branching


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=lambda x: str(x))
def test_trains_and_resumes(name, changes):
    """Two seeds: finite metrics of the right shape; learning changes the parameters; a run in two halves with its state taken
    through numpy ends bit for bit where one in one go does."""
    config, train = make(name, **changes)
    mesh = jax.make_mesh((1, 1), ("seed", "data"), devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        programs = Programs(config, train, mesh)
        start = jax.tree.map(np.asarray, learned(programs.init()))
        state = programs.init()
        whole, first = programs.chunk(state, 0)
        assert jax.tree.leaves(learned(state))[0].is_deleted(), "the chunk keeps a copy of its input"
        halfway = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, whole)
        halfway = jax.tree.map(np.array, halfway)
        whole, second = programs.chunk(whole, 2)
        again = halfway._replace(key=jax.random.wrap_key_data(jnp.asarray(halfway.key)))
        resumed, second_again = programs.chunk(programs.place(again), 2)
        results = {} if changes else programs.evaluate(resumed)
    assert all(value.shape == (2, 2) for value in first.values())
    assert_equal(second, second_again)
    assert_equal(whole, resumed)
    changed = jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != np.asarray(b)).any()), start, learned(whole)))
    assert any(changed), "nothing was learned"
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.tree.map(np.asarray, learned(whole))))
    assert not np.array_equal(*jax.tree.leaves(learned(whole))[0]), "the seeds do the same"
    if not changes:
        score, film = SHOWN.get(name, ("heldout_solve_rate", "labyrinth"))
        assert results[score].shape == (2,) and (film is None or results[film].dtype == np.uint8)


def assert_equal(a, b):
    """Bitwise equality of pytrees, keys included."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("name", ["accel", "paired", "shaper", "shaper_nplayer", "mix_me"])
def test_devices_agree(name):
    """One seed split over two devices, two seeds on two devices, and `jit(vmap(train_fn))` all give the same numbers."""
    # rounding turns an action now and then, and learners that learn from it make a trial chaotic: a short one shows what is split
    changes = dict(num_steps=4, num_episodes=2, num_opponents=1, sigma=0.04) if name.startswith("shaper") else {}
    config, train = make(name, num_seeds=2, **changes)
    expected, _ = jax.jit(jax.vmap(train_fn(train)))(jax.vmap(jax.random.key)(jnp.arange(2)))
    for num_seeds, shape in ((2, (2, 1)), (1, (1, 2))):
        config = dataclasses.replace(config, num_seeds=num_seeds)
        mesh = make_mesh(num_seeds, config.split_size)
        assert mesh.devices.shape == shape
        with jax.set_mesh(mesh):
            programs = Programs(config, train, mesh)
            programs._chunk = programs._chunk.lower(programs.state_shape, jnp.arange(2)).compile()
            text = programs._chunk.as_text()
            state, _ = programs.chunk(programs.init(), 0)
            state, _ = programs.chunk(state, 2)
        if shape == (2, 1):
            assert not re.search(r"all-reduce|all-gather|all-to-all|collective-permute", text), "seeds talk to each other"
        for x, y in zip(jax.tree.leaves(learned(state)), jax.tree.leaves(learned(expected)), strict=True):
            np.testing.assert_allclose(np.asarray(x), np.asarray(y)[:num_seeds], atol=2e-4)
