import pytest
import torch
from data_helpers import make_image
from PIL import Image

from vislora.data.buckets import Bucket, assign
from vislora.data.cache import Cache
from vislora.data.dataset import TrainingSet
from vislora.data.encode import cache_latents, views
from vislora.data.masks import find_masks, mask_views, require_some, shrunk
from vislora.data.scan import scan
from vislora.errors import DataError

SQUARE = Bucket(64, 64)


@pytest.fixture
def folders(tmp_path):
    for name in ("a", "b"):
        make_image(tmp_path / "images" / f"{name}.png", (64, 64)).with_suffix(".txt").write_text("a cat")
    (tmp_path / "masks").mkdir()
    return tmp_path / "images", tmp_path / "masks"


def half(path, size=(64, 64), mode="L"):
    """Write a mask whose left half is white."""
    image = Image.new("L", size)
    image.paste(255, (0, 0, size[0] // 2, size[1]))
    if mode == "RGBA":
        clear = Image.new("RGBA", size, (255, 255, 255, 0))
        clear.paste((255, 255, 255, 255), (0, 0, size[0] // 2, size[1]))
        image = clear
    image.save(path)


def cached(images, masks, tmp_path, **how):
    found = scan(images).examples
    wanted = views(found, assign(found, 64, 8), fingerprint="vae", **how)
    cache = Cache(tmp_path / "cache")
    shown = mask_views(wanted, find_masks(found, images, masks))
    there = [[view for view in row if view] for row in shown]
    list(cache_latents(cache, wanted, lambda pixels: pixels[:, :, ::8, ::8]))
    list(cache_latents(cache, there, shrunk))
    return TrainingSet(cache, wanted, None, masks=shown), [view for row in there for view in row]


@pytest.mark.parametrize("mode", ["L", "RGBA"])
@pytest.mark.parametrize("size", [(64, 64), (128, 128)])
def test_a_mask_is_cut_to_the_cells_of_its_image(mode, size, folders, tmp_path):
    images, masks = folders
    half(masks / "a.webp" if mode == "L" else masks / "a.png", size, mode)
    data, _ = cached(images, masks, tmp_path)
    mask = data[0, 0, SQUARE]["mask"]
    assert mask.shape == (1, 8, 8)
    assert torch.allclose(mask[0], torch.tensor([1.0] * 4 + [0.0] * 4).expand(8, 8), atol=0.06)
    assert torch.equal(data[1, 0, SQUARE]["mask"], torch.ones(1, 8, 8))


def test_a_mask_is_mirrored_with_its_image(folders, tmp_path):
    images, masks = folders
    half(masks / "a.png")
    data, _ = cached(images, masks, tmp_path, flip=True)
    left = {data[0, visit, SQUARE]["mask"][0, 0, 0].round().item() for visit in range(20)}
    assert left == {0.0, 1.0}


def test_what_is_wrong_with_masks_is_told(folders, tmp_path):
    images, masks = folders
    half(masks / "aa.png")
    with pytest.raises(DataError, match=r"aa\.png: no training image has this name(.|\n)*may have one mask image"):
        find_masks(scan(images).examples, images, masks)
    (masks / "aa.png").unlink()
    half(masks / "a.png", (64, 32))
    with pytest.raises(DataError, match=r"a\.png: 64 x 32, its image 64 x 64"):
        find_masks(scan(images).examples, images, masks)
    Image.new("L", (64, 64)).save(masks / "a.png")
    _, there = cached(images, masks, tmp_path)
    with pytest.raises(DataError, match=r"black wherever their images are seen:\n.*a\.png"):
        require_some(Cache(tmp_path / "cache"), there)
