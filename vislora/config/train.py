"""Settings of `vislora train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from vislora.config.base import OneOf, Section
from vislora.config.data import DataConfig

Preset = Literal["attention", "attention-ff", "all", "every-layer", "none"]
Algorithm = Annotated[str, OneOf("vislora.registry:TRAINED")]


class TargetConfig(Section):
    """One `[[adapter.targets]]`: a pattern over module paths and what its layers get."""

    pattern: str
    """Glob over the dotted path of a layer (`*.attn2.to_k`), or `re:` and a regular expression."""
    rank: int | None = Field(None, ge=0, le=4096)
    """Rank of these layers; 0 leaves them out. Default: the adapter's."""
    alpha: float | None = Field(None, gt=0)
    """Alpha of these layers. Default: the adapter's."""
    algorithm: Algorithm | None = None
    """Algorithm of these layers. Default: the adapter's."""
    learning_rate: float | None = Field(None, gt=0, le=10)
    """Peak learning rate of these layers. Default: the optimizer's."""


class WordConfig(Section):
    """One `[[adapter.words]]`: a word of the captions that the text encoders learn, with the adapter."""

    word: str = Field(min_length=1)
    """The word as it stands in captions."""
    vectors: int | None = Field(None, ge=1, le=70)
    """How many it has, each in the place of a token. Default: as many as `begin`."""
    begin: str = ""
    """The text that it means at first. Default: the word itself, as the base reads it."""


FILE_DECIDES = ("preset", "rank", "alpha", "algorithm", "dora", "rank_stabilized", "tucker", "init", "targets")
"""What of an adapter is as its file has it, when training goes on from one."""


class AdapterConfig(Section):
    """What is trained."""

    begin: Path | None = None
    """An adapter file to go on from, of any format; layers, ranks and algorithms are the file's. Default: none."""
    preset: Preset = "all"
    """Layers: attention; attention-ff (+ feed-forward); all (+ convs, modulation); every-layer; none (patterns)."""
    rank: int = Field(8, ge=1, le=4096)
    """Rank of the low-rank product; of oft, oft_peft and boft the side of their blocks. full and ia3 have none."""
    alpha: float | None = Field(None, gt=0)
    """The effect is scaled by alpha / rank. Default: alpha = rank, a scale of 1."""
    algorithm: Algorithm = "lora"
    """Adapter algorithm."""
    dora: bool = False
    """Train a magnitude per output too, beside the direction (DoRA); steps take longer."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead (rsLoRA)."""
    tucker: bool = False
    """Decompose k x k convs into 1x1, k x k, 1x1."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    """How the down projection is drawn; the up projection is zero."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the layer's input left out while training."""
    rank_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the rank's channels left out while training; lora alone has such, all others pass it over."""
    module_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of adapter layers left out of a training step."""
    targets: tuple[TargetConfig, ...] = ()
    """Patterns that decide before the preset does; the first that matches wins."""
    text_encoders: bool = False
    """Train adapters on the text encoders too (preset attention-ff, same rank and alpha)."""
    words: tuple[WordConfig, ...] = ()
    """Words that the text encoders learn beside it: textual inversion, with an adapter (SD and SDXL)."""

    @model_validator(mode="after")
    def _has_each_word_once(self) -> Self:
        words = [item.word.lower() for item in self.words]
        twice = [word for word in words if words.count(word) > 1]
        if twice:
            raise ValueError(f"words: '{twice[0]}' is given twice")
        return self

    @model_validator(mode="after")
    def _is_as_its_file_has_it(self) -> Self:
        fields = type(self).model_fields
        decided = [name for name in FILE_DECIDES if getattr(self, name) != fields[name].default]
        if self.begin is not None and decided:
            raise ValueError(f"{decided[0]}: is as the file of adapter.begin has it; leave it out")
        return self

    @property
    def reads(self) -> bool:
        """Say whether the text encoders read in every step, and not once."""
        return self.text_encoders or bool(self.words)


class OptimizerConfig(Section):
    """How the adapter is optimized."""

    name: str = "adamw"
    """adamw, adam, adafactor, sgd; or a name of pytorch-optimizer (prodigy, came, lion, ...; extra `optimizers`)."""
    learning_rate: float | None = Field(None, gt=0, le=10)
    """Peak learning rate. Default: the base's, 1e-4 for real models."""
    text_encoder_learning_rate: float | None = Field(None, gt=0, le=10)
    """Peak rate of the text encoders' adapters. Default: half of the learning rate."""
    word_learning_rate: float | None = Field(None, gt=0, le=10)
    """Peak rate of the vectors of `adapter.words`. Default: the learning rate."""
    lora_plus_ratio: float = Field(1.0, gt=0, le=1000)
    """LoRA+: what starts at zero (the up projection) learns at this many times the rate."""
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the rate after the warm-up: constant, or falling to zero at the last step."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the rate rises from zero."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""


