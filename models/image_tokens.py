"""Pictures of objects as TRELLIS sees them: DINOv2's tokens, through the optional transformers."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn

from models.files import UserError
from models.libraries import load_pretrained, require
from models.plumbing.images import eight_bits

DINOV2 = "facebook/dinov2-with-registers-large"
SIDE, LANCZOS = 518, Image.Resampling.LANCZOS  # pixels: 37 x 37 patches of 14


def prepare_image(image):
    """A PIL image as TRELLIS prepares it for DINOv2 -> uint8 (3, 518, 518), RGB.

    With transparency: the square around the opaque part, 1.2 times as large, on black. Without:
    the whole image, stretched to a square (TRELLIS first removes the background with rembg, so do
    that before). Raises ValueError if nothing is opaque, and for pixels that `eight_bits` cannot
    place.
    """
    image = eight_bits(ImageOps.exif_transpose(image))
    transparency = "A" in image.getbands() or "transparency" in image.info
    image = image.convert("RGBA" if transparency else "RGB")
    if image.mode == "RGBA" and image.getextrema()[3][0] < 255:
        y, x = (np.asarray(image)[..., 3] > 0.8 * 255).nonzero()
        if not len(x):
            raise ValueError("nothing in it is opaque")
        half = int(1.2 * max(np.ptp(x), np.ptp(y))) // 2
        middle = (x.min() + x.max()) / 2, (y.min() + y.max()) / 2
        box = tuple(float(m + side * half) for side in (-1, 1) for m in middle)
        rgba = np.asarray(image.crop(box).resize((SIDE, SIDE), LANCZOS), np.float32) / 255
        pixels = (rgba[..., :3] * rgba[..., 3:] * 255).astype(np.uint8)
    else:
        pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE), LANCZOS))
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


class ImageTokens:
    """DINOv2 with registers: pictures to tokens, on one device and without gradient.

    tokens = ImageTokens(dinov2, device)(pixels)       # uint8 (B, 3, 518, 518) -> (B, 1374, 1024)

    dinov2: a transformers folder, or a name that is downloaded. Tokens are float32: class token, 4
    registers, 37 x 37 patches row by row, taken before the model's last norm and normalised without
    weights. Raises UserError where transformers or the folder is missing.
    """

    def __init__(self, dinov2, device):
        library = require("transformers")
        try:
            model = load_pretrained(
                library.Dinov2WithRegistersModel, dinov2, torch_dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise UserError(f"--dinov2 {dinov2} cannot be loaded: {error}") from None
        model.layernorm = nn.Identity()
        self.model, self.width = model.requires_grad_(False).to(device), model.config.hidden_size
        self.device = torch.device(device)
        self.mean = torch.tensor((0.485, 0.456, 0.406), device=device)[:, None, None]  # ImageNet's
        self.std = torch.tensor((0.229, 0.224, 0.225), device=device)[:, None, None]
        patches = (SIDE // model.config.patch_size) ** 2
        self.length = 1 + model.config.num_register_tokens + patches

    @torch.no_grad()
    def __call__(self, pixels):
        with torch.autocast(self.device.type, enabled=False):
            x = (pixels.to(self.device) / 255 - self.mean) / self.std
            h = self.model(x).last_hidden_state
            return F.layer_norm(h, h.shape[-1:])
