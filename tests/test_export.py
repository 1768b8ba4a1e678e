"""tools/export.py: a backbone as one small file."""

import json
import subprocess
import sys

import helpers
import pytest
import torch
from safetensors import safe_open

import weights
from utils import HERE
from weights import load_backbone, read_weights


def export(*arguments):
    command = [sys.executable, "-m", "tools.export", *map(str, arguments)]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    weights.save_backbone(helpers.pico(), folder / "backbone.safetensors", {"seed": 7})
    return folder


def test_half_the_bytes_and_nearly_the_same_embedding(run_folder, tmp_path):
    out = tmp_path / "new" / "small.safetensors"
    done = export("--pretrained", run_folder, "--out", out)
    assert done.returncode == 0, done.stderr
    whole = run_folder / "backbone.safetensors"
    assert out.stat().st_size < 0.6 * whole.stat().st_size
    with safe_open(out, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
        assert json.loads(file.metadata()["ssrl"])["options"] == {"seed": 7}

    found = load_backbone(read_weights(str(out)))
    expected = load_backbone(read_weights(str(whole)))
    assert found.spec == expected.spec
    assert next(found.parameters()).dtype == torch.float32
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        gap = (found(images) - expected(images)).abs().max()
    assert 0 < gap < 0.02


def test_bad_options_are_one_message_with_exit_code_2(run_folder, tmp_path):
    for pretrained, out, message in (
        (tmp_path / "nowhere", tmp_path / "a.safetensors", "no such weights"),
        (run_folder, tmp_path / "a.pth", "ends in .safetensors"),
    ):
        done = export("--pretrained", pretrained, "--out", out)
        assert done.returncode == 2 and message in done.stderr
        assert "Traceback" not in done.stderr and not out.exists()
