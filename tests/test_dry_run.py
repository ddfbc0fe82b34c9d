"""--dry_run: what it reckons against what runs take, and refusals of what cannot fit."""

import copy
import importlib
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ENV, ROOT, refusal_of, save_tiny_teacher, save_tiny_wan
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

import decoupled_dmd
import dmd
import linvideo
import mdt_dist
import phased_dmd
from models.diffusion import Diffusion, Flow
from models.networks import NETWORKS
from models.networks.dit import DiT
from models.networks.trellis import SLatFlowModel, SparseStructureFlowModel
from models.networks.wan import WAN_14B, WanTransformer3DModel
from models.plumbing import dry_run, work
from models.plumbing.dry_run import Network, Plan, Turn
from models.plumbing.footprint import (
    Call,
    Meter,
    adapted,
    as_fake,
    measure,
    on_meta,
    trace,
    with_blocks,
)
from tests import scale
from tests.folders import CONFIGS, save_conditions, save_config

GB = 1e9
TINY = dict(num_attention_heads=2, attention_head_dim=24, ffn_dim=96, freq_dim=32, text_dim=16)
TINY |= dict(in_channels=4, out_channels=4)
CALL = Call(2, (4, 2, 4, 6), text=5)


def wan(layers=3, **more):
    return WanTransformer3DModel(**{**TINY, "num_layers": layers, **more})


def dit():
    return DiT(size=(16, 16), patch=(4, 4), channels=3, dim=64, depth=3, num_classes=10)


# ---- one network ---------------------------------------------------------------------------------


def saved_bytes(call, known=()):
    """Bytes that autograd keeps for the backward pass of call(), each storage once.

    known: tensors that are there anyway. The output is not among them unless it is kept too.
    """
    apart, kept = {t.untyped_storage()._cdata for t in known}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in apart:
            kept[storage._cdata] = storage  # which holds it, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storage.nbytes() for storage in kept.values())


