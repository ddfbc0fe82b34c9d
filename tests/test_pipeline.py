"""models/encode.py and models/decode.py: equal to the pipelines of diffusers; their commands."""

import functools
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from forks import launch
from helpers import PIXART_SCHEDULER, ROOT, fill, refusal_of, relative, word_tokenizer
from PIL import Image
from released import MODELS, PIXART, WAN, Z_IMAGE
from safetensors.torch import load_file, save_file

from models import decode, encode
from models.decode import decode_images, decode_in_space, decode_wan, to_bytes
from models.encode import NEGATIVE_PROMPT, encode_pixart, encode_wan, encode_z_image
from models.files import save_json
from models.networks.autoencoders import PatchPCA
from models.networks.latent_space import LatentSpace, load_space
from models.plumbing.data import Prompts
from models.plumbing.run import run_main
from models.prompts import open_prompts, prompt_shapes

each = pytest.mark.parametrize(
    "model", [pytest.param(model, id=name) for name, model in MODELS.items()]
)
images = pytest.mark.parametrize(
    "model", [pytest.param(Z_IMAGE, id="z_image"), pytest.param(PIXART, id="pixart")]
)
CONFIGS = {
    WAN: dict(WAN.tiny, num_layers=2, text_dim=16, in_channels=16, out_channels=16),
    Z_IMAGE: Z_IMAGE.tiny,
    PIXART: PIXART.tiny,
}

# Like Qwen3's: whose turn it is, and an empty thought where thinking is off.
CHAT = (
    "{% for m in messages %}<start> {{ m.role }} {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<start> assistant "
    "{% if not enable_thinking %}<think> {% endif %}{% endif %}"
)


def image_vae(**config):
    return fill(
        pytest.importorskip("diffusers").AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=4,
            norm_num_groups=4,
            **config,
        )
    )


def wan_parts(diffusers, transformers, transformer):
    tokenizer = word_tokenizer(["<pad>", "</s>", "<unk>"], end="</s>", eos_token="</s>")
    encoder = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4
        )
    )
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return diffusers.WanPipeline(
        tokenizer,
        encoder.eval(),
        vae.eval(),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer,
    )


def z_image_parts(diffusers, transformers, transformer):
    tokenizer = word_tokenizer(
        ["<pad>", "<unk>", "<start>", "<end>", "<think>", "user", "assistant"], eos_token="<end>"
    )
    tokenizer.chat_template = CHAT
    encoder = transformers.Qwen3Model(
        transformers.Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=10,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=6,
        )
    )
    vae = image_vae(
        scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
    )
    return diffusers.ZImagePipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae,
        encoder.eval(),
        tokenizer,
        transformer,
    )


