"""A number per row, higher is better: one file a scorer. Each is a method of `xpert select` too."""
