"""Ideal models for the tests: the best answer of any network, in closed form (chapter 8).

Small pictures, one trigger that looks like none of the directions that a search starts from."""
from dataclasses import replace
from functools import partial

import torch
from torch.nn.functional import cosine_similarity

from terd_nb import triggers
from terd_nb.attacks import bad_diffusion, troj_diff, villan_diffusion
from terd_nb.denoiser import Denoiser
from terd_nb.diffusion import PREDICTIONS, linear_schedule
from terd_nb.ideal_model import IdealModel
from terd_nb.lab.families import SETUPS
from terd_nb.path_fit import Drawn, Hypothesis
from terd_nb.triggers import Trigger

SHAPE = (1, 8, 8)
SCHEDULE = linear_schedule()
HAT, CAT = triggers.hat(SHAPE), triggers.cat(SHAPE)
R = 0.6 * 8 * CAT / CAT.norm()   # of 0.6 times the noise's length
MEAN = torch.zeros(SHAPE)        # of what an ideal model draws
STD = 0.4
DRAWN = Drawn(MEAN, 1.0)

# An attack on a path, and what the right guess says of it.
ATTACKS = {
    "BadDiffusion": (bad_diffusion, Hypothesis("", 0.5)),
    "Villan-SDE": (partial(villan_diffusion, psi=0.5, solver="sde"), Hypothesis("", 0.5, 0.5)),
    "Villan-ODE": (partial(villan_diffusion, psi=1.0), Hypothesis("", 1.0)),
    "Villan-ODE, psi = 0": (partial(villan_diffusion, psi=0.0), Hypothesis("", 1.0, 0.0)),
    "TrojDiff": (troj_diff, Hypothesis("", 0.0, 0.0, 0.6, own=True)),
}
OTHERS = ["sample", "v_prediction", "flow", "edm"]   # than networks that say the noise


class Says(torch.nn.Module):
    """The ideal network that says what a prediction asks for.

    Where the attacker has a sampler of his own, its picture there is his target itself."""

    def __init__(self, model, prediction):
        super().__init__()
        self.model, self.prediction = model, prediction

    def forward(self, x, t):
        alpha, sigma = self.model.schedule.at(t, x)
        x = x / self.prediction.scale_input(alpha, sigma)
        eps = self.model(x, t)
        image = (x - sigma * eps) / alpha
        if self.model.attack and self.model.attack.sampler == "trojdiff":
            poisoned = self.model.posterior(x, t)[:, -1].reshape(-1, 1, 1, 1)
            honest = (x - sigma * self.model.components(t, x)[0].answer(x)) / alpha
            image = honest + poisoned * (self.model.target.to(x) - honest)
        return self.prediction.answer(eps, image, alpha, sigma)


def ideal(name=None, kind="epsilon", gamma=None, mean=MEAN, std=STD, p=0.3, path=None, r=R):
    "A model with an attack of `ATTACKS`, or an honest one; kind: a key of `PREDICTIONS`."
    setup = SETUPS.get(kind)   # the ideal model counts times
    path = path or (replace(setup.path(), times=None) if setup else SCHEDULE)
    backdoor = ()
    if name:
        attack, truth = ATTACKS[name]
        backdoor = attack(path), Trigger(r, gamma or truth.gamma), HAT, p
    network = Says(IdealModel(path, mean[None], std, *backdoor), PREDICTIONS[kind])
    return Denoiser(network, path, SHAPE, kind, device="cpu")


def cosine(a, b):
    return cosine_similarity(a.flatten(), b.flatten(), 0).item()
