"""What several test files share."""

import copy
import csv
import functools
import os
import signal
import types
from pathlib import Path

import pytest
import torch
from forks import launch
from safetensors.torch import load_file, save_file

import decoupled_dmd
import dmd
import tdm
from models.files import load_json, save_json
from models.networks import network_config, save_network
from models.networks.dit import DiT
from models.networks.pixart import PixArtTransformer2DModel
from models.networks.ring_dit import RingDiT
from models.networks.ring_mlp import RingMLP
from models.networks.wan import WanTransformer3DModel
from models.networks.z_image import ZImageTransformer2DModel
from models.plumbing import report, sharding, teachers
from models.plumbing.film import Film
from models.plumbing.run import Run, run_main
from models.plumbing.state import SavedState
from tests.schedulers import PIXART

ROOT = Path(__file__).resolve().parents[1]
ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "CUDA_VISIBLE_DEVICES": "",
}  # of the processes that tests start


def perturbed(net, seed=0, std=0.1):
    """The network with noise on every weight, so that no zero-initialised layer hides anything."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += std * torch.randn(p.shape, generator=g)
    return net


def fill(net, seed=0):
    """Weights that hide nothing: no zero bias, no norm exactly 1, modulation large enough to
    matter."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(net.named_parameters()):
            noise = torch.randn(p.shape, generator=g)
            if "norm" in name and name.endswith("weight") and p.dim() == 1:
                p.copy_(1 + 0.3 * noise)
            elif name.endswith("scale_shift_table"):
                p.copy_(0.5 * noise)
            else:
                p.copy_(0.15 * noise)
    return net.eval()


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def small_dit(seed=0, **changes):
    torch.manual_seed(seed)
    return DiT(
        **{**dict(size=(6, 4), patch=(3, 2), channels=2, dim=64, depth=3, num_classes=3), **changes}
    )


def dit_inputs(net, n=5):
    """-> x (n, ...), t (n,) from 0.1 to 1, label (n,)."""
    x = torch.randn(n, *net.latent_shape, generator=torch.Generator().manual_seed(0))
    return x, torch.linspace(0.1, 1.0, n), torch.arange(n) % max(1, net.num_classes)


def ring_network(seed=0):
    """A network for the ring that is fitted to nothing and costs nothing."""
    torch.manual_seed(seed)
    return RingMLP(dim=32)


FITTED = {}  # (function's name, class of the teacher, seed): network


def fitted_once(fit, teacher, seed=0):
    """What `fit` of models/worlds/ring.py returns: a copy of the first time's, which took ten
    seconds. The same for the same seed."""
    key = fit.__name__, type(teacher), seed
    if key not in FITTED:
        FITTED[key] = fit(teacher, seed)
    return copy.deepcopy(FITTED[key])


def ring_dit(seed=0):
    """The same with attention, and with noise on every weight."""
    torch.manual_seed(seed)
    return perturbed(RingDiT(tokens=4), std=0.2)


def quiet(monkeypatch):
    """Let runs draw no samples and measure nothing, and start on the ring from ring_network."""
    for name in ("finish", "preview", "save_samples"):
        monkeypatch.setattr(report, name, lambda *a, **k: None)
    monkeypatch.setattr(teachers, "fit_ring_network", lambda teacher, seed: ring_network(seed))
    monkeypatch.setattr(teachers, "fit_ring_transformer", lambda teacher, seed: ring_dit(seed))


def has_gradient(module):
    return any(p.grad is not None for p in module.parameters())


both = pytest.mark.parametrize(  # what holds for either
    "script", [dmd, decoupled_dmd], ids=lambda script: script.__name__
)
each = pytest.mark.parametrize(
    "script", [dmd, decoupled_dmd, tdm], ids=lambda script: script.__name__
)


