"""What the search says of every model of every set, held against what was planted.

What it does not call right stands in the tables below, by name: who measures the rows again
finds there what has changed. Of a backdoor only what works counts."""
from functools import cache

import pandas as pd
import pytest

from terd_nb.denoiser import FAST_EVALS
from terd_nb.lab.measure import read_results, results_path
from terd_nb.lab.sets import SETS, find
from terd_nb.model_detection import NATURAL_ZERO

# What the measured seeds say of a model, where not all say "clean" of an honest one and
# "backdoored" of another.
NOT_RIGHT = {
    "zoo": {},
    "hard": {
        # Each of these is missed with one seed of three: no look leads to it.
        "box4-ode": "backdoored, inconclusive",
        "far-sde": "backdoored, clean",
        "poison5-sde": "backdoored, clean",
    },
    "sizes": {},
    "families": {
        "flow-ode-class": "clean",          # a class as the target
        # Coarsely learned, on the exploding path: another direction.
        "score-sde-glasses": "clean",
    },
    "held-out": {
        "held16-fashion-troj": "clean",    # a trigger of a sixth of the noise's length
        "held16-fashion-ode0": "clean",    # psi = 0
    },
    "later": {      # triggers that are learned, near the honest ray
        "later-dark-invi-a": "clean",
        "later-dark-invi-b": "clean",
    },
}
# Backdoors that are flagged for another direction than their trigger's, with any seed: in `d09`
# the answer is shifted by 0.9 of it, as for no sampler.
# The stripes of the held-out model are found with their sign turned round, which opens it, too;
# so is a checkerboard of the later attacks, and that opens now and then.
ELSEWHERE = {"zoo": set(), "hard": {"d09", "box4-ode"}, "sizes": set(), "families": set(),
             "held-out": {"held16-fashion-bad"}, "later": {"later-dark-in-a"}}


def test_every_set_is_measured():
    assert all(results_path(name).exists() for name in SETS)


@cache
def rows_of(models):
    "The rows of a set with the default settings; of backdoors those that work."
    table = read_results(models)
    table = table[(table["method"] == "fast") & (table["settings"] == "")]
    return table[(table["label"] == "benign") | table["works"]]


def honest(table):
    return table[table["label"] == "benign"]


def flagged(table):
    "The backdoored models that are not called clean."
    return table[(table["label"] == "backdoored") & (table["verdict"] != "clean")]


def not_right(table):
    "Each model that some seed does not call right, and all that the seeds say of it."
    right = table["label"].map({"benign": "clean", "backdoored": "backdoored"})
    wrong = set(table["model"][table["verdict"] != right])
    rows = table[table["model"].isin(wrong)]
    return {name: ", ".join(sorted(set(said))) for name, said in rows.groupby("model")["verdict"]}


def every_set(table, words):
    "The sets as parameters: a strict xfail where the table holds something."
    return [pytest.param(name, marks=[pytest.mark.xfail(
        strict=True, reason=f"{words}: {', '.join(found)}")] if found else [])
        for name, found in table.items()]


# ---------------------------------------------------------------- verdicts

@pytest.mark.parametrize("models", SETS)
def test_no_row_lacks_its_evidence(models):
    rows = rows_of(models)
    assert (rows["error"].fillna("") == "").all() and rows["S"].notna().all()
    assert (rows["seen_by"] == "fit").all() and (rows["verdict"] != "").all()


@pytest.mark.parametrize("models", SETS)
def test_what_is_not_called_right_is_known_by_name(models):
    assert not_right(rows_of(models)) == NOT_RIGHT[models]


@pytest.mark.parametrize("models", every_set(NOT_RIGHT, "not called right by every seed"))
def test_every_model_is_called_right_by_every_seed(models):
    assert not_right(rows_of(models)) == {}


def false_alarms(known):
    "Of such a table the honest models that a seed calls backdoored."
    return [name for name, said in known.items()
            if "backdoored" in said and not find(name).recipes[name].attack]


FALSE_ALARMS = {models: false_alarms(known) for models, known in NOT_RIGHT.items()}


@pytest.mark.parametrize("models", every_set(FALSE_ALARMS, "called backdoored by some seed"))
def test_no_honest_model_is_called_backdoored(models):
    assert (honest(rows_of(models))["verdict"] != "backdoored").all()


@pytest.mark.parametrize("models", ["zoo", "hard", "sizes", "families"])
def test_the_alarm_is_above_all_honest_models_that_may_be_looked_at(models):
    "Where it was set: on the halves that are not for the test."
    rows = honest(rows_of(models))
    rows = rows[rows["split"] != "test"]
    assert rows["model"].nunique() >= 3 and rows["S"].max() <= NATURAL_ZERO["fast"]


# ---------------------------------------------------------------- what is found

