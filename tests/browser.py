"""Drives a headless Chromium by WebDriver, with the standard library alone."""

import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

MISSING = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--window-size=1280,960",
]  # fmt: skip
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the standard's name for a reference to an element


class Browser:
    """One window. Use in a `with`: the browser and its driver end with it."""

    def __enter__(self):
        self._profile = tempfile.TemporaryDirectory()
        command = ["chromedriver", "--port=0"]
        self._driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        line = next(line for line in self._driver.stdout if "successfully on port" in line)
        port = re.search(r"port (\d+)", line)[1]
        self._base = f"http://127.0.0.1:{port}/session"
        chrome = {"args": [*FLAGS, f"--user-data-dir={self._profile.name}"], "binary": shutil.which("chromium")}
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}}}
        self._base += "/" + self._call("POST", "", wanted)["sessionId"]
        return self

    def __exit__(self, *error):
        try:
            self._call("DELETE", "")
        finally:
            self._driver.terminate()
            self._driver.wait(20)
            self._profile.cleanup()

    def _call(self, method: str, path: str, value=None):
        data = None if method != "POST" else json.dumps(value or {}).encode()
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error)["value"]["message"]) from error

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *args):
        """The value of a script's `return`."""
        return self._call("POST", "/execute/sync", {"script": script, "args": list(args)})

    def wait(self, script: str, seconds: float = 20):
        """Waits until a script's `return` is true -> its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never: {script}"
            time.sleep(0.05)
        return value

    def find(self, selector: str) -> str:
        return self._call("POST", "/element", {"using": "css selector", "value": selector})[ELEMENT]

    def click(self, selector: str) -> None:
        self._call("POST", f"/element/{self.find(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        """Types into an element; of a file input, `text` is the file's path."""
        self._call("POST", f"/element/{self.find(selector)}/value", {"text": text})

    def keys(self, *actions: tuple[str, str]) -> None:
        """Presses (`down`, key) and releases (`up`, key) keys."""
        steps = [{"type": f"key{way.title()}", "value": key} for way, key in actions]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": steps}]})

    def drag(self, selector: str, *way: tuple[int, int]) -> None:
        """Presses the pointer on an element and moves it along points, from the element's middle."""
        origin = {ELEMENT: self.find(selector)}
        self.run("arguments[0].scrollIntoView({block: 'center'})", origin)
        at = [{"type": "pointerMove", "duration": 20, "origin": origin, "x": x, "y": y} for x, y in way]
        steps = [at[0], {"type": "pointerDown", "button": 0}, *at[1:], {"type": "pointerUp", "button": 0}]
        self._call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": steps}]})

    def picture(self) -> bytes:
        """A PNG of the window."""
        return base64.b64decode(self._call("GET", "/screenshot"))

    def complaints(self) -> list[str]:
        """The page's errors since the last call."""
        said = self._call("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in said if entry["level"] == "SEVERE"]
