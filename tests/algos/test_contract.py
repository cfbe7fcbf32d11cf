"""What every algorithm file promises, checked on each of them at a tiny size. A method's programs are traced and compiled once, for
all tests of it."""

import csv
import dataclasses
import importlib.util
import json
import re
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sizes import METHODS, ROOT, VARIANTS, presets, tiny

import common.runs.loop
from common.runs.checkpoint import load
from common.runs.command import cli
from common.runs.config import RunConfig
from common.runs.files import RunFiles
from common.runs.loop import train_and_record
from common.runs.programs import train_fn
from common.runs.size import learned, measure
from common.standalone import export

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
    "hgap": ("return_forward", "tasks"),
    "humanoid_experts": ("upright_s", "skills"),
}  # the score and the film of evaluations
STOP = SimpleNamespace(notice=lambda: False, give_up=None)  # the signal that never comes


def build(module, config, shape=None):
    """The programs of a method's module (its file, or the exported one's) over the tests' two devices."""
    parts = module if hasattr(module, "Programs") else common.runs.loop
    mesh = parts.make_mesh(config.num_seeds, config.split_size)
    assert shape is None or mesh.devices.shape == shape
    with jax.set_mesh(mesh):
        return parts.Programs(config, module.make_train(config), mesh)


def traced(programs):
    """The three programs of a method, traced: chunks of updates, the start, evaluations."""
    updates = jax.ShapeDtypeStruct((programs.config.log_every,), jnp.int32)
    with jax.set_mesh(programs.layout.mesh):
        return {
            "chunk": programs._chunk.trace(programs.state_shape, updates),
            "init": programs._init.trace(programs._seeds),
            "evaluate": programs._evaluate.trace(programs.state_shape),
        }


def text_of(programs):
    """What the programs lower to, names of places in files left out."""
    return {part: program.lower().as_text() for part, program in programs.items()}


@pytest.fixture(scope="module", params=METHODS)
def method(request, tmp_path_factory):
    """A method: its name, module, tiny Config; its programs, traced and lowered, to be compiled by the test that runs them; and the
    text that the exported file's lower to."""
    name = request.param
    module, config = tiny(name)
    jax.clear_caches()  # names of functions in the text are counted from what JAX has met before
    exported = text_of(traced(build(*load_exported(name, config, tmp_path_factory.mktemp(name)))))
    jax.clear_caches()
    programs = build(module, config)
    found = traced(programs)
    yield SimpleNamespace(
        name=name, module=module, config=config, programs=programs, traced=found, text=text_of(found), exported=exported
    )
    jax.clear_caches()


def load_exported(name, config, folder):
    """A method's exported file as a module, and the same settings as its Config."""
    text = export(ROOT / "algos" / f"{name}.py")
    assert not re.search(r"^\s*(from|import) (algos|common|envs|results)\b", text, re.M)
    path = folder / f"my_{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[path.stem]
    return module, module.Config(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)})


def test_file_says_how_to_run_it_and_what_differs(method):
    module = method.module
    for heading in ("Run:", "Expect:", "Differs from"):
        assert heading in module.__doc__
    assert f"python algos/{method.name}.py" in module.__doc__
    assert re.search(r"\b\d{4}\.\d{4,5}\b", module.__doc__), "no arXiv id"
    assert issubclass(module.Config, RunConfig) and module.Config.__dataclass_params__.frozen
    assert {module.CPU.preset, module.PAPER.preset} == {"cpu", "paper"}


def test_imports_run_one_way(method):
    source = (ROOT / "algos" / f"{method.name}.py").read_text()
    assert not re.search(r"^(from|import) (algos|results|tests)\b", source, re.M)


def test_help_names_every_flag(method, capsys):
    with pytest.raises(SystemExit) as stop:
        cli(method.module.Config, method.module.__doc__, {"cpu": method.module.CPU}, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and method.module.__doc__.split()[0] in text
    for field in dataclasses.fields(method.config):
        assert f"--{field.name.replace('_', '-')}" in text or "Positional" in str(field.type), field.name
    assert "Updates between two checkpoints" in text


def assert_fit(name, config, programs):
    """No convolution and no LAPACK under vmapped seeds, no call of the host; choices made from the shared index stay branches."""
    text = {part: str(program.jaxpr) for part, program in programs.items()}
    used = set(re.findall(r"= (\w+)[\[ ]", " ".join(text.values())))
    assert "scan" in used and ("dot_general" in used or name in ("lola", "shaper"))  # tiny products are written out there
    assert not {name for name in used if re.match(r"conv_|qr|cholesky|eigh|svd|lu$|.*callback", name)}
    branching = name in ("sfl", "mix_me", "finetuning", "genie", "hgap") or (
        name in ("accel", "plr") and getattr(config, "robust", True) and not config.parallel
    )
    assert ("cond[" in text["chunk"]) == branching


def test_programs_are_fit_for_cpu_and_seeds(method):
    assert_fit(method.name, method.config, method.traced)


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=str)
def test_variants_are_fit_for_cpu_and_seeds(name, changes):
    module, config = tiny(name, **changes)
    assert_fit(name, config, traced(build(module, config)))


