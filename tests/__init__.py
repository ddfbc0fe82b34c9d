"""A package, lest an installed one of this name is taken instead."""
