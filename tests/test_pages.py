"""The pages of docs/: quoted lines, equations, pictures, links, commands."""

import importlib
import re
import subprocess
import sys

import pytest
from helpers import ROOT, ring_network
from pages import PAGES, QUOTATION, find, moved, quotations, wrong
from PIL import Image
from prescribed import FRONT

from models.plumbing import teachers

METHODS = sorted(p.stem for p in ROOT.glob("*.py"))
SLOW = ["decoupled_dmd", "linvideo", "phased_dmd"]  # to draw
HEADINGS = [
    "Idea",
    "Equations beside their lines",
    "Well-known wrong variants",
    "Launch",
    "Healthy and sick runs",
    "Implementation details that matter",
    "Deviations",
    "Not verified here",
]


@pytest.mark.parametrize("page", PAGES)
def test_quoted_lines_are_the_codes(page):
    """`python -m tests.pages --write` moves numbers; changed code needs a changed page."""
    assert not wrong(page)


@pytest.mark.parametrize("name", [*METHODS, "kernels"])
def test_quotations_fit_beside_an_equation(name):
    """Enough of them, 3 to 12 lines each, and no link to lines that stays without its lines."""
    page = f"docs/{name}.md"
    lengths = [len(m[7].splitlines()) for m in quotations(page)]
    assert len(lengths) >= 4 and min(lengths) >= 3 and max(lengths) <= 12, lengths
    text = (ROOT / page).read_text()
    assert len(re.findall(r", lines \d+ to \d+\]", text)) == len(QUOTATION.findall(text))


def test_a_page_that_quotes_other_lines_is_found(tmp_path):
    code = tmp_path / "some.py"
    code.write_text("a = 1\nif a:\n    b = 2\n    c = 3\n    d = 4\n")
    assert find(code, "b = 2\nc = 3") == (3, 4)
    assert find(code, "b = 2\nc = 4") is None
    assert find(code, "    b = 2") is None  # quoted without its indentation, or not at all


def test_a_page_with_another_table_is_found(tmp_path):
    """As after a change of models/plumbing/papers.py; --write makes it right."""
    page = tmp_path / "page.md"
    page.write_text("<!-- tests/prescribed.py: linvideo -->\n\n| a |\n\n<!-- end -->\n")
    assert len(wrong(page)) == 1 and "python -m tests.pages --write" in wrong(page)[0]
    page.write_text(moved(page))
    assert not wrong(page) and "Wan 2.1 T2V 14B" in page.read_text()
    page.write_text(page.read_text().replace("| 22 |", "| 20 |"))
    assert wrong(page)


NUMBERS = {"one": 1, "two": 2, "four": 4, "eight": 8, "sixteen": 16}


@pytest.mark.parametrize("name, releases, needs", FRONT, ids=[row[0] for row in FRONT])
def test_the_front_page_promises_as_many_gpus_as_the_plan(name, releases, needs):
    """README's row of a teacher has the numbers of GPUs that docs/scale.md has for it."""
    said = {NUMBERS[word] for word in re.findall(r"[a-z]+", needs) if word in NUMBERS}
    rows = re.findall(
        r"^\| ([^|]+) \|[^|]*\|[^|]*\|(.*)$", (ROOT / "docs/scale.md").read_text(), re.M
    )
    rows = [numbers for teacher, numbers in rows if teacher.startswith(releases)]
    assert rows
    assert not said or said == {int(n) for row in rows for n in re.findall(r"\*\*(\d+)\*\*", row)}


CITED = r"(Eqs?|Algs?|Algorithm)\.? ?((?:\d+[a-z]?)(?:(?:, | and |-| to )\d+[a-z]?)*)"


def cited(text):
    """Numbers of equations and algorithms in a text -> {("Eq", "7"), ("Alg", "2"), ...}."""
    found = set()
    for kind, numbers in re.findall(CITED, text.replace("\n", " ")):
        kind = kind[:3].rstrip("s")
        for part in re.split(r", | and ", numbers):
            ends = re.split(r"-| to ", part)
            if len(ends) == 2 and all(e.isdigit() for e in ends):
                found |= {(kind, str(k)) for k in range(int(ends[0]), int(ends[1]) + 1)}
            else:
                found.add((kind, ends[0]))
    return found


def test_numbers_of_equations_are_read():
    text = "(v1, Eq. 7 and 8), Alg. 2, Eq. 11-13, Eq. 4, Eq. 3b"
    assert cited(text) == {("Alg", "2"), ("Eq", "3b")} | {
        ("Eq", k) for k in ("7", "8", "11", "12", "13", "4")
    }


