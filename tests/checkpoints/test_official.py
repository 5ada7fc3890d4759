"""What a state dict is of: settings are found again from names and shapes; other files are named."""

import pytest
import torch

from detrlib.checkpoints.files import export_official, read_official
from detrlib.checkpoints.names import own_state
from detrlib.checkpoints.official import family_of, settings_of
from detrlib.config import Config, replace
from detrlib.errors import WeightsError


def test_published_models(published, trainable, without_memory):
    """Number of entries and parameters are those published; the settings are found again from names and shapes."""
    settings, entries, parameters, told = published
    model = without_memory(settings)
    state = export_official(model)
    assert entries is None or len(state) == entries
    assert trainable(model) == parameters
    found = replace(Config(), settings_of(state, told))
    assert found.model == replace(Config(), settings).model
    again = own_state(state)
    assert {key: value.shape for key, value in again.items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_sparse_detr_asks_for_its_share_of_tokens(without_memory):
    state = export_official(without_memory("sparse"))
    with pytest.raises(WeightsError, match=r"not written in the file; say it: model\.deformable\.rho=0\.3"):
        settings_of(state)


def test_families(without_memory):
    assert family_of(export_official(without_memory("detr-r50"))) == "detr"
    assert family_of(export_official(without_memory("deformable"))) == "deformable"
    assert family_of(export_official(without_memory("sparse"))) == "sparse"


FOREIGN = {
    "panoptic": ({"detr.transformer.decoder.norm.weight": 1, "mask_head.lay1.weight": 1}, "panoptic.*box model"),
    "demo": ({"query_pos": 1, "row_embed": 1, "linear_class.weight": 1, "conv.weight": 1}, "demonstration.*detr-r50"),
    "own": ({"backbone.body.conv1.weight": 1, "transformer.decoder.norm.weight": 1}, "this library itself.*load_model"),
    "transformers": ({"model.decoder.layers.0.fc1.weight": 1}, "transformers package.*official file"),
    "resnet": ({"conv1.weight": 1, "layer1.0.conv1.weight": 1, "fc.weight": 1}, r"backbone alone.*backbone\.weights"),
    "dab": ({"transformer.decoder.layers.0.ca_qcontent_proj.weight": 1, "refpoint_embed.weight": 1}, "DAB-DETR"),
    "faster-rcnn": (
        {"backbone.body.conv1.weight": 1, "roi_heads.box_head.fc6.weight": 1},
        "another detector.*--predictions",
    ),
    "anything": ({"encoder.weight": 1}, r"no DETR.*encoder\.weight"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_files_are_named(name, tmp_path):
    names, message = FOREIGN[name]
    torch.save({"model": {key: torch.zeros(size) for key, size in names.items()}}, tmp_path / f"{name}.pth")
    with pytest.raises(WeightsError, match=rf"(?s){name}\.pth: .*{message}"):
        read_official(tmp_path / f"{name}.pth")
