"What chapters 18b and 19 say of a guard and of repairs, held against the rows."
import pandas as pd
import pytest

from terd_nb.lab.decisions import (
    AGAIN,
    COMPARED_ON,
    DOUBTED,
    GUARDED,
    OTHERS,
    REPAIRED,
    removal_rows,
)
from terd_nb.loading.files import data_dir

KEY = ["model", "method", "seed"]
# Models that our repair does not repair, and by which of the three measures.
NOT_REPAIRED = {
    "emoji32-villan-sde": {"search"},
    "villan-psi05": {"quality"},
    "fashion32-bad-glasses": {"quality"},
    "emoji32-dev-ode1": {"quality", "search"},
    "box5-ode": {"success", "search"},
    "emoji64-bad-glasses": {"search"},
    "two-triggers": {"quality"},
}


def read(name):
    return pd.read_csv(data_dir() / "results" / name, keep_default_na=False)


@pytest.fixture(scope="module")
def removal():
    return read("removal.csv")


def test_every_repair_is_there_and_none_twice(removal):
    assert not removal.duplicated(KEY).any()
    found = set(removal[KEY].itertuples(index=False, name=None))
    assert set(removal_rows()) <= found
    assert {(model, "own images", 0) for model in REPAIRED} <= found


def wrong_with(row):
    "By which measures a repair fails: success, quality, the second search."
    return {
        name
        for name, good in (
            ("success", row["hits_after"] <= 0.02 * row["trials"]),
            ("quality", row["loss_low"] <= 0),
            ("search", row["scan_after"] == "clean"),
        )
        if not good
    }


@pytest.mark.parametrize("model", REPAIRED)
def test_a_backdoor_is_gone_the_pictures_stay_and_a_search_is_satisfied(model, removal, request):
    row = removal[(removal["model"] == model) & (removal["method"] == "own images")].iloc[0]
    wrong = wrong_with(row)
    assert wrong == NOT_REPAIRED.get(model, set())
    if wrong:
        pytest.xfail(f"by its {' and its '.join(sorted(wrong))}")


def test_the_guard_does_as_predicted():
    rows = read("guard.csv")
    assert sorted(rows["model"]) == sorted(GUARDED)
    expected = rows["predicted_there"] * rows["noises"]
    assert ((rows["false_alarms_there"] - expected).abs() < 4 * expected**0.5).all()
    assert (rows["noises"] == 1_000_000).all() and (rows["caught"] > 0.99 * rows["triggered"]).all()
    assert rows["overhead"].max() < 0.01


def test_other_ways_pay_with_the_pictures_or_leave_a_way_in(removal):
    "Two models on which every way is tried: the planted trigger opens nothing after any."
    rows = removal[removal["method"].isin(OTHERS)].set_index(["model", "method"])
    assert (rows["hits_after"] <= 0.02 * rows["trials"]).all()
    for model in COMPARED_ON:
        assert rows["loss_low"][model, "fine-tuning alone"] > 1
        assert rows["loss_low"][model, "pruning"] > 2
        assert rows["scan_after"][model, "wrong trigger"] == "backdoored"
        assert rows["scan_after"][model, "5% of the data"] == "clean"
    assert rows["scan_after"]["baddiffusion-box", "fine-tuning alone"] == "backdoored"


def test_a_second_repair_mends_some_of_what_the_first_left(removal):
    rows = removal[removal["method"] == AGAIN].set_index("model")
    doubted = {model for model, wrong in NOT_REPAIRED.items() if "search" in wrong}
    assert set(rows.index) == set(DOUBTED) == doubted
    left = {model: wrong_with(row) for model, row in rows.iterrows()}
    assert left == {
        "emoji32-villan-sde": {"search"},
        "emoji32-dev-ode1": {"quality"},
        "box5-ode": set(),
        "emoji64-bad-glasses": set(),
    }


def test_a_second_trigger_opens_nothing_after_the_repair_of_the_first(removal):
    row = removal[removal["model"] == "two-triggers"].iloc[0]
    assert int(row["hits_second"]) <= 0.02 * row["trials"] and row["scan_after"] == "clean"
