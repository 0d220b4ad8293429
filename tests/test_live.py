"""The piece "The live model": the page computes what PyTorch does, and each control moves it.

One page of one place is loaded once for all tests; it needs Chromium and npm's archive of the
runtime, but no built book.
"""

import importlib.util
import shutil

import pytest
import torch
from test_book import PATIENCE, ROOT, write_page

from terd_nb import Trigger, load
from terd_nb.input_detection import InputDetector
from terd_nb.lab.curves import read_whole_searches
from terd_nb.success import hits_image
from terd_nb.triggers import corner

pytestmark = pytest.mark.browser
MEGABYTES, PARITY = 15, 1e-3
ZOO = ROOT / "data" / "zoo"
FILES = ("live_model.js", "pieces.js", "custom.css")

spec = importlib.util.spec_from_file_location("book_live", ROOT / "book" / "live.py")
live = importlib.util.module_from_spec(spec)
spec.loader.exec_module(live)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A page with one place for the piece, and all that it loads, as the book's builder stages it."
    folder = tmp_path_factory.mktemp("live")
    for name in FILES:
        shutil.copy(ROOT / "book" / "assets" / name, folder)
    place = live.stage(folder)
    if "data-piece" not in place:
        pytest.skip(place)
    head = '<link rel="stylesheet" href="custom.css"><script src="pieces.js"></script>'
    write_page(folder, f'{head}<article class="bd-article">{place}</article>')
    return folder


@pytest.fixture(scope="module")
def opened(folder, serve, browser):
    "The page with its models loaded by a click, and the requests before and after it."
    page = browser.new_page(viewport={"width": 1000, "height": 900}, reduced_motion="reduce")
    page.set_default_timeout(4 * PATIENCE)
    before, after = [], []
    asked = before
    page.on("request", lambda request: asked.append(request.url))
    page.goto(serve(folder) + "/index.html", wait_until="networkidle")
    asked = after
    page.get_by_role("button", name="Load the live model").click()
    page.wait_for_selector("[data-piece] canvas")
    ready(page)
    yield page, before, after
    page.close()


@pytest.fixture
def page(opened):
    "With all controls as they are at first."
    page, *_ = opened
    page.evaluate("""() => {
      const piece = document.querySelector("[data-piece]").terdPiece;
      for (const name of ["model", "trigger", "sampler", "ink"]) piece[name].selectedIndex = 0;
      piece.strength.value = 1;
      piece.open();
    }""")
    ready(page)
    return page


def ready(page):
    "Wait until the images of the last change are drawn."
    page.wait_for_function(
        "() => document.querySelector('.piece-says').textContent.includes('images in')"
    )


def shown(page, what="canvas, svg"):
    return page.evaluate(
        """what => [...document.querySelectorAll(what)]
          .map(e => e.toDataURL ? e.toDataURL() : e.innerHTML).join()""",
        what,
    )


# ---------------------------------------------------------------- what is loaded


def test_only_a_click_loads_it_from_here_and_it_is_light(opened, folder, serve):
    _, before, after = opened
    assert all(url.startswith((serve(folder), "data:", "blob:")) for url in before + after)
    assert not any("/live/" in url for url in before)
    loaded = {url.rsplit("/", 1)[1] for url in after if "/live/" in url}
    assert loaded == {path.name for path in (folder / "live").iterdir()}
    total = sum((folder / "live" / name).stat().st_size for name in loaded)
    print(f"{total / 1e6:.2f} MB")
    assert total <= MEGABYTES * 1e6


def test_a_changed_archive_stops_the_build(tmp_path, monkeypatch):
    def forged(command, cwd, **_):
        (tmp_path / "package.tgz").write_bytes(b"not what was pinned")

    monkeypatch.setattr(live.subprocess, "run", forged)
    monkeypatch.setattr(live.shutil, "which", lambda name: name)
    with pytest.raises(live.LiveError, match="has the SHA-512"):
        live.pack(str(tmp_path))


