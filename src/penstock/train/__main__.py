"""Command line: ``python -m penstock.train prepare | chat | run | export | score``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from penstock.train.chat import CHAT_FILE
from penstock.train.data import Chunks, read_ids
from penstock.train.evaluate import score_text
from penstock.train.export import export
from penstock.train.loop import ClockBudget, StepBudget, Trainer, Validation, run
from penstock.train.model import load_hf
from penstock.train.prepare import add_chat, prepare
from penstock.train.recipe import Recipe, load_recipe
from penstock.train.tokenizer import load_tokenizer


def build_trainer(recipe: Recipe, work: Path, device: str = "cpu") -> Trainer:
    """Build a trainer on the ids files of a prepared work folder."""
    train = recipe.train
    streams = tuple(read_ids(work / f"{name}.ids") for name, _ in recipe.data.sources)
    data = Chunks(streams, tuple(repeat for _, repeat in recipe.data.sources), train.chunk, train.seed)
    chat = Chunks((read_ids(work / CHAT_FILE),), (1,), train.chunk, train.seed) if recipe.chat else None
    return Trainer(recipe, data, chat=chat, device=torch.device(device))


def run_command(args: argparse.Namespace) -> None:
    """Train, or go on from the last checkpoint of the run folder."""
    recipe, folder = load_recipe(args.recipe), args.run or args.work
    folder.mkdir(parents=True, exist_ok=True)
    trainer = build_trainer(recipe, args.work, args.device)
    checkpoint = folder / "checkpoint.safetensors"
    if checkpoint.exists():
        trainer.resume(checkpoint)
    elif args.model:
        trainer.go_on_from(load_hf(args.model), args.done, args.done / args.steps)
    if args.compile:
        trainer.model.fuse()
    budget = StepBudget(args.steps) if args.steps else ClockBudget(folder / "control.txt")
    text_bytes = len((args.work / "validation.txt").read_bytes())
    validation = Validation(read_ids(args.work / "validation.ids").tolist(), text_bytes)
    run(trainer, budget, folder, validation)


def score_command(args: argparse.Namespace) -> None:
    """Print bits per byte of text files, float32 arithmetic on the exported weights."""
    model, tokenizer = load_hf(args.model), load_tokenizer(args.model)
    for path in args.text:
        score = score_text(model, tokenizer, path.read_text("utf-8"))
        print(f"{path.name}: {score.bits_per_byte:.4f} bits per byte, {score.tokens} tokens, {score.text_bytes} bytes")


def parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    top = argparse.ArgumentParser(prog="python -m penstock.train", description=__doc__)
    top.add_argument("--threads", type=int, default=1, help="compute threads (default 1)")
    sub = top.add_subparsers(dest="command", required=True)
    one = sub.add_parser("prepare", help="tokenizer and token ids from a corpus folder")
    chat = sub.add_parser("chat", help="add the chat stream to a prepared work folder")
    for command in (one, chat):
        command.add_argument("--corpus", type=Path, help="not needed for a recipe without sources")
    two = sub.add_parser("run", help="train until the budget is spent")
    two.add_argument("--run", type=Path, help="folder of this run (default: the work folder)")
    two.add_argument("--steps", type=int, help="total steps; without it control.txt says the end")
    two.add_argument("--model", type=Path, help="start from this folder's weights, made by --done of the --steps")
    two.add_argument("--done", type=int, default=0, help="steps behind --model (default 0)")
    two.add_argument("--compile", action="store_true", help="fuse with TorchInductor (needs g++)")
    two.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    three = sub.add_parser("export", help="write the model folder from the last checkpoint")
    three.add_argument("--run", type=Path)
    three.add_argument("--out", type=Path, required=True)
    for command in (one, chat, two, three):
        command.add_argument("--recipe", type=Path, required=True)
        command.add_argument("--work", type=Path, required=True)
    four = sub.add_parser("score", help="bits per byte of text files")
    four.add_argument("--model", type=Path, required=True)
    four.add_argument("text", type=Path, nargs="+")
    return top


def main() -> None:
    """Run the command named on the command line."""
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    if args.command == "prepare":
        print(prepare(load_recipe(args.recipe), args.corpus, args.work))
    elif args.command == "chat":
        print(f"{add_chat(load_recipe(args.recipe), args.corpus, args.work)} tokens")
    elif args.command == "run":
        run_command(args)
    elif args.command == "export":
        export(load_recipe(args.recipe), args.work, args.run or args.work, args.out)
    else:
        score_command(args)


if __name__ == "__main__":
    main()
