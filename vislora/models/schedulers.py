"""Samplers by the names that people know, made from the schedule that the base was trained with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from vislora.errors import ConfigError, nearest

Kinds = Mapping[str, tuple[str, dict[str, Any]]]
TRAILING = {"timestep_spacing": "trailing"}
"""The first step is at the very noise that the base was trained up to (arXiv 2305.08891): for adapters of few steps."""

DIFFUSION: Kinds = {
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++-sde-karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "ddim": ("DDIMScheduler", {}),
    "ddim-trailing": ("DDIMScheduler", TRAILING),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-trailing": ("EulerDiscreteScheduler", TRAILING),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "tcd": ("TCDScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
FLOW: Kinds = {
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}),
}
SOLVED: Kinds = {
    "flow-dpm++": ("DPMSolverMultistepScheduler", {}),
    "flow-unipc": ("UniPCMultistepScheduler", {}),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
}
"""Of flow models whose own scheduler is a diffusion solver on a flow's noise levels, as Sana's is."""


def scheduler_for(pipeline: Any, name: str) -> Any:
    """Return a fresh scheduler. `auto`: dpm++ for a diffusion model, flow-euler or flow-dpm++ for a flow model.

    Raises `ConfigError` for an unknown name, or one of the other kind.
    """
    import diffusers

    config = pipeline.scheduler.config
    fitting, other = _kinds(pipeline.scheduler)
    if name == "auto":
        name = next(iter(fitting))
    if name not in fitting:
        reason = "is of another kind of model" if name in other else f"is unknown{nearest(name, fitting)}"
        raise ConfigError(f"scheduler '{name}' {reason}; this base takes: auto, {', '.join(fitting)}")
    class_name, options = fitting[name]
    if fitting is SOLVED and name == "flow-euler":
        options = {"shift": config.flow_shift}
    return getattr(diffusers, class_name).from_config(config, **options)


def own_eta(scheduler: Any) -> float | None:
    """Return how much noise a sampler adds between its steps of its own accord; None: nobody can tell it how much."""
    found = inspect.signature(type(scheduler).step).parameters.get("eta")
    return None if found is None else float(found.default)


def _kinds(own: Any) -> tuple[Kinds, Kinds]:
    """Return the samplers that fit a model whose own is `own`, and those that do not."""
    if "FlowMatch" in type(own).__name__:
        return FLOW, {**DIFFUSION, **SOLVED}
    if own.config.get("use_flow_sigmas"):
        return SOLVED, {**DIFFUSION, **FLOW}
    return DIFFUSION, {**FLOW, **SOLVED}
