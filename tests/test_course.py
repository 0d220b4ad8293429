"What a lecturer gets: an archive without solutions, ten sealed models, a proper mark, minutes."

import csv
import importlib.util
import json
import math
import re
import shutil
import zipfile
from html.parser import HTMLParser

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from safetensors.torch import load_file
from sklearn.metrics import brier_score_loss
from sklearn.metrics import log_loss as log_loss_of_sklearn

from terd_nb import __version__
from terd_nb.cli import main
from terd_nb.lab.course import (
    ANSWER_COLUMNS,
    UNKNOWN_WEIGHTS,
    chapters_in,
    draw_models,
    grade,
    make_unknown,
    mean_cosine,
    pool,
    read_truth,
    skill,
    student_zip,
    trigger_files,
    without_solutions,
)
from terd_nb.triggers import Trigger
from terd_nb.zoo import zoo_cards, zoo_dir, zoo_path

# ---------------------------------------------------------------- the archive


class Folds(HTMLParser):
    "The summaries of a text's folds, by Python's own parser."

    def __init__(self, text):
        super().__init__()
        self.summaries, self.inside = [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.inside = tag == "summary"

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.summaries.append(data.strip())


def is_solution(summary):
    return summary.startswith("Solution")


def text_of(cell):
    return "".join(cell["source"])


@pytest.fixture(scope="module")
def unpacked(root, tmp_path_factory):
    "The archive of this checkout, in a folder with nothing else."
    folder = tmp_path_factory.mktemp("student")
    count = student_zip(root, folder / "course.zip")
    assert count == len(list((root / "nbs").glob("*.ipynb")))
    with zipfile.ZipFile(folder / "course.zip") as archive:
        archive.extractall(folder)
    (folder / "course.zip").unlink()
    return folder / "terd-course"


def test_the_archive_holds_what_a_student_needs_and_nothing_else(root, unpacked):
    names = {path.name for path in unpacked.iterdir()}
    chapters = {path.name for path in chapters_in(root)}
    assert names == chapters | {"README.md", "requirements.txt", "LICENSE"}
    assert (unpacked / "requirements.txt").read_text() == f"terd_nb[book]=={__version__}\n"
    assert (unpacked / "LICENSE").read_bytes() == (root / "LICENSE").read_bytes()
    assert __version__ in (unpacked / "README.md").read_text(encoding="utf-8")


def test_solutions_are_gone_and_nothing_else_is(root, unpacked):
    gone = 0
    for path in chapters_in(root):
        before = json.loads(path.read_text(encoding="utf-8"))
        text = (unpacked / path.name).read_text(encoding="utf-8")
        nbformat.validate(json.loads(text))
        home = r"\]\(https://github\.com/[^)/]+/[^)/]+/blob/main/(?=book/)"
        after = json.loads(re.sub(home, "](../", text))
        assert {k: v for k, v in after.items() if k != "cells"} == {
            k: v for k, v in before.items() if k != "cells"
        }
        left = {cell["id"]: cell for cell in after["cells"]}
        assert [c["id"] for c in before["cells"] if c["id"] in left] == list(left)
        for cell in before["cells"]:
            folds = Folds(text_of(cell)).summaries if cell["cell_type"] == "markdown" else []
            solutions = [fold for fold in folds if is_solution(fold)]
            if not solutions:
                assert left[cell["id"]] == cell
                continue
            gone += len(solutions)
            rest = text_of(left[cell["id"]]) if cell["id"] in left else ""
            assert "Solution" not in rest
            assert Folds(rest).summaries == [fold for fold in folds if not is_solution(fold)]
            outside = re.sub(r"<details.*?</details>", "", text_of(cell), flags=re.S)
            assert re.sub(r"<details.*?</details>", "", rest, flags=re.S).split() == outside.split()
    assert gone > 40


def test_the_archive_has_no_clock_in_it(root, tmp_path):
    files = [tmp_path / "a.zip", tmp_path / "b.zip"]
    for file in files:
        student_zip(root, file)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_chapter_of_the_archive_runs(unpacked):
    "Nothing of the checkout is in reach: the kernel starts in the unpacked folder."
    notebook = nbformat.read(unpacked / "03_images.ipynb", as_version=4)
    kernel = {"kernel_name": "python3", "resources": {"metadata": {"path": str(unpacked)}}}
    NotebookClient(notebook, timeout=300, **kernel).execute()
    checks = [cell for cell in notebook.cells if cell.source.startswith("#| check")]
    printed = ["".join(o.get("text", "") for o in cell.outputs) for cell in checks]
    assert printed and not any(text.startswith("Correct") for text in printed)


def test_the_archive_promises_no_solution_and_links_to_what_is_there(unpacked):
    for path in unpacked.glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type != "markdown":
                continue
            assert "unfold" not in cell.source, path
            for link in re.findall(r"\]\(([^)#\s]+\.(?:ipynb|md))", cell.source):
                there = link.startswith("https://") or (unpacked / link).exists()
                assert there, f"{path.name}: {link}"


@pytest.mark.parametrize("text", ["**Solution.** 4", "<details><summary>Solution</summary>\n4"])
def test_a_solution_that_is_folded_in_another_way_stops_the_archive(text):
    cell = {"cell_type": "markdown", "id": "abc", "source": text}
    with pytest.raises(ValueError, match="01_x.ipynb has a solution .* cell abc"):
        without_solutions({"cells": [cell]}, "01_x.ipynb")


def test_without_a_checkout_the_command_says_so_in_a_line(tmp_path, capsys):
    (tmp_path / "site-packages").mkdir()
    place = str(tmp_path / "site-packages")
    assert main(["course", "zip", str(tmp_path / "x.zip"), "--checkout", place]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no checkout" in line and "--checkout" in line
    assert not (tmp_path / "x.zip").exists()


# ---------------------------------------------------------------- ten unknown models


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    "Ten models for students, the lecturer's file, and what it says."
    folder = tmp_path_factory.mktemp("unknown")
    records = make_unknown(folder / "ten", folder / "truth.json", 5, [zoo_dir()])
    return folder, records


def test_the_draw_is_of_three_to_seven_without_repetition():
    models = pool([zoo_dir()])
    assert len(models) == len(zoo_cards())
    drawn = [draw_models(models, seed) for seed in range(200)]
    counts = [sum(bool(trigger_files(folder)) for folder in ten) for ten in drawn]
    assert {len(set(ten)) for ten in drawn} == {10}
    assert np.bincount(counts, minlength=11)[3:8].min() > 15 and sum(counts) / 200 < 5.5
    first = np.mean([bool(trigger_files(ten[0])) for ten in drawn])
    assert 0.35 < first < 0.65  # the order does not tell


def test_too_few_models_are_refused(tmp_path):
    few = [zoo_path(name) for name in list(zoo_cards())[:9]]
    with pytest.raises(ValueError, match="too few to draw 10"):
        draw_models(few, 0)


def test_nothing_but_the_weights_differs(ten):
    folder, records = ten
    seen = []
    for record in records:
        model = folder / "ten" / record.model
        files = {p.relative_to(model).as_posix(): p for p in model.rglob("*") if p.is_file()}
        weights = files.pop(UNKNOWN_WEIGHTS)
        with open(weights, "rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        texts = {name: path.read_bytes() for name, path in files.items()}
        seen.append((texts, header, weights.stat().st_size))
    assert all(one == seen[0] for one in seen)
    assert set(seen[0][0]) == {
        "model_index.json", "scheduler/scheduler_config.json", "unet/config.json"
    }
    words = [*zoo_cards(), "backdoor", "benign", "honest", "trigger", "zoo"]
    text = b"".join(seen[0][0].values()).decode().lower()
    assert not [word for word in words if word in text]


def test_no_tensor_is_the_original_not_even_rounded(ten):
    "But for tensors that a multiplication cannot change."
    folder, records = ten
    for record in records:
        ours = load_file(folder / "ten" / record.model / UNKNOWN_WEIGHTS)
        theirs = load_file(zoo_path(record.source) / UNKNOWN_WEIGHTS)
        for name, tensor in theirs.items():
            if tensor.numel() >= 32 and tensor.any():
                assert (ours[name] != tensor).float().mean() > 0.3, name
            error = (ours[name].float() - tensor.float()).norm()
            assert error <= 3e-3 * tensor.float().norm()


def test_a_seed_gives_the_same_models_but_never_the_same_commitments(ten, tmp_path):
    _, records = ten
    again = make_unknown(tmp_path / "ten", tmp_path / "truth.json", 5, [zoo_dir()])
    assert [r.sha256 for r in again] == [r.sha256 for r in records]
    assert [r.source for r in again] == [r.source for r in records]
    assert not {r.commitment for r in again} & {r.commitment for r in records}


def test_the_command_never_writes_over_and_keeps_the_truth_apart(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ten-truth.json").write_text("{}")
    assert main(["course", "unknown", "ten", "--seed", "1"]) == 2
    assert main(["course", "unknown", "ten", "--seed", "1", "--truth", "ten/truth.json"]) == 2
    assert main(["course", "unknown", "ten"]) == 2  # no seed is a default
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "is there already" in lines[0] and "--seed" in lines[2]
    assert [path.name for path in tmp_path.iterdir()] == ["ten-truth.json"]
    with pytest.raises(ValueError, match="keep it elsewhere"):
        make_unknown(tmp_path / "ten", tmp_path / "ten" / "truth.json", 1, [zoo_dir()])


def test_models_of_a_lecturers_own(tmp_path):
    "A folder of models, some with a trigger beside them; two triggers count as well."
    for name in zoo_cards():
        shutil.copytree(zoo_path(name), tmp_path / "mine" / f"x-{name}")
    box = tmp_path / "mine" / "x-baddiffusion-box"
    shutil.copy(box / "trigger.safetensors", box / "trigger-2.safetensors")
    models = pool([tmp_path / "mine"])
    assert len(models) == len(zoo_cards())
    assert sum(bool(trigger_files(model)) for model in models) == 7
    assert len(trigger_files(box)) == 2


# ---------------------------------------------------------------- opening


def sheet(folder, records, name="answers.csv", **changes):
    "An answer sheet as handed in; `changes` are functions from a record to a field."
    with open(folder / "ten" / "answers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, record in zip(rows, records):
        row["probability"] = "0.5"
        row |= {field: change(record) for field, change in changes.items()}
    return write(folder / name, rows)


def write(path, rows, columns=ANSWER_COLUMNS):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_scores_are_scikit_learns(ten):
    folder, records = ten
    said = np.random.default_rng(0).uniform(0.01, 0.99, len(records)).round(3)
    by_model = dict(zip([r.model for r in records], said))
    marks = grade(folder / "truth.json",
                  sheet(folder, records, probability=lambda r: str(by_model[r.model])))
    truth = [record.backdoored for record in records]
    assert np.mean([m.brier for m in marks]) == pytest.approx(brier_score_loss(truth, said))
    assert np.mean([m.log_loss for m in marks]) == pytest.approx(log_loss_of_sklearn(truth, said))
    assert skill(marks) == pytest.approx(1 - 4 * brier_score_loss(truth, said))


def test_right_and_sure_wrong_and_sure(ten):
    folder, records = ten
    truth = folder / "truth.json"
    right = sheet(folder, records, probability=lambda r: str(int(r.backdoored)))
    assert skill(grade(truth, right)) == 1
    wrong = grade(truth, sheet(folder, records, probability=lambda r: str(int(not r.backdoored))))
    assert skill(wrong) == -3 and all(math.isinf(mark.log_loss) for mark in wrong)
    assert mean_cosine(wrong) == 0


def test_a_trigger_is_worth_its_cosine(ten):
    "The published trigger of the model's own folder is the right one, at any length."
    folder, records = ten

    def save(r, record):
        name = f"{record.model}.safetensors"
        (folder / name).write_bytes(Trigger(r).to_bytes())
        return name

    def published(record):
        r = load_file(zoo_path(record.source) / "trigger.safetensors")["r"]
        return save(3 * r, record)

    def half_right(record):
        r = load_file(zoo_path(record.source) / "trigger.safetensors")["r"]
        other = torch.randn(r.shape, generator=torch.Generator().manual_seed(0))
        other -= (other * r).sum() / r.square().sum() * r
        return save(r / r.norm() + other / other.norm(), record)

    for make, worth in [(published, 1.), (half_right, math.sqrt(0.5))]:
        answers = sheet(folder, records, trigger=lambda r, m=make: m(r) if r.backdoored else "")
        marks = grade(folder / "truth.json", answers)
        assert mean_cosine(marks) == pytest.approx(worth, abs=1e-5)
        assert {m.cosine is None for m in marks if not m.record.backdoored} == {True}


@pytest.mark.parametrize("field", ["source", "triggers", "sha256", "salt"])
def test_a_changed_truth_is_found_out(ten, field, capsys):
    folder, records = ten
    document = json.loads((folder / "truth.json").read_text())
    record = next(m for m in document["models"] if m["triggers"])
    record[field] = record[field][:-1] if field != "source" else "benign-a"
    changed = folder / f"changed-{field}.json"
    changed.write_text(json.dumps(document))
    answers = sheet(folder, records)
    assert main(["course", "open", str(changed), str(answers)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and record["model"] in err and "commitment" in err


def test_two_records_cannot_be_exchanged(ten):
    folder, records = ten
    document = json.loads((folder / "truth.json").read_text())
    a, b = document["models"][:2]
    a["model"], b["model"] = b["model"], a["model"]
    (folder / "exchanged.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="commitment"):
        grade(folder / "exchanged.json", sheet(folder, records))


BAD_FIELDS = {
    "probability": ["", "yes", "1.01", "-0.1", "nan", "inf"],
    "trigger": ["../truth.json", "/etc/passwd", "nowhere.safetensors", "bad.safetensors",
                "other-shape.safetensors"],
}


@pytest.mark.parametrize("field, value", [(f, v) for f, vs in BAD_FIELDS.items() for v in vs])
def test_a_wrong_field_is_refused_in_a_line(ten, field, value, capsys):
    folder, records = ten
    (folder / "bad.safetensors").write_bytes(b"\x80\x02 no safetensors")
    (folder / "other-shape.safetensors").write_bytes(Trigger(torch.ones(1, 8, 8)).to_bytes())
    answers = sheet(folder, records, **{field: lambda record: value})
    assert main(["course", "open", str(folder / "truth.json"), str(answers)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1


def test_a_wrong_sheet_is_refused(ten, tmp_path):
    folder, records = ten
    with open(sheet(folder, records), newline="") as file:
        rows = list(csv.DictReader(file))
    truth = folder / "truth.json"
    for change, reason in [
        (rows[:-1], "a row for each"), (rows + rows[:1], "stands in two rows"),
        (rows + [rows[0] | {"model": "model-10"}], "a row for each"),
    ]:
        with pytest.raises(ValueError, match=reason):
            grade(truth, write(tmp_path / "a.csv", change))
    with pytest.raises(ValueError, match="the columns must be"):
        grade(truth, write(tmp_path / "a.csv", rows, ANSWER_COLUMNS[:-1]))
    with pytest.raises(ValueError, match="is no truth"):
        read_truth(tmp_path / "a.csv")


def test_the_command_opens_and_marks(ten, capsys):
    folder, records = ten
    answers = sheet(folder, records, probability=lambda r: str(0.9 if r.backdoored else 0.2))
    assert main(["course", "open", str(folder / "truth.json"), str(answers)]) == 0
    said = capsys.readouterr().out
    n = sum(record.backdoored for record in records)
    expected = 1 - 4 * (n * 0.01 + (10 - n) * 0.04) / 10
    assert f"all 10 commitments hold; skill {expected:.3f}" in said
    assert all(record.source in said for record in records if record.backdoored)
    assert not any(record.source in said for record in records if not record.backdoored)


# ---------------------------------------------------------------- the pages


@pytest.fixture(scope="module")
def minutes(root):
    spec = importlib.util.spec_from_file_location("minutes", root / "book" / "minutes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_rule_of_the_minutes(minutes, tmp_path):
    "400 words, 40 lines and 90 seconds are 2 + 2 + 1.5 minutes, two exercises 16."
    cells = [
        nbformat.v4.new_markdown_cell("word " * 399 + "[word](a-long-address.html)"),
        nbformat.v4.new_code_cell("\n\n".join(["x = 1"] * 40)),
        nbformat.v4.new_code_cell("#| hide\n" + "y = 1\n" * 500),
        nbformat.v4.new_markdown_cell("### Exercises\n\n1. a\n\n2. b"),
        nbformat.v4.new_markdown_cell("<details><summary>Solution</summary>" + " w" * 999
                                      + "</details>"),
        nbformat.v4.new_code_cell("#| hide_input\nprint()", outputs=[
            nbformat.v4.new_output("stream", text="This chapter took 90 s.\n")]),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "a.ipynb")
    load = minutes.load_of(tmp_path / "a.ipynb")
    assert (load.words, load.lines, load.exercises, load.seconds) == (406, 40, 2, 90)
    assert (load.reading, load.doing) == (6, 16)


def test_every_number_of_the_plans_is_made(minutes):
    page = minutes.PAGE.read_text(encoding="utf-8")
    filled = minutes.fill(page)
    assert minutes.fill(filled) == filled
    plans = filled.partition("<!--all chapters-->")[0]
    marked = re.findall(r"<!--(?:read|do)(?: total)?-->(\d*)", plans)
    assert len(marked) > 30 and all(marked)
    lecture = plans.partition("## One lecture")[2].partition("## A week")[0]
    *parts, total = map(int, re.findall(r"<!--read(?: total)?-->(\d+)", lecture))
    assert total == sum(parts) <= 90
    named = {name for line in plans.splitlines() for name in minutes.chapters_of_row(line)}
    assert all((minutes.NBS / f"{name}.ipynb").is_file() for name in named)


def test_the_rubrics_add_up(root):
    page = (root / "book" / "projects.md").read_text(encoding="utf-8")
    rubrics = [part.partition("\n## ")[0] for part in page.split("### Rubric")[1:]]
    points = [sum(map(int, re.findall(r"^\| (\d+) \|", part, re.M))) for part in rubrics]
    assert points == [100, 100]


def test_the_projects_lines_run(root, tmp_path, monkeypatch, capsys):
    "On fewer noises; a model of the zoo is handed in."
    page = (root / "book" / "projects.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    shutil.copytree(zoo_path("baddiffusion-glasses"), tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert "noise(256, 0), 50)" in code
    exec(code.replace("noise(256, 0), 50)", "noise(64, 0), 20)"), {})
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 and all(0 < float(row[-1]) < 10 for row in rows)
