"""The book: what its builder refuses, and every built page in a real browser.

The browser tests need `make book` and Chromium. Where one is missing they are skipped with the
reason; in CI they fail.
"""

import contextlib
import importlib.util
import json
import re
import shutil
from copy import deepcopy
from pathlib import Path
from urllib.parse import unquote, urldefrag

import nbformat
import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from playwright.sync_api import TimeoutError as NotInTime
from scipy.stats import norm

from terd_nb import Trigger, load
from terd_nb.diffusion import linear_schedule
from terd_nb.directions import answer_shift, antithetic
from terd_nb.input_detection import InputDetector
from terd_nb.success import Rate
from terd_nb.triggers import box

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_build" / "html"
# In pixels; on paper, A4 between margins of 15 mm.
WIDTHS = {"phone": (390, 844), "desktop": (1280, 900), "paper": (680, 1000)}
PAGES = sorted(
    path.relative_to(SITE).as_posix()
    for path in SITE.rglob("*.html")
    if "_static" not in path.parts
)
PATIENCE = 15_000  # milliseconds until equations and pieces must have been drawn
PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABXvMqOgAAAABJ"
    "RU5ErkJggg=="
)


def load_module(name):
    spec = importlib.util.spec_from_file_location(f"book_{name}", ROOT / "book" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_module("build")


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
    assert cell.metadata["tags"] == ["hide-input"]
    assert cell.metadata["mystnb"] == {
        "image": {"alt": "Two curves: one rises"},
        "figure": {"caption": "The gain."},
        "code_prompt_show": "The plot",
        "code_prompt_hide": "The plot",
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


def widget_cell(source, text):
    view = new_output("display_data", {build.WIDGET_VIEW: {"model_id": "box"}, "text/plain": text})
    return new_code_cell(source, outputs=[view])


def test_a_widget_stops_the_build_unless_its_cell_is_live():
    "It needs Python, which a page does not have: it would move there, and change nothing."
    cell = widget_cell("interact(wave)", "interactive(children=(FloatSlider(), Output()))")
    with pytest.raises(build.BookError, match="would stand still on the page"):
        translated(cell)
    cell.source = "#| live\n" + cell.source
    assert len(translated(cell)) == 1


def test_a_progress_bar_is_left_out():
    bar = widget_cell("run()", "squaring:   0%|          | 0/3 [00:00<?, ?it/s]")
    assert translated(bar)[1].outputs == []


def test_a_page_is_lightened_of_what_it_does_not_use():
    scripts = {
        name: f'<script src="_static/{name}.js?v=1"></script>'
        for name in ("scripts/fontawesome", "searchtools", "mathjax/tex-chtml-full", "kept")
    }
    page = "<p>".join(scripts.values())
    assert [name for name in scripts if name in build.lighten(page)] == ["kept"]
    search = page + "<script>DOCUMENTATION_OPTIONS.pagename = 'search';</script>"
    assert "searchtools" in build.lighten(search)
    assert "mathjax" in build.lighten(page + '<span class="math">')


def test_an_alt_text_without_its_picture_stops_the_build():
    "As when a kernel was told to draw on no screen: the page would have lost its figures."
    cell = new_code_cell('#| fig-alt: "A curve."\nplt.plot([1])')
    nb = new_notebook(cells=[new_markdown_cell("# Title"), cell])
    with pytest.raises(build.BookError, match="cell 1: it has an alt text, but no picture"):
        build.translate(nb, "05_attacks", "")


@pytest.mark.parametrize("warm", [False, True])
def test_a_run_shows_its_figures_whoever_asks_for_it(warm, tmp_path, monkeypatch):
    cell = new_code_cell("import matplotlib.pyplot as plt\nplt.plot([1]);")
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "drawn.ipynb")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    with build.warm_kernels() if warm else contextlib.nullcontext() as address:
        if warm:
            monkeypatch.setenv(build.WARM, address)
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


def test_the_book_is_made_again_when_anything_has_changed_and_only_then(tmp_path, monkeypatch):
    for part in ("terd_nb", "data", "nbs", "book/assets"):
        (tmp_path / part).mkdir(parents=True)
        (tmp_path / part / "file").write_text("as it was")
    for name in ("requirements.lock", "settings.ini", "CITATION.cff"):
        (tmp_path / name).write_text("as it was")
    for name, folder in (("ROOT", "."), ("NBS", "nbs"), ("BOOK", "book")):
        monkeypatch.setattr(build, name, tmp_path / folder)
    start = build.book_hash("terd_nb", False)
    assert build.book_hash("terd_nb", True) != start
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        path.write_text("changed")
        assert build.book_hash("terd_nb", False) != start, path
        path.write_text("as it was")
    (tmp_path / "book" / "__pycache__").mkdir()
    (tmp_path / "book" / "__pycache__" / "build.pyc").touch()
    assert build.book_hash("terd_nb", False) == start
    (tmp_path / "nbs" / "file").rename(tmp_path / "nbs" / "other")
    assert build.book_hash("terd_nb", False) != start


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


WIDGET, LIST, RANGE = "FloatSlider(min=0., max=2.)", "[0, 1, 2]", "(0., 2.)"


@pytest.mark.parametrize(
    ("body", "control", "wrong"),
    [
        ("print(length + 1)", LIST, None),
        ("plt.plot([0, length])", WIDGET, None),
        ("plt.plot([0, length])", RANGE, None),
        ("print(3)", WIDGET, "moving length changes nothing"),
        ("pass", RANGE, "shows nothing"),
        ("print(gone)", LIST, "name 'gone' is not defined"),
        ("print(later)", LIST, "a later cell sets later anew"),
        ("import random; print(random.random())", RANGE, "shows something else each time"),
        ("print(length)", "True", "write the control True as"),
    ],
)
def test_a_control_that_changes_nothing_stops_the_build(body, control, wrong, tmp_path):
    "Tried after the last cell, as by a student who has run them all."
    live = f"""#| live
import matplotlib.pyplot as plt
from ipywidgets import FloatSlider, interact

gone = later = 1


@interact(length={control})
def shown(length=1.):
    {body}
"""
    cells = [new_code_cell(live), new_code_cell("del gone\nlater = 2")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "nb.ipynb")
    target = tmp_path / "run.ipynb"
    wanted = pytest.raises(build.BookError, match=wrong) if wrong else contextlib.nullcontext()
    with wanted:
        build.execute(tmp_path / "nb.ipynb", target)
    if not wrong:
        assert [cell.source for cell in nbformat.read(target, as_version=4).cells] == [
            cell.source for cell in cells
        ]


# ---------------------------------------------------------------- the browser


@pytest.fixture(scope="session")
def visitor(browser):
    "One window for all pages: what they share is fetched once."
    page = browser.new_page()
    page.set_default_timeout(8 * PATIENCE)
    yield page
    page.close()


@pytest.fixture(scope="session")
def site(unavailable):
    if not PAGES:
        unavailable("the book is not built: run `make book`")
    return SITE


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
  for (const piece of document.querySelectorAll("[data-piece]"))
    if (!piece.childElementCount) problems.push(`piece not drawn: ${piece.dataset.piece}`);
  const page = document.documentElement;
  if (page.scrollWidth > page.clientWidth + 1)
    problems.push(`page is ${page.scrollWidth} px wide in a window of ${page.clientWidth} px`);
  return problems;
}"""

# Lines of code that a laptop's window cuts off.
CUT_OFF_CODE = r"""() => [...document.querySelectorAll("article pre")]
  .filter(e => e.checkVisibility() && e.scrollWidth > e.clientWidth + 1)
  .map(e => e.textContent.trim().slice(0, 60))"""

# Runs in the page as it is printed, and returns what paper would cut off.
CUT_OFF = r"""width => {
  const problems = [];
  const shown = e => e.checkVisibility() && e.getBoundingClientRect().width > 0;
  const name = e => `<${e.localName} class="${e.getAttribute("class") || ""}"> ` +
    e.textContent.trim().replace(/\s+/g, " ").slice(0, 60);
  for (const e of document.querySelectorAll("article *")) {
    const style = getComputedStyle(e);
    if (!shown(e) || style.display === "inline" || e.closest(".math")) continue;
    const over = e.getBoundingClientRect().right - width, cut = e.scrollWidth - e.clientWidth;
    if (over > 1) problems.push(`${Math.round(over)} px too wide: ${name(e)}`);
    else if (style.overflowX !== "visible" && cut > 1)
      problems.push(`${cut} px cut off: ${name(e)}`);
  }
  for (const e of document.querySelectorAll("article mjx-container"))
    if (shown(e) && e.getBoundingClientRect().right > width + 1)
      problems.push(`an equation is too wide: ${name(e.parentElement)}`);
  const around = ".bd-header, .bd-header-article, .bd-sidebar-primary, .bd-sidebar-secondary, " +
    ".prev-next-footer, footer";
  for (const e of document.querySelectorAll(around))
    if (shown(e)) problems.push(`printed although it is no part of the text: ${name(e)}`);
  return problems;
}"""

SETTLED = """() => (!document.querySelector(".math") || document.querySelector("mjx-container"))
  && [...document.querySelectorAll("[data-piece]")].every(piece => piece.childElementCount)"""
DRAWN = "Promise.all([window.MathJax?.startup?.promise, document.fonts.ready]).then(() => null)"

# axe-core takes seconds for the thousands of letters of an equation and words of code. Their
# colours are those of the text around them, and of a few classes: one word of each class stays,
# and a box of its size in the place of each equation. All that is folded is opened.
THIN_OUT = r"""() => {
  const seen = new Set(), style = document.createElement("style");
  style.textContent = "* { transition: none !important; animation: none !important }"
    + ".quiz-why { display: block !important }";
  document.head.append(style);
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  for (const word of document.querySelectorAll(".highlight pre span")) {
    if (word.childElementCount) continue;
    if (seen.has(word.className)) word.replaceWith(...word.childNodes);
    else seen.add(word.className);
  }
  for (const pre of document.querySelectorAll(".highlight pre")) pre.normalize();
  const sizes = [...document.querySelectorAll("mjx-container")].map(math =>
    [math, math.getBoundingClientRect().width]);
  for (const [math, width] of sizes) {
    const box = document.createElement("span");
    box.textContent = "x";
    box.style.cssText = `display: inline-block; width: ${width}px`;
    math.replaceWith(box);
  }
}"""
# The structure of a page is one in both themes, so only colours are looked at in each; and of words
# with one ancestry, which have one colour, at two, as every other row of a table has a ground of
# its own. What is around the text is one on all pages, so it is looked at on the first page alone.
AXE = r"""async ([whole, exclude]) => {
  const found = [], context = {include: [[whole ? "html" : ".bd-article"]], exclude};
  const wcag = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"];
  const look = async (theme, options) => {
    document.documentElement.dataset.theme = theme;
    const {violations} = await axe.run(context, {
      resultTypes: ["violations"], preload: false, ...options});
    for (const {id, impact, nodes} of violations)
      if (["serious", "critical"].includes(impact))
        for (const node of nodes)
          found.push(`${theme}: ${id}: ${node.target.join(" ")}: ${node.html.slice(0, 120)}`);
  };
  const colours = "color-contrast";
  await look("light", {runOnly: wcag, rules: {[colours]: {enabled: false}}});
  const met = new Map();
  for (const e of document.querySelectorAll(".bd-article *")) {
    const words = [...e.childNodes].filter(n => n.nodeType === Node.TEXT_NODE && n.data.trim());
    if (!words.length) continue;
    let ancestry = "";
    for (let a = e; !a.matches(".bd-article"); a = a.parentElement)
      ancestry += `${a.localName}.${a.getAttribute("class")} ${a.getAttribute("style")};`;
    met.set(ancestry, (met.get(ancestry) || 0) + 1);
    if (met.get(ancestry) > 2) for (const word of words) word.remove();
  }
  for (const theme of ["light", "dark"]) await look(theme, {runOnly: [colours]});
  return found;
}"""
# What axe-core is not shown: selectors, and why.
NOT_OURS = {".citation-list": "Sphinx says that it is a list, and not of what"}


def shut_out(page, whole=False):
    "What keeps somebody out who does not see, or has no mouse: axe-core's gravest, in both themes."
    page.evaluate(THIN_OUT)
    page.wait_for_timeout(100)  # for what answers to the open folds: pieces.js
    page.evaluate(Axe().axe_script)
    return page.evaluate(AXE, [whole, [[selector] for selector in NOT_OURS]])


def still_controls(page):
    "Controls of a page that a keyboard does not move, or whose figure does not change with them."
    for piece in page.locator("[data-piece]:has(svg, canvas)").all():
        for control in piece.locator("input[type=range], select, canvas[tabindex='0']").all():
            figure = piece.locator("svg, canvas").first
            before = figure.screenshot()
            for _ in range(3):
                control.press("ArrowDown")
            page.wait_for_timeout(100)
            if figure.screenshot() == before:
                yield control.evaluate("e => e.outerHTML.slice(0, 80)")


@contextlib.contextmanager
def watched(page, url):
    "What goes wrong in a window while a page is open in it, and the bytes of all that it loads."
    host, problems, sizes = url.split("/", 3)[2], [], {}

    def asked(request):
        if request.url.startswith(("http", "ws")) and request.url.split("/", 3)[2] != host:
            problems.append(f"outside request: {request.url}")

    def answered(response):
        sizes[response.url] = int(response.headers.get("content-length", 0))
        if response.status >= 400:
            problems.append(f"status {response.status}: {response.url}")

    listeners = {
        "console": lambda m: m.type == "error" and problems.append(f"console error: {m.text}"),
        "pageerror": lambda error: problems.append(f"script error: {error}"),
        "requestfailed": lambda request: problems.append(f"failed request: {request.url}"),
        "request": asked,
        "response": answered,
    }
    for event, listener in listeners.items():
        page.on(event, listener)
    try:
        yield problems, sizes
    finally:
        for event, listener in listeners.items():
            page.remove_listener(event, listener)


def open_page(page, url, patience=PATIENCE):
    "Go there, and wait until equations, letters and pieces have been drawn."
    page.goto(url, wait_until="load")
    with contextlib.suppress(NotInTime):  # what has not appeared by then is named by INSPECT
        page.wait_for_function(SETTLED, timeout=patience)
    page.evaluate(DRAWN)


def resize(page, width, media="screen"):
    page.set_viewport_size(dict(zip(("width", "height"), WIDTHS[width], strict=True)))
    page.emulate_media(media=media)


def problems_of(browser, url, size=WIDTHS["desktop"], patience=PATIENCE):
    "Open a page as a reader would, and list what is wrong with it."
    page = browser.new_page(viewport=dict(zip(("width", "height"), size, strict=True)))
    page.set_default_timeout(4 * PATIENCE)
    try:
        with watched(page, url) as (problems, _):
            open_page(page, url, patience)
            problems += page.evaluate(INSPECT)
            problems += [f"nothing changes with {control}" for control in still_controls(page)]
    finally:
        page.close()
    return problems


@pytest.mark.browser
@pytest.mark.parametrize("name", PAGES or ["index.html"])
def test_page_is_sound(site, serve, visitor, name):
    """One visit, in which a window is a laptop's, a phone's and a sheet of paper: what does not
    work or is cut off, what is too heavy, and what shuts somebody out."""
    url = f"{serve(site)}/{name}"
    resize(visitor, "desktop")
    with watched(visitor, url) as (problems, sizes):
        open_page(visitor, url)
        found = {"weight": sum(sizes.values()), "cut off code": visitor.evaluate(CUT_OFF_CODE)}
        problems += visitor.evaluate(INSPECT)
        problems += [f"nothing changes with {control}" for control in still_controls(visitor)]
        resize(visitor, "phone")
        found["phone"] = visitor.evaluate(INSPECT)
        resize(visitor, "paper", "print")
        found["paper"] = visitor.evaluate(CUT_OFF, WIDTHS["paper"][0])
        resize(visitor, "desktop")
        if name != "search.html":  # the theme's alone
            found["axe"] = shut_out(visitor, whole=name == "index.html")
        found["desktop"] = list(problems)  # all that went wrong until now
    weight = found.pop("weight")
    assert {place: wrong for place, wrong in found.items() if wrong} == {}
    assert weight <= (1e6 if name == "index.html" else 3e6), sizes


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


# ---------------------------------------------------------------- what a reader takes along


@pytest.mark.browser
def test_each_page_offers_its_own_notebook(site):
    "Byte for byte what lies in nbs/, of which tests/test_notebooks.py runs every one."
    for name in build.chapters_of_toc():
        soup = BeautifulSoup((site / f"{name}.html").read_text(encoding="utf-8"), "html.parser")
        links = {a["href"] for a in soup.find_all("a", href=re.compile(r"^_sources/.*ipynb$"))}
        assert links == {f"_sources/{name}.ipynb"}
        assert (site / links.pop()).read_bytes() == (ROOT / "nbs" / f"{name}.ipynb").read_bytes()


# ---------------------------------------------------------------- the pieces


@pytest.fixture(scope="session")
def pieces(serve, browser, tmp_path_factory):
    "A page with every figure that sliders.js and drop_the_ball.js can draw; needs no built book."
    folder = tmp_path_factory.mktemp("pieces")
    for name in ("sliders.js", "drop_the_ball.js", "drop_the_ball_data.js", "custom.css"):
        shutil.copy(ROOT / "book" / "assets" / name, folder)
    figures = ["alpha", "strength", "rates", "detector"]
    divs = [
        f'<div class="piece" data-piece="sliders" data-figure="{figure}"></div>'
        for figure in figures
    ]
    divs += [
        '<div class="piece" data-piece="drop-the-ball"></div>',
        '<script src="sliders.js"></script>',
    ]
    divs += [
        '<script src="drop_the_ball.js"></script>',
        '<link rel="stylesheet" href="custom.css">',
    ]
    body = "\n".join(divs)
    write_page(folder, f'<article class="bd-article">{body}</article>')
    page = browser.new_page(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
    page.goto(serve(folder) + "/index.html", wait_until="load")
    page.wait_for_function(SETTLED)
    yield page
    page.close()


def js_values(page, figure, **settings):
    return page.evaluate(f"s => terdSliders.{figure}(s)", settings)


@pytest.mark.browser
def test_every_control_of_the_pieces_changes_its_figure(pieces):
    assert pieces.locator("input[type=range]").count() == 5
    assert list(still_controls(pieces)) == []


@pytest.mark.browser
@pytest.mark.parametrize("beta_end", [0.005, 0.02, 0.05])
def test_alpha_is_the_librarys(pieces, beta_end):
    values = js_values(pieces, "alpha", beta_end=beta_end)
    alpha = np.sqrt(np.cumprod(1 - np.linspace(1e-4, beta_end, 1000)))
    assert np.abs(np.array(values["curve"]) - alpha).max() < 1e-9
    library = linear_schedule(beta_end=beta_end).alpha.numpy()  # whose betas have 32 bits
    assert np.abs(np.array(values["curve"]) - library).max() < 1e-5
    assert values["half"] == (library > 0.5).sum()


@pytest.mark.browser
@pytest.mark.parametrize("strength", [0, 0.3, 1])
def test_strength_is_the_boxs(pieces, strength):
    length = Trigger(strength * box((1, 16, 16))).norm
    assert abs(js_values(pieces, "strength", strength=strength)["length"] - length) < 1e-5


@pytest.mark.browser
@pytest.mark.parametrize("length, threshold", [(3, 0), (0.5, -10), (6, 10), (4.2, -3.3), (1, 2.5)])
def test_rates_are_scipys(pieces, length, threshold):
    values, s = js_values(pieces, "rates", length=length, threshold=threshold), length**2 / 2
    assert abs(values["tpr"] - norm.sf(threshold, s, length)) < 1e-9
    assert abs(values["tnr"] - norm.cdf(threshold, -s, length)) < 1e-9


@pytest.mark.browser
@pytest.mark.parametrize("error", [0, 0.8, 1, 1.3])
def test_the_detector_with_an_error_is_the_librarys(pieces, error):
    "Its scores' mean and deviation, and the rate that it has on noises with the trigger."
    r, values = box((1, 16, 16)), js_values(pieces, "detector", error=error)
    across = torch.zeros_like(r)
    across[0, 10, 10] = 1  # inside the box, where r is 0
    detector = InputDetector(Trigger(r + error * r.norm() * across))
    noise = torch.randn(4000, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for start, mean in ((noise, values["clean"]), (noise + r, values["triggered"])):
        score = detector.score(start)
        assert abs(score.mean() - mean) < 4 * values["sd"] / 4000**0.5
        assert abs(score.std() / values["sd"] - 1) < 0.05
    rate = Rate.of(detector.predict(noise + r).numpy())
    assert rate.interval[0] - 0.01 <= values["tpr"] <= rate.interval[1] + 0.01
    assert abs(values["tpr"] - norm.cdf(values["triggered"] / values["sd"])) < 1e-9


BALL = json.loads(
    (ROOT / "book" / "assets" / "drop_the_ball_data.js")
    .read_text(encoding="utf-8")
    .split(" = ", 1)[1]
    .rstrip(";\n")
)


def node(plane, i, j):
    "Where a node of the plane lies, along and across."
    return [plane["half"] * (2 * k / (BALL["nodes"] - 1) - 1) for k in (j, i)]


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, *range(700, 1000, 50)])
def test_the_balls_numbers_stay_in_their_frame(pieces, width):
    pieces.set_viewport_size({"width": width, "height": 900})
    beyond = pieces.evaluate("""() => {
      const frame = document.querySelector('[data-piece=drop-the-ball]').getBoundingClientRect();
      return document.querySelector('.ball-side table').getBoundingClientRect().right - frame.right;
    }""")
    pieces.set_viewport_size({"width": 1280, "height": 900})
    assert beyond <= 0


@pytest.mark.browser
def test_the_ball_reads_its_map_and_its_rates_right(pieces):
    for plane in BALL["planes"]:
        plane = plane | {"nodes": BALL["nodes"]}
        last = BALL["nodes"] - 1
        for i, j in ((0, 0), (7, 22), (last, last), (15, 16)):
            point = node(plane, i, j)
            value = pieces.evaluate("([p, x]) => terdBall.at(p, 'log_loss', x)", [plane, point])
            assert abs(value - plane["log_loss"][i * BALL["nodes"] + j]) < 1e-9
            rates = pieces.evaluate("([p, x]) => terdBall.rates(p, x)", [plane, point])
            size = np.hypot(*point)
            assert abs(rates["tnr"] - norm.cdf(size / 2)) < 1e-9
            if plane["planted"]:
                mean = point[0] * plane["length"] - size**2 / 2
                assert abs(rates["tpr"] - norm.cdf(mean / size)) < 1e-9


@pytest.mark.browser
def test_one_ball_goes_down_and_the_other_keeps_its_distance(pieces):
    for plane in BALL["planes"]:
        plane = plane | {"nodes": BALL["nodes"]}
        for start in (plane["start"], node(plane, 5, 25), node(plane, 24, 9)):
            losses = pieces.evaluate(
                "([p, x]) => terdBall.descend(p, x).map(y => terdBall.at(p, 'log_loss', y))",
                [plane, start],
            )
            assert len(losses) > 1 and np.all(np.diff(losses) < 0)
            path = pieces.evaluate("([p, x]) => terdBall.follow(p, x)", [plane, start])
            lengths = np.hypot(*np.transpose(path[1:]))
            assert np.allclose(lengths, min(np.hypot(*start), plane["half"]), atol=1e-9)


@pytest.mark.browser
def test_the_field_leads_to_the_trigger_where_the_chapter_says_so(pieces):
    "From inside the basin: to the trigger's direction for SDE samplers, anywhere for ODE samplers."
    ends = {}
    for plane in BALL["planes"]:
        start = [0.8 * plane["length"], 0.6 * plane["length"]]
        asked = [plane | {"nodes": BALL["nodes"]}, start]
        path = pieces.evaluate("([p, x]) => terdBall.follow(p, x)", asked)
        ends[plane["model"]] = path[-1][0] / np.hypot(*path[-1])
    assert ends["zoo/baddiffusion-box"] > 0.98 and ends["hard/box5-sde"] > 0.95
    assert ends["zoo/villan-psi1"] < 0.95


def test_the_ball_is_light():
    "Its script and its map, in bytes."
    assets = ROOT / "book" / "assets"
    sizes = [path.stat().st_size for path in assets.glob("drop_the_ball*.js")]
    assert len(sizes) == 2 and sum(sizes) <= 100_000


def test_the_balls_map_is_what_the_models_answer():
    "A few nodes of each plane, measured again."
    ball = load_module("ball")
    for (model, owner, _), plane in zip(ball.MODELS, BALL["planes"], strict=True):
        denoiser = load(ROOT / "data" / model)
        trigger = Trigger.load(ROOT / "data" / owner / "trigger.safetensors")
        u, v, _ = ball.plane(trigger.r)
        for i, j in ((15, 24), (8, 10)):
            along, across = node(plane, i, j)
            s = (along * u + across * v)[None].to(denoiser.device)
            k = i * BALL["nodes"] + j
            found = np.log10(ball.losses(denoiser, s).item())
            assert abs(found - plane["log_loss"][k]) < 0.01
            eps = antithetic(denoiser, ball.NOISES, 3)
            shift, _ = answer_shift(denoiser, s, 1.0, eps)
            assert abs((shift[0].cpu() * u).sum() - plane["shift_u"][k]) < 0.02


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
    "piece not drawn": '<div data-piece="sliders"></div>',
    "nothing changes with": '<div data-piece="x"><svg></svg><input type="range"></div>',
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


PALE = '<style>[data-theme=%s] .pale { color: #bbb }</style><p class="pale">Pale.</p>'
SHUT_OUT = {
    "light: color-contrast": PALE % "light",
    "dark: color-contrast": PALE % "dark",
    "light: label": "<input>",
    "light: link-name": '<a href="#here"></a>',
    "light: scrollable-region-focusable": '<pre style="overflow: auto; width: 9em">'
    + "wide " * 99
    + "</pre>",
}


@pytest.mark.browser
@pytest.mark.parametrize("fault", [*SHUT_OUT, None])
def test_axe_sees_who_is_shut_out(tmp_path, serve, visitor, fault):
    write_page(tmp_path, f'<main class="bd-article"><p>Fine.</p>{SHUT_OUT.get(fault, "")}</main>')
    resize(visitor, "desktop")
    open_page(visitor, serve(tmp_path) + "/index.html", patience=500)
    found = shut_out(visitor)
    assert [": ".join(line.split(": ")[:2]) for line in found] == [fault] * (fault is not None)


def test_link_checker_sees_missing_files_and_anchors(tmp_path):
    links = "".join(
        f'<a href="{target}"></a>' for target in ("#here", "gone.html", "index.html#there")
    )
    write_page(tmp_path, f'<h1 id="here"></h1>{links}')
    assert broken_links(tmp_path) == ["index.html: gone.html", "index.html: index.html#there"]
