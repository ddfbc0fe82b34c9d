"""The house rules that a machine can check: shape of the code, pages, and what ships."""

import ast
import difflib
import importlib
import json
import re
import shlex
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from pages import PAGES
from safetensors.torch import load_file

import latent_fm
from models.diffusion import ode_calls
from models.files import open_tensors
from models.networks import WEIGHTS, load_network, weights_hash
from models.plumbing.flags import Parser
from models.plumbing.teachers import load_teacher
from models.worlds import load_world
from models.worlds.measures import balanced_labels

SCRIPTS = sorted(p.stem for p in ROOT.glob("*.py"))
PYTHON = [p for room in ("models", "kernels", "tests", "docs") for p in (ROOT / room).rglob("*.py")]
PYTHON += [ROOT / f"{script}.py" for script in SCRIPTS]


def source(script):
    return (ROOT / f"{script}.py").read_text()


def functions(path):
    """{name: (lines, node)} of every function of a file, methods and inner functions too."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    return {n.name: (n.end_lineno - n.lineno + 1, n) for n in nodes}


# ---- the shape of the code -----------------------------------------------------------------------


@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff(command):
    """Lint and format, with the settings of pyproject.toml."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command.split(), "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", PYTHON, ids=lambda p: str(p.relative_to(ROOT)))
def test_lines_fit_beside_a_pdf(path):
    """100 columns, also where ruff looks away (links, formatting turned off)."""
    wide = [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 100]
    assert not wide, f"lines {wide}"


def test_no_function_is_long():
    """60 lines in the scripts and the plumbing, 100 in train, so that a function fits on a page."""
    rooms = [*(ROOT / "models" / "plumbing").glob("*.py"), *(ROOT / "models").glob("*.py")]
    for path in [*(ROOT / f"{script}.py" for script in SCRIPTS), *rooms]:
        for name, (lines, _) in functions(path).items():
            assert lines <= (100 if name == "train" else 60), (path.name, name, lines)


ROOMS = [  # each may import from those above it, and within its own line by the order in it
    ["kernels", "models", "models.plumbing"],  # empty packages
    ["kernels.linear_attention_triton", "kernels.linear_attention_ops"],
    ["kernels.linear_attention"],
    ["models.diffusion", "models.files", "models.draws", "models.pictures", "models.shards"],
    ["models.progress"],
    ["models.muon"],
    ["models.flexicubes", "models.mesh_files"],
    ["models.prompts"],
    ["models.networks.lora", "models.networks.layers"],
    ["models.networks.*"],
    ["models.networks"],
    ["models.networks.latent_space"],
    ["models.worlds.measures", "models.worlds.masks", "models.worlds.features"],
    ["models.worlds.ring", "models.worlds.glyphs", "models.worlds.clips", "models.worlds.shapes"],
    ["models.worlds.voxels"],
    ["models.worlds"],
    ["models.plumbing.images", "models.plumbing.sets", "models.plumbing.loading"],
    ["models.plumbing.schedulers", "models.plumbing.data", "models.plumbing.teachers"],
    ["models.plumbing.allocator"],
    ["models.plumbing.sharding", "models.plumbing.state", "models.plumbing.run"],
    ["models.plumbing.image_sets"],
    ["models.plumbing.latents", "models.plumbing.training_data"],
    ["models.plumbing.footprint", "models.plumbing.dry_run", "models.plumbing.work"],
    ["models.plumbing.papers", "models.plumbing.releases"],
    ["models.plumbing.flags", "models.plumbing.report"],
    ["models.plumbing.film"],
    ["models.libraries", "models.vaes", "models.videos", "models.text_encoders"],
    ["models.image_tokens", "models.trellis_data"],
    ["models.worlds.__main__", "models.decode", "models.pairs", "models.encode", "models.convert"],
    ["models.meshes"],
    ["models.metrics"],
    ["kernels.bench_linear_attention"],
    SCRIPTS,
]


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def rank(module):
    """Place of a module in ROOMS; `models.networks.*` stands for the architectures."""
    flat = [name for room in ROOMS for name in room]
    if module in flat:
        return flat.index(module)
    assert re.fullmatch(r"models\.networks\.\w+", module), f"{module} is in no room"
    return flat.index("models.networks.*")


def imports(path, modules):
    """-> pairs (module of this project that a file imports, whether inside a function)."""
    tree = ast.parse(path.read_text())
    lazy = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        if isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{a.name}" for a in node.names]
            names = [name if name in modules else node.module for name in inside]
        yield from {(name, id(node) in lazy) for name in names if name in modules}


