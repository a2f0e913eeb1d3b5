"""What each part of a trained rewrite is worth: ablations of a pass, measured on text that no training saw."""

from graphopt.evaluation.ablation import ablate
from graphopt.evaluation.measure import Bucket, Measured, Probe, measure
from graphopt.evaluation.result import Ablation, Row
from graphopt.evaluation.variants import LeftOut, Variant, variants

__all__ = ["Ablation", "Bucket", "LeftOut", "Measured", "Probe", "Row", "Variant", "ablate", "measure", "variants"]
