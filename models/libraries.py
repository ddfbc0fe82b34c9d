"""transformers and diffusers, optional libraries that only the two ends of a pipeline need."""

import importlib
from pathlib import Path

import torch
from torch import nn

from models.files import UserError


def require(library):
    """Import an optional library. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(library)
    except ImportError:
        raise UserError(
            f"{library} is not installed; it is needed to encode prompts and images, and to decode "
            f"latents: pip install {library}"
        ) from None


def load(library, kind, pipeline_folder, component, **keywords):
    """library.kind.from_pretrained(pipeline_folder/component); networks in eval mode, on any GPU.

    Raises UserError for a missing library or folder, and the library's own errors for bad files.
    """
    cls, path = getattr(require(library), kind), Path(pipeline_folder) / component
    if not path.is_dir():
        raise UserError(f"no folder {path}; pass a diffusers pipeline folder, with {component}/")
    loaded = cls.from_pretrained(str(path), local_files_only=True, **keywords)
    if isinstance(loaded, nn.Module):
        loaded.to(device()).eval()
    return loaded


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"
