"""The arrows between packages and the habits of the house, read from the source with `ast`.

Each rule is a function from one parsed module to complaints, so that the rules can be tried on bad
examples too; a failing test lists every offender as `file:line: what is wrong`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from raylign.config import load_recipe

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# What each part may import of ours; the longest matching prefix decides.
CORE = tuple(f"raylign.{path.stem}" for path in (ROOT / "platform/raylign").glob("[a-z]*.py"))
ARROWS = {
    "raylign": ("raylign",),
    "raylign.config": ("raylign.config",),
    "raylign.algorithms": ("raylign.algorithms",),
    **dict.fromkeys(CORE, (*CORE, "raylign.config")),
    "actors": ("raylign", "actors"),
    "jobs": ("raylign", "actors", "jobs"),
}
OURS = ("raylign", "actors", "jobs")

# Where each of these may be imported; nowhere else.
CONFINED = {
    "ray": (
        "raylign.runtime",
        "raylign.data.corpus*",
        "raylign.training.supervised",
        "raylign.training.tuning",
        "raylign.training.reservation",
        "actors*",
        "jobs*",
    ),
    "vllm": ("raylign.inference.vllm_generator",),
    "deepspeed": ("raylign.training.deepspeed*",),
}
# Heavy files, and the one factory that imports each when asked for.
LAZY = {
    "raylign.inference.vllm_generator": "raylign.inference.generator",
    "raylign.training.deepspeed_engine": "raylign.training.engine",
}
VAGUE = {"utils", "util", "helpers", "helper", "common", "misc", "manager", "base", "core", "tools"}

# Broad handlers stand at the edge of a process or thread, or around code that is not ours.
BROAD_HANDLERS = {
    "raylign.runtime": "Ray's start raises a bare Exception; all but that one go on",
    "raylign.rewards.scoring": "a user's reward function may raise anything; it is counted",
    "raylign.outbox": "the edge of a thread: what files and sinks raise is counted",
    "raylign.inference.serving": "the edge of the generator's thread: waiting callers must hear",
    "raylign.training.supervised": "the edge of the fitting thread: the main one raises it",
    "jobs.tune": "the edge of two threads: a trial's job, and the search",
    "raylign.environments.responding": "a user's environment may raise anything; it is counted",
    "raylign.rewards.guest": "the edge of a confined process: what foreign code raises is reported",
}


@dataclass(frozen=True, slots=True)
class Module:
    name: str
    path: str
    source: str
    tree: ast.Module
    nodes: tuple[ast.AST, ...]


@dataclass(frozen=True, slots=True)
class Import:
    target: str
    line: int
    lazy: bool
    """Inside a function."""


def parse(name: str, path: str, source: str) -> Module:
    tree = ast.parse(source)
    return Module(name, path, source, tree, tuple(ast.walk(tree)))


def read_modules() -> list[Module]:
    modules = []
    for base, package in (("platform", "raylign"), (".", "actors"), (".", "jobs")):
        for file in sorted((ROOT / base / package).rglob("*.py")):
            parts = file.relative_to(ROOT / base).with_suffix("").parts
            name = ".".join(part for part in parts if part != "__init__")
            modules.append(parse(name, str(file.relative_to(ROOT)), file.read_text("utf-8")))
    return modules


MODULES = read_modules()


def list_imports(module: Module) -> Iterator[Import]:
    """Absolute targets; `from raylign import x` counts as `raylign.x`."""
    lazy = {
        id(inner)
        for node in module.nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    for node in module.nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, id(node) in lazy)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.path}:{node.lineno}: relative import"
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", node.lineno, id(node) in lazy)


def is_below(name: str, *parents: str) -> bool:
    """`raylign.data.corpus.pipeline*` also matches raylign.data.corpus_stages."""
    return any(
        name.startswith(parent[:-1])
        if parent.endswith("*")
        else name == parent or name.startswith(f"{parent}.")
        for parent in parents
    )


def check_arrows(module: Module) -> Iterator[tuple[int, str]]:
    prefix = max((p for p in ARROWS if is_below(module.name, p)), key=len)
    for item in list_imports(module):
        if is_below(item.target, *OURS) and not is_below(item.target, *ARROWS[prefix]):
            yield item.line, f"{prefix} may not import {item.target}"


def check_confinement(module: Module) -> Iterator[tuple[int, str]]:
    for item in list_imports(module):
        library = item.target.split(".")[0]
        if library in CONFINED and not is_below(module.name, *CONFINED[library]):
            yield item.line, f"{library} belongs into {', '.join(CONFINED[library])}"
        for heavy, factory in LAZY.items():
            if is_below(item.target, heavy) and not (item.lazy and module.name == factory):
                yield item.line, f"only a function of {factory} imports {heavy}"


def check_algorithms(module: Module) -> Iterator[tuple[int, str]]:
    """The mathematics needs torch and the standard library."""
    if is_below(module.name, "raylign.algorithms"):
        for item in list_imports(module):
            library = item.target.split(".")[0]
            if library not in ("torch", "raylign") and library not in sys.stdlib_module_names:
                yield item.line, f"raylign.algorithms may not import {library}"


def check_size(module: Module) -> Iterator[tuple[int, str]]:
    lines = module.source.count("\n")
    if lines > MAX_FILE_LINES:
        yield 1, f"{lines} lines; the limit is {MAX_FILE_LINES}"
    for node in module.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield node.lineno, f"{node.name} has {length} lines; limit {MAX_FUNCTION_LINES}"


def check_name(module: Module) -> Iterator[tuple[int, str]]:
    for word in re.split(r"[._]", module.name):
        if word in VAGUE:
            yield 1, f"{word!r} says nothing; name the module by what it does"


def check_prints(module: Module) -> Iterator[tuple[int, str]]:
    if not is_below(module.name, "jobs"):
        for node in module.nodes:
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                yield node.lineno, "print() in library code; return it, log it, or use the board"


def check_handlers(module: Module) -> Iterator[tuple[int, str]]:
    if module.name not in BROAD_HANDLERS:
        yield from ((line, "broad except; name what you expect") for line in list_broad(module))


def list_broad(module: Module) -> list[int]:
    """Lines of `except:`, `except Exception` and `except BaseException`."""
    return [
        node.lineno
        for node in module.nodes
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or re.search(r"\b(Base)?Exception\b", ast.unparse(node.type)))
    ]


def check_form(module: Module) -> Iterator[tuple[int, str]]:
    """A docstring, postponed annotations, and an import without effects."""
    if not ast.get_docstring(module.tree):
        yield 1, "no module docstring"
    if module.path.endswith("__init__.py"):
        return
    if "from __future__ import annotations" not in module.source:
        yield 1, "no `from __future__ import annotations`"
    for node in module.tree.body[1:]:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield node.lineno, f"importing this runs {ast.unparse(node.value)}"


RULES: tuple[Callable[[Module], Iterator[tuple[int, str]]], ...] = (
    check_arrows,
    check_confinement,
    check_algorithms,
    check_size,
    check_name,
    check_prints,
    check_handlers,
    check_form,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_source_follows(rule: Callable[[Module], Iterator[tuple[int, str]]]) -> None:
    assert len(MODULES) > 40
    complaints = [f"{m.path}:{line}: {text}" for m in MODULES for line, text in rule(m)]
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize(
    ("rule", "name", "source"),
    [
        (check_arrows, "raylign.models.x", "from actors.learner import LearnerGroup"),
        (check_arrows, "raylign.config.x", "from raylign import run"),
        (check_arrows, "raylign.algorithms.x", "from raylign.records import Batch"),
        (check_arrows, "raylign.run", "import raylign.data.packing"),
        (check_arrows, "actors.x", "def f():\n    import jobs.entry"),
        (check_confinement, "raylign.models.x", "import ray.data"),
        (check_confinement, "actors.x", "from vllm import LLM"),
        (check_confinement, "jobs.x", "def f():\n    import deepspeed"),
        (
            check_confinement,
            "raylign.inference.generator",
            "from raylign.inference.vllm_generator import VLLMGenerator",
        ),
        (check_algorithms, "raylign.algorithms.x", "import numpy"),
        (check_size, "raylign.x", "x = 1\n" * 401),
        (check_size, "raylign.x", "def f():\n" + "    x = 1\n" * 60),
        (check_name, "raylign.data.text_utils", ""),
        (check_prints, "actors.x", "def f():\n    print(1)"),
        (check_handlers, "jobs.x", "try:\n    f()\nexcept (ValueError, Exception):\n    pass"),
        (check_handlers, "jobs.x", "try:\n    f()\nexcept:\n    pass"),
        (check_form, "jobs.x", '"""Doc."""\nfrom __future__ import annotations\nsetup()'),
        (check_form, "jobs.x", "from __future__ import annotations"),
    ],
)
def test_rules_notice(
    rule: Callable[[Module], Iterator[tuple[int, str]]], name: str, source: str
) -> None:
    assert len(list(rule(parse(name, f"{name}.py", source)))) == 1


def test_every_allowed_broad_handler_is_still_there() -> None:
    used = {module.name for module in MODULES if list_broad(module)}
    assert set(BROAD_HANDLERS) <= used


def test_modules_import_each_other_without_cycles() -> None:
    names = {module.name for module in MODULES}
    edges: dict[str, set[str]] = {}
    for module in MODULES:
        targets = [i.target for i in list_imports(module) if not i.lazy]
        # `from a.b import c` is a.b.c when that is a module, and a.b when c is a name in it.
        ours = {t if t in names else t.rpartition(".")[0] for t in targets}
        edges[module.name] = (ours & names) - {module.name}
    while leaves := [name for name, targets in edges.items() if not targets]:
        for leaf in leaves:
            del edges[leaf]
        for targets in edges.values():
            targets.difference_update(leaves)
    assert not edges, f"in or above a cycle: {edges}"


def test_platform_stays_the_name_of_the_standard_library_module() -> None:
    assert not (ROOT / "platform/__init__.py").exists()
    code = "import platform, jobs, raylign; print(platform.system(), raylign.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split()[:1] == ["Linux"], done.stderr
    assert str(ROOT / "platform") in done.stdout


@pytest.mark.parametrize(
    "file", sorted((ROOT / "jobs/recipes").glob("*.yaml")), ids=lambda f: f.stem
)
def test_recipe_loads(file: Path) -> None:
    load_recipe(file)


def test_readme_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    tree = readme.partition("\n## The tree\n")[2].partition("\n## ")[0]
    parts = re.split(r"^(platform/raylign|actors|jobs|cluster)/", tree, flags=re.M)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    sections["raylign"] = sections.pop("platform/raylign")
    missing = []
    for module in MODULES:
        top, *rest = module.name.split(".")
        # Files, and packages of up to two levels; what a deeper package holds is its own affair.
        if rest and not re.search(rf"\b{rest[:2][-1]}\b", sections[top]):
            missing.append(module.name)
    assert not missing, f"not in README's tree: {missing}"


def test_readme_names_nothing_that_is_not_there() -> None:
    """Its links, the paths it gives, and the jobs it runs."""
    readme = (ROOT / "README.md").read_text("utf-8")
    jobs = set(re.findall(r"python -m (jobs\.\w+)", readme))
    assert jobs
    assert jobs <= {module.name for module in MODULES}
    paths = re.findall(
        r"\b((?:platform|jobs|actors|cluster|tests|requirements)/[\w./-]*\w)", readme
    )
    assert not [path for path in paths if not (ROOT / path).exists()]
