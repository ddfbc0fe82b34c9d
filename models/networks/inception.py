"""Inception V3 (1512.00567) as FID (1706.08500) uses it: features of images, for models/metrics.py.

The weights are TensorFlow's of 2015-12-05, in the file and under the names of pytorch-fid. They are
not torchvision's, and three things differ from the paper's network because that file was trained,
or used, so:

    average pooling inside a block divides by the pixels that are there, without the padding
    the last block takes a maximum where the others take an average
    there are 1,008 classes

    input       images, uint8 or numbers from 0 to 255                     (B, 3, H, W)
    features    what FID, KID, precision and recall compare: "pool3"       (B, 2048)
    spatial     what sFID (2103.03841) compares: seven channels of a       (B, 7, 17, 17)
                convolution in the middle, "mixed_6/conv" of the original
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

SIDE, FEATURES = 299, 2048


class Conv(nn.Module):
    """Convolution without bias, batch normalisation as trained, ReLU."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def average(x):
    """Mean over 3x3 of the pixels that are there.  (B, C, H, W) -> the same shape."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum(x):
    """Maximum over 3x3.  (B, C, H, W) -> the same shape."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halve(x):
    """Maximum over every second 3x3 that lies inside.  (B, C, H, W) -> about half the sides."""
    return F.max_pool2d(x, 3, stride=2)


