"""Who may import whom. The layers are in pyproject.toml; the rest is here."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = (
    "benchmarks",
    "cluster",
    "contracts",
    "decode_worker",
    "engine",
    "kv_transfer",
    "prefill_worker",
    "router",
    "rpc",
)
SOURCES = sorted(file for package in PACKAGES for file in (REPOSITORY / package).rglob("*.py"))


def imported(file: Path) -> Iterator[str]:
    """Top-level names of all modules that a file imports, lazily or not."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {file}"
            yield (node.module or "").partition(".")[0]


def importers(library: str) -> set[str]:
    return {str(file.relative_to(REPOSITORY)) for file in SOURCES if library in set(imported(file))}


def test_import_linter() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("library", "places"),
    [
        pytest.param("grpc", ("rpc/", "prefill_worker/servicer.py", "decode_worker/servicer.py")),
        pytest.param("nixl", ("kv_transfer/nixl.py",)),
        pytest.param(
            "ray",
            (
                "cluster/",
                "router/deployment.py",
            ),
        ),
        pytest.param(
            "torch",
            ("engine/", "kv_transfer/", "prefill_worker/", "decode_worker/", "benchmarks/micro"),
        ),
        pytest.param("transformers", ("engine/",)),
        pytest.param("fastapi", ("router/",)),
    ],
)
def test_a_library_stays_in_its_place(library: str, places: tuple[str, ...]) -> None:
    files = importers(library)
    assert files, f"nothing imports {library}: is this rule still needed?"
    assert {file for file in files if not file.startswith(places)} == set()


def test_contracts_use_the_standard_library_only() -> None:
    allowed = sys.stdlib_module_names | {"contracts"}
    for file in (REPOSITORY / "contracts").rglob("*.py"):
        assert set(imported(file)) <= allowed, file


def test_loading_the_whole_router_loads_no_torch() -> None:
    program = """
import importlib, pkgutil, sys
import router
for module in pkgutil.walk_packages(router.__path__, "router."):
    importlib.import_module(module.name)
import router.app
heavy = {"torch", "transformers", "nixl", "engine", "kv_transfer"} & set(sys.modules)
sys.exit(f"loaded: {sorted(heavy)}" if heavy else 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
