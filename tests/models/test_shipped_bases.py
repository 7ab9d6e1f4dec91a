"""The bases in the package: small enough, with their papers, loaded by diffusers without a word, found by name."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0

import vislora
from vislora.errors import ModelError
from vislora.jobs.recipes import base_hash
from vislora.models.base import SHIPPED, load_family, place_of


@pytest.mark.parametrize("name", SHIPPED)
def test_a_base_is_small_and_has_its_papers(name):
    folder = place_of(name)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 25 * 2**20
    assert {"README.md", "LICENSES.txt", "model_index.json", "vislora.json"} <= {file.name for file in folder.iterdir()}


LOADED = """
import json, logging, sys, warnings
import diffusers
warnings.simplefilter("error")
heard = []
listener = logging.Handler(logging.WARNING)
listener.emit = lambda record: heard.append(record.getMessage())
for library in ("diffusers", "transformers"):
    logging.getLogger(library).addHandler(listener)
getattr(diffusers, sys.argv[2]).from_pretrained(sys.argv[1], **json.loads(sys.argv[3]))
print([text for text in heard if "torchvision" not in text])  # that is about the machine
"""


@pytest.mark.quick("icons")
@pytest.mark.parametrize(
    ("name", "absent"),
    [
        pytest.param("", {}, id="icons"),
        pytest.param("icons-dit", {"text_encoder_3": None, "tokenizer_3": None}, id="icons-dit"),
    ],
)
def test_diffusers_loads_it_without_a_warning(name, absent):
    folder = place_of(name)
    pipeline = json.loads((folder / "model_index.json").read_text())["_class_name"]
    command = [sys.executable, "-c", LOADED, str(folder), pipeline, json.dumps(absent)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr[-600:]


def test_the_transformer_is_found_by_its_name_and_draws(tmp_path):
    assert base_hash("icons-dit") != base_hash("")
    family = load_family("icons-dit", torch.float32, torch.device("cpu"))
    assert family.card.name == "sd3"
    assert family.traits.resolution == 64
    made = vislora.generate(prompt=("a fox, noto style",), base="icons-dit", steps=2, output=tmp_path / "out")
    assert made[0].image.size == (64, 64)
    again = vislora.generate(like=made[0].path, output=tmp_path / "again")
    assert again[0].image.tobytes() == made[0].image.tobytes()


def test_the_transformer_draws_what_diffusers_draws_with_every_token():
    family = load_family("icons-dit", torch.float32, torch.device("cpu"))
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    how = {"num_inference_steps": 3, "latents": latents, "output_type": "pt"}
    ours = family.pipeline(["a fox, noto style"] * 2, **family.traits.always, **how).images
    family.pipeline.transformer.set_attn_processor(JointAttnProcessor2_0())
    torch.testing.assert_close(ours, family.pipeline(["a fox, noto style"] * 2, **how).images, rtol=0, atol=1e-3)


def test_a_typo_in_its_name_is_told():
    with pytest.raises(ModelError, match="did you mean 'icons-dit'"):
        load_family("icons-ditt", torch.float32, torch.device("cpu"))
