"""The tokens of a sample on several ranks (models/networks/sequence.py): one process's result.

This file is also what four ranks run, for pairs and threes of them that share a sample:
torchrun --nproc-per-node 4 tests/test_sequence.py FOLDER 2 3.
"""

import contextlib
import copy
import os
import sys

import pytest
import torch
import torch.distributed as dist
from forks import launch
from helpers import TINY_PIXART, TINY_WAN, TINY_Z_IMAGE, fill, read_log, weights
from safetensors.torch import load_file, save_file

import dmd
import linvideo
import mdt_dist
import phased_dmd
from kernels.linear_attention import linear_attention, linear_attention_over_ranks
from models.files import UserError
from models.networks import WEIGHTS, lora, network_config, save_network
from models.networks.cogvideox import CogVideoXTransformer3DModel
from models.networks.dit import DiT
from models.networks.dit_imagenet import DiTTransformer2DModel
from models.networks.lumina2 import Lumina2Transformer2DModel
from models.networks.pixart import PixArtTransformer2DModel
from models.networks.qwen_image import QwenImageTransformer2DModel
from models.networks.ring_dit import RingDiT
from models.networks.ring_mlp import RingMLP
from models.networks.sequence import (
    Sequence,
    Share,
    gather_tokens,
    share_of,
    split_tokens,
    use_sequence,
)
from models.networks.trellis import SLatFlowModel, SparseStructureFlowModel
from models.networks.wan import WanTransformer3DModel, WanTwoNetworks
from models.networks.z_image import ZImageTransformer2DModel
from models.plumbing.run import Run

B = 2

# ---- networks: heads that 2 and 3 divide, and numbers of tokens that neither does ----------------


def dit(**more):
    """35 tokens."""
    return DiT(size=(10, 7), patch=(2, 1), channels=2, dim=192, depth=2, num_classes=4, **more)


def wan(**more):
    """35 tokens."""
    sizes = dict(num_attention_heads=6, attention_head_dim=6, num_layers=2, ffn_dim=24)
    return WanTransformer3DModel(**{**TINY_WAN, **sizes, **more})


def mixed(net):
    linvideo.mix_attention(net, "hedgehog", 0.6)
    return net


def with_adapter(net):
    """An adapter on the frozen network."""
    net.requires_grad_(False)
    lora.add(net, "a", 2, 4.0)
    return net


def checkpointed(net):
    net.gradient_checkpointing = True
    return net


def z_image():
    sizes = dict(dim=36, n_heads=6, n_kv_heads=6, axes_dims=[2, 2, 2])
    return ZImageTransformer2DModel(**{**TINY_Z_IMAGE, **sizes})


def qwen_image():
    sizes = dict(num_attention_heads=6, attention_head_dim=6, axes_dims_rope=[2, 2, 2])
    sizes |= dict(in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=16)
    return QwenImageTransformer2DModel(**sizes)


def lumina2():
    sizes = dict(hidden_size=36, num_attention_heads=6, num_kv_heads=3, axes_dim_rope=[2, 2, 2])
    sizes |= dict(in_channels=4, num_layers=2, num_refiner_layers=1, multiple_of=16)
    return Lumina2Transformer2DModel(**sizes, cap_feat_dim=16)


def pixart(**more):
    sizes = dict(num_attention_heads=6, attention_head_dim=6, cross_attention_dim=36)
    return PixArtTransformer2DModel(**{**TINY_PIXART, **sizes, "sample_size": 128})


def cogvideox(**more):
    """35 tokens of a prompt, then 30 of a video: a rank may have some of both, or of one."""
    sizes = dict(num_attention_heads=6, attention_head_dim=8, in_channels=4, out_channels=4)
    sizes |= dict(time_embed_dim=12, text_embed_dim=16, num_layers=2, max_text_seq_length=35)
    return CogVideoXTransformer3DModel(**{**sizes, **more})


def dit_imagenet():
    sizes = dict(num_attention_heads=6, attention_head_dim=6, num_layers=2)
    return DiTTransformer2DModel(**sizes, out_channels=8, sample_size=10, num_embeds_ada_norm=4)


