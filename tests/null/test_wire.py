"""The wire: what is sent is what arrives, and what is not of it is an error with a name."""

from __future__ import annotations

import os
import random
import socket
import stat
import threading
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.base import ContextOverflow, InvalidRequest, PenstockError
from penstock.core.service import Counters, Status, Submission, Update
from penstock.core.trace import PoolTrace, RequestTrace, StepTrace, Trace
from penstock.spec import EngineConfig, SamplingParams, StructuredOutputs, Timing, TokenLogprobs
from penstock.wire import (
    MAX_FRAME,
    Cancel,
    Connection,
    Look,
    News,
    Ready,
    Refused,
    Seen,
    Start,
    Submit,
    WireError,
    decode_from_engine,
    decode_to_engine,
    encode,
)
from penstock.wire.messages import KINDS
from penstock.wire.process import listen, peer_of

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
IDS = st.lists(st.integers(0, 2**31 - 1), max_size=6).map(tuple)
FORMS = st.sampled_from(
    [
        StructuredOutputs(json={"type": "object", "properties": {"é": {"const": 1e300}}}),
        StructuredOutputs(json=False, disable_any_whitespace=True),
        StructuredOutputs(regex="[a-z]+"),
        StructuredOutputs(choice=["a", "b"]),
        StructuredOutputs(grammar='start: "x"'),
        StructuredOutputs(json_object=True),
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(1, 4),
        "temperature": st.floats(0, 10),
        "top_k": st.integers(-1, 100),
        "top_p": st.floats(0.01, 1),
        "min_p": st.floats(0, 1),
        "typical_p": st.floats(0.01, 1),
        "repetition_penalty": st.floats(0.1, 3),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "dry_multiplier": st.floats(0, 5),
        "dry_sequence_breakers": st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3),
        "logit_bias": st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=4),
        "allowed_token_ids": st.lists(st.integers(0, 1000), min_size=1, max_size=6),
        "bad_words": st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=3),
        "seed": st.integers(-(2**63), 2**64 - 1),
        "stop": st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3),
        "stop_token_ids": IDS,
        "min_tokens": st.integers(0, 10),
        "max_tokens": st.none() | st.integers(10, 2**31 - 1),
        "ignore_eos": st.booleans(),
        "skip_special_tokens": st.booleans(),
        "logprobs": st.none() | st.integers(0, 20),
        "prompt_logprobs": st.none() | st.integers(0, 20),
        "truncate_prompt_tokens": st.none() | st.integers(1, 100),
        "logits_rules": st.dictionaries(st.text("xyz", min_size=1, max_size=3), JSON, max_size=2),
        "structured_outputs": FORMS,
        "thinking_budget": st.none() | st.integers(0, 1000),
        "thinking_close": st.sampled_from(["", "so:", (1, 2)]),
        "thinking_soft": st.floats(0, 1),
        "bad_words_ids": st.lists(st.lists(st.integers(1001, 1099), min_size=1, max_size=3), max_size=3),
    },
)


@st.composite
def submissions(draw: st.DrawFn) -> Submission:
    params = SamplingParams(**draw(PARAMS))
    emitted = st.lists(st.none() | IDS, min_size=params.n, max_size=params.n).map(tuple)
    return Submission(
        id=draw(TEXT),
        tokens=draw(IDS),
        params=params,
        seed=draw(st.integers(0, 2**64 - 1)),
        priority=draw(st.integers(-(10**6), 10**6)),
        task=draw(st.sampled_from(["generate", "mean", "last", "cls"])),
        tenant=draw(TEXT),
        adapter=draw(TEXT),
        emitted=draw(st.just(()) | emitted),
    )


