"""What an error message advises works: one case, at least, for every message that names a flag.

The messages are read out of the source, so that a new one without a case is found: see
test_every_message_that_names_a_flag_has_a_case. A case is refused with that message, and what the
message advises is not: the run gets as far as its first update, or the command ends well.
"""

import ast
import contextlib
import functools
import importlib
import json
import re
import shlex
import shutil
import types
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    quiet,
    refusal_of,
    ring_network,
    save_tiny_pixart,
    save_tiny_teacher,
    save_tiny_vp_teacher,
    save_tiny_wan,
)
from PIL import Image
from pipelines import image_vae, save_pipeline
from safetensors.torch import load_file, save_file
from test_dit_imagenet import official_state
from test_pipeline import save_space
from test_trellis import CLASSES, save_root, save_text_root, save_tiny_clip, sparse_file

import dmd
import latent_fm
import linvideo
import mdt_dist
import phased_dmd
import tdm
from models import encode
from models.files import UserError, save_json
from models.networks import WEIGHTS, load_network, lora, network_config, save_network
from models.networks.dit import DiT
from models.networks.trellis import SLatFlowModel, SparseStructureFlowModel
from models.plumbing import teachers
from models.plumbing.data import load_conditions
from models.plumbing.flags import Parser
from models.plumbing.run import Run
from models.prompts import header_bytes

SCRIPTS = sorted(p.stem for p in ROOT.glob("*.py"))
TOOLS = ["models.encode", "models.decode", "models.convert", "models.metrics", "models.meshes"]


# ---- the messages, out of the source -------------------------------------------------------------

ERRORS = {"UserError", "TrainingError", "ValueError", "error"}


def text_of(node, known):
    """A string as the source has it, {} for what is filled in. known: {variable: its text}."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part, known) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return text_of(node.value, known)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left, known) + text_of(node.right, known)
    if isinstance(node, ast.Name):
        return known.get(node.id, "{}")
    return "{}"


def messages_of_function(function, constants):
    """-> texts of what a function raises, gives to Parser.error, or yields as (wrong, why)."""
    known, found = dict(constants), []
    for node in sorted(ast.walk(function), key=lambda n: getattr(n, "lineno", 0)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            known[node.targets[0].id] = text_of(node.value, known)
            if node.targets[0].id == "remedy":  # of another function's message
                found.append(known["remedy"])
        if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            known[node.target.id] = known.get(node.target.id, "") + text_of(node.value, known)
        if isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple):
            if len(node.value.elts) == 2:
                found.append(text_of(node.value.elts[1], known))
        if isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "id", None) or getattr(node.func, "attr", None)
            if name in ERRORS:
                found.append(text_of(node.args[0], known))
    return found


@functools.cache
def messages():
    """-> [(file, text)] of every message that names a flag."""
    paths, found = [*ROOT.glob("*.py"), *ROOT.glob("models/**/*.py")], set()
    for path in sorted(paths):
        tree, constants = ast.parse(path.read_text()), {}
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                constants[node.targets[0].id] = text_of(node.value, {})
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                texts = messages_of_function(node, constants)
                texts = {t for t in texts if flags_in(t) or "--{}" in t}
                found |= {(str(path.relative_to(ROOT)), t) for t in texts}
    return sorted(found)


def flags_in(text):
    """Names of the flags in a message, without the dashes."""
    return re.findall(r"(?<![\w-])--([a-z]\w*)", text)


# ---- what the cases start from -------------------------------------------------------------------


def pictures(folder, count=2, size=8, name=""):
    """So many little PNGs in a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        pixels = torch.randint(0, 256, (size, size, 3), generator=g, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{name}{i}.png")


def short(script, out, flags):
    """A quiet run of two updates.  -> its folder"""
    with pytest.MonkeyPatch.context() as m:
        quiet(m)
        m.setattr(latent_fm, "finish", lambda *a, **k: None)
        fixed = ["--output_dir", str(out)]
        if "--max_train_steps" not in flags:
            fixed += ["--max_train_steps", "2"]
        script.main([*shlex.split(flags), *fixed])
    return out


class Places:
    """Files and folders of the cases, made when a case names them: Places(root).TEACHER."""

    def __init__(self, root):
        self.root = root

    def __getitem__(self, name):
        made = self.root / f"made-{name}"
        if not made.exists():
            (self.root / name.lower()).mkdir(exist_ok=True)
            where = getattr(self, name)(self.root / name.lower())
            made.write_text(str(where))
        return made.read_text()

    def EMPTY(self, root):
        return root

    def FILE(self, root):
        (root / "file").write_text("")
        return root / "file"

    # ---- networks

    def TEACHER(self, root):
        return save_tiny_teacher(root / "teacher")

    def VP(self, root):
        return save_tiny_vp_teacher(root)

    def OTHER(self, root):
        net = DiT(size=(8, 8), patch=(4, 4), channels=1, dim=32, depth=1, num_classes=3)
        save_network(net, network_config(net), str(root))
        return root

    def NAMED(self, root):
        """Of pictures, and its classes have names."""
        size = dict(size=(8, 8), patch=(4, 4), channels=3, dim=32, depth=1)
        net = DiT(**size, num_classes=2, class_names=["x", "y"])
        save_network(net, network_config(net), str(root))
        return root

    def WAN(self, root):
        save_tiny_wan(root)
        return root

    def WAN22(self, root):
        save_tiny_wan(root, boundary=0.875)
        return root

    def PIXART(self, root):
        save_tiny_pixart(root, 512)
        return root

    def PROMPTS(self, root):
        return Path(self["WAN"]) / "prompts.safetensors"

    def PIXART_PROMPTS(self, root):
        return Path(self["PIXART"]) / "prompts.safetensors"

    def STRUCTURE(self, root):
        """The first stage of TRELLIS, as small as can be."""
        return save_root(root, {SparseStructureFlowModel: CLASSES[SparseStructureFlowModel]})[
            SparseStructureFlowModel
        ]

    def LATENTS(self, root):
        """The second stage, of points."""
        return save_root(root, {SLatFlowModel: CLASSES[SLatFlowModel]})[SLatFlowModel]

    def TEXT_STRUCTURE(self, root):
        """The first stage of a text model."""
        return save_text_root(root, self["CLIP"])[SparseStructureFlowModel]

    def CLIP(self, root):
        return save_tiny_clip(root)

    def TEXT_ROOT(self, root):
        return Path(self["TEXT_STRUCTURE"]).parents[1]

    # ---- adapters

    def LORA(self, root, rank=4):
        net = load_network(self["TEACHER"])[0]
        lora.add(net, "a", rank, 8.0)
        lora.save(net, "a", str(root / "lora.safetensors"))
        return root / "lora.safetensors"

    def BIG_LORA(self, root):
        return self.LORA(root, rank=8)

    def DIFFERENCE(self, root):
        """The same with a full difference of one bias."""
        found = load_file(self["LORA"])
        name = next(k for k in found if "lora_A" in k).split(".lora_A")[0]
        rows = next(v for k, v in found.items() if k.startswith(name) and "lora_B" in k).shape[0]
        save_file({**found, f"{name}.diff_b": torch.zeros(rows)}, root / "lora.safetensors")
        return root / "lora.safetensors"

    # ---- data

    def DATA(self, root):
        """Labelled items of the tiny teacher's shape."""
        return self.tensors(root)

    def tensors(self, root, **more):
        x0 = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        found = {"x0": x0, "cond.label": torch.arange(6) % 3, **more}
        save_file({k: v for k, v in found.items() if v is not None}, str(root / "d.safetensors"))
        return root / "d.safetensors"

    def UNLABELLED(self, root):
        return self.tensors(root, **{"cond.label": None})

    def FLOAT_LABELS(self, root):
        return self.tensors(root, **{"cond.label": torch.arange(6) % 3 + 0.5})

    def WHOLE_NUMBERS(self, root):
        return self.tensors(root, x0=torch.ones(6, 1, 4, 4, dtype=torch.int64))

    def FEW_LABELS(self, root):
        return self.tensors(root, **{"cond.label": torch.arange(5) % 3})

    def NO_ITEMS(self, root):
        return self.tensors(root, x0=None)

    def MANY_CLASSES(self, root):
        return self.tensors(root, **{"cond.label": torch.arange(6)})

    def WIDE(self, root):
        return self.tensors(root, x0=torch.randn(6, 1, 4, 6))

    def IMAGES_FILE(self, root):
        return self.tensors(root, x0=torch.randn(6, 3, 8, 8))

    def MAPS_FILE(self, root):
        maps = torch.arange(6 * 64).reshape(6, 8, 8) % 3
        more = {"cond.label": None, "cond.map": maps}
        return self.tensors(root, x0=torch.randn(6, 3, 8, 8), **more)

    def VIDEOS(self, root):
        return self.tensors(root, x0=torch.randn(6, 3, 2, 8, 8))

    def FOLDER(self, root):
        for name in ("x", "y"):
            pictures(root / name)
        return root

    def OTHER_FOLDER(self, root):
        for name in ("v", "w"):
            pictures(root / name)
        return root

    def LOOSE(self, root):
        pictures(root, name="loose")
        return Path(shutil.copytree(self["FOLDER"], root, dirs_exist_ok=True))

    def NO_PICTURES(self, root):
        (root / "x").mkdir()
        return root

    def NUMBERED(self, root):
        pictures(root / "00000")
        return root

    def LETTERED(self, root):
        """NUMBERED with a letter before the number."""
        pictures(root / "a00000")
        return root

    def described(self, root, labels):
        """Pictures with a dataset.json."""
        pictures(root / "00000")
        save_json({"labels": labels}, str(root / "dataset.json"))
        return root

    def DESCRIBED(self, root):
        return self.described(root, [["00000/0.png", 0], ["00000/1.png", 1]])

    def NO_LABELS(self, root):
        return self.described(root, None)

    def WRONG_LABELS(self, root):
        return self.described(root, {"00000/0.png": 0, "00000/1.png": 1})

    def MAPS(self, root):
        """A map for each of FOLDER's pictures, of classes 0 to 2."""
        for path in Path(self["FOLDER"]).rglob("*.png"):
            at = root / path.relative_to(self["FOLDER"])
            at.parent.mkdir(exist_ok=True)
            Image.fromarray((torch.arange(64).reshape(8, 8) % 3).byte().numpy()).save(at)
        return root

    def names(self, root, value):
        (root / "names.json").write_text(json.dumps(value))
        return root / "names.json"

    def NAMES(self, root):
        return self.names(root, ["skin", "l_eye", "r_eye"])

    def TWO_NAMES(self, root):
        return self.names(root, ["skin", "hair"])

    def ONE_SIDE(self, root):
        return self.names(root, ["skin", "l_eye", "hair"])

    def NO_LIST(self, root):
        return self.names(root, {"skin": 0})

    def UNDERSCORES(self, root):
        pictures(root, name="x_")
        return root

    def OTHER_CACHE(self, root):
        (root / "cache.json").write_text("{}")
        return root

    def SPARSE(self, root):
        sparse_file(root / "d.safetensors")
        return root / "d.safetensors"

    def WIDE_SPARSE(self, root):
        sparse_file(root / "d.safetensors", feats=torch.randn(11, 4))
        return root / "d.safetensors"

    def DENSE(self, root, **more):
        """What the first stage of TRELLIS takes."""
        found = {"x0": torch.randn(3, 3, 4, 4, 4), "cond.tokens": torch.randn(3, 5, 10), **more}
        save_file({k: v for k, v in found.items() if v is not None}, str(root / "d.safetensors"))
        return root / "d.safetensors"

    def TOKENS(self, root):
        return self.DENSE(root, x0=None)

    def NO_TOKENS(self, root):
        return self.DENSE(root, **{"cond.tokens": None})

    def WRONG_UNCOND(self, root):
        return self.DENSE(root, **{"uncond.tokens": torch.randn(1, 4, 10)})

    def TEXT_TOKENS(self, root):
        """Without those of the empty prompt."""
        return self.DENSE(root, **{"cond.tokens": torch.randn(3, 5, 768)})

    def WHOLE_TEXT_TOKENS(self, root):
        tokens = {"cond.tokens": torch.randn(3, 5, 768), "uncond.tokens": torch.randn(1, 5, 768)}
        return self.DENSE(root, **tokens)

    # ---- runs

    def RUN(self, root):
        flags = f"--teacher {self['TEACHER']} --train_batch_size 4 --checkpointing_steps 1"
        folder = short(dmd, root / "run", flags)
        (folder / "report.json").write_text("{}")  # as a run that is not quiet leaves one
        return folder

    def LORA_RUN(self, root):
        flags = f"--teacher {self['TEACHER']} --train_batch_size 4 --checkpointing_steps 1"
        return short(dmd, root / "run", f"{flags} --lora_rank 2 --fake_lora_rank 2")

    def RUN_2(self, root):
        """For the resumed run that goes on, so that RUN's states stay."""
        return Path(shutil.copytree(self["RUN"], root / "run"))

    def STUDENT(self, root):
        return Path(shutil.copytree(Path(self["RUN"]) / "student", root / "student"))

    def OTHER_RUN(self, root):
        return short(dmd, root / "run", f"--teacher {self['OTHER']} --train_batch_size 4")

    def TDM(self, root):
        flags = f"--teacher {self['TEACHER']} --train_batch_size 4 --student_steps 1 2"
        return short(tdm, root / "run", flags)

    def LINEAR(self, root):
        flags = f"--teacher {self['TEACHER']} --train_batch_size 4 --bank_size 4 --select 0"
        return short(linvideo, root / "run", flags)

    def BANK(self, root):
        return Path(self["LINEAR"]) / "bank"

    def LINVIDEO(self, root):
        flags = f"--teacher {self['TEACHER']} --train_batch_size 4 --bank_size 4 --objective adm"
        return short(linvideo, root / "run", flags)

    def STRUCTURE_RUN(self, root):
        flags = f"--teacher {self['STRUCTURE']} --data {self['DENSE']} --train_batch_size 2"
        return short(mdt_dist, root / "run", flags)

    def TEXT_RUN(self, root):
        flags = f"--teacher {self['TEXT_STRUCTURE']} --data {self['WHOLE_TEXT_TOKENS']}"
        return short(mdt_dist, root / "run", f"{flags} --train_batch_size 2")

    def EXPERTS(self, root, more=""):
        flags = f"--teacher {self['TEACHER']} --train_batch_size 4 --student_steps 2 --phases 2"
        return short(phased_dmd, root / "run", f"{flags} {more}")

    def HALF(self, root):
        """The state after the last update of the first of two phases."""
        return self.EXPERTS(root, "--max_train_steps 6") / "state" / "step-0000003"

    def THREE_EXPERTS(self, root):
        return self.EXPERTS(root, "--student_steps 3 --phases 3 --max_train_steps 3")

    def LORA_EXPERTS(self, root):
        """As older runs left them, without a fingerprint of their teacher."""
        folder = self.EXPERTS(root, "--lora_rank 2")
        path = folder / "student" / "sampler.json"
        saved = json.loads(path.read_text())
        saved.pop("base_fingerprint")
        path.write_text(json.dumps(saved))
        return folder

    def LOST_EXPERTS(self, root):
        """Adapters whose teacher is not where it was."""
        folder = Path(shutil.copytree(self["LORA_EXPERTS"], root / "run"))
        path = folder / "student" / "sampler.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base": "/nowhere"}))
        return folder

    def PAIR(self, root):
        """One adapter of each of WAN22's networks, under LightX2V's names."""
        for i, name in enumerate(("high_noise_model", "low_noise_model")):
            net = load_network(str(Path(self["WAN22"]) / ("transformer" + "_2" * i)))[0]
            lora.add(net, "a", 2, 8.0)
            lora.save(net, "a", str(root / f"{name}.safetensors"))
        return root

    def PCA_RUN(self, root):
        flags = f"--data {self['FOLDER']} --resolution 8 --train_batch_size 2 --patch_size 1"
        return short(latent_fm, root / "run", f"{flags} --autoencoder pca --pca_channels 3")

    def LATENT(self, root):
        flags = f"--data {self['FOLDER']} --resolution 8 --train_batch_size 2"
        return short(latent_fm, root / "run", flags)

    def LATENT_HUGE(self, root):
        """The same with weights whose products are not finite."""
        folder = Path(shutil.copytree(self["LATENT"], root / "run"))
        path = folder / "student" / WEIGHTS
        save_file({k: v * 1e30 for k, v in load_file(path).items()}, path)
        return folder

    def SHAPES_RUN(self, root):
        return short(latent_fm, root / "latent_fm-shapes", "--data shapes --pool 100")

    # ---- the commands beside the scripts

    def OFFICIAL(self, root):
        save_file(official_state(), root / "official.safetensors")
        return root / "official.safetensors"

    def PROMPTS_TXT(self, root):
        (root / "prompts.txt").write_text("a cat\n")
        return root / "prompts.txt"

    def INTERRUPTED(self, root):
        """An output of which there is a beginning, of other prompts."""
        (root / "p.safetensors.partial").mkdir()
        begun = header_bytes({}, {"fingerprint": "of others"})
        (root / "p.safetensors.partial" / "p.safetensors").write_bytes(begun)
        return root / "p.safetensors"

    def NO_PROMPTS_TXT(self, root):
        (root / "prompts.txt").write_text("\n")
        return root / "prompts.txt"

    def PICTURES(self, root):
        pictures(root, name="objects")
        return root

    def WAN_PIPE(self, root):
        save_pipeline("wan", root)
        return root

    def SDXL_PIPE(self, root):
        save_pipeline("sdxl", root)
        return root

    def PIXART_PIPE(self, root):
        save_pipeline("pixart", root)
        return root

    def BARE_PIXART(self, root):
        """Without the file that tells alpha from Sigma."""
        shutil.copytree(self["PIXART_PIPE"], root, dirs_exist_ok=True)
        (root / "model_index.json").unlink()
        return root

    def DIT_ROOT(self, root):
        save_json({"_class_name": "DiTPipeline"}, str(root / "model_index.json"))
        return root

    def CAPTIONED(self, root):
        pictures(root)
        for i in range(2):
            (root / f"{i}.txt").write_text("a cat")
        return root

    def CAPTIONS(self, root):
        """Of PICTURES."""
        (root / "captions.json").write_text(json.dumps({f"objects{i}.png": "a" for i in range(2)}))
        return root / "captions.json"

    def CAPTION_LINES(self, root):
        rows = [json.dumps({"file_name": f"objects{i}.png", "text": "a"}) for i in range(2)]
        (root / "captions.jsonl").write_text("\n".join(rows))
        return root / "captions.jsonl"

    def NO_CAPTIONS(self, root):
        (root / "captions.json").write_text(json.dumps({"objects0.png": 3}))
        return root / "captions.json"

    def BROKEN_LINES(self, root):
        (root / "captions.jsonl").write_text("a cat")
        return root / "captions.jsonl"

    def MOVIES(self, root):
        """Five frames each."""
        for i in range(2):
            frames = [Image.new("RGB", (16, 16), (40 * n, 0, 90)) for n in range(5)]
            frames[0].save(root / f"{i}.gif", save_all=True, append_images=frames[1:])
            (root / f"{i}.txt").write_text("a cat runs")
        return root

    def NO_TOKENIZER(self, root):
        """A pipeline whose tokenizer/ is empty."""
        save_json({"_class_name": "WanPipeline"}, str(root / "model_index.json"))
        (root / "tokenizer").mkdir()
        (root / "text_encoder").mkdir()
        return root

    def NO_ENCODER(self, root):
        """A pipeline without tokenizer/ and text_encoder/."""
        save_json({"_class_name": "WanPipeline"}, str(root / "model_index.json"))
        return root

    def TRELLIS_ROOT(self, root):
        save_root(root, {})
        return root

    def VAE(self, root):
        image_vae().save_pretrained(root / "vae")
        return root

    def OTHER_VAE(self, root):
        (root / "vae").mkdir()
        save_json({"_class_name": "AutoencoderTiny"}, str(root / "vae" / "config.json"))
        return root

    def SPACE(self, root):
        save_space(root)
        return root

    def VAE_WITHOUT_WEIGHTS(self, root):
        shutil.copytree(self["VAE"], root, dirs_exist_ok=True)
        (root / "vae" / WEIGHTS).unlink()
        return root

    def X0(self, root, *shape):
        save_file({"x0": torch.randn(shape or (2, 4, 4, 4))}, root / "x0.safetensors")
        return root / "x0.safetensors"

    def X0_EMPTY(self, root):
        return self.X0(root, 0, 4, 4, 4)

    def X0_VIDEO(self, root):
        return self.X0(root, 1, 16, 1, 2, 2)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    return Places(tmp_path_factory.mktemp("places"))


