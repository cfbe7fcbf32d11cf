"""Genie's parts, at sizes at which a fact can be checked by hand."""

import importlib.util
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import linalg, optimize

from algos import genie
from algos.genie import CPU
from common import st
from common.runs.config import UsageError
from envs import cloning
from envs.clip_metrics import frechet, information, perplexity, psnr
from envs.clips import Game, make_source

TINY = replace(
    CPU, data="dots", size=16, patch=8, lam_patch=8, num_frames=5, prompt_frames=1, num_codes=16, code_dim=8, heads=2, ffn=2,
    tokenizer_width=16, lam_width=16, dynamics_width=16, encoder_blocks=2, decoder_blocks=2, lam_blocks=2, dynamics_blocks=2,
    maskgit_steps=3, eval_clips=4,
)  # fmt: skip
SHAPE = (16, 16)


def frames_of(key, num=2, config=TINY):
    return jax.random.randint(key, (num, config.num_frames, *SHAPE, 3), 0, 256).astype(jnp.uint8)


def differs(a, b):
    """Along the second axis (time), whether anything differs."""
    a, b = np.asarray(a), np.asarray(b)
    return (np.abs(a - b) > 1e-5).any(axis=(0, *range(2, a.ndim)))


@pytest.mark.parametrize("kind", ["st_vivit", "vit", "c_vivit"])
def test_blocks_are_causal_and_cached_steps_equal_the_whole(kind):
    """A frame changes itself and (but for vit) those that can see it, none before; step by step gives the whole sequence's numbers,
    also beyond the window, where the oldest frames have left the cache."""
    spec, length = st.Spec(2, 3, kind, qk_norm=True), 8
    params = st.init_st(jax.random.key(0), 4, 6, (1, 3), 8, 2, TINY, kind)
    x = jax.random.normal(jax.random.key(1), (2, length, 3, 4))
    run = jax.jit(lambda x: st.st(params, x, spec)[0])
    whole, other = run(x), run(x.at[:, 2].add(1.0))
    sees = 1 if kind == "vit" else 1 + 2 * (spec.window - 1)  # two blocks
    assert list(differs(whole, other)) == [2 <= t < 2 + sees for t in range(length)]

    def step(cache, x):
        y, cache = st.st(params, x[:, None], spec, cache=cache)
        return cache, y[:, 0]

    start = st.init_cache(params, spec, 2, 3)
    _, steps = jax.jit(partial(jax.lax.scan, step))(start, x.swapaxes(0, 1))
    np.testing.assert_allclose(steps.swapaxes(0, 1), whole, atol=1e-5)


def test_attention_against_numpy():
    q, k, v = (jax.random.normal(key, (5, 2, 3)) for key in jax.random.split(jax.random.key(0), 3))
    mask = np.tril(np.ones((5, 5), bool))
    found = np.asarray(st.attend(q, k, v, mask)).reshape(5, 2, 3)
    for head in range(2):
        score = np.where(mask, np.asarray(q)[:, head] @ np.asarray(k)[:, head].T / np.sqrt(3), -np.inf)
        weight = np.exp(score) / np.exp(score).sum(1, keepdims=True)
        np.testing.assert_allclose(found[:, head], weight @ np.asarray(v)[:, head], atol=1e-5)


def test_rotary_positions_know_only_differences():
    """In a grid of 4 x 5: products of queries and keys are the same wherever two tokens are as far apart, and for no others."""
    row, column = places = st.places_of((4, 5), 21)
    assert row[[6, 19, 20]].tolist() == [1, 3, 0] and column[[6, 19, 20]].tolist() == [1, 4, 0]
    q, k = (jnp.broadcast_to(jax.random.normal(jax.random.key(i), (2, 8)), (21, 2, 8)) for i in range(2))
    product = np.asarray(jnp.einsum("qhc,khc->qkh", st.rotary(q, *places), st.rotary(k, *places)))
    at = lambda r, c: 5 * r + c
    np.testing.assert_allclose(product[at(0, 1), at(2, 0)], product[at(1, 4), at(3, 3)], atol=1e-5)
    for other in (at(1, 0), at(2, 1), at(3, 1)):
        assert np.abs(product[at(0, 1), at(2, 0)] - product[at(0, 1), other]).min() > 1e-3


