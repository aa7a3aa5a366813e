"""The page at `/`, in a real browser where there is one, and the state that it shows."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from tests.server.engine_helpers import stopped
from tests.server.openai_site import DEMO, Site, models
from tests.waiting import attempts, eventually

from hasten.server.page.routes import content_security_policy
from hasten.server.security import ApiKeys

pytestmark = pytest.mark.any_python

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

LOST = ("lost", "missing")
"""A text model, and the token model that it needs and that is not there."""
KEY = "a key of the tests"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
OpenPage = Callable[..., "Page"]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    lost = models(DEMO, "missing", "lost")[1:]
    made = Site([*models(DEMO, "fastertransformer", "story"), *lost], ApiKeys([KEY]))
    yield made
    made.close()


def idle(site: Site) -> bool:
    return site.idle("fastertransformer")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    from playwright.sync_api import sync_playwright

    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS)) as made,
    ):
        yield made


@pytest.fixture
def open_page(browser: Browser, site: Site) -> Iterator[OpenPage]:
    """Opens the page, by default with a key. No error may show in its console, no request go elsewhere."""
    contexts: list[Any] = []
    wrong: list[str] = []

    def open_(key: str | None = KEY, viewport: dict[str, int] = WIDE, scheme: str = "light") -> Page:
        context = browser.new_context(viewport=viewport, color_scheme=scheme)  # type: ignore[arg-type]
        contexts.append(context)
        context.set_default_timeout(100_000)
        if key is not None:
            context.add_init_script(f"if (location.host) sessionStorage.setItem('hasten-key', {key!r})")
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if "Content Security" in message.text else None)
        own = (site.url, "data:", "about:")
        page.on("request", lambda one: None if one.url.startswith(own) else wrong.append(one.url))
        page.goto(site.url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert wrong == []


def server_says(page: Page, text: str) -> None:
    page.locator("#server-text").get_by_text(text, exact=True).wait_for()


def test_the_page_may_load_nothing_and_be_framed_by_nobody(site: Site) -> None:
    response = httpx.get(site.url)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert policy == content_security_policy(response.text)
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "frame-ancestors 'none'" in policy
    assert re.findall(r"""(?:src|href)=["'](?!data:)""", response.text) == []
    assert len(response.content) < 40_000


def test_the_state_is_behind_the_key(site: Site) -> None:
    assert httpx.get(f"{site.url}/state").status_code == 401
    state = httpx.get(f"{site.url}/state", headers={"authorization": f"Bearer {KEY}"}).json()
    (engine,) = state["engines"]
    facts = {name: engine[name] for name in ("id", "ready", "type", "dtype", "device", "running", "waiting")}
    assert facts == {
        **{"id": "story", "ready": True, "type": "bloom", "dtype": "fp32", "device": "cpu"},
        **{"running": 0, "waiting": 0},
    }
    assert engine["num_blocks"] > engine["used_blocks"] == 0
    assert {entry["name"]: entry["state"] for entry in state["others"]} == dict.fromkeys(LOST, "UNAVAILABLE")


def test_a_completion_is_streamed_and_counted(open_page: OpenPage) -> None:
    page = open_page()
    server_says(page, "ready")
    page.get_by_label("Prompt").fill("Anna opened the door and")
    page.get_by_label("Max tokens").fill("24")
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Generate").click()
    page.locator("#said").get_by_text(re.compile(r"(max tokens reached|finished): \d+ tokens in")).wait_for()
    text = page.get_by_role("region", name="Completion").inner_text()
    assert text.startswith("Anna opened the door and ")
    assert len(text) > 50
    assert page.locator("#error").is_hidden()
    page.locator("dl div", has_text="Tokens out").get_by_text("24", exact=True).wait_for()


def go_on_for_long(page: Page) -> None:
    """Ask for what does not end by itself: the most probable tokens go round in a circle."""
    page.get_by_label("Prompt").fill("the the the the the the")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max tokens").fill("1900")


def test_stop_withdraws_what_runs(open_page: OpenPage, site: Site) -> None:
    page = open_page()
    server_says(page, "ready")
    go_on_for_long(page)
    stop, engine = page.get_by_role("button", name="Stop"), site.engine("fastertransformer")
    for _ in attempts("a request that runs"):
        before = engine.stats().generation_tokens
        page.get_by_label("Prompt").press("Control+Enter")
        eventually(lambda before=before: engine.stats().generation_tokens > before)  # type: ignore[misc]
        with stopped(engine):  # so that it goes on for as long as the browser takes
            if engine.stats().running != 1:
                continue
            page.locator("article .now").get_by_text(re.compile(r"^1 / 0")).wait_for()
            assert page.get_by_role("button", name="Generate").is_disabled()
            stop.click()  # waits until it can be clicked
            page.locator("#said").get_by_text(re.compile("^stopped: ")).wait_for()
        break
    eventually(lambda: idle(site))
    assert stop.is_disabled()
    assert page.locator("#error").is_hidden()


