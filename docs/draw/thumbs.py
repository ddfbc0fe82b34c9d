"""The small pictures of README's table, cut out of the samples that the pages show.

python -m docs.draw.thumbs
"""

import os

from PIL import Image

DOCS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BAR = 16  # the line of text above each row
SOURCES = {  # method: (picture, rows in it, the row shown, samples in a row)
    "dmd": ("dmd-glyphs.png", 4, 3, 20),
    "phased_dmd": ("phased-clips.gif", 4, 3, 18),
    "decoupled_dmd": ("decoupled-glyphs-samples.png", 4, 3, 20),
    "tdm": ("tdm-glyphs.png", 6, 3, 20),
    "linvideo": ("linvideo-clips.gif", 5, 3, 12),
    "mdt_dist": ("mdt-voxels.png", 6, 3, 20),
    "latent_fm": ("latent-class.png", 3, 2, 20),
}


def thumb(method, columns=4, rows=2):
    """The first columns x rows samples of a row, put in a block; of a GIF its middle frame."""
    name, count, shown, samples = SOURCES[method]
    with Image.open(os.path.join(DOCS, name)) as image:
        image.seek(getattr(image, "n_frames", 1) // 2)
        image = image.convert("RGB")
    height, width = image.height // count - BAR, image.width // samples
    top = shown * (height + BAR) + BAR
    block = Image.new("RGB", (columns * width, rows * height), "white")
    for i in range(columns * rows):
        tile = image.crop((i * width, top, (i + 1) * width, top + height))
        block.paste(tile, (i % columns * width, i // columns * height))
    return block.resize((240, round(240 * block.height / block.width)), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    for method in SOURCES:
        thumb(method).save(os.path.join(DOCS, "figures", f"thumb-{method}.png"))