def test_patches_come_back_and_hold_neighbours():
    frames = frames_of(jax.random.key(0))
    patches = st.patchify(frames, 8)
    np.testing.assert_allclose(patches[0, 1, 1].reshape(8, 8, 3), frames[0, 1, :8, 8:] / 255, atol=1e-6)
    np.testing.assert_allclose(st.unpatchify(patches, 8, SHAPE), frames / 255, atol=1e-6)


def test_quantiser_takes_the_nearest_and_lets_gradients_straight_through():
    codebook = jnp.array([[2.0, 0.0], [0.0, 0.5]])
    e = jnp.array([[0.6, 0.8], [0.8, 0.6]])
    q, index, *_ = genie.quantise(codebook, e)
    np.testing.assert_array_equal(index, [1, 0])
    np.testing.assert_allclose(q, [[0, 1], [1, 0]], atol=1e-6)
    weights = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_allclose(jax.grad(lambda e: (genie.quantise(codebook, e)[0] * weights).sum())(e), weights)
    assert not np.asarray(jax.grad(lambda codebook: sum(genie.quantise(codebook, e)[i].sum() for i in (0, 2)))(codebook)).any()
    assert np.abs(jax.grad(lambda e: genie.quantise(codebook, e)[2])(e)).sum() > 0.1, "the encoder does not keep to the codes"


def test_codes_follow_what_they_stand_for():
    codebook = jnp.array([[2.0, 0.0], [0.0, 0.5], [-1.0, 0.0]])
    e = jnp.array([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]])
    new = genie.follow(codebook, jnp.array([0, 0, 1]), e, 0.75)
    moved = 0.75 * np.array([1.0, 0.0]) + 0.25 * np.array([0.8, 0.4])
    np.testing.assert_allclose(new, [moved / np.linalg.norm(moved), [0, 1], [-1, 0]], atol=1e-6)
    np.testing.assert_allclose(genie.follow(codebook, jnp.array([0, 0, 1]), e, 1.0), [[1, 0], [0, 1], [-1, 0]], atol=1e-6)


def test_the_least_used_code_begins_anew_far_from_the_others():
    codebook, e = jnp.array([[1.0, 0], [0, 1], [1, 0]]), jnp.array([[1.0, 0], [0, 1], [-1, 0]])
    used, index = jnp.array([0.9, 0.02, 0.08]), jnp.array([0, 0])
    new, share = genie.restart(jax.random.key(0), codebook, used, index, e, 0.1)
    np.testing.assert_array_equal(new, [[1, 0], [-1, 0], [1, 0]])
    np.testing.assert_allclose(share, [0.98 * 0.9 + 0.02, 1 / 3, 0.98 * 0.08], rtol=1e-5)
    for least in (0.05, 0.0):  # 0.02 is above 0.05 / 3
        np.testing.assert_array_equal(genie.restart(jax.random.key(0), codebook, used, index, e, least)[0], codebook)


def test_nothing_of_the_next_frame_reaches_its_prediction_but_by_the_code():
    """The decoder's x_{t+1} depends on x_1..x_t and codes up to t; the code of t -> t + 1 on x_1..x_{t+1}."""
    params = genie.init_lam(jax.random.key(0), TINY, SHAPE)
    x = st.patchify(frames_of(jax.random.key(1)), 8)
    codes = jax.random.normal(jax.random.key(2), (2, 4, 8))
    run = jax.jit(lambda x, codes: (genie.infer_actions(params, x, TINY), genie.predict_next(params, x[:, :-1], codes, TINY)))
    (e, out), (e2, out2) = run(x, codes), run(x.at[:, 2].add(0.3), codes)
    assert list(differs(e, e2)) == [False, True, True, True]
    assert list(differs(out, out2)) == [False, False, True, True]
    assert list(differs(out, run(x, codes.at[:, 1].add(1.0))[1])) == [False, True, True, True]


