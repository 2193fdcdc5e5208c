from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from simworld import load_checkpoint, rollout, save_checkpoint
from simworld.models.checkpoint import read_tensors, write_tensors


def test_what_is_saved_is_loaded(make_model, episode, tmp_path):
    model = make_model(latent_size=8)
    save_checkpoint(model, tmp_path / "m.safetensors", dataset="rope", units={"positions": "px"})
    again = load_checkpoint(tmp_path / "m.safetensors")
    assert again.provenance == {"dataset": "rope", "units": {"positions": "px"}}
    start = episode.initial.to(torch.float32)
    a, b = (rollout(start, episode.actions.float(), simulator=m) for m in (model.eval(), again))
    assert torch.equal(a["positions"], b["positions"])
    assert not list(tmp_path.glob("*.partial"))


def test_missing_damaged_and_foreign_files(make_model, tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(FileNotFoundError, match="no checkpoint file.*lists the shipped ones"):
        load_checkpoint(path)
    save_checkpoint(make_model(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_checkpoint(path)
    path.write_bytes(b"\x80\x04not a tensor in sight")
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        load_checkpoint(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"not a simworld\.checkpoint file"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("schema_version", "99", "schema version 99.*update"),
        ("model", "Oracle", "a model 'Oracle'; this version knows InteractionNetwork"),
        ("arguments", json.dumps({"dt": 0.1, "layers": 3}), "contents do not fit"),
        ("arguments", "{", "contents do not fit"),
        ("schema_version", "one", "schema version one"),
        ("provenance", "[1]", "contents do not fit"),
    ],
)
def test_headers_that_do_not_fit(make_model, tmp_path, key, value, says):
    path = tmp_path / "m.safetensors"
    save_checkpoint(make_model(), path)
    header, tensors = read_tensors(path, "simworld.checkpoint", 1)
    write_tensors(tensors, {**header, key: value}, path)
    with pytest.raises(ValueError, match=says):
        load_checkpoint(path)


def test_weights_of_another_size(make_model, tmp_path):
    path = tmp_path / "m.safetensors"
    save_checkpoint(make_model(), path)
    header, _ = read_tensors(path, "simworld.checkpoint", 1)
    write_tensors(make_model(latent_size=24).state_dict(), header, path)
    with pytest.raises(ValueError, match=r"contents do not fit one \(Error"):
        load_checkpoint(path)


def test_weights_that_are_not_numbers(make_model, tmp_path):
    path = tmp_path / "m.safetensors"
    model = make_model()
    model.decoder[0].weight.data[0, 0] = torch.nan
    save_checkpoint(model, path)
    with pytest.raises(ValueError, match="none was trained to"):
        load_checkpoint(path)


def test_a_failed_write_leaves_the_old_file(make_model, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save_checkpoint(make_model(), path)
    before = path.read_bytes()

    def full(tensors, partial, metadata):
        Path(partial).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("simworld.models.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(make_model(latent_size=8), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
