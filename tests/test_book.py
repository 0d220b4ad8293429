"""The book: what its builder refuses, and every built page in a real browser.

The browser tests need `make book` and Chromium. Where one is missing they are skipped with the
reason; in CI they fail.
"""

import contextlib
import functools
import importlib.util
import os
import re
import shutil
import threading
from copy import deepcopy
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from playwright.sync_api import TimeoutError as NotInTime
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parents[1]
SITE, SCREENSHOTS = ROOT / "_build" / "html", ROOT / "_build" / "screenshots"
WIDTHS = {"phone": (390, 844), "desktop": (1280, 900)}
PAGES = sorted(
    path.relative_to(SITE).as_posix()
    for path in SITE.rglob("*.html")
    if "_static" not in path.parts
)
PATIENCE = 15_000  # milliseconds until equations and widgets must have been drawn
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABXvMqOgAAAABJ"
    "RU5ErkJggg=="
)


def load_builder():
    spec = importlib.util.spec_from_file_location("book_build", ROOT / "book" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_builder()


# ---------------------------------------------------------------- the builder

TITLE = new_markdown_cell(
    "# Attacks\n\nSee [notation](../book/notation.md), [a card](../data/zoo/README.md)."
)


def translated(*cells):
    "The cells, after a title, as the builder leaves them."
    nb = new_notebook(cells=deepcopy([TITLE, *cells]))
    return build.translate(nb, "05_attacks", "https://example.org/blob/main").cells


def image_cell(source, images=1):
    outputs = [
        new_output("display_data", {"image/png": PNG, "text/plain": "a figure"})
        for _ in range(images)
    ]
    return new_code_cell(source, outputs=outputs)


def test_translation_of_directives():
    text, imports, exported, silent, folded = translated(
        new_code_cell("#| default_exp attacks"),
        new_code_cell("#| hide\nsecret = 1"),
        new_code_cell("#| export\nimport torch"),
        new_code_cell("#| export\ndef f(x): return x"),
        new_code_cell("#| echo: false\nprint(1)"),
        new_code_cell(
            "#| code-fold: true\n#| code-summary: How it was made\nkept = 1\nlost = 2  #| hide_line"
        ),
    )
    assert text.source == (
        "# Attacks\n\nSee [notation](notation.md), "
        "[a card](https://example.org/blob/main/data/zoo/README.md)."
    )
    assert imports.metadata["tags"] == ["hide-input"]
    assert exported.source == "def f(x): return x" and exported.metadata["tags"] == []
    assert silent.metadata["tags"] == ["remove-input"]
    assert (
        folded.source == "kept = 1"
        and folded.metadata["mystnb"]["code_prompt_show"] == "How it was made"
    )


def test_image_takes_its_alt_text_and_caption():
    cell = translated(
        image_cell("#| fig-alt: Two curves: one rises\n#| fig-cap: The gain.\nplot()")
    )[1]
    assert cell.metadata["mystnb"] == {
        "image": {"alt": "Two curves: one rises"},
        "figure": {"caption": "The gain."},
    }


@pytest.mark.parametrize(
    "cell, problem",
    [
        (image_cell("plot()"), "no alt text"),
        (image_cell("#| fig-alt: Two\nplot()", images=2), "2 images"),
        (
            new_code_cell(
                "report",
                outputs=[new_output("display_data", {"text/html": "<p><img src='a.png'></p>"})],
            ),
            "<img>",
        ),
    ],
)
def test_image_without_alt_text_stops_the_build(cell, problem):
    with pytest.raises(build.BookError, match=re.escape(problem)):
        translated(cell)


def widget_cell(source):
    """A box that holds an output that holds a picture, as `interact` makes it; the cell, and the
    state of its widgets."""
    picture = new_output("display_data", {"image/png": PNG})
    state = {
        "box": {"model_name": "VBoxModel", "state": {"children": ["IPY_MODEL_out"]}},
        "out": {"model_name": "OutputModel", "state": {"outputs": [picture]}},
    }
    return new_code_cell(
        source, outputs=[new_output("display_data", {build.WIDGET_VIEW: {"model_id": "box"}})]
    ), state


def translated_widget(source, keep_state=True):
    cell, state = widget_cell(source)
    metadata = {"widgets": {build.WIDGET_STATE: {"state": state}}} if keep_state else {}
    nb = new_notebook(cells=deepcopy([TITLE, cell]), metadata=metadata)
    return build.translate(nb, "05_attacks", "")


def test_picture_inside_a_widget_takes_the_alt_text():
    page = translated_widget('#| fig-alt: A "wave"\ninteract(wave)')
    data = page.metadata.widgets[build.WIDGET_STATE]["state"]["out"]["state"]["outputs"][0]["data"]
    assert data == {
        "text/html": f'<img alt="A &quot;wave&quot;" src="data:image/png;base64,{PNG}">'
    }
    with pytest.raises(build.BookError, match="no alt text"):
        translated_widget("interact(wave)")


def test_widget_without_its_state_becomes_a_sentence():
    output = translated_widget("interact(wave)", keep_state=False).cells[1].outputs[0]
    assert "control" in output["data"]["text/markdown"]


def test_an_alt_text_without_its_picture_stops_the_build():
    "As when a kernel was told to draw on no screen: the page would have lost its figures."
    cell = new_code_cell('#| fig-alt: "A curve."\nplt.plot([1])')
    nb = new_notebook(cells=[new_markdown_cell("# Title"), cell])
    with pytest.raises(build.BookError, match="cell 1: it has an alt text, but no picture"):
        build.translate(nb, "05_attacks", "")


def test_a_run_shows_its_figures_whoever_asks_for_it(tmp_path, monkeypatch):
    cell = new_code_cell("import matplotlib.pyplot as plt\nplt.plot([1]);")
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "drawn.ipynb")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    build.execute(tmp_path / "drawn.ipynb", tmp_path / "run.ipynb")
    (output,) = nbformat.read(tmp_path / "run.ipynb", as_version=4).cells[0].outputs
    assert "image/png" in output.data