def test_the_latent_actions_decoder_gets_codes_or_what_they_were_before_quantisation():
    config = replace(TINY, beta=0.0)
    params = genie.init_lam(jax.random.key(0), config, SHAPE)
    params["decoder"]["out"]["w"] *= 100  # at first the decoder changes next to nothing
    x = st.patchify(frames_of(jax.random.key(1), 2, config), config.lam_patch)
    e = genie.infer_actions(params, x, config)
    error_of = lambda codes: jnp.mean((genie.predict_next(params, x[:, :-1], codes, config) - x[:, 1:]) ** 2) / x.var()
    for bypass, codes in ((0.0, genie.quantise(params["codebook"], e)[0]), (1.0, e)):
        loss = genie.lam_loss(params, jax.random.key(2), x, replace(config, lam_bypass=bypass))[0]
        np.testing.assert_allclose(loss, error_of(codes), rtol=1e-5)
    assert abs(error_of(e) - error_of(genie.quantise(params["codebook"], e)[0])) > 1e-3


def test_masks_spare_the_first_frame_and_clean_contexts():
    draw = lambda config: np.asarray(genie.draw_mask(jax.random.key(0), (400, 5, 16), config))
    mask = draw(replace(TINY, clean_context=0.0))
    rate = mask[:, 1:].mean((1, 2))
    assert not mask[:, 0].any() and 0.7 < rate.mean() < 0.8 and rate.std() > 0.1  # one rate a clip, uniform in [0.5, 1]
    mask = draw(replace(TINY, clean_context=1.0, mask_low=1.0))
    assert set(mask.all(2).sum(1)) == {1, 2, 3, 4} and not (mask.any(2) != mask.all(2)).any()


@pytest.mark.parametrize("action_input", ["add", "prepend"])
def test_sampling_from_the_cache_equals_sampling_from_the_whole_past(action_input):
    """Greedy, a step a token: the frame drawn with cached keys is the one drawn by encoding all frames in every step."""
    config = replace(TINY, temperature=0.0, maskgit_steps=4, action_input=action_input)
    params = genie.init_dynamics(jax.random.key(0), config, SHAPE)
    prompt = jax.random.randint(jax.random.key(1), (3, 3, 4), 0, 16)
    codes = genie.lead_in(jax.random.normal(jax.random.key(2), (3, 3, 8)))
    found = jax.jit(lambda: genie.rollout(jax.random.key(3), params, prompt, codes, config))()
    np.testing.assert_array_equal(found[:, :3], prompt)

    whole = jax.jit(lambda tokens: genie.predict_tokens(params, tokens, codes, config)[0][:, -1])
    tokens = np.concatenate([prompt, np.full((3, 1, 4), 16)], axis=1)
    for kept in (1, 2, 3, 4):  # the cosine's share alone would be 0, 1, 2, 4
        log_p = np.asarray(jax.nn.log_softmax(whole(tokens)))
        for clip in range(3):
            hidden = [n for n in range(4) if tokens[clip, 3, n] == 16]
            surest = sorted(hidden, key=lambda n: -log_p[clip, n].max())[: kept - (4 - len(hidden))]
            for n in surest:
                tokens[clip, 3, n] = log_p[clip, n].argmax()
    np.testing.assert_array_equal(found, tokens)


def test_tokens_are_drawn_at_the_temperature():
    logits = jnp.log(jnp.array([0.1, 0.0, 0.6, 0.3])) + 3
    draws = lambda temperature: np.bincount(
        genie.draw_tokens(jax.random.key(0), jnp.tile(logits, (40_000, 1)), temperature), minlength=4
    )
    np.testing.assert_allclose(draws(1.0) / 40_000, [0.1, 0, 0.6, 0.3], atol=0.01)
    sharp = np.array([0.1, 0, 0.6, 0.3]) ** 2
    np.testing.assert_allclose(draws(0.5) / 40_000, sharp / sharp.sum(), atol=0.01)
    assert draws(0.0).tolist() == [0, 0, 40_000, 0]


