"""A file imports only from its floor or below, and the mathematics sees values alone."""

import ast
from pathlib import Path

import pytest

import jetflow

PACKAGE = Path(jetflow.__file__).parent

# From the ground up; a name covers all that is below it. Modules of one floor may import each
# other, but not in a circle.
FLOORS = (
    ("types", "config"),
    ("nn", "flows.affine", "flows.orders", "flows.pixels"),
    ("flows",),
    ("likelihood", "noise"),
    ("sharding", "optim", "state"),
    ("step", "sampling"),
    ("data", "checkpoint", "files", "hosts", "manifest", "pth", "report"),
    ("evals",),
    ("environment", "run", "transfer", "transfer_plan", "workdir"),
    ("archive", "bench", "loop", "plan", "stop", "sweeps"),
    ("page",),
    ("convert",),
    ("commands",),
    ("cli",),
)
MATHEMATICS = {name for floor in FLOORS[:6] for name in floor} - {"config"}

# All that the mathematics may see of the world: no config object, file, host or log.
LIBRARIES = {"flax", "jax", "jaxtyping", "numpy", "optax"}
LIBRARIES |= {"collections", "contextlib", "dataclasses", "difflib", "enum", "functools", "inspect"}
LIBRARIES |= {"itertools", "math", "re", "typing", "warnings"}
ACTIONS = {"breakpoint", "eval", "exec", "input", "open", "print"}


def modules() -> dict[str, str]:
    """Name below jetflow → source; "" is jetflow itself, the roof."""
    sources = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        sources[".".join(part for part in parts if part != "__init__")] = path.read_text("utf-8")
    return sources


def imports(source: str, known: set[str]) -> set[str]:
    """What a source imports, also inside functions: "jax.numpy", "jetflow.flows.affine"."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name.removeprefix("jetflow.") in known else node.module)
    return found


def within(imported: set[str]) -> set[str]:
    """The imports from jetflow, as names below it."""
    ours = {name for name in imported if name.split(".")[0] == "jetflow"}
    return {name.removeprefix("jetflow").removeprefix(".") for name in ours}


def floor(module: str) -> int:
    """The floor of the longest name that covers a module."""
    matches = [
        (len(name), level)
        for level, names in enumerate(FLOORS)
        for name in names
        if module == name or module.startswith(name + ".")
    ]
    assert matches, f"jetflow.{module} is on no floor; give it one in FLOORS"
    return max(matches)[1]


def upward_imports(sources: dict[str, str]) -> list[str]:
    return [
        f"jetflow.{module} imports jetflow.{name}"
        for module, source in sources.items()
        if module
        for name in within(imports(source, set(sources)))
        if not name or floor(name) > floor(module)
    ]


def circles(sources: dict[str, str]) -> list[str]:
    """Modules that import themselves by way of others."""
    graph = {module: within(imports(text, set(sources))) for module, text in sources.items()}

    def reachable(module: str) -> set[str]:
        seen, ahead = set(), set(graph[module])
        while ahead:
            name = ahead.pop()
            seen.add(name)
            ahead |= graph.get(name, set()) - seen
        return seen

    return [module for module in graph if module in reachable(module)]


def impurities(sources: dict[str, str]) -> list[str]:
    """What the mathematics imports or calls, but must not."""
    found = []
    for module, source in sources.items():
        if not any(module == name or module.startswith(name + ".") for name in MATHEMATICS):
            continue
        roots = {name.split(".")[0] for name in imports(source, set(sources))}
        found += [f"jetflow.{module} imports {name}" for name in roots - LIBRARIES - {"jetflow"}]
        names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
        found += [f"jetflow.{module} uses {name}" for name in names & ACTIONS]
    return found


def test_imports_go_downwards():
    assert not upward_imports(modules())


def test_imports_go_in_no_circle():
    assert not circles(modules())


def test_the_mathematics_sees_values_alone():
    assert not impurities(modules())


def test_every_module_is_seen():
    assert {"types", "nn.causal", "flows.stack", "step", "sampling.ancestral"} <= set(modules())


def test_bits_are_made_in_one_place():
    """ln 2 occurs in likelihood.py alone."""
    sources = modules()
    makers = [
        module for module, source in sources.items() if "log(2)" in source or "log2(" in source
    ]
    assert makers == ["likelihood"]


@pytest.mark.parametrize(
    ("module", "line", "check"),
    [
        ("nn.causal", "from jetflow import step", upward_imports),
        ("flows.pixels", "from jetflow.flows.stack import Stack", upward_imports),
        ("step", "def f():\n    import jetflow.data.pipeline", upward_imports),
        ("types", "import jetflow", upward_imports),
        ("flows.stack", "from jetflow.flows.build import build", circles),
        ("types", "from jetflow.types import Batch", circles),
        ("flows.build", "from ml_collections import ConfigDict", impurities),
        ("noise", "from absl import logging", impurities),
        ("sampling.ancestral", "def f():\n    import os.path", impurities),
        ("step", "print('step')", impurities),
    ],
)
def test_bug_is_caught(module, line, check):
    sources = modules()
    more = check(sources | {module: sources[module] + "\n" + line})
    assert len(more) > len(check(sources))
