"""A page in headless Chromium, driven over the DevTools protocol on a pipe, so that nothing but a Chromium is
needed.

test_leaderboard.py checks site/index.html with it; `python tests/browser_page.py OUT` writes screenshots of
the page, narrow and wide, light and dark.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium():
    """Path of a Chromium, or None."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One tab. Collects console messages, exceptions and requested addresses."""

    def __init__(self, width=1280, height=900, scheme="light", reduced_motion=True):
        self.profile, self.sent = tempfile.TemporaryDirectory(ignore_cleanup_errors=True), 0
        self.messages, self.requests, self.events, self.loaded, self.session = [], [], b"", False, None
        to_child, self.write_fd = os.pipe()
        self.read_fd, from_child = os.pipe()

        def wire():  # the protocol is spoken on descriptors 3 and 4
            for fd, target in ((os.dup(to_child), 3), (os.dup(from_child), 4)):
                os.dup2(fd, target)

        self.process = subprocess.Popen(
            [
                chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                "--hide-scrollbars", "--disable-background-networking", "--disable-dev-shm-usage",
                f"--user-data-dir={self.profile.name}", "--remote-debugging-pipe", "about:blank"
            ],
            preexec_fn=wire,
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "TMPDIR": self.profile.name},
        )
        os.close(to_child), os.close(from_child)
        targets = self.call("Target.getTargets")["targetInfos"]
        tab = next(t for t in targets if t["type"] == "page")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
            mobile=width < 600
        )
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce" if reduced_motion else "no-preference"},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)

    def receive(self):
        while b"\0" not in self.events:
            part = os.read(self.read_fd, 1 << 20)
            if not part:
                raise RuntimeError("Chromium ended")
            self.events += part
        line, _, self.events = self.events.partition(b"\0")
        event = json.loads(line)
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.consoleAPICalled":
            self.messages.append(str(params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.messages.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded":
            self.messages.append(str(params["entry"]))
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Page.loadEventFired":
            self.loaded = True
        return event

    def call(self, method, **params):
        self.sent += 1
        body = {"id": self.sent, "method": method, "params": params} | (
            {"sessionId": self.session} if self.session else {}
        )
        os.write(self.write_fd, json.dumps(body).encode() + b"\0")
        while (event := self.receive()).get("id") != self.sent:
            pass
        if "error" in event:
            raise RuntimeError(f"{method}: {event['error']}")
        return event["result"]

    def open(self, path):
        self.loaded = False
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        while not self.loaded:
            self.receive()

    def run(self, script):
        """Value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(str(result["exceptionDetails"]))
        return result["result"].get("value")

    def press(self, key):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key)

    def screenshot(self, path, whole=True):
        size = {"width": self.run("innerWidth"), "height": self.run("document.body.scrollHeight")}
        clip = {"clip": {"x": 0, "y": 0, "scale": 1, **size}} if whole else {}
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **clip)
        Path(path).write_bytes(base64.b64decode(data["data"]))

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=20)
        os.close(self.write_fd), os.close(self.read_fd)
        self.profile.cleanup()


def main(out, page=ROOT / "site/index.html"):
    out.mkdir(parents=True, exist_ok=True)
    for width in (390, 1280):
        for scheme in ("light", "dark"):
            tab = Page(width=width, height=844 if width < 600 else 900, scheme=scheme)
            tab.open(page)
            tab.screenshot(out / f"page_{width}_{scheme}.png")
            print(f"{out}/page_{width}_{scheme}.png: {len(tab.messages)} console messages, "
                  f"{len(tab.requests)} request")
            tab.close()


if __name__ == "__main__":
    if not chromium() or len(sys.argv) < 2:
        sys.exit("usage: python tests/browser_page.py OUT [PAGE], with a Chromium on the PATH")
    main(Path(sys.argv[1]), *sys.argv[2:])
