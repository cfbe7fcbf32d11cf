"""A local web page on which a person plays a world model: the session behind it, and a server made of the standard library.

The server listens on loopback only, answers no other host's or page's requests, and takes no path from the browser: pictures
come as bytes, levels as numbers. What a request gets wrong is told in one sentence, and the world stays as it was.
"""

import base64
import io
import json
import re
import threading
import time
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.runs.config import UsageError, require
from common.runs.plot import fit_image, write_gif
from common.runs.stop import StopSignal

MAX_UPLOAD, MAX_DRAINED, MAX_PIXELS = 8 << 20, 64 << 20, 25_000_000  # bytes taken; bytes read away to answer at all; of a picture
KEPT_BYTES = 1 << 30  # of worlds to undo to
MAX_FILM, SCALE, BAR = 600, 4, 6  # frames of an exported film; pixels a pixel there; the height of its row of codes
PAGE = Path(__file__).with_name("play.html").read_text(encoding="utf-8")  # one file that needs nothing from elsewhere
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP")
MAX_STEPS, MAX_TEMPERATURE, MAX_SEED = 100, 10, 2**31 - 1


class Model(NamedTuple):
    """What is played. A world is any pytree of arrays; frames are (H, W, 3) uint8, codes are numbers in [0, num_codes)."""

    shape: tuple[int, int]  # H, W
    num_codes: int
    infer: Callable  # frames (T, H, W, 3) of a real film -> the codes between them (T - 1,)
    begin: Callable  # frames (P, H, W, 3), codes (P - 1,) -> world, the frames as the model shows them (P, H, W, 3)
    step: Callable  # seed, time, world, code, temperature, steps -> world, frame, how sure each token is (h, w) in [0, 1]
    hold: Callable  # seed, time, world, temperature, steps -> films of every code held from here (num_codes, F, H, W, 3)


class Film(NamedTuple):
    """A real film. Its first frames are a prompt."""

    frames: np.ndarray  # (T, H, W, 3) uint8
    states: list | None  # T states of the true game, where there is one


class Truth(NamedTuple):
    """Where real films come from, and the true game behind them, if there is one."""

    num: int  # films there are
    prompt_frames: int  # frames of a prompt
    film: Callable[[int], Film]  # number -> a film never trained on
    step: Callable | None = None  # seed, time, state, code -> state, frame, a word on how it ended ("" where it goes on)


class Moment(NamedTuple):
    """One frame of a played world, and all that is needed to go on from it."""

    world: Any  # None where it is too long ago to be kept
    frame: np.ndarray
    code: int | None = None  # what led here
    sure: np.ndarray | None = None
    at: int | None = None  # the frame of the real film that this is, as long as its codes were followed
    state: Any = None  # the true game's
    true: np.ndarray | None = None  # its frame
    word: str = ""
    ms: float = 0.0


class Prompt(NamedTuple):
    """What a world begins with."""

    words: str
    number: int | None  # of the real film
    frames: np.ndarray  # (P, H, W, 3), as the model shows them
    film: Film | None = None
    codes: tuple[int, ...] = ()  # between the film's frames


def read_picture(data: bytes, shape: tuple[int, int]) -> np.ndarray:
    """A picture file's bytes -> (1, H, W, 3) uint8: its middle, cut to the shape's ratio and scaled. Raises UsageError."""
    from PIL import Image, ImageOps

    words = "this file is no picture that can be read: give a PNG, JPEG, GIF, BMP or WebP file"
    require(len(data) > 0, "the upload is empty: choose a picture")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        require(width * height <= MAX_PIXELS, f"the picture has {width} x {height} pixels: at most {MAX_PIXELS} fit")
        image = ImageOps.exif_transpose(image).convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image).convert("RGB")
        return fit_image(image, shape)[None]
    except UsageError:
        raise
    except Exception as error:  # whatever a damaged or hostile file makes Pillow raise
        raise UsageError(words) from error


def number_in(request: dict, name: str, low: float, high: float, whole: bool = True):
    """A number of a request. Raises UsageError where it is missing, none, or out of range."""
    value = request.get(name)
    fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and low <= value <= high
    require(fits, f"{name} {json.dumps(value)[:40]}: must be a {'whole ' * whole}number from {low:g} to {high:g}")
    return value


