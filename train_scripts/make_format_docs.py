"""Write docs/formats.md: what every format can hold, found out by writing it and reading it back.

Every registered algorithm is put on layers of real families, with random numbers, and sent through each format. A test
compares the page with what this makes.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from vislora.algebra.low_rank import Limits
from vislora.algebra.to_lora import Conversion, to_lora
from vislora.algorithms.base import InitOptions, Kind, LayerSpec
from vislora.errors import AdapterFileError, VisloraError
from vislora.formats.adapter_file import AdapterFile, AdapterModule
from vislora.formats.contract import Format
from vislora.formats.kohya import KOHYA
from vislora.formats.names import FAMILY_NAMES
from vislora.formats.other_things import OTHER_THINGS
from vislora.formats.overview import families
from vislora.formats.reading import load
from vislora.formats.writing import save, unwritable
from vislora.registry import ALGORITHMS, FORMATS, TRAINED

OUT, IN, RANK = 32, 16, 8
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
LINEAR, CONV, NORM = f"{BLOCK}.attn1.to_q", "mid_block.resnets.0.conv1", "mid_block.resnets.0.norm1"
QKV, FUSED = "transformer_blocks.0.attn.to_", "lora_unet_joint_blocks_0_x_block_attn_qkv"
NOT_WRITTEN = "not written"


@dataclass(frozen=True)
class Sample:
    """An adapter that shows one kind of value."""

    title: str
    adapter: AdapterFile


@dataclass(frozen=True)
class Verdict:
    """What a format does with a sample: `exact`, the relative error, or `refused`, with the reason."""

    word: str
    reason: str = ""


def page() -> str:
    """Return docs/formats.md."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _page()


def _page() -> str:
    parts = [HEAD, formats_table(), KINDS_HEAD, *kinds_table(), LORA_HEAD, lora_table(), FAMILIES_HEAD, family_table()]
    return "\n\n".join([*parts, OTHERS_HEAD, others_list()]) + "\n"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    names = list(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in [names, ["---"] * len(names), *rows])


def formats_table() -> str:
    """Return a row per format."""
    rows = []
    for name in FORMATS:
        form: Format = FORMATS[name]
        also = ", ".join(f"`{alias}`" for alias in FORMATS.aliases_of(name)) or "-"
        rows.append((f"`{name}`", also, "yes", "yes" if form.writable else "no", families(form), form.about))
    return table(("format", "also called", "read", "written", "families", "what it is"), rows)


def kinds_table() -> tuple[str, str]:
    """Return what becomes of each kind in each format that is written, and why some are refused."""
    forms = [FORMATS[name] for name in FORMATS if FORMATS[name].writable]
    reasons: dict[str, int] = {}
    rows = []
    for sample in samples():
        cells = []
        for form in forms:
            found = verdict(sample, form)
            number = reasons.setdefault(found.reason, len(reasons) + 1) if found.reason else 0
            cells.append(f"{found.word} [{number}]" if number else found.word)
        rows.append((sample.title, *cells))
    notes = "\n".join(f"{number}. {reason}" for reason, number in reasons.items())
    return table(("kind", *(f"`{form.name}`" for form in forms)), rows), notes


def lora_table() -> str:
    """Return what `--as lora` makes of every kind."""
    rows = []
    for sample in [item for item in samples() if item.title != "lora" and " of " not in item.title]:
        exact, reduced = as_lora(sample, None), as_lora(sample, 2)
        if exact != "is LoRA":
            rows.append((sample.title, exact, reduced))
    return table(("kind", "`--as lora`", "`--as lora --rank 2`"), rows)


def as_lora(sample: Sample, rank: int | None) -> str:
    """Return what becomes of a sample's first module as plain LoRA, with the measured error."""
    _, told = to_lora(sample.adapter, Limits(rank))
    if not told:
        return "is LoRA"
    if not isinstance(told[0], Conversion):
        return "stays as it is"
    return f"rank {told[0].rank}, nearest" if told[0].reduced else f"rank {told[0].rank}, {near(told[0].error)}"


def family_table() -> str:
    """Return a row per family: its components, and how kohya's and ComfyUI's files call one layer of it."""
    rows = []
    for name, names in FAMILY_NAMES.items():
        stored = [FORMATS[form].place("denoiser", names.an_example, name) for form in ("kohya", "comfy")]
        cells = (f"`{place.name}`" if place else NOT_WRITTEN for place in stored)
        rows.append((f"`{name}`", ", ".join(f"`{item}`" for item in names.tables), *cells))
    return table(("family", "components with name tables", "a layer in `kohya`", "in `comfy`"), rows)


def others_list() -> str:
    """Return the names of all that is told from an adapter."""
    return "\n".join(f"- {name}" for name in dict.fromkeys(name for name, _ in OTHER_THINGS))


