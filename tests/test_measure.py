"The runner of the measurements: killed, locked out, on a Ray cluster, refused with one line."
import csv
import importlib.util
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from filelock import FileLock

from terd_nb.cli import main
from terd_nb.lab import again, measure
from terd_nb.lab.measure import (
    ABLATIONS,
    KEY,
    append_measured,
    append_row,
    bench,
    detector_for,
    judged_by,
    measure_row,
    parse_settings,
    read_results,
    read_rows,
    results_path,
    rows_to_measure,
    write_rows,
)
from terd_nb.lab.results import COMPARED
from terd_nb.lab.sets import SETS, ModelSet
from terd_nb.model_detection import NATURAL_ZERO
from terd_nb.path_fit import ROUNDS

KEYS = [(x,) for x in range(24)]
STUB = """
import sys, time
from pathlib import Path
from terd_nb.lab.measure import append_measured

def row(x):
    time.sleep(0.3)
    return {"x": x, "square": x * x, "seconds": time.perf_counter()}

if __name__ == "__main__":
    append_measured(row, [(x,) for x in range(24)], ("x",), Path(sys.argv[1]), 2, "squaring")
"""


def without_times(path):
    return sorted((int(row["x"]), int(row["square"])) for row in read_rows(path))


def square(x):
    return {"x": x, "square": x * x, "seconds": time.perf_counter()}


def wait_for_rows(path, enough, run):
    "Until a file holds enough rows; the run must still go on."
    begin = time.monotonic()
    while len(read_rows(path)) < enough:
        late = time.monotonic() - begin > 120
        assert run.poll() is None and not late, run.stderr.read().decode()[-1000:]
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_three_times_it_goes_on_and_no_row_appears_twice(tmp_path):
    path = tmp_path / "rows.csv"
    script = tmp_path / "stub.py"
    script.write_text(STUB)
    command = [sys.executable, script, path]
    for enough in (3, 8, 13):
        run = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
        wait_for_rows(path, enough, run)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        assert enough <= len(read_rows(path)) < len(KEYS)
    last = subprocess.run(command, capture_output=True, text=True)
    assert last.returncode == 0 and "squaring" in last.stderr, last.stderr[-1000:]
    undisturbed = tmp_path / "undisturbed.csv"
    append_measured(square, KEYS, ("x",), undisturbed, 1, "squaring")
    assert without_times(path) == without_times(undisturbed)
    assert not list(tmp_path.glob("*.part"))


