"""Chromium without a screen, driven over its debugging pipe (DevTools protocol: JSON ended by a zero byte)."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Browser", "browser", "why_no_browser"]

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe")


def _program() -> str | None:
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


def why_no_browser() -> str | None:
    """The sentence to skip with, or None."""
    return None if _program() else "no Chromium is installed: apt-get install chromium"


class Browser:
    """One page of a running Chromium."""

    def __init__(self, commands: int, events: int) -> None:
        self._commands, self._events = commands, events
        self._numbers = itertools.count(1)
        self._held = b""
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]

    def open(self, url: str) -> None:
        """Go to `url`."""
        self._call("Page.navigate", {"url": url}, self._session)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self._call("Runtime.evaluate", {"expression": script, "returnByValue": True}, self._session)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str, seconds: float = 60.0) -> None:
        """Until the expression is true."""
        end = time.monotonic() + seconds
        while not self.run(condition):
            assert time.monotonic() < end, f"never came true: {condition}"
            time.sleep(0.05)

    def _call(self, method: str, params: dict[str, Any], session: str | None = None) -> Any:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._held:
                read = os.read(self._events, 1 << 16)
                assert read, "the browser has ended"
                self._held += read
            line, _, self._held = self._held.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start a browser with this folder as its profile, and end it."""
    to_browser, commands = os.pipe()
    events, from_browser = os.pipe()
    program = _program()
    assert program is not None

    # Chromium reads commands from descriptor 3 and writes answers to 4.
    shell = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
    started = subprocess.Popen(
        ["bash", "-c", shell, program, *_FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(to_browser, from_browser),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Browser(commands, events)
    finally:
        started.kill()
        started.wait(30)
        os.close(commands)
        os.close(events)
