"""The house rules that a machine can check: scripts alike, self-contained, documented; what ships is what is claimed."""

import ast
import importlib
import json
import re
import shlex

import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file

from models.diffusion import ode_calls
from models.files import open_tensors
from models.networks import WEIGHTS, load_network, weights_hash
from models.plumbing.flags import Parser
from models.plumbing.teachers import load_teacher
from models.worlds import load_world
from models.worlds.measures import balanced_labels

SCRIPTS = sorted(p.stem for p in ROOT.glob("*.py"))
HEADINGS = [
    "Idea",
    "Equations and the lines that implement them",
    "Launch",
    "What each logged number means, and how a healthy run looks",
    "Implementation details that matter",
    "Deviations",
    "Results here",
    "Not verified here",
]


def plumbing(script):
    """The block under the heading that promises to be the same everywhere."""
    text = (ROOT / f"{script}.py").read_text()
    return re.search(
        r"# ---- plumbing: identical in every script -+\n(.*?)\n# ---- ", text, re.S
    ).group(1)


def test_twin_blocks_are_identical():
    blocks = {script: plumbing(script) for script in SCRIPTS}
    assert len(blocks) >= 2 and len(set(blocks.values())) == 1, (
        f"the plumbing differs: {sorted(blocks)}"
    )
    assert "def update(" in blocks[SCRIPTS[0]]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stand_alone(script):
    """A script imports torch, numpy, tqdm, Pillow, the standard library and models/, never another script; the method comes before line 150."""
    text = (ROOT / f"{script}.py").read_text()
    for node in ast.walk(ast.parse(text)):
        names = (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
        for name in names:
            assert name.split(".")[0] in {
                "copy",
                "csv",
                "datetime",
                "json",
                "os",
                "sys",
                "time",
                "types",
                "math",
                "torch",
                "numpy",
                "tqdm",
                "PIL",
                "models",
                "kernels",
            }, (script, name)
    lines = text.splitlines()
    assert next(i for i, line in enumerate(lines) if line.startswith("# ---- the method")) < 100
    assert "Deviations" in text and "Launch." in text and re.search(r"(Eq\.|Alg\.) ?\d", text)
    assert max(map(len, lines)) <= 170


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help(script):
    """Nothing undocumented in --help, and each default of a numeric flag passes its own check."""
    module = importlib.import_module(script)
    text = []
    real = Parser.parse_args

    def spy(parser, argv=None, namespace=None):
        text.append(parser)
        return real(parser, argv, namespace)

    Parser.parse_args = spy
    try:
        module.parse_args([])
    finally:
        Parser.parse_args = real
    actions = text[0]._actions
    assert len(actions) > 20
    for action in actions:
        assert action.help and len(action.help) > 8, action.option_strings
        if action.type and isinstance(action.default, (int, float)):
            action.type(str(action.default))


@pytest.mark.parametrize("script", SCRIPTS)
def test_docs_page_has_the_fixed_headings_and_names_that_exist(script):
    page = (ROOT / "docs" / f"{script}.md").read_text()
    assert re.findall(r"^## (.*)$", page, re.M) == HEADINGS
    source = "".join(
        p.read_text()
        for p in [
            ROOT / f"{script}.py",
            *(ROOT / "models").glob("*.py"),
            *(ROOT / "tests").glob("*.py"),
        ]
    )
    table = page.split("## Launch")[0]
    for name in re.findall(r"`([A-Za-z_]+)`", table):
        assert name in source, f"docs/{script}.md names `{name}`, which is nowhere"
    assert "RESULTS" not in page


def commands(path):
    """Every `python SCRIPT.py ...` or `torchrun ... SCRIPT.py ...` of a page -> [(script, flags)]."""
    text = path.read_text().replace("\\\n", " ")
    found = []
    for match in re.finditer(r"(?:python|torchrun)[^\n`|&;]*?\b(\w+)\.py([^\n`|&;#(]*)", text):
        if match.group(1) in SCRIPTS:
            found.append((match.group(1), shlex.split(match.group(2).split("#")[0])))
    return found


@pytest.mark.parametrize(
    "page", ["README.md", *(f"docs/{s}.md" for s in SCRIPTS), *(f"{s}.py" for s in SCRIPTS)]
)
def test_documented_commands_parse(page):
    """Flags that a page shows exist, with values that are accepted."""
    found = commands(ROOT / page)
    assert found
    for script, flags in found:
        flags = [f for f in flags if f != "..."]
        if "--help" not in flags:
            importlib.import_module(script).parse_args(flags)


def test_readme_commands_are_the_ones_that_ci_runs():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    lines = [line for line in readme.splitlines() if line.startswith("python3 -m venv")]
    assert len(lines) == 2 and lines[0].endswith("python dmd.py") and "pytest" in lines[1]
    assert "grep -m1 'pytest' README.md" in ci
    assert (
        next(line for line in readme.splitlines() if "pytest" in line) == lines[1]
    )  # what that grep finds
    runtime = {
        re.split(r"[=<>;\s]", line)[0]
        for line in (ROOT / "requirements.txt").read_text().split("\n")
        if line
    }
    assert runtime == {"torch", "numpy", "tqdm", "pillow", "safetensors", "triton"}


# ---- the shipped teacher -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["glyphs", "clips", "voxels"])
def test_shipped_teacher_is_small_and_half_precision(name):
    folder = ROOT / "models" / "worlds" / name / "teacher"
    assert (folder / WEIGHTS).stat().st_size <= 2 * 2**20
    assert {v.dtype for v in load_file(folder / WEIGHTS).values()} == {torch.float16}
    teacher = load_teacher(name, (name,))
    assert teacher.world_name == name and teacher.prediction == "flow_v" and teacher.shift == 1.0


@pytest.mark.parametrize(
    "name, script, solver, fd_of_floor, accuracy",
    [
        ("glyphs", "dmd", "heun", 2, 0.93),
        ("clips", "phased_dmd", "heun", 4, 0.93),
        ("voxels", "mdt_dist", "euler", 12, 0.88),
    ],
)
def test_stored_teacher_row_is_of_the_shipped_weights(name, script, solver, fd_of_floor, accuracy):
    """The row that default runs copy was measured from the weights in the repository, with the default run's shift."""
    folder, world = ROOT / "models" / "worlds" / name / "teacher", load_world(name)
    args = importlib.import_module(script).parse_args([])
    key = f"{solver}{args.teacher_steps}-shift{args.timestep_shift or 1:g}-guidance{args.guidance_scale:g}"
    with open_tensors(
        str(folder / "measured" / f"{weights_hash(str(folder))}-{key}.safetensors")
    ) as f:
        row = json.loads(f.metadata()["row"])
        mean, cov = f.get_tensor("mean"), f.get_tensor("cov")
    floor = world.measure(*world.data(2000, 777, balanced_labels(2000, world.num_classes)))
    assert (
        row["fd"] <= fd_of_floor * floor["fd"]
        and row["accuracy"] >= accuracy * floor["accuracy"]
        and row["nfe"] == ode_calls(args.teacher_steps, solver)
    )
    assert name != "clips" or abs(row["motion"] - 1) < 0.1
    # a fresh, smaller set of the teacher's samples has those moments' mean, up to the error of 180 samples
    import latent_fm

    net, label = load_network(str(folder))[0], balanced_labels(180, world.num_classes)
    x = latent_fm.sample(
        net, torch.randn(180, *world.shape, generator=torch.Generator().manual_seed(3)), label, 8
    )
    got = world.moments(x, label)[0][0]
    error = (got - mean[0]) / (cov[0].diagonal() / 180).sqrt()
    assert (
        error.square().mean() < 2.5
    )  # 1 in expectation for the same law, and 8 Heun steps are nearly 32
    assert world.measure(x, label)["accuracy"] > accuracy
