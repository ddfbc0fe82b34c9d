"""Damaged and hostile files through every loader: refused in one line, or read; nothing else.

    python -m tests.fuzz --cases 2000            # of every loader; a table, exit code 1 for a fault
    python -m tests.fuzz --loader lora --seed 7 --cases 1

A case is a good file with one to three mutations: bytes flipped, cut, doubled or inserted; entries
of its JSON (also of a safetensors header) left out, or replaced by other kinds, huge numbers, NaN
and names that lead out of the folder. A fault is any error but UserError, a message of more than
2,000 letters, more than 1 GB of further memory, more than 20 seconds, or a file outside the folder
that is opened.
"""

import argparse
import contextlib
import copy
import functools
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from models import files
from models.diffusion import VP
from models.files import UserError, save_json
from models.networks import (
    WEIGHTS,
    load_network,
    load_two_networks,
    lora,
    network_config,
    save_network,
)
from models.networks.dit import DiT
from models.networks.wan import WanTransformer3DModel
from models.plumbing.data import Bank, Prompts, load_data
from models.plumbing.loading import open_pictures
from models.plumbing.run import Log
from models.plumbing.state import (
    SavedState,
    changes_on_resume,
    complete_states,
    find_state,
    flags_to_save,
    read_info,
    save_state,
    unpack,
)
from models.plumbing.teachers import (
    describe_schedule,
    load_teacher,
    merge_lora,
    read_sampler,
    read_scheduler,
)
from models.prompts import PromptWriter

MEMORY, SECONDS = 2**30, 20
NASTY = [None, True, False, -1, 0, 1, 3, 0.5, -0.0, 1e308, 10**9, 10**12, 2**63, 10**40, [], {}, ""]
NASTY += [float("nan"), float("inf"), "x", "x" * 5000, "../outside/x.safetensors", "/etc/passwd"]
NASTY += ["\u0000", "\ud800", "\U0001f600", [[]], [None], [1e308, -1], {"a": {}}, [0] * 1000, "1"]


# ---- mutations -----------------------------------------------------------------------------------


def places(value, path=()):
    """Every place in a JSON value -> paths, tuples of keys."""
    yield path
    inside = value.items() if isinstance(value, dict) else ()
    inside = enumerate(value[:50]) if isinstance(value, list) else inside
    for key, v in inside:
        yield from places(v, (*path, key))


def mutate_json(value, rng):
    """One place of a JSON value is replaced, left out, doubled or renamed.  -> value"""
    value = copy.deepcopy(value)
    path = rng.choice(list(places(value)))
    if not path:
        return rng.choice(NASTY)
    at = functools.reduce(lambda v, key: v[key], path[:-1], value)
    key, how = path[-1], rng.random()
    if how < 0.15:
        del at[key]
    elif how < 0.25 and isinstance(at, dict):
        at[str(key) + rng.choice(["x", ".", "\u0000"])] = at.pop(key)
    elif how < 0.4 and type(at[key]) in (int, float):
        at[key] = at[key] * rng.choice([-1, 2, 1000, 10**9]) + rng.choice([0, 1, 0.5])
    else:
        at[key] = rng.choice(NASTY)
    return value


def mutate_bytes(data, rng):
    """Bytes are flipped, cut off, inserted, doubled or zeroed.  -> bytes"""
    data, how = bytearray(data), rng.randrange(6)
    at = rng.randrange(len(data) + 1)
    if rng.random() < 0.5:  # most of what matters is at the beginning
        at = min(at, rng.randrange(400))
    if how == 0:
        return bytes(data[:at])
    if how == 1 and data:
        for _ in range(rng.choice([1, 1, 8])):
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
            at = rng.randrange(len(data))
    elif how == 2:
        data[at:at] = rng.randbytes(rng.choice([1, 8, 1000]))
    elif how == 3:
        data[at : at + 64] = b"\0" * 64
    elif how == 4:
        data[at:at] = data[at : at + rng.choice([1, 100])]
    else:
        data[:8] = rng.choice([2**63, 2**40, 10**8 + 1, 0]).to_bytes(8, "little")
    return bytes(data)


