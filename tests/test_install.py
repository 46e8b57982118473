"""An editable install, as CONTRIBUTING.md gives it, works."""

import json
import os
import shutil
import subprocess
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("build_backend", "csrc", "dsnet", "dsnet_kernels")
BUILT = shutil.ignore_patterns("*.so", "build.json", "__pycache__")
FILES = ("CMakeLists.txt", "LICENSE", "NOTICE", "README.md", "pyproject.toml", "setup.py")


def missing() -> list[str]:
    """Build tools that an install without isolation expects and that are not here."""
    absent = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    for package, oldest in (("setuptools", 77), ("pybind11", 2), ("pip", 0)):
        try:
            old = int(metadata.version(package).split(".")[0]) < oldest
        except metadata.PackageNotFoundError:
            old = True
        absent += [package] if old else []
    return absent


@pytest.mark.skipif(bool(missing()), reason=f"not here: {', '.join(missing())}")
def test_editable_install_brings_every_native_library(tmp_path):
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, tmp_path / "source" / folder, ignore=BUILT)
    for file in FILES:
        shutil.copy(ROOT / file, tmp_path / "source" / file)
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    # What this environment has, but for another install of this package.
    parent = tmp_path / "parent"
    parent.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "dsnet" not in entry.name:
            (parent / entry.name).symlink_to(entry)
    (packages / "parent.pth").write_text(f"{parent}\n")
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e"]
    subprocess.run(
        [python, *install, str(tmp_path / "source")],
        env=environment | {"DSNET_CUDA": "0", "DSNET_NATIVE": "1"},
        check=True,
    )
    code = (
        "import json, dsnet, dsnet_kernels as k, torch\n"
        "x, w = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)\n"
        "total = k.depthwise_conv3x3(x, w, backend='cpu').sum().item()\n"
        "print(json.dumps([total, k.__file__, dsnet.__file__, k.info()['libraries']]))"
    )
    done = subprocess.run(
        [python, "-c", code],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    total, kernels, networks, libraries = json.loads(done.stdout.splitlines()[-1])
    assert total == 49.0
    assert {Path(kernels).parent.parent, Path(networks).parent.parent} == {tmp_path / "source"}
    assert libraries["cpu"] is None
    assert "was not built" in libraries["cuda"]
