"""models/networks/adm.py: equal to guided-diffusion's and EDM's networks, written out here plainly.

Also names, clocks, released sizes, models/convert.py in and back, and a run on a folder of it.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import fill, read_log, refusal_of, relative
from safetensors.torch import load_file, save_file

import dmd
import latent_fm
from models import convert
from models.diffusion import Flow, to_x0_eps
from models.networks import adm, load_network, network_config, save_network
from models.networks.adm import (
    UNetModel,
    adm_config,
    edm_config,
    from_adm,
    from_edm,
    to_adm,
    to_edm,
)
from models.networks.autoencoders import PatchPCA
from models.networks.dit_imagenet import DiTTransformer2DModel
from models.plumbing.teachers import load_teacher, read_schedule

TINY = dict(
    image_size=8,
    in_channels=3,
    model_channels=32,
    out_channels=3,
    num_res_blocks=2,
    attention_resolutions=[2],
    channel_mult=[1, 2],
    num_classes=4,
    num_heads=2,
    convention="lfm",
)
RESAMPLING = dict(resblock_updown=True, num_heads=1, num_head_channels=16)
CASES = {  # changes of the config
    "LFM's CelebA": dict(num_classes=0),
    "ImageNet": dict(RESAMPLING, out_channels=6, convention="adm"),
    "new order": dict(use_new_attention_order=True, num_res_blocks=1),
    "added time": dict(use_scale_shift_norm=False, attention_resolutions=[1, 2]),
    "three levels": dict(RESAMPLING, channel_mult=[1, 1, 2], attention_resolutions=[4]),
}
EDM = dict(
    TINY,
    model_channels=128,
    num_res_blocks=1,
    resblock_updown=True,
    num_heads=1,
    num_head_channels=64,
    convention="edm",
)


def inputs(channels=3, side=8, classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, channels, side, side, generator=g)
    label = torch.tensor([0, min(2, classes), classes])  # the last is the null label
    return dict(x=x, t=torch.tensor([0.03, 0.5, 1.0]), label=label)


# ---- the two networks, written out. w: {official name: float64} ----------------------------------


def conv(w, name, h, **how):
    weight = w[f"{name}.weight"]
    return F.conv2d(h, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2, **how)


def norm(w, name, h):
    return F.group_norm(h, 32, w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)


def linear(w, name, h):
    return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def waves(clock, dim):
    angles = clock[:, None] * 10000 ** -(torch.arange(dim // 2) / (dim // 2)).double()
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def smaller(h):
    return (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4


def larger(h):
    return h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def attend(q, k, v):
    """One head. q, k, v (B, C, N) -> (B, C, N)."""
    return v @ (q.mT @ k / math.sqrt(q.shape[1])).softmax(-1).mT


def adm_block(w, name, h, emb, resample=lambda h: h):
    z = resample(F.silu(norm(w, f"{name}.in_layers.0", h)))
    z = conv(w, f"{name}.in_layers.2", z)
    both = linear(w, f"{name}.emb_layers.1", F.silu(emb))[..., None, None]
    if both.shape[1] == 2 * z.shape[1]:
        scale, shift = both.chunk(2, dim=1)
        z = norm(w, f"{name}.out_layers.0", z) * (1 + scale) + shift
    else:
        z = norm(w, f"{name}.out_layers.0", z + both)
    z = conv(w, f"{name}.out_layers.3", F.silu(z))
    h = resample(h)
    return z + (conv(w, f"{name}.skip_connection", h) if f"{name}.skip_connection.bias" in w else h)


def adm_attention(w, name, h, config):
    if f"{name}.qkv.weight" not in w:
        return h
    B, C, *size = h.shape
    per_head = config.get("num_head_channels", -1)
    heads = config["num_heads"] if per_head == -1 else C // per_head
    qkv = F.conv1d(norm(w, f"{name}.norm", h).flatten(2), w[f"{name}.qkv.weight"])
    qkv, D, out = qkv + w[f"{name}.qkv.bias"][:, None], C // heads, []
    for i in range(heads):
        if config.get("use_new_attention_order"):
            firsts = [i * D, C + i * D, 2 * C + i * D]
        else:
            firsts = [3 * i * D, 3 * i * D + D, 3 * i * D + 2 * D]
        out.append(attend(*(qkv[:, first : first + D] for first in firsts)))
    out = F.conv1d(torch.cat(out, dim=1), w[f"{name}.proj_out.weight"], w[f"{name}.proj_out.bias"])
    return h + out.unflatten(2, size)


def plain_adm(state, config, x, clock, y):
    """guided-diffusion's UNetModel; a label of -1 adds nothing.  -> (B, out_channels, H, W)"""
    w = {k: v.double() for k, v in state.items()}
    emb = waves(clock.double(), config["model_channels"])
    emb = linear(w, "time_embed.2", F.silu(linear(w, "time_embed.0", emb)))
    if config["num_classes"]:
        emb = torch.stack([e + w["label_emb.weight"][k] if k >= 0 else e for e, k in zip(emb, y)])
    h, levels, n = conv(w, "input_blocks.0.0", x.double()), len(config["channel_mult"]), 0
    skips = [h]
    for level in range(levels):
        for _ in range(config["num_res_blocks"]):
            n += 1
            h = adm_block(w, f"input_blocks.{n}.0", h, emb)
            h = adm_attention(w, f"input_blocks.{n}.1", h, config)
            skips.append(h)
        if level < levels - 1:
            n += 1
            if config.get("resblock_updown"):
                h = adm_block(w, f"input_blocks.{n}.0", h, emb, smaller)
            else:
                h = conv(w, f"input_blocks.{n}.0.op", h, stride=2)
            skips.append(h)
    h = adm_block(w, "middle_block.0", h, emb)
    h = adm_attention(w, "middle_block.1", h, config)
    h = adm_block(w, "middle_block.2", h, emb)
    n = -1
    for level in range(levels - 1, -1, -1):
        for _ in range(config["num_res_blocks"] + 1):
            n += 1
            h = adm_block(w, f"output_blocks.{n}.0", torch.cat([h, skips.pop()], dim=1), emb)
            h = adm_attention(w, f"output_blocks.{n}.1", h, config)
        last = 1 + (2**level in config["attention_resolutions"])
        if level and config.get("resblock_updown"):
            h = adm_block(w, f"output_blocks.{n}.{last}", h, emb, larger)
        elif level:
            h = conv(w, f"output_blocks.{n}.{last}.conv", larger(h))
    return conv(w, "out.2", F.silu(norm(w, "out.0", h)))