def run_of(net, call, gradient=True):
    x, t, cond = call.inputs(net)
    for v in (x, t, *(v for v in cond.values() if v.is_floating_point())):
        v.uniform_()
    return lambda: net(x, t, **cond), [*net.parameters(), *net.buffers(), x, t, *cond.values()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("build, call", [(wan, CALL), (dit, Call(3, (3, 16, 16)))])
def test_saved_activations_are_those_of_a_real_call(build, call, checkpointing):
    """Bytes that autograd keeps, without computing anything, are exactly those of a real call."""
    net = build()
    net.gradient_checkpointing = checkpointing
    want = saved_bytes(*run_of(net, call))
    shapes = copy.deepcopy(on_meta(build))
    with FakeTensorMode():
        as_fake(shapes).gradient_checkpointing = checkpointing
        x, t, cond = call.inputs(shapes)
        known = [*shapes.parameters(), *shapes.buffers(), x, t, *cond.values()]
        got = saved_bytes(lambda: shapes(x, t, **cond), known)
    assert got == want > 10_000
    # what is alive after the call is that, what it returns and what blocks hold without a hook
    cost = measure(on_meta(build), call, checkpointing=checkpointing)
    assert want <= cost.saved <= 1.2 * want


@pytest.mark.parametrize("checkpointing", [False, True])
def test_deep_networks_follow_from_two_and_three_blocks(checkpointing):
    """Six blocks on a straight line are six blocks that ran."""
    net = on_meta(lambda: wan(6))
    cost = measure(net, CALL, checkpointing=checkpointing)
    whole = trace(copy.deepcopy(net), CALL, False, checkpointing, None, True)
    got = [cost.forward, cost.saved_all, cost.saved, cost.backward]
    got += [cost.flops, cost.flops_backward, cost.flops_again]
    assert got == pytest.approx(list(whole), rel=1e-6)
    assert len(net.blocks) == 6 and len(with_blocks(net, 2).blocks) == 2
    assert cost.saved < 0.6 * cost.saved_all if checkpointing else cost.saved == cost.saved_all


def test_flops_of_a_transformer_are_those_of_its_formula():
    """2 N (4 D^2 + 2 D F) + 4 N^2 D for self-attention and MLP of a block, and so on by hand."""
    D, F, L, layers, B, text, freq = 48, 96, 5, 3, 2, 16, 32
    N = 2 * 2 * 3  # patches of 1 x 2 x 2
    block = 2 * N * (4 * D * D + 2 * D * F) + 4 * N * N * D  # self-attention and MLP
    block += 2 * (2 * N + 2 * L) * D * D + 4 * N * L * D  # cross-attention
    ends = 2 * N * (16 * D) + 2 * N * (16 * D)  # patches in and out
    ends += 2 * (freq * D + D * D + 6 * D * D) + 2 * L * (text * D + D * D)  # time and text
    cost = measure(on_meta(lambda: wan(layers)), CALL)
    assert cost.flops == B * (layers * block + ends)
    # the gradient takes twice that, less those of inputs: patches, waves and text
    inputs = B * (2 * N * 16 * D + 2 * freq * D + 2 * L * text * D)
    assert cost.flops_backward == 2 * cost.flops - inputs
    again = measure(on_meta(lambda: wan(layers)), CALL, checkpointing=True)
    assert again.flops_again == pytest.approx(B * layers * block, rel=0.2)
    assert again.flops_backward == cost.flops_backward


def test_attention_is_fused():
    """Nothing of N x N numbers is counted: twice the tokens keep twice the bytes."""
    sizes = []
    for frames in (64, 128):
        sizes.append(measure(on_meta(wan), Call(1, (4, frames, 8, 8), text=5)))
    one, two = sizes
    assert two.saved < 2.05 * one.saved and two.backward < 2.05 * one.backward
    assert two.flops > 2.3 * one.flops
    q = torch.zeros(1, 1, 512, 8)
    with Meter([q]) as meter:
        scaled_dot_product_attention(q, q, q)
    assert meter.peak < 4 * 512 * 64


def test_a_network_of_14_billion_takes_seconds_and_no_memory():
    net = on_meta(lambda: WanTransformer3DModel(**WAN_14B))
    cost = measure(net, Call(1, (16, 21, 90, 160)), bf16=True, checkpointing=True)
    assert cost.parameters == 14_288_491_584 and cost.weights == 4 * cost.parameters
    assert 30 * GB < cost.saved < 40 * GB < 1000 * GB < cost.saved_all
    assert 6.4e15 < cost.flops < 6.6e15 and cost.flops_again == pytest.approx(cost.flops, rel=0.01)


@pytest.mark.parametrize("name", [n for n in CONFIGS if "14B" not in n and "Wan" not in n])
def test_every_released_network_is_measured(name):
    about = CONFIGS[name]
    depth = [k for k in ("num_blocks", "num_layers") if k in about.config]
    fewer = dict.fromkeys(depth or ["num_layers" if "Pix" in name else "n_layers"], 2)
    if about.network == "UNet2DConditionModel":
        fewer = {"layers_per_block": 1, "transformer_layers_per_block": 1}
    if about.network == "UNetModel":
        fewer = {"num_res_blocks": 1}
    net = on_meta(lambda: NETWORKS[about.network](**{**about.config, **fewer}))
    cost = measure(net, Call(1, net.latent_shape, points=2000), bf16=True, checkpointing=True)
    assert 0 < cost.saved < cost.saved_all and cost.flops_backward > 1.8 * cost.flops


def test_sparse_networks_go_by_the_number_of_points():
    """Shapes in place of points that are looked up: what a real call computes is the same."""
    config = dict(resolution=16, in_channels=2, model_channels=32, cond_channels=12, out_channels=2)
    config |= dict(num_blocks=2, num_heads=2, io_block_channels=[16], qk_rms_norm=True)
    net = SLatFlowModel(**config)
    place = torch.cartesian_prod(*[torch.arange(0, 16)] * 2)[:128]  # one layer: 4 points a voxel
    coords = torch.cat([place.new_zeros(128, 1), place, place.new_zeros(128, 1)], 1)
    x, tokens = torch.zeros(128, 2), torch.zeros(1, 7, 12)
    with Meter([*net.parameters(), x, tokens, coords]) as real, torch.no_grad():
        net(x, torch.zeros(1), tokens, coords)
    got = measure(on_meta(lambda: SLatFlowModel(**config)), Call(1, (2,), text=7, points=128))
    assert got.flops == real.flops


def test_adapters_have_gradients_of_their_own_alone():
    net = adapted(on_meta(wan), 4)
    cost = measure(net, CALL, adapter="adapter")
    assert cost.trained == 3 * 4 * (8 * 2 * 48 + 2 * (48 + 96))
    full = measure(on_meta(wan), CALL)
    assert cost.flops_backward < 0.75 * full.flops_backward
    assert cost.parameters == full.parameters + cost.trained


# ---- the plan ------------------------------------------------------------------------------------


def flags(**more):
    known = dict(train_batch_size=2, gradient_accumulation_steps=1, mixed_precision="no")
    known |= dict(gradient_checkpointing=False, teacher="somewhere", sample_shape=[4, 2, 4, 6])
    return SimpleNamespace(**{**known, **more})


NETWORKS_OF_DMD = [Network("teacher", "teacher"), Network("student", "trained", saved=True)]
TURN = [Turn("student", 1, {"teacher": 2, "student": 1.5}, {"student": 1})]


def test_bytes_of_a_rank():
    """4 bytes a weight, 4 a gradient, 8 for AdamW, 4 for an average; shared out over ranks."""
    net = on_meta(wan)
    P = sum(p.numel() for p in net.parameters())
    networks = [*NETWORKS_OF_DMD, Network("ema", "average")]
    one = Plan(flags(), net, networks, TURN)
    assert one.static() == {
        "weights": 8 * P,
        "optimiser": 8 * P,
        "moving average": 4 * P,
        "gathered blocks": 0,
    }
    gradients, saved, work = one.of_turn(TURN[0])
    cost = one.costs["student"]
    assert (gradients, saved) == (4 * P, cost.saved)
    assert one.peak() == 20 * P + max(4 * P, cost.saved) + work
    assert one.disk() == {"a state (two are kept)": 16 * P, "student": 4 * P}
    twice = Plan(flags(gradient_accumulation_steps=2), net, networks, TURN)
    assert twice.peak() == 20 * P + 4 * P + cost.saved + work
    four = Plan(flags(), net, networks, TURN, ranks=4)
    assert four.static()["weights"] == 2 * P and four.static()["optimiser"] == 2 * P
    block = sum(4 * p.numel() for p in net.blocks[0].parameters())
    assert four.static()["gathered blocks"] == 3 * block + cost.outside
    assert four.of_turn(TURN[0]) == (P, saved, work)
    split = Plan(flags(sequence_ranks=2), net, networks, TURN, ranks=2)
    assert split.of_turn(TURN[0])[1:] == (saved / 2, work / 2)
    assert split.flops()[0] == one.flops()[0] / 2


def test_flops_of_an_update():
    plan = Plan(flags(gradient_accumulation_steps=3), on_meta(wan), NETWORKS_OF_DMD, TURN)
    cost = plan.costs["student"]
    assert plan.flops() == (3 * (4.5 * cost.flops + cost.flops_backward), 0)
    assert plan.seconds(1.0) == pytest.approx(plan.flops()[0] / 0.45e12)


def test_adapters_are_whole_and_the_base_is_shared_out():
    networks = [Network("teacher", "teacher"), Network("student", "trained", 4, saved=True)]
    how = flags(mixed_precision="bf16")
    plan = Plan(how, on_meta(wan), networks, TURN, ranks=2)
    full = Plan(how, on_meta(wan), NETWORKS_OF_DMD, TURN, ranks=2)
    A = plan.costs["student"].trained
    assert plan.static()["weights"] == plan.costs["teacher"].weights / 2 + 4 * A
    assert plan.costs["teacher"].weights < 0.6 * 4 * plan.costs["teacher"].parameters  # bfloat16
    assert plan.static()["optimiser"] == 8 * A and plan.disk()["student"] == 4 * A
    assert plan.peak() < full.peak()


def test_pairs_have_two_networks():
    networks = [Network("teacher", "teacher", pair=True), Network("student", "trained")]
    pair = Plan(flags(), on_meta(wan), networks, TURN)
    one = Plan(flags(), on_meta(wan), NETWORKS_OF_DMD, TURN)
    P = one.costs["student"].parameters
    assert pair.static()["weights"] == one.static()["weights"] + 4 * P


def test_largest_batch_fits_and_one_more_does_not():
    plan = Plan(flags(), on_meta(wan), NETWORKS_OF_DMD, TURN)
    memory = plan.peak(7) / (1 - dry_run.FREE) + 1
    assert plan.largest_batch(memory) == 7
    assert plan.largest_batch(plan.peak(1)) == 0


# ---- against runs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    [
        "wan-tiny dmd --steps 1 -- --fake_update_ratio 1",
        pytest.param(
            "wan-middle dmd --steps 1 -- --fake_update_ratio 1 --gradient_accumulation_steps 2",
            marks=pytest.mark.long,
        ),
        "wan-tiny phased_dmd --steps 1 -- --fake_update_ratio 1 --phases 1 --lora_rank 16 "
        "--fake_lora_rank 16 --train_batch_size 8 --no-gradient_checkpointing",
    ],
)
def test_predicted_memory_is_what_a_run_takes(command):
    """Within 15 % of the process's peak, beyond what it had before; each in its own process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", "--shape", *command.split()],
        capture_output=True,
        text=True,
        env={**ENV, "MALLOC_MMAP_THRESHOLD_": "100000"},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.search(r"memory (\S+) GB, predicted (\S+) GB", done.stdout)
    measured, predicted = map(float, found.groups())
    assert predicted == pytest.approx(measured, rel=0.15) and measured > 0.1


# ---- the scripts ---------------------------------------------------------------------------------


def test_dry_run_needs_no_weights_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = save_config("Wan 2.1 T2V 1.3B", tmp_path / "teacher")
    before = sorted(tmp_path.rglob("*"))
    dmd.main(["--teacher", teacher, "--mixed_precision", "bf16", "--dry_run", "8"])
    out = capsys.readouterr().out
    assert "student      trained       1,418,996,800" in out
    assert "8 rank(s), networks in 8 part(s), cuda, batch 1, samples of 16 x 21 x 60 x 104" in out
    assert "fits 80 GB" in out and "989 TFLOP/s" in out and "recomputed" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bank_without_a_size_is_planned_for_the_ranks_that_fill_it(tmp_path, capsys):
    """As released teachers have it: by the samples of an update, of groups that share tokens."""
    flags = save_tiny_wan(tmp_path)
    for name in ("--student_steps", "--learning_rate_fake"):  # which it has no use for
        at = flags.index(name)
        del flags[at : at + 2]
    flags += ["--target_layers", "1", "--dry_run"]
    linvideo.main([*flags, "8"])
    assert "the teacher's trajectories" in capsys.readouterr().out
    shape, sizes = (4, 1, 4, 4), []
    for sequence_ranks in ("1", "4"):
        own = ["8", "--sequence_ranks", sequence_ranks, "--max_train_steps", "100"]
        args = linvideo.parse_args([*flags, *own])
        sizes += linvideo.bank_on_disk(args, shape, 8).values()
    assert args.bank_size is None and sizes[0] == 4 * sizes[1] > 0


def test_the_base_of_mdt_dist_s_adapters_stays_float32(tmp_path, monkeypatch):
    """Also as it is read: its derivative is a difference of outputs."""
    asked = []

    class Enough(Exception):
        """The teacher has been asked for."""

    def start(run, in_bf16=True):
        asked.append(in_bf16)
        raise Enough

    monkeypatch.setattr(mdt_dist, "start_teacher", start)
    for rank in ("0", "2"):
        with pytest.raises(Enough):
            mdt_dist.main(["--lora_rank", rank, "--output_dir", str(tmp_path / "run")])
    assert asked == [True, False]


@pytest.mark.parametrize(
    "script", "dmd phased_dmd decoupled_dmd tdm linvideo mdt_dist latent_fm".split()
)
def test_every_script_states_its_networks(script, capsys):
    """The networks it says are those that it then has, and its turns name them."""
    module = importlib.import_module(script)
    module.main(["--dry_run"])
    assert "peak" in capsys.readouterr().out
    args = module.parse_args([])
    networks, turns = module.cost(args)
    names = {network.name for network in networks}
    trained = {network.name for network in networks if network.role == "trained"}
    assert {turn.trains for turn in turns} == trained
    for turn in turns:
        assert {*turn.calls, *turn.graphs} <= names and turn.graphs[turn.trains] >= 1
    assert any(network.saved for network in networks)


def test_calls_are_those_of_a_run(tmp_path):
    """Per update of dmd.py with one step, R = 3, guidance 2 and accumulation."""
    args = dmd.parse_args("--fake_update_ratio 3 --guidance_scale 2".split())
    networks, turns = dmd.cost(args)
    calls = {network.name: 0 for network in networks}
    for turn in turns:
        for name, count in [*turn.calls.items(), *turn.graphs.items()]:
            calls[name] += turn.times * count
    # tests/test_bench.py counts these in a run
    assert calls == pytest.approx({"teacher": 2, "student": 3, "fake": 4, "ema": 0})


def counted(calls, name):
    """A network that counts its calls."""

    def net(x, t, label):
        calls[name] = calls.get(name, 0) + 1
        return torch.tanh(x + t[:, None])

    return net


@pytest.mark.parametrize("schedule", ["shared", "hybrid"])
@pytest.mark.parametrize("normalizer", ["none", "branch", "shared"])
@pytest.mark.parametrize(
    "terms", ["", "--no_ca", "--no_dm", "--no_dm --observer", "--guidance_scale 1", "--ca_weight 0"]
)
def test_decoupled_dmd_counts_its_teacher(schedule, normalizer, terms):
    """Calls of teacher and fake in the student's turn, by what its loss really calls."""
    flags = f"--teacher ring --schedule {schedule} --normalizer {normalizer} {terms}"
    args = decoupled_dmd.parse_args(flags.split())
    terms, calls = decoupled_dmd.Terms(args), {}
    x, t, cond = torch.randn(4, 2), torch.full((4,), 0.5), {"label": torch.zeros(4)}
    at_dm, at_ca = (x, t), (x, t)
    at = (at_dm, at_dm if schedule == "shared" else at_ca), (cond, cond, cond)
    alpha = 1 + args.ca_weight * (args.guidance_scale - 1)
    nets, flow = (counted(calls, "teacher"), counted(calls, "fake")), Diffusion(Flow(), "flow_v")
    if terms.as_in_paper:
        decoupled_dmd.decoupled_dmd_loss(x, *nets, flow, *at[0], *at[1], alpha)
    else:
        decoupled_dmd.ablated_loss(x, *nets, flow, *at[0], *at[1], alpha, terms)
    student = decoupled_dmd.cost(args)[1][0].calls
    assert {k: student[k] for k in ("teacher", "fake")} == {"teacher": 0, "fake": 0, **calls}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    "flags", ["", "--guidance_vm 2", "--arm cm", "--arm scm", "--arm vd", "--derivative jvp"]
)
def test_mdt_dist_counts_its_calls(flags, bf16):
    """Of student and teacher in both losses. Forward mode counts twice: value and derivative."""
    precision = ["--mixed_precision", "bf16"] if bf16 else []
    args = mdt_dist.parse_args(["--teacher", "ring", *flags.split(), *precision])
    calls, x, t = {}, torch.randn(4, 2), torch.full((4,), 0.5)
    cond = {"label": torch.zeros(4)}
    student = counted(calls, "student")
    teacher = SimpleNamespace(net=counted(calls, "teacher"), shift=1.0)
    exact, found = args.derivative == "jvp", []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        if args.arm != "vd":
            mdt_dist.matching(args, student, teacher, x, x, t, cond, cond, 0)
            found.append({**calls, "student": calls["student"] + exact})
            calls.clear()
        if args.arm in ("mdt", "vd"):
            mdt_dist.distillation(args, student, teacher, x, x, t, cond, cond)
            found.append({**calls, "student": calls["student"] + exact})
    turns = mdt_dist.cost(args)[1]
    said = [{**turn.calls, "student": turn.calls["student"] + 1} for turn in turns]
    assert said == found


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("script", "dmd phased_dmd decoupled_dmd tdm".split())
def test_fake_updates_make_samples_but_for_the_first(script, reuse):
    """The first is given those of the student's update, unless --no-reuse_samples."""
    module = importlib.import_module(script)
    for R in (1, 5):
        flags = ["--fake_update_ratio", str(R), *([] if reuse else ["--no-reuse_samples"])]
        student, fake = module.cost(module.parse_args(flags))[1]
        of_one = student.calls[student.trains] + student.graphs[student.trains]
        made = R * fake.calls[student.trains]
        assert fake.times == R and made == pytest.approx((R - reuse) * of_one)
        assert (made == 0) == (reuse and R == 1)


