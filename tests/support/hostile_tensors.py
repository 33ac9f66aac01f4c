"""Strategies for hostile tensor files: wrong tensors, false headers, damaged bytes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from support.hostile_text import HOSTILE_TEXTS, json_values

_NAN, _INF = float("nan"), float("inf")
DAMAGES = (
    *("drop", "rename", "add", "swap", "transpose", "flat", "deeper", "scalar", "empty"),
    *("shorter", "longer", "int32", "int64", "bool", "float16", "bfloat16", "float64"),
    *("nan", "inf", "zero", "huge", "negative", "first", "reverse", "last"),
)
Damages = list[tuple[str, int, int]]


def damages(most: int = 3) -> st.SearchStrategy[Damages]:
    """Draw damages for :func:`damage_tensors`: the kind, the tensor and the entry."""
    number = st.integers(0, 10**6)
    return st.lists(st.tuples(st.sampled_from(DAMAGES), number, number), max_size=most)


def damage_tensors(tensors: dict[str, Tensor], what: Damages) -> dict[str, Tensor]:
    """Return the tensors with some of them damaged."""
    tensors = dict(tensors)
    for way, which, entry in what:
        names = sorted(tensors)
        if not names:
            break
        name = names[which % len(names)]
        tensor = tensors[name]
        if way == "drop":
            del tensors[name]
        elif way == "rename":
            tensors[
                HOSTILE_TEXTS[entry % len(HOSTILE_TEXTS)].encode("utf-8", "replace").decode()
            ] = tensors.pop(name)
        elif way == "add":
            tensors[f"{name}.{entry}"] = tensor.clone()
        elif way == "swap":
            other = names[entry % len(names)]
            tensors[name], tensors[other] = tensors[other], tensor
        else:
            tensors[name] = _changed(tensor, way, entry).contiguous()
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _changed(tensor: Tensor, way: str, entry: int) -> Tensor:
    """Return the tensor with another shape, dtype or content."""
    shapes: dict[str, Callable[[Tensor], Tensor]] = {
        "transpose": lambda t: t.T if t.ndim == 2 else t[None],
        "flat": lambda t: t.reshape(-1),
        "deeper": lambda t: t[None],
        "scalar": lambda t: t.reshape(-1)[:1].sum(),
        "empty": lambda t: t.reshape(-1)[:0],
        "shorter": lambda t: t[:-1] if t.ndim else t[None],
        "longer": lambda t: torch.cat([t, t]) if t.ndim else t[None],
        "reverse": lambda t: t.flip(0) if t.ndim else t,
    }
    if way in shapes:
        return shapes[way](tensor)
    if hasattr(torch, way) and isinstance(getattr(torch, way), torch.dtype):
        return tensor.to(getattr(torch, way))
    changed = tensor.clone()
    flat = changed.reshape(-1)
    if not flat.numel():
        return changed
    contents = {"nan": _NAN, "inf": -_INF, "zero": 0, "huge": 1e30, "negative": -1, "last": 2**20}
    if way == "first":
        flat[entry % flat.numel()] = flat[0].clone()
    elif flat.dtype == torch.bool:
        flat[entry % flat.numel()] = way == "last"
    elif not flat.is_floating_point():
        bounds = torch.iinfo(flat.dtype)
        wanted = {"negative": max(-1, bounds.min), "last": min(2**20, bounds.max)}
        flat[entry % flat.numel()] = wanted.get(way, 0)
    elif way in ("zero", "huge"):
        flat.fill_(contents[way])
    else:
        flat[entry % flat.numel()] = contents[way]
    return changed


def metadata_texts() -> st.SearchStrategy[str]:
    """Draw metadata texts: arbitrary JSON, or text that is not JSON."""
    safe = json_values().map(lambda value: json.dumps(value, default=str))
    return st.one_of(
        safe, st.sampled_from(HOSTILE_TEXTS).map(_utf8), st.sampled_from(("", "{", "[" * 2000))
    )


def _utf8(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


@st.composite
def damaged_files(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a safetensors file with a false header, or with bytes cut, changed or added."""
    way = draw(st.sampled_from(("cut", "flip", "length", "header", "header", "more", "junk")))
    if way == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if way == "flip":
        data = bytearray(content)
        data[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
        return bytes(data)
    if way == "length":
        size = draw(st.sampled_from((0, 1, 7, 2**31, 2**40, 2**63, 2**64 - 1, len(content) - 7)))
        return struct.pack("<Q", size) + content[8:]
    if way == "more":
        return content + draw(st.binary(min_size=1, max_size=9))
    if way == "junk":
        header = draw(st.one_of(st.binary(max_size=40), metadata_texts().map(str.encode)))
        return struct.pack("<Q", len(header)) + header + content[-100:]
    return _with_false_header(draw, content)


def _with_false_header(draw: st.DrawFn, content: bytes) -> bytes:
    """Change the shape, dtype or offsets of a tensor in a header of the right length."""
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    name = draw(st.sampled_from(sorted(n for n in header if n != "__metadata__")))
    number: st.SearchStrategy[Any] = st.sampled_from(
        (-1, 0, 1, 2, 3.5, 2**31, 2**62, 2**64, None, "4", [])
    )
    false: dict[str, Any] = {
        "shape": st.one_of(st.lists(number, max_size=3), json_values()),
        "dtype": st.one_of(
            st.sampled_from(("F32", "BF16", "I64", "BOOL", "F8_E4M3")), json_values()
        ),
        "data_offsets": st.one_of(st.lists(number, min_size=2, max_size=2), json_values()),
    }
    key = draw(st.sampled_from(sorted(false)))
    if draw(st.booleans()):
        header[name][key] = draw(false[key])
    else:
        other = draw(st.sampled_from(sorted(n for n in header if n != "__metadata__")))
        header[name] = {**header[name], key: header[other][key]}
    text = json.dumps(header).encode("utf-8", "replace")
    return struct.pack("<Q", len(text)) + text + content[8 + size :]