def test_chapter_needs_a_title():
    with pytest.raises(build.BookError, match=r"nbs/05_attacks\.ipynb has no title"):
        build.translate(
            new_notebook(cells=[new_markdown_cell("## Only a section")]), "05_attacks", ""
        )


def test_badges_from_elsewhere_become_links():
    badge = "[![Open In Colab](https://example.org/badge.svg)](https://example.org/x)"
    assert build.relink(badge, "") == "[Open In Colab](https://example.org/x)"


def test_toc_and_notebooks_must_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "NBS", tmp_path)
    monkeypatch.setattr(build, "BOOK", tmp_path)
    (tmp_path / "_toc.yml").write_text(
        "root: index\nparts:\n- caption: One\n  chapters:\n  - file: 01_diffusion\n"
    )
    (tmp_path / "index.ipynb").touch()
    with pytest.raises(build.BookError, match="lists 01_diffusion, but there is neither"):
        build.chapters_of_toc()
    (tmp_path / "01_diffusion.ipynb").touch()
    assert build.chapters_of_toc() == ["index", "01_diffusion"]
    (tmp_path / "scratch.ipynb").touch()
    with pytest.raises(build.BookError, match="not in book/_toc.yml: scratch"):
        build.chapters_of_toc()


def exercise(solution):
    return [
        new_code_cell("def double(x): return None"),
        new_code_cell("#| check\nprint('Correct.' if double(2) == 4 else 'Not yet.')"),
        new_markdown_cell(
            f"<details>\n<summary>Solution</summary>\n\n```python\n{solution}\n```\n\n</details>"
        ),
    ]


def test_solutions_are_run(tmp_path):
    path, target = tmp_path / "nb.ipynb", tmp_path / "kept" / "nb.key.ipynb"
    nbformat.write(new_notebook(cells=exercise("def double(x): return 2 * x")), path)
    build.execute(path, target)
    kept = nbformat.read(target, as_version=4)
    assert (
        len(kept.cells) == 3
        and kept.cells[1].outputs[0].text == "Not yet.\n"
        and kept.metadata.seconds > 0
    )

    nbformat.write(new_notebook(cells=exercise("def double(x): return 3 * x")), path)
    with pytest.raises(build.BookError, match="does not pass its check"):
        build.execute(path, target)


def test_failing_cell_is_named(tmp_path):
    path = tmp_path / "nb.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("1 / 0")]), path)
    with pytest.raises(build.BookError, match=r"nb\.ipynb: a cell raised ZeroDivisionError"):
        build.execute(path, tmp_path / "nb.key.ipynb")


# ---------------------------------------------------------------- the browser


