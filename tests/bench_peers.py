"""One student update of ours beside one of a peer's own training code, on the same network.

    python -m tests.bench dmd --dmd2 DIR        # github.com/tianweiy/DMD2, its EDM trainer
    python -m tests.bench dmd --fastgen DIR     # github.com/NVlabs/FastGen, DMD2Model and Trainer
    python -m tests.bench tdm --tdm_demo DIR    # github.com/Luo-Yihong/TDM, train_tdm_demo.py
    python -m tests.bench dmd --before DIR      # another checkout of this repository

DIR is a checkout of the peer: its code is imported from there, and nothing of it is kept here. All
sides train the glyphs' teacher (the DiT of models/networks/dit.py with its weights) on one thread
of the CPU, in float32, with batches of 64. Each runs its own loop in a process forked from this
one, so that neither sees the other's memory allocator or modules, and they take turns: one at a
time does one student update, with the fake updates that belong to it. The order is reversed every
round. Ours runs twice, with --reuse_samples and without.

What is measured is processor time, so that other work on the machine counts little, and what is
compared are the pairs of a round: the median of the ratios ours / theirs, and between which ratios
80 % of the rounds lie. Network calls and their rows are counted in the DiT itself.

What differs from a peer's own command:

    all        the glyphs' DiT stands in for the peer's network, random labels for its data; modules
               that an update does not call (logging, images, downloads) are empty if not installed
    dmd2       dfake_gen_update_ratio 2, no GAN; an EDM denoiser D = x_t - t v, t = sigma / (1 +
               sigma), where x_t is divided by 1 + sigma
    fastgen    student_update_freq 3 (two updates of the fake and one of the student), no GAN, no
               guidance, the schedule "rf"; EMA and clipping as ours has them; AdamW is its default
    tdm_demo   its defaults: K = 4, guidance 2, R = 1; float32 where it writes float16, images of
               3x16x16 and no previews, all replaced in memory. Ours has the same K, guidance and R
"""

import copy
import importlib
import importlib.machinery
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
import types
from unittest import mock

import torch
from torch import nn

from models.files import UserError
from models.networks import load_network

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BATCH, LABELS, SHAPE = 64, 10, (3, 16, 16)
WARM = 3  # rounds that are not measured: memory is allocated, libraries are loaded


# ---- loops that take turns -----------------------------------------------------------------------


class Loop:
    """A training loop in a process of its own, which stands still between its student updates.

    train(pause): trains for ever and calls pause() after every student update.
    """

    def __init__(self, name, train):
        self.name, context = name, multiprocessing.get_context("fork")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=turns, args=(train, there), daemon=True)
        self.process.start()
        there.close()

    def step(self):
        """Let it do one student update.  -> seconds of processor time, network calls, their rows.

        Raises UserError for what it cannot do, RuntimeError where it fails.
        """
        self.pipe.send(True)
        try:
            answer = self.pipe.recv()
        except EOFError:
            answer = RuntimeError("its process was killed")
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self):
        self.pipe.close()
        self.process.kill()
        self.process.join()


def turns(train, pipe):
    """What a Loop's process does: train, and at every pause say what it took and wait."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)
    calls, began = [], 0.0

    def pause():
        nonlocal began
        pipe.send((time.process_time() - began, len(calls), sum(calls)))
        calls.clear()
        pipe.recv()
        began = time.process_time()

    def note(net, args):
        if type(net).__name__ == "DiT":
            calls.append(len(args[0]))

    torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        pipe.recv()
        train(pause)
    except UserError as error:
        pipe.send(error)
    except ModuleNotFoundError as error:
        pipe.send(UserError(f"it needs the module {error.name}: install what its README names"))
    except Exception:
        pipe.send(RuntimeError(traceback.format_exc()))


def ours(name, flags, folder=ROOT):
    """A script's own main, of this checkout or of another one.  -> train(pause)"""

    def train(pause):
        if folder != ROOT:
            rooms = {"models", "kernels", name}
            for module in [m for m in sys.modules if m.split(".")[0] in rooms]:
                del sys.modules[module]
            sys.path.insert(0, folder)
        script = importlib.import_module(name)
        run = sys.modules["models.plumbing.run"].Run
        real = run.end_step

        def end_step(self, *args, **kwargs):
            kept = real(self, *args, **kwargs)
            pause()
            return kept

        with tempfile.TemporaryDirectory() as out, mock.patch.object(run, "end_step", end_step):
            length = "--max_train_steps 100000 --checkpointing_steps 1000000 --preview_every 0"
            script.main(["--output_dir", os.path.join(out, "run"), *length.split(), *flags])

    return train


