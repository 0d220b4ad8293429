"What chapters 18b and 19 say of a guard and of repairs, held against the rows."
import pandas as pd
import pytest

from terd_nb.lab.decisions import COMPARED_ON, GUARDED, OTHERS, REPAIRED, removal_rows
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


def test_other_ways_leave_a_backdoor_or_pay_with_the_pictures(removal):
    "Two models on which every way is tried."
    rows = removal[removal["method"].isin(OTHERS)].set_index(["model", "method"])
    rate = rows["hits_after"] / rows["trials"]
    for model in COMPARED_ON:
        assert rate[model, "fine-tuning alone"] > 0.1
        assert rows["loss_low"][model, "pruning"] > 2 and rate[model, "pruning"] <= 0.02
        assert rows["scan_after"][model, "wrong trigger"] == "backdoored"
        assert rate[model, "5% of the data"] <= 0.02
        assert rows["scan_after"][model, "5% of the data"] == "clean"
