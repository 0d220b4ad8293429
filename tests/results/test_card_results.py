"The cards of the models, and how many models of each kind there are."
import pytest

from terd_nb.lab.any_path import FAMILY_MODELS, SETUPS, FamilyCard, family_dir
from terd_nb.lab.hard_set import HARD, HardCard, hard_dir
from terd_nb.lab.zoo import is_made, weights_sha256


def hard_card(name):
    path = hard_dir() / name / "card.json"
    return HardCard.model_validate_json(path.read_text(encoding="utf-8"))


def family_card(name):
    path = family_dir() / name / "card.json"
    return FamilyCard.model_validate_json(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", HARD)
def test_a_card_of_the_hard_set_is_that_of_its_weights(name):
    card = hard_card(name)
    model = HARD[name]
    assert card.sha256 == weights_sha256(hard_dir() / name)
    assert (card.split, card.why, card.steps) == (model.split, model.why, model.steps)


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_a_card_of_another_family_is_that_of_its_weights(name):
    card = family_card(name)
    model = FAMILY_MODELS[name]
    if is_made(family_dir() / name):
        assert card.sha256 == weights_sha256(family_dir() / name)
    for field in ("kind", "split", "steps", "lr"):
        assert getattr(card, field) == getattr(model, field), field


@pytest.mark.xfail(
    strict=True, reason="five attacks of the hard set do not reach their bounds, fifteen do")
def test_sixteen_backdoors_work():
    cards = [hard_card(name) for name in HARD]
    assert sum(card.works for card in cards if card.asr) >= 16


def how_many(kind):
    "The honest and the backdoored models of a family."
    attacked = [bool(model.attack) for model in FAMILY_MODELS.values() if model.kind == kind]
    return attacked.count(False), attacked.count(True)


@pytest.mark.parametrize("kind", ["v_prediction", "sample", "flow", "edm", "score"])
def test_every_family_on_pixels_has_four_honest_and_six_backdoored_models(kind):
    honest, backdoored = how_many(kind)
    assert honest >= 4 and backdoored >= 6


@pytest.mark.parametrize("kind", ["latent", "consistency"])
def test_latents_and_consistency_have_two_honest_and_three_backdoored_models(kind):
    honest, backdoored = how_many(kind)
    assert honest >= 2 and backdoored >= 3


@pytest.mark.parametrize("kind", SETUPS)
def test_of_every_family_a_pair_is_here_with_its_weights(kind):
    here = [model for name, model in FAMILY_MODELS.items()
            if model.kind == kind and is_made(family_dir() / name)]
    assert any(model.attack for model in here) and not all(model.attack for model in here)