REALS = st.floats(allow_nan=False)
ERRORS = st.builds(
    lambda kind, words: kind(*words[:2], why=words[2], fix=words[3]),
    st.sampled_from(KINDS),
    st.lists(TEXT, min_size=4, max_size=4),
)
LOGPROBS = st.builds(
    TokenLogprobs,
    REALS,
    st.integers(1, 10**6),
    st.lists(st.tuples(st.integers(0, 10**6), REALS), max_size=3).map(tuple),
)
COUNTS = st.integers(0, 2**63 - 1)
UPDATES = st.builds(
    Update,
    TEXT,
    st.integers(0, 127),
    IDS,
    st.lists(LOGPROBS, max_size=3).map(tuple),
    st.sampled_from([None, "stop", "length", "abort", "error"]),
    st.none() | st.integers(0, 10**6),
    st.none() | ERRORS,
    st.integers(0, 10**6),
    st.lists(LOGPROBS, max_size=3).map(tuple),
    st.none() | st.lists(REALS, max_size=5).map(tuple),
    st.none() | st.builds(Timing, REALS, COUNTS, REALS),
)
STATUSES = st.builds(
    lambda counts, counters: Status(**counts, counters=Counters(**counters)),
    st.fixed_dictionaries({f.name: COUNTS for f in fields(Status) if f.name != "counters"}),
    st.fixed_dictionaries({f.name: COUNTS for f in fields(Counters)}),
)
CONFIGS = st.builds(
    EngineConfig,
    model=st.none() | TEXT,
    dtype=st.sampled_from(["auto", "float32", "bfloat16"]),
    max_model_len=st.none() | st.integers(1, 10**6),
    gpu_memory_utilization=st.floats(0.01, 1),
    enable_prefix_caching=st.booleans(),
)
SLICES = st.lists(st.tuples(COUNTS, COUNTS, COUNTS), max_size=3)
REQUESTS = st.builds(
    RequestTrace,
    *(COUNTS, TEXT, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, COUNTS, REALS, st.none() | REALS, COUNTS, REALS),
    *(TEXT, st.none() | REALS),
)
STEPS = st.builds(
    StepTrace,
    number=COUNTS,
    slices=SLICES,
    gone=st.lists(COUNTS, max_size=3),
    replayed=st.booleans(),
    failed=st.booleans(),
    **dict.fromkeys(("waiting", "free", "cached"), COUNTS),
    **dict.fromkeys(("now", "began", "planned", "started", "forward", "sample"), REALS),
    **dict.fromkeys(("landed", "committed", "published"), REALS),
)
TRACES = st.builds(
    Trace,
    now=REALS,
    steps=st.lists(STEPS, max_size=3).map(tuple),
    inflight=st.lists(STEPS, max_size=2).map(tuple),
    requests=st.lists(REQUESTS, max_size=3).map(tuple),
    pools=st.lists(
        st.builds(PoolTrace, COUNTS, st.none() | COUNTS, *[COUNTS] * 5, st.binary(max_size=40)), max_size=2
    ).map(tuple),
)
FROM_ENGINE = st.one_of(
    st.builds(Seen, COUNTS, COUNTS, TRACES),
    st.builds(News, COUNTS, st.lists(UPDATES, max_size=4).map(tuple), STATUSES),
    st.builds(
        Ready,
        COUNTS,
        CONFIGS,
        st.lists(st.tuples(COUNTS, st.none() | COUNTS), max_size=3).map(tuple),
        st.binary(max_size=40),
        st.booleans(),
        st.booleans(),
    ),
)


def words(error: PenstockError | None) -> object:
    return error and (type(error), error.code, error.what, error.why, error.fix)


@given(submissions())
def test_a_submission_arrives_as_it_was(submission: Submission) -> None:
    arrived = decode_to_engine(encode(Submit.of(submission)))
    assert arrived == submission and isinstance(arrived, Submission)
    assert repr(arrived) == repr(submission)  # lists are not tuples, and 1 is not 1.0


@given(
    st.builds(Start, COUNTS, CONFIGS)
    | st.builds(Cancel, TEXT, st.none() | st.integers(0, 127))
    | st.builds(Look, COUNTS, REALS, COUNTS)
)
def test_orders_arrive_as_they_were(message: Start | Cancel | Look) -> None:
    assert decode_to_engine(encode(message)) == message


@given(FROM_ENGINE)
def test_news_arrive_as_they_were(message: News | Ready | Seen) -> None:
    arrived = decode_from_engine(encode(message))
    if isinstance(message, News):
        assert isinstance(arrived, News)
        assert [words(u.error) for u in arrived.updates] == [words(u.error) for u in message.updates]
        arrived, message = (
            News(news.epoch, tuple(replace(u, error=None) for u in news.updates), news.status)
            for news in (arrived, message)
        )
    assert arrived == message and repr(arrived) == repr(message)


@given(ERRORS)
def test_an_error_arrives_with_its_kind_and_words(error: PenstockError) -> None:
    arrived = decode_from_engine(encode(Refused(error)))
    assert isinstance(arrived, Refused) and words(arrived.error) == words(error)


