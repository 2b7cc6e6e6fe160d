"""Exported graphs read without onnx.

:mod:`.walk` goes through the nodes of a protobuf with its nested graphs, :mod:`.parts` names the files that a graph was cut into.
"""
