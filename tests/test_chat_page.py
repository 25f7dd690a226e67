"""The chat page in a browser, against a real server: what users do with it, and what an answer must not do."""

import json
import shutil
import time
from pathlib import Path

import pytest
from served import Served, write_model

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium here (apt install chromium)")

HOSTILE = """# 标题

<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 2">
**粗体** `<b>代码</b>` [链接](https://example.com/a) [坏](javascript:window.hacked=3)
[x](https://example.com/"onmouseover="window.hacked=4)

```html
<script>window.hacked = 5</script>
```

| 甲 | 乙 |
|---|---|
| <svg onload=window.hacked=6> | 2 |

1. 一
2. 二
   - 内层
"""


@pytest.fixture(scope="module")
def server(vocabulary, tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("page") / "tiny", vocabulary, context=1024)
    server = Served(model).wait()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """The page in a window without a past; nothing may go wrong in its console, nor reach for the net."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda r: r.url.startswith(server.url) or problems.append(r.url))
    page.goto(server.url)
    page.wait_for_selector("#model:has-text('tiny')")
    yield page
    context.close()
    assert not problems


def ask(page, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def until(page, expression: str) -> None:
    """Wait for an expression of the page's to hold. Playwright's own waiting is stopped by the page's policy."""
    end = time.monotonic() + 30
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        time.sleep(0.02)


def finished(page, answers: int = 1) -> list[str]:
    """The answers, when the last of them is complete."""
    until(
        page,
        f"document.querySelectorAll('.assistant:not(.running) .body').length == {answers}"
        " && !document.querySelector('.running')",
    )
    return page.locator(".assistant .body").all_inner_texts()


def set_option(page, name: str, value: object) -> None:
    page.evaluate(
        "([name, value]) => { const e = document.getElementById(name); e.value = value;"
        " e.dispatchEvent(new Event('input')); }",
        [name, str(value)],
    )


def with_answer(page, text: str) -> None:
    """Let the server's answer be this text."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": "stop"}
    body = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda r: r.fulfill(body=body, content_type="text/event-stream"))


def test_ask_regenerate_edit_and_reload(page, server) -> None:
    set_option(page, "max_tokens", 20)
    set_option(page, "seed", 5)
    set_option(page, "system", "简短地回答")
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "你好")
    body = sent.value.post_data_json
    assert body["messages"] == [
        {"role": "system", "content": "简短地回答"},
        {"role": "user", "content": "你好"},
    ]
    assert (body["max_tokens"], body["seed"], body["stream"]) == (20, 5, True)
    first = finished(page)
    assert "20 token" in page.inner_text(".note") and "token/秒" in page.inner_text(".note")
    page.click("text=重新生成")
    assert finished(page) == first  # the seed is set
    set_option(page, "seed", 6)
    page.click("text=重新生成")
    until(page, f"document.querySelector('.assistant .body').innerText != {json.dumps(first[0])}")
    second = finished(page)
    ask(page, "还有呢？")
    both = finished(page, 2)
    assert both[0] == second[0]
    page.reload()
    assert finished(page, 2) == both
    assert page.input_value("#seed") == "6" and page.input_value("#system") == "简短地回答"
    page.locator(".user").nth(1).get_by_text("编辑").click()
    assert page.input_value("#input") == "还有呢？" and page.locator("article").count() == 2
    page.click("#new")
    assert page.locator("article").count() == 0 and page.locator(".entry").count() == 2
    page.locator(".entry").nth(1).click()
    assert finished(page) == second


def test_an_enter_of_an_input_method_does_not_send(page) -> None:
    page.fill("#input", "nihao")
    for of_composition in ({"isComposing": True}, {"keyCode": 229}):  # Chromium and Firefox; Safari
        page.dispatch_event("#input", "keydown", {"key": "Enter", **of_composition})
    page.press("#input", "Shift+Enter")
    page.type("#input", "ma")
    assert page.locator(".user").count() == 0 and page.input_value("#input") == "nihao\nma"


def test_stop_frees_the_slot_and_keeps_what_was_said(page, server) -> None:
    set_option(page, "max_tokens", 1000)
    set_option(page, "temperature", 2)
    ask(page, "讲一个很长的故事")
    until(page, "document.querySelector('.running .body')?.innerText.length > 20")
    page.click("#stop")
    assert len(finished(page)[0]) > 20 and page.inner_text(".note") == "已停止"
    server.until(running=0, waiting=0)
    assert page.is_visible("#send")


def test_an_answer_is_shown_and_never_run(page) -> None:
    with_answer(page, HOSTILE)
    ask(page, "<script>window.hacked = 7</script>")
    finished(page)
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None
    assert page.locator("article").locator("script, img, svg").count() == 0
    text = page.inner_text(".assistant .body")
    assert '<img src=x onerror="window.hacked = 2">' in text and "<svg onload" in page.inner_text(
        "td >> nth=0"
    )
    assert page.inner_text(".assistant pre") == "<script>window.hacked = 5</script>"
    assert page.inner_text(".assistant h2") == "标题" and page.inner_text(".assistant p strong") == "粗体"
    assert page.locator(".assistant li").count() == 3 and page.locator("td").count() == 2
    for link in page.locator(".assistant a").all():
        assert link.get_attribute("href").startswith("https://") and "noopener" in link.get_attribute("rel")
    assert page.locator("a[onmouseover]").count() == 0
    page.reload()
    finished(page)
    assert page.evaluate("window.hacked") is None
    # And were there a hole, the browser would not run it.
    page.evaluate(
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked = 8\">')"
    )
    page.wait_for_timeout(200)
    assert page.evaluate("window.hacked") is None


def test_errors_are_shown_and_can_be_retried(page) -> None:
    error = '{"error": {"message": "x", "type": "rate_limit_error", "param": null, "code": "queue_full"}}'
    page.route("**/v1/chat/completions", lambda r: r.fulfill(status=429, body=error))
    ask(page, "你好")
    page.wait_for_selector("#error:has-text('排队的人太多')")
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/**", lambda r: r.abort())
    page.click("#retry")
    page.wait_for_selector("#error:has-text('连不上服务器')")
    page.unroute("**/v1/**")
    set_option(page, "max_tokens", 3)
    page.click("#retry")
    finished(page)
    assert not page.is_visible("#error") and page.locator(".user").count() == 1


@pytest.mark.parametrize("width", [320, 375])
def test_a_phone_shows_everything_within_its_width(page, width, tmp_path: Path) -> None:
    page.set_viewport_size({"width": width, "height": 667})
    with_answer(page, HOSTILE + "\n```\n" + "很长的一行" * 60 + "\n```\n" + "x" * 300)
    ask(page, "你好")
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelector('#messages').scrollWidth") <= width
    page.click("#open-settings")
    box = page.locator("#settings").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    page.click("#close-settings")
    page.click("#menu")
    page.wait_for_timeout(300)
    assert page.locator("#new").bounding_box()["x"] >= 0