def samples() -> Iterator[Sample]:
    """Yield every algorithm on a linear layer, a conv and a fused layer, and what can be on top of LoRA."""
    for name in TRAINED:
        flat, conv, core = (fresh(name, *place) for place in ((LINEAR,), (CONV, (3, 3)), (CONV, (3, 3), True)))
        titles = {name: flat, f"{name} on a conv": conv, f"{name} on a conv, Tucker": core}
        same = core is None or conv is None or core.tensors.keys() == conv.tensors.keys()
        for title, module in titles.items():
            if module is not None and not (same and module is core):
                yield alone(title, module)
    weight, bias = torch.randn(OUT), torch.randn(OUT)
    yield alone(
        "norm", AdapterModule(component="denoiser", path=NORM, algo="norm", tensors={"w_norm": weight}, bias=bias)
    )
    yield alone(
        "set", AdapterModule(component="denoiser", path=NORM, algo="set", tensors={"set_weight": weight}, bias=bias)
    )
    lora = fresh("lora", LINEAR)
    assert lora is not None
    yield alone(
        "lora + magnitude per output (DoRA)", replace(lora, magnitude=torch.rand(OUT) + 0.5, magnitude_axis="out")
    )
    yield alone("lora + magnitude per input (DoRA)", replace(lora, magnitude=torch.rand(IN) + 0.5, magnitude_axis="in"))
    yield alone("lora + bias", replace(lora, bias=bias))
    apart = [fresh("lora", QKV + letter, seed=seed) for seed, letter in enumerate("qkv")]
    yield Sample(
        "lora of q, k and v, trained apart", AdapterFile(modules=[item for item in apart if item], family="sd3")
    )
    for name in [item for item in TRAINED if item != "oft_peft"]:
        yield from fused(name)


def alone(title: str, module: AdapterModule) -> Sample:
    """Return a sample of one module."""
    return Sample(title, AdapterFile(modules=[module], family="sd"))


def fused(name: str) -> Iterator[Sample]:
    """Yield an algorithm on the fused q, k and v of SD 3, read from kohya's names as a file has it."""
    module = fresh(name, LINEAR, outputs=3 * OUT)
    if module is None:
        return
    tensors = {f"{FUSED}.{KOHYA.suffixes[slot]}": tensor for slot, tensor in module.tensors.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save_file({**tensors, f"{FUSED}.alpha": torch.tensor(0.0 if name in ("oft", "boft") else 3.0)}, path)
        read = load(path)
        modules = [
            replace(item, tensors={slot: t.clone() for slot, t in item.tensors.items()}) for item in read.modules
        ]
    yield Sample(f"{name} of a fused qkv", AdapterFile(modules=modules, family="sd3"))


def fresh(
    name: str, path: str, kernel: tuple[int, ...] = (), tucker: bool = False, seed: int = 0, outputs: int = OUT
) -> AdapterModule | None:
    """Return a module of this algorithm with random numbers, None where it does not go on such a layer."""
    kind: Kind = "conv" if kernel else "linear"
    generator = torch.Generator().manual_seed(seed)
    layer = LayerSpec(kind, (outputs, IN, *kernel))
    slots = ALGORITHMS[name].init(layer, InitOptions(RANK, tucker=tucker, generator=generator))
    if kind not in ALGORITHMS[name].kinds(slots):
        return None
    tensors = {
        slot: tensor if slot in ALGORITHMS[name].constants else torch.randn(tensor.shape, generator=generator) / 8
        for slot, tensor in slots.items()
    }
    return AdapterModule(component="denoiser", path=path, algo=name, tensors=tensors, alpha=3.0)


def verdict(sample: Sample, form: Format) -> Verdict:
    """Send a sample through a format and say what became of it."""
    losses = unwritable(sample.adapter, form.name)
    if losses:
        return Verdict("refused", losses[0].reason.replace("{} ", "").replace(f"{form.name} files", "such files"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("a" if form.container == "folder" else "a.safetensors")
        try:
            save(sample.adapter, path, form.name)
        except AdapterFileError as error:
            return Verdict("refused", str(error).splitlines()[0].removeprefix(f"{path}: "))
        return Verdict(near(_error(sample.adapter, load(path))))


def near(error: float) -> str:
    """Return `exact`, or the power of ten under which an error is: its digits differ from machine to machine."""
    return "exact" if error == 0.0 else f"within 1e{math.ceil(math.log10(error))}"


def _error(adapter: AdapterFile, again: AdapterFile) -> float:
    """Return the largest relative difference of the weights' and biases' changes, on a random base."""
    found = {(module.component, module.layer): module for module in again.modules}
    if found.keys() != {(module.component, module.layer) for module in adapter.modules}:
        raise AssertionError("a conversion that was not refused lost a module")
    worst = 0.0
    for module in adapter.modules:
        other = found[module.component, module.layer]
        shape = [IN if side < 0 else side for side in module.shape] or [OUT]
        base = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        pairs = [(adapter.delta(module, base), again.delta(other, base))]
        bias, read = module.bias_delta(), other.bias_delta()
        pairs += [(bias, read)] if bias is not None and read is not None else []
        worst = max([worst, *(float((one - two).norm() / one.norm()) for one, two in pairs)])
    return worst


HEAD = """# Formats

Made by `python train_scripts/make_format_docs.py`, which writes every kind in every format and reads it back; a test
compares this page with the code. How to convert: [converting.md](converting.md).

## Files"""
KINDS_HEAD = """## Kinds

What becomes of a module in a file of each format that is written. `exact`: read back, the change of the weight (and of
the bias) is equal to the last bit in float64. `within`: the relative difference, of one rounding. `refused`: nothing is
written unless `--allow-loss` is given, which names what is left out. `fused qkv`: the kind on a layer of SD 3 that
diffusers has in three parts."""
LORA_HEAD = """## Plain LoRA on request

Every format holds plain LoRA. The error is that of the change of the weight, relative (Frobenius norm); `nearest` is
the best of that rank, and the conversion prints the error of every module."""
FAMILIES_HEAD = """## Families

A family is recognised by the names and shapes of its layers. `diffusers` and `peft` files have the paths of the
diffusers models; the others have names of their own for the same layers."""
OTHERS_HEAD = """## What is no adapter

Named as what it is by `inspect` and `convert`:"""


def main() -> int:
    """Write the page."""
    path = Path(__file__).resolve().parents[1] / "docs" / "formats.md"
    try:
        path.write_text(page(), encoding="utf-8")
    except (OSError, VisloraError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
