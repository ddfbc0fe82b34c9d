"""models/networks/dit.py: patches, rotary positions, initialisation, conditioning, swaps."""

import copy

import pytest
import torch
from helpers import dit_inputs as inputs
from helpers import perturbed
from helpers import small_dit as small

from models.networks import load_network
from models.networks.dit import HEAD_DIM, DiT, attention, axial_rope, patchify, rotate, unpatchify
from models.worlds import load_world


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- patches -------------------------------------------------------------------------------------

SIZES = [
    ((8, 12), (2, 3), 3),
    ((4, 6, 10), (1, 3, 2), 2),
    ((4, 4), (4, 4), 1),
    ((9,), (3,), 2),
    ((2, 4, 4, 2), (1, 2, 4, 2), 2),
]


@pytest.mark.parametrize("size, patch, channels", SIZES)
def test_unpatchify_inverts_patchify(size, patch, channels):
    """Patches of images, video and other grids go back bit for bit.

    There are prod(size) / prod(patch) of them.
    """
    x = normal(2, channels, *size)
    tokens = patchify(x, patch)
    per_patch = int(torch.tensor(patch).prod())
    assert tokens.shape == (2, int(torch.tensor(size).prod()) // per_patch, channels * per_patch)
    assert torch.equal(unpatchify(tokens, channels, size, patch), x)


def test_patches_are_the_picture_s_blocks_in_reading_order():
    """Token i * columns + j is block (i, j), channels first: in 2-D and in 3-D."""
    x = normal(1, 3, 4, 6)
    tokens = patchify(x, (2, 3))
    for i in range(2):
        for j in range(2):
            block = x[0, :, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3]
            assert torch.equal(tokens[0, 2 * i + j], block.flatten())
    x = normal(1, 2, 2, 4, 2)
    tokens = patchify(x, (1, 2, 1))
    assert torch.equal(tokens[0, 1 * 4 + 1 * 2 + 0], x[0, :, 1:2, 2:4, 0:1].flatten())


# ---- rotary positions ----------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(7,), (3, 4), (2, 3, 4)])
def test_rope_depends_on_the_difference_of_positions(grid):
    """q . k after rotation depends on the offset of the two patches, axis by axis, and on nothing
    else."""
    cos, sin = axial_rope(grid)
    N = int(torch.tensor(grid).prod())
    assert cos.shape == sin.shape == (N, 1, HEAD_DIM)
    q, k = (normal(1, 1, 1, HEAD_DIM, seed=s).expand(1, N, 1, -1) for s in (1, 2))
    scores = torch.einsum("bnhd,bmhd->nm", rotate(q, cos, sin), rotate(k, cos, sin))
    axes = torch.meshgrid(*[torch.arange(g) for g in grid], indexing="ij")
    where = torch.stack(axes, -1).reshape(N, -1)
    by_offset = {}
    for n in range(N):
        for m in range(N):
            offset = tuple((where[n] - where[m]).tolist())
            by_offset.setdefault(offset, []).append(scores[n, m].item())
    assert all(max(v) - min(v) < 1e-4 for v in by_offset.values())
    values = sorted(v[0] for v in by_offset.values())
    gaps = [b - a for a, b in zip(values[:-1], values[1:], strict=True)]
    assert min(gaps) > 1e-5  # no two offsets are confused


def test_rotation_keeps_norms_and_dtype():
    """rotate is orthogonal, the identity at position 0, and returns the dtype it was given."""
    cos, sin = axial_rope((3, 4))
    x = normal(2, 12, 2, HEAD_DIM)
    y = rotate(x, cos, sin)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[:, 0], x[:, 0]) and not torch.allclose(y[:, 5], x[:, 5])
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16


def test_rotation_is_that_of_complex_numbers():
    """The pairs (i, i + 16) turn as complex numbers do, by the angles of `axial_rope`."""
    cos, sin = axial_rope((3, 4))
    x = normal(2, 12, 2, HEAD_DIM)
    half = HEAD_DIM // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)[..., half:]
    torch.testing.assert_close(rotate(x, cos, sin), torch.cat([turned.real, turned.imag], -1))


