"""The page of `algos/genie.py play` on a finished run, in a headless Chromium (and chromedriver): its picture and its speed.

Run:  python results/genie_page.py RUN       (writes RUN/page.png and RUN/page.json)

The speed is that of a free run of one code, as the page counts it: the model, the server and the browser share the machine. The
picture is of every code pressed once after that.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser import Browser  # noqa: E402

FRAMES = 13  # the page's rate is over its last 11 times


def played(browser: Browser) -> float:
    """Plays the page -> frames a second."""
    browser.wait("return document.body.dataset.ready && films.length && !busy", 60)
    browser.run("document.getElementById('fps').value = 60")
    browser.click("[data-mode=free]")
    browser.click(".slot:first-child .code")
    browser.wait(f"return now.time > {FRAMES}", 120)
    rate = browser.run("return (times.length - 1) * 1000 / (times.at(-1) - times[0])")
    browser.click("#pause")
    browser.wait("return !running")
    browser.click("[data-mode=step]")
    browser.click("#reset")
    for code in range(browser.run("return about.codes")):
        browser.wait(f"return now.time === {code} && !busy", 60)
        browser.run("return document.querySelectorAll('.code')[arguments[0]].focus()", code)
        browser.keys(("down", "\ue007"), ("up", "\ue007"))  # Enter
    browser.wait("return now.time === about.codes && !busy", 60)
    browser.click("#hold")
    browser.wait("return !busy && document.getElementById('legendwords').textContent.includes(`frame ${about.codes}`)", 60)
    return rate


def main(folder: Path) -> None:
    command = [sys.executable, str(ROOT / "algos" / "genie.py"), "play", "--load", str(folder), "--port", "0"]
    program = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = next((line for line in program.stdout if line.startswith("play at")), "")
        if not line:
            sys.exit(f"genie_page: the page of {folder} was not served")
        with Browser() as browser:
            browser.open(re.search(r"http://\S+", line)[0])
            rate, picture = played(browser), browser.picture()
    finally:
        program.send_signal(signal.SIGINT)
        program.wait(30)
    (folder / "page.png").write_bytes(picture)
    cores = len(os.sched_getaffinity(0))
    (folder / "page.json").write_text(json.dumps({"frames_per_s": round(rate, 2), "cores": cores}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
