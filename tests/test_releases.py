"""models/plumbing/releases.py: every released teacher is told apart, and gets its settings."""

import json

import pytest
from helpers import PIXART_SCHEDULER, quiet, save_tiny_teacher

import decoupled_dmd
import dmd
import latent_fm
import linvideo
import mdt_dist
import phased_dmd
import tdm
from models.networks import (
    NETWORKS,
    adm,
    cogvideox,
    lumina2,
    pixart,
    qwen_image,
    trellis,
    unet,
    wan,
    z_image,
)
from models.networks.dit_imagenet import DIT_B_2, DIT_XL_2, DIT_XL_2_512
from models.plumbing import papers, releases
from models.plumbing.flags import distillation_parser, parse
from models.plumbing.state import FREE_TO_CHANGE
from tests.schedulers import COGVIDEOX_SCHEDULER, SCHEDULERS

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
LCM = {"_class_name": "LCMScheduler", "beta_schedule": "linear"}
WAN = {"_class_name": "WanTransformer3DModel"}
Z_IMAGE = {"_class_name": "ZImageTransformer2DModel", **z_image.Z_IMAGE_6B}
PIXART = {"_class_name": "PixArtTransformer2DModel"}
DIT = {"_class_name": "DiTTransformer2DModel"}
COGVIDEOX = {"_class_name": "CogVideoXTransformer3DModel"}
UNET = {"_class_name": "UNet2DConditionModel"}
ADM = {"_class_name": "UNetModel"}
PNDM, V_DDIM = SCHEDULERS["Stable Diffusion 1.5"], SCHEDULERS["Stable Diffusion 2.1"]
EULER, UNIPC = SCHEDULERS["SDXL base 1.0"], SCHEDULERS["Wan 2.1 T2V 1.3B"]
STRUCTURE = {"name": "SparseStructureFlowModel"}
LATENTS = {"name": "ElasticSLatFlowModel"}  # the name in TRELLIS's released configs
CASES = {  # name: (config, scheduler or None, {flag: value} that the row gives)
    "Z-Image": (Z_IMAGE, {**FLOW, "shift": 6.0}, dict(timestep_shift=3, guidance_scale=5)),
    "Z-Image-Turbo": (Z_IMAGE, {**FLOW, "shift": 3.0}, dict(timestep_shift=3, guidance_scale=1)),
    "Wan 2.1 T2V 1.3B": (
        {**WAN, **wan.WAN_1_3B},
        {**UNIPC, "flow_shift": 3.0},
        dict(timestep_shift=5, guidance_scale=5),
    ),
    "Wan 2.1 T2V 14B": (
        {**WAN, **wan.WAN_14B},
        {**UNIPC, "flow_shift": 3.0},
        dict(timestep_shift=5, guidance_scale=5),
    ),
    "Wan 2.2 T2V A14B": (
        {**WAN, **wan.WAN_A14B},
        {**UNIPC, "flow_shift": 3.0},
        dict(timestep_shift=5, guidance_scale=4),
    ),
    "Wan 2.2 TI2V 5B": (
        {**WAN, **wan.WAN_5B},
        {**UNIPC, "flow_shift": 5.0},
        dict(timestep_shift=5, guidance_scale=5),
    ),
    "PixArt-alpha 256": (
        {**PIXART, **pixart.PIXART_512, "sample_size": 32},
        PIXART_SCHEDULER,
        dict(timestep_shift=1, guidance_scale=4.5),
    ),
    "PixArt-alpha 512": (
        {**PIXART, **pixart.PIXART_512},
        PIXART_SCHEDULER,
        dict(timestep_shift=1, guidance_scale=4.5),
    ),
    "PixArt-alpha 1024": (  # with the class name of the released config
        {"_class_name": "Transformer2DModel", **pixart.PIXART_1024},
        PIXART_SCHEDULER,
        dict(timestep_shift=1, guidance_scale=4.5),
    ),
    "PixArt-Sigma": (
        {**PIXART, **pixart.PIXART_1024, "use_additional_conditions": False},
        PIXART_SCHEDULER,
        dict(timestep_shift=1, guidance_scale=4.5),
    ),
    "PixArt-LCM": ({**PIXART, **pixart.PIXART_1024}, LCM, dict(timestep_shift=1, guidance_scale=1)),
    "Stable Diffusion 1.5": (
        {**UNET, **unet.SD_1_5},
        PNDM,
        dict(timestep_shift=1, guidance_scale=7.5),
    ),
    "Stable Diffusion 2.1": (
        {**UNET, **unet.SD_2_1},
        V_DDIM,
        dict(timestep_shift=1, guidance_scale=7.5),
    ),
    "SDXL base 1.0": ({**UNET, **unet.SDXL}, EULER, dict(timestep_shift=1, guidance_scale=5)),
    "DiT-XL/2 256": ({**DIT, **DIT_XL_2}, None, dict(timestep_shift=1, guidance_scale=1.5)),
    "DiT-XL/2 512": (
        {**DIT_XL_2_512, "_class_name": "Transformer2DModel", "convention": "dit"},
        None,
        dict(timestep_shift=1, guidance_scale=1.5),
    ),
    "SiT": (
        {**DIT, **DIT_XL_2, "convention": "sit"},
        None,
        dict(timestep_shift=1, guidance_scale=1.5),
    ),
    "LFM ImageNet": (
        {**DIT, **DIT_B_2, "convention": "lfm"},
        None,
        dict(timestep_shift=1, guidance_scale=1.5),
    ),
    "LFM": (
        {**DIT, **DIT_B_2, "num_embeds_ada_norm": 0, "convention": "lfm"},
        None,
        dict(timestep_shift=1, guidance_scale=1),
    ),
    "LFM ADM ImageNet": (
        {**ADM, **adm.LFM_ADM, "num_classes": 1000},
        None,
        dict(timestep_shift=1, guidance_scale=1.25),
    ),
    "LFM ADM": ({**ADM, **adm.LFM_ADM_CELEBA}, None, dict(timestep_shift=1, guidance_scale=1)),
    "ADM ImageNet": (
        {**ADM, **adm.EDM_IMAGENET_64, "convention": "adm"},
        None,
        dict(timestep_shift=1, guidance_scale=1),
    ),
    "EDM ImageNet 64": (
        {**ADM, **adm.EDM_IMAGENET_64},
        None,
        dict(timestep_shift=1, guidance_scale=1),
    ),
    "CogVideoX-2B": (
        {**COGVIDEOX, **cogvideox.COGVIDEOX_2B},
        COGVIDEOX_SCHEDULER,
        dict(timestep_shift=1, guidance_scale=6),
    ),
    "TRELLIS image structure": (
        {**STRUCTURE, "args": trellis.SS_FLOW_L},
        None,
        dict(guidance_scale=6),
    ),
    "TRELLIS image latents": (
        {**LATENTS, "args": trellis.SLAT_FLOW_L},
        None,
        dict(guidance_scale=6),
    ),
    "TRELLIS text structure": (
        {**STRUCTURE, "args": {**trellis.SS_FLOW_L, "cond_channels": 768}},
        None,
        dict(guidance_scale=8.5),
    ),
    "TRELLIS text latents": (
        {**LATENTS, "args": {**trellis.SLAT_FLOW_L, "cond_channels": 768}},
        None,
        dict(guidance_scale=8.5),
    ),
}
CASES["Qwen-Image"] = (
    {"_class_name": "QwenImageTransformer2DModel", **qwen_image.QWEN_IMAGE},
    SCHEDULERS["Qwen-Image"],
    dict(timestep_shift=3, guidance_scale=4),
)
CASES["Lumina-Image 2.0"] = (
    {"_class_name": "Lumina2Transformer2DModel", **lumina2.LUMINA_2},
    {**FLOW, "shift": 6.0},
    dict(timestep_shift=6, guidance_scale=4),
)
DISTILLED = ("Z-Image-Turbo", "PixArt-LCM")


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def save_release(root, name):
    """The JSON files of a release, without weights, as its authors lay them out.  -> --teacher."""
    config, scheduler, _ = CASES[name]
    if "args" in config:
        write(root / "ckpts" / "flow.json", config)
        return str(root / "ckpts" / "flow")
    part = "unet" if config["_class_name"] == "UNet2DConditionModel" else "transformer"
    write(root / part / "config.json", config)
    write(root / "model_index.json", {"_class_name": "Pipeline"})
    if scheduler:
        write(root / "scheduler" / "scheduler_config.json", scheduler)
    if "A14B" in name:
        write(root / "transformer_2" / "config.json", config)
    return str(root)


