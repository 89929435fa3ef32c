"""embed and score, from texts to numbers: what transformers and sentence-transformers' formulas give, and bad input."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from encoder_models import (
    EncoderReference,
    build_encoder,
    write_json,
    write_sentence_transformer,
    write_unigram,
    write_wordpiece,
)
from oracle import build_reference
from penstock import LLM, SamplingParams
from penstock.base import InvalidRequest, ModelFormatError, PenstockError
from penstock.llm import AsyncLLM
from penstock.spec import PoolingParams
from penstock.spec.location import BUNDLED
from penstock.text import load_tokenizer

TEXTS = [
    "The cat sat on the mat.",
    "A small dog ran, and then?",
    "why",
    "who did the big red cat see under a blue tree",
]
OPTIONS: dict[str, Any] = {"device": "cpu", "dtype": "float32", "num_threads": 1}
CLOSE = {"rtol": 2e-4, "atol": 2e-5}
LONGEST = 70


@pytest.fixture(autouse=True, scope="module")
def quiet_transformers() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


def encoder(kind: str, folder: Path, **overrides: Any) -> EncoderReference:
    write = write_wordpiece if kind.startswith("Bert") else write_unigram
    return build_encoder(kind, random.Random(kind), folder, vocab_size=write(folder), **overrides)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> EncoderReference:
    """BERT, mean, normalized: as all-MiniLM-L6-v2."""
    reference = encoder("BertModel", tmp_path_factory.mktemp("minilm"))
    write_sentence_transformer(reference.folder, "mean_tokens", normalize=True)
    return reference


@pytest.fixture(scope="module")
def cross(tmp_path_factory: pytest.TempPathFactory) -> EncoderReference:
    return encoder("BertForSequenceClassification", tmp_path_factory.mktemp("cross"), num_labels=1)


@pytest.fixture(scope="module")
def llm(minilm: EncoderReference) -> Iterator[LLM]:
    with LLM(str(minilm.folder), **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def cross_llm(cross: EncoderReference) -> Iterator[LLM]:
    with LLM(str(cross.folder), **OPTIONS) as llm:
        yield llm


def sentence_embeddings(reference: EncoderReference, texts: list[str], pooling: str, normalize: bool) -> Any:
    """sentence-transformers: tokenize and pad, pool the hidden states under the mask, normalize."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(reference.folder)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = reference.model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).float()
    if pooling == "mean":
        vectors = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    else:
        vectors = hidden[:, 0]
    return (torch.nn.functional.normalize(vectors, dim=1) if normalize else vectors).numpy()


def embeddings(llm: LLM, texts: Any, **options: Any) -> Any:
    return np.array([out.outputs.embedding for out in llm.embed(texts, use_tqdm=False, **options)])


def test_embeddings_are_those_of_sentence_transformers(minilm: EncoderReference, llm: LLM) -> None:
    outputs = llm.embed(TEXTS, use_tqdm=False)
    expected = sentence_embeddings(minilm, TEXTS, "mean", normalize=True)
    np.testing.assert_allclose([out.outputs.embedding for out in outputs], expected, **CLOSE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm.folder)
    assert [out.prompt_token_ids for out in outputs] == tokenizer(TEXTS)["input_ids"]
    assert all(out.finished and out.outputs.hidden_size == minilm.spec.hidden for out in outputs)
    assert len({out.request_id for out in outputs}) == len(TEXTS)
    one = llm.embed({"prompt": TEXTS[1]})[0]
    np.testing.assert_allclose(one.outputs.embedding, expected[1], **CLOSE)
    ids = llm.embed([outputs[2].prompt_token_ids])[0]
    np.testing.assert_allclose(ids.outputs.embedding, expected[2], **CLOSE)


@pytest.mark.parametrize("kind", ["XLMRobertaModel", "RobertaModel"])
def test_other_families_and_poolings(kind: str, tmp_path: Path) -> None:
    reference = encoder(kind, tmp_path)
    write_sentence_transformer(tmp_path, "cls_token", normalize=False, max_seq_length=20)
    with LLM(str(tmp_path), **OPTIONS) as llm:
        np.testing.assert_allclose(
            embeddings(llm, TEXTS), sentence_embeddings(reference, TEXTS, "cls", normalize=False), **CLOSE
        )
        with pytest.raises(InvalidRequest, match="prompt_too_long"):
            llm.embed(("cat " * 19).strip())  # and <s>, </s>
        assert embeddings(llm, ("cat " * 18).strip()).shape == (1, reference.spec.hidden)


