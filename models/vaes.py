"""The autoencoders of released teachers: from pixels to the latents that a teacher sees, and back.

    vae = load_autoencoder(FOLDER)        # a pipeline with vae/, that folder, or a run of ours
    z = vae.to_latents(x, noise)          # noise like z, or None for the posterior's mean
    x = vae.to_pixels(z)

    class of vae/            z, from the autoencoder's own latents     of which teachers
    AutoencoderKL            (latent - shift_factor) scaling_factor    Stable Diffusion, SDXL,
                                                                       PixArt, Z-Image, Lumina 2
    AutoencoderKLQwenImage   (latent - latents_mean) / latents_std     Qwen-Image, whose images are
                                                                       videos of one frame
    AutoencoderKLWan         (latent - latents_mean) / latents_std     Wan 2.1 and 2.2
    AutoencoderKLCogVideoX   latent scaling_factor                     CogVideoX

    symbol   meaning                                                    shape
    x        pixels in [-1, 1], of images or videos                     (B, 3, [F,] H, W)
    z        normalised latents                                         (B, C, [T,] H/f, W/f)

All numbers are those of the config: C is 4 or 16, f is 8; of Wan 2.2's 5B 48 and 16, its patches of
2 x 2 pixels included. F frames make T = 1 + (F - 1) / 4. Wan's decoder makes 4T - 3 frames of them
again. So does CogVideoX's where T is odd (F = 1, 9, 17, ..., 49); an even T becomes 4T frames, as
in its pipeline. AutoencoderKL is ours (models/networks/autoencoders.py), in a LatentSpace; the
others are diffusers'. All compute in float32, whatever their files are in: SDXL's overflows in
float16.
"""

import os
from pathlib import Path

import torch

from models.files import UserError, load_json
from models.libraries import device, load
from models.networks.latent_space import load_space

# By class: whether it makes videos.
AUTOENCODERS = {
    "AutoencoderKL": False,
    "AutoencoderKLQwenImage": False,
    "AutoencoderKLWan": True,
    "AutoencoderKLCogVideoX": True,
}


class DiffusersSpace:
    """An autoencoder of videos, with what a LatentSpace has.

    channels: C. factor: f. step: frames of pixels for each frame of z but the first, 0 where z are
    images, (B, C, H, W). fps: frames a second that the teacher makes, of images None.
    """

    def __init__(self, folder, name):
        """folder: the component's. name: its class, one of AUTOENCODERS.

        Raises UserError where diffusers is missing, and what it raises for files that do not fit.
        """
        parent, component = os.path.split(os.path.abspath(folder))
        self.vae = load("diffusers", name, parent, component, torch_dtype=torch.float32)
        c, self.step, self.fps = self.vae.config, 0, None
        if name == "AutoencoderKLCogVideoX":
            self.channels, self.factor = c.latent_channels, 2 ** (len(c.block_out_channels) - 1)
            self.step, self.fps = int(c.temporal_compression_ratio), 8
            mean, std = [0.0], [1 / c.scaling_factor]
        else:
            self.channels, self.factor = c.z_dim, self.vae.spatial_compression_ratio
            mean, std = c.latents_mean, c.latents_std
        if name == "AutoencoderKLWan":
            self.step, self.fps = c.scale_factor_temporal, 24 if self.channels == 48 else 16
        if len(mean) not in (1, self.channels) or len(std) != len(mean):
            raise ValueError(
                f"{folder}: latents_mean has {len(mean)} and latents_std {len(std)} numbers for "
                f"{self.channels} channels: restore its config.json"
            )
        self.mean, self.std = (
            torch.tensor(v, device=device()).view(-1, 1, 1, 1) for v in (mean, std)
        )

    @torch.no_grad()
    def to_latents(self, x, noise=None):
        """Pixels x -> a sample z of the posterior. noise: like z, or None for its mean.

        Images are (B, 3, H, W), also where the teacher makes videos.
        """
        law = self.vae.encode(x if x.dim() == 5 else x.unsqueeze(2)).latent_dist
        z, sd = (law.mean - self.mean) / self.std, law.std / self.std
        if noise is not None:
            z = z + sd * noise.reshape(z.shape)
        return z if self.step else z.squeeze(2)

    @torch.no_grad()
    def to_pixels(self, z):
        """z -> pixels x, within [-1, 1] or a little beyond."""
        latent = (z if self.step else z.unsqueeze(2)) * self.std + self.mean
        x = self.vae.decode(latent).sample
        return x if self.step else x.squeeze(2)


def places_of(folder):
    """Where a folder may have an autoencoder: pairs (path of an existing config, its class)."""
    root = Path(folder).resolve()
    run = root.parent if root.name == "student" else root
    for place in (root / "vae", root, run / "autoencoder"):
        if (place / "latents.json").is_file():
            yield place, "LatentSpace"
        elif (place / "config.json").is_file():
            yield place, str(load_json(place / "config.json").get("_class_name"))


def find_autoencoder(folder, flag="teacher"):
    """Where the autoencoder of a folder is, and its class, "LatentSpace" for one of a run of ours.

    folder: a pipeline, an autoencoder's own, or a run of ours or its student/. flag: the one that
    named it, for messages. -> path, name. Raises UserError.
    """
    known = ("LatentSpace", *AUTOENCODERS)
    likely = ((p, name) for p, name in places_of(folder) if p.name == "vae" or name in known)
    place, name = next(likely, (None, None))
    if place is None:
        fault = "has no autoencoder" if os.path.isdir(folder) else "is not a folder"
        raise UserError(
            f"--{flag} {folder} {fault}: pass a diffusers pipeline folder with vae/, a run of ours "
            "with autoencoder/, or the folder of an autoencoder"
        )
    if name not in known:
        raise UserError(
            f"--{flag} {folder}: its autoencoder is {name}, which is not known here: pass a folder "
            f"with {', '.join(AUTOENCODERS)}"
        )
    return str(place), name


def load_autoencoder(folder, flag="teacher"):
    """The autoencoder of a folder, on any GPU.  -> LatentSpace or DiffusersSpace

    folder, flag: of `find_autoencoder`. Raises UserError, also for files that are missing or
    broken.
    """
    place, name = find_autoencoder(folder, flag)
    try:
        if name in ("LatentSpace", "AutoencoderKL"):
            return load_space(place).to(device())
        return DiffusersSpace(place, name)
    except (OSError, ValueError, UserError) as error:  # of an incomplete folder
        raise UserError(f"--{flag} {folder}: {' '.join(str(error).split())}") from None


def latent_shape(space, size, frames=1):
    """The shape of z for pixels of this size (H, W).  -> (C, [T,] H/f, W/f)"""
    time = [1 + (frames - 1) // space.step] if space.step else []
    return space.channels, *time, *(side // space.factor for side in size)