def test_too_large_a_run_is_refused_before_it_loads(tmp_path, capsys):
    """In one line with the numbers, and without a weight on the disk."""
    teacher = save_config("tiny Wan", tmp_path / "teacher")
    asked = ["--teacher", teacher, "--sample_shape", "16", "1", "16", "16"]
    asked += ["--device_memory", "0.25", "--train_batch_size", "3", "--no-gradient_checkpointing"]
    line = refusal_of(capsys, dmd.main, *asked)
    assert re.search(r"needs \S+ GB a rank and the device has 0.25, of which 3 % stay free", line)
    assert "optimiser 0.11" in line and "8 ranks (" in line
    assert "--train_batch_size 1 (" not in line  # which is not enough
    asked[asked.index("0.25")] = "0.02"
    line = refusal_of(capsys, dmd.main, *asked)
    assert "--gradient_checkpointing (" in line and "--train_batch_size 1 (" in line


@pytest.mark.parametrize(
    "command, offered, not_offered",
    [
        ("tdm --student_steps 4", ["--lora_rank 64 --fake_lora_rank 64 ("], []),
        ("tdm", ["--sequence_ranks 2 on 2 ranks ("], ["--lora_rank"]),  # one input for the count
        ("decoupled_dmd", ["--lora_rank 64 --fake_lora_rank 64 ("], []),
        ("dmd --teacher ring", [], ["--sequence_ranks"]),  # no tokens
    ],
)
def test_remedies_are_flags_that_the_script_takes(capsys, command, offered, not_offered):
    """And where none is enough alone, the line says so."""
    script, *flags = command.split()
    main, each = importlib.import_module(script).main, ["--train_batch_size", "8"]
    line = refusal_of(capsys, main, *flags, *each, "--device_memory", "0.0001")
    assert "none of these is enough alone" in line and "(;" not in line
    assert all(text in line for text in offered)
    assert not any(text in line for text in not_offered)