def equation_sections(page):
    """The subsections of "Equations beside their lines"."""
    inside = page.split("## Equations beside their lines")[1].split("\n## ")[0]
    return re.split(r"^### ", inside, flags=re.M)[1:]


@pytest.mark.parametrize("script", METHODS)
def test_every_equation_that_a_script_cites_is_on_its_page(script):
    """With its formula: in a subsection that has one, and the lines of code beside it."""
    shown = set()
    for section in equation_sections((ROOT / "docs" / f"{script}.md").read_text()):
        if "```math" in section:
            assert QUOTATION.search(section), section.splitlines()[0]
            shown |= cited(section)
    missing = cited((ROOT / f"{script}.py").read_text()) - shown
    assert not missing, sorted(missing)


@pytest.mark.parametrize("page", PAGES)
def test_formulas_are_what_github_renders(page):
    """It refuses some macros, and `$$` and `$` meet Markdown's own signs."""
    text = (ROOT / page).read_text()
    assert not re.search(r"\\(operatorname|newcommand|DeclareMathOperator|tag|label)\b", text)
    assert "$$" not in text
    for formula in re.findall(r"^```math\n(.*?)^```", text, re.M | re.S):
        bare = re.sub(r"\\[{}]", "", formula)
        assert bare.count("{") == bare.count("}"), formula
        ends = [len(re.findall(rf"\\{end}(?![a-z])", formula)) for end in ("left", "right")]
        assert ends[0] == ends[1], formula


@pytest.mark.parametrize("name", [*METHODS, "kernels"])
def test_page_has_its_headings_and_pictures(name):
    page = (ROOT / "docs" / f"{name}.md").read_text()
    assert re.findall(r"^## (.*)$", page, re.M) == HEADINGS
    diagram = f'srcset="figures/{name}-diagram-dark.svg"'
    assert diagram in page.split("## Equations")[0]
    wrong_ones = page.split("## Well-known wrong variants")[1].split("\n## ")[0]
    assert re.search(r"figures/[\w-]+\.(svg|png|gif)", wrong_ones), "no picture"
    runs = page.split("## Healthy and sick runs")[1].split("\n## ")[0]
    assert re.search(r"figures/[\w-]+\.(svg|png)", runs), "no curves"
    assert f"results/{name}.md" in page


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.M | re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(
        r'(?:src|srcset|href)="([^"]+)"', text
    )
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page}: {link}"
        if anchor and file.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
            assert anchor in slugs, f"{page}: {link}"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.long) if n in SLOW else n for n in METHODS]
)
def test_wrong_variants_are_still_drawn(name, tmp_path, monkeypatch):
    """`python -m docs.draw --wrong NAME`, two updates a run: a picture of the kept one's size."""
    script = importlib.import_module(name)

    def short(*argv):
        args = parse(*argv)
        args.max_train_steps = min(args.max_train_steps, 2)
        return args

    parse = script.parse_args
    monkeypatch.setattr(script, "parse_args", short)
    monkeypatch.setattr(teachers, "fit_ring_network", lambda teacher, seed: ring_network(seed))
    (tmp_path / "figures").mkdir()
    importlib.import_module(f"docs.draw.{name}").wrong(str(tmp_path / "figures"))
    kept, drawn = ROOT / "docs" / "figures", tmp_path / "figures" / f"{name}-wrong.png"
    with Image.open(drawn) as a, Image.open(kept / f"{name}-wrong.png") as b:
        assert a.size == b.size


@pytest.mark.parametrize("name", [*METHODS, "kernels"])
def test_pictures_are_what_docs_draw_makes(name, tmp_path):
    """Diagrams and curves, in both themes: byte for byte."""
    code = f"import docs.draw.{name} as m; m.draw({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    drawn = sorted(tmp_path.glob("*.svg"))
    assert f"{name}-diagram-light.svg" in {p.name for p in drawn}
    for path in drawn:
        kept = ROOT / "docs" / "figures" / path.name
        assert kept.read_text() == path.read_text(), f"python -m docs.draw {name}"


def test_layout_names_every_file():
    """docs/layout.md links to every module and page; tests for pytest have one line together."""
    page = (ROOT / "docs" / "layout.md").read_text()
    links = {(ROOT / "docs" / x).resolve() for x in re.findall(r"\]\(([^)#]+\.(?:py|md))\)", page)}
    wanted = {p for room in ("models", "kernels", "tests") for p in (ROOT / room).rglob("*.py")}
    wanted |= {*ROOT.glob("*.py"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/results/*.md")}
    missing = {p for p in wanted - links if not p.name.startswith("test_")}
    assert missing <= {ROOT / "docs" / "layout.md"}, sorted(missing)
