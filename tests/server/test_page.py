"""The page at `/`, in a real browser where there is one, and the state that it shows."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from tests.server.engine_helpers import stopped
from tests.server.openai_site import DEMO, Site, models, with_template
from tests.server.reasoning_model import serve_thinker
from tests.waiting import LIMIT_S, attempts, eventually

from hasten.engine.chat import ChatTemplate
from hasten.server.openai.prompts import ChatPrompts
from hasten.server.page.routes import content_security_policy
from hasten.server.security import ApiKeys

pytestmark = pytest.mark.any_python

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page
    from playwright.sync_api import Request as BrowserRequest

LOST = ("lost", "missing")
"""A text model, and the token model that it needs and that is not there."""
KEY = "a key of the tests"
GONE = "the server cannot be reached; is it running?"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
OpenPage = Callable[..., "Page"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    lost = models(DEMO, "missing", "lost")[1:]
    folder = with_template(tmp_path_factory.mktemp("page"))
    result = Site([*models(folder, "fastertransformer", "story"), *lost], ApiKeys([KEY]))
    yield result
    result.close()


def idle(site: Site) -> bool:
    return site.idle("fastertransformer")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    from playwright.sync_api import sync_playwright

    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS)) as result,
    ):
        yield result


@pytest.fixture
def open_page(browser: Browser, site: Site) -> Iterator[OpenPage]:
    """Opens the page, by default with a key. No error may show in its console, no request go elsewhere."""
    contexts: list[Any] = []
    wrong: list[str] = []

    def open_(
        key: str | None = KEY, viewport: dict[str, int] = WIDE, scheme: str = "light", url: str = site.url
    ) -> Page:
        context = browser.new_context(viewport=viewport, color_scheme=scheme)  # type: ignore[arg-type]
        contexts.append(context)
        context.set_default_timeout(1000 * LIMIT_S)
        if key is not None:
            context.add_init_script(f"if (location.host) sessionStorage.setItem('hasten-key', {key!r})")
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if "Content Security" in message.text else None)
        own = (url, "data:", "about:")
        page.on("request", lambda one: None if one.url.startswith(own) else wrong.append(one.url))
        page.goto(url)
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
    assert len(response.content) < 60_000


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


def test_a_template_is_read_once_for_the_page_and_the_api(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    from_folder = ChatTemplate.from_folder

    def noted(folder: str) -> ChatTemplate | None:
        read.append(folder)
        return from_folder(folder)

    monkeypatch.setattr(ChatTemplate, "from_folder", noted)
    client, prompts = site.engine("fastertransformer"), ChatPrompts()

    async def look() -> list[bool]:
        return await asyncio.gather(*(prompts.has_template(client) for _ in range(3)))

    assert asyncio.run(look()) == [True] * 3
    assert read == [client.info.tokenizer_folder]


def test_a_completion_is_streamed_and_counted(open_page: OpenPage) -> None:
    page = open_page()
    server_says(page, "ready")
    page.get_by_label("Prompt").fill("Anna opened the door and")
    page.get_by_label("Max tokens").fill("24")
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Generate").click()
    page.locator(".said").get_by_text(re.compile(r"(max tokens reached|finished): \d+ tokens in")).wait_for()
    text = page.get_by_role("region", name="Completion").inner_text()
    assert text.startswith("Anna opened the door and ")
    assert len(text) > 50
    assert page.locator(".error").is_hidden()
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
            page.locator(".said").get_by_text(re.compile("^stopped: ")).wait_for()
        break
    eventually(lambda: idle(site))
    assert stop.is_disabled()
    assert page.locator(".error").is_hidden()


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
    page.locator(".said").get_by_text(re.compile("2 tokens")).wait_for()
    assert alert.is_hidden()


def test_a_server_that_is_gone_leaves_nothing_that_looks_alive(open_page: OpenPage) -> None:
    page = open_page()
    server_says(page, "ready")
    page.locator("article .dot.good").wait_for()
    page.route("**/state", lambda route: route.abort())
    page.route("**/v1/completions", lambda route: route.abort())
    server_says(page, GONE)
    assert page.locator("main .dot.good").count() == 0
    assert page.locator("main .dot.bad").count() == 0
    page.locator("article .about").get_by_text("its state is not known now").first.wait_for()
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("alert").get_by_text(GONE, exact=True).wait_for()
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
    assert page.evaluate("(key) => Object.values(localStorage).every((value) => !value.includes(key))", KEY)


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


def run(page: Page, prompt: str, button: str = "Generate") -> None:
    """Send a prompt, and wait until all panels have their outputs."""
    page.get_by_role("textbox", name="Message" if button == "Send" else "Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name=button).click()
    page.locator("#stop:disabled").wait_for()
    assert page.locator(".error:visible").all_inner_texts() == []


def test_tokens_show_what_they_were_chosen_from(open_page: OpenPage) -> None:
    page = open_page()
    server_says(page, "ready")
    page.get_by_label("Token probabilities").check()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max tokens").fill("12")
    run(page, "Anna opened the door and")
    tokens, tip = page.locator(".token"), page.get_by_role("tooltip")
    assert tokens.count() == 12
    assert tip.is_hidden()
    tokens.nth(3).hover()
    assert tip.locator("div").count() == 5
    chances = [float(text.removesuffix(" %")) for text in tip.locator("span:last-child").all_inner_texts()]
    assert chances == sorted(chances, reverse=True)
    assert tip.locator(".chosen").inner_text() == tip.locator("div").first.inner_text(), (
        "greedy takes the most probable"
    )
    page.get_by_role("region", name="Completion").focus()
    page.keyboard.press("ArrowRight")
    assert "at" in (tokens.nth(4).get_attribute("class") or "").split()
    assert page.locator("#spoken").inner_text().count("%") == 5
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_two_settings_are_compared_and_survive_a_reload(open_page: OpenPage) -> None:
    page = open_page()
    server_says(page, "ready")
    page.get_by_label("Max tokens").fill("8")
    page.get_by_role("button", name="Compare").click()
    groups = [page.get_by_role("group", name=f"Settings {name}") for name in "AB"]
    for group, seed in zip(groups, ("1", "2"), strict=True):
        group.get_by_text("More settings").click()
        group.get_by_label("Seed").fill(seed)
        group.get_by_label("Temperature").fill("2")
    run(page, "Anna opened the door and")
    outputs = [group.get_by_role("region").inner_text() for group in groups]
    assert outputs[0] != outputs[1]
    assert all(output.startswith("Anna opened the door and") for output in outputs)
    page.reload()
    server_says(page, "ready")
    assert [group.get_by_role("region").inner_text() for group in groups] == outputs
    assert [group.get_by_label("Seed").input_value() for group in groups] == ["1", "2"]
    page.get_by_role("button", name="Compare").click()
    run(page, "Tom had a red ball and")
    assert page.locator(".entry").all_inner_texts() == ["Tom had a red ball and", "Anna opened the door and"]
    page.get_by_role("button", name="Anna opened the door and", exact=True).click()
    assert [group.get_by_role("region").inner_text() for group in groups] == outputs
    page.get_by_role("button", name="Delete “Tom").click()
    assert page.locator(".entry").all_inner_texts() == ["Anna opened the door and"]
    page.get_by_role("button", name="Clear history").click()
    assert page.locator(".entry").count() == 0


def test_a_chat_goes_on_from_its_messages(open_page: OpenPage) -> None:
    page = open_page()
    server_says(page, "ready")
    page.get_by_text("Chat", exact=True).click()
    page.get_by_label("Max tokens").fill("8")
    page.get_by_label("System instructions").fill("Be short")
    bodies: list[dict[str, Any]] = []

    def note(sent: BrowserRequest) -> None:
        if "chat" in sent.url:
            bodies.append(json.loads(sent.post_data or ""))

    page.on("request", note)
    for message in ("Tell me a story", "It's good: go on"):
        run(page, message, "Send")
    assert [message["role"] for message in bodies[1]["messages"]] == ["system", "user", "assistant", "user"]
    shown = page.locator(".text.chat > div")
    assert [shown.nth(at).get_attribute("class") for at in range(4)] == ["user", "assistant"] * 2
    assert shown.nth(1).inner_text().strip() == bodies[1]["messages"][2]["content"].strip()
    page.get_by_role("button", name="New").click()
    assert shown.count() == 0
    page.get_by_text("Tell me a story").click()
    assert shown.count() == 4


def test_reasoning_stands_apart_from_the_answer(open_page: OpenPage, tmp_path: Path) -> None:
    thinker = serve_thinker(tmp_path)
    try:
        page = open_page(url=thinker.url)
        server_says(page, "ready")
        page.get_by_text("Chat", exact=True).click()
        page.get_by_label("Max tokens").fill("24")
        page.get_by_label("Temperature").fill("0")
        run(page, "Where is Anna?", "Send")
        assert "max tokens reached: 24 tokens in" in page.locator(".said").inner_text()
        answer = page.locator(".text.chat > .assistant")
        assert len(answer.locator("details span").inner_text()) > 20
        answer.get_by_text("Reasoning").click()
        assert answer.inner_text().strip() == "Reasoning"
    finally:
        thinker.close()


def test_a_request_is_shown_as_a_command_that_runs(open_page: OpenPage) -> None:
    page = open_page()
    server_says(page, "ready")
    page.get_by_label("Max tokens").fill("3")
    page.get_by_text("As a curl command").click()
    page.get_by_label("Prompt").fill("It's Anna's \"door\" and\n")
    command = page.locator(".code pre", has_text="door").inner_text()
    environment = {**os.environ, "API_KEY": KEY, "no_proxy": "*"}
    done = subprocess.run(
        ["bash", "-c", f"{command} -s"], env=environment, capture_output=True, timeout=LIMIT_S, check=True
    )
    assert json.loads(done.stdout)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_it_can_be_read_on_any_screen(
    open_page: OpenPage, viewport: dict[str, int], scheme: str, tmp_path: Path
) -> None:
    page = open_page(viewport=viewport, scheme=scheme)
    server_says(page, "ready")
    page.get_by_label("Max tokens").fill("30")
    page.get_by_role("button", name="Generate").click()
    page.locator(".said").get_by_text(re.compile(r"tokens in")).wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    for selector in (
        "body",
        ".name",
        ".text",
        ".text .user",
        "dt",
        "dd",
        ".said",
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
