"""models/metrics.py, image_sets.py, inception.py: sets of images, and distances between them."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import refusal_of
from PIL import Image
from safetensors.torch import load_file, save_file

from models import metrics
from models.networks import inception
from models.plumbing.image_sets import open_images
from models.plumbing.images import CROPS, to_square
from models.worlds.measures import frechet_distance


def normals(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(n, seed, height=8, width=8):
    """uint8 (n, H, W, 3)"""
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), np.uint8)


# ---- distances -----------------------------------------------------------------------------------


def test_frechet_distance_of_two_gaussians_in_closed_form():
    """Covariances that commute: the sum of (m1 - m2)^2 + (s1 - s2)^2 over the axes."""
    q = torch.linalg.qr(normals(6, 6, 0))[0]
    s1, s2 = torch.arange(1.0, 7), torch.arange(6.0, 0, -1) / 2
    m1, m2 = normals(1, 6, 1)[0], normals(1, 6, 2)[0]
    c1, c2 = (q @ torch.diag(s.double() ** 2) @ q.T for s in (s1, s2))
    exact = float((m1 - m2).square().sum() + (s1 - s2).square().sum())
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(exact, rel=1e-10)


def test_frechet_distance_equals_the_general_matrix_root():
    """tr (C1 C2)^1/2 by the eigenvalues of the product, which is not symmetric, as in scipy's
    sqrtm; covariances of fewer samples than dimensions too."""
    for n in (40, 9):
        a, b = normals(n, 12, 3), normals(n, 12, 4) @ normals(12, 12, 5) + 1
        (m1, c1), (m2, c2) = ((x.mean(0), x.T.cov()) for x in (a, b))
        root = torch.linalg.eigvals(c1 @ c2).real.clamp_min(0).sqrt().sum()
        exact = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * root
        assert frechet_distance(m1, c1, m2, c2) == pytest.approx(float(exact), rel=1e-5)


def test_frechet_distance_equals_a_public_implementation():
    """pytorch-fid's, which needs scipy and torchvision: skipped without them."""
    public = pytest.importorskip("pytorch_fid.fid_score", exc_type=ImportError)
    a, b = normals(40, 12, 3), normals(40, 12, 4) + 0.3
    moments = [x.mean(0) for x in (a, b)], [x.T.cov() for x in (a, b)]
    (m1, m2), (c1, c2) = moments
    theirs = public.calculate_frechet_distance(*(v.numpy() for v in (m1, c1, m2, c2)))
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(theirs, rel=1e-6)


def test_moments_of_batches_are_those_of_all():
    x = (1000 + 0.01 * normals(50, 5, 0)).float()
    moments = metrics.Moments()
    for part in x.split(7):
        moments.add(part)
    mean, cov = moments.result()
    torch.testing.assert_close(mean, x.double().mean(0))
    torch.testing.assert_close(cov, x.double().T.cov(), rtol=1e-9, atol=1e-14)


