"""The page in a real browser: chat, completion, probabilities, two models, narrow screens, nothing from elsewhere."""

import os
import shutil

import pytest

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the page is tested with playwright: pip install playwright"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]
PICTURES = os.environ.get("OPENLM_PICTURES")
"""A folder that gets a picture of each state of the page, for people to look at."""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server, request):
    """The page, opened; the test fails on any message of its console and on any request that leaves the server."""
    options = getattr(request, "param", {})
    context = browser.new_context(**{"viewport": {"width": 1100, "height": 760}, **options})
    page, troubles = context.new_page(), []
    page.on("console", lambda said: troubles.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on(
        "request", lambda asked: troubles.append(asked.url) if not asked.url.startswith((server[0], "data:")) else None
    )
    page.goto(server[0])
    page.wait_for_selector("#model-a option", state="attached")
    yield page
    context.close()
    assert [trouble for trouble in troubles if "status of 400" not in trouble] == []


def picture(page, name):
    if PICTURES:
        page.screenshot(path=f"{PICTURES}/{name}.png")


def settings(page, **values):
    page.locator("#settings").evaluate("part => part.open = true")
    for name, value in values.items():
        page.fill(f"#{name}", str(value))
    page.locator("#settings").evaluate("part => part.open = false")


def say(page, text):
    page.fill("#prompt", text)
    page.click("#send")
    page.wait_for_selector("#stop-writing", state="hidden", timeout=60_000)


LOOKS = {
    "light": {"color_scheme": "light"},
    "dark": {"color_scheme": "dark"},
    "phone": {"color_scheme": "light", "viewport": {"width": 390, "height": 780}},
    "phone-dark": {"color_scheme": "dark", "viewport": {"width": 390, "height": 780}},
}


@pytest.mark.parametrize("page", LOOKS.values(), ids=list(LOOKS), indirect=True)
def test_a_chat_in_every_look(page, request, client):
    name = request.node.callspec.id
    settings(page, temperature=0, max_tokens=40)
    say(page, "hello there")
    body = {"messages": [{"role": "user", "content": "hello there"}], "temperature": 0, "max_tokens": 40}
    expected = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    tokens = page.locator(".turn.assistant .token")
    assert "".join(tokens.all_text_contents()) == expected
    assert page.locator(".turn.user").text_content() == "hello there"
    assert "40 tokens" in page.locator(".foot").text_content()
    picture(page, f"chat-{name}")
    tokens.nth(3).hover()
    rows = page.locator("#tip tr")
    assert rows.count() in (5, 6) and page.locator("#tip tr.chosen").count() == 1
    assert rows.first.locator("td").last.text_content().endswith("%")
    page.locator("#settings").evaluate("part => part.open = true")
    page.check("#colours")
    tokens.nth(3).hover()
    picture(page, f"probabilities-{name}")
    wide = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert wide, "the page is wider than the screen"


def test_a_conversation_goes_on_and_the_second_answer_knows_the_first(page, client):
    settings(page, temperature=0, max_tokens=12, system="be brief")
    say(page, "one")
    say(page, "two")
    answers = ["".join(turn.locator(".token").all_text_contents()) for turn in page.locator(".turn.assistant").all()]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "one"}]
    messages += [{"role": "assistant", "content": answers[0]}, {"role": "user", "content": "two"}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 12}
    assert answers[1] == client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    page.click("#clear")
    assert page.locator(".turn.user").count() == 0


def test_a_text_is_continued_by_two_models_side_by_side(page, client, server):
    names = list(server[1].models)
    page.click("#mode-complete")
    settings(page, temperature=0, max_tokens=20)
    page.select_option("#model-b", names[1])
    say(page, "the quick brown <b>fox</b>")
    columns = page.locator(".column")
    assert columns.count() == 2
    for number, name in enumerate(names):
        body = {"model": name, "prompt": "the quick brown <b>fox</b>", "temperature": 0, "max_tokens": 20}
        expected = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
        assert "".join(columns.nth(number).locator(".token").all_text_contents()) == expected
        assert columns.nth(number).locator(".prompt-part").text_content() == "the quick brown <b>fox</b>"
    picture(page, "side-by-side")


def test_writing_can_be_stopped_and_errors_are_shown(page, server, monkeypatch):
    import time

    from open_lm.generation.engine import Engine

    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda self: (time.sleep(0.05), step(self))[1])
    settings(page, max_tokens=20_000)
    say(page, "hello")
    assert "cut where the model's context ends" in page.locator(".foot").text_content()
    page.click("#clear")
    page.fill("#prompt", "a long story")
    page.click("#send")
    page.wait_for_selector(".token")
    page.click("#stop-writing")
    page.wait_for_selector("#send", state="visible")
    assert page.locator(".foot").last.text_content() == "Stopped."
    assert (
        all(served.service._n_open == 0 for served in server[1].models.values()) or page.wait_for_timeout(1000) is None
    )
    say(page, "x" * 400)
    assert "context" in page.locator(".turn.error").text_content()
    assert page.input_value("#prompt") == "x" * 400
    settings(page, max_tokens=5)
    say(page, "shorter")  # the conversation goes on without what failed
    assert page.locator(".turn.error").count() == 1 and "5 tokens" in page.locator(".foot").last.text_content()


@pytest.mark.parametrize("page", [{}], indirect=True)
def test_keys_send_and_break_lines(page):
    settings(page, max_tokens=3)
    page.focus("#prompt")
    page.keyboard.type("first")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second")
    page.keyboard.press("Enter")
    page.wait_for_selector(".foot", timeout=30_000)
    assert page.locator(".turn.user").text_content() == "first\nsecond"