# ---- a peer's checkout ---------------------------------------------------------------------------
#
# The functions dmd2, fastgen and tdm_demo run in a Loop's process, with the checkout on sys.path.


class Empty(types.ModuleType):
    """A module that is not installed, for code that an update does not call."""

    def __init__(self, name, value):
        super().__init__(name)
        self.__path__, self.__spec__ = [], importlib.machinery.ModuleSpec(name, None)
        self.value = value

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.value()


def leave_out(names, value=mock.MagicMock, always=False):
    """Let Empty stand for these modules, those that are installed excepted, unless `always`.

    value: () -> what their attributes are.
    """
    for name in names.split():
        root = name.split(".")[0]
        empty = isinstance(sys.modules.get(root), Empty)
        if always or empty or not importlib.util.find_spec(root):
            sys.modules[name] = Empty(name, value)


def load(names):
    """-> these modules. Libraries are loaded before `leave_out`: they ask what is installed."""
    return [importlib.import_module(name) for name in names.split()]


def glyphs():
    """The DiT of the glyphs with the teacher's weights."""
    return load_network(os.path.join(ROOT, "models", "worlds", "glyphs", "teacher"))[0]


# ---- official DMD2 -------------------------------------------------------------------------------


class Denoiser(nn.Module):
    """The DiT as an EDM denoiser, net(x0 + sigma eps, sigma, one-hot labels) -> x0."""

    def __init__(self):
        super().__init__()
        self.net, self.model = glyphs(), types.SimpleNamespace(map_augment=None)

    def forward(self, x, sigma, label):
        sigma = sigma.reshape(-1)
        t = sigma / (1 + sigma)
        x_t = x / (1 + sigma)[:, None, None, None]  # (1 - t) x0 + t eps
        return x_t - t[:, None, None, None] * self.net(x_t, t, label=label.argmax(1))


def dmd2(folder, pause):
    """Train by main/edm/train_edm.py's Trainer."""
    load("accelerate diffusers.optimization transformers")
    leave_out("wandb lmdb imageio imageio.v2 matplotlib matplotlib.pyplot matplotlib.backends")
    leave_out("matplotlib.backends.backend_agg")
    leave_out("main.edm.edm_network", always=True)  # EDM's own U-Net
    edm, guidance = load("main.edm.train_edm main.edm.edm_guidance")
    row = dict(images=torch.zeros(SHAPE), class_labels=torch.zeros(1, dtype=torch.long))
    edm.LMDBDataset = lambda path: [row] * 10 * BATCH
    guidance.dnnlib = mock.MagicMock()  # would download the teacher
    guidance.pickle = types.SimpleNamespace(load=lambda file: {"ema": Denoiser()})
    guidance.get_edm_network = lambda args: Denoiser()
    with tempfile.TemporaryDirectory() as out:
        edm.wandb = mock.MagicMock()
        edm.wandb.init.return_value.dir = out
        flags = f"--output_path {out} --batch_size {BATCH} --resolution 16 --label_dim {LABELS}"
        flags += (
            " --dfake_gen_update_ratio 2 --generator_lr 2e-6 --guidance_lr 2e-6 --num_workers 0"
        )
        flags += " --initialie_generator --no_save --wandb_name none --wandb_iters 1000000"
        sys.argv = ["train_edm.py", *flags.split()]
        trainer = edm.Trainer(edm.parse_args())
        trainer.step = 2  # update 0 draws pictures for W&B
        while True:
            for _ in range(2):
                trainer.train_one_step()
                trainer.step += 1
            pause()


# ---- FastGen -------------------------------------------------------------------------------------


def flow_network(base):
    """-> the DiT as a subclass of FastGenNetwork, which predicts "flow" of the schedule "rf"."""

    class Flow(base):
        def __init__(self):
            super().__init__(net_pred_type="flow", schedule_type="rf")
            self.net = glyphs()

        def forward(self, x_t, t, condition=None, fwd_pred_type=None, **_):
            v = self.net(x_t, t.to(x_t.dtype), label=condition)
            into = dict(src_pred_type="flow", target_pred_type=fwd_pred_type or "flow")
            return self.noise_scheduler.convert_model_output(x_t, v, t, **into)

    return Flow


