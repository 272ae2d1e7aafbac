"""The house: what a wheel holds, which way imports point, what is declared, and what stands at the top."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("launch", "models", "kernels", "data")
BELOW = {
    "": {"launch"}, "launch": {"models", "kernels", "data"}, "models": {"kernels"}, "kernels": set(), "data": set()
}  # fmt: skip
PACKAGE_OF = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}
# NVIDIA's, built from its repository; a reader for TIFFs of many channels, which Pillow has no mode for; COCO's masks
# and scores; a report's PNG; and a service for those who have an account there.
OPTIONAL = {"apex", "tifffile", "pycocotools", "matplotlib", "wandb"}
TOP = {
    "launch", "models", "kernels", "data", "configs", "ds_configs", "tests", "docs", ".ci", ".gitignore", "README.md",
    "setup.py", "pyproject.toml", "__init__.py", "LICENSE", "mkdocs.yml", "CHANGELOG.md", "CONTRIBUTING.md",
}  # fmt: skip


def tracked() -> list[Path]:
    """Files under version control that are there, relative to the root."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout, so there is no list of tracked files to compare with")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).exists()]


def sources() -> list[Path]:
    """Python files of the package."""
    return [ROOT / "__init__.py", *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")))]


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0] if path.parent != ROOT else ""


def imports(path: Path):
    """Absolute dotted names that a file imports, with `elsewhere.` before its own, and the number of the line."""
    package = ("elsewhere", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join(package[: len(package) - node.level + 1])
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((f"{base}.{name}", node.lineno) for name in names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module, node.lineno


def setup_argument(name: str):
    """A literal argument of `setup()`."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", None) == "setup")
    return ast.literal_eval(next(keyword.value for keyword in call.keywords if keyword.arg == name))


def declared() -> set[str]:
    return {re.split(r"[<>=!~\[; ]", line)[0].lower() for line in setup_argument("install_requires")}


def test_imports_point_down():
    wrong = []
    for path in sources():
        here = room_of(path)
        for name, line in imports(path):
            parts = name.split(".")
            if parts[0] == "elsewhere" and len(parts) > 1 and parts[1] not in BELOW[here] | {here}:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert wrong == []


def test_relative_imports_are_understood():
    """The test above would pass on names that it misreads: models/jepa.py is known to use kernels and positions."""
    found = {name for name, _ in imports(ROOT / "models" / "jepa.py")}
    assert {"elsewhere.kernels.stochastic_positions", "elsewhere.models.vit", "torch"} <= found


def test_only_the_entry_point_names_the_package():
    """A file that imports `elsewhere.…` works once installed, and not from a checkout under another name."""
    naming = []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            naming += [path.relative_to(ROOT).as_posix() for name in names if name.split(".")[0] == "elsewhere"]
    assert naming == ["launch/__main__.py"]


def third_party() -> dict[str, str]:
    """Packages from outside that the code imports, by the name they are installed under, and where."""
    found = {}
    for path in sources():
        for name, line in imports(path):
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names | {"elsewhere"}:
                found[PACKAGE_OF.get(top, top)] = f"{path.relative_to(ROOT)}:{line}"
            if name.startswith("torch.utils.tensorboard"):
                found["tensorboard"] = f"{path.relative_to(ROOT)}:{line}"
    return found


def test_every_import_is_declared():
    assert {name: at for name, at in third_party().items() if name not in declared() | OPTIONAL} == {}


def test_optional_packages_are_tried():
    """An import that may fail stands in a `try` that catches its ImportError."""
    untried = []
    for path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tries = [
            n
            for n in ast.walk(tree)
            if isinstance(n, ast.Try) and any("ImportError" in ast.unparse(handler) for handler in n.handlers)
        ]
        guarded = {node.lineno for block in tries for statement in block.body for node in ast.walk(statement)
                   if hasattr(node, "lineno")}  # fmt: skip
        for name, line in imports(path):
            if name.split(".")[0] in OPTIONAL and line not in guarded:
                untried.append(f"{path.relative_to(ROOT)}:{line} {name}")
    assert untried == []


def test_every_declared_package_is_imported():
    assert declared() - set(third_party()) == set()


def test_every_declared_package_has_a_lower_bound():
    lines = list(setup_argument("install_requires"))
    for extra in setup_argument("extras_require").values():
        lines += extra
    assert [line for line in lines if ">=" not in line] == []


def test_what_tests_import_is_declared():
    """Of the package or of its `test` extra, or skipped; scipy comes with scikit-learn, and OpenCV with FFCV."""
    extra = {re.split(r"[<>=]", line)[0].lower() for line in setup_argument("extras_require")["test"]}
    known = declared() | extra | {"scipy", "elsewhere", "conftest", "setuptools"}
    wrong = []
    for path in (ROOT / "tests").glob("*.py"):
        optional = {"ffcv", "cv2"} if 'pytest.importorskip("ffcv")' in path.read_text(encoding="utf-8") else set()
        for name, line in imports(path):
            top = name.split(".")[0]
            if top not in sys.stdlib_module_names | optional and PACKAGE_OF.get(top, top) not in known:
                wrong.append(f"{path.name}:{line} {top}")
    assert wrong == []


def test_top_level_holds_what_was_designed():
    assert {path.parts[0] for path in tracked()} - TOP == set()


def test_every_folder_of_code_is_a_package_of_setup():
    """`packages=` is a list by hand, so a new folder would be left out of a wheel without a word."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    rooms = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "ROOMS")
    folders = {"." + ".".join(path.parent.relative_to(ROOT).parts) for path in sources() if path.parent != ROOT}
    assert set(ast.literal_eval(rooms)) == folders | {""}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Names in a wheel that was built from the tracked files alone, without `elsewhere/` before them."""
    pytest.importorskip("build", reason="needs `build`, of the test extra")
    folder = tmp_path_factory.mktemp("wheel")
    for path in tracked():
        if path.parts[0] != "tests":
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, folder / path)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "out"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next((folder / "out").glob("*.whl"))).namelist()


def tracked_in_package() -> set[str]:
    """What a wheel has to hold."""
    rooms = (*ROOMS, "configs", "ds_configs")
    return {path.as_posix() for path in tracked() if path.parts[0] in rooms or path == Path("__init__.py")}


@pytest.mark.slow
def test_a_wheel_holds_every_tracked_file_and_no_other(wheel):
    found = {name.removeprefix("elsewhere/") for name in wheel if name.startswith("elsewhere/")}
    assert (tracked_in_package() - found, found - tracked_in_package()) == (set(), set())


@pytest.mark.slow
def test_a_wheel_puts_nothing_beside_the_package(wheel):
    assert {re.sub(r"-.*", "", name.split("/")[0]) for name in wheel} == {"elsewhere"}


@pytest.mark.slow
def test_a_wheel_brings_license_and_command(wheel):
    names = {Path(name).name for name in wheel if ".dist-info/" in name}  # newer setuptools has a folder for licenses
    assert {"LICENSE", "entry_points.txt"} <= names