def test_a_remedy_that_is_enough_is_offered_alone(capsys):
    line = refusal_of(capsys, linvideo.main, "--device_memory", "0.05")
    assert re.search(r"give --train_batch_size 1 \(\S+\); --dry_run", line)


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--dry_run --sequence_ranks 3", "1 rank(s) do not divide into groups of 3"),
        ("--dry_run 6 --sequence_ranks 3", "4 heads of a DiT cannot be shared by 3 ranks"),
        ("--teacher ring --dry_run 2 --sequence_ranks 2", "RingMLP cannot spread its tokens"),
    ],
)
def test_tokens_that_cannot_be_shared_are_not_planned(capsys, flags, says):
    assert says in refusal_of(capsys, dmd.main, *flags.split())
    assert dmd.main("--dry_run 4 --sequence_ranks 2".split()) is None


def test_a_run_that_fits_is_not_refused(tmp_path):
    plan = Plan(
        dmd.parse_args(["--teacher", "ring"]),
        on_meta(NETWORKS["RingMLP"]),
        *dmd.cost(dmd.parse_args(["--teacher", "ring"])),
    )
    dry_run.refuse_too_large(plan, 1 * GB)


def test_shapes_that_do_not_fit_end_in_one_line(tmp_path, capsys):
    wrong = [*save_tiny_wan(tmp_path), "--sample_shape", "4", "2", "5", "6", "--dry_run"]
    assert "do not divide into patches" in refusal_of(capsys, dmd.main, *wrong)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK"])