def test_a_prompt_beyond_the_context_arrives_with_its_numbers() -> None:
    for tokens in (600, None):
        error = ContextOverflow(
            "prompt_too_long", "The prompt has 600 tokens", fix="shorten it", tokens=tokens, most=511
        )
        arrived = decode_from_engine(encode(Refused(error)))
        assert isinstance(arrived, Refused) and isinstance(arrived.error, ContextOverflow)
        assert words(arrived.error) == words(error) and (arrived.error.tokens, arrived.error.most) == (tokens, 511)


def test_an_error_of_a_narrower_kind_arrives_as_the_wider_one() -> None:
    class Narrow(InvalidRequest):
        status = 418

    arrived = decode_from_engine(encode(Refused(Narrow("a", "b \ud800"))))
    assert isinstance(arrived, Refused) and words(arrived.error) == (InvalidRequest, "a", "b ?", "", "")


@settings(max_examples=5 * settings.default.max_examples)
@given(submissions(), FROM_ENGINE, st.randoms(use_true_random=False))
def test_a_mutated_frame_is_a_message_or_a_wire_error(
    submission: Submission, message: News | Ready | Seen, dice: random.Random
) -> None:
    for decode, frame in ((decode_to_engine, encode(Submit.of(submission))), (decode_from_engine, encode(message))):
        broken = bytearray(frame)
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(broken))
            match dice.randrange(3):
                case 0:
                    broken[at] = dice.randrange(256)
                case 1:
                    del broken[at : at + dice.randint(1, 8)]
                case 2:
                    broken[at:at] = bytes(dice.randrange(256) for _ in range(dice.randint(1, 8)))
            broken = broken or bytearray(b"\0")
        try:
            decode(bytes(broken))  # type: ignore[operator]
        except WireError as error:
            assert error.code == "bad_frame"


@pytest.mark.parametrize(
    "frame", [b"", b"\x80", b"\xc1", b"\x91" * 100_000, b"\x81\xa4type\xa4news", b"\xdf\xff\xff\xff\xff", b"\x80" * 9]
)
def test_what_is_no_message_is_a_wire_error(frame: bytes) -> None:
    for decode in (decode_to_engine, decode_from_engine):
        with pytest.raises(WireError, match="bad_frame"):
            decode(frame)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"id": "\ud800"}, "request_unsendable"),
        ({"seed": 2**64}, "request_unsendable"),
        ({"tokens": (1 << 40,) * 8_000_000}, "request_unsendable"),
        ({"params": SamplingParams(logits_processors=[print])}, "unsupported_parameter"),
    ],
)
def test_what_cannot_cross_is_refused_where_it_starts(change: dict[str, Any], code: str) -> None:
    submission = Submission(id="a", tokens=(1,), params=SamplingParams(), seed=0)
    with pytest.raises(InvalidRequest, match=code):
        encode(Submit.of(replace(submission, **change)))


def test_frames_keep_their_bounds() -> None:
    left, right = socket.socketpair()
    one, other = Connection(left), Connection(right)
    frames = [b"", b"a", b"b" * 300_000, b"c"]
    sender = threading.Thread(target=lambda: [one.send(frame) for frame in frames])
    sender.start()
    assert [other.receive() for _ in frames] == frames
    sender.join()
    one.close()
    assert other.receive() is None
    other.close()
    assert other.receive() is None


@pytest.mark.parametrize("sent", [b"\x01", (MAX_FRAME + 1).to_bytes(4, "little"), b"\x05\0\0\0abc"])
def test_a_frame_that_is_cut_or_too_long_is_an_error(sent: bytes) -> None:
    left, right = socket.socketpair()
    left.sendall(sent)
    left.close()
    connection = Connection(right)
    with pytest.raises(WireError, match="bad_frame"):
        connection.receive()
    connection.close()


def test_nobody_else_may_connect(tmp_path: Path) -> None:
    with listen(tmp_path / "s") as listener, socket.socket(socket.AF_UNIX) as client:
        assert stat.S_IMODE(os.stat(tmp_path / "s").st_mode) == 0o600
        client.connect(str(tmp_path / "s"))
        accepted, _ = listener.accept()
        with accepted:
            assert peer_of(accepted) == os.getpid()
