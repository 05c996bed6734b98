"""One rewrite a file. Importing this package enters every pass into `onnxc.core.PASSES`."""

from passes.correct_bias import CorrectBias
from passes.drop_identity import DropIdentity
from passes.equalize import Equalize
from passes.fold_constants import FoldConstants
from passes.fold_norm import FoldNorm
from passes.merge_bias import MergeBias
from passes.quantize import Quantize
from passes.quantize_dynamic import QuantizeDynamic
from passes.quantize_weights import QuantizeWeights
from passes.upgrade_opset import UpgradeOpset
from passes.drop_zero_states import DropZeroStates
from passes.expand_broadcasts import ExpandBroadcasts
from passes.share_constants import ShareConstants
from passes.simplify_shapes import SimplifyShapes
from passes.to_qoperator import ToQOperator
from passes.widen import Widen

__all__ = [
    "CorrectBias",
    "DropIdentity",
    "Equalize",
    "FoldConstants",
    "FoldNorm",
    "MergeBias",
    "Quantize",
    "QuantizeDynamic",
    "QuantizeWeights",
    "UpgradeOpset",
    "DropZeroStates",
    "ExpandBroadcasts",
    "ShareConstants",
    "SimplifyShapes",
    "ToQOperator",
    "Widen",
]