def fastgen(folder, pause):
    """Train by fastgen/trainer.py's Trainer, with its DMD2Model."""
    load("diffusers")
    leave_out("wandb wandb.util torchvision torchvision.transforms imageio imageio.v3 einops ftfy")
    leave_out("boto3 botocore botocore.exceptions pandas scipy")
    omegaconf, loguru = load("omegaconf loguru")
    zoo = "fastgen.configs.net fastgen.configs.data fastgen.configs.discriminator"
    leave_out(zoo, value=lambda: omegaconf.DictConfig({}), always=True)
    method, every, utils = load(
        "fastgen.configs.methods.config_dmd2 fastgen.configs.callbacks fastgen.utils"
    )
    networks, methods, trainer = load("fastgen.networks.network fastgen.methods fastgen.trainer")
    loguru.logger.remove()

    def batches(batch_size):
        while True:
            for _ in range(3):
                label = torch.randint(LABELS, (batch_size,))
                null, real = torch.full_like(label, LABELS), torch.zeros(batch_size, *SHAPE)
                yield dict(real=real, condition=label, neg_condition=null)
            pause()

    config = method.create_config()
    clip = every.GradClip_CALLBACK["grad_clip"]
    clip_fake = copy.deepcopy(clip)
    clip_fake.model_key = "fake_score"
    each = dict(grad_clip=clip, grad_clip_fake=clip_fake, **every.EMA_CALLBACK)
    run, model = config.trainer, config.model
    run.callbacks = omegaconf.DictConfig(each, flags={"allow_objects": True})
    run.max_iter = run.save_ckpt_iter = 10**7
    run.resume = False
    config.dataloader_train = utils.LazyCall(batches)(batch_size=BATCH)
    model.net = utils.LazyCall(flow_network(networks.FastGenNetwork))()
    model.input_shape, model.device, model.use_ema = list(SHAPE), "cpu", True
    model.student_update_freq, model.gan_loss_weight_gen = 3, 0.0
    t = model.sample_t_cfg
    t.time_dist_type, t.shift, t.min_t, t.max_t = "shifted", 2.0, 0.001, 0.999
    trainer.Trainer(config).run(methods.DMD2Model(model))


# ---- TDM's demo ----------------------------------------------------------------------------------

DEMO = {  # what stands in the source: what replaces it, since it is no argument
    "torch.float16": "torch.float32",
    "4, 64, 64": "3, 16, 16",
    "num_workers=8": "num_workers=0",
    "global_step % 50 == 0": "False",
    "torch.load('./cache.pt',  weights_only=False)['data']": "DATA",
    "from transformers import T5EncoderModel, T5Tokenizer": "",
    "from diffusers import AutoencoderTiny": "pass",
    "from diffusers import Transformer2DModel": "pass",
}


class Transformer(nn.Module):
    """The DiT with the interface of PixArt's transformer: eps and, in as many channels, variances.

    It is called with indices of 1000 noise levels. The "text" of an image is its class.
    """

    def __init__(self):
        super().__init__()
        self.net = glyphs()

    def enable_xformers_memory_efficient_attention(self):
        """There is nothing to enable."""

    def forward(self, x, timestep, encoder_hidden_states, **_):
        eps = self.net(x, (timestep + 1) / 1000, label=encoder_hidden_states)
        return (eps.repeat(1, 2, 1, 1),)


class Tokens(types.SimpleNamespace):
    """What a tokenizer returns. input_ids (n, 120): the class, again and again."""

    def __init__(self, texts, **_):
        classes = [int(text) if text.isdigit() else LABELS for text in texts]
        ids = torch.tensor(classes)[:, None].repeat(1, 120)
        super().__init__(input_ids=ids, attention_mask=torch.ones_like(ids))

    def to(self, device):
        return self


class TextEncoder(nn.Module):
    """Classes of input_ids (n, 120)."""

    def forward(self, input_ids, **_):
        return (input_ids[:, 0],)


def pretrained(value):
    """A class whose from_pretrained returns value()."""
    return types.SimpleNamespace(from_pretrained=lambda *args, **kwargs: value())


