"""The embedders: one file each, found by its name (see `xpert.plugins`); `xpert.embedding` opens one by its spec."""
