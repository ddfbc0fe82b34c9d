"""One student update of ours beside one of a peer's own training code, on the same network.

    python -m tests.bench dmd --dmd2 DIR        # github.com/tianweiy/DMD2, its EDM trainer
    python -m tests.bench dmd --fastgen DIR     # github.com/NVlabs/FastGen, DMD2Model and Trainer
    python -m tests.bench tdm --tdm_demo DIR    # github.com/Luo-Yihong/TDM, train_tdm_demo.py
    python -m tests.bench dmd --before DIR      # another checkout of this repository

DIR is a checkout of the peer: its code is imported from there, and nothing of it is kept here. All
sides train the glyphs' teacher (the DiT of models/networks/dit.py with its weights) in this process
on one thread, in float32, with batches of 64: each runs its own loop in a thread of its own, and
one of them at a time is let through one student update, with the fake updates that belong to it.
The order is reversed every round. Ours runs twice, with --reuse_samples and without.

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
import os
import statistics
import sys
import tempfile
import threading
import time
import types
from unittest import mock

import torch
from torch import nn

from models.files import UserError
from models.networks import load_network
from models.networks.dit import DiT
from models.plumbing.run import Run

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BATCH, LABELS, SHAPE = 64, 10, (3, 16, 16)
WARM = 3  # rounds that are not measured: memory is allocated, libraries are loaded


# ---- loops that stand still ----------------------------------------------------------------------


class Enough(BaseException):
    """The loop has been watched long enough; no handler of its own catches this."""


class Loop(threading.Thread):
    """A training loop in a thread of its own, which stands still between its student updates.

    train(pause): trains for ever and calls pause() after every student update. calls: pairs (rows,
    whether they are differentiated) of the DiT's calls so far.
    """

    def __init__(self, name, train):
        super().__init__(name=name, daemon=True)
        self.train, self.calls, self.error, self.ends = train, [], None, False
        self.turn, self.still = threading.Semaphore(0), threading.Semaphore(0)
        self.start()

    def run(self):
        self.turn.acquire()
        torch.set_num_threads(1)
        try:
            if not self.ends:
                self.train(self.pause)
        except Enough:
            pass
        except BaseException as error:  # raised again where the loop is waited for
            self.error = error
        self.still.release()

    def pause(self):
        self.still.release()
        self.turn.acquire()
        if self.ends:
            raise Enough

    def step(self):
        """Let it do one student update.  -> seconds of processor time. Raises what it raised."""
        began = time.process_time()
        self.turn.release()
        self.still.acquire()
        if self.error:
            raise self.error
        return time.process_time() - began

    def end(self):
        self.ends = True
        self.turn.release()
        self.join()


def counted(real):
    """DiT.forward that notes its rows in the loop that called it."""

    def forward(net, x, *args, **kwargs):
        output = real(net, x, *args, **kwargs)
        calls = getattr(threading.current_thread(), "calls", [])
        calls.append((len(x), output.requires_grad))
        return output

    return forward


def ours(name, flags, script=None, run=Run):
    """The loop of a script's own train.  -> function(pause)

    script, run: module and class Run of another checkout.
    """
    script = script or importlib.import_module(name)

    def train(pause):
        with tempfile.TemporaryDirectory() as folder:
            length = "--max_train_steps 100000 --checkpointing_steps 1000000 --preview_every 0"
            out = ["--output_dir", os.path.join(folder, "run")]
            script.main([*out, *length.split(), *flags])

    if not hasattr(run, "without_pause"):
        run.without_pause = run.end_step

        def end_step(self, *args, **kwargs):
            kept = run.without_pause(self, *args, **kwargs)
            pause = getattr(threading.current_thread(), "pause", None)
            if pause:  # a loop of this file
                pause()
            return kept

        run.end_step = end_step
    return train


# ---- a peer's checkout ---------------------------------------------------------------------------


class Empty(types.ModuleType):
    """A module that is not installed, for code that an update does not call."""

    def __init__(self, name, value=None):
        super().__init__(name)
        self.__path__, self.__spec__ = [], importlib.machinery.ModuleSpec(name, None)
        self.value = value or mock.MagicMock

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.value()


def leave_out(*names, value=None, always=False):
    """Let Empty stand for these modules, those that are installed excepted. value: () -> what its
    attributes are."""
    for name in names:
        root = name.split(".")[0]
        empty = isinstance(sys.modules.get(root), Empty)
        if always or empty or not importlib.util.find_spec(root):
            sys.modules[name] = Empty(name, value)


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


def dmd2(folder):
    """main/edm/train_edm.py's Trainer.  -> function(pause)"""
    import accelerate  # noqa: F401
    import diffusers.optimization  # noqa: F401
    import transformers  # noqa: F401

    leave_out("wandb", "lmdb", "imageio", "imageio.v2")
    leave_out("matplotlib", "matplotlib.pyplot", "matplotlib.backends")
    leave_out("matplotlib.backends.backend_agg")
    leave_out("main.edm.edm_network", always=True)  # EDM's own U-Net
    edm = importlib.import_module("main.edm.train_edm")
    guidance = importlib.import_module("main.edm.edm_guidance")

    def images(path):
        row = dict(images=torch.zeros(SHAPE), class_labels=torch.zeros(1, dtype=torch.long))
        return [row] * 10 * BATCH

    def train(pause):
        flags = f"--batch_size {BATCH} --resolution 16 --label_dim {LABELS} --dataset_name glyphs"
        flags += " --dfake_gen_update_ratio 2 --no_save --initialie_generator --wandb_name none"
        flags += " --wandb_iters 1000000 --num_workers 0 --generator_lr 2e-6 --guidance_lr 2e-6"
        with tempfile.TemporaryDirectory() as out, mock.patch.multiple(
            guidance, get_edm_network=lambda args: Denoiser(), dnnlib=mock.MagicMock(),
            pickle=mock.MagicMock(load=lambda f: {"ema": Denoiser()}),
        ), mock.patch.multiple(edm, LMDBDataset=images, wandb=mock.MagicMock()):  # fmt: skip
            edm.wandb.init.return_value.dir = out
            argv = ["train_edm.py", "--output_path", out, *flags.split()]
            with mock.patch.object(sys, "argv", argv):
                trainer = edm.Trainer(edm.parse_args())
        trainer.step = 2  # update 0 draws pictures for W&B
        while True:
            for _ in range(trainer.dfake_gen_update_ratio):
                trainer.train_one_step()
                trainer.step += 1
            pause()

    return train


