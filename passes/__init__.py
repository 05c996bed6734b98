"""One rewrite a file. Importing this package enters every pass into `onnxc.core.PASSES`."""

from passes.absorb_offsets import AbsorbOffsets
from passes.cluster import Cluster
from passes.cluster_vectors import ClusterVectors
from passes.correct_bias import CorrectBias
from passes.drop_identity import DropIdentity
from passes.drop_zero_states import DropZeroStates
from passes.equalize import Equalize
from passes.expand_broadcasts import ExpandBroadcasts
from passes.factorize import Factorize
from passes.fold_constants import FoldConstants
from passes.fold_norm import FoldNorm
from passes.merge_bias import MergeBias
from passes.prune import Prune
from passes.quantize import Quantize
from passes.quantize_activations import QuantizeActivations
from passes.quantize_constants import QuantizeConstants
from passes.quantize_dynamic import QuantizeDynamic
from passes.quantize_layers import QuantizeLayers
from passes.quantize_levels import QuantizeLevels
from passes.quantize_weights import QuantizeWeights
from passes.reconstruct import Reconstruct
from passes.share_constants import ShareConstants
from passes.shrink import Shrink
from passes.simplify_shapes import SimplifyShapes
from passes.sparsify import Sparsify
from passes.split_outliers import SplitOutliers
from passes.store_codebooks import StoreCodebooks
from passes.to_qoperator import ToQOperator
from passes.upgrade_opset import UpgradeOpset
from passes.widen import Widen

__all__ = [
    "AbsorbOffsets",
    "Cluster",
    "ClusterVectors",
    "CorrectBias",
    "DropIdentity",
    "DropZeroStates",
    "Equalize",
    "ExpandBroadcasts",
    "Factorize",
    "FoldConstants",
    "FoldNorm",
    "MergeBias",
    "Prune",
    "Quantize",
    "QuantizeActivations",
    "QuantizeConstants",
    "QuantizeDynamic",
    "QuantizeLayers",
    "QuantizeLevels",
    "QuantizeWeights",
    "Reconstruct",
    "ShareConstants",
    "Shrink",
    "SimplifyShapes",
    "Sparsify",
    "SplitOutliers",
    "StoreCodebooks",
    "ToQOperator",
    "UpgradeOpset",
    "Widen",
]
