"""Which layers the presets and patterns choose on real model classes."""

from __future__ import annotations

import re

import pytest
from torch import nn

from tests import tiny
from vislora.errors import ConfigError
from vislora.inject.targets import PRESETS, Target, adaptable, near_misses, select

DEFAULT = Target("", 4)


def paths(name: str, preset: str) -> list[str]:
    return list(select(tiny.model(name), [], preset, DEFAULT))


def kohya_set(unet: nn.Module) -> set[str]:
    """What sd-scripts' `LoRANetwork` with conv_dim (LoCon, "C3Lier") finds: linears and convs under these classes."""
    classes = ("Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D")
    return {
        f"{path}.{child}"
        for path, module in unet.named_modules()
        if type(module).__name__ in classes
        for child, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }


@pytest.mark.parametrize("linear", [False, True])
def test_all_on_a_unet_is_the_set_of_kohya(linear):
    unet = tiny.unet(use_linear_projection=linear)
    assert set(select(unet, [], "all", DEFAULT)) == kohya_set(unet)


def test_all_on_a_unet_leaves_out_the_ends_and_the_time_embedding():
    left = set(adaptable(tiny.model("unet"))) - set(paths("unet", "all"))
    assert left == {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}


@pytest.mark.parametrize(
    ("name", "attention", "with_ff", "everything"),
    [
        ("unet", 4 * 8, 4 * 8 + 4 * 4, 4 * 12 + 8 * 3 + 5 + 2),
        ("sd3", 8 + 7, 15 + 4 + 2, 21 + 4),
        ("flux", 8 + 3, 11 + 4 + 2, 17 + 2 + 1),
        ("dit", 8, 12, 14),
        ("clip", 8, 12, 12),
        ("t5", 8, 14, 14),
        ("vit", 8, 12, 12),
    ],
)
def test_counts(name, attention, with_ff, everything):
    counts = [len(paths(name, preset)) for preset in ("attention", "attention-ff", "all")]
    assert counts == [attention, with_ff, everything]
    assert len(paths(name, "every-layer")) == len(adaptable(tiny.model(name)))


ATTENTION_CLASSES = ("Attention", "FluxAttention", "CLIPAttention", "T5Attention", "ViTAttention", "ViTSelfAttention")


@pytest.mark.parametrize("name", ["unet", "sd3", "flux", "dit", "clip", "t5", "vit"])
def test_attention_is_every_linear_of_every_attention_module(name):
    model = tiny.model(name)
    expected = {
        f"{path}.{child}"
        for path, module in model.named_modules()
        if type(module).__name__ in ATTENTION_CLASSES
        for child, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }
    assert expected
    assert set(select(model, [], "attention", DEFAULT)) == expected


def test_the_final_projection_of_a_dit_is_no_feed_forward():
    for name in ("sd3", "flux", "dit"):
        assert not [path for path in paths(name, "all") if re.match(r"proj_(in|out)", path)]
    assert "single_transformer_blocks.0.proj_out" in paths("flux", "attention-ff")


def test_modulation_of_a_dit_is_in_all():
    assert [path for path in paths("flux", "all") if path.endswith(".linear")] == [
        "transformer_blocks.0.norm1.linear",
        "transformer_blocks.0.norm1_context.linear",
        "single_transformer_blocks.0.norm.linear",
    ]


@pytest.mark.parametrize(
    "path",
    [
        "encoder.layer.0.attention.attention.query",  # ViT, DINOv2 of older transformers
        "encoder.layer.0.attention.output.dense",
        "encoder.layers.0.blocks.1.attention.self.value",  # Swin
        "blocks.3.attn.qkv",  # timm
        "blocks.3.attn.proj",
        "vision_model.encoder.layers.0.self_attn.out_proj",  # SigLIP
    ],
)
def test_attention_names_of_other_libraries(path):
    assert re.fullmatch(PRESETS["attention"][0][3:], path)