def structure(cls=SparseStructureFlowModel, **more):
    """125 tokens."""
    sizes = dict(resolution=5, patch_size=1, model_channels=36, num_heads=6, num_blocks=2)
    channels = dict(in_channels=4, out_channels=4, cond_channels=12, qk_rms_norm=True)
    return cls(**{**sizes, **channels, **more})


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditions(net):
    """What forward takes beside x and t. The prompts have 30 and 34 tokens: Z-Image fills the first
    up to 32 and masks what it then lacks."""
    mask = torch.arange(35) < torch.tensor([[30], [34]])
    every = {"label": torch.tensor([1, 3]), "context": normal(B, 1, 10, 7, seed=4)}
    every |= {"tokens": normal(B, 3, 12, seed=1), "text": normal(B, 35, 16, seed=1)}
    every |= {"mask": mask, "text_mask": mask}
    steps = {"steps": torch.tensor([0, 2])} if net.config.get("steps_cond") else {}
    return {name: every[name] for name in net.cond_names} | steps


CASES = {  # name: (network, shape of a sample, further arguments of forward)
    "dit": (lambda: dit(steps_cond=True, context_channels=1), (2, 10, 7), {}),
    "dit, linear": (lambda: checkpointed(dit(linear_layers=[0])), (2, 10, 7), {}),
    "dit, linear with eps": (lambda: dit(linear_layers=[1], feature_map="relu"), (2, 10, 7), {}),
    "dit, mixed": (lambda: mixed(dit()), (2, 10, 7), {}),
    "dit, adapter": (lambda: with_adapter(dit()), (2, 10, 7), {"adapter": "a"}),
    "ring_dit": (lambda: RingDiT(tokens=7, dim=192, depth=2), (2,), {}),
    "wan": (wan, (4, 1, 10, 14), {}),
    "wan, linear": (lambda: checkpointed(wan(linear_layers=[1])), (4, 1, 10, 14), {}),
    "wan, two networks": (lambda: WanTwoNetworks(wan(), wan(), 0.5), (4, 1, 10, 14), {}),
    "wan, adapter": (lambda: checkpointed(with_adapter(wan())), (4, 1, 10, 14), {"adapter": "a"}),
    "z_image": (lambda: checkpointed(z_image()), (4, 10, 14), {}),
    "qwen_image": (lambda: checkpointed(qwen_image()), (4, 10, 14), {}),
    "lumina2": (lambda: checkpointed(lumina2()), (4, 10, 14), {}),
    "pixart": (pixart, (4, 10, 14), {}),
    "dit_imagenet": (dit_imagenet, (4, 10, 14), {}),
    "cogvideox": (lambda: checkpointed(cogvideox()), (4, 1, 10, 12), {}),
    "cogvideox, linear": (lambda: cogvideox(linear_layers=[0]), (4, 1, 10, 12), {}),
    "structure": (structure, (4, 5, 5, 5), {}),
}


def build(name):
    """With weights of a size that neither amplifies nor loses what passes through wide layers."""
    torch.manual_seed(0)
    net = fill(CASES[name][0]())
    with torch.no_grad():
        for p in net.parameters():
            p *= min(1.0, 6 / p.shape[-1] ** 0.5) if p.dim() > 1 else 1.0
    return net


def outcome(name, net):
    """What forward returns for x, with and without return_features, and all gradients of a loss of
    both.  -> {name: tensor}"""
    _, shape, more = CASES[name]
    x = normal(B, *shape, seed=2).requires_grad_()
    t, cond = torch.tensor([0.3, 0.8]), conditions(net)
    v = net(x, t, **cond, **more)
    h = net(x, t, **cond, **more, return_features=True)
    loss = (v * normal(*v.shape, seed=3)).sum() + (h * normal(*h.shape, seed=5)).sum()
    loss.backward()
    grads = {f"grad {k}": p.grad for k, p in net.named_parameters() if p.grad is not None}
    assert len(grads) > 10
    return {"v": v.detach(), "features": h.detach(), "grad x": x.grad, **grads}


def chain():
    """A student's sample goes through a fake: the gradient at the sample, and the student's."""
    student, fake = fill(dit(), 1), fill(dit(), 2).requires_grad_(False)
    return student, fake


