"""How good and how fast results are: pictures, clips, tensors and times.

:mod:`.metrics` measures distances, :mod:`.prompt_accuracy` and :mod:`.motion` what the bundled models' pictures and clips show,
:mod:`.timing` speeds; :mod:`.images` and :mod:`.video` write and read the files.
"""
