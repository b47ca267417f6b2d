"""Quantitative MRI in units of the Cramér-Rao bound: from a pulse train to parameter maps."""
