"""Tiny pipelines of random networks, one for each family of teachers that takes prompts.

    pipe = save_pipeline("sdxl", folder)  # which diffusers.DiffusionPipeline.from_pretrained takes

They are written by diffusers and transformers themselves: tokenizers, text encoders, network,
autoencoder, scheduler and model_index.json, some hundred thousand parameters together. FAMILIES has
the names.
"""

import pytest
import torch
from helpers import PIXART_SCHEDULER, fill, word_tokenizer
from released import COGVIDEOX, LUMINA2, PIXART, QWEN_IMAGE, WAN, Z_IMAGE
from test_networks import TINY_SD, TINY_SDXL

from models.text_encoders import ask, padded_rows
from tests.schedulers import COGVIDEOX_SCHEDULER

# Configs of the networks whose tiny ones are too small for the text encoders or autoencoders here.
CONFIGS = {
    WAN: dict(WAN.tiny, num_layers=2, text_dim=16, in_channels=16, out_channels=16),
    Z_IMAGE: Z_IMAGE.tiny,
    PIXART: PIXART.tiny,
    COGVIDEOX: dict(COGVIDEOX.tiny, max_text_seq_length=226),  # as its pipeline wants it
    QWEN_IMAGE: dict(QWEN_IMAGE.tiny, joint_attention_dim=16),
    LUMINA2: dict(LUMINA2.tiny, axes_lens=[300, 64, 64]),  # 256 tokens of a prompt
}
WAN_5B = dict(CONFIGS[WAN], in_channels=48, out_channels=48)
SCALED = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1)

# Like Qwen3's: whose turn it is, and an empty thought where thinking is off.
CHAT = (
    "{% for m in messages %}<start> {{ m.role }} {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<start> assistant "
    "{% if not enable_thinking %}<think> {% endif %}{% endif %}"
)


# ---- tokenizers of single characters -------------------------------------------------------------


def numbered(tokens):
    return {token: i for i, token in enumerate(tokens)}


def clip_tokenizer(transformers, **more):
    """CLIP's: lower case, a token of its own for the last letter of a word, "!" is 0."""
    letters = [c + end for c in map(chr, range(33, 127)) for end in ("", "</w>")]
    vocab = numbered([*letters, "<|startoftext|>", "<|endoftext|>"])
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77, **more)


def qwen_tokenizer(transformers):
    """Qwen 2's: bytes, and the words between which its templates put turns.

    It pads on the left, so that whoever relies on another side says so.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = numbered([*special, *sorted(ByteLevel.alphabet())])
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[], padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    return tokenizer


def gemma_tokenizer(transformers):
    """Gemma's: it begins with <bos>, and without more it pads on the left."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocab = numbered([*special, "▁", *map(chr, range(33, 127))])
    return transformers.GemmaTokenizer(vocab=vocab, merges=[], add_bos_token=True)


# ---- autoencoders and text encoders that several families share ----------------------------------


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


def flux_vae():
    """With a shift and without the two convolutions, as Z-Image's and Lumina's."""
    rest = dict(use_quant_conv=False, use_post_quant_conv=False)
    return image_vae(scaling_factor=0.3611, shift_factor=0.1159, **rest)


