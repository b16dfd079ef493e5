"""``compile_for_inference(model)``: token by token, what is slow is no longer the weights but all that is around them.

A decode step of a causal language model is compiled once, on a cache of fixed size; its attention to that cache is one
operator, layers that take the same input (query, key and value; gate and up) are one product, and float layers left in
the model read their weights at the speed of memory. Prompts of any length run as before. Any other module is compiled
as a whole.
"""

from qat_plugin.inference.attention import ATTENTION, attention
from qat_plugin.inference.compiled import compile_for_inference

__all__ = ["ATTENTION", "attention", "compile_for_inference"]
