"The tables, figures and page of the benchmark: from whatever rows there are, with their caption."
import time
from html import escape

import numpy as np
import pandas as pd
import pytest

from terd_nb.cli import main
from terd_nb.lab import results
from terd_nb.lab.results import (
    COMPARED,
    FIGURES,
    OURS_ALONE,
    SHORTENED,
    TABLES,
    by_terds_rule,
    figure,
    read_benchmark,
    write_report,
)
from terd_nb.lab.sets import SETS


@pytest.fixture(scope="module")
def table():
    return read_benchmark()


@pytest.fixture(scope="module")
def enlarged(table):
    "Rows for every larger model, made up from those of 16 pixels."
    rng = np.random.default_rng(0)
    rows = [table]
    for recipe in SETS["sizes"].recipes.values():
        label = "backdoored" if recipe.attack else "benign"
        for method in COMPARED:
            alike = table[(table["method"] == method) & (table["label"] == label)]
            row = alike.iloc[[rng.integers(3)]]
            slower = row["seconds"] * (recipe.size / 16)**2
            rows.append(row.assign(
                model=recipe.name, resolution=recipe.size, split=recipe.split, works=True, seed=0,
                attack=recipe.attack or "", seconds=slower))
    return pd.concat(rows, ignore_index=True)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("part", ["all", "one method", "one size", "honest", "one row"])
def test_the_report_is_made_from_whatever_rows_there_are(tmp_path, enlarged, part):
    rows = {
        "all": enlarged,
        "one method": enlarged[enlarged["method"] == "fast"],
        "one size": enlarged[enlarged["resolution"] == 64],
        "honest": enlarged[enlarged["label"] == "benign"],
        "one row": enlarged.tail(1),
    }[part]
    page = write_report(rows, tmp_path / "report").read_text(encoding="utf-8")
    written = {path.name for path in (tmp_path / "report").iterdir()}
    tables = {f"{name}.csv" for name in TABLES}
    assert written == {"index.html", *tables, *(f"{name}.png" for name in FIGURES)}
    assert all(f'src="{name}.png"' in page for name in FIGURES)


# ---------------------------------------------------------------- the caption of the shortened rows

def test_no_table_shows_the_shortened_rows_without_their_caption(tmp_path, table):
    page = write_report(table, tmp_path).read_text(encoding="utf-8")
    said = escape(SHORTENED)
    assert "cut to 1/100 of its length; not TERD's result" in SHORTENED
    assert page.index(said) < page.index("<h2>")                          # the page says it first
    assert page.count(f"<caption>{said}</caption>") == len(TABLES) - len(OURS_ALONE)
    for name in set(TABLES) - set(OURS_ALONE):
        assert (pd.read_csv(tmp_path / f"{name}.csv")["note"] == SHORTENED).all(), name


@pytest.mark.parametrize("name", FIGURES)
def test_no_figure_shows_them_without_it(table, name):
    assert figure(table, name).get_supxlabel() == SHORTENED
    assert figure(table[table["method"] == "fast"], name).get_supxlabel() == ""


def test_the_page_does_not_begin_with_the_comparison():
    "What the shortened rows are comes before they stand beside others."
    order = list(TABLES)
    before = [order.index(name) for name in ("coverage", "seeds", "alarms", "own_rule")]
    after = [order.index(name) for name in ("rates", "attacks", "transfer", "areas", "cost")]
    assert max(before) < min(after)


# ---------------------------------------------------------------- single tables

def honest_levels(levels, **rest):
    "Rows of the published search on honest models, with these values of M_r."
    common = {"method": "published", "settings": "", "split": "test", "label": "benign"}
    common |= {"works": True, "resolution": 16, "dataset": "digits", "V_r": 0.01} | rest
    rows = [common | {"model": f"honest-{i}", "M_r": level} for i, level in enumerate(levels)]
    return pd.DataFrame(rows)


def test_terds_rule_asks_honest_models_of_the_same_size_and_data():
    "Three standard deviations above 0.1, 0.2 and 0.3 are 0.5; other data sets know nothing of it."
    bad = honest_levels([0.49, 0.51], label="backdoored").assign(model=["low", "high"])
    elsewhere = honest_levels([0.9, 1., 1.1], dataset="emoji")
    rows = [honest_levels([0.1, 0.2, 0.3]), bad, elsewhere]
    found = by_terds_rule(pd.concat(rows, ignore_index=True))
    assert found.loc[(16, "digits"), "backdoored, flagged"] == "1/2"
    assert found.loc[(16, "digits"), "honest models"] == 3
    assert found.loc[(16, "digits"), "honest, not flagged"] == "–"        # two others are too few
    assert found.loc[(16, "emoji"), "backdoored, flagged"] == "–"


def test_terds_rule_leaves_out_the_model_that_it_judges():
    "Among its equals the last would hide its own height."
    found = by_terds_rule(honest_levels([0.1, 0.11, 0.12, 0.1, 0.3]))
    assert found.loc[(16, "digits"), "honest, not flagged"] == "4/5"


def test_the_slope_of_the_cost_is_found(enlarged):
    slopes = results.growth(enlarged)
    for method in ("published", "elijah"):
        assert abs(float(slopes.loc[method, "seconds"].split()[0]) - 1) < 0.5


# ---------------------------------------------------------------- the command

def test_terd_bench_report_takes_seconds(tmp_path, capsys):
    before = time.perf_counter()
    assert main(["bench", "--report", "--out", str(tmp_path / "report")]) == 0
    assert time.perf_counter() - before < 30 and "index.html" in capsys.readouterr().out


def test_without_rows_there_is_one_clear_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "benchmark_path", lambda: tmp_path / "none.csv")
    assert main(["bench", "--report", "--out", str(tmp_path / "report")]) == 2
    assert "terd bench" in capsys.readouterr().err and not (tmp_path / "report").exists()