def test_every_row_is_in_this_table():
    assert {r.name for r in releases.RELEASES} == set(CASES)
    assert {r.network for r in releases.RELEASES} <= set(NETWORKS)


def test_trellis_teachers_are_sampled_as_their_authors_do(tmp_path):
    """mdt_dist.py: rescale_t 3 and guidance for t in [.5, 1]; the student has no shift."""
    for name in ("TRELLIS image structure", "TRELLIS text latents"):
        args = mdt_dist.parse_args(["--teacher", save_release(tmp_path / name, name)])
        assert (args.teacher_shift, args.timestep_shift) == (3, 1)
        assert args.teacher_guidance_interval == [0.5, 1]


@pytest.mark.parametrize("name", CASES)
def test_a_release_is_recognised_and_gives_its_settings(tmp_path, name):
    """As a root, and as the component folder in it; the command line wins and is named."""
    teacher = save_release(tmp_path, name)
    settings = CASES[name][2]
    part = "unet" if CASES[name][0].get("_class_name") in UNET.values() else "transformer"
    places = [teacher] if "TRELLIS" in name else [teacher, f"{teacher}/{part}"]
    for place in places:
        assert releases.recognise(place).name == name
        args = parse(distillation_parser("x"), ["--teacher", place], "x", {"released": {}})
        assert {flag: getattr(args, flag) for flag in settings} == settings
        assert args.settings.startswith(f"settings: {name}: ")
        assert ("warning" in args.settings) == (name in DISTILLED)
        for flag, value in settings.items():
            assert f"{flag} {value:g}" in args.settings
        assert "teacher_shift" not in args.settings  # a flag that this parser lacks
    argv = ["--teacher", teacher, "--guidance_scale", "2.5"]
    args = parse(distillation_parser("x"), argv, "x", {"released": {"guidance_scale": 9.0}})
    assert args.guidance_scale == 2.5
    assert f"guidance_scale {settings['guidance_scale']:g} (command line: 2.5)" in args.settings


