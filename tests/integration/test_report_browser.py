"""The report in a real browser: no script, no request, no error, on desk and phone.

Chromium is driven over its debugging pipe (NUL-separated JSON on two file
descriptors), which reports every request, console message and exception of the page.
"""

from __future__ import annotations

import base64
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedmed.report.page import build_report

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe"),
)

LAUNCH = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(pipes[0], 3)
os.dup2(pipes[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Chromium reads commands from descriptor 3 and writes to 4."""

CONTRAST = """
(() => {
  const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = c => { const l = c.slice(0, 3).map(v => v / 255).map(
    v => v <= 0.03928 ? v / 12.92 : Math.pow((v + 0.055) / 1.055, 2.4));
    return 0.2126 * l[0] + 0.7152 * l[1] + 0.0722 * l[2]; };
  const ground = e => { for (; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] > 0) return c; } return [255, 255, 255]; };
  const weak = [];
  for (const e of document.querySelectorAll('body *:not(svg):not(svg *)')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const a = light(rgb(getComputedStyle(e).color)), b = light(ground(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) weak.push(e.tagName + ' ' + ratio.toFixed(2)); }
  return weak;
})()
"""
STRUCTURE = """
(() => {
  const all = s => [...document.querySelectorAll(s)];
  const ids = all('[id]').map(e => e.id);
  return {
    tables: all('table').length,
    headless: all('table').filter(t => !t.caption || !t.tHead).length,
    unscoped: all('th:not([scope])').length,
    plots: all('svg.plot').length,
    overlays: all('svg.overlay').length,
    unlabelled: all('svg:not([aria-hidden])').filter(
      e => e.getAttribute('role') !== 'img' || !e.getAttribute('aria-label')).length,
    images: all('image').map(e => e.getAttribute('href').slice(0, 22)),
    scripts: all('script').length,
    doubled: ids.filter((id, at) => ids.indexOf(id) !== at),
    broken: all('nav a').filter(a => !document.querySelector(a.hash)).length,
    results: (all('section').find(s => s.querySelector('#results')) || {}).innerText,
    wide: document.documentElement.scrollWidth - window.innerWidth,
    flat: all('.plots svg, details[open] .overlay').filter(
      e => e.getBoundingClientRect().height < 60).length,
  };
})()
"""


class Browser:
    """Headless Chromium, spoken to in the DevTools protocol."""

    def __init__(self, program: str, profile: Path) -> None:
        to_read, self._out = os.pipe()
        self._in, to_write = os.pipe()
        command = [sys.executable, "-c", LAUNCH, str(to_read), str(to_write), program]
        self._process = subprocess.Popen(
            [*command, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_read, to_write),
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer = b""
        self._number = 0
        self.events: list[dict[str, Any]] = []

    def start(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    _session: str | None = None

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._receive()
            if reply.get("id") == self._number:
                assert "error" not in reply, reply
                return dict(reply["result"])
            self.events.append(reply)

    def open(self, path: Path, *, width: int, phone: bool = False) -> None:
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=phone,
        )
        self.call("Page.navigate", url=path.as_uri())
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._receive())
        self.evaluate("new Promise(done => setTimeout(done, 100))")

    def evaluate(self, expression: str) -> Any:
        reply = self.call(
            "Runtime.evaluate",
            expression=expression,
            returnByValue=True,
            awaitPromise=True,
        )
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def screenshot(self, path: Path) -> None:
        reply = self.call(
            "Page.captureScreenshot", captureBeyondViewport=True, format="png"
        )
        path.write_bytes(base64.b64decode(reply["data"]))

    def requests(self) -> list[str]:
        sent = (e for e in self.events if e["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def complaints(self) -> list[str]:
        kinds = {"Runtime.exceptionThrown", "Runtime.consoleAPICalled"}
        return [
            json.dumps(event["params"])
            for event in self.events
            if event["method"] in kinds or event["method"] == "Log.entryAdded"
        ]

    def close(self) -> None:
        """End the browser by closing its pipes; kill it if it does not follow."""
        os.close(self._out)
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            piece = os.read(self._in, 1 << 20)
            if not piece:
                raise AssertionError("the browser ended")
            self._buffer += piece
        message, self._buffer = self._buffer.split(b"\0", 1)
        return dict(json.loads(message))


def _find_browser() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


sys.path.insert(0, str(Path(__file__).parents[1]))
folders = importlib.import_module("report_folders")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = _find_browser()
    if program is None:
        pytest.skip(f"NO BROWSER: none of {', '.join(BROWSERS)} is installed")
    opened = Browser(program, tmp_path_factory.mktemp("profile"))
    try:
        opened.start()
        yield opened
    finally:
        opened.close()


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = folders.write_comparison(tmp_path_factory.mktemp("all") / "compare")
    started = time.process_time()  # other tests may be running beside this one
    report = build_report(folder)
    assert time.process_time() - started < 6
    return report


def _assert_quiet(browser: Browser, report: Path) -> None:
    assert browser.complaints() == []
    requests = browser.requests()
    assert requests[0] == report.as_uri()
    assert all(url.startswith("data:") for url in requests[1:])


@pytest.mark.parametrize("width", [1280, 768, 390])
def test_a_comparison_opens_without_errors_or_requests(
    browser: Browser, comparison: Path, width: int
) -> None:
    browser.open(comparison, width=width, phone=width < 500)
    _assert_quiet(browser, comparison)
    page = browser.evaluate(STRUCTURE)
    assert page["scripts"] == page["headless"] == page["unscoped"] == 0
    assert page["unlabelled"] == page["broken"] == page["flat"] == 0
    assert page["doubled"] == []
    assert page["wide"] <= 0
    assert page["plots"] == 3 + 2
    assert page["overlays"] == 4 * 3 * 3
    assert set(page["images"]) == {"data:image/png;base64,"}
    for word in ("separate", "fedavg", "fedbn", "ms_net", "Overall", "Worst site"):
        assert word in page["results"]


def test_it_fits_on_paper(browser: Browser, comparison: Path) -> None:
    browser.call("Emulation.setEmulatedMedia", media="print")
    browser.open(comparison, width=700)  # A4 between margins of 12 mm
    wide = "[...document.querySelectorAll('table')].map(e => e.offsetWidth)"
    assert max(browser.evaluate(wide)) <= 700
    shown = "[...document.querySelectorAll('.overlay')].map(e => e.checkVisibility())"
    assert all(browser.evaluate(shown)), "folded galleries open on paper"
    browser.call("Emulation.setEmulatedMedia", media="")


def test_text_has_contrast(browser: Browser, comparison: Path) -> None:
    browser.open(comparison, width=1280)
    assert browser.evaluate(CONTRAST) == []


def test_a_single_run_opens_without_errors_or_requests(
    browser: Browser, tmp_path: Path
) -> None:
    plan = folders.Plan(held_out=("c",), classes=("prostate", "bladder"))
    report = build_report(folders.write_run(tmp_path / "run", plan))
    browser.open(report, width=1280)
    _assert_quiet(browser, report)
    page = browser.evaluate(STRUCTURE)
    assert (page["plots"], page["overlays"]) == (1 + 2, 3 * 3)
    assert page["doubled"] == []


def test_hostile_names_stay_text(browser: Browser, tmp_path: Path) -> None:
    evil = "<img src=http://127.0.0.1:9/x onerror=console.error(1)>\"'$a$"
    plan = folders.Plan(name=evil, strategy=evil, quarantined={evil: evil})
    report = build_report(folders.write_run(tmp_path / "run", plan))
    browser.open(report, width=1280)
    _assert_quiet(browser, report)
    assert browser.evaluate("document.querySelector('h1').textContent") == evil
    assert browser.evaluate("document.querySelectorAll('img').length") == 0


def test_the_browser_would_tell(browser: Browser, tmp_path: Path) -> None:
    """The checks above can fail: a page with every fault is caught."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<p style='color:#bbb'>pale</p><img src='http://127.0.0.1:9/x.png'>"
        "<svg></svg><script>console.error('loud'); throw new Error('thrown')</script>"
    )
    browser.open(page, width=1280)
    told = " ".join(browser.complaints())
    assert "loud" in told
    assert "thrown" in told
    assert "http://127.0.0.1:9/x.png" in browser.requests()
    assert browser.evaluate(CONTRAST)[0].startswith("P ")
    assert browser.evaluate(STRUCTURE)["unlabelled"] == 1
