"""Settings that no model has, in every field of every family's config.json: a model or an error, no crash."""

import pytest
from tiny import tiny

from minift import load
from minift.models import MODELS, weights
from minift.models.safetensors_file import StoredTensor

VALUES = (None, True, 0, -1, 2**31, 10**9, 1.5, 1e308, "os.system", [[1]], {"a": 1}, {"type": []})
BESIDE = ("num_labels", "id2label", "problem_type", "quantization_config", "auto_map", "rope_scaling")
BESIDE += ("rope_parameters", "layer_types", "no_such_field")
ONE_OF_EACH = {MODELS[name][1]: name for name in MODELS if name.endswith("ForSequenceClassification")}


@pytest.mark.parametrize("architecture", ONE_OF_EACH.values())
def test_no_value_of_a_field_is_more_than_an_error(architecture, tmp_path, monkeypatch):
    model, errors = tiny(architecture), []
    state = weights.as_stored(model, dict(model.named_parameters()))
    tensors = {name: StoredTensor(tuple(p.shape), None) for name, p in state.items()}
    config = {**model.to_hf(), "architectures": [architecture]}
    changes = [(field, value) for field in (*config, *BESIDE) for value in VALUES]
    for field, value in (("num_labels", 3), *changes):
        changed = {**config, field: value}
        monkeypatch.setattr(weights, "open_folder", lambda _, changed=changed: (changed, dict(tensors)))
        try:
            built = load.build_model(tmp_path)
        except ValueError as error:
            errors.append(str(error))
        else:
            assert all(p.is_meta for p in built.parameters())
            assert sum(p.numel() for p in built.parameters()) > 0
    # of the values, most are of a type or a range that most fields do not have
    assert len(changes) / 4 < len(errors) < len(changes) and all(0 < len(e) < 2000 for e in errors)
