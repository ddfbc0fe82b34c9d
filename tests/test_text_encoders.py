"""models/text_encoders.py: features of prompts are those of diffusers' pipelines; its command."""

import functools
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import refusal_of, relative
from pipelines import FAMILIES, encoded, save_pipeline
from safetensors.torch import load_file, save_file

from models import encode, libraries
from models.files import UserError, save_json
from models.networks import load_network
from models.plumbing import sets
from models.plumbing.data import Conditions, load_conditions, refuse_other_encoder
from models.plumbing.teachers import network_folder
from models.prompts import PromptWriter, open_prompts
from models.text_encoders import NEGATIVE_PROMPT, ask

# With capitals, spaces at the ends and in a row, HTML, a letter of no vocabulary; the fourth is so
# long that several encoders cut it.
PROMPTS = ["a cat runs", "  A Dog &amp;amp; a  cat RUNS fast", "é", "a dog runs fast, " * 7, "dog"]
each = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """-> function of a family: its tiny pipeline, and the folder where it is."""

    @functools.cache
    def make(family):
        folder = tmp_path_factory.mktemp(family) / "pipeline"
        return save_pipeline(family, folder), folder

    return make


@pytest.fixture
def command(tmp_path, capsys):
    """-> function of a --teacher, prompts and flags: the file that is written, what is printed."""

    def run(teacher, prompts, *flags, output="p"):
        (tmp_path / "p.txt").write_text("\n".join(prompts), encoding="utf-8")
        output = tmp_path / f"{output}.safetensors"
        given = ["--teacher", teacher, "--prompts_txt", tmp_path / "p.txt", "--output", output]
        capsys.readouterr()
        encode.main(list(map(str, [*given, *flags])))
        return output, capsys.readouterr().out

    return run


# ---- the pipelines of diffusers ------------------------------------------------------------------


def with_masks(text, mask, null, null_mask):
    return [row[keep.bool()] for row, keep in zip([*text, null[0]], [*mask, null_mask[0]])]