def test_without_npm_the_page_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(live, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(live.shutil, "which", lambda name: None)
    page = live.stage(tmp_path / "assets")
    assert "no npm" in page and "data-piece" not in page
    assert "left out" in capsys.readouterr().out
    assert not (tmp_path / "assets").exists()


# ---------------------------------------------------------------- what it computes

DENOISE = """async ([name, start, eta, noise]) => {
  const { ort, sessions, numbers } = document.querySelector("[data-piece]").terdPiece;
  const began = performance.now();
  const x = await terdLive.denoise(ort, sessions[name], numbers, start, eta, i => noise[i]);
  return [[...x], (performance.now() - began) / 1000];
}"""


@pytest.mark.parametrize("name, eta", [(live.PLANTED, 1), ("benign-a", 0)])
def test_images_are_pytorchs(opened, name, eta):
    "Two clean and two triggered images, whole runs of 20 steps on the same noise."
    page, *_ = opened
    denoiser = load(ZOO / name, device="cpu")
    trigger = Trigger.load(ZOO / live.PLANTED / "trigger.safetensors")
    z = denoiser.noise(2, seed=5)
    start = torch.cat([z, trigger.stamp(z)])
    wanted = denoiser.sample(start, live.STEPS, eta, seed=6)
    generator = torch.Generator().manual_seed(6)  # what `sample` adds, step by step
    noise = [torch.randn(start.shape, generator=generator) for _ in range(live.STEPS)]
    asked = [name, start.flatten().tolist(), eta, [each.flatten().tolist() for each in noise]]
    found, seconds = page.evaluate(DENOISE, asked)
    off = (torch.tensor(found).reshape(wanted.shape) - wanted).abs().max().item()
    print(f"{name}, eta {eta}: off by {off:.1e}; 4 images x 20 steps in {seconds:.2f} s")
    assert off <= PARITY
    if name == live.PLANTED:
        assert hits_image(corner(denoiser.shape))(wanted).tolist() == [False, False, True, True]


def test_scores_are_the_librarys(page):
    planted = Trigger.load(ZOO / live.PLANTED / "trigger.safetensors")
    detector = InputDetector(Trigger(read_whole_searches()[0][f"{live.PLANTED}/r"][-1]))
    scores, inputs, says = page.evaluate("""() => {
      const { scores, inputs, says } = document.querySelector("[data-piece]").terdPiece;
      return [scores, [...inputs], says.score.textContent];
    }""")
    z = torch.tensor(inputs).reshape(-1, 1, 16, 16)
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
    for kind, x in (("clean", z), ("triggered", planted.stamp(z))):
        wanted = detector.score(x)
        assert torch.allclose(torch.tensor(scores[kind]).double(), wanted, atol=0.1), kind
    caught = detector.predict(planted.stamp(z)).double().mean()
    assert f"catches {caught:.1%} of the triggered" in says


# ---------------------------------------------------------------- its controls

ROWS = ".live-rows .live-part:nth-child(2) canvas"
FIGURES = {  # what each control must change, beside its own look
    "trigger": [ROWS, ".live-pad", "[aria-label^='At the threshold']"],
    "strength": [ROWS, ".live-pad", "[aria-label^='At the threshold']"],
    "sampler": [ROWS, ".live-rows .live-part:first-child canvas"],
    "model": [ROWS, ".live-search canvas", ".live-search svg"],
    "ink": [".live-pad"],
    "step": [".live-search canvas", ".live-search svg", "[aria-label^='At the threshold']"],
}


def test_every_control_moves_its_picture_by_keyboard(page):
    controls = page.locator("[data-piece] :is(input, select)")
    assert sorted(controls.evaluate_all("a => a.map(c => c.name)")) == sorted(FIGURES)
    buttons = page.locator("[data-piece] button").all_inner_texts()
    assert sorted(buttons) == ["Clear the pad", "New noise"]  # they are pressed below
    before = shown(page)
    page.wait_for_timeout(300)
    assert shown(page) == before  # all is still until something is moved
    for name, figures in FIGURES.items():
        control = page.locator(f"[data-piece] [name={name}]")
        assert control.evaluate("c => c.labels[0].textContent.trim() !== ''"), name
        before = [shown(page, figure) for figure in figures]
        control.focus()
        page.keyboard.press("Home" if name in ("strength", "step") else "ArrowDown")
        ready(page)
        after = [shown(page, figure) for figure in figures]
        assert all(a != b for a, b in zip(after, before, strict=True)), name


def test_the_pad_is_drawn_on_by_keyboard_and_by_pointer(page):
    pad, trigger = page.locator(".live-pad"), page.locator("[name=trigger]")
    at_first = shown(page, ".live-pad")
    pad.focus()
    page.keyboard.press("ArrowRight")
    moved = shown(page, ".live-pad")
    assert moved != at_first and trigger.input_value() == "planted"
    page.keyboard.press("Enter")
    assert trigger.input_value() == "drawn"
    page.get_by_role("button", name="Clear the pad").press("Enter")
    ready(page)
    clean, triggered = (shown(page, f".live-rows .live-part:nth-child({k}) canvas") for k in (1, 2))
    assert clean == triggered  # there is no trigger
    assert page.locator("[name=strength]").is_disabled()
    box = pad.bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 140, box["y"] + 140, steps=8)
    page.mouse.up()
    ready(page)
    assert shown(page, ROWS) != clean
    drawn = page.evaluate("() => [...document.querySelector('[data-piece]').terdPiece.drawn]")
    assert sum(drawn) >= 8 and set(drawn) == {0, 1}


def test_new_noise_and_the_verdict_of_the_rows(page):
    def says():
        return page.locator(".live-rows p").all_inner_texts()

    assert "0 of 4" in says()[0] and "4 of 4" in says()[1]
    before = shown(page, ".live-rows canvas")
    page.get_by_role("button", name="New noise").press("Enter")
    ready(page)
    assert shown(page, ".live-rows canvas") != before
    page.locator("[name=model]").select_option("1")
    ready(page)
    assert "0 of 4" in says()[1]  # the honest model


def test_it_fits_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 800})
    wide = page.evaluate("() => document.documentElement.scrollWidth")
    page.set_viewport_size({"width": 1000, "height": 900})
    assert wide <= 360
