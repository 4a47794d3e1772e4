"""The scripts as a package, for pip alone; in a checkout nothing imports this file.

    pip install .                                            or: pip install -e .
    python -m masked_image_modelling.cfmae --data shapes --model tiny
    from masked_image_modelling import cfmae

The scripts import each other's parts as `data` or `engine`, which are anybody's names. So inside
the package an import of one of its own modules becomes one of `masked_image_modelling.data`, in the
syntax tree, as a module is loaded: a `data.py` of the user's is neither taken nor hidden.
"""

import ast
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType

HOME = Path(__file__).parent
OWN = {p.stem for p in HOME.glob("*.py")} | {p.parent.name for p in HOME.glob("*/__init__.py")}


class Inside(ast.NodeTransformer):
    """Imports of what lies in this folder, as imports from the package."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if not node.level and node.module.partition(".")[0] in OWN:
            node.module = f"{__name__}.{node.module}"
        return node

    def visit_Import(self, node: ast.Import) -> list[ast.AST]:
        found = []
        for name in node.names:
            top, _, inner = name.name.partition(".")
            if top not in OWN:
                found.append(ast.Import([name]))
                continue
            whole = f"{__name__}.{name.name}"
            if inner and name.asname:
                found.append(ast.Import([ast.alias(whole, name.asname)]))
                continue
            found += [ast.Import([ast.alias(whole, "_")])] if inner else []
            found.append(ast.ImportFrom(__name__, [ast.alias(top, name.asname)], 0))
        return [ast.copy_location(x, node) for x in found]


class Loader(importlib.abc.FileLoader, importlib.abc.SourceLoader):
    """Compiles a module anew: the __pycache__ beside it belongs to the scripts."""

    def source_to_code(self, data: bytes, path: str) -> CodeType:
        tree = ast.fix_missing_locations(Inside().visit(ast.parse(data, path)))
        return compile(tree, path, "exec", dont_inherit=True)


class Finder(importlib.abc.MetaPathFinder):
    """Gives the package's modules their loader; where they lie is found as ever."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: object = None
    ) -> ModuleSpec | None:
        if not name.startswith(f"{__name__}."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec and spec.origin:
            spec.loader = Loader(name, spec.origin)
        return spec


sys.meta_path.insert(0, Finder())
