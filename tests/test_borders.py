"""Which part of the project may know what: read from the source, so that no import can slip in unseen."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("titans_train", "data_prep", "tests")
LONGEST_FILE = 400

# library -> where the product may import it
ALLOWED = {
    "megatron": ["titans_train/parallel/*"],
    "deepspeed": ["titans_train/parallel/*", "titans_train/training/checkpoint*"],
    "streaming": ["titans_train/data/*", "data_prep/*"],
}
SINGLE_PROCESS = ["titans_train/models/*", "titans_train/memory/*"]
LOGIN_NODE = ["titans_train/__init__.py", "titans_train/__main__.py", "titans_train/shape.py", "titans_train/plan*.py",
              "titans_train/placement.py", "titans_train/mixing.py", "titans_train/config/*"]  # fmt: skip
HEAVY = ("torch", "numpy", "megatron", "deepspeed", "streaming", "transformers", "matplotlib", "tensorboard")
# whole words of an identifier ("tp_rank", "ProcessGroup"); "groups" stays free: convolutions have them
DISTRIBUTED_WORDS = {"rank", "ranks", "group", "world", "collective", "collectives", "dist", "distributed", "mesh"}
COLLECTIVES = re.compile(
    r"(batch_)?(isend|irecv)(_irecv)?|barrier|broadcast_object_list|"
    r"_?(all_reduce|all_gather|reduce_scatter|all_to_all|gather_object)\w*"
)


def files(patterns: list[str] | None = None) -> list[Path]:
    """The project's Python files, in order; only those that match a pattern, if patterns are given."""
    found = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    return found if patterns is None else [path for path in found if matches(path, patterns)]


def matches(path: Path, patterns: list[str]) -> bool:
    return any(fnmatch(name(path), pattern) for pattern in patterns)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(tree: ast.AST, package: str = "") -> Iterator[str]:
    """Full dotted names that a tree imports: statements (relative ones resolved), and import_module("literal")."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = parents[: len(parents) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "import_streaming", "__import__") and isinstance(node.args[0].value, str):
                yield node.args[0].value


def at_module_level(tree: ast.Module) -> ast.Module:
    """What runs when the module is imported: function bodies and `if TYPE_CHECKING` blocks left out."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
            self.generic_visit(node)
            return node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else node

    return Strip().visit(tree)


def imported_by(path: Path, module_level: bool = False) -> list[str]:
    tree = ast.parse(path.read_text("utf-8"))
    package = name(path.parent).replace("/", ".")
    return list(imports(at_module_level(tree) if module_level else tree, package))


def is_from(module: str, library: str) -> bool:
    return module == library or module.startswith(library + ".")


def is_distributed(identifier: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier).lower().split("_")
    return bool(COLLECTIVES.fullmatch(identifier)) or not DISTRIBUTED_WORDS.isdisjoint(words)


def identifiers(tree: ast.AST) -> Iterator[str]:
    """Names of variables, attributes, arguments, keywords, functions, classes and imports; no text, no comment."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, (ast.arg, ast.keyword)):
            yield node.arg or ""
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.alias):
            yield from (node.asname or node.name).split(".")


@pytest.mark.parametrize("library", ALLOWED)
def test_a_library_is_imported_only_in_its_place(library: str) -> None:
    outside = [
        name(path)
        for path in files()
        if not matches(path, [*ALLOWED[library], "tests/*"]) and any(is_from(m, library) for m in imported_by(path))
    ]
    assert not outside, f"{library} may be imported only in {ALLOWED[library]}, not in {outside}"


def test_models_and_memory_import_nothing_distributed() -> None:
    forbidden = ("torch.distributed", "titans_train.parallel", "titans_train.training", *ALLOWED)
    found = [
        f"{name(path)}: {module}"
        for path in files(SINGLE_PROCESS)
        for module in imported_by(path)
        if any(is_from(module, library) for library in forbidden)
    ]
    assert not found, "model and memory code knows one process; what differs comes in through `parts`"


def test_models_and_memory_name_no_rank_group_or_collective() -> None:
    found = [
        f"{name(path)}: {word}"
        for path in files(SINGLE_PROCESS)
        for word in identifiers(ast.parse(path.read_text("utf-8")))
        if is_distributed(word)
    ]
    assert not found, "model and memory code knows one process; what differs comes in through `parts`"


def test_what_runs_on_a_login_node_imports_no_heavy_library() -> None:
    """`check` and `plan` answer in under 2 s; tests/test_main.py measures what the whole command imports."""
    found = [
        f"{name(path)}: {module}"
        for path in files(LOGIN_NODE)
        for module in imported_by(path, module_level=True)
        if any(is_from(module, library) for library in HEAVY)
    ]
    assert not found, "import it in the function that needs it"


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    lengths = {name(path): len(path.read_text("utf-8").splitlines()) for path in files()}
    assert not {file: length for file, length in lengths.items() if length > LONGEST_FILE}


def test_the_borders_are_drawn_around_files_that_exist() -> None:
    patterns = [*SINGLE_PROCESS, *LOGIN_NODE, "titans_train/parallel/*", "titans_train/data/*", "data_prep/*"]
    assert all(files([pattern]) for pattern in patterns)


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("import torch.distributed as d", "torch.distributed"),
        ("from torch import distributed", "torch.distributed"),
        ("def f():\n    from torch.distributed import all_reduce", "torch.distributed.all_reduce"),
        ("from ..parallel import mesh", "titans_train.parallel.mesh"),
        ("from . import scan", "titans_train.memory.scan"),
        ("import importlib\nm = importlib.import_module('streaming')", "streaming"),
    ],
)
def test_the_reader_sees_every_way_to_import(source: str, seen: str) -> None:
    assert seen in list(imports(ast.parse(source), "titans_train.memory"))


@pytest.mark.parametrize(
    "source",
    [
        "rank = 0", "tp_rank = 0", "num_ranks = 2", "f(group=g)", "self.cp_group", "x: ProcessGroup", "group_size = 2",
        "def f(world_size): ...", "dp_world = 1", "collective = f", "x.all_gather_into_tensor(y)", "torch.distributed",
    ],
)  # fmt: skip
def test_the_reader_sees_distributed_names_in_code(source: str) -> None:
    assert any(is_distributed(word) for word in identifiers(ast.parse(source)))


def test_the_reader_leaves_text_and_harmless_names_alone() -> None:
    words = list(identifiers(ast.parse("'''No rank, no group.'''\nheads_in_groups = x.gather(1, i)  # rank")))
    assert not [word for word in words if is_distributed(word)]


def test_lazy_and_type_checking_imports_do_not_run_at_module_level() -> None:
    source = "if TYPE_CHECKING:\n    import torch\nelse:\n    import json\ndef f():\n    import numpy"
    assert list(imports(at_module_level(ast.parse(source)))) == ["json"]
