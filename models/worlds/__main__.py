"""Train a world's classifier again and rewrite its reference statistics, in minutes.

python -m models.worlds NAME writes classifier.safetensors and reference.safetensors in
models/worlds/NAME/, and for shapes also the autoencoder. The ring has no files: it is a formula.
Teachers are trained by latent_fm.py.
"""

from models.plumbing.flags import Parser
from models.plumbing.run import run_main
from models.worlds import WORLDS, load_world
from models.worlds.features import build_reference
from models.worlds.shapes import build_autoencoder


def main(argv=None):
    p = Parser(prog="python -m models.worlds", description=(__doc__ or "").partition("\n")[0])
    p.add_argument("world", choices=[w for w in WORLDS if w != "ring"], help="whose files to make")
    world = load_world(p.parse_args(argv).world)
    if world.name == "shapes":
        build_autoencoder(world)
        build_reference(world, steps=1500, batch=64, items=20000)
    else:
        build_reference(world)


if __name__ == "__main__":
    run_main(main)
