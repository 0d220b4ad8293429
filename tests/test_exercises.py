"""Every exercise that checks itself has all its parts, and its check does not hold the answer.

That each solution passes its check, and that each start fails it, is seen where the chapters are
run: book/build.py."""

import ast
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
by_stem = {"ids": lambda path: path.stem}

CHECK = re.compile(r"^#\s*\|\s*check\b", re.M)
FOLDED = re.compile(r"<details.*?<summary>\s*(.*?)\s*</summary>(.*?)</details>", re.S)
PYTHON_FENCE = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
LEAST = 40  # exercises in the book that check themselves
LONG = 20  # characters from which on an expression is an answer, and no turn of phrase


class Exercise(NamedTuple):
    "What stands from the start of one exercise to the start of the next."

    stub: str
    hints: list[str]
    check: str
    solutions: list[str]  # the code of each folded solution after the check


def is_check(cell):
    return cell.cell_type == "code" and bool(CHECK.search(cell.source))


def exercises(cells):
    "The exercises of a chapter, one for each check cell; its stub is the code before it."
    found, start = [], next((i for i, cell in enumerate(cells) if is_exercise_title(cell)), None)
    if start is None:
        assert not any(map(is_check, cells)), "a check cell outside the exercises"
        return found
    assert not any(map(is_check, cells[:start])), "a check cell before the exercises"
    stub, hints, open_ = [], [], False  # open_: the check has been met, and no next stub
    for cell in cells[start:]:
        if is_check(cell):
            found.append(Exercise("\n".join(stub), hints, cell.source, []))
            stub, hints, open_ = [], [], True
        elif cell.cell_type == "code":
            stub, open_ = [*stub, cell.source], False
        else:
            for summary, text in FOLDED.findall(cell.source):
                if summary.startswith("Hint"):
                    (found[-1].hints if open_ else hints).append(text)
                elif summary.startswith("Solution") and found:
                    found[-1].solutions.extend(PYTHON_FENCE.findall(text))
                    open_ = False
    return found


def is_exercise_title(cell):
    return cell.cell_type == "markdown" and bool(re.search(r"^### Exercises", cell.source, re.M))


def defined(code):
    "The names that code defines at its top level."
    for node in ast.parse(code).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        for target in getattr(node, "targets", []):
            yield from (name.id for name in ast.walk(target) if isinstance(name, ast.Name))


def used(code):
    return {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}


def answers(solution):
    "What a solution returns, assigns and does, as `ast` writes it."
    for node in ast.walk(ast.parse(solution)):
        if isinstance(node, (ast.Return, ast.Assign, ast.AugAssign, ast.Expr)) and node.value:
            text = ast.unparse(node.value)
            if len(text) >= LONG and not isinstance(node.value, ast.Constant):
                yield text


def faults(exercise, needs_a_hint=True):
    "What is wrong with an exercise, line by line."
    if not exercise.stub:
        yield "no stub before the check"
        return
    if needs_a_hint and not any(text.strip() for text in exercise.hints):
        yield "no hint"
    if not exercise.solutions:
        yield "no solution with code after the check"
        return
    asked = set(defined(exercise.stub)) & used(exercise.check)
    if not asked:
        yield "the check uses nothing that the stub defines"
    solution = "\n".join(exercise.solutions)
    if not set(defined(exercise.stub)) & set(defined(solution)):
        yield "the solution does not define what the stub defines"
    if "Correct" not in exercise.check:
        yield "the check never says 'Correct'"
    check = ast.unparse(ast.parse(exercise.check))
    for text in answers(solution):
        if text in check:
            yield f"the check holds a line of the solution: {text}"


def answered(stub):
    "Of a stub what the reader is to write: its functions; or where there is none, all."
    functions = [node.name for node in ast.parse(stub).body if isinstance(node, ast.FunctionDef)]
    return functions or list(defined(stub))


def of(path):
    return exercises(nbformat.read(path, as_version=4).cells)


def in_the_workshop(path):
    "Its exercises are for those who work on the library, and do without hints."
    return not path.stem[0].isdigit()


