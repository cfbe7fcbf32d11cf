"""The page for playing: its session and server with a model whose frames can be told by hand, and the page in a real browser."""

import base64
import http.client
import io
import json
import threading

import numpy as np
import pytest
from browser import MISSING, Browser
from PIL import Image

from common.play import MAX_UPLOAD, Film, Model, Session, Truth, open_server, read_picture
from common.runs.config import UsageError

SHAPE, CODES = (8, 12), 4


def frame(red, green=0, blue=0):
    return np.full((*SHAPE, 3), (red, green, blue), np.uint8)


def fake_model():
    """A world is a number, its frame's red; code k adds 10 k, temperature the green and MaskGIT steps the blue."""

    def begin(frames, codes):
        assert len(codes) == len(frames) - 1
        return np.array(int(frames[-1, 0, 0, 0])), frames

    def step(seed, time, world, code, temperature, steps):
        assert 0 <= code < CODES
        world = world + 10 * code
        return world, frame(int(world), int(10 * temperature), steps), np.full((2, 3), 0.5)

    hold = lambda seed, time, world, *_: np.stack([np.stack([frame(world + 10 * k * t) for t in (1, 2, 3)]) for k in range(CODES)])
    return Model(SHAPE, CODES, lambda frames: np.arange(len(frames) - 1) % CODES, begin, step, hold)


def film(number):
    """Frames of blue 0, 1, ..., red the film's number; the true game's state is a frame's blue."""
    return Film(np.stack([frame(number, 0, t) for t in range(5)]), list(range(5)))


def true_step(seed, time, state, code):
    return state + 1, frame(0, 0, state + 1), "the true game is won" if state + 1 >= 6 else ""


TRUTH = Truth(9, 2, film, true_step)


def new_session(truth=TRUTH, model=None):
    arrows = {"arrows": ["", "←", "→", "↑"], "words": ["50 %"] * CODES, "legend": "said", "title": "a test", "subtitle": "tested"}
    return Session(model or fake_model(), truth, arrows, 1.0, 25)


def pixel(text):
    return tuple(base64.b64decode(text)[:3])


def step(session, code):
    return session.answer({"do": "step", "code": code})


# --- session


def test_steps_undo_and_reset_go_where_the_codes_lead():
    session = new_session()
    state = session.state()
    assert (pixel(state["frame"]), pixel(state["true"]), state["time"], state["can_undo"]) == ((0, 0, 1), (0, 0, 1), 0, False)
    step(session, 1)
    state = step(session, 3)
    assert (pixel(state["frame"]), pixel(state["true"]), state["time"], state["code"]) == ((40, 10, 25), (0, 0, 3), 2, 3)
    state = session.answer({"do": "undo"})
    assert (pixel(state["frame"]), pixel(state["true"]), state["time"], state["code"]) == ((10, 10, 25), (0, 0, 2), 1, 1)
    assert pixel(step(session, 3)["frame"]) == (40, 10, 25)
    session.answer({"do": "set", "temperature": 0, "steps": 3})
    assert pixel(step(session, 0)["frame"]) == (40, 0, 3)
    state = session.answer({"do": "reset"})
    assert pixel(state["frame"]) == (0, 0, 1) and state["temperature"] == 0 and not state["can_undo"]


def test_the_true_game_stops_where_it_ends_and_undo_brings_it_back():
    session = new_session()
    words = [step(session, 0)["word"] for _ in range(7)]
    assert words == [""] * 4 + ["the true game is won"] * 3
    assert pixel(session.state()["true"]) == (0, 0, 6)
    for _ in range(3):
        state = session.answer({"do": "undo"})
    assert (state["word"], pixel(state["true"])) == ("", (0, 0, 5))


def test_a_real_film_can_be_followed_to_its_end_and_left():
    session = new_session()
    session.answer({"do": "film", "number": 7})
    state = session.answer({"do": "replay"})
    assert (pixel(state["frame"])[0], pixel(state["true"]), state["code"], state["to_follow"]) == (17, (7, 0, 2), 1, 2)
    state = step(session, 0)  # the true game goes on from the film's state
    assert (pixel(state["true"]), state["to_follow"]) == ((0, 0, 3), 0)
    with pytest.raises(UsageError, match="reset first"):
        session.answer({"do": "replay"})
    session.answer({"do": "undo"})
    for _ in range(2):
        session.answer({"do": "replay"})
    with pytest.raises(UsageError, match="ends here"):
        session.answer({"do": "replay"})
    assert pixel(session.state()["true"]) == (7, 0, 4)


