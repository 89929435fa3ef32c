"""What the one-answer grid covers: test_grid.py runs it, docs/reference/one-answer.md publishes it. Imports no torch.

A new axis, arithmetic, model or kind of request is one entry here.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from penstock.llm.embedding import Vectors
from penstock.llm.requests import Requests, TokensPrompt
from penstock.llm.searches import beams_of, samples_of
from penstock.search import BeamSearchParams, Search, SearchRun, mean_logprob
from penstock.spec import SamplingParams, StructuredOutputs
from penstock.text.gap import Gap

STORY = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw"
CONTEXT = 160
LONG = 130
"""Tokens of the one long prompt: it ends in the second segment of attention."""

Cell = dict[str, Any]
"""A value of each axis."""


@dataclass(frozen=True)
class Axis:
    """Attributes:
    values: the plainest first.
    option: the EngineConfig field it is; None: it is the driver's.
    """

    says: str
    values: tuple[Any, ...]
    option: str | None = None


AXES = {
    "mates": Axis(
        "the others: none, arriving a step apart, in reverse, or leaving early", ("none", "all", "reversed", "leaving")
    ),
    "chunk": Axis("tokens in a step: a prompt whole, or in chunks", (512, 29, 8), "max_num_batched_tokens"),
    "block": Axis("tokens in a KV block", (16, 4, 64), "block_size"),
    "prefix": Axis("prefix cache: off; or on, cold and then warm", (False, True), "enable_prefix_caching"),
    "pool": Axis("KV blocks: ample, or so few that requests are preempted", ("ample", "tight")),
    "depth": Axis("steps in flight", (1, 2), "depth"),
    "policy": Axis("order of service", ("fcfs", "priority"), "scheduling_policy"),
    "engine": Axis("the engine: stays; or is lost three times, and another goes on", ("stays", "lost")),
    "faults": Axis("steps of several requests that fail once they are done", ("none", "every 5th")),
    "threads": Axis("threads of the processor", (1, 2, 4), "num_threads"),
    "eager": Axis("steps recorded and replayed, or run op by op", (False, True), "enforce_eager"),
}
PLAIN: Cell = {name: axis.values[0] for name, axis in AXES.items()}

ARITHMETICS: dict[str, dict[str, Any]] = {
    "ref float32": {"backend": "ref", "dtype": "float32"},
    "cpu float32": {"backend": "cpu", "dtype": "float32"},
    "cpu bfloat16": {"backend": "cpu", "dtype": "bfloat16"},
    "cpu bfloat16 kv int8": {"backend": "cpu", "dtype": "bfloat16", "kv_dtype": "int8"},
    "cpu int8 kv bfloat16": {"backend": "cpu", "dtype": "bfloat16", "quant": "int8"},
    "cpu int8": {"backend": "cpu", "dtype": "bfloat16", "quant": "int8", "kv_dtype": "int8"},
    "cpu int4 kv int8": {"backend": "cpu", "dtype": "bfloat16", "quant": "int4", "kv_dtype": "int8"},
    "cpu int4": {"backend": "cpu", "dtype": "bfloat16", "quant": "int4"},
}
"""Options that choose the bits. Within each there is one answer; between two of them equality is by tolerance."""
CROSSED = tuple(name for name in ARITHMETICS if " kv " in name)
"""Kernels of these are those of others: they are in the pairs, without the full product."""

TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
"""So wide that small integers, which share scales by 32, are in every product, those with segments of sums too."""


@dataclass(frozen=True)
class Model:
    """``config``: its config.json, of random weights; None: the trained one of the test data."""

    says: str
    config: Mapping[str, Any] | None = None


def tiny(says: str, architecture: str, **keys: Any) -> Model:
    return Model(says, TINY | {"architectures": [architecture]} | keys)


MODELS = {
    "trained": Model("Llama of 260 thousand parameters, trained; grouped queries, tied embeddings"),
    "windows": tiny(
        "Qwen2 with a full and a sliding layer: two KV groups",
        "Qwen2ForCausalLM",
        use_sliding_window=True,
        sliding_window=20,
        max_window_layers=1,
    ),
    "experts": tiny(
        "Qwen3-MoE: 2 of 6 experts, a norm on each head's queries and keys",
        "Qwen3MoeForCausalLM",
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        norm_topk_prob=True,
    ),
    "sinks": tiny(
        "gpt-oss: attention sinks, windows in every second layer, clamped experts with biases",
        "GptOssForCausalLM",
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=24,
        attention_bias=True,
    ),
    "softcap": tiny(
        "Gemma 2: capped scores and logits, windows in every second layer, norms on both sides",
        "Gemma2ForCausalLM",
        sliding_window=24,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=12.0,
        query_pre_attn_scalar=8,
    ),
    "slopes": Model(
        "BLOOM: linear position biases over 6 heads, LayerNorm, a norm on the embedding, no gate",
        {
            "architectures": ["BloomForCausalLM"],
            "vocab_size": 512,
            "hidden_size": 192,
            "n_head": 6,
            "n_layer": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "float32",
        },
    ),
    "norms": tiny("OLMo 2: one norm over all queries and one over all keys, norms after blocks", "Olmo2ForCausalLM"),
}


# -- kinds of requests -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A request under way: what came of it, and how its caller leaves. ``said``: (tokens, logprobs) of each sample."""

    answer: Callable[[], Any]
    leave: Callable[[], None]
    said: Callable[[], list[tuple[list[int], list[Any]]]] = list