@pytest.mark.parametrize("path", NOTEBOOKS, **by_stem)
def test_an_exercise_has_all_its_parts(path):
    found = {
        answered(one.stub)[-1] if one.stub else one.check: list(
            faults(one, needs_a_hint=not in_the_workshop(path))
        )
        for one in of(path)
    }
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("path", NOTEBOOKS, **by_stem)
def test_exercises_do_not_disturb_each_other(path):
    "The solutions of a chapter run one after another, in one kernel."
    names = Counter(name for one in of(path) for name in answered(one.stub))
    assert [name for name, count in names.items() if count > 1] == []


def test_there_are_many():
    whole = [one for path in NOTEBOOKS for one in of(path) if not list(faults(one))]
    assert len(whole) >= LEAST


# ---------------------------------------------------------- does the checker see what it should?

ANSWER = "sum(x for _ in range(2))"
PARTS = {
    "title": "### Exercises\n\n1. Double it.",
    "stub": "def double(x):\n    return x",
    "hint": "<details><summary>Hint</summary>\n\nOnce more.\n\n</details>",
    "check": "#| check\nprint('Correct.' if double(3) == 6 else 'Not yet.')",
    "solution": "<details><summary>Solution of exercise 1</summary>\n\n```python\n"
    f"def double(x):\n    return {ANSWER}\n```\n\n</details>",
}


def made_up(**changed):
    "The faults of an exercise, some of whose parts are changed or, if None, left out."
    parts = {name: text for name, text in (PARTS | changed).items() if text is not None}
    make = {"stub": nbformat.v4.new_code_cell, "check": nbformat.v4.new_code_cell}
    cells = [make.get(name, nbformat.v4.new_markdown_cell)(text) for name, text in parts.items()]
    (one,) = exercises(cells)
    return list(faults(one))


def test_a_whole_exercise_is_accepted():
    assert made_up() == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"stub": None}, "no stub"),
        ({"hint": None}, "no hint"),
        ({"solution": None}, "no solution"),
        ({"solution": PARTS["solution"].replace("```python", "```")}, "no solution with code"),
        ({"solution": PARTS["solution"].replace("def double", "def twice")}, "does not define"),
        ({"check": "#| check\nprint('Correct.')"}, "uses nothing"),
        ({"check": "#| check\nprint('Not yet.', double(3))"}, "never says"),
        ({"check": f"#| check\nx = 3\nprint('Correct.', double(x) == {ANSWER})"}, "a line of"),
    ],
)
def test_the_checker_sees(changed, words):
    assert any(words in fault for fault in made_up(**changed))


def test_a_check_outside_the_exercises_is_seen():
    with pytest.raises(AssertionError, match="outside the exercises"):
        made_up(title=None)


@pytest.mark.parametrize("path", NOTEBOOKS, **by_stem)
def test_no_check_is_passed_by_what_is_no_number(path):
    "No comparison with NaN is true: a check asks whether an answer is near, not if it is far."
    for cell in filter(is_check, nbformat.read(path, as_version=4).cells):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Compare):
                far = isinstance(node.test.ops[0], ast.Gt) and "abs(" in ast.unparse(node.test)
                assert not far, ast.unparse(node.test)


@pytest.mark.parametrize("pattern, accepted", [
    ("**/*.safetensors", True), ("*/*.safetensors", False), ("*.safetensors", False),
    ("*/**/*.safetensors", False), ("**/*", False)])
def test_the_weights_of_a_folder_are_those_at_any_depth(
        pattern, accepted, tmp_path, monkeypatch, capsys):
    "Workshop A4, exercise 3: a sum over one depth alone is no order by size."
    monkeypatch.chdir(tmp_path)
    cells = nbformat.read(ROOT / "nbs" / "a4_fleet.ipynb", as_version=4).cells
    (check,) = filter(is_check, cells)

    def size(folder):
        return sum(one.stat().st_size for one in folder.glob(pattern) if one.is_file())

    def largest_first(folders):
        return sorted(folders, key=size, reverse=True)

    exec(check.source, {"Path": Path, "largest_first": largest_first})
    assert (capsys.readouterr().out == "Correct.\n") == accepted
