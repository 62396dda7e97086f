"""The app in a real browser: every tab used, on a desktop and a phone, in light and dark, by mouse and keyboard."""

import os
import re
import shutil
from pathlib import Path

import pytest


pytest.importorskip("gradio", reason="the app needs gradio: make test-app")
playwright = pytest.importorskip("playwright.sync_api", reason="browsers need playwright: make test-app")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import groupformer  # noqa: E402
from groupformer.app import build, theme  # noqa: E402


pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOTS = os.environ.get("SCREENSHOTS")  # a folder to put pictures into, for those who want to look
PATIENCE = 40_000  # milliseconds: two slow cores regroup and measure


@pytest.fixture(scope="module")
def address():
    page = build()
    _, url, _ = page.queue().launch(prevent_thread_lock=True, quiet=True, theme=theme(), footer_links=[])
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
    page.get_by_role("tab", name="Regroup").wait_for()
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
    go_to(page, "Generate")
    text_of(page, "prompt").fill("The river")
    page.locator("#generate-button").click()
    playwright.expect(text_of(page, "generated")).to_have_value(re.compile(r"^\s*The river\W.*\w"))
    picture(page, "generate")


def test_an_empty_prompt_is_a_message(page):
    go_to(page, "Generate")
    text_of(page, "prompt").fill("")
    page.locator("#generate-button").click()
    message = page.get_by_text("The text is empty; write something to go on from.")
    message.first.wait_for()
    assert page.get_by_text("Traceback").count() == 0
    picture(page, "empty")


def rows_of(page, table):
    """The cells of a table's rows by the names of the rows."""
    rows = page.locator(f"#{table} tbody tr").all()
    return {row.locator("th").inner_text(): row.locator("td").all_inner_texts() for row in rows}


def regrouped(page, kv_heads):
    page.locator("#kv input").fill(kv_heads)
    page.locator("#regroup-button").click()
    page.locator("#comparison tbody tr").first.wait_for()


def test_the_model_is_regrouped_live(page):
    regrouped(page, "2")
    page.locator("#regroup-note").get_by_text("The cache shrinks to 2 of 8 heads: 25%").wait_for()
    rows = rows_of(page, "comparison")
    original, small = (int(cell.replace(",", "")) for cell in rows["cache, bytes a token"])
    assert original == 4 * small
    before, after = map(float, rows["bits per byte"])
    assert 1 < before <= after < 4
    playwright.expect(text_of(page, "after")).to_have_value(re.compile(r"The cell membrane is\s+\S+"))
    picture(page, "regroup", full_page=True)


def test_a_native_folder_is_regrouped_and_saved(page, tmp_path):
    model = groupformer.export_model(AutoModelForCausalLM.from_pretrained("hub_card"), family="llama")
    model.save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained("hub_card").save_pretrained(tmp_path / "llama")
    page.locator("#regroup-source input, #regroup-source textarea").fill(str(tmp_path / "llama"))
    page.locator("#regroup-target input, #regroup-target textarea").fill(str(tmp_path / "small"))
    regrouped(page, "2")
    page.locator("#regroup-note").get_by_text("The result is a LlamaForCausalLM").wait_for()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.num_key_value_heads == 2


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
    page.locator("#plan").get_by_text("8 (now)").wait_for()
    page.locator("#plan-plot img, #plan-plot canvas").first.wait_for()
    picture(page, "memory", full_page=True)
    text_of(page, "config").fill('{"hidden_size": ')
    page.locator("#plan-button").click()
    page.get_by_text("The config is not JSON").first.wait_for()


def test_the_keyboard_is_enough(page):
    page.get_by_role("tab", name="Regroup").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    go_to(page, "Attention")
    page.locator("#token input").nth(5).focus()  # where Tab leads
    page.keyboard.press("Space")
    playwright.expect(page.locator("#attention .gf-query").first).to_have_text(re.compile("river"))


TABS = ["Regroup", "Generate", "Attention", "Memory"]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_phone_shows_all_tabs_and_bits_per_byte(browser, address, dark):
    page = opened(browser, address, width=390, height=844, dark=dark)
    boxes = [page.get_by_role("tab", name=tab).first.bounding_box() for tab in TABS]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 390 for box in boxes)
    regrouped(page, "2")
    for name, cells in rows_of(page, "comparison").items():
        row = page.locator("#comparison tr").filter(has_text=name).bounding_box()
        assert len(cells) == 2 and row["x"] >= 0 and row["x"] + row["width"] <= 390
    assert "bits per byte" in rows_of(page, "comparison")
    picture(page, f"phone-regrouped-{'dark' if dark else 'light'}", full_page=True)
    page.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("tab", TABS)
def test_no_tab_needs_sideways_scrolling(browser, address, tab, width, dark):
    page = opened(browser, address, width=width, height=844, dark=dark)
    go_to(page, tab)
    if tab == "Memory":
        page.locator("#plan-button").click()
        page.locator("#plan-plot img, #plan-plot canvas").first.wait_for()
        table = page.locator("#plan table").bounding_box()
        assert table["x"] >= 0 and table["x"] + table["width"] <= width - 32  # the margin of the page
    page.wait_for_timeout(500)
    overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    picture(page, f"{tab}-{width}-{'dark' if dark else 'light'}".lower(), full_page=tab == "Memory")
    page.close()
    assert overflow <= 0


def test_white_text_on_a_button_is_readable(page):
    button = page.locator("#regroup-button")
    colors = [button.evaluate(f"element => getComputedStyle(element).{name}") for name in ("color", "backgroundColor")]
    assert brightness(colors[0]) > 240 and brightness(colors[1]) < 120


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