@pytest.mark.parametrize(
    "path", ["encoder.layer.0.intermediate.dense", "encoder.layer.0.output.dense", "blocks.3.mlp.fc1"]
)
def test_feed_forward_names_of_other_libraries(path):
    assert re.fullmatch(PRESETS["attention-ff"][0][3:], path)
    assert not re.fullmatch(PRESETS["attention"][0][3:], path)


def test_presets_choose_nothing_in_a_plain_cnn_and_say_so():
    for preset in ("attention", "attention-ff", "all", "none"):
        with pytest.raises(ConfigError, match=rf"preset '{preset}' and 0 pattern.* none of the 7 layers of Sequential"):
            select(tiny.model("cnn"), [], preset, DEFAULT)


def test_a_pattern_has_its_own_rank_alpha_and_algorithm_and_the_first_match_decides():
    targets = [
        Target("*.attn2.to_k", 8, 2.0),
        Target("re:.*attn2\\.to_[kv]", 16),
        Target("mid_block.*", 0),
    ]
    found = select(tiny.model("unet"), targets, "attention", DEFAULT)
    first = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert found[f"{first}.attn2.to_k"] == targets[0]
    assert found[f"{first}.attn2.to_v"] == targets[1]
    assert found[f"{first}.attn2.to_q"] == DEFAULT
    # the patterns before rank 0 keep their layers
    middle = [path.rpartition("0.")[2] for path in found if path.startswith("mid_block.")]
    assert middle == ["attn2.to_k", "attn2.to_v"]


def test_patterns_alone():
    found = select(tiny.model("cnn"), [Target("[12]", 3), Target("9", 5)], "none", DEFAULT)
    assert {path: target.rank for path, target in found.items()} == {"1": 3, "2": 3, "9": 5}


def test_a_pattern_without_a_layer_names_near_misses_all_patterns_at_once():
    with pytest.raises(ConfigError) as caught:
        select(tiny.model("unet"), [Target("*.attn1.to_qq", 4), Target("nowhere", 4)], "all", DEFAULT)
    first, second = caught.value.problems
    assert "'*.attn1.to_qq' matches no layer" in first
    assert "attn1.to_q," in first
    assert "'nowhere'" in second


def test_a_glob_matches_the_whole_path_and_a_regular_expression_too():
    for pattern in ("to_q", "re:to_q", "re:.*attn1"):
        with pytest.raises(ConfigError, match="matches no layer"):
            select(tiny.model("unet"), [Target(pattern, 4)], "all", DEFAULT)


def test_a_bad_regular_expression_is_named():
    with pytest.raises(ConfigError, match=r"pattern 're:\(' is no valid regular expression: missing \)"):
        select(tiny.model("cnn"), [Target("re:(", 4)], "none", DEFAULT)


def test_everything_excluded_is_an_error_with_an_example():
    with pytest.raises(ConfigError, match=r"choose none.*\n.*attn1\.to_q"):
        select(tiny.model("unet"), [Target("*", 0)], "all", DEFAULT)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'attention'"):
        select(tiny.model("cnn"), [], "atention", DEFAULT)


def test_near_misses_are_one_of_each_kind():
    found = near_misses("*.to_q", adaptable(tiny.model("unet")), count=3)
    assert len(found) == 3
    assert all(path.endswith(("to_q", "to_k", "to_v")) for path in found)


def test_layers_that_their_parent_bypasses_are_no_targets():
    model = nn.ModuleDict(
        {
            "mha": nn.MultiheadAttention(8, 2),
            "encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1),
            "decoder": nn.TransformerDecoderLayer(8, 2, 16),
            "head": nn.Linear(8, 2),
        }
    )
    assert list(adaptable(model)) == ["decoder.linear1", "decoder.linear2", "head"]
    with pytest.raises(ConfigError, match="matches no layer"):
        select(model, [Target("mha.out_proj", 4)], "none", DEFAULT)
