"""The draw: its numbers, its distribution, and that a row never sees its neighbours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from drawing import CPU, draw, logprobs, random_logits, request
from penstock.core.plan import NewRequest
from penstock.sampling import Sampler, blocks, candidates, draw_error, exact, gumbel, order, philox
from penstock.sampling.sampler import MASKED, NUMERICAL
from penstock.spec import SamplingParams


def row_bits(sites_R5: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Noise of every token at each site: (R, V)."""
    lanes = philox.row_lanes(sites_R5, vocab_size)
    return torch.stack(lanes, dim=2).view(len(sites_R5), -1)[:, :vocab_size]


# -- noise ---------------------------------------------------------------------------------------------------------

KNOWN_ANSWERS = [  # Random123, tests/kat_vectors: counter, key, output of philox4x32-10
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: list[int], key: list[int], output: list[int]) -> None:
    assert list(philox.philox4x32(tuple(counter), tuple(key))) == output  # type: ignore[arg-type]
    tensors = [torch.full((5,), word) for word in (*counter, *key)]
    assert [lane.tolist() for lane in philox.philox4x32(tuple(tensors[:4]), tuple(tensors[4:]))] == [  # type: ignore[arg-type]
        [word] * 5 for word in output
    ]


def test_row_and_token_noise_agree_with_the_documented_counter() -> None:
    sites, vocab_size = [(7, -3, 0, 1), (2**40 + 5, 2**64 - 1, 9, 100_000)], 37
    rows = [[*philox.words(seed), sample, position] for _, seed, sample, position in sites]
    bits = row_bits(torch.tensor(rows), vocab_size)
    assert bits.shape == (2, vocab_size)
    for row, (_, seed, sample, position) in enumerate(sites):
        for token in range(vocab_size):
            key = (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)
            counter = (token // 4, position, sample, (seed >> 64) & 0xFFFFFFFF)
            assert bits[row, token] == philox.philox4x32(counter, key)[token % 4]
    tokens = torch.tensor([5, 0, 36])
    assert torch.equal(philox.token_bits(torch.tensor([rows[1]] * 3), tokens), bits[1, tokens])
    assert torch.equal(philox.token_bits(torch.tensor([rows[0]] * 3), tokens), bits[0, tokens])
    lanes = philox.row_lanes(torch.tensor(rows), vocab_size)
    assert torch.equal(philox.bits_at(lanes, torch.tensor([1, 0, 1]), tokens), bits[[1, 0, 1], tokens])


def test_every_part_of_the_counter_matters() -> None:
    sites = [(seed, sample, position) for seed in (0, 1, -1, 2**33, 2**63) for sample in (0, 1) for position in (5, 6)]
    rows = torch.tensor([[*philox.words(seed), sample, position] for seed, sample, position in sites])
    assert len({tuple(row) for row in row_bits(rows, 8).tolist()}) == len(sites)
    assert len(row_bits(rows, 4096).unique()) > 0.99 * 4096 * len(sites)


def test_gumbel_is_increasing_and_accurate() -> None:
    bits = torch.tensor([0, 1, 2, 100, 2**20, 2**31, 2**32 - 2, 2**32 - 1])
    noise = philox.gumbel(bits)
    assert (noise.diff() > 0).all()
    for b, g in zip(bits.tolist(), noise.tolist(), strict=True):
        rest = (2**32 - 1 - b + 0.5) / 2**32  # 1 - u, exact
        assert g == pytest.approx(-math.log(-math.log1p(-rest)), rel=1e-14, abs=1e-14)


def test_rough_complements_are_close_enough() -> None:
    """To 1 - u, of which the bounds on a token's arrival are made; gumbel allows a thousandth."""
    edges = torch.cat([torch.arange(4096), (1 << torch.arange(32)), 2**32 - 1 - torch.arange(4096)])
    bits = torch.cat([edges, torch.randint(0, 2**32, (200_000,), generator=torch.Generator().manual_seed(1))])
    bits = bits[: len(bits) // 4 * 4]
    rough = philox.rough_complements(tuple(bits.view(1, -1, 4).unbind(2)), len(bits))[0].double()  # type: ignore[arg-type]
    exact_rest = ((bits ^ 0xFFFFFFFF).double() + 0.5) * 2.0**-32
    assert ((rough - exact_rest).abs() < 1e-6 * exact_rest).all()
    arrival = -philox.uniform(bits).log()
    assert (exact_rest <= arrival * (1 + 1e-12)).all() and (arrival <= exact_rest / philox.uniform(bits)).all()


# -- elementary functions ------------------------------------------------------------------------------------------


def test_exp_and_log_are_accurate() -> None:
    x = -torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 700
    expected = torch.tensor([math.exp(v) for v in x.tolist()], dtype=torch.float64)
    assert ((exact.exp(x) - expected).abs() / expected).max() < 2 * 2.0**-52
    y = torch.cat([expected, 1 - expected[expected < 0.5], torch.tensor([1.0, 1e-300, 1e300], dtype=torch.float64)])
    logs = torch.tensor([math.log(v) for v in y.tolist()], dtype=torch.float64)
    assert ((exact.log(y) - logs).abs() <= 2 * 2.0**-52 * logs.abs()).all()
    special = exact.exp(torch.tensor([0.0, -700.5, -torch.inf, torch.nan], dtype=torch.float64))
    assert special.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_bits_do_not_depend_on_the_neighbours() -> None:
    x = -torch.rand(7, 5003, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 50
    together = (exact.exp(x), exact.log(-x), exact.tree_sum(x), exact.prefix_sum(x))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for row in range(7):
            alone = x[row : row + 1].clone()
            for whole, one in zip(
                together,
                (exact.exp(alone), exact.log(-alone), exact.tree_sum(alone), exact.prefix_sum(alone)),
                strict=True,
            ):
                assert torch.equal(whole[row], one[0])
    assert torch.equal(exact.prefix_sum(x)[:, :1001], exact.prefix_sum(x[:, :1001]))
    assert torch.allclose(exact.prefix_sum(x), x.cumsum(1), rtol=1e-12)
    assert torch.allclose(exact.tree_sum(x), x.sum(1), rtol=1e-12)


def test_order_is_value_then_id() -> None:
    row = torch.tensor([[-0.0, 0.0, 1.5, -torch.inf, 1.5, -2.0, 3e38, 1e-40]])
    assert order.top_ids(row, 8).tolist() == [[6, 2, 4, 7, 0, 1, 5, 3]]


@pytest.mark.parametrize("vocab_size", [500, 2049, 20_000])
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_blocks_find_the_first_tokens(vocab_size: int, count: int) -> None:
    for spread in (0.3, 3.0):  # many equal values, or few
        rows = random_logits(vocab_size + count, 6, vocab_size, spread).mul_(4).round_()
        rows[5] = 0.0
        expected = [np.lexsort((np.arange(vocab_size), -row))[:count].tolist() for row in rows.numpy()]
        assert order.top_ids(rows, count).tolist() == expected
        best, at = blocks.argmax(rows, blocks.maxima(rows))
        assert (
            at.tolist() == [ids[0] for ids in order.top_ids(rows, 1).tolist()]
            and best.tolist() == rows.amax(1).tolist()
        )
        floor = rows.amax(1, keepdim=True) - 1
        found_rows, found_at = blocks.at_least(rows, blocks.maxima(rows), floor)
        assert [found_rows.tolist(), found_at.tolist()] == [c.tolist() for c in (rows >= floor).nonzero(as_tuple=True)]


# -- the oracle: plain numpy over the whole vocabulary -------------------------------------------------------------


def oracle_kept(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """Ids that may be drawn, in order, and the scaled logits of the row."""
    x = logits.astype(np.float64) / params.temperature
    ids = np.lexsort((np.arange(len(x)), -x))
    ids = ids[x[ids] - x.max() >= (math.log(params.min_p) if params.min_p else -np.inf)]
    if params.top_k > 0:
        ids = ids[: params.top_k]
    if params.top_p < 1.0:
        p = np.exp(x[ids] - x.max())
        p /= p.sum()
        ids = ids[np.cumsum(p) - p < params.top_p]
    if params.typical_p < 1.0:
        p = np.exp(x[ids] - x.max())
        p /= p.sum()
        surprise = -np.log(p, where=p > 0, out=np.full_like(p, np.inf))
        expected = (p[p > 0] * surprise[p > 0]).sum()
        nearest = np.argsort(np.abs(surprise - expected), kind="stable")
        ids = ids[nearest[np.cumsum(p[nearest]) - p[nearest] < params.typical_p]]
    return ids, x


def oracle_draw(logits: np.ndarray, new: NewRequest) -> int:
    ids, x = oracle_kept(logits, new.params)
    site = torch.tensor([[*philox.words(new.seed), new.sample, len(new.tokens)]])
    noise = philox.gumbel(row_bits(site, len(x)))[0].numpy()
    return int(ids[np.argmax(x[ids] + noise[ids])])


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 100_000},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"top_p": 0.999, "temperature": 3.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"min_p": 1e-12, "temperature": 4.0},
    {"top_k": 300, "top_p": 0.95, "min_p": 0.001, "temperature": 1.7},
    {"top_k": 7, "top_p": 0.5},
    {"typical_p": 0.5},
    {"typical_p": 0.9, "top_p": 0.95, "temperature": 1.5},
    {"typical_p": 0.3, "min_p": 0.01},
]


@pytest.mark.parametrize("vocab_size", [5, 4096, 20_001])
@pytest.mark.parametrize("spread", [0.01, 4.0])
def test_shortcuts_change_no_outcome(vocab_size: int, spread: float) -> None:
    """One mixed batch of every filter, against the whole vocabulary in numpy."""
    rounds = 1 if vocab_size > 5000 else 6
    requests = [request(seed=seed, sample=seed % 3, **params) for seed in range(rounds) for params in FILTERS]
    logits = random_logits(vocab_size, len(requests), vocab_size, spread)
    drawn = draw(logits, requests).codes_R.tolist()
    assert drawn == [oracle_draw(row, new) for row, new in zip(logits.numpy(), requests, strict=True)]


def test_only_few_take_part_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    uniform = philox.uniform
    monkeypatch.setattr(philox, "uniform", lambda bits: seen.append(bits.numel()) or uniform(bits))
    draw(random_logits(0, 8, 150_000), [request(seed=seed) for seed in range(8)])
    assert 8 <= sum(seen) < 200


@pytest.mark.parametrize("vocab_size", [5, 4097])
def test_exact_functions_decide_as_library_functions_do(monkeypatch: pytest.MonkeyPatch, vocab_size: int) -> None:
    """With every case called unclear."""
    requests = [request(seed=seed, **params) for seed in range(4) for params in FILTERS]
    logits = random_logits(13, len(requests), vocab_size)
    drawn = draw(logits, requests).codes_R.tolist()
    monkeypatch.setattr(gumbel, "MARGIN", math.inf)
    monkeypatch.setattr(candidates, "DOUBT", math.inf)
    assert draw(logits, requests).codes_R.tolist() == drawn


# -- the distribution ----------------------------------------------------------------------------------------------


def chi_square_limit(freedom: int) -> float:
    """99.99th percentile (Wilson and Hilferty 1931)."""
    return float(freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 6},
        {"top_p": 0.8},
        {"min_p": 0.15},
        {"top_k": 9, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    ],
    ids=str,
)
def test_frequencies_match_softmax(params: dict[str, Any]) -> None:
    vocab_size, batch, steps = 25, 512, 40
    logits = random_logits(11, 1, vocab_size, 1.5)
    sampler = Sampler(batch, vocab_size, CPU)
    for row in range(batch):
        sampler.place(row, request(seed=row // 2, sample=row % 2, **params))
    counts = np.zeros(vocab_size)
    for step in range(steps):
        drawn = sampler.draw(logits.repeat(batch, 1), np.arange(batch), np.full(batch, 3 + step))
        counts += np.bincount(drawn.codes_R.numpy(), minlength=vocab_size)
    ids, x = oracle_kept(logits[0].numpy(), SamplingParams(**params))
    expected = np.zeros(vocab_size)
    expected[ids] = np.exp(x[ids]) / np.exp(x[ids]).sum() * batch * steps
    assert counts[expected == 0].sum() == 0
    live = expected > 0
    assert ((counts - expected)[live] ** 2 / expected[live]).sum() < chi_square_limit(int(live.sum()) - 1)


def test_samples_and_positions_are_independent() -> None:
    """Pairs of draws of neighbouring samples, and of neighbouring positions, fall evenly on a 4 x 4 table."""
    batch = 4096
    sampler = Sampler(batch, 4, CPU)
    for row in range(batch):
        sampler.place(row, request(seed=row // 2, sample=row % 2))
    first, second = (
        sampler.draw(torch.zeros(batch, 4), np.arange(batch), np.full(batch, position)).codes_R.numpy()
        for position in (9, 10)
    )
    for a, b in ((first[::2], first[1::2]), (first, second)):
        counts = np.bincount(4 * a + b, minlength=16)
        assert ((counts - len(a) / 16) ** 2 / (len(a) / 16)).sum() < chi_square_limit(15)


# -- the edges of the filters --------------------------------------------------------------------------------------


def reachable(probabilities: Sequence[float], **params: Any) -> set[int]:
    """Tokens drawn in 3000 tries."""
    logits = torch.tensor(probabilities).log().repeat(3000, 1)
    return set(draw(logits, [request(seed=seed, **params) for seed in range(3000)]).codes_R.tolist())


def test_top_p_keeps_the_token_that_crosses() -> None:
    probabilities = [0.125, 0.5, 0.25, 0.125]
    assert reachable(probabilities, top_p=0.4) == {1}
    assert reachable(probabilities, top_p=0.51) == {1, 2}
    assert reachable(probabilities, top_p=0.8) == {0, 1, 2}  # of the equal two the lower id
    assert reachable(probabilities, top_p=0.9) == {0, 1, 2, 3}


def test_equal_values_are_cut_by_id() -> None:
    assert reachable([0.25] * 4, top_k=3) == {0, 1, 2}
    assert reachable([0.25] * 4, top_p=0.45) == {0, 1}
    assert reachable([0.25] * 4, top_p=0.5) == {0, 1}  # p is reached, exactly
    assert reachable([0.1, 0.3, 0.3, 0.3], min_p=0.5) == {1, 2, 3}


def test_top_p_is_taken_of_what_top_k_left() -> None:
    assert reachable([0.4, 0.3, 0.2, 0.1], top_k=2, top_p=0.6) == {0, 1}
    assert reachable([0.4, 0.3, 0.2, 0.1], top_k=2, top_p=0.57) == {0}


def test_greedy_takes_the_lower_of_equal_ids() -> None:
    row = torch.tensor([[1.0, 3.0, 3.0, 2.0], [-0.0, 0.0, -1.0, 0.0]])
    assert draw(row, [request(temperature=0.0), request(temperature=0.0)]).tokens_R.tolist() == [1, 0]
    for vocab_size in (7, 1000, 40_003):
        rows = random_logits(vocab_size, 5, vocab_size).round()
        drawn = draw(rows, [request(temperature=0.0)] * 5).tokens_R.tolist()
        assert drawn == np.argmax(rows.numpy(), axis=1).tolist()


# -- rows never see each other -------------------------------------------------------------------------------------

MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0, "logprobs": 3},
    {"logprobs": 0},
    {"top_p": 0.9, "logprobs": 20},
    {"top_k": 5, "top_p": 0.7},
    {"top_k": 900, "top_p": 0.99, "temperature": 2.0, "logprobs": 1},
    {"min_p": 0.05, "repetition_penalty": 1.3, "logprobs": 2},
    {"presence_penalty": 0.5, "frequency_penalty": 0.2, "logit_bias": {3: 5.0, 17: -100.0}},
    {"temperature": 0.0, "min_tokens": 5, "frequency_penalty": -0.3, "logprobs": 5},
    {"typical_p": 0.6, "logprobs": 1},
    {"typical_p": 0.8, "top_k": 300, "min_p": 0.001},
    {"dry_multiplier": 1.0, "dry_allowed_length": 1, "dry_breaker_ids": [[4]], "logprobs": 1},
    {"bad_words_ids": [[17, 30], [31]], "allowed_token_ids": range(0, 3000, 3), "top_p": 0.95},
]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_alone_and_in_any_batch(threads: int) -> None:
    torch.set_num_threads(threads)
    vocab_size = 3001
    requests = [request([5, 9, 9, 4, 17], 2, seed=i, sample=i, stop=(8, 9), **params) for i, params in enumerate(MIXED)]
    logits = random_logits(4, len(requests), vocab_size, 2.0)
    alone = [draw(logits[i : i + 1], [new]) for i, new in enumerate(requests)]
    rng = np.random.default_rng(0)
    for _ in range(10):
        at = rng.permutation(len(requests)).repeat(rng.integers(1, 4))[: rng.integers(1, 20)]
        together = draw(logits[torch.from_numpy(at)], [requests[i] for i in at], chunk=int(rng.integers(1, 30_000)))
        assert together.codes_R.tolist() == [alone[i].codes_R.item() for i in at]
        assert logprobs(together) == {r: logprobs(alone[i])[0] for r, i in enumerate(at) if alone[i].logprobs}


def test_a_cut_at_the_very_edge_of_p_ignores_how_much_was_sorted() -> None:
    """p is a quotient of two sums of the row, so that the last bit of either decides; a mate makes the sort wider."""
    rows, vocab_size, top_k = 2000, 64, 21
    logits = random_logits(12, rows, vocab_size)
    weights = exact.exp(
        logits.double().sort(dim=1, descending=True).values[:, :top_k] - logits.amax(1, keepdim=True).double()
    )
    running = exact.prefix_sum(weights)
    edge = running.gather(1, torch.arange(rows).unsqueeze(1) % (top_k - 1)) / running[:, -1:]

    def kept(top_p: torch.Tensor, mate: int) -> set[tuple[int, int]]:
        """With the last row's top_k as given."""
        one = torch.ones(rows, 1, dtype=torch.float64)
        filters = candidates.Filters(one, -torch.inf * one, torch.full((rows, 1), top_k), top_p)
        filters.top_k[-1] = mate
        found = candidates.sorted_candidates(logits, blocks.maxima(logits), filters)
        return {(r, t) for r, t in zip(found.rows_N.tolist(), found.tokens_N.tolist(), strict=True) if r < rows - 1}

    assert kept(edge, top_k) == kept(edge, 33) == kept(edge, vocab_size)
    assert kept(edge * (1 + 2.0**-50), top_k) != kept(edge * (1 - 2.0**-50), top_k)


# -- logprobs ------------------------------------------------------------------------------------------------------


def test_logprobs_are_of_the_raw_softmax() -> None:
    logits = random_logits(6, 1, 500)
    drawn = draw(logits, [request(seed=1, temperature=3.0, logprobs=4, logit_bias={7: 100.0}, top_k=1)])
    found = logprobs(drawn)[0]
    expected = torch.log_softmax(logits[0].double(), 0)
    assert drawn.tokens_R.tolist() == [7]
    assert found.drawn == pytest.approx(expected[7].item(), abs=1e-12)
    assert found.rank == 1 + (expected > expected[7]).sum()
    ids = expected.argsort(descending=True)[:4]
    assert [token for token, _ in found.top] == ids.tolist()
    assert [value for _, value in found.top] == pytest.approx(expected[ids].tolist(), abs=1e-12)


def test_logprob_ties_go_by_id() -> None:
    row = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    new = request(temperature=0.0, logprobs=2, logit_bias={3: 1.0})
    entry = logprobs(draw(row, [new]))[0]
    assert entry.rank == 3 and [token for token, _ in entry.top] == [1, 2]


def test_logprobs_may_ask_for_more_than_the_vocabulary() -> None:
    found = logprobs(draw(torch.zeros(2, 3), [request(logprobs=8), request(logprobs=0)]))
    assert [len(entry.top) for entry in found.values()] == [3, 0]


# -- rows that cannot be drawn -------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.9}, {"min_p": 0.1, "logprobs": 2}], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_with_bad_logits_fails_alone(params: dict[str, Any], value: float) -> None:
    logits = random_logits(8, 3, 300)
    requests = [request(seed=seed, **params) for seed in range(3)]
    expected = draw(logits, requests)
    logits[1, 17] = value
    drawn = draw(logits, requests)
    assert drawn.codes_R.tolist() == [expected.codes_R[0], NUMERICAL, expected.codes_R[2]]
    assert drawn.tokens_R[1] == 0
    assert draw_error(NUMERICAL, 3).code == "numerical_error"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}], ids=str)
def test_a_row_with_every_token_masked_fails_alone(temperature: float, filters: dict[str, Any]) -> None:
    requests = [
        request(stop=range(6), temperature=temperature, min_tokens=4, **filters),
        request(stop=range(5), temperature=temperature, min_tokens=4, **filters),
    ]
    assert draw(torch.zeros(2, 6), requests).codes_R.tolist() == [MASKED, 5]
    assert draw_error(MASKED, 3).code == "no_token_left"
