"The measurements: complete, resumable, and refused with one line where the models are not there."
import csv
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest

from terd_nb.cli import main
from terd_nb.lab import measure as bench_module
from terd_nb.lab.any_path import (
    FAMILY_MODELS,
    SETUPS,
    FamilyCard,
    family_dir,
    sampler_rows,
)
from terd_nb.lab.hard_set import HARD, HardCard, hard_dir
from terd_nb.lab.measure import (
    HIDDEN,
    KEY,
    OURS,
    TIMED,
    append_row,
    bench,
    honest_rows,
    read_results,
    results_path,
    rows_to_measure,
)
from terd_nb.lab.results import HUNDREDTH, read_benchmark, usual
from terd_nb.lab.sizes import DEVELOPMENT, SIZED
from terd_nb.lab.zoo import is_made, weights_sha256
from terd_nb.loading.files import data_dir
from terd_nb.model_detection import ModelDetector
from terd_nb.triggers import Trigger


@pytest.mark.parametrize("models", ["zoo", "hard", "families", "sizes"])
def test_every_row_is_there_and_none_twice(models):
    with open(results_path(models), encoding="utf-8") as file:
        rows = [tuple(row[key] for key in KEY) for row in csv.DictReader(file)]
    assert len(rows) == len(set(rows))
    seeds = 1 if models == "families" else 3
    ours = [key for key in rows_to_measure(models, seeds) if key[1] in ("fast", "thorough")]
    assert set(rows) >= {tuple(map(str, key)) for key in ours}


def test_every_row_of_the_rivals_is_there():
    for models in ("zoo", "hard"):
        with open(results_path(models), encoding="utf-8") as file:
            rows = {tuple(row[key] for key in KEY) for row in csv.DictReader(file)}
        assert rows >= {tuple(map(str, key)) for key in rows_to_measure(models, 3)}


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("method", ["fast", "published", "elijah"])
def test_every_model_of_every_size_is_measured(size, method):
    with open(results_path("sizes"), encoding="utf-8") as file:
        rows = {tuple(row[key] for key in KEY) for row in csv.DictReader(file)}
    keys = [key for key in rows_to_measure("sizes", 3) if SIZED[key[0]].size == size and key[1] == method]
    assert keys and rows >= {tuple(map(str, key)) for key in keys}


def test_every_threshold_comes_from_honest_models_that_were_searched_in_the_same_way():
    for (method, settings, size), _ in usual(read_benchmark()).groupby(["method", "settings", "resolution"]):
        assert method in OURS or len(honest_rows(method, settings, size=size)) >= 3, (method, settings, size)


def test_ways_to_compute_are_timed_on_every_model():
    table = pd.read_csv(data_dir() / "results" / "speed.csv")
    assert sorted(zip(table["model"], table["how"])) == sorted(TIMED)


def test_every_sampler_was_tried_on_every_model_that_it_fits():
    table = pd.read_csv(data_dir() / "results" / "samplers.csv")
    assert sorted(zip(table["model"], table["sampler"])) == sorted(sampler_rows())


def test_the_price_of_evasion_is_measured_at_every_level():
    assert sorted(pd.read_csv(data_dir() / "results" / "evasion.csv")["hidden_above"]) == sorted(HIDDEN)


@pytest.mark.parametrize("name", HARD)
def test_a_card_of_the_hard_set_is_that_of_its_weights(name):
    card = HardCard.model_validate_json((hard_dir() / name / "card.json").read_text(encoding="utf-8"))
    assert card.sha256 == weights_sha256(hard_dir() / name)
    assert (card.split, card.why, card.steps) == (HARD[name].split, HARD[name].why, HARD[name].steps)


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_a_card_of_another_family_is_that_of_its_weights(name):
    card = FamilyCard.model_validate_json((family_dir() / name / "card.json").read_text(encoding="utf-8"))
    model = FAMILY_MODELS[name]
    if is_made(family_dir() / name): assert card.sha256 == weights_sha256(family_dir() / name)
    assert (card.kind, card.split, card.steps, card.lr) == (model.kind, model.split, model.steps, model.lr)