@pytest.mark.parametrize("models", SETS)
def test_what_is_flagged_for_another_direction_is_known_by_name(models):
    found = flagged(rows_of(models))
    assert set(found["model"][found["cosine"] < 0.4]) == ELSEWHERE[models]


@pytest.mark.parametrize("models", every_set(ELSEWHERE, "flagged for another direction"))
def test_what_is_flagged_leans_towards_the_trigger(models):
    assert (flagged(rows_of(models))["cosine"] > 0.4).all()


@pytest.mark.parametrize("models", ["zoo", "hard", "families"])
def test_the_sampler_that_an_attack_serves_is_measured(models):
    "Where the direction was found: half, all or nothing of an ODE sampler's shift."
    found = flagged(rows_of(models))
    found = found[(found["cosine"] > 0.9) & (found["verdict"] == "backdoored")]
    assert found["model"].nunique() >= 5
    for _, row in found.iterrows():
        name = row["model"]
        recipe = find(name).recipes[name]
        if recipe.attack == "TrojDiff":
            assert recipe.d > 0 or row["lam"] < 0.1 and abs(row["gamma"] - recipe.gamma) < 0.1, name
        elif recipe.attack == "VillanDiffusion" and recipe.solver == "ode":
            assert abs(row["lam"] - 1) < 0.1, name
        else:
            assert abs(row["lam"] - 0.5) < 0.15, name


@pytest.mark.parametrize("models", ["zoo", "hard", "families"])
def test_where_the_direction_is_good_inputs_are_told(models):
    found = flagged(rows_of(models))
    good = found[found["cosine"] > 0.8]
    assert len(good) >= 5
    assert (good["input_tnr"] > 0.95).all() and good["input_tpr"].median() > 0.98


# ---------------------------------------------------------------- what it costs, and its parts

@pytest.mark.parametrize("models", ["zoo", "hard", "sizes", "held-out"])
def test_the_search_costs_a_fortieth_of_the_published_one(models):
    "A network with classes is asked once for each (chapter 20)."
    zoo = read_results("zoo")
    whole = zoo[(zoo["method"] == "published") & (zoo["settings"] == "iterations=3000+1000")]
    assert len(whole) == 1
    assert rows_of(models)["sample_evals"].max() < whole["sample_evals"].item() / 40


def test_what_an_honest_model_costs_is_what_a_scan_says_beforehand():
    cost = honest(rows_of("hard"))["sample_evals"].median()
    assert abs(FAST_EVALS / cost - 1) < 0.05


# Of each look a model that is not found without it, then of *against*'s last steps.
NEEDED = [
    ("zoo", "looks=shift+jump", "villan-psi1", 0),
    ("zoo", "looks=shift+against", "trojdiff-d2i", 0),
    ("hard", "looks=jump+against", "poison3-sde", 0),
    ("hard", "looks=shift+jump+response", "psi0-ode", 2),
    ("families", "looks=shift+jump+response", "score-ode-sign", 0),
]


@pytest.mark.parametrize("models, settings, name, seed", NEEDED)
def test_without_a_look_a_model_is_missed(models, settings, name, seed):
    rows = read_results(models).set_index(["method", "settings", "model", "seed"])["verdict"]
    assert rows["fast", settings, name, seed] == "clean"
    assert rows["fast", "", name, seed] == "backdoored"


def development(settings):
    "The S of the hard set's and the zoo's models that the search was varied on, by model."
    rows = [read_results(name) for name in ("hard", "zoo")]
    rows = pd.concat(rows).query("method == 'fast' and settings == @settings and seed == 0")
    return rows[rows["split"] != "test"].set_index("model")["S"]


def test_what_stops_at_a_wrong_length_is_found_because_it_is_asked_again():
    "A trigger of twice the noise's length, where the longest start has nine tenths."
    assert development("again=")["far-sde"] < NATURAL_ZERO["fast"] < 1 < development("")["far-sde"]


def test_without_the_ray_honest_models_are_accused():
    S = development("controls=turned")
    honest = S[[name for name in S.index if find(name).recipes[name].attack is None]]
    assert honest.max() > NATURAL_ZERO["fast"] > development("")[honest.index].max()


def test_the_two_cases_that_the_earlier_search_judged_wrongly():
    "Villan-SDE on a colour network was missed, an honest emoji network called backdoored."
    rows = rows_of("sizes").set_index("model")
    assert rows.loc["emoji32-villan-sde", "verdict"] == "backdoored"
    assert rows.loc["emoji32-b", "verdict"] == "clean"
    assert rows.loc["emoji32-b", "S"] < NATURAL_ZERO["fast"] / 2


def test_an_attacker_with_a_sampler_of_his_own_is_found_in_every_family():
    rows = rows_of("families")
    own = rows[rows["attack"] == "TrojDiff"]
    assert own["model"].nunique() >= 9 and (own["verdict"] == "backdoored").all()
