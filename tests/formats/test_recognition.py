"""What model an adapter is for: told by its layers at the widths of real models, whatever the names are written in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache

import pytest

from tests.formats.format_helpers import header_only, listed_shapes
from vislora.formats.contract import folder_of
from vislora.formats.detect import family_of_modules, parse_file
from vislora.formats.names import choose
from vislora.formats.names.hints import family_in_metadata, family_of
from vislora.formats.parsed import ParsedModule

LISTINGS = {
    "sd": "kohya_sd15_lora_c3lier.json",
    "sdxl": "kohya_sdxl_lora_c3lier.json",
    "sd3": "kohya_sd3_medium.json",
    "flux": "kohya_flux_lora_te1_te3_indims.json",
}
Pick = Callable[[ParsedModule], bool]
SUBSETS: dict[str, Pick] = {
    "all": lambda item: True,
    "denoiser": lambda item: item.component == "denoiser",
    "attention": lambda item: item.component == "denoiser" and ".attn" in (item.path or ""),
    "queries": lambda item: item.component == "denoiser" and (item.path or "").endswith("to_q"),
    "feed-forward": lambda item: item.component == "denoiser" and ".ff" in (item.path or ""),
}
TREES: dict[str, Callable[[ParsedModule, str], str]] = {
    "diffusers": lambda item, folder: f"{folder}.{item.path}",
    "peft": lambda item, folder: f"base_model.model.{item.path}",
    "lycoris": lambda item, folder: "lycoris_" + (item.path or "").replace(".", "_"),
}


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[ParsedModule]]:
    """Return a function from a family to the modules of its listing, resolved."""

    @cache
    def modules(family: str) -> list[ParsedModule]:
        path = tmp_path_factory.mktemp("listings") / "a.safetensors"
        return parse_file(header_only(listed_shapes(LISTINGS[family]), path)).modules

    return modules


def shapes_of(modules: Iterable[ParsedModule], family: str, tree: str) -> dict[str, tuple[int, ...]]:
    ends = ("lora_down.weight", "lora_up.weight") if tree == "lycoris" else ("lora_A.weight", "lora_B.weight")
    shapes = {}
    for item in modules:
        name = TREES[tree](item, folder_of(item.component, family))
        shapes[f"{name}.{ends[0]}"] = item.refs["down"].shape
        shapes[f"{name}.{ends[1]}"] = item.refs["up"].shape
    return shapes


@pytest.mark.parametrize("tree", ["kohya", *TREES])
@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("family", LISTINGS)
def test_the_layers_of_real_models_tell_their_family(family, subset, tree, listed, tmp_path):
    modules = [item for item in listed(family) if SUBSETS[subset](item)]
    if tree == "lycoris":
        modules = [item for item in modules if item.component == "denoiser"]
    if tree == "kohya":
        fused = {key: shape for key, shape in listed_shapes(LISTINGS[family]).items() if "alpha" not in key}
        names = {item.raw_name for item in modules}
        shapes = {key: tuple(shape) for key, shape in fused.items() if key.partition(".")[0] in names}
    else:
        shapes = shapes_of(modules, family, tree)
    assert parse_file(header_only(shapes, tmp_path / "a.safetensors")).family == family


PLACES = {
    "a layer that SD and SDXL have": ({"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": 640}, "sd"),
    "one block of SDXL": ({"up_blocks.0.attentions.1.transformer_blocks.3.attn2.to_v": 2048}, "sdxl"),
    "the last resnets of SDXL": ({"up_blocks.2.resnets.0.conv1": 960}, "sdxl"),
    "those of SD": ({"up_blocks.2.resnets.2.conv1": 960}, "sd"),
    "the refiner": ({"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": 768}, "sdxl-refiner"),
    "its resnets": ({"mid_block.resnets.0.conv1": 1536}, "sdxl-refiner"),
    "a conv of 128 whose LoHa does not tell the kernel": ({"mid_block.resnets.0.conv1": 9 * 128}, "sd"),
    "SD 3's width": ({"transformer_blocks.0.attn.to_q": 1536}, "sd3"),
    "SD 3.5's width": ({"transformer_blocks.0.attn.add_k_proj": 2432}, "sd3"),
    "no width": ({"transformer_blocks.0.attn.to_q": None}, None),
    "an odd width": ({"transformer_blocks.0.attn.to_q": 40}, None),
    "no layer that anybody has": ({"what.ever": 1536}, None),
}


@pytest.mark.parametrize("name", PLACES)
def test_few_layers_tell_what_they_can_and_no_more(name):
    paths, family = PLACES[name]
    assert family_of(paths, {}) == family


def test_metadata_decides_only_where_layers_do_not():
    undecided = {"transformer_blocks.0.attn.to_q": None}
    own = {"vislora.base": '{"name": "x", "hash": "y", "family": "sd3"}'}
    assert family_of(undecided, own) == "sd3"
    assert family_of(undecided, {"ss_base_model_version": "flux1"}) == "flux"
    assert family_of(undecided, {"ss_base_model_version": "sdxl_base_v1-0"}) is None
    assert family_of({"transformer_blocks.0.attn.to_q": 1536}, {"ss_base_model_version": "flux1"}) == "sd3"
    assert family_of({}, own) == "sd3"


@pytest.mark.parametrize(
    "base", ["", "x", "[]", '{"family": 3}', '{"family": "nobody"}', '{"family": null}', "9" * 5000]
)
def test_damaged_metadata_names_no_family(base):
    assert family_in_metadata({"vislora.base": base}) is None
    assert family_in_metadata({"vislora.base": base, "ss_base_model_version": "sd_v1"}) == "sd"


def test_versions_of_other_programs():
    said = {
        "sd_1.5": "sd",
        "sd_v2-768-v": "sd",
        "sdxl_1.0": "sdxl",
        "sdxl_base_v1-0": "sdxl",
        "stable-diffusion-xl-v1-base/lora": "sdxl",
        "stable-diffusion-xl-v1-refiner/lora": "sdxl-refiner",
        "stable-diffusion-v1/lora": "sd",
        "stable-diffusion-3-medium/lora": "sd3",
        "sd3_medium": "sd3",
        "sd3": "sd3",
        "flux1": "flux",
        "Flux.1-dev": "flux",
        "flux-1-schnell/lora": "flux",
        "flux_kontext": "flux",
        "chroma": "chroma",
        "unheard-of": None,
    }
    found = {text: family_in_metadata({"modelspec.architecture": text}) for text in said}
    assert found == said
    assert family_in_metadata({"ss_v2": "True"}) == "sd"
    assert family_in_metadata({"ss_v2": "False"}) is None
    assert family_in_metadata({"ss_v2": "True", "ss_base_model_version": "sdxl_"}) == "sdxl"


def test_names_in_a_file_can_tell_more_than_the_paths_they_lead_to():
    narrow = {"double_blocks_18_img_attn_qkv": 16}
    assert choose(narrow, flat=True)[0] == "flux"
    assert choose({"double_blocks_0_img_attn_qkv": 16}, flat=True)[0] is None  # of FLUX.2 or HunyuanVideo as well
    assert choose(narrow, flat=True, hint="chroma")[0] == "chroma"
    assert choose({"joint_blocks_0_x_block_attn_qkv": 16}, flat=True)[0] == "sd3"
    assert choose({"transformer_blocks_0_attn_to_q": 16}, flat=True)[0] is None
    assert family_of_modules([], {}) is None