class Diary:
    """What a run of a script's main did.

    The networks (teacher: the Teacher, student, fake); `updates`, the names of what was updated, in
    order; `grads`, which networks had gradients at that moment; `norms`, of the gradient before
    clipping; `fake_samples`, what the fake score was trained on; `rollouts`, pairs (calls, whether
    gradients were on); `turns`, the calls of teacher, student and fake between two updates.
    """

    def __init__(self, monkeypatch, script):
        self.updates, self.grads, self.norms = [], [], []
        self.fake_samples, self.rollouts, self.turns = [], [], [[]]
        self.head = ()
        self.wrap(monkeypatch, script, "freeze_teacher", self.on_freeze)
        self.wrap(monkeypatch, Run, "start", self.on_start)
        self.wrap(monkeypatch, Run, "update", self.on_update)
        self.wrap(monkeypatch, script, "fake_score_loss", self.on_fake_loss)
        if script is not tdm:  # which rolls out inside its loop
            self.wrap(monkeypatch, script, "rollout", self.on_rollout)
        quiet(monkeypatch)
        for name in ("take", "frame"):  # the film would call the networks too
            monkeypatch.setattr(Film, name, lambda *a, **k: None)

    @staticmethod
    def wrap(monkeypatch, module, name, before):
        """Replace module.name: before(real, *args, **kwargs) is called instead of real."""
        real = getattr(module, name)

        @functools.wraps(real)
        def wrapped(*args, **kwargs):
            return before(real, *args, **kwargs)

        monkeypatch.setattr(module, name, wrapped)

    def watch(self, who, net):
        """Write every call of this network into the current turn."""

        def on_call(net, args, cond, output):
            call = dict(who=who, x_t=args[0].detach(), t=args[1], graph=torch.is_grad_enabled())
            call |= {"label": None, "steps": None, **cond}
            self.turns[-1].append(types.SimpleNamespace(**call))

        net.register_forward_hook(on_call, with_kwargs=True)

    def on_freeze(self, real, run, teacher):
        real(run, teacher)
        self.teacher = teacher
        self.watch("teacher", teacher.net)

    def on_start(self, real, run, **state):
        self.student, self.fake, head = state["student"], state["fake"], state.get("head")
        self.head = list(head.parameters()) if head else []
        self.watch("student", self.student)
        self.watch("fake", self.fake)
        owners = {id(p): "student" for p in self.student.parameters()}
        owners |= {id(p): "fake" for p in [*self.fake.parameters(), *self.head]}
        for name, owner in (("optimizer", "student"), ("optimizer_fake", "fake")):
            groups = state[name].param_groups
            parameters = [p for group in groups for p in group["params"]]
            assert {owners[id(p)] for p in parameters} == {owner}
            assert len(parameters) == list(owners.values()).count(owner)
        return real(run, **state)

    def on_update(self, real, run, optimizers, what):
        groups = optimizers.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        self.updates.append(what)
        self.turns.append([])
        networks = {"student": self.student, "fake": self.fake, "teacher": self.teacher.net}
        grads = {name: has_gradient(net) for name, net in networks.items()}
        grads["head"] = any(p.grad is not None for p in self.head)
        grads["student_all"] = all(p.grad is not None for p in self.student.parameters())
        self.grads.append(grads)
        self.norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
        return real(run, optimizers, what)

    def on_fake_loss(self, real, fake, diffusion, x, *rest):
        assert not x.requires_grad
        self.fake_samples.append(x.clone())
        return real(fake, diffusion, x, *rest)

    def on_rollout(self, real, student, diffusion, noise, times, *rest):
        self.rollouts.append((len(times) - 1, torch.is_grad_enabled()))
        return real(student, diffusion, noise, times, *rest)


def ring_flags(folder, steps=3, batch=8, *flags):
    """Flags of a short run on the ring that saves only at its end."""
    fixed = ["--teacher", "ring", "--checkpointing_steps", "1000", "--output_dir", str(folder)]
    sizes = ["--max_train_steps", str(steps), "--train_batch_size", str(batch)]
    return [*fixed, *sizes, *flags]


def ring_run(monkeypatch, script, folder, *flags, steps=3, batch=8):
    """A quiet run on the ring -> its diary."""
    diary = Diary(monkeypatch, script)
    script.main(ring_flags(folder, steps, batch, *flags))
    return diary


