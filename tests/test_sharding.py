"""Networks shared out over gloo ranks: one process's run, resumed on any number, saved by all.

This file is also what the ranks run: torchrun ... tests/test_sharding.py trainings FOLDER, where
FOLDER/cases.json has the flags of every run. One start of the ranks makes them all.
"""

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forks import launch
from helpers import ENV, fill, read_log, refusal_of, save_tiny_teacher, weights
from safetensors.torch import save_file

from models import networks
from models.files import TensorWriter, UserError
from models.networks import load_network, lora, network_config, save_network, to_dtype
from models.networks.dit import DiT
from models.networks.dit_imagenet import DiTTransformer2DModel
from models.networks.wan import WanTransformer3DModel
from models.plumbing.run import Run
from models.plumbing.sharding import blocks_of, clip, copy_of, make_mesh, move_average, place
from models.plumbing.state import save_state
from models.shards import blank_copy, own_rows, whole_tensor

BATCH = 12  # of all ranks together
SHORT = "--max_train_steps 10 --checkpointing_steps 5 --seed 1 --preview_every 0 --teacher_steps 1 "
SHORT += "--preview_samples 2 --ema_decay 0.9 --lr_decay_share 0.5 --lr_warmup_steps 2 "
GAN = "--gan_weight 0.1 --gan_weight_d 0.1 --data {data} "
ADAPTERS = "--lora_rank 2 --fake_lora_rank 2 "
CASES = {  # {name: (script, flags)}
    "dmd": ("dmd", GAN + "--student_steps 2 --fake_update_ratio 2 --guidance_scale 2"),
    "dmd checkpointed": ("dmd", "--gradient_checkpointing --gradient_accumulation_steps 2"),
    "dmd adapters": ("dmd", ADAPTERS + GAN + "--gradient_checkpointing"),
    "decoupled_dmd": ("decoupled_dmd", GAN + "--student_steps 2"),
    "tdm": ("tdm", "--student_steps 1 4 --guidance_scale 2"),
    "phased_dmd": ("phased_dmd", "--student_steps 4 --phases 2"),
    "phased_dmd adapters": ("phased_dmd", ADAPTERS + "--student_steps 4 --phases 2"),
    "linvideo": ("linvideo", "--objective adm --bank_size 16 --bank_batch 4 --sampling_steps 4"),
    "linvideo critic": ("linvideo", "--bank_size 16 --objective adm_critic --sampling_steps 4"),
    "linvideo policy": (
        "linvideo",
        "--objective adm --bank_size 16 --state policy --own_trajectories 4 --fresh 2 "
        "--fresh_every 2 --sampling_steps 4 --seed 2",  # trajectories are rounded to half precision
    ),
    "linvideo adapters": ("linvideo", "--lora_rank 2 --bank_size 16 --sampling_steps 4"),
    "mdt_dist": ("mdt_dist", "--data {data} --derivative jvp"),
    "latent_fm": ("latent_fm", "--data {data} --optimizer adamw --gradient_accumulation_steps 2"),
    "latent_fm muon": ("latent_fm", "--data {data} --optimizer muon"),
}
# by default without these, each of which others come near to
LONG = ["dmd checkpointed", "phased_dmd", "linvideo critic", "latent_fm"]
HYBRID = {(4, "tdm"): ("--shard_ranks", "2")}  # shared out in pairs, which are alike
ON_MORE = {3: ["dmd", "latent_fm muon"], 4: ["tdm", "linvideo adapters"]}
OFF = ("--lr_decay_share", "--teacher_steps", "--preview_samples", "--ema_decay")