def test_weights_of_the_tanh_gelu_still_fit():
    """The worlds' teachers were trained with the tanh form: their outputs change by 4e-5."""
    net = load_network(load_world("glyphs").teacher_folder())[0]
    x, t, label = normal(8, 3, 16, 16), torch.linspace(0.05, 1, 8), torch.arange(8) % 10
    with torch.no_grad():
        v = net(x, t, label)
        for block in net.blocks:
            block.mlp[1] = torch.nn.GELU(approximate="tanh")
        other = net(x, t, label)
    assert 0 < (v - other).norm() < 1e-4 * v.norm()


def test_attention_is_softmax_attention():
    """attention is softmax(q k^T / sqrt(32)) v, head by head."""
    q, k, v = (normal(2, 5, 3, HEAD_DIM, seed=s) for s in range(3))
    weight = torch.einsum("bnhd,bmhd->bhnm", q, k).div(HEAD_DIM**0.5).softmax(-1)
    torch.testing.assert_close(attention(q, k, v), torch.einsum("bhnm,bmhd->bnhd", weight, v))


# ---- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size, patch", [((6, 4), (3, 2)), ((2, 4, 4), (1, 2, 2))])
def test_a_new_network_outputs_zero(size, patch):
    """adaLN-Zero: each block starts as the identity; the output is exactly 0, in 2-D and 3-D."""
    net = small(size=size, patch=patch)
    x, t, label = inputs(net)
    v, features = net(x, t, label), net(x, t, label, return_features=True)
    assert v.shape == x.shape and not v.any()
    torch.testing.assert_close(features, net.embed(patchify(x, patch)) + net.position)


def test_skip_adds_a_gated_copy_of_the_input():
    """skip(t) x_t joins the output per channel: in an otherwise new network it is the output."""
    net = small()
    x, t, label = inputs(net)
    with torch.no_grad():
        net.skip.bias.copy_(torch.tensor([2.0, -0.5]))
    torch.testing.assert_close(net(x, t, label), x * torch.tensor([2.0, -0.5])[:, None, None])
    perturbed(net.skip)
    gate = net(x, t, label) / x  # (B, C, H, W): one number per sample and channel
    torch.testing.assert_close(gate, gate[:, :, :1, :1].expand_as(gate), rtol=1e-4, atol=1e-5)
    assert (gate[:-1, :, 0, 0] != gate[1:, :, 0, 0]).all()


def test_every_weight_gets_a_gradient_once_perturbed():
    """No dead parameters: with nothing at zero, each tensor of the network receives a gradient."""
    net = perturbed(small(steps_cond=True))
    x, t, label = inputs(net)
    net(x, t, label, steps=torch.full((5,), 2)).square().mean().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_output_depends_on_time_label_and_place():
    """t, the label and the position of a patch all reach the output."""
    net = perturbed(small())
    x, t, label = inputs(net)
    v = net(x, t, label)
    assert (net(x, t * 0.9, label) != v).flatten(1).any(1).all()
    assert (net(x, t, (label + 1) % 3) != v).flatten(1).any(1).all()
    # With the same content everywhere, a network without positions would give equal patches.
    with torch.no_grad():
        tokens = patchify(net(torch.ones_like(x), t, label), net.patch)
    assert not torch.allclose(tokens[:, 0], tokens[:, 1], atol=1e-4)


def test_samples_of_a_batch_do_not_mix():
    """Row i of the output is the output for row i alone."""
    net = perturbed(small())
    x, t, label = inputs(net)
    alone = net(x[2:3], t[2:3], label[2:3])
    torch.testing.assert_close(net(x, t, label)[2:3], alone, rtol=1e-4, atol=1e-5)


