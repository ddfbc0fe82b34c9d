"""models/worlds: the contract that every world keeps, and what each of them is.

The ring's closed forms are checked against autograd and Monte Carlo, the measures against other
formulas, the worlds' data against what is said about them.
"""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, perturbed

import models.worlds
from models.diffusion import VP, from_x0_eps, to_x0_eps
from models.files import UserError
from models.networks.latent_space import LatentSpace
from models.networks.ring_dit import RingDiT
from models.networks.ring_mlp import RingMLP
from models.plumbing import report
from models.worlds import WORLDS, load_world, voxels
from models.worlds.__main__ import main as command
from models.worlds.clips import MOVING, SPEEDS, Clips
from models.worlds.glyphs import Glyphs, render_glyphs
from models.worlds.measures import (
    balanced_labels,
    energy_distance,
    frechet_distance,
    image_patches,
    moments_distance,
    pairwise_diversity,
    sliced_wasserstein,
)
from models.worlds.ring import Ring, RingTeacher, fit_ring_network, fit_ring_transformer
from models.worlds.voxels import SOLIDS, Voxels

NULL = 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def full(n, value, dtype=torch.float64):
    return torch.full((n,), value, dtype=dtype)


def log_density(ring, x, alpha, sigma, label=None):
    """log p_t(x) written out mode by mode, independently of the code under test."""
    centres = [
        (math.cos(math.pi * k / 4), math.sin(math.pi * k / 4))
        for k in range(8)
        if label is None or k % 4 == label
    ]
    S = (alpha * ring.std) ** 2 + sigma**2
    distances = [(x[:, 0] - alpha * cx) ** 2 + (x[:, 1] - alpha * cy) ** 2 for cx, cy in centres]
    parts = [torch.exp(-d / (2 * S)) / (2 * math.pi * S) for d in distances]
    return torch.log(sum(parts) / len(parts))


def gradient(f, x):
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(f(x).sum(), x)[0]


# ---- the contract --------------------------------------------------------------------------------


def scores(measured):
    """The names of a world's measures, all of which must be finite floats."""
    assert all(isinstance(v, float) and math.isfinite(v) for v in measured.values())
    return set(measured)


@pytest.mark.parametrize("name", WORLDS)
def test_world_keeps_the_contract(name):
    """What models/worlds/__init__.py promises: attributes, shapes, dtypes, ranges, determinism."""
    world = load_world(name)
    K = world.num_classes
    assert world.name == name and isinstance(world.shape, tuple) and K > 1
    assert len(world.class_names) == K and len(set(world.class_names)) == K
    assert all(isinstance(c, str) for c in world.class_names)

    n, given = 4 * K, balanced_labels(4 * K, K)
    x, label = world.data(n, 3, given)
    assert x.shape == (n, *world.shape) and x.dtype == torch.float32
    assert torch.equal(label, given) and label.dtype == torch.int64
    assert x.abs().max() <= (2 if name == "ring" else 1)
    again, other = world.data(n, 3, given)[0], world.data(n, 4, given)[0]
    assert torch.equal(x, again) and (x != other).flatten(1).any(1).all()
    drawn = world.data(60 * K, 3)[1]
    assert drawn.dtype == torch.int64 and torch.equal(drawn, world.data(60 * K, 3)[1])
    assert (drawn.bincount(minlength=K) > 30).all() and len(drawn.bincount()) == K

    measured = world.measure(x, label)
    extra = {"clips": {"motion", "moving"}, "voxels": {"iou", "connected"}}.get(name, set())
    common = {"fd", "patch_swd", "accuracy", "log_p", "diversity"}
    assert scores(measured) == common | extra
    assert measured["accuracy"] > 0.95 and abs(measured["diversity"] - 1) < 0.3
    assert measured["log_p"] < 0 and measured["fd"] > 0 and measured["patch_swd"] > 0
    assert world.measure(x, (label + 1) % K)["accuracy"] < 0.05
    means, covs = moments = world.moments(x, label)
    assert means.dtype == covs.dtype == torch.float64
    assert means.dim() == 2 and covs.shape == (*means.shape, means.shape[1])
    apart = moments_distance(moments, world.moments(other, label))
    assert apart > 0 and abs(moments_distance(moments, moments)) < 1e-3 * apart
    picture = world.picture(x[:5])
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    assert isinstance(getattr(world, "video", True), bool)


@pytest.mark.parametrize("name", WORLDS)
def test_world_has_one_kind_of_teacher(name):
    """A closed form with the attributes of a network, or the folder of one, or one clear line."""
    world = load_world(name)
    assert hasattr(world, "teacher") != hasattr(world, "teacher_folder")
    if name == "ring":
        net, (x, label) = world.teacher(), world.data(6, 0)
        assert not list(net.parameters()) and net is not world.teacher()
        assert net.prediction == "flow_v" and net.default_shift == 1
        assert net.cond_names == ("label",) and net.latent_shape == world.shape
        assert net(x, torch.full((6,), 0.5), label=label).shape == x.shape
    elif name == "shapes":
        with pytest.raises(UserError, match="no teacher ships for shapes"):
            world.teacher_folder()
    else:
        assert (Path(world.teacher_folder()) / "config.json").is_file()


@pytest.mark.parametrize("name", [name for name in WORLDS if hasattr(load_world(name), "scenes")])
def test_world_with_scenes(name):
    """scenes() is data() with maps of map_classes values; foreground finds the object again."""
    world = load_world(name)
    x, label, maps = world.scenes(40, 6)
    assert all(torch.equal(a, b) for a, b in zip((x, label), world.data(40, 6), strict=True))
    assert maps.shape == (40, *world.shape[-2:]) and maps.dtype == torch.uint8
    assert set(maps.unique().tolist()) == set(range(world.map_classes))
    foreground = world.foreground(x)
    assert foreground.dtype == torch.bool and foreground.shape == maps.shape
    assert (foreground == (maps > 0)).float().mean() > 0.9


@pytest.mark.parametrize("name", [name for name in WORLDS if hasattr(load_world(name), "space")])
def test_world_with_a_latent_space(name):
    """Latents of latent_shape stand for pixels in measure, moments, picture and foreground."""
    world = load_world(name)
    assert isinstance(world.space, LatentSpace)
    x, label = world.data(40, 6)
    z = world.space.to_latents(x)
    assert tuple(z.shape[1:]) == tuple(world.latent_shape) != world.shape
    decoded = world.space.to_pixels(z)
    assert world.measure(z, label) == world.measure(decoded, label)
    for a, b in zip(world.moments(z, label), world.moments(decoded, label), strict=True):
        assert torch.equal(a, b)
    assert np.array_equal(world.picture(z), world.picture(decoded))
    assert torch.equal(world.foreground(z), world.foreground(decoded))


