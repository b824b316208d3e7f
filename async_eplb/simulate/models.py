"""Descriptions of published models: the number and the size of their experts."""

from dataclasses import dataclass

from async_eplb.arguments import Real, Whole, settle
from async_eplb.errors import InvalidOptions


@dataclass(frozen=True, slots=True)
class Model:
    """A Mixture-of-Experts model.

    :param num_layers: MoE layers
    :param num_experts: routed experts of each
    :param hidden: width of the model
    :param intermediate: width of an expert
    :param bits_per_weight: of an expert's three matrices, their scales included
    :param num_groups: of experts that the router chooses by; 1 without
    :param source: where the numbers are from
    :raises InvalidOptions: if a number is out of range
    """

    num_layers: int
    num_experts: int
    hidden: int
    intermediate: int
    bits_per_weight: float
    num_groups: int
    source: str

    def __post_init__(self) -> None:
        counts = ("num_layers", "num_experts", "hidden", "intermediate", "num_groups")
        settle(self, InvalidOptions, bits_per_weight=Real(above=True), **dict.fromkeys(counts, Whole(1)))

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one expert: gate, up and down projection."""
        return round(3 * self.hidden * self.intermediate * self.bits_per_weight / 8)


_BLOCK_FP8 = 8 + 32 / 128**2
"""FP8 with a float32 scale for each block of 128 x 128."""
_MXFP4 = 4 + 8 / 32
"""FP4 with an 8-bit scale for each 32 weights; biases, a thousandth, are left out."""

MODELS = {
    "deepseek-v3": Model(
        58, 256, 7168, 2048, _BLOCK_FP8, 8, "huggingface.co/deepseek-ai/DeepSeek-V3, config.json: 61 layers, 3 dense"
    ),
    "qwen3-235b": Model(94, 128, 4096, 1536, 16, 1, "huggingface.co/Qwen/Qwen3-235B-A22B, config.json: bfloat16"),
    "gpt-oss-120b": Model(36, 128, 2880, 2880, _MXFP4, 1, "huggingface.co/openai/gpt-oss-120b, config.json: MXFP4"),
    "kimi-k2": Model(
        60,
        384,
        7168,
        2048,
        _BLOCK_FP8,
        1,
        "huggingface.co/moonshotai/Kimi-K2-Instruct, config.json: 61 layers, 1 dense",
    ),
}