def test_the_papers_presets_are_whole(method):
    """All that are named after the paper, traced at full size, as --dry-run does. Nothing is compiled but evosax's constants, which
    are single operations."""
    compiled = []
    listen = lambda event, seconds, **about: compiled.append(about) if event.endswith("backend_compile_duration") else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for name, config in presets(method.module).items():
            if "paper" not in name:
                continue
            config = dataclasses.replace(config, dry_run=True)
            found = measure(method.module.make_train(config))
            assert 0 < found["parameters"] * 4 <= found["state"] <= min(found["update"], found["evaluation"]), name
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    names = {re.sub(r"jit\(_?(.*)\)", r"\1", about["fun_name"]) for about in compiled}
    assert not {name for name in names if not hasattr(jax.lax, name) and not hasattr(jnp, name)} - {"stage"}  # evosax's constants
    assert any("paper" in name for name in presets(method.module))


def test_an_exported_file_is_the_same_programs(method):
    """Its functions lower to the very text that the original's lower to, so it trains, evaluates and is laid out as that does."""
    for part, text in method.text.items():
        same = method.exported[part] == text  # not compared by pytest, which would show how megabytes differ
        assert same, part


def test_trains_resumes_and_writes_its_files(method, tmp_path, monkeypatch):
    """Two seeds on two devices: learning changes the parameters, which stay finite; the seeds do not talk to each other; and a run
    that goes on from its middle ends bit for bit where it did, files included."""
    curves = {}  # what is drawn; that it can be is shown in test_command.py and with the toy, and takes longer than to train
    monkeypatch.setattr("common.runs.pictures.save_curves", lambda path, drawn, unit: curves.update(drawn))
    config, programs = dataclasses.replace(method.config, out=str(tmp_path / "run")), method.programs
    with jax.set_mesh(programs.layout.mesh):
        programs.init()
        programs.compile()
        with jax.debug_nans():  # what did not happen is no fault
            assert train_and_record(programs, RunFiles(config, method.name), STOP)
        collective = r"all-reduce|all-gather|all-to-all|collective-permute"
        assert not re.search(collective, programs._chunk.as_text()), "seeds talk to each other"
        state = programs.init()
        start = jax.tree.map(np.asarray, learned(state))
        programs.chunk(state, 0)
        assert jax.tree.leaves(learned(state))[0].is_deleted(), "the chunk keeps a copy of its input"
        folder, held = tmp_path / "run", (tmp_path / "run" / "metrics.csv").read_bytes()
        whole = load(folder / "checkpoints" / "00000004.npz", programs.state_shape)
        (folder / "checkpoints" / "00000004.npz").unlink()
        assert train_and_record(programs, RunFiles(dataclasses.replace(config, resume=True), method.name), STOP)
    assert_equal(load(folder / "checkpoints" / "00000004.npz", programs.state_shape), whole)
    assert (folder / "metrics.csv").read_bytes() == held
    assert_learned(start, whole)
    score, film = SHOWN.get(method.name, ("heldout_solve_rate", "labyrinth"))
    final = json.loads((folder / "summary.json").read_text())["final"]
    assert len(final[score]) == 2 and score in curves and (film is None or (folder / "videos" / f"{film}.gif").exists())
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [(row["update"], row["seed"]) for row in rows] == [(t, s) for t in "024" for s in "01"]


def assert_learned(start, state):
    """The seeds' parameters have changed, are finite and differ."""
    after = jax.tree.map(np.asarray, learned(state))
    changed = jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), start, after))
    assert any(changed), "nothing was learned"
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
    assert not np.array_equal(*jax.tree.leaves(after)[0]), "the seeds do the same"


def assert_equal(a, b):
    """Bitwise equality of pytrees, keys included."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=str)
def test_variants_train(name, changes):
    module, config = tiny(name, **changes)
    programs = build(module, config)
    with jax.set_mesh(programs.layout.mesh):
        state = programs.init()
        start = jax.tree.map(np.asarray, learned(state))
        for t in (0, 2):
            state, metrics = programs.chunk(state, t)
            assert all(value.shape == (2, 2) for value in metrics.values())
    assert_learned(start, state)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if "num_updates" in tiny(name)[0].Config.may_grow])
def test_nothing_depends_on_how_long_a_run_that_may_grow_is(name):
    """So a finished run that goes on ends where a longer one would have: its update is the very same program."""
    module, config = tiny(name)

    def text(num):
        train = module.make_train(dataclasses.replace(config, num_updates=num))
        state = jax.eval_shape(train.init, jax.eval_shape(lambda: jax.random.key(0)))
        return str(jax.make_jaxpr(train.update)(state, jnp.int32(0)))

    same = text(4) == text(400)
    assert same


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dr", "accel", "paired", "shaper", "shaper_nplayer", "mix_me"])
def test_devices_agree(name):
    """One seed split over two devices, two seeds on two devices, and `jit(vmap(train_fn))` all give the same numbers."""
    # rounding turns an action now and then, and learners that learn from it make a trial chaotic: a short one shows what is split
    changes = dict(num_steps=4, num_episodes=2, num_opponents=1, sigma=0.04) if name.startswith("shaper") else {}
    module, config = tiny(name, **changes)
    expected, _ = jax.jit(jax.vmap(train_fn(module.make_train(config))))(jax.vmap(jax.random.key)(jnp.arange(2)))
    for num_seeds, shape in ((2, (2, 1)), (1, (1, 2))):
        programs = build(module, dataclasses.replace(config, num_seeds=num_seeds), shape)
        with jax.set_mesh(programs.layout.mesh):
            state, _ = programs.chunk(programs.init(), 0)
            state, _ = programs.chunk(state, 2)
        for x, y in zip(jax.tree.leaves(learned(state)), jax.tree.leaves(learned(expected)), strict=True):
            np.testing.assert_allclose(np.asarray(x), np.asarray(y)[:num_seeds], atol=2e-4)