def test_without_a_game_there_is_a_film_and_nothing_true_after_other_codes():
    session = new_session(Truth(3, 2, lambda number: Film(film(number).frames, None)))
    assert session.about["game"] is False and pixel(session.answer({"do": "replay"})["true"]) == (0, 0, 2)
    assert step(session, 1)["true"] is None


def test_old_worlds_are_let_go_but_the_prompts_stays(monkeypatch):
    session = new_session()
    monkeypatch.setattr("common.play.KEPT_BYTES", 2 * np.array(0).nbytes)
    for _ in range(6):
        step(session, 1)
    session.answer({"do": "undo"})
    assert session.answer({"do": "undo"})["can_undo"] is False
    with pytest.raises(UsageError, match="nothing older"):
        session.answer({"do": "undo"})
    assert pixel(step(session, 1)["frame"])[0] == 50
    assert pixel(session.answer({"do": "reset"})["frame"]) == (0, 0, 1)


@pytest.mark.parametrize(
    "request_, words",
    [
        ({"do": "step"}, "code null: must be a whole number from 0 to 3"),
        ({"do": "step", "code": 4}, "code 4: must be"),
        ({"do": "step", "code": True}, "code true: must be"),
        ({"do": "step", "code": 1.5}, "code 1.5: must be"),
        ({"do": "film", "number": 9}, "number 9: must be a whole number from 0 to 8"),
        ({"do": "set", "temperature": float("nan")}, "temperature NaN: must be"),
        ({"do": "set", "steps": 10**9}, "steps 1000000000: must be"),
        ({"do": "set", "seed": "/etc/passwd"}, "seed "),
        ({"do": "undo"}, "nothing to undo"),
        ({"do": "__init__"}, "do is one of"),
        ({"do": ["step"]}, "do is one of"),
        ([], "do is one of"),
    ],
)
def test_a_wrong_request_changes_nothing_and_is_told_in_one_line(request_, words):
    session = new_session()
    before = session.state()
    with pytest.raises(UsageError) as error:
        session.answer(request_)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert session.state() == before


def test_a_step_that_fails_changes_nothing():
    def broken(*args):
        raise RuntimeError("out of memory")

    session = new_session(model=fake_model()._replace(step=broken))
    before = session.state()
    with pytest.raises(RuntimeError):
        step(session, 1)
    assert session.state() == before


# --- pictures and films


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_pictures_are_cut_in_the_middle_and_scaled():
    exact = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    np.testing.assert_array_equal(read_picture(encoded(Image.fromarray(exact)), SHAPE)[0], exact)
    wide = np.zeros((80, 400, 3), np.uint8)
    wide[:, 140:260] = (255, 0, 0)  # the middle 120 of 400 columns have the shape's ratio
    assert (read_picture(encoded(Image.fromarray(wide)), SHAPE)[0] == (255, 0, 0)).all()
    clear = Image.new("RGBA", (24, 16), (0, 0, 0, 0))
    assert (read_picture(encoded(clear), SHAPE) == 255).all()
    for kind in ("JPEG", "GIF", "BMP", "WEBP"):
        assert read_picture(encoded(Image.new("RGB", (1, 1), "white"), kind), SHAPE).mean() > 250


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, b"%PDF-1.4", b"GIF89a"])
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(UsageError, match="picture"):
        read_picture(data, SHAPE)


