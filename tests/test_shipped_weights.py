"""weights/: what comes with SSRL loads, is small, is described, and grades drawings."""

import pytest
import torch
from safetensors import safe_open
from sklearn.metrics import roc_auc_score

import data
from augment import WholeView
from data import PhotographDataset, grades_of
from features import extract_features, knn_predict
from fundus.synthetic import draw_folder
from utils import HERE, InputError
from vision_transformer import Backbone
from weights import SHIPPED, load_backbone, read_weights

FILES = sorted((HERE / "weights").glob("*.safetensors"))


def test_all_of_them_are_small_known_by_name_and_described():
    card = (HERE / "weights" / "README.md").read_text(encoding="utf-8")
    assert set(FILES) == set(SHIPPED.values())
    assert sum(path.stat().st_size for path in FILES) < 12e6
    for name, path in SHIPPED.items():
        assert path.name in card and f"--init {name}" in card
        with safe_open(path, framework="pt") as file:
            kinds = {file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
        assert kinds <= {torch.float16, torch.int64}  # batch norm counts its batches


@pytest.mark.parametrize("name", SHIPPED)
def test_their_recipe_names_no_folder_of_anybody(name):
    options = read_weights(name).run_options
    assert options["data"].startswith("synthetic:")
    assert options["init"] == "none"
    assert not [value for value in options.values() if str(value).startswith(("/", "~"))]


def test_a_name_that_is_none_lists_those_that_are():
    with pytest.raises(InputError, match="drawn, timm:NAME"):
        read_weights("dawn")


def test_they_grade_drawings_of_another_seed_and_random_weights_do_not(tmp_path):
    draw_folder(tmp_path / "drawn", 80, seed=12, size=256)
    manifest = data.open_manifest(str(tmp_path / "drawn"))
    grades = torch.from_numpy(grades_of(manifest.records))
    photographs = PhotographDataset(manifest, list(manifest.records), WholeView(256))
    weights = read_weights("drawn")
    torch.manual_seed(0)
    untrained = Backbone(weights.spec).eval()

    found = {}
    for name, backbone in (("drawn", load_backbone(weights)), ("untrained", untrained)):
        embeddings = extract_features(backbone, photographs)["cls"][:, -1]
        votes = []
        for place in range(len(grades)):
            others = torch.arange(len(grades)) != place
            asked = embeddings[place : place + 1]
            votes.append(knn_predict(embeddings[others], grades[others], asked, [5])[5])
        referable = torch.cat(votes)[:, 2:].sum(dim=1)
        found[name] = roc_auc_score(grades >= 2, referable)
    assert found["drawn"] > 0.85 and found["untrained"] < 0.7
