"""K-LoRA: on every layer and in every step one of two adapters acts, content first, style towards the end.

    S_c, S_s   sums of the K largest magnitudes of a layer's two changes, K = r_c r_s
    gamma      the mean over layers of sum |dW_c| / sum |dW_s|, which makes their sizes alike
    S          alpha step / last + beta
    content acts where S_c / gamma >= S_s S, else style

Ouyang et al., arXiv 2502.18461, and their code (HVision-NKU/K-LoRA, klora.py and utils.py), with its alpha = 1.5 and
beta = 0.5. Where only one of the two has the layer, that one acts. Strengths do not enter the choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from vislora.errors import ConfigError
from vislora.inject.composition import OnLayers, Run
from vislora.inject.parts import LayerAdapter

Layers = Mapping[str, LayerAdapter]


@dataclass(frozen=True)
class KLora:
    """content, style: names of the two adapters. alpha, beta: how the style gains weight over the steps."""

    content: str
    style: str
    alpha: float = 1.5
    beta: float = 0.5
    _last: list[tuple[list[LayerAdapter], dict[str, tuple[float, float]]]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def runs(self, names: Sequence[str], step: int, last: int, on_layers: OnLayers) -> list[Run]:
        """Return one run. Raises `ConfigError` when other adapters than the two are active."""
        if set(names) != {self.content, self.style}:
            shown = ", ".join(names) or "none"
            raise ConfigError(
                f"composition 'klora' is of content '{self.content}' and style '{self.style}'; active are: {shown}"
            )
        contents, styles = on_layers(self.content), on_layers(self.style)
        sums = self._sums(contents, styles)
        scale = self.alpha * (step / last if last else 0.0) + self.beta
        style = {path for path, (mine, other) in sums.items() if mine < other * scale}
        on_content = (sums.keys() - style) | (contents.keys() - styles.keys())
        on_style = style | (styles.keys() - contents.keys())
        return [Run(1.0, {self.content: frozenset(on_content), self.style: frozenset(on_style)})]

    def _sums(self, contents: Layers, styles: Layers) -> dict[str, tuple[float, float]]:
        """Return, for every layer that both have, S_c / gamma and S_s; made once for these two adapters."""
        now = [*contents.values(), *styles.values()]
        for adapters, sums in self._last:
            if len(adapters) == len(now) and all(one is other for one, other in zip(adapters, now, strict=True)):
                return sums
        self._last[:] = [(now, _compared(contents, styles))]
        return self._last[0][1]


def _compared(contents: Layers, styles: Layers) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    ratios = []
    for path in contents.keys() & styles.keys():
        content, style = contents[path], styles[path]
        one, other = _magnitudes(content), _magnitudes(style)
        count = min(_rank(content) * _rank(style), one.numel())
        found[path] = float(one.topk(count).values.sum()), float(other.topk(count).values.sum())
        ratios.append(float(one.sum()) / max(float(other.sum()), 1e-30))
    gamma = sum(ratios) / len(ratios) if ratios else 1.0
    return {path: (mine / gamma if gamma else mine, other) for path, (mine, other) in sorted(found.items())}


def _magnitudes(adapter: LayerAdapter) -> Tensor:
    """Return |dW| of a layer, flat, at strength 1. Raises `ConfigError` for a kind that depends on the base weight."""
    if adapter.magnitude is not None or adapter.algorithm.needs_base or not adapter.slots:
        raise ConfigError(f"composition 'klora' compares plain changes; '{adapter.name}' has another kind")
    slots = {
        name: slot.detach() if not slot.is_floating_point() else slot.detach().float()
        for name, slot in adapter.slots.items()
    }
    return adapter.algorithm.delta(slots, adapter.scale, None).abs().flatten()


def _rank(adapter: LayerAdapter) -> int:
    return adapter.algorithm.rank(adapter.slots)
