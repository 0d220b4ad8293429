"How many models of each kind there are, and which of them work."
import pytest

from terd_nb.lab.families import SETUPS
from terd_nb.lab.model_sets import is_made, read_card, works
from terd_nb.lab.sets import SETS


@pytest.mark.xfail(
    strict=True, reason="five attacks of the hard set do not reach their bounds, fifteen do")
def test_sixteen_backdoors_work():
    hard = SETS["hard"]
    cards = [read_card(hard.folder / name) for name in hard.recipes]
    assert sum(works(card) for card in cards if card.backdoors) >= 16


def how_many(kind):
    "The honest and the backdoored models of a family."
    recipes = SETS["families"].recipes.values()
    attacked = [bool(recipe.attack) for recipe in recipes if recipe.family == kind]
    return attacked.count(False), attacked.count(True)


@pytest.mark.parametrize("kind", ["v_prediction", "sample", "flow", "edm", "score"])
def test_every_family_on_pixels_has_four_honest_and_six_backdoored_models(kind):
    honest, backdoored = how_many(kind)
    assert honest >= 4 and backdoored >= 6


@pytest.mark.parametrize("kind", ["latent", "consistency"])
def test_latents_and_consistency_have_two_honest_and_three_backdoored_models(kind):
    honest, backdoored = how_many(kind)
    assert honest >= 2 and backdoored >= 3


def test_thirty_backdoors_of_the_other_families_work():
    families = SETS["families"]
    cards = [read_card(families.folder / name) for name in families.recipes]
    assert sum(works(card) for card in cards if card.backdoors) >= 30


@pytest.mark.parametrize("kind", SETUPS)
def test_of_every_family_a_pair_is_here_with_its_weights(kind):
    families = SETS["families"]
    here = [bool(recipe.attack) for name, recipe in families.recipes.items()
            if recipe.family == kind and is_made(families.folder / name)]
    assert any(here) and not all(here)