def edm_block(w, name, h, emb):
    def resample(h):
        kernel = w.get(f"{name}.conv0.resample_filter")
        if kernel is None:
            return h
        kernel = kernel.tile(h.shape[1], 1, 1, 1)
        if name.endswith("_down"):
            return F.conv2d(h, kernel, groups=h.shape[1], stride=2)
        return F.conv_transpose2d(h, 4 * kernel, groups=h.shape[1], stride=2)

    z = conv(w, f"{name}.conv0", resample(F.silu(norm(w, f"{name}.norm0", h))))
    scale, shift = linear(w, f"{name}.affine", emb)[..., None, None].chunk(2, dim=1)
    z = conv(w, f"{name}.conv1", F.silu(shift + norm(w, f"{name}.norm1", z) * (scale + 1)))
    h = resample(h)
    h = z + (conv(w, f"{name}.skip", h) if f"{name}.skip.weight" in w else h)
    if f"{name}.qkv.weight" not in w:
        return h
    B, C, H, W = h.shape
    qkv = conv(w, f"{name}.qkv", norm(w, f"{name}.norm2", h))
    q, k, v = qkv.reshape(B * C // 64, 64, 3, H * W).unbind(2)
    return h + conv(w, f"{name}.proj", attend(q, k, v).reshape(B, C, H, W))


def plain_edm(state, x, clock, y, sides, n):
    """EDM's DhariwalUNet; y (B, K): one-hot, or zeros. sides: of the levels; n: num_blocks."""
    w = {k.removeprefix("model."): v.double() for k, v in state.items()}
    emb = waves(clock.double(), w["map_layer0.weight"].shape[1])
    emb = linear(w, "map_layer1", F.silu(linear(w, "map_layer0", emb)))
    emb = F.silu(emb + y.double() @ w["map_label.weight"].T)
    h, skips = conv(w, f"enc.{sides[0]}x{sides[0]}_conv", x.double()), []
    skips.append(h)
    for level, side in enumerate(sides):
        for name in ["down"] * (level > 0) + [f"block{k}" for k in range(n)]:
            h = edm_block(w, f"enc.{side}x{side}_{name}", h, emb)
            skips.append(h)
    for level, side in enumerate(sides[::-1]):
        for name in ["up"] if level else ["in0", "in1"]:
            h = edm_block(w, f"dec.{side}x{side}_{name}", h, emb)
        for k in range(n + 1):
            h = torch.cat([h, skips.pop()], dim=1)
            h = edm_block(w, f"dec.{side}x{side}_block{k}", h, emb)
    return conv(w, "out_conv", F.silu(norm(w, "out_norm", h)))


def precond(state, x, sigma, y, sides, n):
    """EDM's denoiser, Eq. 7 and Table 1 of 2206.00364, with sigma_data 0.5.  -> x0"""
    s = sigma.double()[:, None, None, None]
    root = (s**2 + 0.25).sqrt()
    inner = plain_edm(state, x / root, sigma.double().log() / 4, y, sides, n)
    return 0.25 / (s**2 + 0.25) * x + s * 0.5 / root * inner


def edm_state(prefix="model."):
    """A network of EDM's, whose weights hide nothing."""
    return {prefix + k: v for k, v in to_edm(fill(UNetModel(**EDM))).items()}


# ---- the same function ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_equal_to_the_plain_network(case):
    """Function and gradients, at every clock; the config is read back from the shapes."""
    config = {**TINY, **CASES[case]}
    net = fill(UNetModel(**config))
    state = to_adm(net)
    assert state["middle_block.1.qkv.weight"].dim() == 3
    call = inputs(classes=config["num_classes"])
    call["x"].requires_grad_()
    K, rate = config["num_classes"], {"lfm": (1, 0), "adm": (1000, -1)}[net.convention]
    y = [k if k < K else -1 for k in call["label"].tolist()]
    other = call["x"].detach().clone().requires_grad_()
    out = net(**call)
    want = plain_adm(state, config, other, rate[0] * call["t"].double() + rate[1], y)[:, :3]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weight).sum().backward()
    (want * weight).sum().backward()
    print(case, f"{relative(out, want):.1e} {relative(call['x'].grad, other.grad):.1e}")
    assert relative(out, want) <= 1e-5 and want.std() > 0.1
    assert relative(call["x"].grad, other.grad) <= 1e-5
    heads = None if CASES[case].get("num_head_channels") else 2
    read = adm_config(state, net.convention, 8, heads)
    shown = {k: v for k, v in net.config.items() if "head" not in k and "new_" not in k}
    assert shown.items() <= read.items()
    again = UNetModel(**{**net.config})
    again.load_state_dict(from_adm({f"module.{k}": v for k, v in state.items()}))
    back = to_adm(again)
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)