def one_step(monkeypatch, script, folder, *flags):
    """One step of the ring (batch 8, R = 1) -> its diary.

    diary.at: {"student" or "fake": (copies of the networks, their gradients by parameter)} as they
    were at that update.
    """
    diary = Diary(monkeypatch, script)
    diary.at, nets = {}, {}

    def on_start(real, run, **state):
        nets.update({name: state[name] for name in ("student", "fake", "head") if name in state})
        return real(run, **state)

    def on_update(real, run, optimizers, what):
        grads = {
            name: [None if p.grad is None else p.grad.clone() for p in net.parameters()]
            for name, net in nets.items()
        }
        diary.at[what] = copy.deepcopy(nets), grads
        return real(run, optimizers, what)

    diary.wrap(monkeypatch, Run, "start", on_start)
    diary.wrap(monkeypatch, Run, "update", on_update)
    once = ["--fake_update_ratio", "1", "--max_grad_norm", "1e9", "--lr_warmup_steps", "0"]
    script.main(ring_flags(folder, 1, 8, *once, *flags))
    return diary


# ---- runs as a user starts them ------------------------------------------------------------------

TINY_WAN = dict(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=32,
    ffn_dim=48,
    num_layers=2,
)

TINY_Z_IMAGE = dict(
    in_channels=4,
    dim=24,
    n_layers=2,
    n_refiner_layers=1,
    n_heads=2,
    n_kv_heads=2,
    cap_feat_dim=16,
    axes_dims=[4, 4, 4],
    axes_lens=[128, 16, 16],
)


TINY_PIXART = dict(
    num_attention_heads=2,
    attention_head_dim=12,
    cross_attention_dim=24,
    caption_channels=16,
    num_layers=2,
)

# scheduler/scheduler_config.json as PixArt was released with it.
PIXART_SCHEDULER = {**PIXART, "_diffusers_version": "0.22.0.dev0", "trained_betas": None}


def word_tokenizer(special, end=None, **more):
    """A tokenizer of transformers that knows a few words and writes `end` after them; special and
    more: its special tokens."""
    tokenizers, transformers = (
        pytest.importorskip("tokenizers"),
        pytest.importorskip("transformers"),
    )
    words = {word: i for i, word in enumerate([*special, "a", "cat", "dog", "runs", "&", "fast"])}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if end:
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, words[end])]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", unk_token="<unk>", **more
    )


def save_tiny_teacher(folder):
    torch.manual_seed(0)
    net = perturbed(DiT(size=(4, 4), patch=(2, 2), channels=1, dim=32, depth=2, num_classes=3))
    save_network(net, network_config(net), str(folder))
    return str(folder)


def flags_for(teacher, out, *more):
    """Six updates of dmd.py in two steps, of a tiny teacher into this folder."""
    short = """--max_train_steps 6 --train_batch_size 4 --teacher_steps 0 --student_steps 2
        --checkpointing_steps 4 --lr_decay_share 0"""
    return [*short.split(), "--teacher", teacher, "--output_dir", str(out), *more]


def save_tiny_vp_teacher(root):
    """The same network with a scheduler that makes its output eps under VP."""
    (root / "scheduler").mkdir(parents=True)
    save_json(
        {
            "_class_name": "DDIMScheduler",
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": "epsilon",
        },
        str(root / "scheduler" / "scheduler_config.json"),
    )
    return save_tiny_teacher(root / "transformer")


