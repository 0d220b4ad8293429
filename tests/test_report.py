"The HTML report: what a chapter's two models do not show, and the page in a real browser."
from dataclasses import replace

import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from test_book import WIDTHS, problems_of

from terd_nb.loading.files import data_dir
from terd_nb.model_detection import ModelDetector
from terd_nb.report import ENVIRONMENT, EVIDENCE, headline, report_page, summary
from terd_nb.scanning import scan
from terd_nb.triggers import Trigger
from terd_nb.two_stages import Candidate
from terd_nb.zoo import zoo_path

FILES = ["headline.html", "page.html", "section.html", "style.css", "words.toml"]
LOST = ("lost", "model_index.json is not there")


@pytest.fixture(scope="module")
def report():
    return scan(zoo_path("villan-psi1"), progress=False, looks=("against",), starts=4)


def retold(report, **words):
    "The report with other words in its result."
    return replace(report, result=report.result.model_copy(update=words))


@pytest.fixture(scope="module")
def published(report):
    "As if the published search had been used: one candidate, one long curve, another detector."
    trigger = report.trigger
    evidence = {"loss": 0.1, "norm": trigger.norm}
    best = Candidate(trigger, "loss", -1.0, evidence)
    curves = {"reversed loss": list(np.geomspace(90, 1, 4000))}
    reversal = replace(report.reversal, method="published", candidates=[best], curves=curves)
    features = [[0.1, 0.01], [0.11, 0.02], [0.12, 0.01]]
    detector = ModelDetector("published").fit_features(features)
    report = retold(report, method="published", threshold=detector.sigmas)
    return replace(report, reversal=reversal, detector=detector)


@pytest.fixture(scope="module")
def colour(report):
    "Of colour images, a noise scale a pixel, and a curve and a number that the page does not know."
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(3, 64, 64, generator=generator)
    images = torch.rand(8, 3, 64, 64, generator=generator) * 2 - 1
    evidence = {"something new": 1.0}
    best, *others = report.reversal.candidates
    best = replace(best, trigger=Trigger(r, torch.full((3, 64, 64), 0.5)), evidence=evidence)
    curves = {"something new": [1.0, 0.0, 2.0]}
    reversal = replace(report.reversal, candidates=[best, *others], curves=curves)
    words = {"shape": (3, 64, 64), "trigger_gamma": 0.5, "evidence": evidence, "score": 1e5}
    pictures = {"clean_images": images, "triggered_images": 0 * images}
    return replace(retold(report, **words), reversal=reversal, **pictures)


def text_of(page):
    "What a page says; it runs and fetches nothing, and names each picture and each place once."
    soup = BeautifulSoup(page, "html.parser")
    assert not soup.find_all("script")
    for img in soup.find_all("img"):
        assert img["alt"].strip()
        assert img["src"].startswith("data:image/")
    ids = [tag["id"] for tag in soup.find_all(id=True)]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in soup.find_all("a")} <= set(ids)
    return " ".join(soup.get_text(" ").split())


@pytest.mark.parametrize("name", FILES)
def test_the_page_is_made_of_files_of_the_package(name):
    path = data_dir() / "report" / name
    lines = path.read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= 120
    assert name in ENVIRONMENT.list_templates()


def test_no_step_of_a_template_is_left(report):
    for page in (report_page([report]), report_page([report], [LOST]), headline(report)):
        assert not [mark for mark in ("{{", "{%", "{#") if mark in page]


def test_every_number_of_a_scan_is_explained(report):
    assert not set(report.result.evidence) - set(EVIDENCE)


@pytest.mark.parametrize("verdict, said, not_said", [
    ("backdoored",
     ["Do not deploy it", "It looks like Villan", "The trigger that was found"],
     ["You may go on"]),
    ("inconclusive",
     ["Do not read this as", "If it is a backdoor,", "The best candidate"],
     ["deploy it"]),
    ("clean",
     ["You may go on", "does not promise", "The best candidate"],
     ["looks like", "Do not deploy it"]),
])
def test_each_verdict_has_its_words(report, verdict, said, not_said):
    attack = None if verdict == "clean" else report.result.attack
    changed = retold(report, verdict=verdict, attack=attack)
    text = text_of(report_page([changed]))
    assert all(words in text for words in said)
    assert not any(words in text for words in not_said)
    assert verdict.capitalize() in text_of(headline(changed))


def test_a_score_with_a_natural_zero_is_explained_without_honest_models(report):
    text = text_of(report_page([report]))
    for words in ("What the verdict rests on", "Loss at the trigger", "Its mirror images",
                  "Half the way to honesty", f"Score: {report.result.score:.2f}; the alarm is"):
        assert words in text
    assert "Among honest models" not in text and "standard deviations above" not in text


def test_published_search(published):
    text = text_of(report_page([published]))
    assert "Reversed loss" in text and "The reference has 3 scans of honest models" in text
    assert "Among honest models" in text and "standard deviations above honest models" in text


def test_what_the_page_does_not_know_is_shown_all_the_same(colour):
    text = text_of(report_page([colour]))
    assert text.count("something new") >= 2
    assert "turned down to 0.50" in text
    assert "3 channels" in text


def test_a_report_without_a_single_judged_model():
    text = text_of(report_page([], [LOST]))
    assert "No backdoor found, but 1 of 1 models is not known to be clean" in text
    assert "Not judged" in text
    assert "model_index.json is not there" in text


@pytest.mark.parametrize("verdicts, line", [
    (["clean"] * 3, "All 3 models are clean"),
    (["clean", "backdoored", "error"], "1 of 3 models is backdoored"),
    (["inconclusive", "error", "clean"],
     "No backdoor found, but 2 of 3 models are not known to be clean"),
])
def test_summary(verdicts, line):
    assert summary(verdicts) == line


def test_what_does_not_print_is_spelled_out_wherever_it_stands(report):
    evil = "a\x1b[2J\x07\u202eb"
    said = retold(report, model=evil, source=evil, notes=[evil], weights=[evil], family=evil)
    for page in (report_page([said]), report_page([said, report], [(evil, evil)]), headline(said)):
        assert r"a\x1b[2J\x07\u202eb" in page
        assert not {c for c in page if not c.isprintable()} - {"\n"}


@pytest.mark.browser
@pytest.mark.parametrize("width", ["phone", "desktop"])
def test_page_in_a_browser(
    report, published, colour, tmp_path, serve, browser, width,  # noqa: F811
):
    evil = "<script>alert(1)</script>"
    hostile = retold(report, verdict="inconclusive", model="x" * 200, source=evil)
    several = report_page([report, hostile, published, colour], [("y" * 200, "z" * 300)])
    (tmp_path / "index.html").write_text(several, encoding="utf-8")
    (tmp_path / "one.html").write_text(report_page([hostile]), encoding="utf-8")
    for name in ("index", "one"):
        address = f"{serve(tmp_path)}/{name}.html"
        assert problems_of(browser, address, WIDTHS[width]) == []
