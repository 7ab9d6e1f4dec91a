"""The name tables of the diffusion transformers: against the real architectures, and which file is whose."""

from __future__ import annotations

from pathlib import Path

import pytest
from dit_configs import DITS, OTHERS, Dit, linears
from format_helpers import module
from torch import nn

from vislora import formats
from vislora.algebra.compare import compare
from vislora.errors import AdapterFileError
from vislora.formats import AdapterFile
from vislora.formats.detect import family_of_modules
from vislora.formats.diffusers import DIFFUSERS
from vislora.formats.header import Header, TensorInfo
from vislora.formats.kohya import KOHYA, place
from vislora.formats.names import DENOISERS, FAMILY_NAMES, NameTable, choose, component_of, families_for
from vislora.formats.names.hints import family_of
from vislora.formats.parsed import ParsedModule, Part

LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.Embedding)
EXPERTS = ("transformer", "transformer_2")
ATTENTION = r".*att.*"
ONE_STREAM = r".*att.*\.(to_q|to_k|to_v|to_out|to_out\.0)"
# by their attention, nothing tells these apart
SAME_ATTENTION = {"pixart", "sana 0.6B"}
# their attention is that of another model in the list
VARIANTS = {"qwen-image layered", "z-image omni", "hunyuan-image distilled", "sana sprint", "wan i2v 14B", "wan vace"}
MODELS = {**{name: dit for name, dit in DITS.items() if name not in VARIANTS}, **OTHERS}


def table_of(dit: Dit) -> NameTable:
    return FAMILY_NAMES[dit.family].tables["denoiser"]


@pytest.mark.parametrize("name", DITS)
def test_every_layer_of_the_real_architectures_has_a_name_of_its_own_and_comes_back(name):
    table, family = table_of(DITS[name]), DITS[name].family
    paths = [path for path, layer in DITS[name].build().named_modules() if isinstance(layer, LAYERS)]
    assert paths
    for path in paths:
        stored = table.place(path)
        assert stored is not None, path
        assert [lead.path for lead in table.find_dotted(path)] == [path]
        assert path in [lead.path for lead in table.find_flat(path.replace(".", "_"))]
        for leads in (table.find_dotted(stored.name), table.find_flat(stored.name.replace(".", "_"))):
            assert path in [lead.path for lead in leads]
            assert len(leads) == (len(stored.part.sizes) if stored.part else 1), stored.name
        assert component_of("transformer", path) == "denoiser"
    flat = [place("denoiser", path, family) for path in paths]
    assert len({(item.name, item.part) for item in flat}) == len(paths)


def _lora(names: dict[str, int], down: str, up: str) -> Part:
    """Make the header of a file with a LoRA of rank 1 under these names (-> inputs); only the inputs are real."""
    tensors = {}
    for name, inputs in names.items():
        tensors[f"{name}.{down}.weight"] = TensorInfo("F16", (1, inputs), 0, 0)
        tensors[f"{name}.{up}.weight"] = TensorInfo("F16", (inputs * 840, 1), 0, 0)
    return Part(Path("a.safetensors"), Header(tensors, {}, 0))


def _modules(names: dict[str, int], flat: bool) -> list[ParsedModule]:
    form, halves = (KOHYA, ("lora_down", "lora_up")) if flat else (DIFFUSERS, ("lora_A", "lora_B"))
    part = _lora(names, *halves)
    return form.parse(part, list(part.header.tensors))


def _by_dotted_names(names: dict[str, int]) -> str | None:
    """Return the family of a file in original dotted names."""
    table = families_for(names, flat=False)[0].tables["denoiser"]
    return family_of({lead.path: inputs for name, inputs in names.items() for lead in table.find_dotted(name)}, {})


def _recognised(dit: Dit, pattern: str) -> set[str | None]:
    """Return the families that a file with these layers is taken for, under each of the names it may have."""
    layers = linears(dit, pattern)
    original = {table_of(dit).place(path).name: inputs for path, inputs in layers.items()}
    flat = [
        {f"lora_unet_{name.replace('.', '_')}": inputs for name, inputs in item.items()} for item in (original, layers)
    ]
    return {
        family_of_modules(_modules({f"transformer.{path}": inputs for path, inputs in layers.items()}, False), {}),
        *(family_of_modules(_modules(names, True), {}) for names in flat),
        _by_dotted_names(original),
    }


@pytest.mark.parametrize("name", MODELS)
def test_the_attention_layers_say_whose_they_are(name):
    found = _recognised(MODELS[name], ATTENTION)
    if name in SAME_ATTENTION:
        assert None in found
        assert found <= {MODELS[name].family, None}
    else:
        assert found == {MODELS[name].family}


@pytest.mark.parametrize("name", MODELS)
def test_few_layers_are_taken_for_their_family_or_for_none(name):
    blocks = next(iter(MODELS[name].blocks), "")
    for pattern in (ONE_STREAM, rf"{blocks}\.{ONE_STREAM}", rf"{blocks}\..*att.*\.(to_q|to_v)"):
        assert family_of(linears(MODELS[name], pattern), {}) in (MODELS[name].family, None)


@pytest.mark.parametrize("name", MODELS)
def test_without_widths_nothing_is_taken_for_another_family(name):
    """The slots of LoKr do not tell a layer's inputs."""
    table, family = table_of(MODELS[name]), MODELS[name].family
    for pattern in (".*", ATTENTION):
        paths = linears(MODELS[name], pattern)
        original = [table.place(path).name for path in paths]
        flat = dict.fromkeys(item.replace(".", "_") for item in original)
        found = {choose(dict.fromkeys(names), flat=False)[0] for names in (paths, original)}
        assert {*found, choose(flat, flat=True)[0]} <= {family, None}


def test_metadata_decides_where_the_layers_do_not_tell():
    layers = linears(DITS["pixart"], ATTENTION)
    assert family_of(layers, {}) is None
    assert family_of(layers, {"modelspec.architecture": "sana"}) == "sana"
    assert family_of(layers, {"modelspec.architecture": "flux-2"}) is None


def test_both_experts_of_wan_22_are_kept_apart(tmp_path):
    adapter = AdapterFile(
        modules=[module("blocks.0.attn1.to_q", component, shape=(8, 1536)) for component in DENOISERS], family="wan"
    )
    formats.save(adapter, tmp_path / "a.safetensors", "diffusers")
    read = formats.load(tmp_path / "a.safetensors")
    assert {item.raw_name for item in read.modules} == {f"{name}.blocks.0.attn1.to_q" for name in EXPERTS}
    assert {item.component for item in read.modules} == set(DENOISERS)
    comparison = compare(adapter, read)
    assert comparison.exact, comparison.problems(0.0)
    with pytest.raises(AdapterFileError, match="1 modules without a kohya name"):
        formats.save(adapter, tmp_path / "b.safetensors", "kohya")


def test_wan_fun_names_are_read():
    parsed = _modules({"lora_unet__blocks_0_self_attn_q": 1536, "lora_unet__blocks_3_ffn_2": 8960}, True)
    assert [item.path for item in parsed] == ["blocks.0.attn1.to_q", "blocks.3.ffn.net.2"]
