"""The page itself, in a real headless browser over the tiny shop, with every title and stored text hostile."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from playwright.sync_api import Browser, Dialog, Page, expect, sync_playwright
from tests_support import rated_shop

from genrec.bundle import MANIFEST, STORE, seal
from genrec.cli import main
from genrec.contracts import Instruction, Trace, UserContext
from genrec.data import read_dataset, save_dataset
from genrec.errors import GenrecError
from genrec.instructions import open_store
from genrec.io import read_json
from genrec.recommender import Recommender
from ui.app import launch, serve
from ui.rankers import Ranker

pytestmark = pytest.mark.real

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
PATIENCE = 120_000  # milliseconds; nothing here is about speed
MORE = "Number of items and fusion weights"
HOSTILE = ' <img src=x onerror="window.obeyed=1"><script>window.obeyed=1</script>${window.obeyed=1}{{obeyed}}'
STORED = "strong coffee" + HOSTILE


def hostile_copy(bundle: Path, folder: Path) -> Path:
    """The bundle with markup and template code in every title, and in an instruction stored for its first user."""
    shutil.copytree(bundle, folder)
    dataset = read_dataset(folder / "data")
    table = dataset.catalog.table
    titles = pa.array([f"{title.split('<')[0] or 'Tea'}{HOSTILE}" for title in dataset.catalog.titles])
    table = table.set_column(table.column_names.index("title"), "title", titles)
    save_dataset(replace(dataset, catalog=replace(dataset.catalog, table=table)), folder / "data")
    for path in folder.glob("tools/*/tool.json"):
        about = read_json(path)
        path.write_text(json.dumps(about | {"titles": titles.to_pylist()}), encoding="utf-8")
    seal(folder, read_json(folder / MANIFEST)["config"])
    with open_store(folder / STORE) as store:
        told = Instruction("a morning" + HOSTILE, ("coffee" + HOSTILE,), STORED, "", "tiny" + HOSTILE, "v1", "ab", 1e9)
        store.put_many([(dataset.sequences.users[0], "home", told)])
    return folder


READ: list[str] = []  # what the text encoder was given


def read_text(texts: list[str]) -> np.ndarray:
    """In place of a text encoder, which own item embeddings lack: a fixed direction per text, [len(texts), 16]."""
    READ.extend(texts)
    return np.stack([np.random.default_rng(zlib.crc32(t.encode())).normal(size=16) for t in texts]).astype(np.float32)


@dataclass
class Site:
    """A running page. heard: what the browser complained about or fetched from elsewhere."""

    address: str
    recommender: Recommender
    browser: Browser
    heard: list[str] = field(default_factory=list)

    def open(self, width: int = 1280, height: int = 900, scheme: str = "light") -> Page:
        context = self.browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("console", lambda m: self.heard.append(f"console {m.text}") if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: self.heard.append(f"script {e}"))
        page.on("dialog", self.dismiss)
        page.on("response", lambda r: self.heard.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        outside = lambda r: not r.url.startswith((self.address, "data:", "blob:"))  # noqa: E731
        page.on("request", lambda r: self.heard.append(f"outside {r.url}") if outside(r) else None)
        page.goto(self.address)
        page.wait_for_selector("#listed table, #notice .error")
        return page

    def dismiss(self, dialog: Dialog) -> None:
        self.heard.append(f"dialog {dialog.message}")
        dialog.dismiss()


@pytest.fixture(scope="module")
def site(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    recommender = Recommender.load(hostile_copy(tiny_bundle, tmp_path_factory.mktemp("page") / "bundle"))
    recommender.bundle.config["embeddings"] = ""  # as if the shop had been embedded from text
    recommender.bundle.__dict__["embedder"] = read_text
    READ.clear()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranker = tmp_path_factory.mktemp("ranker")
    fit = ["rank", "marm", "fit", "--data", str(rated_shop(ranker / "shop")), "--out", str(ranker / "marm")]
    assert main([*fit, "--epochs", "1", "--d", "8", "--events", "6", "--layers", "2"]) == 0
    tools = [Ranker.open(ranker / "marm", recommender.bundle.dataset.catalog)]
    app = serve(recommender, "127.0.0.1", port, wait=False, rankers=tools)
    assert READ, "the first visitor who searches must not wait for the text encoder to load"
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        yield Site(f"http://127.0.0.1:{port}/", recommender, browser)
        browser.close()
    app.close()


@pytest.fixture
def page(site: Site) -> Iterator[Page]:
    """A fresh visitor. Afterwards: nothing hostile was obeyed, nothing fetched elsewhere, nothing went wrong."""
    expect.set_options(timeout=PATIENCE)
    page = site.open()
    yield page
    assert page.evaluate("window.obeyed") is None
    assert page.locator(".genrec script, .genrec img").count() == 0
    page.context.close()
    assert site.heard == []


def history(page: Page) -> list[str]:
    return page.locator("#history .title").all_inner_texts()


def listed(page: Page) -> list[str]:
    return page.locator("#listed .rec .title").all_inner_texts()


def add(page: Page, typed: str) -> str:
    """Types into the title search, takes the first match, and returns its title."""
    count = page.locator("#history li").count()
    page.locator("#search textarea").fill(typed)
    button = page.locator("#found button").first
    expect(button).to_contain_text(typed)
    title = button.locator(".title").inner_text()
    button.click()
    expect(page.locator("#history li")).to_have_count(count + 1)
    return title


def test_it_opens_on_a_user_with_the_stored_instruction_the_list_and_the_whole_trace(page: Page, site: Site) -> None:
    dataset = site.recommender.bundle.dataset
    user = dataset.sequences.users[0]
    expect(page.locator("#listed .rec")).to_have_count(10)
    expect(page.locator("#listed .head")).to_contain_text(f"10 items for user {user}, scenario home")
    assert len(history(page)) == dataset.sequences.lengths[0]
    expect(page.locator("#instruction textarea")).to_have_value(STORED)
    expect(page.locator("#told .badge")).to_have_text("stored")
    expect(page.locator("#traced blockquote")).to_have_text(STORED)
    expect(page.locator("#traced .source .badge")).to_have_text("stored")
    for heading in ("Instruction", "Request", "Beam of the generator", "Tools", "Scores", "Time"):
        expect(page.locator("#traced h3", has_text=heading).first).to_be_visible()
    assert page.locator("#traced article").count() == len(site.recommender.bundle.tools)
    expect(page.locator("#traced .ranker .because")).to_have_count(10)
    assert page.locator("#traced .beam .dot").count() == 10
    assert page.locator("#listed .bar i").count() > 10


def test_a_history_is_built_by_searching_titles_and_items_can_be_removed(page: Page) -> None:
    page.locator("#clear").click()
    expect(page.locator("#history")).to_contain_text("No history yet")
    expect(page.locator("#listed .legend")).to_contain_text("popularity")
    first, second = add(page, "Coffee number 1"), add(page, "Bread number 2")
    assert history(page) == [second, first]
    expect(page.locator("#search textarea")).to_have_value("")
    expect(page.locator("#traced dl").last).to_contain_text("2 kept")
    assert len(listed(page)) == 10 and first not in listed(page)
    page.locator("#search textarea").fill("jam NUMBER 3")
    expect(page.locator("#found button").first).to_contain_text("Jam number 3")
    page.locator("#search textarea").press("Enter")
    expect(page.locator("#history li")).to_have_count(3)
    page.locator("#history button").last.click()
    expect(page.locator("#history li")).to_have_count(2)
    assert first not in history(page)
    page.locator("#search textarea").fill("no such title")
    expect(page.locator("#found")).to_contain_text("No title has")


def test_an_edited_instruction_is_followed_and_named(page: Page) -> None:
    before = page.locator("#traced .beam").inner_text()
    page.locator("#instruction textarea").fill("cheese <b>and</b> jam")
    expect(page.locator("#told .badge")).to_have_text("given")
    page.locator("#go").click()
    expect(page.locator("#traced blockquote")).to_have_text("cheese <b>and</b> jam")
    expect(page.locator("#listed .badge")).to_have_text("given")
    assert page.locator("#traced .beam").inner_text() != before
    page.locator("#instruction textarea").fill("")
    expect(page.locator("#told .badge")).to_have_text("default")
    page.locator("#go").click()
    expect(page.locator("#listed .badge")).to_have_text("default")
    soaps = sum(title.startswith("Soap") for title in listed(page))
    page.locator("#query textarea").fill("soap" + HOSTILE)
    expect(page.locator("#told .badge")).to_have_text("query")
    page.locator("#query textarea").press("Enter")
    expect(page.locator("#listed .badge")).to_have_text("query")
    expect(page.locator("#traced blockquote")).to_have_text("soap" + HOSTILE)
    assert sum(title.startswith("Soap") for title in listed(page)) > soaps  # a search is obeyed by the list


def test_an_edited_history_gives_up_the_stored_instruction(page: Page) -> None:
    add(page, "Soap number 4")
    expect(page.locator("#history")).to_contain_text("Edited from user")
    expect(page.locator("#instruction textarea")).to_have_value("")
    expect(page.locator("#listed .badge")).to_have_text("default")


def test_the_item_scenario_has_the_last_item_as_trigger_and_another_can_be_chosen(page: Page) -> None:
    expect(page.locator("#trigger")).to_have_count(0)
    expect(page.locator("#listed .rec")).to_have_count(10)
    beam = page.locator("#traced .beam").inner_text()
    page.locator("#scenario label", has_text="item").click()
    newest = history(page)[0]
    expect(page.locator("#traced dt", has_text="trigger")).to_be_visible()
    assert page.locator("#traced .beam").inner_text() != beam  # the scenario alone, as the trigger is the newest item
    expect(page.locator("#traced dl dd", has_text=newest).first).to_be_visible()
    page.locator("#trigger input").click()
    other = page.locator("#trigger [role=option]").nth(1)
    title = other.inner_text().strip("✓ \n")
    assert title != newest
    other.click()
    expect(page.locator("#traced dl dd", has_text=title).first).to_be_visible()


def test_number_and_weights_are_obeyed_and_can_be_taken_back(page: Page, site: Site) -> None:
    page.get_by_role("button", name=MORE).click()
    page.locator("#count input[type=number]").fill("3")
    for i in range(len(site.recommender.bundle.tools) + 1):
        page.locator(f"#weight-{i} input[type=number]").fill("0")
    page.locator("#go").click()
    expect(page.locator("#notice .error")).to_have_text("every part has weight 0: raise at least one fusion weight")
    assert listed(page) == []
    page.locator("#weight-0 input[type=number]").fill("1")
    page.locator("#go").click()
    expect(page.locator("#listed .rec")).to_have_count(3)
    expect(page.locator("#listed .legend li")).to_have_text(["generator 1"])
    expect(page.locator("#notice .error")).to_have_count(0)
    page.locator("#reset").click()
    chosen = sum(w != 0 for w in site.recommender.bundle.fusion("home")["fused"].values())
    expect(page.locator("#listed .legend li")).to_have_count(chosen)


def test_what_is_typed_at_once_is_kept_by_a_slow_browser(page: Page) -> None:
    """Gradio draws the content of a closed accordion when it opens, and a frame later puts its first values back."""
    page.evaluate(
        "() => { window.requestAnimationFrame = act => setTimeout(() => { window.drawn = true; act(0) }, 500) }"
    )
    button = page.get_by_role("button", name=MORE)
    button.click()
    page.locator("#count input[type=number]").fill("3")
    page.evaluate("() => { requestAnimationFrame(() => {}) }")
    page.wait_for_function("window.drawn")
    page.wait_for_timeout(200)
    expect(page.locator("#count input[type=number]")).to_have_value("3")
    button.click()
    expect(page.locator("#count input[type=number]")).to_be_hidden()
    page.locator("#go").click()
    expect(page.locator("#listed .rec")).to_have_count(3)


def test_a_slow_answer_does_not_overwrite_the_newest(page: Page, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    quick, started, ended = site.recommender.recommend, threading.Event(), threading.Event()

    def slow(context: UserContext, k: int = 10, **more: Any) -> Trace:
        started.set()
        time.sleep(1 if k == 5 else 0)
        found = quick(context, k=k, **more)
        if k == 5:
            ended.set()
        return found

    page.get_by_role("button", name=MORE).click()
    count = page.locator("#count input[type=number]")
    count.fill("5")
    count.blur()
    expect(page.locator("#listed .rec")).to_have_count(5)
    monkeypatch.setattr(site.recommender, "recommend", slow)
    page.locator("#go").click()
    assert started.wait(PATIENCE / 1000)
    count.fill("3")
    count.blur()
    assert ended.wait(PATIENCE / 1000)
    page.wait_for_timeout(500)
    expect(page.locator("#listed .rec")).to_have_count(3)


def test_an_unknown_user_is_one_clear_line(page: Page) -> None:
    page.locator("#user input").fill("nobody" + HOSTILE)
    page.locator("#user input").press("Enter")
    expect(page.locator("#notice .error")).to_contain_text("unknown user 'nobody <img")
    expect(page.locator("#notice .error")).to_contain_text("give a history")
    assert "Traceback" not in page.content()
    page.locator("#scenario label", has_text="discovery").click()
    expect(page.locator("#listed .rec")).to_have_count(10)
    expect(page.locator("#notice .error")).to_have_count(0)


def test_visitors_do_not_see_each_other(page: Page, site: Site) -> None:
    other = site.open()
    other.locator("#clear").click()
    expect(other.locator("#history")).to_contain_text("No history yet")
    page.locator("#go").click()
    expect(page.locator("#listed .badge")).to_have_text("stored")
    assert len(history(page)) == site.recommender.bundle.dataset.sequences.lengths[0]
    other.context.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light"), (390, "dark")])
def test_it_fits_the_screen_and_is_legible_in_both_themes(site: Site, width: int, scheme: str) -> None:
    page = site.open(width, 844, scheme)
    expect(page.locator("#listed .rec")).to_have_count(10)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ratio = """() => {
      const light = c => { const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b };
      const back = light(getComputedStyle(document.body).backgroundColor);
      return ['h2', '.rec .title', '.rec .category', '.note', '.score', '.legend b', '#traced .hit']
        .map(s => light(getComputedStyle(document.querySelector('#results ' + s)).color))
        .map(l => (Math.max(l, back) + .05) / (Math.min(l, back) + .05)) }"""
    assert min(page.evaluate(ratio)) >= 4.5  # WCAG AA
    page.context.close()
    assert site.heard == []


def test_a_port_in_use_is_one_clear_line(site: Site) -> None:
    port = int(site.address.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(GenrecError, match=f"cannot serve the page on 127.0.0.1:{port} .*choose another port"):
        serve(site.recommender, "127.0.0.1", port, wait=False)


def test_a_folder_that_is_no_bundle_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(GenrecError, match="is not a bundle"):
        launch(tmp_path)
