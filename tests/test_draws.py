"""Random numbers: levels that are spread over a batch, their ranges, and what ranks share."""

import math

import pytest
import torch

from models.diffusion import shift, unshift
from models.draws import Draws


def steps_of(name, rows, steps):
    """The same name in many updates.  -> (steps, rows)"""
    return torch.stack([Draws(0, s, 0, range(rows)).spread(name) for s in range(steps)])


def test_levels_of_two_names_are_independent():
    """Of n levels a name, |mean of exp(2 pi i (u - u'))|^2 is 1 / (n - 1) on average.

    That is the value for two independent orders of the same parts. Levels that share an order, as
    an offset of each name's own plus steps that all names share, differ by a constant: 1.
    """
    n = 8
    first, second = (steps_of(name, n, 600) for name in ("u", "u_ca"))
    tie = torch.polar(torch.ones(600, n), 2 * math.pi * (first - second)).mean(1).abs().square()
    assert tie.mean() == pytest.approx(1 / (n - 1), abs=0.03)
    golden = torch.arange(n) * (5**0.5 - 1) / 2
    tied = torch.rand(600, 1) + golden, torch.rand(600, 1) + golden  # the wrong variant
    tie = torch.polar(torch.ones(600, n), 2 * math.pi * (tied[0] - tied[1])).mean(1).abs().square()
    assert tie.mean() == pytest.approx(1, abs=1e-4)
    joint = (first[:, 0] * 4).long() * 4 + (second[:, 0] * 4).long()  # of one row: 16 cells
    assert joint.bincount(minlength=16).sub(600 / 16).abs().max() < 4 * (600 / 16) ** 0.5


@pytest.mark.parametrize("rows, ranks, micro_batches", [(4, 2, 1), (2, 2, 2), (3, 1, 4), (1, 5, 1)])
def test_a_global_batch_has_one_row_in_every_part(rows, ranks, micro_batches):
    """Over all ranks and micro-batches, whose levels are those of one process with all rows."""
    total = rows * ranks * micro_batches
    for step in range(20):
        parts = [range(i * rows, (i + 1) * rows) for i in range(ranks * micro_batches)]
        u = torch.cat([Draws(1, step, "x", some, total=total).spread("u") for some in parts])
        assert sorted((u * total).long().tolist()) == list(range(total))
        assert torch.equal(u, Draws(1, step, "x", range(total)).spread("u"))
        assert torch.equal(u, Draws(1, step, "x", range(total), total=total).on_cpu().spread("u"))


def test_every_row_alone_is_uniform():
    u = steps_of("u", 8, 2000)[:, 3]
    assert (u * 10).long().bincount(minlength=10).sub(200).abs().max() < 4 * 200**0.5


@pytest.mark.parametrize("rows", [range(0, 4), range(4, 8)])
def test_two_ranks_with_four_rows_draw_what_one_draws_with_eight(rows):
    """All that a training step asks for."""
    how = dict(shape=(2, 3), timestep_shift=3.0, total=8)
    some, every = Draws(5, 7, 1, rows, **how), Draws(5, 7, 1, range(8), **how)
    for ask in (
        lambda d: d.eps_t("_gan")[0],
        lambda d: d.eps_t("_gan")[1],
        lambda d: d.eps_t_within("", 0.02, 0.98)[1],
        lambda d: d.noise(),
        lambda d: d.uniform("u"),
        lambda d: d.integer("i", 1000),
        lambda d: d.spread_integer("k", 5),
    ):
        assert torch.equal(ask(some), ask(every)[rows.start : rows.stop])
    assert some.agreed("k", 4) == every.agreed("k", 4)


def distance_to_law(t, low, high, s):
    """Kolmogorov's distance of t (n,) to u ~ U where low <= shift(u) <= high."""
    t, (a, b) = t.double().sort()[0], (unshift(low, s), unshift(high, s))
    law = (unshift(t, s) - a) / (b - a)
    return (law - torch.arange(len(t)) / len(t)).abs().max()


@pytest.mark.parametrize("s, missed", [(1, 0.0), (3, 0.0577), (5, 0.0926), (6, 0.1091)])
def test_a_range_in_t_is_kept_after_the_shift(s, missed):
    """.02 <= t <= .98, and the law is that of shift(u) there.

    Drawn in that range before the shift, levels below missed = shift(.02) never occur.
    """
    n = 2000
    draw = Draws(0, 3, 0, range(n), shape=(1,), timestep_shift=float(s))
    t = draw.eps_t_within("", 0.02, 0.98)[1]
    assert 0.02 <= t.min() < 0.0201 + 1e-3 and 0.979 < t.max() <= 0.98
    assert distance_to_law(t, 0.02, 0.98, s) < 1.01 / n
    wrong = draw.eps_t("", 0.02, 0.98)[1]
    if s > 1:
        assert wrong.min() >= missed - 1e-3 and missed == pytest.approx(shift(0.02, s), abs=1e-3)
        assert (t < missed).float().mean() > 0.01 and wrong.max() > 0.99
        assert distance_to_law(wrong.clamp(0.02, 0.98), 0.02, 0.98, s) > 0.01
    else:  # a VP teacher has no shift: plain uniform, either way
        torch.testing.assert_close(t, wrong)


def test_a_range_that_is_everything_is_the_whole_law():
    draw = Draws(0, 3, 0, range(64), shape=(1,), timestep_shift=5.0)
    torch.testing.assert_close(draw.eps_t_within("", 0.0, 1.0)[1], draw.eps_t("")[1])
    assert 0 <= draw.eps_t("")[1].min() < 0.1 and 0.99 < draw.eps_t("")[1].max() <= 1


def test_points_belong_to_their_sample():
    """Whatever samples are beside it, and how many points those have."""
    one = Draws(1, 2, 3, [5]).points("z", [4], 2)
    both = Draws(1, 2, 3, [4, 5]).points("z", [3, 4], 2)
    assert torch.equal(both[3:], one) and not torch.equal(both[:3], one[:3])
    assert torch.equal(Draws(1, 2, 3, [5]).points("z", [6], 2)[:4], one)