def mutate(path, rng):
    """One file, in a way that suits its kind."""
    data = path.read_bytes()
    try:
        if rng.random() < 0.25:
            data = mutate_bytes(data, rng)
        elif path.suffix == ".json" and rng.random() < 0.05:
            data = rng.choice(
                [b"[" * 100_000, b"\xef\xbb\xbf" + data, b"\xff\xfe{}", b"", b"9" * 9999]
            )
        elif path.suffix == ".json":
            data = json.dumps(mutate_json(json.loads(data), rng)).encode()
        elif path.suffix == ".safetensors":
            n = int.from_bytes(data[:8], "little")
            head = json.dumps(mutate_json(json.loads(data[8 : 8 + n]), rng)).encode()
            data = len(head).to_bytes(8, "little") + head + data[8 + n :]
        else:
            data = mutate_bytes(data, rng)
    except (ValueError, RecursionError):  # of a file that an earlier mutation has broken
        data = mutate_bytes(data, rng)
    path.write_bytes(data)


# ---- the loaders, each with good files to begin with ---------------------------------------------


def tiny_dit():
    torch.manual_seed(0)
    return DiT(size=(4, 4), patch=(2, 2), channels=1, dim=32, depth=1, num_classes=3)


def tiny_wan():
    sizes = dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4)
    return WanTransformer3DModel(**sizes, text_dim=16, freq_dim=32, ffn_dim=48, num_layers=1)


class Network:
    """A component folder: config.json and weights."""

    def make(self, root):
        save_network(tiny_dit(), network_config(tiny_dit()), str(root))

    def load(self, root):
        load_network(str(root))


class Index(Network):
    """The same in shards."""

    def make(self, root):
        save_network(tiny_wan(), network_config(tiny_wan()), str(root), shard_bytes=20000)


class TwoNetworks:
    """A pipeline root with model_index.json, scheduler/ and two networks."""

    def make(self, root):
        for name in ("transformer", "transformer_2"):
            save_network(tiny_wan(), network_config(tiny_wan()), str(root / name))
        save_json({"_class_name": "WanPipeline", "boundary_ratio": 0.9}, root / "model_index.json")
        (root / "scheduler").mkdir()
        flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
        save_json(flow, root / "scheduler" / "scheduler_config.json")

    def load(self, root):
        if (root / "transformer" / WEIGHTS).exists():
            load_two_networks(str(root))
        load_teacher(str(root), two_networks=True)


class Scheduler:
    """scheduler_config.json of both kinds."""

    def make(self, root):
        betas = dict(beta_schedule="scaled_linear", beta_start=1e-4, beta_end=0.02)
        more = dict(num_train_timesteps=1000, rescale_betas_zero_snr=False, trained_betas=None)
        vp = {"_class_name": "DDIMScheduler", "prediction_type": "epsilon", **betas, **more}
        flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "base_shift": 0.5}
        flow |= {"use_dynamic_shifting": True, "max_shift": 1.2, "time_shift_type": "exponential"}
        for name, config in (("vp", vp), ("flow", flow)):
            (root / name).mkdir()
            save_json(config, root / name / "scheduler_config.json")

    def load(self, root):
        for name in ("vp", "flow"):
            read_scheduler(str(root / name), 64)


class Sampler:
    """sampler.json of a student."""

    def make(self, root):
        more = {"experts": [{"weights": "expert1", "steps": 2, "network": None}], "lora_rank": 2}
        more |= {"base": "x", "seed": 0, "sample_shape": [1, 4, 4], "rule": "euler"}
        schedule = describe_schedule(VP("linear", 1e-4, 0.02))
        s = {"method": "tdm", "prediction": "eps", "schedule": schedule, "times": [1.0, 0.5]}
        s |= {"grids": {"2": [1.0, 0.5, 0.0]}, "steps_cond": False, "guidance_scale": 1.0}
        save_json({**s, "timestep_shift": 1.0, **more}, root / "sampler.json")

    def load(self, root):
        read_sampler(str(root))


