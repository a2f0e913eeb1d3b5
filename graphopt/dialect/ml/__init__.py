"""The operators of classical machine learning, of the domain ai.onnx.ml."""

from . import encoders, features, linear, maps, svm, tree_ensembles

__all__ = ["encoders", "features", "linear", "maps", "svm", "tree_ensembles"]
