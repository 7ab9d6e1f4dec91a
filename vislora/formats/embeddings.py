"""Textual inversion embeddings that travel inside an adapter file. Torch-free.

bundle_emb.my.style.string_to_param.*  -> ('my.style', 'string_to_param.*')   A1111, OneTrainer
bundle_emb.cat.clip_l                  -> ('cat', 'clip_l')
<s1>                                   -> ('<s1>', 'emb_params')              cloneofsimo: its metadata says <embed>
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

BUNDLE = "bundle_emb."
EMBED_FLAG = "<embed>"
PLAIN_SLOT = "emb_params"
_TOKEN = re.compile(r"<[^<>]+>")
_SLOT = re.compile(r"emb_params|string_to_param\..*|clip_[lg]|t5(xxl)?")


def is_embedding(key: str, metadata: Mapping[str, str]) -> bool:
    """Say whether a key is that of an embedding: of a bundle, or a token that the metadata marks or that looks so."""
    if key.startswith(BUNDLE):
        return "." in key.removeprefix(BUNDLE)
    return metadata.get(key) == EMBED_FLAG or _TOKEN.fullmatch(key) is not None


def embedding_name(key: str) -> tuple[str, str]:
    """Split a key into name and slot. A name may hold dots, a slot only that of `string_to_param.*`."""
    if not key.startswith(BUNDLE):
        return key, PLAIN_SLOT
    rest = key.removeprefix(BUNDLE)
    name, found, tail = rest.rpartition(".string_to_param")
    if found and tail[:1] in ("", "."):
        return name, f"string_to_param{tail}"
    name, _, slot = rest.rpartition(".")
    return name, slot


def loose_slots(keys: Sequence[str]) -> list[tuple[str, str]]:
    """Return, for each key of a file of embeddings alone, (token, slot); empty when it is no such file.

    emb_params, string_to_param.*, clip_l, clip_g -> ('', the key): the word is the file's name    A1111, OneTrainer
    <cat-toy>                                     -> ('<cat-toy>', 'emb_params')                   diffusers
    """
    if all(_TOKEN.fullmatch(key) for key in keys):
        return [(key, PLAIN_SLOT) for key in keys]
    return [("", key) for key in keys] if all(_SLOT.fullmatch(key) for key in keys) else []


def bundle_key(name: str, slot: str) -> str:
    """Do the reverse of `embedding_name` for a bundle."""
    return f"{BUNDLE}{name}.{slot}"
