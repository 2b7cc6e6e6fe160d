"""Number formats: what a code of so many bits means, how its scale is chosen, and how codes are stored.

:mod:`.table` has one row for each format; :mod:`.elements` rounds to an element, :mod:`.scales` chooses constant scales,
:mod:`.dynamic` those of run time. :mod:`.weight` is a packed weight, :mod:`.packing` the bytes it is stored in.
"""
