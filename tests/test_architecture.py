"""The shape of the house: import directions, sizes, docstring headings, a quiet import."""

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import pintpot
from pintpot.core.registry import WINGS, techniques

SOURCE = Path(pintpot.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
LEVEL = {
    "core": 0,
    "kernels": 1,
    **dict.fromkeys(WINGS, 2),
    "ledger": 2,
    "reference": 2,
    "planner": 3,
    "jobs": 4,
    "cli": 5,
}
HEADINGS = ("Source:", "Differs:", "Saves:", "Shapes:", "Composes:", "Use when:", "Not when:")
MOST_FILE_LINES = 500
MOST_FUNCTION_LINES = 50
MOST_ARGUMENTS = 8


def package_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else ""


def imports_of(path: Path) -> set[str]:
    """The packages of ours that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("pintpot.") and "." in name}
    return {name for name in found if name in LEVEL}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    package = package_of(path)
    if not package:
        return
    assert package in LEVEL, f"{package} has no place in the order of packages"
    wrong = {other for other in imports_of(path) - {package} if LEVEL[other] >= LEVEL[package]}
    assert not wrong, f"{path.relative_to(SOURCE)} imports {', '.join(sorted(wrong))}"


def measure_sizes() -> list[tuple[str, int, int]]:
    """(what, size, limit) for every file, function and signature over its limit."""
    over = []
    for path in FILES:
        name = str(path.relative_to(SOURCE))
        text = path.read_text(encoding="utf-8")
        sizes = [(name, len(text.splitlines()), MOST_FILE_LINES)]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (node.end_lineno - body[0].lineno + 1) if body else 0
                arguments = len(node.args.args) + len(node.args.kwonlyargs) + len(node.args.posonlyargs)
                sizes.append((f"{name}:{node.name}", lines, MOST_FUNCTION_LINES))
                if package_of(path) != "cli":
                    sizes.append((f"{name}:{node.name} arguments", arguments, MOST_ARGUMENTS))
        over += [entry for entry in sizes if entry[1] > entry[2]]
    return over


def test_sizes():
    over = measure_sizes()
    for what, size, limit in over:
        warnings.warn(f"{what}: {size}, better at most {limit}", stacklevel=1)
    far_over = [entry for entry in over if entry[1] > 2 * entry[2]]
    assert not far_over


@pytest.mark.parametrize("name", techniques())
def test_technique_docstring_headings(name):
    kind = techniques()[name]
    doc = sys.modules[kind.__module__].__doc__ or ""
    positions = [doc.find(heading) for heading in HEADINGS]
    assert -1 not in positions, f"{name}: missing {HEADINGS[positions.index(-1)]}"
    assert positions == sorted(positions), f"{name}: headings out of order"
    assert kind.facts.source.year
    assert kind.facts.accounts


def test_each_technique_is_one_file_named_after_it():
    for name, kind in techniques().items():
        package, _, file = kind.__module__.rpartition(".")
        # The name of a module cannot begin with a digit.
        assert file == name.replace("-", "_").replace("1bit", "onebit")
        assert f"{package}.".startswith(f"pintpot.{kind.facts.wing}.")


QUIET_IMPORT = """
import sys
import transformers, torch, peft
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
def state():
    modules = [m for n, m in sorted(sys.modules.items()) if n.split(".")[0] in ("transformers", "torch", "peft")]
    plain = {(m.__name__, k): id(v) for m in modules for k, v in vars(m).items() if callable(v)}
    return plain, sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()), sorted(AUTO_QUANTIZER_MAPPING)
before = state()
import pintpot
after = state()
assert all(after[0].get(k) == v for k, v in before[0].items()), "a function of another library was replaced"
assert before[1:] == after[1:], "something was registered in transformers by the import alone"
assert not torch.cuda.is_initialized()
"""


def test_import_touches_no_global_and_no_accelerator():
    done = subprocess.run([sys.executable, "-c", QUIET_IMPORT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_import_alone_loads_no_heavy_library():
    code = (
        "import sys, pintpot; print([m for m in ('torch', 'transformers', 'peft', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
