"""A checkpoint's files as small as can be, for tests that need no learner."""

from __future__ import annotations

from pathlib import Path

from cluster.contracts.durable import FileDigest, digests_below

FILES = {
    "policy/config.json": b'{"model_type": "tiny"}\n',
    "policy/model.safetensors": b"\x00weights",
    "policy/tokenizer.json": b"{}\n",
    "optimizer_policy.safetensors": b"moments",
    "rng.safetensors": b"random",
    "trainer.json": b'{"version": 1}\n',
}


def write_checkpoint(folder: Path, weights: str = "") -> tuple[FileDigest, ...]:
    """`weights`: what tells this one from others."""
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content + weights.encode())
    return digests_below(folder)
