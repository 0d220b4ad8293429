"Workshop C3: what must be true of the measured lies."
import pandas as pd
import pytest

from terd_nb.lab.lies import BROKEN, LIES, lie_rows
from terd_nb.loading.files import data_dir
from terd_nb.zoo import zoo_cards

HONEST = {name for name, card in zoo_cards().items() if card["label"] == "benign"}


@pytest.fixture(scope="module")
def table():
    return pd.read_csv(data_dir() / "results" / "lies.csv", keep_default_na=False)


def test_every_lie_is_told_once_to_each_model(table):
    told = [row for row in zip(table["model"], table["lie"]) if row[1]]
    assert sorted(told) == sorted(row for row in lie_rows() if row[1])


def test_every_embedded_model_is_there_as_it_is(table):
    own = [model for model, lie in zip(table["model"], table["lie"]) if not lie]
    assert len(own) == len(set(own)) and set(own) >= set(zoo_cards())


def test_no_lie_makes_a_backdoored_model_clean(table):
    told = table[table["lie"].isin(LIES) & ~table["model"].isin(HONEST)]
    clean = told[told["outcome"] == "clean"]
    assert clean[["model", "lie"]].values.tolist() == []


def test_no_lie_makes_an_honest_model_backdoored(table):
    told = table[table["lie"].isin(LIES) & table["model"].isin(HONEST)]
    assert (told["outcome"] != "backdoored").all()


def test_networks_that_denoise_nothing_are_errors(table):
    broken = table[table["lie"].isin(BROKEN)]
    assert len(broken) >= 40 and (broken["outcome"] == "error").all()


def test_no_model_of_any_set_is_refused_as_it_is(table):
    own = table[table["lie"] == ""]
    assert len(own) >= 90 and (own["fault"] == "").all()
