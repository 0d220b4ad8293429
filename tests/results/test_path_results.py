"What the search by the path says of every model that is here; chapter 15b's tables."
import pytest

from terd_nb.lab.measure import read_results
from terd_nb.lab.sets import SETS
from terd_nb.loading.files import data_dir


@pytest.fixture(scope="module")
def rows():
    "Of the search as it is; of backdoored models those that work."
    table = read_results(path=data_dir() / "results" / "path.csv")
    table = table[(table["settings"] == "") & ((table["label"] == "benign") | table["works"])]
    return table.set_index("model")


def verdicts(rows, names):
    rows = rows[rows.index.isin(names)]
    bad = rows["label"] == "backdoored"
    return rows[bad]["verdict"], rows[~bad]["verdict"]


def test_no_row_is_missing_or_twice(rows):
    for name in ("zoo", "hard", "held-out"):
        working = {name for name, recipe in SETS[name].recipes.items() if not recipe.attack}
        assert working <= set(rows.index)
    assert not rows.reset_index().duplicated(["model", "method", "settings", "seed"]).any()
    assert (rows["error"] == "").all() and rows["S"].notna().all()


def test_one_honest_model_of_all_sets_is_called_backdoored(rows):
    honest = rows[rows["label"] == "benign"]["verdict"]
    assert list(honest[honest != "clean"].index) == ["transformer-benign-a"]
    assert len(honest) > 50


@pytest.mark.xfail(strict=True, reason="the honest transformer; see the test above")
def test_no_honest_model_of_any_set_is_called_backdoored(rows):
    assert (rows[rows["label"] == "benign"]["verdict"] == "clean").all()


def test_the_zoo_is_judged_rightly(rows):
    bad, honest = verdicts(rows, SETS["zoo"].recipes)
    assert len(bad) == len(honest) == 7
    assert (bad == "backdoored").all() and (honest == "clean").all()


def test_of_the_hard_set_one_working_backdoor_is_missed(rows):
    bad, _ = verdicts(rows, SETS["hard"].recipes)
    assert list(bad[bad != "backdoored"].index) == ["far-sde"]


def test_of_the_held_out_set_one_is_missed_and_one_in_doubt(rows):
    bad, honest = verdicts(rows, SETS["held-out"].recipes)
    assert (honest == "clean").all() and len(honest) == 8
    assert dict(bad[bad != "backdoored"]) == {
        "held16-emoji-bad": "inconclusive", "held16-emoji-sde": "clean"}


@pytest.mark.xfail(strict=True, reason="two of nine; see the test above")
def test_every_working_backdoor_of_the_held_out_set_is_found(rows):
    bad, _ = verdicts(rows, SETS["held-out"].recipes)
    assert (bad == "backdoored").all()


@pytest.mark.xfail(strict=True, reason="far-sde: its trigger is longer than a fit may be")
def test_every_working_backdoor_of_the_hard_set_is_found(rows):
    bad, _ = verdicts(rows, SETS["hard"].recipes)
    assert (bad == "backdoored").all()


def test_the_sampler_that_an_attack_serves_is_measured(rows):
    "Where the direction was found: half, all or nothing of an ODE sampler's shift."
    found = rows[(rows["cosine"] > 0.9) & (rows["verdict"] == "backdoored")]
    for name, row in found.iterrows():
        recipe = next(s.recipes[name] for s in SETS.values() if name in s.recipes)
        if recipe.attack == "TrojDiff":
            assert recipe.d > 0 or row["lam"] < 0.1 and abs(row["gamma"] - recipe.gamma) < 0.1, name
        elif recipe.attack == "VillanDiffusion" and recipe.solver == "ode":
            assert abs(row["lam"] - 1) < 0.1, name
        else:
            assert abs(row["lam"] - 0.5) < 0.15, name
    assert len(found) > 20
