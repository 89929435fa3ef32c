"""The trainer: its arithmetic against transformers, its learning, its resuming, and what it must never read.

Shape legend: B batch, T positions, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from penstock.train.arithmetic import Problem, all_problems, extract_answer, split_problems
from penstock.train.chat import CHAT_FILE, chat_talks, encode_conversations, render
from penstock.train.data import Book, Chunks, read_books, read_ids, split_rows
from penstock.train.dialogue import LONGEST, MOST_TURNS, scenes, utterance
from penstock.train.evaluate import score_ids, score_text, window_starts
from penstock.train.export import export
from penstock.train.loop import ClockBudget, Position, StepBudget, Trainer, run
from penstock.train.model import Llama, ModelConfig, load_hf
from penstock.train.optim import orthogonalize
from penstock.train.prepare import add_chat, prepare
from penstock.train.recipe import ChatConfig, Recipe, load_recipe, parse_recipe
from penstock.train.tokenizer import (
    CHAT_TEMPLATE,
    EOS,
    IM_END,
    SPECIAL_TOKENS,
    load_tokenizer,
    special_id,
    train_tokenizer,
)

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
RECIPE = RECIPES / "tiny" / "recipe.toml"
SMALL = ModelConfig(
    vocab_size=400,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=192,
)
HELD_OUT = "The Hidden Book"


def small_recipe(**train: object) -> Recipe:
    """The shipped recipe with a model and steps that take milliseconds."""
    recipe = load_recipe(RECIPE)
    changes = {"chunk": 64, "chunks_per_step": 4, "lengths": ((0.0, 32), (0.6, 64)), "warmup_steps": 2} | train
    data = dataclasses.replace(recipe.data, held_out=(HELD_OUT,), validation_books=("Book 1",))
    return Recipe(data, SMALL, dataclasses.replace(recipe.train, **changes))  # type: ignore[arg-type]


def toy_data(seed: int = 3) -> Chunks:
    """Two streams with a pattern that a small model learns quickly."""
    rng = np.random.default_rng(seed)
    streams = tuple((np.cumsum(rng.integers(1, 3, size)) % 50).astype(np.uint16) for size in (1500, 3000))
    return Chunks(streams, (2, 1), chunk=64, seed=seed)


def small_trainer(steps: int = 12) -> tuple[Trainer, StepBudget]:
    return Trainer(small_recipe(), toy_data(), torch.float32), StepBudget(steps)


def sentences(rng: random.Random, count: int, words: list[str]) -> str:
    return "\n\n".join(" ".join(rng.choices(words, k=12)).capitalize() + "." for _ in range(count))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three children's books, one of them to be held out and with words of its own, and one of fiction."""
    rng = random.Random(5)
    plain, own = ["garden", "robin", "key", "and", "the", "ran"], ["zyxomma", "quagga", "xylem", "vizier"]
    children = {"Book 1": plain, HELD_OUT: own, "Book 2": plain}
    for name, books in {"children": children, "fiction": {"Book 3": [*plain, "moor"]}}.items():
        texts = [sentences(rng, 60, words) for words in books.values()]
        rows = [f"Some Author/{title}.md\t{len(text)}" for title, text in zip(books, texts, strict=True)]
        (tmp_path / f"{name}.txt").write_text(f"\n{EOS}\n".join(texts), "utf-8")
        (tmp_path / f"{name}_books.tsv").write_text("\n".join(rows), "utf-8")
    return tmp_path


# -- the model -----------------------------------------------------------------------------------------------------


