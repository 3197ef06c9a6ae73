"""Originals that are trained where they lie: weights on disk, one unit in memory, any trainer around them."""