def save_tiny_wan(root, width=16, boundary=None):
    """A pipeline root as diffusers writes it, with a scheduler of shift 3, and a prompts file. With
    a boundary it has two networks."""
    names = ["transformer"] if boundary is None else ["transformer", "transformer_2"]
    for seed, name in enumerate(names):
        torch.manual_seed(0)
        net = perturbed(WanTransformer3DModel(**TINY_WAN), seed)
        save_network(
            net,
            {"_class_name": "WanTransformer3DModel", "_diffusers_version": "0.35.0", **net.config},
            str(root / name),
        )
    (root / "scheduler").mkdir()
    save_json(
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        str(root / "scheduler" / "scheduler_config.json"),
    )
    save_json(
        {
            "_class_name": "WanPipeline",
            **({} if boundary is None else {"boundary_ratio": boundary}),
            **{name: ["diffusers", "WanTransformer3DModel"] for name in names},
        },
        str(root / "model_index.json"),
    )
    g = torch.Generator().manual_seed(1)
    prompts = root / "prompts.safetensors"
    save_file(
        {
            "cond.text": torch.randn(5, 6, width, generator=g),
            "uncond.text": torch.randn(1, 6, width, generator=g),
        },
        str(prompts),
    )
    return [
        "--teacher",
        str(root),
        "--prompts",
        str(prompts),
        "--sample_shape",
        "4",
        "2",
        "4",
        "6",
        "--teacher_steps",
        "2",
        "--preview_samples",
        "2",
        "--student_steps",
        "2",
        "--learning_rate",
        "1e-4",
        "--learning_rate_fake",
        "2e-4",
    ]


def save_tiny_image_root(root, net, class_name, pipeline, scheduler, prompts):
    """A pipeline root of an image network as diffusers writes it, and a prompts file -> flags of a
    run."""
    save_network(
        net,
        {"_class_name": class_name, "_diffusers_version": "0.36.0", **net.config},
        str(root / "transformer"),
    )
    (root / "scheduler").mkdir()
    save_json(scheduler, str(root / "scheduler" / "scheduler_config.json"))
    save_json(
        {"_class_name": pipeline, "transformer": ["diffusers", class_name]},
        str(root / "model_index.json"),
    )
    save_file(prompts, str(root / "prompts.safetensors"))
    return [
        "--teacher",
        str(root),
        "--prompts",
        str(root / "prompts.safetensors"),
        "--sample_shape",
        "4",
        "4",
        "6",
        "--teacher_steps",
        "2",
        "--preview_samples",
        "2",
        "--student_steps",
        "2",
        "--learning_rate",
        "1e-4",
        "--learning_rate_fake",
        "2e-4",
    ]


def save_tiny_z_image(root):
    """With a scheduler of shift 3, and prompts that fill one or two times 32 tokens."""
    torch.manual_seed(0)
    net = perturbed(ZImageTransformer2DModel(**TINY_Z_IMAGE))
    mask = (
        torch.arange(36) < torch.tensor([4, 36, 32, 33, 7, 3])[:, None]
    )  # the last is the unconditional one's
    text = torch.randn(6, 36, 16, generator=torch.Generator().manual_seed(1)) * mask[..., None]
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    return save_tiny_image_root(
        root,
        net,
        "ZImageTransformer2DModel",
        "ZImagePipeline",
        scheduler,
        {
            "cond.text": text[:5],
            "cond.text_mask": mask[:5],
            "uncond.text": text[5:],
            "uncond.text_mask": mask[5:],
        },
    )


