"""The shape of the repository, and that its documents speak of things that exist."""

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = sorted(
    folder.name
    for folder in REPOSITORY.iterdir()
    if folder.name != "tests" and (folder / "__init__.py").exists()
)
DOCUMENTS = sorted(
    [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")], key=lambda file: file.name
)
MAX_LINES = 450
# `engine/loop.py`, `cluster_configs/local.yaml`: a path with a folder and an ending.
NAMED_FILE = re.compile(r"`([\w.-]+(?:/[\w.-]+)*/[\w-]+\.(?:py|proto|yaml|md|sh|toml|txt))`")
COMMAND = re.compile(r"^\s*(?:\$ )?make ([a-z][a-z-]*)", re.MULTILINE)


def relative(file: Path) -> str:
    return str(file.relative_to(REPOSITORY))


def test_the_nine_packages() -> None:
    assert PACKAGES == [
        "benchmarks",
        "cluster",
        "contracts",
        "decode_worker",
        "engine",
        "kv_transfer",
        "prefill_worker",
        "router",
        "rpc",
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_ours_and_typed(package: str) -> None:
    """Our names are generic, so another distribution could shadow one."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin == str(REPOSITORY / package / "__init__.py")
    assert (REPOSITORY / package / "py.typed").exists()


def test_proto_is_no_package() -> None:
    """`proto` is google's proto-plus, which a package of that name would break."""
    names = {file.suffix for file in (REPOSITORY / "proto").iterdir()}
    assert names == {".proto"}


def test_test_folders_are_no_packages() -> None:
    """A tests/router/__init__.py would shadow the real `router`."""
    assert list((REPOSITORY / "tests").rglob("__init__.py")) == []


def test_no_file_is_too_long() -> None:
    folders = [*PACKAGES, "tests", "examples"]
    long = {
        relative(file): lines
        for folder in folders
        for file in (REPOSITORY / folder).rglob("*.py")
        if "rpc/pb/" not in relative(file)
        and (lines := len(file.read_text().splitlines())) > MAX_LINES
    }
    assert long == {}


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_documents_name_files_that_exist(document: Path) -> None:
    named = set(NAMED_FILE.findall(document.read_text()))
    assert {name for name in named if not (REPOSITORY / name).exists()} == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_documents_name_make_targets_that_exist(document: Path) -> None:
    named = set(COMMAND.findall(document.read_text()))
    for target in named:
        done = subprocess.run(
            ["make", "--dry-run", "--always-make", target, "VENV=no-such-folder"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, f"make {target}: {done.stderr}"


def test_links_between_documents() -> None:
    """A relative link leads to a file."""
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / link).exists(), f"{relative(document)} -> {link}"


def test_decisions_are_numbered_without_gaps() -> None:
    numbers = sorted(file.name[:3] for file in (REPOSITORY / "docs" / "decisions").glob("*.md"))
    assert numbers == [f"{index + 1:03}" for index in range(len(numbers))]


@pytest.mark.parametrize("script", [".ci/run", *map(relative, REPOSITORY.glob("examples/*.sh"))])
def test_scripts_parse_and_can_be_run(script: str) -> None:
    subprocess.run(["bash", "-n", script], cwd=REPOSITORY, check=True, timeout=10)
    assert (REPOSITORY / script).stat().st_mode & 0o111


def test_constraints_pin_every_direct_dependency() -> None:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pinned = {line.partition("==")[0] for line in lines if "==" in line}
    names = {re.split(r"[\[<>=]", one)[0].lower().replace("_", "-") for one in wanted}
    assert names - pinned == set()
    assert not any("+" in line or "/" in line for line in lines)