# ---- FastGen -------------------------------------------------------------------------------------


def fastgen(folder):
    """fastgen/trainer.py's Trainer with its DMD2Model.  -> function(pause)"""
    import attrs  # noqa: F401
    import diffusers  # noqa: F401
    import hydra  # noqa: F401
    import loguru
    import omegaconf

    leave_out("wandb", "wandb.util", "torchvision", "torchvision.transforms", "imageio", "einops")
    leave_out("imageio.v3", "ftfy", "boto3", "botocore", "botocore.exceptions", "pandas", "scipy")
    zoo = "fastgen.configs.net", "fastgen.configs.data", "fastgen.configs.discriminator"
    leave_out(*zoo, value=lambda: omegaconf.DictConfig({}), always=True)
    method = importlib.import_module("fastgen.configs.methods.config_dmd2")
    callbacks = importlib.import_module("fastgen.configs.callbacks")
    network = importlib.import_module("fastgen.networks.network")
    trainer = importlib.import_module("fastgen.trainer")
    loguru.logger.remove()

    class Flow(network.FastGenNetwork):
        """The DiT, which predicts FastGen's "flow" of its schedule "rf"."""

        def __init__(self):
            super().__init__(net_pred_type="flow", schedule_type="rf")
            self.net = glyphs()

        def forward(self, x_t, t, condition=None, fwd_pred_type=None, **_):
            v = self.net(x_t, t.to(x_t.dtype), label=condition)
            into = dict(src_pred_type="flow", target_pred_type=fwd_pred_type or "flow")
            return self.noise_scheduler.convert_model_output(x_t, v, t, **into)

    def train(pause):
        def batches(batch_size):
            while True:
                for _ in range(3):
                    label = torch.randint(LABELS, (batch_size,))
                    null = torch.full_like(label, LABELS)
                    real = torch.zeros(batch_size, *SHAPE)
                    yield dict(real=real, condition=label, neg_condition=null)
                pause()

        lazy = importlib.import_module("fastgen.utils").LazyCall
        config = method.create_config()
        clip = callbacks.GradClip_CALLBACK["grad_clip"]
        clip_fake = copy.deepcopy(clip)
        clip_fake.model_key = "fake_score"
        each = dict(grad_clip=clip, grad_clip_fake=clip_fake, **callbacks.EMA_CALLBACK)
        config.trainer.callbacks = omegaconf.DictConfig(each, flags={"allow_objects": True})
        config.trainer.max_iter = config.trainer.save_ckpt_iter = 10**7
        config.trainer.resume = False
        config.dataloader_train = lazy(batches)(batch_size=BATCH)
        config.model.net = lazy(Flow)()
        config.model.input_shape, config.model.device = list(SHAPE), "cpu"
        config.model.student_update_freq, config.model.gan_loss_weight_gen = 3, 0.0
        config.model.use_ema = True
        config.model.sample_t_cfg.time_dist_type, config.model.sample_t_cfg.shift = "shifted", 2.0
        config.model.sample_t_cfg.min_t, config.model.sample_t_cfg.max_t = 0.001, 0.999
        model = importlib.import_module("fastgen.methods").DMD2Model(config.model)
        trainer.Trainer(config).run(model)

    return train


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


