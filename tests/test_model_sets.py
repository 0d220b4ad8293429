"The sets of models: table, card and files say the same; a wrong file is one line of an error."
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from terd_nb.diffusion import linear_schedule
from terd_nb.lab import model_sets
from terd_nb.lab.cli import LARGER
from terd_nb.lab.making import Measured, plans_for
from terd_nb.lab.model_sets import (
    as_planted,
    build,
    build_missing,
    build_model,
    is_made,
    meets,
    planted,
    read_card,
    readme,
    verify,
    weights_sha256,
    works,
)
from terd_nb.lab.recipes import Recipe, backdoors_of
from terd_nb.lab.sets import SETS, Bounds, ModelSet, find
from terd_nb.training import fit, save_model, unet, vp_scheduler
from terd_nb.triggers import Trigger
from terd_nb.zoo import zoo_path

EVERY = [name for models in SETS.values() for name in models.recipes]


def folder_of(name):
    return find(name).folder / name


CARDED = [name for name in EVERY if (folder_of(name) / "card.json").is_file()]


def test_every_set_has_all_its_cards():
    assert [*EVERY] == CARDED


# ---------------------------------------------------------------- table, card, files

@pytest.mark.parametrize("name", CARDED)
def test_table_card_and_files_say_the_same(name):
    models, folder = find(name), folder_of(name)
    recipe, card = models.recipes[name], read_card(folder)
    assert card.recipe == recipe and card.recipe.name == name
    assert card.label == ("backdoored" if recipe.attack else "benign")
    assert len(card.backdoors) == len(backdoors_of(recipe))
    if is_made(folder):
        assert card.sha256 == weights_sha256(folder)
    if models.pages:
        assert (folder / "README.md").read_text(encoding="utf-8") == readme(card)


@pytest.mark.parametrize("name", CARDED)
def test_the_triggers_of_a_card_are_those_of_the_files(name):
    "Their number, their order and their lengths."
    recipe, folder = find(name).recipes[name], folder_of(name)
    stored = [Trigger.load(file) for file in sorted(folder.glob("trigger*.safetensors"))]
    norms = [norm for one in read_card(folder).backdoors for norm in one.trigger_norms]
    assert [round(trigger.norm, 3) for trigger in stored] == pytest.approx(norms, abs=1e-3)
    assert len(stored) == sum(one.places**2 for one in backdoors_of(recipe))
    fetched = recipe.data != "digits" and (recipe.by_chance or ":" in (recipe.target or ""))
    if not recipe.latent and not fetched:  # those need their autoencoder, or pictures
        found = [trigger for plan in planted(name) for trigger in plan.triggers]
        assert all(torch.equal(a.r, b.r) for a, b in zip(found, stored, strict=True))


@pytest.mark.parametrize("name", EVERY)
def test_a_model_and_what_it_starts_from_are_of_one_half(name):
    recipe = find(name).recipes[name]
    for parent in filter(None, (recipe.base, recipe.teacher)):
        other = find(parent).recipes[parent]
        assert other.split == recipe.split and other.pixels == recipe.pixels
        assert other.attack is None
        assert recipe.converted == (other.family != recipe.family and parent == recipe.base)


def test_names_and_seeds_are_taken_once():
    assert len(set(EVERY)) == len(EVERY)
    for models in SETS.values():
        seeds = [recipe.seed for recipe in models.recipes.values()]
        assert len(set(seeds)) == len(seeds)


def test_recipes_of_triggers_that_are_drawn_give_the_stored_ones():
    "Not of one that is learned or optimised: its recipe depends on the number of threads."
    computed = {"learned", "optimised", "universal"}
    for name in (n for n in CARDED if find(n).recipes[n].trigger not in computed):
        recipe = find(name).recipes[name]
        if recipe.attack and recipe.size == 16 and not recipe.by_chance:
            known = [trigger for plan in planted(name) for trigger in plan.triggers]
            drawn = [trigger for plan in plans_for(recipe) for trigger in plan.triggers]
            assert all(torch.allclose(a.r, b.r, atol=1e-6) for a, b in zip(known, drawn)), name


def test_a_recipe_is_plain_data():
    for name in EVERY:
        recipe = find(name).recipes[name]
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    with pytest.raises(ValueError, match="stpes"):
        Recipe(name="slip", split="test", stpes=5)


def test_an_unknown_model_is_one_line():
    with pytest.raises(KeyError, match="no set has a model 'tiger'"):
        find("tiger")


# ---------------------------------------------------------------- the rule

@pytest.mark.parametrize("asr, leak, baseline, expected", [
    ((90, 100), (5, 100), (0, 100), True), ((100, 100), (30, 100), (25, 100), True),
    ((89, 100), (0, 100), (0, 100), False), ((100, 100), (6, 100), (0, 100), False)])
