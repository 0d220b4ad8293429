"""The piece "A backdoor in one number": its formulas are terd_nb.toy's, and each control moves it.

The formulas and the controls are tried on a page of one place, so they need Chromium but no built
book; the last tests open the book's own page.
"""

import re
from itertools import pairwise

import pytest
import torch
from test_book import PATIENCE, ROOT, problems_of, site  # noqa: F401 (a fixture)

from terd_nb.detector_inside import best_rate, mean_w, responsibility, rev_loss
from terd_nb.toy import (
    Toy,
    eps_star,
    hit_rates,
    log_density,
    toy_step,
    walk,
)

pytestmark = pytest.mark.browser
CHAPTER = "00b_detector_inside.html"
SETTINGS = [
    {},
    {"lam": 1.0},
    {"r": 2.5, "gamma": 0.6, "p": 0.05, "lam": 0.0},
    {"r": 9.0, "gamma": 1.3, "p": 0.8, "lam": 0.35},
]
PLACES = torch.linspace(-4, 9, 27, dtype=torch.float64)


@pytest.fixture(scope="module")
def address(serve, tmp_path_factory):  # noqa: F811
    "A page with one place for the piece, its scripts beside it as in the book's _static."
    folder = tmp_path_factory.mktemp("piece")
    for name in ("pieces.js", "one_number.js"):
        (folder / name).write_bytes((ROOT / "book" / "assets" / name).read_bytes())
    html = """<!doctype html><html lang="en"><head><title>Piece</title>
      <link rel="icon" href="data:,"><meta name="viewport" content="width=device-width">
      <script src="pieces.js"></script></head>
      <body>%s</body></html>"""
    place = '<div class="piece" data-piece="one-number"><p>Needs JavaScript.</p></div>'
    (folder / "index.html").write_text(html % place, encoding="utf-8")
    (folder / "without.html").write_text(html % "<p>No piece here.</p>", encoding="utf-8")
    return serve(folder)


def opened(browser, address):  # noqa: F811
    page = browser.new_page(viewport={"width": 1000, "height": 900})
    page.set_default_timeout(4 * PATIENCE)
    page.goto(address)
    page.wait_for_selector("[data-piece] canvas")
    yield page
    page.close()


@pytest.fixture
def page(address, browser):  # noqa: F811
    "A page of one's own, to move its controls."
    yield from opened(browser, address)


@pytest.fixture(scope="module")
def formulas(address, browser):  # noqa: F811
    "One page for all who only ask its functions."
    yield from opened(browser, address)


def close(found, wanted):
    return torch.allclose(torch.tensor(found, dtype=torch.float64), wanted, atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------- the formulas


@pytest.mark.parametrize("setting", SETTINGS)
def test_formulas_agree_with_python(formulas, setting):
    toy, times = Toy(**setting), [0, 5, 120, 249]
    found = formulas.evaluate(
        """([setting, times, places]) => {
          const one = window.oneNumber, toy = one.makeToy(setting);
          const everywhere = (f) => times.map((t) => places.map((x) => f(toy, x, t)));
          return {
            path: [toy.a, toy.b, toy.c, toy.d],
            log_density: everywhere(one.logDensity),
            responsibility: everywhere(one.responsibility),
            eps_star: everywhere(one.epsStar),
            step: [0, 1].map((eta) => everywhere((toy, x, t) => one.step(toy, x, t, eta, 0.7))),
            rev_loss: places.map((s) => one.revLoss(toy, s, toy.gamma)),
            mean_w: places.map((s) => one.meanW(toy, s, toy.gamma)),
            best_rate: one.bestRate(toy),
          };
        }""",
        [setting, times, PLACES.tolist()],
    )
    assert close(found["path"], torch.stack(toy.path))
    for name, f in [
        ("log_density", log_density), ("responsibility", responsibility), ("eps_star", eps_star)
    ]:  # fmt: skip
        assert close(found[name], torch.stack([f(toy, PLACES, t) for t in times])), name
    for eta in (0, 1):
        ours = torch.stack([toy_step(toy, PLACES, t, eta, 0.7) for t in times])
        assert close(found["step"][eta], ours)
    answer = rev_loss(lambda x: eps_star(toy, x, -1), PLACES, toy.gamma)
    assert close(found["rev_loss"], answer)
    assert close(found["mean_w"], mean_w(toy, PLACES, toy.gamma))
    assert abs(found["best_rate"] - best_rate(toy)) < 1e-6


@pytest.mark.parametrize("eta", [0, 1])
def test_walks_agree_on_the_same_noise(formulas, eta):
    toy = Toy(lam=0.5)
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(27, generator=generator, dtype=torch.float64) for _ in range(250)]
    found = formulas.evaluate(
        """([starts, eta, noise]) => {
          const one = window.oneNumber, toy = one.makeToy({ lam: 0.5 });
          return one.walk(toy, starts, eta, (t, i) => noise[249 - t][i]).map((x) => [...x]);
        }""",
        [PLACES.tolist(), eta, [row.tolist() for row in noise]],
    )
    assert close(found, walk(toy, PLACES, eta, seed=0))


