"""The smallest useful settings of methods, for the tests that go through all of them."""

from pathlib import Path

SIZES = dict(sweep="single", eval_strings=8, candidates=2)  # the study of tracr as one setting
SIZES |= dict(pretrain_updates=2, finetune_updates=1, batch_size=8, width=8, layers=1, heads=2, length=16, window=5, occurrence=1)
SIZES |= dict(priors=(0.999,), finetune_lrs=(1e-3,), eval_size=8, eval_stories=2, probe_size=16, probe_updates=2)
OWN = {"genie": dict(data="dots")}  # a setting that another method has in another sense
SIZES |= dict(size=16, lam_patch=8, num_frames=5, prompt_frames=1, num_codes=16, code_dim=8, heads=2, ffn=2)
SIZES |= dict(tokenizer_updates=2, tokenizer_batch=4, tokenizer_width=16, lam_width=16, dynamics_width=16, maskgit_steps=2)
SIZES |= dict(encoder_blocks=1, decoder_blocks=1, lam_blocks=1, dynamics_blocks=1, eval_clips=4, warmup=1, tokenizer_warmup=1)
OWN |= {"tizero": dict(num_matches=8, num_groups=2, horizon=8, league_size=2, eval_matches=2, film_steps=3, final_matches=0)}
SMALL_LEAGUE = str(Path(__file__).parent / "data" / "small_league.npz")  # three random teams, four units wide
OWN |= {"madrid": dict(league=SMALL_LEAGUE, references=("league",), num_checkpoints=1, candidates=8, repeats=2, duels=2)}
OWN["madrid"] |= dict(horizon=4, final_repeats=2, chunk=16, emitter="cma", num_emitters=2)