def test_leaving_the_page_withdraws_what_runs(open_page: OpenPage, site: Site) -> None:
    page = open_page()
    server_says(page, "ready")
    go_on_for_long(page)
    page.get_by_role("button", name="Generate").click()
    eventually(lambda: not idle(site))
    page.goto("about:blank")
    eventually(lambda: idle(site))


def test_errors_are_shown(open_page: OpenPage) -> None:
    page = open_page()
    server_says(page, "ready")
    page.get_by_label("Prompt").fill("Anna " * 2100)
    page.get_by_role("button", name="Generate").click()
    alert = page.get_by_role("alert")
    alert.get_by_text("the model's longest sequence has 2048 (400)").wait_for()
    completion = page.get_by_role("region", name="Completion")
    assert completion.inner_text() == "Output appears here"
    page.get_by_label("Prompt").fill("Anna")
    page.get_by_label("Max tokens").fill("2")
    page.get_by_role("button", name="Generate").click()
    page.locator("#said").get_by_text(re.compile("2 tokens")).wait_for()
    assert alert.is_hidden()


def test_a_server_that_is_gone_leaves_nothing_that_looks_alive(open_page: OpenPage) -> None:
    page = open_page()
    server_says(page, "ready")
    page.locator("article .dot.good").wait_for()
    page.route("**/state", lambda route: route.abort())
    page.route("**/v1/completions", lambda route: route.abort())
    server_says(page, "the server cannot be reached")
    assert page.locator("main .dot.good").count() == 0
    assert page.locator("main .dot.bad").count() == 0
    page.locator("article .about").get_by_text("its state is not known now").first.wait_for()
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("alert").get_by_text("the server cannot be reached", exact=True).wait_for()
    page.unroute("**/state")
    server_says(page, "ready")
    page.locator("article .dot.good").wait_for()


def test_without_a_key_it_asks_for_one_and_keeps_it(open_page: OpenPage) -> None:
    page = open_page(key=None)
    server_says(page, "an API key is needed")
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("API key").press("Enter")
    server_says(page, "ready")
    page.reload()
    server_says(page, "ready")
    assert page.get_by_label("API key").input_value() == KEY
    assert page.evaluate("localStorage.length") == 0


def test_the_state_is_drawn(open_page: OpenPage) -> None:
    page = open_page()
    server_says(page, "ready")
    page.get_by_label("Max tokens").fill("300")
    page.get_by_role("button", name="Generate").click()
    page.wait_for_function(
        """() => {
            const lines = [...document.querySelectorAll("article svg .line")];
            return lines.length >= 3 && lines.every((line) => (line.getAttribute("d") ?? "").includes("L"));
        }"""
    )
    assert page.locator("article svg").count() == 3
    assert re.match(r"Tokens/s: [\d.,]+ out", page.locator("article svg").first.get_attribute("aria-label") or "")
    page.locator("article svg").first.hover()
    page.locator("article .now").first.get_by_text(re.compile(r"\d+ s ago$")).wait_for()
    for name, text in zip(LOST, page.locator("#others li").all_inner_texts(), strict=True):
        assert re.match(rf"{name}\nunavailable: .*'missing'", text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_it_can_be_read_on_any_screen(
    open_page: OpenPage, viewport: dict[str, int], scheme: str, tmp_path: Path
) -> None:
    page = open_page(viewport=viewport, scheme=scheme)
    server_says(page, "ready")
    page.get_by_label("Max tokens").fill("30")
    page.get_by_role("button", name="Generate").click()
    page.locator("#said").get_by_text(re.compile(r"tokens in")).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    for selector in (
        "body",
        ".name",
        "#text",
        "#text .prompt",
        "dt",
        "dd",
        "#said",
        "button.main",
        ".key",
        ".key.second",
    ):
        assert contrast(page, selector) >= 4.5, selector
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 10_000


def contrast(page: Page, selector: str) -> float:
    """Contrast of an element's text with what is behind it, as WCAG defines it."""
    text, ground = page.locator(selector).first.evaluate(
        """(element) => {
            const text = getComputedStyle(element).color;
            let behind = element;
            while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
            return [text, getComputedStyle(behind).backgroundColor];
        }"""
    )
    light, dark = sorted((luminance(text), luminance(ground)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(color: str) -> float:
    channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