# ---- the cases -----------------------------------------------------------------------------------

WAN22 = "--teacher WAN22 --prompts PROMPTS --sample_shape 4 2 4 6 --student_steps 4"
SEMANTIC = "--task semantic --data FOLDER --resolution 8 --maps MAPS"
RESUMED = "--resume_from_checkpoint latest --output_dir RUN_2 --student_steps 1"
FIRST_PHASE = "--resume_from_checkpoint HALF --train_batch_size 4 --student_steps 2 --phases 2"
OUT = "--output OUT"

# Command, a piece of the message as the source has it ({} is filled in), flags that are refused
# with it, and flags as it advises, one line for every way out. Words in capitals are Places; OUT is
# a new path, ADVISED the flags, or the flag's value, that the message ends with. A line that begins
# with another script is of that one.
CASES = [
    # ---- flags that nothing reads beside others
    (
        "dmd",
        "--{}: {}: leave it out",
        "--student_steps 4 --student_times 0.4",
        ["--student_times 0.4"],
    ),
    (
        "linvideo",
        "--{}: {}: leave it out",
        "--fake_update_ratio 2",
        ["", "--fake_update_ratio 2 --objective adm_critic"],
    ),
    ("linvideo", "--{}: {}: leave it out", "--critic_steps 2 --objective dmd", ["--objective dmd"]),
    (
        "linvideo",
        "--{}: {}: leave it out",
        "--part 0.5 --objective adm",
        ["--objective adm", "--part 0.5 --objective adm --state part"],
    ),
    (
        "linvideo",
        "--{}: {}: leave it out",
        "--fresh 3",
        ["", "--fresh 3 --objective adm --state policy"],
    ),
    (
        "mdt_dist",
        "--{}: {}: leave it out",
        "--teacher ring --arm vm --vd_weight kl",
        ["--teacher ring --arm vm", "--teacher ring --arm vd --vd_weight kl"],
    ),
    (
        "latent_fm",
        "--{}: {}: leave it out",
        "--data shapes --pool 100 --optimizer adamw --learning_rate_muon 0.1",
        ["--data shapes --pool 100 --optimizer adamw"],
    ),
    (
        "latent_fm",
        "--{}: {}: leave it out",
        "--data shapes --pool 100 --preview_every 5",
        ["--data shapes --pool 100"],
    ),
    # ---- dmd
    ("dmd", "--dm_range: LO must be below HI", "--dm_range 0.9 0.1", ["--dm_range 0.1 0.9"]),
    (
        "phased_dmd",
        "--preset long is for small networks: give --max_train_steps N instead",
        f"{WAN22} --preset long",
        [f"{WAN22} --max_train_steps 3"],
    ),
    (
        "dmd",
        "--sequence_ranks {}: {} rank(s) do not divide into groups of {}: use one of {}",
        "--sequence_ranks 2",
        ["--sequence_ranks 1"],
    ),
    (
        "dmd",
        "--data is for the GAN or --student_input real with several steps: set --gan_weight",
        "--data DATA",
        ["--data DATA --gan_weight 0.1", "", "--data DATA --student_input real --student_steps 2"],
    ),
    (
        "dmd",
        "--gan_weight and --student_input real need data: give --data FOLDER",
        "--gan_weight 0.1",
        ["--gan_weight 0.1 --data DATA", "--gan_weight 0"],
    ),
    (
        "dmd",
        "--gan_weight_d 0 leaves the GAN's head untrained: give it, or --gan_weight 0",
        "--gan_weight_d 0 --gan_weight 0.1 --data DATA",
        ["--gan_weight_d 0.1 --gan_weight 0.1 --data DATA", "--gan_weight 0"],
    ),
    (
        "dmd",
        "--no_fake_score leaves the GAN's head untrained",
        "--no_fake_score --gan_weight 0.1 --data DATA",
        ["--no_fake_score --gan_weight 0"],
    ),
    (
        "dmd",
        "--regression_weight needs teacher samples: give --teacher_steps of at least 1",
        "--regression_weight 1 --teacher_steps 0",
        ["--regression_weight 1 --teacher_steps 1 --regression_pairs 4"],
    ),
    (
        "dmd",
        "--regression_weight is DMD v1, a one-step method: use --student_steps 1",
        "--regression_weight 1 --student_steps 2",
        ["--regression_weight 1 --student_steps 1 --teacher_steps 1 --regression_pairs 4"],
    ),
    (
        "dmd",
        "--dm_weight 0 leaves nothing to learn from: give --gan_weight or --regression_weight",
        "--dm_weight 0",
        [
            "--dm_weight 0 --gan_weight 0.1 --data DATA",
            "--dm_weight 0 --regression_weight 1 --teacher_steps 1 --regression_pairs 4",
        ],
    ),
    (
        "dmd",
        "--no_fake_score is about the matching loss, which --dm_weight 0 takes out",
        "--no_fake_score --dm_weight 0 --regression_weight 1",
        [
            "--no_fake_score --regression_weight 1 --teacher_steps 1 --regression_pairs 4",
            "--dm_weight 0 --regression_weight 1 --teacher_steps 1 --regression_pairs 4",
        ],
    ),
    (
        "dmd",
        "--fake_init: nothing reads the fake score here: leave it out",
        "--no_fake_score --fake_init RUN",
        ["--no_fake_score"],
    ),
    (
        "dmd",
        "--fake_init {} is a student, no score: give its run, with its state/",
        "--fake_init STUDENT",
        ["--fake_init RUN"],
    ),
    (
        "dmd",
        "--fake_init {}: it has no fake of this run's shapes: give a network like the teacher's",
        "--fake_init OTHER_RUN",
        ["--fake_init TEACHER", "--fake_init RUN --student_steps 2"],
    ),
    (
        "dmd",
        "--fake_init {}: it has no adapter of rank {} and alpha {} for the fake: give the run's",
        "--fake_init LORA_RUN --fake_lora_rank 3",
        ["--fake_init LORA_RUN --fake_lora_rank 2 --lora_alpha 8", "--fake_lora_rank 3"],
    ),
    ("dmd", "--student_times must descend", "--student_times 0.4 1", ["--student_times 1 0.4"]),
    # ---- decoupled_dmd
    ("decoupled_dmd", "--{}: LO must be below HI", "--ca_range 0.9 0.1", ["--ca_range 0.1 0.9"]),
    (
        "decoupled_dmd",
        "--ca_range: --schedule shared draws one level for both terms, from --dm_range",
        "--schedule shared --ca_range 0.1 0.9",
        ["--schedule shared --dm_range 0.1 0.9"],
    ),
    (
        "decoupled_dmd",
        "--dm_range starts at {}, and --schedule {} keeps",
        "--schedule constrained --dm_range 0.5 1",
        ["--schedule full --dm_range 0.5 1", "--schedule constrained --dm_range 0.1 1"],
    ),
    (
        "decoupled_dmd",
        "--ca_range starts at {}, and --schedule {} keeps",
        "--ca_range 0.5 1",
        ["--schedule full --ca_range 0.5 1", "--ca_range 0.1 1"],
    ),
    (
        "decoupled_dmd",
        "--guidance_scale {} turns CA's sign, and with --no_dm the student leaves its class",
        "--no_dm --guidance_scale 0.5",
        ["--no_dm --guidance_scale 2"],
    ),
    (
        "decoupled_dmd",
        "--gan_weight_d 0 leaves the GAN's head untrained: give it, or --gan_weight 0",
        "--gan_weight_d 0 --gan_weight 0.1 --data DATA",
        ["--gan_weight_d 0.1 --gan_weight 0.1 --data DATA", "--gan_weight 0"],
    ),
    (
        "decoupled_dmd",
        "nothing is left to learn from: leave out --no_dm or --no_ca",
        "--no_dm --no_ca",
        ["--no_ca", "--no_dm", "--no_dm --no_ca --gan_weight 0.1 --data DATA"],
    ),
    (
        "decoupled_dmd",
        "and --ca_weight above 0, or --gan_weight",
        "--no_dm --ca_weight 0",
        ["--no_dm --ca_weight 0.5"],
    ),
    (
        "mdt_dist",
        "nothing is left to learn from: give --vm_weight or --vd_loss_weight above 0",
        "--teacher ring --vm_weight 0 --vd_loss_weight 0",
        [
            "--teacher ring --vm_weight 1 --vd_loss_weight 0",
            "--teacher ring --vm_weight 0 --vd_loss_weight 1",
        ],
    ),
    (
        "mdt_dist",
        "above 0, the one that --arm has",
        "--teacher ring --arm vd --vd_loss_weight 0",
        ["--teacher ring --arm vd --vd_loss_weight 1", "--teacher ring --arm vm"],
    ),
    (
        "decoupled_dmd",
        "give --guidance_scale above 1",
        "--no_dm --guidance_scale 1",
        ["--no_dm --guidance_scale 2"],
    ),
    (
        "decoupled_dmd",
        "--observer looks on where DM is off: give --no_dm with it, or leave it out",
        "--observer",
        ["--observer --no_dm", ""],
    ),
    (
        "decoupled_dmd",
        "--data is for the GAN: set --gan_weight, or leave --data out",
        "--data DATA",
        ["--data DATA --gan_weight 0.1", ""],
    ),
    (
        "decoupled_dmd",
        "--gan_weight needs data: give --data FOLDER",
        "--gan_weight 0.1",
        ["--gan_weight 0.1 --data DATA", "--gan_weight 0"],
    ),
    (
        "decoupled_dmd",
        "--mean_variance_target: VAR must be > 0",
        "--mean_variance_weight 1 --mean_variance_target 0 0",
        ["--mean_variance_weight 1 --mean_variance_target 0 0.5"],
    ),
    (
        "decoupled_dmd",
        "--mean_variance_weight needs --mean_variance_target MEAN VAR",
        "--mean_variance_weight 1",
        ["--mean_variance_weight 1 --mean_variance_target 0.075 0.81"],
    ),
    # ---- sets of images
    (
        "latent_fm",
        "--data {}: no tensor x0, nor mean and std: give one that has",
        "--data TOKENS --dry_run",
        ["--data IMAGES_FILE --dry_run"],
    ),
    (
        "latent_fm",
        "--guidance_scale {}: with --label_dropout 0 no null label is learned",
        "--data ring --pool 100 --label_dropout 0 --guidance_scale 2",
        [
            "--data ring --pool 100 --label_dropout 0 --guidance_scale 1",
            "--data ring --pool 100 --label_dropout 0.2 --guidance_scale 2",
        ],
    ),
    (
        "latent_fm",
        "--hflip: {} has points, whose axes it would exchange: leave it out",
        "--data ring --pool 100 --hflip",
        ["--data ring --pool 100"],
    ),
    (
        "latent_fm",
        "--lr_final: rates fall within --lr_decay_share: give --lr_decay_share 1 with it",
        "--data ring --pool 100 --lr_decay_share 0 --lr_final 1e-5",
        ["--data ring --pool 100 --lr_decay_share 1 --lr_final 1e-5"],
    ),
    (
        "latent_fm",
        "--pca_patch {}: it does not divide {}: change --resolution or --pca_patch",
        "--data FOLDER --resolution 8 --autoencoder pca --pca_patch 3 --dry_run",
        [
            "--data FOLDER --resolution 9 --autoencoder pca --pca_patch 3 --patch_size 1 --dry_run",
            "--data FOLDER --resolution 8 --autoencoder pca --pca_patch 2 --patch_size 1 --dry_run",
        ],
    ),
    (
        "tdm",
        "--{}: the student in --sample {} is a whole network: leave it out",
        "--sample TDM --teacher TEACHER",
        ["--sample TDM"],
    ),
    (
        "latent_fm",
        "--{} is for a saved network: give --sample FOLDER with it",
        "--data FOLDER --resolution 8 --samples 2",
        ["--sample LATENT --samples 2"],
    ),
    (
        "latent_fm",
        "--{} is for sets of images: give --samples N with it, or leave it out",
        "--sample LATENT --labels random",
        ["--sample LATENT --labels random --samples 2", "--sample LATENT"],
    ),
    (
        "latent_fm",
        "--reconstruct: this run has no autoencoder: leave it out",
        "--sample LATENT --reconstruct --samples 2",
        ["--sample LATENT --samples 2"],
    ),
    (
        "latent_fm",
        "--samples {}: --data {} has {} images: name fewer",
        "--sample PCA_RUN --reconstruct --samples 5",
        ["--sample PCA_RUN --reconstruct --samples 4"],
    ),
    # ---- tdm
    (
        "tdm",
        "--student_steps {}: a {} has no input that could be conditioned on their number",
        "--teacher WAN --prompts PROMPTS --sample_shape 4 2 4 6 --student_steps 2 4",
        [
            "--teacher WAN --prompts PROMPTS --sample_shape 4 2 4 6 --student_steps 4",
            "--teacher WAN --prompts PROMPTS --sample_shape 4 2 4 6 --student_steps 2 4 "
            "--no_steps_cond",
        ],
    ),
    (
        "tdm",
        "--{}: with --sample the saved student decides: leave it out",
        "--sample TDM --renoise sde",
        ["--sample TDM", "--sample TDM --student_steps 1"],
    ),
    (
        "tdm",
        "--{}: --sample trains nothing: leave it out",
        "--sample TDM --learning_rate 1e-4",
        ["--sample TDM", "--learning_rate 1e-4"],
    ),
    (
        "latent_fm",
        "--{}: --sample trains nothing: leave it out",
        "--sample PCA_RUN --width 64",
        ["--sample PCA_RUN --solver euler"],
    ),
    (
        "mdt_dist",
        "with --sample the saved student decides",
        "--sample STRUCTURE_RUN --prompts TOKENS --student_guidance 2",
        ["--sample STRUCTURE_RUN --prompts TOKENS --student_steps 1"],
    ),
    (
        "tdm",
        "--dry_run plans a training run: leave out --sample or --dry_run",
        "--sample TDM --dry_run",
        ["--sample TDM", "--dry_run"],
    ),
    (
        "tdm",
        "--student_steps {}: this student has {}: name one of them",
        "--sample TDM --student_steps 3",
        ["--sample TDM --student_steps 2", "--sample TDM --student_steps 1"],
    ),
    (
        "tdm",
        "--fake_noise: with --match clean the fake sees noised x anyway; leave it out",
        "--match clean --fake_noise fresh --regress x0",
        ["--match clean --regress x0"],
    ),
    (
        "tdm",
        "--regress x_s: with --match clean x itself is matched; leave it out",
        "--match clean --regress x_s",
        ["--match clean"],
    ),
    (
        "tdm",
        "--regress x_s: --loss demo is of x; leave one of them out",
        "--regress x_s --loss demo",
        ["--regress x_s", "--loss demo"],
    ),
    (
        "tdm",
        "--{}: an adapter cannot be conditioned on the number of steps, and there are several",
        "--student_steps 1 2 --lora_rank 2",
        ["--student_steps 2 --lora_rank 2", "--student_steps 1 2 --lora_rank 2 --no_steps_cond"],
    ),
    # ---- phased_dmd
    ("phased_dmd", "--dm_range: LO must be below HI", "--dm_range 1 0.1", ["--dm_range 0.1 1"]),
    (
        "phased_dmd",
        "--phases {}: every phase needs a step, and there are --student_steps {}",
        "--phases 3 --student_steps 2",
        ["--phases 3 --student_steps 3", "--phases 2 --student_steps 2"],
    ),
    (
        "phased_dmd",
        "--max_train_steps {} are shared out over --phases {}",
        "--phases 2 --max_train_steps 1",
        ["--phases 2 --max_train_steps 2", "--phases 1 --max_train_steps 1"],
    ),
    (
        "phased_dmd",
        "--student_init {} starts full networks, not adapters: give --lora_rank 0 with it",
        "--student_init TEACHER --lora_rank 2",
        ["--student_init TEACHER --lora_rank 0"],
    ),
    (
        "phased_dmd",
        "--student_init: {} has rank {}: give --lora_rank {}",
        "--student_init BIG_LORA --lora_rank 4",
        ["--student_init BIG_LORA --lora_rank 8"],
    ),
    (
        "phased_dmd",
        "--student_init: {}",
        "--student_init DIFFERENCE --lora_rank 4",
        ["--student_init LORA --lora_rank 4"],
    ),
    (
        "phased_dmd",
        "{} changes {}, which no adapter can: merge the file into the weights (--teacher_lora, or",
        "--student_init DIFFERENCE --lora_rank 4",
        ["--teacher_lora DIFFERENCE --lora_rank 4", "--student_init DIFFERENCE --lora_rank 0"],
    ),
    (
        "phased_dmd",
        "--student_init {} does not have one expert for each of {} phases",
        "--student_init THREE_EXPERTS --phases 2",
        [
            "--student_init THREE_EXPERTS --phases 3 --student_steps 3",
            "--student_init EXPERTS --phases 2",
        ],
    ),
    (
        "phased_dmd",
        "--student_init {} is one network, and this teacher has two: give a folder with",
        f"{WAN22} --student_init WAN/transformer --lora_rank 0",
        [f"{WAN22} --student_init PAIR --lora_rank 2"],
    ),
    (
        "phased_dmd",
        "--dm_range {} {}: the first phase takes scores above {}; give --dm_range {} 1",
        "--dm_range 0.1 0.4",
        ["--dm_range 0.1 1"],
    ),
    (
        "phased_dmd",
        "--dm_range 0: the weight of --dmd_weight paper is infinite at 0: give LO above",
        "--dm_range 0 1 --dmd_weight paper",
        ["--dm_range 0.01 1 --dmd_weight paper", "--dm_range 0 1"],
    ),
    (
        "phased_dmd",
        "lie on both sides of the teacher's boundary {}: an expert starts from one of its two",
        f"{WAN22} --phases 2 --timestep_shift 2",
        [f"{WAN22} --phases 2 --timestep_shift ADVISED", f"{WAN22} --timestep_shift 2 --phases 4"],
    ),
    (
        "phased_dmd",
        "all steps {} lie above the teacher's boundary {}: its low-noise network would have none",
        f"{WAN22} --phases 2 --timestep_shift 50",
        [f"{WAN22} ADVISED"],
    ),
    (
        "phased_dmd",
        "--{} {}: these experts were trained for {}, on the steps {}, and know no others",
        "--sample EXPERTS --student_steps 3",
        ["--sample EXPERTS", "--sample EXPERTS --student_steps 2"],
    ),
    (
        "phased_dmd",
        "--teacher {}: the experts of {} are full networks and need none; leave it out",
        "--sample EXPERTS --teacher TEACHER",
        ["--sample EXPERTS"],
    ),
    (
        "phased_dmd",
        "the adapters of {} belong on {}, which is not there: name that teacher with --teacher",
        "--sample LOST_EXPERTS",
        ["--sample LOST_EXPERTS --teacher TEACHER"],
    ),
    (
        "phased_dmd",
        "{}; the adapters belong on {}, name it with --teacher",
        "--sample LORA_EXPERTS --teacher OTHER",
        ["--sample LORA_EXPERTS --teacher TEACHER", "--sample LORA_EXPERTS"],
    ),
    (
        "phased_dmd",
        "the checkpoint is at step {} in phase {}{}, and with --max_train_steps {} phase {} would",
        f"{FIRST_PHASE} --max_train_steps 3",
        [f"{FIRST_PHASE} --max_train_steps 6"],
    ),
    # ---- linvideo
    (
        "linvideo",
        "would lead up in noise: give less",
        "--teacher ring --objective adm --state part --sampling_steps 8 --min_time 0.5 "
        "--bank_size 4",
        [
            "--teacher ring --objective adm --state part --sampling_steps 8 --min_time 0.2 "
            "--bank_size 4"
        ],
    ),
    (
        "linvideo",
        "--state rollout needs --sampling_steps of at least 3",
        "--state rollout --sampling_steps 2 --objective adm --weight unit --bank_size 4",
        ["--state rollout --sampling_steps 3 --objective adm --weight unit --bank_size 4"],
    ),
    (
        "linvideo",
        "--regression_weight is for --objective adm or adm_critic",
        "--regression_weight 1 --objective mse",
        [
            f"--regression_weight 1 --objective {kind} --state part --bank_size 4"
            for kind in ("adm", "adm_critic")
        ],
    ),
    (
        "linvideo",
        "--objective dmd: the bank's states are of guided samples, and its jumps and scores are",
        "--objective dmd --guidance_scale 2 --bank_size 4",
        ["--objective dmd --guidance_scale 1 --bank_size 4"],
    ),
    (
        "linvideo",
        "--selection_weight 0: nothing leads r to 0 and chooses layers: give more, or --select",
        "--selection_weight 0 --bank_size 4",
        ["--selection_weight 0.1 --bank_size 4", "--select first --bank_size 4"],
    ),
    (
        "linvideo",
        "--regression_weight needs states of the bank, not --state {}: give --state part",
        "--regression_weight 1 --objective adm --bank_size 4",
        ["--regression_weight 1 --objective adm --state part --bank_size 4"],
    ),
    (
        "linvideo",
        "--state policy is for --objective adm, not {}: leave --state out",
        "--state policy --objective mse --bank_size 4",
        ["--state policy --objective adm --bank_size 4", "--objective mse --bank_size 4"],
    ),
    (
        "linvideo",
        "--weight {} is for a step to x_hat, which --state policy does not take",
        "--objective adm --weight eq13 --bank_size 4",
        ["--objective adm --weight eq13 --state part --bank_size 4"],
    ),
    (
        "linvideo",
        "--{} {} is for --objective adm or adm_critic, not {}: leave --{} out",
        "--state part --objective mse --bank_size 4",
        ["--objective mse --bank_size 4", "--state part --objective adm --bank_size 4"],
    ),
    (
        "linvideo",
        "--{} {} is for --objective adm or adm_critic, not {}: leave --{} out",
        "--weight unit --objective dmd --bank_size 4",
        ["--objective dmd --bank_size 4"],
    ),
    (
        "linvideo",
        "--feature_dim is for --feature_map hedgehog: {} has no projections",
        "--feature_dim 4 --feature_map elu --bank_size 4",
        ["--feature_dim 4 --feature_map hedgehog --bank_size 4"],
    ),
    (
        "linvideo",
        "--feature_dim {} is wider than {}'s heads: give at most {}",
        "--feature_dim 33 --bank_size 4",
        ["--feature_dim 32 --bank_size 4"],
    ),
    (
        "linvideo",
        "--student_init {} has linear attention already",
        "--student_init LINEAR --bank_size 4",
        ["--student_init TEACHER --bank_size 4"],
    ),
    (
        "linvideo",
        "{} names {} layer(s), --target_layers says {}: leave one of them out",
        "--select 0 --target_layers 2 --bank_size 4",
        ["--select 0 --bank_size 4", "--target_layers 2 --bank_size 4"],
    ),
    (
        "linvideo",
        "--target_layers {}: this network has {} self-attention layer(s): give 1 to {}",
        "--target_layers 3 --bank_size 4",
        ["--target_layers 1 --bank_size 4", "--target_layers 2 --bank_size 4"],
    ),
    (
        "linvideo",
        "--bank {} was made with another {}: name another folder",
        "--bank BANK --bank_size 6",
        ["--bank OUT --bank_size 6"],
    ),
    # ---- what cannot fit
    (
        "dmd",
        "--dry_run prints all of it, and --device_memory GB says what there is",
        "--teacher TEACHER --device_memory 0.001",
        ["--teacher TEACHER --device_memory 1"],
    ),
    # ---- mdt_dist
    (
        "mdt_dist",
        "--slow_clock: adapters leave the embedding of t as it is: leave out --slow_clock or",
        "--teacher TEACHER --data DATA --slow_clock 20 --lora_rank 2",
        [
            "--teacher TEACHER --data DATA --slow_clock 20",
            "--teacher TEACHER --data DATA --lora_rank 2",
        ],
    ),
    (
        "mdt_dist",
        "--slow_clock: only a DiT of this project keeps the scale of its clock, not {}: leave it",
        "--teacher ring --slow_clock 20",
        ["--teacher ring"],
    ),
    (
        "mdt_dist",
        "--prompts: conditions come with --data here, as cond.*",
        "--teacher STRUCTURE --prompts PROMPTS",
        ["--teacher STRUCTURE --data DENSE", "--sample STRUCTURE_RUN --prompts TOKENS"],
    ),
    (
        "mdt_dist",
        "argument --teacher_guidance_interval: {} is above {}; give the lower end first",
        "--teacher ring --teacher_guidance_interval 1 0.5",
        ["--teacher ring --teacher_guidance_interval 0.5 1"],
    ),
    (
        "mdt_dist",
        "argument --phases: {} leads from noise to data in one phase; more are for --arm vm and cm",
        "--teacher ring --phases 2",
        ["--teacher ring --phases 2 --arm vm", "--teacher ring --phases 2 --arm cm"],
    ),
    (
        "mdt_dist",
        "--student_steps {}: of {} phases each takes a step: give {}, or leave it out",
        "--teacher ring --phases 3 --arm cm --student_steps 1 2",
        [
            "--teacher ring --phases 3 --arm cm --student_steps 3",
            "--teacher ring --phases 3 --arm cm",
        ],
    ),
    (
        "mdt_dist",
        "--renoise sde: with --phases a step leads to the end of its phase, not to a sample",
        "--teacher ring --phases 2 --arm vm --renoise sde",
        ["--teacher ring --phases 2 --arm vm"],
    ),
    (
        "mdt_dist",
        "argument --derivative: cm takes differences by definition; its continuous-time form is",
        "--teacher ring --arm cm --derivative jvp",
        ["--teacher ring --arm scm --derivative jvp", "--teacher ring --arm cm"],
    ),
    (
        "mdt_dist",
        "--teacher {} predicts {}; a flow's transport is distilled here",
        "--teacher VP --data DATA",
        ["--teacher TEACHER --data DATA"],
    ),
    (
        "mdt_dist",
        "--data: a {} teacher needs FILE.safetensors with {} and {}",
        "--teacher STRUCTURE",
        ["--teacher STRUCTURE --data DENSE"],
    ),
    (
        "mdt_dist",
        "--data {}: this {} works on points: give coords, feats and offsets, not x0",
        "--teacher LATENTS --data DENSE",
        ["--teacher LATENTS --data SPARSE"],
    ),
    (
        "mdt_dist",
        "--data: points have {} channels, with {}; the teacher takes {}, with {}",
        "--teacher LATENTS --data WIDE_SPARSE",
        ["--teacher LATENTS --data SPARSE"],
    ),
    (
        "mdt_dist",
        "--data {}: coords, feats and offsets are points of a grid, which are not welcome here",
        "--teacher STRUCTURE --data SPARSE",
        ["--teacher STRUCTURE --data DENSE"],
    ),
    (
        "mdt_dist",
        "--{} {}: no {} {}, the features of an empty prompt",
        "--teacher TEXT_STRUCTURE --data TEXT_TOKENS",
        ["--teacher TEXT_STRUCTURE --data WHOLE_TEXT_TOKENS"],
    ),
    (
        "mdt_dist",
        "--{} {}: {} is {} and cond.{} {}; give {} the shape {}",
        "--teacher STRUCTURE --data WRONG_UNCOND",
        ["--teacher STRUCTURE --data DENSE"],
    ),
    (
        "mdt_dist",
        "--{} {}: a {} is sampled from FILE.safetensors with {}, which python -m models.encode",
        "--sample STRUCTURE_RUN",
        ["--sample STRUCTURE_RUN --prompts TOKENS"],
    ),
    (
        "mdt_dist",
        "--{} {}: no {} with at least one row, as python -m models.encode writes it; it has {}",
        "--sample STRUCTURE_RUN --data NO_TOKENS",
        ["--sample STRUCTURE_RUN --data TOKENS"],
    ),
    # ---- latent_fm
    (
        "latent_fm",
        "{}: no cond.label tensor, which --task class needs; --task uncond does without",
        "--data MAPS_FILE",
        ["--data MAPS_FILE --task uncond", "--data IMAGES_FILE"],
    ),
    (
        "latent_fm",
        "{}: --task semantic needs cond.map, class numbers (N, H, W) = {}",
        "--data IMAGES_FILE --task semantic",
        ["--data MAPS_FILE --task semantic"],
    ),
    (
        "latent_fm",
        "its subfolders {} ... look like parts of a large set, not like classes",
        "--data NUMBERED --resolution 8",
        [
            "latent_fm.py --task uncond --data NUMBERED --resolution 8",
            "--data LETTERED --resolution 8",
        ],
    ),
    (
        "dmd",
        "{} images, such as {}, lie beside the class subfolders {}...: move them into one of these",
        "--teacher NAMED --gan_weight 0.1 --data LOOSE",
        [
            "--teacher NAMED --gan_weight 0.1 --data FOLDER",
            "latent_fm.py --task uncond --data LOOSE --resolution 8",
        ],
    ),
    (
        "latent_fm",
        "{} has no labels: train without classes",
        "--data NO_LABELS --resolution 8",
        [
            "latent_fm.py --task uncond --data NO_LABELS --resolution 8",
            "--data DESCRIBED --resolution 8",
        ],
    ),
    (
        "latent_fm",
        '{} wants "labels": [["FILE", CLASS], ...] with class numbers from 0 on: write it so',
        "--data WRONG_LABELS --resolution 8",
        [
            "--data DESCRIBED --resolution 8",
            "latent_fm.py --task uncond --data WRONG_LABELS --resolution 8",
        ],
    ),
    (
        "latent_fm",
        "--map_names {} is not readable JSON",
        f"{SEMANTIC} --hflip --map_names FILE",
        [f"{SEMANTIC} --hflip --map_names NAMES"],
    ),
    (
        "latent_fm",
        '--map_names {}: wanted a list, ["background", "skin", ...]',
        f"{SEMANTIC} --hflip --map_names NO_LIST",
        [f"{SEMANTIC} --hflip --map_names NAMES"],
    ),
    (
        "latent_fm",
        "--map_names {} names {} classes, and the maps have {}",
        f"{SEMANTIC} --hflip --map_names TWO_NAMES",
        [f"{SEMANTIC} --hflip --map_names NAMES"],
    ),
    (
        "latent_fm",
        "--map_names: {} has no {}, which it is in a mirror",
        f"{SEMANTIC} --hflip --map_names ONE_SIDE",
        [f"{SEMANTIC} --hflip --map_names NAMES"],
    ),
    (
        "latent_fm",
        "--hflip: a mirror exchanges left and right classes: give --map_names FILE",
        f"{SEMANTIC} --hflip",
        [f"{SEMANTIC} --hflip --map_names NAMES", SEMANTIC],
    ),
    (
        "latent_fm",
        "--map_names {}: has an effect only with --task semantic --hflip on maps of your own",
        f"{SEMANTIC} --map_names NAMES",
        [f"{SEMANTIC} --map_names NAMES --hflip", SEMANTIC],
    ),
    (
        "latent_fm",
        "--autoencoder {}: it encodes images, and --data {} has items of shape {}: use identity",
        "--data clips --pool 100 --autoencoder pca",
        ["--data clips --pool 100 --autoencoder identity"],
    ),
    (
        "latent_fm",
        "--autoencoder {}: {}; change --resolution, --pca_patch or --pca_channels",
        "--data FOLDER --resolution 8 --autoencoder pca --pca_patch 3",
        [
            "--data FOLDER --resolution 9 --autoencoder pca --pca_patch 3 --patch_size 1",
            "--data FOLDER --resolution 8 --autoencoder pca --pca_patch 2 --patch_size 1",
        ],
    ),
    (
        "latent_fm",
        "--cache_latents {} was made with other {}: name another folder",
        "--data FOLDER --resolution 8 --cache_latents OTHER_CACHE",
        ["--data FOLDER --resolution 8 --cache_latents OUT/latents"],
    ),
    (
        "latent_fm",
        "--cache_latents {} is a file: name a folder",
        "--data FOLDER --resolution 8 --cache_latents SPARSE",
        ["--data FOLDER --resolution 8 --cache_latents OUT/latents"],
    ),
    (
        "latent_fm",
        "--class_in_name, but {} has no _ behind a class: rename it, or leave the flag out",
        "--data FOLDER --resolution 8 --class_in_name",
        ["--data FOLDER --resolution 8", "--data UNDERSCORES --resolution 8 --class_in_name"],
    ),
    (
        "latent_fm",
        "{}: change --patch_size, --resolution or --width",
        "--data FOLDER --resolution 8 --patch_size 3",
        [
            "--data FOLDER --resolution 8 --patch_size 2",
            "--data FOLDER --resolution 9 --patch_size 3",
        ],
    ),
    (
        "latent_fm",
        "{}: change --patch_size, --resolution or --width",
        "--data FOLDER --resolution 8 --width 33",
        ["--data FOLDER --resolution 8 --width 64"],
    ),
    (
        "latent_fm",
        "--network {}: for square images only; use --network small",
        "--data clips --pool 100 --network DiT-B/2",
        ["--data clips --pool 100 --network small"],
    ),
    (
        "latent_fm",
        "--patch_size {}: give one number, or one for each of the {} axes of {}",
        "--data FOLDER --resolution 8 --patch_size 2 2 2",
        [
            "--data FOLDER --resolution 8 --patch_size 2",
            "--data FOLDER --resolution 8 --patch_size 2 4",
        ],
    ),
    (
        "latent_fm",
        "--guidance_interval: LO must not be above HI",
        "--data FOLDER --resolution 8 --guidance_interval 1 0",
        ["--data FOLDER --resolution 8 --guidance_interval 0 1"],
    ),
    (
        "latent_fm",
        "--guidance_scale {}: --task {} has no labels to guide by",
        "--data FOLDER --resolution 8 --task uncond --guidance_scale 2",
        [
            "--data FOLDER --resolution 8 --task uncond",
            "--data FOLDER --resolution 8 --guidance_scale 2",
        ],
    ),
    (
        "latent_fm",
        "--task inpaint encodes images in every step: give --data FOLDER or a world",
        "--task inpaint --data IMAGES_FILE",
        ["--task inpaint --data FOLDER --resolution 8", "--task inpaint --data shapes --pool 100"],
    ),
    (
        "latent_fm",
        "{}: --task semantic needs --maps FOLDER, a PNG of class numbers for each image",
        "--task semantic --data FOLDER --resolution 8",
        ["--task semantic --data FOLDER --resolution 8 --maps MAPS"],
    ),
    (
        "latent_fm",
        "--maps {}: a folder of maps goes with --task semantic and --data FOLDER of images",
        "--data FOLDER --resolution 8 --maps MAPS",
        ["--task semantic --data FOLDER --resolution 8 --maps MAPS"],
    ),
    (
        "latent_fm",
        "--lr_final {} is above --learning_rate {}: lower it",
        "--data FOLDER --resolution 8 --lr_final 1",
        ["--data FOLDER --resolution 8 --lr_final 1e-5"],
    ),
    (
        "latent_fm",
        "--network {}: for --t_scale 1 or 1000; use --network small",
        f"{SEMANTIC} --network DiT-B/2 --t_scale 7",
        [f"{SEMANTIC} --network small --t_scale 7"],
    ),
    (
        "latent_fm",
        "--solver {}: {}",
        "--sample LATENT_HUGE --data FOLDER --solver dopri5",
        ["--sample LATENT --data FOLDER --solver dopri5 --atol 0.1 --rtol 0.1"],
    ),
    # ---- what every script may say: data, teachers, runs
    (
        "dmd",
        "a {} teacher needs --prompts FILE.safetensors with {}",
        "--teacher WAN --sample_shape 4 2 4 6",
        ["--teacher WAN --sample_shape 4 2 4 6 --prompts PROMPTS"],
    ),
    (
        "dmd",
        "--prompts: the teacher is a {} and takes class labels, not prompts",
        "--prompts PROMPTS",
        [""],
    ),
    (
        "dmd",
        "--data {}: no readable image{} in {} ({} files skipped)",
        "--teacher NAMED --gan_weight 0.1 --data NO_PICTURES",
        ["--teacher NAMED --gan_weight 0.1 --data FOLDER"],
    ),
    (
        "dmd",
        "--data {}: neither an embedded world ({}), a folder, a .zip, .tar,",
        "--gan_weight 0.1 --data nowhere",
        ["--gan_weight 0.1 --data DATA"],
    ),
    (
        "dmd",
        "--data {}: no tensor called x0 with at least one row",
        "--gan_weight 0.1 --data NO_ITEMS",
        ["--gan_weight 0.1 --data DATA"],
    ),
    (
        "dmd",
        "--data {}: cond.{} has {} rows, {} has {}",
        "--gan_weight 0.1 --data FEW_LABELS",
        ["--gan_weight 0.1 --data DATA"],
    ),
    (
        "dmd",
        "--data {}: its classes are {}, the teacher's {}: labels would mean other things",
        "--teacher NAMED --gan_weight 0.1 --data OTHER_FOLDER",
        ["--teacher NAMED --gan_weight 0.1 --data FOLDER"],
    ),
    (
        "dmd",
        "--data {}: cond.label is {} {}: wanted integers (N,)",
        "--gan_weight 0.1 --data FLOAT_LABELS",
        ["--gan_weight 0.1 --data DATA"],
    ),
    (
        "dmd",
        "--data {}: x0 is {}: wanted floats",
        "--gan_weight 0.1 --data WHOLE_NUMBERS",
        ["--gan_weight 0.1 --data DATA"],
    ),
    (
        "dmd",
        "--data {}: labels from {} to {}, the teacher has classes 0 to {}",
        "--gan_weight 0.1 --data MANY_CLASSES",
        ["--gan_weight 0.1 --data DATA"],
    ),
    (
        "dmd",
        "--data: items are {} with {}, the teacher takes {} with {}",
        "--gan_weight 0.1 --data WIDE",
        ["--gan_weight 0.1 --data DATA"],
    ),
    (
        "dmd",
        "--sample_shape {}: {}",
        "--sample RUN --sample_shape 1 8 8",
        ["--sample RUN --sample_shape 1 4 4", "--sample RUN"],
    ),
    (
        "dmd",
        "--output_dir {}: {} is not a folder that can be written to",
        "--output_dir FILE",
        ["--output_dir OUT"],
    ),
    (
        "dmd",
        "--output_dir {} holds the current folder: name a folder of its own",
        "--output_dir .",
        ["--output_dir OUT"],
    ),
    (
        "dmd",
        "--output_dir {} is a run with samples of its own: name another folder for those of",
        "--sample RUN --output_dir RUN",
        ["--sample RUN --output_dir OUT"],
    ),
    (
        "dmd",
        "--resume_from_checkpoint {}: no state.json there",
        "--resume_from_checkpoint RUN",
        ["--resume_from_checkpoint RUN/state/step-0000002 --train_batch_size 4"],
    ),
    (
        "dmd",
        "the checkpoint is at step {}, beyond --max_train_steps {}: give at least {}",
        f"{RESUMED} --train_batch_size 4 --max_train_steps 1",
        [f"{RESUMED} --train_batch_size 4 --max_train_steps 2"],
    ),
    (
        "dmd",
        "cannot resume with other flags: {}. Give the old values or another --output_dir",
        f"{RESUMED} --train_batch_size 4 --seed 5",
        [f"{RESUMED} --train_batch_size 4", "--seed 5 --train_batch_size 4 --output_dir OUT"],
    ),
    (
        "dmd",
        "on {} rank(s) resume with --train_batch_size {} --gradient_accumulation_steps {}",
        f"{RESUMED} --train_batch_size 8",
        [f"{RESUMED} ADVISED"],
    ),
    (
        "dmd",
        "--student_init {}: this {} does not have the shapes of the teacher's {}",
        "--student_init OTHER",
        ["--student_init TEACHER", "--student_init RUN"],
    ),
    (
        "dmd",
        "--teacher {}: neither an embedded world ({}) nor a folder",
        "--teacher nowhere",
        ["--teacher TEACHER", "--teacher ring"],
    ),
    ("dmd", "--teacher {}: the folder is empty", "--teacher EMPTY", ["--teacher TEACHER"]),
    (
        "dmd",
        "--guidance_rescale {} is for images (C, H, W) of even sides, samples are {}: give "
        "--guidance_rescale none",
        "--teacher ring --guidance_rescale patch",
        ["--teacher ring --guidance_rescale none"],
    ),
    (
        "dmd",
        "--teacher_lora: {} is a closed form without weights: leave it out",
        "--teacher ring --teacher_lora LORA",
        ["--teacher ring"],
    ),
    (
        "phased_dmd",
        "--teacher_lora: {} has two networks, for high and for low noise: give a file for each",
        f"{WAN22} --teacher_lora PAIR/high_noise_model.safetensors",
        [
            f"{WAN22} --teacher_lora PAIR/high_noise_model.safetensors "
            "PAIR/low_noise_model.safetensors"
        ],
    ),
    (
        "tdm",
        "{} was made by {}: sample it with python {}.py --sample",
        "--sample RUN",
        ["dmd.py --sample RUN"],
    ),
    (
        "dmd",
        "no teacher ships for shapes: python latent_fm.py trains one in minutes, then give",
        "--teacher shapes",
        ["--teacher SHAPES_RUN"],
    ),
    # ---- models.convert
    (
        "models.convert",
        "--input {}: {}",
        f"--input DATA {OUT}",
        [f"--input OFFICIAL --num_attention_heads 3 {OUT}"],
    ),
    (
        "models.convert",
        "--prediction flow_v goes with --noise_at 0 (SiT) or 1 (LFM), and only with it",
        f"--input OFFICIAL --num_attention_heads 3 {OUT} --prediction flow_v",
        [
            f"--input OFFICIAL --num_attention_heads 3 {OUT}/a --prediction flow_v --noise_at 0",
            f"--input OFFICIAL --num_attention_heads 3 {OUT}/b --prediction flow_v --noise_at 1",
            f"--input OFFICIAL --num_attention_heads 3 {OUT}/c",
        ],
    ),
    (
        "models.convert",
        "--output {} exists: name a new {}",
        "--input OFFICIAL --num_attention_heads 3 --output EMPTY",
        [f"--input OFFICIAL --num_attention_heads 3 {OUT}"],
    ),
    (
        "models.convert",
        "cannot write --output {}: {}; {}",
        "--input OFFICIAL --num_attention_heads 3 --output FILE/new",
        [f"--input OFFICIAL --num_attention_heads 3 {OUT}"],
    ),
    # ---- models.decode
    (
        "models.decode",
        "--{} {}: its autoencoder is {}, which is not known here: pass a folder with {}",
        f"--teacher OTHER_VAE --latents X0 {OUT}",
        [f"--teacher VAE --latents X0 {OUT}"],
    ),
    (
        "models.decode",
        "--{} {} {}: pass a diffusers pipeline folder with vae/, a run of ours with",
        f"--teacher EMPTY --latents X0 {OUT}",
        [f"--teacher VAE --latents X0 {OUT}", f"--teacher SPACE --latents X0 {OUT}"],
    ),
    (
        "models.decode",
        "--{} is for videos, and --teacher {} makes images: leave it out",
        f"--teacher SPACE --latents X0 {OUT} --fps 8",
        [f"--teacher SPACE --latents X0 {OUT}"],
    ),
    (
        "models.decode",
        "--fps has no effect with --format png: leave it out",
        f"--teacher WAN_PIPE --latents X0_VIDEO {OUT} --format png --fps 8",
        [f"--teacher WAN_PIPE --latents X0_VIDEO {OUT} --format png"],
    ),
    (
        "models.decode",
        "cannot read --latents: {}",
        f"--teacher SPACE --latents nowhere {OUT}",
        [f"--teacher SPACE --latents X0 {OUT}"],
    ),
    (
        "models.decode",
        "--latents {} has no tensor x0, but {}; write the latents under that key",
        f"--teacher SPACE --latents NO_ITEMS {OUT}",
        [f"--teacher SPACE --latents X0 {OUT}"],
    ),
    (
        "models.decode",
        "--latents {}: x0 has no rows, {}: name another file",
        f"--teacher SPACE --latents X0_EMPTY {OUT}",
        [f"--teacher SPACE --latents X0 {OUT}"],
    ),
    (
        "models.decode",
        "--latents {}: x0 has shape {}, and the autoencoder of --teacher {} needs (B, {}, {}): ",
        f"--teacher SPACE --latents X0_VIDEO {OUT}",
        [f"--teacher SPACE --latents X0 {OUT}", f"--teacher WAN_PIPE --latents X0_VIDEO {OUT}"],
    ),
    (
        "models.decode",
        "--{} {}: {}",
        f"--teacher VAE_WITHOUT_WEIGHTS --latents X0 {OUT}",
        [f"--teacher VAE --latents X0 {OUT}"],
    ),
    (
        "models.decode",
        "cannot write --output {}: {}; {}",
        "--teacher SPACE --latents X0 --output FILE/new",
        [f"--teacher SPACE --latents X0 {OUT}"],
    ),
    # ---- models.encode
    (
        "models.encode",
        "--images {} is not a folder; put one image for each object in one",
        f"--images nowhere {OUT}",
        [f"--images PICTURES {OUT}"],
    ),
    (
        "models.encode",
        "--images {} holds no files; put one image for each object in it",
        f"--images EMPTY {OUT}",
        [f"--images PICTURES {OUT}"],
    ),
    (
        "models.encode",
        "--dinov2 {} cannot be loaded",
        f"--images PICTURES --dinov2 EMPTY {OUT}",
        [f"--images PICTURES {OUT}"],
    ),
    (
        "models.encode",
        "--max_length {}: a {} takes {} {} tokens: leave it out",
        f"--teacher TEXT_ROOT --prompts_txt PROMPTS_TXT --max_length 78 {OUT}",
        [
            f"--teacher TEXT_ROOT --prompts_txt PROMPTS_TXT --max_length 77 {OUT}",
            f"--teacher TEXT_ROOT --prompts_txt PROMPTS_TXT {OUT}",
        ],
    ),
    (
        "models.encode",
        "--clip {} cannot be loaded",
        f"--teacher TEXT_ROOT --prompts_txt PROMPTS_TXT --clip EMPTY {OUT}",
        [
            f"--teacher TEXT_ROOT --prompts_txt PROMPTS_TXT --clip CLIP {OUT}",
            f"--teacher TEXT_ROOT --prompts_txt PROMPTS_TXT {OUT}",
        ],
    ),
    (
        "models.encode",
        "--teacher {} {}: pass a diffusers pipeline folder, or TRELLIS's root",
        f"--teacher EMPTY --prompts_txt PROMPTS_TXT {OUT}",
        [
            f"--teacher WAN_PIPE --prompts_txt PROMPTS_TXT {OUT}",
            f"--teacher TEXT_ROOT --prompts_txt PROMPTS_TXT {OUT}",
        ],
    ),
    (
        "models.encode",
        "--teacher {} is {}, and --prompts_txt is for {}: {}",
        f"--teacher TRELLIS_ROOT --prompts_txt PROMPTS_TXT {OUT}",
        [f"--teacher TRELLIS_ROOT --images PICTURES {OUT}"],
    ),
    (
        "models.encode",
        "--{} has no effect with a {}: leave it out",
        f"--teacher WAN_PIPE --prompts_txt PROMPTS_TXT --clip CLIP {OUT}",
        [f"--teacher WAN_PIPE --prompts_txt PROMPTS_TXT {OUT}"],
    ),
    (
        "models.encode",
        "--resolution {}: give H W, or one number for squares",
        f"--teacher SDXL_PIPE --prompts_txt PROMPTS_TXT --resolution 8 8 8 {OUT}",
        [
            f"--teacher SDXL_PIPE --prompts_txt PROMPTS_TXT --resolution 8 16 {OUT}",
            f"--teacher SDXL_PIPE --prompts_txt PROMPTS_TXT --resolution 8 {OUT}",
        ],
    ),
    (
        "models.encode",
        "--teacher {}: a {} encodes prompts with {}, and there is no {}: pass a whole pipeline",
        f"--teacher NO_ENCODER --prompts_txt PROMPTS_TXT {OUT}",
        [f"--teacher WAN_PIPE --prompts_txt PROMPTS_TXT {OUT}"],
    ),
    (
        "models.encode",
        "pass --max_length 120 for alpha, 300 for Sigma",
        f"--teacher BARE_PIXART --prompts_txt PROMPTS_TXT {OUT}",
        [
            f"--teacher BARE_PIXART --prompts_txt PROMPTS_TXT --max_length {n} {OUT}"
            for n in (120, 300)
        ],
    ),
    (
        "models.encode",
        "cannot read --prompts_txt {} as UTF-8",
        f"--teacher WAN_PIPE --prompts_txt nowhere {OUT}",
        [f"--teacher WAN_PIPE --prompts_txt PROMPTS_TXT {OUT}"],
    ),
    (
        "models.encode",
        "--prompts_txt {} holds no prompt; write one prompt a line",
        f"--teacher WAN_PIPE --prompts_txt NO_PROMPTS_TXT {OUT}",
        [f"--teacher WAN_PIPE --prompts_txt PROMPTS_TXT {OUT}"],
    ),
    (
        "models.encode",
        "--teacher {}: {}",
        f"--teacher NO_TOKENIZER --prompts_txt PROMPTS_TXT {OUT}",
        [f"--teacher WAN_PIPE --prompts_txt PROMPTS_TXT {OUT}"],
    ),
    (
        "models.encode",
        "--{} has no effect with {}: leave it out",
        f"--images PICTURES --max_length 3 {OUT}",
        [f"--images PICTURES {OUT}"],
    ),
    (
        "models.encode",
        "--prompts_txt needs --teacher: pass a diffusers pipeline folder",
        f"--prompts_txt PROMPTS_TXT {OUT}",
        [f"--teacher WAN_PIPE --prompts_txt PROMPTS_TXT {OUT}"],
    ),
    (
        "models.encode",
        "--teacher {} is {}, and --images is for TRELLIS's image models and for the pipelines that",
        f"--teacher DIT_ROOT --images PICTURES {OUT}",
        [
            f"--teacher TRELLIS_ROOT --images PICTURES {OUT}",
            f"--teacher WAN_PIPE --prompts_txt PROMPTS_TXT {OUT}",
        ],
    ),
    (
        "models.encode",
        "--images with captions: give --resolution H W, or one number for squares",
        f"--teacher PIXART_PIPE --images CAPTIONED {OUT}",
        [
            f"--teacher PIXART_PIPE --images CAPTIONED --resolution 8 16 {OUT}",
            f"--teacher PIXART_PIPE --images CAPTIONED --resolution 8 {OUT}",
        ],
    ),
    (
        "models.encode",
        "--images {} is not a folder; put images with captions in one",
        f"--teacher PIXART_PIPE --images nowhere --resolution 8 {OUT}",
        [f"--teacher PIXART_PIPE --images CAPTIONED --resolution 8 {OUT}"],
    ),
    (
        "models.encode",
        "--images {} holds no {}",
        f"--teacher PIXART_PIPE --images EMPTY --resolution 8 {OUT}",
        [f"--teacher PIXART_PIPE --images CAPTIONED --resolution 8 {OUT}"],
    ),
    (
        "models.encode",
        "--images {}: {} of {} {} have no caption or an empty one, such as {}: write it into {}",
        f"--teacher PIXART_PIPE --images PICTURES --resolution 8 {OUT}",
        [
            f"--teacher PIXART_PIPE --images CAPTIONED --resolution 8 {OUT}",
            f"--teacher PIXART_PIPE --images PICTURES --captions CAPTIONS --resolution 8 {OUT}",
        ],
    ),
    (
        "models.encode",
        "--captions {}: {}: {}; wanted FILE.json with",
        f"--teacher PIXART_PIPE --images PICTURES --captions BROKEN_LINES --resolution 8 {OUT}",
        [f"--teacher PIXART_PIPE --images PICTURES --captions CAPTION_LINES --resolution 8 {OUT}"],
    ),
    (
        "models.encode",
        '--captions {}: wanted {"NAME": "CAPTION"}, with one text each',
        f"--teacher PIXART_PIPE --images PICTURES --captions NO_CAPTIONS --resolution 8 {OUT}",
        [f"--teacher PIXART_PIPE --images PICTURES --captions CAPTIONS --resolution 8 {OUT}"],
    ),
    (
        "models.encode",
        "--{} {}: its autoencoder is {}, which is not known here: pass a folder with {}",
        f"--teacher PIXART_PIPE --vae OTHER_VAE --images CAPTIONED --resolution 8 {OUT}",
        [f"--teacher PIXART_PIPE --vae VAE --images CAPTIONED --resolution 8 {OUT}"],
    ),
    (
        "models.encode",
        "--frames {}: this teacher makes images, leave it out",
        f"--teacher PIXART_PIPE --images CAPTIONED --resolution 8 --frames 5 {OUT}",
        [f"--teacher PIXART_PIPE --images CAPTIONED --resolution 8 {OUT}"],
    ),
    (
        "models.encode",
        "--frames {}: this teacher's videos have {}, ... frames",
        f"--teacher WAN_PIPE --images MOVIES --resolution 16 --frames 4 {OUT}",
        [
            f"--teacher WAN_PIPE --images MOVIES --resolution 16 --frames 5 {OUT}",
            f"--teacher WAN_PIPE --images MOVIES --resolution 16 --frames 1 {OUT}",
        ],
    ),
    (
        "models.encode",
        "--resolution {} {}: sides must be multiples of {}",
        f"--teacher PIXART_PIPE --images CAPTIONED --resolution 9 {OUT}",
        [f"--teacher PIXART_PIPE --images CAPTIONED --resolution 8 {OUT}"],
    ),
    (
        "models.encode",
        "of an interrupted python -m models.encode with other prompts or settings: give that",
        "--teacher WAN_PIPE --prompts_txt PROMPTS_TXT --output INTERRUPTED",
        [f"--teacher WAN_PIPE --prompts_txt PROMPTS_TXT {OUT}"],
    ),
    (
        "models.encode",
        "cannot write --output {}: {}; {}",
        "--teacher TEXT_ROOT --prompts_txt PROMPTS_TXT --output FILE/new",
        [f"--teacher TEXT_ROOT --prompts_txt PROMPTS_TXT {OUT}"],
    ),
]