def test_equal_to_edms_network():
    """The velocity is that of EDM's denoiser at sigma = t / (1 - t), at its smallest and largest
    noise too; names and numbers pass both ways."""
    state = edm_state()
    config = edm_config(state, "edm")
    assert config == UNetModel(**{**EDM, "num_heads": 1}).config
    net = UNetModel(**config)
    net.load_state_dict(from_edm(state, config))
    call = inputs()
    call["t"] = torch.tensor([0.002 / 1.002, 0.4, 80 / 81])
    y = F.one_hot(call["label"], 5)[:, :4]
    a = (1 - call["t"].double())[:, None, None, None]
    with torch.no_grad():
        out = net(**call)
        sigma = call["t"].double() / (1 - call["t"].double())
        x0 = precond(state, call["x"].double() / a, sigma, y, [8, 4], 1)
        got = to_x0_eps(out, "flow_v", call["x"], 1 - call["t"], call["t"])[0]
        want = (call["x"] - x0) / call["t"].double()[:, None, None, None]
        assert relative(out[1:], want[1:]) <= 1e-5 and relative(got, x0) <= 1e-5
        ends = net(call["x"], torch.tensor([0.0, 0.5, 1.0]))
        assert ends.isfinite().all()
        raw = UNetModel(**{**config, "convention": "lfm"})  # LFM's networks of this form
        raw.load_state_dict(net.state_dict())
        want = plain_edm(state, call["x"], call["t"], y, [8, 4], 1)
        assert relative(raw(**call), want) <= 1e-5 and want.std() > 0.1
    back = to_edm(net)
    assert {f"model.{k}" for k in back} == state.keys()
    assert all(torch.equal(v, state[f"model.{k}"]) for k, v in back.items())
    assert sum("resample_filter" in k for k in back) == 4


def test_released_sizes():
    """Parameters as the papers count them: EDM's ImageNet-64 network has 295.9 million."""
    with torch.device("meta"):
        count = sum(p.numel() for p in UNetModel(**adm.EDM_IMAGENET_64).parameters())
        assert 295.5e6 < count < 296.3e6
        for config in (adm.LFM_ADM, adm.LFM_ADM_CELEBA_512, adm.LFM_ADM_CHURCH):
            assert UNetModel(**config).prediction == "flow_v"
        # ADM's class-conditional ImageNet 256 x 256 (Table 12 of 2105.05233): 554 million
        sizes = dict(image_size=256, in_channels=3, out_channels=6, num_classes=1000)
        levels = dict(channel_mult=[1, 1, 2, 2, 4, 4], attention_resolutions=[8, 16, 32])
        net = UNetModel(**{**adm.LFM_ADM, **sizes, **levels, "convention": "adm"})
        assert 553e6 < sum(p.numel() for p in net.parameters()) < 555e6