@pytest.mark.parametrize("command", ["dmd --dry_run", "linvideo --objective adm", "dmd"])
def test_ranks_that_are_no_numbers_end_in_one_line(monkeypatch, tmp_path, capsys, name, command):
    """They are read before the run looks at them."""
    script, *flags = command.split()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv(name, "two")
    at = "--output_dir", str(tmp_path / "run")
    line = refusal_of(capsys, importlib.import_module(script).main, *flags, *at)
    assert f"{name}=two, which is no number" in line


@pytest.mark.parametrize("flags", [[], ["--dry_run"]], ids=str)
def test_more_ranks_than_gpus_end_in_one_line(monkeypatch, tmp_path, capsys, flags):
    """Whose memory is asked for before the run starts."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    line = refusal_of(capsys, dmd.main, *flags, "--output_dir", str(tmp_path / "run"))
    assert "rank 1 of this node has no GPU, there are 1" in line


def test_ranks_that_cannot_be_groups_are_not_planned(capsys):
    """Shares of networks, as the run's own mesh says it; one rank has no use for them."""
    for flags in (
        ["--dry_run", "8", "--shard_ranks", "3"],
        ["--dry_run", "2", "--shard_ranks", "4"],
    ):
        line = refusal_of(capsys, dmd.main, *flags)
        assert re.search(r"--shard_ranks \d does not divide \d ranks: use one of 1, 2", line)
    dmd.main("--dry_run 8 --shard_ranks 4".split())
    capsys.readouterr()
    dmd.main("--dry_run 1 --shard_ranks 3".split())
    assert "networks in 1 part(s)" in capsys.readouterr().out


