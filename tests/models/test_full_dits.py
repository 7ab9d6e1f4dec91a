"""The newer DiTs at full size, on the meta device: parameters, layers by preset, and a name for every layer.

The configurations are those of `tests.formats.dit_configs`. Parameters are those that the models' cards round.
"""

from __future__ import annotations

import diffusers
import pytest
import torch

from tests.formats.dit_configs import DITS
from tests.models.test_full_size import require_presets_and_names

# argument that says how many blocks of a kind there are -> the kind
DEPTHS = {
    "AuraFlowTransformer2DModel": {
        "num_mmdit_layers": "joint_transformer_blocks",
        "num_single_dit_layers": "single_transformer_blocks",
    },
    "Lumina2Transformer2DModel": {"num_layers": "layers"},
    "ZImageTransformer2DModel": {"n_layers": "layers"},
    "Flux2Transformer2DModel": {"num_layers": "transformer_blocks", "num_single_layers": "single_transformer_blocks"},
}
# parameters in all, and layers of the presets attention, attention-ff and all
WANTED = {
    "pixart": (611_349_152, 28 * 8, 28 * 10, 28 * 10),
    "lumina2": (2_609_769_152, 30 * 4, 30 * 7, 30 * 7 + 28),
    "auraflow": (6_833_439_744, 4 * 8 + 32 * 4, 4 * 14 + 32 * 7, 4 * 16 + 32 * 8),
    "sana 1.6B": (1_604_462_752, 20 * 8, 20 * 10, 20 * 10),
    "sana 0.6B": (591_747_872, 28 * 8, 28 * 10, 28 * 10),
    "qwen-image": (20_430_401_088, 60 * 8, 60 * 12, 60 * 14),
    "z-image": (6_154_908_736, 34 * 4, 34 * 7, 34 * 7 + 32),
    "flux2 dev": (32_223_281_152, 8 * 8 + 48 * 2, 8 * 12 + 48 * 2, 8 * 12 + 48 * 2 + 3),
    "flux2 klein 9B": (9_078_581_248, 8 * 8 + 24 * 2, 8 * 12 + 24 * 2, 8 * 12 + 24 * 2 + 3),
    "flux2 klein 4B": (3_875_544_576, 5 * 8 + 20 * 2, 5 * 12 + 20 * 2, 5 * 12 + 20 * 2 + 3),
}


def built(name):
    model = DITS[name]
    depths = DEPTHS.get(model.cls, {"num_layers": "transformer_blocks"})
    with torch.device("meta"):
        return getattr(diffusers, model.cls)(
            **model.config, **{argument: model.blocks[kind] for argument, kind in depths.items()}
        )


@pytest.mark.parametrize("name", WANTED)
def test_presets_choose_what_they_say_and_every_layer_has_a_name(name):
    require_presets_and_names(built(name), DITS[name].family, WANTED[name])
