"A quick look at the committed tables: complete, no row twice, and the headline numbers."
import csv
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from terd_nb.lab import measure
from terd_nb.lab.measure import (
    EVASIONS,
    FIRST_STAGE,
    KEY,
    ONE_GAMMA,
    TIMED,
    WHOLE_RUNS,
    folder_of,
    read_results,
    results_path,
    rows_to_measure,
)
from terd_nb.lab.model_sets import is_made, sampler_rows, weights_sha256
from terd_nb.lab.results import by_terds_rule, once, read_benchmark
from terd_nb.loading.files import data_dir
from terd_nb.model_detection import NATURAL_ZERO


def keys_in(models):
    "The keys of the rows in a set's file, as they stand there."
    with open(results_path(models), encoding="utf-8") as file:
        return [tuple(row[key] for key in KEY) for row in csv.DictReader(file)]


def wanted(models, seeds):
    "The keys of a set that can be measured here: our search needs the weights."
    for name, method, settings, seed in rows_to_measure(models, seeds):
        if method not in NATURAL_ZERO or is_made(folder_of(name)):
            yield tuple(map(str, (name, method, settings, seed)))


@pytest.mark.parametrize(
    ("models", "seeds"), [("zoo", 3), ("hard", 3), ("sizes", 1), ("families", 1)]
)
def test_every_row_is_there_and_none_twice(models, seeds):
    rows = keys_in(models)
    assert len(rows) == len(set(rows))
    assert not set(wanted(models, seeds)) - set(rows)


def read(name):
    return pd.read_csv(data_dir() / "results" / name)


def test_the_smaller_tables_are_complete_and_hold_no_row_twice():
    "Ways to compute, samplers against attacks, and the price of evasion."
    speed = read("speed.csv")
    assert sorted(zip(speed["model"], speed["how"])) == sorted(TIMED)
    samplers = read("samplers.csv")
    assert sorted(zip(samplers["model"], samplers["sampler"])) == sorted(sampler_rows())
    evasion = read("evasion.csv")
    assert sorted(evasion["how"]) == sorted(EVASIONS) and evasion["S"].notna().all()


def test_our_first_stage_is_that_of_the_released_code():
    row = read("released.csv").iloc[0]
    assert len(row["released_commit"]) == 40
    assert row["apart"] < 0.01 < row["moved"] and row["steps"] >= 200


@pytest.fixture(scope="module")
def benchmark():
    return read_benchmark()


def test_the_benchmark_is_what_the_sets_files_say(tmp_path, monkeypatch, benchmark):
    monkeypatch.setattr(measure, "benchmark_path", lambda: tmp_path / "benchmark.csv")
    measure.write_benchmark()
    pd.testing.assert_frame_equal(read_benchmark(tmp_path / "benchmark.csv"), benchmark)
    assert not benchmark.duplicated(list(KEY)).any()


def test_a_row_says_what_gives_it_and_of_which_weights(benchmark):
    targets = set(re.findall(r"^(bench-[a-z-]+):", Path("Makefile").read_text(), re.M))
    assert {command.removeprefix("make ") for command in benchmark["command"]} <= targets
    assert (benchmark["sha256"].str.len() == 64).all()
    here = {name: weights_sha256(folder_of(name)) for name in set(benchmark["model"])
            if is_made(folder_of(name))}  # fmt: skip
    rows = benchmark[benchmark["model"].isin(here)]
    assert len(here) >= 60 and (rows["sha256"] == rows["model"].map(here)).all()


# By size, on the test halves: (backdoored, of these flagged), (honest, of these not flagged).
OUR_RATES = {16: ((17, 15), (23, 23)), 32: ((3, 3), (6, 6)), 64: ((0, 0), (2, 2))}


def test_the_rates_of_our_search(benchmark):
    rows = once(benchmark)
    rows = rows[rows["method"] == "fast"]
    found = {}
    for size, part in rows.groupby("resolution"):
        bad, good = part[part["truth"]]["flagged"], ~part[~part["truth"]]["flagged"]
        found[size] = (len(bad), int(bad.sum())), (len(good), int(good.sum()))
    assert found == OUR_RATES


def test_the_published_rows_by_the_papers_own_rule(benchmark):
    flagged = by_terds_rule(benchmark)["backdoored, flagged"]
    assert flagged[(32, "emoji")] == "4/4" and flagged[(128, "fluent-emoji")] == "4/4"
    assert flagged[(64, "emoji")] == "10/10"


def test_a_row_without_honest_rows_of_its_kind_has_no_verdict(benchmark):
    alone = benchmark[benchmark["verdict"] == ""]
    assert sorted(zip(alone["model"], alone["settings"])) == sorted(WHOLE_RUNS)
    assert alone[["score", "p"]].isna().all(axis=None)


def test_the_optimised_trigger_is_recovered_and_tells_inputs(benchmark):
    "Held against the trigger that was planted."
    rows = benchmark[(benchmark["model"] == "optimised-ode") & (benchmark["method"] == "fast")]
    assert len(rows) and (rows["verdict"] == "backdoored").all()
    assert (rows["cosine"] > 0.9).all() and (rows["input_tpr"] > 0.999).all()
    length = rows["l2"] / rows["relative"]
    assert np.allclose(length, 9.593, atol=1e-3)     # that of the stored trigger


def test_told_trojdiff_the_published_search_finds_in_d2d_and_with_one_gamma_it_does_not():
    "3,000 steps of the first stage at batch 4, told as the released code is."
    rows = read_results("zoo").set_index(["model", "method", "settings"])
    told = rows.loc[("trojdiff-in-d2d", "published", FIRST_STAGE)]
    assert told["cosine"] > 0.98 and told["l2"] < 2.3 and abs(told["gamma"] - 0.6) < 0.01
    shared = rows.loc[("trojdiff-in-d2d", "published", ONE_GAMMA)]
    assert abs(shared["cosine"]) < 0.3 and shared["gamma"] > 0.99 and shared["input_tpr"] == 0