def test_a_closed_form_takes_no_lora_file(tmp_path, capsys):
    flags = "--teacher ring --teacher_lora nowhere.safetensors".split()
    where = ["--output_dir", str(tmp_path / "run")]
    planned = refusal_of(capsys, dmd.main, *flags, *where, "--dry_run")
    assert "is a closed form without weights: leave it out" in planned
    assert refusal_of(capsys, dmd.main, *flags, *where) == planned


def test_a_copy_for_a_save_counts_where_it_is_more_than_an_update():
    """Beside what is static; it is no part of the state, and stays whole beside adapters."""
    net = on_meta(wan)
    P = sum(p.numel() for p in net.parameters())
    copy = Network("copy", "copy", saved=True)
    for rank in (0, 4):
        student = Network("student", "trained", rank)
        networks = [Network("teacher", "teacher"), student]
        with_copy = Plan(flags(), net, [*networks, copy], TURN)
        without = Plan(flags(), net, networks, TURN)
        assert with_copy.static() == without.static()
        assert with_copy.of_save() == 4 * P + with_copy.costs["copy"].forward
        static = sum(without.static().values())
        assert with_copy.peak() == max(without.peak(), static + with_copy.of_save())
        states = (plan.disk()["a state (two are kept)"] for plan in (with_copy, without))
        assert len(set(states)) == 1 and with_copy.disk()["student"] == 4 * P
    assert dry_run.as_adapter(copy) == copy
    large = [*networks, *(Network(f"copy{i}", "copy") for i in range(20))]
    assert Plan(flags(), net, large, TURN).peak() > 80 * P