def test_two_runs_cannot_write_one_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "results_path", lambda models: tmp_path / "zoo.csv")
    with FileLock(tmp_path / "zoo.csv.lock"):
        assert main(["bench"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "another run is writing zoo.csv" in err
    assert not (tmp_path / "zoo.csv").exists()


# ---------------------------------------------------------------- a Ray cluster

@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None,
                    reason="Ray is not installed: pip install 'terd_nb[ray]'")
def test_rows_are_measured_on_a_ray_cluster(tmp_path):
    import ray

    def where(x):
        return {"x": x, "square": x * x, "process": os.getpid()}

    path = tmp_path / "rows.csv"
    append_measured(where, KEYS[:2], ("x",), path, 1, "squaring")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        append_measured(where, KEYS, ("x",), path, 2, "squaring", "ray")
    finally:
        ray.shutdown()
    assert without_times(path) == [(x, x * x) for x, in KEYS]
    elsewhere = {int(row["process"]) for row in read_rows(path)[2:]}
    assert os.getpid() not in elsewhere and len(elsewhere) >= 1


def test_without_ray_there_is_one_clear_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(measure, "results_path", lambda models: tmp_path / "zoo.csv")
    assert main(["bench", "--backend", "ray"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert "terd_nb[ray]" in err[-1] and not any("Traceback" in line for line in err)


# ---------------------------------------------------------------- wrong use, and what is not here

@pytest.mark.parametrize("options", [
    ["--size", "64"], ["--hard", "--sizes"], ["--backend", "dask"]])
def test_wrong_use_is_one_line_and_2(options, capsys):
    assert main(["bench", *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_size_is_not_built(capsys):
    assert main(["zoo", "build", "--size", "48"]) == 2
    assert "32, 64, 128" in capsys.readouterr().err


def test_without_the_hard_set_there_is_one_clear_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ModelSet, "folder", property(lambda models: tmp_path / models.name))
    assert main(["bench", "--hard"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "make hard-set" in printed.err


def test_models_that_are_not_trained_yet_are_left_out(tmp_path, monkeypatch, capsys):
    (tmp_path / "sizes").mkdir()
    monkeypatch.setattr(ModelSet, "folder", property(lambda models: tmp_path / models.name))
    bench("sizes", tmp_path / "rows.csv", jobs=1, size=64)
    sized = sum(recipe.size == 64 for recipe in SETS["sizes"].recipes.values())
    assert f"{sized} models are not trained here" in capsys.readouterr().err
    assert read_rows(tmp_path / "rows.csv") == []


# ---------------------------------------------------------------- rows, and how they are measured

def test_every_size_is_to_be_measured_with_every_method():
    keys = rows_to_measure("sizes")
    assert len(set(keys)) == len(keys)
    for name, recipe in SETS["sizes"].recipes.items():
        methods = [method for model, method, *_ in keys if model == name]
        tried_on = recipe.attack and recipe.split == "calibration"   # changes of the search
        assert set(methods) == ({"fast"} if tried_on else set(COMPARED))
        assert methods.count("fast") == (3 if recipe.size == 32 else 1)


def test_the_search_is_varied_on_development_models_alone():
    recipes = {name: recipe for models in SETS.values() for name, recipe in models.recipes.items()}
    keys = [key for models in SETS for key in rows_to_measure(models)]
    assert len(set(keys)) == len(keys)
    varied = [key for key in keys if key[1] in NATURAL_ZERO and key[2]]
    assert varied and not [key for key in varied if recipes[key[0]].split == "test"]
    assert {settings for _, _, settings, _ in varied} == {*ABLATIONS}


def test_every_model_of_every_set_is_to_be_searched():
    for name, models in SETS.items():
        searched = {model for model, *rest in rows_to_measure(name, 1) if rest == ["fast", "", 0]}
        assert searched == {*models.recipes}


@pytest.mark.parametrize("text, expected", [
    ("looks=shift+against starts=4", {"looks": ("shift", "against"), "starts": 4}),
    ("rounds=3:15:8+1:60:12", {"rounds": ROUNDS}),
    ("controls=ray", {"controls": ("ray",)}), ("again=", {"again": ()}),
    ("again=0.5+2", {"again": (0.5, 2.0)}), ("enough=0.5", {"enough": 0.5})])
def test_the_settings_of_a_row_are_read_as_the_search_takes_them(text, expected):
    assert parse_settings(text) == expected


def test_measured_rows_are_not_measured_again(monkeypatch, tmp_path):
    "Two rows of three are in the file; the third is measured, and the others stay as they are."
    keys = [("benign-a", "published", "iterations=1+1", seed) for seed in range(3)]
    monkeypatch.setattr(measure, "rows_to_measure", lambda models, seeds: keys)
    monkeypatch.setattr(measure, "calibrate", lambda: None)
    path = tmp_path / "rows.csv"
    with open(results_path("zoo"), encoding="utf-8") as file:
        columns = csv.DictReader(file).fieldnames
    for key in keys[:2]:
        append_row(path, dict.fromkeys(columns, "kept") | dict(zip(KEY, key)))
    bench("zoo", path, jobs=1)
    table = pd.read_csv(path, keep_default_na=False)
    assert table["seed"].tolist() == [0, 1, 2]
    assert (table["version"] == "kept").tolist() == [True, True, False]


def test_an_honest_model_is_searched_once(tmp_path, monkeypatch):
    "The second time its row comes from the cache; not if code, seed or weights are others."
    calls = []

    def search(denoiser, method, settings, seed):
        calls.append(seed)
        return None, {"S": -0.5, "seconds": 1.0}

    monkeypatch.setenv("TERD_DATA", str(tmp_path))
    monkeypatch.setattr(measure, "reverse", search)
    first = measure_row("benign-a", "fast", "", 0)
    assert measure_row("benign-a", "fast", "", 0) == first
    assert first["S"] == -0.5 and len(calls) == 1
    measure_row("benign-a", "fast", "", 1)
    measure_row("benign-b", "fast", "", 0)
    assert len(calls) == 3
    monkeypatch.setattr(measure, "SEARCH_VERSION", "another")
    measure_row("benign-a", "fast", "", 0)
    assert len(calls) == 4 and len(list((tmp_path / "reversals").iterdir())) == 4


def test_a_search_that_diverges_has_a_row(monkeypatch):
    def diverge(*args, **settings):
        raise FloatingPointError("the published search diverged")

    monkeypatch.setattr(measure, "reverse_trigger", diverge)
    row = measure_row("baddiffusion-box", "published", "iterations=1+1", 0)
    assert row["error"] == "the published search diverged" and row["M_r"] == "" and row["l2"] == ""


# ---------------------------------------------------------------- what judges a row

def test_no_detector_of_another_kind_judges_a_rival(tmp_path):
    "Of three honest models searched like it there are none: no verdict, no score, no p-value."
    assert detector_for("published", "iterations=7+7") is None
    assert detector_for("fast", "enough=0").method == "fast"
    with open(results_path("zoo"), encoding="utf-8") as file:
        first = next(row for row in csv.DictReader(file) if row["method"] == "published")
    path = tmp_path / "rows.csv"
    append_row(path, first)
    append_row(path, first | {"settings": "iterations=7+7"})
    table = read_results(path=path).set_index("settings")
    assert table["verdict"]["iterations=7+7"] == "" and table["verdict"]["iterations=150+50"] != ""
    assert table[["score", "p"]].loc["iterations=7+7"].isna().all()


def test_without_a_detector_rows_are_not_judged():
    part = pd.DataFrame({"model": ["a", "b"]}, index=[3, 5])
    judged = judged_by(None, part)
    assert judged["verdict"].tolist() == ["", ""] and judged["score"].isna().all()
    assert judged.index.tolist() == [3, 5]


def test_a_tenth_again_is_held_against_what_was_recorded(tmp_path, monkeypatch, capsys):
    "What differs in its verdict is named, and the status is 1; what is there is not measured anew."
    monkeypatch.setattr(again, "tenth", lambda: [("trojdiff-d2i", "fast", "rounds=1:0:8", 0)])
    path = tmp_path / "again.csv"
    assert main(["bench", "--again", str(path), "--jobs", "1"]) == 0
    assert "the same verdict: 1 of 1" in capsys.readouterr().out
    (row,) = read_rows(path)
    write_rows(path, [row | {"S": "-1"}])
    assert main(["bench", "--again", str(path), "--jobs", "1"]) == 1
    said = capsys.readouterr().out
    assert "the same verdict: 0 of 1" in said
    assert "trojdiff-d2i, fast rounds=1:0:8, seed 0: clean, recorded inconclusive" in said