def test_later_keys_are_stronger(tmp_path):
    """Own defaults < released < row < class of the network < release < command line."""
    teacher = save_release(tmp_path, "Z-Image")

    def parsed(*argv, **presets):
        p = distillation_parser("x")
        return parse(p, ["--teacher", teacher, *argv], "x", {"released": {}, **presets})

    flags = dict(guidance_scale=8.0, learning_rate=0.5, train_batch_size=3)
    args = parsed(released=flags)
    assert (args.guidance_scale, args.learning_rate, args.train_batch_size) == (5, 0.5, 3)
    network = {"ZImageTransformer2DModel": dict(guidance_scale=7.0, learning_rate=0.25)}
    args = parsed(released=flags, **network)
    assert (args.guidance_scale, args.learning_rate, args.train_batch_size) == (7, 0.25, 3)
    args = parsed(released=flags, **network, **{"Z-Image": dict(guidance_scale=6.0)})
    assert (args.guidance_scale, args.learning_rate) == (6, 0.25)
    assert "guidance_scale 6, learning_rate 0.25" in args.settings
    args = parsed("--guidance_scale", "2", released=flags, **network)
    assert args.guidance_scale == 2 and "guidance_scale 7 (command line: 2)" in args.settings
    assert parsed(**{"Wan 2.1 T2V 14B": dict(learning_rate=9.0)}).learning_rate == 1e-3


def test_worlds_and_our_own_networks_have_no_row(tmp_path):
    for script in (dmd, decoupled_dmd, tdm, phased_dmd, linvideo, mdt_dist):
        assert script.parse_args([]).settings == ""
    assert not hasattr(latent_fm.parse_args([]), "settings")  # it has no teacher
    teacher = save_tiny_teacher(tmp_path / "fast-turbo")
    args = dmd.parse_args(["--teacher", teacher])
    assert args.timestep_shift is None and "settings" not in args.settings
    assert releases.recognise("glyphs") is None and releases.warning("glyphs") is None
    assert releases.recognise(str(tmp_path / "nothing")) is None