def test_sampling_keeps_known_tokens_and_ends_with_none_hidden():
    params = genie.init_dynamics(jax.random.key(0), TINY, SHAPE)
    prompt, codes = jnp.zeros((2, 1, 4), jnp.int32), jnp.zeros((2, 5, 8))
    draw = jax.jit(lambda key: genie.rollout(key, params, prompt, codes, TINY))
    first, second = (np.asarray(draw(jax.random.key(i))) for i in (0, 1))
    assert first.shape == (2, 5, 4) and first.max() < 16 and first.min() >= 0 and (first != second).any()


def test_the_copying_baseline_is_the_best_mixture():
    """Tokens are about equally frequent, and three quarters of the last frame's are those of the frame before."""
    frames = np.arange(16).reshape(4, 4)  # four frames of four tokens
    tokens = np.stack([frames[[0, 1, 2, 3, 3]], frames[[3, 2, 1, 0, 0]]])
    tokens[:, 4, 0] = 0, 15
    share = np.bincount(tokens.ravel(), minlength=16) / tokens.size
    u, same = share[tokens[:, -1]], np.array([False, True, True, True])
    cost = lambda w: -np.log(w * same + (1 - w) * u).mean()
    best = optimize.minimize_scalar(cost, bounds=(0, 0.99), method="bounded").fun
    params = {"dynamics": genie.init_dynamics(jax.random.key(0), TINY, SHAPE)}
    found = jax.jit(lambda key: genie.token_results(key, params, jnp.array(tokens), jnp.zeros((2, 4, 8)), TINY))(jax.random.key(1))
    assert found["copy_cross_entropy"] == pytest.approx(best, abs=1e-2) and best < found["unigram_cross_entropy"] - 1
    assert found["unigram_cross_entropy"] == pytest.approx(-np.log(u).mean(), rel=1e-5)


def test_delta_psnr_is_zero_where_actions_do_nothing():
    config = replace(TINY, temperature=0.0)
    state = jax.eval_shape(genie.make_train(config).init, jax.random.key(0))
    params = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape, x.dtype), state.params)
    frames, codes = frames_of(jax.random.key(1)), jax.random.normal(jax.random.key(2), (2, 4, 8))
    tokens = jax.random.randint(jax.random.key(3), (2, 5, 4), 0, 16)
    played = lambda params: genie.play_results(jax.random.key(4), params, frames, frames, tokens, codes, config)
    delta = jax.jit(lambda params: played(params)["delta4_psnr"])
    assert abs(delta(params)) > 1e-3
    params["dynamics"]["action"] = jnp.zeros_like(params["dynamics"]["action"])
    assert delta(params) == 0


