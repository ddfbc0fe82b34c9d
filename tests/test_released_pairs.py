"""Every pair of a method and a released teacher, on two gloo ranks, from a folder of diffusers.

Each run makes a few updates, in full or as adapters, on two ranks of one torchrun (tests/ranks.py),
with gradient checkpointing, and with the guidance, shift and steps that its release prescribes. It
must be the run of one process without checkpointing that adds up two micro-batches. --sample draws
from its student what it drew itself, and diffusers loads it as the same function. --long runs all.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers import fill, read_log, refusal_of, relative, weights
from ranks import ADAM, NAME, TINY, start
from released import COGVIDEOX, LUMINA2, PIXART, QWEN_IMAGE, WAN, Z_IMAGE
from safetensors.torch import load_file, save_file
from test_dit_imagenet import TINY as TINY_DIT
from test_dit_imagenet import inputs as dit_inputs
from test_dit_imagenet import noise as dit_noise
from test_networks import TINY_SD, TINY_SDXL
from test_trellis import CLASSES, points
from test_trellis import save_root as save_trellis
from test_unet import inputs as unet_inputs
from test_unet import pipeline as unet_pipeline
from test_unet import theirs as unet_noise
from test_wan import TINY_5B, with_token_times

import latent_fm
from models.files import save_json
from models.networks import dit_imagenet, load_network, lora
from models.networks.trellis import SLatFlowModel, SparseStructureFlowModel
from models.plumbing import releases
from tests.schedulers import SCHEDULERS

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

# ---- the teachers --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A released teacher, with networks of a few thousand weights.

    release     its row of releases.py
    shape       of a sample
    pipeline    of diffusers, by name
    network     of diffusers, by name; config: its arguments
    call        -> arguments of our network; reference: (network of diffusers, them) -> the same
    """

    release: str
    shape: tuple
    pipeline: str
    network: str
    config: dict
    call: Callable
    reference: Callable
    text: tuple = (9, 10)  # tokens of a prompt and their width
    mask: str | None = None


def of_released(release, pipeline, model, **more):
    """A Family of one of the transformers of tests/released.py."""
    config = more.pop("config", model.tiny)
    shape = (model.channels(config), *model.size)
    given = dict(call=lambda: model.inputs(config), reference=model.reference, mask=model.mask)
    return Family(release, shape, pipeline, model.name, config, **{**given, **more})


def unet(release, pipeline, config):
    how = config, lambda: unet_inputs(config), unet_noise
    return Family(release, (4, 8, 8), pipeline, "UNet2DConditionModel", *how, text=(5, 10))


FAMILIES = {
    "SD 1.5": unet("Stable Diffusion 1.5", "StableDiffusionPipeline", TINY_SD),
    "SDXL": unet("SDXL base 1.0", "StableDiffusionXLPipeline", TINY_SDXL),
    "PixArt": of_released("PixArt-alpha 512", "PixArtAlphaPipeline", PIXART),
    "DiT": Family(
        "DiT-XL/2 256",
        (4, 8, 8),
        "DiTPipeline",
        "DiTTransformer2DModel",
        TINY_DIT,
        dit_inputs,
        dit_noise,
        text=(),
    ),
    "Wan 2.1": of_released("Wan 2.1 T2V 1.3B", "WanPipeline", WAN),
    "Wan 2.2": of_released("Wan 2.2 T2V A14B", "WanPipeline", WAN),
    "Wan 5B": of_released(
        "Wan 2.2 TI2V 5B", "WanPipeline", WAN, config=TINY_5B, reference=with_token_times
    ),
    "CogVideoX": of_released("CogVideoX-2B", "CogVideoXPipeline", COGVIDEOX, text=(5, 10)),
    "Qwen-Image": of_released("Qwen-Image", "QwenImagePipeline", QWEN_IMAGE),
    "Lumina 2": of_released("Lumina-Image 2.0", "Lumina2Pipeline", LUMINA2),
    "Z-Image": of_released("Z-Image", "ZImagePipeline", Z_IMAGE),
}
STAGES = {"structure": SparseStructureFlowModel, "latents": SLatFlowModel}


