"""From a float model, a recipe and statistics to a plan and a quantized model.

:mod:`.quantize` is the way through: :mod:`.layer_plans` before any method decides, :mod:`.block_walk` block by block,
:mod:`.reconstruction` and :mod:`.distillation` train, :mod:`.checkpoint` writes and reads the result.
"""
