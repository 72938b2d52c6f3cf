"""How fastpeft installs and imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpeft import ops

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


def test_kernels_are_importable_as_a_part_of_fastpeft(tmp_path):
    assert run("import fastpeft.kernels as k; print(list(k.__path__) != [])", cwd=tmp_path) == "True"


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
    assert ops._triton_too_old() == reason
    monkeypatch.setattr(ops, "_TRITON_TOO_OLD", reason)
    assert ops.choose("auto", False, torch.device("cpu")).path == "torch"
    if reason:
        assert ops.choose("auto", False, torch.device("cuda")) == ("torch", reason)
        with pytest.raises(ValueError, match=reason):
            ops.choose("triton", False, torch.device("cpu"))


def test_importing_fastpeft_loads_no_triton_and_no_plotting(tmp_path):
    code = """
import sys, torch, peft, transformers.models.gpt2.modeling_gpt2
before = set(sys.modules)
import fastpeft
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"triton", "matplotlib", "typer", "rich", "jinja2", "accelerate"}))
"""
    assert run(code, cwd=tmp_path) == "[]"


def test_every_package_folder_is_packaged():
    from unittest import mock

    with mock.patch("setuptools.setup") as setup:
        exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {"__name__": "__main__"})
    packages = set(setup.call_args.kwargs["packages"])
    folders = {
        str(p.parent.relative_to(ROOT)).replace("/", ".") for p in (ROOT / "fastpeft").rglob("__init__.py")
    }
    assert packages == folders | {"fastpeft.kernels"}