def test_lower_case_is_the_folders_wish(tmp_path: Path) -> None:
    encoder("XLMRobertaModel", tmp_path)
    for lower in (False, True):
        write_sentence_transformer(tmp_path, "mean_tokens", normalize=True, do_lower_case=lower)
        with LLM(str(tmp_path), **OPTIONS) as llm:
            assert (llm.embed("The CAT")[0].prompt_token_ids == llm.embed("the cat")[0].prompt_token_ids) is lower


def test_dimensions_and_normalize(llm: LLM) -> None:
    raw = embeddings(llm, TEXTS, pooling_params=PoolingParams(normalize=False))
    assert not np.allclose(np.linalg.norm(raw, axis=1), 1.0, rtol=0.01)
    cut = embeddings(llm, TEXTS, pooling_params=PoolingParams(dimensions=5))
    np.testing.assert_allclose(cut, raw[:, :5] / np.linalg.norm(raw[:, :5], axis=1, keepdims=True), rtol=1e-12)
    each = [PoolingParams(dimensions=d, normalize=False) for d in (1, 2, 3, 4)]
    outputs = llm.embed(TEXTS, pooling_params=each)
    for i, out in enumerate(outputs):
        assert out.outputs.embedding == raw[i, : i + 1].tolist()


def test_truncation_keeps_what_ends_a_text(llm: LLM) -> None:
    whole = llm.embed(TEXTS[0])[0].prompt_token_ids
    for length in (1, 2, 5, len(whole), LONGEST):
        ids = llm.embed(TEXTS[0], pooling_params=PoolingParams(truncate_prompt_tokens=length))[0].prompt_token_ids
        assert ids == (whole if length >= len(whole) else [*whole[: length - 1], whole[-1]])
    long = llm.embed("cat " * 200, pooling_params=PoolingParams(truncate_prompt_tokens=-1))[0].prompt_token_ids
    assert len(long) == LONGEST and long[-1] == whole[-1]
    given = llm.embed([whole], pooling_params=PoolingParams(truncate_prompt_tokens=3))[0].prompt_token_ids
    assert given == whole[:3]


def test_scores_of_embeddings_are_cosines(minilm: EncoderReference, llm: LLM) -> None:
    vectors = sentence_embeddings(minilm, TEXTS, "mean", normalize=True).astype(np.float64)
    one_to_many = llm.score(TEXTS[0], TEXTS[1:], use_tqdm=False)
    np.testing.assert_allclose([out.outputs.score for out in one_to_many], vectors[1:] @ vectors[0], **CLOSE)
    pairwise = llm.score(TEXTS[:2], TEXTS[2:])
    np.testing.assert_allclose([out.outputs.score for out in pairwise], (vectors[:2] * vectors[2:]).sum(1), **CLOSE)
    (same,) = llm.score(TEXTS[0], TEXTS[0])
    assert abs(same.outputs.score - 1.0) < 1e-12
    unnormalized = llm.score(TEXTS[0], TEXTS[1], pooling_params=PoolingParams(normalize=False))
    np.testing.assert_allclose(unnormalized[0].outputs.score, one_to_many[0].outputs.score, rtol=1e-9)


def logits(reference: EncoderReference, first: list[str], second: list[str], **options: Any) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(reference.folder)
    batch = tokenizer(first, second, padding=True, return_tensors="pt", **options)
    with torch.inference_mode():
        return reference.model(**batch).logits[:, 0].double().numpy(), batch["input_ids"].tolist()


def test_scores_of_cross_encoders(cross: EncoderReference, cross_llm: LLM) -> None:
    expected, ids = logits(cross, [TEXTS[0]] * 3, TEXTS[1:])
    outputs = cross_llm.score(TEXTS[0], TEXTS[1:])
    np.testing.assert_allclose([out.outputs.score for out in outputs], 1 / (1 + np.exp(-expected)), **CLOSE)
    assert [out.prompt_token_ids for out in outputs] == [[i for i in row if i != 0] for row in ids]
    raw = cross_llm.score(TEXTS[0], TEXTS[1:], pooling_params=PoolingParams(use_activation=False))
    np.testing.assert_allclose([out.outputs.score for out in raw], expected, rtol=1e-3, atol=1e-4)
    for first, second in (("cat " * 9, "dog " * 30), ("cat " * 30, "dog"), ("cat " * 20, "dog " * 20)):
        for length in (12, 13, 30):
            wanted, ids = logits(cross, [first], [second], truncation="longest_first", max_length=length)
            params = PoolingParams(truncate_prompt_tokens=length, use_activation=False)
            (out,) = cross_llm.score(first, second, pooling_params=params)
            assert out.prompt_token_ids == ids[0]
            np.testing.assert_allclose(out.outputs.score, wanted[0], rtol=1e-3, atol=1e-4)