# What cannot be met in one run of one process with nothing prepared: tests that follow it.
ELSEWHERE = {
    "--noise_schedule {}: ADM's networks of noise": (
        "test_adm",
        "test_what_the_files_of_adm_do_not_show",
    ),
    "--{} {}: the teacher has no classes: give --{} 1": (
        "test_teachers",
        "test_guidance_by_nothing_is_refused",
    ),
    "--{} {}: the teacher was trained with every label": (
        "test_teachers",
        "test_guidance_by_nothing_is_refused",
    ),
    "--student_steps {}: this student has {} phases": (
        "test_more_inputs",
        "test_a_student_of_phases_takes_a_step_in_each",
    ),
    "--expert_init previous: {} has a network for each expert": (
        "test_more_inputs",
        "test_experts_that_are_given_start_from_nothing_else",
    ),
    "--{}: the weights of {} leave no choice: leave it out": (
        "test_more_inputs",
        "test_flags_of_convert_without_a_choice",
    ),
    "its text encoder makes numbers that are not finite": (
        "test_more_inputs",
        "test_an_encoder_that_overflows",
    ),
    "--output {} is a folder: name a": ("test_more_inputs", "test_an_output_that_is_a_folder"),
    "--fps {}: GIFs have at most 50": ("test_more_inputs", "test_gifs_of_any_rate"),
    "--output_dir {} has images, such as {}, which are of no set": (
        "test_more_inputs",
        "test_images_that_are_of_no_set",
    ),
    "--class_in_name is for files with names of pictures": (
        "test_more_inputs",
        "test_classes_in_names_of_no_files",
    ),
    "--output_dir has a name of {} bytes: give one of at most 240": (
        "test_places",
        "test_names_that_no_disk_takes",
    ),
    "--output {} has pictures of ": ("test_vaes", "test_decoding_goes_on_and_mixes_nothing"),
    "--reference {} has mu_s, as guided-diffusion's files do": (
        "test_metrics",
        "test_spatial_features_as_guided_diffusion_stores_them",
    ),
    "--data: {} needs pictures: give a folder of them": (
        "test_image_sets",
        "test_latents_are_not_reconstructed",
    ),
    "{}: --data {} has latents: give pictures": (
        "test_image_sets",
        "test_latents_are_not_reconstructed",
    ),
    "--optimizer muon: it trains matrices inside blocks": (
        "test_latent_fm_networks",
        "test_muon_needs_matrices_inside_blocks",
    ),
    "change --resolution or --autoencoder": (
        "test_latent_fm_networks",
        "test_what_training_cannot_start_from_is_named",
    ),
    "--init {} has {} classes, and the data have {}: give data with as many": (
        "test_latent_fm_networks",
        "test_what_training_cannot_start_from_is_named",
    ),
    "give data with as many, or --task uncond for none": (
        "test_latent_fm_networks",
        "test_what_training_cannot_start_from_is_named",
    ),
    "{} sees {} channels beside a sample, and --task {} gives {}": (
        "test_latent_fm_networks",
        "test_what_training_cannot_start_from_is_named",
    ),
    "--network {}: --init {} has a network of its own": (
        "test_latent_fm_networks",
        "test_what_training_cannot_start_from_is_named",
    ),
    "--autoencoder {}: with --sample it is for folders of models.convert": (
        "test_latent_fm_networks",
        "test_what_training_cannot_start_from_is_named",
    ),
    "--noise_at 0 is for SiT, and this is ADM's U-Net: give 1": (
        "test_adm",
        "test_what_cannot_be_converted_is_named",
    ),
    "--prediction edm is for EDM's DhariwalUNet": (
        "test_adm",
        "test_what_cannot_be_converted_is_named",
    ),
    "--prediction eps is not what a DhariwalUNet has": (
        "test_adm",
        "test_what_cannot_be_converted_is_named",
    ),
    "--export {} is a {}: only DiTTransformer2DModel and UNetModel": (
        "test_adm",
        "test_what_cannot_be_exported_is_named",
    ),
    "--export {}: {}": ("test_adm", "test_what_cannot_be_exported_is_named"),
    "--layout has an effect only with --export": (
        "test_adm",
        "test_what_cannot_be_exported_is_named",
    ),
    "--{} describes the file of --input: leave it out with --export": (
        "test_adm",
        "test_what_cannot_be_exported_is_named",
    ),
    "--layout {}: a {} has {}: give that": ("test_adm", "test_what_cannot_be_exported_is_named"),
    "--images {} holds no images": ("test_pairs", "test_captions_of_sets"),
    "--images {} is {}, of pictures: give --frames 1": ("test_pairs", "test_captions_of_sets"),
    "--images {}: {} of {} images have no caption or an empty one": (
        "test_pairs",
        "test_captions_of_sets",
    ),
    "--data {} has views, and this teacher takes tokens of prompts": (
        "test_trellis_data",
        "test_wrong_folders",
    ),
    "has {} folders ({}), one for each encoder": ("test_trellis_data", "test_wrong_folders"),
    "--dinov2 {} makes tokens of width": ("test_trellis_data", "test_wrong_folders"),
    "no object of metadata.csv can be used": ("test_trellis_data", "test_wrong_folders"),
    "--data {}: latents are {}, the teacher takes": ("test_trellis_data", "test_wrong_folders"),
    "--data {}: {} has coords {} and feats": ("test_trellis_data", "test_wrong_folders"),
    "--dinov2: it is for --data FOLDER": ("test_trellis_data", "test_wrong_folders"),
    "no coords and offsets, as python -m models.meshes": ("test_mdt_runs", "places_alone"),
    "is sampled at those of FILE.safetensors": ("test_mdt_runs", "places_alone"),
    "its pipeline.json names no {}": ("test_meshes", "test_wrong_input_is_one_line"),
    "is a {}: give TRELLIS's root, or the path of its": (
        "test_meshes",
        "test_wrong_input_is_one_line",
    ),
    "mean and std of its latents have": ("test_meshes", "test_wrong_input_is_one_line"),
    "x0 has shape {}, and the decoder of --teacher": (
        "test_meshes",
        "test_wrong_input_is_one_line",
    ),
    "occupies no voxel: sample again, mdt_dist.py --seed N": (
        "test_meshes",
        "test_wrong_input_is_one_line",
    ),
    "--structures {} has no tensor x0, but {}": ("test_meshes", "test_wrong_input_is_one_line"),
    "or --voxels for meshes of the voxels of any points": (
        "test_meshes",
        "test_wrong_input_is_one_line",
    ),
    "channels, the mesh decoder of --teacher": ("test_meshes", "test_wrong_input_is_one_line"),
    "--voxels needs no decoder: leave --teacher out": (
        "test_meshes",
        "test_wrong_input_is_one_line",
    ),
    "--voxels is for --points": ("test_meshes", "test_wrong_input_is_one_line"),
    "--teacher: give TRELLIS's root": ("test_meshes", "test_wrong_input_is_one_line"),
    "points go to FILE.safetensors, name such a file": (
        "test_meshes",
        "test_wrong_input_is_one_line",
    ),
    "cannot write --output {}: {}; {}": ("test_meshes", "test_wrong_input_is_one_line"),
    "fills pictures in": ("test_image_sets", "test_what_is_no_image_is_refused"),
    "these are points": ("test_mdt_runs", "test_both_stages"),
    "are not finite: name the student": ("test_image_sets", "test_numbers_that_are_not_finite"),
    "has images that were made with other": (
        "test_image_sets",
        "test_another_command_does_not_go_on",
    ),
    "is not FID's Inception": ("test_metrics", "test_sets_that_are_refused"),
    "cut all of them with --resolution N": ("test_metrics", "test_sets_that_are_refused"),
    "cut both with --resolution N": ("test_metrics", "test_sets_that_are_refused"),
    "name a place with --cache": ("test_metrics", "test_sets_that_are_refused"),
    "--reference {} has statistics of features alone": (
        "test_metrics",
        "test_statistics_as_reference",
    ),
    "give the statistics of FID's Inception": ("test_metrics", "test_statistics_as_reference"),
    "is not finite: make it again": ("test_metrics", "test_statistics_as_reference"),
    "--data {} has latents: give --autoencoder FOLDER": (
        "test_sets",
        "test_posteriors_that_do_not_fit",
    ),
    "has latents, not pictures: leave --hflip and --cache_latents out": (
        "test_sets",
        "test_posteriors_that_do_not_fit",
    ),
    "no cond.label tensor: give it, or --task uncond": (
        "test_sets",
        "test_posteriors_that_do_not_fit",
    ),
    "{} without labels or class folders": ("test_sets", "test_broken_sets_are_one_line"),
    "has no class number in a .cls or .json": ("test_sets", "test_broken_sets_are_one_line"),
    "--output_dir: {} cannot be made": ("test_trust", "test_an_output_folder_that_cannot_be_made"),
    "give each an --output_dir of its own": ("test_trust", "test_two_runs_in_one_folder"),
    "these are not the files that the run began with": (
        "test_trust",
        "test_a_run_goes_on_with_the_inputs_it_began_with",
    ),
    "is not the teacher of these adapters": (
        "test_more_inputs",
        "test_adapters_of_a_teacher_that_is_another_now",
    ),
    "x0 is bytes (U8), which are pixels": ("test_more_inputs", "test_pixels_of_another_sort"),
    "which a new run renames: give another --output_dir": (
        "test_more_inputs",
        "test_data_in_the_folder_that_a_run_would_rename",
    ),
    "--sequence_ranks {}: {}": ("test_sequence", "test_networks_that_cannot"),
    "--shard_ranks {} does not": ("test_sharding", "test_mesh_refuses_other_numbers"),
    "from an earlier step's folder": ("test_sharding", "test_a_broken_part_of_a_state_is_one_line"),
    "rank(s)), which {} ranks cannot share: use one of {}": (
        "test_resume",
        "test_ranks_that_cannot_share_the_batch",
    ),
    "lower --bank_size or --sampling_steps, or name a --bank FOLDER on a larger disk": (
        "test_linvideo_runs",
        "test_disk_that_trajectories_take",
    ),
    "lower --own_trajectories, --fresh or --checkpointing_steps": (
        "test_linvideo_runs",
        "test_disk_that_trajectories_take",
    ),
    "a run with --state policy goes on with the trajectories that its student has made": (
        "test_linvideo_runs",
        "test_old_trajectories_of_the_student_go",
    ),
    "it has {} frames, --frames wants {}": ("test_pairs", "test_pixels_are_cut_to_the_shape"),
    "--{} {}: {} disagree on the number of rows": (
        "test_advice",
        "test_conditions_of_different_lengths",
    ),
    "--output_dir {} has files of another run, is a mount point and cannot be renamed": (
        "test_places",
        "test_a_mount_point_with_a_run_is_refused_before_training",
    ),
    "--output_dir {} has files of another run, and cannot be renamed ({}): name another": (
        "test_places",
        "test_a_folder_that_cannot_be_renamed",
    ),
}