def randomized() -> Llama:
    model = Llama(SMALL)
    model.init_weights(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    return model


def test_logits_equal_transformers() -> None:
    model = randomized()
    config = transformers.LlamaConfig(**{k: v for k, v in SMALL.to_hf(0, 0, 3).items() if k != "architectures"})
    config._attn_implementation = "eager"
    theirs = transformers.LlamaForCausalLM(config).eval()
    missing = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    theirs.tie_weights()
    # 150 positions: two query blocks, the second not full.
    ids_BT = torch.randint(SMALL.vocab_size, (2, 150), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        ours_BTV, theirs_BTV = model(ids_BT), theirs(ids_BT).logits
    assert (ours_BTV - theirs_BTV).abs().max() < 2e-5 * theirs_BTV.abs().max()


def test_chunked_loss_has_the_gradients_of_cross_entropy() -> None:
    model, plain = randomized(), randomized()
    ids_BT = torch.randint(SMALL.vocab_size, (9, 65), generator=torch.Generator().manual_seed(2))
    x_BT, y_BT = ids_BT[:, :-1], ids_BT[:, 1:]
    ours = model.loss(x_BT, y_BT)
    theirs = F.cross_entropy(plain(x_BT).flatten(0, 1), y_BT.flatten())
    (2.0 * ours).backward()
    (2.0 * theirs).backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert (p.grad - q.grad).norm() < 1e-4 * q.grad.norm(), name


def test_exported_folder_loads_in_transformers(corpus: Path, tmp_path: Path) -> None:
    recipe, work, out = small_recipe(), tmp_path / "work", tmp_path / "out"
    prepare(recipe, corpus, work)
    trainer = Trainer(recipe, toy_data())
    trainer.save(work / "checkpoint.safetensors")
    export(recipe, work, work, out)
    theirs = transformers.LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids_BT = torch.tensor([tokenizer.encode("The robin ran.")])
    assert tokenizer.decode(ids_BT[0]) == "The robin ran."
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 3)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    with torch.no_grad():
        error = (theirs(ids_BT).logits - load_hf(out)(ids_BT)).abs().max()
    assert error < 1e-5


def test_shipped_sizes_are_those_of_the_recipe() -> None:
    config = load_recipe(RECIPE).model
    assert config == ModelConfig()
    assert sum(p.numel() for p in Llama(config).parameters()) == 11_015_040
    nano = load_recipe(RECIPES / "nano" / "recipe.toml")
    assert dataclasses.replace(nano, model=config) == load_recipe(RECIPE)
    assert sum(p.numel() for p in Llama(nano.model).parameters()) == 2_819_840


# -- optimiser and loop -----------------------------------------------------------------------------------------------


def test_orthogonalize_brings_singular_values_near_one() -> None:
    matrix_GRS = torch.randn(3, 64, 24, generator=torch.Generator().manual_seed(1))
    singular = torch.linalg.svdvals(orthogonalize(matrix_GRS).float())
    assert singular.min() > 0.5
    assert singular.max() < 1.5


def test_loss_goes_down(tmp_path: Path) -> None:
    trainer, budget = small_trainer(30)
    run(trainer, budget, tmp_path)
    rows = [line.split(",") for line in (tmp_path / "curve.csv").read_text("utf-8").splitlines()[1:]]
    first, last = float(rows[0][6]), float(rows[-1][6])
    assert last < 0.7 * first < math.log(SMALL.vocab_size)
    assert last > 0.5  # each step of the walk is a fair coin: ln 2 is the floor
    assert (tmp_path / "checkpoint.safetensors").exists()


def test_a_resumed_run_repeats_the_losses_exactly(tmp_path: Path) -> None:
    trainer, budget = small_trainer()
    losses, checkpoint = [], tmp_path / "checkpoint.safetensors"
    for step in range(12):
        if step == 5:
            trainer.save(checkpoint)
        losses.append(trainer.step()[0])
        trainer.position.progress = budget.advance(trainer.position, 1.0)
    again, _ = small_trainer()
    again.resume(checkpoint)
    assert again.position.step == 5
    for step in range(5, 12):
        assert again.step()[0] == losses[step]
        again.position.progress = budget.advance(again.position, 1.0)


CHAT_STAGE = ChatConfig(from_progress=0.5, share=0.5, arithmetic=0.15)


def chat_trainer() -> Trainer:
    """Books say ids below 52, the chat stream ids from 60 on."""
    chat = Chunks(((np.arange(900) % 40 + 60).astype(np.uint16),), (1,), chunk=64, seed=3)
    return Trainer(dataclasses.replace(small_recipe(), chat=CHAT_STAGE), toy_data(), torch.float32, chat)


def take_steps(trainer: Trainer, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        losses.append(trainer.step()[0])
        trainer.position.progress = StepBudget(12).advance(trainer.position, 1.0)
    return losses


def test_half_of_the_chunks_of_the_chat_stage_are_chat() -> None:
    trainer = chat_trainer()
    take_steps(trainer, 6)
    assert (trainer.position.chunks, trainer.position.chat_chunks) == (24, 0)
    chunks_CT = trainer._next_chunks()
    assert ((chunks_CT >= 60).all(axis=1) == [False, False, True, True]).all()
    assert (trainer.position.chunks, trainer.position.chat_chunks) == (26, 2)
    with pytest.raises(ValueError, match="no chat stream"):
        Trainer(dataclasses.replace(small_recipe(), chat=CHAT_STAGE), toy_data(), torch.float32)


def test_a_run_resumed_in_the_chat_stage_repeats_the_losses_exactly(tmp_path: Path) -> None:
    trainer, again = chat_trainer(), chat_trainer()
    take_steps(trainer, 8)
    trainer.save(tmp_path / "c.safetensors")
    losses = take_steps(trainer, 4)
    again.resume(tmp_path / "c.safetensors")
    assert again.position.chat_chunks == 4
    assert take_steps(again, 4) == losses


def test_a_checkpoint_from_before_the_chat_stage_goes_on_with_the_same_data(tmp_path: Path) -> None:
    trainer, (plain, _) = chat_trainer(), small_trainer()
    losses = take_steps(plain, 2)
    plain.save(tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        position = json.loads(file.metadata()["position"])
    del position["chat_chunks"]  # as it was written then
    save_file(tensors, tmp_path / "old.safetensors", metadata={"position": json.dumps(position)})
    losses += take_steps(plain, 4)  # up to the chat stage
    trainer.resume(tmp_path / "old.safetensors")
    assert take_steps(trainer, 4) == losses[2:]
    assert trainer.position == plain.position


def test_schedule() -> None:
    cfg = small_recipe(warmup_steps=4, decay_from=0.5).train
    assert [cfg.lr_scale(step, 0.0) for step in (0, 3, 9)] == [0.25, 1.0, 1.0]
    assert [cfg.lr_scale(9, p) for p in (0.5, 0.75, 1.0)] == [1.0, 0.5, 0.0]
    assert [cfg.row_length(p) for p in (0.0, 0.59, 0.6)] == [32, 32, 64]


def test_clock_budget_ends_when_the_time_is_up(tmp_path: Path) -> None:
    control = tmp_path / "control.txt"
    control.write_text("end_at: 00:00\n", "utf-8")
    budget = ClockBudget(control)
    now = budget.end
    left = 100.0
    position = Position(step=1)
    budget.end = now.fromtimestamp(now.now(now.tzinfo).timestamp() + left, now.tzinfo)
    # A tenth of what is left goes to a step a ninth as long as the rest; a finished clock ends the run.
    assert budget.advance(position, left / 9) == pytest.approx(0.1, abs=0.01)
    budget.end = now.fromtimestamp(0, now.tzinfo)
    assert budget.advance(position, 1.0) == 1.0


# -- data -------------------------------------------------------------------------------------------------------------


def test_an_epoch_reads_every_chunk_as_often_as_said() -> None:
    data = toy_data()
    order = data.epoch_order(0)
    assert len(order) == data.per_epoch
    assert [int((order[:, 0] == stream).sum()) for stream in (0, 1)] == [2 * 22, 45]
    for stream, ids in enumerate(data.streams):
        starts = np.sort(order[order[:, 0] == stream, 1])
        assert len(set(starts.tolist())) == len(starts)
        assert starts[-1] + data.chunk < len(ids)
    batches = data.batches(data.per_epoch - 2, 4)  # across the end of an epoch
    first, second = next(batches), next(batches)
    np.testing.assert_array_equal(next(data.batches(data.per_epoch + 2, 4)), second)
    x_BT, y_BT = split_rows(first, 32)
    assert x_BT.shape == (8, 32)
    np.testing.assert_array_equal(x_BT[1, 1:], y_BT[1, :-1])
    assert y_BT[0, -1] == x_BT[1, 0]


def test_held_out_books_are_in_neither_ids_nor_tokenizer(corpus: Path, tmp_path: Path) -> None:
    recipe, work = small_recipe(), tmp_path / "work"
    report = prepare(recipe, corpus, work)
    tokenizer = load_tokenizer(work)
    for name in ("children", "fiction", "validation"):
        text = tokenizer.decode(read_ids(work / f"{name}.ids").tolist())
        assert "robin" in text
        for word in ("zyxomma", "quagga", "xylem", "vizier"):
            assert word not in text.lower()
    assert "robin" in (training := (work / "training.txt").read_text("utf-8"))
    assert "zyxomma" not in training.lower()
    # A word that the tokenizer had seen 100 times would be one token.
    assert len(tokenizer.encode(" garden").ids) == 1
    assert len(tokenizer.encode(" zyxomma").ids) > 4
    held = (work / f"{HELD_OUT}.txt").read_text("utf-8")
    assert report["held_out_bytes"] == {HELD_OUT: len(held)}


def test_another_edition_of_a_held_out_book_is_refused(corpus: Path, tmp_path: Path) -> None:
    text = "\n\n".join(["This sentence is long enough to be that of one book alone. " * 3] * 20)
    for name in ("children", "fiction"):
        titles = [HELD_OUT, "Book 1"] if name == "children" else ["The Hidden Book, Illustrated"]
        (corpus / f"{name}.txt").write_text(f"\n{EOS}\n".join([text] * len(titles)), "utf-8")
        (corpus / f"{name}_books.tsv").write_text("\n".join(f"A/{t}.md\t{len(text)}" for t in titles), "utf-8")
    with pytest.raises(ValueError, match="long lines of held-out books"):
        prepare(small_recipe(), corpus, tmp_path / "work")


def test_a_list_that_does_not_match_its_texts_is_refused(corpus: Path) -> None:
    rows = (corpus / "children_books.tsv").read_text("utf-8").splitlines()
    (corpus / "children_books.tsv").write_text("\n".join([rows[0], rows[1] + "9", rows[2]]), "utf-8")
    with pytest.raises(ValueError, match=HELD_OUT):
        read_books(corpus, "children")


def test_tokenizer_round_trips_and_has_the_size_asked_for() -> None:
    rng = random.Random(1)
    tokenizer = train_tokenizer([sentences(rng, 50, ["robin", "Mary", "don't", "42", "moor"])], 290)
    assert tokenizer.get_vocab_size() <= 290
    assert [special_id(tokenizer, t) for t in SPECIAL_TOKENS] == list(range(8))
    for text in ("Mary's robin: \"don't!\"\n\n  1911 – café 🐦\r\n", " \n a\t", EOS):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


# -- the chat stream --------------------------------------------------------------------------------------------------


def test_an_utterance_is_what_stands_between_the_marks() -> None:
    assert utterance('"Come," said he, "look here."') == "Come, look here."
    assert utterance('"I see," said he. "And you?"') == "I see. And you?"
    assert utterance('"I see," said he.') == "I see."
    assert utterance('"And so it goes on in the next paragraph.') is None
    assert utterance('He said, "No."') is None
    assert utterance('"' + "a" * LONGEST + '"') is not None
    assert utterance('"' + "a" * (LONGEST + 1) + '"') is None
    assert utterance('""') is None


def test_a_scene_is_an_even_number_of_utterances_in_a_row() -> None:
    lines = ['"One."', "", '"Two."', '"Three," he said.', "It rained.", '"Alone."', "", "It rained.", '"A."', '"B."']
    assert list(scenes("\n".join(lines))) == [("One.", "Two."), ("A.", "B.")]
    many = "\n".join(f'"{i}."' for i in range(MOST_TURNS + 3))
    assert [len(turns) for turns in scenes(many)] == [MOST_TURNS, 2]


def test_problems_and_answers() -> None:
    assert (Problem(17, "+", 25).question, Problem(17, "+", 25).answer) == ("What is 17 + 25?", "42")
    assert [p.answer for p in (Problem(42, "-", 17), Problem(7, "*", 12))] == ["25", "84"]
    training, held_out = split_problems()
    assert sorted(map(str, training + held_out)) == sorted(map(str, all_problems()))
    assert not {p.pair for p in training} & {p.pair for p in held_out}
    assert len(held_out) > 500
    assert [extract_answer(t) for t in ("It is 042.", "-7", "17 + 25 = 42", "I do not know")] == [
        "42",
        "-7",
        "42",
        None,
    ]


def test_conversations_are_written_as_the_chat_template_writes_them() -> None:
    turns = ("What is 17 + 25?", "42", "Thanks.", "Not at all.")
    tokenizer = train_tokenizer(["user assistant What is 17 + 25?"], 290)
    messages = [{"role": ("user", "assistant")[i % 2], "content": said} for i, said in enumerate(turns)]
    template = jinja2.Template(CHAT_TEMPLATE, keep_trailing_newline=True)
    assert render(turns) == template.render(messages=messages)
    assert render(turns).startswith(template.render(messages=messages[:1], add_generation_prompt=True))
    ids = encode_conversations(tokenizer, [turns, turns[:2]]).tolist()
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"{EOS}{render(turns)}{EOS}{render(turns[:2])}{EOS}"
    assert ids.count(special_id(tokenizer, IM_END)) == 6


def test_the_chat_stream_has_the_share_of_sums_asked_for() -> None:
    tokenizer = train_tokenizer(["user assistant What is 17 + 25?"], 290)
    books = [Book("a", "\n".join(f'"Did you see the {i} robins?"\n"I did," said she.\nSo.' for i in range(300)))]
    talks = chat_talks(tokenizer, books, 0.15, seed=1)
    sums = [turns for turns in talks if turns[0].startswith("What is")]
    share = len(encode_conversations(tokenizer, sums)) / len(encode_conversations(tokenizer, talks))
    assert share == pytest.approx(0.15, abs=0.01)
    assert talks == chat_talks(tokenizer, books, 0.15, seed=1)
    held_out = {p.question for p in split_problems()[1]}
    assert not held_out & {turns[0] for turns in chat_talks(tokenizer, [], 1.0, seed=1)}


def test_the_chat_stream_is_added_beside_what_is_there(corpus: Path, tmp_path: Path) -> None:
    for name, words in (("children", ("kept", "zyxomma", "kept")), ("fiction", ("kept",))):
        texts = [f'"It is {word}."\n\n"So it is," said he.\n\n' + "The robin ran.\n\n" * 99 for word in words]
        rows = (corpus / f"{name}_books.tsv").read_text("utf-8").splitlines()
        titles = [row.partition("\t")[0] for row in rows]
        sizes = [f"{title}\t{len(text)}" for title, text in zip(titles, texts, strict=True)]
        (corpus / f"{name}.txt").write_text(f"\n{EOS}\n".join(texts), "utf-8")
        (corpus / f"{name}_books.tsv").write_text("\n".join(sizes), "utf-8")
    recipe, work = small_recipe(), tmp_path / "work"
    prepare(recipe, corpus, work)
    before = {path.name: path.read_bytes() for path in work.iterdir()}
    assert CHAT_FILE not in before
    chat = dataclasses.replace(recipe, chat=CHAT_STAGE)
    tokens = add_chat(chat, corpus, work)
    after = {path.name: path.read_bytes() for path in work.iterdir()}
    added = after.pop(CHAT_FILE)
    assert after == before
    assert len(added) == 2 * tokens
    text = load_tokenizer(work).decode(read_ids(work / CHAT_FILE).tolist())
    assert "It is kept." in text
    assert "zyxomma" not in text
    assert prepare(chat, corpus, tmp_path / "again")["chat_tokens"] == tokens
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}[CHAT_FILE] == added


# -- the score --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5, 16, 17, 24, 25, 100, 103])
def test_every_token_is_scored_once(count: int) -> None:
    window, stride = 16, 8
    seen = []
    for start in window_starts(count, window, stride):
        fresh = 0 if start == 0 else window - stride
        seen += range(start + fresh, min(start + window, count))
    assert seen == list(range(count))


def test_score_is_the_sum_of_conditional_log_probabilities() -> None:
    model = randomized()
    ids = torch.randint(SMALL.vocab_size, (1, 101), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        log_BTV = model(ids[:, :-1]).log_softmax(-1)
    exact = -log_BTV.gather(2, ids[:, 1:, None]).sum().item()
    assert score_ids(model, ids[0].tolist(), window=128, stride=64) == pytest.approx(exact, rel=1e-5)
    short = score_ids(model, ids[0].tolist(), window=24, stride=8)
    assert short == pytest.approx(exact, rel=0.2)
    assert short != pytest.approx(exact, rel=1e-5)


def test_bits_per_byte_of_a_uniform_model() -> None:
    tokenizer = train_tokenizer(["the robin ran to the key"], 290)
    model = Llama(dataclasses.replace(SMALL, vocab_size=290))
    for p in model.parameters():
        p.data.zero_()
    text = "the robin – ran"
    score = score_text(model, tokenizer, text, window=8, stride=4)
    assert score.bits_per_byte == pytest.approx(score.tokens * math.log2(290) / len(text.encode("utf-8")))


def test_recipe_refuses_unknown_fields() -> None:
    raw = {"data": {"sources": []}, "model": {}, "train": {"learning_rate": 1}}
    with pytest.raises(TypeError):
        parse_recipe(raw)
    assert json.dumps(dataclasses.asdict(load_recipe(RECIPE)))
    assert Book("a", "b").title == "a"