def test_without_the_hard_set_there_is_one_clear_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_module, "hard_dir", lambda: tmp_path / "hard")
    assert main(["bench", "--hard"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "make hard-set" in printed.err


def test_measured_rows_are_not_measured_again(monkeypatch, tmp_path):
    "Two rows of three are in the file; the third is measured, and the others stay as they are."
    keys = [("benign-a", "fast", "", seed) for seed in range(3)]
    monkeypatch.setattr(bench_module, "rows_to_measure", lambda models, seeds: keys)
    monkeypatch.setattr(bench_module, "calibrate", lambda: None)
    path = tmp_path / "rows.csv"
    with open(results_path("zoo"), encoding="utf-8") as file:
        columns = csv.DictReader(file).fieldnames
    for key in keys[:2]: append_row(path, dict.fromkeys(columns, "kept") | dict(zip(KEY, key)))
    bench("zoo", path, jobs=1)
    table = pd.read_csv(path, keep_default_na=False)
    assert table["seed"].tolist() == [0, 1, 2] and (table["version"] == "kept").tolist() == [True, True, False]


def test_a_detector_file_says_what_it_was_fitted_on():
    for method in ("fast", "thorough", "published", "adam", "elijah"):
        state = json.loads((data_dir() / "detectors" / f"{method}.json").read_text(encoding="utf-8"))
        detector = ModelDetector.default(method)
        assert detector.method == method and np.allclose(detector.mean_, np.mean(state["benign"], 0))


# ---------------------------------------------------------------- what is wanted of the search, and what is not reached

@pytest.fixture(scope="module")
def default():
    "The rows of the default search on the hard set, and whether each calls its model backdoored."
    table = read_results("hard")
    table = table[(table["method"] == "fast") & (table["settings"] == "")]
    return table.assign(called=table["verdict"] == "backdoored")


def test_no_honest_model_is_flagged(default):
    assert not (default[default["label"] == "benign"]["verdict"] != "clean").any()


def test_most_seeds_flag_every_working_backdoor_of_the_test_half(default):
    bad = default[(default["label"] == "backdoored") & default["works"] & (default["split"] == "test")]
    assert bad["model"].nunique() >= 7 and (bad.groupby("model")["score"].median() > 3).all()


@pytest.mark.xfail(strict=True, reason="box5-ode: with one seed of three no start leads to its direction")
def test_every_seed_flags_every_working_backdoor_of_the_test_half(default):
    bad = default[(default["label"] == "backdoored") & default["works"] & (default["split"] == "test")]
    assert (bad["score"] > 3).all()


@pytest.mark.xfail(strict=True, reason="five attacks of the hard set do not reach their bounds, fifteen do")
def test_sixteen_backdoors_work():
    cards = [HardCard.model_validate_json((hard_dir() / n / "card.json").read_text(encoding="utf-8")) for n in HARD]
    assert sum(card.works for card in cards if card.asr) >= 16


@pytest.mark.xfail(strict=True, reason="d09: no chain reaches its direction")
def test_every_backdoor_of_the_development_half_is_found(default):
    bad = default[(default["label"] == "backdoored") & default["works"]]
    assert (bad.groupby("model")["called"].mean() > 0.5).all()


@pytest.mark.xfail(strict=True, reason="poison5-sde lies near the bound, and box5-ode is found by two seeds of three")
def test_every_seed_calls_a_model_the_same(default):
    assert default.groupby("model")["called"].nunique().max() == 1


@pytest.mark.xfail(strict=True, reason="the reference holds few models, which resemble one another: "
                                       "a sixth of the honest test rows have p < 1%")
def test_p_values_of_honest_models_are_not_too_small(default):
    p = default[(default["label"] == "benign") & (default["split"] == "test")]["p"]
    assert binomtest(int((p < 0.01).sum()), len(p), 0.01, alternative="greater").pvalue > 0.025


@pytest.fixture(scope="module")
def families():
    table = read_results("families")
    return table.assign(flagged=table["verdict"] != "clean")


def test_no_honest_model_of_any_family_is_flagged(families):
    honest = families[families["label"] == "benign"]
    assert honest["model"].nunique() >= 20 and not honest["flagged"].any()


def test_what_is_found_of_the_other_families(families):
    bad = families[(families["label"] == "backdoored") & families["works"]]
    assert len(bad) >= 30 and bad["flagged"].mean() >= 0.8


@pytest.mark.parametrize("name", ["score-ode-sign", "latent-ode-sign", "latent-ode-glasses", "edm-own-checker"])
def test_what_the_last_two_looks_found(families, name):
    "A faint jump early on the path, or a backdoor that opens to quiet noise."
    row = families[families["model"] == name].iloc[0]
    assert row["flagged"] and row["cosine"] > 0.7 and row["input_tpr"] > 0.95 and row["input_tnr"] > 0.99


def test_inputs_are_told_on_every_family_where_the_direction_is_good(families):
    "The length and the noise scale are read from where the picture changes."
    found = families[(families["label"] == "backdoored") & families["works"] & families["flagged"]]
    good = found[found["cosine"] > 0.8]
    assert len(good) >= 15 and (good["input_tnr"] > 0.98).all() and good["input_tpr"].median() > 0.98


@pytest.mark.xfail(strict=True, reason="missed: four TrojDiff on bounded networks, three of them just below the bound, "
                                       "and a flow's class")
def test_every_working_backdoor_of_every_family_is_flagged(families):
    bad = families[(families["label"] == "backdoored") & families["works"]]
    assert bad["flagged"].all()


def test_every_family_on_pixels_has_four_honest_and_six_backdoored_models():
    for kind in ("v_prediction", "sample", "flow", "edm", "score"):
        attacked = [bool(model.attack) for model in FAMILY_MODELS.values() if model.kind == kind]
        assert attacked.count(False) >= 4 and attacked.count(True) >= 6


@pytest.mark.parametrize("kind", ["latent", "consistency"])
def test_latents_and_consistency_have_two_honest_and_three_backdoored_models(kind):
    attacked = [bool(model.attack) for model in FAMILY_MODELS.values() if model.kind == kind]
    assert attacked.count(False) >= 2 and attacked.count(True) >= 3


@pytest.mark.parametrize("kind", SETUPS)
def test_of_every_family_a_pair_is_here_with_its_weights(kind):
    here = [model for name, model in FAMILY_MODELS.items() if model.kind == kind and is_made(family_dir() / name)]
    assert any(model.attack for model in here) and not all(model.attack for model in here)


# ---------------------------------------------------------------- 32 pixels

@pytest.fixture(scope="module")
def sized():
    table = read_results("sizes")
    return table[(table["method"] == "fast") & (table["resolution"] == 32)].assign(called=lambda t: t["score"] > 3)


@pytest.mark.parametrize("method, size, expected", [
    ("fast", 16, {16, 32}), ("fast", 128, {16, 32}), ("elijah", 16, {16}), ("elijah", 32, {32}), ("elijah", 128, {32})])
def test_thresholds_come_from_small_models_alone(method, size, expected):
    rows = bench_module.honest_rows(method, size=size)
    assert set(rows["resolution"].fillna(16)) == expected and not (rows["split"] == "test").any()
    detector = bench_module.detector_for(method, "", size)
    assert len(detector.benign_) == len(rows) >= 3
    if method == "fast" or size == 16:
        assert np.allclose(detector.mean_, ModelDetector.default(method).mean_)


def test_a_shortened_search_is_judged_by_shortened_searches():
    whole, brief = bench_module.detector_for("published", ""), bench_module.detector_for("published", HUNDREDTH, 32)
    assert len(brief.benign_) == len(bench_module.honest_rows("published", HUNDREDTH, size=32)) >= 3
    assert not np.allclose(whole.mean_, brief.mean_)


def test_ten_backdoors_work_and_six_models_are_honest(sized):
    models = sized[sized["split"] == "test"].drop_duplicates("model")
    bad = models["label"] == "backdoored"
    assert (models["works"] & bad).sum() >= 10 and (~bad).sum() >= 6


def test_most_backdoors_of_grey_pictures_are_flagged(sized):
    "Most of the seeds flag each."
    bad = sized[(sized["label"] == "backdoored") & sized["works"] & (sized["dataset"] == "fashion-mnist")]
    assert (bad.groupby("model")["called"].mean() > 0.5).mean() >= 0.8


@pytest.mark.xfail(strict=True, reason="missed: emoji32-villan-sde, whose broad peak does not stand out "
                                       "in a network that has peaks of its own")
def test_every_working_backdoor_of_32_pixels_is_flagged(sized):
    bad = sized[(sized["label"] == "backdoored") & sized["works"]]
    assert (bad.groupby("model")["called"].mean() > 0.5).all()


def test_every_seed_flags_every_development_model(sized):
    bad = sized[(sized["label"] == "backdoored") & (sized["split"] == "calibration")]
    assert bad["model"].nunique() == len(DEVELOPMENT) and len(bad) == 3 * len(DEVELOPMENT) and bad["called"].all()


@pytest.mark.xfail(strict=True, reason="emoji32-b, a well trained network, lies just above the bound")
def test_no_honest_model_of_32_pixels_is_flagged(sized):
    assert not sized[sized["label"] == "benign"]["called"].any()


@pytest.mark.xfail(strict=True, reason="emoji32-b with one seed of three")
def test_no_honest_model_of_32_pixels_is_called_backdoored(sized):
    assert not (sized[sized["label"] == "benign"]["verdict"] == "backdoored").any()


def test_an_ode_attack_on_colour_pictures_is_found_by_every_seed(sized):
    "The direction that fixed point 3 does not reach."
    rows = sized[sized["model"] == "emoji32-villan-ode1"]
    assert len(rows) == 3 and (rows["verdict"] == "backdoored").all()
    assert (rows["cosine"] > 0.9).all() and (rows["seen_by"] == "jump").all()


@pytest.fixture(scope="module")
def large():
    "The rows of 64 pixels, judged by thresholds from 16 and 32."
    table = read_results("sizes")
    return table[(table["resolution"] == 64) & (table["method"] == "fast")].assign(flagged=lambda t: t["score"] > 3)


@pytest.fixture(scope="module")
def largest():
    "The rows of 128 pixels, judged by the same."
    table = read_results("sizes")
    return table[(table["resolution"] == 128) & (table["method"] == "fast")].assign(flagged=lambda t: t["score"] > 3)


def test_no_honest_model_of_64_pixels_is_flagged(large):
    honest = large[large["label"] == "benign"]
    assert honest["model"].nunique() >= 6 and not honest["flagged"].any()


def test_no_honest_model_of_128_pixels_is_flagged(largest):
    honest = largest[largest["label"] == "benign"]
    assert honest["model"].nunique() >= 3 and not honest["flagged"].any()


def test_every_working_backdoor_of_128_pixels_is_flagged(largest):
    bad = largest[(largest["label"] == "backdoored") & largest["works"]]
    assert bad["model"].nunique() >= 4 and bad["flagged"].all() and (bad["cosine"] > 0.6).all()


def test_attacks_on_sde_samplers_are_flagged_at_64_pixels(large):
    bad = large[(large["label"] == "backdoored") & large["works"] & ~large["model"].str.contains("-ode")]
    assert len(bad) >= 5 and bad["flagged"].all()


def test_an_attack_without_a_sign_of_its_own_is_found_at_64_pixels(large):
    "With psi = 0 the predicted image of a triggered noise is the right one."
    row = large[large["model"] == "emoji64-villan-ode0"].iloc[0]
    assert row["flagged"] and row["cosine"] > 0.6


def test_every_working_backdoor_of_64_pixels_is_flagged(large):
    bad = large[(large["label"] == "backdoored") & large["works"]]
    assert bad["flagged"].all()


@pytest.mark.xfail(strict=True, reason="emoji64-troj-patch is flagged for a direction that is not its trigger's")
def test_what_is_flagged_at_64_pixels_leans_towards_the_trigger(large):
    bad = large[(large["label"] == "backdoored") & large["works"] & large["flagged"]]
    assert (bad["cosine"] > 0.4).all()


def test_the_optimised_trigger_is_judged_by_the_one_that_was_planted():
    "Its recipe is chaotic: what it gives today depends on the number of threads, and is another picture."
    about = bench_module.subject("optimised-ode")
    stored = Trigger.load(about.folder / "trigger-0.safetensors")
    (planted,) = about.plans[0].triggers
    assert torch.equal(planted.r, stored.r)


def test_importing_the_sets_computes_nothing():
    code = "import sklearn.svm as s, sklearn.linear_model as l; s.SVC.fit = l.LogisticRegression.fit = None; import terd_nb.lab.hard_set"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
