"""The stages, each a function from a run folder to a JSON result: this is where calib, core, export and engines meet.

The command line and the web page call the same functions; neither knows how a stage works, no stage knows who called it.
Sibling packages are imported inside the functions, so that ``qdiff calibrate`` works without onnx and ``qdiff --help``
without torch.
"""
