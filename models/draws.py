"""Random numbers that belong to samples, not to ranks.

A row's numbers depend on the seed, the step, the name and the row's place in the whole batch of all
ranks, and on nothing else: one process with a batch of 8 draws what two ranks with 4 draw, and a
resumed run draws what the interrupted one would have drawn. Two names are independent.
"""

import zlib

import torch

from models.diffusion import shift, unshift


def stable_hash(*key):
    """crc32 of the key's text: the same in every process, unlike Python's hash."""
    return zlib.crc32(repr(key).encode())


class Draws:
    """Random numbers of one update, a function of seed, step, inner update, name and global row.

    rows:            global numbers of this rank's rows.
    device:          where the numbers go. Integers are indices into data in the host's memory, so
                     they stay on the CPU.
    shape:           that of one sample, for `noise` and `eps_t`.
    timestep_shift:  the teacher's, for `eps_t`.
    total:           how many rows all ranks have together in this update, for `spread`; None: these
                     are all of them.
    """

    def __init__(
        self, seed, step, inner, rows, device="cpu", shape=None, timestep_shift=1.0, total=None
    ):
        self.key, self.rows, self.device = (seed, step, inner), list(rows), torch.device(device)
        self.shape, self.timestep_shift = shape, timestep_shift
        self.total = total or max(self.rows) + 1

    def _generator(self, *key):
        return torch.Generator().manual_seed(stable_hash(*self.key, *key))

    def _rows(self, name, shape, dtype, fill):
        out, generator = torch.empty(len(self.rows), *shape, dtype=dtype), torch.Generator()
        prefix = stable_hash(*self.key, name)
        for row, view in zip(self.rows, out.unbind(0), strict=True):
            generator.manual_seed(zlib.crc32(b"%d" % row, prefix))  # continues the prefix's crc32
            fill(view, generator)
        return out

    def to_device(self, x):
        """Without waiting for the device: pinned memory is copied while the processor goes on."""
        if self.device.type == "cuda":
            return x.pin_memory().to(self.device, non_blocking=True)
        return x.to(self.device)

    def normal(self, name, shape):
        """(rows, *shape) standard normal, float32."""
        x = self._rows(name, shape, torch.float32, lambda v, g: v.normal_(generator=g))
        return self.to_device(x)

    def points(self, name, counts, channels):
        """(sum of counts, channels) standard normal, float32: counts[i] points for row i."""
        parts = [
            torch.randn(n, channels, generator=self._generator(name, row))
            for row, n in zip(self.rows, counts, strict=True)
        ]
        return self.to_device(torch.cat(parts))

    def uniform(self, name, low=0.0, high=1.0):
        """(rows,) float32."""
        x = self._rows(name, (), torch.float32, lambda v, g: v.uniform_(low, high, generator=g))
        return self.to_device(x)

    def spread(self, name, low=0.0, high=1.0):
        """(rows,) float32, each uniform in [low, high), and evenly spread over it together.

        The rows of all ranks divide [low, high) into `total` equal parts, in an order that is drawn
        anew for every name, and stand at the same place within their parts (Variational Diffusion
        Models, 2107.00630 App. I.1). It is meant for noise levels: a batch that covers them evenly
        gives a gradient with the same mean and less variance. Two names are independent.
        """
        return self.to_device(self._spread(name, low, high))

    def _spread(self, name, low, high):
        generator = self._generator(name)
        place = torch.rand((), dtype=torch.float64, generator=generator)
        part = torch.randperm(self.total, generator=generator)[torch.tensor(self.rows)]
        return (low + (high - low) * (part + place) / self.total).float()

    def integer(self, name, high):
        """(rows,) int64 in [0, high), on the CPU."""
        return self._rows(name, (), torch.int64, lambda v, g: v.random_(0, high, generator=g))

    def spread_integer(self, name, high):
        """(rows,) int64 in [0, high), evenly spread over the batch as in `spread`, on the CPU."""
        return (self._spread(name, 0.0, 1.0) * high).long().clamp_max(high - 1)

    def steps(self, N, one):
        """The student's step k of each row, in [0, N), on the CPU: spread evenly over the batch,
        or with `one` a single step for all rows of all ranks.  (rows,) int64."""
        if one:
            return torch.full((len(self.rows),), self.agreed("k", N))
        return self.spread_integer("k", N)

    def after(self):
        """The draws of the same rows in the next update."""
        seed, step, inner = self.key
        key = seed, step + 1, inner
        return Draws(*key, self.rows, self.device, self.shape, self.timestep_shift, self.total)

    def on_cpu(self):
        """The same draws, left on the CPU: for what decides about control flow or indices."""
        return Draws(*self.key, self.rows, "cpu", self.shape, self.timestep_shift, self.total)

    def agreed(self, name, high):
        """One int in [0, high), the same for every row and on every rank."""
        return int(torch.randint(0, high, (), generator=self._generator(name)))

    # ---- what a training step asks for

    def noise(self, name="z"):
        """Standard normal noise of the samples' shape.  (rows, *shape)."""
        return self.normal(name, self.shape)

    def eps_t(self, name="", low=0.0, high=1.0):
        """A noise and a noise level for every row, the level's range stated before the shift.

        -> eps (rows, *shape), t = shift(u) (rows,) with u ~ U[low, high) by `spread`.
        """
        u = self.spread("u" + name, low, high)
        return self.normal("eps" + name, self.shape), shift(u, self.timestep_shift)

    def eps_t_within(self, name, t_low, t_high):
        """The same with a range that is stated in t: u is uniform where t_low <= t <= t_high.

        Shifted by 5, a range of [.02, .98] in u would be [.093, .996] in t.
        """
        s = self.timestep_shift
        eps, t = self.eps_t(name, unshift(t_low, s), unshift(t_high, s))
        return eps, t.clamp(t_low, t_high)  # no further than rounding