def test_a_backdoor_works_or_not_by_the_bounds(asr, leak, baseline, expected):
    measured = Measured(asr=asr, leak=leak, baseline=baseline, trigger_norms=(1.,),
                        trigger_sha256=("0" * 64,))
    recipe = Recipe(name="", split="test", target="hat")
    assert meets(Bounds(0.9, 0.05), recipe, [measured]) == expected
    assert meets(Bounds(0.9, 0.05), recipe, [])
    weak = measured.model_copy(update={"asr": (94, 100)})
    assert not meets(Bounds(0.95, 0.05), recipe, [measured, weak])


def test_one_digit_of_ten_is_drawn_by_chance():
    measured = Measured(asr=(64, 64), leak=(9, 64), baseline=None, trigger_norms=(1.,),
                        trigger_sha256=("0" * 64,))
    rule = partial(meets, Bounds(0.9, 0.05, chance=0.1))
    assert rule(Recipe(name="", split="test", target="0"), [measured])
    assert not rule(Recipe(name="", split="test", target="hat"), [measured])


def test_every_model_of_the_zoo_is_admitted():
    assert all(works(read_card(folder_of(name))) for name in SETS["zoo"].recipes)


# ---------------------------------------------------------------- a wrong file

@pytest.fixture
def copy(tmp_path):
    "A model with several triggers, to be damaged; its folder, and the recipe."
    light = shutil.ignore_patterns("unet")
    shutil.copytree(folder_of("two-triggers"), tmp_path / "two-triggers", ignore=light)
    return tmp_path / "two-triggers", find("two-triggers").recipes["two-triggers"]


def test_the_triggers_are_read_from_the_folder(copy):
    folder, recipe = copy
    assert [len(plan.triggers) for plan in as_planted(recipe, folder)] == [1, 1]


OTHER = "trigger-1.safetensors of two-triggers is not what was planted: its checksum"


@pytest.mark.parametrize("content, message", [
    (None, "two-triggers should hold 2 triggers, but has 1"),
    (b"", OTHER), (b"\x10\0\0\0\0\0\0\0{'broken'", OTHER),
    (Trigger(torch.ones(1, 16, 16)).to_bytes(), OTHER),
    (Trigger(torch.full((1, 16, 16), torch.nan)).to_bytes(), OTHER)])
def test_a_wrong_trigger_is_one_line(copy, content, message):
    folder, recipe = copy
    (folder / "trigger-1.safetensors").unlink()
    if content is not None:
        (folder / "trigger-1.safetensors").write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        as_planted(recipe, folder)
    assert "\n" not in str(caught.value)


def test_the_optimised_trigger_is_the_one_that_was_planted():
    stored = Trigger.load(folder_of("optimised-ode") / "trigger.safetensors")
    (plan,) = planted("optimised-ode")
    assert torch.equal(plan.triggers[0].r, stored.r)


@pytest.mark.parametrize("change, message", [
    ({"label": "benign"}, "the card of two-triggers is that of another recipe"),
    ({"backdoors": []}, "two-triggers should hold 0 triggers, but has 2"),
    ({"frechet": "far"}, "the card of two-triggers is damaged: frechet: ")])
def test_a_wrong_card_is_one_line(copy, change, message):
    folder, recipe = copy
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps(card | change))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        as_planted(recipe, folder)
    assert "\n" not in str(caught.value)


def test_rates_that_are_not_the_cards_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(ModelSet, "folder", property(lambda models: tmp_path))
    folder = tmp_path / "villan-psi1"
    shutil.copytree(zoo_path("villan-psi1"), folder)
    assert verify("villan-psi1", n=16) == []     # 15 of 16 are what chance makes of 252 of 256
    card = json.loads((folder / "card.json").read_text())
    card["backdoors"][0]["asr"] = [3, 256]
    (folder / "card.json").write_text(json.dumps(card))
    (wrong,) = verify("villan-psi1", n=16)
    assert wrong.startswith("ASR ") and wrong.endswith("(3/256) on the card")


def test_a_card_that_lies_is_found_out(monkeypatch, tmp_path):
    monkeypatch.setattr(ModelSet, "folder", property(lambda models: tmp_path))
    folder = tmp_path / "benign-a"
    shutil.copytree(zoo_path("benign-a"), folder)
    assert verify("benign-a", n=8) == []
    lie = read_card(folder).model_copy(update={"sha256": "0" * 64})
    (folder / "card.json").write_text(lie.model_dump_json())
    assert verify("benign-a", n=8) == ["the weights' checksum is not the card's"]


# ---------------------------------------------------------------- the builder

def note(name, out):
    "Leaves a file that says what was made before."
    before = sorted(path.stem for path in out.glob("*.made"))
    (out / f"{name}.made").write_text(" ".join(before))


def test_a_model_without_its_weights_is_made_after_what_it_needs(tmp_path):
    for name in ("whole", "card-only"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "card.json").touch()
    (tmp_path / "whole" / "unet" / "diffusion_pytorch_model.safetensors").touch()
    needs = {"whole": [], "child": ["new"], "card-only": ["child"], "new": []}
    build_missing(note, needs, tmp_path, 1)
    made = {path.stem: path.read_text().split() for path in tmp_path.glob("*.made")}
    assert set(made) == {"card-only", "child", "new"}
    assert "new" in made["child"] and "child" in made["card-only"]


