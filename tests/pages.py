"""Do the pages of docs/ still quote the code they link to, and have its tables?

    python -m tests.pages            # says which links point beside their lines
    python -m tests.pages --write    # and moves the numbers to where the quoted lines stand now

A quotation is a link to a range of lines, alone on its line, with a block of Python right below:

    [`dmd.py`, lines 79 to 84](../dmd.py#L79-L84)
    ```python
    ...
    ```

The block is those lines, less what all of them are indented by. Where the code was changed, the
page has to be changed by hand: its words may no longer be true either.

Between <!-- tests/prescribed.py: NAME --> and <!-- end --> stands a table of tests/prescribed.py,
which --write writes, too.
"""

import argparse
import pathlib
import re
import sys
import textwrap

from tests import prescribed

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
QUOTATION = re.compile(
    r"^\[`([^`\n]+)`, lines (\d+) to (\d+)\]\(([^)\n]+)#L(\d+)-L(\d+)\)\n+```python\n(.*?)\n```$",
    re.M | re.S,
)
TABLE = re.compile(r"(<!-- tests/prescribed\.py: (\w+) -->\n\n)(.*?)(\n<!-- end -->)", re.S)
LINK = re.compile(r"\(([^)\s]+\.py)#L(\d+)(?:-L(\d+))?\)")


def quotations(page):
    """-> matches of QUOTATION in a page, a path below ROOT."""
    return list(QUOTATION.finditer((ROOT / page).read_text()))


def target(page, link):
    """The file that a relative link of this page names."""
    return (ROOT / page).parent.joinpath(link).resolve()


def lines_of(path, first, last):
    """Lines first to last of a file, as a page quotes them."""
    return textwrap.dedent("\n".join(path.read_text().splitlines()[first - 1 : last])).rstrip()


def find(path, block):
    """Where these lines stand in a file, at whatever indentation.  -> first, last, or None."""
    wanted = block.splitlines()
    have = path.read_text().splitlines()
    for i in range(len(have) - len(wanted) + 1):
        if wanted[0].strip() == have[i].strip():
            if textwrap.dedent("\n".join(have[i : i + len(wanted)])).rstrip() == block.rstrip():
                return i + 1, i + len(wanted)
    return None


def wrong(page):
    """-> one line for each quotation that its lines do not bear out, each link elsewhere, and each
    table that is not what tests/prescribed.py makes."""
    found, text = [], (ROOT / page).read_text()
    for _, name, table, _ in TABLE.findall(text):
        if table != prescribed.block(name):
            found.append(f"{page}: the table {name} is another: python -m tests.pages --write")
    for match in quotations(page):
        name, first, last, link, a, b, block = match.groups()
        path = target(page, link)
        if not path.is_file() or path.name != pathlib.Path(name).name:
            found.append(f"{page}: {link} is not the file {name}")
        elif (first, last) != (a, b) or lines_of(path, int(a), int(b)) != block.rstrip():
            now = find(path, block)
            where = f"they are lines {now[0]} to {now[1]}" if now else "they are nowhere in it"
            found.append(f"{page}: {name} L{a}-L{b} are not the lines quoted below: {where}")
    for link, a, b in LINK.findall(text):
        path = target(page, link)
        if not path.is_file() or int(b or a) > len(path.read_text().splitlines()):
            found.append(f"{page}: there is no {link}#L{a}")
    return found


def moved(page):
    """The page's text with its tables and with the line numbers of every quotation set right where
    they can be."""

    def right(match):
        name, _, _, link, _, _, block = match.groups()
        path = target(page, link)
        now = find(path, block) if path.is_file() else None
        if not now:
            return match[0]
        a, b = now
        head = f"[`{name}`, lines {a} to {b}]({link}#L{a}-L{b})"
        return head + match[0][match[0].index(")") + 1 :]

    text = QUOTATION.sub(right, (ROOT / page).read_text())
    return TABLE.sub(lambda m: m[1] + prescribed.block(m[2]) + m[4], text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="move the line numbers")
    args = parser.parse_args()
    for page in PAGES:
        if args.write and (text := moved(page)) != (ROOT / page).read_text():
            (ROOT / page).write_text(text)
    problems = [line for page in PAGES for line in wrong(page)]
    print("\n".join(problems) or f"{sum(len(quotations(p)) for p in PAGES)} quotations hold")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