def rows_of(family, pipe, prompts, negative, length):
    """The pipeline's own features of prompts and of the negative one behind them, as dicts of what
    the network takes: the tokens alone where there is a mask."""
    how = {} if length is None else dict(max_sequence_length=length)
    more = [negative] * len(prompts)
    if family == "sdxl":
        given = {} if negative is None else dict(negative_prompt=negative)
        text, null, pooled, null_pooled = pipe.encode_prompt(prompts, **given)
        size = pipe._get_add_time_ids((24, 16), (0, 0), (24, 16), torch.float32, 5)[0]
        both = zip([*text, null[0]], [*pooled, null_pooled[0]])
        return [{"text": row, "pooled": whole, "size": size} for row, whole in both]
    if family == "qwen_image":
        found = [pipe.encode_prompt([prompt], **how)[0][0] for prompt in [*prompts, negative]]
    elif family == "z_image":  # it writes into the list it is given
        text, null = pipe.encode_prompt(list(prompts), negative_prompt=more, **how)
        found = [*text, null[0]]
    elif family in ("lumina2", "pixart"):
        found = with_masks(*pipe.encode_prompt(prompts, negative_prompt=more, **how))
    else:
        how = how or (dict(max_sequence_length=512) if "wan" in family else {})
        given = dict(device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
        given = given if family == "sd15" else how
        text, null = pipe.encode_prompt(prompts, negative_prompt=more, **given)
        found = [*text, null[0]]
    return [{"text": row} for row in found]


LENGTHS = {"wan": 4, "wan_5b": 4, "z_image": 7, "pixart": 3, "qwen_image": 131, "lumina2": 180}


@pytest.mark.parametrize("changed", [False, True], ids=["defaults", "flags"])
@each
def test_features_are_those_of_the_pipeline(saved, command, family, changed):
    """One by one with the pipeline's own negative prompt and length; three at a time with others.

    The last batch has two.
    """
    pipe, folder = saved(family)
    flags = ["--resolution", "24", "16"] if family == "sdxl" else []
    length = LENGTHS.get(family) if changed else None
    if changed:
        flags += ["--batch_size", "3", "--negative_prompt", "Fast dog"]
        flags += ["--max_length", str(length)] if length else []
    output, _ = command(folder, PROMPTS, *flags)
    asked = ask(str(folder), "Fast dog" if changed else None)
    with torch.no_grad():
        want = rows_of(family, pipe, PROMPTS, asked.negative, length)
    file, mask = open_prompts(output), asked.family.mask
    assert {key[5:] for key in file.keys() if "uncond" not in key} == {*want[0], mask} - {""}
    for i, row in enumerate(want):
        kind, at = ("cond", i) if i < len(PROMPTS) else ("uncond", 0)
        for name, value in row.items():
            got = file.get_slice(f"{kind}.{name}")[at : at + 1][0]
            if mask:
                keep = file.get_slice(f"{kind}.{mask}")[at : at + 1][0]
                assert keep[: len(value)].all() and not keep[len(value) :].any()
                assert not got[~keep].any()
                got = got[keep]
            assert got.shape == value.shape, name
            assert (got - value).abs().max() <= 1e-5 * max(1, value.abs().max()), name
    one = file.get_slice("cond.text")[0:1]
    assert relative(file.get_slice("cond.text")[4:5], one) > 0.01  # prompts are told apart


@each
def test_shards_interruptions_and_captions_give_the_same(saved, command, monkeypatch, family):
    """A run that was interrupted and writes shards, one that was not, and rows of captions: bit for
    bit the same batches, which the network takes."""
    folder = saved(family)[1]
    whole, _ = command(folder, PROMPTS, output="whole")
    real, rows = PromptWriter.write, []

    def write(writer, text, **beside):
        rows.append(text)
        if len(rows) == 4:
            raise KeyboardInterrupt
        real(writer, text, **beside)

    small = ["--shard_gb", "5e-7"]
    with monkeypatch.context() as patch:
        patch.setattr(PromptWriter, "write", write)
        with pytest.raises(KeyboardInterrupt):
            command(folder, PROMPTS, *small)
    shards, printed = command(folder, PROMPTS, *small)
    assert "going on after 3 of 5 prompts" in printed
    assert len(list(shards.parent.glob("p-0*"))) > 1 and not shards.exists()
    net = load_network(network_folder(str(folder)))[0]
    found = [
        Conditions(SimpleNamespace(prompts=str(path)), net).pick(torch.tensor([3, 0, 4, 1]), "cpu")
        for path in (whole, shards)
    ]
    captions = encoded(folder, PROMPTS)
    for part, kind in enumerate(("cond", "uncond")):
        assert found[0][part].keys() == found[1][part].keys() == set(net.cond_names)
        for name, value in found[0][part].items():
            index = [3, 0, 4, 1] if kind == "cond" else [0, 0, 0, 0]
            assert torch.equal(value, found[1][part][name]), name
            assert torch.equal(value, captions[f"{kind}.{name}"][index].to(value.dtype)), name
    out = [net(torch.ones(4, *sample_of(family, net)), torch.ones(4), **c) for c in found[0]]
    assert relative(*out) > 1e-3 and out[0].isfinite().all()


def sample_of(family, net):
    """The shape of a small sample."""
    sizes = {"wan": (1, 2, 2), "wan_5b": (1, 2, 2), "cogvideox": (2, 4, 6)}
    channels = 4 if family == "qwen_image" else net.config["in_channels"]  # of a patch, there
    return channels, *sizes.get(family, (8, 8))


def test_sdxl_without_a_negative_prompt(saved, command, tmp_path):
    """Zeros, unless model_index.json says that the empty prompt is encoded; "" is encoded."""
    folder = saved("sdxl")[1]
    root = shutil.copytree(folder, tmp_path / "root")
    index = json.loads((root / "model_index.json").read_text())
    save_json({**index, "force_zeros_for_empty_prompt": False}, str(root / "model_index.json"))
    plain, empty, own = (
        open_prompts(command(teacher, ["a cat"], *flags)[0])
        for teacher, flags in ((folder, []), (folder, ["--negative_prompt", ""]), (root, []))
    )
    for name in ("uncond.text", "uncond.pooled"):
        assert not plain.get_tensor(name).any() and empty.get_tensor(name).any()
        assert torch.equal(empty.get_tensor(name), own.get_tensor(name))
    for file in (plain, empty):
        assert file.get_tensor("uncond.size").tolist() == [[1024, 1024, 0, 0, 1024, 1024]]
        assert file.get_tensor("cond.size").tolist() == [[1024, 1024, 0, 0, 1024, 1024]]


def test_prompts_that_are_cut_are_named(saved, command):
    """One line, which names the line of the file; without such prompts there is none."""
    folder, long = saved("sdxl")[1], "a" * 90
    _, printed = command(folder, ["a cat", "", long, "dog", long])
    assert printed.splitlines()[0] == (
        "2 of 4 prompts have more than 77 tokens and are cut, line 3 first"
    )
    output, printed = command(folder, ["a cat"])  # a file of one line
    assert (
        "tokens" not in printed and open_prompts(output).get_slice("cond.text").get_shape()[0] == 1
    )
    assert (
        "1 of 1 prompts have more than 76 tokens"
        in command(folder, ["a" * 75], "--max_length", 76)[1]
    )


def test_lines_of_a_file_of_prompts(tmp_path):
    """A byte order mark is no letter, and only line feeds end a line."""
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffa cat\r\n\r\na\u2028dog\x0bruns\n".encode())
    assert encode.read_prompts(path) == {1: "a cat", 3: "a\u2028dog\x0bruns"}


def test_prompts_of_another_encoder_are_refused(saved, command):
    """Of the same width: by the class of transformer that they were encoded for."""
    output, _ = command(saved("pixart")[1], ["a cat"])
    file, where = open_prompts(output), "--prompts p"
    for name in ("PixArtTransformer2DModel", "UNet2DConditionModel", "Adapted"):
        refuse_other_encoder(file, type(name, (), {})(), where)
    for name in ("WanTransformer3DModel", "CogVideoXTransformer3DModel"):
        with pytest.raises(UserError, match=f"the teacher is a {name}: encode it with this"):
            refuse_other_encoder(file, type(name, (), {})(), where)
    net = SimpleNamespace(cond_names=("text",), text_dim=None)
    other = type("WanTransformer3DModel", (), vars(net))()
    for load in (
        lambda: Conditions(SimpleNamespace(prompts=str(output)), other),
        lambda: load_conditions(str(output), other, "prompts"),
    ):
        with pytest.raises(UserError, match="was encoded for a PixArtTransformer2DModel"):
            load()


# ---- what a folder is, and wrong input -----------------------------------------------------------


def folder_of(root, name, config):
    """A folder with one JSON file."""
    (root / name).parent.mkdir(parents=True)
    save_json(config, str(root / name))
    return str(root)


INDEX, NETWORK, UNET = "model_index.json", "transformer/config.json", "unet/config.json"
XL = {"addition_embed_type": "text_time"}


@pytest.mark.parametrize(
    "name, file, more, flags, negative, length",
    [
        ("WanPipeline", INDEX, {}, {}, NEGATIVE_PROMPT, 512),
        ("WanTransformer3DModel", NETWORK, {}, {}, NEGATIVE_PROMPT, 512),
        ("WanPipeline", INDEX, {}, dict(negative_prompt=""), "", 512),
        ("ZImagePipeline", INDEX, {}, {}, "", 512),
        ("ZImageTransformer2DModel", NETWORK, {}, dict(max_length=6), "", 6),
        ("PixArtAlphaPipeline", INDEX, {}, dict(negative_prompt="A dog"), "A dog", 120),
        ("PixArtSigmaPipeline", INDEX, {}, {}, "", 300),
        ("PixArtTransformer2DModel", NETWORK, {}, dict(max_length=9), "", 9),
        ("CogVideoXPipeline", INDEX, {}, {}, "", 226),
        ("CogVideoXTransformer3DModel", NETWORK, {}, dict(max_length=226), "", 226),
        ("QwenImagePipeline", INDEX, {}, {}, " ", 512),
        ("QwenImageTransformer2DModel", NETWORK, {}, dict(max_length=1024), " ", 1024),
        ("Lumina2Text2ImgPipeline", INDEX, {}, {}, "", 256),
        ("Lumina2Transformer2DModel", NETWORK, {}, {}, "", 256),
        ("StableDiffusionPipeline", INDEX, {}, {}, "", 77),
        ("UNet2DConditionModel", UNET, {}, {}, "", 77),
        ("StableDiffusionXLPipeline", INDEX, {}, {}, None, 77),
        ("UNet2DConditionModel", UNET, XL, {}, None, 77),
    ],
)
def test_the_class_decides(tmp_path, name, file, more, flags, negative, length):
    """The class in model_index.json, or else the network's; an explicit flag wins."""
    asked = ask(folder_of(tmp_path / "root", file, {"_class_name": name, **more}), **flags)
    assert (asked.negative, asked.max_length) == (negative, length)
    assert ("tokenizer_2" in asked.family.folders) == (negative is None)


WRONG = [
    # family, parts that are missing, flags, the message
    (
        "sd15",
        [],
        ["--max_length", "78"],
        "--max_length 78: a StableDiffusionPipeline takes at most",
    ),
    ("sdxl", [], ["--max_length", "78"], "takes at most 77 tokens: leave it out"),
    ("cogvideox", [], ["--max_length", "227"], "CogVideoXPipeline takes exactly 226 tokens"),
    ("cogvideox", [], ["--max_length", "225"], "CogVideoXPipeline takes exactly 226 tokens"),
    ("qwen_image", [], ["--max_length", "1025"], "QwenImagePipeline takes at most 1024 tokens"),
    ("sd15", [], ["--resolution", "512"], "--resolution has no effect with a StableDiffusionPip"),
    ("sdxl", [], ["--resolution", "8", "8", "8"], "--resolution 8 8 8: give H W, or one number"),
    ("sdxl", [], ["--clip", "x"], "--clip has no effect with a StableDiffusionXLPipeline"),
    ("lumina2", ["tokenizer"], [], "there is no tokenizer: pass a whole pipeline folder"),
    ("sdxl", ["tokenizer_2"], [], "there is no tokenizer_2: pass a whole pipeline folder"),
    (
        "sdxl",
        ["tokenizer_2", "text_encoder_2"],
        [],
        "a StableDiffusionXLPipeline encodes prompts with tokenizer, tokenizer_2, text_encoder, "
        "text_encoder_2, and there is no tokenizer_2 and no text_encoder_2: pass a whole pipeline",
    ),
]


@pytest.mark.parametrize("family, missing, flags, says", WRONG)
def test_wrong_input_is_one_line(saved, tmp_path, capsys, family, missing, flags, says):
    folder = saved(family)[1]
    if missing:
        folder = shutil.copytree(folder, tmp_path / "root")
        for name in missing:
            shutil.rmtree(folder / name)
    (tmp_path / "p.txt").write_text("a cat\n")
    given = ["--teacher", str(folder), "--prompts_txt", str(tmp_path / "p.txt"), *flags]
    assert says in refusal_of(capsys, encode.main, *given, "--output", str(tmp_path / "o"))
    assert not (tmp_path / "o").exists()


def test_libraries_that_cannot_be_imported(tmp_path, monkeypatch):
    """Missing, or there and broken, or there and too old: each has its own remedy."""
    (tmp_path / "diffusers_9.py").write_text("import no_such_dependency_of_it")
    (tmp_path / "diffusers_8.py").write_text("__version__ = '0.1'")
    monkeypatch.syspath_prepend(tmp_path)
    for library, says in {
        "diffusers_7": "diffusers_7 is not installed; .* pip install diffusers_7",
        "diffusers_9": "is installed and cannot be imported .*: pip install -U diffusers_9",
    }.items():
        with pytest.raises(UserError, match=says):
            libraries.require(library)
        with pytest.raises(UserError, match=says if "9" in library else "pip install diffusers_7"):
            sets.require(library, "a set")
    with pytest.raises(UserError, match="diffusers_8 0.1 has no AutoencoderKL"):
        libraries.load("diffusers_8", "AutoencoderKL", tmp_path, "vae")


def without_a_tensor(weights):
    tensors = load_file(weights)
    tensors.pop(sorted(tensors)[-1])
    save_file(tensors, weights, metadata={"format": "pt"})


DAMAGE = {
    "weights of a": without_a_tensor,
    "cannot be read": lambda weights: weights.write_bytes(weights.read_bytes()[:5000]),
    "cannot be read (": lambda weights: weights.write_text("version https://git-lfs.github.com/\n"),
    "has only a pickle (pytorch_model.bin)": lambda weights: weights.rename(
        weights.with_name("pytorch_model.bin")
    ),
}


@pytest.mark.parametrize("family", ["sd15", "wan"])
@pytest.mark.parametrize("says", DAMAGE)
def test_a_damaged_encoder_is_refused(saved, tmp_path, family, says):
    """Where weights are missing transformers would go on with random numbers in their place."""
    folder = shutil.copytree(saved(family)[1], tmp_path / "root")
    DAMAGE[says](folder / "text_encoder" / "model.safetensors")
    (tmp_path / "p.txt").write_text("a cat\n")
    given = ["--teacher", str(folder), "--prompts_txt", str(tmp_path / "p.txt")]
    with pytest.raises(UserError) as refused:
        encode.main([*given, "--output", str(tmp_path / "o")])
    assert says in str(refused.value) and not (tmp_path / "o").exists()


def test_a_tokenizer_that_needs_another_library(saved, tmp_path, capsys, monkeypatch):
    """Without tokenizer.json, and without transformers itself: one line names the library."""
    folder = shutil.copytree(saved("cogvideox")[1], tmp_path / "root")
    (tmp_path / "p.txt").write_text("a cat\n")
    given = ["--teacher", str(folder), "--prompts_txt", str(tmp_path / "p.txt")]
    given += ["--output", str(tmp_path / "o")]
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert "pip install sentencepiece" in refusal_of(capsys, encode.main, *given)
    monkeypatch.setitem(sys.modules, "sentencepiece", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "google.protobuf", None)
    assert "pip install protobuf" in refusal_of(capsys, encode.main, *given)
    (folder / "tokenizer" / "spiece.model").unlink()
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install transformers" in refusal_of(capsys, encode.main, *given)