def case_id(case):
    return f"{case[0]}: {case[2]}"[:70]


class Started(Exception):
    """A run that was not refused has come to its first update."""


def flags_of(places, tmp_path, command, line):
    """A case's line as flags, with a teacher and an output folder where it names none."""
    line = re.sub(r"\bOUT\b", str(tmp_path / "out"), line)
    for name in set(re.findall(r"(?<![/\w])[A-Z][A-Z0-9_]+\b", line)) & set(dir(places)):
        line = re.sub(rf"(?<![/\w]){name}\b", places[name], line)
    flags = shlex.split(line)
    if command in SCRIPTS:
        if command != "latent_fm" and not {"--teacher", "--sample"} & set(flags):
            flags += ["--teacher", places["TEACHER"]]
        if "--output_dir" not in flags:
            flags += ["--output_dir", str(tmp_path / "run")]
    return flags


def follow(line, error):
    """ADVISED in a line of advice, filled in from the message."""
    tail = re.split(r"(?:use|resume with) (?=--)", error)[-1].strip()
    line = re.sub(r"(--\w+) ADVISED", lambda m: re.search(rf"{m[1]} [\w.]+", tail)[0], line)
    return line.replace("ADVISED", tail)


def stop_before_training(monkeypatch):
    """Run.steps raises Started; the ring's network is fitted to nothing."""

    def steps(run, *args, **more):
        raise Started

    monkeypatch.setattr(teachers, "fit_ring_network", lambda teacher, seed: ring_network(seed))
    monkeypatch.setattr(Run, "steps", steps)