def random_network(family, seed=0):
    """A network of diffusers' class whose weights hide nothing."""
    torch.manual_seed(seed)
    net = fill(getattr(diffusers, family.network)(**family.config), seed)
    if family.network == "DiTTransformer2DModel":
        first, *others = (block.norm1.emb for block in net.transformer_blocks)
        for other in others:  # equal in every released checkpoint
            other.load_state_dict(first.state_dict())
    return net


def parts_of(name):
    """Names of the networks in the family's folder."""
    if FAMILIES[name].network == "UNet2DConditionModel":
        return ["unet"]
    return ["transformer", "transformer_2"] if name == "Wan 2.2" else ["transformer"]


def save_root(name, root):
    """A pipeline root without text encoders and VAE. Network and scheduler are diffusers' own."""
    family, parts = FAMILIES[name], parts_of(name)
    for seed, part in enumerate(parts):
        random_network(family, seed).save_pretrained(root / part)
    scheduler = SCHEDULERS[family.release]
    kind = getattr(diffusers, scheduler["_class_name"])
    kind.from_config(scheduler).save_pretrained(root / "scheduler")
    index = {part: ["diffusers", family.network] for part in parts}
    index |= {"boundary_ratio": 0.875} if name == "Wan 2.2" else {}
    save_json({"_class_name": family.pipeline, **index}, str(root / "model_index.json"))


def pipeline_of(name, net):
    """The family's pipeline around a network, to load adapters."""
    if FAMILIES[name].network == "UNet2DConditionModel":
        return unet_pipeline(net, None)
    none = dict.fromkeys(("vae", "text_encoder", "tokenizer", "scheduler"))
    return getattr(diffusers, FAMILIES[name].pipeline)(transformer=net, **none)


def conditions(name, rows, seed):
    """Random features of prompts, {name: (rows, ...)}; where there is a mask, of many lengths."""
    family, g = FAMILIES[name], torch.Generator().manual_seed(seed)
    if not family.text:
        return {"label": torch.arange(rows) % family.config["num_embeds_ada_norm"]}
    L, D = family.text
    found = {"text": torch.randn(rows, L, D, generator=g)}
    if family.mask:
        lengths = torch.tensor([4, L, 1, 6][:rows])
        found[family.mask] = torch.arange(L) < lengths[:, None]
    if name == "SDXL":
        found["pooled"] = torch.randn(rows, 5, generator=g)
        found["size"] = torch.tensor([[64, 64, 0, 8 * i, 64, 64] for i in range(rows)])
    return found


def save_teacher(name, root):
    """A folder that diffusers wrote (of TRELLIS, one in its own layout), prompts.safetensors and
    data.safetensors.  -> the flags of a run that say where they are"""
    root.mkdir()
    if name in STAGES:
        return save_stage(STAGES[name], root)
    save_root(name, root)
    cond, uncond = conditions(name, 4, 1), conditions(name, 1, 2)
    g = torch.Generator().manual_seed(3)
    real = {f"cond.{k}": v for k, v in cond.items()}
    x0 = torch.randn(4, *FAMILIES[name].shape, generator=g)
    save_file({"x0": x0, **real}, root / "data.safetensors")
    flags = ["--teacher", str(root)]
    if "text" in cond:
        prompts = real | {f"uncond.{k}": v for k, v in uncond.items()}
        save_file(prompts, root / "prompts.safetensors")
        flags += ["--prompts", str(root / "prompts.safetensors")]
    return [*flags, "--sample_shape", *map(str, FAMILIES[name].shape)]


def save_stage(cls, root):
    """One of TRELLIS's two stages, with latents and the tokens of their images. -> flags"""
    g, data = torch.Generator().manual_seed(0), root / "data.safetensors"
    x0 = {"x0": torch.randn(4, 3, 4, 4, 4, generator=g)}
    if cls is SLatFlowModel:  # samples of like size, so that ranks have equal shares of all points
        coords = points((6,) * 4, 8)[:, 1:].int().contiguous()
        offsets = torch.arange(0, 25, 6)
        x0 = {"coords": coords, "feats": torch.randn(24, 3, generator=g), "offsets": offsets}
    save_file({**x0, "cond.tokens": torch.randn(4, 5, 10, generator=g)}, data)
    return ["--teacher", save_trellis(root, {cls: CLASSES[cls]})[cls], "--data", str(data)]


