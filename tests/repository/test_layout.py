"""The layout is the architecture: who may import whom, which names are forbidden, what stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from click.testing import Result

from xpert.commands.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "toolkit": "xpert",
    "commands": "xpert.commands",
    "selectors": "xpert.selectors",
    "experts": "xpert.experts",
    "registry": "xpert.registry",
}
# folder -> the other parts of xpert it may import
MAY_IMPORT = {
    "toolkit": set(),
    "selectors": {"toolkit"},
    "registry": {"toolkit"},
    "experts": {"toolkit", "registry"},
    "commands": {"toolkit", "selectors", "registry", "experts"},
}
HEAVY = ("torch", "transformers", "trl", "peft", "sklearn", "datasets", "faiss", "scipy", "fastapi")


def modules(folder: str) -> Iterator[Path]:
    yield from sorted((ROOT / folder).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            yield module
            if module == "xpert":
                yield from (f"xpert.{alias.name}" for alias in node.names)


def part_of(module: str) -> str | None:
    """The top-level folder an imported name lives in; None outside xpert."""
    if module.split(".")[0] != "xpert":
        return None
    second = module.split(".")[1] if "." in module else ""
    return second if second in MAY_IMPORT and second != "toolkit" else "toolkit"


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_dependencies_point_one_way(folder: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(folder)
        for name in imported(ast.parse(path.read_text(encoding="utf-8")))
        if part_of(name) not in {None, folder} | MAY_IMPORT[folder]
        and not (folder == "toolkit" and path.name == "__main__.py")
    ]
    assert not wrong


@pytest.mark.parametrize("folder", ["toolkit", "commands", "selectors", "registry"])
def test_heavy_packages_are_imported_inside_functions(folder: str) -> None:
    wrong = []
    for path in modules(folder):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {name.split(".")[0] for name in imported_at_the_top(tree)}
        allowed = {"torch"} if computes(path) else set()
        wrong += [f"{path.relative_to(ROOT)}: {name}" for name in (names & set(HEAVY)) - allowed]
    assert not wrong


@pytest.mark.parametrize("folder", PACKAGES)
def test_modules_that_compute_are_imported_inside_functions(folder: str) -> None:
    """toolkit's modules of tensor code import torch at their top, so nothing light may import them at its own."""
    computing = {
        f"xpert.{path.relative_to(ROOT / 'toolkit').with_suffix('')}" for path in modules("toolkit") if computes(path)
    }
    computing = {name.replace("/", ".") for name in computing}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in modules(folder)
        if not imports_torch(path)
        for name in imported_at_the_top(ast.parse(path.read_text(encoding="utf-8")))
        if name in computing
    ]
    assert not wrong


def imported_at_the_top(tree: ast.Module) -> set[str]:
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {name for node in top for name in imported(node)}


def imports_torch(path: Path) -> bool:
    names = imported_at_the_top(ast.parse(path.read_text(encoding="utf-8")))
    return any(name.split(".")[0] == "torch" for name in names)


def computes(path: Path) -> bool:
    """Whether a module of the toolkit is tensor code, as all of `experts` may be."""
    return path.is_relative_to(ROOT / "toolkit") and imports_torch(path)


def test_no_command_loads_anything_heavy_before_it_runs() -> None:
    names = [
        ".".join(("xpert.commands", *path.relative_to(ROOT / "commands").with_suffix("").parts))
        for path in modules("commands")
    ]
    code = f"import sys, {', '.join(names)}; print(*sorted(m for m in {HEAVY!r} if m in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert loaded == []


@pytest.mark.parametrize("folder", PACKAGES)
def test_no_file_bears_the_name_of_a_standard_module(folder: str) -> None:
    assert not [p for p in modules(folder) if p.stem in sys.stdlib_module_names]


def test_no_drawers() -> None:
    names = ("utils", "helpers", "common", "misc", "manager", "handler")
    assert not [p for folder in PACKAGES for p in modules(folder) if p.stem in names]


def test_every_folder_with_code_is_packaged() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for folder, package in PACKAGES.items():
        for path in modules(folder):
            inner = path.parent.relative_to(ROOT / folder).parts
            name = ".".join((package, *inner))
            assert f'"{name}"' in text, f"{name} is missing from [tool.setuptools] packages"


def test_every_file_beside_the_code_is_packaged() -> None:
    """Templates, styles, schemas: without a pattern they are missing wherever xpert is installed."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    names, data = setuptools["packages"], setuptools["package-data"]
    for folder, package in PACKAGES.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_dir() or path.suffix in (".py", ".pyc"):
                continue
            parts = path.relative_to(ROOT / folder).parts
            owner = next(
                (depth, name)
                for depth in range(len(parts) - 1, -1, -1)
                if (name := ".".join((package, *parts[:depth]))) in names
            )
            inner = Path(*parts[owner[0] :])
            patterns = [*data.get("*", ()), *data.get(owner[1], ())]
            fits = (len(Path(one).parts) == len(inner.parts) and inner.match(one) for one in patterns)
            assert any(fits), f"no pattern of [tool.setuptools.package-data] takes {path.relative_to(ROOT)}"


def test_every_imported_package_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *project["optional-dependencies"]["serve"],
        *project["optional-dependencies"]["st"],
        *project["optional-dependencies"]["ray"],
        *project["optional-dependencies"]["judge"],
        *project["optional-dependencies"]["sign"],
        *project["optional-dependencies"]["vllm"],
        *project["optional-dependencies"]["otel"],
    ]
    lines += (ROOT / "demo-packages.txt").read_text(encoding="utf-8").split()
    declared = {re.split(r"[<>=\[ ]", line)[0].lower().replace("_", "-") for line in lines}
    distributions = packages_distributions()
    missing = set()
    for folder in PACKAGES:
        for path in modules(folder):
            for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
                top = name.split(".")[0]
                if top == "xpert" or top in sys.stdlib_module_names:
                    continue
                names = {found.lower().replace("_", "-") for found in distributions.get(top, [top])}
                if not names & declared:
                    missing.add(f"{path.relative_to(ROOT)} imports {top}")
    assert not missing


def test_selectors_never_shadows_the_standard_library() -> None:
    assert not (ROOT / "selectors" / "__init__.py").exists()
    code = "import asyncio, subprocess, selectors; selectors.DefaultSelector"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    subprocess.run([sys.executable, "-m", "pip", "--version"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("module", ["xpert", "xpert.commands.main", "xpert.registry.card", "xpert.protocols"])
def test_light_modules_load_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted(m for m in {HEAVY!r} if m in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert loaded == []


def test_help_imports_no_command() -> None:
    code = (
        "import sys; from xpert.commands.main import cli\n"
        "try: cli(['--help'])\n"
        "except SystemExit: pass\n"
        "print(*sorted(m for m in sys.modules if m.startswith('xpert.')), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "Commands:" in done.stdout
    assert set(done.stderr.split()) == {"xpert.commands", "xpert.commands.lazy", "xpert.commands.main", "xpert.errors"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_is_there(name: str, xpert: Callable[..., Result]) -> None:
    assert xpert(name, "--help").exit_code == 0
