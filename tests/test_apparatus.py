"The map, the quizzes, the index and the citations: book/apparatus.py, and its pages in Chromium."

import re

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from pybtex.database import parse_string
from test_book import ROOT, build, open_page, resize, site, visitor  # noqa: F401

apparatus = build.apparatus
QUIZZES = sorted((ROOT / "book").glob("quiz_*.md"))
TOC = build.read_toc()
PARTS = list(apparatus.parts_of(TOC))


# ---------------------------------------------------------------- the map


@pytest.mark.parametrize("here", [number for number, *_ in PARTS] + [None])
def test_the_map_shows_every_part_and_where_one_is(here):
    stops = BeautifulSoup(apparatus.book_map(TOC, here), "html.parser").find_all("li")
    assert [stop.a["href"] for stop in stops] == [f"{files[0]}.html" for *_, files in PARTS]
    current = [stop.a.text for stop in stops if stop.get("aria-current") == "step"]
    assert [text.split(":")[0] for text in current] == [f"Part {here}"] * (here is not None)
    assert [stop for stop in stops if "You are here" in stop.text] == [
        stop for stop in stops if stop.has_attr("aria-current")
    ]


def test_a_part_of_which_the_map_says_nothing_stops_the_build():
    toc = {"parts": [{"caption": "Part VI: more", "chapters": [{"file": "30_more"}]}]}
    with pytest.raises(build.BookError, match="nothing of part VI"):
        apparatus.book_map(toc)


# ---------------------------------------------------------------- the quizzes


@pytest.mark.parametrize("path", QUIZZES, ids=lambda path: path.stem)
def test_a_quiz_has_one_right_option_a_question_and_explains_each(path):
    assert list(apparatus.faults_of(path.read_text(encoding="utf-8"))) == []


def test_the_parts_end_with_a_quiz():
    ends = {number: files[-1] for number, _, files in PARTS}
    wanted = {number: f"quiz_{i}" for i, number in enumerate(["0", "I", "II", "III", "IV"])}
    assert {number: ends[number] for number in wanted} == wanted


QUESTION = "## Why $x$?\n\n- [ ] No.\n\n  Not so.\n- [x] Yes.\n\n  So.\n- [ ] Or.\n\n  Nor.\n\n"


def test_a_quiz_is_read_as_it_is_written():
    ((question, options),) = apparatus.questions_of(f"# Quiz\n\nHead.\n\n{QUESTION}")
    assert question == "Why $x$?"
    assert [option.right for option in options] == [False, True, False]
    assert [(option.text, option.why) for option in options][1] == ("Yes.", "So.")
    assert list(apparatus.faults_of("# Quiz\n\n" + 5 * QUESTION)) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("[x]", "[ ]", "not one right option"),
        ("[ ] Or", "[x] Or", "not one right option"),
        ("\n  Nor.\n", "", "without an explanation"),
        ("No.", "Or.", "an option twice"),
        ("- [ ] Or.\n\n  Nor.\n", "", "fewer than three"),
    ],
)
def test_the_checker_sees(old, new, fault):
    source = "# Quiz\n\n" + 4 * QUESTION + QUESTION.replace(old, new)
    with pytest.raises(build.BookError, match=f"book/quiz_9.md: Why .*{fault}"):
        apparatus.quiz_page(source, "quiz_9")
    assert any("4 questions" in fault for fault in apparatus.faults_of(4 * QUESTION))


@pytest.mark.browser
def test_a_quiz_answers_by_keyboard(site, serve, visitor):  # noqa: F811
    "What is said of an option is seen while it is chosen, and only then; on paper, the answers."
    resize(visitor, "phone")
    open_page(visitor, f"{serve(site)}/quiz_2.html")
    written = apparatus.questions_of((ROOT / "book" / "quiz_2.md").read_text(encoding="utf-8"))
    questions = visitor.locator("fieldset.quiz").all()
    assert len(questions) == len(written)

    def said(question):
        return [text.split()[0] for text in question.locator(".quiz-why:visible").all_inner_texts()]

    for question, (_, options) in zip(questions, written, strict=True):
        assert said(question) == []
        question.locator("input").first.press("Space")
        for option in options:
            assert said(question) == ["Right." if option.right else "Not"]
            visitor.keyboard.press("ArrowDown")
    answers = visitor.locator(".quiz-answers")
    assert not answers.is_visible()
    resize(visitor, "paper", "print")
    right = re.findall(r"\d ([a-d])", answers.inner_text())
    assert ["abcd".index(letter) for letter in right] == [
        [option.right for option in options].index(True) for _, options in written
    ]


# ---------------------------------------------------------------- index and citations


def markdown(*sources):
    return [nbformat.v4.new_markdown_cell(source) for source in sources]


def test_a_term_goes_into_the_index_where_a_chapter_sets_it_off_first():
    terms = apparatus.terms_of((ROOT / "book" / "glossary.md").read_text(encoding="utf-8"))
    assert {"trigger", "attack success rate", "ASR", "flow matching"} <= set(terms)
    cells = markdown(
        "# Chapter 4 · Triggers", "A **trigger** and its *targets*, *not* so.", "The **trigger**."
    )
    apparatus.index_cells(cells, terms)
    entries = re.findall(r"^```{index} single: (.*)", cells[1].source, re.M)
    assert entries == ["trigger; 4 Triggers", "target; 4 Triggers"]
    assert "single" not in cells[0].source + cells[2].source


def test_a_link_to_a_paper_leads_to_its_place_in_the_bibliography():
    keys = apparatus.keys_of(ROOT / "book" / "references.bib")
    cited = apparatus.cite("([Salimans & Ho](https://arxiv.org/abs/2202.00512))", keys)
    link = BeautifulSoup(cited, "html.parser").a
    assert (link["href"], link.text) == (
        "bibliography.html#cite-salimans2022progressive",
        "Salimans & Ho",
    )
    with pytest.raises(build.BookError, match="no work with the url https://arxiv.org/abs/1"):
        apparatus.cite("[Nobody](https://arxiv.org/abs/1)", keys)


def test_how_to_cite_says_what_the_citation_file_says():
    "Read back by pybtex, which the bibliography is made with."
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    text = apparatus.how_to_cite(citation, "2026")
    entries = parse_string(re.sub(r"^```.*\n?", "", text, flags=re.M), "bibtex").entries
    software, paper = entries["terd_nb"], entries["mo2024"]
    assert software.fields["version"] == citation["version"]
    assert software.fields["url"] == citation["repository-code"]
    (work,) = citation["references"]
    names = [(one["family-names"], one["given-names"]) for one in work["authors"]]
    persons = paper.persons["author"]
    assert [(" ".join(one.last_names), " ".join(one.first_names)) for one in persons] == names
    assert paper.fields["title"].strip("{}") == work["title"]


@pytest.mark.browser
def test_the_index_leads_from_a_term_to_the_chapters_that_explain_it(site):  # noqa: F811
    soup = BeautifulSoup((site / "genindex.html").read_text(encoding="utf-8"), "html.parser")
    for term, chapter in (("leak", "06_success"), ("ridge", None), ("gain", "14_directions")):
        entry = next((li for li in soup.find_all("li") if li.find(string=term)), None)
        assert (entry is None) == (chapter is None), term
        if chapter:
            links = [a["href"].split("#")[0] for a in entry.find_all("a")]
            assert f"{chapter}.html" in links and "glossary.html" in links