def test_imports_go_one_way():
    """No arrow runs back, no circle, and no import inside a function to hide one."""
    apart = {"tests", "docs"}
    paths = [p for p in PYTHON if not apart & {*p.relative_to(ROOT).parts}]
    modules = {module_of(path): path for path in paths}
    arrows = 0
    for module, path in modules.items():
        for other, lazy in imports(path, modules):
            if other == module or (module, other) == ("models.networks.dit", "models.networks"):
                continue
            assert not lazy, f"{module} imports {other} inside a function"
            same = rank(module) == rank(other) == rank("models.networks.*")
            assert rank(other) < rank(module) or same, f"{module} imports {other}"
            arrows += 1
    assert arrows > 100
    graph = {m: {o for o, _ in imports(p, modules) if o != m} for m, p in modules.items()}
    done = set()
    while len(done) < len(graph):  # take away what imports nothing that is left
        free = {m for m in graph if m not in done and graph[m] <= done}
        assert free, f"a circle among {sorted(set(graph) - done)}"
        done |= free


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stand_alone(script):
    """A script imports torch, numpy, tqdm, Pillow, the standard library, models/ and kernels/.

    Never another script; and the method comes before line 100.
    """
    allowed = {*sys.stdlib_module_names, "torch", "numpy", "tqdm", "PIL", "models", "kernels"}
    for node in ast.walk(ast.parse(source(script))):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
        assert {name.split(".")[0] for name in names} <= allowed, (script, names)
    lines = source(script).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("# ---- "))
    assert first < 100, "the method starts late"
    docstring = ast.get_docstring(ast.parse(source(script)))
    assert len(docstring.splitlines()) <= 40
    for word in ("The idea.", "Launch.", "Deviations", "paper"):
        assert word in docstring
    assert re.search(r"(Eq\.|Alg\.) ?\d", source(script))


def code_names(script):
    """Every name, attribute and argument that the script's functions use, docstrings apart."""
    found = set()
    for node in ast.walk(ast.parse(source(script))):
        if isinstance(node, ast.Name):
            found.add(node.id)
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        if isinstance(node, ast.arg):
            found.add(node.arg)
    return found


@pytest.mark.parametrize("script", SCRIPTS)
def test_names_of_the_symbol_table_occur_in_the_code(script):
    """The second column of the table: what a reader looks for in the loop."""
    docstring = ast.get_docstring(ast.parse(source(script)))
    lines = docstring.splitlines()
    head = next(i for i, line in enumerate(lines) if re.match(r"\s+paper\s+here\s", line))
    column, names = lines[head].index("here"), code_names(script)
    for line in lines[head + 1 :]:
        if not line.strip():
            break
        here = re.split(r"\s{2,}", line[column:])[0]
        words = re.findall(r"(?<![\w.-])[A-Za-z]\w*", re.sub(r"--\w+", "", here))
        flags = re.findall(r"--(\w+)", here)
        assert words or flags, line
        for word in words:
            assert word in names, (
                f"{script}.py: {word!r} of the symbol table is nowhere in the code"
            )
        assert all(f'"--{flag}"' in source(script) for flag in flags)


@pytest.mark.parametrize("script", SCRIPTS)
def test_paper_line_is_a_command_that_parses(script):
    """The launch line marked `paper`: the command whose flags are the paper's algorithm."""
    docstring = ast.get_docstring(ast.parse(source(script))).replace("\\\n", " ")
    found = re.findall(rf"^\s*paper[^\n]*?python {script}\.py([^\n#]*)", docstring, re.M)
    assert found, "no line marked `paper`"
    for flags in found:
        importlib.import_module(script).parse_args(shlex.split(flags))


RENAMINGS = {  # what decoupled_dmd.py and tdm.py call differently for good reason
    "decoupled_dmd": [("decoupled_dmd", "dmd"), ("alpha", "scale")],
    "tdm": [('"tdm"', '"dmd"'), ("see_K", "see_step"), ("samplers", "sampler")],
}


@pytest.mark.parametrize("script, most", [("decoupled_dmd", 90), ("tdm", 130)])
def test_diff_to_dmd_reads_like_the_papers_contribution(script, most):
    """train() differs from dmd.py's in few lines."""

    def body(name):
        lines, node = functions(ROOT / f"{name}.py")["train"]
        text = "\n".join(source(name).splitlines()[node.lineno - 1 : node.end_lineno])
        for old, new in RENAMINGS.get(name, []):
            text = text.replace(old, new)
        return text.splitlines()

    changed = [
        line
        for line in difflib.unified_diff(body("dmd"), body(script), lineterm="", n=0)
        if line[0] in "+-" and line[:3] not in ("+++", "---")
    ]
    assert 0 < len(changed) <= most, len(changed)


PRIVATE = r"\b(told|shall|dossier)\b|hoped for|\(bar |its log was lost|as the paper has it"


@pytest.mark.parametrize("page", PAGES)
def test_pages_have_no_private_words(page):
    text = (ROOT / page).read_text()
    assert not re.search(PRIVATE, text), re.search(PRIVATE, text)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_have_no_private_words(script):
    text = source(script)
    assert not re.search(PRIVATE, text), re.search(PRIVATE, text)