def test_no_label_is_the_null_label():
    """label None and label K are the same; a network without classes ignores labels."""
    net = perturbed(small())
    x, t, label = inputs(net)
    assert torch.equal(net(x, t), net(x, t, torch.full((5,), 3)))
    assert not torch.equal(net(x, t), net(x, t, label))
    net = perturbed(small(num_classes=0))
    assert torch.equal(net(x, t), net(x, t, label))


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_features_are_the_middle_block_s_tokens(depth):
    """return_features gives the output that block depth // 2 has in a full pass, (B, N, D)."""
    net = perturbed(small(depth=depth))
    x, t, label = inputs(net)
    kept = []
    net.blocks[depth // 2].register_forward_hook(lambda module, args, output: kept.append(output))
    v = net(x, t, label)
    features = net(x, t, label, return_features=True)
    assert v.shape == x.shape and features.shape == (5, 4, 64)
    assert torch.equal(features, kept[0])


def test_steps_start_without_effect_but_with_a_gradient():
    """`steps` is zero-initialised: at first it changes nothing in a network, and it can be
    learned."""
    net = small(steps_cond=True)
    for name, module in net.named_children():
        if name != "steps":
            perturbed(module)
    x, t, label = inputs(net)
    v = net(x, t, label)
    for n in (1, 4, 50):
        assert torch.equal(net(x, t, label, steps=torch.full((5,), n)), v)
    net(x, t, label, steps=torch.full((5,), 4)).square().mean().backward()
    assert net.steps.weight.grad.any() and net.steps.bias.grad.any()
    with torch.no_grad():
        perturbed(net.steps)
        one, four = (net(x, t, label, steps=torch.full((5,), n)) for n in (1, 4))
    assert not torch.allclose(one, four)


def test_gradient_checkpointing_changes_nothing():
    """Recomputing blocks gives the same output, features and gradients.

    Also those through a frozen network into its input.
    """
    net = perturbed(small())
    other = copy.deepcopy(net)
    other.gradient_checkpointing = True
    x, t, label = inputs(net)
    grads = []
    for n in (net, other):
        y = x.clone().requires_grad_(True)
        v, features = n(y, t, label), n(y, t, label, return_features=True)
        (v.square().mean() + features.mean()).backward()
        n_frozen = copy.deepcopy(n).requires_grad_(False)
        n_frozen.gradient_checkpointing = n.gradient_checkpointing
        z = x.clone().requires_grad_(True)
        n_frozen(z, t, label).sum().backward()
        grads.append([v, y.grad, z.grad, *(p.grad for p in n.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_swapped_attention_is_used():
    """The `attend` of one block can be set: it is called with (B, N, H, 32), and its result is
    used."""
    net = perturbed(small())
    x, t, label = inputs(net)
    v, shapes = net(x, t, label), []

    def mean_attention(q, k, v):
        shapes.append((q.shape, k.shape, v.shape))
        return v.mean(1, keepdim=True).expand_as(v)

    net.blocks[1].attend = mean_attention
    assert not torch.allclose(net(x, t, label), v)
    assert shapes == [((5, 4, 2, HEAD_DIM),) * 3]
    net.blocks[1].attend = attention
    assert torch.equal(net(x, t, label), v)


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(dim=48), "multiple of 32"),
        (dict(size=(6, 5)), "divisible"),
        (dict(size=(6, 4, 2)), "divisible"),
        (dict(patch=(3,)), "divisible"),
    ],
)
def test_impossible_sizes_are_refused(changes, word):
    """Widths and patches that do not fit raise ValueError when the network is built."""
    with pytest.raises(ValueError, match=word):
        small(**changes)


def test_wrong_inputs_are_refused():
    """An input of another shape, or `steps` for a network without them, raises ValueError that
    states what was expected."""
    net = small()
    x, t, label = inputs(net)
    for wrong in (x[:, :1], x[:, :, :3], x[..., None], x.transpose(2, 3)):
        with pytest.raises(ValueError, match=r"\(B, 2, 6, 4\)"):
            net(wrong, t, label)
    for wrong in (t[:1], t[0], torch.arange(5)):
        with pytest.raises(ValueError, match=r"pass floats in \[0, 1\] of shape \(5,\)"):
            net(x, wrong, label)
    for wrong in (label[:1], label.float()):
        with pytest.raises(ValueError, match=r"pass classes 0 to 3, integers of shape \(5,\)"):
            net(x, t, wrong)
    with pytest.raises(ValueError, match="steps_cond"):
        net(x, t, label, steps=torch.ones(5))


def test_config_rebuilds_the_network():
    """DiT(**net.config) has the same names and shapes of parameters, and takes the same state."""
    names = ["a", "b", "c"]
    net = perturbed(small(steps_cond=True, cond_dim=24, world="glyphs", class_names=names))
    again = DiT(**net.config)
    again.load_state_dict(net.state_dict())
    x, t, label = inputs(net)
    assert torch.equal(net(x, t, label), again(x, t, label)) and again.config == net.config