def test_kid_is_the_double_sum_over_different_rows():
    a, b = normals(7, 3, 0), normals(5, 3, 1) + 0.5

    def kernel(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    own = [
        sum(kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j)
        / (len(s) * (len(s) - 1))
        for s in (a, b)
    ]
    cross = sum(kernel(x, y) for x in a for y in b) / 35
    assert metrics.kernel_distance(a, b) == pytest.approx(own[0] + own[1] - 2 * cross, rel=1e-10)
    assert metrics.cubic_kernel_sum(a, b, rows=2) == pytest.approx(35 * cross, rel=1e-10)


def test_kid_is_unbiased():
    """Its mean over many pairs of small sets of one distribution is 0. That of the biased estimate,
    which has the kernel's diagonal in it, is not."""
    pairs = [(normals(6, 2, 2 * s), normals(6, 2, 2 * s + 1)) for s in range(400)]
    values = torch.tensor([metrics.kernel_distance(a, b) for a, b in pairs])
    biased = [
        (metrics.cubic_kernel_sum(a, a) + metrics.cubic_kernel_sum(b, b)) / 36
        - metrics.cubic_kernel_sum(a, b) / 18
        for a, b in pairs
    ]
    error = 3 * float(values.std() / 20)
    assert abs(float(values.mean())) < error < sum(biased) / 400


@pytest.mark.parametrize("k, rows", [(3, 2000), (3, 7), (1, 7), (5, 7)])
def test_precision_and_recall_are_their_definition(k, rows):
    """Balls reach to the k-th other row; a count of the row itself would make them smaller."""
    x, of = 1.5 * normals(60, 2, 0), normals(40, 2, 1)

    def inside(point):
        for i, center in enumerate(of):
            others = sorted(float((center - p).norm()) for j, p in enumerate(of) if j != i)
            if float((center - point).norm()) <= others[k - 1]:
                return True
        return False

    share = sum(inside(p) for p in x) / 60
    assert 0 < share < 1
    assert metrics.share_inside(x, of, k, rows) == pytest.approx(share)
    assert metrics.share_inside(of, of) == 1 and metrics.share_inside(of + 100, of) == 0


def test_a_ball_has_its_surface():
    """Points on a line, one apart: each is the nearest of the next, and 4 is as near to 3."""
    line = torch.arange(4.0)[:, None]
    assert metrics.share_inside(torch.tensor([[4.0], [-1.0], [4.5]]), line, k=1) == 2 / 3


def test_precision_is_of_the_samples_and_recall_of_the_reference(tmp_path, stub):
    """Samples from one corner of what the reference covers: all are precise, most is missed."""
    even = np.arange(40, dtype=np.uint8)[:, None, None, None] * 6
    even = np.broadcast_to(even, (40, 8, 8, 3))
    np.savez(tmp_path / "corner.npz", even[:8])
    np.savez(tmp_path / "all.npz", even)
    out = tmp_path / "out.json"
    flags = ["--samples", tmp_path / "corner.npz", "--reference", tmp_path / "all.npz", *stub]
    metrics.main([str(f) for f in [*flags, "--output", out]])
    found = json.loads(out.read_text())
    assert found["precision"] == 1 and 8 / 40 <= found["recall"] < 0.4


# ---- the network ---------------------------------------------------------------------------------


def random_inception():
    torch.manual_seed(0)
    net = inception.InceptionV3()
    for name, p in net.named_parameters():
        if name.endswith("bn.weight"):
            p.data.uniform_(0.5, 1.5)
        if name.endswith("bn.bias"):
            p.data.normal_(0, 0.3)
    for name, b in net.named_buffers():
        if name.endswith("running_mean"):
            b.normal_(0, 0.1)
        if name.endswith("running_var"):
            b.uniform_(0.3, 1)
    return net


# What each block computes, as torchvision's and pytorch-fid's code say it: branches of names, with
# "*" for a name whose layers are joined.
BLOCKS = {
    "A": "1x1; 5x5_1 5x5_2; 3x3dbl_1 3x3dbl_2 3x3dbl_3; average _pool",
    "B": "3x3/; 3x3dbl_1 3x3dbl_2 3x3dbl_3/; halve",
    "C": "1x1; 7x7_1 7x7_2 7x7_3; 7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5; average _pool",
    "D": "3x3_1 3x3_2/; 7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4/; halve",
    "E": "1x1; 3x3_1 3x3_2*; 3x3dbl_1 3x3dbl_2 3x3dbl_3*; average _pool",
    "F": "1x1; 3x3_1 3x3_2*; 3x3dbl_1 3x3dbl_2 3x3dbl_3*; maximum _pool",
}
ORDER = "5bA 5cA 5dA 6aB 6bC 6cC 6dC 6eC 7aD 7bE 7cF".split()


def plain_features(state, x):
    """x (B, 3, H, W), 0 to 255 -> features, from the weights alone."""

    def conv(name, x, stride=1, padded=True):
        w = state[f"{name}.conv.weight"]
        padding = tuple(k // 2 for k in w.shape[2:]) if padded and stride == 1 else 0
        x = F.conv2d(x, w, None, stride, padding)
        mean, var = state[f"{name}.bn.running_mean"], state[f"{name}.bn.running_var"]
        scale, shift = state[f"{name}.bn.weight"], state[f"{name}.bn.bias"]
        shaped = [v[:, None, None] for v in (mean, var, scale, shift)]
        return ((x - shaped[0]) / (shaped[1] + 0.001).sqrt() * shaped[2] + shaped[3]).relu()

    pools = {
        "average": mean_inside,
        "maximum": lambda x: F.max_pool2d(F.pad(x, (1, 1, 1, 1), value=-1e9), 3, 1),
        "halve": lambda x: F.max_pool2d(x, 3, 2),
    }
    x = F.interpolate(x.float() / 255, size=(299, 299), mode="bilinear") * 2 - 1
    x = conv("Conv2d_1a_3x3", x, stride=2)
    x = conv("Conv2d_2b_3x3", conv("Conv2d_2a_3x3", x, padded=False))
    x = conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", pools["halve"](x)), padded=False)
    x = pools["halve"](x)
    for block in ORDER:
        joined = []
        for branch in BLOCKS[block[2]].split("; "):
            h = x
            for step in branch.split():
                name = f"Mixed_{block[:2]}.branch{step.strip('*/')}"
                if step in pools:
                    h = pools[step](h)
                elif step.endswith("*"):
                    h = torch.cat([conv(name + "a", h), conv(name + "b", h)], 1)
                else:
                    h = conv(name, h, stride=2 if step.endswith("/") else 1)
            joined.append(h)
        x = torch.cat(joined, 1)
    return x.mean((2, 3))


def mean_inside(x):
    """The mean over 3 x 3, of what lies inside the image."""
    ones = torch.ones_like(x[:1, :1])
    kernel = torch.ones(1, 1, 3, 3)
    total = F.conv2d(x.flatten(0, 1)[:, None], kernel, padding=1).view_as(x)
    return total / F.conv2d(ones, kernel, padding=1)


@torch.no_grad()
def test_inception_equals_a_plain_second_implementation():
    state = random_inception().state_dict()
    x = torch.from_numpy(pictures(1, 0, 20, 31)).permute(0, 3, 1, 2)
    features, spatial = inception.load(state)(x)
    plain = plain_features(state, x)
    assert features.shape == (1, 2048) and spatial.shape == (1, 7, 17, 17) and plain.std() > 0.1
    assert float((features - plain).abs().max() / plain.abs().max()) < 1e-5


def test_inception_takes_no_other_network():
    state = dict(inception.InceptionV3().state_dict())
    with pytest.raises(ValueError, match=r"fc.weight is \(1000, 2048\), wanted \(1008, 2048\)"):
        inception.load(state | {"fc.weight": torch.zeros(1000, 2048)})
    with pytest.raises(ValueError, match="it has no Conv2d_1a_3x3.bn.bias"):
        inception.load({"w": torch.zeros(1)})


def test_resizing_as_tensorflow_1():
    """Enlarged twofold: every second number is an old one, the others lie between; the last repeats
    the edge. torch's own resizing is symmetric."""
    x = torch.tensor([0.0, 4, 8])[None, None, :, None].expand(1, 1, 3, 3)
    assert inception.to_side(x, "tf", 6)[0, 0, :, 0].tolist() == [0, 2, 4, 6, 8, 8]
    assert inception.to_side(x, "torch", 6)[0, 0, :, 0].tolist() == [0, 1, 3, 5, 7, 8]


# ---- the command ---------------------------------------------------------------------------------


class Stub:
    """In place of Inception: colours and a few pixels, and how many images it has seen."""

    seen = 0

    def __call__(self, x, resize):
        Stub.seen += len(x)
        return x.float().flatten(1)[:, :24] / 50, x[:, :1, :2, :2].float() / 50


@pytest.fixture
def stub(monkeypatch):
    Stub.seen = 0
    monkeypatch.setattr(metrics, "load_inception", lambda path: Stub())
    return ["--inception", __file__]


def save_folder(folder, x):
    folder.mkdir()
    for i, image in enumerate(x):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return folder


def test_the_same_images_in_three_forms(tmp_path, stub, monkeypatch):
    """npz, compressed npz, folder and safetensors: the same numbers. The cache is used, also after
    an interruption, and not for other content."""
    monkeypatch.setattr(metrics, "PART", 4)
    x, reference = pictures(10, 0), tmp_path / "b.npz"
    np.savez(reference, pictures(11, 1) // 2)
    np.savez(tmp_path / "a.npz", x, np.arange(10))
    np.savez_compressed(tmp_path / "c.npz", x)
    pixels = torch.from_numpy(x).permute(0, 3, 1, 2) / 127.5 - 1
    save_file({"x0": pixels.contiguous()}, tmp_path / "a.safetensors")
    sets = [tmp_path / "a.npz", save_folder(tmp_path / "a", x), tmp_path / "a.safetensors"]
    found = []
    for path in [*sets, tmp_path / "c.npz"]:
        flags = ["--samples", path, "--reference", reference, "--output", tmp_path / "out.json"]
        metrics.main([str(f) for f in [*flags, *stub]])
        found.append(json.loads((tmp_path / "out.json").read_text()))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)
    assert found[0]["samples"] == 10
    names = "samples reference patch_swd thumb_energy diversity fid sfid kid precision recall"
    assert list(found[0]) == names.split()
    seen = Stub.seen
    a, b = (
        Stub()(torch.from_numpy(v).permute(0, 3, 1, 2), "")[0].double()
        for v in (x, pictures(11, 1) // 2)
    )
    exact = frechet_distance(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())
    assert found[0]["fid"] == pytest.approx(exact, rel=1e-5)
    assert seen == 4 * 10 + 11
    parts = sorted((tmp_path / "a.npz.features").rglob("*.safetensors"))
    whole = [load_file(part) for part in parts]
    parts[1].unlink()  # interrupted after the first
    again = ["--samples", str(tmp_path / "a.npz"), "--reference", str(reference), *stub]
    metrics.main(again)
    assert len(parts) == 3 and Stub.seen == 72 + 4
    for before, part in zip(whole, parts):  # each part's own images
        assert all(torch.equal(v, before[k]) for k, v in load_file(part).items())
    metrics.main([*again, "--resize", "tf"])
    assert Stub.seen == 76 + 21, "images resized in another way have other features"
    np.savez(tmp_path / "a.npz", pictures(10, 5))
    metrics.main(again)
    assert Stub.seen == 97 + 10


def test_statistics_as_reference(tmp_path, stub, monkeypatch, capsys):
    """mu and sigma alone give fid; with images beside them these give the rest."""
    monkeypatch.setattr(inception, "FEATURES", 24)
    x = pictures(40, 0)
    f = Stub()(torch.from_numpy(x).permute(0, 3, 1, 2), "")[0].double()
    numbers = dict(mu=f.mean(0).numpy(), sigma=f.T.cov().numpy())
    np.savez(tmp_path / "a.npz", x)
    np.savez(tmp_path / "s.npz", **numbers)
    np.savez(tmp_path / "both.npz", arr_0=pictures(9, 1), **numbers)
    flags = ["--samples", str(tmp_path / "a.npz"), *stub, "--output", str(tmp_path / "out.json")]
    metrics.main([*flags, "--reference", str(tmp_path / "s.npz")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert abs(found["fid"]) < 1e-4 and "kid" not in found and "patch_swd" not in found
    metrics.main([*flags, "--reference", str(tmp_path / "both.npz")])
    found = json.loads((tmp_path / "out.json").read_text())
    assert abs(found["fid"]) < 1e-4 and found["sfid"] > 1 and "recall" in found
    line = refusal_of(capsys, metrics.main, *flags[:2], "--reference", str(tmp_path / "s.npz"))
    assert "give --inception FILE" in line
    np.savez(tmp_path / "s.npz", mu=numbers["mu"] * np.nan, sigma=numbers["sigma"])
    line = refusal_of(capsys, metrics.main, *flags, "--reference", str(tmp_path / "s.npz"))
    assert "mu or sigma is not finite" in line
    np.savez(tmp_path / "s.npz", mu=numbers["mu"])
    line = refusal_of(capsys, metrics.main, *flags, "--reference", str(tmp_path / "s.npz"))
    assert "mu and sigma are (24,) and None" in line


def test_spatial_features_as_guided_diffusion_stores_them(tmp_path, stub, monkeypatch, capsys):
    """Rows, columns, channels, as TensorFlow has them; and such a file asks for its resizing."""
    x = torch.arange(2 * 7 * 17 * 17.0).view(2, 7, 17, 17)
    args = SimpleNamespace(resize="tf", batch_size=1)
    found = metrics.compute_features(lambda x, resize: (x[:, :, 0, 0], x), x, args)
    in_tensorflow = np.moveaxis(x.numpy(), 1, 3)  # what sess.run gives
    assert np.array_equal(found["spatial"].numpy(), in_tensorflow.reshape(2, -1))
    assert found["features"].shape == (2, 7)

    monkeypatch.setattr(inception, "FEATURES", 24)
    size = 7 * 17 * 17
    more = dict(mu_s=np.zeros(size), sigma_s=np.eye(size, dtype=np.float32))
    np.savez(tmp_path / "s.npz", mu=np.zeros(24), sigma=np.eye(24), **more)
    np.savez(tmp_path / "a.npz", pictures(9, 0))
    flags = ["--samples", str(tmp_path / "a.npz"), "--reference", str(tmp_path / "s.npz"), *stub]
    assert "give --resize tf" in refusal_of(capsys, metrics.main, *flags)


def test_sfid_of_statistics_is_of_their_own_mean_and_covariance(tmp_path, monkeypatch):
    """Features and maps that differ: fid is 0 for the one's numbers, sfid for the other's."""
    monkeypatch.setattr(inception, "FEATURES", 24)

    def net(x, resize):
        x = x.float() / 50
        return x.flatten(1)[:, :24], x.repeat(1, 3, 3, 3)[:, :7, :17, :17] + 1

    monkeypatch.setattr(metrics, "load_inception", lambda path: net)
    x = pictures(12, 0)
    args = SimpleNamespace(resize="tf", batch_size=12)
    found = metrics.compute_features(net, torch.from_numpy(x).permute(0, 3, 1, 2), args)
    pooled, layout = (found[k].double() for k in ("features", "spatial"))
    numbers = dict(mu=pooled.mean(0), sigma=pooled.T.cov(), sigma_s=layout.T.cov())
    np.savez(tmp_path / "a.npz", x)
    out = tmp_path / "out.json"
    flags = ["--samples", tmp_path / "a.npz", "--reference", tmp_path / "s.npz", "--inception", "x"]
    flags = [str(f) for f in [*flags, "--resize", "tf", "--output", out]]
    monkeypatch.setattr(metrics, "fingerprint", lambda paths: paths)
    for shift, sfid in ((0, 0), (0.1, 0.01 * 7 * 17 * 17)):
        np.savez(tmp_path / "s.npz", **numbers, mu_s=layout.mean(0) + shift)
        metrics.main(flags)
        found = json.loads(out.read_text())
        assert found["fid"] == pytest.approx(0, abs=1e-3)
        assert found["sfid"] == pytest.approx(sfid, abs=1e-2)


def test_pixels_alone(tmp_path, capsys):
    """Grain shows in patch_swd, colour in thumb_energy, sameness in diversity."""
    smooth = np.repeat(np.repeat(pictures(60, 0, 2, 2), 8, 1), 8, 2)
    np.savez(tmp_path / "a.npz", smooth)
    others = {
        "alike": np.repeat(np.repeat(pictures(60, 1, 2, 2), 8, 1), 8, 2),
        "grain": np.clip(smooth + pictures(60, 2, 16, 16) / 2 - 64, 0, 255).astype(np.uint8),
        "dark": smooth // 2,
        "same": smooth[:2].repeat(30, 0),
    }
    found = {}
    for name, x in others.items():
        np.savez(tmp_path / f"{name}.npz", x)
        flags = [str(tmp_path / f"{name}.npz"), "--reference", str(tmp_path / "a.npz")]
        metrics.main(["--samples", *flags, "--output", str(tmp_path / "out.json")])
        found[name] = json.loads((tmp_path / "out.json").read_text())
    assert "fid, sfid, kid, precision and recall are left out" in capsys.readouterr().out
    alike = found["alike"]
    assert found["grain"]["patch_swd"] > 2 * alike["patch_swd"]
    assert found["dark"]["thumb_energy"] > 2 * abs(alike["thumb_energy"])
    assert found["same"]["diversity"] < 0.7 < 0.9 < alike["diversity"] < 1.1


@pytest.mark.parametrize("crop", CROPS)
def test_both_sets_are_cut_in_the_way_that_was_asked_for(tmp_path, crop):
    """The same pictures, once as they are and once cut before."""
    x = pictures(12, 0, 16, 24)
    cut = [to_square(Image.fromarray(image), 8, crop) for image in x]
    np.savez(tmp_path / "wide.npz", x)
    np.savez(tmp_path / "cut.npz", np.stack(cut))
    out = tmp_path / "out.json"
    for samples, reference in (("cut", "wide"), ("wide", "cut")):
        flags = ["--samples", tmp_path / f"{samples}.npz", "--reference"]
        flags += [tmp_path / f"{reference}.npz", "--resolution", 8, "--crop", crop]
        metrics.main([str(f) for f in [*flags, "--output", out]])
        assert json.loads(out.read_text())["patch_swd"] == 0


def test_sets_that_are_refused(tmp_path, capsys, monkeypatch):
    """One line each, and the remedy works."""
    good, small = tmp_path / "good.npz", tmp_path / "small.npz"
    np.savez(good, pictures(4, 0))
    np.savez(small, pictures(4, 0, 6, 6))
    np.savez(tmp_path / "float.npz", pictures(4, 0) / 255)
    np.savez(tmp_path / "other.npz", images=pictures(4, 0))
    np.savez(tmp_path / "one.npz", pictures(1, 0))
    np.savez(tmp_path / "object.npz", np.array([{}], object))
    (tmp_path / "broken.npz").write_bytes(good.read_bytes()[:-40])
    (tmp_path / "empty").mkdir()
    mixed = save_folder(tmp_path / "mixed", pictures(3, 0))
    Image.fromarray(pictures(1, 0, 9, 5)[0]).save(mixed / "z.png")
    unread = save_folder(tmp_path / "unread", pictures(3, 0))
    (unread / "001.png").write_bytes(b"no image")
    save_file({"x0": torch.full((3, 3, 8, 8), float("nan"))}, tmp_path / "nan.safetensors")
    save_file({"x0": torch.zeros(3, 4, 8, 8)}, tmp_path / "latents.safetensors")
    save_file({"w": torch.zeros(3)}, tmp_path / "w.safetensors")
    cases = {
        "float.npz": "arr_0 is float64 (4, 8, 8, 3), wanted uint8",
        "other.npz": "has no arr_0, but images",
        "one.npz": "has 1 image(s); a comparison needs at least 2",
        "object.npz": "wanted uint8",
        "broken.npz": "is no npz",
        "empty": "has 0 image(s)",
        "mixed": "z.png has 5 x 9 pixels, others 8 x 8: cut all of them with --resolution N",
        "unread": "001.png cannot be read",
        "nan.safetensors": "x0 has numbers that are not finite",
        "latents.safetensors": "latents become images with python -m models.decode",
        "w.safetensors": "has no tensor x0, but w",
        "missing.npz": "is no npz",
        "missing": "does not exist",
        "small.npz": "--samples are 6 x 6 and --reference 8 x 8 pixels",
    }
    for name, text in cases.items():
        flags = ["--samples", str(tmp_path / name), "--reference", str(good)]
        assert text in refusal_of(capsys, metrics.main, *flags), name
    flags = ["--samples", str(good), "--reference", str(good), "--inception"]
    line = refusal_of(capsys, metrics.main, *flags, str(tmp_path / "w.safetensors"))
    assert "w.safetensors is not FID's Inception: it has no Conv2d_1a_3x3" in line
    monkeypatch.setattr(metrics, "load_inception", lambda path: Stub())
    (tmp_path / "good.npz.features").write_text("a file where the cache's folder would be")
    line = refusal_of(capsys, metrics.main, *flags, __file__)
    assert "name a place with --cache" in line
    metrics.main([*flags, __file__, "--cache", str(tmp_path / "cache")])
    for name in ("mixed", "small.npz"):  # the advice of both
        flags = ["--samples", str(tmp_path / name), "--reference", str(good)]
        metrics.main([*flags, "--resolution", "8"])


def test_batches_from_the_middle(tmp_path):
    x = pictures(5, 0)
    np.savez(tmp_path / "a.npz", x)
    images = open_images(tmp_path / "a.npz", "--samples")
    parts = [b.permute(0, 2, 3, 1).numpy() for b in images.batches(2, first=1)]
    assert [len(p) for p in parts] == [2, 2] and np.array_equal(np.concatenate(parts), x[1:])