# ---- flags and pages -----------------------------------------------------------------------------


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
def test_docs_page_names_what_exists(script):
    page = (ROOT / "docs" / f"{script}.md").read_text()
    source = "".join(
        p.read_text()
        for p in [
            ROOT / f"{script}.py",
            *(ROOT / "models").rglob("*.py"),
            *(ROOT / "tests").glob("*.py"),
        ]
    )
    table = re.sub(r"\$`.*?`\$", "", page.split("## Launch")[0])  # less its formulas
    for name in re.findall(r"`([A-Za-z_]+)`", table):
        assert name in source, f"docs/{script}.md names `{name}`, which is nowhere"
    assert "RESULTS" not in page


def commands(path):
    """Every `python SCRIPT.py ...` or `torchrun ... SCRIPT.py ...` of a page -> [(script,
    flags)]."""
    text = path.read_text().replace("\\\n", " ")
    found = []
    for match in re.finditer(r"(?:python|torchrun)[^\n`|&;]*?\b(\w+)\.py([^\n`|&;#(]*)", text):
        if match.group(1) in SCRIPTS:
            found.append((match.group(1), shlex.split(match.group(2).split("#")[0])))
    return found


@pytest.mark.parametrize("page", [*PAGES, *(f"{s}.py" for s in SCRIPTS)])
def test_documented_commands_parse(page):
    """Flags that a page shows exist, with values that are accepted."""
    found = commands(ROOT / page)
    assert found or page not in [f"{s}.py" for s in SCRIPTS]
    for script, flags in found:
        flags = [f for f in flags if f != "..."]
        if "--help" not in flags:
            importlib.import_module(script).parse_args(flags)


def test_readme_commands_are_the_ones_that_ci_runs():
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    lines = [line for line in readme.splitlines() if line.startswith("python3 -m venv")]
    assert len(lines) == 2 and lines[0].endswith("python dmd.py") and "pytest" in lines[1]
    assert "grep -m1 'pytest' README.md" in ci
    found = next(line for line in readme.splitlines() if "pytest" in line)
    assert found == lines[1]  # what that grep finds
    runtime = {
        re.split(r"[=<>;\s]", line)[0]
        for line in (ROOT / "requirements.txt").read_text().split("\n")
        if line
    }
    assert runtime == {"torch", "numpy", "tqdm", "pillow", "safetensors", "triton"}


# ---- the shipped teachers ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["glyphs", "clips", "voxels"])
def test_shipped_teacher_is_small_and_half_precision(name):
    folder = ROOT / "models" / "worlds" / name / "teacher"
    assert (folder / WEIGHTS).stat().st_size <= 2 * 2**20
    assert {v.dtype for v in load_file(folder / WEIGHTS).values()} == {torch.float16}
    teacher = load_teacher(name)
    assert teacher.world_name == name and teacher.prediction == "flow_v" and teacher.shift == 1.0


@pytest.mark.parametrize(
    "name, script, solver, fd_of_floor, accuracy",
    [
        ("glyphs", "dmd", "heun", 2, 0.93),
        ("clips", "phased_dmd", "heun", 4, 0.93),
        pytest.param("voxels", "mdt_dist", "euler", 12, 0.88, marks=pytest.mark.long),
    ],
)
def test_stored_teacher_row_is_of_the_shipped_weights(name, script, solver, fd_of_floor, accuracy):
    """The row that default runs copy was measured from the shipped weights, at the default
    shift."""
    folder, world = ROOT / "models" / "worlds" / name / "teacher", load_world(name)
    args = importlib.import_module(script).parse_args([])
    key = f"{weights_hash(str(folder))}-{solver}{args.teacher_steps}"
    key += f"-shift{args.timestep_shift or 1:g}-guidance{args.guidance_scale:g}"
    with open_tensors(str(folder / "measured" / f"{key}.safetensors")) as f:
        row = json.loads(f.metadata()["row"])
        mean, cov = f.get_tensor("mean"), f.get_tensor("cov")
    floor = world.measure(*world.data(2000, 777, balanced_labels(2000, world.num_classes)))
    assert row["fd"] <= fd_of_floor * floor["fd"]
    assert row["accuracy"] >= accuracy * floor["accuracy"]
    assert row["nfe"] == ode_calls(args.teacher_steps, solver)
    assert name != "clips" or abs(row["motion"] - 1) < 0.1
    # a fresh, smaller set of the teacher's samples has those moments' mean, up to its own error
    net, label = load_network(str(folder))[0], balanced_labels(180, world.num_classes)
    x = latent_fm.sample(
        net, torch.randn(180, *world.shape, generator=torch.Generator().manual_seed(3)), label, 8
    )
    got = world.moments(x, label)[0][0]
    error = (got - mean[0]) / (cov[0].diagonal() / 180).sqrt()
    # 1 in expectation for the same law, and 8 Heun steps are nearly 32
    assert error.square().mean() < 2.5
    assert world.measure(x, label)["accuracy"] > accuracy
