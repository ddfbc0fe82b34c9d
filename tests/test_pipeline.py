"""The two ends of a real pipeline equal those of diffusers' own: models/pipeline.py, and encode_prompts of the transformers' files."""
import functools
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import PIXART_SCHEDULER, fill, relative, word_tokenizer
from models import io, pixart, wan, z_image
from models.pipeline import decode_images
from released import MODELS, PIXART, WAN, Z_IMAGE

each = pytest.mark.parametrize("model", [pytest.param(model, id=name) for name, model in MODELS.items()])
images = pytest.mark.parametrize("model", [pytest.param(Z_IMAGE, id="z_image"), pytest.param(PIXART, id="pixart")])
CONFIGS = {WAN: dict(WAN.tiny, num_layers=2, text_dim=16, in_channels=16, out_channels=16), Z_IMAGE: Z_IMAGE.tiny, PIXART: PIXART.tiny}

# Like Qwen3's: whose turn it is, and an empty thought where thinking is off.
CHAT = ("{% for m in messages %}<start> {{ m.role }} {{ m.content }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<start> assistant {% if not enable_thinking %}<think> {% endif %}{% endif %}")


def image_vae(**config):
    return fill(pytest.importorskip("diffusers").AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4,
        norm_num_groups=4, **config))


def wan_parts(diffusers, transformers, transformer):
    tokenizer = word_tokenizer(["<pad>", "</s>", "<unk>"], end="</s>", eos_token="</s>")
    encoder = transformers.UMT5EncoderModel(transformers.UMT5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4))
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return diffusers.WanPipeline(tokenizer, encoder.eval(), vae.eval(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), transformer)


def z_image_parts(diffusers, transformers, transformer):
    tokenizer = word_tokenizer(["<pad>", "<unk>", "<start>", "<end>", "<think>", "user", "assistant"], eos_token="<end>")
    tokenizer.chat_template = CHAT
    encoder = transformers.Qwen3Model(transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=10, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        head_dim=6))
    vae = image_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    return diffusers.ZImagePipeline(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae, encoder.eval(), tokenizer, transformer)


