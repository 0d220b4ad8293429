"""What makes a book of the chapters: the map that each part opens with, the quizzes with which it
ends, the index, the citations.

Each has one source. The map's parts and links come from book/_toc.yml, what it says of a part from
`PARTS`; a quiz is a page of Markdown, book/quiz_*.md, which GitHub shows as lists to tick; the
index comes from the glossary and from the terms that a chapter sets off; citations, from the links
to papers that book/references.bib holds; "How to cite", from CITATION.cff.
"""

import re
from html import escape
from typing import NamedTuple

from pybtex.database import parse_file

# A part's number: what it asks, and what one has afterwards.
PARTS = {
    "0": ("What is a backdoor?", "All of it on a single number, in closed form"),
    "I": ("How is one planted?", "Three published attacks, one formula, a zoo of models"),
    "II": ("How does TERD find it?", "The reversed loss, two stages, inputs and models judged"),
    "III": ("What if one is told nothing?", "Three looks, a fit of the path, a scan, a repair"),
    "IV": ("How far does it reach?", "Other paths, rates with intervals, what is still missed"),
    "V": ("What would it cost?", "The papers' own settings, and a job for one GPU"),
}
PART = re.compile(r"Part (\w+): (.+)")


class BookError(Exception):
    "Something that the author of a chapter must mend; the message says what and where."


# ---------------------------------------------------------------- the map


def parts_of(toc):
    "The numbered parts of the table of contents: number, name and files of each."
    for part in toc["parts"]:
        if match := PART.fullmatch(part["caption"]):
            if match[1] not in PARTS:
                raise BookError(f"book/apparatus.py says nothing of part {match[1]} in PARTS")
            yield match[1], match[2], [entry["file"] for entry in part["chapters"]]


def book_map(toc, here=None):
    """The map as HTML, a list with a link to the first chapter of each part; `here` is the number
    of the part in which the reader is."""
    items = []
    for number, name, files in parts_of(toc):
        asks, has = PARTS[number]
        current, place = "", ""
        if number == here:
            current = ' aria-current="step"'
            place = '<span class="book-map-here">You are here</span> '
        items.append(
            f'<li{current}>{place}<a href="{files[0]}.html">Part {number}: {escape(name)}</a> '
            f"<strong>{escape(asks)}</strong> <span>{escape(has)}</span></li>"
        )
    stops = "".join(items)
    return f'<nav class="book-map" aria-label="The parts of the book"><ol>{stops}</ol></nav>'


def maps_of(toc):
    "The map of each chapter with which a part opens, by the chapter's name."
    return {files[0]: book_map(toc, number) for number, _, files in parts_of(toc)}


# ---------------------------------------------------------------- the quizzes


class Option(NamedTuple):
    "One answer to choose."

    right: bool
    text: str
    why: str  # what is said to whoever chooses it


def questions_of(source):
    "The questions of a quiz: the text of each and its options."
    found = []
    for block in re.split(r"^## ", source, flags=re.M)[1:]:
        question, _, rest = block.partition("\n")
        options = []
        for mark, item in re.findall(r"^- \[([ x])\] (.*?)(?=^- \[|\Z)", rest, re.S | re.M):
            text, _, why = item.partition("\n")
            lines = (line.strip() for line in why.splitlines())
            options.append(Option(mark == "x", text.strip(), "\n".join(lines).strip()))
        found.append((question.strip(), options))
    return found


def faults_of(source):
    "What is wrong with a quiz, line by line."
    questions = questions_of(source)
    if not 5 <= len(questions) <= 8:
        yield f"{len(questions)} questions, where 5 to 8 are asked for"
    for question, options in questions:
        if len(options) < 3:
            yield f"{question}: fewer than three options"
        if sum(option.right for option in options) != 1:
            yield f"{question}: not one right option"
        if any(not option.why for option in options):
            yield f"{question}: an option without an explanation"
        if len({option.text for option in options}) < len(options):
            yield f"{question}: an option twice"


