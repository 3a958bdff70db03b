"""The file of samples: calibration in two steps is calibration in one; shared codebooks stay shared on disk."""

from __future__ import annotations

import pytest
import torch

from pqlab import Codebooks, PQConfig, calibrate, load_text
from pqlab.quantization import CodebookError, collect_kv, train, train_merged
from pqlab.quantization.samples_file import load_samples, save_samples
from pqlab.quantization.sensitivity import value_metrics

PQ = PQConfig(M=8, nbits=4)
TEXT = load_text("emma")[:3000]


def test_two_steps_are_one(make_model, tiny_tokenizer, tmp_path):
    model = make_model("gemma3")  # sliding layers too: layer ids are not 0, 1
    samples = collect_kv(model, tiny_tokenizer, TEXT, num_tokens=600, window=300)
    save_samples(tmp_path / "samples", samples, {"text": "emma"})
    loaded, about = load_samples(tmp_path / "samples")
    assert about == {"text": "emma"} and list(loaded.keys) == [1, 3]
    layers = train(loaded, PQ, value_metrics=value_metrics(model))
    books = calibrate(model, tiny_tokenizer, TEXT, PQ, num_tokens=600, window=300, progress=False)
    ours = Codebooks(layers).tensors()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in books.tensors().items())


def test_a_model_that_shows_no_attention(make_model, tiny_tokenizer, tmp_path):
    samples = collect_kv(make_model("llama"), tiny_tokenizer, TEXT, num_tokens=300)
    samples.sensitivity.clear()
    save_samples(tmp_path / "samples", samples, {})
    assert load_samples(tmp_path / "samples")[0].sensitivity == {}


def test_foreign_and_damaged_files_are_refused(make_model, tiny_tokenizer, tmp_path):
    model = make_model("llama")
    path = tmp_path / "file"
    Codebooks.random(model, pq=PQ).save(path)
    with pytest.raises(CodebookError, match="holds codebooks, no samples"):
        load_samples(path)
    save_samples(path, collect_kv(model, tiny_tokenizer, TEXT, num_tokens=300), {})
    with pytest.raises(CodebookError, match="do not belong together"):
        Codebooks.load(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CodebookError, match="damaged.*sample again"):
        load_samples(path)
    with pytest.raises(FileNotFoundError, match="no samples file"):
        load_samples(tmp_path / "nowhere")


def test_merged_codebooks_are_stored_once(make_model, tiny_tokenizer, tmp_path):
    model = make_model("llama")
    samples = collect_kv(model, tiny_tokenizer, TEXT, num_tokens=300)
    books = Codebooks(train_merged(samples, PQ))
    assert books.nbytes == 2 * 8 * 16 * 2 * 2
    books.save(tmp_path / "merged")
    loaded = Codebooks.load(tmp_path / "merged")
    assert loaded.nbytes == books.nbytes and (tmp_path / "merged").stat().st_size < 6000
    for name, tensor in books.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor)
    x = torch.randn(3, 5, 16)
    assert torch.equal(loaded.layer(1).v.encode(x), books.layer(1).v.encode(x))