@pytest.mark.parametrize("lam, eta", [(0.5, 1), (1.0, 0), (1.0, 1)])
def test_rates_agree_within_their_errors(formulas, lam, eta):
    "Other noises, 4000 of each kind here and there: five standard errors."
    script = """([lam, eta]) => window.oneNumber.hitRates(
      window.oneNumber.makeToy({ lam }), eta, 4000, 7)"""
    found = formulas.evaluate(script, [lam, eta])
    for here, there in zip(hit_rates(Toy(lam=lam), eta, n=4000), found):
        share = (here + there) / 2
        assert abs(here - there) <= 5 * (2 * share * (1 - share) / 4000) ** 0.5 + 1e-3


# ---------------------------------------------------------------- the controls


def pixels(page):
    "What the two canvases show."
    return page.evaluate(
        "() => [...document.querySelectorAll('canvas')].map((c) => c.toDataURL()).join()"
    )


def settle(page):
    page.evaluate("() => new Promise((r) => requestAnimationFrame(() => requestAnimationFrame(r)))")


def test_every_control_moves_the_picture_by_keyboard(page):
    controls = page.locator("[data-piece] :is(input, select)")
    assert controls.count() == 5
    labels = controls.evaluate_all("all => all.map((c) => c.labels[0]?.textContent.trim())")
    assert all(labels)
    for i in range(5):
        before = pixels(page)
        assert before == pixels(page)  # it is still until it is moved
        controls.nth(i).focus()
        page.keyboard.press("ArrowDown" if i == 4 else "ArrowRight")
        settle(page)
        assert pixels(page) != before, labels[i]
    before = pixels(page)
    page.locator("[data-piece] button").press("Enter")
    page.wait_for_timeout(2500)  # the walkers' second, and some
    after = pixels(page)
    assert after != before and after == pixels(page)


def readouts(page):
    names = page.locator("[data-piece] output").evaluate_all("all => all.map((o) => o.name)")
    texts = page.locator("[data-piece] output").all_inner_texts()
    return {name: float(text) for name, text in zip(names, texts)}


def test_readouts_say_what_the_chapter_says(page):
    first = readouts(page)
    assert abs(first["asr"] - 0.885) < 0.04 and abs(first["leak"] - 0.048) < 0.03
    assert first["best"] == round(best_rate(Toy()), 4)
    page.locator("select").select_option("0")
    page.locator("input[name=lam]").fill("1")
    settle(page)
    second = readouts(page)
    assert second["asr"] > 0.97 and second["leak"] == 0
    rates = []
    for r in ("1", "3", "6", "10"):
        page.locator("input[name=r]").fill(r)
        settle(page)
        rates.append(readouts(page)["best"])
    assert all(a < b for a, b in pairwise(rates))


def test_dark_theme_is_drawn_in_its_own_colours(page):
    before = pixels(page)
    page.evaluate("() => { document.documentElement.dataset.theme = 'dark' }")
    settle(page)
    assert pixels(page) != before


def test_new_noise_does_not_move_for_those_who_ask_for_rest(address, browser):  # noqa: F811
    page = browser.new_page(reduced_motion="reduce")
    page.goto(address)
    page.wait_for_selector("canvas")
    before = pixels(page)
    page.locator("button").click()
    at_once = pixels(page)
    page.wait_for_timeout(400)
    assert before != at_once == pixels(page)
    page.close()


@pytest.mark.parametrize("width", [320, 1280])
def test_page_of_the_piece_is_sound(address, browser, width):  # noqa: F811
    assert problems_of(browser, f"{address}/index.html", (width, 800)) == []


def test_a_page_without_a_piece_loads_none(address, browser):  # noqa: F811
    page, asked = browser.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{address}/without.html", wait_until="networkidle")
    assert any(url.endswith("pieces.js") for url in asked)
    assert not any("one_number" in url for url in asked)
    page.close()


def test_the_piece_is_small_and_asks_nobody():
    text = (ROOT / "book" / "assets" / "one_number.js").read_text(encoding="utf-8")
    assert len(text.encode()) < 13_000
    assert re.findall(r"https?:|fetch\(|import\(|XMLHttpRequest|\beval\(", text) == []


# ---------------------------------------------------------------- the book's page


def test_the_books_page_shows_it(site, serve, browser):  # noqa: F811
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{serve(site)}/{CHAPTER}")
    page.wait_for_selector("[data-piece=one-number] canvas")
    before = pixels(page)
    page.locator("[data-piece] input[name=gamma]").fill("0.6")
    settle(page)
    assert pixels(page) != before
    page.close()
