"""tests/bench_peers.py: peers of the same interface take turns with ours, and what is no peer.

The stand-ins below have the names that the peers' own code has, and do one small update each.
"""

import os

import pytest
from helpers import ring_network

from models.files import UserError
from models.plumbing import teachers
from tests import bench, bench_peers

RING = "--teacher ring --train_batch_size 8".split()

OPTIONAL = {  # libraries, as far as the stand-ins ask for them
    name: "" for name in ("accelerate.py", "peft.py", "transformers.py", "diffusers/__init__.py")
} | {"diffusers/optimization.py": ""}

DMD2 = OPTIONAL | {
    "main/__init__.py": "",
    "main/edm/__init__.py": "",
    "main/edm/edm_guidance.py": "import dnnlib, pickle\n",
    "dnnlib.py": "",
    "main/edm/train_edm.py": """
import argparse, wandb, torch
from main.edm import edm_guidance
from main.edm.edm_network import get_edm_network
LMDBDataset = None

def parse_args():
    p = argparse.ArgumentParser()
    p.add_argument("--batch_size", type=int)
    return p.parse_known_args()[0]

class Trainer:
    def __init__(self, args):
        run = wandb.init(dir=".")
        assert run.dir and len(LMDBDataset("path")) >= args.batch_size
        self.real = edm_guidance.pickle.load(None)["ema"]
        self.net, self.args = edm_guidance.get_edm_network(args), args

    def train_one_step(self):
        n, every = self.args.batch_size, torch.ones(self.args.batch_size)
        x = 80 * torch.randn(n, 3, 16, 16)
        D = self.net(x, 80 * every, torch.eye(10)[torch.arange(n)])
        assert D.shape == x.shape and D.std() < 2  # it removes the noise
        if self.step % 2 == 0:
            self.real(x, 80 * every, torch.eye(10)[torch.arange(n)])
""",
}

FASTGEN = OPTIONAL | {
    "omegaconf.py": """
class DictConfig(dict):
    def __init__(self, content, flags=None):
        super().__init__(content)
""",
    "loguru.py": "class logger:\n    remove = staticmethod(lambda: None)\n",
    "fastgen/__init__.py": "",
    "fastgen/configs/__init__.py": "",
    "fastgen/configs/methods/__init__.py": "",
    "fastgen/configs/callbacks.py": """
from types import SimpleNamespace
import wandb
GradClip_CALLBACK, EMA_CALLBACK = dict(grad_clip=SimpleNamespace(model_key="net")), dict(ema=1)
""",
    "fastgen/configs/methods/config_dmd2.py": """
from types import SimpleNamespace as S
from fastgen.configs.net import EDM
from fastgen.configs.data import loader
def create_config():
    return S(trainer=S(), model=S(sample_t_cfg=S()))
""",
    "fastgen/utils/__init__.py": """
def LazyCall(target):
    return lambda **kwargs: (lambda: target(**kwargs))
""",
    "fastgen/networks/__init__.py": "",
    "fastgen/networks/network.py": """
import torch
class Schedule:
    def convert_model_output(self, x, v, t, src_pred_type, target_pred_type):
        assert (src_pred_type, target_pred_type) == ("flow", "x0")
        return x - t[:, None, None, None] * v
class FastGenNetwork(torch.nn.Module):
    def __init__(self, net_pred_type, schedule_type):
        super().__init__()
        self.noise_scheduler = Schedule()
""",
    "fastgen/methods/__init__.py": """
class DMD2Model:
    def __init__(self, config):
        self.net = config.net()
""",
    "fastgen/trainer.py": """
import torch
class Trainer:
    def __init__(self, config):
        self.config = config
        assert [c.model_key for c in config.trainer.callbacks.values() if c != 1] == [
            "net", "fake_score"]
    def run(self, model):
        for data in self.config.dataloader_train():
            t = torch.full((len(data["real"]),), 0.5, dtype=torch.float64)
            model.net(data["real"], t, condition=data["condition"], fwd_pred_type="x0")
""",
}

TDM = OPTIONAL | {
    "accelerate.py": "class Accelerator:\n    def log(self, *a, **k):\n        pass\n",
    "train_tdm_demo.py": """
import argparse, torch
from accelerate import Accelerator
from torchvision.utils import save_image
import datasets

def parse_args():
    p = argparse.ArgumentParser()
    p.add_argument("--train_batch_size", type=int)
    p.add_argument("--output_dir")
    return p.parse_args()

def main():
    args, accelerator = parse_args(), Accelerator()
    from transformers import T5EncoderModel, T5Tokenizer
    if True:
        from diffusers import AutoencoderTiny
    from diffusers import Transformer2DModel
    data = torch.load('./cache.pt',  weights_only=False)['data']
    tokenizer, encoder = T5Tokenizer.from_pretrained("a"), T5EncoderModel.from_pretrained("b")
    unet = Transformer2DModel.from_pretrained("c")
    num_workers=8
    for global_step in range(1000):
        n = args.train_batch_size
        tokens = tokenizer([data[i][1] for i in range(n)], max_length=120).to("cpu")
        label = encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        assert label.tolist() == list(range(n)) and encoder(tokenizer([""]).input_ids)[0] == 10
        noise = torch.randn([n, 4, 64, 64]).to(torch.float16)
        out = unet(noise, timestep=torch.full((n,), 799), encoder_hidden_states=label)[0]
        assert out.chunk(2, dim=1)[0].shape == noise.shape
        if global_step % 50 == 0:
            save_image(1 / 0)
        accelerator.log({})
""",
}