def test_no_gradient_of_the_dynamics_reaches_the_other_parts():
    """An update leaves the tokenizer as it was, and moves the latent action model as its own training alone would."""
    one = dict(encoder_blocks=1, decoder_blocks=1, lam_blocks=1, dynamics_blocks=1)
    config = replace(TINY, stage="dynamics", least_use=0.0, **one)
    train = genie.make_train(config)
    state = jax.jit(train.init)(jax.random.key(0))
    new, metrics = jax.jit(train.update)(state, 0)
    same = lambda part: all(
        np.array_equal(a, b) for a, b in zip(*(jax.tree.leaves(s.params[part]) for s in (state, new)), strict=True)
    )
    assert same("tokenizer") and np.isfinite(metrics["dynamics_loss"])
    lam = replace(config, stage="lam")
    alone, _ = jax.jit(genie.make_train(lam).update)(jax.jit(genie.make_train(lam).init)(jax.random.key(0)), 0)
    for a, b in zip(jax.tree.leaves(alone.params["lam"]), jax.tree.leaves(new.params["lam"]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_policies_are_tried_by_what_their_actions_mean():
    """A game that key 2 wins and all others lose at once: whoever means key 2 wins it, whoever means any, a third of them."""
    over = lambda state, key: (state, jnp.where(key == 2, 1, 2))
    game = Game(200, 3, 0, (), lambda level: jnp.int32(0), over, lambda state: jnp.zeros((*SHAPE, 3), jnp.uint8))
    params = cloning.init_policy(jax.random.key(0), TINY, SHAPE, 3)
    play = jax.jit(lambda meaning: cloning.play_policy(jax.random.key(1), game, params, meaning, TINY).mean())
    always, never, unknown = (play(jnp.zeros((3, 3)).at[:, keys].set(5)) for keys in (2, 1, jnp.array([], int)))
    assert always == 1 and never == 0 and 0.2 < unknown < 0.47


def test_cloning_passes_over_what_comes_after_the_end():
    params = cloning.init_policy(jax.random.key(0), TINY, SHAPE, 6)
    frames, actions = frames_of(jax.random.key(1)), jnp.array([[3, 1, 0, 5], [2, 4, -1, -1]])
    loss = jax.jit(lambda actions: cloning.cloning_loss(params, frames, actions, TINY))
    first, both = loss(actions.at[1].set(-1)), loss(actions)
    second = loss(actions.at[0].set(-1))
    assert float(both) == pytest.approx(float(4 * first + 2 * second) / 6, rel=1e-5)  # a policy never sees the other clip


def test_information_and_perplexity_of_known_tables():
    assert information(jnp.diag(jnp.ones(4))) == pytest.approx(1, abs=1e-4)
    assert information(jnp.ones((4, 3))) == pytest.approx(0, abs=1e-4)
    assert perplexity(jnp.array([0, 0, 1, 1]), 6) == pytest.approx(2, abs=1e-3)
    grey = jnp.full((8, 8, 3), 0.5)
    assert psnr(grey, grey + 0.1) == pytest.approx(20, abs=1e-3)


def test_frechet_distance_against_scipy():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 4)), rng.normal(size=(300, 4)) @ rng.normal(size=(4, 4)) + 1
    s, s2 = np.cov(x.T), np.cov(y.T)
    wanted = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + s2 - 2 * linalg.sqrtm(s @ s2).real)
    assert jax.jit(frechet)(jnp.asarray(x), jnp.asarray(y)) == pytest.approx(wanted, rel=1e-3)


def test_dots_move_as_the_action_says():
    source = make_source("dots", 6, 16, 1, 0.0)
    clips = jax.jit(source.held_out, static_argnums=1)(jax.random.key(0), 32)
    bright = np.asarray(clips.frames, int).sum(-1) > 3 * 128
    assert (bright.sum((2, 3)) == 4).all()
    corner = bright.reshape(32, 6, -1).argmax(-1)  # the dot's first pixel
    row, column = corner // 16 // 2, corner % 16 // 2
    moved = np.stack([np.diff(row, axis=1), np.diff(column, axis=1)], axis=-1)
    wanted = np.array([[0, 0], [0, -1], [0, 1], [-1, 0], [1, 0]])[np.asarray(clips.change)]
    assert ((moved == wanted).all(-1) | (moved == 0).all(-1)).all() and (moved == wanted).all(-1).mean() > 0.7


def test_own_videos_are_cut_and_bad_ones_refused_in_one_line(tmp_path):
    path = tmp_path / "videos.npz"
    videos = np.arange(3 * 7, dtype=np.uint8).reshape(3, 7, 1, 1, 1) * np.ones((1, 1, 8, 8, 3), np.uint8)
    np.savez(path, videos)
    source = make_source(str(path), 5, 64, 1, 0.0)
    clips, _ = source.draw(jax.random.key(0), (), 50)
    first = np.asarray(clips.frames)[:, :, 0, 0, 0].astype(int)
    assert (np.diff(first, axis=1) == 1).all() and set(first[:, 0]) == {0, 1, 2, 7, 8, 9}
    assert (np.asarray(source.held_out(jax.random.key(0), 9).frames)[:, 0, 0, 0, 0] >= 14).all()
    np.savez(path, actions=np.zeros((3, 6), np.int32), videos=videos)
    assert make_source(str(path), 5, 64, 1, 0.0).shape == (8, 8)
    for bad, words in (
        (videos.astype(np.float32), "must be uint8"),
        (videos[..., 0], "must be uint8"),
        (videos[:, :3], "at least --num-frames 5"),
        (videos[:1], "at least two videos"),
    ):
        np.savez(path, bad)
        with pytest.raises(UsageError, match=words):
            make_source(str(path), 5, 64, 1, 0.0)
    path.write_bytes(b"no zip")
    for name in (path, tmp_path / "none.npz"):
        with pytest.raises(UsageError) as error:
            make_source(str(name), 5, 64, 1, 0.0)
        assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="must divide frames of 16 x 16"):
        genie.make_train(replace(TINY, patch=5))