# ---- the pairs -----------------------------------------------------------------------------------

ALL = [name for name in FAMILIES if name != "Wan 2.2"]
PAPERS = {  # {script: teachers}; of dmd.py and decoupled_dmd.py all that have one network
    "dmd": [*ALL, "SDXL in one step"],
    "decoupled_dmd": ALL,
    "tdm": ["SD 1.5", "SDXL", "PixArt", "CogVideoX"],
    "phased_dmd": ["Wan 2.1", "Wan 2.2", "Qwen-Image"],
    "linvideo": ["Wan 2.1"],
    "mdt_dist": ["structure", "latents"],
    "latent_fm": ["DiT"],
}
PAIRS = [(script, name) for script, names in PAPERS.items() for name in names]
CASES = [
    (*pair, kind)
    for pair in PAIRS
    for kind in ("full", "adapters")
    if pair[0] != "latent_fm" or kind == "full"
]
USUAL = [  # without --long: with a GAN and masks, two networks, points
    ("decoupled_dmd", "PixArt", "full"),
    ("phased_dmd", "Wan 2.2", "full"),
    ("mdt_dist", "latents", "adapters"),
]

SHORT = "--preview_samples 2 --checkpointing_steps 1000 --lr_warmup_steps 0 --learning_rate 1e-3 "
OWN = {  # flags of a script
    "dmd": "--teacher_steps 0 --learning_rate_fake 1e-3 --fake_update_ratio 1",
    "decoupled_dmd": "--teacher_steps 0 --learning_rate_fake 1e-3 --fake_update_ratio 1",
    "tdm": "--teacher_steps 0 --learning_rate_fake 1e-3",
    "phased_dmd": "--teacher_steps 0 --learning_rate_fake 1e-3 --fake_update_ratio 1",
    "linvideo": "--teacher_steps 0 --sampling_steps 4 --bank_size 4 --bank_batch 2",
    "mdt_dist": "--teacher_steps 0",
    "latent_fm": "--ema_decay 0 --sample_steps 2",
}
PRESCRIBED = ("guidance_scale", "guidance_rescale", "timestep_shift", "student_steps")


def prescribed(script, release):
    """What the release's row and the script's presets say of guidance, shift and steps -> flags.

    The tiny folders are not recognised as the releases that they stand for.
    """
    (row, *_) = [r for r in releases.RELEASES if r.name == release]
    presets = importlib.import_module(script).PRESETS
    found = {**row.settings, **presets.get(row.network, {}), **presets.get(row.name, {})}
    if script in ("decoupled_dmd", "linvideo"):
        found.pop("guidance_rescale", None)
    flags = []
    for name in PRESCRIBED:
        value = found.get(name)
        values = value if isinstance(value, list) else [value]
        flags += [] if value is None else [f"--{name}", *map(str, values)]
    return flags


def updates(script):
    """How many; of phased_dmd.py two in each of two phases."""
    return 4 if script == "phased_dmd" else 2


def flags_of(case, teacher, root, out, batch):
    """The command line of a run. teacher: flags of its folder; batch: of one rank."""
    script, name, kind = case
    family = FAMILIES.get(base_name(name))
    flags = (SHORT + OWN[script]).split() + ["--max_train_steps", str(updates(script))]
    flags += ["--train_batch_size", str(batch), "--output_dir", str(out)]
    if script == "latent_fm":
        at = flags.index("--preview_samples")
        del flags[at : at + 2]
        return [*flags, "--network", NAME, "--data", str(root / "data.safetensors")]
    if name not in STAGES:
        flags += prescribed(script, family.release)
    if name.endswith("in one step"):
        at = flags.index("--student_steps")  # of several
        flags[at : at + 2] = ["--student_times", "0.4"]
    if kind == "adapters" or script == "phased_dmd":  # whose default are adapters
        flags += ["--lora_rank", "2" if kind == "adapters" else "0"]
    if kind == "adapters" and script not in ("linvideo", "mdt_dist"):
        flags += ["--fake_lora_rank", "2"]
    is_unet = script in ("dmd", "decoupled_dmd") and family.network == "UNet2DConditionModel"
    if is_unet or script in ("dmd", "decoupled_dmd") and kind == "full":
        flags += ["--gan_weight", "5e-3", "--data", str(root / "data.safetensors")]
    return [*flags, *teacher]


