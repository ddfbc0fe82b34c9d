"""One picture: decoded by Pillow, and cut to a square; the files of a folder."""

import io
import os
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps

# How a picture becomes a square: its shorter side becomes the square's, and the centre is cut out.
# lanczos is our own; adm is center_crop_arr of guided-diffusion, with which ImageNet's published
# statistics are made (DiT, SiT, LFM); bilinear is torchvision's Resize and CenterCrop (LFM's LSUN).
CROPS = ("lanczos", "adm", "bilinear")

# A small file can say that it has billions of pixels: what Pillow warns of is refused.
MOST_PIXELS = 89_478_485
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", message=".*Palette images with Transparency.*")


def to_square(image, size, crop="lanczos"):
    """A PIL image of any shape -> one of size x size, by one of CROPS."""
    if crop == "lanczos":
        return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    if crop == "adm":
        while min(image.size) >= 2 * size:  # the mean of 2 x 2 pixels
            image = image.resize([side // 2 for side in image.size], Image.Resampling.BOX)
        scale = size / min(image.size)
        sides = [round(side * scale) for side in image.size]
        image = image.resize(sides, Image.Resampling.BICUBIC)
        left, top = ((side - size) // 2 for side in sides)
    else:
        sides = [size * side // min(image.size) for side in image.size]
        image = image.resize(sides, Image.Resampling.BILINEAR)
        left, top = (round((side - size) / 2) for side in sides)
    return image.crop((left, top, left + size, top + size))


def eight_bits(image):
    """A grey image of more than 8 bits, or of floats, as one of 8 bits, where Pillow's convert()
    would clip; others as they are. Raises ValueError.

    16 bits are taken as full scale, floats as 0 to 1 if they all are, else as 0 to 255 or 65535.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, np.float64)
    if not np.isfinite(values).all():
        raise ValueError("pixels that are not finite")
    low, high, full = values.min(), values.max(), 65535
    if low < 0 or high > full:
        raise ValueError(f"pixels from {low:g} to {high:g}: save it with 8 bits, or with 16")
    if image.mode == "F":
        full = next(f for f in (1, 255, 65535) if high <= f)
    elif 0 < high < 4096:
        raise ValueError(
            f"16-bit pixels of at most {high:g}, nearly black: if they have 12 bits or fewer, "
            "scale them to 0..65535"
        )
    return Image.fromarray((values * (255 / full)).round().astype(np.uint8))


def read_frames(path, frames=1):
    """The first frames of an image of any kind, in RGB.  -> PIL images, at most so many

    path: or the file's bytes. They are turned as EXIF says, more than 8 bits become 8 and
    transparency is laid on white. Raises what Pillow raises, and ValueError for a picture that is
    too large and for pixels that `eight_bits` cannot place. Threads may call it together.
    """
    read = []
    with Image.open(io.BytesIO(path) if isinstance(path, bytes) else path) as file:
        if file.width * file.height > MOST_PIXELS:
            raise ValueError(f"{file.width} x {file.height} pixels, more than {MOST_PIXELS:,}")
        for frame in range(frames):
            try:
                file.seek(frame)
            except EOFError:
                break
            file.load()
            image = eight_bits(ImageOps.exif_transpose(file))
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            read.append(image.convert("RGB"))
    return read


def as_bytes(image):
    """A PIL image in RGB -> uint8 (3, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_image(path, size, crop="lanczos"):
    """Decode the first frame of an image.  -> uint8 (3, size, size). crop: see CROPS.

    Raises what read_frames raises.
    """
    return as_bytes(to_square(read_frames(path)[0], size, crop))


def read_map(path, size, image=None):
    """Decode the segmentation map of an image -> uint8 (size, size), cropped like the image.

    The map is a grey, palette or one-bit PNG whose values are class numbers, 255 for none. image:
    the image, as it is shown; None: it has been compared before. size None: as it is, neither cut
    nor resized. Raises ValueError for colours, for classes above 255 and for another shape than the
    image's, and what Pillow raises.
    """
    with Image.open(path) as numbers:
        numbers.load()
        if numbers.mode not in ("L", "P", "1") and not numbers.mode.startswith("I"):
            raise ValueError(
                f"a map of mode {numbers.mode}: save class numbers as a grey or palette PNG"
            )
        wide, high = (image or numbers).size
        rounding = max(wide, high, *numbers.size)  # the sides may have been rounded
        if abs(numbers.width * high - numbers.height * wide) > rounding:
            raise ValueError(
                f"the map is {numbers.width} x {numbers.height}, its image {wide} x {high}"
            )
        values = np.asarray(numbers).astype(np.int64)
    if values.min() < 0 or values.max() > 255:
        wrong = values.max() if values.max() > 255 else values.min()
        raise ValueError(f"a map with class {wrong}: classes are 0 to 254, 255 is none")
    if size is None:
        return torch.from_numpy(values.astype(np.uint8))
    numbers = Image.fromarray(values.astype(np.uint8))
    numbers = ImageOps.fit(numbers, (size, size), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(numbers))


def class_folders(folder):
    """Names of the subfolders, sorted; hidden ones are left out."""
    names = [n for n in os.listdir(folder) if os.path.isdir(os.path.join(folder, n))]
    return sorted(n for n in names if not n.startswith("."))


def files_below(folder):
    """Paths of all files in the folder and its subfolders, always in the same order.

    Links to folders are followed, after the folders themselves. Hidden folders are left out, and a
    file or folder that is reached twice comes once.
    """
    seen, been = set(), {os.path.realpath(folder)}
    for where, folders, files in os.walk(folder, followlinks=True):
        paths = {name: os.path.join(where, name) for name in folders if not name.startswith(".")}
        folders[:] = []
        for name in sorted(paths, key=lambda name: (os.path.islink(paths[name]), name)):
            real = os.path.realpath(paths[name])
            if real not in been:
                been.add(real)
                folders.append(name)
        for path in (os.path.join(where, file) for file in sorted(files)):
            real = os.path.realpath(path)
            if real not in seen:
                seen.add(real)
                yield path


def is_image(path):
    """Whether the name is that of an image that Pillow opens, and not hidden."""
    ending = os.path.splitext(path)[1].lower()
    hidden = os.path.basename(path).startswith(".")
    return not hidden and Image.registered_extensions().get(ending) in Image.OPEN
