"""Progress on disk: one safetensors file, which is replaced as a whole. No pickle."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

KIND = "flwr-cloned-kd checkpoint"
FORMAT = 1

Tensors = dict[str, Tensor]
Header = dict[str, Any]


class Damaged(ValueError):
    """The file differs from what was written; the previous file may be intact."""


def previous(path: Path) -> Path:
    """Return the path of the file before the newest one."""
    return path.with_name(path.name + ".previous")


def write(path: Path, tensors: Mapping[str, Tensor], header: Header) -> str:
    """Replace a checkpoint and keep the one before it; safe against a kill at any instant.

    Returns:
        The SHA-256 of the content, in hexadecimal digits.

    Raises:
        OSError, SafetensorError: if the file cannot be written; then the old file is unchanged.
    """
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # safetensors sorts the tensors, but a NumPyClient identifies them by their order.
    text = json.dumps({"order": list(copies), "header": header})
    sha256 = digest(copies, text)
    metadata = {"kind": KIND, "format": str(FORMAT), "header": text, "sha256": sha256}
    part = path.with_name(path.name + ".part")
    save_file(copies, part, metadata)
    _sync(part)
    if path.exists():
        # The old file gets a second name first, so that one complete file exists at every instant.
        link = path.with_name(path.name + ".link")
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
            os.replace(link, previous(path))
        except OSError:  # a file system without hard links
            os.replace(path, previous(path))
    os.replace(part, path)
    _sync(path.parent)
    return sha256


def read(path: Path, sha256: str | None = None) -> tuple[Tensors, Header]:
    """Read a checkpoint and check that every bit of it is what was written.

    Args:
        sha256: what `write` returned, to accept no other content; None accepts any.

    Raises:
        Damaged: if the file is truncated, altered or not a safetensors file.
        ValueError: if it is a folder, another safetensors file, or of a newer format.
    """
    metadata = _metadata(path)
    if metadata.get("kind") != KIND:
        raise ValueError(f"{path}: expected a {KIND}, got another kind of safetensors file")
    if metadata.get("format") != str(FORMAT):
        version = str(metadata.get("format"))[:20]
        raise ValueError(f"{path}: expected checkpoint format {FORMAT}, got {version}")
    try:
        tensors = load_file(path)
        text = metadata["header"]
        content = json.loads(text)
        tensors = {name: tensors[name] for name in content["order"]}
        header = content["header"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{path}: expected tensors and a header, got {error!r}") from None
    if metadata.get("sha256") != digest(tensors, text):
        raise Damaged(f"{path}: expected the content's own sha256, got another: it was altered")
    if sha256 not in (None, metadata["sha256"]):
        raise Damaged(f"{path}: expected the content {sha256}, got {metadata['sha256']}")
    return tensors, header


def newest(path: Path) -> tuple[Tensors, Header, str] | None:
    """Read the newest intact checkpoint; None without any file.

    If the newest file is damaged and the previous one is intact, the newest file is renamed: its
    name gets the suffix `.damaged`.

    Returns:
        Tensors, header, and the reason for reading the previous file, "" for the newest file.

    Raises:
        ValueError: if no file can be used; the message names the file.
    """
    before = previous(path)
    if not path.exists() and not before.exists():
        return None
    try:
        if path.exists():
            return *read(path), ""
        cause = f"{path}: expected a file, got none"
    except Damaged as damage:
        if not before.exists():
            raise
        cause = str(damage)
    tensors, header = read(before)
    if path.exists():
        # Otherwise the next write would keep the damaged file as the previous one.
        os.replace(path, path.with_name(path.name + ".damaged"))
    return tensors, header, cause


def digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """Hash a text and the names, types, shapes and bits of all tensors."""
    sha256 = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha256.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        if tensor.numel():
            sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; `safe_open` checks its header and its size."""
    if path.is_dir():
        raise ValueError(f"{path}: expected a {KIND}, got a folder")
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise Damaged(f"{path}: expected a {KIND}, got {error}") from None


def _sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows cannot open a folder
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is either complete or not there."""
    part = path.with_suffix(path.suffix + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