def test_contract_names_every_attribute_that_is_used():
    """Whatever scripts, plumbing and orderings ask of a world stands in the contract."""
    contract = models.worlds.__doc__
    sources = [*ROOT.glob("*.py"), *(ROOT / "models").glob("*.py"), ROOT / "tests" / "orderings.py"]
    sources += [*(ROOT / "models" / "plumbing").glob("*.py")]
    text = "\n".join(path.read_text() for path in sources)
    used = set(re.findall(r"\bworld\.(\w+)|\bload_world\([^()]*\)\.(\w+)", text))
    used = {name for pair in used for name in pair if name}
    used |= set(re.findall(r"attr\(\s*(?:\w+\.)?world,\s*\"(\w+)\"", text))
    assert {"data", "measure", "moments", "picture", "num_classes"} <= used
    missing = {name for name in used if not re.search(rf"\b{name}\b", contract)}
    assert not missing


# ---- ring ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [None, 0, 3])
@pytest.mark.parametrize("t", [0.05, 0.3, 0.7, 0.95])
def test_ring_score_is_the_gradient_of_log_p(t, label):
    """The score read from the ring's velocity is autograd's of log p_t, and log p_t itself agrees.

    With and without a label.
    """
    ring, x = RingTeacher(), normal(16, 2)
    labels = None if label is None else torch.full((16,), label)
    x0, eps = to_x0_eps(ring(x, full(16, t), labels), "flow_v", x, full(16, 1 - t), full(16, t))
    score = from_x0_eps("score", x0, eps, full(16, 1 - t), full(16, t))
    want = gradient(lambda y: log_density(ring, y, 1 - t, t, label), x)
    torch.testing.assert_close(score, want, rtol=1e-9, atol=1e-9)
    log_p = ring.posterior(x, full(16, 1 - t), full(16, t), labels)[0]
    torch.testing.assert_close(log_p, log_density(ring, x, 1 - t, t, label))


def test_ring_posterior_serves_vp_schedules():
    """posterior takes any alpha, sigma: score = (a E[x0 | x] - x) / s^2 (Tweedie) under VP too."""
    ring, x, t = RingTeacher(), normal(8, 2), full(8, 0.4)
    a, s = VP().alpha(t), VP().sigma(t)
    score = (a[:, None] * ring.posterior(x, a, s)[1] - x) / s[:, None] ** 2
    want = gradient(lambda y: log_density(ring, y, float(a[0]), float(s[0])), x)
    torch.testing.assert_close(score, want, rtol=1e-9, atol=1e-9)


def test_ring_null_label_is_no_label():
    """label None and the null label K mean the same mixture; a label keeps two opposite modes."""
    ring, x, t = RingTeacher(), normal(8, 2), full(8, 0.4)
    assert torch.equal(ring(x, t), ring(x, t, torch.full((8,), NULL)))
    members = ring.members(torch.arange(5))
    assert members.sum(1).tolist() == [2, 2, 2, 2, 8]
    torch.testing.assert_close(ring.means[members[1]].sum(0), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("t", [0.4, 0.8])
def test_ring_velocity_is_the_conditional_expectation(t):
    """v(x_t, t) = E[eps - x0 | x_t], within five standard errors of an independent estimate.

    It weighs 200,000 draws of x0 by self-normalised importance.
    """
    world, query = Ring(), normal(6, 2, seed=3) * 0.6
    x0 = world.data(200000, 5)[0].double()
    eps = (query[:, None] - (1 - t) * x0) / t  # (6, n, 2): the noise that joins x0 and the query
    w = (-eps.square().sum(-1) / 2).softmax(1)[..., None]  # p(x_t | x0) is N((1 - t) x0, t^2)
    v = ((eps - x0) * w).sum(1)
    error = (w**2 * (eps - x0 - v[:, None]) ** 2).sum(1).sqrt()
    assert error.max() < 0.06
    assert ((world.exact(query, full(6, t)) - v).abs() < 5 * error).all()


@pytest.mark.parametrize("t", [0.2, 0.6])
def test_guidance_adds_the_classifier_gradient(t):
    """v_c - v_u = -(t / (1 - t)) grad log p_t(c | x): guidance follows an implied classifier."""
    ring, x = RingTeacher(), normal(16, 2)
    for c in range(4):

        def log_p_of_class(y, c=c):
            return log_density(ring, y, 1 - t, t, c) - log_density(ring, y, 1 - t, t)

        difference = ring(x, full(16, t), torch.full((16,), c)) - ring(x, full(16, t))
        classifier = gradient(log_p_of_class, x)
        torch.testing.assert_close(difference, -t / (1 - t) * classifier, rtol=1e-8, atol=1e-8)


def test_ring_velocity_is_finite_at_both_ends():
    """v stays finite at t = 0 and at t = 1, where it is x minus the mean (the origin).

    In float32 as well.
    """
    ring = RingTeacher()
    for dtype in (torch.float32, torch.float64):
        x = normal(8, 2).to(dtype)
        assert ring(x, full(8, 0.0, dtype)).isfinite().all()
        torch.testing.assert_close(ring(x, full(8, 1.0, dtype)), x)


def test_ring_data_honours_labels_and_seed():
    """Given labels come back, and every point lies at a mode of its class; all modes occur.

    The same seed gives the same points, another seed others.
    """
    world, label = Ring(), balanced_labels(400, 4)
    x, got = world.data(400, 7, label)
    assert torch.equal(got, label) and x.dtype == torch.float32
    for points, classes in ((x, label), world.data(400, 7)):
        nearest = torch.cdist(points.double(), world.exact.means).min(1)
        assert torch.equal(nearest.indices % 4, classes) and nearest.values.max() < 0.5
        assert len(nearest.indices.unique()) == 8
    assert torch.equal(world.data(400, 7)[0], world.data(400, 7)[0])
    assert not torch.equal(world.data(400, 7)[0], world.data(400, 8)[0])


def test_ring_measure_tells_data_from_failures():
    """Fresh data score near zero; each failure shows in the number that should show it.

    The failures are a lost mode, a collapse and wrong labels.
    """
    world, label = Ring(), balanced_labels(1000, 4)
    x, _ = world.data(1000, 21, label)
    good = world.measure(x, label)
    assert good["fd"] < 10 and good["accuracy"] > 0.99 and abs(good["diversity"] - 1) < 0.05
    noise = torch.randn(1000, 2, generator=generator())
    one_mode = world.exact.means[label].float() + 0.1 * noise  # never modes 4 to 7
    lost = world.measure(one_mode, label)
    assert lost["fd"] > 50 * good["fd"] and lost["patch_swd"] > 3 * good["patch_swd"]
    assert lost["accuracy"] > 0.99 and lost["diversity"] < 0.5
    collapsed = world.measure(world.exact.means[label].float(), label)
    assert collapsed["diversity"] < 1e-6 and collapsed["accuracy"] == 1.0
    assert world.measure(x, (label + 1) % 4)["accuracy"] < 0.01


# ---- measures ------------------------------------------------------------------------------------


def random_covariance(d, seed):
    a = normal(d, d, seed=seed)
    return a @ a.T / d + 0.1 * torch.eye(d, dtype=torch.float64)


def test_frechet_distance_of_one_dimensional_gaussians():
    """In one dimension it is (m1 - m2)^2 + (s1 - s2)^2."""
    m1, s1, m2, s2 = 0.3, 1.7, -0.4, 0.6
    got = frechet_distance(full(1, m1), full(1, s1**2)[None], full(1, m2), full(1, s2**2)[None])
    assert got == pytest.approx((m1 - m2) ** 2 + (s1 - s2) ** 2, rel=1e-10)


def test_frechet_distance_of_commuting_covariances():
    """With a common eigenbasis it is |m1 - m2|^2 + sum (sqrt l1 - sqrt l2)^2.

    A covariance may be singular.
    """
    q, m1, m2 = torch.linalg.qr(normal(4, 4))[0], normal(4), normal(4, seed=1)
    l1 = torch.tensor([1.0, 2.0, 0.5, 0.0]).double()
    l2 = torch.tensor([0.3, 2.5, 4.0, 1.0]).double()
    got = frechet_distance(m1, q @ l1.diag() @ q.T, m2, q @ l2.diag() @ q.T)
    want = (m1 - m2).square().sum() + (l1.sqrt() - l2.sqrt()).square().sum()
    assert got == pytest.approx(float(want), rel=1e-7)


def test_frechet_distance_of_any_covariances():
    """Without a common eigenbasis tr (C1^1/2 C2 C1^1/2)^1/2 needs the eigenvalues of C1 C2.

    It is the sum of their square roots. The distance is symmetric.
    """
    c1, c2 = random_covariance(5, 1), random_covariance(5, 2)
    m1, m2 = normal(5, seed=3), normal(5, seed=4)
    assert (c1 @ c2 - c2 @ c1).abs().max() > 0.1
    cross = torch.linalg.eigvals(c1 @ c2).real.sqrt().sum()
    want = float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross)
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(want, rel=1e-9)
    assert frechet_distance(m2, c2, m1, c1) == pytest.approx(want, rel=1e-9)
    assert frechet_distance(m1, c1, m1, c1) == pytest.approx(0, abs=1e-9)


