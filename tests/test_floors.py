"""A file imports from its own floor or below alone, and the mathematics sees values alone."""

import ast
from collections import Counter
from pathlib import Path

import pytest

import jetflow

PACKAGE = Path(jetflow.__file__).parent
LONGEST_FILE, LONGEST_FUNCTION = 320, 60  # lines
LARGEST_PACKAGE = 17833  # lines: lower it whenever the package shrinks

# From the ground up; a name covers all below it, unless a longer name covers that. Modules of one
# floor may import each other, but not in a circle.
FLOORS = (
    ("types", "options", "buckets", "fields"),
    ("nn", "flows"),
    ("likelihood", "noise"),
    (
        "configs",
        "files",
        "hosts",
        "rendezvous",
        "rollcall",
        "signals",
        "sharding",
        "mesh",
        "optim",
        "pth",
        "npz",
    ),
    ("data", "sampling", "pictures", "archive"),
    ("checksums", "checkpoint", "workdir", "training.step"),
    ("evals",),
    ("model", "calibration"),
    ("training",),
    ("sweeps", "tools"),
    ("cli", "__main__"),
)
MATHEMATICS = ("types", "nn", "flows", "likelihood", "noise", "sampling")

# All that the mathematics may see of the world: no config object, file, host or log.
LIBRARIES = {"flax", "jax", "jaxtyping", "numpy", "optax"}
LIBRARIES |= {"collections", "contextlib", "dataclasses", "difflib", "enum", "functools", "inspect"}
LIBRARIES |= {"itertools", "math", "re", "time", "typing", "warnings"}
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
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                names.add(name if name.removeprefix("jetflow.") in known else node.module)
    return names


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

    return [module for module in graph if module and module in reachable(module)]


def impurities(sources: dict[str, str]) -> list[str]:
    """What the mathematics imports or calls, but must not."""
    lines = []
    for module, source in sources.items():
        if module.split(".")[0] not in MATHEMATICS:
            continue
        roots = {name.split(".")[0] for name in imports(source, set(sources))}
        lines += [f"jetflow.{module} imports {name}" for name in roots - LIBRARIES - {"jetflow"}]
        names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
        lines += [f"jetflow.{module} uses {name}" for name in names & ACTIONS]
    return lines


@pytest.mark.parametrize("check", [upward_imports, circles, impurities])
def test_house_rules(check):
    assert not check(modules())


@pytest.mark.parametrize(
    ("module", "line", "check"),
    [
        ("nn.causal", "from jetflow import optim", upward_imports),
        ("flows.pixels", "def f():\n    import jetflow.data.dataset", upward_imports),
        ("types", "import jetflow", upward_imports),
        ("flows.stack", "from jetflow.flows.build import build", circles),
        ("types", "from jetflow.types import Batch", circles),
        ("flows.build", "from ml_collections import ConfigDict", impurities),
        ("sampling.ancestral", "def f():\n    import os.path", impurities),
        ("noise", "print('noise')", impurities),
    ],
)
def test_broken_rule_is_caught(module, line, check):
    sources = modules()
    more = check(sources | {module: sources[module] + "\n" + line})
    assert len(more) > len(check(sources))


def test_bits_are_made_in_one_place():
    """ln 2 occurs in likelihood.py alone."""
    makers = [name for name, text in modules().items() if "log(2)" in text or "log2(" in text]
    assert makers == ["likelihood"]


def test_sizes():
    """A reader finds a file by its name, and takes in a file or a function at once."""
    sources = modules()
    names = Counter(path.name for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
    assert [name for name, count in names.items() if count > 1] == []
    lengths = {name: source.count("\n") for name, source in sources.items()}
    assert {name: size for name, size in lengths.items() if size > LONGEST_FILE} == {}
    assert sum(lengths.values()) <= LARGEST_PACKAGE
    long = [
        f"{module}.{node.name}"
        for module, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef)
        and (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION
    ]
    assert long == []
