"""How long a chapter takes, by a rule, and the tables of book/teaching.md made from it.

A minute is 200 words of text or 20 visible lines of code; an exercise takes 8; to this comes the
run-time that the chapter's last cell has printed. The rule is for planning: nobody was timed.

`python book/minutes.py` prints all chapters and renews the numbers in book/teaching.md, each of
which stands behind a marker:

- `<!--read-->` and `<!--do-->`: reading and exercises of the chapters that the row links to, or
  names by a pattern as in `<!--chapters 00*-->`;
- `<!--read total-->`, `<!--do total-->`: the sums of the rows above, since the table began;
- `<!--all chapters-->` to `<!--end-->`: a table of every numbered chapter.
"""

import ast
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NBS, PAGE = ROOT / "nbs", ROOT / "book" / "teaching.md"
WORDS, LINES, EXERCISE = 200, 20, 8  # words and lines a minute; minutes an exercise
FOLDS = {"check": "The check", "fig-alt": "The plot"}  # cells that a page folds, and their titles
UNSEEN = {"hide", "hide_input", "default_exp", "colab", "code-fold", "live", *FOLDS}
NUMBER = r"(?:\d+)?"


@dataclass(frozen=True)
class Load:
    "What there is to do in a chapter."

    words: int
    lines: int
    exercises: int
    seconds: float

    @property
    def reading(self):
        "Minutes to read it and to run it once."
        return math.ceil(self.words / WORDS + self.lines / LINES + self.seconds / 60)

    @property
    def doing(self):
        "Minutes for its exercises."
        return EXERCISE * self.exercises


def only_imports(code):
    "Whether a cell has nothing but imports and the style of plots, which a page folds, too."
    try:
        body = ast.parse(code).body
    except SyntaxError:  # magics and shell commands
        return False
    return bool(body) and all(
        isinstance(node, (ast.Import, ast.ImportFrom)) or "book_style()" in ast.unparse(node)
        for node in body
    )


def visible_lines(source):
    "Lines of code that a page shows; none of a hidden or folded cell."
    lines = source.splitlines()
    directives = {match[1] for line in lines if (match := re.match(r"#\|\s*([\w-]+)", line))}
    if UNSEEN & directives or only_imports(source):
        return 0
    return sum(bool(line.strip()) and not line.startswith("#|") for line in lines)


def text_only(source):
    "A text without its folds, which hold hints and solutions, and without addresses."
    source = re.sub(r"<details.*?</details>", "", source, flags=re.S)
    return re.sub(r"\]\([^)]*\)", "]", source)


def load_of(path):
    "Counts what is in a notebook; the run-time is in the output of its last cell."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    text = "\n\n".join(text_only(source) for kind, source in sources if kind == "markdown")
    exercises = re.split(r"^#+ Exercises", text, maxsplit=1, flags=re.M)[1:]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    printed = "\n".join("".join(output.get("text", "")) for output in outputs)
    took = re.findall(r"^This (?:chapter|appendix|page) took ([\d.]+) s", printed, re.M)
    return Load(
        words=len(text.split()),
        lines=sum(visible_lines(source) for kind, source in sources if kind == "code"),
        exercises=len(re.findall(r"^(?:\*\*)?\d+\.", "".join(exercises), re.M)),
        seconds=float(took[-1]) if took else 0.0,
    )


def chapters_of_row(row):
    "The notebooks that a line of a table links to, or names by a pattern."
    linked = re.findall(r"\]\(\.\./nbs/(\w+)\.ipynb\)", row)
    for pattern in re.findall(r"<!--chapters (\S+)-->", row):
        linked += [path.stem for path in sorted(NBS.glob(f"{pattern}.ipynb"))]
    return list(dict.fromkeys(linked))


def table_of_all():
    "Every numbered chapter: what was counted, and the minutes."
    head = "| chapter | words | lines | exercises | run-time | reading, min | exercises, min |"
    rows = [head, "|---|---:|---:|---:|---:|---:|---:|"]
    for path in sorted(NBS.glob("[0-9]*.ipynb")):
        load = load_of(path)
        title = re.search(r"# (.*?)\\n", path.read_text(encoding="utf-8"))[1]
        rows.append(
            f"| [{title}](../nbs/{path.name}) | {load.words:,} | {load.lines} | {load.exercises} "
            f"| {load.seconds:.0f} s | {load.reading} | {load.doing} |"
        )
    return "\n".join(rows)


def fill(text):
    "A page with the number behind every marker renewed."
    sums, lines = {"read": 0, "do": 0}, []
    for line in text.splitlines():
        if not line.startswith("|"):
            sums = dict.fromkeys(sums, 0)
        loads = [load_of(NBS / f"{name}.ipynb") for name in chapters_of_row(line)]
        now = {
            "read": sum(load.reading for load in loads),
            "do": sum(load.doing for load in loads),
        }
        for kind, minutes in now.items():
            mark = f"<!--{kind}-->"
            if mark in line:
                sums[kind] += minutes
                line = re.sub(mark + NUMBER, f"{mark}{minutes}", line)
            mark = f"<!--{kind} total-->"
            line = re.sub(mark + NUMBER, f"{mark}{sums[kind]}", line)
        lines.append(line)
    text = "\n".join(lines) + "\n"
    between = re.compile(r"(<!--all chapters-->\n).*?(<!--end-->)", re.S)
    return between.sub(lambda match: f"{match[1]}\n{table_of_all()}\n\n{match[2]}", text)


if __name__ == "__main__":
    print(table_of_all())
    if PAGE.exists():
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
