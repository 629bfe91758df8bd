"""Open a report in headless Chromium: no console message, no request, no overflow; save screenshots in light and dark.

    python benchmarks/report_in_browser.py RUN/report.html --out screenshots

Talks to the browser over its debugging pipe, so that nothing but Chromium (the Debian package `chromium`) is needed.
Prints one JSON object and exits with status 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
TIMEOUT_SECONDS = 120.0
LONGEST_SCREENSHOT = 12000
MEASURE = """(() => {
  const wide = [...document.querySelectorAll('main *')].filter(e => {
    const r = e.getBoundingClientRect();
    return r.width > 0 && r.right > innerWidth + 1 && !e.closest('.scroll') && !e.closest('pre') && !e.closest('svg');
  });
  const cut = [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1);
  const text = [...document.querySelectorAll('.figure svg text')].filter(e => {
    const r = e.getBoundingClientRect(), p = e.closest('svg').getBoundingClientRect();
    return r.left < p.left - 12 || r.right > p.right + 12 || r.bottom > p.bottom + 12;
  });
  return JSON.stringify({
    width: innerWidth, page_width: document.documentElement.scrollWidth, height: document.documentElement.scrollHeight,
    overflowing: wide.slice(0, 5).map(e => e.outerHTML.slice(0, 120)),
    scrolling_tables: cut.map(e => e.querySelector('table').className || e.innerText.slice(0, 60)),
    figure_text_outside: text.slice(0, 5).map(e => e.textContent),
    images: document.images.length, broken_images: [...document.images].filter(i => !i.naturalWidth).length,
  });
})()"""


class Browser:
    """The DevTools protocol over a pipe: messages end with a zero byte."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._pending = b""
        self._last_id = 0
        self.session: str | None = None
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last_id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def wait_for(self, method: str) -> None:
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._receive())

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._from, 1 << 16) if ready else b""
            if not data:
                raise RuntimeError("the browser does not answer")
            self._pending += data
        message, _, self._pending = self._pending.partition(b"\0")
        decoded: dict[str, Any] = json.loads(message)
        return decoded


@contextmanager
def chromium() -> Iterator[Browser]:
    binary = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if binary is None:
        sys.exit("no Chromium found; on Debian: apt-get install chromium")
    to_browser, from_browser = os.pipe(), os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # the browser reads from descriptor 3 and writes to 4
        command = f'exec "$0" "$@" 3<&{to_browser[0]} 4>&{from_browser[1]}'
        process = subprocess.Popen(
            ["bash", "-c", command, binary, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser[0], from_browser[1]),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        try:
            yield Browser(to_browser[1], from_browser[0])
        finally:
            process.terminate()
            process.wait()


def inspect(page: Path, out: Path, width: int) -> dict[str, Any]:
    """Load the page and say what it did; screenshots go to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        browser.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log", "Audits"):
            browser.call(f"{domain}.enable")
        browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        url = page.resolve().as_uri()
        browser.call("Page.navigate", url=url)
        browser.wait_for("Page.loadEventFired")
        measured = json.loads(browser.call("Runtime.evaluate", expression=MEASURE)["result"]["value"])
        height = min(measured["height"], LONGEST_SCREENSHOT)
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        for theme in ("light", "dark"):
            features = [{"name": "prefers-color-scheme", "value": theme}]
            browser.call("Emulation.setEmulatedMedia", features=features)
            picture = browser.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
            (out / f"{page.stem}-{theme}.png").write_bytes(base64.b64decode(picture["data"]))
        events = browser.events
    sent = [e["params"]["request"]["url"] for e in events if e.get("method") == "Network.requestWillBeSent"]
    console = [
        json.dumps(event["params"])[:300]
        for event in events
        if event.get("method")
        in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded", "Audits.issueAdded")
    ]
    requests = [address for address in sent if address != url and not address.startswith("data:")]
    return {"page": str(page), "bytes": page.stat().st_size, "console": console, "requests": requests, **measured}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("page", type=Path)
    parser.add_argument("--out", type=Path, default=Path("screenshots"), help="folder for the screenshots")
    parser.add_argument("--width", type=int, default=1200, help="width of the window in pixels")
    arguments = parser.parse_args()
    if not arguments.page.is_file():
        parser.error(f"{arguments.page} is not there")
    found = inspect(arguments.page, arguments.out, arguments.width)
    print(json.dumps(found, indent=2))
    wrong = [
        key for key in ("console", "requests", "overflowing", "broken_images", "figure_text_outside") if found[key]
    ]
    if found["page_width"] > found["width"]:
        wrong.append("page_width")
    if wrong:
        print(f"not as it should be: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
