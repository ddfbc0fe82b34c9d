"""The space that a latent model lives in: an autoencoder, and a mean and a scale for each channel.

    x = pixels;  z = (normalise(encoder(x)) - mean) / std;  a generator sees z

The autoencoder (models/networks/autoencoders.py) brings its own shift and scale, in `normalise`. On
top of it a LatentSpace has a mean and a std for each latent channel, measured on the data
(--latent_norm of latent_fm.py), and it knows its files: autoencoder/ beside a run's student/.

    symbol      meaning                                                        shape
    x           pixels in [-1, 1]                                              (B, channels, H, W)
    z           what a generator sees                                          (B, C, H/f, W/f)
    mean, std   (normalised latent - mean) / std = z, one of each per channel  (C,)
"""

import hashlib
import os

import torch

from models.files import UserError, load_json, save_json
from models.networks import load_network, network_config, network_of, save_network
from models.networks.autoencoders import AutoencoderKL, Identity

BUILT_IN = ("identity", "pca")  # what latent_fm.py can do without an autoencoder's files


def vae_folder(folder):
    """A pipeline root with vae/ -> that folder; any other folder -> itself."""
    inside = os.path.join(folder, "vae")
    return inside if os.path.isdir(inside) else folder


def load_vae(folder, dtype=torch.float32):
    """The AutoencoderKL of a component folder, or of a pipeline root with vae/, in eval mode.

    Raises UserError.
    """
    vae, config = load_network(vae_folder(folder), dtype)
    if not isinstance(vae, AutoencoderKL):
        raise UserError(
            f"{folder} is a {config['_class_name']}, not an AutoencoderKL: give its pipeline's vae/"
        )
    return vae


