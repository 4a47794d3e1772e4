"""What the scripts say of themselves: `# Eq. (n)`, the docstring's map, the open points.

An equation of the map stands on a code line of a function named there; a `NOTE paper unclear` has a
row in docs/decisions.md, and a row a NOTE (the rule is written at the head of that file).
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECTIONS = {
    "cfmae": "CFMAE", "semanticmim": "SemanticMIM", "mcmae": "MCMAE",
    "coma_dyvit": "CoMA and DyViT", "videomcmae": "VideoMCMAE",
}  # fmt: skip
SCRIPTS = pytest.mark.parametrize("script", SECTIONS)
# a full stop ends a topic, unless it belongs to one of these
TOPIC = re.compile(r"(.+?)(?<!\bEq)(?<!\bEqs)(?<!\bSec)(?<!\bFig)(?<!\bApp)\.(?: |$)")


def source(module: str) -> str:
    return (ROOT / f"{module}.py").read_text()


def comments(module: str) -> list[tokenize.TokenInfo]:
    tokens = tokenize.generate_tokens(io.StringIO(source(module)).readline)
    return [t for t in tokens if t.type == tokenize.COMMENT]


def marks(module: str) -> list[tuple[int, int]]:
    """(line, n) of each `# Eq. (n)`, `# Eqs. (n), (m)` that follows code."""
    found = []
    for t in comments(module):
        if t.line[: t.start[1]].strip():
            for numbers in re.findall(r"Eqs?\. ((?:\(\d+\)(?:, | and )?)+)", t.string):
                found += [(t.start[0], int(n)) for n in re.findall(r"\d+", numbers)]
    return found


def places(module: str) -> dict[str, range]:
    """Lines of every function, class, method and module-level name; methods as `Class.method`."""
    found = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            lines = range(node.lineno, node.end_lineno + 1)
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found[prefix + node.name] = lines
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update({prefix + t.id: lines for t in targets if isinstance(t, ast.Name)})

    visit(ast.parse(source(module)).body, "")
    return found


def equation_map(module: str) -> list[tuple[list[int], list[str]]]:
    """Lines `Eqs. 7, 8  words  Class.method, function` of the docstring: numbers, names."""
    rows = []
    for line in ast.get_docstring(ast.parse(source(module))).splitlines():
        if match := re.match(r"\s*Eqs?\. (\d+(?:-\d+|, \d+)*) .*  (\S.*)$", line):
            numbers = []
            for part in match[1].split(", "):
                low, _, high = part.partition("-")
                numbers += range(int(low), int(high or low) + 1)
            names = [x.strip() for x in re.split("[,;]", match[2])]
            rows.append((numbers, [x for x in names if re.fullmatch(r"[\w.]+", x)]))
    return rows


def notes(module: str) -> list[str]:
    """Topic of each NOTE, in order; a comment may run over several lines."""
    text, last = [], None
    for t in comments(module):
        words = t.string.removeprefix("#").strip()
        if words.startswith("NOTE paper unclear"):
            text.append(words.removeprefix("NOTE paper unclear").lstrip(":").strip())
            last = t.start
        elif last and t.start == (last[0] + 1, last[1]):
            text[-1] += " " + words
            last = t.start
    return [plain(match[1] if (match := TOPIC.match(x)) else x) for x in text]


def rows(module: str) -> list[str]:
    """First cells of the method's table in docs/decisions.md."""
    text = (ROOT / "docs/decisions.md").read_text()
    section = text.split(f"\n## {SECTIONS[module]}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")]
    return [plain(cell) for cell in cells[1:]]  # the first is the head


def plain(text: str) -> str:
    return re.sub(r"[\"'`“”]", "", text).strip().lower()


@SCRIPTS
def test_docstring_map__names_the_place_of_each_equation(script):
    known, found, wrong = places(script), marks(script), []
    assert equation_map(script)
    for numbers, names in equation_map(script):
        missing = [x for x in names if not x.startswith("common.") and x not in known]
        wrong += [f"the map names {x}, which {script}.py does not have" for x in missing]
        for n in numbers:
            lines = {i for i, k in found if k == n}
            if not any(lines.intersection(known[x]) for x in names if x in known):
                wrong.append(f"Eq. ({n}) on no code line of {', '.join(names)}")
    assert not wrong, "\n".join(wrong)


@SCRIPTS
def test_equation_marks__are_in_the_docstring_map(script):
    mapped = {n for numbers, _ in equation_map(script) for n in numbers}
    assert {n for _, n in marks(script)} == mapped


@SCRIPTS
def test_notes_and_decisions__are_the_same_points(script):
    topics, cells = notes(script), rows(script)
    assert topics and cells
    wrong = [f"NOTE without a row: {t}" for t in topics if not any(c.startswith(t) for c in cells)]
    wrong += [f"row without a NOTE: {c}" for c in cells if not any(c.startswith(t) for t in topics)]
    assert not wrong, "\n".join(wrong)