def outcome_of_chain(student, fake):
    z, label = normal(B, 2, 10, 7, seed=6), torch.tensor([1, 3])
    x = z - student(z, torch.ones(B), label)
    x.retain_grad()
    h = fake(x, torch.full((B,), 0.4), label, return_features=True)
    (h * normal(*h.shape, seed=7)).sum().backward()
    grads = {f"grad {k}": p.grad for k, p in student.named_parameters() if p.grad is not None}
    return {"v": x.detach(), "grad x": x.grad, **grads}


def outcome_of_jvp(net):
    """mdt_dist's exact derivative, in forward mode."""
    x, v = normal(B, 2, 10, 7, seed=8), normal(B, 2, 10, 7, seed=9)
    cond = {"label": torch.tensor([1, 3])}
    return {"v": mdt_dist.exact_derivative(net, x, torch.tensor([0.3, 0.8]), v, cond)}


def linear_outcome(share=None):
    """linear_attention of 11 tokens, of which with a share each rank has its own."""
    q, k, v = (normal(B, 11, 2, 4, seed=s).double().requires_grad_() for s in range(3))
    w = normal(2, 4, 4, seed=4).double().requires_grad_()
    parts = (split_tokens(x, share) for x in (q, k, v))
    o = gather_tokens(linear_attention(*parts, w_q=w, w_k=w, share=share), share)
    (o * normal(*o.shape, seed=5)).sum().backward()
    return {"v": o.detach(), "grad x": q.grad, "grad k": k.grad, "grad v": v.grad, "grad w": w.grad}


def everything(sequence=None):
    """{"case: name": tensor} of one process, or of this rank of a sequence."""

    def spread(net):
        if sequence:
            use_sequence(net, sequence)
        return copy.deepcopy(net)  # a copy is spread alike

    found = {name: outcome(name, spread(build(name))) for name in CASES}
    found["chain"] = outcome_of_chain(*map(spread, chain()))
    found["jvp"] = outcome_of_jvp(spread(fill(dit(linear_layers=[1]))))
    found["linear attention"] = linear_outcome(share_of(sequence, 11))
    return {f"{case}: {name}": x for case, one in found.items() for name, x in one.items()}


# ---- what the ranks run --------------------------------------------------------------------------


def scales(sequence):
    """Gradients at x and at a of sum(w * gather(a * split(x))), N = 7, on this rank."""
    share = share_of(sequence, 7)
    x, a = torch.arange(1.0, 8).requires_grad_(), torch.tensor(2.0, requires_grad=True)
    y = gather_tokens(a * split_tokens(x, share, dim=0), share, dim=0)
    (y * torch.arange(7.0)).sum().backward()
    own = torch.tensor(share.sizes[share.rank])
    return {"scale: own": own, "scale: x": x.grad, "a": a.grad, "context": over_ranks(sequence)}


def over_ranks(sequence):
    """linear_attention_over_ranks: largest difference of o and of its gradients from one process.

    The ranks have 11 tokens in all, and each its own part of linear_outcome's loss.
    """
    share, whole = share_of(sequence, 11), linear_outcome()
    q, k, v = (share._own(normal(B, 11, 2, 4, seed=s).double(), 1) for s in range(3))
    x = [a.requires_grad_() for a in (q, k, v)]
    w = normal(2, 4, 4, seed=4).double().requires_grad_()
    o = linear_attention_over_ranks(*x, sequence.group, N=11, w_q=w, w_k=w)
    (o * share._own(normal(B, 11, 2, 4, seed=5), 1)).sum().backward()
    dist.all_reduce(w.grad, group=sequence.group)
    got = [o.detach(), *(a.grad for a in x), w.grad]
    expected = [share._own(whole[n], 1) for n in ("v", "grad x", "grad k", "grad v")]
    pairs = zip(got, [*expected, whole["grad w"]], strict=True)
    return torch.stack([(a - b).abs().max() for a, b in pairs]).max()


def test_context_parallel_function(spread):
    """One all-reduce of S and z: o and all gradients are those of one process."""
    assert all(rank["context"] < 1e-12 for rank in spread)