# flag: the files, the script, the network calls of an update
STAND_INS = {"dmd2": (DMD2, "dmd", 3), "fastgen": (FASTGEN, "dmd", 3), "tdm_demo": (TDM, "tdm", 1)}


def checkout(folder, files):
    """Write these files.  -> the folder, as text"""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return str(folder)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Batches of 2, one round to warm up, and a network of the ring that is fitted to nothing."""
    monkeypatch.setattr(bench_peers, "BATCH", 2)
    monkeypatch.setattr(bench_peers, "WARM", 1)
    monkeypatch.setattr(teachers, "fit_ring_network", lambda teacher, seed: ring_network(seed))


@pytest.fixture
def no_training(monkeypatch):
    """This checkout's own loops do nothing."""
    real = bench_peers.ours

    def idle(pause):
        while True:
            pause()

    def ours(name, flags, folder=None):
        return real(name, flags, folder) if folder else idle

    monkeypatch.setattr(bench_peers, "ours", ours)


@pytest.mark.parametrize("flag", STAND_INS)
def test_a_peer_takes_turns_with_ours(tmp_path, capsys, request, flag):
    """Its own loop does whole updates on the glyphs' DiT, and the table has all three."""
    files, script, calls = STAND_INS[flag]
    if flag != "dmd2":
        request.getfixturevalue("no_training")  # it has been seen with one of them
    folder = checkout(tmp_path, files)
    bench.main([script, f"--{flag}", folder, "--steps", "2", "--", *RING])
    title, head, *rows = capsys.readouterr().out.strip().splitlines()
    assert f"beside {flag}: 2 rounds" in title and head.split()[:3] == ["ms", "calls", "rows"]
    assert [row[:20].strip() for row in rows] == ["ours", "ours, fresh samples", flag]
    assert all("[" in row for row in rows[:2]) and "[" not in rows[2]
    assert [float(word) for word in rows[2].split()[-2:]] == [calls, 2 * calls]


def test_another_checkout_of_this_repository(tmp_path, capsys, no_training):
    """Its modules are its own: models of this one are not seen there, and stay here."""
    files = {
        "models/__init__.py": "",
        "models/plumbing/__init__.py": "",
        "models/plumbing/run.py": "class Run:\n    def end_step(self, step):\n        pass\n",
        "dmd.py": "from models.plumbing.run import Run\n"
        "def main(argv):\n"
        "    assert not hasattr(Run, 'update')\n"
        "    for step in range(100):\n"
        "        Run().end_step(step)\n",
    }
    bench.main(["dmd", "--before", checkout(tmp_path, files), "--steps", "1", "--", *RING])
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("before")


def test_what_is_no_peer_is_refused_in_one_line(tmp_path, no_training):
    folder = str(tmp_path)
    with pytest.raises(UserError, match="it has no main/edm/train_edm.py: give a checkout of gith"):
        bench_peers.beside("dmd2", folder, "dmd", 1, RING)
    with pytest.raises(UserError, match="is compared with tdm.py: python -m tests.bench tdm"):
        bench_peers.beside("tdm_demo", folder, "dmd", 1, RING)
    files = DMD2 | {"main/edm/train_edm.py": "import no_such_library"}
    with pytest.raises(UserError, match="^--dmd2: it needs the module no_such_library: install wh"):
        bench_peers.beside("dmd2", checkout(tmp_path, files), "dmd", 1, RING)
    files = {"train_tdm_demo.py": TDM["train_tdm_demo.py"].replace("4, 64, 64", "4, 32, 32")}
    with pytest.raises(UserError, match="4, 64, 64 is not in its source: check out commit 81b019f"):
        bench_peers.beside("tdm_demo", checkout(tmp_path, TDM | files), "tdm", 1, RING)


def test_a_loop_that_dies_or_fails_is_named():
    with pytest.raises(RuntimeError, match="its process was killed"):
        bench_peers.Loop("x", lambda pause: os._exit(9)).step()
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        bench_peers.Loop("x", lambda pause: 1 / 0).step()


def test_pairs_of_a_round_are_compared():
    """The order is reversed every round; warm rounds are left out; ratios are of one round."""
    turns = []

    class Fake:
        def __init__(self, name, seconds):
            self.name, self.seconds = name, iter(seconds)

        def step(self):
            turns.append(self.name)
            return next(self.seconds), 6, 384

        def end(self):
            turns.append("end")

    a, b = Fake("ours", [99, 1, 8, 3]), Fake("dmd2", [1, 2, 4, 4])
    found = bench_peers.compare([a, b], 3)
    assert turns == ["dmd2", "ours", "ours", "dmd2", "dmd2", "ours", "ours", "dmd2", "end", "end"]
    _, ours, theirs = bench_peers.table(found, "dmd2")
    assert ours.split() == ["ours", "3000.0", "6", "384", "0.750", "[0.500,", "2.000]"]
    assert theirs.split() == ["dmd2", "4000.0", "6", "384"]
    assert bench_peers.spread(list(range(21))) == (10, 2, 18)


def test_share_of_a_product_of_matrices(capsys):
    """2e9 FLOPs a step on average; what was possible in three steps: 4e9, 4e9 and 1e9."""
    stopwatch = bench.Stopwatch()
    stopwatch.spent, stopwatch.rates = [0.1, 0.2, 0.1], [4e10, 2e10, 1e10]

    class Plan:
        flops = staticmethod(lambda: (1.5e9, 0.5e9))

    bench.print_share(stopwatch, Plan)
    text = capsys.readouterr().out
    assert "0.002 TFLOP a step, 0.133 seconds of processor time" in text
    assert "0.67 [0.50, 2.00] of a product of matrices, which reaches 20 GFLOP/s" in text
