"""Where a latent model lives: an autoencoder, and one mean and scale for each latent channel.

    Identity     pixels themselves (f = 1)
    PatchPCA     principal components of square patches: linear, orthonormal, made in a second from a few thousand images
    AutoencoderKL of models/vae.py, Stable Diffusion's

All three have posterior(x) -> mean, logvar; decode(latent); normalise and denormalise, between the autoencoder's own latents and
about unit variance. A LatentSpace puts per-channel numbers measured on the data on top (--latent_norm) and knows its files:
autoencoder/ beside a run's student/.

    symbol      meaning                                               shape
    x           pixels in [-1, 1]                                     (B, channels, H, W)
    z           what a generator sees                                 (B, C, H/f, W/f)
    mean, std   (normalised latent - mean) / std = z, one a channel   (C,)
"""
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

from models import io
from models.vae import load_vae

NO_NOISE = -30.0  # log-variance of an encoder that adds none


class Identity(nn.Module):
    """No autoencoder: x (B, channels, ...) is its own latent."""

    factor = 1

    def __init__(self, channels=3):
        super().__init__()
        self.config = dict(channels=channels)

    def posterior(self, x):
        return x, torch.full_like(x, NO_NOISE)

    def decode(self, latent):
        return latent

    def normalise(self, latent):
        return latent

    denormalise = normalise


class PatchPCA(nn.Module):
    """The `latent_channels` leading principal components of patches of channels x patch x patch pixels.

    latent = W (p - m) for each patch p, with orthonormal rows W; decode is W^T latent + m. So D E D = D, E D = 1, and D E is the
    orthogonal projection with the least mean square error among all of this rank. Raises ValueError for more components than pixels.
    """

    def __init__(self, channels=3, patch=4, latent_channels=12):
        super().__init__()
        self.config = dict(channels=channels, patch=patch, latent_channels=latent_channels)
        self.factor, dim = patch, channels * patch**2
        if not 1 <= latent_channels <= dim:
            raise ValueError(f"a patch of {channels} x {patch} x {patch} pixels has 1 to {dim} components, not {latent_channels}")
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("rows", torch.zeros(latent_channels, dim))
        self.register_buffer("variances", torch.zeros(dim))  # all eigenvalues; the sum of those not kept is Delta^2 of a patch

    @torch.no_grad()
    def fit(self, x):
        """One eigen-decomposition of the patches of x (n, channels, H, W).  -> self.  Raises ValueError for sides that do not divide."""
        p = self.patches(x).movedim(1, -1).flatten(0, -2).double()  # (n h w, dim)
        centre = p.mean(0)
        values, vectors = torch.linalg.eigh((p - centre).T @ (p - centre) / len(p))  # ascending
        rows = vectors.flip(1).T[:self.config["latent_channels"]]
        rows = rows * rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()  # a sign that does not depend on the machine
        self.centre.copy_(centre), self.rows.copy_(rows), self.variances.copy_(values.flip(0).clamp_min(0))
        return self

    def patches(self, x):
        """x (B, channels, H, W) -> (B, dim, H/f, W/f).  Raises ValueError for a wrong shape."""
        if x.dim() != 4 or x.shape[1] != self.config["channels"] or any(s % self.factor for s in x.shape[2:]):
            raise ValueError(f"x is {tuple(x.shape)}; patches of {self.factor} need (B, {self.config['channels']}, H, W) with sides that divide by it")
        return F.pixel_unshuffle(x, self.factor)

    def posterior(self, x):
        p = self.patches(x) - self.centre.to(x)[:, None, None]
        mean = torch.einsum("cd,bdhw->bchw", self.rows.to(x), p)
        return mean, torch.full_like(mean, NO_NOISE)

    def decode(self, latent):
        p = torch.einsum("cd,bchw->bdhw", self.rows.to(latent), latent) + self.centre.to(latent)[:, None, None]
        return F.pixel_shuffle(p, self.factor)

    def normalise(self, latent):
        return latent

    denormalise = normalise