def networks_on_ranks(folder, ranks):
    """everything() and scales() on the first ranks, in a file of each."""
    group, rank = dist.new_group(range(ranks)), dist.get_rank()
    if rank < ranks:
        sequence = Sequence(group)
        found = {**everything(sequence), **scales(sequence)}
        for name, x in found.items():
            if ": grad" in name and not name.endswith(": grad x"):
                dist.all_reduce(x, group=group)  # as a trainer does
                x /= ranks
        save_file({k: v.contiguous() for k, v in found.items()}, f"{folder}/{ranks}-{rank}")
    dist.barrier()


def runs(folder):
    """{name: (script, flags)} of short runs with a teacher of two heads and 9 tokens."""
    shared = (
        f"--teacher {folder}/teacher --teacher_steps 2 --preview_samples 3 --max_train_steps 3 "
        "--checkpointing_steps 3 --preview_every 0 --lr_warmup_steps 0 --learning_rate 2e-5 "
    )
    fake = "--learning_rate_fake 4e-5 --fake_update_ratio 1 --ema_decay 0.5 "
    data = f"--data {folder}/data.safetensors "
    return {
        "dmd": (
            dmd,
            f"{shared}{fake}{data} --gan_weight 0.01 --regression_weight 0.3 --regression_pairs 5 "
            "--gradient_accumulation_steps 2",
        ),
        "phased_dmd": (
            phased_dmd,
            f"{shared}{fake} --student_steps 4 --phases 1 --lora_rank 2 --seed 1",
        ),
        "linvideo": (
            linvideo,
            f"{shared} --sampling_steps 3 --bank_size 6 --bank_batch 2 --target_layers 1 "
            "--objective adm --own_trajectories 4 --seed 1",
        ),
        "mdt_dist": (mdt_dist, f"{shared}{data} --student_steps 2 --derivative jvp"),
    }


def train_on_ranks(folder):
    """Every run, one after the other, in the same processes."""
    for name, (script, flags) in runs(folder).items():
        with contextlib.redirect_stdout(sys.stderr):
            own = ["--output_dir", f"{folder}/{name}-4", "--sequence_ranks", "2"]
            script.main([*flags.split(), *own, "--train_batch_size", "2"])


# ---- tests ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """What four ranks leave; also of three that share a sample with --long."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.manual_seed(0)
    net = fill(DiT(size=(6, 6), patch=(2, 2), channels=1, dim=64, depth=2, num_classes=3))
    save_network(net, network_config(net), str(folder / "teacher"))
    data = {"x0": normal(12, 1, 6, 6), "cond.label": torch.arange(12) % 3}
    save_file(data, str(folder / "data.safetensors"))
    sizes = [2, 3] if request.config.getoption("--long") else [2]
    done = launch(__file__, [folder, *sizes], ranks=4)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def one():
    return everything()


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.long)])
def spread(request, folder):
    """What every rank found.  -> list of {name: tensor}"""
    return [load_file(f"{folder}/{request.param}-{rank}") for rank in range(request.param)]


def test_outputs_and_gradients_are_those_of_one_process(one, spread):
    """<= 1e-5 of the values' size: outputs, features and x.grad on every rank, gradients of
    parameters in the mean over ranks.

    Gradients below a hundredth of a network's largest are differences of larger numbers (or zero in
    exact arithmetic, as of a bias of keys): they are compared on that scale.
    """
    assert len(one) > 500
    largest = {}
    for name, x in one.items():
        if ": grad" in name:
            case = name.split(":")[0]
            largest[case] = max(largest.get(case, 0.0), float(x.abs().max()))
    for name, x in one.items():
        size = float(x.abs().max())
        if ": grad" in name:
            size = max(size, largest[name.split(":")[0]] / 100)
        for rank in spread:
            assert rank[name].shape == x.shape
            assert float((rank[name] - x).abs().max()) <= 1e-5 * size, name