@dataclass(frozen=True)
class Kind:
    """``ask``: starts the request of that name, whose noise and priority follow from the name up to a dot."""

    says: str
    ask: Callable[[Requests, str], Asked]


def number(name: str) -> int:
    return zlib.crc32(name.partition(".")[0].encode())


def story(requests: Requests, count: int) -> TokensPrompt:
    ids = requests.engine.tokenizer.encode(STORY)
    return TokensPrompt(prompt_token_ids=(ids * (1 + count // len(ids)))[:count])


def generation(says: str, prompt: int, shown: Callable[[list[int]], list[int]] = list, **params: Any) -> Kind:
    """``prompt``: its tokens, the story's first ones, as ``shown`` arranges them."""

    def ask(requests: Requests, name: str) -> Asked:
        wanted = SamplingParams(**{"seed": number(name), "logprobs": 1} | params)
        told = TokensPrompt(prompt_token_ids=shown(story(requests, prompt)["prompt_token_ids"]))
        job = requests.job(told, wanted, request_id=name, priority=number(name) % 3)
        requests.submit(job, requests.apply)

        def answer() -> Any:
            assert job.error is None, job.error
            output = job.output()
            assert output.finished
            return output.outputs, output.prompt_logprobs

        def said() -> list[tuple[list[int], list[Any]]]:
            return [(list(sample.token_ids), sample.logprobs or []) for sample in job.output().outputs]

        return Asked(answer, lambda: requests.end(job), said)

    return Kind(says, ask)


def vector(says: str, prompt: int, task: Any) -> Kind:
    def ask(requests: Requests, name: str) -> Asked:
        ids, heard = story(requests, prompt)["prompt_token_ids"], list[Any]()
        one = requests.submission(ids, SamplingParams(), task=task, request_id=name, priority=number(name) % 3)
        requests.engine.service.submit(one, heard.append)
        return Asked(lambda: heard[-1].vector, lambda: requests.engine.service.abort(name))

    return Kind(says, ask)


def score(requests: Requests, name: str) -> Asked:
    (pair,) = Vectors(requests).pairs(STORY[:30], STORY[:60], None, number(name) % 3)
    for job in pair.jobs:
        requests.engine.service.submit(job.submission, job.hear)

    def leave() -> None:
        for job in pair.jobs:
            requests.engine.service.abort(job.submission.id)

    return Asked(lambda: Vectors(requests).scored(pair).outputs.score, leave)


def search(says: str, make: Callable[[Requests, str], Search]) -> Kind:
    def ask(requests: Requests, name: str) -> Asked:
        engine = requests.engine
        run: SearchRun = SearchRun(
            engine.service, make(requests, name), lambda update: run.hear(update), engine.tokenizer
        )
        run.start()
        return Asked(lambda: run.outcome, run.cancel)

    return Kind(says, ask)


def beams(requests: Requests, name: str) -> Search:
    return beams_of(requests, story(requests, 13), BeamSearchParams(beam_width=3, max_tokens=5), name, number(name) % 3)


def best(requests: Requests, name: str) -> Search:
    params = SamplingParams(temperature=0.9, n=4, max_tokens=8, seed=number(name), stop=[" the", "."])
    return samples_of(requests, story(requests, 28), params, mean_logprob, name, number(name) % 3)


def without(arguments: list[int], request: object) -> Callable[[list[int], Any], Any]:
    """A rule of one's own: forbids a token that depends on those before it."""

    def rule(output: list[int], logits: Any) -> Any:
        logits[sum(output, arguments[0]) % len(logits)] = float("-inf")
        return logits

    return rule


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMA = StructuredOutputs(json=PERSON, disable_any_whitespace=True)
CALL = StructuredOutputs(
    structural_tag={
        "structures": [
            {
                "begin": "<f>",
                "schema": {
                    "type": "object",
                    "properties": {"a": {"type": "integer", "minimum": 10, "maximum": 99}},
                    "required": ["a"],
                    "additionalProperties": False,
                },
                "end": "</f>",
            }
        ],
        "triggers": ["<f>"],
        "at_least": 1,
        "at_most": 1,
    }
)
GAP = Gap(prefix=300, suffix=301, middle=302)
"""Its marks are tokens like others: no model here was trained for a gap."""
PENALTIES: dict[str, Any] = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3}

KINDS = {
    "greedy": generation("the likeliest token each time", 37, temperature=0, max_tokens=12, logprobs=3),
    "top-p": generation("a seeded draw from the nucleus", 30, temperature=0.9, top_p=0.9, max_tokens=12),
    "penalties": generation("penalties and a least length", 21, **PENALTIES, min_tokens=4, max_tokens=12),
    "json": generation("a JSON schema, with penalties", 37, **PENALTIES, structured_outputs=SCHEMA, max_tokens=20),
    "tool call": generation("one call that must come, and nothing else", 16, structured_outputs=CALL, max_tokens=16),
    "n = 3": generation("three samples of a prompt", 33, n=3, top_k=40, min_p=0.02, max_tokens=8),
    "rules": generation(
        "bias, forbidden words, allowed tokens, DRY, typical, a rule of one's own",
        25,
        logit_bias={300: 4.0, 301: -50.0},
        bad_words=["park", " the"],
        allowed_token_ids=range(2, 500),
        dry_multiplier=0.8,
        dry_allowed_length=1,
        typical_p=0.8,
        logits_rules={"without": [3]},
        max_tokens=12,
    ),
    "thoughts": generation(
        "a thinking budget", 19, thinking_budget=6, thinking_soft=0.5, thinking_start="Once", thinking_end=".",
        max_tokens=12,
    ),
    "prompt logprobs": generation("of every token of the prompt", 70, n=2, prompt_logprobs=2, max_tokens=4),
    "echo": generation("the prompt looked at, and nothing written", 33, prompt_logprobs=1, max_tokens=1),
    "gap": generation(
        "what comes between two texts", 33, lambda ids: GAP.around(ids[:21], ids[26:]), temperature=0, max_tokens=5
    ),
    "stop strings": generation("text that ends a completion", 30, n=2, stop=["e", " day"], max_tokens=12),
    "long": generation("a prompt over two segments of attention", LONG, max_tokens=5, temperature=0.8),
    "mean vector": vector("of all positions", 37, "mean"),
    "last vector": vector("of the last position", 24, "last"),
    "score": Kind("the angle between two texts", score),
    "beams": search("beam search: a round for each token, three beams side by side", beams),
    "best of 4": search("four samples, stop strings, the likeliest one", best),
}  # fmt: skip


# -- pairs that cannot be had ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    """Two things that exclude each other, why, and the error that says so."""

    one: str
    other: str
    why: str
    code: str
    attempt: Callable[[Requests], object]


def asked(**params: Any) -> Callable[[Requests], object]:
    return lambda requests: generation("", 9, **params).ask(requests, "refused")


REFUSED = (
    Refused(
        "thinking budget",
        "structured output",
        "the form would have to hold for the thoughts as well",
        "unsupported_parameter",
        asked(thinking_budget=4, thinking_start="<", thinking_end=">", structured_outputs=SCHEMA),
    ),
    Refused(
        "prompt logprobs",
        "best of N",
        "the answer of a search has no place for them",
        "unsupported_parameter",
        lambda requests: samples_of(requests, story(requests, 9), SamplingParams(prompt_logprobs=1), mean_logprob),
    ),
    Refused(
        "beam search",
        "temperature",
        "beams are ranked by the model's own logprobs, not drawn",
        "unsupported_parameter",
        lambda _: BeamSearchParams(beam_width=2, max_tokens=2, temperature=1.0),
    ),
    Refused(
        "stop strings",
        "no detokenizing",
        "they are found in the text",
        "invalid_parameter",
        asked(stop=["e"], detokenize=False),
    ),
)