def unavailable(reason):
    "Locally a reason to skip; in CI a failure."
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def site():
    if not PAGES:
        unavailable("the book is not built: run `make book`")
    return SITE


@pytest.fixture(scope="session")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        unavailable("Chromium is not installed: apt-get install --no-install-recommends chromium")
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=flags)
        yield browser
        browser.close()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def serve():
    "A function that serves a folder on this machine and returns its address."
    servers = []

    def start(folder):
        server = ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield functools.cache(start)
    for server in servers:
        server.shutdown()
        server.server_close()


# Runs in the page, and returns what a reader would stumble over.
INSPECT = r"""() => {
  const problems = [];
  const visible = e => { const b = e.getBoundingClientRect(); return b.width > 0 && b.height > 0; };
  for (const img of document.images) {
    const source = img.src.slice(0, 80);
    if (!img.alt.trim()) problems.push(`image without alt text: ${source}`);
    else if (img.checkVisibility() && !img.naturalWidth)
      problems.push(`image that does not load: ${source}`);
  }
  for (const math of document.querySelectorAll(".math"))
    if (!math.querySelector("mjx-container"))
      problems.push(`equation not rendered: ${math.textContent.slice(0, 80)}`);
  for (const error of document.querySelectorAll("mjx-merror, [data-mml-node='merror']"))
    problems.push(`equation with an error: ${error.textContent.slice(0, 80)}`);
  const text = document.body.cloneNode(true);
  const code = "pre, code, script, style, noscript, textarea, mjx-container";
  for (const e of text.querySelectorAll(code)) e.remove();
  for (const raw of text.textContent.match(/\$\$|\$[^$\n]*[\\_^{][^$\n]*\$|\\\(|\\\[/g) || [])
    problems.push(`raw mathematics in the text: ${raw.slice(0, 80)}`);
  const views = "script[type='application/vnd.jupyter.widget-view+json']";
  for (const view of document.querySelectorAll(views)) {
    const area = view.previousElementSibling;
    const drawn = area && area.matches(".widget-subarea") && area.firstElementChild;
    if (!drawn || !visible(drawn))
      problems.push("widget not drawn");
  }
  const page = document.documentElement;
  if (page.scrollWidth > page.clientWidth + 1)
    problems.push(`page is ${page.scrollWidth} px wide in a window of ${page.clientWidth} px`);
  return problems;
}"""

SETTLED = """() => (!document.querySelector(".math") || document.querySelector("mjx-container"))
  && [...document.querySelectorAll(
        "script[type='application/vnd.jupyter.widget-view+json']")].every(view => {
       const area = view.previousElementSibling;
       return area && area.matches(".widget-subarea") && area.firstElementChild;
     })"""


def press_arrow_on(slider):
    "Move a slider by one step; whether its number follows."
    readout = slider.locator(".widget-readout")
    handle = slider.locator(".noUi-handle").first
    if not (readout.count() and handle.count()):
        return True
    before = readout.first.inner_text()
    for key in ("ArrowRight", "ArrowLeft", "ArrowLeft"):  # one of them moves it, wherever it stands
        handle.press(key)
        if readout.first.inner_text() != before:
            return True
    return False


def problems_of(browser, url, size=WIDTHS["desktop"], screenshot=None, patience=PATIENCE):
    "Open a page as a reader would, and list what is wrong with it."
    host = url.split("/", 3)[2]
    problems = []
    page = browser.new_page(viewport=dict(zip(("width", "height"), size, strict=True)))
    page.set_default_timeout(4 * PATIENCE)
    page.on("console", lambda m: m.type == "error" and problems.append(f"console error: {m.text}"))
    page.on("pageerror", lambda error: problems.append(f"script error: {error}"))
    page.on("requestfailed", lambda r: problems.append(f"failed request: {r.url}"))
    page.on(
        "response", lambda r: r.status >= 400 and problems.append(f"status {r.status}: {r.url}")
    )

    def local_only(route):
        if route.request.url.split("/", 3)[2] == host:
            route.continue_()
        else:
            problems.append(f"outside request: {route.request.url}")
            route.abort()

    page.route(re.compile(r"^(https?|wss?)://"), local_only)
    try:
        page.goto(url, wait_until="load")
        with contextlib.suppress(NotInTime):  # what has not appeared by then is named below
            page.wait_for_function(SETTLED, timeout=patience)
        page.wait_for_timeout(300)
        problems += page.evaluate(INSPECT)
        if screenshot:
            screenshot.parent.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=screenshot, full_page=True)
        for slider in page.locator(".widget-slider:visible").all():
            if not press_arrow_on(slider):
                problems.append("a slider does not move")
    finally:
        page.close()
    return problems