def flags_of(name, folder, out, ranks, *more):
    """The command line of a case. folder: has teacher/ and data.safetensors."""
    script, own = CASES[name]
    flags = (SHORT + own.format(data=folder / "data.safetensors")).split()
    parts = int(flags[flags.index("--gradient_accumulation_steps") + 1]) if "accum" in own else 1
    if script == "latent_fm":
        for flag in OFF:
            at = flags.index(flag)
            del flags[at : at + 2]
    else:
        flags += ["--teacher", str(folder / "teacher")]
    flags += ["--output_dir", str(out), "--train_batch_size", str(BATCH // ranks // parts)]
    return script, [*flags, *more]


def start_ranks(ranks, what, folder, *more):
    """This file on so many ranks.  -> the finished process"""
    return launch(__file__, [what, folder, *more], ranks, timeout=900)


def trainings(folder, file="cases.json"):
    """On every rank: the runs of FOLDER/cases.json, [[script, flags], ...].

    AdamW divides by |g| + 1e-3 here: with 1e-8 a gradient that is zero up to rounding moves its
    weight as far as any other, and no two summation orders would agree.
    """
    torch.optim.AdamW = functools.partial(torch.optim.AdamW, eps=1e-3)
    for name, flags in json.loads((Path(folder) / file).read_text()):
        script = importlib.import_module(name)
        if name == "latent_fm":
            script.finish = lambda *a, **k: None
        script.main(flags)


@pytest.fixture(scope="module")
def names(request):
    """The cases of this session."""
    left_out = [] if request.config.getoption("--long") else LONG
    return [name for name in CASES if name not in left_out]


@pytest.fixture(scope="module")
def work(tmp_path_factory, names):
    """A folder with a tiny teacher, data, and the runs of one process in one/NAME."""
    folder = tmp_path_factory.mktemp("sharding")
    net, _ = load_network(save_tiny_teacher(folder / "teacher"))
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(24, *net.latent_shape, generator=g).clamp(-1, 1)
    label = torch.arange(24) % net.num_classes
    save_file({"x0": x0, "cond.label": label}, folder / "data.safetensors")
    cases = [flags_of(name, folder, folder / "one" / name, 1) for name in names]
    save_json_list(cases, folder / "one.json")
    done = launch(__file__, ["trainings", folder, "one.json"], timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def save_json_list(cases, path):
    path.write_text(json.dumps([[script, flags] for script, flags in cases]))


@pytest.fixture(scope="module")
def on_ranks(work, names):
    """A function: on that many ranks all runs of RUNS/NAME have been made, and on 3 and 4 the
    fifth update's state of two ranks has been gone on with (RUNS/resumed dmd)."""
    made = set()

    def make(ranks):
        if ranks not in made:
            out = work / str(ranks)
            cases = [
                flags_of(name, work, out / name, ranks, *HYBRID.get((ranks, name), ()))
                for name in ON_MORE.get(ranks, names)
            ]
            if ranks > 2:
                state = ["--resume_from_checkpoint", str(fifth(make(2), "dmd"))]
                cases.append(flags_of("dmd", work, out / "resumed dmd", ranks, *state))
            save_json_list(cases, work / "cases.json")
            done = start_ranks(ranks, "trainings", work)
            assert done.returncode == 0, done.stderr[-3000:]
            made.add(ranks)
        return work / str(ranks)

    return make


def fifth(runs, name):
    """The state of a run after its fifth update."""
    return runs / name / "state" / "step-0000005"


def difference(a, b):
    """The largest over all tensors of the largest difference, where the keys are the same."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


RUNS = [(2, name) for name in CASES if name not in LONG]
ONLY_LONG = [(2, name) for name in LONG] + [(n, name) for n in (3, 4) for name in ON_MORE[n]]
RUNS += [pytest.param(*run, marks=pytest.mark.long) for run in ONLY_LONG]


@pytest.mark.parametrize("ranks, name", RUNS)
def test_ranks_are_one_process(work, on_ranks, ranks, name):
    """Ten updates of AdamW or Muon in float32 with the same samples: all that is saved."""
    one, several = weights(work / "one" / name), weights(on_ranks(ranks) / name)
    assert difference(one, several) < 1e-5
    rows = [read_log(folder / name) for folder in (work / "one", on_ranks(ranks))]
    for a, b in zip(*rows, strict=True):
        for key in a:
            if key.startswith(("loss", "norm")):  # g_* are norms of what one rank has
                assert float(b[key]) == pytest.approx(float(a[key]), rel=1e-4, abs=1e-6), key


# ---- resumed on other numbers of ranks -----------------------------------------------------------


@pytest.mark.parametrize("ranks", [3, 4])
@pytest.mark.long
def test_a_state_of_two_ranks_goes_on_on_more(on_ranks, ranks):
    whole, again = weights(on_ranks(2) / "dmd"), weights(on_ranks(ranks) / "resumed dmd")
    assert difference(whole, again) < 1e-6


def test_a_state_of_two_ranks_goes_on_on_one(work, on_ranks, tmp_path, monkeypatch):
    """In this process."""
    state = ["--resume_from_checkpoint", str(fifth(on_ranks(2), "dmd"))]
    script, flags = flags_of("dmd", work, tmp_path / "run", 1, *state)
    monkeypatch.setattr(torch.optim, "AdamW", functools.partial(torch.optim.AdamW, eps=1e-3))
    importlib.import_module(script).main(flags)
    assert difference(weights(work / "2" / "dmd"), weights(tmp_path / "run")) < 1e-6


def test_two_ranks_go_on_bit_for_bit_also_after_a_kill(work, on_ranks, tmp_path):
    """N + N updates are 2 N, with Adam, adapters and Muon. Rank 1 of a further run dies by SIGKILL
    in the middle of writing its part of the second checkpoint; the first is intact."""
    whole, killed = on_ranks(2), tmp_path / "killed"
    save_json_list([flags_of("dmd", work, killed, 2)], work / "killed.json")
    done = start_ranks(2, "dies", work, "killed.json")
    assert done.returncode != 0
    assert [p.name for p in (killed / "state").glob("step-*")] == ["step-0000005"]
    latest = ["--resume_from_checkpoint", "latest"]
    cases, names = (
        [flags_of("dmd", work, killed, 2, *latest)],
        ["linvideo adapters", "latent_fm muon"],
    )
    for name in names:
        state = ["--resume_from_checkpoint", str(fifth(whole, name))]
        cases.append(flags_of(name, work, tmp_path / name, 2, *state))
    save_json_list(cases, work / "resumed.json")
    done = start_ranks(2, "trainings", work, "resumed.json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert difference(weights(whole / "dmd"), weights(killed)) == 0
    assert not list(killed.rglob("*.tmp-*"))
    for name in names:
        assert difference(weights(whole / name), weights(tmp_path / name)) == 0


def dies(folder, file):
    """On every rank: `trainings`, in which rank 1 kills itself as it finishes its second part."""
    real, seen = os.replace, []

    def replace(a, b):
        seen.extend([0] if "state-00002-of-00002" in str(b) else [])
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(a, b)

    os.replace = replace
    trainings(folder, file)


def test_a_broken_part_of_a_state_is_one_line(work, on_ranks, tmp_path, capsys):
    """Missing, truncated, of another network; the message names the file, and nothing is made."""
    state = fifth(on_ranks(2), "dmd")
    for name, breaks, says in (
        ("missing", lambda path: path.unlink(), "does not exist"),
        ("cut", lambda path: path.write_bytes(path.read_bytes()[:-100]), "is truncated"),
        ("other", lambda path: save_file({"student.x": torch.zeros(3)}, path), "student"),
    ):
        broken = tmp_path / name
        broken.mkdir()
        for path in state.iterdir():
            (broken / path.name).write_bytes(path.read_bytes())
        breaks(broken / "state-00002-of-00002.safetensors")
        resume = ["--resume_from_checkpoint", str(broken)]
        script, flags = flags_of("dmd", work, tmp_path / "out", 1, *resume)
        assert says in refusal_of(capsys, importlib.import_module(script).main, *flags)
        assert not (tmp_path / "out").exists()


# ---- what a rank holds, and what acts on all of it -----------------------------------------------


def middle_dit():
    """0.9 million parameters in blocks of 0.2 million."""
    return DiT(size=(8, 8), patch=(2, 2), channels=3, dim=128, depth=4, num_classes=4)


def parts(folder):
    """On every rank: the checks of one rank's part, which write what they measured."""
    run = Run(run_flags(), "parts")
    check_clip_and_average(run)
    check_copies(run, Path(folder))
    check_host_memory(run, Path(folder))
    check_bfloat16(run)
    net = run.place(middle_dit())
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    x, t = torch.randn(2, *net.latent_shape), torch.rand(2)
    net(x, t).square().mean().backward()
    optimizer.step()
    bytes_of = {
        "parameters": [own_rows(p) for p in net.parameters()],
        "gradients": [own_rows(p.grad) for p in net.parameters() if p.grad is not None],
        "moments": [own_rows(m) for s in optimizer.state.values() for m in s.values()],
    }
    found = {k: sum(x.numel() * x.itemsize for x in v) for k, v in bytes_of.items()}
    (Path(folder) / f"bytes-{run.rank}-of-{run.world_size}.json").write_text(json.dumps(found))


def run_flags(**more):
    """What a Run needs of flags."""
    flags = dict(train_batch_size=1, gradient_accumulation_steps=1, shard_ranks=None, ema_decay=0.9)
    flags |= dict(sequence_ranks=1)
    flags |= dict(output_dir="x", max_grad_norm=1.0, mixed_precision="no", **more)
    return type("Flags", (), flags)()


def check_clip_and_average(run):
    """Clipping takes the norm of all rows of all ranks, an optimiser's rate and an average reach
    all rows: the same as of one whole network."""
    torch.manual_seed(0)
    whole, net = middle_dit(), run.place(fill(middle_dit()))
    fill(whole)
    extra, extra_whole = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))  # as adapters are
    ema, ema_whole = run.copy_of(net), blank_and_back(whole)
    x = torch.randn(4, *whole.latent_shape, generator=torch.Generator().manual_seed(1))
    for of, more in ((net, extra), (whole, extra_whole)):
        loss = of(x, torch.full((4,), 0.5)).square().mean() * 100 + (more * torch.arange(5)).sum()
        loss.backward()
    ours = [p for p in [*net.parameters(), extra] if p.grad is not None]
    theirs = [p for p in [*whole.parameters(), extra_whole] if p.grad is not None]
    norm, want = clip(ours, 0.5), torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    assert want > 5  # so that it matters
    torch.testing.assert_close(norm, want, rtol=1e-5, atol=0)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(whole_tensor(p.grad), q.grad, rtol=1e-4, atol=1e-7)
    for parameters in (net.parameters(), whole.parameters()):
        torch.optim.AdamW(parameters, lr=0.01, fused=True).step()
    move_average(ema.parameters(), net.parameters(), 0.25)
    move_average(ema_whole.parameters(), whole.parameters(), 0.25)
    for a, b in ((net, whole), (ema, ema_whole)):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(whole_tensor(p), q.data, rtol=1e-4, atol=1e-5)


def blank_and_back(net):
    """A copy of a whole network by the same way, whatever ranks there are."""
    return copy_of(net, torch.device("cpu"), None)


def check_copies(run, folder):
    """A copy of a sharded network, also in another dtype, has its values and memory of its own;
    settings, and modules that were added later, come along, adapters do not. Files of a sharded
    network are those of a whole one, and loading reads the rows of this rank."""
    net = run.place(fill(tiny_wan()))
    want = fill(tiny_wan())
    net.gradient_checkpointing, net.extra = True, torch.nn.Linear(3, 3)
    net.extra.whole = True
    lora.add(net, "a", 2, 4.0)
    new = run.copy_of(net, torch.float64)
    assert new.gradient_checkpointing and not lora.names(new)
    assert torch.equal(new.extra.weight, net.extra.weight.double())
    for (name, p), q in zip(new.named_parameters(), want.parameters()):
        assert p.dtype == torch.float64 and torch.equal(whole_tensor(p), q.double()), name
    del net.extra
    path = str(folder / f"saved-{run.world_size}")
    save_network(net, network_config(net), path, shard_bytes=20_000, write=run.main)
    run.wait_for_all()
    again, _ = load_network(path, place=run.place)
    for (name, p), q in zip(again.named_parameters(), want.named_parameters()):
        assert torch.equal(whole_tensor(p), q[1]), name
    x = torch.randn(2, 4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 3, want.text_dim, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        torch.testing.assert_close(again(x, t, text=text), want(x, t, text=text))


def check_bfloat16(run):
    """A sharded network that is rounded, with an adapter in float32 on it, as the same network of
    one process: outputs, and the adapter's gradient."""
    whole, net, outs = fill(tiny_wan()), run.place(fill(tiny_wan())), []
    x = torch.randn(2, 4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 3, whole.text_dim, generator=torch.Generator().manual_seed(1))
    for of in (whole, net):
        of.requires_grad_(False)
        torch.manual_seed(0)
        lora.add(of, "a", 2, 4.0)
        to_dtype(of, torch.bfloat16)
        adapted = lora.Adapted(of, "a")
        with torch.no_grad():
            for p in adapted.parameters():
                p.fill_(0.1)
        out = adapted(x, torch.tensor([0.3, 0.8]), text=text)
        out.square().mean().backward()
        outs.append([out.detach(), *(p.grad for p in adapted.parameters())])
    dtypes = {name: p.dtype for name, p in lora.base_parameters(net).items()}
    assert set(dtypes.values()) == {torch.bfloat16, torch.float32}
    assert dtypes == {name: p.dtype for name, p in lora.base_parameters(whole).items()}
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(a, b)


def anonymous_bytes():
    """Memory of this process that belongs to no file."""
    with open("/proc/self/status") as f:
        return next(1024 * int(line.split()[1]) for line in f if line.startswith("RssAnon"))


def check_host_memory(run, folder):
    """Loading holds this rank's part and one tensor more, saving one tensor more. 76 MB in tensors
    of at most 7, each of which the allocator returns at once (MALLOC_MMAP_THRESHOLD_)."""
    net = DiT(size=(4, 4), patch=(2, 2), channels=3, dim=544, depth=4, num_classes=4)
    tensors = [p.numel() * p.itemsize for p in net.parameters()]
    path = str(folder / f"large-{run.world_size}")
    save_network(net, network_config(net), path, write=run.main)
    run.wait_for_all()
    del net
    most, slack = [], 1e6

    def watch(module, name):
        real = getattr(module, name)

        def watched(*args):
            out = real(*args)
            most.append(anonymous_bytes())
            return out

        setattr(module, name, watched)
        return lambda: setattr(module, name, real)

    undo, before = watch(networks, "rows_of_file"), anonymous_bytes()
    again, _ = load_network(path, place=run.place)
    assert max(most) - before < sum(tensors) / run.world_size + max(tensors) + slack
    undo()
    most.clear()
    undo, before = watch(TensorWriter, "write"), anonymous_bytes()
    save_network(again, network_config(again), path, write=run.main)
    state = {"net": again}
    info = dict(world_size=run.world_size)
    out = str(folder / f"out-{run.world_size}")
    save_state(out, 1, state, info, run.rank, run.wait_for_all)
    assert max(most) - before < max(tensors) + slack
    undo()


def tiny_wan():
    """Two blocks."""
    from helpers import TINY_WAN

    return WanTransformer3DModel(**TINY_WAN)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_parts_of_a_rank(tmp_path, ranks):
    """Parameters, gradients and moments are 1 / ranks of one process's, up to one block's; and the
    checks above."""
    # by torchrun itself, since memory counts
    command = [sys.executable, *"-m torch.distributed.run --standalone".split()]
    command += ["--nproc-per-node", str(ranks), __file__, "parts", str(tmp_path)]
    env = {**ENV, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]

    def measured(rank, ranks):
        return json.loads((tmp_path / f"bytes-{rank}-of-{ranks}.json").read_text())

    one = 4 * sum(p.numel() for p in middle_dit().parameters())
    block = 4 * sum(p.numel() for p in blocks_of(middle_dit())[0].parameters())
    for rank in range(ranks):
        for name, size in measured(rank, ranks).items():
            copies = 2 if name == "moments" else 1
            assert abs(size - copies * one / ranks) < copies * block / ranks, (name, rank)


# ---- one process ---------------------------------------------------------------------------------


def test_without_ranks_nothing_is_shared_out():
    net, cpu = fill(tiny_wan()), torch.device("cpu")
    assert make_mesh(cpu) is None and place(net, cpu, None) is net
    assert all(type(p) is torch.nn.Parameter for p in net.parameters())


def test_blank_copies_take_no_memory_and_keep_what_is_shared():
    config = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2)
    net = DiTTransformer2DModel(**config, sample_size=8, num_embeds_ada_norm=4)
    new = blank_copy(net)
    assert all(p.is_meta for p in new.parameters())
    assert len(list(new.parameters())) == len(list(net.parameters()))
    shared = [block.norm1.emb for block in new.transformer_blocks]
    assert shared[0] is shared[1] and shared[0] is not net.transformer_blocks[0].norm1.emb
    assert blocks_of(net)[0] is net.transformer_blocks[0].norm1.emb  # gathered apart, once


def test_gradients_are_clipped_to_the_limit():
    """Not by an exhausted generator, and not at all below the limit."""
    p = torch.nn.Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 3.0)
    assert clip([p], 0.5) == 6 and p.grad.norm() == pytest.approx(0.5)
    assert clip([p], 10.0) == pytest.approx(0.5) and p.grad.norm() == pytest.approx(0.5)


def test_mesh_refuses_other_numbers(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    with pytest.raises(UserError, match="does not divide 4 ranks: use one of 1, 2, 4"):
        make_mesh(torch.device("cpu"), 3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](*sys.argv[2:])
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        os._exit(0)
