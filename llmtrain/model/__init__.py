"""The decoder, its loss, its cost as formulas, and sampling from it."""