@pytest.mark.browser
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PAGES or ["index.html"])
def test_page_is_sound(site, serve, browser, name, width):
    picture = SCREENSHOTS / width / Path(name).with_suffix(".png")
    assert problems_of(browser, f"{serve(site)}/{name}", WIDTHS[width], picture) == []


@pytest.mark.browser
def test_each_entry_of_the_toc_has_a_page(site):
    toc = build.yaml.safe_load((ROOT / "book" / "_toc.yml").read_text(encoding="utf-8"))
    assert [name for name in build.toc_names(toc) if f"{name}.html" not in PAGES] == []


@pytest.mark.browser
def test_internal_links_lead_somewhere(site):
    assert broken_links(site) == []


def broken_links(folder):
    "Links and sources inside a folder of pages whose file or whose anchor is missing."
    paths = [path for path in folder.rglob("*.html") if "_static" not in path.parts]
    pages = {path: BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser") for path in paths}
    anchors = {
        path: {tag.get("id") or tag.get("name") for tag in soup.find_all(True)}
        for path, soup in pages.items()
    }
    broken = []
    for path, soup in pages.items():
        for tag in soup.find_all(["a", "link", "img", "script"]):
            target = tag.get("href") or tag.get("src") or ""
            if not target or target == "#" or re.match(r"[a-z][a-z+.-]*:|//", target):
                continue
            file, anchor = urldefrag(target.split("?")[0])
            goal = (path.parent / unquote(file)).resolve() if file else path
            if goal.is_dir():
                goal /= "index.html"
            if not goal.exists() or (
                anchor and goal in anchors and unquote(anchor) not in anchors[goal]
            ):
                broken.append(f"{path.relative_to(folder)}: {target}")
    return broken


# ------------------------------------------------------------ does the checker see what it should?

FAULTS = {
    "image without alt text": f'<img src="data:image/png;base64,{PNG}">',
    "image that does not load": '<img alt="gone" src="data:image/png;base64,AAAA">',
    "console error": "<script>console.error('broken')</script>",
    "script error": "<script>undefined_function()</script>",
    "outside request": '<img alt="a picture" src="https://example.org/picture.png">',
    "status 404": '<script src="missing.js"></script>',
    "equation not rendered": '<span class="math">\\(x\\)</span>',
    "equation with an error": "<mjx-merror>Undefined control sequence</mjx-merror>",
    "raw mathematics": "<p>The loss is $$L_r$$.</p>",
    "raw mathematics in the text: $x_t$": "<p>Here $x_t$ was not parsed.</p>",
    "widget not drawn": '<script type="application/vnd.jupyter.widget-view+json">{}</script>',
    "px wide": '<div style="width: 3000px">wide</div>',
}


def write_page(folder, body):
    head = '<head><link rel="icon" href="data:,"></head>'
    html = f"<!doctype html><html>{head}<body>{body}</body></html>"
    (folder / "index.html").write_text(html, encoding="utf-8")


@pytest.mark.browser
@pytest.mark.parametrize("fault", FAULTS)
def test_checker_sees(tmp_path, serve, browser, fault):
    write_page(tmp_path, FAULTS[fault])
    problems = problems_of(browser, serve(tmp_path) + "/index.html", patience=500)
    assert any(fault in problem for problem in problems)


@pytest.mark.browser
def test_checker_accepts_a_sound_page(tmp_path, serve, browser):
    image = f'<img alt="a dot" src="data:image/png;base64,{PNG}">'
    write_page(tmp_path, f"<p>It costs $5 or $6.</p><pre>$$ in code</pre>{image}")
    assert problems_of(browser, serve(tmp_path) + "/index.html") == []


def test_link_checker_sees_missing_files_and_anchors(tmp_path):
    links = "".join(
        f'<a href="{target}"></a>' for target in ("#here", "gone.html", "index.html#there")
    )
    write_page(tmp_path, f'<h1 id="here"></h1>{links}')
    assert broken_links(tmp_path) == ["index.html: gone.html", "index.html: index.html#there"]
