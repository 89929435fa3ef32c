"""Encoders against transformers in float32: hidden states, pooled vectors, classifiers; bits that know no neighbour."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from encoder_models import (
    CLASSIFIERS,
    CPU,
    KINDS,
    EncoderReference,
    build_encoder,
    write_json,
    write_sentence_transformer,
)
from oracle import TOLERANCE, error
from penstock.base import EngineError, ModelFormatError
from penstock.core.plan import NewRequest, StepFailed, StepPlan, StepResult
from penstock.kernels import make_ops, native
from penstock.layers import Placement
from penstock.models import Encoder, load_encoder
from penstock.runtime import EncoderRunner, LocalExecutor
from penstock.runtime.pooling import Vector
from penstock.spec import PoolingSpec, SamplingParams
from penstock.spec.encoder import encoder_parameters, encoder_spec, encoder_weight_bytes, is_encoder, read_any_spec
from penstock.spec.pooling import read_pooling

BACKENDS = ("ref", "torch", *(("cpu",) if native() else ()))
TASKS = ("mean", "last", "cls")
SEPARATOR = 3


@pytest.fixture(autouse=True, scope="module")
def quiet_transformers() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


def load(reference: EncoderReference, backend: str, dtype: torch.dtype = torch.float32) -> Encoder:
    return load_encoder(reference.folder, reference.spec, make_ops(backend), Placement(dtype, CPU))


def ragged(reference: EncoderReference, rng: random.Random) -> list[list[int]]:
    """Texts of every kind of length: one token, all positions, and with pad tokens among the others."""
    texts = [reference.tokens(rng, n) for n in (1, 2, rng.randrange(3, 40), reference.spec.max_positions)]
    texts[2][1] = texts[3][30] = max(0, reference.spec.pad_id)
    return texts


def plan_of(texts: list[list[int]], tasks: list[str], number: int = 0) -> StepPlan:
    plan = StepPlan(number)
    for id, (text, task) in enumerate(zip(texts, tasks, strict=True)):
        plan.new.append(
            NewRequest(
                id=id,
                tokens=tuple(text),
                prompt_len=len(text),
                tables=(),
                params=SamplingParams(),
                seed=0,
                sample=0,
                stop_ids=(),
                limit=len(text),
                task=task,
            )
        )
        plan.slices.append((id, 0, len(text)))
    return plan


def vectors(encoder: Encoder, texts: list[list[int]], tasks: list[str]) -> torch.Tensor:
    result = EncoderRunner(encoder, separator=SEPARATOR, device=CPU).run(plan_of(texts, tasks))
    assert not result.failed and list(result.tokens) == [()] * len(texts)
    return torch.tensor([result.vectors[i] for i in range(len(texts))])


def pooled(reference: EncoderReference, texts: list[list[int]], tasks: list[str]) -> torch.Tensor:
    """What sentence-transformers makes of transformers' hidden states."""
    hidden = reference.hidden(texts)
    kinds = {"mean": lambda h: h.mean(0), "last": lambda h: h[-1], "cls": lambda h: h[0]}
    return torch.stack([kinds[task](h) for h, task in zip(hidden, tasks, strict=True)])


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 20))])
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_vectors(kind: str, seed: int, tmp_path: Path) -> None:
    rng = random.Random(f"{kind} {seed}")
    reference = build_encoder(kind, rng, tmp_path)
    texts = ragged(reference, rng)
    theirs = reference.hidden(texts)
    starts = [0]
    for text in texts:
        starts.append(starts[-1] + len(text))
    ids_T = torch.tensor([token for text in texts for token in text])
    for backend in BACKENDS:
        encoder = load(reference, backend)
        with torch.inference_mode():
            ours_TD = encoder.forward(ids_T, torch.zeros_like(ids_T), starts)
        worst = error(ours_TD, torch.cat(theirs))
        print(f"{backend} differs by {worst:.1e}")
        assert worst <= TOLERANCE
        for task in TASKS:
            tasks = [task] * len(texts)
            assert error(vectors(encoder, texts, tasks), pooled(reference, texts, tasks)) <= TOLERANCE