@pytest.mark.parametrize("script", [dmd, decoupled_dmd, tdm, phased_dmd, linvideo, mdt_dist])
@pytest.mark.parametrize("name", ["Z-Image", "Wan 2.1 T2V 1.3B", "TRELLIS image latents"])
def test_all_scripts_take_the_row(tmp_path, script, name):
    args = script.parse_args(["--teacher", save_release(tmp_path, name)])
    assert args.settings.startswith(f"settings: {name}: ")
    assert "settings" in FREE_TO_CHANGE


# ---- what the papers of the methods prescribe ----------------------------------------------------

SCRIPTS = dict(dmd=dmd, phased_dmd=phased_dmd, decoupled_dmd=decoupled_dmd, tdm=tdm)
SCRIPTS |= dict(linvideo=linvideo, mdt_dist=mdt_dist)
ROWS = [(method, row) for method, rows in papers.PAPERS.items() for row in rows]
IDS = [f"{method}-{row.teachers[0]}" for method, row in ROWS]


@pytest.mark.parametrize("method, row", ROWS, ids=IDS)
def test_a_row_of_a_paper_is_a_script_s_default(tmp_path, method, row):
    """Of each teacher that it names; the run names what is taken, and the command line wins."""
    for i, name in enumerate(row.teachers):
        teacher = save_release(tmp_path / str(i), name)
        args = SCRIPTS[method].parse_args(["--teacher", teacher])
        assert {flag: getattr(args, flag) for flag in row.settings} == row.settings
        assert set(row.unstated) <= set(vars(args)) and row.source
        assert all(f"{flag} {value:g}" in args.settings for flag, value in row.settings.items())
        assert papers.row_of(method, name) is row
        for flag in row.settings:
            args = SCRIPTS[method].parse_args(["--teacher", teacher, f"--{flag}", "3"])
            assert getattr(args, flag) == 3


@pytest.mark.parametrize("method", SCRIPTS)
def test_help_ends_with_the_rows(method, capsys):
    with pytest.raises(SystemExit):
        SCRIPTS[method].parse_args(["--help"])
    out = capsys.readouterr().out
    end = out[out.index("released teachers, with what their rows change") :]
    assert "docs/teachers.md" in end and max(map(len, out.splitlines())) <= 100
    words = " ".join(end.split())
    for row in papers.PAPERS[method]:
        for flag, value in row.settings.items():
            assert f"--{flag} {value:g}" in words
        for text in (*row.teachers, row.source, f"batch {row.batch}"):
            assert text in words


def test_figures_of_the_papers():
    """Some that are easily mixed up."""
    sdxl, tdm_sdxl = papers.row_of("dmd", "SDXL base 1.0"), papers.row_of("tdm", "SDXL base 1.0")
    assert sdxl.settings["guidance_scale"] == tdm_sdxl.settings["guidance_scale"] == 8
    assert (sdxl.batch, sdxl.gan, tdm_sdxl.batch) == ("128", "5e-3", "64")
    assert tdm_sdxl.settings["learning_rate_fake"] == 5e-6
    assert papers.settings("dmd", "Stable Diffusion 1.5")["guidance_scale"] == 1.75
    assert papers.settings("linvideo", "Wan 2.1 T2V 14B") == {"target_layers": 22}
    assert papers.settings("dmd", "no such teacher") == papers.settings("x", "Z-Image") == {}
    assert papers.help_of("latent_fm") == ""


def test_layers_that_are_listed_need_no_number(tmp_path):
    """The row's 16 layers are for --select learned and the other rules."""
    teacher = save_release(tmp_path, "Wan 2.1 T2V 1.3B")
    for select, target in (("learned", 16), ("last", 16), ("3 4 5", None)):
        args = linvideo.parse_args(["--teacher", teacher, "--select", *select.split()])
        assert args.target_layers == target
    args = linvideo.parse_args(f"--teacher {teacher} --select 3 4 --target_layers 2".split())
    assert args.target_layers == 2


# ---- distilled teachers --------------------------------------------------------------------------