def test_scale_of_gradients(spread):
    """L = sum_i i (a x_i), i = 0 ... 6, x_i = i + 1: dL/dx_i = i a on every rank; of dL/da each
    rank has `ranks` times its own tokens' part, so that the mean over ranks is the sum."""
    ranks, first = len(spread), 0
    for rank in spread:
        n = int(rank["scale: own"])
        own = torch.arange(first, first + n).float()
        assert torch.equal(rank["scale: x"], 2 * torch.arange(7.0))
        assert rank["a"] == ranks * (own * (own + 1)).sum()
        first += n
    assert first == 7
    whole = torch.arange(7.0)
    assert sum(rank["a"] for rank in spread) / ranks == (whole * (whole + 1)).sum()


@pytest.mark.parametrize("name", list(runs("")))
def test_training_is_that_of_one_process(folder, name):
    """On four ranks, two of which share a sample, and in one process with twice a pair's batch.

    Weights after three updates are equal to 1e-5, where Adam moves them by 6e-5 and more; so are
    the norms of gradients, whose scale Adam would not show, to 5e-5 of them (the log has 6 digits).
    One weight in a thousand may be further off: where an update's gradient is rounding alone, which
    depends on the processor, Adam moves a weight as far as any other, in either direction.
    """
    script, flags = runs(folder)[name]
    script.main([*flags.split(), "--output_dir", f"{folder}/{name}-1", "--train_batch_size", "4"])
    ranks, one = (weights(folder / f"{name}-{n}") for n in (4, 1))
    assert ranks.keys() == one.keys()
    for key, w in one.items():
        off = (ranks[key].float() - w.float()).abs()
        assert int((off > 1e-5).sum()) <= off.numel() // 1000, key
        assert float(off.max()) <= 1.2e-4, key  # three updates of 2e-5, in opposite directions
    trained = "state fake." if "state fake.final.weight" in one else "state student."
    start = load_file(folder / "teacher" / WEIGHTS)
    assert max(float((one[trained + k] - w).abs().max()) for k, w in start.items()) > 4e-5
    pairs = list(zip(*(read_log(folder / f"{name}-{n}") for n in (4, 1))))
    assert len(pairs) == 3
    for a, b in pairs:
        norms = [column for column in a if column.startswith("norm")]
        assert norms
        for column in norms:
            assert float(a[column]) == pytest.approx(float(b[column]), rel=5e-5), column


# ---- what cannot be spread -----------------------------------------------------------------------


class Three:
    """A sequence of three ranks, without any."""

    group, ranks, rank = None, 3, 1


def spread_by_run(net):
    """What Run.spread_tokens does on the second of three ranks."""
    run = Run.__new__(Run)
    run.sequence = Three()
    run.spread_tokens(None, net)


@pytest.mark.parametrize(
    "net, why",
    [
        (RingMLP, "--sequence_ranks 3: a RingMLP cannot spread its tokens over ranks"),
        (
            lambda: structure(SLatFlowModel, patch_size=2, resolution=4, io_block_channels=[16]),
            "--sequence_ranks 3: a SLatFlowModel cannot spread its tokens over ranks",
        ),
        (
            lambda: DiT(dim=256, depth=1),
            "--sequence_ranks 3: 8 heads of a DiT cannot be shared by 3 ranks: use one of "
            "1, 2, 4, 8",
        ),
    ],
)
def test_networks_that_cannot(net, why):
    with pytest.raises(UserError) as error:
        spread_by_run(net())
    assert str(error.value) == why


def test_numbers_in_the_refusal_fit():
    """Also the network alone is left as it was."""
    net = DiT(dim=256, depth=1)
    with pytest.raises(ValueError):
        use_sequence(net, Three())
    assert net.sequence is None
    two = Three()
    two.ranks = 2
    use_sequence(net, two)
    assert net.sequence is two and copy.deepcopy(net).blocks[0].heads == 8
    use_sequence(net, None)
    assert net.sequence is None


def test_fewer_tokens_than_ranks():
    with pytest.raises(ValueError, match="2 tokens of a sample cannot be shared by 3 ranks"):
        Share(Three(), 2)
    assert Share(Three(), 11).sizes == [4, 4, 3]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for ranks in map(int, sys.argv[2:]):
        networks_on_ranks(sys.argv[1], ranks)
    train_on_ranks(sys.argv[1])
    os._exit(0)