def tdm_demo(folder):
    """train_tdm_demo.py's main.  -> function(pause)"""
    import accelerate
    import diffusers  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401

    leave_out("datasets", "torchvision", "torchvision.transforms", "torchvision.utils")
    path = os.path.join(folder, "train_tdm_demo.py")
    with open(path) as f:
        source = f.read()
    for old, new in DEMO.items():
        if old not in source:
            raise UserError(f"--tdm_demo {folder}: {old} is not in its source: check out 81b019f")
        source = source.replace(old, new)
    demo = dict(__name__="train_tdm_demo")
    exec(compile(source, path, "exec"), demo)

    def train(pause):
        class Accelerator(accelerate.Accelerator):
            def log(self, *args, **kwargs):  # the end of an update
                super().log(*args, **kwargs)
                pause()

        with tempfile.TemporaryDirectory() as out:
            argv = [path, "--train_batch_size", str(BATCH), "--output_dir", os.path.join(out, "x")]
            with mock.patch.object(sys, "argv", argv):
                args = demo["parse_args"]()
            demo["parse_args"] = lambda: args
            demo["DATA"] = [(None, str(i % LABELS), i) for i in range(1000 * BATCH)]
            demo["T5Tokenizer"], demo["T5EncoderModel"] = (
                pretrained(lambda: Tokens),
                pretrained(TextEncoder),
            )
            demo["Transformer2DModel"], demo["AutoencoderTiny"] = (
                pretrained(Transformer),
                mock.MagicMock(),
            )
            demo["Accelerator"] = Accelerator
            demo["main"]()

    return train


# ---- the comparison ------------------------------------------------------------------------------


def before(name, folder):
    """A script of another checkout of this repository.  -> its module, its Run"""
    rooms = {"models", "kernels", name}

    def taken_out():
        names = [n for n in sys.modules if n.split(".")[0] in rooms]
        return {n: sys.modules.pop(n) for n in names}

    own = taken_out()
    sys.path.insert(0, folder)
    try:
        script = importlib.import_module(name)
        return script, sys.modules["models.plumbing.run"].Run
    finally:
        taken_out()
        sys.modules.update(own)
        sys.path.remove(folder)


