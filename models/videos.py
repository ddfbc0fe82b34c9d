"""Video files (MP4, WebM, MOV, ...), by the first of three optional libraries that is installed.

imageio with ffmpeg (`pip install imageio[ffmpeg]`), PyAV (`pip install av`) or OpenCV
(`pip install opencv-python-headless`). Animated images, GIF, WebP and APNG, need only Pillow.
"""

import contextlib
import importlib
import os
from fractions import Fraction

import numpy as np
from PIL import Image

from models.files import UserError

ENDINGS = (".mp4", ".m4v", ".webm", ".mov", ".mkv", ".avi")
LIBRARIES = {"imageio": ("imageio_ffmpeg", "imageio"), "av": ("av",), "cv2": ("cv2",)}
FINE = "18"  # quality of H.264: hardly to be told from the original


def is_video(path):
    """Whether the name is that of a video file, and not hidden."""
    hidden = os.path.basename(path).startswith(".")
    return not hidden and os.path.splitext(path)[1].lower() in ENDINGS


def video_library(what):
    """The library that reads and writes video files.  -> its name and module. Raises UserError.

    what: the flag and the file that need it, for the message.
    """
    for name, modules in LIBRARIES.items():
        try:
            return name, [importlib.import_module(module) for module in modules][-1]
        except ImportError:
            continue
    raise UserError(
        f"{what} needs imageio with ffmpeg, PyAV or OpenCV, and none is installed: "
        "pip install imageio[ffmpeg]"
    )


def read_video(path, frames, fps=None):
    """The first frames of a video file, fps of them a second; None: all, as they follow.

    -> PIL images in RGB, at most so many. Raises what the library raises for a broken file, and
    ValueError where it finds no video, or one with fewer frames a second.
    """
    name, library = video_library(path)
    reader = {"imageio": read_by_imageio, "av": read_by_av, "cv2": read_by_opencv}[name]
    with contextlib.closing(reader(library, path)) as read:
        rate = next(read)
        if fps and rate < 0.9 * fps:
            raise ValueError(f"it has {rate:.3g} frames a second, the teacher makes {fps:g}")
        wanted = [round(k * rate / fps) if fps else k for k in range(frames)]
        found = {k: a for k, a in zip(range(wanted[-1] + 1), read) if k in wanted}
    return [Image.fromarray(found[k]) for k in wanted if k in found]


# Generators of the frames a second, and then of the frames, uint8 (H, W, 3).


def read_by_imageio(imageio, path):
    with imageio.get_reader(path, format="FFMPEG") as reader:
        yield float(reader.get_meta_data()["fps"])
        yield from (np.asarray(frame)[..., :3] for frame in reader)


def read_by_av(av, path):
    with av.open(path) as file:
        if not file.streams.video:
            raise ValueError("it has no video")
        yield float(file.streams.video[0].average_rate)
        for frame in file.decode(video=0):
            turns = round(getattr(frame, "rotation", 0) / 90)  # as a telephone was held
            yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))


def read_by_opencv(cv2, path):
    file = cv2.VideoCapture(path)
    try:
        if not file.isOpened():
            raise ValueError("OpenCV cannot open it as a video")
        yield file.get(cv2.CAP_PROP_FPS)
        while (read := file.read())[0]:
            yield np.ascontiguousarray(read[1][..., ::-1])  # from BGR
    finally:
        file.release()


def write_mp4(path, pixels, fps):
    """pixels: uint8 (F, H, W, 3) -> an MP4, H.264 (OpenCV: MPEG-4) of fps frames a second.

    Odd sides lose a row or column, which the format cannot have. Raises UserError without a
    library.
    """
    name, library = video_library(path)
    H, W = (side - side % 2 for side in pixels.shape[1:3])
    pixels = np.ascontiguousarray(pixels[:, :H, :W])
    if name == "imageio":
        how = dict(codec="libx264", macro_block_size=2, output_params=["-crf", FINE])
        with library.get_writer(path, format="FFMPEG", fps=fps, quality=None, **how) as writer:
            for frame in pixels:
                writer.append_data(frame)
    elif name == "av":
        write_by_av(library, path, pixels, fps)
    else:
        writer = library.VideoWriter(path, library.VideoWriter_fourcc(*"mp4v"), fps, (W, H))
        if not writer.isOpened():
            raise OSError(f"OpenCV cannot write {path}")
        for frame in pixels:
            writer.write(np.ascontiguousarray(frame[..., ::-1]))
        writer.release()


def write_by_av(av, path, pixels, fps):
    with av.open(path, "w") as file:
        rate = Fraction(fps).limit_denominator(1000)
        stream = file.add_stream("libx264", rate=rate, options={"crf": FINE})
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in pixels:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