REFUSED = [  # (script, teacher, flags): what needs the teacher to be refused
    ("linvideo", "CogVideoX-2B", []),
    ("linvideo", "PixArt-alpha 512", []),
    ("linvideo", "tiny Wan", ["--feature_dim", "65"]),
    ("linvideo", "tiny Wan", ["--select", "0", "6"]),
    ("mdt_dist", "PixArt-alpha 512", ["--data", "latents.safetensors"]),
    ("dmd", "tiny Wan", ["--gan_weight", "0.1"]),
    ("decoupled_dmd", "tiny Wan", ["--gan_weight", "0.1"]),
    ("phased_dmd", "tiny Wan", ["--dm_range", "0", "0.1"]),
    ("phased_dmd", "tiny Wan pair", ["--student_steps", "4", "--phases", "1"]),
    ("tdm", "tiny Wan", ["--student_steps", "1", "2", "4"]),
    ("dmd", "tiny Wan", ["--sequence_ranks", "2"]),
    *((script, "tiny Wan pair", []) for script in ("dmd", "tdm", "decoupled_dmd", "linvideo")),
]


@pytest.mark.parametrize("script, name, flags", REFUSED)
def test_a_dry_run_refuses_what_the_run_would(tmp_path, capsys, script, name, flags):
    """In the same words, and without weights."""
    teacher = save_config(name, tmp_path / "teacher", weights=name.startswith("tiny"))
    prompts = save_conditions(name, str(tmp_path / "prompts.safetensors"))
    flags = ["--teacher", teacher, *prompts, *flags]
    main = importlib.import_module(script).main
    at = "--output_dir", str(tmp_path / "run")
    refused = refusal_of(capsys, main, *flags, *at, "--dry_run")
    assert not (tmp_path / "run").exists()
    if name.startswith("tiny"):  # the others have no weights here
        assert refusal_of(capsys, main, *flags, *at) == refused


def test_two_networks_are_planned_for(tmp_path, capsys):
    import phased_dmd

    teacher = save_config("tiny Wan pair", tmp_path / "teacher")
    phased_dmd.main(["--teacher", teacher, "--dry_run", "--sample_shape", "16", "1", "16", "16"])
    out = capsys.readouterr().out
    rows = dict(re.findall(r"^(\w+) +(?:teacher|rank 64|trained|frozen) +([\d,]+)", out, re.M))
    count = {name: int(n.replace(",", "")) for name, n in rows.items()}
    assert count["teacher"] == count["fake"] and count["expert1"] == count["expert2"]
    assert count["expert1"] < 0.5 * count["teacher"]


def test_trellis_is_planned_for(tmp_path, capsys):
    teacher = save_config("TRELLIS image structure", tmp_path / "teacher")
    mdt_dist.main(["--teacher", teacher, "--dry_run", "--train_batch_size", "1"])
    assert "samples of 8 x 16 x 16 x 16" in capsys.readouterr().out
    small = SparseStructureFlowModel(resolution=4, in_channels=2, model_channels=32,
        cond_channels=12, out_channels=2, num_blocks=2, num_heads=2, patch_size=1)  # fmt: skip
    assert small.gradient_checkpointing is False


def test_released_teachers_are_checkpointed(tmp_path):
    """And nothing small is, unless it is asked for."""
    teacher = save_config("Wan 2.1 T2V 1.3B", tmp_path / "teacher")
    for script in "dmd phased_dmd decoupled_dmd tdm linvideo mdt_dist".split():
        parse = importlib.import_module(script).parse_args
        assert parse(["--teacher", teacher]).gradient_checkpointing
        off = parse(["--teacher", teacher, "--no-gradient_checkpointing"])
        assert not off.gradient_checkpointing
        assert not parse(["--teacher", save_tiny_teacher(tmp_path / "own")]).gradient_checkpointing
    parse = importlib.import_module("latent_fm").parse_args
    assert parse(["--network", "DiT-B/2"]).gradient_checkpointing
    assert not parse([]).gradient_checkpointing


# ---- docs/scale.md -------------------------------------------------------------------------------


@pytest.mark.parametrize("row", scale.ROWS, ids=lambda row: f"{row.script} {row.release}")
def test_commands_of_the_table_parse(row):
    """With full networks and with adapters; the page has the row and the command."""
    for flags in (row.flags, f"{row.flags} {row.adapters}"):
        args = scale.parse(row.script, f"--teacher {row.folder} {flags}")
        assert args.mixed_precision == "bf16"
    page = (ROOT / "docs" / "scale.md").read_text()
    assert f"| {row.release} | {row.sample} | `{row.script}.py` |" in page
    assert row.command().split(" ", 1)[1] in page
    with pytest.raises(SystemExit):
        scale.parse(row.script, f"--teacher {row.folder} {flags} --no_such_flag 1")


