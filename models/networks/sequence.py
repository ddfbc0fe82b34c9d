"""Sequence parallelism: the tokens of one sample spread over several ranks.

    use_sequence(net, Sequence(group))    # a process group; None: every rank has all tokens
    v = net(x, t, **cond)                 # on every rank of the group, with the same samples

Every rank passes the same x and gets the whole result. In between it has n of the N tokens, its
`Share`, and layers that treat each token by itself need no more. Two kinds of layers mix tokens:

    softmax attention    an all-to-all turns q, k, v (B, n, H, D) into (B, N, H / ranks, D): all
                         tokens of some heads. Another one turns the output back (Ulysses,
                         2309.14509). So the number of ranks must divide that of the heads.
    linear attention     its two sums over keys, S and z, are added up by one all-reduce

Cross-attention needs neither: each rank has its own queries and the whole context.

Gradients. Let every rank compute the same loss L from the whole result. Behind `gather_tokens` each
rank then has the gradient of L. Between `split_tokens` and `gather_tokens` it has `ranks` times the
part of it that passes through its own tokens:

    backward of gather_tokens    ranks * the own part: the mean of a parameter's gradients over
                                 ranks, which a trainer takes anyway, is the sum of these parts
    backward of split_tokens     the parts of all ranks, put together, / ranks: the gradient of L

So for every parameter, wherever it stands, the mean over ranks is the gradient of one process, and
x gets the gradient of L itself on every rank. A tensor that enters between the two on its own, such
as a prompt, gets a gradient that is right only in the mean over ranks.

Symbols: B batch, N tokens of a sample, n tokens of this rank, H heads, D head size.
"""

import math
from functools import partial

import torch
import torch.distributed as dist

# ---- who has which tokens ------------------------------------------------------------------------


class Sequence:
    """The ranks of a process group, among which tokens are spread. A copy is the object itself."""

    def __init__(self, group):
        self.group, self.ranks = group, dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    def __deepcopy__(self, memo):
        return self  # a copy of a network has its tokens on the same ranks


class Share:
    """Which of N tokens this rank has: consecutive ones, on the first ranks perhaps one more.

    `heads`, `tokens` and `sum` are what attention calls. They can be differentiated, also in
    forward mode. Raises ValueError for fewer tokens than ranks.
    """

    def __init__(self, sequence, N):
        self.group, self.ranks, self.rank, self.N = sequence.group, sequence.ranks, sequence.rank, N
        if N < self.ranks:
            raise ValueError(
                f"{N} tokens of a sample cannot be shared by {self.ranks} ranks: use at most {N}"
            )
        self.sizes = [N // self.ranks + (rank < N % self.ranks) for rank in range(self.ranks)]

    def heads(self, x):
        """(..., n, H, D) of own tokens and all heads -> (..., N, H / ranks, D)."""
        return Across.apply(x, self._to_heads, self._to_tokens)

    def tokens(self, x):
        """Inverse of heads."""
        return Across.apply(x, self._to_tokens, self._to_heads)

    def sum(self, x):
        """x added up over the ranks."""
        return Across.apply(x, self._sum, self._sum)

    # ---- communication, without gradients

    def _own(self, x, dim):
        """This rank's part of N tokens on axis dim."""
        return x.narrow(dim, sum(self.sizes[: self.rank]), self.sizes[self.rank]).clone()

    def _whole(self, x, dim):
        """All N tokens on axis dim, of which x is this rank's part."""
        shape = list(x.shape)
        shape[dim] = self.sizes[0] - x.shape[dim]  # what this part is shorter than the longest
        x = torch.cat([x, x.new_zeros(shape)], dim).contiguous()
        parts = [torch.empty_like(x) for _ in self.sizes]
        dist.all_gather(parts, x, group=self.group)
        return torch.cat([p.narrow(dim, 0, n) for p, n in zip(parts, self.sizes)], dim)

    def _to_heads(self, x):
        parts = x.chunk(self.ranks, dim=-2)  # each (..., n, H / ranks, D)
        lead, (h, D) = x.shape[:-3], parts[0].shape[-2:]
        return torch.cat(self._exchange(parts, [(*lead, n, h, D) for n in self.sizes]), dim=-3)

    def _to_tokens(self, x):
        parts = x.split(self.sizes, dim=-3)  # each (..., its n, H / ranks, D)
        own = parts[self.rank].shape
        return torch.cat(self._exchange(parts, [own] * self.ranks), dim=-2)

    def _exchange(self, parts, shapes):
        """parts[i] goes to rank i.  -> what each rank sent here, tensors of these shapes."""
        sizes, from_others = [p.numel() for p in parts], [math.prod(s) for s in shapes]
        sent, received = (parts[0].new_empty(sum(n)) for n in (sizes, from_others))
        for place, part in zip(sent.split(sizes), parts):
            place.view(part.shape).copy_(part)
        dist.all_to_all_single(received, sent, from_others, sizes, group=self.group)
        return [r.view(shape) for r, shape in zip(received.split(from_others), shapes)]

    def _sum(self, x):
        x = x.contiguous().clone()
        dist.all_reduce(x, group=self.group)
        return x


class Across(torch.autograd.Function):
    """A linear map across ranks. there(x) is its value, and back(g) what its gradient becomes."""

    @staticmethod
    def forward(x, there, back):
        return there(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.there, ctx.back = inputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return ctx.back(g), None, None

    @staticmethod
    def jvp(ctx, dx, *_):
        return ctx.there(dx)


# ---- what a network calls ------------------------------------------------------------------------


def refuse_spreading(net, n):
    """Raises ValueError for a network whose tokens n ranks cannot share."""
    if not any(hasattr(m, "sequence") for m in net.modules()):
        raise ValueError(f"a {type(net).__name__} cannot spread its tokens over ranks")
    counts = {m.heads for m in net.modules() if hasattr(m, "heads")}
    if any(heads % n for heads in counts):
        heads = math.gcd(*counts)
        fitting = ", ".join(str(m) for m in range(1, heads + 1) if heads % m == 0)
        raise ValueError(
            f"{heads} heads of a {type(net).__name__} cannot be shared by {n} ranks: use one of "
            f"{fitting}"
        )


def use_sequence(net, sequence):
    """Spread the tokens of net, or of the networks in it, over these ranks; None: no longer.

    Raises ValueError for a network that cannot, and for ranks that its heads do not suit.
    """
    refuse_spreading(net, sequence.ranks if sequence else 1)
    for m in net.modules():
        if hasattr(m, "sequence"):
            m.sequence = sequence


def share_of(sequence, N):
    """This rank's Share of N tokens, or None where it has them all."""
    return Share(sequence, N) if sequence else None


def split_tokens(h, share, dim=1):
    """h, which is the same on all ranks, with N tokens on axis dim -> this rank's n tokens."""
    if share is None:
        return h
    whole = partial(share._whole, dim=dim)
    return Across.apply(h, partial(share._own, dim=dim), lambda g: whole(g) / share.ranks)


def gather_tokens(h, share, dim=1):
    """This rank's n tokens on axis dim -> the N tokens of all ranks, the same on each of them."""
    if share is None:
        return h
    own = partial(share._own, dim=dim)
    return Across.apply(h, partial(share._whole, dim=dim), lambda g: own(g) * share.ranks)