def pixart_parts(diffusers, transformers, transformer):
    tokenizer = word_tokenizer(["<pad>", "</s>", "<unk>"], end="</s>", eos_token="</s>")
    encoder = transformers.T5EncoderModel(transformers.T5Config(
        vocab_size=len(tokenizer), d_model=10, d_kv=4, d_ff=24, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"))
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(PIXART_SCHEDULER)
    return diffusers.PixArtAlphaPipeline(tokenizer, encoder.eval(), image_vae(scaling_factor=0.18215), transformer, scheduler)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """-> function of a model: (pipeline of tiny random networks and a word-level tokenizer, the folder where it is saved)."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")

    @functools.cache
    def make(model):
        torch.manual_seed(0)
        transformer = fill(model.theirs(**CONFIGS[model]))
        pipe = {WAN: wan_parts, Z_IMAGE: z_image_parts, PIXART: pixart_parts}[model](diffusers, transformers, transformer)
        pipe.set_progress_bar_config(disable=True)
        folder = tmp_path_factory.mktemp(model.name) / "pipeline"
        pipe.save_pretrained(folder)
        return pipe, folder
    return make


# ---- prompts to features -----------------------------------------------------------------------------------


def test_encode_prompts_as_wan_pipeline(saved):
    pipe, folder = saved(WAN)
    prompts = ["a cat runs", "a  dog \n &amp;amp; a cat runs fast", "dog"]
    with torch.no_grad():
        cond, uncond = pipe.encode_prompt(prompts, "fast dog", max_sequence_length=12)
    ours = wan.encode_prompts(folder, prompts, "fast dog", max_length=12)
    assert ours["cond.text"].shape == (3, 12, 16) and ours["uncond.text"].shape == (1, 12, 16)
    assert (ours["cond.text"] - cond).abs().max() < 1e-5
    assert (ours["uncond.text"] - uncond[:1]).abs().max() < 1e-5
    lengths = (ours["cond.text"].abs().sum(-1) > 0).sum(1)
    assert lengths.tolist() == [4, 8, 2]  # the words and </s>; zeros after
    short = wan.encode_prompts(folder, prompts, max_length=3)
    assert short["cond.text"].shape == (3, 3, 16)  # longer prompts are cut


def test_encode_prompts_as_z_image_pipeline(saved):
    pipe, folder = saved(Z_IMAGE)
    prompts = ["a cat runs", "a dog a cat runs fast", "dog"]
    for negative, length in (("", 512), ("fast dog", 512), ("", 7)):  # the last cuts
        with torch.no_grad():  # a list of its own: the pipeline writes its chat template into the list it is given
            cond, uncond = pipe.encode_prompt(list(prompts), negative_prompt=[negative] * 3, max_sequence_length=length)
        ours = z_image.encode_prompts(folder, prompts, negative, max_length=length)
        counts = [min(length, n + 5) for n in (3, 6, 1)]
        assert [len(row) for row in cond] == counts
        assert ours["cond.text"].shape == (3, max(counts), 10) and ours["uncond.text"].shape == (1, max(counts), 10)
        assert {k: v.dtype for k, v in ours.items() if "mask" in k} == {"cond.text_mask": torch.bool, "uncond.text_mask": torch.bool}
        for part, want in (("cond", cond), ("uncond", uncond[:1])):
            for text, keep, row in zip(ours[part + ".text"], ours[part + ".text_mask"], want):
                assert keep.sum() == len(row) and keep[:len(row)].all() and relative(text[keep], row) < 1e-5 and not text[~keep].any()
    assert z_image.encode_prompts(folder, prompts)["uncond.text_mask"].sum() == 5  # '' by default: the chat template alone


def test_encode_prompts_as_pixart_pipeline(saved):
    pipe, folder = saved(PIXART)
    prompts = ["a cat runs", "  A Dog a cat RUNS fast ", "dog"]
    for negative, length in (("", 120), ("Fast dog", 120), ("", 3)):  # the last cuts
        with torch.no_grad():
            text, mask, null, null_mask = pipe.encode_prompt(prompts, negative_prompt=negative, max_sequence_length=length)
        ours = pixart.encode_prompts(folder, prompts, negative, max_length=length)
        assert ours["cond.text"].shape == (3, length, 10) and ours["uncond.text"].shape == (1, length, 10)
        assert relative(ours["cond.text"], text) < 1e-5 and relative(ours["uncond.text"], null[:1]) < 1e-5
        assert {v.dtype for k, v in ours.items() if "mask" in k} == {torch.bool}
        assert torch.equal(ours["cond.mask"], mask.bool()) and torch.equal(ours["uncond.mask"], null_mask[:1].bool())
        assert ours["cond.mask"].sum(1).tolist() == [min(length, n) for n in (4, 7, 2)]
    with torch.no_grad():
        text, _, null, _ = pipe.encode_prompt(prompts)  # both with the pipeline's own defaults
    ours = pixart.encode_prompts(folder, prompts)
    assert relative(ours["cond.text"], text) < 1e-5 and relative(ours["uncond.text"], null[:1]) < 1e-5


# ---- latents to pixels -------------------------------------------------------------------------------------


def test_decode_latents_as_wan_pipeline(saved):
    pipe, folder = saved(WAN)
    x0 = torch.randn(2, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    video = wan.decode_latents(folder, x0)
    assert video.shape == (2, 5, 3, 32, 48) and video.dtype == torch.uint8
    with torch.no_grad():
        mean, std = torch.tensor(pipe.vae.config.latents_mean), torch.tensor(pipe.vae.config.latents_std)
        raw = pipe.vae.decode(x0 * std.view(1, 16, 1, 1, 1) + mean.view(1, 16, 1, 1, 1)).sample
        reference = pipe.video_processor.postprocess_video(raw, output_type="pt")  # (B, T', 3, H', W')
        plain = pipe.video_processor.postprocess_video(pipe.vae.decode(x0).sample, output_type="pt")
    assert video.float().std() > 1 and (video.float() - 255 * reference).abs().max() <= 0.51
    assert (video.float() - 255 * plain).abs().max() > 2  # the normalisation is seen
    with pytest.raises(ValueError, match=r"this VAE needs \(B, 16, T, H, W\)"):
        wan.decode_latents(folder, x0[:, :4])


@images
def test_decode_images_as_their_pipelines(saved, model):
    """Scale and shift are those of the config: the scale 0.18215 here in PixArt-alpha's, in PixArt-Sigma's 0.13025."""
    pipe, folder = saved(model)
    call = model.inputs(lengths=[3, 5])
    if model is Z_IMAGE:
        settings = dict(prompt_embeds=[row[keep] for row, keep in zip(call["text"], call["text_mask"])], height=8, width=12, num_inference_steps=1,
                        guidance_scale=0.0)
    else:
        settings = dict(negative_prompt=None, prompt_embeds=call["text"], prompt_attention_mask=call["mask"], height=16, width=24,
                        num_inference_steps=2, guidance_scale=1.0, use_resolution_binning=False)
    x0, pixels = (pipe(**settings, latents=call["x"], output_type=kind).images for kind in ("latent", "pt"))
    ours = decode_images(folder, x0)
    assert ours.shape == (2, 3, 8, 12) and ours.dtype == torch.uint8 and ours.float().std() > 1
    assert (ours.float() - 255 * pixels).abs().max() <= 0.51
    with torch.no_grad():
        plain = pipe.image_processor.postprocess(pipe.vae.decode(x0).sample, output_type="pt")
    assert (ours.float() - 255 * plain).abs().max() > 2  # scale and shift are seen
    for wrong in (x0[:, :3], x0[:, :, None]):
        with pytest.raises(ValueError, match=r"this VAE needs \(B, 4, H, W\)"):
            decode_images(folder, wrong)


# ---- the commands ------------------------------------------------------------------------------------------


# Of each: shape of cond.text, true entries of the masks of "A cat", "a dog runs" and "".
@pytest.mark.parametrize("model, shape, counts", [
    pytest.param(WAN, (2, 512, 16), None, id="wan"), pytest.param(Z_IMAGE, (2, 8, 10), (7, 8, 5), id="z_image"),
    pytest.param(PIXART, (2, 120, 10), (3, 4, 1), id="pixart")])
def test_command_line(saved, tmp_path, model, shape, counts):
    """What encode writes is what the scripts' --prompts and the network take; decode writes PNGs, or GIFs of a video."""
    teacher, video = ["--teacher", str(saved(model)[1])], model is WAN
    text, output = tmp_path / "prompts.txt", tmp_path / "new" / "prompts.safetensors"
    text.write_text("A cat\n\n a dog runs\n", encoding="utf-8")
    model.module.main(["encode", *teacher, "--prompts_txt", str(text), "--output", str(output)])
    assert [p.name for p in output.parent.iterdir()] == ["prompts.safetensors"]
    stored = load_file(output)
    assert stored["cond.text"].shape == shape and stored["uncond.text"].shape == (1, *shape[1:])
    net = fill(model.net(**CONFIGS[model]))
    prompts = io.Prompts(str(output), net.cond_names, {"text": net.text_dim})
    cond, uncond = prompts.rows(torch.tensor([1, 0]), "cpu"), prompts.unconditional(2, "cpu")
    assert cond["text"].shape == shape
    if model.mask:
        assert (*cond[model.mask].sum(1).flip(0).tolist(), *uncond[model.mask].sum(1).tolist()) == (*counts, counts[2])
    x, t = torch.randn(2, CONFIGS[model].get("in_channels", 4), *model.size), torch.ones(2)
    assert relative(net(x, t, **uncond), net(x, t, **cond)) > 1e-3

    latents, folder = tmp_path / "samples.safetensors", tmp_path / "pictures"
    save_file({"x0": torch.randn(2, 16, 2, 2, 3) if video else torch.randn(2, 4, 2, 3)}, latents)
    model.module.main(["decode", *teacher, "--latents", str(latents), "--output", str(folder)])
    assert sorted(p.name for p in folder.iterdir()) == [f"00{i}.{'gif' if video else 'png'}" for i in range(2)]
    with pytest.importorskip("PIL.Image").open(sorted(folder.iterdir())[1]) as picture:  # size is (W', H')
        assert (picture.n_frames == 5 and picture.size == (24, 16)) if video else (picture.size == (6, 4) and picture.mode == "RGB")


@each
def test_wrong_input_is_one_line_and_exit_code_2(saved, tmp_path, capsys, monkeypatch, model):
    teacher, empty, none = saved(model)[1], tmp_path / "empty", tmp_path / "none"
    (empty / "tokenizer").mkdir(parents=True), (empty / "vae").mkdir()
    text, blank, junk, bad, y = (str(tmp_path / name) for name in ("p.txt", "blank.txt", "junk", "x0", "y"))
    (tmp_path / "p.txt").write_text("a cat\n"), (tmp_path / "blank.txt").write_text("\n\n"), (tmp_path / "junk").write_bytes(b"junk")
    save_file({"x0": torch.zeros(1, 3, 1, 2, 2) if model is WAN else torch.zeros(1, 3, 2, 2)}, bad), save_file({"y": torch.zeros(1)}, y)

    def encode(text, *more, teacher=teacher):
        return ["encode", "--teacher", str(teacher), "--output", str(tmp_path / "out"), "--prompts_txt", str(text), *more]

    def decode(latents, *more, teacher=teacher):
        return ["decode", "--teacher", str(teacher), "--output", str(tmp_path / "out"), "--latents", str(latents), *more]

    def refused(says, flags, noisy=False):
        """noisy: a library that loads something may add lines of its own."""
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            model.module.main(flags)
        lines = [line for line in capsys.readouterr().err.splitlines() if not noisy or line.startswith("error: ")]
        assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0]
        assert not (tmp_path / "out").exists()

    refused("cannot read --prompts_txt", encode(none)), refused("holds no prompt", encode(blank))
    refused("--max_length is 0", encode(text, "--max_length", "0"))
    refused("cannot read --latents", decode(junk)), refused("cannot read --latents", decode(none)), refused("has no tensor x0", decode(y))
    if model is WAN:
        refused("--fps is 0", decode(junk, "--fps", "0"))
    refused("pass a diffusers pipeline folder", encode(text, teacher=none))
    refused("--teacher", encode(text, teacher=empty), noisy=True), refused("--teacher", decode(bad, teacher=empty), noisy=True)
    refused(f"this VAE needs (B, {'16, T' if model is WAN else 4}, H, W)", decode(bad), noisy=True)
    for name in ("transformers", "diffusers"):
        monkeypatch.setitem(sys.modules, name, None)  # import then raises ImportError, as when absent
    refused("pip install transformers", encode(text)), refused("pip install diffusers", decode(bad))
