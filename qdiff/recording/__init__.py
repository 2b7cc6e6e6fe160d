"""What calibration hands over: values that the float model had while it made pictures.

:mod:`.trajectory` holds the recorded calls of the backbone, :mod:`.activation_statistics` the statistics of layers' inputs,
:mod:`.magnitude` the largest value that a model computes. :mod:`qdiff.calib` fills them.
"""
