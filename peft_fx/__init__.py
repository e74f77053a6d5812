"""A torch.compile backend that finds LoRA-style sub-graphs, `xW + s(xA)B`, and rewrites them to `x(W + sAB)` where
that is cheaper.

torch.compile(model, backend="peft_fx")     # or backend=peft_fx.backend
print(peft_fx.explain(model, **batch))      # what was rewritten, what was not, and why
"""

__version__ = "0.1.0"

from peft_fx.checking import Check as Check
from peft_fx.checking import check as check
from peft_fx.compiling import backend as backend
from peft_fx.estimates import Estimate as Estimate
from peft_fx.estimating import estimate as estimate
from peft_fx.explaining import explain as explain
from peft_fx.outputs import loss_only as loss_only
from peft_fx.passes.findings import ChunkedLoss as ChunkedLoss
from peft_fx.passes.findings import KeptInput as KeptInput
from peft_fx.passes.findings import Refusal as Refusal
from peft_fx.passes.findings import Site as Site
from peft_fx.preparing import Cure as Cure
from peft_fx.preparing import cures as cures
from peft_fx.preparing import prepare as prepare
from peft_fx.preparing import restore as restore
from peft_fx.reports import GradientError as GradientError
from peft_fx.reports import Report as Report

__all__ = [
    "Check",
    "ChunkedLoss",
    "Cure",
    "Estimate",
    "GradientError",
    "KeptInput",
    "Refusal",
    "Report",
    "Site",
    "__version__",
    "backend",
    "check",
    "cures",
    "estimate",
    "explain",
    "loss_only",
    "prepare",
    "restore",
]