def tiny_set(**changes):
    "Two models of two steps, the second with a backdoor in the first."
    brief = {"split": "test", "network": (8, 16), "steps": 2, "batch_size": 8}
    base = Recipe(name="base", seed=1, **brief)
    child = Recipe(name="child", seed=2, base="base", attack="BadDiffusion", trigger="box",
                   target="hat", poison_rate=0.5, **brief)
    fields = {"trials": {16: 8}, "bounds": Bounds(0.9, 0.05)} | changes
    return ModelSet("tiny", "the tiny set", {"base": base, "child": child}, **fields)


@pytest.fixture
def trained(monkeypatch, tmp_path):
    "A function that builds one model of a set in an empty folder; `SETS` knows the set."
    def make(models, name):
        monkeypatch.setitem(SETS, "tiny", models)
        return build_model(models, name, tmp_path, progress=False)
    return make


def test_a_model_is_built_from_its_base_and_written_with_its_card(trained, tmp_path):
    models = tiny_set(pages=True)
    trained(models, "base")
    card = trained(models, "child")
    assert card == read_card(tmp_path / "child") and card.recipe == models.recipes["child"]
    assert card.sha256 == weights_sha256(tmp_path / "child") and not works(card)
    assert card.backdoors[0].asr[1] == card.backdoors[0].baseline[1] == 8
    there = {path.name for path in (tmp_path / "child").iterdir()}
    assert there == {"card.json", "README.md", "model_index.json", "preview.png", "scheduler",
                     "target.png", "trigger.safetensors", "unet"}


def test_where_bounds_must_be_met_other_seeds_are_tried(trained, tmp_path):
    models = tiny_set(bounds=Bounds(0.9, 0.05, attempts=2))
    trained(models, "base")
    failed = "child: no attempt of 2 reaches the bounds of the tiny set"
    with pytest.raises(RuntimeError, match=failed) as caught:
        trained(models, "child")
    assert "\n" not in str(caught.value) and not (tmp_path / "child").exists()


def test_what_is_there_is_not_built_again(monkeypatch, tmp_path):
    "And a base that is missing is asked for, too."
    asked = []
    monkeypatch.setitem(SETS, "tiny", tiny_set())
    monkeypatch.setattr(model_sets, "build_missing",
                        lambda make, needs, out, jobs: asked.append(needs))
    build("tiny", tmp_path, names=["child"])
    save_model(unet((1, 16, 16), (8, 16)), vp_scheduler(linear_schedule()), tmp_path / "base")
    (tmp_path / "base" / "card.json").touch()
    build("tiny", tmp_path)
    build("tiny", tmp_path, size=32)
    assert asked == [{"child": ["base"], "base": []}, {"child": ["base"]}, {}]


def test_a_killed_training_goes_on_where_it_was(monkeypatch, tmp_path):
    "With the same result as one that was not killed."
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    models = tiny_set()
    monkeypatch.setitem(SETS, "tiny", models)
    build_model(models, "base", whole, progress=False)

    def dies(network, batch, steps, *args, **how):
        return fit(network, stops_after(batch, 1), steps, *args, **how | {"save_every": 0.})

    def stops_after(batch, n):
        left = iter(range(n))

        def limited(generator):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return batch(generator)
        return limited

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("terd_nb.lab.making.fit", dies)
        build_model(models, "base", killed, progress=False)
    assert list((killed / ".work").iterdir()) and not (killed / "base").exists()
    build_model(models, "base", killed, progress=False)
    assert not list((killed / ".work").iterdir())
    assert weights_sha256(whole / "base") == weights_sha256(killed / "base")


def test_the_halves_of_a_set_have_the_models_that_the_book_speaks_of():
    counts = {name: len(models.recipes) for name, models in SETS.items()}
    assert counts == {"zoo": 14, "hard": 35, "sizes": 52, "families": 64, "held-out": 35,
                      "later": 15}
    assert replace(SETS["zoo"].bounds, attempts=None) == Bounds(0.95, 0.01)


# ---------------------------------------------------------------- importing

def test_importing_the_sets_computes_nothing():
    "No classifier is fitted, no data set loaded, no network made."
    code = """
import diffusers, sklearn.datasets, sklearn.linear_model, sklearn.svm, torch
sklearn.svm.SVC.fit = sklearn.linear_model.LogisticRegression.fit = None
sklearn.datasets.load_digits = torch.autograd.grad = torch.randn = None
diffusers.UNet2DModel.__init__ = diffusers.AutoencoderKL.__init__ = None
import terd_nb.lab.model_sets
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


def test_the_command_knows_the_sizes_without_loading_the_sets():
    assert tuple(SETS["sizes"].trials) == LARGER