class Session:
    """One world that is being played: a trail of moments, and what was chosen. All requests take turns."""

    def __init__(self, model: Model, truth: Truth, about: dict, temperature: float, steps: int):
        self.model, self.truth, self.lock = model, truth, threading.Lock()
        self.settings = dict(seed=0, temperature=float(temperature), steps=steps)
        self.about = dict(about, height=model.shape[0], width=model.shape[1], codes=model.num_codes, films=truth.num)
        self.about |= dict(max_upload=MAX_UPLOAD, game=truth.step is not None)
        self.actions = dict(step=self._step, replay=self._replay, undo=self._undo, reset=self._reset)
        self.actions |= dict(film=self._film, set=self._set, hold=self._hold)
        self._film({"number": 0})

    def answer(self, request) -> dict:
        """What a request asks for -> the state. Raises UsageError, and then nothing has changed."""
        known = isinstance(request, dict) and isinstance(request.get("do"), str) and request["do"] in self.actions
        require(known, f"a request must be JSON such as {{'do': 'step', 'code': 0}}; do is one of {', '.join(self.actions)}")
        with self.lock:
            extra = self.actions[request["do"]](request) or {}
            return self._state() | extra

    def state(self) -> dict:
        """The newest moment, as the page shows it."""
        with self.lock:
            return self._state()

    def picture(self, data: bytes) -> dict:
        """Begins from a picture file's bytes -> the state."""
        frames = read_picture(data, self.model.shape)
        with self.lock:
            self._begin(frames, (), "your picture")
            return self._state()

    def exported(self, kind: str) -> bytes:
        """The film so far, as a GIF or an .npz of frames, codes and settings."""
        file = io.BytesIO()
        with self.lock:
            frames, codes = self._frames()
            if kind == "gif":
                write_gif(file, draw_film(*frames, codes, self.model.num_codes), fps=8)
            else:
                codes = np.array([-1 if code is None else code for code in codes])
                np.savez_compressed(file, frames=frames[0], codes=codes, **self.settings)
        return file.getvalue()

    # --- what the page can ask for

    def _begin(self, frames: np.ndarray, codes: tuple, words: str, number: int | None = None, film: Film | None = None) -> None:
        """Begins a world from frames (P, H, W, 3) and the codes between them, or between all of the film's frames."""
        last = len(frames) - 1
        world, shown = self.model.begin(frames, codes[:last])
        state = film.states[last] if film and film.states else None
        self.prompt = Prompt(words, number, np.asarray(shown), film, codes)
        place = last if film else None
        self.trail = [Moment(world, self.prompt.frames[-1], None, None, place, state, frames[-1] if film else None)]

    def _film(self, request: dict) -> None:
        number = number_in(request, "number", 0, self.truth.num - 1)
        film = self.truth.film(number)
        codes = tuple(int(code) for code in self.model.infer(film.frames))
        words = f"held-out {'level' if self.truth.step else 'film'} {number}"
        self._begin(film.frames[: self.truth.prompt_frames], codes, words, number, film)

    def _step(self, request: dict) -> None:
        code, before, now = number_in(request, "code", 0, self.model.num_codes - 1), self.trail[-1], len(self.trail)
        state, true, word = before.state, None, before.word
        if state is not None and word:
            true = before.true  # it is over
        elif state is not None:
            state, true, word = self.truth.step(self.settings["seed"], now, state, code)
        self._go_on(code, None, state, true, word)

    def _replay(self, request: dict) -> None:
        at, film = self.trail[-1].at, self.prompt.film
        require(at is not None, "codes can be followed only from a held-out prompt, before others were chosen: reset first")
        require(at + 1 < len(film.frames), "the real film ends here: reset to follow it again, or choose codes")
        state = film.states[at + 1] if film.states else None
        self._go_on(self.prompt.codes[at], at + 1, state, film.frames[at + 1], "")

    def _go_on(self, code: int, at: int | None, state, true, word: str) -> None:
        began, before = time.perf_counter(), self.trail[-1]
        seed, temperature, steps = self.settings.values()
        world, frame, sure = self.model.step(seed, len(self.trail), before.world, code, temperature, steps)
        frame, ms = np.asarray(frame), 1000 * (time.perf_counter() - began)
        self.trail.append(Moment(world, frame, code, np.asarray(sure), at, state, true, word, ms))
        kept = 1 + KEPT_BYTES // max(1, num_bytes(world))
        if len(self.trail) > kept + 1:  # the prompt's stays
            self.trail[-kept - 1] = self.trail[-kept - 1]._replace(world=None, state=None)

    def _undo(self, request: dict) -> None:
        require(len(self.trail) > 1, "there is nothing to undo: this is the prompt")
        require(self.trail[-2].world is not None, "nothing older is kept in memory: reset begins again from the prompt")
        self.trail.pop()

    def _reset(self, request: dict) -> None:
        self.trail = self.trail[:1]

    def _set(self, request: dict) -> None:
        limits = dict(seed=(0, MAX_SEED, True), temperature=(0, MAX_TEMPERATURE, False), steps=(1, MAX_STEPS, True))
        self.settings = {name: number_in(self.settings | request, name, *limit) for name, limit in limits.items()}

    def _hold(self, request: dict) -> dict:
        """What each code does when it is held from here."""
        seed, temperature, steps = self.settings.values()
        films = np.asarray(self.model.hold(seed, len(self.trail), self.trail[-1].world, temperature, steps))
        return {"held": [[text_of(frame) for frame in film] for film in films]}

    # --- what is shown

    def _state(self) -> dict:
        now, film = self.trail[-1], self.prompt.film
        return dict(
            self.settings,
            frame=text_of(now.frame),
            true=None if now.true is None else text_of(now.true),
            word=now.word,
            sure=None if now.sure is None else np.round(now.sure, 3).tolist(),
            code=now.code,
            time=len(self.trail) - 1,
            ms=round(now.ms, 1),
            prompt=self.prompt.words,
            number=self.prompt.number,
            can_undo=len(self.trail) > 1 and self.trail[-2].world is not None,
            to_follow=0 if now.at is None else len(film.frames) - 1 - now.at,
        )

    def _frames(self):
        """The newest MAX_FILM frames: the model's (T, H, W, 3), the true ones or None; and the codes that led to them."""
        prompt = self.prompt
        truths = prompt.film.frames if prompt.film else [None] * len(prompt.frames)
        trail = [Moment(None, frame, true=true) for frame, true in zip(prompt.frames[:-1], truths, strict=False)] + self.trail
        trail = trail[-MAX_FILM:]
        beside = all(moment.true is not None for moment in trail)
        frames = np.stack([moment.frame for moment in trail]), np.stack([moment.true for moment in trail]) if beside else None
        return frames, [moment.code for moment in trail]