MUTATIONS = ("mean without the first token", "last off by one", "positions count pads", "no token types")


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_caught(mutation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each breaks the model or its pooling a little, and the comparison above must notice."""
    rng = random.Random(mutation)
    reference = build_encoder("RobertaModel", rng, tmp_path)
    texts = ragged(reference, rng)[1:]
    tasks = ["last" if "last" in mutation else "mean"] * len(texts)
    encoder, expected = load(reference, "torch"), pooled(reference, texts, tasks)
    assert error(vectors(encoder, texts, tasks), expected) <= TOLERANCE
    mutate(mutation, encoder, monkeypatch)
    assert error(vectors(encoder, texts, tasks), expected) > 10 * TOLERANCE


def mutate(mutation: str, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutation == "mean without the first token":
        add = Vector.add

        def add_others(self: Vector, rows_TD: Any) -> None:
            add(self, np.concatenate([rows_TD[1:].mean(0, keepdims=True), rows_TD[1:]]))

        monkeypatch.setattr(Vector, "add", add_others)
    elif mutation == "last off by one":
        monkeypatch.setattr(Vector, "wanted", lambda self, start, count, length: range(length - 2, length - 1))
    elif mutation == "positions count pads":
        monkeypatch.setattr(
            Encoder,
            "places",
            lambda self, ids_T, starts: torch.cat([torch.arange(b - a) for a, b in pairwise(starts)]) + 2,
        )
    else:
        encoder.types.table_VD.zero_()


@pytest.mark.parametrize("kind", [*KINDS, *CLASSIFIERS])
def test_bits_do_not_depend_on_mates(kind: str, tmp_path: Path) -> None:
    """On ``ref`` a text's vector is the same alone and anywhere in any batch."""
    rng = random.Random(f"bits {kind}")
    reference = build_encoder(kind, rng, tmp_path)
    encoder, texts = load(reference, "ref"), ragged(reference, rng)
    tasks = ["cls"] * 4 if reference.spec.labels else ["mean", "last", "cls", "mean"]
    alone = [vectors(encoder, [text], [task])[0] for text, task in zip(texts, tasks, strict=True)]
    for _ in range(3):
        order = rng.sample(range(4), rng.randint(2, 4))
        together = vectors(encoder, [texts[i] for i in order], [tasks[i] for i in order])
        for i, vector in zip(order, together, strict=True):
            assert torch.equal(vector, alone[i])


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_classifiers(kind: str, labels: int, tmp_path: Path) -> None:
    """Logits of pairs; what follows the first separator is of the second token type where there is one."""
    rng = random.Random(f"{kind} {labels}")
    reference = build_encoder(kind, rng, tmp_path, num_labels=labels)
    assert reference.spec.labels == labels
    pairs = [
        [2, *reference.tokens(rng, n), SEPARATOR, *reference.tokens(rng, m), SEPARATOR] for n, m in ((3, 20), (9, 1))
    ]
    theirs = []
    for pair in pairs:
        types = [int(SEPARATOR in pair[:i]) if reference.spec.token_types > 1 else 0 for i in range(len(pair))]
        with torch.inference_mode():
            out = reference.model(torch.tensor([pair]), token_type_ids=torch.tensor([types]))
        theirs.append(out.logits[0])
    for backend in BACKENDS:
        encoder = load(reference, backend)
        ours = vectors(encoder, pairs, ["cls"] * 2)
        assert ours.shape == (2, labels)
        assert error(ours, torch.stack(theirs)) <= TOLERANCE
    if reference.spec.token_types > 1:
        encoder.types.table_VD[1] = encoder.types.table_VD[0]
        assert error(vectors(encoder, pairs, ["cls"] * 2), torch.stack(theirs)) > TOLERANCE


def test_low_precision(tmp_path: Path) -> None:
    rng = random.Random("bf16")
    reference = build_encoder("BertModel", rng, tmp_path)
    texts = [reference.tokens(rng, 30)]
    for backend in BACKENDS:
        assert (
            error(
                vectors(load(reference, backend, torch.bfloat16), texts, ["mean"]), pooled(reference, texts, ["mean"])
            )
            < 0.05
        )


# -- plans ----------------------------------------------------------------------------------------------------------


def test_a_plan_must_hold_whole_texts(tmp_path: Path) -> None:
    rng = random.Random("plans")
    reference = build_encoder("BertModel", rng, tmp_path)
    executor = LocalExecutor(EncoderRunner(load(reference, "torch"), separator=None, device=CPU))
    text = reference.tokens(rng, 9)
    plan = plan_of([text], ["mean"])
    plan.slices[0] = (0, 0, 8)
    failed = executor.submit(plan).wait()
    assert isinstance(failed, StepFailed) and "text_not_whole" in str(failed.error)
    failed = executor.submit(plan_of([text], ["generate"])).wait()
    assert isinstance(failed, StepFailed) and "task_unsupported" in str(failed.error)
    assert isinstance(executor.submit(StepPlan(2, slices=[(0, 0, 9)], gone=[0, 5])).wait(), StepFailed)
    result = executor.submit(plan_of([text, text[:3]], ["mean", "last"])).wait()
    assert isinstance(result, StepResult) and result.forward > 0 and sorted(result.vectors) == [0, 1]


def test_a_text_with_bad_numbers_fails_alone(tmp_path: Path) -> None:
    rng = random.Random("nan")
    reference = build_encoder("XLMRobertaModel", rng, tmp_path)
    encoder = load(reference, "torch")
    encoder.words.table_VD[7] = torch.nan
    texts = [[4, 5, 6], [4, 7, 6], [6]]
    result = EncoderRunner(encoder, separator=None, device=CPU).run(plan_of(texts, ["mean"] * 3))
    assert {i: error.code for i, error in result.failed.items()} == {1: "numerical_error"}
    assert sorted(result.vectors) == [0, 2]


def test_a_vector_needs_all_of_its_rows() -> None:
    vector = Vector("mean")
    vector.add(np.ones((3, 2), np.float32))
    assert vector.finish(3) == (1.0, 1.0)
    with pytest.raises(EngineError, match="pooling_incomplete"):
        vector.finish(4)
    with pytest.raises(EngineError, match="pooling_incomplete"):
        Vector("last").finish(1)
    vector.add(np.array([[np.inf, 1], [-np.inf, 1]], np.float32))
    with pytest.raises(EngineError, match="numerical_error"):
        vector.finish(5)


# -- folders --------------------------------------------------------------------------------------------------------


def test_names_of_old_and_large_checkpoints(tmp_path: Path) -> None:
    """With the prefix or without, TensorFlow's names of norms, buffers and heads that nobody needs."""
    rng = random.Random("names")
    reference = build_encoder("BertModel", rng, tmp_path)
    texts = [reference.tokens(rng, 12)]
    expected = vectors(load(reference, "torch"), texts, ["mean"])
    tensors = load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith("bert.") for name in tensors)
    renamed = {
        "bert."
        + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    renamed |= {"bert.embeddings.position_ids": torch.arange(70)[None], "cls.predictions.bias": torch.zeros(5)}
    save_file(renamed, tmp_path / "model.safetensors")
    assert torch.equal(vectors(load(reference, "torch"), texts, ["mean"]), expected)


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("weights_missing", {"encoder.layer.1.output.dense.bias": None}),
        ("weights_unexpected", {"encoder.layer.9.output.dense.bias": torch.zeros(3)}),
        ("weights_shape", {"embeddings.LayerNorm.bias": torch.zeros(3)}),
        ("weights_dtype", {"embeddings.LayerNorm.bias": "int8"}),
    ],
)
def test_weights_that_do_not_fit(code: str, change: dict[str, Any], tmp_path: Path) -> None:
    reference = build_encoder("BertModel", random.Random("unfit"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | change
    tensors = {
        name: torch.zeros(reference.spec.hidden, dtype=torch.int8) if isinstance(tensor, str) else tensor
        for name, tensor in tensors.items()
        if tensor is not None
    }
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelFormatError) as caught:
        load(reference, "torch")
    assert caught.value.code == code


def test_sizes(tmp_path: Path) -> None:
    for kind in (*KINDS, *CLASSIFIERS):
        reference = build_encoder(kind, random.Random(kind), tmp_path)
        pooler = sum(p.numel() for name, p in reference.model.named_parameters() if "pooler" in name)
        unused = 0 if kind == "BertForSequenceClassification" else pooler
        count = sum(p.numel() for p in reference.model.parameters()) - unused
        assert encoder_parameters(reference.spec) == count
        assert encoder_weight_bytes(reference.spec, "bfloat16") == 2 * count


BERT = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 100,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
}


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("config_invalid", {"hidden_size": 25}),
        ("config_invalid", {"hidden_size": None}),
        ("config_invalid", {"num_hidden_layers": 0}),
        ("config_invalid", {"model_type": "roberta"}),
        ("config_invalid", {"architectures": ["BertForSequenceClassification"], "id2label": {}}),
        ("config_invalid", {"architectures": ["XLMRobertaModel"], "model_type": "xlm-roberta", "pad_token_id": 100}),
        ("unsupported_positions", {"position_embedding_type": "relative_key"}),
        ("unsupported_attention", {"is_decoder": True}),
        ("unsupported_activation", {"hidden_act": "relu"}),
        ("unsupported_activation", {"hidden_act": ["gelu"]}),
        ("unsupported_dtype", {"torch_dtype": "float64"}),
        ("unsupported_quantization", {"quantization_config": {"quant_method": "gptq"}}),
        ("remote_code", {"auto_map": {"AutoModel": "a.B"}}),
    ],
)
def test_configurations_that_are_refused(code: str, change: dict[str, Any]) -> None:
    assert encoder_spec(BERT).hidden == 24
    with pytest.raises(ModelFormatError) as caught:
        encoder_spec(BERT | change)
    assert caught.value.code == code