def test_a_new_network_is_zero_and_the_null_label_adds_nothing():
    net, call = UNetModel(**TINY), inputs()
    assert not net(**call).any()
    net = fill(net)
    with torch.no_grad():
        null = net(**{**call, "label": torch.full((3,), 4)})
        assert torch.equal(null, net(call["x"], call["t"]))
        net.label_emb.weight.zero_()
        assert torch.equal(null, net(**call))


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adm", "lfm", "edm"])
def test_converted_folders_are_teachers_and_go_back(tmp_path, kind):
    """In, --export back to the same bits, two updates of DMD, and samples by latent_fm.py."""
    if kind == "edm":
        state, flags = edm_state(), ["--prediction", "edm"]
    else:
        config = {**TINY, "convention": kind, "out_channels": 6 if kind == "adm" else 3}
        state = to_adm(fill(UNetModel(**config)))
        flags = ["--sample_size", "8", "--num_attention_heads", "2"]
        flags += ["--prediction", "flow_v", "--noise_at", "1"] if kind == "lfm" else []
    path, out = tmp_path / "official.safetensors", str(tmp_path / "out")
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    convert.main(["--input", str(path), "--output", out, *flags])
    teacher = load_teacher(out)
    assert type(teacher.net) is UNetModel and teacher.net.convention == kind
    assert isinstance(teacher.schedule, Flow) == (kind != "adm")
    back = str(tmp_path / "back.safetensors")
    convert.main(["--export", out, "--output", back, *(["--layout", "edm"] * (kind == "edm"))])
    back = load_file(back)
    assert back.keys() == {k.removeprefix("model.") for k in state}
    for k, v in state.items():
        assert torch.equal(back[k.removeprefix("model.")], v), k
    if kind == "edm":
        return
    run = str(tmp_path / "run")
    flags = "--student_steps 1 --train_batch_size 2 --max_train_steps 2 --preview_samples 2"
    flags += " --teacher_steps 2 --fake_update_ratio 1"
    flags += f" --guidance_scale {2 if kind == 'lfm' else 1}"  # ADM's null label was never trained
    dmd.main(["--teacher", out, "--output_dir", run, *flags.split()])
    assert len(read_log(tmp_path / "run")) == 2
    ours, _ = load_network(f"{run}/student")
    assert ours.config == teacher.net.config
    flags = "--samples 3 --sample_steps 2 --solver euler --guidance_scale 1 --format npz"
    latent_fm.main(["--sample", out, "--output_dir", str(tmp_path / "s"), *flags.split()])
    assert (tmp_path / "s" / "samples.npz").is_file()


def test_what_the_files_of_adm_do_not_show(tmp_path, capsys):
    """Its ImageNet models: at 64 x 64 a cosine schedule and the new order, at 128 x 128 four heads.

    By guided-diffusion's README; weights of another choice have the same shapes.
    """
    wide = {**TINY, "model_channels": 64, "out_channels": 6, "convention": "adm"}
    path = tmp_path / "official.safetensors"
    save_file({k: v.contiguous() for k, v in to_adm(fill(UNetModel(**wide))).items()}, path)

    def converted(name, *flags):
        out = str(tmp_path / name)
        convert.main(["--input", str(path), "--output", out, *flags])
        return load_teacher(out)

    at_64 = converted("64", "--sample_size", "64", "--new_attention_order")

    def f(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0.25, 0.5, 0.75):
        alpha = float(at_64.schedule.alpha(torch.tensor(t, dtype=torch.float64)))
        assert alpha == pytest.approx((f(t) / f(0)) ** 0.5, rel=1e-6)
    saved = json.loads((tmp_path / "64" / "sampler.json").read_text())
    assert read_schedule(saved["schedule"]).betas == at_64.schedule.betas
    other = "--sample_size 64 --new_attention_order --noise_schedule linear".split()
    linear = converted("linear", *other)
    assert linear.schedule.betas == "linear"
    heads = {name: converted(name, "--sample_size", name).net.config for name in ("128", "256")}
    assert (heads["128"]["num_heads"], heads["128"]["num_head_channels"]) == (4, -1)
    assert (heads["256"]["num_heads"], heads["256"]["num_head_channels"]) == (1, 64)
    flags = ["--input", str(path), "--output", str(tmp_path / "n"), "--noise_schedule", "cosine"]
    flags += ["--sample_size", "64", "--prediction", "flow_v", "--noise_at", "1"]
    assert "others have none: leave it out" in refusal_of(capsys, convert.main, *flags)