class State:
    """A checkpoint: state.json and its tensors."""

    def make(self, root):
        self.args = argparse.Namespace(
            max_train_steps=9, train_batch_size=4, gradient_accumulation_steps=1, sequence_ranks=1
        )
        self.net = tiny_dit()
        info = {"flags": flags_to_save(self.args), "world_size": 1, "seconds": 1.0, "changes": []}
        save_state(str(root), 3, {"student": self.net}, info)

    def load(self, root):
        folder = find_state(str(root), "latest")
        if folder is None:
            return
        complete_states(str(root))
        info = read_info(folder)
        changes_on_resume(info, self.args, 1)
        unpack(self.net, "student", SavedState(folder, info.get("world_size", 1)))


class PromptFiles:
    """Prompts of one file with masks, and a set of shards without padding."""

    def make(self, root):
        text, mask = torch.randn(5, 6, 8), torch.arange(6) < torch.tensor([[3], [6], [1], [2], [4]])
        tensors = {"cond.text": text, "cond.mask": mask}
        tensors |= {"uncond.text": text[:1].clone(), "uncond.mask": mask[:1].clone()}
        save_file(tensors, root / "p.safetensors")
        lengths, about = torch.tensor([3, 6, 1]), dict(padded_to="6", mask="mask", fingerprint="1")
        path = str(root / "s.safetensors")
        with PromptWriter(path, "text", lengths, text[0, :2], about, 200) as writer:
            for n in lengths:
                writer.write(text[1, :n])

    def load(self, root):
        for name in ("p", "s"):
            prompts = Prompts(str(root / f"{name}.safetensors"), ("text", "mask"), {"text": 8})
            prompts.fingerprint()
            prompts.rows(torch.tensor([0, prompts.n - 1]), "cpu")
            prompts.unconditional(2, "cpu")


class Images:
    """A folder of pictures in classes."""

    def make(self, root):
        picture = Image.effect_noise((24, 16), 80)
        for kind in ("png", "jpg", "gif", "webp", "bmp", "tif"):
            (root / "a").mkdir(exist_ok=True)
            picture.convert("RGB").save(root / "a" / f"x.{kind}")

    def load(self, root):
        said = io.StringIO()  # the files that it skips
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            x = open_pictures(str(root), 8, workers=1)[0]
            x[torch.arange(len(x))]


class Described(Images):
    """The same with dataset.json."""

    def make(self, root):
        super().make(root)
        save_json({"labels": [["a/x.png", 0], ["a/x.gif", 1]]}, root / "dataset.json")
        for path in (root / "a").glob("x.[jwbt]*"):
            path.unlink()


class Data:
    """FILE.safetensors, of images and of points."""

    def make(self, root):
        x0 = torch.randn(6, 1, 4, 4)
        save_file({"x0": x0, "cond.label": torch.arange(6) % 3}, root / "d.safetensors")
        points = {"coords": torch.zeros(5, 3, dtype=torch.int32), "feats": torch.randn(5, 2)}
        save_file({**points, "offsets": torch.tensor([0, 2, 5])}, root / "s.safetensors")

    def load(self, root):
        for name, sparse in (("d", False), ("s", True)):
            x0, cond, _ = load_data(str(root / f"{name}.safetensors"), sparse=sparse)
            x0[torch.tensor([0, len(x0) - 1])]


class Lora:
    """A LoRA file, and that of a folder of peft's."""

    def make(self, root):
        net = tiny_dit()
        lora.add(net, "a", 2, 4.0)
        settings = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 4})
        lora.save(net, "a", str(root / "l.safetensors"), {"lora_adapter_metadata": settings})
        (root / "peft").mkdir()
        lora.save_peft(net, "a", str(root / "peft"))

    def load(self, root):
        for name in ("l.safetensors", "peft"):
            merge_lora(tiny_dit(), str(root / name), "--teacher_lora")


class BankFiles:
    """A bank of trajectories."""

    def make(self, root):
        bank = Bank(str(root), {"seed": 0}, 4, 2, create=True)
        for part in range(2):
            index, x = torch.arange(2), torch.randn(2, 3, 1, 4)
            bank.write(part, {"index": index, "x": x, "v": x})

    def load(self, root):
        bank = Bank(str(root), {"seed": 0}, 4, 2, create=False)
        if not bank.missing():
            bank.open().rows(torch.tensor([0, 3]), torch.tensor([0, 2]))