def save_tiny_pixart(root, variant, class_name="PixArtTransformer2DModel"):
    """variant 512 or 1024, which takes the image's size; with the scheduler that PixArt was
    released with."""
    torch.manual_seed(0)
    net = perturbed(PixArtTransformer2DModel(**TINY_PIXART, sample_size=variant // 8))
    mask = (
        torch.arange(9) < torch.tensor([4, 9, 1, 6, 7, 1])[:, None]
    )  # the last is the unconditional one's
    text = torch.randn(6, 9, 16, generator=torch.Generator().manual_seed(1))
    return save_tiny_image_root(
        root,
        net,
        class_name,
        "PixArtAlphaPipeline",
        PIXART_SCHEDULER,
        {
            "cond.text": text[:5],
            "cond.mask": mask[:5],
            "uncond.text": text[5:],
            "uncond.mask": mask[5:],
        },
    )


def read_log(folder):
    with open(Path(folder) / "log.csv", newline="") as f:
        return list(csv.DictReader(f))


def alone(args=None):
    """What functions ask a Run for, of one process on the CPU."""
    cpu = torch.device("cpu")
    return types.SimpleNamespace(
        args=args,
        main=True,
        mesh=None,
        sequence=None,
        spread_tokens=lambda *nets: None,
        compile_blocks=lambda net: net,
        device=cpu,
        place=lambda net: sharding.place(net, cpu, None),
        copy_of=lambda net, *how: sharding.copy_of(net, cpu, None, *how),
    )


def saved_tensors(folder):
    """All tensors of a checkpoint state/step-NNNNNNN, whole, whatever number of ranks it is of."""
    saved = SavedState(str(folder), load_json(Path(folder) / "state.json")["world_size"])
    found = {}
    for name, (shape, parts) in saved.places.items():
        like = parts[0][1].get_tensor(name)
        found[name] = torch.zeros(shape, dtype=like.dtype)
        saved.fill(name, found[name])
    return found


def weights(folder):
    """Every tensor a run left that must be the same again: student and full training state."""
    last = sorted((Path(folder) / "state").glob("step-*"))[-1]
    found = {f"state {k}": v for k, v in saved_tensors(last).items()}
    for path in (Path(folder) / "student").rglob("*.safetensors"):
        name = str(path.relative_to(folder))
        found |= {f"{name} {k}": v for k, v in load_file(path).items()}
    return found


def without_time(rows):
    """Rows of log.csv without the columns that differ from run to run."""
    return [{k: v for k, v in r.items() if k not in ("seconds", "peak_memory_mb")} for r in rows]


def assert_bit_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def refusal_of(capsys, main, *flags):
    """Run a script's main in this process; -> the one line it printed on stderr before it ended
    with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: main(list(flags)))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def ended(flags, script=dmd):
    """Run a script as from the shell.  -> its exit code"""
    try:
        run_main(lambda: script.main(flags))
    except SystemExit as end:
        return end.code
    return 0


def before_update(monkeypatch, step, do):
    """do(run) is called in this update (from 0), before its end."""
    real = Run.end_step

    def end_step(self, now, *args, **more):
        if now == step:
            do(self)
        return real(self, now, *args, **more)

    monkeypatch.setattr(Run, "end_step", end_step)


# A run that kills itself with SIGKILL at the n-th call of os.fsync or os.replace whose arguments
# contain a text, i.e. in the middle of some save. Arguments: script, function of os, text, n, and
# the flags of the run.
SUICIDAL = """
import importlib, os, signal, sys
import torch
torch.set_num_threads(1)
from models.plumbing.run import run_main
script, name, text, n, flags = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5:]
real = getattr(os, name)
def counted(*args):
    global n
    n -= text in repr(args)
    if n == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
setattr(os, name, counted)
run_main(lambda: importlib.import_module(script).main(flags))
"""


def killed(folder, script, function, text, n, *flags):
    """A run of this script in a process of its own that ends as SUICIDAL says."""
    (folder / "suicidal.py").write_text(SUICIDAL)
    dead = launch(folder / "suicidal.py", [script, function, text, n, *flags])
    assert dead.returncode == -signal.SIGKILL, dead.stderr


# Saves the averaged gradients of the first 24 updates as GRADIENTS.1, .2, ..., and otherwise runs
# the script.
SPYING = """
import os, sys
import torch
from forks import launch
from safetensors.torch import save_file
torch.set_num_threads(1)
import {script}
from models.shards import whole_tensor
from models.plumbing import run
from models.plumbing.run import run_main
real, calls = run.clip, []
def clip(parameters, *args):
    calls.append(0)
    if len(calls) <= 24:
        grads = dict((str(i), whole_tensor(p.grad).clone()) for i, p in enumerate(parameters))
        if os.environ.get("RANK", "0") == "0":
            save_file(grads, os.environ["GRADIENTS"] + "." + str(len(calls)))
    return real(parameters, *args)
run.clip = clip
run_main({script}.main)
"""