def name_of(case):
    return " ".join(case)


def base_name(name):
    """The teacher of "SDXL in one step" is SDXL."""
    return name.removesuffix(" in one step")


def batch_of(case):
    """Samples of a rank. Of two networks one, so that ranks train different ones at a time."""
    return 1 if case[1] == "Wan 2.2" else 2


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A function: name -> folder, flags; each is made once."""
    made = {}

    def make(name):
        name = base_name(name)
        if name not in made:
            root = tmp_path_factory.mktemp("teacher") / "root"
            made[name] = root, save_teacher(name, root)
        return made[name]

    return make


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory, request, teachers):
    """A folder with a run, on two ranks, of every case that this session tests."""
    folder, runs = tmp_path_factory.mktemp("ranks"), []
    items = [i for i in request.session.items if not i.get_closest_marker("skip")]
    tested = [i.callspec.params["case"] for i in items if i.name.startswith("test_pair[")]
    for case in tested:
        (root, flags), out = teachers(case[1]), folder / name_of(case)
        runs.append((name_of(case), case[0], flags_of(case, flags, root, out, batch_of(case))))
    done = start(2, folder, runs, seconds=600 + 60 * len(runs))  # hung, not slow
    if done.returncode:
        (folder / "stderr").write_text(done.stderr[-3000:])
    return folder


def marked(case):
    return pytest.param(case, id=name_of(case), marks=() if case in USUAL else pytest.mark.long)


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_pair(case, teachers, on_two_ranks, tmp_path, monkeypatch):
    script, two = importlib.import_module(case[0]), on_two_ranks / name_of(case)
    said = [on_two_ranks / "failed" / name_of(case), on_two_ranks / "stderr"]
    why = "\n".join(file.read_text() for file in said if file.exists())
    assert not why or (two / "report.json").is_file(), why
    root, teacher = teachers(case[1])
    monkeypatch.setattr(torch.optim, "AdamW", ADAM)
    monkeypatch.setitem(latent_fm.PAPER_NETWORKS, NAME, TINY)
    flags = flags_of(case, teacher, root, tmp_path / "one", batch_of(case))
    script.main([*flags, "--no-gradient_checkpointing", "--gradient_accumulation_steps", "2"])
    check_logs(read_log(tmp_path / "one"), read_log(two), updates(case[0]))
    check_state(weights(tmp_path / "one"), weights(two))
    check_samples(case, script, two, teacher, tmp_path / "drawn")
    check_reloaded(case, two / "student", root)


def check_logs(one, two, steps):
    """Finite, and the losses and norms of one process."""
    assert len(one) == len(two) == steps
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert math.isfinite(float(b[key])), key
            if key.startswith(("loss", "norm")):
                assert float(b[key]) == pytest.approx(float(a[key]), rel=1e-4, abs=1e-6), key


def check_state(one, two):
    """Of the student and of the last state the networks, averages, and moments of AdamW: each up to
    a share of its norm, where no rounding can be seen in one weight."""
    assert one.keys() == two.keys()
    wholes = {}
    for key, a in one.items():
        network, moment = key.split(".")[0], key.split(".")[-1] if "exp_avg" in key else ""
        parts = wholes.setdefault((network, moment), ([], []))
        parts[0].append(a.double().flatten())
        parts[1].append(two[key].double().flatten() - parts[0][-1])
    for (network, moment), (values, differences) in wholes.items():
        share = torch.cat(differences).norm() / torch.cat(values).norm()
        assert share < (1e-4 if moment else 1e-6), (network, moment, share)


def check_samples(case, script, run, teacher, out):
    """--sample in this process draws what the run showed at its end."""
    if case[0] == "latent_fm":
        script.main(["--sample", str(run), "--output_dir", str(out)])
        assert (out / "samples.png").is_file()
        return
    names = ("--prompts", "--data")
    flags = [w for i, w in enumerate(teacher) if w in names or i and teacher[i - 1] in names]
    script.main(["--sample", str(run), *flags, "--preview_samples", "2", "--output_dir", str(out)])
    ours, drawn = (load_file(d / "samples.safetensors") for d in (run, out))
    assert ours.keys() == drawn.keys()
    for key, x in drawn.items():
        assert x.isfinite().all()
        torch.testing.assert_close(x, ours[key], rtol=1e-3, atol=1e-3)
    if "x0" in drawn and case[1] not in STAGES:
        assert drawn["x0"].shape == (2, *FAMILIES[base_name(case[1])].shape)


def check_reloaded(case, student, root):
    """The library computes our function of the student, which is not the teacher's.

    TRELLIS has no library here, and linear attention is in none: what we load was sampled above.
    """
    script, name, kind = case[0], base_name(case[1]), case[2]
    if name in STAGES or script == "linvideo":
        return
    family = FAMILIES[name]
    if script == "latent_fm":
        return check_dit(student)
    experts = {"expert1": parts_of(name)[0], "expert2": parts_of(name)[-1]}
    files = experts if script == "phased_dmd" else {"adapter": parts_of(name)[0]}
    for file, part in files.items():
        base, call = load_network(str(root / part))[0], family.call()
        if kind == "adapters":
            ours, reference = with_adapter(name, root / part, student / lora.saved_name(base, file))
        else:
            folder = student / file if script == "phased_dmd" else student
            ours = load_network(str(folder))[0]
            reference = getattr(diffusers, family.network).from_pretrained(folder)
        with torch.no_grad():
            out, want = ours(**call), family.reference(reference.eval(), **call)
            assert relative(out, want) <= 1e-5 and relative(base(**call), out) > 1e-4


def with_adapter(name, folder, path):
    """A network and its adapter file, loaded here and by diffusers.  -> ours, theirs"""
    net = load_network(str(folder))[0]
    lora.load(net, "a", lora.adapter_file(str(path)))
    reference = getattr(diffusers, FAMILIES[name].network).from_pretrained(folder)
    if lora.is_for_peft(net):
        return lora.Adapted(net, "a"), peft.PeftModel.from_pretrained(reference, path)
    pipeline_of(name, reference).load_lora_weights(str(path))
    return lora.Adapted(net, "a"), reference


def check_dit(student):
    """A network of latent_fm.py is diffusers' class with a clock and a sign of its own."""
    ours = load_network(str(student))[0]
    call = dit_inputs({**TINY_DIT, "num_embeds_ada_norm": ours.num_classes})
    reference = diffusers.DiTTransformer2DModel.from_pretrained(student).eval()
    a, b, last, sign, _ = dit_imagenet.CONVENTIONS[ours.convention]
    for block in reference.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 128 - last
    with torch.no_grad():
        out, index = ours(**call), a * call["t"] + b
        want = sign * dit_noise(reference, call["x"], None, call["label"], index=index)
    assert relative(out, want) <= 1e-5 and out.std() > 1e-3


