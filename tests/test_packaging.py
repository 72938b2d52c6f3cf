"""How fastpeft installs and imports."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from email import message_from_bytes
from email.message import Message
from importlib.util import resolve_name
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import fastpeft
from fastpeft import routes
from fastpeft.__main__ import NEEDS, main
from fastpeft.routes import Options

ROOT = Path(__file__).parent.parent


def run(code: str, cwd: Path) -> str:
    """What `code` prints in a fresh interpreter started in `cwd`."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_repository_root_never_shadows_hugging_faces_kernels_package(tmp_path):
    """transformers imports a package named `kernels` where there is one; ours must not be taken for it."""
    fake = tmp_path / "kernels"
    fake.mkdir()
    (fake / "__init__.py").write_text("WHOSE = 'hugging face'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.WHOSE)"
    assert run(code, cwd=ROOT) == "hugging face"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_fastpeft_imports_and_works_with_triton_blocked(tmp_path):
    code = """
import sys
sys.modules["triton"] = None  # any `import triton` raises ImportError
import torch, fastpeft
x = torch.ones(2, 4)
print(fastpeft.lora_linear(x, torch.ones(4, 3), None, torch.ones(1, 4), torch.ones(3, 1), 1.0).sum().item())
"""
    assert run(code, cwd=tmp_path) == "48.0"


@pytest.mark.fidelity(
    "Triton absent or too old", "the PyTorch path, with the reason; backend='triton' is an error"
)
@pytest.mark.parametrize(
    ("version", "reason"), [("3.5.1", "triton 3.5.1 is older than 3.6"), ("3.6.0", None), ("3.10.0", None)]
)
def test_an_old_triton_is_refused_by_name(monkeypatch, version, reason):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    assert routes._triton_too_old() == reason
    monkeypatch.setattr(routes, "_TRITON_TOO_OLD", reason)
    assert routes.choose(Options(), torch.device("cpu")).path == "torch"
    if reason:
        assert routes.choose(Options(), torch.device("cuda")) == ("torch", reason)
        with pytest.raises(ValueError, match=reason):
            routes.choose(Options("triton"), torch.device("cpu"))


def test_what_importing_fastpeft_brings_and_when(tmp_path):
    """In one fresh process, for each loads torch and transformers: public names come when they are asked for.

    They bring no triton and no plotting, a module of the same name would stand in the place of one, and the kernels are
    a part of the package.
    """
    code = """
import importlib, pkgutil, sys
import fastpeft
print("torch" in sys.modules, set(fastpeft.__all__) <= set(dir(fastpeft)))
modules = {module.name for module in pkgutil.iter_modules(fastpeft.__path__)} - {"__main__"}
print(modules & set(fastpeft.__all__))
import torch, peft, transformers.models.gpt2.modeling_gpt2
before = set(sys.modules)
fastpeft.patch  # the first public name brings all
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"triton", "matplotlib", "typer", "rich", "jinja2", "accelerate"}))
for module in modules:
    importlib.import_module(f"fastpeft.{module}")
print({type(getattr(fastpeft, name)).__name__ for name in fastpeft.__all__} <= {"function", "type"})
print(list(fastpeft.kernels.__path__) != [])
try:
    fastpeft.nothing
except AttributeError as error:
    print(error)
"""
    said = run(code, cwd=tmp_path).splitlines()
    assert said == [
        "False True",
        "set()",
        "[]",
        "True",
        "True",
        "module 'fastpeft' has no attribute 'nothing'",
    ]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """The wheel that pip would build, from a copy: building writes beside the sources."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in "fastpeft", "kernels":
        caches = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=caches)
    for name in "setup.py", "pyproject.toml", "README.md", "LICENSE":
        shutil.copy(ROOT / name, source)
    build = f"from setuptools import build_meta; print(build_meta.build_wheel({str(built)!r}))"
    return zipfile.ZipFile(built / run(build, cwd=source).splitlines()[-1])


def test_every_file_of_the_package_is_in_the_wheel_kernels_too(wheel):
    folders = ("fastpeft", "fastpeft/compare", "fastpeft/kernels")
    files = (path for folder in folders for path in (ROOT / folder).iterdir() if path.is_file())
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == {str(path.relative_to(ROOT)) for path in files}


@pytest.fixture(scope="module")
def metadata(wheel) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.read(name))


def test_the_wheel_has_the_version_of_the_package(metadata):
    assert (metadata["Name"], metadata["Version"]) == ("fastpeft", fastpeft.__version__)


def names(requirements: Iterable[str], extra: str = "") -> set[str]:
    """The packages that `requirements` name for an extra; without one, what is always installed."""
    parsed = map(Requirement, requirements)
    asked = {"extra": extra, "sys_platform": "linux"}
    return {
        r.name
        for r in parsed
        if (not r.marker or r.marker.evaluate(asked)) and bool(extra) == ("extra" in str(r.marker))
    }


def imported(*paths: Path) -> set[str]:
    """The packages of others that these files import, as they are named in a registry."""
    trees = (ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for path in paths)
    nodes = [node for tree in trees for node in tree]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    tops = {module.partition(".")[0] for module in modules}
    return tops - sys.stdlib_module_names - {"fastpeft"}


def test_the_runtime_requires_what_it_imports_and_the_comparison_is_an_extra(metadata):
    requirements = metadata.get_all("Requires-Dist")
    package = {path for folder in ("fastpeft", "kernels") for path in (ROOT / folder).glob("*.py")}
    cli = {ROOT / "fastpeft" / "cli.py"}
    assert names(requirements) == imported(*package - cli)
    compare = imported(*cli, *(ROOT / "fastpeft" / "compare").glob("*.py"))
    assert names(requirements, "compare") == compare - names(requirements) == set(NEEDS)


def test_without_the_extra_the_command_line_names_it(monkeypatch, capsys):
    for name in "typer", "matplotlib":
        monkeypatch.setitem(sys.modules, name, None)  # as if it weren't installed
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    said = capsys.readouterr().err
    assert said == "fastpeft: needs matplotlib, typer: pip install 'fastpeft[compare]'\n"


def floors() -> list[str]:
    """The modules of fastpeft in CONTRIBUTING's order: each imports what comes after it, and nothing else."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^Imports point to the right only: ([^;]*);", text, re.MULTILINE)
    return re.findall(r"\w+", line)


def modules_of_ours() -> set[str]:
    """The modules and packages right in fastpeft/."""
    folder = ROOT / "fastpeft"
    return {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/*.py")}


def imports_of_ours(path: Path) -> set[str]:
    """Those of them that a file of fastpeft/ imports, anywhere in it; `__init__` for what fastpeft itself shows."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in getattr(node, "names", ())]
        if isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{source}.{name}" for name in names]
        elif not isinstance(node, ast.Import):
            continue
        ours = [name.split(".") for name in names if f"{name}.".startswith("fastpeft.")]
        found |= {name[1] if name[1:2] and name[1] in modules_of_ours() else "__init__" for name in ours}
    return found


def test_contributings_line_of_imports_names_every_module():
    missing, gone = modules_of_ours() - set(floors()), set(floors()) - modules_of_ours()
    assert not missing, f"give them a place in CONTRIBUTING's line of imports: {missing}"
    assert not gone, f"CONTRIBUTING's line of imports names what isn't there: {gone}"


@pytest.mark.parametrize("module", sorted(modules_of_ours() - {"kernels"}))
def test_imports_point_to_the_right_of_contributings_line(module):
    order = floors()
    allowed = set(order[order.index(module) :])
    place = ROOT / "fastpeft" / module
    for path in place.glob("*.py") if place.is_dir() else [place.with_suffix(".py")]:
        assert imports_of_ours(path) <= allowed, path


def test_kernels_import_nothing_else_of_fastpeft():
    for path in (ROOT / "fastpeft" / "kernels").glob("*.py"):
        assert imports_of_ours(path) <= {"kernels"}, path
