"""Files next to config.json in which older repositories say how their weights are quantized."""

from collections.abc import Mapping

METHODS: Mapping[str, str] = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
"""By file, the method that it is of."""