def tdm_demo(folder, pause):
    """Train by train_tdm_demo.py's main."""
    accelerate, *_ = load("accelerate diffusers peft transformers")
    leave_out("datasets torchvision torchvision.transforms torchvision.utils")
    path = os.path.join(folder, "train_tdm_demo.py")
    with open(path) as f:
        source = f.read()
    for old, new in DEMO.items():
        if old not in source:
            raise UserError(f"{old} is not in its source: check out commit 81b019f")
        source = source.replace(old, new)
    demo = dict(__name__="train_tdm_demo")
    exec(compile(source, path, "exec"), demo)

    class Accelerator(accelerate.Accelerator):
        def log(self, *args, **kwargs):  # the end of an update
            super().log(*args, **kwargs)
            pause()

    demo["Accelerator"] = Accelerator
    demo["DATA"] = [(None, str(i % LABELS), i) for i in range(1000 * BATCH)]
    demo["T5Tokenizer"] = pretrained(lambda: Tokens)
    demo["T5EncoderModel"] = pretrained(TextEncoder)
    demo["Transformer2DModel"] = pretrained(Transformer)
    demo["AutoencoderTiny"] = mock.MagicMock()
    with tempfile.TemporaryDirectory() as out:
        out = os.path.join(out, "demo")
        sys.argv = [path, "--train_batch_size", str(BATCH), "--output_dir", out]
        demo["main"]()


# ---- the comparison ------------------------------------------------------------------------------

FOUR = "--student_steps 4 --fake_update_ratio 1 --guidance_scale 2".split()
PEERS = {  # flag: the script, a file of the checkout, whose it is, its training, flags of ours
    "dmd2": ("dmd", "main/edm/train_edm.py", "github.com/tianweiy/DMD2", dmd2, []),
    "fastgen": ("dmd", "fastgen/trainer.py", "github.com/NVlabs/FastGen", fastgen, []),
    "tdm_demo": ("tdm", "train_tdm_demo.py", "github.com/Luo-Yihong/TDM", tdm_demo, FOUR),
    "before": (None, "models/plumbing/run.py", "this repository", None, []),
}


def peer(flag, folder, name, flags):
    """-> train(pause) of a peer. Raises UserError where folder is no checkout of it."""
    script, file, whose, train, _ = PEERS[flag]
    if script not in (None, name):
        raise UserError(f"--{flag} is compared with {script}.py: python -m tests.bench {script}")
    folder = os.path.abspath(folder)
    if not os.path.isfile(os.path.join(folder, file)):
        raise UserError(f"--{flag} {folder}: it has no {file}: give a checkout of {whose}")
    if train is None:
        return ours(name, flags, folder)

    def its_own(pause):
        sys.path.insert(0, folder)
        train(folder, pause)

    return its_own


def compare(loops, rounds):
    """Let loops take turns, one student update each, in an order that is reversed every round.

    -> {loop's name: [(seconds of processor time, network calls, rows) of every round]}
    """
    found = {loop.name: [] for loop in loops}
    try:
        for i in range(WARM + rounds):
            for loop in loops[:: 1 if i % 2 else -1]:
                found[loop.name].append(loop.step())
    except UserError as error:
        raise UserError(f"--{loop.name}: {error}" if loop.name in PEERS else str(error)) from None
    finally:
        for loop in loops:
            loop.end()
    return {name: steps[WARM:] for name, steps in found.items()}


def spread(values):
    """-> the median, and the bounds of the middle 80 %."""
    ordered = sorted(values)
    cut = len(ordered) // 10
    return statistics.median(ordered), ordered[cut], ordered[-1 - cut]


def table(found, theirs):
    """Line by line. theirs: name of the loop that the others are compared with."""
    lines = [f"{'':20s} {'ms':>8s} {'calls':>6s} {'rows':>6s}   ratio [80 % of the rounds]"]
    for name, steps in found.items():
        seconds, calls, rows = zip(*steps, strict=True)
        row = f"{name:20s} {1000 * statistics.median(seconds):8.1f}"
        row += f" {statistics.mean(calls):6.3g} {statistics.mean(rows):6.4g}"
        if name != theirs:
            pairs = zip(seconds, found[theirs], strict=True)
            row += "   {:.3f} [{:.3f}, {:.3f}]".format(*spread([a / b for a, (b, *_) in pairs]))
        lines.append(row)
    return lines


def beside(flag, folder, name, rounds, given=()):
    """Compare a script with a peer and print the table. given: flags of the script.

    Raises UserError.
    """
    script, flags = importlib.import_module(name), [*PEERS[flag][4], *given]
    torch.optim.AdamW([torch.zeros(1)])  # loads, once for all processes, what optimisers load
    loops = [Loop("ours", ours(name, flags)), Loop(flag, peer(flag, folder, name, flags))]
    if "reuse_samples" in script.parse_args(flags):
        fresh = ours(name, [*flags, "--no-reuse_samples"])
        loops.insert(1, Loop("ours, fresh samples", fresh))
    found = compare(loops, rounds)
    print(f"{' '.join([name, *flags])} beside {flag}: {rounds} rounds, one thread, processor time")
    print("\n".join(table(found, flag)))