def encode_no_images(monkeypatch):
    """models.encode without the encoder of images that would have to be downloaded."""

    def images(folder, output, dinov2):
        return {path: "encoded" for path in encode.image_paths(folder)}

    monkeypatch.setattr(encode, "encode_trellis_images", images)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_advice(monkeypatch, capsys, places, tmp_path, case):
    """Refused with the message; not refused with the flags that it advises."""
    command, says, wrong, advised = case
    wrong = flags_of(places, tmp_path, command, wrong)
    for line in advised:
        flags_of(places, tmp_path, command, line)  # what they need is made before runs stop short
    stop_before_training(monkeypatch)
    error = refusal_of(capsys, importlib.import_module(command).main, *wrong)
    assert re.search(".*?".join(map(re.escape, says.split("{}"))), error), error
    theirs = {*flags_of_parser(command), *flags_of_quoted_commands(error)}
    assert set(flags_in(error)) <= theirs, error
    encode_no_images(monkeypatch)
    for line in advised:
        script = re.match(r"(\w+)\.py ", line)
        command = script.group(1) if script else command
        line = follow(line.removeprefix(f"{command}.py "), error)
        flags = flags_of(places, tmp_path, command, line)
        if command == "models.decode":  # another set would be refused in the same folder
            shutil.rmtree(flags[flags.index("--output") + 1], ignore_errors=True)
        with contextlib.suppress(Started):
            importlib.import_module(command).main(flags)


