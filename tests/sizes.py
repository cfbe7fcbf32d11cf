"""The smallest useful settings of every method: one Config each, so that its programs are compiled once for all its tests."""

import dataclasses
import importlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHODS = sorted(path.stem for path in (ROOT / "algos").glob("[a-z]*.py"))
RUN = dict(num_seeds=2, num_updates=4, log_every=2, eval_every=4, save_every=2)
SIZES = dict(num_envs=4, num_steps=256, hidden=8, eval_episodes=1, num_epochs=1, num_minibatches=2)
SIZES |= dict(teacher_hidden=8, teacher_filters=2, search_every=2, search_batches=2, search_levels=8, search_steps=256)
SIZES |= dict(buffer_size=16, min_fill=0.2, replay_prob=0.9)  # 256 steps: an episode must end for its level to enter the buffer
SIZES |= dict(population_size=4, num_opponents=2, rl_minibatches=2, num_episodes=2, eval_learners=2)  # the trials of the shapers
SIZES |= dict(robot="hopper", batch_size=8, episode_length=10, num_cells=16, cvt_samples=64, num_emitters=2)
SIZES |= dict(sweep="single", eval_strings=8, candidates=2)  # the study of tracr as one setting
SIZES |= dict(pretrain_updates=2, finetune_updates=1, width=8, layers=1, heads=2, length=16, window=5, occurrence=1)
SIZES |= dict(priors=(0.999,), finetune_lrs=(1e-3,), eval_size=8, eval_stories=2, probe_size=16, probe_updates=2)
SIZES |= dict(size=16, lam_patch=8, num_frames=5, prompt_frames=1, num_codes=16, code_dim=8, ffn=2)
SIZES |= dict(tokenizer_updates=2, tokenizer_batch=4, tokenizer_width=16, lam_width=16, dynamics_width=16, maskgit_steps=2)
SIZES |= dict(encoder_blocks=1, decoder_blocks=1, lam_blocks=1, dynamics_blocks=1, eval_clips=4, warmup=1, tokenizer_warmup=1)
SMALL_LEAGUE = str(Path(__file__).parent / "data" / "small_league.npz")  # three random teams, four units wide
OWN = {"genie": dict(data="dots")}  # a setting that another method has in another sense
OWN |= {"tizero": dict(num_matches=8, num_groups=2, horizon=8, league_size=2, eval_matches=2, film_steps=3, final_matches=0)}
OWN |= {"madrid": dict(league=SMALL_LEAGUE, references=("league",), num_checkpoints=1, candidates=8, repeats=2, duels=2)}
OWN["madrid"] |= dict(horizon=4, final_repeats=2, chunk=16, emitter="cma", num_emitters=2)
OWN["hgap"] = dict(episodes=8, window=8, pool=4, codes_per_step=2, num_codes=8, latent=8, width=16, layers=2, prior_width=16)
OWN["hgap"] |= dict(vqvae_updates=2, samples=4, horizon=8, plan_every=2, eval_steps=4, mlp_hidden=8, bc_batch=8, offline_batch=8)
OWN["hgap"] |= dict(prior_layers=1)
OWN["humanoid_experts"] = dict(num_steps=4, eval_steps=4)

VARIANTS = [("shaper", {"method": "mfos", "averaging": "attention"}), ("shaper", {"method": "mfos", "trainer": "ppo"})]
VARIANTS += [("shaper_nplayer", {"num_shapers": 2, "repair": True})]
VARIANTS += [("plr", {"robust": False}), ("plr", {"parallel": True}), ("accel", {"parallel": True})]
VARIANTS += [("paired", {"score": "population_regret", "num_students": 3}), ("paired", {"score": "neg_return", "num_students": 1})]
VARIANTS += [("mix_me", {"emitter": "cma_me"})]


def tiny(name, **changes):
    """A method's module and its smallest useful Config."""
    module = importlib.import_module(f"algos.{name}")
    module.Config.compiler_options = {}  # for programs that run long: here they would take three times as long to compile
    fields = {field.name for field in dataclasses.fields(module.Config)}
    settings = RUN | SIZES | OWN.get(name, {}) | changes
    return module, dataclasses.replace(module.CPU, **{k: v for k, v in settings.items() if k in fields})


def presets(module):
    """All named presets of a method's module: the Configs that it defines."""
    return {x.preset: x for x in vars(module).values() if isinstance(x, module.Config)}


def flags(name, **changes):
    """The command line of `tiny`."""
    module, config = tiny(name, **changes)
    words = lambda value: [str(x) for x in (value if isinstance(value, tuple) else (value,))]
    changed = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    changed = {k: v for k, v in changed.items() if v != getattr(module.CPU, k)}
    line = []
    for field, value in changed.items():
        flag = field.replace("_", "-")
        line += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", *words(value)]
    return line
