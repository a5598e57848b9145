"""Progress on disk: one safetensors file that is there whole or not at all. No pickle."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

KIND = "flwr-cloned-kd checkpoint"
FORMAT = 1
LONGEST_HEADER_BYTES = 2**30

Tensors = dict[str, Tensor]
Header = dict[str, Any]


class Damaged(ValueError):
    """The file is not what was written; an older one may be."""


def previous(path: Path) -> Path:
    """Return where the file before the newest is kept."""
    return path.with_name(path.name + ".previous")


def write(path: Path, tensors: Mapping[str, Tensor], header: Header) -> None:
    """Replace a checkpoint, keeping the one before it; safe against a kill at any instant.

    Raises:
        OSError, SafetensorError: if the disk does not take it; then the old file is still there.
    """
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    # The format sorts the tensors; but a model's order is what a NumPyClient goes by.
    text = json.dumps({"order": list(own), "header": header})
    metadata = {"kind": KIND, "format": str(FORMAT), "header": text, "sha256": digest(own, text)}
    part, link = (path.with_name(path.name + suffix) for suffix in (".part", ".link"))
    save_file(own, part, metadata)
    _sync(part)
    if path.exists():
        # A second name for the old file, so that at no instant there is none.
        link.unlink(missing_ok=True)
        try:
            os.link(path, link)
            os.replace(link, previous(path))
        except OSError:  # a file system without hard links
            os.replace(path, previous(path))
    os.replace(part, path)
    _sync(path.parent)


def read(path: Path) -> tuple[Tensors, Header]:
    """Read a checkpoint and check that every bit of it is what was written.

    Raises:
        Damaged: if the file is truncated, altered or no checkpoint at all.
        ValueError: if it is some other safetensors file, or of a newer format.
    """
    metadata, num_bytes = _metadata(path)
    if metadata.get("kind") != KIND:
        raise ValueError(f"{path}: expected a {KIND}, got another kind of safetensors file")
    if metadata.get("format") != str(FORMAT):
        found = str(metadata.get("format"))[:20]
        raise ValueError(f"{path}: expected checkpoint format {FORMAT}, got {found}")
    if path.stat().st_size != num_bytes:
        found = f"got {path.stat().st_size}: it is truncated or was appended to"
        raise Damaged(f"{path}: expected {num_bytes} bytes, {found}")
    try:
        tensors, text = load_file(path), metadata["header"]
        content = json.loads(text)
        tensors = {name: tensors[name] for name in content["order"]}
        header = content["header"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise Damaged(f"{path}: expected tensors and a header, got {error!r}") from None
    if metadata.get("sha256") != digest(tensors, text):
        raise Damaged(f"{path}: expected the content's own sha256, got another: it was altered")
    return tensors, header


def newest(path: Path) -> tuple[Tensors, Header, str] | None:
    """Read the newest good checkpoint; None if there is none at all.

    A damaged newest file is set aside under the name `.damaged`, if the previous one is good.

    Returns:
        Tensors, header, and why it is the previous file, "" if it is not.

    Raises:
        ValueError: saying which file, what was expected and what was found.
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
    found = read(before)
    if path.exists():
        # Else the next write would keep the damaged one as the previous.
        os.replace(path, path.with_name(path.name + ".damaged"))
    return *found, cause


def digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """Hash names, types, shapes and bits of all tensors, and the header."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        if tensor.numel():
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _metadata(path: Path) -> tuple[dict[str, str], int]:
    """Return the metadata of a safetensors file, and how many bytes it says to have."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        text = file.read(size) if size <= LONGEST_HEADER_BYTES else b""
    try:
        content = json.loads(text)
        metadata = content.pop("__metadata__", {})
        end = max((entry["data_offsets"][1] for entry in content.values()), default=0)
        return dict(metadata), 8 + size + int(end)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        found = f"{path.stat().st_size} bytes without a readable header"
        raise Damaged(f"{path}: expected a {KIND}, got {found}") from None


def _sync(path: Path) -> None:
    """Have the disk write a file, or the names in a folder, now."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