def num_bytes(world) -> int:
    """What a pytree's arrays take."""
    import jax

    return sum(x.nbytes for x in jax.tree.leaves(world))


def text_of(frame: np.ndarray) -> str:
    """A frame's bytes as text."""
    return base64.b64encode(np.ascontiguousarray(frame)).decode()


def draw_film(frames: np.ndarray, true: np.ndarray | None, codes: list, num_codes: int) -> np.ndarray:
    """A film to share (T, H', W', 3): the model's frames, the true game's beside them, below a row of codes, the chosen one lit."""
    parts = [frames] if true is None else [frames, np.full_like(frames[:, :, :1], 255), true]
    film = np.concatenate(parts, axis=2).repeat(SCALE, 1).repeat(SCALE, 2)
    row = np.full((len(film), BAR, film.shape[2], 3), 24, np.uint8)
    edges = np.linspace(0, frames.shape[2] * SCALE, num_codes + 1).astype(int)
    for t, code in enumerate(codes):
        for k in range(num_codes):
            row[t, 1:, edges[k] + 1 : edges[k + 1] - 1] = (255, 200, 60) if k == code else (80, 84, 96)
    return np.concatenate([film, row], axis=1)


# --- the server


def refusal(headers) -> str:
    """Why a request does not come from this machine's own page, or nothing (other sites may not ask, by whatever name)."""
    host, origin = headers.get("Host", ""), headers.get("Origin")
    if not re.fullmatch(r"(127\.0\.0\.1|localhost)(:\d{1,5})?", host):
        return "this page is served on loopback only: open it as http://127.0.0.1"
    if origin is not None and origin != f"http://{host}":
        return "requests of other pages are refused"
    return "" if headers.get("Sec-Fetch-Site", "none") in ("none", "same-origin") else "requests of other pages are refused"