def test_readme_names_no_teacher_that_the_table_lacks():
    readme = (ROOT / "README.md").read_text().split("## Released teachers")[1]
    table = [line for line in readme.splitlines() if line.startswith("| ")][2:]
    rows = " ".join(f"{row.release} {row.script}" for row in scale.ROWS)
    for name in ("Wan 2.1", "Wan 2.2", "Z-Image", "PixArt-alpha", "DiT", "SiT", "TRELLIS"):
        assert name in rows
    for script in re.findall(r"`(\w+)\.py`", " ".join(table[:6])):
        assert script in rows


def test_a_row_of_the_table(tmp_path):
    """The smallest number of GPUs fits, and half of it does not."""
    teacher = save_config("Wan 2.2 T2V A14B", tmp_path / "teacher")
    row = next(row for row in scale.ROWS if "A14B" in row.release and "81" in row.sample)
    count, plan = scale.smallest(row, teacher, adapters=True)
    assert 1 < count <= 8 and plan.shards == count and plan.fits(80 * GB)
    how = plan.networks, plan.turns, count // 2, "cuda", plan.measured
    plan.args.shard_ranks = count // 2
    assert not Plan(plan.args, plan.net, *how).fits(80 * GB)


# ---- after the run: its work and its rate --------------------------------------------------------


def test_a_finished_run_states_its_work(capsys, monkeypatch, tmp_path):
    """Updates x the FLOPs of --dry_run, over the seconds in log.csv and the machine's own rate."""
    args = dmd.parse_args(["--output_dir", str(tmp_path), "--max_train_steps", "40"])
    rows = "".join(f"{i},0.5\n" for i in range(40))
    (tmp_path / "log.csv").write_text("step,seconds\n" + rows)
    monkeypatch.setattr(work, "matmul_rate", lambda precision: 1e11)
    work.work_done(args, *dmd.cost(args))
    flops = sum(dry_run.planned(args, *dmd.cost(args)).flops())
    said = re.findall(r"\d[\d.]*", capsys.readouterr().out.split("work:")[1])
    assert said[0] == "40" and float(said[1]) == pytest.approx(flops / 1e12, rel=1e-2)
    assert float(said[2]) == pytest.approx(40 * flops / 1e12, rel=1e-2)
    assert float(said[4]) == pytest.approx(40 * flops / 20 / 1e9, abs=1)  # GFLOP/s in 20 seconds
    assert float(said[5]) == pytest.approx(40 * flops / 20 / 1e11, abs=0.01)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    work.work_done(args, *dmd.cost(args))
    line = capsys.readouterr().out
    of_four = re.findall(r"\d[\d.]*", line.split("work:")[1])
    assert of_four[1] == said[1] and float(of_four[2]) == pytest.approx(
        4 * float(said[2]), rel=0.01
    )
    assert "TFLOP a rank, " in line and of_four[4:] == said[4:]
    (tmp_path / "log.csv").write_text("step,seconds\n0,0.5\n")  # too short to speak of
    work.work_done(args, *dmd.cost(args))
    assert capsys.readouterr().out == ""


def test_rate_of_a_matrix_product():
    """Some GFLOP/s on any machine, and no more than a thousand times that."""
    assert 1e8 < work.matmul_rate(repeats=1) < 1e14


def test_linvideo_counts_its_own_trajectories_once_an_update(monkeypatch):
    """However many micro-batches, and a share of them on each rank, as --dry_run RANKS has it."""
    flags = "--teacher clips --objective adm".split()

    def calls(*more):
        args = linvideo.parse_args([*flags, *more])
        passes = args.gradient_accumulation_steps * args.train_batch_size
        return linvideo.cost(args)[1][-1].calls["teacher"] * passes

    assert calls("--gradient_accumulation_steps", "4") == pytest.approx(calls())
    planned = calls("--dry_run", "8")
    assert planned == pytest.approx(calls() / 8)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert calls() == pytest.approx(planned)


def test_inputs_from_real_data_cost_no_calls_of_the_student():
    args = dmd.parse_args("--student_steps 4 --student_input real".split())
    student, fake = dmd.cost(args)[1]
    assert student.calls["student"] == 0 and fake.calls["student"] == pytest.approx(0.5)


def test_the_work_of_phases_is_the_mean_of_theirs():
    """Later phases make longer inputs: as many phases as there may be, on average the same."""

    def flops(*flags):
        args = phased_dmd.parse_args(list(flags))
        return sum(dry_run.planned(args, *phased_dmd.cost(args)).flops())

    whole = flops("--phases", "1")
    for phases in ("2", "4"):
        assert flops("--phases", phases) == pytest.approx(whole)
    assert flops("--phases", "2", "--no_truncation") > 1.1 * whole