# ---- no message is forgotten ---------------------------------------------------------------------


@functools.cache
def flags_of_parser(command):
    """Names of the flags that a command takes."""
    seen, module = [], importlib.import_module(command)
    with pytest.MonkeyPatch.context() as m:
        for cls in (Parser, *Parser.__mro__[1:2]):
            m.setattr(cls, "parse_args", lambda p, *a, **k: seen.append(p) or exit_now())
        with contextlib.suppress(SystemExit):
            (module.parse_args if hasattr(module, "parse_args") else module.main)([])
    return tuple(action.dest for action in seen[-1]._actions)


def exit_now():
    raise SystemExit


def flags_of_quoted_commands(text):
    """Flags of other commands that a message quotes, python -m models.encode ... and the like."""
    for name in re.findall(r"python (?:-m )?([\w.]+)|(\w+\.py) --", text):
        name = "".join(name)
        if name.removesuffix(".py") in SCRIPTS + TOOLS:
            yield from flags_of_parser(name.removesuffix(".py"))


def test_every_message_that_names_a_flag_has_a_case():
    """In a script of its own, elsewhere of any command."""
    missing = []
    for file, text in messages():
        own = Path(file).stem if "/" not in file else None
        cases = [case for case in CASES if own in (None, case[0])]
        if not any(piece in text for piece in [*ELSEWHERE, *(case[1] for case in cases)]):
            missing.append(f"{file}: {text}")
    assert not missing, "\n" + "\n".join(missing)


