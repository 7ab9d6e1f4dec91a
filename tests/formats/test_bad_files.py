"""Every bad input gives one clear error that names the thing; nothing else ever comes out."""

from __future__ import annotations

import errno
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from tests.formats.format_helpers import sd_adapter
from vislora import formats
from vislora.errors import AdapterFileError, VisloraError
from vislora.formats.reading import streamed
from vislora.formats.tensor_file import write_tensors

NAME = "lora_unet_conv_in"
GOOD = {f"{NAME}.lora_down.weight": torch.ones(2, 4), f"{NAME}.lora_up.weight": torch.ones(4, 2)}


def packed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: object, start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


CONTAINERS = {
    "zero bytes": (b"", "empty"),
    "a few bytes": (b"\1\2\3", "not a safetensors file"),
    "truncated data": (save(GOOD)[:-8], "truncated"),
    "truncated header": (save(GOOD)[:40], "truncated"),
    "too long": (save(GOOD) + b"\0\0", "longer than its header says"),
    "wrong header length": (b"\xff\xff\xff\xff\0\0\0\0" + save(GOOD)[8:], "truncated or damaged"),
    "huge header length": (b"\xff" * 8 + save(GOOD)[8:], "truncated or damaged"),
    "header is no JSON": (packed(b"{not json"), "not valid JSON"),
    "header is nested deeply": (packed(b'{"a":' * 50_000), "not valid JSON"),
    "duplicate keys": (packed(b'{"a": {}, "a": {}}'), "'a' stands twice"),
    "unknown dtype": (packed({"a": entry([1], 0, 4, "F33")}, bytes(4)), "unknown dtype 'F33'"),
    "negative shape": (packed({"a": entry([-1], 0, 4)}, bytes(4)), "shape \\[-1\\]"),
    "boolean shape": (packed({"a": entry([True], 0, 4)}, bytes(4)), "shape \\[True\\]"),
    "wrong size": (packed({"a": entry([3], 0, 4)}, bytes(4)), "takes 12 bytes"),
    "overlap": (packed({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), "overlaps"),
    "gap": (packed({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), "gap"),
    "huge shape": (packed({"a": entry([2**40, 2**40, 0], 0, 0)}), "no tensor has the shape"),
    "many axes": (packed({"a": entry([1] * 70, 0, 4)}, bytes(4)), "no tensor has the shape"),
    "gigantic number": (packed(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}"), "not valid JSON"),
    "half a character": (packed({"\ud800": entry([1], 0, 4)}, bytes(4)), "is not text"),
    "half a character in the metadata": (packed({"__metadata__": {"a": "\udc00"}}), "is not text"),
    "not UTF-8": (packed(b'{"\xff": {}}'), "not valid JSON"),
    "no offsets": (packed({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "data_offsets"),
    "metadata of numbers": (packed({"__metadata__": {"a": 1}}), "metadata"),
    "web page": (b"<!DOCTYPE html><html><body>not found</body></html>", "web page"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS"),
    "pickle": (pickle.dumps({"a": [1]}), "is a pickle"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_damaged_containers(name, tmp_path):
    data, message = CONTAINERS[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(AdapterFileError, match=message) as caught:
        formats.load(path)
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_pickles_are_never_opened(name, tmp_path):
    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    torch.save({"a": Trap()}, tmp_path / name)
    with pytest.raises(AdapterFileError, match="weights_only=True"):
        formats.load(tmp_path / name)
    assert not (tmp_path / "sprung").exists()
    with zipfile.ZipFile(tmp_path / name) as archive:
        assert archive.namelist()


def changed(**tensors: torch.Tensor | None) -> dict[str, torch.Tensor]:
    found = {**GOOD, **{f"{NAME}.{end.replace('__', '.')}": tensor for end, tensor in tensors.items()}}
    return {key: tensor for key, tensor in found.items() if tensor is not None}


CONTENTS = {
    "no up": (changed(lora_up__weight=None), "lacks up"),
    "no down": (changed(lora_down__weight=None), "lacks down"),
    "only alpha": (
        {**changed(), "lora_unet_conv_out.alpha": torch.tensor(1.0)},
        "conv_out': it has an alpha and nothing else",
    ),
    "nan": (changed(lora_up__weight=torch.full((4, 2), float("nan"))), "not finite.*\n.*lora_up"),
    "infinite": (changed(lora_down__weight=torch.full((2, 4), float("inf"))), "not finite"),
    "alpha infinite": (changed(alpha=torch.tensor(float("inf"))), "alpha is inf"),
    "alpha nan": (changed(alpha=torch.tensor(float("nan"))), "alpha is nan"),
    "alpha of two numbers": (changed(alpha=torch.ones(2)), "should be one number"),
    "ranks differ": (changed(lora_up__weight=torch.ones(4, 3)), "do not share a rank: down \\[2, 4\\], up \\[4, 3\\]"),
    "rank zero": (changed(lora_down__weight=torch.ones(0, 4), lora_up__weight=torch.ones(4, 0)), "is empty"),
    "one axis": (changed(lora_down__weight=torch.ones(2)), "fit no layer"),
    "six axes": (changed(lora_down__weight=torch.ones(2, 4, 1, 1, 1, 1)), "fit no layer"),
    "linear and conv": (changed(lora_down__weight=torch.ones(2, 4, 1, 1)), "fit no layer"),
    "wide up": (
        changed(lora_down__weight=torch.ones(2, 4, 3, 3), lora_up__weight=torch.ones(4, 2, 3, 3)),
        "kernel size 1",
    ),
    "integers": (changed(lora_up__weight=torch.ones(4, 2, dtype=torch.int64)), "not a floating type"),
    "unknown layer": ({key.replace("conv_in", "nonsense"): t for key, t in GOOD.items()}, "none of its 1 modules"),
    "SDXL names": ({key.replace("conv_in", "input_blocks_3_0"): t for key, t in GOOD.items()}, "none of its 1 modules"),
    "no tensors": ({}, "without any tensor"),
    "unknown keys": ({"what.ever": torch.ones(1)}, "without a LoRA"),
    "checkpoint": ({"model.diffusion_model.input_blocks.0.0.weight": torch.ones(1)}, "a whole checkpoint"),
    "vae": ({"encoder.conv_in.weight": torch.ones(1)}, "a VAE"),
    "unet": ({"down_blocks.0.resnets.0.conv1.weight": torch.ones(1)}, "a denoiser's weights"),
    "controlnet": ({"control_model.input_blocks.0.0.weight": torch.ones(1)}, "a ControlNet;"),
    "lllite": ({"lllite_unet_x.down.0.weight": torch.ones(1)}, "LLLite"),
    "textual inversion": ({"emb_params": torch.ones(1, 768)}, "textual inversion"),
    "textual inversion of SDXL": ({"clip_g": torch.ones(1), "clip_l": torch.ones(1)}, "textual inversion"),
    "ip-adapter": (
        {"image_proj.proj.weight": torch.ones(1), "ip_adapter.1.to_k_ip.weight": torch.ones(1)},
        "IP-Adapter",
    ),
    "cloneofsimo": ({"unet:0:up": torch.ones(1), "unet:0:down": torch.ones(1)}, "no linear layer"),
    "old diffusers": ({"unet.a.attn1.processor.to_q_lora.down.weight": torch.ones(1)}, "lacks up"),
    "comfy": ({"diffusion_model.x.lora_A.weight": torch.ones(1)}, "none of its 1 modules"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_adapters_that_cannot_be_used(name, tmp_path):
    tensors, message = CONTENTS[name]
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(AdapterFileError, match=message):
        formats.load(tmp_path / "bad.safetensors")


def test_all_damaged_modules_are_named_at_once(tmp_path):
    tensors = {f"lora_unet_{name}.lora_up.weight": torch.ones(4, 2) for name in ("conv_in", "conv_out")}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError) as caught:
        formats.load(tmp_path / "a.safetensors")
    assert "2 of its 2 modules" in str(caught.value)
    assert "conv_in" in str(caught.value)
    assert "conv_out" in str(caught.value)


CONFIGS = {
    "no JSON": ("{", "cannot be read as JSON"),
    "a list": ("[]", "should be a JSON object"),
    "alpha is text": ('{"lora_alpha": "8"}', "should be a number"),
    "patterns are a list": ('{"alpha_pattern": [1]}', "alpha_pattern should map"),
    "no regular expression": ('{"alpha_pattern": {"(": 1}}', "no regular expression"),
    "a long pattern": (json.dumps({"rank_pattern": {"a+" * 500: 1}}), "longer than"),
    "alpha is infinite": ('{"lora_alpha": 1e999}', "alpha is inf"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_bad_peft_configs(name, tmp_path):
    text, message = CONFIGS[name]
    formats.save(sd_adapter(text=False), tmp_path / "a", "peft")
    (tmp_path / "a" / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterFileError, match=message):
        formats.load(tmp_path / "a")


def test_folders_without_an_adapter(tmp_path):
    with pytest.raises(AdapterFileError, match="no such file"):
        formats.load(tmp_path / "nothing.safetensors")
    (tmp_path / "a").mkdir()
    with pytest.raises(AdapterFileError, match=r"without adapter_config\.json"):
        formats.load(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterFileError, match=r"no adapter_model\.safetensors"):
        formats.load(tmp_path / "a")
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"PK")
    with pytest.raises(AdapterFileError, match="is a pickle"):
        formats.load(tmp_path / "a")


@pytest.mark.parametrize("metadata", ["{", "[]", '{"unet.lora_alpha": {}}', '{"unet.alpha_pattern": {"*": 1}}'])
def test_bad_diffusers_metadata(metadata, tmp_path):
    formats.save(sd_adapter(text=False), tmp_path / "a.safetensors", "diffusers")
    tensors = load_file(tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "b.safetensors", {"lora_adapter_metadata": metadata})
    with pytest.raises(AdapterFileError):
        formats.load(tmp_path / "b.safetensors")


def test_two_namespaces_are_one_adapter_when_they_agree_and_an_error_when_they_do_not(tmp_path):
    flat = {f"{NAME}.lora_down.weight": torch.ones(2, 4), f"{NAME}.lora_up.weight": torch.ones(4, 2)}
    dotted = {"unet.conv_in.lora_A.weight": torch.ones(2, 4), "unet.conv_in.lora_B.weight": torch.ones(4, 2)}
    save_file({**flat, **dotted}, tmp_path / "a.safetensors")
    adapter = formats.load(tmp_path / "a.safetensors")
    assert len(adapter.modules) == 1
    assert "repeats" in adapter.modules[0].notes[0]
    save_file({**flat, **dotted, "unet.conv_in.lora_B.weight": torch.zeros(4, 2)}, tmp_path / "b.safetensors")
    with pytest.raises(AdapterFileError, match=r"differ:\n.*lora_unet_conv_in\..*' and 'unet\.conv_in\."):
        formats.load(tmp_path / "b.safetensors")


def test_mixed_ranks_are_no_fault(tmp_path):
    save_file(
        {
            **GOOD,
            "lora_unet_conv_out.lora_down.weight": torch.ones(7, 4),
            "lora_unet_conv_out.lora_up.weight": torch.ones(4, 7),
        },
        tmp_path / "a.safetensors",
    )
    assert {item.rank for item in formats.load(tmp_path / "a.safetensors").modules} == {2, 7}


@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "no space left on the disk"), (errno.EROFS, "Read-only")])
@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_a_full_or_read_only_disk_leaves_nothing_behind(form, code, message, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("vislora.formats.writing.write_tensors", full)
    end = ".safetensors" if form == "kohya" else ""
    with pytest.raises(VisloraError, match=message):
        formats.save(sd_adapter(), tmp_path / "new" / f"a{end}", form)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_while_it_is_written_is_told(tmp_path):
    with pytest.raises(OSError, match="No space"):
        write_tensors(Path("/dev/full"), {"a": torch.ones(1 << 20)}, {})


def test_a_file_that_shrinks_while_it_is_read_is_told(tmp_path):
    formats.save(sd_adapter(), tmp_path / "a.safetensors", "kohya")
    with streamed(tmp_path / "a.safetensors") as (_, modules):
        os.truncate(tmp_path / "a.safetensors", 2000)
        with pytest.raises(AdapterFileError, match="cannot be read: the file became shorter"):
            list(modules)
