"""Checkpoint -> model folder in the Hugging Face layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors import safe_open

from penstock.train.model import Llama, save_hf_weights
from penstock.train.recipe import Recipe
from penstock.train.tokenizer import EOS, IM_END, PAD, load_tokenizer, special_id


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def export(recipe: Recipe, work: Path, run: Path, out: Path) -> None:
    """Write config, generation config, bfloat16 weights and tokenizer files into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    model = Llama(recipe.model)
    with safe_open(run / "checkpoint.safetensors", framework="pt") as file:
        model.load_state_dict({k: file.get_tensor(f"model.{k}") for k in model.state_dict()})
    tokenizer = load_tokenizer(work)
    eos, pad = special_id(tokenizer, EOS), special_id(tokenizer, PAD)
    _write_json(out / "config.json", recipe.model.to_hf(eos, eos, pad))
    _write_json(
        out / "generation_config.json",
        {
            "bos_token_id": eos,
            "eos_token_id": [eos, special_id(tokenizer, IM_END)],  # a turn of a chat ends too
            "pad_token_id": pad,
            "do_sample": True,
            "temperature": 0.8,
            "top_p": 0.95,
        },
    )
    part = out / "model.safetensors.part"
    save_hf_weights(model, part)
    part.chmod(0o644)  # safetensors writes files that only their owner may read
    part.replace(out / "model.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(work / name, out / name)