class LatentSpace:
    """An autoencoder with a mean and a std for each latent channel.

    mean, std: (C,), or None for 0 and 1. folder: where the autoencoder's weights already are, so
    that `save` does not copy them; None if nowhere.
    """

    step, fps = 0, None  # it makes images; models/vaes.py has spaces of videos

    def __init__(self, autoencoder, mean=None, std=None, folder=None):
        self.autoencoder = autoencoder.eval().requires_grad_(False)
        self.mean, self.std, self.folder = mean, std, folder

    def digest(self, norm=True):
        """A short hash of the autoencoder's weights and, with norm, of mean and std.  -> str"""
        tensors = list(self.autoencoder.state_dict().values())
        tensors += [x for x in (self.mean, self.std) if norm and x is not None]
        digest = hashlib.sha256(repr(sorted(self.autoencoder.config.items(), key=str)).encode())
        for x in tensors:
            digest.update(x.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def trivial(self):
        """Whether z is x itself, so that a run needs to write no autoencoder/."""
        return isinstance(self.autoencoder, Identity) and self.mean is None

    @property
    def factor(self):
        """f: sides of the pixels over sides of the latent."""
        return self.autoencoder.factor

    @property
    def channels(self):
        """C, of z."""
        config = self.autoencoder.config
        return config.get("latent_channels", config.get("channels"))

    def pixel_shape(self, shape):
        """The shape of one item's pixels. shape: of its latent, (C, ...) -> (channels, ...)."""
        config = self.autoencoder.config
        channels = config.get("out_channels", config.get("channels"))
        return channels, *(self.factor * side for side in shape[1:])

    def to(self, device):
        self.autoencoder.to(device)
        return self

    def per_channel(self, v, z):
        """v (C,) -> (C, 1, ...), with z's dtype and device, to broadcast against z (B, C, ...)."""
        return v.to(z).reshape(-1, *[1] * (z.dim() - 2))

    @torch.no_grad()
    def own_moments(self, x):
        """Pixels x -> mean and standard deviation of the autoencoder's posterior, after its own
        normalise, before our mean and std: each (B, C, H/f, W/f)."""
        mean, logvar = self.autoencoder.posterior(x)
        z = self.autoencoder.normalise(mean)
        return z, self.autoencoder.normalise(mean + (logvar / 2).exp()) - z  # normalise is affine

    def moments(self, x):
        """Pixels x -> mean and standard deviation of the posterior of z, each (B, C, H/f, W/f)."""
        return self.normed(*self.own_moments(x))

    def normed(self, z, sd):
        """What own_moments gives -> what moments gives."""
        if self.mean is None:
            return z, sd
        std = self.per_channel(self.std, z)
        return (z - self.per_channel(self.mean, z)) / std, sd / std

    def to_latents(self, x, noise=None):
        """Pixels x -> a sample z of the posterior. noise: standard normal of z's shape, or None for
        the posterior's mean."""
        z, sd = self.moments(x)
        return z if noise is None else z + sd * noise

    @torch.no_grad()
    def to_pixels(self, z):
        """z -> pixels, in [-1, 1] up to overshoot: (B, channels, H, W)."""
        if self.mean is not None:
            z = z * self.per_channel(self.std, z) + self.per_channel(self.mean, z)
        return self.autoencoder.decode(self.autoencoder.denormalise(z))

    def measure_norm(self, batches, how):
        """Set mean and std from an iterable of what own_moments gives -> self.

        how: "none"; "scale", mean 0 and one std for all channels, as in LFM (2307.08698);
        "channel", a mean and a std for each channel. The std is that of samples, sd^2 of the
        posterior included.
        """
        self.mean = self.std = None
        if how == "none":
            return self
        n, total, square = 0, 0.0, 0.0
        for batch in batches:
            z, sd = (a.transpose(0, 1).flatten(1).double() for a in batch)  # (C, ...)
            n += z.shape[1]
            total = total + z.sum(1).cpu()
            square = square + (z.square() + sd.square()).sum(1).cpu()
        mean = total / n
        std = (square / n - mean**2).clamp_min(1e-12).sqrt()  # (C,)
        if how == "scale":
            mean, std = torch.zeros_like(mean), (square / n).mean().sqrt().expand_as(std).clone()
        self.mean, self.std = mean.float(), std.float()
        return self

    def describe(self):
        """One phrase for the log."""
        name = type(self.autoencoder).__name__
        normalised = "" if self.mean is None else ", normalised"
        return f"{name}, f = {self.factor}{normalised}"

    def save(self, folder):
        """Write autoencoder/: latents.json with mean, std and where the weights are, and the
        weights themselves if they are nowhere else."""
        os.makedirs(folder, exist_ok=True)
        if self.folder is None:
            save_network(self.autoencoder, network_config(self.autoencoder), folder)
        about = {
            "autoencoder": self.folder and os.path.abspath(self.folder),
            "mean": None if self.mean is None else self.mean.tolist(),
            "std": None if self.std is None else self.std.tolist(),
        }
        save_json(about, os.path.join(folder, "latents.json"))


def load_space(folder):
    """A folder that `save` wrote, or that of an AutoencoderKL -> LatentSpace. Raises UserError."""
    path = os.path.join(folder, "latents.json")
    if not os.path.isfile(path):
        folder = vae_folder(folder)
        return LatentSpace(load_vae(folder), folder=folder)
    about = load_json(path)
    remedy = "restore it, or train again"
    numbers = [about.get("mean"), about.get("std")]
    is_list = [isinstance(v, list) and len(v) > 0 for v in numbers if v is not None]
    if set(about) != {"autoencoder", "mean", "std"} or not all(is_list):
        raise UserError(f"{path} is not a latent space of ours: {remedy}")
    mean, std = (None if v is None else torch.tensor(v) for v in numbers)
    where = about["autoencoder"]
    if where and not os.path.isdir(where):
        raise UserError(
            f"{path} wants the autoencoder of {where}, which is not there: "
            "put it back, or name its new place in that file"
        )
    autoencoder = load_vae(where) if where else load_network(folder)[0]
    space = LatentSpace(autoencoder, mean, std, where)
    for v in (mean, std):
        if v is not None and len(v) != space.channels:
            raise UserError(
                f"{path} has numbers for {len(v)} channels, "
                f"its autoencoder has {space.channels}: {remedy}"
            )
    return space


def shape_in(folder, shape):
    """The shape of a latent of an image of this shape (C, H, W), by what `load_space` reads but
    weights. Raises UserError."""
    path, elsewhere = os.path.join(folder, "latents.json"), folder
    if os.path.isfile(path):  # of ours: the autoencoder is here, unless it says where
        elsewhere = load_json(path).get("autoencoder")
    if elsewhere:
        folder = vae_folder(elsewhere)
    with torch.device("meta"):
        net = network_of(folder)
    if not hasattr(net, "factor"):
        raise UserError(f"{folder} is a {type(net).__name__}, not an autoencoder: give its folder")
    channels = LatentSpace(net).channels
    return channels, *(side // net.factor for side in shape[1:])


def space_beside(student):
    """The latent space of a student's run, from autoencoder/ beside its folder; None for pixels.

    Raises UserError.
    """
    folder = os.path.join(os.path.dirname(os.path.abspath(student)), "autoencoder")
    return load_space(folder) if os.path.isfile(os.path.join(folder, "latents.json")) else None
