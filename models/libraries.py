"""transformers and diffusers, optional libraries that only the two ends of a pipeline need."""

import importlib
import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path

import torch
from safetensors import SafetensorError

from models.files import UserError
from models.plumbing.sets import is_missing

ROOT = Path(__file__).resolve().parent.parent


def give_way(name="kernels"):
    """From now on the package of this name is an installed one, where there is one.

    transformers takes Hugging Face's `kernels` wherever it is installed, and would find ours. Who
    needs ours has imported it by now.
    """
    elsewhere = [path for path in sys.path if Path(path or os.curdir).resolve() != ROOT]
    spec = PathFinder.find_spec(name, elsewhere)
    ours = {m: sys.modules[m] for m in list(sys.modules) if m.split(".")[0] == name}
    here = Path(getattr(ours.get(name), "__file__", None) or "").resolve()
    if spec is None or spec.loader is None or (ours and here.parent.parent != ROOT):
        return
    for module in ours:
        del sys.modules[module]
    sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[name])
    except ImportError:  # as where it needs what is not installed
        sys.modules.update(ours)


def require(library, package=None):
    """Import an optional library. Raises UserError where it is not installed.

    package: what pip calls it, if not the same.
    """
    package = package or library
    give_way()
    try:
        return importlib.import_module(library)
    except ImportError as error:
        if is_missing(library, error):
            raise UserError(
                f"{package} is not installed; it is needed to encode prompts and images, and to "
                f"decode latents: pip install {package}"
            ) from None
        raise UserError(
            f"{package} is installed and cannot be imported ({error}): pip install -U {package}"
        ) from None


def load(library, kind, pipeline_folder, component, **keywords):
    """library.kind.from_pretrained(pipeline_folder/component); networks as `load_pretrained` does.

    Raises UserError for a missing library or folder, and for weights that are not whole; the
    library's own errors for other bad files.
    """
    path, module = Path(pipeline_folder) / component, require(library)
    try:
        cls = getattr(module, kind)
    except (AttributeError, ImportError, RuntimeError) as error:  # lazy modules raise all three
        raise UserError(
            f"{library} {module.__version__} has no {kind} that can be imported ({error}): "
            f"pip install -U {library}"
        ) from None
    if not path.is_dir():
        raise UserError(f"no folder {path}; pass a diffusers pipeline folder, with {component}/")
    if "Tokenizer" in kind:
        return cls.from_pretrained(str(path), local_files_only=True, **keywords)
    return load_pretrained(cls, str(path), local_files_only=True, **keywords)


def load_pretrained(cls, where, **keywords):
    """cls.from_pretrained(where) in eval mode, on a GPU where there is one.

    where: a folder, or a name that is downloaded. Unlike the libraries it reads no pickles, and
    draws no random numbers for weights that the files lack. Raises UserError, and the libraries'
    OSError and ValueError.
    """
    inside = os.listdir(where) if os.path.isdir(where) else ["model.safetensors"]
    if not any(".safetensors" in name for name in inside):
        pickles = [name for name in sorted(inside) if name.endswith((".bin", ".pt", ".pth"))]
        if pickles:
            raise UserError(
                f"{where} has only a pickle ({pickles[0]}); pickles can run code and are never "
                "loaded: save it again with safetensors"
            )
    try:
        network, found = cls.from_pretrained(
            where, use_safetensors=True, output_loading_info=True, **keywords
        )
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{where} cannot be read ({error}): download it again") from None
    wrong = [*found.get("missing_keys", ()), *found.get("mismatched_keys", ())]
    if wrong:
        first = wrong[0] if isinstance(wrong[0], str) else wrong[0][0]
        raise UserError(
            f"{where}: {len(wrong)} weights of a {cls.__name__} are missing or of another shape, "
            f"{first} among them: give its folder, whole"
        )
    return network.to(device()).eval()


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"
