"""The house keeps its own rules: imports go downward, the stub tells the truth, the package ships
what it needs."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib import metadata, resources
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "triton", "lm_eval", "matplotlib", "mergekit", "huggingface_hub"}
MAX_LINES = 600


def _rows() -> dict[str, int]:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    block = text.split("<!-- rows -->")[1].split("<!-- end of rows -->")[0]
    lines = [line.split() for line in block.splitlines() if line.strip()]
    return {name: row for row, names in enumerate(lines) for name in names}


ROWS = _rows()
MODULES = {
    **{p: "fastmerge." + ".".join(p.relative_to(ROOT / "fastmerge").with_suffix("").parts)
       for p in sorted((ROOT / "fastmerge").rglob("*.py"))},
    **{p: f"fastmerge.kernels.{p.stem}" for p in sorted((ROOT / "kernels").rglob("*.py"))},
}  # fmt: skip


def _entry(module: str) -> str:
    """The row entry of a dotted name below fastmerge: its first part, or __init__ for the package
    itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _imports(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, dotted name) of every import of fastmerge, at any depth."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            module = node.module or ""
            if module == "fastmerge":  # names of submodules, or of the package itself
                found += [(node.lineno, f"fastmerge.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, module))
    return [(line, name) for line, name in found if name.split(".")[0] == "fastmerge"]


def _files_imported(tree: ast.AST) -> set[str]:
    """The modules of fastmerge that a file imports at any depth, types' imports included."""
    known = set(MODULES.values())
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import name`: a module of that name, else what the package's face holds.
            names = [
                inner if (inner := f"{node.module}.{alias.name}") in known else node.module
                for alias in node.names
            ]
        for name in names:
            found.add(name if name in known else f"{name}.__init__")
    return (found & known) - {"fastmerge.__init__"}  # _C, the types' face: nothing below it


def test_no_circles_among_files() -> None:
    graph = {name: _files_imported(ast.parse(path.read_text())) for path, name in MODULES.items()}
    assert sum(map(len, graph.values())) > 300
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_every_module_has_a_row() -> None:
    missing = sorted({_entry(name) for name in MODULES.values()} - set(ROWS))
    assert not missing, f"add to the import rows in CONTRIBUTING.md: {missing}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward(path: Path) -> None:
    own = _entry(MODULES[path])
    wrong = []
    for line, name in _imports(ast.parse(path.read_text())):
        if name == "fastmerge.__version__":  # a constant of the package, not a layer
            continue
        other = _entry(name)
        if other != own and ROWS.get(other, len(ROWS)) >= ROWS[own]:
            wrong.append(f"line {line}: {own} imports {name}")
    assert not wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_imports_are_inside_functions(path: Path) -> None:
    allowed = {"torch", "triton"} if path.is_relative_to(ROOT / "kernels") else set()
    if path == ROOT / "kernels" / "__init__.py":
        allowed = set()
    wrong = []

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            names = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                names = [child.module or ""]
            wrong.extend(n for n in names if n.split(".")[0] in HEAVY - allowed)
            visit(child)

    visit(ast.parse(path.read_text()))
    assert not wrong


def test_no_file_is_too_long() -> None:
    suffixes = {".py", ".pyi", ".cpp", ".h", ".inl"}
    folders = ("fastmerge", "kernels", "csrc", "tests", "benchmarks")
    files = [p for f in folders for p in (ROOT / f).rglob("*") if p.suffix in suffixes]
    assert len(files) > 20
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in files}
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


# --- the extension and its stub
# -----------------------------------------------------------------------

Parameters = tuple[tuple[str, str, bool], ...]  # name, kind, whether it has a default


def _parameters(arguments: ast.arguments) -> Parameters:
    plain = [*arguments.posonlyargs, *arguments.args]
    bare = len(plain) - len(arguments.defaults)
    positional = [(a.arg, "positional", i >= bare) for i, a in enumerate(plain)]
    keyword = [
        (a.arg, "keyword", default is not None)
        for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return tuple((n, k, d) for n, k, d in (*positional, *keyword) if n != "self")


def _stub() -> dict[str, Parameters | str]:
    """Dotted name -> parameters, or 'class' or 'property', as the stub has it."""
    found: dict[str, Parameters | str] = {}

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                found[prefix + node.name] = "class"
                collect(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                decorated = [ast.unparse(d) for d in node.decorator_list]
                is_property = "property" in decorated
                found[prefix + node.name] = "property" if is_property else _parameters(node.args)

    collect(ast.parse((ROOT / "fastmerge" / "_C.pyi").read_text()).body, "")
    return found


def _compiled() -> dict[str, Parameters | str]:
    """The same of the extension itself, from the signatures that pybind11 writes into
    docstrings."""
    from fastmerge import _C

    found: dict[str, Parameters | str] = {}

    def signature(name: str, doc: str) -> Parameters:
        line = doc.splitlines()[0]
        function = ast.parse(f"def {line}: ...").body[0]
        assert isinstance(function, ast.FunctionDef), name
        return _parameters(function.args)

    def collect(owner: object, prefix: str) -> None:
        for name, value in vars(owner).items():
            if name.startswith("_") and name != "__init__":
                continue
            if isinstance(value, type):
                found[prefix + name] = "class"
                collect(value, f"{prefix}{name}.")
            elif isinstance(value, property):
                found[prefix + name] = "property"
            elif type(value).__name__ != "wrapper_descriptor":  # a class without a constructor
                found[prefix + name] = signature(prefix + name, value.__doc__ or "")

    collect(_C, "")
    return found


def test_stub_matches_the_extension() -> None:
    stub, compiled = _stub(), _compiled()
    assert sorted(stub) == sorted(compiled)
    assert {n: (stub[n], compiled[n]) for n in stub if stub[n] != compiled[n]} == {}


# --- benchmarks
# ----------------------------------------------------------------------------


def test_one_command_repeats_every_committed_number() -> None:
    spec = importlib.util.spec_from_file_location("every", ROOT / "benchmarks" / "all.py")
    assert spec is not None and spec.loader is not None
    every = importlib.util.module_from_spec(spec)
    sys.modules["every"] = every  # where dataclasses look for their module
    spec.loader.exec_module(every)
    written = [name for preset in every.PRESETS for name in preset.writes]
    assert len(written) == len(set(written))
    kept = {path.name for path in (ROOT / "benchmarks" / "results").iterdir()}
    kept = {name for name in kept if not name.startswith("rehearsal")}
    assert not kept - set(written), "no preset of benchmarks/all.py writes them"
    for preset in every.PRESETS:
        assert (ROOT / "benchmarks" / preset.command.split()[0]).is_file()
        assert not preset.printed or len(preset.writes) == 1


def test_nothing_imports_the_benchmarks() -> None:
    """But the command, when it runs: they are for measuring from outside."""
    wrong = [
        str(path.relative_to(ROOT))
        for path, name in MODULES.items()
        if not name.startswith("fastmerge.bench")
        and any(n.startswith("fastmerge.bench") for _, n in _imports(ast.parse(path.read_text())))
    ]
    assert wrong == ["fastmerge/cli/bench.py"]


# --- the installed package
# ----------------------------------------------------------------------------


def test_package_is_typed_and_complete() -> None:
    files = resources.files("fastmerge")
    assert files.joinpath("py.typed").is_file()
    assert files.joinpath("_C.pyi").is_file()
    assert importlib.util.find_spec("fastmerge.kernels") is not None
    assert metadata.version("fastmerge") == __import__("fastmerge").__version__


def test_base_install_needs_no_heavy_package() -> None:
    base = [r for r in metadata.requires("fastmerge") or [] if "extra ==" not in r]
    names = sorted(r.split(">")[0].strip().lower() for r in base)
    assert names == [
        "markdown-it-py",
        "numpy",
        "pyyaml",
        "rich",
        "safetensors",
    ]
    assert not [r for r in base if "==" in r or "<" in r or "~" in r], "lower bounds only"


def test_bare_kernels_is_not_importable(tmp_path: Path) -> None:
    # Hugging Face's package has this name; our folder must not answer to it (see CONTRIBUTING.md's
    # tree). Where an installation finds it: the tree itself may be on this process's PYTHONPATH.
    code = "import importlib.util as u; print(getattr(u.find_spec('kernels'), 'origin', None))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    assert not Path(done.stdout.strip()).is_relative_to(ROOT)


def test_merge_never_imports_torch(zoo, tmp_path: Path) -> None:
    base = zoo.base()
    tune = zoo.tune(base, "tune")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: slerp\nbase_model: {base}\nparameters: {{t: 0.3}}\ndtype: bfloat16\n"
        f"models: [{{model: {base}}}, {{model: {tune}}}]\n"
    )
    script = (
        "import sys\n"
        "from fastmerge.cli import main\n"
        f"sys.argv = ['', 'merge', {str(recipe)!r}, {str(tmp_path / 'out')!r}, '--quiet']\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"print(sorted({{name.split('.')[0] for name in sys.modules}} & {HEAVY!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[]"
    assert (tmp_path / "out" / "model.safetensors").exists()