class LoopConfig(Section):
    """The training loop."""

    steps: int | None = Field(None, ge=1)
    """Optimizer steps. Default: the base's, 1500 for real models."""
    batch_size: int | None = Field(None, ge=1)
    """Images per device and forward pass. Default: the base's, 1 for real models."""
    gradient_accumulation: int = Field(1, ge=1)
    """Forward passes per optimizer step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of the forward pass; auto: bf16 on a GPU, none on a CPU. The adapter is always float32."""
    min_snr_gamma: float | None = Field(5.0, gt=0)
    """Min-SNR weight of a diffusion model's loss (ignored by flow models)."""
    timesteps: Literal["uniform", "logit-normal"] | None = None
    """How timesteps are drawn. Default: uniform for a diffusion model, logit-normal for a flow model."""
    timestep_shift: float | None = Field(None, gt=0, le=100)
    """Below 1 more of the low noise is trained, beyond 1 more of the high. Default: the base's, 1 for real models."""
    noise_offset: float = Field(0.0, ge=0, le=1)
    """Add this much noise that is the same over a whole channel, for very dark or bright images."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay, such as 0.99, of an average over the steps' adapters, which is then sampled and saved; 0: none."""
    save_every: int = Field(200, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the last checkpoints are kept."""
    validate_every: int = Field(50, ge=1)
    """Steps between measurements of the loss on the images of `data.held_out`."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder (extra `tensorboard`). `log.jsonl` is always written."""


class PriorConfig(Section):
    """Prior preservation: the base's own prediction is kept for captions without the trigger, which then decides."""

    replace: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """What names the new thing in captions -> what may stand there instead: `{", ink style" = ["", ", flat style"]}`"""
    captions: tuple[str, ...] = ()
    """More captions to keep, beside those that `replace` makes of each: what the trigger should leave alone."""
    regularization: Path | None = None
    """Folder of images to compare on, each with a caption of its own, or else one of `captions`."""
    weight: float = Field(1.0, gt=0, le=100)
    """What the difference to the base's prediction counts beside the loss of the images."""
    share: float = Field(0.5, gt=0, le=1)
    """Share of each batch that is compared; it costs time accordingly."""
    images: int = Field(0, ge=0)
    """Pictures that the base draws of those captions at the start, to compare on; 0: the folder's own images."""

    @model_validator(mode="after")
    def _compares_on_one_thing(self) -> Self:
        given = [name for name in ("replace", "images") if getattr(self, name)]
        if self.regularization and given:
            raise ValueError(f"{given[0]}: the images of regularization have their own captions; leave one of both out")
        return self

    @property
    def is_on(self) -> bool:
        """Say whether anything is to be kept."""
        return bool(self.replace or self.captions or self.regularization)


class SliderConfig(Section):
    """A slider: an adapter from one wording to another, learned from what the base predicts for both."""

    more: str = ""
    """Where strength 1 leads: `{caption}, smiling`, the caption within. Empty: adapters learn from images, as usual."""
    less: str = "{caption}"
    """Where strength -1 leads, in the same way. Default: the caption as it is."""
    reach: float = Field(1.0, gt=0, le=100)
    """How far strength 1 leads: so many times the difference of the predictions for both ends."""
    captions: tuple[str, ...] = ()
    """Without `data.folder`: captions of pictures that the base draws first, to learn on."""
    pictures: int = Field(32, ge=1)
    """How many of them the base draws."""

    @property
    def ends(self) -> dict[str, str]:
        """What captions are at either end; nothing where no slider is trained."""
        return {"more": self.more, "less": self.less} if self.more else {}

    @model_validator(mode="after")
    def _leads_somewhere(self) -> Self:
        if not self.more:
            if self.captions or self.less != "{caption}":
                raise ValueError("more is required, but not given: what a caption is at strength 1")
            return self
        lacking = [name for name in ("more", "less") if "{caption}" not in getattr(self, name)]
        if lacking:
            raise ValueError(f"{lacking[0]} must have {{caption}} where the caption is to stand")
        if self.more == self.less:
            raise ValueError("more and less are the same: nothing lies between them")
        return self


class SampleConfig(Section):
    """Images made while training, with the adapter as it is by then."""

    every: int = Field(0, ge=0)
    """Steps between samples, the first before step 1 and the last at the end; 0: none."""
    prompts: tuple[str, ...] = ()
    """One image per prompt. Default: the captions of the first four images."""
    negative_prompt: str = ""
    """What the samples should not show."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the first sample; the next ones count up."""


class TrainConfig(Section):
    """Train a style or character adapter from a folder of images."""

    output: Path = Path("runs/adapter")
    """Run folder: the adapter `<name>.safetensors`, the resolved config, checkpoints, samples, log."""
    name: str = ""
    """Name of the adapter. Default: the run folder's."""
    base: str = ""
    """Base model: a diffusers folder, a hub name, a .safetensors file, or `icons-dit`. Default: the embedded UNet."""
    base_parts: str = ""
    """For a base in one file: a diffusers folder with its configs and what the file does not hold."""
    format: str = "kohya"
    """File format of the adapter: kohya, diffusers, peft."""
    save_precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the tensors in the adapter file; alpha and DoRA's magnitudes stay exact."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of every random draw: the same command gives the same adapter on the same machine."""
    resume: bool = False
    """Go on from the last checkpoint in the run folder."""
    overwrite: bool = False
    """Start anew in a run folder that already holds a run."""
    dry_run: bool = False
    """Do all that comes before the first step, draw the images as training would see them, and stop."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train."""
    quantize: Literal["no", "int8", "nf4"] = "no"
    """Bits of the base's large weights, for a half or a quarter of their memory (extra `quantize`)."""
    data: DataConfig = Field(default_factory=DataConfig)
    """Images and captions."""
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    """What is trained."""
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    """Optimizer and learning rate."""
    loop: LoopConfig = Field(default_factory=LoopConfig)
    """The training loop."""
    prior: PriorConfig = Field(default_factory=PriorConfig)
    """Prior preservation."""
    slider: SliderConfig = Field(default_factory=SliderConfig)
    """A slider."""
    sample: SampleConfig = Field(default_factory=SampleConfig)
    """Samples while training."""

    @model_validator(mode="after")
    def _begins_at_zero(self) -> Self:
        if self.adapter.begin is not None and self.optimizer.lora_plus_ratio != 1.0:
            raise ValueError(
                "optimizer.lora_plus_ratio: is for what starts at zero, and with adapter.begin nothing does"
            )
        return self

    @model_validator(mode="after")
    def _has_pictures(self) -> Self:
        data, slider = self.data, self.slider
        if slider.more and (self.prior.is_on or self.adapter.words):
            name = "prior" if self.prior.is_on else "adapter.words"
            raise ValueError(f"{name}: a slider learns from the base's own predictions; leave it out")
        if data.folder is not None:
            if slider.captions:
                raise ValueError("slider.captions: are drawn where there is no data.folder; leave one of them out")
            return self
        if not slider.captions:
            raise ValueError("data.folder: required, but not given")
        given = [name for name in ("sources", "masks", "subsets", "trigger") if getattr(data, name)]
        if given:
            raise ValueError(f"data.{given[0]}: is for the images of data.folder, and none is given")
        return self