class LogFile:
    """log.csv of a run that is resumed."""

    def make(self, root):
        log = Log(str(root))
        for step in range(1, 6):
            log.write({"step": step, "loss": 0.5, "seconds": 1.0})

    def load(self, root):
        Log(str(root), 3).write({"step": 4, "loss": 0.5, "other": 1})


LOADERS = dict(
    network=Network, index=Index, two_networks=TwoNetworks, scheduler=Scheduler, sampler=Sampler,
    state=State, prompts=PromptFiles, images=Images, dataset_json=Described, data=Data, lora=Lora,
    bank=BankFiles, log=LogFile,
)  # fmt: skip


# ---- a case --------------------------------------------------------------------------------------


class Outside(Exception):
    """A file outside the case's folder was opened."""


@contextlib.contextmanager
def watch(root):
    """Files that name others: nothing in root/outside or /etc may be opened meanwhile."""
    outside, real, on = (str(root / "outside"), "/etc/"), files.safe_open, [True]

    def opened(event, args):
        if event == "open" and on and isinstance(args[0], str):
            if os.path.realpath(args[0]).startswith(outside):
                raise Outside(args[0])

    def safe_open(path, *args, **more):
        opened("open", (str(path),))
        return real(path, *args, **more)

    sys.addaudithook(opened)  # for good
    files.safe_open = safe_open
    try:
        yield
    finally:
        files.safe_open = real
        on.clear()


def limit_memory(more):
    """At most so many bytes beyond what the process has now."""
    try:
        import resource
    except ModuleNotFoundError:
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.isdir("/proc") else 0
    limit = pages * os.sysconf("SC_PAGE_SIZE") + more if pages else resource.RLIM_INFINITY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def too_long(*args):
    raise TimeoutError(f"more than {SECONDS} seconds")


def one_case(loader, good, root, rng):
    """-> "read", "refused", or the fault as text."""
    shutil.rmtree(root / "case", ignore_errors=True)
    shutil.copytree(good, root / "case")
    every = sorted(p for p in (root / "case").rglob("*") if p.is_file())
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        mutate(rng.choice(every), rng)
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        loader.load(root / "case")
        return "read"
    except UserError as error:
        return "refused" if len(str(error)) < 2000 else f"a long message: {str(error)[:300]}"
    except Exception:
        return traceback.format_exc()
    finally:
        signal.alarm(0)


def fuzz(name, cases, seed=0, show=print):
    """-> {"read": n, "refused": n, "faults": [(seed of the case, text)], "worst": seconds}"""
    found, loader = {"read": 0, "refused": 0, "faults": [], "worst": 0.0}, LOADERS[name]()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(os.path.realpath(folder))
        for made in ("good", "outside"):
            (root / made).mkdir()
            torch.manual_seed(0)
            loader.make(root / made)
        save_file({"x": torch.zeros(1)}, root / "outside" / "x.safetensors")
        with watch(root):
            loader.load(root / "good")  # which has to be good
            for case in range(seed, seed + cases):
                began = time.perf_counter()
                result = one_case(loader, root / "good", root, random.Random(f"{name} {case}"))
                found["worst"] = max(found["worst"], time.perf_counter() - began)
                if result in found:
                    found[result] += 1
                else:
                    found["faults"].append((case, result))
                    show(f"--loader {name} --seed {case} --cases 1\n{result}")
    return found


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--cases", type=int, default=2000, help="of each loader")
    p.add_argument("--seed", type=int, default=0, help="number of the first case")
    p.add_argument("--loader", choices=LOADERS, default=None, help="this one alone")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    limit_memory(MEMORY)
    faults = 0
    print("loader         cases   read  refused  faults  seconds  worst case")
    for name in [args.loader] if args.loader else LOADERS:
        began = time.time()
        r = fuzz(name, args.cases, args.seed)
        faults += len(r["faults"])
        counts = f"{args.cases:5}  {r['read']:5}  {r['refused']:7}  {len(r['faults']):6}"
        print(f"{name:13}  {counts}  {time.time() - began:7.1f}  {r['worst']:.2f} s", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