def test_a_cut_picture_and_a_bomb_are_refused_before_memory_is_taken():
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)))
    with pytest.raises(UsageError, match="no picture that can be read"):
        read_picture(whole[: len(whole) // 2], SHAPE)
    bomb = encoded(Image.new("1", (6_000, 5_000)))
    assert len(bomb) < 100_000
    with pytest.raises(UsageError, match="picture"):
        read_picture(bomb, SHAPE)


def test_exports_hold_what_was_played():
    session = new_session()
    for code in (1, 2):
        step(session, code)
    with np.load(io.BytesIO(session.exported("npz"))) as held:
        np.testing.assert_array_equal(held["frames"][:, 0, 0, 0], [0, 0, 10, 30])
        assert held["codes"].tolist() == [-1, -1, 1, 2] and held["seed"] == 0 and held["temperature"] == 1
    gif = Image.open(io.BytesIO(session.exported("gif")))
    assert gif.n_frames == 4 and gif.width == 4 * (2 * SHAPE[1] + 1)  # the true game's frames beside the model's
    gif.seek(3)
    last = np.asarray(gif.convert("RGB"))
    assert abs(int(last[0, 0, 0]) - 30) < 8 and last[0, -1, 2] < 16
    lit = (last[-3, : 4 * SHAPE[1]].astype(int) - (255, 200, 60)).__abs__().max(1) < 30
    assert lit.any() and (np.flatnonzero(lit) * CODES // (4 * SHAPE[1]) == 2).all()
    session.picture(encoded(Image.new("RGB", (12, 8), "red")))
    assert Image.open(io.BytesIO(session.exported("gif"))).width == 4 * SHAPE[1]  # there is nothing true beside a picture


# --- server


@pytest.fixture
def served():
    session = new_session()
    with open_server(0) as server:
        server.session = session
        thread = threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.02))
        thread.start()
        yield session, server.server_port
        server.shutdown()
        thread.join()


def ask(port, path, data=None, **headers):
    """A request -> its code, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if data is None else "POST", path, data, headers)
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


JSON = {"Content_Type": "application/json"}
BYTES = {"Content_Type": "application/octet-stream"}


def test_the_server_serves_the_page_and_plays(served):
    session, port = served
    code, headers, page = ask(port, "/")
    assert code == 200 and headers["Content-Type"].startswith("text/html") and b"<canvas" in page and b"://" not in page
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert json.loads(ask(port, "/about")[2])["codes"] == CODES
    code, _, body = ask(port, "/do", json.dumps({"do": "step", "code": 2}), **JSON)
    assert code == 200 and json.loads(body) == session.state()
    assert json.loads(ask(port, "/state")[2])["time"] == 1
    code, headers, body = ask(port, "/played.gif")
    assert body[:6] == b"GIF89a" and "attachment" in headers["Content-Disposition"]
    red = encoded(Image.new("RGB", (12, 8), (250, 0, 0)))
    code, _, body = ask(port, "/picture", red, **BYTES)
    assert code == 200 and pixel(json.loads(body)["frame"]) == (250, 0, 0)
    assert ask(port, "/state", Host=f"localhost:{port}")[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:80"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "127.0.0.1:80@evil.example"},
        {"Host": "[::1"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
def test_other_hosts_and_other_pages_are_refused(served, headers):
    session, port = served
    before = session.state()
    for path, data in (("/", None), ("/state", None), ("/played.npz", None), ("/do", '{"do": "step", "code": 1}')):
        code, _, body = ask(port, path, data, **JSON, **headers)
        assert code == 403 and set(json.loads(body)) == {"error"}
    assert session.state() == before


def test_wrong_uploads_get_a_message_and_nothing_is_lost(served):
    session, port = served
    step(session, 1)
    before = session.state()
    cases = [
        ("/picture", b"no picture", BYTES, 400, "no picture that can be read"),
        ("/picture", b"", BYTES, 400, "empty"),
        ("/picture", b"x" * (MAX_UPLOAD + 1), BYTES, 413, "at most 8 MB"),
        ("/picture", b"x", {"Content_Type": "text/plain"}, 415, "must be application/octet-stream"),
        ("/do", b"{", JSON, 400, "no JSON"),
        ("/do", b"[" * 100_000, JSON, 400, "no JSON"),
        ("/do", b"\xff\xfe", JSON, 400, "no JSON"),
        ("/do", b'{"do": "step", "code": 1}', {"Content_Type": "text/plain"}, 415, "must be application/json"),
        ("/do", b'{"do": "step", "code": -1}', JSON, 400, "must be a whole number"),
        ("/elsewhere", b"{}", JSON, 404, "no such page"),
        ("/../etc/passwd", None, {}, 404, "no such page"),
    ]
    for path, data, headers, wanted, words in cases:
        code, _, body = ask(port, path, data, **headers)
        message = json.loads(body)["error"]
        assert (code, words in message, "\n" in message) == (wanted, True, False), (path, data[:20] if data else data, message)
    assert session.state() == before


def test_a_length_that_lies_or_is_missing_is_refused(served):
    _, port = served
    for headers in ({}, {"Content-Length": "-1"}, {"Transfer-Encoding": "chunked"}):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.putrequest("POST", "/picture")
        for name, value in (headers | {"Content-Type": "application/octet-stream"}).items():
            connection.putheader(name, value)
        connection.endheaders()
        assert "how long" in json.loads(connection.getresponse().read())["error"]


def test_only_loopback_listens_and_a_taken_port_is_one_line():
    with open_server(0) as server:
        assert server.server_address[0] == "127.0.0.1"
        with pytest.raises(UsageError, match=f"--port {server.server_port}: "):
            open_server(server.server_port)


# --- the page in a browser

needs_browser = pytest.mark.skipif(bool(MISSING), reason=f"there is no {' and no '.join(MISSING)}")


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def red(browser, canvas="frame"):
    return browser.run(f"return document.getElementById('{canvas}').getContext('2d').getImageData(0, 0, 1, 1).data[0]")


def message(browser):
    return browser.run("return document.getElementById('message').textContent")


def open_page(browser, port):
    browser.open(f"http://127.0.0.1:{port}/")
    browser.wait("return document.body.dataset.ready")


@needs_browser
def test_keys_and_buttons_play_the_world(served, browser):
    session, port = served
    time_is = lambda n: browser.wait(f"return now.time === {n} && !busy")
    open_page(browser, port)
    assert browser.run("return document.querySelectorAll('.code').length") == CODES
    browser.keys(("down", "3"), ("up", "3"))
    time_is(1)
    assert red(browser) == 20
    browser.keys(("down", "\ue014"), ("up", "\ue014"))  # the arrow to the right is code 2 by its meaning
    time_is(2)
    assert red(browser) == 40
    browser.keys(("down", "z"), ("up", "z"))
    time_is(1)
    browser.click(".slot:nth-child(2) > button:last-child")  # another key for code 1
    browser.keys(("down", "q"), ("up", "q"), ("down", "q"), ("up", "q"))
    time_is(2)
    assert red(browser) == 30 and "q" in browser.run("return document.querySelectorAll('.code kbd')[1].textContent")
    browser.click("[data-mode=hold]")
    browser.keys(("down", "1"))
    browser.wait("return now.time > 4")
    browser.keys(("up", "1"))
    browser.wait("return !running")
    browser.click("#reset")
    time_is(0)
    browser.click("[data-mode=free]")
    browser.click(".slot:nth-child(4) .code")
    browser.wait("return now.time > 3")
    browser.click("#pause")
    browser.wait("return !running")
    assert session.state()["code"] == 3 and message(browser) == ""
    browser.click("[data-mode=step]")
    browser.click("#reset")
    time_is(0)
    browser.click("#follow")
    browser.wait("return now.time === 3 && !running")
    assert session.state()["code"] == 3 and red(browser, "true") == 0
    assert not browser.complaints()


@needs_browser
def test_pictures_sketches_and_their_faults_on_the_page(served, browser, tmp_path):
    session, port = served
    open_page(browser, port)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "huge.png").write_bytes(b"x" * (MAX_UPLOAD + 1))
    (tmp_path / "good.png").write_bytes(encoded(Image.new("RGB", (30, 20), (90, 0, 0))))
    for name, words in (("bad", "no picture that can be read"), ("huge", "at most 8 MB")):
        browser.type("#file", str(tmp_path / f"{name}.png"))
        browser.wait(f"return document.getElementById('message').textContent.includes('{words}')")
        assert session.state()["prompt"] == "held-out level 0"
    browser.type("#file", str(tmp_path / "good.png"))
    browser.wait("return now.prompt === 'your picture' && !busy")
    assert red(browser) == 90 and message(browser) == "" and session.state()["true"] is None
    browser.click("#drawing summary")
    browser.drag("#sketch", (-100, -60), (100, 60))
    browser.click("#draw")
    browser.wait("return now.frame.length && now.time === 0 && !busy && document.getElementById('frame')"
                 ".getContext('2d').getImageData(0, 0, 1, 1).data[0] !== 90")  # fmt: skip
    drawn = np.frombuffer(base64.b64decode(session.state()["frame"]), np.uint8).reshape(*SHAPE, 3)
    assert (drawn.reshape(-1, 3) == (0x7F, 0xB8, 0xE8)).all(1).any() and (drawn.reshape(-1, 3) == (0xE0, 0x40, 0x40)).all(1).any()
    browser.run("document.getElementById('number').value = 99; document.getElementById('go').click()")
    browser.wait("return document.getElementById('message').textContent.includes('from 0 to 8')")


@needs_browser
def test_the_programs_end_is_told_on_the_page(served, browser):
    open_page(browser, served[1])
    browser.run("window.fetch = () => Promise.reject(new TypeError('failed to fetch')); one(1)")
    browser.wait("return document.getElementById('message').textContent.includes('is it still running')")
