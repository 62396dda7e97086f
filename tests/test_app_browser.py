"""The app in a real browser: every tab used, on a desktop and a phone, in light and dark, by mouse and keyboard."""

import os
import re
import shutil
from pathlib import Path

import pytest


pytest.importorskip("gradio", reason="the app needs gradio: make test-app")
playwright = pytest.importorskip("playwright.sync_api", reason="browsers need playwright: make test-app")

import gradio as gr  # noqa: E402

from groupformer.app import FONTS, build  # noqa: E402


pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOTS = os.environ.get("SCREENSHOTS")  # a folder to put pictures into, for those who want to look
PATIENCE = 40_000  # milliseconds: two slow cores regroup and measure


@pytest.fixture(scope="module")
def address():
    page = build()
    _, url, _ = page.queue().launch(
        prevent_thread_lock=True, quiet=True, theme=gr.themes.Default(**FONTS), footer_links=[]
    )
    yield url
    page.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as starter:
        options = {"executable_path": CHROMIUM} if CHROMIUM else {}
        running = starter.chromium.launch(args=["--no-sandbox"], **options)
        yield running
        running.close()


playwright.expect.set_options(timeout=PATIENCE)


def opened(browser, address, *, dark=False, width=1280, height=900):
    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(PATIENCE)
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(address + ("?__theme=dark" if dark else "?__theme=light"))
    page.get_by_role("tab", name="Generate").wait_for()
    return page


@pytest.fixture
def page(browser, address):
    page = opened(browser, address)
    yield page
    assert page.errors == []
    page.close()


def picture(page, name, **options):
    if SCREENSHOTS:
        page.screenshot(path=str(Path(SCREENSHOTS) / f"{name}.png"), **options)


def go_to(page, tab):
    page.get_by_role("tab", name=tab).click()


def text_of(page, element):
    return page.locator(f"#{element} textarea")


def test_text_streams_in(page):
    text_of(page, "prompt").fill("The river")
    page.locator("#generate-button").click()
    playwright.expect(text_of(page, "generated")).to_have_value(re.compile(r"^\s*The river\W.*\w"))
    picture(page, "generate")


def test_an_empty_prompt_is_a_message(page):
    text_of(page, "prompt").fill("")
    page.locator("#generate-button").click()
    message = page.get_by_text("The text is empty; write something to go on from.")
    message.first.wait_for()
    assert page.get_by_text("Traceback").count() == 0
    picture(page, "empty")


def test_the_model_is_regrouped_live(page):
    go_to(page, "Regroup")
    slider = page.locator("#kv input[type=number]")
    slider.fill("2")
    slider.press("Enter")
    page.locator("#regroup-button").click()
    page.locator("#regroup-note").get_by_text("The cache shrinks to 2 of 8 heads: 25%").wait_for()
    rows = page.locator("#comparison").get_by_role("row")
    playwright.expect(rows).to_have_count(3)
    cells = [rows.nth(place).get_by_role("gridcell").all_inner_texts() for place in (1, 2)]
    original, small = ([text.strip() for text in row] for row in cells)
    assert int(original[2]) == 4 * int(small[2])
    assert 1 < float(original[4]) <= float(small[4]) < 4
    playwright.expect(text_of(page, "after")).to_have_value(re.compile(r"The cell membrane is\s+\S+"))
    picture(page, "regroup", full_page=True)


def test_a_token_is_clicked_and_its_attention_shown(page):
    go_to(page, "Attention")
    view = page.locator("#attention")
    view.wait_for()
    assert view.locator(".gf-group").count() == 8 * 8
    choices = page.locator("#token label")
    before = view.locator(".gf-query").first.inner_text()
    choices.filter(has_text="sitting").first.click()
    playwright.expect(view.locator(".gf-query").first).to_have_text(re.compile("sitting"))
    assert "sitting" not in before
    page.locator("#attention-kv label").filter(has_text="2").click()
    playwright.expect(view.locator(".gf-group")).to_have_count(8 * 2)
    playwright.expect(view.locator(".gf-query").first).to_have_text(re.compile("sitting"))  # still the one that looks
    picture(page, "attention")
    text_of(page, "sentence").fill("The heron waits")
    page.locator("#look-button").click()
    playwright.expect(choices.filter(has_text="The")).to_have_count(1)
    playwright.expect(choices.filter(has_text="river")).to_have_count(0)


def test_memory_is_planned_and_bad_configs_are_messages(page):
    go_to(page, "Memory")
    page.locator("#plan-button").click()
    page.locator("#plan").get_by_role("gridcell", name="8 (now)").wait_for()
    page.locator("#plan-plot img, #plan-plot canvas").first.wait_for()
    picture(page, "memory", full_page=True)
    text_of(page, "config").fill('{"hidden_size": ')
    page.locator("#plan-button").click()
    page.get_by_text("The config is not JSON").first.wait_for()


def test_the_keyboard_is_enough(page):
    page.get_by_role("tab", name="Generate").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    go_to(page, "Attention")
    page.locator("#token input").nth(5).focus()  # where Tab leads
    page.keyboard.press("Space")
    playwright.expect(page.locator("#attention .gf-query").first).to_have_text(re.compile("river"))


@pytest.mark.parametrize("tab", ["Generate", "Regroup", "Attention", "Memory"])
def test_a_phone_needs_no_sideways_scrolling(browser, address, tab):
    page = opened(browser, address, width=390, height=844)
    go_to_on_phone(page, tab)
    page.wait_for_timeout(500)
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    picture(page, f"phone-{tab}", full_page=tab == "Memory")
    page.close()
    assert overflow <= 0


def go_to_on_phone(page, tab):
    """Tabs that do not fit stand behind a menu."""
    button = page.get_by_role("tab", name=tab)
    if not button.first.is_visible():
        page.locator(".overflow-menu button").first.click()
        button = page.locator(".overflow-dropdown button").filter(has_text=tab)
    button.first.click()


def test_dark_mode_is_dark_and_readable(browser, address):
    page = opened(browser, address, dark=True)
    go_to(page, "Attention")
    page.locator("#attention .gf-head").first.wait_for()
    head = page.locator("#attention .gf-head").first
    text = brightness(head.evaluate("element => getComputedStyle(element).color"))
    ground = brightness(page.locator("gradio-app").evaluate("element => getComputedStyle(element).backgroundColor"))
    picture(page, "dark")
    page.close()
    assert ground < 80 < 150 < text


def brightness(color):
    red, green, blue = (float(part) for part in re.findall(r"[\d.]+", color)[:3])
    return 0.3 * red + 0.6 * green + 0.1 * blue