def test_special_tokens_in_a_pair_are_text(cross_llm: LLM) -> None:
    """A document cannot end itself: the separator written in it is not the separator."""
    (out,) = cross_llm.score("cat [SEP] dog", "mat [SEP]")
    assert out.prompt_token_ids.count(3) == 2


def test_special_tokens_in_a_text_are_text(llm: LLM) -> None:
    """Embedded or scored, in whatever form of a prompt; what the tokenizer puts around it stays. Ids are ids."""
    text = "cat [SEP] dog [CLS][MASK]"
    own = llm._requests.engine.tokenizer.encode(text, parse_special=False)
    assert own[0] == 2 and own[-1] == 3 and own.count(3) == 1
    assert [out.prompt_token_ids for out in llm.embed([text, {"prompt": text}])] == [own, own]
    (out,) = llm.score(text, text)
    assert out.prompt_token_ids == own * 2
    assert llm.embed([[2, 3, 3]])[0].prompt_token_ids == [2, 3, 3]


def test_a_roberta_cross_encoder_that_keeps_its_logits(tmp_path: Path) -> None:
    reference = encoder("XLMRobertaForSequenceClassification", tmp_path, num_labels=1)
    config = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    identity = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
    expected, _ = logits(reference, TEXTS[:2], TEXTS[2:])
    write_json(tmp_path / "config.json", {k: v for k, v in config.items() if v is not None} | identity)
    with LLM(str(tmp_path), **OPTIONS) as llm:
        scores = [out.outputs.score for out in llm.score(TEXTS[:2], TEXTS[2:])]
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4)


def test_async(minilm: EncoderReference, llm: LLM) -> None:
    async def run() -> tuple[list[list[float]], list[float]]:
        engine = AsyncLLM(llm.engine)
        outputs = await asyncio.gather(*(engine.embed(text) for text in TEXTS))
        with pytest.raises(InvalidRequest, match="empty_prompt"):
            await engine.embed("")
        task = asyncio.ensure_future(engine.embed(TEXTS[0], request_id="gone"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        named = await engine.embed(TEXTS[0], PoolingParams(dimensions=2), request_id="mine", priority=3)
        assert named.request_id == "mine" and named.outputs.hidden_size == 2
        scores = await engine.score(TEXTS[0], TEXTS[1:])
        return [out.outputs.embedding for out in outputs], [out.outputs.score for out in scores]

    vectors, scores = asyncio.run(run())
    expected = sentence_embeddings(minilm, TEXTS, "mean", normalize=True)
    np.testing.assert_allclose(vectors, expected, **CLOSE)
    np.testing.assert_allclose(scores, expected[1:] @ expected[0], rtol=1e-3, atol=1e-5)


def test_one_answer(minilm: EncoderReference) -> None:
    """On ``ref`` a text's vector has the same bits alone, in any batch and in steps of any size."""
    with LLM(str(minilm.folder), backend="ref", **OPTIONS) as llm:
        alone = [llm.embed(text)[0].outputs.embedding for text in TEXTS]
        assert [out.outputs.embedding for out in llm.embed(TEXTS[::-1])] == alone[::-1]
    with LLM(str(minilm.folder), backend="ref", max_num_batched_tokens=8, max_num_seqs=2, depth=2, **OPTIONS) as llm:
        assert [out.outputs.embedding for out in llm.embed(TEXTS)] == alone


def test_more_texts_than_a_step_holds(minilm: EncoderReference, llm: LLM) -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices(["cat", "dog", "mat", "tree"], k=rng.randint(1, 60))) for _ in range(150)]
    np.testing.assert_allclose(
        embeddings(llm, texts), sentence_embeddings(minilm, texts, "mean", normalize=True), **CLOSE
    )


# -- decoders ------------------------------------------------------------------------------------------------------


def test_decoders_embed_and_generate_side_by_side() -> None:
    with LLM(**OPTIONS) as llm:
        params = SamplingParams(temperature=0, max_tokens=8)
        story, vector = llm.generate(TEXTS[0], params)[0].outputs[0].text, embeddings(llm, TEXTS[0])
        assert abs(np.linalg.norm(vector) - 1.0) < 1e-9

        async def both() -> tuple[Any, Any]:
            engine = AsyncLLM(llm.engine)

            async def generate() -> str:
                async for out in engine.generate(TEXTS[0], params):
                    text = out.outputs[0].text
                return text

            return await asyncio.gather(generate(), engine.embed(TEXTS[0]))

        again, embedded = asyncio.run(both())
        assert again == story
        np.testing.assert_allclose(embedded.outputs.embedding, vector[0], rtol=1e-3, atol=1e-5)