def test_which_configurations_are_encoders(tmp_path: Path) -> None:
    assert is_encoder({"model_type": "xlm-roberta"}) and is_encoder({"architectures": ["RobertaForMaskedLM"]})
    for config in (
        {},
        {"architectures": ["BertForQuestionAnswering"]},
        {"architectures": "BertModel"},
        {"model_type": []},
    ):
        assert not is_encoder(config)
    write_json(tmp_path / "config.json", {"architectures": ["MPNetForMaskedLM"]})
    with pytest.raises(ModelFormatError, match=r"nearest by name is \w*ForMaskedLM.*unknown_architecture"):
        read_any_spec(tmp_path)


def test_pooling_of_folders(tmp_path: Path) -> None:
    reference = build_encoder("BertModel", random.Random("folders"), tmp_path)
    assert read_pooling(tmp_path, reference.spec) == PoolingSpec(pooling="mean", embedder=True)
    for flag, name in (("cls_token", "cls"), ("mean_tokens", "mean"), ("lasttoken", "last")):
        write_sentence_transformer(tmp_path, flag, normalize=name == "cls", max_seq_length=77, do_lower_case=True)
        found = read_pooling(tmp_path, reference.spec)
        assert (found.pooling, found.normalize, found.max_length, found.lower) == (name, name == "cls", 77, True)
    write_json(tmp_path / "1_Pooling" / "config.json", {"pooling_mode": "lasttoken"})
    assert read_pooling(tmp_path, reference.spec).pooling == "last"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}),
        ("1_Pooling/config.json", {"pooling_mode_cls_token": False}),
        ("1_Pooling/config.json", {"pooling_mode": "mean", "include_prompt": False}),
        ("modules.json", [{"type": "sentence_transformers.models.Dense", "path": "3_Dense"}]),
        ("modules.json", [{"type": "sentence_transformers.models.Pooling", "path": "../elsewhere"}]),
        ("modules.json", ["Pooling"]),
        ("modules.json", {"type": "Pooling"}),
        ("sentence_bert_config.json", {"max_seq_length": 0}),
        ("sentence_bert_config.json", {"do_lower_case": "no"}),
    ],
)
def test_pooling_that_is_refused(name: str, content: object, tmp_path: Path) -> None:
    reference = build_encoder("BertModel", random.Random("refused"), tmp_path)
    write_sentence_transformer(tmp_path, "mean_tokens", normalize=True)
    write_json(tmp_path / name, content)
    with pytest.raises(ModelFormatError) as caught:
        read_pooling(tmp_path, reference.spec)
    assert caught.value.code in ("unsupported_pooling", "config_invalid")