NAMED = {
    "Z-Image-Turbo": True,
    "Wan2.1-T2V-14B-Lightning": True,
    "FastWan2.1-T2V-1.3B-Diffusers": True,
    "self-forcing-dmd": True,
    "CausVid": True,
    "wan_lcm": True,
    "Wan2.1-Distill-Models": True,
    "PixArt-Alpha-DMD-XL-2-512x512": True,
    "Hyper-PixArt": True,
    "Wan2.1-T2V-14B-Diffusers": False,
    "breakfast": False,
    "hypertuned-wan": False,
    "Belcmann": False,
}


@pytest.mark.parametrize("name", NAMED)
def test_a_distilled_teacher_is_known_by_its_name(tmp_path, name):
    """That of its folder, of the cache of huggingface_hub, or _name_or_path of its config."""
    config = {**WAN, **wan.WAN_14B}
    for i, root in enumerate(
        [tmp_path / name, tmp_path / f"models--x--{name}" / "snapshots" / "1"]
    ):
        write(root / "transformer" / "config.json", config)
        write(root / "model_index.json", {})
        for place in (root, root / "transformer"):
            assert bool(releases.warning(str(place))) == NAMED[name], (i, place)
    write(tmp_path / "3" / "config.json", {**config, "_name_or_path": f"somebody/{name}"})
    assert bool(releases.warning(str(tmp_path / "3"))) == NAMED[name]


def test_a_distilled_teacher_is_known_by_its_config(tmp_path):
    for key in ("time_cond_proj_dim", "guidance_embeds"):
        write(tmp_path / key / "config.json", {**WAN, **wan.WAN_14B, key: 256})
        assert "guidance scale" in releases.warning(str(tmp_path / key))
    root = tmp_path / "consistency"
    write(root / "transformer" / "config.json", {**WAN, **wan.WAN_14B})
    write(root / "scheduler" / "scheduler_config.json", {"_class_name": "LCMScheduler"})
    assert "LCMScheduler" in releases.warning(str(root / "transformer"))


def test_a_lora_file_can_make_a_teacher_distilled(tmp_path):
    teacher = save_release(tmp_path, "Wan 2.1 T2V 14B")
    for name, warned in (("wan_lightning_rank64.safetensors", True), ("style.safetensors", False)):
        args = dmd.parse_args(["--teacher", teacher, "--teacher_lora", f"loras/{name}"])
        assert (f"warning: loras/{name} is distilled" in args.settings) == warned


@pytest.mark.parametrize("method", ["dmd", "tdm", "mdt_dist", "linvideo", "latent_fm"])
def test_a_student_of_ours_is_a_distilled_teacher(tmp_path, method):
    """Unless its method leaves it a many-step model: linear attention, flow matching."""
    run = tmp_path / "run"
    write(run / "student" / "config.json", {**WAN, **wan.WAN_14B})
    write(run / "student" / "sampler.json", {"method": method})
    for place in (str(run), str(run / "student")):
        line = releases.warning(place)
        args = parse(distillation_parser("x"), ["--teacher", place], "x", {"released": {}})
        if method in ("linvideo", "latent_fm"):
            assert line is None and args.guidance_scale == 5
        else:
            assert f"{method}.py made" in line and "\n" not in line
            assert args.guidance_scale == 1 and args.settings.endswith(line)


def test_the_start_of_a_run_names_the_settings_and_warns_once(monkeypatch, tmp_path, capsys):
    """Also for a small student of ours, whose flags stay those of small networks."""
    quiet(monkeypatch)
    first, second = str(tmp_path / "one"), str(tmp_path / "two")
    short = ["--max_train_steps", "1", "--teacher_steps", "0", "--train_batch_size", "4"]
    monkeypatch.setattr("models.plumbing.report.measure", lambda *args: [])
    dmd.main(["--teacher", "ring", "--output_dir", first, *short])
    assert "settings" not in capsys.readouterr().out
    dmd.main(["--teacher", first, "--output_dir", second, *short, "--guidance_scale", "2"])
    out = capsys.readouterr().out
    assert out.count(f"warning: {first} is distilled (a few-step student that dmd.py made)") == 1
    assert out.count("warning:") == 1 and "settings:" not in out
