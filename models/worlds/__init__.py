"""Embedded worlds: data, a teacher and a yardstick in one place, so that nothing is downloaded.

    ring     8 Gaussians on a circle, 4 classes of two opposite modes each; every score, x0 and
             velocity in closed form
    glyphs   3x16x16 colour digits drawn with Pillow's own font; position, size, slant, weight and
             both colours vary
    clips    1x8x16x16 grey videos of one shape moving in a straight line; the class fixes the shape
             and the distribution of its speed
    shapes   3x32x32 pictures of one coloured shape, with segmentation maps and an autoencoder
    voxels   1x16x16x16 occupancy of ten parametric solids

The contract: what every world has, and the rest of the code may use.

    name, num_classes, class_names
        Its name in WORLDS; K; a list of K strings. Labels are 0 to K - 1, networks take K for "no
        label".
    shape
        Of one item: (2,) for points, (C, H, W), (C, T, H, W) for videos, (C, D, H, W) for voxels.
        Values are in [-1, 1]; points may lie a little beyond.
    data(n, seed, label=None) -> x0 (n, *shape) float32, label (n,) int64
        n items, a function of the arguments alone. label (n,) int64 asks for these classes and
        comes back; without it classes are drawn, all equally likely.
    measure(x, label) -> {name: float}
        How good samples x (n, *shape) of classes label (n,) are, a row of report.json:
            fd         squared Frechet distance to data, of features; the ring's is of points, class
                       by class, and x 1000
            patch_swd  1000 x sliced Wasserstein distance to data, of patches: it shows grain
            accuracy   share of samples that are recognised as what their label says
            log_p      mean log p(label | x + BLUR eps): how sharply they show it; the ring's is
                       exact, other worlds' classifiers know less noise than that: to be compared
            diversity  mean distance within a class, over that of data: 1 is right, 0 a collapse
        clips adds motion and moving, voxels adds iou and connected; see their docstrings. label
        None: samples of a network without classes, and none of what compares with labels.
    moments(x, label) -> means (G, d), covariances (G, d, d), float64
        What fd is computed from, in G groups, for measures.moments_distance of two sets of samples.
        label None: all samples are one group.
    picture(x) -> (H, W, 3) uint8
        Samples (n, *shape) as an image of one row.

Every world also has one of two kinds of teacher:

    teacher() -> module
        A closed form without weights (ring). It is called like a network, net(x_t, t, label=...),
        gives a flow velocity and has prediction, default_shift, cond_names and latent_shape.
        Its students start from a network that is fitted to it (models/worlds/ring.py), and where a
        method replaces the teacher's attention, as linvideo.py does, such a network is the teacher.
    teacher_folder() -> path
        The folder of a shipped network. Raises UserError where none ships (shapes).

Some worlds have more:

    exact
        The closed form itself, a RingTeacher (ring).
    video = False
        Items have five axes with the batch, and are no videos all the same (voxels).
    scenes(n, seed, label=None) -> x0, label, maps (n, H, W) uint8; map_classes
        data() with segmentation maps of values 0 to map_classes - 1 (shapes).
    foreground(x) -> (n, H, W) bool
        Which pixels are the object's, judged from x alone (shapes).
    space, latent_shape
        A networks.latent_space.LatentSpace and the shape of its latents. Such a world's measure,
        moments, picture and foreground take latents in place of pixels (shapes).

features.FeatureWorld implements the contract for the worlds with a classifier, but for picture.
`python -m models.worlds NAME` makes the files of one of them anew.
"""

import functools
import os

from models.files import UserError
from models.worlds.clips import Clips
from models.worlds.glyphs import Glyphs
from models.worlds.ring import Ring
from models.worlds.shapes import Shapes
from models.worlds.voxels import Voxels

CLASSES = {"ring": Ring, "glyphs": Glyphs, "clips": Clips, "shapes": Shapes, "voxels": Voxels}
WORLDS = tuple(CLASSES)


def refuse_ambiguous(flag, name, names=WORLDS, kind="world"):
    """Raises UserError where somebody names a world, by this flag, and a folder is called so too.

    names, kind: of other things than worlds that are built in.

    The folder of one's own would be left unread, and the run would look right.
    """
    if name in names and os.path.isdir(name):
        raise UserError(
            f"{flag} {name}: that is an embedded {kind}, and a folder here: give ./{name} for the "
            f"folder, and rename the folder if you want the {kind}"
        )


@functools.cache
def load_world(name):
    """The world of this name, the same object each time. Raises ValueError for another name."""
    if name not in WORLDS:
        raise ValueError(f"no embedded world is called {name!r}; there are {', '.join(WORLDS)}")
    return CLASSES[name]()