class Mixed(nn.Module):
    """Branches side by side, whose channels are joined.

    branches: lists of what an input passes through, one thing after the other: a pooling function,
    or {name: (channels, kernel, stride)} of convolutions that all see the same and are joined.
    With stride 1 they keep the image's size, with stride 2 they see no padding.
    """

    def __init__(self, c_in, branches):
        super().__init__()
        self.branches, self.channels = branches, 0
        for branch in branches:
            channels = c_in
            for step in branch:
                if isinstance(step, dict):
                    for name, (c_out, kernel, stride) in step.items():
                        padding = tuple(k // 2 if stride == 1 else 0 for k in kernel)
                        self.add_module(name, Conv(channels, c_out, kernel, stride, padding))
                    channels = sum(c_out for c_out, _, _ in step.values())
            self.channels += channels

    def forward(self, x):
        """x (B, c_in, H, W) -> (B, channels, H', W')."""
        return torch.cat([self.run(branch, x) for branch in self.branches], 1)

    def run(self, branch, x):
        """One branch."""
        for step in branch:
            if isinstance(step, dict):
                x = torch.cat([getattr(self, name)(x) for name in step], 1)
            else:
                x = step(x)
        return x


def chain(name, *layers):
    """Convolutions one after the other, NAME_1, NAME_2, ... (a single one: NAME).

    layers: (channels, kernel or its height and width[, stride]).
    """
    steps = []
    for i, (c_out, kernel, *stride) in enumerate(layers, start=1):
        key = name if len(layers) == 1 else f"{name}_{i}"
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        steps.append({key: (c_out, kernel, *(stride or [1]))})
    return steps


def block_a(pooled):
    """35 x 35."""
    return [
        chain("branch1x1", (64, 1)),
        chain("branch5x5", (48, 1), (64, 5)),
        chain("branch3x3dbl", (64, 1), (96, 3), (96, 3)),
        [average, *chain("branch_pool", (pooled, 1))],
    ]


def block_b():
    """35 x 35 -> 17 x 17."""
    return [
        chain("branch3x3", (384, 3, 2)),
        chain("branch3x3dbl", (64, 1), (96, 3), (96, 3, 2)),
        [halve],
    ]


def block_c(c):
    """17 x 17, with kernels one pixel high or wide."""
    row, column = (1, 7), (7, 1)
    twice = (c, column), (c, row), (c, column)
    return [
        chain("branch1x1", (192, 1)),
        chain("branch7x7", (c, 1), (c, row), (192, column)),
        chain("branch7x7dbl", (c, 1), *twice, (192, row)),
        [average, *chain("branch_pool", (192, 1))],
    ]


def block_d():
    """17 x 17 -> 8 x 8."""
    return [
        chain("branch3x3", (192, 1), (320, 3, 2)),
        chain("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)),
        [halve],
    ]


def block_e(pool):
    """8 x 8, where two branches split into a row and a column."""

    def split(name):
        return {f"{name}a": (384, (1, 3), 1), f"{name}b": (384, (3, 1), 1)}

    twice = chain("branch3x3dbl", (448, 1), (384, 3))
    return [
        chain("branch1x1", (320, 1)),
        [{"branch3x3_1": (384, (1, 1), 1)}, split("branch3x3_2")],
        [*twice, split("branch3x3dbl_3")],
        [pool, *chain("branch_pool", (192, 1))],
    ]


class InceptionV3(nn.Module):
    """FID's network. `load` reads its weights."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        blocks = dict(b5=block_a(32), c5=block_a(64), d5=block_a(64), a6=block_b())
        blocks |= dict(b6=block_c(128), c6=block_c(160), d6=block_c(160), e6=block_c(192))
        blocks |= dict(a7=block_d(), b7=block_e(average), c7=block_e(maximum))
        channels = 192
        for (letter, number), branches in blocks.items():
            block = Mixed(channels, branches)
            self.add_module(f"Mixed_{number}{letter}", block)
            channels = block.channels
        self.fc = nn.Linear(FEATURES, 1008)  # in the file; features do without

    def forward(self, x, resize="torch"):
        """Images x (B, 3, H, W), 0 to 255 -> features (B, 2048), spatial (B, 7, 17, 17).

        resize: how they become 299 x 299, see `to_side`.
        """
        x = normalised(to_side(x.float(), resize), resize)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(halve(x))))
        for name in ("5b", "5c", "5d", "6a", "6b", "6c"):
            x = getattr(self, f"Mixed_{name}")(x)
        spatial = self.Mixed_6d.branch1x1(x)[:, :7]
        for name in ("6d", "6e", "7a", "7b", "7c"):
            x = getattr(self, f"Mixed_{name}")(x)
        return x.mean((2, 3)), spatial


def to_side(x, how, side=SIDE):
    """Bilinear, without smoothing: (B, C, H, W) -> (B, C, side, side).

    how: "torch", as pytorch-fid: pixels are areas, and their middles are matched. "tf", as
    TensorFlow 1 in the original, in guided-diffusion's evaluator and in torch-fidelity: pixel i of
    the result is what lies at i * H / side, so that everything moves by up to half a pixel.
    """
    if how == "torch":
        return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)
    for axis in (2, 3):
        n = x.shape[axis]
        at = torch.arange(side, device=x.device) * (n / side)
        low = at.long().clamp_max(n - 1)
        high = (low + 1).clamp_max(n - 1)
        part = (at - low).reshape([side, 1] if axis == 2 else [side])
        x = x.index_select(axis, low) * (1 - part) + x.index_select(axis, high) * part
    return x


def normalised(x, how):
    """0 to 255 -> about -1 to 1: pytorch-fid divides by 127.5, TensorFlow's graph by 128."""
    return x / 127.5 - 1 if how == "torch" else (x - 128) / 128


def load(state):
    """{name: tensor}, the weights under pytorch-fid's names -> the network, in eval mode.

    Raises ValueError for weights of something else.
    """
    with torch.device("meta"):
        net = InceptionV3()
    wanted = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    lost = sorted(wanted.keys() - state.keys())
    if lost:
        raise ValueError(f"it has no {lost[0]}, and lacks {len(lost)} of {len(wanted)} tensors")
    for name, like in wanted.items():
        if state[name].shape != like.shape:
            raise ValueError(f"{name} is {tuple(state[name].shape)}, wanted {tuple(like.shape)}")
    net = net.to_empty(device="cpu")
    net.load_state_dict({k: state[k].float() for k in wanted}, strict=False)
    return net.eval().requires_grad_(False)
