"""ADFQ-ViT (arXiv 2407.02763): quantizers for the activations after LayerNorm and GELU, and learned roundings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

from adfq.bits import Bits
from adfq.calibration import calibrate_activations, quantize_weights
from adfq.errors import AdfqError
from adfq.method import Run
from adfq.quantizers import (
    LogQuantizer,
    PerPatchOutlierQuantizer,
    Quantizer,
    RunTimePatchOutlierQuantizer,
    ShiftLogQuantizer,
    UniformQuantizer,
)
from adfq.reconstruction import (
    AttentionScores,
    Composition,
    Loss,
    RoundingMethod,
    optimize_units,
    roundings_and_steps,
)
from adfq.reconstruction.options import check_number
from adfq.sites import Network, Recipe


@dataclass(frozen=True)
class ADFQViT(RoundingMethod):
    """ADFQ-ViT: per-patch outlier-aware quantizers, shift-log quantizers, module-wise optimization.

    - PPOQ, the per-patch outlier-aware quantizer, after LayerNorm (section "per-patch outlier-aware quantizer"). A
      detector, and Segment Anything outside of windows, has no fixed token positions: there a patch's range is
      computed from the patch itself at run time.
    - SLQ, the shift-log2 quantizer, after GELU; base √2 is that of the released code.
    - AMO, the attention-score enhanced module-wise optimization, of attentions (cross-attentions too), MLPs,
      convolution stages, patch embedding, patch mergings, a classifier's head, and neck and heads of Segment
      Anything. A detector's neck and heads are calibrated only.

    Attributes:
        qkv_threshold: α before attention and before Swin's patch merging, in the activation's units; 5 as released.
        fc1_threshold: α before the MLP, in the activation's units; 10 as released.
        log_base: base of the shift-log quantizer, 2 or √2.
        shift: minimum of the shift-log quantizer, ``"dynamic"`` (of the tensor at hand) or ``"static"`` (of the
            calibration images).
        patch_embed_bits: bit-width of the input image.
        ppoq: False puts uniform per-tensor quantizers in place of PPOQ.
        slq: False puts uniform per-tensor quantizers in place of SLQ.
        attention_weight: weight of the divergence between attention scores, in the loss of units with a softmax.
        temperature: temperature of that divergence.
        released: True for the released code's peculiarities. Attention scores are compared by a softmax over heads of
            probabilities, and by KL(quantized ‖ full precision). Activation quantizers pass no gradient to their input.
            The step sizes of query, key, probabilities and value are not learned. Batches are drawn with replacement.
            The optimized state is kept, whatever its error.

    Raises:
        AdfqError: for a value out of range.
    """

    label = "ADFQ-ViT"
    paper = "arXiv 2407.02763"
    calibration_size = 1024

    qkv_threshold: float = 5.0
    fc1_threshold: float = 10.0
    log_base: float = 2**0.5
    shift: str = "dynamic"
    patch_embed_bits: int = 8
    ppoq: bool = True
    slq: bool = True
    attention_weight: float = 10.0
    temperature: float = 4.0
    released: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "attention_weight")
        if not isinstance(self.temperature, (int, float)) or not self.temperature > 0:
            raise AdfqError(f"temperature must be above 0, got {self.temperature!r}")

    def recipe(self, bits: Bits) -> Recipe:
        """Return the quantizer of each site role."""
        activation = bits.activation
        mse = partial(UniformQuantizer, activation, range="mse")
        activations: dict[str, Callable[[], Quantizer]] = {
            "patch_embed": partial(UniformQuantizer, self.patch_embed_bits, range="percentile"),
            **dict.fromkeys(("query", "key", "value"), mse),
            "probs": partial(LogQuantizer, activation),
        }
        run_time: dict[str, Callable[[], Quantizer]] = {}
        if self.ppoq:
            thresholds = {"qkv": self.qkv_threshold, "fc1": self.fc1_threshold, "reduction": self.qkv_threshold}
            for role, threshold in thresholds.items():
                activations[role] = partial(PerPatchOutlierQuantizer, activation, threshold)
                run_time[role] = partial(RunTimePatchOutlierQuantizer, activation, threshold)
        if self.slq:
            activations["fc2"] = partial(ShiftLogQuantizer, activation, self.log_base, self.shift)
        return Recipe(
            activation=partial(UniformQuantizer, activation, range="percentile"),
            weight=partial(UniformQuantizer, bits.weight, "row", "percentile"),
            activations=activations,
            run_time=run_time,
        )

    def apply(self, network: Network, run: Run, bits: Bits) -> None:
        """Quantize a network in place; see `adfq.method.Method.apply`."""
        network.attach(self.recipe(bits))
        quantize_weights(network)
        if self.iterations:
            results = optimize_units(network, run, self, self.composition())
            run.report["modules"] = {name: asdict(result) for name, result in results.items()}
        calibrate_activations(network, run.images)  # all sites, or those outside of every unit

    def composition(self) -> Composition:
        """Return AMO as parts of a reconstruction: roundings and step sizes of attentions and MLPs, mixed inputs."""
        return Composition(
            losses=lambda unit: [
                Loss(unit),
                AttentionScores(unit, self.attention_weight, self.temperature, self.released),
            ],
            trained=roundings_and_steps(self, products=not self.released),
            units=lambda network: network.units,
            mix_probability=self.mix_probability,
            drop_probability=self.drop_probability,
            keeps_all=self.released,
            straight_through=not self.released,
            replacement=self.released,
        )