def quiz_page(source, name):
    """A quiz as a page: every option a radio button, what is said of it shown once it is chosen; no
    script. On paper the options stand alone, and the answers at the end."""
    if wrong := list(faults_of(source)):
        raise BookError("\n".join(f"book/{name}.md: {fault}" for fault in wrong))
    head = re.split(r"^## ", source, maxsplit=1, flags=re.M)[0]
    parts, answers = [head], []
    for i, (question, options) in enumerate(questions_of(source), 1):
        parts += [f'<fieldset class="quiz"><legend>\n\n**{i}.** {question}\n\n</legend>']
        for letter, option in zip("abcdefgh", options, strict=False):
            key = f"q{i}{letter}"
            verdict = "Right." if option.right else "Not so."
            kind = "right" if option.right else "wrong"
            parts += [
                f'<div class="quiz-option">\n<input type="radio" name="q{i}" id="{key}">'
                f'<label for="{key}">\n\n({letter}) {option.text}\n\n</label>\n'
                f'<div class="quiz-why quiz-{kind}" role="status">\n\n**{verdict}** {option.why}'
                "\n\n</div>\n</div>"
            ]
            if option.right:
                answers.append(f"{i} {letter}")
        parts.append("</fieldset>")
    parts.append(f'<p class="quiz-answers">The right answers: {", ".join(answers)}.</p>')
    return "\n\n".join(parts) + "\n"


WRAPPED = re.compile(r"(<(label|legend)[^>]*>)\s*<p>(.*?)</p>\s*(</\2>)", re.S)


def unwrap(page):
    "A built page whose labels and legends hold words, as HTML asks, and no paragraph."
    return WRAPPED.sub(r"\1\3\4", page)


# ---------------------------------------------------------------- the index

GLOSSARY = re.compile(r"```\{glossary\}\n(.*?)```", re.S)
SET_OFF = re.compile(r"\*\*([^*\n]+)\*\*|(?<!\*)\*([^*\n]+)\*(?!\*)")  # in bold or in italics


def terms_of(glossary):
    "The terms that a glossary explains."
    lines = "\n".join(GLOSSARY.findall(glossary)).splitlines()
    return [line for line in lines if line and not line.startswith(" ")]


def index_cells(cells, terms):
    """Puts a chapter's cell into the index where it sets off a term of the glossary for the first
    time, which is how a chapter says what a word means. Changes the cells."""
    title = re.search(r"^# (?:Chapter )?(.*)", cells[0].source, re.M)[1].replace(" ·", "")
    known, met = {term.lower(): term for term in terms}, set()
    for cell in cells:
        if cell.cell_type != "markdown" or cell.source.startswith("<details"):
            continue  # a fold loses the place that an entry leads to
        entries = []
        for bold, italic in SET_OFF.findall(cell.source):
            word = (bold or italic).strip(" .:").lower()
            term = known.get(word) or known.get(word.removesuffix("s"))
            if term and term not in met:
                met.add(term)
                entries.append(f"```{{index}} single: {term}; {title}\n```\n\n")
        cell.source = "".join(entries) + cell.source


# ---------------------------------------------------------------- citations

PAPER = re.compile(r"\[([^\[\]]+)\]\((https://(?:arxiv\.org/abs|doi\.org)/[^)\s]+)\)")


def keys_of(bibliography):
    "The key of each work by its address; `bibliography` is the path of a BibTeX file."
    entries = parse_file(bibliography).entries
    return {entry.fields["url"]: key for key, entry in entries.items() if "url" in entry.fields}


def cite(text, keys):
    "A text whose links to papers lead to the bibliography; raises if a paper is not in it."

    def by_key(match):
        if match[2] not in keys:
            raise BookError(f"book/references.bib has no work with the url {match[2]} ({match[1]})")
        return f'<a href="bibliography.html#cite-{keys[match[2]]}">{escape(match[1])}</a>'

    return PAPER.sub(by_key, text)


def bibtex_entry(kind, key, fields):
    "An entry of BibTeX; what is empty is left out."
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if value]
    return "\n".join([f"@{kind}{{{key},", *lines, "}"])


def how_to_cite(citation, year):
    "What CITATION.cff says, as BibTeX: the software, and the paper whose defence it teaches."
    software = {
        "author": " and ".join(f"{{{author['name']}}}" for author in citation["authors"]),
        "title": f"{{{citation['title']}}}",
        "version": citation["version"],
        "year": year,
        "url": citation["repository-code"],
        "note": f"Licence: {citation['license']}",
    }
    entries = [bibtex_entry("software", "terd_nb", software)]
    for work in citation["references"]:
        names = [f"{author['family-names']}, {author['given-names']}" for author in work["authors"]]
        arxiv = next(one["value"] for one in work["identifiers"] if "arXiv" in one["value"])
        paper = {
            "author": " and ".join(names),
            "title": f"{{{work['title']}}}",
            "booktitle": work["collection-title"],
            "year": work["year"],
            "eprint": arxiv.removeprefix("arXiv:"),
            "archiveprefix": "arXiv",
        }
        key = f"{work['authors'][0]['family-names']}{work['year']}".lower()
        entries.append(bibtex_entry("inproceedings", key, paper))
    return "\n\n".join(f"```bibtex\n{entry}\n```" for entry in entries)