def test_moments_distance_is_the_mean_over_groups():
    """Groups are compared one by one and averaged: equal groups in another order are not equal."""
    means, covs = normal(3, 2), torch.stack([random_covariance(2, k) for k in range(3)])
    a, b = (means, covs), (means.flip(0), covs.flip(0))
    assert moments_distance(a, a) == pytest.approx(0, abs=1e-9)
    one_by_one = [frechet_distance(means[k], covs[k], means[2 - k], covs[2 - k]) for k in range(3)]
    assert moments_distance(a, b) == pytest.approx(np.mean(one_by_one))


def test_sliced_wasserstein_of_equal_and_shifted_sets():
    """Equal sets in any order are at 0, a set shifted by d is at sqrt(mean (d . u)^2).

    With more directions u this tends to |d| / sqrt(dimension).
    """
    a, d = normal(300, 3), torch.tensor([0.5, -1.0, 2.0]).double()
    assert sliced_wasserstein(a, a.flip(0)) == 0
    many = sliced_wasserstein(a, a + d, directions=5000)
    assert many == pytest.approx(float(d.norm()) / 3**0.5, rel=0.02)
    once, twice = sliced_wasserstein(a, a + d), sliced_wasserstein(a, a + 2 * d)
    assert twice == pytest.approx(2 * once, rel=1e-9)


def test_sliced_wasserstein_of_scaled_gaussians():
    """N(0, 1) against N(0, 4) in any dimension is 1 along every direction, up to sampling."""
    got = sliced_wasserstein(normal(20000, 2), 2 * normal(20000, 2, seed=1))
    assert got == pytest.approx(1, abs=0.05)


def test_energy_distance():
    """A sum over all pairs; 2 |a - b| for two points; zero on average for equal distributions."""
    a, b = normal(40, 3), normal(30, 3, seed=1) + 0.5

    def pairs(x, y):
        return sum(float((p - q).norm()) for p in x for q in y)

    want = 2 * pairs(a, b) / 1200 - pairs(a, a) / (40 * 39) - pairs(b, b) / (30 * 29)
    assert energy_distance(a, b) == pytest.approx(want, rel=1e-9)
    assert energy_distance(torch.zeros(5, 1), torch.ones(4, 1)) == pytest.approx(2)
    sets = [(normal(200, 2, seed=k), normal(200, 2, seed=100 + k)) for k in range(20)]
    assert abs(sum(energy_distance(*pair) for pair in sets) / 20) < 0.01
    assert energy_distance(normal(200, 2), normal(200, 2, seed=9) + 0.5) > 0.1


def test_diversity_drops_when_samples_are_duplicated():
    """The mean distance within a class is exact on a square, and lower with duplicates.

    It is zero for one repeated sample and for a lone one.
    """
    square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [9.0, 9.0]])
    label = torch.tensor([0, 0, 0, 0, 1])
    got = pairwise_diversity(square, label, 2)
    assert got.tolist() == pytest.approx([(4 + 2 * 2**0.5) / 6, 0])
    repeated = square[[0, 0, 1, 1, 4]]
    assert pairwise_diversity(repeated, label, 2)[0] < got[0]
    assert pairwise_diversity(square[[0, 0, 0, 0, 4]], label, 2)[0] == 0
    # the distance between classes does not count
    far = square + 100.0 * label[:, None]
    assert torch.equal(pairwise_diversity(far, label, 2), got)


# ---- patches -------------------------------------------------------------------------------------


def patch_distance(a, b):
    return sliced_wasserstein(image_patches(a, seed=1), image_patches(b, seed=2))