class LatentSpace:
    """An autoencoder with its per-channel mean and std. `folder`: where its weights already lie, so that a run does not copy them."""

    def __init__(self, autoencoder, mean=None, std=None, folder=None):
        self.autoencoder, self.folder = autoencoder.eval().requires_grad_(False), folder
        self.mean, self.std = mean, std  # (C,) or None = 0 and 1

    @property
    def trivial(self):
        """Whether z is x: then a run writes no autoencoder/."""
        return isinstance(self.autoencoder, Identity) and self.mean is None

    @property
    def factor(self):
        return self.autoencoder.factor

    def to(self, device):
        self.autoencoder.to(device)
        return self

    def per_channel(self, v, z):
        return v.to(z).reshape(-1, *[1] * (z.dim() - 2))

    @torch.no_grad()
    def own_moments(self, x):
        """Pixels x -> mean and standard deviation of the autoencoder's posterior, normalised as it says, without our mean and std."""
        mean, logvar = self.autoencoder.posterior(x)
        z = self.autoencoder.normalise(mean)
        return z, self.autoencoder.normalise(mean + (logvar / 2).exp()) - z  # normalise is affine

    def moments(self, x):
        """Pixels x -> mean and standard deviation of the posterior of z, each (B, C, H/f, W/f)."""
        return self.normed(*self.own_moments(x))

    def normed(self, z, sd):
        """own_moments -> moments."""
        if self.mean is None:
            return z, sd
        std = self.per_channel(self.std, z)
        return (z - self.per_channel(self.mean, z)) / std, sd / std

    def to_latents(self, x, noise=None):
        """Pixels -> z; noise: standard normal of z's shape, or None for the posterior's mean."""
        z, sd = self.moments(x)
        return z if noise is None else z + sd * noise

    @torch.no_grad()
    def to_pixels(self, z):
        """z -> pixels, in [-1, 1] up to overshoot."""
        if self.mean is not None:
            z = z * self.per_channel(self.std, z) + self.per_channel(self.mean, z)
        return self.autoencoder.decode(self.autoencoder.denormalise(z))

    def measure_norm(self, batches, how):
        """Set mean and std from batches of own_moments. how: "none", "scale" (one std for all channels, mean 0: the paper's kind), "channel"."""
        self.mean = self.std = None
        if how == "none":
            return self
        n, total, square = 0, 0.0, 0.0
        for batch in batches:
            z, sd = (a.transpose(0, 1).flatten(1).double() for a in batch)  # (C, ...)
            n, total, square = n + z.shape[1], total + z.sum(1).cpu(), square + (z.square() + sd.square()).sum(1).cpu()
        mean = total / n
        std = (square / n - mean**2).clamp_min(1e-12).sqrt()  # (C,)
        if how == "scale":
            mean, std = torch.zeros_like(mean), (square / n).mean().sqrt().expand_as(std).clone()
        self.mean, self.std = mean.float(), std.float()
        return self

    def describe(self):
        name = type(self.autoencoder).__name__
        return f"{name}, f = {self.factor}" + ("" if self.mean is None else ", normalised")

    def save(self, folder):
        """autoencoder/: latents.json with the numbers and where the weights are, and the weights themselves where they lie nowhere else."""
        os.makedirs(folder, exist_ok=True)
        if self.folder is None:
            io.save_network(self.autoencoder, io.network_config(self.autoencoder), folder)
        numbers = {k: None if v is None else v.tolist() for k, v in (("mean", self.mean), ("std", self.std))}
        io.save_json({"autoencoder": self.folder and os.path.abspath(self.folder), **numbers}, os.path.join(folder, "latents.json"))


def load_space(folder):
    """A folder that `save` wrote, or the folder of an AutoencoderKL -> LatentSpace. Raises UserError."""
    path = os.path.join(folder, "latents.json")
    if not os.path.isfile(path):
        folder = os.path.join(folder, "vae") if os.path.isdir(os.path.join(folder, "vae")) else folder
        return LatentSpace(load_vae(folder), folder=folder)
    about = io.load_json(path)
    if set(about) != {"autoencoder", "mean", "std"} or any(v is not None and (not isinstance(v, list) or not v) for v in (about["mean"], about["std"])):
        raise io.UserError(f"{path} is not a latent space of ours: restore it, or train again")
    mean, std = (None if v is None else torch.tensor(v) for v in (about["mean"], about["std"]))
    where = about["autoencoder"]
    if where and not os.path.isdir(where):
        raise io.UserError(f"{path} wants the autoencoder of {where}, which is not there: put it back, or name its new place in that file")
    autoencoder = load_vae(where) if where else io.load_network(folder)[0]
    channels = autoencoder.config.get("latent_channels", autoencoder.config.get("channels"))
    for v in (mean, std):
        if v is not None and len(v) != channels:
            raise io.UserError(f"{path} has numbers for {len(v)} channels, its autoencoder has {channels}: restore it, or train again")
    return LatentSpace(autoencoder, mean, std, where)


def space_beside(student):
    """The latent space of a student's run: autoencoder/ beside its folder, or None for a pixel model. Raises UserError."""
    folder = os.path.join(os.path.dirname(os.path.abspath(student)), "autoencoder")
    return load_space(folder) if os.path.isfile(os.path.join(folder, "latents.json")) else None
