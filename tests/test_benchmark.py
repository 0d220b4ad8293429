"The benchmark's runner and its page: killed, locked out, on a Ray cluster, with rows missing."
import csv
import importlib.util
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock

from terd_nb.lab import results as benchmark
from terd_nb.cli import main
from terd_nb.lab import measure as bench_module
from terd_nb.lab.measure import append_measured, measure, read_rows, rows_to_measure
from terd_nb.lab.results import COMPARED, FIGURES, TABLES, read_benchmark, write_report
from terd_nb.lab.sizes import DEVELOPMENT, SIZED

KEYS = [(x,) for x in range(24)]
STUB = """
import os, sys, time
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


@pytest.mark.slow
def test_killed_three_times_it_goes_on_and_no_row_appears_twice(tmp_path):
    path, script = tmp_path / "rows.csv", tmp_path / "stub.py"
    script.write_text(STUB)
    for enough in (3, 8, 13):
        run = subprocess.Popen([sys.executable, script, path], stderr=subprocess.PIPE, start_new_session=True)
        before = time.monotonic()
        while len(read_rows(path)) < enough:
            assert run.poll() is None and time.monotonic() - before < 120, run.stderr.read().decode()[-1000:]
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        assert enough <= len(read_rows(path)) < len(KEYS)
    last = subprocess.run([sys.executable, script, path], capture_output=True, text=True)
    assert last.returncode == 0 and "squaring" in last.stderr, last.stderr[-1000:]
    undisturbed = tmp_path / "undisturbed.csv"
    append_measured(square, KEYS, ("x",), undisturbed, 1, "squaring")
    assert without_times(path) == without_times(undisturbed)
    assert not list(tmp_path.glob("*.part"))


def test_two_runs_cannot_write_one_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_module, "results_path", lambda models: tmp_path / "zoo.csv")
    with FileLock(tmp_path / "zoo.csv.lock"):
        assert main(["bench"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "another run is writing zoo.csv" in err and not (tmp_path / "zoo.csv").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'terd_nb[ray]'")
def test_rows_are_measured_on_a_ray_cluster(tmp_path):
    import ray

    path = tmp_path / "rows.csv"
    where = lambda x: {"x": x, "square": x * x, "process": os.getpid()}
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
    monkeypatch.setattr(bench_module, "results_path", lambda models: tmp_path / "zoo.csv")
    assert main(["bench", "--backend", "ray"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert "terd_nb[ray]" in err[-1] and not any("Traceback" in line for line in err)


@pytest.mark.parametrize("options", [["--size", "64"], ["--hard", "--sizes"], ["--backend", "dask"]])
def test_wrong_use_is_one_line_and_2(options, capsys):
    assert main(["bench", *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_size_is_not_built(capsys):
    assert main(["zoo", "build", "--size", "48"]) == 2
    assert "32, 64, 128" in capsys.readouterr().err


def test_models_that_are_not_trained_yet_are_left_out(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "sizes"
    folder.mkdir()
    monkeypatch.setattr(bench_module, "sizes_dir", lambda: folder)
    bench_module.bench("sizes", tmp_path / "rows.csv", jobs=1, size=64)
    sized = sum(recipe.size == 64 for recipe in SIZED.values())
    assert f"{sized} models are not trained here" in capsys.readouterr().err
    assert read_rows(tmp_path / "rows.csv") == []


def test_an_honest_model_is_searched_once(tmp_path, monkeypatch):
    "The second time its row comes from the cache; not if the code, the seed or the weights are others."
    calls = []

    def search(denoiser, method, settings, seed):
        calls.append(seed)
        return None, {"shift": -0.5, "seconds": 1.0}
    monkeypatch.setenv("TERD_DATA", str(tmp_path))
    monkeypatch.setattr(bench_module, "reverse", search)
    first = measure("benign-a", "fast", "", 0)
    assert measure("benign-a", "fast", "", 0) == first and first["shift"] == -0.5 and len(calls) == 1
    measure("benign-a", "fast", "", 1)
    measure("benign-b", "fast", "", 0)
    assert len(calls) == 3
    monkeypatch.setattr(bench_module, "SEARCH_VERSION", "another")
    measure("benign-a", "fast", "", 0)
    assert len(calls) == 4 and len(list((tmp_path / "reversals").iterdir())) == 4


def test_a_search_that_diverges_has_a_row(monkeypatch):
    def diverge(*args, **settings):
        raise FloatingPointError("the published search diverged")
    monkeypatch.setattr(bench_module, "reverse_trigger", diverge)
    row = measure("baddiffusion-box", "published", "iterations=1+1", 0)
    assert row["error"] == "the published search diverged" and row["M_r"] == "" and row["l2"] == ""


def test_the_benchmark_is_what_the_sets_files_say(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_module, "benchmark_path", lambda: tmp_path / "benchmark.csv")
    bench_module.write_benchmark()
    pd.testing.assert_frame_equal(read_benchmark(tmp_path / "benchmark.csv"), read_benchmark())


def test_the_benchmark_has_the_promised_columns_and_no_row_twice():
    with open(benchmark.benchmark_path(), encoding="utf-8") as file:
        columns = next(csv.reader(file))
    assert columns[:19] == ["model", "resolution", "dataset", "attack", "method", "verdict", "score", "l2", "cosine",
                            "input_tpr", "input_tnr", "sample_evals", "seconds", "peak_mb", "seed", "machine",
                            "version", "commit", "date"]
    table = read_benchmark()
    assert not table.duplicated(["model", "method", "settings", "seed"]).any()
    assert set(table["method"]) <= set(COMPARED)


def test_every_size_is_to_be_measured_with_every_method():
    keys = rows_to_measure("sizes")
    assert len(set(keys)) == len(keys)
    for name, recipe in SIZED.items():
        assert {method for n, method, *_ in keys if n == name} == ({"fast"} if recipe in DEVELOPMENT else set(COMPARED))
        assert sum(n == name and method == "fast" for n, method, *_ in keys) == (3 if recipe.size == 32 else 1)


# ---------------------------------------------------------------- the page

def enlarged(table):
    "Rows for every larger model, made up from those of 16 pixels."
    rng, rows = np.random.default_rng(0), [table]
    for recipe in SIZED.values():
        label = "backdoored" if recipe.attack else "benign"
        for method in COMPARED:
            row = table[(table["method"] == method) & (table["label"] == label)].iloc[[rng.integers(3)]]
            rows.append(row.assign(model=recipe.name, resolution=recipe.size, split=recipe.split, works=True, seed=0,
                                   attack=recipe.attack or "", seconds=row["seconds"] * (recipe.size / 16)**2))
    return pd.concat(rows, ignore_index=True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("part", ["all", "one method", "one size", "honest", "one row"])
def test_the_report_is_made_from_whatever_rows_there_are(tmp_path, part):
    table = enlarged(read_benchmark())
    table = {"all": table, "one method": table[table["method"] == "fast"], "one size": table[table["resolution"] == 64],
             "honest": table[table["label"] == "benign"], "one row": table.tail(1)}[part]
    page = write_report(table, tmp_path / "report").read_text(encoding="utf-8")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "index.html", *(f"{name}.csv" for name in TABLES), *(f"{name}.png" for name in FIGURES)}
    assert all(f'src="{name}.png"' in page for name in FIGURES)


def test_the_slope_of_the_cost_is_found():
    slopes = benchmark.growth(enlarged(read_benchmark()))
    assert all(abs(float(slopes.loc[method, "seconds"].split()[0]) - 1) < 0.5 for method in ("published", "elijah"))


def test_terd_bench_report_takes_seconds(tmp_path, capsys):
    before = time.perf_counter()
    assert main(["bench", "--report", "--out", str(tmp_path / "report")]) == 0
    assert time.perf_counter() - before < 30 and "index.html" in capsys.readouterr().out


def test_without_rows_there_is_one_clear_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "benchmark_path", lambda: tmp_path / "none.csv")
    assert main(["bench", "--report", "--out", str(tmp_path / "report")]) == 2
    assert "terd bench" in capsys.readouterr().err and not (tmp_path / "report").exists()