# ---- in one process ------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name, script", {name: script for script, name in PAIRS}.items())
def test_dry_run(name, script, teachers, tmp_path, monkeypatch, capsys):
    """Of each teacher, of adapters, whose plan has a whole network too. Nothing is made."""
    monkeypatch.setitem(latent_fm.PAPER_NETWORKS, NAME, TINY)
    root, teacher = teachers(name)
    kind = "full" if script == "latent_fm" else "adapters"
    flags = flags_of((script, name, kind), teacher, root, tmp_path / "run", 2)
    importlib.import_module(script).main([*flags, "--dry_run", "2"])
    out = capsys.readouterr().out
    assert "GB on a rank, 2 rank(s), networks in 2 part(s), cuda, batch 2" in out
    assert not (tmp_path / "run").exists()


def prompts_without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(f".{name}")}


def wider(name):
    def change(tensors):
        return {k: torch.cat([v, v], -1) if k.endswith(name) else v for k, v in tensors.items()}

    return change


NO_ATTENTION = "has no self-attention that can be replaced; DiT and Wan have"
GAN = "--gan_weight 0.1 --data {data}"
WRONG = [  # script, teacher, flags, a change of the prompts or of the data, what is said
    ("linvideo", "PixArt", "", None, "predicts eps; the score of Eq. 13 is a flow's"),
    ("linvideo", "SDXL", "", None, "predicts eps; the score of Eq. 13 is a flow's"),
    ("linvideo", "Qwen-Image", "", None, f"a QwenImageTransformer2DModel {NO_ATTENTION}"),
    ("linvideo", "Z-Image", "", None, f"a ZImageTransformer2DModel {NO_ATTENTION}"),
    ("linvideo", "CogVideoX", "", None, "predicts vp_v; the score of Eq. 13 is a flow's"),
    ("mdt_dist", "DiT", "--data {data}", None, "predicts eps; a flow's transport is distilled"),
    ("mdt_dist", "Z-Image", "", None, "--prompts: conditions come with --data here, as cond.*"),
    ("dmd", "Wan 2.2", "", None, "is a two-network teacher (transformer_2/): give one of its"),
    ("tdm", "Wan 2.2", "", None, "is a two-network teacher (transformer_2/): give one of its"),
    ("tdm", "SDXL", "--student_steps 1 2 4", None, "a UNet2DConditionModel has no input that"),
    ("tdm", "SD 1.5", GAN, None, "unrecognized arguments: --gan_weight 0.1 --data"),
    ("phased_dmd", "Wan 2.2", "--phases 1", None, "lie on both sides of the teacher's boundary"),
    ("dmd", "Wan 2.1", "--guidance_rescale patch", None, "is for images (C, H, W) of even sides"),
    ("dmd", "SDXL", "--gan_weight 0.1", None, "--gan_weight and --student_input real need data"),
    ("dmd", "Wan 5B", "--sample_shape 16 2 4 6", None, "x has 16 channels; pass (B, 48,"),
    ("dmd", "SDXL", "", prompts_without("size"), "lacks 'cond.size'; it has"),
    ("dmd", "SDXL", "", prompts_without("pooled"), "lacks 'cond.pooled'; it has"),
    ("dmd", "PixArt", "", prompts_without("mask"), "lacks 'cond.mask'; it has"),
    ("tdm", "PixArt", "", prompts_without("mask"), "lacks 'cond.mask'; it has"),
    ("phased_dmd", "Qwen-Image", "", prompts_without("mask"), "lacks 'cond.mask'; it has"),
    ("decoupled_dmd", "Lumina 2", "", prompts_without("mask"), "lacks 'cond.mask'; it has"),
    ("decoupled_dmd", "Z-Image", "", prompts_without("text_mask"), "lacks 'cond.text_mask'"),
    ("linvideo", "Wan 2.1", "", wider("text"), "are 20 wide (unconditional 20), the teacher takes"),
    ("tdm", "CogVideoX", "", wider("text"), "are 20 wide (unconditional 20), the teacher takes 10"),
    ("dmd", "SD 1.5", "", wider("text"), "are 20 wide (unconditional 20), the teacher takes 10"),
    ("dmd", "SDXL", GAN, prompts_without("pooled"), "items are (4, 8, 8) with ['size', 'text']"),
    ("decoupled_dmd", "Wan 5B", GAN, wider("x0"), "items are (48, 2, 4, 12) with ['text'], the"),
]
WRONG = [pytest.param(*w, id=f"{w[0]} {w[1]} {i}") for i, w in enumerate(WRONG)]


@pytest.mark.parametrize("script, name, flags, change, says", WRONG)
def test_what_does_not_go_together_is_one_line(
    script, name, flags, change, says, teachers, tmp_path, capsys
):
    """Before anything is made."""
    root, teacher = teachers(name)
    files = {k: root / f"{k}.safetensors" for k in ("data", "prompts")}
    if change:
        which = "data" if flags else "prompts"
        save_file(change(load_file(files[which])), tmp_path / f"{which}.safetensors")
        files[which] = tmp_path / f"{which}.safetensors"
    teacher = [
        str(files["prompts"]) if v == str(root / "prompts.safetensors") else v for v in teacher
    ]
    more = flags.format(data=files["data"]).split()
    out = tmp_path / "run"
    given = [*teacher, *more, "--max_train_steps", "2", "--output_dir", str(out)]
    assert says in refusal_of(capsys, importlib.import_module(script).main, *given)
    assert not out.exists()
