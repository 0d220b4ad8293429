"""Find backdoors in diffusion models.

The names below are loaded when they are first used, so `import terd_nb` is fast. This is the one
file of the package that is written by hand; all others are exported from the notebooks."""
import importlib

__version__ = "0.1.0"

# Each public name and the module that holds it.
PUBLIC = {
    "CheckpointError": "loading.files",
    "Denoiser": "denoiser",
    "Guard": "guard",
    "InputDetector": "input_detection",
    "ModelDetector": "model_detection",
    "NoiseSchedule": "diffusion",
    "Prediction": "diffusion",
    "ScanReport": "scanning",
    "Trigger": "triggers",
    "load": "loading.schedulers",
    "remove_backdoor": "removal",
    "reverse_trigger": "search",
    "scan": "scanning",
    "zoo_path": "zoo",
}
__all__ = [*PUBLIC, "__version__"]


def __getattr__(name):
    if name not in PUBLIC:
        raise AttributeError(f"module 'terd_nb' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"terd_nb.{PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *PUBLIC})
