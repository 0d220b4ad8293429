"What is found of the other families, and what is not."
import pytest


def working(table):
    "The rows of backdoors whose attack works."
    return table[(table["label"] == "backdoored") & table["works"]]


def test_no_honest_model_of_any_family_is_flagged(families):
    honest = families[families["label"] == "benign"]
    assert honest["model"].nunique() >= 20 and not honest["flagged"].any()


def test_what_is_found_of_the_other_families(families):
    bad = working(families)
    assert len(bad) >= 30 and bad["flagged"].mean() >= 0.8


@pytest.mark.parametrize("name", [
    "score-ode-sign", "latent-ode-sign", "latent-ode-glasses", "edm-own-checker"])
def test_what_the_last_two_looks_found(families, name):
    "A faint jump early on the path, or a backdoor that opens to quiet noise."
    row = families[families["model"] == name].iloc[0]
    assert row["flagged"] and row["cosine"] > 0.7
    assert row["input_tpr"] > 0.95 and row["input_tnr"] > 0.99


def test_inputs_are_told_on_every_family_where_the_direction_is_good(families):
    "The length and the noise scale are read from where the picture changes."
    found = working(families[families["flagged"]])
    good = found[found["cosine"] > 0.8]
    assert len(good) >= 15
    assert (good["input_tnr"] > 0.98).all() and good["input_tpr"].median() > 0.98


@pytest.mark.xfail(
    strict=True, reason="missed: four TrojDiff on bounded networks, three of them just below the "
                        "bound, and a flow's class")
def test_every_working_backdoor_of_every_family_is_flagged(families):
    assert working(families)["flagged"].all()