def test_what_cannot_be_converted_is_named(tmp_path, capsys):
    state, edm = to_adm(fill(UNetModel(**TINY))), edm_state()
    flow = ["--prediction", "flow_v", "--noise_at", "1"]
    cases = [
        (state, flow, "ADM's weights do not show sample_size: give it"),
        (state, [*flow, "--sample_size", "9"], "image_size = 9 cannot be halved"),
        ({k: v for k, v in state.items() if k != "out.2.weight"}, [*flow, "--sample_size", "8"],
         "no tensor 'out.2.weight': ADM's network has one"),
        ({**edm, "model.map_augment.weight": torch.zeros(128, 9)}, ["--prediction", "edm"],
         "'map_augment.weight' is no parameter of DhariwalUNet"),
        (state, ["--prediction", "edm"], "--prediction edm is for EDM's DhariwalUNet"),
        (state, ["--prediction", "flow_v", "--noise_at", "0"], "--noise_at 0 is for SiT"),
        (edm, [], "--prediction eps is not what a DhariwalUNet has: give --prediction edm"),
    ]  # fmt: skip
    for i, (tensors, flags, message) in enumerate(cases):
        path = tmp_path / f"{i}.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
        flags = ["--input", str(path), "--output", str(tmp_path / "out"), *flags]
        assert message in refusal_of(capsys, convert.main, *flags)


def test_what_cannot_be_exported_is_named(tmp_path, capsys):
    """A network without official names, of another form, with a projection that has none."""
    made = {
        "adm": UNetModel(**TINY),
        "map": UNetModel(**{**TINY, "in_channels": 6, "context_channels": 2, "context_width": 3}),
        "dit": DiTTransformer2DModel(2, 8, 4, 8, num_layers=1, sample_size=8),
        "pca": PatchPCA(3, 2, 4),
    }
    for name, net in made.items():
        save_network(net, network_config(net), str(tmp_path / name))
    for name, layout, message in [
        ("adm", "edm", "DhariwalUNet has 64 channels a head"),
        ("adm", "dit", "--layout dit: a UNetModel has adm or edm: give that"),
        ("map", "adm", "its context has a projection"),
        ("dit", "edm", "--layout edm: a DiTTransformer2DModel has dit: give that"),
        ("pca", None, "is a PatchPCA: only DiTTransformer2DModel and UNetModel"),
    ]:
        flags = ["--export", str(tmp_path / name), "--output", str(tmp_path / "x.safetensors")]
        flags += ["--layout", layout] if layout else []
        assert message in refusal_of(capsys, convert.main, *flags)
    flags = ["--input", "x.safetensors", "--output", str(tmp_path / "y"), "--layout", "adm"]
    assert "--layout has an effect only with --export" in refusal_of(capsys, convert.main, *flags)
    flags = ["--export", str(tmp_path / "adm"), "--output", str(tmp_path / "y")]
    for unread in (
        "--noise_at 0",
        "--sample_size 8",
        "--new_attention_order",
        "--noise_schedule linear",
    ):
        says = refusal_of(capsys, convert.main, *flags, *unread.split())
        assert "describes the file of --input: leave it out with --export" in says
    assert not (tmp_path / "y").exists()


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(convention="sit"), "convention = 'sit' is unknown; known are 'adm', 'lfm'"),
        (dict(out_channels=4), "out_channels = 4 is not implemented"),
        (dict(image_size=9), "image_size = 9 cannot be halved 1 times"),
        (dict(model_channels=48), "model_channels = 48 must be a multiple of 32"),
        (dict(context_width=2, in_channels=5), "context_width = 2 needs context_channels"),
        (dict(num_heads=3), "64 channels do not divide into num_heads = 3"),
        (dict(channel_mult=[1, 0]), "channel_mult"),
    ],
)
def test_wrong_configs_are_named(change, message):
    with pytest.raises(ValueError, match=message) as error:
        UNetModel(**{**TINY, **change})
    assert "\n" not in str(error.value)


def test_config_is_json():
    net = UNetModel(**TINY, context_channels=0)
    assert json.loads(json.dumps(net.config)) == net.config
