"""Install a built wheel or sdist in a new environment and try it: `python -m scripts.try_dist dist/*.whl`.

The environment has the dependencies of this one, but not this checkout: nothing is downloaded, and a missing file
is noticed.
"""

import os
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path

import torch

ADAPTER = Path(__file__).parents[1] / "examples" / "tiny_pipeline" / "adapters" / "ink.safetensors"
SMOKE_TEST = """
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from pkgutil import walk_packages

import diffadapt

folder, adapter = Path(sys.prefix), sys.argv[1]
assert Path(diffadapt.__file__).is_relative_to(folder), f"{diffadapt.__file__} is not in {folder}"
assert version("diffadapt") == diffadapt.__version__, version("diffadapt")
assert (Path(diffadapt.__file__).parent / "py.typed").is_file()
for module in walk_packages(diffadapt.__path__, "diffadapt."):
    if module.name != "diffadapt.__main__":
        import_module(module.name)

import torch
from diffusers import UNet2DConditionModel

report = diffadapt.inspect(adapter)
assert report.types == {"lora": 119} and not report.unused, report
model = UNet2DConditionModel(
    sample_size=8, down_block_types=("CrossAttnDownBlock2D",), mid_block_type=None, up_block_types=("UpBlock2D",),
    block_out_channels=(8,), layers_per_block=1, cross_attention_dim=8, attention_head_dim=2, norm_num_groups=4,
)
inputs = torch.randn(1, 4, 8, 8), 1, torch.randn(1, 4, 8)
with torch.no_grad():
    before = model(*inputs).sample
    settings = diffadapt.LoraConfig(rank=2, target_modules="all-linear", init=False)
    diffadapt.add_adapter(model, settings, name="mine")
    assert not torch.equal(model(*inputs).sample, before)
    diffadapt.adapters(model).clear()
    assert torch.equal(model(*inputs).sample, before)
print("diffadapt", diffadapt.__version__, "works in", folder)
"""


def try_distribution(distribution: Path) -> None:
    """Install `distribution` in a new environment, and run the smoke test and the command there.

    Raises:
        subprocess.CalledProcessError: one of them failed; its output was shown.
    """
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, symlinks=True)
        python = str(
            next(path for path in (Path(folder, "bin/python"), Path(folder, "Scripts/python.exe")) if path.exists())
        )
        query = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = subprocess.run([python, "-c", query], capture_output=True, text=True, check=True).stdout.strip()
        # Paths in a .pth file are searched, but .pth files in them, such as that of this checkout, are not read.
        Path(packages, "dependencies.pth").write_text(str(Path(torch.__file__).parents[1]), encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
        pip += ["--no-deps", "--no-build-isolation", "--ignore-installed", "--no-index"]
        subprocess.run([*pip, str(distribution.resolve())], check=True)
        # A checkout on the path would be found before what was installed.
        alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run([python, "-c", SMOKE_TEST, str(ADAPTER)], cwd=folder, env=alone, check=True)
        command = [str(Path(python).with_name("diffadapt")), "--version"]
        shown = subprocess.run(command, cwd=folder, env=alone, capture_output=True, text=True, check=True).stdout
        assert shown.strip() == f"diffadapt {version('diffadapt')}", shown


if __name__ == "__main__":
    for name in sys.argv[1:]:
        try_distribution(Path(name))