def test_patches_see_grain_and_not_colour():
    """Grain on a plain image raises the patch distance in proportion; another colour does not."""
    plain = torch.full((50, 3, 16, 16), -0.5)
    recoloured = plain + torch.tensor([0.9, 0.2, 0.4])[:, None, None]
    grain = torch.randn(plain.shape, generator=generator())
    assert patch_distance(plain, recoloured) == pytest.approx(0, abs=1e-6)
    weak, strong = (patch_distance(plain + k * grain, recoloured) for k in (0.05, 0.1))
    assert weak > 0.03 and strong == pytest.approx(2 * weak, rel=1e-4)


def test_patches_are_windows_of_the_image_without_their_mean():
    """Every row is some window of its own image, channel by channel, minus that channel's mean."""
    x = normal(2, 3, 6, 5)
    patches = image_patches(x, size=4, per_image=3)
    assert patches.shape == (6, 48)
    for row, p in enumerate(patches.view(6, 3, 4, 4)):
        windows = [x[row % 2, :, i : i + 4, j : j + 4] for i in range(3) for j in range(2)]
        assert any(torch.allclose(p, w - w.mean((1, 2), keepdim=True)) for w in windows)


def test_patches_of_glyphs_tell_grain_from_fresh_glyphs():
    """Two fresh sets of glyphs are closer in patches than a set with grain is to either."""
    world = Glyphs()
    a, b = (world.data(300, seed, balanced_labels(300, 10))[0] for seed in (1, 2))
    grainy = a + 0.2 * torch.randn(a.shape, generator=generator())
    assert patch_distance(a, b) < 0.5 * patch_distance(grainy, b)


# ---- glyphs --------------------------------------------------------------------------------------


def test_glyphs_repeat_for_a_seed_and_differ_for_another():
    """Rendering is a function of label and seed; pixels are in [-1, 1], given labels come back."""
    world, label = Glyphs(), balanced_labels(40, 10)
    x, got = world.data(40, 3, label)
    again, other = world.data(40, 3, label)[0], world.data(40, 4, label)[0]
    assert torch.equal(got, label) and got.dtype == torch.int64
    assert x.shape == (40, 3, 16, 16) and x.dtype == torch.float32
    assert torch.equal(x, again) and ((x != other).flatten(1).any(1)).all()
    assert x.min() >= -1 and x.max() <= 1
    drawn = world.data(300, 3)[1]
    assert set(drawn.tolist()) == set(range(10)) and world.data(300, 3)[1].equal(drawn)


def test_every_factor_of_the_glyphs_varies():
    """All eleven factors spread over about [-1, 1]; those drawn separately are uncorrelated."""
    pixels, factors = render_glyphs(np.zeros(400, int), np.random.default_rng(0))
    assert pixels.dtype == np.uint8 and factors.shape == (400, 11)
    assert factors.min() >= -1.001 and factors.max() <= 1.001 and (factors.std(0) > 0.3).all()
    off = np.corrcoef(factors[:, [0, 1, 2, 3, 4, 8, 9, 10]].T) - np.eye(8)
    assert np.abs(off).max() < 0.2


def centre_of_ink(ink, along):
    """Centre of mass of ink (n, 16, 16) against positions `along`, which broadcast.  -> (n,)."""
    return (ink * along).sum((1, 2)) / ink.sum((1, 2))


@pytest.mark.parametrize(
    "factor, measure",
    [
        (0, lambda ink: centre_of_ink(ink, np.arange(16))),  # x moves the ink to the right
        (1, lambda ink: centre_of_ink(ink, np.arange(16)[:, None])),  # y moves it down
        (2, lambda ink: (ink.max(2) > 0.5).sum(1)),  # a larger size inks more rows
        (4, lambda ink: ink.sum((1, 2))),  # more weight is more ink
    ],
)
def test_factors_do_what_they_say(factor, measure):
    """The recorded factor and the picture agree: position moves ink, size and weight add to it."""
    pixels, factors = render_glyphs(np.full(300, 8), np.random.default_rng(1))
    colour, background = (factors[:, 5:8] + 1) / 2, (factors[:, 8:11] + 1) * 0.15
    ink = pixels / 255 - background[:, :, None, None]
    ink = (ink / (colour - background)[:, :, None, None]).mean(1)  # the coverage, from the colours
    assert np.corrcoef(measure(ink.clip(0, 1)), factors[:, factor])[0, 1] > 0.5


def test_glyphs_stay_inside_the_picture():
    """No digit is cut off: the outermost pixels carry almost no ink."""
    pixels, factors = render_glyphs(np.arange(500) % 10, np.random.default_rng(2))
    background = (factors[:, 8:11] + 1) * 0.15 * 255
    excess = np.abs(pixels - background[:, :, None, None]).max(1) > 60
    sides = excess[:, 0], excess[:, -1], excess[:, :, 0], excess[:, :, -1]
    assert np.any([side.any(1) for side in sides], axis=0).mean() < 0.03


