"""Samplers by the names that people know, made from the schedule that the base was trained with."""

from __future__ import annotations

from typing import Any

from vislora.errors import ConfigError, nearest

DIFFUSION: dict[str, tuple[str, dict[str, Any]]] = {
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
FLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}),
}


def scheduler_for(pipeline: Any, name: str) -> Any:
    """Return a fresh scheduler. `auto`: dpm++ for a diffusion model, the model's own kind for a flow model.

    Raises `ConfigError` for an unknown name, or one of the other kind.
    """
    import diffusers

    config = pipeline.scheduler.config
    is_flow = "FlowMatch" in type(pipeline.scheduler).__name__
    fitting, other = (FLOW, DIFFUSION) if is_flow else (DIFFUSION, FLOW)
    if name == "auto":
        name = next(iter(fitting))
    if name not in fitting:
        reason = "is of another kind of model" if name in other else f"is unknown{nearest(name, fitting)}"
        raise ConfigError(f"scheduler '{name}' {reason}; this base takes: auto, {', '.join(fitting)}")
    class_name, options = fitting[name]
    return getattr(diffusers, class_name).from_config(config, **options)
