"""What a user asks for and what was decided, as values without torch: YAML and JSON that a person reads and edits.

:mod:`.recipe` is the wish, :mod:`.plan` the decisions layer by layer, :mod:`.attention_plan` and :mod:`.routing_plan` their
parts about sparse attention and about precision that changes with the step.
"""
