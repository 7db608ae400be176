"""House policy: who may import whom, and what files may look like."""

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("sbf_dist", "pipelines", "launchers")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
ALL_CODE = [
    path
    for folder in (*PACKAGES, "tests", "benchmarks", "csrc")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".cpp", ".cu", ".h")
]
COMMAND_LINE = ("launchers.cli", "launchers.commands")
STARTED = ("launchers.run", "launchers.comparison", "launchers.one_shot", *COMMAND_LINE)
NO_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "core", "base"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    """All that a file imports, wherever in it: for `from a import b` both a and a.b.

    But for the front door, which imports nothing before it is asked for a name: what it offers is
    the business of test_front_door.
    """
    found: set[str] = set()
    if path == ROOT / "sbf_dist" / "__init__.py":
        return found
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            assert node.module is not None
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in ("importlib.import_module", "import_module", "__import__"):
                argument = node.args[0]
                assert isinstance(argument, ast.Constant), f"{path}:{node.lineno} hides an import"
                found.add(argument.value)
    return found


IMPORTS = {module_of(path): imports(path) for path in FILES}


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def reached(module: str) -> set[str]:
    """All modules of the packages that a module imports, directly or by way of others."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        for name in IMPORTS[waiting.pop()] & IMPORTS.keys():
            if name not in found:
                found.add(name)
                waiting.append(name)
    return found


def importers(package: str) -> set[str]:
    return {module for module, names in IMPORTS.items() if any(within(n, package) for n in names)}


def test_the_files_are_found():
    assert {"sbf_dist.ops", "pipelines.sources.digits", "launchers.cli"} <= IMPORTS.keys()
    assert within("sbf_dist.ops", *IMPORTS["sbf_dist.layers"])


def test_the_library_knows_neither_launchers_nor_pipelines():
    for package in ("launchers", "pipelines"):
        strangers = {m for m in importers(package) if within(m, "sbf_dist")}
        assert not strangers, f"{package} is imported in sbf_dist"


def test_pipelines_know_errors_files_stores_and_settings_of_the_library_at_most():
    modules = ("errors", "files", "object_storage", "patience", "recipe", "settings")
    allowed = tuple(f"sbf_dist.{name}" for name in modules)
    for module, names in IMPORTS.items():
        if not within(module, "pipelines"):
            continue
        assert not [n for n in names if within(n, "launchers")], module
        known = [n for n in names if within(n, "sbf_dist") and n != "sbf_dist"]
        assert all(within(n, *allowed) for n in known), f"{module}: {known}"


@pytest.mark.parametrize(
    ("package", "home"),
    [
        ("ray", "launchers.on_ray"),
        ("nvidia", "pipelines"),
        ("deepspeed", ("sbf_dist.train.engine", "sbf_dist.train.lean_deepspeed")),
        ("mlflow", "sbf_dist.tracking"),
        ("typer", ("launchers.cli", "launchers.commands")),
        ("rich", ("launchers", "sbf_dist.report.plan_table")),
        ("torchvision", ("sbf_dist.models", "sbf_dist.pretrained")),
        ("plotly", "sbf_dist.report"),
        ("jinja2", "sbf_dist.report.page"),
        ("torch_pruning", ("sbf_dist.compression.removal.coupled", "sbf_dist.peers.pruned")),
    ],
)
def test_a_dependency_is_known_in_its_home_alone(package, home):
    found = importers(package)
    assert found, f"{package} is not used any more"
    homes = (home,) if isinstance(home, str) else home
    assert all(within(module, *homes) for module in found), found


@pytest.mark.parametrize(
    ("part", "unknown"),
    [
        ("sbf_dist.ops", ["sbf_dist.layers", "sbf_dist.compression", "sbf_dist.train"]),
        ("sbf_dist.layers", ["sbf_dist.compression", "sbf_dist.train", "sbf_dist.models"]),
        ("sbf_dist.compression", ["sbf_dist.distill", "sbf_dist.train", "sbf_dist.export"]),
        (
            "sbf_dist.compression.fitting",
            ["sbf_dist.compression.planning", "sbf_dist.compression.removal"],
        ),
        ("sbf_dist.compression.planning", ["sbf_dist.compression.removal"]),
        ("sbf_dist.distill", ["sbf_dist.train", "sbf_dist.compression", "sbf_dist.export"]),
        ("sbf_dist.train", ["sbf_dist.distill", "sbf_dist.compression", "sbf_dist.layers"]),
        ("sbf_dist.recipe", ["sbf_dist.models", "sbf_dist.compression", "torch"]),
        ("sbf_dist.settings", ["sbf_dist.recipe", "sbf_dist.compression", "torch"]),
        ("launchers.images", [*STARTED, "launchers.on_ray"]),
        ("launchers.student", [*STARTED, "launchers.on_ray"]),
        ("launchers.on_ray", [*STARTED, "launchers.images", "launchers.display"]),
        ("launchers.storage", [*STARTED, "launchers.on_ray", "launchers.display", "torch", "ray"]),
        ("launchers.run", ["launchers.comparison", "launchers.one_shot", *COMMAND_LINE]),
        ("launchers.comparison", ["launchers.run", "launchers.on_ray", *COMMAND_LINE]),
        ("launchers.one_shot", ["launchers.run", "launchers.on_ray", *COMMAND_LINE]),
        ("launchers.commands", ["launchers.cli"]),
    ],
)
def test_parts_do_not_know_those_above_them(part, unknown):
    members = [module for module in IMPORTS if within(module, part)]
    assert members
    for module in members:
        known = reached(module)
        outside = set().union(*(IMPORTS[name] for name in (module, *known)))
        strangers = sorted(name for name in known | outside if within(name, *unknown))
        assert not strangers, f"{module} imports, directly or by way of others, {strangers}"


def modules_after(statement: str) -> set[str]:
    program = f"{statement}\nimport sys\nprint(*sorted(sys.modules))"
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=240
    )
    return set(printed.stdout.split())


def test_importing_the_library_loads_none_of_the_large_dependencies():
    everything = "import sbf_dist, sbf_dist.layers, sbf_dist.models, sbf_dist.recipe"
    loaded = modules_after(everything)
    assert "torch" in loaded
    heavy = {"ray", "deepspeed", "nvidia.dali", "mlflow", "timm", "torchvision", "matplotlib"}
    assert not heavy & loaded


def test_the_command_line_answers_without_loading_torch():
    assert not {"torch", "ray", "mlflow", "nvidia.dali"} & modules_after("import launchers.cli")


@pytest.mark.parametrize("path", ALL_CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long_or_named_for_nothing(path):
    assert len(path.read_text().splitlines()) <= 600
    assert not {*path.relative_to(ROOT).with_suffix("").parts} & NO_NAMES


def test_tests_have_names_of_their_own():
    tests = [path for path in ALL_CODE if path.is_relative_to(ROOT / "tests")]
    names = [path.name for path in tests if path.name != "conftest.py"]
    assert len(set(names)) == len(names)
    assert "__init__.py" not in names


def test_every_module_of_the_packages_says_what_it_is_for():
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert not tree.body or ast.get_docstring(tree), path


def test_what_the_set_up_installs_can_be_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for target in project["project"]["scripts"].values():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))
    # find_packages takes folders with an __init__.py, and nothing below one without.
    for path in FILES:
        folder = path.parent
        while folder != ROOT:
            assert (folder / "__init__.py").exists(), f"{path} would not be installed"
            folder = folder.parent
    for module in IMPORTS:
        if not within(module, "launchers"):  # those start Ray's imports: in test_cli
            importlib.import_module(module)