def pixart_parts(diffusers, transformers, transformer):
    tokenizer = word_tokenizer(["<pad>", "</s>", "<unk>"], end="</s>", eos_token="</s>")
    encoder = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(tokenizer),
            d_model=10,
            d_kv=4,
            d_ff=24,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(PIXART_SCHEDULER)
    return diffusers.PixArtAlphaPipeline(
        tokenizer, encoder.eval(), image_vae(scaling_factor=0.18215), transformer, scheduler
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """-> function of a model: a pipeline of tiny random networks and a word-level tokenizer, and
    the folder where it is saved."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")

    @functools.cache
    def make(model):
        torch.manual_seed(0)
        transformer = fill(model.theirs(**CONFIGS[model]))
        pipe = {WAN: wan_parts, Z_IMAGE: z_image_parts, PIXART: pixart_parts}[model](
            diffusers, transformers, transformer
        )
        pipe.set_progress_bar_config(disable=True)
        folder = tmp_path_factory.mktemp(model.name) / "pipeline"
        pipe.save_pretrained(folder)
        return pipe, folder

    return make


# ---- prompts to features -------------------------------------------------------------------------


def test_encode_as_wan_pipeline(saved):
    pipe, folder = saved(WAN)
    prompts = ["a cat runs", "a  dog \n &amp;amp; a cat runs fast", "dog"]
    with torch.no_grad():
        cond, uncond = pipe.encode_prompt(prompts, "fast dog", max_sequence_length=12)
    ours = encode_wan(folder, prompts, "fast dog", max_length=12)
    assert ours["cond.text"].shape == (3, 12, 16) and ours["uncond.text"].shape == (1, 12, 16)
    assert (ours["cond.text"] - cond).abs().max() < 1e-5
    assert (ours["uncond.text"] - uncond[:1]).abs().max() < 1e-5
    lengths = (ours["cond.text"].abs().sum(-1) > 0).sum(1)
    assert lengths.tolist() == [4, 8, 2]  # the words and </s>; zeros after
    short = encode_wan(folder, prompts, max_length=3)
    assert short["cond.text"].shape == (3, 3, 16)  # longer prompts are cut


def test_encode_as_z_image_pipeline(saved):
    pipe, folder = saved(Z_IMAGE)
    prompts = ["a cat runs", "a dog a cat runs fast", "dog"]
    for negative, length in (("", 512), ("fast dog", 512), ("", 7)):  # the last cuts
        with (
            torch.no_grad()
        ):  # a list of its own: the pipeline writes its chat template into the list it is given
            cond, uncond = pipe.encode_prompt(
                list(prompts), negative_prompt=[negative] * 3, max_sequence_length=length
            )
        ours = encode_z_image(folder, prompts, negative, max_length=length)
        counts = [min(length, n + 5) for n in (3, 6, 1)]
        assert [len(row) for row in cond] == counts
        assert ours["cond.text"].shape == (3, max(counts), 10) and ours["uncond.text"].shape == (
            1,
            max(counts),
            10,
        )
        assert {k: v.dtype for k, v in ours.items() if "mask" in k} == {
            "cond.text_mask": torch.bool,
            "uncond.text_mask": torch.bool,
        }
        for part, want in (("cond", cond), ("uncond", uncond[:1])):
            for text, keep, row in zip(ours[part + ".text"], ours[part + ".text_mask"], want):
                assert (
                    keep.sum() == len(row)
                    and keep[: len(row)].all()
                    and relative(text[keep], row) < 1e-5
                    and not text[~keep].any()
                )
    assert (
        encode_z_image(folder, prompts)["uncond.text_mask"].sum() == 5
    )  # '' by default: the chat template alone


def test_encode_as_pixart_pipeline(saved):
    pipe, folder = saved(PIXART)
    prompts = ["a cat runs", "  A Dog a cat RUNS fast ", "dog"]
    for negative, length in (("", 120), ("Fast dog", 120), ("", 3)):  # the last cuts
        with torch.no_grad():
            text, mask, null, null_mask = pipe.encode_prompt(
                prompts, negative_prompt=negative, max_sequence_length=length
            )
        ours = encode_pixart(folder, prompts, negative, max_length=length)
        assert ours["cond.text"].shape == (3, length, 10) and ours["uncond.text"].shape == (
            1,
            length,
            10,
        )
        assert (
            relative(ours["cond.text"], text) < 1e-5
            and relative(ours["uncond.text"], null[:1]) < 1e-5
        )
        assert {v.dtype for k, v in ours.items() if "mask" in k} == {torch.bool}
        assert torch.equal(ours["cond.mask"], mask.bool()) and torch.equal(
            ours["uncond.mask"], null_mask[:1].bool()
        )
        assert ours["cond.mask"].sum(1).tolist() == [min(length, n) for n in (4, 7, 2)]
    with torch.no_grad():
        text, _, null, _ = pipe.encode_prompt(prompts)  # both with the pipeline's own defaults
    ours = encode_pixart(folder, prompts)
    assert (
        relative(ours["cond.text"], text) < 1e-5 and relative(ours["uncond.text"], null[:1]) < 1e-5
    )


# ---- latents to pixels ---------------------------------------------------------------------------


def test_decode_as_wan_pipeline(saved):
    pipe, folder = saved(WAN)
    x0 = torch.randn(2, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    video = decode_wan(folder, x0)
    assert video.shape == (2, 5, 3, 32, 48) and video.dtype == torch.uint8
    with torch.no_grad():
        mean, std = (
            torch.tensor(pipe.vae.config.latents_mean),
            torch.tensor(pipe.vae.config.latents_std),
        )
        raw = pipe.vae.decode(x0 * std.view(1, 16, 1, 1, 1) + mean.view(1, 16, 1, 1, 1)).sample
        reference = pipe.video_processor.postprocess_video(
            raw, output_type="pt"
        )  # (B, T', 3, H', W')
        plain = pipe.video_processor.postprocess_video(pipe.vae.decode(x0).sample, output_type="pt")
    assert video.float().std() > 1 and (video.float() - 255 * reference).abs().max() <= 0.51
    assert (video.float() - 255 * plain).abs().max() > 2  # the normalisation is seen
    with pytest.raises(ValueError, match=r"this VAE needs \(B, 16, T, H, W\)"):
        decode_wan(folder, x0[:, :4])


@images
def test_decode_images_as_their_pipelines(saved, model):
    """Scale and shift are those of the config: PixArt-alpha's scale is 0.18215, Sigma's 0.13025."""
    pipe, folder = saved(model)
    call = model.inputs(lengths=[3, 5])
    if model is Z_IMAGE:
        settings = dict(
            prompt_embeds=[row[keep] for row, keep in zip(call["text"], call["text_mask"])],
            height=8,
            width=12,
            num_inference_steps=1,
            guidance_scale=0.0,
        )
    else:
        settings = dict(
            negative_prompt=None,
            prompt_embeds=call["text"],
            prompt_attention_mask=call["mask"],
            height=16,
            width=24,
            num_inference_steps=2,
            guidance_scale=1.0,
            use_resolution_binning=False,
        )
    x0, pixels = (
        pipe(**settings, latents=call["x"], output_type=kind).images for kind in ("latent", "pt")
    )
    ours = decode_images(folder, x0)
    assert ours.shape == (2, 3, 8, 12) and ours.dtype == torch.uint8 and ours.float().std() > 1
    assert (ours.float() - 255 * pixels).abs().max() <= 0.51
    with torch.no_grad():
        plain = pipe.image_processor.postprocess(pipe.vae.decode(x0).sample, output_type="pt")
    assert (ours.float() - 255 * plain).abs().max() > 2  # scale and shift are seen
    for wrong in (x0[:, :3], x0[:, :, None]):
        with pytest.raises(ValueError, match=r"this VAE needs \(B, 4, H, W\)"):
            decode_images(folder, wrong)


# ---- a latent space of ours ----------------------------------------------------------------------


def save_space(run, channels=3, normed=True):
    """autoencoder/ of a run: PCA of patches of 2, 4 components, normalised if asked for."""
    g = torch.Generator().manual_seed(0)
    pca = PatchPCA(channels, patch=2, latent_channels=4).fit(
        torch.randn(40, channels, 8, 8, generator=g)
    )
    norm = (torch.randn(4, generator=g), 0.5 + torch.rand(4, generator=g)) if normed else ()
    LatentSpace(pca, *norm).save(str(run / "autoencoder"))
    (run / "student").mkdir()
    save_json({"_class_name": "DiT"}, str(run / "student" / "config.json"))


@pytest.mark.parametrize("channels, normed", [(3, True), (3, False), (1, True)])
def test_decode_in_a_space_of_ours(tmp_path, channels, normed):
    """The run, its student/ and its autoencoder/ name one latent space; grey has 3 channels."""
    save_space(tmp_path, channels, normed)
    x0 = torch.randn(3, 4, 2, 3, generator=torch.Generator().manual_seed(1))
    space = load_space(str(tmp_path / "autoencoder"))
    want = to_bytes(space.to_pixels(x0)).expand(3, 3, 4, 6)
    assert want.float().std() > 10
    save_file({"x0": x0}, tmp_path / "x0")
    for teacher in ("", "student", "autoencoder"):
        output = tmp_path / f"pictures{teacher}"
        flags = ["--latents", str(tmp_path / "x0"), "--output", str(output)]
        decode.main(["--teacher", str(tmp_path / teacher), *flags])
        paths = sorted(output.iterdir())
        assert [path.name for path in paths] == ["000.png", "001.png", "002.png"]
        got = np.stack([np.asarray(Image.open(path)) for path in paths])
        assert np.array_equal(got, want.permute(0, 2, 3, 1).numpy())
    with pytest.raises(ValueError, match=r"this VAE needs \(B, 4, H, W\)"):
        decode_in_space(tmp_path / "autoencoder", x0[:, :3])


@images
def test_decode_with_an_autoencoder_alone(saved, tmp_path, model):
    """The folder of a pipeline's AutoencoderKL gives the pixels of the pipeline, up to rounding."""
    x0 = torch.randn(2, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    save_file({"x0": x0}, tmp_path / "x0")
    flags = ["--latents", str(tmp_path / "x0"), "--output", str(tmp_path / "out")]
    decode.main(["--teacher", str(saved(model)[1] / "vae"), *flags])
    paths = sorted((tmp_path / "out").iterdir())
    got = np.stack([np.asarray(Image.open(path)) for path in paths]).transpose(0, 3, 1, 2)
    want = decode_images(saved(model)[1], x0)
    assert want.float().std() > 1
    assert np.abs(got.astype(int) - want.numpy()).max() <= 1


# ---- the commands --------------------------------------------------------------------------------


# Of each: shape of cond.text, true entries of the masks of "A cat", "a dog runs" and "".
@pytest.mark.parametrize(
    "model, shape, counts",
    [
        pytest.param(WAN, (2, 512, 16), None, id="wan"),
        pytest.param(Z_IMAGE, (2, 8, 10), (7, 8, 5), id="z_image"),
        pytest.param(PIXART, (2, 120, 10), (3, 4, 1), id="pixart"),
    ],
)
def test_command_line(saved, tmp_path, model, shape, counts):
    """encode writes what the scripts' --prompts and the network take; decode PNGs or GIFs."""
    teacher, video = ["--teacher", str(saved(model)[1])], model is WAN
    text, output = tmp_path / "prompts.txt", tmp_path / "new" / "prompts.safetensors"
    text.write_text("A cat\n\n a dog runs\n", encoding="utf-8")
    encode.main([*teacher, "--prompts_txt", str(text), "--output", str(output)])
    assert [p.name for p in output.parent.iterdir()] == ["prompts.safetensors"]
    assert prompt_shapes(output)["text"] == shape[1:]
    if counts:  # the file has the prompts' own tokens alone
        stored = load_file(output)
        assert len(stored["cond.text"]) == sum(counts[:2])
        assert len(stored["uncond.text"]) == counts[2]
    net = fill(model.net(**CONFIGS[model]))
    prompts = Prompts(str(output), net.cond_names, {"text": net.text_dim})
    cond, uncond = prompts.rows(torch.tensor([1, 0]), "cpu"), prompts.unconditional(2, "cpu")
    assert cond["text"].shape == shape
    if model.mask:
        given = cond[model.mask].sum(1).flip(0).tolist()
        assert (*given, *uncond[model.mask].sum(1).tolist()) == (*counts, counts[2])
    x, t = torch.randn(2, CONFIGS[model].get("in_channels", 4), *model.size), torch.ones(2)
    assert relative(net(x, t, **uncond), net(x, t, **cond)) > 1e-3

    latents = tmp_path / "samples.safetensors"
    save_file({"x0": torch.randn(2, 16, 2, 2, 3) if video else torch.randn(2, 4, 2, 3)}, latents)
    suffix = "gif" if video else "png"
    for fps, duration in ((None, 60), ("20", 50))[: 2 if video else 1]:  # ms, in steps of 10
        folder = tmp_path / f"pictures{fps}"
        flags = [] if fps is None else ["--fps", fps]
        decode.main([*teacher, "--latents", str(latents), "--output", str(folder), *flags])
        paths = sorted(folder.iterdir())
        assert [p.name for p in paths] == [f"000.{suffix}", f"001.{suffix}"]
        with Image.open(paths[1]) as picture:  # size is (W', H')
            if video:
                assert picture.n_frames == 5 and picture.size == (24, 16)
                assert picture.info["duration"] == duration and picture.info["loop"] == 0
            else:
                assert picture.size == (6, 4) and picture.mode == "RGB"


# model, class in model_index.json (None: no such file; "": no class in it), flags, function, and
# what it must be called with: negative prompt and max_length.
@pytest.mark.parametrize(
    "model, name, flags, function, negative, length",
    [
        (WAN, "WanPipeline", [], encode_wan, NEGATIVE_PROMPT, 512),
        (WAN, None, [], encode_wan, NEGATIVE_PROMPT, 512),
        (WAN, "", ["--negative_prompt", ""], encode_wan, "", 512),
        (Z_IMAGE, "ZImagePipeline", [], encode_z_image, "", 512),
        (Z_IMAGE, None, ["--max_length", "6"], encode_z_image, "", 6),
        (PIXART, "PixArtAlphaPipeline", [], encode_pixart, "", 120),
        (PIXART, "PixArtSigmaPipeline", [], encode_pixart, "", 300),
        (PIXART, "PixArtSigmaPipeline", ["--max_length", "120"], encode_pixart, "", 120),
        (
            PIXART,
            "PixArtAlphaPipeline",
            ["--negative_prompt", "A dog"],
            encode_pixart,
            "A dog",
            120,
        ),
        (PIXART, None, ["--max_length", "9"], encode_pixart, "", 9),
    ],
)
def test_the_class_decides(saved, tmp_path, model, name, flags, function, negative, length):
    """The class in model_index.json, or else the transformer's; an explicit flag wins."""
    root = tmp_path / "root"
    shutil.copytree(saved(model)[1], root)
    index = json.loads((root / "model_index.json").read_text())
    (root / "model_index.json").unlink()
    if name is not None:
        index.pop("_class_name")
        save_json(index | ({"_class_name": name} if name else {}), str(root / "model_index.json"))
    (tmp_path / "p.txt").write_text("a cat runs fast\n")
    files = ["--prompts_txt", str(tmp_path / "p.txt"), "--output", str(tmp_path / "out")]
    encode.main(["--teacher", str(root), *files, *flags])
    file, want = (
        open_prompts(tmp_path / "out"),
        function(root, ["a cat runs fast"], negative, length),
    )
    stored = {key: file.get_tensor(key) for key in file.keys()}
    assert stored.keys() == want.keys()
    if model is PIXART:  # its encoder's padding, which the network masks, is not stored
        for kind in ("cond", "uncond"):
            want[f"{kind}.text"].masked_fill_(~want[f"{kind}.mask"][..., None], 0)
    assert all(torch.equal(stored[key], want[key]) for key in want)
    if model is not Z_IMAGE:
        assert stored["cond.text"].shape[1] == length


@each
def test_the_file_gives_the_batches_of_the_padded_one(saved, tmp_path, model):
    """Several prompts in shards, against what a file with padding gives, bit for bit. PixArt's has
    the encoder's padding too, which its network masks: outputs are equal, bit for bit."""
    folder, prompts = saved(model)[1], ["a cat runs", "A  dog a cat runs fast", "dog", "a a a cat"]
    function = {WAN: encode_wan, Z_IMAGE: encode_z_image, PIXART: encode_pixart}[model]
    old, new, batched = (tmp_path / f"{name}.safetensors" for name in ("old", "new", "batched"))
    save_file(function(folder, prompts), old)
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    flags = ["--teacher", str(folder), "--prompts_txt", str(tmp_path / "p.txt"), "--output"]
    encode.main([*flags, str(new), "--shard_gb", "7e-7"])
    encode.main([*flags, str(batched), "--batch_size", "3"])
    assert len(list(tmp_path.glob("new-*"))) > 1 and not new.exists() and batched.exists()
    net, index = fill(model.net(**CONFIGS[model])), torch.tensor([3, 1, 0, 2, 1])
    x, t = torch.randn(5, CONFIGS[model].get("in_channels", 4), *model.size), torch.ones(5)
    before = Prompts(str(old), net.cond_names, {})
    for path in (new, batched):
        after = Prompts(str(path), net.cond_names, {})
        assert after.n == before.n == 4
        for a, b in (
            (before.rows(index, "cpu"), after.rows(index, "cpu")),
            (before.unconditional(5, "cpu"), after.unconditional(5, "cpu")),
        ):
            assert a.keys() == b.keys()
            if model.mask:
                assert torch.equal(a[model.mask], b[model.mask])
            if path == batched:
                assert relative(net(x, t, **b), net(x, t, **a)) < 1e-5
                continue
            assert torch.equal(net(x, t, **a), net(x, t, **b))
            if model is PIXART:
                assert a["text"][~a["mask"]].any()
                a["text"] = a["text"].masked_fill(~a["mask"][..., None], 0)
            assert torch.equal(a["text"], b["text"])


def write(folder, files):
    """Make a folder with {name: JSON, or None for an empty folder} in it. -> its path as str."""
    folder.mkdir()
    for name, value in files.items():
        path = folder / name
        (path if value is None else path.parent).mkdir(parents=True, exist_ok=True)
        if value is not None:
            path.write_text(json.dumps(value))
    return str(folder)


WAN_ROOT = {"model_index.json": {"_class_name": "WanPipeline"}}
TRELLIS_ROOT = {"pipeline.json": {"args": {}}}
PIXART_BARE = {"transformer/config.json": {"_class_name": "PixArtTransformer2DModel"}}


@pytest.mark.parametrize(
    "root, flags, message",
    [
        (WAN_ROOT, [], "one of the arguments --prompts_txt --images is required"),
        (WAN_ROOT, ["--prompts_txt", "p", "--images", "i"], "not allowed with argument"),
        (None, ["--prompts_txt", "p"], "--prompts_txt needs --teacher"),
        ({}, ["--prompts_txt", "p"], "has no model_index.json, transformer/config.json"),
        ({}, ["--images", "i"], "pass a diffusers pipeline folder, or TRELLIS's root"),
        (TRELLIS_ROOT, ["--prompts_txt", "p"], "is TRELLIS, and --prompts_txt is for WanPipeline"),
        ({"ckpts": None}, ["--prompts_txt", "p"], "pass --images instead"),
        (WAN_ROOT, ["--images", "i"], "give --resolution H W"),
        (WAN_ROOT, ["--images", "i", "--dinov2", "d"], "no effect with --images with captions"),
        (None, ["--images", "i", "--captions", "c"], "no effect with --images without a teacher"),
        (PIXART_BARE, ["--images", "i"], "pass --max_length 120 for alpha, 300 for Sigma"),
        (
            {"model_index.json": {"_class_name": "DiTPipeline"}},
            ["--images", "i"],
            "is DiTPipeline, and --images is for TRELLIS's image models and for Wan, Z-Image",
        ),
        (
            {"model_index.json": {"_class_name": "DiTPipeline"}, **PIXART_BARE},
            ["--prompts_txt", "p"],
            "is DiTPipeline, and --prompts_txt is for WanPipeline, ZImagePipeline, "
            "PixArtAlphaPipeline, PixArtSigmaPipeline, TrellisTextTo3DPipeline: pass one of these",
        ),
        (
            {"model_index.json": {"_class_name": ["a", "B"]}},
            ["--prompts_txt", "p"],
            "is ['a', 'B']",
        ),
        ({"model_index.json": []}, ["--prompts_txt", "p"], "is not a JSON object"),
        (PIXART_BARE, ["--prompts_txt", "p"], "pass --max_length 120 for alpha, 300 for Sigma"),
        (
            WAN_ROOT,
            ["--prompts_txt", "p", "--dinov2", "d"],
            "--dinov2 has no effect with --prompts",
        ),
        (None, ["--images", "i", "--max_length", "9"], "--max_length has no effect with --images"),
        (None, ["--images", "i", "--negative_prompt", ""], "--negative_prompt has no effect"),
        (WAN_ROOT, ["--prompts_txt", "p", "--fps", "8"], "unrecognized arguments: --fps"),
    ],
)
def test_wrong_combinations_of_encode(tmp_path, capsys, root, flags, message):
    teacher = [] if root is None else ["--teacher", write(tmp_path / "root", root)]
    flags = [*teacher, *flags, "--output", str(tmp_path / "out")]
    assert message in refusal_of(capsys, encode.main, *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "root, flags, message",
    [
        ({}, [], "has no autoencoder: pass a diffusers pipeline folder with vae/, a run"),
        (WAN_ROOT, [], "has no autoencoder"),
        (TRELLIS_ROOT, [], "has no autoencoder"),
        ({"config.json": {"_class_name": "DiT"}}, [], "has no autoencoder"),
        ({"student/config.json": {"_class_name": "DiT"}}, [], "has no autoencoder"),
        (
            {"vae/config.json": {"_class_name": "AutoencoderDC"}},
            [],
            "its vae/ is AutoencoderDC, which cannot be decoded here: pass a pipeline folder with "
            "AutoencoderKLWan or AutoencoderKL",
        ),
        ({"autoencoder/latents.json": {}}, [], "is not a latent space of ours"),
        (
            {"vae/config.json": {"_class_name": "AutoencoderKL"}},
            ["--fps", "8"],
            "--fps is for videos, and --teacher",
        ),
        ({}, ["--fps", "0"], "--fps: must be > 0, got 0"),
        ({}, ["--fps", "-1"], "--fps: must be > 0, got -1"),
        ({}, ["--fps", "nan"], "--fps: must be > 0, got nan"),
    ],
)
def test_wrong_combinations_of_decode(tmp_path, capsys, root, flags, message):
    save_file({"x0": torch.zeros(1, 4, 2, 2)}, tmp_path / "x0")
    flags = ["--teacher", write(tmp_path / "root", root), *flags]
    files = ["--latents", str(tmp_path / "x0"), "--output", str(tmp_path / "out")]
    assert message in refusal_of(capsys, decode.main, *flags, *files)
    assert not (tmp_path / "out").exists()


def test_the_commands_run_and_refuse_in_one_line(tmp_path):
    """As processes; outputs that cannot be written and autoencoders that make no pictures, too."""
    save_space(tmp_path / "run", channels=3)
    save_space(tmp_path / "two", channels=2)
    save_file({"x0": torch.zeros(1, 4, 2, 2)}, tmp_path / "x0")
    (tmp_path / "file").write_text("")

    def command(name, *flags):
        return launch(ROOT / "models" / f"{name}.py", flags, cwd=ROOT)

    def decoding(run, output):
        flags = ["--latents", str(tmp_path / "x0"), "--output", str(tmp_path / output)]
        return command("decode", "--teacher", str(tmp_path / run), *flags)

    done = decoding("run", "out")
    assert done.returncode == 0 and done.stdout == f"{tmp_path / 'out' / '000.png'}\n", done.stderr
    for done, says in (
        (decoding("run", "file"), "cannot write --output"),
        (decoding("two", "out"), "its pixels have 2 channels; pictures have 1 or 3"),
        (command("encode", "--output", "x", "--prompts_txt", "p"), "--prompts_txt needs --teacher"),
    ):
        assert done.returncode == 2 and done.stderr.startswith("error: ") and says in done.stderr
        assert done.stderr.count("\n") == 1


@each
def test_wrong_input_is_one_line_and_exit_code_2(saved, tmp_path, capsys, monkeypatch, model):
    teacher, none = saved(model)[1], tmp_path / "none"
    text, blank, latin = tmp_path / "p.txt", tmp_path / "blank.txt", tmp_path / "latin.txt"
    junk, bad, y = tmp_path / "junk", tmp_path / "x0", tmp_path / "y"
    text.write_text("a cat\n")
    blank.write_text("\n\n")
    latin.write_bytes("café".encode("latin-1"))
    junk.write_bytes(b"junk")
    save_file({"x0": torch.zeros(1, 3, *((1,) if model is WAN else ()), 2, 2)}, bad)
    save_file({"y": torch.zeros(1)}, y)
    parts = {"tokenizer": None, "text_encoder": None}
    for name in ("model_index.json", "vae/config.json"):
        parts[name] = {"_class_name": json.loads((teacher / name).read_text())["_class_name"]}
    empty = write(tmp_path / "empty", parts)

    def encoding(text, *more, teacher=teacher):
        return encode.main, "--teacher", str(teacher), "--prompts_txt", str(text), *more

    def decoding(latents, *more, teacher=teacher):
        return decode.main, "--teacher", str(teacher), "--latents", str(latents), *more

    def refused(says, command, noisy=False):
        """noisy: a library that loads something may add lines of its own."""
        main, *flags = command
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_main(lambda: main([*flags, "--output", str(tmp_path / "out")]))
        lines = capsys.readouterr().err.splitlines()
        if noisy:
            lines = [line for line in lines if line.startswith("error: ")]
        assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
        assert says in lines[0]
        assert not (tmp_path / "out").exists()

    refused("cannot read --prompts_txt", encoding(none))
    refused("cannot read --prompts_txt", encoding(latin))
    refused("holds no prompt", encoding(blank))
    refused("--max_length: must be >= 1, got 0", encoding(text, "--max_length", "0"))
    refused("cannot read --latents", decoding(junk))
    refused("cannot read --latents", decoding(none))
    refused("has no tensor x0", decoding(y))
    if model is WAN:
        refused("--fps: must be > 0, got 0", decoding(junk, "--fps", "0"))
    for command in (encoding(text, teacher=none), decoding(bad, teacher=none)):
        refused("is not a folder: pass a diffusers pipeline folder", command)
    refused("error: --teacher", encoding(text, teacher=empty), noisy=True)
    refused("error: --teacher", decoding(bad, teacher=empty), noisy=True)
    shutil.rmtree(tmp_path / "empty" / "tokenizer")
    refused("pass a diffusers pipeline folder, with tokenizer/", encoding(text, teacher=empty))
    channels = "16, T" if model is WAN else 4
    refused(f"this VAE needs (B, {channels}, H, W)", decoding(bad), noisy=True)
    for name in ("transformers", "diffusers"):  # import then raises ImportError, as when absent
        monkeypatch.setitem(sys.modules, name, None)
    refused("pip install transformers", encoding(text))
    refused("pip install diffusers", decoding(bad))