def test_scores_of_a_decoder_are_likelihoods() -> None:
    """Of the first text after the second, a token on average, as transformers finds them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED)
    model = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)

    def expected(first: str, second: str) -> float:
        scored = tokenizer(first, add_special_tokens=False)["input_ids"]
        ids = tokenizer(second)["input_ids"] + tokenizer("\n", add_special_tokens=False)["input_ids"] + scored
        with torch.inference_mode():
            logprobs_TV = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return float(logprobs_TV[-len(scored) - 1 : -1].gather(1, torch.tensor(scored)[:, None]).mean())

    with LLM(max_model_len=128, **OPTIONS) as llm:
        logarithms = [expected(TEXTS[0], text) for text in TEXTS]
        outputs = llm.score(TEXTS[0], TEXTS, use_tqdm=False)
        np.testing.assert_allclose([out.outputs.score for out in outputs], np.exp(logarithms), rtol=1e-4)
        assert outputs[0].outputs.score == max(out.outputs.score for out in outputs), "it has just been said"
        assert [llm.score(TEXTS[0], text)[0].outputs.score for text in TEXTS] == [o.outputs.score for o in outputs]
        raw = llm.score(TEXTS[:2], TEXTS[2:], pooling_params=PoolingParams(use_activation=False))
        np.testing.assert_allclose(
            [out.outputs.score for out in raw], list(map(expected, TEXTS[:2], TEXTS[2:])), rtol=1e-4
        )
        long = "the dog " * 200
        (cut,) = llm.score(TEXTS[0], long, pooling_params=PoolingParams(truncate_prompt_tokens=-1))
        assert len(cut.prompt_token_ids) == 127 and cut.outputs.score > 0
        assert tokenizer.decode(cut.prompt_token_ids).endswith(TEXTS[0])
        with pytest.raises(InvalidRequest, match="prompt_too_long"):
            llm.score(TEXTS[0], long)
        with pytest.raises(InvalidRequest, match="empty_prompt"):
            llm.score(TEXTS[0], "")


def test_a_decoder_without_a_head_only_embeds(tmp_path: Path) -> None:
    reference = build_reference("qwen3", random.Random("headless"), tmp_path / "whole")
    folder = tmp_path / "bare"
    reference.model.model.save_pretrained(folder)
    write_unigram(folder)
    with LLM(str(folder), max_model_len=64, **OPTIONS) as llm:
        assert llm.embed("the cat")[0].outputs.hidden_size == reference.spec.hidden
        with pytest.raises(InvalidRequest, match="cannot_generate"):
            llm.generate("the cat")


def test_own_ids_are_none_that_a_caller_would_choose() -> None:
    async def score_while_numbers_are_taken(engine: AsyncLLM) -> None:
        params = SamplingParams(max_tokens=400, ignore_eos=True)
        streams = [engine.stream(TEXTS[0], params, str(i)) for i in range(8)]
        await asyncio.gather(*(anext(stream) for stream in streams))
        await engine.score(TEXTS[0], TEXTS[1:])
        await engine.embed_all(TEXTS)
        with pytest.raises(InvalidRequest, match="duplicate_request_id"):
            await engine.embed(TEXTS[0], request_id="7")
        for stream in streams:
            await stream.aclose()

    with LLM(**OPTIONS) as llm:
        asyncio.run(score_while_numbers_are_taken(AsyncLLM(llm.engine)))


# -- bad input -----------------------------------------------------------------------------------------------------


def code(of: Any) -> str:
    with pytest.raises(PenstockError) as caught:
        of()
    assert caught.value.what and caught.value.status < 500
    return caught.value.code


def test_what_an_encoder_cannot_do(llm: LLM, cross_llm: LLM) -> None:
    for model in (llm, cross_llm):
        assert code(lambda model=model: model.generate("the cat")) == "cannot_generate"
        assert code(lambda model=model: list(model.stream("the cat"))) == "cannot_generate"
    assert code(lambda: llm.chat([{"role": "user", "content": "hi"}])) in ("no_chat_template", "cannot_generate")
    assert code(lambda: cross_llm.embed("the cat")) == "not_an_embedding_model"
    assert embeddings(llm, TEXTS).shape[0] == len(TEXTS)


def test_texts_that_cannot_be_embedded(llm: LLM) -> None:
    before = embeddings(llm, TEXTS)
    assert code(lambda: llm.embed("")) == "empty_prompt"
    assert code(lambda: llm.embed(["fine", ""])) == "empty_prompt"
    assert code(lambda: llm.embed({"prompt": ""})) == "empty_prompt"
    assert code(lambda: llm.embed([[]])) == "empty_prompt"
    assert code(lambda: llm.embed(["fine", "cat " * (LONGEST - 1)])) == "prompt_too_long"
    assert code(lambda: llm.embed("cat " * 2_000_000)) == "prompt_too_long"
    assert code(lambda: llm.embed([[10**6]])) == "token_out_of_range"
    assert code(lambda: llm.embed("half of \ud800")) == "invalid_text"
    assert code(lambda: llm.embed(7)) == "invalid_prompt"  # type: ignore[arg-type]
    assert llm.embed([]) == []
    assert len(llm.embed("cat " * (LONGEST - 2))[0].prompt_token_ids) == LONGEST  # exactly all positions
    np.testing.assert_array_equal(embeddings(llm, TEXTS), before)


def test_parameters_that_cannot_be_used(llm: LLM) -> None:
    for bad in ({"dimensions": 0}, {"dimensions": True}, {"normalize": 1}, {"truncate_prompt_tokens": -2}):
        assert code(lambda bad=bad: PoolingParams(**bad)) == "invalid_parameter"
    for given in (PoolingParams(dimensions=10**4), PoolingParams(truncate_prompt_tokens=LONGEST + 1), SamplingParams()):
        assert code(lambda given=given: llm.embed("cat", pooling_params=given)) == "invalid_parameter"
    assert code(lambda: llm.embed(TEXTS, pooling_params=[PoolingParams()])) == "invalid_parameter"
    assert code(lambda: llm.embed("cat", lora_request=1)) == "unsupported_parameter"  # type: ignore[arg-type]


def test_pairs_that_cannot_be_scored(llm: LLM, cross_llm: LLM, tmp_path: Path) -> None:
    for model in (llm, cross_llm):
        assert code(lambda model=model: model.score(TEXTS[:2], TEXTS[:3])) == "invalid_parameter"
        assert code(lambda model=model: model.score(TEXTS[:2], TEXTS[2])) == "invalid_parameter"
        assert code(lambda model=model: model.score("cat", [])) == "invalid_parameter"
        assert code(lambda model=model: model.score("cat", 3)) == "invalid_parameter"
        assert code(lambda model=model: model.score("cat", ["dog", ""])) == "empty_prompt"
        assert code(lambda model=model: model.score("cat", "dog " * 100)) == "prompt_too_long"
    tiny = PoolingParams(truncate_prompt_tokens=2)
    assert code(lambda: cross_llm.score("cat", "dog", pooling_params=tiny)) == "invalid_parameter"
    encoder("BertForSequenceClassification", tmp_path, num_labels=3)
    with LLM(str(tmp_path), **OPTIONS) as three:
        assert code(lambda: three.score("cat", "dog")) == "not_a_scoring_model"


def test_folders_that_cannot_be_loaded(minilm: EncoderReference, tmp_path: Path) -> None:
    encoder("BertModel", tmp_path)
    write_sentence_transformer(tmp_path, "max_tokens", normalize=True)
    with pytest.raises(ModelFormatError, match="unsupported_pooling"):
        LLM(str(tmp_path), **OPTIONS)
    with pytest.raises(PenstockError, match="context_too_long"):
        LLM(str(minilm.folder), max_model_len=LONGEST + 1, **OPTIONS)
    (tmp_path / "modules.json").unlink()
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][3, 1] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelFormatError, match="weights_not_finite"):
        LLM(str(tmp_path), **OPTIONS)


def test_a_text_that_overflows_fails_alone(minilm: EncoderReference, tmp_path: Path) -> None:
    """Numbers beyond fp32 in one text's way through the model: that text is refused, its mates are not."""
    encoder("BertModel", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    word = load_tokenizer(tmp_path, 10**6).encode("tree", add_special_tokens=False)[0]
    tensors["embeddings.word_embeddings.weight"][word] = 3e38
    save_file(tensors, tmp_path / "model.safetensors")
    with LLM(str(tmp_path), **OPTIONS) as llm:
        with pytest.raises(PenstockError, match="numerical_error"):
            llm.embed(["the cat", "a tree", "why"])
        assert np.isfinite(embeddings(llm, ["the cat", "why"])).all()