def test_pictures_are_eight_bit_rows():
    """Glyphs become tiles and the ring a plot, (H, W, 3) uint8, clipped to the range of values."""
    x = Glyphs().data(4, 0)[0]
    tiles = Glyphs().picture(torch.cat([x, 5 * x]))
    assert tiles.shape == (50, 8 * 50, 3) and tiles.dtype == np.uint8
    first = ((x[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(tiles[1:-1:3, 1:49:3], first)
    plot = Ring().picture(3 * Ring().data(50, 0)[0])
    assert plot.shape == (220, 220, 3) and plot.dtype == np.uint8 and plot.min() < 200


# ---- clips ---------------------------------------------------------------------------------------


def clips(n, seed=0, label=None):
    """Clips and what rendering drew for them.

    -> x0 (n, 1, 8, 16, 16), label, middle (n, 2) and velocity (n, 2) in pixels, size, both greys.
    """
    label = balanced_labels(n, 6) if label is None else label
    x0, f = Clips().render(label.numpy(), np.random.default_rng(seed))
    f = torch.from_numpy(f)
    greys = 0.55 + 0.45 * f[:, 5], -0.7 + 0.3 * f[:, 6]
    path = 7.5 + 5 * f[:, :2], 1.3 * f[:, 2:4]
    return torch.from_numpy(x0), label, *path, 2.7 + 0.5 * f[:, 4], *greys


def test_clips_repeat_for_a_seed_and_stay_in_range():
    """Rendering is a function of label and seed, and the two greys are the extreme values.

    The whole shape stays in every frame.
    """
    world, label = Clips(), balanced_labels(60, 6)
    x, got = world.data(60, 3, label)
    assert torch.equal(got, label) and x.shape == (60, 1, 8, 16, 16) and x.dtype == torch.float32
    assert torch.equal(x, world.data(60, 3, label)[0])
    assert (x != world.data(60, 4, label)[0]).flatten(1).any(1).all()
    x, _, _, _, _, ink, paper = clips(600)
    assert x.min() >= -1 and x.max() <= 1
    torch.testing.assert_close(x.flatten(1).min(1).values, paper, rtol=1e-5, atol=1e-5)
    brightest = x.flatten(1).max(1).values
    assert (brightest <= ink + 1e-5).all() and (brightest > ink - 0.35 * (ink - paper)).all()
    border = torch.cat([x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]], -1)[:, 0].amax((1, 2))
    assert ((border - paper) < 0.5 * (ink - paper)).float().mean() > 0.97


def test_ink_moves_as_the_factors_say():
    """The ink's centre of mass, from the known greys, is middle + (frame - 3.5) velocity.

    Except for the triangle, whose own centre is elsewhere.
    """
    x, label, middle, v, _, ink, paper = clips(300)
    cover = (x[:, 0] - paper[:, None, None, None]) / (ink - paper)[:, None, None, None]
    cover = cover.clamp(0, 1)  # (n, 8, 16, 16)
    grid, total = torch.arange(16.0), cover.sum((2, 3))
    centre = [(cover * grid).sum((2, 3)) / total, (cover * grid[:, None]).sum((2, 3)) / total]
    centre = torch.stack(centre, -1)  # (n, 8, 2)
    want = middle[:, None] + (torch.arange(8) - 3.5)[:, None] * v[:, None]
    inside = label != list(SPEEDS).index("triangle")
    assert (centre - want)[inside].abs().max() < 0.2
    assert (centre.diff(dim=1) - v[:, None]).abs().mean() < 0.03


@pytest.mark.parametrize("kind", list(SPEEDS))
def test_class_fixes_the_law_of_the_speed(kind):
    """Share of still clips and range of the other speeds are the class's; speed() measures them."""
    still, low, high = SPEEDS[kind]
    x, _, _, v, *_ = clips(400, seed=5, label=torch.full((400,), list(SPEEDS).index(kind)))
    drawn, seen = v.norm(dim=1), Clips().speed(x)
    assert abs(float((drawn == 0).double().mean()) - still) < 0.08
    moving = drawn > 0
    assert drawn[moving].min() >= low - 1e-5 and drawn[moving].max() <= high + 1e-5
    assert drawn[moving].std() > 0.2 * (high - low)
    assert (seen - drawn).abs().mean() < 0.02
    assert float((seen > MOVING).double().mean()) == pytest.approx(1 - still, abs=0.08)


def test_speed_is_steady_under_grain():
    """Faint grain, as samples have it, changes the mean speed by less than 3 %.

    And it hardly ever makes a still clip count as moving.
    """
    x, *_ = clips(600)
    noisy = x + 0.05 * torch.randn(x.shape, generator=generator())
    a, b = Clips().speed(x), Clips().speed(noisy)
    assert b.mean() == pytest.approx(float(a.mean()), rel=0.03)
    assert ((a > MOVING) == (b > MOVING)).float().mean() > 0.99


def test_measure_of_clips_tells_failures():
    """Fresh clips score at the floor; each failure shows in the number that should show it.

    Frozen clips lose motion, clips at half speed lose part of it, and both show in fd; wrong
    classes show in accuracy, grain in patches.
    """
    world, label = Clips(), balanced_labels(600, 6)
    x, _ = world.data(600, 21, label)
    good = world.measure(x, label)
    assert good["accuracy"] > 0.99 and abs(good["diversity"] - 1) < 0.05
    assert abs(good["motion"] - 1) < 0.1 and abs(good["moving"] - 0.79) < 0.05
    frozen = world.measure(x[:, :, 3:4].expand(-1, -1, 8, -1, -1), label)
    assert frozen["motion"] < 0.05 and frozen["moving"] < 0.02 and frozen["fd"] > 3 * good["fd"]
    slow = world.measure(x[:, :, [2, 2, 3, 3, 4, 4, 5, 5]], label)
    assert 0.3 < slow["motion"] < 0.6 and slow["fd"] > 1.5 * good["fd"]
    assert world.measure(x, (label + 1) % 6)["accuracy"] < 0.02
    grainy = world.measure(x + 0.2 * torch.randn(x.shape, generator=generator()), label)
    assert grainy["patch_swd"] > 2 * good["patch_swd"]


def test_pictures_of_clips():
    """Four frames from top to bottom, one column a clip; a single frame is a row of tiles."""
    x = Clips().data(5, 0)[0]
    strip = Clips().picture(x)
    assert strip.shape == (4 * 50, 5 * 50, 3) and strip.dtype == np.uint8
    assert np.array_equal(strip[150:], Clips().picture(x[:, :, 7:]))
    assert not np.array_equal(strip[:50], strip[150:])


# ---- voxels --------------------------------------------------------------------------------------


def solids(kind, n, seed=0, **columns):
    """u (n, 9) uniform in [-1, 1], with the given columns set: solids("box", 5, x=0)."""
    names = ["x", "y", "z", "turn", "tilt_x", "tilt_y", "size", "p", "q"]
    u = np.random.default_rng(seed).uniform(-1, 1, (n, voxels.PARAMETERS)).astype(np.float32)
    for name, value in columns.items():
        u[:, names.index(name)] = value
    return u


def grid(cover):
    """(n, 4096) -> (n, 16, 16, 16): z, y, x."""
    return cover.reshape(-1, 16, 16, 16)


def along(kind, u, points):
    """Occupancy at the voxels nearest to points given along the solid's own axes.

    points (m, 3) in half extents -> (n, m).
    """
    h, rotation, centre = voxels.pose(kind, u)
    at = centre[:, None] + (points * h[:, None]) @ np.swapaxes(rotation, 1, 2)  # (n, m, 3)
    i = np.rint(at + 7.5).astype(int)
    cover, item = grid(voxels.occupancy(kind, u)), np.arange(len(u))[:, None]
    return cover[item, i[..., 2], i[..., 1], i[..., 0]]


def test_solids_repeat_for_a_seed_and_are_drawn_evenly():
    """Rendering is a function of label and seed; values are in [-1, 1] and reach both ends.

    Labels drawn are balanced, labels given come back.
    """
    world, label = load_world("voxels"), balanced_labels(40, 10)
    x, got = world.data(40, 3, label)
    assert torch.equal(got, label) and got.dtype == torch.int64
    assert x.shape == (40, 1, 16, 16, 16) and x.dtype == torch.float32
    assert torch.equal(x, world.data(40, 3, label)[0])
    assert (x != world.data(40, 4, label)[0]).flatten(1).any(1).all()
    assert (x.flatten(1).min(1).values == -1).all() and (x.flatten(1).max(1).values == 1).all()
    share = world.data(1000, 3)[1].bincount(minlength=10) / 1000
    assert len(share) == 10 and (share - 0.1).abs().max() < 4 * (0.1 * 0.9 / 1000) ** 0.5


@pytest.mark.parametrize("kind", list(SOLIDS))
def test_solids_stay_inside_the_grid(kind):
    """Moved as far as it may go in each direction, no solid loses volume."""
    still, corner = solids(kind, 60, x=0, y=0, z=0), solids(kind, 60)
    corner[:, :3] = np.sign(corner[:, :3])
    volume, moved = (voxels.occupancy(kind, u).sum(1) for u in (still, corner))
    assert np.abs(moved / volume - 1).max() < 0.12 and abs((moved / volume).mean() - 1) < 0.01
    h, rotation, centre = voxels.pose(kind, corner)
    assert (np.abs(centre).max(0) > 0.5).all()
    assert (np.abs(centre)[:, :, None] + np.abs(rotation) * h[:, None] < 8).all()


def volume(kind, u):
    """The solid's volume by school geometry, from its half extents.  -> (n,)."""
    x, y, z = voxels.half_extents(kind, u).T
    p, q = (u[:, 7] + 1) / 2, (u[:, 8] + 1) / 2
    if kind == "ellipsoid":
        return 4 / 3 * np.pi * x * y * z
    if kind == "box":
        return 8 * x * y * z
    if kind == "torus":
        tube = (0.21 + 0.09 * p) * x
        return 2 * np.pi * (x - tube) * np.pi * tube * z
    if kind == "cylinder":
        return np.pi * x**2 * 2 * z
    if kind == "cross":
        bar = 1 + 0.8 * p
        return 8 * bar**2 * (x + y + z - 2 * bar)
    if kind == "stairs":
        return 8 * x * y * z * 2 / 3
    if kind == "table":
        return 8 * x * y + 4 * 4 * (2 * z - 2)
    if kind == "chair":
        seat = (-0.25 + 0.35 * q) * z
        return 8 * x * y + 4 * 4 * (seat - 1 + z) + 4 * y * (z - seat - 1)
    if kind == "cone":
        return np.pi / 3 * 2 * z * (x**2 + x + 1)
    w = 0.55 * x
    return 2 * y * (4 * x * z - 2 * w * (2 * z - w - 2) - np.pi / 2 * w**2)  # arch


@pytest.mark.parametrize("kind", list(SOLIDS))
def test_volumes_of_solids(kind):
    """The sum of a solid's occupancy is its volume in any pose, and a little more along edges."""
    u = solids(kind, 60)
    ratio = voxels.occupancy(kind, u).sum(1) / volume(kind, u)
    assert ratio.min() > 0.99 and ratio.max() < 1.13 and ratio.mean() < 1.07


@pytest.mark.parametrize("kind, fold", list(SOLIDS.items()))
def test_solids_look_the_same_after_their_part_of_a_turn(kind, fold):
    """A class's fold is its symmetry about the vertical axis.

    A turn by 1 / fold changes nothing, half of that does; a solid of revolution may turn by any
    angle.
    """
    u = solids(kind, 20, p=-0.5)

    def turned(by):
        return voxels.occupancy(kind, u + by * np.eye(voxels.PARAMETERS)[voxels.TURN])

    def difference(a, b):
        return np.abs(a - b).sum(1) / b.sum(1)

    now = turned(0)
    if fold:
        assert difference(turned(2 / fold), now).max() < 1e-3
        assert difference(turned(1 / fold), now).min() > 0.05
        for smaller in range(fold + 1, 7):
            assert difference(turned(2 / smaller), now).max() > 0.05
    else:
        # in the middle of the grid, because a bounding box leaves more or less room as it turns
        u[:, :3] = 0
        assert difference(turned(0.37), turned(0)).max() < 1e-3


@pytest.mark.parametrize(
    "kind, empty, full",
    [
        (
            "ellipsoid",
            [(0.8, 0.8, 0), (0, 0.8, 0.8)],
            [(0, 0, 0), (0.7, 0, 0), (0, 0.7, 0), (0, 0, 0.7)],
        ),
        ("box", [], [(0, 0, 0), (0.7, 0.7, 0.7), (-0.7, 0.7, -0.7)]),
        (
            "torus",
            [(0, 0, z) for z in (-1, -0.5, 0, 0.5, 1)],
            [(0.75, 0, 0), (-0.75, 0, 0), (0, 0.75, 0), (0.53, -0.53, 0)],
        ),  # the hole, and the tube round it
        (
            "cylinder",
            [(0.85, 0.85, 0)],
            [(0, 0, 0.75), (0, 0, -0.75), (0.5, 0.5, 0.7), (0.75, 0, -0.7)],
        ),
        (
            "cross",
            [(0.7, 0.7, 0), (0.7, 0, 0.7), (0, -0.7, 0.7), (-0.7, -0.7, -0.7)],
            [(0.8, 0, 0), (-0.8, 0, 0), (0, 0.8, 0), (0, -0.8, 0), (0, 0, 0.8), (0, 0, -0.8)],
        ),
        (
            "stairs",
            [(-0.67, 0, 0.2), (-0.67, 0, 0.8), (0, 0, 0.9)],
            [(-0.67, 0, -0.75), (0, 0, -0.3), (0.67, 0, 0.6), (0.67, 0, -0.67)],
        ),
        (
            "table",
            [(0, 0, -0.7), (0, 0, 0), (0, -1, -0.5), (1, 0, -0.5)],
            [(0, 0, 0.8), (0.8, 0.75, -0.6), (-0.8, 0.75, -0.6), (0.8, -0.75, 0), (-0.8, -0.75, 0)],
        ),
        (
            "chair",
            [(0.2, 0, 0.6), (0.8, 0.7, 0.6), (0, 0, -0.8)],
            [
                (-0.75, 0, 0.7),
                (-0.75, 0.6, 0.5),
                (0.75, 0.7, -0.7),
                (0.75, -0.7, -0.7),
                (-0.75, -0.7, -0.7),
            ],
        ),
        (
            "cone",
            [(0.7, 0, 0.6), (0, 0.7, 0.6), (0, -0.8, 0.5)],
            [(0, 0, 0.7), (0.6, 0, -0.7), (0, -0.6, -0.7), (0, 0, -0.7)],
        ),
        (
            "arch",
            [(0, y, z) for y in (-1, 0, 1) for z in (-1, -0.5, 0)],
            [(0, 0, 0.75), (0.8, 0, -0.8), (-0.8, 0, -0.8), (0.8, 0, 0.5), (-0.8, 0, 0.5)],
        ),  # a way through
    ],
)
def test_every_solid_is_what_it_is_called(kind, empty, full):
    """Places that are empty or full in all of 40 poses: holes, legs, arms, steps, backs.

    They are given in the solid's own half extents.
    """
    u = solids(kind, 40)
    if empty:
        assert along(kind, u, np.array(empty)).max() < 0.5
    assert along(kind, u, np.array(full)).min() > 0.5


def test_factors_of_solids_are_where_they_are():
    """The first three factors are the centre of mass, where a solid has it in its middle.

    All ten factors are of about unit size and vary.
    """
    symmetric = ("ellipsoid", "box", "torus", "cylinder", "cross")
    label = np.repeat([list(SOLIDS).index(k) for k in symmetric], 30)
    x, factors = Voxels().render(label, np.random.default_rng(0))
    cover = (x.reshape(len(x), -1) + 1) / 2
    mass = (cover @ voxels.CENTRES.T) / cover.sum(1, keepdims=True)  # (n, 3)
    assert np.abs(mass - 3 * factors[:, :3]).max() < 0.15
    factors = Voxels().render(np.arange(500) % 10, np.random.default_rng(1))[1]
    assert factors.shape == (500, 10)
    assert np.abs(factors).max() < 2.2 and (factors.std(0) > 0.25).all()


def test_connected_is_one_piece():
    """One piece may touch by a corner and be as long as a snake.

    Two pieces, a piece with a stray voxel and an empty grid are not one piece.
    """
    full = np.zeros((7, 16, 16, 16), bool)
    full[0, 2:5, 3, 3] = True
    full[1, 2:5, 3, 3] = full[1, 5, 4, 4] = True  # by a corner
    full[2, 2:5, 3, 3] = full[2, 6, 3, 3] = True  # one voxel of air between
    # a snake: floors, joined at either end in turn
    full[3, ::2] = full[3, 1::4, 0, 0] = full[3, 3::4, 15, 15] = True
    full[4] = True
    # the grid does not wrap round
    full[5, 0, 0, 0] = full[5, 0, 0, 15] = full[5, 0, 15, 0] = True
    assert voxels.connected(full).tolist() == [True, True, False, True, True, False, False]
    x = Voxels().data(300, 8)[0]
    assert voxels.connected((x > 0)[:, 0].numpy()).mean() > 0.99


def test_overlap_of_shifted_boxes():
    """A 4x4x4 cube against itself one voxel on has 48 in common of 80; empty sets have nothing."""
    a, b, empty = np.zeros((3, 1, 16, 16, 16), bool)
    a[:, 2:6, 2:6, 2:6], b[:, 3:7, 2:6, 2:6] = True, True
    a, b, empty = (s.reshape(1, -1) for s in (a, b, empty))
    assert voxels.overlap(a, b)[0] == pytest.approx(48 / 80) and voxels.overlap(a, a)[0] == 1
    assert voxels.overlap(a, empty)[0] == 0 and voxels.overlap(empty, empty)[0] == 0


@pytest.mark.parametrize("kind", ["box", "chair", "torus"])
def test_fit_finds_a_solid_nearby(kind):
    """From a start some way off the fit comes back to the target.

    It never ends farther away than it began, and stays within the family.
    """
    u = solids(kind, 20)
    target = voxels.occupancy(kind, u)
    start = (u + np.random.default_rng(1).normal(0, 0.12, u.shape)).astype(np.float32)
    fitted = voxels.fit(kind, target, start)
    before, after = (((voxels.occupancy(kind, v) - target) ** 2).sum(1) for v in (start, fitted))
    assert (after <= before).all() and np.median(after) < 0.02 * np.median(before)
    moved = (fitted != start).any(1)
    assert moved.all() and np.abs(np.delete(fitted, voxels.TURN, 1)).max() <= 1


def test_iou_is_calibrated():
    """Fresh solids meet their family almost fully; noise, other classes and cut solids do not.

    The order in the batch does not matter.
    """
    world, label = load_world("voxels"), balanced_labels(100, 10)
    x, _ = world.data(100, 31, label)
    good = world.nearest(x, label)
    assert good.mean() > 0.97 and good.min() > 0.5
    assert np.allclose(world.nearest(x.flip(0), label.flip(0))[::-1], good)
    assert world.nearest(torch.randn(x.shape, generator=generator()), label).mean() < 0.2
    other = world.nearest(x, (label + 1) % 10)
    assert other.mean() < 0.5 and (other < good).mean() > 0.95
    half = x.clone()
    half[..., 8:] = -1
    assert world.nearest(half, label).mean() < good.mean() - 0.1
    assert not world.nearest(-torch.ones_like(x[:10]), label[:10]).any()


def test_measure_of_voxels_tells_failures():
    """Fresh solids score at the floor; each failure shows in the numbers that should show it.

    The failures are grain, blur, specks, wrong classes and a collapse.
    """
    world, label = load_world("voxels"), balanced_labels(150, 10)
    x, _ = world.data(150, 21, label)
    good = world.measure(x, label)
    assert good["accuracy"] > 0.98 and abs(good["diversity"] - 1) < 0.1
    assert good["iou"] > 0.97 and good["connected"] > 0.99
    grainy = world.measure(x + 0.3 * torch.randn(x.shape, generator=generator()), label)
    assert grainy["patch_swd"] > 2 * good["patch_swd"]
    blurred = world.measure(torch.nn.functional.avg_pool3d(x, 3, 1, 1), label)
    assert blurred["patch_swd"] > 2 * good["patch_swd"] and blurred["fd"] > 2 * good["fd"]
    assert blurred["iou"] < good["iou"] - 0.05
    specks = x.clone()
    specks[:, 0, 0, 0, 0] = specks[:, 0, 15, 15, 15] = 1.0
    specks = world.measure(specks, label)
    assert specks["connected"] < 0.02 and specks["iou"] > 0.93 and specks["accuracy"] > 0.9
    wrong = world.measure(x, (label + 1) % 10)
    assert wrong["accuracy"] < 0.02 and wrong["iou"] < 0.5 and wrong["log_p"] < good["log_p"] - 1
    collapsed = world.measure(x[:10].repeat(15, 1, 1, 1, 1), label)
    assert collapsed["diversity"] < 1e-6 and collapsed["accuracy"] > 0.9
    assert collapsed["fd"] > 5 * good["fd"]


def test_patches_of_voxels_are_windows_without_their_mean():
    """Every row is some 4x4x4 window of its own item, minus its mean."""
    x = normal(2, 1, 6, 6, 6)
    patches = voxels.voxel_patches(x, per_item=3)
    assert patches.shape == (6, 64)
    for row, p in enumerate(patches.view(6, 4, 4, 4)):
        corners = itertools.product(range(3), repeat=3)
        windows = [x[row % 2, 0, i : i + 4, j : j + 4, k : k + 4] for i, j, k in corners]
        assert any(torch.allclose(p, w - w.mean()) for w in windows)


def test_pictures_of_voxels():
    """One 96-pixel tile a solid: white for nothing, three lit faces for a full grid.

    What is hidden does not matter, what is in front does.
    """
    world, full = load_world("voxels"), torch.ones(1, 1, 16, 16, 16)
    x = world.data(3, 0)[0]
    tiles = world.picture(x)
    assert tiles.shape == (96, 3 * 96, 3) and tiles.dtype == np.uint8
    assert np.array_equal(tiles[:, 96:192], world.picture(x[1:2]))
    assert (world.picture(-full) == 255).all()
    whole = world.picture(full)
    assert 0.4 < (whole < 255).any(2).mean() < 0.9 and (whole[0] == 255).all()  # inside its tile
    # the top, and the sides to the left and to the right of the edge
    blues = [int(whole[y, x, 2]) for y, x in ((25, 48), (65, 25), (65, 70))]
    assert blues[0] > max(blues[1:]) + 40 and abs(blues[1] - blues[2]) > 25
    hollow, chipped = full.clone(), full.clone()
    hollow[:, :, 1:15, 1:15, 1:15] = -1
    chipped[:, :, 15, 15, 15] = -1  # z, y, x: the corner nearest to the eye
    assert np.array_equal(world.picture(hollow), whole)
    assert not np.array_equal(world.picture(chipped), whole)
    behind = full.clone()
    behind[:, :, 0, 0, 0] = -1
    assert np.array_equal(world.picture(behind), whole)
    low, high = (-full.clone() for _ in range(2))
    low[:, :, 2, 8, 8], high[:, :, 13, 8, 8] = 1, 1
    rows = [(world.picture(s) < 255).any(2).nonzero()[0].mean() for s in (low, high)]
    assert rows[1] < rows[0] - 30  # z is up


def test_samples_of_voxels_are_no_video(tmp_path):
    """Five axes, but no frames: only the clips get a GIF."""
    for name, files in (("voxels", ["samples.png"]), ("clips", ["samples.gif", "samples.png"])):
        world, folder = load_world(name), tmp_path / name
        folder.mkdir()
        report.save_samples(str(folder), [("data", world.data(3, 0)[0])], world)
        assert sorted(p.name for p in folder.iterdir()) == files


def test_shipped_classifier_of_voxels_is_small_and_right():
    """At most 300 kB, and at least 98 % right on fresh solids."""
    assert Path(load_world("voxels").folder("classifier.safetensors")).stat().st_size <= 300_000
    x, label = load_world("voxels").data(500, 99)
    assert (load_world("voxels").look(x)[1].argmax(1) == label).float().mean() > 0.98


# ---- the rest ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["moons", "ring"])
def test_command_refuses_what_has_no_files(name, capsys):
    """python -m models.worlds takes the worlds that have files: the ring is a formula."""
    with pytest.raises(SystemExit) as e:
        command([name])
    assert e.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(w in said for w in (name, *WORLDS[1:]))


def test_command_builds_the_files_of_one_world(monkeypatch):
    """The classifier and its statistics, and for shapes the autoencoder first."""
    built = []
    for part in ("build_autoencoder", "build_reference"):

        def note(world, part=part, **sizes):
            built.append((part, world.name))

        monkeypatch.setattr(f"models.worlds.__main__.{part}", note)
    command(["glyphs"])
    command(["shapes"])
    assert built == [
        ("build_reference", "glyphs"),
        ("build_autoencoder", "shapes"),
        ("build_reference", "shapes"),
    ]


def test_unknown_world_is_refused():
    """load_world names the worlds there are, and hands out one object per name."""
    with pytest.raises(ValueError, match="ring, glyphs, clips, shapes, voxels"):
        load_world("moons")
    assert load_world("ring") is load_world("ring")


@pytest.mark.parametrize("fit", [fit_ring_network, fit_ring_transformer])
def test_fitted_ring_network_approaches_the_exact_velocity(fit):
    """A fit is reproducible, and its network moves towards the closed form.

    It leaves the global generator alone.
    """
    teacher = RingTeacher()
    before = torch.get_rng_state()
    net, again = (fit(teacher, seed=3, steps=80, batch=128) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    pairs = zip(net.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    x0, label = Ring().data(500, 9)
    t = torch.rand(500, generator=generator())
    x = (1 - t[:, None]) * x0 + t[:, None] * torch.randn(500, 2, generator=generator(1))
    with torch.no_grad():
        v = teacher(x, t, label)
        assert (net(x, t, label=label) - v).square().mean() < 0.6 * v.square().mean()


def test_a_token_of_the_ring_transformer_knows_one_coordinate():
    """Reading the point from its coordinates gives it back, and tokens meet in attention alone."""
    net = perturbed(RingDiT(tokens=5, depth=2), std=0.2)
    x, t = torch.randn(6, 2, generator=generator()), torch.full((6,), 0.5)
    seen = x @ net.directions
    torch.testing.assert_close(seen @ net.directions.T * (2 / 5), x)
    assert torch.equal(seen[:, 0], x[:, 0])  # the first direction is the first axis
    other = x + torch.tensor([0.0, 1.0])  # another point with that coordinate
    with torch.no_grad():
        apart = (net(x, t, return_features=True) - net(other, t, return_features=True))[:, 0]
        for block in net.blocks:
            block.attend = lambda q, k, v: v  # each token for itself
        alone = (net(x, t, return_features=True) - net(other, t, return_features=True))[:, 0]
    assert apart.abs().max() > 1e-2 and alone.abs().max() < 1e-5


def test_ring_network_steps_and_features():
    """`steps` starts without effect and is refused unless built in; features are (B, 1, dim)."""
    x, t = torch.randn(5, 2, generator=generator()), torch.rand(5, generator=generator())
    label = torch.arange(5)
    net = RingMLP(dim=32, steps_cond=True)
    v = net(x, t, label=label)
    assert net(x, t, label=label, return_features=True).shape == (5, 1, 32)
    assert torch.equal(net(x, t, label=label, steps=torch.full((5,), 4)), v)
    assert torch.equal(net(x, t), net(x, t, label=torch.full((5,), NULL)))
    with pytest.raises(ValueError, match="steps_cond"):
        RingMLP(dim=32)(x, t, steps=torch.ones(5))
