"""Reconstruction: unit after unit, parts of the quantized network are trained to give full precision's outputs.

A method composes it (`Composition`) of losses (`adfq.reconstruction.losses`), of what is trained
(`adfq.reconstruction.trained`), of units and their inputs. Sources: AdaRound, Nagel et al., 2020; learned step size,
Esser et al., 2020; blocks, BRECQ, Li et al., 2021; mixed inputs and dropped quantization, QDrop, Wei et al., 2022.
"""

from adfq.reconstruction.importance import importance_of_rows
from adfq.reconstruction.losses import AttentionScores, Divergence, Loss
from adfq.reconstruction.optimizer import Composition, Result, optimize_units, roundings_and_steps
from adfq.reconstruction.options import OptimizerOptions, OptimizingMethod, RoundingMethod, RoundingOptions
from adfq.reconstruction.suffix import SuffixFeature
from adfq.reconstruction.trained import Roundings, Steps, Trained, Weights
from adfq.reconstruction.unit import Batch, Unit, blocks_of

__all__ = [
    "AttentionScores",
    "Batch",
    "Composition",
    "Divergence",
    "Loss",
    "OptimizerOptions",
    "OptimizingMethod",
    "Result",
    "RoundingMethod",
    "RoundingOptions",
    "Roundings",
    "Steps",
    "SuffixFeature",
    "Trained",
    "Unit",
    "Weights",
    "blocks_of",
    "importance_of_rows",
    "optimize_units",
    "roundings_and_steps",
]
