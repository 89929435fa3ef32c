"""GGUF files as models: the engine, the tokenizer, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from gguf_files import STRING
from gguf_files import gguf as gguf_bytes
from gguf_models import byte_level, sentencepiece, write_gguf
from oracle import CPU
from penstock import LLM, SamplingParams
from penstock.base import ModelFormatError, NotFound
from penstock.kernels import make_ops
from penstock.layers import Placement
from penstock.models import load_decoder, numerics_id
from penstock.spec.encoder import read_any_spec
from penstock.spec.generation import read_recommended
from penstock.spec.location import locate
from penstock.text import load_tokenizer
from small_gguf import small

GREEDY = SamplingParams(temperature=0, max_tokens=40, logprobs=2)


@pytest.fixture(scope="module")
def stories(test_data: Path) -> Path:
    return test_data / "models" / "stories260k"


@pytest.fixture(scope="module")
def story_file(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "stories.gguf"
    write_gguf(stories, path, vocabulary=sentencepiece(stories))
    return path


def test_file_tells_the_story_of_the_folder(stories: Path, story_file: Path) -> None:
    """Bit for bit: the float32 file by itself, and in a folder, and the folder that it was made from."""
    told = []
    for model in (str(stories), str(story_file), str(story_file.parent)):
        with LLM(model, dtype="float32") as llm:
            outputs = llm.generate(["Once upon a time", "Lily and Tom"], GREEDY)
            told.append([(o.prompt_token_ids, o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs])
    assert told[0] == told[1] == told[2]
    assert len(told[0][0][1]) == 40


def test_quantized_file_tells_a_story(stories: Path, tmp_path: Path) -> None:
    path = tmp_path / "q8.gguf"
    kinds = lambda name, x: Kind.Q8_0 if x.shape[-1] % 32 == 0 else Kind.F16  # noqa: E731
    write_gguf(stories, path, kinds, sentencepiece(stories))
    with LLM(str(path)) as llm:
        text = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=40))[0].outputs[0].text
    assert text.startswith(", there was a little girl named")


TEXTS = ["Once upon a time, there was", "  two  spaces\n\n\tand a tab", "naïve 日本 🙂 café 12345", "<s></s>", ""]
TEXTS += ["<|im_start|>user\nhi<|im_end|>", "I'LL don't 3.14 --== {}", "x" * 300]


def same_tokenizer(file: Path, folder: Path) -> None:
    ours, theirs = load_tokenizer(file), load_tokenizer(folder)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.encode(text, parse_special=False) == theirs.encode(text, parse_special=False), text


def test_tokenizer_is_that_of_the_folder(stories: Path, story_file: Path) -> None:
    same_tokenizer(story_file, stories)
    assert load_tokenizer(story_file).vocabulary == load_tokenizer(stories).vocabulary


@pytest.mark.slow
def test_large_tokenizer_is_that_of_the_folder(test_data: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    byte_level(test_data / "tokenizers" / "qwen2", "qwen2", 151_936)(writer)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
        write()
    same_tokenizer(tmp_path / "x.gguf", test_data / "tokenizers" / "qwen2")


def test_numerics_follow_the_file(story_file: Path, tmp_path: Path) -> None:
    other = tmp_path / story_file.name
    shutil.copyfile(story_file, other)
    spec, ops, placement = read_any_spec(story_file), make_ops("torch"), Placement(torch.float32, CPU)
    same = numerics_id(story_file, spec, ops, placement)
    assert numerics_id(other, spec, ops, placement) == same
    with other.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    assert numerics_id(other, spec, ops, placement) != same


def test_which_file_is_meant(stories: Path, story_file: Path, tmp_path: Path) -> None:
    assert locate(str(story_file)) == locate(str(story_file.parent)) == story_file
    shutil.copyfile(story_file, tmp_path / "a.gguf")
    shutil.copyfile(story_file, tmp_path / "b.gguf")
    assert locate(str(tmp_path)) == tmp_path
    with pytest.raises(NotFound, match="GGUF file"), LLM(str(tmp_path)):
        pass
    (tmp_path / "b.gguf").unlink()
    assert locate(str(tmp_path)) == tmp_path / "a.gguf"
    (tmp_path / "config.json").write_text("{}")
    assert locate(str(tmp_path)) == tmp_path
    with pytest.raises(NotFound), LLM(str(tmp_path / "c.gguf")):
        pass


# -- what is refused ---------------------------------------------------------------------------------------------------


def read(path: Path) -> None:
    load_decoder(path, read_any_spec(path), make_ops("torch"), Placement(torch.float32, CPU))


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "another architecture": ("unknown_architecture", {"architecture": "qwen4"}),
    "one of several": ("gguf_split", {"split__count": 3}),
    "a key of another model": ("unsupported_value", {"attention__clamp_kqv": 8.0}),
    "not causal": ("unsupported_value", {"attention__causal": False}),
    "wide values": ("unsupported_value", {"attention__value_length": 8}),
    "no layers": ("config_invalid", {"block_count": None}),
    "layers in words": ("config_invalid", {"block_count": "many"}),
    "heads by layer": ("config_invalid", {"attention__head_count": [2, 2]}),
    "heads that do not divide": ("config_invalid", {"attention__head_count_kv": 7}),
    "part of a head": ("unsupported_rope", {"rope__dimension_count": 8}),
    "another rope": ("unsupported_rope", {"rope__scaling__type": "spiral", "rope__scaling__factor": 2.0}),
    "two ropes": ("unsupported_rope", {"rope__scaling__factor": 2.0, "tensors": {"rope_freqs": (8,)}}),
    "a rope of another length": ("config_invalid", {"tensors": {"rope_freqs": (9,)}}),
    "half a rope": ("config_invalid", {"tensors": {"rope_factors_long": (8,)}}),
    "a tensor too many": ("weights_unexpected", {"tensors": {"blk.1.ffn_up": (32, 32)}}),
    "a tensor too few": ("weights_missing", {"tensors": {"blk.0.ffn_up": None}}),
    "a tensor too wide": ("weights_shape", {"tensors": {"blk.0.ffn_up": (64, 32)}}),
    "a vocabulary of another size": ("weights_shape", {"tensors": {"token_embd": (9, 32)}}),
    "experts that are not there": ("config_invalid", {"expert_count": 1 << 17, "expert_used_count": 2}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path) -> None:
    code, changes = REFUSED[case]
    with pytest.raises(ModelFormatError) as error:
        read(small(tmp_path / "x.gguf", **changes))
    assert error.value.code == code, error.value
    assert "config.json" not in str(error.value), error.value
    if code == "unknown_architecture":
        assert "nearest by name is qwen3" in error.value.why


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q5_1])
def test_small_files_are_read(kind: Kind, tmp_path: Path) -> None:
    read(small(tmp_path / "x.gguf", kind=kind))


@pytest.mark.parametrize(("kind", "other", "width"), [(Kind.Q4_0, Kind.IQ4_NL, 32), (Kind.Q4_K, Kind.IQ4_XS, 256)])
def test_types_that_are_not_read(kind: Kind, other: Kind, width: int, tmp_path: Path) -> None:
    """A file of such a type is whole: its reader is told which files to choose, not to download it again."""
    tensors = {"blk.0.attn_output": (width, width)}  # rows of whole blocks
    data = bytearray(small(tmp_path / "x.gguf", kind=kind, width=width, tensors=tensors).read_bytes())
    name = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 16
    data[name] = other  # of no greater size
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(ModelFormatError, match=f"type {other.name}, as blk.0.attn_q.weight is") as error:
        read(tmp_path / "x.gguf")
    assert error.value.code == "unsupported_quantization"
    assert "Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0" in error.value.fix and "download" not in str(error.value)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0, Kind.Q4_0])
def test_damaged_numbers(kind: Kind, tmp_path: Path) -> None:
    path = small(tmp_path / "x.gguf", kind=kind)
    data = bytearray(path.read_bytes())
    data[-1024:] = b"\xff\xff" * 512
    path.write_bytes(data)
    with pytest.raises(ModelFormatError) as error:
        read(path)
    assert error.value.code == "weights_not_finite" and "blk.0.ffn" in error.value.why


def test_recommended_sampling(tmp_path: Path) -> None:
    said = {"general.sampling.temp": (6, 0.5), "general.sampling.top_k": (5, 40), "general.sampling.xtc": (6, 1.0)}
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(said))
    assert read_recommended(tmp_path / "x.gguf") == {"temperature": 0.5, "top_k": 40}
    (tmp_path / "x.gguf").write_bytes(gguf_bytes({"general.sampling.temp": (STRING, "hot")}))
    with pytest.raises(ModelFormatError, match="hot"):
        read_recommended(tmp_path / "x.gguf")


def test_commands(story_file: Path) -> None:
    def penstock(*arguments: object) -> str:
        command = [sys.executable, "-m", "penstock.cli", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    story = penstock("run", story_file, "--temperature", "0", "--max-tokens", "12", "Once upon a time")
    assert story.startswith(", there was a little girl")
    facts = json.loads(penstock("show", "--json", story_file.parent))
    assert (facts["family"], facts["context"], facts["weights"]["files"]) == ("llama", 512, 1)
    assert facts["weights"]["bytes"] == facts["weights"]["bytes_by_dtype"]["F32"] > 1_000_000
    assert facts["here"]["dtype"] == "float32" and facts["here"]["fits"]
    listed = json.loads(penstock("models", "--json", story_file.parent))
    assert (listed["path"], listed["bytes"]) == (str(story_file), story_file.stat().st_size) and listed["runs"]
