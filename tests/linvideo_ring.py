"""LinVideo's objectives at equal rates on the ring, where a run takes seconds.

    python -m tests.linvideo_ring --seeds 0 1 2

No attention here: a network too small to be the teacher, whose velocity is a formula, learns from
it by each objective of linvideo.py, so that nothing but objective and rate makes the difference.
All begin with the same 400 updates of regression and go on with 800 of their own, sampled in 20
Euler steps shifted by 2. One Markdown table: energy distance x 1000 between samples of student and
teacher, and mean squared distance of samples from the same noise; mean and range over the seeds.
"""

import argparse
import os
import statistics
import sys

import torch
from torch import nn

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from linvideo import adm_variant_loss, regression_loss, trajectory  # noqa: E402
from models.diffusion import step_grid  # noqa: E402
from models.worlds.ring import RingTeacher  # noqa: E402

K, GRID, BATCH, RATE = 20, step_grid(20, 2.0), 256, 3e-3
ROWS = {  # title: what adm takes for x_hat ("mse": no adm), its weight, the learning rate
    "MSE (Eq. 7), 3e-3": ("mse", "", RATE),
    "ADM at the student's own states, 3e-3": ("policy", "", RATE),
    "ADM, part of a step, weight velocity, 3e-3": ("part", "velocity", RATE),
    "ADM, part of a step, weight unit, 3e-3": ("part", "unit", RATE),
    "ADM, part of a step, Eq. 13's weight, 3e-3": ("part", "eq13", RATE),
    "the same, the sampler's last step too, 3e-3": ("last", "eq13", RATE),
    "MSE, 3e-4": ("mse", "", RATE / 10),
    "ADM, weight unit, 3e-4": ("part", "unit", RATE / 10),
    "ADM, Eq. 13's weight, the last step too, 3e-4": ("last", "eq13", RATE / 10),
}


class Small(nn.Module):
    """A velocity of x (B, 2) and t (B,)."""

    def __init__(self, width=24):
        super().__init__()
        layers = nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x, t):
        of_t = t, t * t, (3 * t).sin(), (3 * t).cos(), (9 * t).sin(), (9 * t).cos()
        return self.layers(torch.cat([x, torch.stack(of_t, 1)], 1))


def states_of(teacher, n, generator, sampler=None):
    """-> n trajectories of the teacher, or of the sampler with the teacher's velocities."""
    z = torch.randn(n, 2, generator=generator)
    return trajectory(teacher, z, GRID, {}, {}, 1.0, sampler)


def loss_of(student, teacher, bank, state, weight, generator):
    """One batch of an objective from the states of a bank.  -> scalar."""
    k = torch.randint(K - (state == "part"), (BATCH,), generator=generator)
    row = torch.randint(len(bank["x"]), (BATCH,), generator=generator)
    x_t, v_t, t = bank["x"][row, k], bank["v"][row, k], torch.tensor(GRID)[k]
    if state in ("mse", "policy"):
        return regression_loss(student, x_t, v_t, t, {})[0]
    part = torch.rand(BATCH, generator=generator)
    s = (t + part * (torch.tensor(GRID)[k + 1] - t)).clamp_min(0.02)
    args = argparse.Namespace(weight=weight, regression_weight=0.0)
    return adm_variant_loss(args, student, teacher, student, x_t, v_t, t, s, {})[0]


def run(seed, state, weight, rate, first=400, updates=800, fresh=16):
    """-> energy distance x 1000, paired mean squared distance, of 4,000 samples."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    teacher, student = RingTeacher(), Small()
    bank = states_of(teacher, 2000, generator)
    own = {name: x[:512].clone() for name, x in bank.items()}  # a ring, which starts as the bank
    adam = torch.optim.Adam(student.parameters(), RATE, betas=(0.9, 0.99))
    for update in range(first + updates):
        now, source, own_rate = "mse", bank, RATE
        if update >= first:
            now, own_rate = state, rate
            if state == "policy":
                place = torch.arange(fresh * update, fresh * (update + 1)) % 512
                for name, x in states_of(teacher, fresh, generator, student).items():
                    own[name][place] = x
                source = own
        adam.param_groups[0]["lr"] = own_rate * min(1, (first + updates - update) / (0.4 * updates))
        loss = loss_of(student, teacher, source, now, weight, generator)
        adam.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 10.0)
        adam.step()
    z, other = (torch.randn(4000, 2, generator=torch.Generator().manual_seed(s)) for s in (99, 98))
    a, b, c = (ends(*pair) for pair in ((student, z), (teacher, z), (teacher, other)))
    return 1000 * energy_distance(a, c), float((a - b).square().mean())


def ends(net, z):
    """x0 of the trajectories of a network from this noise."""
    last = trajectory(net, z, GRID, {}, {}, 1.0)
    return last["x"][:, -1] + (GRID[-1] - GRID[-2]) * last["v"][:, -1]


def energy_distance(a, b):
    """2 E|a - b| - E|a - a'| - E|b - b'|, zero for equal laws."""
    between = 2 * torch.cdist(a, b).mean()
    return float(between - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run for each")
    args = p.parse_args()
    print("| objective, rate | energy distance x 1000 | paired |\n|---|---|---|")
    for title, row in ROWS.items():
        energy, paired = zip(*(run(seed, *row) for seed in args.seeds))
        found = f"{statistics.mean(energy):.2f} ({min(energy):.2f}-{max(energy):.2f})"
        print(f"| {title} | {found} | {statistics.mean(paired):.4f} |", flush=True)


if __name__ == "__main__":
    main()