FOUR = "--student_steps 4 --fake_update_ratio 1 --guidance_scale 2".split()
PEERS = {  # flag: the script, a file of the checkout, whose, its loop, and what ours is given
    "dmd2": ("dmd", "main/edm/train_edm.py", "github.com/tianweiy/DMD2", dmd2, []),
    "fastgen": ("dmd", "fastgen/trainer.py", "github.com/NVlabs/FastGen", fastgen, []),
    "tdm_demo": ("tdm", "train_tdm_demo.py", "github.com/Luo-Yihong/TDM", tdm_demo, FOUR),
    "before": (None, None, "this repository", None, []),
}


def peer_loop(flag, folder, name, given):
    """-> function(pause) of a peer. Raises UserError where it cannot be had."""
    script, file, whose, loop, _ = PEERS[flag]
    if script not in (None, name):
        raise UserError(
            f"--{flag} is compared with {script}.py: say python -m tests.bench {script}"
        )
    folder, file = os.path.abspath(folder), file or f"{name}.py"
    if not os.path.isfile(os.path.join(folder, file)):
        raise UserError(f"--{flag} {folder}: it has no {file}: give a checkout of {whose}")
    if loop is None:
        return ours(name, given, *before(name, folder))
    sys.path.insert(0, folder)
    try:
        return loop(folder)
    except ImportError as error:
        what = error.name or "a package"
        raise UserError(f"--{flag} {folder}: it needs {what}: pip install it ({error})") from None


def compare(loops, rounds):
    """Let loops take turns, one student update each, in an order that is reversed every round.

    -> {loop's name: seconds of processor time of every round}, {name: calls of an update}
    """
    seconds = {loop.name: [] for loop in loops}
    with mock.patch.object(DiT, "forward", counted(DiT.forward)):
        for i in range(WARM + rounds):
            for loop in loops[:: 1 if i % 2 else -1]:
                if i == WARM:
                    loop.calls.clear()
                seconds[loop.name].append(loop.step())
    calls = {loop.name: (len(loop.calls), sum(rows for rows, _ in loop.calls)) for loop in loops}
    for loop in loops:
        loop.end()
    seconds = {name: times[WARM:] for name, times in seconds.items()}
    return seconds, {name: (n / rounds, rows / rounds) for name, (n, rows) in calls.items()}


def spread(values):
    """-> the median, and the bounds of the middle 80 %."""
    ordered = sorted(values)
    cut = len(ordered) // 10
    return statistics.median(ordered), ordered[cut], ordered[-1 - cut]


def report(seconds, calls, peer):
    """The table, line by line. peer: name of the loop that the others are compared with."""
    lines = [f"{'':20s} {'ms':>8s} {'calls':>7s} {'rows':>7s}   ratio [80 % of the rounds]"]
    for name, times in seconds.items():
        row = f"{name:20s} {1000 * statistics.median(times):8.1f}"
        row += f" {calls[name][0]:7.3g} {calls[name][1]:7.4g}"
        if name != peer:
            ratios = [a / b for a, b in zip(times, seconds[peer], strict=True)]
            row += "   {:.3f} [{:.3f}, {:.3f}]".format(*spread(ratios))
        lines.append(row)
    return lines


def beside(flag, folder, name, rounds, given=()):
    """Compare a script with a peer and print the table. given: the script's flags after --."""
    flags = [*PEERS[flag][4], *given]
    peer = Loop(flag, peer_loop(flag, folder, name, flags))
    fresh = "ours, fresh samples"
    loops = [Loop("ours", ours(name, flags)), peer]
    if hasattr(importlib.import_module(name).parse_args([]), "reuse_samples"):
        loops.insert(1, Loop(fresh, ours(name, [*flags, "--no-reuse_samples"])))
    seconds, calls = compare(loops, rounds)
    print(
        f"\n{' '.join([name, *flags])} beside {flag}: {rounds} rounds of processor time, one "
        f"thread, torch {torch.__version__}"
    )
    print("\n".join(report(seconds, calls, flag)))