def test_every_flag_in_a_message_exists():
    """In the parser of the script whose message it is; in models/, in that of some command."""
    every = {flag for command in SCRIPTS + TOOLS for flag in flags_of_parser(command)}
    for file, text in messages():
        name = file.removesuffix(".py").replace("/", ".")
        theirs = set(flags_of_parser(name)) if name in SCRIPTS + TOOLS else every
        theirs |= set(flags_of_quoted_commands(text))
        assert set(flags_in(text)) <= theirs, (file, text)


def test_cases_are_of_messages_that_exist():
    """A message that was reworded takes its case along."""
    texts = {text for _, text in messages()}
    for piece in [*ELSEWHERE, *(case[1] for case in CASES)]:
        assert any(piece in text for text in texts), piece
    for module, name in ELSEWHERE.values():
        assert f"def {name}(" in (ROOT / "tests" / f"{module}.py").read_text(), (module, name)


def test_conditions_of_different_lengths(tmp_path):
    """No network that is sampled from --data takes two conditions yet."""
    net = types.SimpleNamespace(cond_names=("text", "mask"))
    path = str(tmp_path / "d.safetensors")
    save_file({"cond.text": torch.zeros(3, 2, 4), "cond.mask": torch.ones(2, 2)}, path)
    with pytest.raises(UserError, match="cond.text and cond.mask disagree on the number of rows"):
        load_conditions(path, net)
    save_file({"cond.text": torch.zeros(3, 2, 4), "cond.mask": torch.ones(3, 2)}, path)
    assert len(load_conditions(path, net).preview(3)) == 3