def write_gif_of(path, colours, size=(20, 10)):
    """A GIF whose frames are plain, but for a white column to the left and right outside of the middle square."""
    first, *rest = [Image.new("RGB", size, "white") for _ in colours]
    for image, colour in zip((first, *rest), colours, strict=True):
        image.paste(colour, (5, 0, 15, 10))
    first.save(path, save_all=True, append_images=rest, duration=100)


def test_more_clips_than_games_are_refused():
    with pytest.raises(UsageError, match="--batch-size 300: only 256"):
        genie.source_of(replace(CPU, num_levels=2, batch_size=300))


def test_a_folder_of_films_is_cut_scaled_and_never_mixed(tmp_path):
    """Films of two lengths: clips lie within one film, the last film is held out."""
    for name, red, length in (("a", 0, 5), ("b", 100, 7), ("c", 200, 6)):
        write_gif_of(tmp_path / f"{name}.gif", [(red + 8 * t, 0, 0) for t in range(length)])
    (tmp_path / "notes.txt").write_text("no film")
    (tmp_path / "._a.gif").write_bytes(b"what another system keeps beside a film")
    source = make_source(str(tmp_path), 5, 16, 1, 0.0)
    assert source.shape == (16, 16) and source.game is None
    clips, _ = source.draw(jax.random.key(0), (), 60)
    red = np.asarray(clips.frames)[..., 0].astype(int)
    assert (red.max((2, 3)) - red.min((2, 3)) <= 4).all() and (abs(np.diff(red[:, :, 8, 8]) - 8) <= 4).all()
    assert set(np.round(red[:, 0, 8, 8] / 4) * 4) == {0, 100, 108, 116}
    held = np.asarray(source.held_out(jax.random.key(0), 20).frames)[:, 0, 8, 8, 0]
    assert (held >= 198).all() and held.max() <= 210


def test_faulty_films_are_refused_in_one_line(tmp_path, monkeypatch):
    def refused(words, size=16):
        with pytest.raises(UsageError) as error:
            make_source(str(tmp_path), 5, size, 1, 0.0)
        assert words in str(error.value) and "\n" not in str(error.value)

    refused("holds no .gif, .mp4")
    write_gif_of(tmp_path / "a.gif", [(8 * t, 0, 0) for t in range(5)])
    refused("at least two videos")
    write_gif_of(tmp_path / "b.gif", [(8 * t, 0, 0) for t in range(4)])
    refused("b.gif has 4 frames: at least --num-frames 5")
    write_gif_of(tmp_path / "b.gif", [(8 * t, 0, 0) for t in range(5)])
    with monkeypatch.context() as patch:
        patch.setattr("envs.clips.MAX_BYTES", 9 * 16 * 16 * 3)
        refused("of frames: take fewer")
    (tmp_path / "b.gif").write_bytes(b"no film")
    refused("b.gif: cannot be read as a video")
    (tmp_path / "b.gif").unlink()
    (tmp_path / "b.MP4").write_bytes(b"no film")
    refused("cannot be read as a video" if importlib.util.find_spec("imageio_ffmpeg") else "pip install 'nightjax[video]'")


def test_an_mp4_is_read(tmp_path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg, of the extra `video`, is not installed")
    for name, red in (("a", 40), ("b", 200)):
        writer = ffmpeg.write_frames(str(tmp_path / f"{name}.mp4"), (64, 32), fps=10)
        writer.send(None)
        for t in range(6):
            writer.send(np.full((32, 64, 3), (red, 8 * t, 0), np.uint8).tobytes())
        writer.close()
    source = make_source(str(tmp_path), 6, 16, 1, 0.0)
    for clips, red in ((source.draw(jax.random.key(0), (), 2)[0], 40), (source.held_out(jax.random.key(0), 2), 200)):
        frames = np.asarray(clips.frames).astype(int)
        assert frames.shape == (2, 6, 16, 16, 3) and abs(frames[..., 0] - red).max() < 16