class Handler(BaseHTTPRequestHandler):
    """Answers a browser's requests from `server.session`."""

    protocol_version, timeout = "HTTP/1.1", 30
    server_version, sys_version = "nightjax", ""

    def log_message(self, *args) -> None:
        """Nothing is printed of requests."""

    def reply(self, code: int, kind: str, data: bytes, **headers: str) -> None:
        self.send_response(code)
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
        headers |= {"Content-Type": kind, "Content-Length": str(len(data)), "Cache-Control": "no-store"}
        headers |= {"X-Content-Type-Options": "nosniff", "Content-Security-Policy": policy + "; frame-ancestors 'none'"}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def reply_json(self, value: dict, code: int = 200) -> None:
        self.reply(code, "application/json", json.dumps(value).encode())

    def fail(self, code: int, words: str) -> None:
        """One sentence; what is left of the request is not read."""
        self.close_connection = True
        self.reply_json({"error": words}, code)

    def body(self) -> bytes | None:
        """A request's data; None where it was refused."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or len(length) > 18:
            return self.fail(411, "the request does not say how long it is")
        if int(length) > MAX_UPLOAD:
            left = min(int(length), MAX_DRAINED)  # a browser that is still sending would not read the answer
            while left and (part := self.rfile.read(min(left, 1 << 16))):
                left -= len(part)
            return self.fail(413, f"the file has {int(length) / 2**20:.0f} MB: at most {MAX_UPLOAD >> 20} MB are taken")
        data = self.rfile.read(int(length))
        return data if len(data) == int(length) else self.fail(400, "the upload broke off")

    def answered(self, answer: Callable[[], Any]) -> None:
        """Sends answer(), or in one sentence why there is none."""
        if words := refusal(self.headers):
            return self.fail(403, words)
        try:
            answer()
        except UsageError as error:
            self.reply_json({"error": str(error)}, 400)
        except (TimeoutError, ConnectionError):
            self.close_connection = True
        except Exception:
            traceback.print_exc()
            self.fail(500, "the program failed at this request: its terminal says why; the world is as it was")

    def do_GET(self) -> None:
        session = self.server.session
        answers = {
            "/": lambda: self.reply(200, "text/html; charset=utf-8", PAGE.encode()),
            "/about": lambda: self.reply_json(session.about),
            "/state": lambda: self.reply_json(session.state()),
            "/played.gif": lambda: self.reply_file("image/gif", "played.gif"),
            "/played.npz": lambda: self.reply_file("application/zip", "played.npz"),
        }
        self.answered(answers.get(self.path, lambda: self.fail(404, "there is no such page")))

    def do_POST(self) -> None:
        session = self.server.session
        answers = {
            "/do": lambda: self.asked("application/json", lambda data: session.answer(read_json(data))),
            "/picture": lambda: self.asked("application/octet-stream", session.picture),
        }
        self.answered(answers.get(self.path, lambda: self.fail(404, "there is no such page")))

    def reply_file(self, kind: str, name: str) -> None:
        data = self.server.session.exported(name.rpartition(".")[2])
        self.reply(200, kind, data, Content_Disposition=f'attachment; filename="{name}"')

    def asked(self, kind: str, answer: Callable[[bytes], dict]) -> None:
        """Sends what answer(data) gives for a request's data of a kind that other sites cannot send without asking first."""
        data = self.body() if self.headers.get_content_type() == kind else self.fail(415, f"the request must be {kind}")
        if data is not None:
            self.reply_json(answer(data))


def read_json(data: bytes):
    """A request's value. Raises UsageError."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError("the request is no JSON") from error


def open_server(port: int) -> ThreadingHTTPServer:
    """A server on loopback that does not answer yet. Raises UsageError where the port cannot be had."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UsageError(f"--port {port}: {error.strerror}; give another, or 0 for any that is free") from error


def serve(server: ThreadingHTTPServer, session: Session, stop: StopSignal) -> None:
    """Answers until SIGINT or SIGTERM."""
    server.session = session
    print(f"play at http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
    server.timeout = 0.5
    while not stop.notice():
        server.handle_request()
    print("stopped")
