"""Turn any PyTorch model into n-stream mHC (manifold-constrained hyper-connections, arXiv 2512.24880)."""

from mhc_compile.checkpoint import load
from mhc_compile.clipping import AdaptiveClip
from mhc_compile.config import MHCConfig
from mhc_compile.convert import (
    high_priority_merges,
    history,
    mhc_compile,
    param_groups,
    recompute,
    restore,
    set_iterations,
)
from mhc_compile.draw import draw
from mhc_compile.errors import (
    CaptureError,
    ConfigError,
    ExportError,
    MHCError,
    PartitionError,
    RewriteError,
    ShapeError,
)
from mhc_compile.explain import explain
from mhc_compile.export import export_onnx
from mhc_compile.gains import composite_gains, gain
from mhc_compile.health import StabilityWarning
from mhc_compile.hyper_connection import HyperConnection
from mhc_compile.monitor import Monitor
from mhc_compile.observation import observe
from mhc_compile.owning_backend import Backend
from mhc_compile.partition import cost_model, partition
from mhc_compile.pipeline import pipeline_schedule, pipeline_stages, stage_modules
from mhc_compile.plan import Plan
from mhc_compile.source import Source, source
from mhc_compile.trace import trace
from mhc_compile.update_scales import scale_updates
from mhc_compile.verify import verify

__version__ = "0.1.0"
__all__ = [
    "AdaptiveClip",
    "Backend",
    "CaptureError",
    "ConfigError",
    "ExportError",
    "HyperConnection",
    "MHCConfig",
    "MHCError",
    "Monitor",
    "PartitionError",
    "Plan",
    "RewriteError",
    "ShapeError",
    "Source",
    "StabilityWarning",
    "composite_gains",
    "cost_model",
    "draw",
    "explain",
    "export_onnx",
    "gain",
    "high_priority_merges",
    "history",
    "load",
    "mhc_compile",
    "observe",
    "param_groups",
    "partition",
    "pipeline_schedule",
    "pipeline_stages",
    "recompute",
    "restore",
    "scale_updates",
    "set_iterations",
    "source",
    "stage_modules",
    "trace",
    "verify",
]