def clip(transformers, tokenizer, width, **more):
    """A text encoder of CLIP's kind; with projection_dim one that also has a pooled feature."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        **{"eos_token_id": tokenizer.eos_token_id, **more},
    )
    kind = "CLIPTextModelWithProjection" if "projection_dim" in more else "CLIPTextModel"
    return fill(getattr(transformers, kind)(config))


def t5(transformers, tokenizer):
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=10,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5EncoderModel(config).eval()


def t5_tokenizer():
    return word_tokenizer(["<pad>", "</s>", "<unk>"], end="</s>", eos_token="</s>")


# ---- the pipelines -------------------------------------------------------------------------------


def wan_parts(diffusers, transformers, transformer):
    tokenizer = t5_tokenizer()
    encoder = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4
        )
    )
    vae, more = dict(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1), {}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    if transformer.config.in_channels == 48:  # Wan 2.2's 5B
        vae |= dict(z_dim=48, decoder_base_dim=4, is_residual=True, patch_size=2)
        vae |= dict(in_channels=12, out_channels=12, scale_factor_spatial=16)
        g = torch.Generator().manual_seed(0)
        vae |= dict(latents_mean=torch.randn(48, generator=g).tolist())
        vae |= dict(latents_std=(0.5 + torch.rand(48, generator=g)).tolist())
        more = dict(expand_timesteps=True)
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        )
    vae = diffusers.AutoencoderKLWan(**vae).eval()
    return diffusers.WanPipeline(tokenizer, encoder.eval(), vae, scheduler, transformer, **more)


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
    return diffusers.ZImagePipeline(
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        flux_vae(),
        encoder.eval(),
        tokenizer,
        transformer,
    )


def pixart_parts(diffusers, transformers, transformer):
    tokenizer = t5_tokenizer()
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(PIXART_SCHEDULER)
    vae, encoder = image_vae(scaling_factor=0.18215), t5(transformers, tokenizer)
    return diffusers.PixArtAlphaPipeline(tokenizer, encoder, vae, transformer, scheduler)


def cogvideox_parts(diffusers, transformers, transformer):
    tokenizer, stages = t5_tokenizer(), 4  # an eighth of the sides
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * stages,
        up_block_types=("CogVideoXUpBlock3D",) * stages,
        block_out_channels=(4,) * stages,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler.from_config(COGVIDEOX_SCHEDULER)
    encoder = t5(transformers, tokenizer)
    return diffusers.CogVideoXPipeline(tokenizer, encoder, vae, transformer, scheduler)


def qwen_image_parts(diffusers, transformers, transformer):
    tokenizer = qwen_tokenizer(transformers)
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]},
        bos_token_id=0,
        eos_token_id=2,
    )
    vision = dict(depth=1, hidden_size=8, intermediate_size=8, num_heads=2, out_hidden_size=16)
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    encoder = fill(transformers.Qwen2_5_VLForConditionalGeneration(config))
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[-0.76, 0.11, -0.19, 0.25],
        latents_std=[2.8, 1.2, 2.1, 3.3],
    ).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    )
    return diffusers.QwenImagePipeline(scheduler, vae, encoder, tokenizer, transformer)


def lumina2_parts(diffusers, transformers, transformer):
    tokenizer = gemma_tokenizer(transformers)
    config = transformers.Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=10,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=6,
        query_pre_attn_scalar=6,
        sliding_window=64,
    )
    encoder = fill(transformers.Gemma2Model(config))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    return diffusers.Lumina2Pipeline(transformer, scheduler, flux_vae(), encoder, tokenizer)


def sd15_parts(diffusers, transformers, unet):
    tokenizer = clip_tokenizer(transformers)
    rest = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    scheduler = diffusers.PNDMScheduler(**SCALED, skip_prk_steps=True)
    encoder, vae = clip(transformers, tokenizer, 10), image_vae(scaling_factor=0.18215)
    return diffusers.StableDiffusionPipeline(vae, encoder, tokenizer, unet, scheduler, **rest)


def sdxl_parts(diffusers, transformers, unet):
    """As released: the second tokenizer pads with "!", and its encoder's config has an eos_token_id
    of 2, by which the token with the highest number is meant."""
    first, second = clip_tokenizer(transformers), clip_tokenizer(transformers, pad_token="!")
    return diffusers.StableDiffusionXLPipeline(
        vae=image_vae(scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip(transformers, first, 4),
        text_encoder_2=clip(transformers, second, 6, projection_dim=5, eos_token_id=2),
        tokenizer=first,
        tokenizer_2=second,
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**SCALED, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


# Of each family: class of the network, its config, and the function that makes the rest.
FAMILIES = {
    "wan": (WAN.name, CONFIGS[WAN], wan_parts),
    "wan_5b": (WAN.name, WAN_5B, wan_parts),
    "z_image": (Z_IMAGE.name, CONFIGS[Z_IMAGE], z_image_parts),
    "pixart": (PIXART.name, CONFIGS[PIXART], pixart_parts),
    "cogvideox": (COGVIDEOX.name, CONFIGS[COGVIDEOX], cogvideox_parts),
    "qwen_image": (QWEN_IMAGE.name, CONFIGS[QWEN_IMAGE], qwen_image_parts),
    "lumina2": (LUMINA2.name, CONFIGS[LUMINA2], lumina2_parts),
    "sd15": ("UNet2DConditionModel", TINY_SD, sd15_parts),
    "sdxl": ("UNet2DConditionModel", TINY_SDXL, sdxl_parts),
}


def make_pipeline(family):
    """A pipeline of diffusers with random networks. Skips the test where a library is missing."""
    diffusers, transformers = map(pytest.importorskip, ("diffusers", "transformers"))
    name, config, parts = FAMILIES[family]
    torch.manual_seed(0)
    pipe = parts(diffusers, transformers, fill(getattr(diffusers, name)(**config)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save_pipeline(family, folder):
    """The same, written to a folder.  -> the pipeline"""
    pipe = make_pipeline(family)
    pipe.save_pretrained(folder)
    return pipe


def encoded(folder, prompts, **how):
    """Prompts as a file of --prompts with padding: {"cond.text": (N, L, D), "uncond.text": ...}.

    how: arguments of `ask`.
    """
    asked = ask(str(folder), **how)
    encoder = asked.load()
    counts = encoder.count([*prompts, asked.negative or ""])
    rows = list(padded_rows(asked, encoder, prompts, asked.length(asked.kept(counts))))
    stacked = {k: torch.stack([row[k] for row in rows]) for k in rows[0]}
    cond = {f"cond.{k}": v[:-1] for k, v in stacked.items()}
    return cond | {f"uncond.{k}": v[-1:].clone() for k, v in stacked.items()}
