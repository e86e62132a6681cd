"""The page at /, in a browser without a screen."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import Browser, browser, why_no_browser
from tiny_server import Served, get, serving, tiny_model


def test_the_page_asks_no_other_host(served: Served) -> None:
    answer = get(served.url + "/")
    assert answer.status_code == 200
    assert not re.search(r"(src|href|url|fetch|import)\W{1,3}(https?:)?//", answer.text)
    assert "default-src 'none'" in answer.headers["content-security-policy"]


def say(page: Browser, text: str, longest: int) -> None:
    page.run(
        f"document.getElementById('longest').value = {longest};"
        "document.getElementById('temperature').value = 0;"
        f"document.getElementById('text').value = {text!r};"
        "document.getElementById('form').requestSubmit();"
    )


def shown(page: Browser, kind: str) -> list[str]:
    found: list[str] = page.run(f"[...document.querySelectorAll('.turn.{kind}')].map((turn) => turn.textContent)")
    return found


def number(page: Browser, place: str) -> float:
    text: str = page.run(f"document.getElementById('{place}').textContent")
    return float(text.removesuffix(" ms"))


@pytest.mark.skipif(why_no_browser() is not None, reason=str(why_no_browser()))
def test_a_chat_in_a_browser(tokenizer: Any, tmp_path: Path) -> None:
    with serving(tiny_model(), tokenizer, api_key="secret") as served, browser(tmp_path) as page:
        page.open(served.url + "/")
        page.wait("document.readyState === 'complete' && !!document.getElementById('form')")

        say(page, "hello <b>x</b>", 8)
        page.wait("document.querySelectorAll('.turn.error').length === 1")
        assert "API key" in shown(page, "error")[0]

        page.run("document.getElementById('key').value = 'secret'")
        say(page, "hello <b>x</b>", 8)
        page.wait(
            "!document.getElementById('send').disabled && document.querySelectorAll('.turn.assistant').length === 1"
        )
        assert shown(page, "user")[-1] == "hello <b>x</b>"
        (answer,) = shown(page, "assistant")
        with httpx.Client(base_url=served.url, headers={"Authorization": "Bearer secret"}) as client:
            asked = {"messages": [{"role": "user", "content": "hello <b>x</b>"}], "max_tokens": 8, "temperature": 0}
            reply = client.post("/v1/chat/completions", json={"model": "tiny"} | asked).json()
        assert answer == reply["choices"][0]["message"]["content"]
        assert number(page, "count") == 8
        assert number(page, "speed") > 0
        assert number(page, "ttft") > 0
        page.wait("document.getElementById('running').textContent === '0'")
        page.wait("document.getElementById('waiting').textContent === '0'")
        page.wait("document.getElementById('replicas').textContent === '1'")
        assert page.run("document.getElementById('memory').textContent").endswith(" MiB")

        step = served.engine.manager._on_step
        served.engine.manager._on_step = lambda arrived: (time.sleep(0.02), step(arrived))  # as a larger model does
        say(page, "a long one", 400)
        page.wait("Number(document.getElementById('count').textContent) > 8")
        page.run("document.getElementById('stop').click()")
        served.wait_idle()
        assert number(page, "count") < 400
